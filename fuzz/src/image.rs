//! Sound images of random features, byte by byte: nothing of the driver is used, so that it cannot agree with itself.

use std::io::Write;

use super::entropy::Entropy;

/// Clusters are not larger than this (bytes, log2): a larger one is nothing but slower.
const CLUSTER_BITS: [u32; 8] = [9, 9, 12, 9, 10, 14, 16, 9];
/// Guest disks are about as long as this at most, in bytes and in clusters.
const SIZE_MAX: u64 = 1 << 20;
const CLUSTERS_MAX: u64 = 200;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// What a number in the image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A field of the header or of an extension.
    Header,
    /// An entry of the active L1 table.
    L1,
    /// A word of an active L2 table.
    L2,
    /// An entry of the refcount table.
    Reftable,
    /// Eight bytes of a refcount block.
    Refblock,
    /// A field of the snapshot table, of an L1 table of a snapshot, of the bitmap directory.
    Other,
}

/// A number in the image.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its first byte.
    pub at: usize,
    /// Its bytes: 1, 2, 4 or 8.
    pub width: usize,
    pub kind: Kind,
}

/// The features of an image.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub version: u32,
    pub cluster_bits: u32,
    pub extended: bool,
    pub refcount_order: u32,
    pub lazy: bool,
    pub zstd: bool,
    pub data_file: bool,
    pub snapshot: bool,
    pub bitmap: bool,
    /// The backing file's bytes; `None`: there is none.
    pub backing: Option<u64>,
    /// The guest's disk in bytes.
    pub size: u64,
}

impl Shape {
    /// The simplest one, of clusters of 512 bytes.
    pub const PLAIN: Shape = Shape {
        version: 3,
        cluster_bits: 9,
        extended: false,
        refcount_order: 4,
        lazy: false,
        zstd: false,
        data_file: false,
        snapshot: false,
        bitmap: false,
        backing: None,
        size: 65536,
    };

    /// Any.
    pub fn random(e: &mut Entropy) -> Shape {
        let cluster_bits = e.pick(&CLUSTER_BITS);
        let version = if e.one_in(6) { 2 } else { 3 };
        let v3 = version > 2;
        let refcount_order = if v3 { e.pick(&[4, 4, 0, 1, 2, 3, 5, 6]) } else { 4 };
        let data_file = v3 && e.one_in(10);
        let most = SIZE_MAX.min(CLUSTERS_MAX << cluster_bits);
        let sectors = 1 + e.below(most / 512);
        let size = if e.one_in(3) { sectors * 512 } else { most / 2 };
        let extended = v3 && cluster_bits >= 14 && e.one_in(2);
        Shape {
            version,
            cluster_bits,
            extended,
            refcount_order,
            lazy: v3 && e.one_in(8),
            zstd: v3 && !data_file && e.one_in(8),
            data_file,
            snapshot: !data_file && refcount_order > 0 && e.one_in(3),
            bitmap: v3 && e.one_in(8),
            backing: e.one_in(4).then(|| 1 + e.below(2 * size)),
            size,
        }
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    fn l2_entries(&self) -> u64 {
        self.cluster() / self.entry()
    }

    fn entry(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }
}

/// An image and its files.
pub struct Made {
    pub shape: Shape,
    pub file: Vec<u8>,
    /// The image file's length in bytes, if it is longer than `file`: zeroes.
    pub len: u64,
    pub data: Vec<u8>,
    pub backing: Vec<u8>,
    /// What the guest sees.
    pub content: Vec<u8>,
    pub fields: Vec<Field>,
    /// The offsets of clusters with something in them.
    pub places: Vec<u64>,
}

impl Made {
    /// Overwrites a number.
    pub fn put(&mut self, at: usize, width: usize, value: u64) {
        self.file[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }

    /// The number in a field.
    pub fn get(&self, field: Field) -> u64 {
        self.file[field.at..][..field.width].iter().fold(0, |n, b| n << 8 | u64::from(*b))
    }

    /// The fields of a kind.
    pub fn of(&self, kind: Kind) -> Vec<Field> {
        self.fields.iter().copied().filter(|f| f.kind == kind).collect()
    }
}

/// The bytes of something that is nowhere else: `seed` and its place, over and over.
fn pattern(seed: u8, offset: u64, bytes: &mut [u8]) {
    for (i, chunk) in bytes.chunks_mut(8).enumerate() {
        let word = (offset + 8 * i as u64) | u64::from(seed | 1) << 48;
        chunk.copy_from_slice(&word.to_be_bytes()[..chunk.len()]);
    }
}

struct Builder<'a, 'e> {
    e: &'a mut Entropy<'e>,
    m: Made,
    refcounts: Vec<u64>,
    /// The end of the compressed data of the last cluster that has some.
    compressed: u64,
}

/// Makes an image; what is in it comes from `e`.
pub fn make(shape: Shape, e: &mut Entropy) -> Made {
    let (mut backing, mut content) = (Vec::new(), vec![0; shape.size as usize]);
    if let Some(len) = shape.backing {
        backing = vec![0; len as usize];
        pattern(0xb0, 0, &mut backing);
        let n = backing.len().min(content.len());
        content[..n].copy_from_slice(&backing[..n]);
    }
    let data = if shape.data_file { vec![0; shape.size as usize] } else { Vec::new() };
    let m = Made {
        shape,
        file: Vec::new(),
        len: 0,
        data,
        backing,
        content,
        fields: Vec::new(),
        places: Vec::new(),
    };
    let mut b = Builder { e, m, refcounts: Vec::new(), compressed: 0 };
    b.build();
    b.m
}

impl Builder<'_, '_> {
    fn build(&mut self) {
        let s = self.m.shape;
        self.allocate(1);
        let l1_size = s.size.div_ceil(s.cluster() * s.l2_entries());
        let l1_size = (l1_size + u64::from(self.e.one_in(4))).max(1);
        let l1 = self.allocate((l1_size * 8).div_ceil(s.cluster()));
        self.words(l1, l1_size, Kind::L1);
        let shared = if s.snapshot { self.e.below(l1_size + 1) } else { 0 };
        for index in 0..l1_size {
            self.l2_table(l1 + 8 * index, index, index < shared);
        }
        let snapshots = if s.snapshot { self.snapshot(l1, shared) } else { 0 };
        let directory = if s.bitmap { self.bitmap() } else { 0 };
        let (reftable, clusters) = self.refcounts();
        self.header([l1, l1_size, reftable, clusters, snapshots, directory]);
    }

    /// Contiguous clusters at the end of the file. Answers their offset.
    fn allocate(&mut self, clusters: u64) -> u64 {
        let (size, first) = (self.m.shape.cluster(), self.refcounts.len() as u64);
        self.refcounts.extend((0..clusters).map(|_| 1));
        self.m.file.resize(((first + clusters) * size) as usize, 0);
        self.m.places.push(first * size);
        first * size
    }

    fn words(&mut self, at: u64, count: u64, kind: Kind) {
        let fields = (0..count).map(|i| Field { at: (at + 8 * i) as usize, width: 8, kind });
        self.m.fields.extend(fields);
    }

    fn count(&mut self, offset: u64) -> &mut u64 {
        &mut self.refcounts[(offset >> self.m.shape.cluster_bits) as usize]
    }

    fn l2_table(&mut self, at: u64, index: u64, shared: bool) {
        let s = self.m.shape;
        let first = index * s.l2_entries();
        let end = s.size.div_ceil(s.cluster());
        if first >= end || self.e.one_in(4) {
            return;
        }
        let table = self.allocate(1);
        if shared {
            *self.count(table) += 1;
        }
        self.m.put(at as usize, 8, table | if shared { 0 } else { COPIED });
        self.words(table, s.cluster() / 8, Kind::L2);
        for guest in first..end.min(first + s.l2_entries()) {
            let (word, bitmap) = self.entry(guest, shared);
            let at = (table + (guest - first) * s.entry()) as usize;
            self.m.put(at, 8, word);
            if s.extended {
                self.m.put(at + 8, 8, bitmap);
            }
        }
    }

    /// The entry of guest cluster `guest`.
    fn entry(&mut self, guest: u64, shared: bool) -> (u64, u64) {
        let s = self.m.shape;
        let copied = if shared { 0 } else { COPIED };
        let zero = s.version > 2 && !s.extended;
        match self.e.byte() % 12 {
            1..=4 => {
                let at = self.data(guest, u32::MAX, shared);
                (at | copied, u64::from(u32::MAX))
            }
            5 if zero => {
                self.zero(guest, u32::MAX);
                (1, 0)
            }
            6 if zero => {
                let at = self.data(guest, u32::MAX, shared);
                self.zero(guest, u32::MAX);
                // In a data file, bit 0 alone says that the place is not the guest's.
                (at | copied | 1, 0)
            }
            7 | 8 if !s.data_file => (self.compressed(guest, shared), 0),
            5..=8 if s.extended => {
                let data = (self.e.word() & self.e.word()) as u32;
                let zero = self.e.word() as u32 & !data;
                let at = self.data(guest, data, shared);
                self.zero(guest, zero);
                (at | copied, u64::from(zero) << 32 | u64::from(data))
            }
            9 if s.extended => {
                let zero = self.e.word() as u32;
                self.zero(guest, zero);
                (0, u64::from(zero) << 32)
            }
            _ => (0, 0),
        }
    }

    /// The bytes of the guest's disk that the subclusters of `mask` are.
    fn ranges(&self, guest: u64, mask: u32) -> Vec<std::ops::Range<u64>> {
        let s = self.m.shape;
        let (start, parts) = (guest * s.cluster(), if s.extended { 32 } else { 1 });
        let size = s.cluster() / parts;
        let part = |i: u64| (start + i * size).min(s.size)..(start + (i + 1) * size).min(s.size);
        (0..parts).filter(|i| mask >> i & 1 != 0).map(part).collect()
    }

    fn zero(&mut self, guest: u64, mask: u32) {
        for r in self.ranges(guest, mask) {
            self.m.content[r.start as usize..r.end as usize].fill(0);
        }
    }

    /// A host cluster with data where `mask` says so.
    fn data(&mut self, guest: u64, mask: u32, shared: bool) -> u64 {
        let s = self.m.shape;
        let mut bytes = vec![0; s.cluster() as usize];
        pattern(0xd0, guest * s.cluster(), &mut bytes);
        for r in self.ranges(guest, mask) {
            let part = (r.start - guest * s.cluster()) as usize..;
            let n = (r.end - r.start) as usize;
            self.m.content[r.start as usize..r.end as usize].copy_from_slice(&bytes[part][..n]);
        }
        if s.data_file {
            let start = (guest * s.cluster()) as usize;
            let n = bytes.len().min(self.m.data.len() - start);
            self.m.data[start..start + n].copy_from_slice(&bytes[..n]);
            return guest * s.cluster();
        }
        let at = self.allocate(1);
        *self.count(at) += u64::from(shared);
        self.m.file[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        at
    }

    /// A compressed cluster; next to the one before, if there is room in its host cluster.
    fn compressed(&mut self, guest: u64, shared: bool) -> u64 {
        let s = self.m.shape;
        let mut bytes = vec![0; s.cluster() as usize];
        pattern(0xc0, guest * s.cluster(), &mut bytes[..64]);
        for r in self.ranges(guest, u32::MAX) {
            let part = (r.start - guest * s.cluster()) as usize..;
            let n = (r.end - r.start) as usize;
            self.m.content[r.start as usize..r.end as usize].copy_from_slice(&bytes[part][..n]);
        }
        let packed =
            if s.zstd { zstd::bulk::compress(&bytes, 1).expect("zstd") } else { deflate(&bytes) };
        let len = packed.len() as u64;
        let references = 1 + u64::from(shared);
        // 0 at first: the beginning of a cluster, whose end is not known.
        let mut at = self.compressed;
        let inside = !at.is_multiple_of(s.cluster()) && at % s.cluster() + len <= s.cluster();
        if inside && self.room(at) {
            *self.count(at) += references;
        } else {
            at = self.allocate(1);
            *self.count(at) = references;
        }
        self.m.file[at as usize..][..packed.len()].copy_from_slice(&packed);
        self.compressed = at + len;
        let shift = 62 - (s.cluster_bits - 8);
        let more = (at + len - 1) / 512 - at / 512;
        COMPRESSED | more << shift | at
    }

    /// Whether the refcount of a cluster can count two more references.
    fn room(&mut self, at: u64) -> bool {
        let order = self.m.shape.refcount_order;
        let most = u64::MAX >> (64 - (1 << order));
        most > 3 && *self.count(at) < most - 2
    }

    /// A snapshot of the first `shared` L2 tables. Answers where the snapshot table is.
    fn snapshot(&mut self, active: u64, shared: u64) -> u64 {
        let s = self.m.shape;
        let entries = shared.max(1);
        let l1 = self.allocate((entries * 8).div_ceil(s.cluster()));
        self.words(l1, entries, Kind::Other);
        for i in 0..shared {
            let from = Field { at: (active + 8 * i) as usize, width: 8, kind: Kind::L1 };
            let word = self.m.get(from);
            self.m.put((l1 + 8 * i) as usize, 8, word);
        }
        let table = self.allocate(1);
        let at = table as usize;
        let fields = [
            (0, 8, l1),
            (8, 4, entries),
            (12, 2, 1),
            (14, 2, 4),
            (32, 4, 0),
            (36, 4, 16),
            (40, 8, 0),
            (48, 8, s.size),
        ];
        for (offset, width, value) in fields {
            self.m.put(at + offset, width, value);
            self.m.fields.push(Field { at: at + offset, width, kind: Kind::Other });
        }
        self.m.file[at + 56..at + 61].copy_from_slice(b"1snap");
        table
    }

    /// A bitmap whose bits are all clear. Answers where the directory is.
    fn bitmap(&mut self) -> u64 {
        let table = self.allocate(1);
        let directory = self.allocate(1);
        let at = directory as usize;
        let fields =
            [(0, 8, table), (8, 4, 1), (12, 4, 0), (16, 1, 1), (17, 1, 16), (18, 2, 4), (20, 4, 0)];
        for (offset, width, value) in fields {
            self.m.put(at + offset, width, value);
            self.m.fields.push(Field { at: at + offset, width, kind: Kind::Other });
        }
        self.m.file[at + 24..at + 28].copy_from_slice(b"bits");
        self.words(table, 1, Kind::Other);
        directory
    }

    /// Refcount table and blocks for everything, themselves included.
    fn refcounts(&mut self) -> (u64, u64) {
        let s = self.m.shape;
        let per_block = (s.cluster() * 8) >> s.refcount_order;
        let clusters = 1 + self.e.below(2);
        let reftable = self.allocate(clusters);
        self.words(reftable, clusters * s.cluster() / 8, Kind::Reftable);
        let mut blocks = Vec::new();
        while (blocks.len() as u64 * per_block) < self.refcounts.len() as u64 {
            assert!((blocks.len() as u64) < clusters * s.cluster() / 8, "the image is small");
            blocks.push(self.allocate(1));
        }
        for (i, block) in blocks.iter().enumerate() {
            self.m.put(reftable as usize + 8 * i, 8, *block);
            self.words(*block, s.cluster() / 8, Kind::Refblock);
        }
        for (cluster, count) in std::mem::take(&mut self.refcounts).into_iter().enumerate() {
            let block = blocks[cluster / per_block as usize] as usize;
            set_refcount(
                &mut self.m.file[block..],
                s.refcount_order,
                cluster % per_block as usize,
                count,
            );
        }
        (reftable, clusters)
    }

    fn header(&mut self, [l1, l1_size, reftable, clusters, snapshots, directory]: [u64; 6]) {
        let s = self.m.shape;
        let incompatible =
            u64::from(s.data_file) << 2 | u64::from(s.zstd) << 3 | u64::from(s.extended) << 4;
        let mut fields = vec![
            (0, 4, 0x5146_49fb),
            (4, 4, u64::from(s.version)),
            (8, 8, 0),
            (16, 4, 0),
            (20, 4, u64::from(s.cluster_bits)),
            (24, 8, s.size),
            (32, 4, 0),
            (36, 4, l1_size),
            (40, 8, l1),
            (48, 8, reftable),
            (56, 4, clusters),
            (60, 4, u64::from(snapshots > 0)),
            (64, 8, snapshots),
        ];
        let mut end = 72;
        if s.version > 2 {
            fields.extend([
                (72, 8, incompatible),
                (80, 8, u64::from(s.lazy)),
                (88, 8, u64::from(s.bitmap)),
                (96, 4, u64::from(s.refcount_order)),
                (100, 4, 112),
                (104, 1, u64::from(s.zstd)),
                (105, 1, 0),
            ]);
            end = 112;
        }
        if s.bitmap {
            fields.extend([
                (end, 4, 0x2385_2875),
                (end + 4, 4, 24),
                (end + 8, 4, 1),
                (end + 12, 4, 0),
                (end + 16, 8, 32),
                (end + 24, 8, directory),
            ]);
            end += 32;
        }
        if self.e.one_in(3) {
            fields.extend([
                (end, 4, 0xabcd_1234),
                (end + 4, 4, 5),
                (end + 8, 8, 0x4142_4344_4500_0000),
            ]);
            end += 16;
        }
        fields.extend([(end, 4, 0), (end + 4, 4, 0)]);
        for (at, width, value) in fields {
            self.m.put(at, width, value);
            // The magic number stays.
            if at > 0 {
                self.m.fields.push(Field { at, width, kind: Kind::Header });
            }
        }
    }
}

/// As QEMU: no zlib header.
fn deflate(bytes: &[u8]) -> Vec<u8> {
    let level = flate2::Compression::fast();
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), level);
    encoder.write_all(bytes).expect("memory takes everything");
    encoder.finish().expect("memory takes everything")
}

fn set_refcount(block: &mut [u8], order: u32, index: usize, value: u64) {
    if order < 3 {
        let bit = index << order;
        block[bit / 8] |= (value as u8) << (bit % 8);
    } else {
        let width = 1usize << (order - 3);
        block[index * width..][..width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}
