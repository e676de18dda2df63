//! What a strategy would have done on a series of loads: the same decisions as the writer's, in virtual time.
//!
//! A minute is under-provisioned when fewer instances were ready than the target wants for that minute's load: the timeshare of
//! under-provisioning of Herbst, Kounev and Reussner, "Elasticity in Cloud Computing" (ICAC 2013). Cost is instances times minutes,
//! from when one is wanted until it is not.

use nexus_model::kind::Autoscale;
use serde::{Deserialize, Serialize};

use super::decide::{Memory, Rule, Signals};
use super::forecast::forecast;
use super::history::{Measure, SLOT_SECONDS, SLOTS};
use super::schedule;

const MINUTE: u64 = 60;
const MINUTES: usize = (SLOT_SECONDS / MINUTE) as usize;

/// How a strategy did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    pub minutes: u64,
    pub under_minutes: u64,
    pub instance_minutes: u64,
    pub peak: u32,
    /// How often the number changed.
    pub changes: u64,
    /// The mean absolute error of forecasts, as a share of the mean load.
    pub forecast_error: Option<f64>,
}

/// A series to run on.
#[derive(Debug, Clone, Copy)]
pub struct Trace<'a> {
    /// Mean loads of slots of [`SLOT_SECONDS`].
    pub loads: &'a [f64],
    pub measure: Measure,
    /// The time of the first, in seconds since 1970.
    pub begins: u64,
    /// So many slots are only learnt from, not judged.
    pub skip: usize,
    /// Minutes from a decision until its instances are ready.
    pub start_minutes: usize,
    /// What an instance is to carry where it is judged whether there were enough: the rule's own, without it.
    pub judged: Option<f64>,
}

impl Trace<'_> {
    /// The load in a minute: between the middles of slots.
    fn at(&self, minute: usize) -> f64 {
        let place = (minute as f64 + 0.5) / MINUTES as f64 - 0.5;
        let before = place.floor().max(0.0) as usize;
        let share = (place - before as f64).clamp(0.0, 1.0);
        let of = |slot: usize| self.loads.get(slot.min(self.loads.len() - 1)).copied().unwrap_or(0.0);
        of(before) + (of(before + 1) - of(before)) * share
    }
}

/// Runs one app's rule over a series.
pub fn run(rule: &Rule, trace: &Trace<'_>) -> Outcome {
    let mut outcome = Outcome::default();
    let Some(carries) = rule.carries[trace.measure.index()].filter(|_| !trace.loads.is_empty()) else { return outcome };
    let autoscale: &Autoscale = &rule.autoscale;
    let slots_ahead = (autoscale.horizon_minutes as usize).div_ceil(MINUTES);
    let first = trace.skip.min(trace.loads.len()) * MINUTES;
    let from = first.saturating_sub(30);
    let needs = |load: f64| (load / trace.judged.unwrap_or(carries) - 1e-6).ceil().max(0.0) as u32;
    let begin = autoscale.clamp(needs(trace.at(from)));
    let mut memory = Memory::new(begin, trace.begins + from as u64 * MINUTE);
    // The number that was wanted in each of the last minutes: an instance serves when it has been wanted for long enough.
    let mut wanted = vec![begin; trace.start_minutes + 1];
    let mut signals = Signals { heard: true, ..Signals::default() };
    let (mut errors, mut judged, mut sum) = (0.0, 0u32, 0.0);
    for minute in from..trace.loads.len() * MINUTES {
        if minute % MINUTES == 0 {
            let closed = &trace.loads[..minute / MINUTES];
            let known = &closed[closed.len().saturating_sub(SLOTS)..];
            let said = forecast(known, slots_ahead);
            if let Some(said) = said.filter(|_| minute >= first) {
                errors += said.error;
                judged += 1;
                sum += known.last().copied().unwrap_or(0.0);
            }
            signals.forecasts[trace.measure.index()] = said;
        }
        signals.at = trace.begins + minute as u64 * MINUTE;
        // What is known of a minute is what was measured in the one before.
        let seen = trace.at(minute.saturating_sub(1));
        signals.loads[trace.measure.index()] = Some(seen);
        signals.busy = seen > 0.0;
        signals.scheduled = schedule::holds(&autoscale.schedule, signals.at as i64 * 1000);
        let before = memory.desired();
        let desired = memory.decide(rule, &signals).replicas;
        wanted.rotate_left(1);
        if let Some(last) = wanted.last_mut() {
            *last = desired;
        }
        if minute < first {
            continue;
        }
        let ready = wanted.iter().copied().min().unwrap_or(0);
        outcome.minutes += 1;
        outcome.under_minutes += u64::from(ready < needs(trace.at(minute)));
        outcome.instance_minutes += u64::from(desired);
        outcome.peak = outcome.peak.max(desired);
        outcome.changes += u64::from(desired != before);
    }
    outcome.forecast_error = (judged > 0 && sum > 0.0).then(|| errors / sum);
    outcome
}
