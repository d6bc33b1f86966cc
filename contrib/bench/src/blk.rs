//! Requests and configuration of virtio-blk, as a guest sees them.

use std::sync::Arc;

use virtio_bindings::virtio_blk as vb;

use crate::error::Result;
use crate::mem::{Buf, GuestMem};

/// Bytes per sector, whatever the block size.
pub const SECTOR: usize = 512;
/// Bytes of a request's header.
pub const HEADER_LEN: usize = 16;
/// Bytes of a DISCARD or WRITE_ZEROES segment.
pub const RANGE_LEN: usize = 16;

/// Put into buffers before the device gets them: not zero, so that what it left unwritten shows.
pub const UNWRITTEN: u8 = 0xa5;

/// Length of the largest configuration structure known (zoned included).
pub const CONFIG_LEN: usize = 96;

/// A request: its header, and the buffers between header and status byte.
#[derive(Debug)]
pub struct Request {
    /// `VIRTIO_BLK_T_*`, or any other number.
    pub kind: u32,
    /// `ioprio`, which nobody uses.
    pub ioprio: u32,
    /// First sector.
    pub sector: u64,
    /// Buffers the device reads.
    pub out: Vec<Buf>,
    /// Buffers the device writes.
    pub inn: Vec<Buf>,
}

/// One segment of DISCARD or WRITE_ZEROES.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub count: u32,
    /// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP` and whatever a test wants.
    pub flags: u32,
}

impl Request {
    /// Any request without data.
    #[must_use]
    pub fn bare(kind: u32, sector: u64) -> Self {
        Self { kind, ioprio: 0, sector, out: Vec::new(), inn: Vec::new() }
    }

    /// Reads into one or more buffers.
    #[must_use]
    pub fn read(sector: u64, inn: Vec<Buf>) -> Self {
        Self { inn, ..Self::bare(vb::VIRTIO_BLK_T_IN, sector) }
    }

    /// Writes one or more buffers.
    #[must_use]
    pub fn write(sector: u64, out: Vec<Buf>) -> Self {
        Self { out, ..Self::bare(vb::VIRTIO_BLK_T_OUT, sector) }
    }

    /// Flushes.
    #[must_use]
    pub fn flush() -> Self {
        Self::bare(vb::VIRTIO_BLK_T_FLUSH, 0)
    }

    /// Asks for the serial number.
    ///
    /// # Errors
    /// `OutOfMemory`
    pub fn get_id(mem: &Arc<GuestMem>) -> Result<Self> {
        let buf = mem.alloc(vb::VIRTIO_BLK_ID_BYTES as usize, 16)?;
        buf.fill(UNWRITTEN);
        Ok(Self { inn: vec![buf], ..Self::bare(vb::VIRTIO_BLK_T_GET_ID, 0) })
    }

    /// DISCARD, WRITE_ZEROES (or anything with such segments).
    ///
    /// # Errors
    /// `OutOfMemory`
    pub fn ranges(mem: &Arc<GuestMem>, kind: u32, ranges: &[Range]) -> Result<Self> {
        let buf = mem.alloc(ranges.len() * RANGE_LEN, 16)?;
        for (i, range) in ranges.iter().enumerate() {
            buf.write(i * RANGE_LEN, &range.sector.to_le_bytes());
            buf.write(i * RANGE_LEN + 8, &range.count.to_le_bytes());
            buf.write(i * RANGE_LEN + 12, &range.flags.to_le_bytes());
        }
        Ok(Self { out: vec![buf], ..Self::bare(kind, 0) })
    }
}

/// The configuration space, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The bytes as they came.
    pub raw: Vec<u8>,
}

macro_rules! config_field {
    ($name:ident, $ty:ty, $at:literal, $what:literal) => {
        #[doc = concat!($what, "; 0 when the configuration read is shorter.")]
        #[must_use]
        pub fn $name(&self) -> $ty {
            const LEN: usize = size_of::<$ty>();
            let bytes = self.raw.get($at..$at + LEN).and_then(|b| b.try_into().ok());
            bytes.map_or(0, <$ty>::from_le_bytes)
        }
    };
}

impl Config {
    config_field!(capacity, u64, 0, "Capacity in sectors");
    config_field!(size_max, u32, 8, "Largest segment");
    config_field!(seg_max, u32, 12, "Most segments");
    config_field!(blk_size, u32, 20, "Logical block size");
    config_field!(physical_block_exp, u8, 24, "Physical block, as a power of logical ones");
    config_field!(alignment_offset, u8, 25, "Offset of the first aligned logical block");
    config_field!(min_io_size, u16, 26, "Suggested minimum I/O size in blocks");
    config_field!(opt_io_size, u32, 28, "Optimal I/O size in blocks");
    config_field!(wce, u8, 32, "Write cache enable");
    config_field!(num_queues, u16, 34, "Queues");
    config_field!(max_discard_sectors, u32, 36, "Most sectors of a discard segment");
    config_field!(max_discard_seg, u32, 40, "Most discard segments");
    config_field!(discard_sector_alignment, u32, 44, "Alignment of discards");
    config_field!(max_write_zeroes_sectors, u32, 48, "Most sectors of a write-zeroes segment");
    config_field!(max_write_zeroes_seg, u32, 52, "Most write-zeroes segments");
    config_field!(write_zeroes_may_unmap, u8, 56, "Write-zeroes honours unmap");
}
