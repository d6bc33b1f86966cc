//! The whole device over a real socket, with a guest that is a library: requests, cache, queues, life cycle, hostile
//! rings, engines. Every wait has a limit, and no sleep stands for one.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;
#[path = "../drivers/mod.rs"]
mod drivers;

mod cache;
mod dirty_log;
mod engines;
mod hostile;
mod hostile_requests;
mod inflight;
mod lifecycle;
mod memory;
mod model;
mod packed;
mod places;
mod queues;
mod requests;
mod running;
mod shapes;
