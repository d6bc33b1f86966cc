//! One virtqueue of a running client: requests in, completions out.
//!
//! The convenient half of the crate: every request gets buffers of its own from guest memory, so it
//! allocates. The load generator drives `Ring` directly instead.
//!
//! A `Queue` owns what is in flight, can be moved to another thread, and never waits longer than its
//! time limit.

mod calls;

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::blk::{HEADER_LEN, Request};
use crate::error::{Error, Result, Status, io_err};
use crate::mem::{Buf, GuestMem};
use crate::packed::Packed;
use crate::ring::{DESC_LEN, Ring, Seg};
use crate::sys;

/// Offset of the status byte in a request's own buffer: the header's cache line, as in Linux.
const STATUS_AT: usize = 16;
/// Offset of the indirect table.
const TABLE_AT: usize = 64;
/// Polls between two looks at the clock.
const SPINS: u32 = 256;

/// How the data of the synchronous calls lies in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Alignment of each buffer.
    pub align: usize,
    /// Bytes past that alignment.
    pub skew: usize,
    /// Longest segment; longer data is cut.
    pub segment: usize,
}

impl Default for Layout {
    fn default() -> Self {
        Self { align: 4096, skew: 0, segment: 1 << 30 }
    }
}

/// A completed request.
#[derive(Debug)]
pub struct Done {
    /// What `submit` returned.
    pub tag: u64,
    /// Type of the request.
    pub kind: u32,
    /// Its status byte.
    pub status: Status,
    /// Bytes the device says it wrote, the status byte included.
    pub used_len: u32,
    /// Running index of its used element.
    pub used_idx: u16,
    /// The buffers the device read.
    pub out: Vec<Buf>,
    /// The buffers the device wrote.
    pub inn: Vec<Buf>,
}

impl Done {
    /// What the device wrote, all buffers together.
    #[must_use]
    pub fn data(&self) -> Vec<u8> {
        self.inn.iter().flat_map(Buf::to_vec).collect()
    }
}

#[derive(Debug)]
struct Slot {
    tag: u64,
    kind: u32,
    /// Header, status byte, indirect table.
    own: Buf,
    out: Vec<Buf>,
    inn: Vec<Buf>,
}

/// A ring's driver, of either kind.
#[derive(Debug)]
pub enum Driver {
    /// Of a split ring.
    Split(Ring),
    /// Of a packed ring.
    Packed(Packed),
}

/// The same call of either kind.
macro_rules! either {
    ($driver:expr, $ring:ident => $call:expr) => {
        match $driver {
            Driver::Split($ring) => $call,
            Driver::Packed($ring) => $call,
        }
    };
}

impl Driver {
    fn size(&self) -> u16 {
        match self {
            Driver::Split(ring) => ring.mem().size(),
            Driver::Packed(ring) => ring.size(),
        }
    }
}

impl From<Ring> for Driver {
    fn from(ring: Ring) -> Self {
        Driver::Split(ring)
    }
}

/// A virtqueue and what is in flight on it.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    mem: Arc<GuestMem>,
    ring: Driver,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    slots: Vec<Option<Slot>>,
    done: VecDeque<Done>,
    next_tag: u64,
    kicks: u64,
    calls: u64,
    /// Chains are built indirect.
    pub indirect: bool,
    /// Completions are polled for; otherwise waited for on the call eventfd.
    pub polling: bool,
    /// Limit of every wait.
    pub timeout: Duration,
    /// How the synchronous calls lay out their data.
    pub layout: Layout,
}

impl Queue {
    /// A queue over a ring, with fresh eventfds.
    ///
    /// # Errors
    /// `Io`
    pub fn new(
        index: u16,
        mem: &Arc<GuestMem>,
        ring: impl Into<Driver>,
        polling: bool,
    ) -> Result<Self> {
        let mut ring = ring.into();
        let size = usize::from(ring.size());
        let event =
            || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(io_err("eventfd"));
        if polling {
            either!(&mut ring, r => r.disarm());
        }
        Ok(Self {
            index,
            mem: Arc::clone(mem),
            ring,
            kick: event()?,
            call: event()?,
            err: event()?,
            slots: (0..size).map(|_| None).collect(),
            done: VecDeque::new(),
            next_tag: 0,
            kicks: 0,
            calls: 0,
            indirect: false,
            polling,
            timeout: crate::TIMEOUT,
            layout: Layout::default(),
        })
    }

    /// Number of this queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Guest memory, for buffers.
    #[must_use]
    pub fn mem(&self) -> &Arc<GuestMem> {
        &self.mem
    }

    /// The split ring's driver, for tests which build chains by hand.
    ///
    /// # Panics
    /// When the ring is packed.
    pub fn ring(&mut self) -> &mut Ring {
        let Driver::Split(ring) = &mut self.ring else { panic!("a packed ring") };
        ring
    }

    /// The packed ring's driver, likewise.
    ///
    /// # Panics
    /// When the ring is split.
    pub fn packed(&mut self) -> &mut Packed {
        let Driver::Packed(ring) = &mut self.ring else { panic!("a split ring") };
        ring
    }

    /// Asks for an interrupt on the next completion. True when one has come meanwhile.
    pub fn arm(&mut self) -> bool {
        either!(&mut self.ring, r => r.arm())
    }

    /// The kick eventfd.
    #[must_use]
    pub fn kick_fd(&self) -> &EventFd {
        &self.kick
    }

    /// The call eventfd.
    #[must_use]
    pub fn call_fd(&self) -> &EventFd {
        &self.call
    }

    /// The error eventfd.
    #[must_use]
    pub fn err_fd(&self) -> &EventFd {
        &self.err
    }

    /// Requests submitted whose completion was not taken yet.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.iter().flatten().count() + self.done.len()
    }

    /// Kicks sent so far.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Interrupts received so far, those still in the eventfd included.
    ///
    /// # Errors
    /// `Io`
    pub fn calls(&mut self) -> Result<u64> {
        self.drain_call(Duration::ZERO)?;
        Ok(self.calls)
    }

    fn drain_call(&mut self, timeout: Duration) -> Result<bool> {
        if !sys::wait_readable(&[self.call.as_raw_fd()], timeout).map_err(io_err("poll"))? {
            return Ok(false);
        }
        self.calls += self.call.read().map_err(io_err("read of call eventfd"))?;
        Ok(true)
    }

    /// Waits for an interrupt; returns the number received since the last look.
    ///
    /// # Errors
    /// `Timeout`
    pub fn wait_call(&mut self) -> Result<u64> {
        let before = self.calls;
        if !self.drain_call(self.timeout)? {
            return Err(Error::Timeout { what: "call", after: self.timeout });
        }
        Ok(self.calls - before)
    }

    /// Waits for the back end to report a broken ring on the error eventfd.
    ///
    /// # Errors
    /// `Timeout`
    pub fn wait_err(&mut self) -> Result<()> {
        if !sys::wait_readable(&[self.err.as_raw_fd()], self.timeout).map_err(io_err("poll"))? {
            return Err(Error::Timeout { what: "ring error event", after: self.timeout });
        }
        self.err.read().map_err(io_err("read of error eventfd")).map(drop)
    }

    /// Waits until the used index is at least `n` past `from`, without taking completions.
    ///
    /// # Errors
    /// `Timeout`
    pub fn wait_used_idx(&mut self, from: u16, n: u16) -> Result<()> {
        self.spin("used index", |q| {
            Ok((q.ring().mem().used_idx().wrapping_sub(from) >= n).then_some(()))
        })
    }

    /// Forgets everything in flight and starts the ring anew at `base`, as a rebooted guest does.
    pub fn reset(&mut self, base: u16) {
        either!(&mut self.ring, r => r.reset(base));
        self.slots.iter_mut().for_each(|s| *s = None);
        self.done.clear();
        if self.polling {
            either!(&mut self.ring, r => r.disarm());
        }
    }

    /// Puts a request in the ring without publishing it.
    ///
    /// # Errors
    /// `RingFull`, `OutOfMemory`
    pub fn push(&mut self, request: Request) -> Result<u64> {
        let Request { kind, ioprio, sector, out, inn } = request;
        let own = self.mem.alloc(TABLE_AT + (2 + out.len() + inn.len()) * DESC_LEN, 64)?;
        own.write(0, &kind.to_le_bytes());
        own.write(4, &ioprio.to_le_bytes());
        own.write(8, &sector.to_le_bytes());
        own.u8_at(STATUS_AT).store(Status::POISON, Ordering::Relaxed);
        let len = |b: &Buf| u32::try_from(b.len()).unwrap_or(u32::MAX);
        let mut segs = vec![Seg::out(own.gpa(), HEADER_LEN as u32)];
        segs.extend(out.iter().map(|b| Seg::out(b.gpa(), len(b))));
        segs.extend(inn.iter().map(|b| Seg::inn(b.gpa(), len(b))));
        segs.push(Seg::inn(own.gpa() + STATUS_AT as u64, 1));
        let head = if self.indirect {
            let table = self.mem.view(own.gpa() + TABLE_AT as u64, segs.len() * DESC_LEN);
            let table = table.ok_or(Error::OutOfMemory(own.len()))?;
            either!(&mut self.ring, r => r.add_indirect(&table, &segs))?
        } else {
            either!(&mut self.ring, r => r.add(&segs))?
        };
        self.next_tag += 1;
        let tag = self.next_tag;
        self.slots[usize::from(head)] = Some(Slot { tag, kind, own, out, inn });
        Ok(tag)
    }

    /// Puts a chain of any shape in the ring; its `Done` has status `NotWritten` and no buffers.
    ///
    /// # Errors
    /// `RingFull`
    pub fn push_chain(&mut self, segs: &[Seg]) -> Result<u64> {
        let own = self.mem.alloc(TABLE_AT, 64)?;
        own.fill(Status::POISON);
        let head = either!(&mut self.ring, r => r.add(segs))?;
        self.next_tag += 1;
        let (out, inn) = (Vec::new(), Vec::new());
        let slot = Slot { tag: self.next_tag, kind: u32::MAX, own, out, inn };
        self.slots[usize::from(head)] = Some(slot);
        Ok(self.next_tag)
    }

    /// Publishes what was pushed and kicks if the device asks for it. True when kicked.
    ///
    /// # Errors
    /// `Io`
    pub fn kick(&mut self) -> Result<bool> {
        either!(&mut self.ring, r => r.publish());
        let wanted = either!(&mut self.ring, r => r.needs_kick());
        if wanted {
            self.notify()?;
        }
        Ok(wanted)
    }

    /// Kicks, wanted or not.
    ///
    /// # Errors
    /// `Io`
    pub fn notify(&mut self) -> Result<()> {
        self.kicks += 1;
        self.kick.write(1).map_err(io_err("write of kick eventfd"))
    }

    /// `push` and `kick`.
    ///
    /// # Errors
    /// As these.
    pub fn submit(&mut self, request: Request) -> Result<u64> {
        let tag = self.push(request)?;
        self.kick()?;
        Ok(tag)
    }

    /// Takes a completion if there is one.
    ///
    /// # Errors
    /// `UnexpectedUsed`
    pub fn poll(&mut self) -> Result<Option<Done>> {
        match self.done.pop_front() {
            Some(done) => Ok(Some(done)),
            None => self.poll_ring(),
        }
    }

    fn poll_ring(&mut self) -> Result<Option<Done>> {
        let used_idx = either!(&self.ring, r => r.last_used());
        let Some(used) = either!(&mut self.ring, r => r.pop_used())? else { return Ok(None) };
        let slot = self.slots.get_mut(used.id as usize).and_then(Option::take);
        let Slot { tag, kind, own, out, inn } = slot.ok_or(Error::UnexpectedUsed(used.id))?;
        let status = Status::from_byte(own.u8_at(STATUS_AT).load(Ordering::Acquire));
        Ok(Some(Done { tag, kind, status, used_len: used.len, used_idx, out, inn }))
    }

    /// Waits for a completion.
    ///
    /// # Errors
    /// `Timeout`, `UnexpectedUsed`
    pub fn wait(&mut self) -> Result<Done> {
        match self.done.pop_front() {
            Some(done) => Ok(done),
            None => self.wait_ring(),
        }
    }

    fn wait_ring(&mut self) -> Result<Done> {
        if self.polling {
            return self.spin("completion", Self::poll_ring);
        }
        let deadline = Instant::now() + self.timeout;
        loop {
            if let Some(done) = self.poll_ring()? {
                return Ok(done);
            }
            if either!(&mut self.ring, r => r.arm()) {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.drain_call(left)? && !either!(&self.ring, r => r.has_used()) {
                return Err(Error::Timeout { what: "completion", after: self.timeout });
            }
        }
    }

    fn spin<T>(
        &mut self,
        what: &'static str,
        mut look: impl FnMut(&mut Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + self.timeout;
        loop {
            for _ in 0..SPINS {
                if let Some(found) = look(self)? {
                    return Ok(found);
                }
                std::hint::spin_loop();
            }
            if Instant::now() > deadline {
                return Err(Error::Timeout { what, after: self.timeout });
            }
            std::thread::yield_now();
        }
    }

    /// Waits until nothing is in flight; all completions in order of arrival.
    ///
    /// # Errors
    /// As `wait`.
    pub fn wait_all(&mut self) -> Result<Vec<Done>> {
        let mut all = Vec::new();
        while self.in_flight() > 0 {
            all.push(self.wait()?);
        }
        Ok(all)
    }

    /// Submits a request and waits for it, keeping other completions for `poll` and `wait`.
    ///
    /// # Errors
    /// As `submit` and `wait`; the status is not looked at.
    pub fn run(&mut self, request: Request) -> Result<Done> {
        let tag = self.submit(request)?;
        loop {
            let done = self.wait_ring()?;
            if done.tag == tag {
                return Ok(done);
            }
            self.done.push_back(done);
        }
    }
}

#[cfg(test)]
mod tests;
