//! Autoscaling, driven by hand in virtual time: the writer with a host that behaves and a gateway that reports.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{create, image, intent, name, web};
use nexus_control::autoscale::Autoscaler;
use nexus_control::autoscale::decide::{Memory, Rule, Signals};
use nexus_control::autoscale::forecast::Forecast;
use nexus_control::cells::Cells;
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Intent};
use nexus_control::world::World;
use nexus_env::{RngExt, SeededRng};
use nexus_model::kind::*;
use nexus_model::plan::{AppTraffic, InstanceTraffic, TrafficReport};
use nexus_model::{ApiError, Bytes, Code, MilliCpu, Name, Object, Timestamp, key};
use serde_json::json;

/// Midnight of a Monday.
const BEGIN: i64 = 1_768_176_000_000;
const SECOND: Duration = Duration::from_secs(1);

struct Lab {
    core: Core,
    rng: SeededRng,
    at: Duration,
    revision: u64,
    committed: BTreeMap<String, Vec<u8>>,
    host: Name,
}

impl Lab {
    fn new() -> Self {
        let region = name("local");
        let (zones, cells) = (vec![name("zone-a")], vec![name("cell-a")]);
        let bootstrap = Bootstrap { region, domain: "localhost".into(), zones, cells };
        let core = Core::new(World::default(), bootstrap, Cells::new(Duration::ZERO, "server-a".into(), 1));
        let mut lab = Self {
            core,
            rng: SeededRng::new(7),
            at: SECOND * 100,
            revision: 0,
            committed: BTreeMap::new(),
            host: name("zone-a-1"),
        };
        lab.with(|core, at| core.bootstrap(at));
        lab.host_reports();
        lab.submit(&create::<Image>(Some("default"), "web", image("web"))).unwrap();
        lab
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let now = Timestamp::from_millis(BEGIN + self.at.as_millis() as i64);
        let at = Moment { now, monotonic: self.at, rng: &self.rng };
        let answer = f(&mut self.core, at);
        while self.core.reconcile(at) {}
        for pack in self.core.take_packs() {
            self.revision += 1;
            for (key, value) in &pack.ops {
                match value {
                    Some(value) => self.committed.insert(key.clone(), value.to_vec()),
                    None => self.committed.remove(key),
                };
            }
            self.core.committed(&pack, self.revision);
        }
        answer
    }

    fn host_reports(&mut self) {
        let capacity =
            Capacity { cpu: MilliCpu(64_000), memory: Bytes(64 << 30), scratch: Bytes(64 << 30), instances: 200 };
        let spec = common::host("zone-a", "cell-a", 1, capacity);
        let runs = self.core.world.instances_on(&self.host).filter(|i| i.metadata.deleting.is_none());
        let report = common::report(&self.host, spec, self.revision, runs);
        self.with(|core, at| core.report(&report, at)).unwrap();
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    fn app(&self) -> &Object<App> {
        self.core.world.apps.get(Some(&name("default")), &name("shop")).unwrap()
    }

    fn instances(&self) -> usize {
        self.core.world.instances_of(self.app().metadata.uid).count()
    }

    fn scaled(&mut self, autoscale: Autoscale) {
        let spec = AppSpec { autoscale: Some(autoscale), ..web(1) };
        self.submit(&create::<App>(Some("default"), "shop", spec)).unwrap();
    }

    /// A gateway's word of one second: so many requests, spread over the instances that are ready; without any, they wait.
    fn traffic(&mut self, requests: u32) {
        let ready: Vec<_> = self.core.world.instances_of(self.app().metadata.uid).filter(|i| i.status.ready).collect();
        let share = |i: usize| {
            let n = ready.len() as u32;
            requests / n + u32::from((i as u32) < requests % n)
        };
        let instances = ready.iter().enumerate().map(|(i, instance)| InstanceTraffic {
            uid: instance.metadata.uid,
            requests: share(i),
            errors: 0,
            in_flight: 0,
        });
        let waiting = if ready.is_empty() { requests } else { 0 };
        let app = AppTraffic { project: name("default"), app: name("shop"), arrived: requests, waiting };
        let report = TrafficReport {
            gateway: name("gateway-1"),
            span_ms: 1000,
            instances: instances.collect(),
            apps: if requests > 0 { vec![app] } else { Vec::new() },
        };
        self.core.world.traffic.hear(&report, self.at);
    }

    /// Lets seconds pass, each with so many requests; the writer looks every `step` of them.
    fn pass(&mut self, seconds: u64, step: u64, requests: impl Fn(u64) -> u32) {
        for second in 1..=seconds {
            self.at += SECOND;
            self.traffic(requests(second));
            if second % step == 0 {
                self.host_reports();
                self.with(|core, at| core.tick(at));
                // What was decided runs, and what was stopped is gone.
                self.host_reports();
            }
        }
    }

    fn events(&self, reason: &str) -> Vec<String> {
        let events = self.core.world.events.live.values().filter(|e| e.spec.reason == reason);
        events.map(|e| e.spec.message.clone()).collect()
    }
}

fn by_requests(per_second: u32) -> Autoscale {
    let target = ScaleTarget { requests_per_second: Some(per_second), ..ScaleTarget::default() };
    Autoscale { target, max_replicas: 12, ..Autoscale::default() }
}

#[test]
fn load_brings_instances_with_a_reason_and_the_spec_is_left_alone() {
    let mut lab = Lab::new();
    lab.scaled(by_requests(10));
    lab.pass(15, 1, |_| 5);
    assert_eq!(lab.app().status.desired_replicas, 1);
    lab.pass(30, 1, |_| 55);
    let app = lab.app();
    assert_eq!((app.status.desired_replicas, lab.instances()), (6, 6), "{:?}", app.status.autoscale);
    assert_eq!((app.spec.replicas, app.metadata.generation), (1, 1), "specs belong to users");
    let told = lab.events("ScaledOut");
    assert!(told.iter().any(|m| m.contains("requests a second, an instance is to carry 10")), "{told:?}");
    lab.pass(290, 1, |_| 5);
    assert_eq!(lab.app().status.desired_replicas, 6, "the stabilisation window");
    lab.pass(120, 1, |_| 5);
    assert_eq!((lab.app().status.desired_replicas, lab.instances()), (1, 1));
    assert!(!lab.events("ScaledIn").is_empty());
    assert_eq!(lab.core.check_invariants(), Vec::<String>::new());
}

#[test]
fn an_app_that_nobody_asks_for_sleeps_and_the_first_who_waits_wakes_it() {
    let mut lab = Lab::new();
    lab.scaled(Autoscale { min_replicas: 0, idle_seconds: 60, ..by_requests(10) });
    lab.pass(50, 1, |_| 0);
    assert_eq!(lab.instances(), 1);
    lab.pass(40, 1, |_| 0);
    assert_eq!((lab.app().status.phase, lab.instances()), (AppPhase::Stopped, 0));
    assert_eq!(lab.events("ScaledToZero").len(), 1);
    // The writer need not come round: who waits is looked for at every tick.
    lab.traffic(1);
    lab.at += Duration::from_millis(250);
    lab.with(|core, at| core.tick(at));
    assert_eq!(lab.app().status.desired_replicas, 1, "{:?}", lab.app().status.autoscale);
    lab.host_reports();
    assert_eq!(lab.app().status.phase, AppPhase::Ready);
    assert!(lab.events("Woken")[0].contains("wait for an instance"), "{:?}", lab.events("Woken"));
}

#[test]
fn without_a_word_from_gateways_nothing_is_taken_away() {
    let mut lab = Lab::new();
    lab.scaled(Autoscale { min_replicas: 0, idle_seconds: 30, ..by_requests(10) });
    lab.pass(40, 1, |_| 45);
    assert_eq!(lab.instances(), 5);
    for _ in 0..900 {
        lab.at += SECOND;
        lab.host_reports();
        lab.with(|core, at| core.tick(at));
    }
    assert_eq!(lab.instances(), 5);
    let status = lab.app().status.autoscale.clone().unwrap();
    assert_eq!(status.desired_replicas, 5);
}

#[test]
fn the_quota_is_charged_for_the_most_and_scaling_is_never_refused_for_it() {
    let mut lab = Lab::new();
    let quota = json!({"spec": {"quota": {"instances": 12}}});
    lab.submit(&intent("projects", None, "default", Change::Patch { patch: quota })).unwrap();
    lab.scaled(by_requests(10));
    let used = |lab: &Lab| lab.core.world.usage(&name("default")).unwrap().status.used.instances;
    assert_eq!(used(&lab), 12);
    let error = lab.submit(&create::<App>(Some("default"), "other", web(1))).unwrap_err();
    assert_eq!(error.code, Code::QuotaExceeded);
    lab.pass(60, 1, |_| 500);
    assert_eq!((lab.instances(), used(&lab)), (12, 12));
    let more = json!({"spec": {"autoscale": {"maxReplicas": 13}}});
    let patch = |patch| intent("apps", Some("default"), "shop", Change::Patch { patch });
    assert_eq!(lab.submit(&patch(more)).unwrap_err().code, Code::QuotaExceeded);
    lab.submit(&patch(json!({"spec": {"autoscale": {"maxReplicas": 4}}}))).unwrap();
    assert_eq!((lab.instances(), used(&lab)), (4, 4), "a lower bound holds at once");
    lab.submit(&patch(json!({"spec": {"autoscale": null, "replicas": 2}}))).unwrap();
    assert_eq!((lab.instances(), used(&lab)), (2, 2));
    assert!(lab.app().status.autoscale.is_none());
    assert_eq!(lab.core.check_invariants(), Vec::<String>::new());
}

#[test]
fn a_schedule_holds_instances_in_its_windows() {
    let mut lab = Lab::new();
    let window = ScaleWindow {
        days: vec![Weekday::Mon],
        start: "00:10".into(),
        end: "00:20".into(),
        time_zone: "UTC".into(),
        min_replicas: 5,
    };
    lab.scaled(Autoscale { strategy: ScaleStrategy::Schedule, schedule: vec![window], ..Autoscale::default() });
    lab.pass(480, 10, |_| 1);
    assert_eq!(lab.instances(), 1);
    lab.pass(60, 10, |_| 1);
    assert_eq!(lab.instances(), 5);
    lab.pass(1200, 10, |_| 1);
    assert_eq!(lab.instances(), 1);
}

/// Requests a second over a day: a night, a morning that rises, a peak at noon, a lunch, noise.
fn day(second: u64) -> u32 {
    let hour = second as f64 / 3600.0;
    let wave = (std::f64::consts::TAU * (hour - 8.0) / 24.0).sin().max(0.0);
    let lunch = (-(hour - 12.5).powi(2) * 8.0).exp();
    let noise = ((second / 7) as f64 * 12.9898).sin() * 3.0;
    (8.0 + 100.0 * wave - 15.0 * lunch + noise).max(0.0) as u32
}

#[test]
fn a_days_trace_is_followed_and_another_leader_goes_on_with_its_history() {
    let mut lab = Lab::new();
    lab.scaled(Autoscale { strategy: ScaleStrategy::Predictive, ..by_requests(10) });
    let (mut too_few, mut looked, mut most) = (0, 0, 0);
    for minute in 0..1440 {
        let from = minute * 60;
        lab.pass(60, 10, |second| day(from + second));
        let needed = day(from + 60).div_ceil(10).clamp(1, 12);
        let ready = lab.app().status.ready_replicas;
        looked += 1;
        too_few += u32::from(ready < needed);
        most = most.max(ready);
        assert!(ready <= 12);
    }
    assert!(too_few * 20 < looked, "{too_few} of {looked} minutes with too few instances");
    assert!((10..=12).contains(&most), "{most} at noon");
    assert!(lab.app().status.ready_replicas <= 3, "at midnight");
    let changes = lab.events("ScaledOut").len() + lab.events("ScaledIn").len();
    assert!((10..400).contains(&changes), "{changes} decisions");
    let predicted = lab.events("ScaledOut").iter().filter(|m| m.contains("forecast")).count();
    assert!(predicted > 0, "none was made by a forecast");
    assert_eq!(lab.core.check_invariants(), Vec::<String>::new());

    // What was written down is a day's load, and little of it.
    let rows = || lab.committed.iter().filter(|(key, _)| key.starts_with(key::LOADS));
    assert_eq!(rows().count(), 1, "a row for a day");
    let read = rows().map(|(key, row)| {
        let (app, day) = key::load_of(key.as_bytes()).unwrap();
        (app, day, row.clone())
    });
    lab.core.autoscaler = Autoscaler::from_rows(read.collect::<Vec<_>>());
    lab.pass(60, 1, day);
    // With the app its history goes.
    lab.submit(&intent("apps", Some("default"), "shop", Change::Delete)).unwrap();
    for _ in 0..3 {
        lab.at += SECOND;
        lab.with(|core, at| core.tick(at));
    }
    assert_eq!(lab.committed.keys().filter(|key| key.starts_with(key::LOADS)).count(), 0);
}

#[test]
fn predictive_never_has_fewer_instances_than_target_whatever_the_load_and_the_forecast() {
    for seed in 0..200 {
        let rng = SeededRng::new(seed);
        let rule = |strategy| {
            let mut autoscale = by_requests(10);
            autoscale.strategy = strategy;
            autoscale.min_replicas = (seed % 3) as u32;
            autoscale.max_replicas = 3 + (seed % 40) as u32;
            autoscale.idle_seconds = 5;
            autoscale.scale_out = ScaleOut { cooldown_seconds: (seed % 5) as u32, step_percent: 50 };
            let stabilization_seconds = (seed % 30) as u32;
            autoscale.scale_in =
                ScaleIn { stabilization_seconds, cooldown_seconds: (seed % 7) as u32, step_percent: 30 };
            Rule::new(&autoscale, &Template::default())
        };
        let (target, predictive) = (rule(ScaleStrategy::Target), rule(ScaleStrategy::Predictive));
        let (mut reactive, mut ahead) = (Memory::new(1, 0), Memory::new(1, 0));
        let mut load = 20.0;
        for at in 0..400 {
            load = match rng.below(20) {
                0 => 0.0,
                1 => rng.below(400) as f64,
                _ => (load + rng.below(21) as f64 - 10.0).max(0.0),
            };
            let known = rng.below(15) != 0;
            let mut now = Signals {
                at,
                loads: [None, known.then_some(load), None],
                waiting: u32::from(load > 0.0 && reactive.desired() == 0),
                busy: load > 0.0,
                heard: known,
                scheduled: (at % 100 > 80).then_some(4),
                ..Signals::default()
            };
            let fewest = reactive.decide(&target, &now).replicas;
            let (change, margin) = (rng.below(100) as f64 - 50.0, rng.below(30) as f64);
            now.forecasts[1] = (rng.below(4) != 0).then_some(Forecast { change, margin, error: 1.0 });
            let ours = ahead.decide(&predictive, &now).replicas;
            assert!(ours >= fewest, "seed {seed}, second {at}: {ours} by forecast, {fewest} by target");
        }
    }
}
