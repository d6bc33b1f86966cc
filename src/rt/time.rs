//! Waiting for a time, and no longer than somebody waits for the waiting task.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::cmp::Reverse;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use super::runtime::current;
use crate::error::Errno;

/// Wakes somebody at a time; those of the same time in the order of their numbers.
pub struct Timer {
    /// The time.
    pub due: Instant,
    number: u64,
    /// Who sleeps.
    pub waker: Waker,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

thread_local! {
    /// Nobody waits for the task that runs now any more.
    static CANCELLED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `task`; once `cancelled` is set, [`sleep_unless_cancelled`] in it ends. Everything else goes its way: what the
/// kernel has of a task's memory must come back.
pub async fn cancellable<T>(cancelled: Arc<AtomicBool>, task: impl Future<Output = T>) -> T {
    let mut task = pin!(task);
    std::future::poll_fn(|cx| {
        let before = CANCELLED.replace(cancelled.load(Ordering::Relaxed));
        let result = task.as_mut().poll(cx);
        CANCELLED.set(before);
        result
    })
    .await
}

/// Waits for `time`.
///
/// # Errors
/// ECANCELED if nobody waits for the task any more, see [`cancellable`] and [`super::Runtime::wake_sleepers`].
pub async fn sleep_unless_cancelled(time: Duration) -> Result<(), Errno> {
    let mut sleeping = pin!(sleep(time));
    std::future::poll_fn(|cx| match sleeping.as_mut().poll(cx) {
        _ if CANCELLED.get() => Poll::Ready(Err(Errno::ECANCELED)),
        ended => ended.map(Ok),
    })
    .await
}

/// Waits for `time`.
pub async fn sleep(time: Duration) {
    let rt = current();
    let due = rt.now() + time;
    std::future::poll_fn(|cx| {
        if rt.now() >= due {
            return Poll::Ready(());
        }
        let number = rt.timer_count.get();
        rt.timer_count.set(number + 1);
        let waker = cx.waker().clone();
        rt.timers.borrow_mut().push(Reverse(Timer { due, number, waker }));
        Poll::Pending
    })
    .await;
}
