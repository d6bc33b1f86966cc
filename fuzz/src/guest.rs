//! What a guest does, and what its disk must hold then.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use vhost_user_blk::block::{Node, Op, WriteFlags, ZeroFlags};
use vhost_user_blk::error::Errno;
use vhost_user_blk::mem::Sg;
use vhost_user_blk::rt::{self, Buffer};

use super::bed::is_expected;
use super::entropy::Entropy;

/// What all data that a guest writes begins with, every 16 bytes.
pub const MARK: [u8; 6] = *b"\xf5GUEST";
/// The first so many bytes of the disk are compared; what is behind is only used.
const MODEL_MAX: u64 = 2 << 20;
/// The longest operation in bytes.
const LONGEST: u64 = 256 << 10;
const STEPS_MAX: u64 = 40;
/// Operations that run at the same time.
const BATCH_MAX: u64 = 4;

/// An operation, in bytes.
#[derive(Clone, Debug)]
pub enum Step {
    Read(Range<u64>),
    /// With FUA or without.
    Write(Range<u64>, bool),
    /// Unmapping or not.
    Zeroes(Range<u64>, bool),
    Discard(Range<u64>),
    Flush,
    /// Alone.
    Resize(u64),
}

impl Step {
    /// The bytes that it may change.
    fn changes(&self) -> Range<u64> {
        match self {
            Step::Write(r, _) | Step::Zeroes(r, _) | Step::Discard(r) => r.clone(),
            Step::Read(_) | Step::Flush | Step::Resize(_) => 0..0,
        }
    }
}

/// What all operations will be: lists of those that run at the same time. `cluster`: the unit of the image.
pub fn steps(e: &mut Entropy, len: u64, cluster: u64) -> Vec<Vec<Step>> {
    let mut left = 1 + e.below(STEPS_MAX);
    let mut batches = Vec::new();
    while left > 0 {
        let n = 1 + e.below(left.min(BATCH_MAX));
        left -= n;
        let mut batch: Vec<Step> = (0..n).map(|_| step(e, len, cluster)).collect();
        if e.one_in(24) {
            batch = vec![Step::Resize(
                (len + e.below(4) * cluster).next_multiple_of(512) + e.below(9) * 512,
            )];
        }
        batches.push(batch);
    }
    batches
}

fn step(e: &mut Entropy, len: u64, cluster: u64) -> Step {
    let clusters = len.div_ceil(cluster).max(1);
    // Mostly the same few clusters, so that operations meet; seldom far away.
    let first = match e.byte() % 8 {
        0..=3 => e.below(clusters.min(8)),
        4..=6 => e.below(clusters.min(1 << 16)),
        _ => clusters - 1 - e.below(clusters.min(4)),
    };
    let (mut start, mut n) = (first * cluster, (1 + e.below(4)) * cluster);
    match e.byte() % 4 {
        0 => {}
        1 => {
            start += e.below(cluster / 512) * 512;
            n = (1 + e.below(2 * cluster / 512)) * 512;
        }
        2 => {
            start += e.below(cluster);
            n = 1 + e.below(2 * cluster);
        }
        _ => n = (1 + e.below(40)) * cluster,
    }
    let start = start.min(len);
    // Now and then beyond the end.
    let end = if e.one_in(64) { start + n } else { (start + n.min(LONGEST)).min(len) };
    let range = start..end;
    match e.byte() % 16 {
        _ if range.is_empty() => Step::Flush,
        0..=6 => Step::Write(range, e.one_in(8)),
        7..=9 => Step::Zeroes(range, e.one_in(2)),
        10 | 11 => Step::Discard(range),
        12 | 13 => Step::Flush,
        _ => Step::Read(range),
    }
}

/// What the disk holds, as far as it is known.
pub struct Model {
    pub bytes: Vec<u8>,
    pub known: Vec<bool>,
    /// Whether no request may fail.
    pub sound: bool,
    /// Nothing is compared: clusters may be shared by mistake.
    pub blind: bool,
    writes: u16,
}

impl Model {
    /// A disk of which nothing is known.
    pub fn new(len: u64) -> Model {
        let len = len.min(MODEL_MAX) as usize;
        Model {
            bytes: vec![0; len],
            known: vec![false; len],
            sound: false,
            blind: false,
            writes: 0,
        }
    }

    /// The part of a range that is compared.
    fn within(&self, range: &Range<u64>) -> Range<usize> {
        let end = self.bytes.len() as u64;
        range.start.min(end) as usize..range.end.min(end) as usize
    }

    fn forget(&mut self, range: &Range<u64>) {
        let range = self.within(range);
        self.known[range].fill(false);
    }

    fn learn(&mut self, start: u64, bytes: &[u8]) {
        let range = self.within(&(start..start + bytes.len() as u64));
        self.bytes[range.clone()].copy_from_slice(&bytes[..range.len()]);
        self.known[range].fill(true);
    }

    fn compare(&self, start: u64, bytes: &[u8], context: &str) {
        let range = self.within(&(start..start + bytes.len() as u64));
        let wrong = range
            .clone()
            .zip(bytes)
            .find(|(i, b)| !self.blind && self.known[*i] && self.bytes[*i] != **b);
        if let Some((i, byte)) = wrong {
            panic!("{context}: byte {i:#x} is {byte:#x}, not {:#x}", self.bytes[i]);
        }
    }
}

/// Does all steps, batch by batch.
pub async fn work(node: &Arc<Node>, batches: &[Vec<Step>], model: &Rc<RefCell<Model>>) {
    for batch in batches {
        let left = Rc::new(Cell::new(batch.len()));
        let waiting: Rc<RefCell<Option<Waker>>> = Rc::default();
        for (i, step) in batch.iter().enumerate() {
            let others: Vec<Range<u64>> = batch
                .iter()
                .enumerate()
                .filter(|(j, _)| *j != i)
                .map(|(_, s)| s.changes())
                .collect();
            let (node, step, model) = (Arc::clone(node), step.clone(), Rc::clone(model));
            let (left, waiting) = (Rc::clone(&left), Rc::clone(&waiting));
            rt::current().spawn(async move {
                perform(&node, &step, &others, &model).await;
                left.set(left.get() - 1);
                waiting.take().into_iter().for_each(Waker::wake);
            });
        }
        std::future::poll_fn(|cx| {
            waiting.replace(Some(cx.waker().clone()));
            if left.get() == 0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        // What two operations changed at the same time may be either.
        let mut model = model.borrow_mut();
        for (i, step) in batch.iter().enumerate() {
            for other in batch[..i].iter().map(Step::changes) {
                let both = step.changes();
                let both = both.start.max(other.start)..both.end.min(other.end);
                if both.start < both.end {
                    model.forget(&both);
                }
            }
        }
    }
}

async fn perform(node: &Node, step: &Step, others: &[Range<u64>], model: &RefCell<Model>) {
    let len = node.len();
    let range = step.changes();
    model.borrow_mut().forget(&range);
    let result = match step {
        Step::Read(r) => match read(node, r.start, (r.end - r.start) as usize).await {
            Ok(bytes) => {
                let mut model = model.borrow_mut();
                if others.iter().all(|o| o.end <= r.start || r.end <= o.start) {
                    model.compare(r.start, &bytes, &format!("{step:?}"));
                    model.learn(r.start, &bytes);
                }
                Ok(())
            }
            Err(e) => Err(e),
        },
        Step::Write(r, fua) => {
            let number = model.borrow().writes;
            model.borrow_mut().writes += 1;
            let mut buffer = Buffer::new((r.end - r.start) as usize, 512);
            fill(number, r.start, buffer.bytes_mut());
            let iov = [buffer.iovec()];
            let flags = if *fua { WriteFlags::FUA } else { WriteFlags::empty() };
            let op = Op::Write { offset: r.start, from: Sg::new(&iov), flags };
            let result = node.submit(op).await;
            if result.is_ok() {
                model.borrow_mut().learn(r.start, buffer.bytes());
            }
            result
        }
        Step::Zeroes(r, unmap) => {
            let flags = if *unmap { ZeroFlags::MAY_UNMAP } else { ZeroFlags::empty() };
            let op = Op::WriteZeroes { offset: r.start, len: r.end - r.start, flags };
            let result = node.submit(op).await;
            if result.is_ok() {
                let mut model = model.borrow_mut();
                let range = model.within(r);
                model.bytes[range.clone()].fill(0);
                model.known[range].fill(true);
            }
            result
        }
        Step::Discard(r) => {
            node.submit(Op::Discard { offset: r.start, len: r.end - r.start }).await
        }
        Step::Flush => node.submit(Op::Flush).await,
        Step::Resize(len) => node.truncate(*len).await,
    };
    if let Err(e) = result {
        assert!(is_expected(e), "{step:?}: {e}");
        let beyond = range.end > len || matches!(step, Step::Read(r) if r.end > len);
        let excused = beyond || matches!(step, Step::Resize(_));
        assert!(excused || !model.borrow().sound, "{step:?}: {e}, on a sound image");
    }
}

/// The data of write `number` at `start`: every 16 bytes say where they belong.
fn fill(number: u16, start: u64, bytes: &mut [u8]) {
    let (mut at, mut rest) = (start, bytes);
    while !rest.is_empty() {
        let mut unit = [0x11; 16];
        unit[..6].copy_from_slice(&MARK);
        unit[6..8].copy_from_slice(&number.to_be_bytes());
        unit[8..12].copy_from_slice(&((at / 16) as u32).to_be_bytes());
        let part = &unit[(at % 16) as usize..];
        let n = part.len().min(rest.len());
        let (now, later) = rest.split_at_mut(n);
        now.copy_from_slice(&part[..n]);
        (at, rest) = (at + n as u64, later);
    }
}

/// Reads bytes.
pub async fn read(node: &Node, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let buffer = Buffer::new(len, 512);
    let iov = [buffer.iovec()];
    node.submit(Op::Read { offset, to: Sg::new(&iov) }).await?;
    Ok(buffer.bytes().to_vec())
}

/// Reads the beginning and the end of the disk and compares what is known; what was not is known then.
pub async fn read_all(node: &Node, model: &RefCell<Model>, context: &str) {
    let (len, piece) = (node.len(), 32 << 10);
    let modelled = model.borrow().bytes.len() as u64;
    let mut at = 0;
    while at < len {
        let n = piece.min(len - at);
        match read(node, at, n as usize).await {
            Ok(bytes) => {
                let mut model = model.borrow_mut();
                model.compare(at, &bytes, context);
                model.learn(at, &bytes);
            }
            Err(e) => {
                assert!(is_expected(e), "{context}: {e}");
                assert!(!model.borrow().sound, "{context}: {e}, on a sound image");
            }
        }
        at += n;
        // Nothing but the end of what lies behind the model.
        if at >= modelled && len - at > piece {
            at = len - piece;
        }
    }
}
