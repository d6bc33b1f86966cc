//! Guest clusters whose entries somebody is about to change. Others who want to change them wait; readers do not.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::task::Waker;

use super::mutation::{Mutation, broken};

/// Disjoint ranges of guest clusters, and who waits for each.
#[derive(Default)]
pub struct Busy {
    /// By first cluster.
    ranges: BTreeMap<u64, Range>,
}

struct Range {
    end: u64,
    waiting: Vec<Waker>,
}

impl Busy {
    /// How many of the `count` clusters from `first` on are not busy, up to the first that is.
    pub fn free(&self, first: u64, count: u64) -> u64 {
        let last_before = self.ranges.range(..first + count).next_back();
        let Some((_, Range { end, .. })) = last_before else { return count };
        if *end <= first {
            return count;
        }
        // Something is in the way: the first such range decides.
        let inside = self.ranges.range(..=first).next_back();
        if inside.is_some_and(|(_, r)| r.end > first) {
            return 0;
        }
        let next = self.ranges.range(first..).next();
        next.map_or(count, |(start, _)| (start - first).min(count))
    }

    /// Wakes `waker` when the range that `cluster` is in ends.
    pub fn wait(&mut self, cluster: u64, waker: &Waker) {
        if let Some((_, range)) = self.ranges.range_mut(..=cluster).next_back()
            && !range.waiting.iter().any(|w| w.will_wake(waker))
        {
            range.waiting.push(waker.clone());
        }
    }

    /// Makes clusters busy that are [free](Busy::free).
    pub fn begin(&mut self, first: u64, count: u64) {
        let old = self.ranges.insert(first, Range { end: first + count, waiting: Vec::new() });
        debug_assert!(old.is_none() || broken(Mutation::IgnoreBusy), "a busy range begun twice");
    }

    /// Ends the range that begins at `first`; who waited is to be woken, outside of the lock.
    #[must_use]
    pub fn end(&mut self, first: u64) -> Vec<Waker> {
        self.ranges.remove(&first).map_or_else(Vec::new, |range| range.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_free() {
        let mut busy = Busy::default();
        assert_eq!(busy.free(0, 10), 10);
        busy.begin(4, 2);
        busy.begin(8, 1);
        assert_eq!([busy.free(0, 10), busy.free(0, 4), busy.free(3, 1)], [4, 4, 1]);
        assert_eq!([busy.free(4, 1), busy.free(5, 9), busy.free(8, 1)], [0, 0, 0]);
        assert_eq!([busy.free(6, 9), busy.free(6, 2), busy.free(9, 5)], [2, 2, 5]);
        assert!(busy.end(4).is_empty());
        assert_eq!([busy.free(0, 10), busy.free(5, 1)], [8, 1]);
    }
}
