//! A way to close a part of the graph and to open it anew, from the definitions that the user wrote.
//!
//! For an image that another process is to use meanwhile (live migration with shared storage, an upgrade in place): closed,
//! nothing of it is left here, neither caches nor locks; opened anew, all metadata is read again. The part must be private:
//! one user from outside, at its root. Called on control threads; takes the graph's lock for moments only.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::graph::{Graph, RootUser};
use super::node::Node;
use crate::err;
use crate::error::Result;
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
        let mut opened = Vec::new();
        let result = self.definitions.iter().try_for_each(|options| {
            opened.push(self.graph.add(options.clone())?.id());
            Ok(())
        });
        let found = result.and_then(|()| {
            let root = self.graph.find(&self.root);
            root.ok_or_else(|| err!("Cannot find device='' nor node-name='{}'", self.root))
        });
        if found.is_err() {
            // Parents after their children: dropped the other way round.
            let mut forgotten = self.graph.forget(&opened.iter().copied().collect());
            while forgotten.pop().is_some() {}
        }
        found
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
        self.shut(root, Some(user))
    }

    /// Undoes [`Opener::open`], for a root that cannot be used after all.
    pub fn give_up(&self, root: Arc<Node>) {
        if let Err(e) = self.shut(root, None) {
            log::warn!("{e}");
        }
    }

    fn shut(&self, root: Arc<Node>, user: Option<RootUser>) -> Result<()> {
        // Beside the orderly end of a driver nothing may happen to it.
        let _quiet = self.graph.upkeep().hold();
        let nodes = self.graph.below(&root);
        let mut result = Ok(());
        for node in &nodes {
            let closed = rt::try_block_on(node.close()).and_then(|closed| closed);
            if let (Err(e), Ok(())) = (closed, &result) {
                result = Err(err!("node '{}': closing: {e}", node.name()));
            }
        }
        let ids: BTreeSet<_> = nodes.iter().map(|node| node.id()).collect();
        drop((user, root));
        let owned = self.graph.forget(&ids);
        // A child's last reference is its parent's.
        drop((owned, nodes));
        let start = Instant::now();
        while let Some(name) = self.graph.name_of_any(&ids) {
            if start.elapsed() > GONE_LIMIT {
                return Err(err!("Node '{name}' is still in use"));
            }
            thread::sleep(GONE_PAUSE);
        }
        result
    }
}
