//! Runs one case for valgrind's callgrind, which is to count in [`measured`] only: see `contrib/gate`.
//!
//! ```text
//! vub-count             all cases' names
//! vub-count NAME RUNS   the case, RUNS times after a few that are not measured; prints the operations in them
//! ```

use std::env::args;
use std::process::ExitCode;

use vub_cases::{CASES, Case, case};

/// Until all memory that grows has grown: each ring goes round twice.
const WARM_UP: u32 = 600;

/// What is counted. It has a name that stays.
#[inline(never)]
fn measured(case: &mut dyn Case) {
    case.run();
}

fn count(name: &str, runs: u32) -> Option<u32> {
    let dir = tempfile::tempdir().ok()?;
    let mut case = case(name, dir.path())?;
    for _ in 0..WARM_UP {
        case.prepare();
        case.run();
    }
    for _ in 0..runs {
        case.prepare();
        measured(&mut *case);
    }
    case.prepare();
    Some(runs * case.ops())
}

fn main() -> ExitCode {
    let args: Vec<String> = args().skip(1).collect();
    let [name, runs] = &args[..] else {
        CASES.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    };
    match runs.parse().ok().and_then(|runs| count(name, runs)) {
        Some(ops) => println!("{ops}"),
        None => return ExitCode::FAILURE,
    }
    ExitCode::SUCCESS
}
