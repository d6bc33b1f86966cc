//! What is to be written for the records of a journal, and writing it: see [`super`].
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use super::Refusal;
use crate::block::Node;
use crate::block::drivers::qcow2::check::disk::Disk;
use crate::block::drivers::qcow2::header::Incompatible;
use crate::block::drivers::qcow2::header_io::HeaderIo;
use crate::block::drivers::qcow2::journal::{IN_L1, Journal, Left};
use crate::block::drivers::qcow2::layout::{
    Geometry, OFFSET_MASK, REFTABLE_OFFSET_MASK, decode_reftable_entry, refcount_get, refcount_set,
};
use crate::block::drivers::qcow2::opened::Found;
use crate::block::walk::Crew;
use crate::error::Errno;
use crate::rt;

/// An L2 entry of a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// The refcount of what an entry leads to is 1.
const COPIED: u64 = 1 << 63;
/// What is read and written at a time, in bytes; less if clusters are smaller: there is nothing else in it.
const BLOCK: u64 = 4096;

/// One word of a table.
#[derive(Default)]
struct Word {
    /// All that may be there now.
    may: Vec<u64>,
    new: u64,
}

/// What is to be written.
pub struct Plan {
    /// How many words change.
    pub places: usize,
    /// By offset: blocks of tables, as they shall be.
    blocks: Vec<(u64, Vec<u8>)>,
    /// Clusters that must have the refcount 1.
    single: BTreeSet<u64>,
    /// All clusters that records speak of.
    spoken_of: BTreeSet<u64>,
}

impl Plan {
    /// Reads what the records are about, and compares.
    pub fn new(file: &Node, found: &Found, left: &Left) -> Result<Plan, Refusal> {
        let g = found.header.geometry();
        let tables = Metadata::of(found, left);
        let mut plan = Plan {
            places: 0,
            blocks: Vec::new(),
            single: BTreeSet::new(),
            spoken_of: BTreeSet::new(),
        };
        let mut words: BTreeMap<u64, Word> = BTreeMap::new();
        for record in &left.records {
            let in_l1 = record.place & IN_L1 != 0;
            let at = tables.place(record.place).filter(|at| at.saturating_add(8) <= file.len());
            let Some(at) = at else { return Err(Refusal::Not(format!("{record:x?}"))) };
            if let Some(host) = host_of(&g, at, in_l1, record.new) {
                let cluster = host >> g.cluster_bits;
                let bad = host >= file.len() || host % g.cluster_size() != 0;
                if bad || !in_l1 && tables.clusters.contains(&cluster) {
                    return Err(Refusal::Not(format!("{record:x?}")));
                }
                plan.spoken_of.insert(cluster);
            }
            let word = words.entry(at).or_insert_with(|| Word { may: vec![record.old], new: 0 });
            word.may.push(record.new);
            word.new = record.new;
        }
        for (at, word) in &words {
            let in_l1 = tables.l1.contains(at);
            if word.new & COPIED != 0
                && let Some(host) = host_of(&g, *at, in_l1, word.new)
            {
                plan.single.insert(host >> g.cluster_bits);
            }
        }
        plan.places = words.len();
        let block = g.cluster_size().min(BLOCK);
        let starts = words.keys().map(|at| at - at % block);
        plan.blocks = rt::block_on(read_blocks(file, starts, block as usize))?;
        for (at, word) in &words {
            let start = at - at % block;
            let n = plan.blocks.binary_search_by_key(&start, |(offset, _)| *offset);
            let (_, bytes) = &mut plan.blocks[n.expect("all of them were read")];
            let bytes = &mut bytes[(at - start) as usize..][..8];
            let now = u64::from_be_bytes(bytes.try_into().expect("8 bytes"));
            if !word.may.contains(&now) {
                let what = format!("{now:#x} at {at:#x} is none of {:x?}", word.may);
                return Err(Refusal::Not(what));
            }
            bytes.copy_from_slice(&word.new.to_be_bytes());
        }
        Ok(plan)
    }

    /// Writes it all. Whether refcounts must be counted.
    pub async fn carry_out(
        &mut self,
        (file, data): (&Node, &Node),
        found: &Found,
        journal: &Journal,
    ) -> Result<bool, Errno> {
        let (disk, header) = (Disk::new(file), &found.header);
        journal.beat();
        // Blocks of the medium may be larger than ours.
        file.expect_ragged_writes(
            u32::try_from(header.geometry().cluster_size()).unwrap_or(u32::MAX),
        );
        let mut recount = header.incompatible.contains(Incompatible::DIRTY);
        if !recount {
            recount = !self.count(&disk, found).await?;
        }
        if recount {
            // After a power loss from here on, refcounts are counted too. (Version 2 cannot say so.)
            HeaderIo::new(header).mark_dirty(file).await?;
        }
        if header.geometry().data_file {
            Disk::new(data).flush().await?;
        }
        disk.flush().await?;
        write_blocks(file, &self.blocks).await?;
        disk.flush().await?;
        if recount {
            journal.applied();
        }
        Ok(recount)
    }

    /// Makes the refcounts right that entries rely on. `false`: the refcount table is too short.
    async fn count(&self, disk: &Disk<'_>, found: &Found) -> Result<bool, Errno> {
        let (g, order) = (found.header.geometry(), found.header.geometry().refcount_order);
        let mut by_block: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
        for cluster in &self.single {
            by_block.entry(g.reftable_index(*cluster)).or_default().push(*cluster);
        }
        let mut new_blocks = Vec::new();
        for (index, mut clusters) in by_block {
            let entry = usize::try_from(index).ok().and_then(|i| found.reftable.get(i));
            let Some(entry) = entry else { return Ok(false) };
            let Ok(block) = decode_reftable_entry(*entry, &g) else { return Ok(false) };
            let offset = match block {
                Some(offset) => offset.0,
                None => {
                    // Nothing on disk refers to a cluster here.
                    let first = index << g.refblock_bits();
                    let all = first..first + g.refblock_entries();
                    let free = all.into_iter().find(|c| !self.spoken_of.contains(c));
                    let Some(free) = free else { return Ok(false) };
                    clusters.push(free);
                    new_blocks.push((index, free << g.cluster_bits));
                    free << g.cluster_bits
                }
            };
            let len = usize::try_from(g.cluster_size()).map_err(|_| Errno::EIO)?;
            let mut bytes = match block {
                Some(_) => disk.read(offset, len).await?,
                None => vec![0; len],
            };
            let mut changed = false;
            for cluster in clusters {
                let at = g.refblock_index(cluster) as usize;
                changed |= refcount_get(&bytes, order, at) != 1;
                refcount_set(&mut bytes, order, at, 1);
            }
            if changed {
                disk.write(offset, &bytes).await?;
            }
        }
        if !new_blocks.is_empty() {
            disk.flush().await?;
        }
        for (index, offset) in new_blocks {
            let at = found.header.refcount_table_offset.0 + index * 8;
            disk.write(at, &offset.to_be_bytes()).await?;
        }
        Ok(true)
    }
}

/// The host cluster in the image file that a word leads to.
fn host_of(g: &Geometry, at: u64, in_l1: bool, word: u64) -> Option<u64> {
    let bitmap = !in_l1 && g.extended_l2 && (at / 8) % 2 == 1;
    let elsewhere = !in_l1 && (g.data_file || word & COMPRESSED != 0);
    let host = word & OFFSET_MASK;
    (!bitmap && !elsewhere && host != 0).then_some(host)
}

/// Where tables are.
struct Metadata {
    cluster_size: u64,
    /// The active L1 table's bytes.
    l1: std::ops::Range<u64>,
    /// Active L2 tables, by offset, those of records among them.
    l2: BTreeSet<u64>,
    /// Clusters of all kinds of tables, and the header's.
    clusters: BTreeSet<u64>,
}

impl Metadata {
    fn of(found: &Found, left: &Left) -> Metadata {
        let (header, g) = (&found.header, found.header.geometry());
        let start = header.l1_table_offset.0;
        let mut l2: BTreeSet<u64> =
            (0..found.l1.len()).map(|i| found.l1.get(i) & OFFSET_MASK).collect();
        for record in left.records.iter().filter(|r| r.place & IN_L1 != 0) {
            l2.extend([record.old & OFFSET_MASK, record.new & OFFSET_MASK]);
        }
        l2.remove(&0);
        let l1 = start..start + found.l1.len() * 8;
        let cluster = |offset: u64| offset >> g.cluster_bits;
        let mut clusters: BTreeSet<u64> = l2.iter().map(|offset| cluster(*offset)).collect();
        clusters.insert(0);
        clusters.extend(cluster(l1.start)..cluster(l1.end.saturating_add(g.cluster_size() - 1)));
        let first = cluster(header.refcount_table_offset.0);
        clusters.extend(first..first + u64::from(header.refcount_table_clusters));
        let blocks = found.reftable.iter().map(|entry| entry & REFTABLE_OFFSET_MASK);
        clusters.extend(blocks.filter(|offset| *offset != 0).map(cluster));
        Metadata { cluster_size: g.cluster_size(), l1, l2, clusters }
    }

    /// The offset of an entry of an active table.
    fn place(&self, place: u64) -> Option<u64> {
        if place & IN_L1 != 0 {
            let at = (place - IN_L1).checked_mul(8)?.checked_add(self.l1.start)?;
            return self.l1.contains(&at).then_some(at);
        }
        let inside =
            place.is_multiple_of(8) && self.l2.contains(&(place - place % self.cluster_size));
        inside.then_some(place)
    }
}

/// Reads blocks, side by side: there may be thousands, each in another place. In order.
async fn read_blocks(
    file: &Node,
    at: impl Iterator<Item = u64>,
    len: usize,
) -> Result<Vec<(u64, Vec<u8>)>, Errno> {
    let mut offsets: Vec<u64> = at.collect();
    offsets.dedup();
    let blocks: Vec<Mutex<Vec<u8>>> = offsets.iter().map(|_| Mutex::default()).collect();
    let mut crew = Crew::default();
    for (offset, block) in offsets.iter().zip(&blocks) {
        crew.add(Box::pin(async move {
            let bytes = Disk::new(file).read(*offset, len).await?;
            *block.lock().unwrap_or_else(PoisonError::into_inner) = bytes;
            Ok(())
        }))
        .await;
    }
    crew.finish().await?;
    let bytes = blocks.into_iter().map(|b| b.into_inner().unwrap_or_else(PoisonError::into_inner));
    Ok(offsets.into_iter().zip(bytes).collect())
}

async fn write_blocks(file: &Node, blocks: &[(u64, Vec<u8>)]) -> Result<(), Errno> {
    let mut crew = Crew::default();
    for (offset, bytes) in blocks {
        // The file may end inside of the last one.
        let len = file.len().saturating_sub(*offset).min(bytes.len() as u64) as usize;
        let bytes = &bytes[..len];
        crew.add(Box::pin(async move { Disk::new(file).write(*offset, bytes).await })).await;
    }
    crew.finish().await
}
