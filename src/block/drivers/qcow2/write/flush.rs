//! Writing tables back.
//!
//! # The order on disk
//!
//! After a power cut at any moment the image must be valid but for leaked clusters, everything flushed must be there, and
//! everything else must be old or new. (features.md, section 4, rules 1 to 7; QEMU's `qcow2-cache.c` has the same dependencies.)
//!
//! 1. A refcount block reaches the disk before any L1 or L2 entry that relies on it. (With lazy refcounts the dirty bit does
//!    instead: the header says that refcounts must be counted again.)
//! 2. Data, and what was copied around it, reaches the disk before the L2 entry that leads there.
//! 3. An entry that no longer leads to a cluster reaches the disk before the cluster's refcount drops, before the file is told to
//!    forget it, and before anybody else may have it ([`super::limbo`]).
//! 4. An L2 table, zeroed or copied whole, reaches the disk before the L1 entry that leads there; a refcount block before
//!    its entry in the refcount table; a moved refcount table before the header says so.
//! 5. A guest's flush writes back everything that completed before it came.
//! 6. The dirty and corrupt bits are stable before anything relies on them; the dirty bit goes last, at the orderly end.
//! 7. Nobody writes data where metadata is ([`super::super::tables`]).
//!
//! # One flush
//!
//! ```text
//!   copies of all dirty refblocks, slices, L1 sectors, under the Meta lock: one moment
//!   [lazy: dirty bit, fdatasync]
//!   refblocks ── fdatasync of file and data file (data too) ── reftable ── fdatasync ── header ── fdatasync
//!   L2 slices, L1 sectors ── fdatasync
//!   limbo: what lost its entry before that moment has one wait less
//! ```
//!
//! Why copies: an entry linked while the flush runs leads to data that the first fdatasync may not cover; it belongs to the next
//! flush. A slice being written stays in the cache until it is written, because a reader that missed would read the old one.
//! Steps without anything to write need no fdatasync; with no dirty table at all a flush is the one fdatasync.
//!
//! Flushes take turns ([`super::commit`]): 32 writers that flush share one round. What fails stays dirty for the next round, and
//! everybody in the round gets the error.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::Writing;
use super::commit::Turn;
use super::mutation::{Mutation, broken};
use crate::block::drivers::qcow2::Image;
use crate::block::drivers::qcow2::cache::SliceCopy;
use crate::block::drivers::qcow2::check::disk::Disk;
use crate::block::drivers::qcow2::layout::HostOffset;
use crate::block::drivers::qcow2::refcount::Snapshot;
use crate::block::walk::Crew;
use crate::block::{Event, Op};
use crate::error::Errno;

/// What one flush writes: how everything was at one moment.
struct Copies {
    generation: u64,
    /// The end of the journal.
    mark: u64,
    refcounts: Option<Snapshot>,
    slices: Vec<SliceCopy>,
    l1: Vec<(u64, Vec<u8>)>,
}

impl Image {
    /// Makes everything stable that completed before.
    ///
    /// # Errors
    /// What the files say: then nothing is known of what reached the disk since the last flush that succeeded.
    pub async fn flush(&self) -> Result<(), Errno> {
        let Some(w) = &self.writing else { return Ok(()) };
        let round = match w.commit.turn().await {
            Turn::Done(result) => return result,
            Turn::Lead(round) => round,
        };
        let result = self.write_back(w).await;
        round.end(result);
        if !w.lock().limbo.is_empty() {
            self.reap(w).await;
            if !w.lock().limbo.is_empty() {
                self.tend_later(w);
            }
        }
        result
    }

    /// As [`Image::flush`], with refcounts even if they are lazy: makes room in caches.
    pub async fn flush_tables(&self) -> Result<(), Errno> {
        if let Some(w) = &self.writing {
            w.refcounts_too.store(true, Ordering::Relaxed);
        }
        self.flush().await
    }

    /// One round, for whoever leads it.
    pub async fn write_back(&self, w: &Writing) -> Result<(), Errno> {
        if w.is_fenced() {
            return Err(Errno::EIO);
        }
        let too = w.refcounts_too.swap(false, Ordering::Relaxed);
        w.hurry.store(false, Ordering::Relaxed);
        self.file().event(Event::FlushToOs);
        if w.is_stable() && !too {
            return self.sync().await;
        }
        let copies = self.copies(w, too || !self.choices.lazy_refcounts);
        let result = self.write_copies(w, &copies).await;
        self.written(w, copies, result.is_ok() || broken(Mutation::FailedFlushForgets));
        result
    }

    fn copies(&self, w: &Writing, refcounts: bool) -> Copies {
        let mut meta = w.lock();
        Copies {
            generation: meta.limbo.begin_flush(),
            mark: w.journal.as_ref().map_or(0, |log| log.mark()),
            refcounts: refcounts.then(|| meta.refcounts.snapshot()),
            slices: self.cache.snapshot(),
            l1: self.l1.snapshot(),
        }
    }

    fn written(&self, w: &Writing, copies: Copies, ok: bool) {
        let mut meta = w.lock();
        if let Some(snapshot) = copies.refcounts {
            meta.refcounts.written(snapshot, ok);
            self.note_tables(w, &mut meta);
        }
        self.cache.written(&copies.slices, ok);
        self.l1.written(&copies.l1, ok);
        if ok {
            meta.limbo.settle(copies.generation);
            if let Some(log) = &w.journal {
                log.journal.forget(copies.mark);
                self.count_journal();
            }
            let refcounts = !self.choices.lazy_refcounts && meta.refcounts.is_dirty();
            if !refcounts && !self.cache.has_dirty() && !self.l1.has_dirty() {
                w.dirty.store(false, Ordering::Release);
            }
        }
        if !w.is_stable() {
            self.tend_later(w);
        }
    }

    async fn write_copies(&self, w: &Writing, copies: &Copies) -> Result<(), Errno> {
        let entries = !copies.slices.is_empty() || !copies.l1.is_empty();
        if self.choices.lazy_refcounts && entries {
            self.set_dirty_bit(w).await?;
        }
        let late = broken(Mutation::RefcountsLast);
        if let Some(refcounts) = &copies.refcounts
            && !late
        {
            self.write_refcounts(w, refcounts, entries).await?;
        } else if !(entries && broken(Mutation::NoFlushBeforeL2)) {
            self.sync().await?;
        }
        let disk = Disk::new(self.file());
        let mut crew = Crew::default();
        for copy in &copies.slices {
            match self.place_of(copy.slice) {
                Ok((table, inside)) => {
                    self.file().event(Event::L2Update);
                    crew.add(Box::pin(self.write_slice(copy, table.plus(inside)))).await;
                }
                Err(e) => crew.failed(e),
            }
        }
        // An L1 entry was set when its table was complete on disk, by the first fdatasync stably so: it need not wait for slices.
        let (table, _) = self.l1_place();
        for (offset, bytes) in &copies.l1 {
            self.file().event(Event::L1Update);
            crew.add(Box::pin(disk.store(table.plus(*offset).0, bytes))).await;
        }
        crew.finish().await?;
        if entries && !broken(Mutation::NoLastFlush) {
            self.file().submit(Op::Flush).await?;
        }
        if late && let Some(refcounts) = &copies.refcounts {
            self.write_refcounts(w, refcounts, entries).await?;
        }
        Ok(())
    }

    /// Refcount blocks, guest data, the refcount table, the header, in that order; all stable.
    /// `entries` rely on them.
    async fn write_refcounts(
        &self,
        w: &Writing,
        refcounts: &Snapshot,
        entries: bool,
    ) -> Result<(), Errno> {
        let disk = Disk::new(self.file());
        let mut crew = Crew::default();
        for (at, bytes) in &refcounts.blocks {
            self.file().event(Event::RefblockUpdatePart);
            crew.add(Box::pin(disk.store(at.0, bytes))).await;
        }
        crew.finish().await?;
        let table_first = !refcounts.table.is_empty() && broken(Mutation::NoFlushBeforeReftable);
        let too_early = table_first || entries && broken(Mutation::NoFlushBeforeL2);
        if !too_early {
            self.sync().await?;
        }
        if refcounts.table.is_empty() {
            return Ok(());
        }
        let moved = refcounts.header.is_some();
        for (at, bytes) in &refcounts.table {
            self.file().event(match moved {
                true => Event::RefblockAllocWriteTable,
                false => Event::RefblockAllocHookup,
            });
            disk.store(at.0, bytes).await?;
        }
        match refcounts.header {
            // Flushes before and after.
            Some(bytes) => {
                self.file().event(Event::RefblockAllocSwitchTable);
                w.header.set_reftable(self.file(), bytes).await
            }
            None => self.sync().await,
        }
    }

    /// Everything that was written is stable, guest data too.
    async fn sync(&self) -> Result<(), Errno> {
        if self.geometry.data_file && !broken(Mutation::NoDataFileFlush) {
            self.data().event(Event::FlushToDisk);
            self.data().submit(Op::Flush).await?;
        }
        self.file().event(Event::FlushToDisk);
        self.file().submit(Op::Flush).await
    }

    async fn set_dirty_bit(&self, w: &Writing) -> Result<(), Errno> {
        if w.dirty_bit.load(Ordering::Relaxed) || broken(Mutation::NoDirtyBit) {
            return Ok(());
        }
        w.header.mark_dirty(self.file()).await?;
        w.dirty_bit.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn write_slice(&self, copy: &SliceCopy, at: HostOffset) -> Result<(), Errno> {
        let disk = Disk::new(self.file());
        if broken(Mutation::LiveSlices) {
            return disk.store(at.0, &self.live(copy)).await;
        }
        disk.store(at.0, &copy.bytes).await
    }

    /// For [`Mutation::LiveSlices`].
    fn live(&self, copy: &SliceCopy) -> Vec<u8> {
        let shape = self.cache.shape();
        let entries = (0..shape.entries).filter_map(|i| self.cache.get(copy.slice, i));
        let words =
            entries.flat_map(|e| [e.word, e.bitmap].into_iter().take(shape.entry_words as usize));
        let bytes: Vec<u8> = words.flat_map(u64::to_be_bytes).collect();
        if bytes.len() == copy.bytes.len() { bytes } else { copy.bytes.clone() }
    }

    /// Refcounts have changed in memory.
    pub fn touch_refcounts(&self, w: &Writing) {
        if !self.choices.lazy_refcounts {
            self.touch(w);
        }
    }

    /// The orderly end, after the last request: nothing is left in memory, and the header says so.
    ///
    /// # Errors
    /// What the files say: the image is as after a crash then.
    pub async fn close(&self) -> Result<(), Errno> {
        let Some(w) = &self.writing else { return Ok(()) };
        if w.is_fenced() {
            return Err(Errno::EIO);
        }
        {
            let mut meta = w.lock();
            let meta = &mut *meta;
            meta.streams.close(&mut meta.refcounts);
        }
        // Each round may free clusters, as many as there is room for in the cache, whose refcounts the next one writes. Two
        // rounds without any progress: somebody still uses the rest.
        let (mut released, mut idle) = (0, 0);
        while idle < 2 {
            self.flush_tables().await?;
            self.reap(w).await;
            let meta = w.lock();
            if meta.limbo.is_empty() && !meta.refcounts.is_dirty() {
                break;
            }
            idle = if meta.released == released { idle + 1 } else { 0 };
            released = meta.released;
        }
        let grown_from = w.grown_from.swap(u64::MAX, Ordering::Relaxed);
        if grown_from != u64::MAX {
            let end = w.lock().refcounts.end() << self.geometry.cluster_bits;
            let end = end.max(grown_from);
            if end < self.file().len() {
                // What is left over harms nobody.
                if let Err(e) = self.file().truncate(end).await {
                    log::debug!("qcow2: cutting the file to {end}: {e}");
                }
            }
        }
        if w.dirty_bit.swap(false, Ordering::Relaxed) {
            w.header.mark_clean(self.file()).await?;
        }
        self.release_journal(w).await
    }
}
