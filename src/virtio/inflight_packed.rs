//! What is in flight on a packed queue, see [`super::inflight`]: the layout of DescStatePacked and QueueRegionPacked.
//!
//! A chain's descriptors are copied, for used descriptors take their place in the ring: entry after entry of the free
//! list becomes a chain's list, whose first entry is its head. Why nothing gets lost and nothing done twice, whatever the
//! moment of our death:
//! - A chain is *taken* by one store (`old_free_head`). Before it a successor finds the entries in the free list, ends
//!   what is marked there, and goes on in the ring before the chain, at the used position + the entries in flight.
//! - A batch is *given back* by one store (the flags of its first used descriptor, by the ring). Before it, the successor
//!   finds these flags as the driver wrote them and goes back to the `old_` fields; after it, it goes on to the others.
//! - Free list and used position change only when a batch is published, all before that store (the fields without `old_`)
//!   or all after it (those with): chains that are taken while a batch collects find the two free heads equal.
//! - `used_idx`, `used_wrap_counter` and their old ones are in one word and change together. The document stores one
//!   after the other; killed in between, a batch that ends a round of the ring would leave a position that never was.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::chain::Desc;
use super::inflight::{DESC_NUM_AT, FEATURES_AT, VERSION, VERSION_AT, View, store};
use super::packed::{Packed, Position};

/// Bytes before the array: features u64, version, desc_num, free_head, old_free_head, used_idx, old_used_idx u16,
/// used_wrap_counter, old_used_wrap_counter u8, padding.
pub(super) const HEADER: usize = 32;
/// Bytes of one entry: inflight u8, padding, next, last, num u16, counter u64, id, flags u16, len u32, addr u64.
pub(super) const DESC: usize = 32;

const FREE_HEAD_AT: usize = 12;
const OLD_FREE_HEAD_AT: usize = 14;
/// The word of used_idx, old_used_idx, used_wrap_counter and old_used_wrap_counter.
const USED_AT: usize = 16;

/// Places in an entry.
const INFLIGHT: usize = 0;
const NEXT: usize = 2;
const LAST: usize = 4;
const NUM: usize = 6;
const COUNTER: usize = 8;
const ID: usize = 16;
const FLAGS: usize = 18;
const LEN: usize = 20;
const ADDR: usize = 24;

fn at(entry: u16, field: usize) -> usize {
    HEADER + DESC * usize::from(entry) + field
}

/// The list of a chain in flight: its first and last entry, and how many they are.
#[derive(Clone, Copy, Debug, Default)]
struct List {
    head: u16,
    last: u16,
    num: u16,
}

/// A chain to resubmit.
struct Again {
    counter: u64,
    id: u16,
    list: List,
    descs: Vec<Desc>,
}

/// Keeps one packed queue's part while the queue runs. What it wrote it never reads back.
pub(super) struct Tracker {
    pub(super) view: View,
    /// Of the next chain taken.
    counter: u64,
    /// The first free entry.
    free_head: u16,
    /// The links of all entries.
    next: Box<[u16]>,
    /// Behind the last used descriptor published.
    used: Position,
    /// The lists of the chains in flight, by buffer id.
    lists: Box<[List]>,
    /// Chains given back that the guest has not been shown yet.
    batch: Vec<u16>,
    /// Chains to resubmit, the oldest last.
    again: Vec<Again>,
    pub(super) recovered: bool,
}

impl Tracker {
    /// Takes over what `view` says about `ring`, and sets it to where it goes on: behind all that is done or to be
    /// resubmitted.
    ///
    /// # Errors
    /// A reason, if it is in a state that no back end leaves.
    pub(super) fn start(view: View, ring: &mut Packed) -> Result<Tracker, &'static str> {
        match view.u16(VERSION_AT).load(Ordering::Acquire) {
            0 => Tracker::fresh(view, ring),
            VERSION => Tracker::recover(view, ring),
            _ => Err("its version is not known"),
        }
    }

    fn fresh(view: View, ring: &Packed) -> Result<Tracker, &'static str> {
        if !ring.is_even() {
            return Err("it does not know the requests in flight before the ring's base");
        }
        let size = view.size();
        let next: Box<[u16]> = (1..=size).collect();
        for (entry, next) in (0..size).zip(&next) {
            store!(view.u8(at(entry, INFLIGHT)), 0);
            store!(view.u16(at(entry, NEXT)), *next);
        }
        let used = ring.next_used();
        store!(view.u64(FEATURES_AT), 0);
        store!(view.u16(DESC_NUM_AT), size);
        store!(view.u16(FREE_HEAD_AT), 0);
        store!(view.u16(OLD_FREE_HEAD_AT), 0);
        store!(view.u64(USED_AT), word(used, used));
        // Last: until now a successor begins anew, too.
        store!(view.u16(VERSION_AT), VERSION);
        Ok(Tracker {
            view,
            counter: 0,
            free_head: 0,
            next,
            used,
            lists: vec![List::default(); size.into()].into(),
            batch: Vec::with_capacity(size.into()),
            again: Vec::new(),
            recovered: false,
        })
    }

    /// "When reconnecting".
    fn recover(view: View, ring: &mut Packed) -> Result<Tracker, &'static str> {
        let size = view.size();
        if view.u16(DESC_NUM_AT).load(Ordering::Relaxed) != size {
            return Err("it is of a ring of another size");
        }
        let (used, free_head) = settle(&view, ring)?;
        let mut next: Box<[u16]> = vec![size; size.into()].into();
        let free = clear_free(&view, free_head, &mut next)?;
        let mut again = find_in_flight(&view, free, &mut next)?;
        again.sort_unstable_by_key(|a| (a.counter, a.list.head));
        let mut lists: Box<[List]> = vec![List::default(); size.into()].into();
        for chain in &again {
            let list = lists.get_mut(usize::from(chain.id));
            let list = list.ok_or("a buffer id that is not below the ring's size")?;
            if list.num != 0 {
                return Err("two chains of one buffer id");
            }
            *list = chain.list;
        }
        ring.restore(used, again.iter().map(|a| (a.id, a.list.num)));
        let counter = again.last().map_or(0, |a| a.counter.wrapping_add(1));
        again.reverse();
        let batch = Vec::with_capacity(size.into());
        Ok(Tracker { view, counter, free_head, next, used, lists, batch, again, recovered: true })
    }

    /// How many chains must be resubmitted before new ones are taken.
    pub(super) fn waiting(&self) -> usize {
        self.again.len()
    }

    /// The next chain to resubmit, in the order in which they were taken first: its buffer id. `ring` has its descriptors as
    /// those of the chain taken last.
    pub(super) fn resubmit(&mut self, ring: &mut Packed) -> Option<u16> {
        let Again { id, descs, .. } = self.again.pop()?;
        ring.retake(&descs);
        Some(id)
    }

    /// Gives up resubmitting; the chains stay in flight for whoever comes next.
    pub(super) fn give_up(&mut self) {
        self.again.clear();
    }

    /// "When receiving available buffers from the driver": `descs` is the chain with buffer id `id`.
    #[inline]
    pub(super) fn taken(&mut self, id: u16, descs: &[Desc]) {
        let (view, head) = (&self.view, self.free_head);
        store!(view.u16(at(head, NUM)), 0);
        store!(view.u64(at(head, COUNTER)), self.counter);
        self.counter = self.counter.wrapping_add(1);
        store!(view.u8(at(head, INFLIGHT)), 1);
        let mut list = List { head, last: head, num: 0 };
        for d in descs {
            list.last = self.free_head;
            list.num += 1;
            if usize::from(list.num) == descs.len() {
                store!(view.u16(at(head, LAST)), list.last);
            }
            store!(view.u16(at(head, NUM)), list.num);
            store!(view.u64(at(list.last, ADDR)), d.addr);
            store!(view.u32(at(list.last, LEN)), d.len);
            store!(view.u16(at(list.last, FLAGS)), d.flags);
            store!(view.u16(at(list.last, ID)), d.link);
            self.free_head = self.next[usize::from(list.last)];
            store!(view.u16(FREE_HEAD_AT), self.free_head);
        }
        store!(view.u16(OLD_FREE_HEAD_AT), self.free_head);
        self.lists[usize::from(id)] = list;
    }

    /// Chain `id` is one more in the batch that the ring will publish.
    #[inline]
    pub(super) fn done(&mut self, id: u16) {
        self.batch.push(id);
    }

    /// "When supplying used buffers to the driver": does `publish`, which shows the guest the batch.
    #[inline]
    pub(super) fn publish(&mut self, publish: impl FnOnce() -> bool) -> bool {
        if self.batch.is_empty() {
            return publish();
        }
        let (view, before) = (&self.view, self.used);
        for id in &self.batch {
            let List { head, last, num } = self.lists[usize::from(*id)];
            self.next[usize::from(last)] = self.free_head;
            store!(view.u16(at(last, NEXT)), self.free_head);
            self.free_head = head;
            store!(view.u16(FREE_HEAD_AT), head);
            self.used.advance(num, view.size());
        }
        store!(view.u64(USED_AT), word(self.used, before));
        let notify = publish();
        for id in self.batch.drain(..) {
            store!(view.u8(at(self.lists[usize::from(id)].head, INFLIGHT)), 0);
        }
        store!(view.u16(OLD_FREE_HEAD_AT), self.free_head);
        store!(view.u64(USED_AT), word(self.used, self.used));
        notify
    }
}

/// The word at [`USED_AT`].
fn word(used: Position, old: Position) -> u64 {
    let mut bytes = [0; 8];
    bytes[..2].copy_from_slice(&used.at.to_ne_bytes());
    bytes[2..4].copy_from_slice(&old.at.to_ne_bytes());
    (bytes[4], bytes[5]) = (used.wrap.into(), old.wrap.into());
    u64::from_ne_bytes(bytes)
}

/// Ends or undoes a batch that was being given back. The used position and the first free entry afterwards.
fn settle(view: &View, ring: &Packed) -> Result<(Position, u16), &'static str> {
    let bytes = view.u64(USED_AT).load(Ordering::Relaxed).to_ne_bytes();
    let position = |at: usize, wrap: u8| match u16::from_ne_bytes([bytes[at], bytes[at + 1]]) {
        at if at < view.size() && wrap <= 1 => Ok(Position { at, wrap: wrap != 0 }),
        _ => Err("a used position that the ring has not"),
    };
    let (used, old) = (position(0, bytes[4])?, position(2, bytes[5])?);
    if used != old && !ring.is_unused(old) {
        // The guest has been shown the batch.
        let free_head = view.u16(FREE_HEAD_AT).load(Ordering::Relaxed);
        store!(view.u16(OLD_FREE_HEAD_AT), free_head);
        store!(view.u64(USED_AT), word(used, used));
        return Ok((used, free_head));
    }
    let free_head = view.u16(OLD_FREE_HEAD_AT).load(Ordering::Relaxed);
    store!(view.u16(FREE_HEAD_AT), free_head);
    store!(view.u64(USED_AT), word(old, old));
    Ok((old, free_head))
}

/// Marks what is in the free list as not in flight. Which entries are, by index; their links are in `next` afterwards.
fn clear_free(view: &View, head: u16, next: &mut [u16]) -> Result<Vec<bool>, &'static str> {
    let mut free = vec![false; view.size().into()];
    let mut entry = head;
    // The last one's link leads out of the array.
    while let Some(is_free) = free.get_mut(usize::from(entry)) {
        if std::mem::replace(is_free, true) {
            return Err("a loop in its free list");
        }
        store!(view.u8(at(entry, INFLIGHT)), 0);
        let after = view.u16(at(entry, NEXT)).load(Ordering::Relaxed);
        next[usize::from(entry)] = after;
        entry = after;
    }
    Ok(free)
}

/// All chains in flight. `seen` are the entries of the free list; each of the others must be in one chain.
fn find_in_flight(
    view: &View,
    mut seen: Vec<bool>,
    next: &mut [u16],
) -> Result<Vec<Again>, &'static str> {
    let mut found = Vec::new();
    for head in 0..view.size() {
        // An entry of a chain that came before is no head, whatever it says.
        if seen[usize::from(head)] || view.u8(at(head, INFLIGHT)).load(Ordering::Relaxed) == 0 {
            continue;
        }
        let num = view.u16(at(head, NUM)).load(Ordering::Relaxed);
        let mut list = List { head, last: head, num: 0 };
        let mut descs = Vec::new();
        let mut entry = head;
        while list.num < num {
            match seen.get_mut(usize::from(entry)) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err("a chain that is not one"),
            }
            descs.push(read(view, entry));
            (list.num, list.last) = (list.num + 1, entry);
            let after = view.u16(at(entry, NEXT)).load(Ordering::Relaxed);
            next[usize::from(entry)] = after;
            entry = after;
        }
        let id = descs.last().ok_or("a chain of no descriptors")?.link;
        let counter = view.u64(at(head, COUNTER)).load(Ordering::Relaxed);
        found.push(Again { counter, id, list, descs });
    }
    if seen.contains(&false) {
        return Err("entries that are neither free nor in flight");
    }
    Ok(found)
}

fn read(view: &View, entry: u16) -> Desc {
    Desc {
        addr: view.u64(at(entry, ADDR)).load(Ordering::Relaxed),
        len: view.u32(at(entry, LEN)).load(Ordering::Relaxed),
        flags: view.u16(at(entry, FLAGS)).load(Ordering::Relaxed),
        link: view.u16(at(entry, ID)).load(Ordering::Relaxed),
    }
}

#[cfg(test)]
#[path = "inflight_packed_tests.rs"]
mod tests;
