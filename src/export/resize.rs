//! The size of the disk follows its medium: a raw image or a device that somebody makes longer.
//!
//! While rings run it is looked at every six seconds, and at once when the operator says so (SIGUSR1); a disk that cannot become
//! longer by itself (qcow2, a window of fixed size) is never looked at. The front end is told without waiting for it. A medium
//! that becomes shorter is an accident: the disk keeps its size.
#![forbid(unsafe_code)]

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::{Export, lock};
use crate::block::IoFuture;
use crate::block::upkeep::Tend;
use crate::vhost_user::{ConfigChange, Told};
use crate::virtio::blk::SECTOR;

/// How often the medium is looked at: a person who made it longer waits no longer than that, and an idle disk costs a wake-up in
/// that time.
const PERIOD: Duration = Duration::from_secs(6);

impl Tend for Export {
    fn tend(&self) -> IoFuture<'_> {
        self.look();
        self.watch_size();
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Export {
    /// Has the size looked at in a while, if rings run on a medium that can become longer.
    pub(super) fn watch_size(&self) {
        let follows = {
            let state = lock(&self.state);
            let user = state.user.as_ref().filter(|_| state.running.contains(&true));
            user.is_some_and(|user| user.node().driver().follows_medium())
        };
        if follows {
            let me: Weak<Export> = self.me.clone();
            self.activation.graph().upkeep().at(Instant::now() + PERIOD, me);
        }
    }

    /// Looks at the size of the medium now; a disk that has become longer is offered to the guest. Never waits for it.
    pub fn look_at_size(&self) {
        self.look();
        let size = self.shared.capacity() * SECTOR;
        log::info!("export '{}': {size} bytes", self.id());
    }

    fn look(&self) {
        // Who activates learns the size; who deactivates waits for us, or for the disk.
        let Ok(_turn) = self.activation.turn.try_lock() else { return };
        let Some(root) = self.root() else { return };
        match root.driver().look_at_len() {
            Some(len) => self.report_shrunk(len),
            None => self.shrunk.store(u64::MAX, Ordering::Relaxed),
        }
        let len = root.len();
        if len / SECTOR > self.shared.capacity() {
            self.set_len(len);
        }
    }

    fn report_shrunk(&self, len: u64) {
        if self.shrunk.swap(len, Ordering::Relaxed) != len {
            log::error!(
                "export '{}': node '{}': its medium has become shorter: {len} bytes; the disk keeps its size",
                self.id(),
                self.shared.node
            );
        }
    }

    /// Who is told when the size changes. The first one stays.
    pub fn set_config_change(&self, config_change: &Arc<ConfigChange>) {
        self.activation.config_change.get_or_init(|| Arc::clone(config_change));
    }

    /// The root has `len` bytes: so has the device, from now on.
    pub(super) fn set_len(&self, len: u64) {
        let sectors = len / SECTOR;
        let before = self.shared.sectors.swap(sectors, Ordering::Relaxed);
        if before == sectors {
            return;
        }
        let id = self.id();
        log::info!("export '{id}': {before} sectors become {sectors}");
        let told = self.activation.config_change.get().map(|change| change.changed());
        if told == Some(Told::NoChannel) {
            log::warn!(
                "export '{id}': the disk has another size, and the front end gave no channel to say so: tell it to look \
                 (Firecracker: PATCH /drives/ID), or restart the guest"
            );
        }
    }
}
