//! The qcow2 header: its fixed fields, its extensions and the backing file's name, parsed and written back.
//!
//! Spec: `docs/interop/qcow2.rst`, sections "Header", "Additional fields" and "Header extensions". Everything here is
//! about the bytes of cluster 0 and does no I/O. Parsing has three steps, because QEMU checks the driver's options
//! and reads the L1 table in between, and the first error wins:
//!
//! 1. [`Header::parse`]: the fixed fields, versions, feature bits, compression type;
//! 2. [`Header::check_limits`]: table sizes and offsets;
//! 3. [`Header::parse_extensions`], [`Header::parse_backing_file`].
//!
//! [`Header::read`] does all of them. Whatever is unknown is kept and comes back out of [`Header::serialise`].
#![forbid(unsafe_code)]

pub use super::extension::{BitmapsExtension, Extension};
use super::extension::{be32, be64, c_text, feature_names, parse_extension};
pub use super::features::{Autoclear, Compatible, Compression, CryptMethod, Incompatible};
use super::layout::{Geometry, HostOffset};
pub use super::limits::*;
use crate::err;
use crate::error::Result;

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// The smallest cluster: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// The largest cluster that QEMU supports: 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// The length in bytes of a version 2 header.
pub const V2_LENGTH: u32 = 72;
/// The least length in bytes of a version 3 header.
pub const V3_LENGTH: u32 = 104;
/// The length in bytes of the header as QEMU writes it: up to and with `compression_type` and its padding.
pub const V3_LENGTH_WRITTEN: u32 = 112;

/// A parsed header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size in bytes, 9 to 21.
    pub cluster_bits: u32,
    /// The virtual disk's length in bytes.
    pub size: u64,
    /// How guest data is encrypted.
    pub crypt_method: CryptMethod,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where the active L1 table starts.
    pub l1_table_offset: HostOffset,
    /// Where the refcount table starts.
    pub refcount_table_offset: HostOffset,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// How many internal snapshots.
    pub nb_snapshots: u32,
    /// Where the snapshot table starts.
    pub snapshots_offset: HostOffset,
    /// Feature bits (all 0 in version 2).
    pub incompatible: Incompatible,
    /// Feature bits (all 0 in version 2).
    pub compatible: Compatible,
    /// Feature bits (all 0 in version 2).
    pub autoclear: Autoclear,
    /// log2 of the width of a refcount in bits, 0 to 6 (4 in version 2).
    pub refcount_order: u32,
    /// Length in bytes of the fixed fields; the extensions follow.
    pub header_length: u32,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// The bytes from 105 to `header_length`: padding and fields of the future, kept.
    pub unknown_fields: Vec<u8>,
    /// The extensions, in order. Empty before [`Header::parse_extensions`].
    pub extensions: Vec<Extension>,
    /// The backing file's name as written. `None` before [`Header::parse_backing_file`], and without a backing file.
    pub backing_file: Option<Vec<u8>>,
    /// Where the name is in the file as parsed; [`Header::serialise`] finds a place of its own.
    backing_file_offset: u64,
    backing_file_size: u32,
}

impl Header {
    /// How many bytes from the start of the file the parsing functions want, told from its first bytes: cluster 0, or
    /// just the fixed fields if they are unusable. At most 2 MiB.
    pub fn extent(first: &[u8]) -> usize {
        match first.get(20..24).map(|b| be32(b, 0)) {
            Some(bits @ MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS) => 1 << bits,
            _ => 1 << MIN_CLUSTER_BITS,
        }
    }

    /// The header of an image of `version` (2 or 3) without tables, features, extensions and backing file, to be
    /// filled in by who creates one.
    pub fn new(version: u32, cluster_bits: u32, size: u64) -> Header {
        let header_length = if version == 2 { V2_LENGTH } else { V3_LENGTH_WRITTEN };
        Header {
            version,
            cluster_bits,
            size,
            crypt_method: CryptMethod::None,
            l1_size: 0,
            l1_table_offset: HostOffset(0),
            refcount_table_offset: HostOffset(0),
            refcount_table_clusters: 0,
            nb_snapshots: 0,
            snapshots_offset: HostOffset(0),
            incompatible: Incompatible::empty(),
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            refcount_order: 4,
            header_length,
            compression: Compression::Zlib,
            unknown_fields: vec![0; (header_length as usize).saturating_sub(105)],
            extensions: Vec::new(),
            backing_file: None,
            backing_file_offset: 0,
            backing_file_size: 0,
        }
    }

    /// All steps of parsing. `cluster0`: at least the bytes of the file that [`Header::extent`] asks for, filled up
    /// with zeroes where the file ends earlier.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn read(cluster0: &[u8], purpose: Purpose) -> Result<Header> {
        let mut header = Header::parse(cluster0)?;
        header.check_limits(purpose)?;
        header.parse_extensions(cluster0)?;
        header.parse_backing_file(cluster0)?;
        Ok(header)
    }

    /// The fixed fields of `cluster0` (see [`Header::read`]).
    ///
    /// # Errors
    /// Not qcow2, an unsupported version, cluster size, feature or compression type, a bad header length or backing
    /// file offset: in QEMU's words.
    ///
    /// # Panics
    /// If `cluster0` is shorter than [`Header::extent`] says.
    pub fn parse(cluster0: &[u8]) -> Result<Header> {
        let header = Header::parse_fields(cluster0)?;
        let cluster_size = 1u64 << header.cluster_bits;
        if header.version > 2 && header.header_length < V3_LENGTH {
            return Err(err!("qcow2 header too short"));
        }
        if u64::from(header.header_length) > cluster_size {
            return Err(err!("qcow2 header exceeds cluster size"));
        }
        if header.backing_file_offset > cluster_size {
            return Err(err!("Invalid backing file offset"));
        }
        let header = header.parse_additional(cluster0)?;
        let unknown = header.incompatible.difference(Incompatible::KNOWN);
        if !unknown.is_empty() {
            return Err(header.unsupported(cluster0, unknown));
        }
        Ok(header)
    }

    fn parse_fields(b: &[u8]) -> Result<Header> {
        if be32(b, 0) != MAGIC {
            return Err(err!("Image is not in qcow2 format"));
        }
        let version = be32(b, 4);
        if !(2..=3).contains(&version) {
            return Err(err!("Unsupported qcow2 version {version}"));
        }
        let cluster_bits = be32(b, 20);
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(err!("Unsupported cluster size: 2^{cluster_bits}"));
        }
        let v3_64 = |at| if version > 2 { be64(b, at) } else { 0 };
        let v3_32 = |at, v2| if version > 2 { be32(b, at) } else { v2 };
        Ok(Header {
            version,
            backing_file_offset: be64(b, 8),
            backing_file_size: be32(b, 16),
            cluster_bits,
            size: be64(b, 24),
            crypt_method: CryptMethod::from_number(be32(b, 32)),
            l1_size: be32(b, 36),
            l1_table_offset: HostOffset(be64(b, 40)),
            refcount_table_offset: HostOffset(be64(b, 48)),
            refcount_table_clusters: be32(b, 56),
            nb_snapshots: be32(b, 60),
            snapshots_offset: HostOffset(be64(b, 64)),
            incompatible: Incompatible::from_bits_retain(v3_64(72)),
            compatible: Compatible::from_bits_retain(v3_64(80)),
            autoclear: Autoclear::from_bits_retain(v3_64(88)),
            refcount_order: v3_32(96, 4),
            header_length: v3_32(100, V2_LENGTH),
            compression: Compression::Zlib,
            unknown_fields: Vec::new(),
            extensions: Vec::new(),
            backing_file: None,
        })
    }

    /// The fields from byte 104 on.
    fn parse_additional(mut self, cluster0: &[u8]) -> Result<Header> {
        let length = self.header_length as usize;
        let number = if length > 104 { cluster0[104] } else { 0 };
        self.unknown_fields = cluster0[..length].get(105..).unwrap_or_default().to_vec();
        self.compression = match number {
            0 => Compression::Zlib,
            1 => Compression::Zstd,
            n => return Err(err!("qcow2: unknown compression type: {n}")),
        };
        match (number, self.incompatible.contains(Incompatible::COMPRESSION)) {
            (0, true) => {
                Err(err!("qcow2: Compression type incompatible feature bit must not be set"))
            }
            (1.., false) => {
                Err(err!("qcow2: Compression type incompatible feature bit must be set"))
            }
            _ => Ok(self),
        }
    }

    /// The error for unknown incompatible features: by the names of the feature table, the rest as a number.
    fn unsupported(&self, cluster0: &[u8], unknown: Incompatible) -> crate::error::Error {
        let mut left = unknown.bits();
        let mut names = Vec::new();
        let (mut extensions, mut at) = (Vec::new(), self.header_length as usize);
        // As far as they can be read: the error is about the features.
        while let Ok(Some((extension, next))) = parse_extension(self, cluster0, at) {
            extensions.push(extension);
            at = next;
        }
        for (bit, name) in feature_names(&extensions, 0) {
            if left & (1 << bit) != 0 {
                left &= !(1 << bit);
                names.push(name);
            }
        }
        if left != 0 {
            names.push(format!("Unknown incompatible feature: {left:x}"));
        }
        err!("Unsupported qcow2 feature(s): {}", names.join(", "))
    }

    /// The extensions that follow the fixed fields in `cluster0` (see [`Header::read`]).
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn parse_extensions(&mut self, cluster0: &[u8]) -> Result<()> {
        let mut at = self.header_length as usize;
        while let Some((extension, next)) = parse_extension(self, cluster0, at)? {
            self.extensions.push(extension);
            at = next;
        }
        Ok(())
    }

    /// The backing file's name in `cluster0` (see [`Header::read`]).
    ///
    /// # Errors
    /// `Backing file name too long`.
    pub fn parse_backing_file(&mut self, cluster0: &[u8]) -> Result<()> {
        let (at, len) = (self.backing_file_offset, u64::from(self.backing_file_size));
        if at == 0 {
            return Ok(());
        }
        let room = (1u64 << self.cluster_bits).saturating_sub(at);
        if len > room.min(MAX_BACKING_NAME) {
            return Err(err!("Backing file name too long"));
        }
        let range = to_usize(at)..to_usize(at + len);
        self.backing_file = Some(cluster0[range].to_vec());
        Ok(())
    }

    /// Where the extensions must end in cluster 0: at the backing file's name, or at the cluster's end.
    pub(super) fn extensions_end(&self) -> usize {
        match usize::try_from(self.backing_file_offset) {
            Ok(0) | Err(_) => 1 << self.cluster_bits,
            Ok(offset) => offset,
        }
    }

    /// The geometry that follows from the header.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            extended_l2: self.extended_l2(),
            refcount_order: self.refcount_order,
            version: self.version,
            data_file: self.incompatible.contains(Incompatible::DATA_FILE),
        }
    }

    pub(super) fn extended_l2(&self) -> bool {
        self.incompatible.contains(Incompatible::EXTENDED_L2)
    }

    /// The backing file's name as QEMU takes it: up to the first zero byte, `None` if there is nothing before it.
    pub fn backing_file_name(&self) -> Option<String> {
        self.backing_file.as_deref().map(c_text).filter(|name| !name.is_empty())
    }

    /// The backing file's format, if the header tells one.
    pub fn backing_format(&self) -> Option<String> {
        let found = self.extensions.iter().rev().find_map(|e| match e {
            Extension::BackingFormat(name) => Some(c_text(name)),
            _ => None,
        });
        found.filter(|name| !name.is_empty())
    }

    /// The external data file's name, if the header tells one.
    pub fn data_file_name(&self) -> Option<String> {
        self.extensions.iter().rev().find_map(|e| match e {
            Extension::DataFile(name) => Some(c_text(name)),
            _ => None,
        })
    }

    /// The bitmaps extension, if it is up to date.
    pub fn bitmaps(&self) -> Option<BitmapsExtension> {
        self.extensions.iter().find_map(|e| match e {
            Extension::Bitmaps(bitmaps) => Some(*bitmaps),
            _ => None,
        })
    }

    /// Whether there is a bitmaps extension that a writer without knowledge of it has left behind.
    pub fn has_stale_bitmaps(&self) -> bool {
        self.extensions.iter().any(|e| matches!(e, Extension::StaleBitmaps(_)))
    }

    /// The name of a feature in the feature name table. `class`: 0 incompatible, 1 compatible, 2 autoclear.
    pub fn feature_name(&self, class: u8, bit: u8) -> Option<String> {
        feature_names(&self.extensions, class).find(|(b, _)| *b == bit).map(|(_, name)| name)
    }
}

fn to_usize(n: u64) -> usize {
    usize::try_from(n).expect("an offset in cluster 0 fits in memory")
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
