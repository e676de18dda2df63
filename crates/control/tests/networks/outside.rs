//! What leads from a network to others, outside and to its instances: routes, peerings, gateways, floating addresses, load
//! balancers and names.

use nexus_model::kind::TargetTrouble;
use nexus_model::plan::{BalancedProtocol, Direction, FailingTarget, HostReport, RecordData, Via};

use super::*;

impl Lab {
    /// A network with a subnet that has a route table, and an app of one instance in it.
    fn with_routes(&mut self) {
        self.network("shop", "web");
        self.make("route-tables", "out", json!({"network": "shop"})).unwrap();
        self.patch("subnets", "web", json!({"routeTable": "out"})).unwrap();
        self.app("front", 1, json!([{"subnet": "web"}]));
    }

    fn routes(&mut self, routes: Value) -> Result<Accepted, ApiError> {
        self.patch("route-tables", "out", json!({ "routes": routes }))
    }
}

#[test]
fn routes_lead_to_what_is_there_and_never_in_a_circle() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.with_routes();
    let via = |via: Value| json!([{"to": "0.0.0.0/0", "via": via}]);
    refused(lab.routes(via(json!("internet"))), Code::Invalid, "has no internet gateway");
    refused(lab.routes(via(json!({"nat": "n"}))), Code::Invalid, "no NAT gateway n");
    refused(lab.routes(via(json!({"peering": "p"}))), Code::Invalid, "no peering p");
    refused(lab.routes(via(json!({"nic": "gw"}))), Code::Invalid, "no nic gw");
    lab.make("nics", "gw", json!({"subnet": "web"})).unwrap();
    refused(lab.routes(via(json!({"nic": "gw"}))), Code::Invalid, "does not forward");
    lab.patch("nics", "gw", json!({"forwards": true})).unwrap();
    // Its own subnet would send the packet back to it.
    refused(lab.routes(via(json!({"nic": "gw"}))), Code::Invalid, "goes in a circle: nic gw, then nic gw again");
    let inside = json!([{"to": "10.0.9.0/24", "via": "blackhole"}]);
    refused(lab.routes(inside), Code::Invalid, "is within network shop");
    lab.make("subnets", "dmz", json!({"network": "shop", "cidr4": "10.0.2.0/24"})).unwrap();
    lab.make("nics", "fw", json!({"subnet": "dmz", "forwards": true})).unwrap();
    lab.routes(via(json!({"nic": "fw"}))).unwrap();
    refused(lab.patch("subnets", "dmz", json!({"routeTable": "out"})), Code::Invalid, "in a circle");
    refused(lab.delete("nics", "fw"), Code::Conflict, "route table out");
    refused(lab.patch("nics", "fw", json!({"forwards": false})), Code::Conflict, "route table out");
    let told = lab.told("zone-a-1");
    let plan = &told.networks[0];
    let fw = lab.nic("fw").metadata.uid;
    let web = plan.subnets.iter().find(|s| s.name == *"web").unwrap();
    assert_eq!(plan.route_tables[web.route_table as usize].routes[0].via, Via::Nic(fw));
    let dmz = plan.subnets.iter().find(|s| s.name == *"dmz").unwrap();
    assert_eq!(plan.route_tables[dmz.route_table as usize].routes, []);
    // Gateways.
    lab.make("nat-gateways", "nat", json!({"network": "shop"})).unwrap();
    lab.make("internet-gateways", "door", json!({"network": "shop"})).unwrap();
    refused(lab.make("internet-gateways", "two", json!({"network": "shop"})), Code::Conflict, "internet gateway door");
    let both = json!([{"to": "0.0.0.0/0", "via": {"nat": "nat"}}, {"to": "192.0.2.0/24", "via": "internet"}]);
    lab.routes(both).unwrap();
    let plan = &lab.told("zone-a-1").networks[0];
    let vias: Vec<Via> = plan.route_tables[1].routes.iter().map(|r| r.via).collect();
    assert_eq!((vias, plan.nats.len()), (vec![Via::Nat(0), Via::Internet], 1));
    refused(lab.delete("nat-gateways", "nat"), Code::Conflict, "route table out");
    refused(lab.delete("internet-gateways", "door"), Code::Conflict, "route table out");
    refused(lab.delete("route-tables", "out"), Code::Conflict, "subnet web");
    refused(lab.delete("networks", "shop"), Code::Conflict, "subnet dmz, subnet web, route table out");
}

#[test]
fn a_peering_opens_when_both_sides_ask_for_it_and_no_address_is_in_both() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.make("networks", "data", json!({"cidrs": ["10.1.0.0/16", "10.2.0.0/16"]})).unwrap();
    lab.make("networks", "same", json!({"cidrs": ["10.0.128.0/24"]})).unwrap();
    lab.app("front", 1, json!([{"subnet": "web"}]));
    let peering = |network: &str, peer: &str| json!({"network": network, "peerNetwork": peer});
    refused(lab.make("peerings", "x", peering("shop", "same")), Code::Conflict, "overlaps");
    refused(lab.make("peerings", "x", peering("shop", "shop")), Code::Invalid, "with itself");
    lab.make("peerings", "to-data", peering("shop", "data")).unwrap();
    let status =
        |lab: &Lab| lab.core.world.peerings.get(Some(&name("default")), &name("to-data")).unwrap().status.clone();
    assert!(status(&lab).phase == PeeringPhase::Pending && status(&lab).message.contains("the other side"));
    assert_eq!(lab.told("zone-a-1").networks.len(), 1);
    let back = json!({"network": "data", "peerNetwork": "shop", "cidrs": ["10.0.0.0/24"]});
    lab.make("peerings", "to-shop", back).unwrap();
    assert_eq!(status(&lab).phase, PeeringPhase::Ready);
    let told = lab.told("zone-a-1");
    let plan = |network: &str| told.networks.iter().find(|n| n.name == *network).unwrap();
    let (shop, data) = (plan("shop"), plan("data"));
    assert_eq!((shop.peerings[0].network, data.peerings[0].network), (data.uid, shop.uid));
    assert_eq!(shop.peerings[0].uid, data.peerings[0].uid);
    assert_eq!(shop.peerings[0].cidrs, data.cidrs);
    assert_eq!(data.peerings[0].cidrs, ["10.0.0.0/24".parse().unwrap()]);
    // What would overlap now is refused, also by a third.
    refused(lab.patch("networks", "data", json!({"cidrs": ["10.0.0.0/15"]})), Code::Conflict, "of peering to-shop");
    lab.make("networks", "third", json!({"cidrs": ["10.1.2.0/24"]})).unwrap();
    refused(lab.make("peerings", "x", peering("shop", "third")), Code::Conflict, "of peering to-data");
    refused(lab.delete("networks", "data"), Code::Conflict, "peering to-shop");
    lab.delete("peerings", "to-shop").unwrap();
    assert_eq!(status(&lab).phase, PeeringPhase::Pending);
    assert_eq!(lab.told("zone-a-1").networks.len(), 1);
    lab.delete("networks", "data").unwrap();
    lab.pass();
}

#[test]
fn a_floating_address_leads_to_one_nic_and_is_free_when_all_hosts_have_confirmed() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.app("front", 1, json!([{"subnet": "web"}]));
    let pool =
        |cidr: &str| create::<AddressPool>(None, "public", AddressPoolSpec { cidrs: vec![cidr.parse().unwrap()] });
    lab.submit(&pool("203.0.113.0/31")).unwrap();
    lab.make("nics", "door", json!({"subnet": "web"})).unwrap();
    let floating = |nic: &str| json!({"pool": "public", "nic": nic});
    refused(lab.make("floating-ips", "a", floating("door")), Code::Invalid, "has no internet gateway");
    lab.make("internet-gateways", "igw", json!({"network": "shop"})).unwrap();
    lab.make("floating-ips", "a", floating("door")).unwrap();
    refused(lab.make("floating-ips", "b", floating("door")), Code::Conflict, "has floating ip a");
    lab.make("floating-ips", "b", json!({"pool": "public"})).unwrap();
    refused(lab.make("floating-ips", "c", json!({"pool": "public"})), Code::QuotaExceeded, "no free address");
    let plan = &lab.told("zone-a-1").networks[0];
    let uid = lab.nic("door").metadata.uid;
    assert_eq!((plan.floating[0].address.to_string().as_str(), plan.floating[0].nic), ("203.0.113.0", uid));
    assert_eq!(plan.floating.len(), 1);
    refused(lab.delete("nics", "door"), Code::Conflict, "floating ip a");
    refused(lab.delete("internet-gateways", "igw"), Code::Conflict, "floating ip a");
    refused(lab.submit(&intent("address-pools", None, "public", Change::Delete)), Code::Conflict, "default/a");
    lab.behind.insert(name("zone-a-1"), lab.revision);
    lab.delete("floating-ips", "a").unwrap();
    lab.pass();
    let fixed = json!({"pool": "public", "address": "203.0.113.0"});
    refused(lab.make("floating-ips", "c", fixed.clone()), Code::Conflict, "is in use");
    lab.behind.clear();
    lab.pass();
    lab.make("floating-ips", "c", fixed).unwrap();
    lab.pass();
}

#[test]
fn a_load_balancer_and_a_zone_go_by_the_instances_that_are_ready() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.app("front", 3, json!([{"subnet": "web"}]));
    let to = json!([{"to": {"app": "front"}, "port": 8080, "weight": 3}]);
    let spec = json!({"subnet": "web", "listeners": [{"port": 80, "sourceHash": true, "targets": to}]});
    lab.make("load-balancers", "front", spec).unwrap();
    lab.make(
        "dns-zones",
        "shop",
        json!({"network": "shop", "domain": "shop.example", "records": [
            {"name": "db", "data": {"cname": "db.example.com"}}
        ]}),
    )
    .unwrap();
    refused(
        lab.make("dns-zones", "two", json!({"network": "shop", "domain": "shop.example"})),
        Code::Conflict,
        "DNS zone shop",
    );
    let plan = lab.told("zone-a-1").networks[0].clone();
    let balancer = &plan.balancers[0];
    assert_eq!(balancer.address.to_string(), "10.0.1.5");
    assert_eq!(balancer.listeners[0].targets.len(), 3);
    assert!(balancer.listeners[0].source_hash && balancer.listeners[0].targets.iter().all(|t| t.port == 8080));
    let named = |plan: &nexus_model::plan::NetworkPlan, name: &str| {
        let found = plan.zones[0].records.iter().find(|r| r.name == name);
        found.map(|r| r.data.clone())
    };
    assert_eq!(named(&plan, "db"), Some(RecordData::Cname("db.example.com".into())));
    let Some(RecordData::A(all)) = named(&plan, "front") else { panic!("{:?}", plan.zones) };
    assert_eq!(all.len(), 3);
    let (instance, host) = {
        let i = lab.instances("front")[0];
        (i.metadata.name.to_string(), i.status.host.clone().unwrap())
    };
    assert!(matches!(named(&plan, &instance), Some(RecordData::A(one)) if one.len() == 1));
    // One that is not ready gets no new connections.
    let runs = lab.core.world.instances_on(&host);
    let mut report = common::report(&host, lab.hosts[&host].clone(), lab.revision, runs);
    report.instances.iter_mut().take(1).for_each(|i| i.ready = false);
    lab.with(|core, at| core.report(&report, at)).unwrap();
    let plan = lab.told("zone-a-1").networks[0].clone();
    assert_eq!(plan.balancers[0].listeners[0].targets.len(), 2);
    assert!(matches!(named(&plan, "front"), Some(RecordData::A(two)) if two.len() == 2));
    refused(lab.delete("subnets", "web"), Code::Conflict, "load balancer front");
    lab.delete("load-balancers", "front").unwrap();
    lab.pass();
    assert_eq!(lab.core.world.load_balancers.all().count(), 0);
}

#[test]
fn a_load_balancers_check_is_told_to_hosts_and_has_bounds() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.app("front", 1, json!([{"subnet": "web"}]));
    let spec = |protocol: &str, check: serde_json::Value| {
        let to = json!([{"to": {"app": "front"}, "port": 8080}]);
        let listener = json!({"port": 80, "protocol": protocol, "targets": to, "check": check});
        json!({"subnet": "web", "listeners": [listener]})
    };
    for (protocol, check, why) in [
        ("tcp", json!({"intervalSeconds": 0}), "check.intervalSeconds"),
        ("tcp", json!({"timeoutSeconds": 61}), "check.timeoutSeconds"),
        ("tcp", json!({"failures": 0}), "check.failures"),
        ("tcp", json!({"successes": 11}), "check.successes"),
        ("tcp", json!({"port": 0}), "check.port"),
        ("udp", json!({}), "name it"),
        ("tcp", json!({"http": {"path": "no"}}), "check.http.path"),
        ("tcp", json!({"http": {"path": "/a b"}}), "check.http.path"),
        ("tcp", json!({"http": {"path": "/", "status": 99}}), "check.http.status"),
        ("tcp", json!({"proxyProtocol": true}), "proxyProtocol"),
    ] {
        refused(lab.make("load-balancers", "front", spec(protocol, check)), Code::Invalid, why);
    }
    lab.make("load-balancers", "front", spec("udp", json!({"port": 8081}))).unwrap();
    let told = |lab: &Lab| lab.told("zone-a-1").networks[0].balancers[0].listeners[0].check.clone().unwrap();
    let check = told(&lab);
    let usual = (check.interval_seconds, check.timeout_seconds, check.failures, check.successes);
    assert_eq!((check.port, check.http, usual), (Some(8081), None, (5, 2, 3, 2)));
    let http = json!({"http": {"path": "/healthz", "status": 204}, "intervalSeconds": 1});
    lab.patch("load-balancers", "front", spec("tcp", http)).unwrap();
    assert_eq!(told(&lab).http.unwrap().status, Some(204));
}

#[test]
fn what_hosts_say_of_a_balancers_targets_is_shown_and_their_silence_takes_it_back() {
    let mut lab = Lab::new(&[("zone-a", 2)]);
    lab.network("shop", "web");
    lab.app("front", 3, json!([{"subnet": "web"}]));
    let to = json!([{"to": {"app": "front"}, "port": 8080}]);
    let spec = json!({"subnet": "web", "listeners": [{"port": 80, "targets": to, "check": {}}]});
    lab.make("load-balancers", "front", spec).unwrap();
    lab.pass();
    let status =
        |lab: &Lab| lab.core.world.load_balancers.get(Some(&name("default")), &name("front")).unwrap().status.clone();
    let counts = |lab: &Lab| (status(lab).healthy_targets.unwrap(), status(lab).targets.unwrap());
    assert_eq!((counts(&lab), status(&lab).out.len()), ((3, 3), 0));
    let told = lab.told("zone-a-1").networks[0].clone();
    let target = told.balancers[0].listeners[0].targets[0].clone();
    let failing = FailingTarget {
        balancer: told.balancers[0].uid,
        port: 80,
        protocol: BalancedProtocol::Tcp,
        target: (target.address, target.port).into(),
        why: "GET / answers 500".into(),
    };
    let say = |lab: &mut Lab, host: &str, failing: Vec<FailingTarget>| {
        let host = name(host);
        let runs = lab.core.world.instances_on(&host);
        let report = common::report(&host, lab.hosts[&host].clone(), lab.revision, runs);
        let report = HostReport { failing: Some(failing), ..report };
        lab.with(|core, at| core.report(&report, at)).unwrap();
        lab.pass();
    };
    // Nobody is told anew of what only is said.
    let before = lab.told("zone-a-1");
    say(&mut lab, "zone-a-1", vec![failing.clone()]);
    say(&mut lab, "zone-a-2", vec![failing.clone()]);
    assert_eq!(counts(&lab), (2, 3));
    let out = status(&lab).out[0].clone();
    assert_eq!((out.address, out.target_port, out.hosts), (target.address, 8080, 2));
    assert_eq!((out.message.as_str(), out.reason), ("GET / answers 500", TargetTrouble::Failing));
    assert!(status(&lab).conditions[0].message.contains("1 of 3 are out: 10.0.1."), "{:?}", status(&lab).conditions);
    assert_eq!(lab.told("zone-a-1").networks, before.networks);
    // A new leader has heard nobody and takes nothing back; one host says that it is well.
    lab.core.forget_what_was_said();
    lab.pass();
    assert_eq!((counts(&lab), status(&lab).out[0].hosts), ((2, 3), 2));
    for _ in 0..5 {
        say(&mut lab, "zone-a-1", vec![]);
        say(&mut lab, "zone-a-2", vec![failing.clone()]);
    }
    assert_eq!((counts(&lab), status(&lab).out[0].hosts), ((2, 3), 1));
    // Its word ends with it, some time after.
    for _ in 0..9 {
        lab.pass();
    }
    assert_eq!((counts(&lab), status(&lab).out.len()), ((3, 3), 0));
    // One that is not ready is out without anybody's word.
    let (host, uid) = {
        let i = lab.instances("front")[0];
        (i.status.host.clone().unwrap(), i.metadata.uid)
    };
    let mut report = common::report(&host, lab.hosts[&host].clone(), lab.revision, lab.core.world.instances_on(&host));
    report.instances.iter_mut().filter(|i| i.uid == uid).for_each(|i| i.ready = false);
    lab.at += Duration::from_secs(1);
    lab.with(|core, at| core.report(&report, at)).unwrap();
    lab.with(|core, at| core.tick(at));
    assert_eq!((counts(&lab), status(&lab).out[0].reason), ((2, 3), TargetTrouble::NotReady));
}

#[test]
fn a_prefix_list_is_told_as_what_is_in_it() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.app("front", 1, json!([{"subnet": "web"}]));
    let rules = json!([{"id": "in", "direction": "ingress", "remotes": [{"prefixList": "office"}]}]);
    let group = json!({"network": "shop", "rules": rules});
    refused(lab.make("security-groups", "web", group.clone()), Code::Invalid, "no prefix list office");
    lab.make("prefix-lists", "office", json!({"cidrs": ["192.0.2.0/24", "2001:db8::/32"]})).unwrap();
    lab.make("security-groups", "web", group).unwrap();
    refused(lab.delete("prefix-lists", "office"), Code::Conflict, "security group web");
    let rules = |lab: &Lab| lab.told("zone-a-1").networks[0].groups[1].rules.clone();
    assert_eq!((rules(&lab)[0].remotes.len(), rules(&lab)[0].direction), (2, Direction::Ingress));
    // Nobody is in an empty one; a rule about nobody is none about everybody.
    lab.patch("prefix-lists", "office", json!({"cidrs": []})).unwrap();
    assert_eq!(rules(&lab), []);
}
