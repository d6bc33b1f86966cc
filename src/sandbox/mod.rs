//! What the program cannot do any more once it serves, whoever gets control of it.
//!
//! [`enter`] is called when everything is set up: images and sockets are open, the pidfile is written, nobody is served.
//! At that moment the process has one thread (it is made sure of), so that what is forbidden there is forbidden to every
//! later thread, without a gap:
//!
//! * **no_new_privs**, and no **capability** (but one, at times). None is needed for what is open. The kernel counts the rings of an
//!   io_uring as locked memory, per user, of who has no CAP_IPC_LOCK (seen on 6.18; the usual 8 MiB are some fifty rings): the
//!   program lifts RLIMIT_MEMLOCK when it starts, and keeps that one capability where it may not (a container's root).
//!   Lost with CAP_SYS_RESOURCE: a file system's blocks reserved for root. Lost with CAP_DAC_OVERRIDE: removing sockets from
//!   directories of other users (a left-over socket is replaced by the next start).
//! * **Landlock** (`files`): a file that is open may be opened again in the mode it is open in; files may be removed from
//!   the directories of sockets and pidfile; everything may be done below what `--allow-path` names. Open files are not affected.
//!   No TCP, no signals to others, no abstract sockets of others.
//! * **seccomp** (`calls`): an allow-list for the process, and on top of it a shorter one for each [`Thread`], installed by the
//!   thread itself as it starts. A filter can only be added to, and threads are started by threads (a worker starts
//!   those of the pool), so the lists are nested: process > session > worker > pool; and process > metrics. A thread that nobody has given a
//!   kind has its creator's.
//!
//! **A call that is not on the list** fails with ENOSYS. C libraries try newer calls first and fall back on ENOSYS, on nothing
//! else (EPERM from a new call is taken for the answer), so a guest does not lose its disk to an update of libc, as it would if the
//! process were killed. SIGSYS with a handler of ours that logs would be worse: threads are started and ended with all signals
//! blocked, where it kills. Instead the *kernel* logs each refusal (SECCOMP_FILTER_FLAG_LOG: `type=1326 ... syscall=N` in `dmesg`,
//! or in the audit log), but for the one that libc tries with each thread (`clone3`).
//! What no library calls by itself and an attacker wants (a new program, another process's memory, mounts, kernel modules
//! ...) **kills** the process: who makes such a call is not us any more, and must not try the next one. That is logged in the same
//! way, and who started the process sees SIGSYS.
//!
//! **io_uring** passes by seccomp: its operations are restricted on the ring itself, see `rt/uring.rs`.
//!
//! **Core dumps** leave out guest memory (`mem/map.rs`). `PR_SET_DUMPABLE` stays: without it the process's own `/proc`
//! belongs to root, and neither operators nor support can look at a hanging disk. `--user` clears it anyway (the kernel does).
//!
//! What a kernel has not, or what a container or service manager forbids (its own filters answer EPERM), is named in a warning; it is
//! served without it.
#![deny(unsafe_code)]

mod calls;
mod files;
pub mod privileges;

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use seccompiler::BpfProgram;

use crate::err;
use crate::error::Result;
use crate::sys;

/// How long [`enter`] waits for other threads to end: they have nothing left to do, only the kernel has.
const QUIET: Duration = Duration::from_secs(5);

/// `PF_IO_WORKER` of `linux/sched.h`.
const IO_WORKER: u64 = 0x10;

/// What a thread does, and so may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Talks to a front end.
    Session,
    /// Serves queues, or tends to metadata.
    Worker,
    /// Makes calls that block.
    Pool,
    /// Serves metrics.
    Metrics,
}

/// What may be touched later although it is not open. A file is meant itself, whatever its name means later; so is a
/// directory, and all that will be below it.
#[derive(Clone, Debug, Default)]
pub struct Allow {
    rules: Vec<(PathBuf, Right)>,
}

/// What may be done with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Right {
    /// The file may be opened for reading.
    Read,
    /// The file may be opened for reading and writing.
    Write,
    /// Files may be removed from the directory.
    Remove,
    /// Files and directories may be read, written, made and removed here and below.
    All,
}

impl Allow {
    /// The file at `path` may be opened for reading, and for writing if `writable`.
    pub fn file(&mut self, path: impl Into<PathBuf>, writable: bool) {
        self.rules.push((path.into(), if writable { Right::Write } else { Right::Read }));
    }

    /// Files may be removed from the directory `path`.
    pub fn remove_in(&mut self, path: impl Into<PathBuf>) {
        self.rules.push((path.into(), Right::Remove));
    }

    /// Files and directories may be read, written, made and removed at `path` and below.
    pub fn directory(&mut self, path: impl Into<PathBuf>) {
        self.rules.push((path.into(), Right::All));
    }
}

/// The filters of threads, once the process is in the sandbox: no thread has to make its own.
struct Filters {
    session: BpfProgram,
    worker: BpfProgram,
    pool: BpfProgram,
    metrics: BpfProgram,
}

static FILTERS: OnceLock<Filters> = OnceLock::new();
static REFUSES_FILES: AtomicBool = AtomicBool::new(false);

/// Gives up everything that is not needed any more, for ever, for the whole process; but for what only who may become another
/// user can do, [`privileges::bound_capabilities`]: that comes before both.
///
/// # Errors
/// If there are other threads, if something in `allow` is not there, or if the kernel refuses what it should allow. Not if
/// it lacks something: that is logged.
pub fn enter(allow: &Allow) -> Result<()> {
    alone()?;
    sys::limit_arenas();
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        err!("cannot enter the sandbox: {what}: {e}").with_hint("--sandbox=off goes without it")
    };
    privileges::no_new_privileges().map_err(|e| failed("no_new_privs", &e))?;
    REFUSES_FILES.store(files::restrict(allow)?, Ordering::Relaxed);
    if !refuses_files() {
        log::warn!(
            "the kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, lsm=), or somebody forbids it: every file may be opened"
        );
    }
    privileges::drop_capabilities().map_err(|e| failed("capabilities", &e))?;
    let filters = calls::filters().map_err(|e| failed("seccomp", &e))?;
    let (process, quiet, deadly) = (&filters.process, &filters.quiet, &filters.deadly);
    // The last takes away the least: it must not be in the way of the others.
    for (filter, logged) in [(process, true), (quiet, false), (deadly, false)] {
        match privileges::filter_calls(filter, logged) {
            Ok(()) => {}
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) =>
            {
                log::warn!(
                    "the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER), or somebody else's forbid ours: no system call is \
                     refused by us"
                );
                return Ok(());
            }
            Err(e) => return Err(failed("seccomp", &e)),
        }
    }
    let calls::Filters { session, worker, pool, metrics, .. } = filters;
    FILTERS
        .set(Filters { session, worker, pool, metrics })
        .map_err(|_| err!("in the sandbox already"))
}

/// Whether only some files can be opened.
pub fn refuses_files() -> bool {
    REFUSES_FILES.load(Ordering::Relaxed)
}

/// To be called by a thread before it does anything, with what it is going to do. Nothing happens outside of a sandbox.
pub fn thread(kind: Thread) {
    let Some(filters) = FILTERS.get() else { return };
    let filter = match kind {
        Thread::Session => &filters.session,
        Thread::Worker => &filters.worker,
        Thread::Pool => &filters.pool,
        Thread::Metrics => &filters.metrics,
    };
    if let Err(e) = privileges::filter_calls(filter, true) {
        // That of the process holds all the same.
        log::warn!("no filter for this {kind:?} thread: {e}");
    }
}

/// Waits until the calling thread is the only one: others would not be restricted. They must have been told to end.
fn alone() -> Result<()> {
    let start = Instant::now();
    loop {
        let names = match threads() {
            Ok(names) if names.len() > 1 => names,
            Ok(_) => return Ok(()),
            Err(e) => {
                log::warn!("cannot see whether there are threads outside of the sandbox: {e}");
                return Ok(());
            }
        };
        if start.elapsed() > QUIET {
            return Err(err!(
                "cannot enter the sandbox: threads are running: {}",
                names.join(", ")
            )
            .with_hint("--sandbox=off goes without it"));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The names of this process's threads, without those of the kernel that work for an io_uring: they run no code of ours, what they
/// are told is restricted on the ring, and they stay for seconds after their last work.
fn threads() -> io::Result<Vec<String>> {
    let tasks = std::fs::read_dir("/proc/self/task")?;
    // One that ends meanwhile has no name any more; it is looked at again.
    let stat = |task: std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("stat")).unwrap_or_default()
    };
    Ok(tasks
        .flatten()
        .map(stat)
        .filter(|stat| !works_for_ring(stat))
        .map(|stat| name(&stat))
        .collect())
}

/// The name in `/proc/PID/stat`: it may itself have parentheses.
fn name(stat: &str) -> String {
    let name = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(')'));
    name.map_or(stat, |(name, _)| name).to_owned()
}

/// Whether `/proc/PID/stat`, whose field 9 are the kernel's flags, is that of a ring's worker.
fn works_for_ring(stat: &str) -> bool {
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let flags = after_name.split_whitespace().nth(6).and_then(|flags| flags.parse().ok());
    flags.unwrap_or(0_u64) & IO_WORKER != 0
}
