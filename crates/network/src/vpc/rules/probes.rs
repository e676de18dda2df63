//! Hosts' probes of balancers' targets: let through to what is checked and to nothing else, and seen as the gateway's.
//!
//! ```text
//! host that asks   from its own address of [`links::PROBERS`] ─ by the tunnel, or to a NIC of its own
//! host of the NIC  received: to an address and port that is checked, past the groups ─ leave: from the subnet's gateway
//! its answer       to the gateway, which connection tracking turns into the host that asked
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::super::links;
use super::table::{Act, Family, Field, Key, MapTo, Rule, Target, Test, Value, Verdict};
use super::{Maker, address, link, spans};

/// Sent by a host that asks.
pub(super) fn from(family: Family) -> Test {
    Test::is(Field::Source(family), probers(family))
}

fn probers(family: Family) -> Value {
    let net = match family {
        Family::V4 => links::PROBERS.0,
        Family::V6 => links::PROBERS.1,
    };
    let (first, last) = spans::of(&net);
    Value::Span(first, last)
}

impl Maker<'_> {
    /// What NICs of this host answer to its own probes.
    pub(super) fn probes_answered(&self) -> Vec<Rule> {
        if !self.checks {
            return Vec::new();
        }
        let to = |f| Test::is(Field::Destination(f), probers(f));
        Family::BOTH.map(|f| Rule::then([Test::from(links::NIC_PREFIX), to(f), Test::Answer], Verdict::Accept)).to_vec()
    }

    /// Other hosts' probes.
    pub(super) fn probes_received(&mut self) -> Vec<Rule> {
        if !self.checks {
            return Vec::new();
        }
        let rule = |family: Family| {
            let listeners = self.plan.balancers.iter().flat_map(|b| &b.listeners);
            let checked = listeners.filter_map(|l| Some((l, l.check.as_ref()?))).flat_map(|(listener, check)| {
                let of_family = listener.targets.iter().filter(|t| Family::of(t.address) == family);
                let here = of_family.filter(|t| self.nics.iter().any(|n| address(n, family) == Some(t.address)));
                here.map(|t| (t.address, check.port.unwrap_or(t.port)))
            });
            let key = |(address, port): (IpAddr, u16)| vec![Value::of(address), Value::one(6_u8), Value::one(port)];
            let checked: BTreeSet<Key> = checked.map(key).collect();
            let (name, fields) =
                (format!("checked{}", family.digit()), [Field::Destination(family), Field::Protocol, Field::Port]);
            self.table.set(name.clone(), fields, checked);
            let by_tunnel = Test::is(Field::LinkIn, link(links::TUNNEL));
            Rule::then([by_tunnel, from(family), Test::within(fields, name)], Verdict::Accept)
        };
        Family::BOTH.map(rule).to_vec()
    }

    /// On their last step they come from the gateway.
    pub(super) fn probes_sent(&mut self, family: Family) -> Option<Rule> {
        if !self.checks {
            return None;
        }
        let gateways = self.nics.iter().filter_map(|nic| {
            let subnet = self.plan.subnets.get(nic.subnet as usize)?;
            let gateway = match family {
                Family::V4 => IpAddr::from(subnet.gateway4?),
                Family::V6 => subnet.gateway6?.into(),
            };
            Some((vec![Value::of(address(nic, family)?)], Target::Address(gateway)))
        });
        let gateways: BTreeMap<Key, Target> = gateways.collect();
        let (name, to) = (format!("probed{}", family.digit()), Field::Destination(family));
        self.table.map(name.clone(), [to], MapTo::Addresses(family), gateways);
        let act = Act::Source { family, fields: vec![to], map: name };
        Some(Rule::new([Test::to(links::NIC_PREFIX), from(family)], [act]))
    }
}
