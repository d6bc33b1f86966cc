//! Writing qcow2 images through the socket of the running program, beside QEMU's tools: every kind of image against a
//! model, many queues at once, killed programs, full disks.
//!
//! `VUB_TEST_BACKEND`: the program under test, ours unless it is given; qemu-storage-daemon passes, too.
//! `VUB_QCOW2_SEED`: other cases (1). `VUB_QCOW2_CASES`: how many random images beside the corpus (0).
//! `VUB_QCOW2_SECONDS`: how long each stress takes (1). `VUB_QCOW2_ROUNDS`: how often each image's back end is killed (25).
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;
#[allow(dead_code, reason = "the tests of reading use the rest")]
#[path = "../qcow2/tools.rs"]
mod tools;

mod bed;
mod cases;
mod differential;
mod full;
mod kill;
mod model;
mod stress;
