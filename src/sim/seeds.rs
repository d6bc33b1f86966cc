//! Many seeds, one after the other: what was done, how fast, and what was found.

use std::fmt;
use std::time::{Duration, Instant};

/// What has been done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Seeds, or faults.
    pub runs: u64,
    /// The guests' operations.
    pub operations: u64,
    /// Events of the disks: the moments at which the power could be cut.
    pub events: u64,
    /// Cuts.
    pub cuts: u64,
    /// Crashed disks opened and compared.
    pub outcomes: u64,
    /// Writes whose memory changed while they were in flight.
    pub changed_in_flight: u64,
    /// A fingerprint of everything that happened.
    pub trace: u64,
}

impl std::ops::AddAssign for Report {
    fn add_assign(&mut self, other: Report) {
        self.runs += other.runs;
        self.operations += other.operations;
        self.events += other.events;
        self.cuts += other.cuts;
        self.outcomes += other.outcomes;
        self.changed_in_flight += other.changed_in_flight;
        self.trace ^= other.trace;
    }
}

/// What was found, and how to find it again.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed.
    pub seed: u64,
    /// When and what.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VUB_SIM_SEED={:#x}: {}", self.seed, self.what)
    }
}

/// Runs `one` for fresh seeds until `time` is over (`VUB_SIM_SECONDS` instead, if set; `VUB_SIM_SEED`: that one only),
/// and says how fast it was.
///
/// # Panics
/// At the first failure, with its seed.
pub fn seeds(
    name: &str,
    time: Duration,
    mut one: impl FnMut(u64) -> Result<Report, Failure>,
) -> Report {
    let mut check = |seed| one(seed).unwrap_or_else(|failure| panic!("{name}: {failure}"));
    if let Some(seed) = number("VUB_SIM_SEED") {
        return check(seed);
    }
    let time = number("VUB_SIM_SECONDS").map_or(time, Duration::from_secs);
    let mut all = Report::default();
    let start = Instant::now();
    let mut seed = number("VUB_SIM_FIRST").unwrap_or(1);
    while start.elapsed() < time {
        all += check(seed);
        seed += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    let per_second = |n: u64| n as f64 / seconds;
    println!(
        "{name}: {} runs in {seconds:.1} s: {:.1} runs/s, {:.0} operations/s, {:.0} crashes/s",
        all.runs,
        per_second(all.runs),
        per_second(all.operations),
        per_second(all.outcomes)
    );
    all
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    let digits = text.strip_prefix("0x");
    digits.map_or_else(|| text.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok())
}
