//! What is in flight, in memory that outlives the process: the region of the vhost-user document's "Inflight I/O tracking".
//!
//! The front end keeps the memory and gives it to our successor, which resubmits what was in flight when we died. Two
//! things follow. It is hostile, as a ring is: every field is read once and checked, and what we wrote is never
//! read back while the queue runs. And we may be killed between any two instructions: [`Tracker`] does every store in the
//! document's order, and each is a `Release`, so that no compiler moves an earlier store behind it. That is enough: the
//! stores that a killed thread has executed are seen by whoever comes later, and those that it has not are not there.
//!
//! Why nothing gets lost and nothing done twice, whatever the moment:
//! - A head is *taken* by one store (`inflight` = 1). Before it the available ring is read from there again, because
//!   the successor goes on at used.idx + what is in flight; after it the head is resubmitted.
//! - A batch is *given back* by one store (used.idx, by the ring). Before it all of the batch is in flight still.
//!   After it `used_idx` differs from used.idx, by the batch's length, and the list from `last_batch_head` names the
//!   batch: the successor completes the clearing. `used_idx` is stored when all of it is cleared; only then is a new
//!   batch begun and a head taken, so the list is whole and no cleared head is a new one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::mem::Region;

/// The version of both layouts. 0 is memory that nobody has used yet.
pub(super) const VERSION: u16 = 1;
/// Bytes before the array: features u64, version, desc_num, last_batch_head, used_idx u16.
const HEADER: usize = 16;
/// Bytes of one element: inflight u8, padding, next u16 at 6, counter u64 at 8.
const DESC: usize = 16;
/// Queues' parts begin at multiples of this: a cache line, as libvhost-user has it.
const ALIGN: u64 = 64;

pub(super) const FEATURES_AT: usize = 0;
pub(super) const VERSION_AT: usize = 8;
pub(super) const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;

/// Bytes that the part of one queue of `size` entries uses.
fn used_len(size: u16, packed: bool) -> u64 {
    let (header, desc) = if packed { packed_layout() } else { (HEADER, DESC) };
    (header + desc * usize::from(size)) as u64
}

fn packed_layout() -> (usize, usize) {
    (super::inflight_packed::HEADER, super::inflight_packed::DESC)
}

/// Bytes of the part of one queue of `size` entries.
pub fn part_len(size: u16, packed: bool) -> u64 {
    used_len(size, packed).next_multiple_of(ALIGN)
}

/// The part of one queue. It is nobody's Rust object: atomics only.
pub struct View {
    /// Keeps it mapped.
    region: Arc<Region>,
    base: *mut u8,
    /// Bytes from `base` on.
    len: usize,
    size: u16,
    packed: bool,
}

// SAFETY: a view points into memory that its region keeps mapped; all access is atomic.
unsafe impl Send for View {}

impl View {
    /// The part that starts `offset` bytes into `region`, for a ring of `size` entries. `None` if it does not lie in there or
    /// not at a multiple of 8.
    pub fn new(region: Arc<Region>, offset: u64, size: u16, packed: bool) -> Option<View> {
        let len = used_len(size, packed);
        let end = offset.checked_add(len)?;
        let base = region.host().wrapping_add(usize::try_from(offset).ok()?);
        let fits = end <= region.size && base.addr().is_multiple_of(8);
        let len = usize::try_from(len).ok()?;
        fits.then_some(View { region, base, len, size, packed })
    }

    /// Whether its file was cut short, see [`Region::is_lost`].
    pub(super) fn is_lost(&self) -> bool {
        self.region.is_lost()
    }

    /// Entries of its ring.
    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Whether it is laid out for a packed ring.
    pub(super) fn is_packed(&self) -> bool {
        self.packed
    }

    /// Whether a back end has used it.
    pub(super) fn is_used(&self) -> bool {
        self.u16(VERSION_AT).load(Ordering::Acquire) != 0
    }

    /// Where a `T` lies, `at` bytes on.
    #[inline]
    fn place<T>(&self, at: usize) -> *mut T {
        let len = size_of::<T>();
        assert!(at + len <= self.len && at.is_multiple_of(len), "a field of the layout");
        self.base.wrapping_add(at).cast()
    }

    #[inline]
    pub(super) fn u8(&self, at: usize) -> &AtomicU8 {
        // SAFETY: `place` checked that it lies in the part, which the region keeps mapped.
        unsafe { AtomicU8::from_ptr(self.place(at)) }
    }

    #[inline]
    pub(super) fn u16(&self, at: usize) -> &AtomicU16 {
        // SAFETY: as above; it is aligned, for `base` is to 8.
        unsafe { AtomicU16::from_ptr(self.place(at)) }
    }

    #[inline]
    pub(super) fn u32(&self, at: usize) -> &AtomicU32 {
        // SAFETY: as above.
        unsafe { AtomicU32::from_ptr(self.place(at)) }
    }

    #[inline]
    pub(super) fn u64(&self, at: usize) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(self.place(at)) }
    }

    fn inflight(&self, head: u16) -> &AtomicU8 {
        self.u8(HEADER + DESC * usize::from(head))
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.u16(HEADER + DESC * usize::from(head) + 6)
    }

    fn counter(&self, head: u16) -> &AtomicU64 {
        self.u64(HEADER + DESC * usize::from(head) + 8)
    }
}

/// One store; after each of them we may be killed (see the module).
macro_rules! store {
    ($field:expr, $value:expr) => {{
        $field.store($value, Ordering::Release);
        #[cfg(test)]
        $crate::virtio::inflight::tests::killed_here();
    }};
}
pub(super) use store;

/// Keeps one queue's part while the queue runs.
pub struct Tracker {
    pub(super) view: View,
    /// Of the next head taken.
    counter: u64,
    last_batch_head: u16,
    /// Heads given back that the guest has not been shown yet.
    batch: Vec<u16>,
    /// Heads to resubmit, the oldest last.
    again: Vec<u16>,
    recovered: bool,
}

impl Tracker {
    /// Takes over what `view` says about a ring whose used index is `used_idx`. With the tracker comes the available index to
    /// go on at, behind all that is done or to be resubmitted; `None` if nobody has used this memory for this ring.
    ///
    /// # Errors
    /// A reason, if it is in a state that no back end leaves.
    pub fn start(view: View, used_idx: u16) -> Result<(Tracker, Option<u16>), &'static str> {
        match view.u16(VERSION_AT).load(Ordering::Acquire) {
            0 => Ok((Tracker::fresh(view, used_idx), None)),
            VERSION => Tracker::recover(view, used_idx),
            _ => Err("its version is not known"),
        }
    }

    fn new(view: View) -> Tracker {
        let room = usize::from(view.size);
        let (batch, again) = (Vec::with_capacity(room), Vec::new());
        Tracker { view, counter: 0, last_batch_head: 0, batch, again, recovered: false }
    }

    fn fresh(view: View, used_idx: u16) -> Tracker {
        (0..view.size).for_each(|head| store!(view.inflight(head), 0));
        store!(view.u64(FEATURES_AT), 0);
        store!(view.u16(DESC_NUM_AT), view.size);
        store!(view.u16(LAST_BATCH_HEAD_AT), 0);
        store!(view.u16(USED_IDX_AT), used_idx);
        // Last: until now a successor begins anew, too.
        store!(view.u16(VERSION_AT), VERSION);
        Tracker::new(view)
    }

    /// "When reconnecting".
    fn recover(view: View, used_idx: u16) -> Result<(Tracker, Option<u16>), &'static str> {
        let batch = used_idx.wrapping_sub(view.u16(USED_IDX_AT).load(Ordering::Acquire));
        if batch > view.size {
            // No batch is that long: the ring has been set up anew without the memory, and nothing is in flight.
            log::warn!("the in-flight region is of another ring: begun anew");
            return Ok((Tracker::fresh(view, used_idx), None));
        }
        let mut head = view.u16(LAST_BATCH_HEAD_AT).load(Ordering::Relaxed);
        let last_batch_head = if head < view.size { head } else { 0 };
        for _ in 0..batch {
            if head >= view.size {
                return Err("a head outside of the descriptor table in its last batch");
            }
            store!(view.inflight(head), 0);
            head = view.next(head).load(Ordering::Relaxed);
        }
        store!(view.u16(USED_IDX_AT), used_idx);
        let is_in_flight = |head: &u16| view.inflight(*head).load(Ordering::Relaxed) != 0;
        let mut found: Vec<(u64, u16)> = (0..view.size)
            .filter(is_in_flight)
            .map(|head| (view.counter(head).load(Ordering::Relaxed), head))
            .collect();
        found.sort_unstable();
        let counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        let again: Vec<u16> = found.iter().rev().map(|(_, head)| *head).collect();
        let next = again.iter().fold(used_idx, |n, _| n.wrapping_add(1));
        let tracker =
            Tracker { counter, last_batch_head, again, recovered: true, ..Tracker::new(view) };
        Ok((tracker, Some(next)))
    }

    /// Whether there was a predecessor. It may not have got to notify the guest of what it had done.
    pub fn recovered(&self) -> bool {
        self.recovered
    }

    /// How many heads must be resubmitted before new ones are taken.
    pub fn waiting(&self) -> u16 {
        u16::try_from(self.again.len()).expect("at most one for each entry")
    }

    /// The next head to resubmit, in the order in which they were taken first. It is in flight already.
    pub fn resubmit(&mut self) -> Option<u16> {
        self.again.pop()
    }

    /// Gives up resubmitting; the heads stay in flight for whoever comes next.
    pub fn give_up(&mut self) {
        self.again.clear();
    }

    /// "When receiving available buffers from the driver".
    #[inline]
    pub fn taken(&mut self, head: u16) {
        store!(self.view.counter(head), self.counter);
        self.counter = self.counter.wrapping_add(1);
        store!(self.view.inflight(head), 1);
    }

    /// "When supplying used buffers to the driver": one more in the batch that the ring will publish.
    #[inline]
    pub fn done(&mut self, head: u16) {
        store!(self.view.next(head), self.last_batch_head);
        store!(self.view.u16(LAST_BATCH_HEAD_AT), head);
        self.last_batch_head = head;
        self.batch.push(head);
    }

    /// The batch has been published: the ring's used index is `used_idx`.
    #[inline]
    pub fn published(&mut self, used_idx: u16) {
        if self.batch.is_empty() {
            return;
        }
        for head in self.batch.drain(..) {
            store!(self.view.inflight(head), 0);
        }
        store!(self.view.u16(USED_IDX_AT), used_idx);
    }
}

#[cfg(test)]
#[path = "inflight_tests.rs"]
pub(super) mod tests;
