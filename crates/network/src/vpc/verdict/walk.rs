//! A packet's walk through a table, as the kernel would take it: hook by hook, rule by rule.
//!
//! The packet is the first of a connection, and the network is quiet: nothing answers it, nothing is flooded.

use std::net::IpAddr;

use nexus_model::plan::Mac;

use crate::vpc::rules::table::{
    Act, Chain, Family, Field, Hook, Key, Rule, Share, Table, Target, Test, Value, Verdict, number,
};

/// What rules may look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    pub link_in: String,
    pub link_out: String,
    pub mac: Option<Mac>,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub source_port: u16,
    pub port: u16,
    pub icmp: Option<u8>,
    pub hop_limit: u8,
    pub mark: u32,
    pub vni: u32,
    /// Its destination was changed.
    pub translated: bool,
}

/// Which of several targets a balancer chooses, and how many there were.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Choice {
    pub index: usize,
    pub of: usize,
}

/// How a chain ends.
enum Flow {
    /// At its end: its caller goes on.
    Through,
    Accepted,
    Dropped(String),
}

/// Takes a packet through one hook of a table. The error is the reason for which it is dropped.
pub fn hook(table: &Table, hook: Hook, packet: &mut Packet, choice: &mut Choice) -> Result<(), String> {
    let at = |c: &&(String, Chain)| c.1.base.is_some_and(|b| b.hook == hook);
    let mut bases: Vec<&Chain> = table.chains.iter().filter(at).map(|(_, c)| c).collect();
    // As their priorities have it.
    bases.sort_by_key(|c| c.base.map(|b| (!b.raw, b.nat == (hook == Hook::Postrouting))));
    for chain in bases {
        let mut walk = Walk { table, packet: &mut *packet, choice: &mut *choice, counted: String::new() };
        if let Flow::Dropped(reason) = walk.chain(chain, 0) {
            return Err(reason);
        }
    }
    Ok(())
}

/// Deeper than any table here calls.
const MAX_DEPTH: usize = 16;

struct Walk<'a> {
    table: &'a Table,
    packet: &'a mut Packet,
    choice: &'a mut Choice,
    counted: String,
}

impl Walk<'_> {
    fn chain(&mut self, chain: &Chain, depth: usize) -> Flow {
        for rule in &chain.rules {
            if !rule.tests.iter().all(|t| self.holds(t)) {
                continue;
            }
            if let Some(flow) = self.acts(rule, depth) {
                return flow;
            }
        }
        Flow::Through
    }

    fn acts(&mut self, rule: &Rule, depth: usize) -> Option<Flow> {
        for act in &rule.acts {
            let flow = match act {
                Act::Then(verdict) => self.verdict(verdict, depth),
                Act::ByMap { fields, map } => match self.mapped(fields, map) {
                    Some(Target::Verdict(verdict)) => self.verdict(&verdict.clone(), depth),
                    _ => return None,
                },
                Act::Destination { fields, map, .. } => {
                    let Some(Target::Address(to)) = self.mapped(fields, map) else { return None };
                    (self.packet.destination, self.packet.translated) = (*to, true);
                    Some(Flow::Accepted)
                }
                Act::Balance { shares, .. } => {
                    self.balance(shares);
                    Some(Flow::Accepted)
                }
                Act::Source { fields, map, .. } => {
                    let Some(Target::Address(from)) = self.mapped(fields, map) else { return None };
                    self.packet.source = *from;
                    Some(Flow::Accepted)
                }
                Act::From(address) => {
                    self.packet.source = *address;
                    Some(Flow::Accepted)
                }
                // Which address that is only the host knows.
                Act::Masquerade => Some(Flow::Accepted),
                Act::Mark(mark) => {
                    self.packet.mark = *mark;
                    None
                }
                Act::Count(name) => {
                    self.counted = name.strip_prefix("drop_").unwrap_or(name).to_owned();
                    None
                }
                Act::Tell(_) | Act::Untracked | Act::Remember | Act::MayBeNoted | Act::Segments(_) => None,
            };
            if flow.is_some() {
                return flow;
            }
        }
        None
    }

    /// Nothing means that the next rule is looked at.
    fn verdict(&mut self, verdict: &Verdict, depth: usize) -> Option<Flow> {
        match verdict {
            Verdict::Accept => Some(Flow::Accepted),
            Verdict::Drop => Some(Flow::Dropped(self.counted.clone())),
            Verdict::Return => Some(Flow::Through),
            Verdict::Goto(name) => Some(self.call(name, depth)),
            Verdict::Jump(name) => match self.call(name, depth) {
                Flow::Through => None,
                ended => Some(ended),
            },
        }
    }

    fn call(&mut self, name: &str, depth: usize) -> Flow {
        match self.table.chain_of(name) {
            Some(chain) if depth < MAX_DEPTH => self.chain(chain, depth + 1),
            _ => Flow::Dropped(format!("missing_{name}")),
        }
    }

    fn balance(&mut self, shares: &[Share]) {
        self.choice.of = shares.len();
        if let Some(share) = shares.get(self.choice.index).or(shares.first()) {
            self.packet.destination = share.address;
            self.packet.port = share.port;
            self.packet.translated = true;
        }
    }

    fn mapped(&self, fields: &[Field], map: &str) -> Option<&Target> {
        let map = self.table.maps.get(map)?;
        map.elements.iter().find(|(key, _)| self.is_key(fields, key)).map(|(_, target)| target)
    }

    fn is_key(&self, fields: &[Field], key: &Key) -> bool {
        fields.iter().zip(key).all(|(field, value)| self.is(*field, value))
    }

    /// Whether the packet has the field at all: a rule about what it has not doesn't match.
    fn has(&self, field: Field) -> bool {
        match field {
            Field::Source(family) | Field::Destination(family) => Family::of(self.packet.source) == family,
            Field::IcmpType(family) => self.packet.protocol == family.icmp() && self.packet.icmp.is_some(),
            Field::HopLimit => self.packet.source.is_ipv6(),
            Field::MacSource => self.packet.mac.is_some(),
            _ => true,
        }
    }

    fn is(&self, field: Field, value: &Value) -> bool {
        let packet = &*self.packet;
        let found: u128 = match field {
            Field::LinkIn | Field::LinkOut => {
                let name = if field == Field::LinkIn { &packet.link_in } else { &packet.link_out };
                return match value {
                    Value::Link(link) => link == name,
                    Value::Links(prefix) => name.starts_with(prefix),
                    _ => false,
                };
            }
            Field::MacSource => return matches!(value, Value::Mac(mac) if packet.mac == Some(*mac)),
            Field::Source(_) => number(packet.source),
            Field::Destination(_) => number(packet.destination),
            Field::Protocol => packet.protocol.into(),
            Field::SourcePort => packet.source_port.into(),
            Field::Port => packet.port.into(),
            Field::IcmpType(_) => packet.icmp.unwrap_or_default().into(),
            Field::HopLimit => packet.hop_limit.into(),
            Field::Mark => packet.mark.into(),
            Field::Vni => packet.vni.into(),
        };
        self.has(field) && matches!(value, Value::Span(first, last) if (*first..=*last).contains(&found))
    }

    fn holds(&self, test: &Test) -> bool {
        match test {
            Test::Within { fields, set, not } => {
                let Some(set) = self.table.sets.get(set) else { return false };
                fields.iter().all(|f| self.has(*f)) && set.elements.iter().any(|k| self.is_key(fields, k)) != *not
            }
            Test::Is { field, values, not } => self.has(*field) && values.iter().any(|v| self.is(*field, v)) != *not,
            Test::Family(family) => Family::of(self.packet.source) == *family,
            Test::New => true,
            Test::Translated => self.packet.translated,
            Test::Answer
            | Test::Known
            | Test::Plain
            | Test::Opens
            | Test::Related
            | Test::Relayed
            | Test::Invalid
            | Test::Flood { .. }
            | Test::Seldom { .. } => false,
        }
    }
}
