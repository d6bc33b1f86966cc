//! `qcow2`: QEMU's image format.
#![deny(unsafe_code)]

pub mod check;
pub mod create;
pub mod header;
pub mod layout;
