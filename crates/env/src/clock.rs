//! Time: the wall clock for what people read, a monotonic one for what is measured.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A source of time. Sleeping is `tokio::time`, not here.
pub trait Clock: Send + Sync {
    /// Wall time in milliseconds since the Unix epoch. May jump when an operator sets the clock.
    fn now_millis(&self) -> i64;
    /// Time since an arbitrary start; never goes back.
    fn monotonic(&self) -> Duration;
}

/// The machine's clock. The monotonic part is tokio's, so that a paused test runtime owns it too.
#[derive(Debug)]
pub struct RealClock {
    start: tokio::time::Instant,
}

impl RealClock {
    pub fn new() -> Self {
        Self { start: tokio::time::Instant::now() }
    }
}

impl Default for RealClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for RealClock {
    fn now_millis(&self) -> i64 {
        // A clock before 1970 is a broken machine; zero keeps every later comparison well defined.
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}

/// A clock that moves only when it is told to. The wall part can be skewed apart from the monotonic one.
#[derive(Debug, Default)]
pub struct ManualClock {
    wall_millis: AtomicI64,
    monotonic_nanos: AtomicU64,
}

impl ManualClock {
    /// A clock that shows `wall_millis` since the epoch.
    pub fn at(wall_millis: i64) -> Self {
        Self { wall_millis: AtomicI64::new(wall_millis), monotonic_nanos: AtomicU64::new(0) }
    }

    /// Lets time pass on both clocks.
    pub fn advance(&self, by: Duration) {
        self.wall_millis.fetch_add(by.as_millis() as i64, Ordering::SeqCst);
        self.monotonic_nanos.fetch_add(by.as_nanos() as u64, Ordering::SeqCst);
    }

    /// Sets the wall clock, forwards or back, as an operator or a bad NTP server would.
    pub fn set_wall(&self, wall_millis: i64) {
        self.wall_millis.store(wall_millis, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now_millis(&self) -> i64 {
        self.wall_millis.load(Ordering::SeqCst)
    }

    fn monotonic(&self) -> Duration {
        Duration::from_nanos(self.monotonic_nanos.load(Ordering::SeqCst))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = ManualClock::at(1_000);
        assert_eq!((clock.now_millis(), clock.monotonic()), (1_000, Duration::ZERO));
        clock.advance(Duration::from_millis(5));
        assert_eq!((clock.now_millis(), clock.monotonic()), (1_005, Duration::from_millis(5)));
        clock.set_wall(10);
        assert_eq!((clock.now_millis(), clock.monotonic()), (10, Duration::from_millis(5)));
    }
}
