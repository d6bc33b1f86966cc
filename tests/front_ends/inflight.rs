//! The region that tracks requests in flight: asked for, given, given again, forgotten.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use vhost_user_blk::vhost_user::message::*;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::client::*;
use crate::fixture::Fixture;

/// Bytes of the part of a queue of 128 entries: 16 before, 16 for each, up to a multiple of 64.
const PART: u64 = 2112;
const FEATURES_CALL: &str = "features 0x130007a44";

fn desc(mmap_size: u64, num_queues: u16, queue_size: u16) -> InflightDesc {
    InflightDesc { mmap_size, mmap_offset: 0, num_queues, queue_size }
}

fn clone(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().unwrap()
}

/// GET_INFLIGHT_FD: the answer's payload, and the file that came with it.
fn get(client: &Client, asked: InflightDesc) -> (Vec<u8>, Option<File>) {
    client.set(GET_INFLIGHT_FD, &asked.to_bytes(), &[]);
    let mut bytes = [0; Header::LEN + 24];
    let (read, file) = client.stream.recv_with_fd(&mut bytes).unwrap();
    assert_eq!(read, bytes.len());
    let header = Header::parse(bytes[..Header::LEN].try_into().unwrap());
    assert_eq!((header.request, header.flags), (GET_INFLIGHT_FD, REPLY | VERSION));
    (bytes[Header::LEN..].to_vec(), file)
}

#[test]
fn q2_it_is_made_before_there_is_any_ring() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    f.device.expect(&[FEATURES_CALL]);
    let (reply, file) = get(&client, desc(0, 2, 128));
    assert_eq!(reply, desc(2 * PART, 2, 128).to_bytes());
    let file = file.expect("a descriptor");
    assert_eq!(file.metadata().unwrap().len(), 2 * PART);
    let mut bytes = vec![1; usize::try_from(2 * PART).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|b| *b == 0));
    // Nobody can take it away from under us.
    assert!(file.set_len(PART).is_err() && file.set_len(3 * PART).is_err());
    assert_eq!(get(&client, desc(0, 1, 1024)).0, desc(16448, 1, 1024).to_bytes());
    client.sync();
}

/// QEMU and libvhost-user agree that a region of no bytes means that there is none.
#[test]
fn q2_what_was_not_offered_is_answered_with_nothing() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    for (queues, size) in [(0, 128), (3, 128), (2, 0), (2, 1025), (u16::MAX, u16::MAX)] {
        let (reply, file) = get(&client, desc(0, queues, size));
        assert_eq!((reply, file.is_some()), (desc(0, 0, 0).to_bytes(), false), "{queues} {size}");
    }
    assert_eq!(client.get(GET_INFLIGHT_FD, &[0; 19]), desc(0, 0, 0).to_bytes());
    client.sync();
}

#[test]
fn q2_q8_the_region_is_used_until_a_reset() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    client.give_memory();
    let (reply, file) = get(&client, desc(0, 2, 128));
    let file: OwnedFd = file.unwrap().into();
    assert!(client.ask(SET_INFLIGHT_FD, &reply, &[clone(&file)]));
    client.set_up_ring(0, 128, 5);
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]));
    f.device.expect(&[FEATURES_CALL, "start 0 base=5 size=128 kick call inflight"]);
    // Stop and continue: the same one again, or not at all.
    client.get_base(0);
    client.set_up_ring(0, 128, 5);
    f.device.expect(&["stop 0", "start 0 base=5 size=128 kick call inflight"]);
    client.get_base(0);
    assert!(client.ask(SET_INFLIGHT_FD, &reply, &[clone(&file)]));
    client.set_up_ring(0, 128, 5);
    f.device.expect(&["stop 0", "start 0 base=5 size=128 kick call inflight"]);
    // The rings after a reset are others.
    assert!(client.ask(RESET_DEVICE, &[], &[]));
    client.set(SET_FEATURES, &u64_bytes(client.get_u64(GET_FEATURES)), &[]);
    client.set_up_ring(0, 128, 0);
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]));
    f.device.expect(&[
        "stop 0",
        "features 0x0",
        FEATURES_CALL,
        "start 0 base=0 size=128 kick call",
    ]);
    // So are those of another connection.
    drop(client);
    f.device.expect(&["stop 0", "gone"]);
    let client = f.connect();
    client.start();
    f.device.expect(&[FEATURES_CALL, "start 0 base=0 size=128 kick call"]);
}

/// Q14. The feature decides: who has not acknowledged it gets drained rings.
#[test]
fn q14_a_ring_stops_at_once_if_that_is_negotiated() {
    let f = Fixture::new();
    for (protocol, how) in [(Some(0x19b22b), "suspend"), (None, "stop")] {
        let client = f.connect();
        client.handshake(protocol);
        client.give_memory();
        let (reply, file) = get(&client, desc(0, 2, 128));
        assert!(client.ask(SET_INFLIGHT_FD, &reply, &[file.unwrap().into()]));
        client.set_up_ring(0, 128, 5);
        let enable = |on| assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, on), &[]));
        let started = |base| format!("start 0 base={base} size=128 kick call inflight");
        let ended = format!("{how} 0");
        enable(1);
        f.device.expect(&[FEATURES_CALL, &started(5)]);
        f.device.set_progress(0, 3);
        assert_eq!(client.get_base(0), 8);
        f.device.expect(&[&ended]);
        // QEMU disables rings before it asks for their bases.
        client.set_up_ring(0, 128, 8);
        f.device.expect(&[&started(8)]);
        enable(0);
        f.device.expect(&[&ended]);
        assert_eq!(client.get_base(0), 8);
        enable(1);
        client.set_up_ring(0, 128, 8);
        f.device.expect(&[&started(8)]);
        // What nobody asks to hurry is drained.
        assert!(client.ask(RESET_DEVICE, &[], &[]));
        f.device.expect(&["stop 0", "features 0x0"]);
        drop(client);
        f.device.expect(&["gone"]);
    }
}

#[test]
fn a_ring_that_has_no_place_in_it_runs_without() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    client.give_memory();
    let given = desc(PART, 1, 128).to_bytes();
    assert!(client.ask(SET_INFLIGHT_FD, &given, &[memory_file(PART)]));
    for (queue, size) in [(0, 256), (1, 64), (0, 64)] {
        client.set_up_ring(queue, size, 0);
        assert!(client.ask(SET_VRING_ENABLE, &state_bytes(queue, 1), &[]));
    }
    f.device.expect(&[
        FEATURES_CALL,
        "start 0 base=0 size=256 kick call",
        "start 1 base=0 size=64 kick call",
        "stop 0",
        "start 0 base=0 size=64 kick call inflight",
    ]);
}

#[test]
fn regions_that_are_none_are_refused() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    let refused = |d: InflightDesc, file: OwnedFd| {
        assert!(!client.ask(SET_INFLIGHT_FD, &d.to_bytes(), &[file]), "{d:?}");
    };
    refused(desc(2 * PART, 2, 128), memory_file(2 * PART - 1));
    refused(desc(2 * PART - 1, 2, 128), memory_file(2 * PART));
    refused(desc(0, 0, 0), memory_file(PART));
    refused(desc(PART, 0, 128), memory_file(PART));
    refused(desc(PART, 1, 0), memory_file(PART));
    refused(desc(u64::MAX, u16::MAX, u16::MAX), memory_file(PART));
    refused(InflightDesc { mmap_offset: 64, ..desc(PART, 1, 128) }, memory_file(PART));
    refused(InflightDesc { mmap_offset: u64::MAX - 7, ..desc(PART, 1, 128) }, memory_file(PART));
    refused(InflightDesc { mmap_offset: 4, ..desc(PART, 1, 128) }, memory_file(2 * PART));
    refused(desc(PART, 1, 128), event());
    let read_only = File::open("/proc/self/exe").unwrap();
    refused(desc(PART, 1, 128), read_only.as_fd().try_clone_to_owned().unwrap());
    assert!(!client.ask(SET_INFLIGHT_FD, &desc(PART, 1, 128).to_bytes(), &[]), "no file");
    let shifted = InflightDesc { mmap_offset: 64, ..desc(PART, 1, 128) };
    assert!(client.ask(SET_INFLIGHT_FD, &shifted.to_bytes(), &[memory_file(PART + 64)]));
    client.sync();
}
