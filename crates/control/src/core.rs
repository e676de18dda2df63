//! The writer without its loop: takes inputs in order, decides each against the world, lets the reconcilers follow, and
//! packs what changed into transactions. Pure but for the clock and chance that it is handed, so that the simulator and the
//! tests can drive it by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use nexus_env::Rng;
use nexus_model::kind::*;
use nexus_model::plan::{HostReport, RoundTripReport};
use nexus_model::{AnyObject, ApiError, Code, Metadata, Name, Object, Timestamp, key};

use crate::audit::Trail;
use crate::autoscale::Autoscaler;
use crate::balance::Balance;
use crate::cells::{self, Cells};
use crate::decide::decide;
use crate::intent::{Accepted, Change, Intent};
use crate::rules;
use crate::scheduler::Scheduler;
use crate::step::{Dirty, Ops, Step, any_key};
use crate::world::{Part, Stored, World};

mod check;

/// Operations and bytes in one transaction; the store allows 128 and 1 MiB, two operations are the writer's own.
const MAX_OPS: usize = 120;
const MAX_BYTES: usize = 900 << 10;

/// Idempotency keys are remembered for a day, and at most so many.
const REMEMBER_FOR: Duration = Duration::from_secs(24 * 3600);
const REMEMBER_AT_MOST: usize = 20_000;

/// Reconcile steps after one round of inputs; what remains waits for the next round, so that inputs are not starved.
const STEPS_PER_ROUND: usize = 2_000;

/// Between two looks at drains to which nothing happens.
const DRAINS_SEEN_EVERY: Duration = Duration::from_secs(5);

/// Transactions after which a round ends likewise: nobody is answered before all of them are durable.
const PACKS_PER_ROUND: usize = 32;

/// What a group starts with.
#[derive(Debug, Clone)]
pub struct Bootstrap {
    /// The region, or `global` for the group that all regions share.
    pub region: Name,
    /// Apps are reached at `NAME.<domain>`.
    pub domain: String,
    pub zones: Vec<Name>,
    pub cells: Vec<Name>,
}

/// One transaction's worth of decisions, in order.
#[derive(Debug, Default)]
pub struct Pack {
    pub ops: Ops,
    bytes: usize,
}

impl Pack {
    fn has_room_for(&self, ops: &Ops) -> bool {
        let new = ops.keys().filter(|k| !self.ops.contains_key(*k)).count();
        let bytes: usize = ops.iter().map(|(k, v)| k.len() + v.as_ref().map_or(0, Bytes::len)).sum();
        self.ops.len() + new <= MAX_OPS && self.bytes + bytes <= MAX_BYTES
    }

    /// Bytes of its keys and values.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    fn add(&mut self, ops: Ops) {
        for (k, v) in ops {
            self.bytes += k.len() + v.as_ref().map_or(0, Bytes::len);
            self.ops.insert(k, v);
        }
    }
}

/// Runs work that may have a defect; answers the panic's text instead of passing it on. What a step had changed is taken
/// back while it unwinds.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
    })
}

/// Between the tries of an object whose reconciler panics.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// So many of a cell's objects that are set aside are named in its status.
const NAMED: usize = 10;

/// A fault that tests plant in an object's steps.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planted {
    Panics,
    /// Each step asks for another.
    Restless,
}

/// Objects whose reconciler panicked, each with its failures in a row and the time of its next try.
#[derive(Debug, Default)]
struct Quarantine {
    held: BTreeMap<Dirty, Duration>,
    failures: BTreeMap<Dirty, u32>,
    planted: BTreeMap<Dirty, Planted>,
}

impl Quarantine {
    fn holds(&self, item: &Dirty) -> bool {
        self.held.contains_key(item)
    }

    fn add(&mut self, item: Dirty, now: Duration) -> Duration {
        let failures = self.failures.entry(item.clone()).or_default();
        let wait = RETRY_FIRST.saturating_mul(1 << (*failures).min(10)).min(RETRY_LAST);
        *failures += 1;
        self.held.insert(item, now + wait);
        wait
    }

    fn due(&mut self, now: Duration) -> Vec<Dirty> {
        let due: Vec<Dirty> = self.held.iter().filter(|(_, at)| **at <= now).map(|(item, _)| item.clone()).collect();
        self.held.retain(|_, at| *at > now);
        due
    }

    /// What is set aside, also while its next try is due.
    fn all(&self) -> impl Iterator<Item = &Dirty> {
        self.failures.keys()
    }

    fn recovered(&mut self, item: &Dirty) {
        if !self.failures.is_empty() {
            self.failures.remove(item);
        }
    }
}

pub struct Core {
    pub world: World,
    pub cells: Cells,
    pub autoscaler: Autoscaler,
    bootstrap: Bootstrap,
    dirty: BTreeSet<Dirty>,
    /// What is left of the present pass over the dirty.
    pass: BTreeSet<Dirty>,
    quarantine: Quarantine,
    packs: Vec<Pack>,
    /// When this leader began to listen to regions, or was last held up itself.
    pub(crate) listening: Duration,
    pub(crate) ticked: Option<Duration>,
    /// When drains were last looked at although nothing happened.
    drains_seen: Duration,
    /// What hosts say of balancers' targets.
    balance: Balance,
    /// Differences that the invariant checker found since this leader began.
    pub violations: u64,
    /// The host that [`Core::check_on`] looked at last.
    checked: Option<Name>,
}

/// What a fleet begins with: an organization and project to work in, those of the cloud itself, and the first administrator.
fn tenants(step: &mut Step<'_>) {
    let fixed = |s: &str| s.parse::<Name>().expect("a well-formed name");
    let (default, system, admin) = (fixed("default"), fixed(SYSTEM_ORGANIZATION), fixed("admin"));
    for (organization, display_name) in [(&default, "Default"), (&system, "The cloud itself")] {
        if is_missing::<Organization>(step.world, organization) {
            let metadata = step.new_metadata(organization.clone(), None);
            let spec = OrganizationSpec { display_name: display_name.into(), ..OrganizationSpec::default() };
            step.put(Object::<Organization>::new(metadata, spec));
        }
    }
    for (project, organization) in [(fixed("default"), &default), (fixed(SYSTEM_PROJECT), &system)] {
        if is_missing::<Project>(step.world, &project) {
            let metadata = step.new_metadata(project, None);
            let mut spec = ProjectSpec { organization: organization.clone(), ..ProjectSpec::default() };
            spec.complete(None);
            step.put(Object::<Project>::new(metadata, spec));
        }
    }
    let within = |step: &Step<'_>, organization: &Name, name: &Name| Metadata {
        organization: Some(organization.clone()),
        ..step.new_metadata(name.clone(), None)
    };
    let metadata = within(step, &default, &admin);
    step.put(Object::<User>::new(metadata, UserSpec { display_name: "Administrator".into(), ..UserSpec::default() }));
    for (organization, name, role) in [(&default, "owners", "owner"), (&system, "operators", "fleet-operator")] {
        let subject = Subject { kind: SubjectKind::User, name: admin.clone(), organization: Some(default.clone()) };
        let spec = RoleBindingSpec { role: role.into(), project: None, subjects: vec![subject] };
        let metadata = within(step, organization, &fixed(name));
        step.put(Object::<RoleBinding>::new(metadata, spec));
    }
}

/// Whether nothing of that name is there, not even something that can't be read.
fn is_missing<K: Stored>(world: &World, name: &Name) -> bool {
    K::table(world).get(None, name).is_none() && world.refuse_unreadable::<K>(None, name).is_ok()
}

/// The moment at which an input is decided.
#[derive(Clone, Copy)]
pub struct Moment<'a> {
    pub now: Timestamp,
    pub monotonic: Duration,
    pub rng: &'a dyn Rng,
}

impl Core {
    /// `world` as loaded, without a scheduler. Its part says whether a region is one of a fleet.
    pub fn new(mut world: World, bootstrap: Bootstrap, cells: Cells) -> Self {
        world.domain = bootstrap.domain.clone();
        if bootstrap.region == GLOBAL {
            world.part = Part::Global;
        }
        let mut scheduler = Scheduler::new(bootstrap.region.clone());
        for host in world.hosts.live.values() {
            scheduler.set_host(host);
        }
        for instance in world.instances.all() {
            scheduler.set_instance(None, Some(instance));
        }
        world.scheduler = Some(scheduler);
        world.trail.get_or_insert_with(|| Trail::new(&bootstrap.region));
        Self {
            world,
            cells,
            autoscaler: Autoscaler::default(),
            bootstrap,
            dirty: BTreeSet::new(),
            pass: BTreeSet::new(),
            quarantine: Quarantine::default(),
            packs: Vec::new(),
            listening: Duration::ZERO,
            ticked: None,
            drains_seen: Duration::ZERO,
            balance: Balance::default(),
            violations: 0,
            checked: None,
        }
    }

    fn step<'a>(&'a mut self, at: Moment<'a>) -> Step<'a> {
        Step::new(&mut self.world, &mut self.dirty, at.now, at.rng, &self.bootstrap.region)
    }

    /// Runs one step and keeps what it changed.
    pub(crate) fn alone<T>(&mut self, at: Moment<'_>, work: impl FnOnce(&mut Step<'_>) -> T) -> T {
        let mut step = self.step(at);
        let answer = work(&mut step);
        let ops = step.finish();
        self.absorb(ops);
        answer
    }

    pub(crate) fn mark(&mut self, dirty: impl IntoIterator<Item = Dirty>) {
        self.dirty.extend(dirty);
    }

    /// The region, or `global`.
    pub fn region(&self) -> &Name {
        &self.bootstrap.region
    }

    fn absorb(&mut self, ops: Ops) {
        if ops.is_empty() {
            return;
        }
        match self.packs.last_mut() {
            Some(pack) if pack.has_room_for(&ops) => pack.add(ops),
            _ => {
                let mut pack = Pack::default();
                pack.add(ops);
                self.packs.push(pack);
            }
        }
    }

    /// Makes what a region can't be without, if it is not there.
    pub fn bootstrap(&mut self, at: Moment<'_>) {
        let bootstrap = self.bootstrap.clone();
        let mut step = self.step(at);
        let part = step.world.part;
        let has_fleet = part != Part::Region;
        let none = step.world.organizations.live.is_empty() && step.world.organizations.buried.is_empty();
        if has_fleet && none {
            tenants(&mut step);
        }
        if part == Part::Alone && is_missing::<Region>(step.world, &bootstrap.region) {
            let metadata = step.new_metadata(bootstrap.region.clone(), None);
            step.put(Object::<Region>::new(metadata, RegionSpec::default()));
        }
        for zone in &bootstrap.zones {
            if is_missing::<Zone>(step.world, zone) {
                let metadata = step.new_metadata(zone.clone(), None);
                step.put(Object::<Zone>::new(metadata, ZoneSpec::default()));
            }
        }
        for cell in &bootstrap.cells {
            if is_missing::<Cell>(step.world, cell) {
                let metadata = step.new_metadata(cell.clone(), None);
                step.put(Object::<Cell>::new(metadata, CellSpec::default()));
            }
        }
        cells::everything(&mut step);
        rules::delivery::everything(&mut step);
        let ops = step.finish();
        self.absorb(ops);
    }

    /// Decides an intent. What it changed is in the packs; the answer must wait for the last of them.
    pub fn intent(&mut self, intent: &Intent, at: Moment<'_>) -> Result<Accepted, ApiError> {
        guarded(|| self.decide(intent, at)).unwrap_or_else(|why| {
            tracing::error!(request = %intent.request_id, panic = why, "deciding a request panicked; it is refused");
            let detail = "a defect of the control plane; nothing was changed, its log has more under this request's id";
            Err(ApiError::new(Code::Internal, detail))
        })
    }

    /// Answers the plan as an object's status.
    fn rebalance(&mut self, intent: &Intent, most: u32, at: Moment<'_>) -> Accepted {
        let moves = rules::rebalance::plan(&mut self.step(at), most.min(rules::rebalance::MOST_MOVES));
        if !intent.dry_run {
            self.alone(at, |step| {
                step.request_id = Some(intent.request_id.clone());
                rules::rebalance::begin(step, &moves);
            });
        }
        let object = AnyObject {
            api_version: nexus_model::API_VERSION.to_owned(),
            kind: "Rebalance".to_owned(),
            metadata: Metadata::new(intent.target.name.clone(), None),
            spec: serde_json::Value::Null,
            status: serde_json::json!({"moves": moves}),
        };
        Accepted { object, created: false, replayed: false }
    }

    fn decide(&mut self, intent: &Intent, at: Moment<'_>) -> Result<Accepted, ApiError> {
        if let Change::Rebalance { most } = &intent.change {
            return Ok(self.rebalance(intent, *most, at));
        }
        let mut step = self.step(at);
        let accepted = decide(&mut step, intent)?;
        if intent.dry_run {
            return Self::rehearse(step, intent, accepted);
        }
        let ops = step.finish();
        self.absorb(ops);
        Ok(accepted)
    }

    /// A dry run: lets the reconcilers place what the intent wants, says what would refuse it, and takes all back.
    fn rehearse(mut step: Step<'_>, intent: &Intent, accepted: Accepted) -> Result<Accepted, ApiError> {
        let before = std::mem::take(step.dirty);
        let mut rounds = 0;
        while let Some(next) = step.dirty.pop_first().filter(|_| rounds < STEPS_PER_ROUND) {
            rules::reconcile(&mut step, &next);
            rounds += 1;
        }
        let place = (intent.target.project.clone(), intent.target.name.clone());
        if let Some(dirty) = accepted.object.metadata.deleting.is_none().then_some(Dirty::App(place.clone()))
            && intent.target.plural == App::PLURAL
        {
            rules::reconcile(&mut step, &dirty);
        }
        let mut refused = None;
        if intent.target.plural == App::PLURAL
            && let Some(app) = step.world.apps.live.get(&place)
        {
            let unplaced: Vec<_> =
                step.world.instances_of(app.metadata.uid).filter(|i| i.status.host.is_none()).collect();
            if let Some(first) = unplaced.first() {
                let n = unplaced.len();
                let detail = format!(
                    "{n} of {} replicas can't be placed: {}",
                    app.spec.wanted_replicas(&app.status),
                    first.status.message
                );
                refused = Some(ApiError::new(Code::Unschedulable, detail));
            }
        }
        *step.dirty = before;
        refused.map_or(Ok(accepted), Err)
    }

    /// Takes in a host's report; answers the host's epoch, or why it can't join.
    pub fn report(&mut self, report: &HostReport, at: Moment<'_>) -> Result<u64, String> {
        self.world.traffic.hear_usage(&report.usage, at.monotonic);
        if let Some(failing) = &report.failing {
            self.balance.hear(&report.host, failing, at.monotonic);
        }
        // A host may have news of hundreds of instances at once: more than one transaction takes.
        loop {
            let heard = guarded(|| {
                // Both fields are borrowed apart, because the cells look at the world through the step.
                let mut step = Step::new(&mut self.world, &mut self.dirty, at.now, at.rng, &self.bootstrap.region);
                let answer = self.cells.hear(&mut step, report, at.monotonic);
                (answer, step.finish())
            });
            let (answer, ops) = heard.map_err(|why| {
                tracing::error!(host = %report.host, panic = why, "taking in a host's report panicked");
                "a defect of the control plane: its log says more".to_owned()
            })?;
            self.absorb(ops);
            let (epoch, more) = answer?;
            if !more {
                return Ok(epoch);
            }
        }
    }

    /// Takes in how far a gateway is from hosts.
    pub fn round_trips(&mut self, report: &RoundTripReport, at: Moment<'_>) {
        self.with_cells(at, |cells, step| cells.hear_trips(step, report, at.monotonic));
    }

    /// Runs one step of the cells' and keeps what it changed; nothing, if it panics.
    fn with_cells(&mut self, at: Moment<'_>, work: impl FnOnce(&mut Cells, &mut Step<'_>)) {
        let ops = guarded(|| {
            let mut step = Step::new(&mut self.world, &mut self.dirty, at.now, at.rng, &self.bootstrap.region);
            work(&mut self.cells, &mut step);
            step.finish()
        });
        match ops {
            Ok(ops) => self.absorb(ops),
            Err(why) => tracing::error!(panic = why, "taking in round trips panicked"),
        }
    }

    /// Judges hosts. Called a few times a second.
    pub fn tick(&mut self, at: Moment<'_>) {
        let due: Vec<Dirty> = self.world.due(at.now).collect();
        self.dirty.extend(due);
        if self.world.part == Part::Global {
            self.judge_regions(at);
        }
        self.world.traffic.advance(at.monotonic);
        self.cells.begin(at.monotonic);
        self.cells.quarantined = self.quarantined_by_cell();
        self.with_cells(at, |cells, step| cells.keep_trips(step, at.monotonic));
        let cells: Vec<Name> = self.world.cells.live.keys().map(|(_, name)| name.clone()).collect();
        // Each by itself: a cell that can't be judged must not keep the others from it.
        for cell in cells {
            while self.judge(&cell, at) {}
        }
        if self.world.part != Part::Global {
            self.autoscale(at);
            self.look_at_balancers(at);
        }
        self.look_at_rollouts(at);
        self.look_at_drains(at);
    }

    /// As a new leader begins, for tests.
    #[doc(hidden)]
    pub fn forget_what_was_said(&mut self) {
        self.balance = Balance::default();
    }

    /// Writes down what has changed of balancers' targets.
    fn look_at_balancers(&mut self, at: Moment<'_>) {
        let ops = guarded(|| {
            let mut step = Step::new(&mut self.world, &mut self.dirty, at.now, at.rng, &self.bootstrap.region);
            self.balance.look(&mut step, at.monotonic);
            step.finish()
        });
        match ops {
            Ok(ops) => self.absorb(ops),
            Err(why) => tracing::error!(panic = why, "looking at load balancers' targets panicked"),
        }
    }

    /// Marks the drained hosts' apps now and then: an instance that does not become ready is no successor after some time.
    fn look_at_drains(&mut self, at: Moment<'_>) {
        if at.monotonic.saturating_sub(self.drains_seen) < DRAINS_SEEN_EVERY {
            return;
        }
        self.drains_seen = at.monotonic;
        let drained = self.world.hosts.live.values().filter(|host| host.spec.draining);
        let on = drained.flat_map(|host| self.world.instances_on(&host.metadata.name));
        let owners: BTreeSet<Dirty> =
            on.filter(|i| i.metadata.deleting.is_none()).map(rules::instance::owner).collect();
        self.dirty.extend(owners);
    }

    /// Requests wait for an app: one that sleeps is not to wait for the next tick.
    pub fn wake(&mut self, at: Moment<'_>) {
        if self.world.part != Part::Global {
            self.autoscale(at);
        }
    }

    /// Decides how many instances apps have, where that is the cloud's to decide.
    fn autoscale(&mut self, at: Moment<'_>) {
        for place in self.autoscaler.due(&self.world, at.monotonic) {
            let decided = guarded(|| {
                let Some(app) = self.world.apps.live.get(&place).cloned() else { return Ops::default() };
                let mut step = Step::new(&mut self.world, &mut self.dirty, at.now, at.rng, &self.bootstrap.region);
                self.autoscaler.decide(&mut step, &app, at.monotonic);
                step.finish()
            });
            match decided {
                Ok(ops) => self.absorb(ops),
                Err(why) => tracing::error!(?place, panic = why, "deciding about an app's instances panicked"),
            }
        }
        let mut step = Step::new(&mut self.world, &mut self.dirty, at.now, at.rng, &self.bootstrap.region);
        self.autoscaler.keep(&mut step);
        let ops = step.finish();
        self.absorb(ops);
    }

    /// Marks the apps whose rollouts have waited long enough for something, lack room in a quota, or answer too badly.
    fn look_at_rollouts(&mut self, at: Moment<'_>) {
        let world = &self.world;
        let due = world.rolling.iter().filter(|place| {
            let Some(app) = world.apps.live.get(*place) else { return false };
            let Some(status) = &app.status.rollout else { return false };
            rules::rollout::is_due(&app.spec.rollout, status, at.now)
                || !status.surge_refused.is_empty()
                || rules::app::errors(world, app, status).is_some()
        });
        self.dirty.extend(due.cloned().map(Dirty::App));
    }

    /// Judges hosts of one cell. True if more are left than fit in a step.
    fn judge(&mut self, cell: &Name, at: Moment<'_>) -> bool {
        let judged = guarded(|| {
            let mut step = Step::new(&mut self.world, &mut self.dirty, at.now, at.rng, &self.bootstrap.region);
            let more = self.cells.judge(&mut step, cell, at.monotonic);
            (more, step.finish())
        });
        match judged {
            Ok((more, ops)) => {
                self.absorb(ops);
                more
            }
            Err(why) => {
                tracing::error!(%cell, panic = why, "judging a cell's hosts panicked");
                false
            }
        }
    }

    /// Lets the reconcilers follow what changed. True if some work was left for the next round.
    ///
    /// Everything dirty gets one step before anything gets a second, so that an object which is never done starves nobody.
    /// One whose step panics is taken back, set aside and tried again later, ever more seldom: a poisoned object is its
    /// own trouble alone.
    pub fn reconcile(&mut self, at: Moment<'_>) -> bool {
        self.dirty.extend(self.quarantine.due(at.monotonic));
        let most = self.packs.len() + PACKS_PER_ROUND;
        for _ in 0..STEPS_PER_ROUND {
            if self.packs.len() >= most {
                return true;
            }
            if self.pass.is_empty() {
                self.pass = std::mem::take(&mut self.dirty);
            }
            let Some(next) = self.pass.pop_first() else { return false };
            if self.quarantine.holds(&next) {
                continue;
            }
            let planted = self.quarantine.planted.get(&next).copied();
            let stepped = guarded(|| {
                let mut step = self.step(at);
                assert!(planted != Some(Planted::Panics), "a planted fault");
                rules::reconcile(&mut step, &next);
                step.finish()
            });
            match stepped {
                Ok(ops) => {
                    self.quarantine.recovered(&next);
                    if planted == Some(Planted::Restless) {
                        self.dirty.insert(next);
                    }
                    self.absorb(ops);
                }
                Err(why) => self.set_aside(next, &why, at),
            }
        }
        !self.dirty.is_empty() || !self.pass.is_empty()
    }

    fn set_aside(&mut self, item: Dirty, why: &str, at: Moment<'_>) {
        let wait = self.quarantine.add(item.clone(), at.monotonic);
        tracing::error!(?item, panic = why, ?wait, "a reconciler panicked; the object is set aside");
        let world = &self.world;
        let regarding = match &item {
            Dirty::App((project, name)) => {
                world.apps.get(project.as_ref(), name).map(|o| (project.clone(), o.owner_ref()))
            }
            Dirty::Instance(uid) => world.instance(*uid).map(|o| (o.metadata.project.clone(), o.owner_ref())),
            Dirty::Host(name) => world.host(name).map(|o| (None, o.owner_ref())),
            Dirty::Usage(name) => world.usage(name).map(|o| (Some(name.clone()), o.owner_ref())),
            Dirty::Project(name) => world.project(name).map(|o| (None, o.owner_ref())),
            Dirty::Child((project, name)) => {
                let global = world.fleet().apps.get(project.as_ref(), name);
                global.map(|o| (project.clone(), o.owner_ref()))
            }
            Dirty::Job((project, name)) => {
                world.jobs.get(project.as_ref(), name).map(|o| (project.clone(), o.owner_ref()))
            }
            Dirty::Cron((project, name)) => {
                world.cron_jobs.get(project.as_ref(), name).map(|o| (project.clone(), o.owner_ref()))
            }
            Dirty::Nic(_) | Dirty::Peering(_) => rules::network::regarding(world, &item),
            Dirty::Buried(..) | Dirty::Room | Dirty::Event(_) | Dirty::Delivery(_) => None,
        };
        let Some((project, regarding)) = regarding else { return };
        let mut step = self.step(at);
        let message = "a defect of the control plane stops its reconciling; it is tried again, other objects go on";
        step.event(project.as_ref(), regarding, Severity::Warning, "Quarantined", message);
        let ops = step.finish();
        self.absorb(ops);
    }

    /// The objects that are set aside, by the cells that they have a part in; a few of each.
    fn quarantined_by_cell(&self) -> BTreeMap<Name, Vec<String>> {
        let mut found: BTreeMap<Name, Vec<String>> = BTreeMap::new();
        let world = &self.world;
        let cell_of = |i: &Object<Instance>| Some(world.host(i.status.host.as_ref()?)?.spec.cell.clone());
        for item in self.quarantine.all() {
            let (cells, named): (BTreeSet<Name>, String) = match item {
                Dirty::Host(name) => {
                    (world.host(name).map(|h| h.spec.cell.clone()).into_iter().collect(), format!("host {name}"))
                }
                Dirty::Instance(uid) => {
                    let Some(i) = world.instance(*uid) else { continue };
                    let project = i.metadata.project.as_ref().map_or("-", |p| p.as_str());
                    (cell_of(i).into_iter().collect(), format!("instance {project}/{}", i.metadata.name))
                }
                Dirty::App(place) => {
                    let Some(app) = world.apps.live.get(place) else { continue };
                    let project = place.0.as_ref().map_or("-", |p| p.as_str());
                    let cells = world.instances_of(app.metadata.uid).filter_map(cell_of).collect();
                    (cells, format!("app {project}/{}", place.1))
                }
                Dirty::Job(place) => {
                    let Some(job) = world.jobs.live.get(place) else { continue };
                    let project = place.0.as_ref().map_or("-", |p| p.as_str());
                    let cells = world.instances_of(job.metadata.uid).filter_map(cell_of).collect();
                    (cells, format!("job {project}/{}", place.1))
                }
                Dirty::Child(_) | Dirty::Usage(_) | Dirty::Project(_) | Dirty::Buried(..) | Dirty::Room => continue,
                Dirty::Cron(_) | Dirty::Nic(_) | Dirty::Peering(_) | Dirty::Event(_) | Dirty::Delivery(_) => continue,
            };
            for cell in cells {
                let named_here = found.entry(cell).or_default();
                if named_here.len() < NAMED {
                    named_here.push(named.clone());
                }
            }
        }
        found
    }

    /// What is set aside because its reconciler panics.
    pub fn quarantined(&self) -> usize {
        self.quarantine.held.len()
    }

    /// Plants a fault in every step for `item`, or takes it out: for tests and the simulator.
    #[doc(hidden)]
    pub fn plant(&mut self, item: Dirty, fault: Option<Planted>) {
        match fault {
            Some(fault) => {
                self.quarantine.planted.insert(item.clone(), fault);
                self.dirty.insert(item);
            }
            None => drop(self.quarantine.planted.remove(&item)),
        }
    }

    /// What is to be committed, in order.
    pub fn take_packs(&mut self) -> Vec<Pack> {
        let mut packs = std::mem::take(&mut self.packs);
        // What is decided upon a copy of the global group is committed with the copy's revision, not before it.
        if let Some(first) = packs.first_mut().filter(|_| self.world.global_revision > self.world.adopted) {
            self.world.adopted = self.world.global_revision;
            let value = serde_json::to_vec(&self.world.adopted).expect("a number is plain data");
            first.ops.insert(key::ADOPTED.to_owned(), Some(value.into()));
        }
        packs
    }

    /// How many packs are waiting: an answer given now depends on all of them.
    pub fn packs(&self) -> usize {
        self.packs.len()
    }

    /// Notes at which revision a pack was committed.
    pub fn committed(&mut self, pack: &Pack, revision: u64) {
        let trail = self.world.trail_mut();
        trail.revision = trail.revision.max(revision);
        for (key, value) in &pack.ops {
            // Nobody asks when a record was written, and there is no end of them.
            if key.starts_with(key::AUDIT) || key.starts_with(key::LOADS) {
                continue;
            }
            match value {
                Some(_) => self.world.revisions.insert(key.clone(), revision),
                None => self.world.revisions.remove(key),
            };
        }
    }

    /// The revision at which the object of an answer now stands.
    pub fn revision_of(&self, accepted: &Accepted) -> Option<u64> {
        any_key(&accepted.object).and_then(|key| self.world.revisions.get(&key).copied())
    }

    /// Forgets idempotency keys that are too old or too many. Called now and then.
    pub fn forget_old(&mut self, at: Moment<'_>) {
        let now = at.now.as_millis();
        let limit = i64::try_from(REMEMBER_FOR.as_millis()).expect("a day in milliseconds");
        let mut order: Vec<(i64, String)> = self.world.remembered.iter().map(|(k, r)| (r.at, k.clone())).collect();
        order.sort();
        let surplus = order.len().saturating_sub(REMEMBER_AT_MOST);
        let doomed: Vec<String> = order
            .into_iter()
            .enumerate()
            .filter(|(i, (at, _))| *i < surplus || now - at > limit)
            .map(|(_, (_, k))| k)
            .collect();
        for chunk in doomed.chunks(MAX_OPS) {
            let mut step = self.step(at);
            for place in chunk {
                step.forget(place);
            }
            let ops = step.finish();
            self.absorb(ops);
        }
        let mut step = self.step(at);
        rules::people::forget_ended(&mut step);
        let ops = step.finish();
        self.absorb(ops);
        let mut step = self.step(at);
        rules::delivery::forget_old(&mut step);
        let ops = step.finish();
        self.absorb(ops);
    }
}
