//! The guest's memory: regions that the front end gave us by file descriptor, and translation of addresses.
//!
//! Rows of the vhost-user specification ("Memory region description", "Multiple Memory regions description"): a region
//! has a guest address (used by descriptors), a user address (the front end's own, used by SET_VRING_ADDR), a size
//! and an offset into its file. A [`GuestMap`] is immutable; changes make a new one that shares the unchanged
//! regions, and the old one goes when the last queue that used it has switched.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use super::sg::IoVec;
use super::sigbus::Guard;
use crate::error::Errno;

/// The most regions a map holds: what libvhost-user and QEMU's `vhost-user` limit themselves to (ACPI slots).
pub const MAX_REGIONS: usize = 509;

/// One mapped region of guest memory; unmapped when dropped.
pub struct Region {
    /// Guest physical address of its first byte.
    pub guest_addr: u64,
    /// The front end's user address of its first byte.
    pub user_addr: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Where it starts in its file.
    pub mmap_offset: u64,
    /// What was mapped: our successor will want it (an upgrade in place).
    file: OwnedFd,
    host: *mut u8,
    mapping: *mut libc::c_void,
    mapping_len: usize,
    /// `Some` until it is unmapped.
    guard: Option<Guard>,
}

// SAFETY: a region is a range of addresses of shared memory; it is only accessed by volatile copies, atomics or the kernel.
unsafe impl Send for Region {}
// SAFETY: as above; the struct itself is immutable after construction.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `size` bytes at `mmap_offset` of `file`.
    ///
    /// The mapping starts at a multiple of the file's own page size (hugetlbfs refuses anything else), so an odd
    /// `mmap_offset` is served.
    ///
    /// # Errors
    /// EINVAL for a size of 0 or ranges that overflow; else what `mmap` says.
    pub fn map(
        file: &impl AsFd,
        guest_addr: u64,
        user_addr: u64,
        size: u64,
        mmap_offset: u64,
    ) -> Result<Region, Errno> {
        let page = page_size_of(file)?;
        let lead = mmap_offset % page;
        let copy = file.as_fd().try_clone_to_owned()?;
        let fits = size != 0
            && guest_addr.checked_add(size).is_some()
            && user_addr.checked_add(size).is_some()
            && mmap_offset.checked_add(size).is_some();
        let want = lead.checked_add(size).and_then(|n| n.checked_next_multiple_of(page));
        let (Some(want), true) = (want, fits) else { return Err(Errno::EINVAL) };
        let mapping_len = usize::try_from(want).map_err(|_| Errno::EINVAL)?;
        let offset = i64::try_from(mmap_offset - lead).map_err(|_| Errno::EINVAL)?;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice; no Rust object lives there.
        let mapping = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapping_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_fd().as_raw_fd(),
                offset,
            )
        };
        if mapping == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        // The guest's memory has no place in our core dumps. Advice only: a refusal changes nothing.
        // SAFETY: the range is the mapping just made.
        if unsafe { libc::madvise(mapping, mapping_len, libc::MADV_DONTDUMP) } != 0 {
            log::debug!("madvise(MADV_DONTDUMP): {}", Errno::last());
        }
        let lead = usize::try_from(lead).map_err(|_| Errno::EINVAL)?;
        let host = mapping.cast::<u8>().wrapping_add(lead);
        // SAFETY: all of the mapping just made, whole pages of the file's; `drop` gives up the guard before it unmaps.
        let guard = Some(unsafe { Guard::new(mapping, mapping_len) });
        let file = copy;
        let region = Region {
            guest_addr,
            user_addr,
            size,
            mmap_offset,
            file,
            host,
            mapping,
            mapping_len,
            guard,
        };
        Ok(region)
    }

    /// Whether its file was cut short while it was in use: it is private zeroes since, see [`super::sigbus`].
    pub fn is_lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::is_lost)
    }

    /// Memory of no file: Miri knows no other.
    #[cfg(test)]
    pub(crate) fn anonymous(guest_addr: u64, user_addr: u64, size: u64) -> Region {
        let mapping_len = usize::try_from(size).expect("64-bit hosts only");
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE);
        let flags = flags | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping at an address of the kernel's choice; no Rust object lives there.
        let mapping = unsafe { libc::mmap(std::ptr::null_mut(), mapping_len, prot, flags, -1, 0) };
        assert_ne!(mapping, libc::MAP_FAILED, "{}", Errno::last());
        let host = mapping.cast();
        let file = std::fs::File::open("/dev/null").unwrap().into();
        let mmap_offset = 0;
        let guard = None;
        Region { guest_addr, user_addr, size, mmap_offset, file, host, mapping, mapping_len, guard }
    }

    /// As if nobody guarded it.
    #[cfg(test)]
    pub(super) fn unguard(&mut self) {
        self.guard = None;
    }

    /// The file that is mapped.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Its first byte in our address space; `size` bytes from there are mapped while the region lives.
    pub(crate) fn host(&self) -> *mut u8 {
        self.host
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.guard = None;
        // SAFETY: the mapping is ours, and no request can reach it any more: queues hold the map that holds the
        // region until their last request has completed.
        unsafe { libc::munmap(self.mapping, self.mapping_len) };
    }
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:#x}, +{:#x}) user {:#x}", self.guest_addr, self.size, self.user_addr)
    }
}

fn page_size_of(file: &impl AsFd) -> Result<u64, Errno> {
    // SAFETY: `statfs` is plain data that the call fills; the descriptor is borrowed for the call.
    let (rc, st) = unsafe {
        let mut st: libc::statfs = std::mem::zeroed();
        (libc::fstatfs(file.as_fd().as_raw_fd(), &raw mut st), st)
    };
    if rc != 0 {
        return Err(Errno::last());
    }
    // SAFETY: no pointers involved.
    let base = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let page = if st.f_type == libc::HUGETLBFS_MAGIC { st.f_bsize } else { base };
    u64::try_from(page).ok().filter(|p| p.is_power_of_two()).ok_or(Errno::EINVAL)
}

/// An immutable set of regions that do not overlap, sorted by guest address.
#[derive(Debug, Default)]
pub struct GuestMap {
    regions: Vec<Arc<Region>>,
}

impl GuestMap {
    /// A map of `regions`.
    ///
    /// # Errors
    /// EINVAL if two overlap in guest or user addresses, ENOSPC if there are more than [`MAX_REGIONS`].
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<GuestMap, Errno> {
        if regions.len() > MAX_REGIONS {
            return Err(Errno::ENOSPC);
        }
        let overlaps = |r: &[Arc<Region>], key: fn(&Region) -> u64| {
            r.windows(2).any(|w| key(&w[0]) + w[0].size > key(&w[1]))
        };
        regions.sort_by_key(|r| r.user_addr);
        let clash = overlaps(&regions, |r| r.user_addr);
        regions.sort_by_key(|r| r.guest_addr);
        if clash || overlaps(&regions, |r| r.guest_addr) {
            return Err(Errno::EINVAL);
        }
        Ok(GuestMap { regions })
    }

    /// The regions, sorted by guest address.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Whether a part of it was lost, see [`Region::is_lost`].
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|r| r.is_lost())
    }

    /// The only region that may have `guest_addr`.
    #[inline]
    fn find(&self, guest_addr: u64) -> Option<&Region> {
        let (first, rest) = self.regions.split_first()?;
        let below = rest.partition_point(|r| r.guest_addr <= guest_addr);
        Some(rest[..below].last().unwrap_or(first))
    }

    /// Translates the start of a guest range: the longest contiguous piece of `[guest_addr, guest_addr + len)` at its beginning.
    /// `None` if the first byte is not mapped.
    #[inline]
    pub fn translate(&self, guest_addr: u64, len: u64) -> Option<IoVec> {
        let r = self.find(guest_addr)?;
        // An address below the region comes out larger than any size: no region ends beyond 2^64.
        let skip = guest_addr.wrapping_sub(r.guest_addr);
        if skip >= r.size {
            return None;
        }
        let n = len.min(r.size - skip);
        // Both fit: the region is mapped in one piece of our address space.
        #[expect(
            clippy::cast_possible_truncation,
            reason = "64-bit hosts only; the region is mapped"
        )]
        // SAFETY: inside the region's mapping, which lives as long as this map.
        Some(unsafe { IoVec::new(r.host.add(skip as usize), n as usize) })
    }

    /// Calls `each` with the guest address and length of every part of `v` that lies in a region: one, as a rule.
    pub(super) fn guest_ranges(&self, v: &IoVec, mut each: impl FnMut(u64, u64)) {
        let (from, mut left) = (v.base().addr() as u64, v.len() as u64);
        let to = from + left;
        for r in &self.regions {
            if left == 0 {
                return;
            }
            let host = r.host.addr() as u64;
            let (start, end) = (from.max(host), to.min(host + r.size));
            if start < end {
                each(r.guest_addr + (start - host), end - start);
                left -= end - start;
            }
        }
    }

    /// Translates `len` bytes at a user address of the front end (SET_VRING_ADDR), in one piece, aligned to `align` bytes.
    pub fn translate_user(&self, user_addr: u64, len: u64, align: usize) -> Option<*mut u8> {
        let r = self.regions.iter().find(|r| {
            user_addr >= r.user_addr
                && user_addr.checked_add(len).is_some_and(|e| e <= r.user_addr + r.size)
        })?;
        let at = r.host.wrapping_add(usize::try_from(user_addr - r.user_addr).ok()?);
        at.addr().is_multiple_of(align).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{FromRawFd, OwnedFd};

    use super::*;

    #[test]
    fn addresses_are_in_one_region_or_none() {
        const PAGE: u64 = 4096;
        let places =
            [(PAGE, PAGE), (4 * PAGE, 2 * PAGE), (6 * PAGE, PAGE), (u64::MAX - PAGE, PAGE)];
        let regions = places.map(|(at, len)| Arc::new(Region::anonymous(at, at, len)));
        for known in 0..=places.len() {
            let map = GuestMap::new(regions[..known].to_vec()).unwrap();
            let edges = places.iter().flat_map(|(at, len)| [*at, at + len - 1, at + len]);
            for addr in edges.flat_map(|at| [at - 1, at, at.saturating_add(1)]).chain([0]) {
                let inside =
                    |r: &&Arc<Region>| addr >= r.guest_addr && addr - r.guest_addr < r.size;
                let want = regions[..known].iter().find(inside).map(|r| {
                    let skip = addr - r.guest_addr;
                    (r.host.addr() as u64 + skip, (r.size - skip).min(8192))
                });
                let got =
                    map.translate(addr, 8192).map(|v| (v.base().addr() as u64, v.len() as u64));
                assert_eq!(got, want, "{addr:#x} in {known} regions");
            }
        }
    }

    /// Needs no huge page: none is touched. A wrong length would not be unmapped, either.
    #[test]
    fn mappings_of_huge_pages_are_of_whole_ones() {
        const NAME: &str = "map-rs-huge";
        const HUGE: u64 = 2 << 20;
        let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB;
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"map-rs-huge".as_ptr(), flags) };
        assert!(fd >= 0, "{}", Errno::last());
        // SAFETY: a new descriptor that nobody else owns.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(4 * HUGE).unwrap();
        let mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            maps.lines().filter(|line| line.contains(NAME)).count()
        };
        for (offset, size, pages) in
            [(0, HUGE, 1), (HUGE + 512, 4096, 1), (HUGE - 1, 2, 2), (4096, 3 * HUGE, 4)]
        {
            let region = Region::map(&file, 0, 0, size, offset).unwrap();
            assert_eq!(region.mapping_len as u64, pages * HUGE, "{size} bytes at {offset}");
            assert_eq!((region.host.addr() - region.mapping.addr()) as u64, offset % HUGE);
            assert_eq!(mapped(), 1);
            drop(region);
            assert_eq!(mapped(), 0, "{size} bytes at {offset}");
        }
    }
}
