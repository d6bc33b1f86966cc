//! Real guests: QEMU boots a small Linux on a disk that the program serves, and scripts in it use the disk.
//!
//! `contrib/guest/run` boots and judges (it needs what `contrib/setup` installs and fails without it). One guest at a time:
//! they are emulated and would starve each other.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Runs qemu-img; what it prints. It must succeed.
fn qemu_img(args: &[&str], image: &Path) -> String {
    let out = Command::new("qemu-img").args(args).arg(image).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "qemu-img {args:?}: {}\n{text}\n{errors}", out.status);
    text
}

/// The program, serving one image; stopped and judged by [`Served::stop`].
struct Served {
    command: Command,
    program: Child,
    socket: PathBuf,
    image: PathBuf,
    _dir: tempfile::TempDir,
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

impl Served {
    /// Serves a fresh raw image of `mib` MiB: `file` options, then `export` options.
    fn start(mib: u64, file: &str, export: &str) -> Served {
        let dir = directory();
        let image = dir.path().join("disk");
        std::fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
        Served::start_in(dir, "raw", file, export)
    }

    /// A fresh qcow2 image, made with these options of `qemu-img create`.
    fn qcow2(mib: u64, made_with: &str, file: &str, export: &str) -> Served {
        let dir = directory();
        let args = ["create", "-q", "-f", "qcow2", "-o", &format!("size={mib}M,{made_with}")];
        qemu_img(&args, &dir.path().join("disk"));
        Served::start_in(dir, "qcow2", file, export)
    }

    /// Serves the image `disk` in `dir`.
    fn start_in(dir: tempfile::TempDir, format: &str, file: &str, export: &str) -> Served {
        let (image, socket) = (dir.path().join("disk"), dir.path().join("disk.sock"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
        command
            .args(["--blockdev", &format!("driver=file,node-name=f,filename={},discard=unmap{file}", image.display())])
            .args(["--blockdev", &format!("driver={format},node-name=disk,file=f,discard=unmap")])
            .args(["--export", &format!(
                "type=vhost-user-blk,id=disk0,node-name=disk,addr.type=unix,addr.path={}{export}",
                socket.display()
            )])
            .stdin(Stdio::null());
        let program = command.spawn().unwrap();
        let mut served = Served { command, program, socket, image, _dir: dir };
        served.wait_for_socket();
        served
    }

    /// The same again, after [`Served::stop`].
    fn start_again(&mut self) {
        self.program = self.command.spawn().unwrap();
        self.wait_for_socket();
    }

    fn wait_for_socket(&mut self) {
        let start = Instant::now();
        while !self.socket.exists() {
            assert!(self.program.try_wait().unwrap().is_none(), "the program ended");
            assert!(start.elapsed() < Duration::from_secs(10), "no socket");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Boots a guest on the disk and runs `scripts` of contrib/guest/tests in it.
    fn guest(&self, scripts: &[&str], more: &[&str]) {
        guest_on(&self.socket, scripts, more);
    }

    /// SIGKILL once it has written something, then the next program; the kernel may keep the locks of the killed one's last
    /// requests for a moment. Not if `over`.
    fn kill_amid_writes(&mut self, over: impl Fn() -> bool) -> bool {
        let written = || std::fs::metadata(&self.image).unwrap().modified().unwrap();
        let before = written();
        while written() == before {
            if over() {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.program.kill().unwrap();
        self.program.wait().unwrap();
        self.program = self.command.spawn().unwrap();
        let start = Instant::now();
        while UnixStream::connect(&self.socket).is_err() {
            assert!(start.elapsed() < Duration::from_secs(10), "nobody listens");
            if self.program.try_wait().unwrap().is_some() {
                self.program = self.command.spawn().unwrap();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Bytes of the host's disk that the image takes.
    fn allocated(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&self.image).unwrap()) * 512
    }

    /// SIGTERM: exit code 0, socket gone.
    fn stop(&mut self) {
        let pid = self.program.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.program.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(status.code(), Some(0));
        assert!(!self.socket.exists(), "the socket is left behind");
    }
}

/// Boots a guest on the disk at `socket` and runs `scripts` of contrib/guest/tests in it.
fn guest_on(socket: &Path, scripts: &[&str], more: &[&str]) {
    let mut run = Command::new(root().join("contrib/guest/run"));
    run.args(["--timeout", "240", "--socket"]).arg(socket).args(more);
    for script in scripts {
        run.arg("--script").arg(root().join("contrib/guest/tests").join(script));
    }
    let out = run.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "guest: {}\n{text}\n{errors}", out.status);
}

impl Drop for Served {
    fn drop(&mut self) {
        // After `stop` there is nothing to kill.
        let _ = self.program.kill();
        let _ = self.program.wait();
    }
}

#[test]
fn two_vcpus_use_the_disk_in_every_way() {
    let _alone = alone();
    let mut disk = Served::start(512, ",cache.direct=on", ",writable=on,serial=SN-0042");
    let identity = ["--env", "EXPECT_SERIAL=SN-0042", "--env", "EXPECT_QUEUES=2", "--vcpus", "2"];
    let all = [
        "identity.sh",
        "filesystem.sh",
        "fio-verify.sh",
        "blkdiscard.sh",
        "writethrough-toggle.sh",
    ];
    disk.guest(&all, &identity);
    // The guest's last script discarded the whole disk and wrote little: the image is sparse.
    let bytes = disk.allocated();
    assert!(bytes < 256 << 20, "discards did not reach the file: {bytes} bytes");
    disk.stop();
}

#[test]
fn one_vcpu_with_threads_and_page_cache() {
    let _alone = alone();
    let mut disk = Served::start(256, ",aio=threads", ",writable=on,num-queues=1");
    disk.guest(&["filesystem.sh", "fio-verify.sh"], &["--vcpus", "1", "--queues", "1"]);
    // A second guest on the same connection point.
    disk.guest(&["fio-verify.sh"], &[]);
    disk.stop();
}

#[test]
fn packed_rings() {
    let _alone = alone();
    let mut disk = Served::start(256, ",cache.direct=on", ",writable=on");
    let packed = ["--device-opt", "packed=on", "--vcpus", "2"];
    disk.guest(&["packed.sh", "filesystem.sh", "fio-verify.sh"], &packed);
    // Another guest, with short rings (its firmware's are split, and can have no odd size); then one with split rings.
    disk.guest(&["packed.sh", "fio-verify.sh"], &[&packed[..], &["--queue-size", "16"]].concat());
    disk.guest(&["fio-verify.sh"], &[]);
    disk.stop();
}

/// The program is killed while fio writes through packed rings, and another goes on: fio's checksums are right, and the guest's
/// kernel has nothing to say.
#[test]
fn packed_rings_of_a_program_that_is_killed() {
    const KILLS: u32 = 6;
    let _alone = alone();
    let mut disk = Served::start(256, ",cache.direct=on", ",writable=on");
    let socket = disk.socket.clone();
    let guest = std::thread::spawn(move || {
        let packed = ["--device-opt", "packed=on", "--vcpus", "2", "--reconnect-ms", "50"];
        guest_on(&socket, &["packed.sh", "fio-verify.sh"], &packed);
    });
    let kills = (0..KILLS).take_while(|_| disk.kill_amid_writes(|| guest.is_finished())).count();
    guest.join().unwrap();
    assert_eq!(kills, usize::try_from(KILLS).unwrap(), "the guest was done before");
    disk.stop();
}

#[test]
fn read_only_disks_refuse_writes() {
    let _alone = alone();
    let mut disk = Served::start(64, "", ",writable=off");
    let before = std::fs::read(&disk.image).unwrap();
    disk.guest(&["readonly.sh"], &[]);
    assert!(std::fs::read(&disk.image).unwrap() == before, "the image changed");
    disk.stop();
}

/// qemu-img check: no errors, no leaks.
fn check(image: &Path) {
    let text = qemu_img(&["check", "-f", "qcow2"], image);
    assert!(text.contains("No errors were found"), "{text}");
}

#[test]
fn a_qcow2_disk_is_used_in_every_way() {
    let _alone = alone();
    let made_with = "cluster_size=64k,lazy_refcounts=off";
    let mut disk = Served::qcow2(512, made_with, ",cache.direct=on", ",writable=on");
    let all = ["filesystem.sh", "fio-verify.sh", "blkdiscard.sh", "writethrough-toggle.sh"];
    disk.guest(&all, &["--vcpus", "2"]);
    disk.stop();
    check(&disk.image);
    let bytes = disk.allocated();
    assert!(bytes < 256 << 20, "discards did not reach the file: {bytes} bytes");
}

/// The machine is switched off without unmounting, the program goes on; then it ends, too.
#[test]
fn a_qcow2_disk_survives_the_machine_and_the_program() {
    let _alone = alone();
    let made_with = "cluster_size=16k,extended_l2=on,lazy_refcounts=on";
    let mut disk = Served::qcow2(128, made_with, "", ",writable=on");
    disk.guest(&["reboot.sh"], &["--env", "BOOT=first"]);
    disk.guest(&["reboot.sh"], &["--env", "BOOT=second"]);
    disk.guest(&["reboot.sh"], &["--env", "BOOT=first"]);
    disk.stop();
    check(&disk.image);
    disk.start_again();
    disk.guest(&["reboot.sh", "fio-verify.sh"], &["--env", "BOOT=second"]);
    disk.stop();
    check(&disk.image);
}
