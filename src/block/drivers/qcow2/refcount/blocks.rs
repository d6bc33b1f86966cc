//! Refcount blocks in memory: slots of one arena, and a side table that says what each slot holds.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use super::super::arena::Arena;
use super::super::header::MAX_REFTABLE_SIZE;
use super::super::layout::{Geometry, HostOffset};
use super::fields::Fields;
use super::{Blocked, Pieces};
use crate::error::Errno;

/// What is written at a time, in bytes: a change of one refcount does not cost a write of a whole block.
const PIECE: usize = 4096;

struct Slot {
    index: u64,
    offset: HostOffset,
    /// Pieces that are not in a snapshot yet.
    dirty: Pieces,
    /// A copy is being written: if that fails, these words are needed again.
    writing: bool,
    /// Used since the clock's hand passed.
    used: bool,
    /// No refcount before this one belongs to a cluster that can be had.
    first_free: usize,
}

impl Slot {
    fn is_clean(&self) -> bool {
        !self.writing && self.dirty.is_empty()
    }
}

/// The number of a slot. It is good until the next block comes into the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At(usize);

/// The cache of refcount blocks.
pub struct Blocks {
    fields: Fields,
    entries: usize,
    block_words: usize,
    arena: Arena,
    slots: Vec<Slot>,
    by_index: HashMap<u64, usize>,
    /// The most slots in use as long as the table does not grow.
    most: usize,
    /// The most slots ever: a larger table brings blocks with it that cannot be written before it.
    capacity: usize,
    hand: usize,
    /// How many slots are dirty.
    dirty: usize,
}

impl Blocks {
    pub fn new(g: &Geometry, most: usize) -> Result<Blocks, Errno> {
        let enomem = || Errno(libc::ENOMEM);
        let most = most.max(1);
        let table = MAX_REFTABLE_SIZE >> g.cluster_bits;
        let spare =
            usize::try_from(table / (g.refblock_entries() - 1) + 2).map_err(|_| enomem())?;
        let capacity = most.checked_add(spare).ok_or_else(enomem)?;
        let block_words = 1 << (g.cluster_bits - 3);
        Ok(Blocks {
            fields: Fields::new(g.refcount_order),
            entries: 1 << g.refblock_bits(),
            block_words,
            arena: Arena::new(block_words.checked_mul(capacity).ok_or_else(enomem)?)?,
            slots: Vec::new(),
            by_index: HashMap::new(),
            most,
            capacity,
            hand: 0,
            dirty: 0,
        })
    }

    pub fn memory(&self) -> u64 {
        (self.slots.len() * self.block_words * 8) as u64
    }

    pub fn is_dirty(&self) -> bool {
        self.dirty > 0
    }

    pub fn find(&mut self, index: u64) -> Option<At> {
        let slot = *self.by_index.get(&index)?;
        self.slots[slot].used = true;
        Some(At(slot))
    }

    /// Whether `more` new blocks find a place, those slots included that are kept for a new table.
    pub fn can_take(&self, more: u64) -> bool {
        let clean = self.slots.iter().filter(|slot| slot.is_clean()).count();
        (self.capacity - self.slots.len() + clean) as u64 >= more
    }

    /// A block as it is on disk. The caller knows that it is not cached.
    pub fn load(&mut self, index: u64, offset: HostOffset, bytes: &[u8]) -> Result<(), Blocked> {
        assert_eq!(bytes.len(), self.block_words * 8, "a block of another length");
        let slot = self.make_room(self.most)?;
        let words = &self.arena.words()[slot * self.block_words..][..self.block_words];
        for (word, bytes) in words.iter().zip(bytes.chunks_exact(8)) {
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            word.store(u64::from_be_bytes(value), Ordering::Release);
        }
        self.fill(slot, index, offset);
        Ok(())
    }

    /// A new block of zeroes. It is dirty as a whole unless its cluster reads as zeroes (`fresh`).
    pub fn make(
        &mut self,
        index: u64,
        offset: HostOffset,
        fresh: bool,
        for_table: bool,
    ) -> Result<At, Blocked> {
        let slot = self.make_room(if for_table { self.capacity } else { self.most })?;
        let words = &self.arena.words()[slot * self.block_words..][..self.block_words];
        words.iter().for_each(|word| word.store(0, Ordering::Release));
        self.fill(slot, index, offset);
        if !fresh {
            self.slots[slot].dirty = Pieces::first((self.block_words * 8).div_ceil(PIECE));
            self.dirty += 1;
        }
        Ok(At(slot))
    }

    fn fill(&mut self, slot: usize, index: u64, offset: HostOffset) {
        let dirty = Pieces::default();
        let new = Slot { index, offset, dirty, writing: false, used: true, first_free: 0 };
        match self.slots.get_mut(slot) {
            Some(old) => {
                self.by_index.remove(&old.index);
                *old = new;
            }
            None => self.slots.push(new),
        }
        self.by_index.insert(index, slot);
    }

    /// A slot that may be overwritten; it may be one past the last.
    fn make_room(&mut self, limit: usize) -> Result<usize, Blocked> {
        let all = self.slots.len();
        if all < self.most {
            return Ok(all);
        }
        // Two rounds of the clock: one may only clear the marks of use.
        for _ in 0..2 * all {
            let slot = self.hand;
            self.hand = (slot + 1) % all;
            if !self.slots[slot].is_clean() {
                continue;
            }
            if !std::mem::take(&mut self.slots[slot].used) {
                return Ok(slot);
            }
        }
        if all < limit { Ok(all) } else { Err(Blocked::CacheFull) }
    }

    fn word(&self, at: At, word: usize) -> u64 {
        self.arena.words()[at.0 * self.block_words + word].load(Ordering::Relaxed)
    }

    pub fn get(&self, at: At, entry: usize) -> u64 {
        let (word, shift) = self.fields.place(entry);
        self.fields.get(self.word(at, word), shift)
    }

    pub fn set(&mut self, at: At, entry: usize, value: u64) {
        let (word, shift) = self.fields.place(entry);
        let new = self.fields.with(self.word(at, word), shift, value);
        self.arena.words()[at.0 * self.block_words + word].store(new, Ordering::Release);
        let slot = &mut self.slots[at.0];
        self.dirty += usize::from(slot.dirty.is_empty());
        slot.dirty.insert(word * 8 / PIECE);
    }

    /// The first entry of 0 from `from` on, before `end`.
    pub fn next_zero(&self, at: At, from: usize, end: usize) -> Option<usize> {
        let mut entry = from;
        while entry < end {
            let (word, shift) = self.fields.place(entry);
            let value = self.word(at, word);
            if self.fields.get(value, shift) == 0 {
                return Some(entry);
            }
            let per_word = self.fields.per_word();
            entry += 1;
            if !self.fields.any_zero(value) {
                entry = entry.next_multiple_of(per_word);
            }
        }
        None
    }

    /// How many entries from `from` on, before `end`, are 0 without a gap.
    pub fn zeroes(&self, at: At, from: usize, end: usize) -> usize {
        let per_word = self.fields.per_word();
        let mut entry = from;
        while entry < end {
            let (word, shift) = self.fields.place(entry);
            let value = self.word(at, word);
            if self.fields.get(value, shift) != 0 {
                break;
            }
            entry += if value == 0 { per_word - entry % per_word } else { 1 };
        }
        entry.min(end).saturating_sub(from)
    }

    pub fn first_free(&self, at: At) -> usize {
        self.slots[at.0].first_free
    }

    pub fn set_first_free(&mut self, at: At, entry: usize) {
        self.slots[at.0].first_free = entry.min(self.entries);
    }

    /// An entry can be had again.
    pub fn lower_first_free(&mut self, index: u64, entry: usize) {
        if let Some(slot) = self.by_index.get(&index) {
            let first = &mut self.slots[*slot].first_free;
            *first = entry.min(*first);
        }
    }

    /// Copies of all dirty pieces in the order of the file, neighbours merged; and which they were, by block.
    #[allow(clippy::type_complexity, reason = "taken apart at once")]
    pub fn snapshot(&mut self) -> (Vec<(HostOffset, Vec<u8>)>, Vec<(u64, Pieces)>) {
        let mut dirty: Vec<usize> =
            (0..self.slots.len()).filter(|slot| !self.slots[*slot].dirty.is_empty()).collect();
        dirty.sort_unstable_by_key(|slot| self.slots[*slot].offset);
        let (mut copies, mut taken) = (Vec::new(), Vec::with_capacity(dirty.len()));
        for slot in dirty {
            let words = &self.arena.words()[slot * self.block_words..][..self.block_words];
            let state = &mut self.slots[slot];
            state.writing = true;
            let pieces = std::mem::take(&mut state.dirty);
            for (n, words) in words.chunks(PIECE / 8).enumerate().filter(|(n, _)| pieces.has(*n)) {
                let offset = state.offset.plus((n * PIECE) as u64);
                append(&mut copies, offset, words.iter().map(|w| w.load(Ordering::Relaxed)));
            }
            taken.push((state.index, pieces));
        }
        self.dirty = 0;
        (copies, taken)
    }

    /// What was `taken` by the last snapshot is on disk (`ok`), or dirty again.
    pub fn written(&mut self, taken: &[(u64, Pieces)], ok: bool) {
        for (index, pieces) in taken {
            let slot = &mut self.slots[self.by_index[index]];
            slot.writing = false;
            if !ok {
                self.dirty += usize::from(slot.dirty.is_empty());
                slot.dirty.add(pieces);
            }
        }
    }
}

/// Adds `words` to the last copy if they continue it, else as a copy of its own.
pub fn append(
    copies: &mut Vec<(HostOffset, Vec<u8>)>,
    offset: HostOffset,
    words: impl ExactSizeIterator<Item = u64>,
) {
    let last = copies.last().map(|(at, bytes)| at.plus(bytes.len() as u64));
    if last != Some(offset) {
        copies.push((offset, Vec::new()));
    }
    let (_, bytes) = copies.last_mut().expect("it has one now");
    bytes.reserve(words.len() * 8);
    words.for_each(|word| bytes.extend_from_slice(&word.to_be_bytes()));
}
