//! Messages to a thread that may be polling, working or asleep.
//!
//! The owner looks at one flag per loop turn. It sleeps in three steps - announce, look again, block - and a sender
//! posts in two - publish, look whether the owner announced. Both sides store, fence, then load, so at least one of
//! them sees the other: no message waits for a sleeper (checked with loom below, by contrib/loom). Fences, because loom
//! takes a sequentially consistent access for an acquire-release one.

use std::any::Any;

#[cfg(not(loom))]
use std::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering, fence},
};

#[cfg(loom)]
use loom::sync::{
    Mutex,
    atomic::{AtomicBool, Ordering, fence},
};

/// What can be sent to a thread's runtime.
pub enum Mail {
    /// A request that another thread carried out is done, with the kernel's result.
    Done {
        /// The token it was submitted with.
        token: u64,
        /// Bytes, or a negative error number.
        result: i32,
    },
    /// A task's waker was called on another thread.
    Wake {
        /// The task's slot.
        key: usize,
        /// Which task in that slot.
        generation: u64,
    },
    /// Something for the thread's own program.
    Command(Box<dyn Any + Send>),
}

/// A way to interrupt a blocked owner.
pub trait Bell: Send + Sync {
    /// Wakes the owner if it is blocked, or makes its next wait return at once.
    fn ring(&self);
}

/// The inbox of one thread.
pub struct Mailbox<B: Bell> {
    mails: Mutex<Vec<Mail>>,
    pending: AtomicBool,
    sleeping: AtomicBool,
    bell: B,
}

impl<B: Bell> Mailbox<B> {
    /// An empty mailbox whose owner is woken by `bell`.
    pub fn new(bell: B) -> Self {
        Mailbox {
            mails: Mutex::new(Vec::new()),
            pending: AtomicBool::new(false),
            sleeping: AtomicBool::new(false),
            bell,
        }
    }

    /// The owner's bell.
    pub fn bell(&self) -> &B {
        &self.bell
    }

    /// Sends `mail`; wakes the owner if it sleeps. Any thread.
    pub fn post(&self, mail: Mail) {
        {
            let mut mails = self.mails.lock().expect("no holder panics");
            mails.push(mail);
            // Under the lock: stored after it, the flag could stand for mail that was taken long ago.
            self.pending.store(true, Ordering::Release);
        }
        fence(Ordering::SeqCst);
        // The first of several senders rings; the others find the announcement gone.
        if self.sleeping.load(Ordering::Relaxed) && self.sleeping.swap(false, Ordering::AcqRel) {
            self.bell.ring();
        }
    }

    /// Whether there is mail: one load. Owner only.
    #[inline]
    pub fn has_mail(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// Moves all mail to the end of `to`. Owner only.
    pub fn take(&self, to: &mut Vec<Mail>) {
        let mut mails = self.mails.lock().expect("no holder panics");
        self.pending.store(false, Ordering::Relaxed);
        to.append(&mut mails);
    }

    /// Announces that the owner is about to block. `false`: there is mail, do not. Owner only.
    pub fn announce_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.has_mail() {
            self.woke();
            return false;
        }
        true
    }

    /// The owner is awake again. Owner only.
    pub fn woke(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct Count(AtomicU32);
    impl Bell for Count {
        fn ring(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn rings_once_and_only_for_a_sleeper() {
        let m = Mailbox::new(Count(AtomicU32::new(0)));
        let mail = || Mail::Done { token: 1, result: 2 };
        m.post(mail());
        assert_eq!(m.bell().0.load(Ordering::SeqCst), 0);
        assert!(!m.announce_sleep());
        let mut got = Vec::new();
        m.take(&mut got);
        assert_eq!(got.len(), 1);
        assert!(m.announce_sleep());
        m.post(mail());
        m.post(mail());
        assert_eq!(m.bell().0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn mail_from_threads_arrives() {
        let m = Arc::new(Mailbox::new(Count(AtomicU32::new(0))));
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let m = Arc::clone(&m);
                std::thread::spawn(move || {
                    for _ in 0..1000 {
                        m.post(Mail::Done { token: 0, result: 0 });
                    }
                })
            })
            .collect();
        let mut got = Vec::new();
        while got.len() < 4000 {
            m.take(&mut got);
        }
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert!(!m.has_mail());
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Arc;

    use super::*;

    struct Flag(AtomicBool);
    impl Bell for Flag {
        fn ring(&self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    /// If the owner decided to block, either nobody posted or the bell was rung.
    #[test]
    fn no_mail_is_slept_over() {
        loom::model(|| {
            let m = Arc::new(Mailbox::new(Flag(AtomicBool::new(false))));
            let senders: Vec<_> = (0..2)
                .map(|_| {
                    let m = Arc::clone(&m);
                    loom::thread::spawn(move || m.post(Mail::Done { token: 0, result: 0 }))
                })
                .collect();
            let blocks = m.announce_sleep();
            senders.into_iter().for_each(|t| t.join().unwrap());
            if blocks {
                assert!(m.bell().0.load(Ordering::SeqCst), "asleep with mail and no bell");
            }
            let mut got = Vec::new();
            m.take(&mut got);
            assert_eq!(got.len(), 2);
        });
    }
}
