//! Makes a server pause between two messages, so that another process may go on where it stopped.
//!
//! Who asks gets a [`Suspended`]. The server's thread answers with all that another server needs, when nothing is in flight any
//! more, and then does nothing at all until it hears a [`Verdict`]. If who asked goes away without one, the thread does what
//! is safe: the one that was serving goes on; the one that has only just been told what to serve ends.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde_json::{Value, json};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::parcel::Parcel;
use crate::err;
use crate::error::Result;

/// What becomes of a server that pauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It serves (on).
    Resume,
    /// Another process does. It ends, and touches nothing any more.
    End,
}

/// How a server is asked.
pub(crate) struct Hold {
    /// Where front ends connect, if they come and go.
    pub(super) listener: Option<UnixListener>,
    event: EventFd,
    ask: Mutex<Option<Ask>>,
}

/// The server's end of a request to pause.
pub(super) struct Ask {
    answer: SyncSender<Result<Parcel>>,
    verdict: Receiver<Verdict>,
}

/// A server that pauses, or will. Dropping it has the safe thing done.
pub struct Suspended {
    answer: Receiver<Result<Parcel>>,
    verdict: SyncSender<Verdict>,
}

/// The two ends of a request.
pub(super) fn ask() -> (Ask, Suspended) {
    // Neither side ever waits for the other to listen.
    let (answer, answers) = sync_channel(1);
    let (verdict, verdicts) = sync_channel(1);
    (Ask { answer, verdict: verdicts }, Suspended { answer: answers, verdict })
}

impl Hold {
    /// Nobody asks.
    ///
    /// # Errors
    /// No descriptors left.
    pub(super) fn new(listener: Option<UnixListener>) -> io::Result<Hold> {
        Ok(Hold {
            listener,
            event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            ask: Mutex::default(),
        })
    }

    /// What another server needs to serve no connection but the next.
    ///
    /// # Errors
    /// No room for more descriptors.
    pub(super) fn parcel(&self) -> Result<Parcel> {
        let mut parcel = Parcel::default();
        let listener = parcel.put_if(self.listener.as_ref().map(AsFd::as_fd))?;
        parcel.body = json!({"listener": listener, "session": Value::Null});
        Ok(parcel)
    }

    /// Readable when somebody asks.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Asks the server to pause.
    ///
    /// # Errors
    /// Cannot be.
    pub(super) fn ask(&self) -> io::Result<Suspended> {
        let (ask, suspended) = ask();
        *self.ask.lock().unwrap_or_else(PoisonError::into_inner) = Some(ask);
        self.event.write(1)?;
        Ok(suspended)
    }

    /// Who asks, on the server's thread.
    pub(super) fn asked(&self) -> Option<Ask> {
        // Nothing to read is nothing lost: who asks writes after it has asked.
        self.event.read().unwrap_or_default();
        self.ask.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Ask {
    /// Gives the answer and waits for the verdict; `otherwise`, if there never is one.
    pub(super) fn settle(self, answer: Result<Parcel>, otherwise: Verdict) -> Verdict {
        // Whoever does not hear it gives no verdict.
        self.answer.send(answer).unwrap_or_default();
        self.verdict.recv().unwrap_or(otherwise)
    }
}

impl Suspended {
    /// The answer, when the server pauses.
    ///
    /// # Errors
    /// It cannot pause now; it does not until `deadline`.
    pub fn wait(&self, deadline: Instant) -> Result<Parcel> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.answer.recv_timeout(left).unwrap_or_else(|e| match e {
            RecvTimeoutError::Timeout => {
                Err(err!("a message or requests in flight do not come to their end"))
            }
            RecvTimeoutError::Disconnected => Err(err!("its server has ended")),
        })
    }

    /// It serves (on).
    pub fn resume(self) {
        self.verdict.send(Verdict::Resume).unwrap_or_default();
    }

    /// Another process serves; it ends.
    pub fn end(self) {
        self.verdict.send(Verdict::End).unwrap_or_default();
    }
}
