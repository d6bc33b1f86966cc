//! `vhost-user-blk`: a storage back end for virtual machines. It opens a graph of block nodes from QEMU's `--blockdev`
//! options and serves the root node to a guest over a vhost-user socket, as a virtio-blk disk.
//!
//! # The way of a request
//!
//! ```text
//!   guest ──── shared memory ────┐                       control plane
//!     │ kick (eventfd)           │                  ┌─────────────────────────┐
//!     ▼                          ▼                  │ cli   options, in order │
//!  ┌─ export::worker (one thread per queue, or n : m) │  │                      │
//!  │   take    virtio::ring ── chain ─► request     │  ▼                      │
//!  │                                      │         │ block::graph  opens     │
//!  │             ┌────────────────────────┴──┐      │  │            nodes     │
//!  │   fast lane │ Node::locate: root → leaf │      │  ▼                      │
//!  │             │ "offset o of file f"      │      │ export::Export ◄──────┐ │
//!  │             └──┬─────────────────────┬──┘      │  ▲ commands, answers  │ │
//!  │                │ Map::File           │ else    └──┼────────────────────┼─┘
//!  │                │            slow lane▼            │                    │
//!  │                │        ┌─ Node::submit (async) ──┼── io: align, split,│
//!  │                ▼        ▼   driver → driver       │   bounce, zeroes   │
//!  │   flush   rt::Reactor (io_uring │ AIO │ threads)  │                    │
//!  │                │                                  │         vhost_user::Session
//!  │   complete     ▼                                  │         (messages, memory,
//!  │           status byte, used element               │          rings start, stop)
//!  │   publish used.idx, one notification per batch ───┼──► call (eventfd)  ▲
//!  └─ nothing? spin, ask for kicks, look again, block ─┘           vhost_user::Server
//! ```
//!
//! A request in the **fast lane** costs no allocation, no lock and no copy: its chain is translated once into ranges of
//! host memory that live in the slot of its head, [`Node::locate`](block::Node::locate) says where the bytes are,
//! and one submission queue entry carries them. Everything else - unaligned, zeroing, discarding, drivers that must think -
//! is an `async` function in the **slow lane**, on the same thread.
//!
//! # Modules, from below
//!
//! * [`error`]: QEMU's sentences for people, kernel numbers for requests.
//! * [`metrics`]: counters of all of these, and the socket at which they are served.
//! * [`mem`]: the guest's memory map and scatter lists. Memory that others write is copied or handed to the kernel, never
//!   borrowed as a slice.
//! * [`rt`]: the runtime of an I/O thread: reactor, executor, mailbox, timers, polling policy. Our own, because operations on
//!   guest memory cannot be cancelled by dropping a future (tokio-uring, glommio, monoio and compio take buffers by value
//!   for that reason, and a guest's memory is nobody's value), because the loop must look at foreign memory before it
//!   sleeps, and because the same drivers shall run on a simulated disk.
//! * [`virtio`]: the split ring on cached host pointers, and virtio-blk's layout. Not `virtio-queue`'s `Queue`: it translates
//!   every ring access anew and publishes every element by itself; its mock rings are what ours is tested against.
//! * [`block`]: nodes, drivers, the graph and the generic layer of requests. Its page holds the rules for driver authors.
//! * [`export`]: requests, queues, workers.
//! * [`vhost_user`]: messages, session, server. Not the `vhost` crate's handler: see there.
//! * [`sandbox`]: what all of these may not do any more once they serve.
//! * [`qapi`], [`cli`]: QEMU's option language and the command line; [`cli::takeover`]: upgrade in place.
//! * `sim` (feature `sim`, for tests): the drivers on simulated disks whose power fails at any moment.
//!
//! Imports point downwards in this list reversed: nothing imports upward. `mem::sg` is below `rt`, which only needs it to
//! name memory.
//!
//! # A qcow2 disk
//!
//! ```text
//!   read, write in place        allocating write, zeroes, discard           FLUSH, 5 s, reset, stop, end
//!   ────────────────────        ─────────────────────────────────           ────────────────────────────
//!   L1, L2 in memory            plan   Meta lock, microseconds              copies of what is dirty, Meta lock
//!        │ no lock              data   to new clusters, no lock             refcounts │ fdatasync │ L2, L1 │ fdatasync
//!        ▼                      link   Meta lock: entries, in memory        freed clusters may be used again
//!   offset o of file f ◄─────── the next write there
//! ```
//!
//! Most requests of a disk in use take the fast lane as on a raw file: their entries are in memory, and the tables change in memory
//! first; a journal of these changes outlives the process. What makes that safe is the order in which tables go to disk, and that no cluster is given away while somebody may
//! still use it. [`block::drivers::qcow2`] has the picture; `tests/simulation` tries to prove it wrong.
//!
//! # What must hold
//!
//! 1. A byte of guest memory is touched only between taking a chain and publishing its used element; a stopped ring,
//!    a removed region, a closed connection has no request in flight.
//! 2. A completed flush (or any completed write, when the cache is write-through) is on stable storage.
//! 3. A worker that goes to sleep has asked for a kick and looked at every ring after that.
//! 4. No input of a guest, front end or image ends the process or stops another queue: a bad chain is answered with an
//!    error where its status byte can be reached, else its queue breaks.
//! 5. After a power cut at any moment a qcow2 image is valid but for leaked clusters, and has everything that was flushed.
//! 6. After a SIGKILL at any moment whoever opens the image next, with the same `--state-dir`, has every write that was acknowledged,
//!    flushed or not.
//! 7. Nothing in [`block::graph`] knows a driver by name: a driver is one file and one line in
//!    [`block::drivers::TABLE`].
//!
//! # Where this differs from the design it started from
//!
//! * The `vhost` and `vm-memory` crates are not used: the session must answer what real front ends send in the orders in
//!   which they send it (see [`vhost_user`]), and a region is one `mmap` (see [`mem::map`]).
//! * A memory map is replaced while a queue has nothing in flight, not under a grace period: added regions need no
//!   drain, because maps share regions; removals are rare and must wait for requests anyway.
//! * qcow2's dirty tables are copied when a flush begins and the copies written, instead of generations per entry: a copy of
//!   4 KiB costs less than it costs to think about what may change under the write.
//! * qcow2's cached tables are in anonymous memory, in one arena, and do not survive the process yet.
//! * `write_zeroes`, `discard` and `flush` take the slow lane: they cost a system call of their own that dwarfs a boxed
//!   future.
//! * The cache mode that a driver set (`writeback` in the configuration space) survives resets and reconnects of the front end:
//!   front ends cache the configuration, and a driver that believes in write-through does not flush.

pub mod block;
pub mod cli;
pub mod error;
pub mod export;
pub mod mem;
pub mod metrics;
pub mod qapi;
pub mod rt;
pub mod sandbox;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod sys;
pub mod vhost_user;
pub mod virtio;
