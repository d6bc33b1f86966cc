//! A second guest, written by others: the crate `virtio-driver`, over its own vhost-user front end.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod common;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_driver::{EventFd, VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};
use vub_client::GuestMem;

use common::{Disk, ENGINES, FileDisk, LIMIT, MIB, Random, config};

type Transport = VhostUser<virtio_driver::VirtioBlkConfig, virtio_driver::VirtioBlkReqBuf>;

/// Requests of three descriptors that fill a ring of 128.
const FULL: usize = 42;

/// A guest whose data lies in `mem`, of which `mapping` is a second view that the crate knows the addresses of.
struct Guest {
    transport: Box<VirtioBlkTransport>,
    notifiers: Vec<(Box<dyn virtio_driver::QueueNotifier>, Arc<EventFd>)>,
}

fn features(event_idx: bool, indirect: bool) -> u64 {
    let mut f = VirtioFeatureFlags::VERSION_1;
    f.set(VirtioFeatureFlags::RING_EVENT_IDX, event_idx);
    f.set(VirtioFeatureFlags::RING_INDIRECT_DESC, indirect);
    // virtio-blk's own: SEG_MAX, BLK_SIZE, FLUSH, MQ, DISCARD, WRITE_ZEROES.
    f.bits() | 1 << 2 | 1 << 6 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 14
}

impl Guest {
    fn connect<'a>(
        disk: &Disk,
        mem: &GuestMem,
        queues: usize,
        features: u64,
    ) -> (Guest, Vec<VirtioBlkQueue<'a, usize>>) {
        let transport = Transport::new(disk.path().to_str().unwrap(), features).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        assert_eq!(u64::from(transport.get_config().unwrap().capacity), disk.node.len() / 512);
        let made = VirtioBlkQueue::setup_queues(&mut *transport, queues, 128).unwrap();
        for (info, fd) in mem.regions() {
            let at = usize::try_from(info.user_addr).unwrap();
            let len = usize::try_from(info.len).unwrap();
            transport.map_mem_region(at, len, fd, 0).unwrap();
        }
        let notifiers = (0..queues)
            .map(|i| (transport.get_submission_notifier(i), transport.get_completion_fd(i)))
            .collect();
        (Guest { transport, notifiers }, made)
    }

    /// Notifies the device if it wants that, and waits until `n` requests are done; their contexts and results.
    fn finish(&self, at: usize, q: &mut VirtioBlkQueue<'_, usize>, n: usize) -> Vec<(usize, i32)> {
        let (kick, call) = &self.notifiers[at];
        if q.avail_notif_needed() {
            kick.notify().unwrap();
        }
        let start = Instant::now();
        let mut done = Vec::new();
        while done.len() < n {
            q.set_used_notif_enabled(true);
            done.extend(q.completions().map(|c| (c.context, c.ret)));
            let fd = [call.as_raw_fd()];
            if done.len() < n
                && vub_client::sys::wait_readable(&fd, Duration::from_secs(1)).unwrap()
            {
                call.read().unwrap();
            }
            assert!(start.elapsed() < LIMIT, "{} of {n} requests are done", done.len());
        }
        done
    }

    fn one(&self, q: &mut VirtioBlkQueue<'_, usize>) -> i32 {
        self.finish(0, q, 1)[0].1
    }
}

#[test]
fn reads_writes_flushes_discards_zeroes() {
    for engine in ENGINES {
        for way in 0..4 {
            let file = FileDisk::new(4 * MIB, engine, config());
            let mem = GuestMem::new(1, 4 << 20).unwrap();
            let buf = mem.alloc(1 << 20, 4096).unwrap();
            let (guest, mut queues) =
                Guest::connect(&file.disk, &mem, 1, features(way & 1 != 0, way & 2 != 0));
            let q = &mut queues[0];
            let at = std::ptr::with_exposed_provenance_mut::<u8>(
                usize::try_from(buf.user_addr()).unwrap(),
            );
            let mut random = Random(way);
            for (offset, len, skew) in
                [(0, 512, 0), (4096, 65536, 0), (512, 1 << 19, 512), (1 << 20, 4096, 1)]
            {
                let data = random.bytes(len);
                buf.write(skew, &data);
                // SAFETY: the buffer is longer, and lives until the request is done.
                unsafe { q.write_raw(offset, at.add(skew), len, 1) }.unwrap();
                assert_eq!(guest.one(q), 0);
                buf.fill(0xee);
                // SAFETY: as above.
                unsafe { q.read_raw(offset, at.add(skew), len, 2) }.unwrap();
                assert_eq!(guest.one(q), 0);
                assert!(buf.to_vec()[skew..skew + len] == data[..], "{engine:?} {offset} {len}");
            }
            q.flush(3).unwrap();
            assert_eq!(guest.one(q), 0);
            q.discard(4096, 4096, 4).unwrap();
            assert_eq!(guest.one(q), 0);
            for unmap in [false, true] {
                q.write_zeroes(8192, 8192, unmap, 5).unwrap();
                assert_eq!(guest.one(q), 0);
            }
            // SAFETY: as above.
            unsafe { q.read_raw(8192, at, 8192, 6) }.unwrap();
            assert_eq!(guest.one(q), 0);
            assert!(buf.to_vec()[..8192].iter().all(|b| *b == 0));
            // Behind the end.
            // SAFETY: as above.
            unsafe { q.read_raw(4 * MIB, at, 512, 7) }.unwrap();
            assert_eq!(guest.one(q), -libc::EIO);
            drop(queues);
            drop(guest.transport);
        }
    }
}

#[test]
fn full_rings_on_four_queues() {
    let file = FileDisk::new(4 * MIB, ENGINES[2], config());
    let mem = GuestMem::new(1, 4 << 20).unwrap();
    let (guest, mut queues) = Guest::connect(&file.disk, &mem, 4, features(true, true));
    for round in 0..20u8 {
        for (i, q) in queues.iter_mut().enumerate() {
            let buf = mem.alloc(FULL * 512, 4096).unwrap();
            buf.fill(round * 4 + u8::try_from(i).unwrap());
            let at = std::ptr::with_exposed_provenance_mut::<u8>(
                usize::try_from(buf.user_addr()).unwrap(),
            );
            for n in 0..FULL {
                let offset = ((i * FULL + n) * 512) as u64;
                // SAFETY: the buffer is longer, and lives until the request is done.
                unsafe { q.write_raw(offset, at.add(n * 512), 512, n) }.unwrap();
            }
            let mut done = guest.finish(i, q, FULL);
            done.sort_unstable();
            assert!(done.iter().enumerate().all(|(n, d)| *d == (n, 0)), "{done:?}");
        }
    }
    queues[0].flush(0).unwrap();
    assert_eq!(guest.one(&mut queues[0]), 0);
    let bytes = std::fs::read(file.image.path()).unwrap();
    let right = |(i, b): (usize, &u8)| usize::from(*b) == 19 * 4 + i / (FULL * 512);
    assert!(bytes[..4 * FULL * 512].iter().enumerate().all(right));
}
