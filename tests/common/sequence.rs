//! A random sequence of operations on a node, beside a plain model of what the disk holds.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};

use vhost_user_blk::block::{Node, Op, WriteFlags, ZeroFlags};
use vhost_user_blk::error::Errno;
use vhost_user_blk::rt;

use super::bed::Disk;
use super::{Rng, Scatter, assert_same};

/// The longest operation.
const MOST: u64 = 3 << 20;

/// One operation and its memory.
enum Todo {
    Read(u64, Scatter),
    Write(u64, Scatter, WriteFlags),
    Zeroes(u64, u64, ZeroFlags),
    Discard(u64, u64),
    Flush,
}

impl Todo {
    fn random(rng: &mut Rng, (at, len): (u64, u64)) -> Todo {
        let n = usize::try_from(len).unwrap();
        match rng.below(16) {
            0..4 => Todo::Read(at, Scatter::new(rng, n)),
            kind @ 4..11 => {
                let mut memory = Scatter::new(rng, n);
                let bytes = if kind == 4 { vec![0; n] } else { rng.bytes(n) };
                memory.fill(&bytes);
                let fua = if rng.one_in(4) { WriteFlags::FUA } else { WriteFlags::empty() };
                Todo::Write(at, memory, fua)
            }
            11..14 => Todo::Zeroes(at, len, ZeroFlags::from_bits_truncate(rng.next() as u8)),
            14 => Todo::Discard(at, len),
            _ => Todo::Flush,
        }
    }

    fn describe(&self) -> String {
        match self {
            Todo::Read(at, m) => {
                format!("read of {} at {at} ({} ranges)", m.sg().len(), m.ranges())
            }
            Todo::Write(at, m, f) => {
                format!("write of {} at {at} ({} ranges, {f:?})", m.sg().len(), m.ranges())
            }
            Todo::Zeroes(at, len, f) => format!("write-zeroes of {len} at {at} ({f:?})"),
            Todo::Discard(at, len) => format!("discard of {len} at {at}"),
            Todo::Flush => "flush".into(),
        }
    }

    async fn perform(&self, node: &Node) -> Result<(), Errno> {
        let op = match self {
            Todo::Read(offset, m) => Op::Read { offset: *offset, to: m.sg() },
            Todo::Write(offset, m, flags) => {
                Op::Write { offset: *offset, from: m.sg(), flags: *flags }
            }
            Todo::Zeroes(offset, len, flags) => {
                Op::WriteZeroes { offset: *offset, len: *len, flags: *flags }
            }
            Todo::Discard(offset, len) => Op::Discard { offset: *offset, len: *len },
            Todo::Flush => Op::Flush,
        };
        node.submit(op).await
    }
}

/// The disk, and what it should hold.
pub struct Run {
    disk: Disk,
    model: Vec<u8>,
    rng: Rng,
    what: String,
}

fn span(at: u64, len: usize) -> std::ops::Range<usize> {
    let at = usize::try_from(at).unwrap();
    at..at + len
}

impl Run {
    /// `before`: the image's bytes; behind them are zeroes.
    pub fn new(disk: Disk, before: &[u8], rng: Rng, what: String) -> Run {
        let len = usize::try_from(disk.node.len()).unwrap();
        let mut model = before[span(disk.base, 0).start..].to_vec();
        model.resize(len, 0);
        Run { disk, model, rng, what }
    }

    /// `steps` operations one after the other, with some in parallel in between.
    pub async fn steps(&mut self, steps: usize) {
        for step in 0..steps {
            let size = self.disk.node.len();
            let range = self.rng.range(size, MOST);
            let todos = if step % 5 == 4 {
                self.neighbours(range)
            } else {
                vec![Todo::random(&mut self.rng, range)]
            };
            let results = all(&self.disk.node, todos).await;
            for (todo, result) in results {
                let what = format!("{}: step {step}: {}", self.what, todo.describe());
                self.settle(&todo, result, &what).await;
            }
            if step % 10 == 9 || step + 1 == steps {
                let got = self.read(0, self.model.len()).await;
                assert_same(&got, &self.model, &format!("{}: after step {step}", self.what));
            }
        }
        assert_eq!(self.disk.node.submit(Op::Flush).await, Ok(()), "{}", self.what);
    }

    /// Operations that touch each other, cut anywhere.
    fn neighbours(&mut self, (at, len): (u64, u64)) -> Vec<Todo> {
        let grain = [1, 512, 4096][self.rng.index(3)];
        let mut cuts: Vec<u64> = (0..self.rng.below(9))
            .map(|_| (at + self.rng.below(len)).next_multiple_of(grain).min(at + len))
            .chain([at, at + len])
            .collect();
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|w| Todo::random(&mut self.rng, (w[0], w[1] - w[0]))).collect()
    }

    async fn read(&mut self, at: u64, len: usize) -> Vec<u8> {
        let todo = Todo::Read(at, Scatter::new(&mut self.rng, len));
        assert_eq!(todo.perform(&self.disk.node).await, Ok(()), "{}", self.what);
        let Todo::Read(_, memory) = todo else { unreachable!() };
        memory.gather()
    }

    /// What the operation means for the model, or what the model means for it.
    async fn settle(&mut self, todo: &Todo, result: Result<(), Errno>, what: &str) {
        match (todo, result) {
            (Todo::Read(at, memory), Ok(())) => {
                let got = memory.gather();
                assert_same(&got, &self.model[span(*at, got.len())], what);
            }
            (Todo::Write(at, memory, _), Ok(())) => {
                let bytes = memory.gather();
                self.model[span(*at, bytes.len())].copy_from_slice(&bytes);
            }
            (Todo::Zeroes(at, len, _), Ok(())) => {
                self.model[span(*at, usize::try_from(*len).unwrap())].fill(0);
            }
            // Where zeroes are not cheap; what had been done by then stays.
            (Todo::Zeroes(at, len, flags), Err(Errno::ENOTSUP))
                if flags.contains(ZeroFlags::NO_FALLBACK) =>
            {
                let range = span(*at, usize::try_from(*len).unwrap());
                let got = self.read(*at, range.len()).await;
                let old = &mut self.model[range];
                assert!(got.iter().zip(old.iter()).all(|(g, o)| *g == 0 || g == o), "{what}");
                old.copy_from_slice(&got);
            }
            (Todo::Discard(at, len), Ok(())) => {
                if self.disk.setup.discard == "unmap"
                    && let Some((start, end)) = self.disk.discarded(*at, *len)
                {
                    self.model[span(start, usize::try_from(end - start).unwrap())].fill(0);
                }
            }
            (Todo::Flush, Ok(())) => {}
            (_, Err(e)) => panic!("{what}: {e}"),
        }
    }

    /// What the image must hold now: the model in the place of the node's bytes.
    pub fn expected(self, before: &[u8]) -> Vec<u8> {
        let mut image = before.to_vec();
        let place = span(self.disk.base, self.model.len());
        image.resize(image.len().max(place.end), 0);
        image[place].copy_from_slice(&self.model);
        image
    }
}

#[derive(Default)]
struct Joined {
    done: Vec<(Todo, Result<(), Errno>)>,
    waker: Option<Waker>,
}

/// Performs all at once, each in a task of its own.
async fn all(node: &Arc<Node>, todos: Vec<Todo>) -> Vec<(Todo, Result<(), Errno>)> {
    let joined: Rc<RefCell<Joined>> = Rc::default();
    let count = todos.len();
    for todo in todos {
        let (node, joined) = (Arc::clone(node), Rc::clone(&joined));
        rt::current().spawn(async move {
            let result = todo.perform(&node).await;
            let mut joined = joined.borrow_mut();
            joined.done.push((todo, result));
            if let Some(waker) = joined.waker.take() {
                waker.wake();
            }
        });
    }
    std::future::poll_fn(|cx| {
        let mut joined = joined.borrow_mut();
        if joined.done.len() == count {
            return Poll::Ready(std::mem::take(&mut joined.done));
        }
        joined.waker = Some(cx.waker().clone());
        Poll::Pending
    })
    .await
}
