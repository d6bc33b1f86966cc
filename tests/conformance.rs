//! The driver conformance suite: the same cases over every driver, engine, cache mode and wait point.
//!
//! CONFORMANCE_SEED=n runs other sequences. A machine without loop devices or without io_uring says what it did not test.

#![allow(clippy::unwrap_used, reason = "tests")]

mod drivers;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use drivers::bed::{Layout, Loop, Setup, directory, image};
use drivers::sequence::Run;
use drivers::{Rng, Scatter, assert_same, strict, waits};
use serde_json::{Value, json};
use vhost_user_blk::block::perm::Perms;
use vhost_user_blk::block::{Graph, Node, Op, WriteFlags, ZeroFlags};
use vhost_user_blk::error::Errno;
use vhost_user_blk::mem::Sg;
use vhost_user_blk::rt::{self, Buffer, WaitKind};

const MIB: u64 = 1 << 20;
const STEPS: usize = 60;

/// One sequence on an image of `len` bytes, then a look at the image.
fn sequence(setup: Setup, wait: WaitKind, len: u64) {
    let what = format!("{setup:?} {wait:?}, {len} bytes");
    let mut rng = Rng::new(len ^ (what.len() as u64) << 40);
    let dir = directory();
    let path = image(dir.path(), &mut rng, len);
    let before = std::fs::read(&path).unwrap();
    let device = match setup.layout {
        Layout::HostDevice(sector) => Some(Loop::over(&path, sector)),
        _ => None,
    };
    let opened = device.as_ref().map_or(path.as_path(), |d| d.0.as_path());
    let disk = setup.open(opened);
    let mut run = Run::new(disk, &before, rng, what.clone());
    rt::block_on_with(wait, run.steps(STEPS));
    let want = run.expected(&before);
    drop(device);
    let mut got = std::fs::read(&path).unwrap();
    // An odd end grows to whole sectors when it is written.
    assert!(got.len() == before.len() || got.len() == want.len(), "{what}: {} bytes", got.len());
    got.resize(want.len(), 0);
    assert_same(&got, &want, &format!("{what}: the image"));
}

fn every_engine(layout: Layout, lens: &[u64]) {
    for wait in waits() {
        for setup in Setup::engines(layout) {
            lens.iter().for_each(|len| sequence(setup, wait, *len));
        }
    }
}

#[test]
fn file() {
    // Whole pages; whole sectors; neither.
    every_engine(Layout::File, &[8 * MIB, 5 * MIB + 512 * 3, 4 * MIB + 1000]);
}

#[test]
fn raw() {
    every_engine(Layout::Raw, &[8 * MIB]);
}

#[test]
fn raw_window() {
    every_engine(Layout::Window(MIB, 4 * MIB), &[8 * MIB]);
    every_engine(Layout::Window(MIB + 512 * 3, 4 * MIB + 512 * 5), &[8 * MIB]);
}

#[test]
fn blkdebug() {
    every_engine(Layout::Debug(512), &[8 * MIB]);
    every_engine(Layout::Debug(4096), &[8 * MIB]);
}

#[test]
fn blklogwrites() {
    every_engine(Layout::Log(512, false), &[2 * MIB]);
    every_engine(Layout::Log(4096, true), &[2 * MIB]);
}

/// What is not in the log is not done.
#[test]
fn a_write_that_cannot_be_logged_fails() {
    let dir = directory();
    let file = |name: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        json!({ "driver": "file", "filename": path })
    };
    let full = json!([{ "event": "pwritev", "errno": 28, "once": true }]);
    let log = json!({ "driver": "blkdebug", "image": file("log"), "inject-error": full });
    let top = json!({
        "driver": "blklogwrites", "node-name": "top", "file": file("disk"), "log": log,
    });
    let (graph, Value::Object(options)) = (Graph::new(), top) else { unreachable!() };
    let node = graph.add(options).unwrap();
    let user = graph.attach_root(&node, "the test", Perms::device(true)).unwrap();
    assert_eq!(write(&node, 0, &[1; 512]), Err(Errno(libc::ENOSPC)));
    write(&node, 0, &[2; 512]).unwrap();
    drop(user);
    let log = std::fs::read(dir.path().join("log")).unwrap();
    // The first sector, the header of the request that failed and its data, and of the one that did not.
    assert_eq!((&log[2 * 512..3 * 512], &log[4 * 512..5 * 512]), (&[0; 512][..], &[2; 512][..]));
}

#[test]
fn host_device() {
    every_engine(Layout::HostDevice(512), &[6 * MIB]);
    every_engine(Layout::HostDevice(4096), &[6 * MIB]);
}

/// What the generic layer promises a driver, whatever it is asked itself.
#[test]
fn a_driver_never_sees_more_than_its_limits() {
    for row in 0..strict::LIMITS.len() {
        for no_zeroes in [false, true] {
            let what = format!("{:?}, no zeroes {no_zeroes}", strict::LIMITS[row]);
            let disk = strict::disk(row, 2 * MIB, no_zeroes);
            let mut run = Run::new(disk, &[], Rng::new(row as u64), what);
            rt::block_on(run.steps(3 * STEPS));
        }
    }
}

#[test]
fn discard_and_detect_zeroes() {
    for wait in waits() {
        for base in Setup::engines(Layout::File).chain(Setup::engines(Layout::Raw)) {
            for (discard, detect_zeroes) in
                [("ignore", "off"), ("ignore", "on"), ("unmap", "unmap")]
            {
                sequence(Setup { discard, detect_zeroes, ..base }, wait, 2 * MIB);
            }
        }
    }
}

fn submit(node: &Node, op: Op<'_>) -> Result<(), Errno> {
    rt::block_on(node.submit(op))
}

fn write(node: &Node, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
    let mut memory = Buffer::new(bytes.len(), 4096);
    memory.bytes_mut().copy_from_slice(bytes);
    let iov = [memory.iovec()];
    submit(node, Op::Write { offset, from: Sg::new(&iov), flags: WriteFlags::empty() })
}

fn blocks(path: &Path) -> u64 {
    std::fs::File::open(path).unwrap().sync_all().unwrap();
    std::fs::metadata(path).unwrap().blocks()
}

/// Zeroes deallocate where the options say so, and only there.
#[test]
fn what_zeroes_and_discards_deallocate() {
    let dir = directory();
    let path = dir.path().join("image");
    let zeroes = vec![0; 1 << 20];
    let wz = |flags| Op::WriteZeroes { offset: 0, len: MIB, flags };
    let unmap = ZeroFlags::MAY_UNMAP;
    for base in Setup::engines(Layout::File) {
        for (discard, detect_zeroes, op, freed) in [
            ("ignore", "off", None, false),
            ("ignore", "on", None, false),
            ("unmap", "on", None, false),
            ("unmap", "unmap", None, true),
            ("unmap", "off", Some(wz(ZeroFlags::empty())), false),
            ("unmap", "off", Some(wz(unmap)), true),
            ("ignore", "off", Some(wz(unmap)), false),
            ("unmap", "off", Some(Op::Discard { offset: 0, len: MIB }), true),
            ("ignore", "off", Some(Op::Discard { offset: 0, len: MIB }), false),
        ] {
            std::fs::write(&path, vec![7; 2 << 20]).unwrap();
            let before = blocks(&path);
            let setup = Setup { discard, detect_zeroes, ..base };
            let disk = setup.open(&path);
            let ignored = matches!(op, Some(Op::Discard { .. })) && discard == "ignore";
            match op {
                None => write(&disk.node, 0, &zeroes).unwrap(),
                Some(op) => submit(&disk.node, op).unwrap(),
            }
            drop(disk);
            let lost = before.saturating_sub(blocks(&path));
            assert_eq!(lost >= MIB / 512, freed, "{setup:?}: {lost} blocks fewer");
            let bytes = std::fs::read(&path).unwrap();
            let want = if ignored { 7 } else { 0 };
            assert!(bytes[..1 << 20].iter().all(|b| *b == want), "{setup:?}");
            assert!(bytes[1 << 20..].iter().all(|b| *b == 7), "{setup:?}");
        }
    }
}

fn all_ops(memory: &Scatter, offset: u64, len: u64) -> [Op<'_>; 4] {
    let (sg, flags) = (memory.sg(), WriteFlags::empty());
    [
        Op::Read { offset, to: sg },
        Op::Write { offset, from: sg, flags },
        Op::WriteZeroes { offset, len, flags: ZeroFlags::empty() },
        Op::Discard { offset, len },
    ]
}

#[test]
fn nothing_outside_of_the_disk() {
    let dir = directory();
    let mut rng = Rng::new(1);
    let path = image(dir.path(), &mut rng, MIB);
    let before = std::fs::read(&path).unwrap();
    for layout in [Layout::File, Layout::Raw, Layout::Window(4096, MIB / 2)] {
        for setup in Setup::engines(layout) {
            let disk = setup.open(&path);
            let size = disk.node.len();
            for (offset, len) in
                [(size, 1), (size - 511, 512), (u64::MAX, 1), (u64::MAX - 511, 512), (1 << 63, 512)]
            {
                let memory = Scatter::new(&mut rng, usize::try_from(len).unwrap());
                let grows = !matches!(layout, Layout::Window(..)) && offset < MIB * 2;
                for op in all_ops(&memory, offset, len) {
                    if !grows || matches!(op, Op::Read { .. } | Op::Discard { .. }) {
                        let result = submit(&disk.node, op);
                        assert_eq!(result, Err(Errno::EINVAL), "{setup:?} {offset}");
                    }
                }
            }
            // Nothing at the end is inside.
            let memory = Scatter::new(&mut rng, 0);
            for op in all_ops(&memory, size, 0) {
                assert_eq!(submit(&disk.node, op), Ok(()), "{setup:?}");
            }
        }
    }
    assert_same(&std::fs::read(&path).unwrap(), &before, "the image");
}

/// Writes and zeroes past the end, ragged and far away: the bytes are there, and zeroes in between.
#[test]
fn files_grow() {
    let mut rng = Rng::new(4);
    for layout in [Layout::File, Layout::Raw] {
        for setup in Setup::engines(layout) {
            for start in [0, 4096, 5 * 512, 1000] {
                let dir = directory();
                let path = image(dir.path(), &mut rng, start);
                let mut model = std::fs::read(&path).unwrap();
                let disk = setup.open(&path);
                for step in 0..12 {
                    let what = format!("{setup:?}, {start} bytes, step {step}");
                    let behind = disk.node.len() + rng.below(3) * rng.below(20_000);
                    let (at, len) = (behind - rng.below(600).min(behind), 1 + rng.below(9000));
                    let (first, len) =
                        (usize::try_from(at).unwrap(), usize::try_from(len).unwrap());
                    model.resize(model.len().max(first + len), 0);
                    let bytes = if step % 3 == 2 { vec![0; len] } else { rng.bytes(len) };
                    model[first..][..len].copy_from_slice(&bytes);
                    let done = if step % 3 == 2 {
                        let (len, flags) = (len as u64, ZeroFlags::MAY_UNMAP);
                        submit(&disk.node, Op::WriteZeroes { offset: at, len, flags })
                    } else {
                        write(&disk.node, at, &bytes)
                    };
                    assert_eq!(done, Ok(()), "{what}");
                    let end = usize::try_from(disk.node.len()).unwrap();
                    assert!((model.len()..model.len() + 4096).contains(&end), "{what}: {end}");
                    let memory = Scatter::new(&mut rng, end);
                    assert_eq!(submit(&disk.node, Op::Read { offset: 0, to: memory.sg() }), Ok(()));
                    let mut want = model.clone();
                    want.resize(end, 0);
                    assert_same(&memory.gather(), &want, &what);
                }
                drop(disk);
                let mut got = std::fs::read(&path).unwrap();
                got.resize(got.len().max(model.len()), 0);
                model.resize(got.len(), 0);
                assert_same(&got, &model, &format!("{setup:?}: the file"));
            }
        }
    }
}

#[test]
fn read_only_disks_stay_as_they_are() {
    let dir = directory();
    let mut rng = Rng::new(2);
    let path = image(dir.path(), &mut rng, MIB);
    let before = std::fs::read(&path).unwrap();
    for base in Setup::engines(Layout::File).chain(Setup::engines(Layout::Raw)) {
        let setup = Setup { read_only: true, ..base };
        let disk = setup.open(&path);
        let memory = Scatter::new(&mut rng, 5000);
        let [read, changes @ ..] = all_ops(&memory, 100, 5000);
        assert_eq!(submit(&disk.node, read), Ok(()));
        assert_same(&memory.gather(), &before[100..5100], &format!("{setup:?}"));
        for op in changes {
            assert_eq!(submit(&disk.node, op), Err(Errno::EPERM), "{setup:?}");
        }
        assert_eq!(submit(&disk.node, Op::Flush), Ok(()), "{setup:?}");
    }
    assert_same(&std::fs::read(&path).unwrap(), &before, "the image");
}

#[test]
fn null_is_what_its_options_say() {
    for (driver, options) in [
        ("null-co", json!({})),
        ("null-aio", json!({})),
        ("null-co", json!({ "latency-ns": 1000 })),
    ] {
        for zeroes in [false, true] {
            let mut options = options.clone();
            options["driver"] = json!(driver);
            options["node-name"] = json!("n");
            options["size"] = json!(1_000_000);
            options["read-zeroes"] = json!(zeroes);
            let Value::Object(options) = options else { unreachable!() };
            let node = Graph::new().add(options).unwrap();
            assert_eq!(node.len(), 1_000_448, "whole sectors");
            let mut rng = Rng::new(3);
            for wait in waits() {
                let mut memory = Scatter::new(&mut rng, 5000);
                memory.fill(&[9; 5000]);
                for op in all_ops(&memory, 77, 5000).into_iter().chain([Op::Flush]) {
                    assert_eq!(rt::block_on_with(wait, node.submit(op)), Ok(()));
                }
                // More ranges than a request takes go through a buffer, of zeroes at first.
                let want = if zeroes || memory.ranges() > 1024 { 0 } else { 9 };
                assert!(memory.gather().iter().all(|b| *b == want), "{driver} {zeroes}");
                for op in all_ops(&memory, node.len() - 4999, 5000) {
                    assert_eq!(rt::block_on_with(wait, node.submit(op)), Err(Errno::EINVAL));
                }
            }
        }
    }
}

/// A place in the image that a write of one thread, or of two, must not lose.
const BLOCK: usize = 4096;

/// Writes `fill` to `[at, at + len)` of every block, all at once, on a thread of its own.
fn writer(node: &Arc<Node>, wait: WaitKind, (at, len, fill): (usize, usize, u8), count: usize) {
    let mut memory = Buffer::new(len, 4096);
    memory.bytes_mut().fill(fill);
    let memory = Arc::new(memory);
    rt::block_on_with(wait, async {
        for block in 0..count {
            let (node, memory) = (Arc::clone(node), Arc::clone(&memory));
            rt::current().spawn(async move {
                let (iov, offset) = ([memory.iovec()], (block * BLOCK + at) as u64);
                let op = Op::Write { offset, from: Sg::new(&iov), flags: WriteFlags::empty() };
                assert_eq!(node.submit(op).await, Ok(()));
            });
        }
    });
}

/// Two threads write parts of the same blocks (`a` first in the checks: where both write, either may win). Each byte that
/// only one of them writes must be that one's.
fn neighbours(setup: Setup, a: (usize, usize, u8), b: (usize, usize, u8)) {
    const COUNT: usize = 128;
    let dir = directory();
    let path = dir.path().join("image");
    std::fs::write(&path, vec![0xff; COUNT * BLOCK]).unwrap();
    let device = (setup.layout == Layout::HostDevice(4096)).then(|| Loop::over(&path, 4096));
    let disk = setup.open(device.as_ref().map_or(path.as_path(), |d| d.0.as_path()));
    disk.node.expect_ragged_writes(1);
    let start = std::sync::Barrier::new(2);
    for round in 0..8u8 {
        let wait = waits()[usize::from(round) % waits().len()];
        let [one, two] = [a, b].map(|(at, len, fill)| (at, len, fill + 2 * round));
        std::thread::scope(|s| {
            for part in [one, two] {
                let (node, start) = (&disk.node, &start);
                s.spawn(move || {
                    start.wait();
                    writer(node, wait, part, COUNT);
                });
            }
        });
        assert_eq!(submit(&disk.node, Op::Flush), Ok(()));
        let bytes = std::fs::read(&path).unwrap();
        let inside = |(at, len, _): (usize, usize, u8), i: usize| (at..at + len).contains(&i);
        for (i, byte) in bytes.iter().enumerate() {
            let good = match (inside(one, i % BLOCK), inside(two, i % BLOCK)) {
                (true, true) => *byte == one.2 || *byte == two.2,
                (true, false) => *byte == one.2,
                (false, true) => *byte == two.2,
                (false, false) => *byte == 0xff,
            };
            let block = i / BLOCK;
            assert!(good, "{setup:?}: round {round}: block {block}, byte {}: {byte}", i % BLOCK);
        }
    }
}

/// Where the medium's blocks are larger than writes, a write must not bring back old bytes of its neighbours.
#[test]
fn writes_in_the_same_block_keep_out_of_each_others_way() {
    for layout in [Layout::File, Layout::Raw, Layout::HostDevice(4096)] {
        for setup in Setup::engines(layout).filter(|s| s.direct) {
            // Halves of a sector of 512 bytes; halves of a block.
            neighbours(setup, (0, 256, 0), (256, 256, 1));
            neighbours(setup, (0, 2048, 0), (2048, 2048, 1));
            // Odd neighbours, over a block's end.
            neighbours(setup, (1, 1023, 0), (1024, 3000, 1));
            // A whole block and a part of it.
            neighbours(setup, (0, 4096, 0), (100, 100, 1));
        }
    }
}

/// Two guests that share a disk through nodes of their own write different sectors of the same block of the medium.
#[test]
fn raw_nodes_over_one_disk_keep_each_others_sectors() {
    // The row of a medium with blocks of 4 KiB.
    let (_graph, raws) = strict::two_raws(2, 64 << 10);
    rt::block_on(async {
        for (node, sector) in raws.iter().zip(0u8..) {
            let node = Arc::clone(node);
            rt::current().spawn(async move {
                let mut buffer = Buffer::new(512, 512);
                buffer.bytes_mut().fill(sector + 1);
                let (iov, flags) = ([buffer.iovec()], WriteFlags::empty());
                let (offset, from) = (u64::from(sector) * 512, Sg::new(&iov));
                node.submit(Op::Write { offset, from, flags }).await.unwrap();
            });
        }
    });
    rt::block_on(async {
        let buffer = Buffer::new(1024, 512);
        let iov = [buffer.iovec()];
        raws[0].submit(Op::Read { offset: 0, to: Sg::new(&iov) }).await.unwrap();
        assert!(buffer.bytes()[..512].iter().all(|b| *b == 1), "the first sector");
        assert!(buffer.bytes()[512..].iter().all(|b| *b == 2), "the second sector");
    });
}
