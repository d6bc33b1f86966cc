//! What a thread that does I/O has: reactor, executor, mailbox, timers; and how it finds it.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::executor::Executor;
use super::mailbox::{Bell, Mail, Mailbox};
use super::reactor::{Event, Reactor, WaitKind};
use super::time::Timer;
use crate::error::Errno;

/// An event descriptor as a mailbox's bell.
pub struct EventBell(pub(super) EventFd);

impl Bell for EventBell {
    fn ring(&self) {
        if let Err(e) = self.0.write(1) {
            log::error!("waking a thread: {e}");
        }
    }
}

/// A runtime's mailbox.
pub type Inbox = Mailbox<EventBell>;

/// Everything a thread needs to do I/O.
pub struct Runtime {
    /// Requests and completions.
    pub reactor: RefCell<Reactor>,
    /// Tasks.
    pub executor: Executor,
    inbox: Arc<Inbox>,
    mails: RefCell<Vec<Mail>>,
    commands: RefCell<Vec<Box<dyn std::any::Any + Send>>>,
    pub(super) timers: RefCell<BinaryHeap<Reverse<Timer>>>,
    pub(super) timer_count: Cell<u64>,
    /// The time in a simulation.
    #[cfg(any(test, feature = "sim"))]
    pub(super) clock: Cell<Option<Instant>>,
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Runtime>>> = const { RefCell::new(None) };
}

/// Runs `f` on the calling thread's runtime if `inbox` is its mailbox. Whether it did.
pub(super) fn current_is(inbox: &Arc<Inbox>, f: impl FnOnce(&Runtime)) -> bool {
    CURRENT.with(|c| match &*c.borrow() {
        Some(rt) if Arc::ptr_eq(&rt.inbox, inbox) => {
            f(rt);
            true
        }
        _ => false,
    })
}

/// The calling thread's runtime.
///
/// # Panics
/// On a thread without one: slow-lane code runs only inside [`super::block_on`] or a worker.
pub fn current() -> Rc<Runtime> {
    CURRENT.with(|c| c.borrow().clone()).expect("this thread drives a runtime")
}

impl Runtime {
    /// Makes a runtime that waits in `kind` and installs it as the calling thread's.
    ///
    /// # Errors
    /// What the kernel says.
    ///
    /// # Panics
    /// If the thread has one already.
    pub fn install(kind: WaitKind) -> Result<Installed, Errno> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let inbox = Arc::new(Mailbox::new(EventBell(event)));
        let rt = Rc::new(Runtime {
            reactor: RefCell::new(Reactor::new(kind, Arc::clone(&inbox))?),
            executor: Executor::default(),
            inbox,
            mails: RefCell::new(Vec::with_capacity(64)),
            commands: RefCell::new(Vec::new()),
            timers: RefCell::new(BinaryHeap::new()),
            timer_count: Cell::new(0),
            #[cfg(any(test, feature = "sim"))]
            clock: Cell::new((kind == WaitKind::Simulated).then(Instant::now)),
        });
        CURRENT.with(|c| {
            let before = c.borrow_mut().replace(Rc::clone(&rt));
            assert!(before.is_none(), "this thread drives a runtime already");
        });
        Ok(Installed { rt })
    }

    /// The mailbox, for other threads.
    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// Adds a task.
    pub fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.executor.spawn(&self.inbox, task);
    }

    /// Opens the mail, takes all completions, fires timers. Events of the thread's own program are appended to `to`.
    #[inline]
    pub fn collect(&self, to: &mut Vec<Event>) {
        if self.inbox.has_mail() {
            self.open_mail(to);
        }
        self.reactor.borrow_mut().reap(to);
        if !self.timers.borrow().is_empty() {
            self.fire_timers();
        }
    }

    fn open_mail(&self, to: &mut Vec<Event>) {
        let mut mails = self.mails.borrow_mut();
        self.inbox.take(&mut mails);
        for mail in mails.drain(..) {
            match mail {
                Mail::Done { token, result } => self.reactor.borrow_mut().mailed(token, result, to),
                Mail::Wake { key, generation } => self.executor.make_ready(key, generation),
                Mail::Command(command) => self.commands.borrow_mut().push(command),
            }
        }
    }

    /// The commands that came by mail, in order.
    pub fn take_commands(&self) -> Vec<Box<dyn std::any::Any + Send>> {
        if self.commands.borrow().is_empty() { Vec::new() } else { self.commands.take() }
    }

    /// The time: the machine's, or a simulation's.
    pub(super) fn now(&self) -> Instant {
        #[cfg(any(test, feature = "sim"))]
        if let Some(now) = self.clock.get() {
            return now;
        }
        Instant::now()
    }

    pub(super) fn fire_timers(&self) {
        let now = self.now();
        loop {
            let mut timers = self.timers.borrow_mut();
            match timers.peek() {
                Some(Reverse(t)) if t.due <= now => {}
                _ => return,
            }
            let due = timers.pop();
            drop(timers);
            if let Some(Reverse(t)) = due {
                t.waker.wake();
            }
        }
    }

    /// Whether there is anything to do without waiting: mail, completions, ready tasks, due timers.
    #[inline]
    pub fn has_work(&self) -> bool {
        self.inbox.has_mail()
            || self.executor.has_ready()
            || self.reactor.borrow_mut().has_events()
            || self.next_due().is_some_and(|due| due <= Instant::now())
    }

    /// All who sleep wake up and look whether they have been cancelled; if not, they sleep on.
    pub fn wake_sleepers(&self) {
        let timers = self.timers.take();
        timers.into_iter().for_each(|Reverse(t)| t.waker.wake());
    }

    fn next_due(&self) -> Option<Instant> {
        self.timers.borrow().peek().map(|Reverse(t)| t.due)
    }

    /// Blocks until there is something to do. The only blocking call of a thread.
    pub fn wait(&self) {
        self.wait_at_most(None);
    }

    /// [`Runtime::wait`], but not longer than `limit`.
    pub fn wait_at_most(&self, limit: Option<Duration>) {
        if self.executor.has_ready() || !self.inbox.announce_sleep() {
            return;
        }
        let timer = self.next_due().map(|due| due.saturating_duration_since(Instant::now()));
        let timeout = limit.into_iter().chain(timer).min();
        if timeout.is_none_or(|t| !t.is_zero()) {
            self.reactor.borrow_mut().wait(timeout);
        }
        self.inbox.woke();
    }
}

/// A runtime installed on the calling thread; taken off when dropped.
pub struct Installed {
    rt: Rc<Runtime>,
}

impl std::ops::Deref for Installed {
    type Target = Runtime;
    fn deref(&self) -> &Runtime {
        &self.rt
    }
}

impl Drop for Installed {
    fn drop(&mut self) {
        CURRENT.with(|c| c.borrow_mut().take());
        #[cfg(any(test, feature = "sim"))]
        self.rt.end_of_simulation();
        if !std::thread::panicking() {
            assert_eq!(self.rt.reactor.borrow().in_flight(), 0, "requests outlive their runtime");
        }
    }
}
