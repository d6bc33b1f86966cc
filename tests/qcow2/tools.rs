//! Images, QEMU's tools, our graph.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use serde_json::{Value, json};
use vhost_user_blk::block::perm::Perms;
use vhost_user_blk::block::{Dir, Graph, Map, Node, Op, RootUser};
use vhost_user_blk::error::{Errno, Result};
use vhost_user_blk::mem::{IoVec, Sg};
use vhost_user_blk::rt::{self, WaitKind};

/// A directory of images.
pub struct Dirs(pub tempfile::TempDir);

impl Dirs {
    pub fn new() -> Dirs {
        Dirs(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a tool in the directory; its output if it succeeds, its error text if not.
    pub fn try_run(&self, tool: &str, args: &[&str]) -> std::result::Result<String, String> {
        let out = Command::new(tool).args(args).current_dir(self.0.path()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        if out.status.success() { Ok(text(out.stdout)) } else { Err(text(out.stderr)) }
    }

    pub fn run(&self, tool: &str, args: &[&str]) -> String {
        self.try_run(tool, args).unwrap_or_else(|e| panic!("{tool} {args:?}: {e}"))
    }

    /// `qemu-img create -f qcow2`.
    pub fn create(&self, name: &str, options: &str, more: &[&str]) {
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend(more.iter().take(more.len() - 1));
        args.extend([name, more[more.len() - 1]]);
        self.run("qemu-img", &args);
    }

    /// `qemu-io -c COMMAND...`.
    pub fn io(&self, name: &str, commands: &[String]) {
        let mut args = vec!["-f", "qcow2"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(name);
        let out = self.run("qemu-io", &args);
        assert!(!out.contains("failed"), "{commands:?}: {out}");
    }

    /// The image as QEMU reads it.
    pub fn expected(&self, name: &str) -> Vec<u8> {
        self.run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", name, "expected.raw"]);
        std::fs::read(self.path("expected.raw")).unwrap()
    }
}

/// An image open through our graph. Fields in the order in which they must go.
pub struct Open {
    pub user: RootUser,
    pub graph: Arc<Graph>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.graph.close();
    }
}

pub fn options(path: &Path, more: Value) -> serde_json::Map<String, Value> {
    let mut options = json!({
        "driver": "qcow2", "node-name": "top", "read-only": true,
        "file": { "driver": "file", "filename": path },
    });
    let (Value::Object(all), Value::Object(mut more)) = (options.take(), more) else {
        panic!("options are objects")
    };
    let mut all = all;
    all.append(&mut more);
    all
}

pub fn open(path: &Path, more: Value) -> Result<Open> {
    let graph = Graph::new();
    let node = graph.add(options(path, more))?;
    let user = graph.attach_root(&node, "the test", Perms::device(false))?;
    Ok(Open { user, graph })
}

impl Open {
    pub fn node(&self) -> &Node {
        self.user.node()
    }

    /// Reads into `parts` ranges of memory.
    pub async fn read(
        &self,
        offset: u64,
        len: usize,
        parts: usize,
    ) -> std::result::Result<Vec<u8>, Errno> {
        read(self.node(), offset, len, parts).await
    }
}

pub async fn read(
    node: &Node,
    offset: u64,
    len: usize,
    parts: usize,
) -> std::result::Result<Vec<u8>, Errno> {
    let mut bytes = vec![0xa5; len];
    let piece = len.div_ceil(parts).max(1);
    // SAFETY: the bytes outlive the request.
    let iov: Vec<IoVec> =
        bytes.chunks_mut(piece).map(|c| unsafe { IoVec::new(c.as_mut_ptr(), c.len()) }).collect();
    node.submit(Op::Read { offset, to: Sg::new(&iov) }).await?;
    Ok(bytes)
}

/// A small random number generator: the same numbers for the same seed.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n.max(1)
    }
}

/// Reads all of the image, then at random places, and compares; afterwards the fast lane, too.
pub fn compare(open: &Open, want: &[u8], kind: WaitKind, seed: u64) {
    let node = open.node();
    assert_eq!(node.len(), want.len() as u64);
    let mut random = Random(seed);
    rt::block_on_with(kind, async {
        for _ in 0..60 {
            let offset = random.below(want.len() as u64) as usize;
            let most = if random.below(4) == 0 { 3 << 20 } else { 20_000 };
            let mut len = 1 + random.below(most) as usize;
            let mut from = offset;
            if random.below(2) == 0 {
                (from, len) = (from / 512 * 512, len.next_multiple_of(512));
            }
            let len = len.min(want.len() - from);
            let parts = 1 + random.below(5) as usize;
            let got = open.read(from as u64, len, parts).await.unwrap();
            assert!(got == want[from..from + len], "{len} bytes at {from}");
        }
        for (n, chunk) in want.chunks(1 << 20).enumerate() {
            let offset = (n as u64) << 20;
            let got = open.read(offset, chunk.len(), 1).await.unwrap();
            assert!(got == chunk, "the megabyte at {offset}");
        }
    });
    for _ in 0..200 {
        let offset = random.below(want.len() as u64 / 512) * 512;
        let len = (512 + random.below(16384)) as usize;
        let len = len.min(want.len() - offset as usize);
        check_fast(node, offset, &want[offset as usize..][..len]);
    }
}

/// If the fast lane says where the range is, it is right.
fn check_fast(node: &Node, offset: u64, want: &[u8]) {
    match node.locate(Dir::Read, offset, want.len() as u64).map {
        Map::Zero => assert!(want.iter().all(|b| *b == 0), "not zero at {offset}"),
        Map::File { file, offset: at } => {
            let path = format!("/proc/self/fd/{}", file.fd());
            let file = std::fs::File::open(path).unwrap();
            let mut got = vec![0; want.len()];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut got, at).unwrap();
            assert!(got == want, "fast lane at {offset}");
        }
        _ => {}
    }
}
