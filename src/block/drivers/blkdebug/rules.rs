//! The rules: which event makes which requests fail, and how the state goes on.
//!
//! An event looks at all of its rules. Those that inject errors and fit the state become *active*, in place of those that
//! were active before; a `set-state` rule that fits changes the state, after the others have looked at it. A request then
//! fails by the first active rule that covers it. Rules of the event `none` are active from the start.
#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::block::Event;
use crate::error::Errno;

/// The state at the start; 0 in a rule stands for any.
const FIRST_STATE: i64 = 1;

bitflags::bitflags! {
    /// Kinds of requests (QEMU's `BlkdebugIOType`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IoType: u8 {
        const READ = 1;
        const WRITE = 2;
        const WRITE_ZEROES = 4;
        const DISCARD = 8;
        const FLUSH = 16;
        /// Nobody asks for it here.
        const BLOCK_STATUS = 32;
    }
}

impl IoType {
    /// The names, in QEMU's order.
    pub const NAMES: &'static [&'static str] =
        &["read", "write", "write-zeroes", "discard", "flush", "block-status"];

    /// The kind called `name`.
    pub fn parse(name: &str) -> Option<IoType> {
        let at = Self::NAMES.iter().position(|n| *n == name)?;
        IoType::from_bits(1 << at)
    }
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Requests fail.
    Inject {
        /// Of these kinds.
        kinds: IoType,
        /// That have this byte; `None`: all.
        offset: Option<u64>,
        /// With this; 0 does no harm.
        errno: Errno,
        /// One request, then the rule is gone.
        once: bool,
        /// At once, else when others have had their turn.
        immediately: bool,
    },
    /// The state becomes this.
    SetState(i64),
}

/// One rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// When.
    pub event: Event,
    /// In which state; 0: in any.
    pub state: i64,
    /// What then.
    pub action: Action,
}

/// How a request fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    pub errno: Errno,
    pub immediately: bool,
}

struct Now {
    state: i64,
    rules: Vec<Rule>,
    /// The active ones.
    active: Vec<Rule>,
}

/// All rules of a node.
pub struct Rules(Mutex<Now>);

impl Rules {
    /// With the event `none` raised.
    pub fn new(rules: Vec<Rule>) -> Rules {
        let rules = Rules(Mutex::new(Now { state: FIRST_STATE, rules, active: Vec::new() }));
        rules.raise(Event::None);
        rules
    }

    fn lock(&self) -> MutexGuard<'_, Now> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An event.
    pub fn raise(&self, event: Event) {
        let mut now = self.lock();
        let state = now.state;
        let fits = |r: &&Rule| r.event == event && (r.state == 0 || r.state == state);
        let (sets, injects): (Vec<Rule>, Vec<Rule>) = now
            .rules
            .iter()
            .filter(fits)
            .partition(|rule| matches!(rule.action, Action::SetState(_)));
        if !injects.is_empty() {
            now.active = injects;
        }
        // QEMU goes through them backwards: the first has the last word.
        if let Some(Rule { action: Action::SetState(state), .. }) = sets.first() {
            now.state = *state;
        }
    }

    /// How a request of one kind fails, if it does. A flush has no bytes.
    pub fn check(&self, kind: IoType, at: u64, len: u64) -> Option<Fault> {
        let mut now = self.lock();
        let covers = |rule: &Rule| match rule.action {
            Action::Inject { kinds, offset, .. } => {
                kinds.contains(kind) && offset.is_none_or(|o| o >= at && o - at < len)
            }
            Action::SetState(_) => false,
        };
        let hit = now.active.iter().position(covers)?;
        let rule = now.active[hit];
        let Action::Inject { errno, once, immediately, .. } = rule.action else { return None };
        if once {
            now.active.remove(hit);
            if let Some(at) = now.rules.iter().position(|r| *r == rule) {
                now.rules.remove(at);
            }
        }
        (errno.0 != 0).then_some(Fault { errno, immediately })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inject(event: Event, state: i64, once: bool, errno: i32) -> Rule {
        let (errno, kinds) = (Errno(errno), IoType::READ | IoType::WRITE);
        let action = Action::Inject { kinds, offset: None, errno, once, immediately: false };
        Rule { event, state, action }
    }

    fn errno(rules: &Rules) -> Option<i32> {
        rules.check(IoType::READ, 0, 512).map(|fault| fault.errno.0)
    }

    #[test]
    fn states_lead_from_rule_to_rule() {
        let set = |event, state, new| Rule { event, state, action: Action::SetState(new) };
        let rules = Rules::new(vec![
            inject(Event::L2Load, 2, true, 5),
            set(Event::L2Load, 1, 2),
            set(Event::L2Load, 2, 7),
            inject(Event::ReadAio, 7, false, 28),
        ]);
        assert_eq!(errno(&rules), None);
        rules.raise(Event::ReadAio);
        rules.raise(Event::L2Load);
        assert_eq!(errno(&rules), None, "the rule is for state 2, which begins now");
        rules.raise(Event::L2Load);
        assert_eq!((errno(&rules), errno(&rules)), (Some(5), None), "once");
        rules.raise(Event::ReadAio);
        assert_eq!((errno(&rules), errno(&rules)), (Some(28), Some(28)), "for ever");
    }

    #[test]
    fn a_sector_and_a_kind() {
        let (errno, kinds) = (Errno::EIO, IoType::WRITE);
        let at = |offset| Rule {
            event: Event::None,
            state: 0,
            action: Action::Inject { kinds, offset, errno, once: false, immediately: true },
        };
        let rules = Rules::new(vec![at(Some(1024))]);
        let hits = |kind, at, len| rules.check(kind, at, len).is_some();
        assert!(hits(IoType::WRITE, 1024, 1) && hits(IoType::WRITE, 0, 1025));
        assert!(!hits(IoType::WRITE, 0, 1024) && !hits(IoType::WRITE, 1025, 512));
        assert!(!hits(IoType::READ, 1024, 1) && !hits(IoType::FLUSH, 0, 0));
        let harmless = Errno(0);
        let rules = Rules::new(vec![Rule {
            action: Action::Inject {
                kinds,
                offset: None,
                errno: harmless,
                once: true,
                immediately: true,
            },
            ..at(None)
        }]);
        assert!(rules.check(IoType::WRITE, 0, 1).is_none());
    }
}
