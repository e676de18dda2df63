//! What happened: every event in order, hashed (so that two runs of a seed can be compared), counted, and printed when a
//! seed is replayed. Broken properties are collected here too.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// More of them would say nothing new.
const MAX_VIOLATIONS: usize = 20;

struct State {
    hash: u64,
    order: u64,
    counters: BTreeMap<String, u64>,
    violations: Vec<Violation>,
}

/// A property that did not hold.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Violation {
    pub property: String,
    pub detail: String,
}

struct Inner {
    start: Instant,
    verbose: bool,
    state: Mutex<State>,
}

/// Clones share one trace.
#[derive(Clone)]
pub struct Trace(Arc<Inner>);

impl Trace {
    pub fn new(verbose: bool) -> Self {
        let state = State { hash: 0xcbf2_9ce4_8422_2325, order: 0, counters: BTreeMap::new(), violations: Vec::new() };
        Self(Arc::new(Inner { start: Instant::now(), verbose, state: Mutex::new(state) }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Virtual time since the start.
    pub fn now(&self) -> Duration {
        self.0.start.elapsed()
    }

    /// Takes an event into the hash, and prints it when replaying.
    pub fn note(&self, event: impl Display) {
        let at = self.now();
        let text = format!("{:>9.4} {event}", at.as_secs_f64());
        if self.0.verbose {
            println!("{text}");
        }
        let mut state = self.state();
        // FNV-1a, eight bytes at a time.
        for chunk in text.as_bytes().chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            state.hash = (state.hash ^ u64::from_le_bytes(word)).wrapping_mul(0x100_0000_01b3).rotate_left(29);
        }
    }

    /// A number that grows with every call: what comes before what.
    pub fn order(&self) -> u64 {
        let mut state = self.state();
        state.order += 1;
        state.order
    }

    pub fn count(&self, what: &str) {
        self.add(what, 1);
    }

    pub fn add(&self, what: &str, n: u64) {
        let mut state = self.state();
        match state.counters.get_mut(what) {
            Some(count) => *count += n,
            None => drop(state.counters.insert(what.to_owned(), n)),
        }
    }

    /// A fault happened at a step.
    pub fn fault(&self, what: &str, on: impl Display) {
        self.count(&format!("fault: {what}"));
        self.note(format_args!("fault: {what}: {on}"));
    }

    /// A property does not hold.
    pub fn violation(&self, property: &str, detail: impl Display) {
        self.note(format_args!("VIOLATION of {property}: {detail}"));
        let mut state = self.state();
        if state.violations.len() < MAX_VIOLATIONS {
            state.violations.push(Violation { property: property.to_owned(), detail: detail.to_string() });
        }
    }

    pub fn hash(&self) -> u64 {
        self.state().hash
    }

    pub fn counters(&self) -> BTreeMap<String, u64> {
        self.state().counters.clone()
    }

    pub fn violations(&self) -> Vec<Violation> {
        self.state().violations.clone()
    }
}
