//! Fields changed to values that could hurt.

use super::entropy::Entropy;
use super::image::{Field, Kind, Made};

/// Changes at most this many fields.
const FIELDS_MAX: u64 = 6;

/// A field, what it was and what it is; or the length of the file, as a header's field of no width.
pub type Change = (Field, u64, u64);

/// Changes some fields, seldom the file's length. Answers the changes: there may be none.
pub fn mutate(m: &mut Made, e: &mut Entropy) -> Vec<Change> {
    let mut changes = Vec::new();
    if e.one_in(3) {
        return changes;
    }
    for _ in 0..=e.below(FIELDS_MAX) {
        let kind = match e.byte() % 16 {
            0..=3 => Kind::Header,
            4..=6 => Kind::L1,
            7..=10 => Kind::L2,
            11 | 12 => Kind::Reftable,
            13 | 14 => Kind::Refblock,
            _ => Kind::Other,
        };
        let mut fields = m.of(kind);
        if e.byte() & 3 != 0 {
            // Most entries are empty: others are of more interest.
            fields.retain(|f| m.get(*f) != 0);
        }
        if fields.is_empty() {
            continue;
        }
        let field = e.pick(&fields);
        let value = value(m, field, e);
        let old = m.get(field);
        m.put(field.at, field.width, value);
        changes.push((field, old, value));
    }
    let old = m.file.len() as u64;
    match e.byte() {
        0xfe => {
            let len = e.below(m.file.len() as u64).max(200);
            m.file.truncate(len as usize);
        }
        0xff => m.file.resize(m.file.len() + 3000, 0),
        // Tables of any length fit into it.
        0xf0..=0xfd => m.len = 1 << (20 + e.below(24)),
        _ => {}
    }
    let new = m.len.max(m.file.len() as u64);
    if new != old {
        changes.push((Field { at: 0, width: 0, kind: Kind::Header }, old, new));
    }
    changes
}

fn value(m: &Made, field: Field, e: &mut Entropy) -> u64 {
    let old = m.get(field);
    let bits = 8 * field.width as u64;
    let cluster = 1u64 << m.shape.cluster_bits;
    match e.byte() % 16 {
        0 => 0,
        1 => old ^ 1 << e.below(bits),
        2 => old.wrapping_add(1),
        3 => old.wrapping_sub(1),
        4 => u64::MAX,
        5 => e.word(),
        6 => u64::from(e.byte()),
        7 => 1 << e.below(bits),
        // Somebody else's place, with flags or without.
        8..=11 => e.pick(&m.places) | flags(e),
        12 => {
            let file = m.file.len() as u64;
            [file, file - cluster, file + cluster, file + 512, file * 9][e.below(5) as usize]
                | flags(e)
        }
        13 => {
            let end = 1 << 56;
            [end, end - cluster, 1 << 55, i64::MAX as u64, (1 << 62) - cluster][e.below(5) as usize]
                | flags(e)
        }
        14 => {
            let other = e.pick(&m.of(field.kind));
            m.get(other)
        }
        _ if field.kind == Kind::Header && e.byte() & 1 == 0 => limit(m, e),
        _ => old | flags(e),
    }
}

/// QEMU's limits of tables: entries of the L1 table, clusters of the refcount table, snapshots, bitmaps; about.
fn limit(m: &Made, e: &mut Entropy) -> u64 {
    let limits = [4 << 20, (8 << 20) >> m.shape.cluster_bits, 65536, 65535, 1024 * 65535];
    e.pick(&limits) + e.pick(&[0, 0, 1])
}

fn flags(e: &mut Entropy) -> u64 {
    match e.byte() % 8 {
        0..=2 => 1 << 63,
        3 => 1,
        4 => 1 << 63 | 1,
        5 => 1 << 62,
        _ => 0,
    }
}
