//! System calls that block, in the kernel's own convention (negative = error number); run on pool threads.

use std::os::fd::RawFd;

use crate::error::Errno;

fn result(rc: i32) -> i32 {
    if rc < 0 { -Errno::last().0 } else { rc }
}

fn retry(mut call: impl FnMut() -> i32) -> i32 {
    loop {
        match call() {
            rc if rc == -libc::EINTR => {}
            rc => return rc,
        }
    }
}

/// `fdatasync(fd)`.
pub fn fdatasync(fd: RawFd) -> i32 {
    // SAFETY: no pointers.
    retry(|| result(unsafe { libc::fdatasync(fd) }))
}

/// `fallocate(fd, mode, offset, len)`; EINVAL for ranges beyond the signed 64 bits.
pub fn fallocate(fd: RawFd, mode: i32, offset: u64, len: u64) -> i32 {
    let (Ok(offset), Ok(len)) = (libc::off_t::try_from(offset), libc::off_t::try_from(len)) else {
        return -libc::EINVAL;
    };
    // SAFETY: no pointers.
    retry(|| result(unsafe { libc::fallocate(fd, mode, offset, len) }))
}
