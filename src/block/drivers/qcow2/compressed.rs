//! Compressed clusters: unpacking, off the I/O thread if that takes long, and the last few clusters unpacked.
//!
//! Spec: "Compressed Clusters Descriptor". The data of a cluster may be followed by anything, within its last sector and,
//! for zstd, within further frames; what counts is that it makes up a whole cluster.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use super::flight::{Flights, Turn};
use super::header::Compression;
use super::layout::CompressedData;
use crate::error::Errno;
use crate::rt;

/// Up to this many bytes (a deflated cluster of 16 KiB: some 50 us) it is cheaper to unpack at once than to ask a
/// thread, which costs two context switches.
const INLINE_MAX: usize = 16 << 10;
/// The bytes of unpacked clusters remembered per image; but always at least one cluster. Sequential reads in small
/// pieces from several queues come back to the same few.
const KEEP_BYTES: usize = 1 << 20;
/// The most clusters remembered: the list is searched one by one.
const KEEP_MAX: usize = 16;

/// Unpacks clusters.
pub struct Decompressor {
    kind: Compression,
    cluster: usize,
    flights: Flights,
    memory: Mutex<Memory>,
}

/// The clusters remembered.
#[derive(Default)]
struct Memory {
    /// The newest last.
    last: VecDeque<(CompressedData, Arc<[u8]>)>,
    /// How often something was to be forgotten: what was read before that is not remembered any more.
    forgotten: u64,
}

impl Decompressor {
    /// For clusters of `cluster` bytes.
    pub fn new(kind: Compression, cluster: usize) -> Decompressor {
        Decompressor { kind, cluster, flights: Flights::default(), memory: Mutex::default() }
    }

    /// The cluster whose packed bytes are at `data`; `read` reads them. Requests for the same cluster at the same time
    /// read and unpack it once.
    ///
    /// # Errors
    /// What `read` fails with; EIO if the data is not a compressed cluster.
    pub async fn get(
        &self,
        data: CompressedData,
        read: impl AsyncFnOnce() -> Result<Vec<u8>, Errno>,
    ) -> Result<Arc<[u8]>, Errno> {
        let flight = match self.flights.turn(data.offset.0, || self.find(data)).await {
            Turn::Found(cluster) => return Ok(cluster),
            Turn::Mine(flight) => flight,
        };
        let forgotten = self.lock().forgotten;
        let packed = read().await?;
        let (kind, len) = (self.kind, self.cluster);
        let cluster = if len <= INLINE_MAX {
            unpack(kind, &packed, len)
        } else {
            rt::blocking(move || unpack(kind, &packed, len)).await
        };
        let cluster: Arc<[u8]> = cluster.ok_or(Errno::EIO)?.into();
        let mut memory = self.lock();
        if memory.forgotten == forgotten {
            if memory.last.len() >= (KEEP_BYTES / len).clamp(1, KEEP_MAX) {
                memory.last.pop_front();
            }
            memory.last.push_back((data, Arc::clone(&cluster)));
        }
        drop((memory, flight));
        Ok(cluster)
    }

    /// Drops what is remembered of data in the bytes `host` of the file: they are freed, and may soon hold something else.
    #[allow(dead_code, reason = "for the write path")]
    pub fn forget(&self, host: Range<u64>) {
        let mut memory = self.lock();
        memory.forgotten += 1;
        memory.last.retain(|(CompressedData { offset, len }, _)| {
            offset.0 >= host.end || offset.0 + len <= host.start
        });
    }

    fn find(&self, data: CompressedData) -> Option<Arc<[u8]>> {
        let memory = self.lock();
        memory.last.iter().find(|(d, _)| *d == data).map(|(_, cluster)| Arc::clone(cluster))
    }

    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Unpacks a cluster of `len` bytes; `None` if `packed` does not hold one.
fn unpack(kind: Compression, packed: &[u8], len: usize) -> Option<Vec<u8>> {
    let mut cluster = vec![0; len];
    let whole = match kind {
        Compression::Zlib => inflate(packed, &mut cluster),
        Compression::Zstd => unzstd(packed, &mut cluster),
    };
    whole.then_some(cluster)
}

fn inflate(packed: &[u8], cluster: &mut [u8]) -> bool {
    let mut inflater = Decompress::new(false);
    match inflater.decompress(packed, cluster, FlushDecompress::Finish) {
        Ok(Status::StreamEnd | Status::BufError | Status::Ok) => {
            inflater.total_out() == cluster.len() as u64
        }
        Err(_) => false,
    }
}

fn unzstd(packed: &[u8], cluster: &mut [u8]) -> bool {
    let Ok(mut decoder) = Decoder::new() else { return false };
    let len = cluster.len();
    let (mut from, mut to) = (InBuffer::around(packed), OutBuffer::around(cluster));
    loop {
        let before = (from.pos(), to.pos());
        match decoder.run(&mut from, &mut to) {
            // 0: a frame has ended.
            Ok(0) if to.pos() == len => return true,
            Ok(_) if (from.pos(), to.pos()) != before => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::layout::HostOffset;
    use super::*;

    #[test]
    fn only_whole_clusters_count() {
        let plain: Vec<u8> = (0..4096u32).map(|i| (i % 7) as u8).collect();
        let mut deflater =
            flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        deflater.write_all(&plain).unwrap();
        let packed = [
            (Compression::Zlib, deflater.finish().unwrap()),
            (Compression::Zstd, zstd::bulk::compress(&plain, 3).unwrap()),
        ];
        for (kind, packed) in packed {
            let mut trailing = packed.clone();
            trailing.extend([0xaa; 300]);
            assert_eq!(unpack(kind, &packed, 4096).as_ref(), Some(&plain));
            assert_eq!(unpack(kind, &trailing, 4096).as_ref(), Some(&plain));
            assert_eq!(unpack(kind, &packed, 8192), None);
            assert_eq!(unpack(kind, &packed[..packed.len() / 2], 4096), None);
            assert_eq!(unpack(kind, &[], 4096), None);
            assert_eq!(unpack(kind, &[0xff; 600], 4096), None);
        }
    }

    /// Freed data is not remembered, nor is what was on its way when it was freed; data beside it is.
    #[test]
    fn what_is_freed_is_forgotten() {
        let packed = |byte: u8| zstd::bulk::compress(&[byte; 4096], 3).unwrap();
        let data = |offset| CompressedData { offset: HostOffset(offset), len: 512 };
        let decompressor = Decompressor::new(Compression::Zstd, 4096);
        let get = |at, byte| {
            let read = decompressor.get(data(at), async || Ok(packed(byte)));
            rt::block_on(read).unwrap()[0]
        };
        assert_eq!((get(1024, 1), get(4096, 2), get(8192, 3)), (1, 2, 3));
        decompressor.forget(1536..4097);
        assert_eq!((get(1024, 9), get(4096, 9), get(8192, 9)), (1, 9, 3));
        let freed = async || {
            decompressor.forget(0..512);
            Ok(packed(4))
        };
        assert_eq!(rt::block_on(decompressor.get(data(0), freed)).unwrap()[0], 4);
        assert_eq!(get(0, 5), 5);
    }
}
