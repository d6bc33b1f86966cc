//! The snapshot table: reading it, counting what it leads to, writing a new one.
#![forbid(unsafe_code)]

use super::super::header::{Header, MAX_L1_SIZE, MAX_SNAPSHOTS, SNAPSHOT_HEADER_SIZE};
use super::super::layout::{Hex, HostOffset};
use super::walk::verb;
use super::{Check, Disk, Fix, Report, Watch};
use crate::block::Node;
use crate::error::{Errno, Error};

/// The largest snapshot table in bytes (QEMU's limit).
const TABLE_MAX: u64 = 1024 * MAX_SNAPSHOTS;
/// The most extra data of a snapshot in bytes (QEMU's limit).
const EXTRA_MAX: u64 = 1024;
/// The extra data that QEMU knows: the VM state's size, the disk's size, the instruction count.
const EXTRA_KNOWN: u64 = 24;
/// What version 3 demands of it.
const EXTRA_V3: u64 = 16;
/// Where `nb_snapshots` is in the header; `snapshots_offset` follows.
const SNAPSHOT_FIELDS: u64 = 60;
/// How a check begins to say that the table cannot be read.
const FAILED: &str = "ERROR failed to read the snapshot table: ";

/// An entry of the table.
pub(super) struct Snapshot {
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    /// The rest of the fixed part: lengths, dates, clock, VM state.
    fixed: Vec<u8>,
    /// How much extra data the entry says it has (after repair).
    extra_len: u64,
    /// The extra data, up to [`EXTRA_MAX`].
    extra: Vec<u8>,
    id: Vec<u8>,
    name: Vec<u8>,
}

/// The table, and where it is.
#[derive(Default)]
pub(super) struct Snapshots {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) list: Vec<Snapshot>,
}

/// The snapshot table of an image that is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in super::super) struct SnapshotTable {
    /// Its length in bytes.
    pub len: u64,
    /// The L1 tables of the snapshots: offset and entries, as written.
    pub l1_tables: Vec<(HostOffset, u32)>,
}

/// Reads the snapshot table of the image in `file` as QEMU does when it opens an image.
///
/// # Errors
/// In QEMU's words.
pub(in super::super) async fn read(
    file: &Node,
    header: &Header,
) -> crate::error::Result<SnapshotTable> {
    let mut said = Said::default();
    let mut check = Box::new(Check::new(Disk::new(file), header.clone(), Fix::Nothing, &mut said));
    let read = Box::pin(check.read_snapshots()).await;
    let Snapshots { len, list, .. } = std::mem::take(&mut check.snapshots);
    drop(check);
    match (read, said) {
        (Ok(_), _) => {
            let l1_tables = list.iter().map(|s| (HostOffset(s.l1_offset), s.l1_size)).collect();
            Ok(SnapshotTable { len, l1_tables })
        }
        (Err(_), Said { error: Some(error), hint: None }) => Err(Error::new(error)),
        (Err(_), Said { error: Some(error), hint: Some(hint) }) => {
            Err(Error::new(error).with_hint(hint))
        }
        (Err(e), _) => Err(Error::from_errno("Failed to read snapshot table", e)),
    }
}

/// What a check says of a snapshot table that it cannot read.
#[derive(Default)]
struct Said {
    error: Option<String>,
    hint: Option<String>,
}

impl Watch for Said {
    fn error(&mut self, text: &str) {
        self.error = Some(text.strip_prefix(FAILED).unwrap_or(text).to_owned());
    }

    fn line(&mut self, text: &str) {
        if self.error.is_some() {
            self.hint = Some(text.to_owned());
        }
    }
}

/// What reading had to leave out, in repair.
#[derive(Default)]
struct Dropped {
    snapshots: u64,
    extra_data: u64,
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |n, b| n << 8 | u32::from(*b))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

impl Check<'_> {
    /// Reads the table and judges it.
    pub(super) async fn read_snapshots(&mut self) -> Result<Report, Errno> {
        let (mut found, mut dropped) = (Report::default(), Dropped::default());
        let mut count = u64::from(self.header.nb_snapshots);
        if count > MAX_SNAPSHOTS && self.fix == Fix::All {
            dropped.snapshots = count - MAX_SNAPSHOTS;
            let line = format!("Discarding {} overhanging snapshots", dropped.snapshots);
            self.watch.line(&line);
            count = MAX_SNAPSHOTS;
        }
        let (offset, entry) = (self.header.snapshots_offset, SNAPSHOT_HEADER_SIZE);
        let max = entry * MAX_SNAPSHOTS;
        if let Err(e) = self.header.check_table(offset, count, entry, max, "snapshot table") {
            self.watch.error(&format!("ERROR {e}"));
            if count > MAX_SNAPSHOTS {
                self.watch.line(&format!(
                    "You can force-remove all {} overhanging snapshots with qemu-img check -r all",
                    count - MAX_SNAPSHOTS
                ));
            }
            let errno = if count > MAX_SNAPSHOTS { libc::EFBIG } else { libc::EINVAL };
            return Err(Errno(errno));
        }
        self.read_table(offset.0, count, &mut dropped).await?;
        found.corruptions = dropped.snapshots + dropped.extra_data;
        if dropped.snapshots > 0 {
            self.write_snapshot_count().await?;
            found.fixed(dropped.snapshots);
        }
        if self.header.version > 2 {
            for (i, snapshot) in self.snapshots.list.iter().enumerate() {
                if snapshot.extra_len < EXTRA_V3 {
                    let verb = verb(self.fix);
                    found.corruptions += 1;
                    self.watch.line(&format!("{verb} snapshot table entry {i} is incomplete"));
                }
            }
        }
        Ok(found)
    }

    async fn write_snapshot_count(&mut self) -> Result<(), Errno> {
        let count = u32::try_from(self.snapshots.list.len()).unwrap_or(u32::MAX);
        let mut result = self.disk.write(SNAPSHOT_FIELDS, &count.to_be_bytes()).await;
        if result.is_ok() {
            result = self.disk.flush().await;
        }
        if let Err(e) = result {
            self.watch.line(&format!(
                "ERROR failed to update the snapshot count in the image header: {e}"
            ));
        }
        self.header.nb_snapshots = count;
        result
    }

    async fn read_table(
        &mut self,
        start: u64,
        count: u64,
        dropped: &mut Dropped,
    ) -> Result<(), Errno> {
        self.snapshots = Snapshots { offset: start, ..Snapshots::default() };
        let (mut at, mut len) = (start, 0u64);
        for i in 0..count {
            let before = at;
            at = at.next_multiple_of(8);
            len = len.next_multiple_of(8);
            let read = self.read_snapshot(i, &mut at, dropped).await;
            let snapshot = match read {
                Ok(snapshot) => snapshot,
                Err(e) => return Err(e),
            };
            len += SNAPSHOT_HEADER_SIZE
                + snapshot.extra_len
                + (snapshot.id.len() + snapshot.name.len()) as u64;
            if len > TABLE_MAX || at - start > u64::from(i32::MAX.unsigned_abs()) {
                let left = count - i;
                if self.fix != Fix::All {
                    self.snapshots_failed("Snapshot table is too big");
                    self.watch.line(&format!(
                        "You can force-remove all {left} overhanging snapshots with qemu-img check \
                         -r all"
                    ));
                    return Err(Errno(libc::EFBIG));
                }
                self.watch.line(&format!(
                    "Discarding {left} overhanging snapshots (snapshot table is too big)"
                ));
                dropped.snapshots += left;
                at = before;
                break;
            }
            self.snapshots.list.push(snapshot);
        }
        self.snapshots.len = at - start;
        Ok(())
    }

    fn snapshots_failed(&mut self, what: &str) {
        self.watch.error(&format!("{FAILED}{what}"));
    }

    async fn read_part(&mut self, at: u64, len: u64) -> Result<Vec<u8>, Errno> {
        let len = usize::try_from(len).map_err(|_| Errno::EIO)?;
        let read = self.disk.read(at, len).await;
        if let Err(e) = read {
            self.snapshots_failed(&format!("Failed to read snapshot table: {e}"));
        }
        read
    }

    /// Reads entry `i` at `at`, which moves to its end.
    async fn read_snapshot(
        &mut self,
        i: u64,
        at: &mut u64,
        dropped: &mut Dropped,
    ) -> Result<Snapshot, Errno> {
        let fixed = self.read_part(*at, SNAPSHOT_HEADER_SIZE).await?;
        *at += SNAPSHOT_HEADER_SIZE;
        let said = u64::from(be32(&fixed, 36));
        let extra_len = said.min(EXTRA_MAX);
        if said > EXTRA_MAX {
            if self.fix != Fix::All {
                self.snapshots_failed(&format!(
                    "Too much extra metadata in snapshot table entry {i}"
                ));
                self.watch
                    .line("You can force-remove this extra metadata with qemu-img check -r all");
                return Err(Errno(libc::EFBIG));
            }
            self.watch.line(&format!(
                "Discarding too much extra metadata in snapshot table entry {i} ({said} > \
                 {EXTRA_MAX})"
            ));
            dropped.extra_data += 1;
        }
        let extra = self.read_part(*at, extra_len).await?;
        *at += said;
        let (id_len, name_len) = (be32(&fixed, 12) >> 16, be32(&fixed, 12) & 0xffff);
        let id = self.read_part(*at, u64::from(id_len)).await?;
        *at += u64::from(id_len);
        let name = self.read_part(*at, u64::from(name_len)).await?;
        *at += u64::from(name_len);
        let (l1_offset, l1_size) = (be64(&fixed, 0), be32(&fixed, 8));
        Ok(Snapshot { l1_offset, l1_size, fixed, extra_len, extra, id, name })
    }

    /// Counts the references of all snapshots, and of the table itself.
    pub(super) async fn walk_snapshots(&mut self, fix: Fix) -> Result<(), Errno> {
        let count = self.snapshots.list.len();
        if self.g.data_file && count > 0 {
            self.watch.line(&format!("ERROR {count} snapshots in image with data file"));
            self.report.corruptions += 1;
        }
        for i in 0..count {
            let snapshot = &self.snapshots.list[i];
            let (offset, entries) = (snapshot.l1_offset, snapshot.l1_size);
            let bytes = 8 * u64::from(entries);
            let wrong = if !offset.is_multiple_of(self.g.cluster_size()) {
                Some(format!("l1_offset={}: L1 table is not cluster aligned", Hex(offset)))
            } else if bytes > MAX_L1_SIZE {
                Some(format!("l1_size={}: L1 table is too large", Hex(u64::from(entries))))
            } else if bytes > self.l1_budget {
                Some(format!("l1_offset={}: L1 tables overlap", Hex(offset)))
            } else {
                None
            };
            if let Some(wrong) = wrong {
                let (id, name) = (text(&snapshot.id), text(&snapshot.name));
                self.watch.line(&format!(
                    "ERROR snapshot {id} ({name}) {wrong}; snapshot table entry corrupted"
                ));
                self.report.corruptions += 1;
                continue;
            }
            self.l1_budget -= bytes;
            let l1 = match self.disk.read_words(offset, entries as usize).await {
                Ok(l1) => l1,
                Err(e) => {
                    self.watch.line("ERROR: I/O error in check_refcounts_l1");
                    self.report.check_errors += 1;
                    return Err(e);
                }
            };
            self.walk_l1(offset, &l1, false, fix).await?;
        }
        self.reference(self.snapshots.offset, self.snapshots.len);
        Ok(())
    }

    /// The table as QEMU writes it: every entry has the extra data that version 3 demands.
    fn table_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let sectors = self.header.size.div_ceil(512).saturating_mul(512);
        for s in &self.snapshots.list {
            out.resize(out.len().next_multiple_of(8), 0);
            let mut extra = s.extra.clone();
            if extra.len() < 8 {
                extra = u64::from(be32(&s.fixed, 32)).to_be_bytes().to_vec();
            }
            if extra.len() < 16 {
                extra.truncate(8);
                extra.extend(sectors.to_be_bytes());
            }
            if extra.len() < 24 {
                extra.truncate(16);
                // No instruction count.
                extra.extend(u64::MAX.to_be_bytes());
            }
            debug_assert!(extra.len() as u64 >= EXTRA_KNOWN);
            let mut fixed = s.fixed.clone();
            let len = u32::try_from(extra.len()).unwrap_or(u32::MAX);
            fixed[36..40].copy_from_slice(&len.to_be_bytes());
            out.extend([fixed, extra, s.id.clone(), s.name.clone()].concat());
        }
        out
    }

    /// Writes a new table, switches the header to it and frees the old one. The refcounts are right by now.
    pub(super) async fn write_snapshots(&mut self) -> Result<(), Errno> {
        let before = self.header.refcount_table_offset;
        let mut result = self.replace_table().await;
        if result.is_ok() && before != self.header.refcount_table_offset {
            result = self.free_old_structures().await;
        }
        if let Err(e) = result {
            self.watch.line(&format!("ERROR failed to update snapshot table: {e}"));
        }
        result
    }

    /// Frees the refcount structures from before a rebuild.
    async fn free_old_structures(&mut self) -> Result<(), Errno> {
        let report = self.report;
        let result = async {
            self.count_references(Fix::Nothing).await?;
            self.compare(Fix::Leaks).await?;
            self.refcounts.flush().await
        };
        let result = Box::pin(result).await;
        self.report = report;
        result
    }

    async fn replace_table(&mut self) -> Result<(), Errno> {
        let (bytes, bits) = (self.table_bytes(), self.g.cluster_bits);
        let count = (bytes.len() as u64).div_ceil(self.g.cluster_size());
        let new = match count {
            0 => 0,
            _ => self.refs.find_free(0, count),
        };
        for cluster in new..new + count {
            self.refs.set(cluster, 1);
        }
        if (new..new + count).any(|cluster| self.refcounts.is_blank(cluster)) {
            // No refcount block for them: one is made with all the others.
            self.rebuild().await?;
        } else {
            for cluster in new..new + count {
                self.refcounts.set(cluster, 1).await?;
            }
        }
        self.refcounts.flush().await?;
        self.disk.write(new << bits, &bytes).await?;
        self.disk.flush().await?;
        let number = u32::try_from(self.snapshots.list.len()).unwrap_or(u32::MAX);
        let mut fields = number.to_be_bytes().to_vec();
        fields.extend((new << bits).to_be_bytes());
        self.disk.write(SNAPSHOT_FIELDS, &fields).await?;
        self.disk.flush().await?;
        self.free_old_table().await?;
        self.header.nb_snapshots = number;
        self.snapshots.offset = new << bits;
        self.snapshots.len = bytes.len() as u64;
        Ok(())
    }

    /// Gives back the clusters of the table that the header no longer points to.
    async fn free_old_table(&mut self) -> Result<(), Errno> {
        let Snapshots { offset, len, .. } = self.snapshots;
        if len == 0 {
            return Ok(());
        }
        for cluster in offset >> self.g.cluster_bits..=(offset + len - 1) >> self.g.cluster_bits {
            let count = self.refs.get(cluster).saturating_sub(1);
            if self.refs.get(cluster) > 0 && !self.refcounts.is_blank(cluster) {
                self.refs.set(cluster, count);
                self.refcounts.set(cluster, count).await?;
            }
        }
        self.refcounts.flush().await
    }
}
