//! The writer without its loop: takes inputs in order, decides each against the world, lets the reconcilers follow, and
//! packs what changed into transactions. Pure but for the clock and chance that it is handed, so that the simulator and the
//! tests can drive it by hand.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use nexus_env::Rng;
use nexus_model::kind::*;
use nexus_model::plan::HostReport;
use nexus_model::{ApiError, Code, Name, Object, Timestamp};

use crate::cells::{self, Cells};
use crate::decide::{charge, decide};
use crate::intent::{Accepted, Intent};
use crate::rules;
use crate::scheduler::Scheduler;
use crate::step::{Dirty, Ops, Step, any_key};
use crate::world::World;

/// Operations and bytes in one transaction; the store allows 128 and 1 MiB, two operations are the writer's own.
const MAX_OPS: usize = 120;
const MAX_BYTES: usize = 900 << 10;

/// Idempotency keys are remembered for a day, and at most so many.
const REMEMBER_FOR: Duration = Duration::from_secs(24 * 3600);
const REMEMBER_AT_MOST: usize = 20_000;

/// Reconcile steps after one round of inputs; what remains waits for the next round, so that inputs are not starved.
const STEPS_PER_ROUND: usize = 2_000;

/// What a region starts with.
#[derive(Debug, Clone)]
pub struct Bootstrap {
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

    fn add(&mut self, ops: Ops) {
        for (k, v) in ops {
            self.bytes += k.len() + v.as_ref().map_or(0, Bytes::len);
            self.ops.insert(k, v);
        }
    }
}

pub struct Core {
    pub world: World,
    pub cells: Cells,
    bootstrap: Bootstrap,
    dirty: BTreeSet<Dirty>,
    packs: Vec<Pack>,
    /// Differences that the invariant checker found since this leader began.
    pub violations: u64,
}

/// The moment at which an input is decided.
#[derive(Clone, Copy)]
pub struct Moment<'a> {
    pub now: Timestamp,
    pub monotonic: Duration,
    pub rng: &'a dyn Rng,
}

impl Core {
    /// `world` as loaded, without a scheduler.
    pub fn new(mut world: World, bootstrap: Bootstrap, cells: Cells) -> Self {
        world.domain = bootstrap.domain.clone();
        let mut scheduler = Scheduler::default();
        for host in world.hosts.live.values() {
            scheduler.set_host(host);
        }
        for instance in world.instances.all() {
            scheduler.set_instance(None, Some(instance));
        }
        world.scheduler = Some(scheduler);
        Self { world, cells, bootstrap, dirty: BTreeSet::new(), packs: Vec::new(), violations: 0 }
    }

    fn step<'a>(&'a mut self, at: Moment<'a>) -> Step<'a> {
        Step::new(&mut self.world, &mut self.dirty, at.now, at.rng, &self.bootstrap.region)
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
        let fixed = |s: &str| s.parse::<Name>().expect("a well-formed name");
        let mut step = self.step(at);
        if step.world.organizations.live.is_empty() && step.world.organizations.buried.is_empty() {
            let organization = fixed("default");
            let metadata = step.new_metadata(organization.clone(), None);
            let spec = OrganizationSpec { display_name: "Default".into() };
            step.put(Object::<Organization>::new(metadata, spec));
            for project in ["default", SYSTEM_PROJECT] {
                let metadata = step.new_metadata(fixed(project), None);
                let spec = ProjectSpec { organization: organization.clone(), ..ProjectSpec::default() };
                step.put(Object::<Project>::new(metadata, spec));
            }
        }
        if step.world.regions.get(None, &bootstrap.region).is_none() {
            let metadata = step.new_metadata(bootstrap.region.clone(), None);
            step.put(Object::<Region>::new(metadata, RegionSpec::default()));
        }
        for zone in &bootstrap.zones {
            if step.world.zones.get(None, zone).is_none() {
                let metadata = step.new_metadata(zone.clone(), None);
                step.put(Object::<Zone>::new(metadata, ZoneSpec::default()));
            }
        }
        for cell in &bootstrap.cells {
            if step.world.cells.get(None, cell).is_none() {
                let metadata = step.new_metadata(cell.clone(), None);
                step.put(Object::<Cell>::new(metadata, CellSpec::default()));
            }
        }
        cells::everything(&mut step);
        let ops = step.finish();
        self.absorb(ops);
    }

    /// Decides an intent. What it changed is in the packs; the answer must wait for the last of them.
    pub fn intent(&mut self, intent: &Intent, at: Moment<'_>) -> Result<Accepted, ApiError> {
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
                let detail = format!("{n} of {} replicas can't be placed: {}", app.spec.replicas, first.status.message);
                refused = Some(ApiError::new(Code::Unschedulable, detail));
            }
        }
        *step.dirty = before;
        refused.map_or(Ok(accepted), Err)
    }

    /// Takes in a host's report; answers the host's epoch, or why it can't join.
    pub fn report(&mut self, report: &HostReport, at: Moment<'_>) -> Result<u64, String> {
        // Both fields are borrowed apart, because the cells look at the world through the step.
        let mut step = Step::new(&mut self.world, &mut self.dirty, at.now, at.rng, &self.bootstrap.region);
        let answer = self.cells.hear(&mut step, report, at.monotonic);
        let ops = step.finish();
        self.absorb(ops);
        answer
    }

    /// Judges hosts. Called a few times a second.
    pub fn tick(&mut self, at: Moment<'_>) {
        let mut step = Step::new(&mut self.world, &mut self.dirty, at.now, at.rng, &self.bootstrap.region);
        self.cells.judge(&mut step, at.monotonic);
        let ops = step.finish();
        self.absorb(ops);
    }

    /// Lets the reconcilers follow what changed. True if some work was left for the next round.
    pub fn reconcile(&mut self, at: Moment<'_>) -> bool {
        for _ in 0..STEPS_PER_ROUND {
            let Some(next) = self.dirty.pop_first() else { return false };
            let mut step = self.step(at);
            rules::reconcile(&mut step, &next);
            let ops = step.finish();
            self.absorb(ops);
        }
        !self.dirty.is_empty()
    }

    /// What is to be committed, in order.
    pub fn take_packs(&mut self) -> Vec<Pack> {
        std::mem::take(&mut self.packs)
    }

    /// How many packs are waiting: an answer given now depends on all of them.
    pub fn packs(&self) -> usize {
        self.packs.len()
    }

    /// Notes at which revision a pack was committed.
    pub fn committed(&mut self, pack: &Pack, revision: u64) {
        for (key, value) in &pack.ops {
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
    }

    /// Recounts what must agree with the rows: quota use per project, reservations per host. Answers each difference.
    pub fn check_invariants(&mut self) -> Vec<String> {
        let mut differences = Vec::new();
        for project in self.world.projects.live.values() {
            let mut sum = [0u64; 3];
            for app in self.world.apps.in_project(&project.metadata.name) {
                for (total, part) in sum.iter_mut().zip(charge(&app.spec)) {
                    *total = total.saturating_add(part);
                }
            }
            let used = project.status.used;
            let used = [u64::from(used.instances), u64::from(used.cpu.0), used.memory.0];
            if used != sum {
                let name = &project.metadata.name;
                differences.push(format!("project {name}: {used:?} counted as used, {sum:?} in use"));
            }
        }
        for host in self.world.hosts.live.values() {
            let name = &host.metadata.name;
            let sum = Scheduler::reserved(self.world.instances_on(name));
            if sum != host.status.reserved {
                differences
                    .push(format!("host {name}: {:?} counted as reserved, {sum:?} reserved", host.status.reserved));
            }
            let mut slots = BTreeSet::new();
            for i in self.world.instances_on(name) {
                if !slots.insert(i.status.slot) {
                    differences.push(format!("host {name}: slot {:?} is given twice", i.status.slot));
                }
            }
        }
        let oversold = self.world.scheduler.as_ref().map_or(0, |s| s.oversold);
        if oversold > 0 {
            differences.push(format!("{oversold} reservations did not fit when they were made"));
        }
        self.violations += differences.len() as u64;
        differences
    }
}
