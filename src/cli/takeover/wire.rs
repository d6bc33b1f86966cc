//! The frames between predecessor and successor.
//!
//! Four little-endian words (magic, kind, bytes of the document, number of files); one byte for each [`FILES_EACH`] files,
//! which carries them; the document, in JSON. That much holds for all versions, so that any two can tell each other why not.
#![forbid(unsafe_code)]

use std::io::{ErrorKind, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use serde_json::{Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::predecessor::end_signal;
use super::{REPORT, RETRY, TALK_LIMIT};
use crate::err;
use crate::error::Result;
use crate::sys::{self, Signals};
use crate::vhost_user::parcel::Parcel;
use crate::vhost_user::socket::{Incoming, receive_some};

/// "vubT".
const MAGIC: u32 = u32::from_le_bytes(*b"vubT");
const HEADER_LEN: usize = 16;
/// The longest document, in bytes: 16 queues and 509 regions need some 100 KiB.
const DOCUMENT_MAX: usize = 16 << 20;
/// The most files of a frame: 509 regions, three for each of 256 queues, a few more.
const FILES_MAX: usize = 4096;
/// Files in one `sendmsg`; the kernel's limit is 253.
const FILES_EACH: usize = 200;

/// What a frame says; see the [module above](super).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Hello = 1,
    Config = 2,
    Ready = 3,
    Export = 4,
    Activated = 5,
    Go = 6,
    Failed = 7,
}

/// The other process.
pub(super) struct Peer {
    stream: UnixStream,
}

impl Peer {
    /// The one at the other end of `stream`.
    pub(super) fn new(stream: UnixStream) -> Result<Peer> {
        // Who does not read must not keep us from serving.
        let set = stream.set_nonblocking(false).and(stream.set_write_timeout(Some(TALK_LIMIT)));
        set.map_err(|e| err!("{e}"))?;
        Ok(Peer { stream })
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// The other process has gone, or does not listen.
    pub(super) fn send(&mut self, kind: Kind, parcel: &Parcel) -> Result<()> {
        let document = parcel.body.to_string();
        let files: Vec<RawFd> = parcel.files().map(AsRawFd::as_raw_fd).collect();
        if document.len() > DOCUMENT_MAX || files.len() > FILES_MAX {
            return Err(err!("{} bytes and {} files are too many", document.len(), files.len()));
        }
        let lens = [document.len(), files.len()].map(|n| u32::try_from(n).expect("limited"));
        let header = [MAGIC, kind as u32, lens[0], lens[1]].map(u32::to_le_bytes).concat();
        let gone = |e: &dyn std::fmt::Display| err!("cannot reach the other process: {e}");
        if files.is_empty() {
            // In one piece: what is short has been said wholly, or not at all.
            let whole = [&header, document.as_bytes()].concat();
            return self.stream.write_all(&whole).map_err(|e| gone(&e));
        }
        self.stream.write_all(&header).map_err(|e| gone(&e))?;
        for some in files.chunks(FILES_EACH) {
            self.stream.send_with_fds(&[&[0u8][..]], some).map_err(|e| gone(&e))?;
        }
        self.stream.write_all(document.as_bytes()).map_err(|e| gone(&e))
    }

    /// Receives a frame of this kind, by `deadline`, unless `signals` become readable first.
    ///
    /// # Errors
    /// It does not come; the other process has gone, or says that it has failed; something else came.
    pub(super) fn expect(
        &mut self,
        kind: Kind,
        deadline: Instant,
        signals: Option<BorrowedFd<'_>>,
    ) -> Result<Parcel> {
        let mut header = [0; HEADER_LEN];
        let mut incoming = Incoming::default();
        self.fill(&mut header, &mut incoming, (deadline, signals))?;
        let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|k| header[4 * i + k]));
        let [bytes, files] = [word(2), word(3)].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        if word(0) != MAGIC || bytes > DOCUMENT_MAX || files > FILES_MAX {
            return Err(err!("the other process does not speak this protocol"));
        }
        for _ in 0..files.div_ceil(FILES_EACH) {
            self.fill(&mut [0], &mut incoming, (deadline, signals))?;
        }
        let mut document = vec![0; bytes];
        self.fill(&mut document, &mut incoming, (deadline, signals))?;
        if incoming.fds.len() != files {
            return Err(err!("{} of {files} files have come", incoming.fds.len()));
        }
        let body: Value =
            serde_json::from_slice(&document).map_err(|e| err!("the other process: {e}"))?;
        if word(1) == Kind::Failed as u32 {
            let why = body["error"].as_str().unwrap_or("without a reason");
            return Err(err!("the other process has failed: {why}"));
        }
        if word(1) != kind as u32 {
            return Err(err!("the other process sent {}, not {kind:?}", word(1)));
        }
        Ok(Parcel::received(body, incoming.fds))
    }

    fn fill(
        &self,
        buf: &mut [u8],
        incoming: &mut Incoming,
        (deadline, signals): (Instant, Option<BorrowedFd<'_>>),
    ) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let sources: Vec<_> = std::iter::once(self.stream.as_fd()).chain(signals).collect();
            match sys::wait_readable(&sources, Some(deadline)) {
                Ok(Some(0)) => {}
                Ok(Some(_)) => return Err(err!("a signal came first")),
                Ok(None) => return Err(err!("the other process does not answer in time")),
                Err(e) => return Err(err!("{e}")),
            }
            match receive_some(self.stream.as_fd(), &mut buf[done..], incoming) {
                Ok(0) => return Err(err!("the other process has gone")),
                Ok(n) => done += n,
                Err(e) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&e.kind()) => {}
                Err(e) => return Err(err!("the other process has gone: {e}")),
            }
            if incoming.fds.len() > FILES_MAX {
                return Err(err!("too many files"));
            }
        }
        Ok(())
    }

    /// Waits for GO. Whatever ends the wait, both sides agree on whether it was said: before this one gives up, it makes sure
    /// that the other can say nothing more, and looks again.
    ///
    /// # Errors
    /// It was not said, and never will be.
    pub(super) fn expect_go(&mut self, signals: BorrowedFd<'_>) -> Result<()> {
        let deadline = Instant::now() + TALK_LIMIT;
        if !matches!(
            sys::wait_readable(&[self.stream.as_fd(), signals], Some(deadline)),
            Ok(Some(0))
        ) {
            self.stream.shutdown(Shutdown::Both).unwrap_or_default();
        }
        self.expect(Kind::Go, Instant::now() + TALK_LIMIT, None).map(drop)
    }

    /// Says why it goes no further, to whoever still listens.
    pub(super) fn fail(&mut self, why: &str) {
        let body = json!({"error": why});
        if let Err(e) = self.send(Kind::Failed, &body.into()) {
            log::debug!("{e}");
        }
    }

    /// Says nothing more, and waits until the other process has closed its end; or until a signal ends the program.
    pub(super) fn wait_until_gone(&self, signals: &Signals) -> Option<u32> {
        self.stream.shutdown(Shutdown::Write).unwrap_or_default();
        let (mut waste, mut incoming) = ([0; 4096], Incoming::default());
        loop {
            let report = Instant::now() + REPORT;
            match sys::wait_readable(&[self.stream.as_fd(), signals.as_fd()], Some(report)) {
                Ok(Some(0)) => {}
                Ok(None) => {
                    log::error!("guests wait for a successor that has failed to end: kill it");
                    continue;
                }
                Ok(Some(_)) => match end_signal(signals) {
                    Some(signal) => return Some(signal),
                    None => continue,
                },
                Err(e) => {
                    log::error!("take-over: {e}");
                    std::thread::sleep(RETRY);
                    continue;
                }
            }
            match receive_some(self.stream.as_fd(), &mut waste, &mut incoming) {
                Ok(1..) => incoming.fds.clear(),
                Err(e) if [ErrorKind::WouldBlock, ErrorKind::Interrupted].contains(&e.kind()) => {}
                Ok(0) | Err(_) => return None,
            }
        }
    }
}
