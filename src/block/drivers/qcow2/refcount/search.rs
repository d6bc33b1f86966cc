//! The search for free clusters, and the blocks and tables that it makes on its way.
#![forbid(unsafe_code)]

use super::blocks::At;
use super::{Blocked, Refcounts, Run};

impl Refcounts {
    /// The slot of block `index`; `None`: there is no such block, and all its refcounts are 0.
    pub(super) fn cached(&mut self, index: u64) -> Result<Option<At>, Blocked> {
        if let Some(slot) = self.blocks.find(index) {
            return Ok(Some(slot));
        }
        match self.table.entry(index).map_err(Blocked::Corrupt)? {
            None => Ok(None),
            Some(offset) => Err(Blocked::Load { index, offset }),
        }
    }

    /// The free clusters from `goal` on, at most `want`. `None`: it is not free, not known, or beyond the end.
    pub(super) fn find_at(&mut self, goal: u64, want: u64) -> Result<Option<(At, Run)>, Blocked> {
        let index = self.g.reftable_index(goal);
        let known = goal <= self.end && goal < self.limit && index < self.table.len();
        if !known || self.rooms.is_full(index) || self.reserved.end_of(goal).is_some() {
            return Ok(None);
        }
        let made = match self.cached(index) {
            // Else it could drive out the block that is found later, and that one this one, for ever.
            Err(Blocked::Load { .. }) => return Ok(None),
            cached => cached?.is_none(),
        };
        let slot = match self.block(index) {
            Err(Blocked::NoSpace) => return Ok(None),
            slot => slot?,
        };
        // The stream goes on behind a block that had to be made.
        let goal = if made && self.entry_of(goal) == 0 { goal + 1 } else { goal };
        let count = self.free_from(slot, goal, want);
        Ok((count > 0).then(|| (slot, self.run(goal, count))))
    }

    /// The lowest run of at least `least` free clusters, at most `want` of them. `least` is a power of two, as [`Rooms`]
    /// tells no finer apart: what fails in a region is not tried there again.
    ///
    /// [`Rooms`]: super::room::Rooms
    pub(super) fn find(&mut self, least: u64, want: u64) -> Result<(At, Run), Blocked> {
        assert!(least > 0 && want >= least, "nothing wanted");
        let mut index = self.rooms.next(0, least);
        while index << self.g.refblock_bits() < self.limit {
            let slot = self.block(index)?;
            let (first, count) = self.longest(slot, index, least, want);
            if count >= least {
                return Ok((slot, self.run(first, count)));
            }
            self.rooms.note(index, count);
            index = self.rooms.next(index + 1, least);
        }
        Err(Blocked::NoSpace)
    }

    fn run(&self, first: u64, count: u64) -> Run {
        Run { first, count, fresh: first >= self.end }
    }

    /// The first run in a region of at least `least` free clusters, measured up to `want`; else the longest.
    fn longest(&mut self, slot: At, index: u64, least: u64, want: u64) -> (u64, u64) {
        let base = index << self.g.refblock_bits();
        let end = self.g.refblock_entries().min(self.limit - base) as usize;
        let mut at = self.blocks.first_free(slot);
        let (mut best, mut lowest) = ((base, 0), None);
        while let Some(free) = self.blocks.next_zero(slot, at, end) {
            let cluster = base + free as u64;
            if let Some(past) = self.reserved.end_of(cluster) {
                at = (past - base) as usize;
                continue;
            }
            lowest = lowest.or(Some(free));
            let count = self.free_from(slot, cluster, want);
            if count > best.1 {
                best = (cluster, count);
            }
            if count >= least {
                break;
            }
            at = free + count as usize;
        }
        self.blocks.set_first_free(slot, lowest.unwrap_or(end));
        best
    }

    /// How many clusters from `first` on are free, at most `want`. The first one is not set aside.
    fn free_from(&self, slot: At, first: u64, want: u64) -> u64 {
        let base = first - self.g.refblock_index(first);
        let end =
            (base + self.g.refblock_entries()).min(self.limit).min(first.saturating_add(want));
        let end = self.reserved.next(first).map_or(end, |reserved| end.min(reserved));
        self.blocks.zeroes(slot, (first - base) as usize, (end - base) as usize) as u64
    }

    /// The slot of block `index`, which is made if there is none.
    fn block(&mut self, index: u64) -> Result<At, Blocked> {
        if index >= self.table.len() {
            self.grow_table()?;
        }
        match self.cached(index)? {
            Some(slot) => Ok(slot),
            None => self.make_block(index),
        }
    }

    /// Makes block `index` in the first cluster that it describes, so that nothing else must be allocated for it.
    fn make_block(&mut self, index: u64) -> Result<At, Blocked> {
        let cluster = index << self.g.refblock_bits();
        // Another cluster must be left for what the block is made for.
        if cluster + 1 >= self.limit {
            return Err(Blocked::NoSpace);
        }
        self.check_unused(index, 1)?;
        self.check_room(cluster, 1)?;
        let fresh = cluster >= self.end;
        let slot = self.blocks.make(index, self.offset(cluster), fresh, false)?;
        self.blocks.set(slot, 0, 1);
        self.table.set(index, cluster);
        self.end = self.end.max(cluster + 1);
        self.changed(true, cluster, 1);
        Ok(slot)
    }

    fn check_room(&self, first: u64, count: u64) -> Result<(), Blocked> {
        if first + count <= self.room { Ok(()) } else { Err(Blocked::Room { first, count }) }
    }

    /// No metadata may be where there is no block: its refcount would be 0.
    fn check_unused(&self, index: u64, regions: u64) -> Result<(), Blocked> {
        let bits = self.g.refblock_bits();
        let checked = self.table.check(index << bits, (index + regions) << bits, |_| 0);
        checked.map_err(Blocked::Corrupt)
    }

    /// Makes a longer table, with the blocks that describe it and themselves, in the first clusters that the old table
    /// does not reach.
    fn grow_table(&mut self) -> Result<(), Blocked> {
        let growth = self.table.plan_growth(self.limit).ok_or(Blocked::NoSpace)?;
        self.check_unused(growth.index, growth.blocks)?;
        if !self.blocks.can_take(growth.blocks) {
            return Err(Blocked::CacheFull);
        }
        let count = growth.blocks + growth.clusters;
        self.check_room(growth.start, count)?;
        let end = growth.start + count;
        self.table.grow(&growth);
        for n in 0..growth.blocks {
            let (index, cluster) = (growth.index + n, growth.start + n);
            let fresh = cluster >= self.end;
            let slot = self.blocks.make(index, self.offset(cluster), fresh, true)?;
            let first = index << self.g.refblock_bits();
            for cluster in first..end.min(first + self.g.refblock_entries()) {
                self.blocks.set(slot, self.entry_of(cluster), 1);
            }
            self.table.set(index, cluster);
        }
        self.end = self.end.max(end);
        self.changed(true, growth.start, count);
        Ok(())
    }
}
