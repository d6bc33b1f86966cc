//! Every request type and every status, on every engine.

use virtio_bindings::virtio_blk as vb;
use vub_client::blk::{Range, Request};
use vub_client::{Client, Queue, Status};

use crate::common::{Disk, ENGINES, Engine, FileDisk, Image, MIB, Random, config, small};

/// What the device says to a request of no data.
fn status(q: &mut Queue, request: Request) -> Status {
    q.run(request).unwrap().status
}

fn ranges(q: &mut Queue, kind: u32, ranges: &[Range]) -> Status {
    let request = Request::ranges(q.mem(), kind, ranges).unwrap();
    status(q, request)
}

/// Data comes back; used lengths are what the device wrote; the serial; flush.
pub fn round_trips(client: &mut Client) {
    let q = client.queue(0);
    let mut random = Random(1);
    for len in [512, 4096, 4608, 65536, 1 << 20, 8 << 20] {
        let data = random.bytes(len);
        let write = q.write_request(8, &data).unwrap();
        let done = q.run(write).unwrap();
        assert_eq!((done.status, done.used_len), (Status::Ok, 1), "write of {len}");
        let read = q.read_request(8, len).unwrap();
        let done = q.run(read).unwrap();
        assert_eq!((done.status, done.used_len as usize), (Status::Ok, len + 1), "read of {len}");
        assert!(done.data() == data, "{len} bytes");
    }
    q.flush().unwrap();
    let done = q.run(Request::get_id(q.mem()).unwrap()).unwrap();
    assert_eq!((done.status, done.used_len), (Status::Ok, 21));
    assert_eq!(done.data(), *b"a-serial\0\0\0\0\0\0\0\0\0\0\0\0");
}

/// What is refused, and that the queue goes on.
pub fn refusals(client: &mut Client) {
    let capacity = client.capacity();
    let q = client.queue(0);
    let mut one = |sector, len: usize, write: bool| {
        let request = if write {
            q.write_request(sector, &vec![7; len])
        } else {
            q.read_request(sector, len)
        };
        status(q, request.unwrap())
    };
    for write in [false, true] {
        assert_eq!(one(capacity - 1, 512, write), Status::Ok);
        assert_eq!(one(capacity, 512, write), Status::IoErr);
        assert_eq!(one(capacity - 1, 1024, write), Status::IoErr);
        assert_eq!(one(u64::MAX, 512, write), Status::IoErr);
        assert_eq!(one(u64::MAX / 512, 512, write), Status::IoErr);
        assert_eq!(one(1 << 55, 512, write), Status::IoErr);
        assert_eq!(one(0, 100, write), Status::IoErr, "no whole sector");
        assert_eq!(one(0, 513, write), Status::IoErr);
    }
    assert_eq!(status(q, Request::bare(vb::VIRTIO_BLK_T_IN, 0)), Status::Ok, "nothing to read");
    for kind in [2, 3, 7, 12, 14, 16, 18, 0x8000_0000, u32::MAX] {
        assert_eq!(status(q, Request::bare(kind, 0)), Status::Unsupp, "type {kind}");
    }
    let (discard, zero) = (vb::VIRTIO_BLK_T_DISCARD, vb::VIRTIO_BLK_T_WRITE_ZEROES);
    let r = |sector, count, flags| Range { sector, count, flags };
    for kind in [discard, zero] {
        assert_eq!(status(q, Request::bare(kind, 0)), Status::IoErr, "no segment");
        let odd = q.write_request(0, &[0; 24]).unwrap();
        assert_eq!(status(q, Request { kind, ..odd }), Status::IoErr, "one segment and a half");
        assert_eq!(ranges(q, kind, &[r(capacity, 1, 0)]), Status::IoErr);
        assert_eq!(ranges(q, kind, &[r(capacity - 1, 2, 0)]), Status::IoErr);
        assert_eq!(ranges(q, kind, &[r(u64::MAX, 1, 0)]), Status::IoErr);
        assert_eq!(ranges(q, kind, &[r(0, u32::MAX, 0)]), Status::IoErr);
        assert_eq!(ranges(q, kind, &[r(0, 1, 2)]), Status::Unsupp, "an unknown flag");
        assert_eq!(ranges(q, kind, &[r(0, 0, 0)]), Status::Ok, "nothing to do");
        assert_eq!(ranges(q, kind, &[r(0, 1, 0); 257]), Status::Unsupp, "one segment too many");
    }
    assert_eq!(ranges(q, discard, &[r(0, 1, 1)]), Status::Unsupp, "unmap is for zeroes only");
    assert_eq!(ranges(q, zero, &[r(0, 1, 1)]), Status::Ok);
    q.flush().unwrap();
}

/// 256 segments at once, every other sector; a bad one spoils the request before anything is done.
pub fn many_segments(client: &mut Client) {
    let q = client.queue(0);
    let ones = vec![1; 512 * 512];
    for (kind, count) in [(vb::VIRTIO_BLK_T_DISCARD, 256), (vb::VIRTIO_BLK_T_WRITE_ZEROES, 16)] {
        q.write(64, &ones).unwrap();
        let last = count - 1;
        let mut segments: Vec<Range> =
            (0..count as u64).map(|i| Range { sector: 64 + 2 * i, count: 1, flags: 0 }).collect();
        segments[last].flags = 4;
        assert_eq!(ranges(q, kind, &segments), Status::Unsupp);
        let mut back = vec![0; ones.len()];
        q.read(64, &mut back).unwrap();
        assert!(back == ones, "a refused request has no effect");
        segments[last].flags = 0;
        assert_eq!(ranges(q, kind, &segments), Status::Ok);
        q.read(64, &mut back).unwrap();
        for (i, sector) in back.chunks(512).enumerate() {
            let zero = sector.iter().all(|b| *b == 0);
            let kept = sector.iter().all(|b| *b == 1);
            let hit = i % 2 == 0 && i / 2 < count;
            assert!(if hit { zero || kept } else { kept }, "sector {i}");
            assert!(zero == hit || kind == vb::VIRTIO_BLK_T_DISCARD, "sector {i}");
        }
    }
}

#[test]
fn requests_on_every_engine() {
    for engine in ENGINES {
        eprintln!("{engine:?}");
        let file = FileDisk::new(32 * MIB, engine, config());
        let mut client = file.disk.connect(vub_client::Options { mem_size: 48 << 20, ..small() });
        round_trips(&mut client);
        refusals(&mut client);
        many_segments(&mut client);
        crate::shapes::every_shape(&mut client);
    }
}

#[test]
fn discards_and_zeroes_reach_the_file() {
    for engine in ENGINES {
        for (discard, may_unmap) in [("unmap", true), ("ignore", false)] {
            let image = Image::new(16 * MIB);
            let disk = Disk::of(image.options(engine, discard), config());
            let mut client = disk.connect(small());
            assert_eq!(client.config().write_zeroes_may_unmap(), 1);
            assert_eq!(client.config().max_discard_seg(), 256);
            assert_eq!(client.config().max_write_zeroes_seg(), 16);
            let q = client.queue(0);
            let sectors = u32::try_from(2 * MIB / 512).unwrap();
            let fill = |q: &mut Queue| {
                q.write(0, &vec![9; 2 << 20]).unwrap();
                q.flush().unwrap();
                assert!(image.allocated() >= 2 * MIB);
            };
            let mut back = vec![1; 2 << 20];
            fill(q);
            q.discard(0, sectors).unwrap();
            q.read(0, &mut back).unwrap();
            if may_unmap {
                assert!(image.allocated() < MIB, "{engine:?}: {} bytes", image.allocated());
                assert!(back.iter().all(|b| *b == 0));
            } else {
                assert!(image.allocated() >= 2 * MIB);
                assert!(back.iter().all(|b| *b == 9), "an ignored discard changes nothing");
            }
            fill(q);
            q.write_zeroes(0, sectors, true).unwrap();
            q.read(0, &mut back).unwrap();
            assert!(back.iter().all(|b| *b == 0));
            assert_eq!(image.allocated() < MIB, may_unmap, "{engine:?} {discard}");
            fill(q);
            q.write_zeroes(0, sectors, false).unwrap();
            q.read(0, &mut back).unwrap();
            assert!(back.iter().all(|b| *b == 0));
            assert!(image.allocated() >= 2 * MIB, "zeroes without unmap keep their place");
        }
    }
}

#[test]
fn blocks_of_4096_bytes() {
    for engine in ENGINES {
        let config = vhost_user_blk::export::ExportConfig { logical_block_size: 4096, ..config() };
        let file = FileDisk::new(MIB, engine, config);
        let mut client = file.disk.connect(small());
        assert_eq!(client.config().blk_size(), 4096);
        assert_eq!(client.config().discard_sector_alignment() % 8, 0);
        let q = client.queue(0);
        q.write(8, &[3; 4096]).unwrap();
        for (sector, len) in [(1, 4096), (8, 512), (8, 4608), (7, 512)] {
            let read = q.read_request(sector, len).unwrap();
            assert_eq!(status(q, read), Status::IoErr, "{sector} {len}");
            let write = q.write_request(sector, &vec![0; len]).unwrap();
            assert_eq!(status(q, write), Status::IoErr, "{sector} {len}");
        }
        for kind in [vb::VIRTIO_BLK_T_DISCARD, vb::VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(ranges(q, kind, &[Range { sector: 8, count: 4, flags: 0 }]), Status::IoErr);
            assert_eq!(ranges(q, kind, &[Range { sector: 4, count: 8, flags: 0 }]), Status::IoErr);
        }
        let mut back = [0; 4096];
        q.read(8, &mut back).unwrap();
        assert_eq!(back, [3; 4096]);
    }
}

/// The file below would grow; the capacity that the guest was told is what counts.
#[test]
fn a_guest_grows_nothing() {
    for engine in ENGINES {
        let file = FileDisk::new(MIB, engine, config());
        assert!(file.disk.node.driver().grows());
        let mut client = file.disk.connect(small());
        let (capacity, q) = (client.capacity(), client.queue(0));
        for (sector, len) in [(capacity, 512), (capacity - 1, 1024), (capacity + 8, 4096)] {
            let write = q.write_request(sector, &vec![1; len]).unwrap();
            assert_eq!(status(q, write), Status::IoErr, "{sector} {len}");
        }
        for (sector, count) in [(capacity, 8), (capacity - 1, 2)] {
            for kind in [vb::VIRTIO_BLK_T_DISCARD, vb::VIRTIO_BLK_T_WRITE_ZEROES] {
                let good = Range { sector: 0, count: 1, flags: 0 };
                let range = Range { sector, count, flags: 0 };
                assert_eq!(ranges(q, kind, &[range]), Status::IoErr, "{sector} {count}");
                assert_ne!(ranges(q, kind, &[good, range]), Status::Ok, "{sector} {count}");
            }
        }
        assert_eq!(file.disk.node.len(), MIB);
        assert_eq!(std::fs::metadata(file.image.path()).unwrap().len(), MIB);
    }
}

#[test]
fn read_only_exports_refuse_changes() {
    let image = Image::new(MIB);
    std::fs::write(image.path(), vec![5; 1 << 20]).unwrap();
    let config = vhost_user_blk::export::ExportConfig { writable: false, ..config() };
    let engine = Engine { aio: "threads", direct: false };
    let disk = Disk::of(image.options(engine, "unmap"), config);
    let mut client = disk.connect(small());
    assert!(client.has_feature(vb::VIRTIO_BLK_F_RO));
    let q = client.queue(0);
    assert!(q.write(0, &[1; 512]).unwrap_err().status() == Some(Status::IoErr));
    assert!(q.discard(0, 1).unwrap_err().status() == Some(Status::IoErr));
    assert!(q.write_zeroes(0, 1, false).unwrap_err().status() == Some(Status::IoErr));
    assert_eq!(status(q, Request::bare(vb::VIRTIO_BLK_T_OUT, 0)), Status::IoErr);
    q.flush().unwrap();
    let mut back = [0; 512];
    q.read(0, &mut back).unwrap();
    assert_eq!(back, [5; 512]);
    assert!(std::fs::read(image.path()).unwrap().iter().all(|b| *b == 5));
}
