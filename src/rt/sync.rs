//! Waiting for one another in `async` code, across threads: locks that may be held across `.await`.
#![forbid(unsafe_code)]

use std::future::poll_fn;
use std::ops::Range;
use std::sync::Mutex;
use std::task::{Poll, Waker};

/// Lets other tasks of the thread run.
pub async fn give_way() {
    let mut gone = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut gone, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[derive(Default)]
struct State {
    held: Vec<Held>,
    /// In order of arrival: a request waits for every one before it that it overlaps, so nobody starves.
    waiting: Vec<(Held, Option<Waker>)>,
    next: u64,
}

#[derive(Clone)]
struct Held {
    range: Range<u64>,
    exclusive: bool,
    number: u64,
}

impl Held {
    fn conflicts(&self, other: &Held) -> bool {
        (self.exclusive || other.exclusive)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

/// A lock on byte ranges: shared holders overlap each other, an exclusive holder overlaps nobody.
#[derive(Default)]
pub struct RangeLock {
    state: Mutex<State>,
}

/// A range held; given back when dropped.
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    number: u64,
}

impl RangeLock {
    /// Waits until nobody who came earlier conflicts with `range`, then holds it.
    pub async fn lock(&self, range: Range<u64>, exclusive: bool) -> RangeGuard<'_> {
        let number = {
            let mut s = self.state.lock().expect("no holder panics");
            s.next += 1;
            let number = s.next;
            s.waiting.push((Held { range, exclusive, number }, None));
            number
        };
        // From here on the guard's drop takes the entry out, whether it waits or holds.
        let guard = RangeGuard { lock: self, number };
        poll_fn(|cx| {
            let mut s = self.state.lock().expect("no holder panics");
            let at = s.waiting.iter().position(|(w, _)| w.number == number);
            let Some(at) = at else { return Poll::Ready(()) };
            let me = s.waiting[at].0.clone();
            let free = !s.held.iter().any(|h| h.conflicts(&me))
                && !s.waiting[..at].iter().any(|(w, _)| w.conflicts(&me));
            if free {
                s.waiting.remove(at);
                s.held.push(me);
                return Poll::Ready(());
            }
            s.waiting[at].1 = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
        guard
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut s = self.lock.state.lock().expect("no holder panics");
        let number = self.number;
        s.held.retain(|h| h.number != number);
        s.waiting.retain(|(w, _)| w.number != number);
        let wakers: Vec<Waker> = s.waiting.iter_mut().filter_map(|(_, w)| w.take()).collect();
        drop(s);
        wakers.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;
    use std::time::Duration;

    use super::*;
    use crate::rt;

    #[test]
    fn overlapping_ranges_take_turns_in_order() {
        let log = Rc::new(RefCell::new(Vec::new()));
        let lock = Rc::new(RangeLock::default());
        rt::block_on(async {
            let done = Rc::new(std::cell::Cell::new(0));
            for (name, range, exclusive) in [
                ("a", 0..10, true),
                ("b", 5..15, false),
                ("c", 20..30, true),
                ("d", 8..9, true),
                ("e", 12..13, false),
            ] {
                let (log, lock, done) = (Rc::clone(&log), Rc::clone(&lock), Rc::clone(&done));
                rt::current().spawn(async move {
                    let _guard = lock.lock(range, exclusive).await;
                    log.borrow_mut().push(format!("+{name}"));
                    rt::sleep(Duration::from_millis(2)).await;
                    log.borrow_mut().push(format!("-{name}"));
                    done.set(done.get() + 1);
                });
            }
            while done.get() < 5 {
                rt::sleep(Duration::from_millis(1)).await;
            }
        });
        let log = log.borrow();
        let at = |what: &str| log.iter().position(|l| l == what).unwrap();
        assert!(at("-a") < at("+b") && at("-b") < at("+d"), "{log:?}");
        assert!(at("+c") < at("-a") && at("+e") < at("-a"), "{log:?}");
    }
}
