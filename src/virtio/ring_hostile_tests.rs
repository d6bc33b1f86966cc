//! Rings full of lies: each is [`Broken`] or [`Chain::bad`] as documented, and none is a panic.

use super::*;

type Raw = (u64, u32, u16, u16);

const FEATURES: u64 = feature(VIRTIO_RING_F_INDIRECT_DESC);
const GAP: u64 = REGIONS[1].0 + REGIONS[1].1;

/// Reads chain 0 of a ring of four whose table begins with `direct`, with `table` at [`TABLES`].
fn read(direct: &[Raw], table: &[Raw], features: u64) -> Result<Chain, Broken> {
    let g = Guest::new();
    for i in 0..4 {
        g.put_desc(DESC, i, (0, 0, 0, 0));
    }
    for (at, list) in [(DESC, direct), (TABLES, table)] {
        (0..).zip(list).for_each(|(i, d)| g.put_desc(at, i, *d));
    }
    let mut ring = g.offering(4, 0, features);
    assert_eq!(ring.available(), Ok(1));
    let mut chain = Chain::default();
    let head = ring.pop()?;
    ring.read_chain(head, &mut chain)?;
    Ok(chain)
}

fn broken(direct: &[Raw], table: &[Raw], features: u64) -> &'static str {
    read(direct, table, features).err().expect("a lie that was believed").0
}

#[test]
fn lies_about_structure_break_the_ring() {
    let loops = "a chain that is too long or loops";
    let outside = "a link outside of the descriptor table";
    let one: &[Raw] = &[(TABLES, 16, INDIRECT, 0)];
    let two: &[Raw] = &[(TABLES, 32, INDIRECT, 0)];
    for (direct, table, want) in [
        // The ring's own table.
        (&[(0, 1, NEXT, 0)][..], &[][..], loops),
        (&[(0, 1, NEXT, 1), (0, 1, NEXT, 2), (0, 1, NEXT, 1)], &[], loops),
        (&[(0, 1, NEXT, 4)], &[], outside),
        (&[(0, 1, NEXT, 0xffff)], &[], outside),
        // Indirect tables.
        (one, &[(0, 1, NEXT, 0)], loops),
        (two, &[(0, 1, NEXT, 1), (0, 1, NEXT, 0)], loops),
        (one, &[(0, 1, NEXT, 1)], outside),
        (one, &[(TABLES, 16, INDIRECT, 0)], "an indirect descriptor in an indirect table"),
        (
            &[(TABLES, 16, INDIRECT | NEXT, 1)],
            &[(0, 1, 0, 0)],
            "an indirect descriptor with a next one",
        ),
        (&[(TABLES, 0, INDIRECT, 0)], &[], "an indirect table of a bad length"),
        (&[(TABLES, 15, INDIRECT, 0)], &[], "an indirect table of a bad length"),
        (&[(TABLES, 24, INDIRECT, 0)], &[], "an indirect table of a bad length"),
        (&[(GAP, 16, INDIRECT, 0)], &[], "an indirect table outside of guest memory"),
        (&[(GAP - 8, 16, INDIRECT, 0)], &[], "an indirect table outside of guest memory"),
        (&[(TOUCH - 16, 32, INDIRECT, 0)], &[], "an indirect table outside of guest memory"),
        (&[(u64::MAX - 7, 16, INDIRECT, 0)], &[], "an indirect table outside of guest memory"),
        (&[(TABLES, 0xffff_fff0, INDIRECT, 0)], &[], "an indirect table outside of guest memory"),
    ] {
        assert_eq!(broken(direct, table, FEATURES), want, "{direct:x?} {table:x?}");
    }
    let want = "an indirect descriptor without VIRTIO_F_INDIRECT_DESC";
    assert_eq!(broken(one, &[(0, 1, 0, 0)], 0), want);
}

#[test]
fn the_longest_chains() {
    // As many as the ring has, then one indirect table.
    let chain = read(
        &[(0, 1, NEXT, 1), (0, 1, NEXT, 2), (0, 1, NEXT, 3), (TABLES, 16, INDIRECT, 0)],
        &[(0, 1, WRITE, 0)],
        FEATURES,
    );
    assert_eq!(chain.map(|c| (c.iov.len(), c.readable)), Ok((4, 3)));
    // Tables may be longer than the ring, up to CHAIN_MAX descriptors in use.
    let long = |n: u16| -> Vec<Raw> {
        (1..=n).map(|i| (0, 1, if i < n { NEXT } else { WRITE }, i)).collect()
    };
    let max = u16::try_from(CHAIN_MAX).unwrap();
    let table = |n: u16| [(TABLES, 16 * u32::from(n), INDIRECT, 0)];
    let chain = read(&table(max), &long(max), FEATURES);
    assert_eq!(chain.map(|c| (c.iov.len(), c.bad)), Ok((CHAIN_MAX, None)));
    let text = broken(&table(max + 1), &long(max + 1), FEATURES);
    assert_eq!(text, "a chain that is too long or loops");
    // A longer table of which little is used is no lie.
    let chain = read(&table(2 * max), &long(3), FEATURES);
    assert_eq!(chain.map(|c| c.iov.len()), Ok(3));
}

#[test]
fn lies_about_memory_spoil_the_chain_only() {
    let outside = Some("a descriptor outside of guest memory");
    let order = Some("a descriptor to read after one to write");
    for (direct, bad) in [
        (&[(GAP, 1, NEXT, 1), (8, 1, WRITE, 0)][..], outside),
        (&[(GAP - 1, 2, NEXT, 1), (8, 1, WRITE, 0)], outside),
        (&[(u64::MAX, 2, NEXT, 1), (8, 1, WRITE, 0)], outside),
        (&[(0, u32::MAX, NEXT, 1), (8, 1, WRITE, 0)], outside),
        (&[(8, 1, NEXT | WRITE, 1), (0, 1, NEXT, 2), (8, 1, WRITE, 0)], order),
        // Nobody reads zero bytes, and where they are does not matter.
        (&[(GAP, 0, NEXT, 1), (8, 1, WRITE, 0)], None),
    ] {
        let chain = read(direct, &[], FEATURES).unwrap_or_else(|b| panic!("{direct:x?}: {b:?}"));
        assert_eq!(chain.bad, bad, "{direct:x?}");
        let last = chain.iov[chain.readable..].last().expect("the status byte is reachable");
        assert_eq!(last.len(), 1, "{direct:x?}");
    }
}

#[test]
fn heads_and_indices() {
    let g = Guest::new();
    for (head, good) in [(0u16, true), (3, true), (4, false), (0xffff, false)] {
        let mut ring = g.offering(4, head, FEATURES);
        let want =
            if good { Ok(head) } else { Err(Broken("a head outside of the descriptor table")) };
        assert_eq!(ring.pop(), want);
    }
    for (jump, good) in [(0u16, true), (4, true), (5, false), (0xffff, false), (0x8000, false)] {
        let ring = g.ring(4, 65533, FEATURES);
        g.put(AVAIL + 2, 65533u16.wrapping_add(jump));
        let text = "avail.idx is ahead by more than the ring's size";
        assert_eq!(ring.available(), if good { Ok(jump) } else { Err(Broken(text)) });
        assert_eq!(ring.has_avail(), jump != 0);
    }
}

#[test]
fn rings_must_lie_in_memory() {
    let g = Guest::new();
    let at = Guest::addrs();
    let end = user_addr(0) + REGIONS[0].1;
    let made = |addrs, size| Ring::new(Arc::clone(&g.map), addrs, size, 0, 0).map(|_| ());
    assert_eq!(made(at, 4), Ok(()));
    for size in [0, 3, 255] {
        assert_eq!(made(at, size), Err(Errno::EINVAL), "{size}");
    }
    // The last places where each part fits, and one alignment step further.
    for (part, len, align) in [(0, 64, 16), (1, 14, 2), (2, 38, 4)] {
        let place = |addr| match part {
            0 => RingAddrs { desc: addr, ..at },
            1 => RingAddrs { avail: addr, ..at },
            _ => RingAddrs { used: addr, ..at },
        };
        let last = (end - len) / align * align;
        assert_eq!(made(place(last), 4), Ok(()), "part {part}");
        for addr in [last + align, last - align / 2, end, u64::MAX - align + 1, 0] {
            assert_eq!(made(place(addr), 4), Err(Errno::EINVAL), "part {part} at {addr:x}");
        }
    }
    // A refused change changes nothing.
    let mut ring = g.offering(4, 2, 0);
    assert_eq!(ring.remap(Arc::default()), Err(Errno::EINVAL));
    assert_eq!((ring.available(), ring.pop()), (Ok(1), Ok(2)));
    assert!(Arc::ptr_eq(ring.map(), &g.map));
}

/// What the model makes of a chain: `None` is broken. A bad chain's ranges are not compared.
#[derive(Debug, PartialEq)]
enum Verdict {
    Broken,
    Bad,
    Good(Vec<(u64, u64)>, Vec<(u64, u64)>),
}

fn mapped(addr: u64, len: u64) -> bool {
    // Byte by region: the first two regions are one piece.
    let pieces = [(0, GAP), REGIONS[2]];
    pieces.iter().any(|(at, size)| {
        addr >= *at && u128::from(addr) + u128::from(len) <= u128::from(at + size)
    })
}

fn in_one_region(addr: u64, len: u64) -> bool {
    REGIONS.iter().any(|(at, size)| {
        addr >= *at && u128::from(addr) + u128::from(len) <= u128::from(at + size)
    })
}

/// The descriptors of a chain in a table, or `None` for a structure that is a lie.
fn follow(g: &Guest, table: u64, size: u64, from: u16, most: u64) -> Option<Vec<Descriptor>> {
    let (mut out, mut at) = (Vec::new(), Some(from));
    while let Some(index) = at {
        if u64::from(index) >= size || out.len() as u64 == most {
            return None;
        }
        let raw: RawDescriptor =
            g.mem.read_obj(GuestAddress(table + 16 * u64::from(index))).unwrap();
        let d = Descriptor::from(raw);
        at = d.has_next().then(|| d.next());
        out.push(d);
        // What follows an indirect descriptor is not looked at: the two together are a lie.
        if d.refers_to_indirect_table() {
            break;
        }
    }
    Some(out)
}

fn model(g: &Guest, size: u16, head: u16) -> Verdict {
    let size = u64::from(size);
    let Some(mut all) = follow(g, DESC, size, head, size) else { return Verdict::Broken };
    if let Some(last) = all.pop_if(|d| d.refers_to_indirect_table()) {
        let (len, entries) = (u64::from(last.len()), u64::from(last.len()) / 16);
        if last.has_next() || len == 0 || len % 16 != 0 || !in_one_region(last.addr().0, len) {
            return Verdict::Broken;
        }
        let most = entries.min(CHAIN_MAX as u64);
        match follow(g, last.addr().0, entries, 0, most) {
            Some(inner) if inner.iter().all(|d| !d.refers_to_indirect_table()) => all.extend(inner),
            _ => return Verdict::Broken,
        }
    }
    all.retain(|d| d.len() > 0 || !d.is_write_only());
    let first_write = all.iter().position(Descriptor::is_write_only).unwrap_or(all.len());
    let good = all.iter().enumerate().all(|(i, d)| {
        mapped(d.addr().0, d.len().into()) || d.len() == 0
    } && (i < first_write) != d.is_write_only());
    let side = |part: &[Descriptor]| joined(part.iter().map(|d| (d.addr().0, d.len().into())));
    let (readable, writable) = all.split_at(first_write);
    if good { Verdict::Good(side(readable), side(writable)) } else { Verdict::Bad }
}

fn ours(g: &Guest, ring: &Ring, head: u16) -> Verdict {
    let mut chain = Chain::default();
    if ring.read_chain(head, &mut chain).is_err() {
        return Verdict::Broken;
    }
    assert!(chain.iov.len() <= 2 * (CHAIN_MAX + 256) && chain.readable <= chain.iov.len());
    // Also checks that every range, of bad chains too, is inside of guest memory.
    let (readable, writable) = chain.iov.split_at(chain.readable);
    let sides = (g.guest_ranges(readable), g.guest_ranges(writable));
    if chain.bad.is_some() { Verdict::Bad } else { Verdict::Good(sides.0, sides.1) }
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 0..GAP,
        2 => Just(TABLES),
        2 => (0u64..8).prop_map(|n| TABLES + 16 * n),
        1 => (0u64..4).prop_map(|n| TOUCH - 16 * n),
        1 => TOUCH - 64..TOUCH + 64,
        1 => GAP - 4..GAP + 4,
        1 => REGIONS[2].0 - 4..REGIONS[2].0 + 4,
        1 => u64::MAX - 32..=u64::MAX,
        1 => any::<u64>(),
    ]
}

fn descriptor() -> impl Strategy<Value = Raw> {
    let len = prop_oneof![
        4 => 0u32..5000,
        4 => (0u32..10).prop_map(|n| 16 * n),
        1 => Just(16 * 1025),
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![8 => 0u16..8, 4 => Just(NEXT), 2 => Just(WRITE), 1 => any::<u16>()];
    (address(), len, flags, prop_oneof![9 => 0u16..9, 1 => any::<u16>()])
}

fn check_every_head(g: &Guest, size: u16) {
    let ring = g.ring(size, 0, FEATURES);
    for head in 0..size {
        assert_eq!(ours(g, &ring, head), model(g, size, head), "head {head}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn likely_lies(
        table in prop::collection::vec(descriptor(), 8),
        inner in prop::collection::vec(descriptor(), 12),
        edge in prop::collection::vec(descriptor(), 8),
    ) {
        let g = Guest::new();
        for (at, list) in [(DESC, &table), (TABLES, &inner), (TOUCH - 64, &edge)] {
            (0..).zip(list).for_each(|(i, d)| g.put_desc(at, i, *d));
        }
        check_every_head(&g, 8);
    }

    #[test]
    fn any_bytes_in_tables(bytes in prop::collection::vec(any::<u8>(), 16 * 32)) {
        let g = Guest::new();
        g.mem.write_slice(&bytes, GuestAddress(DESC)).unwrap();
        g.mem.write_slice(&bytes, GuestAddress(TABLES)).unwrap();
        check_every_head(&g, 32);
    }

    /// The whole of a device's loop on rings of which nothing is true.
    #[test]
    fn any_bytes_in_rings(
        table in prop::collection::vec(descriptor(), 8),
        avail in prop::collection::vec(prop_oneof![3 => 0u16..9, 1 => any::<u16>()], 11),
        used in prop::collection::vec(any::<u8>(), 6 + 64),
        base in prop_oneof![3 => 0u16..9, 1 => any::<u16>()],
        event_idx in any::<bool>(),
    ) {
        let g = Guest::new();
        (0..).zip(&table).for_each(|(i, d)| g.put_desc(DESC, i, *d));
        (0..).zip(&avail).for_each(|(i, v)| g.put(AVAIL + 2 * i, *v));
        g.mem.write_slice(&used, GuestAddress(USED)).unwrap();
        let event = if event_idx { feature(VIRTIO_RING_F_EVENT_IDX) } else { 0 };
        let mut ring = g.ring(8, base, FEATURES | event);
        let ahead = avail[1].wrapping_sub(base);
        prop_assert_eq!(ring.available().ok(), (ahead <= 8).then_some(ahead));
        let mut chain = Chain::default();
        for i in 0..ring.available().unwrap_or(0) {
            let at = usize::from(base.wrapping_add(i) & 7);
            let head = ring.pop();
            prop_assert_eq!(head.ok(), Some(avail[2 + at]).filter(|h| *h < 8));
            let Ok(head) = head else { break };
            if ring.read_chain(head, &mut chain).is_err() {
                break;
            }
            g.guest_ranges(&chain.iov);
            let before = g.get(USED + 2);
            ring.push_used(head, 1);
            ring.arm_kick();
            ring.publish(true);
            ring.disarm_kick();
            prop_assert_eq!(g.get(USED + 2), before.wrapping_add(1));
        }
    }
}
