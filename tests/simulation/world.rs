//! The simulated world itself: disks, time, blocking calls, ends that never come.

use std::cell::RefCell;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use vhost_user_blk::block::perm::{Perm, Perms};
use vhost_user_blk::block::{Graph, Node, Op, WriteFlags};
use vhost_user_blk::error::Errno;
use vhost_user_blk::mem::Sg;
use vhost_user_blk::rt::{self, Buffer};
use vhost_user_blk::sim::harness::Drivers;
use vhost_user_blk::sim::{
    Crash, DiskOptions, DiskSpec, Pages, Replay, SIM_DISK, Sim, Stuck, Survivors,
};

fn open(sim: &Sim, spec: DiskSpec) -> Arc<Node> {
    let disk = spec.name.clone();
    sim.add_disk(spec);
    static DRIVERS: Drivers = &[&SIM_DISK];
    let graph = Graph::with_drivers(DRIVERS);
    let options = json!({"driver": "sim-disk", "disk": disk, "node-name": "n", "discard": "unmap"});
    let Value::Object(options) = options else { unreachable!() };
    let node = graph.add(options).unwrap();
    let mut perms = Perms::device(true);
    perms.used |= Perm::RESIZE;
    graph.detach(graph.attach_root(&node, "test", perms).unwrap());
    node
}

/// Straight to the driver, which grows where the node does not.
async fn write(node: &Node, offset: u64, bytes: &[u8], flags: WriteFlags) -> Result<(), Errno> {
    let mut buffer = Buffer::new(bytes.len(), 512);
    buffer.bytes_mut().copy_from_slice(bytes);
    let iov = [buffer.iovec()];
    node.driver().submit(Op::Write { offset, from: Sg::new(&iov), flags }).await
}

#[test]
fn a_flush_keeps_what_was_complete_and_the_rest_may_go() {
    let sim = Sim::new(1);
    let node = open(&sim, DiskSpec::file("d", Pages::default()));
    let done = sim.run(async move {
        write(&node, 0, &[1; 1024], WriteFlags::empty()).await?;
        node.driver().submit(Op::Flush).await?;
        write(&node, 512, &[2; 1024], WriteFlags::empty()).await?;
        write(&node, 4096, &[3; 512], WriteFlags::FUA).await
    });
    assert_eq!(done, Ok(Ok(())));
    let history = sim.take_history();
    let mut replay = Replay::new(&history);
    replay.advance(&history, history.len());
    assert_eq!(replay.volatile(Crash::Power), 1);
    let crashed = |crash, survivors| replay.crashed(crash, survivors)[0].1.to_vec();
    let none = crashed(Crash::Power, Survivors::None);
    assert!(none[..1024].iter().all(|b| *b == 1) && none[1024..4096].iter().all(|b| *b == 0));
    assert!(none.len() == 4608 && none[4096..].iter().all(|b| *b == 3));
    let all = crashed(Crash::Power, Survivors::All);
    assert!(all[..512].iter().all(|b| *b == 1) && all[512..1536].iter().all(|b| *b == 2));
    assert_eq!(crashed(Crash::Kill, Survivors::None), all);
    let torn = (0..50).map(|seed| crashed(Crash::Power, Survivors::Random(seed)));
    let torn: Vec<Vec<u8>> = torn.filter(|image| image[512] == 1 && image[1024] == 2).collect();
    assert!(!torn.is_empty(), "a write of two sectors tears");
}

#[test]
fn a_full_disk_takes_nothing_until_there_is_room() {
    let sim = Rc::new(Sim::new(1));
    let mut spec = DiskSpec::file("d", Pages::zeroed(4096));
    spec.options = DiskOptions { capacity: 4096, ..DiskOptions::default() };
    let node = open(&sim, spec);
    let world = Rc::clone(&sim);
    let done = sim.run(async move {
        let refused = write(&node, 4096, &[1; 512], WriteFlags::empty()).await;
        world.set_capacity("d", 8192);
        (refused, write(&node, 4096, &[1; 512], WriteFlags::empty()).await, node.len())
    });
    assert_eq!(done, Ok((Err(Errno::ENOSPC), Ok(()), 4608)));
}

/// Blocks of 4096 and a length of 1000: what is read for the rest of a block past the end is zeroes.
#[test]
fn a_ragged_end_grows_by_read_modify_write() {
    let sim = Sim::new(3);
    let mut spec = DiskSpec::file("d", Pages::from_bytes(&[7; 1000]));
    spec.options.request_align = 4096;
    let node = open(&sim, spec);
    let done = sim.run(async move {
        let put = async |offset, bytes: &[u8]| {
            let mut buffer = Buffer::new(bytes.len(), 512);
            buffer.bytes_mut().copy_from_slice(bytes);
            let iov = [buffer.iovec()];
            let (from, flags) = (Sg::new(&iov), WriteFlags::empty());
            node.submit(Op::Write { offset, from, flags }).await
        };
        assert_eq!(put(1000, &[1; 100]).await, Ok(()));
        assert_eq!(put(10_000, &[2; 5000]).await, Ok(()));
        assert_eq!(put(u64::MAX - 100, &[2; 50]).await, Err(Errno::EINVAL));
        assert_eq!(put(i64::MAX as u64 - 100, &[2; 50]).await, Err(Errno::EINVAL));
        node.len()
    });
    assert_eq!(done, Ok(16384));
    let mut want = [vec![7; 1000], vec![1; 100], vec![0; 8900], vec![2; 5000]].concat();
    want.resize(16384, 0);
    assert_eq!(sim.image("d").to_vec(), want);
}

/// Cuts a disk of 8192 sevens to 1024 bytes, makes it 4096 long, and does `last`.
fn truncated(last: impl AsyncFnOnce(&Node) -> Result<(), Errno>) -> Replay {
    let sim = Sim::new(1);
    let mut spec = DiskSpec::file("d", Pages::from_bytes(&[7; 8192]));
    spec.options.capacity = 1 << 20;
    let node = open(&sim, spec);
    let done = sim.run(async move {
        assert_eq!(node.truncate(1 << 21).await, Err(Errno::ENOSPC));
        for len in [1024, 4096] {
            node.truncate(len).await?;
            assert_eq!(node.len(), len);
        }
        last(&node).await
    });
    assert_eq!(done, Ok(Ok(())));
    let history = sim.take_history();
    let mut replay = Replay::new(&history);
    replay.advance(&history, history.len());
    replay
}

/// A new length is a change like a write: kept or lost, until a flush or a stable write past it.
#[test]
fn a_truncate_survives_or_not() {
    let crashed =
        |replay: &Replay, crash, survivors| replay.crashed(crash, survivors)[0].1.to_vec();
    let (old, short) = (vec![7; 8192], vec![7; 1024]);
    let new = [vec![7; 1024], vec![0; 3072]].concat();

    let replay = truncated(async |_| Ok(()));
    // The one that failed has left nothing behind.
    assert_eq!(replay.volatile(Crash::Power), 2);
    assert_eq!(crashed(&replay, Crash::Power, Survivors::None), old);
    assert_eq!(crashed(&replay, Crash::Power, Survivors::All), new);
    assert_eq!(crashed(&replay, Crash::Power, Survivors::AllBut(1)), short);
    assert_eq!(crashed(&replay, Crash::Kill, Survivors::None), new);

    let replay = truncated(async |node| node.submit(Op::Flush).await);
    assert_eq!(replay.volatile(Crash::Power), 0);
    assert_eq!(crashed(&replay, Crash::Power, Survivors::None), new);

    let replay = truncated(async |node| write(node, 512, &[3; 512], WriteFlags::FUA).await);
    assert_eq!(replay.volatile(Crash::Power), 2);
    let seen = crashed(&replay, Crash::Power, Survivors::None);
    assert_eq!(seen, [vec![7; 512], vec![3; 512], vec![7; 7168]].concat());

    let replay = truncated(async |node| write(node, 8192, &[3; 512], WriteFlags::FUA).await);
    for seed in 0..20 {
        let seen = crashed(&replay, Crash::Power, Survivors::Random(seed));
        assert_eq!(seen, [vec![7; 1024], vec![0; 7168], vec![3; 512]].concat());
    }
}

#[test]
fn time_is_virtual_and_calls_return_in_any_order() {
    let orders: Vec<Vec<u32>> = (0..20)
        .map(|seed| {
            let order = Rc::new(RefCell::new(Vec::new()));
            let shared = Rc::clone(&order);
            let started = std::time::Instant::now();
            let done = Sim::new(seed).run(async move {
                for n in 0..3 {
                    let order = Rc::clone(&shared);
                    rt::current().spawn(async move {
                        rt::sleep(Duration::from_secs(3600)).await;
                        assert_eq!(rt::blocking(move || n + 1).await, n + 1);
                        order.borrow_mut().push(n);
                    });
                }
                rt::sleep(Duration::from_secs(100_000)).await;
            });
            assert_eq!(done, Ok(()));
            assert!(started.elapsed() < Duration::from_secs(5));
            order.take()
        })
        .collect();
    assert!(orders.iter().all(|o| o.len() == 3) && orders.iter().any(|o| *o != orders[0]));
}

#[test]
fn who_waits_for_ever_is_told_so() {
    assert_eq!(Sim::new(1).run(pending::<()>()), Err(Stuck::Deadlock));
    // Also with others still waiting for a lock that nobody gives back.
    let lock = Rc::new(rt::sync::RangeLock::default());
    let done = Sim::new(2).run(async move {
        let _first = lock.lock(0..1, true).await;
        let _second = lock.lock(0..1, true).await;
    });
    assert_eq!(done, Err(Stuck::Deadlock));
}

/// How many of one write's sectors were changed while it was in flight: 0 or 1 writes.
fn scribble(seed: u64) -> u64 {
    let sim = Sim::new(seed);
    let node = open(&sim, DiskSpec::file("d", Pages::zeroed(1 << 20)));
    let done = sim.run(async move {
        let memory = Rc::new(Buffer::new(4096, 512));
        let shared = Rc::clone(&memory);
        rt::current().spawn(async move {
            let iov = [shared.iovec()];
            let (from, flags) = (Sg::new(&iov), WriteFlags::empty());
            node.submit(Op::Write { offset: 0, from, flags }).await.unwrap();
        });
        let iov = [memory.iovec()];
        for byte in 1..5 {
            Sg::new(&iov).copy_from(&[byte; 4096]);
            rt::blocking(|| ()).await;
        }
    });
    assert_eq!(done, Ok(()));
    sim.changed_in_flight()
}

#[test]
fn memory_that_changes_in_flight_is_noticed() {
    let changed: u64 = (0..50).map(scribble).sum();
    assert!((1..50).contains(&changed), "{changed} of 50");
}
