//! Tests of the packed ring: beside a driver that counts its positions without ever wrapping them, and with rings full of
//! lies.

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::mem::{IoVec, Region};
use crate::virtio::ring::tests::{
    AVAIL as DRIVER, DESC, Guest, REGIONS, TABLES, TOUCH, USED as DEVICE, joined, range, user_addr,
};

pub(super) const NEXT: u16 = 1;
pub(super) const INDIRECT: u16 = 4;
/// An address between the regions.
pub(super) const GAP: u64 = REGIONS[1].0 + REGIONS[1].1;

pub(super) type Raw = (u64, u32, u16, u16);

/// Writes a descriptor: address, length, id, flags.
pub(super) fn put_desc(g: &Guest, table: u64, index: u16, d: Raw) {
    let at = table + 16 * u64::from(index);
    g.put(at, d.0);
    g.put(at + 8, d.1);
    g.put(at + 12, d.2);
    g.put(at + 14, d.3);
}

pub(super) fn get_desc(g: &Guest, index: u16) -> Raw {
    let at = DESC + 16 * u64::from(index);
    let get = |at| g.mem.read_obj::<u16>(GuestAddress(at)).unwrap();
    let len = g.mem.read_obj::<u32>(GuestAddress(at + 8)).unwrap();
    (g.mem.read_obj(GuestAddress(at)).unwrap(), len, get(at + 12), get(at + 14))
}

/// A base of the place `n` entries after the very first one.
pub(super) fn bits(n: u64, size: u16) -> u16 {
    let size = u64::from(size);
    let round = if (n / size).is_multiple_of(2) { WRAP } else { 0 };
    u16::try_from(n % size).unwrap() | round
}

pub(super) fn ring(g: &Guest, size: u16, base: u32, features: u64) -> Packed {
    Packed::new(Arc::clone(&g.map), Guest::addrs(), size, base, features).unwrap()
}

/// A chain as a driver means it; from descriptor `split` on they are for writing.
#[derive(Clone, Debug)]
struct Spec {
    ranges: Vec<(u64, u32)>,
    split: usize,
    indirect: bool,
}

fn spec() -> impl Strategy<Value = Spec> {
    let ranges = prop::collection::vec(range(), 1..9);
    (ranges, 0usize..10, any::<bool>()).prop_map(|(ranges, split, indirect)| Spec {
        ranges,
        split,
        indirect,
    })
}

/// One turn of a guest: chains, then answers in batches.
#[derive(Clone, Debug)]
struct Round {
    chains: Vec<Spec>,
    batch: usize,
    answers: usize,
    lens: u32,
    order: usize,
    /// Where the driver wants to be told, relative to what it has seen.
    event: u64,
    wish: u16,
}

fn round() -> impl Strategy<Value = Round> {
    let chains = prop::collection::vec(spec(), 0..7);
    let lens = prop_oneof![Just(0), any::<u32>()];
    (chains, 1usize..5, 0usize..9, lens, any::<usize>(), 0u64..12, 0u16..3).prop_map(
        |(chains, batch, answers, lens, order, event, wish)| Round {
            chains,
            batch,
            answers,
            lens,
            order,
            event,
            wish,
        },
    )
}

/// The driver. `made` and `seen` only grow: entries made available, entries seen used.
struct Driver<'a> {
    g: &'a Guest,
    size: u16,
    made: u64,
    seen: u64,
    tables: u64,
    ids: Vec<u16>,
    /// The ring entries of a chain in flight, by id.
    entries: Vec<u16>,
}

impl<'a> Driver<'a> {
    fn new(g: &'a Guest, size: u16, start: u64) -> Self {
        // Everything before was used.
        for n in (start + 1).saturating_sub(size.into())..=start {
            let n = n.saturating_sub(1);
            let flags = if bits(n, size) & WRAP != 0 { BOTH } else { 0 };
            put_desc(g, DESC, (n % u64::from(size)) as u16, (0, 0, 0, flags));
        }
        if start == 0 {
            (0..size).for_each(|i| put_desc(g, DESC, i, (0, 0, 0, 0)));
        }
        let ids = (0..size).rev().collect();
        Driver {
            g,
            size,
            made: start,
            seen: start,
            tables: TABLES,
            ids,
            entries: vec![0; size.into()],
        }
    }

    fn place(&self, n: u64) -> (u16, u16) {
        let wrap = bits(n, self.size) & WRAP != 0;
        ((n % u64::from(self.size)) as u16, if wrap { AVAIL } else { USED })
    }

    /// Makes a chain available: its id, if there is room.
    fn add(&mut self, spec: &Spec) -> Option<u16> {
        let need = if spec.indirect { 1 } else { spec.ranges.len() as u16 };
        let free = u64::from(self.size) - (self.made - self.seen);
        if u64::from(need) > free {
            return None;
        }
        let id = self.ids.pop().expect("not more chains than entries");
        let write = |i: usize| if i >= spec.split { WRITE } else { 0 };
        if spec.indirect {
            for (i, (addr, len)) in spec.ranges.iter().enumerate() {
                // Neither ids nor NEXT mean anything there.
                let flags = write(i) | if len % 2 == 0 { NEXT } else { 0 };
                put_desc(self.g, self.tables, i as u16, (*addr, *len, 0xbeef, flags));
            }
            let (at, flags) = self.place(self.made);
            let len = 16 * spec.ranges.len() as u32;
            put_desc(self.g, DESC, at, (self.tables, len, id, flags | INDIRECT));
            self.tables += u64::from(len) + 8; // Tables need no alignment.
        } else {
            let last = spec.ranges.len() - 1;
            for (i, (addr, len)) in spec.ranges.iter().enumerate().rev() {
                let (at, flags) = self.place(self.made + i as u64);
                let next = if i < last { NEXT } else { 0 };
                let id = if i < last { 0xdead } else { id };
                put_desc(self.g, DESC, at, (*addr, *len, id, flags | next | write(i)));
            }
        }
        self.made += u64::from(need);
        self.entries[usize::from(id)] = need;
        Some(id)
    }

    /// The next used descriptor, if the device has made one.
    fn used(&mut self) -> Option<(u16, Option<u32>)> {
        let (at, _) = self.place(self.seen);
        let want = if bits(self.seen, self.size) & WRAP != 0 { BOTH } else { 0 };
        let (_, len, id, flags) = get_desc(self.g, at);
        if self.seen == self.made || flags & BOTH != want {
            return None;
        }
        self.seen += u64::from(self.entries[usize::from(id)]);
        self.ids.insert(0, id);
        Some((id, (flags & WRITE != 0).then_some(len)))
    }
}

fn serve(size: u16, start: u64, event_idx: bool, rounds: &[Round]) -> TestCaseResult {
    let g = Guest::new();
    let mut driver = Driver::new(&g, size, start);
    let event_bit = if event_idx { feature(VIRTIO_RING_F_EVENT_IDX) } else { 0 };
    let base =
        |d: &Driver<'_>, used| u32::from(bits(d.made, size)) | u32::from(bits(used, size)) << 16;
    let first = base(&driver, start);
    let mut ring = ring(&g, size, first, feature(VIRTIO_RING_F_INDIRECT_DESC) | event_bit);
    let mut chain = Chain::default();
    let mut in_flight: Vec<u16> = Vec::new();
    for round in rounds {
        driver.tables = TABLES;
        prop_assert!(!ring.has_avail());
        prop_assert_eq!(ring.pop(), Ok(None));
        for spec in &round.chains {
            let Some(id) = driver.add(spec) else { break };
            prop_assert!(ring.has_avail());
            prop_assert_eq!(ring.pop(), Ok(Some(id)));
            ring.read_chain(&mut chain).unwrap();
            prop_assert_eq!(chain.bad.is_some(), false);
            let (readable, writable) = chain.iov.split_at(chain.readable);
            let at = spec.split.min(spec.ranges.len());
            let side = |part: &[(u64, u32)]| joined(part.iter().map(|(a, l)| (*a, u64::from(*l))));
            prop_assert_eq!(g.guest_ranges(readable), side(&spec.ranges[..at]));
            prop_assert_eq!(g.guest_ranges(writable), side(&spec.ranges[at..]));
            in_flight.push(id);
        }
        ring.arm_kick();
        let wish: u32 = g.mem.read_obj(GuestAddress(DEVICE)).unwrap();
        let here = 2 << 16 | u32::from(bits(driver.made, size));
        prop_assert_eq!(wish, if event_idx { here } else { 0 });
        ring.disarm_kick();
        prop_assert_eq!(g.mem.read_obj::<u32>(GuestAddress(DEVICE)).unwrap(), 1 << 16);
        answer(&g, &mut ring, &mut driver, &mut in_flight, round, event_idx)?;
        let used = driver.seen;
        prop_assert_eq!(ring.base(), base(&driver, used));
    }
    Ok(())
}

/// Gives some of `in_flight` back in any order, in batches.
fn answer(
    g: &Guest,
    ring: &mut Packed,
    driver: &mut Driver<'_>,
    in_flight: &mut Vec<u16>,
    round: &Round,
    event_idx: bool,
) -> TestCaseResult {
    let n = round.answers.min(in_flight.len());
    let mut ids: Vec<u16> = Vec::new();
    for i in 0..n {
        ids.push(in_flight.swap_remove((round.order >> i) % in_flight.len()));
    }
    let mut batches: Vec<&[u16]> = ids.chunks(round.batch).collect();
    batches.push(&[]); // Nothing to publish, nothing to notify.
    for batch in batches {
        // Two rounds further is the same place.
        let event = driver.seen + round.event % (2 * u64::from(ring.size));
        g.put(DRIVER, bits(event, ring.size));
        g.put(DRIVER + 2, round.wish);
        for id in batch {
            ring.push_used(*id, round.lens);
            prop_assert_eq!(driver.used(), None, "seen before it is published");
        }
        let notify = ring.publish();
        let before = driver.seen;
        for id in batch {
            let len = (round.lens > 0).then_some(round.lens);
            prop_assert_eq!(driver.used(), Some((*id, len)));
        }
        prop_assert_eq!(driver.used(), None);
        let wanted = match round.wish {
            0 => true,
            1 => false,
            _ => !event_idx || (before..driver.seen).contains(&event),
        };
        prop_assert_eq!(notify, !batch.is_empty() && wanted);
    }
    Ok(())
}

proptest! {
    #[test]
    fn serves_a_driver_that_counts(
        size in 1u16..24,
        start in 0u64..100,
        event_idx in any::<bool>(),
        rounds in prop::collection::vec(round(), 1..12),
    ) {
        serve(size, start, event_idx, &rounds)?;
    }
}

/// The largest ring, gone round more than twice: nothing overflows.
#[test]
fn the_largest_ring() {
    const SIZE: u16 = 1 << 15;
    let file = {
        // SAFETY: the name is a C string; a returned descriptor is ours.
        let fd = unsafe { libc::memfd_create(c"ring".as_ptr(), 0) };
        // SAFETY: as above.
        unsafe { <std::fs::File as std::os::fd::FromRawFd>::from_raw_fd(fd) }
    };
    let len = 16 * u64::from(SIZE) + 4096;
    file.set_len(len).unwrap();
    let region = Arc::new(Region::map(&file, 0, 0x1000_0000, len, 0).unwrap());
    let map = Arc::new(GuestMap::new(vec![region]).unwrap());
    let events = 0x1000_0000 + 16 * u64::from(SIZE);
    let addrs = RingAddrs { desc: 0x1000_0000, avail: events, used: events + 4 };
    let mut ring = Packed::new(map, addrs, SIZE, 0x8000_8000, 0).unwrap();
    let mut at = 0;
    let put = |n: u64, n_flags: u16, id: u16| {
        let mut d = [0; 16];
        d[12..14].copy_from_slice(&id.to_le_bytes());
        let round = if bits(n, SIZE) & WRAP != 0 { AVAIL } else { USED };
        d[14..].copy_from_slice(&(round | n_flags).to_le_bytes());
        std::os::unix::fs::FileExt::write_at(&file, &d, 16 * (n % u64::from(SIZE))).unwrap();
    };
    // Chains of a third of the ring, and a whole ring's.
    for chain in [11_000u64, 32_768, 1, 32_767, 2, 32_768] {
        for i in (0..chain).rev() {
            put(at + i, if i + 1 < chain { NEXT } else { 0 }, 7);
        }
        at += chain;
        assert_eq!(ring.pop(), Ok(Some(7)));
        assert_eq!(ring.taken.len() as u64, chain);
        ring.push_used(7, 0);
        ring.publish();
        let here = u32::from(bits(at, SIZE));
        assert_eq!(ring.base(), here << 16 | here);
    }
}

// What follows is about guests that lie.

#[path = "packed_hostile_tests.rs"]
mod hostile;
