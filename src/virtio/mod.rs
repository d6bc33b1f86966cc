//! The virtio side: the split ring and the virtio-blk device's constants, configuration space and request headers.

pub mod blk;
pub mod inflight;
pub mod ring;

/// Feature bit `bit` as a mask.
pub const fn feature(bit: u32) -> u64 {
    1 << bit
}
