//! Grace periods: when can nobody who started earlier still use a thing that was taken away?
//!
//! Requests find places on the disk without a lock ([`crate::block::Driver::map`]) and use them until they complete.
//! A place that is freed meanwhile must not be given to somebody else before all requests that may have found it are
//! done. Requests enter ([`enter`], [`Participant::enter`]) and leave; whoever takes something away notes
//! the [`tag`](Domain::tag) afterwards and may reuse it once the tag [`has passed`](Domain::passed).
//!
//! This is epoch-based reclamation with many requests per thread. The epoch may advance from `e` to `e + 1` only when
//! every thread that has requests publishes `e`, the epoch of its oldest one; so requests of two epochs exist at most,
//! and something tagged `t` cannot be in use at epoch `t + 2`:
//!
//! * A request that read the old state did so before the taker's fence, or entered when the epoch was at most `t`
//!   (whoever sees a later epoch for the first time passes a fence, and reads the new state after it).
//! * While it runs, its thread publishes at most `t`, and the epoch stays at most `t + 1`.

#[cfg(not(loom))]
use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering, fence},
};

#[cfg(loom)]
use loom::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering, fence},
};

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::{Arc, Weak};

/// Published by a thread without requests.
const IDLE: u64 = u64::MAX;

/// The threads that may find things, and the epoch that they agree on.
pub struct Domain {
    epoch: AtomicU64,
    threads: Mutex<Vec<Arc<AtomicU64>>>,
}

/// A point in time: see [`Domain::tag`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Tag(u64);

impl Default for Domain {
    fn default() -> Self {
        Domain { epoch: AtomicU64::new(0), threads: Mutex::new(Vec::new()) }
    }
}

impl Domain {
    /// The time after which nobody finds what was taken away *before this call*.
    pub fn tag(&self) -> Tag {
        fence(Ordering::SeqCst);
        Tag(self.epoch.load(Ordering::SeqCst))
    }

    /// Whether every request that could have found what was taken away before `tag` is done. Moves the epoch on if it can,
    /// so asking again later is all that is needed.
    pub fn passed(&self, tag: Tag) -> bool {
        while self.epoch.load(Ordering::SeqCst) < tag.0 + 2 {
            if !self.try_advance() {
                return false;
            }
        }
        true
    }

    fn try_advance(&self) -> bool {
        let epoch = self.epoch.load(Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let threads = self.threads.lock().expect("no holder panics");
        let agreed = threads
            .iter()
            .all(|t| matches!(t.load(Ordering::SeqCst), IDLE) || t.load(Ordering::SeqCst) == epoch);
        agreed
            && self
                .epoch
                .compare_exchange(epoch, epoch + 1, Ordering::SeqCst, Ordering::SeqCst)
                .is_ok()
    }
}

/// One thread's place in a domain. Not shared: its requests enter and leave on this thread.
struct Seat {
    published: Arc<AtomicU64>,
    /// Requests by the epoch in which they entered, modulo 3; two of them are in use.
    counts: [Cell<u32>; 3],
    oldest: Cell<u64>,
    seen: Cell<u64>,
    total: Cell<u32>,
}

/// The epoch in which a request entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry(u64);

impl Seat {
    fn new(domain: &Domain) -> Seat {
        let published = Arc::new(AtomicU64::new(IDLE));
        domain.threads.lock().expect("no holder panics").push(Arc::clone(&published));
        Seat {
            published,
            counts: [const { Cell::new(0) }; 3],
            oldest: Cell::new(0),
            seen: Cell::new(IDLE),
            total: Cell::new(0),
        }
    }

    fn give_up(&self, domain: &Domain) {
        let mut threads = domain.threads.lock().expect("no holder panics");
        threads.retain(|t| !Arc::ptr_eq(t, &self.published));
    }

    #[inline]
    fn enter(&self, domain: &Domain) -> Entry {
        let epoch =
            if self.total.get() == 0 { self.announce(domain) } else { self.current(domain) };
        let count = &self.counts[(epoch % 3) as usize];
        count.set(count.get() + 1);
        self.total.set(self.total.get() + 1);
        Entry(epoch)
    }

    /// The first request after idleness: its epoch must be visible before it looks at anything.
    fn announce(&self, domain: &Domain) -> u64 {
        loop {
            let epoch = domain.epoch.load(Ordering::SeqCst);
            self.published.store(epoch, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if domain.epoch.load(Ordering::SeqCst) == epoch {
                self.oldest.set(epoch);
                self.seen.set(epoch);
                return epoch;
            }
        }
    }

    /// The older requests keep the epoch from running away; a new epoch is looked at behind a fence.
    #[inline]
    fn current(&self, domain: &Domain) -> u64 {
        let epoch = domain.epoch.load(Ordering::Acquire);
        if epoch != self.seen.get() {
            fence(Ordering::SeqCst);
            self.seen.set(epoch);
        }
        epoch
    }

    #[inline]
    fn leave(&self, entry: Entry) {
        let count = &self.counts[(entry.0 % 3) as usize];
        count.set(count.get() - 1);
        let total = self.total.get() - 1;
        self.total.set(total);
        if total == 0 {
            self.published.store(IDLE, Ordering::Release);
        } else if self.counts[(self.oldest.get() % 3) as usize].get() == 0 {
            // The rest entered one epoch later: there are never more than two.
            self.oldest.set(self.oldest.get() + 1);
            self.published.store(self.oldest.get(), Ordering::Release);
        }
    }
}

/// A thread that takes part in a domain as long as it has this: for workers, whose requests' entries are in their slots.
pub struct Participant {
    domain: Arc<Domain>,
    seat: Seat,
}

impl Participant {
    /// Makes the calling thread a participant of `domain`.
    pub fn new(domain: &Arc<Domain>) -> Participant {
        Participant { seat: Seat::new(domain), domain: Arc::clone(domain) }
    }

    /// A request starts: what it finds from now on stays until it leaves.
    #[inline]
    pub fn enter(&self) -> Entry {
        self.seat.enter(&self.domain)
    }

    /// A request is done.
    #[inline]
    pub fn leave(&self, entry: Entry) {
        self.seat.leave(entry);
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        self.seat.give_up(&self.domain);
    }
}

/// A thread's seat in a domain that it entered by [`enter`]; goes with the thread and its last pin.
struct Place {
    domain: Weak<Domain>,
    seat: Seat,
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(domain) = self.domain.upgrade() {
            self.seat.give_up(&domain);
        }
    }
}

thread_local! {
    static PLACES: RefCell<Vec<Rc<Place>>> = const { RefCell::new(Vec::new()) };
}

/// A request that is under way on this thread; done when it is dropped.
pub struct Pin {
    place: Rc<Place>,
    entry: Entry,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.place.seat.leave(self.entry);
    }
}

/// A request of the slow lane starts on the calling thread: what it finds from now on stays until the pin is dropped.
pub fn enter(domain: &Arc<Domain>) -> Pin {
    let place = PLACES.with_borrow_mut(|places| {
        let mine =
            places.iter().find(|place| std::ptr::eq(place.domain.as_ptr(), &raw const **domain));
        if let Some(place) = mine {
            return Rc::clone(place);
        }
        places.retain(|place| place.domain.strong_count() > 0);
        let place = Rc::new(Place { domain: Arc::downgrade(domain), seat: Seat::new(domain) });
        places.push(Rc::clone(&place));
        place
    });
    let entry = place.seat.enter(domain);
    Pin { place, entry }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_request_holds_back_what_was_freed_after_it_began() {
        let domain = Arc::new(Domain::default());
        let (a, b) = (Participant::new(&domain), Participant::new(&domain));
        let early = a.enter();
        let tag = domain.tag();
        let late = b.enter();
        assert!(!domain.passed(tag));
        a.leave(early);
        // b entered after the tag was taken, but may be in the same epoch: held back until it leaves or time moves on.
        b.leave(late);
        assert!(domain.passed(tag));
    }

    #[test]
    fn a_thread_that_is_never_idle_does_not_stop_time() {
        let domain = Arc::new(Domain::default());
        let a = Participant::new(&domain);
        let mut running = a.enter();
        for _ in 0..100 {
            let tag = domain.tag();
            let mut turns = 0;
            while !domain.passed(tag) {
                let next = a.enter();
                a.leave(running);
                running = next;
                turns += 1;
                assert!(turns < 5);
            }
        }
        a.leave(running);
    }

    #[test]
    fn pins_hold_back_until_they_are_dropped() {
        let domain = Arc::new(Domain::default());
        let other = Arc::new(Domain::default());
        let (outer, inner) = (enter(&domain), enter(&domain));
        let tag = domain.tag();
        let elsewhere = enter(&other);
        drop(outer);
        assert!(!domain.passed(tag));
        drop(inner);
        assert!(domain.passed(tag) && !other.passed(other.tag()));
        drop(elsewhere);
        assert!(other.passed(other.tag()));
        // One seat for each thread and domain; a new one needs no more than the old.
        drop((enter(&domain), enter(&domain)));
        assert_eq!(domain.threads.lock().unwrap().len(), 1);
    }

    #[test]
    fn seats_go_with_their_threads_and_domains() {
        let domain = Arc::new(Domain::default());
        std::thread::scope(|s| {
            s.spawn(|| drop(enter(&domain))).join().unwrap();
        });
        assert!(domain.threads.lock().unwrap().is_empty());
        let known = || PLACES.with_borrow(|places| places.len());
        for _ in 0..3 {
            let short_lived = Arc::new(Domain::default());
            let pin = enter(&short_lived);
            assert_eq!((Arc::strong_count(&short_lived), known()), (1, 1));
            drop(short_lived);
            drop(pin);
        }
    }

    #[test]
    fn nobody_there_means_passed() {
        let domain = Arc::new(Domain::default());
        assert!(domain.passed(domain.tag()));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::atomic::AtomicBool;

    use super::*;

    /// One thread looks a place up and uses it, in two overlapping requests; another takes it away and reuses it once the tag has
    /// passed. Nobody uses it after that.
    #[test]
    fn nothing_is_reused_under_a_request() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let domain = Arc::new(Domain::default());
            let linked = Arc::new(AtomicBool::new(true));
            let reused = Arc::new(AtomicBool::new(false));
            let reader = {
                let (domain, linked, reused) =
                    (Arc::clone(&domain), Arc::clone(&linked), Arc::clone(&reused));
                loom::thread::spawn(move || {
                    let me = Participant::new(&domain);
                    let first = me.enter();
                    let found = linked.load(Ordering::Acquire);
                    let second = me.enter();
                    let again = linked.load(Ordering::Acquire);
                    assert!(!(found && reused.load(Ordering::Acquire)), "reused under the first");
                    me.leave(first);
                    assert!(!(again && reused.load(Ordering::Acquire)), "reused under the second");
                    me.leave(second);
                })
            };
            linked.store(false, Ordering::Release);
            let tag = domain.tag();
            if domain.passed(tag) {
                reused.store(true, Ordering::Release);
            }
            reader.join().unwrap();
        });
    }
}
