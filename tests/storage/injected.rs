//! Faults of `blkdebug`.

use serde_json::{Value, json};
use vhost_user_blk::export::ExportConfig;
use virtio_bindings::virtio_blk as vb;
use vub_client::blk::{Range, Request};
use vub_client::{Queue, Status};

use crate::common::{Disk, Image, config, small};
use crate::logged;

/// A raw disk of 1 MiB over blkdebug with `rules`, exported as `id`.
pub fn disk(id: &str, rules: &Value, config: ExportConfig) -> (Disk, Image) {
    logged::start();
    let image = Image::new(1 << 20);
    let mut debug = json!({
        "driver": "blkdebug", "discard": "unmap",
        "image": {"driver": "file", "filename": image.path(), "discard": "unmap"},
    });
    debug.as_object_mut().unwrap().extend(rules.as_object().unwrap().clone());
    let raw = json!({"driver": "raw", "node-name": "root", "discard": "unmap", "file": debug});
    (Disk::of(raw, ExportConfig { id: id.into(), ..config }), image)
}

pub fn status(q: &mut Queue, request: Request) -> Status {
    q.run(request).unwrap().status
}

fn request(q: &Queue, kind: &str) -> Request {
    let range = [Range { sector: 0, count: 8, flags: 0 }];
    match kind {
        "read" => q.read_request(0, 4096).unwrap(),
        "write" => q.write_request(0, &[7; 4096]).unwrap(),
        "write-zeroes" => Request::ranges(q.mem(), vb::VIRTIO_BLK_T_WRITE_ZEROES, &range).unwrap(),
        "discard" => Request::ranges(q.mem(), vb::VIRTIO_BLK_T_DISCARD, &range).unwrap(),
        _ => Request::flush(),
    }
}

#[test]
fn every_kind_of_request_fails_alone_and_the_disk_goes_on() {
    let kinds = ["read", "write", "write-zeroes", "discard", "flush"];
    for (immediately, bad) in kinds.iter().enumerate() {
        let rule = json!({
            "event": "none", "iotype": bad, "errno": 28, "once": true,
            "immediately": immediately % 2 == 0,
        });
        let rules = json!({"inject-error": [rule]});
        let (disk, _image) = disk(&format!("kind-{bad}"), &rules, config());
        let mut client = disk.connect(small());
        let q = client.queue(0);
        for kind in kinds.iter().chain(&kinds) {
            let first = kind == bad && logged::of(&format!("kind-{bad}")).is_empty();
            let want = if first { Status::IoErr } else { Status::Ok };
            let request = request(q, kind);
            assert_eq!(status(q, request), want, "{kind}, {bad} fails");
        }
        let lines = logged::of(&format!("kind-{bad}"));
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].ends_with("No space left on device"), "{lines:?}");
    }
}

/// A sector that cannot be read: its requests fail, all of them; one line says so, with node, place and reason.
#[test]
fn a_bad_sector_is_reported_once() {
    let rule = json!({"event": "none", "iotype": "read", "sector": 100});
    let (disk, _image) = disk("bad-sector", &json!({"inject-error": [rule]}), config());
    let mut client = disk.connect(small());
    let q = client.queue(0);
    for _ in 0..50 {
        let read = q.read_request(96, 4096).unwrap();
        assert_eq!(status(q, read), Status::IoErr);
        let read = q.read_request(101, 4096).unwrap();
        assert_eq!(status(q, read), Status::Ok);
    }
    q.write(100, &[9; 512]).unwrap();
    let want = "node 'root': read of 4096 bytes at 49152: Input/output error";
    assert_eq!(logged::of("bad-sector"), [want]);
}

/// Events of the raw format and of the generic layer, states in between: the third write, then the next flush.
#[test]
fn events_and_states() {
    let rules = json!({
        "set-state": [
            {"event": "write_aio", "state": 1, "new_state": 2},
            {"event": "write_aio", "state": 2, "new_state": 3},
            {"event": "write_aio", "state": 3, "new_state": 4},
        ],
        "inject-error": [
            {"event": "write_aio", "state": 3, "iotype": "write", "once": true},
            {"event": "flush_to_disk", "state": 4, "iotype": "flush", "once": true},
            {"event": "pwritev_zero", "iotype": "write-zeroes", "once": true},
        ],
    });
    let (disk, _image) = disk("states", &rules, config());
    let mut client = disk.connect(small());
    let q = client.queue(0);
    let mut run = |kind| {
        let request = request(q, kind);
        status(q, request)
    };
    let (ok, bad) = (Status::Ok, Status::IoErr);
    assert_eq!([run("write"), run("flush"), run("write")], [ok, ok, ok]);
    assert_eq!([run("write"), run("write")], [bad, ok]);
    assert_eq!([run("flush"), run("flush")], [bad, ok]);
    assert_eq!([run("write-zeroes"), run("write-zeroes"), run("read")], [bad, ok, ok]);
}

/// What the node below does not ask for: the generic layer cuts and aligns.
#[test]
fn limits_are_kept() {
    let rules = json!({
        "align": 4096, "max-transfer": 8192, "opt-write-zero": 8192, "max-write-zero": 16384,
        "opt-discard": 8192, "max-discard": 16384,
    });
    let (disk, image) = disk("limits", &rules, config());
    let mut client = disk.connect(small());
    let q = client.queue(0);
    let data: Vec<u8> = (0..65_536u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    q.write(3, &data).unwrap();
    let mut back = vec![0; data.len()];
    q.read(3, &mut back).unwrap();
    assert!(back == data);
    q.write_zeroes(10, 60, false).unwrap();
    q.flush().unwrap();
    let mut want = data;
    want[7 * 512..67 * 512].fill(0);
    let file = std::fs::read(image.path()).unwrap();
    assert!(file[3 * 512..3 * 512 + want.len()] == want);
    assert!(file[..3 * 512].iter().all(|b| *b == 0));
}
