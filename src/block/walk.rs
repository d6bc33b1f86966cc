//! Reads that are composed from several nodes: formats with backing files, tables, compressed parts.
//!
//! A chain of overlays may be hundreds of images deep, and one request may find a part of its bytes in each of them. So
//! this does not recurse: it keeps a list of parts still to be found, asks the driver of each where it lives
//! ([`Resolver::resolve`]), and lets the transfers that come out run side by side.
#![forbid(unsafe_code)]

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll};

use super::driver::Resolver;
use super::{IoFuture, Map, Op};
use crate::error::Errno;
use crate::mem::Sg;

/// The most transfers of one request at a time: QEMU's QCOW2_MAX_WORKERS is 8; a deeper queue gains little and
/// keeps other requests from the disk.
const SIDE_BY_SIDE: usize = 8;

/// A part of the request, to be found through `from`.
struct Part<'a> {
    from: &'a dyn Resolver,
    offset: u64,
    to: Sg<'a>,
}

/// Reads `[offset, offset + to.len())` of the node that `from` belongs to.
///
/// # Errors
/// The first error of any part; the others have been read then, or not.
pub async fn read<'a>(from: &'a dyn Resolver, offset: u64, to: Sg<'a>) -> Result<(), Errno> {
    let mut crew = Crew::default();
    // The last is the next. Each level of the chain leaves at most one part behind here.
    let mut parts = vec![Part { from, offset, to }];
    while let Some(part) = parts.pop() {
        if part.to.is_empty() {
            continue;
        }
        let found = crew.meanwhile(part.from.resolve(part.offset, part.to.len() as u64)).await;
        let (map, len) = match found {
            Ok(found) => found,
            Err(e) => {
                crew.failed(e);
                break;
            }
        };
        let here = usize::try_from(len).unwrap_or(usize::MAX).clamp(1, part.to.len());
        let (now, later) = (part.to.slice(0, here), part.to.len() - here);
        let rest = part.offset + here as u64;
        parts.push(Part { from: part.from, offset: rest, to: part.to.slice(here, later) });
        match map {
            Map::Zero => now.zero(),
            Map::Null => {}
            Map::Child { child, offset } => {
                let inside = child.len().saturating_sub(offset).min(now.len() as u64);
                let inside = usize::try_from(inside).unwrap_or(now.len());
                now.slice(inside, now.len() - inside).zero();
                let now = now.slice(0, inside);
                match child.driver().resolver() {
                    Some(from) => parts.push(Part { from, offset, to: now }),
                    None if now.is_empty() => {}
                    None => crew.add(child.submit(Op::Read { offset, to: now })).await,
                }
            }
            Map::File { .. } | Map::Slow => crew.add(part.from.fetch(part.offset, now)).await,
        }
    }
    crew.finish().await
}

/// Transfers that run side by side. None is ever dropped before its end.
#[derive(Default)]
pub struct Crew<'a> {
    running: Vec<IoFuture<'a>>,
    error: Option<Errno>,
}

impl<'a> Crew<'a> {
    /// One that could not even be started.
    pub fn failed(&mut self, errno: Errno) {
        self.error.get_or_insert(errno);
    }

    /// Adds a transfer, and waits for another's end if there are too many.
    pub async fn add(&mut self, transfer: IoFuture<'a>) {
        self.running.push(transfer);
        self.wait(SIDE_BY_SIDE - 1).await;
    }

    /// Whether nothing is running.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    /// Waits for all.
    ///
    /// # Errors
    /// The first error of any.
    pub async fn finish(mut self) -> Result<(), Errno> {
        self.wait(0).await;
        self.error.map_or(Ok(()), Err)
    }

    /// Waits for `future` and drives the transfers meanwhile: one of them may hold what `future`, or another request,
    /// waits for.
    pub async fn meanwhile<T>(&mut self, mut future: Pin<Box<dyn Future<Output = T> + '_>>) -> T {
        poll_fn(|cx| {
            let result = future.as_mut().poll(cx);
            if result.is_pending() {
                self.poll(cx);
            }
            result
        })
        .await
    }

    /// Polls all until at most `left` are running. With room for more, it still polls them once: that starts them.
    async fn wait(&mut self, left: usize) {
        poll_fn(|cx| {
            self.poll(cx);
            if self.running.len() <= left { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn poll(&mut self, cx: &mut Context<'_>) {
        let mut at = 0;
        while at < self.running.len() {
            match self.running[at].as_mut().poll(cx) {
                Poll::Pending => at += 1,
                Poll::Ready(result) => {
                    drop(self.running.swap_remove(at));
                    if let Err(e) = result {
                        self.failed(e);
                    }
                }
            }
        }
    }
}
