//! Upgrade in place: `--take-over`, the program itself, over real sockets.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

#[path = "../common/mod.rs"]
mod common;
mod failures;
mod fellow;
mod guest;
mod load;
#[path = "../qcow2_write/model.rs"]
#[allow(dead_code, reason = "power losses are qcow2_write's")]
mod model;
mod place;
mod shapes;

/// What the model asks its bed.
mod bed {
    /// Nothing is too hard for us.
    pub fn gentle() -> bool {
        false
    }
}
