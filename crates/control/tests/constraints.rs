//! Constraints, classes and rebalancing: where instances may go, what is said when they can't, and what an operator may move.

mod common;
#[path = "constraints/numa.rs"]
mod numa;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::{create, image, intent, name, web};
use nexus_control::cells::Cells;
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Intent};
use nexus_control::world::World;
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::plan::{HostTelemetry, HostTrip, RoundTripReport};
use nexus_model::{ApiError, Bytes, Code, MilliCpu, Name, Object, Timestamp};
use nexus_store::{KeyValue, Revision};
use serde_json::json;

/// A region whose hosts run what they are told and report each half second.
struct Town {
    core: Core,
    rng: SeededRng,
    at: Duration,
    revision: u64,
    hosts: BTreeMap<Name, HostSpec>,
    telemetry: BTreeMap<Name, (f32, HostTelemetry)>,
    bootstrap: Bootstrap,
    committed: BTreeMap<String, (Vec<u8>, u64)>,
}

impl Town {
    /// Zones with their hosts, each named by its zone and a number.
    fn new(zones: &[(&str, usize)]) -> Self {
        let names = zones.iter().map(|(zone, _)| name(zone)).collect();
        let bootstrap =
            Bootstrap { region: name("local"), domain: "localhost".into(), zones: names, cells: Vec::new() };
        let core = Core::new(World::default(), bootstrap.clone(), Cells::new(Duration::ZERO, "server-a".into(), 1));
        let (hosts, telemetry) = Default::default();
        let (at, committed) = (Duration::ZERO, BTreeMap::new());
        let rng = SeededRng::new(7);
        let mut town = Self { core, rng, at, revision: 0, hosts, telemetry, bootstrap, committed };
        town.with(|core, at| core.bootstrap(at));
        town.submit(&create::<Image>(Some("default"), "web", image("web"))).unwrap();
        for (zone, hosts) in zones {
            for n in 1..=*hosts {
                town.join(&format!("{zone}-{n}"), zone, |_| {});
            }
        }
        town.pass(Duration::from_secs(1));
        town
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let now = Timestamp::from_millis(1_000_000 + self.at.as_millis() as i64);
        let at = Moment { now, monotonic: self.at, rng: &self.rng };
        let answer = f(&mut self.core, at);
        for _ in 0..50 {
            if !self.core.reconcile(at) {
                break;
            }
        }
        for pack in self.core.take_packs() {
            self.revision += 1;
            for (key, value) in &pack.ops {
                match value {
                    Some(value) => self.committed.insert(key.clone(), (value.to_vec(), self.revision)),
                    None => self.committed.remove(key),
                };
            }
            self.core.committed(&pack, self.revision);
        }
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
        assert_eq!(self.core.check_invariants(), Vec::<String>::new());
    }

    fn join(&mut self, host: &str, zone: &str, change: impl FnOnce(&mut HostSpec)) {
        let capacity =
            Capacity { cpu: MilliCpu(2000), memory: Bytes(64 << 30), scratch: Bytes(64 << 30), instances: 100 };
        let number = u8::try_from(self.hosts.len() + 1).unwrap();
        let mut spec = common::host(zone, ANY_CELL, number, capacity);
        change(&mut spec);
        self.hosts.insert(name(host), spec);
        self.report(&name(host));
    }

    fn report(&mut self, host: &Name) {
        let runs = self.core.world.instances_on(host).filter(|i| i.metadata.deleting.is_none());
        let mut report = common::report(host, self.hosts[host].clone(), self.revision, runs);
        if let Some((load, telemetry)) = self.telemetry.get(host) {
            (report.load, report.telemetry) = (*load, *telemetry);
        }
        self.with(|core, at| core.report(&report, at)).unwrap();
    }

    fn pass(&mut self, time: Duration) {
        let end = self.at + time;
        while self.at < end {
            self.at += Duration::from_millis(500);
            for host in self.hosts.keys().cloned().collect::<Vec<_>>() {
                self.report(&host);
            }
            self.with(|core, at| core.tick(at));
        }
        assert_eq!(self.core.check_invariants(), Vec::<String>::new());
    }

    /// What a gateway says of hosts, in microseconds.
    fn measured(&mut self, gateway: &str, trips: &[(&str, u32)]) {
        let trips = trips.iter().map(|(host, us)| HostTrip { host: name(host), us: *us }).collect();
        let report = RoundTripReport { gateway: name(gateway), trips, after: None };
        self.with(|core, at| core.round_trips(&report, at));
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    fn app(&self, app: &str, replicas: u32, constraints: &str, change: impl FnOnce(&mut AppSpec)) -> Intent {
        let mut spec = web(replicas);
        spec.resources.cpu = MilliCpu(200);
        spec.constraints = constraints.parse().unwrap();
        change(&mut spec);
        create::<App>(Some("default"), app, spec)
    }

    fn deploy(&mut self, app: &str, replicas: u32, constraints: &str) {
        self.submit(&self.app(app, replicas, constraints, |_| {})).unwrap();
        self.pass(Duration::from_secs(1));
    }

    /// Why a dry run is refused.
    fn refused(&mut self, app: &str, constraints: &str) -> String {
        self.refused_sized(app, constraints, 200)
    }

    /// The same of an instance that takes so many thousandths of a processor.
    fn refused_sized(&mut self, app: &str, constraints: &str, cpu: u32) -> String {
        let sized = |spec: &mut AppSpec| spec.resources.cpu = MilliCpu(cpu);
        let wanted = Intent { dry_run: true, ..self.app(app, 1, constraints, sized) };
        let error = self.submit(&wanted).unwrap_err();
        assert_eq!(error.code, Code::Unschedulable);
        error.detail
    }

    fn instances(&self, app: &str) -> Vec<&Object<Instance>> {
        self.core.world.instances.live.values().filter(|i| i.spec.app == *app).collect()
    }

    fn hosts_of(&self, app: &str) -> Vec<String> {
        let mut hosts: Vec<String> =
            self.instances(app).iter().filter_map(|i| i.status.host.as_ref()).map(Name::to_string).collect();
        hosts.sort();
        hosts
    }

    fn change(&mut self, plural: &str, project: Option<&str>, object: &str, patch: serde_json::Value) {
        self.submit(&intent(plural, project, object, Change::Patch { patch })).unwrap();
    }

    fn label(&mut self, host: &str, key: &str, value: &str) {
        self.change("hosts", None, host, json!({"metadata": {"labels": {key: value}}}));
    }

    fn rebalance(&mut self, most: u32, dry_run: bool) -> Vec<serde_json::Value> {
        let wanted = Intent { dry_run, ..intent("instances", None, "local", Change::Rebalance { most }) };
        self.submit(&wanted).unwrap().object.status["moves"].as_array().unwrap().clone()
    }
}

#[test]
fn zones_and_labels_decide_and_a_refusal_says_what_there_is() {
    let mut town = Town::new(&[("a", 2), ("b", 2)]);
    town.label("a-1", "disk", "ssd");
    town.label("b-2", "disk", "hdd");
    town.deploy("web", 3, "zone=b");
    assert!(town.hosts_of("web").iter().all(|host| host.starts_with("b-")));
    town.deploy("fast", 2, "label.disk=ssd");
    assert_eq!(town.hosts_of("fast"), ["a-1", "a-1"]);

    let why = town.refused("other", "zone in (c,d)");
    assert!(why.contains("no host of 4 can take it: 4 in other zones; its hosts are in a, b"), "{why}");
    let why = town.refused("other", "label.disk=nvme");
    assert!(why.contains("4 without label disk=nvme; there are hosts with disk=hdd, disk=ssd"), "{why}");
    let why = town.refused("other", "label.gpu=yes, zone=a");
    assert!(why.contains("2 in other zones, 2 without label gpu=yes"), "{why}");
    assert!(why.ends_with("no host has a label gpu"), "{why}");

    // What waits is placed when a host is given the label.
    town.deploy("later", 1, "label.disk=nvme");
    assert!(town.hosts_of("later").is_empty());
    let waiting = town.instances("later")[0].status.clone();
    assert!(waiting.message.contains("label disk=nvme"), "{}", waiting.message);
    assert!(waiting.conditions.iter().any(|c| c.kind == "Scheduled" && c.message == waiting.message));
    town.label("b-1", "disk", "nvme");
    assert_eq!(town.hosts_of("later"), ["b-1"]);
}

#[test]
fn latency_is_the_lowest_that_a_live_gateway_measures_and_is_forgotten_when_it_is_silent() {
    let mut town = Town::new(&[("a", 2)]);
    let why = town.refused("web", "latency<20ms");
    assert!(why.contains("2 not within 20 ms of a gateway (no latency has been measured yet)"), "{why}");
    town.measured("gateway-1", &[("a-1", 31_000), ("a-2", 60_000), ("stranger", 1)]);
    let why = town.refused("web", "latency<20ms");
    assert!(why.contains("2 not within 20 ms of a gateway (the lowest latency measured is 31 ms)"), "{why}");

    town.deploy("web", 1, "latency<20ms");
    assert!(town.hosts_of("web").is_empty());
    town.measured("gateway-2", &[("a-2", 19_000)]);
    assert_eq!(town.hosts_of("web"), ["a-2"], "it was placed when a nearer gateway was heard of");
    town.pass(Duration::from_secs(11));
    let status = &town.core.world.host(&name("a-2")).unwrap().status;
    assert_eq!(status.round_trip_us, Some(19_000));
    let of: Vec<_> = status.round_trips.iter().map(|trip| (trip.gateway.as_str(), trip.us)).collect();
    assert_eq!(of, [("gateway-1", 60_000), ("gateway-2", 19_000)]);

    town.pass(Duration::from_secs(60));
    let why = town.refused("other", "latency<20ms");
    assert!(why.contains("no latency has been measured yet"), "{why}");
    assert_eq!(town.core.world.host(&name("a-2")).unwrap().status.round_trip_us, None);
    assert_eq!(town.hosts_of("web"), ["a-2"], "what runs stays");
}

#[test]
fn apps_are_with_and_without_others_whoever_names_whom() {
    let mut town = Town::new(&[("a", 3)]);
    let why = town.refused("near", "with=db");
    assert!(why.contains("3 without an instance of app db"), "{why}");
    town.deploy("near", 1, "with=db");
    assert!(town.hosts_of("near").is_empty());
    town.deploy("db", 1, "");
    assert_eq!(town.hosts_of("near"), town.hosts_of("db"), "it waited for the other");

    town.deploy("far", 2, "not-with=db, not-with=far");
    let (db, far) = (town.hosts_of("db"), town.hosts_of("far"));
    assert!(!far.contains(&db[0]) && far[0] != far[1], "{far:?}, {db:?}");
    // `db` names nobody, and still does not come to where `far` is: with a host each, only its own is left.
    town.change("apps", Some("default"), "db", json!({"spec": {"replicas": 3}}));
    town.pass(Duration::from_secs(1));
    assert_eq!(town.hosts_of("db"), [db[0].clone(), db[0].clone(), db[0].clone()]);
    let why = town.refused("other", "not-with=db, not-with=far");
    assert!(why.contains("3 with an instance of app db or an instance of app far"), "{why}");

    let own = town.submit(&town.app("self", 1, "with=self", |_| {})).unwrap_err();
    assert_eq!((own.code, own.errors[0].field.as_str()), (Code::Invalid, "spec.constraints"));
}

#[test]
fn demanded_evenness_holds_over_zones_racks_and_hosts() {
    let mut town = Town::new(&[("a", 1), ("b", 1)]);
    // Room for ten in each zone; `a` takes five of another app first.
    town.deploy("filler", 5, "zone=a");
    town.deploy("even", 12, "spread=zone");
    let hosts = town.hosts_of("even");
    let in_a = hosts.iter().filter(|host| host.starts_with("a-")).count();
    assert_eq!((hosts.len(), in_a), (11, 5), "the sixth of zone b is the last that is even");
    let waiting = town.instances("even").into_iter().find(|i| i.status.host.is_none()).unwrap();
    assert!(waiting.status.message.contains("1 spread"), "{}", waiting.status.message);
    // What only prefers evenness goes on.
    town.deploy("mostly", 4, "");
    assert_eq!(town.hosts_of("mostly"), ["b-1", "b-1", "b-1", "b-1"]);

    let mut town = Town::new(&[]);
    for (host, rack) in [("h-1", "r-1"), ("h-2", "r-1"), ("h-3", "r-2")] {
        town.join(host, "a", |spec| spec.rack = Some(name(rack)));
    }
    town.pass(Duration::from_secs(1));
    town.deploy("racks", 4, "spread=rack");
    assert_eq!(town.hosts_of("racks"), ["h-1", "h-2", "h-3", "h-3"]);
    town.deploy("hosts", 6, "spread=host");
    assert_eq!(town.hosts_of("hosts"), ["h-1", "h-1", "h-2", "h-2", "h-3", "h-3"]);
}

#[test]
fn classes_of_compute_and_storage_are_counted_and_shown() {
    let mut town = Town::new(&[("a", 1)]);
    town.join("gpu-1", "a", |spec| {
        spec.classes = [(name("gpu-v100"), 2)].into_iter().collect();
        spec.storage = [(name("high-iops"), Bytes(1 << 30))].into_iter().collect();
    });
    town.pass(Duration::from_secs(1));
    let model = |replicas| {
        move |spec: &mut AppSpec| {
            spec.replicas = replicas;
            spec.classes = [(name("gpu-v100"), 1)].into_iter().collect();
            spec.storage_class = Some(name("high-iops"));
            spec.resources.scratch = Bytes(400 << 20);
        }
    };
    town.submit(&town.app("model", 2, "", model(2))).unwrap();
    town.pass(Duration::from_secs(1));
    assert_eq!(town.hosts_of("model"), ["gpu-1", "gpu-1"]);
    let status = &town.core.world.host(&name("gpu-1")).unwrap().status;
    assert_eq!(status.reserved_classes[&name("gpu-v100")], 2);
    assert_eq!(status.reserved_storage[&name("high-iops")], Bytes(800 << 20));
    assert_eq!(status.reserved.scratch, Bytes(0), "it is not the host's own disk");
    let third = Intent { dry_run: true, ..town.app("third", 1, "", model(1)) };
    let why = town.submit(&third).unwrap_err().detail;
    assert!(why.contains("2 lack gpu-v100 (1 wanted, at most 0 free)"), "{why}");
    let only_disk = town.app("disk", 1, "", |spec| {
        spec.storage_class = Some(name("high-iops"));
        spec.resources.scratch = Bytes(300 << 20);
    });
    let why = town.submit(&Intent { dry_run: true, ..only_disk }).unwrap_err().detail;
    assert!(why.contains("2 lack high-iops (300Mi wanted, at most 224Mi free)"), "{why}");
    town.submit(&intent("apps", Some("default"), "model", Change::Delete)).unwrap();
    town.pass(Duration::from_secs(2));
    assert!(town.core.world.host(&name("gpu-1")).unwrap().status.reserved_storage.is_empty());
}

#[test]
fn a_new_host_gets_nothing_by_itself_and_a_rebalance_is_planned_bounded_and_gentle() {
    let mut town = Town::new(&[("a", 1)]);
    town.deploy("web", 4, "");
    assert!(town.rebalance(10, true).is_empty());
    town.join("a-2", "a", |_| {});
    town.pass(Duration::from_secs(5));
    assert_eq!(town.hosts_of("web"), ["a-1"; 4]);

    let before = town.revision;
    let plan = town.rebalance(10, true);
    assert_eq!(plan.len(), 2, "{plan:?}");
    assert_eq!((plan[0]["from"].as_str(), plan[0]["to"].as_str()), (Some("a-1"), Some("a-2")));
    assert_eq!(plan[0]["why"], "3 others of its app in this host, 0 there");
    assert_eq!(town.rebalance(1, true).len(), 1, "it is bounded");
    assert_eq!(town.revision, before, "a plan leaves no trace");
    assert_eq!(town.core.check_invariants(), Vec::<String>::new());
    let uids: BTreeSet<_> = town.instances("web").iter().map(|i| i.metadata.uid).collect();

    town.rebalance(10, false);
    // No look finds fewer ready than wanted: each goes when another is ready.
    for _ in 0..20 {
        let ready = town.instances("web").iter().filter(|i| i.status.ready).count();
        assert!(ready >= 4, "{ready} are ready");
        town.pass(Duration::from_millis(500));
    }
    assert_eq!(town.hosts_of("web"), ["a-1", "a-1", "a-2", "a-2"]);
    let kept = town.instances("web").iter().filter(|i| uids.contains(&i.metadata.uid)).count();
    assert_eq!(kept, 2, "the others were not touched");
    assert!(town.instances("web").iter().all(|i| i.status.moving_to.is_none()));
    assert!(town.rebalance(10, true).is_empty(), "it is as it should be");
}

#[test]
fn a_rebalance_mends_constraints_and_relieves_what_is_overburdened() {
    let mut town = Town::new(&[("a", 2)]);
    town.label("a-1", "disk", "ssd");
    town.deploy("web", 1, "label.disk=ssd");
    town.label("a-1", "disk", "hdd");
    town.label("a-2", "disk", "ssd");
    town.pass(Duration::from_secs(2));
    assert_eq!(town.hosts_of("web"), ["a-1"], "what runs stays");
    let plan = town.rebalance(10, false);
    assert_eq!(plan[0]["why"], "its label constraint is not met here");
    town.pass(Duration::from_secs(5));
    assert_eq!(town.hosts_of("web"), ["a-2"]);

    let mut town = Town::new(&[("a", 1)]);
    town.deploy("web", 1, "");
    let starved = HostTelemetry { memory_pressure: Some(900), cpu_pressure: Some(900), ..HostTelemetry::default() };
    town.telemetry.insert(name("a-1"), (1.0, starved));
    town.join("a-2", "a", |_| {});
    town.pass(Duration::from_secs(2));
    let plan = town.rebalance(10, true);
    assert_eq!(plan.len(), 1);
    assert!(plan[0]["why"].as_str().unwrap().contains("% burdened"), "{plan:?}");
    town.telemetry.remove(&name("a-1"));
    town.pass(Duration::from_secs(2));
    assert!(town.rebalance(10, true).is_empty());
}
