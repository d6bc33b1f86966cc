//! The generic layer of every request: checks, alignment (bounce buffers, read-modify-write), splitting, zero
//! detection, and what `read-only`, `discard`, `cache.no-flush` and `detect-zeroes` mean for requests.
//!
//! **Read-modify-write.** A write that covers part of a block of the medium (`Limits::request_align`) reads the rest of it
//! first. Nobody else may write the block meanwhile, or the rest written back would be stale; so where such writes
//! are possible every write of the node holds its range: exclusively if it is ragged, shared otherwise. Who is going to
//! write finer than a node's alignment says so first ([`Node::expect_ragged_writes`]); other nodes' writes stay in
//! the fast lane and pay nothing.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};

use super::node::{DetectZeroes, LEN_MAX};
use super::{Dir, Event, IoFuture, Limits, Map, Node, Op, WriteFlags, ZeroFlags};
use crate::error::Errno;
use crate::mem::{IoVec, Sg};
use crate::rt::sync::{RangeGuard, RangeLock};
use crate::rt::{Buffer, File};

/// The largest bounce buffer, and the largest piece in which zeroes are written as data.
pub const BOUNCE_MAX: u64 = 1 << 20;
/// The most nodes between a root and a leaf that the fast lane walks: deeper graphs are served by the slow lane.
const FAST_DEPTH: usize = 16;

/// What the generic layer keeps for each node.
#[derive(Default)]
pub struct IoState {
    ranges: RangeLock,
    ragged: AtomicBool,
}

/// Where a range lives after the whole walk, and whether flushes are ignored on the way (`cache.no-flush`).
pub struct Located<'a> {
    /// Never [`Map::Child`].
    pub map: Map<'a>,
    /// Stability need not be asked for.
    pub no_flush: bool,
    /// Of a write: that the bytes are stable is not enough, see [`Driver::is_stable`](super::Driver::is_stable).
    pub unstable: bool,
}

fn ready<'a>(result: Result<(), Errno>) -> IoFuture<'a> {
    Box::pin(std::future::ready(result))
}

impl Node {
    /// Fast lane: walks from this node to where `[offset, offset + len)` lives. Never blocks, locks or allocates.
    ///
    /// The range must be inside the node, and `len` not 0.
    #[inline]
    pub fn locate(&self, dir: Dir, offset: u64, len: u64) -> Located<'_> {
        let (mut node, mut offset) = (self, offset);
        let (mut no_flush, mut unstable) = (false, false);
        for _ in 0..FAST_DEPTH {
            let stop = dir == Dir::Write && !node.fast_writes();
            no_flush |= node.ignores_flushes();
            let map = if stop { Map::Slow } else { node.driver().map(dir, offset, len) };
            unstable |= dir == Dir::Write && !node.driver().is_stable();
            match map {
                Map::Child { child, offset: at } => (node, offset) = (child, at),
                map => return Located { map, no_flush, unstable },
            }
        }
        Located { map: Map::Slow, no_flush, unstable }
    }

    /// As [`Node::locate`] in a simulation, whose disks have no file: the node of driver `leaf` that has the range, where, and
    /// [`Located::unstable`].
    #[cfg(any(test, feature = "sim"))]
    pub fn locate_leaf(
        &self,
        dir: Dir,
        offset: u64,
        len: u64,
        leaf: &super::DriverDef,
    ) -> Option<(&Node, u64, bool)> {
        let (mut node, mut offset, mut unstable) = (self, offset, false);
        for _ in 0..FAST_DEPTH {
            if dir == Dir::Write && !node.fast_writes() {
                return None;
            }
            if std::ptr::eq(node.def(), leaf) {
                return Some((node, offset, unstable));
            }
            let map = node.driver().map(dir, offset, len);
            unstable |= dir == Dir::Write && !node.driver().is_stable();
            let Map::Child { child, offset: at } = map else { return None };
            (node, offset) = (child, at);
        }
        None
    }

    fn fast_writes(&self) -> bool {
        !self.read_only()
            && self.detect_zeroes() == DetectZeroes::Off
            && !self.io().ragged.load(Ordering::Relaxed)
    }

    /// Somebody is going to write in units of `granularity` bytes: nodes below with coarser alignment serialise
    /// their writes from now on. To be called before such writes and while nothing is in flight.
    pub fn expect_ragged_writes(&self, granularity: u32) {
        if self.driver().limits().request_align > granularity {
            self.io().ragged.store(true, Ordering::Relaxed);
        }
        for edge in self.driver().edges() {
            edge.node.expect_ragged_writes(granularity);
        }
    }

    /// Slow lane: any operation, of any alignment and length.
    ///
    /// # Errors
    /// EINVAL outside of the node (a write of a driver that [grows](super::Driver::grows) is inside up to [`LEN_MAX`]),
    /// EPERM for changes of a read-only node; else what the driver says.
    pub fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        if let Err(e) = self.check(&op) {
            return ready(Err(e));
        }
        match op {
            Op::Read { offset, to } if self.fits(offset, &to) => {
                self.driver().submit(Op::Read { offset, to })
            }
            Op::Read { offset, to } => Box::pin(self.read_in_pieces(offset, to)),
            Op::Write { offset, from, flags } => {
                self.event(Event::Pwritev);
                self.submit_write(offset, from, flags)
            }
            Op::WriteZeroes { offset, len, flags } => {
                self.event(Event::PwritevZero);
                Box::pin(self.write_zeroes(offset, len, flags))
            }
            Op::Discard { .. } if !self.in_force().discard_unmap => ready(Ok(())),
            Op::Discard { offset, len } => Box::pin(self.discard(offset, len)),
            Op::Flush if self.ignores_flushes() => ready(Ok(())),
            Op::Flush => self.driver().submit(Op::Flush),
        }
    }

    /// Sets the length in bytes, both ways, where the driver can: see [`Driver::truncate`](super::Driver::truncate).
    ///
    /// # Errors
    /// EPERM for a read-only node, EFBIG beyond [`LEN_MAX`]; else what the driver says.
    pub async fn truncate(&self, len: u64) -> Result<(), Errno> {
        if self.read_only() {
            return Err(Errno::EPERM);
        }
        if len > LEN_MAX {
            return Err(Errno(libc::EFBIG));
        }
        // A read-modify-write of the last block would bring back what is cut off.
        let align = u64::from(self.driver().limits().request_align);
        let _range = self.io().ranges.lock(len - len % align..u64::MAX, true).await;
        self.driver().truncate(len).await
    }

    /// The orderly end of the driver, after the last request: see [`Driver::close`](super::Driver::close).
    ///
    /// # Errors
    /// What the driver says; the node is of no further use all the same.
    pub async fn close(&self) -> Result<(), Errno> {
        self.driver().close().await
    }

    fn check(&self, op: &Op<'_>) -> Result<(), Errno> {
        let (offset, len, changes) = match op {
            Op::Read { offset, to } => (*offset, to.len() as u64, false),
            Op::Write { offset, from, .. } => (*offset, from.len() as u64, true),
            Op::WriteZeroes { offset, len, .. } | Op::Discard { offset, len } => {
                (*offset, *len, true)
            }
            Op::Flush => return Ok(()),
        };
        let inside = offset.checked_add(len).is_some_and(|end| {
            end <= self.len()
                || (end <= LEN_MAX
                    && matches!(op, Op::Write { .. } | Op::WriteZeroes { .. })
                    && self.driver().grows())
        });
        if !inside {
            return Err(Errno::EINVAL);
        }
        if changes && self.read_only() { Err(Errno::EPERM) } else { Ok(()) }
    }

    /// Whether the driver can take the transfer as it is.
    fn fits(&self, offset: u64, sg: &Sg<'_>) -> bool {
        let l = self.driver().limits();
        let len = sg.len() as u64;
        len_and_offset_fit(offset, len, l.request_align)
            && sg.iter().all(|v| memory_fits(v, l.request_align, l.mem_align))
            && (l.max_transfer == 0 || len <= u64::from(l.max_transfer))
            && sg.iter().count() <= l.max_iov as usize
    }

    fn submit_write<'a>(&'a self, offset: u64, from: Sg<'a>, flags: WriteFlags) -> IoFuture<'a> {
        let flags = if self.ignores_flushes() { flags - WriteFlags::FUA } else { flags };
        if self.detect_zeroes() != DetectZeroes::Off && from.is_zero() {
            let mut zero = ZeroFlags::empty();
            zero.set(ZeroFlags::FUA, flags.contains(WriteFlags::FUA));
            zero.set(ZeroFlags::MAY_UNMAP, self.detect_zeroes() == DetectZeroes::Unmap);
            return Box::pin(self.write_zeroes(offset, from.len() as u64, zero));
        }
        if self.fits(offset, &from) && !self.io().ragged.load(Ordering::Relaxed) {
            return self.driver().submit(Op::Write { offset, from, flags });
        }
        Box::pin(self.write_in_pieces(offset, from, flags))
    }

    /// The next piece of a transfer: as long as the driver takes without help, or one bounce buffer's worth.
    fn piece<'a>(&self, offset: u64, rest: Sg<'a>) -> (Sg<'a>, bool) {
        let l = self.driver().limits();
        let cap = if l.max_transfer == 0 { usize::MAX } else { l.max_transfer as usize };
        let direct = rest.slice(0, rest.len().min(cap));
        if self.fits(offset, &direct) {
            return (direct, true);
        }
        let lead = offset % u64::from(l.request_align);
        let bounce = BOUNCE_MAX.min(cap as u64).max(u64::from(l.request_align)) - lead;
        (rest.slice(0, rest.len().min(to_usize(bounce))), false)
    }

    async fn read_in_pieces(&self, offset: u64, to: Sg<'_>) -> Result<(), Errno> {
        let mut done = 0;
        while done < to.len() {
            let at = offset + done as u64;
            let (piece, direct) = self.piece(at, to.slice(done, to.len() - done));
            if direct {
                self.driver().submit(Op::Read { offset: at, to: piece }).await?;
            } else {
                let b = Bounce::new(&self.driver().limits(), at, piece.len());
                self.read_block(&b, b.start, b.len()).await?;
                piece.copy_from(b.part());
            }
            done += piece.len();
        }
        Ok(())
    }

    async fn read_block(&self, b: &Bounce, from: u64, len: u64) -> Result<(), Errno> {
        let iov = [b.buffer.iovec().part(to_usize(from - b.start), to_usize(len))];
        self.driver().submit(Op::Read { offset: from, to: Sg::new(&iov) }).await
    }

    async fn write_in_pieces(
        &self,
        offset: u64,
        from: Sg<'_>,
        flags: WriteFlags,
    ) -> Result<(), Errno> {
        let _range = self.hold(offset, from.len() as u64).await;
        let mut done = 0;
        while done < from.len() {
            let at = offset + done as u64;
            let (piece, direct) = self.piece(at, from.slice(done, from.len() - done));
            if direct {
                self.driver().submit(Op::Write { offset: at, from: piece, flags }).await?;
            } else {
                self.write_bounced(at, piece, flags).await?;
            }
            done += piece.len();
        }
        Ok(())
    }

    /// Waits for whom a write of this range must not meet; see the module's description.
    async fn hold(&self, offset: u64, len: u64) -> Option<RangeGuard<'_>> {
        let align = u64::from(self.driver().limits().request_align);
        let ragged = !(offset | len).is_multiple_of(align);
        if !ragged && !self.io().ragged.load(Ordering::Relaxed) {
            return None;
        }
        let (start, end) = (offset - offset % align, (offset + len).next_multiple_of(align));
        Some(self.io().ranges.lock(start..end, ragged).await)
    }

    /// Writes through a buffer, filling up the blocks at both ends with what is there.
    async fn write_bounced(&self, at: u64, piece: Sg<'_>, flags: WriteFlags) -> Result<(), Errno> {
        let limits = self.driver().limits();
        let align = u64::from(limits.request_align);
        let mut b = Bounce::new(&limits, at, piece.len());
        let (end, last) = (b.start + b.len(), b.start + b.len() - align);
        if at != b.start {
            self.read_block(&b, b.start, align).await?;
        }
        let ragged_tail = at + piece.len() as u64 != end;
        if ragged_tail && (at == b.start || last != b.start) {
            self.read_block(&b, last, align).await?;
        }
        piece.copy_to(b.part_mut());
        let iov = [b.buffer.iovec()];
        self.driver().submit(Op::Write { offset: b.start, from: Sg::new(&iov), flags }).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno> {
        let l = self.driver().limits();
        let unmap = self.in_force().discard_unmap;
        let mut flags = if unmap { flags } else { flags - ZeroFlags::MAY_UNMAP };
        if self.ignores_flushes() {
            flags -= ZeroFlags::FUA;
        }
        let align = u64::from(l.zeroes_align.max(l.request_align).max(1));
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(align).min(end), end - end % align);
        let max = (l.max_zeroes - l.max_zeroes % align).max(align);
        let max = if l.max_zeroes == 0 { u64::MAX } else { max };
        let mut at = offset;
        while at < end {
            // The ragged head, the whole middle in pieces, the ragged tail.
            let (n, whole) = match at {
                at if at < first => (first - at, false),
                at if at < last => ((last - at).min(max), true),
                at => (end - at, false),
            };
            let mut result = Err(Errno::ENOTSUP);
            if whole {
                let _range = self.hold(at, n).await;
                result = self.driver().submit(Op::WriteZeroes { offset: at, len: n, flags }).await;
            }
            match result {
                Err(Errno::ENOTSUP) if !(whole && flags.contains(ZeroFlags::NO_FALLBACK)) => {
                    self.write_zero_data(at, n, flags).await?;
                }
                result => result?,
            }
            at += n;
        }
        Ok(())
    }

    async fn write_zero_data(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), Errno> {
        let l = self.driver().limits();
        let buffer = Buffer::new(to_usize(len.min(BOUNCE_MAX)), l.mem_align as usize);
        let mut wflags = WriteFlags::empty();
        wflags.set(WriteFlags::FUA, flags.contains(ZeroFlags::FUA));
        let mut done = 0;
        while done < len {
            let n = (len - done).min(BOUNCE_MAX);
            let iov = [buffer.iovec().part(0, to_usize(n))];
            self.write_in_pieces(offset + done, Sg::new(&iov), wflags).await?;
            done += n;
        }
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let l = self.driver().limits();
        let align = u64::from(l.discard_align.max(l.request_align).max(1));
        let end = match offset + len {
            end if end == self.len() => end,
            end => end - end % align,
        };
        let mut at = offset.next_multiple_of(align);
        let max = if l.max_discard == 0 {
            u64::MAX
        } else {
            (l.max_discard - l.max_discard % align).max(align)
        };
        while at < end {
            let n = (end - at).min(max);
            let _range = self.hold(at, n).await;
            match self.driver().submit(Op::Discard { offset: at, len: n }).await {
                // A discard is a hint.
                Ok(()) | Err(Errno::ENOTSUP) => {}
                Err(e) => return Err(e),
            }
            at += n;
        }
        Ok(())
    }
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("lengths in memory fit in memory")
}

/// A buffer of whole blocks around a ragged range.
struct Bounce {
    buffer: Buffer,
    start: u64,
    skip: usize,
    part: usize,
}

impl Bounce {
    fn new(limits: &Limits, at: u64, len: usize) -> Bounce {
        let align = u64::from(limits.request_align);
        let start = at - at % align;
        let end = (at + len as u64).next_multiple_of(align);
        let buffer =
            Buffer::new(to_usize(end - start), limits.mem_align.max(limits.request_align) as usize);
        Bounce { buffer, start, skip: to_usize(at - start), part: len }
    }

    fn len(&self) -> u64 {
        self.buffer.len() as u64
    }

    fn part(&self) -> &[u8] {
        &self.buffer.bytes()[self.skip..self.skip + self.part]
    }

    fn part_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.bytes_mut()[self.skip..self.skip + self.part]
    }
}

#[inline]
fn len_and_offset_fit(offset: u64, len: u64, request_align: u32) -> bool {
    (offset | len) & u64::from(request_align - 1) == 0
}

/// O_DIRECT wants every range to start at a multiple of the memory alignment and to be of whole blocks.
#[inline]
fn memory_fits(v: IoVec, request_align: u32, mem_align: u32) -> bool {
    v.base().addr() & (mem_align as usize - 1) == 0 && v.len() & (request_align as usize - 1) == 0
}

/// Whether the kernel can take a transfer of `len` bytes between `iov` and `offset` of `file` as it is.
#[inline]
pub fn aligned_for(file: &File, offset: u64, len: u64, iov: &[IoVec]) -> bool {
    let (request, mem) = (file.request_align, file.mem_align);
    len_and_offset_fit(offset, len, request)
        && (request | mem == 1 || iov.iter().all(|v| memory_fits(*v, request, mem)))
}
