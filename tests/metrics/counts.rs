//! Counters equal what was sent.

use std::process::Command;

use vub_client::blk::Request;
use vub_client::{Client, Options, Status};

use crate::common::{MIB, small};
use crate::place::Place;
use crate::{raw, scrape, settled, start};

fn guest(place: &Place, queues: u16) -> Client {
    Client::connect_retry(place.path("s"), Options { queues, ..small() }).unwrap()
}

#[test]
fn every_request_of_two_queues_is_counted_once() {
    let place = raw();
    let mut client = guest(&place, 2);
    let q = client.queue(0);
    for i in 0..7 {
        q.write(i * 8, &[1; 4096]).unwrap();
    }
    for _ in 0..5 {
        q.read(0, &mut [0; 512]).unwrap();
    }
    q.flush().unwrap();
    q.discard(16, 8).unwrap();
    q.discard(64, 16).unwrap();
    q.write_zeroes(32, 24, true).unwrap();
    q.get_id().unwrap();
    // Behind the end, and nothing that is known.
    let request = q.read_request(MIB / 512, 512).unwrap();
    assert_eq!(q.run(request).unwrap().status, Status::IoErr);
    assert_eq!(q.run(Request::bare(99, 0)).unwrap().status, Status::Unsupp);
    let other = client.queue(1);
    for _ in 0..3 {
        let requests: Vec<_> = (0..20).map(|i| other.read_request(i, 1024).unwrap()).collect();
        for request in requests {
            other.push(request).unwrap();
        }
        other.kick().unwrap();
        assert!(other.wait_all().unwrap().iter().all(|done| done.status == Status::Ok));
    }

    // Seven writes, six reads, a flush, and five others; sixty reads.
    let scrape = settled(&place.path("m"), 79.0, 74.0);
    let count = |name: &str, queue: u16, op: &str| {
        scrape.sum(name, &format!("export=\"disk0\",queue=\"{queue}\",op=\"{op}\""))
    };
    for (op, requests, bytes, errors) in [
        ("read", 6.0, 5.0 * 512.0, 1.0),
        ("write", 7.0, 7.0 * 4096.0, 0.0),
        ("flush", 1.0, 0.0, 0.0),
        ("discard", 2.0, 24.0 * 512.0, 0.0),
        ("write_zeroes", 1.0, 24.0 * 512.0, 0.0),
        ("get_id", 1.0, 20.0, 0.0),
        ("other", 1.0, 0.0, 1.0),
    ] {
        assert_eq!(count("requests_total", 0, op), requests, "{op}");
        assert_eq!(count("request_bytes_total", 0, op), bytes, "{op}");
        assert_eq!(count("request_errors_total", 0, op), errors, "{op}");
        let reads = if op == "read" { 60.0 } else { 0.0 };
        assert_eq!(count("requests_total", 1, op), reads, "{op}");
        assert_eq!(count("request_bytes_total", 1, op), reads * 1024.0, "{op}");
    }
    assert_eq!(count("request_latency_seconds_count", 0, "write"), 7.0);
    assert_eq!(count("request_latency_seconds_count", 1, "read"), 60.0);
    let took = count("request_latency_seconds_sum", 0, "write");
    assert!((1e-7..60.0).contains(&took), "{took} s");
    // Each notification is one write to the descriptor that the guest has.
    for i in 0..2 {
        let queue = format!("queue=\"{i}\"");
        let q = client.queue(i);
        assert_eq!(scrape.sum("notifications_total", &queue), q.calls().unwrap() as f64);
        let noticed = scrape.sum("kicks_total", &queue);
        assert!((1.0..=q.kicks() as f64).contains(&noticed), "{noticed} of {}", q.kicks());
        assert_eq!(scrape.sum("queue_info", &queue), 1.0);
    }
    // Two of four queues have run; a worker that has nothing to do sleeps.
    assert_eq!(scrape.sum("queue_info", ""), 2.0);
    assert!(scrape.sum("worker_poll_misses_total", "") >= 2.0);
    drop(client);
    place.stop();
}

/// A polling guest wants no notifications: every batch is one that was not sent.
#[test]
fn notifications_that_nobody_wants_are_counted_as_such() {
    let place = raw();
    let options = Options { polling: true, event_idx: false, ..small() };
    let mut client = Client::connect_retry(place.path("s"), options).unwrap();
    for _ in 0..50 {
        client.queue(0).read(0, &mut [0; 512]).unwrap();
    }
    let scrape = settled(&place.path("m"), 50.0, 50.0);
    assert_eq!(scrape.sum("notifications_total", ""), 0.0);
    assert_eq!(scrape.sum("notifications_suppressed_total", ""), 50.0);
    drop(client);
    place.stop();
}

/// A cache of two slices (there are never fewer), each of which describes 32 MiB; and the journal until a flush.
#[test]
fn qcow2s_caches_and_journal() {
    let dir = Place::dir();
    let image = dir.path().join("image");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("160M");
    assert!(create.status().unwrap().success());
    let state = format!("--state-dir={}", dir.path().join("state").display());
    std::fs::create_dir(dir.path().join("state")).unwrap();
    let place = start(
        dir,
        &[
            &state,
            "--blockdev=driver=qcow2,node-name=n,l2-cache-size=4096,l2-cache-entry-size=4096,file.driver=file,file.filename=image",
            "--export=vhost-user-blk,id=disk0,node-name=n,writable=on,num-queues=4,addr.type=unix,addr.path=s",
        ],
    );
    let mut client = guest(&place, 1);
    let path = place.path("m");
    let [far, farther] = [(64 << 20) / 512, (128 << 20) / 512];
    client.queue(0).write(0, &[1; 512]).unwrap();
    let node = "node=\"n\",driver=\"qcow2\"";
    let records = |name| scrape(&path).sum(name, node);
    assert!(records("node_journal_records") >= 1.0);
    assert!(records("node_journal_capacity_records") >= 1000.0);
    for sector in [far, farther] {
        client.queue(0).write(sector, &[2; 512]).unwrap();
    }
    client.queue(0).flush().unwrap();
    assert_eq!(records("node_journal_records"), 0.0);
    assert!(records("node_refcount_cache_hits_total") >= 3.0);
    for sector in [0, far, farther] {
        client.queue(0).read(sector, &mut [0; 512]).unwrap();
    }
    let before = records("node_l2_cache_misses_total");
    for _ in 0..10 {
        for sector in [0, far, farther] {
            client.queue(0).read(sector, &mut [0; 512]).unwrap();
        }
    }
    assert_eq!(records("node_l2_cache_misses_total") - before, 30.0);
    for _ in 0..10 {
        client.queue(0).read(farther, &mut [0; 512]).unwrap();
    }
    assert_eq!(records("node_l2_cache_misses_total") - before, 30.0);
    drop(client);
    place.stop();
}
