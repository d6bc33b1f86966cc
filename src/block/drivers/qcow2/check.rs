//! Checks an image's metadata, and repairs it: what `qemu-img check` does, in its words and with its counts.
//!
//! One check walks over everything that the header leads to and counts how often each host cluster is referenced
//! (`walk`, `snapshots`, `bitmaps`), compares that with the refcounts in the image (`compare`), builds new refcount structures if the
//! old ones are beyond repair (`rebuild`), and looks at the COPIED flags (`copied`). It works on the `file` node alone, through
//! [`Node::submit`], so it runs on a simulated disk as well as on a file; backing and data files are not looked at.
//!
//! **Who may call it**: nobody else writes the file meanwhile, and nobody has cached metadata of it: a repair changes the header
//! (refcount table, snapshot table, feature bits), so a driver checks before it reads anything, or reads it again.
//!
//! **Bounds.** Memory: the L1 and refcount tables (QEMU's limits: 32 MiB and 8 MiB), one snapshot's L1 table, the snapshot
//! table (64 MiB), 16 MiB of refcount pages, and the counters of `counts`. Time: an L2 table is examined once
//! however often it is shared, so that the work follows the file's length and not what a hostile image claims.
//!
//! **A power cut during a repair** leaves an image that can be repaired again:
//! * refcounts are corrected in place: each of them is either still wrong or right;
//! * COPIED flags are written after the refcounts that they speak of are stable;
//! * new refcount structures go to clusters that nothing references, and are stable before the header points to them; until
//!   then the old ones are untouched. The old ones are freed after that;
//! * the same for the snapshot table;
//! * the dirty and corrupt bits are cleared last, when everything else is stable.
#![forbid(unsafe_code)]

mod bitmaps;
mod compare;
mod copied;
mod counts;
pub(super) mod disk;
mod overlap;
mod rebuild;
mod refcounts;
mod snapshots;
mod walk;

use std::collections::HashMap;
use std::rc::Rc;

pub(super) use bitmaps::{judge_directory, mark_in_use};
use counts::Counts;
pub(super) use disk::Disk;
use overlap::Metadata;
use refcounts::Refcounts;
use snapshots::Snapshots;
pub(super) use snapshots::{SnapshotTable, read as read_snapshots};
pub(super) use walk::l1_budget;

use super::header::{Autoclear, Header, Incompatible, Purpose};
use super::header_io::HeaderIo;
use super::layout::Geometry;
use crate::block::Node;
use crate::error::{Errno, Error};

/// The most host clusters that are looked at (QEMU's limit); larger files give EFBIG.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// Before a repair: the journal of a process that was killed with this image open is of the past then. Whether there may be one.
///
/// # Errors
/// The header cannot be written.
pub async fn give_up_journal(file: &Node, header: &Header) -> Result<bool, Errno> {
    let owned = header.autoclear.intersects(Autoclear::JOURNAL);
    if owned {
        let bits = header.autoclear - Autoclear::JOURNAL;
        HeaderIo::new(header).set_autoclear(file, bits).await?;
    }
    Ok(owned)
}

/// What may be repaired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fix {
    /// Nothing: the image is only read.
    Nothing,
    /// Clusters that are allocated but not used.
    Leaks,
    /// Whatever can be repaired.
    All,
}

/// What a check found. The counts are QEMU's (`ImageCheck`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Errors that are still there.
    pub corruptions: u64,
    /// Leaked clusters that are still there.
    pub leaks: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Errors that were repaired.
    pub corruptions_fixed: u64,
    /// Leaked clusters that were freed.
    pub leaks_fixed: u64,
    /// Where the last cluster in use ends, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those of them that are allocated.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow the one before.
    pub fragmented_clusters: u64,
    /// Allocated clusters that are compressed.
    pub compressed_clusters: u64,
}

impl Report {
    /// Whether nothing is wrong with the image.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    /// Adds the counts of what was found and repaired.
    fn add(&mut self, other: &Report) {
        self.corruptions += other.corruptions;
        self.leaks += other.leaks;
        self.check_errors += other.check_errors;
        self.corruptions_fixed += other.corruptions_fixed;
        self.leaks_fixed += other.leaks_fixed;
    }

    /// One of the corruptions is repaired.
    fn fixed(&mut self, count: u64) {
        self.corruptions -= count;
        self.corruptions_fixed += count;
    }
}

/// Who wants to know what a check finds while it goes on.
pub trait Watch {
    /// One finding, in QEMU's words, without the end of the line.
    fn line(&mut self, text: &str);

    /// One finding that QEMU reports as an error of the program, with its name in front.
    fn error(&mut self, text: &str) {
        self.line(text);
    }

    /// `done` of `total` steps are done. `total` may change.
    fn progress(&mut self, done: u64, total: u64) {
        let _ = (done, total);
    }
}

/// Writes findings to the log, as a driver does that repairs an image while it opens it: the first ones, and at the end
/// how many more there were.
#[derive(Default)]
pub struct Log {
    findings: u64,
}

impl Log {
    /// How many findings go to the log: a lost L2 table alone means thousands of them.
    pub const MAX: u64 = 100;
}

impl Watch for Log {
    fn line(&mut self, text: &str) {
        self.findings += 1;
        if self.findings <= Log::MAX {
            log::warn!("qcow2: {text}");
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let more = self.findings.saturating_sub(Log::MAX);
        if more > 0 {
            log::warn!("qcow2: {more} more findings of this kind are not told");
        }
    }
}

/// Reads the header of the image in `file` as [`check`] wants it.
///
/// # Errors
/// In QEMU's words: it is not qcow2, or so broken that a check cannot begin.
pub async fn read_header(file: &Node) -> crate::error::Result<Header> {
    let cluster0 = Disk::new(file).read_cluster0().await;
    let cluster0 = cluster0.map_err(|e| Error::from_errno("Could not read qcow2 header", e))?;
    Header::read(&cluster0, Purpose::Check)
}

/// Checks the image in `file`, whose header is `header` (see [`read_header`]), and repairs what `fix` allows.
///
/// After a repair, check again with [`Fix::Nothing`] for the final verdict, as `qemu-img` does.
///
/// # Errors
/// The check cannot be finished: an I/O error, tables that are beyond all limits. What was found before was told to `watch`.
pub async fn check(
    file: &Node,
    header: &Header,
    fix: Fix,
    watch: &mut dyn Watch,
) -> Result<Report, Errno> {
    let mut check = Box::new(Check::new(Disk::new(file), header.clone(), fix, watch));
    Box::pin(check.run()).await
}

/// A check in progress.
struct Check<'a> {
    disk: Disk<'a>,
    header: Header,
    g: Geometry,
    fix: Fix,
    watch: &'a mut dyn Watch,
    /// What was found so far, but for the snapshot table.
    report: Report,
    /// Host clusters of the file.
    clusters: u64,
    /// The highest cluster in use.
    highest: u64,
    /// References found.
    refs: Counts,
    /// Refcounts in the image.
    refcounts: Refcounts<'a>,
    /// The active L1 table.
    l1: Rc<[u64]>,
    snapshots: Snapshots,
    /// L2 tables met so far.
    shared: HashMap<u64, walk::Seen>,
    /// Entries of tables met before that may be examined again.
    patience: u64,
    /// Bytes of L1 tables that may still be walked.
    l1_budget: u64,
    /// The refcount structures must be built anew.
    must_rebuild: bool,
    /// "Image is corrupt" has been said.
    said_corrupt: bool,
    /// Clusters with metadata, once they were needed.
    metadata: Option<Metadata>,
    /// Steps done, and steps in all, about.
    done: u64,
    total: u64,
}

impl<'a> Check<'a> {
    fn new(disk: Disk<'a>, header: Header, fix: Fix, watch: &'a mut dyn Watch) -> Check<'a> {
        let g = header.geometry();
        let clusters = disk.len().div_ceil(g.cluster_size());
        let report = Report { total_clusters: total_clusters(&header), ..Report::default() };
        Check {
            disk,
            g,
            fix,
            watch,
            report,
            clusters,
            highest: 0,
            refs: Counts::new(g.refcount_max()),
            refcounts: Refcounts::new(disk, g, Vec::new()),
            l1: Rc::new([]),
            snapshots: Snapshots::default(),
            shared: HashMap::new(),
            patience: walk::PATIENCE,
            l1_budget: walk::l1_budget(disk.len()),
            must_rebuild: false,
            said_corrupt: false,
            metadata: None,
            done: 0,
            total: 0,
            header,
        }
    }

    /// The whole check.
    async fn run(&mut self) -> Result<Report, Errno> {
        self.load().await?;
        if self.fix != Fix::Nothing {
            self.clear_unknown_autoclear().await?;
        }
        let mut found = self.read_snapshots().await?;
        self.check_refcounts().await?;
        if found.corruptions > 0 && self.fix == Fix::All {
            self.write_snapshots().await?;
            found.fixed(found.corruptions);
        }
        let mut report = self.report;
        report.add(&found);
        if self.fix != Fix::Nothing {
            self.refcounts.flush().await?;
            if report.check_errors == 0 && report.corruptions == 0 {
                self.clear_dirty_and_corrupt().await?;
            }
        }
        Ok(report)
    }

    /// The tables that are kept in memory.
    async fn load(&mut self) -> Result<(), Errno> {
        let entries = self.header.l1_size as usize;
        self.l1 = self.disk.read_words(self.header.l1_table_offset.0, entries).await?.into();
        let entries = self.reftable_bytes() / 8;
        let entries = usize::try_from(entries).map_err(|_| Errno(libc::EFBIG))?;
        let offset = self.header.refcount_table_offset.0;
        self.refcounts.table = self.disk.read_words(offset, entries).await?;
        if self.clusters > MAX_CLUSTERS {
            return Err(Errno(libc::EFBIG));
        }
        let active = self.l1.iter().filter(|entry| **entry != 0).count();
        self.total = 2 * active as u64 + self.clusters / counts::CHUNK + 1;
        Ok(())
    }

    /// Length in bytes of the refcount table.
    fn reftable_bytes(&self) -> u64 {
        u64::from(self.header.refcount_table_clusters) << self.g.cluster_bits
    }

    async fn check_refcounts(&mut self) -> Result<(), Errno> {
        self.count_references(self.fix).await?;
        let before = self.report;
        self.compare(Fix::Nothing).await?;
        if self.must_rebuild && self.fix == Fix::All {
            self.rebuild_and_compare().await?;
        } else if self.fix != Fix::Nothing {
            if self.must_rebuild {
                self.watch.line("ERROR need to rebuild refcount structures");
                return Err(Errno::EIO);
            }
            if self.report.leaks > 0 || self.report.corruptions > 0 {
                self.report = before;
                self.compare(self.fix).await?;
                self.refcounts.flush().await?;
            }
        }
        self.check_copied().await?;
        self.report.image_end_offset = (self.highest + 1) << self.g.cluster_bits;
        Ok(())
    }

    async fn rebuild_and_compare(&mut self) -> Result<(), Errno> {
        let old = self.report;
        self.watch.line("Rebuilding refcount structure");
        self.rebuild().await?;
        self.report.corruptions = 0;
        self.report.leaks = 0;
        // Whatever kept refcounts from being read is gone.
        self.report.check_errors = 0;
        self.must_rebuild = false;
        self.count_references(Fix::Nothing).await?;
        let found = std::mem::take(&mut self.report);
        self.compare(Fix::Leaks).await?;
        self.refcounts.flush().await?;
        if self.must_rebuild {
            self.watch.line("ERROR rebuilt refcount structure is still broken");
        }
        // These leaks were the old structures: not worth a word to the user, unless they are still there. New corruptions
        // come from entries that led beyond the end of the file, to where the new structures are now.
        let fresh = self.report;
        self.report = found;
        self.report.corruptions_fixed += old.corruptions.saturating_sub(found.corruptions);
        self.report.leaks_fixed += old.leaks.saturating_sub(found.leaks);
        self.report.leaks += fresh.leaks;
        self.report.corruptions += fresh.corruptions;
        Ok(())
    }

    /// Who writes an image and does not know an autoclear bit clears it first.
    async fn clear_unknown_autoclear(&mut self) -> Result<(), Errno> {
        let known = self.header.autoclear & Autoclear::KNOWN;
        if self.header.version < 3 || known == self.header.autoclear {
            return Ok(());
        }
        self.disk.write(88, &known.bits().to_be_bytes()).await?;
        self.disk.flush().await?;
        self.header.autoclear = known;
        Ok(())
    }

    async fn clear_dirty_and_corrupt(&mut self) -> Result<(), Errno> {
        let bits = self.header.incompatible - Incompatible::DIRTY - Incompatible::CORRUPT;
        if bits == self.header.incompatible {
            return Ok(());
        }
        self.set_incompatible(bits).await
    }

    async fn set_incompatible(&mut self, bits: Incompatible) -> Result<(), Errno> {
        if self.header.version > 2 {
            self.disk.flush().await?;
            self.disk.write(72, &bits.bits().to_be_bytes()).await?;
            self.disk.flush().await?;
            self.header.incompatible = bits;
        }
        Ok(())
    }

    /// Says, once, that the image is corrupt. An image that is being repaired is marked so if `fatal`.
    async fn signal_corruption(&mut self, fatal: bool, what: &str) -> Result<(), Errno> {
        let fatal = fatal && self.fix != Fix::Nothing;
        let marked = self.header.incompatible.contains(Incompatible::CORRUPT);
        if self.said_corrupt && (!fatal || marked) {
            return Ok(());
        }
        self.said_corrupt = true;
        if !fatal {
            self.watch.line(&format!(
                "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
            ));
            return Ok(());
        }
        self.watch.line(&format!(
            "qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"
        ));
        self.set_incompatible(self.header.incompatible | Incompatible::CORRUPT).await
    }

    /// One more step is done.
    fn step(&mut self) {
        self.done += 1;
        self.watch.progress(self.done.min(self.total), self.total);
    }
}

fn total_clusters(header: &Header) -> u64 {
    let sectors = header.size.div_ceil(512).saturating_mul(512);
    header.geometry().clusters_for(sectors)
}
