//! The shapes that requests have in memory: odd addresses, scattered bytes, headers and status bytes cut anywhere,
//! chains longer than promised; rings of all sizes.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_blk as vb;
use vub_client::blk::Request;
use vub_client::ring::Seg;
use vub_client::{Buf, Client, Layout, Options, Queue, Status};

use crate::common::{Disk, ENGINES, FileDisk, MIB, Random, config, small};

/// All of these on a running guest.
pub fn every_shape(client: &mut Client) {
    odd_addresses(client.queue(0));
    scattered_bytes(client.queue(0));
    cut_anywhere(client.queue(0));
    short_and_long_buffers(client.queue(0));
}

fn odd_addresses(q: &mut Queue) {
    let mut random = Random(2);
    for (align, skew, segment) in
        [(4096, 1, 1 << 20), (512, 511, 700), (4, 2, 512), (4096, 512, 1536), (1, 0, 4097)]
    {
        q.layout = Layout { align, skew, segment };
        let data = random.bytes(24 * 512);
        q.write(5, &data).unwrap();
        let mut back = vec![0; data.len()];
        q.read(5, &mut back).unwrap();
        assert!(back == data, "{:?}", q.layout);
    }
    q.layout = Layout::default();
}

/// One sector in 512 places, direct if the ring has room, and in an indirect table.
fn scattered_bytes(q: &mut Queue) {
    let indirect = q.indirect;
    let data = Random(3).bytes(512);
    q.layout = Layout { align: 2, skew: 1, segment: 1 };
    for way in [false, true] {
        let room = if way { 1024 } else { usize::from(q.ring().mem().size()) };
        if way && !indirect || room < 514 {
            continue;
        }
        q.indirect = way;
        q.write(9, &data).unwrap();
        let mut back = [0; 512];
        q.read(9, &mut back).unwrap();
        assert_eq!(back[..], data[..]);
    }
    q.indirect = indirect;
    q.layout = Layout::default();
}

/// Pieces of `lens` bytes, each at an odd place.
fn pieces(q: &Queue, lens: &[usize]) -> Vec<Buf> {
    let piece = |n: &usize| q.mem().alloc_skewed(*n, 64, 3).unwrap();
    lens.iter().map(piece).collect()
}

fn segs(bufs: &[Buf], written: bool) -> Vec<Seg> {
    let len = |b: &Buf| u32::try_from(b.len()).unwrap();
    let seg = |b: &Buf| Seg { addr: b.gpa(), len: len(b), device_writes: written };
    bufs.iter().map(seg).collect()
}

fn spread(bufs: &[Buf], bytes: &[u8]) {
    let mut at = 0;
    for b in bufs {
        b.write(0, &bytes[at..at + b.len()]);
        at += b.len();
    }
    assert_eq!(at, bytes.len());
}

fn gather(bufs: &[Buf]) -> Vec<u8> {
    bufs.iter().flat_map(Buf::to_vec).collect()
}

/// Header and data of a write in pieces that know nothing of each other; the status behind data of a read.
fn cut_anywhere(q: &mut Queue) {
    let mut random = Random(4);
    for round in 0..40 {
        let data = random.bytes(1024);
        let mut bytes =
            [&vb::VIRTIO_BLK_T_OUT.to_le_bytes()[..], &[0; 4], &21u64.to_le_bytes()].concat();
        bytes.extend_from_slice(&data);
        let out = pieces(q, &cuts(&mut random, bytes.len()));
        spread(&out, &bytes);
        let state = pieces(q, &[1]);
        state[0].fill(0xff);
        let chain = [segs(&out, false), segs(&state, true)].concat();
        q.push_chain(&chain).unwrap();
        q.kick().unwrap();
        assert_eq!(q.wait().unwrap().used_len, 1);
        assert_eq!(state[0].u8_at(0).load(Ordering::Acquire), 0, "round {round}");

        bytes.truncate(16);
        bytes[..4].copy_from_slice(&vb::VIRTIO_BLK_T_IN.to_le_bytes());
        let head = pieces(q, &cuts(&mut random, 16));
        spread(&head, &bytes);
        let inn = pieces(q, &cuts(&mut random, 1025));
        spread(&inn, &[0xee; 1025]);
        let chain = [segs(&head, false), segs(&inn, true)].concat();
        q.push_chain(&chain).unwrap();
        q.kick().unwrap();
        assert_eq!(q.wait().unwrap().used_len, 1025);
        let back = gather(&inn);
        assert_eq!(back[1024], 0);
        assert!(back[..1024] == data[..], "round {round}");
    }
}

/// `len` bytes in up to six pieces.
fn cuts(random: &mut Random, len: usize) -> Vec<usize> {
    let mut left = len;
    let mut lens = Vec::new();
    while left > 0 && lens.len() < 5 {
        let n = 1 + usize::try_from(random.below(left as u64)).unwrap();
        lens.push(n);
        left -= n;
    }
    lens.extend((left > 0).then_some(left));
    lens
}

/// GET_ID into too little and too much; a flush that brings data along; bytes to write behind an OUT's data.
fn short_and_long_buffers(q: &mut Queue) {
    for len in [1, 5, 19, 20, 21, 64] {
        let inn = pieces(q, &[len]);
        inn[0].fill(0xa5);
        let done = q.run(Request { inn, ..Request::bare(vb::VIRTIO_BLK_T_GET_ID, 0) }).unwrap();
        assert_eq!(done.status, Status::Ok);
        let got = done.data();
        let mut want = vec![0xa5; len];
        let id = *b"a-serial\0\0\0\0\0\0\0\0\0\0\0\0";
        let n = len.min(20);
        want[..n].copy_from_slice(&id[..n]);
        assert_eq!(got, want);
    }
    let (out, inn) = (pieces(q, &[77]), pieces(q, &[600]));
    let request = Request { out, inn, ..Request::bare(vb::VIRTIO_BLK_T_FLUSH, 99) };
    let done = q.run(request).unwrap();
    assert_eq!((done.status, done.used_len), (Status::Ok, 601));
    let (out, inn) = (pieces(q, &[512]), pieces(q, &[100]));
    out[0].fill(0x42);
    inn[0].fill(0xa5);
    let done = q.run(Request { out, inn, ..Request::bare(vb::VIRTIO_BLK_T_OUT, 3) }).unwrap();
    assert_eq!(done.status, Status::Ok);
    assert_eq!(done.data(), vec![0xa5; 100], "a write does not write to memory");
    let mut back = [0; 512];
    q.read(3, &mut back).unwrap();
    assert_eq!(back, [0x42; 512]);
}

#[test]
fn rings_of_every_size_with_and_without_everything() {
    let file = FileDisk::new(4 * MIB, ENGINES[2], config());
    let mut random = Random(5);
    for size in [2, 4, 8, 16, 64, 256, 1024] {
        for way in 0..8 {
            let (indirect, event_idx, modern) = (way & 1 != 0, way & 2 != 0, way & 4 != 0);
            if size == 2 && !indirect {
                // A write needs three descriptors.
                continue;
            }
            let mut want_features = vub_client::KNOWN_FEATURES;
            if !modern {
                want_features &= !(1 << 32);
            }
            let options = Options {
                queue_size: size,
                indirect,
                event_idx,
                want_features,
                base: u16::try_from(random.below(65536)).unwrap(),
                ..small()
            };
            let mut client = file.disk.connect(options);
            assert_eq!(client.has_feature(32), modern);
            let q = client.queue(0);
            // Round the ring more than once.
            for i in 0..u64::from(size).min(64) * 3 {
                let data = random.bytes(512);
                q.write(i, &data).unwrap();
                let mut back = [0; 512];
                q.read(i, &mut back).unwrap();
                assert_eq!(back[..], data[..]);
            }
            if indirect || size >= 16 {
                q.flush().unwrap();
                q.discard(0, 8).unwrap();
                q.write_zeroes(8, 8, true).unwrap();
            }
        }
    }
}

#[test]
fn chains_longer_than_seg_max() {
    for engine in ENGINES {
        let file = FileDisk::new(8 * MIB, engine, config());
        for indirect in [false, true] {
            let options = Options { queue_size: 1024, indirect, mem_size: 32 << 20, ..small() };
            let mut client = file.disk.connect(options);
            let seg_max = client.config().seg_max() as usize;
            let q = client.queue(0);
            for segments in [seg_max + 1, 300, 1000, 1022] {
                assert!(segments > seg_max);
                let data = Random(segments as u64).bytes(512 * segments);
                for (align, segment) in [(4096, 512), (1, 512)] {
                    q.layout = Layout { align, skew: 0, segment };
                    q.write(16, &data).unwrap();
                    let mut back = vec![0; data.len()];
                    q.read(16, &mut back).unwrap();
                    assert!(back == data, "{engine:?} {segments} segments");
                }
            }
        }
    }
}

#[test]
fn indirect_tables_longer_than_the_ring() {
    let disk = Disk::null(MIB, config());
    let mut client = disk.connect(Options { queue_size: 4, ..small() });
    let q = client.queue(0);
    q.layout = Layout { align: 16, skew: 0, segment: 512 };
    let mut back = vec![1; 512 * 500];
    q.read(0, &mut back).unwrap();
    assert!(back.iter().all(|b| *b == 0));
}

#[test]
fn buffers_across_memory_regions() {
    let file = FileDisk::new(4 * MIB, ENGINES[2], config());
    for mem_regions in [2, 8] {
        let options = Options { mem_regions, mem_size: 4 << 20, ..small() };
        let mut client = file.disk.connect(options);
        let q = client.queue(0);
        let mem = q.mem().clone();
        let bufs: Vec<Buf> =
            (0..mem_regions).map(|r| mem.alloc_in(r, 1024, 512).unwrap()).collect();
        let data = Random(6).bytes(1024 * mem_regions);
        spread(&bufs, &data);
        assert_eq!(q.run(Request::write(0, bufs)).unwrap().status, Status::Ok);
        let mut back = vec![0; data.len()];
        q.read(0, &mut back).unwrap();
        assert!(back == data);
    }
}

#[test]
fn serials() {
    for (serial, id) in [
        ("", *b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("01234567890123456789", *b"01234567890123456789"),
        ("vhost_user_blk", *b"vhost_user_blk\0\0\0\0\0\0"),
    ] {
        let config = vhost_user_blk::export::ExportConfig { serial: serial.into(), ..config() };
        let disk = Disk::null(MIB, config);
        assert_eq!(disk.connect(small()).queue(0).get_id().unwrap(), id);
    }
}
