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
use crate::rt::grace;

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
    // Outlives all transfers.
    let mut pins = Pins::default();
    pins.enter(from);
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
                    Some(from) => {
                        pins.enter(from);
                        parts.push(Part { from, offset, to: now });
                    }
                    None if now.is_empty() => {}
                    None => crew.add(child.submit(Op::Read { offset, to: now })).await,
                }
            }
            Map::File { .. } | Map::Slow => crew.add(part.from.fetch(part.offset, now)).await,
        }
    }
    crew.finish().await
}

/// The drivers that know of this request, each once.
#[derive(Default)]
struct Pins(Vec<(*const (), Option<grace::Pin>)>);

impl Pins {
    fn enter(&mut self, driver: &dyn Resolver) {
        let who = std::ptr::from_ref(driver).cast();
        // The nearest are the likeliest.
        if !self.0.iter().rev().any(|(other, _)| *other == who) {
            self.0.push((who, driver.enter()));
        }
    }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use serde_json::{Value, json};

    use super::*;
    use crate::block::driver::ResolveFuture;
    use crate::block::drivers::null::NULL_CO;
    use crate::block::perm::default_child_perms;
    use crate::block::{Driver, DriverDef, DriverKind, Edge, Graph, Limits, Recognises, Role};
    use crate::qapi::Options;
    use crate::rt::{self, Buffer};

    /// The sectors of one request.
    const SECTORS: u64 = 16;

    /// Every second sector is its own, the others are its child's.
    static LAYER: DriverDef = DriverDef {
        name: "layer",
        kind: DriverKind::Format,
        options: &[],
        open: |args| {
            let (domain, level) = (Arc::clone(args.graph.grace()), args.take_size("level")?);
            let edges = [args.open_child("file", Role::Backing)?];
            let level = level.unwrap_or(0);
            Ok(Box::new(Layer { edges, domain, level, entered: AtomicU32::new(0) }))
        },
        recognises: Recognises::Nothing,
        child_perms: default_child_perms,
    };

    struct Layer {
        edges: [Edge; 1],
        domain: Arc<grace::Domain>,
        level: u64,
        entered: AtomicU32,
    }

    impl Layer {
        /// Nobody may reuse what the request has found.
        async fn work(&self) -> Result<(), Errno> {
            let tag = self.domain.tag();
            rt::blocking(|| ()).await;
            if self.domain.passed(tag) { Err(Errno::EIO) } else { Ok(()) }
        }
    }

    impl Resolver for Layer {
        fn enter(&self) -> Option<grace::Pin> {
            self.entered.fetch_add(1, Ordering::Relaxed);
            Some(grace::enter(&self.domain))
        }
        fn resolve(&self, offset: u64, _: u64) -> ResolveFuture<'_> {
            Box::pin(async move {
                self.work().await?;
                let own = ((offset / 512) >> self.level).is_multiple_of(2);
                let child = &self.edges[0].node;
                Ok((if own { Map::Slow } else { Map::Child { child, offset } }, 512))
            })
        }
        fn fetch<'a>(&'a self, _: u64, to: Sg<'a>) -> IoFuture<'a> {
            Box::pin(async move {
                self.work().await?;
                to.copy_from(&[u8::try_from(self.level).expect("few"); 512]);
                Ok(())
            })
        }
    }

    impl Driver for Layer {
        fn edges(&self) -> &[Edge] {
            &self.edges
        }
        fn len(&self) -> u64 {
            self.edges[0].node.len()
        }
        fn limits(&self) -> Limits {
            Limits::default()
        }
        fn submit<'a>(&'a self, op: Op<'a>) -> IoFuture<'a> {
            let Op::Read { offset, to } = op else { panic!("only read") };
            Box::pin(read(self, offset, to))
        }
        fn resolver(&self) -> Option<&dyn Resolver> {
            Some(self)
        }
        fn options_in_force(&self) -> Options {
            let entered = Value::from(self.entered.load(Ordering::Relaxed));
            [("entered".to_owned(), entered)].into_iter().collect()
        }
    }

    /// Each driver of a chain learns of a request once, before it is asked anything, and until the last byte is there.
    #[test]
    fn every_driver_is_entered_once() {
        static DRIVERS: &[&DriverDef] = &[&LAYER, &NULL_CO];
        let graph = Graph::with_drivers(DRIVERS);
        let mut options = json!({ "driver": "null-co", "read-zeroes": true });
        for level in (0..3).rev() {
            let name = format!("l{level}");
            options =
                json!({ "driver": "layer", "node-name": name, "level": level, "file": options });
        }
        let Value::Object(options) = options else { panic!("an object") };
        let top = graph.add(options).unwrap();
        let memory = Buffer::new(SECTORS as usize * 512, 512);
        let iov = [memory.iovec()];
        rt::block_on(top.submit(Op::Read { offset: 0, to: Sg::new(&iov) })).unwrap();
        let seen: Vec<u8> = memory.bytes().chunks(512).map(|sector| sector[0]).collect();
        assert_eq!(seen, [0, 1, 0, 2, 0, 1, 0, 0, 0, 1, 0, 2, 0, 1, 0, 0]);
        for level in 0..3 {
            let layer = graph.find(&format!("l{level}")).unwrap();
            assert_eq!(layer.driver().options_in_force()["entered"], 1, "level {level}");
        }
        assert!(graph.grace().passed(graph.grace().tag()));
    }
}
