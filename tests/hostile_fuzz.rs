//! Hostile guests and front ends, with fixed seeds: see `fuzz/src/hostile.rs`. Whoever finds more uses libFuzzer:
//! `contrib/fuzz`.
//!
//! `VUB_FUZZ_SEED`: one seed only; `VUB_FUZZ_FIRST`, `VUB_FUZZ_SECONDS`: as many as fit. What is interesting is in
//! `fuzz/corpus`, one file for each input of libFuzzer's that is to be run for ever.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../fuzz/src/hostile.rs"]
mod hostile;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vhost_user_blk::sim::Rng;

/// Bytes of entropy of a run, at most.
const ENTROPY: usize = 1500;

/// Tells the input of a run that does not come to its end.
struct Input(String);

impl Drop for Input {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|n| n.parse().expect("a number"))
}

/// The inputs that are kept for `target`, with their names.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut paths: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// An input: some bytes, or one of the corpus, other bytes in some places, or the beginning of one and the end of another.
fn input(seed: u64, corpus: &[(PathBuf, Vec<u8>)]) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let len = rng.index(ENTROPY);
    let mut bytes: Vec<u8> = (0..len).map(|_| rng.next_u64() as u8).collect();
    if corpus.is_empty() || rng.chance(1, 4) {
        return bytes;
    }
    if rng.chance(1, 2) {
        bytes = corpus[rng.index(corpus.len())].1.clone();
    }
    let other = &corpus[rng.index(corpus.len())].1;
    bytes.truncate(rng.index(bytes.len() + 1));
    bytes.extend_from_slice(&other[rng.index(other.len() + 1)..]);
    for _ in 0..rng.index(16) {
        if !bytes.is_empty() {
            let at = rng.index(bytes.len());
            bytes[at] = rng.next_u64() as u8;
        }
    }
    bytes
}

/// Runs `target` for the corpus, then for `count` seeds.
fn run(name: &'static str, count: u64, target: fn(&[u8])) {
    let corpus = corpus(name);
    let one = |seed| {
        let _told = Input(format!("{name}: VUB_FUZZ_SEED={seed}"));
        target(&input(seed, &corpus));
    };
    if let Some(seed) = number("VUB_FUZZ_SEED") {
        return one(seed);
    }
    assert!(!corpus.is_empty(), "the corpus is there");
    for (path, bytes) in &corpus {
        let _told = Input(path.display().to_string());
        target(bytes);
    }
    let first = number("VUB_FUZZ_FIRST").unwrap_or(1);
    let (start, time) = (Instant::now(), number("VUB_FUZZ_SECONDS").map(Duration::from_secs));
    let mut seed = first;
    while time.map_or(seed < first + count, |time| start.elapsed() < time) {
        one(seed);
        seed += 1;
    }
    println!("{name}: {} runs in {:.1} s", seed - first, start.elapsed().as_secs_f64());
}

#[test]
fn rings() {
    run("ring", 2000, hostile::ring::run);
}

#[test]
fn messages() {
    run("messages", 1000, hostile::messages::run);
}
