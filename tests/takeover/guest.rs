//! A real guest: fio writes and verifies in it while the program is replaced.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::place::{Place, assert_clean, wait_for};

const TAKE_OVERS: usize = 3;

#[test]
fn a_guest_verifies_through_take_overs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = Place::dir();
    let image = dir.path().join("image");
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(&image).arg("256M");
    assert!(create.status().unwrap().success());
    let node = "driver=qcow2,node-name=d,discard=unmap,file.driver=file,file.filename=image";
    let export = "vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path=s";
    let mut place = Place::start(dir, &["--blockdev", node, "--export", export]);

    let mut run = Command::new(root.join("contrib/guest/run"));
    run.args(["--timeout", "240", "--env", "FIO_DEPTH=32", "--vcpus", "2", "--socket"]);
    run.arg(place.path("s"));
    run.arg("--script").arg(root.join("contrib/guest/tests/fio-verify.sh"));
    let errors = place.path("errors");
    run.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&errors).unwrap());
    let mut guest = run.spawn().unwrap();
    let mut output = BufReader::new(guest.stdout.take().unwrap());
    let mut text = String::new();
    while !text.contains("-- write") && output.read_line(&mut text).unwrap() > 0 {}
    let written = || std::fs::metadata(&image).unwrap().len();
    for _ in 0..TAKE_OVERS {
        // fio is at work when the image grows.
        let before = written();
        wait_for("fio's writes", || (written() > before + (4 << 20)).then_some(()));
        place.take_over();
    }
    output.read_to_string(&mut text).unwrap();
    let status = guest.wait().unwrap();
    let errors = std::fs::read_to_string(&errors).unwrap();
    assert!(status.success(), "guest: {status}\n{text}\n{errors}\n{}", place.log());
    assert!(text.contains("-- mixed"), "{text}");
    println!("pauses of a guest at depth 32: {:?} ms", place.pauses("handed over"));
    let log = place.log();
    assert!(!log.contains("ERROR"), "{log}");
    assert_eq!(log.matches("front end connected").count(), 1, "it never had to reconnect: {log}");
    assert_clean(&place.stop().path().join("image"));
}
