//! A latency histogram: logarithmic with 64 linear steps per power of two, so at most 1.6 % off.
//! Fixed size, no allocation when recording.

/// Linear steps per power of two, as a power of two.
const STEP_BITS: u32 = 6;
const STEPS: usize = 1 << STEP_BITS;
/// Longest time told apart: 2^40 ns, a quarter of an hour.
const TOP_BITS: u32 = 40;
const BUCKETS: usize = STEPS * (TOP_BITS - STEP_BITS + 1) as usize;

/// Counts of values in ns.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64]>,
    count: u64,
    sum: u64,
    max: u64,
}

#[inline]
fn bucket(value: u64) -> usize {
    let value = value.min((1 << TOP_BITS) - 1);
    if value < STEPS as u64 {
        return value as usize;
    }
    let shift = value.ilog2() - STEP_BITS;
    STEPS * shift as usize + (value >> shift) as usize
}

/// Middle of a bucket.
fn middle(bucket: usize) -> u64 {
    if bucket < 2 * STEPS {
        return bucket as u64;
    }
    let shift = bucket / STEPS - 1;
    let low = ((STEPS + bucket % STEPS) as u64) << shift;
    low + (1 << shift) / 2
}

impl Histogram {
    /// An empty one.
    pub fn new() -> Self {
        Self { counts: vec![0; BUCKETS].into(), count: 0, sum: 0, max: 0 }
    }

    /// Counts a value.
    #[inline]
    pub fn record(&mut self, ns: u64) {
        self.counts[bucket(ns)] += 1;
        self.count += 1;
        self.sum += ns;
        self.max = self.max.max(ns);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        (self.count, self.sum, self.max) = (0, 0, 0);
    }

    /// Adds another one's counts.
    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(a, b)| *a += b);
        self.count += other.count;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    /// The value below which the given share (0..=1) of all values lies; 0 when empty.
    pub fn percentile(&self, share: f64) -> u64 {
        let rank = (share * self.count as f64).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (i, n) in self.counts.iter().enumerate() {
            seen += n;
            if seen >= rank {
                return middle(i).min(self.max);
            }
        }
        0
    }

    /// The mean; 0 when empty.
    pub fn mean(&self) -> u64 {
        self.sum / self.count.max(1)
    }

    /// The largest value.
    pub fn max(&self) -> u64 {
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_close() {
        let mut last = 0;
        for value in (0..4096).chain((12..40).flat_map(|b| [(1 << b) - 1, 1 << b, (1 << b) + 7])) {
            let b = bucket(value);
            assert!(b >= last || value < 4096, "bucket {b} of {value}");
            last = b;
            let off = middle(b).abs_diff(value);
            assert!(off * 64 <= value, "{value} is told as {}", middle(b));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_of_a_ramp() {
        let (mut h, mut other) = (Histogram::new(), Histogram::new());
        assert_eq!((h.percentile(0.5), h.mean()), (0, 0));
        (1..=5000).for_each(|v| h.record(v));
        (5001..=10000).for_each(|v| other.record(v));
        h.merge(&other);
        for (share, want) in [(0.5, 5000_u64), (0.99, 9900), (0.999, 9990), (1.0, 10000)] {
            assert!(h.percentile(share).abs_diff(want) * 50 <= want, "{share}");
        }
        assert_eq!((h.mean(), h.max()), (5000, 10000));
        h.clear();
        assert_eq!((h.percentile(1.0), h.max()), (0, 0));
    }
}
