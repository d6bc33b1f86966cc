//! Formats a new image: what `qemu-img create` writes, as one function on a `file` node.
//!
//! The layout is planned in memory and written once, in the order header cluster, refcount table, refcount blocks, L1 table, L2 tables
//! (preallocation only), data clusters. Nothing points to something that is not there, but a power cut before the last flush
//! leaves any mixture: a new image is of no use before the function has returned.
#![forbid(unsafe_code)]

use super::check::Disk;
use super::header::{
    Autoclear, Compatible, Compression, CryptMethod, Extension, Header, Incompatible,
    MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_L1_SIZE, MAX_REFTABLE_SIZE, MIN_CLUSTER_BITS,
};
use super::layout::{COPIED, Geometry, HostOffset, refcount_set};
use crate::block::{Node, Op, ZeroFlags};
use crate::err;
use crate::error::{Errno, Error, Result};

/// The names of the feature bits that QEMU writes into version 3 images: class, bit, name.
const FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// How much is allocated from the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The mapping: every guest cluster has its place in the file, which is sparse.
    Metadata,
    /// As `Metadata`, and the file system has the space set aside.
    Falloc,
    /// As `Metadata`, and zeroes are written.
    Full,
}

/// What the new image is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// The virtual disk's length in bytes; rounded up to whole sectors.
    pub size: u64,
    /// 2 or 3.
    pub version: u32,
    /// The cluster size in bytes.
    pub cluster_size: u64,
    /// The width of a refcount in bits.
    pub refcount_bits: u32,
    /// L2 entries with subclusters.
    pub extended_l2: bool,
    /// How compressed clusters are compressed.
    pub compression: Compression,
    /// Refcounts may be updated late.
    pub lazy_refcounts: bool,
    /// The external data file's name.
    pub data_file: Option<String>,
    /// The external data file is a raw image by itself.
    pub data_file_raw: bool,
    /// The backing file's name.
    pub backing_file: Option<String>,
    /// The backing file's format.
    pub backing_format: Option<String>,
    /// What is allocated from the start.
    pub preallocation: Preallocation,
    /// How guest data is encrypted.
    pub encryption: CryptMethod,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            size: 0,
            version: 3,
            cluster_size: 65536,
            refcount_bits: 16,
            extended_l2: false,
            compression: Compression::Zlib,
            lazy_refcounts: false,
            data_file: None,
            data_file_raw: false,
            backing_file: None,
            backing_format: None,
            preallocation: Preallocation::Off,
            encryption: CryptMethod::None,
        }
    }
}

/// Where everything goes, in host clusters.
struct Plan {
    g: Geometry,
    reftable: u64,
    refblocks: u64,
    l1_entries: u64,
    l1: u64,
    /// L2 tables, with preallocation.
    l2: u64,
    /// Data clusters in the image, with preallocation and without a data file.
    data: u64,
    /// Guest clusters that are mapped.
    mapped: u64,
}

impl Plan {
    fn total(&self) -> u64 {
        1 + self.reftable + self.refblocks + self.l1 + self.l2 + self.data
    }

    fn offset(&self, cluster: u64) -> u64 {
        cluster << self.g.cluster_bits
    }

    fn l1_cluster(&self) -> u64 {
        1 + self.reftable + self.refblocks
    }

    fn l2_cluster(&self) -> u64 {
        self.l1_cluster() + self.l1
    }
}

/// Formats `file` as a new image, with everything on stable storage at the end. What is in `file` is lost. Returns the header.
///
/// # Errors
/// Options that do not go together, in QEMU's words; I/O errors.
pub async fn create(file: &Node, options: &CreateOptions) -> Result<Header> {
    check_options(options)?;
    let mut options = options.clone();
    options.size = options
        .size
        .checked_next_multiple_of(512)
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or_else(|| err!("Image size too large"))?;
    if options.data_file_raw && options.preallocation == Preallocation::Off {
        // A raw data file shows guest data where the guest has it: all of it is mapped from the start.
        options.preallocation = Preallocation::Metadata;
    }
    let mut header = header(&options);
    let plan = plan(&header, &options)?;
    header.l1_size = u32::try_from(plan.l1_entries).map_err(|_| too_large())?;
    header.l1_table_offset = HostOffset(plan.offset(plan.l1_cluster()));
    header.refcount_table_offset = HostOffset(plan.offset(1));
    header.refcount_table_clusters = u32::try_from(plan.reftable).map_err(|_| too_large())?;
    let bytes = header.serialise()?;
    let disk = Disk::new(file);
    let cannot = |what: &'static str| move |e: Errno| Error::from_errno(what, e);
    // Without a header nobody takes the rest for an image.
    write_tables(disk, &plan).await.map_err(cannot("Could not write refcount table"))?;
    allocate(file, disk, &plan, options.preallocation)
        .await
        .map_err(cannot("Could not resize image"))?;
    disk.flush().await.map_err(cannot("Could not flush the image"))?;
    let mut cluster0 = bytes;
    cluster0.resize(1 << header.cluster_bits, 0);
    disk.write(0, &cluster0).await.map_err(cannot("Could not write qcow2 header"))?;
    disk.flush().await.map_err(cannot("Could not flush the image"))?;
    Ok(header)
}

fn too_large() -> Error {
    err!("Could not resize image: Image size too large")
}

fn check_options(o: &CreateOptions) -> Result<()> {
    let bits = o.cluster_size.trailing_zeros();
    if !o.cluster_size.is_power_of_two() || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits) {
        return Err(err!("Cluster size must be a power of two between 512 and 2048k"));
    }
    if o.encryption != CryptMethod::None {
        return Err(err!("Encrypted images cannot be created"));
    }
    if o.extended_l2 && o.version < 3 {
        return Err(err!(
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use \
             version=v3 or greater)"
        ));
    }
    if o.extended_l2 && o.cluster_size < 16384 {
        return Err(err!(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
        ));
    }
    if o.backing_file.is_some() && o.preallocation != Preallocation::Off && !o.extended_l2 {
        return Err(err!(
            "Backing file and preallocation can only be used at the same time if extended_l2 is \
             enabled"
        ));
    }
    if o.backing_format.is_some() && o.backing_file.is_none() {
        return Err(err!("Backing format cannot be used without backing file"));
    }
    if o.version < 3 && o.lazy_refcounts {
        return Err(err!(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 \
             or greater)"
        ));
    }
    check_more_options(o)
}

fn check_more_options(o: &CreateOptions) -> Result<()> {
    if o.refcount_bits > 64 || !o.refcount_bits.is_power_of_two() {
        return Err(err!("Refcount width must be a power of two and may not exceed 64 bits"));
    }
    if o.version < 3 && o.refcount_bits != 16 {
        return Err(err!(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use \
             version=v3 or greater)"
        ));
    }
    if o.data_file_raw && o.data_file.is_none() {
        return Err(err!("data-file-raw requires data-file"));
    }
    if o.data_file_raw && o.backing_file.is_some() {
        return Err(err!("Backing file and data-file-raw cannot be used at the same time"));
    }
    if o.data_file.is_some() && o.version < 3 {
        return Err(err!(
            "External data files are only supported with compatibility level 1.1 and above (use \
             version=v3 or greater)"
        ));
    }
    if o.compression != Compression::Zlib && o.version < 3 {
        return Err(err!(
            "Non-zlib compression type is only supported with compatibility level 1.1 and above \
             (use version=v3 or greater)"
        ));
    }
    if o.backing_file.as_ref().is_some_and(|name| name.len() as u64 > MAX_BACKING_NAME) {
        return Err(err!("Backing file name too long"));
    }
    Ok(())
}

fn header(o: &CreateOptions) -> Header {
    let mut h = Header::new(o.version, o.cluster_size.trailing_zeros(), o.size);
    h.refcount_order = o.refcount_bits.trailing_zeros();
    h.compression = o.compression;
    h.incompatible.set(Incompatible::COMPRESSION, o.compression != Compression::Zlib);
    h.incompatible.set(Incompatible::DATA_FILE, o.data_file.is_some());
    h.incompatible.set(Incompatible::EXTENDED_L2, o.extended_l2);
    h.compatible.set(Compatible::LAZY_REFCOUNTS, o.lazy_refcounts);
    h.autoclear.set(Autoclear::DATA_FILE_RAW, o.data_file_raw);
    if let Some(format) = &o.backing_format {
        h.extensions.push(Extension::BackingFormat(format.clone().into_bytes()));
    }
    if let Some(name) = &o.data_file {
        h.extensions.push(Extension::DataFile(name.clone().into_bytes()));
    }
    if o.version > 2 {
        h.extensions.push(Extension::FeatureNames(feature_names()));
    }
    h.backing_file = o.backing_file.as_ref().map(|name| name.clone().into_bytes());
    h
}

fn feature_names() -> Vec<u8> {
    let entry = |(class, bit, name): &(u8, u8, &str)| {
        let mut entry = vec![*class, *bit];
        entry.extend(name.as_bytes());
        entry.resize(48, 0);
        entry
    };
    FEATURES.iter().flat_map(entry).collect()
}

/// Finds how many refcount blocks and table clusters everything, themselves included, needs.
fn plan(header: &Header, o: &CreateOptions) -> Result<Plan> {
    let g = header.geometry();
    let l1_entries = g.l1_entries_for(o.size);
    if l1_entries * 8 > MAX_L1_SIZE {
        return Err(too_large());
    }
    let mapped = match o.preallocation {
        Preallocation::Off => 0,
        _ => g.clusters_for(o.size),
    };
    let mut plan = Plan {
        g,
        reftable: 1,
        refblocks: 1,
        l1_entries,
        l1: (8 * l1_entries).div_ceil(g.cluster_size()),
        l2: mapped.div_ceil(g.l2_entries()),
        data: if g.data_file { 0 } else { mapped },
        mapped,
    };
    loop {
        let refblocks = plan.total().div_ceil(g.refblock_entries());
        let reftable = (8 * refblocks).div_ceil(g.cluster_size());
        if refblocks <= plan.refblocks && reftable <= plan.reftable {
            break;
        }
        plan.refblocks = refblocks.max(plan.refblocks);
        plan.reftable = reftable.max(plan.reftable);
    }
    if plan.reftable << g.cluster_bits > MAX_REFTABLE_SIZE {
        return Err(too_large());
    }
    Ok(plan)
}

async fn write_tables(disk: Disk<'_>, plan: &Plan) -> std::result::Result<(), Errno> {
    let size = plan.g.cluster_size();
    let mut table: Vec<u8> = (0..plan.refblocks)
        .flat_map(|i| plan.offset(1 + plan.reftable + i).to_be_bytes())
        .collect();
    table.resize(usize::try_from(plan.offset(plan.reftable)).unwrap_or(usize::MAX), 0);
    disk.write(size, &table).await?;
    for i in 0..plan.refblocks {
        let mut block = vec![0; 1 << plan.g.cluster_bits];
        let first = i << plan.g.refblock_bits();
        let used = plan.total().saturating_sub(first).min(plan.g.refblock_entries());
        for index in 0..used {
            refcount_set(&mut block, plan.g.refcount_order, index as usize, 1);
        }
        disk.write(plan.offset(1 + plan.reftable + i), &block).await?;
    }
    let l1: Vec<u8> = (0..plan.l1_entries)
        .map(|i| if i < plan.l2 { COPIED | plan.offset(plan.l2_cluster() + i) } else { 0 })
        .flat_map(u64::to_be_bytes)
        .collect();
    disk.write(plan.offset(plan.l1_cluster()), &l1).await?;
    for i in 0..plan.l2 {
        disk.write(plan.offset(plan.l2_cluster() + i), &l2_table(plan, i)).await?;
    }
    Ok(())
}

/// A preallocated L2 table: clusters without data in the subcluster bitmap, as QEMU has it.
fn l2_table(plan: &Plan, index: u64) -> Vec<u8> {
    let entries = plan.g.l2_entries();
    let first_data = plan.l2_cluster() + plan.l2;
    let mut bytes = Vec::with_capacity(1 << plan.g.cluster_bits);
    for guest in index * entries..(index + 1) * entries {
        let host = if plan.g.data_file { guest } else { first_data + guest };
        let word = if guest < plan.mapped { COPIED | plan.offset(host) } else { 0 };
        bytes.extend(word.to_be_bytes());
        if plan.g.extended_l2 {
            bytes.extend([0; 8]);
        }
    }
    bytes
}

/// Makes the file long enough for the data clusters.
async fn allocate(
    file: &Node,
    disk: Disk<'_>,
    plan: &Plan,
    mode: Preallocation,
) -> std::result::Result<(), Errno> {
    if plan.data == 0 {
        return Ok(());
    }
    let (start, end) = (plan.offset(plan.l2_cluster() + plan.l2), plan.offset(plan.total()));
    disk.grow(end).await?;
    match mode {
        Preallocation::Off | Preallocation::Metadata => Ok(()),
        Preallocation::Falloc => {
            let (len, flags) = (end - start, ZeroFlags::empty());
            file.submit(Op::WriteZeroes { offset: start, len, flags }).await
        }
        Preallocation::Full => {
            let zeroes = vec![0; 1 << 20];
            let mut at = start;
            while at < end {
                let n = usize::try_from(end - at).unwrap_or(usize::MAX).min(zeroes.len());
                disk.write(at, &zeroes[..n]).await?;
                at += n as u64;
            }
            Ok(())
        }
    }
}
