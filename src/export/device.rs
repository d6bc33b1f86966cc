//! An export as the device of its front end: see [`Device`].
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

use super::queue::{Queue, Stop};
use super::worker::Command;
use super::{Export, cache, lock};
use crate::error::Errno;
use crate::mem::{GuestMap, RingLog};
use crate::vhost_user::{Device, QueueSetup};
use crate::virtio::blk::{CONFIG_LEN, CONFIG_WCE};
use crate::virtio::feature;
use crate::virtio::inflight::View;
use crate::virtio::queue::{RingAddrs, Virtqueue};
use crate::virtio::track::{self, Tracking};

impl Export {
    /// Goes on where a predecessor left `ring`, if there was one.
    pub(super) fn track(
        &self,
        index: u16,
        view: View,
        ring: &mut Virtqueue,
    ) -> std::result::Result<Tracking, Errno> {
        let tracking = Tracking::start(view, ring).map_err(|why| {
            log::warn!("export '{}': queue {index}: the in-flight region: {why}", self.id());
            Errno::EINVAL
        })?;
        if tracking.waiting() > 0 {
            let n = tracking.waiting();
            log::info!("export '{}': queue {index}: {n} requests are resubmitted", self.id());
        }
        Ok(tracking)
    }

    /// The queue that `setup` describes, for a worker.
    pub(super) fn make_queue(
        &self,
        index: u16,
        setup: QueueSetup,
    ) -> std::result::Result<Box<Queue>, Errno> {
        let addrs = RingAddrs { desc: setup.desc, avail: setup.avail, used: setup.used };
        let mut resumed = setup.base != cache::beginning(setup.features);
        let base = track::base(setup.inflight.as_ref(), setup.base);
        let mut ring = Virtqueue::new(setup.map, addrs, setup.size, base, setup.features)?;
        ring.set_log(setup.log);
        let tracker = setup.inflight.map(|view| self.track(index, view, &mut ring)).transpose()?;
        resumed |= tracker.as_ref().is_some_and(Tracking::recovered);
        let write_through = setup.features & feature(VIRTIO_BLK_F_FLUSH) == 0;
        if write_through && index == 0 && !self.shared.geometry.read_only {
            log::info!(
                "export '{}': the driver cannot flush: every write is made stable",
                self.id()
            );
        }
        let fds = [setup.kick, setup.call, setup.err];
        if setup.features & feature(VIRTIO_BLK_F_CONFIG_WCE) != 0
            && self.shared.cache.start(index, resumed)
        {
            log::info!(
                "export '{}': the guest may think that the cache is write-through: writes are made stable until it \
                 flushes",
                self.id()
            );
        }
        let disk = (Arc::clone(&self.shared), self.root_to_run()?);
        Ok(Box::new(Queue::new(index, disk, ring, tracker, fds, write_through)))
    }
}

impl Device for Export {
    fn features(&self) -> u64 {
        self.shared.geometry.features()
    }

    fn num_queues(&self) -> u16 {
        self.shared.geometry.num_queues
    }

    fn max_queue_size(&self) -> u16 {
        self.shared.geometry.queue_size
    }

    fn read_config(&self, offset: usize, to: &mut [u8]) {
        let config = self.shared.geometry.config(self.shared.capacity(), self.shared.writeback());
        for (i, byte) in to.iter_mut().enumerate() {
            *byte = config.get(offset.saturating_add(i)).copied().unwrap_or(0);
        }
        debug_assert_eq!(config.len(), CONFIG_LEN);
        self.shared.cache.told();
    }

    fn write_config(&self, offset: usize, from: &[u8]) {
        let wce = CONFIG_WCE.checked_sub(offset).and_then(|at| from.get(at));
        if let Some(wce) = wce {
            let writeback = wce & 1 != 0;
            if self.shared.cache.set(writeback) && !writeback {
                // What completed before may be volatile; from now on the driver will not flush.
                self.flush();
            }
            log::info!(
                "export '{}': cache is write-{}",
                self.id(),
                if writeback { "back" } else { "through" }
            );
        }
    }

    fn set_features(&self, acked: u64) {
        lock(&self.state).features = acked;
    }

    fn start_queue(&self, index: u16, setup: QueueSetup) -> std::result::Result<(), Errno> {
        let running = lock(&self.state).running.get(usize::from(index)).copied();
        if running != Some(false) || setup.size > self.max_queue_size() {
            return Err(Errno::EINVAL);
        }
        let turn = lock(&self.activation.turn);
        let queue = self.make_queue(index, setup)?;
        let inbox = self.worker(index, true)?.ok_or(Errno::EIO)?;
        self.send(&inbox, |done| Command::Start(queue, done), "start");
        let mut state = lock(&self.state);
        state.running[usize::from(index)] = true;
        state.unflushed = true;
        drop(state);
        drop(turn);
        self.watch_size();
        Ok(())
    }

    fn stop_queue(&self, index: u16) -> Option<u32> {
        self.end_queues(&[index], Stop::Drain).pop().flatten()
    }

    fn suspend_queue(&self, index: u16) -> Option<u32> {
        self.end_queues(&[index], Stop::Suspend).pop().flatten()
    }

    fn stop_queues(&self, indexes: &[u16]) -> Vec<Option<u32>> {
        self.end_queues(indexes, Stop::Drain)
    }

    fn leave_queues(&self, indexes: &[u16]) -> Vec<Option<u32>> {
        self.end_queues(indexes, Stop::Leave)
    }

    fn about_to_stop(&self) {
        // The flush when all have stopped has less to do then.
        self.flush();
    }

    fn set_call(&self, index: u16, call: Option<OwnedFd>) {
        self.command(index, |done| Command::SetCall(index, call, done));
    }

    fn set_err(&self, index: u16, err: Option<OwnedFd>) {
        self.command(index, |done| Command::SetErr(index, err, done));
    }

    fn set_log(&self, index: u16, log: Option<RingLog>) {
        self.command(index, |done| Command::SetLog(index, log, done));
    }

    fn set_memory(&self, map: Arc<GuestMap>, drain: bool) {
        for inbox in self.inboxes() {
            let map = Arc::clone(&map);
            self.send(&inbox, |done| Command::SetMemory(map, drain, done), "memory change");
        }
    }

    fn disconnected(&self) {
        self.shared.cache.disconnected();
        self.set_features(0);
        self.flush_stopped();
        self.deactivate_finally();
    }

    fn no_ring_runs(&self) {
        self.deactivate_if_auto();
    }
}
