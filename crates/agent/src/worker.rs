//! One instance's worker: takes the steps that [`crate::step`] decides, one after the other.
//!
//! It can be cut off at any await: the next worker looks at what is there and goes on. A failure is told in the
//! instance's report and tried again with back-off; it is nobody else's matter.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nexus_compute::{Runtime, State};
use nexus_env::Env;
use nexus_model::kind::{self, HealthCheck, InstancePhase};
use nexus_model::plan::{Desired, HostPlan, InstancePlan, InstanceReport};
use nexus_model::{Timestamp, Uid};
use tokio::sync::{Semaphore, watch};

use crate::AgentHandle;
use crate::board::Board;
use crate::config::Engines;
use crate::fabric::{self, Fabric};
use crate::health;
use crate::identity::{Identities, Identity};
use crate::launch::{Launcher, log_dir};
use crate::networks::Networks;
use crate::numa::Numa;
use crate::observer::{Observer, View};
use crate::outcome::{self, Outcome};
use crate::parts::{Next, Parts};
use crate::secrets::{Follower, Secrets};
use crate::step::{Memory, Seen, Step, WELL_AFTER, Want, backoff, next_step};

/// How long an instance may take to stop of which no plan is known any more.
const DEFAULT_GRACE: Duration = Duration::from_secs(10);
/// Between the moment when an instance that serves is to go and the moment when it is told so: gateways hear of it meanwhile and
/// send it nothing more, and what is short ends.
const LAME: Duration = Duration::from_millis(500);
/// How long a start waits until the plan that asks for it is on disk.
const KEEPING: Duration = Duration::from_secs(10);
/// A new instance is probed this soon, then less and less often until it is ready.
pub(crate) const FIRST_PROBE: Duration = Duration::from_millis(20);
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// An instance of a job that can't be started so often in a row has failed.
pub(crate) const START_TRIES: u32 = 5;

/// What all workers share.
pub(crate) struct Shared {
    pub env: Env,
    pub engines: Engines,
    pub observer: Observer,
    pub identities: Option<Arc<Identities>>,
    pub secrets: Option<Arc<Secrets>>,
    pub fabric: Option<Fabric>,
    pub networks: Option<Networks>,
    pub numa: Numa,
    pub handle: AgentHandle,
    pub logs_dir: PathBuf,
    /// The plan that is on disk.
    pub planned: watch::Receiver<Option<Arc<HostPlan>>>,
    /// Starts at once.
    pub starts: Semaphore,
}

impl Shared {
    pub fn logs(&self, uid: Uid) -> PathBuf {
        log_dir(&self.logs_dir, uid, None)
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.env.now_millis())
    }

    /// Waits until the plan that has this instance is on disk: what was started must be known after a crash. Not for ever: a disk
    /// that hangs must not keep others from being started.
    pub async fn is_kept(&self, plan: &InstancePlan) -> Result<(), String> {
        let same = |i: &InstancePlan| i.uid == plan.uid && i.epoch >= plan.epoch;
        let kept = |held: &Option<Arc<HostPlan>>| held.as_ref().is_some_and(|held| held.instances.iter().any(same));
        match tokio::time::timeout(KEEPING, self.planned.clone().wait_for(kept)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err("the host's plan is not on its disk yet".to_owned()),
        }
    }
}

/// What the plan says of one instance. The template stays known after the instance has gone from the plan.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Order {
    pub plan: Option<Arc<InstancePlan>>,
    pub wanted: bool,
}

pub(crate) struct Worker {
    shared: Arc<Shared>,
    uid: Uid,
    orders: watch::Receiver<Order>,
    views: watch::Receiver<View>,
    memory: Memory,
    /// Its main part's words; all of it is told by the board.
    report: InstanceReport,
    board: Arc<Board>,
    launcher: Arc<Launcher>,
    parts: Parts,
    /// Served from before the instance starts until it is cleared away.
    identity: Option<Identity>,
    /// Keeps the files of its secrets new while it runs.
    follower: Option<Follower>,
    /// Of a job's: how it ended, if it did.
    outcome: Option<Outcome>,
    /// Whether the disk was asked for the outcome.
    remembered: bool,
}

impl Worker {
    pub fn new(shared: Arc<Shared>, uid: Uid, orders: watch::Receiver<Order>) -> Self {
        let views = shared.observer.subscribe();
        let report = InstanceReport {
            uid,
            epoch: 0,
            phase: InstancePhase::Scheduled,
            ready: false,
            endpoint: None,
            restarts: 0,
            started: None,
            exit_code: None,
            message: String::new(),
            parts: Vec::new(),
        };
        let board = Arc::new(Board::new(uid, shared.handle.clone()));
        let launcher = Arc::new(Launcher::new(shared.clone()));
        let parts = Parts::new(uid, launcher.clone(), board.clone(), orders.clone(), views.clone());
        let (memory, identity, follower, outcome) = Default::default();
        let remembered = false;
        Self {
            shared,
            uid,
            orders,
            views,
            memory,
            report,
            board,
            launcher,
            parts,
            identity,
            follower,
            outcome,
            remembered,
        }
    }

    /// Works until the instance is gone and nothing of it is left.
    pub async fn run(mut self) -> Uid {
        loop {
            let order = self.orders.borrow_and_update().clone();
            if let Some(plan) = &order.plan {
                self.parts.announce(plan);
            }
            let once = order.plan.as_ref().is_some_and(|p| p.once);
            if once && !self.remembered && !self.remember().await {
                continue;
            }
            let (kind, state) = self.look();
            let seen = match &state {
                None => Seen::Nothing,
                Some((epoch, State::Running { .. })) => Seen::Running { epoch: *epoch },
                Some((epoch, State::Exited { .. })) => Seen::Exited { epoch: *epoch },
            };
            let want = match &order.plan {
                Some(plan) if order.wanted && plan.kept => Want::Kept,
                Some(plan) if order.wanted && plan.desired == Desired::Running => match self.outcome {
                    Some(_) => Want::Kept,
                    None => Want::Running { epoch: plan.epoch },
                },
                _ => Want::Gone,
            };
            self.report.epoch = match (seen, want) {
                (Seen::Running { epoch } | Seen::Exited { epoch }, _) | (_, Want::Running { epoch }) => epoch,
                (_, Want::Kept) => order.plan.as_ref().map_or(self.report.epoch, |p| p.epoch),
                _ => self.report.epoch,
            };
            self.memory.grace = order
                .plan
                .as_ref()
                .map_or(DEFAULT_GRACE, |p| Duration::from_secs(p.template.stop_grace_seconds.into()));
            let kind = kind.or(order.plan.as_ref().map(|p| p.template.runtime));
            match next_step(want, seen, &self.memory, self.shared.env.monotonic()) {
                Step::Done => {
                    self.board.gone();
                    return self.uid;
                }
                Step::Start => {
                    if let Some(plan) = order.plan {
                        self.start(&plan).await;
                    }
                }
                Step::Watch => {
                    let since = match state {
                        Some((_, State::Running { since })) => Some(since),
                        _ => None,
                    };
                    match order.plan {
                        Some(plan) => self.watch(&plan, since).await,
                        None => self.wait(None).await,
                    }
                }
                Step::Ask => self.ask(kind).await,
                Step::Wait(until) => self.wait(Some(until)).await,
                Step::Reset if once => self.end(state.map(|(_, s)| s)).await,
                Step::Reset => self.reset(kind, state.map(|(_, s)| s)).await,
                Step::Settle => self.settle(kind).await,
                Step::Rest => self.wait(None).await,
                Step::Clear => self.clear(kind).await,
            }
        }
    }

    fn look(&mut self) -> (Option<kind::Runtime>, Option<(u64, State)>) {
        let view = self.views.borrow_and_update();
        match view.instances.get(&self.uid) {
            Some((kind, observed)) => (Some(*kind), Some((observed.epoch, observed.state.clone()))),
            None => (None, None),
        }
    }

    fn runtime(&self, kind: kind::Runtime) -> Option<Arc<dyn Runtime>> {
        self.shared.engines.runtimes.get(&kind).cloned()
    }

    fn tell(&mut self, phase: InstancePhase, message: impl Into<String>) {
        self.report.phase = phase;
        self.report.message = message.into();
        if phase == InstancePhase::Running && self.report.message.is_empty() {
            self.report.message = self.unplugged().unwrap_or_default();
        }
        if phase != InstancePhase::Running {
            self.report.ready = false;
        }
        self.board.main(&self.report);
    }

    /// Which NIC a running instance is without, and why.
    fn unplugged(&self) -> Option<String> {
        let order = self.orders.borrow();
        let plan = order.plan.as_ref()?;
        let networks = self.shared.networks.as_ref()?;
        match plan.template.runtime {
            // It runs before it has them.
            kind::Runtime::Function => networks.failure(self.uid, &plan.nics),
            _ => networks.trouble(self.uid, &plan.nics),
        }
    }

    /// Waits for a moment, a new order or a new view.
    async fn wait(&mut self, until: Option<Duration>) {
        let now = self.shared.env.monotonic();
        let pause = until.map_or(Duration::from_secs(3600), |u| u.saturating_sub(now));
        tokio::select! {
            biased;
            _ = self.orders.changed() => {}
            _ = self.views.changed() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }

    /// Does what comes before the main part. Whether nothing is left of that.
    async fn advance(&mut self, plan: &Arc<InstancePlan>) -> bool {
        if plan.template.parts().is_empty() {
            return true;
        }
        if self.report.phase != InstancePhase::Starting {
            self.tell(InstancePhase::Starting, self.report.message.clone());
        }
        let mut orders = self.orders.clone();
        let step = async {
            match self.launcher.identify(plan, &mut self.identity).await {
                Ok(()) => self.parts.advance(plan, self.identity.as_ref().map(|i| i.folder.clone())).await,
                Err(why) => Next::Failed(why),
            }
        };
        let next = tokio::select! {
            biased;
            _ = orders.changed() => Next::Again,
            next = step => next,
        };
        match next {
            Next::Main => return true,
            Next::Again => self.shared.observer.look().await,
            Next::StepDone => (self.memory.failures, self.memory.not_before) = (0, Duration::ZERO),
            Next::Wait(what) => {
                self.tell(InstancePhase::Starting, what);
                tokio::select! {
                    biased;
                    _ = self.orders.changed() => {}
                    _ = self.views.changed() => {}
                    () = self.parts.changed() => {}
                }
            }
            Next::Failed(why) => self.start_failed(plan, why, false).await,
            Next::GivenUp(why) => self.start_failed(plan, why, true).await,
        }
        false
    }

    /// A job's instance is not tried for ever.
    async fn start_failed(&mut self, plan: &InstancePlan, why: String, given_up: bool) {
        tracing::warn!(uid = %self.uid, name = %plan.name, reason = why, "an instance can't be started");
        if plan.once && (given_up || self.memory.failures + 1 >= START_TRIES) {
            self.conclude(Outcome { code: None, message: why, started: None }).await;
        } else {
            self.failed(&why);
        }
    }

    async fn start(&mut self, plan: &Arc<InstancePlan>) {
        if !self.advance(plan).await {
            return;
        }
        self.tell(InstancePhase::Starting, self.report.message.clone());
        self.follower = None;
        self.memory = Memory { grace: self.memory.grace, failures: self.memory.failures, ..Memory::default() };
        let mut orders = self.orders.clone();
        let begun = tokio::select! {
            biased;
            // The plan has changed: whatever was begun is looked at afresh.
            _ = orders.changed() => return self.shared.observer.look().await,
            begun = self.launcher.main(plan, &mut self.identity) => begun,
        };
        match begun {
            Ok(()) => {
                let request = plan.request_id.as_ref().map(|r| r.as_str()).unwrap_or_default();
                tracing::info!(uid = %self.uid, name = %plan.name, epoch = plan.epoch, request, "an instance was started");
                self.report.started = Some(self.shared.now());
                self.greet(plan).await;
            }
            Err(why) => self.start_failed(plan, why, false).await,
        }
        self.shared.observer.look().await;
    }

    /// Asks what has just been started whether it is ready, if a connection is all that shows it: a function is, at once, and there may
    /// be requests that wait for it.
    async fn greet(&mut self, plan: &InstancePlan) {
        let Some(port) = plan.template.served_ports().first().map(|p| p.port) else { return };
        if plan.template.health.readiness.is_some() {
            return;
        }
        let answered = health::connects(&self.shared.env, plan, port, self.report.endpoint, FIRST_PROBE).await;
        if let Ok(endpoint) = answered {
            (self.report.endpoint, self.report.ready) = (Some(endpoint), true);
            self.tell(InstancePhase::Running, "");
        }
    }

    /// Counts a failure and plans the next try.
    fn failed(&mut self, why: &str) {
        self.memory.failures += 1;
        let pause = backoff(self.memory.failures);
        self.memory.not_before = self.shared.env.monotonic() + pause;
        self.tell(InstancePhase::BackOff, format!("{why}; it is tried again {}", again(pause)));
    }

    async fn ask(&mut self, kind: Option<kind::Runtime>) {
        let message = if self.memory.ill { self.report.message.clone() } else { String::new() };
        let serves = self.report.ready && self.report.endpoint.is_some() && !self.memory.ill;
        self.tell(InstancePhase::Stopping, message);
        if serves {
            tokio::time::sleep(LAME).await;
        }
        self.memory.asked = Some(self.shared.env.monotonic());
        if let Some(runtime) = kind.and_then(|k| self.runtime(k))
            && let Err(error) = runtime.stop(self.uid).await
        {
            tracing::warn!(uid = %self.uid, %error, "an instance can't be asked to stop; it is killed");
            self.memory.grace = Duration::ZERO;
            self.memory.asked = Some(Duration::ZERO);
        }
    }

    /// The process has ended, or is to: makes room for the next.
    async fn reset(&mut self, kind: Option<kind::Runtime>, state: Option<State>) {
        let why = match &state {
            Some(State::Exited { code, message, at }) => {
                let ran = self.report.started.map_or(Duration::ZERO, |s| at.since(s));
                if ran >= WELL_AFTER {
                    self.memory.failures = 0;
                }
                self.report.exit_code = *code;
                ended(*code, message.clone())
            }
            _ => String::new(),
        };
        let why = if self.memory.ill { self.report.message.clone() } else { why };
        if let Err(error) = self.remove(kind).await {
            self.tell(InstancePhase::Stopping, error);
            return self.wait(Some(self.shared.env.monotonic() + Duration::from_secs(1))).await;
        }
        self.report.restarts = self.report.restarts.saturating_add(1);
        self.report.endpoint = None;
        (self.memory.asked, self.memory.ill) = (None, false);
        self.failed(&why);
        self.shared.observer.look().await;
    }

    /// Reads how it ended, if an earlier worker saw that. False if the disk has to be asked again.
    async fn remember(&mut self) -> bool {
        let (disk, dir) = (self.shared.env.disk.clone(), self.shared.logs(self.uid));
        let loaded = tokio::task::spawn_blocking(move || outcome::load(&*disk, &dir)).await;
        match loaded.map_err(std::io::Error::other).flatten() {
            Ok(found) => {
                (self.outcome, self.remembered) = (found, true);
                true
            }
            Err(error) => {
                self.tell(InstancePhase::Scheduled, format!("whether it has ended can't be read: {error}"));
                self.wait(Some(self.shared.env.monotonic() + Duration::from_secs(1))).await;
                false
            }
        }
    }

    /// The process of a job's instance has ended, or has to.
    async fn end(&mut self, state: Option<State>) {
        let ill = self.memory.ill;
        let (code, message) = match state {
            // Its liveness check has failed, however politely it went.
            _ if ill => (None, self.report.message.clone()),
            Some(State::Exited { code, message, .. }) => (code, ended(code, message)),
            _ => (None, "it was killed".into()),
        };
        self.conclude(Outcome { code, message, started: self.report.started }).await;
    }

    /// Notes how it ended, before anything of it is removed.
    async fn conclude(&mut self, outcome: Outcome) {
        let (disk, dir, kept) = (self.shared.env.disk.clone(), self.shared.logs(self.uid), outcome.clone());
        let saved = tokio::task::spawn_blocking(move || outcome::save(&*disk, &dir, &kept)).await;
        if let Err(error) = saved.map_err(std::io::Error::other).flatten() {
            tracing::warn!(uid = %self.uid, %error, "how an instance ended can't be noted");
            self.tell(InstancePhase::Stopping, format!("how it ended can't be noted: {error}"));
            return self.wait(Some(self.shared.env.monotonic() + Duration::from_secs(1))).await;
        }
        tracing::info!(uid = %self.uid, code = ?outcome.code, reason = outcome.message, "an instance has ended");
        (self.outcome, self.remembered) = (Some(outcome), true);
        self.memory.ill = false;
    }

    /// Removes all of an instance that has ended but its output, and says that it has.
    async fn settle(&mut self, kind: Option<kind::Runtime>) {
        if let Err(why) = self.take_down(kind).await {
            tracing::warn!(uid = %self.uid, reason = why, "what an instance used can't be cleared away yet");
            self.tell(InstancePhase::Stopping, why);
            return self.wait(Some(self.shared.env.monotonic() + Duration::from_secs(1))).await;
        }
        self.memory.settled = true;
        let outcome = self.outcome.clone();
        if let Some(outcome) = &outcome {
            self.report.exit_code = outcome.code;
            self.report.started = outcome.started.or(self.report.started);
        }
        self.report.endpoint = None;
        // Its address is free by now, so that it may be somebody else's as soon as this is known.
        self.tell(InstancePhase::Exited, outcome.map(|o| o.message).unwrap_or_default());
        self.shared.observer.look().await;
    }

    /// Removes what runs, its network, its identity and its secrets.
    async fn take_down(&mut self, kind: Option<kind::Runtime>) -> Result<(), String> {
        self.remove(kind).await?;
        let plan = self.orders.borrow().plan.clone();
        self.parts.clear(plan.as_deref(), self.memory.grace).await?;
        self.shared.engines.net.unplug(self.uid).await.map_err(|e| e.to_string())?;
        self.identity = None;
        if let Some(identities) = &self.shared.identities {
            identities.remove(self.uid).await?;
        }
        self.follower = None;
        if let Some(secrets) = &self.shared.secrets {
            secrets.remove(self.uid).await?;
        }
        Ok(())
    }

    async fn remove(&self, kind: Option<kind::Runtime>) -> Result<(), String> {
        let runtimes: Vec<Arc<dyn Runtime>> = match kind {
            Some(kind) => self.runtime(kind).into_iter().collect(),
            None => self.shared.engines.runtimes.values().cloned().collect(),
        };
        for runtime in runtimes {
            runtime.remove(self.uid).await.map_err(|e| format!("it can't be removed: {e}"))?;
        }
        Ok(())
    }

    async fn clear(&mut self, kind: Option<kind::Runtime>) {
        self.tell(InstancePhase::Stopping, "");
        let cleared = async {
            self.take_down(kind).await?;
            let (disk, dir) = (self.shared.env.disk.clone(), self.shared.logs(self.uid));
            let removed = tokio::task::spawn_blocking(move || disk.remove_dir_all(&dir)).await;
            removed.map_err(|e| e.to_string())?.map_err(|e| format!("its logs can't be removed: {e}"))
        };
        match cleared.await {
            Ok(()) => {
                tracing::info!(uid = %self.uid, "an instance is gone");
                self.memory.cleared = true;
                self.shared.observer.look().await;
            }
            Err(why) => {
                tracing::warn!(uid = %self.uid, reason = why, "an instance can't be cleared away yet");
                self.tell(InstancePhase::Stopping, why);
                self.wait(Some(self.shared.env.monotonic() + Duration::from_secs(1))).await;
            }
        }
    }

    /// Watches a running instance's health until there is something else to do.
    async fn watch(&mut self, plan: &Arc<InstancePlan>, since: Option<Timestamp>) {
        self.report.started = since.or(self.report.started);
        (self.memory.asked, self.memory.cleared) = (None, false);
        // After the agent's restart the instance runs already. It goes on whether this succeeds or not.
        if let Err(reason) = self.launcher.identify(plan, &mut self.identity).await {
            tracing::warn!(uid = %self.uid, name = %plan.name, reason, "a running instance can't ask who it is");
        }
        self.parts.keep_all(plan, &self.identity.as_ref().map(|i| i.folder.clone()));
        self.follower = self.shared.secrets.as_ref().and_then(|secrets| secrets.follow(plan.uid, plan));
        let Some(runtime) = self.runtime(plan.template.runtime) else { return self.wait(None).await };
        let first_port = plan.template.served_ports().first().map(|p| p.port);
        let (ready, live) = (plan.template.health.readiness.clone(), plan.template.health.liveness.clone());
        let constant = ready.is_none() && first_port.is_none();
        if constant {
            self.report.ready = true;
        }
        // Most answer at once: that they don't is told when the first probe has taken a moment.
        let mut told = self.report.ready;
        if told {
            self.tell(InstancePhase::Running, "");
        }
        let start = self.shared.env.monotonic();
        let every = |c: &Option<HealthCheck>| {
            c.as_ref().map_or(PROBE_INTERVAL, |c| Duration::from_secs(c.interval_seconds.max(1).into()))
        };
        let (mut next_ready, mut next_live) = (start, start + every(&live));
        let (mut eager, mut unready, mut dead) = (FIRST_PROBE, 0, 0);
        let mut nics = self.shared.networks.as_ref().map(Networks::news);
        loop {
            let mut due = Duration::MAX;
            if !constant {
                due = due.min(next_ready);
            }
            if live.is_some() {
                due = due.min(next_live);
            }
            let now = self.shared.env.monotonic();
            let pause = due.saturating_sub(now).min(Duration::from_secs(3600));
            tokio::select! {
                biased;
                _ = self.orders.changed() => return,
                _ = self.views.changed() => {
                    let running = |v: &View| matches!(v.instances.get(&self.uid),
                        Some((_, o)) if o.epoch == self.report.epoch && matches!(o.state, State::Running { .. }));
                    if !running(&self.views.borrow_and_update()) {
                        // Seen by `look` in the next turn.
                        return;
                    }
                    continue;
                }
                () = changed(&mut nics) => {
                    if self.report.ready {
                        self.tell(InstancePhase::Running, "");
                    }
                    continue;
                }
                () = tokio::time::sleep(pause) => {}
            }
            let now = self.shared.env.monotonic();
            if self.memory.failures > 0 && now.saturating_sub(start) >= WELL_AFTER {
                self.memory.failures = 0;
            }
            if !constant && now >= next_ready {
                let shared = self.shared.clone();
                let probing = readiness(&shared, &*runtime, plan, &ready, first_port, self.report.endpoint);
                let mut orders = self.orders.clone();
                let mut probing = std::pin::pin!(probing);
                let result = loop {
                    tokio::select! {
                        biased;
                        _ = orders.changed() => return,
                        result = probing.as_mut() => break result,
                        () = tokio::time::sleep(FIRST_PROBE), if !told => {
                            told = true;
                            self.tell(InstancePhase::Running, "it is not ready yet");
                        }
                    }
                };
                told = true;
                match result {
                    Ok(endpoint) => {
                        unready = 0;
                        self.report.endpoint = endpoint.or(self.report.endpoint);
                        self.report.ready = true;
                        self.tell(InstancePhase::Running, "");
                    }
                    Err(why) => {
                        unready += 1;
                        if !self.report.ready || unready >= ready.as_ref().map_or(3, |c| c.failures) {
                            self.report.ready = false;
                            self.tell(InstancePhase::Running, format!("it is not ready: {why}"));
                        }
                    }
                }
                let pause = if self.report.ready { every(&ready) } else { eager.min(every(&ready)) };
                eager = (eager * 2).min(Duration::from_secs(3600));
                next_ready = self.shared.env.monotonic() + pause;
            }
            if let Some(check) = live.as_ref().filter(|_| now >= next_live) {
                let limit = Duration::from_secs(check.timeout_seconds.into());
                let shared = self.shared.clone();
                let probing = health::probe(&shared.env, &*runtime, plan, &check.probe, self.report.endpoint, limit);
                let mut orders = self.orders.clone();
                let result = tokio::select! { biased; _ = orders.changed() => return, r = probing => r };
                match result {
                    Ok(()) => dead = 0,
                    Err(why) => {
                        dead += 1;
                        if dead >= check.failures {
                            tracing::warn!(uid = %self.uid, reason = why, "an instance fails its liveness check");
                            self.memory.ill = true;
                            self.tell(InstancePhase::Running, format!("it failed its liveness check: {why}"));
                            return;
                        }
                    }
                }
                next_live = self.shared.env.monotonic() + every(&live);
            }
        }
    }
}

/// Resolves when there is news of NICs; never, where there are none.
async fn changed<T>(news: &mut Option<watch::Receiver<T>>) {
    match news {
        Some(news) => fabric::changed(news).await,
        None => std::future::pending().await,
    }
}

/// When something is tried that comes after a pause.
pub(crate) fn again(pause: Duration) -> String {
    if pause < Duration::from_secs(1) { "now".into() } else { format!("in {} s", pause.as_secs()) }
}

/// How a process ended, in a sentence.
pub(crate) fn ended(code: Option<i32>, message: String) -> String {
    match code {
        _ if !message.is_empty() => message,
        Some(code) => format!("it exited with {code}"),
        None => "it ended, nobody knows how".into(),
    }
}

/// Whether the instance may take requests, and where its first port answered.
async fn readiness(
    shared: &Shared,
    runtime: &dyn Runtime,
    plan: &InstancePlan,
    check: &Option<HealthCheck>,
    first_port: Option<u16>,
    known: Option<std::net::SocketAddr>,
) -> Result<Option<std::net::SocketAddr>, String> {
    let limit = Duration::from_secs(check.as_ref().map_or(1, |c| c.timeout_seconds).into());
    if let Some(check) = check {
        health::probe(&shared.env, runtime, plan, &check.probe, known, limit).await?;
    }
    match first_port {
        // With a check of its own, the port is looked for only until it is found.
        Some(port) if check.is_none() || known.is_none() => {
            health::connects(&shared.env, plan, port, known, limit).await.map(Some)
        }
        _ => Ok(None),
    }
}
