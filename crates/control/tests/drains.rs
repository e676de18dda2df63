//! What operators take away goes by the apps' disruption budgets: drains, several at once, rebalances; failures ask nobody.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::{create, image, intent, name, web};
use nexus_control::cells::{Cells, DEAD_AFTER};
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Intent};
use nexus_control::world::World;
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::{Bytes, MilliCpu, Name, Object, Timestamp, Uid};
use serde_json::{Value, json};

const STEP: Duration = Duration::from_millis(500);
/// How long an instance takes until it is ready.
const SLOW_MS: i64 = 3_000;

/// A region of six hosts, two in each of three zones, and an app `shop` on them.
struct Lab {
    core: Core,
    rng: SeededRng,
    at: Duration,
    revision: u64,
    alive: BTreeSet<Name>,
    /// Instances that end again and again.
    ill: BTreeSet<Uid>,
    /// The fewest instances that were ready since it was set, by template.
    fewest: usize,
    fewest_of: BTreeMap<String, usize>,
}

impl Lab {
    fn new(replicas: u32, spec: Value) -> Self {
        let zones = vec![name("zone-a"), name("zone-b"), name("zone-c")];
        let cells = vec![name("cell-a"), name("cell-b"), name("cell-c")];
        let bootstrap = Bootstrap { region: name("local"), domain: "localhost".into(), zones, cells };
        let core = Core::new(World::default(), bootstrap, Cells::new(Duration::ZERO, "server-a".into(), 1));
        let hosts = ["a", "b", "c"].iter().flat_map(|z| (1..=2).map(move |n| name(&format!("zone-{z}-{n}"))));
        let mut lab = Self {
            core,
            rng: SeededRng::new(7),
            at: Duration::ZERO,
            revision: 0,
            alive: hosts.collect(),
            ill: BTreeSet::new(),
            fewest: usize::MAX,
            fewest_of: BTreeMap::new(),
        };
        lab.with(|core, at| core.bootstrap(at));
        lab.pass(1);
        lab.submit(&create::<Image>(Some("default"), "web", image("web")));
        let mut object = create::<App>(Some("default"), "shop", web(replicas));
        if let Change::Create { object } = &mut object.change {
            object.spec.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
            object.spec["spread"] = json!("host");
        }
        lab.submit(&object);
        lab.pass(10);
        assert_eq!(lab.app().status.phase, AppPhase::Ready);
        (lab.fewest, lab.fewest_of) = (usize::MAX, BTreeMap::new());
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
            self.revision += 1;
            self.core.committed(&pack, self.revision);
        }
        assert_eq!(self.core.check_invariants(), Vec::<String>::new());
        answer
    }

    /// Lets so many half seconds pass, in which every living agent reports once.
    fn pass(&mut self, steps: u32) {
        for _ in 0..steps {
            self.at += STEP;
            let now = 1_000_000 + self.at.as_millis() as i64;
            for host in self.alive.clone() {
                let (zone, n) = host.as_str().rsplit_once('-').unwrap();
                let index = (zone.bytes().last().unwrap() - b'a') * 16 + n.parse::<u8>().unwrap();
                let (memory, scratch) = (Bytes(8 << 30), Bytes(10 << 30));
                let capacity = Capacity { cpu: MilliCpu(8000), memory, scratch, instances: 100 };
                let spec = common::host(zone, &zone.replace("zone", "cell"), index, capacity);
                let runs: Vec<_> = self.core.world.instances_on(&host).cloned().collect();
                let runs: Vec<_> = runs.into_iter().filter(|i| i.metadata.deleting.is_none()).collect();
                let mut report = common::report(&host, spec, self.revision, &runs);
                for (told, i) in report.instances.iter_mut().zip(&runs) {
                    told.ready = now - i.metadata.created.as_millis() >= SLOW_MS;
                    if self.ill.contains(&i.metadata.uid) {
                        (told.ready, told.restarts, told.phase) = (false, 3, InstancePhase::BackOff);
                    }
                }
                self.with(|core, at| core.report(&report, at)).unwrap();
            }
            self.with(|core, at| core.tick(at));
            if self.core.world.apps.get(Some(&name("default")), &name("shop")).is_some() {
                let ready = self.ready();
                self.fewest = self.fewest.min(ready);
                for hash in self.instances().iter().map(|i| i.spec.template_hash.clone()).collect::<BTreeSet<_>>() {
                    let of = self.instances().iter().filter(|i| i.status.ready && i.spec.template_hash == hash).count();
                    let entry = self.fewest_of.entry(hash).or_insert(of);
                    *entry = (*entry).min(of);
                }
            }
        }
    }

    fn submit(&mut self, intent: &Intent) -> Accepted {
        self.with(|core, at| core.intent(intent, at)).unwrap()
    }

    fn drain(&mut self, host: &str, draining: bool) {
        let patch = json!({"spec": {"cordoned": draining, "draining": draining}});
        self.submit(&intent("hosts", None, host, Change::Patch { patch }));
    }

    fn patch(&mut self, patch: Value) {
        self.submit(&intent("apps", Some("default"), "shop", Change::Patch { patch }));
    }

    fn app(&self) -> &Object<App> {
        self.core.world.apps.get(Some(&name("default")), &name("shop")).unwrap()
    }

    fn instances(&self) -> Vec<&Object<Instance>> {
        self.core.world.instances_of(self.app().metadata.uid).collect()
    }

    fn ready(&self) -> usize {
        self.instances().iter().filter(|i| i.status.ready).count()
    }

    fn on(&self, host: &str) -> usize {
        self.core.world.instances_on(&name(host)).count()
    }

    /// What a host's condition says of its drain: the reason and the message.
    fn says(&self, host: &str) -> Option<(String, String)> {
        let host = self.core.world.host(&name(host)).unwrap();
        let drained = host.status.conditions.iter().find(|c| c.kind == "Drained");
        drained.map(|c| (c.reason.clone(), c.message.clone()))
    }
}

/// An instance that runs on a host.
fn one_on(lab: &Lab, host: &str) -> Object<Instance> {
    lab.core.world.instances_on(&name(host)).next().cloned().expect("the app is spread over all hosts")
}

#[test]
fn two_drains_at_once_never_take_more_than_the_budget_and_say_what_they_wait_for() {
    let mut lab = Lab::new(6, json!({"disruption": {"maxUnavailable": 1}}));
    lab.drain("zone-a-1", true);
    lab.drain("zone-b-1", true);
    lab.pass(1);
    let (reason, message) = lab.says("zone-a-1").unwrap();
    let stays = one_on(&lab, "zone-a-1").metadata.name;
    assert_eq!(reason, "Draining");
    assert_eq!(message, format!("app default/shop: 6 of 6 ready; instance {stays} stays until its successor is ready"));
    lab.pass(40);
    assert_eq!((lab.on("zone-a-1"), lab.on("zone-b-1"), lab.fewest), (0, 0, 6), "each is replaced first");
    assert_eq!(lab.says("zone-a-1").unwrap().0, "Empty");
    lab.drain("zone-a-1", false);
    assert_eq!(lab.says("zone-a-1"), None);
}

#[test]
fn what_a_failed_host_took_counts_and_blocks_a_drain_until_it_is_replaced() {
    let mut lab = Lab::new(6, json!({"disruption": {"minAvailable": 5}}));
    lab.alive.remove(&name("zone-c-2"));
    // Silent, and not yet given up.
    let suspect = |lab: &Lab| lab.core.world.host(&name("zone-c-2")).unwrap().status.state == HostState::Suspect;
    while !suspect(&lab) {
        lab.pass(1);
    }
    lab.drain("zone-a-1", true);
    lab.pass(1);
    assert!(suspect(&lab));
    let stays = one_on(&lab, "zone-a-1").metadata.name;
    let (reason, message) = lab.says("zone-a-1").unwrap();
    let says = "5 of 6 ready, its budget wants 5 at least";
    assert_eq!(reason, "Budget");
    assert_eq!(message, format!("app default/shop: {says}; instance {stays} stays until another is ready"));
    lab.pass(2 * u32::try_from(DEAD_AFTER.as_secs()).unwrap() + 40);
    assert_eq!((lab.on("zone-a-1"), lab.ready()), (0, 6), "once it is replaced, the drain goes on");
    assert!(lab.fewest >= 5, "{}", lab.fewest);
}

#[test]
fn an_app_with_an_instance_that_fails_is_drained_as_far_as_its_budget_allows() {
    for (budget, goes) in [(json!({"maxUnavailable": 1}), true), (json!({"minAvailable": "100%"}), false)] {
        let mut lab = Lab::new(6, json!({"disruption": budget}));
        lab.ill.insert(one_on(&lab, "zone-c-2").metadata.uid);
        lab.drain("zone-a-1", true);
        lab.pass(30);
        assert_eq!(lab.on("zone-a-1") == 0, goes, "{:?}", lab.says("zone-a-1"));
        assert_eq!(lab.fewest, 5);
        if !goes {
            assert!(lab.says("zone-a-1").unwrap().1.contains("6 of 6 ready, its budget wants 6 at least"));
            // A user who allows more lets it go on.
            lab.patch(json!({"spec": {"disruption": {"minAvailable": 5}}}));
            lab.pass(4);
            assert_eq!(lab.on("zone-a-1"), 0);
        }
    }
}

#[test]
fn a_drain_makes_successors_first_also_where_a_rollout_makes_none() {
    let mut lab = Lab::new(3, json!({"rollout": {"maxSurge": 0, "maxUnavailable": 2}}));
    let host = lab.instances()[0].status.host.clone().unwrap();
    lab.drain(host.as_str(), true);
    lab.pass(30);
    assert_eq!((lab.on(host.as_str()), lab.fewest), (0, 3));
}

#[test]
fn the_set_that_serves_keeps_its_budget_while_another_waits_to_be_promoted() {
    let mut lab = Lab::new(4, json!({"rollout": {"strategy": "blue-green", "autoPromote": false}}));
    let serving = lab.instances()[0].spec.template_hash.clone();
    lab.patch(json!({"spec": {"env": {"VERSION": "2"}}}));
    lab.pass(20);
    assert_eq!(lab.app().status.rollout.as_ref().unwrap().phase, RolloutPhase::Waiting);
    lab.fewest_of.clear();
    for host in ["zone-a-1", "zone-b-1", "zone-c-1"] {
        lab.drain(host, true);
    }
    lab.pass(60);
    assert_eq!(["zone-a-1", "zone-b-1", "zone-c-1"].map(|host| lab.on(host)), [0, 0, 0]);
    assert_eq!(lab.fewest_of[&serving], 4, "all requests go there");
}

#[test]
fn a_rebalance_goes_by_the_budget_too() {
    let mut lab = Lab::new(4, json!({"disruption": {"minAvailable": 4}}));
    for host in ["zone-a-1", "zone-a-2", "zone-b-1", "zone-b-2"] {
        lab.drain(host, true);
    }
    lab.pass(60);
    for host in ["zone-a-1", "zone-a-2", "zone-b-1", "zone-b-2"] {
        lab.drain(host, false);
    }
    assert_eq!(lab.on("zone-c-1") + lab.on("zone-c-2"), 4);
    let ill = one_on(&lab, "zone-c-1").metadata.uid;
    lab.ill.insert(ill);
    lab.pass(2);
    let plan = lab.submit(&intent("hosts", None, "rebalance", Change::Rebalance { most: 10 }));
    assert!(plan.object.status["moves"].as_array().is_some_and(|moves| moves.len() >= 2), "{plan:?}");
    lab.fewest = usize::MAX;
    lab.pass(30);
    let moving = |lab: &Lab| lab.instances().iter().filter(|i| i.status.moving_to.is_some()).count();
    assert!(
        lab.fewest >= 3 && moving(&lab) > 0,
        "with one that fails, four can't be ready without those that are to go"
    );
    lab.ill.clear();
    lab.pass(40);
    assert_eq!((lab.ready(), moving(&lab), lab.instances().len()), (4, 0, 4));
}

#[test]
fn a_failure_asks_no_budget() {
    let mut lab = Lab::new(6, json!({"disruption": {"maxUnavailable": 0}}));
    lab.alive.remove(&name("zone-c-2"));
    lab.pass(2 * u32::try_from(DEAD_AFTER.as_secs()).unwrap() + 20);
    assert_eq!(lab.core.world.host(&name("zone-c-2")).unwrap().status.state, HostState::Dead);
    assert!(lab.instances().iter().all(|i| i.status.host != Some(name("zone-c-2"))));
    assert_eq!((lab.ready(), lab.fewest), (6, 5));
}
