//! The sandbox itself, in children of this process.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, squeue, types};
use vhost_user_blk::sandbox::{self, Allow, Thread};

/// The exit code of a child that has panicked.
const PANICKED: i32 = 101;

/// How a child that does `what` ends; its exit code is 0 if that is true.
fn forked(what: impl FnOnce() -> bool) -> ExitStatus {
    // SAFETY: the child has this thread alone; glibc makes its allocator usable there, and nothing else that is used
    // takes a lock of another thread's. It ends without running anything of the parent's: also when it panics.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0, "{}", io::Error::last_os_error());
        if pid == 0 {
            let said = catch_unwind(AssertUnwindSafe(what));
            if let Err(panic) = &said {
                let text = panic.downcast_ref::<String>().map_or("?", String::as_str);
                let text = format!("\n{text}\n");
                libc::write(2, text.as_ptr().cast(), text.len());
            }
            libc::_exit(said.map_or(PANICKED, |yes| i32::from(!yes)));
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

/// A system call with numbers only.
fn call(number: libc::c_long, [a, b, c]: [i32; 3]) -> libc::c_long {
    // SAFETY: none of these calls gets an address but 0, which none of them takes.
    unsafe { libc::syscall(number, i64::from(a), i64::from(b), i64::from(c)) }
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
    for name in ["image", "base", "foreign", "later", "backing"] {
        fs::write(path(name), "data").unwrap();
    }
    fs::write(sockets.path().join("s"), "").unwrap();
    let image = File::options().read(true).write(true).open(path("image")).unwrap();
    let base = File::open(path("base")).unwrap();
    let mut allow = Allow::default();
    allow.remove_in(sockets.path());
    allow.directory(allowed.path());
    allow.file(path("later"), true);
    allow.file(path("backing"), false);
    let all = || {
        sandbox::enter(&allow).unwrap();
        assert_eq!(opened(Path::new("/etc/shadow"), false), libc::EACCES);
        assert_eq!(opened(&path("foreign"), false), libc::EACCES);
        // In use: in the same mode.
        assert_eq!((opened(&path("image"), true), opened(&path("base"), false)), (0, 0));
        assert_eq!(opened(&path("base"), true), libc::EACCES);
        // Not yet in use.
        assert_eq!((opened(&path("later"), true), opened(&path("backing"), false)), (0, 0));
        assert_eq!(opened(&path("backing"), true), libc::EACCES);
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
    let in_there = |what: &dyn Fn() -> bool| {
        forked(|| {
            sandbox::enter(&Allow::default()).unwrap();
            what()
        })
    };
    let refused = |(number, args)| move || errno(call(number, args)) == libc::ENOSYS;
    for forbidden in [
        (libc::SYS_socket, [libc::AF_INET, libc::SOCK_STREAM, 0]),
        (libc::SYS_socket, [libc::AF_UNIX, libc::SOCK_STREAM, 0]),
        (libc::SYS_fork, [0; 3]),
        (libc::SYS_kill, [1, 0, 0]),
        (libc::SYS_setuid, [0; 3]),
        (1_000_000, [0; 3]),
        (libc::SYS_prctl, [libc::PR_SET_DUMPABLE, 1, 0]),
        (libc::SYS_ioctl, [0, i32::try_from(libc::TIOCSTI).unwrap(), 0]),
    ] {
        assert_eq!(in_there(&refused(forbidden)).code(), Some(0), "{forbidden:?}");
    }
    let executable = || {
        let (prot, flags) =
            (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, if it is made at all.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0) };
        at == libc::MAP_FAILED
    };
    assert_eq!(in_there(&executable).code(), Some(0));
    for deadly in [
        (libc::SYS_ptrace, [libc::PTRACE_TRACEME.cast_signed(), 0, 0]),
        // Without a filter: EFAULT.
        (libc::SYS_execve, [0; 3]),
        (libc::SYS_unshare, [libc::CLONE_NEWUSER, 0, 0]),
        (libc::SYS_bpf, [0; 3]),
    ] {
        let ended = in_there(&|| call(deadly.0, deadly.1) == 0);
        assert_eq!(ended.signal(), Some(libc::SIGSYS), "{deadly:?}: {ended:?}");
    }
}

#[test]
fn threads_may_do_what_they_are_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut allow = Allow::default();
    allow.directory(dir.path());
    let file = dir.path().join("f");
    let in_there = |kind: Thread, what: fn(&Path) -> bool| {
        let ran = forked(|| {
            sandbox::enter(&allow).unwrap();
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
    in_there(Thread::Session, |file| opened(file, true) == 0 && fs::remove_file(file).is_ok());
    in_there(Thread::Session, |_| errno(call(libc::SYS_chdir, [0; 3])) == libc::ENOSYS);
    for kind in [Thread::Worker, Thread::Pool] {
        in_there(kind, |file| opened(file, false) == libc::ENOSYS);
    }
    in_there(Thread::Worker, |_| std::thread::Builder::new().spawn(|| ()).is_ok());
    in_there(Thread::Pool, |_| errno(call(libc::SYS_fdatasync, [2, 0, 0])) != libc::ENOSYS);
    in_there(Thread::Pool, |_| errno(call(libc::SYS_epoll_create1, [0; 3])) == libc::ENOSYS);
    in_there(Thread::Worker, |_| errno(call(libc::SYS_accept4, [0; 3])) == libc::ENOSYS);
}

#[test]
fn not_among_other_threads() {
    let refused = forked(|| {
        let (stop, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("one-more".into());
        let thread = thread.spawn(move || wait.recv().is_err()).unwrap();
        let error = sandbox::enter(&Allow::default()).unwrap_err();
        drop(stop);
        thread.join().unwrap() && error.message().contains("one-more")
    });
    assert_eq!(refused.code(), Some(0));
}

/// A thread that the kernel made for a ring stays for seconds; nobody waits for it, and it is none that could do harm.
#[test]
fn the_kernels_own_threads_do_not_count() {
    let entered = forked(|| {
        let mut ring = IoUring::new(8).unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        let mut byte = [0];
        let fd = types::Fd(reader.as_raw_fd());
        let read = opcode::Read::new(fd, byte.as_mut_ptr(), 1).build().flags(squeue::Flags::ASYNC);
        // SAFETY: the buffer outlives the ring's use: the process ends without freeing it.
        unsafe { ring.submission().push(&read).unwrap() };
        ring.submit().unwrap();
        assert!(fs::read_dir("/proc/self/task").unwrap().count() > 1, "the ring has its thread");
        let start = Instant::now();
        sandbox::enter(&Allow::default()).unwrap();
        start.elapsed() < Duration::from_secs(2)
    });
    assert_eq!(entered.code(), Some(0));
}
