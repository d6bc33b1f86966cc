//! Persistent bitmaps: counting their references; judging their directory when an image is opened, and saying there that an
//! image is being written to.
//!
//! A bitmap directory or table that breaks the specification ends the check, as it does in QEMU: what the bitmaps occupy
//! cannot be told, so neither can what is leaked.
#![forbid(unsafe_code)]

use super::super::extension::c_text;
use super::super::header::{BitmapsExtension, Header};
use super::{Check, Disk};
use crate::block::Node;
use crate::err;
use crate::error::{Errno, Error, Result};

/// The fixed part of a directory entry in bytes.
const ENTRY: usize = 24;
/// The most entries of a bitmap table (QEMU's limit).
const TABLE_MAX: u32 = 0x800_0000;
/// The most bytes of a bitmap (QEMU's limit).
const BITMAP_MAX: u64 = 0x2000_0000;
/// The longest name in bytes (QEMU's limit).
const NAME_MAX: usize = 1023;
/// Bits of a table entry that must be 0.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// The offset in a table entry.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The bitmap was not saved: its size need not fit the disk's.
const IN_USE: u32 = 1;

/// Offset of the flags in a directory entry. Entries are aligned to 8 bytes, so flags never cross a sector.
const FLAGS: usize = 12;

/// Where a bitmap's table is.
struct Table {
    offset: u64,
    entries: u32,
    flags: u32,
    /// Where in the directory its flags are.
    flags_at: usize,
}

impl Check<'_> {
    /// Counts the references of the directory and of all bitmaps.
    pub(super) async fn walk_bitmaps(&mut self) -> std::result::Result<(), Errno> {
        let Some(extension) = self.header.bitmaps() else { return Ok(()) };
        self.reference(extension.directory_offset.0, extension.directory_size);
        let len = usize::try_from(extension.directory_size).map_err(|_| Errno(libc::EFBIG))?;
        let bytes = self.disk.read(extension.directory_offset.0, len).await;
        let tables = bytes.ok().and_then(|bytes| tables(&self.header, &bytes, extension).ok());
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

    async fn walk_bitmap(&mut self, table: &Table) -> std::result::Result<(), Errno> {
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
}

/// The tables of the bitmaps that the directory of `header`'s image, `bytes`, names.
///
/// # Errors
/// It breaks the specification: in QEMU's words.
fn tables(header: &Header, bytes: &[u8], extension: BitmapsExtension) -> Result<Vec<Table>> {
    let (mut tables, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let fixed = rest.get(..ENTRY).ok_or_else(broken)?;
        if tables.len() == extension.count as usize {
            return Err(err!("More bitmaps found than specified in header extension"));
        }
        let name = u16::from_be_bytes([fixed[18], fixed[19]]) as usize;
        let extra = u32::from_be_bytes([fixed[20], fixed[21], fixed[22], fixed[23]]) as usize;
        let len = ENTRY.checked_add(name).and_then(|len| len.checked_add(extra));
        let len = len.ok_or_else(broken)?.next_multiple_of(8);
        let entry = rest.get(..len).ok_or_else(broken)?;
        if extra != 0 {
            return Err(err!("Bitmap extra data is not supported"));
        }
        let flags_at = bytes.len() - rest.len() + FLAGS;
        let table = table(header, fixed, flags_at).filter(|_| name <= NAME_MAX);
        tables.push(table.ok_or_else(|| {
            let name = c_text(&entry[ENTRY..][..name]);
            err!("Bitmap '{name}' doesn't satisfy the constraints")
        })?);
        rest = &rest[len..];
    }
    if tables.len() < extension.count as usize {
        return Err(err!("Less bitmaps found than specified in header extension"));
    }
    Ok(tables)
}

fn broken() -> Error {
    err!("Broken bitmap directory")
}

/// The table of a directory entry; `None` if it breaks the specification.
fn table(header: &Header, fixed: &[u8], flags_at: usize) -> Option<Table> {
    let g = header.geometry();
    let offset = u64::from_be_bytes(fixed[..8].try_into().ok()?);
    let entries = u32::from_be_bytes(fixed[8..12].try_into().ok()?);
    let flags = u32::from_be_bytes(fixed[12..16].try_into().ok()?);
    let (kind, granularity) = (fixed[16], fixed[17]);
    let bytes = u64::from(entries) << g.cluster_bits;
    let well_formed = entries != 0
        && entries <= TABLE_MAX
        && offset != 0
        && offset.is_multiple_of(g.cluster_size())
        && (9..=31).contains(&granularity)
        && flags & !3 == 0
        && kind == 1
        && bytes <= BITMAP_MAX;
    if !well_formed {
        return None;
    }
    let covered = (u128::from(bytes) * 8) << granularity;
    let fits = flags & IN_USE != 0 || u128::from(header.size) <= covered;
    fits.then_some(Table { offset, entries, flags, flags_at })
}

/// Judges the bitmap directory of the image in `file`, if it has one, as QEMU does when it opens an image.
///
/// # Errors
/// In QEMU's words.
pub(in super::super) async fn judge_directory(file: &Node, header: &Header) -> Result<()> {
    read_directory(file, header).await.map(|_| ())
}

/// The directory of `header`'s image, and the tables that it names; nothing if there is none.
async fn read_directory(file: &Node, header: &Header) -> Result<(Vec<u8>, Vec<Table>)> {
    let Some(extension) = header.bitmaps() else { return Ok((Vec::new(), Vec::new())) };
    if extension.directory_size == 0 {
        return Err(err!("Requested bitmap directory size is zero"));
    }
    let len = usize::try_from(extension.directory_size).map_err(|_| broken())?;
    let bytes = Disk::new(file).read(extension.directory_offset.0, len).await;
    let bytes = bytes.map_err(|e| Error::from_errno("Failed to read bitmap directory", e))?;
    let tables = tables(header, &bytes, extension)?;
    Ok((bytes, tables))
}

/// Sets the flag "in use" of every bitmap, stable on return: whoever opens the image later knows that the bitmaps may lack
/// what was written meanwhile. They stay well-formed, and keep their clusters. Returns how many did not have the flag.
///
/// A power cut leaves some flags set, which harms nobody: nothing else has been written yet.
///
/// # Errors
/// As [`judge_directory`]; the directory cannot be written.
pub(in super::super) async fn mark_in_use(file: &Node, header: &Header) -> Result<usize> {
    let (mut bytes, tables) = read_directory(file, header).await?;
    let unmarked: Vec<_> = tables.iter().filter(|table| table.flags & IN_USE == 0).collect();
    let (Some(extension), [first, ..], [.., last]) = (header.bitmaps(), &*unmarked, &*unmarked)
    else {
        return Ok(0);
    };
    for table in &unmarked {
        let flags = (table.flags | IN_USE).to_be_bytes();
        bytes[table.flags_at..][..flags.len()].copy_from_slice(&flags);
    }
    // What lies between is written as it was read.
    let changed = first.flags_at..last.flags_at + 4;
    let at = extension.directory_offset.plus(changed.start as u64);
    let disk = Disk::new(file);
    let written = async {
        disk.write(at.0, &bytes[changed]).await?;
        disk.flush().await
    };
    let failed = |e| Error::from_errno("Could not update bitmap directory", e);
    written.await.map(|()| unmarked.len()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::super::super::header::{Autoclear, Extension, Purpose};
    use super::super::super::layout::HostOffset;
    use super::*;
    use crate::block::Graph;
    use crate::block::perm::Perms;
    use crate::sim::harness::Drivers;
    use crate::sim::{Crash, DiskSpec, Pages, Replay, SIM_DISK, Sim, Survivors};

    const DIRECTORY: u64 = 1 << 16;
    /// With names of 40 bytes they take 2560 bytes: flags in several sectors.
    const COUNT: u32 = 40;

    fn image() -> (Header, Vec<u8>) {
        let mut header = Header::new(3, 16, 1 << 20);
        (header.l1_size, header.l1_table_offset) = (1, HostOffset(3 << 16));
        (header.refcount_table_clusters, header.refcount_table_offset) = (1, HostOffset(4 << 16));
        header.autoclear = Autoclear::BITMAPS;
        let directory_size = u64::from(COUNT) * 64;
        let directory_offset = HostOffset(DIRECTORY);
        let extension = BitmapsExtension { count: COUNT, directory_size, directory_offset };
        header.extensions.push(Extension::Bitmaps(extension));
        let mut bytes = header.serialise().unwrap();
        bytes.resize(DIRECTORY as usize, 0);
        for number in 0..COUNT {
            bytes.extend((u64::from(2 + number) << 16).to_be_bytes());
            bytes.extend(1u32.to_be_bytes());
            // "auto"; every fourth is in use already.
            bytes.extend((2 + u32::from(number % 4 == 1)).to_be_bytes());
            bytes.extend([1, 16, 0, 40, 0, 0, 0, 0]);
            bytes.extend(format!("{number:040}").bytes());
        }
        bytes.resize(2 << 16, 0);
        (Header::read(&bytes[..1 << 16], Purpose::Write).unwrap(), bytes)
    }

    /// A power cut leaves flags that were there or shall be there, and nothing else; after the answer they are there for sure.
    #[test]
    fn flags_are_stable_when_the_call_returns() {
        static DRIVERS: Drivers = &[&SIM_DISK];
        let (header, bytes) = image();
        let sim = Sim::new(1);
        let mut pages = Pages::default();
        pages.set_len(bytes.len() as u64);
        pages.write(0, &bytes);
        sim.add_disk(DiskSpec::file("d", pages));
        let graph = Graph::with_drivers(DRIVERS);
        let options = json!({ "driver": "sim-disk", "disk": "d", "node-name": "n" });
        let node = graph.add(serde_json::from_value(options).unwrap()).unwrap();
        let user = Arc::new(graph.attach_root(&node, "test", Perms::device(true)).unwrap());
        let done = sim.run(async move {
            let marked = mark_in_use(user.node(), &header).await.map_err(|e| e.to_string())?;
            let again = mark_in_use(user.node(), &header).await.map_err(|e| e.to_string())?;
            Ok::<_, String>((marked, again))
        });
        assert_eq!(done, Ok(Ok((30, 0))));

        let mut want = bytes.clone();
        for number in 0..COUNT as usize {
            want[DIRECTORY as usize + 64 * number + 15] = 3;
        }
        let history = sim.take_history();
        let mut partly = 0;
        for cut in 0..=history.len() {
            let mut replay = Replay::new(&history);
            replay.advance(&history, cut);
            for survivors in (0..16).map(Survivors::Random).chain([Survivors::None]) {
                let now = replay.crashed(Crash::Power, survivors)[0].1.to_vec();
                let mixed = |i: usize| now[i] == bytes[i] || now[i] == want[i];
                assert!((0..now.len()).all(mixed), "cut at {cut}");
                partly += u32::from(now != bytes && now != want);
                assert!(cut < history.len() || now == want);
            }
        }
        assert!(partly > 0, "the cut never met the write");
    }
}
