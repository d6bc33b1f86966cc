//! Files, operations, timers and wakers under every wait point.

use std::cell::{Cell, RefCell};
use std::os::unix::fs::OpenOptionsExt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::*;
use crate::error::Errno;
use crate::mem::Sg;

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
                assert_eq!(write(&closed, Sg::new(&iov), 0, false).await, Err(Errno(libc::EBADF)));
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

/// A disk begins with a turn's first transfers while the thread goes on: they do not wait for the turn's end. Those with the page
/// cache do, as the kernel would be at work, and not a disk.
#[test]
fn a_disk_begins_before_the_turn_ends() {
    for (engine, align, early) in
        [(Engine::IoUring, 4096, true), (Engine::Native, 4096, true), (Engine::Native, 1, false)]
    {
        let (reader, mut writer) = std::io::pipe().unwrap();
        std::io::Write::write_all(&mut writer, &[7; 8 * 512]).unwrap();
        let file = File::new(reader.into(), engine, align, 1);
        let rt = Runtime::install(WaitKind::Uring).unwrap();
        let buffer = Buffer::new(512, 1);
        let iov = [buffer.iovec()];
        let mut reactor = rt.reactor.borrow_mut();
        for n in 0..8 {
            assert!(!reactor.has_events(), "{engine:?} {align} {n}");
            // SAFETY: file, array and buffer live until all have been answered.
            let rw = unsafe { Rw::new(&file, false, &iov, 0, false) };
            reactor.submit(&file, &rw, n);
        }
        assert_eq!(reactor.has_events(), early, "{engine:?} {align}");
        reactor.flush();
        let mut events = Vec::new();
        reactor.reap(&mut events);
        assert_eq!(events.len(), 8);
    }
}

/// What the page cache has is read on the spot instead of by a thread of the pool; what it has not is read all the same.
#[test]
fn reads_on_the_spot_do_not_go_to_the_pool() {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, [7; 8192]).unwrap();
    for (kind, engine) in [
        (WaitKind::Uring, Engine::Threads),
        (WaitKind::Epoll, Engine::Threads),
        (WaitKind::Epoll, Engine::IoUring),
    ] {
        let file = File::new(std::fs::File::open(&path).unwrap().into(), engine, 1, 1);
        let rt = Runtime::install(kind).unwrap();
        let buffers = [Buffer::new(4096, 1), Buffer::new(4096, 1)];
        let iovs = buffers.each_ref().map(|b| [b.iovec()]);
        let mut events = Vec::new();
        for (n, cached) in [(0, true), (1, false)] {
            let mut reactor = rt.reactor.borrow_mut();
            if !cached {
                let fd = file.fd();
                // SAFETY: calls on an open file.
                let dropped = unsafe {
                    libc::fsync(fd) + libc::posix_fadvise(fd, 0, 0, libc::POSIX_FADV_DONTNEED)
                };
                assert_eq!(dropped, 0);
            }
            // SAFETY: file, array and buffer live until the answer has come.
            let rw = unsafe { Rw::new(&file, false, &iovs[usize::from(!cached)], 4096, false) };
            // Overlayfs cannot say what is cached.
            let known = cached && rw.call_cached().is_some();
            reactor.submit(&file, &rw, n);
            assert!(reactor.has_events() || !known, "{engine:?} under {kind:?}");
            drop(reactor);
            while events.len() <= n as usize {
                rt.wait();
                rt.collect(&mut events);
            }
            assert_eq!(events[n as usize], Event::Done(n, 4096));
        }
        assert!(buffers.iter().all(|b| b.bytes().iter().all(|b| *b == 7)));
    }
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
