//! SET_LOG_BASE, and what rings log.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{Answer, Session, queue};
use crate::err;
use crate::error::Result;
use crate::mem::RingLog;
use crate::vhost_user::memory;
use crate::vhost_user::message::*;

/// The dirty log ("Migration").
impl Session<'_> {
    /// SET_LOG_BASE, also while rings run. Its answer says that the log before is not written any more, and is the
    /// description of the log: rust-vmm wants those 16 bytes, QEMU any reply. A log that cannot be had leaves none, and QEMU does not
    /// notice: rings that must log come to rest until there is one, or nothing is to be logged any more. A guest that waits is
    /// better than one whose copy misses pages.
    pub(super) fn set_log(&mut self, m: &mut Message) -> Result<Answer> {
        let place = m.log_place()?;
        let log = m.take_fd().and_then(|fd| memory::log(place, fd));
        let outcome = log.as_ref().map(|_| ()).map_err(|e| err!("{e}"));
        self.log = Some(log);
        let lacks = |i: &usize| self.rings[*i].running && self.lacks_log(*i);
        for i in self.all().filter(lacks).collect::<Vec<_>>() {
            self.warn(&format!("queue {i}: it must log what it writes, and cannot: it waits"));
            self.halt(i);
        }
        self.switch_log();
        self.start_wanted();
        outcome.map(|()| if self.log_is_answered() { Answer::Log(place) } else { Answer::Done })
    }

    /// "VHOST_USER_SET_LOG_BASE": whether it has a reply in any case.
    pub(super) fn log_is_answered(&self) -> bool {
        self.protocol.contains(Protocol::LOG_SHMFD)
    }

    pub(super) fn has_log(&self) -> bool {
        matches!(self.log, Some(Ok(_)))
    }

    /// Whether ring `i` is to log data, and where it is to log its used ring.
    pub(super) fn logs(&self, i: usize) -> (bool, Option<u64>) {
        let data = self.features.is_some_and(|f| f & VHOST_F_LOG_ALL != 0);
        let used = self.rings[i].addr.filter(|a| a.flags & VRING_F_LOG != 0).map(|a| a.log);
        (data, used)
    }

    /// What ring `i` is to log now.
    pub(super) fn ring_log(&self, i: usize) -> Option<RingLog> {
        let Some(Ok(log)) = &self.log else { return None };
        let (data, used) = self.logs(i);
        (data || used.is_some()).then(|| RingLog { log: Arc::clone(log), data, used })
    }

    /// Whether ring `i` is to log and its log could not be had. Before any was given nobody asks for one: front ends that never
    /// migrate accept LOG_ALL, too.
    pub(super) fn lacks_log(&self, i: usize) -> bool {
        matches!(self.log, Some(Err(_))) && self.logs(i) != (false, None)
    }

    /// Running rings log as is wanted now. They do not stop for it.
    pub(super) fn switch_log(&self) {
        for i in self.all().filter(|i| self.rings[*i].running) {
            self.device.set_log(queue(i), self.ring_log(i));
        }
    }
}
