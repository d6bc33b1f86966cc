//! A disk that becomes longer while a guest uses it.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod common;
#[path = "drivers/mod.rs"]
mod drivers;

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;
use vub_client::{Client, Options, proto::pf, proto::req};

use common::program::Program;
use common::{LIMIT, MIB, eventually, small};
use drivers::bed::Loop;

/// BACKEND_CONFIG_CHANGE_MSG.
const CONFIG_CHANGE: u32 = 2;
const WRITABLE: &str = ",writable=on";

/// A raw disk of 1 MiB as `root`; what its format's options are beside.
fn raw(path: &Path, more: &str) -> [String; 2] {
    File::create(path).unwrap().set_len(MIB).unwrap();
    let file = json!({"driver": "file", "filename": path, "node-name": "storage"}).to_string();
    [file, format!(r#"{{"driver":"raw","node-name":"root","file":"storage"{more}}}"#)]
}

fn set_len(path: &Path, len: u64) {
    File::options().write(true).open(path).unwrap().set_len(len).unwrap();
}

fn with_channel() -> Options {
    let want_protocol = Options::default().want_protocol | 1 << pf::BACKEND_REQ;
    Options { backend_channel: true, want_protocol, ..small() }
}

fn capacity(client: &mut Client) -> u64 {
    client.read_config().unwrap().capacity() * 512
}

/// The front end hears of the new size, reads it, and the guest uses what is new.
fn expect_growth(client: &mut Client, len: u64) {
    let message = client.backend.as_ref().expect("a channel").recv_within(LIMIT).unwrap();
    assert_eq!((message.request, message.body.len()), (CONFIG_CHANGE, 0));
    assert_eq!(capacity(client), len);
    let last = len / 512 - 8;
    client.queue(0).write(last, &[7; 4096]).unwrap();
    let mut read = [0; 4096];
    client.queue(0).read(last, &mut read).unwrap();
    assert_eq!(read, [7; 4096]);
    assert!(client.queue(0).read(last + 8, &mut read).is_err(), "the end is the end");
}

#[test]
fn a_file_that_grows_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let program = Program::start(&raw(&path, ""), &[("root", WRITABLE)]);
    let mut client = program.connect("root", with_channel());
    assert!(client.queue(0).write(MIB / 512, &[1; 4096]).is_err());
    set_len(&path, 3 * MIB);
    expect_growth(&mut client, 3 * MIB);
    // Whoever connects later sees it at once.
    drop(client);
    assert_eq!(capacity(&mut program.connect("root", small())), 3 * MIB);
}

#[test]
fn a_device_that_grows_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    File::create(&path).unwrap().set_len(MIB).unwrap();
    let device = Loop::over(&path, 512);
    // They are looked at every few seconds: at the same time.
    let start = |direct| {
        let node = json!({
            "driver": "host_device", "node-name": "root", "filename": device.0,
            "cache": {"direct": direct},
        });
        let program = Program::start(&[node.to_string()], &[("root", WRITABLE)]);
        let client = program.connect("root", with_channel());
        (program, client)
    };
    let both = [start(true), start(false)];
    set_len(&path, 2 * MIB);
    device.resize();
    for (program, mut client) in both {
        expect_growth(&mut client, 2 * MIB);
        drop(client);
        assert!(program.terminate().success());
    }
}

#[test]
fn a_signal_does_not_wait_for_anybody() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let program = Program::start(&raw(&path, ""), &[("root", WRITABLE)]);
    let grow = |len| {
        set_len(&path, len);
        vub_client::sys::kill(program.pid(), libc::SIGUSR1).unwrap();
    };
    // Nobody is connected: it is known when somebody is.
    let mut client = program.connect("root", Options { start: false, ..with_channel() });
    grow(2 * MIB);
    eventually("the signal is heard", || capacity(&mut client) == 2 * MIB);
    client.start().unwrap();
    // This front end reads the channel no more: more than a socket holds.
    for n in 0..600 {
        let len = 2 * MIB + (n + 1) * 4096;
        grow(len);
        eventually("the size changes", || capacity(&mut client) == len);
        client.queue(0).write(len / 512 - 8, &[3; 4096]).unwrap();
    }
    drop(client);
    assert!(program.terminate().success());
}

#[test]
fn what_shrinks_keeps_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let program = Program::start(&raw(&path, ""), &[("root", WRITABLE)]);
    let mut client = program.connect("root", with_channel());
    set_len(&path, MIB / 2);
    vub_client::sys::kill(program.pid(), libc::SIGUSR1).unwrap();
    // The same signal again, with something to see, is heard after that.
    set_len(&path, 2 * MIB);
    vub_client::sys::kill(program.pid(), libc::SIGUSR1).unwrap();
    expect_growth(&mut client, 2 * MIB);
}

#[test]
fn other_disks_do_not_follow_their_files() {
    let dir = tempfile::tempdir().unwrap();
    let (window, image) = (dir.path().join("window"), dir.path().join("image"));
    let [storage, root] = raw(&window, r#","size":524288"#);
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("1M");
    assert!(create.status().unwrap().success());
    let file = json!({"driver": "file", "filename": image});
    let qcow2 = json!({"driver": "qcow2", "node-name": "qcow2", "file": file}).to_string();
    let nodes = [storage, root, qcow2];
    let program = Program::start(&nodes, &[("root", WRITABLE), ("qcow2", WRITABLE)]);
    let mut clients = ["root", "qcow2"].map(|node| program.connect(node, with_channel()));
    for path in [&window, &image] {
        set_len(path, 8 * MIB);
    }
    vub_client::sys::kill(program.pid(), libc::SIGUSR1).unwrap();
    for (client, len) in clients.iter_mut().zip([MIB / 2, MIB]) {
        let channel = client.backend.as_ref().unwrap();
        channel.expect_silence(std::time::Duration::from_millis(1500)).unwrap();
        assert_eq!(capacity(client), len);
    }
}

#[test]
fn without_a_channel_the_operator_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let [path, socket, log] = ["image", "s", "log"].map(|name| dir.path().join(name));
    let [storage, root] = raw(&path, "");
    let export =
        format!("vhost-user-blk,node-name=root,addr.type=unix,addr.path={}", socket.display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
    command.args(["--blockdev", &storage, "--blockdev", &root, "--export", &export]);
    let mut child =
        command.stdin(Stdio::null()).stderr(File::create(&log).unwrap()).spawn().unwrap();
    let mut client = Client::connect_retry(&socket, small()).unwrap();
    set_len(&path, 2 * MIB);
    eventually("it is noticed", || capacity(&mut client) == 2 * MIB);
    eventually("it is logged", || {
        std::fs::read_to_string(&log).unwrap().contains("the front end gave no channel to say so")
    });
    set_len(&path, MIB);
    vub_client::sys::kill(child.id(), libc::SIGUSR1).unwrap();
    eventually("it is logged", || {
        let text = std::fs::read_to_string(&log).unwrap();
        text.contains("node 'root': its medium has become shorter: 1048576 bytes")
    });
    assert_eq!(capacity(&mut client), 2 * MIB);
    client.conn.get_u64(req::GET_QUEUE_NUM).unwrap();
    // The hang-up signal still ends the program.
    vub_client::sys::kill(child.id(), libc::SIGHUP).unwrap();
    assert!(child.wait().unwrap().success());
}
