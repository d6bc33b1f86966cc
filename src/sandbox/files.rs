//! Which files may still be opened: Landlock.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use super::{Allow, Right};
use crate::err;
use crate::error::Result;
use crate::sys;

/// The newest rights that we know; an older kernel gets those that it knows.
const NEWEST: ABI = ABI::V7;

/// Restricts the calling thread and those that it will start. `false`: the kernel cannot.
///
/// # Errors
/// If a path of `allow` is not there; what the kernel says.
pub(super) fn restrict(allow: &Allow) -> Result<bool> {
    let failed = |e: RulesetError| err!("cannot enter the sandbox: Landlock: {e}");
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))
        .and_then(|r| r.handle_access(AccessNet::from_all(NEWEST)))
        .and_then(|r| r.scope(Scope::from_all(NEWEST)))
        .and_then(Ruleset::create)
        .map_err(failed)?;
    allow_open_files(&mut rules);
    for (path, right) in &allow.rules {
        let opened = open_path(path)?;
        // A rule for a file must not name what is done with directories.
        let rights = match path.is_dir() {
            true => rights_for(*right),
            false => rights_for(*right) & AccessFs::from_file(NEWEST),
        };
        rules = rules.add_rule(PathBeneath::new(opened, rights)).map_err(failed)?;
    }
    let status = rules.restrict_self().map_err(failed)?;
    if status.ruleset == RulesetStatus::PartiallyEnforced {
        log::info!(
            "the kernel's Landlock is older than version {NEWEST:?}: not everything is forbidden"
        );
    }
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}

fn rights_for(right: Right) -> BitFlags<AccessFs> {
    // A file may turn out to be a device: what may be asked of it is for seccomp to say.
    let read = AccessFs::ReadFile | AccessFs::IoctlDev;
    match right {
        Right::Read => read,
        Right::Write => read | AccessFs::WriteFile | AccessFs::Truncate,
        Right::Remove => AccessFs::RemoveFile.into(),
        Right::All => AccessFs::from_all(NEWEST) & !AccessFs::Execute,
    }
}

fn open_path(path: &Path) -> Result<PathFd> {
    PathFd::new(path).map_err(|e| err!("cannot enter the sandbox: {e}"))
}

/// What is open may be opened again, in the same mode: drivers do so when their node's permissions change. A file that the
/// kernel takes no rule for (it has no place in any tree) stays open, that is all.
fn allow_open_files(rules: &mut RulesetCreated) {
    // Without /proc nothing is opened again either.
    for entry in fs::read_dir("/proc/self/fd").into_iter().flatten().flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        // A descriptor of our own: the number may be closed by now, as that of this very directory will be.
        let Some(file) = number.and_then(|n| sys::dup(n).ok()).map(File::from) else { continue };
        if let Some(rights) = rights_of(&file)
            && let Err(e) = rules.add_rule(PathBeneath::new(file.as_fd(), rights))
        {
            log::debug!("descriptor {number:?}: {e}");
        }
    }
}

/// The rights to open a file in the mode in which it is open; `None` for what has no name or is no file.
fn rights_of(file: &File) -> Option<BitFlags<AccessFs>> {
    let meta = file.metadata().ok()?;
    let device = meta.file_type().is_block_device() || meta.file_type().is_char_device();
    // A memfd and the like have no path: the kernel refuses rules for them.
    let named = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .is_ok_and(|path| path.starts_with("/") && !path.starts_with("/memfd:"));
    if !named || !(meta.is_file() || device) {
        return None;
    }
    let (read, write) = sys::access_mode(file.as_fd()).ok()?;
    let mut rights = BitFlags::empty();
    if read {
        rights |= AccessFs::ReadFile;
    }
    if write {
        rights |= AccessFs::WriteFile | AccessFs::Truncate;
    }
    if device {
        rights |= AccessFs::IoctlDev;
    }
    (read || write).then_some(rights)
}
