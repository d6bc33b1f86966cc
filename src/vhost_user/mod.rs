//! The vhost-user protocol: a listener, one session per connection, and the device it drives.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::Errno;
use crate::mem::GuestMap;

/// Everything a ring needs to run.
pub struct QueueSetup {
    /// The guest's memory.
    pub map: Arc<GuestMap>,
    /// Entries (a power of two).
    pub size: u16,
    /// The descriptor table, at a user address of the front end.
    pub desc: u64,
    /// The available ring, likewise.
    pub avail: u64,
    /// The used ring, likewise.
    pub used: u64,
    /// The next available index to take.
    pub base: u16,
    /// The features that the driver accepted (device and ring bits).
    pub features: u64,
    /// The driver's notifications; `None`: none will come (poll).
    pub kick: Option<OwnedFd>,
    /// Our notifications.
    pub call: Option<OwnedFd>,
    /// Where a broken ring is reported.
    pub err: Option<OwnedFd>,
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
    /// EINVAL if its addresses are not in the map, its size is not a power of two or too large, or it runs already.
    fn start_queue(&self, index: u16, setup: QueueSetup) -> Result<(), Errno>;
    /// Stops a ring: takes no new request, waits for those in flight, publishes them. Answers the next available index;
    /// `None` if it did not run. Afterwards no byte of guest memory is touched on its behalf.
    fn stop_queue(&self, index: u16) -> Option<u16>;
    /// Replaces the call descriptor, of a running ring too (a notification that got lost is repeated).
    fn set_call(&self, index: u16, call: Option<OwnedFd>);
    /// Replaces the error descriptor.
    fn set_err(&self, index: u16, err: Option<OwnedFd>);
    /// Replaces the memory map of all running rings. With `drain`, requests in flight are awaited first: afterwards the
    /// old map is not touched. Without (regions were only added), they go on. Returns when every ring has switched.
    fn set_memory(&self, map: Arc<GuestMap>, drain: bool);
    /// The front end is gone, all rings are stopped: flush, forget the driver's features.
    fn disconnected(&self);
}
