//! One running queue: its ring, its slots, its notifications, and the fast lane.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

mod rest;

use super::Shared;
use super::policy::Verdict;
use super::request::{Action, Disk, Slot, Slow, Transfer, bytes};
use crate::block::io::aligned_for;
use crate::block::{Dir, Map, Node};
use crate::error::Errno;
use crate::mem::{GuestMap, RingLog, Sg};
use crate::metrics::{Done, QueueMeter, Stamp};
use crate::rt::grace::Participant;
use crate::rt::{IOV_MAX, Reactor, Rw};
use crate::virtio::blk::Status;
use crate::virtio::queue::Virtqueue;
use crate::virtio::ring::Broken;
use crate::virtio::track::Tracking;

/// The longest read of zeroes that is served on the spot, in bytes; longer ones take turns with others.
const ZERO_MAX: u64 = 256 << 10;

/// Whether a queue takes requests.
enum State {
    Running,
    /// A request failed and is kept: nothing more is taken until it has been carried out.
    Held,
    /// The guest's lie was found; what is in flight completes, nothing more is taken.
    Broken,
    /// Waiting for what is in flight; then where the ring would go on is sent.
    Stopping(Stop, SyncSender<u32>),
}

/// How a queue is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// What is in flight completes; requests that failed and are kept have failed.
    Drain,
    /// The connection, or the program, ends: as `Drain`, but what is kept stays in flight for our successor.
    Leave,
    /// At once: whatever can be given up stays in flight, requests that are kept, that are to be resubmitted, that wait for
    /// nobody but us or can be taken back from the kernel. What is nearly done completes.
    Suspend,
}

/// Everything about one running queue. Owned by its worker.
pub struct Queue {
    /// Its index in the device.
    pub index: u16,
    shared: Arc<Shared>,
    /// The disk, as long as the queue runs.
    root: Arc<Node>,
    ring: Virtqueue,
    /// Tells our successor what is in flight.
    tracker: Option<Tracking>,
    slots: Box<[Slot]>,
    in_flight: u32,
    state: State,
    /// Requests that failed and are to be tried again.
    kept: Vec<(u16, Slow)>,
    /// Those, and those that are being tried again.
    held: u32,
    /// One of them will be tried again without being told to.
    retry: bool,
    kick: Option<OwnedFd>,
    call: Option<File>,
    err: Option<File>,
    /// The reactor's key for the kick descriptor.
    pub watch: Option<usize>,
    /// Nobody waits for its requests any more: set when it is suspended ([`Stop::Suspend`]).
    cancelled: Arc<AtomicBool>,
    /// The driver does not know FLUSH: every write must be stable (VIRTIO 1.3, 5.2.6.2).
    write_through: bool,
    /// Requests, at most, that may have been made for another process: they were there when the ring started.
    backlog: u16,
    meter: Arc<QueueMeter>,
    /// The root's driver makes use of knowing what comes next.
    looks_ahead: bool,
    /// Taken, and to be started when the next one has been.
    ahead: Option<Ready>,
    /// When this turn began.
    now: Stamp,
    /// This turn's answers.
    done: Done,
}

/// What became of a request that was taken.
pub enum Started {
    /// In the kernel, done, or about to be started.
    Fast,
    /// No more chains, after all.
    Nothing,
    /// To be carried out by a task.
    Slow(u16, Slow),
}

/// A transfer that was taken.
#[derive(Clone, Copy)]
struct Ready {
    head: u16,
    write: bool,
    offset: u64,
}

/// A request that was taken.
enum Taken {
    /// It, or one before it, or neither, is to be started now.
    Transfer(Option<Ready>),
    /// Something else, started.
    Other(Started),
}

impl Queue {
    /// A queue on `ring`, not yet looked at.
    pub fn new(
        index: u16,
        (shared, root): (Arc<Shared>, Arc<Node>),
        ring: Virtqueue,
        tracker: Option<Tracking>,
        fds: [Option<OwnedFd>; 3],
        write_through: bool,
    ) -> Queue {
        let slots = (0..ring.size()).map(|_| Slot::default()).collect();
        // What is wrong with the ring shows when requests are taken.
        let backlog = ring.available().unwrap_or(0);
        let [kick, call, err] = fds;
        let (meter, done) = (shared.meter.queue(index), Done::with_room(ring.size()));
        let looks_ahead = root.driver().prefetches();
        Queue {
            index,
            shared,
            root,
            ring,
            tracker,
            slots,
            in_flight: 0,
            state: State::Running,
            kept: Vec::new(),
            held: 0,
            retry: false,
            kick,
            call: call.map(notifier),
            err: err.map(notifier),
            watch: None,
            cancelled: Arc::default(),
            write_through,
            backlog,
            meter,
            looks_ahead,
            ahead: None,
            now: Stamp::default(),
            done,
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

    /// Logs writes to the guest's memory there from now on, and nowhere else.
    pub fn set_log(&mut self, log: Option<RingLog>) {
        self.ring.set_log(log);
    }

    /// Whether nothing of the guest's memory is in use.
    pub fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    /// Whether the guest has made requests available that will be taken.
    #[inline]
    pub fn has_avail(&self) -> bool {
        self.waiting() != 0 || (matches!(self.state, State::Running) && self.ring.has_avail())
    }

    /// The number of heads to resubmit; they come before all others, also if the queue is being stopped.
    #[inline]
    fn waiting(&self) -> u16 {
        self.tracker.as_ref().map_or(0, Tracking::waiting)
    }

    /// The number of chains to take now, at most `room`.
    #[inline]
    pub fn available(&mut self, room: usize) -> u16 {
        let available = match (self.waiting(), &self.state) {
            (0, State::Running) => self.ring.available(),
            (waiting, _) => Ok(waiting),
        };
        match available {
            Ok(n) => n.min(u16::try_from(room).unwrap_or(u16::MAX)),
            Err(broken) => {
                self.break_ring(broken.0);
                0
            }
        }
    }

    /// Whether something was taken that is still to be started.
    #[inline]
    pub fn is_ahead(&self) -> bool {
        self.ahead.is_some()
    }

    /// Takes the next chain if `take`, and starts what that asks for or, of a driver that looks ahead, the one before it: the
    /// last one is started without taking another. `None`: the ring broke.
    #[inline]
    pub fn go_on(
        &mut self,
        take: bool,
        reactor: &mut Reactor,
        grace: &Participant,
    ) -> Option<Started> {
        let ready = match if take { self.take() } else { Ok(Taken::Transfer(self.ahead.take())) } {
            Ok(Taken::Transfer(ready)) => ready,
            Ok(Taken::Other(started)) => return Some(started),
            Err(broken) => {
                self.break_ring(broken.0);
                return None;
            }
        };
        let Some(Ready { head, write, offset }) = ready else { return Some(Started::Fast) };
        if self.start_transfer((reactor, grace), head, write, offset) {
            return Some(Started::Fast);
        }
        Some(Started::Slow(head, self.slow(head, Action::Transfer { write, offset })))
    }

    #[inline]
    fn take(&mut self) -> Result<Taken, Broken> {
        let again = self.tracker.as_mut().and_then(|t| t.resubmit(&mut self.ring));
        let head = match again {
            Some(head) => head,
            None => match self.ring.pop()? {
                Some(head) => head,
                None => return Ok(Taken::Other(Started::Nothing)),
            },
        };
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
        slot.since = self.now;
        self.in_flight += 1;
        if again.is_none()
            && let Some(tracker) = &mut self.tracker
        {
            tracker.taken(head, &self.ring);
        }
        if let Some(why) = slot.chain.bad {
            shared.report_malformed(self.index, why);
        }
        if again.is_none() {
            if matches!(action, Action::Flush) && self.backlog == 0 {
                self.shared.guest_flushes();
            }
            self.backlog = self.backlog.saturating_sub(1);
        }
        Ok(match action {
            Action::Transfer { write, offset } => {
                let taken = Ready { head, write, offset };
                Taken::Transfer(if self.looks_ahead { self.look_ahead(taken) } else { Some(taken) })
            }
            Action::Finished(status) => {
                self.finish(head, status);
                Taken::Other(Started::Fast)
            }
            _ => Taken::Other(Started::Slow(head, self.slow(head, action))),
        })
    }

    /// What was taken before `taken`, whose entry comes to the processor meanwhile.
    #[inline]
    fn look_ahead(&mut self, taken: Ready) -> Option<Ready> {
        self.root.driver().prefetch(taken.offset);
        self.ahead.replace(taken)
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
        let through = self.is_write_through();
        let slot = &mut self.slots[usize::from(head)];
        let (data, len) = (slot.data(write), slot.data_len(write));
        // The kernel answers with 31 bits; what is longer is split in the slow lane.
        let Ok(expected) = i32::try_from(len) else { return false };
        let dir = if write { Dir::Write } else { Dir::Read };
        let entry = grace.enter();
        let located = self.root.locate(dir, offset, len);
        let stable = write && through && !located.no_flush;
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
                let volatile = write && !through && !located.no_flush;
                slot.transfer = Some(Transfer { write, offset, len: expected, volatile, entry });
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
        self.meter.slow.add(1);
        let slot = &mut self.slots[usize::from(head)];
        let write = matches!(action, Action::Transfer { write: true, .. });
        let iov = match action {
            Action::Transfer { .. } => slot.data(write).to_vec(),
            _ => Vec::new(),
        };
        slot.doing = action.describe(bytes(&iov));
        Slow {
            root: Arc::clone(&self.root),
            map: Arc::clone(self.ring.map()),
            iov,
            action,
            fua: self.is_write_through(),
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
            if transfer.volatile && self.is_write_through() {
                return Some(self.slow(head, Action::Flush));
            }
            self.finish(head, Status::Ok);
            return None;
        }
        if self.is_suspending() {
            self.leave_in_flight(head);
            return None;
        }
        let Transfer { write, offset, .. } = transfer;
        Some(self.slow(head, Action::Transfer { write, offset }))
    }

    /// Whether writes must be stable before they complete. Those that were begun before the driver chose that are flushed when
    /// they are done: the driver sends no flush for them any more.
    #[inline]
    fn is_write_through(&self) -> bool {
        self.write_through || !self.shared.writeback()
    }

    /// The slow lane's answer to `slow`; what is to be done next for the same request.
    pub fn slow_done(&mut self, head: u16, slow: Slow, result: Result<(), Errno>) -> Option<Slow> {
        let doing = self.slots[usize::from(head)].doing;
        let status = match result {
            Ok(()) if !slow.fua && slow.action.changes() && self.is_write_through() => {
                return Some(self.slow(head, Action::Flush));
            }
            Ok(()) => Status::Ok,
            Err(_) if self.is_suspending() => {
                self.leave_in_flight(head);
                return None;
            }
            Err(Errno::ENOTSUP) if doing.optional => Status::Unsupp,
            Err(e) => {
                let verdict = self.shared.on_error.verdict(&doing, e);
                match self.state {
                    State::Running | State::Held if verdict == Verdict::Stop => {
                        self.keep(head, slow, e);
                        return None;
                    }
                    State::Stopping(Stop::Leave, _) if verdict == Verdict::Stop => {
                        self.leave_in_flight(head);
                        return None;
                    }
                    _ => {}
                }
                self.shared.report(&doing, e);
                if verdict == Verdict::Ignore { Status::Ok } else { Status::IoErr }
            }
        };
        self.finish(head, status);
        self.let_go(head);
        None
    }

    fn set_state(&mut self, state: State) {
        let is_held = |state: &State| u32::from(matches!(state, State::Held));
        self.shared.holding.fetch_add(is_held(&state), Ordering::Relaxed);
        self.shared.holding.fetch_sub(is_held(&self.state), Ordering::Relaxed);
        self.state = state;
    }

    #[inline]
    fn finish(&mut self, head: u16, status: Status) {
        let slot = &mut self.slots[usize::from(head)];
        self.done.push(slot.kind, slot.since, slot.len, status == Status::Ok);
        slot.answer(status);
        self.ring.log_written(slot.data(false));
        self.ring.log_written(slot.status());
        slot.busy = false;
        self.in_flight -= 1;
        if let Some(tracker) = &mut self.tracker {
            tracker.done(head);
        }
        self.ring.push_used(head, slot.used_len);
    }

    /// Shows the guest what is done, and notifies it if it wants that. Whether there was anything.
    #[inline]
    pub fn publish(&mut self) -> bool {
        let idle = self.in_flight == 0;
        let notify = match &mut self.tracker {
            Some(tracker) => tracker.publish(&mut self.ring, idle),
            None => self.ring.publish(idle),
        };
        let answered = !self.done.is_empty();
        if notify {
            self.notify();
        } else if answered {
            self.meter.suppressed.add(1);
        }
        answered
    }

    /// What is taken from now on is taken at `now`.
    #[inline]
    pub fn begin_turn(&mut self, now: Stamp) {
        self.now = now;
    }

    /// What has been answered ends at `now`.
    #[inline]
    pub fn end_turn(&mut self, now: Stamp) {
        self.done.record(now, &self.meter);
        self.meter.in_flight.set(self.in_flight.into());
    }

    /// The guest's kick was noticed.
    pub fn kicked(&self) {
        self.meter.kicks.add(1);
    }

    /// At the start: a predecessor may have been killed between showing the guest what is done and notifying it.
    pub fn notify_recovered(&self) {
        if self.tracker.as_ref().is_some_and(Tracking::recovered) {
            self.notify();
        }
    }

    fn notify(&self) {
        if let Some(call) = &self.call {
            signal(call);
            self.meter.calls.add(1);
        }
    }

    /// Leaves the rings to another device: it may not know how to ask for kicks.
    pub fn leave(&mut self) {
        self.ring.arm_kick();
        self.publish();
        self.end_turn(self.now);
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
///
/// A known limit: the flag belongs to the open file, which the front end shares. One that takes it away again and fills the counter
/// blocks this worker in write(2): the queues of its own export that the worker serves, for workers are an export's own, but also
/// whoever waits for the worker (a stop, the end of the program). A duplicate shares the flag, an event cannot be opened anew by
/// /proc, RWF_NOWAIT is not for events, and asking before each write costs a system call and still races.
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
