//! Firecracker.

use vhost_user_blk::vhost_user::message::*;

use crate::client::*;
use crate::fixture::Fixture;
use crate::script::play;

/// One queue, no REPLY_ACK, the kick before the enabling; GET_CONFIG again while the ring runs. A PUT of the same drive
/// closes the connection and opens another.
#[test]
fn f1_f4_f5_start_patch_and_again() {
    let f = Fixture::new();
    play(&f, include_str!("scripts/firecracker"));
    play(&f, include_str!("scripts/firecracker"));
}

#[test]
fn f1_the_kick_may_precede_everything() {
    let f = Fixture::new();
    let client = f.connect();
    client.set(SET_VRING_KICK, &u64_bytes(0), &[event()]);
    client.set(SET_VRING_ENABLE, &state_bytes(0, 1), &[]);
    client.set(SET_VRING_NUM, &state_bytes(0, 256), &[]);
    client.set(SET_VRING_ADDR, &addr_bytes(0, ring_addr(0)), &[]);
    client.give_memory();
    client.sync();
    assert!(f.device.rest().is_empty());
    client.set(SET_FEATURES, &u64_bytes(client.get_u64(GET_FEATURES)), &[]);
    f.device.expect(&["features 0x130007a44", "start 0 base=0 size=256 kick"]);
}

/// It never acknowledges FLUSH with its default cache type: the device must hear exactly that.
#[test]
fn f3_the_device_hears_what_was_not_accepted() {
    let f = Fixture::new();
    let client = f.connect();
    client.set(SET_FEATURES, &u64_bytes(1 << 29 | 1 << 30 | 1 << 32), &[]);
    f.device.expect(&["features 0x120000000"]);
    // It vanishes before it has finished: the next one is served.
    drop(client);
    f.device.expect(&["gone"]);
    play(&f, include_str!("scripts/firecracker"));
}
