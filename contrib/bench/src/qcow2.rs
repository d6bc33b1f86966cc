//! The qcow2 images of the cases: made by qemu-img, so that nothing of the program under test has a part
//! in them, and judged by it afterwards: numbers of a corrupt image are worth nothing.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::cases::{fill, keep_warm, warm};

/// Bytes of an image that holds data everywhere: a test file's.
pub const FULL: u64 = 1 << 30;
/// Bytes of an image that is filled cluster by cluster: 262144 allocations, 3 s at 85k/s.
pub const FRESH: u64 = 16 << 30;
/// The same where whole clusters of data are written, which must stay below the kernel's limit of
/// dirty pages.
pub const COPIED: u64 = 2 << 30;
/// Bytes of an image with more L2 tables (8 MiB) than `SMALL_CACHE` holds.
pub const WIDE: u64 = 64 << 30;
/// An eighth of what `WIDE` needs. QSD's command line takes no suffixes here.
pub const SMALL_CACHE: &str = ",l2-cache-size=1048576";
/// Share of random reads of `WIDE` that find their slice in no such cache, however it chooses.
pub const MISSES: f64 = 7.0 / 8.0;
/// Cluster size of all images: qemu-img's default, written down.
pub const CLUSTER: u64 = 64 << 10;

/// What an image is when a run begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data in every cluster; the runs share it.
    Full,
    /// No cluster, made anew for each run.
    Fresh,
    /// The same over a base with data everywhere.
    Overlay,
    /// Every cluster allocated, none written (`preallocation=metadata`); the runs share it.
    Mapped,
}

/// An image of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// What it is.
    pub kind: Kind,
    /// Virtual size in bytes.
    pub size: u64,
    /// Bypass the page cache.
    pub direct: bool,
    /// More options of the node, as in ",l2-cache-size=1048576".
    pub options: &'static str,
}

impl Image {
    /// One in the page cache, with default options.
    pub const fn new(kind: Kind, size: u64) -> Self {
        Self { kind, size, direct: false, options: "" }
    }

    /// The image's file.
    pub fn path(dir: &Path) -> PathBuf {
        dir.join("image.qcow2")
    }

    fn base(dir: &Path) -> PathBuf {
        dir.join("base.raw")
    }

    /// The arguments that define node `n`.
    pub fn blockdev(&self, dir: &Path) -> Vec<String> {
        let direct = if self.direct { ",cache.direct=on" } else { "" };
        let file = |name: &str, path: &Path| {
            let path = path.display();
            format!("driver=file,node-name={name},filename={path},aio=io_uring{direct}")
        };
        let mut nodes = vec![file("f", &Self::path(dir))];
        let mut backing = "";
        if self.kind == Kind::Overlay {
            let base = file("bf", &Self::base(dir));
            nodes.push(format!("{base},read-only=on"));
            nodes.push(format!("driver=raw,node-name=b,file=bf,read-only=on{direct}"));
            backing = ",backing=b";
        }
        let options = self.options;
        nodes.push(format!("driver=qcow2,node-name=n,file=f{backing}{direct}{options}"));
        nodes.into_iter().flat_map(|node| ["--blockdev".into(), node]).collect()
    }

    /// Makes what all runs share; `data` is a raw file of `FULL` bytes.
    ///
    /// # Errors
    /// Those of the file system, and what qemu-img says.
    pub fn prepare(&self, dir: &Path, data: &Path) -> io::Result<()> {
        match self.kind {
            Kind::Full => {
                let size = format!("cluster_size={CLUSTER}");
                // The jobs before have written zeroes, which `convert` would not allocate clusters for.
                let words = ["convert", "-q", "-S", "0", "-f", "raw", "-O", "qcow2", "-o", &size];
                let (data, image) = (data.display().to_string(), Self::path(dir));
                let image = image.display().to_string();
                qemu_img(&[&words[..], &[&data, &image]].concat())?;
                warm(&Self::path(dir))
            }
            Kind::Overlay => {
                fill(&Self::base(dir), self.size)?;
                warm(&Self::base(dir))
            }
            Kind::Mapped => self.create(dir, &["-o", "preallocation=metadata"]),
            Kind::Fresh => Ok(()),
        }
    }

    /// Makes what each run begins with.
    ///
    /// # Errors
    /// What qemu-img says.
    pub fn renew(&self, dir: &Path) -> io::Result<()> {
        match self.kind {
            Kind::Mapped => Ok(()),
            Kind::Full => keep_warm(&Self::path(dir)),
            Kind::Fresh => self.create(dir, &[]),
            Kind::Overlay => {
                let base = Self::base(dir);
                keep_warm(&base)?;
                self.create(dir, &["-F", "raw", "-b", &base.display().to_string()])
            }
        }
    }

    fn create(&self, dir: &Path, words: &[&str]) -> io::Result<()> {
        let path = Self::path(dir);
        // Never in place: the last one's pages would be written to the disk during the run.
        remove_if_there(&path)?;
        let cluster = format!("cluster_size={CLUSTER}");
        let (path, size) = (path.display().to_string(), self.size.to_string());
        let head = ["create", "-q", "-f", "qcow2", "-o", &cluster];
        qemu_img(&[&head[..], words, &[&path, &size]].concat()).map(drop)
    }

    /// After a run: the image must be without fault, leaks included.
    ///
    /// # Errors
    /// What `qemu-img check` found.
    pub fn check(dir: &Path) -> io::Result<()> {
        qemu_img(&["check", "-f", "qcow2", &Self::path(dir).display().to_string()]).map(drop)
    }

    /// Contiguous pieces of the image's file per GiB of data, in the guest's order.
    ///
    /// # Errors
    /// What qemu-img says; an image without data.
    pub fn extents_per_gib(dir: &Path) -> io::Result<f64> {
        let path = Self::path(dir).display().to_string();
        let json = qemu_img(&["map", "-f", "qcow2", "--output=json", &path])?;
        let (extents, bytes) = extents(&serde_json::from_str::<Vec<Mapping>>(&json)?);
        if bytes == 0 {
            return Err(io::Error::other(format!("{path} holds no data")));
        }
        Ok(extents as f64 / (bytes as f64 / (1u64 << 30) as f64))
    }

    /// Removes all files.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove(dir: &Path) -> io::Result<()> {
        remove_if_there(&Self::path(dir))?;
        remove_if_there(&Self::base(dir))
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    fs::remove_file(path)
        .or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
}

/// Runs qemu-img; what it printed.
fn qemu_img(words: &[&str]) -> io::Result<String> {
    let out = Command::new("qemu-img").args(words).output();
    let out = out.map_err(|e| io::Error::other(format!("qemu-img: {e}")))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    if out.status.success() {
        return Ok(text);
    }
    let said = String::from_utf8_lossy(&out.stderr);
    Err(io::Error::other(format!("qemu-img {}: {text}{said}", words.join(" "))))
}

/// One line of `qemu-img map`.
#[derive(Debug, Deserialize)]
struct Mapping {
    length: u64,
    /// In the image's file; absent where nothing is allocated.
    offset: Option<u64>,
    data: bool,
}

/// Pieces that do not follow the one before in the file, and bytes in all of them.
fn extents(map: &[Mapping]) -> (u64, u64) {
    let (mut count, mut bytes, mut end) = (0, 0, None);
    for (mapping, offset) in map.iter().filter(|m| m.data).filter_map(|m| Some((m, m.offset?))) {
        count += u64::from(end != Some(offset));
        bytes += mapping.length;
        end = Some(offset + mapping.length);
    }
    (count, bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn extents_are_counted_where_the_file_is_cut() {
        let line = |length, offset, data| Mapping { length, offset, data };
        let map = [
            line(10, Some(100), true),
            line(5, Some(110), true),
            line(7, None, false),
            line(5, Some(115), true),
            line(5, Some(200), true),
        ];
        assert_eq!(extents(&map), (2, 25));
        assert_eq!(extents(&[]), (0, 0));
    }

    #[test]
    fn images_are_made_judged_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let data = dir.join("data.raw");
        fill(&data, 4 << 20).unwrap();
        let full = Image::new(Kind::Full, 4 << 20);
        full.prepare(dir, &data).unwrap();
        Image::check(dir).unwrap();
        // 4 MiB in one piece.
        assert!((Image::extents_per_gib(dir).unwrap() - 256.0).abs() < 1e-9);
        let overlay = Image::new(Kind::Overlay, 1 << 20);
        overlay.prepare(dir, &data).unwrap();
        overlay.renew(dir).unwrap();
        Image::check(dir).unwrap();
        let mapped = Image::new(Kind::Mapped, 64 << 20);
        mapped.prepare(dir, &data).unwrap();
        mapped.renew(dir).unwrap();
        Image::check(dir).unwrap();
        // The L1 table is in the fourth cluster; a lost one is found.
        let file = fs::File::options().write(true).open(Image::path(dir)).unwrap();
        file.write_all_at(&[0; 8], 3 * CLUSTER).unwrap();
        assert!(Image::check(dir).unwrap_err().to_string().contains("leaked"));
        Image::remove(dir).unwrap();
        assert_eq!(fs::read_dir(dir).unwrap().count(), 1);
    }
}
