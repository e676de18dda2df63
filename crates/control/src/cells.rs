//! Judges hosts by their heartbeats. What is heard lives in memory alone; only a change of a host's state is committed.
//!
//! A ready host that is silent for [`SUSPECT_AFTER`] gets nothing new; after [`DEAD_AFTER`] it is dead and its instances
//! run elsewhere. Three brakes keep a fault of ours from becoming an outage of theirs:
//!
//! * a new leader counts every host as heard when it took over, so it waits a full round before it judges; so does one
//!   that was itself held up (paused, or waiting for its disk), because heartbeats may be waiting for it to look;
//! * when more than a fifth of a cell's living hosts, and more than one, are silent at once, nobody of that cell is
//!   declared dead: the network or this server is the likelier culprit. The brake lets go when enough of them are back;
//!   an operator who knows better deletes the host;
//! * when the heartbeats of all hosts come slowly, because this server or its network has too much to do, both times are
//!   stretched by how slowly they come. Declaring hosts dead then would only add to what there is to do.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::time::Duration;

use nexus_model::Name;
use nexus_model::kind::{Cell, CellStatus, HostState, Severity};
use nexus_model::plan::{HostReport, InstanceReport, RoundTripReport};
use nexus_placement::{Telemetry, telemetry};

use crate::latency::{self, Latencies, differs};
use crate::rules::{host, instance, network};
use crate::step::{Dirty, Step};
use crate::surroundings::waits_for_latency;

pub const SUSPECT_AFTER: Duration = Duration::from_millis(2_500);
pub const DEAD_AFTER: Duration = Duration::from_millis(5_000);

/// A leader that did not come to judge for so long was held up itself.
const HELD_UP: Duration = Duration::from_millis(1_250);

/// Every host is heard so often, if this server keeps up.
const PACE: Duration = Duration::from_secs(1);
/// Fewer hosts tell nothing of this server's own pace.
const CROWD: usize = 10;
/// The times are stretched by no more.
const MOST_STRETCH: f64 = 10.0;
/// What is kept at each round of judging of what the rounds before have seen: about a second's worth.
const KEPT: f64 = 0.8;

/// How often a cell's load and blast radius are written down.
const FIGURES_EVERY: Duration = Duration::from_secs(5);

/// A host's loads are told to placement when they moved by so many thousandths.
const LOAD_STEP: u16 = 50;

#[derive(Debug)]
struct Heard {
    at: Duration,
    telemetry: Telemetry,
    /// What placement was told.
    load: u16,
}

/// How often hosts are heard that are heard at all. Those that vanish do not count, so it tells this server's own lateness.
#[derive(Debug, Default)]
struct Pace {
    /// The sum of the gaps between the heartbeats of a host, in seconds, and that of their squares: a mean by time, because a
    /// host that has news reports more often, and says nothing by that.
    gaps: f64,
    squares: f64,
    stretch: f64,
}

impl Pace {
    fn note(&mut self, gap: Duration) {
        let gap = gap.as_secs_f64();
        // Of a host that was away, its return says nothing.
        if gap < DEAD_AFTER.as_secs_f64() * self.stretch() {
            self.gaps += gap;
            self.squares += gap * gap;
        }
    }

    fn turn(&mut self, hosts: usize) {
        let was = self.stretch();
        let mean = if self.gaps > 0.0 && hosts >= CROWD { self.squares / self.gaps } else { 0.0 };
        self.stretch = mean / PACE.as_secs_f64();
        (self.gaps, self.squares) = (self.gaps * KEPT, self.squares * KEPT);
        if self.stretch() > 2.0 && was <= 2.0 {
            tracing::warn!(
                every_s = mean,
                "heartbeats of all hosts come late: their silence is judged by longer times"
            );
        }
    }

    /// By how much the times are stretched.
    fn stretch(&self) -> f64 {
        self.stretch.clamp(1.0, MOST_STRETCH)
    }
}

/// What this server has heard since it leads.
#[derive(Debug)]
pub struct Cells {
    /// When each cell's load and blast radius were last refreshed.
    told: BTreeMap<Name, Duration>,
    since: Duration,
    judged: Duration,
    pace: Pace,
    heard: BTreeMap<Name, Heard>,
    latencies: Latencies,
    /// Whether rows of hosts were looked for of which no gateway tells any more.
    swept: bool,
    /// Names of the objects that are set aside, by cell.
    pub quarantined: BTreeMap<Name, Vec<String>>,
    /// Who judges: written into the cells' statuses.
    holder: String,
    epoch: u64,
}

impl Cells {
    pub fn new(now: Duration, holder: String, epoch: u64) -> Self {
        let (told, heard, quarantined, latencies, swept) = Default::default();
        Self {
            told,
            since: now,
            judged: now,
            pace: Pace::default(),
            heard,
            latencies,
            swept,
            quarantined,
            holder,
            epoch,
        }
    }

    fn silence(&self, host: &Name, now: Duration) -> Duration {
        now.saturating_sub(self.heard.get(host).map_or(self.since, |h| h.at.max(self.since)))
    }

    /// Notes that a heartbeat has come at `at`, though nobody has looked at it yet: a host is not silent because its
    /// report waits for the writer.
    pub fn arrived(&mut self, host: &Name, at: Duration) {
        if let Some(heard) = self.heard.get_mut(host) {
            self.pace.note(at.saturating_sub(heard.at));
            heard.at = heard.at.max(at);
        }
    }

    /// Takes in a heartbeat that came at `now`. Answers the host's epoch, and whether the rest of the report is to be taken in
    /// by another step.
    pub fn hear(&mut self, step: &mut Step<'_>, report: &HostReport, now: Duration) -> Result<(u64, bool), String> {
        host::join(step, report)?;
        let telemetry = telemetry_of(report, self.latencies.lowest(&report.host));
        let heard = self.heard.entry(report.host.clone()).or_insert(Heard { at: now, telemetry, load: 0 });
        self.pace.note(now.saturating_sub(heard.at));
        heard.at = heard.at.max(now);
        heard.telemetry = telemetry;
        tell_load(step, &report.host, heard, Duration::ZERO);
        host::set_state(step, &report.host, HostState::Ready, "its agent reports");
        let epoch = step.world.host(&report.host).map_or(0, |h| h.status.epoch);
        network::nic::confirm(step, &report.host, report.networks);
        // Hosts say the same every second. Comparing it with ten or a hundred rows each time would be most of the work of
        // a large region's writer.
        let fingerprint = BuildHasherDefault::<DefaultHasher>::new().hash_one((report.applied, &report.instances));
        if step.world.settled.get(&report.host) != Some(&fingerprint) && self.observe(step, report) {
            step.world.settled.insert(report.host.clone(), fingerprint);
        }
        // Nothing is left over if the step became long with the last of it; then the next finds nothing to do.
        Ok((epoch, step.is_long()))
    }

    /// Takes in what a gateway has measured.
    pub fn hear_trips(&mut self, step: &mut Step<'_>, report: &RoundTripReport, now: Duration) {
        let told = self.latencies.hear(report, now, |host| step.world.host(host).is_some());
        self.tell_trips(step, &told);
    }

    /// Forgets round trips that were not renewed, and writes down what has changed, as much as fits in a step. Called after
    /// [`Cells::begin`].
    pub fn keep_trips(&mut self, step: &mut Step<'_>, now: Duration) {
        let hosts = step.world.hosts.live.len();
        let poorer = self.latencies.expire(now, hosts, |host| step.world.host(host).is_some());
        self.tell_trips(step, &poorer);
        if !self.swept && now.saturating_sub(self.since) >= latency::KEPT {
            self.swept = true;
            let told = step.world.hosts.live.values().filter(|host| !host.status.round_trips.is_empty());
            told.for_each(|host| self.latencies.look_at(host.metadata.name.clone()));
        }
        for name in self.latencies.to_write(now) {
            if step.is_long() {
                return;
            }
            let trips = self.latencies.of(&name);
            let host = step.world.host(&name).filter(|host| differs(&host.status.round_trips, &trips)).cloned();
            self.latencies.looked_at(&name, host.is_some(), now);
            if let Some(mut host) = host {
                host.status.round_trip_us = trips.iter().map(|trip| trip.us).min();
                host.status.round_trips = trips;
                step.put(host);
            }
        }
    }

    /// Tells placement of hosts' round trips, and asks those again who wait for near ones.
    fn tell_trips(&self, step: &mut Step<'_>, hosts: &[Name]) {
        let Some(scheduler) = step.world.scheduler.as_mut().filter(|_| !hosts.is_empty()) else { return };
        for host in hosts {
            scheduler.set_rtt(host, self.latencies.lowest(host));
        }
        let waits = |uid| step.world.instance(uid).is_some_and(waits_for_latency);
        if step.world.scheduler.as_ref().is_some_and(|s| s.first_waiting().any(waits)) {
            step.mark(Dirty::Room);
        }
    }

    /// Takes in what a host says of its instances, as much as fits in a step. True if that was no news and stays none until a
    /// row of an instance there changes.
    fn observe(&self, step: &mut Step<'_>, report: &HostReport) -> bool {
        let mut settled = true;
        let mine: Vec<_> = step.world.on_host.get(&report.host).into_iter().flatten().copied().collect();
        let mut all: Vec<&InstanceReport> = report.instances.iter().collect();
        all.sort_by_key(|told| told.uid);
        for uid in mine {
            if step.is_long() {
                return false;
            }
            let Some(i) = step.world.instance(uid) else { continue };
            let told = all.binary_search_by_key(&uid, |told| told.uid).ok().map(|at| all[at]);
            if i.metadata.deleting.is_none() {
                // Nearly always nothing is new; that must cost nothing.
                if let Some(told) = told.filter(|told| told.epoch == i.status.epoch && instance::is_news(i, told)) {
                    let i = i.clone();
                    instance::observe(step, &i, told);
                    settled = false;
                }
                continue;
            }
            // When it may be erased depends on what has been committed, too.
            settled = false;
            if told.is_none() {
                // Gone is believed only of a host that has applied a plan in which it is to be gone.
                let key = crate::world::key_of(i);
                let buried_at = step.world.revisions.get(&key).copied();
                if buried_at.is_some_and(|at| report.applied.is_some_and(|applied| applied >= at)) {
                    let i = i.clone();
                    instance::erase(step, &i);
                }
            }
        }
        settled
    }

    /// Begins a round of judging. Called a few times a second; every cell is judged after it, by [`Cells::judge`].
    pub fn begin(&mut self, now: Duration) {
        if now.saturating_sub(self.judged) > HELD_UP {
            self.since = now;
        }
        self.judged = now;
        self.pace.turn(self.heard.len());
    }

    /// Judges the hosts of one cell, as many as fit in a step. True if more are left for another.
    pub fn judge(&mut self, step: &mut Step<'_>, cell: &Name, now: Duration) -> bool {
        let scheduler = step.world.scheduler.as_ref().expect("only the writer judges");
        let known = scheduler.hosts_in(cell).filter_map(|name| step.world.host(name));
        let hosts: Vec<(Name, HostState)> = known.map(|h| (h.metadata.name.clone(), h.status.state)).collect();
        let living = hosts.iter().filter(|(_, s)| *s != HostState::Dead);
        let [suspect_after, dead_after] = [SUSPECT_AFTER, DEAD_AFTER].map(|after| after.mul_f64(self.pace.stretch()));
        let silent: Vec<(&Name, HostState, Duration)> = living
            .clone()
            .map(|(name, state)| (name, *state, self.silence(name, now)))
            .filter(|(_, _, silence)| *silence >= suspect_after)
            .collect();
        // Those that fell silent with the first of them count before their own time is up.
        let vanished = silent.iter().any(|(_, _, silence)| *silence >= dead_after);
        let brake = vanished && silent.len() > (living.count() / 5).max(1);
        for (name, state, silence) in silent {
            if step.is_long() {
                return true;
            }
            if let Some(heard) = self.heard.get_mut(name).filter(|_| silence >= telemetry::FRESH) {
                tell_load(step, name, heard, silence);
            }
            let seconds = silence.as_secs_f32();
            if silence >= dead_after && !brake {
                host::set_state(step, name, HostState::Dead, &format!("silent for {seconds:.1} s"));
            } else if state == HostState::Ready {
                host::set_state(step, name, HostState::Suspect, "its heartbeats are late");
            }
        }
        self.tell(step, cell, hosts.len(), brake, now);
        false
    }

    fn tell(&mut self, step: &mut Step<'_>, name: &Name, hosts: usize, brake: bool, now: Duration) {
        let Some(cell) = step.world.cells.get(None, name).cloned() else { return };
        let scheduler = step.world.scheduler.as_ref().expect("only the writer judges");
        let in_cell = scheduler.hosts_in(name).filter_map(|name| step.world.host(name));
        let ready = in_cell.filter(|h| h.status.state == HostState::Ready).count();
        let due = self.told.get(name).is_none_or(|then| now.saturating_sub(*then) >= FIGURES_EVERY);
        let (reserved_percent, blast_radius) = if due {
            self.told.insert(name.clone(), now);
            scheduler.load_of(name)
        } else {
            (cell.status.reserved_percent, cell.status.blast_radius)
        };
        let status = CellStatus {
            reserved_percent,
            blast_radius,
            hosts: u32::try_from(hosts).unwrap_or(u32::MAX),
            ready_hosts: u32::try_from(ready).unwrap_or(u32::MAX),
            holder: Some(self.holder.clone()),
            epoch: self.epoch,
            brake,
            quarantined: self.quarantined.get(name).cloned().unwrap_or_default(),
            conditions: cell.status.conditions.clone(),
        };
        if status == cell.status {
            return;
        }
        if brake && !cell.status.brake {
            let message = "so many hosts vanished at once that none is declared dead; see `nexus get hosts`";
            step.event(None, cell.owner_ref(), Severity::Warning, "Brake", message);
        }
        step.put(nexus_model::Object::<Cell> { status, ..cell });
    }

    /// Hosts that this leader has heard within the time that makes a host suspect.
    pub fn active(&self, now: Duration) -> usize {
        self.heard.values().filter(|h| now.saturating_sub(h.at) < SUSPECT_AFTER).count()
    }
}

/// What a host measures of itself, in the words of placement.
fn telemetry_of(report: &HostReport, rtt: Option<u32>) -> Telemetry {
    let said = &report.telemetry;
    Telemetry {
        busy: Some((report.load.clamp(0.0, 1.0) * 1000.0) as u16),
        cpu_pressure: said.cpu_pressure,
        memory_pressure: said.memory_pressure,
        io_pressure: said.io_pressure,
        disk: said.disk_us,
        rtt,
    }
}

/// Tells placement how burdened a host is, if that has changed.
fn tell_load(step: &mut Step<'_>, host: &Name, heard: &mut Heard, age: Duration) {
    let load = heard.telemetry.burden(age).0;
    if heard.load.abs_diff(load) >= LOAD_STEP {
        heard.load = load;
        if let Some(scheduler) = &mut step.world.scheduler {
            scheduler.set_load(host, load);
        }
    }
}

/// Everything that a new leader should look at once.
pub fn everything(step: &mut Step<'_>) {
    let apps: Vec<_> = step.world.apps.live.keys().cloned().collect();
    let hosts: Vec<_> = step.world.hosts.live.keys().map(|(_, name)| name.clone()).collect();
    let buried: Vec<Dirty> = {
        use nexus_model::kind::{App, CronJob, Job, Kind, Organization, Project};
        let w = &step.world;
        let apps = w.apps.buried.keys().map(|uid| Dirty::Buried(App::PLURAL, *uid));
        let projects = w.projects.buried.keys().map(|uid| Dirty::Buried(Project::PLURAL, *uid));
        let organizations = w.organizations.buried.keys().map(|uid| Dirty::Buried(Organization::PLURAL, *uid));
        let jobs = w.jobs.buried.keys().map(|uid| Dirty::Buried(Job::PLURAL, *uid));
        let crons = w.cron_jobs.buried.keys().map(|uid| Dirty::Buried(CronJob::PLURAL, *uid));
        apps.chain(projects).chain(organizations).chain(jobs).chain(crons).collect()
    };
    let usages: Vec<_> = step.world.usages.live.keys().map(|(_, name)| name.clone()).collect();
    step.dirty.extend(usages.into_iter().map(Dirty::Usage));
    step.dirty.extend(apps.into_iter().map(Dirty::App));
    step.dirty.extend(hosts.into_iter().map(Dirty::Host));
    step.dirty.extend(buried);
    let jobs: Vec<_> = step.world.jobs.live.keys().cloned().map(Dirty::Job).collect();
    let crons: Vec<_> = step.world.cron_jobs.live.keys().cloned().map(Dirty::Cron).collect();
    step.dirty.extend(jobs.into_iter().chain(crons));
    let nics: Vec<_> = step.world.nics.all().map(|nic| Dirty::Nic(nic.metadata.uid)).collect();
    step.dirty.extend(nics);
    let peerings: Vec<_> = step.world.peerings.live.keys().cloned().map(Dirty::Peering).collect();
    step.dirty.extend(peerings);
}
