//! `vhost-user-blk top`.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};

use vub_client::Client;

use crate::common::small;
use crate::place::{PROGRAM, Place};
use crate::raw;

fn top(place: &Place, args: &[&str]) -> Output {
    Command::new(PROGRAM).arg("top").args(args).current_dir(place.dir.path()).output().unwrap()
}

#[test]
fn a_block_with_a_line_for_each_queue() {
    let place = raw();
    let output = top(&place, &["--metrics=m", "--once", "--interval", "0.05"]);
    assert!(output.status.success());
    assert!(String::from_utf8(output.stdout).unwrap().contains("no queue has run"));

    let end = AtomicBool::new(false);
    let mut client = Client::connect_retry(place.path("s"), small()).unwrap();
    let q = client.queue(0);
    q.read(0, &mut [0; 4096]).unwrap();
    let text = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                q.read(0, &mut [0; 4096]).unwrap();
            }
        });
        let output = top(&place, &["--metrics", "unix:m", "--once", "--interval=0.5"]);
        end.store(true, Ordering::Relaxed);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    });
    let lines: Vec<Vec<_>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(lines[0][..4], ["EXPORT", "Q", "IOPS", "MB/s"], "{text}");
    assert_eq!((lines.len(), &lines[2][..]), (3, &[][..]), "one block: {text}");
    let number = |at: usize| lines[1][at].parse::<f64>().unwrap_or_else(|_| panic!("{text}"));
    assert_eq!(lines[1][..2], ["disk0", "0"]);
    let iops = number(2);
    assert!(iops > 0.0 && (number(3) - iops * 4096.0 / 1e6).abs() < 0.06 + iops * 1e-5, "{text}");
    assert!(lines[1][4].ends_with('s') && lines[1][5].ends_with('s'), "{text}");
    assert!(number(9) > 0.0, "one at a time, somebody has to be told: {text}");
    assert_eq!(lines[1][11], "0");
    drop(client);
    place.stop();
}

#[test]
fn top_is_a_command_only_as_the_first_word() {
    let place = raw();
    for (args, why) in [
        (&["--metrics=nobody", "--once"][..], "nobody: No such file or directory"),
        (&["--once"], "no address is given"),
        (&["--metrics=m", "--bogus"], "unexpected argument '--bogus'"),
    ] {
        let output = top(&place, args);
        assert_eq!(output.status.code(), Some(1));
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains(why), "{errors}");
    }
    let output = Command::new(PROGRAM).args(["--read-only", "top"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    place.stop();
}
