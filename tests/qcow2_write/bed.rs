//! The program under test on an image, and what QEMU's tools say of the image afterwards.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use vub_client::{Client, Options};

use crate::common::program::Program;
use crate::common::{Engine, LIMIT, eventually};
use crate::tools::Dirs;

/// A number from the environment.
pub fn number(variable: &str, otherwise: u64) -> u64 {
    std::env::var(variable).map_or(otherwise, |n| n.parse().expect("a number"))
}

/// The first seed of all tests.
pub fn seed() -> u64 {
    number("VUB_QCOW2_SEED", 1)
}

/// For QEMU, which these tests are too hard for. It uses a freed cluster anew while other requests still go there, and
/// before the entry that pointed there is cleared on disk: data turns up in other sectors. And it zeroes what it then
/// writes, where some subclusters are allocated: killed in between, neither the old nor the new is there.
pub fn gentle() -> bool {
    std::env::var_os("VUB_QCOW2_GENTLE").is_some()
}

/// How an image is opened.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// `aio` and `cache.direct` of the file.
    pub engine: Engine,
    /// `discard=unmap`.
    pub unmap: bool,
    /// A cache of two slices.
    pub tiny_cache: bool,
}

impl Default for How {
    fn default() -> How {
        let engine = Engine { aio: "threads", direct: false };
        How { engine, unmap: true, tiny_cache: false }
    }
}

/// Starts the program under test with a writable export of four queues.
pub fn start(image: &Path, how: How) -> Program {
    let program = std::env::var_os("VUB_TEST_BACKEND")
        .unwrap_or_else(|| OsString::from(env!("CARGO_BIN_EXE_vhost-user-blk")));
    let cache = json!({"direct": how.engine.direct, "no-flush": false});
    let discard = if how.unmap { "unmap" } else { "ignore" };
    let mut node = json!({
        "driver": "qcow2", "node-name": "root", "discard": discard, "cache": cache,
        "file": {
            "driver": "file", "filename": image, "aio": how.engine.aio, "discard": discard,
            "cache": cache,
        },
    });
    if how.tiny_cache {
        node["l2-cache-size"] = json!(1024);
        node["l2-cache-entry-size"] = json!(512);
    }
    let exports = [("root", ",writable=on,num-queues=4")];
    Program::start_in(&program, &[node.to_string()], &exports, image.parent())
}

/// A guest of `queues` queues.
pub fn connect(program: &Program, queues: u16) -> Client {
    program.connect("root", Options { queues, timeout: LIMIT, ..Options::default() })
}

/// `qemu-img check`: 0 for good, 2 for errors, 3 for leaks only, with what it says. Waits for the locks of a killed
/// program, whose last requests may be in the kernel yet.
pub fn check(dirs: &Dirs, name: &str) -> (i32, String) {
    let mut said = (0, String::new());
    eventually("the image can be checked", || {
        let args = ["check", "-f", "qcow2", name];
        let out = Command::new("qemu-img").args(args).current_dir(dirs.0.path()).output().unwrap();
        let text = [out.stdout, out.stderr].concat();
        said = (out.status.code().unwrap(), String::from_utf8_lossy(&text).into_owned());
        !said.1.contains("Failed to get")
    });
    said
}

/// Fails if the image has errors or leaks.
pub fn assert_clean(dirs: &Dirs, name: &str, context: &str) {
    let (code, text) = check(dirs, name);
    assert_eq!(code, 0, "{context}: {text}");
}

/// `qemu-img info`'s word on the format.
pub fn info(dirs: &Dirs, name: &str) -> Value {
    let text = dirs.run("qemu-img", &["info", "--output=json", "-f", "qcow2", name]);
    let mut info: Value = serde_json::from_str(&text).unwrap();
    info["format-specific"]["data"].take()
}

/// True if the header says that the refcounts cannot be relied on.
pub fn is_dirty(image: &Path) -> bool {
    let mut header = [0; 80];
    let file = std::fs::File::open(image).unwrap();
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut header, 0).unwrap();
    header[7] > 2 && header[79] & 1 != 0
}

/// Reads the whole disk on the first queue.
pub fn read_all(client: &mut Client) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(client.capacity()).unwrap() * 512];
    for (n, chunk) in bytes.chunks_mut(1 << 20).enumerate() {
        client.queue(0).read((n as u64) << 11, chunk).unwrap();
    }
    bytes
}

/// The first sector in which two disks differ.
pub fn assert_same(got: &[u8], want: &[u8], context: &str) {
    assert_eq!(got.len(), want.len(), "{context}: the length");
    let wrong = got.chunks(512).zip(want.chunks(512)).position(|(a, b)| a != b);
    assert_eq!(wrong, None, "{context}: the first sector that is wrong");
}
