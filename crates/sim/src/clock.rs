//! A server's clock: virtual time, seen through a wall clock that is off and may jump.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use nexus_env::Clock;
use tokio::time::Instant;

/// 2025-01-01, in milliseconds since the Unix epoch.
pub const BASE_MS: i64 = 1_735_689_600_000;

#[derive(Debug)]
pub struct SimClock {
    start: Instant,
    offset_ms: AtomicI64,
}

impl SimClock {
    /// A clock that is off by so much from the beginning.
    pub fn new(offset_ms: i64) -> Self {
        Self { start: Instant::now(), offset_ms: AtomicI64::new(offset_ms) }
    }

    /// Someone sets the clock, forwards or back.
    pub fn jump(&self, by_ms: i64) {
        self.offset_ms.fetch_add(by_ms, Ordering::SeqCst);
    }
}

impl Clock for SimClock {
    fn now_millis(&self) -> i64 {
        let passed = i64::try_from(self.start.elapsed().as_millis()).unwrap_or(i64::MAX);
        BASE_MS + passed + self.offset_ms.load(Ordering::SeqCst)
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}
