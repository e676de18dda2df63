//! NUMA nodes: what is reserved on them is nobody else's, counted the same by every leader, and free again afterwards. And
//! fault domains, over cells.

use nexus_control::view;

use super::*;

const GI: u64 = 1 << 30;

/// Nodes of so many thousandths of a processor, 8 Gi each, numbered 0, 2, 4 …
fn nodes(cpus: &[u32]) -> Vec<NumaNode> {
    let node = |(at, cpu): (usize, &u32)| NumaNode {
        id: at as u16 * 2,
        cpus: format!("{at}"),
        cpu: MilliCpu(*cpu),
        memory: Bytes(8 * GI),
    };
    cpus.iter().enumerate().map(node).collect()
}

/// One host with two nodes of one processor.
fn town() -> Town {
    let mut town = Town::new(&[]);
    town.join("n-1", "a", |spec| spec.numa_nodes = nodes(&[1000, 1000]));
    town.pass(Duration::from_secs(1));
    town
}

impl Town {
    /// What of a host's nodes is reserved and free, in thousandths.
    fn rooms(&self, host: &str) -> Vec<(u16, u32, u32)> {
        let rooms = &self.core.world.host(&name(host)).unwrap().status.numa_nodes;
        rooms.iter().map(|room| (room.id, room.reserved_cpu.0, room.free_cpu.0)).collect()
    }

    fn nodes_of(&self, app: &str) -> Vec<u16> {
        let mut nodes: Vec<u16> =
            self.instances(app).iter().flat_map(|i| i.status.numa_nodes.iter().copied()).collect();
        nodes.sort_unstable();
        nodes
    }

    fn waits(&self, app: &str) -> String {
        let waits = self.instances(app).into_iter().find(|i| i.status.host.is_none());
        waits.map(|i| i.status.message.clone()).unwrap_or_default()
    }
}

#[test]
fn instances_that_are_kept_to_a_node_share_nothing_of_it() {
    let mut town = town();
    let pinned = |replicas| {
        move |spec: &mut AppSpec| {
            spec.resources.cpu = MilliCpu(400);
            spec.replicas = replicas;
        }
    };
    town.submit(&town.app("pinned", 5, "numa=single", pinned(5))).unwrap();
    town.pass(Duration::from_secs(1));
    assert_eq!(town.nodes_of("pinned"), [0, 0, 2, 2], "two fit on each, whatever is left of the whole");
    assert_eq!(town.rooms("n-1"), [(0, 800, 200), (2, 800, 200)]);
    let why = town.waits("pinned");
    let miss = "1 without room on its NUMA nodes (no node has more than 200m of a CPU free, 400m of a CPU wanted)";
    assert!(why.contains(miss), "{why}");
    // What is kept to no node takes from both.
    town.submit(&town.app("floats", 1, "", pinned(1))).unwrap();
    town.pass(Duration::from_secs(1));
    assert_eq!((town.hosts_of("floats"), town.nodes_of("floats")), (vec!["n-1".to_owned()], vec![]));
    assert_eq!(town.rooms("n-1"), [(0, 800, 0), (2, 800, 0)]);
    // Room that one leaves is the waiting one's.
    let first = town.instances("pinned").into_iter().find(|i| i.status.numa_nodes == [2]).unwrap();
    let first = first.metadata.name.clone();
    town.submit(&intent("apps", Some("default"), "floats", Change::Delete)).unwrap();
    town.submit(&intent("instances", Some("default"), first.as_str(), Change::Delete)).unwrap();
    town.pass(Duration::from_secs(3));
    assert_eq!(town.nodes_of("pinned"), [0, 0, 2, 2]);
    town.submit(&intent("apps", Some("default"), "pinned", Change::Delete)).unwrap();
    town.pass(Duration::from_secs(3));
    assert_eq!(town.rooms("n-1"), [(0, 0, 1000), (2, 0, 1000)], "all is free");
}

#[test]
fn a_new_leader_counts_the_same_nodes_and_the_host_is_told_them() {
    let mut town = town();
    let sized = |cpu| move |spec: &mut AppSpec| spec.resources.cpu = MilliCpu(cpu);
    town.submit(&town.app("big", 1, "numa=single", sized(700))).unwrap();
    town.submit(&town.app("small", 1, "numa=single", sized(200))).unwrap();
    town.submit(&town.app("floats", 1, "numa=single, numa=any", sized(200))).unwrap();
    town.pass(Duration::from_secs(1));
    let (rooms, big) = (town.rooms("n-1"), town.nodes_of("big"));
    assert_eq!(rooms.iter().map(|(_, reserved, _)| reserved).sum::<u32>(), 900);
    let plan = view::host_plan(&town.core.world, &name("n-1"), 1);
    let told: Vec<_> = plan.instances.iter().map(|i| (i.app.as_str(), i.numa_nodes.clone())).collect();
    assert!(told.contains(&("big", big.clone())) && told.contains(&("floats", vec![])), "{told:?}");

    town.change_leader();
    town.pass(Duration::from_secs(2));
    assert_eq!((town.rooms("n-1"), town.nodes_of("big")), (rooms, big));
    // It goes on from there: what doesn't fit beside them does not get a place, what does, does.
    let why = town.refused_sized("more", "numa=single", 900);
    assert!(why.contains("no node has more than"), "{why}");
    for app in ["big", "small", "floats"] {
        town.submit(&intent("apps", Some("default"), app, Change::Delete)).unwrap();
    }
    town.pass(Duration::from_secs(3));
    assert_eq!(town.rooms("n-1"), [(0, 0, 1000), (2, 0, 1000)]);
    town.submit(&town.app("more", 2, "numa=single", sized(1000))).unwrap();
    town.pass(Duration::from_secs(1));
    assert_eq!(town.nodes_of("more"), [0, 2]);
}

#[test]
fn hosts_that_tell_no_nodes_are_one_node_and_those_that_keep_nothing_to_one_are_left_out() {
    let mut town = Town::new(&[("a", 1)]);
    town.join("no-1", "a", |spec| {
        spec.numa_nodes = nodes(&[2000, 2000]);
        spec.numa_trouble = "the cgroup controller cpuset is not mounted".into();
    });
    town.join("one-1", "a", |spec| spec.numa_nodes = nodes(&[2000]));
    town.pass(Duration::from_secs(1));
    let sized = |spec: &mut AppSpec| spec.resources.cpu = MilliCpu(1500);
    town.submit(&town.app("pinned", 3, "numa=single", sized)).unwrap();
    town.pass(Duration::from_secs(1));
    assert_eq!(town.hosts_of("pinned"), ["a-1", "one-1"]);
    assert_eq!(town.nodes_of("pinned"), [0], "an agent that tells no nodes is told none");
    assert_eq!(town.rooms("one-1"), [(0, 1500, 500)]);
    let why = town.waits("pinned");
    assert!(why.contains("2 lack cpu") && why.contains("1 that can't keep an instance to a NUMA node"), "{why}");
    // The controller is there after a boot, and the agent says so.
    town.hosts.get_mut(&name("no-1")).unwrap().numa_trouble.clear();
    town.pass(Duration::from_secs(2));
    assert_eq!((town.waits("pinned"), town.nodes_of("pinned")), (String::new(), vec![0, 0]));
    // An agent that is upgraded tells its nodes: what runs there stays as it is counted.
    town.hosts.get_mut(&name("a-1")).unwrap().numa_nodes = nodes(&[1000, 1000]);
    town.pass(Duration::from_secs(2));
    assert_eq!(town.rooms("a-1"), [(0, 0, 500), (2, 0, 500)]);
    // So it is where a host that was one node says that it is two.
    town.hosts.get_mut(&name("one-1")).unwrap().numa_nodes = nodes(&[1500, 500]);
    town.pass(Duration::from_secs(2));
    assert_eq!(town.rooms("one-1"), [(0, 1500, 0), (2, 0, 500)]);
    town.change_leader();
    town.pass(Duration::from_secs(2));
    assert_eq!(town.rooms("one-1"), [(0, 1500, 0), (2, 0, 500)]);
    town.hosts.get_mut(&name("one-1")).unwrap().numa_nodes = Vec::new();
    town.pass(Duration::from_secs(2));
    town.submit(&intent("apps", Some("default"), "pinned", Change::Delete)).unwrap();
    town.pass(Duration::from_secs(3));
    assert_eq!(town.rooms("one-1"), []);
}

#[test]
fn a_function_is_kept_to_no_node() {
    let wasm = |constraints: &str| AppSpec {
        runtime: Runtime::Function,
        ports: Vec::new(),
        constraints: constraints.parse().unwrap(),
        ..web(1)
    };
    let errors = App::validate(&wasm("numa=single"));
    assert_eq!(errors.iter().map(|e| e.field.as_str()).collect::<Vec<_>>(), ["spec.constraints"]);
    assert_eq!(App::validate(&wasm("numa=single, numa=any")), []);
}

#[test]
fn what_is_spread_over_fault_domains_is_counted_over_cells_and_moves_with_its_host() {
    let mut town = Town::new(&[]);
    for cell in ["c-1", "c-2"] {
        town.submit(&create::<nexus_model::kind::Cell>(None, cell, CellSpec::default())).unwrap();
    }
    // Both cells have a host behind each feed, and one more that is behind none but its rack.
    for (n, (cell, feed)) in
        [("c-1", "feed-1"), ("c-1", "feed-2"), ("c-2", "feed-1"), ("c-2", "feed-2")].into_iter().enumerate()
    {
        town.join(&format!("h-{}", n + 1), "a", |spec| {
            spec.cell = name(cell);
            spec.fault_domain = Some(name(feed));
        });
    }
    town.join("h-5", "a", |spec| {
        spec.cell = name("c-1");
        spec.rack = Some(name("feed-1"));
    });
    town.pass(Duration::from_secs(1));
    let feed = |host: &str| match host {
        "h-1" | "h-3" => "feed-1",
        "h-2" | "h-4" => "feed-2",
        _ => "rack",
    };
    town.deploy("even", 6, "spread=fault-domain");
    let mut feeds: BTreeMap<&str, u32> = BTreeMap::new();
    for host in town.hosts_of("even") {
        *feeds.entry(feed(&host)).or_default() += 1;
    }
    assert_eq!(feeds, BTreeMap::from([("feed-1", 2), ("feed-2", 2), ("rack", 2)]));
    // The rack's host is put behind the first feed: two domains are left, of four and two.
    town.hosts.get_mut(&name("h-5")).unwrap().fault_domain = Some(name("feed-1"));
    town.pass(Duration::from_secs(1));
    town.change("apps", Some("default"), "even", json!({"spec": {"replicas": 8}}));
    town.pass(Duration::from_secs(2));
    let hosts = town.hosts_of("even");
    let second = hosts.iter().filter(|host| feed(host) == "feed-2").count();
    assert_eq!((hosts.len(), second), (8, 4), "both new ones are behind the other feed: {hosts:?}");
}
