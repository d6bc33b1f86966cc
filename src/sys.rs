//! Thin safe wrappers over libc calls that the standard library lacks. Every function stands alone.
#![warn(unsafe_code)]
#![expect(unsafe_code, reason = "this module is where it belongs")]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Turns libc's -1 into the error in errno.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Which of the two processes after [`fork`] this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// The old one.
    Parent,
    /// The new one.
    Child,
}

/// Forks the process.
///
/// # Errors
/// `EBUSY` if there is more than one thread (the child would have only one, and locks that nobody opens), and what the
/// kernel says.
pub fn fork() -> io::Result<Fork> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: there is one thread (just counted; nobody else could start one), so the child's copy of the memory is
    // consistent and all of it may go on being used.
    match check(unsafe { libc::fork() })? {
        0 => Ok(Fork::Child),
        _ => Ok(Fork::Parent),
    }
}

/// Ends the process at once, without running anything registered for its end.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Makes the process the leader of a new session, without a terminal.
///
/// # Errors
/// What the kernel says.
pub fn setsid() -> io::Result<()> {
    // SAFETY: `setsid` has no preconditions.
    check(unsafe { libc::setsid() }).map(drop)
}

/// The user that this process acts as.
pub fn effective_uid() -> u32 {
    // SAFETY: `geteuid` has no preconditions and cannot fail.
    unsafe { libc::geteuid() }
}

/// Room for the first `len` bytes of a file, which is at least so long then: no later store in a mapping of it can fail.
///
/// # Errors
/// ENOSPC, and what else the kernel says.
pub fn allocate(file: &File, len: u64) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    loop {
        // SAFETY: an open file; no memory is passed.
        match check(unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len) }) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            done => return done.map(drop),
        }
    }
}

/// Sets the file mode creation mask.
pub fn umask(mask: u32) {
    // SAFETY: `umask` has no preconditions and cannot fail.
    unsafe { libc::umask(mask) };
}

/// Points the standard input and output at `null`, which is /dev/null; and the standard error, unless it is kept.
///
/// # Errors
/// What the kernel says.
pub fn null_stdio(null: &File, keep_stderr: bool) -> io::Result<()> {
    let fds = if keep_stderr { 0..2 } else { 0..3 };
    for fd in fds {
        // SAFETY: `dup2` replaces the standard descriptors, which nobody owns, by another open file.
        check(unsafe { libc::dup2(null.as_raw_fd(), fd) })?;
    }
    Ok(())
}

/// Whether `fd` is open for reading, and for writing.
///
/// # Errors
/// What the kernel says.
pub fn access_mode(fd: BorrowedFd<'_>) -> io::Result<(bool, bool)> {
    // SAFETY: no pointers; the descriptor is borrowed for the call.
    let flags = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) })?;
    let mode = if flags & libc::O_PATH == 0 { flags & libc::O_ACCMODE } else { -1 };
    let either = mode == libc::O_RDWR;
    Ok((either || mode == libc::O_RDONLY, either || mode == libc::O_WRONLY))
}

/// CLOCK_MONOTONIC, in nanoseconds.
#[inline]
pub fn monotonic_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes one timespec, which is ours. It cannot fail: the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// The processors that this process may use. Asked for once: the answer is partly in files, which a sandbox hides.
pub fn processors() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Where the kernel says which boot of the machine this is.
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Tells the C library's allocator how many arenas it may have: as many as it takes by itself (eight for each processor).
/// Otherwise it asks for the number of processors with the ninth, in files that a sandbox hides.
pub fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    {
        let arenas = i32::try_from(8 * processors()).unwrap_or(i32::MAX);
        // SAFETY: no memory is passed; the allocator takes its own locks.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
    }
}

/// Raises the limit of open files to the most that is allowed.
///
/// # Errors
/// What the kernel says.
pub fn raise_nofile_limit() -> io::Result<()> {
    raise_to_allowed(libc::RLIMIT_NOFILE)
}

/// Whether the memory that this process may lock is unlimited.
pub fn locks_without_limit() -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for writing.
    let got = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    got == 0 && limit.rlim_cur == libc::RLIM_INFINITY
}

fn raise_to_allowed(what: libc::__rlimit_resource_t) -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for writing.
    check(unsafe { libc::getrlimit(what, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: `limit` is valid for reading.
    check(unsafe { libc::setrlimit(what, &raw const limit) }).map(drop)
}

/// Raises the limit of locked memory, which the kernel counts the rings of an io_uring as, to the most that is allowed: no limit
/// for who may say so (CAP_SYS_RESOURCE). It is counted for each user, over all processes, and the usual limit is enough for
/// some fifty rings.
///
/// # Errors
/// What the kernel says.
pub fn raise_memlock_limit() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: `none` is valid for reading.
    if check(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const none) }).is_ok() {
        return Ok(());
    }
    raise_to_allowed(libc::RLIMIT_MEMLOCK)
}

/// Signals that are blocked in this thread, and in those it starts later, and read from a descriptor instead.
#[derive(Debug)]
pub struct Signals {
    fd: OwnedFd,
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Signals {
    /// Blocks `signals`. To be called before any thread is started.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn block(signals: &[libc::c_int]) -> io::Result<Signals> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigemptyset` initialises `set`, and `sigaddset` only then changes it.
        let set = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in signals {
                libc::sigaddset(set.as_mut_ptr(), *signal);
            }
            set.assume_init()
        };
        // SAFETY: `set` is valid for reading; the old mask is not asked for.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: `set` is valid for reading; -1 asks for a new descriptor.
        let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC) })?;
        // SAFETY: the kernel has just made this descriptor, nobody else owns it.
        Ok(Signals { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Waits for one of them and answers its number.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn wait(&self) -> io::Result<u32> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = mem::size_of::<libc::signalfd_siginfo>();
        loop {
            // SAFETY: `info` is valid for writing `size` bytes.
            let n = unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) };
            if n == size.cast_signed() {
                // SAFETY: the kernel has filled all of it, and any bytes are a valid value.
                return Ok(unsafe { info.assume_init() }.ssi_signo);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// Sends SIGTERM to this process: [`Signals::wait`] returns.
pub fn stop_process() {
    // SAFETY: `kill` touches no memory; the signal is for this process alone.
    unsafe { libc::kill(libc::getpid(), libc::SIGTERM) };
}

/// A descriptor of our own (close-on-exec) for what `fd` refers to, whoever owns that.
///
/// # Errors
/// `EBADF` if it is not open, and what else the kernel says.
pub fn dup(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: `fcntl` takes any number for a descriptor and only makes a new one.
    let fd = check(unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel has just made this descriptor, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Memory of `len` zero bytes with a descriptor, whose length nobody can change.
///
/// # Errors
/// What the kernel says.
pub fn memfd(name: &CStr, len: u64) -> io::Result<File> {
    // SAFETY: `name` is a C string.
    let fd = check(unsafe {
        libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
    })?;
    // SAFETY: the kernel has just made this descriptor, nobody else owns it.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(len)?;
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) })?;
    Ok(file)
}

/// An option of level SOL_SOCKET whose value is an int.
fn socket_option(fd: BorrowedFd<'_>, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut len = libc::socklen_t::try_from(mem::size_of_val(&value)).expect("4 fits");
    // SAFETY: `value` is valid for writing `len` bytes.
    check(unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw mut value).cast(),
            &raw mut len,
        )
    })?;
    Ok(value)
}

/// Makes reads and writes of `fd` fail with EAGAIN rather than wait (for all who share the open file).
///
/// # Errors
/// What the kernel says.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no pointers; the descriptor is borrowed for the calls.
    let rc = unsafe {
        match libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) {
            -1 => -1,
            flags => libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK),
        }
    };
    if rc == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether `fd`, a socket, listens.
///
/// # Errors
/// `ENOTSOCK` if it is none.
pub fn is_listening(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(socket_option(fd, libc::SO_ACCEPTCONN)? != 0)
}

/// Whether `fd`, a socket, is a Unix socket.
///
/// # Errors
/// `ENOTSOCK` if it is none.
pub fn is_unix_socket(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(socket_option(fd, libc::SO_DOMAIN)? == libc::AF_UNIX)
}

/// Makes the socket `fd` listen.
///
/// # Errors
/// `EINVAL` if it is connected, `EOPNOTSUPP` if it cannot.
pub fn listen(fd: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    // SAFETY: `listen` touches no memory.
    check(unsafe { libc::listen(fd.as_raw_fd(), backlog) }).map(drop)
}

/// Locks all of `file` for writing, against other processes' POSIX locks too, until it is closed.
///
/// # Errors
/// `EAGAIN` if somebody else has it locked.
pub fn lock_exclusively(file: &File) -> io::Result<()> {
    // SAFETY: all zeroes is a valid `flock`: from the start to the end of the file.
    let mut lock: libc::flock = unsafe { mem::zeroed() };
    lock.l_type = libc::c_short::try_from(libc::F_WRLCK).expect("a small constant");
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).expect("a small constant");
    // SAFETY: `lock` is valid for reading.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(drop)
}

/// Waits until one of `fds` can be read (or has ended), at most until `deadline`. The first of them; `None`: none in time.
///
/// # Errors
/// What `poll` says, except EINTR.
pub fn wait_readable(
    fds: &[BorrowedFd<'_>],
    deadline: Option<Instant>,
) -> io::Result<Option<usize>> {
    let fds: Vec<_> = fds.iter().map(|fd| (*fd, false)).collect();
    wait_ready(&fds, deadline)
}

/// The same for descriptors that have input, or, with `true`, room for output.
///
/// # Errors
/// What the kernel says.
pub fn wait_ready(
    fds: &[(BorrowedFd<'_>, bool)],
    deadline: Option<Instant>,
) -> io::Result<Option<usize>> {
    let mut polled: Vec<_> = fds
        .iter()
        .map(|(fd, output)| libc::pollfd {
            fd: fd.as_raw_fd(),
            events: if *output { libc::POLLOUT } else { libc::POLLIN },
            revents: 0,
        })
        .collect();
    let count = libc::nfds_t::try_from(polled.len()).expect("a handful");
    loop {
        let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        // Rounded up: looking again too early would burn a core.
        let ms = |left: Duration| i32::try_from(left.as_micros().div_ceil(1000));
        let timeout = left.map_or(-1, |left| ms(left).unwrap_or(i32::MAX));
        // SAFETY: the array has `count` elements and outlives the call.
        match unsafe { libc::poll(polled.as_mut_ptr(), count, timeout) } {
            0 => return Ok(None),
            1.. => return Ok(polled.iter().position(|p| p.revents != 0)),
            _ => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn sockets_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let (stream, _other) = UnixStream::pair().unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(is_listening(listener.as_fd()).unwrap());
        assert!(!is_listening(stream.as_fd()).unwrap());
        assert!(is_unix_socket(stream.as_fd()).unwrap());
        assert!(!is_unix_socket(tcp.as_fd()).unwrap());
        let file = tempfile::tempfile().unwrap();
        assert_eq!(is_listening(file.as_fd()).unwrap_err().raw_os_error(), Some(libc::ENOTSOCK));
        assert_eq!(listen(stream.as_fd(), 1).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn a_lock_excludes_another() {
        let dir = tempfile::tempdir().unwrap();
        let one = File::create(dir.path().join("l")).unwrap();
        let two = File::create(dir.path().join("l")).unwrap();
        lock_exclusively(&one).unwrap();
        assert_eq!(lock_exclusively(&two).unwrap_err().raw_os_error(), Some(libc::EAGAIN));
        drop(one);
        lock_exclusively(&two).unwrap();
    }

    #[test]
    fn no_fork_among_threads() {
        // The test harness has several.
        assert_eq!(fork().unwrap_err().raw_os_error(), Some(libc::EBUSY));
    }

    #[test]
    fn closed_descriptors_cannot_be_copied() {
        assert_eq!(dup(-1).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
