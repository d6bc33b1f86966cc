//! Where things are in a qcow2 image, and how table entries are written: pure arithmetic.
//!
//! Spec: `docs/interop/qcow2.rst`, sections "Host cluster management", "Cluster mapping" and "Extended L2 Entries".
//! Nothing here does I/O or looks at more than one entry. Every decoder takes the big-endian number already
//! converted ([`u64::from_be`]) and judges it: an entry that breaks the specification is a [`BadEntry`], never a panic.
#![forbid(unsafe_code)]

use std::fmt;

/// An offset in bytes in the virtual disk, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestOffset(pub u64);

/// An offset in bytes in the image file (or, for guest data, in the external data file).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

impl GuestOffset {
    /// `bytes` further.
    pub const fn plus(self, bytes: u64) -> GuestOffset {
        GuestOffset(self.0 + bytes)
    }
}

impl HostOffset {
    /// `bytes` further.
    pub const fn plus(self, bytes: u64) -> HostOffset {
        HostOffset(self.0 + bytes)
    }
}

/// Bit 63 of L1 and standard L2 entries: the refcount is exactly one, so it may be written in place.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of L2 entries: a compressed cluster.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of standard L2 entries: reads as zeroes.
pub const ZERO: u64 = 1;
/// Bits 9 to 55 of L1 and standard L2 entries.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// The reserved bits of an L1 entry.
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// The reserved bits of a standard L2 entry (bit 0 is [`ZERO`]).
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Bits 9 to 63 of a refcount table entry.
pub const REFTABLE_OFFSET_MASK: u64 = !0x1ff;
/// Host offsets end here: 56 bits.
pub const MAX_HOST_OFFSET: u64 = 1 << 56;
/// The unit in which the length of compressed data is counted, in bytes.
pub const COMPRESSED_SECTOR: u64 = 512;
/// Subclusters per cluster with extended L2 entries.
pub const SUBCLUSTERS: u32 = 32;

/// The sizes that follow from the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// L2 entries have 16 bytes and describe 32 subclusters.
    pub extended_l2: bool,
    /// log2 of the width of a refcount in bits, 0 to 6.
    pub refcount_order: u32,
    /// Version of the format, 2 or 3.
    pub version: u32,
    /// Guest data is in another file, at the guest's own offsets.
    pub data_file: bool,
}

impl Geometry {
    /// The cluster size in bytes.
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How many subclusters an L2 entry describes: 1 or 32.
    pub const fn subclusters(&self) -> u32 {
        if self.extended_l2 { SUBCLUSTERS } else { 1 }
    }

    /// log2 of the subcluster size in bytes (the cluster's without subclusters).
    pub const fn subcluster_bits(&self) -> u32 {
        self.cluster_bits - self.subclusters().trailing_zeros()
    }

    /// The subcluster size in bytes.
    pub const fn subcluster_size(&self) -> u64 {
        1 << self.subcluster_bits()
    }

    /// log2 of an L2 entry's size in bytes: 3 or 4.
    pub const fn l2_entry_bits(&self) -> u32 {
        if self.extended_l2 { 4 } else { 3 }
    }

    /// log2 of the number of entries of an L2 table.
    pub const fn l2_bits(&self) -> u32 {
        self.cluster_bits - self.l2_entry_bits()
    }

    /// Entries of an L2 table.
    pub const fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// log2 of the guest bytes that one L2 table describes. At most 39.
    pub const fn l2_coverage_bits(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// How many L1 entries a disk of `size` bytes needs.
    pub const fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.l2_coverage_bits())
    }

    /// How many guest clusters a disk of `size` bytes has.
    pub const fn clusters_for(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_size())
    }

    /// The index of the L1 entry for `offset`.
    pub const fn l1_index(&self, offset: GuestOffset) -> u64 {
        offset.0 >> self.l2_coverage_bits()
    }

    /// The index of the entry for `offset` in its L2 table.
    pub const fn l2_index(&self, offset: GuestOffset) -> u64 {
        (offset.0 >> self.cluster_bits) & (self.l2_entries() - 1)
    }

    /// The number of the subcluster for `offset` in its cluster.
    pub const fn subcluster_index(&self, offset: GuestOffset) -> u32 {
        ((offset.0 & (self.cluster_size() - 1)) >> self.subcluster_bits()) as u32
    }

    /// How many bytes into its cluster `offset` is.
    pub const fn in_cluster(&self, offset: GuestOffset) -> u64 {
        offset.0 & (self.cluster_size() - 1)
    }

    /// The first byte of the guest cluster of `offset`.
    pub const fn cluster_start(&self, offset: GuestOffset) -> GuestOffset {
        GuestOffset(offset.0 & !(self.cluster_size() - 1))
    }

    /// The number of the host cluster of `offset`.
    pub const fn host_cluster(&self, offset: HostOffset) -> u64 {
        offset.0 >> self.cluster_bits
    }

    /// Whether `offset` is the first byte of a host cluster.
    pub const fn is_cluster_aligned(&self, offset: HostOffset) -> bool {
        offset.0 & (self.cluster_size() - 1) == 0
    }

    /// The width of a refcount in bits.
    pub const fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount.
    pub const fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// log2 of the number of refcounts in a refcount block.
    pub const fn refblock_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Refcounts in a refcount block.
    pub const fn refblock_entries(&self) -> u64 {
        1 << self.refblock_bits()
    }

    /// The index in the refcount table of the block with the refcount of host cluster `cluster`.
    pub const fn reftable_index(&self, cluster: u64) -> u64 {
        cluster >> self.refblock_bits()
    }

    /// The index of the refcount of host cluster `cluster` in its refcount block.
    pub const fn refblock_index(&self, cluster: u64) -> u64 {
        cluster & (self.refblock_entries() - 1)
    }
}

/// How a table entry breaks the specification. `Display` is QEMU's text where it has one, without the place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadEntry {
    /// Reserved bits are set (the bits).
    Reserved(u64),
    /// The offset is not that of a cluster.
    Unaligned(HostOffset),
    /// The zero flag in a version 2 image.
    ZeroInV2,
    /// A compressed cluster in an image with an external data file.
    CompressedInDataFile,
    /// Compressed data beyond the 56 bits of host offsets.
    CompressedTooFar(HostOffset),
    /// In an external data file, data elsewhere than at the guest's offset.
    Displaced {
        /// Where the entry says the cluster is.
        host: HostOffset,
        /// Where it must be.
        guest: GuestOffset,
    },
    /// Subclusters both allocated and zero, or allocated nowhere.
    Subclusters(u64),
}

/// A number as C's `%#x` prints it.
#[derive(Clone, Copy)]
pub struct Hex(pub u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 == 0 { f.write_str("0") } else { write!(f, "{:#x}", self.0) }
    }
}

/// An entry of the active L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// Where the L2 table is; `None`: there is none, everything below is unallocated.
    pub table: Option<HostOffset>,
    /// The L2 table's refcount is one.
    pub copied: bool,
}

impl L1Entry {
    /// Takes an entry apart.
    ///
    /// # Errors
    /// The offset is not that of a cluster; reserved bits are set.
    pub const fn decode(word: u64, geometry: &Geometry) -> Result<L1Entry, BadEntry> {
        let offset = HostOffset(word & OFFSET_MASK);
        if !geometry.is_cluster_aligned(offset) {
            return Err(BadEntry::Unaligned(offset));
        }
        if word & L1_RESERVED != 0 {
            return Err(BadEntry::Reserved(word & L1_RESERVED));
        }
        let table = if offset.0 == 0 { None } else { Some(offset) };
        Ok(L1Entry { table, copied: word & COPIED != 0 })
    }

    /// The entry as written.
    pub const fn encode(self) -> u64 {
        let offset = match self.table {
            Some(HostOffset(offset)) => offset,
            None => 0,
        };
        offset | if self.copied { COPIED } else { 0 }
    }
}

/// An entry of an L2 table as it is stored: one word, or two with extended L2 entries (else `bitmap` is 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct L2Entry {
    /// The cluster descriptor with its flags.
    pub word: u64,
    /// The subcluster bitmap: bits 0 to 31 allocated, bits 32 to 63 zero.
    pub bitmap: u64,
}

/// Where compressed data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CompressedData {
    /// Its first byte; any alignment.
    pub offset: HostOffset,
    /// The most bytes it may have: up to the end of its last 512-byte sector.
    pub len: u64,
}

/// What an L2 entry says of its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Compressed; subclusters do not matter.
    Compressed(CompressedData),
    /// Subclusters (one, without extended L2 entries) in the three states of [`Subcluster`].
    Standard {
        /// The host cluster, if there is one, whether or not it holds data.
        host: Option<HostOffset>,
        /// The host cluster's refcount is one.
        copied: bool,
        /// Bit i: subcluster i has its data in `host`.
        allocated: u32,
        /// Bit i: subcluster i reads as zeroes.
        zero: u32,
    },
}

/// What one subcluster (or, without extended L2 entries, cluster) holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcluster {
    /// Data in the host cluster.
    Data,
    /// Zeroes.
    Zero,
    /// What the backing file has, or zeroes.
    Unallocated,
}

impl Mapping {
    /// Nothing allocated.
    pub const UNALLOCATED: Mapping =
        Mapping::Standard { host: None, copied: false, allocated: 0, zero: 0 };
}

/// The state of subcluster `index` by the bits of [`Mapping::Standard`].
pub const fn subcluster(allocated: u32, zero: u32, index: u32) -> Subcluster {
    if zero >> index & 1 != 0 {
        Subcluster::Zero
    } else if allocated >> index & 1 != 0 {
        Subcluster::Data
    } else {
        Subcluster::Unallocated
    }
}

impl L2Entry {
    /// The host cluster of data, if that is all that the entry says; with `copied`, if its refcount is one, too. What
    /// [`L2Entry::decode`] would answer, in a few instructions and for most clusters of most images; `None`: ask there.
    #[inline]
    pub const fn plain(self, geometry: &Geometry, copied: bool) -> Option<HostOffset> {
        let host = self.word & OFFSET_MASK;
        let plain = self.word & !(OFFSET_MASK | COPIED) == 0
            && geometry.is_cluster_aligned(HostOffset(host))
            && host != 0
            && !geometry.extended_l2
            && !geometry.data_file
            && (!copied || self.word & COPIED != 0);
        if plain { Some(HostOffset(host)) } else { None }
    }

    /// Takes the entry of the guest cluster that starts at `guest` apart.
    ///
    /// # Errors
    /// See [`BadEntry`].
    pub fn decode(self, geometry: &Geometry, guest: GuestOffset) -> Result<Mapping, BadEntry> {
        if self.word & COMPRESSED != 0 {
            return self.decode_compressed(geometry).map(Mapping::Compressed);
        }
        let zero_flag = self.word & ZERO != 0;
        if zero_flag && geometry.version < 3 {
            return Err(BadEntry::ZeroInV2);
        }
        let offset = HostOffset(self.word & OFFSET_MASK);
        if !geometry.is_cluster_aligned(offset) {
            return Err(BadEntry::Unaligned(offset));
        }
        let reserved = if geometry.extended_l2 { L2_RESERVED | ZERO } else { L2_RESERVED };
        if self.word & reserved != 0 {
            return Err(BadEntry::Reserved(self.word & reserved));
        }
        let copied = self.word & COPIED != 0;
        let present = offset.0 != 0 || (geometry.data_file && copied && !zero_flag);
        let host = present.then_some(offset);
        if geometry.data_file && present && offset.0 != guest.0 {
            return Err(BadEntry::Displaced { host: offset, guest });
        }
        let (allocated, zero) = if geometry.extended_l2 {
            (self.bitmap as u32, (self.bitmap >> 32) as u32)
        } else {
            (u32::from(present && !zero_flag), u32::from(zero_flag))
        };
        if allocated & zero != 0 || (host.is_none() && allocated != 0) {
            return Err(BadEntry::Subclusters(self.bitmap));
        }
        Ok(Mapping::Standard { host, copied, allocated, zero })
    }

    fn decode_compressed(self, geometry: &Geometry) -> Result<CompressedData, BadEntry> {
        if geometry.data_file {
            return Err(BadEntry::CompressedInDataFile);
        }
        let shift = compressed_shift(geometry);
        let offset = self.word & ((1 << shift) - 1);
        if offset >= MAX_HOST_OFFSET {
            return Err(BadEntry::CompressedTooFar(HostOffset(offset)));
        }
        let more = (self.word & (COMPRESSED - 1)) >> shift;
        let len = (more + 1) * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR;
        Ok(CompressedData { offset: HostOffset(offset), len })
    }

    /// The entry for `mapping`. Without extended L2 entries the bits of subcluster 0 speak for the cluster.
    ///
    /// The compressed data's length is rounded up to the end of its last sector.
    ///
    /// # Panics
    /// If the offset does not fit or is not aligned, the data is longer than the entry can say, or the zero flag is
    /// asked for in a version 2 image: whoever allocates sees to that.
    pub fn encode(mapping: Mapping, geometry: &Geometry) -> L2Entry {
        match mapping {
            Mapping::Compressed(CompressedData { offset: HostOffset(offset), len }) => {
                let shift = compressed_shift(geometry);
                assert!(offset < MAX_HOST_OFFSET.min(1 << shift), "compressed data too far");
                let last = (offset + len.max(1) - 1) / COMPRESSED_SECTOR;
                let more = last - offset / COMPRESSED_SECTOR;
                assert!(more < 1 << (62 - shift), "compressed data too long");
                L2Entry { word: COMPRESSED | more << shift | offset, bitmap: 0 }
            }
            Mapping::Standard { host, copied, allocated, zero } => {
                let HostOffset(offset) = host.unwrap_or(HostOffset(0));
                assert!(
                    offset & !OFFSET_MASK == 0 && geometry.is_cluster_aligned(HostOffset(offset)),
                    "not the offset of a cluster"
                );
                assert!(allocated & zero == 0, "subclusters both allocated and zero");
                let word = offset | if copied { COPIED } else { 0 };
                if geometry.extended_l2 {
                    let bitmap = u64::from(zero) << 32 | u64::from(allocated);
                    return L2Entry { word, bitmap };
                }
                assert!(zero == 0 || geometry.version > 2, "version 2 has no zero flag");
                L2Entry { word: word | u64::from(zero & 1), bitmap: 0 }
            }
        }
    }
}

/// The position of the sector count in a compressed cluster's descriptor ("x" of the specification).
const fn compressed_shift(geometry: &Geometry) -> u32 {
    62 - (geometry.cluster_bits - 8)
}

/// Where an entry of the refcount table says the refcount block is; `None`: there is none, all its refcounts are 0.
///
/// # Errors
/// Reserved bits; not the offset of a cluster.
pub const fn decode_reftable_entry(
    word: u64,
    geometry: &Geometry,
) -> Result<Option<HostOffset>, BadEntry> {
    let offset = HostOffset(word & REFTABLE_OFFSET_MASK);
    if !geometry.is_cluster_aligned(offset) {
        return Err(BadEntry::Unaligned(offset));
    }
    if word & !REFTABLE_OFFSET_MASK != 0 {
        return Err(BadEntry::Reserved(word & !REFTABLE_OFFSET_MASK));
    }
    Ok(if offset.0 == 0 { None } else { Some(offset) })
}

/// The refcount at `index` of a refcount block (its bytes as on disk), of 1 << `order` bits.
///
/// # Panics
/// If `index` is beyond the block.
pub fn refcount_get(block: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        // Fields narrower than a byte start at its least significant bit.
        let bit = index << order;
        let mask = (1u16 << (1 << order)) - 1;
        return u64::from(u16::from(block[bit / 8]) >> (bit % 8) & mask);
    }
    let width = 1 << (order - 3);
    let bytes = &block[index * width..][..width];
    bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

/// Stores `value` as the refcount at `index` of a refcount block.
///
/// # Panics
/// If `index` is beyond the block, or the value does not fit.
pub fn refcount_set(block: &mut [u8], order: u32, index: usize, value: u64) {
    assert!(value <= u64::MAX >> (64 - (1 << order)), "the refcount does not fit");
    if order < 3 {
        let bit = index << order;
        let (mask, shift) = (((1u16 << (1 << order)) - 1) as u8, bit % 8);
        let byte = &mut block[bit / 8];
        *byte = *byte & !(mask << shift) | (value as u8) << shift;
        return;
    }
    let width = 1 << (order - 3);
    let bytes = value.to_be_bytes();
    block[index * width..][..width].copy_from_slice(&bytes[8 - width..]);
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
