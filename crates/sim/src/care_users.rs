//! Those whose wishes the region looks after for long: teams that roll templates out (good ones, and some that never get
//! ready), operators who drain hosts and rebalance, apps under load that comes and goes, jobs, and jobs by the clock.
//!
//! What each has been promised stands in [`Promises`], in the words that users said; checkers go by that and not by what the
//! region made of it. Two planted bugs sit on the way: the region is told other words than were said.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_control::intent::{Accepted, Change, RolloutOrder};
use nexus_control::world::World as Rows;
use nexus_model::kind::*;
use nexus_model::{ApiError, Bytes, Metadata, MilliCpu, Name, Object};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::chance::Dice;
use crate::gateways::Demand;
use crate::hosts::{FAILS, Host, ILL};
use crate::mutant::Mutant;
use crate::region::name;
use crate::users::{self, PROJECT, Way, intent};
use crate::world::World;

/// What one app was promised when it was made.
#[derive(Debug, Clone)]
pub struct Promise {
    pub replicas: u32,
    pub rollout: Rollout,
    pub disruption: Disruption,
    pub autoscale: Option<Autoscale>,
}

/// Clones share one.
#[derive(Clone, Default)]
pub struct Promises(Arc<Mutex<BTreeMap<Name, Promise>>>);

impl Promises {
    pub fn all(&self) -> BTreeMap<Name, Promise> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn add(&self, app: &Name, promise: Promise) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(app.clone(), promise);
    }
}

/// What all of them have.
#[derive(Clone)]
pub struct Hand {
    pub world: Arc<World>,
    /// Who it is: part of all names and keys.
    pub who: String,
    pub dice: Dice,
    pub stop: Arc<AtomicBool>,
    pub turn: Arc<std::sync::atomic::AtomicU64>,
}

impl Hand {
    pub fn new(world: &Arc<World>, who: &str, stop: &Arc<AtomicBool>) -> Self {
        let dice = Dice::new(world.seed, who);
        Self { world: world.clone(), who: who.to_owned(), dice, stop: stop.clone(), turn: Arc::default() }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::SeqCst)
    }

    /// Orders something until it is decided. `None`: nobody knows.
    async fn order(&self, plural: &str, object: &Name, change: Change) -> Option<Result<Accepted, ApiError>> {
        let key = format!("{}-{}", self.who, self.turn.fetch_add(1, Ordering::SeqCst));
        let project = (plural != "hosts").then(|| name(PROJECT));
        let wanted = intent(plural, project, object.clone(), change, key);
        users::submit(&self.world, &self.dice, &wanted, &Way::of_region(&self.world.nodes), &self.stop).await
    }

    /// The same for what must not be refused.
    async fn must(&self, plural: &str, object: &Name, change: Change) -> bool {
        match self.order(plural, object, change).await {
            Some(Ok(_)) => true,
            other => {
                let text = format!("{plural} {object}: {:?}", other.map(|answer| answer.map(|_| ())));
                self.world.trace.violation("what users may do is done", text);
                false
            }
        }
    }

    /// What some server shows.
    fn look<T>(&self, at: impl Fn(&Rows) -> Option<T>) -> Option<T> {
        self.world.servers().iter().find_map(|server| server.part.as_ref().and_then(|part| part.view.read(&at)))
    }

    /// Waits until some server shows it.
    async fn shows(&self, within: Duration, at: impl Fn(&Rows) -> bool) -> bool {
        let deadline = Instant::now() + within;
        while Instant::now() < deadline {
            if self.look(|w| at(w).then_some(())).is_some() {
                return true;
            }
            sleep(Duration::from_millis(150)).await;
        }
        false
    }
}

fn template() -> Template {
    let resources = Resources { cpu: MilliCpu(100), memory: Bytes(64 << 20), ..Resources::default() };
    Template { image: name("web"), resources, ..App::example().template() }
}

fn create<K: Kind>(object: &Name, spec: K::Spec) -> Change {
    Change::Create { object: Object::<K>::new(Metadata::new(object.clone(), Some(name(PROJECT))), spec).to_any() }
}

fn app_of<'a>(w: &'a Rows, app: &Name) -> Option<&'a Object<App>> {
    w.apps.get(Some(&name(PROJECT)), app)
}

/// A team with one app that it rolls templates of out.
pub struct Team {
    pub hand: Hand,
    pub app: Name,
    pub promises: Promises,
}

/// Quiet, a rollout is through within this.
const THROUGH_WITHIN: Duration = Duration::from_secs(90);

impl Team {
    fn promise(&self) -> Promise {
        let dice = &self.hand.dice;
        let replicas = dice.range(2, 6) as u32;
        let amount = |most: u64| match dice.below(3) {
            0 => Amount::Percent(dice.range(0, 51) as u8),
            _ => Amount::Count(dice.below(most) as u32),
        };
        let strategy = [Strategy::Rolling, Strategy::Rolling, Strategy::Canary, Strategy::BlueGreen];
        let step = |percent: u8| CanaryStep { percent, seconds: dice.chance(700).then(|| dice.range(1, 4) as u32) };
        let rollout = Rollout {
            strategy: *dice.pick(&strategy).expect("there are some"),
            max_surge: amount(3),
            max_unavailable: amount(2),
            steps: vec![step(20), step(60)],
            auto_promote: dice.chance(600),
            keep_old_seconds: dice.below(4) as u32,
            progress_deadline_seconds: dice.range(5, 9) as u32,
            history: dice.range(1, 5) as u32,
            ..Rollout::default()
        };
        let disruption = match dice.below(4) {
            0 => Disruption::default(),
            1 => Disruption::MinAvailable(Amount::Percent(100)),
            2 => Disruption::MinAvailable(amount(replicas.into())),
            _ => Disruption::MaxUnavailable(amount(2)),
        };
        Promise { replicas, rollout, disruption, autoscale: None }
    }

    async fn deploy(&self, version: u64, ill: bool) -> bool {
        let does = if ill { "ill" } else { "well" };
        let env = json!({(ILL): does, "VERSION": version.to_string()});
        self.hand.must("apps", &self.app, Change::Patch { patch: json!({"spec": {"env": env}}) }).await
    }

    async fn rollout(&self, order: RolloutOrder) {
        // A promotion of nothing, or an undo without history, is refused; that is no harm.
        let _ = self.hand.order("apps", &self.app, Change::Rollout { order }).await;
    }

    fn status(&self) -> Option<RolloutStatus> {
        self.hand.look(|w| app_of(w, &self.app)?.status.rollout.clone())
    }

    pub async fn run(self) {
        let promise = self.promise();
        let mut spec = AppSpec {
            replicas: promise.replicas,
            rollout: promise.rollout.clone(),
            disruption: Some(promise.disruption),
            ..template().into()
        };
        match self.hand.world.stage.mutant {
            Some(Mutant::EagerRollout) => spec.rollout.max_unavailable = Amount::Percent(100),
            Some(Mutant::EagerDrain) => spec.disruption = Some(Disruption::MaxUnavailable(Amount::Percent(100))),
            _ => {}
        }
        spec.env.insert(ILL.into(), "well".into());
        self.promises.add(&self.app, promise);
        if !self.hand.must("apps", &self.app, create::<App>(&self.app, spec)).await {
            return;
        }
        let ready = |w: &Rows| app_of(w, &self.app).is_some_and(|app| app.status.phase == AppPhase::Ready);
        // A first template that was never ready is nothing to go back to.
        while self.hand.goes_on() && !self.hand.shows(Duration::from_secs(1), ready).await {}
        let mut version = 1;
        while self.hand.goes_on() {
            match self.hand.dice.below(10) {
                0..=3 => {
                    version += 1;
                    self.deploy(version, false).await;
                }
                4 | 5 => {
                    version += 1;
                    self.deploy(version, true).await;
                }
                6 => self.rollout(RolloutOrder::Pause).await,
                7 => self.rollout(RolloutOrder::Resume).await,
                8 => self.rollout(RolloutOrder::Promote).await,
                _ => self.rollout(RolloutOrder::Undo { to: None }).await,
            }
            sleep(self.hand.dice.millis(300, 6_000)).await;
        }
        self.last_words(version + 1).await;
    }

    /// With nothing broken any more: a good template goes through, and a broken one is taken back.
    async fn last_words(&self, version: u64) {
        self.rollout(RolloutOrder::Resume).await;
        if !self.deploy(version, false).await {
            return;
        }
        let trace = &self.hand.world.trace;
        if !self.through(version, RolloutPhase::Complete).await {
            trace.violation("a good template goes through", format!("{}: {:?}", self.app, self.status()));
            return;
        }
        trace.count("rollouts: complete");
        if self.hand.dice.chance(500) {
            self.deploy(version + 1, true).await;
            if !self.through(version, RolloutPhase::RolledBack).await {
                trace.violation("a broken template is taken back", format!("{}: {:?}", self.app, self.status()));
                return;
            }
            trace.count("rollouts: taken back");
        }
    }

    /// Waits until a rollout has come to its end and all instances are of a version; brings it on where it waits.
    async fn through(&self, version: u64, end: RolloutPhase) -> bool {
        let deadline = Instant::now() + THROUGH_WITHIN;
        let text = version.to_string();
        let settled = |w: &Rows| {
            let Some(app) = app_of(w, &self.app) else { return false };
            let phase = app.status.rollout.as_ref().map(|r| r.phase);
            let all: Vec<_> = w.instances_of(app.metadata.uid).collect();
            let good = |i: &&&Object<Instance>| i.status.ready && i.spec.template.env.get("VERSION") == Some(&text);
            phase == Some(end)
                && all.len() == app.spec.replicas as usize
                && all.iter().filter(good).count() == all.len()
        };
        while Instant::now() < deadline {
            if self.hand.shows(Duration::from_millis(600), settled).await {
                return true;
            }
            match self.status() {
                Some(s) if matches!(s.phase, RolloutPhase::Waiting | RolloutPhase::Paused) => {
                    self.rollout(RolloutOrder::Promote).await;
                }
                // A good one that a fault's aftermath made late.
                Some(s) if s.failed && end == RolloutPhase::Complete => self.rollout(RolloutOrder::Resume).await,
                _ => {}
            }
        }
        false
    }
}

/// Operators who drain hosts, two at once now and then, and rebalance.
pub struct Operator {
    pub hand: Hand,
    pub hosts: Vec<Arc<Host>>,
}

impl Operator {
    async fn decide(&self, host: &Name, draining: bool) {
        let patch = json!({"spec": {"cordoned": draining, "draining": draining}});
        let _ = self.hand.order("hosts", host, Change::Patch { patch }).await;
    }

    pub async fn run(self) {
        let trace = self.hand.world.trace.clone();
        while self.hand.goes_on() {
            sleep(self.hand.dice.millis(500, 4_000)).await;
            if self.hand.dice.chance(250) {
                let most = self.hand.dice.range(1, 8) as u32;
                let _ = self.hand.order("hosts", &name("rebalance"), Change::Rebalance { most }).await;
                continue;
            }
            let mut victims: Vec<Name> = Vec::new();
            for _ in 0..=self.hand.dice.below(2) {
                victims.extend(self.hand.dice.pick(&self.hosts).map(|host| host.name.clone()));
            }
            for host in &victims {
                self.decide(host, true).await;
            }
            let empty = |w: &Rows| victims.iter().all(|host| w.instances_on(host).next().is_none());
            if self.hand.shows(self.hand.dice.millis(2_000, 12_000), empty).await {
                trace.count("drains: hosts emptied");
            } else {
                trace.count("drains: given up");
            }
            for host in &victims {
                self.decide(host, false).await;
            }
        }
        // One more, when nothing is in the way.
        if let Some(host) = self.hand.dice.pick(&self.hosts).map(|host| host.name.clone()) {
            self.decide(&host, true).await;
            let empty = |w: &Rows| w.instances_on(&host).next().is_none();
            if !self.hand.shows(Duration::from_secs(90), empty).await {
                let why = self.hand.look(|w| Some(format!("{:?}", w.host(&host)?.status.conditions)));
                trace.violation("a drain comes to its end", format!("{host} is not empty: {why:?}"));
            }
            self.decide(&host, false).await;
        }
    }
}

/// An app whose instances the cloud counts, under load that comes and goes.
pub struct Scaled {
    pub hand: Hand,
    pub app: Name,
    pub promises: Promises,
    pub demand: Demand,
}

/// Requests a second that one instance is to carry.
const CARRIES: u32 = 10;

impl Scaled {
    pub async fn run(self) {
        let dice = &self.hand.dice;
        let autoscale = Autoscale {
            min_replicas: dice.below(3).saturating_sub(1) as u32,
            max_replicas: dice.range(5, 9) as u32,
            target: ScaleTarget { requests_per_second: Some(CARRIES), ..ScaleTarget::default() },
            idle_seconds: dice.range(3, 8) as u32,
            scale_out: ScaleOut { cooldown_seconds: dice.below(4) as u32, step_percent: dice.range(20, 151) as u32 },
            scale_in: ScaleIn {
                stabilization_seconds: dice.below(8) as u32,
                cooldown_seconds: dice.below(4) as u32,
                step_percent: dice.range(20, 101) as u32,
            },
            ..Autoscale::default()
        };
        let promise = Promise {
            replicas: 1,
            rollout: Rollout::default(),
            disruption: Disruption::default(),
            autoscale: Some(autoscale.clone()),
        };
        self.promises.add(&self.app, promise);
        let spec = AppSpec { replicas: 1, autoscale: Some(autoscale.clone()), ..template().into() };
        if !self.hand.must("apps", &self.app, create::<App>(&self.app, spec)).await {
            return;
        }
        while self.hand.goes_on() {
            // Half an instance's worth beyond a whole number, so that measuring does not decide.
            let load = match dice.below(4) {
                0 => 0,
                _ => dice.below(12) as u32 * CARRIES + CARRIES / 2,
            };
            self.demand.set(&self.app, load);
            sleep(dice.millis(500, 9_000)).await;
        }
        let trace = &self.hand.world.trace;
        let stands = |n: u32| {
            let app = self.app.clone();
            move |w: &Rows| {
                let Some(app) = app_of(w, &app) else { return false };
                let all: Vec<_> = w.instances_of(app.metadata.uid).collect();
                let ready = all.iter().filter(|i| i.status.ready).count();
                app.status.desired_replicas == n && all.len() == n as usize && ready == all.len()
            }
        };
        let shown = || self.hand.look(|w| app_of(w, &self.app).map(|app| app.status.clone()));
        self.demand.set(&self.app, 0);
        if !self.hand.shows(Duration::from_secs(90), stands(autoscale.min_replicas)).await {
            trace.violation("an app that nobody asks for shrinks", format!("{}: {:?}", self.app, shown()));
            return;
        }
        if autoscale.min_replicas == 0 {
            trace.count("scaled: asleep");
        }
        let load = dice.below(12) as u32 * CARRIES + CARRIES / 2;
        self.demand.set(&self.app, load);
        let want = load.div_ceil(CARRIES).clamp(autoscale.min_replicas.max(1), autoscale.max_replicas);
        if !self.hand.shows(Duration::from_secs(90), stands(want)).await {
            let text = format!("{}: {want} for {load} requests a second: {:?}", self.app, shown());
            trace.violation("an app has the instances that its load needs", text);
            return;
        }
        trace.count("scaled: as the load needs");
    }
}

/// Somebody with jobs.
pub struct Worker {
    pub hand: Hand,
}

impl Worker {
    fn spec(&self) -> JobSpec {
        let dice = &self.hand.dice;
        let mut template = template();
        template.ports = Vec::new();
        template.env.insert(FAILS.into(), dice.pick(&[0, 100, 300, 700]).expect("four").to_string());
        JobSpec {
            template,
            completions: dice.range(1, 7) as u32,
            parallelism: dice.range(1, 4) as u32,
            indexed: dice.chance(500),
            backoff_limit: dice.below(5) as u32,
            ttl_seconds_after_finished: if dice.chance(300) { dice.range(1, 20) as u32 } else { 86_400 },
            ..JobSpec::default()
        }
    }

    pub async fn run(self) {
        let dice = &self.hand.dice;
        let mut jobs: Vec<Name> = Vec::new();
        let mut n = 0;
        while self.hand.goes_on() {
            let known = dice.pick(&jobs).cloned();
            match (dice.below(8), known) {
                (0, Some(job)) => {
                    // One that has expired is not there any more.
                    let _ = self.hand.order("jobs", &job, Change::Delete).await;
                    jobs.retain(|other| *other != job);
                }
                (1, Some(job)) => {
                    let patch = json!({"spec": {"cancelled": true}});
                    let _ = self.hand.order("jobs", &job, Change::Patch { patch }).await;
                }
                (2, Some(job)) => {
                    let patch = json!({"spec": {"parallelism": dice.range(1, 5)}});
                    let _ = self.hand.order("jobs", &job, Change::Patch { patch }).await;
                }
                _ if jobs.len() < 4 => {
                    n += 1;
                    let job = name(&format!("{}-{n}", self.hand.who));
                    if self.hand.must("jobs", &job, create::<Job>(&job, self.spec())).await {
                        jobs.push(job);
                    }
                }
                (_, Some(job)) => {
                    let over = |w: &Rows| {
                        w.jobs.get(Some(&name(PROJECT)), &job).is_none_or(|job| job.status.finished.is_some())
                    };
                    self.hand.shows(Duration::from_secs(2), over).await;
                    if self.hand.look(|w| over(w).then_some(())).is_some() {
                        jobs.retain(|other| *other != job);
                    }
                }
                (_, None) => {}
            }
            sleep(dice.millis(200, 3_000)).await;
        }
        let over = |w: &Rows| {
            let all = jobs.iter().filter_map(|job| w.jobs.get(Some(&name(PROJECT)), job));
            all.into_iter().all(|job| job.status.finished.is_some())
        };
        if !self.hand.shows(Duration::from_secs(120), over).await {
            let stuck = self.hand.look(|w| {
                let mut all = jobs.iter().filter_map(|job| w.jobs.get(Some(&name(PROJECT)), job));
                all.find(|job| job.status.finished.is_none())
                    .map(|job| format!("{}: {:?}", job.metadata.name, job.status))
            });
            self.hand.world.trace.violation("every job comes to its end", stuck.unwrap_or_default());
        }
    }
}

/// Jobs by the clock, one for each way to take missed and overlapping runs.
pub async fn begin_crons(hand: Hand) {
    let ways =
        [(Missed::All, Concurrency::Allow), (Missed::Once, Concurrency::Forbid), (Missed::Skip, Concurrency::Replace)];
    for (i, (missed, concurrency)) in ways.into_iter().enumerate() {
        let mut template = template();
        template.ports = Vec::new();
        template.env.insert(FAILS.into(), "200".into());
        let job = JobSpec { template, backoff_limit: 2, ..JobSpec::default() };
        let schedule = "* * * * *".into();
        let spec = CronJobSpec { schedule, missed, concurrency, job, ..CronJobSpec::default() };
        let cron = name(&format!("cron-{i}"));
        hand.must("cron-jobs", &cron, create::<CronJob>(&cron, spec)).await;
    }
    while hand.goes_on() {
        sleep(Duration::from_millis(500)).await;
    }
    // No more runs, so that all comes to rest.
    for i in 0..3 {
        let patch: Value = json!({"spec": {"suspend": true}});
        hand.must("cron-jobs", &name(&format!("cron-{i}")), Change::Patch { patch }).await;
    }
}
