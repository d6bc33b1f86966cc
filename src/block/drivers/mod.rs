//! The drivers, one file each, one line each in [`TABLE`].
#![deny(unsafe_code)]

use super::DriverDef;

pub mod blkdebug;
pub mod blklogwrites;
pub mod file;
pub mod host_device;
pub mod null;
#[expect(unsafe_code, reason = "the wrappers over libc that drivers of files need")]
pub(super) mod posix;
pub mod qcow2;
pub mod raw;

/// All drivers. The order matters where a driver is guessed: those that take anything come last of their kind.
pub static TABLE: &[&DriverDef] = &[
    &host_device::HOST_DEVICE,
    &file::FILE,
    &null::NULL_AIO,
    &null::NULL_CO,
    &qcow2::QCOW2,
    &blkdebug::BLKDEBUG,
    &blklogwrites::BLKLOGWRITES,
    &raw::RAW,
];
