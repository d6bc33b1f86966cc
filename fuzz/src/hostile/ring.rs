//! A ring of either kind, its chains, the parser of requests, the tracking of requests in flight: what `export::queue`
//! does with them, without a disk.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use vhost_user_blk::export::request::{Action, Disk, Slot};
use vhost_user_blk::mem::{GuestMap, IoVec, Sg};
use vhost_user_blk::virtio::blk::{SECTOR, Status};
use vhost_user_blk::virtio::inflight::{View, part_len};
use vhost_user_blk::virtio::queue::{RingAddrs, Virtqueue, first_base};
use vhost_user_blk::virtio::ring::{Broken, CHAIN_MAX};
use vhost_user_blk::virtio::track::Tracking;

use super::driver::{AVAIL_RING, Driver, TABLE, USED_RING, poke};
use super::entropy::Entropy;
use super::memory::{EDGES, Memory, user};

const INDIRECT_DESC: u64 = 1 << 28;
const EVENT_IDX: u64 = 1 << 29;
const NOTIFY_ON_EMPTY: u64 = 1 << 24;
const PACKED: u64 = 1 << 34;

const SECTORS: u64 = 256;
/// The most steps of a run.
const STEPS: usize = 120;
/// A range of a chain may lie in two regions; none in more.
const PIECES: usize = 2;

/// One run.
pub fn run(data: &[u8]) {
    thread_local! {
        static MEMORY: RefCell<Memory> = RefCell::new(Memory::new(c"ring"));
    }
    MEMORY.with_borrow_mut(|memory| {
        memory.reset();
        if let Some(mut run) = Run::new(Entropy(data), memory) {
            run.go();
        }
    });
}

struct Run<'a> {
    e: Entropy<'a>,
    memory: &'a mut Memory,
    driver: Driver,
    addrs: RingAddrs,
    features: u64,
    /// How many regions the map has.
    regions: usize,
    ring: Virtqueue,
    tracker: Option<Tracking>,
    broken: bool,
    slots: Vec<Slot>,
    taken: Vec<(u16, Action)>,
}

impl<'a> Run<'a> {
    fn new(mut e: Entropy<'a>, memory: &'a mut Memory) -> Option<Run<'a>> {
        let packed = e.one_in(2);
        let sizes = [8, 4, 2, 1, 16, 64, 256, 5, 3, 128, 0, 0x8000, 0xffff];
        let size = e.pick(&sizes);
        let mut features = if packed { PACKED } else { 0 };
        let bits = e.byte();
        for (i, bit) in [INDIRECT_DESC, EVENT_IDX, NOTIFY_ON_EMPTY].into_iter().enumerate() {
            features |= if bits >> i & 1 == 0 { bit } else { 0 };
        }
        let mut addrs =
            RingAddrs { desc: user(TABLE), avail: user(AVAIL_RING), used: user(USED_RING) };
        if e.one_in(16) {
            let part = e.pick(&[0, 1, 2]);
            let at = [&mut addrs.desc, &mut addrs.avail, &mut addrs.used].into_iter().nth(part)?;
            // Somewhere else, perhaps on top of another part or at an edge.
            *at = if e.one_in(2) { user(e.below(0x6200) & !1) } else { e.pick(&EDGES) };
            *at = at.wrapping_sub(e.below(3) * 16);
        }
        let base = if e.one_in(16) { e.word() as u32 } else { first_base(packed) };
        let ring = Virtqueue::new(memory.map(), addrs, size, base, features).ok()?;
        let mut driver = Driver::new(size, packed);
        if packed {
            (driver.at, driver.wrap) = (base as u16 & 0x7fff, base & 0x8000 != 0);
        } else {
            driver.idx = base as u16;
        }
        let slots = (0..size).map(|_| Slot::default()).collect();
        let mut run = Run {
            e,
            memory,
            driver,
            addrs,
            features,
            regions: 3,
            ring,
            tracker: None,
            broken: false,
            slots,
            taken: Vec::new(),
        };
        if run.e.one_in(2) {
            (0..run.e.below(4)).for_each(|_| poke(&mut run.e, run.memory));
            run.start_tracker();
        }
        Some(run)
    }

    fn go(&mut self) {
        for _ in 0..STEPS {
            match self.e.below(10) {
                _ if self.e.0.is_empty() => break,
                0..=2 => self.driver.offer(&mut self.e, self.memory),
                3 => poke(&mut self.e, self.memory),
                4 | 5 => self.take(),
                6 | 7 => self.complete(),
                8 => self.notify(),
                _ => self.restart(),
            }
        }
        self.take();
        while !self.taken.is_empty() {
            self.complete();
        }
    }

    /// Takes what there is, as a worker does.
    fn take(&mut self) {
        let waiting = self.tracker.as_ref().map_or(0, Tracking::waiting);
        let available = match (waiting, self.broken) {
            (0, true) => return,
            (0, false) => self.ring.available(),
            _ => Ok(waiting),
        };
        let Ok(available) = available else { return self.breaks() };
        assert!(available <= self.ring.size(), "{available} chains in {}", self.ring.size());
        for _ in 0..available {
            match self.take_one() {
                Ok(true) => {}
                Ok(false) => break,
                Err(Broken(_)) => return self.breaks(),
            }
            if self.e.one_in(8) {
                poke(&mut self.e, self.memory);
            }
        }
    }

    fn breaks(&mut self) {
        self.broken = true;
        if let Some(tracker) = &mut self.tracker {
            tracker.give_up();
        }
    }

    fn take_one(&mut self) -> Result<bool, Broken> {
        let ring = &mut self.ring;
        let again = self.tracker.as_mut().and_then(|tracker| tracker.resubmit(ring));
        let popped = match again {
            Some(head) => Some(head),
            None => self.ring.pop()?,
        };
        let Some(head) = popped else { return Ok(false) };
        assert!(head < self.ring.size(), "head {head}");
        let slot = &mut self.slots[usize::from(head)];
        if slot.busy {
            return Err(Broken("a descriptor chain that is in use already"));
        }
        let read = self.ring.read_chain(head, &mut slot.chain);
        let bound = PIECES * (usize::from(self.ring.size()) + CHAIN_MAX);
        assert!(slot.chain.iov.len() <= bound, "{} ranges", slot.chain.iov.len());
        assert!(slot.chain.readable <= slot.chain.iov.len());
        let map = Arc::clone(self.ring.map());
        places(self.memory, &map, &slot.chain.iov);
        self.memory.expect_written(&[], "reading a chain");
        read?;
        if self.e.one_in(8) {
            poke(&mut self.e, self.memory);
        }
        let (iov, readable) = (slot.chain.iov.clone(), slot.chain.readable);
        let disk = Disk {
            capacity: SECTORS,
            block: if self.features & EVENT_IDX == 0 { 4096 } else { 512 },
            read_only: false,
            serial: b"fuzz",
        };
        let parsed = slot.parse(&disk);
        // GET_ID is answered there and then.
        let may = places(self.memory, &map, &iov[readable..]);
        self.memory.expect_written(&may, "parsing a request");
        let action = parsed.map_err(Broken)?;
        check(slot, &action, &iov, readable, disk.block);
        slot.busy = true;
        if let (None, Some(tracker)) = (again, &mut self.tracker) {
            tracker.taken(head, &self.ring);
            self.expect_area("taking a head");
        }
        self.taken.push((head, action));
        Ok(true)
    }

    /// Completes some, in any order, and publishes them.
    fn complete(&mut self) {
        if self.taken.is_empty() {
            return;
        }
        let map = Arc::clone(self.ring.map());
        let batch = 1 + self.e.below(self.taken.len().min(4) as u64);
        for _ in 0..batch {
            let at = self.e.below(self.taken.len() as u64) as usize;
            let (head, action) = self.taken.remove(at);
            let slot = &mut self.slots[usize::from(head)];
            let (data, status) = (slot.data(false), slot.status());
            let mut may = places(self.memory, &map, status);
            let answer = match action {
                Action::Finished(status) => status,
                Action::Transfer { write: false, .. } => {
                    may.extend(places(self.memory, &map, data));
                    Sg::new(data).copy_from(&vec![0x5a; Sg::new(data).len()]);
                    Status::Ok
                }
                Action::Transfer { .. } => {
                    let data = Sg::new(slot.data(true));
                    data.copy_to(&mut vec![0; data.len()]);
                    Status::Ok
                }
                Action::Flush | Action::Ranges { .. } => Status::IoErr,
            };
            slot.answer(answer);
            slot.busy = false;
            self.memory.expect_written(&may, "a request");
            let len = slot.used_len;
            if let Some(tracker) = &mut self.tracker {
                tracker.done(head);
                self.expect_area("completing a head");
            }
            let at = self.used_at();
            self.ring.push_used(head, len);
            if let Some(at) = at {
                self.memory.expect_written(std::slice::from_ref(&at), "a used element");
                let (id, told) = (u32::from(head).to_le_bytes(), len.to_le_bytes());
                let want = if self.driver.packed { [told, id] } else { [id, told] };
                let whole = if self.driver.packed { 6 } else { 8 };
                let got = self.memory.get(at.start..at.start + whole);
                assert_eq!(got, &want.concat()[..got.len()], "a used element");
            }
        }
        self.publish();
    }

    fn publish(&mut self) {
        let idx = |run: &Self| run.part(2).map(|used| used.start + 2..used.start + 4);
        let may = if self.driver.packed { self.part(0) } else { idx(self) };
        let (mut may, idle) = (Vec::from_iter(may), self.taken.is_empty());
        match &mut self.tracker {
            Some(tracker) => {
                tracker.publish(&mut self.ring, idle);
                may.push(self.area());
            }
            None => _ = self.ring.publish(idle),
        }
        self.memory.expect_written(&may, "publishing");
        if let Virtqueue::Split(ring) = &self.ring {
            let at = idx(self).expect("a ring that was resolved");
            assert_eq!(self.memory.get(at), ring.used_idx().to_le_bytes());
        }
    }

    fn notify(&mut self) {
        if self.e.one_in(2) {
            self.ring.arm_kick();
        } else {
            self.ring.disarm_kick();
        }
        let may = self.part(2);
        self.memory.expect_written(may.as_slice(), "asking for kicks");
    }

    /// Another map, a stop, or a crash.
    fn restart(&mut self) {
        let kind = self.e.below(3);
        if kind == 0 {
            if self.taken.is_empty() {
                self.regions = 1 + self.e.below(3) as usize;
                let map = self.memory.smaller_map(self.regions);
                self.broken |= self.ring.remap(map).is_err();
            }
            return;
        }
        while kind == 1 && !self.taken.is_empty() {
            self.complete();
        }
        self.taken.clear();
        self.slots.iter_mut().for_each(|slot| *slot = Slot::default());
        let base = if self.e.one_in(8) { self.e.word() as u32 } else { self.ring.base() };
        let (map, size) = (Arc::clone(self.ring.map()), self.ring.size());
        let Ok(ring) = Virtqueue::new(map, self.addrs, size, base, self.features) else { return };
        (self.ring, self.broken) = (ring, false);
        if self.tracker.take().is_some() {
            self.start_tracker();
        }
    }

    fn start_tracker(&mut self) {
        let size = self.ring.size();
        let Some(view) = View::new(self.memory.area(), 0, size, self.driver.packed) else { return };
        if let Ok(tracker) = Tracking::start(view, &mut self.ring) {
            assert!(tracker.waiting() <= size, "more in flight than there are entries");
            self.tracker = Some(tracker);
        }
        // The descriptors of what is to be resubmitted become available again.
        let packed = self.part(0).filter(|_| self.driver.packed);
        let may: Vec<_> = packed.into_iter().chain([self.area()]).collect();
        self.memory.expect_written(&may, "starting to track");
    }

    fn area(&self) -> Range<u64> {
        self.memory.file_of_area(part_len(self.ring.size(), self.driver.packed))
    }

    fn expect_area(&mut self, what: &str) {
        let area = self.area();
        self.memory.expect_written(&[area], what);
    }

    /// The file's bytes of the ring's part.
    fn part(&self, part: usize) -> Option<Range<u64>> {
        let n = u64::from(self.ring.size());
        let RingAddrs { desc, avail, used } = self.addrs;
        let lens = if self.driver.packed { [16 * n, 4, 4] } else { [16 * n, 6 + 2 * n, 6 + 8 * n] };
        self.memory.file_of_user([desc, avail, used][part], lens[part])
    }

    /// Where the next used element goes, if it is known: all of it.
    fn used_at(&self) -> Option<Range<u64>> {
        match &self.ring {
            Virtqueue::Packed(ring) => {
                let at = u64::from(ring.base() >> 16 & 0x7fff);
                let start = self.part(0)?.start + 16 * at + 8;
                Some(start..start + 8)
            }
            Virtqueue::Split(ring) => {
                let at = u64::from(ring.next_used() & (ring.size() - 1));
                let start = self.part(2)?.start + 4 + 8 * at;
                Some(start..start + 8)
            }
        }
    }
}

/// Where ranges lie in the file.
///
/// # Panics
/// If one is not the guest's.
fn places(memory: &Memory, map: &GuestMap, iov: &[IoVec]) -> Vec<Range<u64>> {
    iov.iter().map(|v| memory.file_of(map, v)).collect()
}

/// What was parsed out of `iov` (`readable` of them for reading) stays within it, and within the disk.
fn check(slot: &Slot, action: &Action, iov: &[IoVec], readable: usize, block: u32) {
    let len = |iov: &[IoVec]| iov.iter().map(|v| v.len() as u64).sum::<u64>();
    let last = iov[readable..].last().expect("a status byte");
    let status = slot.status();
    assert_eq!(len(status), 1);
    assert_eq!(status[0].base(), last.base().wrapping_add(last.len() - 1), "the status byte");
    let written = len(&iov[readable..]);
    assert_eq!(u64::from(slot.used_len), written.min(u32::MAX.into()), "the length");
    assert_eq!(len(slot.data(false)), written - 1, "the data to write");
    let fits = |sector: u64, len: u64| {
        len.is_multiple_of(block.into()) && sector <= SECTORS && len <= (SECTORS - sector) * SECTOR
    };
    match action {
        Action::Transfer { write, offset } => {
            assert!(fits(offset / SECTOR, len(slot.data(*write))), "{action:?}");
            assert!(!write || len(slot.data(true)) == len(&iov[..readable]) - 16, "{action:?}");
        }
        Action::Ranges { segments, .. } => {
            assert!(segments.iter().all(|s| fits(s.sector, u64::from(s.sectors) * SECTOR)));
        }
        Action::Flush | Action::Finished(_) => {}
    }
}
