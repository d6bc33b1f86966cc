//! Who uses which node, and the permissions that go with it, changed as one transaction.
//!
//! The table of [`Slot`]s lives in the graph, under its lock. A [`Link`] is one use of a node, by a parent node or by
//! somebody outside; it gives up its permissions when it is dropped. Nothing here knows a driver by name.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use super::graph::{Graph, NodeId};
use super::node::{Node, Role, SECTOR};
use super::perm::{ChildPermQuery, Perm, Perms, conflict, cumulative};
use crate::err;
use crate::error::Result;

/// Names one use of a node, for as long as the process lives.
pub(super) type LinkId = u64;

/// One use of a node.
pub(super) struct User {
    pub(super) link: LinkId,
    /// Who, in QEMU's words: `node 'q'`, `an unnamed block device`.
    pub(super) who: String,
    /// As what: the name of the parent's option, or `root`.
    pub(super) as_child: &'static str,
    /// The child's role, for a user that is a node.
    pub(super) role: Option<Role>,
    /// What the user does and shares.
    pub(super) perms: Perms,
}

/// What the graph knows about one node, from before it is open until after it is closed.
pub(super) struct Slot {
    pub(super) name: String,
    /// Dead until the node is open.
    pub(super) node: Weak<Node>,
    /// Newest first: QEMU names conflicts in this order.
    pub(super) users: Vec<User>,
    /// The uses that this node makes of others.
    pub(super) children: Vec<(NodeId, LinkId)>,
    /// Nodes on the longest way down from here.
    pub(super) height: usize,
    /// What the driver was last told.
    applied: Perms,
}

impl Slot {
    pub(super) fn new(name: String) -> Slot {
        let (users, children) = (Vec::new(), Vec::new());
        Slot { name, node: Weak::new(), users, children, height: 1, applied: Perms::NONE }
    }
}

/// All nodes, in the order of their definition.
pub(super) type Slots = BTreeMap<NodeId, Slot>;

/// One use of a node. Dropping it ends the use.
pub(super) struct Link {
    pub(super) graph: Weak<Graph>,
    pub(super) child: NodeId,
    pub(super) id: LinkId,
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(graph) = self.graph.upgrade() {
            graph.unlink(self.child, self.id);
        }
    }
}

/// A node whose driver has prepared for other permissions.
struct Prepared {
    id: NodeId,
    node: Arc<Node>,
    from: Perms,
    to: Perms,
}

/// A permission change that has begun.
#[derive(Default)]
struct Change {
    prepared: Vec<Prepared>,
    /// What uses asked for before: child, link, permissions.
    before: Vec<(NodeId, LinkId, Perms)>,
    /// Nodes that must not be dropped under the graph's lock.
    keep: Vec<Arc<Node>>,
}

/// Works out the permissions of `start` and of everything below anew, and tells the drivers: all of them or, on an
/// error, none. The nodes touched are added to `keep`, to be dropped when the graph's lock is no longer held.
///
/// # Errors
/// Two users of a node exclude each other; a node cannot do what its users ask.
pub(super) fn refresh(slots: &mut Slots, start: NodeId, keep: &mut Vec<Arc<Node>>) -> Result<()> {
    let mut change = Change::default();
    let result =
        parents_first(slots, start).into_iter().try_for_each(|id| change.prepare(slots, id));
    match result {
        Ok(()) => change.commit(slots),
        Err(_) => change.abort(slots),
    }
    keep.append(&mut change.keep);
    keep.extend(change.prepared.into_iter().map(|p| p.node));
    result
}

impl Change {
    fn prepare(&mut self, slots: &mut Slots, id: NodeId) -> Result<()> {
        let Some(slot) = slots.get(&id) else { return Ok(()) };
        let asked: Vec<Perms> = slot.users.iter().map(|u| u.perms).collect();
        if let Some((user, owner, what)) = conflict(&asked) {
            return Err(conflict_error(slot, &slot.users[user], &slot.users[owner], what));
        }
        let (from, to) = (slot.applied, cumulative(asked));
        let Some(node) = slot.node.upgrade() else { return Ok(()) };
        self.keep.push(node.clone());
        if from == to {
            return Ok(());
        }
        check(&node, to)?;
        node.driver().prepare_perms(to)?;
        self.ask_children(slots, id, &node, to);
        self.prepared.push(Prepared { id, node, from, to });
        Ok(())
    }

    fn ask_children(&mut self, slots: &mut Slots, id: NodeId, node: &Node, perms: Perms) {
        for (child, link) in slots[&id].children.clone() {
            let Some(slot) = slots.get_mut(&child) else { continue };
            let Some(child_node) = slot.node.upgrade() else { continue };
            let force_share = child_node.in_force().force_share;
            self.keep.push(child_node);
            let Some(user) = slot.users.iter_mut().find(|u| u.link == link) else { continue };
            let Some(role) = user.role else { continue };
            let query = ChildPermQuery { role, node: perms, read_only: node.read_only() };
            self.before.push((child, link, user.perms));
            user.perms = (node.def().child_perms)(&query);
            if force_share {
                user.perms.shared = Perm::all();
            }
        }
    }

    fn commit(&self, slots: &mut Slots) {
        for p in &self.prepared {
            p.node.driver().commit_perms(p.to);
            if let Some(slot) = slots.get_mut(&p.id) {
                slot.applied = p.to;
            }
        }
    }

    fn abort(&self, slots: &mut Slots) {
        for p in self.prepared.iter().rev() {
            p.node.driver().abort_perms(p.from);
        }
        for (child, link, perms) in self.before.iter().rev() {
            let users = slots.get_mut(child).map(|s| s.users.iter_mut()).into_iter().flatten();
            users.filter(|u| u.link == *link).for_each(|u| u.perms = *perms);
        }
    }
}

/// `start` and all below it, every node after all of its parents.
fn parents_first(slots: &Slots, start: NodeId) -> Vec<NodeId> {
    fn visit(slots: &Slots, id: NodeId, seen: &mut BTreeSet<NodeId>, order: &mut Vec<NodeId>) {
        if seen.insert(id) {
            let children = slots.get(&id).map(|s| s.children.as_slice()).unwrap_or_default();
            children.iter().for_each(|(child, _)| visit(slots, *child, seen, order));
            order.push(id);
        }
    }
    let mut order = Vec::new();
    visit(slots, start, &mut BTreeSet::new(), &mut order);
    order.reverse();
    order
}

/// Whether `node` as it is can allow what its users ask of it, whatever its driver says.
fn check(node: &Node, perms: Perms) -> Result<()> {
    if perms.used.intersects(Perm::WRITE | Perm::WRITE_UNCHANGED) && node.read_only() {
        return Err(err!("Block node is read-only"));
    }
    // An unaligned end is written by a read-modify-write of the last block, which grows the image.
    let align = u64::from(node.driver().limits().request_align).max(SECTOR);
    let grows = !node.len().is_multiple_of(align);
    if perms.used.contains(Perm::WRITE) && !perms.used.contains(Perm::RESIZE) && grows {
        return Err(err!(
            "Cannot get 'write' permission without 'resize': Image size is not a multiple of \
             request alignment"
        ));
    }
    Ok(())
}

fn conflict_error(slot: &Slot, user: &User, owner: &User, what: Perm) -> crate::error::Error {
    let node = &slot.name;
    let describe = |u: &User| format!("{} (uses node '{node}' as '{}' child)", u.who, u.as_child);
    err!(
        "Permission conflict on node '{node}': permissions '{}' are both required by {} and unshared by {}.",
        what.names(),
        describe(user),
        describe(owner)
    )
}
