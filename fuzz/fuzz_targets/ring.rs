#![no_main]

#[path = "../src/hostile.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(|data: &[u8]| hostile::ring::run(data));
