//! The runtime in a simulation: no kernel, no threads, no clock. Whoever drives it ([`crate::sim`]) chooses which ready task
//! runs, when a blocking call returns and when time passes, so that one seed gives one run.
//!
//! A runtime of [`WaitKind::Simulated`](super::WaitKind::Simulated) is installed like any other; drivers see no difference.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::cmp::Reverse;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;

use super::Runtime;

/// Who decides what happens.
pub trait World {
    /// Drives `future` to its end on a simulated runtime of its own.
    fn drive(&self, future: Pin<&mut dyn Future<Output = ()>>);
}

thread_local! {
    static WORLDS: RefCell<Vec<Rc<dyn World>>> = const { RefCell::new(Vec::new()) };
}

/// From now on [`super::block_on`] on this thread is up to `world`.
pub fn enter(world: Rc<dyn World>) {
    WORLDS.with_borrow_mut(|worlds| worlds.push(world));
}

/// Ends that.
pub fn leave(world: &Rc<dyn World>) {
    WORLDS.with_borrow_mut(|worlds| worlds.retain(|other| !Rc::ptr_eq(other, world)));
}

pub(super) fn current_world() -> Option<Rc<dyn World>> {
    WORLDS.with_borrow(|worlds| worlds.last().cloned())
}

pub(super) fn block_on<T>(world: &dyn World, future: impl Future<Output = T>) -> T {
    let mut value = None;
    world.drive(pin!(async { value = Some(future.await) }));
    value.expect("a world drives to the end")
}

type Call = (u64, Box<dyn FnOnce() -> i32>);

/// The blocking calls that have not been let run yet.
#[derive(Default)]
pub struct Calls(Vec<Call>);

impl Calls {
    /// Holds `call` back; its answer will have `token`.
    pub fn push(&mut self, token: u64, call: impl FnOnce() -> i32 + 'static) {
        self.0.push((token, Box::new(call)));
    }
}

impl Runtime {
    /// Whether this is a simulated runtime.
    pub(super) fn is_simulated(&self) -> bool {
        self.clock.get().is_some()
    }

    /// How many tasks could run now (a task woken twice counts twice).
    pub fn ready_tasks(&self) -> usize {
        self.executor.ready()
    }

    /// Runs the `n`th of them.
    pub fn run_task(&self, n: usize) {
        self.executor.bring_forward(n);
        self.executor.run_ready(1);
    }

    /// How many blocking calls could return now.
    pub fn held_calls(&self) -> usize {
        self.reactor.borrow_mut().held_calls().map_or(0, |calls| calls.0.len())
    }

    /// Runs the `n`th of them, here and now, and wakes who waits for it.
    pub fn run_call(&self, n: usize) {
        let call = self.reactor.borrow_mut().held_calls().map(|calls| calls.0.swap_remove(n));
        if let Some((token, call)) = call {
            let result = call();
            self.reactor.borrow_mut().mailed(token, result, &mut Vec::new());
        }
    }

    /// Lets time pass until the next timer, which fires. `false`: there is none.
    pub fn skip_to_next_timer(&self) -> bool {
        let due = self.timers.borrow().peek().map(|Reverse(timer)| timer.due);
        let Some(due) = due else { return false };
        self.clock.set(self.clock.get().map(|now| now.max(due)));
        self.fire_timers();
        true
    }

    /// Takes mail and refused requests; wakes their tasks.
    pub fn take_arrivals(&self) {
        self.collect(&mut Vec::new());
    }

    /// Tasks and calls that are left go the way of a killed process: without another word.
    pub(super) fn end_of_simulation(&self) {
        if !self.is_simulated() {
            return;
        }
        self.executor.kill();
        let calls = self.reactor.borrow_mut().held_calls().map(std::mem::take);
        let calls = calls.map_or(0, |calls| calls.0.len());
        self.reactor.borrow_mut().forget(calls);
    }
}
