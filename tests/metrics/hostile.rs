//! Clients of the metrics socket that want no metrics.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Instant;

use vhost_user_blk::metrics::server::Listener;
use vhost_user_blk::metrics::{ExportMeter, Registry};
use vub_client::Client;

use crate::common::{LIMIT, eventually, small};
use crate::openmetrics::Scrape;
use crate::{ask, connect, raw, scrape};

/// Whether the other end has given up: an end, or a reset because it did not read all.
fn is_closed(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0; 1]) {
        Ok(n) => n == 0,
        Err(e) => e.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn neither_guests_nor_scrapers_notice_them() {
    let place = raw();
    let path = place.path("m");
    let mut client = Client::connect_retry(place.path("s"), small()).unwrap();
    client.queue(0).read(0, &mut [0; 512]).unwrap();
    let fds = || std::fs::read_dir(format!("/proc/{}/fd", place.child.id())).unwrap().count();
    let before = fds();
    // Two hundred say nothing; then each kind of nonsense, and requests that never end.
    let mut silent: Vec<_> = (0..200).map(|_| connect(&path)).collect();
    for (request, status) in [
        (&b"POST /metrics HTTP/1.1\r\n\r\n"[..], "405 "),
        (b"GET /etc/passwd HTTP/1.1\r\n\r\n", "404 "),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", "400 "),
        (&[b'x'; 8192], "431 "),
    ] {
        let answer = ask(&path, request);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
    }
    let mut endless = connect(&path);
    // One that ends at once, one that sends a request and does not stay for the answer.
    drop(connect(&path));
    connect(&path).write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let chatter = std::thread::spawn(move || {
        while endless.write_all(b"GET /metrics HTTP/1.1\r\nX: y\r\n").is_ok() {}
    });
    chatter.join().unwrap();
    scrape(&path);
    assert!(fds() <= before + 17, "{} descriptors, {before} before", fds());
    client.queue(0).read(0, &mut [0; 512]).unwrap();
    // The first ones had to go for the last; the last ones when their time was over.
    let start = Instant::now();
    assert!(silent.iter_mut().all(is_closed));
    assert!(start.elapsed() < LIMIT);
    eventually("their descriptors are gone", || fds() == before);
    scrape(&path);
    client.queue(0).read(0, &mut [0; 512]).unwrap();
    drop(client);
    place.stop();
}

/// An answer that no socket buffer holds, for one who does not read it, one who takes his time, and one in a hurry.
#[test]
fn slow_readers_hold_up_nobody() {
    let registry = Arc::new(Registry::default());
    let exports: Vec<_> = (0..40)
        .map(|i| Arc::new(ExportMeter::new(&format!("export-{i}"), "node", 16, 16)))
        .collect();
    for export in &exports {
        registry.add_export(export);
        for queue in 0..16 {
            export.queue(queue).latency.iter().for_each(|latency| latency.record(1000, 1));
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    Listener::Unix(UnixListener::bind(&path).unwrap()).serve(&registry).unwrap();
    let request = b"GET /metrics HTTP/1.1\r\n\r\n";
    let (mut never, mut slow) = (connect(&path), connect(&path));
    never.write_all(request).unwrap();
    slow.write_all(request).unwrap();
    let hurried = scrape(&path);
    assert!(hurried.text.len() > 4 << 20, "{} bytes fit in a buffer", hurried.text.len());
    let mut text = Vec::new();
    let mut part = vec![0; 64 << 10];
    loop {
        match slow.read(&mut part).unwrap() {
            0 => break,
            n => text.extend_from_slice(&part[..n]),
        }
    }
    let text = String::from_utf8(text).unwrap();
    Scrape::parse(text.split_once("\r\n\r\n").unwrap().1);
    // His time is over: what is left of the answer is not all of it.
    eventually("the end of who does not read", || never.write_all(b"x").is_err());
    let mut rest = Vec::new();
    // It ends with an error, or without.
    never.read_to_end(&mut rest).unwrap_or_default();
    assert!(rest.len() < hurried.text.len() / 2, "{} bytes", rest.len());
}
