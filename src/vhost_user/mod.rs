//! The vhost-user protocol: a listener, one session per connection, and the device it drives.
//!
//! [`server`] accepts, one front end at a time; `session` is the state machine of a connection, over `ring` (what the
//! front end said of a ring), `memory` (guest memory), `inflight` (what a successor needs after a crash) and [`notify`]
//! (configuration changes); `handover` gives a session to another process, in a [`parcel`], while `hold` makes it pause; [`message`] is the wire's vocabulary, `socket` the wire. The device behind it is a [`Device`].
//!
//! Why not the `vhost` crate's `BackendReqHandler`: it ends the connection on a message that it does not know and on every
//! request that it refuses; it demands orders of negotiation that real front ends do not keep (cloud-hypervisor
//! reconnects without asking for the protocol features, StratoVirt repeats SET_OWNER); it has no GET_STATUS and
//! SET_STATUS, which QEMU sends; and it leaves no moment at which a ring that is disabled could be drained before the
//! answer goes out.
//!
//! The rule for what a front end does wrong: as long as the stream is in step, the request is refused (a reply that is
//! not zero, where one is wanted) and the connection goes on. cloud-hypervisor takes a refusal as the end of the disk, so
//! nothing is refused that can be served.

mod device_state;
mod handover;
mod hold;
mod inflight;
mod memory;
pub mod message;
pub mod notify;
pub mod parcel;
mod ring;
pub mod server;
mod session;
pub(crate) mod socket;

pub use hold::Suspended;
pub use notify::{ConfigChange, Told};
pub use server::{Endpoint, Server};

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::Errno;
use crate::mem::{GuestMap, RingLog};
use crate::virtio::inflight::View;

/// Everything a ring needs to run.
pub struct QueueSetup {
    /// The guest's memory.
    pub map: Arc<GuestMap>,
    /// Entries (of a split ring a power of two).
    pub size: u16,
    /// The descriptor table, at a user address of the front end.
    pub desc: u64,
    /// The available ring, likewise; of a packed ring the driver's event suppression.
    pub avail: u64,
    /// The used ring, likewise; of a packed ring the device's event suppression.
    pub used: u64,
    /// Where it goes on, as [`Virtqueue::base`](crate::virtio::queue::Virtqueue::base) has it.
    pub base: u32,
    /// Where the requests in flight are kept for our successor; if it has been used, it knows better than `base`.
    pub inflight: Option<View>,
    /// The features that the driver accepted (device and ring bits).
    pub features: u64,
    /// The driver's notifications; `None`: none will come (poll).
    pub kick: Option<OwnedFd>,
    /// Our notifications.
    pub call: Option<OwnedFd>,
    /// Where a broken ring is reported.
    pub err: Option<OwnedFd>,
    /// Where writes to the guest's memory are logged; `None`: nowhere.
    pub log: Option<RingLog>,
}

/// What a session drives. Called by one session at a time; calls that must wait for requests block.
pub trait Device: Send + Sync {
    /// The feature bits offered to the driver: virtio-blk's and the rings', VERSION_1; without vhost-user's own.
    fn features(&self) -> u64;
    /// The number of queues offered.
    fn num_queues(&self) -> u16;
    /// The largest ring accepted, in entries.
    fn max_queue_size(&self) -> u16;
    /// Reads the configuration space; zeroes beyond its end.
    fn read_config(&self, offset: usize, to: &mut [u8]);
    /// The driver writes the configuration space; what is not writable is ignored.
    fn write_config(&self, offset: usize, from: &[u8]);
    /// The driver accepted these features. Holds for rings started later.
    fn set_features(&self, acked: u64);
    /// Starts a ring: takes it from `setup.base` on, and looks at it at once.
    ///
    /// # Errors
    /// EINVAL if its addresses are not in the map, its size cannot be or is too large, or it runs already.
    fn start_queue(&self, index: u16, setup: QueueSetup) -> Result<(), Errno>;
    /// Stops a ring: takes no new request, waits for those in flight, publishes them. Answers where it would go on (as
    /// [`QueueSetup::base`]); `None` if it did not run. Afterwards no byte of guest memory is touched on its behalf.
    fn stop_queue(&self, index: u16) -> Option<u32>;
    /// Stops a ring as [`Device::stop_queue`] does, but at once: requests that are not nearly done stay as they are in
    /// [`QueueSetup::inflight`], for the next start. Where there is none, or for a device that cannot, it is the same.
    fn suspend_queue(&self, index: u16) -> Option<u32> {
        self.stop_queue(index)
    }
    /// [`Device::stop_queue`] for several rings: they need not wait for each other.
    fn stop_queues(&self, indexes: &[u16]) -> Vec<Option<u32>> {
        indexes.iter().map(|index| self.stop_queue(*index)).collect()
    }
    /// [`Device::stop_queues`] at the end of a connection: requests that failed, and wait for the storage to work again, stay as
    /// they are in [`QueueSetup::inflight`] for the next one, where there is such a thing.
    fn leave_queues(&self, indexes: &[u16]) -> Vec<Option<u32>> {
        self.stop_queues(indexes)
    }
    /// All rings will be stopped in a moment, and the guest waits for them to start again: what can be done before should be.
    fn about_to_stop(&self) {}
    /// A message has been handled, and no ring runs; its answer goes out afterwards. A ring that only moves does not come by
    /// here between its stop and its start.
    fn no_ring_runs(&self) {}
    /// Replaces the call descriptor, of a running ring too (a notification that got lost is repeated).
    fn set_call(&self, index: u16, call: Option<OwnedFd>);
    /// Replaces the error descriptor.
    fn set_err(&self, index: u16, err: Option<OwnedFd>);
    /// Logs a running ring's writes to the guest's memory there, without a pause. When it returns, the log used before is not
    /// written any more; requests in flight are logged in the new one.
    fn set_log(&self, index: u16, log: Option<RingLog>);
    /// Replaces the memory map of all running rings. With `drain`, requests in flight are awaited first: afterwards the
    /// old map is not touched. Without (regions were only added), they go on. Returns when every ring has switched.
    fn set_memory(&self, map: Arc<GuestMap>, drain: bool);
    /// The front end is gone, all rings are stopped: flush, forget the driver's features.
    fn disconnected(&self);
}
