use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::*;

use super::*;
use crate::block::drivers::qcow2::layout::refcount_set;

/// A file in memory, in sectors; what was never written reads as zeroes.
#[derive(Clone, Default)]
struct Disk(HashMap<u64, [u8; 512]>);

impl Disk {
    fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let sector = |n| self.0.get(&n).copied().unwrap_or([0; 512]);
        let (first, skip) = (offset / 512, (offset % 512) as usize);
        let bytes: Vec<u8> = (first..(offset + len).div_ceil(512)).flat_map(sector).collect();
        bytes[skip..skip + len as usize].to_vec()
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            let at = offset + n as u64;
            self.0.entry(at / 512).or_insert([0; 512])[(at % 512) as usize] = *byte;
        }
    }

    fn word(&self, offset: u64) -> u64 {
        u64::from_be_bytes(self.read(offset, 8).try_into().unwrap())
    }
}

/// What a reader of the disk finds.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    /// Refcounts other than 0, of all clusters.
    counts: BTreeMap<u64, u64>,
    /// Clusters of the table and of the blocks.
    metadata: BTreeSet<u64>,
}

fn geometry(cluster_bits: u32, refcount_order: u32) -> Geometry {
    Geometry { cluster_bits, extended_l2: false, refcount_order, version: 3, data_file: false }
}

fn header(g: &Geometry, table: u64, clusters: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&(table << g.cluster_bits).to_be_bytes());
    bytes[8..].copy_from_slice(&clusters.to_be_bytes());
    bytes
}

/// The allocator, its disk, and a naive model of it.
struct Rig {
    g: Geometry,
    slots: usize,
    limit: u64,
    disk: Disk,
    refs: Refcounts,
    /// Refcounts of all clusters but those of refcount metadata.
    model: BTreeMap<u64, u64>,
    reserved: BTreeSet<u64>,
    /// What the disk may not fall below: the model of the last snapshot that is on disk, and of those that failed since.
    floor: BTreeMap<u64, u64>,
    pending: Option<(Snapshot, BTreeMap<u64, u64>)>,
    metadata: BTreeSet<u64>,
}

impl Rig {
    /// Header, table, and the blocks of `regions` regions that are full (the first needs three clusters at least), and
    /// `more` clusters of garbage behind them.
    fn new(g: Geometry, regions: u64, more: u64, room: u64, slots: usize) -> Rig {
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
            disk.write(cluster << g.cluster_bits, &vec![0xab; g.cluster_size() as usize]);
        }
        Rig::open(g, disk, end, end + room, slots)
    }

    fn open(g: Geometry, disk: Disk, end: u64, limit: u64, slots: usize) -> Rig {
        let refs = open(&g, &disk, end, limit, slots);
        let Found { mut counts, metadata } = found(&g, &disk);
        counts.retain(|cluster, _| !metadata.contains(cluster));
        let told: BTreeSet<u64> = refs.tables().flat_map(|(first, n)| first..first + n).collect();
        assert_eq!(told, metadata);
        let (floor, model) = (counts.clone(), counts);
        let reserved = BTreeSet::new();
        Rig { g, slots, limit, disk, refs, model, reserved, floor, pending: None, metadata }
    }

    /// Asks until there is an answer, and does what it takes.
    fn ask<T>(
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
                Err(Blocked::Corrupt(damage)) => panic!("{damage} at end {end}"),
            }
        }
        panic!("no end");
    }

    fn note_changes(&mut self) {
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
    fn check_run(&self, run: Run, want: u64) {
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
    fn fill(&mut self, first: u64, count: u64) {
        for cluster in first..first + count {
            let bytes = vec![0xab; self.g.cluster_size() as usize];
            self.disk.write(cluster << self.g.cluster_bits, &bytes);
        }
    }

    fn allocate(&mut self, want: u64, goal: Option<u64>) -> Option<Run> {
        let run = self.ask(|refs| refs.allocate(want, goal))?;
        self.check_run(run, want);
        self.fill(run.first, run.count);
        self.model.extend((run.first..run.first + run.count).map(|c| (c, 1)));
        Some(run)
    }

    fn reserve(&mut self, want: u64) -> Option<Run> {
        let run = self.ask(|refs| refs.reserve(want))?;
        self.check_run(run, want);
        self.reserved.extend(run.first..run.first + run.count);
        Some(run)
    }

    fn claim(&mut self, first: u64, count: u64) {
        self.ask(|refs| refs.claim(first, count)).unwrap();
        self.fill(first, count);
        for cluster in first..first + count {
            assert!(self.reserved.remove(&cluster));
            assert_eq!(self.model.insert(cluster, 1), None);
        }
    }

    fn release(&mut self, cluster: u64) {
        let left = self.ask(|refs| refs.release(cluster)).unwrap();
        let count = self.model.get_mut(&cluster).unwrap();
        *count -= 1;
        assert_eq!(left, *count);
        self.model.retain(|_, count| *count > 0);
    }

    fn snapshot(&mut self) {
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
    fn finish(&mut self) {
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

    fn flush(&mut self) {
        self.snapshot();
        self.finish();
    }

    /// The snapshot that is out fails in phase `phase`, of which only the sectors that `chosen` names arrive.
    fn fail(&mut self, phase: usize, chosen: u64) {
        let Some((snapshot, _)) = self.pending.take() else { return };
        self.interrupt(&snapshot, phase, chosen);
        self.refs.written(snapshot, false);
    }

    fn interrupt(&mut self, snapshot: &Snapshot, phase: usize, chosen: u64) {
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
    fn crash(&mut self, phase: usize, chosen: u64) {
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
    fn check_floor(&self) {
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
    fn sync(&mut self) {
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

type Write = (HostOffset, Vec<u8>);

fn phases(snapshot: &Snapshot) -> [Vec<Write>; 3] {
    let header = snapshot.header.iter().map(|bytes| (HostOffset(48), bytes.to_vec()));
    [snapshot.blocks.clone(), snapshot.table.clone(), header.collect()]
}

fn table_of(g: &Geometry, disk: &Disk) -> (u64, u32, Vec<u64>) {
    let (offset, clusters) = (disk.word(48), (disk.word(56) >> 32) as u32);
    let len = u64::from(clusters) << g.cluster_bits;
    let bytes = disk.read(offset, len);
    let words = bytes.chunks(8).map(|b| u64::from_be_bytes(b.try_into().unwrap())).collect();
    (offset, clusters, words)
}

fn open(g: &Geometry, disk: &Disk, end: u64, limit: u64, slots: usize) -> Refcounts {
    let (offset, clusters, words) = table_of(g, disk);
    Refcounts::new(*g, words, HostOffset(offset), clusters, end, limit, slots).unwrap()
}

fn found(g: &Geometry, disk: &Disk) -> Found {
    let (offset, clusters, words) = table_of(g, disk);
    let first = g.host_cluster(HostOffset(offset));
    let mut metadata: BTreeSet<u64> = (first..first + u64::from(clusters)).collect();
    let mut counts = BTreeMap::new();
    for (index, word) in words.iter().enumerate().filter(|(_, word)| **word != 0) {
        assert!(metadata.insert(g.host_cluster(HostOffset(*word))), "a block at {word:#x} again");
        let block = disk.read(*word, g.cluster_size());
        for entry in 0..g.refblock_entries() {
            let count = refcount_get(&block, g.refcount_order, entry as usize);
            if count > 0 {
                counts.insert(((index as u64) << g.refblock_bits()) + entry, count);
            }
        }
    }
    Found { counts, metadata }
}

/// One step of a random life: what, and two numbers to choose with.
type Step = (u8, u16, u64);

fn live(rig: &mut Rig, steps: &[Step]) {
    for (what, a, b) in steps {
        let choice = |len: usize| usize::from(*a) % len.max(1);
        let user: Vec<u64> = rig.model.keys().copied().filter(|c| *c > 0).collect();
        match what {
            0..8 => {
                let goal = (b % 3 == 0).then(|| b / 3 % (rig.refs.end() + 3));
                rig.allocate(u64::from(a % 40) + 1, goal);
            }
            8..10 => {
                rig.reserve(u64::from(a % 40) + 1);
            }
            10..13 if !rig.reserved.is_empty() => {
                let first = *rig.reserved.iter().nth(choice(rig.reserved.len())).unwrap();
                // Neighbours may be of another reservation: one at a time is always right.
                rig.claim(first, 1);
            }
            13 if !rig.reserved.is_empty() => {
                let first = *rig.reserved.iter().nth(choice(rig.reserved.len())).unwrap();
                let end = first + b % 40;
                rig.refs.unreserve(first, b % 40);
                rig.reserved.retain(|c| !(first..end).contains(c));
            }
            14..19 if !user.is_empty() => {
                for n in 0..b % 30 {
                    let cluster = user[(usize::from(*a) + n as usize * 7) % user.len()];
                    if rig.model.contains_key(&cluster) {
                        rig.release(cluster);
                    }
                }
            }
            19 => {
                let cluster = b % (rig.refs.end() + 100);
                let count = rig.ask(|refs| refs.get(cluster)).unwrap();
                let expected = rig.model.get(&cluster).copied();
                let expected = expected.unwrap_or(u64::from(rig.metadata.contains(&cluster)));
                assert_eq!(count, expected, "{cluster}");
            }
            20..23 => rig.snapshot(),
            23..25 => rig.finish(),
            25 => rig.fail(choice(3), *b),
            26 => rig.crash(choice(3), *b),
            _ => {}
        }
    }
    rig.sync();
}

fn steps(n: usize) -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec((0u8..27, any::<u16>(), any::<u64>()), 1..n)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_width_is_kept(
        order in 0u32..=6, bits in 9u32..=11, more in 0u64..40, room in 0u64..3000, slots in 1usize..5,
        steps in steps(80),
    ) {
        live(&mut Rig::new(geometry(bits, order), 1, more, room, slots), &steps);
    }

    /// The table is almost full at the start: it moves, often more than once.
    #[test]
    fn tables_grow(more in 0u64..100, room in 0u64..20_000, slots in 1usize..5, steps in steps(60)) {
        live(&mut Rig::new(geometry(9, 6), 64, more, room, slots), &steps);
    }
}
