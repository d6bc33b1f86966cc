//! A way to close a part of the graph and to open it anew, from the definitions that the user wrote.
//!
//! For an image that another process is to use meanwhile (live migration with shared storage, an upgrade in place): closed,
//! nothing of it is left here, neither caches nor locks; opened anew, all metadata is read again. The part must be private:
//! one user from outside, at its root; or the part is all there is ([`close_all`]), whose users go with it. Called on control threads; takes the graph's lock for moments only.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::graph::{Graph, NodeId, RootUser};
use super::node::Node;
use crate::err;
use crate::error::{Error, Result};
use crate::qapi::Options;
use crate::rt;

/// How long to wait for the last reference to a closed node. There should be none.
const GONE_LIMIT: Duration = Duration::from_secs(2);
/// How often to look.
const GONE_PAUSE: Duration = Duration::from_micros(200);

/// The definitions that lead to a node, and the graph that it belongs to.
pub struct Opener {
    graph: Arc<Graph>,
    /// What is referred to before who refers to it.
    definitions: Vec<Options>,
    root: String,
}

impl Opener {
    /// For the node `root` of `definitions`, in the order in which they were written. Nothing is opened.
    pub fn new(graph: &Arc<Graph>, definitions: Vec<Options>, root: &str) -> Opener {
        Opener { graph: Arc::clone(graph), definitions, root: root.to_owned() }
    }

    /// For `root`, which is open, and what is below it.
    pub fn of(graph: &Arc<Graph>, root: &Node) -> Opener {
        Opener::new(graph, graph.definitions(root), root.name())
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// The root's node-name.
    pub fn root(&self) -> &str {
        &self.root
    }

    /// Opens all nodes of the part, and answers the root.
    ///
    /// # Errors
    /// In QEMU's words (a lock that somebody holds, a file that is gone); nothing is left open then.
    pub fn open(&self) -> Result<Arc<Node>> {
        let opened = open_all(&self.graph, &self.definitions)?;
        let root = self.graph.find(&self.root);
        root.ok_or_else(|| {
            forget(&self.graph, &opened);
            err!("Cannot find device='' nor node-name='{}'", self.root)
        })
    }

    /// Whether nobody but `user` uses a node of the part.
    ///
    /// # Errors
    /// Somebody does.
    pub fn check_private(&self, user: &RootUser) -> Result<()> {
        self.graph.check_private(user)
    }

    /// Closes the part, whose only user is `user` ([`Opener::check_private`]): formats write back what only they know, and
    /// every file is closed. All requests have ended and everything is flushed.
    ///
    /// # Errors
    /// An image cannot be closed cleanly. It is closed all the same.
    pub fn close(&self, user: RootUser) -> Result<()> {
        let root = Arc::clone(user.node());
        shut(&self.graph, self.graph.below(&root), (user, root))
    }

    /// Undoes [`Opener::open`], for a root that cannot be used after all.
    pub fn give_up(&self, root: Arc<Node>) {
        if let Err(e) = shut(&self.graph, self.graph.below(&root), root) {
            log::warn!("{e}");
        }
    }
}

/// Opens nodes in their order: all, or none.
///
/// # Errors
/// In QEMU's words (a lock that somebody holds, a file that is gone).
pub fn open_all(graph: &Graph, definitions: &[Options]) -> Result<BTreeSet<NodeId>> {
    let mut opened = BTreeSet::new();
    let result = definitions.iter().try_for_each(|options| {
        opened.insert(graph.add(options.clone())?.id());
        Ok(())
    });
    if result.is_err() {
        forget(graph, &opened);
    }
    result.map(|()| opened)
}

/// Closes all nodes of `graph`, as [`Opener::close`] does with some; `users` are all that use them from outside. What
/// [`open_all`] opens them anew from, and whether an image could not be closed cleanly. It is closed all the same.
pub fn close_all(graph: &Graph, users: Vec<RootUser>) -> (Vec<Options>, Result<()>) {
    let definitions = graph.all_definitions();
    (definitions, shut(graph, graph.parents_first(), users))
}

/// Whether the files of `definitions` are there and may be opened as they were: found out before they are closed. Takes no
/// locks.
///
/// # Errors
/// One is not.
pub fn check_openable(definitions: &[Options]) -> Result<()> {
    definitions.iter().try_for_each(|options| check_files(options, false))
}

fn check_files(options: &Options, read_only: bool) -> Result<()> {
    let flag = |name: &str| options.get(name).and_then(Value::as_bool);
    let read_only = flag("read-only").unwrap_or(read_only);
    let driver = options.get("driver").and_then(Value::as_str).unwrap_or_default();
    if ["file", "host_device"].contains(&driver)
        && let Some(path) = options.get("filename").and_then(Value::as_str)
    {
        let write = !read_only && flag("auto-read-only") != Some(true);
        let opened = File::options().read(true).write(write).open(path);
        opened.map_err(|e| Error::from_errno(format!("Could not open '{path}'"), e.into()))?;
    }
    for (name, option) in options {
        if let Value::Object(inside) = option {
            check_files(inside, read_only || name == "backing")?;
        }
    }
    Ok(())
}

/// Drops what has just been opened, parents before their children.
fn forget(graph: &Graph, ids: &BTreeSet<NodeId>) {
    // Parents were opened after their children.
    let mut forgotten = graph.forget(ids);
    while forgotten.pop().is_some() {}
}

/// Closes `nodes`, parents first, which live only for the user who defined them and for `users`.
fn shut(graph: &Graph, nodes: Vec<Arc<Node>>, users: impl Sized) -> Result<()> {
    // Beside the orderly end of a driver nothing may happen to it.
    let _quiet = graph.upkeep().hold();
    let mut result = Ok(());
    for node in &nodes {
        let closed = rt::try_block_on(node.close()).and_then(|closed| closed);
        if let (Err(e), Ok(())) = (closed, &result) {
            result = Err(err!("node '{}': closing: {e}", node.name()));
        }
    }
    let ids: BTreeSet<_> = nodes.iter().map(|node| node.id()).collect();
    drop(users);
    let owned = graph.forget(&ids);
    // A child's last reference is its parent's.
    drop((owned, nodes));
    let start = Instant::now();
    while let Some(name) = graph.name_of_any(&ids) {
        if start.elapsed() > GONE_LIMIT {
            return Err(err!("Node '{name}' is still in use"));
        }
        thread::sleep(GONE_PAUSE);
    }
    result
}
