//! A model of a disk that many queues write at once: which version may a read see?
//!
//! Every sector is written as 32 stamps (sector, version). A clock ticks at each submission and each completion. A
//! stamp that a read finds is right if its write began before the read ended, and no other write of the sector lay
//! wholly between that write's end and the read's beginning. Zeroes are a version like any other, of which there may
//! be several; a discard may or may not zero.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk as vb;
use vub_client::blk::{Range, Request};
use vub_client::{Buf, Layout, Queue, Status};

use crate::common::Random;

/// The version of zeroes.
const ZERO: u64 = 0;
const SECTOR: usize = 512;
/// The longest transfer.
const SECTORS_MAX: u64 = 16;

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
}

enum Pending {
    Read { sector: u64, begun: u64 },
    Change { sector: u64, count: u64, start: u64 },
    Flush,
}

impl Model {
    /// A disk of `sectors` sectors of zeroes.
    pub fn new(sectors: u64) -> Model {
        let blank = || Mutex::new(vec![Change { version: ZERO, start: 0, end: 0, vague: false }]);
        Model {
            sectors: (0..sectors).map(|_| blank()).collect(),
            clock: AtomicU64::new(1),
            versions: AtomicU64::new(1),
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
            slot.lock().unwrap().push(Change { version, start, end: u64::MAX, vague });
        }
        Pending::Change { sector, count, start }
    }

    fn finish(&self, sector: u64, count: u64, start: u64) {
        let now = self.tick();
        for slot in self.slots(sector, count) {
            slot.lock().unwrap().iter_mut().filter(|c| c.start == start).for_each(|c| c.end = now);
        }
    }

    fn may_be(&self, sector: u64, version: u64, begun: u64, ended: u64) -> bool {
        let changes = self.slots(sector, 1)[0].lock().unwrap();
        let hidden =
            |c: &Change| changes.iter().any(|w| !w.vague && w.start > c.end && w.end < begun);
        changes.iter().any(|c| c.version == version && c.start < ended && !hidden(c))
    }

    fn check(&self, sector: u64, begun: u64, data: &[u8]) {
        let ended = self.tick();
        for (at, bytes) in (sector..).zip(data.chunks(SECTOR)) {
            for stamp in bytes.chunks(16) {
                let word = |i: usize| u64::from_le_bytes(stamp[i..i + 8].try_into().unwrap());
                let (place, version) = (word(0), word(8));
                assert!(place == at + 1 || place == 0, "sector {at} has a stamp of {place}");
                assert!(
                    self.may_be(at, version, begun, ended),
                    "sector {at}: version {version} read between {begun} and {ended}"
                );
            }
        }
    }

    fn stamped(&self, bufs: &[Buf], sector: u64, version: u64) {
        let mut bytes = Vec::new();
        let count: usize = bufs.iter().map(Buf::len).sum();
        for at in sector..sector + (count / SECTOR) as u64 {
            let stamp = [(at + 1).to_le_bytes(), version.to_le_bytes()].concat();
            bytes.extend_from_slice(&stamp.repeat(SECTOR / 16));
        }
        let mut at = 0;
        for b in bufs {
            b.write(0, &bytes[at..at + b.len()]);
            at += b.len();
        }
    }

    /// One guest thread: `ops` random operations on `q`, up to `depth` at a time.
    pub fn drive(&self, q: &mut Queue, seed: u64, ops: usize, depth: usize) {
        let mut random = Random(seed);
        let mut pending: Vec<(u64, Pending)> = Vec::new();
        let mut sent = 0;
        while sent < ops || !pending.is_empty() {
            let batch = 1 + usize::try_from(random.below(8)).unwrap();
            for _ in 0..batch.min(ops - sent).min(depth - pending.len()) {
                pending.push(self.send(q, &mut random));
                sent += 1;
            }
            q.kick().unwrap();
            if pending.len() < depth && sent < ops && random.below(4) != 0 {
                continue;
            }
            let first = q.wait().unwrap();
            let more = std::iter::from_fn(|| q.poll().unwrap());
            for done in std::iter::once(first).chain(more) {
                assert_eq!(done.status, Status::Ok);
                let at = pending.iter().position(|(tag, _)| *tag == done.tag).unwrap();
                match pending.swap_remove(at).1 {
                    Pending::Read { sector, begun } => self.check(sector, begun, &done.data()),
                    Pending::Change { sector, count, start } => self.finish(sector, count, start),
                    Pending::Flush => {}
                }
            }
        }
    }

    fn send(&self, q: &mut Queue, random: &mut Random) -> (u64, Pending) {
        let sectors = self.sectors.len() as u64;
        let count = 1 + random.below(SECTORS_MAX);
        let sector = random.below(sectors - count);
        let len = usize::try_from(count).unwrap() * SECTOR;
        let odd = random.below(3) == 0;
        q.layout = if odd {
            Layout { align: 16, skew: 8, segment: 2048 }
        } else {
            Layout { align: 512, skew: 0, segment: 1 << 20 }
        };
        let range = |q: &Queue, kind, flags| {
            let count = u32::try_from(count).unwrap();
            Request::ranges(q.mem(), kind, &[Range { sector, count, flags }]).unwrap()
        };
        let (request, pending) = match random.below(20) {
            0 => (Request::flush(), Pending::Flush),
            1 => {
                let request = range(q, vb::VIRTIO_BLK_T_DISCARD, 0);
                (request, self.begin(sector, count, ZERO, true))
            }
            2 => {
                let flags = u32::from(random.below(2) == 0);
                let request = range(q, vb::VIRTIO_BLK_T_WRITE_ZEROES, flags);
                (request, self.begin(sector, count, ZERO, false))
            }
            3..=10 => {
                let version = self.versions.fetch_add(1, Ordering::SeqCst);
                let bufs = q.buffers(len).unwrap();
                self.stamped(&bufs, sector, version);
                (Request::write(sector, bufs), self.begin(sector, count, version, false))
            }
            _ => {
                let request = q.read_request(sector, len).unwrap();
                (request, Pending::Read { sector, begun: self.tick() })
            }
        };
        (q.push(request).unwrap(), pending)
    }

    /// Everything has completed: what is read now?
    pub fn check_all(&self, q: &mut Queue) {
        q.layout = Layout::default();
        for sector in (0..self.sectors.len() as u64).step_by(64) {
            let begun = self.tick();
            let mut data = vec![0; 64 * SECTOR];
            q.read(sector, &mut data).unwrap();
            self.check(sector, begun, &data);
        }
    }
}
