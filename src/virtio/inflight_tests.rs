//! Tests of the region: a device that is killed after each of its stores, recoveries that are killed, hostile memory.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use proptest::prelude::*;

use super::*;

pub(in crate::virtio) type Hook = Rc<dyn Fn()>;

thread_local! {
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

/// Runs what the test wants to happen after each store; not again for the stores that this makes.
pub(in crate::virtio) fn killed_here() {
    let hook = HOOK.with(|h| h.borrow_mut().take());
    if let Some(hook) = hook {
        hook();
        HOOK.with(|h| *h.borrow_mut() = Some(hook));
    }
}

/// Does `f`, and `hook` after each store in it.
pub(in crate::virtio) fn with_hook<T>(hook: Hook, f: impl FnOnce() -> T) -> T {
    let old = HOOK.with(|h| h.borrow_mut().replace(hook));
    let result = f();
    HOOK.with(|h| *h.borrow_mut() = old);
    result
}

/// Entries of the ring in these tests.
const SIZE: u16 = 8;
/// Where indices start, so that they wrap.
const BASE: u16 = 65529;

pub(in crate::virtio) fn memory(bytes: &[u8]) -> File {
    let file = crate::sys::memfd(c"inflight-test", bytes.len() as u64).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(part_len(SIZE, false)).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn view(file: &File) -> View {
    let region = Region::map(file, 0, 0, part_len(SIZE, false), 0).unwrap();
    View::new(Arc::new(region), 0, SIZE, false).unwrap()
}

fn start(file: &File, used_idx: u16) -> Result<(Tracker, Option<u16>), &'static str> {
    Tracker::start(view(file), used_idx)
}

/// What outlives the process, as the guest sees it. A request is its place in `avail`.
struct World {
    region: File,
    /// The heads of all requests ever made available.
    avail: Vec<u16>,
    /// All requests given back and published.
    used: Vec<usize>,
    /// Requests that the device of now, or one before it, has begun.
    begun: usize,
}

fn index(n: usize) -> u16 {
    BASE.wrapping_add(u16::try_from(n).unwrap())
}

impl World {
    /// The request that a head in flight stands for.
    fn request(&self, head: u16) -> usize {
        self.avail.iter().rposition(|h| *h == head).unwrap()
    }

    /// What a successor finds in `bytes`: the requests to resubmit, in order. Fails if one is lost or would be done twice.
    fn check(&self, bytes: &[u8]) {
        let region = memory(bytes);
        let (mut tracker, next) = start(&region, index(self.used.len())).unwrap();
        let Some(next) = next else {
            assert_eq!((self.begun, self.used.len()), (0, 0), "all was forgotten");
            return;
        };
        let again: Vec<usize> =
            std::iter::from_fn(|| tracker.resubmit()).map(|h| self.request(h)).collect();
        assert!(again.is_sorted_by(|a, b| a < b), "in the order of the guest: {again:?}");
        let taken = usize::from(next.wrapping_sub(BASE));
        let done: BTreeSet<usize> = self.used.iter().copied().collect();
        assert_eq!(done.len(), self.used.len(), "done twice: {:?}", self.used);
        let covered: BTreeSet<usize> = done.iter().copied().chain(again).collect();
        assert_eq!(covered, (0..taken).collect(), "lost or done twice: goes on at {taken}");
    }
}

/// Checks the state of now, as left by a device killed now, and by each successor killed while it recovers.
fn check_now(world: &RefCell<World>) {
    let world = world.borrow();
    let bytes = contents(&world.region);
    world.check(&bytes);
    let copy = Rc::new(memory(&bytes));
    let states = Rc::new(RefCell::new(Vec::new()));
    let (file, into) = (Rc::clone(&copy), Rc::clone(&states));
    let record: Hook = Rc::new(move || into.borrow_mut().push(contents(&file)));
    with_hook(record, || start(&copy, index(world.used.len())).unwrap());
    states.borrow().iter().for_each(|bytes| world.check(bytes));
}

/// The device: begins and ends requests in the order that the numbers say; now and then it dies and has a successor.
struct Device {
    world: Rc<RefCell<World>>,
    tracker: Tracker,
    /// Requests in flight.
    busy: Vec<usize>,
    batch: Vec<usize>,
}

impl Device {
    fn new(world: &Rc<RefCell<World>>) -> Device {
        let (region, used) = {
            let w = world.borrow();
            (w.region.try_clone().unwrap(), w.used.len())
        };
        let (mut tracker, next) = start(&region, index(used)).unwrap();
        let mut busy = Vec::new();
        while let Some(head) = tracker.resubmit() {
            busy.push(world.borrow().request(head));
        }
        world.borrow_mut().begun = usize::from(next.unwrap_or(BASE).wrapping_sub(BASE));
        Device { world: Rc::clone(world), tracker, busy, batch: Vec::new() }
    }

    fn take(&mut self) {
        let n = self.world.borrow().begun;
        let head = self.world.borrow().avail.get(n).copied();
        if let Some(head) = head {
            // From here on it may be in flight, but need not.
            self.world.borrow_mut().begun += 1;
            self.tracker.taken(head);
            self.busy.push(n);
        }
    }

    fn end(&mut self, which: usize) {
        if !self.busy.is_empty() {
            let request = self.busy.remove(which % self.busy.len());
            let head = self.world.borrow().avail[request];
            self.tracker.done(head);
            self.batch.push(request);
        }
    }

    fn publish(&mut self) {
        self.world.borrow_mut().used.append(&mut self.batch);
        killed_here();
        let used_idx = index(self.world.borrow().used.len());
        self.tracker.published(used_idx);
    }
}

/// The guest offers a head that is free.
fn offer(world: &RefCell<World>, which: usize) {
    let mut w = world.borrow_mut();
    let busy: BTreeSet<u16> =
        (0..w.avail.len()).filter(|r| !w.used.contains(r)).map(|r| w.avail[r]).collect();
    let free: Vec<u16> = (0..SIZE).filter(|h| !busy.contains(h)).collect();
    if !free.is_empty() {
        w.avail.push(free[which % free.len()]);
    }
}

fn run(steps: &[(u8, usize)]) {
    let region = memory(&vec![0; usize::try_from(part_len(SIZE, false)).unwrap()]);
    let world = World { region, avail: Vec::new(), used: Vec::new(), begun: 0 };
    let world = Rc::new(RefCell::new(world));
    let seen = Rc::clone(&world);
    with_hook(Rc::new(move || check_now(&seen)), || {
        let mut device = Device::new(&world);
        for (what, which) in steps {
            match what {
                0..4 => offer(&world, *which),
                4..7 => device.take(),
                7..10 => device.end(*which),
                10..12 => device.publish(),
                _ => device = Device::new(&world),
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn killed_after_any_store_nothing_is_lost_or_done_twice(
        steps in proptest::collection::vec((0u8..13, 0usize..64), 1..120),
    ) {
        run(&steps);
    }

    #[test]
    fn hostile_memory_is_refused_or_taken_but_never_believed(
        bytes in proptest::collection::vec(any::<u8>(), 192),
        small in any::<bool>(),
        used_idx: u16,
    ) {
        let mut bytes = bytes;
        bytes[8..10].copy_from_slice(&1u16.to_ne_bytes());
        if small {
            bytes[13] = 0;
            bytes[14..16].copy_from_slice(&used_idx.wrapping_sub(3).to_ne_bytes());
        }
        if let Ok((mut tracker, next)) = start(&memory(&bytes), used_idx) {
            let again: BTreeSet<u16> = std::iter::from_fn(|| tracker.resubmit()).collect();
            prop_assert!(again.iter().all(|head| *head < SIZE));
            let count = u16::try_from(again.len()).unwrap();
            prop_assert_eq!(next.map(|n| n.wrapping_sub(used_idx)).unwrap_or(0), count);
            tracker.taken(SIZE - 1);
            tracker.done(SIZE - 1);
            tracker.published(used_idx.wrapping_add(1));
        }
    }
}

/// The document's layout, byte by byte.
#[test]
fn the_layout_is_the_documents() {
    let file = memory(&[0; 192]);
    assert_eq!((part_len(SIZE, false), part_len(128, false), part_len(1, false)), (192, 2112, 64));
    let (mut tracker, next) = start(&file, 0x1234).unwrap();
    assert_eq!((next, tracker.recovered()), (None, false));
    tracker.taken(5);
    tracker.taken(2);
    tracker.taken(7);
    tracker.done(2);
    tracker.published(0x1235);
    tracker.done(7);
    let mut expected = vec![0; 192];
    expected[8] = 1;
    expected[10..12].copy_from_slice(&SIZE.to_le_bytes());
    expected[12] = 7;
    expected[14..16].copy_from_slice(&0x1235u16.to_le_bytes());
    let mut desc = |head: usize, inflight, next, counter| {
        let at = 16 + 16 * head;
        (expected[at], expected[at + 6], expected[at + 8]) = (inflight, next, counter);
    };
    desc(5, 1, 0, 0);
    desc(2, 0, 0, 1);
    desc(7, 1, 2, 2);
    assert_eq!(contents(&file), expected);
}

/// As QEMU's libvhost-user leaves it: killed with a batch of two published but not cleared.
#[test]
fn a_foreign_back_end_is_succeeded() {
    let mut bytes = vec![0; 192];
    (bytes[8], bytes[10], bytes[12], bytes[14]) = (1, 8, 3, 100);
    let mut desc = |head: usize, next, counter| {
        let at = 16 + 16 * head;
        (bytes[at], bytes[at + 6], bytes[at + 8]) = (1, next, counter);
    };
    desc(3, 6, 9);
    desc(6, 1, 8);
    desc(1, 0, 11);
    desc(0, 0, 10);
    let (mut tracker, next) = start(&memory(&bytes), 102).unwrap();
    assert_eq!((next, tracker.waiting(), tracker.recovered()), (Some(104), 2, true));
    assert_eq!(
        [tracker.resubmit(), tracker.resubmit(), tracker.resubmit()],
        [Some(0), Some(1), None]
    );
    assert_eq!(tracker.counter, 12);
}

#[test]
fn states_that_no_back_end_leaves() {
    let with = |edit: &dyn Fn(&mut [u8])| {
        let mut bytes = vec![0; 192];
        (bytes[8], bytes[16]) = (1, 1);
        edit(&mut bytes);
        start(&memory(&bytes), 3).map(|(t, next)| (t.waiting(), next))
    };
    assert_eq!(with(&|b| b[14] = 3), Ok((1, Some(4))));
    assert!(with(&|b| b[8] = 2).is_err(), "a version to come");
    assert!(with(&|b| (b[12], b[14]) = (8, 2)).is_err(), "a head outside of the table");
    assert!(with(&|b| (b[22], b[14]) = (8, 1)).is_err(), "a link outside of the table");
    assert_eq!(with(&|b| b[14] = 2), Ok((0, Some(3))), "a batch of head 0");
    assert_eq!(with(&|b| b[14] = 0), Ok((0, Some(3))), "a loop is as long as the batch");
    assert_eq!(with(&|b| b[14] = 4), Ok((0, None)), "a batch longer than the ring: another ring's");
}

#[test]
fn a_part_lies_in_its_region() {
    let file = memory(&[0; 192]);
    let region = Arc::new(Region::map(&file, 0, 0, 192, 0).unwrap());
    let fits = |offset, size| View::new(Arc::clone(&region), offset, size, false).is_some();
    assert!(fits(0, 8) && fits(48, 8) && fits(0, 11) && fits(176, 0));
    assert!(!fits(0, 12) && !fits(64, 8) && !fits(u64::MAX, 8) && !fits(4, 8) && !fits(192, 0));
}
