//! Writes to an image what a killed predecessor's [journal](super::journal) says.
//!
//! Before anything is written, every word on disk must be what a record says was there, or has come there; every place must be
//! an entry of an active table, and what it leads to no table. Then, in the order of `write/flush.rs`: refcounts of 1 for all
//! clusters that entries with the COPIED flag lead to, data, entries. So it can be cut off anywhere, and repeated: the records
//! stay until all of that is stable. The time it takes depends on the records, not on the image.
//!
//! Refcounts are counted anew, by the repair of images with the dirty bit, only where that bit is set (lazy refcounts), and
//! where the refcount table has no entry left: its growth was not on disk yet.
#![forbid(unsafe_code)]

mod plan;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use plan::Plan;

use super::header::{Autoclear, Header};
use super::journal::{Identity, Journal, Left, is_waiting, sweep};
use super::opened::Found;
use crate::block::Node;
use crate::err;
use crate::error::{Errno, Error, Result};
use crate::rt;

/// A version 2 image may have been written so long after the last sign of life, in seconds: a write in flight, a long flush.
const GRACE: u64 = 10;
/// What opening an image with a journal came to.
#[derive(Default)]
pub struct Opened {
    /// The journal, if there can be one, and for which image.
    pub journal: Option<(Arc<Journal>, Identity)>,
    /// Entries have been written: what was read of the image before is of the past.
    pub replayed: bool,
    /// Refcounts must be counted.
    pub recount: bool,
}

impl Opened {
    /// From here on the journal is for what this process does; answers what the image shall say of it.
    pub fn begin(&self, header: &Header) -> Autoclear {
        let Some((journal, of)) = &self.journal else { return Autoclear::empty() };
        let random = RandomState::new().build_hasher().finish() | 1 << 32;
        let state = match header.version {
            2 => Autoclear::empty(),
            _ => Autoclear::from_bits_retain(random) & Autoclear::JOURNAL,
        };
        journal.start(&Identity { state: state.bits(), ..*of });
        state
    }
}

/// Where the image in `file` is, to find its journal.
fn path_of(file: &Node) -> Option<PathBuf> {
    let options = file.driver().options_in_force();
    let path = options.get("filename").and_then(|n| n.as_str().map(PathBuf::from));
    #[cfg(any(test, feature = "sim"))]
    let path = path.or_else(super::journal::watch::image);
    path
}

fn identity(path: &Path, header: &Header) -> std::io::Result<Identity> {
    let state = header.autoclear & Autoclear::JOURNAL;
    Identity::of(path, header.cluster_bits, state.bits())
}

/// Fails if a journal waits for the image in `file`, which is opened for reading only: without the entries there, the guest, or
/// whoever is above, would see old data that was overwritten, and not know.
///
/// # Errors
/// As said.
pub fn expect_none(file: &Node, header: &Header, dir: Option<&Path>) -> Result<()> {
    let (Some(dir), Some(path)) = (dir, path_of(file)) else { return Ok(()) };
    match identity(&path, header) {
        Ok(of) if is_waiting(dir, &of) => Err(err!(
            "entries that a killed process has not written are in {}: open the image for writing \
             once",
            dir.display()
        )),
        _ => Ok(()),
    }
}

/// Opens the journal of the image in `file`, whose data is in `data`, and replays what is there.
///
/// # Errors
/// Entries could not be written: the next attempt may.
pub fn open(
    (file, data): (&Node, &Node),
    found: &Found,
    dir: Option<&Path>,
    name: &str,
) -> Result<Opened> {
    let none = Opened::default();
    let header = &found.header;
    let killed = header.autoclear.intersects(Autoclear::JOURNAL);
    let Some(dir) = dir else {
        if killed {
            log::warn!("{}", lost(name, "there is no --state-dir"));
        }
        return Ok(none);
    };
    let Some(path) = path_of(file) else {
        log::warn!("{}", weaker(name, "the image is not directly on a file or device"));
        return Ok(none);
    };
    let opened = identity(&path, header)
        .and_then(|of| Journal::open(dir, &of).map(|(journal, left)| (of, journal, left)));
    let (of, journal, left) = match opened {
        Ok(opened) => opened,
        Err(e) => {
            log::warn!("{}", weaker(name, &format!("no journal in {}: {e}", dir.display())));
            return Ok(none);
        }
    };
    journal.note_image(&path);
    sweep(dir);
    let mut opened = Opened::default();
    let result = match left {
        Ok(None) => {
            if killed && !journal.is_of(&of) {
                let dir = dir.display();
                log::warn!("{}", lost(name, &format!("its journal is not in {dir}")));
            }
            Ok(())
        }
        Ok(Some(left)) if left.applied => {
            (opened.replayed, opened.recount) = (true, true);
            Ok(())
        }
        Ok(Some(left)) if header.version == 2 && is_older(&left, &path) => {
            Err(Refusal::Not("the image has been written since".to_owned()))
        }
        Ok(Some(left)) => {
            let plan = Plan::new(file, found, &left);
            plan.and_then(|mut plan| {
                log::warn!(
                    "qcow2: node '{name}': a process was killed with this image open: {} entries \
                     are restored",
                    plan.places
                );
                opened.replayed = true;
                opened.recount = rt::block_on(plan.carry_out((file, data), found, &journal))?;
                Ok(())
            })
        }
        Err(why) => Err(Refusal::Not(why)),
    };
    match result {
        Ok(()) => {}
        Err(Refusal::File(e)) => {
            return Err(Error::from_errno("Could not write the entries of a killed process", e));
        }
        Err(Refusal::Not(why)) => {
            log::error!(
                "qcow2: node '{name}': the journal of a killed process cannot be used: {why}; \
                 writes that were acknowledged and not flushed may be lost"
            );
            journal.keep_rejected();
        }
    }
    opened.journal = Some((Arc::new(journal), of));
    Ok(opened)
}

/// That writes are lost, unless the machine lost power, too.
fn lost(name: &str, why: &str) -> String {
    format!(
        "qcow2: node '{name}': the process that had the image open last did not end as it should, \
         and {why}: what it had not flushed is lost"
    )
}

/// That writes may be lost.
fn weaker(name: &str, why: &str) -> String {
    format!("qcow2: node '{name}': unflushed writes do not survive a crash of this program: {why}")
}

fn is_older(left: &Left, path: &Path) -> bool {
    let written =
        std::fs::metadata(path).map_or(u64::MAX, |m| u64::try_from(m.mtime()).unwrap_or(0));
    written > left.beat.saturating_add(GRACE)
}

#[derive(Debug)]
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

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
