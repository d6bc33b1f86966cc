//! The graph of nodes: opening by options, references, permissions.
#![forbid(unsafe_code)]

/// All nodes of the process.
pub struct Graph {}
