//! Sockets to serve on: made at a path, in the abstract name space, or inherited as descriptors.
//!
//! A path changes hands in one step, and late: the socket is bound under a temporary name beside it, and renamed over
//! what was there when everything else has succeeded. A front end which retries finds the old socket or the new one,
//! never nothing; and a start that fails takes no socket away from who has it.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::err;
use crate::error::{Errno, Error, Result};
use crate::sys;
use crate::vhost_user::Endpoint;

/// The longest path of a Unix socket, in bytes (`sun_path`; it need not end with a zero).
const PATH_MAX: usize = 108;

/// The first inherited descriptor of systemd's protocol.
const LISTEN_FDS_START: i32 = 3;

/// A listening socket's place in the file system: a temporary one, until it is published. Dropping it removes it,
/// unless somebody else has taken the place.
#[derive(Debug)]
pub struct Place {
    /// Where it shall be; `None`: it is there.
    goal: Option<PathBuf>,
    /// Where it is.
    path: PathBuf,
    dev: u64,
    ino: u64,
}

impl Place {
    /// Moves the socket to its path, over what is there.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn publish(&mut self) -> Result<()> {
        let Some(goal) = self.goal.take() else { return Ok(()) };
        fs::rename(&self.path, &goal)
            .map_err(|e| failed(format!("Failed to bind socket to {}", goal.display()), &e))?;
        self.path = goal;
        Ok(())
    }
}

impl Place {
    /// Gives the socket to a user and a group, as far as they are given.
    ///
    /// # Errors
    /// EPERM without the right to (CAP_CHOWN), and what else the kernel says.
    pub fn give_to(&self, (user, group): (Option<u32>, Option<u32>)) -> Result<()> {
        lchown(&self.path, user, group)
            .map_err(|e| failed(format!("cannot give socket {} away", self.path.display()), &e))
    }

    /// The directory that the socket is, or will be, in.
    pub fn dir(&self) -> Option<&Path> {
        self.path.parent()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|now| now.dev() == self.dev && now.ino() == self.ino);
        if ours && let Err(e) = fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

/// `context: strerror`.
fn failed(context: String, error: &io::Error) -> Error {
    let errno = match error.kind() {
        // What the standard library refuses by itself has no number.
        _ if error.raw_os_error().is_none() => return err!("{context}: {error}"),
        _ => Errno(error.raw_os_error().unwrap_or_default()),
    };
    Error::from_errno(context, errno)
}

/// Listens at what will be `path` when it is published, with permissions `mode` if given (else as the umask leaves
/// them).
///
/// # Errors
/// In QEMU's words; and if something is at `path` that is no socket (QEMU removes it).
pub fn at_path(path: &str, mode: Option<u32>) -> Result<(UnixListener, Place)> {
    if path.len() > PATH_MAX {
        return Err(too_long(path, PATH_MAX));
    }
    if path.is_empty() {
        // QEMU listens at a random path that it tells nobody.
        return Err(err!("Failed to bind socket to '': no path given"));
    }
    let bind_failed = |e: io::Error| failed(format!("Failed to bind socket to {path}"), &e);
    let unlink_failed = |e: io::Error| failed(format!("Failed to unlink socket {path}"), &e);
    let occupied = match fs::symlink_metadata(path) {
        Ok(there) if there.is_dir() => {
            return Err(unlink_failed(io::Error::from_raw_os_error(libc::EISDIR)));
        }
        Ok(there) if !there.file_type().is_socket() => {
            return Err(err!("Failed to bind socket to {path}: exists and is not a socket"));
        }
        Ok(_) => true,
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(e) => return Err(unlink_failed(e)),
    };
    let replace_failed = |e| if occupied { unlink_failed(e) } else { bind_failed(e) };
    // Absolute, for a daemon changes its directory.
    let path = std::path::absolute(path).map_err(bind_failed)?;
    bind_beside(path, mode).map_err(replace_failed)
}

/// Binds to a temporary name in the directory of `goal`.
fn bind_beside(goal: PathBuf, mode: Option<u32>) -> io::Result<(UnixListener, Place)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let Some(dir) = goal.parent() else { return Err(io::Error::from_raw_os_error(libc::EISDIR)) };
    // Unique among processes, and among the exports of one that have the same path.
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = dir.join(format!(".vhost-user-blk.{}.{count}", std::process::id()));
    let listener = bind_anywhere(dir, &path)?;
    let there = fs::symlink_metadata(&path)?;
    let place = Place { goal: Some(goal), path, dev: there.dev(), ino: there.ino() };
    if let Some(mode) = mode {
        fs::set_permissions(&place.path, fs::Permissions::from_mode(mode))?;
    }
    Ok((listener, place))
}

/// Binds to `path`, which is in `dir`, however long it is.
fn bind_anywhere(dir: &Path, path: &Path) -> io::Result<UnixListener> {
    // A process that had our number may have died here.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    if path.as_os_str().len() < PATH_MAX {
        return UnixListener::bind(path);
    }
    let dir =
        fs::File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(dir)?;
    let name = path.file_name().unwrap_or_default();
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    UnixListener::bind(short)
}

/// Listens at `name` in the abstract name space; without `tight` the name is padded with zeroes.
///
/// # Errors
/// In QEMU's words.
pub fn at_abstract(name: &str, tight: bool) -> Result<UnixListener> {
    if name.len() > PATH_MAX - 1 {
        return Err(too_long(name, PATH_MAX - 1));
    }
    let mut bytes = name.as_bytes().to_vec();
    if !tight {
        bytes.resize(PATH_MAX - 1, 0);
    }
    SocketAddr::from_abstract_name(bytes)
        .and_then(|address| UnixListener::bind_addr(&address))
        .map_err(|e| failed(format!("Failed to bind socket to {name}"), &e))
}

fn too_long(path: &str, max: usize) -> Error {
    err!("UNIX socket path '{path}' is too long")
        .with_hint(format!("Path must be less than {max} bytes"))
}

/// The socket that `addr.str` names: a descriptor's number, or a name that systemd gave one (LISTEN_FDNAMES).
///
/// # Errors
/// In QEMU's words.
pub fn inherited(text: &str) -> Result<UnixListener> {
    let fd = inherited_socket(text)?;
    sys::listen(fd.as_fd(), 1).map_err(|e| failed("Failed to listen on fd socket".into(), &e))?;
    Ok(UnixListener::from(fd))
}

/// The socket with the number `text`, told by the kernel to be listening or connected.
///
/// # Errors
/// In QEMU's words.
pub fn inherited_endpoint(text: &str) -> Result<Endpoint> {
    let fd = inherited_socket(text)?;
    match sys::is_listening(fd.as_fd()) {
        Ok(true) => Ok(Endpoint::Listener(UnixListener::from(fd))),
        Ok(false) => {
            let stream = UnixStream::from(fd);
            match stream.peer_addr() {
                Ok(_) => Ok(Endpoint::Connected(stream)),
                Err(_) => Err(err!("File descriptor '{text}' neither listens nor is connected")),
            }
        }
        Err(e) => Err(failed(format!("File descriptor '{text}'"), &e)),
    }
}

fn inherited_socket(text: &str) -> Result<OwnedFd> {
    let number = match parse_fd(text) {
        Ok(number) => number,
        Err(e) => systemd_fd(text).ok_or(e)?,
    };
    let no_socket = || err!("File descriptor '{text}' is not a socket");
    let fd = sys::dup(number).map_err(|_| no_socket())?;
    match sys::is_unix_socket(fd.as_fd()) {
        Err(_) => Err(no_socket()),
        Ok(false) => Err(err!("File descriptor '{text}' is not a Unix socket")),
        Ok(true) => Ok(fd),
    }
}

/// A decimal number that fits an `int`.
fn parse_fd(text: &str) -> Result<i32> {
    let error = || err!("Unable to parse FD number {text}");
    let digits = text.trim_start();
    let body = digits.strip_prefix(['-', '+']).unwrap_or(digits);
    if body.is_empty() || !body.bytes().all(|b| b.is_ascii_digit()) {
        return Err(error());
    }
    // All digits: what remains to go wrong is the range.
    digits.parse().map_err(|_| {
        Error::from_errno(format!("Unable to parse FD number {text}"), Errno(libc::ERANGE))
    })
}

/// What systemd passed: the names, and how many descriptors.
static SYSTEMD: OnceLock<(String, i32)> = OnceLock::new();

/// Takes note of the descriptors that systemd passed to this process. To be called before the process forks, for they
/// are meant for one process number.
pub fn note_systemd() {
    let var = |key: &str| std::env::var(key).ok();
    if var("LISTEN_PID").and_then(|pid| pid.parse().ok()) != Some(std::process::id()) {
        return;
    }
    let count = var("LISTEN_FDS").and_then(|n| n.parse().ok()).unwrap_or(0);
    let _ = SYSTEMD.set((var("LISTEN_FDNAMES").unwrap_or_default(), count));
}

/// The descriptor that systemd passed under `name`.
fn systemd_fd(name: &str) -> Option<i32> {
    let (names, count) = SYSTEMD.get()?;
    find_name(names, *count, name)
}

/// The descriptor of `name` in the colon-separated `names` of `count` descriptors.
fn find_name(names: &str, count: i32, name: &str) -> Option<i32> {
    let fds = LISTEN_FDS_START..LISTEN_FDS_START.checked_add(count)?;
    names.split(':').zip(fds).find(|(given, _)| *given == name).map(|(_, fd)| fd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_replaced_and_removed_only_if_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let text = path.to_str().unwrap();
        let (_one, mut first) = at_path(text, Some(0o600)).unwrap();
        assert!(!path.exists());
        first.publish().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let (_two, mut second) = at_path(text, None).unwrap();
        let (_three, third) = at_path(text, None).unwrap();
        drop(third);
        assert!(path.exists(), "the first one's");
        second.publish().unwrap();
        drop(first);
        assert!(path.exists(), "the second one's");
        drop(second);
        assert!(!path.exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn paths_of_every_length() {
        let dir = tempfile::tempdir().unwrap();
        for len in 90..=PATH_MAX {
            let path = dir.path().to_str().unwrap().to_string() + "/";
            let path = format!("{path}{}", "p".repeat(len - path.len()));
            let (_listener, mut place) = at_path(&path, Some(0o660)).unwrap();
            place.publish().unwrap();
            assert!(Path::new(&path).exists());
            drop(place);
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        let e = at_path(&"p".repeat(109), None).unwrap_err();
        assert_eq!(e.hint(), Some("Path must be less than 108 bytes"));
    }

    #[test]
    fn files_are_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        fs::write(&path, "precious").unwrap();
        let e = at_path(path.to_str().unwrap(), None).unwrap_err();
        assert!(e.message().ends_with("exists and is not a socket"), "{e}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let e = at_path(dir.path().to_str().unwrap(), None).unwrap_err();
        assert!(e.message().ends_with(": Is a directory"), "{e}");
    }

    #[test]
    fn descriptor_numbers() {
        assert_eq!(parse_fd("7").unwrap(), 7);
        assert_eq!(parse_fd("-1").unwrap(), -1);
        for (text, expected) in [
            ("", "Unable to parse FD number "),
            ("x", "Unable to parse FD number x"),
            ("1x", "Unable to parse FD number 1x"),
            ("99999999999", "Unable to parse FD number 99999999999: Numerical result out of range"),
        ] {
            assert_eq!(parse_fd(text).unwrap_err().message(), expected);
        }
    }

    #[test]
    fn systemds_names() {
        assert_eq!(find_name("a:b:c", 3, "b"), Some(4));
        assert_eq!(find_name("a:b:c", 1, "b"), None);
        assert_eq!(find_name("a", i32::MAX, "a"), None);
    }
}
