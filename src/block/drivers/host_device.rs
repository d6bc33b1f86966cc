//! `host_device`: a block device (or, as in QEMU, a character device) of the host. The work is done by the parts of
//! [`super::file`]; here is what is particular to devices.
#![forbid(unsafe_code)]

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use super::file::{Family, OPTIONS, open};
use crate::block::perm::default_child_perms;
use crate::block::{DriverDef, DriverKind, Limits};

/// `host_device`.
pub static HOST_DEVICE: DriverDef = DriverDef {
    name: "host_device",
    kind: DriverKind::Protocol,
    options: OPTIONS,
    open: |args| open(args, &DEVICE),
    child_perms: default_child_perms,
};

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
    use super::*;

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
