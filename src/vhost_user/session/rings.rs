//! Rings: their messages, and when they start and stop.
#![forbid(unsafe_code)]

use super::{Answer, OWN, Session, queue};
use crate::err;
use crate::error::Result;
use crate::vhost_user::Device;
use crate::vhost_user::message::*;
use crate::vhost_user::ring::{Kick, duplicate};
use crate::virtio::queue::{is_packed, is_size};

/// Rings.
impl Session<'_> {
    /// Starts ring `i` if it is wanted and does not run.
    pub(super) fn start(&mut self, i: usize) -> Result<()> {
        let log = self.ring_log(i);
        let ring = &self.rings[i];
        let Some(features) = self.features.map(|f| f & !OWN) else { return Ok(()) };
        let can = !self.map.regions().is_empty() && !self.lacks_log(i);
        if ring.running || !ring.is_wanted() || !can {
            return Ok(());
        }
        self.check_ring(i)?;
        let ring = &mut self.rings[i];
        let packed = is_packed(features);
        let fail = |e: &dyn std::fmt::Display| err!("queue {i}: cannot start: {e}");
        let mut setup = ring.setup(&self.map, features, log).map_err(|e| fail(&e))?;
        let area = self.inflight.as_ref();
        setup.inflight = area.and_then(|area| area.view(queue(i), ring.size, packed));
        let untracked = setup.inflight.is_none() && self.inflight.is_some();
        log::debug!("{}: queue {i} starts at {:#x} of {}", self.name, setup.base, ring.size);
        self.device.start_queue(queue(i), setup).map_err(|e| fail(&e))?;
        ring.running = true;
        if untracked {
            // The front end chose what is tracked: such a ring runs, as libvhost-user has it. QEMU asks for all its queues.
            self.warn(&format!(
                "queue {i}: no place in the in-flight region: a crash here would lose its requests"
            ));
        }
        Ok(())
    }

    /// Whether a ring like `i` can run in this memory.
    pub(in crate::vhost_user) fn check_ring(&self, i: usize) -> Result<()> {
        let ring = &self.rings[i];
        if !is_size(ring.size, self.is_packed()) {
            return Err(err!("queue {i}: {} entries: not a power of two", ring.size));
        }
        if !ring.is_mapped(&self.map, self.is_packed()) {
            return Err(err!("queue {i}: its addresses are not in guest memory"));
        }
        Ok(())
    }

    pub(super) fn start_or_warn(&mut self, i: usize) {
        if let Err(e) = self.start(i) {
            self.warn(e.message());
        }
    }

    pub(super) fn start_wanted(&mut self) {
        for i in self.all() {
            self.start_or_warn(i);
        }
    }

    /// Stops ring `i` if it runs: no request is in flight afterwards, and the ring knows where to go on.
    pub(super) fn halt(&mut self, i: usize) {
        self.end(i, |device, queue| device.stop_queue(queue));
    }

    /// Stops ring `i` for a front end that asked for that: as [`Session::halt`], or, if GET_VRING_BASE_INFLIGHT is
    /// negotiated, at once; then requests may stay in the in-flight region, and no memory of the guest's is in use. That
    /// feature is about GET_VRING_BASE, but QEMU disables all rings before, and would wait there.
    pub(super) fn halt_as_asked(&mut self, i: usize) {
        if self.protocol.contains(Protocol::GET_VRING_BASE_INFLIGHT) {
            self.end(i, |device, queue| device.suspend_queue(queue));
        } else {
            self.halt(i);
        }
    }

    pub(super) fn end(&mut self, i: usize, stop: impl FnOnce(&dyn Device, u16) -> Option<u32>) {
        if self.rings[i].running {
            let base = stop(self.device, queue(i));
            self.halted(i, base);
        }
    }

    pub(super) fn halted(&mut self, i: usize, base: Option<u32>) {
        self.rings[i].running = false;
        match base {
            Some(base) => self.rings[i].base = Some(base),
            None => self.warn(&format!("queue {i}: it had stopped by itself")),
        }
    }

    /// The same for all: they do not wait for each other.
    pub(super) fn halt_all(&mut self) {
        self.end_all(|device, queues| device.stop_queues(queues));
    }

    pub(super) fn end_all(&mut self, stop: impl FnOnce(&dyn Device, &[u16]) -> Vec<Option<u32>>) {
        let running: Vec<usize> = self.all().filter(|i| self.rings[*i].running).collect();
        if running.is_empty() {
            return;
        }
        let queues: Vec<u16> = running.iter().map(|i| queue(*i)).collect();
        let bases = stop(self.device, &queues);
        for (i, base) in running.into_iter().zip(bases) {
            self.halted(i, base);
        }
    }

    /// What GET_VRING_BASE does, also for a front end that describes a running ring anew without saying so.
    pub(super) fn stop(&mut self, i: usize) {
        self.halt(i);
        self.rings[i].kick = None;
    }

    pub(super) fn get_base(&mut self, state: VringState) -> Result<Answer> {
        let i = self.ring(state.index)?;
        self.halt_as_asked(i);
        self.stop(i);
        let num = self.rings[i].base(self.is_packed());
        Ok(Answer::State(VringState { index: state.index, num }))
    }

    pub(super) fn set_size(&mut self, state: VringState) -> Result<()> {
        let i = self.ring(state.index)?;
        let max = self.device.max_queue_size();
        // Before the features are known it may be either kind of ring.
        let may_be =
            |n| is_size(n, true) && (self.features.is_none() || is_size(n, self.is_packed()));
        let size = u16::try_from(state.num).ok().filter(|n| may_be(*n) && *n <= max);
        let size = size.ok_or_else(|| {
            err!("queue {i}: {} entries: not a power of two, at most {max}", state.num)
        })?;
        if self.rings[i].size != size {
            self.stop_if_running(i, "another size");
            self.rings[i].size = size;
        }
        Ok(())
    }

    pub(super) fn set_base(&mut self, state: VringState) -> Result<()> {
        let i = self.ring(state.index)?;
        if self.features.is_some() && !self.is_packed() && state.num > u16::MAX.into() {
            return Err(err!("queue {i}: {:#x} is not an index", state.num));
        }
        self.stop_if_running(i, "another base");
        self.rings[i].base = Some(state.num);
        Ok(())
    }

    pub(super) fn stop_if_running(&mut self, i: usize, why: &str) {
        if self.rings[i].running {
            self.warn(&format!("queue {i}: {why} while it runs: it stops until it is kicked"));
            self.stop(i);
        }
    }

    /// SET_VRING_ADDR. On a running ring QEMU sends it with other flags when logging goes on or off; with other
    /// addresses the ring is drained and goes on there.
    pub(super) fn set_addr(&mut self, index: u32, addr: VringAddr) -> Result<()> {
        let i = self.ring(index)?;
        let parts = |a: VringAddr| (a.desc, a.avail, a.used);
        let before = self.rings[i].addr;
        let ran = self.rings[i].running;
        if before.map(parts) != Some(parts(addr)) {
            self.halt(i);
        }
        self.rings[i].addr = Some(addr);
        if before != Some(addr) && self.rings[i].running && self.has_log() {
            self.device.set_log(queue(i), self.ring_log(i));
        }
        // A ring that was kicked before may have lacked this alone. If its memory is still to come, that is no error.
        if ran || self.rings[i].is_mapped(&self.map, self.is_packed()) {
            self.start(i)
        } else {
            Ok(())
        }
    }

    /// SET_VRING_ENABLE. cloud-hypervisor pauses a guest with a 0 alone: then the ring is drained before the answer, and
    /// a 1 goes on where it stopped.
    pub(super) fn enable(&mut self, state: VringState) -> Result<()> {
        let i = self.ring(state.index)?;
        match state.num {
            0 => {
                self.halt_as_asked(i);
                self.rings[i].enabled = false;
                Ok(())
            }
            1 => {
                self.rings[i].enabled = true;
                self.start(i)
            }
            n => Err(err!("queue {i}: {n} is neither 0 nor 1")),
        }
    }

    pub(super) fn set_kick(&mut self, m: &mut Message) -> Result<()> {
        let (index, fd) = m.vring_fd()?;
        let i = self.ring(index)?;
        self.halt(i);
        self.rings[i].kick = Some(fd.map_or(Kick::Poll, Kick::Event));
        self.start(i)
    }

    pub(super) fn set_call(&mut self, m: &mut Message) -> Result<()> {
        let (index, fd) = m.vring_fd()?;
        let i = self.ring(index)?;
        if self.rings[i].running {
            self.device.set_call(queue(i), fd.as_ref().map(duplicate).transpose()?);
        }
        self.rings[i].call = fd;
        Ok(())
    }

    pub(super) fn set_err(&mut self, m: &mut Message) -> Result<()> {
        let (index, fd) = m.vring_fd()?;
        let i = self.ring(index)?;
        if self.rings[i].running {
            self.device.set_err(queue(i), fd.as_ref().map(duplicate).transpose()?);
        }
        self.rings[i].err = fd;
        Ok(())
    }
}
