//! Plays conversations. A line of a script is
//!
//! * `> NAME [need_reply] [key=value ...] [fd | fds=N]`: the front end sends this. Keys: `q`, `num`, `bits` (a list
//!   of bit numbers), `u64`, `off`, `size`, `flags`, `slots` (a list of memory regions);
//! * `< ...`: the reply to it: a number, `q num`, `config`, or `log` (the description of SET_LOG_BASE). What has no such line must have no reply;
//! * `= ...`: the device is called so. All calls must be listed, in order;
//! * `! progress Q N`: ring Q takes N requests before it is stopped next;
//! * `# ...`: a comment.
//!
//! At the end the front end disconnects.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use vhost_user_blk::vhost_user::message::*;

use crate::client::*;
use crate::fixture::Fixture;
use crate::mock::Mock;

/// Plays `script` on a new connection.
pub fn play(fixture: &Fixture, script: &str) {
    let client = fixture.connect();
    let mut last = None;
    for (n, line) in script.lines().enumerate() {
        let line = line.trim();
        let run = || step(fixture, &client, line, last);
        let sent = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        match sent {
            Ok(Some(sent)) => last = Some(sent),
            Ok(None) => {}
            Err(e) => {
                eprintln!("in line {}: {line}", n + 1);
                std::panic::resume_unwind(e);
            }
        }
    }
    client.sync();
    drop(client);
    assert_eq!(fixture.device.until_gone(), ["gone"], "after the last line");
}

/// Does one line; answers the message if it was one.
fn step<'a>(
    fixture: &Fixture,
    client: &Client,
    line: &'a str,
    last: Option<(u32, &'a str)>,
) -> Option<(u32, &'a str)> {
    match line.split_once(' ').unwrap_or((line, "")) {
        (">", rest) => {
            client.expect_silence();
            return Some(send(client, rest));
        }
        ("<", rest) => {
            let (request, sent) = last.expect("a message before its reply");
            check_reply(&client.reply(request), rest, &fields(sent));
        }
        ("=", rest) => assert_eq!(fixture.device.next_call(), rest),
        ("!", rest) => {
            let words: Vec<&str> = rest.split(' ').collect();
            let ["progress", q, n] = words[..] else { panic!("unknown command") };
            fixture.device.set_progress(q.parse().unwrap(), n.parse().unwrap());
        }
        ("" | "#", _) => {}
        _ => panic!("what is this line?"),
    }
    None
}

fn fields(line: &str) -> HashMap<&str, &str> {
    line.split(' ').map(|w| w.split_once('=').unwrap_or((w, ""))).collect()
}

fn number(text: &str) -> u64 {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
        None => text.parse().unwrap(),
    }
}

fn code(name: &str) -> u32 {
    (0..64).find(|c| request_name(*c) == name).unwrap_or_else(|| panic!("no request {name}"))
}

fn send<'a>(client: &Client, line: &'a str) -> (u32, &'a str) {
    let request = code(line.split(' ').next().unwrap());
    let f = fields(line);
    let field = |key: &str| f.get(key).map_or(0, |v| number(v));
    let field32 = |key: &str| u32::try_from(field(key)).unwrap();
    let list = |key: &str| f.get(key).map_or(Vec::new(), |v| v.split(',').map(number).collect());
    let mut fds: Vec<OwnedFd> = Vec::new();
    if f.contains_key("fd") {
        fds.push(event());
    }
    let payload = match request {
        SET_FEATURES | SET_PROTOCOL_FEATURES => {
            u64_bytes(list("bits").iter().fold(0, |all, bit| all | 1 << bit))
        }
        SET_LOG_BASE => {
            fds = vec![memory_file(field("size"))];
            LogPlace { size: field("size"), mmap_offset: 0 }.to_bytes()
        }
        SET_STATUS => u64_bytes(field("u64")),
        SET_VRING_KICK | SET_VRING_CALL | SET_VRING_ERR => u64_bytes(field("q")),
        SET_VRING_NUM | SET_VRING_BASE | GET_VRING_BASE | SET_VRING_ENABLE => {
            state_bytes(field32("q"), field32("num"))
        }
        SET_VRING_ADDR => {
            let q = field32("q");
            addr_bytes(q, VringAddr { flags: field32("flags"), ..ring_addr(q) })
        }
        SET_MEM_TABLE => {
            let regions: Vec<MemRegion> = list("slots").into_iter().map(region).collect();
            fds = regions.iter().map(|r| memory_file(r.size)).collect();
            table_bytes(&regions)
        }
        ADD_MEM_REG | REM_MEM_REG => {
            if request == ADD_MEM_REG {
                fds = vec![memory_file(REGION_SIZE)];
            }
            single_region_bytes(region(list("slots")[0]))
        }
        GET_CONFIG | SET_CONFIG => {
            let size = field32("size");
            let contents = vec![0; usize::try_from(size).unwrap()];
            config_bytes(field32("off"), size, field32("flags"), &contents)
        }
        SET_BACKEND_REQ_FD => {
            fds = vec![UnixStream::pair().unwrap().0.into()];
            Vec::new()
        }
        _ => Vec::new(),
    };
    let flags = if f.contains_key("need_reply") { NEED_REPLY } else { 0 };
    client.send_raw(&encode(request, flags, &payload), &fds);
    (request, line)
}

fn check_reply(reply: &[u8], expected: &str, sent: &HashMap<&str, &str>) {
    let words: Vec<&str> = expected.split(' ').collect();
    match words[..] {
        ["config"] => {
            let (offset, size) = (number(sent["off"]), number(sent["size"]));
            let from = usize::try_from(offset % 0x100).unwrap();
            let contents: Vec<u8> =
                (from..from + usize::try_from(size).unwrap()).map(Mock::config_byte).collect();
            let [offset, size] = [offset, size].map(|n| u32::try_from(n).unwrap());
            assert_eq!(reply[..8], config_bytes(offset, size, 0, &[])[..8]);
            assert_eq!(reply[12..], contents);
        }
        ["log"] => {
            let place = LogPlace { size: number(sent["size"]), mmap_offset: 0 };
            assert_eq!(reply, place.to_bytes());
        }
        [q, num] => {
            assert_eq!(reply, state_bytes(q.parse().unwrap(), num.parse().unwrap()));
        }
        [value] => assert_eq!(reply, u64_bytes(number(value)), "expected {value}"),
        _ => panic!("what is this reply?"),
    }
}
