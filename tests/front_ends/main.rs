//! Front ends against the vhost-user session, over a real socket, with a device that writes down what is done to it.
//!
//! The tests are named after the rows of the interoperability list (Q: QEMU, C: cloud-hypervisor, F: Firecracker, X: crosvm,
//! V: StratoVirt, U: all of them). `scripts/` holds whole conversations: QEMU's were recorded from QEMU 10.0.2, the
//! others follow the front ends' sources. Every wait has a limit, and nothing sleeps.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

mod client;
mod cloud_hypervisor;
mod crosvm;
mod device_state;
mod firecracker;
mod fixture;
mod hostile;
mod inflight;
mod log;
mod mock;
mod qemu;
mod script;
mod strato_virt;
mod universal;
