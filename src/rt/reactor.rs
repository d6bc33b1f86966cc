//! The reactor of one thread: where its requests go and where it waits.
//!
//! Requests are submitted with a token and answered by a completion with the same token. Three engines carry them
//! (io_uring, Linux AIO, the thread pool); one wait point - the io_uring, or epoll where there is none - sees their
//! completions, the watched descriptors (kicks) and the mailbox's bell.
#![forbid(unsafe_code)]

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use slab::Slab;

use super::aio::Aio;
use super::epoll::Epoll;
use super::inline;
use super::pool::{Job, Owner, pool};
use super::token::{Kind, TOKEN_BITS, is_request, kind_of, token};
use super::uring::Uring;
use super::{Engine, File, Inbox, Rw, calls};
use crate::error::Errno;

/// How a thread waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitKind {
    /// In its io_uring.
    Uring,
    /// In epoll.
    Epoll,
    /// Nowhere: a simulation decides what happens next (see `rt/sim.rs`).
    #[cfg(any(test, feature = "sim"))]
    Simulated,
}

enum Wait {
    Uring(Box<Uring>),
    Epoll(Epoll),
    #[cfg(any(test, feature = "sim"))]
    Simulated(super::sim::Calls),
}

/// What happened, for the thread's own program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request made with [`Reactor::submit`] is done: its payload, and bytes or a negative error number.
    Done(u64, i32),
    /// A watched descriptor had input: the payload of the watch.
    Ready(u64),
}

enum OpSlot {
    Waiting(Option<Waker>),
    Finished(i32),
}

/// One watched descriptor.
struct Watch {
    fd: RawFd,
    payload: u64,
    token: u64,
}

/// The reactor of one thread.
pub struct Reactor {
    wait: Wait,
    aio: Option<Aio>,
    aio_event: Option<vmm_sys_util::eventfd::EventFd>,
    aio_failed: bool,
    inbox: Arc<Inbox>,
    ops: Slab<OpSlot>,
    watches: Slab<Watch>,
    generation: u64,
    in_flight: usize,
    /// Requests that are done already: inline, or refused by the kernel.
    finished: Vec<(u64, i32)>,
    /// Spent on inline transfers since the last reaping.
    inline_time: Duration,
    /// Transfers with a disk that are queued, and how many of them the kernel gets at once.
    queued: u32,
    piece: u32,
    /// Watches that the kernel has ended by itself: descriptors and tokens.
    rearm: Vec<(RawFd, u64)>,
}

/// So many transfers of a turn are worth a system call, with which the disk begins while the thread goes on; then twice as many, and
/// so on. If it got all of a turn at once, disk and thread would wait for each other by turns (`contrib/bench`, case
/// `nouring-disk-native`).
const FIRST_PIECE: u32 = 8;

/// The payload of the watches that belong to the reactor itself.
const INTERNAL: u64 = u64::MAX;

impl Reactor {
    /// A reactor that waits in `kind`, for the owner of `inbox`.
    ///
    /// # Errors
    /// What io_uring or epoll say.
    pub fn new(kind: WaitKind, inbox: Arc<Inbox>) -> Result<Reactor, Errno> {
        let wait = match kind {
            WaitKind::Uring => Wait::Uring(Box::new(Uring::new()?)),
            WaitKind::Epoll => Wait::Epoll(Epoll::new()?),
            #[cfg(any(test, feature = "sim"))]
            WaitKind::Simulated => Wait::Simulated(super::sim::Calls::default()),
        };
        let bell = inbox.bell().0.as_raw_fd();
        let mut reactor = Reactor {
            wait,
            aio: None,
            aio_event: None,
            aio_failed: false,
            inbox,
            ops: Slab::new(),
            watches: Slab::new(),
            generation: 0,
            in_flight: 0,
            finished: Vec::with_capacity(64),
            inline_time: Duration::ZERO,
            queued: 0,
            piece: FIRST_PIECE,
            rearm: Vec::new(),
        };
        reactor.watch(bell, INTERNAL)?;
        Ok(reactor)
    }

    /// Requests submitted and not answered yet.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Submits a transfer; its answer is [`Event::Done`] with `payload` (below 2^62).
    #[inline]
    pub fn submit(&mut self, file: &File, rw: &Rw, payload: u64) {
        self.submit_token(file, rw, token(Kind::Fast, payload));
    }

    #[inline]
    fn submit_token(&mut self, file: &File, rw: &Rw, token: u64) {
        self.in_flight += 1;
        if file.prefers_inline(rw) && !self.turn_is_full() {
            return self.do_inline(file, rw, token);
        }
        match file.engine {
            Engine::IoUring if self.has_uring() => {
                if self.in_flight == 1 && file.tries_cache(rw) && self.read_cached(file, rw, token)
                {
                    return;
                }
            }
            Engine::Native => self.open_aio(),
            Engine::IoUring | Engine::Threads => {
                if !self.turn_is_full() && file.tries_cache(rw) && self.read_timed(file, rw, token)
                {
                    return;
                }
            }
        }
        match (file.engine, &mut self.wait, &mut self.aio) {
            (Engine::IoUring, Wait::Uring(ring), _) => ring.push_rw(rw, token),
            (Engine::Native, _, Some(aio)) => aio.push(rw, token),
            // The kernel's files are not part of a simulated world.
            #[cfg(any(test, feature = "sim"))]
            (_, Wait::Simulated(_), _) => self.finished.push((token, -libc::ENOSYS)),
            _ => pool().push(Job::Rw { rw: *rw, token, inbox: Arc::clone(&self.inbox) }),
        }
        if !file.is_cached() {
            self.queued += 1;
            if self.queued == self.piece {
                self.piece *= 2;
                self.hand_over();
            }
        }
    }

    /// Nobody needs the answer of the request made with [`Reactor::submit`] and `payload` any more: it comes soon, ECANCELED
    /// or another, if it is in an io_uring and the kernel can let it go. Others come when they are done.
    pub fn cancel(&mut self, payload: u64) {
        let request = token(Kind::Fast, payload);
        if let Wait::Uring(ring) = &mut self.wait
            && ring.cancel(request, token(Kind::Ignored, 0))
        {
            self.finished.push((request, -libc::ECANCELED));
        }
    }

    fn do_inline(&mut self, file: &File, rw: &Rw, token: u64) {
        let start = Instant::now();
        let result = rw.call();
        let time = start.elapsed();
        file.inline.observe(time);
        self.inline_time += time;
        self.finished.push((token, result));
    }

    /// Does a read at once if the page cache has all of it.
    fn read_cached(&mut self, file: &File, rw: &Rw, token: u64) -> bool {
        let read = rw.call_cached();
        file.inline.observe_read(read.is_some());
        self.finished.extend(read.map(|n| (token, n)));
        read.is_some()
    }

    /// The same, where such reads may be many.
    fn read_timed(&mut self, file: &File, rw: &Rw, token: u64) -> bool {
        let start = Instant::now();
        let done = self.read_cached(file, rw, token);
        self.inline_time += start.elapsed();
        done
    }

    fn has_uring(&self) -> bool {
        matches!(self.wait, Wait::Uring(_))
    }

    /// Whether this turn has done as much inline as it should: completions first, then more.
    #[inline]
    pub fn turn_is_full(&self) -> bool {
        self.inline_time >= inline::TURN
    }

    /// Opens this thread's AIO context when it is first needed; without one the thread pool serves.
    fn open_aio(&mut self) {
        if self.aio.is_none() && !self.aio_failed {
            let opened =
                vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                    .map_err(Errno::from)
                    .and_then(|event| {
                        // The context first: if it cannot be had, nobody waits for the event.
                        let aio = Aio::new(event.as_raw_fd())?;
                        self.watch(event.as_raw_fd(), INTERNAL)?;
                        self.aio = Some(aio);
                        self.aio_event = Some(event);
                        Ok(())
                    });
            if let Err(e) = opened {
                log::warn!("no Linux AIO context, using threads: {e}");
                self.aio_failed = true;
            }
        }
    }

    /// A slot for a slow-lane operation: its token's payload.
    pub(super) fn new_op(&mut self) -> usize {
        self.ops.insert(OpSlot::Waiting(None))
    }

    /// Submits the transfer of operation `op`.
    pub(super) fn submit_op(&mut self, file: &File, rw: &Rw, op: usize) {
        self.submit_token(file, rw, token(Kind::Op, op as u64));
    }

    /// Submits an `fdatasync` for operation `op`.
    pub(super) fn submit_fdatasync(&mut self, engine: Engine, fd: RawFd, op: usize) {
        match (engine, &mut self.wait) {
            (Engine::IoUring, Wait::Uring(ring)) => {
                self.in_flight += 1;
                ring.push_fdatasync(fd, token(Kind::Op, op as u64));
            }
            _ => self.submit_call(op, Some(fd), move || calls::fdatasync(fd)),
        }
    }

    /// Runs `call`, which may wait for `owner`, on a pool thread for operation `op`; it answers like a system call of the
    /// kernel.
    pub(super) fn submit_call(
        &mut self,
        op: usize,
        owner: Owner,
        call: impl FnOnce() -> i32 + Send + 'static,
    ) {
        self.in_flight += 1;
        let (inbox, token) = (Arc::clone(&self.inbox), token(Kind::Op, op as u64));
        #[cfg(any(test, feature = "sim"))]
        if let Wait::Simulated(calls) = &mut self.wait {
            calls.push(token, call);
            return;
        }
        let answer = move || inbox.post(super::Mail::Done { token, result: call() });
        pool().push(Job::Call(owner, Box::new(answer)));
    }

    /// The result of operation `op`, once; until then its waker is kept.
    pub(super) fn poll_op(&mut self, op: usize, waker: &Waker) -> Poll<i32> {
        match &mut self.ops[op] {
            OpSlot::Finished(result) => {
                let result = *result;
                self.ops.remove(op);
                Poll::Ready(result)
            }
            OpSlot::Waiting(kept) => {
                match kept {
                    Some(w) if w.will_wake(waker) => {}
                    _ => *kept = Some(waker.clone()),
                }
                Poll::Pending
            }
        }
    }

    /// Watches `fd` for input: [`Event::Ready`] with `payload` at every write to it. It need not be read.
    /// Answers the watch's key.
    ///
    /// # Errors
    /// EPERM and others for a descriptor that cannot be watched.
    pub fn watch(&mut self, fd: RawFd, payload: u64) -> Result<usize, Errno> {
        self.generation += 1;
        let entry = self.watches.vacant_entry();
        let key = entry.key();
        // Generation above, key below: an event of an ended watch is told from one of its slot's next user.
        let token = token(Kind::Watch, (self.generation << 20 | key as u64) & TOKEN_BITS);
        match &mut self.wait {
            Wait::Uring(ring) => {
                // An io_uring takes descriptors that cannot be waited for (files) too, and finds them ready for ever:
                // epoll refuses them.
                Epoll::new()?.add(fd, token)?;
                ring.push_poll(fd, token);
            }
            Wait::Epoll(epoll) => epoll.add(fd, token)?,
            #[cfg(any(test, feature = "sim"))]
            Wait::Simulated(_) => {}
        }
        entry.insert(Watch { fd, payload, token });
        Ok(key)
    }

    /// Ends a watch. The descriptor may be closed afterwards.
    pub fn unwatch(&mut self, key: usize) {
        let watch = self.watches.remove(key);
        match &mut self.wait {
            Wait::Uring(ring) => ring.remove_poll(watch.token, token(Kind::Ignored, 0)),
            Wait::Epoll(epoll) => epoll.remove(watch.fd),
            #[cfg(any(test, feature = "sim"))]
            Wait::Simulated(_) => {}
        }
    }

    /// Hands what is queued to the kernel, at a turn's end: at most one system call per engine, none if nothing is queued.
    #[inline]
    pub fn flush(&mut self) {
        self.piece = FIRST_PIECE;
        self.hand_over();
    }

    #[inline]
    fn hand_over(&mut self) {
        self.queued = 0;
        if let Wait::Uring(ring) = &mut self.wait {
            ring.submit();
        }
        if let Some(aio) = &mut self.aio {
            let finished = &mut self.finished;
            aio.submit(|token, result| finished.push((token, result)));
        }
    }

    /// Whether [`Reactor::reap`] would find something.
    #[inline]
    pub fn has_events(&mut self) -> bool {
        let ring = match &mut self.wait {
            Wait::Uring(ring) => ring.has_events(),
            Wait::Epoll(_) => false,
            #[cfg(any(test, feature = "sim"))]
            Wait::Simulated(_) => false,
        };
        ring || !self.finished.is_empty() || self.aio.as_ref().is_some_and(Aio::has_events)
    }

    /// Takes all completions and events: those of the thread's own program are appended to `to`, tasks are woken.
    #[inline]
    pub fn reap(&mut self, to: &mut Vec<Event>) {
        self.inline_time = Duration::ZERO;
        let Reactor { wait, aio, ops, watches, in_flight, finished, rearm, .. } = self;
        match wait {
            Wait::Uring(ring) => ring.reap(|token, result, more| {
                if is_request(token) {
                    complete(ops, in_flight, token, result, to);
                } else if let Some(watch) = ready(watches, token, to)
                    && !more
                {
                    // The kernel may end a multishot poll (completion queue full): it is set again. One that it
                    // refuses would be refused for ever.
                    if result >= 0 {
                        rearm.push((watch.fd, token));
                    } else {
                        log::error!("waiting for descriptor {}: {}", watch.fd, Errno(-result));
                    }
                }
            }),
            Wait::Epoll(epoll) => epoll.take(|token| {
                ready(watches, token, to);
            }),
            #[cfg(any(test, feature = "sim"))]
            Wait::Simulated(_) => {}
        }
        if let Some(aio) = aio {
            aio.reap(|token, result| complete(ops, in_flight, token, result, to));
        }
        for (token, result) in finished.drain(..) {
            complete(ops, in_flight, token, result, to);
        }
        if let Wait::Uring(ring) = &mut self.wait {
            self.rearm.drain(..).for_each(|(fd, token)| ring.push_poll(fd, token));
        }
    }

    /// A completion that came by mail.
    pub(super) fn mailed(&mut self, token: u64, result: i32, to: &mut Vec<Event>) {
        complete(&mut self.ops, &mut self.in_flight, token, result, to);
    }

    /// Blocks until something happens or `timeout` is over. What is queued is submitted first.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        self.flush();
        if self.aio.as_ref().is_some_and(Aio::has_events) || !self.finished.is_empty() {
            return;
        }
        match &mut self.wait {
            Wait::Uring(ring) => ring.wait(timeout),
            Wait::Epoll(epoll) => epoll.wait(timeout),
            #[cfg(any(test, feature = "sim"))]
            Wait::Simulated(_) => unreachable!("a simulation does not wait"),
        }
    }

    /// `calls` requests will never be answered: their simulation is over.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn forget(&mut self, calls: usize) {
        self.in_flight -= calls;
    }

    /// The calls that a simulation holds back; `None` outside of one.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn held_calls(&mut self) -> Option<&mut super::sim::Calls> {
        match &mut self.wait {
            Wait::Simulated(calls) => Some(calls),
            _ => None,
        }
    }
}

#[inline]
fn complete(
    ops: &mut Slab<OpSlot>,
    in_flight: &mut usize,
    token: u64,
    result: i32,
    to: &mut Vec<Event>,
) {
    *in_flight -= 1;
    let payload = token & TOKEN_BITS;
    if kind_of(token) == Kind::Fast {
        to.push(Event::Done(payload, result));
        return;
    }
    let slot = usize::try_from(payload).ok().and_then(|key| ops.get_mut(key));
    let Some(slot) = slot else { unreachable!("an operation's slot outlives it") };
    if let OpSlot::Waiting(waker) = std::mem::replace(slot, OpSlot::Finished(result))
        && let Some(waker) = waker
    {
        waker.wake();
    }
}

fn ready<'a>(watches: &'a Slab<Watch>, token: u64, to: &mut Vec<Event>) -> Option<&'a Watch> {
    let key = usize::try_from(token & 0xf_ffff).ok()?;
    let watch = watches.get(key).filter(|w| w.token == token)?;
    if watch.payload != INTERNAL {
        to.push(Event::Ready(watch.payload));
    }
    Some(watch)
}
