//! Keeps a repair from writing over other metadata, where tables of a broken image overlap.
#![forbid(unsafe_code)]

use std::collections::HashSet;

use super::super::layout::{OFFSET_MASK, REFTABLE_OFFSET_MASK};
use super::Check;
use crate::error::Errno;

/// What a write may overlap because it is meant to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    ActiveL1,
    ActiveL2,
    Nothing,
}

/// The host clusters of tables that are many.
pub(super) struct Metadata {
    l2: HashSet<u64>,
    refblocks: HashSet<u64>,
}

impl Check<'_> {
    /// Whether `[offset, offset + len)` may be written as (part of) `target`. If not, the image is marked as corrupt.
    pub(super) async fn may_write(
        &mut self,
        target: Target,
        offset: u64,
        len: u64,
    ) -> Result<bool, Errno> {
        let Some(victim) = self.overlap(target, offset, len) else { return Ok(true) };
        let what = format!("Preventing invalid write on metadata (overlaps with {victim})");
        self.signal_corruption(true, &what).await?;
        Ok(false)
    }

    fn overlap(&mut self, target: Target, offset: u64, len: u64) -> Option<&'static str> {
        let bits = self.g.cluster_bits;
        let (first, last) = (offset >> bits, (offset + len - 1) >> bits);
        let meets = |at: u64, len: u64| {
            len > 0 && at >> bits <= last && at.saturating_add(len - 1) >> bits >= first
        };
        if first == 0 {
            return Some("qcow2_header");
        }
        let l1 = (self.header.l1_table_offset.0, 8 * u64::from(self.header.l1_size));
        if target != Target::ActiveL1 && meets(l1.0, l1.1) {
            return Some("active L1 table");
        }
        if meets(self.header.refcount_table_offset.0, self.reftable_bytes()) {
            return Some("refcount table");
        }
        if meets(self.snapshots.offset, self.snapshots.len) {
            return Some("snapshot table");
        }
        if self.snapshots.list.iter().any(|s| meets(s.l1_offset, 8 * u64::from(s.l1_size))) {
            return Some("inactive L1 table");
        }
        let metadata = self.metadata();
        if target != Target::ActiveL2 && (first..=last).any(|c| metadata.l2.contains(&c)) {
            return Some("active L2 table");
        }
        if (first..=last).any(|c| metadata.refblocks.contains(&c)) {
            return Some("refcount block");
        }
        let directory = self.header.bitmaps()?;
        let overlaps = meets(directory.directory_offset.0, directory.directory_size);
        overlaps.then_some("bitmap directory")
    }

    fn metadata(&mut self) -> &Metadata {
        let (bits, size) = (self.g.cluster_bits, self.g.cluster_size());
        let both = |offset: u64| [offset >> bits, (offset + size - 1) >> bits];
        let (l1, table) = (&self.l1, &self.refcounts.table);
        self.metadata.get_or_insert_with(|| Metadata {
            l2: l1.iter().map(|e| e & OFFSET_MASK).filter(|o| *o != 0).flat_map(both).collect(),
            refblocks: table
                .iter()
                .map(|e| e & REFTABLE_OFFSET_MASK)
                .filter(|o| *o != 0)
                .map(|o| o >> bits)
                .collect(),
        })
    }
}
