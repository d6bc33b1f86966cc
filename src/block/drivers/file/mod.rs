//! `file`: a regular file of the host. Its parts are shared with `host_device`, see [`super::host_device`].
//!
//! * `access`: access mode and image locks, as the node's permissions want them;
//! * `locks`: QEMU's lock bytes;
//! * `align`: what direct I/O demands;
//! * `medium`: the requests.
#![forbid(unsafe_code)]

mod access;
mod align;
mod locks;
mod medium;

use std::fs::{File, Metadata};
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::sync::{Arc, Once};
use std::time::Duration;

use access::{Access, How};
use medium::{Kind, Medium};

use crate::block::perm::default_child_perms;
use crate::block::{Driver, DriverDef, DriverKind, Limits, OpenArgs, Recognises};
use crate::err;
use crate::error::{Errno, Error, Result};
use crate::qapi::{Kind as Type, OptionSpec};
use crate::rt::{self, Engine};

/// The options of `file` and `host_device`, in the order of QEMU's schema.
pub(super) const OPTIONS: &[OptionSpec] = &[
    OptionSpec::required("filename", Type::Str),
    OptionSpec::optional("pr-manager", Type::Str),
    OptionSpec::optional("locking", Type::Enum(&["auto", "on", "off"])),
    OptionSpec::optional("aio", Type::Enum(&["threads", "native", "io_uring"])),
    OptionSpec::optional("aio-max-batch", Type::Int { bits: 64, signed: true }),
    OptionSpec::optional("drop-cache", Type::Bool),
    OptionSpec::optional("x-check-cache-dropped", Type::Bool),
];

/// `file`.
pub static FILE: DriverDef = DriverDef {
    name: "file",
    kind: DriverKind::Protocol,
    options: OPTIONS,
    open: |args| open(args, &REGULAR),
    recognises: Recognises::Path(|_| true),
    child_perms: default_child_perms,
};

/// What one of the drivers that share this code serves.
pub(super) struct Family {
    /// The driver's name.
    pub(super) name: &'static str,
    /// What it wants to find behind the file name, for the error.
    pub(super) wants: &'static str,
    /// Whether it takes this kind of file.
    pub(super) takes: fn(&Metadata) -> bool,
    /// Adds what is known of the medium to the limits.
    pub(super) limits: fn(&Metadata, &mut Limits),
}

static REGULAR: Family = Family {
    name: "file",
    wants: "a regular file",
    takes: Metadata::is_file,
    limits: regular_limits,
};

/// The part of a file system's preferred block that is worth telling a guest: network file systems prefer megabytes.
const PHYSICAL_BLOCK_MAX: u64 = 4096;

fn regular_limits(meta: &Metadata, limits: &mut Limits) {
    let block = std::os::unix::fs::MetadataExt::blksize(meta).min(PHYSICAL_BLOCK_MAX);
    limits.physical_block = u32::try_from(block).unwrap_or(0).max(limits.request_align);
}

/// Options that decide how the file is used, once it is open.
struct Choices {
    locking: Option<bool>,
    aio: Option<Engine>,
}

/// Opens a node of `family`.
///
/// # Errors
/// In QEMU's words.
pub(super) fn open(args: &mut OpenArgs<'_>, family: &Family) -> Result<Box<dyn Driver>> {
    let filename = args.take_str("filename")?.unwrap_or_default();
    if filename.is_empty() {
        return Err(err!("The '{}' block driver requires a file name", family.name));
    }
    let choices = take_choices(args)?;
    let how = How {
        filename,
        read_only: args.in_force.read_only,
        auto_read_only: args.in_force.auto_read_only,
        direct: args.in_force.cache_direct,
    };
    let file = how.open()?;
    if choices.aio == Some(Engine::Native) && !how.direct {
        return Err(err!(
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
        ));
    }
    let meta = file.metadata().map_err(|e| Error::from_errno("Could not stat file", e.into()))?;
    if !(family.takes)(&meta) {
        let (driver, wants) = (family.name, family.wants);
        return Err(err!("'{driver}' driver requires '{}' to be {wants}", how.filename));
    }
    Ok(Box::new(medium(family, how, (&choices, args.graph.lock_patience()), file, &meta)?))
}

fn take_choices(args: &mut OpenArgs<'_>) -> Result<Choices> {
    let aio = match args.take_str("aio")?.as_deref() {
        None => None,
        Some("threads") => Some(Engine::Threads),
        Some("native") => Some(Engine::Native),
        Some("io_uring") => Some(Engine::IoUring),
        Some(word) => return Err(err!("Parameter 'aio' does not accept value '{word}'")),
    };
    let locking = match args.take_str("locking")?.as_deref() {
        None | Some("auto") => None,
        Some("on") => Some(true),
        Some("off") => Some(false),
        Some(word) => return Err(err!("Parameter 'locking' does not accept value '{word}'")),
    };
    // A hint for QEMU's submission loop, and two switches for what it does when a migration ends here: taken, without
    // a meaning for this program.
    args.options.shift_remove("aio-max-batch");
    args.take_bool("drop-cache")?;
    args.take_bool("x-check-cache-dropped")?;
    if let Some(id) = args.take_str("pr-manager")? {
        return Err(err!("No persistent reservation manager with id '{id}'"));
    }
    Ok(Choices { locking, aio })
}

fn medium(
    family: &Family,
    how: How,
    (choices, patience): (&Choices, Duration),
    mut file: File,
    meta: &Metadata,
) -> Result<Medium> {
    let len = file
        .seek(SeekFrom::End(0))
        .map_err(|e| Error::from_errno("Could not refresh total sector count", e.into()))?;
    let alignment = align::probe(&file, len, how.direct);
    let kind = match meta.file_type() {
        t if t.is_block_device() => Kind::Block,
        t if t.is_char_device() => Kind::Char,
        _ => Kind::Regular,
    };
    let mut limits = Limits {
        request_align: alignment.request,
        mem_align: alignment.memory,
        ..Limits::default()
    };
    (family.limits)(meta, &mut limits);
    let engine = engine(choices.aio, rt::uring_available);
    let fd = file.as_raw_fd();
    let locking = choices.locking.unwrap_or_else(|| locks::supported(fd));
    let file = rt::File::new(file.into(), engine, alignment.request, alignment.memory);
    Ok(Medium::new(Arc::new(file), kind, Access::new(how, fd, locking, patience), limits, len))
}

/// The engine for what the user asked for. io_uring, asked for or taken by default, gives way to threads where the
/// machine does not allow it; that is said once.
fn engine(asked: Option<Engine>, uring: impl FnOnce() -> std::result::Result<(), Errno>) -> Engine {
    static SAID: Once = Once::new();
    match asked {
        Some(Engine::Native) => Engine::Native,
        Some(Engine::Threads) => Engine::Threads,
        Some(Engine::IoUring) | None => match uring() {
            Ok(()) => Engine::IoUring,
            Err(errno) => {
                SAID.call_once(|| {
                    log::warn!("io_uring is not available ({errno}): files are served by threads");
                });
                Engine::Threads
            }
        },
    }
}

#[cfg(test)]
mod tests;
