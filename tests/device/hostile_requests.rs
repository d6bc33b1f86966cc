//! Requests that cannot be served but can be answered: they get an error, and the queue goes on.

use std::sync::atomic::Ordering;

use vub_client::ring::Seg;
use vub_client::{Options, Queue};

use crate::common::{ENGINES, FileDisk, MIB, config, small};
use crate::hostile::{NOWHERE, scratch};

/// A chain's shape: the segments, for a scratch buffer at this address.
type Shape = fn(u64) -> Vec<Seg>;

const IOERR: u8 = 1;

fn head(at: u64) -> Seg {
    Seg::out(at, 16)
}

fn state(at: u64) -> Seg {
    Seg::inn(at + 64, 1)
}

/// All of them with a header of a read of sector 0 at the scratch buffer's beginning.
const SHAPES: &[(&str, Shape)] = &[
    ("a short header", |at| vec![Seg::out(at, 15), state(at)]),
    ("a header of one byte", |at| vec![Seg::out(at, 1), state(at)]),
    ("no header", |at| vec![state(at)]),
    ("no header, but data", |at| vec![Seg::inn(at + 4096, 512), state(at)]),
    ("a header outside of memory", |at| vec![Seg::out(NOWHERE, 16), state(at)]),
    ("data outside of memory", |at| vec![head(at), Seg::inn(NOWHERE, 512), state(at)]),
    ("data at the end of the address space", |at| {
        vec![head(at), Seg::inn(u64::MAX - 511, 512), state(at)]
    }),
    ("data that wraps", |at| vec![head(at), Seg::inn(u64::MAX - 10, 512), state(at)]),
    ("data that leaves memory", |at| {
        // 8 MiB of memory from 1 GiB or wherever on: 4 GiB are not there.
        vec![head(at), Seg::inn(at + 4096, u32::MAX), state(at)]
    }),
    ("a header behind data", |at| vec![Seg::inn(at + 4096, 512), head(at), state(at)]),
    ("half a sector", |at| vec![head(at), Seg::inn(at + 4096, 256), state(at)]),
    ("a sector and a half", |at| vec![head(at), Seg::inn(at + 4096, 768), state(at)]),
    ("more than the disk", |at| {
        let piece = Seg::inn(at + 4096, 8192);
        [vec![head(at)], vec![piece; 120], vec![piece; 120], vec![state(at)]].concat()
    }),
];

fn run(q: &mut Queue, name: &str, shape: Shape) {
    let s = scratch(q);
    s.write(4096, &[0xa5; 8192]);
    q.push_chain(&shape(s.gpa())).unwrap();
    q.kick().unwrap();
    q.wait().unwrap_or_else(|e| panic!("{name}: {e}"));
    assert_eq!(s.u8_at(64).load(Ordering::Acquire), IOERR, "{name}");
    let mut data = [0; 8192];
    s.read(4096, &mut data);
    assert!(data.iter().all(|b| *b == 0xa5), "{name}: data of a refused request");
    assert!(q.err_fd().read().is_err(), "{name}: the queue is not broken");
}

#[test]
fn malformed_requests_are_answered() {
    for engine in ENGINES {
        let file = FileDisk::new(MIB, engine, config());
        let mut client = file.disk.connect(Options { queue_size: 256, ..small() });
        let q = client.queue(0);
        for (name, shape) in SHAPES {
            run(q, name, *shape);
            q.write(0, &[4; 512]).unwrap();
        }
        // The disk is as it was.
        let mut back = [0; 1024];
        q.read(0, &mut back).unwrap();
        assert_eq!((back[..512].to_vec(), back[512..].to_vec()), (vec![4; 512], vec![0; 512]));
    }
}

/// Millions of bytes described by few: the device must not be made to do their work.
#[test]
fn requests_of_terabytes() {
    let file = FileDisk::new(MIB, ENGINES[2], config());
    let mut client = file.disk.connect(Options { mem_size: 1 << 30, ..small() });
    let q = client.queue(0);
    let s = scratch(q);
    let (info, _) = q.mem().regions().swap_remove(0);
    let all = u32::try_from(info.len).unwrap();
    for (kind, written) in [(0u32, true), (1, false), (8, true), (11, false), (13, false)] {
        s.write(0, &kind.to_le_bytes());
        s.u8_at(64).store(0xff, Ordering::Release);
        let data = Seg { addr: info.gpa, len: all, device_writes: written };
        let chain = [vec![head(s.gpa())], vec![data; 100], vec![state(s.gpa())]].concat();
        if kind == 8 {
            // GET_ID writes twenty bytes of all that, over the first bytes of memory: a ring. Not this guest's wish.
            continue;
        }
        q.push_chain(&chain).unwrap();
        q.kick().unwrap();
        q.wait().unwrap();
        assert_ne!(s.u8_at(64).load(Ordering::Acquire), 0, "type {kind}");
    }
}
