//! What a guest may see: for every sector the set of legal contents, from what the guest did and when.
//!
//! Every write has a [`Tag`] of its own, and every sector that it writes says so in all of its bytes ([`fill`]): a sector
//! that is read back names the write that it comes from ([`tag_of`]), or is visibly a mixture.
//!
//! The rules. Operation `a` is *before* `b` if `a` completed before `b` was issued; else they overlap and may take effect in
//! either order. An operation is *overwritten* if a definite one is after it.
//! * A read may see any operation issued before the read completed, unless it was overwritten by one that completed before
//!   the read was issued. Without such a one: the initial content, too.
//! * After a crash of the process: what a read at that moment could have seen.
//! * After a power cut the same, but only *stable* operations overwrite: completed before the issue of a flush that
//!   completed before the cut, or written with FUA.
//! * An operation that failed may have happened, in part or not at all; it overwrites nothing. So may a discard.
//! * A flush that failed promises nothing, and no later flush makes up for it.

use std::collections::HashMap;
use std::fmt;
use std::sync::OnceLock;

use super::Rng;
use super::history::{Crash, Time};
use super::rng::mix;
use crate::block::node::SECTOR;

/// A tag is the number of a life above this bit, and that of an operation (from 1) below.
const LIFE_SHIFT: u32 = 32;

const SECTOR_BYTES: usize = SECTOR as usize;

/// What a sector holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u64);

impl Tag {
    /// Zeroes.
    pub const ZERO: Tag = Tag(0);

    /// The content number `n` of what was there before the guest came: a backing file, an older life.
    pub const fn before(n: u64) -> Tag {
        Tag(n | 1 << 63)
    }
}

/// Bytes without a period, of which each content takes a piece that depends on tag and sector: compared and copied at the
/// speed of memory, also in a debug build.
fn noise(tag: Tag, sector: u64) -> &'static [u8] {
    static NOISE: OnceLock<Vec<u8>> = OnceLock::new();
    let noise = NOISE.get_or_init(|| {
        let mut rng = Rng::new(0x0155);
        (0..2 * NOISE_PERIOD / 8).flat_map(|_| rng.next_u64().to_le_bytes()).collect()
    });
    let at = usize::try_from(mix(tag.0 ^ mix(sector)) % NOISE_PERIOD).expect("a small number");
    &noise[at..at + SECTOR_BYTES - HEAD]
}

/// Tag and sector at the start of each sector, in bytes.
const HEAD: usize = 16;
/// Pieces of noise start below this.
const NOISE_PERIOD: u64 = 4096;

/// Fills `bytes` (whole sectors, from `sector` on) with the content `tag`.
pub fn fill(tag: Tag, sector: u64, bytes: &mut [u8]) {
    if tag == Tag::ZERO {
        return bytes.fill(0);
    }
    for (sector, bytes) in (sector..).zip(bytes.chunks_mut(SECTOR_BYTES)) {
        bytes[..8].copy_from_slice(&tag.0.to_le_bytes());
        bytes[8..HEAD].copy_from_slice(&sector.to_le_bytes());
        bytes[HEAD..].copy_from_slice(noise(tag, sector));
    }
}

/// What the bytes of `sector` are.
///
/// # Errors
/// They are not of one piece: what they look like.
pub fn tag_of(sector: u64, bytes: &[u8]) -> Result<Tag, String> {
    let words = bytes.as_chunks::<8>().0;
    let read = |i: usize| words.get(i).map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let (tag, claimed) = (Tag(read(0)), read(1));
    let expected = match tag {
        Tag::ZERO => &[0; SECTOR_BYTES - HEAD],
        tag => noise(tag, claimed),
    };
    match bytes.get(HEAD..) {
        Some(rest) if rest == expected && (tag, claimed) == (Tag::ZERO, 0) => Ok(tag),
        Some(rest) if rest == expected && tag != Tag::ZERO && claimed == sector => Ok(tag),
        Some(rest) if rest == expected && tag != Tag::ZERO => {
            Err(format!("what belongs to sector {claimed} ({tag})"))
        }
        rest => {
            let same = rest.into_iter().flatten().zip(expected).take_while(|(a, b)| a == b);
            Err(format!("a mixture: {tag} of sector {claimed} up to byte {}", HEAD + same.count()))
        }
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("zeroes"),
            n if n >> 63 == 1 => write!(f, "initial content {}", n & !(1 << 63)),
            n => match (n >> LIFE_SHIFT, n & ((1 << LIFE_SHIFT) - 1)) {
                (0, n) => write!(f, "operation {n}"),
                (life, n) => write!(f, "operation {n} of life {life}"),
            },
        }
    }
}

/// What an operation of the guest does to its sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Each of them holds the operation's tag.
    Write,
    /// They are zero.
    Zeroes,
    /// They are zero, or stay what they are.
    Discard,
}

/// One operation of the guest.
#[derive(Clone, Debug)]
struct Operation {
    change: Change,
    fua: bool,
    sectors: std::ops::Range<u64>,
    issued: Time,
    /// `Time::MAX`: not yet.
    ended: Time,
    failed: bool,
}

impl Operation {
    fn tag(&self, number: usize, life: u64) -> Tag {
        let tag = Tag(life << LIFE_SHIFT | (number as u64 + 1));
        if self.change == Change::Write { tag } else { Tag::ZERO }
    }
}

#[derive(Clone, Copy, Debug)]
struct Flush {
    issued: Time,
    ended: Time,
    failed: bool,
}

/// A content that no rule allows.
#[derive(Clone, Debug)]
pub struct Violation(pub String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What the content before the first operation is, by sector.
pub type Initial = Box<dyn Fn(u64) -> Tag>;

/// The guest's disk.
pub struct Model {
    initial: Initial,
    life: u64,
    operations: Vec<Operation>,
    by_sector: HashMap<u64, Vec<usize>>,
    flushes: Vec<Flush>,
}

/// What is legal at one moment; made by [`Model::after`].
pub struct Expectation<'a> {
    model: &'a Model,
    /// Operations issued later are not known.
    until: Time,
    /// Operations that did not end before overwrite nothing.
    settled: Time,
    /// After a power cut: which operations are stable.
    stable: Option<Vec<bool>>,
}

impl Model {
    /// A disk with the content `initial`, in its `life`th life: no two lives have a tag in common.
    pub fn new(initial: Initial, life: u64) -> Model {
        let (operations, by_sector, flushes) = Default::default();
        Model { initial, life, operations, by_sector, flushes }
    }

    /// The guest issues an operation on `sectors`. Answers its number and its tag.
    pub fn begin(
        &mut self,
        change: Change,
        sectors: std::ops::Range<u64>,
        fua: bool,
        now: Time,
    ) -> (usize, Tag) {
        let number = self.operations.len();
        for sector in sectors.clone() {
            self.by_sector.entry(sector).or_default().push(number);
        }
        let operation =
            Operation { change, fua, sectors, issued: now, ended: Time::MAX, failed: false };
        let tag = operation.tag(number, self.life);
        self.operations.push(operation);
        (number, tag)
    }

    /// Operation `number` is complete.
    pub fn end(&mut self, number: usize, ok: bool, now: Time) {
        let operation = &mut self.operations[number];
        (operation.ended, operation.failed) = (now, !ok);
    }

    /// The guest issues a flush. Answers its number.
    pub fn begin_flush(&mut self, now: Time) -> usize {
        self.flushes.push(Flush { issued: now, ended: Time::MAX, failed: false });
        self.flushes.len() - 1
    }

    /// Flush `number` is complete.
    pub fn end_flush(&mut self, number: usize, ok: bool, now: Time) {
        let flush = &mut self.flushes[number];
        (flush.ended, flush.failed) = (now, !ok);
    }

    /// The number of operations so far, flushes included.
    pub fn len(&self) -> usize {
        self.operations.len() + self.flushes.len()
    }

    /// Whether the guest has done nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks what a read from `sector` on has found, issued and completed at these times.
    ///
    /// # Errors
    /// The first sector with a content that is not legal.
    pub fn check_read(
        &self,
        sector: u64,
        bytes: &[u8],
        issued: Time,
        completed: Time,
    ) -> Result<(), Violation> {
        let seen = Expectation { model: self, until: completed, settled: issued, stable: None };
        seen.check(sector, bytes)
    }

    /// What is legal after a crash at time `at`.
    pub fn after(&self, crash: Crash, at: Time) -> Expectation<'_> {
        let settled = at + 1;
        let stable = (crash == Crash::Power)
            .then(|| self.operations.iter().map(|o| self.is_stable(o, settled)).collect());
        Expectation { model: self, until: at, settled, stable }
    }

    /// Whether a flush that completed before `settled`, or FUA, has made `o` stable.
    fn is_stable(&self, o: &Operation, settled: Time) -> bool {
        let promised = |f: &Flush| !f.failed && f.ended < settled && o.ended < f.issued;
        // A flush that failed earlier has lost the data, and later ones do not know.
        let lost = |f: &Flush| {
            let between = |g: &Flush| g.failed && g.ended > o.issued && g.issued < f.ended;
            self.flushes.iter().any(between)
        };
        o.fua || self.flushes.iter().any(|f| promised(f) && !lost(f))
    }

    fn on(&self, sector: u64) -> &[usize] {
        self.by_sector.get(&sector).map_or(&[], Vec::as_slice)
    }

    /// What happened to `sector`, for people.
    fn story(&self, sector: u64) -> String {
        let mut lines = vec!["its operations (issued..ended):".to_owned()];
        for n in self.on(sector) {
            let Operation { change, fua, issued, ended, failed, sectors } = &self.operations[*n];
            let ended = if *ended == Time::MAX { "-".to_owned() } else { ended.to_string() };
            let fua = if *fua { " fua" } else { "" };
            let failed = if *failed { " failed" } else { "" };
            lines.push(format!(
                "  {}: {change:?}{fua} {}+{} at {issued}..{ended}{failed}",
                n + 1,
                sectors.start,
                sectors.end - sectors.start
            ));
        }
        let flushes = self.flushes.iter().map(|f| {
            let ended = if f.ended == Time::MAX { "-".to_owned() } else { f.ended.to_string() };
            format!("{}..{ended}{}", f.issued, if f.failed { " failed" } else { "" })
        });
        lines.push(format!("  flushes: {}", flushes.collect::<Vec<_>>().join(", ")));
        lines.join("\n")
    }

    /// The ranges of sectors that were touched, widened to multiples of `around` sectors, in order, below `end`.
    pub fn touched(&self, around: u64, end: u64) -> Vec<std::ops::Range<u64>> {
        let mut blocks: Vec<u64> = self
            .operations
            .iter()
            .flat_map(|o| o.sectors.start / around..o.sectors.end.div_ceil(around))
            .collect();
        blocks.sort_unstable();
        blocks.dedup();
        let mut ranges: Vec<std::ops::Range<u64>> = Vec::new();
        for block in blocks {
            let (start, stop) = (block * around, ((block + 1) * around).min(end));
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = stop,
                _ => ranges.push(start..stop),
            }
        }
        ranges
    }
}

impl Expectation<'_> {
    /// Checks what is found from `first` on.
    ///
    /// # Errors
    /// The first sector with a content that is not legal.
    pub fn check(&self, first: u64, bytes: &[u8]) -> Result<(), Violation> {
        for (sector, bytes) in (first..).zip(bytes.chunks(SECTOR_BYTES)) {
            let found = tag_of(sector, bytes);
            if found.as_ref().is_ok_and(|tag| self.candidates(sector).any(|legal| legal == *tag)) {
                continue;
            }
            let found = found.map_or_else(|mixture| mixture, |tag| tag.to_string());
            let legal: Vec<String> = self.candidates(sector).map(|t| t.to_string()).collect();
            return Err(Violation(format!(
                "sector {sector} holds {found}; legal: {}; {}",
                legal.join(", "),
                self.model.story(sector)
            )));
        }
        Ok(())
    }

    /// Whether operation `n` is sure to have taken effect by then, for good.
    fn overwrites(&self, n: usize) -> bool {
        let o = &self.model.operations[n];
        let definite = !o.failed && o.change != Change::Discard && o.ended < self.settled;
        definite && self.stable.as_ref().is_none_or(|stable| stable[n])
    }

    fn candidates(&self, sector: u64) -> impl Iterator<Item = Tag> {
        let on = self.model.on(sector);
        let operation = |n: &usize| &self.model.operations[*n];
        // The latest moment at which something that overwrites was issued.
        let horizon = on.iter().filter(|n| self.overwrites(**n)).map(|n| operation(n).issued).max();
        let initial = horizon.is_none().then(|| (self.model.initial)(sector));
        let written = on.iter().filter(move |n| {
            let o = operation(n);
            o.issued <= self.until && horizon.is_none_or(|h| o.ended > h)
        });
        initial.into_iter().chain(written.map(move |n| operation(n).tag(*n, self.model.life)))
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
