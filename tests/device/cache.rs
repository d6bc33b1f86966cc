//! What is durable when: counted at the driver, and in the page cache for the fast lane.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use vhost_user_blk::error::Errno;
use vhost_user_blk::export::ExportConfig;
use virtio_bindings::virtio_blk as vb;
use vub_client::blk::{Range, Request};
use vub_client::proto::{FLAG_NEED_REPLY, config_body, req};
use vub_client::{Base, Client, Conn, Options, Status};

use crate::common::probe::{Asked, Opener, Probe};
use crate::common::{Disk, Engine, FileDisk, MIB, config, small};

const WCE: u32 = 32;

/// One write, one discard, one write-zeroes, and what the driver was asked.
fn changes(client: &mut Client, probe: &Probe) -> Vec<Asked> {
    probe.take_log();
    let q = client.queue(0);
    q.write(0, &[1; 512]).unwrap();
    q.discard(8, 1).unwrap();
    q.write_zeroes(16, 1, true).unwrap();
    probe.take_log()
}

fn plain(flushes: bool) -> Vec<Asked> {
    vec![
        Asked::Write(0, 512, flushes),
        Asked::Discard(4096, 512),
        Asked::Flush,
        Asked::Zeroes(8192, 512),
        Asked::Flush,
    ]
    .into_iter()
    .filter(|a| flushes || *a != Asked::Flush)
    .collect()
}

#[test]
fn write_back_until_the_driver_says_otherwise() {
    let (disk, probe) = Probe::disk(config());
    let mut client = disk.connect(small());
    for flags in [0, 1] {
        assert_eq!(client.read_config().unwrap().wce(), 1);
        assert_eq!(changes(&mut client, &probe), plain(false));
        client.queue(0).flush().unwrap();
        assert_eq!(probe.take_log(), [Asked::Flush]);

        client.set_config(WCE, flags, &[0]).unwrap();
        assert_eq!(probe.take_log(), [Asked::Flush], "what completed before is made stable");
        assert_eq!(client.read_config().unwrap().wce(), 0);
        assert_eq!(changes(&mut client, &probe), plain(true));
        client.queue(0).flush().unwrap();
        client.set_config(WCE, flags, &[1]).unwrap();
    }
    assert_eq!(changes(&mut client, &probe), plain(false));
    // Nothing else is writable, wherever the write begins.
    let before = client.read_config().unwrap().clone();
    let mut all = vec![0xff; 60];
    all[32] = 1;
    client.set_config(0, 0, &all).unwrap();
    assert_eq!(*client.read_config().unwrap(), before);
}

#[test]
fn the_mode_told_is_the_mode_in_force_after_a_reconnect() {
    let (disk, probe) = Probe::disk(config());
    let client = disk.connect(small());
    client.set_config(WCE, 0, &[0]).unwrap();
    drop(client);
    let mut client = disk.connect(small());
    let through = client.config().wce() == 0;
    assert_eq!(changes(&mut client, &probe), plain(through));
    client.reset_device().unwrap();
    // The memory stays.
    client.conn.set_u64(req::SET_FEATURES, client.features()).unwrap();
    client.start_queue(0).unwrap();
    let through = client.read_config().unwrap().wce() == 0;
    assert_eq!(changes(&mut client, &probe), plain(through));
}

/// The driver chooses write-through while requests are under way: it will not flush for them any more.
#[test]
fn what_is_under_way_is_made_stable_first() {
    let (disk, probe) = Probe::disk(config());
    let _open = Opener(Arc::clone(&probe));
    let mut client = disk.connect(small());
    probe.hold();
    let q = client.queue(0);
    let range = [Range { sector: 8, count: 1, flags: 0 }];
    let requests = [
        q.write_request(0, &[1; 512]).unwrap(),
        Request::ranges(q.mem(), vb::VIRTIO_BLK_T_DISCARD, &range).unwrap(),
        q.read_request(0, 512).unwrap(),
    ];
    for (n, request) in (1..).zip(requests) {
        q.submit(request).unwrap();
        probe.wait_held(n);
    }
    client.conn.send(req::SET_CONFIG, FLAG_NEED_REPLY, &config_body(WCE, 0, &[0]), &[]).unwrap();
    probe.wait_held(4);
    probe.release();
    client.conn.recv().unwrap();
    let done = client.queue(0).wait_all().unwrap();
    assert!(done.iter().all(|d| d.status == Status::Ok));
    let mut log = probe.take_log();
    assert_eq!(log.split_off(4), [Asked::Flush; 2], "for the write and the discard");
    assert_eq!(log[3], Asked::Flush, "for what had completed before");
    assert_eq!(changes(&mut client, &probe), plain(true));
}

#[test]
fn fast_lane_writes_under_way_are_made_stable_first() {
    let (graph, probe) = Probe::graph(1 << 20, json!({"jammed": true}));
    let _open = Opener(Arc::clone(&probe));
    let disk = Disk::serve(graph, "root", config());
    let mut client = disk.connect(small());
    let q = client.queue(0);
    let write = q.write_request(0, &[1; 512]).unwrap();
    q.submit(write).unwrap();
    // It is in the kernel when the same queue has answered another one.
    q.push(Request::get_id(q.mem()).unwrap()).unwrap();
    q.kick().unwrap();
    q.wait().unwrap();
    client.set_config(WCE, 0, &[0]).unwrap();
    assert_eq!(probe.take_log(), [Asked::Flush], "for what had completed before");
    assert!(client.queue(0).poll().unwrap().is_none());
    probe.drain(512);
    assert_eq!(client.queue(0).wait().unwrap().status, Status::Ok);
    assert_eq!(probe.take_log(), [Asked::Flush], "for the write");
}

/// A guest that another process served until it was killed: what it thinks of the cache is not known here, and its front end
/// (like QEMU) says nothing. Its writes are stable until it flushes.
#[test]
fn a_guest_that_relied_on_another_process() {
    for packed in [false, true] {
        let (mut client, base) = {
            let (disk, _) = Probe::disk(config());
            let mut client = disk.connect(Options { packed, ..small() });
            client.queue(0).write(0, &[1; 512]).unwrap();
            let base = client.stop_queue(0).unwrap();
            (client, base)
        };
        let (disk, probe) = Probe::disk(config());
        // A flush that was under way says nothing: the guest may have given it up and chosen write-through.
        let flush = Request::flush();
        client.queue(0).submit(flush).unwrap();
        client.reconnect(disk.path(), Base::At(base)).unwrap();
        assert_eq!(client.queue(0).wait().unwrap().status, Status::Ok);
        // Of a packed ring nobody knows how much was under way: at most as much as fits.
        for _ in 0..if packed { small().queue_size } else { 1 } {
            assert_eq!(changes(&mut client, &probe), plain(true), "packed {packed}");
        }
        assert_eq!(client.read_config().unwrap().wce(), 0);
        client.queue(0).flush().unwrap();
        assert_eq!(changes(&mut client, &probe), plain(false), "packed {packed}");
        assert_eq!(client.read_config().unwrap().wce(), 1);
        // The same process, the same guest: it is known now.
        let base = client.stop_queue(0).unwrap();
        client.reconnect(disk.path(), Base::At(base)).unwrap();
        assert_eq!(changes(&mut client, &probe), plain(false), "packed {packed}");
        client.set_config(WCE, 0, &[0]).unwrap();
        let base = client.stop_queue(0).unwrap();
        client.reconnect(disk.path(), Base::At(base)).unwrap();
        client.queue(0).flush().unwrap();
        assert_eq!(changes(&mut client, &probe), plain(true), "packed {packed}");
    }
}

/// Without CONFIG_WCE a driver that can flush knows that it must (VIRTIO 1.3, 5.2.6.2).
#[test]
fn a_guest_that_could_not_have_chosen() {
    let want_features = vub_client::KNOWN_FEATURES & !(1 << vb::VIRTIO_BLK_F_CONFIG_WCE);
    let (mut client, base) = {
        let (disk, _) = Probe::disk(config());
        let mut client = disk.connect(Options { want_features, ..small() });
        client.queue(0).write(0, &[1; 512]).unwrap();
        let base = client.stop_queue(0).unwrap();
        (client, base)
    };
    let (disk, probe) = Probe::disk(config());
    client.reconnect(disk.path(), Base::At(base)).unwrap();
    assert_eq!(changes(&mut client, &probe), plain(false));
}

#[test]
fn write_through_exports() {
    let (disk, probe) = Probe::disk(ExportConfig { writethrough: true, ..config() });
    let mut client = disk.connect(small());
    assert_eq!(client.config().wce(), 0);
    assert_eq!(changes(&mut client, &probe), plain(true));
}

#[test]
fn a_driver_that_cannot_flush_gets_stable_writes() {
    let (disk, probe) = Probe::disk(config());
    let want_features = vub_client::KNOWN_FEATURES & !(1 << vb::VIRTIO_BLK_F_FLUSH);
    let mut client = disk.connect(Options { want_features, ..small() });
    assert_eq!(changes(&mut client, &probe), plain(true));
}

#[test]
fn no_flush_is_obeyed_in_every_mode() {
    let cache = json!({"discard": "unmap", "cache": {"no-flush": true}});
    for writethrough in [false, true] {
        let (graph, probe) = Probe::graph(1 << 20, cache.clone());
        let disk = Disk::serve(graph, "root", ExportConfig { writethrough, ..config() });
        let mut client = disk.connect(small());
        assert_eq!(changes(&mut client, &probe), plain(false));
        client.queue(0).flush().unwrap();
        assert_eq!(probe.take_log(), []);
    }
}

#[test]
fn a_flush_that_fails_is_told() {
    let (disk, probe) = Probe::disk(config());
    let mut client = disk.connect(small());
    let q = client.queue(0);
    probe.fail_flushes(Some(Errno::EIO));
    for _ in 0..3 {
        assert_eq!(q.flush().unwrap_err().status(), Some(Status::IoErr));
        q.write(0, &[1; 512]).unwrap();
    }
    probe.fail_flushes(Some(Errno::ENOSPC));
    assert_eq!(q.flush().unwrap_err().status(), Some(Status::IoErr));
    probe.fail_flushes(None);
    q.flush().unwrap();
    // In write-through mode a discard that cannot be made stable has failed.
    client.set_config(WCE, 0, &[0]).unwrap();
    probe.fail_flushes(Some(Errno::EIO));
    assert_eq!(client.queue(0).discard(0, 1).unwrap_err().status(), Some(Status::IoErr));
}

/// Pages of a file that are dirty or being written back (`cachestat`, Linux 6.5).
fn unstable_pages(path: &Path) -> u64 {
    const CACHESTAT: libc::c_long = 451;
    let file = std::fs::File::open(path).unwrap();
    let range = [0u64, u64::MAX];
    let mut found = [0u64; 5];
    // SAFETY: the kernel reads two words and writes five, and nothing else.
    let rc = unsafe {
        libc::syscall(CACHESTAT, file.as_raw_fd(), range.as_ptr(), found.as_mut_ptr(), 0)
    };
    assert_eq!(rc, 0, "cachestat: {}", std::io::Error::last_os_error());
    found[1] + found[2]
}

#[test]
fn stable_writes_leave_no_dirty_page() {
    for aio in ["threads", "io_uring"] {
        let file = FileDisk::new(4 * MIB, Engine { aio, direct: false }, config());
        let path = file.image.path();
        let mut client = file.disk.connect(small());
        let mut dirty = 0;
        for i in 0..20 {
            client.queue(0).write(i * 64, &[7; 8192]).unwrap();
            dirty = unstable_pages(&path).max(dirty);
        }
        assert!(dirty > 0, "write-back writes stay in memory");
        client.queue(0).flush().unwrap();
        assert_eq!(unstable_pages(&path), 0, "{aio}: a flush");
        client.queue(0).write(0, &[8; 4096]).unwrap();
        client.set_config(WCE, 0, &[0]).unwrap();
        assert_eq!(unstable_pages(&path), 0, "{aio}: the switch to write-through");
        for i in 0..20 {
            // Aligned for the fast lane, and scattered for the same with many ranges.
            client.queue(0).layout.segment = if i % 2 == 0 { 8192 } else { 512 };
            client.queue(0).write(i * 64, &[9; 8192]).unwrap();
            assert_eq!(unstable_pages(&path), 0, "{aio}: write {i}");
        }
        client.queue(0).write_zeroes(0, 64, false).unwrap();
        assert_eq!(unstable_pages(&path), 0, "{aio}: zeroes");
        // A disconnect makes stable what is not.
        client.set_config(WCE, 0, &[1]).unwrap();
        client.queue(0).write(0, &[8; 4096]).unwrap();
        drop(client);
        drop(file.disk.connect(small()));
        assert_eq!(unstable_pages(&path), 0, "{aio}: a disconnect");
    }
}

#[test]
fn guests_that_cannot_flush_leave_no_dirty_page() {
    for aio in ["threads", "io_uring"] {
        let file = FileDisk::new(MIB, Engine { aio, direct: false }, config());
        let want_features = vub_client::KNOWN_FEATURES & !(1 << vb::VIRTIO_BLK_F_FLUSH);
        let mut client = file.disk.connect(Options { want_features, ..small() });
        for i in 0..20 {
            client.queue(0).write(i * 64, &[9; 8192]).unwrap();
            assert_eq!(unstable_pages(&file.image.path()), 0, "{aio}: write {i}");
        }
    }
}

/// A guest that resets its driver, moves away or goes has nobody to flush for it. Once is enough.
#[test]
fn the_last_queue_to_stop_flushes() {
    let (disk, probe) = Probe::disk(config());
    let mut client = disk.connect(Options { queues: 2, ..small() });
    let flushes = || probe.take_log().into_iter().filter(|a| *a == Asked::Flush).count();
    client.queue(0).write(0, &[1; 512]).unwrap();
    client.stop_queue(0).unwrap();
    assert_eq!(flushes(), 0, "the other one goes on");
    client.stop_queue(1).unwrap();
    assert_eq!(flushes(), 1);
    client.stop_queue(1).unwrap();
    assert_eq!(flushes(), 0, "it was stopped already");
    client.start_queue(0).unwrap();
    client.queue(0).write(0, &[1; 512]).unwrap();
    // The answer is about the queue; the failure is logged, and the next stop tries again.
    probe.fail_flushes(Some(Errno::EIO));
    client.stop_queue(0).unwrap();
    assert_eq!(flushes(), 1);
    probe.fail_flushes(None);
    client.start_queue(0).unwrap();
    client.reset_device().unwrap();
    assert_eq!(flushes(), 1);
    drop(client);
    // The next one is served when the last one is forgotten.
    let client = disk.connect(small());
    assert_eq!(flushes(), 0, "nothing has run since");
    drop(client);
    Conn::connect(disk.path()).unwrap().get_u64(req::GET_FEATURES).unwrap();
    assert_eq!(flushes(), 1);
}

#[test]
fn a_failed_flush_is_tried_again_at_the_end() {
    let (disk, probe) = Probe::disk(config());
    let mut client = disk.connect(small());
    client.queue(0).write(0, &[1; 512]).unwrap();
    probe.fail_flushes(Some(Errno::EIO));
    client.stop_queue(0).unwrap();
    drop(client);
    assert!(!disk.export.close(), "what was written may be lost");
}

#[test]
fn read_only_exports_flush_nothing() {
    let (disk, probe) = Probe::disk(ExportConfig { writable: false, ..config() });
    let mut client = disk.connect(small());
    client.queue(0).read(0, &mut [0; 512]).unwrap();
    client.stop_queue(0).unwrap();
    assert_eq!(probe.take_log(), [Asked::Read(0, 512)]);
}
