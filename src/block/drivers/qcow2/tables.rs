//! Which host clusters hold metadata: a bit for each, asked before every write, without a lock.
//!
//! It is changed under the driver's `Meta` mutex. A reader may see a change a little later; that is enough, because it
//! looks for writes that go to metadata by mistake, and no cluster goes from data to metadata while requests that
//! started before can still write to it.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;

use super::arena::Arena;
use crate::error::Errno;

/// A bit per host cluster: set if the cluster holds metadata.
pub struct Tables {
    bits: Arena,
    clusters: u64,
}

impl Tables {
    /// No metadata in `clusters` clusters. Only those that are ever [added](Tables::add) cost memory.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(clusters: u64) -> Result<Tables, Errno> {
        let words = usize::try_from(clusters.div_ceil(64)).map_err(|_| Errno(libc::ENOMEM))?;
        Ok(Tables { bits: Arena::new(words)?, clusters })
    }

    /// These clusters hold metadata from now on. What is beyond the capacity is left out.
    pub fn add(&self, first: u64, count: u64) {
        self.each_word(first, count, |at, mask| {
            self.bits.words()[at].fetch_or(mask, Ordering::Release);
            true
        });
    }

    /// These clusters hold no metadata any more.
    pub fn remove(&self, first: u64, count: u64) {
        self.each_word(first, count, |at, mask| {
            self.bits.words()[at].fetch_and(!mask, Ordering::Release);
            true
        });
    }

    /// Whether any of the clusters holds metadata. Nothing is known of those beyond the capacity: see
    /// [`Tables::covers`].
    #[inline]
    pub fn holds(&self, first: u64, count: u64) -> bool {
        let words = self.bits.words();
        !self.each_word(first, count, |at, mask| words[at].load(Ordering::Acquire) & mask == 0)
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

    /// 64 KiB clusters of a file of 2^50 bytes: 2 GiB of address space, a few pages of memory.
    #[test]
    fn huge_files_cost_nothing() {
        let tables = Tables::new(1 << 34).unwrap();
        tables.add((1 << 34) - 1, 1);
        assert!(tables.holds((1 << 34) - 1, 1) && !tables.holds(1 << 33, 1 << 20));
    }
}
