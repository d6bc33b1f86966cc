//! Back ends as child processes, started with the same QSD-style command line.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vub_client::sys;

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
}

/// A running back end; ended when dropped.
#[derive(Debug)]
pub struct Backend {
    child: Child,
    socket: PathBuf,
    /// From fork to the first connection.
    pub listening: Duration,
    stream: Option<UnixStream>,
}

impl Program {
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

    /// Starts it and waits until it listens.
    ///
    /// # Errors
    /// When it ends or does not listen; the text holds what it said.
    pub fn start(&self, blockdev: &[String], queues: u16, dir: &Path) -> io::Result<Backend> {
        let socket = dir.join(format!("{}.sock", self.label));
        let log = dir.join(format!("{}.log", self.label));
        let _ = std::fs::remove_file(&socket);
        let out = File::create(&log)?;
        let begin = Instant::now();
        let mut command = Command::new(&self.path);
        sys::end_with_parent(&mut command);
        let child = command
            .args(self.arguments(blockdev, queues, &socket))
            .stdin(Stdio::null())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .map_err(|e| io::Error::other(format!("{}: {e}", self.path.display())))?;
        let mut backend = Backend { child, socket, listening: Duration::ZERO, stream: None };
        loop {
            if let Ok(stream) = UnixStream::connect(&backend.socket) {
                backend.listening = begin.elapsed();
                backend.stream = Some(stream);
                return Ok(backend);
            }
            if backend.child.try_wait()?.is_some() || begin.elapsed() > PATIENCE {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                return Err(io::Error::other(format!("{} does not listen: {said}", self.label)));
            }
            std::thread::sleep(RETRY);
        }
    }
}

impl Backend {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
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
        let _ = sys::kill(self.child.id(), libc::SIGTERM);
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
