//! What is served in other ways, and what goes with it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use vub_client::{Client, Options};

use crate::common::{LIMIT, MIB, small};
use crate::place::{PROGRAM, Place, wait_for};

fn image(place: &tempfile::TempDir, name: &str) {
    File::create(place.path().join(name)).unwrap().set_len(MIB).unwrap();
}

fn node(name: &str) -> String {
    format!("driver=raw,node-name={name},file.driver=file,file.filename={name}")
}

fn export(name: &str, more: &str) -> String {
    format!("vhost-user-blk,id={name},node-name={name},addr.type=unix,addr.path=s-{name}{more}")
}

fn assert_holds(client: &mut Client, byte: u8) {
    let mut back = [0; 512];
    client.queue(0).read(8, &mut back).unwrap();
    assert_eq!(back, [byte; 512]);
}

/// A busy export, an idle one, two of one node, one that is active only while it is used, and a front end that waits its turn.
#[test]
fn several_exports() {
    let dir = Place::dir();
    for name in ["a", "b", "c"] {
        image(&dir, name);
    }
    let (a, b, c) = (node("a"), node("b"), node("c"));
    let exports = [
        export("a", ",writable=on"),
        export("b", ",writable=on"),
        "vhost-user-blk,id=b2,node-name=b,addr.type=unix,addr.path=s-b2".to_owned(),
        export("c", ",writable=on,activate=auto"),
    ];
    let mut args = vec!["--blockdev", &a, "--blockdev", &b, "--blockdev", &c];
    args.extend(exports.iter().flat_map(|export| ["--export", export]));
    let mut place = Place::start(dir, &args);

    let mut first = Client::connect(place.path("s-a"), small()).unwrap();
    let mut auto = Client::connect(place.path("s-c"), small()).unwrap();
    let mut reader = Client::connect(place.path("s-b2"), small()).unwrap();
    first.queue(0).write(8, &[1; 512]).unwrap();
    auto.queue(0).write(8, &[3; 512]).unwrap();
    // The driver chooses write-through.
    first.set_config(32, 1, &[0]).unwrap();
    let waiting = UnixStream::connect(place.path("s-a")).unwrap();
    for _ in 0..3 {
        place.take_over();
        assert_holds(&mut first, 1);
        assert_holds(&mut auto, 3);
        assert_holds(&mut reader, 0);
        assert_eq!(first.read_config().unwrap().raw[32], 0);
    }
    // The idle one is there for who comes.
    let mut late = Client::connect(place.path("s-b"), small()).unwrap();
    late.queue(0).write(8, &[2; 512]).unwrap();
    assert_holds(&mut reader, 2);
    // Its turn comes when the first goes.
    drop(first);
    let mut second = Client::from_stream(waiting, small()).unwrap();
    assert_holds(&mut second, 1);
    place.take_over();
    assert_holds(&mut second, 1);
    drop((auto, late, reader, second));
    place.stop();
}

/// QEMU's convention: a connection inherited, no socket at all; its end is the end of the program.
#[test]
fn an_inherited_connection() {
    let dir = Place::dir();
    image(&dir, "image");
    let (ours, theirs) = UnixStream::pair().unwrap();
    let stdin = Stdio::from(OwnedFd::from(theirs));
    let mut place = Place::start_with(dir, &["--blk-file=image", "--fd=0"], stdin);
    let mut client = Client::from_stream(ours, small()).unwrap();
    client.queue(0).write(8, &[1; 512]).unwrap();
    place.take_over();
    assert_holds(&mut client, 1);
    place.take_over();
    assert_holds(&mut client, 1);
    place.assert_alive();
    drop(client);
    let status = wait_for("the end", || place.child.try_wait().unwrap());
    assert_eq!(status.code(), Some(0), "{}", place.log());
    assert!(!place.path("pid").exists() && !place.path("ctl").exists());
}

/// A daemon's images have relative names; its successor, started elsewhere, is a daemon, too. One that fails changes nothing.
#[test]
fn daemons_and_the_service_manager() {
    let dir = Place::dir();
    image(&dir, "image");
    let manager = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let heard = || {
        let mut bytes = [0; 64];
        let n = manager.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..n]).into_owned()
    };
    let run = |args: &[&str], cwd: &Path, told: bool| {
        let mut command = Command::new(PROGRAM);
        command.args(args).current_dir(cwd).env_remove("NOTIFY_SOCKET");
        command.envs(told.then(|| ("NOTIFY_SOCKET", dir.path().join("notify"))));
        command.stdin(Stdio::null()).status().unwrap()
    };
    let path = |name: &str| dir.path().join(name);
    let pid = || std::fs::read_to_string(path("pid")).unwrap().trim().parse::<u32>().unwrap();
    let args = [
        "--daemonize",
        "--control=ctl",
        "--pidfile=pid",
        "--blk-file=image",
        "--socket-path=s",
        "--allow-path=image",
    ];
    assert!(run(&args, dir.path(), true).success());
    let kill = Kill(std::cell::Cell::new(pid()));
    assert_eq!(heard(), "READY=1");
    let mut client = Client::connect(path("s"), small()).unwrap();
    client.queue(0).write(8, &[1; 512]).unwrap();

    let first = pid();
    let (fellow, told) = crate::fellow::Fellow::told(&path("ctl"), 1);
    assert_eq!(told.len(), 1);
    drop(fellow);
    assert_holds(&mut client, 1);
    assert_eq!(pid(), first);
    // By default systemd tells `ExecReload=` nothing of itself; and whoever is not told must be able to tell of the next.
    for is_told in [false, true, false, false] {
        let before = pid();
        let other = Path::new("/proc");
        assert!(run(&["--take-over", path("ctl").to_str().unwrap()], other, is_told).success());
        wait_for("the pidfile", || (pid() != before).then_some(()));
        kill.0.set(pid());
        wait_for("its end", || (!is_alive(before)).then_some(()));
        // From each of the two, in no order.
        let mut told = [heard(), heard()];
        told.sort();
        assert_eq!(told, [format!("MAINPID={}", pid()), "READY=1".to_owned()]);
        assert_holds(&mut client, 1);
    }
    let last = pid();
    vub_client::sys::kill(last, libc::SIGTERM).unwrap();
    assert_eq!(heard(), "STOPPING=1");
    wait_for("the end", || (!is_alive(last)).then_some(()));
    assert!(["pid", "s", "ctl"].iter().all(|name| !path(name).exists()));
}

/// Not a zombie either: who forked a daemon may not wait for it.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.starts_with(" Z"))
}

/// Kills the daemon if the test fails.
struct Kill(std::cell::Cell<u32>);

impl Drop for Kill {
    fn drop(&mut self) {
        if std::thread::panicking() {
            vub_client::sys::kill(self.0.get(), libc::SIGKILL).unwrap_or_default();
        }
    }
}

/// More files than one message can carry.
#[test]
fn many_regions_and_queues() {
    let dir = Place::dir();
    image(&dir, "a");
    let (a, export) = (node("a"), export("a", ",writable=on,num-queues=64"));
    let mut place = Place::start(dir, &["--blockdev", &a, "--export", &export]);
    let options = Options {
        queues: 64,
        mem_regions: 200,
        mem_size: 1 << 20,
        mem_style: vub_client::MemStyle::Slots,
        timeout: LIMIT,
        ..Options::default()
    };
    let mut client = Client::connect(place.path("s-a"), options).unwrap();
    client.queue(63).write(8, &[1; 512]).unwrap();
    for _ in 0..2 {
        place.take_over();
        for q in client.queues_mut() {
            let mut back = [0; 512];
            q.read(8, &mut back).unwrap();
            assert_eq!(back, [1; 512]);
        }
    }
    drop(client);
    place.stop();
}

#[test]
fn nobody_to_take_over_from() {
    let out = Command::new(PROGRAM).args(["--take-over", "/nonexistent/ctl"]).output().unwrap();
    assert_eq!(out.status.code(), Some(1));
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(text.contains("--take-over: /nonexistent/ctl: No such file"), "{text}");
}
