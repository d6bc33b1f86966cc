//! A guest that lies about its ring: that queue breaks and says so; the others, other exports, and the queue itself
//! after a new start go on.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vub_client::proto::{header, req};
use vub_client::ring::{DESC_LEN, Desc, F_INDIRECT, F_NEXT, F_WRITE, RingMem, write_desc};
use vub_client::{Base, Buf, Client, Conn, Options, Queue};

use crate::common::probe::{Opener, Probe};
use crate::common::{Disk, MIB, Random, config, eventually, rerun, small, status_line};

const SIZE: u16 = 64;
/// An address where no memory is.
pub const NOWHERE: u64 = 0x7fff_0000_0000;

fn options() -> Options {
    Options { queues: 2, queue_size: SIZE, ..small() }
}

/// Offers `head` as the next chain.
fn offer(q: &mut Queue, head: u16) {
    q.ring().offer(head);
    q.ring().publish();
    q.notify().unwrap();
}

/// Header at 0 (a read of sector 0), status at 64, an indirect table at 128, data at 4096.
pub fn scratch(q: &Queue) -> Buf {
    let buf = q.mem().alloc(16384, 4096).unwrap();
    buf.fill(0);
    buf.u8_at(64).store(0xff, Ordering::Release);
    buf
}

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

type Lie = fn(&mut Queue, &Buf);

/// A chain of one descriptor at 0, and what follows.
fn one(q: &mut Queue, d: Desc) {
    q.ring().mem().set_desc(0, d);
    offer(q, 0);
}

fn indirect(q: &mut Queue, at: &Buf, table: &[Desc]) {
    for (i, d) in (0..).zip(table) {
        let view = q.mem().view(at.gpa() + 128, 16 * DESC_LEN).unwrap();
        write_desc(&view, i, *d);
    }
    let len = u32::try_from(table.len() * DESC_LEN).unwrap();
    one(q, desc(at.gpa() + 128, len, F_INDIRECT, 0));
}

const LIES: &[(&str, Lie)] = &[
    ("a head outside of the table", |q, _| offer(q, SIZE)),
    ("the largest head", |q, _| offer(q, u16::MAX)),
    ("a chain that loops to itself", |q, s| one(q, desc(s.gpa(), 16, F_NEXT, 0))),
    ("a chain of two that loops", |q, s| {
        q.ring().mem().set_desc(1, desc(s.gpa(), 16, F_NEXT, 0));
        one(q, desc(s.gpa(), 16, F_NEXT, 1));
    }),
    ("a loop of empty descriptors", |q, s| one(q, desc(s.gpa(), 0, F_NEXT | F_WRITE, 0))),
    ("a link outside of the table", |q, s| one(q, desc(s.gpa(), 16, F_NEXT, SIZE))),
    ("avail.idx far ahead", |q, _| {
        let idx = q.ring().next_avail().wrapping_add(SIZE + 1);
        q.ring().mem().set_avail_idx(idx);
        q.notify().unwrap();
    }),
    ("avail.idx goes back", |q, _| {
        let idx = q.ring().next_avail().wrapping_sub(1);
        q.ring().mem().set_avail_idx(idx);
        q.notify().unwrap();
    }),
    ("nothing to write to", |q, s| one(q, desc(s.gpa(), 16, 0, 0))),
    ("no bytes at all", |q, s| one(q, desc(s.gpa(), 0, F_WRITE, 0))),
    ("a status byte outside of memory", |q, s| {
        q.ring().mem().set_desc(1, desc(NOWHERE, 1, F_WRITE, 0));
        one(q, desc(s.gpa(), 16, F_NEXT, 1));
    }),
    ("a status byte outside of memory, behind data", |q, s| {
        q.ring().mem().set_desc(1, desc(s.gpa() + 4096, 512, F_NEXT | F_WRITE, 2));
        q.ring().mem().set_desc(2, desc(NOWHERE, 1, F_WRITE, 0));
        one(q, desc(s.gpa(), 16, F_NEXT, 1));
    }),
    ("data and status over the end of memory", |q, s| {
        let (info, _) = q.mem().regions().swap_remove(0);
        q.ring().mem().set_desc(1, desc(info.gpa + info.len - 512, 513, F_WRITE, 0));
        one(q, desc(s.gpa(), 16, F_NEXT, 1));
    }),
    ("a status byte at the end of the address space", |q, s| {
        q.ring().mem().set_desc(1, desc(u64::MAX, 1, F_WRITE, 0));
        one(q, desc(s.gpa(), 16, F_NEXT, 1));
    }),
    ("an indirect descriptor with a next one", |q, s| {
        one(q, desc(s.gpa() + 128, 32, F_INDIRECT | F_NEXT, 1));
    }),
    ("an indirect table of no length", |q, s| one(q, desc(s.gpa() + 128, 0, F_INDIRECT, 0))),
    ("an indirect table of an odd length", |q, s| {
        one(q, desc(s.gpa() + 128, 17, F_INDIRECT, 0));
    }),
    ("an indirect table outside of memory", |q, _| one(q, desc(NOWHERE, 32, F_INDIRECT, 0))),
    ("an indirect table over the end of memory", |q, _| {
        let (info, _) = q.mem().regions().swap_remove(0);
        one(q, desc(info.gpa + info.len - 16, 32, F_INDIRECT, 0));
    }),
    ("the longest indirect table", |q, s| {
        one(q, desc(s.gpa(), u32::MAX - 15, F_INDIRECT, 0));
    }),
    ("an indirect table in an indirect table", |q, s| {
        indirect(q, s, &[desc(s.gpa() + 128, 32, F_INDIRECT, 0)]);
    }),
    ("a loop in an indirect table", |q, s| {
        indirect(q, s, &[desc(s.gpa(), 16, F_NEXT, 1), desc(s.gpa(), 16, F_NEXT, 0)]);
    }),
    ("a link out of an indirect table", |q, s| {
        indirect(q, s, &[desc(s.gpa(), 16, F_NEXT, 2), desc(s.gpa() + 64, 1, F_WRITE, 0)]);
    }),
];

/// Starts a queue anew, as a guest does that was reset, and uses it.
fn revive(client: &mut Client, base: u16) {
    client.stop_queue(0).unwrap();
    client.set_base(0, Base::At(base.into()));
    client.queue(0).reset(base);
    client.start_queue(0).unwrap();
    let q = client.queue(0);
    for _ in 0..3 * SIZE / 4 {
        q.read(0, &mut [1; 512]).unwrap();
    }
}

#[test]
fn a_lie_breaks_its_queue_only() {
    let disk = Disk::null(MIB, config());
    let other_disk =
        Disk::null(MIB, vhost_user_blk::export::ExportConfig { id: "other".into(), ..config() });
    let mut other_guest = other_disk.connect(small());
    let mut client = disk.connect(options());
    for (i, (lie, tell)) in LIES.iter().enumerate() {
        eprintln!("{lie}");
        let q = client.queue(0);
        q.read(0, &mut [1; 512]).unwrap();
        let scratch = scratch(q);
        let used = q.ring().mem().used_idx();
        tell(q, &scratch);
        q.wait_err().unwrap_or_else(|e| panic!("{lie}: {e}"));
        // Nothing more is taken, however often it is kicked, and nothing is answered.
        q.notify().unwrap();
        client.queue(1).read(0, &mut [1; 4096]).unwrap();
        other_guest.queue(0).read(0, &mut [1; 4096]).unwrap();
        assert_eq!(client.queue(0).ring().mem().used_idx(), used, "{lie}: it was answered");
        assert_eq!(scratch.u8_at(64).load(Ordering::Acquire), 0xff, "{lie}");
        revive(&mut client, u16::try_from(i * 7919 % 65536).unwrap());
    }
}

#[test]
fn an_indirect_table_that_was_not_negotiated() {
    let disk = Disk::null(MIB, config());
    let mut client = disk.connect(Options { indirect: false, ..options() });
    let q = client.queue(0);
    let s = scratch(q);
    indirect(q, &s, &[desc(s.gpa(), 16, F_NEXT, 1), desc(s.gpa() + 64, 1, F_WRITE, 0)]);
    q.wait_err().unwrap();
    client.queue(1).flush().unwrap();
    revive(&mut client, 0);
}

/// A head that is in flight comes again: what is in flight completes once, nothing else does.
#[test]
fn a_head_that_is_in_use() {
    let (disk, probe) = Probe::disk(config());
    let _open = Opener(std::sync::Arc::clone(&probe));
    let mut client = disk.connect(options());
    probe.hold();
    let q = client.queue(0);
    let read = q.read_request(0, 512).unwrap();
    q.submit(read).unwrap();
    probe.wait_held(1);
    let head = q.ring().heads_in_flight()[0];
    offer(q, head);
    q.wait_err().unwrap();
    probe.release();
    assert_eq!(q.wait().unwrap().status, vub_client::Status::Ok);
    client.queue(1).flush().unwrap();
    assert_eq!(client.queue(0).ring().mem().used_idx(), 1);
    revive(&mut client, 1000);
}

/// Breaking while many are in flight, and stopping the broken queue: the drain still holds.
#[test]
fn a_broken_queue_drains() {
    let (disk, probe) = Probe::disk(config());
    let _open = Opener(std::sync::Arc::clone(&probe));
    let mut client = disk.connect(options());
    probe.hold();
    let q = client.queue(0);
    for i in 0..8 {
        let read = q.read_request(i, 512).unwrap();
        q.push(read).unwrap();
    }
    q.kick().unwrap();
    probe.wait_held(8);
    offer(q, SIZE);
    q.wait_err().unwrap();
    let state = vub_client::proto::vring_state(0, 0);
    client.conn.send(vub_client::proto::req::GET_VRING_BASE, 0, &state, &[]).unwrap();
    client.conn.expect_silence(crate::common::SILENCE).unwrap();
    probe.release();
    client.conn.recv().unwrap();
    assert_eq!(client.queue(0).ring().mem().used_idx(), 8);
    revive(&mut client, 0);
}

/// Anything a guest can put into descriptors and rings, while it goes on changing it.
#[test]
fn noise() {
    let disk = Disk::null(MIB, config());
    let mut client = disk.connect(options());
    let stop = AtomicBool::new(false);
    let mut queues = client.take_queues();
    let (mut sane, mut mad) = (queues.pop().unwrap(), queues.pop().unwrap());
    let scratch = mad.mem().alloc(1 << 20, 4096).unwrap();
    let mut random = Random(9);
    thread::scope(|s| {
        let (stop, sane) = (&stop, &mut sane);
        s.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let mut data = [1; 2048];
                sane.read(0, &mut data).unwrap();
                let wrong = data.iter().enumerate().find(|(_, b)| **b != 0);
                assert_eq!(wrong, None, "another queue's bytes");
            }
        });
        let (mut broken, mut answered) = (0, 0);
        for round in 0..400u16 {
            mad.reset(round);
            client.set_base(0, Base::At(round.into()));
            honest(mad.ring().mem(), &scratch);
            client.start_queue(0).unwrap();
            for _ in 0..4 {
                for _ in 0..4 {
                    scribble(mad.ring().mem(), &scratch, &mut random);
                    let head = u16::try_from(random.below(u64::from(SIZE) + 1)).unwrap();
                    mad.ring().offer(if random.below(60) == 0 { head } else { head / 3 % 20 * 3 });
                }
                mad.ring().publish();
                mad.notify().unwrap();
            }
            client.stop_queue(0).unwrap();
            broken += u32::from(mad.err_fd().read().is_ok());
            answered += u32::from(mad.ring().mem().used_idx().wrapping_sub(round));
        }
        stop.store(true, Ordering::Relaxed);
        assert!(broken > 20 && answered > 200, "{broken} broken, {answered} answers: bad noise");
    });
    eventually("the sane one is idle", || sane.in_flight() == 0);
    client.put_queues(vec![mad, sane]);
    revive(&mut client, 7);
}

/// Every third descriptor begins a request that is right: header, data, status.
fn honest(ring: &RingMem, scratch: &Buf) {
    for head in (0..60).step_by(3) {
        let at = scratch.gpa() + u64::from(head) * 64;
        ring.set_desc(head, desc(at, 16, F_NEXT, head + 1));
        ring.set_desc(head + 1, desc(at + 8192, 512, F_NEXT | F_WRITE, head + 2));
        ring.set_desc(head + 2, desc(at + 16, 1, F_WRITE, 0));
    }
}

/// Random descriptors in the table and in the indirect tables of `scratch`; headers that may be right.
fn scribble(ring: &RingMem, scratch: &Buf, random: &mut Random) {
    let place = |random: &mut Random| match random.below(40) {
        0 => random.next(),
        1 => NOWHERE,
        2 => scratch.gpa() + (8 << 20) - random.below(1 << 20),
        3 => ring.used.gpa() + random.below(64),
        // Whole entries of 16 bytes: what is read as a descriptor was written as one.
        _ => scratch.gpa() + 16 * random.below(1 << 15),
    };
    let len = |random: &mut Random| match random.below(20) {
        0 => 0,
        1 => u32::MAX,
        2 => 1,
        3..10 => 16,
        _ => 16 * u32::try_from(random.below(200)).unwrap(),
    };
    for table in 0..2 {
        let i = u16::try_from(random.below(SIZE.into())).unwrap();
        let flags = [0, F_WRITE, F_NEXT, F_NEXT | F_WRITE, F_INDIRECT, F_INDIRECT | F_NEXT, 0xffff];
        let pick = [1, 1, 2, 2, 3, 3, 4, 2, 3, 2, 5, 6][usize::try_from(random.below(12)).unwrap()];
        let next = u16::try_from(random.below(u64::from(SIZE) + 1)).unwrap();
        let d = desc(place(random), len(random), flags[pick], next);
        if table == 0 {
            ring.set_desc(i, d);
        } else {
            let at = random.below(1 << 14) * 32;
            let at = usize::try_from(at).unwrap();
            scratch.write(at, &d.addr.to_le_bytes());
            scratch.write(at + 8, &(u64::from(d.len) | u64::from(d.flags) << 32).to_le_bytes());
        }
    }
    let at = usize::try_from(random.below(1 << 15) * 16).unwrap();
    let kind = [0u64, 1, 4, 8, 11, 13][usize::try_from(random.below(6)).unwrap()];
    scratch.write(at, &kind.to_le_bytes());
    scratch.write(at + 8, &random.below(2100).to_le_bytes());
}

/// Bytes of this process in memory.
fn resident() -> u64 {
    status_line(Path::new("/proc/self/status"), "VmRSS") << 10
}

/// Front ends that come, go in the middle of a message with a descriptor, or run a ring, ten thousand times.
#[test]
fn ten_thousand_front_ends_leave_nothing() {
    const NAME: &str = "hostile::ten_thousand_front_ends_leave_nothing";
    // What it counts is all of the process's.
    if std::env::var_os("VUB_ALONE").is_none() {
        rerun(&[NAME, "--exact"], &[("VUB_ALONE", "1")]);
        return;
    }
    let disk = Disk::null(MIB, config());
    // Workers start with the first queues, and stay.
    let run = || disk.connect(options()).queue(1).read(0, &mut [1; 4096]).unwrap();
    // When one is answered, those before it are gone.
    let settled = || {
        let conn = Conn::connect(disk.path()).unwrap();
        conn.get_u64(req::GET_QUEUE_NUM).unwrap();
        (resident(), std::fs::read_dir("/proc/self/fd").unwrap().count())
    };
    let come_and_go = |count: usize| {
        for i in 0..count {
            if i % 100 == 0 {
                run();
            } else {
                let conn = Conn::connect(disk.path()).unwrap();
                let message = header(req::SET_VRING_KICK, 1, 8);
                conn.send_bytes(&message[..1 + i % message.len()], &[0]).unwrap();
            }
        }
    };
    come_and_go(1000);
    let (memory, files) = settled();
    come_and_go(9000);
    let (more, now) = settled();
    assert_eq!(now, files, "descriptors");
    let more = more.saturating_sub(memory);
    assert!(more < 4 << 20, "{more} bytes more than before");
}
