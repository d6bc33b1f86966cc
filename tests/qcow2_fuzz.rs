//! Hostile qcow2 images, with fixed seeds: see `fuzz/src/lib.rs`. Whoever finds more uses libFuzzer: `contrib/fuzz`.
//!
//! Variables: see `common/seeds.rs`.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "qcow2_fuzz/findings.rs"]
mod findings;
#[path = "../fuzz/src/lib.rs"]
mod fuzz;
#[path = "qcow2_fuzz/memory.rs"]
mod memory;
#[path = "common/seeds.rs"]
mod seeds;

use vhost_user_blk::block::drivers::qcow2::write::mutation::{self, Mutation};
use vhost_user_blk::sim::Rng;

/// Bytes of entropy of a run: more than most of them use.
const ENTROPY: usize = 2000;

fn entropy(seed: u64) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..ENTROPY).map(|_| rng.next_u64() as u8).collect()
}

/// Runs `target` for `count` seeds.
fn run(name: &str, count: u64, target: fn(&[u8])) {
    seeds::run(name, count, |seed| memory::assert_bounded(|| target(&entropy(seed))));
}

#[test]
fn opening() {
    run("qcow2_open", 500, fuzz::open);
}

#[test]
fn reading() {
    run("qcow2_read", 400, fuzz::read);
}

#[test]
fn writing() {
    run("qcow2_write", 600, fuzz::write);
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
