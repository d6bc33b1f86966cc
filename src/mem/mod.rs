//! Memory that others write: scatter lists ([`sg`]), the guest's memory map ([`map`]), the log of our writes to it
//! ([`log`]), and what happens when it is taken away ([`sigbus`]).
//!
//! Nothing in here is ever turned into a `&[u8]`: the guest may change every byte at any time. Bytes are copied
//! in or out, or an address is handed to the kernel.

pub mod log;
pub mod map;
pub mod sg;
pub mod sigbus;

pub use log::{DirtyLog, RingLog};
pub use map::{GuestMap, Region};
pub use sg::{IoVec, Sg};
