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
//!   those of the pool), so the lists are nested: process > session > worker > pool.
//!
//! A call that is not on the list fails with ENOSYS: C libraries try newer calls first and fall back on ENOSYS, on nothing
//! else; a guest must not lose its disk to an update of libc. What no library calls by itself and an attacker wants (a new
//! program, another process's memory, mounts, kernel modules ...) kills the process, and the kernel's log says so.
//!
//! **io_uring** passes by seccomp: its operations are restricted on the ring itself, see `rt/uring.rs`.
//!
//! **Core dumps** leave out guest memory (`mem/map.rs`). `PR_SET_DUMPABLE` stays: without it the process's own `/proc`
//! belongs to root, and neither operators nor support can look at a hanging disk. `--user` clears it anyway (the kernel does).
//!
//! A kernel without one of these is named in a warning, and served without it.
#![deny(unsafe_code)]

mod calls;
mod files;
pub mod privileges;

use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use seccompiler::BpfProgram;

use crate::err;
use crate::error::Result;

/// How long [`enter`] waits for other threads to end: they have nothing left to do, only the kernel has.
const QUIET: Duration = Duration::from_secs(5);

/// What a thread does, and so may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Talks to a front end.
    Session,
    /// Serves queues, or tends to metadata.
    Worker,
    /// Makes calls that block.
    Pool,
}

/// What may be touched later although it is not open.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Directories in which files may be removed.
    pub remove_in: Vec<PathBuf>,
    /// Files and directories in and below which everything may be done.
    pub allow: Vec<PathBuf>,
}

/// The filters of threads, once the process is in the sandbox: no thread has to make its own.
struct Filters {
    session: BpfProgram,
    worker: BpfProgram,
    pool: BpfProgram,
}

static FILTERS: OnceLock<Filters> = OnceLock::new();

/// Gives up everything that is not needed any more, for ever, for the whole process.
///
/// # Errors
/// If there are other threads, if something in `config` is not there, or if the kernel refuses what it should allow. Not if
/// it lacks something: that is logged.
pub fn enter(config: &Config) -> Result<()> {
    alone()?;
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        err!("cannot enter the sandbox: {what}: {e}").with_hint("--sandbox=off goes without it")
    };
    privileges::no_new_privileges().map_err(|e| failed("no_new_privs", &e))?;
    if !files::restrict(config)? {
        log::warn!(
            "the kernel has no Landlock (CONFIG_SECURITY_LANDLOCK, lsm=): every file may be opened"
        );
    }
    privileges::bound_capabilities();
    privileges::drop_capabilities().map_err(|e| failed("capabilities", &e))?;
    let filters = calls::filters().map_err(|e| failed("seccomp", &e))?;
    for filter in [&filters.process, &filters.deadly] {
        match seccompiler::apply_filter(filter) {
            Ok(()) => {}
            Err(e) if lacks_seccomp(&e) => {
                log::warn!(
                    "the kernel has no seccomp filters (CONFIG_SECCOMP_FILTER): every system call may be made"
                );
                return Ok(());
            }
            Err(e) => return Err(failed("seccomp", &e)),
        }
    }
    let calls::Filters { session, worker, pool, .. } = filters;
    FILTERS.set(Filters { session, worker, pool }).map_err(|_| err!("in the sandbox already"))
}

/// To be called by a thread before it does anything, with what it is going to do. Nothing happens outside of a sandbox.
pub fn thread(kind: Thread) {
    let Some(filters) = FILTERS.get() else { return };
    let filter = match kind {
        Thread::Session => &filters.session,
        Thread::Worker => &filters.worker,
        Thread::Pool => &filters.pool,
    };
    if let Err(e) = seccompiler::apply_filter(filter) {
        // That of the process holds all the same.
        log::warn!("no filter for this {kind:?} thread: {e}");
    }
}

fn lacks_seccomp(error: &seccompiler::Error) -> bool {
    let seccompiler::Error::Seccomp(e) = error else { return false };
    matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS))
}

/// Waits until the calling thread is the only one: others would not be restricted. They must have been told to end; kernel
/// threads of an io_uring that was closed take a moment.
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

/// The names of this process's threads.
fn threads() -> io::Result<Vec<String>> {
    let tasks = std::fs::read_dir("/proc/self/task")?;
    // One that ends meanwhile has no name any more; it is looked at again.
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    Ok(tasks.flatten().map(|t| name(t).unwrap_or_default().trim().to_owned()).collect())
}
