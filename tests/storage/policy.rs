//! `rerror` and `werror`.

use std::time::{Duration, Instant};

use serde_json::json;
use vhost_user_blk::export::{ExportConfig, OnError, OnErrors};
use vub_client::{Base, Client, Options, Status};

use crate::common::{Disk, Image, SILENCE, config, eventually, small};
use crate::injected::{disk, status};
use crate::logged;

fn policy(read: OnError, write: OnError) -> ExportConfig {
    ExportConfig { on_error: OnErrors { read, write }, ..config() }
}

/// A disk whose first write, or read, fails with `errno` and is kept by queue 0 of two.
fn held(id: &str, kind: &str, errno: i32) -> (Disk, Image, Client) {
    held_by(id, kind, errno, Options { queues: 2, ..small() })
}

/// The same for a front end with `options`.
fn held_by(id: &str, kind: &str, errno: i32, options: Options) -> (Disk, Image, Client) {
    let rule = json!({"event": "none", "iotype": kind, "errno": errno, "once": true});
    let config = policy(OnError::Stop, OnError::Stop);
    let (disk, image) = disk(id, &json!({"inject-error": [rule]}), config);
    let mut client = disk.connect(options);
    let q = client.queue(0);
    let request = match kind {
        "write" => q.write_request(8, &[7; 4096]),
        _ => q.read_request(8, 4096),
    };
    q.submit(request.unwrap()).unwrap();
    eventually("the queue waits", || !logged::of(id).is_empty());
    (disk, image, client)
}

#[test]
fn stop_keeps_the_request_until_resume() {
    for kind in ["read", "write"] {
        let id = format!("stop-{kind}");
        let (disk, _image, mut client) = held(&id, kind, libc::EIO);
        // Nothing of this queue is served, everything of the other.
        let q = client.queue(0);
        let read = q.read_request(0, 512).unwrap();
        q.submit(read).unwrap();
        let start = Instant::now();
        while start.elapsed() < SILENCE {
            assert!(client.queue(0).poll().unwrap().is_none(), "a stopped queue answers");
        }
        client.queue(1).write(100, &[1; 512]).unwrap();
        disk.export.resume();
        let done = client.queue(0).wait_all().unwrap();
        assert_eq!(done.iter().map(|d| d.status).collect::<Vec<_>>(), [Status::Ok; 2], "{kind}");
        if kind == "write" {
            let mut back = [0; 4096];
            client.queue(0).read(8, &mut back).unwrap();
            assert_eq!(back, [7; 4096]);
        }
        let lines = logged::of(&id);
        let want = format!(
            "node 'root': {kind} of 4096 bytes at 4096: Input/output error: queue 0 waits for it to work"
        );
        assert_eq!(lines[0], want);
        // Resuming what runs does nothing.
        disk.export.resume();
        client.queue(0).write(0, &[1; 512]).unwrap();
    }
}

/// Who must have the ring back does not wait for the disk.
#[test]
fn a_stopped_queue_can_be_taken_away() {
    let (disk, _image, mut client) = held("taken", "write", libc::EIO);
    assert_eq!(client.stop_queue(0).unwrap(), 1, "the kept request is behind us");
    let done = client.queue(0).wait().unwrap();
    assert_eq!(done.status, Status::IoErr);
    client.start_queue(0).unwrap();
    client.queue(0).write(0, &[1; 512]).unwrap();
    drop(client);
    let lines = logged::of("taken");
    assert!(
        lines.iter().any(|l| l == "queue 0: write of 4096 bytes at 4096: given up"),
        "{lines:?}"
    );
    drop(disk);

    let (disk, _image, client) = held("gone", "write", libc::EIO);
    drop(client);
    let mut client = disk.connect(small());
    client.queue(0).write(0, &[1; 512]).unwrap();

    // More guest memory is no reason; memory that goes is: a request may use it.
    let (_disk, _image, mut client) = held("memory", "write", libc::EIO);
    let region = client.plug_memory(1 << 20).unwrap();
    assert!(client.queue(0).poll().unwrap().is_none());
    client.unplug_memory(region).unwrap();
    assert_eq!(client.queue(0).wait().unwrap().status, Status::IoErr);
    client.queue(0).write(0, &[1; 512]).unwrap();
}

/// A front end that went and comes back, with the region that says what was in flight: the request did not fail meanwhile, it is
/// carried out.
#[test]
fn what_is_kept_stays_in_flight_without_a_front_end() {
    for kind in ["write", "read"] {
        let id = format!("back-{kind}");
        let options = Options { queues: 2, inflight: true, ..small() };
        let (disk, _image, mut client) = held_by(&id, kind, libc::EIO, options);
        client.hang_up().unwrap();
        client.reconnect(disk.path(), Base::Used).unwrap();
        assert_eq!(client.queue(0).wait().unwrap().status, Status::Ok, "{kind}");
        assert!(!disk.export.is_holding());
        if kind == "write" {
            let mut back = [0; 4096];
            client.queue(0).read(8, &mut back).unwrap();
            assert_eq!(back, [7; 4096]);
        }
        assert!(!logged::of(&id).iter().any(|line| line.contains("given up")), "{kind}");
    }
}

/// The program ends, too.
#[test]
fn a_stopped_export_closes() {
    let (disk, _image, client) = held("closes", "write", libc::EIO);
    drop(disk);
    drop(client);
}

#[test]
fn without_space_it_is_tried_again_every_second() {
    for on_error in [OnError::Enospc, OnError::Stop] {
        let once = json!({"event": "none", "iotype": "write", "errno": 28, "once": true});
        let rules = json!({"inject-error": [once, once]});
        let (disk, _image) =
            disk(&format!("space-{on_error:?}"), &rules, policy(OnError::Report, on_error));
        let mut client = disk.connect(small());
        let start = Instant::now();
        client.queue(0).write(0, &[1; 4096]).unwrap();
        let took = start.elapsed();
        assert!(took >= Duration::from_secs(2), "two tries failed: {took:?}");
    }
    // Another error is reported with `enospc`.
    let rules = json!({"inject-error": [{"event": "none", "iotype": "write", "once": true}]});
    let (disk, _image) = disk("space-eio", &rules, policy(OnError::Report, OnError::Enospc));
    let mut client = disk.connect(small());
    let write = client.queue(0).write_request(0, &[1; 512]).unwrap();
    assert_eq!(status(client.queue(0), write), Status::IoErr);
}

#[test]
fn ignored_errors_are_logged_all_the_same() {
    let rules = json!({"inject-error": [{"event": "none"}]});
    let (disk, _image) = disk("ignored", &rules, policy(OnError::Ignore, OnError::Ignore));
    let mut client = disk.connect(small());
    let q = client.queue(0);
    q.write(0, &[1; 512]).unwrap();
    q.flush().unwrap();
    q.read(0, &mut [0; 512]).unwrap();
    assert!(!logged::of("ignored").is_empty());
}
