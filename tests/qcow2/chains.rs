//! Backing files.

use std::process::Command;

use serde_json::{Value, json};
use vhost_user_blk::block::Graph;
use vhost_user_blk::rt::{self, WaitKind};

use super::tools::{Dirs, Random, compare, open, options};

fn error(dirs: &Dirs, name: &str, more: Value) -> String {
    open(&dirs.path(name), more).map(|_| ()).unwrap_err().to_string()
}

/// QEMU's word for the same.
fn qemu_error(dirs: &Dirs, name: &str) -> String {
    let text = dirs.try_run("qemu-io", &["-r", "-f", "qcow2", "-c", "quit", name]).unwrap_err();
    let text = text.trim().split_once(": ").unwrap().1.to_owned();
    text.split_once(": ").unwrap().1.to_owned()
}

#[test]
fn mixed_formats_clusters_and_sizes() {
    for seed in 0..6u64 {
        let dirs = Dirs::new();
        let mut random = Random(seed);
        let sizes = [1_500_160u64, 3_000_320, 700_416, 2_500_096];
        std::fs::write(dirs.path("i0"), vec![0x11; sizes[0] as usize]).unwrap();
        for (level, size) in sizes.into_iter().enumerate().skip(1) {
            let (name, base) = (format!("i{level}"), format!("i{}", level - 1));
            let bits = 9 + random.below(9);
            let extended = if bits >= 14 && random.below(2) == 0 { "on" } else { "off" };
            let options = format!("cluster_size={},extended_l2={extended}", 1 << bits);
            let format = if level == 1 { "raw" } else { "qcow2" };
            let length = size.to_string();
            dirs.create(&name, &options, &["-b", &base, "-F", format, &length]);
            let commands: Vec<String> = (0..8)
                .map(|_| {
                    let offset = random.below(size / 512 - 100) * 512;
                    let len = 512 * (1 + random.below(100));
                    if random.below(3) == 0 {
                        format!("write -z {offset} {len}")
                    } else {
                        format!("write -P {} {offset} {len}", 1 + random.below(255))
                    }
                })
                .collect();
            dirs.io(&name, &commands);
        }
        let want = dirs.expected("i3");
        let bases: Vec<Vec<u8>> =
            (0..4).map(|i| std::fs::read(dirs.path(&format!("i{i}"))).unwrap()).collect();
        compare(&open(&dirs.path("i3"), json!({})).unwrap(), &want, WaitKind::Epoll, seed);
        // The same chain, defined by hand.
        let file = |i: u32| json!({ "driver": "file", "filename": dirs.path(&format!("i{i}")) });
        let by_hand = json!({ "backing": { "driver": "qcow2", "file": file(2), "backing": {
            "driver": "qcow2", "file": file(1), "backing": { "driver": "raw", "file": file(0) },
        }}});
        compare(&open(&dirs.path("i3"), by_hand).unwrap(), &want, WaitKind::Epoll, seed);
        for (i, base) in bases.iter().enumerate() {
            assert!(std::fs::read(dirs.path(&format!("i{i}"))).unwrap() == *base);
        }
    }
}

#[test]
fn null_and_empty_mean_none() {
    let dirs = Dirs::new();
    std::fs::write(dirs.path("base"), vec![7; 65536]).unwrap();
    dirs.create("a", "", &["-b", "base", "-F", "raw", "64k"]);
    for (backing, byte) in [(None, 7), (Some(json!(null)), 0), (Some(json!("")), 0)] {
        let more = backing.map_or(json!({}), |b| json!({ "backing": b }));
        let image = open(&dirs.path("a"), more).unwrap();
        let got = rt::block_on(image.read(1000, 5000, 1)).unwrap();
        assert!(got.iter().all(|b| *b == byte));
    }
    let graph = Graph::new();
    let base = json!({ "driver": "null-co", "node-name": "b", "size": 65536, "read-zeroes": true });
    let Value::Object(base) = base else { unreachable!() };
    graph.add(base).unwrap();
    let node = graph.add(options(&dirs.path("a"), json!({ "backing": "b" }))).unwrap();
    let got = rt::block_on(super::tools::read(&node, 0, 512, 1)).unwrap();
    assert!(got.iter().all(|b| *b == 0));
    let unknown = json!({ "backing": "x" });
    let text = "Could not open backing file: Cannot find device='x' nor node-name='x'";
    assert_eq!(error(&dirs, "a", unknown), text);
}

#[test]
fn names_in_headers() {
    let dirs = Dirs::new();
    std::fs::write(dirs.path("base"), vec![7; 65536]).unwrap();
    let full = dirs.path("base").display().to_string();
    let json = format!("json:{{\"driver\":\"raw\",\"file.filename\":\"{full}\"}}");
    let nested = format!(
        "json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{full}\"}}}}"
    );
    for (name, format) in [
        ("base", Some("raw")),
        ("./base", Some("raw")),
        ("base", None),
        (full.as_str(), Some("raw")),
        (full.as_str(), Some("file")),
        (&format!("file:{full}"), Some("raw")),
        (&json, None),
        (&nested, Some("raw")),
    ] {
        let mut args = vec!["-u", "-b", name];
        args.extend(format.iter().flat_map(|f| ["-F", f]));
        args.push("64k");
        // qemu-img refuses a backing file without a format: take it out again.
        if format.is_none() {
            args.extend(["-F", "raw"]);
            args.swap(3, 4);
            args.swap(4, 5);
        }
        dirs.create("a", "", &args);
        if format.is_none() {
            forget_format(&dirs, "a");
        }
        let image = open(&dirs.path("a"), json!({})).unwrap_or_else(|e| panic!("{name}: {e}"));
        let got = rt::block_on(image.read(0, 65536, 1)).unwrap();
        assert!(got.iter().all(|b| *b == 7), "{name}");
    }
    dirs.create("a", "", &["-u", "-b", "base", "-F", "raw", "64k"]);
    forget_format(&dirs, "a");
    let graph = Graph::new();
    graph.set_strict_formats(true);
    let refused = graph.add(options(&dirs.path("a"), json!({}))).map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("not allowed"), "{refused}");
}

/// Options in a name may be typed, or texts, at any depth: as in QEMU, with its words for what is neither.
#[test]
fn types_of_options_in_names() {
    let dirs = Dirs::new();
    let bytes: Vec<u8> = (0..256u32).flat_map(|n| [n as u8; 512]).collect();
    std::fs::write(dirs.path("base"), bytes).unwrap();
    dirs.create("q", "", &["64k"]);
    dirs.io("q", &["write -P 9 0 64k".to_owned()]);
    let file = |name: &str| {
        let path = dirs.path(name).display().to_string();
        format!(r#""driver":"file","filename":"{path}""#)
    };
    let (base, q) = (file("base"), file("q"));
    for (options, format) in [
        (format!(r#""driver":"raw","offset":"512","file":{{{base}}}"#), "raw"),
        (format!(r#""driver":"raw","offset":1024,"file":{{{base}}}"#), "raw"),
        (format!(r#""driver":"raw","size":"64k","file":{{{base},"read-only":"on"}}"#), "raw"),
        (format!(r#""read-only":true,"file":{{{base},"cache.direct":"off"}}"#), "raw"),
        (format!(r#""file":{{{base},"cache":{{"direct":"no"}}}}"#), "raw"),
        (format!(r#""file":{{{q}}},"l2-cache-size":"64k","lazy-refcounts":"off""#), "qcow2"),
        (format!(r#""file":{{{q}}},"overlap-check":{{"active-l2":"off"}}"#), "qcow2"),
        (format!(r#""driver":"raw","offset":"x","file":{{{base}}}"#), "raw"),
        (format!(r#""file":{{{base},"read-only":"maybe"}}"#), "raw"),
        (format!(r#""file":{{{q}}},"lazy-refcounts":"of""#), "qcow2"),
    ] {
        dirs.create("a", "", &["-u", "-b", &format!("json:{{{options}}}"), "-F", format, "64k"]);
        match open(&dirs.path("a"), json!({})) {
            Ok(image) => {
                let want = dirs.expected("a");
                let got = rt::block_on(image.read(0, 65536, 1)).unwrap();
                assert!(got == want, "{options}");
            }
            Err(e) => {
                println!("{options}: {e}");
                let hint = e.hint().map(|hint| format!("\n{hint}")).unwrap_or_default();
                assert_eq!(format!("{}{hint}", e.message()), qemu_error(&dirs, "a"), "{options}");
            }
        }
    }
}

/// Makes the backing format extension one that nobody knows.
fn forget_format(dirs: &Dirs, name: &str) {
    let mut bytes = std::fs::read(dirs.path(name)).unwrap();
    let magic = 0xe279_2acau32.to_be_bytes();
    let at = bytes.windows(4).position(|w| w == magic).unwrap();
    bytes[at..at + 4].copy_from_slice(&0x7777_7777u32.to_be_bytes());
    std::fs::write(dirs.path(name), bytes).unwrap();
}

#[test]
fn errors_in_qemus_words() {
    let dirs = Dirs::new();
    for (name, format) in [("missing", "raw"), ("missing.qcow2", "qcow2"), ("a0", "bogus")] {
        dirs.create("a0", "", &["64k"]);
        dirs.create("a", "", &["-u", "-b", name, "-F", "raw", "64k"]);
        dirs.run("qemu-img", &["rebase", "-f", "qcow2", "-u", "-b", name, "-F", "raw", "a"]);
        let mut bytes = std::fs::read(dirs.path("a")).unwrap();
        let at = bytes.windows(4).position(|w| w == 0xe279_2acau32.to_be_bytes()).unwrap();
        bytes[at + 7] = format.len() as u8;
        bytes[at + 8..at + 16].fill(0);
        bytes[at + 8..at + 8 + format.len()].copy_from_slice(format.as_bytes());
        std::fs::write(dirs.path("a"), bytes).unwrap();
        let dir = format!("{}/", dirs.0.path().display());
        assert_eq!(error(&dirs, "a", json!({})).replace(&dir, ""), qemu_error(&dirs, "a"));
    }
    // Errors of chains gather prefixes.
    dirs.create("b", "", &["-u", "-b", "missing", "-F", "raw", "64k"]);
    dirs.create("a", "", &["-u", "-b", "b", "-F", "qcow2", "64k"]);
    let dir = format!("{}/", dirs.0.path().display());
    assert_eq!(error(&dirs, "a", json!({})).replace(&dir, ""), qemu_error(&dirs, "a"));
}

#[test]
fn loops_end() {
    let dirs = Dirs::new();
    dirs.create("a", "", &["-u", "-b", "b", "-F", "qcow2", "64k"]);
    dirs.create("b", "", &["-u", "-b", "c", "-F", "qcow2", "64k"]);
    Command::new("ln").args(["-s", "a", "c"]).current_dir(dirs.0.path()).status().unwrap();
    let text = error(&dirs, "a", json!({}));
    assert!(text.ends_with("contains itself"), "{text}");
}

/// 300 overlays, each with some data of its own; read in pieces that find bytes in all of them.
#[test]
fn three_hundred_deep() {
    let dirs = Dirs::new();
    let size = 4 << 20;
    std::fs::write(dirs.path("i0"), vec![0xee; size]).unwrap();
    let mut want = vec![0xee; size];
    for i in 1..=300usize {
        let (name, base) = (format!("i{i}"), format!("i{}", i - 1));
        let format = if i == 1 { "raw" } else { "qcow2" };
        let args = ["-u", "-b", &base, "-F", format, "4M"];
        dirs.create(&name, "cluster_size=4k", &args);
        let at = i * 3 * 4096;
        // Without its backing file: qemu-io would open the chain each time.
        let target =
            format!("json:{{\"driver\":\"qcow2\",\"backing\":null,\"file.filename\":\"{name}\"}}");
        dirs.run("qemu-io", &["-c", &format!("write -P {} {at} 4096", i % 251 + 1), &target]);
        want[at..at + 4096].fill((i % 251 + 1) as u8);
    }
    let start = std::time::Instant::now();
    let image = open(&dirs.path("i300"), json!({})).unwrap();
    println!("300 images opened in {:?}", start.elapsed());
    let got = rt::block_on(image.read(0, size, 3)).unwrap();
    assert!(got == want);
    compare(&image, &want, WaitKind::Epoll, 1);
    drop(image);
}
