//! A longer disk.
#![forbid(unsafe_code)]

use std::future::poll_fn;
use std::sync::atomic::Ordering;
use std::task::Poll;

use super::commit::Turn;
use super::limbo::Freed;
use super::space::{LoadError, TRIES, is_no_space};
use super::{LONGER_DISK, Writing};
use crate::block::drivers::qcow2::Image;
use crate::block::drivers::qcow2::header::Extension;
use crate::block::drivers::qcow2::layout::{GuestOffset, HostOffset, Mapping};
use crate::block::drivers::qcow2::options::Overlap;
use crate::block::drivers::qcow2::refcount::Blocked;
use crate::block::{Event, Op, WriteFlags, ZeroFlags};
use crate::error::Errno;
use crate::mem::Sg;
use crate::rt::Buffer;

impl Image {
    /// Makes the guest's disk `len` bytes long; what is added reads as zeroes, whatever a longer backing file has there.
    /// Requests go on meanwhile. After a crash the disk has the old length or the new one.
    ///
    /// # Errors
    /// ENOTSUP for a shorter disk, an image with bitmaps, a version 2 image with snapshots (as QEMU); EINVAL for parts of
    /// sectors; EFBIG beyond what an L1 table can describe, or half a refcount block can describe of that, or what the
    /// caches were laid out for; ENOSPC; what the files say. The disk goes on with its old length.
    pub async fn resize(&self, w: &Writing, len: u64) -> Result<(), Errno> {
        let _one_at_a_time = w.growth.alone(LONGER_DISK).await;
        let old = self.len();
        if len == old {
            return Ok(());
        }
        if !len.is_multiple_of(512) {
            return Err(Errno::EINVAL);
        }
        let of_bitmaps = |e: &_| matches!(e, Extension::Bitmaps(_) | Extension::StaleBitmaps(_));
        let bitmaps = self.header.extensions.iter().any(of_bitmaps);
        let v2_snapshots = self.header.version < 3 && self.header.nb_snapshots > 0;
        if len < old || v2_snapshots || bitmaps {
            return Err(Errno::ENOTSUP);
        }
        let g = &self.geometry;
        let shape = self.cache.shape();
        if g.clusters_for(len).div_ceil(u64::from(shape.entries)) > shape.slices {
            return Err(Errno(libc::EFBIG));
        }
        let entries = g.l1_entries_for(len);
        // The table is contiguous, and one refcount block describes it.
        if entries > self.l1.len() && self.l1_clusters(entries) > g.refblock_entries() / 2 {
            return Err(Errno(libc::EFBIG));
        }
        if entries > self.l1.len() {
            self.grow_l1(w, entries).await?;
        }
        self.lengthen_data_file(old, len).await?;
        self.hide_behind(w, old, len).await?;
        // What hides the backing file is on disk before the header shows the place.
        self.flush().await?;
        if let Err(e) = w.header.set_size(self.file(), len).await {
            // It may say either: the old length again, if that can be written.
            let old = self.size.load(Ordering::Relaxed);
            if let Err(e) = w.header.set_size(self.file(), old).await {
                log::error!(
                    "qcow2: the header may have the new size of the disk, or the old one: {e}"
                );
            }
            return Err(e);
        }
        self.size.store(len, Ordering::Relaxed);
        Ok(())
    }

    /// An external data file has room for the disk; a raw one shows zeroes where the disk was not before.
    async fn lengthen_data_file(&self, old: u64, new: u64) -> Result<(), Errno> {
        let data = self.data();
        if !self.geometry.data_file {
            return Ok(());
        }
        let stale = data.len().min(new).saturating_sub(old);
        if self.raw_data_file() && stale > 0 {
            let flags = ZeroFlags::MAY_UNMAP;
            data.submit(Op::WriteZeroes { offset: old, len: stale, flags }).await?;
        }
        if data.len() < new { data.truncate(new).await } else { Ok(()) }
    }

    /// `[old, new)` shall read as zeroes: the rest of the last cluster, and what a backing file has there.
    async fn hide_behind(&self, w: &Writing, old: u64, new: u64) -> Result<(), Errno> {
        let g = &self.geometry;
        let cluster = g.cluster_size();
        let boundary = old.next_multiple_of(cluster).min(new);
        if old < boundary {
            // New clusters are filled up to the end of the disk: those under way, to the old one.
            w.growing_to.store(new, Ordering::SeqCst);
            let last = old >> g.cluster_bits;
            poll_fn(|cx| {
                let mut meta = w.lock();
                if meta.busy.free(last, 1) > 0 {
                    return Poll::Ready(());
                }
                meta.busy.wait(last, cx.waker());
                Poll::Pending
            })
            .await;
            self.cached_if_there(GuestOffset(old)).await?;
            if !self.reads_as_zero(old, boundary) {
                self.write_zero_bytes(w, old, boundary - old).await?;
            }
        }
        let mut at = boundary;
        let end = self.backing().map_or(0, |b| b.len()).min(new).next_multiple_of(cluster);
        if g.version >= 3 && at < end {
            return self.write_zeroes(w, at, end - at, ZeroFlags::empty()).await;
        }
        // Entries of version 2 cannot say it.
        while at < end {
            self.write_zero_bytes(w, at, cluster).await?;
            at += cluster;
        }
        Ok(())
    }

    /// Sees to it that the entry of `guest` can be told without waiting.
    async fn cached_if_there(&self, guest: GuestOffset) -> Result<(), Errno> {
        match self.look_up(guest) {
            Some(Ok(Mapping::Standard { .. } | Mapping::Compressed(_))) => Ok(()),
            _ => self.cached_slice(guest).await,
        }
    }

    fn l1_clusters(&self, entries: u64) -> u64 {
        (entries * 8).div_ceil(self.geometry.cluster_size())
    }

    /// A table of `entries` entries.
    async fn grow_l1(&self, w: &Writing, entries: u64) -> Result<(), Errno> {
        let mut tries = 0;
        loop {
            let result = self.grow_l1_now(w, entries).await;
            tries += 1;
            let again = tries < TRIES && result.is_err_and(is_no_space);
            // Not inside of the turn: making room flushes.
            if !again || self.make_room(w).await.is_err() {
                return result;
            }
        }
    }

    /// The flushes wait: they write to where the table is.
    async fn grow_l1_now(&self, w: &Writing, entries: u64) -> Result<(), Errno> {
        let round = loop {
            match w.commit.turn().await {
                Turn::Done(_) => {}
                Turn::Lead(round) => break round,
            }
        };
        let result = self.move_l1(w, entries).await;
        // Those who wait want a round that began after they came.
        round.cancel();
        result
    }

    async fn move_l1(&self, w: &Writing, entries: u64) -> Result<(), Errno> {
        let g = &self.geometry;
        let (old, old_len) = self.l1_place();
        let count = self.l1_clusters(entries);
        let too_long = |_| Errno(libc::EFBIG);
        self.file().event(Event::L1GrowAllocTable);
        let entries32 = u32::try_from(entries).map_err(too_long)?;
        let old_entries = u32::try_from(self.l1.len()).map_err(too_long)?;
        let first = self.contiguous(w, count).await?;
        let place = HostOffset(first << g.cluster_bits);
        let table = |first: u64, count: u64| {
            (first..first + count).map(|cluster| Freed { cluster, discard: false, table: true })
        };
        if w.tables.holds(first, count) {
            return Err(self.overlap(w, place).await);
        }
        if let Err(e) = self.copy_l1(w, place, count).await {
            w.lock().limbo.push_ready(table(first, count));
            return Err(e);
        }
        self.file().event(Event::L1GrowActivateTable);
        if let Err(e) = w.header.set_l1(self.file(), place, entries32).await {
            log::error!("qcow2: the L1 table could not be moved to {:#x}: {e}", place.0);
            // The header may lead to either table: to the old one again, or nobody can go on.
            if w.header.set_l1(self.file(), old, old_entries).await.is_err() {
                self.fence(w, "The header cannot be written").await;
            }
            w.lock().limbo.push_ready(table(first, count));
            return Err(e);
        }
        let mut meta = w.lock();
        self.touch(w);
        self.l1.grow_to(entries)?;
        self.l1_offset.store(place.0, Ordering::Relaxed);
        if self.choices.overlap_check.contains(Overlap::ACTIVE_L1) {
            w.tables.add(first, count);
        }
        let gone: Vec<Freed> =
            table(g.host_cluster(old), old_len.div_ceil(g.cluster_size())).collect();
        self.let_go(w, &mut meta, &gone);
        Ok(())
    }

    /// Copies the L1 table to `count` clusters at `place`, all that is dirty included, and makes their refcounts stable.
    async fn copy_l1(&self, w: &Writing, place: HostOffset, count: u64) -> Result<(), Errno> {
        let file = self.file();
        let (old, old_len) = self.l1_place();
        let len = count << self.geometry.cluster_bits;
        self.grow_to(w, place.plus(len).0).await?;
        // The refcounts of the new place, before the header leads there; and entries, to the old place: as nobody else flushes,
        // it stays as it is from here on.
        self.write_back_all(w).await?;
        // What is on disk is copied, not what is in memory: an entry that is new must wait for its L2 table, and stays dirty.
        let too_long = |_| Errno(libc::EFBIG);
        let align = file.driver().limits().mem_align.max(512) as usize;
        let buffer = Buffer::new(usize::try_from(len).map_err(too_long)?, align);
        let iov = [buffer.iovec()];
        if old_len > 0 {
            let part = iov[0].part(0, usize::try_from(old_len).map_err(too_long)?);
            file.submit(Op::Read { offset: old.0, to: Sg::new(&[part]) }).await?;
        }
        let flags = WriteFlags::empty();
        file.event(Event::L1GrowWriteTable);
        file.submit(Op::Write { offset: place.0, from: Sg::new(&iov), flags }).await
    }

    /// With refcounts, lazy or not. For whoever leads a round.
    async fn write_back_all(&self, w: &Writing) -> Result<(), Errno> {
        w.refcounts_too.store(true, Ordering::Relaxed);
        self.write_back(w).await
    }

    /// Contiguous clusters, allocated: at most half of what a refcount block describes.
    async fn contiguous(&self, w: &Writing, count: u64) -> Result<u64, Errno> {
        loop {
            let run = {
                let mut meta = w.lock();
                // More than half of what is asked for is all that is promised.
                let run = meta.refcounts.reserve(count.next_power_of_two()).and_then(|run| {
                    let enough = run.count >= count;
                    let claimed = match enough {
                        true => meta.refcounts.claim(run.first, count),
                        false => Ok(()),
                    };
                    meta.refcounts.unreserve(run.first, run.count);
                    claimed.map(|()| enough.then_some(run.first))
                });
                self.note_tables(w, &mut meta);
                run
            };
            match run {
                Ok(first) => return first.ok_or(Errno::ENOSPC),
                // Whoever makes room, in the cache or in the image, by a flush would wait for itself here.
                Err(Blocked::Load { index, offset }) => {
                    match self.load_block_once(w, index, offset).await {
                        Ok(()) => {}
                        Err(LoadError::CacheFull) => self.write_back_all(w).await?,
                        Err(LoadError::Corrupt(damage)) => return Err(self.fence(w, damage).await),
                        Err(LoadError::File(e)) => return Err(e),
                    }
                }
                Err(Blocked::CacheFull) => self.write_back_all(w).await?,
                Err(Blocked::NoSpace) => return Err(Errno::ENOSPC),
                Err(blocked) => self.unblock(w, blocked).await?,
            }
        }
    }
}
