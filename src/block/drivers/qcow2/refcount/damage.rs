//! What can be wrong with refcounts.
#![forbid(unsafe_code)]

use std::fmt;

use super::super::layout::{Hex, HostOffset};

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
    /// A cluster that was set aside has got a refcount on disk: somebody else writes to the image.
    InUse {
        /// The cluster's offset.
        offset: HostOffset,
    },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Damage::Unaligned { index, offset } => write!(
                f,
                "Refblock offset {} unaligned (reftable index: {})",
                Hex(offset.0),
                Hex(index)
            ),
            Damage::Reserved { index } => {
                write!(
                    f,
                    "Refcount table entry has reserved bits set (reftable index: {})",
                    Hex(index)
                )
            }
            Damage::Misplaced { index, offset } => write!(
                f,
                "Refblock offset {} cannot be true (reftable index: {})",
                Hex(offset.0),
                Hex(index)
            ),
            Damage::Table { offset: HostOffset(0), refcount: 0 } => {
                f.write_str("Preventing invalid allocation of refcount block at offset 0")
            }
            Damage::Table { offset, refcount } => {
                write!(f, "Refcount of the metadata at offset {} is {refcount}", Hex(offset.0))
            }
            Damage::FreesTable { offset } => {
                write!(f, "Preventing invalid freeing of metadata at offset {}", Hex(offset.0))
            }
            Damage::FreesFree { offset } => {
                write!(f, "Refcount of the cluster to be freed at offset {} is 0", Hex(offset.0))
            }
            Damage::InUse { offset } => {
                write!(f, "Refcount of the free cluster at offset {} has changed", Hex(offset.0))
            }
        }
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "damage_tests.rs"]
mod tests;
