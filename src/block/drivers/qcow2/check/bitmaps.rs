//! Counts the references of persistent bitmaps.
//!
//! A bitmap directory or table that breaks the specification ends the check, as it does in QEMU: what the bitmaps occupy
//! cannot be told, so neither can what is leaked.
#![forbid(unsafe_code)]

use super::super::header::BitmapsExtension;
use super::Check;
use crate::error::Errno;

/// The fixed part of a directory entry in bytes.
const ENTRY: usize = 24;
/// The most entries of a bitmap table (QEMU's limit).
const TABLE_MAX: u32 = 0x800_0000;
/// The most bytes of a bitmap (QEMU's limit).
const BITMAP_MAX: u64 = 0x2000_0000;
/// Bits of a table entry that must be 0.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// The offset in a table entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The bitmap was not saved: its size need not fit the disk's.
const IN_USE: u32 = 1;

/// Where a bitmap's table is.
struct Table {
    offset: u64,
    entries: u32,
}

impl Check<'_> {
    /// Counts the references of the directory and of all bitmaps.
    pub(super) async fn walk_bitmaps(&mut self) -> Result<(), Errno> {
        let Some(extension) = self.header.bitmaps() else { return Ok(()) };
        self.reference(extension.directory_offset.0, extension.directory_size);
        let len = usize::try_from(extension.directory_size).map_err(|_| Errno(libc::EFBIG))?;
        let bytes = self.disk.read(extension.directory_offset.0, len).await;
        let tables = bytes.ok().and_then(|bytes| self.tables(&bytes, extension));
        let Some(tables) = tables else {
            self.report.corruptions += 1;
            return Err(Errno::EINVAL);
        };
        for table in tables {
            self.reference(table.offset, 8 * u64::from(table.entries));
            self.walk_bitmap(&table).await?;
        }
        Ok(())
    }

    async fn walk_bitmap(&mut self, table: &Table) -> Result<(), Errno> {
        let entries = self.disk.read_words(table.offset, table.entries as usize).await?;
        let size = self.g.cluster_size();
        let bad = |entry: &u64| {
            let offset = entry & OFFSET;
            entry & RESERVED != 0 || offset != 0 && (entry & 1 != 0 || !offset.is_multiple_of(size))
        };
        if entries.iter().any(bad) {
            self.report.corruptions += 1;
            return Err(Errno::EINVAL);
        }
        for entry in entries.into_iter().filter(|entry| entry & OFFSET != 0) {
            self.reference(entry & OFFSET, size);
        }
        Ok(())
    }

    /// The bitmaps' tables; `None` if the directory breaks the specification.
    fn tables(&self, bytes: &[u8], extension: BitmapsExtension) -> Option<Vec<Table>> {
        let (mut tables, mut rest) = (Vec::new(), bytes);
        while !rest.is_empty() {
            let fixed = rest.get(..ENTRY)?;
            let name = u16::from_be_bytes([fixed[18], fixed[19]]) as usize;
            let extra = u32::from_be_bytes([fixed[20], fixed[21], fixed[22], fixed[23]]) as usize;
            let len = ENTRY.checked_add(name)?.checked_add(extra)?.next_multiple_of(8);
            rest = rest.get(len..)?;
            if extra != 0 || name > 1023 || tables.len() == extension.count as usize {
                return None;
            }
            tables.push(self.table(fixed)?);
        }
        (tables.len() == extension.count as usize).then_some(tables)
    }

    fn table(&self, fixed: &[u8]) -> Option<Table> {
        let offset = u64::from_be_bytes(fixed[..8].try_into().ok()?);
        let entries = u32::from_be_bytes(fixed[8..12].try_into().ok()?);
        let flags = u32::from_be_bytes(fixed[12..16].try_into().ok()?);
        let (kind, granularity) = (fixed[16], fixed[17]);
        let bytes = u64::from(entries) << self.g.cluster_bits;
        let well_formed = entries != 0
            && entries <= TABLE_MAX
            && offset != 0
            && offset.is_multiple_of(self.g.cluster_size())
            && (9..=31).contains(&granularity)
            && flags & !3 == 0
            && kind == 1
            && bytes <= BITMAP_MAX;
        let covered = (u128::from(bytes) * 8) << granularity;
        let fits = flags & IN_USE != 0 || u128::from(self.header.size) <= covered;
        (well_formed && fits).then_some(Table { offset, entries })
    }
}
