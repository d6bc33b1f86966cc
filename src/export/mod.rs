//! An export: the root of a graph, offered to a guest as a virtio-blk device with queues served by worker threads.
#![expect(unused_variables, reason = "skeleton")]

use std::sync::Arc;

use crate::block::{Graph, Node};
use crate::error::{Errno, Result};
use crate::mem::GuestMap;
use crate::vhost_user::{Device, QueueSetup};

/// What the user chose for an export.
#[derive(Clone, Debug)]
pub struct ExportConfig {
    /// Its id.
    pub id: String,
    /// Guests may write (`writable=on`).
    pub writable: bool,
    /// Every write is stable before it completes (`writethrough=on`).
    pub writethrough: bool,
    /// Queues offered.
    pub num_queues: u16,
    /// The largest ring accepted, in entries.
    pub queue_size: u16,
    /// Bytes, power of two, 512 to 2 MiB.
    pub logical_block_size: u32,
    /// At most 20 bytes.
    pub serial: String,
    /// Worker threads.
    pub threads: usize,
    /// The longest busy wait, in nanoseconds; 0 = never.
    pub poll_max_ns: u64,
}

/// A root node, its device configuration and its workers.
pub struct Export {
    root: Arc<Node>,
}

impl Export {
    /// Attaches to `node` (with the permissions that `config` implies).
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn new(graph: &Graph, node: &Arc<Node>, config: ExportConfig) -> Result<Arc<Export>> {
        todo!()
    }

    /// Stops all queues (drained), flushes the root node, gives up the permissions and ends the workers.
    pub fn close(&self) {}
}

impl Device for Export {
    fn features(&self) -> u64 {
        todo!()
    }
    fn num_queues(&self) -> u16 {
        todo!()
    }
    fn max_queue_size(&self) -> u16 {
        todo!()
    }
    fn read_config(&self, offset: usize, to: &mut [u8]) {
        todo!()
    }
    fn write_config(&self, offset: usize, from: &[u8]) {
        todo!()
    }
    fn set_features(&self, acked: u64) {
        todo!()
    }
    fn start_queue(&self, index: u16, setup: QueueSetup) -> std::result::Result<(), Errno> {
        todo!()
    }
    fn stop_queue(&self, index: u16) -> Option<u16> {
        todo!()
    }
    fn set_call(&self, index: u16, call: Option<std::os::fd::OwnedFd>) {
        todo!()
    }
    fn set_err(&self, index: u16, err: Option<std::os::fd::OwnedFd>) {
        todo!()
    }
    fn set_memory(&self, map: Arc<GuestMap>, drain: bool) {
        todo!()
    }
    fn disconnected(&self) {
        todo!()
    }
}
