//! `vhost-user-blk check` beside `qemu-img check`: images broken in known ways and at random, and images that
//! `create` made.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use vhost_user_blk::block::Graph;
use vhost_user_blk::block::drivers::qcow2::check::{self, Fix, Report, Watch};
use vhost_user_blk::block::perm::{Perm, Perms};
use vhost_user_blk::rt;

#[path = "qcow2_check/created.rs"]
mod created;
#[path = "qcow2_check/power.rs"]
mod power;

const OURS: &str = env!("CARGO_BIN_EXE_vhost-user-blk");

/// What a program said: exit code, output, errors; with the program's name made neutral.
#[derive(Debug, PartialEq, Eq)]
struct Said(i32, String, String);

fn run(program: &str, args: &[&str], dir: &Path) -> Said {
    let output = Command::new(program).args(args).current_dir(dir).output().unwrap();
    let text = |bytes: &[u8]| {
        String::from_utf8_lossy(bytes).replace("vhost-user-blk", "NAME").replace("qemu-img", "NAME")
    };
    let mut stderr = text(&output.stderr);
    if let Some((first, _)) = stderr.split_once("qemu-img amend") {
        stderr = first.to_owned();
    }
    Said(output.status.code().unwrap(), text(&output.stdout), stderr)
}

fn sh(dir: &Path, line: &str) {
    let output = Command::new("sh").args(["-ec", line]).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Images that `qemu-img` made.
const BASES: &[(&str, &str)] = &[
    ("plain", "create -q -f qcow2 x 1M"),
    ("v2", "create -q -f qcow2 -o compat=0.10 x 1M"),
    ("small", "create -q -f qcow2 -o cluster_size=512 x 1M"),
    ("narrow", "create -q -f qcow2 -o cluster_size=4096,refcount_bits=1 x 1M"),
    ("wide", "create -q -f qcow2 -o cluster_size=1024,refcount_bits=64 x 1M"),
    ("extended", "create -q -f qcow2 -o extended_l2=on x 1M"),
    ("data", "create -q -f qcow2 -o data_file=data x 1M"),
    ("snapshots", "create -q -f qcow2 x 1M"),
    ("bitmap", "create -q -f qcow2 x 1M"),
    ("compressed", "create -q -f qcow2 x 1M"),
];

fn base(dir: &Path, name: &str, create: &str) -> Vec<u8> {
    let write = "-c 'write -P 1 0 128k' -c 'write -P 2 300k 70k' -c 'write -z 512k 64k'";
    sh(dir, &format!("rm -f x; qemu-img {create}; qemu-io {write} x"));
    match name {
        "snapshots" => sh(
            dir,
            "qemu-img snapshot -c a x; qemu-io -c 'write -P 7 0 64k' x; qemu-img snapshot -c b x",
        ),
        "bitmap" => sh(dir, "qemu-img bitmap --add x b; qemu-io -c 'write 0 1k' x"),
        "compressed" => sh(dir, "qemu-img convert -c -f qcow2 -O qcow2 x y; mv y x"),
        _ => {}
    }
    fs::read(dir.join("x")).unwrap()
}

/// An image to be broken.
struct Image(Vec<u8>);

impl Image {
    fn get(&self, at: u64) -> u64 {
        let at = at as usize;
        self.0.get(at..at + 8).map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()))
    }

    fn set(&mut self, at: u64, value: u64) {
        let at = at as usize;
        if self.0.len() >= at + 8 {
            self.0[at..at + 8].copy_from_slice(&value.to_be_bytes());
        }
    }

    fn version(&self) -> u64 {
        self.get(0) & 0xff
    }

    fn cluster(&self) -> u64 {
        1 << (self.get(20) >> 32)
    }

    fn l1(&self) -> u64 {
        self.get(40)
    }

    fn l2(&self) -> u64 {
        self.get(self.l1()) & 0x00ff_ffff_ffff_fe00
    }

    fn reftable(&self) -> u64 {
        self.get(48)
    }

    fn refblock(&self) -> u64 {
        self.get(self.reftable())
    }

    fn change_l2(&mut self, index: u64, f: impl FnOnce(u64) -> u64) {
        let size = if self.version() > 2 && self.get(72) & 16 != 0 { 16 } else { 8 };
        let at = self.l2() + index * size;
        self.set(at, f(self.get(at)));
    }
}

type Mutation = (&'static str, fn(&mut Image));

const COPIED: u64 = 1 << 63;

/// Ways to break an image.
const MUTATIONS: &[Mutation] = &[
    ("none", |_| {}),
    ("refcounts too high", |i| i.set(i.refblock() + 8, u64::MAX)),
    ("refcounts too low", |i| i.set(i.refblock(), 0)),
    ("no refblock", |i| i.set(i.reftable(), 0)),
    ("refblock outside", |i| i.set(i.reftable() + 8, 0x1000_0000)),
    ("refblock twice", |i| i.set(i.reftable() + 8, i.refblock())),
    ("refblock reserved", |i| i.set(i.reftable(), i.refblock() | 2)),
    ("refblock unaligned", |i| i.set(i.reftable(), i.refblock() + 512)),
    ("no reftable", |i| i.set(56, i.get(56) & 0xffff_ffff)),
    ("L1 reserved", |i| i.set(i.l1(), i.get(i.l1()) | 0x100)),
    ("L1 unaligned", |i| i.set(i.l1(), i.get(i.l1()) + 512)),
    ("L1 outside", |i| i.set(i.l1(), COPIED | 0x70_0000_0000)),
    ("L1 not copied", |i| i.set(i.l1(), i.get(i.l1()) & !COPIED)),
    ("L1 to the header", |i| i.set(i.l1(), COPIED)),
    ("L2 reserved", |i| i.change_l2(0, |e| e | 4)),
    ("L2 unaligned", |i| i.change_l2(0, |e| e + 512)),
    ("L2 outside", |i| i.change_l2(1, |_| COPIED | 1 << 50)),
    ("L2 not copied", |i| i.change_l2(0, |e| e ^ COPIED)),
    ("L2 to the reftable", |i| {
        let to = i.reftable();
        i.change_l2(1, |_| COPIED | to);
    }),
    ("L2 twice", |i| {
        let first = i.get(i.l2());
        i.change_l2(3, |_| first);
    }),
    ("L2 zero unaligned", |i| i.change_l2(0, |e| (e | 1) + 512)),
    ("L2 compressed", |i| i.change_l2(0, |e| e | 1 << 62)),
    ("L2 cleared", |i| i.change_l2(0, |_| 0)),
    ("subclusters", |i| i.set(i.l2() + 8, i.get(i.l2() + 8) | 1 << 32 | 1)),
    ("dirty", |i| {
        if i.version() > 2 {
            i.set(72, i.get(72) | 1);
        }
    }),
    ("corrupt", |i| {
        if i.version() > 2 {
            i.set(72, i.get(72) | 2);
        }
    }),
    ("snapshot unaligned", |i| {
        if i.get(64) > 0 {
            i.set(i.get(64), i.get(i.get(64)) + 8);
        }
    }),
    ("snapshots unaligned", |i| i.set(64, i.get(64) + 8)),
    ("half", |i| i.0.truncate(i.0.len() * 2 / 3)),
];

/// Repairs in which we succeed where `qemu-img` gives up: texts differ, the verdict must be at least as good.
const BETTER: &[&str] = &["refblock reserved", "refblock unaligned", "refblock outside"];

/// What the image holds, or that it cannot be read: how far `qemu-img` comes then is left to chance.
fn content(dir: &Path) -> Said {
    let converted = run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "x", "raw"], dir);
    if converted.0 != 0 { converted } else { run("sha256sum", &["raw"], dir) }
}

fn same_check(dir: &Path, bytes: &[u8], what: &str) {
    fs::write(dir.join("x"), bytes).unwrap();
    let theirs = run("qemu-img", &["check", "x"], dir);
    let ours = run(OURS, &["check", "x"], dir);
    if what.starts_with("bitmap") && theirs.2.contains("Could not open") {
        // QEMU loads the bitmaps before it checks them.
        assert_eq!(ours.0, theirs.0, "{what}");
        return;
    }
    assert_eq!(ours, theirs, "{what}");
    let (theirs, ours) = (
        run("qemu-img", &["check", "--output=json", "x"], dir),
        run(OURS, &["check", "--output=json", "x"], dir),
    );
    assert_eq!(ours.1, theirs.1, "{what}");
}

fn same_repair(dir: &Path, bytes: &[u8], mode: &str, what: &str, name: &str) {
    let repair = |program| {
        fs::write(dir.join("x"), bytes).unwrap();
        let _ = fs::remove_file(dir.join("raw"));
        let said = run(program, &["check", "-r", mode, "x"], dir);
        (said, run("qemu-img", &["check", "-q", "x"], dir).0, content(dir))
    };
    let (theirs, ours) = (repair("qemu-img"), repair(OURS));
    if BETTER.contains(&name) {
        assert!(theirs.1 != 0 || ours.1 == 0, "{what} -r {mode}: {ours:?}");
        assert!(ours.2 == theirs.2, "{what} -r {mode}");
    } else if what.starts_with("bitmap") {
        // QEMU writes the bitmaps anew when it closes an image that it could write.
        assert_eq!(
            (ours.0.0, ours.1, ours.2),
            (theirs.0.0, theirs.1, theirs.2),
            "{what} -r {mode}"
        );
    } else {
        assert_eq!(ours, theirs, "{what} -r {mode}");
    }
}

#[test]
fn broken_images_give_the_same_findings_and_repairs() {
    std::thread::scope(|scope| {
        for half in BASES.chunks(BASES.len().div_ceil(2)) {
            scope.spawn(move || {
                let temp = tempfile::tempdir().unwrap();
                let dir = temp.path();
                for (name, create) in half {
                    let bytes = base(dir, name, create);
                    for (mutation, mutate) in MUTATIONS {
                        let what = format!("{name}, {mutation}");
                        let mut image = Image(bytes.clone());
                        mutate(&mut image);
                        same_check(dir, &image.0, &what);
                        // QEMU forgets the snapshot table when it rewrites the header of an image with bitmaps.
                        if (*name, *mutation) != ("bitmap", "snapshots unaligned") {
                            same_repair(dir, &image.0, "all", &what, mutation);
                        }
                    }
                }
            });
        }
    });
}

#[derive(Default)]
struct Quiet;

impl Watch for Quiet {
    fn line(&mut self, _: &str) {}
}

fn with_file<T>(path: &Path, f: impl AsyncFnOnce(&vhost_user_blk::block::Node) -> T) -> T {
    let Value::Object(options) = json!({ "driver": "file", "node-name": "f", "filename": path.to_str().unwrap(), "discard": "unmap" })
    else {
        unreachable!()
    };
    let graph = Graph::new();
    let node = graph.add(options).unwrap();
    let perms =
        Perms { used: Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE, shared: Perm::all() };
    let user = graph.attach_root(&node, "a test", perms).unwrap();
    let value = rt::block_on(f(&node));
    graph.detach(user);
    value
}

fn check_file(path: &Path, fix: Fix) -> Option<Report> {
    with_file(path, async |node| {
        let header = check::read_header(node).await.ok()?;
        check::check(node, &header, fix, &mut Quiet).await.ok()
    })
}

/// The class of a verdict: clean, leaks, corrupt, or no verdict.
fn class(report: Option<&Report>) -> i32 {
    match report {
        None | Some(Report { check_errors: 1.., .. }) => 1,
        Some(Report { corruptions: 1.., .. }) => 2,
        Some(Report { leaks: 1.., .. }) => 3,
        Some(_) => 0,
    }
}

fn random_bases() -> &'static (TempDir, Vec<Vec<u8>>) {
    static MADE: OnceLock<(TempDir, Vec<Vec<u8>>)> = OnceLock::new();
    MADE.get_or_init(|| {
        let temp = tempfile::tempdir().unwrap();
        let bases = BASES.iter().filter(|(name, _)| *name != "data");
        let made = bases.map(|(name, create)| base(temp.path(), name, create)).collect();
        (temp, made)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Random bytes in the metadata: never a panic, the same class of verdict as QEMU's, and a repair that leaves nothing for
    /// QEMU to complain about where it says so.
    #[test]
    fn random_damage(base in 0usize..9, damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4), places in prop::collection::vec(0usize..6, 4)) {
        let (temp, bases) = random_bases();
        let mut image = Image(bases[base].clone());
        for ((at, value), place) in damage.iter().zip(&places) {
            // Header fields behind the version, tables, and anything.
            let (start, len) = match place {
                0 => (24, 88),
                1 => (image.l1(), 16),
                2 => (image.l2(), 64),
                3 => (image.reftable(), 16),
                4 => (image.refblock(), 32),
                _ => (image.get(64), 128),
            };
            let at = start as usize + at.index(len);
            if let Some(byte) = image.0.get_mut(at) {
                *byte = *value;
            }
        }
        let path: PathBuf = temp.path().join("r");
        fs::write(&path, &image.0).unwrap();
        let theirs = Command::new("timeout").args(["20", "qemu-img", "check", "-q", "r"])
            .current_dir(temp.path()).output().unwrap();
        let ours = check_file(&path, Fix::Nothing);
        let stderr = String::from_utf8_lossy(&theirs.stderr);
        // QEMU also opens backing files, decodes features of its own and loads bitmaps.
        let opened = !stderr.contains("Could not open");
        if let Some(code @ (0 | 2 | 3)) = theirs.status.code() && opened {
            prop_assert_eq!(class(ours.as_ref()), code, "{}", stderr);
        }
        if ours.is_some() && image.0.len() as u64 / image.cluster() < 1 << 20 {
            let fixed = check_file(&path, Fix::All);
            let again = check_file(&path, Fix::Nothing);
            if fixed.is_some_and(|r| r.is_clean()) {
                prop_assert_eq!(class(again.as_ref()), 0);
            }
        }
    }
}

#[test]
fn locks_are_qemus() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    sh(dir, "qemu-img create -q -f qcow2 x 1M");
    let mut writer = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "read 0 1", "-c", "sleep 3000", "x"])
        .current_dir(dir)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(700));
    for args in [&["check", "x"][..], &["check", "-r", "all", "x"], &["check", "-U", "x"]] {
        assert_eq!(run(OURS, args, dir), run("qemu-img", args, dir), "{args:?}");
    }
    writer.kill().unwrap();
    writer.wait().unwrap();
}

#[test]
fn words_of_the_command_line() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    sh(dir, "qemu-img create -q -f qcow2 x 1M; truncate -s 1M raw");
    for args in [
        &["check"][..],
        &["check", "none"],
        &["check", "raw"],
        &["check", "-f", "raw", "x"],
        &["check", "-f", "qcow2", "raw"],
        &["check", "-f", "bogus", "x"],
        &["check", "-r", "bogus", "x"],
        &["check", "--output=bogus", "x"],
        &["check", "x", "x"],
        &["check", "-q", "x"],
        &["check", "-U", "-r", "all", "x"],
        &["check", "."],
        &["check", "--image-opts", "driver=qcow2,file.filename=x"],
        &["check", "json:{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"x\"}}"],
    ] {
        assert_eq!(run(OURS, args, dir), run("qemu-img", args, dir), "{args:?}");
    }
}

/// QEMU clears them by writing a header without snapshots, and then frees what they held.
#[test]
fn unknown_autoclear_bits_do_not_cost_the_snapshots() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let (name, create) = BASES.iter().find(|(name, _)| *name == "snapshots").unwrap();
    let mut image = Image(base(dir, name, create));
    image.set(88, 0x80);
    fs::write(dir.join("x"), &image.0).unwrap();
    assert_eq!(run(OURS, &["check", "-q", "-r", "all", "x"], dir).0, 0);
    image.set(88, 0);
    assert!(fs::read(dir.join("x")).unwrap() == image.0);
}
