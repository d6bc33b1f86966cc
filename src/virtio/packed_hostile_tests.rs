//! Packed rings full of lies: each is [`Broken`] or [`Chain::bad`] as documented, and none is a panic.

use std::sync::atomic::AtomicBool;

use super::*;

const FEATURES: u64 = feature(VIRTIO_RING_F_INDIRECT_DESC);
const LONG: &str = "more descriptors than the ring has entries";
const FRESH: u32 = 0x8000_8000;

/// A guest whose fresh ring of four begins with `direct` (made available), with `table` at [`TABLES`].
fn guest(direct: &[Raw], table: &[Raw]) -> Guest {
    let g = Guest::new();
    for i in 0..4 {
        put_desc(&g, DESC, i, (0, 0, 0, 0));
    }
    for (i, d) in (0..).zip(direct) {
        put_desc(&g, DESC, i, (d.0, d.1, d.2, d.3 | AVAIL));
    }
    for (i, d) in (0..).zip(table) {
        put_desc(&g, TABLES, i, *d);
    }
    g
}

fn read(direct: &[Raw], table: &[Raw], features: u64) -> Result<Chain, Broken> {
    let g = guest(direct, table);
    let mut ring = ring(&g, 4, FRESH, features);
    let mut chain = Chain::default();
    ring.pop()?.expect("there is one");
    ring.read_chain(&mut chain)?;
    Ok(chain)
}

fn broken(direct: &[Raw], table: &[Raw], features: u64) -> &'static str {
    read(direct, table, features).err().expect("a lie that was believed").0
}

#[test]
fn lies_about_structure_break_the_ring() {
    let id = "a buffer id that is not below the ring's size";
    let outside = "an indirect table outside of guest memory";
    let length = "an indirect table of a bad length";
    let chain = "an indirect descriptor in a chain";
    let one: &[Raw] = &[(TABLES, 16, 0, INDIRECT)];
    for (direct, table, want) in [
        // The ring itself. A chain without an end goes on into what is not available.
        (&[(0, 1, 4, 0)][..], &[][..], id),
        (&[(0, 1, 0xffff, 0)], &[], id),
        (&[(0, 1, 0, NEXT), (0, 1, 0, NEXT), (0, 1, 0, NEXT), (0, 1, 0, NEXT)], &[], LONG),
        // Indirect tables.
        (one, &[(TABLES, 16, 0, INDIRECT)], "an indirect descriptor in an indirect table"),
        (&[(TABLES, 16, 0, INDIRECT | NEXT), (0, 1, 0, WRITE)], &[(0, 1, 0, 0)], chain),
        (&[(0, 1, 0, NEXT), (TABLES, 16, 0, INDIRECT)], &[(0, 1, 0, 0)], chain),
        (&[(TABLES, 0, 0, INDIRECT)], &[], length),
        (&[(TABLES, 15, 0, INDIRECT)], &[], length),
        (&[(TABLES, 24, 0, INDIRECT)], &[], length),
        (&[(GAP, 16, 0, INDIRECT)], &[], outside),
        (&[(GAP - 8, 16, 0, INDIRECT)], &[], outside),
        (&[(TOUCH - 16, 32, 0, INDIRECT)], &[], outside),
        (&[(u64::MAX - 7, 16, 0, INDIRECT)], &[], outside),
        (&[(TABLES, 0xffff_fff0, 0, INDIRECT)], &[], outside),
    ] {
        assert_eq!(broken(direct, table, FEATURES), want, "{direct:x?} {table:x?}");
    }
    let want = "an indirect descriptor without VIRTIO_F_INDIRECT_DESC";
    assert_eq!(broken(one, &[(0, 1, 0, 0)], 0), want);
}

#[test]
fn the_longest_chains() {
    let four: Vec<Raw> = (0..4).map(|i| (0, 1, i, if i < 3 { NEXT } else { WRITE })).collect();
    let chain = read(&four, &[], FEATURES);
    assert_eq!(chain.map(|c| (c.iov.len(), c.readable)), Ok((4, 3)));
    // Tables may be longer than the ring, up to CHAIN_MAX.
    let max = u16::try_from(CHAIN_MAX).unwrap();
    let long = |n: u16| vec![(0, 1, 0, WRITE); n.into()];
    let table = |n: u16| [(TABLES, 16 * u32::from(n), 0, INDIRECT)];
    let chain = read(&table(max), &long(max), FEATURES);
    assert_eq!(chain.map(|c| (c.iov.len(), c.bad)), Ok((CHAIN_MAX, None)));
    assert_eq!(broken(&table(max + 1), &long(max + 1), FEATURES), "a chain that is too long");
}

#[test]
fn lies_about_memory_spoil_the_chain_only() {
    let outside = Some("a descriptor outside of guest memory");
    let order = Some("a descriptor to read after one to write");
    for (direct, bad) in [
        (&[(GAP, 1, 0, NEXT), (8, 1, 0, WRITE)][..], outside),
        (&[(GAP - 1, 2, 0, NEXT), (8, 1, 0, WRITE)], outside),
        (&[(u64::MAX, 2, 0, NEXT), (8, 1, 0, WRITE)], outside),
        (&[(8, 1, 0, NEXT | WRITE), (0, 1, 0, NEXT), (8, 1, 0, WRITE)], order),
        (&[(GAP, 0, 0, NEXT), (8, 1, 0, WRITE)], None),
    ] {
        let chain = read(direct, &[], FEATURES).unwrap_or_else(|b| panic!("{direct:x?}: {b:?}"));
        assert_eq!(chain.bad, bad, "{direct:x?}");
        assert_eq!(chain.iov[chain.readable..].last().map(IoVec::len), Some(1), "{direct:x?}");
    }
}

/// The guest offers what it has offered before and not got back: the same id, or the same entries.
#[test]
fn what_is_in_use_stays_so() {
    let g = guest(&[(0, 1, 3, WRITE), (0, 1, 3, WRITE)], &[]);
    let mut two = ring(&g, 4, FRESH, FEATURES);
    assert_eq!(two.pop(), Ok(Some(3)));
    assert_eq!(two.pop(), Err(Broken("a buffer id that is in use already")));
    // The first one is still answered, once, at its place.
    two.push_used(3, 1);
    two.publish();
    assert_eq!(get_desc(&g, 0), (0, 1, 3, BOTH | WRITE));
    assert_eq!(two.base() >> 16, 0x8001);

    let g = guest(&[(0, 1, 0, NEXT), (0, 1, 0, NEXT), (0, 1, 0, 0), (0, 1, 1, 0)], &[]);
    let mut full = ring(&g, 4, FRESH, FEATURES);
    assert_eq!((full.pop(), full.pop(), full.pop()), (Ok(Some(0)), Ok(Some(1)), Ok(None)));
    put_desc(&g, DESC, 0, (0, 1, 2, USED));
    assert!(full.has_avail());
    assert_eq!(full.pop(), Err(Broken(LONG)));
    full.push_used(1, 0);
    full.push_used(0, 0);
    full.publish();
    assert_eq!(full.base() >> 16, 0x0000);
    assert_eq!((get_desc(&g, 0).2, get_desc(&g, 1).2), (1, 0));
}

/// A chain's descriptors are read once: what they say later changes nothing.
#[test]
fn what_was_taken_is_not_read_again() {
    let g = guest(&[(0x100, 8, 9, NEXT), (0x200, 8, 2, WRITE)], &[]);
    let mut ring = ring(&g, 4, FRESH, FEATURES);
    assert_eq!(ring.pop(), Ok(Some(2)));
    put_desc(&g, DESC, 0, (GAP, 1, 0xffff, NEXT | INDIRECT));
    put_desc(&g, DESC, 1, (GAP, 1, 0xffff, NEXT | INDIRECT));
    let mut chain = Chain::default();
    ring.read_chain(&mut chain).unwrap();
    assert_eq!(g.guest_ranges(&chain.iov), [(0x100, 8), (0x200, 8)]);
    ring.push_used(2, 8);
    assert_eq!(ring.base() >> 16, 0x8002);
}

#[test]
fn events_that_are_nowhere_are_no_reason_to_be_silent() {
    for (event, flags, want) in [
        (0x8000u16, 2u16, true),
        (0x8001, 2, false),
        (0x0000, 2, false),
        (0x8004, 2, true),
        (0xffff, 2, true),
        (0, 0, true),
        (0, 1, false),
        (0, 3, true),
        // Only the two lowest bits of the flags mean something.
        (0, 0xfffd, false),
    ] {
        let g = guest(&[(0, 1, 0, WRITE)], &[]);
        let mut ring = ring(&g, 4, FRESH, FEATURES | feature(VIRTIO_RING_F_EVENT_IDX));
        ring.pop().unwrap();
        g.put(DRIVER, event);
        g.put(DRIVER + 2, flags);
        ring.push_used(0, 1);
        assert_eq!(ring.publish(), want, "{event:#x} {flags:#x}");
    }
}

#[test]
fn rings_must_lie_in_memory_and_begin_inside() {
    let g = Guest::new();
    let at = Guest::addrs();
    let end = user_addr(0) + REGIONS[0].1;
    let made =
        |addrs, size, base| Packed::new(Arc::clone(&g.map), addrs, size, base, 0).map(|_| ());
    for size in [1, 3, 4, 255] {
        assert_eq!(made(at, size, FRESH), Ok(()), "{size}");
    }
    for size in [0, 32_769, 65_535] {
        assert_eq!(made(at, size, FRESH), Err(Errno::EINVAL), "{size}");
    }
    // Available: up to one round ahead of used.
    for (base, good) in [
        (0x0000_0000, true),
        (0x8003_8003, true),
        (0x8000_0000, true),
        (0x8000_8003, true),
        (0x0003_8002, true),
        (0x8004_8000, false),
        (0x8000_8004, false),
        (0xffff_8000, false),
        (0x8001_8000, false),
        (0x8000_0001, false),
    ] {
        let want = if good { Ok(()) } else { Err(Errno::EINVAL) };
        assert_eq!(made(at, 4, base), want, "{base:#x}");
    }
    // The last places where each part fits, and one alignment step further.
    for (part, len, align) in [(0, 80, 16), (1, 4, 4), (2, 4, 4)] {
        let place = |addr| match part {
            0 => RingAddrs { desc: addr, ..at },
            1 => RingAddrs { avail: addr, ..at },
            _ => RingAddrs { used: addr, ..at },
        };
        let last = (end - len) / align * align;
        assert_eq!(made(place(last), 5, FRESH), Ok(()), "part {part}");
        for addr in [last + align, last - align / 2, end, u64::MAX - align + 1, 0] {
            assert_eq!(made(place(addr), 5, FRESH), Err(Errno::EINVAL), "part {part} at {addr:x}");
        }
    }
    // A refused change changes nothing.
    let g = guest(&[(0, 1, 2, 0)], &[]);
    let mut ring = ring(&g, 4, FRESH, 0);
    assert_eq!(ring.remap(Arc::default()), Err(Errno::EINVAL));
    assert_eq!(ring.pop(), Ok(Some(2)));
    assert!(Arc::ptr_eq(ring.map(), &g.map));
}

fn descriptor() -> impl Strategy<Value = Raw> {
    let addr = prop_oneof![
        6 => 0..GAP,
        2 => (0u64..8).prop_map(|n| TABLES + 16 * n),
        1 => TOUCH - 64..TOUCH + 64,
        1 => GAP - 4..GAP + 4,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0u32..5000, 4 => (0u32..10).prop_map(|n| 16 * n), 1 => any::<u32>()];
    let flags = prop_oneof![4 => 0u16..8, 2 => Just(NEXT), 2 => Just(WRITE), 1 => any::<u16>()];
    let marks = prop_oneof![4 => Just(AVAIL), 3 => Just(USED), 1 => Just(0), 1 => Just(BOTH)];
    let id = prop_oneof![9 => 0u16..9, 1 => any::<u16>()];
    (addr, len, id, (flags, marks).prop_map(|(f, m)| f & !BOTH | m))
}

/// A device's loop until the ring breaks; `check` looks at each chain. How many chains were served.
fn device_loop(ring: &mut Packed, turns: usize, mut check: impl FnMut(&Chain)) -> usize {
    let (mut chain, mut in_flight, mut served) = (Chain::default(), Vec::new(), 0);
    for turn in 0..turns {
        match ring.pop() {
            Ok(Some(id)) => {
                assert!(id < ring.size() && !in_flight.contains(&id), "id {id}");
                in_flight.push(id);
                if ring.read_chain(&mut chain).is_err() {
                    break;
                }
                check(&chain);
            }
            Ok(None) => {}
            Err(_) => break,
        }
        if turn % 3 != 0 && !in_flight.is_empty() {
            ring.push_used(in_flight.swap_remove(turn % in_flight.len()), 1);
            served += 1;
        }
        if turn % 2 == 0 {
            ring.publish();
            ring.arm_kick();
            ring.disarm_kick();
        }
        let entries =
            |ids: &[u16]| ids.iter().map(|id| ring.entries[usize::from(*id)]).sum::<u16>();
        let hidden = entries(&ring.given_back);
        assert!(entries(&in_flight) + hidden <= ring.held && ring.held <= ring.size());
        let ahead = ring.next_avail.since(ring.next_used, ring.size());
        assert_eq!(ahead, u32::from(ring.held - hidden));
    }
    // What is in flight when a ring breaks is answered all the same.
    in_flight.into_iter().for_each(|id| ring.push_used(id, 1));
    ring.publish();
    served
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_descriptors_and_events(
        table in prop::collection::vec(descriptor(), 1..9),
        inner in prop::collection::vec(descriptor(), 12),
        places in (0u16..8, 0u16..9, any::<bool>()),
        event in any::<u32>(),
        event_idx in any::<bool>(),
    ) {
        let g = Guest::new();
        let size = table.len() as u16;
        for (at, list) in [(DESC, &table), (TABLES, &inner)] {
            (0..).zip(list).for_each(|(i, d)| put_desc(&g, at, i, *d));
        }
        g.put(DRIVER, event);
        let mut used = Position { at: places.0 % size, wrap: places.2 };
        let base = u32::from(used.bits()) << 16;
        used.advance(places.1.min(size), size);
        let event = if event_idx { feature(VIRTIO_RING_F_EVENT_IDX) } else { 0 };
        let mut ring = ring(&g, size, base | u32::from(used.bits()), FEATURES | event);
        // Also checks that every range is inside of guest memory.
        device_loop(&mut ring, 40, |chain| { g.guest_ranges(&chain.iov); });
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 16 * 32), wrap in any::<bool>()) {
        let g = Guest::new();
        g.mem.write_slice(&bytes, GuestAddress(DESC)).unwrap();
        g.mem.write_slice(&bytes, GuestAddress(TABLES)).unwrap();
        let base = if wrap { FRESH } else { 0 };
        let mut ring = ring(&g, 31, base, FEATURES);
        device_loop(&mut ring, 100, |chain| { g.guest_ranges(&chain.iov); });
    }
}

/// The guest writes all over the ring while the device works on it.
#[test]
fn memory_that_changes_under_our_eyes() {
    let g = guest(&[], &[]);
    let stop = AtomicBool::new(false);
    let served = std::thread::scope(|s| {
        s.spawn(|| {
            let mut n = 0x9e37_79b9_7f4a_7c15u64;
            while !stop.load(Ordering::Relaxed) {
                n = n
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let [a, b, c, d] = [n >> 60, n >> 50, n >> 40, n >> 32].map(|v| v as u16);
                let mark = if b & 1 == 0 { AVAIL } else { USED };
                let flags = mark | (if c & 7 == 0 { NEXT } else { 0 }) | (d & WRITE);
                let addr = if d & 0x30 == 0 { GAP } else { u64::from(c & 0xfff) };
                put_desc(&g, DESC, a % 8, (addr, u32::from(b & 0xff), b >> 1 & 7, flags));
                g.put(DRIVER, (n >> 20) as u32);
            }
        });
        let (mut served, start) = (0, std::time::Instant::now());
        let mut rounds = 0;
        // The guest may be slow to begin.
        while rounds < 2000 || served == 0 && start.elapsed().as_secs() < 60 {
            rounds += 1;
            let mut ring = ring(&g, 8, FRESH, FEATURES);
            served += device_loop(&mut ring, 200, |chain| {
                g.guest_ranges(&chain.iov);
            });
        }
        stop.store(true, Ordering::Relaxed);
        served
    });
    assert!(served > 0, "nothing was ever served");
}
