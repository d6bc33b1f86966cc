//! A ring by itself: chains are taken, read and given back, and a batch of them shown to the guest.

use std::hint::black_box;

use vhost_user_blk::virtio::queue::Virtqueue;
use vhost_user_blk::virtio::ring::{Broken, Chain};

use crate::Case;
use crate::guest::{Guest, Kind};

const BATCH: u16 = 32;

pub struct Rounds {
    guest: Guest,
    ring: Virtqueue,
    chain: Chain,
}

impl Rounds {
    pub fn new(kind: Kind) -> Rounds {
        let guest = Guest::new(kind, BATCH);
        Rounds { ring: guest.ring(), guest, chain: Chain::default() }
    }

    fn round(&mut self) -> Result<(), Broken> {
        for _ in 0..self.ring.available()?.min(BATCH) {
            let Some(head) = self.ring.pop()? else { break };
            self.ring.read_chain(head, &mut self.chain)?;
            self.ring.push_used(head, black_box(4097));
        }
        assert!(self.ring.publish(true), "the guest is to be notified");
        Ok(())
    }
}

impl Case for Rounds {
    fn ops(&self) -> u32 {
        BATCH.into()
    }

    fn prepare(&mut self) {
        assert!(self.guest.is_answered());
        self.guest.offer();
    }

    fn run(&mut self) {
        self.round().expect("an honest guest");
    }
}
