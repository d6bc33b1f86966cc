//! Rings and their tracking on memory that Miri can interpret (`contrib/miri`): what is checked is that no access is out of
//! bounds, misaligned or of a pointer that it must not come from. The tests beside this one say what comes of it.
#![forbid(unsafe_code)]

use std::sync::Arc;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::chain::{CHAIN_MAX, Chain, RANGES_MAX};
use super::feature;
use super::inflight::{View, part_len};
use super::queue::{RingAddrs, Virtqueue, first_base};
use super::track::Tracking;
use crate::mem::{GuestMap, Region, Sg};
use crate::sim::Rng;

const PACKED: u64 = 1 << 34;
const FEATURES: u64 = feature(VIRTIO_RING_F_INDIRECT_DESC) | feature(VIRTIO_RING_F_EVENT_IDX);
/// The ring's entries. Its parts lie at 0, 0x100 and 0x180 of the first region.
const SIZE: u16 = 8;
const USER: u64 = 0x7f00_0000_0000;

/// Two regions that touch each other, and one that ends where addresses do.
fn map() -> Arc<GuestMap> {
    let regions = [
        Region::anonymous(0, USER, 0x1000),
        Region::anonymous(0x1000, 0x1000, 0x1000),
        Region::anonymous(u64::MAX - 0x1000, 0x2000, 0x1000),
    ];
    Arc::new(GuestMap::new(regions.map(Arc::new).into()).unwrap())
}

fn put(map: &GuestMap, guest: u64, bytes: &[u8]) {
    let at = map.translate(guest, bytes.len() as u64).unwrap();
    Sg::new(&[at]).copy_from(&bytes[..at.len()]);
}

/// A descriptor that may be sound; `split`: how the last four bytes are ordered.
fn descriptor(rng: &mut Rng, split: bool) -> Vec<u8> {
    let addrs = [0, 0x200, 0x800, 0xff0, 0xfff, 0x1000, 0x1fff, 0x2000, u64::MAX - 8, u64::MAX];
    let lens = [0, 1, 16, 32, 64, 512, 0x1000, u32::MAX];
    let link = rng.below(u64::from(SIZE) + 1) as u16;
    let mut flags = rng.below(8) as u16;
    if !split {
        flags |= [1 << 7, 1 << 15, 0][rng.index(3)];
    }
    let halves = if split { [flags, link] } else { [link, flags] };
    let (addr, len) = (addrs[rng.index(addrs.len())], lens[rng.index(lens.len())]);
    let halves = halves.map(u16::to_le_bytes);
    [&addr.to_le_bytes()[..], &len.to_le_bytes(), &halves[0], &halves[1]].concat()
}

fn scribble(rng: &mut Rng, map: &GuestMap, split: bool) {
    // The table, and indirect ones.
    for table in [0, 0x200] {
        for i in 0..u64::from(SIZE) {
            put(map, table + 16 * i, &descriptor(rng, split));
        }
    }
    for i in 0..u64::from(SIZE) {
        put(map, 0x104 + 2 * i, &(rng.below(u64::from(SIZE) + 1) as u16).to_le_bytes());
    }
    put(map, 0x102, &(rng.below(6) as u16).to_le_bytes());
}

fn track(area: &Arc<Region>, ring: &mut Virtqueue, packed: bool) -> Option<Tracking> {
    let view = View::new(Arc::clone(area), 0, SIZE, packed).unwrap();
    Tracking::start(view, ring).ok()
}

fn run(seed: u64, split: bool) {
    let mut rng = Rng::new(seed);
    let map = map();
    let area = Arc::new(Region::anonymous(0, 0, part_len(SIZE, !split)));
    let features = FEATURES | if split { 0 } else { PACKED };
    let addrs = RingAddrs { desc: USER, avail: USER + 0x100, used: USER + 0x180 };
    scribble(&mut rng, &map, split);
    let base = first_base(!split);
    let mut ring = Virtqueue::new(Arc::clone(&map), addrs, SIZE, base, features).unwrap();
    let mut tracker = track(&area, &mut ring, !split);
    let mut chain = Chain::default();
    for _ in 0..ring.available().unwrap_or(0) {
        let again = tracker.as_mut().and_then(|tracker| tracker.resubmit(&mut ring));
        let Ok(Some(head)) = again.map_or_else(|| ring.pop(), |head| Ok(Some(head))) else { break };
        let Ok(()) = ring.read_chain(head, &mut chain) else { break };
        assert!(chain.iov.len() <= RANGES_MAX.min(2 * (CHAIN_MAX + usize::from(SIZE))));
        let len = usize::try_from(chain.readable_len).unwrap();
        Sg::new(&chain.iov[..chain.readable]).copy_to(&mut vec![0; len]);
        Sg::new(&chain.iov[chain.readable..]).zero();
        if let Some(tracker) = &mut tracker {
            if again.is_none() {
                tracker.taken(head, &ring);
            }
            tracker.done(head);
        }
        ring.push_used(head, 1);
        match &mut tracker {
            Some(tracker) => tracker.publish(&mut ring, true),
            None => ring.publish(true),
        };
        ring.arm_kick();
        ring.disarm_kick();
    }
    // What a front end makes of the area, for our successor.
    let bytes: Vec<u8> = (0..part_len(SIZE, !split)).map(|_| rng.below(9) as u8).collect();
    let whole = GuestMap::new(vec![Arc::clone(&area)]).unwrap();
    put(&whole, 0, &bytes);
    put(&whole, 8, &1u16.to_le_bytes());
    let mut tracker = track(&area, &mut ring, !split);
    while tracker.as_mut().and_then(|tracker| tracker.resubmit(&mut ring)).is_some() {}
}

#[test]
fn any_ring() {
    // An interpreter takes a second for a hundredth of what a machine does at once.
    let seeds = if cfg!(miri) { 40 } else { 4000 };
    for seed in 1..=seeds {
        run(seed, true);
        run(seed, false);
    }
}

/// A descriptor over hundreds of regions is that many ranges: there is an end.
#[test]
fn a_chain_of_many_ranges() {
    let region = |i: u64| Arc::new(Region::anonymous(i << 12, USER + (i << 12), 0x1000));
    let map = Arc::new(GuestMap::new((0..200).map(region).collect()).unwrap());
    let all = 200 << 12;
    for (count, good) in [(20u16, true), (21, false), (64, false)] {
        for i in 0..count {
            let next = if i + 1 == count { 2 } else { 1 };
            let desc = [&0u64.to_le_bytes()[..], &u32::to_le_bytes(all), &[next, 0]].concat();
            put(&map, 16 * u64::from(i), &[&desc[..], &(i + 1).to_le_bytes()].concat());
        }
        put(&map, 0x1002, &1u16.to_le_bytes());
        let addrs = RingAddrs { desc: USER, avail: USER + 0x1000, used: USER + 0x2000 };
        let mut ring = Virtqueue::new(Arc::clone(&map), addrs, 64, 0, 0).unwrap();
        assert_eq!(ring.available(), Ok(1));
        let mut chain = Chain::default();
        let head = ring.pop().unwrap().unwrap();
        ring.read_chain(head, &mut chain).unwrap();
        assert_eq!(chain.bad.is_none(), good, "{count} descriptors");
        // The status byte is not where the last range ends.
        assert_eq!(chain.cut, !good);
        assert!(chain.iov.len() <= RANGES_MAX, "{}", chain.iov.len());
        // The place is given back before the next one.
        let head = [&0u64.to_le_bytes()[..], &1u32.to_le_bytes(), &[2, 0, 0, 0]].concat();
        put(&map, 0, &head);
        ring.read_chain(0, &mut chain).unwrap();
        assert_eq!(chain.iov.len(), 1);
        assert!(chain.iov.capacity() <= 2 * CHAIN_MAX, "{}", chain.iov.capacity());
    }
}
