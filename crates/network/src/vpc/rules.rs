//! From a plan to a packet filter: what passes in a network's namespace.
//!
//! Everything is decided at NICs, on the host of the NIC: what it sends by the first host, what it is sent by the last.
//!
//! ```text
//! prerouting, raw   genuine    bears the NIC's own hardware address and own addresses
//! prerouting, nat   arrive     floating addresses to NICs, balancers to targets
//! prerouting        diverted   answers to the relay of PROXY listeners, if there are such
//! input             gateway    pings of the gateway, DHCP, router and neighbour discovery, and nothing else
//! forward           forward    by the link of arrival: sent → (egress rules) → received → (ingress rules)
//!                              from_tunnel, from_outside, from_peer0 … → received
//! output            relays     what that relay sends in clients' names: relayed → (egress rules) → received
//! postrouting, nat  leave      floating addresses, NAT, clients that are their own balancer's target, probes of targets
//! ```
//!
//! An answer to what was let through passes unseen. In the other direction a connection is looked at once for each generation of
//! the rules, which marks it: a rule that is taken away counts for open connections too, and how many there are for none. Whatever
//! crosses a peering on its way is held to the peering's networks and not to connections, for its answers may take another way. A
//! link that is not in the plan is silent.

mod groups;
mod host;
mod probes;
mod relays;
mod routes;
pub mod spans;
pub mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nexus_model::plan::{
    BalancedProtocol, BalancerPlan, Direction, FlowLogs, HostNetworks, ListenerPlan, NatPlan, NetworkPlan, NicPlan,
    PeeringPlan, RoutePlan, Via,
};

pub use groups::{Ranked, decides, merged};
pub use host::{TABLE as HOST_TABLE, host};
pub use relays::proxied;
pub use routes::{Way, way};
use table::{Act, Base, Family, Field, Hook, Key, MapTo, Rule, Share, Table, Target, Test, Value, Verdict, told};

use super::links;
pub use super::text::{host_text, network_text, shared_text};

/// The table in a network's namespace.
pub const TABLE: &str = "nexus";

/// Of a packet that leaves with a floating address of its own. NAT gateways are numbered from 1.
const FLOATING_MARK: u32 = 0xffff;

/// New connections that a NIC may begin in a second. They cost memory that the whole network shares, unanswered ones most.
const NEW_TCP: (u32, u32) = (100_000, 200_000);
const NEW_OTHERS: (u32, u32) = (10_000, 20_000);
/// What of a NIC the gateway itself answers in a second.
const PINGS: (u32, u32) = (50, 100);
const DISCOVERIES: (u32, u32) = (50, 100);
const QUESTIONS: (u32, u32) = (10, 20);

const ECHO_REQUEST: [(Family, u128); 2] = [(Family::V4, 8), (Family::V6, 128)];
const ROUTER_SOLICIT: u128 = 133;
const ROUTER_ADVERT: u128 = 134;
const NEIGHBOUR: [u128; 2] = [135, 136];
const REDIRECT: u128 = 137;
const LISTENERS: [u128; 4] = [130, 131, 132, 143];

/// The NICs of a network that are on this host.
pub fn local<'a>(hosts: &'a HostNetworks, plan: &'a NetworkPlan) -> impl Iterator<Item = &'a NicPlan> {
    plan.nics.iter().filter(|n| n.at.as_ref().is_some_and(|at| at.host == hosts.host))
}

/// The address of a NIC in a family.
pub fn address(nic: &NicPlan, family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => nic.address4.map(IpAddr::from),
        Family::V6 => nic.address6.map(IpAddr::from),
    }
}

/// The network at the other end of a peering.
pub fn peer<'a>(hosts: &'a HostNetworks, peering: &PeeringPlan) -> Option<&'a NetworkPlan> {
    hosts.networks.iter().find(|n| n.uid == peering.network).map(|n| &**n)
}

/// The address that a NAT gateway lends on this host.
pub fn nat_address(hosts: &HostNetworks, nat: &NatPlan, family: Family) -> Option<IpAddr> {
    nat.addresses.iter().find(|(host, a)| *host == hosts.host && Family::of(*a) == family).map(|(_, a)| *a)
}

/// Whether anything of a network leads outside on this host.
pub fn leads_out(hosts: &HostNetworks, plan: &NetworkPlan) -> bool {
    let out = |route: &RoutePlan| matches!(route.via, Via::Internet | Via::Nat(_));
    plan.route_tables.iter().flat_map(|t| &t.routes).any(out)
        || plan.nats.iter().flat_map(|n| &n.addresses).any(|(host, _)| *host == hosts.host)
        || plan.floating.iter().any(|f| local(hosts, plan).any(|n| n.uid == f.nic))
}

pub(crate) fn link(name: impl Into<String>) -> Value {
    Value::Link(name.into())
}

fn nic_link(nic: &NicPlan) -> Value {
    link(links::nic(nic.uid))
}

/// All rules of one network's namespace.
pub fn network(hosts: &HostNetworks, plan: &NetworkPlan) -> Table {
    let checks = plan.balancers.iter().flat_map(|b| &b.listeners).any(|l| l.check.is_some());
    let (nics, table) = (local(hosts, plan).collect(), Table::new(TABLE, plan.flow_logs != FlowLogs::None));
    let relays = proxied(hosts, plan).next().is_some();
    let mut maker = Maker { hosts, plan, nics, table, checks, relays };
    maker.table.salt = crate::fnv(format!("{:?}", plan.route_tables).as_bytes());
    maker.names();
    maker.genuine();
    maker.gateway();
    maker.passed();
    maker.received();
    maker.exits();
    maker.peerings();
    maker.sent();
    maker.relays();
    maker.forward();
    // What no packet needs, no packet pays for.
    if maker.translates() {
        maker.arrive();
        maker.leave();
    }
    maker.table
}

struct Maker<'a> {
    hosts: &'a HostNetworks,
    plan: &'a NetworkPlan,
    nics: Vec<&'a NicPlan>,
    table: Table,
    /// Hosts ask targets of its balancers whether they answer.
    checks: bool,
    /// Clients here may call a PROXY listener.
    relays: bool,
}

impl<'a> Maker<'a> {
    fn refuse(&mut self, reason: &str) -> Verdict {
        self.table.refuse(reason)
    }

    /// Whether addresses are changed here: of what passes outside, of what is balanced, of probes.
    fn translates(&self) -> bool {
        let peered = self.plan.peerings.iter().filter_map(|p| peer(self.hosts, p));
        leads_out(self.hosts, self.plan)
            || !self.plan.balancers.is_empty()
            || peered.into_iter().any(|n| !n.balancers.is_empty())
    }

    fn forwarders(&self) -> bool {
        self.nics.iter().any(|n| n.forwards)
    }

    /// Sets of who is who.
    fn names(&mut self) {
        let nics = self.nics.clone();
        for family in Family::BOTH {
            let own = nics.iter().filter_map(|n| Some((n, address(n, family)?)));
            let home = own.clone().map(|(n, a)| vec![nic_link(n), Value::of(a)]).collect();
            let own = own.map(|(n, a)| vec![nic_link(n), Value::Mac(n.mac), Value::of(a)]).collect();
            let digit = family.digit();
            let fields = [Field::LinkIn, Field::MacSource, Field::Source(family)];
            self.table.set(format!("own{digit}"), fields, own);
            self.table.set(format!("home{digit}"), [Field::LinkOut, Field::Destination(family)], home);
            let gateways = self.plan.subnets.iter().filter_map(|s| match family {
                Family::V4 => s.gateway4.map(IpAddr::from),
                Family::V6 => s.gateway6.map(IpAddr::from),
            });
            let balancers = self.plan.balancers.iter().map(|b| b.address).filter(|a| Family::of(*a) == family);
            let gateways = gateways.chain(balancers).map(|g| vec![Value::of(g)]).collect();
            self.table.set(format!("gateways{digit}"), [Field::Destination(family)], gateways);
            let nets = spans::nets(&self.plan.cidrs, family);
            let nets = nets.into_iter().map(|(a, b)| vec![Value::Span(a, b)]).collect();
            self.table.set(format!("cidrs{digit}"), [Field::Source(family)], nets);
        }
        let macs = nics.iter().map(|n| vec![nic_link(n), Value::Mac(n.mac)]).collect();
        self.table.set("macs", [Field::LinkIn, Field::MacSource], macs);
        let forwarders = nics.iter().filter(|n| n.forwards).map(|n| vec![nic_link(n)]).collect();
        self.table.set("forwarders", [Field::LinkIn], forwarders);
    }

    /// Who sends bears their own names. One lookup for all that is right; the rest is looked at in turn.
    fn genuine(&mut self) {
        // Who came by the tunnel was looked at where it began.
        let mut base = vec![Rule::then([Test::is(Field::LinkIn, link(links::TUNNEL))], Verdict::Accept)];
        let own = |f: Family| {
            let fields = [Field::LinkIn, Field::MacSource, Field::Source(f)];
            Rule::then([Test::within(fields, format!("own{}", f.digit()))], Verdict::Accept)
        };
        base.extend(Family::BOTH.map(own));
        for family in Family::BOTH {
            let source = Field::Source(family);
            let spoofed_mac = self.refuse("spoofed_mac");
            let spoofed = self.refuse("spoofed_address");
            let mut odd = vec![Rule::then([Test::outside([Field::LinkIn, Field::MacSource], "macs")], spoofed_mac)];
            // Nor does one that forwards speak for a host.
            odd.extend(self.checks.then(|| Rule::then([probes::from(family)], spoofed.clone())));
            odd.push(Rule::then([Test::within([Field::LinkIn], "forwarders")], Verdict::Accept));
            match family {
                // Who has no address yet asks for one.
                Family::V4 => odd.push(Rule::then(
                    [
                        Test::is(source, Value::one(0_u8)),
                        Test::is(Field::Protocol, Value::one(17_u8)),
                        Test::is(Field::Port, Value::one(67_u8)),
                    ],
                    Verdict::Accept,
                )),
                // What stays on the link is for the gateway to judge.
                Family::V6 => {
                    let link_local = Value::Span(0xfe80 << 112, (0xfec0 << 112) - 1);
                    let link_groups = Value::Span(0xff02 << 112, (0xff03 << 112) - 1);
                    let sources = vec![Value::one(0_u8), link_local.clone()];
                    let to = vec![link_local, link_groups];
                    odd.push(Rule::then(
                        [
                            Test::Is { field: source, values: sources, not: false },
                            Test::Is { field: Field::Destination(family), values: to, not: false },
                        ],
                        Verdict::Accept,
                    ));
                }
            }
            odd.push(Rule::then([], spoofed.clone()));
            let (digit, name) = (family.digit(), format!("odd{}", family.digit()));
            self.table.chain(name.clone(), odd);
            let nics = Test::from(links::NIC_PREFIX);
            base.push(Rule::then([nics, Test::Family(family)], Verdict::Goto(name)));
            // Nobody outside is one of us.
            let outside = Test::is(Field::LinkIn, link(links::UPLINK));
            base.push(Rule::then([outside, Test::within([source], format!("cidrs{digit}"))], spoofed));
        }
        // Nor is anybody of a peered network who was not agreed on, not even in answers. Errors come from who is on the way.
        let not_peered = self.refuse("not_of_the_peering");
        for (n, peering) in self.plan.peerings.iter().enumerate() {
            let from = Test::is(Field::LinkIn, link(links::peering(peering.uid)));
            base.extend(Family::BOTH.map(|family| {
                let agreed = Test::outside([Field::Source(family)], format!("peer{n}_{}", family.digit()));
                let no_error = Test::Is { field: Field::Protocol, values: vec![Value::one(family.icmp())], not: true };
                Rule::then([from.clone(), Test::Family(family), no_error, agreed], not_peered.clone())
            }));
        }
        self.table.base("genuine", Base { hook: Hook::Prerouting, nat: false, raw: true }, base);
    }

    /// What of the namespace itself a NIC reaches: gateways and balancers answer its pings.
    fn gateway(&mut self) {
        let rogue = self.refuse("rogue");
        let flood = self.refuse("flood");
        let multicast = self.refuse("multicast");
        let closed = self.refuse("to_gateway");
        let icmp6 = Field::IcmpType(Family::V6);
        let udp = Test::is(Field::Protocol, Value::one(17_u8));
        let discoveries = self.table.flood("discoveries", DISCOVERIES.0, DISCOVERIES.1);
        let questions = self.table.flood("questions", QUESTIONS.0, QUESTIONS.1);
        let pings = self.table.flood("pings", PINGS.0, PINGS.1);
        let near = [Test::any(icmp6, NEIGHBOUR), Test::is(Field::HopLimit, Value::one(255_u8))];
        let mut asked = vec![
            Rule::then([near[0].clone(), discoveries], flood.clone()),
            Rule::then(near.clone(), Verdict::Accept),
            Rule::then([Test::any(icmp6, LISTENERS)], multicast.clone()),
            Rule::then([Test::Family(Family::V4), Test::is(Field::Protocol, Value::one(2_u8))], multicast),
            Rule::then([Test::any(icmp6, [ROUTER_ADVERT, REDIRECT])], rogue.clone()),
        ];
        asked.extend(offers(&rogue));
        let servers = Test::any(Field::Port, [67, 547]);
        for question in [vec![udp, servers], vec![Test::any(icmp6, [ROUTER_SOLICIT])]] {
            let too_many = [question.clone(), vec![questions.clone()]].concat();
            asked.push(Rule::then(too_many, flood.clone()));
            asked.push(Rule::then(question, Verdict::Accept));
        }
        for (family, echo) in ECHO_REQUEST {
            let gateway = Test::within([Field::Destination(family)], format!("gateways{}", family.digit()));
            let ping = vec![Test::any(Field::IcmpType(family), [echo]), gateway];
            asked.push(Rule::then([ping.clone(), vec![pings.clone()]].concat(), flood.clone()));
            asked.push(Rule::then(ping, Verdict::Accept));
        }
        asked.push(Rule::then([], closed.clone()));
        self.table.chain("asked", asked);
        let mut base = self.relays_reached();
        base.extend(self.probes_answered());
        base.extend([
            Rule::then([Test::from(links::NIC_PREFIX)], Verdict::goto("asked")),
            Rule::then([Test::is(Field::LinkIn, link("lo"))], Verdict::Accept),
            Rule::then([Test::Answer], Verdict::Accept),
            Rule::then(near, Verdict::Accept),
            Rule::then([], closed),
        ]);
        self.table.base("gateway", Base { hook: Hook::Input, nat: false, raw: false }, base);
        // Neighbours are as planned: nobody is to look for a shorter way.
        let redirect = self.refuse("redirect");
        let redirects = [(Family::V4, 5), (Family::V6, REDIRECT)];
        let redirects =
            redirects.map(|(f, kind)| Rule::then([Test::any(Field::IcmpType(f), [kind])], redirect.clone()));
        self.table.base("answers", Base { hook: Hook::Output, nat: false, raw: false }, redirects.to_vec());
    }

    /// Also: neither from nor to a NIC that forwards, by which a connection may pass here more than once, each time between others.
    fn simple(&self, tests: &[Test]) -> Vec<Test> {
        let mut tests = tests.to_vec();
        if self.forwarders() {
            tests.extend([Field::LinkIn, Field::LinkOut].map(|f| Test::outside([f], "forwarders")));
        }
        tests
    }

    /// What has been let through.
    fn passed(&mut self) {
        let mut rules = Vec::new();
        if self.plan.flow_logs == FlowLogs::All {
            let mut tell = told("allow");
            tell.tests.insert(0, Test::New);
            rules.push(tell);
        }
        rules.push(Rule::new(self.simple(&[]), [Act::Remember, Act::Then(Verdict::Accept)]));
        if self.forwarders() {
            rules.push(Rule::then([], Verdict::Accept));
        }
        self.table.chain("passed", rules);
    }

    /// The chains of each set of groups that a NIC here has, and which NIC has which.
    fn by_groups(&mut self, direction: Direction) {
        let (name, field, none) = match direction {
            Direction::Egress => ("egress", Field::LinkIn, "no_egress_rule"),
            Direction::Ingress => ("ingress", Field::LinkOut, "no_ingress_rule"),
        };
        let unmatched = self.refuse(none);
        let denied = self.refuse(&format!("{name}_denied"));
        let outcome = groups::Outcome { denied, unmatched };
        let sets: BTreeSet<&'a [u32]> = self.nics.iter().map(|n| &n.groups[..]).collect();
        for family in Family::BOTH {
            let mut by_link: BTreeMap<Key, Target> = BTreeMap::new();
            for (n, set) in sets.iter().enumerate() {
                let chain = format!("{name}{n}_{}", family.digit());
                let rules = merged(self.plan, set, direction);
                let rules = groups::chain(&mut self.table, self.plan, &rules, (direction, family), &outcome);
                self.table.chain(chain.clone(), rules);
                let of_set = self.nics.iter().filter(|n| n.groups[..] == **set);
                by_link.extend(of_set.map(|n| (vec![nic_link(n)], Target::Verdict(Verdict::Jump(chain.clone())))));
            }
            self.table.map(format!("{name}{}", family.digit()), [field], MapTo::Verdicts, by_link);
        }
    }

    fn by_groups_rules(direction: Direction) -> Vec<Rule> {
        let (name, field) = match direction {
            Direction::Egress => ("egress", Field::LinkIn),
            Direction::Ingress => ("ingress", Field::LinkOut),
        };
        let rule = |f: Family| Rule::by_map([Test::Family(f)], [field], format!("{name}{}", f.digit()));
        Family::BOTH.map(rule).to_vec()
    }

    /// Drops what fits no connection, but for the links of NICs that forward: of those one sees only half.
    fn sane(&mut self, fields: &[Field]) -> Rule {
        let invalid = self.refuse("invalid");
        let mut tests = vec![Test::Invalid];
        if self.forwarders() {
            tests.extend(fields.iter().map(|f| Test::outside([*f], "forwarders")));
        }
        Rule::then(tests, invalid)
    }

    /// To a NIC of this host.
    fn received(&mut self) {
        self.by_groups(Direction::Ingress);
        let mut rules = vec![Rule::then([Test::Related], Verdict::Accept), self.sane(&[Field::LinkOut])];
        let stray = self.refuse("not_its_address");
        for family in Family::BOTH {
            let mut tests = vec![
                Test::Family(family),
                Test::outside([Field::LinkOut, Field::Destination(family)], format!("home{}", family.digit())),
            ];
            if self.forwarders() {
                tests.push(Test::outside([Field::LinkOut], "forwarders"));
            }
            rules.push(Rule::then(tests, stray.clone()));
        }
        rules.extend(self.probes_received());
        rules.extend(Self::by_groups_rules(Direction::Ingress));
        rules.push(Rule::then([], Verdict::goto("passed")));
        self.table.chain("received", rules);
    }

    /// The route tables of NICs that are here.
    fn tables(&self) -> BTreeSet<u32> {
        self.nics.iter().filter_map(|n| Some(self.plan.subnets.get(n.subnet as usize)?.route_table)).collect()
    }

    fn of_table(&self, table: u32) -> BTreeSet<Key> {
        let of_subnet =
            |n: &&&NicPlan| self.plan.subnets.get(n.subnet as usize).is_some_and(|s| s.route_table == table);
        self.nics.iter().filter(of_subnet).map(|n| vec![nic_link(n)]).collect()
    }

    /// The way outside: only where the route leads there, and only with an address that the outside knows.
    fn exits(&mut self) {
        let no_floating = self.refuse("no_floating_address");
        let no_way = self.refuse("no_way");
        let mut internet = Vec::new();
        for family in Family::BOTH {
            let floating = self.floating(family).map(|(outside, own)| (vec![Value::of(own)], Target::Address(outside)));
            let floating: BTreeMap<Key, Target> = floating.collect();
            let (digit, source) = (family.digit(), Field::Source(family));
            let known = floating.keys().cloned().collect();
            self.table.set(format!("floats{digit}"), [source], known);
            self.table.map(format!("floating{digit}"), [source], MapTo::Addresses(family), floating);
            let tests = [Test::within([source], format!("floats{digit}"))];
            internet.push(Rule::new(tests, [Act::Mark(FLOATING_MARK), Act::Then(Verdict::goto("passed"))]));
        }
        internet.push(Rule::then([], no_floating));
        self.table.chain("internet", internet);
        for n in 0..self.plan.nats.len() {
            // An address of one's own goes before one that is lent.
            let own = |f: Family| {
                let tests = [Test::within([Field::Source(f)], format!("floats{}", f.digit()))];
                Rule::then(tests, Verdict::goto("internet"))
            };
            let mut rules = Family::BOTH.map(own).to_vec();
            rules.push(Rule::new([], [Act::Mark(nat_mark(n)), Act::Then(Verdict::goto("passed"))]));
            self.table.chain(format!("nat{n}"), rules);
        }
        let mut by_link: BTreeMap<Key, Target> = BTreeMap::new();
        for number in self.tables() {
            let mut rules = Vec::new();
            for family in Family::BOTH {
                let routes = self.plan.route_tables.get(number as usize).map_or(&[][..], |t| &t.routes[..]);
                let exit = |(span, route): (spans::Span, &RoutePlan)| {
                    let chain = match route.via {
                        Via::Nat(n) if (n as usize) < self.plan.nats.len() => format!("nat{n}"),
                        Via::Internet => "internet".to_owned(),
                        _ => return None,
                    };
                    Some((vec![Value::Span(span.0, span.1)], Target::Verdict(Verdict::Goto(chain))))
                };
                let exits = spans::routes(routes, family).into_iter().filter_map(exit).collect();
                let name = format!("exits{number}_{}", family.digit());
                let to = Field::Destination(family);
                self.table.map(name.clone(), [to], MapTo::Verdicts, exits);
                rules.push(Rule::by_map([], [to], name));
            }
            rules.push(Rule::then([], no_way.clone()));
            let chain = format!("exit{number}");
            self.table.chain(chain.clone(), rules);
            let of_table = self.of_table(number);
            by_link.extend(of_table.into_iter().map(|k| (k, Target::Verdict(Verdict::Goto(chain.clone())))));
        }
        self.table.map("exits", [Field::LinkIn], MapTo::Verdicts, by_link);
    }

    /// The floating addresses of NICs that are here, with the NICs' own.
    fn floating(&self, family: Family) -> impl Iterator<Item = (IpAddr, IpAddr)> {
        self.plan.floating.iter().filter(move |f| Family::of(f.address) == family).filter_map(move |f| {
            let nic = self.nics.iter().find(|n| n.uid == f.nic)?;
            Some((f.address, address(nic, family)?))
        })
    }

    /// To and from peered networks: as much of them as was agreed on.
    fn peerings(&mut self) {
        let mut ways: [BTreeMap<Key, Target>; 2] = Default::default();
        let not_peered = self.refuse("not_of_the_peering");
        let no_way = self.refuse("no_way");
        for (n, peering) in self.plan.peerings.iter().enumerate() {
            let mut rules: [Vec<Rule>; 2] = Default::default();
            for family in Family::BOTH {
                let name = format!("peer{n}_{}", family.digit());
                let nets = spans::nets(&peering.cidrs, family);
                let nets = nets.into_iter().map(|(a, b)| vec![Value::Span(a, b)]).collect();
                self.table.set(name.clone(), [Field::Source(family)], nets);
                for (rules, field) in rules.iter_mut().zip([Field::Source(family), Field::Destination(family)]) {
                    let tests = [Test::Family(family), Test::outside([field], name.clone())];
                    rules.push(Rule::then(tests, not_peered.clone()));
                }
            }
            let [mut from, mut to] = rules;
            from.push(Rule::then([Test::to(links::NIC_PREFIX)], Verdict::goto("received")));
            from.push(Rule::then([Test::is(Field::LinkOut, link(links::TUNNEL))], Verdict::Accept));
            from.push(Rule::then([], no_way.clone()));
            to.push(Rule::then([], Verdict::goto("passed")));
            for ((name, rules), ways) in [("from_peer", from), ("to_peer", to)].into_iter().zip(&mut ways) {
                let name = format!("{name}{n}");
                self.table.chain(name.clone(), rules);
                ways.insert(vec![link(links::peering(peering.uid))], Target::Verdict(Verdict::Goto(name)));
            }
        }
        let [mut from, to] = ways;
        for (way, chain) in [(links::TUNNEL, "from_tunnel"), (links::UPLINK, "from_outside")] {
            from.insert(vec![link(way)], Target::Verdict(Verdict::goto(chain)));
        }
        let nics = || Test::to(links::NIC_PREFIX);
        self.table.chain(
            "from_tunnel",
            vec![Rule::then([nics()], Verdict::goto("received")), Rule::then([], no_way.clone())],
        );
        self.table.chain(
            "from_outside",
            vec![Rule::then([nics(), Test::Translated], Verdict::goto("received")), Rule::then([], no_way)],
        );
        self.table.map("from", [Field::LinkIn], MapTo::Verdicts, from);
        self.table.map("to_peers", [Field::LinkOut], MapTo::Verdicts, to);
    }

    /// From a NIC of this host.
    fn sent(&mut self) {
        self.by_groups(Direction::Egress);
        let flood = self.refuse("flood");
        let tcp = self.table.flood("new_tcp", NEW_TCP.0, NEW_TCP.1);
        let others = self.table.flood("new_others", NEW_OTHERS.0, NEW_OTHERS.1);
        let is_tcp = |not| Test::Is { field: Field::Protocol, values: vec![Value::one(6_u8)], not };
        let rogue = self.refuse("rogue");
        let no_way = self.refuse("no_way");
        let mut rules = vec![
            Rule::then([Test::Related], Verdict::Accept),
            self.sane(&[Field::LinkIn, Field::LinkOut]),
            Rule::then([Test::New, is_tcp(false), tcp], flood.clone()),
            Rule::then([Test::New, is_tcp(true), others], flood),
        ];
        rules.extend(offers(&rogue));
        rules.extend(Self::by_groups_rules(Direction::Egress));
        rules.extend([
            Rule::then([Test::to(links::NIC_PREFIX)], Verdict::goto("received")),
            Rule::then([Test::is(Field::LinkOut, link(links::TUNNEL))], Verdict::goto("passed")),
            Rule::by_map([Test::is(Field::LinkOut, link(links::UPLINK))], [Field::LinkIn], "exits"),
            Rule::by_map([], [Field::LinkOut], "to_peers"),
            Rule::then([], no_way),
        ]);
        self.table.chain("sent", rules);
    }

    fn forward(&mut self) {
        let no_way = self.refuse("no_way");
        let tunnel = Test::is(Field::LinkOut, link(links::TUNNEL));
        let mut rules = vec![Rule::new(
            self.simple(&[tunnel, Test::Known, Test::Plain]),
            [Act::MayBeNoted, Act::Then(Verdict::Accept)],
        )];
        // Nobody who takes the fast path would be told that their segments are too big.
        rules.extend(Family::BOTH.map(|family| {
            let headers = if family == Family::V4 { 40 } else { 60 };
            let most = u32::from(self.plan.mtu).saturating_sub(headers);
            Rule::new([Test::Family(family), Test::Opens], [Act::Segments(most)])
        }));
        rules.extend([
            // Most other packets end here.
            Rule::then(self.simple(&[Test::Known]), Verdict::Accept),
            Rule::then([Test::Answer], Verdict::Accept),
            Rule::then([Test::from(links::NIC_PREFIX)], Verdict::goto("sent")),
            Rule::by_map([], [Field::LinkIn], "from"),
            Rule::then([], no_way),
        ]);
        self.table.base("forward", Base { hook: Hook::Forward, nat: false, raw: false }, rules);
    }

    /// New destinations: what is for a floating address or for a balancer.
    fn arrive(&mut self) {
        let mut rules = Vec::new();
        for family in Family::BOTH {
            let inwards = self.floating(family).map(|(outside, own)| (vec![Value::of(outside)], Target::Address(own)));
            let inwards: BTreeMap<Key, Target> = inwards.collect();
            let name = format!("inwards{}", family.digit());
            let fields = [Field::Destination(family)];
            self.table.map(name.clone(), fields, MapTo::Addresses(family), inwards);
            let tests = [Test::is(Field::LinkIn, link(links::UPLINK))];
            rules.push(Rule::new(tests, [Act::Destination { family, fields: fields.to_vec(), map: name }]));
        }
        let own: Vec<&BalancerPlan> = self.plan.balancers.iter().collect();
        rules.extend(self.balance("own", &own, Test::from(links::NIC_PREFIX)));
        // A peered network's balancers are done here too: answers come from their targets to this host by another way.
        for number in self.tables() {
            let routes = self.plan.route_tables.get(number as usize).map_or(&[][..], |t| &t.routes[..]);
            let mut theirs = Vec::new();
            for (n, peering) in self.plan.peerings.iter().enumerate() {
                let Some(other) = peer(self.hosts, peering) else { continue };
                theirs.extend(other.balancers.iter().filter(|b| routes::is_peered(self.plan, routes, n, b.address)));
            }
            let name = format!("table{number}");
            if !theirs.is_empty() {
                let of_table = self.of_table(number);
                self.table.set(name.clone(), [Field::LinkIn], of_table);
                rules.extend(self.balance(&name, &theirs, Test::within([Field::LinkIn], name.clone())));
            }
        }
        self.table.base("arrive", Base { hook: Hook::Prerouting, nat: true, raw: false }, rules);
    }

    fn balance(&mut self, whose: &str, balancers: &[&BalancerPlan], from: Test) -> Vec<Rule> {
        let mut rules = Vec::new();
        for family in Family::BOTH {
            let mut listeners: BTreeMap<Key, Target> = BTreeMap::new();
            for balancer in balancers.iter().filter(|b| Family::of(b.address) == family) {
                for listener in &balancer.listeners {
                    let protocol = match listener.protocol {
                        BalancedProtocol::Tcp => 6_u8,
                        BalancedProtocol::Udp => 17,
                    };
                    let shares = shares(listener, family);
                    if shares.is_empty() {
                        continue;
                    }
                    let name = format!("balance_{whose}_{}_{}", family.digit(), listeners.len());
                    let key = vec![Value::of(balancer.address), Value::one(protocol), Value::one(listener.port)];
                    let act = match listener.proxy_protocol.filter(|_| listener.protocol == BalancedProtocol::Tcp) {
                        None => Act::Balance { family, by_source: listener.source_hash, shares },
                        Some(_) => Act::Balance { family, by_source: false, shares: vec![self.to_relay(family)] },
                    };
                    let tests = [Test::is(Field::Protocol, Value::one(protocol))];
                    self.table.chain(name.clone(), vec![Rule::new(tests, [act])]);
                    listeners.insert(key, Target::Verdict(Verdict::Goto(name)));
                }
            }
            let fields = [Field::Destination(family), Field::Protocol, Field::Port];
            if !listeners.is_empty() {
                let name = format!("listeners_{whose}_{}", family.digit());
                self.table.map(name.clone(), fields, MapTo::Verdicts, listeners);
                rules.push(Rule::by_map([from.clone()], fields, name));
            }
        }
        rules
    }

    /// New sources: what leaves for outside, and what returns to the one that it came from.
    fn leave(&mut self) {
        let mut rules = Vec::new();
        for family in Family::BOTH {
            let digit = family.digit();
            let up = || Test::is(Field::LinkOut, link(links::UPLINK));
            let source = Field::Source(family);
            let floating = Test::is(Field::Mark, Value::one(FLOATING_MARK));
            let act = Act::Source { family, fields: vec![source], map: format!("floating{digit}") };
            rules.push(Rule::new([up(), floating], [act]));
            let lent = self.plan.nats.iter().enumerate().filter_map(|(n, nat)| {
                Some((vec![Value::one(nat_mark(n))], Target::Address(nat_address(self.hosts, nat, family)?)))
            });
            let lent: BTreeMap<Key, Target> = lent.collect();
            let name = format!("lent{digit}");
            self.table.map(name.clone(), [Field::Mark], MapTo::Addresses(family), lent);
            rules.push(Rule::new(
                [up(), Test::Family(family)],
                [Act::Source { family, fields: vec![Field::Mark], map: name }],
            ));
            let (four, six) = links::transit(self.plan.vni);
            let own = if family == Family::V4 { four.into() } else { six.into() };
            let marked = Test::Is { field: Field::Mark, values: vec![Value::one(0_u8)], not: true };
            rules.push(Rule::new([up(), Test::Family(family), marked], [Act::From(own)]));

            rules.extend(self.probes_sent(family));

            // Nobody takes a packet from themselves: to a client that is its own target the gateway is the client.
            let hairpins = self.nics.iter().filter_map(|nic| {
                let subnet = self.plan.subnets.get(nic.subnet as usize)?;
                let (own, gateway) = match family {
                    Family::V4 => (nic.address4?.into(), IpAddr::from(subnet.gateway4?)),
                    Family::V6 => (nic.address6?.into(), subnet.gateway6?.into()),
                };
                Some((vec![Value::of(own), Value::of(own)], Target::Address(gateway)))
            });
            let hairpins: BTreeMap<Key, Target> = hairpins.collect();
            let fields = [source, Field::Destination(family)];
            let name = format!("hairpins{digit}");
            self.table.map(name.clone(), fields, MapTo::Addresses(family), hairpins);
            let act = Act::Source { family, fields: fields.to_vec(), map: name };
            if self.relays {
                rules.push(Rule::new([Test::to(links::NIC_PREFIX), relays::sent()], [act.clone()]));
            }
            rules.push(Rule::new([Test::to(links::NIC_PREFIX), Test::Translated], [act]));
        }
        self.table.base("leave", Base { hook: Hook::Postrouting, nat: true, raw: false }, rules);
    }
}

/// NAT gateways' marks begin at 1: nought is no mark.
fn nat_mark(index: usize) -> u32 {
    (index as u32 + 1) % FLOATING_MARK
}

/// What only a DHCP server says, and no NIC may.
fn offers(rogue: &Verdict) -> Vec<Rule> {
    let offer = |from: u16, to: u16| {
        let tests = [
            Test::is(Field::Protocol, Value::one(17_u8)),
            Test::is(Field::SourcePort, Value::one(from)),
            Test::is(Field::Port, Value::one(to)),
        ];
        Rule::then(tests, rogue.clone())
    };
    vec![offer(67, 68), offer(547, 546)]
}

/// A listener's targets that answer with their weights, as small as they go. When none answers it is all: rather somebody who may
/// not answer than nobody.
pub fn shares(listener: &ListenerPlan, family: Family) -> Vec<Share> {
    let targets = listener.targets.iter().filter(|t| Family::of(t.address) == family && t.weight > 0);
    let all_fail = targets.clone().all(|t| t.failing);
    let targets = targets.filter(|t| all_fail || !t.failing);
    let common = targets.clone().fold(0, |a, t| gcd(a, t.weight)).max(1);
    targets.map(|t| Share { address: t.address, port: t.port, weight: (t.weight / common).into() }).collect()
}

fn gcd(a: u16, b: u16) -> u16 {
    if b == 0 { a } else { gcd(b, a % b) }
}
