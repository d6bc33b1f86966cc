//! `--metrics` and `top`: the program itself, its socket, and guests whose requests are known.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;
mod counts;
mod hostile;
mod openmetrics;
#[path = "../takeover/place.rs"]
#[allow(dead_code, reason = "its other users need more")]
mod place;
mod prometheus;
mod serving;
mod top;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use common::{LIMIT, eventually};
use openmetrics::Scrape;
use place::Place;

/// Starts the program with metrics at `m` in its directory.
fn start(dir: tempfile::TempDir, args: &[&str]) -> Place {
    let mut all = vec!["--metrics=m", "--log-level=warn"];
    all.extend(args);
    Place::start(dir, &all)
}

/// A raw file of 1 MiB, exported at `s` with four queues.
fn raw() -> Place {
    let dir = Place::dir();
    std::fs::File::create(dir.path().join("disk")).unwrap().set_len(common::MIB).unwrap();
    start(
        dir,
        &[
            "--blockdev=driver=raw,node-name=n,discard=unmap,file.driver=file,file.filename=disk,file.discard=unmap",
            "--export=vhost-user-blk,id=disk0,node-name=n,writable=on,num-queues=4,addr.type=unix,addr.path=s",
        ],
    )
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream
}

/// Everything that is answered to `request`.
fn ask(path: &Path, request: &[u8]) -> String {
    let mut stream = connect(path);
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

/// One scrape, checked against the specification.
fn scrape(path: &Path) -> Scrape {
    let answer = ask(path, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(
        head.contains("Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8")
    );
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    Scrape::parse(body)
}

/// A scrape when the workers have counted `answers`, of which `timed` have a latency: they count when a turn ends.
fn settled(path: &Path, answers: f64, timed: f64) -> Scrape {
    let mut last = None;
    eventually("all is counted", || {
        let scrape = scrape(path);
        let done = scrape.sum("requests_total", "") == answers
            && scrape.sum("request_latency_seconds_count", "") == timed
            && scrape.sum("in_flight_requests", "") == 0.0;
        last = Some(scrape);
        done
    });
    last.unwrap()
}
