//! The graph of nodes: definition, look-up, references, users from outside, closing.
//!
//! The graph changes on the control thread only; requests never look at it. Its one lock guards the table of nodes
//! and is held while permissions change, so that two changes never mix. **Rule**: nothing that may drop a [`Node`]
//! happens under the lock, because a node that goes away gives up its place and its links, which takes the lock.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use super::driver::DriverDef;
use super::links::{Link, LinkId, Slot, Slots, User, refresh};
use super::node::{Node, Role};
use super::perm::{Perm, Perms};
use super::upkeep::Upkeep;
use super::{drivers, open};
use crate::err;
use crate::error::{Error, Result};
use crate::metrics::Registry;
use crate::qapi::Options;
use crate::rt::{self, grace};

/// The most nodes on a way from a root to a leaf. Backing chains of some 200 images exist. Requests walk down without
/// recursion; closing and permissions recurse, with frames that stay far below a thread's stack at this depth; opening
/// has a stack of its own (`OPEN_STACK`).
pub const MAX_DEPTH: usize = 512;

/// The stack in bytes of the thread that opens a chain of nodes: drivers' own functions are on it once for each level.
/// Only what is used is ever allocated.
const OPEN_STACK: usize = 64 << 20;

/// The longest node-name in bytes (QEMU's `char node_name[32]`).
const MAX_NAME: usize = 31;

/// A node's place in the table; grows with every node defined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(u64);

/// All nodes of the process.
pub struct Graph {
    me: Weak<Graph>,
    drivers: &'static [&'static DriverDef],
    strict_formats: AtomicBool,
    grace: Arc<grace::Domain>,
    upkeep: Arc<Upkeep>,
    meters: Arc<Registry>,
    state_dir: OnceLock<PathBuf>,
    /// Milliseconds.
    lock_patience: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    slots: Slots,
    /// The nodes that the user defined, with their definitions: they live until [`Graph::close`].
    owned: Vec<(Arc<Node>, Options)>,
    nodes_ever: u64,
    links_ever: LinkId,
    names_ever: u64,
}

/// A node's entry in the table, from before it is open until it is gone.
pub(super) struct Place {
    graph: Weak<Graph>,
    id: NodeId,
    name: String,
}

impl Place {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn id(&self) -> NodeId {
        self.id
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(graph) = self.graph.upgrade() {
            graph.lock().slots.remove(&self.id);
        }
    }
}

/// A user of a node from outside the graph: an export, a job. Gives up its permissions when it is dropped or handed
/// to [`Graph::detach`].
pub struct RootUser {
    /// Declared before the node: permissions go first.
    _link: Link,
    node: Arc<Node>,
}

impl RootUser {
    /// The node in use.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // Drivers may hold on to it.
        self.upkeep.end();
    }
}

impl Graph {
    /// An empty graph that knows all drivers.
    pub fn new() -> Arc<Graph> {
        Graph::with_drivers(drivers::TABLE)
    }

    /// An empty graph that knows `drivers` only (tests bring their own).
    pub fn with_drivers(drivers: &'static [&'static DriverDef]) -> Arc<Graph> {
        Arc::new_cyclic(|me| Graph {
            me: me.clone(),
            drivers,
            strict_formats: AtomicBool::new(false),
            grace: Arc::default(),
            upkeep: Arc::default(),
            meters: Arc::default(),
            state_dir: OnceLock::new(),
            lock_patience: AtomicU64::new(0),
            state: Mutex::default(),
        })
    }

    /// Whether a backing file without a format in its overlay's header is an error, instead of having its format
    /// guessed from its content (`--strict-formats`).
    pub fn set_strict_formats(&self, strict: bool) {
        self.strict_formats.store(strict, Ordering::Relaxed);
    }

    /// See [`Graph::set_strict_formats`].
    pub fn strict_formats(&self) -> bool {
        self.strict_formats.load(Ordering::Relaxed)
    }

    /// For how long an image lock that somebody else holds is waited for, in nodes opened from now on: not at all at first.
    ///
    /// A killed process keeps its locks until the kernel has ended its last requests, and its successor starts at once. Locks do
    /// not tell whether their holder lives; so whoever uses an image that is in use by mistake waits, too, before he is told.
    pub fn set_lock_patience(&self, patience: Duration) {
        let ms = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        self.lock_patience.store(ms, Ordering::Relaxed);
    }

    /// See [`Graph::set_lock_patience`].
    pub fn lock_patience(&self) -> Duration {
        Duration::from_millis(self.lock_patience.load(Ordering::Relaxed))
    }

    /// Where formats may keep what must outlive the process, before the first node is opened.
    pub fn set_state_dir(&self, dir: PathBuf) {
        // The first one stays.
        let _ = self.state_dir.set(dir);
    }

    /// See [`Graph::set_state_dir`]; `None`: nowhere.
    pub fn state_dir(&self) -> Option<&Path> {
        self.state_dir.get().map(PathBuf::as_path)
    }

    /// When can nobody who started earlier use a place on a disk any more: all requests of this graph's nodes take part.
    pub fn grace(&self) -> &Arc<grace::Domain> {
        &self.grace
    }

    /// What must happen some time later. It ends with the graph.
    pub fn upkeep(&self) -> &Arc<Upkeep> {
        &self.upkeep
    }

    /// What its nodes, and their exports, count.
    pub fn meters(&self) -> &Arc<Registry> {
        &self.meters
    }

    /// Defines a node and, inline, its children: what `--blockdev` does. The node lives until [`Graph::close`].
    ///
    /// # Errors
    /// In QEMU's words; nothing of the node is left behind.
    pub fn add(&self, options: Options) -> Result<Arc<Node>> {
        if !options.contains_key("node-name") {
            return Err(err!("'node-name' must be specified for the root node"));
        }
        let node = self.open_on_own_stack(options.clone())?;
        self.lock().owned.push((node.clone(), options));
        Ok(node)
    }

    /// Opens a node and what is below it on a thread of its own: with a stack for deep chains, and with freedom to wait
    /// for I/O whatever the calling thread drives.
    fn open_on_own_stack(&self, options: Options) -> Result<Arc<Node>> {
        // A simulation is one thread, and lets drivers wait on it.
        if rt::is_simulated() {
            return open::open(self, options, open::Above::NONE);
        }
        std::thread::scope(|scope| {
            let opener = std::thread::Builder::new().name("blk-open".into()).stack_size(OPEN_STACK);
            let open = || open::open(self, options, open::Above::NONE);
            let opener = opener.spawn_scoped(scope, open);
            let opener =
                opener.map_err(|e| Error::from_errno("Could not start a thread", e.into()))?;
            opener.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// The open node of this name.
    pub fn find(&self, name: &str) -> Option<Arc<Node>> {
        let state = self.lock();
        state.slots.values().find(|slot| slot.name == name).and_then(|slot| slot.node.upgrade())
    }

    /// All open nodes, in the order of their definition (a parent before its inline children).
    pub fn nodes(&self) -> Vec<Arc<Node>> {
        self.lock().slots.values().filter_map(|slot| slot.node.upgrade()).collect()
    }

    /// The open nodes that are no other node's child.
    pub fn roots(&self) -> Vec<Arc<Node>> {
        let state = self.lock();
        let roots = state.slots.values().filter(|s| s.users.iter().all(|u| u.role.is_none()));
        roots.filter_map(|slot| slot.node.upgrade()).collect()
    }

    /// Makes `who` (in QEMU's words: `an unnamed block device`) a user of `node`. If it wants to write, this is where
    /// a file with `auto-read-only=on` is opened for writing, and where image locks are taken.
    ///
    /// # Errors
    /// The permissions are refused: a conflict, a read-only node, a lock held by another process, a file that cannot
    /// be opened for writing. Nothing has changed then.
    pub fn attach_root(&self, node: &Arc<Node>, who: &str, perms: Perms) -> Result<RootUser> {
        let who = who.to_owned();
        let user = User { link: 0, who, as_child: "root", role: None, perms };
        Ok(RootUser { _link: self.link(None, node, user)?, node: node.clone() })
    }

    /// Ends the use.
    pub fn detach(&self, user: RootUser) {
        drop(user);
    }

    /// The orderly end, when nobody uses a node any more: closes the drivers of all nodes, parents before their children,
    /// and forgets the nodes as [`Graph::close`] does. Whether all went well; failures are logged.
    pub fn close_all(&self) -> bool {
        // Beside the orderly end of a driver nothing may happen to it.
        self.upkeep.end();
        let mut closed = true;
        for node in self.parents_first() {
            let result = rt::try_block_on(node.close()).and_then(|result| result);
            if let Err(e) = result {
                log::error!("node '{}': closing: {e}", node.name());
                closed = false;
            }
        }
        self.close();
        closed
    }

    /// All open nodes, each after all of its parents.
    pub(super) fn parents_first(&self) -> Vec<Arc<Node>> {
        let state = self.lock();
        let mut nodes: Vec<_> = state.slots.values().collect();
        // Every parent is higher than its children.
        nodes.sort_by_key(|slot| std::cmp::Reverse(slot.height));
        nodes.into_iter().filter_map(|slot| slot.node.upgrade()).collect()
    }

    /// Forgets the nodes that the user defined, the last first. A node goes when its last user is gone; flushing and
    /// closing is the caller's business, before: see [`Graph::close_all`].
    pub fn close(&self) {
        let mut owned = std::mem::take(&mut self.lock().owned);
        while let Some(node) = owned.pop() {
            drop(node);
        }
    }

    /// The definitions by the user that `root` and what is below it are made of, in their order.
    pub(super) fn definitions(&self, root: &Node) -> Vec<Options> {
        let state = self.lock();
        let below = reach(&state.slots, root.id());
        let owned = state.owned.iter().filter(|(node, _)| below.contains(&node.id()));
        owned.map(|(_, options)| options.clone()).collect()
    }

    /// All definitions by the user, in their order.
    pub fn all_definitions(&self) -> Vec<Options> {
        self.lock().owned.iter().map(|(_, options)| options.clone()).collect()
    }

    /// `root` and all nodes below it, each after all of its parents.
    pub(super) fn below(&self, root: &Node) -> Vec<Arc<Node>> {
        let state = self.lock();
        let mut slots: Vec<_> =
            reach(&state.slots, root.id()).iter().filter_map(|id| state.slots.get(id)).collect();
        slots.sort_by_key(|slot| std::cmp::Reverse(slot.height));
        slots.into_iter().filter_map(|slot| slot.node.upgrade()).collect()
    }

    /// Whether nobody but `user` uses its node from outside, nor anything below it.
    ///
    /// # Errors
    /// Somebody does.
    pub(super) fn check_private(&self, user: &RootUser) -> Result<()> {
        let state = self.lock();
        let below = reach(&state.slots, user.node.id());
        let slots = || below.iter().filter_map(|id| state.slots.get(id));
        let mut links: BTreeSet<LinkId> =
            slots().flat_map(|slot| slot.children.iter().map(|(_, link)| *link)).collect();
        links.insert(user._link.id);
        for slot in slots() {
            if let Some(other) = slot.users.iter().find(|u| !links.contains(&u.link)) {
                return Err(err!("Node '{}' is also in use by {}", slot.name, other.who));
            }
        }
        Ok(())
    }

    /// Takes the nodes of `ids` out of those that live until [`Graph::close`]; the caller drops them.
    pub(super) fn forget(&self, ids: &BTreeSet<NodeId>) -> Vec<Arc<Node>> {
        let mut state = self.lock();
        let (gone, stay) =
            std::mem::take(&mut state.owned).into_iter().partition(|(n, _)| ids.contains(&n.id()));
        state.owned = stay;
        let gone: Vec<(Arc<Node>, Options)> = gone;
        gone.into_iter().map(|(node, _)| node).collect()
    }

    /// The name of a node of `ids` that still has its place.
    pub(super) fn name_of_any(&self, ids: &BTreeSet<NodeId>) -> Option<String> {
        let state = self.lock();
        ids.iter().rev().find_map(|id| state.slots.get(id)).map(|slot| slot.name.clone())
    }

    /// All drivers, in the order in which they are asked what they recognise.
    pub(super) fn drivers(&self) -> impl Iterator<Item = &'static DriverDef> {
        self.drivers.iter().copied()
    }

    /// The driver called `name`.
    pub(super) fn driver(&self, name: &str) -> Option<&'static DriverDef> {
        self.drivers.iter().copied().find(|def| def.name == name)
    }

    /// Reserves a place for a node that is about to be opened: under `name`, or under a generated one.
    pub(super) fn reserve(&self, name: Option<String>) -> Result<Place> {
        let mut state = self.lock();
        let name = match name {
            Some(name) => check_name(&state.slots, name)?,
            None => generate_name(&mut state),
        };
        state.nodes_ever += 1;
        let id = NodeId(state.nodes_ever);
        state.slots.insert(id, Slot::new(name.clone()));
        Ok(Place { graph: self.me.clone(), id, name })
    }

    /// The node is open: it can be found from now on.
    pub(super) fn publish(&self, node: &Arc<Node>) {
        if let Some(slot) = self.lock().slots.get_mut(&node.id()) {
            slot.node = Arc::downgrade(node);
        }
    }

    /// Makes `child` a child of the node at `parent`, which is being opened, with `perms`.
    pub(super) fn link_child(
        &self,
        parent: NodeId,
        child: &Arc<Node>,
        (as_child, role): (&'static str, Role),
        mut perms: Perms,
    ) -> Result<Link> {
        if child.in_force().force_share {
            perms.shared = Perm::all();
        }
        let who = match self.lock().slots.get(&parent) {
            Some(slot) => format!("node '{}'", slot.name),
            None => String::new(),
        };
        self.link(Some(parent), child, User { link: 0, who, as_child, role: Some(role), perms })
    }

    fn link(&self, parent: Option<NodeId>, child: &Arc<Node>, mut user: User) -> Result<Link> {
        let mut keep = Vec::new();
        let mut state = self.lock();
        state.links_ever += 1;
        let (child, id) = (child.id(), state.links_ever);
        user.link = id;
        let height = state.slots.get(&child).map_or(0, |s| s.height) + 1;
        if parent.is_some() && height > MAX_DEPTH {
            return Err(too_deep());
        }
        if let Some(slot) = state.slots.get_mut(&child) {
            slot.users.insert(0, user);
        }
        let result = refresh(&mut state.slots, child, &mut keep);
        match (&result, parent.and_then(|p| state.slots.get_mut(&p))) {
            (Ok(()), Some(slot)) => {
                slot.children.push((child, id));
                slot.height = slot.height.max(height);
            }
            (Err(_), _) => forget_user(&mut state.slots, child, id),
            _ => {}
        }
        drop(state);
        result.map(|()| Link { graph: self.me.clone(), child, id })
    }

    /// Ends one use of a node.
    pub(super) fn unlink(&self, child: NodeId, id: LinkId) {
        let mut keep = Vec::new();
        let mut state = self.lock();
        forget_user(&mut state.slots, child, id);
        for slot in state.slots.values_mut() {
            slot.children.retain(|(_, link)| *link != id);
        }
        let result = refresh(&mut state.slots, child, &mut keep);
        drop(state);
        if let Err(e) = result {
            // Only loosens: drivers do not refuse that.
            log::warn!("permissions could not be given up: {e}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The node `root` and all below it.
fn reach(slots: &Slots, root: NodeId) -> BTreeSet<NodeId> {
    let (mut seen, mut todo) = (BTreeSet::new(), vec![root]);
    while let Some(id) = todo.pop() {
        if seen.insert(id)
            && let Some(slot) = slots.get(&id)
        {
            todo.extend(slot.children.iter().map(|(child, _)| *child));
        }
    }
    seen
}

fn forget_user(slots: &mut Slots, child: NodeId, id: LinkId) {
    if let Some(slot) = slots.get_mut(&child) {
        slot.users.retain(|u| u.link != id);
    }
}

pub(super) fn too_deep() -> crate::error::Error {
    err!("The block graph is more than {MAX_DEPTH} nodes deep")
}

fn check_name(slots: &Slots, name: String) -> Result<String> {
    let mut bytes = name.bytes();
    let well_formed = bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    if !well_formed {
        return Err(err!("Invalid node-name: '{name}'"));
    }
    if slots.values().any(|slot| slot.name == name) {
        return Err(err!("Duplicate nodes with node-name='{name}'"));
    }
    if name.len() > MAX_NAME {
        return Err(err!("Node name too long"));
    }
    Ok(name)
}

/// A name that users cannot write: `#block`, a counter, two random digits.
fn generate_name(state: &mut State) -> String {
    let count = state.names_ever;
    state.names_ever += 1;
    let random = RandomState::new().hash_one(count) % 100;
    format!("#block{count}{random:02}")
}

#[cfg(test)]
#[path = "graph_tests.rs"]
mod tests;
