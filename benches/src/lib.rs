//! What is worth measuring of the way of a request, each part by itself. `fast_lane.rs` beside this package has Criterion time
//! it; `contrib/gate` has `vub-count` count its instructions. A case is prepared anew before each run; only the run is
//! measured.

use std::path::Path;

mod disk;
mod guest;
mod request;
mod ring;
mod text;
mod turn;

use guest::Kind;

/// One thing to measure.
pub trait Case {
    /// Operations in a run.
    fn ops(&self) -> u32;

    /// Makes what the next run uses up, after it has seen that the last run did its work.
    ///
    /// # Panics
    /// If it did not.
    fn prepare(&mut self);

    /// What is measured.
    fn run(&mut self);
}

/// A case's maker: it may keep files in the directory.
type Make = fn(&Path) -> Box<dyn Case>;

/// All cases, by name.
pub const CASES: &[(&str, Make)] = &[
    ("null-32", |_| Box::new(turn::Turn::new(Kind::Split, 32))),
    ("null-1", |_| Box::new(turn::Turn::new(Kind::Split, 1))),
    ("null-indirect-32", |_| Box::new(turn::Turn::new(Kind::Indirect, 32))),
    ("null-packed-32", |_| Box::new(turn::Turn::new(Kind::Packed, 32))),
    ("ring-split", |_| Box::new(ring::Rounds::new(Kind::Split))),
    ("ring-indirect", |_| Box::new(ring::Rounds::new(Kind::Indirect))),
    ("ring-packed", |_| Box::new(ring::Rounds::new(Kind::Packed))),
    ("request", |_| Box::new(request::Requests::new())),
    ("translate", |_| Box::new(request::Addresses::new())),
    ("qcow2-map", |dir| Box::new(disk::Lookups::new(dir))),
    ("options-json", |_| Box::new(text::Options::new(text::JSON))),
    ("options-keyval", |_| Box::new(text::Options::new(text::KEYVAL))),
];

/// The case called `name`.
pub fn case(name: &str, dir: &Path) -> Option<Box<dyn Case>> {
    let (_, make) = CASES.iter().find(|(other, _)| *other == name)?;
    Some(make(dir))
}
