//! A file whose reads never return, as those of a server that has died, beside one on healthy storage.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use serde_json::json;

use crate::common::program::Program;
use crate::common::{Image, MIB, Random, eventually, small, status_line};
use crate::{Options, WRITABLE};

/// Reads from here on (bytes) never return, whatever the file.
const DEAD: u32 = 32 << 20;

/// Has each `preadv2` at or behind [`DEAD`] wait for the answer of a supervisor that never comes: the program holds the
/// supervisor's descriptor itself. What must not wait (RWF_NOWAIT) is refused, as by NFS and FUSE.
fn hang(program: &mut Command) {
    let word = |code: u32, value: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: 0,
        jf: 0,
        k: value,
    };
    let load = |at| word(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, at);
    // So many words further if it holds, and if it does not.
    let jump = |how, value, then, or| libc::sock_filter {
        jt: then,
        jf: or,
        ..word(libc::BPF_JMP | how | libc::BPF_K, value)
    };
    // struct seccomp_data: the call's number at byte 0, its arguments from 16 on.
    let mut filter = [
        load(0),
        jump(libc::BPF_JEQ, u32::try_from(libc::SYS_preadv2).unwrap(), 0, 5),
        load(16 + 5 * 8),
        jump(libc::BPF_JSET, u32::try_from(libc::RWF_NOWAIT).unwrap(), 4, 0),
        load(16 + 3 * 8),
        jump(libc::BPF_JGE, DEAD, 0, 1),
        word(libc::BPF_RET, libc::SECCOMP_RET_USER_NOTIF),
        word(libc::BPF_RET, libc::SECCOMP_RET_ALLOW),
        word(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | u32::try_from(libc::EOPNOTSUPP).unwrap()),
    ];
    let apply = move || {
        let program = libc::sock_fprog {
            len: u16::try_from(filter.len()).unwrap_or(0),
            filter: filter.as_mut_ptr(),
        };
        // SAFETY: the program and its words live during the call.
        let listener = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
                &raw const program,
            )
        };
        let Ok(listener @ 0..) = i32::try_from(listener) else {
            return Err(io::Error::last_os_error());
        };
        // SAFETY: no memory is involved. The program inherits it, and nobody ever asks it what there is to answer.
        match unsafe { libc::fcntl(listener, libc::F_SETFD, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: between fork and exec only system calls are made.
    unsafe { program.pre_exec(apply) };
}

fn node(name: &str, image: &Image) -> String {
    json!({"driver": "file", "node-name": name, "filename": image.path(), "aio": "threads"})
        .to_string()
}

/// The threads of the pool: how many seccomp filters each has.
fn pool_threads(program: &Program) -> Vec<u64> {
    let tasks = std::fs::read_dir(program.proc().join("task")).unwrap();
    let tasks = tasks.map(|task| task.unwrap().path());
    let pool = tasks.filter(|task| {
        std::fs::read_to_string(task.join("comm")).is_ok_and(|name| name.trim() == "blk-pool")
    });
    pool.map(|task| status_line(&task.join("status"), "Seccomp_filters")).collect()
}

/// Two files hang with twice as many requests as the pool has threads; a third is read, written and flushed meanwhile, and the
/// threads are no more than promised.
#[test]
fn files_that_hang_leave_others_their_threads() {
    const DEPTH: u16 = 30;
    const DEAD_FILES: [&str; 2] = ["dead0", "dead1"];
    let images = [0; 3].map(|_| Image::new(64 * MIB));
    let nodes = [
        node(DEAD_FILES[0], &images[0]),
        node(DEAD_FILES[1], &images[1]),
        node("sound", &images[2]),
    ];
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-blk"));
    hang(&mut command);
    let exports = ["dead0", "dead1", "sound"].map(|name| (name, WRITABLE));
    let mut program = Program::run(command, &nodes, &exports, None);
    let mut dead = DEAD_FILES.map(|name| program.connect(name, Options { queues: 4, ..small() }));
    for q in dead.iter_mut().flat_map(|client| client.queues_mut()) {
        for _ in 0..DEPTH {
            let read = q.read_request(u64::from(DEAD) / 512, 4096).unwrap();
            q.push(read).unwrap();
        }
        q.kick().unwrap();
        eventually("requests are taken", || q.ring().mem().avail_event() == DEPTH);
    }
    let pool = || pool_threads(&program).len();
    eventually("they have all threads", || pool() >= 64);

    let mut sound = program.connect("sound", small());
    let data = Random(5).bytes(4096);
    for sector in (0..64).step_by(8) {
        sound.queue(0).write(sector, &data).unwrap();
        sound.queue(0).flush().unwrap();
        let mut back = vec![0; data.len()];
        sound.queue(0).read(sector, &mut back).unwrap();
        assert_eq!(back, data);
    }
    let filters = pool_threads(&program);
    assert!(filters.len() <= 64 + 3 * 4, "{} threads", filters.len());
    // None was made by another, and has taken over its filter beside its own.
    assert!(filters.iter().all(|n| *n == filters[0]), "{filters:?}");
    for client in &mut dead {
        let waiting: usize = client.queues_mut().iter().map(|q| q.in_flight()).sum();
        assert_eq!(waiting, 4 * usize::from(DEPTH), "a read has returned");
        assert!(client.queues_mut().iter_mut().all(|q| q.poll().unwrap().is_none()));
    }
    program.assert_alive();
}
