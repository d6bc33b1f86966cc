//! The command line beside the real qemu-storage-daemon: the same words, the same exit codes, and nothing left behind.
//!
//! The cases are in `cli/cases.txt`; both programs run each of them. What differs on purpose is marked there, with the
//! reason.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use tempfile::TempDir;

const QSD: &str = "qemu-storage-daemon";
const OURS: &str = env!("CARGO_BIN_EXE_vhost-user-blk");
const CASES: &str = include_str!("cli/cases.txt");
const FILE_NODE: &str = "--blockdev file,node-name=f,filename=disk.raw";
/// Longer than either program needs, on a machine that is busy with something else.
const PATIENCE: Duration = Duration::from_secs(20);

/// One line of `cases.txt`.
struct Case {
    text: &'static str,
    args: Vec<String>,
    /// Why the programs differ.
    difference: Option<&'static str>,
}

fn cases(section: &str) -> Vec<Case> {
    let mut cases = Vec::new();
    let mut here = false;
    let mut difference = None;
    for text in CASES.lines() {
        if text.starts_with('[') {
            here = text == format!("[{section}]");
        } else if let Some(reason) = text.strip_prefix('!') {
            difference = Some(reason);
        } else if !text.is_empty() && !text.starts_with('#') {
            let reason = difference.take();
            if here {
                cases.push(Case { text, args: split(text), difference: reason });
            }
        }
    }
    assert!(!cases.is_empty());
    cases
}

/// Splits as a shell does, after replacing what is in braces.
fn split(text: &str) -> Vec<String> {
    let raw_node = format!("{FILE_NODE} --blockdev raw,node-name=r,file=f");
    let text = text.replace("{F}", FILE_NODE).replace("{R}", &raw_node);
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            (' ', None) => words.extend(word.take()),
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (c, Some(q)) if c == q => quote = None,
            ('\\', Some('"')) => word.get_or_insert_default().extend(chars.next()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words.iter().map(|word| expand(word)).collect()
}

/// Replaces `{x*3}` by `xxx`.
fn expand(word: &str) -> String {
    let mut out = String::new();
    let mut rest = word;
    while let Some(star) = rest.find('*') {
        let before = &rest[..star];
        let count = rest[star + 1..].split_once('}').and_then(|(n, _)| n.parse::<usize>().ok());
        let (Some(count), Some(c)) = (count, before.chars().next_back()) else { break };
        let start = star - c.len_utf8();
        if !before[..start].ends_with('{') {
            break;
        }
        out.push_str(&before[..start - 1]);
        out.extend(std::iter::repeat_n(c, count));
        rest = rest[star..].split_once('}').map_or("", |(_, rest)| rest);
    }
    out + rest
}

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

/// A directory to run a case in. What is returned beside it must live as long.
fn scene(held: &Path) -> (TempDir, UnixListener) {
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
fn judge(case: &Case, held: &Held) -> Option<String> {
    let image = held.dir.path().join("held.qcow2");
    let theirs = {
        let (dir, _busy) = scene(&image);
        let mut outcome = run(QSD, &case.args, dir.path());
        outcome.stdout = outcome.stdout.replace(QSD, "vhost-user-blk");
        outcome.stderr = outcome.stderr.replace(QSD, "vhost-user-blk");
        outcome
    };
    let (dir, _busy) = scene(&image);
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
    let cases = cases(section);
    let faults: Vec<_> = cases.iter().filter_map(|case| judge(case, &held)).collect();
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
fn starts_as_qemu() {
    compare("start");
}

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
        failure(&format!("{{F}} --export {text}")).replace(&format!("{blk}--export {text}: "), "")
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

#[test]
fn going_to_the_background() {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("disk.raw")).unwrap().set_len(1 << 20).unwrap();
    let args = "--daemonize --pidfile=pid {F} --export \
                vhost-user-blk,node-name=f,addr.type=unix,addr.path=s";
    let mut command = ours(dir.path(), args);
    let output = wait(command.spawn().unwrap());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    // All is there when the parent has gone.
    UnixStream::connect(dir.path().join("s")).unwrap();
    let pid: i32 = fs::read_to_string(dir.path().join("pid")).unwrap().trim().parse().unwrap();
    assert_eq!(fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
    // SAFETY: the pidfile is locked as long as the process lives, the number is its.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    let start = Instant::now();
    while names(dir.path()) != disk_only() {
        assert!(start.elapsed() < PATIENCE, "left: {:?}", names(dir.path()));
        std::thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(
        failure("--daemonize --blockdev file,node-name=f,filename=nope"),
        "vhost-user-blk: --blockdev file,node-name=f,filename=nope: \
         Could not open 'nope': No such file or directory\n"
    );
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
fn a_full_pipe_or_a_closed_one_is_no_crash() {
    let mut child = ours(Path::new("/"), "--help").spawn().unwrap();
    drop(child.stdout.take());
    let mut text = String::new();
    child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(wait(child).signal_or_code() <= 1, "{text}");
    std::io::stderr().flush().unwrap();
}

/// The exit code, or 128 and the signal.
trait SignalOrCode {
    fn signal_or_code(&self) -> i32;
}

impl SignalOrCode for Output {
    fn signal_or_code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or_default())
    }
}
