//! How many instances an app should have: a function of what it asks for, what its load is and will be, and what was decided
//! before.
//!
//! 1. What the load needs: the most that any measure wants, at what one instance is to carry (`target`).
//! 2. `predictive` takes the forecast of the next minutes with its margin, where that wants more.
//! 3. Windows of the schedule and `minReplicas` hold from below, `maxReplicas` from above. With `minReplicas` 0, one instance
//!    stays until nobody has asked for `idleSeconds`, and comes at once when somebody asks.
//! 4. Growing goes by steps with a cool-down between them; shrinking too, and never below what was wanted at any moment of the
//!    stabilisation window.
//!
//! `predictive` runs `target` beside itself, with a memory of its own, and never decides below it. What is not known (no gateway
//! or host is heard) changes nothing.

use std::collections::VecDeque;

use nexus_model::kind::{Autoscale, ScaleStrategy, ScaleTarget, Template};

use super::forecast::Forecast;
use super::history::{Loads, Measure};

/// A step out may always add so many.
const STEP_LEAST: u32 = 4;

/// What an app asks for, as far as deciding goes.
#[derive(Debug, Clone)]
pub struct Rule {
    pub autoscale: Autoscale,
    /// What one instance is to carry of each measure.
    pub carries: Loads,
}

impl Rule {
    pub fn new(autoscale: &Autoscale, template: &Template) -> Self {
        let ScaleTarget { cpu_percent, requests_per_second, concurrency } = autoscale.targets(template);
        let cpu = cpu_percent.map(|p| f64::from(p) / 100.0 * f64::from(template.parts().reserved().cpu.0));
        let carries = [cpu, requests_per_second.map(f64::from), concurrency.map(f64::from)];
        Self { autoscale: autoscale.clone(), carries }
    }
}

/// What is known at the moment of a decision.
#[derive(Debug, Clone, Default)]
pub struct Signals {
    /// In seconds, by any clock that goes forward.
    pub at: u64,
    /// The load now, of all instances together.
    pub loads: Loads,
    /// Requests that wait for an instance.
    pub waiting: u32,
    /// Whether anybody has asked, or is being served, since the last decision.
    pub busy: bool,
    /// Whether somebody would tell us of users.
    pub heard: bool,
    /// What the windows of the schedule hold now.
    pub scheduled: Option<u32>,
    /// By measure, for `predictive`.
    pub forecasts: [Option<Forecast>; 3],
}

/// A number of instances that follows what is wanted, by steps.
#[derive(Debug, Clone, Default)]
struct Track {
    desired: u32,
    /// What was wanted within the stabilisation window: falling values, so that the first is the most.
    wanted: VecDeque<(u64, u32)>,
    out: Option<u64>,
    back: Option<u64>,
}

impl Track {
    fn new(desired: u32, at: u64) -> Self {
        Self { desired, wanted: [(at, desired)].into(), out: None, back: None }
    }

    fn follow(&mut self, want: u32, at: u64, rule: &Autoscale) {
        self.desired = rule.clamp(self.desired);
        while self.wanted.back().is_some_and(|(_, w)| *w <= want) {
            self.wanted.pop_back();
        }
        self.wanted.push_back((at, want));
        let window = u64::from(rule.scale_in.stabilization_seconds);
        while self.wanted.len() > 1 && self.wanted.front().is_some_and(|(then, _)| at.saturating_sub(*then) > window) {
            self.wanted.pop_front();
        }
        let rested =
            |last: Option<u64>, cooldown: u32| last.is_none_or(|last| at.saturating_sub(last) >= u64::from(cooldown));
        let share = |percent: u32| (u64::from(self.desired) * u64::from(percent) / 100) as u32;
        if want > self.desired {
            // Whoever waits for the first instance does not wait for a cool-down too.
            if self.desired == 0 || rested(self.out, rule.scale_out.cooldown_seconds) {
                let most = self.desired.saturating_add(share(rule.scale_out.step_percent).max(STEP_LEAST));
                self.desired = want.min(most);
                self.out = Some(at);
            }
            return;
        }
        // Going to nothing has a time of its own, which has passed when that is wanted.
        let settled = if want == 0 { 0 } else { self.wanted.iter().map(|(_, w)| *w).max().unwrap_or(want) };
        if settled < self.desired && rested(self.back, rule.scale_in.cooldown_seconds) {
            let least = self.desired.saturating_sub(share(rule.scale_in.step_percent).max(1));
            self.desired = settled.max(least);
            self.back = Some(at);
        }
    }
}

/// What is remembered of an app from decision to decision.
#[derive(Debug, Clone)]
pub struct Memory {
    /// What `target` would have done.
    reactive: Track,
    own: Track,
    /// When somebody last asked.
    busy: u64,
}

/// How many, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub replicas: u32,
    pub reason: String,
}

impl Memory {
    /// Of an app that has so many instances now.
    pub fn new(desired: u32, at: u64) -> Self {
        Self { reactive: Track::new(desired, at), own: Track::new(desired, at), busy: at }
    }

    pub fn desired(&self) -> u32 {
        self.own.desired.max(self.reactive.desired)
    }

    /// Decides, and remembers it.
    pub fn decide(&mut self, rule: &Rule, now: &Signals) -> Decision {
        let a = &rule.autoscale;
        if now.busy || now.waiting > 0 || !now.heard {
            self.busy = now.at;
        }
        let need = match a.strategy {
            ScaleStrategy::Schedule => Need::default(),
            // What is held when nothing is known is this track's own: `target` by itself would hold no other.
            _ => needs(rule, now, a.clamp(self.reactive.desired)),
        };
        let scheduled = now.scheduled.unwrap_or(0);
        let idle = now.at.saturating_sub(self.busy);
        let awake = u32::from(idle < u64::from(a.idle_seconds));
        let floor = a.min_replicas.max(scheduled).max(if a.min_replicas == 0 { awake } else { 0 });
        let bounded = |want: u32| a.clamp(want.max(floor));
        let held = bounded(need.count);
        self.reactive.follow(held, now.at, a);
        let mut reason = need.why;
        let mut want = if need.known { held } else { held.max(a.clamp(self.own.desired)) };
        if a.strategy == ScaleStrategy::Predictive
            && let Some((will, why)) = will_need(rule, now)
            && bounded(will) > held
        {
            want = bounded(will);
            reason = why;
        }
        self.own.follow(want, now.at, a);
        let replicas = self.desired();
        if want == a.max_replicas && need.count > want {
            reason = format!("{reason}; maxReplicas is {want}");
        } else if want == floor && (need.count < floor || floor == 0) {
            reason = match () {
                () if scheduled == floor && now.scheduled.is_some() => format!("its schedule holds {floor} now"),
                () if a.min_replicas == floor && floor > 0 => format!("{reason}; minReplicas is {floor}"),
                () if floor == 0 => format!("nobody has asked for {idle} s"),
                () if now.waiting > 0 => format!("{} requests wait for an instance", now.waiting),
                () => format!("somebody asked {idle} s ago; the last instance goes after {} s", a.idle_seconds),
            };
        }
        if replicas > want {
            reason = format!("{reason}; fewer after the stabilisation window");
        } else if replicas < want {
            reason = format!("{reason}; more with the next step");
        }
        Decision { replicas, reason: reason.trim_start_matches("; ").to_owned() }
    }
}

fn count(load: f64, carries: f64) -> u32 {
    // A hair above a whole number is measurement, not load.
    let count = (load / carries - 1e-6).ceil();
    if count <= 0.0 { 0 } else { count.min(1e9) as u32 }
}

fn describe(measure: Measure, load: f64, carries: f64) -> String {
    match measure {
        Measure::Cpu => {
            format!("{:.2} processors in use, an instance is to use {:.2}", load / 1000.0, carries / 1000.0)
        }
        Measure::Requests => format!("{load:.1} requests a second, an instance is to carry {carries:.0}"),
        Measure::Concurrency => format!("{load:.1} requests at once, an instance is to carry {carries:.0}"),
    }
}

/// What the load wants now, and why.
#[derive(Debug)]
struct Need {
    count: u32,
    why: String,
    known: bool,
}

impl Default for Need {
    fn default() -> Self {
        Self { count: 0, why: String::new(), known: true }
    }
}

/// With a measure that is not known, no less is wanted than there is.
fn needs(rule: &Rule, now: &Signals, before: u32) -> Need {
    let mut best: Option<(u32, String)> = None;
    let mut unknown = false;
    for measure in Measure::ALL {
        let Some(carries) = rule.carries[measure.index()] else { continue };
        let Some(load) = now.loads[measure.index()] else {
            unknown = true;
            continue;
        };
        let want = count(load, carries);
        if best.as_ref().is_none_or(|(most, _)| want > *most) {
            best = Some((want, describe(measure, load, carries)));
        }
    }
    match best {
        Some((count, why)) if !unknown || count >= before => Need { count, why, known: !unknown },
        _ => {
            let why = "its load is not known now, so nothing is taken away".to_owned();
            Need { count: before, why, known: false }
        }
    }
}

/// What the load will want within the horizon, with the forecast's margin.
fn will_need(rule: &Rule, now: &Signals) -> Option<(u32, String)> {
    let mut best: Option<(u32, String)> = None;
    for measure in Measure::ALL {
        let index = measure.index();
        let (Some(carries), Some(load), Some(forecast)) = (rule.carries[index], now.loads[index], now.forecasts[index])
        else {
            continue;
        };
        let will = (load + forecast.change.max(0.0) + forecast.margin).max(0.0);
        let want = count(will, carries);
        if best.as_ref().is_none_or(|(most, _)| want > *most) {
            let minutes = rule.autoscale.horizon_minutes;
            let why = format!(
                "within {minutes} min up to {} (forecast {:.2} ± {:.2} in the last day)",
                describe(measure, will, carries),
                load + forecast.change,
                forecast.error,
            );
            best = Some((want, why));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(change: impl FnOnce(&mut Autoscale)) -> Rule {
        let mut autoscale = Autoscale {
            max_replicas: 20,
            target: ScaleTarget { requests_per_second: Some(10), ..ScaleTarget::default() },
            ..Autoscale::default()
        };
        change(&mut autoscale);
        Rule::new(&autoscale, &Template::default())
    }

    fn load(at: u64, requests: f64) -> Signals {
        let loads = [None, Some(requests), None];
        Signals { at, loads, busy: requests > 0.0, heard: true, ..Signals::default() }
    }

    #[test]
    fn it_grows_at_once_by_steps_and_shrinks_when_the_window_is_over() {
        let rule = rule(|_| {});
        let mut memory = Memory::new(1, 0);
        assert_eq!(memory.decide(&rule, &load(0, 95.0)).replicas, 5, "four more at most");
        assert_eq!(memory.decide(&rule, &load(1, 95.0)).replicas, 5, "the cool-down");
        let decision = memory.decide(&rule, &load(3, 95.0));
        assert_eq!(decision.replicas, 10);
        assert!(decision.reason.contains("95.0 requests a second"), "{decision:?}");
        assert_eq!(memory.decide(&rule, &load(6, 950.0)).replicas, 20);
        let decision = memory.decide(&rule, &load(9, 950.0));
        assert!(decision.reason.contains("maxReplicas is 20"), "{decision:?}");
        for at in 10..300 {
            assert_eq!(memory.decide(&rule, &load(at, 10.0)).replicas, 20, "at {at}");
        }
        assert_eq!(memory.decide(&rule, &load(310, 10.0)).replicas, 10, "half of them");
        assert_eq!(memory.decide(&rule, &load(312, 10.0)).replicas, 10, "the cool-down");
        assert_eq!(memory.decide(&rule, &load(330, 10.0)).replicas, 5);
        let last = (335..420).map(|at| memory.decide(&rule, &load(at, 0.0)).replicas).last();
        assert_eq!(last, Some(1), "minReplicas");
    }

    #[test]
    fn the_last_instance_goes_when_nobody_asked_and_comes_back_for_the_first_who_waits() {
        let rule = rule(|a| {
            a.min_replicas = 0;
            a.idle_seconds = 60;
        });
        let mut memory = Memory::new(1, 0);
        for at in 0..60 {
            assert_eq!(memory.decide(&rule, &load(at, 0.0)).replicas, 1, "at {at}");
        }
        let decision = memory.decide(&rule, &load(60, 0.0));
        assert_eq!((decision.replicas, decision.reason.as_str()), (0, "nobody has asked for 60 s"));
        let silent = Signals { heard: false, ..load(70, 0.0) };
        assert_eq!(memory.decide(&rule, &silent).replicas, 1, "without gateways nobody knows");
        assert_eq!(memory.decide(&rule, &load(140, 0.0)).replicas, 0);
        let waits = Signals { waiting: 3, ..load(141, 0.0) };
        let decision = memory.decide(&rule, &waits);
        assert_eq!((decision.replicas, decision.reason.as_str()), (1, "3 requests wait for an instance"));
    }

    #[test]
    fn what_is_not_known_takes_nothing_away() {
        let rule = rule(|a| a.scale_in.stabilization_seconds = 0);
        let mut memory = Memory::new(8, 0);
        let unknown = Signals { at: 100, heard: true, ..Signals::default() };
        assert_eq!(memory.decide(&rule, &unknown).replicas, 8);
        assert_eq!(memory.decide(&rule, &load(200, 10.0)).replicas, 4);
    }

    #[test]
    fn a_schedule_holds_whatever_the_load() {
        let rule = rule(|a| a.strategy = ScaleStrategy::Schedule);
        let mut memory = Memory::new(1, 0);
        let held = Signals { scheduled: Some(5), ..load(0, 1000.0) };
        let decision = memory.decide(&rule, &held);
        assert_eq!((decision.replicas, decision.reason.as_str()), (5, "its schedule holds 5 now"));
        let after = (1..400).map(|at| memory.decide(&rule, &load(at, 1000.0)).replicas).last();
        assert_eq!(after, Some(1));
    }

    #[test]
    fn a_forecast_brings_instances_before_the_load_and_says_how_wrong_it_was() {
        let rule = rule(|a| a.strategy = ScaleStrategy::Predictive);
        let mut memory = Memory::new(2, 0);
        let forecast = Some(Forecast { change: 15.0, margin: 3.0, error: 2.0 });
        let now = Signals { forecasts: [None, forecast, None], ..load(0, 20.0) };
        let decision = memory.decide(&rule, &now);
        assert_eq!(decision.replicas, 4);
        assert!(decision.reason.contains("forecast 35.00 ± 2.00"), "{decision:?}");
        let falls = Some(Forecast { change: -100.0, margin: 0.0, error: 2.0 });
        let now = Signals { forecasts: [None, falls, None], ..load(5, 80.0) };
        assert_eq!(memory.decide(&rule, &now).replicas, 8, "never below what the load wants now");
    }
}
