//! Accepts front ends, one at a time, for ever.
//!
//! One thread per export accepts and serves. A second front end that connects meanwhile waits in the listener's backlog,
//! connected but not answered, until the first is gone; nothing it does disturbs the first. Nothing but
//! [`Server::stop`] ends a listening server. There is no idle timeout: QEMU connects when it starts and may say its
//! first word when a device is added, hours later.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Device;
use super::notify::ConfigChange;
use super::session::Session;
use super::socket::{self, Channel, Woken};
use crate::sandbox;

/// How long to wait after an `accept` that failed for want of something (EMFILE, ENOMEM), in milliseconds: long enough
/// not to burn a core, short enough for a front end that retries each 100 ms.
const ACCEPT_RETRY_MS: u16 = 100;

/// Where front ends come from.
pub enum Endpoint {
    /// A listening socket: front ends come and go.
    Listener(UnixListener),
    /// One that is connected already: when it goes, the server has finished.
    Connected(UnixStream),
}

/// Called on the server's thread when it has finished by itself, or been stopped; nothing runs any more then.
pub type OnFinish = Box<dyn FnOnce() + Send>;

/// A running server of one device. Dropping it stops it.
pub struct Server {
    stop: Arc<EventFd>,
    config_change: Arc<ConfigChange>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts to serve `device` at `endpoint`; `name` is the export's, for the log.
    ///
    /// # Errors
    /// If there are no file descriptors or threads left.
    pub fn start(
        endpoint: Endpoint,
        device: Arc<dyn Device>,
        name: String,
        on_finish: OnFinish,
    ) -> io::Result<Server> {
        // Another process may share the listener and be faster: `accept` must not wait.
        if let Endpoint::Listener(listener) = &endpoint {
            listener.set_nonblocking(true)?;
        }
        let stop = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let config_change = Arc::new(ConfigChange::default());
        let served = Served {
            device,
            stop: Arc::clone(&stop),
            config_change: Arc::clone(&config_change),
            name,
        };
        let thread = thread::Builder::new().name("vhost-user".into()).spawn(move || {
            sandbox::thread(sandbox::Thread::Session);
            match endpoint {
                Endpoint::Listener(listener) => served.accept_all(&listener),
                Endpoint::Connected(stream) => served.serve(stream),
            }
            drop(served);
            on_finish();
        })?;
        Ok(Server { stop, config_change, thread: Some(thread) })
    }

    /// Tells front ends of changes of the configuration space.
    pub fn config_change(&self) -> &Arc<ConfigChange> {
        &self.config_change
    }

    /// Whether the thread has ended: the only connection has, or the server was stopped.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends the session, if there is one: stops its rings, waiting for requests in flight. Closes the listener. Returns
    /// when all that is done.
    pub fn stop(mut self) {
        self.stop_and_join();
    }

    fn stop_and_join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if let Err(e) = self.stop.write(1) {
            // Cannot be: the counter is nowhere near its end.
            log::error!("cannot signal the vhost-user thread: {e}");
            return;
        }
        if thread.join().is_err() {
            log::error!("the vhost-user thread has panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop_and_join();
    }
}

/// What the server's thread works with.
struct Served {
    device: Arc<dyn Device>,
    stop: Arc<EventFd>,
    config_change: Arc<ConfigChange>,
    name: String,
}

impl Served {
    fn accept_all(&self, listener: &UnixListener) {
        while let Some(stream) = self.accept(listener) {
            self.serve(stream);
        }
    }

    /// The next front end; `None` when it is time to stop.
    fn accept(&self, listener: &UnixListener) -> Option<UnixStream> {
        let mut complained = false;
        loop {
            match socket::wait(Some(listener.as_fd()), libc::POLLIN, &self.stop, None) {
                Ok(Woken::Stop) => return None,
                Ok(Woken::Ready | Woken::Timeout) => {}
                Err(e) => {
                    log::error!("{}: cannot wait for front ends: {e}", self.name);
                    return None;
                }
            }
            let error = match listener.accept() {
                Ok((stream, _)) => return Some(stream),
                Err(e) => e,
            };
            let fleeting = [libc::EAGAIN, libc::EINTR, libc::ECONNABORTED];
            if error.raw_os_error().is_some_and(|e| fleeting.contains(&e)) {
                continue;
            }
            if !std::mem::replace(&mut complained, true) {
                log::error!("{}: cannot accept a front end, trying again: {error}", self.name);
            }
            if self.pause() {
                return None;
            }
        }
    }

    /// Waits a moment; answers whether it is time to stop.
    fn pause(&self) -> bool {
        matches!(socket::wait(None, 0, &self.stop, Some(ACCEPT_RETRY_MS)), Ok(Woken::Stop))
    }

    fn serve(&self, stream: UnixStream) {
        match socket::peer_pid(&stream) {
            Some(pid) => log::info!("{}: front end connected (process {pid})", self.name),
            None => log::info!("{}: front end connected", self.name),
        }
        let mut channel = Channel::new(stream, &self.stop);
        let session = Session::new(&*self.device, &self.name, &self.config_change);
        let end = session.serve(&mut channel);
        log::info!("{}: front end disconnected: {end}", self.name);
    }
}
