//! The report, made by the program itself in a few seconds: all files are there, and are what they should be.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The program under test: beside vub-bench, or what `VUB_BACKEND` names.
fn program() -> PathBuf {
    let beside = Path::new(env!("CARGO_BIN_EXE_vub-bench")).with_file_name("vhost-user-blk");
    let path = std::env::var_os("VUB_BACKEND").map_or(beside, PathBuf::from);
    assert!(path.exists(), "{}: cargo build --workspace makes it", path.display());
    path
}

/// A quick report into `dir`/out, with test files in `dir`.
fn report(dir: &Path, words: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vub-bench"));
    command.arg("report").arg("--a").arg(program()).arg("--dir").arg(dir);
    command.arg("--out").arg(dir.join("out"));
    command.args(["--seconds", "0.2", "--repeat", "2", "--tries", "1", "--wait", "0"]);
    command.args(words).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn read(dir: &Path, name: &str) -> String {
    let path = dir.join("out").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// qemu-storage-daemon by a template, as a third party's back end would be.
const PEER: &str = "third:null=exec qemu-storage-daemon --blockdev \
    driver=null-co,node-name=n,size={size},read-zeroes=off --export \
    type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={socket},num-queues={queues},writable=on 2>&1";

#[test]
fn a_report_has_all_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let words =
        ["--cases", "null-d1-event,queues-null-2,nouring-page", "--exports", "3", "--peer", PEER];
    let output = report(dir.path(), &words);
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));

    let results: serde_json::Value =
        serde_json::from_str(&read(dir.path(), "results.json")).unwrap();
    let series = results["series"].as_array().unwrap();
    let has = |case: &str, who: &str| {
        let of = |s: &&serde_json::Value| s["case"] == case && s["backend"] == who;
        let runs = series.iter().find(of).map(|s| s["runs"].as_array().unwrap());
        runs.is_some_and(|r| r.len() == 2 && r.iter().all(|r| r["iops"].as_f64().unwrap() > 0.0))
    };
    for case in ["null-d1-event", "queues-null-2"] {
        assert!(["A", "B", "third"].iter().all(|who| has(case, who)), "{case}: {results}");
    }
    // The peer was not said to serve raw images, nor does it know how to do without io_uring.
    assert!(has("nouring-page-threads", "A") && !has("nouring-page-threads", "third"));
    assert_eq!(results["many"].as_array().unwrap().len(), 2);
    let goals = results["goals"].as_array().unwrap();
    let judged = |text: &str| {
        let of = |g: &&serde_json::Value| g["goal"].as_str().unwrap().contains(text);
        goals.iter().find(of).unwrap()["pass"].is_boolean()
    };
    assert!(
        judged("depth 1, event-driven")
            && judged("aio=threads, page")
            && judged("3 exports at depth 1")
    );
    assert!(!judged("disk O_DIRECT depth 32"));

    for name in ["queues-null-iops", "queues-null-cpu", "latency-null-d1-event", "cases"] {
        let svg = read(dir.path(), &format!("{name}.svg"));
        let tree = roxmltree::Document::parse(&svg).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(tree.root_element().tag_name().name(), "svg");
        let words: Vec<_> = tree.descendants().filter_map(|n| n.text()).collect();
        for part in ["Linux ", "qemu-storage-daemon", " UTC", "$ ", "--seconds"] {
            assert!(words.iter().any(|w| w.contains(part)), "{name}: no {part:?} in {words:?}");
        }
        let lines =
            tree.descendants().filter(|n| n.has_tag_name("polyline") || n.has_tag_name("rect"));
        assert!(lines.count() > 3, "{name}: nothing is drawn");
    }
    let page = read(dir.path(), "index.html");
    let options = roxmltree::ParsingOptions { allow_dtd: true, ..Default::default() };
    let tree = roxmltree::Document::parse_with_options(&page, options).unwrap();
    let count = |name: &str| tree.descendants().filter(|n| n.tag_name().name() == name).count();
    assert!(count("svg") >= 4 && count("table") >= 4, "{} plots", count("svg"));
    assert_eq!(count("script") + count("link") + count("img"), 0, "the page is by itself");
    assert!(page.contains("prefers-color-scheme:dark"));

    for (name, columns, rows) in [("summary.csv", 30, 8), ("runs.csv", 26, 16)] {
        let csv = read(dir.path(), name);
        let mut lines = csv.lines();
        let heading: Vec<_> = lines.next().unwrap().split(',').collect();
        assert_eq!(heading.len(), columns, "{name}: {heading:?}");
        for column in
            ["case", "backend", "iops", "cpu_ns_per_io", "syscalls_per_io", "foreign_cpus"]
        {
            assert!(heading.contains(&column), "{name} has no {column}");
        }
        let rest: Vec<_> = lines.map(|l| l.split(',').count()).collect();
        assert!(rest.len() == rows && rest.iter().all(|n| *n == columns), "{name}: {csv}");
    }
}

/// The page can be made again from the numbers alone.
#[test]
fn a_report_is_made_anew_from_its_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let output = report(dir.path(), &["--cases", "null-d1-event", "--no-idle"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let (page, json) = (read(dir.path(), "index.html"), dir.path().join("out/results.json"));
    let again = dir.path().join("again");
    let mut command = Command::new(env!("CARGO_BIN_EXE_vub-bench"));
    command.arg("report").arg("--from").arg(json).arg("--out").arg(&again);
    assert!(command.status().unwrap().success());
    assert_eq!(fs::read_to_string(again.join("index.html")).unwrap(), page);
}

#[test]
fn a_broken_peer_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let fails = |peer: &str| {
        let output = report(dir.path(), &["--cases", "null-d1-event", "--no-idle", "--peer", peer]);
        assert!(!output.status.success(), "{peer}");
        text(&output.stderr)
    };
    let said = fails("gone:null=echo no such image >&2; exit 3 # {socket}");
    for part in ["gone on null-d1-event", "does not listen", "exit status: 3", "no such image"] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    let said = fails("typo:null=run {sokcet}");
    assert!(said.contains("typo") && said.contains("{sokcet}"), "{said}");
}
