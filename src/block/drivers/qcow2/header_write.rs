//! A whole header as bytes, for images that are created. (What changes while an image is open is in `header_io.rs`.)
#![forbid(unsafe_code)]

use super::header::{Compression, Header, MAGIC, MAX_BACKING_NAME, V3_LENGTH, V3_LENGTH_WRITTEN};
use super::layout::HostOffset;
use crate::err;
use crate::error::Result;

impl Header {
    /// The header as bytes, from the start of the file to the end of the backing file's name; the rest of cluster 0
    /// may be filled with zeroes. The backing file's name follows the extensions.
    ///
    /// # Errors
    /// It does not fit into a cluster, or the backing file's name is too long.
    pub fn serialise(&self) -> Result<Vec<u8>> {
        let mut out = self.serialise_fields();
        for extension in &self.extensions {
            let (magic, data) = extension.parts();
            out.extend(magic.to_be_bytes());
            out.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
            out.extend(&data);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend([0; 8]);
        if let Some(name) = &self.backing_file {
            let (at, len) = (out.len() as u64, name.len() as u64);
            if len > MAX_BACKING_NAME {
                return Err(err!("Backing file name too long"));
            }
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
            out.extend(name);
        }
        if out.len() as u64 > 1 << self.cluster_bits {
            return Err(err!("The qcow2 header does not fit into a cluster"));
        }
        Ok(out)
    }

    fn serialise_fields(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        let HostOffset(l1) = self.l1_table_offset;
        let HostOffset(reftable) = self.refcount_table_offset;
        let HostOffset(snapshots) = self.snapshots_offset;
        out.extend(MAGIC.to_be_bytes());
        out.extend(self.version.to_be_bytes());
        // The backing file's offset and length are filled in later.
        out.extend([0; 12]);
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(self.crypt_method.number().to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(l1.to_be_bytes());
        out.extend(reftable.to_be_bytes());
        out.extend(self.refcount_table_clusters.to_be_bytes());
        out.extend(self.nb_snapshots.to_be_bytes());
        out.extend(snapshots.to_be_bytes());
        if self.version == 2 {
            return out;
        }
        out.extend(self.incompatible.bits().to_be_bytes());
        out.extend(self.compatible.bits().to_be_bytes());
        out.extend(self.autoclear.bits().to_be_bytes());
        out.extend(self.refcount_order.to_be_bytes());
        // A compression type that is not 0 needs its field.
        let least =
            if self.compression == Compression::Zlib { V3_LENGTH } else { V3_LENGTH_WRITTEN };
        let length = self.header_length.max(least);
        out.extend(length.to_be_bytes());
        if length > V3_LENGTH {
            out.push(self.compression.number());
            out.extend(&self.unknown_fields);
        }
        out.resize(length as usize, 0);
        out
    }
}
