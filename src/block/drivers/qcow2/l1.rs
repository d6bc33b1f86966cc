//! The active L1 table, in memory as a whole: 8 bytes for each 512 MiB of disk with the default cluster size.
//!
//! Reading takes no lock. Changes note the 512-byte sector of the table that they are in, under a mutex of the table's
//! own, which is never held across I/O and inside of which no other lock is taken. Who changes entries holds the image's
//! lock anyway, so that a snapshot goes with the refcounts and L2 slices of the same moment.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::arena::Arena;
use super::header::MAX_L1_SIZE;
use crate::error::Errno;

/// What is written of the table at least, in bytes.
const SECTOR: usize = 512;
/// Entries per sector.
const PER_SECTOR: usize = SECTOR / 8;

/// The table. It can grow up to [`MAX_L1_SIZE`]; the room for that costs address space only.
pub struct L1Table {
    arena: Arena,
    /// Entries.
    len: AtomicUsize,
    /// Sectors that were changed since the last snapshot.
    dirty: Mutex<BTreeSet<usize>>,
}

impl L1Table {
    /// From its bytes as on disk.
    ///
    /// # Errors
    /// ENOMEM; EFBIG beyond [`MAX_L1_SIZE`].
    pub fn parse(bytes: &[u8]) -> Result<L1Table, Errno> {
        let capacity = usize::try_from(MAX_L1_SIZE / 8).map_err(|_| Errno(libc::ENOMEM))?;
        let len = bytes.len() / 8;
        if len > capacity {
            return Err(Errno(libc::EFBIG));
        }
        let arena = Arena::new(capacity)?;
        for (word, bytes) in arena.words().iter().zip(bytes.chunks_exact(8)) {
            let mut value = [0; 8];
            value.copy_from_slice(bytes);
            // Zeroes are there already: their pages stay untouched.
            if value != [0; 8] {
                word.store(u64::from_be_bytes(value), Ordering::Relaxed);
            }
        }
        Ok(L1Table { arena, len: AtomicUsize::new(len), dirty: Mutex::default() })
    }

    /// The entry at `index`; 0 beyond the table.
    pub fn get(&self, index: u64) -> u64 {
        let entry = usize::try_from(index).ok().and_then(|i| self.arena.words().get(i));
        entry.map_or(0, |e| e.load(Ordering::Acquire))
    }

    /// Entries.
    pub fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire) as u64
    }

    /// Changes the entry at `index`.
    ///
    /// # Panics
    /// Beyond the table.
    pub fn set(&self, index: u64, word: u64) {
        assert!(index < self.len(), "an L1 entry beyond the table");
        let index = index as usize;
        let mut dirty = self.lock();
        self.arena.words()[index].store(word, Ordering::Release);
        dirty.insert(index / PER_SECTOR);
    }

    /// Makes the table `len` entries long; the new ones are 0. It never becomes shorter.
    ///
    /// Nothing becomes dirty: who grows a table writes it to where there is room for it.
    ///
    /// # Errors
    /// EFBIG beyond [`MAX_L1_SIZE`].
    pub fn grow_to(&self, len: u64) -> Result<(), Errno> {
        let len = usize::try_from(len).map_err(|_| Errno(libc::EFBIG))?;
        if len > self.arena.words().len() {
            return Err(Errno(libc::EFBIG));
        }
        self.len.fetch_max(len, Ordering::Release);
        Ok(())
    }

    /// The whole table as on disk.
    #[cfg(test)]
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes_of(0, self.len.load(Ordering::Acquire))
    }

    fn bytes_of(&self, first: usize, end: usize) -> Vec<u8> {
        let words = self.arena.words()[first..end].iter();
        words.flat_map(|w| w.load(Ordering::Relaxed).to_be_bytes()).collect()
    }

    /// The changed sectors, in order: the offset in bytes from the table's start, and the bytes. The last sector ends
    /// with the table. They count as written from now on, unless [`L1Table::written`] says that they are not.
    pub fn snapshot(&self) -> Vec<(u64, Vec<u8>)> {
        let mut dirty = self.lock();
        let len = self.len.load(Ordering::Acquire);
        let copy = |sector| {
            let first = sector * PER_SECTOR;
            ((sector * SECTOR) as u64, self.bytes_of(first, (first + PER_SECTOR).min(len)))
        };
        std::mem::take(&mut *dirty).into_iter().map(copy).collect()
    }

    /// The sectors of a snapshot are on disk; or not, if not `ok`: then they are dirty again.
    pub fn written(&self, sectors: &[(u64, Vec<u8>)], ok: bool) {
        if !ok {
            self.lock().extend(sectors.iter().map(|(offset, _)| *offset as usize / SECTOR));
        }
    }

    /// Whether a snapshot would have something to write.
    pub fn has_dirty(&self) -> bool {
        !self.lock().is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        self.dirty.lock().expect("no holder panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(len: u64) -> L1Table {
        let bytes: Vec<u8> = (0..len).flat_map(|n| (n + 1).to_be_bytes()).collect();
        L1Table::parse(&bytes).unwrap()
    }

    #[test]
    fn changed_sectors_are_written_once() {
        let l1 = table(70);
        assert!(!l1.has_dirty() && l1.snapshot().is_empty());
        l1.set(69, 700);
        l1.set(64, 640);
        l1.set(3, 0);
        let copies = l1.snapshot();
        assert_eq!(
            copies.iter().map(|(at, b)| (*at, b.len())).collect::<Vec<_>>(),
            [(0, 512), (512, 48)]
        );
        assert_eq!(copies[0].1[16..40], [3u64, 0, 5].map(u64::to_be_bytes).concat());
        assert_eq!(copies[1].1[..16], [640u64, 66].map(u64::to_be_bytes).concat());
        assert!(!l1.has_dirty());
        l1.set(69, 7);
        l1.written(&copies, true);
        assert_eq!(l1.snapshot().len(), 1);
        l1.written(&copies, false);
        l1.set(69, 701);
        let again = l1.snapshot();
        assert_eq!((again.len(), &again[0]), (2, &copies[0]));
        assert!(again[1].1.ends_with(&701u64.to_be_bytes()));
    }

    #[test]
    fn a_table_grows_to_the_limit() {
        let l1 = table(2);
        assert_eq!((l1.get(1), l1.get(2), l1.get(u64::MAX)), (2, 0, 0));
        l1.grow_to(1).unwrap();
        assert_eq!(l1.len(), 2);
        l1.grow_to(MAX_L1_SIZE / 8).unwrap();
        l1.set(MAX_L1_SIZE / 8 - 1, 9);
        assert_eq!((l1.get(MAX_L1_SIZE / 8 - 1), l1.len()), (9, MAX_L1_SIZE / 8));
        assert_eq!(l1.bytes().len() as u64, MAX_L1_SIZE);
        assert_eq!(l1.grow_to(MAX_L1_SIZE / 8 + 1), Err(Errno(libc::EFBIG)));
        assert!(L1Table::parse(&vec![0; MAX_L1_SIZE as usize + 8]).is_err());
    }
}
