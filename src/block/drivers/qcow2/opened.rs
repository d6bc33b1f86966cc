//! Opening for writing: what it changes in the image, and what the write path starts from.
//!
//! In QEMU's order: the refcount table, the snapshot table and the bitmap directory are read and judged, an image that was
//! not closed properly is repaired, bitmaps are marked as not kept up to date, and unknown feature bits are cleared.
//! Everything is stable before the node is open.
//! Nothing here is called for a node that is opened to be read only, but for [`judge`].
#![forbid(unsafe_code)]

use std::ops::Range;

use super::check::{self, Disk, Fix, Log, SnapshotTable};
use super::header::{Autoclear, Header, Incompatible, MAX_L1_SIZE, Purpose};
use super::header_io::HeaderIo;
use super::l1::L1Table;
use super::layout::{HostOffset, OFFSET_MASK, REFTABLE_OFFSET_MASK};
use super::open::{read_header, read_l1};
use super::options::Overlap;
use super::replay;
use crate::block::Node;
use crate::err;
use crate::error::{Errno, Error, Result};
use crate::rt;

/// What is read of an image that is opened for writing.
pub struct Found {
    /// The header.
    pub header: Header,
    /// The active L1 table.
    pub l1: L1Table,
    /// The refcount table.
    pub reftable: Vec<u64>,
    /// The snapshot table.
    pub snapshots: SnapshotTable,
}

/// What the write path starts from.
pub struct ForWriting {
    /// What writes the header from now on.
    pub header: HeaderIo,
    /// The refcount table's entries, as written.
    pub reftable: Vec<u64>,
    /// The host clusters of metadata that is never data: the kinds that `overlap-check` chooses, each kind in order.
    pub tables: Vec<(Range<u64>, Overlap)>,
}

/// Reads the snapshot table and judges the bitmap directory, for whatever purpose the image is opened.
///
/// # Errors
/// In QEMU's words.
pub fn judge(file: &Node, header: &Header) -> Result<SnapshotTable> {
    rt::block_on(async {
        let snapshots = check::read_snapshots(file, header).await?;
        check::judge_directory(file, header).await?;
        Ok(snapshots)
    })
}

/// The refcount table. One that is not wholly in the file is an error: QEMU would take the rest for empty, and write
/// over clusters that are in use.
///
/// # Errors
/// It cannot be read.
pub fn read_reftable(file: &Node, header: &Header) -> Result<Vec<u64>> {
    let bytes = u64::from(header.refcount_table_clusters) << header.cluster_bits;
    let HostOffset(offset) = header.refcount_table_offset;
    if offset + bytes > file.len() {
        return Err(err!(
            "Could not initialize refcount handling: the refcount table lies beyond the end of the \
             image file"
        ));
    }
    let entries = usize::try_from(bytes / 8).map_err(|_| Errno(libc::ENOMEM));
    entries
        .and_then(|entries| rt::block_on(Disk::new(file).read_words(offset, entries)))
        .map_err(|e| Error::from_errno("Could not initialize refcount handling", e))
}

impl Found {
    /// Everything, of an image that was just repaired.
    fn read(file: &Node) -> Result<Found> {
        let header = Header::read(&read_header(file)?, Purpose::Write)?;
        let l1 = read_l1(file, &header)?;
        let reftable = read_reftable(file, &header)?;
        let snapshots = judge(file, &header)?;
        Ok(Found { header, l1, reftable, snapshots })
    }

    /// Makes the image writable: repairs it if it was not closed properly, or the journal wants it, marks its bitmaps, clears
    /// the feature bits that nobody here knows, and begins the journal. The header and the L1 table may be others afterwards.
    ///
    /// # Errors
    /// `Could not repair dirty image`; the header cannot be written; tables of a repaired image cannot be read.
    pub fn into_writable(
        mut self,
        file: &Node,
        overlap: Overlap,
        left: &replay::Opened,
    ) -> Result<(Header, L1Table, ForWriting)> {
        if left.replayed {
            self = Found::read(file)?;
        }
        if left.recount || self.header.incompatible.contains(Incompatible::DIRTY) {
            repair(file, &self.header)?;
            self = Found::read(file)?;
        }
        let state = left.begin(&self.header);
        let io = HeaderIo::new(&self.header);
        give_up_bitmaps(file, &self.header)?;
        set_autoclear(file, &io, &mut self.header, state)?;
        let tables = self.tables(file, overlap)?;
        let Found { header, l1, reftable, .. } = self;
        Ok((header, l1, ForWriting { header: io, reftable, tables }))
    }

    /// The clusters of metadata, by the kinds in `overlap`.
    fn tables(&self, file: &Node, overlap: Overlap) -> Result<Vec<(Range<u64>, Overlap)>> {
        let (header, cluster) = (&self.header, self.header.geometry().cluster_size());
        let mut tables = Tables { cluster, overlap, list: Vec::new() };
        tables.add(Overlap::MAIN_HEADER, [(0, cluster)]);
        let l1 = (header.l1_table_offset.0, self.l1.len() * 8);
        tables.add(Overlap::ACTIVE_L1, [l1]);
        let l2 = (0..self.l1.len()).map(|index| (self.l1.get(index) & OFFSET_MASK, cluster));
        tables.add(Overlap::ACTIVE_L2, l2.filter(|(offset, _)| *offset != 0));
        let refblocks = self.reftable.iter().map(|entry| (entry & REFTABLE_OFFSET_MASK, cluster));
        tables.add(Overlap::REFCOUNT_BLOCK, refblocks.filter(|(offset, _)| *offset != 0));
        let reftable = (header.refcount_table_offset.0, self.reftable.len() as u64 * 8);
        tables.add(Overlap::REFCOUNT_TABLE, [reftable]);
        tables.add(Overlap::SNAPSHOT_TABLE, [(header.snapshots_offset.0, self.snapshots.len)]);
        let inactive = self.snapshots.l1_tables.iter();
        let inactive = inactive.map(|(offset, entries)| (offset.0, u64::from(*entries) * 8));
        tables.add(Overlap::INACTIVE_L1, inactive);
        if overlap.contains(Overlap::INACTIVE_L2) {
            let l2 = self.inactive_l2(file)?;
            tables.add(Overlap::INACTIVE_L2, l2.into_iter().map(|offset| (offset, cluster)));
        }
        let directory = header.bitmaps().map(|b| (b.directory_offset.0, b.directory_size));
        tables.add(Overlap::BITMAP_DIRECTORY, directory);
        Ok(tables.list)
    }

    /// The offsets of the L2 tables of snapshots. Broken L1 tables, and those that are more than there can be without
    /// overlapping, are left out, as a check leaves them out.
    fn inactive_l2(&self, file: &Node) -> Result<Vec<u64>> {
        let mut budget = check::l1_budget(file.len());
        let (geometry, disk) = (self.header.geometry(), Disk::new(file));
        let mut found = Vec::new();
        for (offset, entries) in &self.snapshots.l1_tables {
            let bytes = u64::from(*entries) * 8;
            let sound = geometry.is_cluster_aligned(*offset) && bytes <= MAX_L1_SIZE;
            if !sound || bytes > budget {
                log::warn!("qcow2: the L1 table of a snapshot at {:#x} is broken", offset.0);
                continue;
            }
            budget -= bytes;
            let words = rt::block_on(disk.read_words(offset.0, *entries as usize))
                .map_err(|e| Error::from_errno("Could not read L1 table of a snapshot", e))?;
            found.extend(words.iter().map(|word| word & OFFSET_MASK).filter(|at| *at != 0));
            // Snapshots share most of their tables.
            found.sort_unstable();
            found.dedup();
        }
        Ok(found)
    }
}

/// Collects tables.
struct Tables {
    cluster: u64,
    overlap: Overlap,
    list: Vec<(Range<u64>, Overlap)>,
}

impl Tables {
    /// Adds the tables of one kind, by offset and length in bytes; neighbours become one.
    fn add(&mut self, kind: Overlap, tables: impl IntoIterator<Item = (u64, u64)>) {
        if !self.overlap.contains(kind) {
            return;
        }
        let tables = tables.into_iter().filter(|(_, len)| *len > 0);
        let clusters = |(offset, len): (u64, u64)| {
            offset / self.cluster..offset.saturating_add(len).div_ceil(self.cluster)
        };
        let mut ranges: Vec<Range<u64>> = tables.map(clusters).collect();
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.dedup_by(|next, before| {
            let joined = next.start <= before.end;
            if joined {
                before.end = before.end.max(next.end);
            }
            joined
        });
        self.list.extend(ranges.into_iter().map(|range| (range, kind)));
    }
}

/// Makes refcounts right that were behind when the image was last in use.
fn repair(file: &Node, header: &Header) -> Result<()> {
    log::warn!("qcow2: the image was not closed properly: its refcounts are checked");
    let mut log = Log::default();
    let report = rt::block_on(check::check(file, header, Fix::All, &mut log));
    drop(log);
    match report {
        Ok(report) if report.check_errors == 0 => {
            if report.corruptions > 0 {
                // As in QEMU: the bit stays, and so do entries that requests will fail at.
                log::warn!("qcow2: {} errors could not be repaired", report.corruptions);
            }
            Ok(())
        }
        Ok(_) => Err(Error::from_errno("Could not repair dirty image", Errno::EIO)),
        Err(e) => Err(Error::from_errno("Could not repair dirty image", e)),
    }
}

/// The image's bitmaps do not learn of what is written from now on: they say so, as they do while QEMU has the image open.
/// Their autoclear bit stays: it vouches for the directory, and without it their clusters would count as leaked.
fn give_up_bitmaps(file: &Node, header: &Header) -> Result<()> {
    let marked = rt::block_on(check::mark_in_use(file, header))?;
    if marked > 0 {
        log::warn!(
            "qcow2: {marked} persistent bitmaps are not kept up to date: from now on they are \
             inconsistent"
        );
    }
    Ok(())
}

/// Who writes and does not know what an autoclear bit vouches for clears the bit first. A raw data file stays raw,
/// because guest offsets are host offsets there. `journal`: what the image says of its journal from now on.
fn set_autoclear(
    file: &Node,
    io: &HeaderIo,
    header: &mut Header,
    journal: Autoclear,
) -> Result<()> {
    let mut kept = header.autoclear & Autoclear::KNOWN;
    kept.set(Autoclear::BITMAPS, header.bitmaps().is_some());
    let wanted = kept | journal;
    if wanted != header.autoclear {
        let vouches = !((wanted ^ header.autoclear) - Autoclear::JOURNAL).is_empty();
        let set = async {
            match vouches {
                true => io.set_autoclear(file, wanted).await,
                false => io.set_journal(file, wanted).await,
            }
        };
        rt::block_on(set).map_err(|e| Error::from_errno("Could not update qcow2 header", e))?;
    }
    // What it shall be in the end.
    header.autoclear = kept;
    Ok(())
}

#[cfg(test)]
#[path = "opened_tests.rs"]
mod tests;
