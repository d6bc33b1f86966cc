//! Tells the guest that the configuration space has changed (a resize): BACKEND_CONFIG_CHANGE_MSG.
//!
//! The message goes over the channel that the front end gave with SET_BACKEND_REQ_FD, never asks for a reply and never
//! waits: QEMU answers it with a GET_CONFIG on the main channel, from the thread that would have to send the reply. A
//! change that cannot be told now (no ring runs: QEMU ignores the message then; no channel yet: cloud-hypervisor
//! gives it last; no front end at all: QEMU does not read the space again when it reconnects) is told later, unless
//! the front end reads the space meanwhile.
//!
//! One lock, taken for a few instructions and one non-blocking system call; nothing else is called under it.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;

use super::message::{self, BACKEND_CONFIG_CHANGE_MSG};
use super::parcel::Parcel;
use super::socket;
use crate::error::Result;

/// What became of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// The front end was told.
    Now,
    /// It will be told when its rings run.
    Later,
    /// Its rings run and it gave no channel: the operator must do something (Firecracker: `PATCH /drives/{id}`).
    NoChannel,
}

/// The sender. Shared between the session, which knows the channel, and whoever changes the configuration space.
#[derive(Default)]
pub struct ConfigChange {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    channel: Option<UnixStream>,
    /// Whether any ring runs.
    running: bool,
    /// A change that the front end does not know of.
    pending: bool,
}

impl State {
    fn tell(&mut self) -> Told {
        if !self.running {
            return Told::Later;
        }
        let Some(channel) = &self.channel else { return Told::NoChannel };
        match send(channel) {
            Ok(()) => {
                self.pending = false;
                Told::Now
            }
            Err(e) => {
                log::warn!("the channel for configuration changes is unusable: {e}");
                self.channel = None;
                Told::NoChannel
            }
        }
    }

    fn tell_if_pending(&mut self) {
        if self.pending {
            self.tell();
        }
    }
}

fn send(channel: &UnixStream) -> io::Result<()> {
    // Replies that nobody asked for must not fill the socket.
    socket::discard_input(channel.as_fd())?;
    let bytes = message::encode(BACKEND_CONFIG_CHANGE_MSG, 0, &[]);
    match socket::send_now(channel.as_fd(), &bytes) {
        // Full of messages like this one that the front end has not read yet: one of them will do.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
        // Twelve bytes go in one piece or not at all.
        Ok(_) => Ok(()),
        Err(e) => Err(e),
    }
}

impl ConfigChange {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The configuration space has changed: tells the front end, now or when it can hear it. Never blocks.
    pub fn changed(&self) -> Told {
        let mut state = self.state();
        state.pending = true;
        state.tell()
    }

    /// The front end gave its channel.
    pub(super) fn attach(&self, channel: UnixStream) {
        let mut state = self.state();
        state.channel = Some(channel);
        state.tell_if_pending();
    }

    /// The channel, put into `parcel`, and whether a change is still to be told: for [`ConfigChange::load`] elsewhere.
    ///
    /// # Errors
    /// No room for more descriptors.
    pub(super) fn save(&self, parcel: &mut Parcel) -> Result<(Value, bool)> {
        let state = self.state();
        let channel = parcel.put_if(state.channel.as_ref().map(AsFd::as_fd))?;
        Ok((channel, state.pending))
    }

    /// Goes on where another process was.
    pub(super) fn load(&self, channel: Option<OwnedFd>, pending: bool) {
        let mut state = self.state();
        state.channel = channel.map(UnixStream::from);
        state.pending |= pending;
    }

    /// The front end has read the configuration space.
    pub(super) fn seen(&self) {
        self.state().pending = false;
    }

    /// Whether any ring runs.
    pub(super) fn set_running(&self, running: bool) {
        let mut state = self.state();
        if state.running != running {
            state.running = running;
            state.tell_if_pending();
        }
    }

    /// The front end is gone.
    pub(super) fn detach(&self) {
        let mut state = self.state();
        state.channel = None;
        state.running = false;
    }
}
