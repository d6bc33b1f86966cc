//! Guest memory as the front end changes it: each change makes a new map, or fails and leaves the old one as it was.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::message::{LogPlace, MemRegion};
use crate::err;
use crate::error::Result;
use crate::mem::{DirtyLog, GuestMap, Region};

/// A map of exactly these regions (SET_MEM_TABLE).
///
/// # Errors
/// If there is not one descriptor for each, one cannot be mapped, or two overlap.
pub(super) fn replaced(regions: &[MemRegion], fds: Vec<OwnedFd>) -> Result<Arc<GuestMap>> {
    if regions.len() != fds.len() {
        return Err(err!("{} file descriptors for {} regions", fds.len(), regions.len()));
    }
    let mapped = regions.iter().zip(fds).map(|(r, fd)| map(r, fd)).collect::<Result<_>>()?;
    finish(mapped)
}

/// The map with one more region (ADD_MEM_REG).
///
/// # Errors
/// If it cannot be mapped, overlaps another, or there is no slot left.
pub(super) fn with(old: &GuestMap, region: &MemRegion, fd: OwnedFd) -> Result<Arc<GuestMap>> {
    let mut regions = old.regions().to_vec();
    regions.push(map(region, fd)?);
    finish(regions)
}

/// The map without one region, found by its addresses and size (REM_MEM_REG).
///
/// # Errors
/// If there is none such.
pub(super) fn without(old: &GuestMap, region: &MemRegion) -> Result<Arc<GuestMap>> {
    let mut regions = old.regions().to_vec();
    let key = (region.guest_addr, region.user_addr, region.size);
    let at = regions.iter().position(|r| (r.guest_addr, r.user_addr, r.size) == key);
    regions.remove(at.ok_or_else(|| err!("there is no such region: {}", describe(region)))?);
    finish(regions)
}

/// A dirty log (SET_LOG_BASE).
///
/// # Errors
/// If it is no file, has no bytes, does not lie within its file or cannot be mapped.
pub(super) fn log(place: LogPlace, fd: OwnedFd) -> Result<Arc<DirtyLog>> {
    let LogPlace { size, mmap_offset } = place;
    let fail = |e: &dyn std::fmt::Display| err!("log of {size:#x} bytes at {mmap_offset:#x}: {e}");
    let region = shared(size, mmap_offset, fd).map_err(|e| fail(&e))?;
    Ok(Arc::new(DirtyLog::new(region)))
}

/// Memory that is not the guest's but shared with the front end: `size` bytes at `offset` of a file.
///
/// # Errors
/// If it is no file, has no bytes, does not lie within its file or cannot be mapped.
pub(super) fn shared(size: u64, offset: u64, fd: OwnedFd) -> Result<Arc<Region>> {
    let file = File::from(fd);
    // Access beyond the end of a file or device is a SIGBUS.
    let meta = file.metadata().map_err(|e| err!("{e}"))?;
    if !meta.is_file() || offset.checked_add(size).is_none_or(|end| end > meta.len()) {
        return Err(err!("not within a file"));
    }
    Region::map(&file, 0, 0, size, offset).map(Arc::new).map_err(|e| err!("{e}"))
}

fn map(region: &MemRegion, fd: OwnedFd) -> Result<Arc<Region>> {
    let MemRegion { guest_addr, size, user_addr, mmap_offset } = *region;
    let file = File::from(fd);
    // Access beyond the end of a file is a SIGBUS. Devices (dax) have no length to compare with.
    let meta = file.metadata().map_err(|e| err!("{}: {e}", describe(region)))?;
    if meta.is_file() && mmap_offset.checked_add(size).is_none_or(|end| end > meta.len()) {
        return Err(err!("{}: its file has only {:#x} bytes", describe(region), meta.len()));
    }
    let mapped = Region::map(&file, guest_addr, user_addr, size, mmap_offset);
    mapped.map(Arc::new).map_err(|e| err!("{}: {e}", describe(region)))
}

fn finish(regions: Vec<Arc<Region>>) -> Result<Arc<GuestMap>> {
    let count = regions.len();
    GuestMap::new(regions).map(Arc::new).map_err(|e| err!("a map of {count} regions: {e}"))
}

fn describe(r: &MemRegion) -> String {
    format!(
        "region of {:#x} bytes at guest {:#x}, user {:#x}, offset {:#x}",
        r.size, r.guest_addr, r.user_addr, r.mmap_offset
    )
}
