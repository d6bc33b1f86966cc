//! A redo journal of L1 and L2 words, in shared memory that outlives the process.
//!
//! A guest whose back end is killed never resends an acknowledged write, flushed or not; and the entry of an allocating write
//! is acknowledged while it is in memory only. So every change of an entry is recorded in a mapped file before anybody can see
//! it, and whoever opens the image next writes the recorded words ([`super::replay`]).
//!
//! Invariants:
//! * A word is recorded, under the `Meta` lock, before it is stored where readers see it; a request completes after that. Its
//!   data went before: `write()` has returned, so it is in the page cache or on the medium, which a killed process leaves alone.
//! * Records count from one store of `tail` on: all of a request's change of a slice, or nothing.
//! * `head` moves only when a flush has succeeded, to where `tail` was when that flush took its copies: what was recorded
//!   meanwhile stays. So the disk has, for each place, a word that some record left here knows.
//! * Without room nothing changes: whoever wants to change an entry flushes first. If flushes fail, so do such writes.
//! * No store is into a part of the file that is not allocated: the machine may have no memory left, which a store cannot be told.
//!   The file is allocated as it is needed, from the front; a journal that has become empty begins there again. So one of an
//!   image that is flushed now and then stays small, and opening one costs 48 pages, not 1537.
//! * The journal is of one state of one image: the image says so, by a number in autoclear feature bits that the format
//!   reserves ([`Autoclear::JOURNAL`](super::header::Autoclear::JOURNAL)). Whoever writes to an image and does not know such a
//!   bit clears it: QEMU does as soon as it opens the image for writing. Then the words here are of the past, and refused.
//!   (Version 2 has no such bits: there the time of the last write must not be later than the last sign of life.)
//! * It is replayed under the image's lock, which the kernel keeps until the last request of the killed process has ended; a
//!   replay can be killed and repeated, and the records stay until all they say is on disk.
//!
//! Why not the tables themselves in shared memory: caches evict and reuse their slots, and each intermediate state would have
//! to be valid. Why no refcounts: an entry with the COPIED flag says that its cluster's refcount is 1, and every reference that
//! the refcounts on disk may lack is in an entry that is recorded here; what they count too much is a leak.
//!
//! This guards against the death of the process only: after a power loss (another boot id) the order of `write/flush.rs` counts.
#![forbid(unsafe_code)]

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

mod sweep;

pub use sweep::sweep;

use super::arena::Arena;
use super::write::mutation::{Mutation, broken};

/// "VUBJRNL2".
const MAGIC: u64 = 0x5655_424a_524e_4c32;
/// Records that there may be. When half of them are there, a flush begins: with an eighth of this, filling a new image took
/// twice as long (`vub-bench compare --cases q2-fresh-write`).
pub const RECORDS: u64 = 1 << 18;
/// Where the records begin, in words; the places of the fields before.
const FIRST: usize = 512;
const BOOT: usize = 1;
const DEV: usize = 3;
const INO: usize = 4;
const CLUSTER_BITS: usize = 5;
const BEAT: usize = 6;
const APPLIED: usize = 7;
const HEAD: usize = 8;
const TAIL: usize = 9;
const BORN: usize = 10;
const STATE: usize = 11;
const PATH_LEN: usize = 12;
/// Record `n` is the one `n - BASE` from the front on.
const BASE: usize = 13;
const PATH: usize = 16;
const WORDS: usize = FIRST + RECORDS as usize * 3;
/// The most entries that are changed at once. A change of so many fits as soon as there is nothing else, [`FLOOR`] or not.
pub const AT_ONCE: u64 = 1 << 12;
/// For so many records the file is allocated from the beginning, and then for so many more each time.
const FLOOR: u64 = 2 * AT_ONCE;
/// For how long somebody who is about to end may keep the file.
const PATIENCE: Duration = Duration::from_secs(1);
/// Set in the place of an L1 entry, with its index; else the place is a byte offset in the file.
pub const IN_L1: u64 = 1 << 63;

/// One change of one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// A byte offset in the image file, or an L1 index with [`IN_L1`].
    pub place: u64,
    /// What was there.
    pub old: u64,
    /// What is there now.
    pub new: u64,
}

/// Which image a journal is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Device and inode; of a block device, its own number and 0.
    pub id: (u64, u64),
    /// When the file was made, in nanoseconds; 0: unknown. Inode numbers are used again.
    pub born: u64,
    /// Clusters have 1 << this many bytes.
    pub cluster_bits: u32,
    /// This boot of the machine.
    pub boot: [u64; 2],
    /// What the image's autoclear bits say of its journal; 0: nothing.
    pub state: u64,
}

/// The journal of one open image.
pub struct Journal {
    map: Arena,
    path: PathBuf,
    /// Locked.
    file: File,
    /// For how many records, from the front on, the file is allocated.
    allocated: AtomicU64,
    /// There was no room for more, and somebody was told.
    stunted: AtomicBool,
}

/// What a predecessor has left.
#[derive(Debug, PartialEq, Eq)]
pub struct Left {
    /// In order.
    pub records: Vec<Record>,
    /// When it was alive for the last time for sure, in seconds of the real-time clock.
    pub beat: u64,
    /// The records are on disk; only the refcounts may not have been counted yet.
    pub applied: bool,
}

impl Identity {
    /// Of the image at `path`, now.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn of(path: &Path, cluster_bits: u32, state: u64) -> io::Result<Identity> {
        let meta = fs::metadata(path)?;
        let id = id_of(&meta);
        let born = meta.created().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok());
        let born = born.map_or(0, |d| d.as_secs() * 1_000_000_000 + u64::from(d.subsec_nanos()));
        Ok(Identity { id, born, cluster_bits, boot: boot()?, state })
    }
}

/// Device and inode; of a device, its number.
fn id_of(meta: &fs::Metadata) -> (u64, u64) {
    if meta.rdev() != 0 { (meta.rdev(), 0) } else { (meta.dev(), meta.ino()) }
}

/// Whether a file's owner can be believed: whoever we will be soon is as good as we are, and will have to remove it.
fn is_ours(meta: &fs::Metadata) -> bool {
    let (user, _) = crate::sandbox::privileges::owner();
    [Some(crate::sys::effective_uid()), user].contains(&Some(meta.uid()))
}

/// This boot of the machine.
fn boot() -> io::Result<[u64; 2]> {
    let text = fs::read_to_string(crate::sys::BOOT_ID)?;
    let hex: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let half = |range| hex.get(range).and_then(|part| u64::from_str_radix(part, 16).ok());
    match (half(0..16), half(16..32)) {
        (Some(a), Some(b)) => Ok([a, b]),
        _ => Err(io::Error::from_raw_os_error(libc::EINVAL)),
    }
}

impl Journal {
    /// Opens, or makes, the journal of an image in `dir`, with what is left in it: `Err` in words why that cannot be used.
    /// Nothing is changed yet but a new file.
    ///
    /// # Errors
    /// Another process has it; it is not ours; no room; what the kernel says.
    #[allow(clippy::type_complexity, reason = "taken apart at once")]
    pub fn open(dir: &Path, of: &Identity) -> io::Result<(Journal, Result<Option<Left>, String>)> {
        let path = path_in(dir, of);
        let flags = libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.custom_flags(flags).open(&path)?;
        lock(&file, PATIENCE)?;
        let (meta, now) = (file.metadata()?, fs::symlink_metadata(&path)?);
        let ours = meta.is_file() && is_ours(&meta) && meta.nlink() == 1;
        if !ours || (meta.dev(), meta.ino()) != (now.dev(), now.ino()) {
            return Err(io::Error::other("the journal file is somebody else's"));
        }
        let (user, group) = crate::sandbox::privileges::owner();
        if user.is_some_and(|user| user != meta.uid()) {
            std::os::unix::fs::fchown(&file, user, group)?;
        }
        let left = if meta.len() == 0 { Ok(None) } else { read(&file, meta.len(), of) };
        if let Err(e) = crate::sys::allocate(&file, bytes_for(FLOOR)) {
            // A part of it may be there: somebody else needs that room more.
            if meta.len() == 0 {
                fs::remove_file(&path)?;
            }
            return Err(e);
        }
        file.set_len(WORDS as u64 * 8)?;
        let map = Arena::shared(&file, WORDS).map_err(|e| io::Error::from_raw_os_error(e.0))?;
        let (allocated, stunted) = (FLOOR.into(), false.into());
        Ok((Journal { map, path, file, allocated, stunted }, left))
    }

    /// Keeps a copy of what cannot be used, for whoever wants to know.
    pub fn keep_rejected(&self) {
        let path = self.path.with_extension("rejected");
        // Anybody may have put a link there.
        let copy = || {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
            let mut options = OpenOptions::new();
            let mut copy = options.write(true).create_new(true).mode(0o600).open(&path)?;
            io::copy(&mut File::open(&self.path)?, &mut copy).map(drop)
        };
        if let Err(e) = copy() {
            log::warn!("qcow2: no copy of {}: {e}", self.path.display());
        }
    }

    /// The image is at `path`: when it is no longer there, the journal can go ([`sweep`]).
    pub fn note_image(&self, path: &Path) {
        let path = fs::canonicalize(path).unwrap_or_default();
        let bytes = path.as_os_str().as_bytes();
        let fits = bytes.len() <= (FIRST - PATH) * 8;
        self.set(PATH_LEN, if fits { bytes.len() as u64 } else { 0 });
        for (at, part) in (PATH..FIRST).zip(bytes.chunks(8)) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            self.set(at, u64::from_ne_bytes(word));
        }
    }

    /// Starts anew, for this image.
    pub fn start(&self, of: &Identity) {
        // Not valid while it changes.
        self.set(0, 0);
        let fields = [
            of.boot[0],
            of.boot[1],
            of.id.0,
            of.id.1,
            u64::from(of.cluster_bits),
            0,
            0,
            0,
            0,
            of.born,
            of.state,
        ];
        (BOOT..).zip(fields).for_each(|(at, value)| self.set(at, value));
        self.set(BASE, 0);
        self.beat();
        self.set(0, MAGIC);
        watch::changed(self, true);
    }

    /// Whether it was started for this state of the image.
    pub fn is_of(&self, of: &Identity) -> bool {
        (self.word(0), self.word(STATE)) == (MAGIC, of.state)
    }

    fn set(&self, at: usize, value: u64) {
        self.map.words()[at].store(value, Ordering::Release);
    }

    fn word(&self, at: usize) -> u64 {
        self.map.words()[at].load(Ordering::Acquire)
    }

    /// The process is alive.
    pub fn beat(&self) {
        self.set(BEAT, now());
    }

    /// The records are stable on disk.
    pub fn applied(&self) {
        self.set(APPLIED, 1);
        self.beat();
        watch::changed(self, false);
    }

    /// How many records there are.
    pub fn len(&self) -> u64 {
        self.word(TAIL) - self.word(HEAD)
    }

    /// Whether there are no records.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether there is room for `count` records more; makes it if the file can grow.
    pub fn has_room(&self, count: u64) -> bool {
        // The first that is not allocated is reached in the first round only: all are when it begins anew at the front.
        let end = (self.word(TAIL) - self.word(BASE) + count).min(RECORDS);
        self.len() + count <= RECORDS && (end <= self.allocated() || self.grow(end))
    }

    fn allocated(&self) -> u64 {
        self.allocated.load(Ordering::Relaxed)
    }

    fn grow(&self, end: u64) -> bool {
        let size = end.next_multiple_of(FLOOR).min(RECORDS);
        let done = crate::sys::allocate(&self.file, bytes_for(size));
        match &done {
            Ok(()) => self.allocated.store(size, Ordering::Relaxed),
            Err(e) if !self.stunted.swap(true, Ordering::Relaxed) => {
                let path = self.path.display();
                log::warn!("qcow2: {path} cannot grow: {e}; the image is flushed more often");
            }
            Err(_) => {}
        }
        done.is_ok()
    }

    /// Adds records, all or none of which count if the process dies.
    ///
    /// # Panics
    /// Without room for them: [`Journal::has_room`].
    pub fn append(&self, records: impl Iterator<Item = Record>) {
        let (mut tail, base) = (self.word(TAIL), self.word(BASE));
        let end = match self.allocated() {
            RECORDS => self.word(HEAD) + RECORDS,
            allocated => base + allocated,
        };
        if broken(Mutation::TailFirst) {
            self.set(TAIL, tail + 1);
        }
        for Record { place, old, new } in records {
            assert!(tail < end, "the caller has looked for room");
            (slot(tail, base)..).zip([place, old, new]).for_each(|(at, word)| self.set(at, word));
            tail += 1;
        }
        self.beat();
        self.set(TAIL, tail);
        watch::changed(self, false);
    }

    /// The end of what is recorded now, for [`Journal::forget`].
    pub fn mark(&self) -> u64 {
        self.word(TAIL)
    }

    /// Everything before `mark` is on disk.
    pub fn forget(&self, mark: u64) {
        self.set(HEAD, mark);
        // One store, which means nothing while there are no records.
        if self.is_empty() && !watch::is_on() {
            self.set(BASE, mark);
        }
        self.beat();
        watch::changed(self, false);
    }

    /// The orderly end: nothing is left for a successor.
    pub fn remove(&self) {
        if self.is_empty()
            && let Err(e) = fs::remove_file(&self.path)
            && e.kind() != io::ErrorKind::NotFound
        {
            log::warn!("qcow2: cannot remove {}: {e}", self.path.display());
        }
    }
}

/// The lock of a killed process goes with its last descriptor, a moment after the image's lock at worst.
fn lock(file: &File, patience: Duration) -> io::Result<()> {
    let begun = Instant::now();
    while let Err(e) = file.try_lock() {
        let held = matches!(e, TryLockError::WouldBlock) && begun.elapsed() < patience;
        if !held {
            return Err(io::Error::other(e));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Whether records are waiting in `dir` for somebody who opens this image for writing, and nobody has it open.
pub fn is_waiting(dir: &Path, of: &Identity) -> bool {
    let Ok(file) = File::open(path_in(dir, of)) else { return false };
    let Ok(meta) = file.metadata() else { return false };
    lock(&file, PATIENCE / 10).is_ok()
        && (meta.len() > 0 && is_ours(&meta))
        && matches!(read(&file, meta.len(), of), Ok(Some(_)))
}

/// How long the file is with so many records.
const fn bytes_for(records: u64) -> u64 {
    (FIRST as u64 + records * 3) * 8
}

/// Where record `n` is, in words.
const fn slot(n: u64, base: u64) -> usize {
    FIRST + (n.wrapping_sub(base) % RECORDS) as usize * 3
}

fn path_in(dir: &Path, of: &Identity) -> PathBuf {
    dir.join(format!("vhost-user-blk-{:x}-{:x}.journal", of.id.0, of.id.1))
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// What is in a journal. `None`: nothing that matters.
fn read(file: &File, len: u64, of: &Identity) -> Result<Option<Left>, String> {
    if len != WORDS as u64 * 8 {
        return Err(format!("it has {len} bytes"));
    }
    let mut bytes = vec![0; WORDS * 8];
    file.read_exact_at(&mut bytes, 0).map_err(|e| e.to_string())?;
    let words: Vec<u64> =
        bytes.chunks_exact(8).map(|b| b.try_into().map_or(0, u64::from_ne_bytes)).collect();
    parse(&words, of)
}

fn parse(words: &[u64], of: &Identity) -> Result<Option<Left>, String> {
    if words[0] == 0 {
        // Never started.
        return Ok(None);
    }
    if words[0] != MAGIC {
        return Err("it is no journal of this version".to_owned());
    }
    let (head, tail) = (words[HEAD], words[TAIL]);
    if words[BOOT..BOOT + 2] != of.boot || words[BORN] != of.born || head == tail {
        // After a power loss the order on disk counts; what an image that was deleted lacks, nobody misses.
        return Ok(None);
    }
    if (words[DEV], words[INO], words[CLUSTER_BITS])
        != (of.id.0, of.id.1, u64::from(of.cluster_bits))
    {
        return Err("it is another image's".to_owned());
    }
    if words[STATE] != of.state {
        return Err("another program has opened the image for writing since".to_owned());
    }
    match tail.checked_sub(head) {
        Some(count) if count <= RECORDS => {}
        _ => return Err(format!("records {head} to {tail} cannot be")),
    }
    let record = |n: u64| {
        let at = slot(n, words[BASE]);
        Record { place: words[at], old: words[at + 1], new: words[at + 2] }
    };
    let records = (head..tail).map(record).collect();
    Ok(Some(Left { records, beat: words[BEAT], applied: words[APPLIED] == 1 }))
}

#[cfg(any(test, feature = "sim"))]
pub mod watch;

#[cfg(not(any(test, feature = "sim")))]
mod watch {
    #[inline]
    pub(super) const fn changed(_: &super::Journal, _: bool) {}

    #[inline]
    pub(super) const fn is_on() -> bool {
        false
    }
}

#[cfg(test)]
#[cfg(not(loom))]
#[path = "journal_tests.rs"]
mod tests;
