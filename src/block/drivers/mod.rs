//! The drivers, one file each, one line each in [`TABLE`].
#![deny(unsafe_code)]

use super::DriverDef;

pub mod file;
pub mod host_device;
pub mod null;
#[expect(unsafe_code, reason = "the wrappers over libc that drivers of files need")]
pub(super) mod posix;
pub mod qcow2;
pub mod raw;

/// All drivers.
pub static TABLE: &[&DriverDef] =
    &[&file::FILE, &host_device::HOST_DEVICE, &null::NULL_AIO, &null::NULL_CO, &raw::RAW];
