//! Images of every feature in every pair of combinations, made by QEMU's tools.

use crate::common::{ENGINES, Random};
use crate::tools::Dirs;

use super::bed::How;

/// The features of an image and how many kinds there are of each.
const KINDS: [(&str, usize); 16] = [
    ("version", 2),
    ("cluster", 4),
    ("refcount", 4),
    ("extended", 2),
    ("compressed", 3),
    ("data_file", 3),
    ("preallocation", 4),
    ("size", 4),
    ("snapshots", 3),
    ("bitmap", 2),
    ("lazy", 2),
    ("backing", 5),
    ("long_l1", 2),
    // How it is opened.
    ("engine", 4),
    ("discard", 2),
    ("cache", 2),
];
type Choice = [usize; KINDS.len()];

/// An image, and how it is opened.
#[derive(Clone, Debug)]
pub struct Case {
    pub version: u64,
    pub cluster: u64,
    pub refcount_bits: u64,
    pub extended: bool,
    /// Of compressed clusters, if there are any.
    pub compressed: Option<&'static str>,
    /// An external data file, and whether it is raw.
    pub data_file: Option<bool>,
    pub preallocation: &'static str,
    pub size: u64,
    pub snapshots: usize,
    pub bitmap: bool,
    pub lazy: bool,
    pub backing: Backing,
    /// The disk was longer once: so is the L1 table.
    pub long_l1: bool,
    pub how: How,
}

/// What is behind an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    None,
    Raw,
    /// Shorter than the overlay, and not a multiple of its clusters.
    Short,
    /// Of other clusters.
    Qcow2,
    /// Longer than the overlay, over another one.
    Chain,
}

impl Case {
    fn of(c: Choice) -> Case {
        let cluster = [512, 4096, 65536, 2 << 20][c[1]];
        let whole = [600, 700, 40, 4][c[1]] * cluster;
        let how = How { engine: ENGINES[c[13]], unmap: c[14] == 0, tiny_cache: c[15] == 1 };
        Case {
            version: [2, 3][c[0]],
            cluster,
            refcount_bits: [16, 1, 8, 64][c[2]],
            extended: c[3] == 1,
            compressed: [None, Some("zlib"), Some("zstd")][c[4]],
            data_file: [None, Some(false), Some(true)][c[5]],
            preallocation: ["off", "metadata", "falloc", "full"][c[6]],
            size: [whole + 69 * 512, whole, 3 * 512, 0][c[7]],
            snapshots: c[8],
            bitmap: c[9] == 1,
            lazy: c[10] == 1,
            backing: [Backing::None, Backing::Raw, Backing::Short, Backing::Qcow2, Backing::Chain]
                [c[11]],
            long_l1: c[12] == 1,
            how,
        }
    }

    /// One at random.
    pub fn random(random: &mut Random) -> Case {
        Case::of(choose(random))
    }
}

fn choose(random: &mut Random) -> Choice {
    let mut c = KINDS.map(|(_, kinds)| usize::try_from(random.below(kinds as u64)).unwrap());
    settle(&mut c);
    c
}

/// Takes back what cannot be together.
fn settle(c: &mut Choice) {
    if c[0] == 0 {
        // Version 2 knows none of these.
        [c[2], c[3], c[5], c[9], c[10]] = [0; 5];
        c[4] = c[4].min(1);
    }
    if c[3] == 1 {
        c[1] = c[1].max(2);
    }
    if c[5] != 0 {
        // Compressed clusters and snapshots need counted clusters.
        [c[4], c[8]] = [0; 2];
    }
    if c[5] == 2 {
        c[11] = 0;
    }
    if c[4] != 0 {
        // Nothing that is allocated is overwritten compressed.
        c[6] = 0;
    }
    if c[6] != 0 {
        c[11] = 0;
    }
    if c[2] == 1 {
        c[8] = 0;
    }
    if c[7] == 3 {
        // QEMU shrinks no disk to nothing, and cannot store a bitmap of nothing.
        [c[9], c[12]] = [0; 2];
    }
}

/// Pairs of kinds that a choice has.
fn pairs(c: &Choice) -> impl Iterator<Item = [usize; 4]> {
    (0..c.len()).flat_map(move |a| (0..a).map(move |b| [a, c[a], b, c[b]]))
}

/// Choices that have each pair of kinds that can be together: the same for the same seed.
pub fn corpus(seed: u64) -> Vec<Case> {
    /// Candidates for each choice, of which the best is taken.
    const CANDIDATES: usize = 200;
    let mut random = Random(seed);
    let mut seen = std::collections::HashSet::new();
    let mut cases = Vec::new();
    loop {
        let new = |c: &Choice| pairs(c).filter(|p| !seen.contains(p)).count();
        let best = (0..CANDIDATES).map(|_| choose(&mut random)).max_by_key(new).unwrap();
        if new(&best) == 0 {
            return cases;
        }
        seen.extend(pairs(&best));
        cases.push(Case::of(best));
    }
}

/// An image in a directory.
pub struct Made {
    pub dirs: Dirs,
    /// Files behind the image, which nobody may change.
    pub bases: Vec<&'static str>,
}

impl Case {
    /// Makes the image `a`.
    pub fn make(&self, random: &mut Random) -> Made {
        let dirs = Dirs::new();
        let bases = self.make_bases(&dirs, random);
        let mut options = format!("cluster_size={}", self.cluster);
        let mut add = |text: &str| options.push_str(text);
        if self.version == 2 {
            add(",compat=0.10");
        } else {
            add(&format!(",refcount_bits={}", self.refcount_bits));
            add(if self.extended { ",extended_l2=on" } else { "" });
            add(if self.lazy { ",lazy_refcounts=on" } else { "" });
            add(&format!(",compression_type={}", self.compressed.unwrap_or("zlib")));
        }
        if let Some(raw) = self.data_file {
            let raw = if raw { "on" } else { "off" };
            add(&format!(",data_file={},data_file_raw={raw}", dirs.path("data").display()));
        }
        if self.preallocation != "off" {
            add(&format!(",preallocation={}", self.preallocation));
        }
        let longer = self.size + if self.long_l1 { 3 * self.cluster + (4 << 20) } else { 0 };
        let length = longer.to_string();
        let format =
            if matches!(self.backing, Backing::Raw | Backing::Short) { "raw" } else { "qcow2" };
        let more = if bases.is_empty() {
            vec![length.as_str()]
        } else {
            vec!["-b", "base", "-F", format, length.as_str()]
        };
        dirs.create("a", &options, &more);
        if self.long_l1 {
            let size = self.size.to_string();
            dirs.run("qemu-img", &["resize", "-q", "-f", "qcow2", "--shrink", "a", &size]);
        }
        self.fill(&dirs, random);
        Made { dirs, bases }
    }

    fn make_bases(&self, dirs: &Dirs, random: &mut Random) -> Vec<&'static str> {
        let sectors = self.size / 512;
        let raw = |random: &mut Random, name: &str, sectors: u64| {
            std::fs::write(dirs.path(name), noise(random, sectors)).unwrap();
        };
        match self.backing {
            Backing::None => vec![],
            Backing::Raw => {
                raw(random, "base", sectors);
                vec!["base"]
            }
            Backing::Short => {
                raw(random, "base", sectors / 2 + 1);
                vec!["base"]
            }
            Backing::Qcow2 | Backing::Chain => {
                let other = if self.cluster == 65536 { 4096 } else { 65536 };
                let options = format!("cluster_size={other}");
                let chain = self.backing == Backing::Chain;
                let size = self.size + if chain { 1 << 20 } else { 0 };
                let length = size.to_string();
                if chain {
                    raw(random, "below", sectors / 3 + 1);
                    dirs.create("base", &options, &["-b", "below", "-F", "raw", &length]);
                } else {
                    dirs.create("base", &options, &[&length]);
                }
                scribble(dirs, "base", random, size, 12);
                if chain { vec!["base", "below"] } else { vec!["base"] }
            }
        }
    }

    fn fill(&self, dirs: &Dirs, random: &mut Random) {
        if self.compressed.is_some() && self.size >= self.cluster {
            let clusters = self.size / self.cluster;
            let one = |i: u64| {
                let (at, byte) = (i * self.cluster, 1 + i % 255);
                format!("write -c -P {byte} {at} {}", self.cluster)
            };
            let some: Vec<_> = (0..clusters)
                .filter(|i| *i == 0 || random.below(3) == 0)
                .take(40)
                .map(one)
                .collect();
            dirs.io("a", &some);
        }
        scribble(dirs, "a", random, self.size, 8);
        for name in ["s1", "s2"].into_iter().take(self.snapshots) {
            dirs.run("qemu-img", &["snapshot", "-c", name, "a"]);
            scribble(dirs, "a", random, self.size, 3);
        }
        if self.bitmap {
            dirs.run("qemu-img", &["bitmap", "-f", "qcow2", "--add", "a", "b0"]);
        }
    }
}

/// So many sectors of bytes that nobody writes twice.
pub fn noise(random: &mut Random, sectors: u64) -> Vec<u8> {
    let word = |_| random.next().to_le_bytes();
    (0..sectors * 64).flat_map(word).collect()
}

/// Random writes, zero writes and discards by QEMU.
fn scribble(dirs: &Dirs, name: &str, random: &mut Random, size: u64, count: u64) {
    let sectors = size / 512;
    if sectors == 0 {
        return;
    }
    let mut one = |_| {
        let offset = random.below(sectors);
        let len = (1 + random.below(1 + sectors / 8)).min(sectors - offset) * 512;
        let at = offset * 512;
        match random.below(6) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -z -u {at} {len}"),
            2 => format!("discard {at} {len}"),
            _ => format!("write -P {} {at} {len}", 1 + random.below(255)),
        }
    };
    let commands: Vec<_> = (0..count).map(&mut one).collect();
    dirs.io(name, &commands);
}
