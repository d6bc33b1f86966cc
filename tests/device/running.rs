//! Changes under running rings, front ends that come and go, and the hunt for lost wake-ups.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use vhost_user_blk::export::ExportConfig;
use vmm_sys_util::eventfd::EventFd;
use vub_client::blk::Request;
use vub_client::proto::req;
use vub_client::{Client, Conn, Options, Queue, Status};

use crate::common::{Disk, ENGINES, FileDisk, MIB, Random, SILENCE, config, eventually, small};

#[test]
fn a_second_front_end_waits_and_is_served() {
    let disk = Disk::null(MIB, config());
    let mut first = disk.connect(small());
    let others: Vec<Conn> = (0..5).map(|_| Conn::connect(disk.path()).unwrap()).collect();
    for other in &others {
        other.send(req::GET_FEATURES, 0, &[], &[]).unwrap();
    }
    others[0].expect_silence(SILENCE).unwrap();
    first.queue(0).read(0, &mut [0; 4096]).unwrap();
    drop(first);
    for other in others {
        other.recv().unwrap();
    }
    disk.connect(small()).queue(0).flush().unwrap();
}

#[test]
fn front_ends_with_other_features_each_time() {
    let file = FileDisk::new(MIB, ENGINES[2], config());
    let mut random = Random(7);
    for i in 0..60u64 {
        let options = Options {
            queues: 1 + u16::try_from(random.below(4)).unwrap(),
            queue_size: 16 << random.below(6),
            event_idx: random.below(2) == 0,
            indirect: random.below(2) == 0,
            mem_size: 4 << 20,
            ..small()
        };
        let mut client = file.disk.connect(options);
        for q in client.queues_mut() {
            q.write(i, &[u8::try_from(i).unwrap(); 512]).unwrap();
        }
        let mut back = [0; 512];
        client.queue(0).read(i.saturating_sub(1), &mut back).unwrap();
        assert_eq!(u64::from(back[0]), i.saturating_sub(1));
    }
}

/// `work` in one thread for each queue, until the closure `main` of this thread returns; each has done something by then.
pub fn while_running(
    client: &mut Client,
    work: impl Fn(&mut Queue, &mut Random) + Sync,
    main: impl FnOnce(&mut Client, &dyn Fn() -> u64),
) {
    let stop = AtomicBool::new(false);
    let count = AtomicU64::new(0);
    let mut queues = client.take_queues();
    thread::scope(|s| {
        for q in &mut queues {
            let (stop, count, work) = (&stop, &count, &work);
            s.spawn(move || {
                let mut random = Random(u64::from(q.index()));
                while !stop.load(Ordering::Relaxed) {
                    work(q, &mut random);
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // A panic in `main` must end the threads, too.
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _end = End(&stop);
        main(client, &|| count.load(Ordering::Relaxed));
    });
    client.put_queues(queues);
}

/// Waits until the guest's threads have made some more requests.
pub fn some_more(count: &dyn Fn() -> u64) {
    let before = count();
    eventually("more requests are done", || count() >= before + 4);
}

fn write_and_read(q: &mut Queue, random: &mut Random) {
    let sector = u64::from(q.index()) * 256 + random.below(128);
    let data = random.bytes(4096);
    q.write(sector, &data).unwrap();
    let mut back = [0; 4096];
    q.read(sector, &mut back).unwrap();
    assert!(back[..] == data[..]);
}

#[test]
fn memory_comes_and_goes_under_running_rings() {
    for engine in ENGINES {
        for slots in [true, false] {
            let file = FileDisk::new(MIB, engine, config());
            let mem_style =
                if slots { vub_client::MemStyle::Slots } else { vub_client::MemStyle::Table };
            let mut client = file.disk.connect(Options { queues: 2, mem_style, ..small() });
            while_running(&mut client, write_and_read, |client, count| {
                for _ in 0..15 {
                    let region = client.plug_memory(1 << 20).unwrap();
                    some_more(count);
                    client.unplug_memory(region).unwrap();
                    some_more(count);
                }
            });
            // New memory is used at once.
            let region = client.plug_memory(1 << 20).unwrap();
            let buf = client.mem().alloc_in(region, 4096, 4096).unwrap();
            let done = client.queue(0).run(Request::read(0, vec![buf])).unwrap();
            assert_eq!(done.status, Status::Ok);
            let there = done.inn[0].gpa();
            drop(done);
            // And not any more afterwards.
            client.unplug_memory(region).unwrap();
            let q = client.queue(0);
            let head = q.mem().alloc(16, 16).unwrap();
            head.fill(0);
            let state = q.mem().alloc(1, 1).unwrap();
            state.fill(0xff);
            let chain = [
                vub_client::ring::Seg::out(head.gpa(), 16),
                vub_client::ring::Seg::inn(there, 4096),
                vub_client::ring::Seg::inn(state.gpa(), 1),
            ];
            q.push_chain(&chain).unwrap();
            q.kick().unwrap();
            q.wait().unwrap();
            assert_eq!(state.u8_at(0).load(Ordering::Acquire), 1, "an I/O error");
        }
    }
}

/// A guest that always has requests in flight cannot keep a memory change waiting.
#[test]
fn a_memory_change_is_not_starved() {
    let disk = Disk::of(
        serde_json::json!({"driver": "null-co", "node-name": "root", "latency-ns": 100_000}),
        config(),
    );
    let mem_style = vub_client::MemStyle::Table;
    let mut client = disk.connect(Options { mem_style, queue_size: 256, ..small() });
    let keep_busy = |q: &mut Queue, _: &mut Random| {
        while q.in_flight() < 64 {
            q.submit(Request::read(0, q.buffers(512).unwrap())).unwrap();
        }
        assert_eq!(q.wait().unwrap().status, Status::Ok);
    };
    while_running(&mut client, keep_busy, |client, count| {
        for _ in 0..20 {
            some_more(count);
            client.share_memory().unwrap();
        }
    });
    client.queue(0).wait_all().unwrap();
}

/// The call descriptor changes for another and back, again and again. What the other got is lost for the guest, so it goes
/// on only because each change is notified.
#[test]
fn the_call_descriptor_changes_under_a_running_ring() {
    for event_idx in [true, false] {
        let disk = Disk::null(MIB, config());
        let mut client = disk.connect(Options { event_idx, ..small() });
        let other = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let own = client.queue(0).call_fd().try_clone().unwrap();
        let read = |q: &mut Queue, _: &mut Random| q.read(0, &mut [0; 512]).unwrap();
        while_running(&mut client, read, |client, count| {
            for _ in 0..300 {
                let before = count();
                let set = |fd: Option<&EventFd>| {
                    let fd = fd.map(AsRawFd::as_raw_fd);
                    client.conn.set_vring_fd(req::SET_VRING_CALL, 0, fd).unwrap();
                };
                set(Some(&other));
                set(None);
                set(Some(&own));
                eventually("the guest goes on", || count() > before);
            }
        });
    }
}

#[test]
fn the_kick_descriptor_changes_under_a_running_ring() {
    let disk = Disk::null(MIB, config());
    let mut client = disk.connect(small());
    let own = client.queue(0).kick_fd().try_clone().unwrap();
    let read = |q: &mut Queue, _: &mut Random| q.read(0, &mut [0; 512]).unwrap();
    while_running(&mut client, read, |client, count| {
        for _ in 0..100 {
            let before = count();
            // None: nobody will kick, the ring is looked at all the time.
            client.conn.set_vring_fd(req::SET_VRING_KICK, 0, None).unwrap();
            eventually("the guest goes on", || count() > before);
            client.conn.set_vring_fd(req::SET_VRING_KICK, 0, Some(own.as_raw_fd())).unwrap();
            eventually("the guest goes on", || count() > before + 1);
        }
    });
}

#[test]
fn a_ring_without_kicks_is_served() {
    for event_idx in [true, false] {
        for poll_max_ns in [0, 32_768] {
            let disk = Disk::null(MIB, ExportConfig { poll_max_ns, ..config() });
            let mut client = disk.connect(Options { event_idx, ..small() });
            client.conn.set_vring_fd(req::SET_VRING_KICK, 0, None).unwrap();
            let q = client.queue(0);
            for _ in 0..200 {
                let read = q.read_request(0, 512).unwrap();
                q.push(read).unwrap();
                q.ring().publish();
                assert_eq!(q.wait().unwrap().status, Status::Ok);
            }
            client.stop_queue(0).unwrap();
        }
    }
}

/// Nanoseconds that the thread of this name has run.
fn ran(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let read = |p: std::path::PathBuf| std::fs::read_to_string(p).unwrap_or_default();
    let mut ours = tasks.filter(|t| read(t.path().join("comm")).trim() == name);
    let stat = read(ours.next().expect("the thread is there").path().join("schedstat"));
    stat.split(' ').next().unwrap().parse().unwrap()
}

/// A kick descriptor that nothing can wait for is no reason to fail, nor to burn a core.
#[test]
fn a_kick_that_cannot_be_waited_for() {
    let disk = Disk::null(MIB, ExportConfig { id: "oddkick".into(), ..config() });
    let mut client = disk.connect(small());
    let file = tempfile::tempfile().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(writer);
    for kick in [file.as_raw_fd(), reader.as_raw_fd()] {
        client.conn.set_vring_fd(req::SET_VRING_KICK, 0, Some(kick)).unwrap();
        let q = client.queue(0);
        for _ in 0..50 {
            let read = q.read_request(0, 512).unwrap();
            q.push(read).unwrap();
            q.ring().publish();
            if kick == reader.as_raw_fd() {
                // The pipe's end was an event that will not come again.
                continue;
            }
            assert_eq!(q.wait().unwrap().status, Status::Ok);
        }
        let (start, before) = (std::time::Instant::now(), ran("blk-oddkick-0"));
        client.conn.expect_silence(Duration::from_millis(200)).unwrap();
        let busy = Duration::from_nanos(ran("blk-oddkick-0") - before);
        eprintln!("{busy:?} of {:?}", start.elapsed());
        assert!(busy < start.elapsed() / 2, "{busy:?} of {:?} spent on nothing", start.elapsed());
    }
}

/// Event-driven requests; how many in all is told by `VUB_TEST_ROUNDS` (the default keeps the suite short).
#[test]
fn no_wake_up_is_lost() {
    let rounds = std::env::var("VUB_TEST_ROUNDS").ok().and_then(|n| n.parse().ok());
    let rounds: usize = rounds.unwrap_or(100_000) / 8;
    for poll_max_ns in [0, 32_768] {
        let disk = Disk::null(MIB, ExportConfig { poll_max_ns, ..config() });
        for event_idx in [true, false] {
            for depth in [1, 4] {
                let mut client = disk.connect(Options { event_idx, ..small() });
                let q = client.queue(0);
                let (mut sent, mut got) = (0, 0);
                while got < rounds {
                    while sent < rounds && sent < got + depth {
                        // Each kicked for by itself: more races.
                        q.submit(Request::bare(0, 0)).unwrap();
                        sent += 1;
                    }
                    let done = q.wait().unwrap_or_else(|e| {
                        panic!("{poll_max_ns} {event_idx} {depth}: after {got} requests: {e}")
                    });
                    assert_eq!(done.status, Status::Ok);
                    got += 1;
                }
            }
        }
    }
}

/// The guest sleeps for as long as the back end does: kicks that meet a worker on its way to sleep.
#[test]
fn kicks_at_bad_moments() {
    let disk = Disk::null(MIB, ExportConfig { poll_max_ns: 4_000, ..config() });
    for event_idx in [true, false] {
        let mut client = disk.connect(Options { event_idx, ..small() });
        let q = client.queue(0);
        let mut random = Random(8);
        for _ in 0..4000 {
            let pause = Duration::from_nanos(random.below(30_000));
            let start = std::time::Instant::now();
            while start.elapsed() < pause {
                std::hint::spin_loop();
            }
            q.submit(Request::bare(0, 0)).unwrap();
            q.wait().unwrap();
        }
    }
}
