//! What to do next for one instance: a function of what is wanted, what is true and what is remembered.
//!
//! Architecture invariant: nothing here waits, reads a clock or touches the host.

use std::time::Duration;

/// The pause before the second restart in a row; it doubles from there.
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
/// The first restart in a row is nearly at once: most exits are one of a kind.
const BACKOFF_QUICK: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Having run for so long, an instance is well, and its next end is the first again.
pub const WELL_AFTER: Duration = Duration::from_secs(60);

/// What the plan says of the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    Running {
        epoch: u64,
    },
    /// It has run to its end, and is not to run again: only its output stays.
    Kept,
    Gone,
}

/// What the runtime says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    Nothing,
    Running { epoch: u64 },
    Exited { epoch: u64 },
}

/// What the daemon remembers of it. Moments are on the monotonic clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Ends and failed starts in a row.
    pub failures: u32,
    /// Not to be started before.
    pub not_before: Duration,
    /// When it was asked to stop.
    pub asked: Option<Duration>,
    /// Its liveness check has failed: it is to be restarted.
    pub ill: bool,
    /// All that it had here has been cleared away.
    pub cleared: bool,
    /// Of what is kept: all but its output has been cleared away.
    pub settled: bool,
    /// How long it may take to stop.
    pub grace: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Fetch, plug in and start.
    Start,
    /// It runs as wanted: watch its health.
    Watch,
    /// Ask it to stop.
    Ask,
    /// Nothing before this moment, unless something changes.
    Wait(Duration),
    /// Its process has ended, or must: remove it from the runtime, to start it again.
    Reset,
    /// Remove all of it but its output.
    Settle,
    /// It is settled: nothing is to be done until something changes.
    Rest,
    /// Remove everything of it.
    Clear,
    /// Nothing is left to do, for good.
    Done,
}

/// The one next step towards what is wanted.
pub fn next_step(want: Want, seen: Seen, memory: &Memory, now: Duration) -> Step {
    match (want, seen) {
        (Want::Gone, Seen::Nothing) if memory.cleared => Step::Done,
        (Want::Gone, Seen::Nothing | Seen::Exited { .. }) => Step::Clear,
        (Want::Gone, Seen::Running { .. }) => stop(memory, now, Step::Clear),
        (Want::Kept, Seen::Nothing) if memory.settled => Step::Rest,
        (Want::Kept, Seen::Nothing | Seen::Exited { .. }) => Step::Settle,
        (Want::Kept, Seen::Running { .. }) => stop(memory, now, Step::Settle),
        // A lower number than what runs is an old plan's: the epoch never goes back.
        (Want::Running { epoch }, Seen::Running { epoch: running }) if running >= epoch && !memory.ill => Step::Watch,
        (Want::Running { .. }, Seen::Running { .. }) => stop(memory, now, Step::Reset),
        (Want::Running { .. }, Seen::Exited { .. }) => Step::Reset,
        (Want::Running { .. }, Seen::Nothing) if now < memory.not_before => Step::Wait(memory.not_before),
        (Want::Running { .. }, Seen::Nothing) => Step::Start,
    }
}

/// Asks, waits for the grace to pass, and then goes on by force.
fn stop(memory: &Memory, now: Duration, force: Step) -> Step {
    match memory.asked {
        None => Step::Ask,
        Some(asked) if now < asked + memory.grace => Step::Wait(asked + memory.grace),
        Some(_) => force,
    }
}

/// The pause before the start after so many failures in a row.
pub fn backoff(failures: u32) -> Duration {
    match failures {
        0 => Duration::ZERO,
        1 => BACKOFF_QUICK,
        n => BACKOFF_FIRST.saturating_mul(1 << (n - 2).min(16)).min(BACKOFF_MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn memory() -> Memory {
        Memory { grace: 10 * S, ..Memory::default() }
    }

    #[test]
    fn what_runs_as_wanted_is_only_watched() {
        let want = Want::Running { epoch: 3 };
        assert_eq!(next_step(want, Seen::Running { epoch: 3 }, &memory(), S), Step::Watch);
        assert_eq!(next_step(want, Seen::Nothing, &memory(), S), Step::Start);
    }

    #[test]
    fn an_epoch_never_goes_back() {
        let running = Seen::Running { epoch: 5 };
        assert_eq!(next_step(Want::Running { epoch: 4 }, running, &memory(), S), Step::Watch);
        assert_eq!(next_step(Want::Running { epoch: 6 }, running, &memory(), S), Step::Ask);
    }

    #[test]
    fn stopping_asks_waits_and_then_uses_force() {
        let running = Seen::Running { epoch: 1 };
        let mut m = memory();
        assert_eq!(next_step(Want::Gone, running, &m, 5 * S), Step::Ask);
        m.asked = Some(5 * S);
        assert_eq!(next_step(Want::Gone, running, &m, 6 * S), Step::Wait(15 * S));
        assert_eq!(next_step(Want::Gone, Seen::Exited { epoch: 1 }, &m, 6 * S), Step::Clear);
        assert_eq!(next_step(Want::Gone, running, &m, 15 * S), Step::Clear);
        assert_eq!(next_step(Want::Running { epoch: 2 }, running, &m, 15 * S), Step::Reset);
        m.cleared = true;
        assert_eq!(next_step(Want::Gone, Seen::Nothing, &m, 15 * S), Step::Done);
    }

    #[test]
    fn what_has_ended_for_good_keeps_its_output_and_never_starts_again() {
        let mut m = memory();
        for seen in [Seen::Nothing, Seen::Exited { epoch: 1 }] {
            assert_eq!(next_step(Want::Kept, seen, &m, S), Step::Settle);
        }
        assert_eq!(next_step(Want::Kept, Seen::Running { epoch: 1 }, &m, S), Step::Ask);
        m.settled = true;
        assert_eq!(next_step(Want::Kept, Seen::Nothing, &m, S), Step::Rest);
        assert_eq!(next_step(Want::Gone, Seen::Nothing, &m, S), Step::Clear);
    }

    #[test]
    fn an_ill_instance_is_stopped_and_started_again() {
        let (want, m) = (Want::Running { epoch: 1 }, Memory { ill: true, ..memory() });
        assert_eq!(next_step(want, Seen::Running { epoch: 1 }, &m, S), Step::Ask);
        assert_eq!(next_step(want, Seen::Exited { epoch: 1 }, &m, S), Step::Reset);
    }

    #[test]
    fn restarts_back_off_from_a_second_to_a_minute() {
        let pauses: Vec<u64> = (0..=10).map(|n| backoff(n).as_millis() as u64).collect();
        assert_eq!(pauses, [0, 100, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 60_000, 60_000, 60_000]);
        let m = Memory { not_before: 9 * S, ..memory() };
        assert_eq!(next_step(Want::Running { epoch: 1 }, Seen::Nothing, &m, 8 * S), Step::Wait(9 * S));
        assert_eq!(next_step(Want::Running { epoch: 1 }, Seen::Nothing, &m, 9 * S), Step::Start);
        assert_eq!(backoff(u32::MAX), BACKOFF_MAX);
    }
}
