//! Random guests: several virtual queues that read, write, zero, discard and flush, in places where they meet.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::model::{Change, Model, Tag, Violation, fill};
use super::{Rng, SIM_DISK, Sim};
use crate::block::node::SECTOR;
use crate::block::{Dir, Node, Op, WriteFlags, ZeroFlags};
use crate::error::Errno;
use crate::mem::Sg;
use crate::rt::grace::{self, Domain};
use crate::rt::{self, Buffer};

/// How often each operation is chosen, as weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Reads.
    pub read: u64,
    /// Writes.
    pub write: u64,
    /// Writes with FUA.
    pub write_fua: u64,
    /// Write-zeroes, half of them allowed to unmap.
    pub zeroes: u64,
    /// Discards.
    pub discard: u64,
    /// Flushes.
    pub flush: u64,
}

impl Default for Mix {
    fn default() -> Self {
        Mix { read: 20, write: 50, write_fua: 2, zeroes: 8, discard: 8, flush: 12 }
    }
}

/// What the guests do.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Virtual queues.
    pub queues: usize,
    /// Requests in flight on each of them, at most.
    pub depth: usize,
    /// Operations, all queues together.
    pub operations: usize,
    /// The length of the guest's disk that is used, in sectors: operations stay below.
    pub sectors: u64,
    /// The unit that the driver thinks in (a cluster), in sectors; a third of all operations are whole ones.
    pub cluster: u64,
    /// The longest operation in sectors.
    pub longest: u64,
    /// Places where most operations happen.
    pub hot_spots: usize,
    /// How often each operation is chosen.
    pub mix: Mix,
    /// Whether a discarded range must read as zeroes wherever whole clusters of it were discarded.
    pub discard_zeroes: bool,
    /// In 16ths: how many reads and writes take the fast lane of an export's worker, where there is one.
    pub fast: u64,
    /// Whether changes may fail because the disk is full (flushes may not).
    pub full: bool,
}

impl Default for Workload {
    /// Four queues of four, 150 operations on 1 MiB of clusters of 16 KiB.
    fn default() -> Self {
        Workload {
            queues: 4,
            depth: 4,
            operations: 150,
            sectors: 2048,
            cluster: 32,
            longest: 100,
            hot_spots: 3,
            mix: Mix::default(),
            discard_zeroes: false,
            fast: 0,
            full: false,
        }
    }
}

/// One operation to do.
#[derive(Clone, Copy, Debug)]
enum Step {
    Read(u64, u64),
    Write(u64, u64, bool),
    Zeroes(u64, u64, bool),
    Discard(u64, u64),
    Flush,
}

impl Workload {
    fn spots(&self, rng: &mut Rng) -> Vec<u64> {
        (0..self.hot_spots.max(1)).map(|_| rng.below(self.sectors)).collect()
    }

    fn range(&self, rng: &mut Rng, spots: &[u64]) -> (u64, u64) {
        let near = 2 * self.cluster;
        let start = match rng.below(10) {
            0..3 => rng.below(self.sectors),
            _ => (spots[rng.index(spots.len())] + rng.below(2 * near)).saturating_sub(near),
        };
        let (start, len) = match rng.below(6) {
            0 | 1 => {
                let most = (self.longest / self.cluster).max(1);
                (start - start % self.cluster, self.cluster * (1 + rng.below(most)))
            }
            2 | 3 => (start, 1 + rng.below(8)),
            4 => (start - start % 8, 8 * (1 + rng.below(4))),
            _ => (start, 1 + rng.below(self.longest)),
        };
        let start = start.min(self.sectors - 1);
        (start, len.min(self.sectors - start))
    }

    fn step(&self, rng: &mut Rng, spots: &[u64]) -> Step {
        let (start, len) = self.range(rng, spots);
        let Mix { read, write, write_fua, zeroes, discard, flush } = self.mix;
        let mut n = rng.below(read + write + write_fua + zeroes + discard + flush);
        let mut is = |weight| {
            let hit = n < weight;
            n = n.wrapping_sub(weight);
            hit
        };
        match () {
            () if is(read) => Step::Read(start, len),
            () if is(write) => Step::Write(start, len, false),
            () if is(write_fua) => Step::Write(start, len, true),
            () if is(zeroes) => Step::Zeroes(start, len, rng.chance(1, 2)),
            () if is(discard) => Step::Discard(start, len),
            () => Step::Flush,
        }
    }
}

/// A guest at work on one node: what its queues share.
pub(super) struct Guest {
    pub(super) node: Arc<Node>,
    /// Where requests of the fast lane enter.
    grace: Arc<Domain>,
    pub(super) sim: Rc<Sim>,
    pub(super) model: Rc<RefCell<Model>>,
    workload: Workload,
    /// Whether operations may fail.
    faults: bool,
    rng: RefCell<Rng>,
    spots: Vec<u64>,
    left: Cell<usize>,
    failed: RefCell<Option<Violation>>,
}

impl Guest {
    pub(super) fn new(
        (node, grace): (Arc<Node>, Arc<Domain>),
        sim: Rc<Sim>,
        model: Rc<RefCell<Model>>,
        workload: Workload,
        faults: bool,
        mut rng: Rng,
    ) -> Guest {
        let spots = workload.spots(&mut rng);
        let left = Cell::new(workload.operations);
        let (rng, failed) = (RefCell::new(rng), RefCell::new(None));
        Guest { node, grace, sim, model, workload, faults, rng, spots, left, failed }
    }

    /// All queues at work until the operations are done, or the first violation.
    pub(super) async fn run(self) -> Result<(), Violation> {
        let me = Rc::new(self);
        let at_work = Rc::new(Cell::new(me.workload.queues * me.workload.depth));
        let waiting: Rc<RefCell<Option<std::task::Waker>>> = Rc::default();
        for _ in 0..at_work.get() {
            let (me, at_work, waiting) = (me.clone(), at_work.clone(), waiting.clone());
            rt::current().spawn(async move {
                me.lane().await;
                at_work.set(at_work.get() - 1);
                waiting.take().into_iter().for_each(std::task::Waker::wake);
            });
        }
        std::future::poll_fn(|cx| {
            if at_work.get() == 0 {
                return std::task::Poll::Ready(());
            }
            waiting.replace(Some(cx.waker().clone()));
            std::task::Poll::Pending
        })
        .await;
        me.failed.take().map_or(Ok(()), Err)
    }

    /// One place of a queue: one operation after the other.
    async fn lane(&self) {
        while self.left.get() > 0 && self.failed.borrow().is_none() {
            self.left.set(self.left.get() - 1);
            let step = self.workload.step(&mut self.rng.borrow_mut(), &self.spots);
            if let Err(violation) = self.perform(step).await {
                self.failed.borrow_mut().get_or_insert(violation);
            }
        }
    }

    async fn perform(&self, step: Step) -> Result<(), Violation> {
        let result = match step {
            Step::Read(start, len) => self.read(start, len).await?,
            Step::Write(start, len, fua) => self.write(start, len, fua).await,
            Step::Zeroes(start, len, unmap) => {
                let flags = if unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
                let op = Op::WriteZeroes { offset: start * SECTOR, len: len * SECTOR, flags };
                let begun = self.begin(Change::Zeroes, start, len, false);
                self.change(begun.0, op).await
            }
            Step::Discard(start, len) => self.discard(start, len).await,
            Step::Flush => {
                let number = self.model.borrow_mut().begin_flush(self.sim.tick());
                let result = self.node.submit(Op::Flush).await;
                self.model.borrow_mut().end_flush(number, result.is_ok(), self.sim.tick());
                result
            }
        };
        match result {
            Err(Errno::ENOSPC) if self.workload.full && !matches!(step, Step::Flush) => Ok(()),
            Err(errno) if !self.faults => Err(Violation(format!("{step:?} failed: {errno}"))),
            _ => Ok(()),
        }
    }

    fn begin(&self, change: Change, start: u64, len: u64, fua: bool) -> (usize, Tag) {
        let now = self.sim.tick();
        self.model.borrow_mut().begin(change, start..start + len, fua, now)
    }

    async fn change(&self, number: usize, op: Op<'_>) -> Result<(), Errno> {
        let result = self.node.submit(op).await;
        self.model.borrow_mut().end(number, result.is_ok(), self.sim.tick());
        result
    }

    async fn write(&self, start: u64, len: u64, fua: bool) -> Result<(), Errno> {
        let (number, tag) = self.begin(Change::Write, start, len, fua);
        let mut buffer = Buffer::new(bytes(len), 4096);
        fill(tag, start, buffer.bytes_mut());
        let cut = self.rng.borrow_mut().index(buffer.len());
        let whole = buffer.iovec();
        let iov = [whole.part(0, cut), whole.part(cut, whole.len() - cut)];
        let from = if cut == 0 { &iov[1..] } else { &iov[..] };
        let flags = if fua { WriteFlags::FUA } else { WriteFlags::empty() };
        let op = Op::Write { offset: start * SECTOR, from: Sg::new(from), flags };
        match self.fast(op).await {
            Some(Ok(())) => {
                self.model.borrow_mut().end(number, true, self.sim.tick());
                Ok(())
            }
            _ => self.change(number, op).await,
        }
    }

    /// A read or write in the fast lane of an export's worker, now and then: straight to the disk that has the bytes, with
    /// the place held until it is done. `None`: not this one. What fails is done again in the slow lane.
    async fn fast(&self, op: Op<'_>) -> Option<Result<(), Errno>> {
        if self.workload.fast == 0 || !self.rng.borrow_mut().chance(self.workload.fast, 16) {
            return None;
        }
        let (dir, offset, len, stable) = match op {
            Op::Read { offset, to } => (Dir::Read, offset, to.len(), false),
            Op::Write { offset, from, flags } => {
                (Dir::Write, offset, from.len(), flags.contains(WriteFlags::FUA))
            }
            _ => return None,
        };
        let _pin = grace::enter(&self.grace);
        let (leaf, at, unstable) = self.node.locate_leaf(dir, offset, len as u64, &SIM_DISK)?;
        let align = u64::from(leaf.driver().limits().request_align);
        if stable && unstable || !at.is_multiple_of(align) || !(len as u64).is_multiple_of(align) {
            return None;
        }
        let op = match op {
            Op::Read { to, .. } => Op::Read { offset: at, to },
            Op::Write { from, flags, .. } => Op::Write { offset: at, from, flags },
            op => op,
        };
        Some(leaf.driver().submit(op).await)
    }

    /// A discard; where the driver promises zeroes the model has them as such.
    async fn discard(&self, start: u64, len: u64) -> Result<(), Errno> {
        let op = Op::Discard { offset: start * SECTOR, len: len * SECTOR };
        let cluster = self.workload.cluster;
        let (first, last) = (start.next_multiple_of(cluster), (start + len) / cluster * cluster);
        if !self.workload.discard_zeroes || first >= last {
            let number = self.begin(Change::Discard, start, len, false).0;
            return self.change(number, op).await;
        }
        let ends = [start..first, last..start + len];
        let mut numbers: Vec<usize> = ends
            .into_iter()
            .map(|r| self.begin(Change::Discard, r.start, r.end - r.start, false).0)
            .collect();
        numbers.push(self.begin(Change::Zeroes, first, last - first, false).0);
        let result = self.node.submit(op).await;
        let now = self.sim.tick();
        let mut model = self.model.borrow_mut();
        numbers.into_iter().for_each(|number| model.end(number, result.is_ok(), now));
        result
    }

    /// The outer error is a content that is not legal, the inner one an error of the disk.
    async fn read(&self, start: u64, len: u64) -> Result<Result<(), Errno>, Violation> {
        let issued = self.sim.tick();
        let buffer = Buffer::new(bytes(len), 4096);
        let iov = [buffer.iovec()];
        let op = Op::Read { offset: start * SECTOR, to: Sg::new(&iov) };
        let result = match self.fast(op).await {
            Some(Ok(())) => Ok(()),
            _ => self.node.submit(op).await,
        };
        if result.is_err() {
            return Ok(result);
        }
        let model = self.model.borrow();
        model.check_read(start, buffer.bytes(), issued, self.sim.tick()).map(Ok)
    }
}

fn bytes(sectors: u64) -> usize {
    usize::try_from(sectors * SECTOR).expect("an operation fits into memory")
}

/// Reads sectors of `node`.
pub(super) async fn read(node: &Node, start: u64, len: u64) -> (Buffer, Result<(), Errno>) {
    let buffer = Buffer::new(bytes(len), 4096);
    let iov = [buffer.iovec()];
    let result = node.submit(Op::Read { offset: start * SECTOR, to: Sg::new(&iov) }).await;
    (buffer, result)
}
