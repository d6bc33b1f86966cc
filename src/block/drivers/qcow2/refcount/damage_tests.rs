use proptest::prelude::*;

use super::super::rig::{Disk, Rig, geometry, open};
use super::super::{Blocked, Refcounts};
use super::*;
use crate::block::drivers::qcow2::layout::{Geometry, refcount_set};
use crate::error::Errno;

/// A file of 100 clusters of 512 bytes, with a table of 64 entries in cluster 1.
const END: u64 = 100;

fn refs(g: Geometry, words: &[u64]) -> Refcounts {
    Refcounts::new(g, words.to_vec(), HostOffset(512), 1, END, 1 << 20, 2).unwrap()
}

fn corrupt<T: fmt::Debug>(answer: Result<T, Blocked>) -> String {
    match answer {
        Err(Blocked::Corrupt(damage)) => damage.to_string(),
        other => panic!("{other:?}"),
    }
}

/// The block of the first region, with these refcounts.
fn block(counts: &[u64]) -> Vec<u8> {
    let mut block = vec![0; 512];
    counts.iter().enumerate().for_each(|(n, count)| refcount_set(&mut block, 6, n, *count));
    block
}

#[test]
fn entries_that_cannot_be_true() {
    let g = geometry(9, 6);
    let texts = [
        (0x401, "Refcount table entry has reserved bits set (reftable index: 0x1)"),
        (END << 9, "Refblock offset 0xc800 cannot be true (reftable index: 0x1)"),
        (1 << 56, "Refblock offset 0x100000000000000 cannot be true (reftable index: 0x1)"),
        // Block 0; the table.
        (0x400, "Refblock offset 0x400 cannot be true (reftable index: 0x1)"),
        (0x200, "Refblock offset 0x200 cannot be true (reftable index: 0x1)"),
    ];
    for (word, text) in texts {
        let mut refs = refs(g, &[0x400, word]);
        assert_eq!(corrupt(refs.get(64)), text);
        assert_eq!(corrupt(refs.release(64)), text);
        assert_eq!(corrupt(refs.allocate(1, Some(64))), text);
        // Elsewhere all is well, if the block is not in two places.
        if word != 0x400 {
            assert_eq!(refs.get(0), Err(Blocked::Load { index: 0, offset: HostOffset(0x400) }));
            refs.load(0, &block(&[1, 1, 1])).unwrap();
            assert_eq!(refs.get(2), Ok(1));
        }
        assert!(!refs.is_dirty());
    }
    let mut refs = refs(geometry(12, 4), &[0x1200]);
    assert_eq!(corrupt(refs.get(0)), "Refblock offset 0x1200 unaligned (reftable index: 0)");
}

#[test]
fn the_table_must_be_in_the_file() {
    let new = |offset, end| {
        Refcounts::new(geometry(9, 6), Vec::new(), HostOffset(offset), 2, end, 1000, 1)
    };
    assert_eq!(new(98 << 9, END).err(), None);
    assert_eq!(new(99 << 9, END).err(), Some(Errno::EINVAL));
    assert_eq!(new(1 << 60, u64::MAX).err(), Some(Errno::EINVAL));
}

#[test]
fn metadata_has_refcount_1() {
    let wrong: [(&[u64], &str); 4] = [
        (&[0, 1, 1], "Preventing invalid allocation of refcount block at offset 0"),
        (&[1, 0, 1], "Refcount of the metadata at offset 0x200 is 0"),
        (&[1, 1, 2], "Refcount of the metadata at offset 0x400 is 2"),
        (&[1, 2, 1], "Refcount of the metadata at offset 0x200 is 2"),
    ];
    for (counts, text) in wrong {
        let mut refs = refs(geometry(9, 6), &[0x400]);
        assert_eq!(corrupt(refs.load(0, &block(counts))), text);
        assert_eq!(refs.memory(), 0);
    }
    // Where there is no block all refcounts are 0.
    let mut refs1 = refs(geometry(9, 6), &[]);
    let text = "Preventing invalid allocation of refcount block at offset 0";
    assert_eq!(corrupt(refs1.allocate(1, None)), text);
    assert_eq!(corrupt(refs1.reserve(1)), text);
    // Block 0 is in a region that has none.
    let mut refs2 = refs(geometry(9, 6), &[66 << 9]);
    refs2.load(0, &block(&[1; 64])).unwrap();
    let text = "Refcount of the metadata at offset 0x8400 is 0";
    assert_eq!(corrupt(refs2.allocate(1, None)), text);
    assert!(!refs2.is_dirty() && refs2.take_changes().is_empty());
}

#[test]
fn what_cannot_be_freed() {
    let mut refs = refs(geometry(9, 6), &[0x400]);
    refs.load(0, &block(&[1, 1, 1, 1])).unwrap();
    for cluster in 0..3 {
        let text = format!(
            "Preventing invalid freeing of metadata at offset {}",
            ["0", "0x200", "0x400"][cluster as usize]
        );
        assert_eq!(corrupt(refs.release(cluster)), text);
    }
    assert_eq!(refs.release(3), Ok(0));
    for cluster in [3, 4, 64, 1 << 40] {
        let text =
            format!("Refcount of the cluster to be freed at offset {:#x} is 0", cluster << 9);
        assert_eq!(corrupt(refs.release(cluster)), text);
    }
}

/// Somebody else writes to the file while a cluster is set aside.
#[test]
fn a_reserved_cluster_is_in_use() {
    let mut refs =
        Refcounts::new(geometry(9, 6), vec![0x400, 64 << 9], HostOffset(512), 1, END, 1000, 1)
            .unwrap();
    refs.load(0, &block(&[1, 1, 1])).unwrap();
    assert_eq!(refs.reserve(4).unwrap().first, 3);
    refs.load(1, &block(&[1])).unwrap();
    refs.load(0, &block(&[1, 1, 1, 0, 1])).unwrap();
    let text = "Refcount of the free cluster at offset 0x800 has changed";
    assert_eq!(corrupt(refs.claim(3, 2)), text);
    assert_eq!((refs.get(3), refs.is_dirty()), (Ok(0), false));
    refs.claim(3, 1).unwrap();
}

/// A small change is a small write; new blocks are written whole where there may be garbage.
#[test]
fn only_changed_pieces_are_written() {
    let g = geometry(16, 4);
    let sizes = |rig: &mut Rig| -> Vec<usize> {
        rig.snapshot();
        let sizes = rig.pending.as_ref().unwrap().0.blocks.iter().map(|(_, bytes)| bytes.len());
        let sizes = sizes.collect();
        rig.finish();
        sizes
    };
    // The file is as long as it must be, or longer.
    for end in [3, 32769] {
        let disk = Rig::new(g, 1, 0, 0, 1).disk;
        let mut rig = Rig::open(g, disk, end, 1 << 20, 2);
        rig.refs.rooms.note(0, 0);
        rig.allocate(1, None).unwrap();
        assert_eq!(sizes(&mut rig), [if end > 32768 { 65536 } else { 4096 }]);
        rig.allocate(1, None).unwrap();
        assert_eq!(sizes(&mut rig), [4096]);
        // 2048 refcounts are a piece. Cluster 32768 is the block, and two are in use.
        assert_eq!(rig.refs.allocate(4100, None).unwrap().first, 32771);
        assert_eq!(sizes(&mut rig), [12288]);
        assert_eq!(rig.refs.release(32771), Ok(0));
        assert_eq!(rig.refs.release(32768 + 4096), Ok(0));
        assert_eq!(sizes(&mut rig), [4096, 4096]);
        assert_eq!(sizes(&mut rig), [0; 0]);
    }
}

/// What changes while it is written stays in memory, and is written again; so is what could not be written.
#[test]
fn writing_ends_when_it_has_ended() {
    let mut refs =
        Refcounts::new(geometry(9, 6), vec![0x400, 64 << 9], HostOffset(512), 1, END, 1000, 1)
            .unwrap();
    refs.load(0, &block(&[1, 1, 1])).unwrap();
    refs.allocate(1, None).unwrap();
    let first = refs.snapshot();
    assert!(!refs.is_dirty());
    assert_eq!(refs.load(1, &block(&[1])), Err(Blocked::CacheFull), "it is being written");
    refs.allocate(1, None).unwrap();
    assert!(refs.is_dirty());
    assert_eq!(first.blocks, [(HostOffset(0x400), block(&[1, 1, 1, 1]))], "a copy");
    refs.written(first, true);
    assert_eq!(refs.load(1, &block(&[1])), Err(Blocked::CacheFull), "it is dirty");
    for ok in [false, true] {
        let again = refs.snapshot();
        assert_eq!(again.blocks, [(HostOffset(0x400), block(&[1, 1, 1, 1, 1]))]);
        assert_eq!(again.table.len() + again.header.iter().len(), 0);
        refs.written(again, ok);
        assert_eq!(refs.is_dirty(), !ok);
    }
    assert_eq!(refs.load(1, &block(&[1])), Ok(()));
    assert_eq!(refs.memory(), 512);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any table and any blocks: answers, never a panic, and metadata that is known is never handed out.
    #[test]
    fn hostile_images(
        words in proptest::collection::vec((0u64..120, any::<u8>()), 0..64),
        bytes in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..50),
        order in 0u32..=6, asks in proptest::collection::vec((0u8..6, 0u64..8000), 1..40),
    ) {
        let g = geometry(9, order);
        let mut disk = Disk::default();
        disk.write(48, &[0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1]);
        for (n, (cluster, odd)) in words.iter().enumerate() {
            let odd = if *odd == 0 { 8 } else { 0 };
            disk.write(512 + n as u64 * 8, &(cluster << 9 | odd).to_be_bytes());
        }
        // Most have a first block that is all right.
        disk.write(512, &(2u64 << 9).to_be_bytes());
        let mut first = vec![0; 512];
        (0..3).for_each(|n| refcount_set(&mut first, order, n, 1));
        disk.write(1024, &first);
        for (at, byte) in bytes {
            disk.write(1024 + u64::from(at) % (98 * 512), &[byte]);
        }
        let mut refs = open(&g, &disk, END, 9000, 3);
        let mut reserved = Vec::new();
        for (what, n) in asks {
            for _ in 0..200 {
                let tables: Vec<_> = refs.tables().collect();
                let answer = match what {
                    0 | 1 => refs.allocate(n % 50 + 1, (what == 1).then_some(n)).map(Some),
                    2 => refs.reserve(n % 50 + 1).map(Some),
                    3 => refs.release(n % 120).map(|_| None),
                    4 => refs.get(n).map(|_| None),
                    _ => match reserved.pop() {
                        Some((first, count)) => refs.claim(first, count).map(|()| None),
                        None => Ok(None),
                    },
                };
                match answer {
                    Ok(Some(run)) => {
                        prop_assert!(run.first > 0);
                        for (first, count) in tables {
                            prop_assert!(first + count <= run.first || first >= run.first + run.count);
                        }
                        if what == 2 {
                            reserved.push((run.first, run.count));
                        }
                    }
                    Err(Blocked::Load { index, offset }) => {
                        let loaded = refs.load(index, &disk.read(offset.0, 512));
                        if loaded.is_ok() {
                            continue;
                        }
                    }
                    Err(Blocked::CacheFull) => {
                        let snapshot = refs.snapshot();
                        for (offset, bytes) in &snapshot.blocks {
                            disk.write(offset.0, bytes);
                        }
                        refs.written(snapshot, true);
                        continue;
                    }
                    _ => {}
                }
                break;
            }
        }
    }
}
