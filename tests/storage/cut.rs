//! Someone cuts the file of a qcow2 image under us and puts back what he took: tables that are not there are an error, never
//! zeroes, which would give clusters in use to somebody else.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use serde_json::json;
use vhost_user_blk::export::ExportConfig;
use vub_client::Status;

use crate::common::{Disk, ENGINES, Engine, config, small};
use crate::logged;

/// Sectors of the disk; the first half is written before the cut.
const SECTORS: u64 = 8192;
/// Sectors per request.
const STEP: usize = 64;

fn stamp(sector: u64) -> Vec<u8> {
    sector.to_le_bytes().repeat(STEP * 512 / 8)
}

fn tool(args: &[&str]) -> std::process::Output {
    Command::new("qemu-img").args(args).output().unwrap()
}

fn cut_and_restored(engine: Engine) {
    logged::start();
    let Engine { aio, direct } = engine;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("image");
    let name = path.to_str().unwrap();
    // Small tables: they lie everywhere in the file.
    let format = "cluster_size=512,refcount_bits=64";
    let size = (SECTORS * 512).to_string();
    assert!(tool(&["create", "-q", "-f", "qcow2", "-o", format, name, &size]).status.success());
    let cache = json!({"direct": direct, "no-flush": false});
    let file = json!({"driver": "file", "filename": name, "aio": aio, "cache": cache});
    let options = json!({
        "driver": "qcow2", "node-name": "root", "cache": cache, "file": file,
        "l2-cache-size": 2048, "refcount-cache-size": 2048,
    });
    let id = format!("qcow2-cut-{aio}-{direct}");
    let open = || Disk::of(options.clone(), ExportConfig { id: id.clone(), ..config() });
    let (old, new) = ((0..SECTORS / 2).step_by(STEP), (SECTORS / 2..SECTORS).step_by(STEP));
    {
        let disk = open();
        let mut client = disk.connect(small());
        for sector in old.clone() {
            client.queue(0).write(sector, &stamp(sector)).unwrap();
        }
        client.queue(0).flush().unwrap();
    }
    let disk = open();
    let mut client = disk.connect(small());
    let q = client.queue(0);
    let whole = std::fs::read(&path).unwrap();
    let cut = whole.len() / 2;
    let image = File::options().read(true).write(true).open(&path).unwrap();
    image.set_len(cut as u64).unwrap();
    let mut failed = [0; 2];
    let mut written = Vec::new();
    for (read, write) in old.clone().zip(new.clone()) {
        let request = q.read_request(read, STEP * 512).unwrap();
        let done = q.run(request).unwrap();
        match done.status {
            Status::Ok => assert!(done.data() == stamp(read), "{engine:?}: sector {read}"),
            _ => failed[0] += 1,
        }
        let request = q.write_request(write, &stamp(write)).unwrap();
        match q.run(request).unwrap().status {
            Status::Ok => written.push(write),
            _ => failed[1] += 1,
        }
    }
    assert!(failed[0] >= 16 && failed[1] > 0, "{engine:?}: {failed:?} failed");
    let lines = logged::of(&id);
    assert!(lines[0].starts_with("node 'root': ") && lines[0].ends_with("Input/output error"));
    assert!(lines.len() < 20, "{engine:?}: {lines:?}");
    // What lies behind the cut is put back, but for what was written there since.
    let now = std::fs::read(&path).unwrap();
    for at in (cut..whole.len()).step_by(512) {
        let old = &whole[at..whole.len().min(at + 512)];
        let there = now.get(at..at + old.len()).unwrap_or(&[]);
        if there.iter().all(|b| *b == 0) {
            image.write_all_at(old, at as u64).unwrap();
        } else {
            assert!(old.iter().all(|b| *b == 0), "{engine:?}: a cluster in use at {at} is taken");
        }
    }
    for sector in new {
        q.write(sector, &stamp(sector)).unwrap();
    }
    q.flush().unwrap();
    let mut back = vec![0; STEP * 512];
    for sector in (0..SECTORS).step_by(STEP) {
        q.read(sector, &mut back).unwrap();
        assert!(back == stamp(sector), "{engine:?}: sector {sector}");
    }
    drop(client);
    drop(disk);
    let check = tool(&["check", "-f", "qcow2", name]);
    // 3: leaks, and nothing else.
    assert!(matches!(check.status.code(), Some(0 | 3)), "{engine:?}: {check:?}");
}

#[test]
fn a_qcow2_image_is_cut_and_restored() {
    for engine in [ENGINES[0], ENGINES[3]] {
        cut_and_restored(engine);
    }
}
