//! What outlives a simulated process beside its disks: a directory for journals, and what they were at each moment.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::fs;
use std::path::PathBuf;
use std::rc::{Rc, Weak};
use std::sync::atomic::{AtomicU64, Ordering};

use super::Sim;
use super::history::Time;
use crate::block::drivers::qcow2::journal::watch::{self, State};

/// The directory, with at most one journal in it.
pub struct Memory {
    dir: PathBuf,
    states: Rc<RefCell<Vec<(Time, State)>>>,
}

/// The journal's bytes, without the zeroes at its end, its length, and what it was at each moment. No bytes: there was none.
#[derive(Clone, Default)]
pub struct Kept {
    bytes: Option<(PathBuf, Vec<u8>, u64)>,
    states: Vec<(Time, State)>,
}

impl Memory {
    /// An empty one, of which images without a file name make use on this thread until it is dropped.
    ///
    /// # Panics
    /// If there is no room for a directory.
    pub fn new() -> Memory {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let shared = PathBuf::from("/dev/shm");
        let parent = if shared.is_dir() { shared } else { std::env::temp_dir() };
        let dir = parent.join(format!("vub-sim-{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory can be made");
        fs::write(dir.join("image"), []).expect("a file can be made");
        Memory { dir, states: Rc::default() }
    }

    /// Where journals are.
    pub fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    /// Notes what becomes of the journal from now on, by the time of `sim`.
    pub fn watch(&self, sim: &Rc<Sim>) {
        self.states.borrow_mut().clear();
        let (states, sim): (_, Weak<Sim>) = (Rc::clone(&self.states), Rc::downgrade(sim));
        let note = move |state| {
            let time = sim.upgrade().map_or(Time::MAX, |sim| sim.tick());
            states.borrow_mut().push((time, state));
        };
        watch::set(Some((self.dir.join("image"), Rc::new(note))));
    }

    /// The journal as it is; its records are those of the whole time since [`Memory::watch`], if it was never full.
    pub fn keep(&self) -> Kept {
        let bytes = self.journal().map(|path| {
            let mut bytes = fs::read(&path).expect("it was listed");
            let len = bytes.len() as u64;
            // Most of it is a hole.
            let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
            bytes.truncate(used);
            (path, bytes, len)
        });
        Kept { bytes, states: Vec::new() }
    }

    /// As [`Memory::keep`] did, with all that happened until now.
    pub fn complete(&self, kept: Kept) -> Kept {
        Kept { states: self.states.borrow().clone(), ..kept }
    }

    /// The journal is what it was at `time`; or gone.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn restore(&self, kept: Option<(&Kept, Time)>) {
        if let Some(path) = self.journal() {
            fs::remove_file(path).expect("it was listed");
        }
        let Some((Kept { bytes: Some((path, bytes, len)), states }, time)) = kept else { return };
        let state = states.iter().take_while(|(at, _)| *at <= time).last();
        fs::write(path, bytes).expect("there is room");
        let file = fs::OpenOptions::new().write(true).open(path);
        file.and_then(|file| file.set_len(*len)).expect("it can be written");
        watch::rewind(path, state.map_or(State::default(), |(_, state)| *state))
            .expect("it can be written");
    }

    /// What the journal was at `time`, which is after the last state that `before` knows.
    pub fn later(&self, before: &Kept, killed: Time, time: Time) -> (Kept, Time) {
        let started = |(at, state): &(Time, State)| *at <= time && state.started;
        if self.states.borrow().iter().any(started) {
            return (self.complete(self.keep()), time);
        }
        let mut kept = before.clone();
        let mut then = kept.states.iter().take_while(|(at, _)| *at <= killed).last().copied();
        let applied = self.states.borrow().iter().any(|(at, s)| *at <= time && s.applied);
        if let Some((at, state)) = &mut then {
            (*at, state.applied) = (0, state.applied || applied);
        }
        kept.states = then.into_iter().collect();
        (kept, time)
    }

    fn journal(&self) -> Option<PathBuf> {
        let names = fs::read_dir(&self.dir).expect("it is there");
        let mut paths = names.filter_map(|entry| Some(entry.ok()?.path()));
        paths.find(|path| path.extension().is_some_and(|e| e == "journal"))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        watch::set(None);
        // A directory that is left over harms nobody.
        let _ = fs::remove_dir_all(&self.dir);
    }
}
