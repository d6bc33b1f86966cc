//! The runtime: what a thread that does I/O is made of. Knows nothing of blocks.
//!
//! Each such thread has one [`Runtime`]: a reactor (requests, completions, the wait point), an executor (slow-lane
//! tasks), a mailbox (messages from other threads) and timers. A device worker drives its runtime by hand, turn by
//! turn, to poll its rings in between; [`block_on`] drives one for a single future.
//!
//! Operations are never abandoned: their memory belongs to a guest or to a buffer of the future that waits for them,
//! so a future with an operation in the kernel must not be dropped (`Operation`'s drop ends the process).
//!
//! Why not tokio-uring, glommio, monoio, compio: see the crate documentation.

mod aio;
mod buf;
mod calls;
mod drive;
mod epoll;
mod executor;
mod file;
pub mod grace;
mod inline;
mod mailbox;
mod operation;
pub mod poll;
pub mod pool;
mod reactor;
mod runtime;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod sync;
#[cfg(test)]
mod tests;
mod time;
mod token;
mod uring;

pub use buf::Buffer;
pub use drive::{block_on, block_on_with, is_simulated, try_block_on};
pub use executor::Executor;
pub use file::{Engine, File, IOV_MAX, Rw};
pub use mailbox::{Bell, Mail, Mailbox};
pub use operation::{blocking, blocking_on, fallocate, fdatasync, read, write};
pub use reactor::{Event, Reactor, WaitKind};
pub use runtime::{EventBell, Inbox, Installed, Runtime, current};
pub use time::{cancellable, sleep, sleep_unless_cancelled};
pub use uring::{best_wait_kind, uring_available};
