//! Hostile guests and front ends, with fixed seeds: see `fuzz/src/hostile.rs`. Whoever finds more uses libFuzzer:
//! `contrib/fuzz`.
//!
//! Variables: see `common/seeds.rs`. What is interesting is in `fuzz/corpus`, one file for each input of libFuzzer's that is
//! to be run for ever.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../fuzz/src/hostile.rs"]
mod hostile;
#[path = "common/seeds.rs"]
mod seeds;

use std::fs;
use std::path::PathBuf;

use vhost_user_blk::sim::Rng;

/// Bytes of entropy of a run, at most.
const ENTROPY: usize = 1500;

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
    assert!(!corpus.is_empty(), "the corpus is there");
    for (path, bytes) in corpus.iter().filter(|_| seeds::only().is_none()) {
        let _told = seeds::Told(path.display().to_string());
        target(bytes);
    }
    seeds::run(name, count, |seed| target(&input(seed, &corpus)));
}

#[test]
fn rings() {
    run("ring", 2000, hostile::ring::run);
}

#[test]
fn messages() {
    run("messages", 1000, hostile::messages::run);
}
