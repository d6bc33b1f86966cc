//! Write-zeroes and discard: entries change, data does not move.
//!
//! QEMU's rules, per cluster (`discard_in_l2_slice`, `zero_in_l2_slice`):
//!
//! | | version 2 | version 3 |
//! |---|---|---|
//! | discard | entry emptied; with a backing file: not at all (it would show through) | zero flag, host cluster given up |
//! | zero | the same; with a backing file: written as data | zero flag; host cluster kept unless `MAY_UNMAP` or compressed |
//!
//! `discard-no-unref` keeps host clusters in every case but compressed ones. What reads as zeroes already and has no backing
//! file behind it stays as it is, whole L2 tables that are absent among it. With subclusters the bitmap's zero bits take the
//! flag's place, and parts of a cluster can be zeroed. With a raw external data file the file itself is zeroed, and entries stay.
#![forbid(unsafe_code)]

use std::future::poll_fn;
use std::task::{Poll, Waker};

use super::Writing;
use super::limbo::Freed;
use super::mutation::{Mutation, broken};
use super::plan::Need;
use crate::block::drivers::qcow2::Image;
use crate::block::drivers::qcow2::header::Autoclear;
use crate::block::drivers::qcow2::layout::{GuestOffset, L1Entry, L2Entry, Mapping};
use crate::block::{Op, WriteFlags, ZeroFlags};
use crate::error::Errno;
use crate::mem::Sg;
use crate::rt::sync::give_way;
use crate::rt::{Buffer, grace};

/// So many slices are changed before others get their turn on the thread.
const SLICES_PER_TURN: u32 = 64;

/// What shall become of clusters.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// Nobody needs the content.
    Discard,
    /// It shall read as zeroes.
    Zero {
        /// Host clusters may be given up.
        unmap: bool,
    },
}

/// What became of a part of the range.
enum Step {
    /// So many bytes are done.
    Done(u64),
    /// Somebody else is changing the first cluster.
    Wait,
    Needs(Need),
    /// Zeroes must be written as data.
    Unsupported,
}

/// A new entry, and whether the host cluster is given up.
struct Change {
    mapping: Mapping,
    gives_up: bool,
}

impl Image {
    /// Makes `[offset, offset + len)` read as zeroes.
    ///
    /// # Errors
    /// ENOTSUP: the entries cannot say it; nothing, or a part, has been zeroed. Else what the files say.
    pub async fn write_zeroes(
        &self,
        w: &Writing,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), Errno> {
        if self.geometry.version < 3 && self.backing().is_some() {
            return Err(Errno::ENOTSUP);
        }
        let fua = flags.contains(ZeroFlags::FUA);
        if self.raw_data_file() {
            // What is allocated stays so, and the rest reads as zeroes anyway (there is no backing file): a flag could
            // contradict the file when somebody writes meanwhile.
            let flags = flags - ZeroFlags::FUA;
            self.in_data_file(Op::WriteZeroes { offset, len, flags }).await?;
            return self.stable(fua).await;
        }
        let unmap = flags.contains(ZeroFlags::MAY_UNMAP);
        let no_fallback = flags.contains(ZeroFlags::NO_FALLBACK);
        self.change_entries(w, offset, len, Wish::Zero { unmap }, no_fallback).await?;
        self.stable(fua).await
    }

    /// The content of `[offset, offset + len)` is no longer needed.
    ///
    /// # Errors
    /// ENOTSUP where the backing file would show through. Else what the files say.
    pub async fn discard(&self, w: &Writing, offset: u64, len: u64) -> Result<(), Errno> {
        if self.geometry.version < 3 && self.backing().is_some() {
            return Err(Errno::ENOTSUP);
        }
        if self.raw_data_file() {
            // The file alone must show what the guest sees.
            let flags = ZeroFlags::MAY_UNMAP;
            return self.in_data_file(Op::WriteZeroes { offset, len, flags }).await;
        }
        if !self.choices.pass_discard_request {
            // Only entries change.
        } else if self.geometry.data_file {
            // Its clusters have no refcounts and never belong to anybody else.
            self.in_data_file(Op::Discard { offset, len }).await?;
        } else if self.choices.discard_no_unref {
            self.discard_kept(w, offset, len).await?;
        }
        self.change_entries(w, offset, len, Wish::Discard, true).await
    }

    /// Tells the file of clusters that keep their place: before their entries change, so that nobody's new data is there yet.
    async fn discard_kept(&self, w: &Writing, offset: u64, len: u64) -> Result<(), Errno> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let guest = GuestOffset(at);
            if let Some(n) = self.nothing_to_do(guest, end - at) {
                at += n;
                continue;
            }
            if self.look_up(guest).is_none() {
                self.cached_slice(guest).await?;
                give_way().await;
            }
            let _pin = grace::enter(&w.grace);
            at = match self.in_place(w, guest, end - at) {
                Some((host, len)) => {
                    match self.file().submit(Op::Discard { offset: host.0, len }).await {
                        Ok(()) | Err(Errno::ENOTSUP) => at + len,
                        Err(e) => return Err(e),
                    }
                }
                None => (at + 1).next_multiple_of(self.geometry.cluster_size()),
            };
        }
        Ok(())
    }

    /// Whether the external data file alone shows what the guest sees.
    pub fn raw_data_file(&self) -> bool {
        self.geometry.data_file && self.header.autoclear.contains(Autoclear::DATA_FILE_RAW)
    }

    /// The part of a range that the data file has.
    async fn in_data_file(&self, op: Op<'_>) -> Result<(), Errno> {
        let data = self.data();
        let inside = |offset: u64, len: u64| len.min(data.len().saturating_sub(offset));
        let op = match op {
            Op::Discard { offset, len } => Op::Discard { offset, len: inside(offset, len) },
            Op::WriteZeroes { offset, len, flags } => {
                Op::WriteZeroes { offset, len: inside(offset, len), flags }
            }
            op => op,
        };
        match op {
            Op::Discard { len: 0, .. } | Op::WriteZeroes { len: 0, .. } => Ok(()),
            op => data.submit(op).await,
        }
    }

    async fn change_entries(
        &self,
        w: &Writing,
        offset: u64,
        len: u64,
        wish: Wish,
        no_fallback: bool,
    ) -> Result<(), Errno> {
        let (mut at, end, mut steps) = (offset, offset + len, 0);
        while at < end {
            let guest = GuestOffset(at);
            let step = poll_fn(|cx| match self.step(w, guest, end - at, wish, cx.waker()) {
                Step::Wait => Poll::Pending,
                step => Poll::Ready(step),
            });
            match step.await {
                Step::Done(n) => at += n,
                Step::Needs(need) => self.get(w, need, guest).await?,
                Step::Unsupported if no_fallback => return Err(Errno::ENOTSUP),
                Step::Unsupported => {
                    // This cluster alone.
                    let cluster = self.geometry.cluster_size();
                    let n = (end - at).min(cluster - at % cluster);
                    self.write_zero_bytes(w, at, n).await?;
                    at += n;
                }
                Step::Wait => unreachable!("waited for"),
            }
            steps += 1;
            if steps % SLICES_PER_TURN == 0 {
                give_way().await;
            }
        }
        Ok(())
    }

    /// Zeroes as data.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub async fn write_zero_bytes(&self, w: &Writing, at: u64, len: u64) -> Result<(), Errno> {
        let align = self.data().driver().limits().mem_align.max(512) as usize;
        let buffer = Buffer::new(usize::try_from(len).map_err(|_| Errno::EIO)?, align);
        let iov = [buffer.iovec()];
        self.write(w, at, Sg::new(&iov), WriteFlags::empty()).await
    }

    /// Changes entries from `at`'s cluster on, as many as can be under one lock.
    fn step(&self, w: &Writing, at: GuestOffset, len: u64, wish: Wish, waker: &Waker) -> Step {
        if let Some(n) = self.nothing_to_do(at, len) {
            return Step::Done(n);
        }
        let mut meta = w.lock();
        let first = at.0 >> self.geometry.cluster_bits;
        let count = match self.plannable(&meta, at, len) {
            Ok(0) => {
                meta.busy.wait(first, waker);
                return Step::Wait;
            }
            Ok(count) => count,
            Err(need) => return Step::Needs(need),
        };
        let g = &self.geometry;
        let (mut entries, mut freed, mut changed) = (Vec::new(), Vec::new(), false);
        let (slice, index) = self.slice_of(at);
        let end = at.0 + len;
        let mut next = at.0;
        for i in 0..count {
            let start = GuestOffset((first + i) << g.cluster_bits);
            let to = end.min(start.0 + g.cluster_size());
            let Some(old) = self.cache.get(slice, index + i as u32) else {
                return Step::Needs(Need::Slice);
            };
            let mapping = match old.decode(g, start) {
                Ok(mapping) => mapping,
                Err(bad) => return Step::Needs(Need::BadEntry(bad, start)),
            };
            let new = match self.changed(mapping, start, (next, to), wish) {
                Ok(Some(change)) => {
                    changed = true;
                    if change.gives_up {
                        let discard = self.choices.pass_discard_request;
                        let clusters = self.references(mapping);
                        freed.extend(clusters.map(|cluster| Freed {
                            cluster,
                            discard,
                            table: false,
                        }));
                    }
                    L2Entry::encode(change.mapping, g)
                }
                Ok(None) => old,
                Err(()) if i == 0 => return Step::Unsupported,
                Err(()) => break,
            };
            entries.push(new);
            next = to;
        }
        if changed {
            if !self.can_record(w, entries.len()) {
                return Step::Needs(Need::Journal);
            }
            self.touch(w);
            let stored = match broken(Mutation::UnloggedDiscards) {
                true => Ok(self.cache.store(slice, index, &entries)),
                false => self.store(w, slice, index, &entries),
            };
            if !matches!(stored, Ok(true)) {
                return Step::Needs(Need::Slice);
            }
            self.let_go(w, &mut meta, &freed);
        }
        Step::Done(next - at.0)
    }

    /// How many bytes from `at` on belong to no L2 table and read as zeroes.
    fn nothing_to_do(&self, at: GuestOffset, len: u64) -> Option<u64> {
        let l1 = L1Entry::decode(self.l1.get(self.geometry.l1_index(at)), &self.geometry);
        let absent = matches!(l1, Ok(L1Entry { table: None, .. }));
        let cover = 1u64 << self.geometry.l2_coverage_bits();
        (absent && self.nothing_behind(at.0)).then(|| len.min(cover - at.0 % cover))
    }

    /// What becomes of a cluster of which guest bytes `[from, to)` are meant; `None`: nothing. `Err`: it cannot be said in
    /// an entry.
    fn changed(
        &self,
        old: Mapping,
        start: GuestOffset,
        (from, to): (u64, u64),
        wish: Wish,
    ) -> Result<Option<Change>, ()> {
        let g = &self.geometry;
        let whole = from == start.0 && (to == start.0 + g.cluster_size() || to >= self.len());
        let all = (((1u64 << g.subclusters()) - 1) & 0xffff_ffff) as u32;
        if !whole {
            return match wish {
                Wish::Discard => Ok(None),
                Wish::Zero { .. } => self.partly_zeroed(old, start, from, to).map(Some),
            };
        }
        let (host, zero) = match old {
            Mapping::Compressed(_) => (None, 0),
            Mapping::Standard { host, zero, allocated, .. } => {
                let reads_zero = zero == all || (allocated == 0 && self.nothing_behind(start.0));
                if host.is_none() && reads_zero {
                    return Ok(None);
                }
                (host, zero)
            }
        };
        let compressed = matches!(old, Mapping::Compressed(_));
        let unmap = matches!(wish, Wish::Discard | Wish::Zero { unmap: true }) || g.version < 3;
        let keeps = host.is_some() && (self.choices.discard_no_unref || !unmap);
        if keeps && zero == all {
            return Ok(None);
        }
        let copied = matches!(old, Mapping::Standard { copied: true, .. });
        let zero = if g.version < 3 { 0 } else { all };
        let mapping = match keeps {
            true => Mapping::Standard { host, copied, allocated: 0, zero },
            false => Mapping::Standard { host: None, copied: false, allocated: 0, zero },
        };
        Ok(Some(Change { mapping, gives_up: compressed || !keeps }))
    }

    /// Some subclusters read as zeroes from now on.
    fn partly_zeroed(
        &self,
        old: Mapping,
        start: GuestOffset,
        from: u64,
        to: u64,
    ) -> Result<Change, ()> {
        let g = &self.geometry;
        let size = g.subcluster_size();
        let fits = g.extended_l2 && from.is_multiple_of(size) && to.is_multiple_of(size);
        let Mapping::Standard { host, copied, allocated, zero } = old else { return Err(()) };
        if !fits {
            return Err(());
        }
        let mask = self.mask(start.0, &(from..to));
        let mapping =
            Mapping::Standard { host, copied, allocated: allocated & !mask, zero: zero | mask };
        Ok(Change { mapping, gives_up: false })
    }
}
