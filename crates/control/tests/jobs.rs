//! Jobs and cron jobs in virtual time: hosts that run work to its end, die, or are drained; clocks that change; leaders that were
//! away.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::{create, image, intent, name};
use nexus_control::cells::{Cells, DEAD_AFTER};
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Intent};
use nexus_control::world::World;
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::plan::{HostReport, InstanceReport};
use nexus_model::{ApiError, Bytes, Code, MilliCpu, Name, Object, Timestamp, Uid};
use nexus_store::{KeyValue, Revision};
use proptest::prelude::*;
use serde_json::json;

const S: Duration = Duration::from_secs(1);

/// How long an instance runs, and its exit code; it is asked for its job, its index and how many of its job ran before it.
type Work = Box<dyn Fn(&str, Option<u32>, usize) -> (Duration, i32)>;

struct Lab {
    core: Core,
    rng: SeededRng,
    bootstrap: Bootstrap,
    /// Of the first moment, in milliseconds since the epoch.
    epoch: i64,
    at: Duration,
    revision: u64,
    committed: BTreeMap<String, (Vec<u8>, u64)>,
    alive: BTreeSet<Name>,
    work: Work,
    /// What ran: its host, its job, its index, since when, how long, and how it ends.
    runs: BTreeMap<Uid, (Name, Duration, Duration, i32)>,
    /// Every start, in order.
    starts: Vec<(String, Option<u32>)>,
}

impl Lab {
    fn new() -> Self {
        Self::at("2025-01-01T00:00:00Z")
    }

    fn at(epoch: &str) -> Self {
        let epoch: Timestamp = serde_json::from_value(json!(epoch)).unwrap();
        let bootstrap = Bootstrap {
            region: name("local"),
            domain: "localhost".into(),
            zones: vec![name("zone-a")],
            cells: vec![name("cell-a")],
        };
        let core = Core::new(World::default(), bootstrap.clone(), Cells::new(Duration::ZERO, "server-a".into(), 1));
        let mut lab = Self {
            core,
            rng: SeededRng::new(11),
            bootstrap,
            epoch: epoch.as_millis(),
            at: Duration::ZERO,
            revision: 0,
            committed: BTreeMap::new(),
            alive: (1..=3).map(|n| name(&format!("host-{n}"))).collect(),
            work: Box::new(|_, _, _| (2 * S, 0)),
            runs: BTreeMap::new(),
            starts: Vec::new(),
        };
        lab.with(|core, at| core.bootstrap(at));
        lab.pass(S);
        lab.create::<Image>("tools", image("tools")).unwrap();
        lab
    }

    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.epoch + self.at.as_millis() as i64)
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let at = Moment { now: self.now(), monotonic: self.at, rng: &self.rng };
        let answer = f(&mut self.core, at);
        while self.core.reconcile(at) {}
        for pack in self.core.take_packs() {
            assert!(pack.ops.len() <= 126, "a transaction has {} operations", pack.ops.len());
            self.revision += 1;
            for (key, value) in &pack.ops {
                match value {
                    Some(value) => self.committed.insert(key.clone(), (value.to_vec(), self.revision)),
                    None => self.committed.remove(key),
                };
            }
            self.core.committed(&pack, self.revision);
        }
        // Quota is counted anew from the rows, each time.
        assert_eq!(self.core.check_invariants(), Vec::<String>::new());
        assert_eq!(self.core.quarantined(), 0);
        answer
    }

    /// Another server leads, and knows what was committed.
    fn change_leader(&mut self) {
        let mut world = World::default();
        for (key, (value, revision)) in &self.committed {
            let revision = Revision(*revision);
            let (key, value) = (key.clone().into(), value.clone().into());
            world.take_in(&KeyValue { key, value, create_revision: revision, mod_revision: revision }).unwrap();
        }
        self.core = Core::new(world, self.bootstrap.clone(), Cells::new(self.at, "server-b".into(), 2));
        self.with(|core, at| core.bootstrap(at));
    }

    fn report(&mut self, host: &Name) -> HostReport {
        let n = host.as_str().rsplit_once('-').unwrap().1.parse().unwrap();
        let (memory, scratch) = (Bytes(2 << 30), Bytes(10 << 30));
        let capacity = Capacity { cpu: MilliCpu(2000), memory, scratch, instances: 100 };
        let spec = common::host("zone-a", "cell-a", n, capacity);
        let here: Vec<_> =
            self.core.world.instances_on(host).filter(|i| i.metadata.deleting.is_none()).cloned().collect();
        let mut instances = Vec::new();
        for i in here {
            let index = i.spec.job.and_then(|j| j.index);
            let known = self.runs.get(&i.metadata.uid).cloned();
            let (_, since, lasts, code) = known.unwrap_or_else(|| {
                let job = i.spec.app.to_string();
                let before = self.starts.iter().filter(|(j, i)| *j == job && *i == index).count();
                let (lasts, code) = (self.work)(&job, index, before);
                self.starts.push((job, index));
                let run = (host.clone(), self.at, lasts, code);
                self.runs.insert(i.metadata.uid, run.clone());
                run
            });
            let over = self.at >= since + lasts;
            instances.push(InstanceReport {
                uid: i.metadata.uid,
                epoch: i.status.epoch,
                phase: if over { InstancePhase::Exited } else { InstancePhase::Running },
                ready: !over,
                endpoint: None,
                restarts: 0,
                started: None,
                exit_code: over.then_some(code),
                message: if over { format!("it exited with {code}") } else { String::new() },
                parts: Vec::new(),
            });
        }
        HostReport { instances, ..common::report(host, spec, self.revision, []) }
    }

    /// Lets time pass in steps, each with a report of every living host.
    fn steps(&mut self, time: Duration, step: Duration) {
        let end = self.at + time;
        while self.at < end {
            self.at = (self.at + step).min(end);
            for host in self.alive.clone() {
                let report = self.report(&host);
                self.with(|core, at| core.report(&report, at)).unwrap();
            }
            self.with(|core, at| core.tick(at));
        }
    }

    fn pass(&mut self, time: Duration) {
        self.steps(time, Duration::from_millis(500));
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    fn create<K: Kind>(&mut self, object: &str, spec: K::Spec) -> Result<Accepted, ApiError> {
        let project = matches!(K::SCOPE, Scope::Project).then_some("default");
        self.submit(&create::<K>(project, object, spec))
    }

    fn change<K: Kind>(&mut self, object: &str, change: Change) -> Result<Accepted, ApiError> {
        let project = matches!(K::SCOPE, Scope::Project).then_some("default");
        self.submit(&intent(K::PLURAL, project, object, change))
    }

    fn patch<K: Kind>(&mut self, object: &str, spec: serde_json::Value) {
        self.change::<K>(object, Change::Patch { patch: json!({ "spec": spec }) }).unwrap();
    }

    fn job(&self, job: &str) -> &Object<Job> {
        self.core.world.jobs.get(Some(&name("default")), &name(job)).unwrap_or_else(|| panic!("no job {job}"))
    }

    fn cron(&self, cron: &str) -> &Object<CronJob> {
        self.core.world.cron_jobs.get(Some(&name("default")), &name(cron)).unwrap()
    }

    fn instances(&self, job: &str) -> Vec<Object<Instance>> {
        self.core.world.instances_of(self.job(job).metadata.uid).cloned().collect()
    }

    fn used(&self) -> u32 {
        self.core.world.usage(&name("default")).map_or(0, |u| u.status.used.instances)
    }

    fn why(&self, job: &str) -> String {
        self.job(job).status.conditions[0].reason.clone()
    }

    /// For when the jobs of a cron job were due, in order, without the date's year and the seconds.
    fn due(&self) -> Vec<String> {
        let jobs = self.core.world.jobs.live.values();
        let mut due: Vec<_> = jobs.filter_map(|j| j.metadata.annotations.get("scheduled-at").cloned()).collect();
        due.sort();
        due.iter().map(|at| at[5..16].to_owned()).collect()
    }
}

fn job() -> JobSpec {
    let template = Template { image: name("tools"), ..Template::default() };
    JobSpec { template, ..JobSpec::default() }
}

fn cron(schedule: &str) -> CronJobSpec {
    CronJobSpec {
        schedule: schedule.into(),
        successful_history: 100,
        failed_history: 100,
        job: job(),
        ..CronJobSpec::default()
    }
}

#[test]
fn an_indexed_job_does_every_part_once_and_gives_its_quota_back_when_it_finishes() {
    let mut lab = Lab::new();
    lab.create::<Job>("parts", JobSpec { completions: 7, parallelism: 3, indexed: true, ..job() }).unwrap();
    assert_eq!(lab.used(), 3);
    let mut most = 0;
    for _ in 0..40 {
        lab.pass(Duration::from_millis(500));
        most = most.max(lab.job("parts").status.active);
    }
    let job = lab.job("parts");
    assert_eq!((job.status.phase, job.status.succeeded, job.status.failed), (JobPhase::Complete, 7, 0));
    assert_eq!((job.status.completed_indexes.as_str(), most), ("0-6", 3));
    assert_eq!(lab.used(), 0);
    let mut indexes: Vec<_> = lab.starts.iter().map(|(_, index)| index.unwrap()).collect();
    indexes.sort_unstable();
    assert_eq!(indexes, [0, 1, 2, 3, 4, 5, 6]);
    let kept = lab.instances("parts");
    assert_eq!(kept.len(), 7);
    for i in &kept {
        let index = i.spec.job.unwrap().index.unwrap().to_string();
        assert_eq!(i.spec.template.env["NEXUS_JOB_INDEX"], index);
        assert_eq!((i.status.phase, i.status.exit_code), (InstancePhase::Exited, Some(0)));
    }
    // What has ended takes no room, though its row and its output stay.
    let reserved: u32 = lab.core.world.hosts.live.values().map(|h| h.status.reserved.instances).sum();
    assert_eq!(reserved, 0);
    // A day later nothing of it is left.
    lab.steps(Duration::from_secs(86_500), Duration::from_secs(600));
    assert!(lab.core.world.jobs.live.is_empty());
    lab.pass(3 * S);
    assert!(lab.core.world.jobs.buried.is_empty() && lab.core.world.instances.all().next().is_none());
}

#[test]
fn failures_are_tried_again_after_growing_pauses_until_there_are_too_many() {
    let mut lab = Lab::new();
    lab.work = Box::new(|_, _, _| (S, 3));
    lab.create::<Job>("bad", JobSpec { backoff_limit: 3, ..job() }).unwrap();
    let mut begun = Vec::new();
    for _ in 0..60 {
        lab.pass(Duration::from_millis(500));
        if lab.starts.len() > begun.len() {
            begun.push(lab.at);
        }
    }
    let job = lab.job("bad");
    assert_eq!((job.status.phase, job.status.failed, job.status.succeeded), (JobPhase::Failed, 4, 0));
    assert_eq!(lab.why("bad"), "BackoffLimitExceeded");
    assert!(job.status.conditions[0].message.contains("it exited with 3"), "{:?}", job.status.conditions);
    assert_eq!(job.status.ends.iter().map(|e| e.exit_code).collect::<Vec<_>>(), [Some(3); 4]);
    // One second of work before each of the pauses: 1, 2 and 4 s.
    let pauses: Vec<_> = begun.windows(2).map(|w| (w[1] - w[0]).as_secs()).collect();
    assert!(pauses[0] >= 2 && pauses[1] >= 3 && pauses[2] >= 5 && pauses[2] <= 8, "{pauses:?}");
    assert_eq!(lab.used(), 0);
}

#[test]
fn a_failure_of_one_part_is_made_good_by_its_next_try() {
    let mut lab = Lab::new();
    lab.work = Box::new(|_, index, before| (S, i32::from(index == Some(2) && before == 0)));
    lab.create::<Job>("parts", JobSpec { completions: 4, parallelism: 4, indexed: true, ..job() }).unwrap();
    lab.pass(15 * S);
    let job = lab.job("parts");
    assert_eq!((job.status.phase, job.status.succeeded, job.status.failed), (JobPhase::Complete, 4, 1));
    assert_eq!(lab.starts.iter().filter(|(_, i)| *i == Some(2)).count(), 2);
    assert_eq!(lab.starts.len(), 5);
}

#[test]
fn a_deadline_and_a_cancel_end_what_runs() {
    let mut lab = Lab::new();
    lab.work = Box::new(|_, _, _| (1000 * S, 0));
    lab.create::<Job>("slow", JobSpec { active_deadline_seconds: Some(20), ..job() }).unwrap();
    lab.create::<Job>("unwanted", JobSpec { parallelism: 2, completions: 2, ..job() }).unwrap();
    lab.pass(10 * S);
    assert_eq!((lab.job("slow").status.phase, lab.used()), (JobPhase::Active, 3));
    lab.patch::<Job>("unwanted", json!({"cancelled": true}));
    assert_eq!((lab.why("unwanted").as_str(), lab.used()), ("Cancelled", 1));
    lab.pass(15 * S);
    assert_eq!((lab.why("slow").as_str(), lab.used()), ("DeadlineExceeded", 0));
    assert!(lab.instances("slow").is_empty() && lab.instances("unwanted").is_empty());
    lab.pass(2 * S);
    assert_eq!(lab.core.world.instances.all().count(), 0);
    let error = lab.change::<Job>("slow", Change::Patch { patch: json!({"spec": {"completions": 5}}) }).unwrap_err();
    assert_eq!(error.code, Code::Invalid);
}

#[test]
fn what_runs_on_a_dead_or_drained_host_runs_again_and_what_succeeded_there_counts() {
    let mut lab = Lab::new();
    lab.work = Box::new(|_, index, before| (if index == Some(0) { S } else { 8 * S * (before as u32 + 1) }, 0));
    lab.create::<Job>("parts", JobSpec { completions: 4, parallelism: 4, indexed: true, backoff_limit: 0, ..job() })
        .unwrap();
    lab.pass(3 * S);
    assert_eq!(lab.job("parts").status.completed_indexes, "0");
    let host_of = |lab: &Lab, index| {
        let found = lab.instances("parts").into_iter().find(|i| i.spec.job.unwrap().index == Some(index));
        found.and_then(|i| i.status.host).unwrap()
    };
    let victim = host_of(&lab, 1);
    let lost = lab.instances("parts").iter().filter(|i| i.status.host.as_ref() == Some(&victim)).count();
    lab.alive.remove(&victim);
    lab.pass(DEAD_AFTER + S);
    assert_ne!(host_of(&lab, 1), victim);
    let drained = host_of(&lab, 1);
    lab.patch::<Host>(drained.as_str(), json!({"draining": true, "cordoned": true}));
    lab.pass(S);
    assert_ne!(host_of(&lab, 1), drained);
    lab.pass(40 * S);
    let job = lab.job("parts");
    assert_eq!(
        (job.status.phase, job.status.succeeded, job.status.failed),
        (JobPhase::Complete, 4, 0),
        "{lost} were lost"
    );
    assert_eq!(lab.starts.iter().filter(|(_, i)| *i == Some(0)).count(), 1, "a success is kept");
    assert!(lab.starts.iter().filter(|(_, i)| *i == Some(1)).count() >= 3);
    // The dead host returns and tells of an end that is nobody's any more.
    lab.alive.insert(victim);
    lab.pass(3 * S);
    assert_eq!(lab.job("parts").status.succeeded, 4);
}

#[test]
fn a_new_leader_goes_on_where_the_old_one_was() {
    let mut lab = Lab::new();
    lab.create::<Job>("parts", JobSpec { completions: 9, parallelism: 2, indexed: true, ..job() }).unwrap();
    for _ in 0..30 {
        lab.pass(S);
        lab.change_leader();
    }
    assert_eq!((lab.job("parts").status.phase, lab.starts.len()), (JobPhase::Complete, 9));
}

#[test]
fn a_job_is_refused_beyond_the_quota_and_waits_for_its_image() {
    let mut lab = Lab::new();
    let mut missing = job();
    missing.template.image = name("later");
    lab.create::<Job>("waits", missing).unwrap();
    lab.pass(S);
    assert_eq!((lab.job("waits").status.phase, lab.why("waits").as_str()), (JobPhase::Pending, "ImageNotFound"));
    lab.create::<Image>("later", image("later")).unwrap();
    lab.pass(5 * S);
    assert_eq!(lab.job("waits").status.phase, JobPhase::Complete);
    lab.patch::<Project>("default", json!({"quota": {"instances": 4}}));
    lab.work = Box::new(|_, _, _| (20 * S, 0));
    lab.create::<Job>("fits", JobSpec { completions: 3, parallelism: 3, ..job() }).unwrap();
    let error = lab.create::<Job>("over", JobSpec { completions: 2, parallelism: 2, ..job() }).unwrap_err();
    assert_eq!(error.code, Code::QuotaExceeded);
    lab.patch::<Job>("fits", json!({"parallelism": 1}));
    assert_eq!(lab.used(), 1);
    lab.create::<Job>("over", JobSpec { completions: 2, parallelism: 2, ..job() }).unwrap();
    lab.pass(S);
    assert_eq!(lab.job("fits").status.active, 1);
    for job in ["fits", "over", "waits"] {
        lab.change::<Job>(job, Change::Delete).unwrap();
    }
    assert_eq!(lab.used(), 0);
}

#[test]
fn the_output_of_the_newest_instances_is_kept_and_of_no_more() {
    let mut lab = Lab::new();
    lab.create::<Job>("many", JobSpec { completions: 60, parallelism: 10, ..job() }).unwrap();
    lab.pass(60 * S);
    assert_eq!(lab.job("many").status.phase, JobPhase::Complete);
    let kept = lab.instances("many");
    assert_eq!((kept.len(), lab.job("many").status.ends.len()), (20, ENDS_TOLD));
    let oldest = kept.iter().filter_map(|i| i.status.finished).min().unwrap();
    let forgotten = lab.job("many").status.ends.iter().filter(|e| e.at < oldest).count();
    assert_eq!(forgotten, 0, "the newest are those that are kept");
}

#[test]
fn a_cron_job_follows_the_clocks_of_its_zone_over_their_change() {
    // In Berlin clocks go forward on 30 March 2025, 01:00 UTC.
    let mut lab = Lab::at("2025-03-28T12:00:00Z");
    lab.create::<CronJob>("nightly", CronJobSpec { time_zone: "Europe/Berlin".into(), ..cron("30 2 * * *") }).unwrap();
    let next = lab.cron("nightly").status.next_run.unwrap().to_string();
    assert_eq!(next, "2025-03-29T01:30:00.000Z");
    lab.steps(Duration::from_secs(3 * 86_400), Duration::from_secs(10));
    // Their TTL of a day took the first ones; the last are there.
    assert_eq!(lab.due().last().unwrap(), "03-31T00:30");
    let all: Vec<_> =
        lab.starts.iter().map(|(job, _)| job.rsplit_once('-').unwrap().1.parse::<i64>().unwrap()).collect();
    let at = |text: &str| serde_json::from_value::<Timestamp>(json!(text)).unwrap().as_millis() / 60_000;
    assert_eq!(all, ["2025-03-29T01:30:00Z", "2025-03-30T01:00:00Z", "2025-03-31T00:30:00Z"].map(at));
    assert_eq!(lab.cron("nightly").status.missed, 0);

    // And back on 26 October, 01:00 UTC: once, though clocks show 02:30 twice.
    let mut lab = Lab::at("2025-10-25T12:00:00Z");
    lab.create::<CronJob>("nightly", CronJobSpec { time_zone: "Europe/Berlin".into(), ..cron("30 2 * * *") }).unwrap();
    lab.steps(Duration::from_secs(86_400), Duration::from_secs(10));
    assert_eq!(lab.due(), ["10-26T00:30"]);
}

#[test]
fn runs_that_were_missed_while_nobody_led_are_made_up_for_as_asked() {
    for (missed, deadline, expected) in [
        (Missed::Skip, 3_600, vec![]),
        (Missed::Once, 3_600, vec!["01-01T00:50"]),
        (Missed::All, 3_600, vec!["01-01T00:10", "01-01T00:20", "01-01T00:30", "01-01T00:40", "01-01T00:50"]),
        (Missed::All, 1_200, vec!["01-01T00:40", "01-01T00:50"]),
        (Missed::Once, 60, vec![]),
    ] {
        let mut lab = Lab::new();
        let spec = CronJobSpec { missed, starting_deadline_seconds: deadline, ..cron("*/10 * * * *") };
        lab.create::<CronJob>("often", spec).unwrap();
        lab.pass(S);
        lab.at = Duration::from_secs(55 * 60);
        lab.change_leader();
        lab.pass(5 * S);
        assert_eq!(lab.due(), expected, "{missed:?} within {deadline} s");
        assert_eq!(lab.cron("often").status.missed, 5 - expected.len() as u64, "{missed:?} within {deadline} s");
        lab.change_leader();
        lab.steps(Duration::from_secs(6 * 60), 5 * S);
        assert_eq!(lab.due().len(), expected.len() + 1, "the next comes at its time, and none twice");
    }
    // However many were missed, a few are made up for.
    let mut lab = Lab::new();
    let spec =
        CronJobSpec { missed: Missed::All, starting_deadline_seconds: MAX_STARTING_DEADLINE, ..cron("* * * * *") };
    lab.create::<CronJob>("often", spec).unwrap();
    lab.at = Duration::from_secs(86_400 + 30);
    lab.change_leader();
    lab.pass(5 * S);
    assert_eq!(lab.due().len(), CATCH_UP);
    assert_eq!(lab.cron("often").status.missed, 1440 - CATCH_UP as u64);
}

#[test]
fn runs_that_overlap_are_allowed_forbidden_or_replaced() {
    let world = |concurrency, missed| {
        let mut lab = Lab::new();
        lab.work = Box::new(|_, _, _| (150 * S, 0));
        lab.create::<CronJob>("often", CronJobSpec { concurrency, missed, ..cron("* * * * *") }).unwrap();
        lab.steps(Duration::from_secs(310), 2 * S);
        let jobs: Vec<_> = lab.core.world.jobs.live.values().cloned().collect();
        let of = |phase| jobs.iter().filter(|j| j.status.phase == phase).count();
        (of(JobPhase::Active), of(JobPhase::Complete), of(JobPhase::Failed), lab.cron("often").status.active.len())
    };
    assert_eq!(world(Concurrency::Allow, Missed::Once), (3, 2, 0, 3));
    // The first runs from minute 1 to 3½; then the newest of those that were due meanwhile begins, or the next on time.
    assert_eq!(world(Concurrency::Forbid, Missed::Once), (1, 1, 0, 1));
    assert_eq!(world(Concurrency::Forbid, Missed::Skip), (1, 1, 0, 1));
    assert_eq!(world(Concurrency::Replace, Missed::Once), (1, 0, 4, 1));
}

#[test]
fn a_run_by_hand_is_in_the_history_and_in_the_way_of_none_by_the_clock() {
    let mut lab = Lab::new();
    lab.work = Box::new(|job, _, _| (if job == "by-hand" { 150 * S } else { S }, 0));
    let spec = CronJobSpec { concurrency: Concurrency::Forbid, successful_history: 2, ..cron("* * * * *") };
    lab.create::<CronJob>("often", spec).unwrap();
    let run = |lab: &mut Lab, job_name: &str, of: &str| {
        let mut intent = create::<Job>(Some("default"), job_name, job());
        let Change::Create { object } = &mut intent.change else { panic!("a create") };
        object.metadata.annotations.insert("run-of".into(), of.into());
        lab.submit(&intent).unwrap();
    };
    run(&mut lab, "by-hand", "often");
    run(&mut lab, "strange", "no-such-cron-job");
    lab.pass(5 * S);
    let owner = lab.job("by-hand").metadata.owner.clone().unwrap();
    assert_eq!((owner.kind.as_str(), &owner.name), ("CronJob", &name("often")));
    assert!(lab.job("strange").metadata.owner.is_none());
    assert_eq!(lab.cron("often").status.active, [name("by-hand")]);

    // It runs over two minutes, which forbids nothing: both runs by the clock are begun.
    lab.steps(Duration::from_secs(130), S);
    assert_eq!(lab.due(), ["01-01T00:01", "01-01T00:02"]);
    assert_eq!((lab.cron("often").status.missed, lab.cron("often").status.active.len()), (0, 1));

    // The history keeps two, whoever asked for them.
    lab.steps(Duration::from_secs(30), S);
    assert_eq!((lab.due(), lab.cron("often").status.active.len()), (vec!["01-01T00:02".to_owned()], 0));
    assert_eq!(lab.job("by-hand").status.phase, JobPhase::Complete);
    lab.steps(Duration::from_secs(180), S);
    assert!(lab.core.world.jobs.get(Some(&name("default")), &name("by-hand")).is_none());
    assert!(lab.core.world.jobs.get(Some(&name("default")), &name("strange")).is_some(), "it has a TTL of its own");

    // A run by hand is not replaced, either.
    lab.patch::<CronJob>("often", json!({"concurrency": "replace"}));
    run(&mut lab, "by-hand", "often");
    lab.steps(Duration::from_secs(70), S);
    assert_eq!(lab.job("by-hand").status.phase, JobPhase::Active);
    lab.change::<CronJob>("often", Change::Delete).unwrap();
    lab.pass(3 * S);
    assert!(lab.core.world.jobs.get(Some(&name("default")), &name("by-hand")).is_none(), "it goes with its owner");
}

#[test]
fn a_suspended_cron_job_rests_and_makes_up_for_nothing() {
    let mut lab = Lab::new();
    lab.create::<CronJob>("often", CronJobSpec { missed: Missed::All, ..cron("* * * * *") }).unwrap();
    lab.steps(Duration::from_secs(130), 2 * S);
    assert_eq!(lab.due(), ["01-01T00:01", "01-01T00:02"]);
    lab.patch::<CronJob>("often", json!({"suspend": true}));
    lab.steps(Duration::from_secs(300), 2 * S);
    assert_eq!((lab.due().len(), lab.cron("often").status.next_run), (2, None));
    lab.patch::<CronJob>("often", json!({"suspend": false}));
    lab.steps(Duration::from_secs(60), 2 * S);
    assert_eq!(lab.due(), ["01-01T00:01", "01-01T00:02", "01-01T00:08"]);
    assert_eq!(lab.cron("often").status.missed, 0);
    assert!(lab.cron("often").status.last_success.is_some());
}

#[test]
fn a_cron_job_keeps_some_of_its_jobs_says_what_the_quota_refuses_and_takes_all_with_it() {
    let mut lab = Lab::new();
    lab.work = Box::new(|job, _, _| (S, i32::from(job.as_bytes().last().is_some_and(|b| b % 2 == 0))));
    let mut spec = CronJobSpec { successful_history: 2, failed_history: 1, ..cron("* * * * *") };
    spec.job.backoff_limit = 0;
    lab.create::<CronJob>("often", spec).unwrap();
    lab.steps(Duration::from_secs(620), 2 * S);
    let of = |lab: &Lab, phase| lab.core.world.jobs.live.values().filter(|j| j.status.phase == phase).count();
    assert_eq!((of(&lab, JobPhase::Complete), of(&lab, JobPhase::Failed)), (2, 1));
    assert_eq!(lab.starts.len(), 10);
    lab.patch::<Project>("default", json!({"quota": {"instances": 0}}));
    lab.steps(Duration::from_secs(60), 2 * S);
    assert_eq!((lab.starts.len(), lab.cron("often").status.missed), (10, 1));
    let told = lab.core.world.events.live.values().filter(|e| e.spec.reason == "CantBegin");
    assert!(told.clone().count() == 1 && told.clone().all(|e| e.spec.message.contains("quota")));
    lab.change::<CronJob>("often", Change::Delete).unwrap();
    lab.pass(3 * S);
    let world = &lab.core.world;
    assert!(world.jobs.all().next().is_none() && world.cron_jobs.all().next().is_none());
    assert!(world.instances.all().next().is_none());
}

#[test]
fn a_deleted_project_takes_its_jobs_with_it() {
    let mut lab = Lab::new();
    lab.work = Box::new(|_, _, _| (100 * S, 0));
    lab.create::<Project>("shop", ProjectSpec::default()).unwrap();
    lab.submit(&create::<Image>(Some("shop"), "tools", image("tools"))).unwrap();
    lab.submit(&create::<CronJob>(Some("shop"), "often", cron("* * * * *"))).unwrap();
    lab.submit(&create::<Job>(Some("shop"), "slow", JobSpec { completions: 3, parallelism: 3, ..job() })).unwrap();
    lab.steps(Duration::from_secs(70), 2 * S);
    assert_eq!(lab.core.world.jobs.live.len(), 2);
    lab.change::<Project>("shop", Change::Delete).unwrap();
    lab.pass(5 * S);
    let world = &lab.core.world;
    assert!(world.jobs.all().next().is_none() && world.cron_jobs.all().next().is_none());
    assert!(world.instances.all().next().is_none() && world.projects.buried.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever hosts die and return, leaders change and parts fail on their first tries: a job finishes with every part done
    /// once in its books, never has more at once than it may, and gives all of its quota back. `with` counts that anew at each
    /// step.
    #[test]
    fn a_job_comes_to_its_end_whatever_happens(
        completions in 1u32..12,
        parallelism in 1u32..6,
        flaky in proptest::collection::vec(0usize..3, 12),
        deeds in proptest::collection::vec((0u8..4, 1u64..6), 1..20),
    ) {
        let mut lab = Lab::new();
        let failures: usize = flaky.iter().take(completions as usize).sum();
        lab.work = Box::new(move |_, index, before| {
            let index = index.unwrap() as usize;
            (Duration::from_millis(700 * (index as u64 % 4 + 1)), i32::from(before < flaky[index]))
        });
        let limit = u32::try_from(failures).unwrap() + 40;
        let spec = JobSpec { completions, parallelism, indexed: true, backoff_limit: limit, ..job() };
        lab.create::<Job>("parts", spec).unwrap();
        for (deed, seconds) in deeds {
            match deed {
                0 => drop(lab.alive.pop_first()),
                1 => lab.alive = (1..=3).map(|n| name(&format!("host-{n}"))).collect(),
                2 => lab.change_leader(),
                _ => {}
            }
            lab.pass(Duration::from_secs(seconds));
            let job = lab.job("parts");
            prop_assert!(job.status.active <= parallelism);
            prop_assert_eq!(lab.used() == 0, job.status.finished.is_some());
        }
        lab.alive = (1..=3).map(|n| name(&format!("host-{n}"))).collect();
        lab.steps(Duration::from_secs(8_000), 5 * S);
        let s = &lab.job("parts").status;
        prop_assert_eq!(s.phase, JobPhase::Complete, "{:?}", s);
        prop_assert_eq!(s.succeeded, completions);
        let all = if completions == 1 { "0".to_owned() } else { format!("0-{}", completions - 1) };
        prop_assert_eq!(&s.completed_indexes, &all);
        prop_assert_eq!(lab.used(), 0);
    }
}
