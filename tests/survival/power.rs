//! The host loses power under a guest that makes a file system, unpacks files and calls fsync all the time. `blklogwrites`
//! records the run below the image format; the image is built anew at many moments without any part of what was not made
//! stable. It must be valid but for leaks, the guest's file system must be whole once its journal is replayed, and
//! everything that the guest knew to be stable must be there.

use std::io::BufRead;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::common::{Random, program::Program};
use crate::log::{Flushes, Log};
use crate::{Guest, alone, directory, succeed, tool, variable};

/// Bytes of the guest's disk.
const SIZE: usize = 80 << 20;

/// What the guest knew to be stable, and the moment when we knew.
struct Stable {
    what: String,
    round: u64,
    knew: usize,
}

/// What is recorded: the image `disk` of a format, a raw disk of `base` beneath it.
struct Kind {
    format: &'static str,
    options: &'static [&'static str],
}

const RAW: Kind = Kind { format: "raw", options: &[] };
const QCOW2: Kind = Kind { format: "qcow2", options: &["-o", "cluster_size=64k"] };
const OVERLAY: Kind =
    Kind { format: "qcow2", options: &["-o", "cluster_size=64k", "-b", "base", "-F", "raw"] };

/// The run of a guest on such an image: the image before it, the log, and what the guest knew.
fn record(dir: &Path, kind: &Kind) -> (Vec<u8>, Log, Vec<Stable>) {
    let base: Vec<u8> = (0..SIZE / 8).flat_map(|n| (n | 1 << 40).to_le_bytes()).collect();
    std::fs::write(dir.join("base"), base).unwrap();
    let size = SIZE.to_string();
    let create = [&["create", "-q", "-f", kind.format], kind.options, &["disk", &size]].concat();
    succeed(dir, "qemu-img", &create);
    let start = std::fs::read(dir.join("disk")).unwrap();
    let log = dir.join("log");
    std::fs::write(&log, "").unwrap();
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/src/block");
    succeed(dir, "cp", &["-r", sources, "tree"]);
    succeed(dir, "tar", &["-c", "-f", "tree.tar", "-C", "tree", "."]);
    let node: Value = json!({
        "driver": kind.format, "node-name": "disk", "discard": "unmap", "file": {
            "driver": "blklogwrites", "log-completions": true, "discard": "unmap",
            "log": {"driver": "file", "filename": log},
            "file": {"driver": "file", "filename": dir.join("disk"), "discard": "unmap"},
        },
    });
    let program = Program::start(&[node.to_string()], &[("disk", ",writable=on,num-queues=2")]);
    let rounds = format!("ROUNDS={}", variable("VUB_ROUNDS", 20));
    let tree = dir.join("tree.tar");
    let (guest, output) = Guest::start(
        &program.path("disk"),
        "fsync-load.sh",
        &["--vcpus", "2", "--env", &rounds, "--file", tree.to_str().unwrap()],
    );
    let (mut stable, mut text) = (Vec::new(), String::new());
    for line in output.lines() {
        let line = line.unwrap();
        let knew = usize::try_from(std::fs::metadata(&log).unwrap().len()).unwrap();
        if let Some((what, round)) =
            line.strip_prefix("STABLE ").and_then(|rest| rest.split_once(' '))
        {
            stable.push(Stable { what: what.into(), round: round.parse().unwrap(), knew });
        }
        text += &format!("{line}\n");
    }
    assert!(guest.succeeded(), "the guest failed:\n{text}");
    assert_eq!(program.terminate().code(), Some(0));
    let log = Log::read(std::fs::read(log).unwrap());
    (start, log, stable)
}

/// Writes an image, with holes where it is zero.
fn write(path: &Path, bytes: &[u8]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (n, chunk) in bytes.chunks(1 << 16).enumerate().filter(|(_, c)| c.iter().any(|b| *b != 0)) {
        file.write_all_at(chunk, (n as u64) << 16).unwrap();
    }
}

/// What is wrong with the image `cut` in `dir` after a power loss at this moment, if anything is.
fn wrong(dir: &Path, kind: &Kind, stable: &[Stable], cut: usize) -> Option<String> {
    let mut disk = "cut";
    if kind.format == "qcow2" {
        // 3: only leaks.
        let (code, text) = tool(dir, "qemu-img", &["check", "-q", "-f", "qcow2", "cut"]);
        if ![Some(0), Some(3)].contains(&code) {
            return Some(format!("the image is damaged: {text}"));
        }
        let convert = ["convert", "-f", "qcow2", "-O", "raw", "cut", "raw"];
        let (code, text) = tool(dir, "qemu-img", &convert);
        if code != Some(0) {
            return Some(format!("the image cannot be read: {text}"));
        }
        disk = "raw";
    }
    let known: Vec<_> = stable.iter().filter(|s| s.knew <= cut).collect();
    if known.is_empty() {
        return None;
    }
    // 1: something was corrected, as the journal's replay is.
    let (code, text) = tool(dir, "e2fsck", &["-y", "-E", "journal_only", disk]);
    if ![Some(0), Some(1)].contains(&code) {
        return Some(format!("the journal cannot be replayed: {text}"));
    }
    let (code, text) = tool(dir, "e2fsck", &["-fn", disk]);
    if code != Some(0) {
        return Some(format!("the file system is damaged: {text}"));
    }
    contents(dir, disk, &known)
}

/// What is missing of what the guest knew, if anything is.
fn contents(dir: &Path, disk: &str, known: &[&Stable]) -> Option<String> {
    let out = dir.join("out");
    std::fs::create_dir(&out).unwrap();
    let (_, said) = tool(dir, "debugfs", &["-R", "rdump / out", disk]);
    let read = |name: String| std::fs::read_to_string(out.join(name)).unwrap_or_default();
    let mut fault = None;
    if known.iter().any(|s| s.what == "tree") {
        let (code, text) = tool(dir, "diff", &["-r", "tree", "out/tree"]);
        fault = fault.or((code != Some(0)).then(|| format!("the tree differs: {text}")));
    }
    let last = known.iter().filter(|s| s.what == "round").map(|s| s.round).max().unwrap_or(0);
    for i in 1..=last {
        let want: String = (i..=i + i * 97 % 5000).map(|n| format!("{n}\n")).collect();
        let right = read(format!("files/{i}")) == want;
        fault = fault.or((!right).then(|| format!("file {i} of {last} is lost")));
    }
    let journal: String = (1..=last).map(|n| format!("{n}\n")).collect();
    let right = read("journal".into()).starts_with(&journal);
    fault = fault.or((!right).then(|| format!("the journal of {last} rounds is lost")));
    let counter = read("counter".into());
    let right = last == 0 || counter.parse::<u64>().is_ok_and(|n| n >= last);
    fault = fault.or((!right).then(|| format!("the counter is {counter:?}, not {last}")));
    std::fs::remove_dir_all(&out).unwrap();
    fault.map(|f| format!("{f} ({said})"))
}

/// Records a run and cuts the power at random moments; then once more on a disk that ignores flushes, which must be seen.
fn survives(name: &str, kind: &Kind) {
    let _alone = alone();
    let dir = directory();
    let (start, log, stable) = record(dir.path(), kind);
    let cuts = variable("VUB_CUTS", 10);
    let mut random = Random(variable("VUB_SEED", 1));
    let mut faults = |flushes: Flushes, cuts: u64| -> Vec<String> {
        let one = |_| {
            // Not before there is a file system: the first moments are few.
            let first = if flushes == Flushes::Count { 0 } else { stable[1].knew as u64 };
            let cut = first + random.below(log.end() as u64 - first);
            let cut = usize::try_from(cut).unwrap();
            write(&dir.path().join("cut"), &log.cut(&start, cut, flushes, &mut random));
            let fault = wrong(dir.path(), kind, &stable, cut)?;
            Some(format!("{name}: power lost at {cut} of {}: {fault}", log.end()))
        };
        (0..cuts).filter_map(one).collect()
    };
    let found = faults(Flushes::Count, cuts);
    assert!(found.is_empty(), "{} faults:\n{}", found.len(), found.join("\n"));
    let lied = faults(Flushes::AreIgnored, 3);
    assert!(!lied.is_empty(), "{name}: a disk that ignores flushes is not found out");
    let rounds = stable.iter().filter(|s| s.what == "round").count();
    println!(
        "{name}: {cuts} power cuts in {} MiB of log with {} flushes and {rounds} rounds: no fault; ignoring flushes: {} of 3",
        log.end() >> 20,
        log.flushes(),
        lied.len()
    );
    assert!(log.flushes() > rounds, "the guest's fsyncs reach the disk");
}

#[test]
fn a_guest_on_a_raw_image_survives_power_cuts() {
    survives("raw", &RAW);
}

#[test]
fn a_guest_on_a_qcow2_image_survives_power_cuts() {
    survives("qcow2", &QCOW2);
}

#[test]
fn a_guest_on_an_overlay_survives_power_cuts() {
    survives("overlay", &OVERLAY);
}
