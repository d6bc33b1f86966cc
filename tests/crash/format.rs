//! What the soaks' disks are made of.

use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::common::{Engine, Image, eventually};
use crate::model::{BASE, Model, stamps};
use crate::soak::SIZE;

/// A kind of image.
#[derive(Debug)]
pub enum Format {
    Raw,
    Qcow2 {
        /// For `qemu-img create -o`.
        options: &'static str,
        cluster: u64,
        /// Over a raw file of stamps.
        overlay: bool,
    },
}

impl Format {
    /// A new image, and what the guest sees in it.
    pub fn make(&self) -> (Image, Model) {
        let image = Image::new(SIZE);
        let Format::Qcow2 { options, overlay, .. } = self else {
            return (image, Model::new(SIZE / 512, 0));
        };
        let path = image.path();
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-o", options]);
        if *overlay {
            let base = path.with_file_name("base");
            std::fs::write(&base, stamps(0, SIZE / 512, BASE)).unwrap();
            create.arg("-b").arg(base).args(["-F", "raw"]);
        }
        assert!(create.arg(path).arg(SIZE.to_string()).status().unwrap().success());
        (image, Model::new(SIZE / 512, if *overlay { BASE } else { 0 }))
    }

    /// The options of its node, `root`.
    pub fn options(&self, image: &Image, engine: Engine) -> Value {
        let mut options = image.options(engine, "unmap");
        if let Format::Qcow2 { .. } = self {
            options["driver"] = json!("qcow2");
        }
        options
    }

    /// Bytes that requests like to be aligned to.
    pub fn cluster(&self) -> u64 {
        match self {
            Format::Raw => 65536,
            Format::Qcow2 { cluster, .. } => *cluster,
        }
    }

    /// What is in an image that has been flushed.
    pub fn content(&self, image: &Image) -> Vec<u8> {
        let Format::Qcow2 { .. } = self else { return std::fs::read(image.path()).unwrap() };
        let raw = image.path().with_file_name("content");
        let convert = ["convert", "-U", "-f", "qcow2", "-O", "raw"];
        let done = Command::new("qemu-img").args(convert).arg(image.path()).arg(&raw).output();
        assert!(done.as_ref().unwrap().status.success(), "{done:?}");
        std::fs::read(raw).unwrap()
    }

    /// Fails if `qemu-img check` says something else: 0 is good, 3 leaks. Waits for the lock of a killed program.
    pub fn check(&self, image: &Image, good: &[i32]) {
        let Format::Qcow2 { .. } = self else { return };
        let mut said: Option<Output> = None;
        eventually("the image can be checked", || {
            let mut check = Command::new("qemu-img");
            let out = check.args(["check", "-f", "qcow2"]).arg(image.path()).output().unwrap();
            let locked = String::from_utf8_lossy(&out.stderr).contains("Failed to get");
            said = Some(out);
            !locked
        });
        let code = said.as_ref().unwrap().status.code().unwrap();
        assert!(good.contains(&code), "{said:?}");
    }
}
