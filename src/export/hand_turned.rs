//! A worker that has no thread and no loop of its own: who measures turns it by hand, so that what is measured is a
//! turn and nothing else. It never spins and never sleeps.
#![forbid(unsafe_code)]

use std::sync::mpsc::sync_channel;

use super::{Command, Worker};
use crate::error::Errno;
use crate::export::Export;
use crate::export::queue::Stop;
use crate::rt::{Runtime, WaitKind};
use crate::vhost_user::QueueSetup;

/// A worker of the calling thread that serves one queue.
pub struct HandTurned {
    worker: Worker,
}

impl HandTurned {
    /// Serves queue 0 of `export`, whose own worker knows nothing of it; waits, if ever, in `kind`.
    ///
    /// # Errors
    /// As [`crate::vhost_user::Device::start_queue`], or what the kernel says.
    ///
    /// # Panics
    /// If the thread drives a runtime already.
    pub fn new(export: &Export, kind: WaitKind, setup: QueueSetup) -> Result<HandTurned, Errno> {
        let queue = export.make_queue(0, setup)?;
        let (grace, meter) = (export.activation.graph().grace(), export.shared.meter.worker(0));
        let mut worker = Worker::new(Runtime::install(kind)?, 0, grace, meter);
        let (done, _) = sync_channel(1);
        worker.command(Command::Start(queue, done));
        Ok(HandTurned { worker })
    }

    /// One turn. Whether anything happened.
    pub fn turn(&mut self) -> bool {
        self.worker.turn()
    }
}

impl Drop for HandTurned {
    /// Serves what is there, then leaves the ring.
    fn drop(&mut self) {
        let (answer, _base) = sync_channel(1);
        self.worker.command(Command::Stop(0, Stop::Drain, answer));
        while !self.worker.queues.is_empty() {
            if !self.worker.turn() {
                self.worker.idle();
            }
        }
    }
}
