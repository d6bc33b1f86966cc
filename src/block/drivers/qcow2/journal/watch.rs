//! For the simulation, whose disks have no inode and whose processes die at moments of the past.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

/// What a journal is at a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// The first record that counts, and the end.
    pub head: u64,
    /// One past the last.
    pub tail: u64,
    /// Its records are on disk.
    pub applied: bool,
    /// It was started anew just now.
    pub started: bool,
}

/// Told of each change of a journal.
pub type Watcher = Rc<dyn Fn(State)>;

thread_local! {
    static WATCHER: RefCell<Option<(PathBuf, Watcher)>> = const { RefCell::new(None) };
}

/// On this thread: journals of images without a file name belong to the file `image`; `watcher` hears of their changes.
pub fn set(watched: Option<(PathBuf, Watcher)>) {
    WATCHER.set(watched);
}

/// The file that stands for an image.
pub fn image() -> Option<PathBuf> {
    WATCHER.with_borrow(|watched| watched.as_ref().map(|(image, _)| image.clone()))
}

/// Whether somebody will want to know what records there were at a moment of the past: then none is overwritten.
pub(super) fn is_on() -> bool {
    WATCHER.with_borrow(Option::is_some)
}

pub(super) fn changed(journal: &super::Journal, started: bool) {
    let watcher = WATCHER.with_borrow(|w| w.as_ref().map(|(_, watcher)| Rc::clone(watcher)));
    let [head, tail] = [super::HEAD, super::TAIL].map(|at| journal.word(at));
    let applied = journal.word(super::APPLIED) == 1;
    if let Some(watcher) = watcher {
        watcher(State { head, tail, applied, started });
    }
}

/// Makes the journal at `path` what it was in this state.
///
/// # Errors
/// What the kernel says.
pub fn rewind(path: &std::path::Path, state: State) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    let fields = [
        (super::HEAD, state.head),
        (super::TAIL, state.tail),
        (super::APPLIED, u64::from(state.applied)),
    ];
    fields.iter().try_for_each(|(at, v)| file.write_all_at(&v.to_ne_bytes(), *at as u64 * 8))
}
