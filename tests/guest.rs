//! Real guests: QEMU boots a small Linux on a disk that the program serves, and scripts in it use the disk.
//!
//! `contrib/guest/run` boots and judges (it needs what `contrib/setup` installs and fails without it). One guest at a time:
//! they are emulated and would starve each other.

#![allow(clippy::unwrap_used, reason = "tests")]

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

/// The program, serving one image; stopped and judged by [`Served::stop`].
struct Served {
    program: Child,
    socket: PathBuf,
    dir: tempfile::TempDir,
}

impl Served {
    /// Serves a fresh raw image of `mib` MiB: `file` options, then `export` options.
    fn start(mib: u64, file: &str, export: &str) -> Served {
        let dir = tempfile::tempdir_in(root().join("target")).unwrap();
        let image = dir.path().join("disk.raw");
        std::fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
        let socket = dir.path().join("disk.sock");
        let program = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"))
            .args(["--blockdev", &format!("driver=file,node-name=f,filename={},discard=unmap{file}", image.display())])
            .args(["--blockdev", "driver=raw,node-name=disk,file=f,discard=unmap"])
            .args(["--export", &format!(
                "type=vhost-user-blk,id=disk0,node-name=disk,addr.type=unix,addr.path={}{export}",
                socket.display()
            )])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut served = Served { program, socket, dir };
        let start = Instant::now();
        while !served.socket.exists() {
            assert!(served.program.try_wait().unwrap().is_none(), "the program ended");
            assert!(start.elapsed() < Duration::from_secs(10), "no socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        served
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    /// Boots a guest on the disk and runs `scripts` of contrib/guest/tests in it.
    fn guest(&self, scripts: &[&str], more: &[&str]) {
        let mut run = Command::new(root().join("contrib/guest/run"));
        run.args(["--timeout", "240", "--socket"]).arg(&self.socket).args(more);
        for script in scripts {
            run.arg("--script").arg(root().join("contrib/guest/tests").join(script));
        }
        let out = run.stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        let errors = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "guest: {}\n{text}\n{errors}", out.status);
    }

    /// SIGTERM: exit code 0, socket gone.
    fn stop(mut self) {
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
    let disk = Served::start(512, ",cache.direct=on", ",writable=on,serial=SN-0042");
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
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(disk.image()).unwrap());
    assert!(blocks * 512 < 256 << 20, "discards did not reach the file: {blocks} blocks");
    disk.stop();
}

#[test]
fn one_vcpu_with_threads_and_page_cache() {
    let _alone = alone();
    let disk = Served::start(256, ",aio=threads", ",writable=on,num-queues=1");
    disk.guest(&["filesystem.sh", "fio-verify.sh"], &["--vcpus", "1", "--queues", "1"]);
    // A second guest on the same connection point.
    disk.guest(&["fio-verify.sh"], &[]);
    disk.stop();
}

#[test]
fn read_only_disks_refuse_writes() {
    let _alone = alone();
    let disk = Served::start(64, "", ",writable=off");
    let before = std::fs::read(disk.image()).unwrap();
    disk.guest(&["readonly.sh"], &[]);
    assert!(std::fs::read(disk.image()).unwrap() == before, "the image changed");
    disk.stop();
}
