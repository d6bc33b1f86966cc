//! QEMU's limits for what a header may say, and in which case an image is not opened.
#![forbid(unsafe_code)]

use super::features::Incompatible;
use super::header::{Header, MIN_CLUSTER_BITS};
use super::layout::HostOffset;
use crate::err;
use crate::error::Result;

/// The largest L1 table in bytes (QEMU's limit: 4 Mi entries).
pub const MAX_L1_SIZE: u64 = 32 << 20;
/// The largest refcount table in bytes (QEMU's limit).
pub const MAX_REFTABLE_SIZE: u64 = 8 << 20;
/// The most internal snapshots (QEMU's limit).
pub const MAX_SNAPSHOTS: u64 = 65536;
/// The fixed part of a snapshot table's entry in bytes.
pub const SNAPSHOT_HEADER_SIZE: u64 = 40;
/// The most persistent bitmaps (QEMU's limit).
pub const MAX_BITMAPS: u32 = 65535;
/// The largest bitmap directory in bytes (QEMU's limit).
pub const MAX_BITMAP_DIRECTORY_SIZE: u64 = 1024 * MAX_BITMAPS as u64;
/// The longest backing file name in bytes.
pub const MAX_BACKING_NAME: u64 = 1023;

/// What an image is opened for: some checks differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To read.
    Read,
    /// To read and write.
    Write,
    /// To check or repair it (QEMU's BDRV_O_CHECK): broken refcount and snapshot tables and the corrupt bit are no
    /// obstacles.
    Check,
}

impl Header {
    /// Whether everything that the fixed fields say is within QEMU's limits.
    ///
    /// # Errors
    /// In QEMU's words: corrupt and to be written, subclusters or refcounts of an impossible size, tables too large
    /// or unaligned, an L1 table too small for the disk.
    pub fn check_limits(&self, purpose: Purpose) -> Result<()> {
        if purpose == Purpose::Write && self.incompatible.contains(Incompatible::CORRUPT) {
            return Err(err!("qcow2: Image is corrupt; cannot be opened read/write"));
        }
        let subcluster = (1u64 << self.cluster_bits) / if self.extended_l2() { 32 } else { 1 };
        if subcluster < 1 << MIN_CLUSTER_BITS {
            return Err(err!("Unsupported subcluster size: {subcluster}"));
        }
        if self.refcount_order > 6 {
            return Err(err!("Reference count entry width too large; may not exceed 64 bits"));
        }
        if self.refcount_table_clusters == 0 && purpose != Purpose::Check {
            return Err(err!("Image does not contain a reference count table"));
        }
        let (offset, entries) =
            (self.refcount_table_offset, u64::from(self.refcount_table_clusters));
        let entry = 1 << self.cluster_bits;
        self.check_table(offset, entries, entry, MAX_REFTABLE_SIZE, "Reference count table")?;
        if purpose != Purpose::Check {
            let (offset, entries) = (self.snapshots_offset, u64::from(self.nb_snapshots));
            let (entry, max) = (SNAPSHOT_HEADER_SIZE, SNAPSHOT_HEADER_SIZE * MAX_SNAPSHOTS);
            self.check_table(offset, entries, entry, max, "Snapshot table")?;
        }
        let (offset, entries) = (self.l1_table_offset, u64::from(self.l1_size));
        self.check_table(offset, entries, 8, MAX_L1_SIZE, "Active L1 table")?;
        let needed = self.geometry().l1_entries_for(self.size);
        if needed > u64::from(i32::MAX.unsigned_abs()) {
            return Err(err!("Image is too big"));
        }
        if u64::from(self.l1_size) < needed {
            return Err(err!("L1 table is too small"));
        }
        Ok(())
    }

    /// QEMU's check of a table called `name` of `entries` entries of `entry` bytes, at most `max` bytes in all.
    ///
    /// # Errors
    /// `NAME too large`, `NAME offset invalid`.
    pub fn check_table(
        &self,
        offset: HostOffset,
        entries: u64,
        entry: u64,
        max: u64,
        name: &str,
    ) -> Result<()> {
        if entries > max / entry {
            return Err(err!("{name} too large"));
        }
        let end = offset.0.checked_add(entries * entry);
        let fits = end.is_some_and(|end| i64::try_from(end).is_ok());
        if !fits || !self.geometry().is_cluster_aligned(offset) {
            return Err(err!("{name} offset invalid"));
        }
        Ok(())
    }
}
