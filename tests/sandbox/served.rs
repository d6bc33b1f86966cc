//! Disks served in the sandbox.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;
use vub_client::blk::Request;
use vub_client::{Base, Client, Options};

use crate::common::{ENGINES, Engine, Image, MIB, Random, eventually, small, status_line};
use crate::confined::{Confined, exercise, node};

/// An image of 8 MiB.
fn create_qcow2(path: &Path) {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(path).arg("8M");
    assert!(create.status().unwrap().success());
}

#[test]
fn every_medium_is_served_in_the_sandbox() {
    for engine in ENGINES {
        for (driver, env) in [
            ("raw", &[][..]),
            ("qcow2", &[][..]),
            ("raw", &[("VHOST_USER_BLK_NO_IO_URING", "1")][..]),
            ("qcow2", &[("VHOST_USER_BLK_NO_IO_URING", "1")][..]),
        ] {
            let image = Image::new(8 * MIB);
            if driver == "qcow2" {
                create_qcow2(&image.path());
            }
            let confined = Confined::start(
                &[(node(&image.path(), driver, engine), "root")],
                &["--log-level=error"],
                env,
            );
            let mut random = Random(7);
            let mut client = confined.connect("root", small());
            exercise(&mut client, &mut random);
            // Three for the process, one for each thread's kind and those it comes from; a thread that has its name but has not run
            // yet comes to it. Discards are done by the pool: its threads came late.
            let wanted = [("vhost-user-blk", 3), ("blk-e-root", 5), ("blk-pool", 6)];
            eventually(&format!("filters: {engine:?} {driver} {env:?}"), || {
                let threads = confined.threads(None, &[]);
                wanted.iter().all(|(name, least)| {
                    let of = threads.iter().filter(|(n, _)| n.starts_with(name)).map(|(_, f)| *f);
                    of.min() >= Some(*least)
                })
            });
            client.hang_up().unwrap();
            client.reconnect(confined.path("root"), Base::Used).unwrap();
            exercise(&mut client, &mut random);
            drop(client);
            confined.end();
            if driver == "qcow2" {
                let check =
                    Command::new("qemu-img").args(["check", "-q"]).arg(image.path()).status();
                assert!(check.unwrap().success());
            }
        }
    }
}

/// The kernel counts a ring's memory as locked: the limit is lifted, or CAP_IPC_LOCK kept.
#[test]
fn rings_are_not_short_of_locked_memory() {
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::geteuid() }, 0, "only root has more than the limit");
    let image = Image::new(8 * MIB);
    let engine = Engine { aio: "io_uring", direct: false };
    let node = node(&image.path(), "raw", engine);
    let mut program = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
    let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let set = move || {
        // SAFETY: the limit is read through the pointer.
        match unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec only a system call is made.
    unsafe { program.pre_exec(set) };
    let (dir, nodes, more) = (tempfile::tempdir().unwrap(), [(node, "root")], ["--log-level=warn"]);
    let confined = Confined::start_as(program, dir, &nodes, "writable=on", &more, &[]);
    let mut client = confined.connect("root", small());
    exercise(&mut client, &mut Random(1));
    drop(client);
    // Not a word of falling back to epoll.
    confined.end();
}

#[test]
fn a_daemon_of_another_user() {
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::geteuid() }, 0, "only root can become somebody else");
    let (image, state) = (Image::new(8 * MIB), tempfile::tempdir().unwrap());
    let engine = ENGINES[0];
    create_qcow2(&image.path());
    std::os::unix::fs::chown(state.path(), Some(65534), None).unwrap();
    let state_dir = format!("--state-dir={}", state.path().display());
    let mut confined = Confined::start(
        &[(node(&image.path(), "qcow2", engine), "root")],
        &[&state_dir, "--daemonize", "--user=65534", "--group=65533", "--log-level=error"],
        &[],
    );
    // Its user may remove what is there.
    std::os::unix::fs::chown(confined.dir.path(), Some(65534), None).unwrap();
    assert!(confined.child.wait().unwrap().success(), "{}", confined.log());
    let pid = fs::read_to_string(confined.path("pid")).unwrap().trim().parse().unwrap();
    for file in ["root", "pid"] {
        let meta = fs::symlink_metadata(confined.path(file)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (65534, 65533), "{file}");
    }
    let kept = || fs::read_dir(state.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().uid());
    assert_eq!(kept().collect::<Vec<_>>(), [65534], "what is kept beside the image");
    let mut client = confined.connect("root", small());
    exercise(&mut client, &mut Random(3));
    confined.threads(Some(pid), &[]);
    let status = PathBuf::from(format!("/proc/{pid}/status"));
    assert_eq!((status_line(&status, "Uid"), status_line(&status, "Gid")), (65534, 65533));
    drop(client);
    vub_client::sys::kill(pid, libc::SIGTERM).unwrap();
    eventually("it has ended", || !confined.path("pid").exists());
    assert!(!confined.path("root").exists());
    assert_eq!(kept().count(), 0, "it could remove that, too");
}

/// Cuts the file of a region short.
fn truncate(client: &Client, region: usize) {
    let (_, fd) = client.mem().regions()[region];
    let file = File::options().write(true).open(format!("/proc/self/fd/{fd}")).unwrap();
    file.set_len(0).unwrap();
}

#[test]
fn memory_taken_away_hurts_its_owner_alone() {
    let image = Image::new(8 * MIB);
    let null =
        json!({"driver": "null-co", "node-name": "null", "size": 8 * MIB, "read-zeroes": true});
    for engine in ENGINES {
        let file = node(&image.path(), "raw", engine);
        let mut confined = Confined::start(&[(null.clone(), "null"), (file, "root")], &[], &[]);
        let (mut bad, mut good) =
            (confined.connect("null", small()), confined.connect("root", small()));
        let mut random = Random(5);
        exercise(&mut good, &mut random);
        // Zeroes are written by the worker itself.
        let region = bad.plug_memory(1 << 20).unwrap();
        let buffer = bad.mem().alloc_in(region, 4096, 4096).unwrap();
        truncate(&bad, region);
        bad.queue(0).submit(Request::read(0, vec![buffer])).unwrap();
        bad.queue(0).wait_err().unwrap();
        eventually("it is said", || confined.log().contains("queue 0 is broken"));
        exercise(&mut good, &mut random);
        // And the rings themselves, of a guest that comes back with new memory.
        bad.hang_up().unwrap();
        drop(bad);
        let mut bad = confined.connect("null", small());
        bad.queue(0).read(0, &mut [0; 512]).unwrap();
        truncate(&bad, 0);
        bad.queue(0).kick_fd().write(1).unwrap();
        bad.queue(0).wait_err().unwrap();
        exercise(&mut good, &mut random);
        drop(bad);
        // Where the kernel moves the data, it is an error of the request.
        let region = good.plug_memory(1 << 20).unwrap();
        let buffer = good.mem().alloc_in(region, 4096, 4096).unwrap();
        truncate(&good, region);
        let done = good.queue(0).run(Request::read(0, vec![buffer])).unwrap();
        assert_eq!(done.status, vub_client::Status::IoErr, "{engine:?}");
        confined.connect("null", small()).queue(0).read(0, &mut [0; 512]).unwrap();
        assert_eq!(confined.child.try_wait().unwrap(), None);
    }
}

/// A replaced image is another file: it is out of reach for an export that opens it late, but for `--allow-path`.
#[test]
fn what_is_opened_late_is_what_was_there() {
    let image = Image::new(8 * MIB);
    let root = node(&image.path(), "raw", ENGINES[0]);
    let dir_of_image = format!("--allow-path={}", image.path().parent().unwrap().display());
    let start = |more: &[&str]| {
        let program = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
        let options = "writable=on,activate=auto";
        let dir = tempfile::tempdir().unwrap();
        Confined::start_as(program, dir, &[(root.clone(), "root")], options, more, &[])
    };
    let confined = start(&["--log-level=error"]);
    let mut client = confined.connect("root", small());
    exercise(&mut client, &mut Random(4));
    client.stop().unwrap();
    drop(client);
    let replace = || {
        let copy = image.path().with_extension("copy");
        fs::copy(image.path(), &copy).unwrap();
        fs::rename(copy, image.path()).unwrap();
    };
    replace();
    let refused = Client::connect_retry(confined.path("root"), small());
    assert!(refused.is_err(), "another file was opened");
    let log = confined.log();
    assert!(log.contains("Permission denied") && log.contains("--allow-path"), "{log}");
    let confined = start(&["--log-level=error", &dir_of_image]);
    drop(confined.connect("root", Options { start: false, ..small() }));
    replace();
    let mut client = confined.connect("root", small());
    exercise(&mut client, &mut Random(4));
    drop(client);
    confined.end();
}

/// What it keeps beside an image that it opens late, and closes again.
#[test]
fn an_image_that_is_opened_late_has_its_journal() {
    let (image, state) = (Image::new(0), tempfile::tempdir().unwrap());
    create_qcow2(&image.path());
    let program = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
    let nodes = [(node(&image.path(), "qcow2", ENGINES[0]), "root")];
    let more = [&*format!("--state-dir={}", state.path().display()), "--log-level=warn"];
    let dir = tempfile::tempdir().unwrap();
    let options = "writable=on,activate=auto";
    let confined = Confined::start_as(program, dir, &nodes, options, &more, &[]);
    let kept = || fs::read_dir(state.path()).unwrap().count();
    for _ in 0..2 {
        let mut client = confined.connect("root", small());
        exercise(&mut client, &mut Random(6));
        assert_eq!(kept(), 1, "{}", confined.log());
        client.stop().unwrap();
        assert_eq!(kept(), 0, "{}", confined.log());
    }
    confined.end();
}
