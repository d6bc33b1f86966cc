//! Which system calls may be made: seccomp.
//!
//! Beside what this program calls there is what C libraries call by themselves, now or in the next version: looking at who
//! and where they are, starting and ending threads, memory. It is on the lists wherever it gives nothing away.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

/// Calls with any arguments.
type Calls = &'static [c_long];

/// What a thread needs to be one: memory, locks, a clock, its start and end; and descriptors that it has.
const THREAD: Calls = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_getcpu,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mincore,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_yield,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_times,
    libc::SYS_uname,
    libc::SYS_write,
    libc::SYS_writev,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// What disks are made of.
const DISK: Calls = &[
    libc::SYS_copy_file_range,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_msync,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sync_file_range,
];

/// What a runtime submits to and waits in. And two for connections that it has: who sees a disk grow says so.
const RUNTIME: Calls = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_io_cancel,
    libc::SYS_io_destroy,
    libc::SYS_io_getevents,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
];

/// What a conversation takes, with a front end or another process of ours; and images opened again, with what is kept about
/// them in files (Landlock says which).
const SESSION: Calls = &[
    libc::SYS_accept4,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_flock,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_memfd_create,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_readlinkat,
    libc::SYS_recvfrom,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_sendfile,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
    libc::SYS_statfs,
    libc::SYS_unlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_dup2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mkdir,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_rename,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_unlink,
];

/// What serving metrics takes: connections that are there already, or come to a socket that listens.
const METRICS: Calls = &[libc::SYS_accept4, libc::SYS_recvfrom, libc::SYS_sendto];

/// What starting and ending take.
const CONTROL: Calls = &[libc::SYS_chdir, libc::SYS_signalfd4];

/// What C libraries try although they can do without it, every time: refused without a word in the log. The flags of `clone3`
/// are out of a filter's reach; `clone` is tried next.
const QUIETLY_REFUSED: Calls = &[libc::SYS_clone3];

/// What nothing calls by accident: the end of the process.
const DEADLY: Calls = &[
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_init_module,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_swapon,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// The requests of `ioctl` that drivers (`linux/fs.h`) and the standard library (`FIONBIO`, `FIOCLEX`) make.
const IOCTLS: &[u64] = &[
    0x125e,      // BLKROGET
    0x1268,      // BLKSSZGET
    0x1277,      // BLKDISCARD
    0x127b,      // BLKPBSZGET
    0x127f,      // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
    0x5421,      // FIONBIO
    0x5451,      // FIOCLEX
];

/// The operations of `prctl` that a thread needs at its start.
const PRCTLS: &[libc::c_int] = &[libc::PR_SET_NAME, libc::PR_SET_NO_NEW_PRIVS];

/// Compiled filters.
pub(super) struct Filters {
    /// For all threads.
    pub(super) process: BpfProgram,
    /// For all threads, too: [`QUIETLY_REFUSED`]. The rest is none of its business.
    pub(super) quiet: BpfProgram,
    /// For all threads, too: what it names is deadly, the rest none of its business.
    pub(super) deadly: BpfProgram,
    pub(super) session: BpfProgram,
    pub(super) worker: BpfProgram,
    pub(super) pool: BpfProgram,
    pub(super) metrics: BpfProgram,
}

/// All filters, for this process: its number is part of them.
///
/// # Errors
/// An architecture that seccompiler does not know.
pub(super) fn filters() -> Result<Filters, BackendError> {
    let named = |list: Calls| list.iter().map(|call| (*call, Vec::new())).collect();
    Ok(Filters {
        process: allow(&[THREAD, DISK, RUNTIME, SESSION, CONTROL])?,
        quiet: compile(named(QUIETLY_REFUSED), SeccompAction::Allow, refused())?,
        deadly: compile(named(DEADLY), SeccompAction::Allow, SeccompAction::KillProcess)?,
        session: allow(&[THREAD, DISK, RUNTIME, SESSION])?,
        worker: allow(&[THREAD, DISK, RUNTIME])?,
        pool: allow(&[THREAD, DISK])?,
        metrics: allow(&[THREAD, METRICS])?,
    })
}

/// What happens to a call that is on no list.
fn refused() -> SeccompAction {
    SeccompAction::Errno(libc::ENOSYS.cast_unsigned())
}

/// A filter that allows `lists` and, with some arguments, a few more.
fn allow(lists: &[Calls]) -> Result<BpfProgram, BackendError> {
    // What another filter refuses is let through here: this one has it logged.
    let lists = lists.iter().chain([&QUIETLY_REFUSED]);
    let mut rules: BTreeMap<_, _> =
        lists.flat_map(|list| list.iter()).map(|call| (*call, Vec::new())).collect();
    // Memory that is executed is what is mapped already.
    let not_executable = || masked(2, libc::PROT_EXEC, 0);
    rules.insert(libc::SYS_mmap, vec![not_executable()?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    // A thread, no process.
    rules.insert(libc::SYS_clone, vec![masked(0, libc::CLONE_THREAD, libc::CLONE_THREAD)?]);
    // Signals to this process only.
    let us = u64::from(std::process::id());
    rules.insert(libc::SYS_kill, vec![equal(0, us)?]);
    rules.insert(libc::SYS_tgkill, vec![equal(0, us)?]);
    // Limits are looked at: no new ones are given.
    rules.insert(libc::SYS_prlimit64, vec![none(2)?]);
    // Time limits and the like. Other levels are a large part of the kernel.
    rules
        .insert(libc::SYS_setsockopt, vec![equal(1, u64::from(libc::SOL_SOCKET.cast_unsigned()))?]);
    let requests = IOCTLS.iter().map(|request| equal(1, *request));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
    let operations = PRCTLS.iter().map(|operation| equal(0, u64::from(operation.cast_unsigned())));
    rules.insert(libc::SYS_prctl, operations.collect::<Result<_, _>>()?);
    compile(rules, refused(), SeccompAction::Allow)
}

/// The argument is a null pointer.
fn none(arg: u8) -> Result<SeccompRule, BackendError> {
    let condition = SeccompCondition::new(arg, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
    SeccompRule::new(vec![condition])
}

/// Every other argument looked at is an int, or is cut to 32 bits by the kernel before it is looked at.
fn condition(arg: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    let condition = SeccompCondition::new(arg, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}

fn equal(arg: u8, value: u64) -> Result<SeccompRule, BackendError> {
    condition(arg, SeccompCmpOp::Eq, value)
}

fn masked(arg: u8, mask: libc::c_int, value: libc::c_int) -> Result<SeccompRule, BackendError> {
    let (mask, value) = (u64::from(mask.cast_unsigned()), u64::from(value.cast_unsigned()));
    condition(arg, SeccompCmpOp::MaskedEq(mask), value)
}

fn compile(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, action, arch)?.try_into()
}
