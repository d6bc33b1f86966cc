//! The region that tracks requests in flight ("Inflight I/O tracking"): made for GET_INFLIGHT_FD, mapped for
//! SET_INFLIGHT_FD. What is in it is `virtio::inflight`'s.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::memory;
use super::message::{InflightDesc, MAX_QUEUES};
use crate::err;
use crate::error::Result;
use crate::mem::Region;
use crate::virtio::inflight::{View, part_len};

/// A mapped region.
pub(super) struct Area {
    region: Arc<Region>,
    queues: u16,
    queue_size: u16,
    packed: bool,
}

/// Makes memory for what the front end asks, all zeroes: nobody has used it. The answer's description of it, and its file.
///
/// # Errors
/// If there are no such queues (`queues` of `size_max` entries are offered), or no memory.
pub(super) fn create(
    asked: InflightDesc,
    packed: bool,
    queues: u16,
    size_max: u16,
) -> Result<(InflightDesc, OwnedFd)> {
    let InflightDesc { num_queues, queue_size, .. } = asked;
    if !(1..=queues).contains(&num_queues) || !(1..=size_max).contains(&queue_size) {
        return Err(err!("{num_queues} queues of {queue_size} entries were not offered"));
    }
    let mmap_size = u64::from(num_queues) * part_len(queue_size, packed);
    // Sealed: it can neither shrink under our feet nor under our successor's.
    let file = crate::sys::memfd(c"vhost-user-blk-inflight", mmap_size)
        .map_err(|e| err!("no memory of {mmap_size} bytes: {e}"))?;
    Ok((InflightDesc { mmap_size, mmap_offset: 0, ..asked }, file.into()))
}

impl Area {
    /// Maps what the front end gives: memory that we, or a predecessor, made for rings of this kind.
    ///
    /// # Errors
    /// If it is too small for what it is said to hold, reaches beyond its file (access would be a SIGBUS), is not a
    /// file at all, or cannot be mapped.
    pub(super) fn map(desc: InflightDesc, packed: bool, fd: OwnedFd) -> Result<Area> {
        let InflightDesc { mmap_size, mmap_offset, num_queues, queue_size } = desc;
        let need = u64::from(num_queues) * part_len(queue_size, packed);
        if !(1..=MAX_QUEUES).contains(&num_queues) || queue_size == 0 || mmap_size < need {
            return Err(err!(
                "{mmap_size} bytes for {num_queues} {} queues of {queue_size} entries, not {need}",
                if packed { "packed" } else { "split" }
            ));
        }
        if !mmap_offset.is_multiple_of(8) {
            return Err(err!("an offset of {mmap_offset:#x}, which is not aligned"));
        }
        let region = memory::shared(need, mmap_offset, fd)
            .map_err(|e| err!("{need} bytes at {mmap_offset:#x}: {e}"))?;
        Ok(Area { region, queues: num_queues, queue_size, packed })
    }

    /// The part of queue `index`, for a ring of `size` entries; `None` if it has no place for that.
    pub(super) fn view(&self, index: u16, size: u16, packed: bool) -> Option<View> {
        let offset = u64::from(index) * part_len(self.queue_size, packed);
        let fits = index < self.queues && size <= self.queue_size && packed == self.packed;
        if fits { View::new(Arc::clone(&self.region), offset, size, packed) } else { None }
    }
}
