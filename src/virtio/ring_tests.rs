//! Tests of the ring: beside `virtio-queue`'s own queue on the same memory, beside a plain model, and with rings full of lies.

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};

use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::{AvailRing, DescriptorTable, UsedRing};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::mem::{IoVec, Region, Sg};

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// Where things lie in the first region; the largest ring in these tests has 256 entries.
pub(in crate::virtio) const DESC: u64 = 0;
pub(in crate::virtio) const AVAIL: u64 = 0x1000;
pub(in crate::virtio) const USED: u64 = 0x2000;
const THEIR_USED: u64 = 0x3000;
pub(in crate::virtio) const TABLES: u64 = 0x4000;
/// Guest address and length of the regions: two that touch each other, a hole, a third.
pub(in crate::virtio) const REGIONS: [(u64, u64); 3] =
    [(0, 0x1_0000), (0x1_0000, 0x4000), (0x2_0000, 0x8000)];
pub(in crate::virtio) const TOUCH: u64 = REGIONS[1].0;

pub(in crate::virtio) fn user_addr(region: usize) -> u64 {
    // Neither the guest's addresses nor in their order.
    0x7f00_0000_0000 - ((region as u64) << 28)
}

/// The same memory twice: as `vm-memory` maps it and as we do.
pub(in crate::virtio) struct Guest {
    pub(in crate::virtio) mem: GuestMemoryMmap,
    pub(in crate::virtio) map: Arc<GuestMap>,
}

impl Guest {
    pub(in crate::virtio) fn new() -> Guest {
        // SAFETY: the name is a C string; a returned descriptor is ours.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::memfd_create(c"ring".as_ptr(), 0)) };
        let file = File::from(fd);
        let total: u64 = REGIONS.iter().map(|(_, len)| len).sum();
        file.set_len(total).unwrap();
        let (mut at, mut ours, mut theirs) = (0, Vec::new(), Vec::new());
        for (i, (addr, len)) in REGIONS.into_iter().enumerate() {
            ours.push(Arc::new(Region::map(&file, addr, user_addr(i), len, at).unwrap()));
            let place = FileOffset::new(file.try_clone().unwrap(), at);
            theirs.push((GuestAddress(addr), usize::try_from(len).unwrap(), Some(place)));
            at += len;
        }
        let mem = GuestMemoryMmap::from_ranges_with_files(theirs).unwrap();
        let noise: Vec<u8> = (0..total).map(|i| (i * 31 % 251) as u8).collect();
        std::os::unix::fs::FileExt::write_at(&file, &noise, 0).unwrap();
        Guest { mem, map: Arc::new(GuestMap::new(ours).unwrap()) }
    }

    pub(in crate::virtio) fn addrs() -> RingAddrs {
        let base = user_addr(0);
        RingAddrs { desc: base + DESC, avail: base + AVAIL, used: base + USED }
    }

    fn ring(&self, size: u16, base: u16, features: u64) -> Ring {
        Ring::new(Arc::clone(&self.map), Guest::addrs(), size, base, features).unwrap()
    }

    pub(in crate::virtio) fn put<T: vm_memory::ByteValued>(&self, addr: u64, value: T) {
        self.mem.write_obj(value, GuestAddress(addr)).unwrap();
    }

    fn get(&self, addr: u64) -> u16 {
        self.mem.read_obj(GuestAddress(addr)).unwrap()
    }

    fn put_desc(&self, table: u64, index: u16, d: (u64, u32, u16, u16)) {
        let raw = RawDescriptor::from(Descriptor::new(d.0, d.1, d.2, d.3));
        self.put(table + 16 * u64::from(index), raw);
    }

    /// A ring on zeroed ring memory in which chain `head` is the only one.
    fn offering(&self, size: u16, head: u16, features: u64) -> Ring {
        let _zeroed = AvailRing::new(&self.mem, GuestAddress(AVAIL), size);
        let _zeroed = UsedRing::new(&self.mem, GuestAddress(USED), size);
        self.put(AVAIL + 4, head);
        self.put(AVAIL + 2, 1u16);
        self.ring(size, 0, features)
    }

    /// Ranges of ours as guest addresses, neighbours joined.
    pub(in crate::virtio) fn guest_ranges(&self, iov: &[IoVec]) -> Vec<(u64, u64)> {
        joined(iov.iter().map(|v| {
            let at = v.base().addr();
            let region = self.map.regions().iter().find_map(|r| {
                let host = self.map.translate(r.guest_addr, 1).unwrap().base().addr();
                let inside = host <= at && at + v.len() <= host + r.size as usize;
                inside.then(|| r.guest_addr + (at - host) as u64)
            });
            (region.expect("a range outside of guest memory"), v.len() as u64)
        }))
    }
}

pub(in crate::virtio) fn joined(ranges: impl IntoIterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for (addr, len) in ranges.into_iter().filter(|(_, len)| *len > 0) {
        match out.last_mut() {
            Some((a, l)) if *a + *l == addr => *l += len,
            _ => out.push((addr, len)),
        }
    }
    out
}

/// A chain as a driver means it: descriptors in the ring's table, then perhaps ones in an indirect table. From
/// descriptor `split` on they are for writing.
#[derive(Clone, Debug)]
struct Spec {
    direct: Vec<(u64, u32)>,
    indirect: Vec<(u64, u32)>,
    split: usize,
}

/// One turn of a guest: chains, then answers in batches.
#[derive(Clone, Debug)]
struct Round {
    chains: Vec<Spec>,
    batch: usize,
    lens: u32,
    /// used_event relative to used.idx.
    event: i16,
    no_interrupt: bool,
}

pub(in crate::virtio) fn range() -> impl Strategy<Value = (u64, u32)> {
    let low = REGIONS[1].0 + REGIONS[1].1;
    let (third, end) = (REGIONS[2].0, REGIONS[2].0 + REGIONS[2].1);
    let clip = |(addr, len, end): (u64, u64, u64)| (addr, len.min(end - addr) as u32);
    let len = || prop_oneof![Just(0u64), 1u64..20, Just(512), Just(4096), 1u64..0x3000];
    prop_oneof![
        (0..low, len(), Just(low)).prop_map(clip),
        (TOUCH - 0x1000..TOUCH, len(), Just(low)).prop_map(clip),
        (third..end, len(), Just(end)).prop_map(clip),
    ]
}

fn spec() -> impl Strategy<Value = Spec> {
    let (direct, indirect) =
        (prop::collection::vec(range(), 0..9), prop::collection::vec(range(), 0..40));
    (direct, indirect, 0usize..50).prop_map(|(mut direct, indirect, split)| {
        if direct.is_empty() && indirect.is_empty() {
            direct.push((TOUCH, 1));
        }
        Spec { direct, indirect, split }
    })
}

fn round() -> impl Strategy<Value = Round> {
    let chains = prop::collection::vec(spec(), 0..7);
    (chains, 1usize..5, any::<u32>(), -4i16..8, any::<bool>()).prop_map(
        |(chains, batch, lens, event, no_interrupt)| Round {
            chains,
            batch,
            lens,
            event,
            no_interrupt,
        },
    )
}

fn index() -> impl Strategy<Value = u16> {
    prop_oneof![65520u16..=65535, any::<u16>(), Just(0)]
}

/// The driver's side of the ring on which ours and theirs work.
struct Driver<'a> {
    guest: &'a Guest,
    table: DescriptorTable<'a, GuestMemoryMmap>,
    size: u16,
    free: Vec<u16>,
    tables: u64,
}

impl<'a> Driver<'a> {
    fn new(guest: &'a Guest, size: u16, stir: u16) -> Driver<'a> {
        // Any odd factor permutes a power of two.
        let free = (0..size).map(|i| i.wrapping_mul(stir | 1) & (size - 1)).collect();
        let table = DescriptorTable::new(&guest.mem, GuestAddress(DESC), size);
        Driver { guest, table, size, free, tables: TABLES }
    }

    /// Writes the chain; its head, if there is room in the table.
    fn add(&mut self, spec: &Spec) -> Option<u16> {
        let need = spec.direct.len() + usize::from(!spec.indirect.is_empty());
        if need > self.free.len() {
            return None;
        }
        let ids: Vec<u16> = self.free.split_off(self.free.len() - need);
        let mut all = Vec::new();
        let flag = |i: usize| if i >= spec.split { WRITE } else { 0 };
        for (i, (addr, len)) in spec.direct.iter().enumerate() {
            all.push((*addr, *len, flag(i)));
        }
        if !spec.indirect.is_empty() {
            all.push((self.tables, 16 * spec.indirect.len() as u32, INDIRECT));
            self.add_table(spec, flag);
        }
        for (i, (addr, len, flags)) in all.iter().enumerate() {
            let (flags, next) = match ids.get(i + 1) {
                Some(next) => (flags | NEXT, *next),
                None => (*flags, 0xdead),
            };
            let d = RawDescriptor::from(Descriptor::new(*addr, *len, flags, next));
            self.table.store(ids[i], d).unwrap();
        }
        Some(ids[0])
    }

    /// The entries in reverse order behind the first, so that links matter.
    fn add_table(&mut self, spec: &Spec, flag: impl Fn(usize) -> u16) {
        let n = spec.indirect.len() as u16;
        let place = |i: u16| if i == 0 { 0 } else { n - i };
        for (i, (addr, len)) in (0u16..).zip(&spec.indirect) {
            let mut flags = flag(spec.direct.len() + usize::from(i));
            flags |= if i + 1 < n { NEXT } else { 0 };
            self.guest.put_desc(self.tables, place(i), (*addr, *len, flags, place(i + 1)));
        }
        self.tables += 16 * u64::from(n) + 8; // Tables need no alignment.
    }

    fn refill(&mut self, stir: u16) {
        *self = Driver::new(self.guest, self.size, stir);
    }
}

fn their_queue(size: u16, base: u16, used: u16, event_idx: bool) -> Queue {
    let mut q = Queue::new(256).unwrap();
    q.set_size(size);
    q.try_set_desc_table_address(GuestAddress(DESC)).unwrap();
    q.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
    q.try_set_used_ring_address(GuestAddress(THEIR_USED)).unwrap();
    q.set_event_idx(event_idx);
    q.set_next_avail(base);
    q.set_next_used(used);
    q.set_ready(true);
    q
}

/// Pops one chain from both and compares them: head, ranges, bytes.
fn compare_pop(
    g: &Guest,
    ring: &mut Ring,
    theirs: &mut Queue,
    chain: &mut Chain,
) -> TestCaseResult {
    let head = ring.pop().unwrap();
    ring.read_chain(head, chain).unwrap();
    let other = theirs.pop_descriptor_chain(&g.mem).expect("they find one, too");
    prop_assert_eq!(head, other.head_index());
    prop_assert_eq!(chain.bad, None);
    let side = |write: bool| {
        let descs = other.clone().filter(|d| d.is_write_only() == write);
        joined(descs.map(|d| (d.addr().0, d.len().into())))
    };
    let (readable, writable) = chain.iov.split_at(chain.readable);
    prop_assert_eq!(g.guest_ranges(readable), side(false));
    prop_assert_eq!(g.guest_ranges(writable), side(true));
    let (mut ours, mut want) = (vec![0; usize::try_from(chain.readable_len).unwrap()], Vec::new());
    Sg::new(readable).copy_to(&mut ours);
    for (addr, len) in side(false) {
        let mut bytes = vec![0; len as usize];
        g.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        want.extend(bytes);
    }
    prop_assert!(ours == want, "other bytes");
    let writable: u64 = side(true).iter().map(|(_, len)| len).sum();
    prop_assert_eq!(chain.writable_len, writable);
    Ok(())
}

/// Features of a run: EVENT_IDX, NOTIFY_ON_EMPTY.
type Features = (bool, bool);

fn both_serve(
    (size, base, used): (u16, u16, u16),
    (event_idx, on_empty): Features,
    rounds: &[Round],
) -> TestCaseResult {
    let g = Guest::new();
    let avail = AvailRing::new(&g.mem, GuestAddress(AVAIL), size);
    avail.idx().store(base);
    for at in [USED, THEIR_USED] {
        g.mem.write_slice(&vec![0; 6 + 8 * usize::from(size)], GuestAddress(at)).unwrap();
        g.put(at + 2, used);
    }
    let mut features = feature(VIRTIO_RING_F_INDIRECT_DESC);
    features |= if event_idx { feature(VIRTIO_RING_F_EVENT_IDX) } else { 0 };
    features |= if on_empty { feature(VIRTIO_F_NOTIFY_ON_EMPTY) } else { 0 };
    let mut ring = g.ring(size, base, features);
    let mut theirs = their_queue(size, base, used, event_idx);
    let (mut driver, mut chain) = (Driver::new(&g, size, 1), Chain::default());
    let (mut avail_idx, mut used_idx) = (base, used);
    for round in rounds {
        driver.refill(round.lens as u16);
        let mut heads = Vec::new();
        for head in round.chains.iter().map_while(|spec| driver.add(spec)) {
            avail.ring().ref_at(usize::from(avail_idx & (size - 1))).unwrap().store(head);
            avail_idx = avail_idx.wrapping_add(1);
            heads.push(head);
        }
        avail.idx().store(avail_idx);
        prop_assert_eq!(ring.has_avail(), !heads.is_empty());
        prop_assert_eq!(ring.available(), Ok(heads.len() as u16));
        for _ in &heads {
            compare_pop(&g, &mut ring, &mut theirs, &mut chain)?;
        }
        prop_assert!(theirs.pop_descriptor_chain(&g.mem).is_none() && !ring.has_avail());
        prop_assert_eq!(ring.next_avail(), avail_idx);
        let mut left = heads.len();
        heads.reverse(); // Answers come in any order.
        let mut batches: Vec<&[u16]> = heads.chunks(round.batch).collect();
        batches.push(&[]); // Nothing to publish, nothing to notify.
        for batch in batches {
            let event = used_idx.wrapping_add_signed(round.event);
            g.put(AVAIL + 4 + 2 * u64::from(size), event);
            g.put(AVAIL, u16::from(round.no_interrupt));
            let first = used_idx;
            for head in batch {
                let len = round.lens.rotate_left((*head).into());
                ring.push_used(*head, len);
                theirs.add_used(&g.mem, *head, len).unwrap();
                used_idx = used_idx.wrapping_add(1);
            }
            prop_assert_eq!(g.get(USED + 2), first, "seen before it is published");
            left -= batch.len();
            let notify = ring.publish(left == 0);
            let theirs = theirs.needs_notification(&g.mem).unwrap();
            let passed = (0..batch.len() as u16).any(|i| first.wrapping_add(i) == event);
            let wanted = if event_idx { passed } else { !round.no_interrupt };
            let empty = on_empty && left == 0;
            prop_assert_eq!(notify, !batch.is_empty() && (wanted || empty));
            // They do not know NO_INTERRUPT nor NOTIFY_ON_EMPTY.
            prop_assert!(!event_idx || theirs == passed);
        }
        ring.disarm_kick();
        theirs.disable_notification(&g.mem).unwrap();
        same_used(&g, size)?;
        ring.arm_kick();
        prop_assert!(!theirs.enable_notification(&g.mem).unwrap());
        same_used(&g, size)?;
    }
    Ok(())
}

fn same_used(g: &Guest, size: u16) -> TestCaseResult {
    let read = |at| {
        let mut bytes = vec![0; 6 + 8 * usize::from(size)];
        g.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    };
    prop_assert_eq!(read(USED), read(THEIR_USED));
    Ok(())
}

proptest! {
    #[test]
    fn serves_as_virtio_queue_does(
        size in 0u32..=8,
        indices in (index(), index()),
        features in (any::<bool>(), any::<bool>()),
        rounds in prop::collection::vec(round(), 1..8),
    ) {
        both_serve((1 << size, indices.0, indices.1), features, &rounds)?;
    }
}

// What follows is about guests that lie.

#[path = "ring_hostile_tests.rs"]
mod hostile;
