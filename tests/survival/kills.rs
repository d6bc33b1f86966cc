//! The program is killed again and again under a guest in which fio writes and verifies; QEMU reconnects to its successor.
//! The guest must see no error and no wrong byte, and stand still for less than a second.

use std::fs::File;
use std::io::BufRead;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use crate::common::{LIMIT, Random};
use crate::{Guest, alone, directory, succeed, variable};

/// From SIGKILL to the guest's next write that is done.
const BAR: Duration = Duration::from_secs(1);
/// Time that the guest works between two kills, in milliseconds: as much and half as much again at random.
const WORK_MS: u64 = 500;
const QUEUES: usize = 2;
/// Requests in flight without which nobody is killed.
const IN_FLIGHT: usize = 8;
/// Requests of each of the three phases of the guest's script.
const REQUESTS: u64 = 700;

/// The program on an image; the next one takes its place after [`Server::kill`].
pub struct Server {
    command: Command,
    child: Child,
    socket: PathBuf,
    image: PathBuf,
}

/// What one kill took, since SIGKILL.
struct Outage {
    /// Requests that it had begun and not finished.
    in_flight: usize,
    /// How long it was stopped before SIGKILL, in all, by whoever looked for that moment.
    stopped: Duration,
    /// The process is gone.
    gone: Duration,
    /// Its successor listens.
    listens: Duration,
    /// The successor has written for the guest.
    writes: Duration,
    /// Successors that could not start, because the kernel still held the locks for requests of the dead.
    refused: usize,
}

impl Server {
    /// `program` on the image `disk` in `dir`.
    pub fn start(program: &str, dir: &Path, format: &str) -> Server {
        let (image, socket) = (dir.join("disk"), dir.join("socket"));
        let node = format!(
            "driver={format},node-name=disk,discard=unmap,file.driver=file,file.discard=unmap,file.cache.direct=on,file.filename={}",
            image.display()
        );
        let export = format!(
            "vhost-user-blk,id=e,node-name=disk,writable=on,num-queues={QUEUES},addr.type=unix,addr.path={}",
            socket.display()
        );
        let mut command = Command::new(program);
        command.args(["--blockdev", &node, "--export", &export]).stdin(Stdio::null());
        command.stderr(File::create(dir.join("errors")).unwrap());
        let child = command.spawn().unwrap();
        let mut server = Server { command, child, socket, image };
        server.wait_until_it_listens();
        server
    }

    /// How many had to be started until one listens.
    fn wait_until_it_listens(&mut self) -> usize {
        let (start, mut refused) = (Instant::now(), 0);
        while UnixStream::connect(&self.socket).is_err() {
            assert!(start.elapsed() < LIMIT, "nobody listens");
            if self.child.try_wait().unwrap().is_some() {
                self.child = self.command.spawn().unwrap();
                refused += 1;
            }
            std::thread::yield_now();
        }
        refused
    }

    /// When the image was written last.
    fn written(&self) -> (i64, i64) {
        let meta = std::fs::metadata(&self.image).unwrap();
        (meta.mtime(), meta.mtime_nsec())
    }

    fn wait_for_a_write(&self) {
        let (start, before) = (Instant::now(), self.written());
        while self.written() == before {
            assert!(start.elapsed() < LIMIT, "the guest does not write");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// SIGKILL and a successor: when it was gone, and how many were refused.
    pub fn replace(&mut self) -> (Duration, usize) {
        let start = Instant::now();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let gone = start.elapsed();
        self.child = self.command.spawn().unwrap();
        (gone, self.wait_until_it_listens())
    }

    /// SIGTERM: exit code 0.
    pub fn terminate(mut self) {
        vub_client::sys::kill(self.child.id(), libc::SIGTERM).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }

    /// The requests that its in-flight region names, of all queues; none if it has no such region.
    fn in_flight(&self) -> Option<usize> {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let maps = std::fs::read_to_string(proc.join("maps")).unwrap();
        let line = maps.lines().find(|line| line.contains("vhost-user-blk-inflight"))?;
        let (from, to) = line.split(' ').next()?.split_once('-')?;
        let [from, to] = [from, to].map(|n| u64::from_str_radix(n, 16).unwrap());
        let mut region = vec![0; usize::try_from(to - from).unwrap()];
        File::open(proc.join("mem")).unwrap().read_exact_at(&mut region, from).unwrap();
        // Of each queue: 16 bytes, in them the number of descriptors; then 16 bytes for each, the first is 1 in flight.
        let size = usize::from(u16::from_le_bytes(region[10..12].try_into().unwrap()));
        let part = (16 + 16 * size).next_multiple_of(64);
        let queues = region.chunks(part).take(QUEUES);
        Some(queues.flat_map(|q| q[16..].chunks(16)).filter(|entry| entry[0] == 1).count())
    }

    /// Stops it (SIGSTOP) while it has many requests in flight; how many, and for how long it was stopped.
    fn stop_under_load(&self) -> (usize, Duration) {
        let (start, mut stopped) = (Instant::now(), Duration::ZERO);
        let stat = format!("/proc/{}/stat", self.child.id());
        loop {
            let stop = Instant::now();
            vub_client::sys::kill(self.child.id(), libc::SIGSTOP).unwrap();
            while !std::fs::read_to_string(&stat).unwrap().contains(") T ") {}
            let in_flight = self.in_flight();
            stopped += stop.elapsed();
            if in_flight.is_none_or(|n| n >= IN_FLIGHT) {
                return (in_flight.unwrap_or(0), stopped);
            }
            vub_client::sys::kill(self.child.id(), libc::SIGCONT).unwrap();
            assert!(start.elapsed() < LIMIT, "the guest is idle");
            std::thread::sleep(Duration::from_micros(500));
        }
    }

    /// As [`Server::replace`] under load, and the guest's next write.
    fn kill(&mut self) -> Outage {
        let (in_flight, stopped) = self.stop_under_load();
        let start = Instant::now();
        let (gone, refused) = self.replace();
        let listens = start.elapsed();
        // Nobody else can write now.
        self.wait_for_a_write();
        Outage { in_flight, stopped, gone, listens, writes: start.elapsed(), refused }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended; then there is nobody to kill.
        self.child.kill().unwrap_or_default();
        self.child.wait().unwrap();
    }
}

/// Kills until `lines` say that fio is done, or as often as wanted.
fn kill(server: &mut Server, lines: &Receiver<String>, kills: u64) -> Vec<Outage> {
    while !lines.recv_timeout(LIMIT * 3).expect("fio starts").contains("-- write") {}
    let mut random = Random(variable("VUB_SEED", 1));
    let mut outages = Vec::new();
    for _ in 0..kills {
        std::thread::sleep(Duration::from_millis(WORK_MS + random.below(WORK_MS / 2)));
        outages.push(server.kill());
    }
    outages
}

/// Prints each time in milliseconds, the longest and the median.
fn report(what: &str, outages: &[Outage]) {
    println!(
        "{what}: in flight; ms stopped before SIGKILL; ms from then until gone, listening, writing; successors refused"
    );
    for o in outages {
        let [stopped, gone, listens, writes] =
            [o.stopped, o.gone, o.listens, o.writes].map(|t| t.as_millis());
        let (in_flight, refused) = (o.in_flight, o.refused);
        println!(
            "  {in_flight:>3}; {stopped:>5}; {gone:>5} {listens:>5} {writes:>5}; {refused:>2}"
        );
    }
    let mut times: Vec<_> = outages.iter().map(|o| o.writes.as_millis()).collect();
    times.sort_unstable();
    println!("  longest {} ms, median {} ms", times[times.len() - 1], times[times.len() / 2]);
}

/// fio in a guest on an image of this format, under kills.
fn survives(format: &str, dir: &Path) {
    let _alone = alone();
    succeed(dir, "qemu-img", &["create", "-q", "-f", format, "disk", "64M"]);
    let mut server = Server::start(&crate::program(), dir, format);
    let kills = variable("VUB_KILLS", 3);
    // The three phases last as long as all kills and what the guest needs to come back, and longer.
    let seconds = kills * (WORK_MS + WORK_MS / 4 + 500) / 1000 + 3;
    let rate = format!("RATE={}", (3 * REQUESTS / seconds).max(1));
    let timeout = (seconds + 200).to_string();
    let (guest, output) = Guest::start(
        &server.socket,
        "fio-pulse.sh",
        &["--vcpus", "2", "--reconnect-ms", "100", "--env", &rate, "--timeout", &timeout],
    );
    let (sender, lines) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        for line in output.lines() {
            let line = line.unwrap();
            text += &format!("{line}\n");
            // Nobody listens any more after the kills.
            let _ = sender.send(line);
        }
        text
    });
    let outages = kill(&mut server, &lines, kills);
    let ended = lines.try_iter().any(|line| line.contains("-- the end"));
    let text = reader.join().unwrap();
    assert!(guest.succeeded(), "{format}: the guest failed:\n{text}");
    assert!(!ended, "{format}: fio was done before the last kill:\n{text}");
    report(format, &outages);
    let longest = text.lines().find(|line| line.starts_with("longest write")).expect("fio says it");
    println!("  in the guest: {longest}");
    server.terminate();
    let slowest = outages.iter().map(|o| o.writes).max().unwrap();
    assert!(slowest < BAR, "{format}: a guest stood still for {slowest:?}");
}

#[test]
fn fio_in_a_guest_sees_no_kill_on_a_raw_image() {
    let dir = directory();
    survives("raw", dir.path());
}

#[test]
fn fio_in_a_guest_sees_no_kill_on_a_qcow2_image() {
    let dir = directory();
    survives("qcow2", dir.path());
}
