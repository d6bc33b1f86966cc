//! Compares the references that were found with the refcounts in the image, and corrects these.
#![forbid(unsafe_code)]

use super::counts::CHUNK;
use super::refcounts::{Trouble, Unaligned};
use super::{Check, Fix};
use crate::error::Errno;

/// Host ranges that are no longer used, as few as possible.
#[derive(Default)]
struct Freed {
    ranges: Vec<(u64, u64)>,
}

/// The most ranges that are given back to the file system; what is freed beyond stays allocated there, which is no
/// harm.
const FREED_MAX: usize = 1 << 16;

impl Freed {
    fn add(&mut self, cluster: u64) {
        let full = self.ranges.len() >= FREED_MAX;
        match self.ranges.last_mut() {
            Some((_, end)) if *end == cluster => *end += 1,
            _ if full => {}
            _ => self.ranges.push((cluster, cluster + 1)),
        }
    }
}

impl Check<'_> {
    /// Tells every difference, and repairs those that `fix` allows unless new structures are needed.
    pub(super) async fn compare(&mut self, fix: Fix) -> Result<(), Errno> {
        self.highest = 0;
        let (mut cluster, mut freed) = (0, Freed::default());
        let end = self.clusters;
        while cluster < end {
            let next = (cluster / CHUNK + 1) * CHUNK;
            if self.refs.is_blank(cluster) && self.blank_until(cluster, next.min(end)) {
                cluster = next;
                self.done += 1;
                continue;
            }
            for cluster in cluster..next.min(end) {
                self.compare_one(cluster, fix, &mut freed).await?;
            }
            self.step();
            cluster = next;
        }
        if self.report.corruptions == 0 && !freed.ranges.is_empty() {
            self.refcounts.flush().await?;
            for (start, end) in freed.ranges {
                let bits = self.g.cluster_bits;
                self.disk.discard(start << bits, (end - start) << bits).await;
            }
        }
        Ok(())
    }

    /// Whether no refcount from `cluster` to `end` is stored anywhere.
    fn blank_until(&self, cluster: u64, end: u64) -> bool {
        let per_block = self.g.refblock_entries();
        (cluster / per_block..=(end - 1) / per_block)
            .all(|block| self.refcounts.is_blank(block * per_block))
    }

    /// The refcount in the image; `None`: it cannot be read, which was said if `say`.
    pub(super) async fn stored(&mut self, cluster: u64, say: bool) -> Result<Option<u64>, Errno> {
        let errno = match self.refcounts.get(cluster).await {
            Ok(count) => return Ok(Some(count)),
            Err(Trouble::Io(e)) => e,
            Err(Trouble::Unaligned(Unaligned { offset, index })) => {
                let index = if index == 0 { "0".to_owned() } else { format!("{index:#x}") };
                // Not fatal for us: new structures are built.
                let what =
                    format!("Refblock offset {offset:#x} unaligned (reftable index: {index})");
                self.signal_corruption(false, &what).await?;
                Errno::EIO
            }
        };
        if say {
            self.watch.line(&format!("Can't get refcount for cluster {cluster}: {errno}"));
            self.report.check_errors += 1;
        }
        Ok(None)
    }

    async fn compare_one(
        &mut self,
        cluster: u64,
        fix: Fix,
        freed: &mut Freed,
    ) -> Result<(), Errno> {
        let Some(stored) = self.stored(cluster, true).await? else { return Ok(()) };
        let found = self.refs.get(cluster);
        if stored > 0 || found > 0 {
            self.highest = cluster;
        }
        if stored == found {
            return Ok(());
        }
        let too_low = stored < found;
        let mut repair = match fix {
            Fix::Nothing => false,
            Fix::Leaks => !too_low,
            Fix::All => true,
        };
        if stored == 0 {
            self.must_rebuild = true;
            repair = false;
        }
        let verb = match (repair, too_low) {
            (true, _) => "Repairing",
            (false, true) => "ERROR",
            (false, false) => "Leaked",
        };
        self.watch.line(&format!("{verb} cluster {cluster} refcount={stored} reference={found}"));
        if repair && self.refcounts.set(cluster, found).await.is_ok() {
            if found == 0 {
                freed.add(cluster);
            }
            match too_low {
                true => self.report.corruptions_fixed += 1,
                false => self.report.leaks_fixed += 1,
            }
        } else if too_low {
            self.report.corruptions += 1;
        } else {
            self.report.leaks += 1;
        }
        Ok(())
    }
}
