//! Tenants' networks as the writer sees them: who gets which address and when it is free again, what may not be written or
//! deleted, and what hosts are told.

#[path = "../common/mod.rs"]
mod common;
mod default;
mod outside;
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use common::{create, image, intent, name, web};
use nexus_control::cells::Cells;
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Intent};
use nexus_control::view::host_networks;
use nexus_control::world::World;
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::plan::{HostNetworks, NicPlan};
use nexus_model::{ApiError, Bytes, Code, MilliCpu, Name, Object, Timestamp, Uid};
use nexus_store::{KeyValue, Revision};
use serde_json::{Value, json};

/// A region whose hosts run what they are told, and a copy of its rows as a view has it.
struct Lab {
    core: Core,
    rng: SeededRng,
    at: Duration,
    revision: u64,
    hosts: BTreeMap<Name, HostSpec>,
    /// Hosts that have not applied what they were told of networks since this revision.
    behind: BTreeMap<Name, u64>,
    /// Hosts whose agents know nothing of tenants' networks.
    strangers: BTreeSet<Name>,
    copy: World,
}

impl Lab {
    fn new(zones: &[(&str, u8)]) -> Self {
        let names = zones.iter().map(|(zone, _)| name(zone)).collect();
        let bootstrap =
            Bootstrap { region: name("local"), domain: "localhost".into(), zones: names, cells: Vec::new() };
        let core = Core::new(World::default(), bootstrap, Cells::new(Duration::ZERO, "server-a".into(), 1));
        let (hosts, behind, strangers, copy) = Default::default();
        let (rng, at) = (SeededRng::new(7), Duration::ZERO);
        let mut lab = Self { core, rng, at, revision: 0, hosts, behind, strangers, copy };
        lab.with(|core, at| core.bootstrap(at));
        lab.submit(&create::<Image>(Some("default"), "web", image("web"))).unwrap();
        let capacity =
            Capacity { cpu: MilliCpu(64_000), memory: Bytes(64 << 30), scratch: Bytes(64 << 30), instances: 200 };
        for (zone, hosts) in zones {
            for n in 1..=*hosts {
                let number = u8::try_from(lab.hosts.len() + 1).unwrap();
                let host = name(&format!("{zone}-{n}"));
                lab.hosts.insert(host.clone(), common::host(zone, ANY_CELL, number, capacity));
                lab.report(&host);
            }
        }
        lab.pass();
        lab
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let now = Timestamp::from_millis(1_000_000 + i64::try_from(self.at.as_millis()).unwrap());
        let at = Moment { now, monotonic: self.at, rng: &self.rng };
        let answer = f(&mut self.core, at);
        for _ in 0..200 {
            if !self.core.reconcile(at) {
                break;
            }
        }
        for pack in self.core.take_packs() {
            assert!(pack.ops.len() <= 126, "{} operations", pack.ops.len());
            self.revision += 1;
            for (key, value) in &pack.ops {
                match value {
                    None => self.copy.leave_out(key),
                    Some(value) if key.starts_with("o/") || key.starts_with("t/") => {
                        let kv = KeyValue {
                            key: key.clone().into(),
                            value: value.clone(),
                            create_revision: Revision(self.revision),
                            mod_revision: Revision(self.revision),
                        };
                        self.copy.take_in(&kv).unwrap();
                    }
                    Some(_) => {}
                }
            }
            self.core.committed(&pack, self.revision);
        }
        answer
    }

    fn report(&mut self, host: &Name) {
        let runs = self.core.world.instances_on(host).filter(|i| i.metadata.deleting.is_none());
        let mut report = common::report(host, self.hosts[host].clone(), self.revision, runs);
        let applied = self.behind.get(host).copied().unwrap_or(self.revision);
        report.networks = (!self.strangers.contains(host)).then_some(applied);
        self.with(|core, at| core.report(&report, at)).unwrap();
    }

    /// Some time, in which hosts do what they are told.
    fn pass(&mut self) {
        for _ in 0..4 {
            self.at += Duration::from_millis(500);
            for host in self.hosts.keys().cloned().collect::<Vec<_>>() {
                self.report(&host);
            }
            self.with(|core, at| core.tick(at));
        }
        assert_eq!(self.core.check_invariants(), Vec::<String>::new());
    }

    fn submit(&mut self, intent: &Intent) -> Result<Accepted, ApiError> {
        self.with(|core, at| core.intent(intent, at))
    }

    /// As the API does: specs are parsed strictly before.
    fn make(&mut self, plural: &str, object: &str, spec: Value) -> Result<Accepted, ApiError> {
        let kind = nexus_model::kind::find(plural).unwrap();
        let spec = (kind.parse_spec)(&spec).map_err(ApiError::invalid)?;
        let mut blank = create::<Zone>(Some("default"), object, ZoneSpec::default());
        let Change::Create { object: any } = &mut blank.change else { unreachable!() };
        (any.kind, any.spec) = (kind.kind.into(), spec);
        let change = blank.change;
        self.submit(&intent(kind.plural, Some("default"), object, change))
    }

    fn patch(&mut self, plural: &str, object: &str, spec: Value) -> Result<Accepted, ApiError> {
        self.submit(&intent(plural, Some("default"), object, Change::Patch { patch: json!({ "spec": spec }) }))
    }

    fn delete(&mut self, plural: &str, object: &str) -> Result<Accepted, ApiError> {
        self.submit(&intent(plural, Some("default"), object, Change::Delete))
    }

    /// A network with a subnet of 13 addresses.
    fn network(&mut self, network: &str, subnet: &str) {
        self.make("networks", network, json!({"cidrs": ["10.0.0.0/16", "fd12:3456:789a::/48"]})).unwrap();
        self.make("subnets", subnet, json!({"network": network, "cidr4": "10.0.1.0/28"})).unwrap();
    }

    fn app(&mut self, app: &str, replicas: u32, nics: Value) {
        let spec = AppSpec { nics: serde_json::from_value(nics).unwrap(), ..web(replicas) };
        self.submit(&create::<App>(Some("default"), app, spec)).unwrap();
        self.pass();
    }

    fn instances(&self, app: &str) -> Vec<&Object<Instance>> {
        self.core.world.instances.live.values().filter(|i| i.spec.app == *app).collect()
    }

    fn nics(&self) -> Vec<&Object<Nic>> {
        self.core.world.nics.live.values().collect()
    }

    fn nic(&self, nic: &str) -> &Object<Nic> {
        self.core.world.nics.get(Some(&name("default")), &name(nic)).unwrap()
    }

    fn told(&self, host: &str) -> HostNetworks {
        host_networks(&self.copy, &name(host), self.revision)
    }

    fn plan(&self, host: &str, nic: Uid) -> NicPlan {
        let told = self.told(host);
        let mut nics = told.networks.iter().flat_map(|n| &n.nics);
        nics.find(|n| n.uid == nic).unwrap_or_else(|| panic!("{host} is not told of {nic}")).clone()
    }
}

fn four(text: &str) -> Option<Ipv4Addr> {
    Some(text.parse().unwrap())
}

fn refused(answer: Result<Accepted, ApiError>, code: Code, why: &str) {
    let error = answer.expect_err(why);
    let text = format!("{} {:?}", error.detail, error.errors);
    assert!(error.code == code && text.contains(why), "{why}: {:?} {text}", error.code);
}

#[test]
fn an_apps_instances_get_nics_that_go_with_them() {
    let mut lab = Lab::new(&[("zone-a", 2)]);
    lab.network("shop", "web");
    lab.app("front", 3, json!([{"subnet": "web", "rate": 1_000_000}]));
    let nics = lab.nics();
    assert_eq!(nics.len(), 3);
    let four: BTreeSet<_> = nics.iter().map(|n| n.status.address4.unwrap().to_string()).collect();
    assert_eq!(four.into_iter().collect::<Vec<_>>(), ["10.0.1.2", "10.0.1.3", "10.0.1.4"]);
    let macs: BTreeSet<_> = nics.iter().map(|n| n.status.mac.unwrap()).collect();
    assert_eq!(macs.len(), 3);
    assert!(macs.iter().all(|mac| mac.0[0] == 6));
    for instance in lab.instances("front") {
        let nic = lab.core.world.nics_of(instance.metadata.uid)[0];
        assert_eq!((nic.status.phase, nic.status.index), (NicPhase::Attached, Some(0)));
        assert_eq!(nic.status.host, instance.status.host);
        let host = instance.status.host.as_ref().unwrap();
        // Every host of the network knows where each NIC is.
        for told in ["zone-a-1", "zone-a-2"] {
            let at = lab.plan(told, nic.metadata.uid).at.unwrap();
            assert_eq!(
                (&at.host, at.instance, at.endpoint),
                (host, instance.metadata.uid, lab.hosts[host].address.ip())
            );
        }
    }
    let told = lab.told("zone-a-1");
    assert_eq!((told.networks.len(), told.tunnels.len()), (1, 1));
    let plan = &told.networks[0];
    assert!(plan.vni > 0 && plan.mtu == 1430, "{plan:?}");
    assert_eq!(plan.subnets[0].gateway4.unwrap().to_string(), "10.0.1.1");
    assert!(plan.nics.iter().all(|n| n.groups == [0] && n.rate == Some(1_000_000)));
    // An instance's NIC is nobody's to change or delete.
    let (nic, instance) = (nics[0].metadata.name.to_string(), nics[0].spec.instance.clone().unwrap().to_string());
    refused(lab.delete("nics", &nic), Code::Conflict, &instance);
    refused(lab.patch("nics", &nic, json!({"forwards": true})), Code::Conflict, "change its app");
    lab.delete("apps", "front").unwrap();
    lab.pass();
    assert_eq!(lab.core.world.nics.all().count(), 0);
    assert_eq!(lab.told("zone-a-1").networks.len(), 0);
}

#[test]
fn an_address_is_free_when_its_host_has_confirmed_that_it_is() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.app("one", 1, json!([{"subnet": "web"}]));
    assert_eq!(lab.nics()[0].status.address4, four("10.0.1.2"));
    // The host is gone quiet about networks: it says that the instance is gone, but not that the NIC is.
    lab.behind.insert(name("zone-a-1"), lab.revision);
    lab.delete("apps", "one").unwrap();
    lab.pass();
    assert_eq!((lab.instances("one").len(), lab.nics().len(), lab.core.world.nics.buried.len()), (0, 0, 1));
    refused(
        lab.make("nics", "mine", json!({"subnet": "web", "address4": "10.0.1.2"})),
        Code::Conflict,
        "10.0.1.2 is in use",
    );
    lab.make("nics", "other", json!({"subnet": "web"})).unwrap();
    assert_eq!(lab.nic("other").status.address4, four("10.0.1.3"));
    lab.behind.clear();
    lab.pass();
    lab.make("nics", "mine", json!({"subnet": "web", "address4": "10.0.1.2"})).unwrap();
    assert_eq!(lab.nic("mine").status.phase, NicPhase::Available);
    lab.pass();
}

#[test]
fn an_address_on_a_host_that_is_deleted_is_free() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.app("one", 1, json!([{"subnet": "web"}]));
    let spec = lab.hosts.remove(&name("zone-a-1")).unwrap();
    for _ in 0..60 {
        lab.at += Duration::from_millis(500);
        lab.with(|core, at| core.tick(at));
    }
    lab.submit(&intent("hosts", None, "zone-a-1", Change::Delete)).unwrap();
    lab.delete("apps", "one").unwrap();
    assert_eq!(lab.core.world.nics.all().count(), 0, "nobody is left to confirm it");
    lab.hosts.insert(name("zone-a-1"), spec);
    lab.pass();
}

#[test]
fn a_full_subnet_is_said_and_left_again() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.app("many", 14, json!([{"subnet": "web"}]));
    let waits = |lab: &Lab| -> Vec<String> {
        let all = lab.instances("many").into_iter().filter(|i| i.status.host.is_none());
        all.map(|i| i.status.message.clone()).collect()
    };
    assert_eq!(waits(&lab), ["subnet web has no free IPv4 address: 13 of 13 are in use"]);
    assert_eq!(lab.nics().len(), 13);
    // What goes makes room for what waits.
    let gone = lab.instances("many").iter().find(|i| i.status.host.is_some()).unwrap().metadata.name.to_string();
    lab.patch("apps", "many", json!({"replicas": 13})).unwrap();
    lab.pass();
    assert_eq!((waits(&lab).len(), lab.nics().len()), (0, 13));
    lab.delete("instances", &gone).ok();
    lab.pass();
    assert_eq!((waits(&lab).len(), lab.nics().len()), (0, 13));
}

#[test]
fn a_nic_is_given_to_an_instance_that_runs_and_taken_away() {
    let mut lab = Lab::new(&[("zone-a", 1), ("zone-b", 1)]);
    lab.network("shop", "web");
    lab.app("one", 1, json!([{"subnet": "web"}]));
    let (instance, host, zone) = {
        let i = lab.instances("one")[0];
        (i.metadata.name.to_string(), i.status.host.clone().unwrap().to_string(), i.status.zone.clone().unwrap())
    };
    refused(lab.make("nics", "x", json!({"subnet": "web", "instance": "nobody"})), Code::Invalid, "no instance nobody");
    lab.make("nics", "extra", json!({"subnet": "web", "address4": "10.0.1.9"})).unwrap();
    let uid = lab.nic("extra").metadata.uid;
    assert!(lab.plan(&host, uid).at.is_none());
    lab.patch("nics", "extra", json!({"instance": instance})).unwrap();
    let at = lab.plan(&host, uid).at.unwrap();
    assert_eq!((at.index, at.host.as_str()), (1, host.as_str()));
    assert_eq!(lab.nic("extra").status.phase, NicPhase::Attached);
    // Another zone's subnet is none of its.
    let elsewhere = if zone == *"zone-a" { "zone-b" } else { "zone-a" };
    let spec = json!({"network": "shop", "cidr4": "10.0.2.0/24", "zone": elsewhere});
    lab.make("subnets", "far", spec).unwrap();
    refused(lab.make("nics", "far", json!({"subnet": "far", "instance": instance})), Code::Invalid, "is of zone");
    // At most eight.
    for n in 2..8 {
        lab.make("nics", &format!("n{n}"), json!({"subnet": "web", "instance": instance})).unwrap();
        assert_eq!(lab.nic(&format!("n{n}")).status.index, Some(n));
    }
    refused(lab.make("nics", "n8", json!({"subnet": "web", "instance": instance})), Code::Invalid, "which is the most");
    // Taken away, its address is its own until it goes, and then until the host has confirmed.
    lab.pass();
    lab.behind.insert(name(&host), lab.revision);
    lab.patch("nics", "extra", json!({"instance": null})).unwrap();
    assert!(lab.plan(&host, uid).at.is_none());
    assert_eq!(lab.nic("extra").status.leaving, [name(&host)]);
    lab.delete("nics", "extra").unwrap();
    lab.pass();
    assert_eq!(lab.core.world.nics.buried.len(), 1);
    lab.behind.clear();
    lab.pass();
    assert_eq!(lab.core.world.nics.buried.len(), 0);
    // A NIC outlives the instance that had it.
    lab.delete("instances", &instance).unwrap();
    lab.pass();
    let left = lab.nic("n2");
    assert!(left.status.phase == NicPhase::Pending && left.status.message.contains(&instance), "{:?}", left.status);
}

#[test]
fn what_a_host_says_of_the_row_before_is_no_word_about_the_new_one() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.app("one", 1, json!([]));
    let instance = lab.instances("one")[0].metadata.name.to_string();
    lab.make("nics", "extra", json!({"subnet": "web", "instance": instance})).unwrap();
    lab.pass();
    let host = name("zone-a-1");
    let mut report = common::report(&host, lab.hosts[&host].clone(), lab.revision, lab.core.world.instances_on(&host));
    report.networks = Some(lab.revision);
    let patch = Change::Patch { patch: json!({"spec": {"instance": null}}) };
    let detach = intent("nics", Some("default"), "extra", patch);
    // Both in one round, before anything is committed.
    lab.with(|core, at| {
        core.intent(&detach, at).unwrap();
        while core.reconcile(at) {}
        core.report(&report, at).unwrap();
    });
    assert_eq!(lab.nic("extra").status.leaving, std::slice::from_ref(&host));
    lab.pass();
    assert_eq!(lab.nic("extra").status.leaving, Vec::<Name>::new());
    assert_eq!(lab.nic("extra").status.address4, four("10.0.1.2"));
}

#[test]
fn what_is_used_is_not_deleted_and_its_users_are_named() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.make("security-groups", "db", json!({"network": "shop", "rules": []})).unwrap();
    let rules = json!([{"id": "a", "direction": "ingress", "remotes": [{"group": "db"}, {"cidr": "192.0.2.0/24"}]}]);
    lab.make("security-groups", "web", json!({"network": "shop", "rules": rules})).unwrap();
    lab.app("front", 1, json!([{"subnet": "web", "securityGroups": ["web"]}]));
    lab.make("nics", "spare", json!({"subnet": "web", "securityGroups": ["db"]})).unwrap();
    refused(lab.delete("networks", "shop"), Code::Conflict, "subnet web, security group db, security group web");
    refused(lab.delete("subnets", "web"), Code::Conflict, "nic spare");
    refused(lab.delete("subnets", "web"), Code::Conflict, "app front");
    refused(lab.delete("security-groups", "db"), Code::Conflict, "nic spare, security group web");
    // What rules say, hosts are told by numbers.
    let plan = &lab.told("zone-a-1").networks[0];
    let at = |group: &str| plan.groups.iter().position(|g| g.name == *group).unwrap();
    let remotes = json!([{"group": at("db")}, {"cidr": "192.0.2.0/24"}]);
    assert_eq!(serde_json::to_value(&plan.groups[at("web")].rules[0].remotes).unwrap(), remotes);
    lab.delete("apps", "front").unwrap();
    lab.delete("nics", "spare").unwrap();
    lab.pass();
    for (plural, object) in
        [("security-groups", "web"), ("security-groups", "db"), ("subnets", "web"), ("networks", "shop")]
    {
        lab.delete(plural, object).unwrap();
    }
    lab.pass();
    assert_eq!(lab.core.world.networks.all().count(), 0);
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    lab.network("shop", "web");
    lab.network_of_another();
    let subnet = |four: &str| json!({"network": "shop", "cidr4": four});
    refused(lab.make("subnets", "a", subnet("10.0.1.0/24")), Code::Invalid, "overlaps 10.0.1.0/28 of subnet web");
    refused(lab.make("subnets", "a", subnet("10.1.0.0/24")), Code::Invalid, "is not within network shop");
    refused(lab.make("subnets", "a", json!({"network": "no", "cidr4": "10.0.0.0/24"})), Code::Invalid, "no network no");
    let zone = json!({"network": "shop", "cidr4": "10.0.9.0/24", "zone": "moon"});
    refused(lab.make("subnets", "a", zone), Code::Invalid, "no zone moon");
    refused(lab.patch("networks", "shop", json!({"cidrs": ["10.1.0.0/16"]})), Code::Conflict, "subnet web");
    let infra = json!({"cidrs": ["fd00:0:0:1::/64"]});
    refused(lab.make("networks", "bad", infra), Code::Invalid, "the cloud's own hosts");
    for (address, why) in
        [("10.0.1.1", "is none of subnet web's"), ("10.0.1.15", "is none of"), ("10.0.2.9", "is none of")]
    {
        refused(lab.make("nics", "a", json!({"subnet": "web", "address4": address})), Code::Invalid, why);
    }
    let group = json!({"subnet": "web", "securityGroups": ["other"]});
    refused(lab.make("nics", "a", group), Code::Invalid, "no security group other in network shop");
    let rules = json!([{"id": "a", "direction": "ingress", "remotes": [{"group": "other"}]}]);
    refused(
        lab.make("security-groups", "a", json!({"network": "shop", "rules": rules})),
        Code::Invalid,
        "no security group other",
    );
    // An app waits for what it names, and says so.
    lab.app("early", 1, json!([{"subnet": "later"}]));
    let ready = |lab: &Lab| {
        let app = lab.core.world.apps.get(Some(&name("default")), &name("early")).unwrap();
        app.status.conditions[0].reason.clone()
    };
    assert_eq!(ready(&lab), "SubnetNotFound");
    lab.make("subnets", "later", subnet("10.0.3.0/24")).unwrap();
    lab.pass();
    assert_eq!(ready(&lab), "AllReady");
}

impl Lab {
    fn network_of_another(&mut self) {
        self.make("networks", "lab", json!({"cidrs": ["10.0.0.0/16"]})).unwrap();
        self.make("security-groups", "other", json!({"network": "lab"})).unwrap();
    }
}

#[test]
fn networks_may_have_the_same_addresses_and_never_the_same_number() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    let mut numbers = BTreeSet::new();
    for n in 0..5 {
        lab.network(&format!("net-{n}"), &format!("sub-{n}"));
        lab.app(&format!("app-{n}"), 1, json!([{"subnet": format!("sub-{n}")}]));
        let network = lab.core.world.networks.get(Some(&name("default")), &name(&format!("net-{n}"))).unwrap();
        assert!(numbers.insert(network.status.vni));
    }
    assert!(lab.nics().iter().all(|n| n.status.address4 == four("10.0.1.2")));
    // A number is taken until every host has said that it knows of the end.
    lab.delete("apps", "app-0").unwrap();
    lab.pass();
    lab.behind.insert(name("zone-a-1"), lab.revision);
    lab.delete("subnets", "sub-0").unwrap();
    lab.delete("networks", "net-0").unwrap();
    lab.pass();
    assert_eq!(lab.core.world.networks.all().count(), 5);
    lab.behind.clear();
    lab.pass();
    assert_eq!(lab.core.world.networks.all().count(), 4);
}

#[test]
fn instances_go_to_the_zone_of_their_subnet() {
    let mut lab = Lab::new(&[("zone-a", 1), ("zone-b", 1)]);
    lab.make("networks", "shop", json!({"cidrs": ["10.0.0.0/16"]})).unwrap();
    lab.make("subnets", "b", json!({"network": "shop", "cidr4": "10.0.1.0/24", "zone": "zone-b"})).unwrap();
    lab.make("subnets", "a", json!({"network": "shop", "cidr4": "10.0.2.0/24", "zone": "zone-a"})).unwrap();
    lab.app("there", 4, json!([{"subnet": "b"}]));
    assert!(lab.instances("there").iter().all(|i| i.status.zone == Some(name("zone-b"))));
    lab.app("nowhere", 1, json!([{"subnet": "a"}, {"subnet": "b"}]));
    let waits = lab.instances("nowhere")[0];
    assert!(waits.status.host.is_none() && !waits.status.message.is_empty(), "{:?}", waits.status);
}

#[test]
fn a_writer_that_takes_over_goes_on_with_what_is_given_out() {
    let mut lab = Lab::new(&[("zone-a", 2)]);
    lab.network("shop", "web");
    lab.app("one", 4, json!([{"subnet": "web"}, {"subnet": "web"}]));
    lab.behind.extend([(name("zone-a-1"), lab.revision), (name("zone-a-2"), lab.revision)]);
    lab.delete("apps", "one").unwrap();
    lab.pass();
    assert_eq!(lab.core.world.nics.buried.len(), 8);
    // Its world is read from the rows, in the order of their keys.
    let world = std::mem::take(&mut lab.copy);
    let bootstrap =
        Bootstrap { region: name("local"), domain: "localhost".into(), zones: Vec::new(), cells: Vec::new() };
    lab.core = Core::new(world, bootstrap, Cells::new(lab.at, "server-b".into(), 2));
    lab.with(|core, at| core.bootstrap(at));
    lab.pass();
    lab.make("nics", "next", json!({"subnet": "web"})).unwrap();
    assert_eq!(lab.nic("next").status.address4, four("10.0.1.10"), "eight are held");
    lab.behind.clear();
    lab.pass();
    assert_eq!(lab.core.world.nics.all().count(), 1);
}

#[test]
fn a_deleted_project_takes_its_networks_with_it() {
    let mut lab = Lab::new(&[("zone-a", 1)]);
    let spec = ProjectSpec::default();
    lab.submit(&create::<Project>(None, "side", spec)).unwrap();
    let make = |lab: &mut Lab, intent: Intent| lab.submit(&intent).map(drop).unwrap();
    let side = Some("side");
    make(&mut lab, create::<Image>(side, "web", image("web")));
    make(&mut lab, create::<Network>(side, "shop", Network::example()));
    make(&mut lab, create::<Subnet>(side, "web", Subnet::example()));
    make(&mut lab, create::<SecurityGroup>(side, "web", SecurityGroup::example()));
    let nics = serde_json::from_value(json!([{"subnet": "web", "securityGroups": ["web"]}])).unwrap();
    make(&mut lab, create::<App>(side, "shop", AppSpec { nics, ..web(12) }));
    make(&mut lab, create::<Nic>(side, "extra", Nic::example()));
    lab.pass();
    assert_eq!(lab.nics().len(), 13);
    lab.submit(&intent("projects", None, "side", Change::Delete)).unwrap();
    for _ in 0..3 {
        lab.pass();
    }
    let w = &lab.core.world;
    assert_eq!((w.nics.all().count(), w.networks.all().count(), w.subnets.all().count()), (0, 0, 0));
    assert_eq!((w.security_groups.all().count(), w.projects.buried.len()), (0, 0));
}
