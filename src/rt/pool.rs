//! A pool of threads for calls that block: `preadv2` and `pwritev2` without io_uring, `fdatasync`, `fallocate`, ioctls.
//!
//! One pool for the process, grown on demand to 64 threads (QEMU's `thread-pool-max`); an idle thread leaves after
//! ten seconds. Results travel to the asking thread's mailbox. The job queue is behind a mutex: this is the engine for
//! machines without io_uring, and for calls that take longer than a lock does.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Duration;

use super::mailbox::Mail;
use super::{Inbox, Rw};
use crate::error::Errno;
use crate::sandbox::{self, Thread};

/// QEMU's default for `thread-pool-max`.
const THREADS_MAX: usize = 64;
/// QEMU's pool threads leave after ten idle seconds, too.
const IDLE: Duration = Duration::from_secs(10);

/// One piece of work.
pub enum Job {
    /// A read or write; its result goes to `inbox` under `token`.
    Rw {
        /// What to read or write.
        rw: Rw,
        /// The token of the answer.
        token: u64,
        /// Who asked.
        inbox: Arc<Inbox>,
    },
    /// Any call; it posts its own result.
    Call(Box<dyn FnOnce() + Send>),
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: usize,
    idle: usize,
    /// Idle threads leave at once.
    retiring: bool,
}

/// The process's pool.
#[derive(Default)]
pub struct Pool {
    state: Mutex<State>,
    work: Condvar,
}

/// The one pool.
pub fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(Pool::default)
}

impl Pool {
    /// Queues `job`; starts a thread if none is idle and the limit allows.
    pub fn push(&'static self, job: Job) {
        let mut state = self.state.lock().expect("no holder panics");
        state.jobs.push_back(job);
        state.retiring = false;
        if state.idle >= state.jobs.len() {
            self.work.notify_one();
            return;
        }
        if state.threads < THREADS_MAX {
            let spawned = std::thread::Builder::new()
                .name("blk-pool".into())
                .stack_size(256 << 10)
                .spawn(move || {
                    sandbox::thread(Thread::Pool);
                    self.run();
                });
            match spawned {
                Ok(_) => state.threads += 1,
                // With at least one thread the job waits its turn; without any it must be done here and now.
                Err(e) if state.threads == 0 => {
                    log::warn!("no thread for blocking calls, doing them inline: {e}");
                    let jobs: Vec<Job> = state.jobs.drain(..).collect();
                    drop(state);
                    jobs.into_iter().for_each(Job::run);
                }
                Err(e) => log::debug!("no more threads for blocking calls: {e}"),
            }
        }
    }

    /// Lets all idle threads go, now instead of later; those that come after a [`Pool::push`] stay. Does not wait for them.
    pub fn retire(&self) {
        self.state.lock().expect("no holder panics").retiring = true;
        self.work.notify_all();
    }

    fn run(&self) {
        let mut state = self.state.lock().expect("no holder panics");
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job.run();
                state = self.state.lock().expect("no holder panics");
                continue;
            }
            if state.retiring {
                state.threads -= 1;
                return;
            }
            state.idle += 1;
            let (back, timeout) = self.work.wait_timeout(state, IDLE).expect("no holder panics");
            state = back;
            state.idle -= 1;
            if (timeout.timed_out() || state.retiring) && state.jobs.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }
}

impl Job {
    fn run(self) {
        match self {
            Job::Rw { rw, token, inbox } => {
                let result = rw.call();
                inbox.post(Mail::Done { token, result });
            }
            Job::Call(f) => f(),
        }
    }
}

impl Rw {
    /// Does the transfer with a system call that may block. Bytes, or a negative error number.
    pub fn call(&self) -> i32 {
        self.call_with(if self.dsync { libc::RWF_DSYNC } else { 0 })
    }

    /// Reads what is in the page cache: fewer bytes or EAGAIN if that is not all; EOPNOTSUPP where it cannot be asked.
    pub fn call_cached(&self) -> i32 {
        self.call_with(libc::RWF_NOWAIT)
    }

    fn call_with(&self, flags: i32) -> i32 {
        let Ok(offset) = libc::off_t::try_from(self.offset) else { return -libc::EINVAL };
        let (iov, count) = (self.iov.cast::<libc::iovec>(), self.count.cast_signed());
        loop {
            // SAFETY: whoever made the `Rw` keeps the iovec array, the memory it points to and the descriptor alive
            // until the result has arrived; `IoVec` has the layout of `iovec`.
            let n = unsafe {
                if self.write {
                    libc::pwritev2(self.fd, iov, count, offset, flags)
                } else {
                    libc::preadv2(self.fd, iov, count, offset, flags)
                }
            };
            match i32::try_from(n) {
                Ok(n) if n >= 0 => return n,
                Ok(_) => match Errno::last() {
                    Errno(libc::EINTR) => {}
                    e => return -e.0,
                },
                // The kernel never transfers more than MAX_RW_COUNT (2 GiB minus a page).
                Err(_) => return -libc::EIO,
            }
        }
    }
}
