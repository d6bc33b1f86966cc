//! Reading qcow2 images made by QEMU's tools, through our graph, against `qemu-img convert`.
#![allow(clippy::unwrap_used)]

mod qcow2 {
    pub mod chains;
    pub mod corpus;
    pub mod errors;
    pub mod fuzz;
    pub mod tools;
}
