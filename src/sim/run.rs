//! The scheduler: one world, one thread, one seed. It decides which task runs next, which request of a disk completes,
//! which blocking call returns and when time passes.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Wake, Waker};

use super::disk::{Disk, State};
use super::driver::{Shared, lock, register, unregister};
use super::history::{History, Time};
use super::request::{DiskSpec, Fault, KINDS};
use super::{Pages, Rng};
use crate::rt::sim::{World, enter, leave};
use crate::rt::{Runtime, WaitKind};

/// A run longer than this does not end: no test has a hundredth of it.
const MAX_STEPS: u64 = 20_000_000;

/// Why a run did not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stuck {
    /// Nothing is ready, nothing is in flight, no timer runs, and the future is not done: it waits for ever.
    Deadlock,
    /// Things go on happening without an end.
    Livelock,
}

impl fmt::Display for Stuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stuck::Deadlock => "deadlock: everybody waits and nothing is in flight",
            Stuck::Livelock => "livelock: no end after many steps",
        })
    }
}

/// A simulated world: disks, and a thread to run drivers on. While it lives, [`crate::rt::block_on`] on its thread (a driver
/// that reads its header while it is opened) runs in it, too.
pub struct Sim {
    scheduler: Rc<Scheduler>,
    world: Shared,
}

/// Who decides what happens next.
struct Scheduler {
    world: Shared,
    rng: RefCell<Rng>,
    steps: Cell<u64>,
}

/// Wakes the main future of a run.
#[derive(Default)]
struct MainWaker(AtomicBool);

impl Wake for MainWaker {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The main future of a run, and whether it is woken or done.
struct Main<'a> {
    future: Pin<&'a mut dyn Future<Output = ()>>,
    woken: Arc<MainWaker>,
    waker: Waker,
    done: bool,
}

impl Main<'_> {
    fn ready(&self) -> usize {
        usize::from(!self.done && self.woken.0.load(Ordering::Relaxed))
    }

    fn poll(&mut self) {
        self.woken.0.store(false, Ordering::Relaxed);
        let mut context = Context::from_waker(&self.waker);
        self.done = self.future.as_mut().poll(&mut context).is_ready();
    }
}

impl World for Scheduler {
    fn drive(&self, future: Pin<&mut dyn Future<Output = ()>>) {
        if let Err(stuck) = self.try_drive(future) {
            panic!("while blocking on a future in a simulation: {stuck}");
        }
    }
}

impl Scheduler {
    fn try_drive(&self, future: Pin<&mut dyn Future<Output = ()>>) -> Result<(), Stuck> {
        let rt = Runtime::install(WaitKind::Simulated).expect("a thread can have a runtime");
        let woken = Arc::new(MainWaker(AtomicBool::new(true)));
        let waker = Waker::from(Arc::clone(&woken));
        let mut main = Main { future, woken, waker, done: false };
        // How eager tasks are compared with the disks: from one at a time to everything at once.
        let eager = [1, 4, 8, 14, 16][self.rng.borrow_mut().index(5)];
        let result = loop {
            if self.steps.get() >= MAX_STEPS {
                break Err(Stuck::Livelock);
            }
            if self.step(&rt, &mut main, eager) {
                continue;
            }
            if main.done {
                break Ok(());
            }
            if !rt.skip_to_next_timer() {
                break Err(Stuck::Deadlock);
            }
        };
        lock(&self.world).over = true;
        drop(rt);
        // A future that is not done may have requests in flight; it is dropped by the caller, now or never.
        lock(&self.world).over = result.is_err();
        result
    }

    /// Does one thing, chosen at random. `false`: there is nothing to do but to let time pass.
    fn step(&self, rt: &Runtime, main: &mut Main<'_>, eager: u64) -> bool {
        self.steps.set(self.steps.get() + 1);
        rt.take_arrivals();
        let mut rng = self.rng.borrow_mut();
        let (tasks, calls) = (rt.ready_tasks(), rt.held_calls());
        let ready = tasks + main.ready();
        let outside = lock(&self.world).choosable() + calls;
        if ready + outside == 0 {
            return false;
        }
        if rng.chance(1, 256) {
            // Timers may fire while requests are in flight.
            rt.skip_to_next_timer();
        }
        let inside = outside == 0 || rng.chance(eager, 17);
        if ready > 0 && inside {
            let n = rng.index(ready);
            drop(rng);
            lock(&self.world).note(n as u64);
            if n < tasks {
                rt.run_task(n);
            } else {
                main.poll();
            }
        } else if outside > 0 {
            let n = rng.index(outside);
            drop(rng);
            self.let_happen(rt, n, calls);
        }
        true
    }

    /// Lets a held call return, or a request of a disk complete.
    fn let_happen(&self, rt: &Runtime, n: usize, calls: usize) {
        if n < calls {
            return rt.run_call(n);
        }
        let waker = lock(&self.world).choose();
        waker.into_iter().for_each(Waker::wake);
    }
}

impl Sim {
    /// A world without disks. The same seed and the same code give the same run.
    pub fn new(seed: u64) -> Sim {
        let rng = Rng::new(seed);
        let world = Arc::new(Mutex::new(State::new(rng.fork(1))));
        let scheduler: Rc<Scheduler> = Rc::new(Scheduler {
            world: Arc::clone(&world),
            rng: RefCell::new(rng.fork(2)),
            steps: Cell::new(0),
        });
        enter(scheduler.clone());
        Sim { scheduler, world }
    }

    /// Adds a disk; nodes of driver `sim-disk` that are opened on this thread find it by its name.
    pub fn add_disk(&self, spec: DiskSpec) {
        let name = spec.name.clone();
        let index = lock(&self.world).add(spec);
        register(&name, &self.world, index);
    }

    /// Drives `future`, and whatever tasks it spawns, to the end. Tasks that then wait for a timer or for nothing are
    /// dropped, as at the end of a process.
    ///
    /// # Errors
    /// It does not end.
    ///
    /// # Panics
    /// If the thread drives a runtime already.
    pub fn run<T>(&self, future: impl Future<Output = T>) -> Result<T, Stuck> {
        let mut value = None;
        self.scheduler.try_drive(pin!(async { value = Some(future.await) }))?;
        Ok(value.expect("the future is done"))
    }

    /// The next moment, for whoever keeps a record beside the disks' history.
    pub fn tick(&self) -> Time {
        lock(&self.world).tick()
    }

    /// Plans a fault on disk `disk`.
    ///
    /// # Panics
    /// If there is no such disk.
    pub fn fail(&self, disk: &str, fault: Fault) {
        self.with_disk(disk, |d| d.faults.push(fault));
    }

    /// Forgets all faults that have not happened.
    pub fn forgive(&self) {
        lock(&self.world).disks.iter_mut().for_each(|disk| disk.faults.clear());
    }

    /// How long disk `disk` may get from now on, in bytes.
    ///
    /// # Panics
    /// If there is no such disk.
    pub fn set_capacity(&self, disk: &str, capacity: u64) {
        self.with_disk(disk, |d| d.options.capacity = capacity);
    }

    /// From now on requests of disk `disk` that touch `range` are slow: they do not complete. An empty range: as ever.
    ///
    /// # Panics
    /// If there is no such disk.
    pub fn hold(&self, disk: &str, range: std::ops::Range<u64>) {
        let mut state = lock(&self.world);
        let at = state.disks.iter().position(|d| d.name == disk);
        let at = at.unwrap_or_else(|| panic!("no simulated disk '{disk}'"));
        state.held = Some((at, range));
    }

    /// How many requests are held by [`Sim::hold`].
    pub fn held(&self) -> usize {
        lock(&self.world).held()
    }

    /// What disk `disk` holds now, as reads see it.
    ///
    /// # Panics
    /// If there is no such disk.
    pub fn image(&self, disk: &str) -> Pages {
        self.with_disk(disk, |d| d.image.clone())
    }

    /// All disks as they are now.
    pub fn specs(&self) -> Vec<DiskSpec> {
        let state = lock(&self.world);
        let disks = state.disks.iter();
        let spec = |d: &Disk| DiskSpec {
            name: d.name.clone(),
            image: d.image.clone(),
            options: d.options,
        };
        disks.map(spec).collect()
    }

    /// How many requests of each kind (in the order of [`super::Request::ALL`]) disk `disk` has got.
    ///
    /// # Panics
    /// If there is no such disk.
    pub fn counts(&self, disk: &str) -> [u64; KINDS] {
        self.with_disk(disk, |d| d.counts)
    }

    /// Everything that happened to the disks so far. Leaves an empty history behind.
    pub fn take_history(&self) -> History {
        std::mem::take(&mut lock(&self.world).history)
    }

    /// A fingerprint of all decisions so far: equal for equal runs.
    pub fn trace(&self) -> u64 {
        lock(&self.world).trace
    }

    /// How many writes had their memory changed while they were in flight. Their sectors are a mix of old and new.
    pub fn changed_in_flight(&self) -> u64 {
        lock(&self.world).changed_in_flight
    }

    fn with_disk<T>(&self, name: &str, f: impl FnOnce(&mut Disk) -> T) -> T {
        let mut state = lock(&self.world);
        let disk = state.disks.iter_mut().find(|d| d.name == name);
        f(disk.unwrap_or_else(|| panic!("no simulated disk '{name}'")))
    }
}

impl Drop for Sim {
    fn drop(&mut self) {
        unregister(&self.world);
        let scheduler: Rc<dyn World> = self.scheduler.clone();
        leave(&scheduler);
    }
}
