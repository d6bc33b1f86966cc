//! cloud-hypervisor.

use vhost_user_blk::vhost_user::Told;
use vhost_user_blk::vhost_user::message::*;

use crate::client::*;
use crate::fixture::Fixture;
use crate::mock::Mock;
use crate::script::play;

#[test]
fn c1_c4_c7_start_pause_resume_hot_plug_reset() {
    play(&Fixture::new(), include_str!("scripts/cloud-hypervisor"));
}

#[test]
fn c1_ring_addresses_are_the_front_ends_own() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    client.give_memory();
    client.set_up_ring(0, 128, 0);
    // A guest address is none, nor is one beyond the region's end, nor one that is not aligned.
    let at = ring_addr(0).desc;
    let end = at + REGION_SIZE;
    for desc in [0x1000, at - 16, end - 16, end, u64::MAX - 15, at + 8] {
        let addr = VringAddr { desc, ..ring_addr(0) };
        client.set(SET_VRING_ADDR, &addr_bytes(0, addr), &[]);
        assert!(!client.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]), "{desc:#x}");
    }
    client.set(SET_VRING_ADDR, &addr_bytes(0, ring_addr(0)), &[]);
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
}

#[test]
fn c2_it_comes_back_without_asking_for_protocol_features() {
    let f = Fixture::new();
    play(&f, include_str!("scripts/cloud-hypervisor"));
    play(&f, include_str!("scripts/cloud-hypervisor-reconnect"));
}

/// A snapshot of the memory follows the answer.
#[test]
fn c4_a_pause_is_answered_when_the_ring_is_drained() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    f.device.set_busy(true);
    f.device.set_progress(0, 7);
    let message = encode(SET_VRING_ENABLE, NEED_REPLY, &state_bytes(0, 0));
    client.send_raw(&message, &[]);
    f.device.expect(&["draining 0"]);
    client.expect_silence();
    f.device.set_busy(false);
    assert_eq!(client.reply(SET_VRING_ENABLE), u64_bytes(0));
    f.device.expect(&["stop 0"]);
    // The pause has no GET_VRING_BASE; the resume goes on where the ring stopped.
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]));
    f.device.expect(&["start 0 base=7 size=128 kick call"]);
}

#[test]
fn c7_the_write_cache_is_set_whatever_the_flags() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    f.device.expect(&["features 0x130007a44"]);
    for (offset, flags) in [(32, 0), (32, 1), (0x120, 1)] {
        assert!(client.ask(SET_CONFIG, &config_bytes(offset, 1, flags, &[1]), &[]));
        f.device.expect(&["config 32 01"]);
    }
}

/// Before 2026 it added the offset of virtio-mmio's configuration space.
#[test]
fn c8_the_legacy_config_offset() {
    let f = Fixture::new();
    let client = f.connect();
    let reply = client.get(GET_CONFIG, &config_bytes(0x100, 60, 1, &[0; 60]));
    let contents: Vec<u8> = (0..60).map(Mock::config_byte).collect();
    assert_eq!(reply, config_bytes(0x100, 60, 1, &contents));
}

#[test]
fn c9_a_second_connection_waits_for_the_first() {
    let f = Fixture::new();
    let first = f.connect();
    first.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    let second = f.connect();
    second.set(GET_QUEUE_NUM, &[], &[]);
    // The first goes on undisturbed, the second is not answered.
    first.sync();
    second.expect_silence();
    drop(first);
    f.device.expect(&["stop 0", "gone"]);
    assert_eq!(second.reply(GET_QUEUE_NUM), u64_bytes(2));
    second.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
}

#[test]
fn c10_without_a_channel_a_resize_is_reported_and_told_when_one_comes() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    client.sync();
    assert_eq!(f.server.as_ref().unwrap().config_change().changed(), Told::NoChannel);
    let (theirs, ours) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(client.ask(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
    let mut bytes = [0; Header::LEN];
    Client::over(ours).read_exactly(&mut bytes);
    assert_eq!(Header::parse(&bytes).request, BACKEND_CONFIG_CHANGE_MSG);
}
