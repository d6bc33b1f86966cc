//! What only this program has: its own options, and how it starts and ends.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::case::{expand, split};
use super::{OURS, PATIENCE, names, pass_descriptor, pass_descriptors, terminate, wait};

/// Our own options: a running program in a directory of its own.
struct Running {
    dir: TempDir,
    child: Child,
}

impl Running {
    /// Starts with `args` (split as a shell does) and waits for the pidfile.
    fn start(args: &str) -> Running {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("disk.raw")).unwrap().set_len(1 << 20).unwrap();
        Self::start_in(dir, args)
    }

    fn start_in(dir: TempDir, args: &str) -> Running {
        let mut child = ours(dir.path(), args).arg("--pidfile=pid").spawn().unwrap();
        let start = Instant::now();
        while fs::read(dir.path().join("pid")).unwrap_or_default().is_empty() {
            if start.elapsed() > PATIENCE || child.try_wait().unwrap().is_some() {
                let _ = child.kill();
                panic!("does not start: {args}: {:?}", child.wait_with_output());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Running { dir, child }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// Stops it, checks that all went well, and answers what is left in its directory.
    fn stop(self) -> BTreeSet<String> {
        terminate(&self.child);
        let output = wait(self.child);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        names(self.dir.path())
    }
}

fn ours(dir: &Path, args: &str) -> Command {
    let mut command = Command::new(OURS);
    command.args(split(args)).current_dir(dir).env_remove("RUST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The standard error of a start that fails.
fn failure(args: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("disk.raw")).unwrap().set_len(1 << 20).unwrap();
    let output = wait(ours(dir.path(), args).spawn().unwrap());
    assert_eq!(output.status.code(), Some(1), "{args}");
    assert_eq!(names(dir.path()), BTreeSet::from(["disk.raw".to_string()]));
    String::from_utf8(output.stderr).unwrap()
}

fn disk_only() -> BTreeSet<String> {
    BTreeSet::from(["disk.raw".to_string()])
}

#[test]
fn conventions_of_vhost_user_back_ends() {
    let running = Running::start("--socket-path=s --blk-file=disk.raw --socket-mode=0600");
    let mode = fs::metadata(running.path("s")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    UnixStream::connect(running.path("s")).unwrap();
    assert_eq!(running.stop(), disk_only());
    let running = Running::start("--blockdev null-co,node-name=n --read-only --socket-path s");
    assert_eq!(running.stop(), disk_only());
    pass_descriptors();
    assert_eq!(Running::start("--fd=60 --blk-file=disk.raw").stop(), disk_only());
}

#[test]
fn a_connected_descriptor_ends_the_program_with_it() {
    let (ours_end, theirs) = UnixStream::pair().unwrap();
    pass_descriptor(theirs.as_raw_fd(), 70);
    drop(theirs);
    let running = Running::start("--fd=70 --blk-file=disk.raw");
    // SAFETY: this test put it there, the child has its own.
    unsafe { libc::close(70) };
    drop(ours_end);
    let output = wait(running.child);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn our_own_errors() {
    let blk = "vhost-user-blk: ";
    for (args, expected) in [
        (
            "--socket-path=s",
            "--socket-path=s: nothing to export: define a node with --blk-file or --blockdev",
        ),
        (
            "--socket-path=s --blockdev null-co,node-name=a --blockdev null-co,node-name=b",
            "--socket-path=s: several nodes could be exported (a, b): choose with --node-name",
        ),
        (
            "--socket-path=s --blk-file=nope",
            "--blk-file=nope: Could not open 'nope': No such file or directory",
        ),
        (
            "--socket-path=s --node-name=x --blk-file=disk.raw",
            "--socket-path=s: Cannot find device='' nor node-name='x'",
        ),
        ("--fd=62 --socket-path=s", "--fd and --socket-path exclude each other"),
        (
            "--socket-mode=9 --socket-path=s",
            "--socket-mode=9: expected permissions in octal, such as 0660",
        ),
        (
            "--chardev stdio,id=c",
            "--chardev stdio,id=c: '--chardev' is not supported by vhost-user-blk yet",
        ),
        ("--monitor c", "--monitor c: '--monitor' is not supported by vhost-user-blk yet"),
        ("--nbd-server x", "--nbd-server x: '--nbd-server' is not supported by vhost-user-blk yet"),
        (
            "--blockdev nbd,node-name=n",
            "--blockdev nbd,node-name=n: Driver 'nbd' is not supported by vhost-user-blk yet",
        ),
        (
            "--export a --export vhost-user-blk",
            "--export a: Parameter 'type' does not accept value 'a'",
        ),
        (
            "--export vhost-user-blk --export b",
            "--export vhost-user-blk: Parameter 'node-name' is missing",
        ),
    ] {
        assert_eq!(failure(args), format!("{blk}{expected}\n"), "{args}");
    }
    let export = |more: &str| {
        let text = format!("vhost-user-blk,node-name=f,addr.type=unix,addr.path=s,{more}");
        let prefix = format!("{blk}--export {}: ", expand(&text));
        failure(&format!("{{F}} --export {text}")).replace(&prefix, "")
    };
    assert_eq!(export("serial={s*21}"), "serial must be at most 20 bytes\n");
    assert_eq!(export("queue-size=100"), "queue-size must be a power of 2 between 16 and 1024\n");
    assert_eq!(export("queue-size=8"), "queue-size must be a power of 2 between 16 and 1024\n");
    assert_eq!(export("threads=0"), "threads must be greater than 0\n");
    assert_eq!(
        export("poll-max-ns=-1"),
        "poll-max-ns value must be in range [0, 9223372036854775807]\n"
    );
}

#[test]
fn hostile_nesting_is_an_error() {
    for depth in [511, 512, 513, 1000] {
        let (open, close) = (r#"{"driver":"raw","file":"#.repeat(depth), "}".repeat(depth));
        let text = format!("--blockdev '{open}{}{close}'", r#"{"driver":"null-co"}"#);
        assert!(failure(&text).contains(if depth < 512 { "node-name" } else { "deep" }), "{depth}");
    }
}

#[test]
fn questions_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let answer = |args: &str| {
        let output = wait(ours(dir.path(), args).spawn().unwrap());
        assert!(output.status.success(), "{args}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let version = answer("-V");
    let number = version.split("version ").nth(1).unwrap().split(' ').next().unwrap();
    assert_eq!(
        number.split('.').filter(|part| part.parse::<u32>().is_ok()).count(),
        3,
        "{version}"
    );
    let capabilities = answer("--socket-path --print-capabilities --bogus");
    let capabilities: serde_json::Value = serde_json::from_str(&capabilities).unwrap();
    assert_eq!(capabilities["type"], "block");
    let help = answer("-h");
    for option in ["--blockdev", "--export", "--socket-path", "serial=", "--print-graph"] {
        assert!(help.contains(option), "{option}");
    }
    assert!(help.lines().all(|line| line.len() <= 90));
    assert!(answer("--blockdev null-co,node-name=n --print-graph=json").contains('\n'));
}

/// Starts a daemon in a directory with a disk, and ends it, with nothing left. The directory, and the one that the daemon was in.
fn background(
    args: impl Fn(&Path) -> String,
    with: impl FnOnce(&mut Command),
) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("disk.raw")).unwrap().set_len(1 << 20).unwrap();
    let export = "--export vhost-user-blk,node-name=f,addr.type=unix,addr.path=s";
    let args = format!("--daemonize --pidfile=pid {} {export}", args(dir.path()));
    let mut command = ours(dir.path(), &args);
    with(&mut command);
    let output = wait(command.spawn().unwrap());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // All is there when the parent has gone.
    UnixStream::connect(dir.path().join("s")).unwrap();
    let pid: i32 = fs::read_to_string(dir.path().join("pid")).unwrap().trim().parse().unwrap();
    let cwd = fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    // SAFETY: the pidfile is locked as long as the process lives, the number is its.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    let start = Instant::now();
    while names(dir.path()) != disk_only() {
        assert!(start.elapsed() < PATIENCE, "left: {:?}", names(dir.path()));
        std::thread::sleep(Duration::from_millis(2));
    }
    (dir, cwd)
}

#[test]
fn going_to_the_background() {
    let disk = "--blockdev driver=file,node-name=f,filename=";
    let (_, cwd) = background(|_| format!("{disk}disk.raw"), |_| ());
    assert_eq!(cwd, Path::new("/"), "what is open stays open");
    // A daemon that hands its disk over may have to open it again: by the name it was given.
    let (dir, cwd) = background(|_| format!("--control=c {disk}disk.raw"), |_| ());
    assert_eq!(cwd, dir.path());
    let (_, cwd) =
        background(|dir| format!("--control=c {disk}{}/disk.raw", dir.display()), |_| ());
    assert_eq!(cwd, Path::new("/"), "the name begins there");
    assert_eq!(
        failure("--daemonize --blockdev file,node-name=f,filename=nope"),
        "vhost-user-blk: --blockdev file,node-name=f,filename=nope: \
         Could not open 'nope': No such file or directory\n"
    );
}

/// A daemon that the service manager has started, as `ExecReload=` of our unit does.
#[test]
fn a_daemon_logs_to_the_journal() {
    for (journal, lines) in [(true, 1), (false, 0)] {
        let aside = tempfile::tempdir().unwrap();
        let log = File::create(aside.path().join("log")).unwrap();
        let meta = log.metadata().unwrap();
        let inode = meta.ino() + u64::from(!journal);
        let (dir, _) = background(
            |_| "--log-level=info --blockdev null-co,node-name=f".into(),
            |command| {
                command.stderr(log).env("JOURNAL_STREAM", format!("{}:{inode}", meta.dev()));
            },
        );
        drop(dir);
        let text = fs::read_to_string(aside.path().join("log")).unwrap();
        assert_eq!(text.lines().filter(|line| line.contains("stopping")).count(), lines, "{text}");
    }
}

#[test]
fn the_service_manager_is_told() {
    let aside = tempfile::tempdir().unwrap();
    let path = aside.path().join("notify");
    let receiver = UnixDatagram::bind(&path).unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let mut command = ours(dir.path(), "--blockdev null-co,node-name=n --socket-path=s");
    let child = command.env("NOTIFY_SOCKET", &path).spawn().unwrap();
    let receive = || {
        let mut buffer = [0; 64];
        let len = receiver.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    };
    assert_eq!(receive(), "READY=1");
    UnixStream::connect(dir.path().join("s")).unwrap();
    terminate(&child);
    assert_eq!(receive(), "STOPPING=1");
    assert!(wait(child).status.success());
}

#[test]
fn systemd_hands_sockets_over_by_name() {
    let aside = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(aside.path().join("l")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    // The shell has the number that the program will have; its input becomes descriptor 3.
    let script = "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=guest exec \"$@\" 3<&0 </dev/null";
    let child = Command::new("sh")
        .args(["-c", script, "sh", OURS, "--blockdev=null-co,node-name=n"])
        .args(["--export", "vhost-user-blk,node-name=n,addr.type=fd,addr.str=guest"])
        .arg("--pidfile=pid")
        .current_dir(dir.path())
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while fs::read(dir.path().join("pid")).unwrap_or_default().is_empty() {
        assert!(start.elapsed() < PATIENCE, "{:?}", wait(child));
        std::thread::sleep(Duration::from_millis(2));
    }
    UnixStream::connect(aside.path().join("l")).unwrap();
    terminate(&child);
    let output = wait(child);
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn the_socket_never_disappears() {
    let dir = tempfile::tempdir().unwrap();
    let first = Running::start_in(dir, "--blockdev null-co,node-name=n --socket-path=s");
    let path = first.path("s");
    let watcher = std::thread::spawn({
        let path = path.clone();
        move || {
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(500) {
                assert!(path.exists());
            }
        }
    });
    // A successor takes the place ...
    let other = tempfile::tempdir().unwrap();
    let args = format!("--blockdev null-co,node-name=n --socket-path={}", path.display());
    let second = Running::start_in(other, &args);
    watcher.join().unwrap();
    // ... and keeps it when the first one goes.
    let left = first.child;
    terminate(&left);
    assert!(wait(left).status.success());
    UnixStream::connect(&path).unwrap();
    second.stop();
    assert!(!path.exists());
}

#[test]
fn a_closed_pipe_is_no_crash() {
    let mut child = ours(Path::new("/"), "--help").spawn().unwrap();
    drop(child.stdout.take());
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(wait(child).status.code().is_some(), "died of a signal: {text}");
}

/// `--strict-formats`: a backing file whose format the image does not name is not guessed.
#[test]
fn formats_are_not_guessed_if_told_so() {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("base.raw")).unwrap().set_len(1 << 20).unwrap();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"])
        .current_dir(dir.path())
        .status()
        .unwrap();
    assert!(made.success());
    // The extension that names the format becomes one that nobody knows.
    let path = dir.path().join("top.qcow2");
    let mut image = fs::read(&path).unwrap();
    let at = image.windows(4).position(|w| w == 0xe279_2acau32.to_be_bytes()).unwrap();
    image[at..at + 4].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    fs::write(&path, image).unwrap();
    let node =
        "--blockdev driver=qcow2,read-only=on,node-name=n,file.driver=file,file.filename=top.qcow2";
    let guessed = ours(dir.path(), &format!("{node} --print-graph")).output().unwrap();
    assert!(guessed.status.success(), "{guessed:?}");
    // Wherever it is on the command line.
    let strict =
        ours(dir.path(), &format!("{node} --print-graph --strict-formats")).output().unwrap();
    assert_eq!(strict.status.code(), Some(1));
    let text = String::from_utf8_lossy(&strict.stderr);
    assert!(text.contains("guessing it is not allowed"), "{text}");
}

/// `--state-dir`: whoever has no place for what outlives the program is told so, once, at the start.
#[test]
fn without_a_state_place_less_is_promised() {
    let dir = tempfile::tempdir().unwrap();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "disk.qcow2", "1M"])
        .current_dir(dir.path())
        .status();
    assert!(made.unwrap().success());
    let node = "--blockdev driver=qcow2,node-name=n,file.driver=file,file.filename=disk.qcow2";
    fs::create_dir(dir.path().join("state")).unwrap();
    for (place, lines) in [("none", 1), ("missing", 1), ("state", 0)] {
        let args = format!("--state-dir={place} {node} --print-graph");
        let output = ours(dir.path(), &args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        let told = text.lines().filter(|line| line.contains("do not survive a crash"));
        assert_eq!(told.count(), lines, "{place}: {text}");
    }
    assert_eq!(fs::read_dir(dir.path().join("state")).unwrap().count(), 0);
}
