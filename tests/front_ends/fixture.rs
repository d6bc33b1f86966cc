//! A server over a mock device, in a directory of its own.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, mpsc};

use tempfile::TempDir;
use vhost_user_blk::vhost_user::{Endpoint, Server};

use crate::client::Client;
use crate::mock::{Mock, PATIENCE};

/// Tests that count this process's descriptors run alone.
pub static ALONE: RwLock<()> = RwLock::new(());

pub struct Fixture {
    pub device: Arc<Mock>,
    pub server: Option<Server>,
    pub finished: mpsc::Receiver<()>,
    dir: TempDir,
    _shared: Option<RwLockReadGuard<'static, ()>>,
}

impl Fixture {
    /// A server of a device with 2 queues.
    pub fn new() -> Fixture {
        Fixture::with_queues(2)
    }

    pub fn with_queues(queues: u16) -> Fixture {
        let shared = ALONE.read().unwrap_or_else(PoisonError::into_inner);
        Fixture::make(queues, Some(shared))
    }

    /// For a test that holds [`ALONE`] itself.
    pub fn alone() -> Fixture {
        Fixture::make(2, None)
    }

    fn make(queues: u16, shared: Option<RwLockReadGuard<'static, ()>>) -> Fixture {
        let dir = TempDir::new().unwrap();
        let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
        let device = Arc::new(Mock::new(queues));
        let (server, finished) = serve(Endpoint::Listener(listener), &device);
        Fixture { device, server: Some(server), finished, dir, _shared: shared }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub fn connect(&self) -> Client {
        Client::connect(&self.path())
    }

    /// Stops the server, checks that it did.
    pub fn stop(&mut self) {
        self.server.take().unwrap().stop();
        self.finished.recv_timeout(PATIENCE).unwrap();
    }
}

pub fn serve(endpoint: Endpoint, device: &Arc<Mock>) -> (Server, mpsc::Receiver<()>) {
    let (done, finished) = mpsc::channel();
    let on_finish = Box::new(move || done.send(()).unwrap_or(()));
    let server = Server::start(endpoint, Arc::clone(device) as _, "test".into(), on_finish);
    (server.unwrap(), finished)
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.device.set_busy(false);
        drop(self.server.take());
        if !std::thread::panicking() {
            assert_eq!(self.device.violations(), Vec::<String>::new());
            assert_eq!(self.device.running(), 0);
        }
    }
}
