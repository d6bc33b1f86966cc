//! How a queue comes to rest: requests that failed and are kept, rings that break, and stops.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

use super::{Queue, State, Stop, payload, signal};
use crate::error::Errno;
use crate::export::request::Slow;
use crate::rt::Reactor;
use crate::virtio::blk::Status;
use crate::virtio::track::Tracking;

impl Queue {
    /// Keeps a request that failed.
    pub(super) fn keep(&mut self, head: u16, slow: Slow, e: Errno) {
        let slot = &mut self.slots[usize::from(head)];
        self.held += u32::from(!std::mem::replace(&mut slot.held, true));
        if matches!(self.state, State::Running) {
            self.set_state(State::Held);
            let slot = &self.slots[usize::from(head)];
            self.shared.report_stop(self.index, &slot.doing, e);
        }
        self.retry |= e == Errno::ENOSPC;
        self.kept.push((head, slow));
    }

    /// A request that may have been held has been answered.
    pub(super) fn let_go(&mut self, head: u16) {
        if !std::mem::take(&mut self.slots[usize::from(head)].held) {
            return;
        }
        self.held -= 1;
        if self.held == 0 && matches!(self.state, State::Held) {
            self.set_state(State::Running);
            self.shared.report_resume(self.index);
        }
    }

    /// Whether something is kept that is worth another try soon.
    pub fn wants_retry(&self) -> bool {
        self.retry
    }

    /// What is to be tried again now.
    pub fn retry(&mut self) -> Vec<(u16, Slow)> {
        self.retry = false;
        std::mem::take(&mut self.kept)
    }

    /// Nobody waits for better days any more: what is kept has failed.
    pub fn give_up(&mut self) {
        for (head, _) in self.retry() {
            let doing = self.slots[usize::from(head)].doing;
            log::error!(
                "export '{}': queue {}: {} of {} bytes at {}: given up",
                self.shared.id,
                self.index,
                doing.what,
                doing.len,
                doing.offset
            );
            self.finish(head, Status::IoErr);
            self.let_go(head);
        }
    }

    /// The request is nobody's here any more; the tracker says that it is in flight. What it has written to the guest's
    /// memory may be half of the data.
    pub(super) fn leave_in_flight(&mut self, head: u16) {
        let slot = &mut self.slots[usize::from(head)];
        self.ring.log_written(slot.data(false));
        (slot.busy, slot.held) = (false, false);
        self.in_flight -= 1;
    }

    /// Breaks the queue if memory that it shares has been taken away, see [`crate::mem::sigbus`]: what it would go on to log, or
    /// to track, nobody would hear of.
    pub fn check_memory(&mut self) {
        let lost = if self.ring.map().is_lost() {
            "its memory"
        } else if self.ring.log_is_lost() {
            "the dirty log"
        } else if self.tracker.as_ref().is_some_and(Tracking::is_lost) {
            "the in-flight region"
        } else {
            return;
        };
        if matches!(self.state, State::Running) {
            self.break_ring(&format!("the front end has cut the file of {lost} short"));
        }
    }

    pub(super) fn break_ring(&mut self, why: &str) {
        log::warn!("export '{}': queue {} is broken: {why}", self.shared.id, self.index);
        // Whoever waits for the ring to stop waits on for what is in flight.
        if !matches!(self.state, State::Stopping(..)) {
            self.set_state(State::Broken);
        }
        if let Some(tracker) = &mut self.tracker {
            tracker.give_up();
        }
        if let Some(err) = &self.err {
            signal(err);
        }
    }

    /// Takes no more; once nothing of the guest's memory is in use, `answer` gets the ring's base. Requests stay in flight
    /// only if a tracker tells our successor of them: without one every stop is [`Stop::Drain`].
    pub fn stop(&mut self, how: Stop, answer: SyncSender<u32>, reactor: &mut Reactor) {
        let how = if self.tracker.is_some() { how } else { Stop::Drain };
        if how == Stop::Drain {
            self.give_up();
        }
        self.set_state(State::Stopping(how, answer));
        for (head, _) in self.retry() {
            self.leave_in_flight(head);
        }
        if how == Stop::Suspend {
            if let Some(tracker) = &mut self.tracker {
                tracker.give_up();
            }
            self.cancelled.store(true, Ordering::Relaxed);
            for (head, slot) in (0..).zip(&self.slots) {
                if slot.transfer.is_some() {
                    reactor.cancel(payload(self.index, head));
                }
            }
        }
    }

    pub(super) fn is_suspending(&self) -> bool {
        matches!(self.state, State::Stopping(Stop::Suspend, _))
    }

    /// Whether nobody waits for the queue's requests any more.
    pub fn cancelled(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancelled)
    }

    /// If the queue is being stopped and nothing is in flight: who waits, and the ring's base.
    pub fn stopped(&self) -> Option<(&SyncSender<u32>, u32)> {
        match &self.state {
            State::Stopping(_, answer) if self.in_flight == 0 && self.waiting() == 0 => {
                Some((answer, self.ring.base()))
            }
            _ => None,
        }
    }
}
