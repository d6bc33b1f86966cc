//! The program. All of it is in the library, where tests reach it: [`vhost_user_blk::cli`].
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    vhost_user_blk::cli::main(std::env::args_os())
}
