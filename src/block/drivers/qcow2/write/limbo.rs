//! Clusters that no entry in memory refers to any more, on their way to be free.
//!
//! A cluster taken out of an entry may not be used again before two things have happened:
//! * the entry without it is on disk, or a power cut would bring the old entry back, over somebody else's data;
//! * every request that looked the cluster up before has ended, or it would read, or write, somebody else's data.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use super::mutation::{Mutation, broken};
use crate::rt::grace::{Domain, Tag};

/// One reference to a host cluster that is to be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freed {
    /// The host cluster.
    pub cluster: u64,
    /// The file may forget its content before the cluster is used again (`pass-discard-*`).
    pub discard: bool,
    /// It was (a part of) a table of ours. An entry for data says nothing of tables: in a broken image it may lead to one.
    pub table: bool,
}

/// The clusters, and how far their way is.
#[derive(Default)]
pub struct Limbo {
    /// With the flush that takes the entry without it to disk, and the time after which nobody uses it.
    waiting: VecDeque<(u64, Tag, Freed)>,
    /// Was never in an entry (a write that failed), or has waited long enough but could not be released yet.
    ready: Vec<Freed>,
    /// The number of the next flush.
    generation: u64,
    /// Everything up to this flush is on disk.
    settled: Option<u64>,
}

impl Limbo {
    /// A reference that an entry in memory has just lost; `tag` was taken after that.
    pub fn push(&mut self, freed: Freed, tag: Tag) {
        let early = u64::from(broken(Mutation::FreedByRunningFlush));
        self.waiting.push_back((self.generation.saturating_sub(early), tag, freed));
    }

    /// References that nobody has ever seen, or whose wait is over.
    pub fn push_ready(&mut self, freed: impl IntoIterator<Item = Freed>) {
        self.ready.extend(freed);
    }

    /// A flush takes its copies now; what is pushed later belongs to the next one. Answers its number.
    pub fn begin_flush(&mut self) -> u64 {
        self.generation += 1;
        self.generation - 1
    }

    /// The flush of that number has succeeded.
    pub fn settle(&mut self, flush: u64) {
        self.settled = Some(flush);
    }

    /// Takes out what may be used again.
    pub fn take(&mut self, grace: &Domain) -> Vec<Freed> {
        let mut taken = std::mem::take(&mut self.ready);
        while let Some((flush, tag, freed)) = self.waiting.front() {
            let on_disk =
                self.settled.is_some_and(|s| *flush <= s) || broken(Mutation::ReuseBeforeFlush);
            let unused = broken(Mutation::ReuseInUse) || grace.passed(*tag);
            if !on_disk || !unused {
                break;
            }
            taken.push(*freed);
            self.waiting.pop_front();
        }
        taken
    }

    /// How many are on their way.
    pub fn len(&self) -> usize {
        self.waiting.len() + self.ready.len()
    }

    /// Whether anything is on its way.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.ready.is_empty()
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::rt::grace;

    fn freed(cluster: u64) -> Freed {
        Freed { cluster, discard: false, table: false }
    }

    fn taken(limbo: &mut Limbo, grace: &Domain) -> Vec<u64> {
        limbo.take(grace).iter().map(|f| f.cluster).collect()
    }

    #[test]
    fn a_flush_settles_what_was_freed_before_it() {
        let (mut limbo, grace) = (Limbo::default(), Domain::default());
        limbo.push(freed(1), grace.tag());
        assert!(taken(&mut limbo, &grace).is_empty());
        let first = limbo.begin_flush();
        limbo.push(freed(2), grace.tag());
        assert!(taken(&mut limbo, &grace).is_empty());
        limbo.settle(first);
        assert_eq!(taken(&mut limbo, &grace), [1]);
        assert_eq!((limbo.len(), limbo.is_empty()), (1, false));
        let second = limbo.begin_flush();
        limbo.settle(second);
        assert_eq!(taken(&mut limbo, &grace), [2]);
        assert!(limbo.is_empty());
    }

    #[test]
    fn a_flush_that_fails_settles_nothing_and_the_next_one_all() {
        let (mut limbo, grace) = (Limbo::default(), Domain::default());
        for n in 1..=3 {
            limbo.push(freed(n), grace.tag());
            let _fails = limbo.begin_flush();
            assert!(taken(&mut limbo, &grace).is_empty());
        }
        limbo.push(freed(4), grace.tag());
        let good = limbo.begin_flush();
        limbo.push(freed(5), grace.tag());
        limbo.settle(good);
        assert_eq!(taken(&mut limbo, &grace), [1, 2, 3, 4]);
        let _fails = limbo.begin_flush();
        assert!(taken(&mut limbo, &grace).is_empty());
        assert_eq!(limbo.len(), 1);
    }

    #[test]
    fn a_request_under_way_holds_what_it_may_have_found() {
        let (mut limbo, grace) = (Limbo::default(), Arc::new(Domain::default()));
        let early = grace::enter(&grace);
        limbo.push(freed(1), grace.tag());
        let flush = limbo.begin_flush();
        limbo.settle(flush);
        assert!(taken(&mut limbo, &grace).is_empty());
        let late = grace::enter(&grace);
        limbo.push(freed(2), grace.tag());
        let flush = limbo.begin_flush();
        limbo.settle(flush);
        limbo.push_ready([freed(3)]);
        // What nobody has ever seen waits for nobody.
        assert_eq!(taken(&mut limbo, &grace), [3]);
        drop(early);
        drop(late);
        assert_eq!(taken(&mut limbo, &grace), [1, 2]);
    }
}
