//! Latencies, in buckets whose bounds lie half an octave apart: 256 ns, 384 ns, 512 ns, 768 ns ... 17 s.
#![forbid(unsafe_code)]

use super::counter::Counter;

/// The bits of the first bound, 256 ns: shorter than any request.
const FIRST_BITS: u32 = 8;
/// Buckets with a bound; the last bound is 2^34 ns.
pub const BOUNDS: usize = 53;

/// One writer's latencies.
#[derive(Debug)]
pub struct Histogram {
    /// The last one has no bound.
    buckets: [Counter; BOUNDS + 1],
    /// Of all, in nanoseconds.
    sum: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: std::array::from_fn(|_| Counter::default()), sum: Counter::default() }
    }
}

/// The upper bound of bucket `i`, in nanoseconds; it belongs to the bucket.
pub fn bound(i: usize) -> u64 {
    (2 + (i as u64 & 1)) << (FIRST_BITS as usize - 1 + i / 2)
}

/// The bucket of `ns`.
#[inline]
fn bucket(ns: u64) -> usize {
    let below = ns.saturating_sub(1);
    if below >> FIRST_BITS == 0 {
        return 0;
    }
    let octave = below.ilog2();
    let half = (below >> (octave - 1)) & 1;
    (((octave - FIRST_BITS) * 2) as usize + half as usize + 1).min(BOUNDS)
}

impl Histogram {
    /// `n` requests took `ns` nanoseconds each. For the one writer.
    #[inline]
    pub fn record(&self, ns: u64, n: u64) {
        self.buckets[bucket(ns)].add(n);
        self.sum.add(ns.wrapping_mul(n));
    }

    /// The requests of each bucket, and the sum of all in nanoseconds; each read at a moment of its own.
    pub fn read(&self) -> ([u64; BOUNDS + 1], u64) {
        (std::array::from_fn(|i| self.buckets[i].get()), self.sum.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_latency_is_in_the_first_bucket_that_bounds_it() {
        assert_eq!(bound(0), 256);
        assert_eq!(bound(1), 384);
        assert_eq!(bound(BOUNDS - 1), 1 << 34);
        let near = |i: usize| [bound(i) - 1, bound(i), bound(i) + 1];
        for ns in (0..BOUNDS).flat_map(near).chain([0, 1, 2, u64::MAX]) {
            let first = (0..BOUNDS).find(|i| ns <= bound(*i)).unwrap_or(BOUNDS);
            assert_eq!(bucket(ns), first, "{ns}");
        }
    }

    #[test]
    fn counts_and_sums() {
        let h = Histogram::default();
        h.record(256, 2);
        h.record(1_000_000_000_000, 1);
        let (buckets, sum) = h.read();
        assert_eq!((buckets[0], buckets[BOUNDS], sum), (2, 1, 1_000_000_000_512));
    }
}
