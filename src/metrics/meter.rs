//! What is counted, by whom.
#![forbid(unsafe_code)]

use std::sync::{Arc, OnceLock};

use super::counter::{Counter, Shared};
use super::histogram::Histogram;

/// What a request asks for, as its header says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes,
    /// VIRTIO_BLK_T_GET_ID.
    GetId,
    /// Anything else, and what has no complete header.
    #[default]
    Other,
}

/// The kinds, in their order, in words.
pub const KINDS: [&str; 7] =
    ["read", "write", "flush", "discard", "write_zeroes", "get_id", "other"];
/// The first so many kinds have a histogram of latencies.
pub const LATENCIES: usize = 3;

/// One queue, over all times it ran. Its writer is the worker that it runs on.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct QueueMeter {
    /// Requests answered, by kind.
    pub requests: [Counter; KINDS.len()],
    /// Bytes of those that succeeded.
    pub bytes: [Counter; KINDS.len()],
    /// Requests answered with an error.
    pub errors: [Counter; KINDS.len()],
    /// Requests that a task carried out (the slow lane).
    pub slow: Counter,
    /// Taken and not answered, when the last turn ended.
    pub in_flight: Counter,
    /// Times that the guest's kick was noticed; several kicks may be noticed at once.
    pub kicks: Counter,
    /// Notifications sent to the guest.
    pub calls: Counter,
    /// Batches of answers of which the guest did not want to be notified.
    pub suppressed: Counter,
    /// Read, write, flush.
    pub latency: [Histogram; LATENCIES],
}

/// One worker. It is its writer.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct WorkerMeter {
    /// Times that something came while the worker looked for it.
    pub poll_hits: Counter,
    /// Times that the worker went to sleep.
    pub poll_misses: Counter,
}

/// One export: its queues and workers, as far as they ever ran.
#[derive(Debug)]
pub struct ExportMeter {
    /// Its id.
    pub id: String,
    /// The name of its root node.
    pub node: String,
    queues: Box<[OnceLock<Arc<QueueMeter>>]>,
    workers: Box<[OnceLock<Arc<WorkerMeter>>]>,
}

/// One node of a format that keeps tables in memory.
#[derive(Debug)]
pub struct NodeMeter {
    /// Its name.
    pub node: String,
    /// Its driver.
    pub driver: &'static str,
    /// Look-ups for reads of the slow lane that found their L2 slice in memory.
    pub l2_hits: Shared,
    /// Look-ups that read it.
    pub l2_misses: Shared,
    /// Refcount blocks that were read.
    pub refcount_misses: Shared,
    /// Allocations that found their refcount blocks in memory.
    pub refcount_hits: Shared,
    /// Records in the journal.
    pub journal: Shared,
    /// Records that it has room for; 0: there is none.
    pub journal_room: Shared,
}

impl NodeMeter {
    /// Of node `node`, nothing counted.
    pub fn new(node: &str, driver: &'static str) -> Arc<NodeMeter> {
        Arc::new(NodeMeter {
            node: node.to_owned(),
            driver,
            l2_hits: Shared::default(),
            l2_misses: Shared::default(),
            refcount_misses: Shared::default(),
            refcount_hits: Shared::default(),
            journal: Shared::default(),
            journal_room: Shared::default(),
        })
    }
}

impl ExportMeter {
    /// An export with so many queues and workers at most.
    pub fn new(id: &str, node: &str, queues: usize, workers: usize) -> ExportMeter {
        ExportMeter {
            id: id.to_owned(),
            node: node.to_owned(),
            queues: (0..queues).map(|_| OnceLock::new()).collect(),
            workers: (0..workers).map(|_| OnceLock::new()).collect(),
        }
    }

    /// The meter of queue `index`, which is about to run.
    pub fn queue(&self, index: u16) -> Arc<QueueMeter> {
        Arc::clone(self.queues[usize::from(index)].get_or_init(Arc::default))
    }

    /// The meter of worker `at`, which is about to run.
    pub fn worker(&self, at: usize) -> Arc<WorkerMeter> {
        Arc::clone(self.workers[at].get_or_init(Arc::default))
    }

    /// The queues that ever ran: index, worker, meter.
    pub fn queues(&self) -> impl Iterator<Item = (usize, usize, &QueueMeter)> {
        let workers = self.workers.len();
        (0..).zip(&self.queues).filter_map(move |(i, q)| Some((i, i % workers, &**q.get()?)))
    }

    /// The workers that ever ran.
    pub fn workers(&self) -> impl Iterator<Item = (usize, &WorkerMeter)> {
        (0..).zip(&self.workers).filter_map(|(i, w)| Some((i, &**w.get()?)))
    }
}

/// A moment, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp(u64);

impl Stamp {
    /// The real clock's: a third of the price of an [`std::time::Instant`] that is subtracted from another.
    #[inline]
    pub fn now() -> Stamp {
        Stamp(crate::sys::monotonic_ns())
    }

    /// Nanoseconds that have passed since `earlier`.
    #[inline]
    pub fn since(self, earlier: Stamp) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A worker's clock, which stands still between two looks at the real one.
#[derive(Debug)]
pub struct Stopwatch(Stamp);

impl Stopwatch {
    /// Begins now.
    pub fn start() -> Stopwatch {
        Stopwatch(Stamp::now())
    }

    /// Looks at the real clock.
    #[inline]
    pub fn look(&mut self) {
        self.0 = Stamp::now();
    }

    /// When it was looked at last.
    #[inline]
    pub fn now(&self) -> Stamp {
        self.0
    }
}

/// No moment.
const NEVER: Stamp = Stamp(u64::MAX);

/// A queue's answers of this turn, which are counted when it ends: a request costs an addition of its own for each number,
/// a turn the rest.
#[derive(Debug)]
pub struct Done {
    /// Those of the requests that were taken at `since`; all are, in most turns.
    since: Stamp,
    requests: [u32; KINDS.len()],
    bytes: [u64; KINDS.len()],
    errors: [u32; KINDS.len()],
    /// How many were taken at other moments.
    others: Vec<(Stamp, [u32; LATENCIES])>,
}

impl Done {
    /// With room for the answers of a ring of `size` entries: more cannot be given in a turn.
    pub fn with_room(size: u16) -> Done {
        Done {
            since: NEVER,
            requests: Default::default(),
            bytes: Default::default(),
            errors: Default::default(),
            others: Vec::with_capacity(size.into()),
        }
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.since == NEVER
    }

    /// A request for `len` bytes that was taken at `since` has been answered.
    #[inline]
    pub fn push(&mut self, kind: Kind, since: Stamp, len: u64, ok: bool) {
        if since != self.since {
            self.begin(since);
        }
        self.requests[kind as usize] += 1;
        if ok {
            self.bytes[kind as usize] += len;
        } else {
            self.failed(kind);
        }
    }

    #[cold]
    fn failed(&mut self, kind: Kind) {
        self.errors[kind as usize] += 1;
    }

    /// What comes was taken at `since`.
    #[cold]
    fn begin(&mut self, since: Stamp) {
        if !self.is_empty() {
            let mut counts = [0; LATENCIES];
            counts.copy_from_slice(&self.requests[..LATENCIES]);
            // Counted are those that no earlier entry has.
            for (_, before) in &self.others {
                counts.iter_mut().zip(before).for_each(|(n, before)| *n -= before);
            }
            self.others.push((self.since, counts));
        }
        self.since = since;
    }

    /// The turn has ended, at `now`.
    #[inline]
    pub fn record(&mut self, now: Stamp, to: &QueueMeter) {
        if !self.is_empty() {
            self.record_all(now, to);
        }
    }

    fn record_all(&mut self, now: Stamp, to: &QueueMeter) {
        for kind in 0..KINDS.len() {
            let n = std::mem::take(&mut self.requests[kind]);
            if n == 0 {
                continue;
            }
            to.requests[kind].add(n.into());
            to.bytes[kind].add(std::mem::take(&mut self.bytes[kind]));
            to.errors[kind].add(std::mem::take(&mut self.errors[kind]).into());
            let Some(histogram) = to.latency.get(kind) else { continue };
            let mut rest = n;
            for (since, counts) in &self.others {
                if counts[kind] != 0 {
                    rest -= counts[kind];
                    histogram.record(now.since(*since), counts[kind].into());
                }
            }
            if rest != 0 {
                histogram.record(now.since(self.since), rest.into());
            }
        }
        self.others.clear();
        self.since = NEVER;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_a_turn_end_with_it() {
        let (mut done, meter) = (Done::with_room(4), QueueMeter::default());
        assert!(done.is_empty());
        for (kind, since, ok) in [
            (Kind::Read, 1000, true),
            (Kind::Read, 1000, false),
            (Kind::Write, 500, true),
            (Kind::Read, 100, true),
            (Kind::GetId, 100, true),
            (Kind::Read, 1000, true),
        ] {
            done.push(kind, Stamp(since), 10, ok);
        }
        assert!(!done.is_empty());
        done.record(Stamp(1200), &meter);
        assert!(done.is_empty());
        done.record(Stamp(9999), &meter);
        let of = |kind: Kind| meter.latency[kind as usize].read();
        assert_eq!((of(Kind::Read).0[0], of(Kind::Read).1), (3, 3 * 200 + 1100));
        assert_eq!((of(Kind::Write).0[3], of(Kind::Write).1), (1, 700));
        assert_eq!(of(Kind::Flush).1, 0);
        let all = |counters: &[Counter; KINDS.len()]| counters.each_ref().map(Counter::get);
        assert_eq!(all(&meter.requests), [4, 1, 0, 0, 0, 1, 0]);
        assert_eq!(all(&meter.bytes), [30, 10, 0, 0, 0, 10, 0]);
        assert_eq!(all(&meter.errors), [1, 0, 0, 0, 0, 0, 0]);
        done.push(Kind::Flush, Stamp(1200), 0, true);
        done.record(Stamp(1201), &meter);
        assert_eq!(of(Kind::Flush).1, 1);
    }

    #[test]
    fn only_what_ran_is_shown() {
        let export = ExportMeter::new("e", "n", 16, 3);
        export.queue(4).kicks.add(7);
        export.worker(1).poll_hits.add(2);
        let shown: Vec<_> = export.queues().map(|(i, w, q)| (i, w, q.kicks.get())).collect();
        assert_eq!(shown, [(4, 1, 7)]);
        assert_eq!(export.workers().map(|(i, w)| (i, w.poll_hits.get())).next(), Some((1, 2)));
    }
}
