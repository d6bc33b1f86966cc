//! The command line beside the real qemu-storage-daemon: the same words, the same exit codes, and nothing left behind.
//!
//! The cases are in `cli/cases.txt`; both programs run each of them. What differs on purpose is marked there, with the
//! reason.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use tempfile::TempDir;

#[path = "cli/case.rs"]
mod case;
#[path = "cli/own.rs"]
mod own;

use case::{Case, cases};

const QSD: &str = "qemu-storage-daemon";
const OURS: &str = env!("CARGO_BIN_EXE_vhost-user-blk");
/// Longer than either program needs, on a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(20);

/// Gives the children descriptors 60 to 64. They stay open in this process.
fn pass_descriptors() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("l")).unwrap();
        let (stream, other) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let datagram = UnixDatagram::unbound().unwrap();
        std::mem::forget(other);
        let all: [&dyn AsRawFd; 5] = [&listener, &stream, &file, &tcp, &datagram];
        for (at, fd) in (60..).zip(all) {
            pass_descriptor(fd.as_raw_fd(), at);
        }
    });
}

fn pass_descriptor(from: RawFd, to: RawFd) {
    // SAFETY: nobody owns `to`: numbers this high are not reached otherwise.
    assert_eq!(unsafe { libc::dup2(from, to) }, to);
}

/// What a directory holds.
fn names(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Makes the images of `[qcow2]`, but for those of [`POKES`].
const IMAGES: &str = "
create() { qemu-img create -q -f qcow2 \"$@\"; }
create q.qcow2 1M
create -o compat=0.10 v2.qcow2 1M
create -b q.qcow2 -F qcow2 top.qcow2
create -u -b nope.qcow2 -F qcow2 orphan.qcow2 1M
create bitmaps.qcow2 1M
qemu-img bitmap --add bitmaps.qcow2 b
cp q.qcow2 snapshot.qcow2
qemu-img snapshot -c a snapshot.qcow2
create -o data_file=ext.raw ext.qcow2 1M
secret='--object secret,id=s,data=geheim'
create $secret -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks.qcow2 1M
create $secret -o encrypt.format=aes,encrypt.key-secret=s aes.qcow2 1M
cp q.qcow2 broken.cut.qcow2
truncate -s 196608 broken.cut.qcow2
";

/// Images with a byte that is another: name, made from, where, what.
const POKES: [(&str, &str, usize, u8); 7] = [
    ("dirty", "q", 79, 1),
    ("corrupt", "q", 79, 2),
    ("future", "q", 72, 0x40),
    // Tables that are not aligned; an L1 table that is too short; a directory of 8 bytes.
    ("broken.l1", "q", 46, 2),
    ("broken.reftable", "q", 54, 2),
    ("broken.size", "q", 27, 0x7f),
    ("broken.directory", "bitmaps", 0x20f, 8),
];

fn images() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let made = Command::new("sh").args(["-ec", IMAGES]).current_dir(dir.path()).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    for (name, from, at, byte) in POKES {
        let mut image = fs::read(dir.path().join(format!("{from}.qcow2"))).unwrap();
        assert_ne!(image[at], byte, "{name}");
        image[at] = byte;
        fs::write(dir.path().join(format!("{name}.qcow2")), image).unwrap();
    }
    dir
}

/// A directory to run a case in, with the qcow2 images of `images`. What is returned beside it must live as long.
fn scene(held: &Path, images: Option<&Path>) -> (TempDir, UnixListener) {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("dir")).unwrap();
    File::create(path("disk.raw")).unwrap().set_len(1 << 20).unwrap();
    fs::write(path("odd.raw"), [b'x'; 1000]).unwrap();
    fs::write(path("text"), "hello").unwrap();
    fs::write(path("secret.txt"), "geheim").unwrap();
    fs::write(path("secret.b64"), "Z2VoZWlt").unwrap();
    fs::hard_link(held, path("held.qcow2")).unwrap();
    drop(UnixListener::bind(path("stale.sock")).unwrap());
    for name in images.map(names).unwrap_or_default() {
        fs::copy(images.unwrap().join(&name), path(&name)).unwrap();
    }
    let busy = UnixListener::bind(path("busy.sock")).unwrap();
    (dir, busy)
}

/// What a program did.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// It set everything up, and had to be told to stop.
    running: bool,
    /// Its exit code; negative: a signal.
    code: i32,
    stdout: String,
    stderr: String,
}

/// Waits for the end.
fn wait(mut child: Child) -> Output {
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            panic!("did not end: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    child.wait_with_output().unwrap()
}

fn terminate(child: &Child) {
    // SAFETY: the child has not been waited for, so the number is still its.
    unsafe { libc::kill(child.id().cast_signed(), libc::SIGTERM) };
}

/// Runs `program` in `dir` until it ends, or until all is set up and then till it has obeyed SIGTERM.
fn run(program: &str, args: &[String], dir: &Path) -> Outcome {
    let aside = tempfile::tempdir().unwrap();
    let pidfile = aside.path().join("pid");
    let mut command = Command::new(program);
    // The pidfile is written last: it shows that the rest succeeded. First on the line, it changes nothing else.
    if !args.iter().any(|arg| arg.starts_with("--p")) {
        command.arg("--pidfile").arg(&pidfile);
    }
    let (out, err) = (aside.path().join("out"), aside.path().join("err"));
    let mut child = command
        .args(args)
        .current_dir(dir)
        .env_remove("RUST_LOG")
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(&err).unwrap())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e} (contrib/test installs it)"));
    let start = Instant::now();
    let mut running = false;
    while child.try_wait().unwrap().is_none() && !running {
        running = [&pidfile, &dir.join("pid"), &dir.join("b")]
            .iter()
            .any(|path| fs::metadata(path).is_ok_and(|there| there.len() > 0));
        assert!(start.elapsed() < PATIENCE, "neither ends nor starts: {program} {args:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    if running {
        terminate(&child);
    }
    let status = wait(child).status;
    assert!(!pidfile.exists(), "pidfile left behind: {program} {args:?}");
    let read = |path| String::from_utf8_lossy(&fs::read(path).unwrap()).into_owned();
    Outcome {
        running,
        code: status.code().unwrap_or_else(|| -status.signal().unwrap_or_default()),
        stdout: read(out),
        stderr: read(err),
    }
}

/// A qcow2 image that a running qemu-storage-daemon has open for writing.
struct Held {
    dir: TempDir,
    holder: Child,
}

impl Held {
    fn new() -> Held {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("held.qcow2");
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&image)
            .arg("1M")
            .status();
        assert!(made.unwrap().success());
        let pidfile = dir.path().join("pid");
        let holder = Command::new(QSD)
            .arg("--blockdev")
            .arg(format!("qcow2,node-name=q,file.driver=file,file.filename={}", image.display()))
            .arg("--pidfile")
            .arg(&pidfile)
            .spawn()
            .unwrap();
        let start = Instant::now();
        while !pidfile.exists() {
            assert!(start.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(2));
        }
        Held { dir, holder }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.holder.kill().unwrap();
        self.holder.wait().unwrap();
    }
}

/// What is wrong with a case; `None`: nothing.
fn judge(case: &Case, held: &Held, images: Option<&Path>) -> Option<String> {
    let image = held.dir.path().join("held.qcow2");
    let theirs = {
        let (dir, _busy) = scene(&image, images);
        let mut outcome = run(QSD, &case.args, dir.path());
        outcome.stdout = outcome.stdout.replace(QSD, "vhost-user-blk");
        outcome.stderr = outcome.stderr.replace(QSD, "vhost-user-blk");
        outcome
    };
    let (dir, _busy) = scene(&image, images);
    let before = names(dir.path());
    let ours = run(OURS, &case.args, dir.path());
    let left: Vec<_> = names(dir.path()).difference(&before).cloned().collect();
    let complaint = match (theirs == ours, case.difference) {
        _ if !left.is_empty() => format!("left behind {left:?}"),
        _ if ours.code < 0 => "died of a signal".to_string(),
        _ if ours.code == 0 && !ours.stderr.is_empty() => "not quiet on success".to_string(),
        _ if ours.code != 0 && !ours.running && !dir.path().join("busy.sock").exists() => {
            "a start that failed took away a live socket".to_string()
        }
        (true, None) | (false, Some(_)) => return None,
        (true, Some(reason)) => format!("no longer differs ({reason})"),
        (false, None) => "differs".to_string(),
    };
    Some(format!("{}\n  {complaint}\n  QEMU {theirs:?}\n  ours {ours:?}\n", case.text))
}

fn compare(section: &str) {
    pass_descriptors();
    let held = Held::new();
    let images = (section == "qcow2").then(images);
    let images = images.as_ref().map(TempDir::path);
    let cases = cases(section);
    let faults: Vec<_> = cases.iter().filter_map(|case| judge(case, &held, images)).collect();
    let (bad, all) = (faults.len(), cases.len());
    assert!(faults.is_empty(), "{bad} of {all} cases:\n{}", faults.concat());
}

#[test]
fn options_as_qemu() {
    compare("options");
}

#[test]
fn keyval_as_qemu() {
    compare("keyval");
}

#[test]
fn json_as_qemu() {
    compare("json");
}

#[test]
fn objects_as_qemu() {
    compare("objects");
}

#[test]
fn exports_as_qemu() {
    compare("exports");
}

#[test]
fn nodes_as_qemu() {
    compare("nodes");
}

#[test]
fn blkdebug_as_qemu() {
    compare("blkdebug");
}

#[test]
fn blklogwrites_as_qemu() {
    compare("blklogwrites");
}

#[test]
fn qcow2_as_qemu() {
    compare("qcow2");
}

#[test]
fn starts_as_qemu() {
    compare("start");
}
