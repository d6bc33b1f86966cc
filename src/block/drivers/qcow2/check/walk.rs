//! Walks over L1 and L2 tables and counts references.
//!
//! An L2 table is examined when it is met first. Where nothing is wrong with it, meeting it again (snapshots share
//! tables) means the same references once more: they are added up at the end, all at once. A table with faults is
//! examined, and its faults told, each time, as QEMU does - but not for ever.
#![forbid(unsafe_code)]

use std::rc::Rc;

use super::super::header::MAX_L1_SIZE;
use super::super::layout::{
    COMPRESSED, COMPRESSED_SECTOR, COPIED, L1_RESERVED, L2_RESERVED, OFFSET_MASK,
    REFTABLE_OFFSET_MASK, ZERO,
};
use super::disk::words_of;
use super::overlap::Target;
use super::{Check, Fix};
use crate::error::Errno;

/// How many entries of tables that were met before are examined again: seconds, where a hostile L1 table that names one L2
/// table four million times would take hours.
pub(super) const PATIENCE: u64 = 1 << 22;
/// The most bytes of L1 tables that are walked, whatever the file's length: a thousand snapshots of 64 TiB disks.
const L1_BYTES_MAX: u64 = 1 << 30;

/// The bytes of L1 tables that may be walked. Tables do not overlap in an image that is not hostile.
pub(in super::super) fn l1_budget(file_len: u64) -> u64 {
    file_len.saturating_mul(2).saturating_add(2 * MAX_L1_SIZE).min(L1_BYTES_MAX)
}

/// An L2 table that was examined.
pub(super) struct Seen {
    clean: bool,
    /// How many references to it are still to be followed.
    times: u64,
}

impl Seen {
    /// Nothing is left to be followed.
    pub(super) fn new(clean: bool) -> Seen {
        Seen { clean, times: 0 }
    }

    /// Nothing was wrong with it.
    pub(super) fn is_clean(&self) -> bool {
        self.clean
    }
}

/// What an L2 entry is, as far as counting goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Compressed,
    /// A host cluster with data, or a zero cluster with a host cluster.
    Allocated,
    Zero,
    Unallocated,
}

/// The whole L2 table being examined.
struct Table {
    offset: u64,
    active: bool,
    fix: Fix,
    /// Where the next cluster would be if the disk were in order.
    next: u64,
}

/// One of its entries.
#[derive(Clone, Copy)]
struct Entry {
    index: usize,
    word: u64,
    bitmap: u64,
}

impl Check<'_> {
    /// The kind of the L2 entry with this first word.
    pub(super) fn kind(&self, word: u64) -> Kind {
        let offset = word & OFFSET_MASK;
        if word & COMPRESSED != 0 {
            Kind::Compressed
        } else if word & ZERO != 0 && !self.g.extended_l2 {
            if offset == 0 { Kind::Zero } else { Kind::Allocated }
        } else if offset == 0 && !(self.g.data_file && word & COPIED != 0) {
            Kind::Unallocated
        } else {
            Kind::Allocated
        }
    }

    /// Forgets the references counted so far and counts all of them.
    pub(super) async fn count_references(&mut self, fix: Fix) -> Result<(), Errno> {
        self.refs.clear();
        self.shared.clear();
        self.patience = PATIENCE;
        self.l1_budget = l1_budget(self.disk.len());
        // Also here, because a second walk counts them a second time.
        self.report.allocated_clusters = 0;
        self.report.fragmented_clusters = 0;
        self.report.compressed_clusters = 0;
        self.reference(0, self.g.cluster_size());
        let (offset, l1) = (self.header.l1_table_offset.0, Rc::clone(&self.l1));
        self.walk_l1(offset, &l1, true, fix).await?;
        self.walk_snapshots(fix).await?;
        self.add_shared().await?;
        self.reference(self.header.refcount_table_offset.0, self.reftable_bytes());
        self.walk_crypto();
        self.walk_bitmaps().await?;
        self.walk_refblocks(fix);
        Ok(())
    }

    /// Counts a reference to each of the clusters of a range.
    pub(super) fn reference(&mut self, offset: u64, len: u64) {
        self.reference_times(offset, len, 1);
    }

    fn reference_times(&mut self, offset: u64, len: u64, times: u64) {
        if len == 0 {
            return;
        }
        // The last cluster may be there in part only.
        let end = u128::from(offset) + u128::from(len);
        if end >= u128::from(self.disk.len()) + u128::from(self.g.cluster_size()) {
            self.watch.line(&format!(
                "ERROR: counting reference for region exceeding the end of the file by one cluster \
                 or more: offset {offset:#x} size {len:#x}"
            ));
            self.report.corruptions += 1;
            return;
        }
        for cluster in offset >> self.g.cluster_bits..=(offset + len - 1) >> self.g.cluster_bits {
            // The last one may be past the end of the file.
            self.clusters = self.clusters.max(cluster + 1);
            if !self.refs.add(cluster, times) {
                self.overflow(cluster);
            }
        }
    }

    fn overflow(&mut self, cluster: u64) {
        let offset = cluster << self.g.cluster_bits;
        self.watch.line(&format!("ERROR: overflow cluster offset={offset:#x}"));
        self.watch.line(
            "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create \
             a clean copy if the image cannot be opened for writing",
        );
        self.report.corruptions += 1;
    }

    /// Counts the references of an L1 table and of what it leads to.
    pub(super) async fn walk_l1(
        &mut self,
        offset: u64,
        l1: &[u64],
        active: bool,
        fix: Fix,
    ) -> Result<(), Errno> {
        self.reference(offset, 8 * l1.len() as u64);
        for entry in l1.iter().copied().filter(|entry| *entry != 0) {
            if entry & L1_RESERVED != 0 {
                self.watch.line(&format!("ERROR found L1 entry with reserved bits set: {entry:x}"));
                self.report.corruptions += 1;
            }
            let table = entry & OFFSET_MASK;
            self.reference(table, self.g.cluster_size());
            if !table.is_multiple_of(self.g.cluster_size()) {
                self.watch.line(&format!(
                    "ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"
                ));
                self.report.corruptions += 1;
            }
            self.visit_l2(table, active, fix).await?;
            if active {
                self.step();
            }
        }
        Ok(())
    }

    async fn visit_l2(&mut self, offset: u64, active: bool, fix: Fix) -> Result<(), Errno> {
        if let Some(seen) = self.shared.get_mut(&offset) {
            // Faults are told, and the active table's clusters counted for the statistics, each time.
            let again = (active || !seen.clean) && self.patience >= self.g.l2_entries();
            if !again {
                seen.times += 1;
                return Ok(());
            }
            self.patience -= self.g.l2_entries();
        }
        let before = (self.report.corruptions, self.report.corruptions_fixed);
        self.walk_l2(Table { offset, active, fix, next: 0 }).await?;
        let clean = before == (self.report.corruptions, self.report.corruptions_fixed);
        self.shared.entry(offset).or_insert(Seen::new(clean));
        Ok(())
    }

    async fn read_l2(&mut self, offset: u64) -> Result<Vec<u64>, Errno> {
        let len = 1 << self.g.cluster_bits;
        match self.disk.read(offset, len).await {
            Ok(bytes) => Ok(words_of(&bytes).collect()),
            Err(e) => {
                self.watch.line("ERROR: I/O error in check_refcounts_l2");
                self.report.check_errors += 1;
                Err(e)
            }
        }
    }

    fn entry(&self, words: &[u64], index: usize) -> Entry {
        match self.g.extended_l2 {
            true => Entry { index, word: words[2 * index], bitmap: words[2 * index + 1] },
            false => Entry { index, word: words[index], bitmap: 0 },
        }
    }

    async fn walk_l2(&mut self, mut table: Table) -> Result<(), Errno> {
        let words = self.read_l2(table.offset).await?;
        for index in 0..words.len() >> (self.g.l2_entry_bits() - 3) {
            let mut entry = self.entry(&words, index);
            if entry.word == 0 && entry.bitmap == 0 {
                continue;
            }
            let kind = self.kind(entry.word);
            if kind != Kind::Compressed && entry.word & L2_RESERVED != 0 {
                let word = entry.word;
                self.watch.line(&format!("ERROR found l2 entry with reserved bits set: {word:x}"));
                self.report.corruptions += 1;
            }
            match kind {
                Kind::Compressed => self.walk_compressed(&mut entry, table.active),
                Kind::Allocated => {
                    if !self.walk_allocated(&entry, &mut table).await? {
                        return Ok(());
                    }
                }
                Kind::Zero => {}
                Kind::Unallocated => {
                    if entry.bitmap & u64::from(u32::MAX) != 0 {
                        self.watch.line(
                            "ERROR: Unallocated cluster has non-zero subcluster allocation map",
                        );
                        self.report.corruptions += 1;
                    }
                }
            }
        }
        Ok(())
    }

    fn walk_compressed(&mut self, entry: &mut Entry, active: bool) {
        let (offset, len) = self.compressed_range(entry.word);
        if entry.word & COPIED != 0 {
            self.watch.line(&format!(
                "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            ));
            entry.word &= !COPIED;
            self.report.corruptions += 1;
        }
        let (index, word) = (entry.index, entry.word);
        if self.g.data_file {
            self.watch
                .line(&format!("ERROR compressed cluster {index} with data file, entry={word:#x}"));
            self.report.corruptions += 1;
        } else if entry.bitmap != 0 {
            self.watch.line(&format!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, \
                 entry={word:#x}"
            ));
            self.report.corruptions += 1;
        } else {
            self.reference(offset, len);
            if active {
                self.report.allocated_clusters += 1;
                self.report.compressed_clusters += 1;
                // Compressed clusters share sectors: reading them in order reads sectors twice.
                self.report.fragmented_clusters += 1;
            }
        }
    }

    /// Where compressed data is: offset and length up to the end of its last sector.
    fn compressed_range(&self, word: u64) -> (u64, u64) {
        let shift = 62 - (self.g.cluster_bits - 8);
        let offset = word & ((1 << shift) - 1);
        let sectors = ((word & (COMPRESSED - 1)) >> shift) + 1;
        (offset, sectors * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR)
    }

    /// False: this table must not be looked at any more.
    async fn walk_allocated(&mut self, entry: &Entry, table: &mut Table) -> Result<bool, Errno> {
        let (offset, bitmap) = (entry.word & OFFSET_MASK, entry.bitmap);
        if bitmap >> 32 & bitmap != 0 {
            self.report.corruptions += 1;
            self.watch.line(&format!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation \
                 bitmap"
            ));
        }
        if !offset.is_multiple_of(self.g.cluster_size()) {
            self.report.corruptions += 1;
            let data = match self.g.extended_l2 {
                true => bitmap & u64::from(u32::MAX) != 0,
                false => entry.word & ZERO == 0,
            };
            if data {
                self.watch.line(&format!(
                    "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry \
                     corrupted."
                ));
            } else {
                let verb = verb(table.fix);
                self.watch.line(&format!(
                    "{verb} offset={offset:x}: Preallocated cluster is not properly aligned; L2 \
                     entry corrupted."
                ));
                if table.fix == Fix::All {
                    // Unused from now on: not counted. Or impossible to repair: the table is not what it seems.
                    return self.make_zero(entry, table).await;
                }
            }
        }
        if table.active {
            self.report.allocated_clusters += 1;
            if table.next != 0 && offset != table.next {
                self.report.fragmented_clusters += 1;
            }
            table.next = offset + self.g.cluster_size();
        }
        if !self.g.data_file {
            self.reference(offset, self.g.cluster_size());
        }
        Ok(true)
    }

    /// Makes a broken entry without data one that reads as zeroes without a host cluster. False: it cannot be written.
    async fn make_zero(&mut self, entry: &Entry, table: &Table) -> Result<bool, Errno> {
        let at = table.offset + ((entry.index as u64) << self.g.l2_entry_bits());
        let bytes = if self.g.extended_l2 {
            let zero = (entry.bitmap | entry.bitmap << 32) & !u64::from(u32::MAX);
            [0u64.to_be_bytes(), zero.to_be_bytes()].concat()
        } else {
            ZERO.to_be_bytes().to_vec()
        };
        let target = if table.active { Target::ActiveL2 } else { Target::Nothing };
        if !self.may_write(target, at, bytes.len() as u64).await? {
            self.watch.line("ERROR: Overlap check failed");
            self.report.check_errors += 1;
            return Err(Errno::EIO);
        }
        let written = self.disk.write(at, &bytes).await;
        if let Err(e) = written {
            self.watch.line(&format!("ERROR: Failed to overwrite L2 table entry: {e}"));
            self.report.check_errors += 1;
            return Err(e);
        }
        self.report.fixed(1);
        Ok(true)
    }

    /// Adds the references of tables that were met more than once.
    async fn add_shared(&mut self) -> Result<(), Errno> {
        let seen = self.shared.drain().map(|(offset, seen)| (offset, seen.times));
        let mut shared: Vec<_> = seen.filter(|(_, times)| *times > 0).collect();
        shared.sort_unstable();
        for (offset, times) in shared {
            let words = self.read_l2(offset).await?;
            for index in 0..words.len() >> (self.g.l2_entry_bits() - 3) {
                let Entry { word, .. } = self.entry(&words, index);
                let (at, len) = match self.kind(word) {
                    Kind::Compressed => self.compressed_range(word),
                    Kind::Allocated => (word & OFFSET_MASK, self.g.cluster_size()),
                    Kind::Zero | Kind::Unallocated => continue,
                };
                if !self.g.data_file {
                    self.reference_times(at, len, times);
                }
            }
        }
        Ok(())
    }

    fn walk_crypto(&mut self) {
        use super::super::header::Extension;
        let crypto = self.header.extensions.iter().find_map(|e| match e {
            Extension::Crypto { offset, len } => Some((offset.0, *len)),
            _ => None,
        });
        if let Some((offset, len)) = crypto {
            self.reference(offset, len);
        }
    }

    /// Counts the references to refcount blocks, and judges the entries of the refcount table.
    fn walk_refblocks(&mut self, fix: Fix) {
        for index in 0..self.refcounts.table.len() {
            let entry = self.refcounts.table[index];
            if entry == 0 {
                continue;
            }
            let offset = entry & REFTABLE_OFFSET_MASK;
            let outside = offset >> self.g.cluster_bits >= self.clusters;
            let wrong = if entry & !REFTABLE_OFFSET_MASK != 0 {
                Some(format!("ERROR refcount table entry {index} has reserved bits set"))
            } else if !offset.is_multiple_of(self.g.cluster_size()) {
                Some(format!(
                    "ERROR refcount block {index} is not cluster aligned; refcount table entry \
                     corrupted"
                ))
            } else if outside {
                // QEMU makes the file longer here, and then builds new structures all the same.
                Some(format!("{} refcount block {index} is outside image", verb(fix)))
            } else {
                self.walk_refblock(index, offset)
            };
            if let Some(wrong) = wrong {
                self.watch.line(&wrong);
                self.report.corruptions += 1;
                self.must_rebuild |= !outside || fix == Fix::All;
            }
        }
    }

    fn walk_refblock(&mut self, index: usize, offset: u64) -> Option<String> {
        self.reference(offset, self.g.cluster_size());
        let count = self.refs.get(offset >> self.g.cluster_bits);
        (count != 1).then(|| format!("ERROR refcount block {index} refcount={count}"))
    }
}

/// How a finding begins that `fix` may repair.
pub(super) fn verb(fix: Fix) -> &'static str {
    if fix == Fix::All { "Repairing" } else { "ERROR" }
}
