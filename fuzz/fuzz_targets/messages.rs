#![no_main]

#[path = "../src/hostile.rs"]
mod hostile;

libfuzzer_sys::fuzz_target!(
    init: {
        // As Rust's own start of a program does, which libFuzzer replaces.
        // SAFETY: no other thread runs yet, and no handler is involved.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    },
    |data: &[u8]| hostile::messages::run(data)
);
