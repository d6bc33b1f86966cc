//! What happened to the disks, event by event, and what a crash at any moment could have left on them.
//!
//! A run records its [`History`]; a [`Replay`] goes through it again and stops at *cuts*: cut `n` is the moment after the
//! first `n` events. The run itself is not disturbed, and one run serves all its cuts.
//!
//! The disk under test has a volatile cache. At any moment its content is made of
//! * `durable`: what a completed flush (or a write with FUA) has made stable;
//! * the *volatile* writes: completed since, in flight, or lost by a failed flush. Each sector of each of them may or may
//!   not have reached the medium, in any order: a sector is the atomic unit, a longer write may tear.
//!
//! A flush makes stable what was complete **when it was issued**, nothing else. After a power cut the disk holds `durable`
//! and any subset of the volatile sectors ([`Crash::Power`]); after the death of the process alone it holds everything that
//! was complete, and any subset of what was in flight ([`Crash::Kill`]).

use std::collections::HashMap;
use std::sync::Arc;

use super::{Pages, Rng};
use crate::block::node::SECTOR;

/// Zeroing of more than this is torn in units of [`COARSE`], not of sectors: nobody looks at so many.
const FINE_MAX: u64 = 8 << 20;
const COARSE: u64 = 1 << 16;

/// A moment in a run; grows with everything that happens to a disk or a guest.
pub type Time = u64;

/// A change of a range, or of the length.
#[derive(Clone, Debug)]
pub(super) enum Change {
    /// These bytes are stored.
    Data(u64, Arc<[u8]>),
    /// The range becomes zero.
    Zero(u64, u64),
    /// The image has this length. It may reach the medium before or after other changes; but a stable write past it
    /// takes it along, as a journalling file system does.
    Length(u64),
    /// The image has at least this length.
    AtLeast(u64),
}

impl Change {
    /// Offset and length in bytes; of a new length: everything behind.
    pub(super) fn range(&self) -> (u64, u64) {
        match self {
            Change::Data(offset, bytes) => (*offset, bytes.len() as u64),
            Change::Zero(offset, len) => (*offset, *len),
            Change::Length(len) => (*len, u64::MAX - len),
            Change::AtLeast(len) => (*len, 0),
        }
    }

    /// The length that the image has at least afterwards.
    pub(super) fn end(&self) -> u64 {
        match self {
            Change::Length(len) | Change::AtLeast(len) => *len,
            _ => {
                let (offset, len) = self.range();
                offset + len
            }
        }
    }

    fn unit(&self) -> u64 {
        match self {
            Change::Zero(_, len) if *len > FINE_MAX => COARSE,
            _ => SECTOR,
        }
    }

    /// Into how many atomic pieces it may tear.
    pub(super) fn pieces(&self) -> usize {
        if let Change::Length(_) | Change::AtLeast(_) = self {
            return 1;
        }
        let ((offset, len), unit) = (self.range(), self.unit());
        usize::try_from((offset + len).div_ceil(unit) - offset / unit).unwrap_or(usize::MAX)
    }

    /// Start and end in bytes of piece `n`.
    fn piece(&self, n: usize) -> (u64, u64) {
        if let Change::Length(len) = self {
            return (*len, u64::MAX);
        }
        if let Change::AtLeast(len) = self {
            return (*len, *len);
        }
        let ((offset, len), unit) = (self.range(), self.unit());
        let start = (offset / unit + n as u64) * unit;
        (start.max(offset), (start + unit).min(offset + len))
    }

    /// Applies the whole change; the image grows as needed.
    pub(super) fn apply(&self, image: &mut Pages) {
        match self {
            Change::Data(offset, bytes) => image.write(*offset, bytes),
            Change::Zero(offset, len) => {
                image.set_len(image.len().max(offset + len));
                image.zero(*offset, *len);
            }
            Change::Length(len) => image.set_len(*len),
            Change::AtLeast(len) => image.set_len(image.len().max(*len)),
        }
    }

    /// Applies one piece.
    pub(super) fn apply_piece(&self, image: &mut Pages, n: usize) {
        let (start, end) = self.piece(n);
        match self {
            Change::Length(len) => image.set_len(*len),
            Change::AtLeast(len) => image.set_len(image.len().max(*len)),
            Change::Data(offset, bytes) => {
                image.write(start, &bytes[(start - offset) as usize..(end - offset) as usize]);
            }
            Change::Zero(..) => {
                image.set_len(image.len().max(end));
                image.zero(start, end - start);
            }
        }
    }
}

/// What a failed flush has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlushFailure {
    /// Nothing; the next one may succeed.
    Retry,
    /// The data is lost, and every later flush fails, too: what the `file` driver does through the page cache.
    Sticky,
    /// The data is lost, and later flushes succeed without it: Linux before the driver's care.
    Lies,
}

/// One thing that happened to a disk.
#[derive(Clone, Debug)]
pub(super) enum Event {
    /// A change of disk `disk` was submitted.
    Issued { op: u64, disk: usize, change: Change, fua: bool },
    /// A flush was submitted.
    FlushIssued { op: u64, disk: usize },
    /// Some pieces of a change in flight have become visible.
    Trickled { op: u64, disk: usize, pieces: Vec<usize> },
    /// A change is complete. `change`: what was stored, if the memory has changed since it was submitted.
    Done { op: u64, disk: usize, change: Option<Change> },
    /// A change failed after `pieces` were stored.
    Failed { op: u64, disk: usize, pieces: Vec<usize> },
    /// A flush is complete.
    Flushed { op: u64, disk: usize },
    /// A flush failed.
    FlushFailed { op: u64, disk: usize, how: FlushFailure },
}

/// All that happened to the disks of a run.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// The disks at the start.
    pub(super) start: Vec<(String, Pages)>,
    pub(super) events: Vec<(Time, Event)>,
    pub(super) end: Time,
}

impl History {
    /// The number of events; cuts go from 0 to this.
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing happened.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// The last moment before the event that cut `cut` does not have.
    pub fn time_of(&self, cut: usize) -> Time {
        self.events.get(cut).map_or(self.end, |(time, _)| time - 1)
    }
}

/// What dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crash {
    /// The machine: what the cache held is lost, wholly or in part.
    Power,
    /// The process (`kill -9`): what was complete stays.
    Kill,
}

/// Which of the volatile writes have reached the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survivors {
    /// None.
    None,
    /// All.
    All,
    /// Only the `n`th.
    Only(usize),
    /// All but the `n`th.
    AllBut(usize),
    /// Any subset, sector by sector, from this seed.
    Random(u64),
}

/// A write that may or may not be on the medium.
#[derive(Debug)]
struct Volatile {
    op: u64,
    change: Change,
    completed: Option<Time>,
    fua: bool,
    /// No flush will make it stable any more.
    lost: bool,
    /// The pieces that can still come to light.
    live: Vec<bool>,
}

#[derive(Debug)]
struct Medium {
    name: String,
    durable: Pages,
    current: Pages,
    volatile: Vec<Volatile>,
    flushes: HashMap<u64, Time>,
}

/// A history gone through up to some moment.
#[derive(Debug)]
pub struct Replay {
    media: Vec<Medium>,
    next: usize,
}

impl Replay {
    /// At the start of `history`.
    pub fn new(history: &History) -> Replay {
        let medium = |(name, image): &(String, Pages)| Medium {
            name: name.clone(),
            durable: image.clone(),
            current: image.clone(),
            volatile: Vec::new(),
            flushes: HashMap::new(),
        };
        Replay { media: history.start.iter().map(medium).collect(), next: 0 }
    }

    /// Goes on to `cut`, which must not lie behind.
    ///
    /// # Panics
    /// If it does.
    pub fn advance(&mut self, history: &History, cut: usize) {
        assert!(cut >= self.next, "a replay goes forward");
        for (time, event) in &history.events[self.next..cut] {
            self.step(*time, event);
        }
        self.next = cut;
    }

    fn step(&mut self, time: Time, event: &Event) {
        match event {
            Event::Issued { op, disk, change, fua } => self.media[*disk].issued(*op, change, *fua),
            Event::FlushIssued { op, disk } => {
                self.media[*disk].flushes.insert(*op, time);
            }
            Event::Trickled { op, disk, pieces } => self.media[*disk].trickled(*op, pieces),
            Event::Done { op, disk, change } => self.media[*disk].done(*op, time, change.as_ref()),
            Event::Failed { op, disk, pieces } => self.media[*disk].failed(*op, time, pieces),
            Event::Flushed { op, disk } => self.media[*disk].flushed(*op),
            Event::FlushFailed { op, disk, how } => self.media[*disk].flush_failed(*op, *how),
        }
    }

    /// How many writes are volatile: the numbers of [`Survivors::Only`] and [`Survivors::AllBut`] are below.
    pub fn volatile(&self, crash: Crash) -> usize {
        self.media.iter().map(|m| m.candidates(crash).count()).sum()
    }

    /// The disks after a crash now, in the order in which they were added.
    pub fn crashed(&self, crash: Crash, survivors: Survivors) -> Vec<(String, Pages)> {
        let mut choice = Choice::new(survivors);
        let media = self.media.iter();
        media.map(|m| (m.name.clone(), m.crashed(crash, &mut choice))).collect()
    }
}

impl Medium {
    fn issued(&mut self, op: u64, change: &Change, fua: bool) {
        let live = vec![true; change.pieces()];
        let change = change.clone();
        self.volatile.push(Volatile { op, change, completed: None, fua, lost: false, live });
    }

    fn position(&self, op: u64) -> Option<usize> {
        self.volatile.iter().rposition(|v| v.op == op)
    }

    fn trickled(&mut self, op: u64, pieces: &[usize]) {
        let Some(at) = self.position(op) else { return };
        for piece in pieces {
            self.volatile[at].change.apply_piece(&mut self.current, *piece);
        }
    }

    fn done(&mut self, op: u64, time: Time, change: Option<&Change>) {
        let Some(at) = self.position(op) else { return };
        let write = &mut self.volatile[at];
        if let Some(change) = change {
            write.change = change.clone();
        }
        write.completed = Some(time);
        write.change.apply(&mut self.current);
        if write.fua {
            let write = self.volatile.remove(at);
            self.harden(&write);
        }
    }

    fn failed(&mut self, op: u64, time: Time, pieces: &[usize]) {
        self.trickled(op, pieces);
        let Some(at) = self.position(op) else { return };
        let write = &mut self.volatile[at];
        write.completed = Some(time);
        for (piece, live) in write.live.iter_mut().enumerate() {
            *live = pieces.contains(&piece);
        }
    }

    fn flushed(&mut self, op: u64) {
        let issued = self.flushes.remove(&op).unwrap_or(0);
        let covered = |v: &Volatile| !v.lost && v.completed.is_some_and(|t| t < issued);
        let (mut stable, rest) = self.volatile.drain(..).partition::<Vec<_>, _>(covered);
        self.volatile = rest;
        stable.sort_by_key(|v| v.completed);
        for write in &stable {
            self.harden(write);
        }
    }

    fn flush_failed(&mut self, op: u64, how: FlushFailure) {
        let issued = self.flushes.remove(&op).unwrap_or(0);
        if how != FlushFailure::Retry {
            let covered = |v: &&mut Volatile| v.completed.is_some_and(|t| t < issued);
            self.volatile.iter_mut().filter(covered).for_each(|v| v.lost = true);
        }
    }

    /// A completed write is stable now: what was completed before it in the same place cannot come back.
    fn harden(&mut self, write: &Volatile) {
        if !write.live.contains(&true) {
            return;
        }
        let (offset, len) = write.change.range();
        self.harden_lengths_before(write);
        for other in &mut self.volatile {
            let (start, other_len) = other.change.range();
            let apart = start >= offset + len || offset >= start + other_len;
            if apart || other.completed.is_none_or(|t| Some(t) > write.completed) {
                continue;
            }
            for n in 0..other.live.len() {
                let (start, end) = other.change.piece(n);
                other.live[n] &= start < offset || end > offset + len;
            }
        }
        for (piece, _) in write.live.iter().enumerate().filter(|(_, live)| **live) {
            write.change.apply_piece(&mut self.durable, piece);
        }
    }

    /// A length past which a stable write lies was in the journal before it.
    fn harden_lengths_before(&mut self, write: &Volatile) {
        let before = |v: &Volatile| {
            let earlier = v.completed.is_some_and(|t| Some(t) < write.completed);
            earlier
                && v.live[0]
                && matches!(v.change, Change::Length(len) if len < write.change.end())
        };
        while let Some(at) = self.volatile.iter().position(before) {
            let length = self.volatile.remove(at);
            self.harden(&length);
        }
    }

    fn candidates(&self, crash: Crash) -> impl Iterator<Item = &Volatile> {
        self.volatile.iter().filter(move |v| crash == Crash::Power || v.completed.is_none())
    }

    fn crashed(&self, crash: Crash, choice: &mut Choice) -> Pages {
        let mut image = match crash {
            Crash::Power => self.durable.clone(),
            Crash::Kill => self.current.clone(),
        };
        let mut writes: Vec<&Volatile> = self.candidates(crash).collect();
        writes.sort_by_key(|v| v.completed.unwrap_or(Time::MAX));
        // The cache may write back in any order; of two writes to one sector either may be what is left.
        choice.order(&mut writes);
        for write in writes {
            let all = choice.write();
            for (piece, _) in write.live.iter().enumerate().filter(|(_, live)| **live) {
                if all.unwrap_or_else(|| choice.rng.chance(1, 2)) {
                    write.change.apply_piece(&mut image, piece);
                }
            }
            let alive = write.live.contains(&true);
            if all.is_none() && choice.rng.chance(1, 8) && alive {
                // The new length has reached the medium before the data.
                image.set_len(image.len().max(write.change.end()));
            }
        }
        image
    }
}

/// Which writes survive, decided one after the other.
struct Choice {
    survivors: Survivors,
    seen: usize,
    rng: Rng,
    /// In 16ths: how many writes survive whole, and how many tear.
    whole: u64,
    torn: u64,
}

impl Choice {
    fn new(survivors: Survivors) -> Choice {
        let mut rng = Rng::new(if let Survivors::Random(seed) = survivors { seed } else { 0 });
        let (whole, torn) = (rng.below(17), [0, 1, 4, 16][rng.index(4)]);
        Choice { survivors, seen: 0, rng, whole, torn }
    }

    fn order(&mut self, writes: &mut [&Volatile]) {
        if matches!(self.survivors, Survivors::Random(_)) && self.rng.chance(1, 2) {
            for i in (1..writes.len()).rev() {
                let j = self.rng.index(i + 1);
                writes.swap(i, j);
            }
        }
    }

    /// Whether the next write survives; `None`: in part.
    fn write(&mut self) -> Option<bool> {
        let n = self.seen;
        self.seen += 1;
        match self.survivors {
            Survivors::None => Some(false),
            Survivors::All => Some(true),
            Survivors::Only(only) => Some(n == only),
            Survivors::AllBut(but) => Some(n != but),
            Survivors::Random(_) if self.rng.chance(self.torn, 16) => None,
            Survivors::Random(_) => Some(self.rng.chance(self.whole, 16)),
        }
    }
}
