//! Tests of the packed part: a device that is killed after each of its stores, in the region and in the ring, recoveries
//! that are killed, hostile memory. A request is its place in the driver's order.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::mem::Region;
use crate::virtio::chain::Chain;
use crate::virtio::inflight::part_len;
use crate::virtio::inflight::tests::{Hook, killed_here, memory, with_hook};
use crate::virtio::ring::tests::{DESC as RING, Guest, TABLES, TOUCH};

/// Entries of the ring in these tests.
const SIZE: u16 = 7;
const PART: usize = 256;
const NEXT_FLAG: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const ENTRY: usize = 16;
const RING_LEN: usize = ENTRY * SIZE as usize;

/// The place `n` entries after the very first one.
fn position(n: usize) -> Position {
    let size = usize::from(SIZE);
    Position { at: (n % size) as u16, wrap: (n / size).is_multiple_of(2) }
}

fn base(n: usize) -> u32 {
    let bits = u32::from(position(n).bits());
    bits << 16 | bits
}

/// A guest in whose memory each buffer id has an indirect table of one descriptor.
fn guest() -> Guest {
    let guest = Guest::new();
    for id in 0..u64::from(SIZE) {
        let mut table = [0; ENTRY];
        table[..8].copy_from_slice(&TOUCH.to_le_bytes());
        (table[8], table[14]) = (8, WRITE as u8);
        guest.mem.write_slice(&table, GuestAddress(TABLES + 16 * id)).unwrap();
    }
    guest
}

/// A chain as the driver made it.
#[derive(Clone)]
struct Request {
    id: u16,
    descs: Vec<Desc>,
}

impl Request {
    fn len(&self) -> usize {
        self.descs.len()
    }
}

/// What outlives the process.
struct World {
    guest: Guest,
    region: File,
    /// Entries before the first request.
    start: usize,
    /// All requests ever made available.
    avail: Vec<Request>,
    /// All that the driver has seen used, in order.
    used: Vec<usize>,
    /// How many the device of now, or one before it, may have begun.
    begun: usize,
}

fn part(file: &File) -> View {
    let region = Region::map(file, 0, 0, PART as u64, 0).unwrap();
    View::new(Arc::new(region), 0, SIZE, true).unwrap()
}

fn ring(guest: &Guest, base: u32) -> Packed {
    Packed::new(Arc::clone(&guest.map), Guest::addrs(), SIZE, base, super::super::feature(28))
        .unwrap()
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; PART];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn ring_bytes(guest: &Guest) -> Vec<u8> {
    let mut bytes = vec![0; RING_LEN];
    guest.mem.read_slice(&mut bytes, GuestAddress(RING)).unwrap();
    bytes
}

fn put_ring(guest: &Guest, bytes: &[u8]) {
    guest.mem.write_slice(bytes, GuestAddress(RING)).unwrap();
}

/// The buffer id of the used descriptor at `at`, if the device has made one.
fn used_at(ring: &[u8], at: Position) -> Option<u16> {
    let d = &ring[ENTRY * usize::from(at.at)..][..ENTRY];
    let want = if at.wrap { AVAIL | USED } else { 0 };
    let flags = u16::from_le_bytes([d[14], d[15]]);
    (flags & (AVAIL | USED) == want).then(|| u16::from_le_bytes([d[12], d[13]]))
}

impl World {
    fn new(start: usize) -> World {
        let guest = guest();
        // Everything before was used.
        let mut bytes = vec![0; RING_LEN];
        for n in start.saturating_sub(SIZE.into())..start {
            let at = position(n);
            let flags = if at.wrap { AVAIL | USED } else { 0 };
            bytes[ENTRY * usize::from(at.at) + 14..][..2].copy_from_slice(&flags.to_le_bytes());
        }
        put_ring(&guest, &bytes);
        let region = memory(&[0; PART]);
        World { guest, region, start, avail: Vec::new(), used: Vec::new(), begun: 0 }
    }

    fn made(&self) -> usize {
        self.start + self.avail.iter().map(Request::len).sum::<usize>()
    }

    fn seen(&self, used: &[usize]) -> usize {
        self.start + used.iter().map(|r| self.avail[*r].len()).sum::<usize>()
    }

    /// The request that a buffer id in flight stands for.
    fn request(&self, id: u16) -> usize {
        self.avail.iter().rposition(|r| r.id == id).expect("an id of the driver's")
    }

    /// The driver makes a chain of `len` entries available, if there is room.
    fn offer(&mut self, len: usize, which: usize, indirect: bool) {
        let len = if indirect { 1 } else { len };
        let free = usize::from(SIZE) - (self.made() - self.seen(&self.used));
        if len > free {
            return;
        }
        let busy: BTreeSet<u16> = (0..self.avail.len())
            .filter(|r| !self.used.contains(r))
            .map(|r| self.avail[r].id)
            .collect();
        let ids: Vec<u16> = (0..SIZE).filter(|id| !busy.contains(id)).collect();
        let id = ids[which % ids.len()];
        let mut bytes = ring_bytes(&self.guest);
        let made = self.made();
        let mut descs = Vec::new();
        for i in 0..len {
            let at = position(made + i);
            let mark = if at.wrap { AVAIL } else { USED };
            let more = if i + 1 < len { NEXT_FLAG } else { 0 };
            let n = made + i;
            let (addr, len, kind) = if indirect {
                (TABLES + 16 * u64::from(id), 16, INDIRECT)
            } else {
                (TOUCH + 8 * n as u64, 1 + n as u32 % 8, WRITE)
            };
            let link = if more == 0 { id } else { 0xdead };
            let d = Desc { addr, len, flags: mark | more | kind, link };
            let place = &mut bytes[ENTRY * usize::from(at.at)..][..ENTRY];
            place[..8].copy_from_slice(&d.addr.to_le_bytes());
            place[8..12].copy_from_slice(&d.len.to_le_bytes());
            place[12..14].copy_from_slice(&d.link.to_le_bytes());
            place[14..].copy_from_slice(&d.flags.to_le_bytes());
            descs.push(d);
        }
        put_ring(&self.guest, &bytes);
        self.avail.push(Request { id, descs });
    }

    /// What the driver sees used in `ring`, with what it has seen before.
    fn look(&self, ring: &[u8]) -> Vec<usize> {
        let mut used = self.used.clone();
        let begun: usize = self.avail[..self.begun].iter().map(Request::len).sum();
        while self.seen(&used) < self.start + begun {
            let Some(id) = used_at(ring, position(self.seen(&used))) else { break };
            let request = self.request(id);
            assert!(!used.contains(&request), "request {request} is done twice: {used:?}");
            used.push(request);
        }
        used
    }

    /// What a successor makes of `region` and `ring`: it resubmits what is in flight, in order, and as it ends these the
    /// driver sees each, and nothing else. Fails if one is lost or would be done twice.
    fn check(&self, scratch: &Guest, region: &[u8], ring_was: &[u8]) {
        let file = memory(region);
        put_ring(scratch, ring_was);
        let done = self.look(ring_was);
        let mut ring = ring(scratch, base(self.start));
        let mut tracker = Tracker::start(part(&file), &mut ring).unwrap();
        assert_eq!(ring.next_used(), position(self.seen(&done)), "where used ones go on");
        if !tracker.recovered {
            assert_eq!((self.begun, done.len()), (0, 0), "all was forgotten");
            return;
        }
        let (mut again, mut chain) = (Vec::new(), Chain::default());
        while let Some(id) = tracker.resubmit(&mut ring) {
            let request = self.request(id);
            assert_eq!(ring.taken(), self.avail[request].descs, "request {request}");
            ring.read_chain(&mut chain).unwrap();
            assert!(chain.bad.is_none());
            again.push(request);
        }
        assert!(again.is_sorted_by(|a, b| a < b), "in the order of the guest: {again:?}");
        let covered: BTreeSet<usize> = done.iter().chain(&again).copied().collect();
        let taken = covered.len();
        assert_eq!(done.len() + again.len(), taken, "done {done:?}, and again {again:?}");
        assert_eq!(covered, (0..taken).collect(), "lost");
        let next = self.seen(&(0..taken).collect::<Vec<_>>());
        assert_eq!(ring.base() & 0xffff, u32::from(position(next).bits()), "where it goes on");
        let bytes = contents(&file);
        let marked = (0..SIZE).filter(|e| bytes[at(*e, INFLIGHT)] != 0).count();
        assert_eq!(marked, again.len(), "an entry may be another chain's, and no head, soon");
        self.end_all(scratch, (&mut ring, &mut tracker), done, &again);
    }

    fn end_all(
        &self,
        scratch: &Guest,
        (ring, tracker): (&mut Packed, &mut Tracker),
        mut done: Vec<usize>,
        again: &[usize],
    ) {
        // The youngest first, so that they take one another's places.
        for request in again.iter().rev() {
            let at = position(self.seen(&done));
            assert_eq!(used_at(&ring_bytes(scratch), at), None, "seen before it is done");
            tracker.done(self.avail[*request].id);
            ring.push_used(self.avail[*request].id, 1);
            tracker.publish(|| ring.publish());
            assert_eq!(used_at(&ring_bytes(scratch), at), Some(self.avail[*request].id));
            done.push(*request);
        }
        let bytes = ring_bytes(scratch);
        if self.seen(&done) < self.made() {
            assert_eq!(used_at(&bytes, position(self.seen(&done))), None, "seen, never done");
        }
        assert!(ring.is_even());
    }
}

/// Checks the state of now, as left by a device killed now, and by each successor killed while it recovers.
fn check_now(world: &RefCell<World>, scratch: &[Guest; 2]) {
    let world = world.borrow();
    let (region, bytes) = (contents(&world.region), ring_bytes(&world.guest));
    world.check(&scratch[0], &region, &bytes);
    let file = Rc::new(memory(&region));
    put_ring(&scratch[1], &bytes);
    let states = RefCell::new(Vec::new());
    let states = Rc::new(states);
    let (from, into) = (Rc::clone(&file), Rc::clone(&states));
    let guest = scratch[1].mem.clone();
    let record: Hook = Rc::new(move || {
        let mut bytes = vec![0; RING_LEN];
        guest.read_slice(&mut bytes, GuestAddress(RING)).unwrap();
        into.borrow_mut().push((contents(&from), bytes));
    });
    with_hook(record, || {
        let mut ring = ring(&scratch[1], base(world.start));
        Tracker::start(part(&file), &mut ring).unwrap();
    });
    for (region, bytes) in states.borrow().iter() {
        world.check(&scratch[0], region, bytes);
    }
}

/// The device; now and then it dies and has a successor.
struct Device {
    world: Rc<RefCell<World>>,
    ring: Packed,
    tracker: Tracker,
    /// Requests in flight.
    busy: Vec<usize>,
}

impl Device {
    fn new(world: &Rc<RefCell<World>>) -> Device {
        let (region, mut ring) = {
            let w = world.borrow();
            (w.region.try_clone().unwrap(), ring(&w.guest, base(w.start)))
        };
        let mut tracker = Tracker::start(part(&region), &mut ring).unwrap();
        let mut busy = Vec::new();
        while let Some(id) = tracker.resubmit(&mut ring) {
            busy.push(world.borrow().request(id));
        }
        let mut w = world.borrow_mut();
        let done = w.look(&ring_bytes(&w.guest)).len();
        w.begun = done + busy.len();
        drop(w);
        Device { world: Rc::clone(world), ring, tracker, busy }
    }

    fn take(&mut self) {
        let Some(id) = self.ring.pop().unwrap() else { return };
        let n = self.world.borrow().begun;
        // From here on it may be in flight, but need not.
        self.world.borrow_mut().begun += 1;
        self.tracker.taken(id, self.ring.taken());
        self.busy.push(n);
    }

    fn end(&mut self, which: usize) {
        if !self.busy.is_empty() {
            let request = self.busy.remove(which % self.busy.len());
            let id = self.world.borrow().avail[request].id;
            self.tracker.done(id);
            self.ring.push_used(id, which as u32 % 2);
        }
    }

    fn publish(&mut self) {
        killed_here();
        self.tracker.publish(|| self.ring.publish());
    }
}

fn run(start: usize, steps: &[(u8, usize)]) {
    assert_eq!(part_len(SIZE, true), PART as u64);
    let world = Rc::new(RefCell::new(World::new(start)));
    let seen = Rc::clone(&world);
    let scratch = [guest(), guest()];
    with_hook(Rc::new(move || check_now(&seen, &scratch)), || {
        let mut device = Device::new(&world);
        for (what, which) in steps {
            match what {
                0..5 => world.borrow_mut().offer(1 + which % 4, *which, which % 5 == 0),
                5..9 => device.take(),
                9..13 => device.end(*which),
                13..15 => device.publish(),
                15..17 => {
                    let mut w = world.borrow_mut();
                    let used = w.look(&ring_bytes(&w.guest));
                    w.used = used;
                }
                _ => device = Device::new(&world),
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn killed_after_any_store_nothing_is_lost_or_done_twice(
        start in 0usize..30,
        steps in proptest::collection::vec((0u8..18, 0usize..64), 1..120),
    ) {
        run(start, &steps);
    }

    /// Bytes that are nearly a region, and any: refused or taken, never believed.
    #[test]
    fn hostile_memory(
        noise in proptest::collection::vec(any::<u8>(), PART),
        near in proptest::collection::vec((0usize..PART, any::<u8>()), 0..4),
        taken in proptest::collection::vec(1usize..4, 0..4),
        sane in 0u8..4,
        ids: u16,
    ) {
        let mut world = World::new(0);
        let mut bytes = noise;
        if sane > 0 {
            let world = Rc::new(RefCell::new(World::new(0)));
            let mut device = Device::new(&world);
            for len in &taken {
                world.borrow_mut().offer(*len, 0, false);
                device.take();
            }
            bytes = contents(&world.borrow().region);
            for (at, value) in &near {
                bytes[*at] = if sane > 1 { value % (SIZE + 1) as u8 } else { *value };
            }
        }
        bytes[VERSION_AT] = 1;
        bytes[VERSION_AT + 1] = 0;
        world.region = memory(&bytes);
        let mut ring = ring(&world.guest, base(0));
        if let Ok(mut tracker) = Tracker::start(part(&world.region), &mut ring) {
            let mut again = BTreeSet::new();
            let mut chain = Chain::default();
            while let Some(id) = tracker.resubmit(&mut ring) {
                prop_assert!(id < SIZE && again.insert(id));
                // Wherever it leads, it is in guest memory.
                let _ = ring.read_chain(&mut chain);
            }
            if ids % 2 == 0 {
                for id in again {
                    tracker.done(id);
                    ring.push_used(id, 1);
                }
                tracker.publish(|| ring.publish());
                prop_assert!(ring.is_even());
                let d = Desc { addr: 0, len: 0, flags: 0, link: 3 };
                tracker.taken(3, &[d; SIZE as usize]);
            }
        }
    }
}

/// The document's layout, byte by byte.
#[test]
fn the_layout_is_the_documents() {
    assert_eq!((part_len(8, true), part_len(128, true), part_len(1, true)), (320, 4160, 64));
    let world = Rc::new(RefCell::new(World::new(5)));
    let mut device = Device::new(&world);
    for len in [2, 1, 3] {
        world.borrow_mut().offer(len, 6, false);
        device.take();
    }
    device.end(1);
    device.publish();
    let mut expected = vec![0; PART];
    let mut put = |at: usize, value: u16| {
        expected[at..at + 2].copy_from_slice(&value.to_le_bytes());
    };
    put(8, 1);
    put(10, SIZE);
    // The entry of the second, then the one that had never been used.
    put(12, 2);
    put(14, 2);
    // From 5 on, one of one entry.
    put(16, 6);
    put(18, 6);
    put(20, 0x0101);
    let w = world.borrow();
    let descs: Vec<Desc> = w.avail.iter().flat_map(|r| r.descs.clone()).collect();
    let links = [1, 2, 6, 4, 5, 6, 7];
    for (i, link) in (0..7).zip(links) {
        put(32 + 32 * i + 2, link);
    }
    for (i, d) in (0..).zip(&descs) {
        let at = 32 + 32 * i;
        put(at + 16, d.link);
        put(at + 18, d.flags);
        put(at + 20, d.len as u16);
        put(at + 24, d.addr as u16);
        put(at + 26, (d.addr >> 16) as u16);
    }
    for (head, last, num, counter, busy) in [(0, 1, 2, 0, 1), (2, 2, 1, 1, 0), (3, 5, 3, 2, 1)] {
        let at = 32 + 32 * head;
        put(at, busy);
        put(at + 4, last);
        put(at + 6, num);
        put(at + 8, counter);
    }
    assert_eq!(contents(&w.region), expected);
}

#[test]
fn states_that_no_back_end_leaves() {
    let with = |edit: &dyn Fn(&mut [u8])| {
        let world = Rc::new(RefCell::new(World::new(0)));
        let mut device = Device::new(&world);
        for len in [2, 1] {
            world.borrow_mut().offer(len, 0, false);
            device.take();
        }
        let mut bytes = contents(&world.borrow().region);
        edit(&mut bytes);
        let guest = Guest::new();
        let file = memory(&bytes);
        Tracker::start(part(&file), &mut ring(&guest, base(0))).map(|t| t.waiting())
    };
    let entry = |i: usize, field: usize| 32 + 32 * i + field;
    assert_eq!(with(&|_| ()), Ok(2));
    let refused = |why: &str, edit: &dyn Fn(&mut [u8])| assert_eq!(with(edit), Err(why));
    refused("its version is not known", &|b| b[8] = 2);
    refused("it is of a ring of another size", &|b| b[10] = 8);
    refused("a used position that the ring has not", &|b| b[16] = 7);
    refused("a used position that the ring has not", &|b| b[21] = 2);
    refused("a loop in its free list", &|b| b[entry(6, 2)] = 3);
    refused("entries that are neither free nor in flight", &|b| b[entry(5, 2)] = 9);
    refused("entries that are neither free nor in flight", &|b| b[entry(2, 0)] = 0);
    refused("a chain that is not one", &|b| b[entry(0, 2)] = 200);
    refused("a chain that is not one", &|b| b[entry(0, 2)] = 3);
    refused("a chain that is not one", &|b| b[entry(0, 6)] = 4);
    refused("a chain of no descriptors", &|b| b[entry(0, 6)] = 0);
    refused("two chains of one buffer id", &|b| b[entry(2, 16)] = b[entry(1, 16)]);
    refused("a buffer id that is not below the ring's size", &|b| b[entry(2, 16)] = 7);
}

/// A fresh part cannot say what was taken before the base that the ring has.
#[test]
fn a_base_with_requests_in_flight_needs_a_region_that_knows_them() {
    let guest = Guest::new();
    let mut ring = ring(&guest, 0x8000_8001);
    assert!(Tracker::start(part(&memory(&[0; PART])), &mut ring).is_err());
}
