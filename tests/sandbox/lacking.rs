//! Who may little from the start: users without privileges, containers and kernels that lack what the sandbox and the disks
//! would use. They are served, and one line says what is missing.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::process::Command;

use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
use tempfile::TempDir;

use crate::common::{Engine, Image, MIB, Random, small};
use crate::confined::{Confined, exercise, node};

/// Nobody.
const NOBODY: u32 = 65534;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"))
}

/// The program, started by a user that may nothing.
#[test]
fn no_privileges_are_needed() {
    // SAFETY: no memory is involved.
    let root = unsafe { libc::geteuid() } == 0;
    for aio in ["threads", "io_uring"] {
        let (image, dir) = (Image::new(8 * MIB), TempDir::new().unwrap());
        // Where it is built others may have no access.
        let copy = dir.path().join("program");
        fs::copy(env!("CARGO_BIN_EXE_vhost-user-blk"), &copy).unwrap();
        let mut program = Command::new(&copy);
        let images = TempDir::new().unwrap();
        let path = images.path().join("image");
        fs::copy(image.path(), &path).unwrap();
        if root {
            for path in [dir.path(), images.path(), &path] {
                chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
            }
            fs::set_permissions(&copy, Permissions::from_mode(0o755)).unwrap();
            program.uid(NOBODY).gid(NOBODY);
        }
        // Nothing to give up: it does not matter that somebody forbids to.
        refuse(&mut program, &[libc::SYS_capset], libc::EPERM);
        let root_node = node(&path, "raw", Engine { aio, direct: false });
        let nodes = [(root_node, "root")];
        let more = ["--log-level=warn"];
        let confined = Confined::start_as(program, dir, &nodes, "writable=on", &more, &[]);
        let mut client = confined.connect("root", small());
        exercise(&mut client, &mut Random(9));
        // What a user cannot get is no matter of its own.
        assert!(confined.threads(None, &["CapBnd"]).len() > 2);
        drop(client);
        fs::remove_file(copy).unwrap();
        confined.end();
    }
}

/// Has each of `calls` fail with `errno` in `program`.
fn refuse(program: &mut Command, calls: &[libc::c_long], errno: i32) {
    let rules = calls.iter().map(|call| (*call, Vec::new())).collect();
    let action = SeccompAction::Errno(errno.cast_unsigned());
    let arch = TargetArch::try_from(std::env::consts::ARCH).unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, action, arch).unwrap();
    let filter: seccompiler::BpfProgram = filter.try_into().unwrap();
    let apply = move || {
        seccompiler::apply_filter(&filter).map_err(|_| std::io::ErrorKind::PermissionDenied.into())
    };
    // SAFETY: between fork and exec only system calls are made.
    unsafe { program.pre_exec(apply) };
}

/// The program, for which each of `calls` fails with `errno`, and two disks. What it says at its start.
fn without(calls: &[libc::c_long], errno: i32, aio: &'static str) -> String {
    let mut program = program();
    refuse(&mut program, calls, errno);
    let images = [Image::new(8 * MIB), Image::new(8 * MIB)];
    let named = |at: usize, name: &'static str| {
        let mut node = node(&images[at].path(), "raw", Engine { aio, direct: false });
        node["node-name"] = name.into();
        (node, name)
    };
    let nodes = [named(0, "a"), named(1, "b")];
    let dir = TempDir::new().unwrap();
    let confined =
        Confined::start_as(program, dir, &nodes, "writable=on", &["--log-level=warn"], &[]);
    for name in ["a", "b"] {
        let mut client = confined.connect(name, small());
        exercise(&mut client, &mut Random(2));
    }
    let log = confined.log();
    fs::write(confined.path("log"), "").unwrap();
    confined.end();
    log
}

/// `log` is one line, about `what`.
fn assert_said_once(log: &str, what: &str) {
    assert!(log.lines().count() == 1 && log.contains(what), "{what}: {log}");
}

#[test]
fn containers_without_io_uring() {
    let calls = [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
    assert_said_once(&without(&calls, libc::EPERM, "io_uring"), "io_uring is not available");
    assert_said_once(&without(&calls, libc::ENOSYS, "io_uring"), "io_uring is not available");
    assert_eq!(without(&calls, libc::EPERM, "threads"), "", "nobody asked for it");
}

#[test]
fn kernels_without_landlock() {
    let calls = [
        libc::SYS_landlock_create_ruleset,
        libc::SYS_landlock_add_rule,
        libc::SYS_landlock_restrict_self,
    ];
    for errno in [libc::ENOSYS, libc::EOPNOTSUPP, libc::EPERM] {
        assert_said_once(&without(&calls, errno, "threads"), "no Landlock");
    }
}

#[test]
fn kernels_without_seccomp() {
    for errno in [libc::ENOSYS, libc::EPERM] {
        let log = without(&[libc::SYS_seccomp], errno, "threads");
        assert_said_once(&log, "no seccomp filters");
    }
}
