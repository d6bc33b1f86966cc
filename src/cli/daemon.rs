//! What a daemon owes the system: going to the background, a pidfile, systemd's notifications.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, PipeReader, PipeWriter, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::{Path, PathBuf};

use crate::error::{Errno, Error, Result};
use crate::sys::{self, Fork};

/// The mask that QEMU's daemons create files with.
const UMASK: u32 = 0o027;

/// What the daemon tells its parent when it is up.
const READY: u8 = 0;

/// Which process this is after [`daemonize`].
pub enum Side {
    /// The one that was started: it ends, with this exit code.
    Parent(u8),
    /// The one that goes on.
    Daemon(Background),
}

/// The daemon's way to say that it is up.
pub struct Background {
    pipe: PipeWriter,
    /// /dev/null: it may be out of reach when it is needed.
    null: File,
}

/// Goes to the background. The parent returns only when the daemon is up, or has failed; until then the daemon writes
/// its errors where the parent would.
///
/// # Errors
/// If the process cannot be forked.
pub fn daemonize() -> io::Result<Side> {
    let (reader, pipe) = io::pipe()?;
    if sys::fork()? == Fork::Parent {
        drop(pipe);
        return Ok(Side::Parent(wait_for_daemon(reader)));
    }
    drop(reader);
    sys::setsid()?;
    // Once more: who does not lead the session cannot get a terminal by accident.
    if sys::fork()? == Fork::Parent {
        sys::exit_now(0);
    }
    sys::umask(UMASK);
    let null = File::options().read(true).write(true).open("/dev/null")?;
    Ok(Side::Daemon(Background { pipe, null }))
}

/// The exit code for what the daemon says.
fn wait_for_daemon(mut reader: PipeReader) -> u8 {
    let mut byte = [1];
    match reader.read_exact(&mut byte) {
        Ok(()) if byte[0] == READY => 0,
        _ => 1,
    }
}

impl Background {
    /// Leaves the terminal, and the directory unless it `stays`, and lets the parent go. What is logged still goes to the
    /// journal, if it has so far.
    ///
    /// # Errors
    /// If that fails.
    pub fn ready(mut self, stays: bool) -> io::Result<()> {
        if !stays {
            std::env::set_current_dir("/")?;
        }
        sys::null_stdio(&self.null, logs_to_journal())?;
        self.pipe.write_all(&[READY])
    }
}

/// Whether systemd's journal reads the standard error: `$JOURNAL_STREAM` has its device and inode (systemd.exec(5)).
fn logs_to_journal() -> bool {
    let stderr = io::stderr().as_fd().try_clone_to_owned().map(File::from);
    let stderr = stderr.and_then(|file| file.metadata());
    let is = |meta: fs::Metadata| format!("{}:{}", meta.dev(), meta.ino());
    std::env::var("JOURNAL_STREAM").ok() == stderr.map(is).ok()
}

/// The file with the number of the process. Dropping it removes it.
pub struct Pidfile {
    path: PathBuf,
    file: File,
    /// Somebody else removes it.
    left: bool,
}

impl Pidfile {
    /// Makes and locks the file.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn lock(path: &str) -> Result<Pidfile> {
        loop {
            let file = File::options()
                .create(true)
                .write(true)
                .truncate(false)
                .mode(0o600)
                .open(path)
                .map_err(|e| no_pidfile(&format!("Could not create '{path}'"), e))?;
            sys::lock_exclusively(&file).map_err(|e| no_pidfile("Cannot lock pid file", e))?;
            // Its former owner may have removed it between the two steps.
            if !is_at(&file, path) {
                continue;
            }
            let path =
                std::path::absolute(path).map_err(|e| no_pidfile("Cannot find pid file", e))?;
            return Ok(Pidfile { path, file, left: false });
        }
    }

    /// A predecessor's file, which is locked as long as one of us lives.
    pub fn adopt(path: PathBuf, file: File) -> Pidfile {
        Pidfile { path, file, left: false }
    }

    /// Leaves it to a successor.
    pub fn leave(&mut self) {
        self.left = true;
    }

    /// What [`Pidfile::adopt`] needs.
    pub fn parts(&self) -> (&Path, &File) {
        (&self.path, &self.file)
    }

    /// Writes the number of the process.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn fill(&mut self) -> Result<()> {
        // A successor has the offset of who wrote before it.
        let emptied = self.file.rewind().and_then(|()| self.file.set_len(0));
        emptied.map_err(|e| no_pidfile("Failed to truncate pid file", e))?;
        writeln!(self.file, "{}", std::process::id())
            .map_err(|e| no_pidfile("Failed to write pid file", e))
    }
}

impl Pidfile {
    /// Gives the file to a user and a group, as far as they are given.
    ///
    /// # Errors
    /// Without the right to.
    pub fn give_to(&self, (user, group): (Option<u32>, Option<u32>)) -> Result<()> {
        fchown(&self.file, user, group).map_err(|e| no_pidfile("Cannot give pid file away", e))
    }

    /// The directory that it is in.
    pub fn dir(&self) -> Option<&Path> {
        self.path.parent()
    }
}

fn no_pidfile(what: &str, e: io::Error) -> Error {
    Error::from_errno(format!("cannot create PID file: {what}"), Errno::from(e))
}

/// Whether `path` leads to `file`.
fn is_at(file: &File, path: &str) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.dev() == b.dev() && a.ino() == b.ino(),
        _ => false,
    }
}

impl Drop for Pidfile {
    fn drop(&mut self) {
        // While it is locked nobody else uses the name.
        if !self.left
            && let Err(e) = fs::remove_file(&self.path)
        {
            log::warn!("cannot remove {}: {e}", self.path.display());
        }
    }
}

/// The service manager, if there is one.
pub struct Manager {
    socket: Option<UnixDatagram>,
}

impl Manager {
    /// Connects to it: later it may be out of reach. Whoever was not told where it is (`$NOTIFY_SOCKET`: a shell's children,
    /// and by default what `ExecReload=` starts) has its `predecessor`'s connection, or else the next successor could not be
    /// announced, and would be taken for left over.
    pub fn connect(predecessor: Option<OwnedFd>) -> Manager {
        let name = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty());
        let Some(name) = name else { return Manager { socket: predecessor.map(Into::into) } };
        let connected = connect(name.as_encoded_bytes());
        let failed = |e| log::warn!("cannot notify the service manager: {e}");
        Manager { socket: connected.map_err(failed).ok() }
    }

    /// The connection, for a successor.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Tells it `state` (`READY=1`, `STOPPING=1`).
    pub fn notify(&self, state: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(e) = socket.send(state.as_bytes()) {
            log::warn!("cannot notify the service manager: {e}");
        }
    }
}

fn connect(socket: &[u8]) -> io::Result<UnixDatagram> {
    let address = match socket.split_first() {
        Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(String::from_utf8_lossy(socket).as_ref())?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pidfiles_are_locked_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let text = path.to_str().unwrap();
        fs::write(&path, "1234567890\n").unwrap();
        let mut pidfile = Pidfile::lock(text).unwrap();
        pidfile.fill().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        let Err(error) = Pidfile::lock(text) else { panic!("locked twice") };
        assert_eq!(
            error.message(),
            "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable"
        );
        drop(pidfile);
        assert!(!path.exists());
    }

    #[test]
    fn notifications_arrive() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n");
        let receiver = UnixDatagram::bind(&path).unwrap();
        let send = |name: &[u8], state| {
            Manager { socket: Some(connect(name).unwrap()) }.notify(state);
        };
        send(path.as_os_str().as_encoded_bytes(), "READY=1");
        let mut buffer = [0; 16];
        let n = receiver.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"READY=1");
        let name = format!("vub-test-{}", std::process::id());
        let receiver =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        send(format!("@{name}").as_bytes(), "STOPPING=1");
        assert_eq!(receiver.recv(&mut buffer).unwrap(), 10);
    }
}
