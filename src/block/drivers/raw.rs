//! `raw`: the bytes of its child as they are, or a window (`offset`, `size`) of them.
//!
//! Without a window it is a filter in all but name and costs one step of `map`. It holds no metadata, so it asks of
//! its child only what its own users ask: several writers may share one raw image.
#![forbid(unsafe_code)]

use serde_json::Value;

use crate::block::node::SECTOR;
use crate::block::perm::{ChildPermQuery, Perm, Perms, default_child_perms};
use crate::block::{
    Dir, Driver, DriverDef, DriverKind, Edge, Event, IoFuture, Limits, Map, Op, OpenArgs,
    Recognises, Role,
};
use crate::err;
use crate::error::{Errno, Result};
use crate::qapi::{Kind, OptionSpec, Options};

/// `raw`.
pub static RAW: DriverDef = DriverDef {
    name: "raw",
    kind: DriverKind::Format,
    options: &[
        OptionSpec::required("file", Kind::BlockdevRef),
        OptionSpec::optional("offset", Kind::Int { bits: 64, signed: true }),
        OptionSpec::optional("size", Kind::Int { bits: 64, signed: true }),
    ],
    open,
    // Whatever nobody else recognises.
    recognises: Recognises::Content(|_| true),
    child_perms,
};

struct Raw {
    edges: [Edge; 1],
    /// Where byte 0 is in the child.
    offset: u64,
    /// The length in bytes, where the user fixed it.
    size: Option<u64>,
}

fn open(args: &mut OpenArgs<'_>) -> Result<Box<dyn Driver>> {
    let offset = args.take_size("offset")?;
    let size = args.take_size("size")?;
    let role = if offset.is_some() || size.is_some() { Role::Data } else { Role::Filtered };
    let edge = args.open_child("file", role)?;
    let offset = offset.unwrap_or(0);
    check_window(edge.node.len(), offset, size)?;
    if offset > 0 {
        // What is aligned here is only as aligned as the offset in the child.
        edge.node.expect_ragged_writes(1 << offset.trailing_zeros().min(30));
    }
    Ok(Box::new(Raw { edges: [edge], offset, size }))
}

fn check_window(file: u64, offset: u64, size: Option<u64>) -> Result<()> {
    if offset > file {
        return Err(err!(
            "Offset ({offset}) cannot be greater than size of the containing file ({file})"
        ));
    }
    match size {
        Some(size) if size > file - offset => Err(err!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  \
             actual size of the containing file ({file})"
        )),
        Some(size) if !size.is_multiple_of(SECTOR) => {
            Err(err!("Specified size is not multiple of {SECTOR}"))
        }
        _ => Ok(()),
    }
}

/// The default rule, except that writing is asked for only when a user asks for it.
fn child_perms(query: &ChildPermQuery) -> Perms {
    let changes = Perm::WRITE | Perm::RESIZE;
    let Perms { used, shared } = default_child_perms(query);
    Perms { used: (used - changes) | (query.node.used & changes), shared }
}

impl Raw {
    fn child(&self) -> &Edge {
        &self.edges[0]
    }
}

impl Driver for Raw {
    fn edges(&self) -> &[Edge] {
        &self.edges
    }

    /// A window that ends with the child is cut to whole sectors, so that no sector hangs over the child's end.
    fn len(&self) -> u64 {
        let rest = self.child().node.len().saturating_sub(self.offset);
        self.size.map_or(rest, |size| size.min(rest)) / SECTOR * SECTOR
    }

    fn grows(&self) -> bool {
        self.size.is_none() && self.child().node.driver().grows()
    }

    fn limits(&self) -> Limits {
        // Alignment is the child's business: it knows who else writes to its blocks, and where its last one ends.
        Limits { request_align: 1, mem_align: 1, ..self.child().node.driver().limits() }
    }

    fn map(&self, _dir: Dir, offset: u64, _len: u64) -> Map<'_> {
        Map::Child { child: &self.child().node, offset: offset + self.offset }
    }

    fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
        let add = self.offset;
        let node = &self.child().node;
        match op {
            Op::Read { .. } => node.event(Event::ReadAio),
            Op::Write { .. } => node.event(Event::WriteAio),
            Op::Flush => node.event(Event::FlushToDisk),
            Op::WriteZeroes { .. } | Op::Discard { .. } => {}
        }
        node.submit(match op {
            Op::Read { offset, to } => Op::Read { offset: offset + add, to },
            Op::Write { offset, from, flags } => Op::Write { offset: offset + add, from, flags },
            Op::WriteZeroes { offset, len, flags } => {
                Op::WriteZeroes { offset: offset + add, len, flags }
            }
            Op::Discard { offset, len } => Op::Discard { offset: offset + add, len },
            Op::Flush => Op::Flush,
        })
    }

    fn truncate(&self, len: u64) -> IoFuture<'_> {
        match (self.size, self.offset.checked_add(len)) {
            (None, Some(len)) => Box::pin(self.child().node.truncate(len)),
            (Some(_), _) => Box::pin(std::future::ready(Err(Errno::ENOTSUP))),
            (None, None) => Box::pin(std::future::ready(Err(Errno(libc::EFBIG)))),
        }
    }

    fn follows_medium(&self) -> bool {
        self.size.is_none() && self.child().node.driver().follows_medium()
    }

    fn look_at_len(&self) -> Option<u64> {
        self.child().node.driver().look_at_len()
    }

    fn preallocate(&self, offset: u64, len: u64) -> IoFuture<'_> {
        match (self.size, self.offset.checked_add(offset)) {
            (None, Some(offset)) => self.child().node.driver().preallocate(offset, len),
            _ => Box::pin(std::future::ready(Err(Errno::ENOTSUP))),
        }
    }

    fn options_in_force(&self) -> Options {
        let offset = (self.offset > 0).then(|| ("offset", Value::from(self.offset)));
        let size = self.size.map(|size| ("size", Value::from(size)));
        let given = offset.into_iter().chain(size);
        given.map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_checked_in_qemus_words() {
        let text = |offset, size| check_window(1 << 20, offset, size).map_err(|e| e.to_string());
        assert_eq!(text(0, None), Ok(()));
        assert_eq!(text(1 << 20, None), Ok(()));
        assert_eq!(text(1, Some(512)), Ok(()));
        assert_eq!(text(0, Some(1)).unwrap_err(), "Specified size is not multiple of 512");
        assert_eq!(
            text(2 << 20, Some(512)).unwrap_err(),
            "Offset (2097152) cannot be greater than size of the containing file (1048576)"
        );
        assert_eq!(
            text(512 << 10, Some(1 << 20)).unwrap_err(),
            "The sum of offset (524288) and size (1048576) has to be smaller or equal to the  \
             actual size of the containing file (1048576)"
        );
    }

    #[test]
    fn asks_only_for_what_its_users_do() {
        let ask = |role, node| child_perms(&ChildPermQuery { role, node, read_only: false });
        assert_eq!(ask(Role::Filtered, Perms::NONE), Perms::NONE);
        assert_eq!(ask(Role::Filtered, Perms::device(true)), Perms::device(true));
        let window = ask(Role::Data, Perms::device(true));
        assert_eq!(window.used, Perms::device(true).used);
        assert_eq!(window.shared, Perm::all() - Perm::RESIZE);
    }
}
