//! Driving one future to its end on the calling thread.
#![forbid(unsafe_code)]

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::mailbox::Mail;
#[cfg(any(test, feature = "sim"))]
use super::sim;
use super::{Inbox, Runtime, WaitKind};
use crate::error::Errno;

/// Drives `future` to its end on this thread, with a runtime of its own (control plane, tests).
///
/// # Panics
/// If the thread drives a runtime already, or no descriptors are left for one.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    block_on_with(WaitKind::Epoll, future)
}

/// [`block_on`], for those who must go on when no runtime can be had.
///
/// # Errors
/// EMFILE and others: nothing has been done.
///
/// # Panics
/// If the thread drives a runtime already.
pub fn try_block_on<T>(future: impl Future<Output = T>) -> Result<T, Errno> {
    #[cfg(any(test, feature = "sim"))]
    if let Some(world) = sim::current_world() {
        return Ok(sim::block_on(&*world, future));
    }
    let rt = Runtime::install(WaitKind::Epoll)?;
    Ok(drive(&rt, future))
}

/// [`block_on`] with a wait point of choice.
///
/// # Panics
/// As [`block_on`]; or if io_uring does not work here.
pub fn block_on_with<T>(kind: WaitKind, future: impl Future<Output = T>) -> T {
    #[cfg(any(test, feature = "sim"))]
    if let Some(world) = sim::current_world() {
        return sim::block_on(&*world, future);
    }
    drive(&Runtime::install(kind).expect("a thread can have a runtime"), future)
}

/// Whether the calling thread is inside of a simulation (`sim`): never in the program that is shipped.
pub fn is_simulated() -> bool {
    #[cfg(any(test, feature = "sim"))]
    if sim::current_world().is_some() {
        return true;
    }
    false
}

fn drive<T>(rt: &Runtime, future: impl Future<Output = T>) -> T {
    struct MainWaker(Arc<Inbox>);
    impl std::task::Wake for MainWaker {
        fn wake(self: Arc<Self>) {
            self.0.post(Mail::Wake { key: usize::MAX, generation: 0 });
        }
    }
    let waker = Waker::from(Arc::new(MainWaker(Arc::clone(rt.inbox()))));
    let mut future = pin!(future);
    let (mut events, mut value) = (Vec::new(), None);
    loop {
        if value.is_none()
            && let Poll::Ready(v) = future.as_mut().poll(&mut Context::from_waker(&waker))
        {
            value = Some(v);
        }
        rt.executor.run_ready(usize::MAX);
        // Tasks that the future left behind are driven to their end, too.
        if rt.executor.tasks() == 0
            && let Some(value) = value.take()
        {
            return value;
        }
        rt.reactor.borrow_mut().flush();
        if !rt.has_work() {
            rt.wait();
        }
        rt.collect(&mut events);
        events.clear();
    }
}
