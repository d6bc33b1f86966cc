//! Checks the COPIED flags of the active L1 and L2 tables: set where the refcount is one, and only there.
#![forbid(unsafe_code)]

use super::super::layout::{COPIED, OFFSET_MASK};
use super::disk::words_of;
use super::overlap::Target;
use super::walk::{Kind, PATIENCE, Seen};
use super::{Check, Fix};
use crate::error::Errno;

impl Check<'_> {
    /// Checks all flags, after the refcounts.
    pub(super) async fn check_copied(&mut self) -> Result<(), Errno> {
        let repair = match self.fix {
            Fix::Nothing => false,
            // The refcounts can be trusted if nothing is wrong with them any more.
            Fix::Leaks => self.report.is_clean(),
            Fix::All => true,
        };
        self.shared.clear();
        self.patience = PATIENCE;
        for index in 0..self.l1.len() {
            if self.l1[index] & OFFSET_MASK != 0 {
                self.check_l1_entry(index, repair).await?;
                self.visit_l2_flags(self.l1[index] & OFFSET_MASK, repair).await?;
                self.step();
            }
        }
        Ok(())
    }

    /// As in the walk: a table is examined again only if there is something to tell again, and not for ever.
    async fn visit_l2_flags(&mut self, offset: u64, repair: bool) -> Result<(), Errno> {
        if let Some(seen) = self.shared.get(&offset) {
            if seen.is_clean() || self.patience < self.g.l2_entries() {
                return Ok(());
            }
            self.patience -= self.g.l2_entries();
        }
        let before = self.report.corruptions;
        self.check_l2_table(offset, repair).await?;
        let clean = before == self.report.corruptions;
        self.shared.insert(offset, Seen::new(clean));
        Ok(())
    }

    async fn check_l1_entry(&mut self, index: usize, repair: bool) -> Result<(), Errno> {
        let entry = self.l1[index];
        let cluster = (entry & OFFSET_MASK) >> self.g.cluster_bits;
        let Some(count) = self.stored(cluster, false).await? else { return Ok(()) };
        if (count == 1) == (entry & COPIED != 0) {
            return Ok(());
        }
        self.report.corruptions += 1;
        let verb = if repair { "Repairing" } else { "ERROR" };
        self.watch.line(&format!(
            "{verb} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}"
        ));
        if repair {
            let at = self.header.l1_table_offset.0 + 8 * index as u64;
            if let Err(e) = self.write_l1_entry(at, entry ^ COPIED).await {
                self.report.check_errors += 1;
                return Err(e);
            }
            self.report.fixed(1);
        }
        Ok(())
    }

    async fn write_l1_entry(&mut self, at: u64, entry: u64) -> Result<(), Errno> {
        if !self.may_write(Target::ActiveL1, at, 8).await? {
            return Err(Errno::EIO);
        }
        self.disk.write(at, &entry.to_be_bytes()).await
    }

    async fn check_l2_table(&mut self, offset: u64, repair: bool) -> Result<(), Errno> {
        let mut bytes = match self.disk.read(offset, 1 << self.g.cluster_bits).await {
            Ok(bytes) => bytes,
            Err(e) => return self.l2_failed(&format!("ERROR: Could not read L2 table: {e}"), e),
        };
        let words: Vec<u64> = words_of(&bytes).collect();
        let mut changed = 0;
        for at in (0..words.len()).step_by(1 << (self.g.l2_entry_bits() - 3)) {
            let entry = words[at];
            if entry == 0 || self.kind(entry) != Kind::Allocated {
                continue;
            }
            let cluster = (entry & OFFSET_MASK) >> self.g.cluster_bits;
            let count =
                if self.g.data_file { Some(1) } else { self.stored(cluster, false).await? };
            let Some(count) = count else { continue };
            if (count == 1) == (entry & COPIED != 0) {
                continue;
            }
            self.report.corruptions += 1;
            let verb = if repair { "Repairing" } else { "ERROR" };
            self.watch.line(&format!(
                "{verb} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}"
            ));
            if repair {
                bytes[8 * at..8 * at + 8].copy_from_slice(&(entry ^ COPIED).to_be_bytes());
                changed += 1;
            }
        }
        if changed > 0 {
            self.write_l2_table(offset, &bytes).await?;
            self.report.fixed(changed);
        }
        Ok(())
    }

    async fn write_l2_table(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        if !self.may_write(Target::ActiveL2, offset, bytes.len() as u64).await? {
            let (what, e) = ("metadata overlap check failed", Errno::EIO);
            return self.l2_failed(&format!("ERROR: Could not write L2 table; {what}: {e}"), e);
        }
        match self.disk.write(offset, bytes).await {
            Ok(()) => Ok(()),
            Err(e) => self.l2_failed(&format!("ERROR: Could not write L2 table: {e}"), e),
        }
    }

    fn l2_failed(&mut self, line: &str, e: Errno) -> Result<(), Errno> {
        self.watch.line(line);
        self.report.check_errors += 1;
        Err(e)
    }
}
