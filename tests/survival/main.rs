//! What a real guest has left when its back end is killed and when its host loses power, and what other back ends leave.
//!
//! The guests are those of `tests/guest.rs`: `contrib/guest/run` boots them, one at a time.
//! Variables: `VUB_KILLS` (3), `VUB_CUTS` (10 for each kind of image), `VUB_ROUNDS` (20 of the guest's
//! work that is recorded), `VUB_SEED`. `VUB_PROGRAM`: the back end to test instead of this program.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../common/mod.rs"]
mod common;
mod kills;
mod log;
mod peers;
mod power;

use std::io::BufReader;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::TempDir;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A directory on the disk that the sources are on.
fn directory() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// The program under test; `VUB_PROGRAM` is another.
fn program() -> String {
    std::env::var("VUB_PROGRAM").unwrap_or(env!("CARGO_BIN_EXE_vhost-user-blk").into())
}

/// A number that the environment may give.
fn variable(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// Runs a tool in `dir`; its exit code and what it says.
fn tool(dir: &Path, name: &str, args: &[&str]) -> (Option<i32>, String) {
    let out = Command::new(name).args(args).current_dir(dir).output().unwrap();
    let text = [out.stdout, out.stderr].concat();
    (out.status.code(), String::from_utf8_lossy(&text).into_owned())
}

/// The same for a tool that must succeed.
fn succeed(dir: &Path, name: &str, args: &[&str]) -> String {
    let (code, text) = tool(dir, name, args);
    assert_eq!(code, Some(0), "{name} {args:?}: {text}");
    text
}

/// A guest that runs a script of contrib/guest/tests; gone when it is dropped.
struct Guest(Child);

impl Guest {
    /// Boots it, and what it prints.
    fn start(socket: &Path, script: &str, more: &[&str]) -> (Guest, BufReader<ChildStdout>) {
        let contrib = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/guest");
        let mut run = Command::new(contrib.join("run"));
        run.arg("--socket").arg(socket).arg("--script").arg(contrib.join("tests").join(script));
        let mut child = run.args(more).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        (Guest(child), output)
    }

    /// Waits for its end; whether the script succeeded.
    fn succeeded(mut self) -> bool {
        self.0.wait().unwrap().success()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SIGTERM: the script ends QEMU. After `succeeded` there is nobody to tell.
        if self.0.try_wait().unwrap().is_none() {
            vub_client::sys::kill(self.0.id(), libc::SIGTERM).unwrap();
            self.0.wait().unwrap();
        }
    }
}
