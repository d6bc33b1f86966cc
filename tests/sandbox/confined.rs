//! The program in the sandbox, and a guest's work with it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use serde_json::json;
use tempfile::TempDir;
use vub_client::{Client, Options};

use crate::common::{Engine, Random};

/// What may be left where locked memory is limited: CAP_IPC_LOCK.
const IPC_LOCK: u64 = 1 << 14;

/// The program in the sandbox, with a directory of its own.
pub struct Confined {
    pub child: Child,
    pub dir: TempDir,
    log: PathBuf,
}

impl Confined {
    /// Serves each of `nodes` (`--blockdev`'s value and the name to export) at a socket with its name.
    pub fn start(
        nodes: &[(serde_json::Value, &str)],
        more: &[&str],
        env: &[(&str, &str)],
    ) -> Confined {
        let dir = tempfile::tempdir().unwrap();
        let program = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
        Confined::start_as(program, dir, nodes, "writable=on", more, env)
    }

    /// The same with `command`, whose sockets, log and pidfile are in `dir`. The exports have `options`.
    pub fn start_as(
        mut command: Command,
        dir: TempDir,
        nodes: &[(serde_json::Value, &str)],
        options: &str,
        more: &[&str],
        env: &[(&str, &str)],
    ) -> Confined {
        let log = dir.path().join("log");
        for (node, name) in nodes {
            command.arg("--blockdev").arg(node.to_string());
            let path = dir.path().join(name);
            command.arg("--export").arg(format!(
                "vhost-user-blk,id=e-{name},node-name={name},{options},addr.type=unix,addr.path={}",
                path.display()
            ));
        }
        let pidfile = format!("--pidfile={}", dir.path().join("pid").display());
        command.args(more).arg(pidfile).envs(env.iter().copied());
        command.env_remove("RUST_LOG").stderr(File::create(&log).unwrap());
        Confined { child: command.spawn().unwrap(), dir, log }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn connect(&self, name: &str, options: Options) -> Client {
        Client::connect_retry(self.path(name), options)
            .unwrap_or_else(|e| panic!("{e}: {}", self.log()))
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The threads of the process (`pid`, or that which was started), each checked but for the sets of capabilities in
    /// `unchecked`: names and number of filters.
    pub fn threads(&self, pid: Option<u32>, unchecked: &[&str]) -> Vec<(String, u64)> {
        let task = format!("/proc/{}/task", pid.unwrap_or(self.child.id()));
        let mut all = Vec::new();
        let limits = fs::read_to_string(Path::new(&task).join("../limits")).unwrap();
        let lock = limits.lines().find(|l| l.starts_with("Max locked memory")).unwrap();
        let limited = !lock.contains("unlimited");
        for task in fs::read_dir(task).unwrap() {
            let task = task.unwrap().path();
            // One that ends while we look was as the others.
            let Ok(name) = fs::read_to_string(task.join("comm")) else { continue };
            let Ok(status) = fs::read_to_string(task.join("status")) else { continue };
            let line = |key: &str| {
                let line = status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
                line.unwrap().trim().to_owned()
            };
            let sets = ["CapEff", "CapPrm", "CapInh", "CapAmb", "CapBnd"];
            for set in sets.into_iter().filter(|set| !unchecked.contains(set)) {
                let bits = u64::from_str_radix(&line(set), 16).unwrap();
                let may = if limited && ["CapEff", "CapPrm"].contains(&set) { IPC_LOCK } else { 0 };
                assert_eq!(bits & !may, 0, "{set} of {name}");
            }
            assert_eq!((line("NoNewPrivs"), line("Seccomp")), ("1".into(), "2".into()), "{name}");
            all.push((name.trim().to_owned(), line("Seccomp_filters").parse().unwrap()));
        }
        all
    }

    /// Ends it as an operator does: all is well, and nothing is left.
    pub fn end(mut self) {
        vub_client::sys::kill(self.child.id(), libc::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success(), "{}", self.log());
        assert_eq!(self.log(), "", "nothing was refused");
        let left: Vec<_> =
            fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["log"]);
    }
}

impl Drop for Confined {
    fn drop(&mut self) {
        // It may have ended.
        self.child.kill().unwrap_or_default();
        self.child.wait().unwrap();
    }
}

/// Everything that a guest does with a disk of 8 MiB.
pub fn exercise(client: &mut Client, random: &mut Random) {
    let data = random.bytes(256 << 10);
    let q = client.queue(0);
    q.write(16, &data).unwrap();
    q.write(3, &data[..512]).unwrap();
    q.flush().unwrap();
    let mut back = vec![0; data.len()];
    q.read(16, &mut back).unwrap();
    assert!(back == data);
    q.discard(16, 128).unwrap();
    q.write_zeroes(256, 128, false).unwrap();
    q.write_zeroes(256, 128, true).unwrap();
    q.read(256, &mut back[..65536]).unwrap();
    assert!(back[..65536].iter().all(|b| *b == 0));
    // Many at once: as many threads as there are engines for.
    let requests: Vec<_> =
        (0..32).map(|n| q.write_request(1024 + n * 8, &data[..4096]).unwrap()).collect();
    for request in requests {
        q.submit(request).unwrap();
    }
    q.wait_all().unwrap();
    q.flush().unwrap();
}

/// With `root` over `image`, in format `driver`.
pub fn node(image: &Path, driver: &str, Engine { aio, direct }: Engine) -> serde_json::Value {
    let cache = json!({"direct": direct});
    json!({"driver": driver, "node-name": "root", "discard": "unmap", "cache": cache,
        "file": {"driver": "file", "filename": image, "aio": aio, "discard": "unmap", "cache": cache}})
}
