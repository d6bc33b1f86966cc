//! The option language: a `--blockdev` of the usual kind, in both of its syntaxes.

use std::hint::black_box;

use vhost_user_blk::qapi::visit::Input;

use crate::Case;

pub const JSON: &str = r#"{"driver": "qcow2", "node-name": "disk0", "discard": "unmap",
    "cache": {"direct": true, "no-flush": false}, "file": {"driver": "file", "aio": "io_uring",
    "filename": "/var/lib/images/disk0.qcow2", "cache": {"direct": true, "no-flush": false}}}"#;

pub const KEYVAL: &str = "qcow2,node-name=disk0,discard=unmap,cache.direct=on,cache.no-flush=off,\
    file.driver=file,file.aio=io_uring,file.filename=/var/lib/images/disk0.qcow2,\
    file.cache.direct=on,file.cache.no-flush=off";

pub struct Options {
    text: &'static str,
    parsed: bool,
}

impl Options {
    pub fn new(text: &'static str) -> Options {
        Options { text, parsed: true }
    }
}

impl Case for Options {
    fn ops(&self) -> u32 {
        1
    }

    fn prepare(&mut self) {
        assert!(self.parsed);
        self.parsed = false;
    }

    fn run(&mut self) {
        let input = Input::parse(black_box(self.text), "driver").expect("options");
        let options = input.visit_blockdev().expect("options of qcow2");
        self.parsed = options["file"]["aio"] == "io_uring";
    }
}
