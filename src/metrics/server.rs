//! The socket at which metrics are served, by a thread of its own that waits for nobody.
//!
//! Whoever may connect may be slow, silent or hostile: a connection has a time limit for all it does, a request a length, and
//! there are only so many connections; one more ends the oldest. Nothing is shared with the data plane but counters, which
//! are read without a lock, and the registry's list.
#![forbid(unsafe_code)]

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::http::{self, REQUEST_MAX, Step};
use super::registry::Registry;
use super::text;
use crate::sandbox::{self, Thread};
use crate::sys;

/// Connections at once. Prometheus needs one, people another.
const CONNECTIONS_MAX: usize = 16;
/// For how long a connection may be there: an answer takes milliseconds, a scraper's patience is ten seconds by default.
const LIMIT: Duration = Duration::from_secs(5);
/// After an error of `accept` (no descriptors left), so long nobody else is accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// A listening socket.
#[derive(Debug)]
pub enum Listener {
    /// At a path.
    Unix(UnixListener),
    /// At a port of the loopback interface.
    Tcp(TcpListener),
}

/// A stream of either kind.
trait Stream: Read + Write + AsFd + Send {}
impl Stream for UnixStream {}
impl Stream for TcpStream {}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix(listener) => listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Listener {
    /// The socket `fd`, at a path if `unix`.
    pub fn from_fd(fd: OwnedFd, unix: bool) -> Listener {
        if unix { Listener::Unix(fd.into()) } else { Listener::Tcp(fd.into()) }
    }

    /// Serves what `registry` shows, in a thread that ends with the process.
    ///
    /// # Errors
    /// No descriptors or threads are left.
    pub fn serve(&self, registry: &Arc<Registry>) -> io::Result<()> {
        sys::set_nonblocking(self.as_fd())?;
        let ours = self.as_fd().try_clone_to_owned()?;
        let listener = Listener::from_fd(ours, matches!(self, Listener::Unix(_)));
        let mut server =
            Server { listener, registry: Arc::clone(registry), connections: Vec::new() };
        std::thread::Builder::new().name("metrics".into()).spawn(move || {
            sandbox::thread(Thread::Metrics);
            loop {
                server.turn();
            }
        })?;
        Ok(())
    }

    fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Box::new(stream)
            }
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Box::new(stream)
            }
        })
    }
}

struct Server {
    listener: Listener,
    registry: Arc<Registry>,
    /// The oldest first.
    connections: Vec<Connection>,
}

/// What a client has said, or what it is told.
struct Connection {
    stream: Box<dyn Stream>,
    deadline: Instant,
    input: Vec<u8>,
    output: Vec<u8>,
    written: usize,
}

impl Server {
    /// Waits until something can be done, and does it.
    fn turn(&mut self) {
        let mut sources = vec![(self.listener.as_fd(), false)];
        sources.extend(self.connections.iter().map(|c| (c.stream.as_fd(), c.is_answered())));
        let first = self.connections.first().map(|c| c.deadline);
        if let Err(e) = sys::wait_ready(&sources, first) {
            log::warn!("metrics: {e}");
            std::thread::sleep(PAUSE);
        }
        let now = Instant::now();
        let registry = &self.registry;
        self.connections.retain_mut(|c| now < c.deadline && c.go_on(registry));
        // As many as there may be at once: the others are looked at in between.
        for _ in 0..CONNECTIONS_MAX {
            match self.listener.accept() {
                Ok(stream) => self.add(stream, now + LIMIT),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // Gone before it was accepted.
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    log::warn!("metrics: {e}");
                    std::thread::sleep(PAUSE);
                    break;
                }
            }
        }
    }

    /// Most have said what they want by now, and are done with at once.
    fn add(&mut self, stream: Box<dyn Stream>, deadline: Instant) {
        let (input, output) = (Vec::new(), Vec::new());
        let mut new = Connection { stream, deadline, input, output, written: 0 };
        if new.go_on(&self.registry) {
            if self.connections.len() == CONNECTIONS_MAX {
                self.connections.remove(0);
            }
            self.connections.push(new);
        }
    }
}

impl Connection {
    fn is_answered(&self) -> bool {
        !self.output.is_empty()
    }

    /// Reads and writes what can be without waiting. Whether there is more to do.
    fn go_on(&mut self, registry: &Registry) -> bool {
        while !self.is_answered() {
            let mut bytes = [0; 1024];
            let room = (REQUEST_MAX - self.input.len()).min(bytes.len());
            match self.stream.read(&mut bytes[..room]) {
                Ok(0) => return false,
                Ok(n) => self.input.extend_from_slice(&bytes[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) => return e.kind() == ErrorKind::WouldBlock,
            }
            self.output = match http::look(&self.input) {
                Step::More => continue,
                Step::Metrics(with_body) => http::answer(&text::render(registry), with_body),
                Step::Refuse(status) => http::refuse(status),
            };
        }
        while self.written < self.output.len() {
            match self.stream.write(&self.output[self.written..]) {
                Ok(0) => return false,
                Ok(n) => self.written += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return e.kind() == ErrorKind::WouldBlock,
            }
        }
        false
    }
}
