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

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use std::collections::BTreeMap;

    use super::super::super::refcount::rig::{Rig, geometry};
    use super::*;

    /// The streams, the allocator, and where each guest cluster is.
    struct Bed {
        rig: Rig,
        streams: Streams,
        places: BTreeMap<u64, u64>,
        random: u64,
    }

    impl Bed {
        fn new(cluster_bits: u32, room: u64) -> Bed {
            let rig = Rig::new(geometry(cluster_bits, 4), 1, 0, room, 4);
            let streams = Streams::new(cluster_bits);
            Bed { rig, streams, places: BTreeMap::new(), random: 1 }
        }

        fn below(&mut self, n: u64) -> u64 {
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.random >> 33) % n
        }

        /// Clusters for a write; whether there was room for all of it.
        fn write(&mut self, guest: u64, count: u64) -> bool {
            let mut at = guest;
            while at < guest + count {
                let (streams, want) = (&mut self.streams, guest + count - at);
                let run = match self.rig.ask(|refs| streams.allocate(refs, at, want)) {
                    Some(run) => run,
                    // As whoever finds no room does.
                    None if self.streams.close(&mut self.rig.refs) => continue,
                    None => return false,
                };
                self.rig.check_run(run, want);
                self.rig.fill(run.first, run.count);
                for n in 0..run.count {
                    self.rig.model.insert(run.first + n, 1);
                    self.places.insert(at + n, run.first + n);
                }
                at += run.count;
            }
            true
        }

        fn free(&mut self, guest: u64) {
            if let Some(host) = self.places.remove(&guest) {
                self.rig.release(host);
            }
        }

        /// Closes the streams; everything that is not in use can be had then.
        fn close(mut self) {
            self.streams.close(&mut self.rig.refs);
            assert!(!self.streams.close(&mut self.rig.refs));
            while self.rig.allocate(1 << 20, None).is_some() {}
            let known = |c: &u64| self.rig.model.contains_key(c) || self.rig.metadata.contains(c);
            // Cluster 0 is the header.
            let lost: Vec<u64> = (1..self.rig.limit).filter(|c| !known(c)).collect();
            assert!(lost.is_empty(), "set aside for ever: {lost:?}");
        }

        /// How many pairs of neighbours of `[first, end)` are not neighbours on the host.
        fn breaks(&self, first: u64, end: u64) -> usize {
            let next = |n: &u64| self.places[n] + 1 != self.places[&(n + 1)];
            (first..end - 1).filter(next).count()
        }
    }

    #[test]
    fn queues_that_overtake_each_other_end_up_in_order() {
        let mut bed = Bed::new(16, 800);
        for n in 0..4 {
            bed.write(n, 1);
        }
        // Somebody else's clusters come in between.
        for batch in 1..100 {
            for n in [2, 0, 3, 1] {
                assert!(bed.write(batch * 4 + n, 1));
            }
            bed.write(50_000 + 1000 * batch, 1);
        }
        let breaks = bed.breaks(4, 400);
        // One per window, and the first steps.
        assert!(breaks < 12, "{breaks}");
        bed.close();
    }

    #[test]
    fn more_streams_than_windows() {
        let mut bed = Bed::new(16, 2500);
        let streams = 2 * WINDOWS as u64;
        for n in 0..30 {
            for stream in 0..streams {
                assert!(bed.write(stream * 10_000 + n, 1));
            }
        }
        assert_eq!(bed.streams.windows.len(), WINDOWS);
        bed.close();
    }

    /// A place of a window that was used and freed belongs to whoever gets it next.
    #[test]
    fn freed_and_written_again() {
        let mut bed = Bed::new(16, 300);
        for n in 0..40 {
            bed.write(n, 1);
        }
        assert!(!bed.streams.windows.is_empty());
        let old: Vec<u64> = (20..40).map(|n| bed.places[&n]).collect();
        (20..40).for_each(|n| bed.free(n));
        for n in 0..20 {
            assert!(bed.write(1000 + n * 7, 1));
        }
        assert!((0..20).any(|n| old.contains(&bed.places[&(1000 + n * 7)])));
        for n in 20..60 {
            assert!(bed.write(n, 1));
        }
        bed.close();
    }

    #[test]
    fn nothing_is_lost_whatever_happens() {
        for seed in 1..4 {
            let mut bed = Bed::new([9, 10, 16][seed as usize % 3], 200 + seed * 60);
            bed.random = seed;
            let mut heads = [0, 400, 800, 1200, 5000, 9000];
            for _ in 0..400 {
                let at = bed.below(6) as usize;
                match bed.below(10) {
                    0..6 => {
                        let count = 1 + bed.below(6);
                        (heads[at]..heads[at] + count).for_each(|n| bed.free(n));
                        bed.write(heads[at], count);
                        heads[at] += count;
                    }
                    6 => heads[at] = heads[at].saturating_sub(bed.random >> 56 & 63),
                    7..9 => {
                        let first = bed.below(2000);
                        (first..first + 20).for_each(|n| bed.free(n));
                    }
                    _ => drop(bed.streams.close(&mut bed.rig.refs)),
                }
            }
            bed.close();
        }
    }
}
