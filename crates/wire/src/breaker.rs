//! Circuit breakers: a peer that takes calls of a method and does not answer them is left alone for a while.
//!
//! A peer that can't be reached needs no breaker: its connection backs off. Nor do members of one store's group: a link
//! whose call is late is avoided there from then on, until a ping comes through (`store`, `embedded/reach.rs`). What hurts
//! is one that accepts calls and sits on them (a full disk, a lock, a machine that swaps): each call costs its caller
//! the whole deadline, and the peer more work. After [`TRIP_AFTER`] calls of one method in a row ran into their
//! deadlines, further ones fail at once but for one probe per [`PROBE_EVERY`]; the first call that is answered, with
//! whatever answer, closes the circuit.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Calls in a row that must have gone unanswered.
const TRIP_AFTER: u32 = 5;
const PROBE_EVERY: Duration = Duration::from_secs(1);
/// A caller that is refused waits so long first, so that a loop around a call does not spin.
pub(crate) const PAUSE: Duration = Duration::from_millis(100);
/// Methods with unanswered calls that are kept apart; there are fewer than twenty methods.
const MANY: usize = 64;

#[derive(Debug, Default)]
struct Circuit {
    unanswered: u32,
    /// When the next probe may go, once the circuit is open.
    probe: Option<Instant>,
}

/// The breakers of one peer, by method. Only methods in trouble take space.
#[derive(Debug, Default)]
pub(crate) struct Breakers(Mutex<BTreeMap<String, Circuit>>);

impl Breakers {
    /// Whether a call may go out now. `false` must be answered by failing, after [`PAUSE`].
    pub fn admits(&self, method: &str, now: Instant) -> bool {
        let mut circuits = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match circuits.get_mut(method).and_then(|c| c.probe.as_mut()) {
            Some(probe) if now < *probe => false,
            Some(probe) => {
                *probe = now + PROBE_EVERY;
                true
            }
            None => true,
        }
    }

    /// The peer answered something, even a refusal. True if that closed an open circuit.
    pub fn answered(&self, method: &str) -> bool {
        let mut circuits = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        circuits.remove(method).is_some_and(|c| c.probe.is_some())
    }

    /// A call ran into its deadline. True if that opened the circuit.
    pub fn unanswered(&self, method: &str, now: Instant) -> bool {
        let mut circuits = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if circuits.len() >= MANY && !circuits.contains_key(method) {
            return false;
        }
        let circuit = circuits.entry(method.to_owned()).or_default();
        circuit.unanswered = circuit.unanswered.saturating_add(1);
        let opens = circuit.probe.is_none() && circuit.unanswered >= TRIP_AFTER;
        if opens {
            circuit.probe = Some(now + PROBE_EVERY);
        }
        opens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_circuit_opens_after_unanswered_calls_and_closes_with_an_answer() {
        let breakers = Breakers::default();
        let now = Instant::now();
        for _ in 1..TRIP_AFTER {
            assert!(breakers.admits("plan", now));
            assert!(!breakers.unanswered("plan", now));
        }
        assert!(breakers.unanswered("plan", now), "the last straw");
        assert!(!breakers.admits("plan", now));
        assert!(breakers.admits("report", now), "other methods are not concerned");
        let later = now + PROBE_EVERY;
        assert!(breakers.admits("plan", later), "one probe");
        assert!(!breakers.admits("plan", later), "and no second one");
        assert!(!breakers.unanswered("plan", later), "it was open already");
        assert!(breakers.answered("plan"));
        assert!(breakers.admits("plan", later));
    }

    #[test]
    fn answers_between_keep_it_closed() {
        let breakers = Breakers::default();
        let now = Instant::now();
        for _ in 0..10 {
            for _ in 1..TRIP_AFTER {
                assert!(!breakers.unanswered("plan", now));
            }
            assert!(!breakers.answered("plan"), "it was not open");
        }
        assert!(breakers.admits("plan", now));
    }
}
