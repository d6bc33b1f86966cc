//! How metrics are served: where, by whom, in the sandbox, after an upgrade, while guests work.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use vub_client::{Client, Status};

use crate::common::{LIMIT, eventually, small};
use crate::place::{PROGRAM, Place};
use crate::{raw, scrape, settled, start};

const NULL: &str = "--blockdev=driver=null-co,node-name=n,size=1048576,read-zeroes=on";
const EXPORT: &str =
    "--export=vhost-user-blk,id=disk0,node-name=n,writable=on,addr.type=unix,addr.path=s";

#[test]
fn a_socket_of_ones_own_that_goes_with_the_program() {
    let place = raw();
    let mode = fs::symlink_metadata(place.path("m")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // The sandbox is on: three filters of the process, and the thread's own.
    eventually("its filters", || {
        fs::read_dir(format!("/proc/{}/task", place.child.id())).unwrap().any(|task| {
            let task = task.unwrap().path();
            fs::read_to_string(task.join("comm")).unwrap() == "metrics\n"
                && fs::read_to_string(task.join("status"))
                    .unwrap()
                    .contains("Seccomp_filters:\t4\n")
        })
    });
    let before = scrape(&place.path("m"));
    assert_eq!(before.sum("export_info", "export=\"disk0\",node=\"n\""), 1.0);
    assert_eq!(before.sum("queue_info", ""), 0.0, "{}", before.text);
    let dir = place.stop();
    assert!(!dir.path().join("m").exists());
    assert_eq!(fs::read_to_string(dir.path().join("log")).unwrap(), "");
}

#[test]
fn a_port_of_the_loopback_interface() {
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("--metrics=127.0.0.1:{port}");
    let place = Place::start(Place::dir(), &["--log-level=warn", &address, NULL, EXPORT]);
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("# EOF\n"), "{answer}");
    place.stop();
}

#[test]
fn other_hosts_and_files_are_refused() {
    let dir = Place::dir();
    fs::write(dir.path().join("precious"), "x").unwrap();
    for (address, why) in [
        ("0.0.0.0:9100", "'0.0.0.0' is not loopback"),
        ("precious", "exists and is not a socket"),
        ("", "expected PATH"),
    ] {
        // It ends by itself; if not, it is ended.
        let mut command = Command::new("timeout");
        command
            .args(["20", PROGRAM])
            .current_dir(dir.path())
            .args([NULL, EXPORT])
            .arg(format!("--metrics={address}"));
        let output = command.stdin(Stdio::null()).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{address}");
        assert!(errors.contains(why) && errors.contains("--metrics="), "{errors}");
    }
    assert_eq!(fs::read(dir.path().join("precious")).unwrap(), b"x");
}

/// Ends a loop when it is dropped.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn scraped_while_a_guest_works() {
    let place = start(Place::dir(), &[NULL, EXPORT]);
    let (path, end) = (place.path("m"), AtomicBool::new(false));
    let mut client = Client::connect_retry(place.path("s"), small()).unwrap();
    let q = client.queue(0);
    let sent = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut sent = 0u32;
            while !end.load(Ordering::Relaxed) {
                for i in 0..32 {
                    q.push(q.read_request(i, 512).unwrap()).unwrap();
                }
                q.kick().unwrap();
                assert!(q.wait_all().unwrap().iter().all(|done| done.status == Status::Ok));
                sent += 32;
            }
            sent
        });
        // Also if this thread fails: nobody waits for a guest that never ends.
        let _ends = Ends(&end);
        let mut last = 0.0;
        for _ in 0..200 {
            let scrape = scrape(&path);
            let now = scrape.sum("requests_total", "op=\"read\"");
            assert!(now >= last, "a counter went back");
            last = now;
        }
        assert!(last > 0.0);
        end.store(true, Ordering::Relaxed);
        worker.join().unwrap()
    });
    let scrape = settled(&path, sent.into(), sent.into());
    assert_eq!(scrape.sum("requests_total", ""), f64::from(sent));
    assert_eq!(scrape.sum("request_bytes_total", ""), f64::from(sent) * 512.0);
    drop(client);
    place.stop();
}

/// The successor has the socket, at the same place, and counts from 0.
#[test]
fn a_successor_goes_on_with_the_socket() {
    let mut place = start(Place::dir(), &[NULL, EXPORT]);
    let mut client = Client::connect_retry(place.path("s"), small()).unwrap();
    for round in 1..=3 {
        for _ in 0..round {
            client.queue(0).read(0, &mut [0; 512]).unwrap();
        }
        let scrape = settled(&place.path("m"), round.into(), round.into());
        assert_eq!(scrape.sum("requests_total", "op=\"read\""), f64::from(round));
        place.take_over();
    }
    drop(client);
    let dir = place.stop();
    assert!(!dir.path().join("m").exists());
}
