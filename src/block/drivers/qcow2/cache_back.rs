//! What goes out of the cache other than by eviction: dirty slices to the disk, and memory back to the machine.
#![forbid(unsafe_code)]

use super::{NO_SLICE, Ordering, SliceCache, SliceCopy, Slot};

/// How many slots [`SliceCache::clean`] looks at with the lock held: some 20 us of zeroing in all.
const CLEAN_STEP: usize = 64;

impl SliceCache {
    /// Copies of all dirty slices, in order. They are no longer dirty but being written, until
    /// [`SliceCache::written`] is called with the same copies. One snapshot at a time.
    pub fn snapshot(&self) -> Vec<SliceCopy> {
        let mut state = self.lock();
        let mut copies = Vec::with_capacity(state.dirty);
        for at in 0..state.slots.len() {
            let Slot { slice, dirty, writing, .. } = state.slots[at];
            if !dirty {
                continue;
            }
            assert!(!writing, "one snapshot at a time");
            state.mark(at, false, true);
            let words = self.words(at).iter();
            let bytes = words.flat_map(|w| w.load(Ordering::Relaxed).to_be_bytes()).collect();
            copies.push(SliceCopy { slice, bytes });
        }
        copies.sort_unstable_by_key(|copy| copy.slice);
        copies
    }

    /// The slices of a snapshot are on disk; or not, if not `ok`: then they are dirty again.
    pub fn written(&self, copies: &[SliceCopy], ok: bool) {
        let mut state = self.lock();
        for copy in copies {
            let slot = self.slot(copy.slice).expect("what is being written is not evicted");
            let dirty = state.slots[slot].dirty || !ok;
            state.mark(slot, dirty, false);
        }
    }

    /// Whether a snapshot would have something to write.
    pub fn has_dirty(&self) -> bool {
        self.lock().dirty > 0
    }

    #[cfg(test)]
    /// The number of slots that cannot make room: dirty, or being written.
    pub fn dirty_count(&self) -> usize {
        self.lock().staying
    }

    /// Gives the memory of clean slices back that were not used since the last call (`cache-clean-interval`).
    pub fn clean(&self) {
        let all = self.lock().slots.len();
        for first in (0..all).step_by(CLEAN_STEP) {
            self.clean_some(first, (first + CLEAN_STEP).min(all));
        }
    }

    fn clean_some(&self, first: usize, end: usize) {
        let mut guard = self.lock();
        let state = &mut *guard;
        for at in first..end {
            let slot = &mut state.slots[at];
            let used = self.used.words()[at].swap(0, Ordering::Relaxed) != 0;
            let recent = std::mem::take(&mut slot.recent);
            if used || recent || slot.must_stay() || slot.slice == NO_SLICE {
                continue;
            }
            if let Some(tag) = self.tag(slot.slice) {
                tag.store(0, Ordering::Release);
            }
            slot.slice = NO_SLICE;
            state.free.push(at);
            // As a fill would: then giving the memory back changes no word.
            for word in self.words(at) {
                word.store(0, Ordering::Release);
            }
        }
        // Only whole pages can be given back: neighbours together.
        let mut at = first;
        while at < end {
            let free =
                state.slots[at..end].iter().take_while(|slot| slot.slice == NO_SLICE).count();
            self.arena.release(at * self.slice_words(), free * self.slice_words());
            at += free + 1;
        }
    }
}
