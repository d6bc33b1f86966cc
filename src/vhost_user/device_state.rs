//! The device's state in a snapshot or a migration: SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE.
//!
//! It is small, because front ends keep rings, memory and features themselves: what is left is whether the guest chose a
//! write-back cache. Little-endian: magic, version, the length of what follows; in version 1, one byte and seven zeroes.
//! Saving is one write that fits into any pipe and never waits. Loading reads on a thread of its own, as front ends write after
//! our answer, and some more than a pipe holds; what it reads is limited, and the thread ends with the transfer.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Device;
use super::socket::{self, Woken};
use crate::err;
use crate::error::Result;
use crate::sys;
use crate::virtio::blk::CONFIG_WCE;

/// The first bytes.
const MAGIC: [u8; 8] = *b"vub-blk\n";
/// The version written, and the newest read.
const VERSION: u32 = 1;
/// The bytes of version 1 after the header.
const BODY_LEN: usize = 8;
/// Magic, version, length.
const HEADER_LEN: usize = 16;
/// The bytes of version 1.
const LEN: usize = HEADER_LEN + BODY_LEN;
/// The most bytes read: no version will need more.
const LEN_MAX: usize = 4096;
/// How long the front end may take from CHECK_DEVICE_STATE on, when it has closed its end already.
const LOAD_LIMIT: Duration = Duration::from_secs(2);
/// How long a transfer may pause, in milliseconds: state comes over a network.
const PAUSE_MAX_MS: u16 = 60_000;

/// A transfer, from SET_DEVICE_STATE_FD to CHECK_DEVICE_STATE.
pub(super) enum Transfer {
    /// Written.
    Saved,
    /// Being read.
    Loading(Loading),
}

/// Reads a state; dropping it ends that.
pub(super) struct Loading {
    stop: Arc<EventFd>,
    read: Receiver<Result<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Loading {
    fn drop(&mut self) {
        // The counter is nowhere near its end.
        self.stop.write(1).unwrap_or_default();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap_or_default();
        }
    }
}

impl Transfer {
    /// Writes the state of `device` to `to`, and closes it.
    ///
    /// # Errors
    /// Whoever is at the other end does not take it now.
    pub(super) fn save(device: &dyn Device, to: OwnedFd) -> Result<Transfer> {
        let mut wce = [0];
        device.read_config(CONFIG_WCE, &mut wce);
        sys::set_nonblocking(to.as_fd()).map_err(|e| err!("the descriptor for the state: {e}"))?;
        let bytes = encode(wce[0] & 1);
        match File::from(to).write(&bytes) {
            Ok(n) if n == bytes.len() => Ok(Transfer::Saved),
            Ok(n) => Err(err!("the state is cut short: {n} bytes")),
            Err(e) => Err(err!("the state cannot be written: {e}")),
        }
    }

    /// Begins to read a state from `from`.
    ///
    /// # Errors
    /// No descriptors or threads are left.
    pub(super) fn load(from: OwnedFd) -> Result<Transfer> {
        let fail = |e: std::io::Error| err!("the state cannot be read: {e}");
        sys::set_nonblocking(from.as_fd()).map_err(fail)?;
        let stop = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(fail)?);
        let (result, read) = sync_channel(1);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("vhost-state".into()).spawn(move || {
            // Closed before anybody hears the result: a front end that writes more hears of it.
            let bytes = read_to_end(File::from(from), &stopped);
            result.send(bytes).unwrap_or_default();
        });
        let thread = Some(thread.map_err(fail)?);
        Ok(Transfer::Loading(Loading { stop, read, thread }))
    }

    /// The end of the transfer: what was read is checked, and taken over by `device`.
    ///
    /// # Errors
    /// It is not complete, or no state that this version knows. Nothing has changed then.
    pub(super) fn finish(self, device: &dyn Device) -> Result<()> {
        let Transfer::Loading(loading) = self else { return Ok(()) };
        let bytes = loading.read.recv_timeout(LOAD_LIMIT);
        let wce = decode(&bytes.map_err(|_| err!("the state did not come to its end"))??)?;
        device.write_config(CONFIG_WCE, &[wce]);
        Ok(())
    }
}

fn encode(wce: u8) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&u32::try_from(BODY_LEN).expect("8").to_le_bytes());
    bytes[HEADER_LEN] = wce;
    bytes
}

/// Whether the cache is write-back, 0 or 1.
fn decode(bytes: &[u8]) -> Result<u8> {
    let number = |at: usize| {
        let bytes = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
        bytes.map(u32::from_le_bytes).ok_or_else(|| err!("the state is cut short"))
    };
    if bytes.get(..8) != Some(&MAGIC[..]) {
        return Err(err!("no state of vhost-user-blk"));
    }
    let version = number(8)?;
    if version != VERSION {
        return Err(err!("a state of version {version}; known is {VERSION}"));
    }
    let body = &bytes[HEADER_LEN.min(bytes.len())..];
    if usize::try_from(number(12)?) != Ok(BODY_LEN) || body.len() != BODY_LEN {
        return Err(err!("a state of {} bytes instead of {LEN}", bytes.len()));
    }
    match body {
        [wce @ (0 | 1), rest @ ..] if rest.iter().all(|byte| *byte == 0) => Ok(*wce),
        _ => Err(err!("a state with unknown content")),
    }
}

fn read_to_end(mut from: File, stop: &EventFd) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut part = [0; 512];
    while bytes.len() <= LEN_MAX {
        match socket::wait(Some(from.as_fd()), libc::POLLIN, stop, Some(PAUSE_MAX_MS)) {
            Ok(Woken::Ready) => {}
            Ok(Woken::Stop | Woken::Pause | Woken::Timeout) => {
                return Err(err!("the state does not come"));
            }
            Err(e) => return Err(err!("the state cannot be waited for: {e}")),
        }
        match from.read(&mut part) {
            Ok(0) => return Ok(bytes),
            Ok(n) => bytes.extend_from_slice(&part[..n]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => return Err(err!("the state cannot be read: {e}")),
        }
    }
    Err(err!("a state of more than {LEN_MAX} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_written_is_read() {
        for wce in [0, 1] {
            let good = encode(wce);
            assert_eq!(decode(&good).unwrap(), wce);
            for cut in 0..good.len() {
                assert!(decode(&good[..cut]).is_err(), "{cut}");
            }
            assert!(decode(&[&good[..], &[0]].concat()).is_err());
            // Any bit that is flipped is seen, but for the one that says something.
            for bit in (0..LEN * 8).filter(|bit| *bit != HEADER_LEN * 8) {
                let mut bad = good;
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(decode(&bad).is_err(), "bit {bit}");
            }
        }
    }
}
