//! Hostile qcow2 images: made from a few bytes of entropy, opened, read, written, checked on a simulated disk.
//!
//! The same code is a property test with fixed seeds (`cargo test --test qcow2_fuzz`) and the targets of libFuzzer
//! (`contrib/fuzz`). An image is a sound one of random features (`image`), of which some fields are then changed to
//! values that could hurt (`mutate`): so it gets past the parser. All bytes of a run come from the entropy, so a run
//! can be repeated.
//!
//! What must hold for any image:
//! * no panic, no end that never comes, not more requests than [`bed::REQUESTS_MAX`];
//! * requests fail with one of a few errors only;
//! * who opens to read writes nothing;
//! * what a guest writes never gets into a table of the image;
//! * an image without errors has none afterwards, and the guest's disk is what the guest has made of it.
#![forbid(unsafe_code)]

pub mod bed;
pub mod entropy;
pub mod guest;
pub mod image;
pub mod mutate;
mod targets;

pub use targets::{assert_tables_are_tables, contents, open, read, write};
