//! Guest memory: memfd regions shared with the back end, and buffers cut out of them.
//!
//! Not a general allocator: first fit over a sorted list of holes, under a lock that the load
//! generator's loop never takes. The back end writes the same bytes at any time, therefore no `&[u8]`
//! into guest memory ever exists: bytes are copied in and out, words are atomics.
//!
//! Invariant: a `Buf` lies wholly inside one mapped region, and keeps the memory alive.

use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result, io_err};
use crate::sys::{Mapping, memfd};

/// Guest-physical address of the first region: not 0, so that a forgotten translation shows.
pub const GPA_BASE: u64 = 0x1_0000_0000;
/// Distance left between regions, so that a range running out of one never hits the next.
const GPA_GAP: u64 = 0x1000_0000;

/// One region as the back end is told of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// Address in this process: what SET_VRING_ADDR speaks in.
    pub user_addr: u64,
    /// Where it begins in its file, in bytes.
    pub offset: u64,
}

#[derive(Debug)]
struct Region {
    gpa: u64,
    fd: OwnedFd,
    map: Mapping,
    /// Free ranges as (offset, length), sorted by offset, never adjacent.
    holes: Mutex<Vec<(usize, usize)>>,
}

impl Region {
    fn holes(&self) -> MutexGuard<'_, Vec<(usize, usize)>> {
        self.holes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn info(&self) -> RegionInfo {
        RegionInfo {
            gpa: self.gpa,
            len: self.map.len() as u64,
            user_addr: self.map.ptr().as_ptr().addr() as u64,
            offset: self.map.offset() as u64,
        }
    }

    /// Takes `len` bytes whose offset is `skew` past a multiple of `align`.
    fn take(&self, len: usize, align: usize, skew: usize) -> Option<usize> {
        let mut holes = self.holes();
        for i in 0..holes.len() {
            let (start, room) = holes[i];
            let mut at = (start / align * align) + skew;
            if at < start {
                at += align;
            }
            let end = at.checked_add(len)?;
            if end > start + room {
                continue;
            }
            let after = (end, start + room - end);
            holes[i] = (start, at - start);
            if after.1 > 0 {
                holes.insert(i + 1, after);
            }
            if holes[i].1 == 0 {
                holes.remove(i);
            }
            return Some(at);
        }
        None
    }

    fn give(&self, offset: usize, len: usize) {
        let mut holes = self.holes();
        let i = holes.partition_point(|h| h.0 < offset);
        holes.insert(i, (offset, len));
        if i + 1 < holes.len() && offset + len == holes[i + 1].0 {
            holes[i].1 += holes[i + 1].1;
            holes.remove(i + 1);
        }
        if i > 0 && holes[i - 1].0 + holes[i - 1].1 == offset {
            holes[i - 1].1 += holes[i].1;
            holes.remove(i);
        }
    }
}

/// The guest's memory: one or more regions with gaps between them.
#[derive(Debug)]
pub struct GuestMem {
    regions: Mutex<Vec<Arc<Region>>>,
}

impl GuestMem {
    /// `count` regions of `len` bytes each.
    ///
    /// # Errors
    /// Those of memfd and mmap.
    pub fn new(count: usize, len: usize) -> Result<Arc<Self>> {
        let mem = Arc::new(Self { regions: Mutex::new(Vec::new()) });
        for _ in 0..count {
            mem.add_region(len)?;
        }
        Ok(mem)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Region>>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a region behind the last one and returns its index; the back end is not told.
    ///
    /// # Errors
    /// Those of memfd and mmap.
    pub fn add_region(&self, len: usize) -> Result<usize> {
        let fd = memfd(c"vub-guest", len as u64).map_err(io_err("memfd"))?;
        self.add_part(fd, len, 0..len)
    }

    /// The same with a part of the file `fd`, which has `whole` bytes.
    ///
    /// # Errors
    /// Those of mmap.
    pub fn add_part(&self, fd: OwnedFd, whole: usize, part: Range<usize>) -> Result<usize> {
        let len = part.len();
        let map = Mapping::new(&fd, whole, part).map_err(io_err("mmap of guest memory"))?;
        let mut regions = self.lock();
        let gpa = regions.last().map_or(GPA_BASE, |r| r.gpa + r.map.len() as u64 + GPA_GAP);
        regions.push(Arc::new(Region { gpa, fd, map, holes: Mutex::new(vec![(0, len)]) }));
        Ok(regions.len() - 1)
    }

    /// Forgets a region; buffers in it stay valid here, the back end is not told.
    pub fn remove_region(&self, index: usize) -> Option<RegionInfo> {
        let mut regions = self.lock();
        (index < regions.len()).then(|| regions.remove(index).info())
    }

    /// All regions, with a number of the fd each is backed by.
    #[must_use]
    pub fn regions(&self) -> Vec<(RegionInfo, i32)> {
        self.lock().iter().map(|r| (r.info(), r.fd.as_raw_fd())).collect()
    }

    /// A buffer anywhere, with the given alignment.
    ///
    /// # Errors
    /// `OutOfMemory`
    pub fn alloc(self: &Arc<Self>, len: usize, align: usize) -> Result<Buf> {
        self.alloc_skewed(len, align, 0)
    }

    /// A buffer which begins `skew` bytes past a multiple of `align`: for odd offsets.
    ///
    /// # Errors
    /// `OutOfMemory`
    pub fn alloc_skewed(self: &Arc<Self>, len: usize, align: usize, skew: usize) -> Result<Buf> {
        let regions = self.lock().clone();
        regions.iter().find_map(|r| cut(r, len, align, skew)).ok_or(Error::OutOfMemory(len))
    }

    /// A buffer in the given region.
    ///
    /// # Errors
    /// `OutOfMemory`
    pub fn alloc_in(self: &Arc<Self>, region: usize, len: usize, align: usize) -> Result<Buf> {
        let region = self.lock().get(region).cloned();
        region.and_then(|r| cut(&r, len, align, 0)).ok_or(Error::OutOfMemory(len))
    }

    /// The buffer's view of `len` bytes at a guest-physical address, for devices and oracles; `None`
    /// when the range is not inside one region. It does not own the bytes.
    #[must_use]
    pub fn view(&self, gpa: u64, len: usize) -> Option<Buf> {
        let regions = self.lock();
        let region = regions.iter().rev().find(|r| r.gpa <= gpa)?;
        let offset = usize::try_from(gpa - region.gpa).ok()?;
        if offset.checked_add(len)? > region.map.len() {
            return None;
        }
        Some(buf_at(region, offset, len, false))
    }
}

fn cut(region: &Arc<Region>, len: usize, align: usize, skew: usize) -> Option<Buf> {
    let offset = region.take(len.max(1), align.max(1), skew)?;
    Some(buf_at(region, offset, len, true))
}

fn buf_at(region: &Arc<Region>, offset: usize, len: usize, owned: bool) -> Buf {
    assert!(offset + len <= region.map.len(), "a buffer lies inside its region");
    // SAFETY: the offset is inside the mapping, asserted above.
    let ptr = unsafe { region.map.ptr().add(offset) };
    Buf { region: Arc::clone(region), ptr, gpa: region.gpa + offset as u64, offset, len, owned }
}

/// A range of guest memory; given back when dropped.
#[derive(Debug)]
pub struct Buf {
    region: Arc<Region>,
    ptr: NonNull<u8>,
    gpa: u64,
    offset: usize,
    len: usize,
    owned: bool,
}

// SAFETY: the pointer is into a mapping kept alive by `region`, and is only used for copies and
// atomics; nothing in it belongs to a thread.
unsafe impl Send for Buf {}
// SAFETY: as above; concurrent copies of the same bytes may tear, as with any guest.
unsafe impl Sync for Buf {}

impl Drop for Buf {
    fn drop(&mut self) {
        if self.owned {
            self.region.give(self.offset, self.len.max(1));
        }
    }
}

macro_rules! atomic_at {
    ($name:ident, $atomic:ty, $what:literal) => {
        #[doc = concat!("The ", $what, " at a byte offset.")]
        ///
        /// # Panics
        /// When it is outside the buffer or not aligned.
        #[inline]
        #[must_use]
        pub fn $name(&self, offset: usize) -> &$atomic {
            const SIZE: usize = size_of::<$atomic>();
            assert!(offset.checked_add(SIZE).is_some_and(|end| end <= self.len));
            // SAFETY: in bounds by the line above.
            let ptr = unsafe { self.ptr.add(offset) }.cast::<$atomic>();
            assert!(ptr.is_aligned());
            // SAFETY: aligned, in bounds, and mapped for as long as `self` borrows the region; the
            // other process's accesses are atomics or device copies of whole words.
            unsafe { ptr.as_ref() }
        }
    };
}

impl Buf {
    /// Guest-physical address.
    #[must_use]
    #[inline]
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Address in this process, as vring addresses are given.
    #[must_use]
    pub fn user_addr(&self) -> u64 {
        self.ptr.as_ptr().addr() as u64
    }

    /// Length in bytes.
    #[must_use]
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a buffer of no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    atomic_at!(u8_at, AtomicU8, "byte");
    atomic_at!(u16_at, AtomicU16, "u16");
    atomic_at!(u32_at, AtomicU32, "u32");
    atomic_at!(u64_at, AtomicU64, "u64");

    /// Copies `data` to `offset`.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn write(&self, offset: usize, data: &[u8]) {
        assert!(offset.checked_add(data.len()).is_some_and(|end| end <= self.len));
        // SAFETY: in bounds by the line above; `data` cannot overlap guest memory, to which no
        // reference exists.
        unsafe {
            let to = self.ptr.add(offset).as_ptr();
            std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len());
        }
    }

    /// Copies from `offset` into `data`.
    ///
    /// # Panics
    /// When the buffer is shorter.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        assert!(offset.checked_add(data.len()).is_some_and(|end| end <= self.len));
        // SAFETY: as in `write`, the other way round.
        unsafe {
            let from = self.ptr.add(offset).as_ptr();
            std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), data.len());
        }
    }

    /// A copy of all bytes.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut data = vec![0; self.len];
        self.read(0, &mut data);
        data
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        // SAFETY: the whole buffer is mapped and writable.
        unsafe { std::ptr::write_bytes(self.ptr.as_ptr(), byte, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_skewed_and_given_back() {
        let mem = GuestMem::new(2, 1 << 16).unwrap();
        let a = mem.alloc(100, 4096).unwrap();
        let b = mem.alloc_skewed(4096, 4096, 513).unwrap();
        assert_eq!(a.gpa() % 4096, 0);
        assert_eq!(b.gpa() % 4096, 513);
        let all = mem.alloc_in(1, 1 << 16, 1).unwrap();
        assert!(matches!(mem.alloc_in(1, 1, 1), Err(Error::OutOfMemory(1))));
        drop((a, b, all));
        assert_eq!(mem.alloc_in(0, 1 << 16, 1).unwrap().len(), 1 << 16);
        assert_eq!(mem.alloc_in(1, 1 << 16, 1).unwrap().len(), 1 << 16);
    }

    #[test]
    fn views_do_not_leave_a_region() {
        let mem = GuestMem::new(2, 4096).unwrap();
        assert!(mem.view(GPA_BASE, 4096).is_some());
        assert!(mem.view(GPA_BASE, 4097).is_none());
        assert!(mem.view(GPA_BASE - 1, 1).is_none());
        let b = mem.alloc_in(1, 16, 1).unwrap();
        b.write(3, b"abc");
        let mut got = [0; 3];
        mem.view(b.gpa() + 3, 3).unwrap().read(0, &mut got);
        assert_eq!(&got, b"abc");
    }
}
