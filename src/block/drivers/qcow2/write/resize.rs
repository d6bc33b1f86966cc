//! A longer disk.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::Writing;
use super::commit::Turn;
use super::limbo::Freed;
use crate::block::drivers::qcow2::Image;
use crate::block::drivers::qcow2::header::Extension;
use crate::block::drivers::qcow2::layout::{GuestOffset, HostOffset, Mapping};
use crate::block::drivers::qcow2::options::Overlap;
use crate::block::drivers::qcow2::refcount::Blocked;
use crate::block::{Op, WriteFlags, ZeroFlags};
use crate::error::Errno;
use crate::mem::Sg;
use crate::rt::Buffer;

impl Image {
    /// Makes the guest's disk `len` bytes long; what is added reads as zeroes, whatever a longer backing file has there.
    /// Requests go on meanwhile. After a crash the disk has the old length or the new one.
    ///
    /// # Errors
    /// ENOTSUP for a shorter disk, an image with bitmaps, a version 2 image with snapshots (as QEMU); EINVAL for parts of
    /// sectors; EFBIG beyond what an L1 table can describe, or what the caches were laid out for; what the files say.
    pub async fn resize(&self, w: &Writing, len: u64) -> Result<(), Errno> {
        let _one_at_a_time = self.turn_to_resize(w).await;
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
        if entries > self.l1.len() {
            self.grow_l1(w, entries).await?;
        }
        if g.data_file && self.data().len() < len {
            self.data().truncate(len).await?;
        }
        self.hide_behind(w, old, len).await?;
        // What hides the backing file is on disk before the header shows the place.
        self.flush().await?;
        w.header.set_size(self.file(), len).await?;
        self.size.store(len, Ordering::Relaxed);
        Ok(())
    }

    async fn turn_to_resize<'a>(&self, w: &'a Writing) -> Option<super::super::flight::Flight<'a>> {
        match w.growth.turn(1, || None::<()>).await {
            super::super::flight::Turn::Mine(flight) => Some(flight),
            super::super::flight::Turn::Found(()) => None,
        }
    }

    /// `[old, new)` shall read as zeroes: the rest of the last cluster, and what a backing file has there.
    async fn hide_behind(&self, w: &Writing, old: u64, new: u64) -> Result<(), Errno> {
        let g = &self.geometry;
        let boundary = old.next_multiple_of(g.cluster_size());
        if old < boundary {
            self.cached_if_there(GuestOffset(old)).await?;
            if !self.reads_as_zero(old, boundary) {
                let len = usize::try_from(boundary - old).map_err(|_| Errno::EIO)?;
                let align = self.data().driver().limits().mem_align.max(512) as usize;
                let buffer = Buffer::new(len, align);
                let iov = [buffer.iovec()];
                self.write(w, old, Sg::new(&iov), WriteFlags::empty()).await?;
            }
        }
        let behind =
            self.backing().map_or(0, |b| b.len()).min(new).next_multiple_of(g.cluster_size());
        if behind > boundary {
            self.write_zeroes(w, boundary, behind - boundary, ZeroFlags::empty()).await?;
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

    /// A table of `entries` entries. The flushes wait: they write to where the table is.
    async fn grow_l1(&self, w: &Writing, entries: u64) -> Result<(), Errno> {
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
        let count = (entries * 8).div_ceil(g.cluster_size());
        let entries32 = u32::try_from(entries).map_err(|_| Errno(libc::EFBIG))?;
        let first = self.contiguous(w, count).await?;
        let place = HostOffset(first << g.cluster_bits);
        let freed = |first: u64, count: u64| {
            (first..first + count).map(|cluster| Freed { cluster, discard: false, table: true })
        };
        let made = async {
            self.grow_to(w, place.plus(count << g.cluster_bits).0).await?;
            // With the table that is on disk: an entry that is not must wait for its L2 table, and stays dirty.
            let len = usize::try_from(count << g.cluster_bits).map_err(|_| Errno(libc::EFBIG))?;
            let align = self.file().driver().limits().mem_align.max(512) as usize;
            let buffer = Buffer::new(len, align);
            if old_len > 0 {
                let part =
                    buffer.iovec().part(0, usize::try_from(old_len).map_err(|_| Errno::EIO)?);
                self.file().submit(Op::Read { offset: old.0, to: Sg::new(&[part]) }).await?;
            }
            let iov = [buffer.iovec()];
            let flags = WriteFlags::empty();
            self.file().submit(Op::Write { offset: place.0, from: Sg::new(&iov), flags }).await?;
            // The refcounts of the new place, before the header leads there.
            w.refcounts_too.store(true, Ordering::Relaxed);
            self.write_back(w).await?;
            // `write_back` has written entries to the old place only: once more, nothing else can come between.
            if old_len > 0 {
                let part =
                    buffer.iovec().part(0, usize::try_from(old_len).map_err(|_| Errno::EIO)?);
                self.file().submit(Op::Read { offset: old.0, to: Sg::new(&[part]) }).await?;
                self.file()
                    .submit(Op::Write { offset: place.0, from: Sg::new(&iov), flags })
                    .await?;
            }
            w.header.set_l1(self.file(), place, entries32).await
        };
        if let Err(e) = made.await {
            log::error!("qcow2: the L1 table could not be moved to {:#x}: {e}", place.0);
            // The header may lead to either table: to the old one again, or nobody can go on.
            let entries = u32::try_from(old_len / 8).unwrap_or(u32::MAX);
            if w.header.set_l1(self.file(), old, entries).await.is_err() {
                self.fence(w, "The header cannot be written").await;
            }
            return Err(e);
        }
        let mut meta = w.lock();
        self.touch(w);
        self.l1.grow_to(entries)?;
        self.l1_offset.store(place.0, Ordering::Relaxed);
        if self.choices.overlap_check.contains(Overlap::ACTIVE_L1) {
            w.tables.add(first, count);
        }
        let old_count = old_len.div_ceil(g.cluster_size());
        let gone: Vec<Freed> = freed(g.host_cluster(old), old_count).collect();
        self.let_go(w, &mut meta, &gone);
        Ok(())
    }

    /// Contiguous clusters, allocated: at most half of what a refcount block describes.
    async fn contiguous(&self, w: &Writing, count: u64) -> Result<u64, Errno> {
        loop {
            let run = {
                let mut meta = w.lock();
                let run = meta.refcounts.reserve(count).and_then(|run| {
                    let enough = run.count >= count;
                    if enough {
                        meta.refcounts.claim(run.first, count)?;
                    }
                    meta.refcounts.unreserve(run.first, run.count);
                    Ok(enough.then_some(run.first))
                });
                self.note_tables(w, &mut meta);
                run
            };
            match run {
                Ok(first) => return first.ok_or(Errno::ENOSPC),
                // Whoever makes room in the cache by a flush would wait for itself here.
                Err(Blocked::Load { index, offset }) => {
                    if self.load_block_once(w, index, offset).await.is_err() {
                        w.refcounts_too.store(true, Ordering::Relaxed);
                        self.write_back(w).await?;
                    }
                }
                Err(Blocked::CacheFull) => {
                    w.refcounts_too.store(true, Ordering::Relaxed);
                    self.write_back(w).await?;
                }
                Err(Blocked::NoSpace) => return Err(Errno::ENOSPC),
                Err(blocked) => self.unblock(w, blocked).await?,
            }
        }
    }
}
