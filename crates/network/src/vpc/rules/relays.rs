//! Connections to PROXY listeners: to the relay of this host ([`super::super::relay`]), and on from there as if the client sent them.
//!
//! ```text
//! client    arrive: to the relay's own address and port ─ gateway (input): let in
//! relay     from the client's address, marked SENT ─ relays (output): relayed → (the client's egress rules) → received or passed
//! answer    diverted (prerouting): to a socket of the relay's, marked ANSWERS, by which a routing rule leads it to the namespace
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nexus_model::plan::{BalancedProtocol, BalancerPlan, HostNetworks, ListenerPlan, NetworkPlan};

use super::super::{links, relay};
use super::table::{Act, Base, Family, Field, Hook, Key, MapTo, Rule, Share, Target, Test, Value, Verdict};
use super::{Maker, NEW_TCP, address, link, local, peer};

/// The PROXY listeners that clients of a network on this host may call: its own balancers', and those of peered networks.
pub fn proxied<'a>(
    hosts: &'a HostNetworks,
    network: &'a NetworkPlan,
) -> impl Iterator<Item = (&'a BalancerPlan, &'a ListenerPlan)> {
    let here = local(hosts, network).next().is_some();
    let theirs = network.peerings.iter().filter_map(|p| peer(hosts, p)).flat_map(|n| &n.balancers);
    let all = network.balancers.iter().chain(theirs).filter(move |_| here);
    let is_proxied = |l: &&ListenerPlan| l.proxy_protocol.is_some() && l.protocol == BalancedProtocol::Tcp;
    all.flat_map(move |b| b.listeners.iter().filter(is_proxied).map(move |l| (b, l)))
}

pub(super) fn sent() -> Test {
    Test::is(Field::Mark, Value::one(relay::SENT))
}

impl Maker<'_> {
    /// The address at which the relay of this host listens.
    fn relay(&self, family: Family) -> IpAddr {
        let (four, six) = links::prober(self.hosts.endpoint);
        if family == Family::V4 { four.into() } else { six.into() }
    }

    /// Where connections to a PROXY listener go.
    pub(super) fn to_relay(&self, family: Family) -> Share {
        Share { address: self.relay(family), port: relay::PORT, weight: 1 }
    }

    /// What is let in to the relay: clients here whom a balancer's address led there, and answers of targets.
    pub(super) fn relays_reached(&mut self) -> Vec<Rule> {
        if !self.relays {
            return Vec::new();
        }
        let flood = self.refuse("flood");
        let new = self.table.flood("new_tcp", NEW_TCP.0, NEW_TCP.1);
        let mut rules =
            vec![Rule::then([Test::is(Field::Mark, Value::one(relay::ANSWERS)), Test::Answer], Verdict::Accept)];
        for family in Family::BOTH {
            let tests = vec![
                Test::from(links::NIC_PREFIX),
                Test::is(Field::Destination(family), Value::of(self.relay(family))),
                Test::is(Field::Protocol, Value::one(6_u8)),
                Test::is(Field::Port, Value::one(relay::PORT)),
                Test::Translated,
            ];
            rules.push(Rule::then([tests.clone(), vec![Test::New, new.clone()]].concat(), flood.clone()));
            rules.push(Rule::then(tests, Verdict::Accept));
        }
        rules
    }

    /// What the relay sends in clients' names, and the way of the answers.
    pub(super) fn relays(&mut self) {
        if !self.relays {
            return;
        }
        let mut rules = vec![Rule::then([Test::Known], Verdict::Accept)];
        let sets: BTreeSet<&[u32]> = self.nics.iter().map(|n| &n.groups[..]).collect();
        let not_ours = self.refuse("spoofed_address");
        for family in Family::BOTH {
            let own = self.nics.iter().filter_map(|n| Some((vec![Value::of(address(n, family)?)], n)));
            let chain = |groups: &[u32]| sets.iter().position(|s| *s == groups).map(|n| (n, family.digit()));
            let by_source: BTreeMap<Key, Target> = own
                .filter_map(|(key, nic)| {
                    let (n, digit) = chain(&nic.groups)?;
                    Some((key, Target::Verdict(Verdict::Jump(format!("egress{n}_{digit}")))))
                })
                .collect();
            let (name, source) = (format!("relayed{}", family.digit()), Field::Source(family));
            let known = by_source.keys().cloned().collect();
            self.table.set(format!("clients{}", family.digit()), [source], known);
            let outside = Test::outside([source], format!("clients{}", family.digit()));
            rules.push(Rule::then([Test::Family(family), outside], not_ours.clone()));
            self.table.map(name.clone(), [source], MapTo::Verdicts, by_source);
            rules.push(Rule::by_map([Test::Family(family)], [source], name));
        }
        let no_way = self.refuse("no_way");
        rules.extend([
            Rule::then([Test::to(links::NIC_PREFIX)], Verdict::goto("received")),
            Rule::then([Test::is(Field::LinkOut, link(links::TUNNEL))], Verdict::goto("passed")),
            Rule::by_map([], [Field::LinkOut], "to_peers"),
            Rule::then([], no_way),
        ]);
        self.table.chain("relayed", rules);
        let all = vec![Rule::then([sent()], Verdict::goto("relayed"))];
        self.table.base("relays", Base { hook: Hook::Output, nat: false, raw: false }, all);
        let tcp = Test::is(Field::Protocol, Value::one(6_u8));
        let divert = vec![Rule::new([tcp, Test::Relayed], [Act::Mark(relay::ANSWERS)])];
        self.table.base("diverted", Base { hook: Hook::Prerouting, nat: false, raw: false }, divert);
    }
}
