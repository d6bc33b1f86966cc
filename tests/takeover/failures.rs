//! Successors that fail, at each step: the program goes on, its guest sees a pause at most.

use std::fs::{File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use serde_json::json;
use vub_client::{Client, Options};

use crate::common::LIMIT;
use crate::fellow::{ACTIVATED, EXPORT, FAILED, Fellow, GO, HELLO, READY, frame};
use crate::load::{disk, new_model, options, under_load, wait};
use crate::place::{PROGRAM, Place, assert_clean, wait_for};

/// While a guest works: `fail` something, see that it goes on, and take over in earnest at last.
fn survive(format: &str, options: Options, fail: impl FnOnce(&mut Place, &Receiver<usize>)) {
    let mut place = disk(format, options.queues);
    let mut client = Client::connect(place.path("s"), options).unwrap();
    under_load(&mut client, &new_model(), |ended| {
        wait(ended, 100);
        fail(&mut place, ended);
        place.assert_alive();
        wait(ended, 100);
        place.take_over();
        wait(ended, 100);
    });
    drop(client);
    let dir = place.stop();
    if format == "qcow2" {
        assert_clean(&dir.path().join("image"));
    }
}

/// Waits until nothing ends any more: what has ended takes its time to be looked at.
fn silence(ended: &Receiver<usize>) {
    let start = Instant::now();
    while ended.recv_timeout(Duration::from_millis(300)).is_ok() {
        assert!(start.elapsed() < LIMIT, "requests go on");
    }
}

fn at_each_step(place: &mut Place, ended: &Receiver<usize>) {
    let ctl = place.path("ctl");
    let pauses = |place: &Place| place.log().matches("guests go on after").count();

    // Before the pause.
    drop(Fellow::connect(&ctl));
    let mut fellow = Fellow::connect(&ctl);
    fellow.say(b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(fellow.refusal(), "the other process does not speak this protocol");
    let mut fellow = Fellow::connect(&ctl);
    fellow.send(HELLO, &json!({"versions": [2, 3]}));
    assert_eq!(fellow.refusal(), "the successor speaks versions [2, 3], not 1 to 1");
    drop(Fellow::introduced(&ctl));
    let mut fellow = Fellow::introduced(&ctl);
    fellow.send(FAILED, &json!({"error": "no mood"}));
    assert_eq!(fellow.refusal(), "the other process has failed: no mood");
    wait(ended, 100);
    place.assert_alive();
    assert_eq!(pauses(place), 0, "{}", place.log());

    // After it: gone; gone in the middle of a frame; failed; talking nonsense.
    let (fellow, _) = Fellow::told(&ctl, 1);
    drop(fellow);
    wait_for("the first", || (pauses(place) == 1).then_some(()));
    wait(ended, 100);
    let (mut fellow, _) = Fellow::told(&ctl, 1);
    let activated = frame(ACTIVATED, &json!(null));
    fellow.say(&activated[..activated.len() - 1]);
    drop(fellow);
    wait_for("the second", || (pauses(place) == 2).then_some(()));
    wait(ended, 100);
    let (mut fellow, _) = Fellow::told(&ctl, 1);
    fellow.send(FAILED, &json!({"error": "no memory"}));
    assert_eq!(fellow.refusal(), "the other process has failed: no memory");
    wait(ended, 100);
    let (mut fellow, _) = Fellow::told(&ctl, 1);
    fellow.send(READY, &json!({"pid": 1}));
    assert_eq!(fellow.refusal(), "the other process sent 3, not Activated");
    wait(ended, 100);
    assert_eq!(pauses(place), 4, "{}", place.log());

    // As long as the successor may be at work on the image, nobody else is.
    let (mut fellow, told) = Fellow::told(&ctl, 1);
    assert_eq!(told[0]["active"], true);
    fellow.send(FAILED, &json!({"error": "slow to end"}));
    fellow.hear(FAILED);
    silence(ended);
    assert_eq!(pauses(place), 4, "the predecessor goes on beside a successor that lives");
    drop(fellow);
    wait(ended, 100);
    assert_eq!(pauses(place), 5);
}

#[test]
fn at_each_step_raw() {
    survive("raw", options(1), at_each_step);
}

#[test]
fn at_each_step_qcow2_packed() {
    survive("qcow2", Options { packed: true, inflight: false, ..options(2) }, at_each_step);
}

/// A program without the right to open what it does not own, if it is root's.
fn powerless() -> Command {
    let id = Command::new("id").arg("-u").output().unwrap();
    if id.stdout != b"0\n" {
        return Command::new(PROGRAM);
    }
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all", PROGRAM]);
    command
}

#[test]
fn an_image_that_the_successor_may_not_open() {
    survive("qcow2", options(2), |place, _| {
        let image = place.path("image");
        std::fs::set_permissions(&image, Permissions::from_mode(0o000)).unwrap();
        place.fail_to_take_over(&mut powerless());
        // May be read, but not written.
        std::fs::set_permissions(&image, Permissions::from_mode(0o400)).unwrap();
        place.fail_to_take_over(&mut powerless());
        std::fs::set_permissions(&image, Permissions::from_mode(0o600)).unwrap();
        // Both say why, twice.
        let denied = || place.log().matches("Permission denied").count();
        wait_for("the reasons", || (denied() == 4).then_some(()));
        let log = place.log();
        assert!(!log.contains("paused"), "the guest need not wait for that: {log}");
    });
}

#[test]
fn an_image_that_the_predecessor_could_not_open_again() {
    survive("raw", options(1), |place, _| {
        std::fs::rename(place.path("image"), place.path("elsewhere")).unwrap();
        let mut fellow = Fellow::introduced(&place.path("ctl"));
        fellow.send(READY, &json!({"pid": 1}));
        let why = fellow.refusal();
        assert_eq!(why, "Could not open 'image': No such file or directory");
        std::fs::rename(place.path("elsewhere"), place.path("image")).unwrap();
    });
}

/// Somebody else has a lock that neither of the two can get past: the successor fails, the guest waits, and goes on when the
/// lock is gone.
#[test]
fn an_image_that_nobody_can_open() {
    survive("qcow2", options(1), |place, ended| {
        let image = File::options().read(true).open(place.path("image")).unwrap();
        // "Nobody else may write": noticed by who begins to.
        lock_byte(&image, libc::F_RDLCK, 201);
        place.fail_to_take_over(&mut Command::new(PROGRAM));
        wait_for("the report", || place.log().contains("guests wait").then_some(()));
        silence(ended);
        drop(image);
    });
}

fn lock_byte(file: &File, kind: i32, at: i64) {
    let lock = libc::flock {
        l_type: kind.try_into().unwrap(),
        l_whence: libc::SEEK_SET.try_into().unwrap(),
        l_start: at,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the struct is whole and only read.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }, 0);
}

/// A front end that stops in the middle of a message: it cannot be handed over, and is served when it goes on.
#[test]
fn a_message_that_has_begun() {
    let mut place = disk("raw", 1);
    let client = Client::connect(place.path("s"), options(1)).unwrap();
    // GET_QUEUE_NUM, which has no payload.
    let message = [17u32, 1, 0].map(u32::to_ne_bytes).concat();
    client.conn.send_bytes(&message[..5], &[]).unwrap();
    // It has read that much when nothing is left to read.
    wait_for("the first bytes", || (unread(client.conn.stream()) == 0).then_some(()));
    place.fail_to_take_over(&mut Command::new(PROGRAM));
    assert!(place.log().contains("a message or requests in flight do not come"), "{}", place.log());
    client.conn.send_bytes(&message[5..], &[]).unwrap();
    assert_eq!(client.queue_num(), 1);
    let mut client = client;
    client.queue(0).write(0, &[3; 512]).unwrap();
    place.take_over();
    let mut back = [0; 512];
    client.queue(0).read(0, &mut back).unwrap();
    assert_eq!(back, [3; 512]);
}

/// Bytes sent over `stream` that the other end has not read.
fn unread(stream: &std::os::unix::net::UnixStream) -> i32 {
    let mut n = 0;
    // SAFETY: the ioctl writes one int.
    assert_eq!(unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut n) }, 0);
    n
}

#[test]
fn requests_that_wait_for_the_storage() {
    let dir = Place::dir();
    File::create(dir.path().join("image")).unwrap().set_len(1 << 20).unwrap();
    let rule = json!([{"event": "none", "iotype": "write", "errno": 5, "once": true}]);
    let node = json!({"driver": "blkdebug", "node-name": "d", "inject-error": rule,
        "image": {"driver": "file", "filename": "image"}});
    let export =
        "vhost-user-blk,id=e,node-name=d,writable=on,werror=stop,addr.type=unix,addr.path=s";
    let mut place = Place::start(dir, &["--blockdev", &node.to_string(), "--export", export]);
    let mut client = Client::connect(place.path("s"), options(1)).unwrap();
    let q = client.queue(0);
    let request = q.write_request(0, &[1; 512]).unwrap();
    q.submit(request).unwrap();
    wait_for("it waits", || place.log().contains("waits for it to work").then_some(()));
    place.fail_to_take_over(&mut Command::new(PROGRAM));
    assert!(place.log().contains("requests that failed wait"), "{}", place.log());
    vub_client::sys::kill(place.child.id(), libc::SIGUSR1).unwrap();
    assert_eq!(client.queue(0).wait().unwrap().status, vub_client::Status::Ok);
    place.take_over();
}

/// Who may take guests' memory.
#[test]
fn only_the_same_user_may_ask() {
    let place = disk("raw", 1);
    let ctl = place.path("ctl");
    assert_eq!(std::fs::metadata(&ctl).unwrap().permissions().mode() & 0o777, 0o600);
    let id = Command::new("id").arg("-u").output().unwrap();
    assert_eq!(id.stdout, b"0\n", "only root can be somebody else");
    // Even where the mode lets somebody in.
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let open = dir.path().join("ctl");
    let program = dir.path().join("program");
    std::fs::copy(PROGRAM, &program).unwrap();
    let mut args = vec!["--reuid=65534", "--clear-groups"];
    args.extend([program.to_str().unwrap(), "--take-over", open.to_str().unwrap()]);
    let node = "driver=null-co,node-name=d,size=1048576";
    let export = "vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=s";
    let control = format!("--control={}", open.display());
    let place = Place::start(Place::dir(), &["--blockdev", node, "--export", export, &control]);
    std::fs::set_permissions(&open, Permissions::from_mode(0o666)).unwrap();
    let mut foreign = Command::new("setpriv").args(&args).spawn().unwrap();
    let status = wait_for("its end", || foreign.try_wait().unwrap());
    assert_eq!(status.code(), Some(1));
    wait_for("the refusal", || place.log().contains("belongs to user 65534").then_some(()));
    assert!(place.log().contains("refused"));
}

/// A real successor of a predecessor that says what we want, of one idle export.
struct Heir {
    child: std::process::Child,
    predecessor: Fellow,
    dir: tempfile::TempDir,
}

impl Heir {
    /// What it is told to serve.
    const ARGS: [&str; 3] = [
        "--blockdev=driver=null-co,node-name=d,size=1048576",
        "--export",
        "vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=s",
    ];

    /// It has said READY.
    fn ready() -> Heir {
        let dir = Place::dir();
        let control = std::os::unix::net::UnixListener::bind(dir.path().join("ctl")).unwrap();
        let mut command = Command::new(PROGRAM);
        let child = command.arg("--take-over=ctl").current_dir(dir.path());
        let child = child.stderr(std::process::Stdio::piped()).spawn().unwrap();
        let mut predecessor = Fellow(control.accept().unwrap().0);
        predecessor.0.set_read_timeout(Some(crate::common::LIMIT)).unwrap();
        assert_eq!(predecessor.hear(HELLO)["versions"], json!([1, 1]));
        predecessor.configure(&Heir::ARGS, &control, dir.path());
        assert_eq!(predecessor.hear(READY)["pid"], child.id());
        Heir { child, predecessor, dir }
    }

    fn export(wce: u32) -> serde_json::Value {
        let serves = json!({"listener": null, "session": null});
        json!({"id": "e", "active": true, "wce": wce, "serves": serves})
    }

    /// It has said ACTIVATED.
    fn activated() -> Heir {
        let mut heir = Heir::ready();
        // With a socket, or the end of its last connection would be the end of the program.
        let mut export = Heir::export(1);
        export["serves"]["listener"] = json!(0);
        let socket = std::os::unix::net::UnixListener::bind(heir.dir.path().join("other"));
        heir.predecessor.send_with(EXPORT, &export, &socket.unwrap());
        heir.predecessor.hear(ACTIVATED);
        heir
    }

    /// It ends, and has touched no name.
    fn ends(self) -> String {
        drop(self.predecessor);
        let out = self.child.wait_with_output().unwrap();
        assert_eq!(out.status.code(), Some(1));
        assert!(self.dir.path().join("ctl").exists() && !self.dir.path().join("s").exists());
        String::from_utf8(out.stderr).unwrap()
    }
}

#[test]
fn a_predecessor_that_goes_or_talks_nonsense() {
    assert!(Heir::ready().ends().contains("the other process has gone"));
    assert!(Heir::activated().ends().contains("the other process has gone"));
    for body in [json!({}), json!({"id": "f", "active": true, "wce": 1}), Heir::export(256)] {
        let mut heir = Heir::ready();
        heir.predecessor.send(EXPORT, &body);
        heir.predecessor.hear(FAILED);
        heir.ends();
    }
    let mut heir = Heir::activated();
    heir.predecessor.send(FAILED, &json!({"error": "no mood"}));
    assert!(heir.ends().contains("no mood"));
}

/// A guest that relies on what the successor does not have: it says so while the predecessor can still go on.
#[test]
fn a_successor_that_lacks_what_the_guest_uses() {
    let place = Place::start(Place::dir(), &Heir::ARGS);
    let client = Client::connect(place.path("s"), Options { inflight: false, ..options(1) });
    let (fellow, told) = Fellow::told(&place.path("ctl"), 1);
    drop((fellow, client.unwrap()));
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut body = told[0].clone();
        change(&mut body["serves"]["session"]);
        body["serves"]["listener"] = json!(null);
        let mut heir = Heir::ready();
        heir.predecessor.send(EXPORT, &body);
        let why = heir.predecessor.hear(FAILED)["error"].as_str().unwrap().to_owned();
        heir.ends();
        why
    };
    let features = told[0]["serves"]["session"]["features"].as_u64().unwrap();
    assert_eq!(
        refused(&|session| session["features"] = json!(features | 1 << 50)),
        "export 'e': the guest uses features 0x4000000000000, which are not offered"
    );
    assert_eq!(
        refused(&|session| session["protocol"] = json!(1u64 << 40)),
        "export 'e': the front end uses other protocol features"
    );
    // Another block size.
    assert_eq!(
        refused(&|session| session["looks"][21] = json!(16)),
        "export 'e': the disk would look different to its guest"
    );
    let why = refused(&|_| {});
    assert!(why.starts_with("export 'e': there is no file"), "the rest is right: {why}");
}

/// It is told to end while it waits for GO, which is said just then: either it has heard it, and has served when it ends, or it
/// cannot be said any more.
#[test]
fn a_signal_beside_the_point_of_no_return() {
    let mut said = 0;
    for round in 0..12 {
        let mut heir = Heir::activated();
        vub_client::sys::kill(heir.child.id(), libc::SIGTERM).unwrap();
        let start = Instant::now();
        while start.elapsed() < Duration::from_micros(100 * round) {
            std::hint::spin_loop();
        }
        let go = std::io::Write::write(&mut heir.predecessor.0, &frame(GO, &json!(null)));
        let served = wait_for("its end", || heir.child.try_wait().unwrap()).success();
        assert_eq!(go.is_ok(), served, "round {round}: {go:?}");
        said += u32::from(served);
    }
    println!("said {said} times of 12");
    let mut heir = Heir::activated();
    vub_client::sys::kill(heir.child.id(), libc::SIGTERM).unwrap();
    wait_for("its end", || heir.child.try_wait().unwrap());
    heir.ends();
}

/// GO has been said, and is not taken back: whoever has heard it serves, signals come later.
#[test]
fn the_point_of_no_return() {
    let mut heir = Heir::activated();
    heir.predecessor.send(GO, &json!(null));
    drop(heir.predecessor);
    // Its own control socket works: that is what it serves as well.
    let refused = Fellow::introduced(&heir.dir.path().join("ctl"));
    drop(refused);
    vub_client::sys::kill(heir.child.id(), libc::SIGTERM).unwrap();
    assert_eq!(wait_for("its end", || heir.child.try_wait().unwrap()).code(), Some(0));
}
