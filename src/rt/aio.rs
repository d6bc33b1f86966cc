//! Linux AIO (`aio=native`): one context per thread, submitted in batches, reaped from the ring that the kernel maps
//! into our memory, so that looking for completions costs no system call.

use std::collections::VecDeque;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use super::Rw;
use crate::error::Errno;

/// Requests in the kernel at once (QEMU's MAX_EVENTS); more wait in a queue of ours.
const DEPTH: u32 = 1024;
/// `struct aio_ring`'s magic: the layout below is the kernel's since 2.6 and part of its ABI in practice (QEMU, fio).
const RING_MAGIC: u32 = 0xa10a_10a1;

const IOCB_CMD_PREADV: u16 = 7;
const IOCB_CMD_PWRITEV: u16 = 8;
const IOCB_FLAG_RESFD: u32 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct IoEvent {
    data: u64,
    obj: u64,
    res: i64,
    res2: i64,
}

#[repr(C)]
struct RingHead {
    id: u32,
    nr: u32,
    head: AtomicU32,
    tail: AtomicU32,
    magic: u32,
    compat_features: u32,
    incompat_features: u32,
    header_length: u32,
}

/// One AIO context.
pub struct Aio {
    context: libc::c_ulong,
    event_fd: RawFd,
    queued: VecDeque<libc::iocb>,
    in_kernel: u32,
}

impl Aio {
    /// A context whose completions are announced by writes to `event_fd`.
    ///
    /// # Errors
    /// What `io_setup` says: EAGAIN when `fs.aio-max-nr` is used up, ENOSYS without AIO.
    pub fn new(event_fd: RawFd) -> Result<Aio, Errno> {
        let mut context: libc::c_ulong = 0;
        // SAFETY: io_setup writes the context's handle to the variable.
        if unsafe { libc::syscall(libc::SYS_io_setup, DEPTH, &raw mut context) } < 0 {
            return Err(Errno::last());
        }
        let aio = Aio { context, event_fd, queued: VecDeque::with_capacity(256), in_kernel: 0 };
        if aio.ring().magic != RING_MAGIC || aio.ring().incompat_features != 0 {
            return Err(Errno::ENOTSUP);
        }
        Ok(aio)
    }

    fn ring(&self) -> &RingHead {
        // SAFETY: the handle is the address of the ring that io_setup mapped into our address space; it stays mapped until
        // io_destroy (drop). The fields that the kernel changes are atomics.
        unsafe { &*std::ptr::with_exposed_provenance::<RingHead>(self.context as usize) }
    }

    /// Queues a transfer.
    pub fn push(&mut self, rw: &Rw, token: u64) {
        // SAFETY: `iocb` is plain data.
        let mut cb: libc::iocb = unsafe { std::mem::zeroed() };
        cb.aio_data = token;
        cb.aio_lio_opcode = if rw.write { IOCB_CMD_PWRITEV } else { IOCB_CMD_PREADV };
        cb.aio_fildes = rw.fd.cast_unsigned();
        cb.aio_buf = rw.iov.expose_provenance() as u64;
        cb.aio_nbytes = u64::from(rw.count);
        cb.aio_offset = rw.offset.cast_signed();
        cb.aio_flags = IOCB_FLAG_RESFD;
        cb.aio_resfd = self.event_fd.cast_unsigned();
        cb.aio_rw_flags = if rw.dsync { libc::RWF_DSYNC } else { 0 };
        self.queued.push_back(cb);
    }

    /// Hands what is queued to the kernel. A request that the kernel refuses is answered through `done`.
    pub fn submit(&mut self, mut done: impl FnMut(u64, i32)) {
        while !self.queued.is_empty() && self.in_kernel < DEPTH {
            let room = (DEPTH - self.in_kernel) as usize;
            let mut list = [std::ptr::null_mut::<libc::iocb>(); 64];
            let mut n = 0i32;
            for (place, cb) in list.iter_mut().zip(self.queued.iter_mut()).take(room) {
                *place = cb;
                n += 1;
            }
            // SAFETY: `list` holds `n` pointers to control blocks that stay in place during the call (the kernel copies
            // them); what they point to is kept alive by whoever made the `Rw`.
            let rc = unsafe {
                libc::syscall(
                    libc::SYS_io_submit,
                    self.context,
                    libc::c_long::from(n),
                    list.as_mut_ptr(),
                )
            };
            match usize::try_from(rc) {
                Ok(taken) if taken > 0 => {
                    self.in_kernel += u32::try_from(taken).expect("at most 64");
                    self.queued.drain(..taken);
                }
                _ => match Errno::last() {
                    Errno(libc::EINTR) => {}
                    // No room now: the next completion brings us here again.
                    Errno(libc::EAGAIN) if self.in_kernel > 0 => return,
                    e => {
                        let cb = self.queued.pop_front().expect("not empty");
                        done(cb.aio_data, -e.0);
                    }
                },
            }
        }
    }

    /// Whether completions wait.
    #[inline]
    pub fn has_events(&self) -> bool {
        let ring = self.ring();
        ring.head.load(Ordering::Relaxed) != ring.tail.load(Ordering::Acquire)
    }

    /// Takes all completions.
    pub fn reap(&mut self, mut done: impl FnMut(u64, i32)) {
        let ring = self.ring();
        let (nr, start) = (ring.nr, ring.header_length as usize);
        let mut head = ring.head.load(Ordering::Relaxed);
        let tail = ring.tail.load(Ordering::Acquire);
        let mut taken = 0;
        while head != tail {
            let events =
                std::ptr::with_exposed_provenance::<u8>(self.context as usize).wrapping_add(start);
            // SAFETY: `head < nr`, the ring has `nr` events behind its header; the Acquire load of `tail` makes the
            // kernel's writes to events before it visible.
            let event = unsafe { events.cast::<IoEvent>().add(head as usize).read() };
            head = (head + 1) % nr;
            taken += 1;
            done(event.data, i32::try_from(event.res).unwrap_or(-libc::EIO));
        }
        self.ring().head.store(head, Ordering::Release);
        self.in_kernel -= taken;
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: the context is ours and is not used again. The call waits for requests in the kernel.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}
