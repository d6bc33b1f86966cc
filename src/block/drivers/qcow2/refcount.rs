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

use std::fmt;

use super::layout::{Geometry, HostOffset};
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
    /// No cluster below the limit is free, or the refcount table would be too long.
    NoSpace,
    /// The image contradicts itself.
    Corrupt(Damage),
}

/// How the refcounts contradict themselves. `Display` is QEMU's text where it has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// An entry of the refcount table is not the offset of a cluster.
    Unaligned {
        /// The index in the refcount table.
        index: u64,
        /// What the entry says.
        offset: HostOffset,
    },
    /// An entry of the refcount table has reserved bits set.
    Reserved {
        /// The index in the refcount table.
        index: u64,
    },
    /// A refcount block is beyond the end of the file, in the refcount table, or is several at once.
    Misplaced {
        /// The index in the refcount table.
        index: u64,
        /// Where the block would be.
        offset: HostOffset,
    },
    /// The header, the refcount table or a refcount block has a refcount that it cannot have.
    Table {
        /// The cluster's offset.
        offset: HostOffset,
        /// Its refcount.
        refcount: u64,
    },
    /// The header, the refcount table or a refcount block would be freed.
    FreesTable {
        /// The cluster's offset.
        offset: HostOffset,
    },
    /// A cluster whose refcount is 0 would be freed.
    FreesFree {
        /// The cluster's offset.
        offset: HostOffset,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        todo!()
    }
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
    /// Phase 1: pieces of refcount blocks, adjacent ones merged.
    pub blocks: Vec<(HostOffset, Vec<u8>)>,
    /// Phase 2, behind a `fdatasync`: whole sectors of the refcount table, or a new table.
    pub table: Vec<(HostOffset, Vec<u8>)>,
    /// Phase 3, behind a `fdatasync`, if the table has moved: the header's bytes 48 to 59 (`refcount_table_offset`,
    /// `refcount_table_clusters`).
    pub header: Option<[u8; 12]>,
}

/// The refcounts and the allocator.
pub struct Refcounts {}

#[allow(unused_variables, clippy::all, clippy::needless_pass_by_value, reason = "signatures first")]
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
        todo!()
    }

    /// Up to `want` contiguous free clusters, at least one; their refcounts are 1 from now on. They start at cluster
    /// `goal` if that is free, else as low in the file as possible.
    pub fn allocate(&mut self, want: u64, goal: Option<u64>) -> Result<Run, Blocked> {
        todo!()
    }

    /// Sets up to `want` contiguous free clusters aside, at least one: nobody else gets them. Their refcounts stay 0.
    pub fn reserve(&mut self, want: u64) -> Result<Run, Blocked> {
        todo!()
    }

    /// Raises the refcounts of clusters that are set aside to 1; they are no longer set aside.
    ///
    /// # Panics
    /// If not all of them are in one reservation.
    pub fn claim(&mut self, first: u64, count: u64) -> Result<(), Blocked> {
        todo!()
    }

    /// Gives back what is set aside in the range.
    pub fn unreserve(&mut self, first: u64, count: u64) {
        todo!()
    }

    /// Lowers a cluster's refcount by one, and answers the new one. At 0 the cluster is free at once.
    pub fn release(&mut self, cluster: u64) -> Result<u64, Blocked> {
        todo!()
    }

    /// A cluster's refcount.
    pub fn get(&mut self, cluster: u64) -> Result<u64, Blocked> {
        todo!()
    }

    /// Takes a block that was read, as on disk. Ignored if it is cached already.
    ///
    /// # Errors
    /// CacheFull, Corrupt.
    pub fn load(&mut self, index: u64, bytes: &[u8]) -> Result<(), Blocked> {
        todo!()
    }

    /// Whether [`Refcounts::snapshot`] would have something to write.
    pub fn is_dirty(&self) -> bool {
        todo!()
    }

    /// Copies of all that must be written. It counts as being written until [`Refcounts::written`]; what changes
    /// meanwhile is dirty again.
    ///
    /// # Panics
    /// If the last snapshot has not come back.
    pub fn snapshot(&mut self) -> Snapshot {
        todo!()
    }

    /// The snapshot is on stable storage to the last phase (`ok`), or nobody knows what is: all of it is dirty again.
    #[allow(clippy::needless_pass_by_value, reason = "a snapshot comes back once")]
    pub fn written(&mut self, snapshot: Snapshot, ok: bool) {
        todo!()
    }

    /// Frees old refcount tables that the header on disk no longer points to. `written` does what it can of this by
    /// itself; only `Load` and `CacheFull` are left to the caller, who may put it off (until then they are leaks).
    pub fn settle(&mut self) -> Result<(), Blocked> {
        todo!()
    }

    /// One past the highest cluster that was ever in use or is in the file.
    pub fn end(&self) -> u64 {
        todo!()
    }

    /// Memory of cached blocks, in bytes.
    pub fn memory(&self) -> u64 {
        todo!()
    }

    /// The clusters of the refcount table and of the refcount blocks, as (first, count).
    pub fn tables(&self) -> impl Iterator<Item = (u64, u64)> {
        std::iter::empty()
    }

    /// Table clusters that were made or freed since the last call, in order.
    pub fn take_changes(&mut self) -> Vec<Change> {
        todo!()
    }
}
