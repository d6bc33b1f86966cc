//! Group commit: flushes take turns, and everybody who asks while one is running shares the next.
#![forbid(unsafe_code)]

use std::future::poll_fn;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use super::mutation::{Mutation, broken};
use crate::error::Errno;

/// The rounds of an image.
#[derive(Default)]
pub struct Commit {
    state: Mutex<State>,
}

struct State {
    running: bool,
    /// Rounds that have begun, and that have ended.
    begun: u64,
    ended: u64,
    /// How the last one ended. Good news covers all earlier rounds, bad news is told to too many rather than too few.
    last: Result<(), Errno>,
    waiting: Vec<Waker>,
}

impl Default for State {
    fn default() -> Self {
        State { running: false, begun: 0, ended: 0, last: Ok(()), waiting: Vec::new() }
    }
}

/// What [`Commit::turn`] answers.
pub enum Turn<'a> {
    /// A round that began after the call has ended.
    Done(Result<(), Errno>),
    /// The caller carries out the round.
    Lead(Round<'a>),
}

/// A round under way.
pub struct Round<'a> {
    commit: &'a Commit,
    cancelled: bool,
    result: Result<(), Errno>,
}

impl Commit {
    /// Waits for a whole round, or for the right to carry one out. What completed before the call is in that round.
    pub async fn turn(&self) -> Turn<'_> {
        let mut wanted = self.lock().begun + 1;
        if broken(Mutation::JoinRunningFlush) && self.lock().running {
            wanted -= 1;
        }
        poll_fn(|cx| {
            let mut s = self.lock();
            if s.ended >= wanted {
                return Poll::Ready(Turn::Done(s.last));
            }
            if !s.running {
                s.running = true;
                s.begun += 1;
                return Poll::Ready(Turn::Lead(Round {
                    commit: self,
                    cancelled: false,
                    result: Err(Errno::EIO),
                }));
            }
            if !s.waiting.iter().any(|w| w.will_wake(cx.waker())) {
                s.waiting.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Round<'_> {
    /// Ends the round.
    pub fn end(mut self, result: Result<(), Errno>) {
        self.result = result;
    }
}

impl Round<'_> {
    /// It was none: whoever waits takes the next turn.
    pub fn cancel(mut self) {
        self.cancelled = true;
    }
}

impl Drop for Round<'_> {
    fn drop(&mut self) {
        let mut s = self.commit.lock();
        s.running = false;
        if self.cancelled {
            s.begun -= 1;
        } else {
            s.ended = s.begun;
            s.last = self.result;
        }
        let waiting = std::mem::take(&mut s.waiting);
        drop(s);
        waiting.into_iter().for_each(Waker::wake);
    }
}
