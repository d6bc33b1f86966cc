//! Memory that is taken away while requests write into it, and memory in as many pieces as there may be.

use std::fs::File;
use std::ops::Range;

use serde_json::json;
use vub_client::blk::Request;
use vub_client::mem::GuestMem;
use vub_client::proto::pf;
use vub_client::{Base, MemStyle, Options, Status};

use crate::common::{Disk, ENGINES, FileDisk, MIB, Random, config, eventually, small};

/// Reads that a slow disk has not answered are under way into a region that goes: the reply comes after the last byte.
#[test]
fn nothing_is_written_into_memory_that_was_taken_away() {
    for mem_style in [MemStyle::Slots, MemStyle::Table] {
        let disk = Disk::of(
            json!({
                "driver": "null-co", "node-name": "root", "read-zeroes": true,
                "latency-ns": 200_000_000u64,
            }),
            config(),
        );
        let mut client = disk.connect(Options { queues: 4, mem_style, ..small() });
        let region = client.plug_memory(1 << 20).unwrap();
        let gpa = client.mem().regions()[region].0.gpa;
        let whole = client.mem().view(gpa, 1 << 20).unwrap();
        whole.fill(0xee);
        for q in client.queues_mut() {
            for _ in 0..8 {
                let buf = q.mem().alloc_in(region, 16 << 10, 4096).unwrap();
                q.submit(Request::read(0, vec![buf])).unwrap();
            }
        }
        // All are taken, none is done.
        eventually("the requests are taken", || {
            client.queues_mut().iter_mut().all(|q| {
                let ring = q.ring();
                ring.mem().avail_event() == ring.next_avail()
            })
        });
        assert!(whole.to_vec().iter().all(|b| *b == 0xee), "the disk is too fast for this test");
        client.unplug_memory(region).unwrap();
        let then = whole.to_vec();
        for q in client.queues_mut() {
            assert!(q.wait_all().unwrap().iter().all(|done| done.status == Status::Ok));
            q.read(0, &mut [0; 512]).unwrap();
        }
        client.stop().unwrap();
        assert_eq!(then.iter().filter(|b| **b == 0).count(), 4 * 8 * (16 << 10));
        assert!(whole.to_vec() == then, "written after the reply");
    }
}

/// Regions that begin and end anywhere in their file: gigantic guests on huge pages, DIMMs in one file, ROMs.
fn parts_of_a_file(fd: &std::os::fd::OwnedFd, whole: usize, parts: &[Range<usize>]) {
    for mem_style in [MemStyle::Slots, MemStyle::Table] {
        for engine in ENGINES {
            let file = FileDisk::new(MIB, engine, config());
            let mut client = file.disk.connect(Options { mem_style, ..small() });
            let content = Random(5).bytes(16 << 10);
            client.queue(0).write(0, &content).unwrap();
            for part in parts {
                let fd = fd.try_clone().unwrap();
                let region = client.mem().add_part(fd, whole, part.clone()).unwrap();
                client.plug_region(region).unwrap();
                let first = client.mem().alloc_in(region, content.len(), 1).unwrap();
                let done = client.queue(0).run(Request::read(0, vec![first])).unwrap();
                assert!(done.status == Status::Ok && done.data() == content, "{part:?} {engine:?}");
                // The last bytes of the region.
                let (info, _) = client.mem().regions().swap_remove(region);
                let at = info.gpa + info.len - content.len() as u64;
                let last = client.mem().view(at, content.len()).unwrap();
                let done = client.queue(0).run(Request::read(0, vec![last])).unwrap();
                assert!(done.status == Status::Ok && done.data() == content, "{part:?} {engine:?}");
                client.unplug_memory(region).unwrap();
            }
        }
    }
}

#[test]
fn regions_at_odd_offsets() {
    let whole = 256 << 10;
    let fd = vub_client::sys::memfd(c"odd", whole as u64).unwrap();
    let parts = [512..40 << 10, 4096 + 16..whole - 16, (64 << 10) + 2048..128 << 10];
    parts_of_a_file(&fd, whole, &parts);
}

#[test]
fn regions_of_huge_pages() {
    const HUGE: usize = 2 << 20;
    let _pages = HugePages::reserve(4);
    let whole = 3 * HUGE;
    let fd = vub_client::sys::huge_memfd(c"huge", whole as u64).unwrap();
    let parts = [0..whole, HUGE..2 * HUGE, 4096..HUGE, HUGE + 8192 + 512..3 * HUGE - 4096];
    parts_of_a_file(&fd, whole, &parts);
}

/// Huge pages of 2 MiB that this test may use; given back when dropped. The lock keeps another run of it from giving back ours.
struct HugePages {
    before: u64,
    _lock: File,
}

impl HugePages {
    const NUMBER: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

    fn number() -> u64 {
        std::fs::read_to_string(Self::NUMBER).unwrap().trim().parse().unwrap()
    }

    /// Root may ask the kernel for them; it must have so much memory in one piece.
    fn reserve(more: u64) -> HugePages {
        let lock = File::open(Self::NUMBER).unwrap();
        lock.lock().unwrap();
        let pages = HugePages { before: Self::number(), _lock: lock };
        let wanted = pages.before + more;
        std::fs::write(Self::NUMBER, wanted.to_string()).expect("root asks");
        assert_eq!(Self::number(), wanted, "{}: the kernel has no such pages", Self::NUMBER);
        pages
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let restored = std::fs::write(Self::NUMBER, self.before.to_string());
        assert!(restored.is_ok() || std::thread::panicking());
    }
}

/// All 509 slots, each read into; then every other one goes, from the middle of things.
#[test]
fn as_many_regions_as_there_may_be() {
    let file = FileDisk::new(MIB, ENGINES[2], config());
    let mut client = file.disk.connect(Options { mem_style: MemStyle::Slots, ..small() });
    let content = Random(3).bytes(8192);
    client.queue(0).write(0, &content).unwrap();
    while client.mem().regions().len() < 509 {
        client.plug_memory(8192).unwrap();
    }
    client.plug_memory(8192).expect_err("one more than there may be");
    assert!(client.mem().remove_region(509).is_some());
    let check = |client: &mut vub_client::Client| {
        for region in 1..client.mem().regions().len() {
            let buf = client.mem().alloc_in(region, 8192, 4096).unwrap();
            let done = client.queue(0).run(Request::read(0, vec![buf])).unwrap();
            assert!(done.status == Status::Ok && done.data() == content, "region {region}");
        }
    };
    check(&mut client);
    for region in (1..509).rev().step_by(2) {
        client.unplug_memory(region).unwrap();
    }
    check(&mut client);
}

/// A front end cuts the file of its dirty log, or of its in-flight region, short: the ring is broken, and the front end is told,
/// for nobody would ever hear of what goes there now. A new connection, and other disks, know nothing of it.
#[test]
fn a_log_or_region_that_is_cut_short_breaks_the_ring() {
    let reopened =
        |fd| File::options().read(true).write(true).open(format!("/proc/self/fd/{fd}")).unwrap();
    let other = FileDisk::new(MIB, ENGINES[0], config());
    let mut other = other.disk.connect(small());
    for (packed, log_is_cut) in [(false, false), (false, true), (true, false), (true, true)] {
        let disk = FileDisk::new(MIB, ENGINES[0], config());
        let plain = small();
        let want_protocol = plain.want_protocol | 1 << pf::LOG_SHMFD;
        let options = Options { packed, inflight: true, want_protocol, ..plain };
        let mut client = disk.disk.connect(options.clone());
        // A region of the front end's own: ours cannot be cut.
        let (desc, _) = client.inflight.take().unwrap();
        let region = GuestMem::new(1, usize::try_from(desc.mmap_size).unwrap()).unwrap();
        let region = reopened(region.regions()[0].1);
        client.inflight = Some((desc, region.try_clone().unwrap().into()));
        let start = Base::At(if packed { 0x8000_8000 } else { 0 });
        client.reconnect(disk.disk.path(), start).unwrap();
        let log = client.log_dirty().unwrap();
        let q = client.queue(0);
        q.write(0, &[1; 512]).unwrap();
        let cut = if log_is_cut { reopened(log.regions()[0].1) } else { region };
        cut.set_len(0).unwrap();
        let request = q.write_request(0, &[2; 512]).unwrap();
        q.submit(request).unwrap();
        q.wait_err().unwrap_or_else(|e| panic!("packed {packed}, log {log_is_cut}: {e}"));
        other.queue(0).write(0, &[1; 512]).unwrap();
        drop(client);
        disk.disk.connect(options).queue(0).write(0, &[1; 512]).unwrap();
    }
}
