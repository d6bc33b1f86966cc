//! What a running back end counts, and who may look at it: counters, OpenMetrics text, the socket that serves it, `top`.
//!
//! ```text
//!   worker ─── QueueMeter, WorkerMeter (one writer each) ─┐
//!   slow lane ─ NodeMeter (several writers)               ├─► Registry ─► text ─► server ─► Prometheus, `top`
//!   export ─── ExportMeter ───────────────────────────────┘   (Weak)     OpenMetrics 1.0 over HTTP
//! ```
//!
//! **What counting costs.** An answer costs two additions in the worker's own memory ([`Done`]); when the turn ends they go to the
//! counters that others may read. Those have one writer, the worker, and lie in cache lines of its own: an addition is a plain load
//! and a plain store. A reader loads them one by one, and disturbs nobody beyond fetching the line; what it sees is therefore each
//! counter at a moment of its own, never going back, and at most a turn behind. The clock is read once in a turn of the loop that did
//! something, never for a request; the idle loop begins with that reading instead of its own.
//!
//! **How exact the latency is.** A request's time begins with the turn that takes it from the ring, and ends with the turn that
//! shows its answer to the guest: both read at the end of a turn of the worker's loop (or of its idle time), so it is never
//! too short, and too long by what else these two turns did. What a request waited in the ring while the worker was busy with the turn
//! before, or slept, is not in it. Buckets have bounds half an octave apart: a quantile is exact to a third, the sum to the turn.
//!
//! The registry keeps nothing alive: neither an export nor a node (whose end gives up image locks) waits for a reader.
#![forbid(unsafe_code)]

pub mod address;
mod counter;
mod histogram;
mod http;
mod meter;
mod registry;
pub mod server;
mod text;
pub mod top;

pub use counter::{Counter, Shared};
pub use histogram::{BOUNDS, Histogram};
pub use meter::{
    Done, ExportMeter, KINDS, Kind, LATENCIES, NodeMeter, QueueMeter, Stamp, Stopwatch, WorkerMeter,
};
pub use registry::Registry;
