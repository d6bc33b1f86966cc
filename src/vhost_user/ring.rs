//! What the session knows of one ring: what the front end has said of it so far, and whether the device runs it.
//!
//! "Vhost-user Protocol: Ring states" has two independent states. *Enabled* is [`Ring::enabled`]. *Started* is that
//! [`Ring::kick`] is there: a ring is started by SET_VRING_KICK (not by the first notification, which may have been
//! sent before; the device looks at the ring at once), and stopped by GET_VRING_BASE, which takes the kick away. The device
//! runs the ring exactly while it is started and enabled and everything it needs is known.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::QueueSetup;
use super::message::VringAddr;
use crate::err;
use crate::error::Result;
use crate::mem::{GuestMap, RingLog};
use crate::virtio::queue::{RingAddrs, first_base, is_packed};

/// How the driver notifies of new requests.
pub(super) enum Kick {
    /// By this event.
    Event(OwnedFd),
    /// Not at all: we poll.
    Poll,
}

/// One ring. All of it survives a stop, except the kick.
#[derive(Default)]
pub(super) struct Ring {
    /// Entries; 0 if the front end has not said yet.
    pub size: u16,
    pub addr: Option<VringAddr>,
    /// Where it goes on (as [`QueueSetup::base`]), while it does not run; `None`: where a fresh one begins.
    pub base: Option<u32>,
    pub kick: Option<Kick>,
    pub call: Option<OwnedFd>,
    pub err: Option<OwnedFd>,
    pub enabled: bool,
    /// The device runs it.
    pub running: bool,
}

impl Ring {
    /// Whether the front end has said everything that is needed and wants it to run.
    pub(super) fn is_wanted(&self) -> bool {
        self.enabled && self.size != 0 && self.addr.is_some() && self.kick.is_some()
    }

    /// Whether the whole ring lies in `map`, properly aligned, as the device's ring wants it.
    pub(super) fn is_mapped(&self, map: &GuestMap, packed: bool) -> bool {
        let Some(VringAddr { desc, avail, used, .. }) = self.addr else { return false };
        RingAddrs { desc, avail, used }.resolve(map, self.size, packed).is_ok()
    }

    /// What GET_VRING_BASE answers.
    pub(super) fn base(&self, packed: bool) -> u32 {
        self.base.unwrap_or(first_base(packed))
    }

    /// What the device needs to run it. Descriptors are duplicated: the ring may be started again.
    ///
    /// # Errors
    /// If a part is missing, or there is no room for more descriptors.
    pub(super) fn setup(
        &self,
        map: &Arc<GuestMap>,
        features: u64,
        log: Option<RingLog>,
    ) -> Result<QueueSetup> {
        let (Some(addr), Some(kick)) = (self.addr, &self.kick) else {
            return Err(err!("addresses or kick are missing"));
        };
        let kick = match kick {
            Kick::Event(fd) => Some(duplicate(fd)?),
            Kick::Poll => None,
        };
        Ok(QueueSetup {
            map: Arc::clone(map),
            size: self.size,
            desc: addr.desc,
            avail: addr.avail,
            used: addr.used,
            base: self.base(is_packed(features)),
            inflight: None,
            features,
            kick,
            call: self.call.as_ref().map(duplicate).transpose()?,
            err: self.err.as_ref().map(duplicate).transpose()?,
            log,
        })
    }

    /// Forgets everything but the descriptors for calls and errors: QEMU gives the latter once per connection, before
    /// it resets the device for the first time. Must not run.
    pub(super) fn reset(&mut self) {
        *self = Ring { call: self.call.take(), err: self.err.take(), ..Ring::default() };
    }
}

pub(super) fn duplicate(fd: &OwnedFd) -> Result<OwnedFd> {
    fd.try_clone().map_err(|e| err!("cannot duplicate a file descriptor: {e}"))
}
