//! The only wrappers over libc of this package: memfd and its mapping, poll, fds over a socket,
//! CPU clocks and affinity. Every function here is safe to call.

use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

mod perf;
mod uring;

pub use perf::SyscallCounter;
pub use uring::{FileRing, open_direct};

/// Most fds taken from one message: the protocol's limit is 8 memory regions, raw tests get more.
pub const FDS_MAX: usize = 32;

fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// A new memfd of `len` bytes.
///
/// # Errors
/// The system call's.
pub fn memfd(name: &CStr, len: u64) -> io::Result<OwnedFd> {
    memfd_of(name, len, 0)
}

/// A new memfd of `len` bytes in pages of 2 MiB, of which that is a multiple.
///
/// # Errors
/// The system call's.
pub fn huge_memfd(name: &CStr, len: u64) -> io::Result<OwnedFd> {
    memfd_of(name, len, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)
}

fn memfd_of(name: &CStr, len: u64, flags: libc::c_uint) -> io::Result<OwnedFd> {
    // SAFETY: `name` is a valid C string for the time of the call.
    let fd = check(unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | flags) })?;
    // SAFETY: the kernel has just given us this fd, nobody else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    let len = libc::off_t::try_from(len).map_err(io::Error::other)?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::ftruncate(fd.as_raw_fd(), len) })?;
    Ok(fd)
}

/// A shared mapping of a file from its start, of which a part is used; unmapped on drop. The bytes may change under our feet, so no
/// reference to them is ever handed out; `mem` reads and writes them through raw pointers.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    whole: usize,
    part: Range<usize>,
}

// SAFETY: the mapping belongs to the process, not to a thread; all access is by raw pointer.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `whole` bytes of `fd`, read and write, shared, populated (no page faults when measuring), and uses
    /// `part` of them.
    ///
    /// # Errors
    /// The system call's.
    ///
    /// # Panics
    /// When the part is not inside.
    pub fn new(fd: &impl AsRawFd, whole: usize, part: Range<usize>) -> io::Result<Self> {
        assert!(part.start <= part.end && part.end <= whole, "a part of the file");
        // SAFETY: a fresh mapping at an address of the kernel's choice overlaps nothing.
        let ptr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                whole,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                fd.as_raw_fd(),
                0,
            )
        };
        if ptr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(ptr.cast::<u8>()).ok_or_else(|| io::Error::other("mmap gave 0"))?;
        Ok(Self { base, whole, part })
    }

    /// First byte of the part.
    #[must_use]
    pub fn ptr(&self) -> NonNull<u8> {
        // SAFETY: inside the mapping, as `new` asserted.
        unsafe { self.base.add(self.part.start) }
    }

    /// Where the part is in the file, in bytes.
    #[must_use]
    pub fn offset(&self) -> usize {
        self.part.start
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.part.len()
    }

    /// Whether it is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.part.is_empty()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: we mapped exactly this range, and whoever holds a pointer into it (`mem::Buf`)
        // also holds an `Arc` of the memory that owns this mapping.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.whole) };
    }
}

/// Waits until one of `fds` is readable (or hung up); false when the time is over.
///
/// # Errors
/// The system call's, `EINTR` excepted.
pub fn wait_readable(fds: &[RawFd], timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + timeout;
    let mut polls = [libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 }; 64];
    let polls = polls.get_mut(..fds.len()).ok_or_else(|| io::Error::other("too many fds"))?;
    for (poll, fd) in polls.iter_mut().zip(fds) {
        poll.fd = *fd;
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let ts = libc::timespec {
            tv_sec: libc::time_t::try_from(left.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        // SAFETY: `polls` and `ts` live for the call, and the count is the slice's length.
        let n = unsafe {
            libc::ppoll(
                polls.as_mut_ptr(),
                polls.len() as libc::nfds_t,
                &raw const ts,
                std::ptr::null(),
            )
        };
        match check(n) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

/// Sends bytes with fds attached to the first of them.
///
/// # Errors
/// The system call's.
pub fn send_with_fds(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let sent = stream.send_with_fds(&[bytes], fds)?;
    if sent == bytes.len() {
        return Ok(());
    }
    // A stream socket may take a part; the fds went with that part.
    let mut rest = &bytes[sent..];
    while !rest.is_empty() {
        let n = stream.send_with_fds(&[rest], &[])?;
        rest = &rest[n..];
    }
    Ok(())
}

/// Receives up to `buf.len()` bytes and the fds that came with them; 0 bytes at end of file.
///
/// # Errors
/// The system call's.
pub fn recv_with_fds(stream: &UnixStream, buf: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut raw = [-1; FDS_MAX];
    let mut iov = [libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() }];
    // SAFETY: the iovec names exactly `buf`, which is borrowed mutably for the call.
    let (n, nfds) = unsafe { stream.recv_with_fds(&mut iov, &mut raw) }?;
    // SAFETY: the kernel installed these fds for us with this message; nobody else owns them.
    let fds = raw[..nfds].iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect();
    Ok((n, fds))
}

/// CPU time of a whole process in ns, its finished threads and io_uring's workers included.
///
/// # Errors
/// `ESRCH` when it is gone.
pub fn process_cpu_ns(pid: u32) -> io::Result<u64> {
    let mut clock: libc::clockid_t = 0;
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: `clock` is a valid place for the answer.
    let ret = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if ret != 0 {
        return Err(io::Error::from_raw_os_error(ret));
    }
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` is a valid place for the answer.
    check(unsafe { libc::clock_gettime(clock, &raw mut ts) })?;
    Ok(ts.tv_sec.unsigned_abs() * 1_000_000_000 + ts.tv_nsec.unsigned_abs())
}

/// CPU time of the calling thread in ns.
#[must_use]
pub fn thread_cpu_ns() -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` is a valid place for the answer; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut ts) };
    ts.tv_sec.unsigned_abs() * 1_000_000_000 + ts.tv_nsec.unsigned_abs()
}

/// Pins the calling thread to one CPU.
///
/// # Errors
/// The system call's.
pub fn pin_thread(cpu: usize) -> io::Result<()> {
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if cpu >= 8 * size_of::<libc::cpu_set_t>() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    // SAFETY: `cpu` is within the set, checked above.
    unsafe { libc::CPU_SET(cpu, &mut set) };
    // SAFETY: `set` lives for the call and its size is given.
    check(unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) })?;
    Ok(())
}

/// Gives the kernel a `POSIX_FADV_*` word about a whole file.
///
/// # Errors
/// The system call's.
pub fn advise(file: &impl AsRawFd, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: no memory is passed.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Sends a signal to a process.
///
/// # Errors
/// The system call's.
pub fn kill(pid: u32, signal: i32) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Sends a signal to the process group that a process leads.
///
/// # Errors
/// The system call's.
pub fn kill_group(leader: u32, signal: i32) -> io::Result<()> {
    let leader = libc::pid_t::try_from(leader).map_err(io::Error::other)?;
    // SAFETY: no memory is passed.
    check(unsafe { libc::killpg(leader, signal) }).map(drop)
}

/// Makes a child end when the thread that starts it does: an interrupted run leaves no back end behind.
pub fn end_with_parent(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe, and nothing else happens between fork and exec.
    unsafe {
        command.pre_exec(|| check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM)).map(drop));
    }
}

/// The process at the other end of a UNIX socket (for a server: who called `listen`).
///
/// # Errors
/// The system call's.
pub fn peer_pid(stream: &UnixStream) -> io::Result<u32> {
    let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: `cred` is a valid place of `len` bytes for the answer.
    check(unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    })?;
    u32::try_from(cred.pid).map_err(io::Error::other)
}
