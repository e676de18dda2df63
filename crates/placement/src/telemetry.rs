//! What a host measures of itself, as one figure: how far from idle and well it is.
//!
//! The figure is a [`Load`] in thousandths, and counts in the score with [`crate::score::WEIGHT_LOAD`]. It is a weighted
//! mean of what was measured; what a host can't measure is left out and the others count for it:
//!
//! | what | full marks (0) | none (1000) | weight |
//! |---|---|---|---|
//! | processors in use | idle | all busy | 40 |
//! | pressure on memory | nobody waits | some task waits a quarter of the time | 20 |
//! | pressure on processors | nobody waits | some task waits all the time | 15 |
//! | pressure on disks | nobody waits | some task waits all the time | 10 |
//! | a small durable write to disk | at once | 100 ms | 10 |
//! | round trip to the nearest gateway | none | 50 ms | 5 |
//!
//! Pressure is the kernel's "some", over ten seconds (Documentation/accounting/psi.rst). Memory weighs more than its
//! share, and fully at a quarter: a host that waits for memory is about to kill. Telemetry that grows old means less and
//! less: from [`FRESH`] to [`STALE`] the figure goes evenly to [`NEUTRAL`], which speaks neither for nor against a host.

use crate::types::Load;
use std::time::Duration;

pub const WEIGHT_BUSY: u32 = 40;
pub const WEIGHT_MEMORY: u32 = 20;
pub const WEIGHT_CPU: u32 = 15;
pub const WEIGHT_IO: u32 = 10;
pub const WEIGHT_DISK: u32 = 10;
pub const WEIGHT_RTT: u32 = 5;

/// What counts as fully under pressure, in thousandths of the time.
const MEMORY_FULL: u32 = 250;
/// What counts as the slowest disk, in microseconds.
const DISK_FULL: u32 = 100_000;
/// What counts as the farthest host, in microseconds.
const RTT_FULL: u32 = 50_000;

/// Until this age telemetry counts as it is: heartbeats come every second, and a few may be late.
pub const FRESH: Duration = Duration::from_secs(5);
/// From this age on it says nothing.
pub const STALE: Duration = Duration::from_secs(30);
/// What nothing is known of is taken for half busy.
pub const NEUTRAL: Load = Load(500);

/// One look at a host. Shares are in thousandths, times in microseconds; `None` is what it can't measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Telemetry {
    pub busy: Option<u16>,
    pub cpu_pressure: Option<u16>,
    pub memory_pressure: Option<u16>,
    pub io_pressure: Option<u16>,
    /// How long a small durable write took.
    pub disk: Option<u32>,
    /// To the nearest gateway.
    pub rtt: Option<u32>,
}

impl Telemetry {
    /// The figure of a look that is `age` old.
    pub fn burden(&self, age: Duration) -> Load {
        let share = |n: Option<u16>| n.map(u32::from);
        let terms = [
            (share(self.busy), 1000, WEIGHT_BUSY),
            (share(self.memory_pressure), MEMORY_FULL, WEIGHT_MEMORY),
            (share(self.cpu_pressure), 1000, WEIGHT_CPU),
            (share(self.io_pressure), 1000, WEIGHT_IO),
            (self.disk, DISK_FULL, WEIGHT_DISK),
            (self.rtt, RTT_FULL, WEIGHT_RTT),
        ];
        let (mut sum, mut weights) = (0u64, 0u64);
        for (value, full, weight) in terms {
            if let Some(value) = value {
                sum += u64::from(value.min(full)) * 1000 * u64::from(weight) / u64::from(full);
                weights += u64::from(weight);
            }
        }
        let measured = sum.checked_div(weights).unwrap_or(u64::from(NEUTRAL.0));
        let (fresh, stale) = (FRESH.as_millis() as u64, STALE.as_millis() as u64);
        let age = u64::try_from(age.as_millis()).unwrap_or(u64::MAX).clamp(fresh, stale);
        let mixed = (measured * (stale - age) + u64::from(NEUTRAL.0) * (age - fresh)) / (stale - fresh);
        Load(mixed as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NOW: Duration = Duration::ZERO;

    #[test]
    fn the_weights_are_hundredths() {
        assert_eq!(WEIGHT_BUSY + WEIGHT_MEMORY + WEIGHT_CPU + WEIGHT_IO + WEIGHT_DISK + WEIGHT_RTT, 100);
    }

    #[test]
    fn each_measure_counts_by_its_weight() {
        let idle = Telemetry {
            busy: Some(0),
            cpu_pressure: Some(0),
            memory_pressure: Some(0),
            io_pressure: Some(0),
            disk: Some(0),
            rtt: Some(0),
        };
        assert_eq!(idle.burden(NOW), Load(0));
        let with = |change: fn(&mut Telemetry)| {
            let mut t = idle;
            change(&mut t);
            t.burden(NOW).0
        };
        assert_eq!(with(|t| t.busy = Some(1000)), 400);
        assert_eq!(with(|t| t.busy = Some(500)), 200);
        assert_eq!(with(|t| t.memory_pressure = Some(250)), 200, "a quarter of the time is as bad as it gets");
        assert_eq!(with(|t| t.cpu_pressure = Some(1000)), 150);
        assert_eq!(with(|t| t.io_pressure = Some(1000)), 100);
        assert_eq!(with(|t| t.disk = Some(5_000_000)), 100, "no measure counts for more than its weight");
        assert_eq!(with(|t| t.rtt = Some(25_000)), 25);
    }

    #[test]
    fn what_is_not_measured_is_left_out() {
        assert_eq!(Telemetry { busy: Some(300), ..Telemetry::default() }.burden(NOW), Load(300));
        assert_eq!(Telemetry::default().burden(NOW), NEUTRAL);
    }

    #[test]
    fn old_telemetry_goes_to_neutral() {
        let idle = Telemetry { busy: Some(0), ..Telemetry::default() };
        let busy = Telemetry { busy: Some(1000), ..Telemetry::default() };
        let at = |t: Telemetry, ms| t.burden(Duration::from_millis(ms)).0;
        assert_eq!((at(idle, 5_000), at(busy, 5_000)), (0, 1000));
        assert_eq!((at(idle, 17_500), at(busy, 17_500)), (250, 750));
        assert_eq!((at(idle, 30_000), at(busy, 30_000)), (NEUTRAL.0, NEUTRAL.0));
        assert_eq!(busy.burden(Duration::MAX), NEUTRAL);
    }

    proptest! {
        #[test]
        fn the_figure_is_a_share_and_grows_with_what_is_measured(
            a in (any::<u16>(), any::<u16>(), any::<u16>(), any::<u16>(), any::<u32>(), any::<u32>()),
            more: u16, age in 0u64..60_000,
        ) {
            let look = |busy: u16| Telemetry {
                busy: Some(busy),
                cpu_pressure: Some(a.1),
                memory_pressure: Some(a.2),
                io_pressure: Some(a.3),
                disk: Some(a.4),
                rtt: Some(a.5),
            };
            let age = Duration::from_millis(age);
            let (less, more) = (look(a.0).burden(age), look(a.0.saturating_add(more)).burden(age));
            prop_assert!(less <= more && more <= Load(1000));
        }
    }
}
