//! Hostile guests and front ends, made from a few bytes of entropy.
//!
//! As with the images beside it, the same code is a test with fixed seeds (`cargo test --test hostile_fuzz`) and the
//! targets of libFuzzer (`contrib/fuzz`). What must hold, whatever comes:
//! * no panic, and no work without an end;
//! * nothing is written but what the device may write just then, in guest memory or beside it;
//! * the disk's end is the end;
//! * who does not lie is served meanwhile, and nothing is left behind: no descriptor, no memory.
#![allow(dead_code, reason = "each target uses a part")]

#[path = "hostile/driver.rs"]
pub mod driver;
#[path = "entropy.rs"]
pub mod entropy;
#[path = "hostile/front_end.rs"]
mod front_end;
#[path = "hostile/memory.rs"]
pub mod memory;
#[path = "hostile/messages.rs"]
pub mod messages;
#[path = "hostile/ring.rs"]
pub mod ring;
