//! The client against a real back end: qemu-storage-daemon, or what `VUB_BACKEND` names.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use virtio_bindings::virtio_blk as vb;
use vub_client::blk::Request;
use vub_client::proto::{FLAG_NEED_REPLY, header, req};
use vub_client::{Base, Client, Conn, Layout, MemStyle, Options, Status};

const SIZE: u64 = 16 << 20;

struct Backend {
    child: Child,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// None when the machine has no back end: the test is then skipped, and says so.
fn backend(queues: u16) -> Option<Backend> {
    let program = std::env::var("VUB_BACKEND").unwrap_or("qemu-storage-daemon".into());
    let dir = tempfile::tempdir().unwrap();
    let (disk, socket) = (dir.path().join("disk.raw"), dir.path().join("sock"));
    std::fs::File::create(&disk).unwrap().set_len(SIZE).unwrap();
    let child = spawn(&program, &disk, &socket, queues);
    if child.is_none() {
        eprintln!("skipped: {program} does not start");
    }
    Some(Backend { child: child?, socket, _dir: dir })
}

fn spawn(program: &str, disk: &Path, socket: &Path, queues: u16) -> Option<Child> {
    Command::new(program)
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=f,filename={},discard=unmap", disk.display()))
        .arg("--blockdev")
        .arg("driver=raw,node-name=n,file=f,discard=unmap")
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name=n,writable=on,num-queues={queues},\
             addr.type=unix,addr.path={}",
            socket.display()
        ))
        .spawn()
        .ok()
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| seed.wrapping_mul(31).wrapping_add((i % 251) as u8)).collect()
}

#[test]
fn every_request_type() {
    let Some(b) = backend(1) else { return };
    for (event_idx, indirect, polling) in
        [(true, true, false), (false, false, false), (true, false, true), (false, true, true)]
    {
        let opts = Options { event_idx, indirect, polling, ..Options::default() };
        let mut c = Client::connect_retry(&b.socket, opts).unwrap();
        assert_eq!(c.capacity() * 512, SIZE);
        assert_eq!(c.config().num_queues(), 1);
        let q = c.queue(0);
        let (data, mut got) = (pattern(1, 65536), vec![0; 65536]);
        q.write(8, &data).unwrap();
        q.flush().unwrap();
        q.read(8, &mut got).unwrap();
        assert!(got == data);
        q.layout = Layout { align: 4096, skew: 512, segment: 3 * 512 };
        got.fill(0);
        q.read(8, &mut got).unwrap();
        assert!(got == data);
        q.write_zeroes(8, 8, true).unwrap();
        q.discard(16, 8).unwrap();
        q.read(8, &mut got).unwrap();
        assert!(got[..4096].iter().all(|b| *b == 0));
        assert!(got[8192..] == data[8192..]);
        q.get_id().unwrap();
        let status = |r: vub_client::Result<()>| r.unwrap_err().status();
        assert_eq!(status(q.read(SIZE / 512, &mut got[..512])), Some(Status::IoErr));
        assert_eq!(q.run(Request::bare(99, 0)).unwrap().status, Status::Unsupp);
    }
}

#[test]
fn many_in_flight_on_many_queues_and_threads() {
    let Some(b) = backend(4) else { return };
    let opts = Options { queues: 4, ..Options::default() };
    let mut c = Client::connect_retry(&b.socket, opts).unwrap();
    assert_eq!(c.queue_num(), 4);
    std::thread::scope(|s| {
        for q in c.queues_mut() {
            s.spawn(move || {
                let first = u64::from(q.index()) * 4096;
                let data = |i: u64| pattern((first / 7 + i) as u8, 4096);
                for i in 0..32 {
                    let write = q.write_request(first + 8 * i, &data(i)).unwrap();
                    q.push(write).unwrap();
                }
                q.kick().unwrap();
                let done = q.wait_all().unwrap();
                assert!(done.len() == 32 && done.iter().all(|d| d.status == Status::Ok));
                let mut tags = Vec::new();
                for i in 0..32 {
                    let read = q.read_request(first + 8 * i, 4096).unwrap();
                    tags.push(q.submit(read).unwrap());
                }
                for done in q.wait_all().unwrap() {
                    let i = tags.iter().position(|t| *t == done.tag).unwrap() as u64;
                    assert!(done.data() == data(i) && done.used_len == 4097);
                }
            });
        }
    });
}

#[test]
fn stop_start_hotplug_and_reconnect() {
    let Some(b) = backend(2) else { return };
    for mem_style in [MemStyle::Table, MemStyle::Auto] {
        let opts = Options { queues: 2, base: 65000, mem_style, ..Options::default() };
        let mut c = Client::connect_retry(&b.socket, opts).unwrap();
        c.queue(1).write(0, &pattern(9, 4096)).unwrap();
        assert_eq!(c.stop().unwrap(), vec![65000, 65001]);
        (0..2).for_each(|i| c.start_queue(i).unwrap());
        let region = c.plug_memory(1 << 20).unwrap();
        let buf = c.mem().alloc_in(region, 4096, 512).unwrap();
        let done = c.queue(1).run(Request::read(0, vec![buf])).unwrap();
        assert!(done.status == Status::Ok && done.data() == pattern(9, 4096));
        drop(done);
        c.unplug_memory(region).unwrap();
        c.hang_up().unwrap();
        c.conn.wait_closed().unwrap();
        c.reconnect(&b.socket, Base::Used).unwrap();
        let mut got = vec![0; 4096];
        c.queue(1).read(0, &mut got).unwrap();
        assert!(got == pattern(9, 4096));
    }
}

#[test]
fn raw_messages_and_raw_chains() {
    let Some(b) = backend(1) else { return };
    let opts = Options { timeout: Duration::from_secs(5), ..Options::default() };
    let mut c = Client::connect_retry(&b.socket, opts).unwrap();
    let zeros = c.mem().alloc(64, 64).unwrap();
    let q = c.queue(0);
    q.push_chain(&[vub_client::ring::Seg::inn(zeros.gpa(), 64)]).unwrap();
    q.kick().unwrap();
    q.timeout = Duration::from_millis(200);
    // A chain without a header: the ring breaks or the chain fails, but nothing hangs here.
    let _ = q.wait();
    drop(c);
    let conn = Conn::connect(&b.socket).unwrap();
    conn.send_bytes(&header(req::GET_FEATURES, 1, 0), &[]).unwrap();
    assert!(conn.recv().unwrap().u64_at(0).unwrap() & 1 << vb::VIRTIO_BLK_F_FLUSH != 0);
    conn.expect_silence(Duration::from_millis(20)).unwrap();
    conn.send(req::GET_FEATURES, FLAG_NEED_REPLY, &[], &[]).unwrap();
    conn.recv().unwrap();
}
