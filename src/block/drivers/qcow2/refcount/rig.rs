//! For tests: an allocator, its disk, and a naive model of it.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::super::layout::{Geometry, HostOffset, refcount_get, refcount_set};
use super::{Blocked, Refcounts, Run, Snapshot};

/// A file in memory, in sectors; what was never written reads as zeroes.
#[derive(Clone, Default)]
pub struct Disk(HashMap<u64, [u8; 512]>);

impl Disk {
    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let sector = |n| self.0.get(&n).copied().unwrap_or([0; 512]);
        let (first, skip) = (offset / 512, (offset % 512) as usize);
        let bytes: Vec<u8> = (first..(offset + len).div_ceil(512)).flat_map(sector).collect();
        bytes[skip..skip + len as usize].to_vec()
    }

    pub fn write(&mut self, mut offset: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let at = (offset % 512) as usize;
            let now = bytes.len().min(512 - at);
            let sector = self.0.entry(offset / 512).or_insert([0; 512]);
            sector[at..at + now].copy_from_slice(&bytes[..now]);
            (offset, bytes) = (offset + now as u64, &bytes[now..]);
        }
    }

    /// Garbage at both ends of a cluster.
    pub fn fill(&mut self, g: &Geometry, cluster: u64) {
        let start = cluster << g.cluster_bits;
        self.write(start, &[0xab; 512]);
        self.write(start + g.cluster_size() - 512, &[0xab; 512]);
    }

    pub fn word(&self, offset: u64) -> u64 {
        u64::from_be_bytes(self.read(offset, 8).try_into().unwrap())
    }
}

/// What a reader of the disk finds.
#[derive(Debug, PartialEq, Eq)]
pub struct Found {
    /// Refcounts other than 0, of all clusters.
    pub counts: BTreeMap<u64, u64>,
    /// Clusters of the table and of the blocks.
    pub metadata: BTreeSet<u64>,
}

pub fn geometry(cluster_bits: u32, refcount_order: u32) -> Geometry {
    Geometry { cluster_bits, extended_l2: false, refcount_order, version: 3, data_file: false }
}

pub fn header(g: &Geometry, table: u64, clusters: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&(table << g.cluster_bits).to_be_bytes());
    bytes[8..].copy_from_slice(&clusters.to_be_bytes());
    bytes
}

/// The allocator, its disk, and a naive model of it.
pub struct Rig {
    pub g: Geometry,
    pub slots: usize,
    pub limit: u64,
    pub disk: Disk,
    pub refs: Refcounts,
    /// Refcounts of all clusters but those of refcount metadata.
    pub model: BTreeMap<u64, u64>,
    pub reserved: BTreeSet<u64>,
    /// What the disk may not fall below: the model of the last snapshot that is on disk, and of those that failed since.
    pub floor: BTreeMap<u64, u64>,
    pub pending: Option<(Snapshot, BTreeMap<u64, u64>)>,
    pub metadata: BTreeSet<u64>,
}

impl Rig {
    /// Header, table, and the blocks of `regions` regions that are full (the first needs three clusters at least), and
    /// `more` clusters of garbage behind them.
    pub fn new(g: Geometry, regions: u64, more: u64, room: u64, slots: usize) -> Rig {
        let (mut disk, entries) = (Disk::default(), g.refblock_entries());
        let used = if regions > 1 { (regions - 1) * entries } else { 2 + regions };
        disk.write(48, &header(&g, 1, 1));
        for n in 0..regions {
            let mut block = vec![0; g.cluster_size() as usize];
            for entry in 0..used.saturating_sub(n * entries).min(entries) {
                refcount_set(&mut block, g.refcount_order, entry as usize, 1);
            }
            // The last block describes itself.
            let mut place = 2 + n;
            if n > 0 && n == regions - 1 {
                place = n * entries;
                refcount_set(&mut block, g.refcount_order, 0, 1);
            }
            disk.write(g.cluster_size() + n * 8, &(place << g.cluster_bits).to_be_bytes());
            disk.write(place << g.cluster_bits, &block);
        }
        let end = used + u64::from(regions > 1) + more;
        for cluster in end - more..end {
            disk.fill(&g, cluster);
        }
        Rig::open(g, disk, end, end + room, slots)
    }

    pub fn open(g: Geometry, disk: Disk, end: u64, limit: u64, slots: usize) -> Rig {
        let mut refs = open(&g, &disk, end, limit, slots);
        refs.set_room(end);
        let Found { mut counts, metadata } = found(&g, &disk);
        counts.retain(|cluster, _| !metadata.contains(cluster));
        let told: BTreeSet<u64> = refs.tables().flat_map(|(first, n)| first..first + n).collect();
        assert_eq!(told, metadata);
        let (floor, model) = (counts.clone(), counts);
        let reserved = BTreeSet::new();
        Rig { g, slots, limit, disk, refs, model, reserved, floor, pending: None, metadata }
    }

    /// Asks until there is an answer, and does what it takes.
    pub fn ask<T>(
        &mut self,
        mut question: impl FnMut(&mut Refcounts) -> Result<T, Blocked>,
    ) -> Option<T> {
        for _ in 0..1000 {
            let end = self.refs.end();
            let answer = question(&mut self.refs);
            self.note_changes();
            match answer {
                Ok(answer) => return Some(answer),
                Err(Blocked::NoSpace) => return None,
                Err(Blocked::CacheFull) => self.flush(),
                Err(Blocked::Load { index, offset }) => {
                    let bytes = self.disk.read(offset.0, self.g.cluster_size());
                    match self.refs.load(index, &bytes) {
                        Ok(()) => {}
                        Err(Blocked::CacheFull) => self.flush(),
                        other => panic!("{other:?}"),
                    }
                }
                Err(Blocked::Room { first, count }) => {
                    assert!(first + count > self.refs.room(), "room that is known");
                    self.refs.set_room(first + count);
                }
                Err(Blocked::Corrupt(damage)) => panic!("{damage} at end {end}"),
            }
        }
        panic!("no end");
    }

    pub fn note_changes(&mut self) {
        for change in self.refs.take_changes() {
            for cluster in change.first..change.first + change.count {
                let news = match change.added {
                    true => self.metadata.insert(cluster),
                    false => self.metadata.remove(&cluster),
                };
                assert!(news, "{change:?}");
            }
        }
    }

    /// A run that was handed out: nobody had it, and it is zeroes if it says so.
    pub fn check_run(&self, run: Run, want: u64) {
        let end = run.first + run.count;
        assert!(run.count >= 1 && run.count <= want && end <= self.limit.min(self.refs.end()));
        assert_eq!(self.g.reftable_index(run.first), self.g.reftable_index(end - 1));
        for cluster in run.first..end {
            assert!(cluster > 0 && !self.model.contains_key(&cluster), "{run:?}");
            assert!(!self.reserved.contains(&cluster) && !self.metadata.contains(&cluster));
            let offset = cluster << self.g.cluster_bits;
            let bytes = self.disk.read(offset, self.g.cluster_size());
            assert!(!run.fresh || bytes.iter().all(|b| *b == 0), "{run:?}");
        }
    }

    /// The guest's data.
    pub fn fill(&mut self, first: u64, count: u64) {
        for cluster in first..first + count {
            self.disk.fill(&self.g, cluster);
        }
    }

    pub fn allocate(&mut self, want: u64, goal: Option<u64>) -> Option<Run> {
        let run = self.ask(|refs| refs.allocate(want, goal))?;
        self.check_run(run, want);
        self.fill(run.first, run.count);
        self.model.extend((run.first..run.first + run.count).map(|c| (c, 1)));
        Some(run)
    }

    pub fn reserve(&mut self, want: u64) -> Option<Run> {
        let run = self.ask(|refs| refs.reserve(want))?;
        self.check_run(run, want);
        self.reserved.extend(run.first..run.first + run.count);
        Some(run)
    }

    pub fn claim(&mut self, first: u64, count: u64) {
        self.ask(|refs| refs.claim(first, count)).unwrap();
        self.fill(first, count);
        for cluster in first..first + count {
            assert!(self.reserved.remove(&cluster));
            assert_eq!(self.model.insert(cluster, 1), None);
        }
    }

    pub fn release(&mut self, cluster: u64) {
        let left = self.ask(|refs| refs.release(cluster)).unwrap();
        let count = self.model.remove(&cluster).unwrap() - 1;
        assert_eq!(left, count);
        if count > 0 {
            self.model.insert(cluster, count);
        }
    }

    pub fn snapshot(&mut self) {
        if self.pending.is_none() {
            assert!(self.floor.values().all(|count| *count > 0));
            let snapshot = self.refs.snapshot();
            self.floor.retain(|cluster, floor| {
                *floor = (*floor).min(self.model.get(cluster).copied().unwrap_or(0));
                *floor > 0
            });
            self.pending = Some((snapshot, self.model.clone()));
        }
    }

    /// Writes the snapshot that is out. Looks at the disk after each phase.
    pub fn finish(&mut self) {
        let Some((snapshot, model)) = self.pending.take() else { return };
        for phase in phases(&snapshot) {
            for (offset, bytes) in phase {
                self.disk.write(offset.0, &bytes);
            }
            self.check_floor();
        }
        self.refs.written(snapshot, true);
        self.floor = model;
        self.note_changes();
        self.check_floor();
    }

    pub fn flush(&mut self) {
        self.snapshot();
        self.finish();
    }

    /// The snapshot that is out fails in phase `phase`, of which only the sectors that `chosen` names arrive.
    pub fn fail(&mut self, phase: usize, chosen: u64) {
        let Some((snapshot, _)) = self.pending.take() else { return };
        self.interrupt(&snapshot, phase, chosen);
        self.refs.written(snapshot, false);
    }

    pub fn interrupt(&mut self, snapshot: &Snapshot, phase: usize, chosen: u64) {
        let phases = phases(snapshot);
        for (offset, bytes) in phases[..phase].concat() {
            self.disk.write(offset.0, &bytes);
        }
        let mut n = 0;
        for (offset, bytes) in &phases[phase] {
            for (at, sector) in bytes.chunks(512).enumerate() {
                n += 1;
                if chosen >> (n % 61) & 1 != 0 {
                    self.disk.write(offset.0 + at as u64 * 512, sector);
                }
            }
        }
        self.check_floor();
    }

    /// A power cut, perhaps while a snapshot is written, and a new start.
    pub fn crash(&mut self, phase: usize, chosen: u64) {
        if let Some((snapshot, _)) = self.pending.take() {
            self.interrupt(&snapshot, phase, chosen);
        }
        self.check_floor();
        let end = self.disk.0.keys().max().unwrap() * 512;
        let end = self.g.host_cluster(HostOffset(end)) + 1;
        let disk = std::mem::take(&mut self.disk);
        *self = Rig::open(self.g, disk, end, self.limit.max(end), self.slots);
    }

    /// Nothing that is in use is free on disk.
    pub fn check_floor(&self) {
        let on_disk = found(&self.g, &self.disk);
        for (cluster, floor) in &self.floor {
            let count = on_disk.counts.get(cluster).copied().unwrap_or(0);
            assert!(count >= *floor, "refcount of {cluster} is {count}, not {floor}");
        }
        for cluster in &on_disk.metadata {
            assert_eq!(on_disk.counts.get(cluster), Some(&1), "table at {cluster}");
        }
    }

    /// Writes everything; then the disk is what the model says.
    pub fn sync(&mut self) {
        self.finish();
        self.ask(Refcounts::settle);
        while self.refs.is_dirty() {
            self.flush();
            self.ask(Refcounts::settle);
        }
        assert!(phases(&self.refs.snapshot()).concat().is_empty());
        self.refs.written(Snapshot::default(), true);
        let Found { mut counts, metadata } = found(&self.g, &self.disk);
        counts.retain(|cluster, _| !metadata.contains(cluster));
        assert_eq!(counts, self.model);
        assert_eq!(metadata, self.metadata);
        let told = self.refs.tables().flat_map(|(first, n)| first..first + n).collect();
        assert_eq!(metadata, told);
    }
}

pub type Write = (HostOffset, Vec<u8>);

pub fn phases(snapshot: &Snapshot) -> [Vec<Write>; 3] {
    let header = snapshot.header.iter().map(|bytes| (HostOffset(48), bytes.to_vec()));
    [snapshot.blocks.clone(), snapshot.table.clone(), header.collect()]
}

pub fn table_of(g: &Geometry, disk: &Disk) -> (u64, u32, Vec<u64>) {
    let (offset, clusters) = (disk.word(48), (disk.word(56) >> 32) as u32);
    let len = u64::from(clusters) << g.cluster_bits;
    let bytes = disk.read(offset, len);
    let words = bytes.chunks(8).map(|b| u64::from_be_bytes(b.try_into().unwrap())).collect();
    (offset, clusters, words)
}

pub fn open(g: &Geometry, disk: &Disk, end: u64, limit: u64, slots: usize) -> Refcounts {
    let (offset, clusters, words) = table_of(g, disk);
    Refcounts::new(*g, words, HostOffset(offset), clusters, end, limit, slots).unwrap()
}

pub fn found(g: &Geometry, disk: &Disk) -> Found {
    let (offset, clusters, words) = table_of(g, disk);
    let first = g.host_cluster(HostOffset(offset));
    let mut metadata: BTreeSet<u64> = (first..first + u64::from(clusters)).collect();
    let mut counts = Vec::new();
    for (index, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
        assert!(metadata.insert(g.host_cluster(HostOffset(*word))), "a block at {word:#x} again");
        let block = disk.read(*word, g.cluster_size());
        let first = (index as u64) << g.refblock_bits();
        for entry in 0..g.refblock_entries() {
            // Most of it is 0, and this is asked often.
            let byte = ((entry << g.refcount_order) / 8) as usize;
            if block[byte..(byte / 8 + 1) * 8].iter().any(|b| *b != 0) {
                let count = refcount_get(&block, g.refcount_order, entry as usize);
                counts.extend((count > 0).then_some((first + entry, count)));
            }
        }
    }
    Found { counts: counts.into_iter().collect(), metadata }
}
