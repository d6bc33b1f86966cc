//! One run after another, each with a seed of its own.
//!
//! `VUB_FUZZ_SEED`: that seed only; `VUB_FUZZ_FIRST`: where to begin; `VUB_FUZZ_SECONDS`: as many as fit.

use std::time::{Duration, Instant};

/// Prints its text if the test panics while it lives: how to repeat a run that does not come to its end.
pub struct Told(pub String);

impl Drop for Told {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|n| n.parse().expect("a number"))
}

/// The only seed that is asked for.
pub fn only() -> Option<u64> {
    number("VUB_FUZZ_SEED")
}

/// Calls `one` with `count` seeds, or with what the variables say; `name` is the test's.
pub fn run(name: &str, count: u64, one: impl Fn(u64)) {
    let one = |seed| {
        let _told = Told(format!("{name}: VUB_FUZZ_SEED={seed}"));
        one(seed);
    };
    if let Some(seed) = only() {
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
