//! The refcounts in the image: the refcount table in memory, the refcount blocks through a small cache of pages.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::super::layout::{Geometry, REFTABLE_OFFSET_MASK, refcount_get, refcount_set};
use super::disk::Disk;
use crate::error::Errno;

/// The unit of the cache in bytes: small enough that a reference into a foreign block costs little, large enough for
/// walks in order.
const PAGE: u64 = 16 << 10;
/// Pages in one of the two generations: 8 MiB each, in order that one pass over an image of some TiB stays in memory.
const GENERATION: usize = 512;

struct Page {
    bytes: Vec<u8>,
    dirty: bool,
}

/// An unusable entry of the refcount table: the block is not where a cluster starts.
#[derive(Debug)]
pub(super) struct Unaligned {
    pub(super) offset: u64,
    pub(super) index: u64,
}

/// Why a refcount cannot be told.
#[derive(Debug)]
pub(super) enum Trouble {
    Unaligned(Unaligned),
    Io(Errno),
}

impl From<Errno> for Trouble {
    fn from(e: Errno) -> Trouble {
        Trouble::Io(e)
    }
}

/// The refcounts as the image has them.
pub(super) struct Refcounts<'a> {
    disk: Disk<'a>,
    g: Geometry,
    /// The refcount table.
    pub(super) table: Vec<u64>,
    young: HashMap<u64, Page>,
    old: HashMap<u64, Page>,
}

impl<'a> Refcounts<'a> {
    pub(super) fn new(disk: Disk<'a>, g: Geometry, table: Vec<u64>) -> Refcounts<'a> {
        Refcounts { disk, g, table, young: HashMap::new(), old: HashMap::new() }
    }

    /// The offset of the refcount block for `cluster`; `None`: no such block, the refcount is 0.
    fn block(&self, cluster: u64) -> Result<Option<u64>, Unaligned> {
        let index = self.g.reftable_index(cluster);
        let entry = usize::try_from(index).ok().and_then(|i| self.table.get(i));
        let offset = entry.copied().unwrap_or(0) & REFTABLE_OFFSET_MASK;
        match offset {
            0 => Ok(None),
            _ if !offset.is_multiple_of(self.g.cluster_size()) => Err(Unaligned { offset, index }),
            _ => Ok(Some(offset)),
        }
    }

    /// Whether `cluster` and all others of its refcount block have refcount 0 because there is no block.
    pub(super) fn is_blank(&self, cluster: u64) -> bool {
        matches!(self.block(cluster), Ok(None))
    }

    /// The page with the refcount of `cluster` in the block at `block`, and the index in it.
    async fn page(&mut self, block: u64, cluster: u64) -> Result<(&mut Page, usize), Errno> {
        let size = PAGE.min(self.g.cluster_size());
        let per_page_bits = size.trailing_zeros() + 3 - self.g.refcount_order;
        let index = self.g.refblock_index(cluster);
        let at = block + (index >> per_page_bits) * size;
        if !self.young.contains_key(&at) {
            let page = match self.old.remove(&at) {
                Some(page) => page,
                None => {
                    let len = usize::try_from(size).unwrap_or(usize::MAX);
                    Page { bytes: self.disk.read(at, len).await?, dirty: false }
                }
            };
            if self.young.len() >= GENERATION {
                let last = std::mem::replace(&mut self.old, std::mem::take(&mut self.young));
                write_back(self.disk, last).await?;
            }
            self.young.insert(at, page);
        }
        let page = self.young.get_mut(&at).ok_or(Errno::EIO)?;
        Ok((page, (index & ((1 << per_page_bits) - 1)) as usize))
    }

    /// The refcount of `cluster`.
    pub(super) async fn get(&mut self, cluster: u64) -> Result<u64, Trouble> {
        let order = self.g.refcount_order;
        let Some(block) = self.block(cluster).map_err(Trouble::Unaligned)? else { return Ok(0) };
        let (page, index) = self.page(block, cluster).await?;
        Ok(refcount_get(&page.bytes, order, index))
    }

    /// Sets the refcount of `cluster`, which has a refcount block. On disk after [`Refcounts::flush`].
    pub(super) async fn set(&mut self, cluster: u64, value: u64) -> Result<(), Errno> {
        let order = self.g.refcount_order;
        let Ok(Some(block)) = self.block(cluster) else { return Err(Errno::EIO) };
        let (page, index) = self.page(block, cluster).await?;
        refcount_set(&mut page.bytes, order, index, value);
        page.dirty = true;
        Ok(())
    }

    /// Writes what was changed, and waits until it is stable.
    pub(super) async fn flush(&mut self) -> Result<(), Errno> {
        write_back(self.disk, std::mem::take(&mut self.old)).await?;
        write_back(self.disk, std::mem::take(&mut self.young)).await?;
        self.disk.flush().await
    }
}

async fn write_back(disk: Disk<'_>, pages: HashMap<u64, Page>) -> Result<(), Errno> {
    let mut dirty: Vec<_> = pages.into_iter().filter(|(_, page)| page.dirty).collect();
    dirty.sort_by_key(|(at, _)| *at);
    for (at, page) in dirty {
        disk.write(at, &page.bytes).await?;
    }
    Ok(())
}
