//! The virtio side: split and packed rings and the virtio-blk device's constants, configuration space and request headers.

pub mod blk;
mod chain;
pub mod inflight;
mod inflight_packed;
#[cfg(test)]
mod interpreted_tests;
pub mod packed;
pub mod queue;
pub mod ring;
pub mod track;

/// Feature bit `bit` as a mask.
pub const fn feature(bit: u32) -> u64 {
    1 << bit
}
