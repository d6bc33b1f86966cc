//! The host loses power under the whole device: a guest of four queues writes, zeroes and flushes over the socket; the image is
//! built anew at many moments without any part of what was not made stable. It must be valid but for leaks, and
//! everything that the guest was told is stable must be there.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use serde_json::json;
use vhost_user_blk::block::Graph;
use vub_client::{Options, Queue, Status};

use crate::common::{Disk, Random, add, config, small};
use crate::recorder::{DRIVERS, Recorder};

/// Queues, each with sectors of its own.
const QUEUES: u64 = 4;
/// Sectors of a queue.
const SECTORS: u64 = 2048;
/// Requests of each queue.
const REQUESTS: u64 = 120;
/// Moments at which the power fails.
const CUTS: u64 = 40;

/// What a queue's guest did: sectors, version, when it began and when it knew that it was done; no sectors: a flush.
struct Step {
    from: u64,
    count: u64,
    version: u64,
    began: usize,
    knew: usize,
}

fn tool(dir: &Path, args: &[&str]) -> (Option<i32>, String) {
    let out = Command::new("qemu-img").args(args).current_dir(dir).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8_lossy(&text).into_owned())
}

/// The load of one queue.
fn load(mut q: Queue, seed: u64, recorder: &Recorder) -> (Queue, Vec<Step>) {
    let mut random = Random(seed);
    let mut steps = Vec::new();
    for version in 2..2 + REQUESTS {
        let count = 1 + random.below(24);
        let from = seed * SECTORS + random.below(SECTORS - count);
        let began = recorder.now();
        let (count, version) = match random.below(8) {
            0 => {
                q.flush().unwrap();
                (0, 0)
            }
            1 => {
                q.write_zeroes(from, u32::try_from(count).unwrap(), true).unwrap();
                (count, 0)
            }
            _ => {
                let bytes = version.to_le_bytes().repeat(usize::try_from(count * 64).unwrap());
                let write = q.write_request(from, &bytes).unwrap();
                assert_eq!(q.run(write).unwrap().status, Status::Ok);
                (count, version)
            }
        };
        steps.push(Step { from, count, version, began, knew: recorder.now() });
    }
    (q, steps)
}

/// What each sector of a queue may hold after a cut, and whether it does on `disk`. The first that does not.
fn wrong(steps: &[Step], seed: u64, cut: usize, disk: &[u8]) -> Option<String> {
    let flushed = steps.iter().rposition(|s| s.count == 0 && s.knew <= cut);
    let index = |sector: u64| usize::try_from(sector - seed * SECTORS).unwrap();
    let mut may = vec![vec![1]; usize::try_from(SECTORS).unwrap()];
    for (n, s) in steps.iter().enumerate().filter(|(_, s)| s.began <= cut) {
        for sector in s.from..s.from + s.count {
            let may = &mut may[index(sector)];
            if flushed.is_some_and(|f| n < f) {
                may.clear();
            }
            may.push(s.version);
        }
    }
    let mine = usize::try_from(seed * SECTORS * 512).unwrap();
    for (n, (sector, may)) in disk[mine..].chunks(512).zip(&may).enumerate() {
        let word = u64::from_le_bytes(sector[..8].try_into().unwrap());
        let mixed = sector[8..] != sector[..504];
        if mixed || !may.contains(&word) {
            return Some(format!(
                "sector {n} of {seed} holds {word} (mixed: {mixed}), not {may:?}"
            ));
        }
    }
    None
}

/// Runs the load on an image made with `options` and cuts the power. What is wrong with the images, one line each.
fn run(options: &str, no_flush: bool) -> Vec<String> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let at = |name: &str| dir.path().join(name);
    let len = usize::try_from(QUEUES * SECTORS * 512).unwrap();
    std::fs::write(at("base"), 1u64.to_le_bytes().repeat(len / 8)).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-o", options, "-b", "base", "-F", "raw", "image"];
    assert_eq!(tool(dir.path(), &create), (Some(0), String::new()));
    let start = std::fs::read(at("image")).unwrap();
    let key = format!("{options}{no_flush}");
    let recorder = Recorder::new(&key);
    let graph = Graph::with_drivers(DRIVERS);
    add(
        &graph,
        json!({
            "driver": "qcow2", "node-name": "root", "discard": "unmap",
            "file": {
                "driver": "recorder", "key": key, "discard": "unmap",
                "cache": {"direct": false, "no-flush": no_flush},
                "file": {"driver": "file", "filename": at("image"), "discard": "unmap"},
            },
        }),
    );
    let disk = Disk::serve(Arc::clone(&graph), "root", config());
    let queues = u16::try_from(QUEUES).unwrap();
    let mut client = disk.connect(Options { queues, ..small() });
    let loads: Vec<_> = std::thread::scope(|scope| {
        let start = |(seed, q)| {
            let recorder = Arc::clone(&recorder);
            scope.spawn(move || load(q, seed, &recorder))
        };
        let running: Vec<_> = (0..).zip(client.take_queues()).map(start).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let end = recorder.now();
    assert!(no_flush || recorder.flushes() > 20, "only {} flushes", recorder.flushes());
    let (queues, steps): (Vec<_>, Vec<_>) = loads.into_iter().unzip();
    client.put_queues(queues);
    let (mut random, mut faults) = (Random(3), Vec::new());
    for _ in 0..CUTS {
        let cut = usize::try_from(random.below(end as u64)).unwrap();
        std::fs::write(at("cut"), recorder.cut(&start, cut, &mut random)).unwrap();
        // 3: only leaks.
        let (code, text) = tool(dir.path(), &["check", "-q", "-f", "qcow2", "cut"]);
        if ![Some(0), Some(3)].contains(&code) {
            faults.push(format!("{options}: cut at {cut} of {end}: {text}"));
            continue;
        }
        let (code, text) = tool(dir.path(), &["convert", "-O", "raw", "-f", "qcow2", "cut", "raw"]);
        assert_eq!(code, Some(0), "{text}");
        let raw = std::fs::read(at("raw")).unwrap();
        for (seed, steps) in (0..).zip(&steps) {
            let wrong = wrong(steps, seed, cut, &raw);
            faults.extend(wrong.map(|what| format!("{options}: cut at {cut} of {end}: {what}")));
        }
    }
    faults
}

#[test]
fn power_cuts_lose_nothing_that_was_flushed() {
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=64k",
        "cluster_size=64k,extended_l2=on",
    ] {
        let faults = run(options, false);
        assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    }
}

/// The same without flushes reaching the disk (`cache.no-flush=on`): the test above would see it.
#[test]
fn flushes_that_are_not_passed_on_are_found_out() {
    let faults = run("cluster_size=4k", true);
    assert!(faults.iter().any(|f| f.contains("sector")), "no lost data in {} faults", faults.len());
    assert!(faults.iter().any(|f| !f.contains("holds")), "no damaged image");
}
