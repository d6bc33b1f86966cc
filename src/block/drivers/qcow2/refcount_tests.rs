use std::collections::BTreeSet;

use proptest::prelude::*;

use super::rig::{Rig, geometry};
use super::*;

/// One step of a random life: what, and two numbers to choose with.
type Step = (u8, u16, u64);

fn live(rig: &mut Rig, steps: &[Step]) {
    for (what, a, b) in steps {
        let choice = |len: usize| usize::from(*a) % len.max(1);
        let user: Vec<u64> = rig.model.keys().copied().filter(|c| *c > 0).collect();
        match what {
            0..8 => {
                let goal = (b % 3 == 0).then(|| b / 3 % (rig.refs.end() + 3));
                rig.allocate(u64::from(a % 40) + 1, goal);
            }
            8..10 => {
                rig.reserve(u64::from(a % 40) + 1);
            }
            10..13 if !rig.reserved.is_empty() => {
                let first = *rig.reserved.iter().nth(choice(rig.reserved.len())).unwrap();
                // Neighbours may be of another reservation: one at a time is always right.
                rig.claim(first, 1);
            }
            13 if !rig.reserved.is_empty() => {
                let first = *rig.reserved.iter().nth(choice(rig.reserved.len())).unwrap();
                let end = first + b % 40;
                rig.refs.unreserve(first, b % 40);
                rig.reserved.retain(|c| !(first..end).contains(c));
            }
            14..19 if !user.is_empty() => {
                for n in 0..b % 30 {
                    let cluster = user[(usize::from(*a) + n as usize * 7) % user.len()];
                    if rig.model.contains_key(&cluster) {
                        rig.release(cluster);
                    }
                }
            }
            19 => {
                let cluster = b % (rig.refs.end() + 100);
                let count = rig.ask(|refs| refs.get(cluster)).unwrap();
                let expected = rig.model.get(&cluster).copied();
                let expected = expected.unwrap_or(u64::from(rig.metadata.contains(&cluster)));
                assert_eq!(count, expected, "{cluster}");
            }
            20..23 => rig.snapshot(),
            23..25 => rig.finish(),
            25..28 => {
                rig.snapshot();
                rig.fail(choice(3), *b);
            }
            28 => rig.crash(choice(3), *b),
            _ => {}
        }
    }
    rig.sync();
}

fn steps(n: usize) -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec((0u8..29, any::<u16>(), any::<u64>()), 1..n)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_width_is_kept(
        order in 0u32..=6, bits in 9u32..=13, more in prop_oneof![0u64..40, 0u64..2000], room in 0u64..3000, slots in 1usize..5,
        steps in steps(80),
    ) {
        live(&mut Rig::new(geometry(bits, order), 1, more, room, slots), &steps);
    }
}

proptest! {
    // Each case looks at thousands of refcounts after each step.
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// The table is almost full at the start: it moves, often more than once.
    #[test]
    fn tables_grow(more in 0u64..100, room in 0u64..20_000, slots in 1usize..5, steps in steps(60)) {
        live(&mut Rig::new(geometry(9, 6), 64, more, room, slots), &steps);
    }
}

/// A table moves, or a block is new: whatever arrives of what is written then, nothing that is in use becomes free.
#[test]
fn a_table_can_be_cut_off_anywhere() {
    let cases =
        (0..3).flat_map(|phase| [0, u64::MAX, 0x5555_5555, 0xaaaa_aaaa].map(|c| (phase, c)));
    for ((phase, chosen), regions) in cases.flat_map(|case| [(case, 64), (case, 20)]) {
        for then in 0..3 {
            let mut rig = Rig::new(geometry(9, 6), regions, 0, 20_000, 2);
            rig.allocate(63, None).unwrap();
            rig.sync();
            // The first cluster that the first table, or the last block, does not know.
            let old = rig.metadata.len();
            rig.allocate(30, None).unwrap();
            assert!(rig.metadata.len() > old);
            rig.snapshot();
            rig.allocate(2, None).unwrap();
            rig.fail(phase, chosen);
            // The old table must not be had yet: the header may point to it.
            let run = rig.allocate(1, None).unwrap();
            assert!(run.first > 4000 || regions < 64);
            match then {
                0 => rig.crash(0, 0),
                1 => {
                    rig.snapshot();
                    rig.crash(2 - phase, !chosen);
                }
                _ => rig.sync(),
            }
            rig.allocate(100, None).unwrap();
            rig.sync();
        }
    }
}

/// The allocator fills one region after the other; clusters that are freed come next, the lowest first.
#[test]
fn low_clusters_come_first() {
    let mut rig = Rig::new(geometry(9, 6), 1, 0, 1000, 2);
    let firsts: Vec<Run> = (0..70).map(|_| rig.allocate(1, None).unwrap()).collect();
    assert_eq!(firsts[0], Run { first: 3, count: 1, fresh: true });
    assert_eq!(firsts[60].first, 63);
    assert_eq!(firsts[61].first, 65, "behind the new block");
    for cluster in [40, 10, 66] {
        rig.release(cluster);
    }
    let again: Vec<Run> = (0..4).map(|_| rig.allocate(1, None).unwrap()).collect();
    assert_eq!(again.iter().map(|r| r.first).collect::<Vec<_>>(), [10, 40, 66, 74]);
    assert_eq!(again.iter().map(|r| r.fresh).collect::<Vec<_>>(), [false, false, false, true]);
    rig.sync();
}

#[test]
fn a_goal_is_taken_if_it_can_be() {
    let mut rig = Rig::new(geometry(9, 6), 1, 0, 1000, 2);
    let first = |run: Option<Run>| run.map(|run| (run.first, run.count));
    assert_eq!(first(rig.allocate(4, None)), Some((3, 4)));
    assert_eq!(first(rig.allocate(4, Some(7))), Some((7, 4)));
    rig.release(4);
    rig.release(5);
    assert_eq!(first(rig.allocate(4, Some(11))), Some((11, 4)), "not the low hole");
    assert_eq!(first(rig.allocate(4, Some(11))), Some((4, 2)), "not free");
    assert_eq!(first(rig.allocate(1, Some(900))), Some((15, 1)), "beyond the end");
    assert_eq!(first(rig.allocate(60, Some(16))), Some((16, 48)), "up to the boundary");
    assert_eq!(first(rig.allocate(3, Some(64))), Some((65, 3)), "a block was made there");
}

#[test]
fn a_reservation_is_left_alone() {
    let mut rig = Rig::new(geometry(16, 4), 1, 0, 1 << 20, 1);
    assert_eq!(rig.reserve(16), Some(Run { first: 3, count: 16, fresh: true }));
    assert_eq!(rig.reserve(16).unwrap().first, 19);
    assert_eq!(rig.allocate(1, Some(10)).unwrap().first, 35);
    // In any order.
    for (first, count) in [(10, 4), (3, 1), (18, 1)] {
        rig.claim(first, count);
    }
    rig.sync();
    rig.refs.unreserve(0, 12);
    rig.reserved.retain(|c| *c >= 12);
    let run = rig.allocate(100, None).unwrap();
    assert_eq!(run, Run { first: 4, count: 6, fresh: false });
    rig.sync();
}

/// A run that is long enough is worth more than a low one.
#[test]
fn reservations_pass_over_small_holes() {
    let mut rig = Rig::new(geometry(9, 4), 1, 0, 10_000, 4);
    while rig.allocate(256, None).unwrap().first < 600 {}
    for cluster in (10..200).step_by(5).chain(300..318) {
        rig.release(cluster);
    }
    let first = |run: Option<Run>| run.map(|run| (run.first, run.count));
    assert_eq!(first(rig.reserve(30)), Some((300, 18)), "more than half");
    let next = rig.reserve(30).unwrap();
    assert!(next.first > 600 && next.count == 30);
    assert_eq!(first(rig.reserve(1)), Some((10, 1)));
}

#[test]
fn a_full_device_can_be_used_again() {
    for room in 0..200 {
        let mut rig = Rig::new(geometry(9, 6), 1, 0, room, 1);
        let mut got = Vec::new();
        while let Some(run) = rig.allocate(5, None) {
            got.extend(run.first..run.first + run.count);
        }
        // The last cluster cannot hold both a block and something that it describes.
        let unused = u64::from((room + 3) % 64 == 1 && room > 3);
        let blocks = (room + 3).div_ceil(64) - 1 - unused;
        assert_eq!(got.len() as u64, room - blocks - unused, "{room}");
        assert_eq!((rig.allocate(1, None), rig.reserve(9)), (None, None));
        if let Some(cluster) = got.get(got.len() / 2) {
            rig.release(*cluster);
            assert_eq!(rig.reserve(9).unwrap().first, *cluster);
            assert_eq!((rig.allocate(1, None), rig.reserve(1)), (None, None));
            rig.claim(*cluster, 1);
        }
        rig.sync();
    }
}

/// With 64 KiB clusters a table of one cluster is enough for 16 TiB.
#[test]
fn a_large_table_grows() {
    let g = geometry(16, 4);
    let base = 8192 << g.refblock_bits();
    // Where the file ends; if it is longer, there is garbage in it.
    for end in [3, base + 100] {
        let mut disk = Rig::new(g, 1, 0, 0, 1).disk;
        if end > base {
            (base..base + 3).for_each(|cluster| disk.fill(&g, cluster));
        }
        let mut rig = Rig::open(g, disk, end, 1 << 30, 4);
        (0..8192).for_each(|region| rig.refs.rooms.note(region, 0));
        // Behind a block and a table of two clusters.
        let run = rig.allocate(7, None);
        assert_eq!(run, Some(Run { first: base + 3, count: 7, fresh: end < base }));
        rig.flush();
        let new = [base, base + 1, base + 2];
        // The block that describes the old table is not cached.
        assert_eq!(rig.metadata, BTreeSet::from_iter([1, 2].into_iter().chain(new)));
        rig.sync();
        assert_eq!(rig.metadata, BTreeSet::from_iter([2].into_iter().chain(new)));
        assert_eq!(rig.refs.memory(), 2 * 65536);
        assert_eq!(rig.allocate(9, None), Some(Run { first: 1, count: 1, fresh: false }));
    }
}

#[test]
fn a_table_of_8_mib_is_the_longest() {
    let g = geometry(9, 6);
    let max = u32::try_from(MAX_REFTABLE_SIZE >> 9).unwrap();
    let new =
        |clusters| Refcounts::new(g, Vec::new(), HostOffset(512), clusters, 1 << 30, u64::MAX, 1);
    assert_eq!(new(max + 1).err(), Some(Errno::EINVAL));
    // The new clusters must have entries for all blocks that describe the table.
    for (clusters, expected) in
        [(max - 5, Some(max)), (max - 4, None), (max, None), (max / 2, Some(max / 4 * 3))]
    {
        let growth = new(clusters).unwrap().table.plan_growth(u64::MAX);
        assert_eq!(growth.map(|g| g.clusters), expected.map(u64::from));
    }
}
