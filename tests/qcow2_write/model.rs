//! A disk that many queues write at once, and whose back end may be killed: which bytes may a sector hold?
//!
//! Every sector is written as 32 stamps (sector + 1, version); zeroes are version 0. A clock ticks at each start and end
//! of a request. A stamp is right if its change began before it was seen, and no other change of the sector lay wholly
//! between that change's end and the beginning of the look. A kill takes back what no flush covers: what is found
//! after it is judged as if the look had begun with the last flush that ended. A discard may leave what was there.

use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use virtio_bindings::virtio_blk as vb;
use vmm_sys_util::eventfd::EventFd;
use vub_client::blk::{Range, Request};
use vub_client::{Buf, Layout, Queue, Status, sys};

use crate::common::{LIMIT, Random};

use super::bed::gentle;

/// The version of zeroes.
const ZERO: u64 = 0;
/// The version of what was there before all.
pub const BASE: u64 = 1;
const SECTOR: usize = 512;
/// A change that has not ended.
const OPEN: u64 = u64::MAX;

#[derive(Debug)]
struct Change {
    version: u64,
    start: u64,
    end: u64,
    /// What was there before may still be there.
    vague: bool,
}

/// The disk as it may be.
pub struct Model {
    sectors: Vec<Mutex<Vec<Change>>>,
    clock: AtomicU64,
    versions: AtomicU64,
    /// When the last flush began of those that have ended.
    flushed: AtomicU64,
}

/// What one guest thread does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub seed: u64,
    /// Requests at the same time.
    pub depth: usize,
    /// Sectors of a cluster, for ranges that are whole clusters.
    pub cluster: u64,
    /// One of so many requests is a flush.
    pub flush_one_in: u64,
    /// Nothing is discarded or zeroed.
    pub gentle: bool,
}

/// The end of a load.
pub struct Stop {
    event: EventFd,
    /// The back end is gone by then.
    killed: bool,
}

impl Stop {
    pub fn new(killed: bool) -> Stop {
        Stop { event: EventFd::new(libc::EFD_NONBLOCK).unwrap(), killed }
    }

    pub fn now(&self) {
        self.event.write(1).unwrap();
    }
}

enum Pending {
    Read { sector: u64, begun: u64 },
    Change { sector: u64, count: u64, start: u64 },
    Flush { start: u64 },
}

/// `count` sectors of stamps.
pub fn stamps(sector: u64, count: u64, version: u64) -> Vec<u8> {
    let one =
        |at: u64| [(at + 1).to_le_bytes(), version.to_le_bytes()].concat().repeat(SECTOR / 16);
    (sector..sector + count).flat_map(one).collect()
}

/// True if a look that began then cannot find what `c` left.
fn hidden(changes: &[Change], c: &Change, begun: u64) -> bool {
    changes.iter().any(|w| !w.vague && w.start > c.end && w.end < begun)
}

impl Model {
    /// A disk of zeroes, or of stamps of the version [`BASE`].
    pub fn new(sectors: u64, version: u64) -> Model {
        let first = || Mutex::new(vec![Change { version, start: 0, end: 0, vague: false }]);
        Model {
            sectors: (0..sectors).map(|_| first()).collect(),
            clock: AtomicU64::new(1),
            versions: AtomicU64::new(BASE + 1),
            flushed: AtomicU64::new(0),
        }
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn slots(&self, sector: u64, count: u64) -> &[Mutex<Vec<Change>>] {
        &self.sectors[usize::try_from(sector).unwrap()..][..usize::try_from(count).unwrap()]
    }

    fn begin(&self, sector: u64, count: u64, version: u64, vague: bool) -> Pending {
        let start = self.tick();
        for slot in self.slots(sector, count) {
            slot.lock().unwrap().push(Change { version, start, end: OPEN, vague });
        }
        Pending::Change { sector, count, start }
    }

    fn finish(&self, pending: &Pending, data: &[u8]) {
        match *pending {
            Pending::Read { sector, begun } => self.check(sector, begun, data),
            Pending::Flush { start } => drop(self.flushed.fetch_max(start, Ordering::SeqCst)),
            Pending::Change { sector, count, start } => {
                let now = self.tick();
                for slot in self.slots(sector, count) {
                    let mut changes = slot.lock().unwrap();
                    changes.iter_mut().filter(|c| c.start == start).for_each(|c| c.end = now);
                }
            }
        }
    }

    /// The distinct stamps of a sector, which are nearly always one.
    fn versions(at: u64, bytes: &[u8]) -> Vec<u64> {
        let mut versions = Vec::new();
        for stamp in bytes.chunks(16) {
            let word = |i: usize| u64::from_le_bytes(stamp[i..i + 8].try_into().unwrap());
            let (place, version) = (word(0), word(8));
            let right = place == 0 || place == at + 1;
            assert!(right, "sector {at} has a stamp of sector {place}, version {version}");
            // Through the page cache, a read beside a write may find half a stamp: then both must be possible.
            let torn = (place == 0) != (version == ZERO);
            for version in std::iter::once(version).chain(torn.then_some(ZERO)) {
                if !versions.contains(&version) {
                    versions.push(version);
                }
            }
        }
        versions
    }

    fn check(&self, sector: u64, begun: u64, data: &[u8]) {
        let ended = self.tick();
        for (at, bytes) in (sector..).zip(data.chunks(SECTOR)) {
            let changes = self.slots(at, 1)[0].lock().unwrap();
            let zeroed = gentle() && changes.iter().any(|c| c.end == OPEN);
            for version in Model::versions(at, bytes) {
                let may = |c: &Change| {
                    c.version == version && c.start < ended && !hidden(&changes, c, begun)
                };
                assert!(
                    changes.iter().any(may) || (zeroed && version == ZERO),
                    "sector {at}: version {version} seen between {begun} and {ended}: {changes:?}"
                );
            }
        }
    }

    /// Checks the whole disk after everything has ended, and forgets how it came about.
    pub fn settle(&self, disk: &[u8]) {
        self.resolve(disk, self.tick());
    }

    /// Checks the whole disk after a kill, and goes on from what is there. Returns how many changes had to survive.
    pub fn survive(&self, disk: &[u8]) -> usize {
        self.resolve(disk, self.flushed.load(Ordering::SeqCst))
    }

    /// As [`Model::survive`] with every change that was acknowledged, flushed or not.
    pub fn survive_all(&self, disk: &[u8]) -> usize {
        self.resolve(disk, self.tick())
    }

    fn resolve(&self, disk: &[u8], begun: u64) -> usize {
        assert_eq!(disk.len(), self.sectors.len() * SECTOR);
        self.check(0, begun, disk);
        let now = self.tick();
        let mut certain = 0;
        for ((at, slot), bytes) in (0..).zip(&self.sectors).zip(disk.chunks(SECTOR)) {
            let one = |version| Change { version, start: now, end: now, vague: false };
            let mut changes = slot.lock().unwrap();
            certain += changes.iter().filter(|c| hidden(&changes, c, begun)).count();
            *changes = Model::versions(at, bytes).into_iter().map(one).collect();
        }
        self.flushed.store(self.tick(), Ordering::SeqCst);
        certain
    }

    /// One guest thread: random requests on `q` until `stop` is written to. If it is killed, the back end is gone then and
    /// what is in flight stays so; else it is waited for. Says how many requests have ended whenever some have.
    pub fn drive(&self, q: &mut Queue, load: Load, stop: &Stop, ended: &Sender<usize>) {
        let mut random = Random(load.seed);
        let mut pending: Vec<(u64, Pending)> = Vec::new();
        let mut stopping = false;
        while !stopping || !pending.is_empty() {
            let room = load.depth - pending.len();
            for _ in 0..if stopping { 0 } else { room } {
                let one = self.send(q, load, &mut random);
                pending.push(one);
            }
            q.kick().unwrap();
            let done: Vec<_> = std::iter::from_fn(|| q.poll().unwrap()).collect();
            for done in &done {
                assert_eq!(done.status, Status::Ok);
                let at = pending.iter().position(|(tag, _)| *tag == done.tag).unwrap();
                self.finish(&pending.swap_remove(at).1, &done.data());
            }
            if !done.is_empty() {
                ended.send(done.len()).unwrap();
            }
            stopping |= sys::wait_readable(&[stop.event.as_raw_fd()], Duration::ZERO).unwrap();
            if stopping && stop.killed {
                return;
            }
            if done.is_empty() && !q.arm() {
                let mut fds = vec![q.call_fd().as_raw_fd()];
                if !stopping {
                    fds.push(stop.event.as_raw_fd());
                }
                assert!(
                    sys::wait_readable(&fds, LIMIT).unwrap(),
                    "{} requests hang",
                    pending.len()
                );
                q.calls().unwrap();
            }
        }
    }

    fn place(&self, load: Load, random: &mut Random) -> (u64, u64) {
        let all = self.sectors.len() as u64;
        // Half of all requests meet in a few clusters.
        let sectors = if random.below(2) == 0 { all } else { all.min(load.cluster * 6) };
        let (first, count) = match random.below(8) {
            0 | 1 => {
                let first = random.below(sectors.div_ceil(load.cluster)) * load.cluster;
                (first, load.cluster * (1 + random.below(2)))
            }
            2 => (random.below(sectors), 1 + random.below(300)),
            _ => (random.below(sectors), 1 + random.below(16)),
        };
        (first, count.min(all - first))
    }

    fn send(&self, q: &mut Queue, load: Load, random: &mut Random) -> (u64, Pending) {
        let (sector, count) = self.place(load, random);
        q.layout = if random.below(3) == 0 {
            Layout { align: 16, skew: 8, segment: 16 << 10 }
        } else {
            Layout { align: 512, skew: 0, segment: 1 << 20 }
        };
        let range = |q: &Queue, kind, flags| {
            let count = u32::try_from(count).unwrap();
            Request::ranges(q.mem(), kind, &[Range { sector, count, flags }]).unwrap()
        };
        let flush = random.below(load.flush_one_in) == 0;
        let (request, pending) = match random.below(20) {
            _ if flush => (Request::flush(), Pending::Flush { start: self.tick() }),
            0 | 1 if !load.gentle => {
                let request = range(q, vb::VIRTIO_BLK_T_DISCARD, 0);
                (request, self.begin(sector, count, ZERO, true))
            }
            2 | 3 if !load.gentle => {
                let flags = u32::from(random.below(2) == 0);
                let request = range(q, vb::VIRTIO_BLK_T_WRITE_ZEROES, flags);
                (request, self.begin(sector, count, ZERO, false))
            }
            0..=13 => {
                let version = self.versions.fetch_add(1, Ordering::SeqCst);
                let bufs = q.buffers(usize::try_from(count).unwrap() * SECTOR).unwrap();
                fill(&bufs, &stamps(sector, count, version));
                (Request::write(sector, bufs), self.begin(sector, count, version, false))
            }
            _ => {
                let len = usize::try_from(count).unwrap() * SECTOR;
                let request = q.read_request(sector, len).unwrap();
                (request, Pending::Read { sector, begun: self.tick() })
            }
        };
        (q.push(request).unwrap(), pending)
    }
}

fn fill(bufs: &[Buf], bytes: &[u8]) {
    let mut at = 0;
    for buf in bufs {
        buf.write(0, &bytes[at..at + buf.len()]);
        at += buf.len();
    }
}
