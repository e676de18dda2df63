//! How long to wait before something that ended is started again.

use std::time::{Duration, Instant};

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(5);
/// Who ran this long has not failed at once: its next pause is short again.
const SETTLED: Duration = Duration::from_secs(10);

/// Doubles the pause with every quick failure, up to five seconds.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    failures: u32,
    since: Option<Instant>,
}

impl Backoff {
    pub fn started(&mut self, now: Instant) {
        self.since = Some(now);
    }

    /// The pause before the next start.
    pub fn failed(&mut self, now: Instant) -> Duration {
        if self.since.take().is_some_and(|s| now.saturating_duration_since(s) >= SETTLED) {
            self.failures = 0;
        }
        let pause = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures += 1;
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_a_long_run_forgives() {
        let mut backoff = Backoff::default();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..7 {
            backoff.started(now);
            pauses.push(backoff.failed(now).as_millis());
        }
        assert_eq!(pauses, [200, 400, 800, 1600, 3200, 5000, 5000]);
        backoff.started(now);
        now += SETTLED;
        assert_eq!(backoff.failed(now), FIRST);
    }
}
