//! A place at which one program after the other serves the same exports.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::LIMIT;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_vhost-user-blk");

/// A running program with a control socket, and those that come after it.
pub struct Place {
    pub child: Child,
    pub dir: TempDir,
}

/// Waits until `done`, looking all the time.
pub fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(start.elapsed() < LIMIT, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// qemu-img finds nothing wrong with the qcow2 image at `image`, no leak either.
pub fn assert_clean(image: &Path) {
    let check = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(image).output();
    let text = String::from_utf8(check.unwrap().stdout).unwrap();
    assert!(text.contains("No errors were found"), "{text}");
}

impl Place {
    /// A directory beside the sources' build: a real file system.
    pub fn dir() -> TempDir {
        tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
    }

    /// Starts the first program in `dir` with `args` and waits until all is up.
    pub fn start(dir: TempDir, args: &[&str]) -> Place {
        Place::start_with(dir, args, Stdio::null())
    }

    pub fn start_with(dir: TempDir, args: &[&str], stdin: Stdio) -> Place {
        let mut command = Command::new(PROGRAM);
        command.args(["--control=ctl", "--pidfile=pid", "--log-level=info"]).args(args);
        let child = spawn(command.stdin(stdin), dir.path());
        let place = Place { child, dir };
        place.wait_for_pid(place.child.id());
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Everything that all of them have logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    /// The process number in the pidfile.
    pub fn pid(&self) -> Option<u32> {
        std::fs::read_to_string(self.path("pid")).ok()?.strip_suffix('\n')?.parse().ok()
    }

    pub fn wait_for_pid(&self, pid: u32) {
        wait_for("the pidfile", || (self.pid() == Some(pid)).then_some(()));
    }

    /// A successor takes over; the one before it has ended well.
    pub fn take_over(&mut self) {
        let successor = self.successor(&mut Command::new(PROGRAM));
        let mut before = std::mem::replace(&mut self.child, successor);
        let status = wait_for("the predecessor's end", || before.try_wait().unwrap());
        assert_eq!(status.code(), Some(0), "{}", self.log());
        self.wait_for_pid(self.child.id());
    }

    /// Starts a successor with `command`.
    pub fn successor(&self, command: &mut Command) -> Child {
        spawn(command.args(["--take-over=ctl", "--log-level=info"]), self.dir.path())
    }

    /// A successor that must fail; the program goes on.
    pub fn fail_to_take_over(&mut self, command: &mut Command) {
        let mut successor = self.successor(command);
        let status = wait_for("the successor's end", || successor.try_wait().unwrap());
        assert_eq!(status.code(), Some(1), "{}", self.log());
        self.assert_alive();
    }

    pub fn assert_alive(&mut self) {
        assert_eq!(self.child.try_wait().unwrap(), None, "it has ended: {}", self.log());
        assert_eq!(self.pid(), Some(self.child.id()));
    }

    /// How long each pause took until `what`, in milliseconds.
    pub fn pauses(&self, what: &str) -> Vec<f64> {
        let (log, what) = (self.log(), format!("take-over: {what} after "));
        let times = log.lines().filter_map(|line| line.split_once(&what));
        times.map(|(_, time)| milliseconds(time)).collect()
    }

    /// SIGTERM: ends well, and leaves no name behind.
    pub fn stop(mut self) -> TempDir {
        vub_client::sys::kill(self.child.id(), libc::SIGTERM).unwrap();
        let status = wait_for("the end", || self.child.try_wait().unwrap());
        assert_eq!(status.code(), Some(0), "{}", self.log());
        for name in ["ctl", "pid", "s"] {
            assert!(!self.path(name).exists(), "{name} is left behind");
        }
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It may have ended; then there is nobody to kill.
        self.child.kill().unwrap_or_default();
        self.child.wait().unwrap();
    }
}

/// As `Duration` prints itself.
fn milliseconds(time: &str) -> f64 {
    let at = time.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap();
    let number: f64 = time[..at].parse().unwrap();
    match &time[at..] {
        "ms" => number,
        "s" => number * 1e3,
        "µs" => number / 1e3,
        unit => panic!("{unit}"),
    }
}

fn spawn(command: &mut Command, dir: &Path) -> Child {
    let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
    command.current_dir(dir).stdout(Stdio::null()).stderr(log);
    command.spawn().unwrap()
}
