//! Guest writes: in place, or into clusters that get new entries.
#![forbid(unsafe_code)]

use std::future::poll_fn;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};

use super::limbo::Freed;
use super::mutation::{Mutation, broken};
use super::plan::{Fill, Need, Pad, Plan};
use super::space::is_no_space;
use super::{Meta, Writing};
use crate::block::drivers::qcow2::Image;
use crate::block::drivers::qcow2::layout::GuestOffset;
use crate::block::walk::{self, Crew};
use crate::block::{Event, Op, WriteFlags};
use crate::error::Errno;
use crate::mem::{IoVec, Sg};
use crate::rt::{Buffer, grace};

/// The most bytes of one [`Fill`]: its padding is in memory.
const FILL_MAX: u64 = 4 << 20;
/// How often data that found no room looks for another place.
const ATTEMPTS: u32 = 3;

impl Image {
    /// Writes `from` at guest byte `offset`.
    ///
    /// # Errors
    /// What the files say; EIO for a corrupt image; ENOSPC.
    pub async fn write(
        &self,
        w: &Writing,
        offset: u64,
        from: Sg<'_>,
        flags: WriteFlags,
    ) -> Result<(), Errno> {
        self.write_pieces(w, offset, from, flags, 0).await
    }

    async fn write_pieces(
        &self,
        w: &Writing,
        offset: u64,
        from: Sg<'_>,
        flags: WriteFlags,
        attempt: u32,
    ) -> Result<(), Errno> {
        let mut crew = Crew::default();
        let mut done = 0;
        while done < from.len() {
            let at = GuestOffset(offset + done as u64);
            let rest = from.slice(done, from.len() - done);
            let planned = crew.meanwhile(Box::pin(self.planned(w, at, rest.len() as u64))).await;
            match planned {
                Ok((Plan::InPlace { host, len }, pin)) => {
                    let n = usize::try_from(len).map_err(|_| Errno::EIO)?;
                    let piece = rest.slice(0, n);
                    done += n;
                    if n == from.len() {
                        // The usual case: all of it in one piece. (A last piece is not: the ones before may have failed, and
                        // must be as stable as this one.)
                        return self.overwrite(w, (host.0, piece), flags, pin).await;
                    }
                    let no_flags = WriteFlags::empty();
                    crew.add(Box::pin(self.overwrite(w, (host.0, piece), no_flags, pin))).await;
                }
                Ok((Plan::Fill(fill), pin)) => {
                    drop(pin);
                    let n =
                        usize::try_from(fill.data.end - fill.data.start).map_err(|_| Errno::EIO)?;
                    done += n;
                    crew.add(Box::pin(self.fill(w, *fill, rest.slice(0, n), attempt))).await;
                }
                Ok((Plan::Wait | Plan::Needs(_), _)) => unreachable!("`planned` sees to them"),
                Err(e) => {
                    crew.failed(e);
                    break;
                }
            }
        }
        crew.finish().await?;
        self.stable(flags.contains(WriteFlags::FUA)).await
    }

    /// Makes everything stable if `fua`.
    pub async fn stable(&self, fua: bool) -> Result<(), Errno> {
        if fua && !broken(Mutation::NoFlushForFua) { self.flush().await } else { Ok(()) }
    }

    async fn overwrite(
        &self,
        w: &Writing,
        (host, from): (u64, Sg<'_>),
        flags: WriteFlags,
        _pin: grace::Pin,
    ) -> Result<(), Errno> {
        let fua = flags.contains(WriteFlags::FUA);
        // The entry itself may not be on disk yet: then a flush of everything is needed.
        let alone = fua && (w.is_stable() || broken(Mutation::FuaOfDataOnly));
        let flags = if alone { flags } else { flags - WriteFlags::FUA };
        self.data().event(Event::WriteAio);
        self.data().submit(Op::Write { offset: host, from, flags }).await?;
        self.stable(fua && !alone).await
    }

    /// A plan that can be carried out; with a pin, taken before the entry was looked at, so that nobody else uses the place of
    /// a write in place before it ends. Nobody waits for anything with a pin: space may have to wait for pins.
    async fn planned(
        &self,
        w: &Writing,
        at: GuestOffset,
        len: u64,
    ) -> Result<(Plan, grace::Pin), Errno> {
        loop {
            let plan = poll_fn(|cx| {
                let pin = grace::enter(&w.grace);
                match self.plan(w, at, len.min(FILL_MAX), cx.waker()) {
                    Plan::Wait => Poll::Pending,
                    plan => Poll::Ready((plan, pin)),
                }
            });
            match plan.await {
                (Plan::Needs(need), pin) => {
                    drop(pin);
                    self.get(w, need, at).await?;
                }
                planned => return Ok(planned),
            }
        }
    }

    /// Gets what planning a change at `at` needs.
    ///
    /// # Errors
    /// It cannot be had.
    pub async fn get(&self, w: &Writing, need: Need, at: GuestOffset) -> Result<(), Errno> {
        match need {
            Need::Table(l1_index) => self.own_table(w, l1_index, at).await,
            Need::Slice => self.cached_slice(at).await,
            Need::Allocator(blocked) => self.unblock(w, blocked).await,
            Need::Journal => self.flush().await,
            Need::BadTable(bad, l1_index) => Err(self.corrupt_table(bad, l1_index)),
            Need::BadEntry(bad, start) => Err(self.corrupt_entry(bad, start)),
            Need::Overlap(host) => Err(self.overlap(w, host).await),
        }
    }

    /// Writes the data of a fill and what is around it, and links it.
    async fn fill(&self, w: &Writing, fill: Fill, from: Sg<'_>, attempt: u32) -> Result<(), Errno> {
        if broken(Mutation::LinkBeforeData) {
            self.link(w, &fill).await?;
        }
        let mut result = self.write_fill(w, &fill, from).await;
        if result.is_ok() || broken(Mutation::LinkFailedWrites) {
            result = result.and(self.link(w, &fill).await);
        }
        let Err(e) = result else { return Ok(()) };
        self.abandon(w, &fill);
        if !is_no_space(e) || attempt >= ATTEMPTS {
            return Err(e);
        }
        // There may be room inside of the file: what was set aside for streams, what has been freed.
        w.tight.store(true, Ordering::Relaxed);
        if self.make_room(w).await.is_err() && attempt > 0 {
            return Err(e);
        }
        let (offset, flags) = (fill.data.start, WriteFlags::empty());
        Box::pin(self.write_pieces(w, offset, from, flags, attempt + 1)).await
    }

    async fn write_fill(&self, w: &Writing, fill: &Fill, from: Sg<'_>) -> Result<(), Errno> {
        let cluster_start = fill.first << self.geometry.cluster_bits;
        let host = fill.host.plus(fill.write.start - cluster_start).0;
        let len = fill.write.end - fill.write.start;
        if fill.allocated.is_some() {
            self.grow_to(w, fill.host.plus(fill.count << self.geometry.cluster_bits).0).await?;
        }
        let pads = self.pads(fill).await?;
        let part = |from: u64, to: u64| -> Option<IoVec> {
            let skip = usize::try_from(from - fill.write.start).ok()?;
            let len = usize::try_from(to - from).ok()?;
            pads.as_ref().map(|buffer| buffer.iovec().part(skip, len))
        };
        let mut iov = Vec::with_capacity(4);
        let mut at = fill.data.start;
        if fill.head != Pad::Nothing {
            iov.extend(part(fill.write.start, fill.data.start));
            at = fill.write.start;
        }
        iov.extend(from.iter());
        // Nobody sees what is behind the disk's end; a data file may end there.
        let disk = self.len().max(w.growing_to.load(Ordering::SeqCst));
        let end = fill.write.end.min(fill.data.end.max(disk));
        if fill.tail != Pad::Nothing && end > fill.data.end {
            iov.extend(part(fill.data.end, end));
        }
        let offset = host + (at - fill.write.start);
        debug_assert!(Sg::new(&iov).len() as u64 <= len, "a fill writes no more than it said");
        // Here LUKS encrypts: data and padding, by `offset`.
        let op = Op::Write { offset, from: Sg::new(&iov), flags: WriteFlags::empty() };
        if pads.is_some() {
            self.data().event(Event::CowWrite);
        }
        self.data().event(Event::WriteAio);
        self.data().submit(op).await
    }

    /// A buffer for all that a fill writes, with what is around the data in it; zeroes at least.
    async fn pads(&self, fill: &Fill) -> Result<Option<Buffer>, Errno> {
        if (fill.head, fill.tail) == (Pad::Nothing, Pad::Nothing) {
            return Ok(None);
        }
        let len = usize::try_from(fill.write.end - fill.write.start).map_err(|_| Errno::EIO)?;
        let align = self.data().driver().limits().mem_align.max(512) as usize;
        let mut buffer = Buffer::recycled(len, align);
        let mut read = Vec::with_capacity(2);
        self.file().event(Event::CowRead);
        for (pad, range) in [
            (fill.head, fill.write.start..fill.data.start),
            (fill.tail, fill.data.end..fill.write.end),
        ] {
            let part = range.start - fill.write.start..range.end - fill.write.start;
            match pad {
                Pad::Nothing => {}
                Pad::Zero => buffer.bytes_mut()[part.start as usize..part.end as usize].fill(0),
                Pad::Copy => read.push(range),
            }
        }
        if let [head, tail] = &mut read[..]
            && tail.start - head.end <= (tail.end - tail.start).max(head.end - head.start)
        {
            // One read is cheaper than two.
            head.end = tail.end;
            read.truncate(1);
        }
        for range in read {
            let skip = usize::try_from(range.start - fill.write.start).map_err(|_| Errno::EIO)?;
            let n = usize::try_from(range.end - range.start).map_err(|_| Errno::EIO)?;
            let iov = [buffer.iovec().part(skip, n)];
            walk::read(self, range.start, Sg::new(&iov)).await?;
        }
        Ok(Some(buffer))
    }

    /// Lets the new entries be seen.
    async fn link(&self, w: &Writing, fill: &Fill) -> Result<(), Errno> {
        let start = GuestOffset(fill.first << self.geometry.cluster_bits);
        let (slice, index) = self.slice_of(start);
        loop {
            let mut meta = w.lock();
            if !self.can_record(w, fill.entries.len()) {
                drop(meta);
                self.flush().await?;
                continue;
            }
            self.touch(w);
            if self.store(w, slice, index, &fill.entries)? {
                self.let_go(w, &mut meta, &fill.freed);
                end_busy(meta, fill);
                return Ok(());
            }
            drop(meta);
            // Evicted meanwhile.
            self.cached_slice(start).await?;
        }
    }

    /// Takes back what was planned: nobody has seen it.
    fn abandon(&self, w: &Writing, fill: &Fill) {
        let mut meta = w.lock();
        if let Some(run) = &fill.allocated {
            for cluster in run.first..run.first + run.count {
                // The block that was cached a moment ago may have to be read again: later, then.
                if meta.refcounts.release(cluster).is_err() {
                    meta.limbo.push_ready([Freed { cluster, discard: false, table: false }]);
                }
            }
            meta.released += 1;
        }
        end_busy(meta, fill);
    }
}

/// The clusters of a fill are not busy any more; who waits is woken outside of the lock.
fn end_busy(mut meta: MutexGuard<'_, Meta>, fill: &Fill) {
    let waiting = meta.busy.end(fill.first);
    drop(meta);
    waiting.into_iter().for_each(Waker::wake);
}
