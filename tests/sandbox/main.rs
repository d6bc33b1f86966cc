//! What the program cannot do once it serves, that it serves all the same, and that a front end which takes its memory away
//! hurts itself alone.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;

mod confined;
mod forked;
mod lacking;
mod served;
