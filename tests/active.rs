//! Two programs over one image, as live migration with shared storage has them: one is active, the other waits.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use vhost_user_blk::block::Graph;
use vhost_user_blk::export::Export;
use vub_client::{Base, Client, Options};

use common::program::Program;
use common::{Disk, MIB, Random, add, config, eventually, small};

const AUTO: &str = ",writable=on,num-queues=2,activate=auto";

/// Creates an image of 64 MiB.
fn create(path: &Path) {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(path).arg("64M");
    assert!(create.status().unwrap().success());
}

/// Whether nobody has the image locked, and it is clean.
fn is_free_and_clean(path: &Path) -> bool {
    let mut check = Command::new("qemu-img");
    check.args(["check", "-q"]).arg(path).stderr(Stdio::null()).status().unwrap().success()
}

/// The arguments for an image as `root`, in two `--blockdev`, as libvirt has them.
fn nodes(path: &Path) -> [String; 2] {
    let storage = json!({"driver": "file", "filename": path, "node-name": "storage",
        "auto-read-only": true, "discard": "unmap"});
    let format = json!({"node-name": "root", "read-only": false, "discard": "unmap",
        "driver": "qcow2", "file": "storage"});
    [storage.to_string(), format.to_string()]
}

fn two_queues() -> Options {
    Options { queues: 2, ..small() }
}

/// Starts all rings where they stopped: what QEMU does when the machine goes on.
fn resume(client: &mut Client) -> vub_client::Result<()> {
    (0..2).for_each(|i| client.set_base(i, Base::Used));
    (0..2).try_for_each(|i| client.start_queue(i))
}

#[test]
fn an_image_goes_back_and_forth() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    create(&path);
    let source = Program::start(&nodes(&path), &[("root", AUTO)]);
    let mut here = source.connect("root", two_queues());
    let mut random = Random(7);
    let data: Vec<Vec<u8>> = (0..20).map(|_| random.bytes(64 << 10)).collect();
    here.queue(0).write(0, &data[0]).unwrap();
    assert!(!is_free_and_clean(&path), "the source has its locks");
    assert_eq!(source.journals(), 1);

    // The destination starts, and answers its front end, while the source has the image.
    let destination = Program::start(&nodes(&path), &[("root", AUTO)]);
    let mut there = destination.connect("root", Options { start: false, ..two_queues() });
    assert_eq!(there.read_config().unwrap().capacity(), 64 * MIB / 512);
    // Its rings must not run yet.
    assert!(there.start().is_err(), "two programs over one image");
    there.stop().unwrap();
    for (i, chunk) in (0..).zip(&data) {
        here.queue(i % 2).write(i as u64 * MIB / 512, chunk).unwrap();
    }
    // Not flushed by the guest: the stop does.
    here.stop().unwrap();
    assert!(is_free_and_clean(&path), "after the answer to GET_VRING_BASE nothing is held");
    assert_eq!((source.journals(), destination.journals()), (0, 0));

    resume(&mut there).unwrap();
    assert!(!is_free_and_clean(&path), "the destination has the locks");
    assert_eq!((source.journals(), destination.journals()), (0, 1));
    for (i, chunk) in (0..).zip(&data) {
        let mut read = vec![0; chunk.len()];
        there.queue(i % 2).read(i as u64 * MIB / 512, &mut read).unwrap();
        assert!(read == *chunk, "chunk {i}");
    }
    assert!(resume(&mut here).is_err(), "the source has lost it");
    here.stop().unwrap();
    there.queue(0).write(40 * MIB / 512, &data[1]).unwrap();
    // A front end that vanishes gives the image up, too.
    there.hang_up().unwrap();
    eventually("the destination lets go", || is_free_and_clean(&path));

    // The cache of the source is older than that write.
    resume(&mut here).unwrap();
    let mut read = vec![0; data[1].len()];
    here.queue(1).read(40 * MIB / 512, &mut read).unwrap();
    assert!(read == data[1], "read anew");
    drop(here);
    assert!(source.terminate().success() && destination.terminate().success());
    assert!(is_free_and_clean(&path));
}

#[test]
fn a_guest_that_resets_its_device_keeps_its_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    create(&path);
    let program = Program::start(&nodes(&path), &[("root", AUTO)]);
    let mut client = program.connect("root", two_queues());
    let features = client.features();
    let before = program.resources();
    for n in 0..50u8 {
        client.queue(0).write(u64::from(n) * MIB / 512, &[n; 4096]).unwrap();
        client.reset_device().unwrap();
        assert!(is_free_and_clean(&path));
        // While it is inactive, the configuration is there.
        assert_eq!(client.read_config().unwrap().capacity(), 64 * MIB / 512);
        client.set_config(32, 0, &[n % 2]).unwrap();
        client.conn.set_u64(vub_client::proto::req::SET_FEATURES, features).unwrap();
        resume(&mut client).unwrap();
        let mut read = [0; 4096];
        client.queue(1).read(u64::from(n) * MIB / 512, &mut read).unwrap();
        assert_eq!(read, [n; 4096]);
    }
    let after = program.resources();
    assert_eq!(after[0], before[0], "descriptors");
    // Pool threads come and go.
    assert!(after[1] <= before[1] + 8, "threads: {before:?} {after:?}");
}

/// The standard error of a start that fails.
fn failure(args: &[String]) -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk")).args(args).output().unwrap();
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    String::from_utf8(out.stderr).unwrap()
}

#[test]
fn what_may_become_inactive_has_one_user() {
    let dir = tempfile::tempdir().unwrap();
    let (path, socket) = (dir.path().join("image"), dir.path().join("s"));
    create(&path);
    let [storage, format] = nodes(&path);
    let export = |id: &str, node: &str, more: &str| {
        let socket = socket.display();
        format!(
            "vhost-user-blk,id={id},node-name={node},addr.type=unix,addr.path={socket}{id}{more}"
        )
    };
    let auto = export("e", "root", ",activate=auto");
    let raw = r#"{"driver":"raw","node-name":"other","file":"storage"}"#.to_owned();
    let blockdev = || "--blockdev".to_owned();
    let export_option = || "--export".to_owned();
    let begin = [blockdev(), storage, blockdev(), format];
    for (more, node) in [
        (
            vec![export_option(), auto.clone(), export_option(), export("f", "storage", "")],
            "storage",
        ),
        (vec![export_option(), auto.clone(), export_option(), export("f", "root", "")], "root"),
        (vec![blockdev(), raw, export_option(), auto.clone()], "storage"),
    ] {
        let text = failure(&[&begin[..], &more].concat());
        let want =
            format!("node '{node}' has other users: what can become inactive must have none");
        assert!(text.contains(&want), "{text}");
    }
    // Mistakes in definitions are found at the start, and where they are.
    let missing = nodes(&dir.path().join("missing"));
    let args =
        [blockdev(), missing[0].clone(), blockdev(), missing[1].clone(), export_option(), auto];
    let text = failure(&args);
    assert!(text.contains("--blockdev") && text.contains("No such file or directory"), "{text}");
    assert!(is_free_and_clean(&path));
}

#[test]
fn a_node_that_nobody_activates() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    create(&path);
    let [storage, format] = nodes(&path);
    let with = |text: &str, name: &str, value: Value| {
        let mut options: Value = serde_json::from_str(text).unwrap();
        options[name] = value;
        options.to_string()
    };
    let format = with(&format, "active", json!(false));
    // An export that does not allow it activates it at the start, as QEMU's do.
    let definitions = [storage.clone(), format.clone()];
    let program = Program::start(&definitions, &[("root", ",writable=on")]);
    drop(program.connect("root", small()));
    assert!(!is_free_and_clean(&path));
    assert!(program.terminate().success());
    let program = Program::start(&definitions, &[("root", ",writable=on,allow-inactive=on")]);
    let mut client = program.connect("root", Options { start: false, ..small() });
    assert_eq!(client.read_config().unwrap().capacity(), 64 * MIB / 512);
    assert!(client.start().is_err());
    assert!(is_free_and_clean(&path));
    assert!(program.terminate().success());
}

/// What an upgrade in place does.
#[test]
fn any_export_can_be_deactivated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    create(&path);
    let graph = Graph::new();
    for node in nodes(&path) {
        add(&graph, serde_json::from_str(&node).unwrap());
    }
    let root = graph.find("root").unwrap();
    let export = Export::new(&graph, &root, config()).unwrap();
    assert!(!is_free_and_clean(&path));
    // Whoever holds a reference, it is said.
    let text = export.deactivate().unwrap_err().to_string();
    assert_eq!(text, "Node 'root' is still in use");
    assert!(!export.is_active());
    drop(root);
    eventually("its last reference goes", || is_free_and_clean(&path));
    for _ in 0..3 {
        export.activate().unwrap();
        export.activate().unwrap();
        assert!(export.is_active() && graph.find("root").is_some());
        assert!(!is_free_and_clean(&path));
        export.deactivate().unwrap();
        export.deactivate().unwrap();
        assert!(!export.is_active() && graph.nodes().is_empty());
        assert!(is_free_and_clean(&path));
    }
    // Another user of a node: nothing happens.
    export.activate().unwrap();
    let storage = graph.find("storage").unwrap();
    let other = Export::new(
        &graph,
        &storage,
        vhost_user_blk::export::ExportConfig { id: "other".into(), writable: false, ..config() },
    )
    .unwrap();
    let text = export.deactivate().unwrap_err().to_string();
    assert_eq!(text, "Node 'storage' is also in use by an unnamed block device");
    assert!(export.is_active());
    other.close();
    drop((other, storage));
    export.deactivate().unwrap();
    // An image that somebody else has: it stays inactive, and nothing is left open.
    let second = Graph::new();
    for node in nodes(&path) {
        add(&second, serde_json::from_str(&node).unwrap());
    }
    let text = export.activate().unwrap_err().to_string();
    assert!(text.contains("lock"), "{text}");
    assert!(!export.is_active() && graph.nodes().is_empty());
    second.close();
    export.activate().unwrap();
    assert!(export.close());
    assert!(graph.close_all());
    assert!(is_free_and_clean(&path));
    assert_eq!(Arc::strong_count(&export), 1);
}

/// A daemon leaves its directory, unless the names of what it will open begin there: of the image, of the backing file that the
/// image names, of what `--allow-path` and `--state-dir` say, and of what it removes in the end.
#[test]
fn a_daemon_opens_what_has_a_relative_name() {
    let place = tempfile::tempdir().unwrap();
    let run = |program: &str, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).current_dir(&place).stdin(Stdio::null()).status().unwrap().success()
    };
    let dir = place.path().join("images");
    std::fs::create_dir(&dir).unwrap();
    std::fs::create_dir(place.path().join("state")).unwrap();
    std::fs::write(dir.join("base"), vec![9; 1 << 20]).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "images/top"];
    assert!(run("qemu-img", &create));
    let node = "driver=qcow2,node-name=n,file.driver=file,file.filename=images/top";
    let export = format!("vhost-user-blk,node-name=n,addr.type=unix,addr.path=s{AUTO}");
    let args = ["--pidfile=pid", "--state-dir=state", "--blockdev", node, "--export", &export];
    let daemon = [&["--daemonize"], &args[..]].concat();
    assert!(run(env!("CARGO_BIN_EXE_vhost-user-blk"), &daemon));
    let pid = std::fs::read_to_string(place.path().join("pid")).unwrap().trim().parse().unwrap();
    let _kill = Kill(pid);
    for round in 1..3 {
        let mut client = Client::connect(place.path().join("s"), two_queues()).unwrap();
        let mut read = [0; 1024];
        client.queue(0).read(0, &mut read).unwrap();
        assert_eq!((read[0], read[512]), (if round == 1 { 9 } else { 1 }, 9));
        client.queue(0).write(0, &[1; 512]).unwrap();
        assert_eq!(std::fs::read_dir(place.path().join("state")).unwrap().count(), 1);
        client.stop().unwrap();
        assert_eq!(std::fs::read_dir(place.path().join("state")).unwrap().count(), 0);
    }
    vub_client::sys::kill(pid, libc::SIGTERM).unwrap();
    let left = |name: &str| place.path().join(name).exists();
    eventually("its names are gone", || !left("pid") && !left("s"));
    assert!(is_free_and_clean(&dir.join("top")));
}

/// Kills the daemon if the test fails.
struct Kill(u32);

impl Drop for Kill {
    fn drop(&mut self) {
        if std::thread::panicking() {
            vub_client::sys::kill(self.0, libc::SIGKILL).unwrap_or_default();
        }
    }
}

/// A queue that starts finds the nodes open, and they stay open: who closes them meanwhile sees it.
#[test]
fn a_queue_starts_while_its_export_comes_and_goes() {
    let null = json!({"driver": "null-co", "node-name": "root", "size": MIB, "read-zeroes": true});
    let disk = Disk::auto(null, config());
    let export = &disk.export;
    let mut client = disk.connect(Options { queues: 1, ..small() });
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        let _done = Done(&done);
        s.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // Refused as long as the queue runs.
                drop(export.deactivate());
            }
        });
        for round in 0..1000 {
            client.stop_queue(0).unwrap();
            client.start_queue(0).unwrap();
            assert!(export.is_active(), "round {round}: a queue runs on nodes that are closed");
        }
    });
}

/// Ends who waits for it, also in a test that fails.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
