//! How often each host cluster is referenced: a sparse array of counters of the smallest width that fits.
//!
//! Counters live in chunks of 4096. A chunk without references costs nothing but its slot; one with them starts with
//! 2 bits for each counter and is widened to 8, 16, 32, 64 bits when a counter does not fit. An image of 1 TiB with
//! 64 KiB clusters (16 Mi clusters, refcounts up to 3) takes 4 MiB and a slot table of 64 KiB. QEMU's limit of 2^31
//! clusters bounds it for hostile images: 512 MiB if every chunk is referenced.
#![forbid(unsafe_code)]

use super::super::layout::{refcount_get, refcount_set};

const CHUNK_BITS: u32 = 12;
/// Counters per chunk.
pub(super) const CHUNK: u64 = 1 << CHUNK_BITS;
/// log2 of the widths of counters, from the narrowest.
const ORDERS: [u32; 5] = [1, 3, 4, 5, 6];

struct Chunk {
    /// log2 of the width of a counter in bits.
    order: u32,
    bytes: Vec<u8>,
}

impl Chunk {
    fn new(order: u32) -> Chunk {
        Chunk { order, bytes: vec![0; 1 << (CHUNK_BITS + order - 3)] }
    }

    fn set(&mut self, index: usize, value: u64) {
        if value > u64::MAX >> (64 - (1 << self.order)) {
            let fits = |order: &&u32| value <= u64::MAX >> (64 - (1u32 << **order));
            let mut wide = Chunk::new(ORDERS.iter().find(fits).copied().unwrap_or(6));
            for i in 0..1 << CHUNK_BITS {
                let old = refcount_get(&self.bytes, self.order, i);
                refcount_set(&mut wide.bytes, wide.order, i, old);
            }
            *self = wide;
        }
        refcount_set(&mut self.bytes, self.order, index, value);
    }
}

/// Reference counters by cluster number.
pub(super) struct Counts {
    max: u64,
    chunks: Vec<Option<Chunk>>,
}

impl Counts {
    /// All zero; no counter ever exceeds `max`.
    pub(super) fn new(max: u64) -> Counts {
        Counts { max, chunks: Vec::new() }
    }

    /// All zero again.
    pub(super) fn clear(&mut self) {
        self.chunks.clear();
    }

    fn chunk(&self, cluster: u64) -> Option<&Chunk> {
        self.chunks.get(slot(cluster))?.as_ref()
    }

    /// The counter of `cluster`.
    pub(super) fn get(&self, cluster: u64) -> u64 {
        self.chunk(cluster).map_or(0, |c| refcount_get(&c.bytes, c.order, index(cluster)))
    }

    /// Whether all counters from `cluster` to the end of its chunk are known to be zero.
    pub(super) fn is_blank(&self, cluster: u64) -> bool {
        self.chunk(cluster).is_none()
    }

    /// Sets the counter of `cluster`.
    pub(super) fn set(&mut self, cluster: u64, value: u64) {
        let slot = slot(cluster);
        if self.chunks.len() <= slot {
            self.chunks.resize_with(slot + 1, || None);
        }
        let chunk = self.chunks[slot].get_or_insert_with(|| Chunk::new(ORDERS[0]));
        chunk.set(index(cluster), value.min(self.max));
    }

    /// Adds `n` references to `cluster`; false if the counter overflows, which leaves it at its maximum.
    pub(super) fn add(&mut self, cluster: u64, n: u64) -> bool {
        let old = self.get(cluster);
        let new = old.saturating_add(n).min(self.max);
        if new != old {
            self.set(cluster, new);
        }
        new - old == n
    }

    /// One past the last cluster that has a chunk.
    pub(super) fn end(&self) -> u64 {
        (self.chunks.len() as u64) << CHUNK_BITS
    }

    /// The first of `count` adjacent free clusters, none of them before `from`. There are always some at the end.
    pub(super) fn find_free(&self, from: u64, count: u64) -> u64 {
        let (mut start, mut at) = (from, from);
        while at - start < count && at < self.end() {
            if self.is_blank(at) {
                at = (at | (CHUNK - 1)) + 1;
            } else if self.get(at) == 0 {
                at += 1;
            } else {
                at += 1;
                start = at;
            }
        }
        start
    }
}

fn slot(cluster: u64) -> usize {
    usize::try_from(cluster >> CHUNK_BITS).expect("cluster numbers are below 2^32")
}

fn index(cluster: u64) -> usize {
    (cluster & (CHUNK - 1)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_widen_and_keep_their_neighbours() {
        let mut counts = Counts::new(u64::MAX);
        for (i, value) in [1, 3, 4, 255, 256, 65535, 65536, u64::from(u32::MAX), 1 << 40, u64::MAX]
            .into_iter()
            .enumerate()
        {
            counts.set(5000 + i as u64, value);
            assert_eq!((counts.get(5000), counts.get(5000 + i as u64)), (1, value));
        }
        assert_eq!((counts.get(0), counts.get(1 << 30)), (0, 0));
        assert!(counts.is_blank(0) && !counts.is_blank(5000));
        assert!(!counts.add(5009, 1));
        assert_eq!(counts.get(5009), u64::MAX);
    }

    #[test]
    fn counters_stop_at_the_maximum() {
        let mut counts = Counts::new(1);
        assert!(counts.add(7, 1));
        assert!(!counts.add(7, 1));
        assert!(!counts.add(8, 2));
        assert_eq!((counts.get(7), counts.get(8)), (1, 1));
    }

    #[test]
    fn free_clusters_are_found_in_gaps_and_at_the_end() {
        let mut counts = Counts::new(9);
        [0, 1, 3, 6].into_iter().for_each(|c| counts.set(c, 1));
        assert_eq!(counts.find_free(0, 1), 2);
        assert_eq!(counts.find_free(0, 2), 4);
        assert_eq!(counts.find_free(0, 3), 7);
        assert_eq!(counts.find_free(5000, 9000), 5000);
        assert_eq!(counts.find_free(6, 5000), 7);
    }
}
