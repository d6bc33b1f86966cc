//! The synchronous calls: one request, its data in buffers of the queue's layout, and the wait for it.

use virtio_bindings::virtio_blk as vb;

use super::{Layout, Queue};
use crate::blk::{Range, Request, UNWRITTEN};
use crate::error::Result;
use crate::mem::Buf;

impl Queue {
    /// Buffers for `len` bytes in this queue's layout.
    ///
    /// # Errors
    /// `OutOfMemory`
    pub fn buffers(&self, len: usize) -> Result<Vec<Buf>> {
        let Layout { align, skew, segment } = self.layout;
        let mut bufs = Vec::new();
        let mut at = 0;
        while at < len {
            let n = segment.max(1).min(len - at);
            let buf = self.mem.alloc_skewed(n, align, skew)?;
            buf.fill(UNWRITTEN);
            bufs.push(buf);
            at += n;
        }
        Ok(bufs)
    }

    /// Reads `data.len()` bytes from `sector`.
    ///
    /// # Errors
    /// `Status` when the device refuses, and those of `run`.
    pub fn read(&mut self, sector: u64, data: &mut [u8]) -> Result<()> {
        let bufs = self.buffers(data.len())?;
        let done = self.run(Request::read(sector, bufs))?;
        done.status.ok()?;
        let mut at = 0;
        for buf in &done.inn {
            buf.read(0, &mut data[at..at + buf.len()]);
            at += buf.len();
        }
        Ok(())
    }

    /// Writes `data` at `sector`.
    ///
    /// # Errors
    /// As `read`.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<()> {
        let request = self.write_request(sector, data)?;
        self.run(request)?.status.ok()
    }

    /// A write of `data` in this queue's layout, to be submitted.
    ///
    /// # Errors
    /// `OutOfMemory`
    pub fn write_request(&self, sector: u64, data: &[u8]) -> Result<Request> {
        let bufs = self.buffers(data.len())?;
        let mut at = 0;
        for buf in &bufs {
            buf.write(0, &data[at..at + buf.len()]);
            at += buf.len();
        }
        Ok(Request::write(sector, bufs))
    }

    /// A read of `len` bytes in this queue's layout, to be submitted.
    ///
    /// # Errors
    /// `OutOfMemory`
    pub fn read_request(&self, sector: u64, len: usize) -> Result<Request> {
        Ok(Request::read(sector, self.buffers(len)?))
    }

    /// Flushes.
    ///
    /// # Errors
    /// As `read`.
    pub fn flush(&mut self) -> Result<()> {
        self.run(Request::flush())?.status.ok()
    }

    /// Discards one range.
    ///
    /// # Errors
    /// As `read`.
    pub fn discard(&mut self, sector: u64, count: u32) -> Result<()> {
        self.ranges(vb::VIRTIO_BLK_T_DISCARD, &[Range { sector, count, flags: 0 }])
    }

    /// Zeroes one range.
    ///
    /// # Errors
    /// As `read`.
    pub fn write_zeroes(&mut self, sector: u64, count: u32, unmap: bool) -> Result<()> {
        let flags = if unmap { vb::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        self.ranges(vb::VIRTIO_BLK_T_WRITE_ZEROES, &[Range { sector, count, flags }])
    }

    /// DISCARD or WRITE_ZEROES with any segments.
    ///
    /// # Errors
    /// As `read`.
    pub fn ranges(&mut self, kind: u32, ranges: &[Range]) -> Result<()> {
        let request = Request::ranges(&self.mem, kind, ranges)?;
        self.run(request)?.status.ok()
    }

    /// The serial number's 20 bytes.
    ///
    /// # Errors
    /// As `read`.
    pub fn get_id(&mut self) -> Result<[u8; vb::VIRTIO_BLK_ID_BYTES as usize]> {
        let done = self.run(Request::get_id(&self.mem)?)?;
        done.status.ok()?;
        let mut id = [0; vb::VIRTIO_BLK_ID_BYTES as usize];
        done.inn[0].read(0, &mut id);
        Ok(id)
    }
}
