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

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::{Pin, pin};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Wake};

    use super::*;

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn poll<'a>(turn: &mut Pin<&mut impl Future<Output = Turn<'a>>>) -> Option<Turn<'a>> {
        match turn.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(turn) => Some(turn),
            Poll::Pending => None,
        }
    }

    fn lead(turn: Option<Turn<'_>>) -> Round<'_> {
        match turn {
            Some(Turn::Lead(round)) => round,
            Some(Turn::Done(result)) => panic!("done: {result:?}"),
            None => panic!("waits"),
        }
    }

    #[expect(clippy::needless_pass_by_value, reason = "as `lead`")]
    fn done(turn: Option<Turn<'_>>) -> Result<(), Errno> {
        match turn {
            Some(Turn::Done(result)) => result,
            Some(Turn::Lead(_)) => panic!("leads"),
            None => panic!("waits"),
        }
    }

    #[test]
    fn who_comes_late_is_in_the_next_round() {
        let commit = Commit::default();
        let [mut a, mut b, mut c] = [(); 3].map(|()| Box::pin(commit.turn()));
        let [mut a, mut b, mut c] = [a.as_mut(), b.as_mut(), c.as_mut()];
        let first = lead(poll(&mut a));
        assert!(poll(&mut b).is_none() && poll(&mut c).is_none());
        first.end(Ok(()));
        // What `b` has written was perhaps not in the first round.
        let second = lead(poll(&mut b));
        assert!(poll(&mut c).is_none());
        second.end(Ok(()));
        assert_eq!(done(poll(&mut c)), Ok(()));
    }

    #[test]
    fn errors_are_for_those_in_the_round() {
        let commit = Commit::default();
        let (mut a, mut in_second) = (pin!(commit.turn()), pin!(commit.turn()));
        let (mut leader, mut in_third) = (pin!(commit.turn()), pin!(commit.turn()));
        let first = lead(poll(&mut a));
        assert!(poll(&mut leader).is_none() && poll(&mut in_second).is_none());
        first.end(Err(Errno::ENOSPC));
        let second = lead(poll(&mut leader));
        assert!(poll(&mut in_second).is_none() && poll(&mut in_third).is_none());
        // Nobody says how it ended.
        drop(second);
        assert_eq!(done(poll(&mut in_second)), Err(Errno::EIO));
        lead(poll(&mut in_third)).end(Ok(()));
        let mut later = pin!(commit.turn());
        lead(poll(&mut later)).end(Ok(()));
    }

    #[test]
    fn a_round_that_was_none_is_told_to_nobody() {
        let commit = Commit::default();
        let (mut a, mut resize) = (pin!(commit.turn()), pin!(commit.turn()));
        let (mut before, mut during) = (pin!(commit.turn()), pin!(commit.turn()));
        let first = lead(poll(&mut a));
        assert!(poll(&mut resize).is_none() && poll(&mut before).is_none());
        first.end(Err(Errno::ENOSPC));
        let none = lead(poll(&mut resize));
        assert!(poll(&mut before).is_none() && poll(&mut during).is_none());
        none.cancel();
        let round = lead(poll(&mut before));
        assert!(poll(&mut during).is_none());
        round.end(Ok(()));
        // It came before that round; the next one tells it, whoever leads that.
        match poll(&mut during) {
            Some(Turn::Done(result)) => assert_eq!(result, Ok(())),
            turn => lead(turn).end(Ok(())),
        }
        let mut later = pin!(commit.turn());
        lead(poll(&mut later)).end(Ok(()));
    }

    #[test]
    fn everybody_is_woken_and_nobody_need_come() {
        let commit = Commit::default();
        let woken = [(); 2].map(|()| Arc::new(Woken::default()));
        let wakers = woken.clone().map(Waker::from);
        let mut a = pin!(commit.turn());
        let first = lead(poll(&mut a));
        let mut stays = pin!(commit.turn());
        {
            let mut goes = pin!(commit.turn());
            assert!(goes.as_mut().poll(&mut Context::from_waker(&wakers[0])).is_pending());
            assert!(stays.as_mut().poll(&mut Context::from_waker(&wakers[1])).is_pending());
            assert!(stays.as_mut().poll(&mut Context::from_waker(&wakers[1])).is_pending());
        }
        first.end(Ok(()));
        assert_eq!(woken.map(|w| w.0.load(Ordering::Relaxed)), [1, 1]);
        lead(poll(&mut stays)).end(Ok(()));
    }
}
