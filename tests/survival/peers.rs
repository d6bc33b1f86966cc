//! What the default settings of this program and of qemu-storage-daemon are worth to a guest, side by side: after a power
//! loss, and after `kill -9`. Each test prints the table of the README.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use vub_client::blk::Request;
use vub_client::proto::pf;
use vub_client::{Base, Client, Error, Options, Queue, Status};

use crate::common::program::Program;
use crate::common::{LIMIT, Random};
use crate::kills::Server;
use crate::log::{Flushes, Log};
use crate::{alone, directory, program, succeed, tool, variable};

const QSD: &str = "qemu-storage-daemon";
/// Bytes of a block of these tests, and blocks of the disk.
const BLOCK: usize = 4096;
const BLOCKS: usize = 4096;

/// `VIRTIO_BLK_F_FLUSH`, `VIRTIO_BLK_F_CONFIG_WCE`.
const F_FLUSH: u32 = 9;
const F_CONFIG_WCE: u32 = 11;

/// `program` must answer within a second, if it is to answer at all; ours has longer, for it must.
fn options(program: &str) -> Options {
    let timeout = if program == QSD { Duration::from_secs(1) } else { LIMIT };
    Options { inflight: true, timeout, ..Options::default() }
}

/// The content of a block: its number, from 1.
fn content(block: usize) -> Vec<u8> {
    (block as u64 + 1).to_le_bytes().repeat(BLOCK / 8)
}

fn sector(block: usize) -> u64 {
    (block * BLOCK / 512) as u64
}

/// How many blocks of the guest's fsync are missing after any of some power losses right after it, and whether the disk
/// presents itself as write back.
fn fsync_then_power_loss(program: &str, export: &str) -> (usize, bool) {
    const WRITTEN: usize = 64;
    let dir = directory();
    let (disk, log) = (dir.path().join("disk"), dir.path().join("log"));
    std::fs::write(&disk, vec![0; BLOCKS * BLOCK]).unwrap();
    std::fs::write(&log, "").unwrap();
    let node: Value = json!({
        "driver": "blklogwrites", "node-name": "disk",
        "log": {"driver": "file", "filename": log},
        "file": {"driver": "file", "filename": disk},
    });
    let server = Program::start_other(
        program.as_ref(),
        &[node.to_string()],
        &[("disk", &format!(",writable=on,num-queues=1{export}"))],
    );
    let mut client = server.connect("disk", options(program));
    let wce = client.has_feature(F_CONFIG_WCE).then(|| client.config().wce());
    let flush = client.has_feature(F_FLUSH);
    // As Linux: what `wce` says, else whether there are flushes.
    let write_back = wce.map_or(flush, |wce| wce == 1);
    println!(
        "{program}{export}: F_FLUSH {flush}, wce {wce:?}: the guest sees write-back: {write_back}"
    );
    let q = client.queue(0);
    for block in 0..WRITTEN {
        q.write(sector(block), &content(block)).unwrap();
    }
    if write_back {
        q.flush().unwrap();
    }
    let fsynced = usize::try_from(std::fs::metadata(&log).unwrap().len()).unwrap();
    // Somebody else's, so that the log goes on.
    q.write(sector(BLOCKS - 1), &content(0)).unwrap();
    drop(client);
    assert_eq!(server.terminate().code(), Some(0));
    let log = Log::read(std::fs::read(log).unwrap());
    let start = vec![0; BLOCKS * BLOCK];
    let mut lost = BTreeSet::new();
    for seed in 0..20 {
        let left = log.cut(&start, fsynced, Flushes::Count, &mut Random(seed));
        let blocks = left.chunks(BLOCK).take(WRITTEN).enumerate();
        lost.extend(blocks.filter(|(n, bytes)| *bytes != content(*n)).map(|(n, _)| n));
    }
    let lost = lost.len();
    println!("  after write, fsync and a power loss, {lost} of {WRITTEN} blocks may be lost");
    (lost, write_back)
}

#[test]
fn what_was_fsynced_survives_a_power_loss_here() {
    assert_eq!(fsync_then_power_loss(&program(), ""), (0, true));
    // Write through is kept as well where it is asked for: each write is stable by itself.
    assert_eq!(fsync_then_power_loss(&program(), ",writethrough=on"), (0, false));
    let (lost, write_back) = fsync_then_power_loss(QSD, "");
    assert!(lost > 0 && !write_back, "the README says otherwise of {QSD}");
}

/// The log of one sequence of requests, up to the last of them.
fn logged(program: &str) -> Vec<u8> {
    let dir = directory();
    let (disk, log) = (dir.path().join("disk"), dir.path().join("log"));
    std::fs::write(&disk, vec![0; BLOCKS * BLOCK]).unwrap();
    std::fs::write(&log, "").unwrap();
    let node: Value = json!({
        "driver": "blklogwrites", "node-name": "disk", "discard": "unmap",
        "log": {"driver": "file", "filename": log},
        "file": {"driver": "file", "filename": disk, "discard": "unmap"},
    });
    let server = Program::start_other(
        program.as_ref(),
        &[node.to_string()],
        &[("disk", ",writable=on,num-queues=1")],
    );
    let mut client = server.connect("disk", options(program));
    let q = client.queue(0);
    for block in [0, 7, 4095] {
        q.write(sector(block), &content(block)).unwrap();
        q.write(sector(block) + 1, &[9; 512]).unwrap();
    }
    q.flush().unwrap();
    q.discard(64, 128).unwrap();
    q.write_zeroes(256, 24, false).unwrap();
    q.flush().unwrap();
    let bytes = std::fs::read(&log).unwrap();
    drop(client);
    assert_eq!(server.terminate().code(), Some(0));
    bytes
}

#[test]
fn the_log_is_qemus_byte_for_byte() {
    let [ours, theirs] = [program().as_str(), QSD].map(logged);
    let differs = ours.iter().zip(&theirs).position(|(a, b)| a != b);
    assert_eq!((ours.len(), differs), (theirs.len(), None));
    assert_eq!(Log::read(ours).flushes(), 2);
}

/// What a guest misses after kills.
#[derive(Debug, Default)]
struct Missed {
    /// The back end offers to track what is in flight.
    tracked: bool,
    acknowledged: usize,
    /// Acknowledged before the kill; now something else is there.
    lost: usize,
    /// In flight when it was killed, and never answered.
    hanging: usize,
    /// Kills after which requests were answered that had been answered before.
    twice: usize,
    /// The image is damaged, not only leaking.
    damaged: usize,
}

/// Writes new blocks in random order, many at a time, until about `want` are acknowledged; the order, and which are.
fn write_until(q: &mut Queue, want: usize, random: &mut Random) -> Vec<(usize, bool)> {
    const DEPTH: usize = 32;
    let mut blocks: Vec<usize> = (0..BLOCKS).collect();
    for n in (1..BLOCKS).rev() {
        blocks.swap(n, usize::try_from(random.below(n as u64 + 1)).unwrap());
    }
    let (mut sent, mut acknowledged): (Vec<(u64, usize, bool)>, _) = (Vec::new(), 0);
    for block in blocks {
        let request: Request = q.write_request(sector(block), &content(block)).unwrap();
        sent.push((q.submit(request).unwrap(), block, false));
        if q.in_flight() == DEPTH {
            if acknowledged >= want {
                break;
            }
            let done = q.wait().unwrap();
            assert_eq!(done.status, Status::Ok);
            sent.iter_mut().filter(|s| s.0 == done.tag).for_each(|s| s.2 = true);
            acknowledged += 1;
        }
    }
    sent.into_iter().map(|(_, block, done)| (block, done)).collect()
}

/// One kill of `program` on a fresh image of this format.
fn one_kill(dir: &Path, program: &str, format: &str, random: &mut Random, missed: &mut Missed) {
    let size = (BLOCKS * BLOCK).to_string();
    succeed(dir, "qemu-img", &["create", "-q", "-f", format, "disk", &size]);
    let mut server = Server::start(program, dir, format);
    let mut client = Client::connect(server.socket(), options(program)).unwrap();
    missed.tracked = client.has_protocol(pf::INFLIGHT_SHMFD);
    let want = usize::try_from(50 + random.below(300)).unwrap();
    let written = write_until(client.queue(0), want, random);
    server.replace();
    client.reconnect(server.socket(), Base::Used).unwrap();
    let q = client.queue(0);
    match q.wait_all() {
        Ok(_) | Err(Error::Timeout { .. }) => missed.hanging += q.in_flight(),
        // A guest's driver takes the disk for broken.
        Err(Error::UnexpectedUsed(_)) => missed.twice += 1,
        Err(e) => panic!("{program}: {e}"),
    }
    drop(client);
    let mut client = Client::connect_retry(server.socket(), options(program)).unwrap();
    let q = client.queue(0);
    for (block, _) in written.iter().filter(|w| w.1) {
        let mut found = vec![0; BLOCK];
        q.read(sector(*block), &mut found).unwrap();
        missed.acknowledged += 1;
        missed.lost += usize::from(found != content(*block));
    }
    drop(client);
    server.terminate();
    if format == "qcow2" {
        // 3: only leaks.
        let (code, _) = tool(dir, "qemu-img", &["check", "-q", "-f", "qcow2", "disk"]);
        missed.damaged += usize::from(![Some(0), Some(3)].contains(&code));
    }
}

fn kills(program: &str, format: &str) -> Missed {
    let dir = directory();
    let (mut random, mut missed) = (Random(variable("VUB_SEED", 1)), Missed::default());
    for _ in 0..variable("VUB_KILLS", 3) {
        one_kill(dir.path(), program, format, &mut random, &mut missed);
    }
    println!("{program}, {format}: {missed:?}");
    missed
}

#[test]
fn what_was_acknowledged_survives_a_kill_here() {
    let _alone = alone();
    for format in ["raw", "qcow2"] {
        let ours = kills(&program(), format);
        assert_eq!(
            (ours.lost, ours.hanging, ours.twice, ours.damaged),
            (0, 0, 0, 0),
            "{format}: {ours:?}"
        );
    }
    let theirs = ["raw", "qcow2"].map(|format| kills(QSD, format));
    assert!(theirs[1].lost > 0 && !theirs[1].tracked, "the README says otherwise of {QSD}");
}
