//! `vub_client`: a vhost-user-blk front end without a guest.
//!
//! ```text
//!   Client   handshake, memory, start/stop/reset/reconnect     client.rs
//!     |- Conn     any message, any bytes, any fds              proto.rs
//!     |- GuestMem memfd regions, Buf                           mem.rs
//!     `- Queue    read/write/flush/..., submit/poll/wait       queue.rs
//!          |- Packed   a packed ring's driver side             packed.rs
//!          `- Ring     a split ring's driver side              ring.rs
//!               `- RingMem  the bytes of the ring, all of them
//! ```
//!
//! For tests: `Client::connect(path, Options::default())?.queue(0).read(0, &mut data)?`. Every wait has a
//! limit, 10 s unless told otherwise, so a test cannot hang. For hostile guests go one layer down:
//! `queue.ring().mem()` sets any descriptor and index, `client.conn` sends any message.
//!
//! Nothing here is shared with the program under test: messages, ring and request format are written
//! down once more, from the specifications. Unsafe code is in `sys` and `mem` only.

#![warn(clippy::pedantic)]
#![allow(clippy::similar_names, clippy::must_use_candidate, clippy::doc_markdown)]
#![allow(clippy::struct_excessive_bools, reason = "options are what they are")]
#![allow(clippy::cast_possible_truncation, reason = "constants of virtio-bindings are all u32")]

use std::time::Duration;

pub mod blk;
mod client;
mod error;
pub mod fake;
pub mod mem;
pub mod packed;
pub mod proto;
mod queue;
pub mod ring;
pub mod sys;

pub use client::{
    Base, Client, DEFAULT_PROTOCOL, KNOWN_FEATURES, MemStyle, Options, connect_retry,
};
pub use error::{Error, Result, Status};
pub use mem::{Buf, GuestMem};
pub use packed::Packed;
pub use proto::Conn;
pub use queue::{Done, Driver, Layout, Queue};

/// Limit of every wait unless told otherwise.
pub const TIMEOUT: Duration = Duration::from_secs(10);
