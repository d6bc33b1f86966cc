use proptest::prelude::*;

use super::*;

fn geometry(cluster_bits: u32, extended_l2: bool) -> Geometry {
    Geometry { cluster_bits, extended_l2, refcount_order: 4, version: 3, data_file: false }
}

fn geometries() -> impl Strategy<Value = Geometry> {
    (9u32..=21, any::<bool>(), 0u32..=6, any::<bool>()).prop_map(|(bits, ext, order, data_file)| {
        Geometry {
            cluster_bits: if ext { bits.max(14) } else { bits },
            extended_l2: ext,
            refcount_order: order,
            version: 3,
            data_file,
        }
    })
}

proptest! {
    #[test]
    fn offsets_split_as_the_specification_divides(g in geometries(), offset in 0u64..1 << 60) {
        let cluster = 1u64 << g.cluster_bits;
        let entries = cluster / if g.extended_l2 { 16 } else { 8 };
        let at = GuestOffset(offset);
        prop_assert_eq!(g.l2_entries(), entries);
        prop_assert_eq!(g.l1_index(at), offset / cluster / entries);
        prop_assert_eq!(g.l2_index(at), offset / cluster % entries);
        prop_assert_eq!(g.in_cluster(at), offset % cluster);
        prop_assert_eq!(g.cluster_start(at).0, offset - offset % cluster);
        let sub = cluster / if g.extended_l2 { 32 } else { 1 };
        prop_assert_eq!(u64::from(g.subcluster_index(at)), offset % cluster / sub);
        let bits = 1u64 << g.refcount_order;
        prop_assert_eq!(g.refblock_entries(), cluster * 8 / bits);
        let host = offset / cluster;
        prop_assert_eq!(g.reftable_index(host), host / (cluster * 8 / bits));
        prop_assert_eq!(g.refblock_index(host), host % (cluster * 8 / bits));
    }

    /// Whatever the words, decoding answers, and what it accepts comes back when encoded.
    #[test]
    fn l2_entries_come_back(g in geometries(), word: u64, bitmap: u64, plain: bool) {
        // Half of the time a word that has a chance to be valid.
        let word = if plain { word & !L2_RESERVED & !(g.cluster_size() - 1) | word & 1 } else { word };
        let bitmap = if g.extended_l2 { bitmap & (bitmap << 32 | u64::from(u32::MAX)) } else { 0 };
        let guest = GuestOffset(word & OFFSET_MASK);
        let entry = L2Entry { word, bitmap };
        if let Ok(mapping) = entry.decode(&g, guest) {
            let back = L2Entry::encode(mapping, &g);
            match mapping {
                Mapping::Compressed(_) => prop_assert_eq!(back.word, word & !COPIED),
                Mapping::Standard { .. } => prop_assert_eq!(back, entry),
            }
            prop_assert_eq!(back.decode(&g, guest), Ok(mapping));
        }
    }

    /// The short way says what the long one does, and takes all that are plain.
    #[test]
    fn plain_entries_are_decoded_alike(g in geometries(), word: u64, keep: u64, bitmap: u64, copied: bool) {
        // Few of the bits that are not an offset's: else hardly any word is plain.
        let aligned = OFFSET_MASK & !(g.cluster_size() - 1);
        for word in [word, word & (aligned | COPIED), word & (aligned | COPIED | keep & (keep << 7) & (keep << 13)), 0] {
            let entry = L2Entry { word, bitmap };
            let plain = entry.plain(&g, copied);
            let decoded = entry.decode(&g, GuestOffset(word & OFFSET_MASK));
            let long = match decoded {
                Ok(Mapping::Standard { host, allocated: 1, zero: 0, copied: is })
                    if is || !copied => host,
                _ => None,
            };
            let known = !g.extended_l2 && !g.data_file;
            prop_assert_eq!(plain, long.filter(|_| known));
        }
    }

    #[test]
    fn l1_entries_come_back(g in geometries(), word: u64) {
        for word in [word, word & (COPIED | OFFSET_MASK) & !(g.cluster_size() - 1)] {
            if let Ok(entry) = L1Entry::decode(word, &g) {
                prop_assert_eq!(entry.encode(), word);
            }
        }
    }

    /// Against a block as an array of bits, least significant first in a byte, most significant byte first.
    #[test]
    fn refcounts_are_bits(order in 0u32..=6, bytes in proptest::collection::vec(any::<u8>(), 64), at: usize, value: u64) {
        let (width, mut block) = (1usize << order, bytes);
        let index = at % (64 * 8 / width);
        let value = value & (u64::MAX >> (64 - width));
        let bits = |block: &[u8]| {
            let (first, mut n) = (index * width, 0u64);
            for i in 0..width {
                // Bit i of the number, from below.
                let byte = if width < 8 { first / 8 } else { first / 8 + (width / 8 - 1 - i / 8) };
                let bit = if width < 8 { first % 8 + i } else { i % 8 };
                n |= u64::from(block[byte] >> bit & 1) << i;
            }
            n
        };
        prop_assert_eq!(refcount_get(&block, order, index), bits(&block));
        let others: Vec<u64> = (0..64 * 8 / width).map(|i| refcount_get(&block, order, i)).collect();
        refcount_set(&mut block, order, index, value);
        prop_assert_eq!(bits(&block), value);
        for (i, old) in others.iter().enumerate() {
            prop_assert_eq!(refcount_get(&block, order, i), if i == index { value } else { *old });
        }
    }
}

#[test]
fn entries_of_real_images() {
    let g = geometry(16, false);
    let decode = |word| L2Entry { word, bitmap: 0 }.decode(&g, GuestOffset(0));
    let standard = |host: Option<u64>, copied, allocated, zero| {
        Ok(Mapping::Standard { host: host.map(HostOffset), copied, allocated, zero })
    };
    assert_eq!(decode(0), Ok(Mapping::UNALLOCATED));
    assert_eq!(decode(0x8000_0000_0005_0000), standard(Some(0x50000), true, 1, 0));
    assert_eq!(decode(0x0000_0000_0005_0000), standard(Some(0x50000), false, 1, 0));
    assert_eq!(decode(1), standard(None, false, 0, 1));
    assert_eq!(decode(0x8000_0000_0005_0001), standard(Some(0x50000), true, 0, 1));
    // 64 KiB clusters: 8 bits of sectors from bit 54 on.
    assert_eq!(
        decode(0x4080_0000_0005_0123),
        Ok(Mapping::Compressed(CompressedData {
            offset: HostOffset(0x50123),
            len: 3 * 512 - 0x123,
        }))
    );
    assert_eq!(decode(0x8000_0000_0005_0200), Err(BadEntry::Unaligned(HostOffset(0x50200))));
    assert_eq!(decode(0x8000_0000_0005_0002), Err(BadEntry::Reserved(2)));
    let v2 = Geometry { version: 2, ..g };
    assert_eq!(L2Entry { word: 1, bitmap: 0 }.decode(&v2, GuestOffset(0)), Err(BadEntry::ZeroInV2));
}

#[test]
fn external_data_is_where_the_guest_sees_it() {
    let g = Geometry { data_file: true, ..geometry(16, false) };
    let decode = |word, guest| L2Entry { word, bitmap: 0 }.decode(&g, GuestOffset(guest));
    let at = |host| {
        Ok(Mapping::Standard { host: Some(HostOffset(host)), copied: true, allocated: 1, zero: 0 })
    };
    assert_eq!(decode(COPIED, 0), at(0));
    assert_eq!(decode(COPIED | 0x10000, 0x10000), at(0x10000));
    assert_eq!(decode(0, 0), Ok(Mapping::UNALLOCATED));
    let displaced = BadEntry::Displaced { host: HostOffset(0x10000), guest: GuestOffset(0x20000) };
    assert_eq!(decode(COPIED | 0x10000, 0x20000), Err(displaced));
    assert_eq!(decode(COMPRESSED | 0x10000, 0), Err(BadEntry::CompressedInDataFile));
}

#[test]
fn subclusters_have_three_states() {
    let g = geometry(16, true);
    let entry = |word, bitmap| L2Entry { word, bitmap }.decode(&g, GuestOffset(0));
    let Ok(Mapping::Standard { allocated, zero, .. }) = entry(0x50000 | COPIED, 0b100 << 32 | 0b11)
    else {
        panic!("a valid entry")
    };
    let states: Vec<_> = (0..4).map(|i| subcluster(allocated, zero, i)).collect();
    use Subcluster::{Data, Unallocated, Zero};
    assert_eq!(states, [Data, Data, Zero, Unallocated]);
    assert_eq!(entry(0x50000, 1 << 32 | 1), Err(BadEntry::Subclusters(1 << 32 | 1)));
    assert_eq!(entry(0, 1), Err(BadEntry::Subclusters(1)));
    assert_eq!(entry(0x50001, 0), Err(BadEntry::Reserved(1)));
}

#[test]
fn hexadecimal_as_c_prints_it() {
    assert_eq!(format!("{} {}", Hex(0), Hex(0x2a00)), "0 0x2a00");
}
