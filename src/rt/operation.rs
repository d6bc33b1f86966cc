//! One request of slow-lane code at a time: reads, writes, `fdatasync`, `fallocate`, other calls that block.

use std::future::Future;
use std::marker::PhantomData;
use std::os::fd::RawFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::file::{File, IOV_MAX, Rw};
use super::pool::Owner;
use super::runtime::{Runtime, current};
use super::{Reactor, calls};
use crate::error::Errno;
use crate::mem::{IoVec, Sg};

/// A slow-lane operation in the kernel or on a pool thread. Dropping it unfinished would free memory that the kernel
/// writes to, so that ends the process instead; nothing in this program drops futures early.
struct Operation<'a> {
    rt: Rc<Runtime>,
    op: usize,
    finished: bool,
    memory: PhantomData<&'a ()>,
}

impl Operation<'_> {
    fn submit(start: impl FnOnce(&mut Reactor, usize)) -> Self {
        let rt = current();
        let op = {
            let mut reactor = rt.reactor.borrow_mut();
            let op = reactor.new_op();
            start(&mut reactor, op);
            op
        };
        Operation { rt, op, finished: false, memory: PhantomData }
    }
}

impl Future for Operation<'_> {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        let result = self.rt.reactor.borrow_mut().poll_op(self.op, cx.waker());
        self.finished = result.is_ready();
        result
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        #[cfg(any(test, feature = "sim"))]
        if self.rt.is_simulated() {
            return;
        }
        if !self.finished {
            log::error!("an operation in flight was abandoned");
            std::process::abort();
        }
    }
}

async fn transfer(
    file: &File,
    write: bool,
    sg: Sg<'_>,
    offset: u64,
    dsync: bool,
) -> Result<usize, Errno> {
    if sg.is_empty() {
        return Ok(0);
    }
    let gathered: Vec<IoVec>;
    let iov = match sg.as_kernel_iov() {
        Some(iov) => iov,
        None => {
            gathered = sg.iter().collect();
            &gathered
        }
    };
    let iov = &iov[..iov.len().min(IOV_MAX)];
    let operation = Operation::submit(|reactor, op| {
        // SAFETY: `file` and `sg` are borrowed by this future, which also owns `gathered`; `Operation` sees to it
        // that the future is not dropped before the completion.
        let rw = unsafe { Rw::new(file, write, iov, offset, dsync) };
        reactor.submit_op(file, &rw, op);
    });
    Errno::from_result(operation.await)
}

/// Reads at byte `offset` into `to`; may be short (0 = end of file).
///
/// # Errors
/// What the kernel says.
pub async fn read(file: &File, to: Sg<'_>, offset: u64) -> Result<usize, Errno> {
    transfer(file, false, to, offset, false).await
}

/// Writes `from` at byte `offset`; may be short. `dsync`: stable when done (RWF_DSYNC).
///
/// # Errors
/// What the kernel says.
pub async fn write(file: &File, from: Sg<'_>, offset: u64, dsync: bool) -> Result<usize, Errno> {
    transfer(file, true, from, offset, dsync).await
}

/// `fdatasync`.
///
/// # Errors
/// What the kernel says.
pub async fn fdatasync(file: &File) -> Result<(), Errno> {
    let operation = Operation::submit(|r, op| r.submit_fdatasync(file.engine, file.fd(), op));
    Errno::from_result(operation.await).map(drop)
}

/// `fallocate` with `mode` (FALLOC_FL_*), in bytes.
///
/// # Errors
/// What the kernel says.
pub async fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> Result<(), Errno> {
    let fd = file.fd();
    let call = move || calls::fallocate(fd, mode, offset, len);
    Errno::from_result(Operation::submit(|r, op| r.submit_call(op, Some(fd), call)).await).map(drop)
}

/// Runs `f`, which takes long and waits for no file, on a pool thread.
pub async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    call(None, f).await
}

/// Runs `f` on the descriptor of `file` on a pool thread (ioctls and other calls that block).
pub async fn blocking_on<T: Send + 'static>(
    file: &File,
    f: impl FnOnce(RawFd) -> T + Send + 'static,
) -> T {
    let fd = file.fd();
    call(Some(fd), move || f(fd)).await
}

async fn call<T: Send + 'static>(owner: Owner, f: impl FnOnce() -> T + Send + 'static) -> T {
    let place = Arc::new(std::sync::Mutex::new(None));
    let answer = Arc::clone(&place);
    let call = move || {
        let value = f();
        *answer.lock().expect("no holder panics") = Some(value);
        0
    };
    Operation::submit(|r, op| r.submit_call(op, owner, call)).await;
    let value = place.lock().expect("no holder panics").take();
    value.expect("the call has returned")
}
