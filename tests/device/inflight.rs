//! GET_VRING_BASE_INFLIGHT: a ring stops at once, and what it had in flight stays in the region for the next back end.
//! And the region of packed rings, as the front end sees it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use vhost_user_blk::export::{ExportConfig, OnError, OnErrors};
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_DISCARD;
use vub_client::blk::{Range, Request};
use vub_client::proto::{pf, req, vring_state};
use vub_client::ring::{Desc, F_NEXT, Seg};
use vub_client::{Base, Buf, Client, Options, Status};

use crate::common::probe::{Asked, Opener, Probe};
use crate::common::{Disk, MIB, SILENCE, config, eventually, small};

/// Much longer than a stop may take, and than a test.
const LATENCY: Duration = Duration::from_secs(300);
const DEPTH: usize = 32;

fn options(packed: bool) -> Options {
    let plain = small();
    let want_protocol = plain.want_protocol | 1 << pf::GET_VRING_BASE_INFLIGHT;
    Options { packed, inflight: true, want_protocol, ..plain }
}

/// A disk that takes [`LATENCY`] for each request.
fn slow(config: ExportConfig) -> Disk {
    let ns = u64::try_from(LATENCY.as_nanos()).unwrap();
    let options = json!({
        "driver": "null-co", "node-name": "root", "size": MIB, "read-zeroes": true, "latency-ns": ns,
    });
    Disk::of(options, config)
}

/// It cannot be written: no flush that would take its time, too.
fn read_only() -> ExportConfig {
    ExportConfig { writable: false, ..config() }
}

/// The requests of queue 0 that the region says are in flight.
fn in_flight(client: &Client) -> usize {
    let (desc, fd) = client.inflight.as_ref().unwrap();
    let file = File::from(fd.try_clone().unwrap());
    let unit = if client.has_feature(34) { 32 } else { 16 };
    let flag = |entry: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, desc.mmap_offset + unit * (1 + entry)).unwrap();
        usize::from(byte[0])
    };
    (0..desc.queue_size.into()).map(flag).sum()
}

/// Reads of one sector each, all in flight: their tags and buffers. Heads and ids are not in the order of the requests.
fn reads_in_flight(client: &mut Client, n: usize) -> (Vec<u64>, Vec<Buf>) {
    let q = client.queue(0);
    for _ in 0..n {
        let request = Request::get_id(q.mem()).unwrap();
        q.push(request).unwrap();
    }
    q.kick().unwrap();
    q.wait_all().unwrap();
    let (mut tags, mut bufs) = (Vec::new(), Vec::new());
    for sector in 0..n as u64 {
        let buf = q.mem().alloc(512, 512).unwrap();
        buf.fill(0xee);
        bufs.push(q.mem().view(buf.gpa(), 512).unwrap());
        tags.push(q.push(Request::read(sector, vec![buf])).unwrap());
    }
    q.kick().unwrap();
    eventually("all are in flight", || in_flight(client) == n);
    (tags, bufs)
}

/// Completions are of these requests, each once.
fn all_complete(client: &mut Client, mut tags: Vec<u64>) {
    let done = client.queue(0).wait_all().unwrap();
    assert!(done.iter().all(|d| d.status == Status::Ok));
    let mut ended: Vec<u64> = done.iter().map(|d| d.tag).collect();
    ended.sort_unstable();
    tags.sort_unstable();
    assert_eq!(ended, tags);
    assert_eq!(client.queue(0).poll().unwrap().map(|d| d.tag), None);
    eventually("nothing is in flight", || in_flight(client) == 0);
}

/// A base that a front end has after a migration: the one that the back end answered.
fn base(base: u32) -> Base {
    Base::At(base)
}

#[test]
fn a_ring_stops_at_once_and_another_back_end_goes_on() {
    for (packed, disable_first) in [(false, false), (false, true), (true, false), (true, true)] {
        let disk = slow(read_only());
        let mut client = disk.connect(options(packed));
        assert_eq!(client.has_feature(34), packed);
        let (tags, bufs) = reads_in_flight(&mut client, DEPTH);
        let start = Instant::now();
        let stopped_at =
            if disable_first { client.stop().unwrap()[0] } else { client.stop_queue(0).unwrap() };
        assert!(start.elapsed() < LATENCY / 4, "it has waited for its requests");
        assert_eq!(in_flight(&client), DEPTH);
        if !packed {
            assert_eq!(usize::try_from(stopped_at).unwrap(), 2 * DEPTH, "all were taken");
        }
        assert_eq!(client.queue(0).poll().unwrap().map(|d| d.tag), None);
        // All that this back end did has ended with it.
        client.hang_up().unwrap();
        drop(disk);
        assert_eq!(in_flight(&client), DEPTH);
        for buf in &bufs {
            assert_eq!(buf.to_vec(), vec![0xee; 512], "written after the ring was stopped");
        }
        let (disk, probe) = Probe::disk(read_only());
        client.reconnect(disk.path(), base(stopped_at)).unwrap();
        all_complete(&mut client, tags);
        let expected: Vec<Asked> = (0..DEPTH as u64).map(|n| Asked::Read(512 * n, 512)).collect();
        assert_eq!(probe.take_log(), expected, "once each, in the guest's order");
        assert!(bufs.iter().all(|buf| buf.to_vec() == vec![0; 512]));
        client.queue(0).read(3, &mut [0; 512]).unwrap();
    }
}

/// Reads that the kernel has, and that would never end: it is told to give them up.
#[test]
fn fast_lane_requests_are_taken_back_from_the_kernel() {
    for packed in [false, true] {
        let (disk, probe) = Probe::piped(config());
        let mut client = disk.connect(options(packed));
        let (tags, bufs) = reads_in_flight(&mut client, 8);
        client.stop_queue(0).unwrap();
        assert_eq!(in_flight(&client), 8);
        client.start_queue(0).unwrap();
        // Disabled and enabled, without GET_VRING_BASE.
        client.enable_queue(0, false).unwrap();
        assert_eq!(in_flight(&client), 8);
        assert!(bufs.iter().all(|buf| buf.to_vec() == vec![0xee; 512]));
        client.enable_queue(0, true).unwrap();
        probe.pour(&[0x11; 8 * 512]);
        all_complete(&mut client, tags);
        assert!(bufs.iter().all(|buf| buf.to_vec() == vec![0x11; 512]));
    }
}

/// What only the disk can end is waited for, and completes: its memory must not be touched after the answer.
#[test]
fn what_cannot_be_given_up_is_waited_for() {
    for packed in [false, true] {
        let (disk, probe) = Probe::disk(config());
        let _open = Opener(Arc::clone(&probe));
        let mut client = disk.connect(options(packed));
        let (_, bufs) = {
            probe.hold();
            reads_in_flight(&mut client, 4)
        };
        probe.wait_held(4);
        std::thread::scope(|s| {
            let stop = s.spawn(|| client.conn.get_vring_base(0).unwrap());
            // It cannot be answered yet; a stop that does not wait would be over at some look.
            for _ in 0..200 {
                assert!(!stop.is_finished());
                std::thread::yield_now();
            }
            probe.release();
            stop.join().unwrap();
        });
        assert_eq!(in_flight(&client), 0);
        assert!(bufs.iter().all(|buf| buf.to_vec() == vec![0; 512]));
        assert_eq!(client.queue(0).wait_all().unwrap().len(), 4);
    }
}

/// A request that failed and waits (`rerror=stop`) stays in flight, and may succeed later. Without the feature it fails.
#[test]
fn what_waits_after_an_error_stays_in_flight() {
    for (suspend, status) in [(true, Status::Ok), (false, Status::IoErr)] {
        let rule = json!({"event": "none", "iotype": "read", "once": true});
        let node = json!({
            "driver": "blkdebug", "node-name": "root", "inject-error": [rule],
            "image": {"driver": "null-co", "size": MIB, "read-zeroes": true},
        });
        let on_error = OnErrors { read: OnError::Stop, write: OnError::Stop };
        let disk = Disk::of(node, ExportConfig { on_error, ..config() });
        let mut options = options(false);
        if !suspend {
            options.want_protocol &= !(1 << pf::GET_VRING_BASE_INFLIGHT);
        }
        let mut client = disk.connect(options);
        let q = client.queue(0);
        let request = q.read_request(0, 512).unwrap();
        q.submit(request).unwrap();
        eventually("it is in flight", || in_flight(&client) == 1);
        // The worker has long failed it when it has carried out some commands.
        for _ in 0..20 {
            let call = client.queue(0).call_fd().as_raw_fd();
            client.conn.set_vring_fd(req::SET_VRING_CALL, 0, Some(call)).unwrap();
        }
        client.stop_queue(0).unwrap();
        assert_eq!(in_flight(&client), usize::from(suspend));
        client.start_queue(0).unwrap();
        assert_eq!(client.queue(0).wait().unwrap().status, status);
    }
}

/// Nobody would know of requests that were left in flight: without a region a stop drains.
#[test]
fn without_a_region_a_stop_drains() {
    for packed in [false, true] {
        let node = json!({
            "driver": "null-co", "node-name": "root", "size": MIB, "latency-ns": 200_000_000u64,
        });
        let disk = Disk::of(node, config());
        let mut client = disk.connect(Options { inflight: false, ..options(packed) });
        let q = client.queue(0);
        let request = q.read_request(0, 512).unwrap();
        q.submit(request).unwrap();
        let avail = |q: &mut vub_client::Queue| q.poll().unwrap().map(|d| d.status);
        client.stop_queue(0).unwrap();
        assert_eq!(avail(client.queue(0)), Some(Status::Ok).filter(|_| taken(&client)));
    }
}

/// Whether the only request of queue 0 had been taken when it was stopped.
fn taken(client: &Client) -> bool {
    client.conn.get_vring_base(0).unwrap() & 0x7fff != 0
}

/// The region's size follows the kind of ring; one that is made for the other kind is too small, or of no use.
#[test]
fn regions_of_packed_rings() {
    let disk = Disk::null(MIB, config());
    for (packed, part) in [(true, 32 + 32 * 128u64), (false, 16 + 16 * 128)] {
        let client = disk.connect(Options { queues: 2, ..options(packed) });
        let (desc, fd) = client.inflight.as_ref().unwrap();
        let part = part.next_multiple_of(64);
        assert_eq!((desc.mmap_size, desc.queue_size), (2 * part, 128));
        let file = File::from(fd.try_clone().unwrap());
        assert_eq!(file.metadata().unwrap().len(), 2 * part);
        let mut given = *desc;
        given.mmap_size -= 1;
        let set = |desc: &vub_client::proto::InflightDesc| {
            client.conn.set(req::SET_INFLIGHT_FD, &desc.to_body(), &[fd.as_raw_fd()])
        };
        set(&given).unwrap_err();
        given.mmap_size = 2112 * 2;
        assert_eq!(set(&given).is_err(), packed, "a split ring's");
    }
}

/// A chain that has become a lie when it is resubmitted, while the ring is being stopped: the stop waits for the others all the
/// same, and answers where the ring stands.
#[test]
fn a_ring_that_breaks_while_it_stops() {
    // One more than a worker takes at once, for each may need a large buffer.
    const HEAVY: u16 = 65;
    let (disk, probe) = Probe::disk(config());
    let _open = Opener(Arc::clone(&probe));
    let mut client = disk.connect(Options { inflight: true, ..small() });
    let q = client.queue(0);
    for _ in 0..HEAVY {
        let range = [Range { sector: 0, count: 1, flags: 0 }];
        q.push(Request::ranges(q.mem(), VIRTIO_BLK_T_DISCARD, &range).unwrap()).unwrap();
    }
    let heads = q.ring().heads_in_flight();
    q.push_chain(&[Seg::inn(0, 1)]).unwrap();
    let lie = q.ring().heads_in_flight().into_iter().find(|head| !heads.contains(head)).unwrap();
    q.ring().mem().set_desc(lie, Desc { addr: 0, len: 1, flags: F_NEXT, next: lie });
    client.stop_queue(0).unwrap();
    // As it is found after a predecessor that was killed with all of them in flight.
    client.queue(0).kick().unwrap();
    let file = File::from(client.inflight.as_ref().unwrap().1.try_clone().unwrap());
    for (counter, head) in (0u64..).zip(heads.into_iter().chain([lie])) {
        let at = 16 + 16 * u64::from(head);
        file.write_all_at(&[1], at).unwrap();
        file.write_all_at(&counter.to_ne_bytes(), at + 8).unwrap();
    }
    probe.hold();
    client.start_queue(0).unwrap();
    probe.wait_held(usize::from(HEAVY) - 1);
    client.conn.send(req::GET_VRING_BASE, 0, &vring_state(0, 0), &[]).unwrap();
    client.conn.expect_silence(SILENCE).unwrap();
    probe.release();
    let answer = client.conn.recv().unwrap();
    assert_eq!(answer.u32_at(4).unwrap(), u32::from(HEAVY) + 1);
    let q = client.queue(0);
    (0..HEAVY).for_each(|_| assert_eq!(q.poll().unwrap().expect("done").status, Status::Ok));
    assert!(q.poll().unwrap().is_none());
    q.wait_err().unwrap();
}
