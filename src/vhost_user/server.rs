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
use std::time::Instant;

use serde_json::Value;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Device;
use super::hold::{self, Ask, Hold, Suspended, Verdict};
use super::notify::ConfigChange;
use super::parcel::Parcel;
use super::session::Session;
use super::socket::{self, Channel, End, Woken};
use crate::err;
use crate::error::Error;
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
    hold: Arc<Hold>,
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
        let (listener, stream) = match endpoint {
            Endpoint::Listener(listener) => (Some(listener), None),
            Endpoint::Connected(stream) => (None, Some(stream)),
        };
        let work = move |served: &Served| stream.map(|stream| served.serve(stream));
        Server::spawn(listener, (device, name), on_finish, work)
    }

    /// Goes on where a server of another process has paused, whose answer `parcel` is ([`Server::suspend`]); it pauses, too,
    /// until it is told to resume. It takes as many connections as the other would have.
    ///
    /// # Errors
    /// This device cannot go on with that connection; no file descriptors or threads are left.
    pub fn adopt(
        mut parcel: Parcel,
        device: Arc<dyn Device>,
        name: String,
        on_finish: OnFinish,
        deadline: Instant,
    ) -> Result<(Server, Suspended), Error> {
        let listener = parcel.take_if(&parcel.body["listener"].clone())?.map(UnixListener::from);
        let (ask, suspended) = hold::ask();
        let work = move |served: &Served| Some(served.go_on(ask, parcel));
        let server = Server::spawn(listener, (device, name), on_finish, work);
        let server = server.map_err(|e| err!("{e}"))?;
        match suspended.wait(deadline) {
            Ok(_) => Ok((server, suspended)),
            Err(e) => {
                // The thread, which the server's end waits for, waits for a verdict.
                drop(suspended);
                Err(e)
            }
        }
    }

    /// A thread that does `first`, and then accepts front ends.
    fn spawn(
        listener: Option<UnixListener>,
        (device, name): (Arc<dyn Device>, String),
        on_finish: OnFinish,
        first: impl FnOnce(&Served) -> Option<End> + Send + 'static,
    ) -> io::Result<Server> {
        // Another process may share the listener and be faster: `accept` must not wait.
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        let stop = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let config_change = Arc::new(ConfigChange::default());
        let hold = Arc::new(Hold::new(listener)?);
        let served = Served {
            device,
            stop: Arc::clone(&stop),
            config_change: Arc::clone(&config_change),
            hold: Arc::clone(&hold),
            name,
        };
        let thread = thread::Builder::new().name("vhost-user".into()).spawn(move || {
            sandbox::thread(sandbox::Thread::Session);
            let mut end = first(&served);
            if !matches!(end, Some(End::HandedOver))
                && let Some(listener) = &served.hold.listener
            {
                end = Some(served.accept_all(listener));
            }
            drop(served);
            // The successor goes on: nothing has finished.
            if !matches!(end, Some(End::HandedOver)) {
                on_finish();
            }
        })?;
        Ok(Server { stop, config_change, hold, thread: Some(thread) })
    }

    /// Asks the server to pause: when nothing is in flight and it is between two messages of its front end, it answers with all
    /// that [`Server::adopt`] needs in another process. Meanwhile front ends that connect wait.
    ///
    /// # Errors
    /// It has ended.
    pub fn suspend(&self) -> Result<Suspended, Error> {
        if self.is_finished() {
            return Err(err!("its server has ended"));
        }
        self.hold.ask().map_err(|e| err!("{e}"))
    }

    /// Tells front ends of changes of the configuration space.
    pub fn config_change(&self) -> &Arc<ConfigChange> {
        &self.config_change
    }

    /// Whether the thread has ended: the only connection has, or the server was stopped.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends the session, if there is one (a server that pauses must have had its verdict): stops its rings, waiting for requests in flight. Closes the listener. Returns
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
    hold: Arc<Hold>,
    name: String,
}

impl Served {
    fn accept_all(&self, listener: &UnixListener) -> End {
        loop {
            let stream = match self.accept(listener) {
                Ok(stream) => stream,
                Err(end) => return end,
            };
            if let End::HandedOver = self.serve(stream) {
                return End::HandedOver;
            }
        }
    }

    /// The next front end.
    fn accept(&self, listener: &UnixListener) -> Result<UnixStream, End> {
        let mut complained = false;
        loop {
            let events = (&*self.stop, Some(self.hold.event()));
            match socket::wait_or_pause(Some(listener.as_fd()), libc::POLLIN, events, None) {
                Ok(Woken::Stop) => return Err(End::Stopped),
                Ok(Woken::Pause) => {
                    let parcel = self.hold.parcel();
                    let verdict = self.hold.asked().map(|ask| ask.settle(parcel, Verdict::Resume));
                    if verdict == Some(Verdict::End) {
                        return Err(End::HandedOver);
                    }
                    continue;
                }
                Ok(Woken::Ready | Woken::Timeout) => {}
                Err(e) => {
                    log::error!("{}: cannot wait for front ends: {e}", self.name);
                    return Err(End::Io(e));
                }
            }
            let error = match listener.accept() {
                Ok((stream, _)) => return Ok(stream),
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
                return Err(End::Stopped);
            }
        }
    }

    /// Waits a moment; answers whether it is time to stop.
    fn pause(&self) -> bool {
        matches!(socket::wait(None, 0, &self.stop, Some(ACCEPT_RETRY_MS)), Ok(Woken::Stop))
    }

    fn serve(&self, stream: UnixStream) -> End {
        match socket::peer_pid(&stream) {
            Some(pid) => log::info!("{}: front end connected (process {pid})", self.name),
            None => log::info!("{}: front end connected", self.name),
        }
        let mut channel = Channel::new(stream, &self.stop, &self.hold);
        let session = Session::new(&*self.device, &self.name, &self.config_change);
        let end = session.serve(&mut channel);
        log::info!("{}: front end disconnected: {end}", self.name);
        end
    }

    /// Takes over what is in `parcel`, and goes on with it when who asked says so.
    fn go_on(&self, ask: Ask, mut parcel: Parcel) -> End {
        let body = std::mem::take(&mut parcel.body);
        let with = (&*self.device, &*self.name, &*self.config_change);
        let loaded = match &body["session"] {
            Value::Null => Ok(None),
            session => Session::load(with, session, &mut parcel).map(Some),
        };
        let (answer, loaded) = match loaded {
            Ok(loaded) => (Ok(Parcel::default()), loaded),
            Err(e) => (Err(e), None),
        };
        if ask.settle(answer, Verdict::End) == Verdict::End {
            return End::HandedOver;
        }
        let Some((session, stream, ran)) = loaded else { return End::Closed };
        log::info!("{}: goes on with the front end", self.name);
        let mut channel = Channel::new(stream, &self.stop, &self.hold);
        let end = session.go_on(&mut channel, &ran);
        log::info!("{}: front end disconnected: {end}", self.name);
        end
    }
}
