//! Hostile qcow2 images, with fixed seeds: see `fuzz/src/lib.rs`. Whoever finds more uses libFuzzer: `contrib/fuzz`.
//!
//! `VUB_FUZZ_SEED`: one seed only; `VUB_FUZZ_FIRST`, `VUB_FUZZ_SECONDS`: as many as fit, for contrib/soak.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "qcow2_fuzz/findings.rs"]
mod findings;
#[path = "../fuzz/src/lib.rs"]
mod fuzz;
#[path = "qcow2_fuzz/memory.rs"]
mod memory;

use std::time::{Duration, Instant};

use vhost_user_blk::block::drivers::qcow2::write::mutation::{self, Mutation};
use vhost_user_blk::sim::Rng;

/// Bytes of entropy of a run: more than most of them use.
const ENTROPY: usize = 2000;

/// Tells the seed of a run that does not come to its end.
struct Seed(&'static str, u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: VUB_FUZZ_SEED={}", self.0, self.1);
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|n| n.parse().expect("a number"))
}

fn entropy(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..ENTROPY).map(|_| rng.next_u64() as u8).collect()
}

/// Runs `target` for `count` seeds.
fn seeds(name: &'static str, count: u64, target: fn(&[u8])) {
    let one = |seed| {
        let _told = Seed(name, seed);
        memory::assert_bounded(|| target(&entropy(seed)));
    };
    if let Some(seed) = number("VUB_FUZZ_SEED") {
        return one(seed);
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
fn opening() {
    seeds("qcow2_open", 500, fuzz::open);
}

#[test]
fn reading() {
    seeds("qcow2_read", 400, fuzz::read);
}

#[test]
fn writing() {
    seeds("qcow2_write", 600, fuzz::write);
}

/// That nothing is found means something: deliberate mistakes of the driver are.
#[test]
fn mistakes_are_found() {
    let mistakes = [
        Mutation::NoCopyOnWrite,
        Mutation::NoTableCopy,
        Mutation::IgnoreBusy,
        Mutation::LinkFailedWrites,
        Mutation::LinkBeforeData,
    ];
    for mistake in mistakes {
        mutation::set(Some(mistake));
        let fails = |seed: &u64| std::panic::catch_unwind(|| fuzz::write(&entropy(*seed))).is_err();
        let found = (1..=300).find(fails);
        mutation::set(None);
        println!("{mistake:?}: {found:?}");
        assert!(found.is_some(), "{mistake:?}");
    }
}
