//! The feature bits of the header, and the two numbers that choose an algorithm.
//!
//! Spec: "Header", "Additional fields". Unknown bits are kept.
#![forbid(unsafe_code)]

bitflags::bitflags! {
    /// `incompatible_features`: who does not know a bit must not open the image.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Incompatible: u64 {
        /// Refcounts may be wrong (lazy refcounts, not closed properly).
        const DIRTY = 1;
        /// Anything may be wrong; must not be written to.
        const CORRUPT = 1 << 1;
        /// Guest data is in another file.
        const DATA_FILE = 1 << 2;
        /// `compression_type` is there and not 0.
        const COMPRESSION = 1 << 3;
        /// L2 entries of 16 bytes, with subclusters.
        const EXTENDED_L2 = 1 << 4;
        const _ = !0;
    }
}

impl Incompatible {
    /// The bits that this driver knows.
    pub const KNOWN: Incompatible = Incompatible::DIRTY
        .union(Incompatible::CORRUPT)
        .union(Incompatible::DATA_FILE)
        .union(Incompatible::COMPRESSION)
        .union(Incompatible::EXTENDED_L2);
}

bitflags::bitflags! {
    /// `compatible_features`: unknown bits do no harm.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Compatible: u64 {
        /// Refcounts may be updated late, with the dirty bit set.
        const LAZY_REFCOUNTS = 1;
        const _ = !0;
    }
}

bitflags::bitflags! {
    /// `autoclear_features`: who writes and does not know a bit clears it first.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Autoclear: u64 {
        /// The bitmaps extension is up to date.
        const BITMAPS = 1;
        /// The external data file is a raw image by itself.
        const DATA_FILE_RAW = 1 << 1;
        /// Ours, not the format's, which reserves these bits: a number that the journal of the image has, too, as long as nobody
        /// else opens the image for writing ([`super::journal`]).
        const JOURNAL = 0xffff_ffff << 32;
        const _ = !0;
    }
}

impl Autoclear {
    /// The bits that QEMU knows.
    pub const KNOWN: Autoclear = Autoclear::BITMAPS.union(Autoclear::DATA_FILE_RAW);
}

/// `compression_type`: how compressed clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, which QEMU calls zlib. Type 0.
    Zlib,
    /// zstd. Type 1.
    Zstd,
}

impl Compression {
    /// The number in the header.
    pub fn number(self) -> u8 {
        match self {
            Compression::Zlib => 0,
            Compression::Zstd => 1,
        }
    }
}

/// `crypt_method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CryptMethod {
    /// 0.
    None,
    /// 1: AES-CBC, legacy.
    Aes,
    /// 2.
    Luks,
    /// Anything else.
    Unknown(u32),
}

impl CryptMethod {
    pub(super) fn from_number(n: u32) -> CryptMethod {
        match n {
            0 => CryptMethod::None,
            1 => CryptMethod::Aes,
            2 => CryptMethod::Luks,
            n => CryptMethod::Unknown(n),
        }
    }

    /// The number in the header.
    pub fn number(self) -> u32 {
        match self {
            CryptMethod::None => 0,
            CryptMethod::Aes => 1,
            CryptMethod::Luks => 2,
            CryptMethod::Unknown(n) => n,
        }
    }
}
