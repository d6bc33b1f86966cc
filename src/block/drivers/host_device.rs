//! `host_device`: a block device (or, as in QEMU, a character device) of the host. The work is done by the parts of
//! [`super::file`]; here is what is particular to devices.
#![forbid(unsafe_code)]

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::file::{Family, OPTIONS, open};
use crate::block::perm::default_child_perms;
use crate::block::{DriverDef, DriverKind, Limits, Recognises};

/// `host_device`.
pub static HOST_DEVICE: DriverDef = DriverDef {
    name: "host_device",
    kind: DriverKind::Protocol,
    options: OPTIONS,
    open: |args| open(args, &DEVICE),
    recognises: Recognises::Path(is_device),
    child_perms: default_child_perms,
};

fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| (DEVICE.takes)(&meta))
}

static DEVICE: Family = Family {
    name: "host_device",
    wants: "either a character or block device",
    takes: |meta| {
        let kind = meta.file_type();
        kind.is_block_device() || kind.is_char_device()
    },
    limits,
};

/// Adds what the kernel tells of a block device's queue. `max_sectors` and `max_segments` are left alone: the kernel
/// splits reads and writes by them itself, and better (they only bind SCSI pass-through, which there is not).
fn limits(meta: &Metadata, limits: &mut Limits) {
    if !meta.file_type().is_block_device() {
        return;
    }
    let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
    add_queue_limits(Path::new(&format!("/sys/dev/block/{major}:{minor}")), limits);
}

fn add_queue_limits(device: &Path, limits: &mut Limits) {
    // A partition's directory lies in its disk's.
    let queue = [device.join("queue"), device.join("../queue")].into_iter().find(|q| q.is_dir());
    let get = |name: &str| -> u32 {
        let text = queue.as_ref().and_then(|q| std::fs::read_to_string(q.join(name)).ok());
        text.and_then(|t| t.trim().parse().ok()).unwrap_or(0)
    };
    limits.physical_block = get("physical_block_size").max(limits.request_align);
    limits.opt_transfer = get("optimal_io_size");
    limits.discard_align = get("discard_granularity").max(get("logical_block_size")).max(1);
    limits.zeroes_align = get("logical_block_size").max(1);
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::sync::Arc;

    use serde_json::{Value, json};

    use super::*;
    use crate::block::perm::Perms;
    use crate::block::{Graph, Node, Op, ZeroFlags};
    use crate::error::{Errno, Result};
    use crate::rt;

    /// A loop device over a file; detached when dropped.
    struct Loop(String);

    impl Loop {
        /// Over `path`. The kernel must have loop devices, and it takes root.
        fn over(path: &Path, read_only: &[&str]) -> Loop {
            let mut losetup = Command::new("losetup");
            let made = losetup.args(read_only).args(["-f", "--show"]).arg(path).output().unwrap();
            assert!(made.status.success(), "no loop device: {made:?}");
            Loop(String::from_utf8(made.stdout).unwrap().trim().to_owned())
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["-d", &self.0]).status();
        }
    }

    fn open_device(graph: &Graph, device: &str, more: Value) -> Result<Arc<Node>> {
        let mut options = json!({
            "driver": "host_device", "node-name": "d", "filename": device, "aio": "threads",
        });
        let (Value::Object(all), Value::Object(mut more)) = (&mut options, more) else {
            panic!("options are objects")
        };
        all.append(&mut more);
        graph.add(all.clone())
    }

    #[test]
    fn a_loop_device_is_discarded_and_zeroed() {
        let image = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        std::fs::write(image.path(), vec![7u8; 1 << 20]).unwrap();
        let device = Loop::over(image.path(), &[]);
        for direct in [true, false] {
            let graph = Graph::new();
            let options = json!({ "cache": { "direct": direct }, "discard": "unmap" });
            let node = open_device(&graph, &device.0, options).unwrap();
            assert_eq!(node.len(), 1 << 20);
            let limits = node.driver().limits();
            assert!(limits.physical_block >= 512 && limits.discard_align >= 512, "{limits:?}");
            let _writer = graph.attach_root(&node, "the test", Perms::device(true)).unwrap();
            let run = |op| rt::block_on(node.driver().submit(op));
            run(Op::Discard { offset: 0, len: 65536 }).unwrap();
            let zeroes = |offset, flags| run(Op::WriteZeroes { offset, len: 65536, flags });
            zeroes(65536, ZeroFlags::MAY_UNMAP).unwrap();
            let plain = zeroes(131_072, ZeroFlags::empty());
            assert_eq!(plain, if direct { Ok(()) } else { Err(Errno::ENOTSUP) });
            run(Op::Flush).unwrap();
            let bytes = std::fs::read(image.path()).unwrap();
            assert!(bytes[..131_072].iter().all(|b| *b == 0));
            assert!(bytes[196_608..].iter().all(|b| *b == 7));
        }
    }

    #[test]
    fn a_read_only_device_refuses_writers() {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let device = Loop::over(image.path(), &["-r"]);
        let text = "The device is not writable: Permission denied";
        let error = open_device(&Graph::new(), &device.0, json!({})).map(|_| ()).unwrap_err();
        assert_eq!(error.to_string(), text);
        let graph = Graph::new();
        let node = open_device(&graph, &device.0, json!({ "auto-read-only": true })).unwrap();
        graph.attach_root(&node, "the test", Perms::device(false)).unwrap();
        let error = graph.attach_root(&node, "the test", Perms::device(true)).map(|_| ());
        assert_eq!(error.unwrap_err().to_string(), text);
    }

    #[test]
    fn character_devices_are_taken_as_qemu_takes_them() {
        let node = open_device(&Graph::new(), "/dev/null", json!({})).unwrap();
        assert_eq!(node.len(), 0);
    }

    #[test]
    fn limits_of_a_disk_and_its_partition() {
        let temp = tempfile::tempdir().unwrap();
        let (queue, part) = (temp.path().join("queue"), temp.path().join("sda1"));
        std::fs::create_dir(&queue).unwrap();
        std::fs::create_dir(&part).unwrap();
        for (name, value) in [
            ("physical_block_size", "4096\n"),
            ("logical_block_size", "512\n"),
            ("optimal_io_size", "65536\n"),
            ("discard_granularity", "1048576\n"),
        ] {
            std::fs::write(queue.join(name), value).unwrap();
        }
        for device in [temp.path(), part.as_path()] {
            let mut limits = Limits::default();
            add_queue_limits(device, &mut limits);
            let found = (limits.physical_block, limits.opt_transfer, limits.discard_align);
            assert_eq!((found, limits.zeroes_align), ((4096, 65536, 1 << 20), 512));
        }
        let mut unknown = Limits::default();
        add_queue_limits(Path::new("/nonexistent"), &mut unknown);
        assert_eq!(unknown, Limits { physical_block: 1, ..Limits::default() });
    }
}
