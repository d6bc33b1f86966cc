//! The built program over its socket: what it costs when nothing happens, that nothing grows, that nothing a guest does
//! ends it.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod common;
#[path = "program/hung.rs"]
mod hung;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use vub_client::{Base, Client, Conn, MemStyle, Options, proto::req};

use common::program::Program;
use common::{ENGINES, Image, MIB, Random, eventually, small};

fn null(name: &str, latency_ns: u64) -> String {
    let size = 64 * MIB;
    json!({"driver": "null-co", "node-name": name, "size": size, "read-zeroes": true,
        "latency-ns": latency_ns})
    .to_string()
}

/// The arguments for an image as `root`, in two `--blockdev`, as libvirt has them.
fn file(image: &Image, aio: &str, direct: bool) -> [String; 2] {
    let cache = json!({"direct": direct, "no-flush": false});
    let storage = json!({"driver": "file", "filename": image.path(), "node-name": "storage",
        "aio": aio, "auto-read-only": true, "discard": "unmap", "cache": cache});
    let format = json!({"node-name": "root", "read-only": false, "discard": "unmap",
        "cache": cache, "driver": "raw", "file": "storage"});
    [storage.to_string(), format.to_string()]
}

const WRITABLE: &str = ",writable=on,num-queues=16";

#[test]
fn an_idle_disk_does_nothing() {
    for engine in ENGINES {
        let image = Image::new(MIB);
        let program =
            Program::start(&file(&image, engine.aio, engine.direct), &[("root", WRITABLE)]);
        let mut client = program.connect("root", Options { queues: 16, ..small() });
        for q in client.queues_mut() {
            q.write(0, &[1; 4096]).unwrap();
            q.read(0, &mut [0; 4096]).unwrap();
            q.flush().unwrap();
        }
        // Pool threads end when they had nothing to do for a while; workers and the rest stay. The upkeep looks at a raw
        // disk's size once a second.
        let lasting = || {
            let mut all = program.threads();
            let ours = |name: &str| name.starts_with("blk-") || name.starts_with("vhost");
            all.retain(|(name, ..)| ours(name) && name != "blk-upkeep");
            all
        };
        // The spins after the last request are over when two looks in a row see the same.
        let mut last = lasting();
        assert!(last.iter().filter(|t| t.0.starts_with("blk-")).count() >= 2, "{last:?}");
        eventually("it becomes idle", || {
            client.conn.expect_silence(Duration::from_millis(20)).unwrap();
            let now = lasting();
            let same = now == last;
            last = now;
            same
        });
        client.conn.expect_silence(Duration::from_millis(1500)).unwrap();
        assert_eq!(lasting(), last, "{engine:?}: something woke up");
        client.queue(0).read(0, &mut [0; 4096]).unwrap();
    }
}

#[test]
fn reconnecting_for_ever_costs_nothing() {
    let image = Image::new(MIB);
    let program = Program::start(&file(&image, "io_uring", false), &[("root", WRITABLE)]);
    let mut random = Random(1);
    let mut client = program.connect("root", Options { queues: 2, ..small() });
    let mut round = |client: &mut Client, n: u32| {
        let used = |c: &mut Client| {
            let q = c.queue(0);
            q.submit(vub_client::blk::Request::flush()).unwrap();
            q.wait_all().unwrap();
        };
        used(client);
        match n % 4 {
            // In the middle of a request, of a message, of nothing.
            0 => {
                let data = random.bytes(4096);
                let request = client.queue(1).write_request(0, &data).unwrap();
                client.queue(1).submit(request).unwrap();
            }
            1 => client.conn.send_bytes(&[1, 0, 0], &[]).unwrap(),
            2 => client.plug_memory(1 << 20).map(drop).unwrap(),
            _ => {}
        }
        client.hang_up().unwrap();
        if n % 4 == 2 {
            client.mem().remove_region(1);
        }
        client.reconnect(program.path("root"), Base::Used).unwrap();
        client.queue(1).wait_all().unwrap();
    };
    (0..100).for_each(|n| round(&mut client, n));
    let before = program.resources();
    (0..1000).for_each(|n| round(&mut client, n));
    let after = program.resources();
    assert_eq!(after[0], before[0], "descriptors");
    assert!(after[1] <= before[1] + 2, "threads: {before:?} {after:?}");
    assert!(after[2] <= before[2] + 1024, "KiB of memory: {before:?} {after:?}");
}

#[test]
fn connections_that_say_nothing_or_little() {
    let mut program = Program::start(&[null("root", 0)], &[("root", WRITABLE)]);
    // Measured with a guest connected: the one before it is gone for certain then.
    let connected = || {
        let _client = program.connect("root", small());
        program.resources()
    };
    let before = connected();
    for n in 0..500 {
        let conn = Conn::connect(program.path("root")).unwrap();
        if n % 3 == 1 {
            conn.get_u64(req::GET_FEATURES).unwrap();
        }
        if n % 3 == 2 {
            conn.send_bytes(&[0xff; 40], &[]).unwrap();
        }
    }
    let after = connected();
    assert_eq!(after[..2], before[..2]);
    program.assert_alive();
}

#[test]
fn guests_die_with_requests_in_flight() {
    // 20 ms each: they are in flight when the connection goes.
    let nodes = [null("slow", 20_000_000), null("other", 0)];
    let mut program = Program::start(&nodes, &[("slow", WRITABLE), ("other", WRITABLE)]);
    let mut other = program.connect("other", small());
    for round in 0..10 {
        let mut client = program.connect("slow", Options { queues: 4, ..small() });
        for q in client.queues_mut() {
            for _ in 0..30 {
                let read = q.read_request(0, 4096).unwrap();
                q.push(read).unwrap();
            }
            q.kick().unwrap();
        }
        if round % 2 == 0 {
            // It is known that they are in flight, not only available.
            let q = client.queue(0);
            eventually("requests are taken", || q.ring().mem().avail_event() == 30);
        }
        drop(client);
        other.queue(0).read(0, &mut [0; 512]).unwrap();
    }
    let mut client = program.connect("slow", small());
    client.queue(0).read(0, &mut [0; 512]).unwrap();
    program.assert_alive();
}

#[test]
fn a_hostile_guest_leaves_the_program_and_other_exports_alone() {
    let nodes = [null("a", 0), null("b", 0)];
    let mut program = Program::start(&nodes, &[("a", WRITABLE), ("b", WRITABLE)]);
    let mut good = program.connect("b", small());
    for round in 0..20u16 {
        let mut bad = program.connect("a", Options { queues: 2, ..small() });
        let q = bad.queue(0);
        q.ring().offer(1000 + round);
        q.ring().publish();
        q.notify().unwrap();
        q.wait_err().unwrap();
        bad.queue(1).read(0, &mut [0; 512]).unwrap();
        good.queue(0).read(0, &mut [0; 512]).unwrap();
    }
    program.assert_alive();
}

/// The pool for calls that block is the process's, not each export's.
#[test]
fn threads_are_bounded_whatever_guests_do() {
    const EXPORTS: usize = 8;
    let images: Vec<Image> = (0..EXPORTS).map(|_| Image::new(4 * MIB)).collect();
    let names: Vec<String> = (0..EXPORTS).map(|n| format!("n{n}")).collect();
    let node = |(image, name): (&Image, &String)| {
        let path = image.path();
        json!({"driver": "file", "node-name": name, "filename": path, "aio": "threads"}).to_string()
    };
    let nodes: Vec<String> = images.iter().zip(&names).map(node).collect();
    let exports: Vec<_> = names.iter().map(|name| (name.as_str(), WRITABLE)).collect();
    let program = Program::start(&nodes, &exports);
    let options = || Options { queues: 4, queue_size: 128, mem_size: 24 << 20, ..small() };
    let mut clients: Vec<Client> =
        names.iter().map(|name| program.connect(name, options())).collect();
    let mut most = 0;
    for _ in 0..4 {
        for q in clients.iter_mut().flat_map(Client::queues_mut) {
            for n in 0..32 {
                let write = q.write_request(n * 128, &[1; 65536]).unwrap();
                q.push(write).unwrap();
            }
            q.kick().unwrap();
        }
        let threads = program.threads();
        most = most.max(threads.iter().filter(|(name, ..)| name == "blk-pool").count());
        for q in clients.iter_mut().flat_map(Client::queues_mut) {
            q.wait_all().unwrap();
        }
    }
    // 1024 requests at once, each of which may block.
    assert!((8..=64 + 4 * EXPORTS).contains(&most), "{most} threads of the pool");
    // The main thread, upkeep; for each export its server and one worker for each processor at most.
    let cores = std::thread::available_parallelism().unwrap().get();
    let others = program.threads().len() - most.min(program.threads().len());
    assert!(others <= 4 + EXPORTS * (1 + cores.min(4)), "{:?}", program.threads());
}

/// A second start with the image and the socket of a process that runs fails (a raw image may have several writers, as with
/// QSD), and disturbs nobody.
#[test]
fn a_second_process_on_the_same_disk() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("1M");
    assert!(create.status().unwrap().success());
    let file = json!({"driver": "file", "filename": image});
    let root = json!({"driver": "qcow2", "node-name": "root", "file": file}).to_string();
    let program = Program::start(std::slice::from_ref(&root), &[("root", WRITABLE)]);
    let mut client = program.connect("root", small());
    client.queue(0).write(0, &[7; 512]).unwrap();
    let socket = program.path("root");
    let there = std::fs::metadata(&socket).unwrap().ino();
    let export = format!(
        "type=vhost-user-blk,id=e,node-name=root,addr.type=unix,addr.path={},writable=on",
        socket.display()
    );
    let second = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"))
        .args(["--blockdev", &root, "--export", &export])
        .env("XDG_RUNTIME_DIR", dir.path())
        .output()
        .unwrap();
    assert!(!second.status.success());
    let text = String::from_utf8_lossy(&second.stderr);
    assert!(text.contains("lock"), "{text}");
    assert_eq!(std::fs::metadata(&socket).unwrap().ino(), there);
    client.queue(0).read(0, &mut [0; 512]).unwrap();
    drop(client);
    program.connect("root", small()).queue(0).read(0, &mut [0; 512]).unwrap();
}

/// Somebody has seen to the storage: SIGUSR1 has what failed and waits (`werror=stop`) tried again.
#[test]
fn a_signal_resumes() {
    let image = Image::new(MIB);
    let debug = json!({
        "driver": "blkdebug", "image": {"driver": "file", "filename": image.path()},
        "inject-error": [{"event": "none", "iotype": "write", "errno": 5, "once": true}],
    });
    let root = json!({"driver": "raw", "node-name": "root", "file": debug}).to_string();
    let log = tempfile::NamedTempFile::new().unwrap();
    let to = ("warn", log.reopen().unwrap());
    let program = Program::start_logging(&[root], &[("root", ",writable=on,werror=stop")], to);
    let mut client = program.connect("root", small());
    let q = client.queue(0);
    let write = q.write_request(0, &[7; 512]).unwrap();
    q.submit(write).unwrap();
    let said = |what: &str| std::fs::read_to_string(log.path()).unwrap().contains(what);
    eventually("it waits", || said("queue 0 waits for it to work"));
    assert!(q.poll().unwrap().is_none());
    vub_client::sys::kill(program.pid(), libc::SIGUSR1).unwrap();
    assert_eq!(q.wait().unwrap().status, vub_client::Status::Ok);
    eventually("it says so", || said("queue 0 goes on"));
    assert_eq!(std::fs::read(image.path()).unwrap()[..512], [7; 512]);
}

/// What a guest can make the program say again and again does not fill a disk.
#[test]
fn a_guest_cannot_fill_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let to = ("info", File::create(&log).unwrap());
    let program = Program::start_logging(&[null("root", 0)], &[("root", WRITABLE)], to);
    let mut client = program.connect("root", small());
    for n in (0..1000).map(|n: u32| u8::from(n.is_multiple_of(2))) {
        client.set_config(32, 0, &[n]).unwrap();
        client.stop_queue(0).unwrap();
        // The guest is ahead by more than the ring's size.
        client.set_base(0, Base::At(2000));
        client.start_queue(0).unwrap();
        client.queue(0).wait_err().unwrap();
    }
    assert!(program.terminate().success());
    let text = std::fs::read_to_string(&log).unwrap();
    for what in ["cache is write-", "queue 0 is broken"] {
        let lines = text.lines().filter(|line| line.contains(what)).count();
        assert!((100..400).contains(&lines), "{lines} times: {what}");
    }
}

/// The two arguments of libvirt, a guest, the end: data is where it belongs.
#[test]
fn a_term_signal_under_load() {
    for engine in ENGINES {
        let image = Image::new(4 * MIB);
        let program =
            Program::start(&file(&image, engine.aio, engine.direct), &[("root", WRITABLE)]);
        let mem_style = MemStyle::Table;
        let mut client = program.connect("root", Options { queues: 4, mem_style, ..small() });
        let data = Random(3).bytes(64 * 1024);
        for q in client.queues_mut() {
            for i in 0..16 {
                let sector = (u64::from(q.index()) * 16 + i) * 128;
                let write = q.write_request(sector, &data).unwrap();
                q.push(write).unwrap();
            }
            q.kick().unwrap();
        }
        assert!(program.terminate().success());
        // What was completed is in the file; nothing was completed that is not.
        let file = std::fs::read(image.path()).unwrap();
        for q in client.queues_mut() {
            while let Some(done) = q.poll().unwrap() {
                assert_eq!(done.status, vub_client::Status::Ok);
            }
            let left = q.in_flight();
            let base = usize::from(q.index()) * 16;
            let there = (base..base + 16).filter(|i| file[i * 65536..][..65536] == data[..]);
            assert!(there.count() >= 16 - left, "{engine:?}");
        }
    }
}

/// I/O that never ends: everything that does not have to wait for it goes on, and the end comes when it is asked for twice.
#[test]
fn a_disk_that_hangs_leaves_control_answering() {
    const DEPTH: u16 = 30;
    let hour = 3600 * 1_000_000_000;
    let image = Image::new(MIB);
    let [storage, format] = file(&image, "threads", false);
    let nodes = [null("stuck", hour), storage, format];
    let mut program = Program::start(&nodes, &[("stuck", WRITABLE), ("root", WRITABLE)]);
    let mut stuck = program.connect("stuck", Options { queues: 4, ..small() });
    let before = program.resources();
    for q in stuck.queues_mut() {
        for _ in 0..DEPTH {
            let read = q.read_request(0, 4096).unwrap();
            q.push(read).unwrap();
        }
        q.kick().unwrap();
        eventually("requests are taken", || q.ring().mem().avail_event() == DEPTH);
    }
    assert_eq!(stuck.read_config().unwrap().capacity(), 64 * MIB / 512);
    stuck.conn.get_u64(req::GET_FEATURES).unwrap();
    stuck.plug_memory(1 << 20).unwrap();
    vub_client::sys::kill(program.pid(), libc::SIGUSR1).unwrap();
    let mut other = program.connect("root", small());
    let data = Random(8).bytes(4096);
    other.queue(0).write(0, &data).unwrap();
    other.queue(0).flush().unwrap();
    let after = program.resources();
    assert!(after[0] <= before[0] + 64 && after[1] <= before[1] + 16, "{before:?} {after:?}");
    assert_eq!(
        stuck.queues_mut().iter().map(|q| q.in_flight()).sum::<usize>(),
        4 * usize::from(DEPTH)
    );

    // Told once, it waits for the disk, and flushes what it can.
    other.queue(0).write(8, &data).unwrap();
    vub_client::sys::kill(program.pid(), libc::SIGTERM).unwrap();
    // Threads end meanwhile.
    let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
    let tasks = || std::fs::read_dir(program.proc().join("task")).unwrap().flatten();
    eventually("it is on its way", || {
        tasks().any(|task| name(task).is_ok_and(|name| name.trim() == "signals"))
    });
    program.assert_alive();
    // Told again, it does not wait.
    assert_eq!(program.terminate().code(), Some(1));
    let there = std::fs::read(image.path()).unwrap();
    assert!(there[..4096] == data && there[4096..8192] == data);
}
