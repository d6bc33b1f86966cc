//! Journals that nobody can need any more.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::{BOOT, DEV, FIRST, INO, MAGIC, PATH, PATH_LEN, boot, id_of, is_ours};

/// Removes what nobody can need from `dir`: journals, and copies of them, of images that are gone, or of an earlier boot.
pub fn sweep(dir: &Path) {
    let (Ok(names), Ok(boot)) = (fs::read_dir(dir), boot()) else { return };
    for path in names.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let ours = name.starts_with("vhost-user-blk-")
            && (name.ends_with(".journal") || name.ends_with(".rejected"));
        if ours && is_stale(&path, boot).is_ok_and(|stale| stale) {
            let done = fs::remove_file(&path);
            log::info!("qcow2: {} is of no use any more: removed: {done:?}", path.display());
        }
    }
}

fn is_stale(path: &Path, boot: [u64; 2]) -> io::Result<bool> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let meta = file.metadata()?;
    let mut bytes = vec![0; FIRST * 8];
    if !is_ours(&meta) || file.try_lock().is_err() {
        return Ok(false);
    }
    file.read_exact_at(&mut bytes, 0)?;
    let word = |at: usize| bytes[at * 8..][..8].try_into().map_or(0, u64::from_ne_bytes);
    if word(0) != MAGIC {
        return Ok(false);
    }
    if [word(BOOT), word(BOOT + 1)] != boot {
        return Ok(true);
    }
    let len = usize::try_from(word(PATH_LEN)).unwrap_or(usize::MAX);
    let Some(image) = bytes[PATH * 8..].get(..len).filter(|image| !image.is_empty()) else {
        return Ok(false);
    };
    match fs::metadata(OsStr::from_bytes(image)) {
        Ok(meta) => Ok(id_of(&meta) != (word(DEV), word(INO))),
        Err(e) => Ok(e.kind() == io::ErrorKind::NotFound),
    }
}
