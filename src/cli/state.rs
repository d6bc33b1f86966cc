//! `--state-dir`: where things are that must outlive the process, but not the machine's next boot.
//!
//! Not systemd's `$RUNTIME_DIRECTORY` by default: unless the unit says `RuntimeDirectoryPreserve=restart`, it goes when the
//! service dies, which is what this is for.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use crate::sys;

/// What it means to have none.
pub const WEAKER: &str = "writes to qcow2 images that were acknowledged and not flushed do not survive \
     a crash of this program";

/// The directory: what the user says, else the first of the usual ones that can be written to; `None`: none, or not wanted.
/// A usual one is ours alone, and `owner`'s, who is to be the user of this process (`--user`).
pub fn dir(given: Option<&str>, owner: Option<u32>) -> Option<PathBuf> {
    match given {
        Some("none") => return None,
        // What cannot be used is said when it is needed, with the node's name.
        Some(dir) => return Some(std::path::absolute(dir).unwrap_or_else(|_| dir.into())),
        None => {}
    }
    let owner = owner.unwrap_or_else(sys::effective_uid);
    let name = match owner {
        0 => "vhost-user-blk".into(),
        uid => format!("vhost-user-blk-{uid}"),
    };
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    let usual = [runtime.map(PathBuf::from), Some("/run".into()), Some("/dev/shm".into())];
    usual.into_iter().flatten().map(|dir| dir.join(&name)).find(|dir| is_ours(dir, owner))
}

/// Whether `dir` is there, or could be made, and nobody but its owner and root can put anything into it: what lies there is
/// believed. That a file can be made is tried: permissions do not tell of a file system that is read-only.
fn is_ours(dir: &Path, owner: u32) -> bool {
    // If it is there already, the next lines say what it is.
    let _ = DirBuilder::new().mode(0o700).create(dir);
    let Ok(found) = fs::symlink_metadata(dir) else { return false };
    if !found.is_dir()
        || found.mode() & 0o022 != 0
        || ![owner, sys::effective_uid()].contains(&found.uid())
    {
        return false;
    }
    let probe = dir.join(format!(".probe-{}", std::process::id()));
    let made = fs::OpenOptions::new().write(true).create_new(true).open(&probe).is_ok();
    made && fs::remove_file(&probe).is_ok()
        && (owner == found.uid() || chown(dir, Some(owner), None).is_ok())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_the_user_says_counts() {
        assert_eq!(dir(Some("none"), None), None);
        assert_eq!(dir(Some("/x/y"), None), Some(PathBuf::from("/x/y")));
    }

    #[test]
    fn nobody_else_writes_there() {
        let me = sys::effective_uid();
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("d");
        assert!(is_ours(&dir, me), "made");
        assert!(is_ours(&dir, me), "there");
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o770)).unwrap();
        assert!(!is_ours(&dir, me), "a group's");
        fs::remove_dir(&dir).unwrap();
        std::os::unix::fs::symlink(place.path(), &dir).unwrap();
        assert!(!is_ours(&dir, me), "somewhere else");
        assert!(!is_ours(Path::new("/proc/vhost-user-blk"), me), "no place for directories");
    }
}
