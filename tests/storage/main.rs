//! Storage that fails below a running device, seen by the guest over the real socket: injected faults (`blkdebug`), real
//! ones, and what `rerror` and `werror` make of them; every metadata write of qcow2 failing once.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../drivers/mod.rs"]
mod drivers;

mod cut;
mod injected;
mod logged;
mod metadata;
mod policy;
mod power;
mod real;
mod recorder;
