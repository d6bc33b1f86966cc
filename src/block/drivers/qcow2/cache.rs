//! The cache of L2 tables, in slices.
//!
//! A *slice* is a part of an L2 table, 4 KiB unless the user says otherwise: a miss costs one read of that size. Slices
//! are numbered through the virtual disk: slice `n` describes guest clusters `n * entries ..`. Each cached slice is in a
//! *slot* of the arena. `tags` says for each slice in which slot it is.
//!
//! # Readers take no lock
//!
//! A reader loads the slice's tag (Acquire), loads the entry from the tag's slot (Acquire), and loads the tag again.
//! If both tags are the same, the entry is the slice's. Why:
//!
//! * A slot is refilled in this order: the old slice's tag is cleared; the new entries are stored, each with
//!   Release; the new slice's tag is stored with Release.
//! * First tag: whoever sees it, by Acquire, sees the entries stored before it. So the reader gets those or later ones.
//! * If the reader gets a word of a later refill, that word's Release store synchronises with its Acquire load; the
//!   clearing of the old tag came before that store, so the second load of the tag sees it, or something later.
//! * Something later is never equal to the first tag, even if the slice has come back to the same slot: a tag
//!   contains a generation that grows with every fill (of 40 bits, so that a reader would have to sleep through 10^12
//!   fills).
//!
//! Entries of two words (extended L2) are not torn either: a word of another fill, of whichever of the two, is found out
//! the same way, and [`SliceCache::store`] replaces such an entry like a fill: tag cleared, words, new tag.
//!
//! # Who waits
//!
//! Fills, evictions and stores are made by holders of the mutex `state`, which is never held across I/O. Who needs a
//! slice that somebody else is reading waits for that ([`Flights`]).
#![forbid(unsafe_code)]

#[cfg(not(loom))]
use std::sync::{Mutex, MutexGuard, atomic::Ordering};

#[cfg(loom)]
use loom::sync::{Mutex, MutexGuard, atomic::Ordering};

use super::arena::Arena;
use super::layout::L2Entry;
use crate::error::Errno;

/// A tag's low bits: the slot's number plus 1. 16 Mi slots are 64 GiB of 4 KiB slices.
const SLOT_BITS: u32 = 24;
const SLOT_MASK: u64 = (1 << SLOT_BITS) - 1;

/// The shape of a [`SliceCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How many slices the virtual disk has.
    pub slices: u64,
    /// Entries per slice, a power of two.
    pub entries: u32,
    /// Words per entry: 1, or 2 with extended L2 entries.
    pub entry_words: u32,
    /// The most slices cached, at least 1.
    pub slots: u32,
}

/// Which slice a slot holds, and whether it may be evicted.
struct Slot {
    slice: u64,
    /// Not yet written back: not to be evicted.
    dirty: bool,
}

#[derive(Default)]
struct State {
    /// Slots in use, from the arena's start on.
    slots: Vec<Slot>,
    hand: usize,
    generation: u64,
}

/// All slots hold slices that must be written back before they can make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheFull;

/// The cache. See the module's description.
pub struct SliceCache {
    shape: Shape,
    /// By slice: 0, or generation << SLOT_BITS | slot + 1.
    tags: Arena,
    /// By slot: its entries.
    arena: Arena,
    /// By slot: not 0 if it was used since the clock's hand passed.
    used: Arena,
    state: Mutex<State>,
}

impl SliceCache {
    /// An empty cache.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(mut shape: Shape) -> Result<SliceCache, Errno> {
        let too_big = |_| Errno(libc::ENOMEM);
        let slices = usize::try_from(shape.slices).map_err(too_big)?;
        let most = u32::try_from(shape.slices).unwrap_or(u32::MAX).min(SLOT_MASK as u32 - 1);
        shape.slots = shape.slots.min(most).max(1);
        let words = shape.entries as usize * shape.entry_words as usize;
        let slots = shape.slots as usize;
        Ok(SliceCache {
            shape,
            tags: Arena::new(slices)?,
            arena: Arena::new(words.checked_mul(slots).ok_or(Errno(libc::ENOMEM))?)?,
            used: Arena::new(slots)?,
            state: Mutex::new(State::default()),
        })
    }

    /// Its shape, with the number of slots cut to what can be used.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Memory in use, in bytes: slots that were ever filled.
    pub fn bytes_used(&self) -> u64 {
        self.lock().slots.len() as u64 * self.slice_words() as u64 * 8
    }

    fn slice_words(&self) -> usize {
        self.shape.entries as usize * self.shape.entry_words as usize
    }

    /// The entry at `index` of `slice`, if the slice is cached. Takes no lock, allocates nothing.
    ///
    /// # Panics
    /// If `slice` or `index` is outside of the shape.
    #[inline]
    pub fn get(&self, slice: u64, index: u32) -> Option<L2Entry> {
        let tag = &self.tags.words()[slice as usize];
        let first = tag.load(Ordering::Acquire);
        if first == 0 {
            return None;
        }
        let slot = (first & SLOT_MASK) as usize - 1;
        let at = slot * self.slice_words() + index as usize * self.shape.entry_words as usize;
        let words = self.arena.words();
        let word = words[at].load(Ordering::Acquire);
        let bitmap =
            if self.shape.entry_words == 2 { words[at + 1].load(Ordering::Acquire) } else { 0 };
        if tag.load(Ordering::Acquire) != first {
            return None;
        }
        let used = &self.used.words()[slot];
        // Most of the time it is set already, and the line stays shared.
        if used.load(Ordering::Relaxed) == 0 {
            used.store(1, Ordering::Relaxed);
        }
        Some(L2Entry { word, bitmap })
    }

    /// Puts a slice just read into a slot: `bytes` as on disk. Does nothing if it is cached already.
    ///
    /// The caller sees to it that the bytes are not older than what the cache held last ([`Flights`], and that a
    /// dirty slice is not evicted).
    ///
    /// # Errors
    /// No slot can be evicted.
    ///
    /// # Panics
    /// If `bytes` has another length than a slice.
    pub fn fill(&self, slice: u64, bytes: &[u8]) -> Result<(), CacheFull> {
        assert_eq!(bytes.len(), self.slice_words() * 8, "a slice of another length");
        let mut state = self.lock();
        let tag = &self.tags.words()[slice as usize];
        if tag.load(Ordering::Relaxed) != 0 {
            return Ok(());
        }
        let slot = self.make_room(&mut state)?;
        state.slots[slot] = Slot { slice, dirty: false };
        let base = slot * self.slice_words();
        let words = &self.arena.words()[base..base + self.slice_words()];
        for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)) {
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            word.store(u64::from_be_bytes(value), Ordering::Release);
        }
        // Not used yet: a scan through the disk does not drive out what is used again and again.
        self.used.words()[slot].store(0, Ordering::Relaxed);
        tag.store(next_tag(&mut state, slot), Ordering::Release);
        Ok(())
    }

    /// A slot that no tag points to any more.
    fn make_room(&self, state: &mut State) -> Result<usize, CacheFull> {
        if state.slots.len() < self.shape.slots as usize {
            state.slots.push(Slot { slice: u64::MAX, dirty: false });
            return Ok(state.slots.len() - 1);
        }
        // Two rounds of the clock: one may only clear the marks of use. Readers that set them again meanwhile cannot
        // keep the hand from the first clean slot for ever.
        let all = state.slots.len();
        let mut clean = None;
        for _ in 0..2 * all {
            let slot = state.hand;
            state.hand = (slot + 1) % all;
            if state.slots[slot].dirty {
                continue;
            }
            clean = Some(slot);
            if self.used.words()[slot].swap(0, Ordering::Relaxed) == 0 {
                break;
            }
        }
        let slot = clean.ok_or(CacheFull)?;
        let old = state.slots[slot].slice;
        if let Some(tag) = self.tags.words().get(old as usize) {
            tag.store(0, Ordering::Release);
        }
        Ok(slot)
    }

    /// Changes an entry of a cached slice and marks the slice dirty. Whether the slice was cached; if not, nothing
    /// has happened.
    ///
    /// Readers see the old entry, the new one, or a miss.
    pub fn store(&self, slice: u64, index: u32, entry: L2Entry) -> bool {
        let mut state = self.lock();
        let tag = &self.tags.words()[slice as usize];
        let now = tag.load(Ordering::Relaxed);
        if now == 0 {
            return false;
        }
        let slot = (now & SLOT_MASK) as usize - 1;
        state.slots[slot].dirty = true;
        let at = slot * self.slice_words() + index as usize * self.shape.entry_words as usize;
        let words = self.arena.words();
        if self.shape.entry_words == 1 {
            words[at].store(entry.word, Ordering::Release);
            return true;
        }
        tag.store(0, Ordering::Release);
        words[at].store(entry.word, Ordering::Release);
        words[at + 1].store(entry.bitmap, Ordering::Release);
        tag.store(next_tag(&mut state, slot), Ordering::Release);
        true
    }

    /// A copy of a cached slice as it is written to disk; the slice is clean from then on. `None` if it is not cached.
    /// Who fails to write it calls [`SliceCache::mark_dirty`].
    pub fn take_dirty(&self, slice: u64) -> Option<Vec<u8>> {
        let mut state = self.lock();
        let slot = self.slot(slice)?;
        state.slots[slot].dirty = false;
        let base = slot * self.slice_words();
        let words = &self.arena.words()[base..base + self.slice_words()];
        Some(words.iter().flat_map(|w| w.load(Ordering::Relaxed).to_be_bytes()).collect())
    }

    /// Marks a cached slice as not written back.
    pub fn mark_dirty(&self, slice: u64) {
        let mut state = self.lock();
        if let Some(slot) = self.slot(slice) {
            state.slots[slot].dirty = true;
        }
    }

    /// The slices that must be written back.
    pub fn dirty(&self) -> Vec<u64> {
        self.lock().slots.iter().filter(|s| s.dirty).map(|s| s.slice).collect()
    }

    fn slot(&self, slice: u64) -> Option<usize> {
        let tag = self.tags.words()[slice as usize].load(Ordering::Relaxed);
        (tag != 0).then(|| (tag & SLOT_MASK) as usize - 1)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }
}

fn next_tag(state: &mut State, slot: usize) -> u64 {
    state.generation += 1;
    state.generation << SLOT_BITS | (slot as u64 + 1)
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
