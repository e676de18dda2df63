//! The writer's decisions, driven by hand: what users ask, what hosts report, what time brings.

use std::collections::BTreeMap;
use std::time::Duration;

use nexus_control::cells::{Cells, DEAD_AFTER};
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Intent, Target};
use nexus_control::world::World;
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::plan::{HostReport, InstanceReport};
use nexus_model::{ApiError, Bytes, Code, Digest, Metadata, MilliCpu, Name, Object, Timestamp};
use serde_json::json;

fn name(s: &str) -> Name {
    s.parse().unwrap()
}

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

    fn host_spec(host: &Name) -> HostSpec {
        let (zone, n) = host.as_str().rsplit_once('-').unwrap();
        let index = (zone.bytes().last().unwrap() - b'a') * 16 + n.parse::<u8>().unwrap();
        HostSpec {
            zone: name(zone),
            cell: name(&zone.replace("zone", "cell")),
            address: format!("[fd00::{index}]:7440").parse().unwrap(),
            prefix6: format!("fd00:0:0:{index}::").parse().unwrap(),
            prefix4: [10, 97, index, 0].into(),
            runtimes: vec![Runtime::Container, Runtime::Function],
            capacity: Capacity {
                cpu: MilliCpu(2000),
                memory: Bytes(2 << 30),
                scratch: Bytes(10 << 30),
                instances: 100,
            },
            ..HostSpec::default()
        }
    }

    /// What a behaving agent says: it runs all that it is told.
    fn report(&self, host: &Name) -> HostReport {
        let instances = self.core.world.instances_on(host).filter(|i| i.metadata.deleting.is_none());
        HostReport {
            host: host.clone(),
            spec: Self::host_spec(host),
            boot_id: "boot-1".into(),
            agent_version: "test".into(),
            applied: Some(self.revision),
            instances: instances
                .map(|i| InstanceReport {
                    uid: i.metadata.uid,
                    epoch: i.status.epoch,
                    phase: InstancePhase::Running,
                    ready: true,
                    endpoint: Some((i.status.address6.unwrap(), 80).into()),
                    restarts: 0,
                    started: None,
                    exit_code: None,
                    message: String::new(),
                })
                .collect(),
            images: Vec::new(),
            load: 0.1,
        }
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

    fn intent(&self, plural: &str, project: Option<&str>, object: &str, change: Change) -> Intent {
        Intent {
            request_id: "req-1".parse().unwrap(),
            actor: "admin".into(),
            target: Target { plural: plural.into(), project: project.map(name), name: name(object) },
            change,
            if_match: None,
            idempotency_key: None,
            dry_run: false,
        }
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    fn create<K: Kind>(&mut self, object: &str, spec: K::Spec) -> Result<Accepted, ApiError> {
        let project = matches!(K::SCOPE, Scope::Project).then(|| name("default"));
        let any = Object::<K>::new(Metadata::new(name(object), project.clone()), spec).to_any();
        let project = project.as_ref().map(Name::as_str);
        self.submit(&self.intent(K::PLURAL, project, object, Change::Create { object: any }))
    }

    fn image(&mut self, image: &str) {
        let digest = Digest::of(image.as_bytes());
        let spec = ImageSpec { format: ImageFormat::Oci, digest, blobs: vec![Blob { digest, size: 1 }] };
        self.create::<Image>(image, spec).unwrap();
    }

    fn app(&self, app: &str) -> &Object<App> {
        self.core.world.apps.get(Some(&name("default")), &name(app)).unwrap()
    }

    fn instances(&self, app: &str) -> Vec<&Object<Instance>> {
        self.core.world.instances_of(self.app(app).metadata.uid).collect()
    }
}

fn web(replicas: u32) -> AppSpec {
    AppSpec { image: name("web"), replicas, ..App::example() }
}

#[test]
fn an_app_spreads_over_zones_and_becomes_ready() {
    let mut lab = Lab::new(2);
    lab.image("web");
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
    lab.image("web");
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
    lab.image("web");
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
fn a_new_leader_declares_nobody_dead_before_a_full_round() {
    let mut lab = Lab::new(2);
    lab.image("web");
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
    lab.image("web");
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
    lab.image("web");
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
    lab.image("web");
    let patch = json!({"spec": {"quota": {"instances": 4}}});
    lab.submit(&lab.intent("projects", None, "default", Change::Patch { patch })).unwrap();
    lab.create::<App>("one", web(3)).unwrap();
    let refused = lab.create::<App>("two", web(2)).unwrap_err();
    assert_eq!(refused.code, Code::QuotaExceeded);
    assert!(refused.detail.contains("instances quota of project default is 4"), "{}", refused.detail);
    lab.submit(&lab.intent("apps", Some("default"), "one", Change::Delete)).unwrap();
    lab.create::<App>("two", web(4)).unwrap();
    let used = lab.core.world.usage(&name("default")).unwrap().status.used;
    assert_eq!(used.instances, 4);
}

#[test]
fn a_delete_frees_the_name_at_once_and_ends_when_hosts_confirm() {
    let mut lab = Lab::new(1);
    lab.image("web");
    lab.create::<App>("shop", web(2)).unwrap();
    lab.pass(Duration::from_secs(1));
    lab.submit(&lab.intent("apps", Some("default"), "shop", Change::Delete)).unwrap();
    assert_eq!(lab.core.world.apps.buried.len(), 1);
    assert_eq!(lab.core.world.instances.buried.len(), 2);
    lab.create::<App>("shop", web(1)).unwrap();
    lab.pass(Duration::from_secs(2));
    assert_eq!((lab.core.world.apps.buried.len(), lab.core.world.instances.buried.len()), (0, 0));
    assert_eq!(lab.app("shop").status.ready_replicas, 1);
    assert!(!lab.committed.keys().any(|k| k.starts_with("t/")));
}

#[test]
fn a_full_region_says_how_many_hosts_each_filter_refused() {
    let mut lab = Lab::new(1);
    lab.image("web");
    let mut spec = web(1);
    spec.resources.memory = Bytes(4 << 30);
    let mut intent = lab.intent("apps", Some("default"), "big", Change::Delete);
    let any = Object::<App>::new(Metadata::new(name("big"), Some(name("default"))), spec.clone()).to_any();
    intent.change = Change::Create { object: any };
    intent.dry_run = true;
    let refused = lab.submit(&intent).unwrap_err();
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
    lab.image("web");
    lab.create::<App>("shop", web(4)).unwrap();
    lab.pass(Duration::from_secs(2));
    let before: Vec<_> = lab.instances("shop").iter().map(|i| i.metadata.uid).collect();
    let patch = json!({"spec": {"env": {"COLOUR": "green"}}});
    lab.submit(&lab.intent("apps", Some("default"), "shop", Change::Patch { patch })).unwrap();
    for _ in 0..20 {
        lab.pass(Duration::from_millis(500));
        assert!(lab.instances("shop").iter().filter(|i| i.status.ready).count() >= 4);
    }
    assert_eq!(lab.app("shop").status.phase, AppPhase::Ready);
    assert!(lab.instances("shop").iter().all(|i| !before.contains(&i.metadata.uid)));
}

#[test]
fn retries_with_one_key_are_answered_once_and_another_request_with_it_is_refused() {
    let mut lab = Lab::new(1);
    lab.image("web");
    let any = Object::<App>::new(Metadata::new(name("shop"), Some(name("default"))), web(1)).to_any();
    let mut intent = lab.intent("apps", Some("default"), "shop", Change::Create { object: any });
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
    lab.image("web");
    lab.create::<App>("shop", web(1)).unwrap();
    let mut delete = lab.intent("apps", Some("default"), "shop", Change::Delete);
    delete.if_match = Some(1);
    assert_eq!(lab.submit(&delete).unwrap_err().code, Code::PreconditionFailed);
    let patch = json!({"metadata": {"deletionProtection": true}});
    lab.submit(&lab.intent("apps", Some("default"), "shop", Change::Patch { patch })).unwrap();
    delete.if_match = None;
    assert_eq!(lab.submit(&delete).unwrap_err().code, Code::Conflict);
    let patch = json!({"spec": {"organization": "other"}});
    let refused = lab.submit(&lab.intent("projects", None, "default", Change::Patch { patch })).unwrap_err();
    assert_eq!(refused.errors[0].field, "spec.organization");
    let patch = json!({"metadata": {"name": "other"}});
    let refused = lab.submit(&lab.intent("apps", Some("default"), "shop", Change::Patch { patch })).unwrap_err();
    assert_eq!(refused.errors[0].field, "metadata.name");
}

#[test]
fn a_deleted_project_takes_everything_with_it() {
    let mut lab = Lab::new(1);
    lab.create::<Project>("side", ProjectSpec::default()).unwrap();
    let digest = Digest::of(b"x");
    let spec = ImageSpec { format: ImageFormat::Oci, digest, blobs: vec![Blob { digest, size: 1 }] };
    let any = Object::<Image>::new(Metadata::new(name("web"), Some(name("side"))), spec).to_any();
    lab.submit(&lab.intent("images", Some("side"), "web", Change::Create { object: any })).unwrap();
    let any = Object::<App>::new(Metadata::new(name("shop"), Some(name("side"))), web(30)).to_any();
    lab.submit(&lab.intent("apps", Some("side"), "shop", Change::Create { object: any })).unwrap();
    lab.pass(Duration::from_secs(1));
    lab.submit(&lab.intent("projects", None, "side", Change::Delete)).unwrap();
    lab.pass(Duration::from_secs(3));
    let left: Vec<_> = lab.committed.keys().filter(|k| k.contains("/side/") || k.starts_with("t/")).collect();
    assert!(left.is_empty(), "{left:?}");
    lab.create::<Project>("side", ProjectSpec::default()).unwrap();
}
