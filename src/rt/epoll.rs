//! Waiting without io_uring: an epoll set, edge-triggered, so that event descriptors need not be read.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crate::error::Errno;

/// Events taken per call; more come with the next.
const BATCH: usize = 64;

/// An epoll set.
pub struct Epoll {
    fd: OwnedFd,
    got: Vec<u64>,
}

impl Epoll {
    /// An empty set.
    ///
    /// # Errors
    /// What `epoll_create1` says.
    pub fn new() -> Result<Epoll, Errno> {
        // SAFETY: no pointers; a returned descriptor is ours.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(Errno::last());
        }
        // SAFETY: fresh from epoll_create1.
        Ok(Epoll { fd: unsafe { OwnedFd::from_raw_fd(fd) }, got: Vec::with_capacity(BATCH) })
    }

    fn control(&self, op: libc::c_int, fd: RawFd, token: u64) -> Result<(), Errno> {
        let events = (libc::EPOLLIN | libc::EPOLLET).cast_unsigned();
        let mut event = libc::epoll_event { events, u64: token };
        // SAFETY: `event` is read during the call.
        match unsafe { libc::epoll_ctl(self.fd.as_raw_fd(), op, fd, &raw mut event) } {
            0 => Ok(()),
            _ => Err(Errno::last()),
        }
    }

    /// Watches `fd` for input: an event with `token` for every write to it.
    ///
    /// # Errors
    /// What `epoll_ctl` says: EPERM for a file that cannot be polled.
    pub fn add(&self, fd: RawFd, token: u64) -> Result<(), Errno> {
        self.control(libc::EPOLL_CTL_ADD, fd, token)
    }

    /// Ends the watch of `fd`.
    pub fn remove(&self, fd: RawFd) {
        if let Err(e) = self.control(libc::EPOLL_CTL_DEL, fd, 0) {
            log::debug!("epoll: {e}");
        }
    }

    /// Blocks until an event comes or `timeout` is over; the events are kept for [`Epoll::take`].
    pub fn wait(&mut self, timeout: Option<Duration>) {
        let ms = timeout
            .map_or(-1, |t| i32::try_from(t.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX));
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; BATCH];
        // SAFETY: the array has room for BATCH events.
        let n =
            unsafe { libc::epoll_wait(self.fd.as_raw_fd(), events.as_mut_ptr(), BATCH as i32, ms) };
        // A negative result is EINTR: no events.
        self.got.extend(events.iter().take(usize::try_from(n).unwrap_or(0)).map(|e| e.u64));
    }

    /// Takes the tokens of the events that [`Epoll::wait`] saw.
    pub fn take(&mut self, mut event: impl FnMut(u64)) {
        self.got.drain(..).for_each(&mut event);
    }
}
