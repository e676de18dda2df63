//! What requests have taught about one instance: failures in a row eject it for a time that grows with each ejection.
//!
//! A failure to connect ejects at once, because nothing answers there; failures of fresh connections before an answer
//! eject after [`RESETS`] in a row. An ejection lasts at least its time and then until a probe gets through. An
//! instance that stays well for [`FORGIVEN`] begins anew with the shortest time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

const RESETS: u32 = 3;
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);
const FORGIVEN: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failure {
    /// No connection, or one that fell silent.
    Unreachable,
    /// A connection that was just made broke before an answer began.
    Reset,
}

#[derive(Default)]
struct State {
    failures: u32,
    /// Ejections without [`FORGIVEN`] between them.
    streak: u32,
    until: Option<Instant>,
    returned: Option<Instant>,
}

#[derive(Default)]
pub(crate) struct Health {
    /// Read on every choice.
    ejected: AtomicBool,
    /// Whether a success has anything to clear.
    troubled: AtomicBool,
    state: Mutex<State>,
}

impl Health {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Ordering::Relaxed)
    }

    pub fn succeeded(&self) {
        if self.troubled.swap(false, Ordering::Relaxed) {
            self.state().failures = 0;
        }
    }

    /// Counts a failure. The time of the ejection, if this ejects it; `spare` forbids that.
    pub fn failed(&self, failure: Failure, now: Instant, spare: bool) -> Option<Duration> {
        self.troubled.store(true, Ordering::Relaxed);
        let mut state = self.state();
        state.failures = state.failures.saturating_add(1);
        let enough = failure == Failure::Unreachable || state.failures >= RESETS;
        if !enough || spare || self.is_ejected() {
            return None;
        }
        if state.returned.is_some_and(|at| now.duration_since(at) >= FORGIVEN) {
            state.streak = 0;
        }
        let time = FIRST.saturating_mul(1 << state.streak.min(10)).min(LONGEST);
        state.streak += 1;
        state.until = Some(now + time);
        self.ejected.store(true, Ordering::Relaxed);
        Some(time)
    }

    /// Whether a probe may bring it back.
    pub fn wants_probe(&self, now: Instant) -> bool {
        self.is_ejected() && self.state().until.is_none_or(|until| until <= now)
    }

    /// Ends an ejection. False if there was none.
    pub fn restore(&self, now: Instant) -> bool {
        let mut state = self.state();
        state.failures = 0;
        state.returned = Some(now);
        self.ejected.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ejections_grow_and_are_forgiven() {
        let health = Health::default();
        let mut now = Instant::now();
        for expected in [1, 2, 4, 8, 16, 30, 30] {
            let time = health.failed(Failure::Unreachable, now, false).unwrap();
            assert_eq!(time, Duration::from_secs(expected));
            assert!(!health.wants_probe(now));
            now += time;
            assert!(health.wants_probe(now));
            assert!(health.restore(now));
        }
        now += FORGIVEN;
        assert_eq!(health.failed(Failure::Unreachable, now, false), Some(FIRST));
    }

    #[tokio::test]
    async fn only_resets_in_a_row_eject_and_never_one_that_is_spared() {
        let health = Health::default();
        let now = Instant::now();
        for _ in 0..5 {
            assert_eq!(health.failed(Failure::Reset, now, false), None);
            assert_eq!(health.failed(Failure::Reset, now, false), None);
            health.succeeded();
        }
        assert_eq!(health.failed(Failure::Unreachable, now, true), None);
        assert!(!health.is_ejected());
    }
}
