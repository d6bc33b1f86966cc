//! Memory that others write: scatter lists ([`sg`]), the guest's memory map ([`map`]) and the log of our writes to it
//! ([`log`]).
//!
//! Nothing in here is ever turned into a `&[u8]`: the guest may change every byte at any time. Bytes are copied
//! in or out, or an address is handed to the kernel.

pub mod log;
pub mod map;
pub mod sg;

pub use log::{DirtyLog, RingLog};
pub use map::{GuestMap, Region};
pub use sg::{IoVec, Sg};
