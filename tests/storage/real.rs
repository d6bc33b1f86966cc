//! Faults of real files and devices.

use std::fs::File;

use serde_json::{Value, json};
use vhost_user_blk::export::{ExportConfig, OnError, OnErrors};
use vub_client::Status;

use crate::common::{Disk, ENGINES, Engine, Image, MIB, config, eventually, small};
use crate::drivers::bed::{Loop, TinyTmpfs};
use crate::injected::status;
use crate::logged;

fn exported(id: &str, options: Value, write: OnError) -> Disk {
    logged::start();
    let on_error = OnErrors { read: OnError::Report, write };
    Disk::of(options, ExportConfig { id: id.into(), on_error, ..config() })
}

/// A loop device over `image`, exported.
fn loop_exported(id: &str, image: &Image, engine: Engine, write: OnError) -> (Loop, Disk) {
    let device = Loop::over(&image.path(), 512);
    let options = json!({
        "driver": "host_device", "node-name": "root", "filename": device.0, "aio": engine.aio,
        "cache": {"direct": engine.direct},
    });
    let disk = exported(id, options, write);
    (device, disk)
}

fn resize(path: &std::path::Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

/// A write that the file system can take a part of: the guest waits, and nothing is lost when there is room.
#[test]
fn a_full_file_system_gets_room() {
    for aio in ["threads", "io_uring"] {
        let tmpfs = TinyTmpfs::new("4m");
        let (path, filler) = (tmpfs.path().join("image"), tmpfs.path().join("filler"));
        File::create(&path).unwrap().set_len(8 * MIB).unwrap();
        std::fs::write(&filler, vec![1; 3 << 20]).unwrap();
        let id = format!("full-{aio}");
        let options = json!({"driver": "file", "node-name": "root", "filename": path, "aio": aio});
        let disk = exported(&id, options, OnError::Enospc);
        let mut client = disk.connect(vub_client::Options { mem_size: 48 << 20, ..small() });
        let data: Vec<u8> = (0..2u32 << 20).map(|n| u8::try_from(n % 253).unwrap()).collect();
        let q = client.queue(0);
        let write = q.write_request(0, &data).unwrap();
        q.submit(write).unwrap();
        eventually("it waits", || !logged::of(&id).is_empty());
        assert!(q.poll().unwrap().is_none(), "there is no room");
        std::fs::remove_file(&filler).unwrap();
        assert_eq!(q.wait().unwrap().status, Status::Ok, "{aio}");
        let mut back = vec![0; data.len()];
        q.read(0, &mut back).unwrap();
        assert!(back == data, "{aio}");
        assert!(logged::of(&id)[0].contains("No space left on device: queue 0 waits"));
    }
}

/// Someone cuts a raw file under us, in the middle of a sector: what is gone is an error, not zeroes; what is written is there;
/// and all is well when the file has its length again.
#[test]
fn a_file_cut_short() {
    for engine in ENGINES {
        let image = Image::new(MIB);
        std::fs::write(image.path(), vec![7; 1 << 20]).unwrap();
        let Engine { aio, direct } = engine;
        let id = format!("cut-{aio}-{direct}");
        let disk = exported(&id, image.options(engine, "unmap"), OnError::Report);
        let mut client = disk.connect(small());
        let q = client.queue(0);
        resize(&image.path(), 6000);
        let mut back = vec![1; 4096];
        q.read(0, &mut back).unwrap();
        assert_eq!(back, [7; 4096], "{engine:?}: what is left");
        for sector in [8, 512, 1024] {
            let read = q.read_request(sector, 8192).unwrap();
            assert_eq!(status(q, read), Status::IoErr, "{engine:?}: sector {sector}");
        }
        let lines = logged::of(&id);
        assert_eq!(lines, ["node 'root': read of 8192 bytes at 4096: Input/output error"]);
        q.write(512, &[9; 4096]).unwrap();
        q.flush().unwrap();
        q.read(512, &mut back).unwrap();
        assert_eq!(back, [9; 4096], "{engine:?}");
        let read = q.read_request(520, 4096).unwrap();
        assert_eq!(status(q, read), Status::IoErr, "{engine:?}: behind it");
        resize(&image.path(), MIB);
        q.read(520, &mut back).unwrap();
        assert_eq!(back, [0; 4096], "{engine:?}: the fault has ended");
        assert_eq!(logged::of(&id), lines);
    }
}

/// A block device cut short: errors at once, also where `werror=enospc` waits for room.
#[test]
fn a_device_cut_short() {
    for engine in ENGINES {
        let image = Image::new(4 * MIB);
        let id = format!("shorter-{}-{}", engine.aio, engine.direct);
        let (device, disk) = loop_exported(&id, &image, engine, OnError::Enospc);
        let mut client = disk.connect(small());
        let q = client.queue(0);
        resize(&image.path(), 2 * MIB);
        device.resize();
        let read = q.read_request(4096 - 4, 4096).unwrap();
        assert_eq!(status(q, read), Status::IoErr, "{engine:?}");
        let write = q.write_request(6000, &[1; 4096]).unwrap();
        assert_eq!(status(q, write), Status::IoErr, "{engine:?}");
        assert!(logged::of(&id)[0].ends_with(": Input/output error"), "{engine:?}");
        resize(&image.path(), 4 * MIB);
        device.resize();
        q.write(6000, &[5; 4096]).unwrap();
        let mut back = [0; 4096];
        q.read(6000, &mut back).unwrap();
        assert_eq!(back, [5; 4096], "{engine:?}");
        drop(client);
        drop(disk);
    }
}

/// A device that vanishes (all of its blocks do) and comes back.
#[test]
fn a_vanished_device() {
    for engine in ENGINES {
        let image = Image::new(4 * MIB);
        let id = format!("vanished-{}-{}", engine.aio, engine.direct);
        let (_device, disk) = loop_exported(&id, &image, engine, OnError::Report);
        let mut client = disk.connect(small());
        let q = client.queue(0);
        q.write(0, &[3; 4096]).unwrap();
        q.flush().unwrap();
        resize(&image.path(), 0);
        let mut failed = 0;
        for sector in (1024..8192).step_by(512) {
            let read = q.read_request(sector, 4096).unwrap();
            failed += u32::from(status(q, read) == Status::IoErr);
        }
        assert_eq!(failed, 14, "{engine:?}");
        let lines = logged::of(&id);
        assert_eq!(lines, ["node 'root': read of 4096 bytes at 524288: Input/output error"]);
        resize(&image.path(), 4 * MIB);
        q.write(1024, &[5; 4096]).unwrap();
        q.flush().unwrap();
        let mut back = [0; 4096];
        q.read(1024, &mut back).unwrap();
        assert_eq!(back, [5; 4096], "{engine:?}");
        drop(client);
        drop(disk);
    }
}
