//! An open file, and a transfer between it and memory.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::inline::{self, Inline};
use crate::mem::IoVec;

/// The most memory ranges in one kernel request (IOV_MAX).
pub const IOV_MAX: usize = 1024;

/// How a file's requests reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// A pool of threads that call `preadv2` and `pwritev2`.
    Threads,
    /// Linux AIO (`io_submit`); needs O_DIRECT.
    Native,
    /// The worker's own io_uring; the thread pool where there is none.
    IoUring,
}

/// An open file and how to do I/O on it.
#[derive(Debug)]
pub struct File {
    fd: OwnedFd,
    /// The engine.
    pub engine: Engine,
    /// Offsets and lengths must be multiples of this (bytes, power of two).
    pub request_align: u32,
    /// Memory must be aligned to this (bytes, power of two).
    pub mem_align: u32,
    pub(super) inline: Inline,
}

impl File {
    /// `fd`, served by `engine`, with its alignment demands in bytes.
    pub fn new(fd: OwnedFd, engine: Engine, request_align: u32, mem_align: u32) -> File {
        File { fd, engine, request_align, mem_align, inline: Inline::default() }
    }

    /// Whether transfers are with the page cache: not O_DIRECT, which wants alignment.
    #[inline]
    pub(super) fn is_cached(&self) -> bool {
        self.request_align == 1
    }

    /// Whether a transfer is better done by a plain system call, here and now.
    #[inline]
    pub(super) fn prefers_inline(&self, rw: &Rw) -> bool {
        rw.write
            && rw.len <= inline::LEN_MAX
            && !rw.dsync
            && self.is_cached()
            && self.engine == Engine::IoUring
            && self.inline.allowed()
    }

    /// Whether a transfer that has nobody to share the engine's costs with should ask the page cache, here and now.
    #[inline]
    pub(super) fn tries_cache(&self, rw: &Rw) -> bool {
        !rw.write && rw.len <= inline::LEN_MAX && self.is_cached() && self.inline.tries_read()
    }

    /// The descriptor.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// One transfer between a file and memory, as the kernel takes it.
///
/// Whoever makes one keeps the descriptor, the array and the memory alive until its completion.
#[derive(Clone, Copy)]
pub struct Rw {
    pub(super) write: bool,
    pub(super) dsync: bool,
    pub(super) fd: RawFd,
    pub(super) count: u32,
    pub(super) iov: *const IoVec,
    pub(super) offset: u64,
    pub(super) len: usize,
}

// SAFETY: a description; see the contract of its maker.
unsafe impl Send for Rw {}

impl Rw {
    /// A transfer at byte `offset` of `file`, to (`write` false) or from the memory of `iov`; `dsync`: stable when done.
    ///
    /// # Safety
    /// `file`, the array `iov` and the memory it names stay alive until the transfer's completion has been taken.
    ///
    /// # Panics
    /// If `iov` is empty or longer than [`IOV_MAX`].
    #[inline]
    pub unsafe fn new(file: &File, write: bool, iov: &[IoVec], offset: u64, dsync: bool) -> Rw {
        assert!(!iov.is_empty() && iov.len() <= IOV_MAX, "bad number of memory ranges");
        let count = iov.len() as u32;
        let len = iov.iter().map(IoVec::len).sum();
        Rw { write, dsync, fd: file.fd(), count, iov: iov.as_ptr(), offset, len }
    }
}
