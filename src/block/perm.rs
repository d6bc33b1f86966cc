//! Permissions: who may do what to a node, QEMU's BLK_PERM_*.
//!
//! Every edge of the graph (and every user of a node from outside, such as an export) says what it does to the node
//! ([`Perms::used`]) and what it lets others do ([`Perms::shared`]). What a node must allow is the union of what its
//! users do and the intersection of what they share ([`cumulative`]); what it asks of its own children follows from
//! that through its driver's [`ChildPermFn`]. Two users conflict when one does what the other does not share.
//!
//! This file holds the pure rules; `links.rs` applies them to the graph as one transaction.
#![forbid(unsafe_code)]

use super::node::Role;

bitflags::bitflags! {
    /// One set of permissions. Bit `i` is also the byte of QEMU's image locks (100 + i, 200 + i).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Perm: u8 {
        /// Reads see a consistent state.
        const CONSISTENT_READ = 1;
        /// Writes.
        const WRITE = 2;
        /// Writes that do not change what is read.
        const WRITE_UNCHANGED = 4;
        /// Changes of the size.
        const RESIZE = 8;
    }
}

/// The names of the permissions by bit number, as QEMU prints them.
pub const PERM_NAMES: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];

impl Perm {
    /// Anything for which a file must be open for writing.
    pub const WRITERS: Perm = Perm::WRITE.union(Perm::WRITE_UNCHANGED).union(Perm::RESIZE);

    /// The names of the permissions in the set, as QEMU lists them: `write, resize`.
    pub fn names(self) -> String {
        let names = PERM_NAMES.iter().enumerate().filter(|(bit, _)| self.bits() & (1 << bit) != 0);
        names.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    }
}

/// What a user of a node does itself (`used`) and lets other users do (`shared`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Perms {
    /// What it does.
    pub used: Perm,
    /// What it lets others do.
    pub shared: Perm,
}

impl Perms {
    /// Nothing used, everything shared: a node without users.
    pub const NONE: Perms = Perms { used: Perm::empty(), shared: Perm::all() };

    /// What a guest device asks of its root node: consistent reads, writes if `writable`; it shares everything, so
    /// that several exports may serve one node.
    pub const fn device(writable: bool) -> Perms {
        let read = Perm::CONSISTENT_READ;
        let used = if writable { read.union(Perm::WRITE) } else { read };
        Perms { used, shared: Perm::all() }
    }

    /// The first permission that `other` uses and `self` does not share, if any: `self` forbids `other`.
    fn forbids(self, other: Perms) -> Option<Perm> {
        let denied = other.used.difference(self.shared);
        (!denied.is_empty()).then_some(denied)
    }
}

/// What all users of a node together do, and what all of them share.
pub fn cumulative(users: impl IntoIterator<Item = Perms>) -> Perms {
    users.into_iter().fold(Perms::NONE, |all, one| Perms {
        used: all.used.union(one.used),
        shared: all.shared.intersection(one.shared),
    })
}

/// The first two of `users` that exclude each other: (who uses, who does not share, what). The order of `users`
/// decides which pair is named; QEMU's is newest first.
pub fn conflict(users: &[Perms]) -> Option<(usize, usize, Perm)> {
    for (owner, mine) in users.iter().enumerate() {
        for (user, other) in users.iter().enumerate() {
            if let Some(denied) = mine.forbids(*other).filter(|_| owner != user) {
                return Some((user, owner, denied));
            }
        }
    }
    None
}

/// One question to a driver: what does a node ask of one of its children?
#[derive(Clone, Copy, Debug)]
pub struct ChildPermQuery {
    /// The child's role.
    pub role: Role,
    /// What the node's own users do and share, cumulative.
    pub node: Perms,
    /// The node is open read-only.
    pub read_only: bool,
}

/// A driver's answer to a [`ChildPermQuery`]. A function of the driver, not of an open node: it is already needed
/// when the first child is attached, while the node is still being opened.
pub type ChildPermFn = fn(&ChildPermQuery) -> Perms;

/// What most drivers ask of a child, by its role (QEMU's `bdrv_default_perms`).
pub fn default_child_perms(query: &ChildPermQuery) -> Perms {
    match query.role {
        Role::Filtered => query.node,
        Role::File => storage(query, true),
        Role::Data => storage(query, false),
        Role::Backing => backing(query),
    }
}

/// The rule for children that are the node's storage. One that holds `metadata` may be written as soon as the node is
/// open for writing, even without a writer above, and nobody else may write it; plain data may be written by others
/// (cluster file systems do), but never resized.
fn storage(query: &ChildPermQuery, metadata: bool) -> Perms {
    let Perms { mut used, mut shared } = query.node;
    if metadata {
        used |= Perm::CONSISTENT_READ;
        if !query.read_only {
            used |= Perm::WRITE | Perm::RESIZE;
        }
        shared.remove(Perm::WRITE);
    }
    if used.contains(Perm::WRITE) {
        used |= Perm::RESIZE;
    }
    shared.remove(Perm::RESIZE);
    Perms { used, shared }
}

/// The rule for a backing child: it is only read, and may change below only if the node's users live with changes.
fn backing(query: &ChildPermQuery) -> Perms {
    let mut shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
    if query.node.shared.contains(Perm::WRITE) {
        shared |= Perm::WRITE | Perm::RESIZE;
    }
    Perms { used: query.node.used & Perm::CONSISTENT_READ, shared }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(role: Role, node: Perms, read_only: bool) -> Perms {
        default_child_perms(&ChildPermQuery { role, node, read_only })
    }

    #[test]
    fn a_format_owns_its_file_child() {
        let idle = ask(Role::File, Perms::NONE, false);
        assert_eq!(idle.used, Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
        assert_eq!(idle.shared, Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED);
        assert_eq!(ask(Role::File, Perms::NONE, true).used, Perm::CONSISTENT_READ);
        assert_eq!(ask(Role::File, Perms::device(true), false), idle);
    }

    #[test]
    fn plain_data_shares_writes_but_not_resize() {
        let data = ask(Role::Data, Perms::device(true), false);
        assert_eq!(data.used, Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE);
        assert_eq!(data.shared, Perm::all() - Perm::RESIZE);
        assert_eq!(ask(Role::Data, Perms::NONE, false).used, Perm::empty());
    }

    #[test]
    fn a_backing_child_is_only_read() {
        let open = ask(Role::Backing, Perms::device(true), false);
        assert_eq!(open, Perms { used: Perm::CONSISTENT_READ, shared: Perm::all() });
        let strict = Perms { used: Perm::all(), shared: Perm::CONSISTENT_READ };
        let shared = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
        assert_eq!(
            ask(Role::Backing, strict, false),
            Perms { used: Perm::CONSISTENT_READ, shared }
        );
    }

    #[test]
    fn conflicts_name_the_newest_owner_first() {
        let format = ask(Role::File, Perms::NONE, false);
        assert_eq!(conflict(&[format, format]), Some((1, 0, Perm::WRITE | Perm::RESIZE)));
        assert_eq!(conflict(&[Perms::device(true), format]), Some((0, 1, Perm::WRITE)));
        assert_eq!(conflict(&[Perms::device(true), Perms::device(true)]), None);
        assert_eq!(conflict(&[Perms::device(false), format]), None);
    }

    #[test]
    fn names_are_qemus() {
        assert_eq!((Perm::WRITE | Perm::RESIZE).names(), "write, resize");
        assert_eq!(Perm::all().names(), "consistent read, write, write unchanged, resize");
        assert_eq!(cumulative([]), Perms::NONE);
    }
}
