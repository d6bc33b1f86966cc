//! The simulated disks of one world: requests that wait to be completed, what the disks hold, what shall go wrong.
//!
//! A request is *issued* when it is first polled, *chosen* by the scheduler at some later moment, and *completed* when its
//! future is polled again. Requests are chosen in random order, so they overtake each other; a read sees the disk as it is
//! when the read completes, including parts of writes that are still in flight.

use std::ops::Range;
use std::sync::Arc;
use std::task::Waker;

use super::history::{Change, Event, FlushFailure, History, Time};
use super::request::{Discarded, DiskOptions, DiskSpec, Fault, KINDS, Request, Work};
use super::rng::mix;
use super::{Pages, Rng};
use crate::block::{Op, WriteFlags, ZeroFlags};
use crate::error::Errno;
use crate::mem::Sg;

pub(super) struct Disk {
    pub(super) name: String,
    pub(super) image: Pages,
    pub(super) options: DiskOptions,
    pub(super) faults: Vec<Fault>,
    /// Requests issued, by kind.
    pub(super) counts: [u64; KINDS],
    /// The error of every flush from now on.
    dead: Option<Errno>,
}

struct Pending {
    id: u64,
    disk: usize,
    /// `None`: nothing changes (reads, flushes, refused requests).
    change: Option<Change>,
    fault: Option<Fault>,
    chosen: bool,
    /// Where it works, in bytes; flushes: nowhere.
    range: Range<u64>,
    /// The scheduler rather takes another one.
    slow: bool,
    waker: Waker,
}

/// The disks of a world and all that happened to them.
pub(super) struct State {
    pub(super) disks: Vec<Disk>,
    pub(super) history: History,
    pub(super) rng: Rng,
    pub(super) time: Time,
    pub(super) trace: u64,
    /// Set when the world ends: futures may be dropped from then on.
    pub(super) over: bool,
    /// Writes whose memory changed while they were in flight.
    pub(super) changed_in_flight: u64,
    /// Requests of this disk in this range are not completed.
    pub(super) held: Option<(usize, Range<u64>)>,
    pending: Vec<Pending>,
    requests: u64,
}

impl State {
    pub(super) fn new(rng: Rng) -> State {
        State {
            disks: Vec::new(),
            history: History::default(),
            rng,
            time: 0,
            trace: 0,
            over: false,
            changed_in_flight: 0,
            held: None,
            pending: Vec::new(),
            requests: 0,
        }
    }

    pub(super) fn add(&mut self, spec: DiskSpec) -> usize {
        let DiskSpec { name, image, options } = spec;
        self.history.start.push((name.clone(), image.clone()));
        let (faults, counts) = (Vec::new(), [0; KINDS]);
        self.disks.push(Disk { name, image, options, faults, counts, dead: None });
        self.disks.len() - 1
    }

    /// The next moment.
    pub(super) fn tick(&mut self) -> Time {
        self.time += 1;
        self.history.end = self.time;
        self.time
    }

    /// Adds to the fingerprint of the run.
    pub(super) fn note(&mut self, what: u64) {
        self.trace = mix(self.trace ^ mix(what));
    }

    fn record(&mut self, event: Event) {
        let time = self.tick();
        self.note(time);
        self.history.events.push((time, event));
    }

    /// A request comes in. Answers its number.
    pub(super) fn issue(&mut self, disk: usize, work: &Work<'_>, waker: &Waker) -> u64 {
        self.requests += 1;
        let id = self.requests;
        let request = Request::of(work);
        let fault = self.disks[disk].take_fault(request);
        let change = self.change_of(disk, work);
        // Decided now: what will fail for want of room leaves nothing behind if the power is cut before.
        let capacity = self.disks[disk].options.capacity;
        let full = change.as_ref().is_some_and(|change| change.end() > capacity);
        let no_room = || Fault { request, nth: 0, times: 1, errno: Errno::ENOSPC, partial: false };
        let fault = fault.or_else(|| full.then(no_room));
        self.note(id << 8 | request as u64);
        match (&change, request) {
            (Some(change), _) if !full => {
                let (change, fua) = (change.clone(), is_fua(work));
                self.record(Event::Issued { op: id, disk, change, fua });
            }
            (None, Request::Flush) => self.record(Event::FlushIssued { op: id, disk }),
            _ => {}
        }
        let slow = self.rng.chance(1, 8);
        let waker = waker.clone();
        self.pending.push(Pending {
            id,
            disk,
            change,
            fault,
            chosen: false,
            range: work.range(),
            slow,
            waker,
        });
        id
    }

    fn change_of(&mut self, disk: usize, work: &Work<'_>) -> Option<Change> {
        let Disk { image, options, .. } = &self.disks[disk];
        let op = match *work {
            Work::Op(op) => op,
            Work::Truncate(len) => return Some(Change::Length(len)),
            Work::Grow(len) => return Some(Change::AtLeast(len)),
        };
        match op {
            Op::Write { offset, from, .. } => Some(Change::Data(offset, bytes_of(from))),
            Op::WriteZeroes { offset, len, .. } if options.zeroes => {
                Some(Change::Zero(offset, len))
            }
            Op::Discard { offset, len } => {
                let len = len.min(image.len().saturating_sub(offset));
                match options.discarded {
                    _ if len == 0 => None,
                    Discarded::Zero => Some(Change::Zero(offset, len)),
                    Discarded::Old => None,
                    Discarded::Garbage => {
                        let byte = self.rng.next_u64().to_le_bytes()[0];
                        let len = usize::try_from(len).unwrap_or(usize::MAX);
                        Some(Change::Data(offset, vec![byte; len].into()))
                    }
                }
            }
            _ => None,
        }
    }

    /// Whether the request has been chosen; if not its waker is kept.
    pub(super) fn is_chosen(&mut self, id: u64, waker: &Waker) -> bool {
        let pending = self.pending.iter_mut().find(|p| p.id == id);
        pending.is_some_and(|p| {
            if !p.chosen && !p.waker.will_wake(waker) {
                p.waker = waker.clone();
            }
            p.chosen
        })
    }

    /// How many requests could be completed now.
    pub(super) fn choosable(&self) -> usize {
        self.pending.iter().filter(|p| !p.chosen && !self.is_held(p)).count()
    }

    fn is_held(&self, p: &Pending) -> bool {
        self.held.as_ref().is_some_and(|(disk, held)| {
            *disk == p.disk && p.range.start < held.end && held.start < p.range.end
        })
    }

    /// How many requests are held.
    pub(super) fn held(&self) -> usize {
        self.pending.iter().filter(|p| !p.chosen && self.is_held(p)).count()
    }

    /// Chooses one of them; the caller wakes its task.
    pub(super) fn choose(&mut self) -> Option<Waker> {
        let patient = self.rng.chance(15, 16);
        let open = (0..self.pending.len())
            .filter(|at| !self.pending[*at].chosen && !self.is_held(&self.pending[*at]));
        let mut open: Vec<usize> = open.collect();
        if patient && open.iter().any(|at| !self.pending[*at].slow) {
            open.retain(|at| !self.pending[*at].slow);
        }
        if open.is_empty() {
            return None;
        }
        let at = self.rng.index(open.len());
        let pending = &mut self.pending[open.swap_remove(at)];
        pending.chosen = true;
        Some(pending.waker.clone())
    }

    /// Completes a chosen request.
    pub(super) fn complete(&mut self, id: u64, work: &Work<'_>) -> Result<(), Errno> {
        let Some(at) = self.pending.iter().position(|p| p.id == id) else { return Err(Errno::EIO) };
        let Pending { disk, change, fault, .. } = self.pending.swap_remove(at);
        self.note(id << 8 | 0x80);
        match (*work, change) {
            (Work::Op(Op::Read { offset, to }), _) => self.read(disk, offset, to, fault),
            (Work::Op(Op::Flush), _) => self.flush(id, disk, fault),
            (Work::Op(Op::WriteZeroes { .. }), None) => Err(Errno::ENOTSUP),
            (_, Some(change)) => self.change(id, disk, work, &change, fault),
            (_, None) => fault.map_or(Ok(()), |f| Err(f.errno)),
        }
    }

    /// A future was dropped with its request in flight.
    pub(super) fn abandoned(&mut self, id: u64) {
        self.pending.retain(|p| p.id != id);
    }

    fn read(
        &mut self,
        disk: usize,
        offset: u64,
        to: Sg<'_>,
        fault: Option<Fault>,
    ) -> Result<(), Errno> {
        if let Some(fault) = fault {
            return Err(fault.errno);
        }
        self.trickle(disk, offset, offset + to.len() as u64);
        let mut bytes = vec![0; to.len()];
        self.disks[disk].image.read(offset, &mut bytes);
        to.copy_from(&bytes);
        Ok(())
    }

    /// Parts of the writes in flight that overlap a range become visible: a read may see them half done.
    fn trickle(&mut self, disk: usize, start: u64, end: u64) {
        let mut events = Vec::new();
        for p in self.pending.iter().filter(|p| p.disk == disk && p.fault.is_none()) {
            let Some(change) = &p.change else { continue };
            let (offset, len) = change.range();
            // Growth is not seen early, nor the end of a truncate: the length belongs to the completion.
            let inside = offset + len <= self.disks[disk].image.len();
            if offset >= end || start >= offset + len || !inside || !self.rng.chance(1, 4) {
                continue;
            }
            let odds = 1 + self.rng.below(4);
            let pieces: Vec<usize> =
                (0..change.pieces()).filter(|_| self.rng.chance(odds, 4)).collect();
            for piece in &pieces {
                change.apply_piece(&mut self.disks[disk].image, *piece);
            }
            events.push(Event::Trickled { op: p.id, disk, pieces });
        }
        events.into_iter().for_each(|event| self.record(event));
    }

    fn change(
        &mut self,
        id: u64,
        disk: usize,
        work: &Work<'_>,
        change: &Change,
        fault: Option<Fault>,
    ) -> Result<(), Errno> {
        let full = change.end() > self.disks[disk].options.capacity;
        if full || fault.is_some() {
            let partial = !full && fault.is_some_and(|f| f.partial);
            let pieces: Vec<usize> =
                (0..change.pieces()).filter(|_| partial && self.rng.chance(1, 2)).collect();
            for piece in &pieces {
                change.apply_piece(&mut self.disks[disk].image, *piece);
            }
            self.record(Event::Failed { op: id, disk, pieces });
            return Err(fault.map_or(Errno::ENOSPC, |f| f.errno));
        }
        let changed = self.torn_by_the_writer(work, change);
        changed.as_ref().unwrap_or(change).apply(&mut self.disks[disk].image);
        self.record(Event::Done { op: id, disk, change: changed });
        Ok(())
    }

    /// The disk fetches the memory of a write at any time while it is in flight: if the memory has changed, each sector is
    /// the old or the new one.
    fn torn_by_the_writer(&mut self, work: &Work<'_>, change: &Change) -> Option<Change> {
        let (Work::Op(Op::Write { from, .. }), Change::Data(offset, before)) = (work, change)
        else {
            return None;
        };
        let now = bytes_of(*from);
        if now == *before {
            return None;
        }
        self.changed_in_flight += 1;
        let mut image = Pages::default();
        let (before, now) = (Change::Data(*offset, before.clone()), Change::Data(*offset, now));
        before.apply(&mut image);
        for piece in 0..now.pieces() {
            if self.rng.chance(1, 2) {
                now.apply_piece(&mut image, piece);
            }
        }
        let mut mixed = vec![0; from.len()];
        image.read(*offset, &mut mixed);
        Some(Change::Data(*offset, mixed.into()))
    }

    fn flush(&mut self, id: u64, disk: usize, fault: Option<Fault>) -> Result<(), Errno> {
        let target = &mut self.disks[disk];
        let how = target.options.flush_failure;
        if let Some(fault) = fault
            && how == FlushFailure::Sticky
        {
            target.dead.get_or_insert(fault.errno);
        }
        match target.dead.or(fault.map(|f| f.errno)) {
            None => {
                self.record(Event::Flushed { op: id, disk });
                Ok(())
            }
            Some(errno) => {
                self.record(Event::FlushFailed { op: id, disk, how });
                Err(errno)
            }
        }
    }
}

impl Disk {
    fn take_fault(&mut self, request: Request) -> Option<Fault> {
        let count = &mut self.counts[request as usize];
        let n = *count;
        *count += 1;
        let hit = |f: &&Fault| f.request == request && (f.nth..f.nth + f.times).contains(&n);
        self.faults.iter().find(hit).copied()
    }
}

fn bytes_of(from: Sg<'_>) -> Arc<[u8]> {
    let mut bytes = vec![0; from.len()];
    from.copy_to(&mut bytes);
    bytes.into()
}

fn is_fua(work: &Work<'_>) -> bool {
    match work {
        Work::Op(Op::Write { flags, .. }) => flags.contains(WriteFlags::FUA),
        Work::Op(Op::WriteZeroes { flags, .. }) => flags.contains(ZeroFlags::FUA),
        _ => false,
    }
}
