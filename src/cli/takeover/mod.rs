//! Upgrade in place: a running process (the *predecessor*) hands all that it serves to its *successor*, which may be another
//! version of the program. Guests see a pause; front ends see nothing, for their connections stay as they are.
//!
//! ```text
//!   successor                                    predecessor
//!   connects to --control's socket       ------> looks who it is (same user, or root)
//!   HELLO     versions, pid              ------> refuses, or chooses a version
//!             serves on                <-------- CONFIG   command line, directory, sockets' places, control and metrics sockets, pidfile,
//!                                                         manager
//!   looks at all images, without locks
//!   READY                                ------> tries whether it could open its own images again; then pauses:
//!                                                rings stop (nothing in flight), flush, images closed, locks gone
//!                                      <-------- EXPORT   one for each: listener, connection, session, memory, rings
//!   opens images (locks), maps memory
//!   ACTIVATED                            ------>
//!                                      <-------- GO       the predecessor ends, and removes nothing
//!   rings start
//!   FAILED or the end of the connection, at any moment before GO, either way: the predecessor opens its images and
//!   goes on with everything; the successor ends.
//! ```
//!
//! What must hold:
//!
//! 1. **One owner.** At any moment at most one of the two may touch guest memory, read a front end's stream, or write an image.
//!    The predecessor gives that up before the first EXPORT and never takes it back but after the connection's end was seen:
//!    it shuts down its own side and waits for the other's, however long that takes.
//! 2. **The successor's end of the connection is the last thing it closes**: after it has closed its images. A process that is
//!    killed closes it when its last thread is gone.
//! 3. **GO is the point of no return.** Before it the successor has not started a ring, not answered a message and not
//!    accepted a connection; what it needs for that (memory, images, locks, threads of its servers) it has by then. A
//!    successor that does not hear GO ends, and before it does, makes sure that GO cannot be said any more. A predecessor that has sent GO does nothing but end.
//! 4. **No name changes hands but by GO**: sockets and pidfile stay where they are; before GO only the predecessor would
//!    remove them, after GO only the successor. The pidfile's lock belongs to the open file, which both have.
//! 5. **Between two messages.** A message that has begun is handled by who began; unread ones stay in the stream.
//! 6. **Refuse early.** What can be known to fail (another version, an image that cannot be opened, by either of the two,
//!    requests that failed and wait) fails while guests are served.
//!
//! The predecessor serves while it waits for HELLO and READY, and hears signals all the time: one that ends it ends the
//! attempt. The control socket is asked for (`--control`) because whoever may connect may take guests' memory: it has a
//! place, an owner and a mode (0600), which an abstract or a default one would not have.
#![forbid(unsafe_code)]

pub mod pause;
pub mod predecessor;
pub mod successor;
mod wire;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use super::listen::{self, Place};
use crate::err;
use crate::error::Result;
use crate::sys;
use crate::vhost_user::socket;

/// The versions of the protocol that this program speaks, from and to. A field that a successor must not overlook makes a
/// new version.
const VERSIONS: [u64; 2] = [1, 1];

/// How long the other side may take to say what needs no work.
const TALK_LIMIT: Duration = Duration::from_secs(10);
/// How long a successor may take to look at its images: it holds up nobody.
const PREPARE_LIMIT: Duration = Duration::from_secs(60);
/// How long requests in flight may take: guests wait, but so they would without us.
const PAUSE_LIMIT: Duration = Duration::from_secs(10);
/// How long a successor may take to open its images: guests wait for it.
const ACTIVATE_LIMIT: Duration = Duration::from_secs(20);
/// How often something that keeps guests waiting is tried again, and how often that is said.
const RETRY: Duration = Duration::from_millis(20);
const REPORT: Duration = Duration::from_secs(5);

/// The socket at which successors ask, and what they are told.
pub struct Control {
    listener: std::os::unix::net::UnixListener,
    /// Where it is.
    pub place: Place,
    /// The command line that led to what is served, without the program's name.
    args: Vec<String>,
    /// Where relative paths in it begin.
    directory: PathBuf,
}

impl Control {
    /// A socket that will be at `path` when it is published.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn listen(path: &str, args: &[String]) -> Result<Control> {
        let (listener, place) = listen::at_path(path, Some(0o600))?;
        let directory = std::env::current_dir().map_err(|e| err!("no current directory: {e}"))?;
        listener.set_nonblocking(true).map_err(|e| err!("{path}: {e}"))?;
        Ok(Control { listener, place, args: args.to_vec(), directory })
    }

    /// Gives the socket its name.
    ///
    /// # Errors
    /// It cannot be moved there.
    pub fn publish(&mut self) -> Result<()> {
        self.place.publish()
    }

    /// Readable when somebody connects.
    pub fn listener(&self) -> &std::os::unix::net::UnixListener {
        &self.listener
    }

    /// Leaves the socket where it is.
    pub fn leave(&mut self) {
        self.place.leave();
    }
}

/// Whether the process at the other end may have our guests' memory, or tell us what to do.
///
/// # Errors
/// It acts as neither our user nor root.
fn check_peer(stream: &UnixStream) -> Result<()> {
    match socket::peer_uid(stream) {
        Some(uid) if uid == 0 || uid == sys::effective_uid() => Ok(()),
        Some(uid) => Err(err!("the process at the other end belongs to user {uid}")),
        None => Err(err!("it is not known who is at the other end")),
    }
}

/// A place in words; `successor` reads it.
fn save_place(place: Option<&Place>) -> Value {
    place.map_or(Value::Null, |place| {
        let (path, dev, ino) = place.parts();
        json!({"path": path, "dev": dev, "ino": ino})
    })
}
