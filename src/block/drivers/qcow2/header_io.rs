//! What is written of the header while the image is open: feature bits, and where the tables are. Everything else in
//! cluster 0 stays as it is.
//!
//! Each change is one write inside of one sector, so that a power cut leaves the old field or the new one. It is stable
//! when the call returns; and whatever was written before a call that makes the header point elsewhere, or declares
//! the refcounts to be right, is stable before it. One change at a time; callers hold no lock.
//!
//! A write that fails may have reached the disk or not: the call then fails, and says and does the same when repeated.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::check::Disk;
use super::flight::Flights;
use super::header::{Autoclear, Header, Incompatible};
use super::layout::HostOffset;
use super::write::mutation::{Mutation, broken};
use crate::block::Node;
use crate::error::Errno;

/// Offset of `size`.
const SIZE: u64 = 24;
/// Offset of `l1_size`; `l1_table_offset` follows.
const L1: u64 = 36;
/// Offset of `refcount_table_offset`; `refcount_table_clusters` follows.
const REFTABLE: u64 = 48;
/// Offset of `incompatible_features`.
const INCOMPATIBLE: u64 = 72;
/// Offset of `autoclear_features`.
const AUTOCLEAR: u64 = 88;

/// The header on disk. See the module's description.
pub struct HeaderIo {
    version: u32,
    /// The incompatible feature bits: what was last made stable.
    incompatible: AtomicU64,
    /// They are on disk for sure: no write of others has failed since.
    sure: AtomicBool,
    turns: Flights,
}

impl HeaderIo {
    /// For an image with this header.
    pub fn new(header: &Header) -> HeaderIo {
        HeaderIo {
            version: header.version,
            incompatible: AtomicU64::new(header.incompatible.bits()),
            sure: AtomicBool::new(true),
            turns: Flights::default(),
        }
    }

    /// The incompatible feature bits that were last made stable.
    pub fn incompatible(&self) -> Incompatible {
        Incompatible::from_bits_retain(self.incompatible.load(Ordering::Acquire))
    }

    /// Sets the dirty bit: refcounts may be behind from now on. Version 2 has no such bit: nothing happens.
    ///
    /// # Errors
    /// It could not be written or made stable: then refcounts must not get behind.
    pub async fn mark_dirty(&self, file: &Node) -> Result<(), Errno> {
        self.change(file, Incompatible::DIRTY, Incompatible::empty()).await
    }

    /// Clears the dirty bit: refcounts are right, as soon as what was written so far is stable, which this sees to.
    ///
    /// # Errors
    /// It could not be written or made stable: the image still counts as dirty.
    pub async fn mark_clean(&self, file: &Node) -> Result<(), Errno> {
        self.change(file, Incompatible::empty(), Incompatible::DIRTY).await
    }

    /// Sets the corrupt bit: nobody may write to the image any more. In version 2, which has no such bit, nothing
    /// happens: only this process knows.
    ///
    /// # Errors
    /// It could not be written or made stable.
    pub async fn mark_corrupt(&self, file: &Node) -> Result<(), Errno> {
        self.change(file, Incompatible::CORRUPT, Incompatible::empty()).await
    }

    /// The virtual disk is `size` bytes long.
    ///
    /// # Errors
    /// It could not be written or made stable.
    pub async fn set_size(&self, file: &Node, size: u64) -> Result<(), Errno> {
        self.put(file, SIZE, &size.to_be_bytes()).await
    }

    /// The active L1 table of `entries` entries is at `offset`.
    ///
    /// # Errors
    /// It could not be written or made stable: either table may be the active one.
    pub async fn set_l1(&self, file: &Node, offset: HostOffset, entries: u32) -> Result<(), Errno> {
        let mut field = [0; 12];
        field[..4].copy_from_slice(&entries.to_be_bytes());
        field[4..].copy_from_slice(&offset.0.to_be_bytes());
        self.put(file, L1, &field).await
    }

    /// `field`: the new `refcount_table_offset` and `refcount_table_clusters`, big endian.
    ///
    /// # Errors
    /// It could not be written or made stable: either table may be the one in force.
    pub async fn set_reftable(&self, file: &Node, field: [u8; 12]) -> Result<(), Errno> {
        self.put(file, REFTABLE, &field).await
    }

    /// The autoclear feature bits are `bits`. Version 2 has none: nothing happens.
    ///
    /// # Errors
    /// It could not be written or made stable: what the bits vouch for must stay as it is.
    pub async fn set_autoclear(&self, file: &Node, bits: Autoclear) -> Result<(), Errno> {
        if self.version < 3 {
            return Ok(());
        }
        self.put(file, AUTOCLEAR, &bits.bits().to_be_bytes()).await
    }

    /// The same for bits that differ in the journal's number only: they are of no use after a power loss, nor is the journal, and
    /// need not be stable. Two flushes fewer at each start.
    ///
    /// # Errors
    /// It could not be written.
    pub async fn set_journal(&self, file: &Node, bits: Autoclear) -> Result<(), Errno> {
        if self.version < 3 {
            return Ok(());
        }
        let _turn = self.turns.alone(0).await;
        Disk::new(file).write(AUTOCLEAR, &bits.bits().to_be_bytes()).await
    }

    async fn change(
        &self,
        file: &Node,
        set: Incompatible,
        clear: Incompatible,
    ) -> Result<(), Errno> {
        let new = |old: Incompatible| old.union(set).difference(clear);
        let done =
            || self.sure.load(Ordering::Acquire) && new(self.incompatible()) == self.incompatible();
        if self.version < 3 || done() {
            return Ok(());
        }
        let _turn = self.turns.alone(0).await;
        if done() {
            return Ok(());
        }
        let (disk, new) = (Disk::new(file), new(self.incompatible()));
        if !clear.is_empty() {
            disk.flush().await?;
        }
        self.sure.store(false, Ordering::Release);
        disk.write(INCOMPATIBLE, &new.bits().to_be_bytes()).await?;
        disk.flush().await?;
        self.incompatible.store(new.bits(), Ordering::Release);
        self.sure.store(true, Ordering::Release);
        Ok(())
    }

    async fn put(&self, file: &Node, at: u64, field: &[u8]) -> Result<(), Errno> {
        let _turn = self.turns.alone(0).await;
        if !broken(Mutation::NoFlushBeforeHeader) {
            Disk::new(file).flush().await?;
        }
        Disk::new(file).write(at, field).await?;
        Disk::new(file).flush().await
    }
}

#[cfg(test)]
#[path = "header_io_tests.rs"]
mod tests;
