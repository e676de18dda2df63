//! Security groups as chains: all rules of a NIC's groups in their order, written so that many cost as little as few.
//!
//! Neighbours in that order which say the same, all "allow" or all "deny", may trade places. Such a run becomes a handful of
//! lookups, whatever its length: one for ports that are open to all, one for networks that may do all, one for networks with
//! ports, and one for each group that is named as the other side.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nexus_model::plan::{Direction, GroupPlan, NetworkPlan, Remote, RulePlan, RuleProtocol};

use super::spans::{self, Span};
use super::table::{Family, Field, Key, Rule, Table, Test, Value, Verdict, number};

/// A set of networks with ports may grow so large; a run that needs more is looked up in parts.
const MAX_ELEMENTS: usize = 32 << 10;
/// So many groups as other sides of a run are looked up one by one; the members of more are written out.
const MAX_LOOKUPS: usize = 16;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// A rule with the group that it is of.
#[derive(Debug, Clone, Copy)]
pub struct Ranked<'a> {
    pub group: &'a GroupPlan,
    pub rule: &'a RulePlan,
}

/// The rules of groups together, in the order in which they are looked at.
pub fn merged<'a>(plan: &'a NetworkPlan, groups: &[u32], direction: Direction) -> Vec<Ranked<'a>> {
    let mut all: Vec<(u32, Ranked<'a>)> = Vec::new();
    for &index in groups {
        let Some(group) = plan.groups.get(index as usize) else { continue };
        let own = group.rules.iter().filter(|r| r.direction == direction);
        all.extend(own.map(|rule| (index, Ranked { group, rule })));
    }
    all.sort_by(|(a, x), (b, y)| {
        (x.rule.priority, x.rule.allow, a, &x.rule.id).cmp(&(y.rule.priority, y.rule.allow, b, &y.rule.id))
    });
    all.into_iter().map(|(_, ranked)| ranked).collect()
}

/// The rule that decides about a packet whose other side is `other`: the plain reading of the plan, by which the chains are
/// checked and their decisions named.
pub fn decides<'a>(
    plan: &NetworkPlan,
    rules: &[Ranked<'a>],
    other: IpAddr,
    protocol: u8,
    port: u16,
) -> Option<Ranked<'a>> {
    let family = Family::of(other);
    rules.iter().copied().find(|ranked| {
        let rule = ranked.rule;
        let ports = services(rule, family);
        let service = ports.is_none_or(|p| {
            p.iter().any(|(n, first, last)| *n == protocol && (*n == family.icmp() || (*first..=*last).contains(&port)))
        });
        let remote = |remote: &Remote| match remote {
            Remote::Cidr(net) => {
                let (first, last) = spans::of(net);
                Family::of(net.address) == family && (first..=last).contains(&number(other))
            }
            Remote::Group(group) => members(plan, *group, family).any(|m| m == other),
        };
        service && (rule.remotes.is_empty() || rule.remotes.iter().any(remote))
    })
}

/// The addresses of a group's NICs, on all hosts.
pub fn members(plan: &NetworkPlan, group: u32, family: Family) -> impl Iterator<Item = IpAddr> {
    let of_group = plan.nics.iter().filter(move |n| n.groups.contains(&group));
    of_group.filter_map(move |n| match family {
        Family::V4 => n.address4.map(IpAddr::from),
        Family::V6 => n.address6.map(IpAddr::from),
    })
}

/// A protocol and its ports, the last included.
type Service = (u8, u16, u16);

/// What a rule is about: nothing means everything.
fn services(rule: &RulePlan, family: Family) -> Option<Vec<Service>> {
    let protocols: &[u8] = match rule.protocol {
        RuleProtocol::Any if rule.ports.is_empty() => return None,
        RuleProtocol::Any => &[TCP, UDP],
        RuleProtocol::Tcp => &[TCP],
        RuleProtocol::Udp => &[UDP],
        RuleProtocol::Icmp => return Some(vec![(family.icmp(), 0, u16::MAX)]),
    };
    let all = [(0, u16::MAX)];
    let ports = if rule.ports.is_empty() { &all[..] } else { &rule.ports };
    Some(protocols.iter().flat_map(|p| ports.iter().map(move |(first, last)| (*p, *first, *last))).collect())
}

/// Each once, without overlaps.
fn tidy(services: impl IntoIterator<Item = Service>) -> Vec<Service> {
    let mut by_protocol: BTreeMap<u8, Vec<Span>> = BTreeMap::new();
    for (protocol, first, last) in services {
        by_protocol.entry(protocol).or_default().push((first.into(), last.into()));
    }
    let ports = |(protocol, all): (u8, Vec<Span>)| {
        // Both were 16 bits before.
        spans::union(all).into_iter().map(move |(first, last)| (protocol, first as u16, last as u16))
    };
    by_protocol.into_iter().flat_map(ports).collect()
}

fn service_key((protocol, first, last): Service) -> [Value; 2] {
    [Value::one(protocol), Value::Span(first.into(), last.into())]
}

/// What the rules of a chain lead to.
pub struct Outcome {
    pub denied: Verdict,
    pub unmatched: Verdict,
}

/// The chain of one family for these rules: what is let through returns, all else is refused.
pub fn chain(
    table: &mut Table,
    plan: &NetworkPlan,
    rules: &[Ranked<'_>],
    (direction, family): (Direction, Family),
    outcome: &Outcome,
) -> Vec<Rule> {
    let other = match direction {
        Direction::Ingress => Field::Source(family),
        Direction::Egress => Field::Destination(family),
    };
    let mut out = Vec::new();
    for run in rules.chunk_by(|a, b| a.rule.allow == b.rule.allow) {
        let verdict = if run[0].rule.allow { Verdict::Return } else { outcome.denied.clone() };
        let parts: Vec<Part> = run.iter().filter_map(|r| Part::of(plan, r.rule, family)).collect();
        if parts.iter().any(|p| p.from.is_none() && p.services.is_none()) {
            out.push(Rule::then([], verdict));
            return out;
        }
        lookups(table, plan, &parts, (other, family), &verdict, &mut out);
    }
    out.push(Rule::then([], outcome.unmatched.clone()));
    out
}

/// A rule for one family.
struct Part {
    /// Networks; nothing means all. Groups are beside them.
    from: Option<Vec<Span>>,
    groups: BTreeSet<u32>,
    /// Nothing means all.
    services: Option<Vec<Service>>,
}

impl Part {
    /// Nothing, if the rule matches no packet of the family.
    fn of(plan: &NetworkPlan, rule: &RulePlan, family: Family) -> Option<Self> {
        let services = services(rule, family).map(tidy);
        if rule.remotes.is_empty() {
            return Some(Self { from: None, groups: BTreeSet::new(), services });
        }
        let nets = rule.remotes.iter().filter_map(|r| if let Remote::Cidr(net) = r { Some(net) } else { None });
        let from = spans::nets(nets, family);
        if from == [(0, family.last())] {
            return Some(Self { from: None, groups: BTreeSet::new(), services });
        }
        let groups = rule.remotes.iter().filter_map(|r| if let Remote::Group(group) = r { Some(*group) } else { None });
        let groups: BTreeSet<u32> = groups.filter(|g| members(plan, *g, family).next().is_some()).collect();
        let matches = !from.is_empty() || !groups.is_empty();
        matches.then_some(Self { from: Some(from), groups, services })
    }
}

/// The set of a group's members, made when it is first asked for.
fn members_set(table: &mut Table, plan: &NetworkPlan, group: u32, family: Family, field: Field) -> String {
    let name = format!("members{group}_{}", family.digit());
    if !table.sets.contains_key(&name) {
        let elements = members(plan, group, family).map(|a| vec![Value::of(a)]).collect();
        table.set(name.clone(), [field], elements);
    }
    name
}

fn lookups(
    table: &mut Table,
    plan: &NetworkPlan,
    parts: &[Part],
    (other, family): (Field, Family),
    verdict: &Verdict,
    out: &mut Vec<Rule>,
) {
    const SERVICE: [Field; 2] = [Field::Protocol, Field::Port];
    let mut push = |test: Vec<Test>| out.push(Rule::then(test, verdict.clone()));

    let for_all = tidy(parts.iter().filter(|p| p.from.is_none()).flat_map(|p| p.services.iter().flatten().copied()));
    if !for_all.is_empty() {
        let set = table.shared(SERVICE, for_all.into_iter().map(|s| service_key(s).to_vec()).collect());
        push(vec![Test::within(SERVICE, set)]);
    }

    let named: BTreeSet<u32> = parts.iter().flat_map(|p| p.groups.iter().copied()).collect();
    let write_out = named.len() > MAX_LOOKUPS;
    let sources = |part: &Part| -> Vec<Span> {
        let mut all = part.from.clone().unwrap_or_default();
        if write_out {
            let each = part.groups.iter().flat_map(|g| members(plan, *g, family));
            all.extend(each.map(|a| (number(a), number(a))));
        }
        spans::union(all)
    };
    let whole = parts.iter().filter(|p| p.from.is_some() && p.services.is_none());
    let whole = spans::union(whole.flat_map(&sources));
    if !whole.is_empty() {
        let set = table.shared([other], whole.into_iter().map(|(a, b)| vec![Value::Span(a, b)]).collect());
        push(vec![Test::within([other], set)]);
    }

    let partly: Vec<&Part> = parts.iter().filter(|p| p.from.is_some() && p.services.is_some()).collect();
    let mut todo: Vec<&[&Part]> = vec![&partly];
    let fields = [other, SERVICE[0], SERVICE[1]];
    while let Some(some) = todo.pop() {
        match boxes(some, &sources) {
            Some(elements) if elements.is_empty() => {}
            Some(elements) => {
                let set = table.shared(fields, elements);
                push(vec![Test::within(fields, set)]);
            }
            None => {
                let (first, second) = some.split_at(some.len() / 2);
                todo.extend([second, first]);
            }
        }
    }

    if write_out {
        return;
    }
    for group in named {
        let of_group = || parts.iter().filter(|p| p.groups.contains(&group));
        let set = members_set(table, plan, group, family, other);
        if of_group().any(|p| p.services.is_none()) {
            push(vec![Test::within([other], set)]);
            continue;
        }
        let services = tidy(of_group().flat_map(|p| p.services.iter().flatten().copied()));
        let services = table.shared(SERVICE, services.into_iter().map(|s| service_key(s).to_vec()).collect());
        push(vec![Test::within([other], set), Test::within(SERVICE, services)]);
    }
}

/// Networks with their ports, none overlapping another; nothing, if there were too many.
fn boxes(parts: &[&Part], sources: &impl Fn(&Part) -> Vec<Span>) -> Option<BTreeSet<Key>> {
    let spans: Vec<Vec<Span>> = parts.iter().map(|p| sources(p)).collect();
    let mut merged: Vec<(Span, Vec<Service>)> = Vec::new();
    let mut count = 0;
    for (span, over) in spans::pieces(&spans) {
        let services = tidy(over.into_iter().flat_map(|n| parts[n].services.iter().flatten().copied()));
        match merged.last_mut() {
            Some((before, same)) if before.1.checked_add(1) == Some(span.0) && *same == services => before.1 = span.1,
            _ => {
                count += services.len();
                // A single rule is as it is.
                if count > MAX_ELEMENTS && parts.len() > 1 {
                    return None;
                }
                merged.push((span, services));
            }
        }
    }
    let element = |((first, last), services): (Span, Vec<Service>)| {
        let key = move |service| [vec![Value::Span(first, last)], service_key(service).to_vec()].concat();
        services.into_iter().map(key)
    };
    Some(merged.into_iter().flat_map(element).collect())
}
