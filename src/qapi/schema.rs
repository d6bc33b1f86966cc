//! The schema of what every block node, export and object has; drivers bring their own part.
#![forbid(unsafe_code)]

use super::Kind::{Bool, Enum, Size, Str};
use super::{Kind, OptionSpec, UnionSpec};
use crate::block::DriverDef;
use crate::block::drivers::TABLE;
use crate::export::OnError;

const fn optional(name: &'static str, kind: Kind) -> OptionSpec {
    OptionSpec::optional(name, kind)
}

const fn required(name: &'static str, kind: Kind) -> OptionSpec {
    OptionSpec::required(name, kind)
}

/// `int`.
const INT: Kind = Kind::Int { bits: 64, signed: true };
/// `uint16`.
const UINT16: Kind = Kind::Int { bits: 16, signed: false };

/// The options of every block node, after `driver`.
pub static NODE: &[OptionSpec] = &[
    optional("node-name", Str),
    optional("discard", Enum(&["ignore", "unmap"])),
    optional("cache", Kind::Struct(&[optional("direct", Bool), optional("no-flush", Bool)])),
    optional("active", Bool),
    optional("read-only", Bool),
    optional("auto-read-only", Bool),
    optional("force-share", Bool),
    optional("detect-zeroes", Enum(&["off", "on", "unmap"])),
];

/// Drivers of QEMU 10.0 that are not here.
static QEMUS_DRIVERS: &[&str] = &[
    "blkdebug",
    "blklogwrites",
    "blkreplay",
    "blkverify",
    "bochs",
    "cloop",
    "compress",
    "copy-before-write",
    "copy-on-read",
    "dmg",
    "file",
    "ftp",
    "ftps",
    "gluster",
    "host_cdrom",
    "host_device",
    "http",
    "https",
    "iscsi",
    "luks",
    "nbd",
    "nfs",
    "null-aio",
    "null-co",
    "nvme",
    "parallels",
    "preallocate",
    "qcow",
    "qcow2",
    "qed",
    "quorum",
    "raw",
    "rbd",
    "replication",
    "snapshot-access",
    "ssh",
    "throttle",
    "vdi",
    "vhdx",
    "vmdk",
    "vpc",
    "vvfat",
];

/// What a driver's name stands for.
pub enum Driver {
    /// A driver of this program.
    Here(&'static DriverDef),
    /// One that QEMU has and this program has not.
    Qemus,
    /// Neither.
    Unknown,
}

/// Looks a driver up by its name.
pub fn driver(name: &str) -> Driver {
    match TABLE.iter().find(|def| def.name == name) {
        Some(def) => Driver::Here(def),
        None if QEMUS_DRIVERS.contains(&name) => Driver::Qemus,
        None => Driver::Unknown,
    }
}

/// The options of every export, after `type`. `id` is required in QEMU; here only where there are several exports.
pub static EXPORT: &[OptionSpec] = &[
    optional("id", Str),
    optional("fixed-iothread", Bool),
    optional("iothread", Str),
    required("node-name", Str),
    optional("writable", Bool),
    optional("writethrough", Bool),
    optional("allow-inactive", Bool),
];

/// The options of a `vhost-user-blk` export: QEMU's, then those that only this program has.
pub static VHOST_USER_BLK: &[OptionSpec] = &[
    required("addr", Kind::Union(&SOCKET_ADDRESS)),
    optional("logical-block-size", Size),
    optional("num-queues", UINT16),
    optional("serial", Str),
    optional("queue-size", UINT16),
    optional("threads", UINT16),
    optional("poll-max-ns", INT),
    optional("activate", Enum(&["start", "auto"])),
    optional("rerror", Enum(OnError::NAMES)),
    optional("werror", Enum(OnError::NAMES)),
];

/// `SocketAddress`.
pub static SOCKET_ADDRESS: UnionSpec = UnionSpec {
    tag: "type",
    branches: &[
        (
            "inet",
            &[
                required("host", Str),
                required("port", Str),
                optional("numeric", Bool),
                optional("to", UINT16),
                optional("ipv4", Bool),
                optional("ipv6", Bool),
                optional("keep-alive", Bool),
                optional("mptcp", Bool),
            ],
        ),
        ("unix", &[required("path", Str), optional("abstract", Bool), optional("tight", Bool)]),
        ("vsock", &[required("cid", Str), required("port", Str)]),
        ("fd", &[required("str", Str)]),
    ],
};

/// Export types of QEMU that are not here.
pub static QEMUS_EXPORTS: &[&str] = &["nbd", "fuse", "vduse-blk"];

/// The options of an `iothread` object.
pub static IOTHREAD: &[OptionSpec] = &[
    required("id", Str),
    optional("aio-max-batch", INT),
    optional("thread-pool-min", INT),
    optional("thread-pool-max", INT),
    optional("poll-max-ns", INT),
    optional("poll-grow", INT),
    optional("poll-shrink", INT),
];

/// The options of a `secret` object.
pub static SECRET: &[OptionSpec] = &[
    required("id", Str),
    optional("format", Enum(&["raw", "base64"])),
    optional("keyid", Str),
    optional("iv", Str),
    optional("data", Str),
    optional("file", Str),
];

/// Object types of qemu-storage-daemon that are not here.
pub static QEMUS_OBJECTS: &[&str] = &[
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "main-loop",
    "pr-manager-helper",
    "secret_keyring",
    "thread-context",
    "throttle-group",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
];
