//! A successor, or predecessor, that says what a test wants: the protocol of `src/cli/takeover`, by hand.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use serde_json::{Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::common::LIMIT;

pub const HELLO: u32 = 1;
pub const CONFIG: u32 = 2;
pub const READY: u32 = 3;
pub const EXPORT: u32 = 4;
pub const ACTIVATED: u32 = 5;
pub const FAILED: u32 = 7;

pub const GO: u32 = 6;

pub struct Fellow(pub UnixStream);

/// The bytes of a frame without files.
pub fn frame(kind: u32, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    let len = u32::try_from(body.len()).unwrap();
    let header = [u32::from_le_bytes(*b"vubT"), kind, len, 0].map(u32::to_le_bytes).concat();
    [&header, body.as_bytes()].concat()
}

impl Fellow {
    pub fn connect(path: &Path) -> Fellow {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Fellow(stream)
    }

    /// Has heard what is served.
    pub fn introduced(path: &Path) -> Fellow {
        let mut fellow = Fellow::connect(path);
        fellow.send(HELLO, &json!({"versions": [1, 1]}));
        fellow.hear(CONFIG);
        fellow
    }

    /// Has heard all there is to know of so many exports.
    pub fn told(path: &Path, exports: usize) -> (Fellow, Vec<Value>) {
        let mut fellow = Fellow::introduced(path);
        fellow.send(READY, &json!({"pid": 1}));
        let told = (0..exports).map(|_| fellow.hear(EXPORT)).collect();
        (fellow, told)
    }

    /// As a predecessor: the config of one that serves with `args` and has this control socket.
    pub fn configure(&mut self, args: &[&str], control: &UnixListener, dir: &Path) {
        let place = json!({"path": dir.join("ctl"), "dev": 0, "ino": 0});
        let body = json!({
            "version": 1, "args": args, "directory": dir, "exports": [null],
            "control": {"listener": 0, "place": place}, "pidfile": null,
        });
        self.send_with(CONFIG, &body, control);
    }

    /// Sends a frame with one file.
    pub fn send_with(&mut self, kind: u32, body: &Value, file: &impl AsRawFd) {
        let mut bytes = frame(kind, body);
        bytes[12] = 1;
        self.say(&bytes[..16]);
        self.0.send_with_fd(&[0u8][..], file.as_raw_fd()).unwrap();
        self.say(&bytes[16..]);
    }

    pub fn say(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }

    pub fn send(&mut self, kind: u32, body: &Value) {
        self.say(&frame(kind, body));
    }

    /// The next frame, which is of this kind; its files are closed.
    pub fn hear(&mut self, kind: u32) -> Value {
        let mut header = [0; 16];
        self.0.read_exact(&mut header).unwrap();
        let word = |i: usize| u32::from_le_bytes(header[4 * i..4 * i + 4].try_into().unwrap());
        for _ in 0..word(3).div_ceil(200) {
            let mut byte = [0];
            let mut fds = [-1; 253];
            let mut iov = [libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() }];
            // SAFETY: `iov` names one byte, which outlives the call.
            let (_, n) = unsafe { self.0.recv_with_fds(&mut iov, &mut fds) }.unwrap();
            for fd in &fds[..n] {
                // SAFETY: received this moment, and nobody else's.
                drop(unsafe { <std::os::fd::OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(*fd) });
            }
        }
        let mut body = vec![0; word(2).try_into().unwrap()];
        self.0.read_exact(&mut body).unwrap();
        let body = serde_json::from_slice(&body).unwrap();
        assert_eq!(word(1), kind, "{body}");
        body
    }

    /// Is told why it goes no further, and then nothing.
    pub fn refusal(mut self) -> String {
        let why = self.hear(FAILED)["error"].as_str().unwrap().to_owned();
        self.0.shutdown(std::net::Shutdown::Write).unwrap();
        match self.0.read(&mut [0]) {
            Ok(0) => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
        why
    }
}
