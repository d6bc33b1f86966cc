//! Each image of the corpus: read, written at odd places by a guest, and looked at by QEMU.
//!
//! What a discard leaves is QEMU's choice within limits: of every sector the old bytes or zeroes; whole clusters of
//! version 3 read as zeroes; nothing changes with `discard=ignore`. The model takes over what the guest then reads.

use serde_json::Value;
use virtio_bindings::virtio_blk as vb;
use vub_client::blk::{Range, Request};
use vub_client::{Client, Layout, Status};

use crate::common::Random;
use crate::tools::Dirs;

use super::bed::{assert_clean, assert_same, check, connect, info, number, read_all, seed, start};
use super::cases::{Case, Made, corpus, noise};

/// Rounds of requests that each image takes.
const ROUNDS: usize = 12;
/// The longest request of these tests, in sectors.
const LONGEST: u64 = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write,
    Zeroes { unmap: bool },
    Discard,
    Flush,
}

/// A request: its kind, first sector, number of sectors.
type Ask = (Kind, u64, u64);

/// The disk as it must be, and what was changed.
struct Guest<'a> {
    case: &'a Case,
    client: Client,
    disk: Vec<u8>,
    touched: Vec<Ask>,
    random: Random,
}

fn range(sector: u64, count: u64) -> std::ops::Range<usize> {
    let at = |n: u64| usize::try_from(n * 512).unwrap();
    at(sector)..at(sector + count)
}

impl Guest<'_> {
    fn sectors(&self) -> u64 {
        self.disk.len() as u64 / 512
    }

    /// A range that is whole clusters, around a border of clusters, or anywhere.
    fn place(&mut self) -> (u64, u64) {
        let (sectors, cluster) = (self.sectors(), self.case.cluster / 512);
        let random = &mut self.random;
        let border = random.below(sectors.div_ceil(cluster)) * cluster;
        let (first, count) = match random.below(5) {
            0 => (border, cluster * (1 + random.below(3))),
            1 => (border.saturating_sub(1 + random.below(9)), 2 + random.below(16)),
            2 => (random.below(sectors), 1),
            3 => (random.below(sectors), 1 + random.below(LONGEST)),
            _ => (random.below(sectors), 1 + random.below(24)),
        };
        (first, count.min(sectors - first).min(LONGEST.max(2 * cluster)))
    }

    /// Requests that do not overlap, but may meet in a cluster.
    fn batch(&mut self) -> Vec<Ask> {
        let mut batch: Vec<Ask> = Vec::new();
        for _ in 0..1 + self.random.below(8) {
            let (first, count) = self.place();
            let kind = match self.random.below(10) {
                0 => Kind::Flush,
                1 => Kind::Zeroes { unmap: false },
                2 => Kind::Zeroes { unmap: true },
                3 | 4 => Kind::Discard,
                _ => Kind::Write,
            };
            if batch.iter().all(|(_, at, n)| first + count <= *at || at + n <= first) {
                batch.push((kind, first, count));
            }
        }
        batch
    }

    /// Sends all of a batch at once on all queues, waits, and checks what it did.
    fn round(&mut self) {
        let batch = self.batch();
        let queues = self.client.queues_mut().len();
        for (n, &(kind, sector, count)) in batch.iter().enumerate() {
            let flags = u32::from(kind == Kind::Zeroes { unmap: true });
            let ranges = [Range { sector, count: u32::try_from(count).unwrap(), flags }];
            let skew = 8 * usize::from(self.random.below(3) == 0);
            let q = self.client.queue(n % queues);
            q.layout = Layout { align: 512, skew, segment: 64 << 10 };
            let request = match kind {
                Kind::Flush => Request::flush(),
                Kind::Zeroes { .. } => {
                    Request::ranges(q.mem(), vb::VIRTIO_BLK_T_WRITE_ZEROES, &ranges).unwrap()
                }
                Kind::Discard => {
                    Request::ranges(q.mem(), vb::VIRTIO_BLK_T_DISCARD, &ranges).unwrap()
                }
                Kind::Write => {
                    let data = noise(&mut self.random, count);
                    self.disk[range(sector, count)].copy_from_slice(&data);
                    q.write_request(sector, &data).unwrap()
                }
            };
            if matches!(kind, Kind::Zeroes { .. }) {
                self.disk[range(sector, count)].fill(0);
            }
            q.push(request).unwrap();
        }
        for q in self.client.queues_mut() {
            q.kick().unwrap();
        }
        for q in self.client.queues_mut() {
            let done = q.wait_all().unwrap();
            assert!(done.iter().all(|d| d.status == Status::Ok), "{batch:?}: {done:?}");
        }
        for ask in &batch {
            self.look(*ask);
        }
        self.touched.extend(batch);
    }

    /// Reads back what a request has changed.
    fn look(&mut self, (kind, sector, count): Ask) {
        let mut got = vec![0; usize::try_from(count * 512).unwrap()];
        let n = usize::try_from(sector).unwrap() % self.client.queues_mut().len();
        self.client.queue(n).read(sector, &mut got).unwrap();
        let want = &mut self.disk[range(sector, count)];
        let text = format!("{kind:?} of {count} sectors at {sector}");
        if kind != Kind::Discard {
            return assert_same(&got, want, &text);
        }
        let per = self.case.cluster / 512;
        for (i, (got, want)) in got.chunks(512).zip(want.chunks_mut(512)).enumerate() {
            let at = sector + i as u64;
            let border = at / per * per;
            let whole = border >= sector && border + per <= sector + count;
            let zero = got.iter().all(|b| *b == 0);
            if !self.case.how.unmap {
                assert!(got == want, "{text}: sector {at} has changed");
            } else if self.case.version == 3 && whole {
                assert!(zero, "{text}: sector {at} is not zero");
            } else {
                assert!(zero || got == want, "{text}: sector {at} is neither");
            }
            want.copy_from_slice(got);
        }
    }

    /// A disk without sectors has none to read or write.
    fn nothing_there(&mut self) {
        assert_eq!(self.client.capacity(), 0);
        let q = self.client.queue(0);
        assert_eq!(q.write(0, &[1; 512]).unwrap_err().status(), Some(Status::IoErr));
        assert_eq!(q.read(0, &mut [1; 512]).unwrap_err().status(), Some(Status::IoErr));
        q.flush().unwrap();
    }
}

fn snapshot(dirs: &Dirs, name: &str) -> Vec<u8> {
    let which = format!("snapshot.name={name}");
    dirs.run("qemu-img", &["convert", "-f", "qcow2", "-l", &which, "-O", "raw", "a", "snapshot"]);
    std::fs::read(dirs.path("snapshot")).unwrap()
}

fn bases(made: &Made) -> Vec<Vec<u8>> {
    made.bases.iter().map(|b| std::fs::read(made.dirs.path(b)).unwrap()).collect()
}

/// A bitmap of dirty clusters may be gone or known to be out of date; else it must have what was written.
fn check_bitmap(made: &Made, touched: &[Ask]) {
    let data = info(&made.dirs, "a");
    let bitmap = data["bitmaps"].as_array().and_then(|b| b.first());
    let Some(bitmap) = bitmap else { return };
    if bitmap["flags"].as_array().unwrap().contains(&"in-use".into()) {
        return;
    }
    let dirs = &made.dirs;
    let socket = dirs.path("nbd").display().to_string();
    dirs.run("qemu-nbd", &["--fork", "-r", "-f", "qcow2", "-B", "b0", "-k", &socket, "a"]);
    let nbd = format!(
        "driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:b0"
    );
    let map = dirs.run("qemu-img", &["map", "--output=json", "--image-opts", &nbd]);
    let map: Vec<Value> = serde_json::from_str(&map).unwrap();
    for (kind, sector, count) in touched {
        if matches!(kind, Kind::Discard | Kind::Flush) {
            continue;
        }
        let (from, to) = (sector * 512, (sector + count) * 512);
        for part in &map {
            let at = part["start"].as_u64().unwrap();
            let end = at + part["length"].as_u64().unwrap();
            // In this map, dirty is what has no data.
            let dirty = part["data"] == false;
            assert!(dirty || end <= from || to <= at, "{kind:?} {sector} {count}: not in {part}");
        }
    }
}

fn run(case: &Case, seed: u64) {
    let mut random = Random(seed);
    let made = case.make(&mut random);
    let dirs = &made.dirs;
    let before = dirs.expected("a");
    let names: Vec<_> = ["s1", "s2"].into_iter().take(case.snapshots).collect();
    let snapshots: Vec<_> = names.iter().map(|s| snapshot(dirs, s)).collect();
    let base_bytes = bases(&made);
    assert_eq!(before.len() as u64, case.size);

    let program = start(&dirs.path("a"), case.how);
    let mut client = connect(&program, 2);
    assert_same(&read_all(&mut client), &before, "read before all");
    let mut guest = Guest { case, client, disk: before, touched: Vec::new(), random };
    if case.size == 0 {
        guest.nothing_there();
    } else {
        (0..ROUNDS).for_each(|_| guest.round());
    }
    assert_same(&read_all(&mut guest.client), &guest.disk, "read after all");
    let Guest { client, disk, touched, .. } = guest;
    drop(client);
    assert!(program.terminate().success());

    if case.bitmap && info(dirs, "a")["bitmaps"].is_null() {
        // Dropped: what it occupied is lost until the next repair.
        assert!(matches!(check(dirs, "a"), (0 | 3, _)), "{:?}", check(dirs, "a"));
    } else {
        assert_clean(dirs, "a", "after all");
    }
    assert!(!super::bed::is_dirty(&dirs.path("a")));
    assert_same(&dirs.expected("a"), &disk, "as QEMU reads it");
    std::fs::write(dirs.path("model"), &disk).unwrap();
    dirs.run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", "model", "a"]);
    if case.data_file == Some(true) {
        let raw = std::fs::read(dirs.path("data")).unwrap();
        assert_same(&raw[..disk.len()], &disk, "the raw data file");
    }
    for (base, was) in bases(&made).iter().zip(&base_bytes) {
        assert!(base == was, "a base has changed");
    }
    for (name, was) in names.iter().zip(&snapshots) {
        assert_same(&snapshot(dirs, name), was, name);
    }
    if case.bitmap {
        check_bitmap(&made, &touched);
    }
}

/// Runs every fourth case, so that the processors share the work.
fn quarter(n: usize) {
    for (i, case) in corpus(seed()).iter().enumerate().skip(n).step_by(4) {
        explained(case, i as u64);
    }
    let mut random = Random(seed() + 1000 * n as u64);
    for _ in 0..number("VUB_QCOW2_CASES", 0) / 4 {
        let seed = random.next();
        explained(&Case::random(&mut Random(seed)), seed);
    }
}

/// Says which case it was when one fails.
fn explained(case: &Case, seed: u64) {
    let said = Explain(case, seed);
    run(case, seed);
    std::mem::forget(said);
}

struct Explain<'a>(&'a Case, u64);

impl Drop for Explain<'_> {
    fn drop(&mut self) {
        eprintln!("the case was {:?}, seed {}", self.0, self.1);
    }
}

#[test]
fn corpus_1() {
    quarter(0);
}

#[test]
fn corpus_2() {
    quarter(1);
}

#[test]
fn corpus_3() {
    quarter(2);
}

#[test]
fn corpus_4() {
    quarter(3);
}

/// Each pair of kinds that can be together is in the corpus, whatever the seed.
#[test]
fn corpus_is_whole() {
    let cases = corpus(seed());
    let has = |what: &str, f: &dyn Fn(&Case) -> bool| assert!(cases.iter().any(f), "{what}");
    has("compressed clusters of 2 MiB", &|c| c.compressed.is_some() && c.cluster == 2 << 20);
    has("extended entries with snapshots", &|c| c.extended && c.snapshots > 0);
    has("extended entries with a short base", &|c| {
        c.extended && c.backing == super::cases::Backing::Short
    });
    has("a raw data file and preallocation", &|c| {
        c.data_file == Some(true) && c.preallocation != "off"
    });
    has("version 2 with snapshots", &|c| c.version == 2 && c.snapshots > 0);
    has("lazy refcounts of one bit", &|c| c.lazy && c.refcount_bits == 1);
    has("an empty disk with snapshots", &|c| c.snapshots > 0 && c.size == 0);
    assert!(cases.len() >= 20 && cases.len() < 60, "{}", cases.len());
}
