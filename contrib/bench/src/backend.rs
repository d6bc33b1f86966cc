//! Back ends as child processes, started with the same QSD-style command line.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vub_client::sys;

use crate::cases::Case;
use crate::peer::Template;

/// How long a back end may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to end after SIGTERM: what it has not flushed must reach the disk.
const ENDING: Duration = Duration::from_secs(60);
/// Between two tries to connect: what the start-up time is exact to.
const RETRY: Duration = Duration::from_micros(200);

/// A program and how it is started.
#[derive(Clone, Debug)]
pub struct Program {
    /// Name in tables.
    pub label: String,
    /// What to run.
    pub path: PathBuf,
    /// Give the export an iothread of its own.
    pub iothread: bool,
    /// Arguments before all others, options for the export after all others.
    pub extra: (Vec<String>, String),
    /// Started by a command of its own instead.
    pub template: Option<Template>,
    /// Not a program: the host's own loop, in this process.
    pub host: bool,
}

/// A running back end; ended when dropped.
#[derive(Debug)]
pub struct Backend {
    child: Child,
    pid: u32,
    group: bool,
    socket: PathBuf,
    /// From fork to the first connection.
    pub listening: Duration,
    stream: Option<UnixStream>,
}

impl Program {
    /// The host's own loop.
    pub fn host() -> Self {
        Self {
            label: "host".into(),
            path: PathBuf::new(),
            iothread: false,
            extra: (Vec::new(), String::new()),
            template: None,
            host: true,
        }
    }

    /// The command line for a disk: arguments that define node `n`, and the number of queues.
    pub fn arguments(&self, blockdev: &[String], queues: u16, socket: &Path) -> Vec<String> {
        let mut args = self.extra.0.clone();
        if self.iothread {
            args.extend(["--object".into(), "iothread,id=io0".into()]);
        }
        args.extend(blockdev.iter().cloned());
        let iothread = if self.iothread { ",iothread=io0" } else { "" };
        args.extend([
            "--export".into(),
            format!(
                "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={},writable=on,\
                 num-queues={queues}{iothread}{}",
                socket.display(),
                self.extra.1
            ),
        ]);
        args
    }

    /// Whether it can serve a case at all.
    pub fn serves(&self, case: &Case) -> bool {
        self.template.as_ref().is_none_or(|t| t.serves(case))
    }

    /// The command for a case.
    pub fn command(&self, case: &Case, dir: &Path, socket: &Path) -> Command {
        let mut command = match &self.template {
            Some(template) => template.command(case, dir, socket),
            None => self.native(&case.blockdev(dir), case.queues(), socket),
        };
        if case.no_io_uring {
            command.env("VHOST_USER_BLK_NO_IO_URING", "1");
        }
        command
    }

    /// QSD's command line, of a program that takes it.
    pub fn native(&self, blockdev: &[String], queues: u16, socket: &Path) -> Command {
        let mut command = Command::new(&self.path);
        command.args(self.arguments(blockdev, queues, socket));
        command
    }

    /// Starts it with a disk of these arguments and waits until it listens.
    ///
    /// # Errors
    /// When it ends or does not listen; the text holds what it said.
    pub fn start(&self, blockdev: &[String], queues: u16, dir: &Path) -> io::Result<Backend> {
        let socket = self.socket(dir);
        self.spawn(self.native(blockdev, queues, &socket), socket, dir)
    }

    /// The same with the disk of a case.
    ///
    /// # Errors
    /// As `start`.
    pub fn start_case(&self, case: &Case, dir: &Path) -> io::Result<Backend> {
        let socket = self.socket(dir);
        self.spawn(self.command(case, dir, &socket), socket, dir)
    }

    fn socket(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.sock", self.label))
    }

    /// Runs a command that is to listen on `socket`.
    ///
    /// # Errors
    /// As `start`.
    pub fn spawn(&self, mut command: Command, socket: PathBuf, dir: &Path) -> io::Result<Backend> {
        let log = dir.join(format!("{}.log", self.label));
        let _ = std::fs::remove_file(&socket);
        let out = File::create(&log)?;
        let begin = Instant::now();
        sys::end_with_parent(&mut command);
        let group = self.template.is_some();
        if group {
            command.process_group(0);
        }
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .map_err(|e| io::Error::other(format!("{}: {e}", self.path.display())))?;
        let pid = child.id();
        let mut backend =
            Backend { child, pid, group, socket, listening: Duration::ZERO, stream: None };
        loop {
            if let Ok(stream) = UnixStream::connect(&backend.socket) {
                backend.listening = begin.elapsed();
                if self.template.is_some() {
                    // The command may be a script: who listens is who does the work.
                    backend.pid = sys::peer_pid(&stream)?;
                }
                backend.stream = Some(stream);
                return Ok(backend);
            }
            let ended = backend.child.try_wait()?;
            if ended.is_some() || begin.elapsed() > PATIENCE {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                let how = ended.map_or("is still running".into(), |status| status.to_string());
                return Err(io::Error::other(format!(
                    "{} does not listen on {} ({how}; command: {command:?}): {}",
                    self.label,
                    backend.socket.display(),
                    said.trim_end()
                )));
            }
            std::thread::sleep(RETRY);
        }
    }
}

impl Backend {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A connection: the one that showed it listens, or a new one.
    ///
    /// # Errors
    /// The system call's.
    pub fn connect(&mut self) -> io::Result<UnixStream> {
        self.stream.take().map_or_else(|| UnixStream::connect(&self.socket), Ok)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        drop(self.stream.take());
        // A command's whole group: a script need not pass the signal on.
        let end = if self.group { sys::kill_group } else { sys::kill };
        let _ = end(self.child.id(), libc::SIGTERM);
        let begin = Instant::now();
        while begin.elapsed() < ENDING {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
