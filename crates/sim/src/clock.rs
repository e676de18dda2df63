//! A machine's clock: virtual time, seen through a clock that goes a little too fast or too slow, whose wall part is off and may
//! jump.
//!
//! What the project promises holds while no clock is more than 5 % too fast or too slow (a lease is counted on for nine
//! tenths of its time: see `nexus_store::Store::lease_grant`). So some worlds go that far, all others stay at 200 millionths,
//! as real quartz does.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use nexus_env::Clock;
use tokio::time::Instant;

use crate::chance::Dice;

/// 2025-01-01, in milliseconds since the Unix epoch.
pub const BASE_MS: i64 = 1_735_689_600_000;
/// As far as clocks of real machines drift apart, in millionths.
pub const QUARTZ_PPM: u64 = 200;
/// As far as the project bears it.
pub const WORST_PPM: u64 = 50_000;
const MILLION: u64 = 1_000_000;

/// How far clocks are off in a seed's world at most, in millionths.
pub fn drift_ppm(seed: u64) -> u64 {
    if Dice::new(seed, "how far clocks drift").chance(350) { WORST_PPM } else { QUARTZ_PPM }
}

/// How fast a clock goes: so many millionths of the true speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(u64);

impl Rate {
    /// One that is off by `most` millionths at most, and often by just that.
    pub fn draw(dice: &Dice, most: u64) -> Self {
        let above = match dice.below(4) {
            0 => 0,
            1 => 2 * most,
            _ => dice.below(2 * most + 1),
        };
        Self(MILLION - most + above)
    }

    /// What the clock counts while so much time passes.
    pub fn counts(self, passed: Duration) -> Duration {
        scaled(passed, self.0, MILLION)
    }

    /// The time that passes while the clock counts so much.
    pub fn lasts(self, counted: Duration) -> Duration {
        scaled(counted, MILLION, self.0)
    }
}

fn scaled(span: Duration, by: u64, of: u64) -> Duration {
    let nanos = span.as_nanos() * u128::from(by) / u128::from(of);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[derive(Debug)]
pub struct SimClock {
    start: Instant,
    pub rate: Rate,
    offset_ms: AtomicI64,
}

impl SimClock {
    /// A clock that is off by so much from the beginning.
    pub fn new(offset_ms: i64, rate: Rate) -> Self {
        Self { start: Instant::now(), rate, offset_ms: AtomicI64::new(offset_ms) }
    }

    /// Someone sets the clock, forwards or back.
    pub fn jump(&self, by_ms: i64) {
        self.offset_ms.fetch_add(by_ms, Ordering::SeqCst);
    }
}

impl Clock for SimClock {
    fn now_millis(&self) -> i64 {
        let passed = i64::try_from(self.monotonic().as_millis()).unwrap_or(i64::MAX);
        BASE_MS + passed + self.offset_ms.load(Ordering::SeqCst)
    }

    fn monotonic(&self) -> Duration {
        self.rate.counts(self.start.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_too_fast_counts_more_than_passes() {
        let second = Duration::from_secs(1);
        for seed in 0..50 {
            let rate = Rate::draw(&Dice::new(seed, "rate"), WORST_PPM);
            let counted = rate.counts(second);
            assert!((Duration::from_millis(950)..=Duration::from_millis(1_050)).contains(&counted), "{counted:?}");
            assert!(rate.lasts(counted).abs_diff(second) < Duration::from_nanos(3));
        }
    }
}
