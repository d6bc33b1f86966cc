//! The drivers, one file each, one line each in [`TABLE`].
#![forbid(unsafe_code)]

use super::DriverDef;

/// All drivers.
pub static TABLE: &[&DriverDef] = &[];
