//! QEMU 10.0.2.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vhost_user_blk::vhost_user::Told;
use vhost_user_blk::vhost_user::message::*;

use crate::client::*;
use crate::fixture::Fixture;
use crate::script::play;

/// QEMU connects when it starts and says nothing until a device is added, for as long as that takes.
#[test]
fn q1_a_silent_front_end_is_kept() {
    let f = Fixture::new();
    let client = f.connect();
    // Others come and go; the silent one was first.
    let impatient = f.connect();
    drop(impatient);
    client.expect_silence();
    client.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    drop(client);
    f.device.expect(&["stop 0", "gone", "gone"]);
}

#[test]
fn q1_a_device_added_at_run_time() {
    play(&Fixture::new(), include_str!("scripts/qemu-hot-plug"));
}

#[test]
fn q3_enabling_a_queue_that_was_never_described_does_nothing() {
    let f = Fixture::with_queues(4);
    let client = f.connect();
    client.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    for queue in 0..4 {
        assert!(client.ask(SET_VRING_ENABLE, &state_bytes(queue, 1), &[]));
    }
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(3, 0), &[]));
    assert_eq!(client.get_base(3), 0);
    assert!(f.device.rest().is_empty());
}

/// Features twice, calls twice, the error event kept although the device is reset after it was given.
#[test]
fn q4_q5_q6_q7_start_stop_continue_reset() {
    play(&Fixture::new(), include_str!("scripts/qemu-start-stop-reset"));
}

#[test]
fn q6_the_status_is_kept_and_0_resets() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    assert_eq!(client.get_u64(GET_STATUS), 0);
    for status in [1, 3, 11, 15, 128] {
        client.set(SET_STATUS, &u64_bytes(status), &[]);
        assert_eq!(client.get_u64(GET_STATUS), status);
    }
    assert!(!client.ask(SET_STATUS, &u64_bytes(256), &[]));
    assert_eq!(client.get_u64(GET_STATUS), 128);
    assert!(client.ask(SET_STATUS, &u64_bytes(0), &[]));
    f.device.expect(&["stop 0", "features 0x0"]);
    assert_eq!(client.get_u64(GET_STATUS), 0);
    // The memory is still there: the ring starts without it being given again.
    client.set(SET_FEATURES, &u64_bytes(client.get_u64(GET_FEATURES)), &[]);
    client.set_up_ring(0, 64, 0);
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]));
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=64 kick call"]);
}

#[test]
fn q8_it_comes_back_and_goes_on_at_the_used_index() {
    let f = Fixture::new();
    let lost = f.connect();
    lost.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    drop(lost);
    f.device.expect(&["stop 0", "gone"]);
    play(&f, include_str!("scripts/qemu-reconnect"));
}

/// Logging goes on and off by the flags of SET_VRING_ADDR on a running ring, which goes on running.
#[test]
fn q9_the_same_addresses_on_a_running_ring_do_nothing() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    let addr = VringAddr { flags: 1, ..ring_addr(0) };
    assert!(client.ask(SET_VRING_ADDR, &addr_bytes(0, addr), &[]));
    assert!(client.ask(SET_VRING_ADDR, &addr_bytes(0, ring_addr(0)), &[]));
    assert!(f.device.rest().is_empty());
    // Other addresses: the ring is drained, and goes on there.
    f.device.set_progress(0, 3);
    assert!(client.ask(SET_VRING_ADDR, &addr_bytes(0, ring_addr(1)), &[]));
    f.device.expect(&["stop 0", "start 0 base=3 size=128 kick call"]);
    // None of the guest's: refused, and the ring does not run.
    let nowhere = VringAddr { desc: 0x1000, ..ring_addr(0) };
    assert!(!client.ask(SET_VRING_ADDR, &addr_bytes(0, nowhere), &[]));
    f.device.expect(&["stop 0"]);
    assert!(client.ask(SET_VRING_ADDR, &addr_bytes(0, ring_addr(0)), &[]));
    f.device.expect(&["start 0 base=3 size=128 kick call"]);
}

#[test]
fn q10_memory_is_plugged_while_rings_run_and_then_it_migrates() {
    play(&Fixture::new(), include_str!("scripts/qemu-migrate"));
}

#[test]
fn q10_memory_slots_while_rings_run() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    let change =
        |request, slot, fds: &[_]| client.ask(request, &single_region_bytes(region(slot)), fds);
    assert!(change(ADD_MEM_REG, 1, &[memory_file(REGION_SIZE)]));
    f.device.expect(&["memory 2 drain=false"]);
    assert!(!change(ADD_MEM_REG, 1, &[memory_file(REGION_SIZE)]), "the same region twice");
    assert!(!change(ADD_MEM_REG, 2, &[]), "no descriptor");
    assert!(!change(ADD_MEM_REG, 2, &[memory_file(4096)]), "a file that ends too early");
    assert!(!change(REM_MEM_REG, 2, &[]), "no such region");
    // Some front ends send a descriptor with it.
    assert!(change(REM_MEM_REG, 1, &[memory_file(REGION_SIZE)]));
    f.device.expect(&["memory 1 drain=true"]);
    // The ring's own memory goes: the ring stops before, and starts when it is back.
    assert!(change(REM_MEM_REG, 0, &[]));
    f.device.expect(&["stop 0"]);
    assert!(change(ADD_MEM_REG, 0, &[memory_file(REGION_SIZE)]));
    f.device.expect(&["start 0 base=0 size=128 kick call"]);
}

#[test]
fn q10_all_509_slots() {
    let f = Fixture::new();
    let client = f.connect();
    client.handshake(None);
    assert_eq!(client.get_u64(GET_MAX_MEM_SLOTS), 509);
    let file = memory_file(REGION_SIZE);
    for slot in 0..=509 {
        let fd = file.try_clone().unwrap();
        let accepted = client.ask(ADD_MEM_REG, &single_region_bytes(region(slot)), &[fd]);
        assert_eq!(accepted, slot < 509);
    }
    client.set_up_ring(0, 256, 0);
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]));
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=256 kick call"]);
}

fn expect_config_change(channel: &Client) {
    use std::io::Read;
    let mut bytes = [0; Header::LEN];
    (&channel.stream).read_exact(&mut bytes).unwrap();
    let expected = Header { request: BACKEND_CONFIG_CHANGE_MSG, flags: VERSION, size: 0 };
    assert_eq!(Header::parse(&bytes), expected);
}

/// QEMU ignores the message before it has started, and answers it with GET_CONFIG on the main channel.
#[test]
fn q11_a_resize_is_told_when_it_is_heard_and_never_waited_for() {
    let f = Fixture::new();
    let told = || f.server.as_ref().unwrap().config_change().changed();
    assert_eq!(told(), Told::Later);
    let client = f.connect();
    let (theirs, ours) = UnixStream::pair().unwrap();
    let channel = Client::over(ours);
    client.handshake(None);
    assert!(client.ask(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
    client.get(GET_CONFIG, &config_bytes(0, 57, 0, &[0; 57]));
    client.start();
    client.sync();
    // What happened before it read the configuration is not told again.
    channel.expect_silence();
    assert_eq!(told(), Told::Now);
    expect_config_change(&channel);
    client.get(GET_CONFIG, &config_bytes(0, 57, 0, &[0; 57]));
    // While its rings stand still, nothing is sent; afterwards, once.
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, 0), &[]));
    client.sync();
    assert_eq!((told(), told()), (Told::Later, Told::Later));
    channel.expect_silence();
    assert!(client.ask(SET_VRING_ENABLE, &state_bytes(0, 1), &[]));
    expect_config_change(&channel);
    client.sync();
    channel.expect_silence();
    // A front end that never reads is not waited for.
    (0..10_000).for_each(|_| assert_eq!(told(), Told::Now));
    drop(channel);
    assert_eq!(told(), Told::NoChannel);
    client.sync();
}

/// What changes after the configuration was read is not in the answer: the guest must be told.
#[test]
fn q11_a_resize_while_the_configuration_is_read() {
    let f = Fixture::new();
    let client = f.connect();
    let (theirs, ours) = UnixStream::pair().unwrap();
    let channel = Client::over(ours);
    client.handshake(None);
    assert!(client.ask(SET_BACKEND_REQ_FD, &[], &[theirs.into()]));
    let change = Arc::clone(f.server.as_ref().unwrap().config_change());
    f.device.on_config_read(move || assert_eq!(change.changed(), Told::Later));
    client.get(GET_CONFIG, &config_bytes(0, 57, 0, &[0; 57]));
    client.start();
    expect_config_change(&channel);
}

#[test]
fn q12_it_tries_four_times_and_gives_up() {
    let f = Fixture::new();
    for _ in 0..4 {
        play(&f, include_str!("scripts/qemu-refused"));
    }
    play(&f, include_str!("scripts/qemu-hot-plug"));
}

/// The answer is "no more DMA": it comes when the requests in flight are done, not earlier.
#[test]
fn q13_the_base_is_answered_when_the_ring_is_drained() {
    let f = Fixture::new();
    let client = f.connect();
    client.start();
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=128 kick call"]);
    f.device.set_busy(true);
    f.device.set_progress(0, 42);
    client.set(GET_VRING_BASE, &state_bytes(0, 0), &[]);
    f.device.expect(&["draining 0"]);
    client.expect_silence();
    f.device.set_busy(false);
    assert_eq!(client.reply(GET_VRING_BASE), state_bytes(0, 42));
    f.device.expect(&["stop 0"]);
}
