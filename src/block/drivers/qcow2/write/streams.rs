//! Where new clusters go, so that sequential writes stay sequential on disk.
//!
//! Single clusters are taken one after the other from the allocator. Who goes on where an earlier write has ended is a
//! stream: it gets a *window*, [`WINDOW`] clusters of the guest's disk laid out in the same order on the host, in which
//! every cluster has its place, in whatever order (from whichever queue) its writes arrive.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

use super::super::refcount::{Blocked, Refcounts, Run};

/// Clusters of a window; but never more than [`WINDOW_BYTES`].
const WINDOW: u64 = 64;
/// The most bytes of a window.
const WINDOW_BYTES: u64 = 8 << 20;
/// Windows open at a time; a further one closes the oldest.
const WINDOWS: usize = 8;
/// Places that are watched for somebody who goes on there.
const FRONTIERS: usize = 16;
/// A write this many clusters (of a window: bytes do not matter) before or after the place where the stream was still
/// belongs to it: queues overtake each other.
const SLACK: u64 = 16;

/// Guest clusters `[guest, guest + len)` at host clusters `[host, host + len)`; bit i of `taken`: in use.
struct Window {
    guest: u64,
    host: u64,
    len: u64,
    taken: u64,
    fresh: bool,
}

struct Frontier {
    next: u64,
    hits: u32,
}

/// The streams of an image.
pub struct Streams {
    window: u64,
    windows: VecDeque<Window>,
    frontiers: VecDeque<Frontier>,
}

impl Streams {
    /// For clusters of `1 << cluster_bits` bytes.
    pub fn new(cluster_bits: u32) -> Streams {
        let window = (WINDOW_BYTES >> cluster_bits).clamp(1, WINDOW);
        Streams { window, windows: VecDeque::new(), frontiers: VecDeque::new() }
    }

    /// Allocates host clusters for `[guest, guest + count)`, or for the first of them.
    pub fn allocate(
        &mut self,
        refcounts: &mut Refcounts,
        guest: u64,
        count: u64,
    ) -> Result<Run, Blocked> {
        if let Some(run) = self.from_window(refcounts, guest, count)? {
            self.went_on(guest, run.count);
            return Ok(run);
        }
        if self.is_stream(guest) && self.window > count && !self.in_a_window(guest, self.window) {
            let run = refcounts.reserve(self.window)?;
            if self.windows.len() >= WINDOWS {
                self.close_oldest(refcounts);
            }
            let Run { first: host, count: len, fresh } = run;
            self.windows.push_back(Window { guest, host, len, taken: 0, fresh });
            if let Some(run) = self.from_window(refcounts, guest, count)? {
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

    fn from_window(
        &mut self,
        refcounts: &mut Refcounts,
        guest: u64,
        count: u64,
    ) -> Result<Option<Run>, Blocked> {
        let at = self.windows.iter().position(|w| (w.guest..w.guest + w.len).contains(&guest));
        let Some(at) = at else { return Ok(None) };
        let w = &mut self.windows[at];
        let from = guest - w.guest;
        let free = (w.taken >> from).trailing_zeros();
        let n = count.min(w.len - from).min(u64::from(free));
        if n == 0 {
            // Its place was used already, and has been freed since: somewhere else then.
            return Ok(None);
        }
        refcounts.claim(w.host + from, n)?;
        w.taken |= (u64::MAX >> (64 - n)) << from;
        let run = Run { first: w.host + from, count: n, fresh: w.fresh };
        if w.taken.count_ones() == w.len as u32 {
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

    /// Whether somebody has been writing up to about here, at least twice.
    fn is_stream(&self, guest: u64) -> bool {
        let near = |f: &&Frontier| guest >= f.next && guest - f.next <= SLACK;
        self.frontiers.iter().find(near).is_some_and(|f| f.hits >= 2)
    }

    fn went_on(&mut self, guest: u64, count: u64) {
        let end = guest + count;
        let near = |f: &Frontier| guest <= f.next + SLACK && f.next <= end + SLACK;
        if let Some(at) = self.frontiers.iter().position(near)
            && let Some(mut f) = self.frontiers.remove(at)
        {
            f.next = f.next.max(end);
            f.hits += 1;
            self.frontiers.push_back(f);
            return;
        }
        if self.frontiers.len() >= FRONTIERS {
            self.frontiers.pop_front();
        }
        self.frontiers.push_back(Frontier { next: end, hits: 0 });
    }

    fn close_oldest(&mut self, refcounts: &mut Refcounts) {
        if let Some(w) = self.windows.pop_front() {
            refcounts.unreserve(w.host, w.len);
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
