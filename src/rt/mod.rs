//! The runtime: what a thread that does I/O is made of. Knows nothing of blocks.
//!
//! Each such thread has one [`Runtime`]: a reactor (requests, completions, the wait point), an executor (slow-lane
//! tasks), a mailbox (messages from other threads) and timers. A device worker drives its runtime by hand, turn by
//! turn, to poll its rings in between; [`block_on`] drives one for a single future.
//!
//! Operations are never abandoned: their memory belongs to a guest or to a buffer of the future that waits for them,
//! so a future with an operation in the kernel must not be dropped (`Operation`'s drop ends the process).
//!
//! Why not tokio-uring, glommio, monoio, compio: see the crate documentation.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::error::Errno;
use crate::mem::{IoVec, Sg};

mod aio;
mod buf;
mod calls;
mod epoll;
mod executor;
pub mod grace;
mod inline;
mod mailbox;
pub mod poll;
pub mod pool;
mod reactor;
#[cfg(any(test, feature = "sim"))]
pub mod sim;
pub mod sync;
mod uring;

pub use buf::Buffer;
pub use executor::Executor;
pub use mailbox::{Bell, Mail, Mailbox};
pub use reactor::{Event, Reactor, WaitKind};

/// The most memory ranges in one kernel request (IOV_MAX).
pub const IOV_MAX: usize = 1024;

/// How a file's requests reach the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// A pool of threads that call `preadv2` and `pwritev2`.
    Threads,
    /// Linux AIO (`io_submit`); needs O_DIRECT.
    Native,
    /// The worker's own io_uring; the thread pool where there is none.
    IoUring,
}

/// An open file and how to do I/O on it.
#[derive(Debug)]
pub struct File {
    fd: OwnedFd,
    /// The engine.
    pub engine: Engine,
    /// Offsets and lengths must be multiples of this (bytes, power of two).
    pub request_align: u32,
    /// Memory must be aligned to this (bytes, power of two).
    pub mem_align: u32,
    inline: inline::Inline,
}

impl File {
    /// `fd`, served by `engine`, with its alignment demands in bytes.
    pub fn new(fd: OwnedFd, engine: Engine, request_align: u32, mem_align: u32) -> File {
        File { fd, engine, request_align, mem_align, inline: inline::Inline::default() }
    }

    /// Whether a transfer is better done by a plain system call, here and now. Buffered files take any alignment.
    #[inline]
    fn prefers_inline(&self, rw: &Rw) -> bool {
        rw.write
            && rw.len <= inline::LEN_MAX
            && !rw.dsync
            && self.request_align == 1
            && self.engine == Engine::IoUring
            && self.inline.allowed()
    }

    /// Whether a transfer that is alone should ask the page cache, here and now.
    #[inline]
    fn tries_cache(&self, rw: &Rw) -> bool {
        !rw.write
            && rw.len <= inline::LEN_MAX
            && self.request_align == 1
            && self.engine == Engine::IoUring
            && self.inline.tries_read()
    }

    /// The descriptor.
    pub fn fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// One transfer between a file and memory, as the kernel takes it.
///
/// Whoever makes one keeps the descriptor, the array and the memory alive until its completion.
#[derive(Clone, Copy)]
pub struct Rw {
    write: bool,
    dsync: bool,
    fd: RawFd,
    count: u32,
    iov: *const IoVec,
    offset: u64,
    len: usize,
}

// SAFETY: a description; see the contract of its maker.
unsafe impl Send for Rw {}

impl Rw {
    /// A transfer at byte `offset` of `file`, to (`write` false) or from the memory of `iov`; `dsync`: stable when done.
    ///
    /// # Safety
    /// `file`, the array `iov` and the memory it names stay alive until the transfer's completion has been taken.
    ///
    /// # Panics
    /// If `iov` is empty or longer than [`IOV_MAX`].
    #[inline]
    pub unsafe fn new(file: &File, write: bool, iov: &[IoVec], offset: u64, dsync: bool) -> Rw {
        assert!(!iov.is_empty() && iov.len() <= IOV_MAX, "bad number of memory ranges");
        let count = iov.len() as u32;
        let len = iov.iter().map(IoVec::len).sum();
        Rw { write, dsync, fd: file.fd(), count, iov: iov.as_ptr(), offset, len }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Fast,
    Op,
    Watch,
    Ignored,
}

const TOKEN_BITS: u64 = (1 << 62) - 1;

const fn token(kind: Kind, payload: u64) -> u64 {
    (kind as u64) << 62 | payload & TOKEN_BITS
}

const fn kind_of(token: u64) -> Kind {
    match token >> 62 {
        0 => Kind::Fast,
        1 => Kind::Op,
        2 => Kind::Watch,
        _ => Kind::Ignored,
    }
}

const fn is_request(token: u64) -> bool {
    token >> 63 == 0
}

/// An event descriptor as a mailbox's bell.
pub struct EventBell(EventFd);

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
    timers: RefCell<BinaryHeap<Reverse<Timer>>>,
    timer_count: Cell<u64>,
    /// The time in a simulation.
    #[cfg(any(test, feature = "sim"))]
    clock: Cell<Option<Instant>>,
}

struct Timer {
    due: Instant,
    number: u64,
    waker: Waker,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

thread_local! {
    static CURRENT: RefCell<Option<Rc<Runtime>>> = const { RefCell::new(None) };
}

/// Runs `f` on the calling thread's runtime if `inbox` is its mailbox. Whether it did.
fn current_is(inbox: &Arc<Inbox>, f: impl FnOnce(&Runtime)) -> bool {
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
/// On a thread without one: slow-lane code runs only inside [`block_on`] or a worker.
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
    fn now(&self) -> Instant {
        #[cfg(any(test, feature = "sim"))]
        if let Some(now) = self.clock.get() {
            return now;
        }
        Instant::now()
    }

    fn fire_timers(&self) {
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

/// A slow-lane operation in the kernel or on a pool thread. Dropping it unfinished would free memory that the kernel
/// writes to, so that ends the process instead; nothing in this program drops futures early.
struct Operation<'a> {
    rt: Rc<Runtime>,
    op: usize,
    finished: bool,
    memory: PhantomData<&'a ()>,
}

impl Operation<'_> {
    fn submit(start: impl FnOnce(&mut Reactor, usize)) -> Self {
        let rt = current();
        let op = {
            let mut reactor = rt.reactor.borrow_mut();
            let op = reactor.new_op();
            start(&mut reactor, op);
            op
        };
        Operation { rt, op, finished: false, memory: PhantomData }
    }
}

impl Future for Operation<'_> {
    type Output = i32;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<i32> {
        let result = self.rt.reactor.borrow_mut().poll_op(self.op, cx.waker());
        self.finished = result.is_ready();
        result
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        #[cfg(any(test, feature = "sim"))]
        if self.rt.is_simulated() {
            return;
        }
        if !self.finished {
            log::error!("an operation in flight was abandoned");
            std::process::abort();
        }
    }
}

async fn transfer(
    file: &File,
    write: bool,
    sg: Sg<'_>,
    offset: u64,
    dsync: bool,
) -> Result<usize, Errno> {
    if sg.is_empty() {
        return Ok(0);
    }
    let gathered: Vec<IoVec>;
    let iov = match sg.as_kernel_iov() {
        Some(iov) => iov,
        None => {
            gathered = sg.iter().collect();
            &gathered
        }
    };
    let iov = &iov[..iov.len().min(IOV_MAX)];
    let operation = Operation::submit(|reactor, op| {
        // SAFETY: `file` and `sg` are borrowed by this future, which also owns `gathered`; `Operation` sees to it
        // that the future is not dropped before the completion.
        let rw = unsafe { Rw::new(file, write, iov, offset, dsync) };
        reactor.submit_op(file, &rw, op);
    });
    Errno::from_result(operation.await)
}

/// Reads at byte `offset` into `to`; may be short (0 = end of file).
///
/// # Errors
/// What the kernel says.
pub async fn read(file: &File, to: Sg<'_>, offset: u64) -> Result<usize, Errno> {
    transfer(file, false, to, offset, false).await
}

/// Writes `from` at byte `offset`; may be short. `dsync`: stable when done (RWF_DSYNC).
///
/// # Errors
/// What the kernel says.
pub async fn write(file: &File, from: Sg<'_>, offset: u64, dsync: bool) -> Result<usize, Errno> {
    transfer(file, true, from, offset, dsync).await
}

/// `fdatasync`.
///
/// # Errors
/// What the kernel says.
pub async fn fdatasync(file: &File) -> Result<(), Errno> {
    let operation = Operation::submit(|r, op| r.submit_fdatasync(file.engine, file.fd(), op));
    Errno::from_result(operation.await).map(drop)
}

/// `fallocate` with `mode` (FALLOC_FL_*), in bytes.
///
/// # Errors
/// What the kernel says.
pub async fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> Result<(), Errno> {
    let fd = file.fd();
    let call = move || calls::fallocate(fd, mode, offset, len);
    Errno::from_result(Operation::submit(|r, op| r.submit_call(op, call)).await).map(drop)
}

/// Runs `f` on a pool thread (ioctls and other calls that block).
pub async fn blocking<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let place = Arc::new(std::sync::Mutex::new(None));
    let answer = Arc::clone(&place);
    let call = move || {
        let value = f();
        *answer.lock().expect("no holder panics") = Some(value);
        0
    };
    Operation::submit(|r, op| r.submit_call(op, call)).await;
    let value = place.lock().expect("no holder panics").take();
    value.expect("the call has returned")
}

thread_local! {
    /// Nobody waits for the task that runs now any more.
    static CANCELLED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `task`; once `cancelled` is set, [`sleep_unless_cancelled`] in it ends. Everything else goes its way: what the
/// kernel has of a task's memory must come back.
pub async fn cancellable<T>(cancelled: Arc<AtomicBool>, task: impl Future<Output = T>) -> T {
    let mut task = pin!(task);
    std::future::poll_fn(|cx| {
        let before = CANCELLED.replace(cancelled.load(Ordering::Relaxed));
        let result = task.as_mut().poll(cx);
        CANCELLED.set(before);
        result
    })
    .await
}

/// Waits for `time`.
///
/// # Errors
/// ECANCELED if nobody waits for the task any more, see [`cancellable`] and [`Runtime::wake_sleepers`].
pub async fn sleep_unless_cancelled(time: Duration) -> Result<(), Errno> {
    let mut sleeping = pin!(sleep(time));
    std::future::poll_fn(|cx| match sleeping.as_mut().poll(cx) {
        _ if CANCELLED.get() => Poll::Ready(Err(Errno::ECANCELED)),
        ended => ended.map(Ok),
    })
    .await
}

/// Waits for `time`.
pub async fn sleep(time: Duration) {
    let rt = current();
    let due = rt.now() + time;
    std::future::poll_fn(|cx| {
        if rt.now() >= due {
            return Poll::Ready(());
        }
        let number = rt.timer_count.get();
        rt.timer_count.set(number + 1);
        let waker = cx.waker().clone();
        rt.timers.borrow_mut().push(Reverse(Timer { due, number, waker }));
        Poll::Pending
    })
    .await;
}

/// Drives `future` to its end on this thread, with a runtime of its own (control plane, tests).
///
/// # Panics
/// If the thread drives a runtime already, or no descriptors are left for one.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    block_on_with(WaitKind::Epoll, future)
}

/// [`block_on`], for those who must go on when no runtime can be had.
///
/// # Errors
/// EMFILE and others: nothing has been done.
///
/// # Panics
/// If the thread drives a runtime already.
pub fn try_block_on<T>(future: impl Future<Output = T>) -> Result<T, Errno> {
    #[cfg(any(test, feature = "sim"))]
    if let Some(world) = sim::current_world() {
        return Ok(sim::block_on(&*world, future));
    }
    let rt = Runtime::install(WaitKind::Epoll)?;
    Ok(drive(&rt, future))
}

/// [`block_on`] with a wait point of choice.
///
/// # Panics
/// As [`block_on`]; or if io_uring does not work here.
pub fn block_on_with<T>(kind: WaitKind, future: impl Future<Output = T>) -> T {
    #[cfg(any(test, feature = "sim"))]
    if let Some(world) = sim::current_world() {
        return sim::block_on(&*world, future);
    }
    drive(&Runtime::install(kind).expect("a thread can have a runtime"), future)
}

/// Whether the calling thread is inside of a simulation (`sim`): never in the program that is shipped.
pub fn is_simulated() -> bool {
    #[cfg(any(test, feature = "sim"))]
    if sim::current_world().is_some() {
        return true;
    }
    false
}

fn drive<T>(rt: &Runtime, future: impl Future<Output = T>) -> T {
    struct MainWaker(Arc<Inbox>);
    impl std::task::Wake for MainWaker {
        fn wake(self: Arc<Self>) {
            self.0.post(Mail::Wake { key: usize::MAX, generation: 0 });
        }
    }
    let waker = Waker::from(Arc::new(MainWaker(Arc::clone(rt.inbox()))));
    let mut future = pin!(future);
    let (mut events, mut value) = (Vec::new(), None);
    loop {
        if value.is_none()
            && let Poll::Ready(v) = future.as_mut().poll(&mut Context::from_waker(&waker))
        {
            value = Some(v);
        }
        rt.executor.run_ready(usize::MAX);
        // Tasks that the future left behind are driven to their end, too.
        if rt.executor.tasks() == 0
            && let Some(value) = value.take()
        {
            return value;
        }
        rt.reactor.borrow_mut().flush();
        if !rt.has_work() {
            rt.wait();
        }
        rt.collect(&mut events);
        events.clear();
    }
}

/// Whether io_uring works here, found out once; the reason if not.
///
/// # Errors
/// ENOSYS (not in this kernel), EPERM (seccomp, `kernel.io_uring_disabled`), ENOMEM, or ENOTSUP for a kernel that lacks
/// what we need of it.
pub fn uring_available() -> Result<(), Errno> {
    static FOUND: OnceLock<Result<(), Errno>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // For tests and for operators who want none: as if the kernel had refused.
        if std::env::var_os("VHOST_USER_BLK_NO_IO_URING").is_some() {
            return Err(Errno::EPERM);
        }
        uring::Uring::new().map(drop)
    })
}

/// The wait point to use: io_uring if it works, else epoll.
pub fn best_wait_kind() -> WaitKind {
    if uring_available().is_ok() { WaitKind::Uring } else { WaitKind::Epoll }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt;

    use super::*;

    fn open(path: &std::path::Path, engine: Engine) -> File {
        let direct = if engine == Engine::Native { libc::O_DIRECT } else { 0 };
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(direct)
            .open(path)
            .unwrap();
        File::new(file.into(), engine, 4096, 4096)
    }

    #[test]
    fn every_engine_under_every_wait() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for kind in [WaitKind::Uring, WaitKind::Epoll] {
            for engine in [Engine::Threads, Engine::Native, Engine::IoUring] {
                let path = dir.path().join("f");
                let file = open(&path, engine);
                block_on_with(kind, async {
                    let mut out = Buffer::new(8192, 4096);
                    out.bytes_mut().fill(0x5a);
                    let (a, b) = (out.iovec().part(0, 4096), out.iovec().part(4096, 4096));
                    let two = [b, a];
                    assert_eq!(write(&file, Sg::new(&two), 4096, true).await, Ok(8192));
                    fdatasync(&file).await.unwrap();
                    fallocate(
                        &file,
                        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                        4096,
                        4096,
                    )
                    .await
                    .unwrap();
                    let back = Buffer::new(16384, 4096);
                    let iov = [back.iovec()];
                    // Short at the end of the file.
                    assert_eq!(read(&file, Sg::new(&iov), 0).await, Ok(12288));
                    assert!(back.bytes()[..8192].iter().all(|b| *b == 0));
                    assert!(back.bytes()[8192..12288].iter().all(|b| *b == 0x5a));
                    assert_eq!(read(&file, Sg::new(&iov), 1 << 20).await, Ok(0));
                    assert_eq!(blocking(|| 7).await, 7);
                });
                // Errors arrive as errors.
                let closed = File::new(std::fs::File::open(&path).unwrap().into(), engine, 1, 1);
                block_on_with(kind, async {
                    let buffer = Buffer::new(4096, 4096);
                    let iov = [buffer.iovec()];
                    assert_eq!(
                        write(&closed, Sg::new(&iov), 0, false).await,
                        Err(Errno(libc::EBADF))
                    );
                });
                std::fs::remove_file(&path).unwrap();
            }
        }
    }

    #[test]
    fn many_operations_at_once_all_return() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = Rc::new(open(&dir.path().join("f"), Engine::IoUring));
        let count = Rc::new(Cell::new(0));
        block_on_with(WaitKind::Uring, async {
            for i in 0..6000u64 {
                let (file, count) = (Rc::clone(&file), Rc::clone(&count));
                current().spawn(async move {
                    let b = Buffer::new(512, 512);
                    assert_eq!(write(&file, Sg::new(&[b.iovec()]), i * 512, false).await, Ok(512));
                    count.set(count.get() + 1);
                });
            }
        });
        assert_eq!(count.get(), 6000);
    }

    #[test]
    fn wakers_work_across_threads() {
        let lock = Arc::new(sync::RangeLock::default());
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let lock = Arc::clone(&lock);
                std::thread::spawn(move || {
                    block_on(async {
                        for _ in 0..200 {
                            let _guard = lock.lock(0..1, true).await;
                            blocking(std::thread::yield_now).await;
                        }
                    });
                })
            })
            .collect();
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    /// A read that nothing would end: cancelled, it ends. One that ends by itself meanwhile, does.
    #[test]
    fn requests_in_the_kernel_are_cancelled() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let file = File::new(reader.into(), Engine::IoUring, 1, 1);
        let rt = Runtime::install(WaitKind::Uring).unwrap();
        let buffers = [Buffer::new(512, 1), Buffer::new(512, 1)];
        let iovs = buffers.each_ref().map(|b| [b.iovec()]);
        let mut events = Vec::new();
        let mut reactor = rt.reactor.borrow_mut();
        for (iov, n) in iovs.iter().zip(0..) {
            // SAFETY: file, array and buffer live until both have been answered.
            let rw = unsafe { Rw::new(&file, false, iov, 0, false) };
            reactor.submit(&file, &rw, n);
            reactor.flush();
        }
        reactor.cancel(1);
        while events.is_empty() {
            reactor.wait(None);
            reactor.reap(&mut events);
        }
        assert_eq!(events, [Event::Done(1, -libc::ECANCELED)]);
        std::io::Write::write_all(&mut writer, &[7; 512]).unwrap();
        while events.len() < 2 {
            reactor.wait(None);
            reactor.reap(&mut events);
        }
        assert_eq!(events[1], Event::Done(0, 512));
        // Nobody is there: nothing happens.
        reactor.cancel(0);
        reactor.flush();
        reactor.reap(&mut events);
        assert_eq!((events.len(), reactor.in_flight()), (2, 0));
    }

    #[test]
    fn only_cancelled_sleepers_wake_early() {
        let ended = Rc::new(RefCell::new(Vec::new()));
        block_on(async {
            let flags = [0, 1].map(|_| Arc::new(AtomicBool::new(false)));
            for (i, flag) in flags.iter().enumerate() {
                let (flag, ended) = (Arc::clone(flag), Rc::clone(&ended));
                let time = Duration::from_secs(if i == 0 { 3600 } else { 0 });
                let time = time + Duration::from_millis(20);
                current().spawn(async move {
                    let result = cancellable(flag, sleep_unless_cancelled(time)).await;
                    ended.borrow_mut().push((i, result));
                });
            }
            sync::give_way().await;
            flags[0].store(true, Ordering::Relaxed);
            current().wake_sleepers();
        });
        assert_eq!(*ended.borrow(), [(0, Err(Errno::ECANCELED)), (1, Ok(()))]);
    }

    #[test]
    fn timers_fire_in_order() {
        let order = Rc::new(RefCell::new(Vec::new()));
        block_on(async {
            for ms in [9u64, 1, 5] {
                let order = Rc::clone(&order);
                current().spawn(async move {
                    sleep(Duration::from_millis(ms)).await;
                    order.borrow_mut().push(ms);
                });
            }
        });
        assert_eq!(*order.borrow(), [1, 5, 9]);
    }
}
