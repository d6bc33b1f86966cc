//! Disks to test on: an image file, a graph over it, and a user with the permission to write.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_user_blk::block::perm::Perms;
use vhost_user_blk::block::{Graph, Node, RootUser};

use super::Rng;

/// What stands on the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    File,
    Raw,
    /// A window: offset and size in bytes.
    Window(u64, u64),
    /// `blkdebug` with blocks of so many bytes and short requests.
    Debug(u32),
    /// `blklogwrites` with sectors of so many bytes; with marks of what is done if so.
    Log(u32, bool),
    /// A loop device with sectors of this many bytes.
    HostDevice(u32),
}

/// The options of a run.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub layout: Layout,
    pub aio: &'static str,
    pub direct: bool,
    pub discard: &'static str,
    pub detect_zeroes: &'static str,
    pub no_flush: bool,
    pub read_only: bool,
}

impl Setup {
    pub const fn new(layout: Layout, aio: &'static str, direct: bool) -> Setup {
        let (discard, detect_zeroes) = ("unmap", "off");
        Setup { layout, aio, direct, discard, detect_zeroes, no_flush: false, read_only: false }
    }

    /// Every engine, direct and buffered, as far as the two go together.
    pub fn engines(layout: Layout) -> impl Iterator<Item = Setup> {
        [
            ("threads", false),
            ("threads", true),
            ("native", true),
            ("io_uring", false),
            ("io_uring", true),
        ]
        .into_iter()
        .map(move |(aio, direct)| Setup::new(layout, aio, direct))
    }

    fn options(&self, image: &Path) -> Value {
        let mut top = json!({
            "node-name": "top", "discard": self.discard, "detect-zeroes": self.detect_zeroes,
            "read-only": self.read_only,
            "cache": { "direct": self.direct, "no-flush": self.no_flush },
        });
        let file = json!({ "driver": "file", "filename": image, "aio": self.aio });
        match self.layout {
            Layout::File => {
                top["driver"] = json!("file");
                top["filename"] = json!(image);
                top["aio"] = json!(self.aio);
            }
            Layout::HostDevice(_) => {
                top["driver"] = json!("host_device");
                top["filename"] = json!(image);
                top["aio"] = json!(self.aio);
            }
            Layout::Raw => {
                top["driver"] = json!("raw");
                top["file"] = file;
            }
            Layout::Debug(align) => {
                top["driver"] = json!("blkdebug");
                (top["image"], top["align"]) = (file, json!(align));
                for limit in ["max-transfer", "max-write-zero", "max-discard"] {
                    top[limit] = json!(64 << 10);
                }
                for unit in ["opt-write-zero", "opt-discard"] {
                    top[unit] = json!(8 << 10);
                }
            }
            Layout::Log(sector, completions) => {
                top["driver"] = json!("blklogwrites");
                let log = image.with_extension("log");
                std::fs::write(&log, "").unwrap();
                top["log"] = json!({ "driver": "file", "filename": log, "aio": self.aio });
                (top["file"], top["log-sector-size"]) = (file, json!(sector));
                (top["log-completions"], top["log-super-update-interval"]) =
                    (json!(completions), json!(3));
            }
            Layout::Window(offset, size) => {
                top["driver"] = json!("raw");
                (top["file"], top["offset"], top["size"]) = (file, json!(offset), json!(size));
            }
        }
        top
    }

    /// Opens the graph over `image` (a file, or a device for [`Layout::HostDevice`]).
    pub fn open(&self, image: &Path) -> Disk {
        let graph = Graph::new();
        let Value::Object(options) = self.options(image) else { unreachable!() };
        let node = graph.add(options).unwrap_or_else(|e| panic!("{self:?}: {e}"));
        let perms = Perms::device(!self.read_only);
        let user =
            graph.attach_root(&node, "the test", perms).unwrap_or_else(|e| panic!("{self:?}: {e}"));
        let base = if let Layout::Window(offset, _) = self.layout { offset } else { 0 };
        Disk::new(*self, base, node, user, graph)
    }
}

/// An open graph.
pub struct Disk {
    pub setup: Setup,
    /// Where byte 0 lies in the image.
    pub base: u64,
    pub node: Arc<Node>,
    _user: RootUser,
    _graph: Arc<Graph>,
}

impl Disk {
    pub fn new(
        setup: Setup,
        base: u64,
        node: Arc<Node>,
        user: RootUser,
        graph: Arc<Graph>,
    ) -> Disk {
        Disk { setup, base, node, _user: user, _graph: graph }
    }

    /// What of a discard takes place: each node drops the ragged ends. Start and end.
    pub fn discarded(&self, at: u64, len: u64) -> Option<(u64, u64)> {
        let (mut node, mut at, mut end, mut shift) = (&self.node, at, at + len, 0);
        loop {
            let limits = node.driver().limits();
            let align = u64::from(limits.discard_align.max(limits.request_align));
            if end != node.len() {
                end -= end % align;
            }
            at = at.next_multiple_of(align);
            if at >= end {
                return None;
            }
            let Some(edge) = node.driver().edges().first() else { break };
            (node, shift) = (&edge.node, self.base);
            (at, end) = (at + shift, end + shift);
        }
        Some((at - shift, end - shift))
    }
}

/// A directory on the file system of the target directory: a disk's, so that direct I/O can be tested.
pub fn directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// An image of `len` bytes: noise, with a hole in the middle and another at the end.
pub fn image(dir: &Path, rng: &mut Rng, len: u64) -> PathBuf {
    let path = dir.join("image");
    let file = std::fs::File::create(&path).unwrap();
    let noise = rng.bytes(usize::try_from(len / 3).unwrap());
    std::os::unix::fs::FileExt::write_all_at(&file, &noise, 0).unwrap();
    let half = &noise[..noise.len() / 2];
    std::os::unix::fs::FileExt::write_all_at(&file, half, len / 2).unwrap();
    file.set_len(len).unwrap();
    path
}

/// A loop device; detached when dropped.
pub struct Loop(pub PathBuf);

impl Loop {
    /// Over `image`, in sectors of so many bytes. The kernel must have loop devices, and it takes root.
    pub fn over(image: &Path, sector: u32) -> Loop {
        let size = sector.to_string();
        let out = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &size])
            .arg(image)
            .output()
            .expect("losetup can be started");
        assert!(out.status.success(), "no loop device: {}", String::from_utf8_lossy(&out.stderr));
        Loop(String::from_utf8(out.stdout).unwrap().trim().into())
    }

    /// The image has another size: so has the device.
    pub fn resize(&self) {
        let done = Command::new("losetup").arg("--set-capacity").arg(&self.0).status();
        assert!(done.expect("losetup can be started").success());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let done = Command::new("losetup").arg("-d").arg(&self.0).status();
        assert!(done.is_ok_and(|s| s.success()) || std::thread::panicking());
    }
}

/// A tmpfs of a few pages; unmounted when dropped.
pub struct TinyTmpfs(pub TempDir);

impl TinyTmpfs {
    pub fn new(size: &str) -> TinyTmpfs {
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path());
        let done = mount.status().expect("mount can be started");
        assert!(done.success(), "mounting a tmpfs needs root");
        TinyTmpfs(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for TinyTmpfs {
    fn drop(&mut self) {
        // A loop device over a file in here goes some time after it was told to: when nobody has it open any more, a
        // child of another test among them.
        let start = Instant::now();
        loop {
            let done = Command::new("umount").arg("-q").arg(self.0.path()).status();
            if done.is_ok_and(|s| s.success()) || std::thread::panicking() {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(20), "the tmpfs is still in use");
            std::thread::yield_now();
        }
    }
}
