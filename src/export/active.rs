//! An export's nodes, closed and opened anew while no queue runs: what another process on the same image needs.
//!
//! *Active*: the root is open and used, locks are held. *Inactive*: nothing of the image is here but its size. With
//! `activate=auto` the first ring that starts activates, and the session's "no ring runs" deactivates; else only who
//! calls [`Export::activate`] and [`Export::deactivate`] does. Who closes all nodes of the graph at once takes an export's use of
//! its root ([`Export::let_go`]) and gives it back ([`Export::take_up`]). Lock: `turn`, held over a whole change; then `state`, for moments.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use super::{Export, lock};
use crate::block::graph::RootUser;
use crate::block::perm::{Perm, Perms};
use crate::block::{Graph, Node, Opener};
use crate::err;
use crate::error::{Errno, Result};
use crate::vhost_user::ConfigChange;

/// How an export's nodes come and go.
pub(super) struct Activation {
    opener: Opener,
    auto: bool,
    /// Deactivation was tried since a ring ran last: a failure is not repeated with every message.
    tried: AtomicBool,
    pub(super) turn: Mutex<()>,
    /// Who hears of another size.
    pub(super) config_change: OnceLock<Arc<ConfigChange>>,
}

impl Activation {
    pub(super) fn new(opener: Opener, auto: bool) -> Activation {
        let (tried, turn, config_change) = (AtomicBool::new(true), Mutex::new(()), OnceLock::new());
        Activation { opener, auto, tried, turn, config_change }
    }

    pub(super) fn graph(&self) -> &Arc<Graph> {
        self.opener.graph()
    }
}

/// Uses `node` for an export that is `writable` in units of `block` bytes.
///
/// # Errors
/// In QEMU's words.
pub(super) fn attach(
    graph: &Graph,
    node: &Arc<Node>,
    writable: bool,
    block: u32,
) -> Result<RootUser> {
    if writable && node.read_only() {
        return Err(err!("Cannot export read-only node as writable"));
    }
    let mut used = Perm::CONSISTENT_READ;
    used.set(Perm::WRITE, writable);
    let user =
        graph.attach_root(node, "an unnamed block device", Perms { used, shared: Perm::all() })?;
    node.expect_ragged_writes(block);
    Ok(user)
}

impl Export {
    /// The root, if the export is active.
    pub(super) fn root(&self) -> Option<Arc<Node>> {
        lock(&self.state).user.as_ref().map(|user| Arc::clone(user.node()))
    }

    /// Whether its nodes are open.
    pub fn is_active(&self) -> bool {
        lock(&self.state).user.is_some()
    }

    /// The root for a queue that is to run: with `activate=auto`, it is opened for that. The caller has the `turn` until the queue
    /// runs: nobody closes the root in between.
    pub(super) fn root_to_run(&self) -> std::result::Result<Arc<Node>, Errno> {
        if lock(&self.state).closed {
            return Err(Errno::EIO);
        }
        self.activation.tried.store(false, Ordering::Relaxed);
        if self.activation.auto
            && let Err(e) = self.open_root()
        {
            let hint = e.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
            log::error!("export '{}': cannot be activated: {e}{hint}", self.id());
            return Err(Errno(libc::EBUSY));
        }
        self.root().ok_or_else(|| {
            log::error!("export '{}': inactive; activate=auto would activate it", self.id());
            Errno(libc::EBUSY)
        })
    }

    /// Opens the nodes: takes locks, reads all metadata anew, learns the size. Does nothing if the export is active.
    ///
    /// # Errors
    /// In QEMU's words. It stays inactive.
    pub fn activate(&self) -> Result<()> {
        let _turn = lock(&self.activation.turn);
        self.open_root()
    }

    /// [`Export::activate`], for who has the `turn`.
    fn open_root(&self) -> Result<()> {
        if self.is_active() {
            return Ok(());
        }
        let start = Instant::now();
        let opener = &self.activation.opener;
        let root = opener.open()?;
        if let Err(e) = self.use_root(&root) {
            opener.give_up(root);
            return Err(e);
        }
        log::info!("export '{}': active after {:.1} ms", self.id(), ms(start));
        Ok(())
    }

    /// Begins to use `root`, which is open; learns the size.
    fn use_root(&self, root: &Arc<Node>) -> Result<()> {
        let geometry = &self.shared.geometry;
        let graph = self.activation.graph();
        let user = attach(graph, root, !geometry.read_only, geometry.logical_block)?;
        lock(&self.state).user = Some(user);
        self.set_len(root.len());
        Ok(())
    }

    /// Whether its nodes come and go with its rings (`activate=auto`).
    pub fn is_auto(&self) -> bool {
        self.activation.auto
    }

    /// Gives its use of the root away, flushed: for who closes all nodes ([`crate::block::opener::close_all`]). None, if it is
    /// inactive.
    ///
    /// # Errors
    /// A queue runs; a flush that failed: it stays as it is then.
    pub fn let_go(&self) -> Result<Option<RootUser>> {
        let _turn = lock(&self.activation.turn);
        if lock(&self.state).running.contains(&true) {
            return Err(err!("export '{}': a queue runs", self.id()));
        }
        if !self.flush_stopped() {
            return Err(err!("export '{}': it cannot be flushed", self.id()));
        }
        Ok(lock(&self.state).user.take())
    }

    /// Uses its root, which is open again, after [`Export::let_go`]. Does nothing if the export is active.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn take_up(&self) -> Result<()> {
        let _turn = lock(&self.activation.turn);
        if self.is_active() {
            return Ok(());
        }
        let name = self.activation.opener.root();
        let root = self.activation.graph().find(name);
        self.use_root(&root.ok_or_else(|| err!("Cannot find device='' nor node-name='{name}'"))?)
    }

    /// Flushes and closes the nodes: afterwards neither caches nor locks are here, and the image is clean. Does nothing if the
    /// export is inactive.
    ///
    /// # Errors
    /// EBUSY's words if a queue runs or somebody else uses a node; a flush that failed: it stays active then, with its locks,
    /// so that nothing is lost that may still be saved. An image that cannot be closed cleanly: it is inactive.
    pub fn deactivate(&self) -> Result<()> {
        let _turn = lock(&self.activation.turn);
        let start = Instant::now();
        if !self.is_active() {
            return Ok(());
        }
        if lock(&self.state).running.contains(&true) {
            return Err(err!("a queue runs"));
        }
        if !self.flush_stopped() {
            return Err(err!("it cannot be flushed"));
        }
        let user = {
            let mut state = lock(&self.state);
            if let Some(user) = &state.user {
                self.activation.opener.check_private(user)?;
            }
            state.user.take()
        };
        let closed = user.map_or(Ok(()), |user| self.activation.opener.close(user));
        log::info!("export '{}': inactive after {:.1} ms", self.id(), ms(start));
        closed
    }

    /// The front end is gone: what could not be deactivated is tried again, for nobody else will make it run or stop.
    pub(super) fn deactivate_finally(&self) {
        self.activation.tried.store(false, Ordering::Relaxed);
        self.deactivate_if_auto();
    }

    /// No ring runs: what `activate=auto` makes of that.
    pub(super) fn deactivate_if_auto(&self) {
        if !self.activation.auto || self.activation.tried.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Err(e) = self.deactivate() {
            log::error!("export '{}': cannot be deactivated: {e}", self.id());
        }
    }
}

/// Milliseconds since `start`.
fn ms(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}
