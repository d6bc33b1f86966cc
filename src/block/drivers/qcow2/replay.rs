//! Writes to an image what a killed predecessor's [journal](super::journal) says.
//!
//! Before anything is written, every word on disk must be what a record says was there, or has come there, and every place must
//! be an entry of an active table. It can be repeated: the records stay until refcounts have been counted anew.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::check::disk::Disk;
use super::header::{Header, Incompatible};
use super::header_io::HeaderIo;
use super::journal::{IN_L1, Identity, Journal, Left};
use super::layout::OFFSET_MASK;
use crate::block::Node;
use crate::error::{Errno, Error, Result};
use crate::rt;

/// An image may have been written so long after the last sign of life, in seconds: a write in flight, a long flush.
const GRACE: u64 = 10;
/// An L2 entry of a compressed cluster.
const COMPRESSED: u64 = 1 << 62;

/// What opening an image with a journal came to.
pub struct Opened {
    /// The journal, if there can be one, and for which image.
    pub journal: Option<(Arc<Journal>, Identity)>,
    /// Entries have been written: refcounts must be counted.
    pub recount: bool,
}

/// Opens the journal of the image in `file` and replays what is there.
///
/// # Errors
/// Entries could not be written: the next attempt may.
pub fn open(file: &Node, header: &Header, dir: Option<&Path>, name: &str) -> Result<Opened> {
    let none = Opened { journal: None, recount: false };
    let Some(dir) = dir else { return Ok(none) };
    let path = file
        .driver()
        .options_in_force()
        .get("filename")
        .and_then(|n| n.as_str().map(PathBuf::from));
    let Some(path) = path else {
        log::warn!("{}", weaker(name, "the image is not directly on a file or device"));
        return Ok(none);
    };
    let opened = Identity::of(&path, header.cluster_bits)
        .and_then(|of| Journal::open(dir, &of).map(|(journal, left)| (of, journal, left)));
    let (of, journal, left) = match opened {
        Ok(opened) => opened,
        Err(e) => {
            log::warn!("{}", weaker(name, &format!("no journal in {}: {e}", dir.display())));
            return Ok(none);
        }
    };
    let mtime = std::fs::metadata(&path).map_or(i64::MAX, |m| m.mtime());
    let result = match left {
        Ok(None) => Ok(false),
        Ok(Some(left)) if left.applied => Ok(true),
        Ok(Some(left)) => replay(file, header, &journal, &left, mtime),
        Err(why) => Err(Refusal::Not(why)),
    };
    let recount = match result {
        Ok(recount) => recount,
        Err(Refusal::File(e)) => {
            return Err(Error::from_errno("Could not write the entries of a killed process", e));
        }
        Err(Refusal::Not(why)) => {
            log::error!(
                "qcow2: node '{name}': the journal of a killed process cannot be used: {why}; \
                 writes that were acknowledged and not flushed may be lost"
            );
            journal.keep_rejected();
            false
        }
    };
    if recount {
        log::warn!("qcow2: node '{name}': entries of a killed process were restored");
    } else {
        journal.start(&of);
    }
    Ok(Opened { journal: Some((Arc::new(journal), of)), recount })
}

/// That writes may be lost.
pub fn weaker(name: &str, why: &str) -> String {
    format!("qcow2: node '{name}': unflushed writes do not survive a crash of this program: {why}")
}

enum Refusal {
    /// The journal cannot be true.
    Not(String),
    File(Errno),
}

impl From<Errno> for Refusal {
    fn from(e: Errno) -> Self {
        Refusal::File(e)
    }
}

fn replay(
    file: &Node,
    header: &Header,
    journal: &Journal,
    left: &Left,
    mtime: i64,
) -> std::result::Result<bool, Refusal> {
    if u64::try_from(mtime).unwrap_or(0) > left.beat.saturating_add(GRACE) {
        return Err(Refusal::Not("the image has been written since".to_owned()));
    }
    let disk = Disk::new(file);
    let (l1_offset, l1_len) = (header.l1_table_offset.0, u64::from(header.l1_size));
    if l1_offset.saturating_add(l1_len * 8) > file.len() {
        return Err(Refusal::Not("there is no L1 table".to_owned()));
    }
    let l1 = rt::block_on(disk.read_words(l1_offset, l1_len as usize))?;
    let mut tables: BTreeSet<u64> = l1.iter().map(|word| word & OFFSET_MASK).collect();
    for record in left.records.iter().filter(|r| r.place & IN_L1 != 0) {
        tables.extend([record.old & OFFSET_MASK, record.new & OFFSET_MASK]);
    }
    tables.remove(&0);
    let cluster = header.geometry().cluster_size();
    // The last word for each place, and all that may be there now.
    let mut last: Vec<(u64, u64)> = Vec::new();
    let mut seen: HashMap<u64, (usize, BTreeSet<u64>)> = HashMap::new();
    for record in &left.records {
        let at = match record.place & IN_L1 {
            0 => record.place,
            _ if record.place - IN_L1 < l1_len => l1_offset + (record.place - IN_L1) * 8,
            _ => return Err(Refusal::Not(format!("L1 entry {}", record.place - IN_L1))),
        };
        let in_l1 = record.place & IN_L1 != 0;
        let host = record.new & OFFSET_MASK;
        let bitmap = !in_l1 && header.geometry().extended_l2 && (at / 8) % 2 == 1;
        let outside = host >= file.len() || host % cluster != 0;
        let is_host = !bitmap && (in_l1 || record.new & COMPRESSED == 0);
        let elsewhere = is_host && outside && (in_l1 || !header.geometry().data_file);
        let nowhere = !in_l1 && (at % 8 != 0 || !tables.contains(&(at - at % cluster)));
        if elsewhere || nowhere || at.saturating_add(8) > file.len() {
            return Err(Refusal::Not(format!("{record:x?}")));
        }
        let (n, may) = seen.entry(at).or_insert_with(|| {
            last.push((at, 0));
            (last.len() - 1, BTreeSet::from([record.old]))
        });
        may.insert(record.new);
        last[*n].1 = record.new;
    }
    rt::block_on(async {
        for (at, (_, may)) in &seen {
            let found = disk.read_words(*at, 1).await?[0];
            if !may.contains(&found) {
                let what = format!("{found:#x} at {at:#x} is none of {may:x?}");
                return Err(Refusal::Not(what));
            }
        }
        journal.beat();
        // After a power loss from here on, refcounts are counted too. (Version 2 cannot say so.)
        if !header.incompatible.contains(Incompatible::DIRTY) {
            HeaderIo::new(header).mark_dirty(file).await?;
        }
        for (at, word) in &last {
            disk.write(*at, &word.to_be_bytes()).await?;
        }
        disk.flush().await?;
        journal.applied();
        Ok(true)
    })
}
