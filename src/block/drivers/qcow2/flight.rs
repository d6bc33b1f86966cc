//! One at a time per key: whoever needs a thing that somebody else is fetching waits for that instead of fetching it
//! again.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::poll_fn;
use std::sync::{Mutex, PoisonError};
use std::task::{Poll, Waker};

/// What is being fetched now, and who waits for it.
#[derive(Default)]
pub struct Flights {
    under_way: Mutex<HashMap<u64, Vec<Waker>>>,
}

/// What [`Flights::turn`] answers.
pub enum Turn<'a, T> {
    /// It is there.
    Found(T),
    /// The caller shall fetch it, put it where `look` finds it, and drop the flight.
    Mine(Flight<'a>),
}

/// The right to fetch; others wait until it is dropped, with or without success.
pub struct Flight<'a> {
    flights: &'a Flights,
    key: u64,
}

impl Flights {
    /// Waits until `look` finds the thing of `key` or nobody else is fetching it. A fetch that failed wakes the next.
    pub async fn turn<T>(&self, key: u64, mut look: impl FnMut() -> Option<T>) -> Turn<'_, T> {
        poll_fn(|cx| {
            let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            // Under the lock: a flight that has just ended has left the thing behind.
            if let Some(found) = look() {
                return Poll::Ready(Turn::Found(found));
            }
            match under_way.get_mut(&key) {
                Some(wakers) => {
                    if !wakers.iter().any(|w| w.will_wake(cx.waker())) {
                        wakers.push(cx.waker().clone());
                    }
                    Poll::Pending
                }
                None => {
                    under_way.insert(key, Vec::new());
                    Poll::Ready(Turn::Mine(Flight { flights: self, key }))
                }
            }
        })
        .await
    }
}

impl Flights {
    /// Waits until nobody else has `key`: a turn without anything to be found.
    pub async fn alone(&self, key: u64) -> Flight<'_> {
        match self.turn(key, || None::<Infallible>).await {
            Turn::Mine(flight) => flight,
            Turn::Found(never) => match never {},
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        let mut under_way = self.flights.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let wakers = under_way.remove(&self.key).unwrap_or_default();
        drop(under_way);
        wakers.into_iter().for_each(Waker::wake);
    }
}
