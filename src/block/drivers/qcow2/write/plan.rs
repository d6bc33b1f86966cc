//! What is to be done for a write, decided under the lock and never by waiting.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::task::Waker;

use super::limbo::Freed;
use super::mutation::{Mutation, broken};
use super::{Meta, Writing};
use crate::block::Event;
use crate::block::drivers::qcow2::Image;
use crate::block::drivers::qcow2::journal::AT_ONCE;
use crate::block::drivers::qcow2::layout::{
    BadEntry, GuestOffset, HostOffset, L1Entry, L2Entry, Mapping, Subcluster, subcluster,
};
use crate::block::drivers::qcow2::read::Place;
use crate::block::drivers::qcow2::refcount::{Blocked, Run};

/// The first step of a write.
pub enum Plan {
    /// Overwrite `len` bytes at `host` of the data file.
    InPlace {
        /// Where they are.
        host: HostOffset,
        /// Bytes.
        len: u64,
    },
    /// Store data where nothing, or nothing that may be overwritten, is; the clusters are busy now.
    Fill(Box<Fill>),
    /// Somebody else is changing the first cluster; the waker has been noted.
    Wait,
    /// What a write needs before it can be planned.
    Needs(Need),
}

/// What must be there before entries can be changed.
pub enum Need {
    /// An L2 table that nobody shares, at this index of the L1 table.
    Table(u64),
    /// The slice of the table in the cache.
    Slice,
    /// What the allocator says.
    Allocator(Blocked),
    /// A flush: there is no room to record a change.
    Journal,
    /// Nothing helps: the L1 entry is bad.
    BadTable(BadEntry, u64),
    /// Nothing helps: the entry of the cluster that starts here is bad.
    BadEntry(BadEntry, GuestOffset),
    /// Nothing helps: the host cluster is metadata.
    Overlap(HostOffset),
}

/// How to fill up the rest of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pad {
    /// There is no rest, or it reads as zeroes by itself.
    Nothing,
    /// Zeroes.
    Zero,
    /// What the guest sees there now.
    Copy,
}

/// Data for clusters that need new entries.
pub struct Fill {
    /// The first guest cluster, and how many; busy.
    pub first: u64,
    /// Guest clusters.
    pub count: u64,
    /// The request's data: guest bytes.
    pub data: std::ops::Range<u64>,
    /// All that must be written: guest bytes around `data`, in the same clusters.
    pub write: std::ops::Range<u64>,
    /// What is before the data.
    pub head: Pad,
    /// What is after it.
    pub tail: Pad,
    /// Where the first guest cluster's data goes.
    pub host: HostOffset,
    /// Host clusters allocated for it, to be given back on failure.
    pub allocated: Option<Run>,
    /// The new entries.
    pub entries: Vec<L2Entry>,
    /// What the old entries referred to.
    pub freed: Vec<Freed>,
}

/// What a cluster is to a write that begins in it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Case {
    /// It has no host cluster.
    New,
    /// Its host cluster is its own, but holds no data there.
    Reuse(HostOffset),
    /// Its data is shared, or compressed: it moves.
    Move,
}

impl Image {
    /// The bytes from `guest` on that may be overwritten where they are: their place and how many. Takes no lock.
    /// `None`: none, or it cannot be told without waiting, or somebody's tables are there.
    pub fn in_place(&self, w: &Writing, guest: GuestOffset, len: u64) -> Option<(HostOffset, u64)> {
        if let Some(host) = self.plain(guest, len, true) {
            return (!self.is_metadata(w, host, len)).then_some((host, len));
        }
        let copied = |mapping| matches!(mapping, Mapping::Standard { copied: true, .. });
        let mapping = self.look_up(guest)?.ok().filter(|mapping| copied(*mapping))?;
        match self.extent_of(mapping, guest, len, copied) {
            (Place::Data(host), n) if !self.is_metadata(w, host, n) => Some((host, n)),
            _ => None,
        }
    }

    /// Whether any of `len` bytes at `host`, where guest data shall be written, belongs to metadata.
    pub fn is_metadata(&self, w: &Writing, host: HostOffset, len: u64) -> bool {
        if self.geometry.data_file {
            return false;
        }
        let first = self.geometry.host_cluster(host);
        let last = self.geometry.host_cluster(host.plus(len.max(1) - 1));
        w.tables.holds(first, last - first + 1)
    }

    /// Plans a write of up to `len` bytes at `at`.
    pub fn plan(&self, w: &Writing, at: GuestOffset, len: u64, waker: &Waker) -> Plan {
        // Entries of clusters in place do not change: nobody needs to wait for anybody.
        if let Some((host, len)) = self.in_place(w, at, len) {
            return Plan::InPlace { host, len };
        }
        let mut meta = w.lock();
        match self.plan_locked(w, &mut meta, at, len, waker) {
            Ok(plan) => plan,
            Err(need) => Plan::Needs(need),
        }
    }

    /// How many of the clusters from `at`'s on, up to the last of `len` bytes, may be planned for now: not busy, in one slice that
    /// is cached, of a table that nobody shares, and no more than the journal takes. 0: the first is busy.
    pub fn plannable(&self, meta: &Meta, at: GuestOffset, len: u64) -> Result<u64, Need> {
        let g = &self.geometry;
        let first = at.0 >> g.cluster_bits;
        let count = (g.in_cluster(at) + len).div_ceil(g.cluster_size());
        let (slice, index) = self.slice_of(at);
        let count = count.min(u64::from(self.cache.shape().entries - index)).min(AT_ONCE);
        let count = if broken(Mutation::IgnoreBusy) { count } else { meta.busy.free(first, count) };
        if count == 0 {
            return Ok(0);
        }
        let l1_index = g.l1_index(at);
        match L1Entry::decode(self.l1.get(l1_index), g) {
            Ok(L1Entry { table: Some(_), copied }) if copied || broken(Mutation::NoTableCopy) => {}
            Ok(_) => return Err(Need::Table(l1_index)),
            Err(bad) => return Err(Need::BadTable(bad, l1_index)),
        }
        if self.cache.get(slice, index).is_none() { Err(Need::Slice) } else { Ok(count) }
    }

    /// The mapping of the cluster that starts at `start`, whose slice is cached.
    pub fn mapping_now(&self, start: GuestOffset) -> Result<Mapping, Need> {
        match self.look_up(start) {
            Some(Ok(mapping)) => Ok(mapping),
            Some(Err(bad)) => Err(Need::BadEntry(bad, start)),
            None => Err(Need::Slice),
        }
    }

    fn plan_locked(
        &self,
        w: &Writing,
        meta: &mut Meta,
        at: GuestOffset,
        len: u64,
        waker: &Waker,
    ) -> Result<Plan, Need> {
        let g = &self.geometry;
        let (start, first) = (g.cluster_start(at), at.0 >> g.cluster_bits);
        let count = self.plannable(meta, at, len)?;
        if count == 0 {
            meta.busy.wait(first, waker);
            return Ok(Plan::Wait);
        }
        let mapping = self.mapping_now(start)?;
        let case = match self.case(mapping, at) {
            Some(case) => case,
            // Linked since the look without the lock; or the entry leads into metadata.
            None => {
                return match self.run(mapping, at, len) {
                    (Place::Data(host), n) if self.is_metadata(w, host, n) => {
                        Err(Need::Overlap(host))
                    }
                    (Place::Data(host), len) => Ok(Plan::InPlace { host, len }),
                    _ => Err(Need::Slice),
                };
            }
        };
        let end = (at.0 + len).min(start.0 + count * g.cluster_size());
        let fill = match case {
            Case::Reuse(host) => self.reuse(mapping, host, at, end),
            Case::New | Case::Move => self.allocate(w, meta, at, end)?,
        };
        if fill.allocated.is_some() || !self.is_metadata(w, fill.host, g.cluster_size()) {
            meta.busy.begin(fill.first, fill.count);
            return Ok(Plan::Fill(Box::new(fill)));
        }
        Err(Need::Overlap(fill.host))
    }

    /// `None`: in place.
    fn case(&self, mapping: Mapping, at: GuestOffset) -> Option<Case> {
        match mapping {
            Mapping::Compressed(_) => Some(Case::Move),
            Mapping::Standard { host: None, .. } => Some(Case::New),
            Mapping::Standard { copied: false, .. } => Some(Case::Move),
            Mapping::Standard { host: Some(host), allocated, zero, .. } => {
                let here = subcluster(allocated, zero, self.geometry.subcluster_index(at));
                (here != Subcluster::Data).then_some(Case::Reuse(host))
            }
        }
    }

    /// Data for the run of subclusters without data at `at`, in the cluster's own host cluster.
    fn reuse(&self, mapping: Mapping, host: HostOffset, at: GuestOffset, end: u64) -> Fill {
        let g = &self.geometry;
        let Mapping::Standard { allocated, zero, .. } = mapping else {
            unreachable!("compressed clusters move")
        };
        let start = g.cluster_start(at);
        let first = g.subcluster_index(at);
        let mut last = first + 1;
        while last < g.subclusters() && subcluster(allocated, zero, last) != Subcluster::Data {
            last += 1;
        }
        let end = end.min(start.0 + (u64::from(last) << g.subcluster_bits()));
        let write = self.rounded(at.0, end);
        let mask = self.mask(start.0, &write);
        let mapping = Mapping::Standard {
            host: Some(host),
            copied: true,
            allocated: allocated | mask,
            zero: zero & !mask,
        };
        let data = at.0..end;
        Fill {
            first: start.0 >> g.cluster_bits,
            count: 1,
            head: self.pad(write.start, data.start, false),
            tail: self.pad(data.end, write.end, false),
            data,
            write,
            host,
            allocated: None,
            entries: vec![L2Entry::encode(mapping, g)],
            freed: Vec::new(),
        }
    }

    /// Data for clusters from `at`'s on that have no host cluster of their own.
    fn allocate(
        &self,
        w: &Writing,
        meta: &mut Meta,
        at: GuestOffset,
        end: u64,
    ) -> Result<Fill, Need> {
        let g = &self.geometry;
        let (start, first) = (g.cluster_start(at), at.0 >> g.cluster_bits);
        let mut old = Vec::new();
        let mut next = start;
        while next.0 < end {
            let mapping = self.mapping_now(next)?;
            if !matches!(self.case(mapping, next), Some(Case::New | Case::Move)) && next != start {
                break;
            }
            old.push(mapping);
            next = next.plus(g.cluster_size());
        }
        let (host, allocated) = if g.data_file {
            (HostOffset(start.0), None)
        } else {
            let want = old.len() as u64;
            self.file().event(Event::ClusterAlloc);
            let run = match w.tight.load(Ordering::Relaxed) {
                true => meta.refcounts.allocate(want, None),
                false => meta.streams.allocate(&mut meta.refcounts, first, want),
            };
            self.note_tables(w, meta);
            let run = run.map_err(Need::Allocator)?;
            self.meter.refcount_hits.count();
            if w.tables.holds(run.first, run.count) {
                return Err(Need::Overlap(HostOffset(run.first << g.cluster_bits)));
            }
            old.truncate(usize::try_from(run.count).unwrap_or(usize::MAX));
            (HostOffset(run.first << g.cluster_bits), Some(run))
        };
        let end = end.min(start.0 + old.len() as u64 * g.cluster_size());
        Ok(self.filling(at.0..end, &old, host, allocated))
    }

    fn filling(
        &self,
        data: std::ops::Range<u64>,
        old: &[Mapping],
        host: HostOffset,
        allocated: Option<Run>,
    ) -> Fill {
        let g = &self.geometry;
        let start = g.cluster_start(GuestOffset(data.start));
        let mut write = self.rounded(data.start, data.end);
        // A cluster that moves takes all of its content along.
        if old.first().is_some_and(moves) {
            write.start = start.0;
        }
        if old.last().is_some_and(moves) {
            write.end = start.0 + old.len() as u64 * g.cluster_size();
        }
        let mut entries = Vec::with_capacity(old.len());
        let mut freed = Vec::new();
        for (i, old) in (0u64..).zip(old) {
            let mask = self.mask(start.0 + i * g.cluster_size(), &write);
            let zero = match old {
                Mapping::Standard { zero, host: None, .. } => zero & !mask,
                _ => 0,
            };
            let new = Mapping::Standard {
                host: Some(host.plus(i * g.cluster_size())),
                copied: true,
                allocated: mask,
                zero,
            };
            entries.push(L2Entry::encode(new, g));
            let discard = self.choices.pass_discard_other;
            freed.extend(self.references(*old).map(|cluster| Freed {
                cluster,
                discard,
                table: false,
            }));
        }
        let fresh = allocated.as_ref().is_some_and(|run| run.fresh);
        Fill {
            first: start.0 >> g.cluster_bits,
            count: old.len() as u64,
            head: self.pad(write.start, data.start, fresh),
            tail: self.pad(data.end, write.end, fresh),
            data,
            write,
            host,
            allocated,
            entries,
            freed,
        }
    }

    /// The host clusters that an entry refers to; none in an external data file, which has no refcounts.
    pub fn references(&self, mapping: Mapping) -> std::ops::Range<u64> {
        match mapping {
            Mapping::Compressed(data) => {
                let first = self.geometry.host_cluster(data.offset);
                first..self.geometry.host_cluster(data.offset.plus(data.len - 1)) + 1
            }
            Mapping::Standard { host: Some(host), .. } if !self.geometry.data_file => {
                let cluster = self.geometry.host_cluster(host);
                cluster..cluster + 1
            }
            Mapping::Standard { .. } => 0..0,
        }
    }

    /// `[start, end)` rounded to whole subclusters.
    fn rounded(&self, start: u64, end: u64) -> std::ops::Range<u64> {
        let size = self.geometry.subcluster_size();
        start - start % size..end.next_multiple_of(size)
    }

    /// The subclusters of the cluster at `start` that `range` covers; bit 0 for a cluster without subclusters.
    pub fn mask(&self, start: u64, range: &std::ops::Range<u64>) -> u32 {
        let g = &self.geometry;
        let from = range.start.max(start) - start;
        let to = range.end.min(start + g.cluster_size()) - start;
        let (from, to) = (from >> g.subcluster_bits(), to >> g.subcluster_bits());
        ((1u64 << to) - (1u64 << from)) as u32
    }

    /// How to fill up guest bytes `[from, to)` of clusters that get new entries.
    fn pad(&self, from: u64, to: u64, fresh: bool) -> Pad {
        if from == to || broken(Mutation::NoCopyOnWrite) {
            Pad::Nothing
        } else if !self.reads_as_zero(from, to) {
            Pad::Copy
        } else if fresh {
            Pad::Nothing
        } else {
            Pad::Zero
        }
    }

    /// Whether guest bytes `[from, to)` are zeroes by their entries, as far as can be told without waiting.
    pub fn reads_as_zero(&self, from: u64, to: u64) -> bool {
        let mut at = from;
        while at < to {
            let guest = GuestOffset(at);
            let Some(Ok(mapping)) = self.look_up(guest) else { return false };
            match self.run(mapping, guest, to - at) {
                (Place::Zero, n) => at += n,
                (Place::Backing, n) if self.nothing_behind(at) => at += n,
                _ => return false,
            }
        }
        true
    }

    /// Whether nothing is seen from guest byte `at` on where nothing is allocated.
    pub fn nothing_behind(&self, at: u64) -> bool {
        self.backing().is_none_or(|backing| at >= backing.len())
    }
}

/// Whether a cluster with data gives its host cluster up when it is written.
fn moves(old: &Mapping) -> bool {
    !matches!(old, Mapping::Standard { host: None, .. })
}
