//! The io_uring of one thread: its submission side, completions, and the one place where the thread blocks.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::OnceLock;
use std::time::Duration;

use io_uring::{EnterFlags, IoUring, cqueue, opcode, register::Restriction, squeue, types};

use super::token::is_request;
use super::{Rw, WaitKind};
use crate::error::Errno;

/// Entries of the submission queue: one loop turn's batch; a fuller turn submits in between.
const SQ_ENTRIES: u32 = 256;
/// Entries of the completion queue: room for every request in flight and as many poll events.
const CQ_ENTRIES: u32 = 8192;
/// Requests in the kernel at once; more wait in a queue of ours, so completions cannot overflow.
const IN_KERNEL_MAX: usize = 4096;

/// All operations that this file makes. The ring takes no others, whoever gets hold of it: what it does passes by seccomp.
const OPERATIONS: [u8; 7] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

/// One io_uring.
pub struct Uring {
    ring: IoUring,
    waiting: VecDeque<squeue::Entry>,
    /// Requests (not polls) in the kernel.
    in_kernel: usize,
    /// Pushed since the last `io_uring_enter`.
    pushed: u32,
}

impl Uring {
    /// A ring for the calling thread alone.
    ///
    /// # Errors
    /// ENOSYS, EPERM (seccomp, `kernel.io_uring_disabled`), ENOMEM: use epoll then.
    pub fn new() -> Result<Uring, Errno> {
        let build = |defer: bool, restrict: bool| {
            let mut b = IoUring::builder();
            b.setup_cqsize(CQ_ENTRIES).setup_clamp();
            if defer {
                // Completion work runs only when we enter the kernel anyway; the flag in the ring tells us that
                // there is some while we spin (measured with contrib/bench against COOP_TASKRUN and none).
                b.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
            }
            if restrict {
                b.setup_r_disabled();
            }
            let ring = b.build(SQ_ENTRIES)?;
            if restrict {
                let mut operations = OPERATIONS.map(Restriction::sqe_op);
                ring.submitter().register_restrictions(&mut operations)?;
                ring.submitter().register_enable_rings()?;
            }
            Ok(ring)
        };
        // Kernels before 6.1 do not know DEFER_TASKRUN, those before 5.10 no restrictions.
        let ring: std::io::Result<IoUring> =
            build(true, true).or_else(|_| build(false, true)).or_else(|_| build(false, false));
        let ring = ring.map_err(Errno::from)?;
        if !ring.params().is_feature_ext_arg() || !ring.params().is_feature_nodrop() {
            return Err(Errno::ENOTSUP);
        }
        Ok(Uring { ring, waiting: VecDeque::new(), in_kernel: 0, pushed: 0 })
    }

    fn push_entry(&mut self, entry: squeue::Entry, request: bool) {
        if request {
            if self.in_kernel >= IN_KERNEL_MAX || !self.waiting.is_empty() {
                self.waiting.push_back(entry);
                return;
            }
            self.in_kernel += 1;
        }
        loop {
            // SAFETY: what the entry points to stays alive until its completion: requests are made from an `Rw`, whose
            // maker guarantees it; polls point to nothing.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                self.pushed += 1;
                return;
            }
            self.enter(0, None);
        }
    }

    /// Queues a transfer.
    #[inline]
    pub fn push_rw(&mut self, rw: &Rw, token: u64) {
        let fd = types::Fd(rw.fd);
        let flags = if rw.dsync { libc::RWF_DSYNC } else { 0 };
        // SAFETY: the maker of the `Rw` keeps the array alive until the completion; `IoVec` has `iovec`'s layout.
        let first = unsafe { &*rw.iov };
        let one = u32::try_from(first.len()).ok().filter(|_| rw.count == 1);
        let iov = rw.iov.cast::<libc::iovec>();
        let entry = match (one, rw.write) {
            (Some(len), false) => {
                opcode::Read::new(fd, first.base(), len).offset(rw.offset).build()
            }
            (Some(len), true) => {
                opcode::Write::new(fd, first.base(), len).offset(rw.offset).rw_flags(flags).build()
            }
            (None, false) => opcode::Readv::new(fd, iov, rw.count).offset(rw.offset).build(),
            (None, true) => {
                opcode::Writev::new(fd, iov, rw.count).offset(rw.offset).rw_flags(flags).build()
            }
        };
        self.push_entry(entry.user_data(token), true);
    }

    /// Queues an `fdatasync`.
    pub fn push_fdatasync(&mut self, fd: RawFd, token: u64) {
        let sync = opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC);
        self.push_entry(sync.build().user_data(token), true);
    }

    /// Watches `fd` for input until [`Uring::remove_poll`]; every event is a completion with `token`.
    pub fn push_poll(&mut self, fd: RawFd, token: u64) {
        let poll = opcode::PollAdd::new(types::Fd(fd), libc::POLLIN as u32).multi(true);
        self.push_entry(poll.build().user_data(token), false);
    }

    /// Ends the watch with `token`; the answer to this itself carries `ignored`.
    pub fn remove_poll(&mut self, token: u64, ignored: u64) {
        // Not PollRemove: that one leaves a poll alone whose event is on its way (EALREADY).
        self.push_entry(opcode::AsyncCancel::new(token).build().user_data(ignored), false);
    }

    /// Asks the kernel to give up the request with `token`, which is answered in any case; the answer to this itself carries
    /// `ignored`. Whether the kernel never had it: then there is no answer.
    pub fn cancel(&mut self, token: u64, ignored: u64) -> bool {
        if let Some(at) = self.waiting.iter().position(|e| e.get_user_data() == token) {
            self.waiting.remove(at);
            return true;
        }
        self.push_entry(opcode::AsyncCancel::new(token).build().user_data(ignored), false);
        false
    }

    /// One `io_uring_enter`: submits what is queued, runs completion work, waits for `want` completions at most
    /// `timeout` long.
    fn enter(&mut self, want: u32, timeout: Option<Duration>) {
        let deferred = self.ring.params().is_setup_single_issuer();
        let mut flags = EnterFlags::empty();
        // With deferred task work every entry runs it: one system call submits and completes.
        if want > 0 || deferred || self.ring.submission().cq_overflow() {
            flags |= EnterFlags::GETEVENTS;
        }
        let result = match timeout {
            Some(t) if want > 0 => {
                let ts = types::Timespec::from(t);
                let args = types::SubmitArgs::new().timespec(&ts);
                self.ring.submitter().submit_with_args(want as usize, &args)
            }
            // SAFETY: no argument is passed; entries in the queue are covered by `push_entry`.
            _ => unsafe {
                self.ring.submitter().enter::<libc::sigset_t>(self.pushed, want, flags.bits(), None)
            },
        };
        match result {
            Ok(_) => {}
            // EINTR, ETIME: nothing to do. EBUSY, EAGAIN: the kernel wants completions reaped first.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN)
                ) => {}
            Err(e) => log::error!("io_uring_enter: {e}"),
        }
        self.pushed = u32::try_from(self.ring.submission().len()).unwrap_or(u32::MAX);
    }

    /// Submits what is queued, with at most one system call; none if nothing is.
    #[inline]
    pub fn submit(&mut self) {
        if self.pushed > 0 {
            self.enter(0, None);
        }
    }

    /// Whether completions wait, or would after entering the kernel.
    #[inline]
    pub fn has_events(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.ring.submission().taskrun()
    }

    /// Takes all completions: `done(token, result, more)`; `more`: the watch goes on.
    #[inline]
    pub fn reap(&mut self, mut done: impl FnMut(u64, i32, bool)) {
        if self.ring.submission().taskrun() {
            self.enter(0, None);
        }
        for cqe in self.ring.completion() {
            let token = cqe.user_data();
            if is_request(token) {
                self.in_kernel -= 1;
            }
            done(token, cqe.result(), cqueue::more(cqe.flags()));
        }
        while self.in_kernel < IN_KERNEL_MAX
            && let Some(entry) = self.waiting.pop_front()
        {
            self.in_kernel += 1;
            self.push_entry(entry, false);
        }
    }

    /// Submits, and blocks until there is a completion or `timeout` is over.
    pub fn wait(&mut self, timeout: Option<Duration>) {
        if self.ring.completion().is_empty() {
            self.enter(1, timeout);
        } else {
            self.submit();
        }
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
        Uring::new().map(drop)
    })
}

/// The wait point to use: io_uring if it works, else epoll.
pub fn best_wait_kind() -> WaitKind {
    if uring_available().is_ok() { WaitKind::Uring } else { WaitKind::Epoll }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_operations_are_refused() {
        let mut ring = Uring::new().unwrap();
        let (open, nop) = (
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr()).build(),
            opcode::Nop::new().build(),
        );
        for entry in [open, nop] {
            ring.push_entry(entry.user_data(1 << 63), false);
            ring.wait(None);
            let mut results = Vec::new();
            ring.reap(|_, result, _| results.push(result));
            assert_eq!(results, [-libc::EACCES]);
        }
        assert!(ring.ring.submitter().register_enable_rings().is_err());
        let mut more = [Restriction::sqe_op(opcode::Nop::CODE)];
        assert!(ring.ring.submitter().register_restrictions(&mut more).is_err());
    }
}
