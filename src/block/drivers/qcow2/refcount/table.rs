//! The refcount table in memory: where the blocks are, what of the table is not on disk yet, and where old tables lie.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use super::super::header::MAX_REFTABLE_SIZE;
use super::super::layout::{BadEntry, Geometry, HostOffset, decode_reftable_entry};
use super::Damage;
use super::blocks::append;

/// What is written at a time, in words: a sector.
const SECTOR: usize = 512 / 8;
/// Two entries point to the same cluster: the index that stands for both.
const SEVERAL: u64 = u64::MAX;

/// The refcount table.
pub struct Reftable {
    g: Geometry,
    words: Vec<u64>,
    first: u64,
    clusters: u64,
    /// By cluster: the index of the block that is there. Entries that cannot be true are not in it.
    blocks: BTreeMap<u64, u64>,
    /// The table is at another place than in the last snapshot: all of it must be written.
    moved: bool,
    /// Sectors that changed, unless `moved`.
    dirty: BTreeSet<usize>,
    /// Old tables to which the header on disk may point; then those to which it does not: first cluster, count.
    retired: Vec<(u64, u64)>,
    unused: Vec<(u64, u64)>,
}

/// Where a longer table goes: to the start of what the old one does not cover, behind the blocks for that.
pub struct Growth {
    /// The blocks' first cluster.
    pub start: u64,
    /// The first one's index in the table.
    pub index: u64,
    pub blocks: u64,
    /// The table's length in clusters.
    pub clusters: u64,
}

/// What a snapshot took.
#[derive(Debug, Default)]
pub struct Taken {
    moved: bool,
    sectors: BTreeSet<usize>,
    /// How many old tables the header, once it is written, no longer points to.
    retired: usize,
}

/// Bytes to be written for phases 2 and 3, and what they are.
#[derive(Default)]
pub struct Copies {
    pub table: Vec<(HostOffset, Vec<u8>)>,
    pub header: Option<[u8; 12]>,
    pub taken: Taken,
}

impl Reftable {
    /// The table with these words at cluster `first`. Blocks beyond cluster `end` cannot be.
    pub fn new(g: Geometry, mut words: Vec<u64>, first: u64, clusters: u64, end: u64) -> Reftable {
        words.resize((clusters << (g.cluster_bits - 3)) as usize, 0);
        let mut blocks = BTreeMap::new();
        for (index, word) in words.iter().enumerate() {
            if let Ok(Some(offset)) = decode_reftable_entry(*word, &g) {
                let cluster = g.host_cluster(offset);
                if cluster < end && !(first..first + clusters).contains(&cluster) {
                    let index = index as u64;
                    blocks.entry(cluster).and_modify(|n| *n = SEVERAL).or_insert(index);
                }
            }
        }
        Reftable {
            g,
            words,
            first,
            clusters,
            blocks,
            moved: false,
            dirty: BTreeSet::new(),
            retired: Vec::new(),
            unused: Vec::new(),
        }
    }

    /// Entries.
    pub fn len(&self) -> u64 {
        self.words.len() as u64
    }

    pub fn is_dirty(&self) -> bool {
        self.moved || !self.dirty.is_empty()
    }

    /// Where block `index` is; `None`: there is none.
    pub fn entry(&self, index: u64) -> Result<Option<HostOffset>, Damage> {
        let word = usize::try_from(index).ok().and_then(|at| self.words.get(at));
        let offset = match decode_reftable_entry(word.copied().unwrap_or(0), &self.g) {
            Ok(None) => return Ok(None),
            Ok(Some(offset)) => offset,
            Err(BadEntry::Unaligned(offset)) => return Err(Damage::Unaligned { index, offset }),
            Err(_) => return Err(Damage::Reserved { index }),
        };
        match self.blocks.get(&self.g.host_cluster(offset)) {
            Some(at) if *at == index => Ok(Some(offset)),
            _ => Err(Damage::Misplaced { index, offset }),
        }
    }

    /// Block `index` is new, in `cluster`.
    pub fn set(&mut self, index: u64, cluster: u64) {
        let at = usize::try_from(index).expect("an entry of the table");
        assert_eq!(self.words[at], 0, "a second block for a region");
        self.words[at] = cluster << self.g.cluster_bits;
        assert!(self.blocks.insert(cluster, index).is_none(), "a second block in a cluster");
        if !self.moved {
            self.dirty.insert(at / SECTOR);
        }
    }

    /// The table's and old tables' runs.
    pub fn own_runs(&self) -> impl Iterator<Item = (u64, u64)> {
        let old = self.retired.iter().chain(&self.unused).copied();
        std::iter::once((self.first, self.clusters)).chain(old)
    }

    /// All runs of metadata that are known here. Not in order.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        self.own_runs().chain(self.blocks.keys().map(|cluster| (*cluster, 1)))
    }

    /// Whether the header, a table or a block is in `cluster`.
    pub fn holds(&self, cluster: u64) -> bool {
        cluster == 0
            || self.blocks.contains_key(&cluster)
            || self.own_runs().any(|(first, count)| (first..first + count).contains(&cluster))
    }

    /// Looks whether all metadata known here from cluster `start` to `end` has the refcount, as `refcount` says, that it
    /// must have: 1.
    pub fn check(&self, start: u64, end: u64, refcount: impl Fn(u64) -> u64) -> Result<(), Damage> {
        let wrong = |cluster: u64| {
            let offset = HostOffset(cluster << self.g.cluster_bits);
            match refcount(cluster) {
                1 => Ok(()),
                refcount => Err(Damage::Table { offset, refcount }),
            }
        };
        if start == 0 {
            wrong(0)?;
        }
        let own = self.own_runs().flat_map(|(first, n)| first.max(start)..(first + n).min(end));
        own.chain(self.blocks.range(start..end).map(|(cluster, _)| *cluster)).try_for_each(wrong)
    }

    /// A table that is half as long again. `None`: there is no room below `limit`, or it would be too long.
    pub fn plan_growth(&self, limit: u64) -> Option<Growth> {
        let index = self.len();
        let start = index << self.g.refblock_bits();
        let most = MAX_REFTABLE_SIZE >> self.g.cluster_bits;
        let mut clusters = (self.clusters + self.clusters.div_ceil(2)).clamp(1, most);
        loop {
            // Each block describes itself and what else fits.
            let blocks = clusters.div_ceil(self.g.refblock_entries() - 1);
            if clusters << (self.g.cluster_bits - 3) >= index + blocks {
                let fits = clusters > self.clusters && start + blocks + clusters < limit;
                return fits.then_some(Growth { start, index, blocks, clusters });
            }
            if clusters == most {
                return None;
            }
            clusters += 1;
        }
    }

    /// The table is where `growth` says from now on. Its blocks are set one by one.
    pub fn grow(&mut self, growth: &Growth) {
        if self.clusters > 0 {
            self.retired.push((self.first, self.clusters));
        }
        self.first = growth.start + growth.blocks;
        self.clusters = growth.clusters;
        self.words.resize((growth.clusters << (self.g.cluster_bits - 3)) as usize, 0);
        self.moved = true;
        self.dirty.clear();
    }

    /// Copies of what must be written. All of it counts as written from now on.
    pub fn snapshot(&mut self) -> Copies {
        let offset = HostOffset(self.first << self.g.cluster_bits);
        let taken = Taken {
            moved: std::mem::take(&mut self.moved),
            sectors: std::mem::take(&mut self.dirty),
            retired: self.retired.len(),
        };
        let mut copies = Copies { taken, ..Copies::default() };
        if copies.taken.moved {
            append(&mut copies.table, offset, self.words.iter().copied());
            let mut fields = [0; 12];
            fields[..8].copy_from_slice(&offset.0.to_be_bytes());
            let clusters = u32::try_from(self.clusters).expect("8 MiB at most");
            fields[8..].copy_from_slice(&clusters.to_be_bytes());
            copies.header = Some(fields);
            return copies;
        }
        for sector in &copies.taken.sectors {
            let words = &self.words[sector * SECTOR..][..SECTOR];
            let offset = offset.plus(*sector as u64 * 512);
            append(&mut copies.table, offset, words.iter().copied());
        }
        copies
    }

    /// What the last snapshot took is on disk (`ok`), or must be written again.
    pub fn written(&mut self, mut taken: Taken, ok: bool) {
        if ok {
            self.unused.extend(self.retired.drain(..taken.retired));
            return;
        }
        self.moved |= taken.moved;
        self.dirty.append(&mut taken.sectors);
        if self.moved {
            self.dirty.clear();
        }
    }

    /// A cluster of an old table that can be freed.
    pub fn unused(&self) -> Option<u64> {
        self.unused.first().map(|(first, _)| *first)
    }

    /// The cluster last answered is free.
    pub fn forget_unused(&mut self) {
        let run = &mut self.unused[0];
        *run = (run.0 + 1, run.1 - 1);
        if run.1 == 0 {
            self.unused.remove(0);
        }
    }
}
