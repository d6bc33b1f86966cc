//! What the program cannot do once it serves, that it serves all the same, and that a front end which takes its memory away
//! hurts itself alone.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod common;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

use serde_json::json;
use tempfile::TempDir;
use vhost_user_blk::sandbox::{self, Config, Thread};
use vub_client::blk::Request;
use vub_client::{Base, Client, Options};

use common::{ENGINES, Engine, Image, MIB, Random, eventually, small, status_line};

/// How a child that does `what` ends; its exit code is 0 if that is true.
fn forked(what: impl FnOnce() -> bool) -> ExitStatus {
    // SAFETY: the child has this thread alone; glibc makes its allocator usable there, and nothing else that is used
    // takes a lock of another thread's. It ends without running anything of the parent's.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0, "{}", io::Error::last_os_error());
        if pid == 0 {
            libc::_exit(i32::from(!what()));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
        ExitStatus::from_raw(status)
    }
}

/// The error of a call; 0 if it succeeded.
fn errno(result: libc::c_long) -> i32 {
    if result >= 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap() }
}

fn opened(path: &Path, write: bool) -> i32 {
    let file = File::options().read(true).write(write).open(path);
    file.map_or_else(|e| e.raw_os_error().unwrap(), |_| 0)
}

#[test]
fn foreign_files_are_out_of_reach() {
    let (dir, allowed, sockets) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |name: &str| dir.path().join(name);
    for name in ["image", "base", "foreign"] {
        fs::write(path(name), "data").unwrap();
    }
    fs::write(sockets.path().join("s"), "").unwrap();
    let image = File::options().read(true).write(true).open(path("image")).unwrap();
    let base = File::open(path("base")).unwrap();
    let config =
        Config { remove_in: vec![sockets.path().into()], allow: vec![allowed.path().into()] };
    let all = || {
        sandbox::enter(&config).unwrap();
        assert_eq!(opened(Path::new("/etc/shadow"), false), libc::EACCES);
        assert_eq!(opened(&path("foreign"), false), libc::EACCES);
        // In use: in the same mode.
        assert_eq!((opened(&path("image"), true), opened(&path("base"), false)), (0, 0));
        assert_eq!(opened(&path("base"), true), libc::EACCES);
        assert!(fs::remove_file(path("image")).is_err());
        assert!(File::create(path("new")).is_err());
        // Removed, but nothing else.
        fs::remove_file(sockets.path().join("s")).unwrap();
        assert!(File::create(sockets.path().join("new")).is_err());
        let new = allowed.path().join("new");
        fs::write(&new, "data").unwrap();
        fs::rename(&new, allowed.path().join("newer")).unwrap();
        // What is open stays so.
        std::os::unix::fs::FileExt::write_all_at(&image, b"more", 0).unwrap();
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&base, &mut bytes, 0).unwrap();
        true
    };
    assert_eq!(forked(all).code(), Some(0));
    assert_eq!(fs::read(path("image")).unwrap(), b"more");
}

#[test]
fn forbidden_calls_fail_and_deadly_ones_kill() {
    let in_there = |what: fn() -> bool| {
        forked(move || {
            sandbox::enter(&Config::default()).unwrap();
            what()
        })
    };
    // SAFETY (all): no memory is passed, or what is passed lives through the call.
    for forbidden in [
        || {
            errno(unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) }.into())
                == libc::ENOSYS
        },
        || {
            errno(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0) }.into())
                == libc::ENOSYS
        },
        || errno(unsafe { libc::fork() }.into()) == libc::ENOSYS,
        || errno(unsafe { libc::kill(1, 0) }.into()) == libc::ENOSYS,
        || errno(unsafe { libc::setuid(0) }.into()) == libc::ENOSYS,
        || errno(unsafe { libc::syscall(1_000_000) }) == libc::ENOSYS,
        || {
            let (prot, flags) =
                (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            // SAFETY: a new mapping, if it is made at all.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0) };
            at == libc::MAP_FAILED
        },
        || errno(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1) }.into()) == libc::ENOSYS,
        || errno(unsafe { libc::ioctl(0, libc::TIOCSTI, 0) }.into()) == libc::ENOSYS,
    ] {
        assert_eq!(in_there(forbidden).code(), Some(0));
    }
    for (n, deadly) in [
        // SAFETY (all): as above.
        || unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } == 0,
        || unsafe {
            libc::execve(c"/bin/true".as_ptr(), [std::ptr::null()].as_ptr(), [std::ptr::null()].as_ptr())
        } == 0,
        || unsafe { libc::unshare(libc::CLONE_NEWUSER) } == 0,
        || unsafe { libc::syscall(libc::SYS_bpf, 0, 0, 0) } == 0,
    ]
    .into_iter()
    .enumerate()
    {
        let ended = in_there(deadly);
        assert_eq!(ended.signal(), Some(libc::SIGSYS), "{n}: {ended:?}");
    }
}

#[test]
fn threads_may_do_what_they_are_for() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config { allow: vec![dir.path().into()], ..Config::default() };
    let file = dir.path().join("f");
    let in_there = |kind: Thread, what: fn(&Path) -> bool| {
        let ran = forked(|| {
            sandbox::enter(&config).unwrap();
            fs::write(&file, "data").unwrap();
            std::thread::scope(|scope| {
                let thread = scope.spawn(|| {
                    sandbox::thread(kind);
                    what(&file)
                });
                thread.join().unwrap()
            })
        });
        assert_eq!(ran.code(), Some(0), "{kind:?}");
    };
    in_there(Thread::Session, |file| opened(file, true) == 0 && fs::remove_file(file).is_err());
    for kind in [Thread::Worker, Thread::Pool] {
        in_there(kind, |file| opened(file, false) == libc::ENOSYS);
    }
    in_there(Thread::Worker, |_| std::thread::Builder::new().spawn(|| ()).is_ok());
    // SAFETY: no memory is passed; the descriptor is one that the process has.
    in_there(Thread::Pool, |_| errno(unsafe { libc::fdatasync(2) }.into()) != libc::ENOSYS);
    // SAFETY: no memory is passed.
    in_there(Thread::Pool, |_| errno(unsafe { libc::epoll_create1(0) }.into()) == libc::ENOSYS);
    // SAFETY: no memory is passed.
    in_there(Thread::Worker, |_| {
        errno(unsafe { libc::accept4(0, std::ptr::null_mut(), std::ptr::null_mut(), 0) }.into())
            == libc::ENOSYS
    });
}

#[test]
fn not_among_other_threads() {
    let refused = forked(|| {
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("one-more".into());
        let thread = thread.spawn(move || wait.recv().is_err()).unwrap();
        let error = sandbox::enter(&Config::default()).unwrap_err();
        drop(stop);
        thread.join().unwrap() && error.message().contains("one-more")
    });
    assert_eq!(refused.code(), Some(0));
}

/// What may be left where locked memory is limited: CAP_IPC_LOCK.
const IPC_LOCK: u64 = 1 << 14;

/// The program in the sandbox, with a directory of its own.
struct Confined {
    child: Child,
    dir: TempDir,
    log: PathBuf,
}

impl Confined {
    /// Serves each of `nodes` (`--blockdev`'s value and the name to export) at a socket with its name.
    fn start(nodes: &[(serde_json::Value, &str)], more: &[&str], env: &[(&str, &str)]) -> Confined {
        Confined::start_limited(nodes, more, env, None)
    }

    /// The same, which may lock at most `memlock` bytes.
    fn start_limited(
        nodes: &[(serde_json::Value, &str)],
        more: &[&str],
        env: &[(&str, &str)],
        memlock: Option<u64>,
    ) -> Confined {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
        for (node, name) in nodes {
            command.arg("--blockdev").arg(node.to_string());
            let path = dir.path().join(name);
            command.arg("--export").arg(format!(
                "vhost-user-blk,id=e-{name},node-name={name},writable=on,addr.type=unix,addr.path={}",
                path.display()
            ));
        }
        let pidfile = format!("--pidfile={}", dir.path().join("pid").display());
        command.args(more).arg(pidfile).envs(env.iter().copied());
        command.env_remove("RUST_LOG").stderr(File::create(&log).unwrap());
        if let Some(bytes) = memlock {
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
            let set = move || {
                // SAFETY: the limit is read through the pointer.
                match unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            };
            // SAFETY: between fork and exec only a system call is made.
            unsafe { command.pre_exec(set) };
        }
        Confined { child: command.spawn().unwrap(), dir, log }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn connect(&self, name: &str, options: Options) -> Client {
        Client::connect_retry(self.path(name), options)
            .unwrap_or_else(|e| panic!("{e}: {}", self.log()))
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The threads of the process (`pid`, or that which was started), each checked: names and number of filters.
    fn threads(&self, pid: Option<u32>) -> Vec<(String, u64)> {
        let task = format!("/proc/{}/task", pid.unwrap_or(self.child.id()));
        let mut all = Vec::new();
        let limits = fs::read_to_string(Path::new(&task).join("../limits")).unwrap();
        let lock = limits.lines().find(|l| l.starts_with("Max locked memory")).unwrap();
        let limited = !lock.contains("unlimited");
        for task in fs::read_dir(task).unwrap() {
            let task = task.unwrap().path();
            // One that ends while we look was as the others.
            let Ok(name) = fs::read_to_string(task.join("comm")) else { continue };
            let Ok(status) = fs::read_to_string(task.join("status")) else { continue };
            let line = |key: &str| {
                let line = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
                line.unwrap().trim().to_owned()
            };
            for set in ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"] {
                let bits = u64::from_str_radix(&line(set), 16).unwrap();
                let may = if limited && ["CapEff", "CapPrm"].contains(&set) { IPC_LOCK } else { 0 };
                assert_eq!(bits & !may, 0, "{set} of {name}");
            }
            assert_eq!((line("NoNewPrivs"), line("Seccomp")), ("1".into(), "2".into()), "{name}");
            all.push((name.trim().to_owned(), line("Seccomp_filters").parse().unwrap()));
        }
        all
    }

    /// Ends it as an operator does: all is well, and nothing is left.
    fn end(mut self) {
        vub_client::sys::kill(self.child.id(), libc::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success(), "{}", self.log());
        assert_eq!(self.log(), "", "nothing was refused");
        let left: Vec<_> =
            fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["log"]);
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().unwrap_or_default();
        self.child.wait().unwrap();
    }
}

/// Everything that a guest does with a disk of 8 MiB.
fn exercise(client: &mut Client, random: &mut Random) {
    let data = random.bytes(256 << 10);
    let q = client.queue(0);
    q.write(16, &data).unwrap();
    q.write(3, &data[..512]).unwrap();
    q.flush().unwrap();
    let mut back = vec![0; data.len()];
    q.read(16, &mut back).unwrap();
    assert!(back == data);
    q.discard(16, 128).unwrap();
    q.write_zeroes(256, 128, false).unwrap();
    q.write_zeroes(256, 128, true).unwrap();
    q.read(256, &mut back[..65536]).unwrap();
    assert!(back[..65536].iter().all(|b| *b == 0));
    // Many at once: as many threads as there are engines for.
    let requests: Vec<_> =
        (0..32).map(|n| q.write_request(1024 + n * 8, &data[..4096]).unwrap()).collect();
    for request in requests {
        q.submit(request).unwrap();
    }
    q.wait_all().unwrap();
    q.flush().unwrap();
}

/// With `root` over `image`, in format `driver`.
fn node(image: &Path, driver: &str, Engine { aio, direct }: Engine) -> serde_json::Value {
    let cache = json!({"direct": direct});
    json!({"driver": driver, "node-name": "root", "discard": "unmap", "cache": cache,
        "file": {"driver": "file", "filename": image, "aio": aio, "discard": "unmap", "cache": cache}})
}

#[test]
fn every_medium_is_served_in_the_sandbox() {
    for engine in ENGINES {
        for (driver, env) in [
            ("raw", &[][..]),
            ("qcow2", &[][..]),
            ("raw", &[("VHOST_USER_BLK_NO_IO_URING", "1")][..]),
            ("qcow2", &[("VHOST_USER_BLK_NO_IO_URING", "1")][..]),
        ] {
            let image = Image::new(8 * MIB);
            if driver == "qcow2" {
                let made = Command::new("qemu-img")
                    .args(["create", "-q", "-f", "qcow2"])
                    .arg(image.path())
                    .arg("8M")
                    .status();
                assert!(made.unwrap().success());
            }
            let confined = Confined::start(
                &[(node(&image.path(), driver, engine), "root")],
                &["--log-level=error"],
                env,
            );
            let mut random = Random(7);
            let mut client = confined.connect("root", small());
            exercise(&mut client, &mut random);
            // Two for the process, one for each thread's kind and those it comes from; a thread that has its name but has not run
            // yet comes to it. Discards are done by the pool: its threads came late.
            let wanted = [("vhost-user-blk", 2), ("blk-e-root", 4), ("blk-pool", 5)];
            eventually(&format!("filters: {engine:?} {driver} {env:?}"), || {
                let threads = confined.threads(None);
                wanted.iter().all(|(name, least)| {
                    let of = threads.iter().filter(|(n, _)| n.starts_with(name)).map(|(_, f)| *f);
                    of.min() >= Some(*least)
                })
            });
            client.hang_up().unwrap();
            client.reconnect(confined.path("root"), Base::Used).unwrap();
            exercise(&mut client, &mut random);
            drop(client);
            confined.end();
            if driver == "qcow2" {
                let check =
                    Command::new("qemu-img").args(["check", "-q"]).arg(image.path()).status();
                assert!(check.unwrap().success());
            }
        }
    }
}

/// The kernel counts a ring's memory as locked: the limit is lifted, or CAP_IPC_LOCK kept.
#[test]
fn rings_are_not_short_of_locked_memory() {
    // SAFETY: no memory is involved.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("not root: the limit stays what it is");
    }
    let image = Image::new(8 * MIB);
    let engine = Engine { aio: "io_uring", direct: false };
    let node = node(&image.path(), "raw", engine);
    let confined = Confined::start_limited(&[(node, "root")], &["--log-level=warn"], &[], Some(0));
    let mut client = confined.connect("root", small());
    exercise(&mut client, &mut Random(1));
    drop(client);
    // Not a word of falling back to epoll.
    confined.end();
}

#[test]
fn a_daemon_of_another_user() {
    // SAFETY: no memory is involved.
    if unsafe { libc::geteuid() } != 0 {
        return eprintln!("not root: nobody else to become");
    }
    let image = Image::new(8 * MIB);
    let engine = ENGINES[0];
    let mut confined = Confined::start(
        &[(node(&image.path(), "raw", engine), "root")],
        &["--daemonize", "--user=65534", "--group=65533", "--log-level=error"],
        &[],
    );
    // Its user may remove what is there.
    std::os::unix::fs::chown(confined.dir.path(), Some(65534), None).unwrap();
    assert!(confined.child.wait().unwrap().success(), "{}", confined.log());
    let pid = fs::read_to_string(confined.path("pid")).unwrap().trim().parse().unwrap();
    for file in ["root", "pid"] {
        let meta = fs::symlink_metadata(confined.path(file)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (65534, 65533), "{file}");
    }
    let mut client = confined.connect("root", small());
    exercise(&mut client, &mut Random(3));
    confined.threads(Some(pid));
    let status = PathBuf::from(format!("/proc/{pid}/status"));
    assert_eq!((status_line(&status, "Uid"), status_line(&status, "Gid")), (65534, 65533));
    drop(client);
    vub_client::sys::kill(pid, libc::SIGTERM).unwrap();
    eventually("it has ended", || !confined.path("pid").exists());
    assert!(!confined.path("root").exists());
}

/// Cuts the file of a region short.
fn truncate(client: &Client, region: usize) {
    let (_, fd) = client.mem().regions()[region];
    let file = File::options().write(true).open(format!("/proc/self/fd/{fd}")).unwrap();
    file.set_len(0).unwrap();
}

#[test]
fn memory_taken_away_hurts_its_owner_alone() {
    let image = Image::new(8 * MIB);
    let null =
        json!({"driver": "null-co", "node-name": "null", "size": 8 * MIB, "read-zeroes": true});
    for engine in ENGINES {
        let file = node(&image.path(), "raw", engine);
        let mut confined = Confined::start(&[(null.clone(), "null"), (file, "root")], &[], &[]);
        let (mut bad, mut good) =
            (confined.connect("null", small()), confined.connect("root", small()));
        let mut random = Random(5);
        exercise(&mut good, &mut random);
        // Zeroes are written by the worker itself.
        let region = bad.plug_memory(1 << 20).unwrap();
        let buffer = bad.mem().alloc_in(region, 4096, 4096).unwrap();
        truncate(&bad, region);
        bad.queue(0).submit(Request::read(0, vec![buffer])).unwrap();
        bad.queue(0).wait_err().unwrap();
        eventually("it is said", || confined.log().contains("queue 0 is broken"));
        exercise(&mut good, &mut random);
        // And the rings themselves, of a guest that comes back with new memory.
        bad.hang_up().unwrap();
        drop(bad);
        let mut bad = confined.connect("null", small());
        bad.queue(0).read(0, &mut [0; 512]).unwrap();
        truncate(&bad, 0);
        bad.queue(0).kick_fd().write(1).unwrap();
        bad.queue(0).wait_err().unwrap();
        exercise(&mut good, &mut random);
        drop(bad);
        // Where the kernel moves the data, it is an error of the request.
        let region = good.plug_memory(1 << 20).unwrap();
        let buffer = good.mem().alloc_in(region, 4096, 4096).unwrap();
        truncate(&good, region);
        let done = good.queue(0).run(Request::read(0, vec![buffer])).unwrap();
        assert_eq!(done.status, vub_client::Status::IoErr, "{engine:?}");
        confined.connect("null", small()).queue(0).read(0, &mut [0; 512]).unwrap();
        assert_eq!(confined.child.try_wait().unwrap(), None);
    }
}
