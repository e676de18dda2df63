//! Autoscaling: [`history`] keeps what an app's load was, [`forecast`] says what it will be, [`schedule`] what its windows hold, and
//! [`decide`] how many instances it should have. All of them are functions of values; [`backtest`] runs them over a series. This
//! file is what the writer keeps of all apps that are scaled by the cloud.
//!
//! The writer asks once a second, and at once when requests wait for an app without instances. A decision that changes the number is
//! written into the app's status with its reason, and told by an event; specs are never touched. The quota was charged with the
//! app's `maxReplicas` when its spec was written.

pub mod backtest;
pub mod decide;
pub mod forecast;
pub mod history;
pub mod schedule;

use std::collections::BTreeMap;
use std::time::Duration;

use nexus_model::kind::*;
use nexus_model::{Object, Uid, key};

use crate::step::{Dirty, Step};
use crate::world::{Place, World};
use decide::{Memory, Rule, Signals};
use history::{DAYS, History, Loads, Measure, SLOT_SECONDS, day_of};

/// Between two decisions about an app.
const EVERY: Duration = Duration::from_secs(1);
/// Over which the load of the moment is a mean.
const WINDOW: Duration = Duration::from_secs(10);
/// Whoever asked within this is still there.
const BUSY: Duration = Duration::from_secs(3);
/// An app's history is written so often …
const WRITE_EVERY: u64 = 900;
/// … and those of so many apps at once.
const WRITES: usize = 20;

/// What is kept of one app.
#[derive(Debug)]
struct Scaled {
    /// `None` until the first decision of this leader.
    memory: Option<Memory>,
    history: History,
    forecasts: [Option<forecast::Forecast>; 3],
    /// The slot and horizon that the forecasts are of.
    forecast_at: (u64, u32),
    written: u64,
}

/// What the leader keeps of all apps that are scaled by the cloud.
#[derive(Debug, Default)]
pub struct Autoscaler {
    apps: BTreeMap<Uid, Scaled>,
    began: Option<Duration>,
    last: Option<Duration>,
    /// The second in which histories were last looked over.
    kept: u64,
}

impl Autoscaler {
    /// With the histories that an earlier leader wrote, by app and day.
    pub fn from_rows(rows: impl IntoIterator<Item = (Uid, u64, Vec<u8>)>) -> Self {
        let mut by_app: BTreeMap<Uid, Vec<(u64, Vec<u8>)>> = BTreeMap::new();
        for (uid, day, row) in rows {
            by_app.entry(uid).or_default().push((day, row));
        }
        let apps = by_app.into_iter().map(|(uid, rows)| (uid, Scaled::new(History::from_rows(rows)))).collect();
        Self { apps, ..Self::default() }
    }

    /// Which apps are to be decided about now.
    pub fn due(&mut self, world: &World, now: Duration) -> Vec<Place> {
        self.began.get_or_insert(now);
        let all = self.last.is_none_or(|last| now.saturating_sub(last) >= EVERY);
        if all {
            self.last = Some(now);
            let scaled = world.apps.live.iter().filter(|(_, a)| a.spec.autoscale.is_some());
            return scaled.map(|(place, _)| place.clone()).collect();
        }
        let waited = world.traffic.waited_for().into_iter();
        let apps = waited.filter_map(|(project, app)| world.apps.get(Some(&project), &app));
        let asleep = apps.filter(|a| a.spec.autoscale.is_some() && a.status.desired_replicas == 0);
        asleep.map(|a| (a.metadata.project.clone(), a.metadata.name.clone())).collect()
    }

    /// Decides about one app, and writes the decision down if it is a new one.
    pub fn decide(&mut self, step: &mut Step<'_>, app: &Object<App>, now: Duration) {
        let Some(autoscale) = &app.spec.autoscale else { return };
        let seconds = u64::try_from(step.now.as_millis() / 1000).unwrap_or(0);
        let template = app.spec.template();
        let rule = Rule::new(autoscale, &template);
        let fresh = now.saturating_sub(self.began.unwrap_or(now)) < WINDOW;
        let mut signals = signals(step.world, app, seconds, fresh);
        let scaled = self.apps.entry(app.metadata.uid).or_insert_with(|| Scaled::new(History::default()));
        scaled.history.record(seconds, &signals.loads);
        if autoscale.strategy == ScaleStrategy::Predictive {
            scaled.look_ahead(seconds, autoscale.horizon_minutes, &rule.carries);
            signals.forecasts = scaled.forecasts;
        }
        let before = app.spec.wanted_replicas(&app.status);
        let memory = scaled.memory.get_or_insert_with(|| Memory::new(before, seconds));
        let decision = memory.decide(&rule, &signals);
        if decision.replicas == before && app.status.autoscale.is_some() {
            return;
        }
        let mut new = app.clone();
        new.status.autoscale = Some(AutoscaleStatus {
            desired_replicas: decision.replicas,
            reason: decision.reason.clone(),
            changed: (decision.replicas != before).then_some(step.now),
        });
        if decision.replicas != before {
            let what = match (before, decision.replicas) {
                (0, _) => "Woken",
                (_, 0) => "ScaledToZero",
                (before, after) if after > before => "ScaledOut",
                _ => "ScaledIn",
            };
            let message = format!("{before} to {} instances: {}", decision.replicas, decision.reason);
            step.event(app.metadata.project.as_ref(), app.owner_ref(), Severity::Normal, what, message);
        }
        step.put(new);
        step.mark(Dirty::App((app.metadata.project.clone(), app.metadata.name.clone())));
    }

    /// Writes histories down that are due, and takes away those of apps that are not scaled any more.
    pub fn keep(&mut self, step: &mut Step<'_>) {
        let seconds = u64::try_from(step.now.as_millis() / 1000).unwrap_or(0);
        if std::mem::replace(&mut self.kept, seconds) == seconds {
            return;
        }
        let today = day_of(seconds);
        let live: std::collections::BTreeSet<Uid> =
            step.world.apps.live.values().filter(|a| a.spec.autoscale.is_some()).map(|a| a.metadata.uid).collect();
        let gone: Vec<Uid> = self.apps.keys().filter(|uid| !live.contains(uid)).copied().collect();
        if let Some(uid) = gone.first() {
            for day in today.saturating_sub(DAYS + 1)..=today {
                step.set(key::load_history(*uid, day), None);
            }
            self.apps.remove(uid);
        }
        let due = self.apps.iter_mut().filter(|(_, s)| seconds.saturating_sub(s.written) >= WRITE_EVERY);
        for (uid, scaled) in due.take(WRITES) {
            // The first write of a day finishes the one before.
            let turned = scaled.written != 0 && day_of(scaled.written) < today;
            for day in [today - u64::from(turned && today > 0), today] {
                if let Some(row) = scaled.history.row(day) {
                    step.set(key::load_history(*uid, day), Some(row.into()));
                }
            }
            if turned {
                step.set(key::load_history(*uid, today.saturating_sub(DAYS + 1)), None);
            }
            scaled.written = seconds;
        }
    }
}

impl Scaled {
    fn new(history: History) -> Self {
        Self { memory: None, history, forecasts: [None; 3], forecast_at: (0, 0), written: 0 }
    }

    /// Forecasts anew when a slot has ended.
    fn look_ahead(&mut self, seconds: u64, horizon: u32, carries: &Loads) {
        let at = (seconds / SLOT_SECONDS, horizon);
        if self.forecast_at == at {
            return;
        }
        self.forecast_at = at;
        let ahead = (u64::from(horizon) * 60).div_ceil(SLOT_SECONDS) as usize;
        for measure in Measure::ALL {
            let index = measure.index();
            let wanted = carries[index].is_some() && self.history.known(measure) > 0;
            self.forecasts[index] = wanted.then(|| forecast::forecast(&self.history.series(measure), ahead)).flatten();
        }
    }
}

/// What is known of an app now. `fresh`: this leader has not listened for a whole window yet.
fn signals(world: &World, app: &Object<App>, seconds: u64, fresh: bool) -> Signals {
    let traffic = &world.traffic;
    let project = app.metadata.project.as_ref().expect("apps have a project");
    let demand = traffic.of_app(project, &app.metadata.name, BUSY);
    let (mut requests, mut concurrency, mut in_flight) = (0.0, 0.0, 0);
    let (mut cpu, mut running, mut measured) = (0.0, 0u32, 0u32);
    for instance in world.instances_of(app.metadata.uid) {
        let load = traffic.of(instance.metadata.uid, WINDOW);
        requests += load.per_second();
        concurrency += load.concurrency;
        in_flight += load.in_flight;
        if instance.status.phase == InstancePhase::Running {
            running += 1;
            if let Some(used) = traffic.cpu_of(instance.metadata.uid) {
                measured += 1;
                cpu += used;
            }
        }
    }
    let gateways = traffic.gateways() > 0 && !fresh;
    // Those that are not measured yet are taken to do what the others do.
    let cpu = match (running, measured) {
        (0, _) => Some(0.0),
        (_, 0) => None,
        _ => Some(cpu * f64::from(running) / f64::from(measured)),
    };
    let windows = app.spec.autoscale.as_ref().map_or(&[][..], |a| &a.schedule);
    Signals {
        at: seconds,
        loads: [
            cpu.filter(|_| app.spec.runtime == Runtime::Container),
            gateways.then_some(requests),
            gateways.then_some(concurrency + f64::from(demand.waiting)),
        ],
        waiting: demand.waiting,
        busy: demand.arrived > 0 || in_flight > 0,
        heard: gateways,
        scheduled: schedule::holds(windows, i64::try_from(seconds).unwrap_or(0) * 1000),
        forecasts: [None; 3],
    }
}
