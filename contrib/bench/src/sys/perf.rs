//! System calls of a process, counted by the kernel: `perf_event_open` on the tracepoint
//! `raw_syscalls:sys_enter`. Costs the process some ten ns per call, nothing between them.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};

/// Where tracefs may be mounted: its own place, and that of older kernels.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
const PERF_TYPE_TRACEPOINT: u32 = 2;
/// `inherit` of `perf_event_attr`: threads started later are counted, too.
const INHERIT: u64 = 1 << 1;

/// `struct perf_event_attr` of its first version, PERF_ATTR_SIZE_VER0: 64 bytes, perf_event_open(2).
#[repr(C)]
#[derive(Default)]
struct Attr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
}

/// Counts the system calls of all threads of a process from its making on.
#[derive(Debug)]
pub struct SyscallCounter {
    threads: Vec<File>,
}

fn tracepoint() -> io::Result<u64> {
    let read = |dir| fs::read_to_string(format!("{dir}/events/raw_syscalls/sys_enter/id"));
    let text = TRACEFS.into_iter().find_map(|dir| read(dir).ok());
    let text = text.ok_or_else(|| {
        io::Error::other(format!(
            "no tracepoint raw_syscalls:sys_enter in {} (mount -t tracefs nodev {})",
            TRACEFS.join(" or "),
            TRACEFS[0]
        ))
    })?;
    text.trim().parse().map_err(io::Error::other)
}

impl SyscallCounter {
    /// Begins to count.
    ///
    /// # Errors
    /// When tracefs is not mounted, or the kernel does not let us (`kernel.perf_event_paranoid`).
    pub fn new(pid: u32) -> io::Result<Self> {
        let attr = Attr {
            kind: PERF_TYPE_TRACEPOINT,
            size: size_of::<Attr>() as u32,
            config: tracepoint()?,
            flags: INHERIT,
            ..Attr::default()
        };
        let mut threads = Vec::new();
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let Ok(tid) = task.file_name().to_string_lossy().parse::<libc::pid_t>() else {
                continue;
            };
            match open(&attr, tid) {
                Ok(file) => threads.push(file),
                // A thread that has ended since.
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Self { threads })
    }

    /// System calls so far.
    ///
    /// # Errors
    /// The system call's.
    pub fn count(&self) -> io::Result<u64> {
        let mut sum = 0;
        for mut file in &self.threads {
            let mut bytes = [0; 8];
            file.read_exact(&mut bytes)?;
            sum += u64::from_ne_bytes(bytes);
        }
        Ok(sum)
    }
}

fn open(attr: &Attr, tid: libc::pid_t) -> io::Result<File> {
    // PERF_FLAG_FD_CLOEXEC
    let (any_cpu, no_group, cloexec) = (-1, -1, 8_u64);
    // SAFETY: `attr` lives for the call and holds its own size.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            std::ptr::from_ref(attr),
            tid,
            any_cpu,
            no_group,
            cloexec,
        )
    };
    let fd = super::check(i32::try_from(fd).map_err(io::Error::other)?)?;
    // SAFETY: the kernel has just given us this fd, nobody else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_system_calls_are_counted_or_it_is_said_why_not() {
        let counter = match SyscallCounter::new(std::process::id()) {
            Ok(counter) => counter,
            Err(e) => return assert!(!e.to_string().is_empty()),
        };
        let before = counter.count().unwrap();
        // SAFETY: no memory is passed.
        (0..1000).for_each(|_| assert!(unsafe { libc::syscall(libc::SYS_getppid) } >= 0));
        let n = counter.count().unwrap() - before;
        assert!(n >= 1000, "{n} of 1000 calls");
    }
}
