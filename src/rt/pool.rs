//! A pool of threads for calls that block: `preadv2` and `pwritev2` without io_uring, `fdatasync`, `fallocate`, ioctls.
//!
//! One pool for the process, grown on demand; an idle thread leaves after ten seconds. Results travel to the asking thread's
//! mailbox. The jobs are behind a mutex: this is the engine for machines without io_uring, and for calls that take longer
//! than a lock does.
//!
//! # Files that hang
//!
//! A call to a server that has died returns when the server does, and keeps its thread until then. So each file has a
//! *lane*: its jobs that wait, and how many are at work. A job begins if fewer than 64 are at work in the whole pool, or
//! fewer than 4 of its own lane; lanes take turns. Whatever other files do, a file has its 4 threads, and what it asks for
//! beyond them waits where nobody else does. A lone file has the 64 that QEMU gives it. (To bound each file more tightly
//! within 64 would take that away, and as many dead files as fill the 64 would still stop all others.)
//!
//! There are at most 64 threads and 4 for each open file, and never more than 512, whatever a guest does or an image names as
//! its backing files.

use std::collections::{HashMap, VecDeque};
use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use super::Rw;
use super::mailbox::Mail;
use super::runtime::Inbox;
use crate::error::Errno;
use crate::sandbox::{self, Thread};

/// Jobs at work, whosesoever: QEMU's default for `thread-pool-max`.
const SHARED_MAX: usize = 64;
/// Jobs at work of one lane when the others have taken those: enough for a disk to go on with reads beside a flush, few
/// enough for a hundred disks.
const OWN_MAX: usize = 4;
/// Jobs at work, and threads, in all: the own ones of a hundred files. An image can name more than that below it.
const ALL_MAX: usize = 512;
/// QEMU's pool threads leave after ten idle seconds, too.
const IDLE: Duration = Duration::from_secs(10);

/// The file that a job may have to wait for; `None`: it only computes.
pub type Owner = Option<RawFd>;

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
    Call(Owner, Box<dyn FnOnce() + Send>),
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Job>,
    at_work: usize,
}

#[derive(Default)]
struct State {
    /// Never removed: there are no more than descriptors at a time.
    lanes: HashMap<Owner, Lane>,
    /// The lanes with waiting jobs, each once, in the order of their turns.
    turns: VecDeque<Owner>,
    at_work: usize,
    threads: usize,
    /// Idle threads leave at once.
    retiring: bool,
}

impl State {
    fn add(&mut self, job: Job) {
        let owner = job.owner();
        let lane = self.lanes.entry(owner).or_default();
        if lane.waiting.is_empty() {
            self.turns.push_back(owner);
        }
        lane.waiting.push_back(job);
    }

    /// Whose turn it is, of those with a job that may begin: a place in `turns`.
    fn next(&self) -> Option<usize> {
        if self.at_work >= ALL_MAX {
            return None;
        }
        let may_begin = |owner| {
            self.at_work < SHARED_MAX
                || self.lanes.get(owner).is_some_and(|lane| lane.at_work < OWN_MAX)
        };
        self.turns.iter().position(may_begin)
    }

    /// How many threads the jobs that may begin could need: at most a few of one lane too many, which then find nothing to do.
    fn wanted(&self) -> usize {
        let (mut own, mut other) = (0, 0);
        for lane in self.turns.iter().filter_map(|owner| self.lanes.get(owner)) {
            let n = lane.waiting.len().min(OWN_MAX.saturating_sub(lane.at_work));
            own += n;
            other += lane.waiting.len() - n;
        }
        own + other.min(SHARED_MAX.saturating_sub(self.at_work))
    }

    /// Begins a job, if one may: for a thread whose last one was of `last`. In a full pool its lane goes first while it has
    /// less than its own, or else this thread would be missing there: only [`Pool::push`] makes threads.
    fn begin(&mut self, last: Option<Owner>) -> Option<Job> {
        let full = self.threads >= SHARED_MAX;
        let poor = |owner: &Owner| self.lanes.get(owner).is_some_and(|l| l.at_work < OWN_MAX);
        let kept = last.filter(|owner| full && poor(owner));
        let kept = kept.and_then(|last| self.turns.iter().position(|owner| *owner == last));
        let owner = self.turns.remove(kept.or_else(|| self.next())?)?;
        let lane = self.lanes.get_mut(&owner)?;
        let job = lane.waiting.pop_front()?;
        lane.at_work += 1;
        self.at_work += 1;
        if !lane.waiting.is_empty() {
            self.turns.push_back(owner);
        }
        Some(job)
    }

    fn end(&mut self, owner: Owner) {
        self.at_work -= 1;
        self.lanes.entry(owner).or_default().at_work -= 1;
    }
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
    /// Queues `job`, and sees to it that somebody comes for it if it may begin.
    pub fn push(&'static self, job: Job) {
        let mut state = self.lock();
        state.add(job);
        state.retiring = false;
        self.call_one(&mut state);
        // With at least one thread the job waits its turn; without any it must be done here and now.
        if state.threads == 0 {
            drop(self.work(state));
        }
    }

    /// Lets all idle threads go, now instead of later; those that come after a [`Pool::push`] stay. Does not wait for them.
    pub fn retire(&self) {
        self.lock().retiring = true;
        self.work.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// Has one more thread come if a job may begin. New ones are made here alone: made by those of the pool, which have given
    /// up system calls, they would add their own filter to that of their maker, and so on.
    fn call_one(&'static self, state: &mut State) {
        if state.next().is_none() {
            return;
        }
        // Those that are not at work wait, or are on their way.
        if state.threads >= ALL_MAX.min(state.at_work + state.wanted()) {
            self.work.notify_one();
            return;
        }
        let spawned = std::thread::Builder::new()
            .name("blk-pool".into())
            .stack_size(256 << 10)
            .spawn(move || {
                sandbox::thread(Thread::Pool);
                self.run();
            });
        match spawned {
            Ok(_) => state.threads += 1,
            Err(e) if state.threads == 0 => {
                log::warn!("no thread for blocking calls, doing them inline: {e}");
            }
            Err(e) => log::debug!("no more threads for blocking calls: {e}"),
        }
    }

    /// Does what there is to do.
    fn work<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let mut last = None;
        while let Some(job) = state.begin(last) {
            drop(state);
            let owner = job.owner();
            job.run();
            state = self.lock();
            state.end(owner);
            last = Some(owner);
        }
        state
    }

    fn run(&self) {
        let mut state = self.lock();
        let mut waited = false;
        loop {
            state = self.work(state);
            if waited || state.retiring {
                state.threads -= 1;
                return;
            }
            let (back, timeout) = self.work.wait_timeout(state, IDLE).expect("no holder panics");
            state = back;
            waited = timeout.timed_out() && state.next().is_none();
        }
    }
}

impl Job {
    fn owner(&self) -> Owner {
        match self {
            Job::Rw { rw, .. } => Some(rw.fd),
            Job::Call(owner, _) => *owner,
        }
    }

    fn run(self) {
        match self {
            Job::Rw { rw, token, inbox } => {
                let result = rw.call();
                inbox.post(Mail::Done { token, result });
            }
            Job::Call(_, f) => f(),
        }
    }
}

impl Rw {
    /// Does the transfer with a system call that may block. Bytes, or a negative error number.
    pub fn call(&self) -> i32 {
        self.call_with(if self.dsync { libc::RWF_DSYNC } else { 0 })
    }

    /// Does a read if the page cache has all of it: its bytes.
    pub fn call_cached(&self) -> Option<i32> {
        let n = self.call_with(libc::RWF_NOWAIT);
        usize::try_from(n).is_ok_and(|n| n == self.len).then_some(n)
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

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// A job of `owner` that tells `done` what it is, after `hold` if there is one.
    fn job(owner: RawFd, done: &Sender<RawFd>, hold: Option<&Arc<Mutex<()>>>) -> Job {
        let (done, hold) = (done.clone(), hold.cloned());
        Job::Call(
            Some(owner),
            Box::new(move || {
                drop(hold.as_ref().map(|hold| hold.lock()));
                done.send(owner).unwrap();
            }),
        )
    }

    fn take(from: &Receiver<RawFd>, n: usize) -> Vec<RawFd> {
        (0..n).map(|_| from.recv_timeout(Duration::from_secs(60)).expect("goes on")).collect()
    }

    /// Three files that hang, with more requests than there are threads: two others are served, with all that they may have at once; the threads are as many as promised. Then the three come back, and nothing was lost.
    #[test]
    fn files_that_hang_leave_others_their_threads() {
        let pool: &'static Pool = Box::leak(Box::default());
        let ((hung, ended), (done, served)) = (channel(), channel());
        let server = Arc::new(Mutex::new(()));
        let dead = server.lock().unwrap();
        for _ in 0..100 {
            (1..=3).for_each(|file| pool.push(job(file, &hung, Some(&server))));
        }
        for round in 0..400 {
            // Sometimes more than it has threads of its own, so that its threads meet the others' jobs.
            let n = 1 + round % (2 * OWN_MAX);
            (0..n).for_each(|_| (4..6).for_each(|file| pool.push(job(file, &done, None))));
            assert_eq!(take(&served, 2 * n).iter().filter(|file| **file == 5).count(), n);
        }
        // As many at once as promised: they wait for each other.
        let all = Arc::new(Barrier::new(OWN_MAX));
        for _ in 0..OWN_MAX {
            let (all, done) = (Arc::clone(&all), done.clone());
            let meet = move || {
                all.wait();
                done.send(4).unwrap();
            };
            pool.push(Job::Call(Some(4), Box::new(meet)));
        }
        take(&served, OWN_MAX);
        assert!(ended.try_recv().is_err());
        let threads = pool.lock().threads;
        assert!((SHARED_MAX..=SHARED_MAX + 5 * OWN_MAX).contains(&threads), "{threads}");
        drop(dead);
        assert_eq!(take(&ended, 300).iter().filter(|file| **file == 2).count(), 100);
        pool.retire();
    }

    /// A file that hangs does not get the threads that another one of a full pool is at work with: nobody would make new ones.
    #[test]
    fn threads_of_a_full_pool_stay_with_their_file() {
        let pool: &'static Pool = Box::leak(Box::default());
        let ((hung, ended), (done, served)) = (channel(), channel());
        let (server, slow) = (Arc::new(Mutex::new(())), Arc::new(Mutex::new(())));
        let (dead, hold) = (server.lock().unwrap(), slow.lock().unwrap());
        (0..SHARED_MAX - OWN_MAX).for_each(|_| pool.push(job(1, &hung, Some(&server))));
        (0..OWN_MAX).for_each(|_| pool.push(job(2, &done, Some(&slow))));
        while pool.lock().at_work < SHARED_MAX {
            std::thread::yield_now();
        }
        (0..10).for_each(|_| pool.push(job(1, &hung, Some(&server))));
        (0..10).for_each(|_| pool.push(job(2, &done, Some(&slow))));
        drop(hold);
        take(&served, OWN_MAX + 10);
        drop(dead);
        take(&ended, SHARED_MAX - OWN_MAX + 10);
        pool.retire();
    }

    /// Files without number that hang: threads have one.
    #[test]
    fn many_files_do_not_make_many_threads() {
        const FILES: usize = 2 * ALL_MAX / OWN_MAX;
        let pool: &'static Pool = Box::leak(Box::default());
        let (done, ended) = channel();
        let server = Arc::new(Mutex::new(()));
        let dead = server.lock().unwrap();
        for _ in 0..OWN_MAX {
            (0..).take(FILES).for_each(|file| pool.push(job(file, &done, Some(&server))));
        }
        while pool.lock().at_work < ALL_MAX {
            std::thread::yield_now();
        }
        assert_eq!(pool.lock().threads, ALL_MAX);
        drop(dead);
        take(&ended, FILES * OWN_MAX);
        pool.retire();
    }

    /// A lone file has the whole pool, and no more.
    #[test]
    fn a_lone_file_has_all_threads() {
        let pool: &'static Pool = Box::leak(Box::default());
        let (done, ended) = channel();
        let server = Arc::new(Mutex::new(()));
        let dead = server.lock().unwrap();
        (0..200).for_each(|_| pool.push(job(1, &done, Some(&server))));
        while pool.lock().at_work < SHARED_MAX {
            std::thread::yield_now();
        }
        let state = pool.lock();
        assert_eq!((state.at_work, state.lanes[&Some(1)].waiting.len()), (SHARED_MAX, 136));
        assert!(state.threads <= SHARED_MAX + OWN_MAX, "{}", state.threads);
        drop((state, dead));
        take(&ended, 200);
        pool.retire();
    }
}
