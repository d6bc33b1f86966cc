//! Image locks against the real thing: this program, qemu-storage-daemon, qemu-io and qemu-img on one image refuse
//! each other exactly as two QEMUs do.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_vhost-user-blk");
const QSD: &str = "qemu-storage-daemon";

/// How long a process may take to get where it must.
const PATIENCE: Duration = Duration::from_secs(30);

/// A directory with a raw and a qcow2 image.
struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    fn new() -> Images {
        let images = Images { dir: tempfile::tempdir().unwrap() };
        for (name, format) in [("r.raw", "raw"), ("q.qcow2", "qcow2")] {
            let made = Command::new("qemu-img")
                .args(["create", "-q", "-f", format])
                .arg(images.path(name))
                .arg("1M")
                .status();
            assert!(made.unwrap().success());
        }
        images
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `-blockdev` for an image under node-name `f`, with further options.
    fn file(&self, name: &str, more: &str) -> [String; 2] {
        let path = self.path(name);
        let path = path.display();
        ["--blockdev".into(), format!("file,node-name=f,filename={path}{more}")]
    }

    /// `--export` of a node at a socket in the directory.
    fn export(&self, socket: &str, node: &str, more: &str) -> [String; 2] {
        let path = self.path(socket);
        let path = path.display();
        let export =
            format!("vhost-user-blk,id=e,node-name={node},addr.type=unix,addr.path={path}{more}");
        ["--export".into(), export]
    }

    /// Runs a tool in the directory.
    fn tool(&self, program: &str, args: &[&str]) -> Output {
        Command::new(program).args(args).current_dir(self.dir.path()).output().unwrap()
    }

    /// The bytes locked in an image by whoever, as the kernel lists them. One that is locked twice is there once: QSD opens a file
    /// anew for writing before it closes the other.
    fn locked(&self, name: &str) -> Vec<u64> {
        let inode = std::fs::metadata(self.path(name)).unwrap().ino().to_string();
        let mut bytes = vec![];
        for line in std::fs::read_to_string("/proc/locks").unwrap().lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let [.., place, first, last] = words[..] else { continue };
            if place.rsplit(':').next() == Some(inode.as_str()) {
                assert!(line.contains("OFDLCK") && line.contains("READ"), "{line}");
                bytes.extend(first.parse::<u64>().unwrap()..=last.parse().unwrap());
            }
        }
        bytes.sort_unstable();
        bytes.dedup();
        bytes
    }
}

/// A running daemon; ended by SIGTERM when dropped.
struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts `program`, and waits until `socket` is there, which is when its set-up is complete.
    fn start(program: &str, args: &[String], socket: &Path) -> Daemon {
        let child = Command::new(program).args(args).stderr(Stdio::piped()).spawn().unwrap();
        let mut daemon = Daemon { child };
        let deadline = Instant::now() + PATIENCE;
        while !socket.exists() {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("{program} {args:?} ended with {status}");
            }
            assert!(Instant::now() < deadline, "{program} {args:?} does not listen");
            std::thread::sleep(Duration::from_millis(1));
        }
        daemon
    }

    /// Access modes of the descriptors that the daemon has open for `path`.
    fn access_modes(&self, path: &Path) -> Vec<&'static str> {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let path = path.canonicalize().unwrap();
        let mut modes = vec![];
        for entry in std::fs::read_dir(proc.join("fd")).unwrap().flatten() {
            if std::fs::read_link(entry.path()).is_ok_and(|target| target == path) {
                let info = proc.join("fdinfo").join(entry.file_name());
                let info = std::fs::read_to_string(info).unwrap();
                let flags = info.lines().find_map(|l| l.strip_prefix("flags:")).unwrap().trim();
                modes.push(if flags.ends_with('2') { "rw" } else { "ro" });
            }
        }
        modes
    }

    fn stop(self) {
        drop(self);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let id = self.child.id().to_string();
        let _ = Command::new("kill").args(["-TERM", &id]).status();
        let _ = self.child.wait();
    }
}

/// The error with which `program` refuses to start: its lines, without the program's name and the option before the
/// message.
fn refused(program: &str, args: &[String]) -> Vec<String> {
    let mut child = Command::new(program).args(args).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{program} {args:?} was not refused");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{program} {args:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let (name, option) = (Path::new(program).file_name().unwrap(), args.last().unwrap());
    let before = format!("{}: ", name.to_str().unwrap());
    let first = lines[0].strip_prefix(&before).unwrap_or_else(|| panic!("{text}"));
    let (said, message) = first.split_once(&format!("{option}: ")).expect("names the option");
    assert!(said.starts_with("--"), "{first}");
    lines[0] = message.to_owned();
    lines
}

fn args(parts: &[[String; 2]]) -> Vec<String> {
    parts.concat()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The same set-up, started by QSD and by us, holds the same lock bytes and the same access modes.
#[test]
fn locks_are_qsds_to_the_byte() {
    for (more, raw, export, want) in [
        ("", None, Some(",writable=on"), vec![100, 101]),
        ("", None, Some(""), vec![100]),
        (",locking=off", None, Some(",writable=on"), vec![]),
        (",read-only=on,force-share=on", None, Some(""), vec![100]),
        (",auto-read-only=on", Some(""), Some(",writable=on"), vec![100, 101]),
        (",auto-read-only=on", Some(""), Some(""), vec![100]),
        ("", Some(",size=524288"), Some(",writable=on"), vec![100, 101, 203]),
        // Without a user, a raw node holds nothing.
        ("", Some(""), None, vec![]),
        (",auto-read-only=on", Some(""), None, vec![]),
    ] {
        let images = Images::new();
        let mut modes = vec![];
        for program in [QSD, OURS] {
            let mut parts = vec![images.file("r.raw", more)];
            if let Some(options) = raw {
                // Integers of QAPI take no keyval suffix, but digits.
                parts.push(["--blockdev".into(), format!("raw,node-name=r,file=f{options}")]);
            }
            let top = if raw.is_some() { "r" } else { "f" };
            match export {
                Some(options) => parts.push(images.export("s", top, options)),
                None => {
                    parts.push(["--blockdev".into(), "null-co,node-name=n".into()]);
                    parts.push(images.export("s", "n", ""));
                }
            }
            let daemon = Daemon::start(program, &args(&parts), &images.path("s"));
            assert_eq!(images.locked("r.raw"), want, "{program} {parts:?}");
            modes.push(daemon.access_modes(&images.path("r.raw")));
            daemon.stop();
            assert_eq!(images.locked("r.raw"), [0u64; 0], "{program} left locks");
            let _ = std::fs::remove_file(images.path("s"));
        }
        assert_eq!(modes[0], modes[1], "{more} {raw:?} {export:?}");
    }
}

/// Raw images are shared by writers; whoever needs an image for itself is refused, and says so.
#[test]
fn qemu_is_refused_where_we_write() {
    let images = Images::new();
    let parts = [images.file("q.qcow2", ""), images.export("s", "f", ",writable=on")];
    let daemon = Daemon::start(OURS, &args(&parts), &images.path("s"));
    let hint = |name: &str| format!("Is another process using the image [{name}]?");

    let io = images.tool("qemu-io", &["-f", "qcow2", "-c", "read 0 512", "q.qcow2"]);
    assert!(stderr(&io).contains("Failed to get shared \"write\" lock"), "{}", stderr(&io));
    assert!(stderr(&io).contains(&hint("q.qcow2")), "{}", stderr(&io));
    let info = images.tool("qemu-img", &["info", "q.qcow2"]);
    assert!(!info.status.success() && stderr(&info).contains("shared \"write\" lock"));
    let forced = images.tool("qemu-img", &["info", "-U", "q.qcow2"]);
    assert!(forced.status.success(), "{}", stderr(&forced));
    let raw = images.tool("qemu-io", &["-f", "raw", "-c", "read 0 512", "q.qcow2"]);
    assert!(raw.status.success(), "{}", stderr(&raw));

    let path = images.path("q.qcow2");
    let qcow2 = format!("qcow2,node-name=q,file.driver=file,file.filename={}", path.display());
    let lines = refused(QSD, &["--blockdev".to_owned(), qcow2]);
    assert_eq!(
        lines,
        ["Failed to get shared \"write\" lock".to_owned(), hint(path.to_str().unwrap())]
    );

    // Two writers of raw bytes, QSD and us, share.
    let second = [images.file("q.qcow2", ""), images.export("s2", "f", ",writable=on")];
    Daemon::start(QSD, &args(&second), &images.path("s2")).stop();
    daemon.stop();
    let info = images.tool("qemu-img", &["info", "q.qcow2"]);
    assert!(info.status.success(), "{}", stderr(&info));
}

/// Where QSD owns an image, we are refused as another QSD is.
#[test]
fn we_are_refused_where_qemu_owns_the_image() {
    let images = Images::new();
    let path = images.path("q.qcow2");
    let qcow2 = format!("qcow2,node-name=q,file.driver=file,file.filename={}", path.display());
    let owner = [["--blockdev".to_owned(), qcow2], images.export("s", "q", ",writable=on")];
    let owner = Daemon::start(QSD, &args(&owner), &images.path("s"));
    let held = images.locked("q.qcow2");
    assert_eq!(held, [100, 101, 103, 201, 203]);

    for more in ["", ",auto-read-only=on"] {
        let parts = [images.file("q.qcow2", more), images.export("s2", "f", ",writable=on")];
        let [qsd, ours] = [QSD, OURS].map(|program| refused(program, &args(&parts)));
        assert_eq!(ours[0], "Failed to get \"write\" lock");
        assert_eq!(ours[0], qsd[0]);
        let hint = format!("Is another process using the image [{}]?", path.display());
        assert!(ours[1..].iter().all(|line| *line == hint), "{ours:?}");
        assert!(!images.path("s2").exists());
        assert_eq!(images.locked("q.qcow2"), held);
    }

    // A reader is let in, as QSD's owner shares reads.
    let reader = [images.file("q.qcow2", ""), images.export("s3", "f", "")];
    Daemon::start(OURS, &args(&reader), &images.path("s3")).stop();
    owner.stop();

    let writer = [images.file("q.qcow2", ""), images.export("s4", "f", ",writable=on")];
    Daemon::start(OURS, &args(&writer), &images.path("s4")).stop();
}

/// `auto-read-only=on` and locks, in one process: the export's writer opens the file for writing in place.
#[test]
fn auto_read_only_reopens_in_place() {
    let images = Images::new();
    let file = images.file("r.raw", ",auto-read-only=on");
    for (writable, mode) in [("", "ro"), (",writable=on", "rw")] {
        let parts = [file.clone(), images.export("s", "f", writable)];
        let daemon = Daemon::start(OURS, &args(&parts), &images.path("s"));
        assert_eq!(daemon.access_modes(&images.path("r.raw")), [mode]);
        daemon.stop();
        let _ = std::fs::remove_file(images.path("s"));
    }
}
