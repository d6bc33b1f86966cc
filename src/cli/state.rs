//! `--state-dir`: where things are that must outlive the process, but not the machine's next boot.
//!
//! Not systemd's `$RUNTIME_DIRECTORY` by default: unless the unit says `RuntimeDirectoryPreserve=restart`, it goes when the
//! service dies, which is what this is for.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// What it means to have none.
pub const WEAKER: &str = "writes to qcow2 images that were acknowledged and not flushed do not survive \
     a crash of this program";
/// For the system's daemons.
const SYSTEM: &str = "/run/vhost-user-blk";

/// The directory: what the user says, else the first of the usual ones that can be written to; `None`: none, or not wanted.
pub fn dir(given: Option<&str>) -> Option<PathBuf> {
    match given {
        Some("none") => return None,
        // What cannot be used is said when it is needed, with the node's name.
        Some(dir) => return Some(PathBuf::from(dir)),
        None => {}
    }
    let _ = DirBuilder::new().mode(0o700).create(SYSTEM);
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    let usual = [runtime.map(PathBuf::from), Some(SYSTEM.into()), Some("/dev/shm".into())];
    usual.into_iter().flatten().find(|dir| is_writable(dir))
}

/// Tried: permissions do not tell of a file system that is read-only.
fn is_writable(dir: &Path) -> bool {
    let probe = dir.join(format!(".vhost-user-blk-{}", std::process::id()));
    let made = fs::OpenOptions::new().write(true).create_new(true).open(&probe).is_ok();
    made && fs::remove_file(&probe).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_user_says_counts() {
        assert_eq!(dir(Some("none")), None);
        assert_eq!(dir(Some("/x/y")), Some(PathBuf::from("/x/y")));
        assert!(dir(None).is_some_and(|dir| is_writable(&dir)));
        assert!(!is_writable(Path::new("/proc")));
    }
}
