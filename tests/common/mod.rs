//! The device in this process: a graph, an export, a server on a socket in a directory of its own.
//!
//! [`Disk`] takes everything down in order when it is dropped; nothing here sleeps, every wait has a limit.
#![allow(dead_code, reason = "each test program uses its part")]

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_user_blk::block::{Graph, Node, Opener};
use vhost_user_blk::export::{Export, ExportConfig};
use vhost_user_blk::vhost_user::{Endpoint, Server};
use vub_client::{Client, Options};

pub mod probe;
pub mod program;

/// Limit of every wait of this side.
pub const LIMIT: Duration = Duration::from_secs(20);
/// How long "nothing happens" is looked at.
pub const SILENCE: Duration = Duration::from_millis(40);
/// One megabyte.
pub const MIB: u64 = 1 << 20;

/// What an export is like unless a test says otherwise.
pub fn config() -> ExportConfig {
    ExportConfig {
        id: "disk0".into(),
        writable: true,
        writethrough: false,
        num_queues: 4,
        queue_size: 1024,
        logical_block_size: 512,
        serial: "a-serial".into(),
        threads: 4,
        poll_max_ns: 32_768,
        on_error: Default::default(),
    }
}

/// How a file is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Engine {
    /// `aio=`
    pub aio: &'static str,
    /// `cache.direct=`
    pub direct: bool,
}

/// All ways to serve a file.
pub const ENGINES: [Engine; 4] = [
    Engine { aio: "threads", direct: false },
    Engine { aio: "native", direct: true },
    Engine { aio: "io_uring", direct: false },
    Engine { aio: "io_uring", direct: true },
];

/// A served disk.
pub struct Disk {
    /// The export.
    pub export: Arc<Export>,
    /// Its root.
    pub node: Arc<Node>,
    /// The graph.
    pub graph: Arc<Graph>,
    server: Option<Server>,
    dir: TempDir,
}

impl Disk {
    /// Serves the node `root` of `graph`.
    pub fn serve(graph: Arc<Graph>, root: &str, config: ExportConfig) -> Disk {
        let node = graph.find(root).expect("the node is there");
        let export = Export::new(&graph, &node, config).unwrap();
        Disk::listen(graph, node, export)
    }

    /// Serves a node made from `options`, which is open only while rings run.
    pub fn auto(options: Value, config: ExportConfig) -> Disk {
        let node = add(&Graph::new(), options.clone());
        let Value::Object(options) = options else { panic!("options are an object") };
        let graph = Graph::new();
        let opener = Opener::new(&graph, vec![options], node.name());
        let export = Export::inactive(opener, &node, config, true);
        Disk::listen(graph, node, export)
    }

    fn listen(graph: Arc<Graph>, node: Arc<Node>, export: Arc<Export>) -> Disk {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let name = export.id().to_owned();
        let server =
            Server::start(Endpoint::Listener(listener), export.clone(), name, Box::new(|| ()));
        Disk { export, node, graph, server: Some(server.unwrap()), dir }
    }

    /// Serves one node made from `options`, which must call it `root`.
    pub fn of(options: Value, config: ExportConfig) -> Disk {
        let graph = Graph::new();
        add(&graph, options);
        Disk::serve(graph, "root", config)
    }

    /// Serves a null disk of `size` bytes.
    pub fn null(size: u64, config: ExportConfig) -> Disk {
        Disk::of(
            json!({"driver": "null-co", "node-name": "root", "size": size, "read-zeroes": true}),
            config,
        )
    }

    /// The socket.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    /// A guest, running.
    pub fn connect(&self, options: Options) -> Client {
        Client::connect_retry(self.path(), options).unwrap()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(self.server.take());
        self.export.close();
        self.graph.close();
    }
}

/// Adds a node to a graph.
pub fn add(graph: &Arc<Graph>, options: Value) -> Arc<Node> {
    let Value::Object(options) = options else { panic!("options are an object") };
    graph.add(options).unwrap_or_else(|e| panic!("{e}"))
}

/// A file of zeroes, beside the sources' build: a real file system, with O_DIRECT and holes.
pub struct Image {
    dir: TempDir,
}

impl Image {
    /// A sparse file of `size` bytes.
    pub fn new(size: u64) -> Image {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        std::fs::File::create(dir.path().join("image")).unwrap().set_len(size).unwrap();
        Image { dir }
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// Bytes that it occupies.
    pub fn allocated(&self) -> u64 {
        std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(self.path()).unwrap()) * 512
    }

    /// The blockdev options of a raw node `root` on it.
    pub fn options(&self, engine: Engine, discard: &str) -> Value {
        let cache = json!({"direct": engine.direct, "no-flush": false});
        json!({
            "driver": "raw", "node-name": "root", "discard": discard, "cache": cache,
            "file": {
                "driver": "file", "filename": self.path(), "aio": engine.aio,
                "discard": discard, "cache": cache,
            },
        })
    }
}

/// A served file.
pub struct FileDisk {
    /// The disk.
    pub disk: Disk,
    /// The file.
    pub image: Image,
}

impl FileDisk {
    /// A file of `size` bytes behind `engine`.
    pub fn new(size: u64, engine: Engine, config: ExportConfig) -> FileDisk {
        let image = Image::new(size);
        let disk = Disk::of(image.options(engine, "unmap"), config);
        FileDisk { disk, image }
    }
}

/// Waits until `done` holds, looking all the time: for what other threads do soon.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "not in time: {what}");
        std::thread::yield_now();
    }
}

/// Small guests: little memory, else as usual.
pub fn small() -> Options {
    Options { mem_size: 8 << 20, timeout: LIMIT, ..Options::default() }
}

/// Runs tests of this very program in a process of their own, with `env`; `args` as on the command line.
pub fn rerun(args: &[&str], env: &[(&str, &str)]) -> String {
    let exe = std::env::current_exe().unwrap();
    let mut command = std::process::Command::new("timeout");
    command.arg("80").arg(exe).args(args).envs(env.iter().copied());
    let out = command.output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{args:?} {env:?}: {:?}\n{text}\n{errors}", out.status);
    text
}

/// The value of a line of `/proc/.../status`.
pub fn status_line(path: &Path, key: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix(key)).expect("the line is there");
    line.trim_start_matches(':').split_whitespace().next().unwrap().parse().unwrap()
}

/// Numbers that are the same in each run.
pub struct Random(pub u64);

impl Random {
    /// The next one (splitmix64).
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// So many bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}
