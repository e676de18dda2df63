//! The network that instances are in for which nobody has named one: when it is made, who is in it, and where it leads.

use nexus_model::plan::{NetworkPlan, RoutePlan, Via};

use super::*;

impl Lab {
    fn project(&mut self, spec: Value) {
        let change = Change::Patch { patch: json!({ "spec": spec }) };
        self.submit(&intent("projects", None, "default", change)).unwrap();
        self.pass();
    }

    /// A host says why it can't have tenants' networks, or that it can.
    fn trouble(&mut self, host: &str, why: &str) {
        self.hosts.get_mut(&name(host)).unwrap().network_trouble = why.into();
        self.pass();
    }

    fn events(&self, reason: &str) -> Vec<String> {
        let all = self.core.world.events.live.values().filter(|e| e.spec.reason == reason);
        all.map(|e| e.spec.message.clone()).collect()
    }

    fn plain(&mut self, app: &str, replicas: u32) {
        self.app(app, replicas, json!([]));
    }

    /// How many networks, subnets and NICs there are.
    fn count(&self) -> [usize; 3] {
        let w = &self.core.world;
        [w.networks.live.len(), w.subnets.live.len(), w.nics.live.len()]
    }

    fn nics_of(&self, app: &str) -> Vec<&Object<Nic>> {
        let instances = self.instances(app).into_iter();
        instances.flat_map(|i| self.core.world.nics_of(i.metadata.uid)).collect()
    }

    /// What hosts are told of the default network, with the routes of its subnet.
    fn default_plan(&self) -> (NetworkPlan, Vec<RoutePlan>) {
        let told = self.told("zone-a-1");
        let plan = told.networks.iter().find(|n| n.name == *"default").expect("hosts are told of it");
        let subnet = plan.subnets.iter().find(|s| s.name == *"default").unwrap();
        let table = &plan.route_tables[subnet.route_table as usize];
        ((**plan).clone(), table.routes.clone())
    }
}

#[test]
fn the_default_network_is_made_with_the_first_instance_that_needs_it_and_once() {
    let mut lab = Lab::new(&[("zone-a", 2)]);
    lab.project(json!({"defaultNetwork": false}));
    lab.plain("old", 1);
    assert_eq!(lab.count(), [0, 0, 0]);
    let before = lab.instances("old")[0].clone();
    lab.project(json!({"defaultNetwork": true}));
    assert_eq!(lab.count(), [0, 0, 0], "nobody needs it yet");
    // Two at once.
    lab.submit(&create::<App>(Some("default"), "one", web(12))).unwrap();
    lab.submit(&create::<App>(Some("default"), "two", web(1))).unwrap();
    lab.pass();
    assert_eq!(lab.count(), [1, 1, 13]);
    let network = lab.core.world.networks.get(Some(&name("default")), &name("default")).unwrap().clone();
    let cidrs: Vec<String> = network.spec.cidrs.iter().map(ToString::to_string).collect();
    assert!(cidrs[0] == "172.31.0.0/16" && cidrs[1].starts_with("fd") && cidrs[1].ends_with("/48"), "{cidrs:?}");
    let subnet = lab.core.world.subnets.get(Some(&name("default")), &name("default")).unwrap();
    assert_eq!(subnet.spec.cidr4, Some("172.31.0.0/18".parse().unwrap()));
    assert!(subnet.spec.cidr6.is_some_and(|six| six.length == 64 && network.spec.cidrs[1].covers(&six)));
    for nic in lab.nics_of("one").into_iter().chain(lab.nics_of("two")) {
        assert_eq!((nic.status.phase, nic.status.index), (NicPhase::Attached, Some(0)));
        assert!(nic.status.address4.is_some() && nic.status.address6.is_some());
        let groups = &lab.plan("zone-a-1", nic.metadata.uid).groups;
        assert_eq!(groups, &[0], "the network's own group");
    }
    // What ran before goes on as it is, also when others of its app come.
    lab.patch("apps", "old", json!({"replicas": 2})).unwrap();
    lab.pass();
    let now = lab.instances("old");
    assert!(now.iter().any(|i| i.metadata.uid == before.metadata.uid), "it was not replaced");
    assert!(now.len() == 2 && now.iter().all(|i| i.spec.template_hash == before.spec.template_hash));
    assert_eq!(lab.nics_of("old").len(), 1, "the new one's");
    let app = lab.core.world.apps.get(Some(&name("default")), &name("old")).unwrap();
    assert!(app.spec.nics.is_empty() && app.status.phase == AppPhase::Ready, "{:?}", app.status);

    // It is an object as others are: what is used stays, what is not can go, and is made again.
    refused(lab.delete("networks", "default"), Code::Conflict, "used by subnet default");
    refused(lab.delete("subnets", "default"), Code::Conflict, "used by nic ");
    lab.make("security-groups", "web", json!({"network": "default", "rules": []})).unwrap();
    for app in ["old", "one", "two"] {
        lab.delete("apps", app).unwrap();
    }
    lab.pass();
    for (plural, object) in [("security-groups", "web"), ("subnets", "default"), ("networks", "default")] {
        lab.delete(plural, object).unwrap();
    }
    lab.pass();
    assert_eq!(lab.count(), [0, 0, 0]);
    lab.plain("three", 1);
    assert_eq!(lab.count(), [1, 1, 1]);
    let again = lab.core.world.networks.get(Some(&name("default")), &name("default")).unwrap();
    assert!(again.metadata.uid != network.metadata.uid && again.spec.cidrs[1] != network.spec.cidrs[1]);
}

#[test]
fn apps_say_whether_they_are_in_the_default_network() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    let with = |network: TemplateNetwork| AppSpec { network: Some(network), ..web(1) };
    lab.project(json!({"defaultNetwork": false}));
    lab.submit(&create::<App>(Some("default"), "in", with(TemplateNetwork::Default))).unwrap();
    lab.plain("usual", 1);
    assert_eq!((lab.nics_of("in").len(), lab.nics_of("usual").len()), (1, 0));
    lab.project(json!({"defaultNetwork": true}));
    lab.submit(&create::<App>(Some("default"), "out", with(TemplateNetwork::None))).unwrap();
    lab.network("shop", "web");
    lab.app("own", 1, json!([{"subnet": "web"}]));
    assert_eq!((lab.nics_of("out").len(), lab.nics_of("own").len()), (0, 1));
    assert_eq!(lab.nics_of("own")[0].spec.subnet, name("web"));
    // An app that changes its mind is rolled out.
    lab.patch("apps", "out", json!({"network": null})).unwrap();
    for _ in 0..4 {
        lab.pass();
    }
    assert_eq!((lab.instances("out").len(), lab.nics_of("out").len()), (1, 1));
    // Jobs' instances are in it too.
    lab.make("jobs", "batch", json!({"completions": 2, "parallelism": 2, "template": {"image": "web"}})).unwrap();
    lab.pass();
    assert_eq!(lab.nics_of("batch").len(), 2);
    // Words that contradict each other.
    let both = json!({"image": "web", "nics": [{"subnet": "web"}], "network": "default"});
    let errors = |spec: Value| format!("{:?}", App::validate(&serde_json::from_value(spec).unwrap()));
    assert!(errors(both).contains("spec.network"));
    for network in ["none", "default"] {
        assert_eq!(errors(json!({"image": "web", "runtime": "function", "network": network})), "[]");
    }
    let named = json!({"image": "web", "runtime": "function", "nics": [{"subnet": "web"}]});
    assert!(errors(named).contains("spec.nics"));
}

#[test]
fn functions_are_in_the_default_network_as_containers_are() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.project(json!({"defaultNetwork": true}));
    let of = |network| AppSpec { runtime: Runtime::Function, ports: Vec::new(), network, ..web(2) };
    lab.submit(&create::<App>(Some("default"), "in", of(None))).unwrap();
    lab.submit(&create::<App>(Some("default"), "out", of(Some(TemplateNetwork::None)))).unwrap();
    lab.pass();
    assert_eq!((lab.nics_of("in").len(), lab.nics_of("out").len()), (2, 0));
    for nic in lab.nics_of("in") {
        assert_eq!((nic.status.phase, nic.status.index), (NicPhase::Attached, Some(0)));
    }
    // Hosts are told of theirs as of any other.
    let (plan, _) = lab.default_plan();
    assert_eq!(plan.nics.len(), 2);
}

#[test]
fn who_makes_a_default_network_first_keeps_theirs() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.project(json!({"defaultNetwork": true, "egress": {"mode": "allow"}}));
    lab.make("networks", "default", json!({"cidrs": ["10.5.0.0/24"]})).unwrap();
    lab.make("subnets", "front", json!({"network": "default", "cidr4": "10.5.0.0/25"})).unwrap();
    lab.plain("one", 1);
    let waits = lab.instances("one")[0].status.message.clone();
    assert!(waits.contains("nothing left for a subnet of that name"), "{waits}");
    lab.patch("networks", "default", json!({"cidrs": ["10.5.0.0/24", "10.6.0.0/16"]})).unwrap();
    lab.pass();
    assert_eq!(lab.nics_of("one")[0].status.address4, four("10.6.0.2"));
    let (plan, routes) = lab.default_plan();
    assert_eq!((plan.cidrs.len(), routes.len(), plan.nats.len()), (2, 0, 0), "nobody asked for a way out of it");
    // Too many networks are said, and one that goes makes room.
    lab.delete("apps", "one").unwrap();
    lab.pass();
    for (plural, object) in [("subnets", "default"), ("subnets", "front"), ("networks", "default")] {
        lab.delete(plural, object).unwrap();
    }
    lab.pass();
    for n in 0..MAX_NETWORKS {
        lab.make("networks", &format!("n{n}"), json!({"cidrs": ["10.0.0.0/16"]})).unwrap();
    }
    lab.plain("two", 1);
    let waits = lab.instances("two")[0].status.message.clone();
    assert!(waits.contains("can't be made: project default has 50 networks here"), "{waits}");
    lab.delete("networks", "n7").unwrap();
    lab.pass();
    assert_eq!(lab.nics_of("two")[0].status.address4, four("172.31.0.2"));
}

#[test]
fn a_default_network_leads_to_what_its_project_allows() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.project(json!({"defaultNetwork": true}));
    lab.plain("one", 1);
    let (plan, routes) = lab.default_plan();
    assert_eq!((routes.len(), plan.nats.len()), (0, 0), "nothing, unless the project says otherwise");
    let to = |routes: &[RoutePlan]| routes.iter().map(|r| r.to.to_string()).collect::<Vec<_>>();
    lab.project(json!({"egress": {"networks": ["2001:db8:5::/48", "203.0.113.0/24", "203.0.113.0/24"]}}));
    let (plan, routes) = lab.default_plan();
    assert_eq!(to(&routes), ["203.0.113.0/24", "2001:db8:5::/48"]);
    assert!(routes.iter().all(|r| r.via == Via::Nat(0)));
    assert!(plan.nats.len() == 1 && plan.nats[0].addresses.is_empty(), "each host lends its own address");
    // Beside a NAT gateway of the tenant's, whose own route table leads to that.
    lab.make("nat-gateways", "mine", json!({"network": "default"})).unwrap();
    lab.make("route-tables", "out", json!({"network": "default"})).unwrap();
    lab.patch("route-tables", "out", json!({"routes": [{"to": "198.51.100.0/24", "via": {"nat": "mine"}}]})).unwrap();
    assert!(lab.default_plan().1.iter().all(|r| r.via == Via::Nat(1)));
    lab.patch("subnets", "default", json!({"routeTable": "out"})).unwrap();
    let (_, routes) = lab.default_plan();
    assert_eq!((to(&routes), routes[0].via), (vec!["198.51.100.0/24".to_owned()], Via::Nat(0)));
    lab.patch("subnets", "default", json!({"routeTable": null})).unwrap();
    lab.project(json!({"egress": {"mode": "allow"}}));
    assert_eq!(to(&lab.default_plan().1), ["0.0.0.0/0", "::/0"]);
    // Those who run in it keep their way out, also when new ones don't come.
    lab.project(json!({"defaultNetwork": false}));
    assert_eq!(lab.default_plan().1.len(), 2);
    lab.project(json!({"egress": {"mode": "deny", "networks": []}}));
    assert_eq!(lab.default_plan().1.len(), 0);
    // Any network can go by it.
    lab.network("shop", "web");
    lab.app("two", 1, json!([{"subnet": "web"}]));
    lab.project(json!({"egress": {"mode": "allow"}}));
    let leads = |lab: &Lab| {
        let told = lab.told("zone-a-1");
        let plan = told.networks.iter().find(|n| n.name == *"shop").unwrap();
        plan.route_tables[plan.subnets[0].route_table as usize].routes.len()
    };
    assert_eq!(leads(&lab), 0);
    lab.patch("networks", "shop", json!({"egress": "project"})).unwrap();
    assert_eq!(leads(&lab), 2);
}

#[test]
fn a_default_network_that_is_full_says_so() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.plain("one", 1);
    for n in 1..MAX_NICS {
        lab.make("nics", &format!("n{n}"), json!({"subnet": "default"})).unwrap();
    }
    lab.patch("apps", "one", json!({"replicas": 2})).unwrap();
    lab.pass();
    let waits = |lab: &Lab| {
        lab.instances("one").into_iter().find_map(|i| Some(i.status.message.clone()).filter(|m| !m.is_empty()))
    };
    let why = waits(&lab).expect("one waits");
    assert!(why.contains(&format!("network default has {MAX_NICS} NICs")) && why.contains("network: none"), "{why}");
    lab.delete("nics", "n9").unwrap();
    lab.pass();
    assert_eq!((waits(&lab), lab.nics_of("one").len()), (None, 2));
}

#[test]
fn a_project_has_a_default_network_unless_it_says_otherwise_or_is_older() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    let of = |lab: &Lab, project: &str| lab.core.world.projects.get(None, &name(project)).unwrap().clone();
    assert!(of(&lab, "default").spec.has_default_network() && of(&lab, "system").spec.has_default_network());
    let put = |lab: &mut Lab, project: &str, spec: Value| {
        let spec: ProjectSpec = serde_json::from_value(spec).unwrap();
        let object = Object::<Project>::new(nexus_model::Metadata::new(name(project), None), spec).to_any();
        lab.submit(&intent("projects", None, project, Change::Put { object })).unwrap();
        lab.pass();
        of(lab, project)
    };
    // What a manifest leaves unsaid is decided once, and stays as it is when it is applied again.
    let plain = json!({"organization": "default"});
    let new = put(&mut lab, "shop", plain.clone());
    assert_eq!(new.spec.default_network, Some(true));
    let again = put(&mut lab, "shop", plain.clone());
    assert_eq!((again.metadata.generation, again.spec), (new.metadata.generation, new.spec));
    let off = put(&mut lab, "shop", json!({"organization": "default", "defaultNetwork": false}));
    assert_eq!(off.metadata.generation, new.metadata.generation + 1);
    assert_eq!(put(&mut lab, "shop", plain.clone()).spec.default_network, Some(false));
    let null = Change::Patch { patch: json!({"spec": {"defaultNetwork": null}}) };
    lab.submit(&intent("projects", None, "shop", null)).unwrap();
    assert_eq!(of(&lab, "shop").spec.default_network, Some(false), "it keeps what it has");

    // An earlier release's project says nothing of it, and has none until somebody says otherwise.
    let stored =
        r#"{"organization": "default", "displayName": "", "quota": {"instances": 5}, "egress": {"mode": "deny"}}"#;
    let old: ProjectSpec = serde_json::from_str(stored).unwrap();
    assert!(old.default_network.is_none() && !old.has_default_network());
    assert!(!serde_json::to_string(&old).unwrap().contains("defaultNetwork"), "nor does a release read it otherwise");
    let mut again = serde_json::from_value::<ProjectSpec>(plain).unwrap();
    again.complete(Some(&old));
    assert_eq!(again.default_network, None);
    again.default_network = Some(true);
    again.complete(Some(&old));
    assert!(again.has_default_network());
}

#[test]
fn what_waits_for_the_first_host_is_in_the_default_network_if_that_host_can() {
    for can in [true, false] {
        let mut lab = Lab::new(&[]);
        lab.submit(&create::<Zone>(None, "zone-a", ZoneSpec::default())).unwrap();
        lab.plain("early", 3);
        assert_eq!((lab.instances("early").len(), lab.count()), (3, [0, 0, 0]));
        let capacity =
            Capacity { cpu: MilliCpu(64_000), memory: Bytes(64 << 30), scratch: Bytes(64 << 30), instances: 200 };
        let mut spec = common::host("zone-a", ANY_CELL, 1, capacity);
        if !can {
            spec.network_trouble = "Operation not supported".into();
        }
        lab.hosts.insert(name("zone-a-1"), spec);
        lab.pass();
        assert_eq!(lab.nics_of("early").len(), if can { 3 } else { 0 });
        assert!(lab.instances("early").iter().all(|i| i.status.host.is_some()));
        assert_eq!(lab.events("NoDefaultNetwork").len(), if can { 0 } else { 3 });
    }
}

#[test]
fn nothing_that_has_nics_is_placed_on_a_host_that_can_t_have_tenants_networks() {
    let mut lab = Lab::new(&[("zone-a", 2)]);
    lab.trouble("zone-a-1", "making the tunnel 1 from 127.0.0.1: Operation not supported");
    lab.plain("web", 2);
    let hosts = |lab: &Lab, app: &str| {
        lab.instances(app).iter().map(|i| i.status.host.clone()).collect::<BTreeSet<Option<Name>>>()
    };
    assert_eq!(hosts(&lab, "web"), [Some(name("zone-a-2"))].into(), "those of the other");
    assert_eq!(lab.nics_of("web").len(), 2);
    let out = AppSpec { network: Some(TemplateNetwork::None), ..web(4) };
    lab.submit(&create::<App>(Some("default"), "out", out)).unwrap();
    lab.pass();
    assert_eq!(hosts(&lab, "out").len(), 2, "what has none is anywhere");

    // Where some can, it waits for those, and says what to do.
    lab.submit(&intent("hosts", None, "zone-a-2", Change::Patch { patch: json!({"spec": {"cordoned": true}}) }))
        .unwrap();
    lab.pass();
    lab.plain("waits", 1);
    let why = lab.instances("waits")[0].status.message.clone();
    assert!(why.contains("1 without tenants' networks") && why.contains("zone-a-1: making the tunnel"), "{why}");
    assert!(why.contains("network: none"), "{why}");

    // Where none can, one's agent of an older release, nothing that nobody asked for keeps it from running, and it says so.
    lab.strangers.insert(name("zone-a-2"));
    lab.pass();
    lab.submit(&intent("hosts", None, "zone-a-2", Change::Patch { patch: json!({"spec": {"cordoned": false}}) }))
        .unwrap();
    lab.pass();
    lab.plain("bare", 1);
    for app in ["waits", "bare"] {
        assert_eq!((lab.nics_of(app).len(), hosts(&lab, app).contains(&None)), (0, false), "{app}");
    }
    let said: Vec<String> = lab.events("NoDefaultNetwork");
    assert!(said.len() == 2 && said.iter().all(|s| s.contains("no host here can have tenants' networks")), "{said:?}");
    let asked = AppSpec { network: Some(TemplateNetwork::Default), ..web(1) };
    lab.submit(&create::<App>(Some("default"), "asked", asked)).unwrap();
    lab.pass();
    assert_eq!(hosts(&lab, "asked"), [None].into(), "what is asked for is waited for");
    // Hosts that can again take what waits.
    lab.trouble("zone-a-1", "");
    assert_eq!(hosts(&lab, "asked"), [Some(name("zone-a-1"))].into());
}

/// How the last host goes that could have tenants' networks.
#[derive(Debug, Clone, Copy)]
enum Loss {
    Trouble,
    Death,
    Deletion,
}

#[test]
fn an_implied_nic_that_no_living_host_can_have_is_taken_back() {
    for loss in [Loss::Trouble, Loss::Death, Loss::Deletion] {
        let mut lab = Lab::new(&[("zone-a", 2)]);
        lab.trouble("zone-a-2", "Operation not supported");
        let cordoned = Change::Patch { patch: json!({"spec": {"cordoned": true}}) };
        lab.submit(&intent("hosts", None, "zone-a-1", cordoned)).unwrap();
        lab.pass();
        lab.plain("implied", 3);
        let asked = AppSpec { network: Some(TemplateNetwork::Default), ..web(1) };
        lab.submit(&create::<App>(Some("default"), "asked", asked)).unwrap();
        lab.app("named", 1, json!([{"subnet": "default"}]));
        let own = lab.instances("implied")[0].metadata.name.clone();
        lab.make("nics", "own", json!({"subnet": "default", "instance": own})).unwrap();
        lab.pass();
        let waits = |lab: &Lab, app: &str| lab.instances(app).iter().all(|i| i.status.host.is_none());
        let nics = |lab: &Lab| ["implied", "asked", "named"].map(|app| lab.nics_of(app).len());
        assert!(["implied", "asked", "named"].iter().all(|app| waits(&lab, app)), "there is hope");
        assert_eq!(nics(&lab), [4, 1, 1]);

        let lost = name("zone-a-1");
        match loss {
            Loss::Trouble => lab.trouble("zone-a-1", "no VXLAN any more"),
            Loss::Death | Loss::Deletion => drop(lab.hosts.remove(&lost)),
        }
        let state = |lab: &Lab| lab.core.world.host(&lost).map(|host| host.status.state);
        let until = match loss {
            Loss::Trouble => HostState::Ready,
            Loss::Death => HostState::Dead,
            Loss::Deletion => HostState::Suspect,
        };
        for _ in 0..20 {
            if state(&lab) == Some(until) {
                break;
            }
            lab.at += Duration::from_millis(500);
            lab.report(&name("zone-a-2"));
            lab.with(|core, at| core.tick(at));
        }
        assert_eq!(state(&lab), Some(until), "{loss:?}");
        if let Loss::Deletion = loss {
            assert!(waits(&lab, "implied"), "who is silent for a moment comes back");
            lab.submit(&intent("hosts", None, "zone-a-1", Change::Delete)).unwrap();
        }
        lab.pass();
        for i in lab.instances("implied") {
            assert_eq!((&i.status.host, i.spec.implied_nic), (&Some(name("zone-a-2")), false), "{loss:?}");
            assert!(i.spec.template.nics.is_empty());
        }
        assert_eq!(lab.events("NoDefaultNetwork").len(), 3, "each says so");
        assert!(waits(&lab, "asked") && waits(&lab, "named"), "what is asked for is waited for");
        assert_eq!(nics(&lab), [1, 1, 1], "what a user has given an instance stays its own");
        assert_eq!(lab.nic("own").spec.instance, Some(own));

        // What comes now gets none, and where one can again it does.
        lab.plain("later", 1);
        assert_eq!((lab.nics_of("later").len(), waits(&lab, "later")), (0, false));
        let capacity =
            Capacity { cpu: MilliCpu(64_000), memory: Bytes(64 << 30), scratch: Bytes(64 << 30), instances: 200 };
        lab.hosts.insert(name("zone-a-3"), common::host("zone-a", ANY_CELL, 3, capacity));
        lab.pass();
        lab.plain("again", 1);
        assert_eq!(nics(&lab), [1, 1, 1]);
        assert_eq!((lab.nics_of("again").len(), waits(&lab, "again")), (1, false));
        assert!(!waits(&lab, "asked") && !waits(&lab, "named"));
    }
}

#[test]
fn what_waits_without_its_implied_nic_has_it_again_where_a_host_can() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    let cordon = |cordoned: bool| Change::Patch { patch: json!({"spec": {"cordoned": cordoned}}) };
    lab.submit(&intent("hosts", None, "zone-a-1", cordon(true))).unwrap();
    lab.pass();
    lab.plain("web", 2);
    lab.trouble("zone-a-1", "Operation not supported");
    assert_eq!((lab.count(), lab.events("NoDefaultNetwork").len()), ([1, 1, 1], 0), "{:?}", lab.nics());
    lab.trouble("zone-a-1", "");
    lab.submit(&intent("hosts", None, "zone-a-1", cordon(false))).unwrap();
    lab.pass();
    assert_eq!(lab.count(), [1, 1, 2]);
    assert!(lab.instances("web").iter().all(|i| i.status.host.is_some() && i.spec.implied_nic));
}
