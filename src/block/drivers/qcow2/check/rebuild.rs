//! Builds new refcount structures from the references that were found.
//!
//! Everything is planned in memory first: which clusters become refcount blocks and which the refcount table. Only clusters
//! without any reference are taken, and the old structures count as referenced, so the image stays as it is until the
//! header is switched, which is one write inside one sector. Then the old structures are leaks.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::super::header::MAX_REFTABLE_SIZE;
use super::super::layout::{HostOffset, refcount_set};
use super::Check;
use super::counts::CHUNK;
use super::refcounts::Refcounts;
use crate::error::Errno;

/// Where `refcount_table_offset` is in the header; `refcount_table_clusters` follows.
const REFTABLE_FIELDS: u64 = 48;

/// New structures, as cluster numbers.
struct Plan {
    /// Refcount blocks by their index in the table.
    blocks: BTreeMap<u64, u64>,
    table: u64,
    table_clusters: u64,
}

impl Check<'_> {
    /// Replaces the refcount table and all refcount blocks.
    pub(super) async fn rebuild(&mut self) -> Result<(), Errno> {
        let plan = self.plan();
        if plan.table_clusters << self.g.cluster_bits > MAX_REFTABLE_SIZE {
            return self.rebuild_failed("ERROR allocating reftable", Errno(libc::EFBIG));
        }
        for (index, cluster) in &plan.blocks {
            let block = self.block_bytes(*index);
            if let Err(e) = self.disk.write(cluster << self.g.cluster_bits, &block).await {
                return self.rebuild_failed("ERROR writing refblock", e);
            }
        }
        let (table, offset) = (self.table_of(&plan), plan.table << self.g.cluster_bits);
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        if let Err(e) = self.disk.write(offset, &bytes).await {
            return self.rebuild_failed("ERROR writing reftable", e);
        }
        let clusters = u32::try_from(plan.table_clusters).map_err(|_| Errno(libc::EFBIG))?;
        if let Err(e) = self.switch_to(offset, clusters).await {
            return self.rebuild_failed("ERROR setting reftable", e);
        }
        self.header.refcount_table_offset = HostOffset(offset);
        self.header.refcount_table_clusters = clusters;
        self.refcounts = Refcounts::new(self.disk, self.g, table);
        self.metadata = None;
        // The file may have become longer.
        self.clusters = self.disk.len().div_ceil(self.g.cluster_size());
        Ok(())
    }

    fn rebuild_failed(&mut self, what: &str, e: Errno) -> Result<(), Errno> {
        self.watch.error(&format!("{what}: {e}"));
        self.report.check_errors += 1;
        Err(e)
    }

    async fn switch_to(&mut self, offset: u64, clusters: u32) -> Result<(), Errno> {
        let mut fields = offset.to_be_bytes().to_vec();
        fields.extend(clusters.to_be_bytes());
        self.disk.flush().await?;
        self.disk.write(REFTABLE_FIELDS, &fields).await?;
        self.disk.flush().await
    }

    fn plan(&mut self) -> Plan {
        let mut plan = Plan { blocks: BTreeMap::new(), table: 0, table_clusters: 0 };
        let end = self.refs.end();
        self.plan_blocks(&mut plan, 0, end);
        let per_cluster = self.g.cluster_size() / 8;
        loop {
            let last = plan.blocks.last_key_value().map_or(0, |(index, _)| *index);
            let needed = (last + 1).div_ceil(per_cluster);
            if needed <= plan.table_clusters {
                return plan;
            }
            // The clusters of a table that became too small are taken back.
            self.mark(plan.table, plan.table_clusters, 0);
            plan.table = self.refs.find_free(0, needed);
            plan.table_clusters = needed;
            self.mark(plan.table, needed, 1);
            let start = plan.table;
            self.plan_blocks(&mut plan, start, start + needed);
        }
    }

    fn mark(&mut self, cluster: u64, count: u64, references: u64) {
        for cluster in cluster..cluster + count {
            self.refs.set(cluster, references);
        }
    }

    /// Finds a cluster for each refcount block that clusters in use from `start` to `end` need and that is not there.
    fn plan_blocks(&mut self, plan: &mut Plan, start: u64, mut end: u64) {
        let bits = self.g.refblock_bits();
        let (mut cluster, mut free) = (start, 0);
        while cluster < end {
            if self.refs.is_blank(cluster) {
                cluster = (cluster | (CHUNK - 1)) + 1;
                continue;
            }
            let index = cluster >> bits;
            if self.refs.get(cluster) == 0 {
                cluster += 1;
                continue;
            }
            plan.blocks.entry(index).or_insert_with(|| {
                // Where it can describe itself, if there is room: then no other block becomes necessary.
                free = self.refs.find_free(free.max(index << bits), 1);
                self.refs.set(free, 1);
                end = end.max(free + 1);
                free
            });
            cluster = (index + 1) << bits;
        }
    }

    fn block_bytes(&self, index: u64) -> Vec<u8> {
        let mut block = vec![0; 1 << self.g.cluster_bits];
        let first = index << self.g.refblock_bits();
        for i in 0..self.g.refblock_entries() {
            let count = self.refs.get(first + i);
            if count > 0 {
                refcount_set(&mut block, self.g.refcount_order, i as usize, count);
            }
        }
        block
    }

    fn table_of(&self, plan: &Plan) -> Vec<u64> {
        let entries = plan.table_clusters << (self.g.cluster_bits - 3);
        let entry = |index| plan.blocks.get(&index).map_or(0, |c| c << self.g.cluster_bits);
        (0..entries).map(entry).collect()
    }
}
