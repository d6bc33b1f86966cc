//! The refcounts of an image that is open for writing, and the allocator of host clusters.
//!
//! Pure bookkeeping: no I/O, no waiting, no lock of its own. It lives behind the driver's `Meta` mutex, and is asked again
//! after its caller has done what a [`Blocked`] says. "Cluster" is always a host cluster's number here.
//!
//! What the caller owes:
//! * Blocks are read by one request at a time ([`super::flight`]), so that [`Refcounts::load`] never gets bytes that are
//!   older than what was cached, written and evicted meanwhile.
//! * A [`Snapshot`] is written in the order of its phases, a `fdatasync` behind each, and always handed back.
//! * [`Refcounts::release`] is called when nothing on disk points to the cluster any more.
#![forbid(unsafe_code)]

mod blocks;
mod damage;
mod fields;
mod pieces;
#[cfg(test)]
#[cfg(not(loom))]
pub mod rig;
mod room;
mod search;
mod table;

use blocks::Blocks;
pub use damage::Damage;
use pieces::Pieces;
use room::{Reserved, Rooms};
use table::Reftable;

use super::header::MAX_REFTABLE_SIZE;
use super::layout::{Geometry, HostOffset, MAX_HOST_OFFSET, refcount_get};
use crate::error::Errno;

/// Why an operation cannot go on now. The caller does what it says outside of the lock and asks again. Nothing has
/// changed meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// The refcount block with this index in the refcount table must be read (a cluster at `offset`) and given to
    /// [`Refcounts::load`].
    Load {
        /// The index in the refcount table.
        index: u64,
        /// Where the block is.
        offset: HostOffset,
    },
    /// All cached blocks are dirty or being written: flush first.
    CacheFull,
    /// The file must have room for a new block, or table, in these clusters before it may be there: else a file system that is
    /// full would fail every flush, rather than the one request that needs more. See [`Refcounts::set_room`].
    Room {
        /// The first cluster.
        first: u64,
        /// How many.
        count: u64,
    },
    /// No cluster below the limit is free, or the refcount table would be too long.
    NoSpace,
    /// The image contradicts itself.
    Corrupt(Damage),
}

/// Contiguous clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first one.
    pub first: u64,
    /// How many, at least 1.
    pub count: u64,
    /// All of them read as zeroes: nothing was ever stored there.
    pub fresh: bool,
}

/// A table cluster run that was made or freed, see [`Refcounts::take_changes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Made; else freed.
    pub added: bool,
    /// The first cluster.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// Copies of what must be written, see [`Refcounts::snapshot`].
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Phase 1: pieces of refcount blocks in the file's order, adjacent ones merged.
    pub blocks: Vec<(HostOffset, Vec<u8>)>,
    /// Phase 2, behind a `fdatasync`: whole sectors of the refcount table, or a new table.
    pub table: Vec<(HostOffset, Vec<u8>)>,
    /// Phase 3, behind a `fdatasync`, if the table has moved: the header's bytes 48 to 59 (`refcount_table_offset`,
    /// `refcount_table_clusters`).
    pub header: Option<[u8; 12]>,
    of_blocks: Vec<(u64, Pieces)>,
    of_table: table::Taken,
}

/// The refcounts and the allocator.
pub struct Refcounts {
    g: Geometry,
    limit: u64,
    /// New blocks and tables may be in clusters before this one.
    room: u64,
    end: u64,
    table: Reftable,
    blocks: Blocks,
    rooms: Rooms,
    reserved: Reserved,
    changes: Vec<Change>,
    /// A snapshot is out.
    writing: bool,
}

impl Refcounts {
    /// `table`: the refcount table's words as numbers, from `table_offset` on, `table_clusters` long. `end`: the file's
    /// length in clusters, rounded up; all that is beyond reads as zeroes. `limit`: the first cluster that can never be
    /// used. `slots`: the most blocks cached (a few more while the table grows).
    ///
    /// # Errors
    /// ENOMEM. EINVAL: the table is beyond the end of the file.
    pub fn new(
        geometry: Geometry,
        table: Vec<u64>,
        table_offset: HostOffset,
        table_clusters: u32,
        end: u64,
        limit: u64,
        slots: usize,
    ) -> Result<Refcounts, Errno> {
        let (first, clusters) = (geometry.host_cluster(table_offset), u64::from(table_clusters));
        let most = (MAX_REFTABLE_SIZE >> geometry.cluster_bits).max(1);
        if first + clusters > end || clusters > most || table_offset.0 >= MAX_HOST_OFFSET {
            return Err(Errno::EINVAL);
        }
        Ok(Refcounts {
            g: geometry,
            limit: limit.min(MAX_HOST_OFFSET >> geometry.cluster_bits),
            room: u64::MAX,
            end,
            table: Reftable::new(geometry, table, first, clusters, end),
            blocks: Blocks::new(&geometry, slots)?,
            rooms: Rooms::default(),
            reserved: Reserved::default(),
            changes: Vec::new(),
            writing: false,
        })
    }

    /// Up to `want` contiguous free clusters, at least one; their refcounts are 1 from now on. They start at cluster
    /// `goal` if its refcount block is cached and says that it is free, else as low in the file as possible. They never
    /// cross a refcount block's boundary.
    ///
    /// # Errors
    /// See [`Blocked`].
    ///
    /// # Panics
    /// If `want` is 0.
    pub fn allocate(&mut self, want: u64, goal: Option<u64>) -> Result<Run, Blocked> {
        let at_goal = goal.map_or(Ok(None), |goal| self.find_at(goal, want))?;
        let (slot, run) = at_goal.map_or_else(|| self.find(1, want), Ok)?;
        for cluster in run.first..run.first + run.count {
            self.blocks.set(slot, self.entry_of(cluster), 1);
        }
        Ok(self.taken(run))
    }

    /// Sets up to `want` contiguous free clusters aside, at least one: nobody else gets them. Their refcounts stay 0.
    /// More than half of `want`, if there is such a run and a refcount block can describe it.
    ///
    /// # Errors
    /// See [`Blocked`].
    ///
    /// # Panics
    /// If `want` is 0.
    pub fn reserve(&mut self, want: u64) -> Result<Run, Blocked> {
        // A new region has all of its clusters but a few free.
        let want = want.min(self.g.refblock_entries() / 2);
        let mut least = 1 << want.ilog2();
        let run = loop {
            match self.find(least, want) {
                Err(Blocked::NoSpace) if least > 1 => least /= 2,
                found => break found?.1,
            }
        };
        self.reserved.insert(run.first, run.count);
        Ok(self.taken(run))
    }

    fn taken(&mut self, run: Run) -> Run {
        self.end = self.end.max(run.first + run.count);
        run
    }

    /// Raises the refcounts of clusters that are set aside to 1; they are no longer set aside.
    ///
    /// # Errors
    /// See [`Blocked`].
    ///
    /// # Panics
    /// If not all of them are in one reservation.
    pub fn claim(&mut self, first: u64, count: u64) -> Result<(), Blocked> {
        let end = first + count;
        let whole = self.reserved.end_of(first).is_some_and(|stop| end <= stop);
        assert!(whole && count > 0, "clusters that are not set aside");
        let slot = self.cached(self.g.reftable_index(first))?.expect("made for the reservation");
        let busy = (first..end).find(|c| self.blocks.get(slot, self.entry_of(*c)) != 0);
        if let Some(cluster) = busy {
            return Err(Blocked::Corrupt(Damage::InUse { offset: self.offset(cluster) }));
        }
        for cluster in first..end {
            self.blocks.set(slot, self.entry_of(cluster), 1);
        }
        self.reserved.remove(first, end, |_, _| {});
        Ok(())
    }

    /// Gives back what is set aside in the range.
    pub fn unreserve(&mut self, first: u64, count: u64) {
        let (g, rooms, blocks) = (self.g, &mut self.rooms, &mut self.blocks);
        self.reserved.remove(first, first + count, |from, _| {
            rooms.freed(g.reftable_index(from));
            blocks.lower_first_free(g.reftable_index(from), g.refblock_index(from) as usize);
        });
    }

    /// Lowers a cluster's refcount by one, and answers the new one. At 0 the cluster can be allocated at once: the caller
    /// has seen to it that nothing on disk points to it, and that nobody still uses it.
    ///
    /// # Errors
    /// See [`Blocked`].
    pub fn release(&mut self, cluster: u64) -> Result<u64, Blocked> {
        if self.table.holds(cluster) {
            return Err(Blocked::Corrupt(Damage::FreesTable { offset: self.offset(cluster) }));
        }
        self.lower(cluster)
    }

    fn lower(&mut self, cluster: u64) -> Result<u64, Blocked> {
        let (index, entry) = (self.g.reftable_index(cluster), self.entry_of(cluster));
        let slot = self.cached(index)?;
        let Some((slot, now)) = slot.map(|s| (s, self.blocks.get(s, entry))).filter(|s| s.1 > 0)
        else {
            return Err(Blocked::Corrupt(Damage::FreesFree { offset: self.offset(cluster) }));
        };
        self.blocks.set(slot, entry, now - 1);
        if now == 1 {
            self.rooms.freed(index);
            self.blocks.lower_first_free(index, entry);
        }
        Ok(now - 1)
    }

    /// A cluster's refcount.
    ///
    /// # Errors
    /// Load, Corrupt.
    pub fn get(&mut self, cluster: u64) -> Result<u64, Blocked> {
        let slot = self.cached(self.g.reftable_index(cluster))?;
        Ok(slot.map_or(0, |slot| self.blocks.get(slot, self.entry_of(cluster))))
    }

    /// Takes a block that was read, as on disk. Ignored if it is cached already, or the table has no such block.
    ///
    /// # Errors
    /// CacheFull; Corrupt: it gives metadata another refcount than 1.
    ///
    /// # Panics
    /// If `bytes` is not a cluster.
    pub fn load(&mut self, index: u64, bytes: &[u8]) -> Result<(), Blocked> {
        assert_eq!(bytes.len() as u64, self.g.cluster_size(), "a block of another length");
        let Err(Blocked::Load { offset, .. }) = self.cached(index) else { return Ok(()) };
        let (start, end) = (index << self.g.refblock_bits(), (index + 1) << self.g.refblock_bits());
        let refcount = |c: u64| refcount_get(bytes, self.g.refcount_order, (c - start) as usize);
        self.table.check(start, end, refcount).map_err(Blocked::Corrupt)?;
        self.blocks.load(index, offset, bytes)
    }

    /// Whether [`Refcounts::snapshot`] would have something to write.
    pub fn is_dirty(&self) -> bool {
        self.blocks.is_dirty() || self.table.is_dirty()
    }

    /// Copies of all that must be written. It counts as being written until [`Refcounts::written`]; what changes
    /// meanwhile is dirty again.
    ///
    /// # Panics
    /// If the last snapshot has not come back.
    pub fn snapshot(&mut self) -> Snapshot {
        assert!(!self.writing, "one snapshot at a time");
        self.writing = true;
        let (blocks, of_blocks) = self.blocks.snapshot();
        let table::Copies { table, header, taken } = self.table.snapshot();
        Snapshot { blocks, table, header, of_blocks, of_table: taken }
    }

    /// The snapshot is on stable storage to the last phase (`ok`), or nobody knows what is: all of it is dirty again.
    pub fn written(&mut self, snapshot: Snapshot, ok: bool) {
        self.writing = false;
        self.blocks.written(&snapshot.of_blocks, ok);
        self.table.written(snapshot.of_table, ok);
        // What cannot be done now is answered when the caller asks.
        let _ = self.settle();
    }

    /// Frees old refcount tables that the header on disk no longer points to. [`Refcounts::written`] has done what it
    /// can of this; the caller may put the rest off (until then they are leaks). Refcounts are dirty afterwards.
    ///
    /// # Errors
    /// Load, Corrupt.
    pub fn settle(&mut self) -> Result<(), Blocked> {
        while let Some(cluster) = self.table.unused() {
            self.lower(cluster)?;
            self.table.forget_unused();
            self.changed(false, cluster, 1);
        }
        Ok(())
    }

    /// One past the highest cluster that was ever handed out or is in the file.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// New blocks and tables may be in clusters before `end`; at first, anywhere.
    pub fn set_room(&mut self, end: u64) {
        self.room = end;
    }

    /// What [`Refcounts::set_room`] said last.
    pub fn room(&self) -> u64 {
        self.room
    }

    /// Memory of cached blocks, in bytes.
    pub fn memory(&self) -> u64 {
        self.blocks.memory()
    }

    /// The clusters of refcount tables and of refcount blocks, as (first, count), in no order.
    pub fn tables(&self) -> impl Iterator<Item = (u64, u64)> {
        self.table.runs()
    }

    /// Whether `cluster` is part of a refcount table (`true`) or a refcount block; `None`: neither.
    pub fn is_table(&self, cluster: u64) -> Option<bool> {
        let mut tables = self.table.own_runs();
        if tables.any(|(first, count)| (first..first + count).contains(&cluster)) {
            return Some(true);
        }
        self.table.runs().any(|(first, _)| first == cluster).then_some(false)
    }

    /// Table clusters that were made or freed since the last call, in order.
    pub fn take_changes(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.changes)
    }

    fn changed(&mut self, added: bool, first: u64, count: u64) {
        match self.changes.last_mut() {
            Some(last) if last.added == added && last.first + last.count == first => {
                last.count += count;
            }
            _ => self.changes.push(Change { added, first, count }),
        }
    }

    fn offset(&self, cluster: u64) -> HostOffset {
        HostOffset(cluster << self.g.cluster_bits)
    }

    /// The index in its block of a cluster's refcount.
    fn entry_of(&self, cluster: u64) -> usize {
        self.g.refblock_index(cluster) as usize
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "refcount_tests.rs"]
mod tests;
