//! The tracking of requests in flight of either kind of virtqueue, beside the virtqueue that it is about.
#![forbid(unsafe_code)]

use super::inflight::{self, View};
use super::inflight_packed;
use super::queue::{Virtqueue, first_base};

/// Keeps a queue's part of the in-flight region while the queue runs. Every call gets the queue that it was started
/// for.
pub struct Tracking(Kind);

enum Kind {
    Split(inflight::Tracker),
    Packed(inflight_packed::Tracker),
}

const PAIR: &str = "a virtqueue and its tracking are of one kind";

/// Where a virtqueue is to be made, if its requests in flight are in `view` and the front end says `base`. What a packed
/// ring's front end says after a crash need not even be a position of the ring.
pub fn base(view: Option<&View>, base: u32) -> u32 {
    let knows_better = view.is_some_and(|v| v.is_packed() && v.is_used());
    if knows_better { first_base(true) } else { base }
}

impl Tracking {
    /// Takes over what `view` says about `queue`, and has the queue go on there.
    ///
    /// # Errors
    /// A reason, if it is in a state that no back end leaves, or of the other kind.
    pub fn start(view: View, queue: &mut Virtqueue) -> Result<Tracking, &'static str> {
        match queue {
            Virtqueue::Split(ring) if !view.is_packed() => {
                let (tracker, next) = inflight::Tracker::start(view, ring.used_idx())?;
                if let Some(next) = next {
                    ring.set_next_avail(next);
                }
                Ok(Tracking(Kind::Split(tracker)))
            }
            Virtqueue::Packed(ring) if view.is_packed() => {
                let tracker = inflight_packed::Tracker::start(view, ring)?;
                Ok(Tracking(Kind::Packed(tracker)))
            }
            _ => Err("it is of the other kind of ring"),
        }
    }

    /// Whether there was a predecessor. It may not have got to notify the guest of what it had done.
    pub fn recovered(&self) -> bool {
        match &self.0 {
            Kind::Split(tracker) => tracker.recovered(),
            Kind::Packed(tracker) => tracker.recovered,
        }
    }

    /// Whether the region was cut short, see [`crate::mem::Region::is_lost`].
    pub fn is_lost(&self) -> bool {
        match &self.0 {
            Kind::Split(tracker) => tracker.view.is_lost(),
            Kind::Packed(tracker) => tracker.view.is_lost(),
        }
    }

    /// How many chains must be resubmitted before new ones are taken.
    #[inline]
    pub fn waiting(&self) -> u16 {
        match &self.0 {
            Kind::Split(tracker) => tracker.waiting(),
            Kind::Packed(tracker) => {
                u16::try_from(tracker.waiting()).expect("at most one for each entry")
            }
        }
    }

    /// The number of the next chain to resubmit, in the order in which they were taken first. It is in flight already;
    /// [`Virtqueue::read_chain`] reads it.
    #[inline]
    pub fn resubmit(&mut self, queue: &mut Virtqueue) -> Option<u16> {
        match (&mut self.0, queue) {
            (Kind::Split(tracker), _) => tracker.resubmit(),
            (Kind::Packed(tracker), Virtqueue::Packed(ring)) => tracker.resubmit(ring),
            _ => unreachable!("{PAIR}"),
        }
    }

    /// Gives up resubmitting; the chains stay in flight for whoever comes next.
    pub fn give_up(&mut self) {
        match &mut self.0 {
            Kind::Split(tracker) => tracker.give_up(),
            Kind::Packed(tracker) => tracker.give_up(),
        }
    }

    /// Chain `number`, popped last, is in flight.
    #[inline]
    pub fn taken(&mut self, number: u16, queue: &Virtqueue) {
        match (&mut self.0, queue) {
            (Kind::Split(tracker), _) => tracker.taken(number),
            (Kind::Packed(tracker), Virtqueue::Packed(ring)) => tracker.taken(number, ring.taken()),
            _ => unreachable!("{PAIR}"),
        }
    }

    /// Chain `number` is one more in the batch that is published next.
    #[inline]
    pub fn done(&mut self, number: u16) {
        match &mut self.0 {
            Kind::Split(tracker) => tracker.done(number),
            Kind::Packed(tracker) => tracker.done(number),
        }
    }

    /// Does [`Virtqueue::publish`], whose answer it gives.
    #[inline]
    pub fn publish(&mut self, queue: &mut Virtqueue, nothing_in_flight: bool) -> bool {
        match (&mut self.0, queue) {
            (Kind::Split(tracker), Virtqueue::Split(ring)) => {
                let notify = ring.publish(nothing_in_flight);
                tracker.published(ring.used_idx());
                notify
            }
            (Kind::Packed(tracker), Virtqueue::Packed(ring)) => tracker.publish(|| ring.publish()),
            _ => unreachable!("{PAIR}"),
        }
    }
}
