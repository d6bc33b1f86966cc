//! Tasks of one thread: futures that borrow nothing of the executor, polled only on their own thread, woken from any.
#![forbid(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use slab::Slab;

use super::mailbox::Mail;
use super::runtime::{Inbox, current_is};

type Task = Pin<Box<dyn Future<Output = ()>>>;

struct Slot {
    /// `None` while the task is being polled.
    task: Option<Task>,
    waker: Waker,
    generation: u64,
}

struct TaskWaker {
    inbox: Arc<Inbox>,
    key: usize,
    generation: u64,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let (key, generation) = (self.key, self.generation);
        if !current_is(&self.inbox, |rt| rt.executor.make_ready(key, generation)) {
            self.inbox.post(Mail::Wake { key, generation });
        }
    }
}

/// The tasks of one thread.
#[derive(Default)]
pub struct Executor {
    slots: RefCell<Slab<Slot>>,
    ready: RefCell<VecDeque<(usize, u64)>>,
    generation: Cell<u64>,
}

impl Executor {
    /// Adds a task; it is polled for the first time by the next [`Executor::run_ready`].
    pub fn spawn(&self, inbox: &Arc<Inbox>, task: impl Future<Output = ()> + 'static) {
        let generation = self.generation.get() + 1;
        self.generation.set(generation);
        let mut slots = self.slots.borrow_mut();
        let entry = slots.vacant_entry();
        let key = entry.key();
        let waker = Waker::from(Arc::new(TaskWaker { inbox: Arc::clone(inbox), key, generation }));
        entry.insert(Slot { task: Some(Box::pin(task)), waker, generation });
        self.ready.borrow_mut().push_back((key, generation));
    }

    /// Puts a task on the ready list; a task that is gone is ignored when its turn comes.
    pub fn make_ready(&self, key: usize, generation: u64) {
        self.ready.borrow_mut().push_back((key, generation));
    }

    /// Whether a task waits to be polled.
    pub fn has_ready(&self) -> bool {
        !self.ready.borrow().is_empty()
    }

    /// How many wake-ups wait to be served (a task may have several).
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn ready(&self) -> usize {
        self.ready.borrow().len()
    }

    /// Makes the `n`th of the ready tasks the next one.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn bring_forward(&self, n: usize) {
        self.ready.borrow_mut().swap(0, n);
    }

    /// Drops all tasks: the simulated process has been killed.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn kill(&self) {
        self.ready.borrow_mut().clear();
        let slots = self.slots.take();
        drop(slots);
    }

    /// The number of unfinished tasks.
    pub fn tasks(&self) -> usize {
        self.slots.borrow().len()
    }

    /// Polls at most `limit` ready tasks. Answers how many.
    pub fn run_ready(&self, limit: usize) -> usize {
        let mut polled = 0;
        while polled < limit {
            let Some((key, generation)) = self.ready.borrow_mut().pop_front() else { break };
            let taken = self.slots.borrow_mut().get_mut(key).and_then(|slot| {
                let fresh = slot.generation == generation;
                fresh.then(|| slot.task.take().map(|t| (t, slot.waker.clone()))).flatten()
            });
            let Some((mut task, waker)) = taken else { continue };
            polled += 1;
            // The slots are not borrowed here: a task may spawn others and wake itself.
            match task.as_mut().poll(&mut Context::from_waker(&waker)) {
                Poll::Ready(()) => drop(self.slots.borrow_mut().remove(key)),
                Poll::Pending => self.slots.borrow_mut()[key].task = Some(task),
            }
        }
        polled
    }
}
