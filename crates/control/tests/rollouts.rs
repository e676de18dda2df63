//! Rollouts as the writer runs them: good, slow and broken templates, steps, orders, errors, history; and, as a property over random
//! worlds, the bounds that hold at every step.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{create, image, intent, name, web};
use nexus_control::cells::Cells;
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Intent, RolloutOrder};
use nexus_control::rules::rollout::{self, Goals, Member, Seen, Side};
use nexus_control::world::World;
use nexus_env::{RngExt, SeededRng};
use nexus_model::kind::*;
use nexus_model::plan::{InstanceTraffic, TrafficReport};
use nexus_model::{ApiError, Bytes, Code, MilliCpu, Name, Object, Timestamp, Uid};
use serde_json::{Value, json};

/// A region whose instances do as their variable `DOES` says: `well` (ready at once), `slow` (after five seconds) or `ill` (never).
struct Lab {
    core: Core,
    rng: SeededRng,
    at: Duration,
    revision: u64,
    hosts: Vec<Name>,
    /// The fewest instances that were ready since it was set.
    fewest: usize,
    most: usize,
}

const STEP: Duration = Duration::from_millis(500);

impl Lab {
    /// An app `shop` of so many replicas that does well.
    fn new(replicas: u32, rollout: Value) -> Self {
        let zones = vec![name("zone-a"), name("zone-b"), name("zone-c")];
        let cells = vec![name("cell-a"), name("cell-b"), name("cell-c")];
        let bootstrap = Bootstrap { region: name("local"), domain: "localhost".into(), zones, cells };
        let core = Core::new(World::default(), bootstrap, Cells::new(Duration::ZERO, "server-a".into(), 1));
        let hosts = ["a", "b", "c"].iter().flat_map(|z| (1..=2).map(move |n| name(&format!("zone-{z}-{n}"))));
        let hosts = hosts.collect();
        let (rng, at) = (SeededRng::new(7), Duration::ZERO);
        let mut lab = Self { core, rng, at, revision: 0, hosts, fewest: 0, most: usize::MAX };
        lab.with(|core, at| core.bootstrap(at));
        lab.pass(1);
        lab.submit(&create::<Image>(Some("default"), "web", image("web"))).unwrap();
        let mut spec = web(replicas);
        spec.rollout = serde_json::from_value(rollout).unwrap();
        spec.env.insert("DOES".into(), "well".into());
        lab.submit(&create::<App>(Some("default"), "shop", spec)).unwrap();
        lab.pass(4);
        assert_eq!(lab.app().status.phase, AppPhase::Ready);
        lab.fewest = usize::MAX;
        lab.most = 0;
        lab
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let now = Timestamp::from_millis(1_000_000 + self.at.as_millis() as i64);
        let at = Moment { now, monotonic: self.at, rng: &self.rng };
        let answer = f(&mut self.core, at);
        let mut rounds = 0;
        while self.core.reconcile(at) {
            rounds += 1;
            assert!(rounds < 100, "the reconcilers never come to rest");
        }
        for pack in self.core.take_packs() {
            assert!(pack.ops.len() <= 126, "a transaction has {} operations", pack.ops.len());
            self.revision += 1;
            self.core.committed(&pack, self.revision);
        }
        assert_eq!(self.core.check_invariants(), Vec::<String>::new());
        answer
    }

    fn is_ready(&self, i: &Object<Instance>) -> bool {
        let age = 1_000_000 + self.at.as_millis() as i64 - i.metadata.created.as_millis();
        match i.spec.template.env["DOES"].as_str() {
            "well" => true,
            "slow" => age >= 5_000,
            _ => false,
        }
    }

    /// Lets so many half seconds pass, in which every agent reports once.
    fn pass(&mut self, steps: u32) {
        for _ in 0..steps {
            self.at += STEP;
            for host in self.hosts.clone() {
                let (zone, n) = host.as_str().rsplit_once('-').unwrap();
                let index = (zone.bytes().last().unwrap() - b'a') * 16 + n.parse::<u8>().unwrap();
                let (memory, scratch) = (Bytes(8 << 30), Bytes(10 << 30));
                let capacity = Capacity { cpu: MilliCpu(8000), memory, scratch, instances: 100 };
                let spec = common::host(zone, &zone.replace("zone", "cell"), index, capacity);
                let runs: Vec<_> = self.core.world.instances_on(&host).cloned().collect();
                let runs: Vec<_> = runs.into_iter().filter(|i| i.metadata.deleting.is_none()).collect();
                let mut report = common::report(&host, spec, self.revision, &runs);
                for (told, i) in report.instances.iter_mut().zip(&runs) {
                    told.ready = self.is_ready(i);
                }
                self.with(|core, at| core.report(&report, at)).unwrap();
            }
            self.with(|core, at| core.tick(at));
            if self.revision > 0 && self.core.world.apps.get(Some(&name("default")), &name("shop")).is_some() {
                self.fewest = self.fewest.min(self.ready(None));
                self.most = self.most.max(self.instances().len());
            }
        }
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    fn patch(&mut self, patch: Value) {
        self.submit(&intent("apps", Some("default"), "shop", Change::Patch { patch })).unwrap();
    }

    /// Deploys a template that does so.
    fn deploy(&mut self, does: &str, version: u32) {
        self.patch(json!({"spec": {"env": {"DOES": does, "VERSION": version.to_string()}}}));
    }

    fn order(&mut self, order: RolloutOrder) -> Result<Accepted, ApiError> {
        self.submit(&intent("apps", Some("default"), "shop", Change::Rollout { order }))
    }

    fn app(&self) -> &Object<App> {
        self.core.world.apps.get(Some(&name("default")), &name("shop")).unwrap()
    }

    fn rollout(&self) -> &RolloutStatus {
        self.app().status.rollout.as_ref().unwrap()
    }

    fn instances(&self) -> Vec<&Object<Instance>> {
        self.core.world.instances_of(self.app().metadata.uid).collect()
    }

    /// Ready instances, all or of the template with this version.
    fn ready(&self, version: Option<&str>) -> usize {
        let ready = self.instances().into_iter().filter(|i| i.status.ready);
        let of = |i: &&Object<Instance>| {
            let own = i.spec.template.env.get("VERSION").map_or("first", String::as_str);
            version.is_none_or(|v| own == v)
        };
        ready.filter(of).count()
    }

    fn has_event(&self, reason: &str) -> bool {
        self.core.world.events.live.values().any(|e| e.spec.reason == reason && e.spec.regarding.kind == "App")
    }

    /// Passes until the rollout's phase is this one.
    fn until(&mut self, phase: RolloutPhase) {
        for _ in 0..200 {
            if self.rollout().phase == phase {
                return;
            }
            self.pass(1);
        }
        panic!("not {phase:?} but {:?}", self.rollout());
    }
}

#[test]
fn a_good_template_goes_through_and_never_fewer_are_ready_than_wanted() {
    let mut lab = Lab::new(8, json!({"maxSurge": "25%"}));
    lab.deploy("slow", 2);
    lab.pass(1);
    assert_eq!(lab.rollout().phase, RolloutPhase::Progressing);
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.fewest, lab.most), (8, 10));
    assert_eq!((lab.ready(Some("2")), lab.rollout().revision, lab.app().status.phase), (8, 2, AppPhase::Ready));
    assert!(lab.has_event("RolloutStarted") && lab.has_event("RolloutComplete"));
}

#[test]
fn max_unavailable_lets_instances_go_before_others_come() {
    let mut lab = Lab::new(8, json!({"maxSurge": 0, "maxUnavailable": "25%"}));
    lab.deploy("slow", 2);
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.fewest, lab.most), (6, 8));
}

fn used(lab: &Lab) -> u32 {
    lab.core.world.usage(&name("default")).unwrap().status.used.instances
}

fn set_quota(lab: &mut Lab, instances: u32) {
    let patch = json!({"spec": {"quota": {"instances": instances}}});
    lab.submit(&intent("projects", None, "default", Change::Patch { patch })).unwrap();
}

#[test]
fn a_surge_is_charged_to_the_quota_as_long_as_it_is_there() {
    let mut lab = Lab::new(8, json!({"maxSurge": "25%"}));
    assert_eq!(used(&lab), 8);
    lab.deploy("slow", 2);
    lab.pass(1);
    assert_eq!((used(&lab), lab.rollout().surge), (10, 2));
    set_quota(&mut lab, 10);
    let other = |replicas: u32| {
        let mut spec = web(replicas);
        spec.env.insert("DOES".into(), "well".into());
        create::<App>(Some("default"), "other", spec)
    };
    let refused = lab.submit(&other(1)).unwrap_err();
    assert_eq!(refused.code, Code::QuotaExceeded);
    lab.until(RolloutPhase::Complete);
    lab.pass(2);
    assert_eq!((used(&lab), lab.rollout().surge, lab.instances().len()), (8, 0, 8));
    lab.submit(&other(2)).unwrap();

    // The green set beside the blue one is as many instances again.
    set_quota(&mut lab, 100);
    lab.patch(json!({"spec": {"rollout": {"strategy": "blue-green", "maxSurge": 0}}}));
    lab.deploy("well", 3);
    lab.pass(4);
    assert!(used(&lab) > 2 + 8 + 6, "{} {:?}", used(&lab), lab.rollout());
    lab.submit(&intent("apps", Some("default"), "shop", Change::Delete)).unwrap();
    assert_eq!(used(&lab), 2, "all of it is given back at once");
}

#[test]
fn a_rollout_that_the_quota_gives_no_surge_says_so_and_goes_on_as_far_as_it_may() {
    let mut lab = Lab::new(8, json!({"maxSurge": "50%", "maxUnavailable": 2}));
    set_quota(&mut lab, 9);
    lab.deploy("slow", 2);
    lab.pass(1);
    let said = lab.rollout().surge_refused.clone();
    assert!(said.contains("instances quota of project default is 9"), "{said}");
    assert_eq!((used(&lab), lab.rollout().surge), (9, 1), "what there is room for is taken");
    lab.until(RolloutPhase::Complete);
    lab.pass(2);
    assert_eq!((lab.fewest, lab.most, used(&lab)), (6, 9, 8));
    assert_eq!((lab.ready(Some("2")), lab.rollout().surge_refused.as_str()), (8, ""));

    // Without a word about fewer it waits, and goes on when there is room.
    set_quota(&mut lab, 8);
    lab.patch(json!({"spec": {"rollout": {"maxUnavailable": 0}}}));
    (lab.fewest, lab.most) = (usize::MAX, 0);
    lab.deploy("well", 3);
    lab.pass(20);
    assert_eq!((lab.ready(Some("3")), lab.ready(Some("2")), lab.rollout().phase), (0, 8, RolloutPhase::Progressing));
    assert!(!lab.rollout().surge_refused.is_empty());
    set_quota(&mut lab, 10);
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.fewest, lab.most, lab.ready(Some("3"))), (8, 10, 8));

    // What never gets room is taken back, and why is told.
    set_quota(&mut lab, 8);
    lab.patch(json!({"spec": {"rollout": {"progressDeadlineSeconds": 10}}}));
    lab.deploy("well", 4);
    lab.until(RolloutPhase::RolledBack);
    assert!(lab.rollout().message.contains("instances quota of project default"), "{}", lab.rollout().message);
    assert_eq!((lab.ready(Some("3")), used(&lab)), (8, 8));
}

#[test]
fn a_drained_hosts_instances_are_replaced_whatever_the_quota() {
    let mut lab = Lab::new(6, json!({}));
    set_quota(&mut lab, 6);
    let host = lab.instances()[0].status.host.clone().unwrap();
    lab.submit(&intent("hosts", None, host.as_str(), Change::Patch { patch: json!({"spec": {"draining": true}}) }))
        .unwrap();
    lab.pass(20);
    assert!(lab.instances().iter().all(|i| i.status.ready && i.status.host.as_ref() != Some(&host)));
    assert_eq!((lab.fewest, lab.instances().len(), used(&lab)), (6, 6, 6));
}

#[test]
fn a_broken_template_is_taken_back_when_its_deadline_is_over_and_tried_again_when_resumed() {
    let mut lab = Lab::new(4, json!({"progressDeadlineSeconds": 20}));
    lab.deploy("ill", 2);
    lab.pass(30);
    assert_eq!(lab.rollout().phase, RolloutPhase::Progressing, "the deadline is not over");
    lab.until(RolloutPhase::RolledBack);
    lab.pass(4);
    assert_eq!((lab.fewest, lab.ready(Some("first")), lab.instances().len()), (4, 4, 4));
    let status = lab.app().status.clone();
    assert_eq!((status.phase, status.updated_replicas), (AppPhase::RolledBack, 0));
    assert!(status.conditions.iter().any(|c| c.reason == "RolledBack" && c.message.contains("revision 2 has failed")));
    assert!(lab.has_event("RollingBack") && lab.has_event("RolledBack"));
    assert_eq!(lab.app().spec.env["DOES"], "ill", "the spec is its users'");

    // What dies meanwhile is made anew of what serves.
    let victim = lab.instances()[0].metadata.name.clone();
    lab.submit(&intent("instances", Some("default"), victim.as_str(), Change::Delete)).unwrap();
    lab.pass(3);
    assert_eq!(lab.ready(Some("first")), 4);

    lab.order(RolloutOrder::Resume).unwrap();
    lab.pass(2);
    assert_eq!(lab.rollout().phase, RolloutPhase::Progressing);
    lab.until(RolloutPhase::RolledBack);
    lab.deploy("well", 3);
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.ready(Some("3")), lab.app().status.phase), (4, AppPhase::Ready));
}

#[test]
fn a_slow_template_is_waited_for_as_long_as_instances_become_ready_one_after_another() {
    // Each wave takes five seconds, all of them longer than the deadline.
    let mut lab = Lab::new(6, json!({"maxSurge": 1, "progressDeadlineSeconds": 8}));
    lab.deploy("slow", 2);
    let began = lab.at;
    lab.until(RolloutPhase::Complete);
    assert!(lab.at - began > Duration::from_secs(25));
    assert_eq!((lab.fewest, lab.ready(Some("2"))), (6, 6));
}

#[test]
fn without_rollback_a_broken_template_stalls_and_says_so() {
    let mut lab = Lab::new(4, json!({"progressDeadlineSeconds": 5, "autoRollback": false}));
    lab.deploy("ill", 2);
    lab.until(RolloutPhase::Stalled);
    lab.pass(20);
    assert_eq!((lab.ready(Some("first")), lab.rollout().phase), (4, RolloutPhase::Stalled));
    assert!(lab.has_event("RolloutStalled"));
    lab.order(RolloutOrder::Undo { to: None }).unwrap();
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.app().spec.env["DOES"].as_str(), lab.app().status.phase), ("well", AppPhase::Ready));
}

#[test]
fn a_first_template_that_is_broken_has_nothing_to_go_back_to() {
    let mut lab = Lab::new(2, json!({}));
    let mut spec = web(2);
    spec.env.insert("DOES".into(), "ill".into());
    spec.rollout.progress_deadline_seconds = 5;
    lab.submit(&intent("apps", Some("default"), "shop", Change::Delete)).unwrap();
    lab.submit(&create::<App>(Some("default"), "shop", spec)).unwrap();
    lab.until(RolloutPhase::Stalled);
    assert_eq!(lab.instances().len(), 2);
    assert_eq!(lab.order(RolloutOrder::Undo { to: None }).unwrap_err().code, Code::Conflict);
    lab.deploy("well", 2);
    lab.until(RolloutPhase::Complete);
    assert_eq!(lab.ready(Some("2")), 2);
}

#[test]
fn a_canary_goes_step_by_step_and_waits_where_it_is_told_to() {
    let steps = json!([{"percent": 10, "seconds": 10}, {"percent": 50}]);
    let mut lab = Lab::new(10, json!({"strategy": "canary", "steps": steps}));
    lab.deploy("well", 2);
    lab.pass(3);
    assert_eq!((lab.ready(Some("2")), lab.ready(Some("first"))), (1, 9));
    assert_eq!(lab.rollout().traffic_percent, Some(10));
    lab.pass(14);
    assert_eq!(lab.ready(Some("2")), 1, "the first step lasts ten seconds");
    lab.until(RolloutPhase::Waiting);
    assert_eq!((lab.ready(Some("2")), lab.ready(Some("first")), lab.rollout().traffic_percent), (5, 5, Some(50)));
    lab.pass(100);
    assert_eq!(lab.ready(Some("2")), 5, "the second until somebody says so");
    // What dies of either is made anew as what it was.
    let old = lab.instances().into_iter().find(|i| !i.spec.template.env.contains_key("VERSION")).unwrap();
    let old = old.metadata.name.clone();
    lab.submit(&intent("instances", Some("default"), old.as_str(), Change::Delete)).unwrap();
    lab.pass(3);
    assert_eq!((lab.ready(Some("2")), lab.ready(Some("first"))), (5, 5));
    lab.order(RolloutOrder::Resume).unwrap();
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.ready(Some("2")), lab.instances().len(), lab.rollout().traffic_percent), (10, 10, None));
    assert!(lab.fewest >= 9, "one was deleted by hand");
}

#[test]
fn a_canary_of_one_replica_keeps_the_old_one_beside_it() {
    let mut lab = Lab::new(1, json!({"strategy": "canary", "header": {"name": "x-canary"}}));
    lab.deploy("well", 2);
    lab.until(RolloutPhase::Waiting);
    assert_eq!((lab.ready(Some("2")), lab.ready(Some("first")), lab.rollout().traffic_percent), (1, 1, Some(10)));
    lab.order(RolloutOrder::Promote).unwrap();
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.ready(Some("2")), lab.instances().len()), (1, 1));
    assert_eq!(lab.order(RolloutOrder::Promote).unwrap_err().code, Code::Conflict);
    // What has served before needs no trial.
    lab.order(RolloutOrder::Undo { to: None }).unwrap();
    lab.until(RolloutPhase::Complete);
    assert_eq!(lab.ready(Some("first")), 1);
    assert!(lab.fewest >= 1);
}

#[test]
fn a_broken_canary_loses_its_share_and_goes() {
    let mut lab = Lab::new(10, json!({"strategy": "canary", "progressDeadlineSeconds": 10}));
    lab.deploy("ill", 2);
    lab.pass(4);
    assert_eq!(lab.rollout().traffic_percent, Some(0), "nobody is sent to what is not ready");
    lab.until(RolloutPhase::RolledBack);
    assert_eq!((lab.ready(Some("first")), lab.instances().len(), lab.fewest), (10, 10, 10));
}

#[test]
fn blue_green_changes_over_once_the_whole_new_set_is_ready_and_keeps_the_old_one_for_a_while() {
    let mut lab = Lab::new(4, json!({"strategy": "blue-green", "keepOldSeconds": 20}));
    lab.deploy("slow", 2);
    lab.pass(4);
    assert_eq!((lab.instances().len(), lab.rollout().traffic_percent), (8, Some(0)));
    lab.until(RolloutPhase::Switched);
    assert_eq!((lab.ready(Some("2")), lab.ready(Some("first")), lab.rollout().traffic_percent), (4, 4, Some(100)));
    lab.pass(30);
    assert_eq!(lab.ready(Some("first")), 4, "kept for twenty seconds");

    // An undo is a change back to a set that is ready.
    lab.order(RolloutOrder::Undo { to: None }).unwrap();
    lab.pass(1);
    assert_eq!((lab.rollout().phase, lab.rollout().traffic_percent), (RolloutPhase::Switched, Some(100)));
    assert_eq!(lab.app().spec.env.get("VERSION"), None);
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.ready(Some("first")), lab.instances().len(), lab.fewest), (4, 4, 4));
}

#[test]
fn blue_green_waits_to_be_promoted_if_it_is_told_to() {
    let mut lab = Lab::new(3, json!({"strategy": "blue-green", "autoPromote": false, "keepOldSeconds": 5}));
    lab.deploy("well", 2);
    lab.until(RolloutPhase::Waiting);
    lab.pass(40);
    assert_eq!((lab.ready(Some("2")), lab.rollout().traffic_percent), (3, Some(0)));
    lab.order(RolloutOrder::Promote).unwrap();
    lab.pass(1);
    assert_eq!((lab.rollout().phase, lab.rollout().traffic_percent), (RolloutPhase::Switched, Some(100)));
    lab.until(RolloutPhase::Complete);
    assert_eq!(lab.instances().len(), 3);
}

#[test]
fn a_pause_holds_a_rollout_where_it_is_and_a_resume_goes_on() {
    let mut lab = Lab::new(8, json!({"maxSurge": 2, "progressDeadlineSeconds": 10}));
    lab.deploy("slow", 2);
    lab.pass(14);
    let new = lab.ready(Some("2"));
    assert!((1..8).contains(&new), "{new}");
    lab.order(RolloutOrder::Pause).unwrap();
    lab.order(RolloutOrder::Pause).unwrap();
    lab.pass(60);
    assert_eq!(lab.rollout().phase, RolloutPhase::Paused, "its deadline is held up too");
    let held = lab.ready(Some("2"));
    assert!(held < 8 && lab.instances().len() == 8, "{held} of {}", lab.instances().len());
    lab.pass(20);
    assert_eq!(lab.ready(Some("2")), held);
    lab.order(RolloutOrder::Resume).unwrap();
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.ready(Some("2")), lab.fewest), (8, 8));

    // What is paused while nothing is replaced holds up the next one.
    lab.order(RolloutOrder::Pause).unwrap();
    lab.deploy("well", 3);
    lab.pass(20);
    assert_eq!((lab.ready(Some("3")), lab.rollout().phase), (0, RolloutPhase::Paused));
    lab.order(RolloutOrder::Resume).unwrap();
    lab.until(RolloutPhase::Complete);
}

#[test]
fn an_undo_goes_back_to_any_revision_that_is_kept_and_pins_content_that_has_moved_on() {
    let mut lab = Lab::new(2, json!({"history": 2}));
    lab.deploy("well", 2);
    lab.until(RolloutPhase::Complete);
    let first = image("web").digest;
    let patch = json!({"spec": image("other")});
    lab.submit(&intent("images", Some("default"), "web", Change::Patch { patch })).unwrap();
    lab.pass(1);
    lab.until(RolloutPhase::Complete);
    let digests = |lab: &Lab| lab.instances().iter().map(|i| i.spec.image_digest).collect::<Vec<_>>();
    assert_eq!((lab.rollout().revision, digests(&lab)), (3, vec![image("other").digest; 2]));

    let unknown = lab.order(RolloutOrder::Undo { to: Some(77) }).unwrap_err();
    assert!(unknown.code == Code::NotFound && unknown.detail.contains("nexus rollout history shop"), "{unknown:?}");
    lab.order(RolloutOrder::Undo { to: Some(1) }).unwrap();
    lab.pass(1);
    lab.until(RolloutPhase::Complete);
    let app = lab.app();
    assert_eq!((app.spec.env.get("VERSION"), app.spec.image_digest), (None, Some(first)));
    assert_eq!((lab.rollout().revision, digests(&lab)), (4, vec![first; 2]), "it is the newest again");
    assert_eq!(lab.order(RolloutOrder::Undo { to: Some(1) }).unwrap_err().code, Code::NotFound, "renumbered");
    let generation = lab.app().metadata.generation;
    lab.order(RolloutOrder::Undo { to: Some(4) }).unwrap();
    assert_eq!(lab.app().metadata.generation, generation, "nothing to do");

    for version in 10..15 {
        lab.deploy("well", version);
        lab.pass(1);
        lab.until(RolloutPhase::Complete);
    }
    let kept: Vec<u64> = lab.core.world.app_revisions.live.values().map(|r| r.spec.revision).collect();
    assert_eq!(kept.len(), 3, "{kept:?}: two and the newest");

    let other = nexus_model::Digest::of(b"somebody else's");
    let patch = json!({"spec": {"imageDigest": other}});
    let refused = lab.submit(&intent("apps", Some("default"), "shop", Change::Patch { patch })).unwrap_err();
    assert_eq!(refused.errors[0].field, "spec.imageDigest");

    lab.submit(&intent("apps", Some("default"), "shop", Change::Delete)).unwrap();
    assert!(lab.core.world.app_revisions.live.is_empty() && lab.core.world.revisions_of.is_empty());
}

#[test]
fn too_many_errors_take_a_rollout_back_and_as_many_as_before_do_not() {
    let rollout = json!({"strategy": "canary", "steps": [{"percent": 50}], "maxErrorPercent": 5, "minRequests": 100});
    for (older, taken_back) in [(0, true), (50, false)] {
        let mut lab = Lab::new(4, rollout.clone());
        lab.deploy("well", 2);
        lab.until(RolloutPhase::Waiting);
        let traffic = lab.core.world.traffic.clone();
        let all: Vec<(Uid, bool)> =
            lab.instances().iter().map(|i| (i.metadata.uid, i.spec.template.env.contains_key("VERSION"))).collect();
        let tell = |requests: u32, at: Duration| {
            let of = |(uid, new): &(Uid, bool)| InstanceTraffic {
                uid: *uid,
                requests,
                errors: requests * if *new { 20 } else { older } / 100,
                in_flight: 0,
            };
            let instances = all.iter().map(of).collect();
            traffic.hear(&TrafficReport { gateway: name("gateway-1"), span_ms: 1000, instances, apps: vec![] }, at);
        };
        tell(40, lab.at);
        lab.pass(4);
        assert_eq!(lab.rollout().phase, RolloutPhase::Waiting, "80 requests are too few to judge by");
        tell(40, lab.at);
        lab.pass(10);
        assert_eq!(lab.rollout().failed, taken_back);
        if taken_back {
            assert!(lab.rollout().message.contains("32 of 160 requests"), "{}", lab.rollout().message);
            assert_eq!((lab.ready(Some("first")), lab.rollout().phase), (4, RolloutPhase::RolledBack));
        }
    }
}

#[test]
fn an_app_whose_image_is_gone_keeps_what_runs() {
    let mut lab = Lab::new(4, json!({"strategy": "canary", "steps": [{"percent": 50}]}));
    lab.deploy("well", 2);
    lab.until(RolloutPhase::Waiting);
    lab.submit(&intent("images", Some("default"), "web", Change::Delete)).unwrap();
    lab.patch(json!({"spec": {"env": {"DOES": "well", "VERSION": "3"}}}));
    lab.pass(10);
    assert_eq!((lab.ready(Some("2")), lab.ready(Some("first")), lab.fewest), (2, 2, 4));
    assert!(lab.app().status.conditions.iter().any(|c| c.reason == "ImageNotFound"));
    // The content is known still: whoever goes back runs it.
    lab.order(RolloutOrder::Undo { to: Some(1) }).unwrap();
    lab.pass(1);
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.ready(Some("first")), lab.app().spec.image_digest), (4, Some(image("web").digest)));
}

#[test]
fn a_third_template_takes_over_from_a_second_that_was_not_through() {
    let mut lab = Lab::new(6, json!({"maxSurge": 2}));
    lab.deploy("slow", 2);
    lab.pass(14);
    assert!(lab.ready(Some("2")) > 0);
    lab.deploy("well", 3);
    lab.pass(1);
    assert_eq!(lab.rollout().stable_revision, 1, "the second never served alone");
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.ready(Some("3")), lab.fewest, lab.instances().len()), (6, 6, 6));
}

/// One app under random events: what is decided is done, instances become ready or not as chance has it.
struct Chance {
    rng: SeededRng,
    spec: Rollout,
    status: RolloutStatus,
    disruption: Disruption,
    wanted: usize,
    hash: u32,
    next: u64,
    now: i64,
    /// By uid: template, ready, drained.
    all: BTreeMap<Uid, (String, bool, bool)>,
}

impl Chance {
    fn new(seed: u64) -> Self {
        let rng = SeededRng::new(seed);
        let strategies = [Strategy::Rolling, Strategy::Canary, Strategy::BlueGreen];
        let amount = |rng: &SeededRng| match rng.below(2) {
            0 => Amount::Count(rng.below(4) as u32),
            _ => Amount::Percent(rng.below(101) as u8),
        };
        let step =
            |rng: &SeededRng| CanaryStep { percent: rng.below(100) as u8, seconds: (rng.below(2) == 0).then_some(3) };
        let spec = Rollout {
            strategy: strategies[rng.below(3) as usize],
            max_surge: amount(&rng),
            max_unavailable: amount(&rng),
            steps: (0..rng.below(4)).map(|_| step(&rng)).collect(),
            auto_promote: rng.below(2) == 0,
            keep_old_seconds: rng.below(10) as u32,
            progress_deadline_seconds: 10,
            auto_rollback: rng.below(4) > 0,
            ..Rollout::default()
        };
        let wanted = rng.below(12) as usize;
        let (status, all) = (RolloutStatus::default(), BTreeMap::new());
        let disruption = match rng.below(3) {
            0 => Disruption::default(),
            1 => Disruption::MaxUnavailable(amount(&rng)),
            _ => Disruption::MinAvailable(amount(&rng)),
        };
        Self { rng, spec, status, disruption, wanted, hash: 1, next: 0, now: 0, all }
    }

    fn members(&self, side: impl Fn(&str) -> Side) -> Vec<Member> {
        let member = |(uid, (hash, ready, drained)): (&Uid, &(String, bool, bool))| Member {
            uid: *uid,
            side: side(hash),
            ready: *ready,
            placed: true,
            drained: *drained,
            silent: false,
            failing: false,
            zone: None,
            created: Timestamp::from_millis(0),
        };
        self.all.iter().map(member).collect()
    }

    fn make(&mut self, hash: &str) {
        self.next += 1;
        let mut random = [0; 16];
        random[..8].copy_from_slice(&self.next.to_be_bytes());
        self.all.insert(Uid::from_random(random), (hash.to_owned(), false, false));
    }

    /// One look at the app, with what is checked of it.
    fn step(&mut self) -> Goals {
        let hash = format!("t{}", self.hash);
        let target = if self.status.template_hash == hash { rollout::target_hash(&self.status) } else { &hash };
        let seen = self.members(|h| if h == target { Side::Target } else { Side::Other });
        let fresh = || seen.iter().filter(|m| m.side == Side::Target && !m.drained);
        let seen = Seen {
            wanted: self.wanted,
            hash: hash.clone(),
            revision: u64::from(self.hash),
            target: fresh().count(),
            target_ready: fresh().filter(|m| m.ready).count(),
            all: seen.len(),
            errors: None,
        };
        let now = Timestamp::from_millis(self.now);
        self.status = rollout::advance(&self.spec, &self.status, &seen, now).0;
        let members = self.members(|h| rollout::side(&self.status, h));
        let goals = rollout::goals(&self.spec, &self.status, self.wanted).allowing(self.disruption);
        let drains = members.iter().any(|m| m.drained);
        let moves = rollout::moves(&members, goals);
        let ready = |all: &BTreeMap<Uid, (String, bool, bool)>| all.values().filter(|i| i.1).count();
        let (before, total) = (ready(&self.all), self.all.len());
        for (uid, _) in &moves.stop {
            assert!(self.all.remove(uid).is_some(), "stopped twice");
        }
        let (target, stable) = (rollout::target_hash(&self.status).to_owned(), self.status.stable_hash.clone());
        (0..moves.make_target).for_each(|_| self.make(&target));
        (0..moves.make_stable).for_each(|_| self.make(&stable));
        let after = ready(&self.all);
        let least = if drains { goals.least_ready.min(goals.budget(None)) } else { goals.least_ready };
        assert!(after >= before.min(least), "{before} were ready, {after} are, {goals:?} {:?}", self.spec);
        let is_drained =
            |uid: &Uid| members.iter().any(|m| m.uid == *uid && m.ready && m.drained && m.side != Side::Other);
        if moves.stop.iter().any(|(uid, _)| is_drained(uid)) {
            let least = self.disruption.least(self.wanted);
            assert!(after >= least, "{after} are ready after a drain took some: the budget is {least}");
            assert!(after >= self.wanted, "{after} are ready after a drain took some, {} are wanted", self.wanted);
        }
        let made = moves.make_target + moves.make_stable;
        assert!(
            made == 0 || total + made <= goals.most.max(self.wanted) + usize::from(drains),
            "{total} and {made} are too many: {goals:?}"
        );
        goals
    }

    fn trouble(&mut self) {
        let uids: Vec<Uid> = self.all.keys().copied().collect();
        let any = |rng: &SeededRng| uids.get(rng.below(uids.len().max(1) as u64) as usize).copied();
        match self.rng.below(14) {
            0 => self.hash = 1 + self.rng.below(5) as u32,
            1 => self.wanted = self.rng.below(12) as usize,
            2 => self.status.orders.paused ^= true,
            3 => self.status.orders.resumed += 1,
            4 => self.status.orders.promoted += 1,
            5 => drop(any(&self.rng).map(|uid| self.all.remove(&uid))),
            6 => drop(any(&self.rng).map(|uid| self.all.get_mut(&uid).map(|i| i.1 = false))),
            7 => drop(any(&self.rng).map(|uid| self.all.get_mut(&uid).map(|i| i.2 ^= true))),
            _ => {
                if let Some(uid) = any(&self.rng)
                    && let Some(i) = self.all.get_mut(&uid)
                {
                    i.1 = true;
                }
            }
        }
    }
}

#[test]
fn at_every_step_no_more_are_made_and_no_more_stopped_than_allowed_and_all_comes_to_an_end() {
    for seed in 0..2_000 {
        let mut chance = Chance::new(seed);
        for _ in 0..150 {
            chance.trouble();
            chance.now += 500;
            chance.step();
        }
        // With peace and a good template everything comes to its end: promoted, if it waits for that.
        chance.status.orders.paused = false;
        chance.hash = 9;
        chance.all.values_mut().for_each(|i| i.2 = false);
        for round in 0..400 {
            chance.now += 500;
            chance.step();
            chance.all.values_mut().for_each(|i| i.1 = true);
            if round % 40 == 39 && chance.status.phase == RolloutPhase::Waiting {
                chance.status.orders.promoted += 1;
            }
        }
        assert_eq!(chance.status.phase, RolloutPhase::Complete, "seed {seed}: {:?} {:?}", chance.status, chance.spec);
        assert_eq!(chance.all.len(), chance.wanted, "seed {seed}");
        assert!(chance.all.values().all(|i| i.0 == "t9"), "seed {seed}");
    }
}

fn with_parts(lab: &mut Lab) {
    lab.submit(&create::<Image>(Some("default"), "proxy", image("proxy"))).unwrap();
    let parts = json!({
        "init": [{"name": "migrate", "resources": {"cpu": "700m", "memory": "64Mi"}}],
        "sidecars": [{"name": "proxy", "image": "proxy", "resources": {"cpu": "200m", "memory": "128Mi", "scratch": "1Mi"}}],
        "shared": {"size": "8Mi"}, "resources": {"cpu": "100m", "memory": "128Mi", "scratch": "1Mi"},
    });
    lab.patch(json!({"spec": parts}));
    lab.pass(1);
    lab.until(RolloutPhase::Complete);
}

#[test]
fn a_part_whose_image_moves_on_rolls_the_app_out_and_an_undo_pins_its_content() {
    let mut lab = Lab::new(2, json!({}));
    with_parts(&mut lab);
    let of = |lab: &Lab| lab.instances().iter().map(|i| i.spec.part_digests.get("proxy").copied()).collect::<Vec<_>>();
    let first = image("proxy").digest;
    assert_eq!((lab.rollout().revision, of(&lab)), (2, vec![Some(first); 2]));
    let patch = json!({"spec": image("newer")});
    lab.submit(&intent("images", Some("default"), "proxy", Change::Patch { patch })).unwrap();
    lab.pass(1);
    lab.until(RolloutPhase::Complete);
    assert_eq!((lab.rollout().revision, of(&lab)), (3, vec![Some(image("newer").digest); 2]));
    assert_eq!(lab.instances()[0].spec.image_digest, image("web").digest);

    lab.order(RolloutOrder::Undo { to: None }).unwrap();
    lab.pass(1);
    lab.until(RolloutPhase::Complete);
    assert_eq!(of(&lab), vec![Some(first); 2]);
    let spec = &lab.app().spec;
    assert_eq!((spec.image_digest, spec.part_digests.get("proxy")), (None, Some(&first)));
    let patch = json!({"spec": {"partDigests": {"proxy": nexus_model::Digest::of(b"somebody else's")}}});
    let refused = lab.submit(&intent("apps", Some("default"), "shop", Change::Patch { patch })).unwrap_err();
    assert_eq!(refused.errors[0].field, "spec.partDigests.proxy");
    // Without the image nothing new can be made, and what is missing is named.
    lab.patch(json!({"spec": {"partDigests": {"proxy": null}, "sidecars": [{"name": "proxy", "image": "absent"}]}}));
    lab.pass(2);
    let ready = lab.app().status.conditions.iter().find(|c| c.kind == "Ready").unwrap().clone();
    assert!(ready.reason == "ImageNotFound" && ready.message.contains("absent"), "{ready:?}");
    assert_eq!(lab.ready(None), 2, "what runs stays");
}

#[test]
fn quotas_and_hosts_count_all_parts_and_statuses_tell_of_those_that_there_are() {
    let mut lab = Lab::new(2, json!({}));
    with_parts(&mut lab);
    // Two sums: of memory the containers that run together, of processors what the init step takes.
    let used = lab.core.world.usage(&name("default")).unwrap().status.used;
    assert_eq!((used.cpu, used.memory), (MilliCpu(1400), Bytes(512 << 20)));
    let host = lab.instances()[0].status.host.clone().unwrap();
    let reserved = lab.core.world.host(&host).unwrap().status.reserved;
    assert_eq!((reserved.cpu, reserved.memory, reserved.scratch), (MilliCpu(700), Bytes(256 << 20), Bytes(72 << 20)));

    let instance = lab.instances()[0].clone();
    let (index, capacity) = (1, Capacity::default());
    let spec = common::host("zone-a", "cell-a", index, capacity);
    let mut report = common::report(&host, spec, lab.revision, [&instance]);
    let known = lab.core.world.host(&host).unwrap().spec.clone();
    report.spec = known;
    let part = |of: &str, message: String| PartStatus { message, ..PartStatus::new(name(of), PartRole::Sidecar) };
    report.instances[0].parts = vec![part("proxy", "x".repeat(5000)), part("stranger", String::new())];
    lab.with(|core, at| core.report(&report, at)).unwrap();
    let told = lab.core.world.instance(instance.metadata.uid).unwrap().status.parts.clone();
    assert_eq!(told.iter().map(|p| p.name.as_str()).collect::<Vec<_>>(), ["proxy"]);
    assert_eq!(told[0].message.len(), 256);
}
