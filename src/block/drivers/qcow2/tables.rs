//! Which host clusters hold metadata: a bit for each, asked before every write, without a lock.
//!
//! Metadata is thinly spread: an L2 table for each 8192 clusters, say. So there are blocks of bits, made where a bit is set
//! for the first time, and a directory of them: 0.4 MiB for 1 TiB of 64 KiB clusters, where plain bits took 2 MiB, and most
//! questions are answered by the directory.
//!
//! It is changed under the driver's `Meta` mutex. A reader may see a change a little later; that is enough, because it
//! looks for writes that go to metadata by mistake, and no cluster goes from data to metadata while requests that
//! started before can still write to it.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::arena::{Arena, AtomicU64};
use crate::error::Errno;

/// Words of a block: 1024 clusters.
const BLOCK: usize = 16;

/// A bit per host cluster: set if the cluster holds metadata.
pub struct Tables {
    /// By block: one more than the number of its words' place in `blocks`; 0: no metadata there.
    directory: Arena,
    /// In the order in which they were made. They stay.
    blocks: Arena,
    /// How many there are.
    made: AtomicU64,
    clusters: u64,
}

impl Tables {
    /// No metadata in `clusters` clusters. Only those that are ever [added](Tables::add) cost memory.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(clusters: u64) -> Result<Tables, Errno> {
        let words = usize::try_from(clusters.div_ceil(64)).map_err(|_| Errno(libc::ENOMEM))?;
        let count = words.div_ceil(BLOCK);
        let (directory, blocks) = (Arena::new(count)?, Arena::new(count * BLOCK)?);
        Ok(Tables { directory, blocks, made: AtomicU64::new(0), clusters })
    }

    /// These clusters hold metadata from now on. What is beyond the capacity is left out. One caller at a time.
    pub fn add(&self, first: u64, count: u64) {
        self.each_word(first, count, |at, mask| {
            let entry = &self.directory.words()[at / BLOCK];
            let known = entry.load(Ordering::Relaxed);
            let block =
                if known == 0 { self.made.fetch_add(1, Ordering::Relaxed) + 1 } else { known };
            self.word(block, at).fetch_or(mask, Ordering::Release);
            if known == 0 {
                entry.store(block, Ordering::Release);
            }
            true
        });
    }

    /// These clusters hold no metadata any more. One caller at a time.
    pub fn remove(&self, first: u64, count: u64) {
        self.each_word(first, count, |at, mask| {
            if let Some(word) = self.known(at) {
                word.fetch_and(!mask, Ordering::Release);
            }
            true
        });
    }

    /// Whether any of the clusters holds metadata. Nothing is known of those beyond the capacity: see
    /// [`Tables::covers`].
    #[inline]
    pub fn holds(&self, first: u64, count: u64) -> bool {
        !self.each_word(first, count, |at, mask| {
            self.known(at).is_none_or(|word| word.load(Ordering::Acquire) & mask == 0)
        })
    }

    /// Word `at` of all the bits, if its block has been made.
    #[inline]
    fn known(&self, at: usize) -> Option<&AtomicU64> {
        let block = self.directory.words()[at / BLOCK].load(Ordering::Acquire);
        (block != 0).then(|| self.word(block, at))
    }

    #[inline]
    fn word(&self, block: u64, at: usize) -> &AtomicU64 {
        &self.blocks.words()[(block as usize - 1) * BLOCK + at % BLOCK]
    }

    /// Whether all clusters before `end` are within the capacity.
    #[inline]
    pub fn covers(&self, end: u64) -> bool {
        end <= self.clusters
    }

    /// Calls `f` with each word that has bits of the range, and these bits, until it says no. Whether it never did.
    #[inline]
    fn each_word(&self, first: u64, count: u64, mut f: impl FnMut(usize, u64) -> bool) -> bool {
        let end = first.saturating_add(count).min(self.clusters);
        let mut at = first;
        while at < end {
            let bits = (64 - at % 64).min(end - at);
            let mask = u64::MAX >> (64 - bits) << (at % 64);
            if !f((at / 64) as usize, mask) {
                return false;
            }
            at += bits;
        }
        true
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn ranges_across_words() {
        let tables = Tables::new(1000).unwrap();
        assert!(!tables.holds(0, 1000));
        tables.add(60, 140);
        for n in 0..1000 {
            assert_eq!(tables.holds(n, 1), (60..200).contains(&n), "{n}");
        }
        assert!(tables.holds(0, 61) && !tables.holds(0, 60) && !tables.holds(200, 800));
        assert!(tables.holds(199, 1) && tables.holds(0, u64::MAX));
        tables.remove(64, 128);
        for n in 0..1000 {
            assert_eq!(tables.holds(n, 1), (60..64).contains(&n) || (192..200).contains(&n), "{n}");
        }
        assert!(!tables.holds(70, 0) && !tables.holds(60, 0), "no cluster holds nothing");
    }

    #[test]
    fn the_capacity_is_exact() {
        let tables = Tables::new(70).unwrap();
        assert!(tables.covers(70) && !tables.covers(71));
        tables.add(68, 100);
        assert!(tables.holds(69, 1) && tables.holds(69, u64::MAX));
        assert!(!tables.holds(70, 10), "unknown");
        assert!(!tables.holds(u64::MAX, 1));
        tables.add(u64::MAX, 1);
    }

    /// Bits here and there, in blocks that are made in any order, beside a plain set of them.
    #[test]
    fn thinly_spread_bits() {
        let (tables, mut set) = (Tables::new(1 << 20).unwrap(), std::collections::BTreeSet::new());
        let mut at = 12_345_u64;
        for n in 0..4000 {
            at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (first, count) = (at >> 44, 1 + (at & 3));
            if n % 3 == 0 {
                tables.remove(first, count);
                set.retain(|n| !(first..first + count).contains(n));
            } else {
                tables.add(first, count);
                set.extend((first..first + count).filter(|n| *n < 1 << 20));
            }
        }
        assert!((0..1 << 20).all(|n| tables.holds(n, 1) == set.contains(&n)));
        assert!((0..1 << 8).all(|n| {
            tables.holds(n << 12, 1 << 12) == set.range(n << 12..(n + 1) << 12).next().is_some()
        }));
    }

    /// 64 KiB clusters of a file of 2^50 bytes: 2 GiB of address space, a few pages of memory.
    #[test]
    fn huge_files_cost_nothing() {
        let tables = Tables::new(1 << 34).unwrap();
        tables.add((1 << 34) - 1, 1);
        assert!(tables.holds((1 << 34) - 1, 1) && !tables.holds(1 << 33, 1 << 20));
    }
}
