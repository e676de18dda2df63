//! A fleet under test: the core of the global group and those of two regions, with the links between them driven by hand.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use common::{create, image, intent, name, web};
use nexus_control::cells::Cells;
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::fleet::{Adopt, Presence};
use nexus_control::intent::{Accepted, Change, RolloutOrder};
use nexus_control::world::{Part, World};
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::plan::HostReport;
use nexus_model::{ApiError, Code, MilliCpu, Name, Object, Timestamp};
use nexus_store::{KeyValue, Revision, WatchEvent};
use serde_json::json;

/// One group: its core and what it committed.
struct Group {
    core: Core,
    rng: SeededRng,
    revision: u64,
    rows: BTreeMap<String, KeyValue>,
    log: Vec<(u64, Vec<WatchEvent>)>,
    /// Of a region: how much of the global log it has been shown, and whether it is cut off.
    shown: usize,
    cut: bool,
    /// Its one host has nothing of what it is told to end: instances are gone as soon as they are buried.
    host_answers: bool,
}

impl Group {
    fn new(region: &str, rows: BTreeMap<String, KeyValue>, revision: u64) -> Self {
        let mut world = World { part: Part::Region, ..World::default() };
        rows.values().for_each(|kv| world.take_in(kv).unwrap());
        let cell = name(&format!("{region}-cell"));
        let zone = name(&format!("{region}-zone"));
        let of_region = |name: Name| if region == GLOBAL { vec![] } else { vec![name] };
        let bootstrap = Bootstrap {
            region: name(region),
            domain: "localhost".into(),
            zones: of_region(zone),
            cells: of_region(cell),
        };
        let cells = Cells::new(Duration::ZERO, format!("{region}-server"), 1);
        let core = Core::new(world, bootstrap, cells);
        let rng = SeededRng::new(revision + region.len() as u64);
        Self { core, rng, revision, rows, log: Vec::new(), shown: 0, cut: false, host_answers: true }
    }

    fn with<T>(&mut self, at: Duration, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let now = Timestamp::from_millis(1_000_000 + at.as_millis() as i64);
        let moment = Moment { now, monotonic: at, rng: &self.rng };
        let answer = f(&mut self.core, moment);
        while self.core.reconcile(moment) {}
        for pack in self.core.take_packs() {
            self.revision += 1;
            let mut events = Vec::new();
            for (key, value) in &pack.ops {
                let prev = self.rows.remove(key);
                let revision = Revision(self.revision);
                events.push(match value {
                    Some(value) => {
                        let kv = KeyValue {
                            key: Bytes::from(key.clone()),
                            value: value.clone(),
                            create_revision: prev.as_ref().map_or(revision, |p| p.create_revision),
                            mod_revision: revision,
                        };
                        self.rows.insert(key.clone(), kv.clone());
                        WatchEvent::Put { kv, prev }
                    }
                    None => WatchEvent::Delete { key: Bytes::from(key.clone()), prev, mod_revision: revision },
                });
            }
            self.log.push((self.revision, events));
            self.core.committed(&pack, self.revision);
        }
        assert_eq!(self.core.check_invariants(), Vec::<String>::new());
        answer
    }

    /// What the region's one host says: it runs all that it is told.
    fn report(&self) -> HostReport {
        let region = self.core.region().clone();
        let index = region.as_str().bytes().last().unwrap();
        let host = name(&format!("{region}-host"));
        let told = self.core.world.instances_on(&host);
        let runs = told.filter(|i| i.metadata.deleting.is_none() || !self.host_answers);
        let gib = |n: u64| nexus_model::Bytes(n << 30);
        let capacity = Capacity { cpu: MilliCpu(100_000), memory: gib(100), scratch: gib(1000), instances: 200 };
        let spec = common::host(&format!("{region}-zone"), &format!("{region}-cell"), index, capacity);
        common::report(&host, spec, self.revision, runs)
    }
}

struct Fleet {
    global: Group,
    regions: BTreeMap<Name, Group>,
    at: Duration,
}

impl Fleet {
    fn new() -> Self {
        let mut global = Group::new(GLOBAL, BTreeMap::new(), 0);
        global.with(Duration::ZERO, |core, at| core.bootstrap(at));
        let mut fleet = Self { global, regions: BTreeMap::new(), at: Duration::ZERO };
        fleet.found("eu");
        fleet.found("us");
        fleet.pass(3);
        fleet.create::<Image>(GLOBAL, D, "web", image("web")).unwrap();
        fleet.pass(1);
        fleet
    }

    /// A new region with an empty log.
    fn found(&mut self, region: &str) {
        let mut group = Group::new(region, BTreeMap::new(), 0);
        group.with(self.at, |core, at| core.bootstrap(at));
        self.regions.insert(name(region), group);
    }

    /// Another server takes over a region's writer, with a copy of the global group as it was after `shown` commits.
    fn take_over(&mut self, region: &str, shown: usize) {
        let old = self.regions.remove(&name(region)).unwrap();
        let mut new = Group::new(region, old.rows, old.revision);
        (new.cut, new.host_answers) = (old.cut, old.host_answers);
        new.with(self.at, |core, at| core.bootstrap(at));
        let mut world = World::default();
        let mut rows = BTreeMap::new();
        for (_, events) in &self.global.log[..shown] {
            for event in events {
                match event {
                    WatchEvent::Put { kv, .. } => rows.insert(kv.key.clone(), kv.clone()),
                    WatchEvent::Delete { key, .. } => rows.remove(key),
                };
            }
        }
        rows.values().for_each(|kv| world.take_in(kv).unwrap());
        let revision = self.global.log[..shown].last().map_or(0, |(revision, _)| *revision);
        new.shown = shown;
        new.with(self.at, |core, at| core.adopt(Adopt::World(Box::new(world), revision), at));
        self.regions.insert(name(region), new);
    }

    /// Half seconds pass: hosts report, the global log reaches the regions, their summaries reach the global group.
    fn pass(&mut self, times: usize) {
        for _ in 0..times {
            self.at += Duration::from_millis(500);
            let at = self.at;
            for group in self.regions.values_mut() {
                let report = group.report();
                group.with(at, |core, at| core.report(&report, at)).unwrap();
                group.with(at, |core, at| core.tick(at));
                if group.cut {
                    continue;
                }
                if group.shown == 0 {
                    let news = Adopt::World(Box::default(), 0);
                    group.with(at, |core, at| core.adopt(news, at));
                }
                for (revision, events) in &self.global.log[group.shown..] {
                    let news = Adopt::Events(events.clone(), *revision);
                    group.with(at, |core, at| core.adopt(news, at));
                }
                group.shown = self.global.log.len();
                let presence = Presence { epoch: 1, ..Presence::default() };
                let summary = group.core.summary(&presence);
                self.global.with(at, |core, at| core.hear(&summary, at)).unwrap();
            }
            self.global.with(at, |core, at| core.tick(at));
        }
    }

    fn submit(
        &mut self,
        region: &str,
        plural: &str,
        project: Option<&str>,
        object: &str,
        change: Change,
    ) -> Result<Accepted, ApiError> {
        let intent = intent(plural, project, object, change);
        let at = self.at;
        self.group(region).with(at, |core, at| core.intent(&intent, at))
    }

    fn group(&mut self, region: &str) -> &mut Group {
        if region == GLOBAL { &mut self.global } else { self.regions.get_mut(&name(region)).unwrap() }
    }

    fn create<K: Kind>(
        &mut self,
        region: &str,
        project: Option<&str>,
        object: &str,
        spec: K::Spec,
    ) -> Result<Accepted, ApiError> {
        let (at, intent) = (self.at, create::<K>(project, object, spec));
        self.group(region).with(at, |core, at| core.intent(&intent, at))
    }

    fn delete(
        &mut self,
        region: &str,
        plural: &str,
        project: Option<&str>,
        object: &str,
    ) -> Result<Accepted, ApiError> {
        self.submit(region, plural, project, object, Change::Delete)
    }

    fn patch(&mut self, region: &str, plural: &str, project: Option<&str>, object: &str, patch: serde_json::Value) {
        self.submit(region, plural, project, object, Change::Patch { patch }).unwrap();
    }

    /// An app of the project `default`.
    fn app(&self, region: &str, app: &str) -> Option<&Object<App>> {
        let world = if region == GLOBAL { &self.global.core.world } else { &self.regions[&name(region)].core.world };
        world.apps.get(Some(&name("default")), &name(app))
    }

    fn replicas(&self, region: &str, app: &str) -> Option<u32> {
        self.app(region, app).map(|a| a.spec.replicas)
    }

    fn world(&self, region: &str) -> &World {
        &self.regions[&name(region)].core.world
    }

    fn ready_reason(&self, app: &str) -> &str {
        let app = self.app(GLOBAL, app).unwrap();
        &app.status.conditions.iter().find(|c| c.kind == "Ready").unwrap().reason
    }
}

const D: Option<&str> = Some("default");

#[test]
fn regions_register_and_a_project_is_known_in_each_with_a_quota_of_its_own() {
    let mut fleet = Fleet::new();
    let regions: Vec<_> = fleet.global.core.world.regions.live.keys().map(|(_, n)| n.to_string()).collect();
    assert_eq!(regions, ["eu", "us"]);

    let quota = Quota { instances: 3, ..Quota::default() };
    fleet.create::<Project>(GLOBAL, None, "shop", ProjectSpec { quota, ..ProjectSpec::default() }).unwrap();
    let early = fleet.create::<App>("eu", Some("shop"), "web", web(3)).unwrap_err();
    assert_eq!(early, ApiError::not_found("Project", "shop"), "a region knows what it has been shown");
    fleet.pass(1);
    for region in ["eu", "us"] {
        fleet.create::<App>(region, Some("shop"), "web", web(3)).unwrap();
        let over = fleet.create::<App>(region, Some("shop"), "more", web(1)).unwrap_err();
        assert_eq!(over.code, Code::QuotaExceeded);
        let usage = fleet.world(region).usage(&name("shop")).unwrap();
        assert_eq!(usage.status.used.instances, 3);
    }
    fleet.pass(2);
    let project = fleet.global.core.world.project(&name("shop")).unwrap();
    assert_eq!(project.status.used.instances, 6, "the sum over the regions");

    // Each group decides only what is at home in it.
    assert!(fleet.create::<Project>("eu", None, "other", ProjectSpec::default()).is_err());
    assert!(fleet.create::<Zone>(GLOBAL, None, "z", ZoneSpec::default()).is_err());
}

#[test]
fn a_global_app_is_shared_out_follows_its_spec_and_ends_everywhere() {
    let mut fleet = Fleet::new();
    fleet.create::<App>(GLOBAL, D, "web", web(5)).unwrap();
    fleet.pass(4);
    assert_eq!((fleet.replicas("eu", "web"), fleet.replicas("us", "web")), (Some(3), Some(2)));
    let app = fleet.app(GLOBAL, "web").unwrap();
    assert_eq!((app.status.phase, app.status.ready_replicas), (AppPhase::Ready, 5), "{:?}", app.status);

    // A change follows, also one of the regions.
    fleet.patch(GLOBAL, "apps", D, "web", json!({"spec": {"replicas": 1, "env": {"A": "b"}}}));
    fleet.pass(4);
    assert_eq!((fleet.replicas("eu", "web"), fleet.replicas("us", "web")), (Some(1), Some(1)), "at least one each");
    assert_eq!(fleet.app("us", "web").unwrap().spec.env["A"], "b");
    let unknown =
        fleet.submit(GLOBAL, "apps", D, "web", Change::Patch { patch: json!({"spec": {"regions": ["mars"]}}) });
    assert_eq!(unknown.unwrap_err().errors[0].field, "spec.regions[0]");
    fleet.patch(GLOBAL, "apps", D, "web", json!({"spec": {"regions": ["us"]}}));
    fleet.pass(4);
    assert_eq!((fleet.replicas("eu", "web"), fleet.replicas("us", "web")), (None, Some(1)));
    assert_eq!(fleet.app(GLOBAL, "web").unwrap().status.phase, AppPhase::Ready);
    fleet.patch(GLOBAL, "apps", D, "web", json!({"spec": {"regions": []}}));
    fleet.pass(4);

    // Users change the global app, not a share of it.
    let refused = fleet.delete("us", "apps", D, "web").unwrap_err();
    assert_eq!(refused.code, Code::Conflict, "{refused:?}");

    // Its tombstone waits for the last instance in the last region; its name does not.
    fleet.group("us").host_answers = false;
    fleet.delete(GLOBAL, "apps", D, "web").unwrap();
    fleet.pass(4);
    assert_eq!((fleet.replicas("eu", "web"), fleet.replicas("us", "web")), (None, None));
    assert_eq!(fleet.global.core.world.apps.buried.len(), 1);
    fleet.create::<App>(GLOBAL, D, "web", web(2)).unwrap();
    fleet.pass(4);
    assert_eq!(fleet.replicas("us", "web"), Some(1));
    fleet.group("us").host_answers = true;
    fleet.pass(4);
    assert_eq!(fleet.global.core.world.apps.buried.len(), 0);
    assert_eq!(fleet.replicas("us", "web"), Some(1));
}

#[test]
fn a_global_apps_rollout_goes_on_in_each_region_by_itself_and_heeds_what_is_ordered_for_all() {
    /// Passes until it holds, or fails; no region ever has fewer than its share ready.
    fn until(fleet: &mut Fleet, what: &str, done: impl Fn(&Fleet) -> bool) {
        for _ in 0..100 {
            if done(fleet) {
                return;
            }
            fleet.pass(1);
            for region in ["eu", "us"] {
                let ready = fleet.world(region).instances.live.values().filter(|i| i.status.ready).count();
                assert!(ready >= 2, "{what}: {ready} ready in {region}");
            }
        }
        panic!("{what}: {:#?}", fleet.app(GLOBAL, "web").unwrap().status);
    }
    fn runs(fleet: &Fleet, region: &str, version: Option<&str>) -> bool {
        let mut all = fleet.world(region).instances.live.values();
        let ended = fleet.app(region, "web").unwrap().status.rollout.as_ref();
        let complete = ended.is_some_and(|r| r.phase == RolloutPhase::Complete);
        complete && all.all(|i| i.spec.template.env.get("A").map(String::as_str) == version && i.status.ready)
    }
    let told = |fleet: &Fleet| -> Vec<_> {
        let regions = &fleet.app(GLOBAL, "web").unwrap().status.regions;
        regions.iter().map(|r| r.rollout.unwrap_or_default()).collect()
    };
    let order = |fleet: &mut Fleet, order| fleet.submit(GLOBAL, "apps", D, "web", Change::Rollout { order });
    let patch = |version: &str| json!({"spec": {"env": {"A": version}}});

    let mut fleet = Fleet::new();
    fleet.create::<App>(GLOBAL, D, "web", web(4)).unwrap();
    fleet.pass(6);
    fleet.patch(GLOBAL, "apps", D, "web", patch("2"));
    until(&mut fleet, "both regions", |f| runs(f, "eu", Some("2")) && runs(f, "us", Some("2")));

    // A region that is cut off serves on with what it has, and follows when it is back.
    fleet.group("us").cut = true;
    fleet.patch(GLOBAL, "apps", D, "web", patch("3"));
    until(&mut fleet, "one region", |f| runs(f, "eu", Some("3")));
    assert!(runs(&fleet, "us", Some("2")));
    assert_eq!(fleet.app(GLOBAL, "web").unwrap().status.updated_replicas, 2);
    fleet.group("us").cut = false;
    until(&mut fleet, "the other one", |f| runs(f, "us", Some("3")));

    // A pause holds both up, until both go on.
    order(&mut fleet, RolloutOrder::Pause).unwrap();
    fleet.patch(GLOBAL, "apps", D, "web", patch("4"));
    until(&mut fleet, "the pause", |f| told(f) == [RolloutPhase::Paused; 2]);
    fleet.pass(20);
    for region in ["eu", "us"] {
        let mut all = fleet.world(region).instances.live.values();
        assert!(all.all(|i| i.spec.template.env["A"] == "3"), "{region} waits");
    }
    order(&mut fleet, RolloutOrder::Resume).unwrap();
    until(&mut fleet, "the fourth", |f| runs(f, "eu", Some("4")) && runs(f, "us", Some("4")));

    // An undo is one for all of them.
    order(&mut fleet, RolloutOrder::Undo { to: None }).unwrap();
    until(&mut fleet, "the undo", |f| runs(f, "eu", Some("3")) && runs(f, "us", Some("3")));
    assert_eq!(told(&fleet), [RolloutPhase::Complete; 2]);
}

#[test]
fn what_is_in_a_global_apps_way_stays_and_is_named() {
    let mut fleet = Fleet::new();
    fleet.create::<App>("us", D, "web", web(2)).unwrap();
    fleet.create::<App>(GLOBAL, D, "web", web(4)).unwrap();
    fleet.pass(4);
    let mine = fleet.app("us", "web").unwrap();
    assert!(mine.metadata.owner.is_none() && mine.spec.replicas == 2, "nothing is overwritten");
    assert_eq!(fleet.replicas("eu", "web"), Some(2));
    assert_eq!(fleet.ready_reason("web"), "NameTaken");
    fleet.delete("us", "apps", D, "web").unwrap();
    fleet.pass(6);
    assert!(fleet.app("us", "web").unwrap().metadata.owner.is_some());
    assert_eq!(fleet.ready_reason("web"), "AllReady");

    // So is a quota, which is asked again when it has room.
    fleet.patch(GLOBAL, "projects", None, "default", json!({"spec": {"quota": {"instances": 4}}}));
    fleet.pass(2);
    fleet.create::<App>("us", D, "own", web(2)).unwrap();
    fleet.create::<App>(GLOBAL, D, "second", web(2)).unwrap();
    fleet.patch(GLOBAL, "apps", D, "second", json!({"spec": {"replicas": 6}}));
    fleet.pass(4);
    assert_eq!(fleet.replicas("us", "second"), None);
    assert_eq!(fleet.ready_reason("second"), "Blocked");
    fleet.patch(GLOBAL, "projects", None, "default", json!({"spec": {"quota": {"instances": 40}}}));
    fleet.pass(6);
    assert_eq!(fleet.replicas("us", "second"), Some(3));
    assert_eq!(fleet.ready_reason("second"), "AllReady");
}

#[test]
fn a_deleted_project_is_gone_when_every_region_has_torn_it_down() {
    let mut fleet = Fleet::new();
    fleet.create::<Project>(GLOBAL, None, "shop", ProjectSpec::default()).unwrap();
    fleet.pass(1);
    fleet.create::<Image>(GLOBAL, Some("shop"), "web", image("web")).unwrap();
    fleet.create::<App>(GLOBAL, Some("shop"), "everywhere", web(2)).unwrap();
    fleet.create::<App>("eu", Some("shop"), "here", web(2)).unwrap();
    let route = RouteSpec { host: "shop.example.com".into(), app: name("here"), ..RouteSpec::default() };
    fleet.create::<Route>("eu", Some("shop"), "front", route).unwrap();
    fleet.pass(4);
    assert_eq!(fleet.world("eu").instances.live.len(), 3);

    // Cut off, a region goes on with what it has, and what was deleted waits for it.
    fleet.group("us").cut = true;
    fleet.delete(GLOBAL, "projects", None, "shop").unwrap();
    fleet.pass(20);
    assert!(fleet.world("eu").usage(&name("shop")).is_none());
    assert_eq!((fleet.world("eu").apps.all().count(), fleet.world("eu").routes.live.len()), (0, 0));
    assert_eq!(fleet.world("eu").instances.all().count(), 0);
    assert_eq!(fleet.world("us").instances.live.len(), 1, "what it runs goes on");
    fleet.create::<App>("us", Some("shop"), "late", web(1)).unwrap();
    assert_eq!(fleet.global.core.world.projects.buried.len(), 1);
    let again = fleet.create::<Project>(GLOBAL, None, "shop", ProjectSpec::default()).unwrap_err();
    assert_eq!(again.code, Code::Conflict, "its name waits with it");

    fleet.group("us").cut = false;
    fleet.pass(10);
    assert_eq!(fleet.world("us").instances.all().count(), 0);
    assert!(fleet.world("us").usage(&name("shop")).is_none());
    assert_eq!(fleet.global.core.world.projects.buried.len(), 0);
    fleet.create::<Project>(GLOBAL, None, "shop", ProjectSpec::default()).unwrap();
    fleet.pass(1);
    fleet.create::<App>("us", Some("shop"), "anew", web(1)).unwrap();
}

#[test]
fn a_lost_region_is_said_to_be_silent_and_its_deletion_frees_what_waited_for_it() {
    let mut fleet = Fleet::new();
    fleet.create::<App>(GLOBAL, D, "web", web(4)).unwrap();
    fleet.pass(4);
    let refused = fleet.delete(GLOBAL, "regions", None, "us").unwrap_err();
    assert_eq!(refused.code, Code::Conflict, "it reports");

    fleet.group("us").cut = true;
    fleet.pass(14);
    assert_eq!(fleet.ready_reason("web"), "RegionSilent");
    assert_eq!(fleet.world("us").instances.live.len(), 2, "what it runs goes on");
    fleet.create::<Project>(GLOBAL, None, "shop", ProjectSpec::default()).unwrap();
    fleet.delete(GLOBAL, "projects", None, "shop").unwrap();
    fleet.create::<App>(GLOBAL, D, "short", web(2)).unwrap();
    fleet.delete(GLOBAL, "apps", D, "short").unwrap();
    fleet.pass(4);
    assert_eq!((fleet.global.core.world.projects.buried.len(), fleet.global.core.world.apps.buried.len()), (1, 1));

    fleet.delete(GLOBAL, "regions", None, "us").unwrap();
    fleet.pass(4);
    assert_eq!((fleet.global.core.world.projects.buried.len(), fleet.global.core.world.apps.buried.len()), (0, 0));
    assert_eq!(fleet.replicas("eu", "web"), Some(4), "the others take over its share");
    assert_eq!(fleet.ready_reason("web"), "AllReady");

    // It was not dead after all: it joins again, and what it should not have is gone.
    fleet.group("us").cut = false;
    fleet.pass(8);
    assert_eq!((fleet.replicas("eu", "web"), fleet.replicas("us", "web")), (Some(2), Some(2)));
    assert!(fleet.app("us", "short").is_none());
    assert_eq!(fleet.ready_reason("web"), "AllReady");
}

#[test]
fn a_writer_with_an_older_copy_of_the_global_group_tears_nothing_down() {
    let mut fleet = Fleet::new();
    let before = fleet.global.log.len();
    fleet.create::<Project>(GLOBAL, None, "shop", ProjectSpec::default()).unwrap();
    fleet.create::<App>(GLOBAL, D, "web", web(4)).unwrap();
    fleet.pass(4);
    fleet.create::<App>("us", Some("shop"), "own", web(1)).unwrap();
    fleet.pass(2);
    for shown in [0, before] {
        fleet.group("us").cut = true;
        fleet.take_over("us", shown);
        fleet.pass(10);
        assert_eq!(fleet.replicas("us", "web"), Some(2));
        assert_eq!(fleet.world("us").apps.live.len(), 2, "its rows know more than its copy");
        let early = fleet.create::<App>("us", Some("shop"), "more", web(1)).unwrap_err();
        assert_eq!(early.code, Code::Unavailable, "and it says so");
        fleet.group("us").cut = false;
        fleet.pass(4);
        assert_eq!(fleet.world("us").apps.live.len(), 2);
    }
    fleet.delete(GLOBAL, "apps", D, "web").unwrap();
    fleet.pass(4);
    assert_eq!(fleet.world("us").apps.live.len(), 1, "with a copy that is new enough it goes on as ever");
}
