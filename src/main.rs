//! The program: command line, signals, start, exit code.
fn main() {}
