//! One running queue: its ring, its slots, its notifications, and the fast lane.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use super::Shared;
use super::request::{Action, Disk, Slot, Slow, Transfer, bytes};
use crate::block::io::aligned_for;
use crate::block::{Dir, Map};
use crate::error::Errno;
use crate::mem::{GuestMap, Sg};
use crate::rt::grace::Participant;
use crate::rt::{IOV_MAX, Reactor, Rw};
use crate::virtio::blk::Status;
use crate::virtio::ring::{Broken, Ring};

/// The longest read of zeroes that is served on the spot, in bytes; longer ones take turns with others.
const ZERO_MAX: u64 = 256 << 10;

/// Whether a queue takes requests.
enum State {
    Running,
    /// The guest's lie was found; what is in flight completes, nothing more is taken.
    Broken,
    /// Waiting for what is in flight; then the next available index is sent.
    Stopping(SyncSender<u16>),
}

/// Everything about one running queue. Owned by its worker.
pub struct Queue {
    /// Its index in the device.
    pub index: u16,
    shared: Arc<Shared>,
    ring: Ring,
    slots: Box<[Slot]>,
    in_flight: u32,
    state: State,
    kick: Option<OwnedFd>,
    call: Option<File>,
    err: Option<File>,
    /// The reactor's key for the kick descriptor.
    pub watch: Option<usize>,
    /// The driver does not know FLUSH: every write must be stable (VIRTIO 1.3, 5.2.6.2).
    write_through: bool,
}

/// What became of a request that was taken.
pub enum Started {
    /// In the kernel, or done.
    Fast,
    /// To be carried out by a task.
    Slow(u16, Slow),
}

impl Queue {
    /// A queue on `ring`, not yet looked at.
    pub fn new(
        index: u16,
        shared: Arc<Shared>,
        ring: Ring,
        fds: [Option<OwnedFd>; 3],
        write_through: bool,
    ) -> Queue {
        let slots = (0..ring.size()).map(|_| Slot::default()).collect();
        let [kick, call, err] = fds;
        Queue {
            index,
            shared,
            ring,
            slots,
            in_flight: 0,
            state: State::Running,
            kick,
            call: call.map(notifier),
            err: err.map(notifier),
            watch: None,
            write_through,
        }
    }

    /// The kick descriptor; `None`: the ring must be polled.
    pub fn kick_fd(&self) -> Option<RawFd> {
        self.kick.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Replaces the call descriptor; a notification that the old one may have lost is repeated.
    pub fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call.map(notifier);
        self.notify();
    }

    /// Replaces the error descriptor.
    pub fn set_err(&mut self, err: Option<OwnedFd>) {
        self.err = err.map(notifier);
    }

    /// Whether nothing of the guest's memory is in use.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    /// Whether the guest has made requests available that will be taken.
    #[inline]
    pub fn has_avail(&self) -> bool {
        matches!(self.state, State::Running) && self.ring.has_avail()
    }

    /// The number of chains to take now, at most `room`.
    #[inline]
    pub fn available(&mut self, room: usize) -> u16 {
        if !matches!(self.state, State::Running) {
            return 0;
        }
        match self.ring.available() {
            Ok(n) => n.min(u16::try_from(room).unwrap_or(u16::MAX)),
            Err(broken) => {
                self.break_ring(broken.0);
                0
            }
        }
    }

    /// Takes the next chain and starts what it asks for. `None`: the ring broke.
    #[inline]
    pub fn take_one(&mut self, reactor: &mut Reactor, grace: &Participant) -> Option<Started> {
        match self.try_take(reactor, grace) {
            Ok(started) => Some(started),
            Err(broken) => {
                self.break_ring(broken.0);
                None
            }
        }
    }

    #[inline]
    fn try_take(&mut self, reactor: &mut Reactor, grace: &Participant) -> Result<Started, Broken> {
        let head = self.ring.pop()?;
        let slot = &mut self.slots[usize::from(head)];
        if slot.busy {
            return Err(Broken("a descriptor chain that is in use already"));
        }
        self.ring.read_chain(head, &mut slot.chain)?;
        let shared = &*self.shared;
        let disk = Disk {
            capacity: shared.capacity(),
            block: shared.geometry.logical_block,
            read_only: shared.geometry.read_only,
            serial: shared.serial.as_bytes(),
        };
        let action = slot.parse(&disk).map_err(Broken)?;
        slot.busy = true;
        self.in_flight += 1;
        if let Some(why) = slot.chain.bad {
            shared.report_malformed(self.index, why);
        }
        match action {
            Action::Finished(status) => self.finish(head, status),
            Action::Transfer { write, offset } => {
                if !self.start_transfer((reactor, grace), head, write, offset) {
                    return Ok(Started::Slow(head, self.slow(head, action)));
                }
            }
            _ => return Ok(Started::Slow(head, self.slow(head, action))),
        }
        Ok(Started::Fast)
    }

    /// The fast lane. Whether it could be taken.
    #[inline]
    fn start_transfer(
        &mut self,
        (reactor, grace): (&mut Reactor, &Participant),
        head: u16,
        write: bool,
        offset: u64,
    ) -> bool {
        let slot = &mut self.slots[usize::from(head)];
        let data = slot.data(write);
        let len = bytes(data);
        // The kernel answers with 31 bits; what is longer is split in the slow lane.
        let Ok(expected) = i32::try_from(len) else { return false };
        let dir = if write { Dir::Write } else { Dir::Read };
        let entry = grace.enter();
        let located = self.shared.root.locate(dir, offset, len);
        let stable = write && (self.write_through || !self.shared.writeback()) && !located.no_flush;
        let done = match located.map {
            // The tables that lead there must become stable, too.
            _ if stable && located.unstable => false,
            Map::File { file, offset: at }
                if data.len() <= IOV_MAX && aligned_for(file, at, len, data) =>
            {
                // SAFETY: the root node keeps the file open, the slot keeps the array as long as it is busy, the ring
                // keeps the guest's memory mapped; a queue is dropped or remapped only when nothing is in flight.
                let rw = unsafe { Rw::new(file, write, data, at, stable) };
                reactor.submit(file, &rw, payload(self.index, head));
                slot.transfer = Some(Transfer { write, offset, len: expected, entry });
                return true;
            }
            Map::Zero if !write && len <= ZERO_MAX => {
                Sg::new(data).zero();
                true
            }
            Map::Null => true,
            _ => false,
        };
        grace.leave(entry);
        if done {
            self.finish(head, Status::Ok);
        }
        done
    }

    fn slow(&mut self, head: u16, action: Action) -> Slow {
        let slot = &mut self.slots[usize::from(head)];
        let write = matches!(action, Action::Transfer { write: true, .. });
        let iov = match action {
            Action::Transfer { .. } => slot.data(write).to_vec(),
            _ => Vec::new(),
        };
        slot.doing = action.describe(bytes(&iov));
        Slow {
            root: Arc::clone(&self.shared.root),
            map: Arc::clone(self.ring.map()),
            iov,
            action,
            fua: self.write_through || !self.shared.writeback(),
        }
    }

    /// The kernel's answer to a fast-lane request. A transfer that failed or was cut short (end of file, signal) is done again
    /// in the slow lane, which knows what to make of it; an error of a stable write must be seen by the driver.
    #[inline]
    pub fn fast_done(&mut self, head: u16, result: i32, grace: &Participant) -> Option<Slow> {
        let Some(transfer) = self.slots[usize::from(head)].transfer.take() else {
            self.finish(head, Status::IoErr);
            return None;
        };
        // The slow lane finds the place anew.
        grace.leave(transfer.entry);
        if result == transfer.len {
            self.finish(head, Status::Ok);
            return None;
        }
        let Transfer { write, offset, .. } = transfer;
        Some(self.slow(head, Action::Transfer { write, offset }))
    }

    /// The slow lane's answer.
    pub fn slow_done(&mut self, head: u16, result: Result<(), Errno>) {
        let doing = self.slots[usize::from(head)].doing;
        let status = match result {
            Ok(()) => Status::Ok,
            Err(Errno::ENOTSUP) if doing.optional => Status::Unsupp,
            Err(e) => {
                self.shared.report(&doing, e);
                Status::IoErr
            }
        };
        self.finish(head, status);
    }

    #[inline]
    fn finish(&mut self, head: u16, status: Status) {
        let slot = &mut self.slots[usize::from(head)];
        slot.answer(status);
        slot.busy = false;
        self.in_flight -= 1;
        self.ring.push_used(head, slot.used_len);
    }

    /// Shows the guest what is done, and notifies it if it wants that.
    #[inline]
    pub fn publish(&mut self) {
        if self.ring.publish(self.in_flight == 0) {
            self.notify();
        }
    }

    fn notify(&self) {
        if let Some(call) = &self.call {
            signal(call);
        }
    }

    /// Leaves the rings to another device: it may not know how to ask for kicks.
    pub fn leave(&mut self) {
        self.ring.arm_kick();
        self.publish();
    }

    /// Asks for kicks, before the worker sleeps.
    pub fn arm(&mut self) {
        if matches!(self.state, State::Running) {
            self.ring.arm_kick();
        }
    }

    /// No kicks needed, the worker is awake.
    pub fn disarm(&mut self) {
        if matches!(self.state, State::Running) {
            self.ring.disarm_kick();
        }
    }

    /// Breaks the queue if its memory has been taken away, see [`crate::mem::sigbus`].
    pub fn check_memory(&mut self) {
        if matches!(self.state, State::Running) && self.ring.map().is_lost() {
            self.break_ring("the front end has cut the file of its memory short");
        }
    }

    fn break_ring(&mut self, why: &str) {
        log::warn!("export '{}': queue {} is broken: {why}", self.shared.id, self.index);
        self.state = State::Broken;
        if let Some(err) = &self.err {
            signal(err);
        }
    }

    /// Takes no more; once nothing is in flight, `answer` gets the next available index.
    pub fn stop(&mut self, answer: SyncSender<u16>) {
        self.state = State::Stopping(answer);
    }

    /// If the queue is being stopped and nothing is in flight: who waits, and the next available index.
    pub fn stopped(&self) -> Option<(&SyncSender<u16>, u16)> {
        match &self.state {
            State::Stopping(answer) if self.in_flight == 0 => {
                Some((answer, self.ring.next_avail()))
            }
            _ => None,
        }
    }

    /// Uses another memory map. Nothing may be in flight, unless the new map has all regions of the old.
    pub fn remap(&mut self, map: &Arc<GuestMap>) {
        if self.ring.remap(Arc::clone(map)).is_err() {
            self.break_ring("its rings are not in the new memory map");
        }
    }
}

/// A fast-lane token: queue and head.
pub fn payload(queue: u16, head: u16) -> u64 {
    u64::from(queue) << 16 | u64::from(head)
}

/// The queue and head of a fast-lane token.
#[expect(clippy::cast_possible_truncation, reason = "made by `payload`")]
pub fn from_payload(payload: u64) -> (u16, u16) {
    ((payload >> 16) as u16, payload as u16)
}

/// A descriptor for notifications. It must not block: a worker would wait for whoever holds the other end.
fn notifier(fd: OwnedFd) -> File {
    if let Err(e) = crate::sys::set_nonblocking(fd.as_fd()) {
        log::warn!("a descriptor for notifications: {e}");
    }
    File::from(fd)
}

/// Adds 1 to an event descriptor of the front end's; a full counter means that it has been told already.
fn signal(mut event: &File) {
    match event.write(&1u64.to_ne_bytes()) {
        Err(e) if e.kind() != ErrorKind::WouldBlock => log::debug!("notifying the front end: {e}"),
        _ => {}
    }
}
