//! Cells: who joins which, whose instances go where, and that a cell's or an object's trouble stays its own.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::{create, image, intent, name, web};
use nexus_control::cells::{Cells, DEAD_AFTER};
use nexus_control::core::{Bootstrap, Core, Moment, Planted};
use nexus_control::intent::{Accepted, Change, Intent};
use nexus_control::step::Dirty;
use nexus_control::world::World;
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::{ApiError, Bytes, Code, Digest, Metadata, MilliCpu, Name, Object, Timestamp};
use nexus_store::{KeyValue, Revision};
use serde_json::json;

/// A region whose hosts join as they are told, run what they are told, and report each half second.
struct Town {
    core: Core,
    rng: SeededRng,
    at: Duration,
    revision: u64,
    /// What each living host declares of itself.
    alive: BTreeMap<Name, HostSpec>,
    joined: u8,
}

impl Town {
    fn new(zones: &[&str], cells: &[(&str, &str, u32)]) -> Self {
        Self::of(World::default(), zones, cells)
    }

    fn of(world: World, zones: &[&str], cells: &[(&str, &str, u32)]) -> Self {
        let zones = zones.iter().map(|z| name(z)).collect();
        let bootstrap = Bootstrap { region: name("local"), domain: "localhost".into(), zones, cells: Vec::new() };
        let core = Core::new(world, bootstrap, Cells::new(Duration::ZERO, "server-a".into(), 1));
        let mut town =
            Self { core, rng: SeededRng::new(7), at: Duration::ZERO, revision: 0, alive: BTreeMap::new(), joined: 0 };
        town.with(|core, at| core.bootstrap(at));
        for (cell, zone, max_hosts) in cells {
            town.cell(cell, zone, *max_hosts).unwrap();
        }
        town.create::<Image>("default", "web", image("web")).unwrap();
        town
    }

    fn moment(&self) -> (Timestamp, Duration) {
        (Timestamp::from_millis(1_000_000 + self.at.as_millis() as i64), self.at)
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let (now, monotonic) = self.moment();
        let at = Moment { now, monotonic, rng: &self.rng };
        let answer = f(&mut self.core, at);
        // Bounded, because a test may plant what is never done.
        for _ in 0..50 {
            if !self.core.reconcile(at) {
                break;
            }
        }
        self.commit();
        answer
    }

    fn commit(&mut self) {
        for pack in self.core.take_packs() {
            self.revision += 1;
            self.core.committed(&pack, self.revision);
        }
    }

    fn cell(&mut self, cell: &str, zone: &str, max_hosts: u32) -> Result<Accepted, ApiError> {
        self.create::<Cell>("", cell, CellSpec { max_hosts, zone: Some(name(zone)) })
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    fn create<K: Kind>(&mut self, project: &str, object: &str, spec: K::Spec) -> Result<Accepted, ApiError> {
        let project = matches!(K::SCOPE, Scope::Project).then_some(project);
        self.submit(&create::<K>(project, object, spec))
    }

    fn project(&mut self, project: &str) {
        self.create::<Project>("", project, ProjectSpec::default()).unwrap();
        self.create::<Image>(project, "web", image("web")).unwrap();
    }

    /// An app whose instances take half a core each: a host takes four.
    fn app(&mut self, project: &str, app: &str, replicas: u32) {
        let mut spec = web(replicas);
        spec.resources.cpu = MilliCpu(500);
        self.create::<App>(project, app, spec).unwrap();
    }

    fn scale(&mut self, project: &str, app: &str, replicas: u32) {
        let patch = json!({"spec": {"replicas": replicas}});
        self.submit(&intent("apps", Some(project), app, Change::Patch { patch })).unwrap();
    }

    /// A new host asks to join; it goes on living if it may.
    fn join(&mut self, host: &str, zone: &str, cell: &str) -> Result<Name, String> {
        self.joined += 1;
        let (memory, scratch) = (Bytes(64 << 30), Bytes(640 << 30));
        let capacity = Capacity { cpu: MilliCpu(2000), memory, scratch, instances: 100 };
        let spec = common::host(zone, cell, self.joined, capacity);
        let host = name(host);
        self.report(&host, &spec)?;
        self.alive.insert(host.clone(), spec);
        Ok(self.core.world.host(&host).unwrap().spec.cell.clone())
    }

    fn report(&mut self, host: &Name, spec: &HostSpec) -> Result<u64, String> {
        let runs = self.core.world.instances_on(host).filter(|i| i.metadata.deleting.is_none());
        let report = common::report(host, spec.clone(), self.revision, runs);
        self.with(|core, at| core.report(&report, at))
    }

    fn pass(&mut self, time: Duration) {
        let end = self.at + time;
        while self.at < end {
            self.at += Duration::from_millis(500);
            for (host, spec) in self.alive.clone() {
                self.report(&host, &spec).unwrap();
            }
            self.with(|core, at| core.tick(at));
        }
        assert_eq!(self.core.check_invariants(), Vec::<String>::new());
    }

    fn get_app(&self, project: &str, app: &str) -> &Object<App> {
        self.core.world.apps.get(Some(&name(project)), &name(app)).unwrap()
    }

    fn cells_of(&self, project: &str) -> BTreeMap<Name, usize> {
        let mut cells = BTreeMap::new();
        for i in self.core.world.instances.within(&name(project)) {
            if let Some(host) = i.status.host.as_ref().and_then(|h| self.core.world.host(h)) {
                *cells.entry(host.spec.cell.clone()).or_default() += 1;
            }
        }
        cells
    }

    fn told(&self, project: &str, reason: &str) -> Vec<String> {
        let events =
            self.core.world.events.within(&self.core.world.projects.live[&(None, name(project))].metadata.name);
        events.filter(|e| e.spec.reason == reason).map(|e| e.spec.message.clone()).collect()
    }

    fn state(&self, host: &str) -> HostState {
        self.core.world.host(&name(host)).unwrap().status.state
    }

    fn status(&self, cell: &str) -> &CellStatus {
        &self.core.world.cells.get(None, &name(cell)).unwrap().status
    }
}

/// Eight cells of two hosts in one zone.
fn eight_cells() -> Town {
    let cells: Vec<String> = (1..=8).map(|n| format!("cell-{n}")).collect();
    let spec: Vec<(&str, &str, u32)> = cells.iter().map(|c| (c.as_str(), "zone-a", 2)).collect();
    let mut town = Town::new(&["zone-a"], &spec);
    for n in 0..16 {
        town.join(&format!("host-{n}"), "zone-a", ANY_CELL).unwrap();
    }
    town.pass(Duration::from_secs(1));
    town
}

/// The assignment as it is documented, computed anew: the highest of SHA-256 over the four names, each ended by a zero.
fn shard_as_documented(project: &str, cells: impl Iterator<Item = String>, size: usize) -> BTreeSet<Name> {
    let mut weighed: Vec<(String, String)> = cells
        .map(|cell| {
            (Digest::of(format!("shard-1\0local\0{project}\0{cell}\0").as_bytes()).hex()[..16].to_owned(), cell)
        })
        .collect();
    weighed.sort();
    weighed.into_iter().rev().take(size).map(|(_, cell)| name(&cell)).collect()
}

#[test]
fn hosts_join_the_cell_with_room_and_a_new_one_is_made_when_all_are_full() {
    let mut town = Town::new(&["zone-a", "zone-b"], &[("small", "zone-a", 2), ("tiny", "zone-a", 1)]);
    let cells: Vec<Name> = (0..5).map(|n| town.join(&format!("a-{n}"), "zone-a", ANY_CELL).unwrap()).collect();
    // The emptiest first, by name among equals; two and one fit, the rest goes to a cell that is made.
    assert_eq!(cells, ["small", "tiny", "small", "zone-a-cell-1", "zone-a-cell-1"].map(name));
    assert_eq!(town.join("b-0", "zone-b", ANY_CELL).unwrap(), name("zone-b-cell-1"));
    assert_eq!(town.told("system", "CellMade").len(), 2);

    let refused = town.join("b-1", "zone-b", "small").unwrap_err();
    assert!(refused.contains("as many as it may"), "{refused}");
    let refused = town.join("b-1", "zone-b", "zone-a-cell-1").unwrap_err();
    assert!(refused.contains("is in zone-a"), "{refused}");
    let refused = town.join("b-1", "zone-b", "nowhere").unwrap_err();
    assert!(refused.contains("there is no cell nowhere"), "{refused}");
    assert_eq!(town.join("b-1", "zone-b", "zone-b-cell-1").unwrap(), name("zone-b-cell-1"));

    // A host that returns keeps its cell, whatever it now names.
    let spec = HostSpec { cell: name("tiny"), ..town.alive[&name("b-1")].clone() };
    town.report(&name("b-1"), &spec).unwrap();
    assert_eq!(town.core.world.host(&name("b-1")).unwrap().spec.cell, name("zone-b-cell-1"));
}

#[test]
fn a_tenant_stays_in_its_shard_and_spills_only_when_that_is_full_and_says_so() {
    let mut town = eight_cells();
    let cells = || (1..=8).map(|n| format!("cell-{n}"));
    town.project("acme");
    town.project("globex");
    for project in ["acme", "globex"] {
        town.app(project, "shop", 8);
        town.app(project, "blog", 4);
        town.pass(Duration::from_secs(1));
        let used: BTreeSet<Name> = town.cells_of(project).into_keys().collect();
        assert_eq!(used, shard_as_documented(project, cells(), 2), "of {project}");
    }
    assert!(town.told("acme", "Placed").iter().all(|m| !m.contains("beyond")));

    // A shard of two cells of two hosts takes sixteen, less what the other tenant has in a shared cell.
    town.scale("acme", "shop", 20);
    town.pass(Duration::from_secs(2));
    assert_eq!(town.get_app("acme", "shop").status.ready_replicas, 20);
    let used: BTreeSet<Name> = town.cells_of("acme").into_keys().collect();
    assert!(used.is_superset(&shard_as_documented("acme", cells(), 2)) && used.len() > 2, "{used:?}");
    assert!(
        !town
            .told("acme", "Placed")
            .iter()
            .filter(|m| m.contains("beyond the project's usual cells"))
            .collect::<Vec<_>>()
            .is_empty()
    );
    // The overflow goes by the project's own order too.
    let spilled = used.difference(&shard_as_documented("acme", cells(), 2)).count();
    assert!(used.is_subset(&shard_as_documented("acme", cells(), 2 + spilled)), "{used:?}");
}

#[test]
fn an_object_whose_reconciler_panics_is_set_aside_and_everything_else_goes_on() {
    let mut town = eight_cells();
    town.app("default", "sound", 2);
    town.app("default", "poisoned", 2);
    town.pass(Duration::from_secs(1));
    let poisoned = Dirty::App((Some(name("default")), name("poisoned")));
    let before = town.told("default", "Quarantined").len();
    town.with(|core, _| core.plant(poisoned.clone(), Some(Planted::Panics)));
    town.scale("default", "poisoned", 4);
    assert_eq!(town.core.quarantined(), 1);
    assert_eq!(town.told("default", "Quarantined").len(), before + 1);

    // Others deploy, scale and fail over; only the poisoned one stands still.
    town.app("default", "later", 3);
    town.scale("default", "sound", 5);
    let victim = {
        let sound = town.get_app("default", "sound").metadata.uid;
        town.core.world.instances_of(sound).next().unwrap().status.host.clone().unwrap()
    };
    town.alive.remove(&victim);
    town.pass(DEAD_AFTER + Duration::from_secs(6));
    assert_eq!(town.state(victim.as_str()), HostState::Dead);
    assert_eq!(town.get_app("default", "later").status.ready_replicas, 3);
    assert_eq!(town.get_app("default", "sound").status.ready_replicas, 5);
    assert!(town.get_app("default", "poisoned").status.desired_replicas < 4);
    let poisoned_in: BTreeSet<Name> = {
        let app = town.get_app("default", "poisoned").metadata.uid;
        let hosts = town.core.world.instances_of(app).filter_map(|i| i.status.host.clone());
        hosts.map(|host| town.core.world.host(&host).unwrap().spec.cell.clone()).collect()
    };
    for cell in town.core.world.cells.live.values() {
        let named = cell.status.quarantined.iter().any(|n| n == "app default/poisoned");
        assert_eq!(named, poisoned_in.contains(&cell.metadata.name), "{:?}", cell.status);
    }
    // It is tried again, ever more seldom: each failure is one more of the same event.
    let events = &town.core.world.events;
    let project = name("default");
    let count = events.within(&project).filter(|e| e.spec.reason == "Quarantined").map(|e| e.spec.count);
    let tries: u32 = count.sum();
    assert!((3..=6).contains(&tries), "{tries} tries in some 12 seconds");

    town.core.plant(poisoned, None);
    town.pass(Duration::from_secs(20));
    assert_eq!(town.core.quarantined(), 0);
    assert_eq!(town.get_app("default", "poisoned").status.ready_replicas, 4);
    assert!(town.core.world.cells.live.values().all(|cell| cell.status.quarantined.is_empty()));
}

#[test]
fn an_object_that_is_never_done_starves_nobody() {
    let mut town = eight_cells();
    town.app("default", "another", 1);
    // It comes before all others in every order there is.
    let restless = Dirty::App((Some(name("aaa")), name("aaa")));
    town.core.plant(restless.clone(), Some(Planted::Restless));
    town.app("default", "shop", 3);
    let (now, monotonic) = town.moment();
    let more = town.core.reconcile(Moment { now, monotonic, rng: &town.rng });
    assert!(more, "the restless one always has more to do");
    town.commit();
    assert_eq!(town.get_app("default", "shop").status.replicas, 3);
    assert!(town.core.world.instances.live.values().all(|i| i.status.host.is_some()));
    town.core.plant(restless, None);
    town.pass(Duration::from_secs(1));
    assert_eq!(town.get_app("default", "shop").status.ready_replicas, 3);
}

#[test]
fn load_and_blast_radius_are_what_a_recount_says() {
    let mut town = eight_cells();
    for n in 0..6 {
        let project = format!("tenant-{n}");
        town.project(&project);
        town.app(&project, "shop", 1 + n % 4);
    }
    town.pass(Duration::from_secs(1));
    town.scale("tenant-3", "shop", 9);
    town.submit(&intent("apps", Some("tenant-1"), "shop", Change::Delete)).unwrap();
    let victim = town.core.world.instances.live.values().find_map(|i| i.status.host.clone()).unwrap();
    town.alive.remove(&victim);
    town.pass(DEAD_AFTER + Duration::from_secs(8));

    let world = &town.core.world;
    let cell_of = |host: &Name| world.host(host).unwrap().spec.cell.clone();
    let placed = || world.instances.live.values().filter(|i| i.status.host.is_some());
    let projects: BTreeSet<&Name> = placed().filter_map(|i| i.metadata.project.as_ref()).collect();
    let share = |part: usize, whole: usize| u32::try_from((part * 100).div_ceil(whole.max(1))).unwrap();
    let mut full = 0;
    for cell in world.cells.live.values() {
        let here: Vec<_> =
            placed().filter(|i| cell_of(i.status.host.as_ref().unwrap()) == cell.metadata.name).collect();
        let tenants: BTreeSet<&Name> = here.iter().filter_map(|i| i.metadata.project.as_ref()).collect();
        let wholly = tenants.iter().filter(|p| {
            placed().filter(|i| i.metadata.project.as_ref() == Some(**p)).count()
                == here.iter().filter(|i| i.metadata.project.as_ref() == Some(**p)).count()
        });
        let radius = BlastRadius {
            instances: u32::try_from(here.len()).unwrap(),
            instances_percent: share(here.len(), placed().count()),
            projects: u32::try_from(tenants.len()).unwrap(),
            projects_percent: share(tenants.len(), projects.len()),
            projects_wholly: u32::try_from(wholly.count()).unwrap(),
        };
        assert_eq!(cell.status.blast_radius, radius, "of {}", cell.metadata.name);
        let hosts = world.hosts.live.values().filter(|h| h.spec.cell == cell.metadata.name);
        let (reserved, capacity) =
            hosts.fold((0, 0), |(r, c), h| (r + h.status.reserved.cpu.0, c + h.spec.capacity.cpu.0));
        assert_eq!(cell.status.reserved_percent, reserved * 100 / capacity, "of {}", cell.metadata.name);
        full += cell.status.blast_radius.instances;
    }
    assert_eq!(full as usize, placed().count());
}

#[test]
fn a_cell_whose_hosts_all_vanish_keeps_its_brake_to_itself() {
    let mut town = eight_cells();
    town.app("default", "shop", 12);
    town.project("acme");
    town.app("acme", "shop", 12);
    town.pass(Duration::from_secs(1));
    // All of one cell of the tenant, and one host of every other.
    let lost = town.cells_of("default").into_keys().next().unwrap();
    let others: Vec<Name> = (1..=8).map(|n| name(&format!("cell-{n}"))).filter(|c| *c != lost).collect();
    let hosts_in = |town: &Town, cell: &Name| -> Vec<Name> {
        let hosts = town.core.world.hosts.live.values().filter(|h| h.spec.cell == *cell);
        hosts.map(|h| h.metadata.name.clone()).collect()
    };
    let vanished = hosts_in(&town, &lost);
    let singles: Vec<Name> = others.iter().map(|cell| hosts_in(&town, cell).remove(0)).collect();
    for host in vanished.iter().chain(&singles) {
        town.alive.remove(host);
    }
    town.pass(DEAD_AFTER + Duration::from_secs(4));
    assert!(vanished.iter().all(|h| town.state(h.as_str()) == HostState::Suspect));
    assert!(town.status(lost.as_str()).brake);
    for (cell, host) in others.iter().zip(&singles) {
        assert!(!town.status(cell.as_str()).brake, "{cell} has its hosts");
        assert_eq!(town.state(host.as_str()), HostState::Dead);
    }
    let living = town.core.world.instances.live.values().filter(|i| i.metadata.deleting.is_none());
    for i in living {
        let host = i.status.host.as_ref().expect("the seven other cells have room");
        assert!(!singles.contains(host), "{} is still on a dead host", i.metadata.name);
    }
}

#[test]
fn room_that_comes_is_filled_by_all_that_wait_and_can_use_it() {
    let mut town = Town::new(&["zone-a"], &[("cell-1", "zone-a", 10)]);
    town.app("default", "small", 6);
    let mut spec = web(2);
    spec.resources.cpu = MilliCpu(4000);
    town.create::<App>("default", "wide", spec).unwrap();
    assert!(town.core.world.instances.live.values().all(|i| i.status.host.is_none()));
    // Four small ones fit on each host, a wide one on none: it keeps nobody waiting.
    town.join("host-1", "zone-a", ANY_CELL).unwrap();
    town.pass(Duration::from_secs(1));
    assert_eq!(town.get_app("default", "small").status.ready_replicas, 4);
    town.join("host-2", "zone-a", ANY_CELL).unwrap();
    town.pass(Duration::from_secs(1));
    assert_eq!(town.get_app("default", "small").status.ready_replicas, 6);
    assert_eq!(town.get_app("default", "wide").status.ready_replicas, 0);
    town.scale("default", "small", 0);
    town.pass(Duration::from_secs(1));
    town.app("default", "later", 8);
    town.pass(Duration::from_secs(1));
    assert_eq!(town.get_app("default", "later").status.ready_replicas, 8);
}

#[test]
fn a_stored_object_that_cant_be_read_is_passed_over_and_never_overwritten() {
    let mut world = World::default();
    let stored = |key: &str, value: &str| KeyValue {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        create_revision: Revision(1),
        mod_revision: Revision(1),
    };
    let other = Object::<Zone>::new(Metadata::new(name("elsewhere"), None), ZoneSpec::default());
    let other = String::from_utf8(other.to_vec()).unwrap();
    let poison = [
        ("o/apps/default/shop", "\u{0}\u{1}not JSON"),
        ("o/projects/-/default", "{\"metadata\": {\"name\": \"default\"}, \"spec\": {\"organization\": 7}}"),
        ("o/zones/-/zone-a", other.as_str()),
        ("o/cells/-/zone-a-cell-1", ""),
        ("o/hosts/-/host-1", "[]"),
        ("t/instances/00000000-0000-0000-0000-000000000001", "null"),
    ];
    for (key, value) in poison {
        world.take_in(&stored(key, value)).unwrap_err();
    }
    assert_eq!(world.unreadable.len(), poison.len());
    // A writer starts from it, and what is not touched by it works. The project `default` is unreadable, so nothing can
    // be made in it; the image of the town's start is.
    let zones = [name("zone-a")];
    let bootstrap =
        Bootstrap { region: name("local"), domain: "localhost".into(), zones: zones.to_vec(), cells: vec![] };
    let core = Core::new(world, bootstrap, Cells::new(Duration::ZERO, "server-a".into(), 1));
    let mut town =
        Town { core, rng: SeededRng::new(7), at: Duration::ZERO, revision: 1, alive: BTreeMap::new(), joined: 0 };
    town.with(|core, at| core.bootstrap(at));
    town.project("acme");
    assert_eq!(town.join("host-2", "zone-a", ANY_CELL).unwrap(), name("zone-a-cell-2"));
    let refused = town.join("host-1", "zone-a", ANY_CELL).unwrap_err();
    assert!(refused.contains("nexus debug store get o/hosts/-/host-1"), "{refused}");
    town.app("acme", "shop", 2);
    town.pass(Duration::from_secs(1));
    assert_eq!(town.get_app("acme", "shop").status.ready_replicas, 2);
    for (plural, taken) in [("projects", "default"), ("zones", "zone-a"), ("cells", "zone-a-cell-1")] {
        let patch = json!({"spec": {}});
        let refused = town.submit(&intent(plural, None, taken, Change::Patch { patch })).unwrap_err();
        assert_eq!(refused.code, Code::Conflict);
        assert!(refused.detail.contains(&format!("nexus debug store get o/{plural}/-/{taken}")), "{}", refused.detail);
    }
    let refused = town.cell("zone-a-cell-1", "zone-a", 10).unwrap_err();
    assert_eq!(refused.code, Code::Conflict);
    assert_eq!(town.core.world.unreadable.len(), poison.len(), "all of it is still there");

    // Whoever repairs or removes the bytes gets the name back.
    town.core.world.leave_out("o/cells/-/zone-a-cell-1");
    town.cell("zone-a-cell-1", "zone-a", 10).unwrap();
}
