//! What an agent holds is what a server would tell it whole, whatever is changed, lost or begun anew on the way.

use std::collections::VecDeque;

use serde::de::DeserializeOwned;

use super::*;
use crate::plan::{PLAN_VERSION, PlanRequest};

/// SplitMix64, by Steele, Lea and Flood: the same seed, the same run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

fn uid(kind: u8, n: u32) -> Uid {
    let mut bytes = [kind; 16];
    bytes[..4].copy_from_slice(&n.to_be_bytes());
    Uid::from_random(bytes)
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn nic(n: u32, host: u32) -> NicPlan {
    let [_, b, c, d] = n.to_be_bytes();
    NicPlan {
        uid: uid(1, n),
        name: name(&format!("an-app-of-a-usual-name-{n}")),
        subnet: 0,
        mac: Mac([6, 0, 0, b, c, d]),
        address4: Some([10, b, c, d].into()),
        address6: Some(std::net::Ipv6Addr::from((0xfd12 << 112) | u128::from(n))),
        at: Some(NicPlace {
            host: name(&format!("host-{host}")),
            endpoint: [192, 0, 2, u8::try_from(host % 250).unwrap()].into(),
            instance: uid(2, n),
            index: 0,
        }),
        groups: vec![0],
        rate: None,
        forwards: false,
    }
}

fn network(n: u32, nics: u32) -> NetworkPlan {
    let group = |n: u32| GroupPlan { uid: uid(4, n), name: name(&format!("group-{n}")), rules: Vec::new() };
    let mut plan = NetworkPlan {
        uid: uid(3, n),
        project: name("shop"),
        name: name(&format!("net-{n}")),
        vni: n + 1,
        mtu: 1450,
        cidrs: vec!["10.0.0.0/8".parse().unwrap()],
        subnets: Vec::new(),
        nics: (0..nics).map(|n| nic(n, n % 50)).collect(),
        groups: (0..3).map(group).collect(),
        route_tables: Vec::new(),
        peerings: Vec::new(),
        nats: Vec::new(),
        floating: Vec::new(),
        balancers: Vec::new(),
        zones: vec![ZonePlan { domain: "internal".into(), records: Vec::new() }],
        flow_logs: FlowLogs::None,
    };
    name_all(&mut plan);
    plan
}

/// A record for each NIC, as zones have for instances.
fn name_all(plan: &mut NetworkPlan) {
    let record = |nic: &NicPlan| RecordPlan {
        name: nic.name.to_string(),
        ttl: 5,
        data: RecordData::A(nic.address4.into_iter().collect()),
    };
    let mut records: Vec<_> = plan.nics.iter().map(record).collect();
    records.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(zone) = plan.zones.first_mut() {
        zone.records = records;
    }
}

/// One change of any sort.
fn change(plan: &mut NetworkPlan, dice: &mut Dice) {
    let some = |dice: &mut Dice, len: usize| usize::try_from(dice.below(len as u64)).unwrap();
    match dice.below(9) {
        0..=2 => {
            let n = u32::try_from(dice.below(60)).unwrap();
            let new = nic(n, u32::try_from(dice.below(5)).unwrap());
            match plan.nics.binary_search_by_key(&new.uid, |n| n.uid) {
                Ok(at) => plan.nics[at] = new,
                Err(at) => plan.nics.insert(at, new),
            }
            name_all(plan);
        }
        3 | 4 if !plan.nics.is_empty() => {
            plan.nics.remove(some(dice, plan.nics.len()));
            name_all(plan);
        }
        5 => {
            let n = u32::try_from(dice.below(9)).unwrap();
            let group = GroupPlan { uid: uid(4, n), name: name(&format!("group-{n}")), rules: Vec::new() };
            let at = some(dice, plan.groups.len() + 1);
            plan.groups.insert(at, group);
        }
        6 if !plan.groups.is_empty() => drop(plan.groups.remove(some(dice, plan.groups.len()))),
        7 => {
            plan.mtu = 1400 + u16::try_from(dice.below(50)).unwrap();
            plan.subnets = vec![SubnetPlan {
                uid: uid(5, 1),
                name: name("web"),
                cidr4: Some("10.0.0.0/16".parse().unwrap()),
                cidr6: None,
                gateway4: None,
                gateway6: None,
                route_table: u32::from(plan.mtu),
            }];
        }
        _ => {
            plan.zones.reverse();
            if dice.one_in(2) {
                plan.zones.push(ZonePlan { domain: format!("z{}", dice.below(3)), records: Vec::new() });
            } else {
                plan.zones.pop();
            }
            name_all(plan);
        }
    }
}

/// A server's copy of a region with some networks, of which each host is told.
struct Server {
    revision: u64,
    versions: BTreeMap<Uid, Arc<NetworkVersion>>,
    tunnels: Vec<IpAddr>,
}

impl Server {
    fn new(networks: impl IntoIterator<Item = NetworkPlan>) -> Self {
        let versions = networks.into_iter().map(|n| (n.uid, NetworkVersion::after(None, n)));
        Self { revision: 1, versions: versions.collect(), tunnels: vec![[192, 0, 2, 9].into()] }
    }

    fn set(&mut self, plan: NetworkPlan) {
        self.revision += 1;
        let next = NetworkVersion::after(self.versions.get(&plan.uid), plan);
        self.versions.insert(next.plan().uid, next);
    }

    fn change(&mut self, network: Uid, change: impl FnOnce(&mut NetworkPlan)) {
        let mut plan = NetworkPlan::clone(self.versions[&network].plan());
        change(&mut plan);
        self.set(plan);
    }

    fn told(&self) -> HostVersions {
        let head = HostNetworks {
            version: PLAN_VERSION,
            host: name("host-1"),
            revision: self.revision,
            endpoint: [192, 0, 2, 1].into(),
            tunnels: self.tunnels.clone(),
            networks: Vec::new(),
        };
        HostVersions::new(head, self.versions.values().cloned().collect())
    }

    /// Another server, or this one after a restart: it knows no way from one plan to another.
    fn begun_anew(&self) -> Self {
        let plans = self.versions.values().map(|v| NetworkPlan::clone(v.plan()));
        let versions = plans.map(|plan| (plan.uid, NetworkVersion::after(None, plan))).collect();
        Self { revision: self.revision, versions, tunnels: self.tunnels.clone() }
    }
}

/// As it goes over the wire.
fn passed<A: Serialize, B: DeserializeOwned>(message: &A) -> B {
    serde_json::from_slice(&serde_json::to_vec(message).unwrap()).unwrap()
}

fn size(message: &NetworksMessage) -> usize {
    serde_json::to_vec(message).unwrap().len()
}

fn listen(listener: &mut Listener) -> Teller {
    Teller::new(passed(&listener.request()))
}

/// Everything that there is to be told, and how many bytes that took.
fn hear(listener: &mut Listener, teller: &mut Teller, server: &Server) -> usize {
    let mut bytes = 0;
    for message in teller.tell(&server.told()) {
        bytes += size(&message);
        listener.take(passed(&message)).unwrap();
    }
    assert_eq!(listener.held().map(|held| &**held), Some(server.told().whole()));
    bytes
}

#[test]
fn whatever_is_lost_or_begun_anew_an_agent_comes_to_hold_the_whole() {
    for seed in 0..150 {
        let mut dice = Dice(seed);
        let mut server = Server::new((0..2).map(|n| network(n, 40)));
        let mut listener = Listener::new(name("host-1"), None);
        let mut teller = listen(&mut listener);
        let mut coming = VecDeque::new();
        for _ in 0..120 {
            match dice.below(12) {
                0..=3 => {
                    let all: Vec<Uid> = server.versions.keys().copied().collect();
                    if let Some(which) = all.get(usize::try_from(dice.below(3)).unwrap()) {
                        server.change(*which, |plan| change(plan, &mut dice));
                    }
                }
                4 => {
                    let n = u32::try_from(dice.below(4)).unwrap();
                    server.set(network(n, u32::try_from(dice.below(9)).unwrap()));
                }
                5 if dice.one_in(2) => {
                    server.versions.pop_first();
                    server.revision += 1;
                }
                6 => {
                    server.tunnels.push([192, 0, 2, 10].into());
                    server.revision += 1;
                }
                7 if dice.one_in(3) => server = server.begun_anew(),
                8 if dice.one_in(2) => {
                    // The connection is lost with what was on it.
                    coming.clear();
                    teller = listen(&mut listener);
                }
                9 if dice.one_in(3) => {
                    // The agent begins anew with what is on its disk.
                    coming.clear();
                    listener = Listener::new(name("host-1"), listener.held().map(|held| Arc::new(passed(&**held))));
                    teller = listen(&mut listener);
                }
                _ => {
                    coming.extend(teller.tell(&server.told()));
                    for _ in 0..dice.below(3) {
                        let Some(message) = coming.pop_front() else { break };
                        listener.take(passed(&message)).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
                    }
                }
            }
        }
        for message in coming {
            listener.take(message).unwrap();
        }
        server.revision += 1;
        hear(&mut listener, &mut teller, &server);
    }
}

#[test]
fn one_nic_costs_what_it_takes_and_not_what_the_network_has() {
    let mut server = Server::new([network(0, 2_000)]);
    let mut listener = Listener::new(name("host-1"), None);
    let mut teller = listen(&mut listener);
    let whole = hear(&mut listener, &mut teller, &server);
    server.change(uid(3, 0), |plan| {
        plan.nics.push(nic(9_000, 3));
        name_all(plan);
    });
    let one = hear(&mut listener, &mut teller, &server);
    assert!(whole > 500_000 && one < 2_500, "{one} of {whole} bytes");
    // An agent that comes back finds the changes that it lacks; one that lacks none is told nothing of networks.
    let mut back = listen(&mut listener);
    server.revision += 1;
    assert!(hear(&mut listener, &mut back, &server) < 600);
    let mut back = listen(&mut listener);
    for n in 0..5 {
        server.change(uid(3, 0), |plan| plan.nics.push(nic(9_001 + n, 3)));
    }
    let five = hear(&mut listener, &mut back, &server);
    assert!(five < 8_000, "{five} bytes");
    // So does one whose server has begun anew, unless something has changed meanwhile.
    server = server.begun_anew();
    server.revision += 1;
    let mut back = listen(&mut listener);
    assert!(hear(&mut listener, &mut back, &server) < 600);
    let mut old = listen(&mut listener);
    server.change(uid(3, 0), |plan| drop(plan.nics.pop()));
    server = server.begun_anew();
    assert!(hear(&mut listener, &mut old, &server) > 500_000);
}

#[test]
fn what_is_too_large_for_a_message_comes_in_parts() {
    let server = Server::new([network(0, 30_000), network(1, 10)]);
    let mut listener = Listener::new(name("host-1"), None);
    let parts = listen(&mut listener).tell(&server.told());
    assert!(parts.len() > 2 && parts.iter().all(|p| size(p) < 6 << 20), "{} parts", parts.len());
    // Half of them are nothing.
    for part in parts.iter().take(2) {
        assert_eq!(listener.take(passed(part)), Ok(None));
    }
    assert_eq!(listener.held(), None);
    let mut teller = listen(&mut listener);
    hear(&mut listener, &mut teller, &server);
}

#[test]
fn a_change_that_comes_out_wrong_has_everything_told_anew() {
    let mut server = Server::new([network(0, 100)]);
    let mut listener = Listener::new(name("host-1"), None);
    let mut teller = listen(&mut listener);
    hear(&mut listener, &mut teller, &server);
    server.change(uid(3, 0), |plan| plan.nics.push(nic(9_000, 3)));
    let before = listener.held().cloned();
    let spoil = |message: &NetworksMessage, spoil: fn(&mut NetworkChange)| {
        let mut message: NetworksMessage = passed(message);
        for change in &mut message.news.as_mut().unwrap().changes {
            spoil(Arc::make_mut(change));
        }
        message
    };
    let address = |change: &mut NetworkChange| {
        for edit in &mut change.nics {
            if let Edit::Put(nics) = edit {
                nics[0].address4 = Some([10, 9, 9, 9].into());
            }
        }
    };
    let message = teller.tell(&server.told()).pop_front().unwrap();
    assert_eq!(listener.take(spoil(&message, address)), Err(NewsError::Network(uid(3, 0))));
    assert_eq!(listener.held(), before.as_ref(), "nothing of it is followed");
    let request = listener.request();
    assert!(request.have.as_ref().unwrap().is_empty() && request.known == Some(1), "{request:?}");
    let mut teller = Teller::new(request);
    hear(&mut listener, &mut teller, &server);
    assert!(!listener.request().have.unwrap().is_empty(), "all is well again");

    // One that leads beyond what is held, or to what is not, likewise.
    server.change(uid(3, 0), |plan| drop(plan.nics.pop()));
    let mut teller = listen(&mut listener);
    let message = teller.tell(&server.told()).pop_front().unwrap();
    let beyond = |change: &mut NetworkChange| change.nics = vec![Edit::Keep(4_000_000_000), Edit::Drop(1)];
    assert_eq!(listener.take(spoil(&message, beyond)), Err(NewsError::Foreign(uid(3, 0))));
    let mut fresh = Listener::new(name("host-1"), None);
    fresh.request();
    assert_eq!(fresh.take(passed(&message)), Err(NewsError::Unknown(uid(3, 0))));
    let mut teller = listen(&mut listener);
    hear(&mut listener, &mut teller, &server);

    // A network that was forgotten.
    server.set(network(1, 3));
    let mut message = teller.tell(&server.told()).pop_front().unwrap();
    message.news.as_mut().unwrap().changes.clear();
    assert_eq!(listener.take(message), Err(NewsError::Host));
    let mut teller = listen(&mut listener);
    hear(&mut listener, &mut teller, &server);
}

#[test]
fn a_server_that_writes_plans_in_another_way_is_believed() {
    let mut server = Server::new([network(0, 100)]);
    let mut listener = Listener::new(name("host-1"), None);
    // As if a later release hashed a field more, which this agent can't see.
    let other = |message: NetworksMessage| {
        let mut message = message;
        let news = message.news.as_mut().unwrap();
        for change in &mut news.changes {
            let change = Arc::make_mut(change);
            change.digest = change.digest.map(|d| Digest::of(d.hex().as_bytes()));
        }
        news.digest = Digest::of(news.digest.hex().as_bytes());
        message
    };
    let mut teller = listen(&mut listener);
    let message = teller.tell(&server.told()).pop_front().unwrap();
    assert_eq!(listener.take(other(message)), Err(NewsError::Network(uid(3, 0))));
    let mut teller = listen(&mut listener);
    let message = teller.tell(&server.told()).pop_front().unwrap();
    assert!(listener.take(other(message)).unwrap().is_some());
    for n in 0..3 {
        server.change(uid(3, 0), |plan| plan.nics.push(nic(9_000 + n, 3)));
        let message = teller.tell(&server.told()).pop_front().unwrap();
        assert!(size(&message) < 2_500);
        assert_eq!(listener.take(other(message)).unwrap().as_deref(), Some(server.told().whole()));
    }
}

#[test]
fn releases_that_know_no_changes_go_on_with_wholes() {
    let mut server = Server::new([network(0, 10), network(1, 1)]);
    // An old agent: it asks by another message, and reads another.
    let request: NetworksRequest = passed(&PlanRequest { host: name("host-1"), known: None });
    let mut teller = Teller::new(request);
    for n in 0..3 {
        server.change(uid(3, 0), |plan| plan.nics.push(nic(9_000 + n, 3)));
        let messages = teller.tell(&server.told());
        assert_eq!(messages.len(), 1);
        assert_eq!(passed::<_, HostNetworks>(&messages[0]), *server.told().whole());
    }
    assert!(teller.tell(&server.told()).is_empty(), "it has that revision");
    // An old server.
    let mut listener = Listener::new(name("host-1"), None);
    let request: PlanRequest = passed(&listener.request());
    assert_eq!((request.host, request.known), (name("host-1"), None));
    for _ in 0..2 {
        server.change(uid(3, 0), |plan| drop(plan.nics.pop()));
        listener.take(passed(server.told().whole())).unwrap().unwrap();
        assert_eq!(listener.held().map(|held| &**held), Some(server.told().whole()));
    }
    // What is older is nothing, and what a server of this release says then goes on from what is held.
    server.revision -= 1;
    assert_eq!(listener.take(passed(server.told().whole())), Ok(None));
    server.revision += 2;
    let mut teller = listen(&mut listener);
    assert!(hear(&mut listener, &mut teller, &server) < 600);
    let newer = NetworksMessage { version: PLAN_VERSION + 1, ..passed(server.told().whole()) };
    assert_eq!(listener.take(newer), Err(NewsError::Version(PLAN_VERSION + 1)));
}
