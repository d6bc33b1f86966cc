//! Where new clusters go, so that sequential writes stay sequential on disk.
//!
//! Single clusters are taken one after the other from the allocator. Who goes on where an earlier write has ended is a
//! stream: it gets a *window*, a part of the guest's disk laid out in the same order on the host, in which every cluster
//! has its place, in whatever order (from whichever queue) its writes arrive. Windows grow with the stream: what is set
//! aside is a part of what has been written.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use super::super::refcount::{Blocked, Refcounts, Run};

/// The first window of a stream and the largest, in bytes.
const WINDOW_MIN: u64 = 4 << 20;
const WINDOW_MAX: u64 = 64 << 20;
/// The most clusters of a window.
const CLUSTERS_MAX: u64 = 4096;
/// Windows open at a time; a further one closes the oldest.
const WINDOWS: usize = 16;
/// Places that are watched for somebody who goes on there.
const FRONTIERS: usize = 32;
/// A write this many clusters (of a window: bytes do not matter) before or after the place where the stream was still
/// belongs to it: queues overtake each other.
const SLACK: u64 = 16;

/// Guest clusters `[guest, guest + len)` at host clusters `[host, host + len)`.
struct Window {
    guest: u64,
    host: u64,
    len: u64,
    fresh: bool,
    /// A bit per cluster: in use.
    taken: Box<[u64]>,
    left: u64,
}

impl Window {
    fn new(guest: u64, run: &Run) -> Window {
        let Run { first: host, count: len, fresh } = *run;
        let words = len.div_ceil(64) as usize;
        Window { guest, host, len, fresh, taken: vec![0; words].into(), left: len }
    }

    fn is_free(&self, at: u64) -> bool {
        self.taken[(at / 64) as usize] >> (at % 64) & 1 == 0
    }

    fn take(&mut self, at: u64) {
        self.taken[(at / 64) as usize] |= 1 << (at % 64);
        self.left -= 1;
    }
}

struct Frontier {
    next: u64,
    hits: u32,
    /// Clusters that the stream has written, as far as known.
    written: u64,
}

/// The streams of an image.
pub struct Streams {
    cluster_bits: u32,
    windows: VecDeque<Window>,
    frontiers: VecDeque<Frontier>,
}

impl Streams {
    /// For clusters of `1 << cluster_bits` bytes.
    pub fn new(cluster_bits: u32) -> Streams {
        Streams { cluster_bits, windows: VecDeque::new(), frontiers: VecDeque::new() }
    }

    /// Allocates host clusters for `[guest, guest + count)`, or for the first of them.
    pub fn allocate(
        &mut self,
        refcounts: &mut Refcounts,
        guest: u64,
        count: u64,
    ) -> Result<Run, Blocked> {
        if let Some(run) = self.take_from_window(refcounts, guest, count)? {
            self.went_on(guest, run.count);
            return Ok(run);
        }
        let window = self.window_for(guest);
        if window > count && !self.in_a_window(guest, window) {
            let run = refcounts.reserve(window)?;
            if self.windows.len() >= WINDOWS {
                self.close_oldest(refcounts);
            }
            self.windows.push_back(Window::new(guest, &run));
            if let Some(run) = self.take_from_window(refcounts, guest, count)? {
                self.went_on(guest, run.count);
                return Ok(run);
            }
        }
        // Not into the part of a window.
        let count = self.up_to_a_window(guest, count);
        let run = refcounts.allocate(count, None)?;
        self.went_on(guest, run.count);
        Ok(run)
    }

    fn take_from_window(
        &mut self,
        refcounts: &mut Refcounts,
        guest: u64,
        count: u64,
    ) -> Result<Option<Run>, Blocked> {
        let at = self.windows.iter().position(|w| (w.guest..w.guest + w.len).contains(&guest));
        let Some(at) = at else { return Ok(None) };
        let w = &mut self.windows[at];
        let from = guest - w.guest;
        let most = count.min(w.len - from);
        let n = (from..from + most).take_while(|at| w.is_free(*at)).count() as u64;
        if n == 0 {
            // Its place was used already, and has been freed since: somewhere else then.
            return Ok(None);
        }
        refcounts.claim(w.host + from, n)?;
        (from..from + n).for_each(|at| w.take(at));
        let run = Run { first: w.host + from, count: n, fresh: w.fresh };
        if w.left == 0 {
            self.windows.remove(at);
        }
        Ok(Some(run))
    }

    fn in_a_window(&self, guest: u64, count: u64) -> bool {
        self.windows.iter().any(|w| guest < w.guest + w.len && w.guest < guest + count)
    }

    fn up_to_a_window(&self, guest: u64, count: u64) -> u64 {
        let starts = self.windows.iter().map(|w| w.guest).filter(|start| *start > guest);
        starts.map(|start| start - guest).fold(count, u64::min)
    }

    /// The window for whoever goes on at `guest`, in clusters: a quarter of what was written up to here; 0 if nobody has been
    /// writing up to about here, at least twice.
    fn window_for(&self, guest: u64) -> u64 {
        let near = |f: &&Frontier| guest >= f.next && guest - f.next <= SLACK && f.hits >= 2;
        let Some(f) = self.frontiers.iter().find(near) else { return 0 };
        let bytes = ((f.written << self.cluster_bits) / 4).clamp(WINDOW_MIN, WINDOW_MAX);
        (bytes >> self.cluster_bits).clamp(1, CLUSTERS_MAX)
    }

    fn went_on(&mut self, guest: u64, count: u64) {
        let end = guest + count;
        let near = |f: &Frontier| guest <= f.next + SLACK && f.next <= end + SLACK;
        if let Some(at) = self.frontiers.iter().position(near)
            && let Some(mut f) = self.frontiers.remove(at)
        {
            f.next = f.next.max(end);
            f.hits += 1;
            f.written += count;
            self.frontiers.push_back(f);
            return;
        }
        if self.frontiers.len() >= FRONTIERS {
            self.frontiers.pop_front();
        }
        self.frontiers.push_back(Frontier { next: end, hits: 0, written: count });
    }

    fn close_oldest(&mut self, refcounts: &mut Refcounts) {
        let Some(w) = self.windows.pop_front() else { return };
        // Only what has not been taken: that may belong to somebody else by now.
        for at in (0..w.len).filter(|at| w.is_free(*at)) {
            refcounts.unreserve(w.host + at, 1);
        }
    }

    /// Gives everything that is set aside back. Whether there was anything.
    pub fn close(&mut self, refcounts: &mut Refcounts) -> bool {
        let any = !self.windows.is_empty();
        while !self.windows.is_empty() {
            self.close_oldest(refcounts);
        }
        any
    }
}
