//! Images that our `create` made, beside those of `qemu-img create`.

use std::fs;
use std::path::Path;

use serde_json::Value;
use vhost_user_blk::block::drivers::qcow2::check::Fix;
use vhost_user_blk::block::drivers::qcow2::create::{CreateOptions, Preallocation, create};
use vhost_user_blk::block::drivers::qcow2::header::Compression;

use super::{check_file, class, run, sh, with_file};

fn qemu_options(o: &CreateOptions) -> String {
    let on = |b: bool| if b { "on" } else { "off" };
    let mut text = format!(
        "compat={},cluster_size={},preallocation={}",
        if o.version == 2 { "0.10" } else { "1.1" },
        o.cluster_size,
        match o.preallocation {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    );
    if o.version > 2 {
        text += &format!(
            ",refcount_bits={},extended_l2={},lazy_refcounts={},compression_type={}",
            o.refcount_bits,
            on(o.extended_l2),
            on(o.lazy_refcounts),
            if o.compression == Compression::Zstd { "zstd" } else { "zlib" }
        );
    }
    if o.version == 2 && o.lazy_refcounts {
        text += ",lazy_refcounts=on";
    }
    if let Some(name) = &o.data_file {
        text += &format!(",data_file={name},data_file_raw={}", on(o.data_file_raw));
    }
    if let (Some(name), Some(format)) = (&o.backing_file, &o.backing_format) {
        text += &format!(",backing_file={name},backing_fmt={format}");
    }
    text
}

fn info(dir: &Path, name: &str) -> Value {
    let said = run("qemu-img", &["info", "--output=json", name], dir);
    let mut info: Value = serde_json::from_str(&said.1).unwrap_or_else(|_| panic!("{said:?}"));
    for key in ["children", "filename", "actual-size", "full-backing-filename"] {
        info.as_object_mut().unwrap().remove(key);
    }
    info
}

fn creates_as_qemu_does(dir: &Path, options: &CreateOptions) {
    let text = qemu_options(options);
    let size = options.size.to_string();
    for name in ["theirs", "ours"] {
        let _ = fs::remove_file(dir.join(name));
    }
    let args = ["create", "-q", "-f", "qcow2", "-o", &text, "theirs", &size];
    let said = run("qemu-img", &args, dir);
    fs::write(dir.join("ours"), b"").unwrap();
    let made = with_file(&dir.join("ours"), async |node| create(node, options).await);
    assert_eq!(made.is_ok(), said.0 == 0, "{text} {size}: {said:?} {made:?}");
    if made.is_err() {
        return;
    }
    let check = run("qemu-img", &["check", "ours"], dir);
    assert_eq!((check.0, check.2.as_str()), (0, ""), "{text} {size}: {check:?}");
    assert_eq!(class(check_file(&dir.join("ours"), Fix::Nothing).as_ref()), 0, "{text} {size}");
    assert_eq!(info(dir, "ours"), info(dir, "theirs"), "{text} {size}");
    if options.cluster_size == 65536 {
        // The whole header, but for the place of the L1 table, which depends on the history of its growth.
        let cluster0 = |name| fs::read(dir.join(name)).unwrap()[..1024].to_vec();
        let (ours, theirs) = (cluster0("ours"), cluster0("theirs"));
        assert_eq!(ours[..40], theirs[..40], "{text} {size}");
        assert_eq!(ours[72..], theirs[72..], "{text} {size}");
    }
}

#[test]
fn created_images_are_as_qemus() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    sh(dir, "truncate -s 1M base; truncate -s 4M data");
    let all = || CreateOptions::default();
    let mut list = Vec::new();
    for cluster_size in [512, 4096, 65536, 2 << 20] {
        for size in [0, 1000, 1 << 20, (5 << 20) + 512, 1 << 40] {
            list.push(CreateOptions { cluster_size, size, version: 2, ..all() });
            for refcount_bits in [1, 16, 64] {
                list.push(CreateOptions { cluster_size, size, refcount_bits, ..all() });
            }
            list.push(CreateOptions { cluster_size, size, extended_l2: true, ..all() });
        }
        for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
            let size = (3 << 20) + 512;
            list.push(CreateOptions { cluster_size, size, preallocation, ..all() });
            list.push(CreateOptions {
                cluster_size,
                size,
                preallocation,
                extended_l2: true,
                ..all()
            });
        }
    }
    let size = 4 << 20;
    let data_file = Some("data".to_owned());
    let (backing_file, backing_format) = (Some("base".to_owned()), Some("raw".to_owned()));
    list.push(CreateOptions {
        size,
        compression: Compression::Zstd,
        lazy_refcounts: true,
        ..all()
    });
    list.push(CreateOptions { size, data_file: data_file.clone(), ..all() });
    list.push(CreateOptions { size, data_file: data_file.clone(), data_file_raw: true, ..all() });
    list.push(CreateOptions { size, backing_file, backing_format, ..all() });
    list.push(CreateOptions { size, version: 2, lazy_refcounts: true, ..all() });
    list.push(CreateOptions { size, cluster_size: 1000, ..all() });
    for options in &list {
        creates_as_qemu_does(dir, options);
    }
}
