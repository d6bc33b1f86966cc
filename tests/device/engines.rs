//! The same tests where io_uring is not to be had: the program decides that once, so they run in a process of their own.

use crate::common::rerun;

#[test]
fn without_io_uring() {
    // The pipe of `fast_lane` tests stays in an io_uring; everything else must work as it does with one.
    let skip = ["--skip", "without_io_uring", "--skip", "fast_lane"];
    let out = rerun(&skip, &[("VHOST_USER_BLK_NO_IO_URING", "1"), ("VUB_TEST_ROUNDS", "3000")]);
    assert!(out.contains("test result: ok"), "{out}");
    assert!(out.contains("requests_on_every_engine ... ok"), "{out}");
    assert!(out.contains("sixteen_queues_of_two_workers ... ok"), "{out}");
}
