//! What goes wrong below a driver: a full file system, a sync that fails, blocks that cannot be read, a file that shrinks.

#![allow(clippy::unwrap_used, reason = "tests")]

mod drivers;

use std::fs::File;
use std::process::Command;

use drivers::bed::{Disk, Layout, Loop, Setup, TinyTmpfs, directory};
use drivers::guest::{DATA, FEATURES, Guest};
use drivers::{assert_same, waits};
use serde_json::{Value, json};
use vhost_user_blk::block::{Graph, Op, WriteFlags, ZeroFlags};
use vhost_user_blk::error::Errno;
use vhost_user_blk::export::{Export, ExportConfig};
use vhost_user_blk::mem::Sg;
use vhost_user_blk::rt::{self, Buffer, WaitKind};
use vhost_user_blk::vhost_user::Device;

const MIB: u64 = 1 << 20;
const ENOSPC: Errno = Errno::ENOSPC;

fn submit(disk: &Disk, wait: WaitKind, op: Op<'_>) -> Result<(), Errno> {
    rt::block_on_with(wait, disk.node.submit(op))
}

fn write(
    disk: &Disk,
    wait: WaitKind,
    offset: u64,
    len: u64,
    flags: WriteFlags,
) -> Result<(), Errno> {
    let mut memory = Buffer::new(usize::try_from(len).unwrap(), 4096);
    memory.bytes_mut().fill(7);
    let iov = [memory.iovec()];
    submit(disk, wait, Op::Write { offset, from: Sg::new(&iov), flags })
}

fn read(disk: &Disk, wait: WaitKind, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
    let mut memory = Buffer::new(usize::try_from(len).unwrap(), 4096);
    memory.bytes_mut().fill(0xee);
    let iov = [memory.iovec()];
    submit(disk, wait, Op::Read { offset, to: Sg::new(&iov) })?;
    Ok(memory.bytes().to_vec())
}

fn everywhere(layout: Layout, test: impl Fn(Setup, WaitKind)) {
    for wait in waits() {
        Setup::engines(layout).for_each(|setup| test(setup, wait));
    }
}

#[test]
fn a_full_file_system() {
    everywhere(Layout::File, |setup, wait| {
        let tmpfs = TinyTmpfs::new("2m");
        let path = tmpfs.path().join("image");
        let filler = tmpfs.path().join("filler");
        File::create(&path).unwrap().set_len(4 * MIB).unwrap();
        std::fs::write(&filler, vec![1; 1 << 20]).unwrap();
        let none = WriteFlags::empty();
        // Where a tmpfs knows no Linux AIO, requests still are served.
        let disk = setup.open(&path);
        assert_eq!(write(&disk, wait, 0, MIB / 2, none), Ok(()), "{setup:?}");
        assert_eq!(write(&disk, wait, MIB, 2 * MIB, none), Err(ENOSPC), "{setup:?}");
        let zeroes = Op::WriteZeroes { offset: MIB, len: 2 * MIB, flags: ZeroFlags::empty() };
        assert_eq!(submit(&disk, wait, zeroes), Err(ENOSPC), "{setup:?}");
        // What was there is there, and the error does not stay.
        assert_eq!(submit(&disk, wait, Op::Flush), Ok(()), "{setup:?}");
        assert!(read(&disk, wait, 0, MIB / 2).unwrap().iter().all(|b| *b == 7), "{setup:?}");
        assert_eq!(submit(&disk, wait, Op::Discard { offset: MIB, len: 2 * MIB }), Ok(()));
        std::fs::remove_file(&filler).unwrap();
        assert_eq!(write(&disk, wait, MIB, MIB, none), Ok(()), "{setup:?}");
    });
}

/// A block device whose blocks cannot all be stored, until `enlarge`.
struct Thin {
    device: Loop,
    tmpfs: TinyTmpfs,
}

impl Thin {
    fn new() -> Thin {
        let tmpfs = TinyTmpfs::new("1m");
        let path = tmpfs.path().join("image");
        File::create(&path).unwrap().set_len(8 * MIB).unwrap();
        Thin { device: Loop::over(&path, 512), tmpfs }
    }

    fn enlarge(&self) {
        let mut mount = Command::new("mount");
        mount.args(["-o", "remount,size=32m"]).arg(self.tmpfs.path());
        assert!(mount.status().unwrap().success());
    }
}

/// The kernel marks pages that it could not write clean: a later sync that succeeds is a lie.
#[test]
fn a_failed_sync_is_never_forgotten() {
    everywhere(Layout::HostDevice(512), |setup, wait| {
        for flags in [WriteFlags::empty(), WriteFlags::FUA] {
            let thin = Thin::new();
            let disk = setup.open(&thin.device.0);
            let no_flush = Setup { no_flush: true, ..setup };
            let what = format!("{setup:?} {wait:?} {flags:?}");
            let wrote = write(&disk, wait, 0, 4 * MIB, flags);
            let first = submit(&disk, wait, Op::Flush);
            let stable = setup.direct || flags == WriteFlags::FUA;
            assert_eq!(wrote.is_err(), stable, "{what}: {wrote:?}");
            thin.enlarge();
            let later = submit(&disk, wait, Op::Flush);
            if setup.direct {
                // The guest has been told of its write; nothing else was lost.
                assert_eq!((first, later), (Ok(()), Ok(())), "{what}");
            } else {
                assert!(first.is_err(), "{what}");
                assert_eq!(later, first, "{what}");
            }
            drop(disk);
            // Whoever opens it anew starts anew; who ignores flushes never hears of it.
            assert_eq!(submit(&setup.open(&thin.device.0), wait, Op::Flush), Ok(()), "{what}");
            let thin = Thin::new();
            let disk = no_flush.open(&thin.device.0);
            let wrote = write(&disk, wait, 0, 4 * MIB, flags);
            assert_eq!(wrote.is_err(), setup.direct, "{what}: no-flush: {wrote:?}");
            assert_eq!(submit(&disk, wait, Op::Flush), Ok(()), "{what}: no-flush");
            thin.enlarge();
        }
    });
}

#[test]
fn blocks_that_cannot_be_read() {
    everywhere(Layout::HostDevice(512), |setup, wait| {
        let dir = directory();
        let path = dir.path().join("image");
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let device = Loop::over(&path, 512);
        let disk = setup.open(&device.0);
        File::options().write(true).open(&path).unwrap().set_len(2 * MIB).unwrap();
        let eio = Err(Errno::EIO);
        assert_eq!(read(&disk, wait, 3 * MIB, 4096), eio, "{setup:?} {wait:?}");
        assert_eq!(read(&disk, wait, 3 * MIB + 1, 9), eio, "{setup:?} {wait:?}");
        // The half of a direct write to such blocks cannot be filled up.
        if disk.node.driver().limits().request_align > 1 {
            let wrote = write(&disk, wait, 3 * MIB + 1, 9, WriteFlags::empty());
            assert_eq!(wrote, Err(Errno::EIO), "{setup:?} {wait:?}");
        }
        let good = read(&disk, wait, MIB, 4096).unwrap();
        assert!(good.iter().all(|b| *b == 7), "{setup:?} {wait:?}");
    });
}

/// A file that someone else cuts: what is gone is an error (QEMU reads zeroes), and comes back when something behind is written.
#[test]
fn a_file_cut_short() {
    everywhere(Layout::File, |setup, wait| {
        let dir = directory();
        let path = dir.path().join("image");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let disk = setup.open(&path);
        File::options().write(true).open(&path).unwrap().set_len(10_000).unwrap();
        let mut want = vec![7; 10_000];
        want.resize(1 << 20, 0);
        for (at, len) in [(0, MIB), (8192, 4096), (9999, 2), (10_000, 1), (MIB - 512, 512)] {
            let got = read(&disk, wait, at, len);
            assert_eq!(got, Err(Errno::EIO), "{setup:?} {wait:?} at {at}");
        }
        let got = read(&disk, wait, 0, 8192).unwrap();
        assert_same(&got, &want[..8192], &format!("{setup:?} {wait:?}"));
        assert_eq!(write(&disk, wait, 20_480, 4096, WriteFlags::empty()), Ok(()));
        want[20_480..24_576].fill(7);
        assert_same(&std::fs::read(&path).unwrap(), &want[..24_576], &format!("{setup:?}"));
        let got = read(&disk, wait, 0, 24_576).unwrap();
        assert_same(&got, &want[..24_576], &format!("{setup:?} {wait:?}"));
    });
}

fn export(options: Value) -> std::sync::Arc<Export> {
    let graph = Graph::new();
    let Value::Object(options) = options else { unreachable!() };
    let node = graph.add(options).unwrap();
    let config = ExportConfig {
        id: "e".into(),
        writable: true,
        writethrough: false,
        num_queues: 2,
        queue_size: 256,
        logical_block_size: 512,
        serial: String::new(),
        threads: 1,
        poll_max_ns: 0,
        on_error: Default::default(),
    };
    Export::new(&graph, &node, config).unwrap()
}

/// One read of [`DATA`] bytes; its status, and the first eight bytes.
fn guest_read(guest: &mut Guest, sector: u64) -> (u8, u64) {
    guest.set_tag(0, u64::MAX);
    guest.offer(0, false, sector);
    guest.flush();
    let mut answer = None;
    guest.answers(|guest, slot, status, len| {
        assert_eq!((slot, len), (0, DATA + 1));
        answer = Some((status, guest.tag(0)));
    });
    answer.expect("one answer")
}

/// A guest sees an error where there is one, also behind the end of a file that was cut, and goes on.
#[test]
fn what_a_guest_sees() {
    let sevens = u64::from_le_bytes([7; 8]);
    for aio in ["threads", "io_uring"] {
        let dir = directory();
        let path = dir.path().join("image");
        let cut = || File::options().write(true).open(&path).unwrap().set_len(2 * MIB).unwrap();
        let check = |options: Value| {
            let export = export(options);
            cut();
            let mut guest = Guest::new(0);
            export.set_features(FEATURES);
            export.start_queue(0, guest.setup()).unwrap();
            let far = 3 * MIB / 512;
            assert_eq!(guest_read(&mut guest, 0), (0, sevens), "{aio}");
            assert_eq!(guest_read(&mut guest, far).0, 1, "{aio}");
            assert_eq!(guest_read(&mut guest, 8), (0, sevens), "{aio}");
            assert_eq!(export.stop_queue(0), Some(3));
            export.close();
        };
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let file = json!({ "driver": "file", "node-name": "n", "filename": path, "aio": aio });
        check(file);
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let device = Loop::over(&path, 512);
        let name = &device.0;
        check(json!({ "driver": "host_device", "node-name": "n", "filename": name, "aio": aio }));
    }
}

/// A guest that lies about one ring loses that ring, after what it had asked for before, and nothing else.
#[test]
fn a_lie_breaks_one_queue() {
    let null = json!({ "driver": "null-co", "node-name": "n", "read-zeroes": true });
    let export = export(null);
    export.set_features(FEATURES);
    let (mut liar, mut honest) = (Guest::new(65_535), Guest::new(0));
    export.start_queue(0, liar.setup()).unwrap();
    export.start_queue(1, honest.setup()).unwrap();
    assert_eq!(guest_read(&mut liar, 0), (0, 0));
    liar.lie();
    liar.found_out();
    for sector in 0..100 {
        assert_eq!(guest_read(&mut honest, sector), (0, 0));
    }
    assert_eq!(export.stop_queue(0), Some(liar.avail().into()));
    // A reset, and it may start again.
    let mut reformed = Guest::new(3);
    export.start_queue(0, reformed.setup()).unwrap();
    assert_eq!(guest_read(&mut reformed, 0), (0, 0));
    assert_eq!((export.stop_queue(0), export.stop_queue(1)), (Some(4), Some(100)));
    export.close();
}
