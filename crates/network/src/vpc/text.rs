//! Packet filters as `nft` reads them: each text is one transaction that makes the tables, if they are not there, and replaces
//! them whole. Connection tracking is not touched by that.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use nexus_model::plan::{HostNetworks, NetworkPlan};

use super::links;
use super::rules::table::{
    Act, Base, Chain, Family, Field, Hook, Key, Map, MapTo, Rule, Set, Share, Table, Target, Test, Value, Verdict,
};
use super::rules::{self, local};
use super::want::PORT;
use crate::firewall::Net;
use crate::fnv;
use crate::instance::LINK_PREFIX;
use crate::netlink::Class;

/// The netfilter log group to which a network's namespace tells its flows.
pub const FLOW_GROUP: u16 = 1;

/// So many ARP questions of a NIC are answered in a second.
const ARP_RATE: (u32, u32) = (50, 100);

/// What connections are marked with that these rules let through: another, when the rules are others.
const GENERATION: &str = "$generation";

/// A target's place by its client: the same after each replacement.
const HASH_SEED: u32 = 0x6e78;

/// The tables `inet nexus` and `arp nexus` of one network's namespace on this host.
pub fn network_text(hosts: &HostNetworks, plan: &NetworkPlan) -> String {
    let mut out = text(&rules::network(hosts, plan));
    arp(&mut out, hosts, plan);
    out
}

/// The table `inet nexus-vpc` of the host's namespace. No tenant reaches what is `closed`.
pub fn host_text(hosts: &HostNetworks, closed: &[Net]) -> String {
    text(&rules::host(hosts, closed))
}

/// Chains of the same table that say of what the host sends whose it is, where its link is shared out. What a tenant writes into
/// its packets does not count: an inner packet's class is not the tunnel's, and what is passed on is the tenants'.
pub fn shared_text() -> String {
    let (table, up, instance, port) = (rules::HOST_TABLE, links::HOST_PREFIX, LINK_PREFIX, PORT);
    let (control, tenants) = (Class::Control, Class::Tenants);
    format!(
        "table inet {table} {{
 chain share_sent {{
  type filter hook output priority mangle; policy accept;
  udp dport {port} meta priority set {tenants} accept
  ip dscp cs6 meta priority set {control}
  ip6 dscp cs6 meta priority set {control}
 }}
 chain share_passed {{
  type filter hook forward priority mangle; policy accept;
  iifname \"{up}*\" meta priority set {tenants}
  iifname \"{instance}*\" meta priority set {tenants}
 }}
}}
"
    )
}

/// Nobody says that another's address is theirs, but for NICs that forward, which ask by the addresses for which they do. It
/// would change nothing, for neighbours are as planned; but it is counted, and a flood of questions ends here.
fn arp(out: &mut String, hosts: &HostNetworks, plan: &NetworkPlan) {
    let own = local(hosts, plan)
        .filter_map(|n| Some(format!("\"{}\" . {} . {}", links::nic(n.uid), n.mac, n.address4?)))
        .collect::<Vec<_>>();
    let probes = local(hosts, plan).map(|n| format!("\"{}\" . {} . 0.0.0.0", links::nic(n.uid), n.mac));
    let forwarders = local(hosts, plan).filter(|n| n.forwards).map(|n| format!("\"{}\"", links::nic(n.uid)));
    let own = own.into_iter().chain(probes).collect::<BTreeSet<_>>();
    let (nics, table, (rate, burst)) = (links::NIC_PREFIX, rules::TABLE, ARP_RATE);
    let _ = write!(
        out,
        "table arp {table}
delete table arp {table}
table arp {table} {{
 counter drop_arp_flood {{ }}
 counter drop_arp_spoofed {{ }}
 set asks {{ type ifname; size 65535; flags dynamic; timeout 1m; }}
 set forwarders {{ type ifname;{} }}
 set own {{ type ifname . ether_addr . ipv4_addr;{} }}
 chain input {{
  type filter hook input priority filter; policy accept;
  iifname \"{nics}*\" update @asks {{ iifname limit rate over {rate}/second burst {burst} packets }} counter name drop_arp_flood drop
  iifname \"{nics}*\" iifname . arp saddr ether . arp saddr ip != @own iifname != @forwarders counter name drop_arp_spoofed drop
 }}
}}
",
        elements(forwarders),
        elements(own)
    );
}

/// A table and its replacement.
pub fn text(table: &Table) -> String {
    let name = format!("inet {}", table.name);
    let mut out = format!("table {name}\ndelete table {name}\ntable {name} {{\n");
    let mut salted = table.salt.to_be_bytes().to_vec();
    for counter in &table.counters {
        let _ = writeln!(out, " counter {counter} {{ }}");
    }
    for meter in &table.meters {
        let _ = writeln!(out, " set {meter} {{ type ifname; size 65535; flags dynamic; timeout 1m; }}");
    }
    for (name, set) in &table.sets {
        set_text(&mut out, name, set);
    }
    // A verdict is of a chain that must be there: maps follow the chains, whose rules may name maps. `nft` sorts it out.
    for (name, map) in &table.maps {
        map_text(&mut out, name, map);
    }
    for (name, chain) in &table.chains {
        chain_text(&mut out, name, chain);
    }
    out.push_str("}\n");
    if out.contains(GENERATION) {
        salted.extend(out.as_bytes());
        // None of the marks that have other meanings.
        let generation = fnv(&salted) as u32 | 1 << 31;
        out.insert_str(0, &format!("define generation = {generation:#x}\n"));
    }
    out
}

pub(super) fn elements(all: impl IntoIterator<Item = String>) -> String {
    let all: Vec<String> = all.into_iter().collect();
    if all.is_empty() { String::new() } else { format!(" elements = {{ {} }};", all.join(", ")) }
}

fn type_of(field: Field) -> &'static str {
    match field {
        Field::LinkIn | Field::LinkOut => "ifname",
        Field::MacSource => "ether_addr",
        Field::Source(Family::V4) | Field::Destination(Family::V4) => "ipv4_addr",
        Field::Source(Family::V6) | Field::Destination(Family::V6) => "ipv6_addr",
        Field::Protocol => "inet_proto",
        Field::SourcePort | Field::Port => "inet_service",
        Field::IcmpType(Family::V4) => "icmp_type",
        Field::IcmpType(Family::V6) => "icmpv6_type",
        Field::Mark => "mark",
        // Without types in `nft`, hence in no named set.
        Field::HopLimit | Field::Vni => "integer",
    }
}

fn types(fields: &[Field]) -> String {
    fields.iter().map(|f| type_of(*f)).collect::<Vec<_>>().join(" . ")
}

fn name_of(field: Field) -> &'static str {
    match field {
        Field::LinkIn => "iifname",
        Field::LinkOut => "oifname",
        Field::MacSource => "ether saddr",
        Field::Source(Family::V4) => "ip saddr",
        Field::Source(Family::V6) => "ip6 saddr",
        Field::Destination(Family::V4) => "ip daddr",
        Field::Destination(Family::V6) => "ip6 daddr",
        Field::Protocol => "meta l4proto",
        Field::SourcePort => "th sport",
        Field::Port => "th dport",
        Field::IcmpType(Family::V4) => "icmp type",
        Field::IcmpType(Family::V6) => "icmpv6 type",
        Field::HopLimit => "ip6 hoplimit",
        Field::Mark => "meta mark",
        // Behind the UDP header (64 bits) and VXLAN's flags (32).
        Field::Vni => "@th,96,24",
    }
}

fn names(fields: &[Field]) -> String {
    fields.iter().map(|f| name_of(*f)).collect::<Vec<_>>().join(" . ")
}

fn value(field: Field, value: &Value) -> String {
    match (value, field) {
        (Value::Link(name), _) => format!("\"{name}\""),
        (Value::Links(prefix), _) => format!("\"{prefix}*\""),
        (Value::Mac(mac), _) => mac.to_string(),
        (Value::Span(first, last), Field::Source(family) | Field::Destination(family)) => span(family, *first, *last),
        (Value::Span(first, last), _) if first == last => first.to_string(),
        (Value::Span(first, last), _) => format!("{first}-{last}"),
    }
}

fn span(family: Family, first: u128, last: u128) -> String {
    let address = family.address(first);
    if first == last {
        return address.to_string();
    }
    // A network, if it is one: shorter, and all addresses can't be said otherwise.
    let width = (last - first).checked_add(1);
    let rest = width.map_or(128, u128::trailing_zeros);
    let whole = width.is_none_or(|w| w.is_power_of_two() && first & (w - 1) == 0);
    let bits = if family == Family::V6 { 128 } else { 32 };
    if whole { format!("{address}/{}", bits - rest) } else { format!("{address}-{}", family.address(last)) }
}

fn key(fields: &[Field], key: &Key) -> String {
    fields.iter().zip(key).map(|(f, v)| value(*f, v)).collect::<Vec<_>>().join(" . ")
}

/// Whether any is more than a point: such sets are kept in another way, and looking into them costs more.
fn flags<'a>(keys: impl IntoIterator<Item = &'a Key>) -> &'static str {
    let wide = |v: &Value| matches!(v, Value::Span(first, last) if first != last);
    if keys.into_iter().flatten().any(wide) { " flags interval;" } else { "" }
}

fn set_text(out: &mut String, name: &str, set: &Set) {
    let all = elements(set.elements.iter().map(|k| key(&set.fields, k)));
    let _ = writeln!(out, " set {name} {{ type {};{}{all} }}", types(&set.fields), flags(&set.elements));
}

fn map_text(out: &mut String, name: &str, map: &Map) {
    let to = match map.to {
        MapTo::Verdicts => "verdict",
        MapTo::Addresses(Family::V4) => "ipv4_addr",
        MapTo::Addresses(Family::V6) => "ipv6_addr",
    };
    let target = |t: &Target| match t {
        Target::Verdict(v) => verdict(v),
        Target::Address(a) => a.to_string(),
    };
    let all = elements(map.elements.iter().map(|(k, t)| format!("{} : {}", key(&map.fields, k), target(t))));
    let _ = writeln!(out, " map {name} {{ type {} : {to};{}{all} }}", types(&map.fields), flags(map.elements.keys()));
}

fn verdict(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Accept => "accept".into(),
        Verdict::Drop => "drop".into(),
        Verdict::Return => "return".into(),
        Verdict::Jump(chain) => format!("jump {chain}"),
        Verdict::Goto(chain) => format!("goto {chain}"),
    }
}

fn chain_text(out: &mut String, name: &str, chain: &Chain) {
    let _ = writeln!(out, " chain {name} {{");
    if let Some(Base { hook, nat, raw }) = chain.base {
        let kind = if nat { "nat" } else { "filter" };
        let (hook, priority) = match (hook, nat, raw) {
            (Hook::Prerouting, true, _) => ("prerouting", "dstnat"),
            (Hook::Prerouting, false, true) => ("prerouting", "raw"),
            (Hook::Prerouting, false, false) => ("prerouting", "mangle"),
            (Hook::Input, ..) => ("input", "filter"),
            (Hook::Forward, ..) => ("forward", "filter"),
            (Hook::Output, _, true) => ("output", "raw"),
            (Hook::Output, ..) => ("output", "filter"),
            (Hook::Postrouting, ..) => ("postrouting", "srcnat"),
        };
        let _ = writeln!(out, "  type {kind} hook {hook} priority {priority}; policy accept;");
    }
    for rule in &chain.rules {
        let _ = writeln!(out, "  {}", rule_text(rule));
    }
    out.push_str(" }\n");
}

fn rule_text(rule: &Rule) -> String {
    let words: Vec<String> = rule.tests.iter().map(test).chain(rule.acts.iter().map(act)).collect();
    words.join(" ")
}

fn test(test: &Test) -> String {
    let sign = |not: &bool| if *not { "!= " } else { "" };
    match test {
        Test::Within { fields, set, not } => format!("{} {}@{set}", names(fields), sign(not)),
        Test::Is { field, values, not } => {
            let all: Vec<String> = values.iter().map(|v| value(*field, v)).collect();
            match &all[..] {
                [one] => format!("{} {}{one}", name_of(*field), sign(not)),
                all => format!("{} {}{{ {} }}", name_of(*field), sign(not), all.join(", ")),
            }
        }
        Test::Family(Family::V4) => "meta nfproto ipv4".into(),
        Test::Family(Family::V6) => "meta nfproto ipv6".into(),
        Test::Answer => "ct direction reply ct state established,related".into(),
        Test::Related => "ct state related".into(),
        Test::Invalid => "ct state invalid".into(),
        Test::Known => format!("ct mark {GENERATION}"),
        Test::New => "ct state new".into(),
        Test::Translated => "ct status dnat".into(),
        Test::Plain => "tcp flags ! fin,syn,rst ct status ! snat,dnat".into(),
        Test::Opens => "tcp flags & syn != 0".into(),
        Test::Relayed => "socket transparent 1".into(),
        Test::Flood { meter, rate, burst } => {
            format!("update @{meter} {{ iifname limit rate over {rate}/second burst {burst} packets }}")
        }
        Test::Seldom { rate, burst } => format!("limit rate {rate}/second burst {burst} packets"),
    }
}

fn act(act: &Act) -> String {
    let ip = |family: &Family| if *family == Family::V6 { "ip6" } else { "ip" };
    match act {
        Act::Then(then) => verdict(then),
        Act::ByMap { fields, map } => format!("{} vmap @{map}", names(fields)),
        Act::Destination { family, fields, map } => format!("dnat {} to {} map @{map}", ip(family), names(fields)),
        Act::Source { family, fields, map } => format!("snat {} to {} map @{map}", ip(family), names(fields)),
        Act::From(address) => format!("snat {} to {address}", ip(&Family::of(*address))),
        Act::Balance { family, by_source, shares } => balance(*family, *by_source, shares),
        Act::Masquerade => "masquerade".into(),
        Act::Mark(mark) => format!("meta mark set {mark}"),
        Act::Remember => format!("ct mark set {GENERATION}"),
        Act::MayBeNoted => format!("meta mark set {GENERATION}"),
        Act::Segments(most) => format!("tcp option maxseg size set {most}"),
        Act::Count(name) => format!("counter name {name}"),
        Act::Tell(words) => format!("log prefix \"{words}\" group {FLOW_GROUP}"),
        Act::Untracked => "notrack".into(),
    }
}

fn balance(family: Family, by_source: bool, shares: &[Share]) -> String {
    let ip = if family == Family::V6 { "ip6" } else { "ip" };
    if let [only] = shares {
        return match family {
            Family::V4 => format!("dnat {ip} to {}:{}", only.address, only.port),
            Family::V6 => format!("dnat {ip} to [{}]:{}", only.address, only.port),
        };
    }
    let sum: u32 = shares.iter().map(|s| s.weight).sum();
    let mut from = 0;
    let share = |s: &Share| {
        let span = if s.weight == 1 { from.to_string() } else { format!("{from}-{}", from + s.weight - 1) };
        from += s.weight;
        format!("{span} : {} . {}", s.address, s.port)
    };
    let all: Vec<String> = shares.iter().map(share).collect();
    let choice = if by_source {
        format!("jhash {ip} saddr mod {sum} seed {HASH_SEED:#x}")
    } else {
        format!("numgen inc mod {sum}")
    };
    format!("dnat {ip} to {choice} map {{ {} }}", all.join(", "))
}
