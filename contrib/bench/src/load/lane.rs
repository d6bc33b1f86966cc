//! One queue under load: its buffers, its offsets, its share of the disk.
//!
//! A slot is one request's header, status byte, indirect table and data buffer, at the same place all
//! the time. Descriptors are written anew for each request, as a guest's driver does.

use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk as vb;
use vub_client::blk::HEADER_LEN;
use vub_client::ring::{DESC_LEN, Seg};
use vub_client::{Buf, Error, Queue, Result, Status, sys};

use super::order::Order;
use super::{Job, Rw, Tally};

/// Distance of headers: a cache line each, the status byte in the header's line as in Linux.
const OWN_LEN: usize = 64;
const STATUS_AT: usize = 16;
/// Completions after which a polling client moves its far-behind used_event along.
const DISARM_EVERY: u32 = 1 << 14;

/// Most queues an event-driven thread waits for.
const LANES_MAX: usize = 64;

const READ: usize = 0;
const WRITE: usize = 1;
const FLUSH: usize = 2;

#[derive(Debug)]
struct Slot {
    /// Header, data, status; for a flush the first and the last.
    segs: Box<[Seg]>,
    table: Buf,
    data: Buf,
    op: usize,
    block: u64,
    start_ns: u64,
    writes_since_flush: u32,
}

/// What `--verify` remembers.
#[derive(Debug)]
struct Shadow {
    /// How often each block was written; 0: contents unknown.
    generation: Vec<u32>,
    busy: Vec<bool>,
    scratch: Vec<u8>,
}

#[derive(Debug)]
pub struct Lane {
    queue: Queue,
    own: Buf,
    slots: Box<[Slot]>,
    slot_of_head: Box<[u16]>,
    free: Vec<u16>,
    rng: u64,
    next_seq: u64,
    /// Of a random `--once`.
    order: Option<Order>,
    once: bool,
    /// `--once` has nothing left to start.
    exhausted: bool,
    first_block: u64,
    blocks: u64,
    since_disarm: u32,
    errors: u64,
    shadow: Option<Shadow>,
    rw: Rw,
    read_share: u32,
    fsync: u32,
    /// Sectors of a request.
    sectors: u64,
    /// Requests that fit a block: more than one with `--stride`.
    places: u64,
    indirect: bool,
    /// Between two requests of `--rate-iops`; 0: none.
    interval_ns: u64,
    /// When the next one may begin.
    due_ns: u64,
}

fn len32(len: u64) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl Lane {
    /// A lane over its own part of the first `size` bytes of the disk.
    pub fn new(queue: Queue, job: &Job, size: u64) -> Result<Self> {
        let (mem, depth) = (queue.mem().clone(), usize::from(job.iodepth));
        let own = mem.alloc(depth * OWN_LEN, OWN_LEN)?;
        let bytes = usize::try_from(job.bs).map_err(|_| Error::OutOfMemory(usize::MAX))?;
        let slot = |i: usize| -> Result<Slot> {
            let (data, at) = (mem.alloc(bytes, 4096)?, own.gpa() + (i * OWN_LEN) as u64);
            let mut segs = vec![Seg::out(at, HEADER_LEN as u32)];
            let step = job.segment_len();
            let cuts = (0..job.bs.div_ceil(step)).map(|k| k * step);
            segs.extend(cuts.map(|c| Seg::inn(data.gpa() + c, len32(step.min(job.bs - c)))));
            segs.push(Seg::inn(at + STATUS_AT as u64, 1));
            let table = mem.alloc(segs.len() * DESC_LEN, 64)?;
            Ok(Slot {
                segs: segs.into(),
                table,
                data,
                op: READ,
                block: 0,
                start_ns: 0,
                writes_since_flush: 0,
            })
        };
        let slots = (0..depth).map(slot).collect::<Result<Box<[_]>>>()?;
        let blocks = size / job.unit() / u64::from(job.queues);
        let index = u64::from(queue.index());
        let shadow = job.verify.then(|| Shadow {
            generation: vec![0; blocks as usize],
            busy: vec![false; blocks as usize],
            scratch: vec![0; bytes],
        });
        // Any odd constant: seeds of queues must differ and not be 0.
        let rng = (job.seed + index).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let random = !job.rw.is_sequential();
        Ok(Self {
            own,
            slots,
            slot_of_head: vec![0; usize::from(job.queue_size)].into(),
            free: (0..job.iodepth).collect(),
            rng,
            next_seq: 0,
            order: (job.once && random).then(|| Order::new(blocks, rng)),
            once: job.once,
            exhausted: false,
            first_block: index * blocks,
            blocks,
            since_disarm: 0,
            errors: 0,
            shadow,
            rw: job.rw,
            read_share: job.rwmixread,
            fsync: job.fsync,
            sectors: job.bs / 512,
            places: job.unit() / job.bs,
            indirect: queue.indirect,
            interval_ns: 1_000_000_000_u64.checked_div(job.rate_iops).unwrap_or(0),
            due_ns: 0,
            queue,
        })
    }

    pub fn errors(&self) -> u64 {
        self.errors
    }

    pub fn in_flight(&mut self) -> u16 {
        self.queue.ring().in_flight()
    }

    /// Nothing in flight, and nothing left to do.
    pub fn done(&mut self) -> bool {
        self.exhausted && self.in_flight() == 0
    }

    /// How long the lane may sleep if nothing completes: until the next request is due.
    pub fn patience(&self, base: &Instant) -> Duration {
        if self.interval_ns == 0 || self.free.is_empty() {
            return vub_client::TIMEOUT;
        }
        Duration::from_nanos(self.due_ns).saturating_sub(base.elapsed())
    }

    /// Asks for an interrupt; true when there is something to reap instead.
    pub fn arm(&mut self) -> bool {
        self.queue.ring().arm()
    }

    /// xorshift64: enough for offsets, and one cycle or two.
    #[inline]
    fn random(&mut self) -> u64 {
        self.rng ^= self.rng << 13;
        self.rng ^= self.rng >> 7;
        self.rng ^= self.rng << 17;
        self.rng
    }

    /// Reaps, records, refills. The number of completions.
    #[inline]
    pub fn turn(&mut self, base: &Instant, tally: &mut Tally) -> Result<u64> {
        if !self.queue.ring().has_used() {
            // Paced, it may be time for another one.
            if self.interval_ns > 0 && !self.free.is_empty() {
                self.refill(base.elapsed().as_nanos() as u64, tally)?;
            }
            return Ok(0);
        }
        let now = base.elapsed().as_nanos() as u64;
        let mut n = 0;
        while let Some(used) = self.queue.ring().pop_used()? {
            let slot = self.complete(used.id)?;
            let Slot { op, start_ns, .. } = self.slots[usize::from(slot)];
            tally.record(op, now - start_ns);
            n += 1;
        }
        self.since_disarm += n;
        if self.queue.polling && self.since_disarm >= DISARM_EVERY {
            self.since_disarm = 0;
            self.queue.ring().disarm();
        }
        self.refill(now, tally)?;
        Ok(u64::from(n))
    }

    /// Takes completions without counting or refilling.
    pub fn reap_quietly(&mut self) -> Result<()> {
        while let Some(used) = self.queue.ring().pop_used()? {
            self.complete(used.id)?;
        }
        Ok(())
    }

    #[inline]
    fn complete(&mut self, head: u32) -> Result<u16> {
        let slot = self.slot_of_head[head as usize];
        self.free.push(slot);
        let at = usize::from(slot) * OWN_LEN + STATUS_AT;
        if Status::from_byte(self.own.u8_at(at).load(Ordering::Relaxed)) != Status::Ok {
            self.errors += 1;
        }
        if self.shadow.is_some() {
            self.check(slot)?;
        }
        Ok(slot)
    }

    /// Fills every free slot, publishes once, kicks if asked.
    #[inline]
    pub fn refill(&mut self, now: u64, tally: &mut Tally) -> Result<()> {
        while self.interval_ns == 0 || now >= self.due_ns {
            let Some(slot) = self.free.pop() else { break };
            self.due_ns += self.interval_ns;
            let op = self.choose_op(slot);
            // A slot that finds no block has retired.
            if let Some(block) = self.choose_block(op) {
                self.start(slot, op, block, now)?;
            }
        }
        self.queue.ring().publish();
        if self.queue.ring().needs_kick() {
            tally.kicks += 1;
            self.queue.notify()?;
        }
        Ok(())
    }

    #[inline]
    fn start(&mut self, index: u16, op: usize, block: u64, now: u64) -> Result<()> {
        let at = usize::from(index) * OWN_LEN;
        let kind = [vb::VIRTIO_BLK_T_IN, vb::VIRTIO_BLK_T_OUT, vb::VIRTIO_BLK_T_FLUSH][op];
        let sector = if op == FLUSH { 0 } else { self.sector(block) };
        self.own.u64_at(at).store(u64::from(kind).to_le(), Ordering::Relaxed);
        self.own.u64_at(at + 8).store(sector.to_le(), Ordering::Relaxed);
        self.own.u8_at(at + STATUS_AT).store(Status::POISON, Ordering::Relaxed);
        if self.shadow.is_some() && op != FLUSH {
            self.stamp(index, op, block);
        }
        let slot = &mut self.slots[usize::from(index)];
        if op != FLUSH && slot.segs[1].device_writes != (op == READ) {
            let n = slot.segs.len();
            slot.segs[1..n - 1].iter_mut().for_each(|s| s.device_writes = op == READ);
        }
        let short;
        let segs = if op == FLUSH {
            short = [slot.segs[0], slot.segs[slot.segs.len() - 1]];
            &short[..]
        } else {
            &slot.segs[..]
        };
        let ring = self.queue.ring();
        let head =
            if self.indirect { ring.add_indirect(&slot.table, segs)? } else { ring.add(segs)? };
        slot.writes_since_flush = match op {
            WRITE => slot.writes_since_flush + 1,
            FLUSH => 0,
            _ => slot.writes_since_flush,
        };
        slot.op = op;
        (slot.block, slot.start_ns) = (block, now);
        self.slot_of_head[usize::from(head)] = index;
        Ok(())
    }

    /// Where a block is, or with `--stride` where in it the request goes: always the same place.
    #[inline]
    fn sector(&self, block: u64) -> u64 {
        let block = self.first_block + block;
        let hash = block.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        (block * self.places + ((hash * self.places) >> 32)) * self.sectors
    }

    #[inline]
    fn choose_op(&mut self, slot: u16) -> usize {
        let write = match self.rw {
            Rw::Read | Rw::RandRead => return READ,
            Rw::Write | Rw::RandWrite => true,
            Rw::RandRw | Rw::Mixed => (self.random() >> 32) % 100 >= u64::from(self.read_share),
        };
        let flush =
            self.fsync > 0 && self.slots[usize::from(slot)].writes_since_flush >= self.fsync;
        match (write, flush) {
            (false, _) => READ,
            (true, false) => WRITE,
            (true, true) => FLUSH,
        }
    }

    /// The next block, 0 for a flush, None when every block had its turn.
    #[inline]
    fn choose_block(&mut self, op: usize) -> Option<u64> {
        if op == FLUSH {
            return Some(0);
        }
        let mut block = if let Some(order) = &mut self.order {
            let next = order.next();
            self.exhausted = next.is_none();
            next?
        } else if self.rw.is_sequential() {
            if self.exhausted {
                return None;
            }
            let block = self.next_seq;
            self.next_seq = if block + 1 == self.blocks { 0 } else { block + 1 };
            self.exhausted = self.once && self.next_seq == 0;
            block
        } else {
            // Multiply-shift instead of a division: 32 random bits are enough for 2^32 blocks.
            let random = u128::from(self.random());
            ((random * u128::from(self.blocks)) >> 64) as u64
        };
        if let Some(shadow) = &mut self.shadow {
            // Two requests on one block at once would make its contents a matter of luck.
            while shadow.busy[block as usize] {
                block = if block + 1 == self.blocks { 0 } else { block + 1 };
            }
            shadow.busy[block as usize] = true;
        }
        Some(block)
    }

    /// Before a request of a `--verify` run: what a write will write.
    fn stamp(&mut self, index: u16, op: usize, block: u64) {
        let Some(shadow) = &mut self.shadow else { return };
        let slot = &self.slots[usize::from(index)];
        if op == WRITE {
            let generation = &mut shadow.generation[block as usize];
            *generation += 1;
            expect(&mut shadow.scratch, self.first_block + block, *generation);
            slot.data.write(0, &shadow.scratch);
        } else {
            slot.data.fill(vub_client::blk::UNWRITTEN);
        }
    }

    /// After it: what a read has read.
    fn check(&mut self, index: u16) -> Result<()> {
        let Some(shadow) = &mut self.shadow else { return Ok(()) };
        let slot = &self.slots[usize::from(index)];
        if slot.op == FLUSH {
            return Ok(());
        }
        shadow.busy[slot.block as usize] = false;
        let generation = shadow.generation[slot.block as usize];
        if slot.op == WRITE || generation == 0 {
            return Ok(());
        }
        expect(&mut shadow.scratch, self.first_block + slot.block, generation);
        if slot.data.to_vec() == shadow.scratch {
            return Ok(());
        }
        let block = self.first_block + slot.block;
        Err(Error::Protocol(format!("verify: block {block} is not what write {generation} wrote")))
    }
}

/// Contents of a block after a given write.
fn expect(data: &mut [u8], block: u64, generation: u32) {
    let mut word = (block << 24 ^ u64::from(generation)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in data.chunks_exact_mut(8) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        chunk.copy_from_slice(&word.to_le_bytes());
    }
}

/// Sleeps until one of the lanes is interrupted or has a request due; the conductor writes to the eventfd when a device
/// never does. A blocking read would save a system call, but QSD makes the fd, whose flags both
/// processes share, non-blocking; so every back end gets poll and read.
pub fn sleep(lanes: &[Lane], base: &Instant) -> Result<()> {
    let patience = lanes.iter().map(|l| l.patience(base)).min().unwrap_or(vub_client::TIMEOUT);
    let mut fds = [-1; LANES_MAX];
    let fds = fds.get_mut(..lanes.len()).ok_or(Error::RingFull)?;
    fds.iter_mut().zip(lanes).for_each(|(fd, lane)| *fd = lane.queue.call_fd().as_raw_fd());
    sys::wait_readable(fds, patience).map_err(|e| Error::Io("poll", e))?;
    for lane in lanes {
        match lane.queue.call_fd().read() {
            Err(e) if e.kind() != ErrorKind::WouldBlock => {
                return Err(Error::Io("read of call", e));
            }
            _ => {}
        }
    }
    Ok(())
}
