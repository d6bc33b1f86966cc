//! Deterministic simulation: the real drivers on simulated disks, one thread, one seed.
//!
//! Nothing here is part of the program (feature `sim`, for tests). The parts, from below:
//!
//! * [`Rng`], [`Pages`]: random numbers from a seed; sparse images with cheap copies.
//! * `request`: what is asked of a disk, what it is like, what shall go wrong.
//! * `disk`, [`SIM_DISK`]: disks with a volatile cache whose requests overtake each other; driver `sim-disk`.
//! * [`History`], [`Replay`]: what happened, and what any crash at any moment could have left.
//! * `memory`: what a process leaves beside its disks when it is killed (a journal), at any moment of its life.
//! * [`Sim`]: the scheduler, in place of the kernel.
//! * [`Model`]: which contents each sector of the guest's disk may have, now and after a crash.
//! * [`Workload`]: random guests.
//! * `life`: one life of an image, and all its ends.
//! * [`harness`]: all of that together; what a driver's tests use. Start there.
//!
//! # What is simulated, what is not
//!
//! Tasks interleave at every `.await`; requests complete in any order; reads see parts of writes in flight; blocking calls
//! ([`crate::rt::blocking`]) return at random moments, timers fire in virtual time. All tasks share one thread, so races
//! between two instructions of different threads are not found here (loom does that).
#![forbid(unsafe_code)]

mod disk;
mod driver;
pub mod harness;
mod history;
mod life;
mod memory;
mod model;
mod pages;
mod request;
mod rng;
mod run;
mod seeds;
mod workload;

pub use driver::SIM_DISK;
pub use history::{Crash, FlushFailure, History, Replay, Survivors, Time};
pub use model::{Change, Expectation, Model, Tag, Violation, fill, tag_of};
pub use pages::Pages;
pub use request::{Discarded, DiskOptions, DiskSpec, Fault, Request};
pub use rng::Rng;
pub use run::{Sim, Stuck};
pub use workload::{Mix, Workload};
