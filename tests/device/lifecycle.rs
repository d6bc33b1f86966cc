//! Whatever stops a ring waits for what is in flight, and after its answer the guest's memory is the guest's alone.
//!
//! The requests in flight are held by a driver of ours (slow lane) or by a pipe in an io_uring (fast lane).

use std::sync::Arc;

use serde_json::json;
use vub_client::proto::{self, req};
use vub_client::{Client, Conn, MemStyle, Options, Status};

use crate::common::probe::{Asked, Opener, Probe};
use crate::common::{Disk, Image, LIMIT, MIB, SILENCE, config, eventually, small};

const QUEUES: u16 = 2;
/// Requests held on each queue.
const HELD: u16 = 8;

/// The ways to stop or to change memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    GetBase,
    Disable,
    Reset,
    SetFeatures,
    MemTable,
    RemoveRegion,
    RemoveOtherRegion,
    MoveRing,
    Base,
}

const WAYS: [How; 9] = [
    How::GetBase,
    How::Disable,
    How::Reset,
    How::SetFeatures,
    How::MemTable,
    How::RemoveRegion,
    How::RemoveOtherRegion,
    How::MoveRing,
    How::Base,
];

/// A guest of two queues with requests in flight on both.
struct Busy {
    _open: Opener,
    disk: Disk,
    probe: Arc<Probe>,
    client: Client,
    fast: bool,
}

fn busy(fast: bool, mem_style: MemStyle) -> Busy {
    let (disk, probe) = if fast { Probe::piped(config()) } else { Probe::disk(config()) };
    let open = Opener(Arc::clone(&probe));
    let mem_regions = 2;
    let options = Options { queues: QUEUES, mem_regions, mem_style, mem_size: 1 << 20, ..small() };
    let mut client = disk.connect(options);
    if !fast {
        probe.hold();
    }
    for q in client.queues_mut() {
        for i in 0..HELD {
            let read = q.read_request(u64::from(i), 512).unwrap();
            q.push(read).unwrap();
        }
        q.kick().unwrap();
        // It has taken all of them when it asks to be kicked for the next.
        eventually("requests are taken", || q.ring().mem().avail_event() == HELD);
    }
    if !fast {
        probe.wait_held(usize::from(QUEUES * HELD));
    }
    Busy { _open: open, disk, probe, client, fast }
}

impl Busy {
    fn release(&self) {
        if self.fast {
            self.probe.pour(&vec![0x77; 512 * usize::from(QUEUES * HELD)]);
        } else {
            self.probe.release();
        }
    }

    /// All of the guest's memory.
    fn memory(&self) -> Vec<u8> {
        snapshot(&self.client)
    }
}

fn snapshot(client: &Client) -> Vec<u8> {
    let mem = client.mem();
    let view = |(info, _): (vub_client::mem::RegionInfo, i32)| {
        mem.view(info.gpa, usize::try_from(info.len).unwrap()).unwrap().to_vec()
    };
    mem.regions().into_iter().flat_map(view).collect()
}

/// Sends the message that stops queue 1 or changes its memory.
fn send(client: &Client, how: How) {
    let conn = &client.conn;
    let ack = proto::FLAG_NEED_REPLY;
    let regions = client.mem().regions();
    let (infos, fds): (Vec<_>, Vec<_>) = regions.iter().cloned().unzip();
    let sent = match how {
        How::GetBase => conn.send(req::GET_VRING_BASE, 0, &proto::vring_state(1, 0), &[]),
        How::Disable => conn.send(req::SET_VRING_ENABLE, ack, &proto::vring_state(1, 0), &[]),
        How::Reset => conn.send(req::RESET_DEVICE, ack, &[], &[]),
        How::SetFeatures => {
            let fewer = client.features() & !(1 << 29);
            conn.send(req::SET_FEATURES, ack, &fewer.to_ne_bytes(), &[])
        }
        How::MemTable => conn.send(req::SET_MEM_TABLE, ack, &proto::mem_table(&infos), &fds),
        How::RemoveRegion => conn.send(req::REM_MEM_REG, ack, &proto::one_region(&infos[0]), &[]),
        How::RemoveOtherRegion => {
            conn.send(req::REM_MEM_REG, ack, &proto::one_region(&infos[1]), &[])
        }
        How::MoveRing => {
            let at = infos[1].user_addr;
            let body = proto::vring_addr(1, 0, at, at + 65536, at + 131_072, 0);
            conn.send(req::SET_VRING_ADDR, ack, &body, &[])
        }
        How::Base => conn.send(req::SET_VRING_BASE, ack, &proto::vring_state(1, 9), &[]),
    };
    sent.unwrap();
}

/// Which queues the answer promises something of.
fn stopped(how: How) -> std::ops::Range<usize> {
    match how {
        How::GetBase | How::Disable | How::MoveRing | How::Base => 1..2,
        _ => 0..2,
    }
}

fn drains(fast: bool, how: How) {
    eprintln!("{how:?}, fast: {fast}");
    let style = if how == How::MemTable { MemStyle::Table } else { MemStyle::Auto };
    let mut busy = busy(fast, style);
    send(&busy.client, how);
    busy.client.conn.expect_silence(SILENCE).unwrap();
    busy.release();
    let answer = busy.client.conn.recv_within(LIMIT).unwrap();
    // From here on only a queue that was not stopped may change anything.
    let both = stopped(how).len() == 2;
    let before = both.then(|| busy.memory());
    match how {
        How::GetBase => assert_eq!(answer.u32_at(4).unwrap(), u32::from(HELD)),
        _ => assert_eq!(answer.u64_at(0).unwrap(), 0, "{how:?} is served"),
    }
    for i in stopped(how) {
        let q = busy.client.queue(i);
        assert_eq!(q.ring().mem().used_idx(), HELD, "{how:?}: queue {i} is not drained");
        for _ in 0..HELD {
            let done = q.poll().unwrap().expect("it is there already");
            assert_eq!(done.status, Status::Ok);
            let want = if fast { 0x77 } else { 0 };
            assert_eq!(done.data(), vec![want; 512]);
        }
    }
    // The session answers, so it has done all that it wants to do; then it ends.
    busy.client.conn.get_u64(req::GET_FEATURES).unwrap();
    let before = before
        .filter(|_| !matches!(how, How::SetFeatures | How::MemTable | How::RemoveOtherRegion));
    if let Some(before) = before {
        busy.client.hang_up().unwrap();
        Conn::connect(busy.disk.path()).unwrap().get_u64(req::GET_FEATURES).unwrap();
        assert!(busy.memory() == before, "{how:?}: memory has changed after the answer");
    }
}

#[test]
fn stops_and_memory_changes_drain() {
    WAYS.into_iter().for_each(|how| drains(false, how));
}

#[test]
fn stops_and_memory_changes_drain_the_fast_lane() {
    WAYS.into_iter().for_each(|how| drains(true, how));
}

/// The front end goes, with everything in flight: the next one is served when the last byte has been written.
fn disconnects(fast: bool) {
    let busy = busy(fast, MemStyle::Auto);
    busy.client.hang_up().unwrap();
    let next = Conn::connect(busy.disk.path()).unwrap();
    next.send(req::GET_FEATURES, 0, &[], &[]).unwrap();
    next.expect_silence(SILENCE).unwrap();
    busy.release();
    next.recv_within(LIMIT).unwrap();
    let before = busy.memory();
    drop(next);
    let mut busy = busy;
    for i in 0..usize::from(QUEUES) {
        assert_eq!(busy.client.queue(i).ring().mem().used_idx(), HELD);
    }
    let mut other = busy.disk.connect(small());
    other.queue(0).write(0, &[1; 512]).unwrap();
    drop(other);
    assert!(busy.memory() == before, "memory has changed after the next was served");
}

#[test]
fn a_disconnect_drains() {
    disconnects(false);
}

#[test]
fn a_disconnect_drains_the_fast_lane() {
    disconnects(true);
}

/// A stop of one queue does not wait for another's requests.
#[test]
fn other_queues_go_on_while_one_drains() {
    let (disk, probe) = Probe::disk(config());
    let _open = Opener(Arc::clone(&probe));
    let mut client = disk.connect(Options { queues: 2, ..small() });
    probe.hold();
    let read = client.queue(0).read_request(0, 512).unwrap();
    client.queue(0).submit(read).unwrap();
    probe.wait_held(1);
    client.stop_queue(1).unwrap();
    client.start_queue(1).unwrap();
    // The same for memory that comes: nothing needs to be drained.
    client.plug_memory(1 << 20).unwrap();
    probe.release();
    client.queue(0).wait().unwrap();
    client.queue(1).flush().unwrap();
}

/// The export is closed under a running guest.
#[test]
fn closing_drains_and_flushes() {
    let busy = busy(false, MemStyle::Auto);
    let Busy { disk, probe, mut client, .. } = busy;
    probe.take_log();
    std::thread::scope(|s| {
        let _open = Opener(Arc::clone(&probe));
        let closing = s.spawn(move || drop(disk));
        client.conn.expect_silence(SILENCE).unwrap();
        assert!(!closing.is_finished());
        probe.release();
    });
    client.conn.wait_closed().unwrap();
    for q in client.queues_mut() {
        assert_eq!(q.ring().mem().used_idx(), HELD);
    }
    assert!(probe.take_log().contains(&Asked::Flush));
}

/// While a memory change waits for what is in flight, nothing new is taken: a busy guest cannot keep it waiting.
#[test]
fn nothing_is_taken_while_memory_changes() {
    let (disk, probe) = Probe::disk(config());
    let _open = Opener(Arc::clone(&probe));
    let mem_style = MemStyle::Table;
    let mut client = disk.connect(Options { mem_style, ..small() });
    probe.hold();
    let submit = |client: &mut Client| {
        let read = client.queue(0).read_request(0, 512).unwrap();
        client.queue(0).submit(read).unwrap();
    };
    submit(&mut client);
    probe.wait_held(1);
    send(&client, How::MemTable);
    client.conn.expect_silence(SILENCE).unwrap();
    submit(&mut client);
    client.conn.expect_silence(SILENCE).unwrap();
    assert_eq!(probe.held(), 1, "a request was taken");
    probe.release();
    assert_eq!(client.conn.recv_within(LIMIT).unwrap().u64_at(0).unwrap(), 0);
    assert_eq!(client.queue(0).wait_all().unwrap().len(), 2);
}

/// An export that gives its disk up when no ring runs, and could not flush it then: it tries again when its front end goes,
/// for nobody else would.
#[test]
fn a_disk_that_could_not_be_given_up_is_when_the_front_end_goes() {
    let image = Image::new(MIB);
    let once = json!({"event": "none", "iotype": "flush", "errno": 28, "once": true});
    let file = json!({"driver": "file", "filename": image.path(), "locking": "off"});
    let debug = json!({"driver": "blkdebug", "inject-error": [once, once], "image": file});
    let root = json!({"driver": "raw", "node-name": "root", "file": debug});
    let disk = Disk::auto(root, config());
    let mut client = disk.connect(small());
    client.queue(0).write(0, &[1; 512]).unwrap();
    assert!(disk.export.is_active());
    client.stop().unwrap();
    assert!(disk.export.is_active(), "the write may still be saved");
    drop(client);
    // Served when the other one is forgotten.
    Conn::connect(disk.path()).unwrap().get_u64(req::GET_FEATURES).unwrap();
    assert!(!disk.export.is_active());
}
