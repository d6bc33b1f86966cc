//! The options of `qcow2`: their types, QEMU's rules and words, and what they come to for an image.
#![forbid(unsafe_code)]

use serde_json::Value;

use super::cache::Shape;
use super::header::{Compatible, CryptMethod, Header, MAX_L1_SIZE, MIN_CLUSTER_BITS};
use super::layout::Geometry;
use crate::block::OpenArgs;
use crate::err;
use crate::error::Result;
use crate::qapi::{Kind, OptionSpec, Options};

/// The options, in the order of QEMU's schema.
pub const SPECS: &[OptionSpec] = &[
    OptionSpec::required("file", Kind::BlockdevRef),
    OptionSpec::optional("backing", Kind::BlockdevRefOrNull),
    OptionSpec::optional("lazy-refcounts", Kind::Bool),
    OptionSpec::optional("pass-discard-request", Kind::Bool),
    OptionSpec::optional("pass-discard-snapshot", Kind::Bool),
    OptionSpec::optional("pass-discard-other", Kind::Bool),
    OptionSpec::optional("discard-no-unref", Kind::Bool),
    OptionSpec::optional("overlap-check", Kind::Any),
    OptionSpec::optional("cache-size", INT),
    OptionSpec::optional("l2-cache-size", INT),
    OptionSpec::optional("l2-cache-entry-size", INT),
    OptionSpec::optional("refcount-cache-size", INT),
    OptionSpec::optional("cache-clean-interval", INT),
    OptionSpec::optional("encrypt", Kind::Any),
    OptionSpec::optional("data-file", Kind::BlockdevRef),
];

const INT: Kind = Kind::Int { bits: 64, signed: true };

/// QEMU's default for the most memory for L2 tables.
const L2_CACHE_MAX: u64 = 32 << 20;
/// QEMU's least number of cached L2 slices.
const L2_SLOTS_MIN: u64 = 2;
/// QEMU's least number of cached refcount blocks.
const REFBLOCKS_MIN: u64 = 4;
/// The size of a slice unless the user says otherwise: one page, one disk block. QEMU reads whole tables where its
/// cache can hold them all.
const SLICE: u64 = 4096;
/// QEMU's default for `cache-clean-interval` in seconds.
const CLEAN_INTERVAL: u64 = 600;

bitflags::bitflags! {
    /// The kinds of metadata that a write is checked against (`overlap-check`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Overlap: u16 {
        /// The header.
        const MAIN_HEADER = 1;
        /// The active L1 table.
        const ACTIVE_L1 = 1 << 1;
        /// L2 tables of the active L1 table.
        const ACTIVE_L2 = 1 << 2;
        /// Refcount blocks.
        const REFCOUNT_BLOCK = 1 << 3;
        /// The refcount table.
        const REFCOUNT_TABLE = 1 << 4;
        /// The snapshot table.
        const SNAPSHOT_TABLE = 1 << 5;
        /// L1 tables of snapshots.
        const INACTIVE_L1 = 1 << 6;
        /// L2 tables of snapshots.
        const INACTIVE_L2 = 1 << 7;
        /// The bitmap directory.
        const BITMAP_DIRECTORY = 1 << 8;
    }
}

impl Overlap {
    const CONSTANT: Overlap = Overlap::MAIN_HEADER
        .union(Overlap::ACTIVE_L1)
        .union(Overlap::REFCOUNT_TABLE)
        .union(Overlap::SNAPSHOT_TABLE)
        .union(Overlap::BITMAP_DIRECTORY);
    const CACHED: Overlap = Overlap::CONSTANT
        .union(Overlap::ACTIVE_L2)
        .union(Overlap::REFCOUNT_BLOCK)
        .union(Overlap::INACTIVE_L1);

    /// QEMU's words for one kind, in errors.
    pub fn words(self) -> &'static str {
        match self {
            Overlap::MAIN_HEADER => "qcow2_header",
            Overlap::ACTIVE_L1 => "active L1 table",
            Overlap::ACTIVE_L2 => "active L2 table",
            Overlap::REFCOUNT_BLOCK => "refcount block",
            Overlap::REFCOUNT_TABLE => "refcount table",
            Overlap::SNAPSHOT_TABLE => "snapshot table",
            Overlap::INACTIVE_L1 => "inactive L1 table",
            Overlap::INACTIVE_L2 => "inactive L2 table",
            _ => "bitmap directory",
        }
    }

    /// By the names of QEMU's options.
    const NAMES: [(&str, Overlap); 9] = [
        ("main-header", Overlap::MAIN_HEADER),
        ("active-l1", Overlap::ACTIVE_L1),
        ("active-l2", Overlap::ACTIVE_L2),
        ("refcount-table", Overlap::REFCOUNT_TABLE),
        ("refcount-block", Overlap::REFCOUNT_BLOCK),
        ("snapshot-table", Overlap::SNAPSHOT_TABLE),
        ("inactive-l1", Overlap::INACTIVE_L1),
        ("inactive-l2", Overlap::INACTIVE_L2),
        ("bitmap-directory", Overlap::BITMAP_DIRECTORY),
    ];
}

/// What the options come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices {
    /// Refcounts may be written late.
    pub lazy_refcounts: bool,
    /// Guest discards are passed to the file.
    pub pass_discard_request: bool,
    /// What deleted snapshots free is discarded in the file.
    pub pass_discard_snapshot: bool,
    /// Whatever else is freed is discarded in the file.
    pub pass_discard_other: bool,
    /// Discarded clusters keep their place.
    pub discard_no_unref: bool,
    /// What writes are checked against.
    pub overlap_check: Overlap,
    /// The shape of the L2 cache.
    pub l2: Shape,
    /// The most refcount blocks cached.
    pub refblocks: u64,
    /// Seconds after which unused cached tables are given back; 0 = never.
    pub clean_interval: u64,
}

impl Choices {
    /// Takes the driver's options out of `args`, children left in.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn take(args: &mut OpenArgs<'_>, header: &Header) -> Result<Choices> {
        let (l2, refblocks) = take_caches(args, header)?;
        // A negative number is a large one for QEMU.
        let clean_interval = args.take_size("cache-clean-interval").unwrap_or(Some(u64::MAX));
        let clean_interval = clean_interval.unwrap_or(CLEAN_INTERVAL);
        if clean_interval > u64::from(u32::MAX) {
            return Err(err!("Cache clean interval too big"));
        }
        let lazy = header.compatible.contains(Compatible::LAZY_REFCOUNTS);
        let lazy_refcounts = args.take_bool("lazy-refcounts")?.unwrap_or(lazy);
        if lazy_refcounts && header.version < 3 {
            return Err(err!(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
            ));
        }
        let overlap_check = take_overlap(&mut args.options)?;
        let unmap = args.in_force.discard_unmap;
        let pass_discard_request = args.take_bool("pass-discard-request")?.unwrap_or(unmap);
        let pass_discard_snapshot = args.take_bool("pass-discard-snapshot")?.unwrap_or(true);
        let pass_discard_other = args.take_bool("pass-discard-other")?.unwrap_or(false);
        let discard_no_unref = args.take_bool("discard-no-unref")?.unwrap_or(false);
        if discard_no_unref && header.version < 3 {
            return Err(err!("discard-no-unref is only supported since qcow2 version 3"));
        }
        refuse_encryption(&mut args.options, header.crypt_method)?;
        Ok(Choices {
            lazy_refcounts,
            pass_discard_request,
            pass_discard_snapshot,
            pass_discard_other,
            discard_no_unref,
            overlap_check,
            l2,
            refblocks,
            clean_interval,
        })
    }

    /// For `--print-graph`.
    pub fn in_force(&self) -> Options {
        let overlap = match self.overlap_check {
            o if o.is_empty() => "none".to_owned(),
            Overlap::CONSTANT => "constant".to_owned(),
            Overlap::CACHED => "cached".to_owned(),
            o if o.is_all() => "all".to_owned(),
            o => {
                let names = Overlap::NAMES.iter().filter(|(_, bit)| o.contains(*bit));
                names.map(|(name, _)| *name).collect::<Vec<_>>().join("+")
            }
        };
        [
            ("lazy-refcounts", self.lazy_refcounts.into()),
            ("pass-discard-request", self.pass_discard_request.into()),
            ("pass-discard-snapshot", self.pass_discard_snapshot.into()),
            ("pass-discard-other", self.pass_discard_other.into()),
            ("discard-no-unref", self.discard_no_unref.into()),
            ("overlap-check", Value::from(overlap)),
            ("cache-clean-interval", self.clean_interval.into()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into_iter()
        .collect()
    }
}

/// The L2 cache's shape and the number of refcount blocks, by QEMU's rules for the three sizes.
fn take_caches(args: &mut OpenArgs<'_>, header: &Header) -> Result<(Shape, u64)> {
    let geometry = header.geometry();
    let cluster = geometry.cluster_size();
    let both = args.take_size("cache-size")?;
    let l2 = args.take_size("l2-cache-size")?;
    let refcount = args.take_size("refcount-cache-size")?;
    let entry_bytes = 1 << geometry.l2_entry_bits();
    let l2_all = (geometry.clusters_for(header.size) * entry_bytes).next_multiple_of(cluster);
    let (l2_size, refcount_size) = split_cache(both, l2, refcount, (l2_all, cluster))?;
    let slice = args.take_size("l2-cache-entry-size")?.unwrap_or(SLICE.min(cluster));
    if !(1 << MIN_CLUSTER_BITS..=cluster).contains(&slice) || !slice.is_power_of_two() {
        return Err(err!(
            "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
        ));
    }
    let most = u64::from(i32::MAX.unsigned_abs());
    let slots = (l2_size / slice).max(L2_SLOTS_MIN);
    if slots > most {
        return Err(err!("L2 cache size too big"));
    }
    let refblocks = (refcount_size / cluster).max(REFBLOCKS_MIN);
    if refblocks > most {
        return Err(err!("Refcount cache size too big"));
    }
    let entries = slice / entry_bytes;
    let to_u32 = |n| u32::try_from(n).unwrap_or(u32::MAX);
    let shape = Shape {
        slices: slices_for(&geometry, header.size, entries),
        entries: to_u32(entries),
        entry_words: to_u32(entry_bytes / 8),
        slots: to_u32(slots),
    };
    Ok((shape, refblocks))
}

/// How many slices of `entries` entries the cache has room for: what a disk needs that has grown to 8 times of `size`
/// bytes, or to 4 TiB (beside each slice's tag of 8 bytes of address space this costs nothing), as far as an L1 table
/// can describe it; but always what the disk needs now.
fn slices_for(geometry: &Geometry, size: u64, entries: u64) -> u64 {
    let slices = |size| geometry.clusters_for(size).div_ceil(entries);
    let most = MAX_L1_SIZE / 8 * (geometry.l2_entries() / entries);
    slices(size.saturating_mul(8).max(4 << 40)).min(most).max(slices(size))
}

/// The bytes for L2 tables and for refcount blocks. `l2_all`: what all L2 tables take.
fn split_cache(
    both: Option<u64>,
    l2: Option<u64>,
    refcount: Option<u64>,
    (l2_all, cluster): (u64, u64),
) -> Result<(u64, u64)> {
    let l2_capped = l2_all.min(l2.unwrap_or(L2_CACHE_MAX));
    let Some(both) = both else { return Ok((l2_capped, refcount.unwrap_or(0))) };
    match (l2, refcount) {
        (Some(_), Some(_)) => Err(err!(
            "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
        )),
        (Some(l2), _) if l2 > both => Err(err!("l2-cache-size may not exceed cache-size")),
        (_, Some(r)) if r > both => Err(err!("refcount-cache-size may not exceed cache-size")),
        (Some(_), None) => Ok((l2_capped, both - l2_capped)),
        (None, Some(r)) => Ok((both - r, r)),
        (None, None) => {
            let least = REFBLOCKS_MIN * cluster;
            let fits = both >= l2_all.saturating_add(least);
            let l2 = if fits { l2_all } else { both - both.min(least) };
            Ok((l2, both - l2))
        }
    }
}

/// A truth value that may come from a keyval text, where its type is not known.
fn truth(name: &str, value: &Value) -> Result<bool> {
    match value {
        Value::Bool(value) => Ok(*value),
        Value::String(s) if matches!(s.as_str(), "on" | "yes" | "true" | "y") => Ok(true),
        Value::String(s) if matches!(s.as_str(), "off" | "no" | "false" | "n") => Ok(false),
        Value::String(_) => Err(err!("Parameter '{name}' expects 'on' or 'off'")),
        _ => Err(err!("Invalid parameter type for '{name}', expected: boolean")),
    }
}

fn take_overlap(options: &mut Options) -> Result<Overlap> {
    let template = |word: &str, name: &str| match word {
        "none" => Ok(Overlap::empty()),
        "constant" => Ok(Overlap::CONSTANT),
        "cached" => Ok(Overlap::CACHED),
        "all" => Ok(Overlap::all()),
        _ => Err(err!("Parameter '{name}' does not accept value '{word}'")),
    };
    let mut object = match options.shift_remove("overlap-check") {
        None => return Ok(Overlap::CACHED),
        Some(Value::String(word)) => return template(&word, "overlap-check"),
        Some(Value::Object(object)) => object,
        Some(_) => {
            return Err(err!(
                "Invalid parameter type for 'overlap-check', expected: Qcow2OverlapChecks"
            ));
        }
    };
    let mut overlap = match object.shift_remove("template") {
        None => Overlap::CACHED,
        Some(Value::String(word)) => template(&word, "template")?,
        Some(_) => {
            return Err(err!(
                "Invalid parameter type for 'overlap-check.template', expected: string"
            ));
        }
    };
    for (name, bit) in Overlap::NAMES {
        if let Some(value) = object.shift_remove(name) {
            overlap.set(bit, truth(&format!("overlap-check.{name}"), &value)?);
        }
    }
    match object.keys().next() {
        Some(key) => Err(err!("Parameter 'overlap-check.{key}' is unexpected")),
        None => Ok(overlap),
    }
}

/// Encrypted images are not opened yet. Where decryption will sit: `read.rs`, between the transfer from the data file
/// and the guest's memory (LUKS counts sectors by host offset, AES by guest offset).
fn refuse_encryption(options: &mut Options, method: CryptMethod) -> Result<()> {
    let format = match options.shift_remove("encrypt") {
        None => None,
        Some(Value::Object(encrypt)) => match encrypt.get("format") {
            Some(Value::String(format)) if matches!(format.as_str(), "aes" | "luks") => {
                Some(format.clone())
            }
            Some(Value::String(format)) => {
                return Err(err!("Parameter 'format' does not accept value '{format}'"));
            }
            _ => return Err(err!("Parameter 'encrypt.format' is missing")),
        },
        Some(_) => return Err(err!("Invalid parameter type for 'encrypt', expected: object")),
    };
    let name = match method {
        CryptMethod::None => match format {
            None => return Ok(()),
            Some(format) => {
                return Err(err!(
                    "No encryption in image header, but options specified format '{format}'"
                ));
            }
        },
        CryptMethod::Aes => "aes",
        CryptMethod::Luks => "luks",
        CryptMethod::Unknown(n) => return Err(err!("Unsupported encryption method {n}")),
    };
    match format {
        Some(format) if format != name => {
            Err(err!("Header reported '{name}' encryption format but options specify '{format}'"))
        }
        _ => Err(err!("qcow2: the image is encrypted ({name}), which is not supported yet")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn caches_are_split_as_qemu_does() {
        const M: u64 = 1 << 20;
        let split = |both, l2, refcount| {
            split_cache(both, l2, refcount, (64 * M, 65536)).map_err(|e| e.to_string())
        };
        assert_eq!(split(None, None, None), Ok((32 * M, 0)));
        assert_eq!(split(None, Some(M), Some(2 * M)), Ok((M, 2 * M)));
        assert_eq!(split(None, Some(100 * M), None), Ok((64 * M, 0)));
        assert_eq!(split(Some(M), None, None), Ok((M - 262_144, 262_144)));
        assert_eq!(split(Some(100 * M), None, None), Ok((64 * M, 36 * M)));
        assert_eq!(split(Some(10 * M), Some(4 * M), None), Ok((4 * M, 6 * M)));
        assert_eq!(split(Some(10 * M), None, Some(4 * M)), Ok((6 * M, 4 * M)));
        let text = "l2-cache-size may not exceed cache-size";
        assert_eq!(split(Some(M), Some(2 * M), None), Err(text.into()));
        let text = "refcount-cache-size may not exceed cache-size";
        assert_eq!(split(Some(M), None, Some(2 * M)), Err(text.into()));
        assert!(split(Some(M), Some(1), Some(1)).unwrap_err().ends_with("at the same time"));
    }

    #[test]
    fn the_cache_has_room_for_a_disk_that_grows() {
        let slices = |cluster_bits, size| {
            let geometry = Header::new(3, cluster_bits, size).geometry();
            slices_for(&geometry, size, geometry.l2_entries().min(512))
        };
        assert_eq!(slices(16, 1 << 30), (4 << 40) / (512 << 16));
        assert_eq!(slices(16, 10 << 40), (80 << 40) / (512 << 16));
        assert_eq!(slices(9, 1 << 30), 4 << 20);
        // The largest disks: an L1 table of the largest size, and what is no multiple of anything.
        assert_eq!(slices(9, 128 << 30), 4 << 20);
        assert_eq!(slices(16, (2 << 50) - 1), (2 << 50) / (512 << 16));
        assert_eq!(slices(21, u64::MAX), (1 << 43) / 512);
    }

    #[test]
    fn overlap_checks_by_word_and_by_kind() {
        let take = |value: Value| {
            let mut options = Options::from_iter([("overlap-check".to_owned(), value)]);
            take_overlap(&mut options).map_err(|e| e.to_string())
        };
        assert_eq!(take(json!("all")), Ok(Overlap::all()));
        assert_eq!(take(json!({ "template": "none", "active-l2": true })), Ok(Overlap::ACTIVE_L2));
        let cached = Overlap::CACHED - Overlap::MAIN_HEADER;
        assert_eq!(take(json!({ "main-header": "off" })), Ok(cached));
        assert!(take(json!("some")).is_err() && take(json!({ "x": true })).is_err());
    }
}
