//! What is known about free space without looking at refcounts: how much each region may have, and what is set aside.
//!
//! A *region* is what one refcount block describes.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

/// How long the longest free run of each region can be at most.
///
/// A search that fails in a region notes what it found there, and does not come back before something was freed there.
#[derive(Debug, Default)]
pub struct Rooms {
    /// The bit length of the number: 0: nothing is free; [`Rooms::UNKNOWN`] also for what is beyond the end.
    bounds: Vec<u8>,
    /// All regions before this one are full.
    lowest: u64,
}

impl Rooms {
    const UNKNOWN: u8 = u8::MAX;

    /// The first region from `from` on that may have `least` free clusters together.
    pub fn next(&self, from: u64, least: u64) -> u64 {
        let from = from.max(self.lowest);
        let skipped = usize::try_from(from).ok().and_then(|from| self.bounds.get(from..));
        let small = |bound: &&u8| **bound < bit_length(least);
        from + skipped.map_or(0, |rest| rest.iter().take_while(small).count() as u64)
    }

    pub fn is_full(&self, region: u64) -> bool {
        region < self.lowest || self.bounds.get(region as usize) == Some(&0)
    }

    /// The longest free run is of `longest` clusters.
    pub fn note(&mut self, region: u64, longest: u64) {
        let at = region as usize;
        if self.bounds.len() <= at {
            self.bounds.resize(at + 1, Self::UNKNOWN);
        }
        self.bounds[at] = bit_length(longest);
        self.lowest = self.next(self.lowest, 1);
    }

    /// Something became free.
    pub fn freed(&mut self, region: u64) {
        if let Some(bound) = self.bounds.get_mut(region as usize) {
            *bound = Self::UNKNOWN;
        }
        self.lowest = self.lowest.min(region);
    }
}

fn bit_length(n: u64) -> u8 {
    (u64::BITS - n.leading_zeros()) as u8
}

/// Runs of clusters that are set aside: no two overlap. First cluster, count.
#[derive(Debug, Default)]
pub struct Reserved(BTreeMap<u64, u64>);

impl Reserved {
    pub fn insert(&mut self, first: u64, count: u64) {
        self.0.insert(first, count);
    }

    /// The end of the run that `cluster` is in.
    pub fn end_of(&self, cluster: u64) -> Option<u64> {
        let (first, count) = self.0.range(..=cluster).next_back()?;
        (cluster - first < *count).then_some(first + count)
    }

    /// Where the next run after `cluster` begins.
    pub fn next(&self, cluster: u64) -> Option<u64> {
        self.0.range(cluster + 1..).next().map(|(first, _)| *first)
    }

    /// Takes the clusters from `first` to `end` out; calls `removed` with each part that was in (first, end).
    pub fn remove(&mut self, first: u64, end: u64, mut removed: impl FnMut(u64, u64)) {
        let before = self.0.range(..first).next_back().filter(|(at, n)| **at + **n > first);
        let parts = before.into_iter().chain(self.0.range(first..end));
        let parts: Vec<(u64, u64)> = parts.map(|(at, count)| (*at, *count)).collect();
        for (at, count) in parts {
            let stop = at + count;
            self.0.remove(&at);
            if at < first {
                self.0.insert(at, first - at);
            }
            if stop > end {
                self.0.insert(end, stop - end);
            }
            removed(at.max(first), stop.min(end));
        }
    }
}
