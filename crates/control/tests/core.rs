//! The writer's decisions, driven by hand: what users ask, what hosts report, what time brings.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use common::{create, image, intent, name, web};
use nexus_control::cells::{Cells, DEAD_AFTER};
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Intent};
use nexus_control::world::World;
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::plan::HostReport;
use nexus_model::{ApiError, Bytes, Code, MilliCpu, Name, Object, Timestamp};
use serde_json::json;

/// A region under test: a core, its clock, and what was committed.
struct Lab {
    core: Core,
    rng: SeededRng,
    bootstrap: Bootstrap,
    at: Duration,
    revision: u64,
    committed: BTreeMap<String, Vec<u8>>,
    /// Hosts whose agents behave: they run what they are told and report every second.
    alive: Vec<Name>,
}

impl Lab {
    fn new(hosts_per_zone: usize) -> Self {
        let zones = vec![name("zone-a"), name("zone-b"), name("zone-c")];
        let cells = vec![name("cell-a"), name("cell-b"), name("cell-c")];
        let bootstrap = Bootstrap { region: name("local"), domain: "localhost".into(), zones, cells };
        let core = Core::new(World::default(), bootstrap.clone(), Cells::new(Duration::ZERO, "server-a".into(), 1));
        let mut lab = Self {
            core,
            rng: SeededRng::new(7),
            bootstrap,
            at: Duration::ZERO,
            revision: 0,
            committed: BTreeMap::new(),
            alive: Vec::new(),
        };
        lab.with(|core, at| core.bootstrap(at));
        for zone in ["a", "b", "c"] {
            for n in 1..=hosts_per_zone {
                lab.alive.push(name(&format!("zone-{zone}-{n}")));
            }
        }
        lab.pass(Duration::from_secs(1));
        lab
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let now = Timestamp::from_millis(1_000_000 + self.at.as_millis() as i64);
        let at = Moment { now, monotonic: self.at, rng: &self.rng };
        let answer = f(&mut self.core, at);
        while self.core.reconcile(at) {}
        for pack in self.core.take_packs() {
            assert!(pack.ops.len() <= 126, "a transaction has {} operations", pack.ops.len());
            let bytes: usize = pack.ops.iter().map(|(k, v)| k.len() + v.as_ref().map_or(0, |v| v.len())).sum();
            assert!(bytes < 1 << 20, "a transaction has {bytes} bytes");
            self.revision += 1;
            for (key, value) in &pack.ops {
                match value {
                    Some(value) => self.committed.insert(key.clone(), value.to_vec()),
                    None => self.committed.remove(key),
                };
            }
            self.core.committed(&pack, self.revision);
        }
        assert_eq!(self.core.check_invariants(), Vec::<String>::new());
        answer
    }

    /// What a behaving agent says: it runs all that it is told.
    fn report(&self, host: &Name) -> HostReport {
        let (zone, n) = host.as_str().rsplit_once('-').unwrap();
        let index = (zone.bytes().last().unwrap() - b'a') * 16 + n.parse::<u8>().unwrap();
        let (memory, scratch) = (Bytes(2 << 30), Bytes(10 << 30));
        let capacity = Capacity { cpu: MilliCpu(2000), memory, scratch, instances: 100 };
        let spec = common::host(zone, &zone.replace("zone", "cell"), index, capacity);
        let runs = self.core.world.instances_on(host).filter(|i| i.metadata.deleting.is_none());
        common::report(host, spec, self.revision, runs)
    }

    /// Lets time pass, with every living agent reporting each half second.
    fn pass(&mut self, time: Duration) {
        let end = self.at + time;
        while self.at < end {
            self.at += Duration::from_millis(500);
            for host in self.alive.clone() {
                let report = self.report(&host);
                self.with(|core, at| core.report(&report, at)).unwrap();
            }
            self.with(|core, at| core.tick(at));
        }
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    /// Something global, or of the project `default`.
    fn create<K: Kind>(&mut self, object: &str, spec: K::Spec) -> Result<Accepted, ApiError> {
        let project = matches!(K::SCOPE, Scope::Project).then_some("default");
        self.submit(&create::<K>(project, object, spec))
    }

    fn app(&self, app: &str) -> &Object<App> {
        self.core.world.apps.get(Some(&name("default")), &name(app)).unwrap()
    }

    fn instances(&self, app: &str) -> Vec<&Object<Instance>> {
        self.core.world.instances_of(self.app(app).metadata.uid).collect()
    }
}

#[test]
fn an_app_spreads_over_zones_and_becomes_ready() {
    let mut lab = Lab::new(2);
    lab.create::<Image>("web", image("web")).unwrap();
    lab.create::<App>("shop", web(3)).unwrap();
    lab.pass(Duration::from_secs(2));
    let app = lab.app("shop");
    assert_eq!(app.status.phase, AppPhase::Ready, "{:?}", app.status);
    assert_eq!(app.status.hostnames, ["shop.localhost", "shop.default.localhost"]);
    let mut zones: Vec<_> = lab.instances("shop").iter().map(|i| i.status.zone.clone().unwrap()).collect();
    zones.sort();
    assert_eq!(zones, [name("zone-a"), name("zone-b"), name("zone-c")]);
}

#[test]
fn a_dead_hosts_instances_run_elsewhere_and_its_capacity_is_held_until_it_returns() {
    let mut lab = Lab::new(2);
    lab.create::<Image>("web", image("web")).unwrap();
    lab.create::<App>("shop", web(3)).unwrap();
    lab.pass(Duration::from_secs(2));
    let victim = lab.instances("shop")[0].status.host.clone().unwrap();
    lab.alive.retain(|h| *h != victim);
    lab.pass(DEAD_AFTER + Duration::from_secs(2));
    assert_eq!(lab.core.world.host(&victim).unwrap().status.state, HostState::Dead);
    assert_eq!(lab.app("shop").status.ready_replicas, 3);
    assert!(lab.instances("shop").iter().all(|i| i.status.host.as_ref() != Some(&victim)));
    let mut zones: Vec<_> = lab.instances("shop").iter().map(|i| i.status.zone.clone().unwrap()).collect();
    zones.sort();
    zones.dedup();
    assert_eq!(zones.len(), 3, "the lost instance still counted in its zone");
    assert_eq!(lab.core.world.host(&victim).unwrap().status.reserved.instances, 1, "not confirmed gone");
    lab.alive.push(victim.clone());
    lab.pass(Duration::from_secs(2));
    let host = lab.core.world.host(&victim).unwrap();
    assert_eq!((host.status.state, host.status.reserved.instances, host.status.epoch), (HostState::Ready, 0, 1));
}

#[test]
fn when_many_hosts_of_a_cell_vanish_at_once_the_brake_holds() {
    let mut lab = Lab::new(2);
    lab.create::<Image>("web", image("web")).unwrap();
    lab.create::<App>("shop", web(3)).unwrap();
    lab.pass(Duration::from_secs(2));
    lab.alive.retain(|h| !h.as_str().starts_with("zone-a"));
    lab.pass(DEAD_AFTER * 3);
    let state = |h: &str| lab.core.world.host(&name(h)).unwrap().status.state;
    assert_eq!((state("zone-a-1"), state("zone-a-2")), (HostState::Suspect, HostState::Suspect));
    assert!(lab.core.world.cells.get(None, &name("cell-a")).unwrap().status.brake);
    lab.alive.push(name("zone-a-1"));
    lab.pass(DEAD_AFTER);
    let state = |h: &str| lab.core.world.host(&name(h)).unwrap().status.state;
    assert_eq!((state("zone-a-1"), state("zone-a-2")), (HostState::Ready, HostState::Dead));
}

#[test]
fn hosts_of_a_cell_that_fall_silent_one_after_another_within_seconds_are_spared_like_those_that_do_together() {
    let mut lab = Lab::new(6);
    lab.pass(Duration::from_secs(2));
    for n in 1..=4 {
        lab.alive.retain(|h| *h != name(&format!("zone-a-{n}")));
        lab.pass(Duration::from_millis(500));
    }
    lab.pass(DEAD_AFTER * 2);
    for n in 1..=4 {
        assert_eq!(lab.core.world.host(&name(&format!("zone-a-{n}"))).unwrap().status.state, HostState::Suspect);
    }
}

#[test]
fn hosts_that_an_overloaded_server_hears_late_are_not_dead_and_one_that_is_dead_is_found_out() {
    let mut lab = Lab::new(6);
    lab.pass(Duration::from_secs(2));
    let all = lab.alive.clone();
    let dead = name("zone-a-1");
    // All are heard in turn, first every second, in the end every eight.
    for every in (2..=16_usize).chain([16; 4]) {
        for turn in 0..every {
            lab.alive = all.iter().enumerate().filter(|(n, _)| n % every == turn).map(|(_, h)| h.clone()).collect();
            if every == 16 {
                lab.alive.retain(|h| *h != dead);
            }
            lab.pass(Duration::from_millis(500));
            let state = |h: &Name| lab.core.world.host(h).unwrap().status.state;
            let spared = all.iter().filter(|h| **h != dead);
            assert!(spared.map(state).all(|s| s == HostState::Ready), "heard every {every} half seconds");
        }
    }
    assert_eq!(lab.core.world.host(&dead).unwrap().status.state, HostState::Dead);
    // Not stretched any more: half of the time is enough again.
    lab.alive = all.iter().filter(|h| **h != dead).cloned().collect();
    lab.pass(Duration::from_secs(10));
    let next = name("zone-b-1");
    lab.alive.retain(|h| *h != next);
    lab.pass(DEAD_AFTER + Duration::from_secs(1));
    assert_eq!(lab.core.world.host(&next).unwrap().status.state, HostState::Dead);
}

#[test]
fn a_new_leader_declares_nobody_dead_before_a_full_round() {
    let mut lab = Lab::new(2);
    lab.create::<Image>("web", image("web")).unwrap();
    lab.create::<App>("shop", web(3)).unwrap();
    lab.pass(Duration::from_secs(2));
    // A second leader starts from what was committed, long after.
    lab.at += Duration::from_secs(3600);
    let world = std::mem::take(&mut lab.core.world);
    lab.core =
        Core::new(World { scheduler: None, ..world }, lab.bootstrap.clone(), Cells::new(lab.at, "server-b".into(), 2));
    let silent = std::mem::take(&mut lab.alive);
    lab.pass(DEAD_AFTER - Duration::from_secs(1));
    assert!(lab.core.world.hosts.live.values().all(|h| h.status.state != HostState::Dead));
    lab.alive = silent;
    lab.pass(Duration::from_secs(3));
    assert!(lab.core.world.hosts.live.values().all(|h| h.status.state == HostState::Ready));
    assert_eq!(lab.app("shop").status.ready_replicas, 3);
}

#[test]
fn a_leader_that_was_held_up_itself_declares_nobody_dead() {
    let mut lab = Lab::new(1);
    lab.create::<Image>("web", image("web")).unwrap();
    lab.create::<App>("shop", web(3)).unwrap();
    lab.pass(Duration::from_secs(2));
    // Nothing was taken in for a minute, then the judge comes before the heartbeats that wait.
    lab.at += Duration::from_secs(60);
    lab.with(|core, at| core.tick(at));
    assert!(lab.core.world.hosts.live.values().all(|h| h.status.state == HostState::Ready));
    lab.pass(Duration::from_secs(2));
    assert_eq!(lab.app("shop").status.ready_replicas, 3);
}

#[test]
fn the_largest_object_fits_and_a_larger_one_is_refused() {
    let mut lab = Lab::new(2);
    lab.create::<Image>("web", image("web")).unwrap();
    let mut spec = web(40);
    spec.env = (0..3).map(|n| (format!("V{n}"), "x".repeat(16 << 10))).collect();
    lab.create::<App>("wide", spec.clone()).unwrap();
    assert_eq!(lab.instances("wide").len(), 40);
    spec.env.insert("V4".into(), "x".repeat(16 << 10));
    assert_eq!(lab.create::<App>("wider", spec).unwrap_err().code, Code::TooLarge);
}

#[test]
fn quota_is_taken_and_given_back_with_the_app() {
    let mut lab = Lab::new(1);
    lab.create::<Image>("web", image("web")).unwrap();
    let patch = json!({"spec": {"quota": {"instances": 4}}});
    lab.submit(&intent("projects", None, "default", Change::Patch { patch })).unwrap();
    lab.create::<App>("one", web(3)).unwrap();
    let refused = lab.create::<App>("two", web(2)).unwrap_err();
    assert_eq!(refused.code, Code::QuotaExceeded);
    assert!(refused.detail.contains("instances quota of project default is 4"), "{}", refused.detail);
    lab.submit(&intent("apps", Some("default"), "one", Change::Delete)).unwrap();
    lab.create::<App>("two", web(4)).unwrap();
    let used = lab.core.world.usage(&name("default")).unwrap().status.used;
    assert_eq!(used.instances, 4);
}

#[test]
fn a_delete_frees_the_name_at_once_and_ends_when_hosts_confirm() {
    let mut lab = Lab::new(1);
    lab.create::<Image>("web", image("web")).unwrap();
    lab.create::<App>("shop", web(2)).unwrap();
    lab.pass(Duration::from_secs(1));
    lab.submit(&intent("apps", Some("default"), "shop", Change::Delete)).unwrap();
    assert_eq!(lab.core.world.apps.buried.len(), 1);
    assert_eq!(lab.core.world.instances.buried.len(), 2);
    lab.create::<App>("shop", web(1)).unwrap();
    lab.pass(Duration::from_secs(2));
    assert_eq!((lab.core.world.apps.buried.len(), lab.core.world.instances.buried.len()), (0, 0));
    assert_eq!(lab.app("shop").status.ready_replicas, 1);
    assert!(!lab.committed.keys().any(|k| k.starts_with("t/")));
}

#[test]
fn an_address_is_given_again_only_after_all_others_of_its_host() {
    let mut lab = Lab::new(1);
    lab.create::<Image>("web", image("web")).unwrap();
    let mut given = std::collections::BTreeSet::new();
    for turn in 0..100 {
        lab.create::<App>("shop", web(1)).unwrap();
        lab.pass(Duration::from_secs(1));
        let placed = lab.core.world.instances.live.values().next().unwrap().status.clone();
        assert!(given.insert((placed.host, placed.slot)), "turn {turn}: slot {:?} again", placed.slot);
        lab.submit(&intent("apps", Some("default"), "shop", Change::Delete)).unwrap();
        lab.pass(Duration::from_secs(2));
    }
}

#[test]
fn a_full_region_says_how_many_hosts_each_filter_refused() {
    let mut lab = Lab::new(1);
    lab.create::<Image>("web", image("web")).unwrap();
    let mut spec = web(1);
    spec.resources.memory = Bytes(4 << 30);
    let dry = Intent { dry_run: true, ..create::<App>(Some("default"), "big", spec.clone()) };
    let refused = lab.submit(&dry).unwrap_err();
    assert_eq!(refused.code, Code::Unschedulable);
    assert!(lab.core.world.apps.live.is_empty() && lab.core.world.instances.live.is_empty());
    lab.create::<App>("big", spec).unwrap();
    let waiting = lab.instances("big")[0];
    assert!(waiting.status.message.contains("3 lack memory"), "{}", waiting.status.message);
    assert!(lab.app("big").status.conditions[0].message.contains("3 lack memory"));
}

#[test]
fn a_new_template_replaces_instances_without_dipping_below_the_wanted_ready_count() {
    let mut lab = Lab::new(2);
    lab.create::<Image>("web", image("web")).unwrap();
    lab.create::<App>("shop", web(4)).unwrap();
    lab.pass(Duration::from_secs(2));
    let before: Vec<_> = lab.instances("shop").iter().map(|i| i.metadata.uid).collect();
    let patch = json!({"spec": {"env": {"COLOUR": "green"}}});
    lab.submit(&intent("apps", Some("default"), "shop", Change::Patch { patch })).unwrap();
    for _ in 0..20 {
        lab.pass(Duration::from_millis(500));
        assert!(lab.instances("shop").iter().filter(|i| i.status.ready).count() >= 4);
    }
    assert_eq!(lab.app("shop").status.phase, AppPhase::Ready);
    assert!(lab.instances("shop").iter().all(|i| !before.contains(&i.metadata.uid)));
}

/// Has an operator decide about a host.
fn decide(lab: &mut Lab, host: &str, draining: bool) {
    let patch = json!({"spec": {"cordoned": draining, "draining": draining}});
    lab.submit(&intent("hosts", None, host, Change::Patch { patch })).unwrap();
}

fn on(lab: &Lab, host: &str) -> usize {
    lab.core.world.instances_on(&name(host)).count()
}

#[test]
fn a_drained_host_is_emptied_without_dipping_below_the_wanted_ready_count() {
    let mut lab = Lab::new(2);
    lab.create::<Image>("web", image("web")).unwrap();
    for app in ["one", "two"] {
        lab.create::<App>(app, web(4)).unwrap();
    }
    lab.pass(Duration::from_secs(2));
    let victim = lab.instances("one")[0].status.host.clone().unwrap();
    let stay = on(&lab, "zone-a-1") + on(&lab, "zone-a-2");
    assert!(stay > 0);
    decide(&mut lab, victim.as_str(), true);
    for _ in 0..40 {
        lab.pass(Duration::from_millis(500));
        for app in ["one", "two"] {
            let ready = lab.instances(app).iter().filter(|i| i.status.ready).count();
            assert!(ready >= 4, "{ready} of {app} are ready while {victim} is drained");
        }
    }
    assert_eq!(on(&lab, victim.as_str()), 0, "also what was stopped is confirmed gone");
    assert_eq!(lab.app("one").status.phase, AppPhase::Ready);
    assert_eq!(lab.core.world.host(&victim).unwrap().status.state, HostState::Ready, "it is empty, not gone");

    // Nothing comes back until an operator says so.
    lab.create::<App>("three", web(12)).unwrap();
    lab.pass(Duration::from_secs(2));
    assert_eq!(on(&lab, victim.as_str()), 0);
}

#[test]
fn what_finds_no_other_host_stays_and_an_end_to_draining_takes_back_what_was_begun() {
    let mut lab = Lab::new(1);
    lab.create::<Image>("web", image("web")).unwrap();
    // Each host takes two of these, so the region is full with six.
    let mut spec = web(6);
    spec.resources.cpu = MilliCpu(1000);
    lab.create::<App>("big", spec).unwrap();
    lab.pass(Duration::from_secs(2));
    assert_eq!(on(&lab, "zone-a-1"), 2);
    decide(&mut lab, "zone-a-1", true);
    lab.pass(Duration::from_secs(10));
    assert_eq!(on(&lab, "zone-a-1"), 2, "what has nowhere to go stays");
    assert_eq!(lab.instances("big").iter().filter(|i| i.status.ready).count(), 6);
    let waits = lab.instances("big").into_iter().find(|i| i.status.host.is_none()).expect("one waits for room");
    assert!(waits.status.message.contains("no host of 3 can take it"), "{}", waits.status.message);

    decide(&mut lab, "zone-a-1", false);
    lab.pass(Duration::from_secs(2));
    assert_eq!(lab.instances("big").len(), 6);
    assert_eq!((on(&lab, "zone-a-1"), lab.app("big").status.phase), (2, AppPhase::Ready));
}

#[test]
fn retries_with_one_key_are_answered_once_and_another_request_with_it_is_refused() {
    let mut lab = Lab::new(1);
    lab.create::<Image>("web", image("web")).unwrap();
    let mut intent = create::<App>(Some("default"), "shop", web(1));
    intent.idempotency_key = Some("k1".into());
    let first = lab.submit(&intent).unwrap();
    let again = lab.submit(&intent).unwrap();
    assert!(first.created && again.created && again.replayed);
    assert_eq!(first.object.metadata.uid, again.object.metadata.uid);
    intent.change = Change::Delete;
    assert_eq!(lab.submit(&intent).unwrap_err().code, Code::Conflict);
    assert_eq!(lab.core.world.apps.live.len(), 1);
}

#[test]
fn preconditions_protection_and_immutability_hold() {
    let mut lab = Lab::new(1);
    lab.create::<Image>("web", image("web")).unwrap();
    lab.create::<App>("shop", web(1)).unwrap();
    let mut delete = intent("apps", Some("default"), "shop", Change::Delete);
    delete.if_match = Some(1);
    assert_eq!(lab.submit(&delete).unwrap_err().code, Code::PreconditionFailed);
    let patch = json!({"metadata": {"deletionProtection": true}});
    lab.submit(&intent("apps", Some("default"), "shop", Change::Patch { patch })).unwrap();
    delete.if_match = None;
    assert_eq!(lab.submit(&delete).unwrap_err().code, Code::Conflict);
    let patch = json!({"spec": {"organization": "other"}});
    let refused = lab.submit(&intent("projects", None, "default", Change::Patch { patch })).unwrap_err();
    assert_eq!(refused.errors[0].field, "spec.organization");
    let patch = json!({"metadata": {"name": "other"}});
    let refused = lab.submit(&intent("apps", Some("default"), "shop", Change::Patch { patch })).unwrap_err();
    assert_eq!(refused.errors[0].field, "metadata.name");
}

#[test]
fn a_deleted_project_takes_everything_with_it() {
    let mut lab = Lab::new(1);
    lab.create::<Project>("side", ProjectSpec::default()).unwrap();
    lab.submit(&create::<Image>(Some("side"), "web", image("x"))).unwrap();
    lab.submit(&create::<App>(Some("side"), "shop", web(30))).unwrap();
    lab.pass(Duration::from_secs(1));
    lab.submit(&intent("projects", None, "side", Change::Delete)).unwrap();
    lab.pass(Duration::from_secs(3));
    let left: Vec<_> = lab.committed.keys().filter(|k| k.contains("/side/") || k.starts_with("t/")).collect();
    assert!(left.is_empty(), "{left:?}");
    lab.create::<Project>("side", ProjectSpec::default()).unwrap();
}

#[test]
fn the_same_report_again_is_news_once_a_row_has_changed() {
    let mut lab = Lab::new(1);
    lab.create::<Image>("web", image("web")).unwrap();
    lab.create::<App>("shop", web(1)).unwrap();
    lab.pass(Duration::from_secs(2));
    let host = lab.instances("shop")[0].status.host.clone().unwrap();
    let well = lab.report(&host);
    let mut ill = well.clone();
    ill.instances[0].ready = false;
    for _ in 0..2 {
        for (report, ready) in [(&well, true), (&well, true), (&ill, false), (&ill, false)] {
            let before = lab.revision;
            let was = lab.instances("shop")[0].status.ready;
            lab.with(|core, at| core.report(report, at)).unwrap();
            assert_eq!(lab.instances("shop")[0].status.ready, ready);
            assert_eq!(lab.revision > before, was != ready, "only a change is committed");
        }
    }
    // Buried, still reported as before: it stays until its host has applied a plan without it and says no more of it.
    lab.submit(&intent("apps", Some("default"), "shop", Change::Delete)).unwrap();
    let deleted = lab.revision;
    lab.with(|core, at| core.report(&well, at)).unwrap();
    assert_eq!(lab.core.world.instances_on(&host).count(), 1);
    let mut gone = well.clone();
    gone.instances.clear();
    lab.with(|core, at| core.report(&gone, at)).unwrap();
    assert_eq!(lab.core.world.instances_on(&host).count(), 1, "said of an older plan");
    gone.applied = Some(deleted);
    lab.with(|core, at| core.report(&gone, at)).unwrap();
    assert_eq!(lab.core.world.instances_on(&host).count(), 0);
}

#[test]
fn a_host_whose_reports_wait_for_the_writer_is_not_silent() {
    let mut lab = Lab::new(2);
    lab.pass(Duration::from_secs(2));
    let waits = name("zone-a-1");
    lab.alive.retain(|h| *h != waits);
    for _ in 0..20 {
        let at = lab.at;
        lab.core.cells.arrived(&waits, at);
        lab.pass(Duration::from_millis(500));
    }
    assert_eq!(lab.core.world.host(&waits).unwrap().status.state, HostState::Ready);
    lab.pass(DEAD_AFTER + Duration::from_secs(1));
    assert_eq!(lab.core.world.host(&waits).unwrap().status.state, HostState::Dead);
}

#[test]
fn what_befalls_everything_on_a_host_or_in_a_cell_at_once_fits_in_transactions() {
    // `Lab::with` looks at the size of each.
    let mut lab = Lab::new(1);
    lab.create::<Image>("web", image("one")).unwrap();
    let resources =
        Resources { cpu: MilliCpu(20), memory: Bytes(16 << 20), scratch: Bytes(1 << 20), ..Resources::default() };
    lab.create::<App>("crowd", AppSpec { resources, ..web(240) }).unwrap();
    lab.pass(Duration::from_secs(2));
    let host = name("zone-a-1");
    assert_eq!(lab.core.world.instances_on(&host).filter(|i| i.status.ready).count(), 80);
    // All of them end at once, and then the host loses them all.
    let mut report = lab.report(&host);
    for i in &mut report.instances {
        (i.phase, i.ready, i.restarts) = (InstancePhase::BackOff, false, 1);
        i.message = "exit code 1".into();
    }
    lab.with(|core, at| core.report(&report, at)).unwrap();
    let of = |lab: &Lab, phase| lab.core.world.instances_on(&host).filter(|i| i.status.phase == phase).count();
    assert_eq!(of(&lab, InstancePhase::BackOff), 80);
    lab.pass(Duration::from_secs(1));
    assert_eq!(of(&lab, InstancePhase::Running), 80);

    // A hundred more hosts of one cell join, and fall silent together.
    let capacity = Capacity { cpu: MilliCpu(2000), memory: Bytes(2 << 30), scratch: Bytes(10 << 30), instances: 100 };
    for n in 100..200 {
        let spec = common::host("zone-a", "cell-a", n, capacity);
        let report = common::report(&name(&format!("late-{n}")), spec, lab.revision, []);
        lab.with(|core, at| core.report(&report, at)).unwrap();
    }
    lab.pass(Duration::from_secs(3));
    let suspect = |h: &&Object<Host>| h.status.state == HostState::Suspect;
    assert_eq!(lab.core.world.hosts.live.values().filter(suspect).count(), 100);
}
