//! The program itself, started as users of qemu-storage-daemon start it; what it costs, from `/proc`.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use tempfile::TempDir;
use vub_client::{Client, Options};

use super::{LIMIT, status_line};

/// A running program with one or more exports; killed when it is dropped.
pub struct Program {
    child: Child,
    dir: TempDir,
}

impl Program {
    /// Starts it: `nodes` are the values of `--blockdev`, and each pair of `exports` a node to export and more of the
    /// export's options.
    pub fn start(nodes: &[String], exports: &[(&str, &str)]) -> Program {
        Program::start_other(env!("CARGO_BIN_EXE_vhost-user-blk").as_ref(), nodes, exports)
    }

    /// The same with any program that has this command line.
    pub fn start_other(program: &OsStr, nodes: &[String], exports: &[(&str, &str)]) -> Program {
        Program::start_in(program, nodes, exports, None)
    }

    /// The same with what outlives it in `state`.
    pub fn start_in(
        program: &OsStr,
        nodes: &[String],
        exports: &[(&str, &str)],
        state: Option<&Path>,
    ) -> Program {
        Program::run(Command::new(program), nodes, exports, state)
    }

    /// Starts ours, and has what it logs from `level` on written to `log`.
    pub fn start_logging(
        nodes: &[String],
        exports: &[(&str, &str)],
        (level, log): (&str, File),
    ) -> Program {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
        command.args(["--log-level", level]).stderr(log);
        Program::run(command, nodes, exports, None)
    }

    /// The same with a program that something has been done to.
    pub fn run(
        mut command: Command,
        nodes: &[String],
        exports: &[(&str, &str)],
        state: Option<&Path>,
    ) -> Program {
        let dir = tempfile::tempdir().unwrap();
        command.env("XDG_RUNTIME_DIR", state.unwrap_or(dir.path()));
        for node in nodes {
            command.args(["--blockdev", node]);
        }
        for (node, more) in exports {
            let path = dir.path().join(node);
            let path = path.display();
            command.arg("--export").arg(format!(
                "type=vhost-user-blk,id=e-{node},node-name={node},addr.type=unix,addr.path={path}{more}"
            ));
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        Program { child, dir }
    }

    /// Journals of qcow2 images, unless they are kept elsewhere.
    #[allow(dead_code, reason = "not all tests need it")]
    pub fn journals(&self) -> usize {
        let entries = std::fs::read_dir(self.dir.path().join("vhost-user-blk")).unwrap();
        let journal = |path: PathBuf| path.extension().is_some_and(|e| e == "journal");
        entries.filter(|entry| journal(entry.as_ref().unwrap().path())).count()
    }

    /// The socket of a node's export.
    pub fn path(&self, node: &str) -> PathBuf {
        self.dir.path().join(node)
    }

    /// A guest on a node's export; waits until the program listens.
    pub fn connect(&self, node: &str, options: Options) -> Client {
        Client::connect_retry(self.path(node), options).unwrap()
    }

    /// Its process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its directory in `/proc`.
    pub fn proc(&self) -> PathBuf {
        Path::new("/proc").join(self.child.id().to_string())
    }

    /// Open descriptors, threads, and resident memory in KiB.
    pub fn resources(&self) -> [u64; 3] {
        let fds = std::fs::read_dir(self.proc().join("fd")).unwrap().count() as u64;
        let status = self.proc().join("status");
        [fds, status_line(&status, "Threads"), status_line(&status, "VmRSS")]
    }

    /// For every thread: its name, how often it went to sleep, and the nanoseconds that it has run.
    pub fn threads(&self) -> Vec<(String, u64, u64)> {
        let read = |p: PathBuf| std::fs::read_to_string(p).unwrap();
        let tasks = std::fs::read_dir(self.proc().join("task")).unwrap();
        let one = |task: PathBuf| {
            let ran = read(task.join("schedstat")).split(' ').next().unwrap().parse().unwrap();
            let slept = status_line(&task.join("status"), "voluntary_ctxt_switches");
            (read(task.join("comm")).trim().to_owned(), slept, ran)
        };
        let mut all: Vec<_> = tasks.map(|t| one(t.unwrap().path())).collect();
        all.sort();
        all
    }

    /// Asks it to end, and waits until it has.
    pub fn terminate(mut self) -> ExitStatus {
        vub_client::sys::kill(self.child.id(), libc::SIGTERM).unwrap();
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < LIMIT, "it does not end");
            std::thread::yield_now();
        }
    }

    /// Ends it in the middle of whatever it does, and waits until it is gone.
    pub fn kill(self) {}

    /// Fails if it has ended.
    pub fn assert_alive(&mut self) {
        assert_eq!(self.child.try_wait().unwrap(), None, "the program has ended");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended; then there is nobody to kill.
        self.child.kill().unwrap_or_default();
        self.child.wait().unwrap();
    }
}
