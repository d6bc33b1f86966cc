//! `vhost-user-blk`: a storage back end for virtual machines.

pub mod block;
pub mod cli;
pub mod error;
pub mod export;
pub mod mem;
pub mod qapi;
pub mod rt;
pub mod vhost_user;
pub mod virtio;
