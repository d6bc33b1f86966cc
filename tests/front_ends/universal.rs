//! What holds for every front end.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost_user_blk::vhost_user::Endpoint;
use vhost_user_blk::vhost_user::message::*;

use crate::client::*;
use crate::fixture::{Fixture, serve};
use crate::mock::{Mock, PATIENCE};

const FEATURES_CALL: &str = "features 0x130007a44";

fn started() -> (Fixture, Client) {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    f.device.expect(&[FEATURES_CALL, "start 0 base=0 size=128 kick call"]);
    (f, client)
}

#[test]
fn u2_unknown_requests_are_refused_and_the_connection_goes_on() {
    let (f, client) = started();
    let known: Vec<u32> = (0..64).filter(|c| request_name(*c) != "unknown request").collect();
    let unknown = (0..100).chain([0x1000, u32::MAX]).filter(|c| !known.contains(c));
    for request in unknown.chain([SET_INFLIGHT_FD]) {
        assert!(!client.ask(request, &[0; 16], &[event()]));
        client.set(request, &[0; 16], &[event()]);
        client.sync();
    }
    assert!(f.device.rest().is_empty());
}

#[test]
fn u2_protocol_features_that_were_not_offered_are_refused() {
    let (f, client) = started();
    for bit in [14, 21, 63] {
        assert!(!client.ask(SET_PROTOCOL_FEATURES, &u64_bytes(1 << 3 | 1 << bit), &[]));
        assert_eq!(client.get_u64(GET_PROTOCOL_FEATURES) & 1 << bit, 0);
    }
    for bit in [0, 33, 34, 63] {
        assert!(!client.ask(SET_FEATURES, &u64_bytes(1 << 30 | 1 << bit), &[]));
    }
    assert!(f.device.rest().is_empty(), "the ring runs on with what was accepted");
}

#[test]
fn u4_without_an_event_the_ring_is_polled() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    client.give_memory();
    client.set(SET_VRING_NUM, &state_bytes(1, 64), &[]);
    client.set(SET_VRING_ADDR, &addr_bytes(1, ring_addr(1)), &[]);
    client.set(SET_VRING_CALL, &u64_bytes(1 | VRING_NOFD), &[]);
    client.set(SET_VRING_ERR, &u64_bytes(1 | VRING_NOFD), &[]);
    assert!(!client.ask(SET_VRING_KICK, &u64_bytes(1), &[]), "neither event nor flag");
    assert!(!client.ask(SET_VRING_KICK, &u64_bytes(1), &[event(), event()]), "two events");
    client.set(SET_VRING_KICK, &u64_bytes(1 | VRING_NOFD), &[]);
    client.set(SET_VRING_ENABLE, &state_bytes(1, 1), &[]);
    f.device.expect(&[FEATURES_CALL, "start 1 base=0 size=64"]);
}

#[test]
fn u6_a_ring_starts_in_the_middle() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    client.give_memory();
    client.set_up_ring(0, 128, 65_000);
    client.set(SET_VRING_ENABLE, &state_bytes(0, 1), &[]);
    f.device.expect(&[FEATURES_CALL, "start 0 base=65000 size=128 kick call"]);
    f.device.set_progress(0, 1000);
    assert_eq!(client.get_base(0), 464);
    // Stopped: asked again, the same answer; nothing starts until the next kick.
    assert_eq!(client.get_base(0), 464);
    f.device.expect(&["stop 0"]);
    client.set(SET_VRING_ENABLE, &state_bytes(0, 1), &[]);
    client.sync();
    assert!(f.device.rest().is_empty());
    client.set(SET_VRING_KICK, &u64_bytes(0), &[event()]);
    f.device.expect(&["start 0 base=464 size=128 kick call"]);
}

#[test]
fn u7_sizes_change_between_boots() {
    let (f, client) = started();
    for size in [16, 1, 1024, 512, 256] {
        client.get_base(0);
        client.set_up_ring(0, size, 0);
        let start = format!("start 0 base=0 size={size} kick call");
        f.device.expect(&["stop 0", &start]);
    }
    for size in [0, 3, 2048, 65_536, u32::MAX] {
        assert!(!client.ask(SET_VRING_NUM, &state_bytes(0, size), &[]));
    }
    client.sync();
    assert!(f.device.rest().is_empty());
}

#[test]
fn u8_the_end_stops_the_rings_and_the_next_is_served_for_ever() {
    let f = Fixture::new();
    for round in 0..200 {
        let client = f.connect();
        if round % 4 == 0 {
            client.start();
            f.device.expect(&[FEATURES_CALL, "start 0 base=0 size=128 kick call"]);
        }
        drop(client);
        let end: &[&str] = if round % 4 == 0 { &["stop 0", "gone"] } else { &["gone"] };
        f.device.expect(end);
    }
}

#[test]
fn u8_a_lost_connection_is_drained() {
    let (f, client) = started();
    f.device.set_busy(true);
    drop(client);
    f.device.expect(&["draining 0"]);
    // The next has to wait for that.
    let next = f.connect();
    next.set(GET_QUEUE_NUM, &[], &[]);
    next.expect_silence();
    f.device.set_busy(false);
    f.device.expect(&["stop 0", "gone"]);
    assert_eq!(next.reply(GET_QUEUE_NUM), u64_bytes(2));
}

#[test]
fn events_are_replaced_on_a_running_ring() {
    let (f, client) = started();
    client.set(SET_VRING_CALL, &u64_bytes(0), &[event()]);
    client.set(SET_VRING_CALL, &u64_bytes(VRING_NOFD), &[]);
    client.set(SET_VRING_ERR, &u64_bytes(0), &[event()]);
    f.device.expect(&["call 0 true", "call 0 false", "err 0 true"]);
    f.device.set_progress(0, 9);
    client.set(SET_VRING_KICK, &u64_bytes(0), &[event()]);
    f.device.expect(&["stop 0", "start 0 base=9 size=128 kick err"]);
    // Stopped, they are kept for the next start.
    client.get_base(0);
    client.set(SET_VRING_CALL, &u64_bytes(0), &[event()]);
    client.set(SET_VRING_KICK, &u64_bytes(0), &[event()]);
    f.device.expect(&["stop 0", "start 0 base=9 size=128 kick call err"]);
}

#[test]
fn a_running_ring_described_anew_stops_until_it_is_kicked() {
    let (f, client) = started();
    f.device.set_progress(0, 5);
    assert!(client.ask(SET_VRING_NUM, &state_bytes(0, 128), &[]), "the same size");
    assert!(f.device.rest().is_empty());
    assert!(client.ask(SET_VRING_BASE, &state_bytes(0, 0), &[]));
    f.device.expect(&["stop 0"]);
    client.set(SET_VRING_KICK, &u64_bytes(0), &[event()]);
    f.device.expect(&["start 0 base=0 size=128 kick call"]);
    assert!(client.ask(SET_VRING_NUM, &state_bytes(0, 64), &[]));
    f.device.expect(&["stop 0"]);
    assert!(!client.ask(SET_VRING_BASE, &state_bytes(0, 65_536), &[]));
    client.sync();
    assert!(f.device.rest().is_empty());
}

#[test]
fn without_protocol_features_rings_are_enabled_from_the_start() {
    let f = Fixture::new();
    let client = f.connect();
    client.set(SET_OWNER, &[], &[]);
    client.set(SET_FEATURES, &u64_bytes(1 << 32), &[]);
    client.give_memory();
    client.set_up_ring(0, 128, 0);
    f.device.expect(&["features 0x100000000", "start 0 base=0 size=128 kick call"]);
}

#[test]
fn other_features_on_a_running_ring_restart_it() {
    let (f, client) = started();
    f.device.set_progress(0, 3);
    assert!(client.ask(SET_FEATURES, &u64_bytes(1 << 30 | 1 << 32), &[]));
    f.device.expect(&["stop 0", "features 0x100000000", "start 0 base=3 size=128 kick call"]);
}

#[test]
fn resets_stop_the_rings() {
    let (f, client) = started();
    assert!(client.ask(RESET_OWNER, &[], &[]));
    f.device.expect(&["stop 0"]);
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]));
    f.device.expect(&["start 0 base=0 size=128 kick call"]);
    assert!(client.ask(RESET_DEVICE, &[], &[]));
    f.device.expect(&["stop 0", "features 0x0"]);
    assert!(client.ask(RESET_DEVICE, &[], &[]));
    // Nothing of the ring is left.
    client.set(SET_FEATURES, &u64_bytes(client.get_u64(GET_FEATURES)), &[]);
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]));
    f.device.expect(&[FEATURES_CALL]);
    assert!(f.device.rest().is_empty());
}

#[test]
fn a_new_memory_table_that_is_wrong_leaves_the_old_one() {
    let (f, client) = started();
    let file = || memory_file(REGION_SIZE);
    let overlapping = MemRegion { guest_addr: REGION_SIZE / 2, ..region(1) };
    let endless = MemRegion { guest_addr: u64::MAX - 4096, ..region(1) };
    let empty = MemRegion { size: 0, ..region(1) };
    let beyond = MemRegion { mmap_offset: 4096, ..region(1) };
    let far = MemRegion { mmap_offset: u64::MAX - 4095, ..region(1) };
    for wrong in [overlapping, endless, empty, beyond, far] {
        let table = table_bytes(&[region(0), wrong]);
        assert!(!client.ask(SET_MEM_TABLE, &table, &[file(), file()]), "{wrong:x?}");
        let single = single_region_bytes(wrong);
        assert!(!client.ask(ADD_MEM_REG, &single, &[file()]), "{wrong:x?}");
    }
    let table = table_bytes(&[region(0), region(1)]);
    assert!(!client.ask(SET_MEM_TABLE, &table, &[file()]), "one descriptor for two regions");
    assert!(!client.ask(SET_MEM_TABLE, &table, &[event(), event()]), "not memory");
    assert!(!client.ask(SET_MEM_TABLE, &table[..60], &[file(), file()]), "cut short");
    assert!(f.device.rest().is_empty());
    assert!(client.ask(SET_MEM_TABLE, &table, &[file(), file()]));
    f.device.expect(&["memory 2 drain=true"]);
    assert!(client.ask(SET_MEM_TABLE, &table_bytes(&[]), &[]));
    f.device.expect(&["stop 0"]);
}

#[test]
fn stopping_the_server_drains_and_ends_the_connection() {
    let (mut f, client) = started();
    // In the middle of a message, too.
    client.send_raw(&[1, 0, 0], &[]);
    f.stop();
    client.expect_end();
    f.device.expect(&["stop 0", "gone"]);
    assert!(UnixStream::connect(f.path()).is_err(), "nobody listens");
}

#[test]
fn an_idle_server_stops() {
    Fixture::new().stop();
}

#[test]
fn a_connected_descriptor_is_served_until_its_end() {
    let device = Arc::new(Mock::new(2));
    let (theirs, ours) = UnixStream::pair().unwrap();
    let (server, finished) = serve(Endpoint::Connected(theirs), &device);
    let client = Client::over(ours);
    client.start();
    device.expect(&[FEATURES_CALL, "start 0 base=0 size=128 kick call"]);
    assert!(!server.is_finished());
    drop(client);
    finished.recv_timeout(PATIENCE).unwrap();
    device.expect(&["stop 0", "gone"]);
    server.stop();
}
