//! qcow2: every write of metadata, and every read, fails a few times and then works. The guest sees old or new bytes where it
//! was told of an error, and its own everywhere else; the image is clean, leaks included.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use vhost_user_blk::export::ExportConfig;
use vub_client::{Client, Status};

use crate::common::{Disk, Random, config, small};
use crate::logged;

/// Sectors of the small disk, and of the one whose refcount table must grow.
const SMALL: u64 = 4096;
const BIG: u64 = 40_960;

/// What each sector may hold: a version, in every word of it. What the backing file holds is version 1.
struct Model(Vec<Vec<u64>>);

impl Model {
    fn check(&self, from: u64, bytes: &[u8], what: &str) {
        for (n, sector) in bytes.chunks(512).enumerate() {
            let at = usize::try_from(from).unwrap() + n;
            let got = u64::from_le_bytes(sector[..8].try_into().unwrap());
            assert!(sector.chunks(8).all(|w| w == &sector[..8]), "{what}: sector {at} is mixed");
            assert!(self.0[at].contains(&got), "{what}: sector {at}: {got}, not {:?}", self.0[at]);
        }
    }

    fn wrote(&mut self, from: u64, count: u64, version: u64, status: Status) {
        let from = usize::try_from(from).unwrap();
        for may in &mut self.0[from..from + usize::try_from(count).unwrap()] {
            match status {
                Status::Ok => *may = vec![version],
                Status::IoErr => may.push(version),
                other => panic!("{other:?}"),
            }
        }
    }
}

fn stamps(version: u64, sectors: u64) -> Vec<u8> {
    version.to_le_bytes().repeat(usize::try_from(sectors * 64).unwrap())
}

fn tool(dir: &Path, args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).current_dir(dir).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// Three faults with `errno` at `event`, each the second time that it comes after the one before.
fn rules(event: &str, errno: i32) -> Value {
    let steps = (1..7).map(|n| json!({"event": event, "state": n, "new_state": n + 1}));
    let faults =
        [2, 4, 6].map(|n| json!({"event": event, "state": n, "errno": errno, "once": true}));
    json!({"set-state": steps.collect::<Vec<_>>(), "inject-error": faults})
}

/// One request; whether it failed.
fn step(client: &mut Client, random: &mut Random, model: &mut Model, version: u64) -> bool {
    let q = client.queue(0);
    let count = 1 + random.below(12);
    let from = random.below(SMALL - count);
    match random.below(8) {
        0 => q.flush().is_err(),
        1 => {
            let read = q.read_request(from, usize::try_from(count * 512).unwrap()).unwrap();
            let done = q.run(read).unwrap();
            if done.status == Status::Ok {
                model.check(from, &done.data(), "while it fails");
            }
            done.status != Status::Ok
        }
        2 => {
            let failed = q.write_zeroes(from, u32::try_from(count).unwrap(), true).is_err();
            model.wrote(from, count, 0, if failed { Status::IoErr } else { Status::Ok });
            failed
        }
        _ => {
            let write = q.write_request(from, &stamps(version, count)).unwrap();
            let status = q.run(write).unwrap().status;
            model.wrote(from, count, version, status);
            status != Status::Ok
        }
    }
}

/// Runs a guest on an image whose file fails at `event`. How many requests failed.
fn fails(event: &str, errno: i32, sectors: u64) -> u32 {
    logged::start();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("base"), stamps(1, SMALL)).unwrap();
    let size = (sectors * 512).to_string();
    let create =
        ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", "base", "-F", "raw"];
    tool(dir.path(), &[&create[..], &["image", &size]].concat());
    let mut debug = json!({"driver": "blkdebug", "image": {
        "driver": "file", "filename": at("image"), "discard": "unmap",
    }, "discard": "unmap"});
    debug.as_object_mut().unwrap().extend(rules(event, errno).as_object().unwrap().clone());
    let options = json!({
        "driver": "qcow2", "node-name": "root", "discard": "unmap", "l2-cache-size": 2048,
        "refcount-cache-size": 2048, "file": debug,
    });
    let id = format!("meta-{event}-{errno}");
    let disk = Disk::of(options, ExportConfig { id, ..config() });
    let mut client = disk.connect(small());
    let (mut random, mut failed) = (Random(7), 0);
    let mut model = Model(vec![vec![1]; usize::try_from(SMALL).unwrap()]);
    model.0.resize(usize::try_from(sectors).unwrap(), vec![0]);
    for from in (SMALL..sectors).step_by(1024) {
        let q = client.queue(0);
        let write = q.write_request(from, &stamps(2, 1024)).unwrap();
        let status = q.run(write).unwrap().status;
        model.wrote(from, 1024, 2, status);
        failed += u32::from(status != Status::Ok) + u32::from(q.flush().is_err());
    }
    for version in 3..403 {
        failed += u32::from(step(&mut client, &mut random, &mut model, version));
    }
    // All faults are behind us now, or never come.
    for _ in 0..16 {
        failed += u32::from(client.queue(0).flush().is_err());
    }
    client.queue(0).flush().unwrap();
    for version in 1000..1100 {
        let bad = step(&mut client, &mut random, &mut model, version);
        assert!(!bad, "{event} {errno}: the fault is over");
    }
    client.queue(0).flush().unwrap();
    for from in (0..sectors).step_by(1024) {
        let mut back = vec![0; 1024 * 512];
        client.queue(0).read(from, &mut back).unwrap();
        model.check(from, &back, event);
    }
    drop(client);
    assert!(disk.export.close() && disk.graph.close_all(), "{event}");
    drop(disk);
    let text = tool(dir.path(), &["check", "image"]);
    assert!(text.starts_with("No errors were found on the image."), "{event} {errno}: {text}");
    tool(dir.path(), &["convert", "-O", "raw", "image", "raw"]);
    model.check(0, &std::fs::read(at("raw")).unwrap(), event);
    failed
}

/// Where the guest must see an error.
const SEEN: &[&str] = &[
    "l2_update",
    "l1_update",
    "l2_load",
    "l2_alloc_write",
    "refblock_update_part",
    "refblock_alloc_hookup",
    "refblock_load",
    "flush_to_disk",
    "flush_to_os",
    "write_aio",
    "read_aio",
    "pwritev",
    "pwritev_zero",
];

#[test]
fn every_metadata_write_fails_and_recovers() {
    for event in SEEN {
        for errno in [libc::EIO, libc::ENOSPC] {
            let failed = fails(event, errno, SMALL);
            eprintln!("{event} {errno}: {failed} requests failed");
            // The driver looks for room itself, and tries once more.
            assert!(failed > 0 || errno == libc::ENOSPC, "{event}: nothing failed");
        }
    }
}

/// The places where a fault may cost nobody anything, or come too early to be anybody's.
#[test]
fn faults_that_nobody_need_see() {
    for event in ["cluster_alloc", "cluster_free", "read_backing_aio"] {
        fails(event, libc::EIO, SMALL);
    }
}

#[test]
fn a_refcount_table_that_cannot_move_moves_later() {
    for event in ["refblock_alloc_write_table", "refblock_alloc_switch_table"] {
        for errno in [libc::EIO, libc::ENOSPC] {
            let failed = fails(event, errno, BIG);
            eprintln!("{event} {errno}: {failed} requests failed");
        }
    }
}
