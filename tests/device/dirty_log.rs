//! The dirty log of a migration: every page that we change is marked, and no other.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use vub_client::blk::Request;
use vub_client::mem::{Buf, GPA_BASE, GuestMem};
use vub_client::proto::{F_LOG_ALL, pf, req, vring_addr};
use vub_client::ring::Seg;
use vub_client::{Client, Options, Status};

use crate::common::{ENGINES, FileDisk, MIB, Random, config, eventually, small};
use crate::running::{some_more, while_running};

const PAGE: u64 = 4096;
/// Bytes of a log that holds the guest's memory: it begins at 4 GiB, 1 GiB is more than enough.
const LOG_SIZE: usize = 5 << 15;

fn options() -> Options {
    let plain = small();
    Options { queues: 4, want_protocol: plain.want_protocol | 1 << pf::LOG_SHMFD, ..plain }
}

/// A log, as the front end has it.
struct Log {
    mem: Arc<GuestMem>,
    bytes: Buf,
}

impl Log {
    fn new() -> Log {
        let mem = GuestMem::new(1, LOG_SIZE).unwrap();
        let bytes = mem.view(GPA_BASE, LOG_SIZE).unwrap();
        Log { mem, bytes }
    }

    /// Gives it to the back end.
    fn give(&self, client: &Client) {
        let fd = self.mem.regions()[0].1;
        let reply = client.conn.set_log_base(LOG_SIZE as u64, 0, fd).unwrap();
        let sent = [LOG_SIZE as u64, 0].map(u64::to_ne_bytes).concat();
        assert_eq!(reply.body, sent, "rust-vmm wants exactly 16 bytes");
    }

    fn has(&self, page: u64) -> bool {
        let at = usize::try_from(page / 8).unwrap();
        self.bytes.u8_at(at).load(Ordering::Acquire) & 1 << (page % 8) != 0
    }

    fn clear(&self, page: u64) {
        let at = usize::try_from(page / 8).unwrap();
        self.bytes.u8_at(at).fetch_and(!(1 << (page % 8)), Ordering::AcqRel);
    }

    /// Takes all bits away, as a migration does.
    fn take(&self) -> BTreeSet<u64> {
        self.pages(|bits| bits.swap(0, Ordering::AcqRel))
    }

    /// All bits.
    fn look(&self) -> BTreeSet<u64> {
        self.pages(|bits| bits.load(Ordering::Acquire))
    }

    fn pages(&self, get: impl Fn(&AtomicU64) -> u64) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        for at in 0..LOG_SIZE / 8 {
            let bits = get(self.bytes.u64_at(at * 8));
            if bits == 0 {
                continue;
            }
            pages.extend((0..64).filter(|k| bits & 1 << k != 0).map(|k| at as u64 * 64 + k));
        }
        pages
    }
}

fn pages(buf: &Buf) -> std::ops::RangeInclusive<u64> {
    buf.gpa() / PAGE..=(buf.gpa() + buf.len() as u64 - 1) / PAGE
}

/// Where a ring lies: descriptors; used ring or the device's event suppression; available ring or the driver's.
struct Parts {
    desc: Buf,
    device: Buf,
    driver: Buf,
}

fn parts(client: &mut Client, i: usize) -> Parts {
    let mem = Arc::clone(client.mem());
    let packed = client.has_feature(34);
    let q = client.queue(i);
    let parts = if packed {
        let ring = q.packed();
        [&ring.desc, &ring.device, &ring.driver]
    } else {
        let ring = q.ring().mem();
        [&ring.desc, &ring.used, &ring.avail]
    };
    let [desc, device, driver] = parts.map(|b| mem.view(b.gpa(), b.len()).unwrap());
    Parts { desc, device, driver }
}

/// The pages of a ring that the device writes.
fn written(client: &mut Client, i: usize) -> BTreeSet<u64> {
    let Parts { desc, device, .. } = parts(client, i);
    let descs = client.has_feature(34).then(|| pages(&desc)).into_iter().flatten();
    pages(&device).chain(descs).collect()
}

/// Switches the log of requests, and then that of the used rings, on or off.
fn switch(client: &mut Client, on: bool) {
    let features = client.features() | if on { F_LOG_ALL } else { 0 };
    client.conn.set_u64(req::SET_FEATURES, features).unwrap();
    for i in 0..client.queues_mut().len() {
        let Parts { desc, device, driver } = parts(client, i);
        let log = if on { device.gpa() } else { 0 };
        let at = [&desc, &device, &driver].map(Buf::user_addr);
        let index = u32::try_from(i).unwrap();
        let body = vring_addr(index, on.into(), at[0], at[1], at[2], log);
        client.conn.set(req::SET_VRING_ADDR, &body, &[]).unwrap();
    }
}

/// A disk of 1 MiB without two equal sectors.
fn disk(engine: usize) -> FileDisk {
    let file = FileDisk::new(MIB, ENGINES[engine], config());
    let image = std::fs::File::options().write(true).open(file.image.path()).unwrap();
    image.write_all_at(&Random(5).bytes(usize::try_from(MIB).unwrap()), 0).unwrap();
    file
}

/// The guest's memory, without what the driver writes while requests are under way.
fn snapshot(client: &mut Client) -> Vec<(u64, Vec<u8>)> {
    let mem = Arc::clone(client.mem());
    let mut regions: Vec<(u64, Vec<u8>)> = mem
        .regions()
        .iter()
        .map(|(r, _)| (r.gpa, mem.view(r.gpa, usize::try_from(r.len).unwrap()).unwrap().to_vec()))
        .collect();
    for i in 0..client.queues_mut().len() {
        let Parts { driver, .. } = parts(client, i);
        let (gpa, len) = (driver.gpa(), driver.len());
        for (start, bytes) in &mut regions {
            if gpa >= *start && gpa < *start + bytes.len() as u64 {
                let at = usize::try_from(gpa - *start).unwrap();
                bytes[at..at + len].fill(0);
            }
        }
    }
    regions
}

fn changed(before: &[(u64, Vec<u8>)], after: &[(u64, Vec<u8>)]) -> BTreeSet<u64> {
    let size = usize::try_from(PAGE).unwrap();
    let mut pages = BTreeSet::new();
    for ((gpa, old), (_, new)) in before.iter().zip(after) {
        let pairs = old.chunks(size).zip(new.chunks(size)).enumerate();
        pages.extend(pairs.filter(|(_, (o, n))| o != n).map(|(i, _)| gpa / PAGE + i as u64));
    }
    pages
}

#[test]
fn exactly_the_pages_that_change_are_marked() {
    exactly_what_changes(false);
}

/// Of a packed ring the whole descriptor ring and the device's event suppression count as written; nothing else of the
/// guest's memory does, the driver's event suppression neither.
#[test]
fn exactly_the_pages_that_change_are_marked_of_packed_rings() {
    exactly_what_changes(true);
}

fn exactly_what_changes(packed: bool) {
    for engine in 0..ENGINES.len() {
        for event_idx in [true, false] {
            let file = disk(engine);
            // The used ring's index, the elements in use and avail_event are on three pages; a packed ring of this size is
            // on four.
            let shape =
                Options { packed, queue_size: 1024, base: 600, mem_size: 4 << 20, ..options() };
            let mut client = file.disk.connect(Options { event_idx, ..shape });
            assert_eq!(client.has_feature(34), packed);
            let log = Log::new();
            log.give(&client);
            switch(&mut client, true);
            // Memory that came after the log.
            let plugged = client.plug_memory(1 << 20).unwrap();
            let mut random = Random(engine as u64);
            for _ in 0..40 {
                let index = usize::try_from(random.below(4)).unwrap();
                a_round(&mut client, &log, index, plugged, &mut random);
            }
            switch(&mut client, false);
            log.take();
            client.queue(2).read(3, &mut [0; 4096]).unwrap();
            client.stop().unwrap();
            assert!(log.take().is_empty(), "logged after it was switched off");
        }
    }
}

/// Some reads and a GET_ID at once; then the ring is stopped, compared, and started again.
fn a_round(client: &mut Client, log: &Log, index: usize, plugged: usize, random: &mut Random) {
    let mem = Arc::clone(client.mem());
    let mut expected = BTreeSet::new();
    let mut bufs = Vec::new();
    let count = 1 + random.below(6);
    for i in 0..count {
        let len = usize::try_from(512 * (1 + random.below(40))).unwrap();
        let skew = usize::try_from(random.below(4096)).unwrap();
        let data = match (i, random.below(3)) {
            (0, _) => mem.alloc_skewed(20, 4096, 4090).unwrap(),
            (_, 0) => mem.alloc_in(plugged, len, 1).unwrap(),
            _ => mem.alloc_skewed(len, 4096, skew).unwrap(),
        };
        let (head, status) = (mem.alloc(16, 16).unwrap(), mem.alloc(1, 1).unwrap());
        data.fill(0xee);
        status.fill(0xff);
        head.u64_at(0).store(if i == 0 { 8 } else { 0 }, Ordering::Release);
        head.u64_at(8).store(random.below(1024), Ordering::Release);
        let chain = [
            Seg::out(head.gpa(), 16),
            Seg::inn(data.gpa(), u32::try_from(data.len()).unwrap()),
            Seg::inn(status.gpa(), 1),
        ];
        client.queue(index).push_chain(&chain).unwrap();
        expected.extend(pages(&data));
        expected.extend(pages(&status));
        bufs.push((head, data, status));
    }
    // Workers that wake or go to sleep write into their used rings at any time.
    let count_of_queues = client.queues_mut().len();
    let rings: BTreeSet<u64> = (0..count_of_queues).flat_map(|i| written(client, i)).collect();
    let early = log.take();
    assert!(early.is_subset(&rings), "marked without a request: {early:?}");
    let before = snapshot(client);
    let packed = client.has_feature(34);
    let q = client.queue(index);
    if packed {
        q.kick().unwrap();
        assert_eq!(q.wait_all().unwrap().len() as u64, count);
    } else {
        let from = q.ring().mem().used_idx();
        q.kick().unwrap();
        q.wait_used_idx(from, u16::try_from(count).unwrap()).unwrap();
    }
    // Requests' own pages are marked before the guest can see them done.
    let mut marked = log.take();
    assert!(marked.is_superset(&expected), "{expected:?} of {marked:?}");
    client.stop_queue(index).unwrap();
    let changed = changed(&before, &snapshot(client));
    eventually("every page that has changed is marked", || {
        marked.extend(log.take());
        marked.is_superset(&changed)
    });
    expected.extend(&rings);
    assert!(expected.is_superset(&marked), "written {expected:?}, marked {marked:?}");
    // A ring that starts while the log is on logs at once.
    assert!(written(client, index).iter().any(|page| changed.contains(page)));
    assert!(bufs.iter().any(|(_, _, status)| status.u8_at(0).load(Ordering::Acquire) == 0));
    client.queue(index).wait_all().unwrap();
    client.start_queue(index).unwrap();
    switch(client, true);
    log.take();
}

/// A new log again and again under load: no request is in neither, and nothing is written into an old one.
#[test]
fn the_log_is_switched_under_running_rings() {
    const LOGS: usize = 40;
    let file = disk(2);
    let mut client = file.disk.connect(options());
    let logs: Vec<Log> = (0..LOGS).map(|_| Log::new()).collect();
    // The log in use, or between which two they are being switched.
    let (using, giving) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let seen = AtomicU64::new(0);
    logs[0].give(&client);
    switch(&mut client, true);
    let mut old = Vec::new();
    while_running(
        &mut client,
        |q, random| {
            let len = usize::try_from(PAGE * (1 + random.below(4))).unwrap();
            let buf = q.mem().alloc(len, 4096).unwrap();
            let first = using.load(Ordering::SeqCst);
            logs[first..].iter().for_each(|log| pages(&buf).for_each(|p| log.clear(p)));
            let mine = pages(&buf);
            let done = q.run(Request::read(random.below(1024), vec![buf])).unwrap();
            assert_eq!(done.status, Status::Ok);
            let last = giving.load(Ordering::SeqCst);
            for page in mine {
                let there = logs[first..=last].iter().any(|log| log.has(page));
                assert!(there, "page {page:#x} is in none of the logs {first} to {last}");
                seen.fetch_add(1, Ordering::Relaxed);
            }
        },
        |client, count| {
            for i in 1..LOGS {
                some_more(count);
                giving.store(i, Ordering::SeqCst);
                logs[i].give(client);
                // The guest may take bits away still, but nobody sets any.
                old.push(logs[i - 1].look());
                using.store(i, Ordering::SeqCst);
            }
        },
    );
    assert!(seen.load(Ordering::Relaxed) > 0 && old.iter().all(|pages| !pages.is_empty()));
    client.stop().unwrap();
    for (i, then) in old.iter().enumerate() {
        let now = logs[i].look();
        assert!(now.is_subset(then), "log {i} was written after it was given back");
    }
}

/// LOG_ALL on a ring that runs, with requests in flight that nobody waits for.
#[test]
fn logging_begins_without_a_drain() {
    let options_of = serde_json::json!({
        "driver": "null-co", "node-name": "root", "read-zeroes": true, "latency-ns": 300_000_000u64,
    });
    let disk = crate::common::Disk::of(options_of, config());
    let mut client = disk.connect(options());
    let log = Log::new();
    let q = client.queue(0);
    let buf = q.mem().alloc(4096, 4096).unwrap();
    let page = buf.gpa() / PAGE;
    let from = q.ring().mem().used_idx();
    q.submit(Request::read(0, vec![buf])).unwrap();
    eventually("the request is taken", || {
        let ring = client.queue(0).ring();
        ring.mem().avail_event() == ring.next_avail()
    });
    log.give(&client);
    switch(&mut client, true);
    assert_eq!(
        client.queue(0).ring().mem().used_idx(),
        from,
        "the switch has waited for a request"
    );
    client.queue(0).wait_all().unwrap();
    assert!(log.has(page));
}
