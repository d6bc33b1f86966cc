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
//! slice that somebody else is reading waits for that ([`Flights`](super::flight::Flights)).
//!
//! # Writing back
//!
//! A slot is *dirty* from a store to the next [`SliceCache::snapshot`], and *writing* from there to
//! [`SliceCache::written`]. In either state it is not evicted, so that nobody reads the slice from a disk that does not
//! have it yet. A store while a slot is being written makes it dirty as well: the copy under way is of the past.
#![forbid(unsafe_code)]

#[cfg(not(loom))]
use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

#[cfg(loom)]
use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU64, Ordering},
};

#[path = "cache_back.rs"]
mod back;

use super::arena::Arena;
use super::layout::L2Entry;
use crate::error::Errno;

/// A tag's low bits: the slot's number plus 1. 16 Mi slots are 64 GiB of 4 KiB slices.
const SLOT_BITS: u32 = 24;
const SLOT_MASK: u64 = (1 << SLOT_BITS) - 1;

/// The shape of a [`SliceCache`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How many slices the virtual disk may ever have. Those that it does not have yet cost address space only.
    pub slices: u64,
    /// Entries per slice, a power of two.
    pub entries: u32,
    /// Words per entry: 1, or 2 with extended L2 entries.
    pub entry_words: u32,
    /// The most slices cached, at least 1.
    pub slots: u32,
}

impl Shape {
    /// The length of a slice in bytes.
    pub fn slice_bytes(&self) -> u64 {
        u64::from(self.entries) * u64::from(self.entry_words) * 8
    }
}

/// Which slice a slot holds, and whether it may be evicted.
struct Slot {
    /// [`NO_SLICE`]: the slot is free.
    slice: u64,
    /// Changed since the last snapshot.
    dirty: bool,
    /// In a snapshot that is being written.
    writing: bool,
    /// It was filled or used since the last [`SliceCache::clean`], as far as the clock's hand and stores know.
    recent: bool,
}

/// No slice has this number.
const NO_SLICE: u64 = u64::MAX;
#[derive(Default)]
struct State {
    /// Slots that were ever used, from the arena's start on.
    slots: Vec<Slot>,
    /// Those of them that hold nothing.
    free: Vec<usize>,
    /// How many slots are dirty.
    dirty: usize,
    /// How many slots are dirty or being written.
    staying: usize,
    hand: usize,
    generation: u64,
}

/// All slots hold slices that must be written back before they can make room; or no slice can have this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheFull;

/// A slice as it shall be on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SliceCopy {
    /// Its number.
    pub slice: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

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

    /// Memory in use, in bytes.
    pub fn bytes_used(&self) -> u64 {
        let state = self.lock();
        (state.slots.len() - state.free.len()) as u64 * self.slice_words() as u64 * 8
    }

    fn slice_words(&self) -> usize {
        self.shape.entries as usize * self.shape.entry_words as usize
    }

    /// The slice's tag; `None` beyond the shape.
    #[inline]
    fn tag(&self, slice: u64) -> Option<&AtomicU64> {
        usize::try_from(slice).ok().and_then(|slice| self.tags.words().get(slice))
    }

    /// The entry at `index` of `slice`, if the slice is cached. Takes no lock, allocates nothing.
    ///
    /// May miss a slice that is being changed at this moment: who would go to the disk then asks
    /// [`SliceCache::get_surely`] first.
    ///
    /// # Panics
    /// If `index` is outside of the shape.
    #[inline]
    pub fn get(&self, slice: u64, index: u32) -> Option<L2Entry> {
        let tag = self.tag(slice)?;
        let first = tag.load(Ordering::Acquire);
        if first == 0 {
            return None;
        }
        let slot = (first & SLOT_MASK) as usize - 1;
        let at = self.word_of(slot, index);
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

    /// The entry at `index` of the slice will soon be asked for.
    pub fn prefetch(&self, slice: u64, index: u32) {
        let slot = self.tag(slice).map_or(0, |tag| tag.load(Ordering::Relaxed) & SLOT_MASK);
        if let Some(slot) = (slot as usize).checked_sub(1) {
            self.arena.prefetch(self.word_of(slot, index));
        }
    }

    /// As [`SliceCache::get`], but waits for stores: `None` says that the slice is not cached.
    pub fn get_surely(&self, slice: u64, index: u32) -> Option<L2Entry> {
        let _no_stores = self.lock();
        self.get(slice, index)
    }

    /// Where an entry is in the arena.
    #[inline]
    fn word_of(&self, slot: usize, index: u32) -> usize {
        slot * self.slice_words() + index as usize * self.shape.entry_words as usize
    }

    /// The words of a slot.
    fn words(&self, slot: usize) -> &[AtomicU64] {
        &self.arena.words()[slot * self.slice_words()..][..self.slice_words()]
    }

    /// Puts a slice just read into a slot: `bytes` as on disk. Does nothing if it is cached already.
    ///
    /// The caller sees to it that the bytes are not older than what the cache held last ([`Flights`], and that a
    /// dirty slice is not evicted).
    ///
    /// # Errors
    /// No slot can be evicted, or the slice is beyond the shape.
    ///
    /// # Panics
    /// If `bytes` has another length than a slice.
    pub fn fill(&self, slice: u64, bytes: &[u8]) -> Result<(), CacheFull> {
        assert_eq!(bytes.len(), self.slice_words() * 8, "a slice of another length");
        let mut state = self.lock();
        let tag = self.tag(slice).ok_or(CacheFull)?;
        if tag.load(Ordering::Relaxed) != 0 {
            return Ok(());
        }
        let slot = self.make_room(&mut state)?;
        state.slots[slot] = Slot::of(slice);
        for (word, bytes) in self.words(slot).iter().zip(bytes.chunks_exact(8)) {
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
        if let Some(slot) = state.free.pop() {
            return Ok(slot);
        }
        if state.slots.len() < self.shape.slots as usize {
            state.slots.push(Slot::of(NO_SLICE));
            return Ok(state.slots.len() - 1);
        }
        // Two rounds of the clock: one may only clear the marks of use. Readers that set them again meanwhile cannot
        // keep the hand from the first clean slot for ever.
        let all = state.slots.len();
        let mut clean = None;
        for _ in 0..2 * all {
            let slot = state.hand;
            state.hand = (slot + 1) % all;
            if state.slots[slot].must_stay() {
                continue;
            }
            clean = Some(slot);
            if self.used.words()[slot].swap(0, Ordering::Relaxed) == 0 {
                break;
            }
            state.slots[slot].recent = true;
        }
        let slot = clean.ok_or(CacheFull)?;
        if let Some(tag) = self.tag(state.slots[slot].slice) {
            tag.store(0, Ordering::Release);
        }
        Ok(slot)
    }

    /// Changes the run of entries of a cached slice that starts at `index`, and marks the slice dirty (an empty run does
    /// just that). Whether the slice was cached; if not, nothing has happened.
    ///
    /// Readers see of each entry the old one, the new one, or a miss.
    ///
    /// # Panics
    /// If the run goes over the slice's end.
    pub fn store(&self, slice: u64, index: u32, entries: &[L2Entry]) -> bool {
        self.store_logged(slice, index, entries, |_| {})
    }

    /// As [`SliceCache::store`]; `log` gets the words that will change before anybody sees that: their index in the slice, the
    /// old word, the new one.
    pub fn store_logged(
        &self,
        slice: u64,
        index: u32,
        entries: &[L2Entry],
        log: impl FnOnce(&mut dyn Iterator<Item = (u64, u64, u64)>),
    ) -> bool {
        let mut state = self.lock();
        let Some(slot) = self.slot(slice) else { return false };
        let Some(tag) = self.tag(slice) else { return false };
        let (first, size) = (index as usize, self.shape.entry_words as usize);
        let words = &self.words(slot)[first * size..(first + entries.len()) * size];
        let new = entries.iter().flat_map(|e| [e.word, e.bitmap].into_iter().take(size));
        let old = words.iter().map(|word| word.load(Ordering::Relaxed));
        let all =
            ((first * size) as u64..).zip(old.zip(new)).map(|(at, (old, new))| (at, old, new));
        log(&mut all.filter(|(_, old, new)| old != new));
        let writing = state.slots[slot].writing;
        state.mark(slot, true, writing);
        state.slots[slot].recent = true;
        if size == 1 {
            for (word, entry) in words.iter().zip(entries) {
                word.store(entry.word, Ordering::Release);
            }
            return true;
        }
        tag.store(0, Ordering::Release);
        for (words, entry) in words.chunks_exact(2).zip(entries) {
            words[0].store(entry.word, Ordering::Release);
            words[1].store(entry.bitmap, Ordering::Release);
        }
        tag.store(next_tag(&mut state, slot), Ordering::Release);
        true
    }

    /// The slot of a cached slice; for holders of the lock.
    fn slot(&self, slice: u64) -> Option<usize> {
        let tag = self.tag(slice)?.load(Ordering::Relaxed);
        (tag != 0).then(|| (tag & SLOT_MASK) as usize - 1)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }
}

impl Slot {
    /// Filled just now.
    fn of(slice: u64) -> Slot {
        Slot { slice, dirty: false, writing: false, recent: true }
    }

    /// Whether the disk does not have this slice yet.
    fn must_stay(&self) -> bool {
        self.dirty || self.writing
    }
}

impl State {
    /// Changes what is to be done about a slot.
    fn mark(&mut self, slot: usize, dirty: bool, writing: bool) {
        let slot = &mut self.slots[slot];
        self.dirty -= usize::from(slot.dirty);
        self.staying -= usize::from(slot.must_stay());
        (slot.dirty, slot.writing) = (dirty, writing);
        self.dirty += usize::from(slot.dirty);
        self.staying += usize::from(slot.must_stay());
    }
}

fn next_tag(state: &mut State, slot: usize) -> u64 {
    state.generation += 1;
    state.generation << SLOT_BITS | (slot as u64 + 1)
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
