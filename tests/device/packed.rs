//! Packed rings over the socket: of any size, from any position on, stopped and started, of honest guests and of others.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use virtio_bindings::virtio_blk::VIRTIO_BLK_T_GET_ID;
use vub_client::packed::{F_AVAIL, F_USED, WRAP};
use vub_client::proto::req;
use vub_client::ring::{DESC_LEN, F_INDIRECT, F_NEXT, F_WRITE, Seg};
use vub_client::{Buf, Client, MemStyle, Options, Queue, Status};

use crate::common::probe::{Opener, Probe};
use crate::common::{Disk, ENGINES, Engine, FileDisk, MIB, config, eventually, small};
use crate::hostile::{NOWHERE, scratch};
use crate::model::Model;

const SECTORS: u64 = 512;
/// Descriptors of the longest direct chain.
const LONGEST: u16 = 6;

fn options(queue_size: u16) -> Options {
    // A table may be sent again after a reset.
    Options { packed: true, queue_size, mem_style: MemStyle::Table, ..small() }
}

/// One way to run: all queues against the model, with a stop and a start of each in between.
fn round(engine: Engine, queues: u16, options: &Options, ops: usize) {
    let (size, indirect) = (options.queue_size, options.indirect);
    eprintln!("{engine:?}, {queues} queues of {size}, {options:?}");
    let file = FileDisk::new(SECTORS * 512, engine, config());
    let mut client = file.disk.connect(Options { queues, mem_size: 64 << 20, ..options.clone() });
    assert!(client.has_feature(34), "not offered");
    let model = Model::new(SECTORS);
    let depth = usize::from(if indirect { size } else { size / LONGEST }).min(100);
    for stop in 0..3 {
        thread::scope(|s| {
            for q in client.queues_mut() {
                let (model, seed) = (&model, stop * 1000 + u64::from(q.index()));
                s.spawn(move || model.drive(q, seed, ops, depth));
            }
        });
        for i in 0..queues.into() {
            let base = client.stop_queue(i).unwrap();
            let ring = client.queue(i).packed();
            let (avail, used) = (u32::from(ring.next_avail()), u32::from(ring.last_used()));
            assert_eq!(base, used << 16 | avail);
            client.start_queue(i).unwrap();
        }
    }
    model.check_all(client.queue(0));
}

#[test]
fn sizes() {
    for (size, indirect) in
        [(1, true), (2, true), (3, true), (6, false), (7, false), (48, false), (100, true)]
    {
        let ops = if size < 10 { 150 } else { 500 };
        round(ENGINES[2], 1, &Options { indirect, ..options(size) }, ops);
    }
}

#[test]
fn engines_and_ways_to_notify() {
    for (engine, way) in ENGINES.into_iter().zip(0..) {
        let (event_idx, indirect, polling) = (way & 1 == 0, way & 2 == 0, way == 3);
        let base = [0, 0x8000, 76, 0x8000 + 42][way];
        let options = Options { event_idx, indirect, polling, base, ..options(77) };
        round(engine, 3, &options, 400);
    }
}

/// Requests that overtake one another: their used descriptors take other entries than they came in.
#[test]
fn out_of_order() {
    let (disk, probe) = Probe::disk(config());
    let _open = Opener(Arc::clone(&probe));
    let mut client = disk.connect(Options { indirect: false, ..options(13) });
    let q = client.queue(0);
    for round in 0..40 {
        probe.hold();
        let held = q.read_request(1, 512).unwrap();
        let held = q.submit(held).unwrap();
        probe.wait_held(1);
        // Not a request of the disk's: it is done at once.
        for _ in 0..3 {
            q.get_id().unwrap();
        }
        assert_eq!(q.in_flight(), 1, "round {round}");
        probe.release();
        let done = q.wait().unwrap();
        assert_eq!((done.tag, done.status, done.used_len), (held, Status::Ok, 513));
    }
}

#[test]
fn what_the_session_says() {
    let disk = Disk::null(MIB, config());
    let mut client = disk.connect(Options { start: false, ..options(100) });
    let conn = &client.conn;
    // Before the features are known, a ring may have any size.
    conn.set_vring(req::SET_VRING_NUM, 0, 77).unwrap();
    for size in [0, 1025, 32_768, 65_536 + 64] {
        conn.set_vring(req::SET_VRING_NUM, 0, size).unwrap_err();
    }
    // Of a split ring not, and none starts.
    conn.set_u64(req::SET_FEATURES, client.features() & !(1 << 34)).unwrap();
    conn.set_vring(req::SET_VRING_NUM, 0, 100).unwrap_err();
    conn.set_vring(req::SET_VRING_BASE, 0, 0x8000_8000).unwrap_err();
    client.share_memory().unwrap();
    assert_eq!(client.conn.get_vring_base(0).unwrap(), 0);
    conn_start_refused(&client);
    // A packed ring that nobody gave a base begins at the beginning.
    let conn = &client.conn;
    conn.set(req::RESET_DEVICE, &[], &[]).unwrap();
    conn.set_u64(req::SET_FEATURES, client.features()).unwrap();
    assert_eq!(conn.get_vring_base(0).unwrap(), 0x8000_8000);
    for base in [0x0001_0001u32, 0x8063_8063, 0x0063_0063, 0x8000_8000] {
        conn.set_vring(req::SET_VRING_BASE, 0, base).unwrap();
        assert_eq!(conn.get_vring_base(0).unwrap(), base);
    }
    client.start().unwrap();
    client.queue(0).write(0, &[1; 4096]).unwrap();
    // Positions that the ring has not.
    client.stop_queue(0).unwrap();
    for base in [0x8064_8064u32, 0x8000_8064, 0x8001_8000] {
        start_at(&client, base).unwrap_err();
    }
    start_at(&client, 0x8003_8003).unwrap();
}

/// A ring of 77 entries that was not split is refused when it is to start.
fn conn_start_refused(client: &Client) {
    let at = client.mem().regions()[0].0.user_addr;
    let body = vub_client::proto::vring_addr(0, 0, at, at + 4096, at + 8192, 0);
    client.conn.set(req::SET_VRING_ADDR, &body, &[]).unwrap();
    client.conn.set_vring(req::SET_VRING_ENABLE, 0, 1).unwrap();
    client.conn.set_vring_fd(req::SET_VRING_KICK, 0, None).unwrap_err();
}

fn start_at(client: &Client, base: u32) -> vub_client::Result<()> {
    client.conn.set_vring(req::SET_VRING_BASE, 0, base).unwrap();
    let done = client.conn.set_vring_fd(req::SET_VRING_KICK, 0, None);
    client.conn.get_vring_base(0).unwrap();
    done
}

/// A guest that goes from split rings to packed ones and back, as a boot loader and a kernel do.
#[test]
fn other_rings_after_a_reset() {
    let file = FileDisk::new(MIB, ENGINES[2], config());
    for way in 0..6u8 {
        let packed = way % 2 == 0;
        let mut client = file.disk.connect(Options { packed, ..options(64) });
        assert_eq!(client.has_feature(34), packed);
        for _ in 0..2 {
            let q = client.queue(0);
            for sector in 0..100 {
                q.write(sector, &[way; 512]).unwrap();
            }
            let mut data = [0xff; 100 * 512];
            q.read(0, &mut data).unwrap();
            assert_eq!(data, [way; 100 * 512]);
            client.reset_device().unwrap();
            client.start().unwrap();
        }
    }
}

/// Interrupts come when they are asked for, and not else.
#[test]
fn interrupts() {
    let disk = Disk::null(MIB, config());
    for event_idx in [false, true] {
        let mut client = disk.connect(Options { event_idx, ..options(9) });
        let q = client.queue(0);
        for _ in 0..30 {
            q.packed().disarm();
            let calls = q.calls().unwrap();
            let request = vub_client::blk::Request::get_id(q.mem()).unwrap();
            q.submit(request).unwrap();
            eventually("it is done", || q.packed().has_used());
            // Whatever is sent for a completion has been sent when the next request is done.
            q.poll().unwrap().unwrap();
            q.polling = true;
            q.get_id().unwrap();
            q.polling = false;
            assert_eq!(q.calls().unwrap(), calls, "not asked for");
            // Asked for before the request is sent, it must come.
            assert!(!q.packed().arm());
            let request = vub_client::blk::Request::get_id(q.mem()).unwrap();
            q.submit(request).unwrap();
            q.wait_call().unwrap();
            q.poll().unwrap().unwrap();
        }
    }
}

type Lie = fn(&mut Queue, &Buf);

/// Makes a chain available that the driver knows nothing of: address, length, flags, id.
fn offer(q: &mut Queue, descs: &[(u64, u32, u16, u16)]) {
    let ring = q.packed();
    let mut at = ring.next_avail();
    for (addr, len, flags, id) in descs {
        let mark = if at & WRAP != 0 { F_AVAIL } else { F_USED };
        ring.set_desc(at & !WRAP, Seg::out(*addr, *len), *id, mark | flags);
        at += 1;
        if at & !WRAP == ring.size() {
            at = (at ^ WRAP) & WRAP;
        }
    }
    q.notify().unwrap();
}

const LIES: &[(&str, Lie)] = &[
    ("an id that is none", |q, s| offer(q, &[(s.gpa(), 16, 0, SIZE)])),
    ("the largest id", |q, s| offer(q, &[(s.gpa(), 16, 0, 0xffff)])),
    ("a chain without an end", |q, s| {
        offer(q, &vec![(s.gpa(), 16, F_NEXT, 0); SIZE.into()]);
    }),
    ("an indirect table in a chain", |q, s| {
        offer(q, &[(s.gpa(), 16, F_NEXT, 0), (s.gpa() + 128, 16, F_INDIRECT, 0)]);
    }),
    ("an indirect table of no length", |q, s| offer(q, &[(s.gpa(), 0, F_INDIRECT, 0)])),
    ("an indirect table of an odd length", |q, s| offer(q, &[(s.gpa(), 17, F_INDIRECT, 0)])),
    ("an indirect table outside of memory", |q, _| offer(q, &[(NOWHERE, 16, F_INDIRECT, 0)])),
    ("the longest indirect table", |q, s| {
        offer(q, &[(s.gpa(), u32::MAX - 15, F_INDIRECT, 0)]);
    }),
    ("an indirect table in an indirect table", |q, s| {
        // The flags are an entry's last two bytes.
        s.u16_at(128 + DESC_LEN - 2).store(F_INDIRECT, Ordering::Relaxed);
        offer(q, &[(s.gpa() + 128, 16, F_INDIRECT, 0)]);
    }),
    ("no status byte", |q, s| offer(q, &[(s.gpa(), 16, 0, 0)])),
    ("a status byte outside of memory", |q, s| {
        offer(q, &[(s.gpa(), 16, F_NEXT, 0), (NOWHERE, 1, F_WRITE, 0)]);
    }),
];
const SIZE: u16 = 21;

fn revive(client: &mut Client) {
    client.stop_queue(0).unwrap();
    // As a guest that was reset: from the beginning.
    client.queue(0).reset(WRAP);
    client.conn.set_vring(req::SET_VRING_BASE, 0, 0x8000_8000).unwrap();
    client.set_base(0, vub_client::Base::At(0x8000_8000));
    client.start_queue(0).unwrap();
    for _ in 0..2 * SIZE {
        client.queue(0).read(0, &mut [1; 512]).unwrap();
    }
}

#[test]
fn a_lie_breaks_its_queue_only() {
    let disk = Disk::null(MIB, config());
    let mut client = disk.connect(Options { queues: 2, ..options(SIZE) });
    for (lie, tell) in LIES {
        eprintln!("{lie}");
        let q = client.queue(0);
        q.read(0, &mut [1; 512]).unwrap();
        let scratch = scratch(q);
        tell(q, &scratch);
        q.wait_err().unwrap_or_else(|e| panic!("{lie}: {e}"));
        q.notify().unwrap();
        client.queue(1).read(0, &mut [1; 4096]).unwrap();
        assert!(!client.queue(0).packed().has_used(), "{lie}: it was answered");
        revive(&mut client);
    }
}

/// An id that is in flight comes again: what is in flight completes once, nothing else does.
#[test]
fn an_id_that_is_in_use() {
    let (disk, probe) = Probe::disk(config());
    let _open = Opener(Arc::clone(&probe));
    let mut client = disk.connect(Options { queues: 2, ..options(SIZE) });
    probe.hold();
    let q = client.queue(0);
    let read = q.read_request(0, 512).unwrap();
    q.submit(read).unwrap();
    probe.wait_held(1);
    let ids: Vec<u16> = q.packed().ids_in_flight();
    let s = scratch(q);
    offer(q, &[(s.gpa(), 16, F_NEXT, 0), (s.gpa() + 64, 1, F_WRITE, ids[0])]);
    q.wait_err().unwrap();
    probe.release();
    assert_eq!(q.wait().unwrap().status, Status::Ok);
    assert!(!q.packed().has_used());
    assert_eq!(s.u8_at(64).load(Ordering::Acquire), 0xff);
    client.queue(1).flush().unwrap();
    revive(&mut client);
}

/// Two chains that are done on the spot, and one behind them that goes on over their entries, or has the id of one, before the
/// guest has been shown that they are done: more than the ring holds, and more than can be tracked.
#[test]
fn what_is_done_is_the_devices_until_it_is_shown() {
    const SIZE: u16 = 8;
    let disk = Disk::null(MIB, config());
    for (inflight, last) in
        [(true, (F_NEXT, 2)), (true, (0, 0)), (false, (F_NEXT, 2)), (false, (0, 0))]
    {
        let options = Options { inflight, indirect: false, queues: 2, ..options(SIZE) };
        let mut client = disk.connect(options);
        // All of it is there when the device looks.
        client.stop_queue(0).unwrap();
        let q = client.queue(0);
        let buf = q.mem().alloc(64, 64).unwrap();
        buf.write(0, &VIRTIO_BLK_T_GET_ID.to_le_bytes());
        let (header, data) = (buf.gpa(), buf.gpa() + 16);
        let get_id = |id| {
            [(header, 16, F_NEXT, 0), (data, 20, F_NEXT | F_WRITE, 0), (data + 20, 1, F_WRITE, id)]
        };
        let third = [(header, 16, F_NEXT, 0), (data, 21, F_WRITE | last.0, last.1)];
        offer(q, &[&get_id(0)[..], &get_id(1), &third].concat());
        client.start_queue(0).unwrap();
        client.queue(0).wait_err().unwrap();
        client.queue(1).read(0, &mut [1; 512]).unwrap();
        client.stop_queue(0).unwrap();
    }
}
