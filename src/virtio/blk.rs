//! The virtio-blk device (VIRTIO 1.3, 5.2): features, configuration space, request header, discard segments, status.
#![forbid(unsafe_code)]

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::feature;
use crate::block::Limits;

/// virtio-blk's unit: a sector of 512 bytes, whatever the logical block size.
pub const SECTOR: u64 = 512;
/// The length of the configuration space that has fields; behind it are zeroes.
pub const CONFIG_LEN: usize = 96;
/// Where the one writable field, `writeback`, lies in it.
pub const CONFIG_WCE: usize = 32;
/// Segments in one discard request: one page of 16-byte segments.
pub const DISCARD_SEGMENTS_MAX: usize = 256;
/// The most sectors in one discard segment: the largest that a signed 32-bit count of a guest holds, in whole 1 MiB.
pub const DISCARD_SECTORS_MAX: u32 = (1 << 31) - 2048;
/// Segments in one write-zeroes request. Where zeroes must be written as data, this bounds how long a request takes,
/// and so how long a drain waits for it.
pub const ZEROES_SEGMENTS_MAX: usize = 16;
/// The most sectors in one write-zeroes segment: 256 MiB.
pub const ZEROES_SECTORS_MAX: u32 = 1 << 19;
/// The length of a request's header.
pub const HEADER_LEN: usize = 16;
/// The length of one discard or write-zeroes segment.
pub const SEGMENT_LEN: usize = 16;

/// A request's outcome, as the driver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed.
    IoErr,
    /// Not a request that this device has.
    Unsupp,
}

impl Status {
    /// The status byte.
    pub fn byte(self) -> u8 {
        let s = match self {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoErr => VIRTIO_BLK_S_IOERR,
            Status::Unsupp => VIRTIO_BLK_S_UNSUPP,
        };
        s.to_le_bytes()[0]
    }
}

/// What a device offers, fixed when the export is made.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Writes are refused.
    pub read_only: bool,
    /// Bytes; a power of two.
    pub logical_block: u32,
    /// Queues.
    pub num_queues: u16,
    /// The largest ring, in entries.
    pub queue_size: u16,
    /// The root node's limits.
    pub limits: Limits,
}

impl Geometry {
    /// The device's and the rings' feature bits. SIZE_MAX is not among them: it would cap every descriptor.
    pub fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_F_VERSION_1,
            VIRTIO_F_RING_PACKED,
        ];
        if self.read_only {
            bits.push(VIRTIO_BLK_F_RO);
        }
        bits.into_iter().fold(0, |mask, bit| mask | feature(bit))
    }

    /// The configuration space (`struct virtio_blk_config`) of a disk of `capacity` sectors.
    pub fn config(&self, capacity: u64, writeback: bool) -> [u8; CONFIG_LEN] {
        let mut c = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
        let block = self.logical_block;
        let physical = self.limits.physical_block.max(block);
        // Data segments of a chain without its header and status; more are served, too.
        let seg_max = u32::from(self.queue_size).saturating_sub(2).clamp(1, 254);
        put(0, &capacity.to_le_bytes());
        put(12, &seg_max.to_le_bytes());
        put(20, &block.to_le_bytes());
        put(24, &[u8::try_from((physical / block).ilog2()).unwrap_or(0)]);
        let min_io = u16::try_from(physical / block).unwrap_or(1);
        put(26, &min_io.to_le_bytes());
        put(28, &(self.limits.opt_transfer / block).to_le_bytes());
        put(CONFIG_WCE, &[u8::from(writeback)]);
        put(34, &self.num_queues.to_le_bytes());
        put(36, &DISCARD_SECTORS_MAX.to_le_bytes());
        put(40, &(DISCARD_SEGMENTS_MAX as u32).to_le_bytes());
        let granularity = u64::from(self.limits.discard_align.max(block)) / SECTOR;
        put(44, &u32::try_from(granularity).unwrap_or(1).to_le_bytes());
        put(48, &ZEROES_SECTORS_MAX.to_le_bytes());
        put(52, &(ZEROES_SEGMENTS_MAX as u32).to_le_bytes());
        put(56, &[1]);
        c
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// VIRTIO_BLK_T_*.
    pub kind: u32,
    /// The first sector.
    pub sector: u64,
}

impl Header {
    /// Reads the sixteen bytes; the second word (legacy I/O priority) means nothing here.
    pub fn parse(b: &[u8; HEADER_LEN]) -> Header {
        let kind = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let sector = u64::from_le_bytes([b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]);
        Header { kind, sector }
    }
}

/// One segment of a discard or write-zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first sector.
    pub sector: u64,
    /// How many.
    pub sectors: u32,
    /// VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, and bits that must be 0.
    pub flags: u32,
}

impl Segment {
    /// Reads sixteen bytes.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn parse(b: &[u8]) -> Segment {
        Segment {
            sector: u64::from_le_bytes(b[..8].try_into().expect("eight bytes")),
            sectors: u32::from_le_bytes(b[8..12].try_into().expect("four bytes")),
            flags: u32::from_le_bytes(b[12..16].try_into().expect("four bytes")),
        }
    }
}

/// The bytes of `len` at `sector` on a disk of `capacity` sectors with logical blocks of `block` bytes (a power of two: a
/// division would be the slowest instruction of a request), if that is all inside the disk and on block boundaries.
pub fn byte_range(sector: u64, len: u64, capacity: u64, block: u32) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(len)?;
    let aligned = (offset | len) & (u64::from(block) - 1) == 0;
    (aligned && end <= capacity.checked_mul(SECTOR)?).then_some(offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry(limits: Limits) -> Geometry {
        Geometry { read_only: false, logical_block: 512, num_queues: 4, queue_size: 256, limits }
    }

    #[test]
    fn config_has_its_fields_where_the_specification_puts_them() {
        let limits = Limits { physical_block: 4096, opt_transfer: 65536, ..Limits::default() };
        let c = geometry(limits).config(0x1234, true);
        assert_eq!(c[0..8], 0x1234u64.to_le_bytes());
        assert_eq!(c[8..12], [0; 4], "size_max is not offered");
        assert_eq!(c[12..16], 254u32.to_le_bytes());
        assert_eq!(
            (c[20..24].to_vec(), c[24], c[26], c[28]),
            (512u32.to_le_bytes().to_vec(), 3, 8, 128)
        );
        assert_eq!((c[32], c[34], c[56]), (1, 4, 1));
        assert_eq!(c[36..40], DISCARD_SECTORS_MAX.to_le_bytes());
    }

    #[test]
    fn ranges_do_not_overflow() {
        assert_eq!(byte_range(0, 512, 1, 512), Some(0));
        assert_eq!(byte_range(1, 512, 1, 512), None);
        assert_eq!(byte_range(u64::MAX, 512, 1, 512), None);
        assert_eq!(byte_range(u64::MAX / 512, 512, u64::MAX / 512, 512), None);
        assert_eq!(byte_range(1, 4096, 100, 4096), None, "not on a block boundary");
        assert_eq!(byte_range(0, 100, 100, 512), None, "no whole sectors");
    }

    #[test]
    fn features_without_size_max() {
        let f = geometry(Limits::default()).features();
        assert_eq!(f & 0b10, 0);
        assert_eq!(f & feature(VIRTIO_BLK_F_RO), 0);
    }
}
