//! The header's extensions, one by one.
//!
//! Spec: "Header extensions" and the sections of each. What is unknown is kept as it is.
#![forbid(unsafe_code)]

use super::features::{Autoclear, CryptMethod};
use super::header::{Header, MAX_BITMAP_DIRECTORY_SIZE, MAX_BITMAPS};
use super::layout::HostOffset;
use crate::err;
use crate::error::Result;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_BITMAPS: u32 = 0x2385_2875;
const EXT_CRYPTO: u32 = 0x0537_be77;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// QEMU's buffer for a format name, terminating zero included.
const FORMAT_NAME_BUFFER: usize = 16;

/// The bitmaps extension (spec: "Bitmaps extension").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// How many bitmaps, at least 1.
    pub count: u32,
    /// Length in bytes of the bitmap directory.
    pub directory_size: u64,
    /// Where the bitmap directory starts.
    pub directory_offset: HostOffset,
}

/// One header extension, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extension {
    /// The backing file's format, as written.
    BackingFormat(Vec<u8>),
    /// The feature name table: entries of 48 bytes, as written. See [`Header::feature_name`].
    FeatureNames(Vec<u8>),
    /// Persistent bitmaps. Only while [`Autoclear::BITMAPS`] is set; a stale one is [`Extension::StaleBitmaps`].
    Bitmaps(BitmapsExtension),
    /// A bitmaps extension that must be considered inconsistent, because a writer did not know it: as written.
    /// QEMU drops it when it rewrites the header.
    StaleBitmaps(Vec<u8>),
    /// Where the encryption header is: offset and length in bytes.
    Crypto {
        /// First byte.
        offset: HostOffset,
        /// Length in bytes.
        len: u64,
    },
    /// The name of the external data file.
    DataFile(Vec<u8>),
    /// Not known; kept.
    Unknown {
        /// Its type.
        magic: u32,
        /// Its data.
        data: Vec<u8>,
    },
}

/// The big-endian number at `at`.
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_be_bytes(word)
}

/// The big-endian number at `at`.
pub fn be64(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_be_bytes(word)
}

/// Text up to the first zero byte, as C sees it; whatever is not UTF-8 is replaced.
pub fn c_text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// The extension at `at` of `cluster0`, and where the next one is; `None` at the end.
///
/// # Errors
/// In QEMU's words.
pub fn parse_extension(
    header: &Header,
    cluster0: &[u8],
    at: usize,
) -> Result<Option<(Extension, usize)>> {
    let end = header.extensions_end();
    if at >= end {
        return Ok(None);
    }
    if end - at < 8 {
        return Err(err!("Header extension too large"));
    }
    let (magic, len, data) = (be32(cluster0, at), be32(cluster0, at + 4) as usize, at + 8);
    if len > end - data {
        return Err(err!("Header extension too large"));
    }
    if magic == EXT_END {
        return Ok(None);
    }
    let bytes = &cluster0[data..data + len];
    let extension = match magic {
        EXT_BACKING_FORMAT if len >= FORMAT_NAME_BUFFER => {
            return Err(err!(
                "ERROR: ext_backing_format: len={len} too large (>={FORMAT_NAME_BUFFER})"
            ));
        }
        EXT_BACKING_FORMAT => Extension::BackingFormat(bytes.to_vec()),
        EXT_FEATURE_NAMES => Extension::FeatureNames(bytes.to_vec()),
        EXT_BITMAPS => parse_bitmaps(header, bytes)?,
        EXT_CRYPTO => parse_crypto(header, bytes)?,
        EXT_DATA_FILE => Extension::DataFile(bytes.to_vec()),
        magic => Extension::Unknown { magic, data: bytes.to_vec() },
    };
    Ok(Some((extension, data + len.next_multiple_of(8))))
}

fn parse_bitmaps(header: &Header, bytes: &[u8]) -> Result<Extension> {
    if bytes.len() != 24 {
        return Err(err!("bitmaps_ext: Invalid extension length"));
    }
    if !header.autoclear.contains(Autoclear::BITMAPS) {
        return Ok(Extension::StaleBitmaps(bytes.to_vec()));
    }
    if be32(bytes, 4) != 0 {
        return Err(err!("bitmaps_ext: Reserved field is not zero"));
    }
    let (count, directory_size) = (be32(bytes, 0), be64(bytes, 8));
    let directory_offset = HostOffset(be64(bytes, 16));
    if count > MAX_BITMAPS {
        return Err(err!(
            "bitmaps_ext: Image has {count} bitmaps, exceeding the QEMU supported maximum of \
             {MAX_BITMAPS}"
        ));
    }
    if count == 0 {
        return Err(err!("found bitmaps extension with zero bitmaps"));
    }
    if !header.geometry().is_cluster_aligned(directory_offset) {
        return Err(err!("bitmaps_ext: invalid bitmap directory offset"));
    }
    if directory_size > MAX_BITMAP_DIRECTORY_SIZE {
        return Err(err!(
            "bitmaps_ext: bitmap directory size ({directory_size}) exceeds the maximum \
             supported size ({MAX_BITMAP_DIRECTORY_SIZE})"
        ));
    }
    Ok(Extension::Bitmaps(BitmapsExtension { count, directory_size, directory_offset }))
}

fn parse_crypto(header: &Header, bytes: &[u8]) -> Result<Extension> {
    if header.crypt_method != CryptMethod::Luks {
        return Err(err!("CRYPTO header extension only expected with LUKS encryption method"));
    }
    if bytes.len() != 16 {
        let len = bytes.len();
        return Err(err!("CRYPTO header extension size {len}, but expected size 16"));
    }
    let (offset, len) = (HostOffset(be64(bytes, 0)), be64(bytes, 8));
    if !header.geometry().is_cluster_aligned(offset) {
        let size = 1u64 << header.cluster_bits;
        return Err(err!(
            "Encryption header offset '{}' is not a multiple of cluster size '{size}'",
            offset.0
        ));
    }
    Ok(Extension::Crypto { offset, len })
}

impl Extension {
    /// Its type and its data, as written.
    pub(super) fn parts(&self) -> (u32, Vec<u8>) {
        match self {
            Extension::BackingFormat(name) => (EXT_BACKING_FORMAT, name.clone()),
            Extension::FeatureNames(table) => (EXT_FEATURE_NAMES, table.clone()),
            Extension::StaleBitmaps(data) => (EXT_BITMAPS, data.clone()),
            Extension::Bitmaps(b) => {
                let mut data = b.count.to_be_bytes().to_vec();
                data.extend([0; 4]);
                data.extend(b.directory_size.to_be_bytes());
                data.extend(b.directory_offset.0.to_be_bytes());
                (EXT_BITMAPS, data)
            }
            Extension::Crypto { offset, len } => {
                let words = [offset.0, *len];
                (EXT_CRYPTO, words.iter().flat_map(|w| w.to_be_bytes()).collect())
            }
            Extension::DataFile(name) => (EXT_DATA_FILE, name.clone()),
            Extension::Unknown { magic, data } => (*magic, data.clone()),
        }
    }
}

/// The (bit, name) pairs of one class in the feature name table, up to an entry without a name.
pub fn feature_names(extensions: &[Extension], class: u8) -> impl Iterator<Item = (u8, String)> {
    let table = extensions.iter().rev().find_map(|e| match e {
        Extension::FeatureNames(table) => Some(table.as_slice()),
        _ => None,
    });
    let entries = table.unwrap_or_default().chunks_exact(48).take_while(|e| e[2] != 0);
    let of_class = entries.filter(move |e| e[0] == class && e[1] < 64);
    of_class.map(|e| (e[1], c_text(&e[2..])))
}
