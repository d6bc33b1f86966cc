//! StratoVirt.

use vhost_user_blk::vhost_user::message::*;

use crate::client::*;
use crate::fixture::Fixture;
use crate::script::play;

/// Features and configuration before the owner; the owner again at each activation; need_reply without REPLY_ACK; the
/// whole configuration space written; used_idx as the base.
#[test]
fn v1_v2_v3_v4_v5_start_reset_start() {
    play(&Fixture::new(), include_str!("scripts/stratovirt"));
}

#[test]
fn v3_need_reply_that_was_not_negotiated_has_no_reply_of_its_own() {
    let f = Fixture::new();
    let client = f.connect();
    client.send_raw(&encode(GET_FEATURES, NEED_REPLY, &[]), &[]);
    client.reply(GET_FEATURES);
    for request in [SET_OWNER, SET_VRING_NUM, 63] {
        client.send_raw(&encode(request, NEED_REPLY, &[]), &[]);
    }
    client.sync();
    // Negotiated: each has exactly one.
    let offered = client.get_u64(GET_PROTOCOL_FEATURES);
    assert!(client.ask(SET_PROTOCOL_FEATURES, &u64_bytes(offered), &[]));
    assert!(client.ask(SET_OWNER, &[], &[]));
    assert!(client.ask(SET_OWNER, &[], &[]));
    assert!(!client.ask(SET_VRING_NUM, &[], &[]));
    client.send_raw(&encode(GET_QUEUE_NUM, NEED_REPLY, &[]), &[]);
    client.reply(GET_QUEUE_NUM);
    client.sync();
}
