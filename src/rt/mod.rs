//! The runtime: reactor, executor, mailbox, polling policy. Knows nothing of blocks.
#![expect(unused_variables, clippy::unused_async, reason = "skeleton")]

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::error::Errno;
use crate::mem::Sg;

pub mod sync;

/// How a file's requests reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// A pool of threads that call `preadv2` and `pwritev2`.
    Threads,
    /// Linux AIO (`io_submit`); needs O_DIRECT.
    Native,
    /// The worker's own io_uring.
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
}

impl File {
    /// `fd`, served by `engine`, with its alignment demands in bytes.
    pub fn new(fd: OwnedFd, engine: Engine, request_align: u32, mem_align: u32) -> File {
        File { fd, engine, request_align, mem_align }
    }

    /// The descriptor.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Reads at `offset` into `to`; may be short (0 = end of file).
///
/// # Errors
/// What the kernel says.
pub async fn read(file: &File, to: Sg<'_>, offset: u64) -> Result<usize, Errno> {
    todo!()
}

/// Writes `from` at `offset`; may be short. `dsync`: stable when done (RWF_DSYNC).
///
/// # Errors
/// What the kernel says.
pub async fn write(file: &File, from: Sg<'_>, offset: u64, dsync: bool) -> Result<usize, Errno> {
    todo!()
}

/// `fdatasync`.
///
/// # Errors
/// What the kernel says.
pub async fn fdatasync(file: &File) -> Result<(), Errno> {
    todo!()
}

/// `fallocate` with `mode`.
///
/// # Errors
/// What the kernel says.
pub async fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> Result<(), Errno> {
    todo!()
}

/// Runs `f` on a pool thread (ioctls and other calls that block).
pub async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    todo!()
}

/// Waits.
pub async fn sleep(time: Duration) {
    todo!()
}

/// Drives `future` to its end on this thread (control plane, tests): a runtime of its own.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    todo!()
}

/// Whether io_uring works here, found out once; the reason if not.
pub fn uring_available() -> Result<(), Errno> {
    todo!()
}
