//! A real live migration: two QEMUs, two of our programs, one qcow2, and fio at work in the guest.
//!
//! The machinery is that of `tests/guest.rs`; `contrib/guest/migrating-qemu` starts the two QEMUs.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(200);
/// What we may add to the time in which the guest stands still, in milliseconds.
const OUR_DOWNTIME_MS: f64 = 100.0;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The program on the image, one of two.
struct Side {
    program: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Side {
    fn start(dir: &Path, name: &str) -> Side {
        let (socket, log) = (dir.join(format!("{name}.sock")), dir.join(format!("{name}.log")));
        let file = json!({"driver": "file", "filename": dir.join("disk")});
        let node =
            json!({"driver": "qcow2", "node-name": "disk", "file": file, "discard": "unmap"});
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
        command.args(["--log-level=info", "--blockdev", &node.to_string(), "--export"]).arg(format!(
            "vhost-user-blk,node-name=disk,writable=on,activate=auto,addr.type=unix,addr.path={}",
            socket.display()
        ));
        let program = command.stdin(Stdio::null()).stderr(File::create(&log).unwrap()).spawn();
        let side = Side { program: program.unwrap(), socket, log };
        wait_for("a socket", || side.socket.exists());
        side
    }

    /// How long each change took, in milliseconds.
    fn changes(&self, to: &str) -> Vec<f64> {
        let text = std::fs::read_to_string(&self.log).unwrap();
        let what = format!(": {to} after ");
        let times = text.lines().filter_map(|line| line.split_once(&what));
        times.map(|(_, time)| time.trim_end_matches(" ms").parse().unwrap()).collect()
    }

    fn stop(&mut self) {
        let pid = self.program.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        assert_eq!(self.program.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // After `stop` there is nothing to kill.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

/// What was written to a file, told when the test fails.
struct Told(PathBuf);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: {:?}", self.0.display(), std::fs::read_to_string(&self.0));
        }
    }
}

/// A conversation with a QEMU.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(path: &Path) -> Qmp {
        let mut stream = None;
        wait_for("QEMU's monitor", || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut qmp = Qmp(BufReader::new(stream));
        qmp.0.read_line(&mut String::new()).unwrap();
        qmp.ask("qmp_capabilities", &json!({}));
        qmp
    }

    fn ask(&mut self, command: &str, arguments: &Value) -> Value {
        // In one piece: QEMU is gone before the line ends that tells it to quit.
        let request = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).unwrap() > 0, "{command}: the monitor is gone");
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get("return") {
                return value.clone();
            }
        }
    }
}

/// Moves the guest; QEMU's own account of it.
fn migrate(dir: &Path) -> Value {
    let mut from = Qmp::connect(&dir.join("from.qmp"));
    let parameters = json!({"max-bandwidth": 4u64 << 30, "downtime-limit": 300});
    from.ask("migrate-set-parameters", &parameters);
    let uri = format!("unix:{}", dir.join("migration.sock").display());
    from.ask("migrate", &json!({"uri": uri}));
    let mut info = Value::Null;
    wait_for("the migration", || {
        info = from.ask("query-migrate", &json!({}));
        let status = info["status"].as_str().unwrap();
        assert!(!["failed", "cancelled"].contains(&status), "{info}");
        status == "completed"
    });
    from.ask("quit", &json!({}));
    info
}

#[test]
fn a_guest_moves_while_fio_verifies() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let image = dir.path().join("disk");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("256M");
    assert!(create.status().unwrap().success());
    let mut sides = ["from", "to"].map(|name| Side::start(dir.path(), name));

    let mut run = Command::new(root().join("contrib/guest/run"));
    run.args(["--timeout", "240", "--env", "FIO_DEPTH=32", "--mem", "256", "--socket"]);
    run.arg(&sides[0].socket).arg("--script").arg(root().join("contrib/guest/tests/fio-verify.sh"));
    run.env("VUB_QEMU", root().join("contrib/guest/migrating-qemu"));
    run.env("VUB_DIR", dir.path())
        .env("VUB_FROM", &sides[0].socket)
        .env("VUB_TO", &sides[1].socket);
    let errors = dir.path().join("errors");
    let _told = [&errors, &sides[0].log, &sides[1].log].map(|path| Told(path.clone()));
    run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&errors).unwrap());
    let mut guest = run.spawn().unwrap();
    let mut output = BufReader::new(guest.stdout.take().unwrap());
    let mut text = String::new();
    // fio is at work when something of it is on the disk.
    while !text.contains("-- write") && output.read_line(&mut text).unwrap() > 0 {}
    let empty = std::fs::metadata(&image).unwrap().len();
    wait_for("fio's writes", || std::fs::metadata(&image).unwrap().len() > empty + (4 << 20));
    let info = migrate(dir.path());
    output.read_to_string(&mut text).unwrap();
    let status = guest.wait().unwrap();
    let errors = std::fs::read_to_string(&errors).unwrap();
    let logs = sides.each_ref().map(|side| std::fs::read_to_string(&side.log).unwrap());
    assert!(status.success(), "guest: {status}\n{text}\n{errors}\n{logs:?}");
    assert!(text.contains("-- mixed"), "{text}");

    // The last time that the source let go, the first time that the destination took over.
    let (left, taken) = (sides[0].changes("inactive"), sides[1].changes("active"));
    let (left, taken) = (left.last().unwrap(), taken.first().unwrap());
    println!("QEMU's downtime: {} ms; ours: {left} + {taken} ms", info["downtime"]);
    assert!(left + taken < OUR_DOWNTIME_MS, "{left} + {taken} ms\n{logs:?}");
    for (side, log) in sides.iter_mut().zip(logs) {
        side.stop();
        assert!(!log.contains("ERROR"), "{log}");
    }
    let check =
        Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&image).output().unwrap();
    let text = String::from_utf8_lossy(&check.stdout);
    assert!(text.contains("No errors were found"), "{text}");
}
