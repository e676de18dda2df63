//! What passes between tenants' networks and the host's: tunnels of our hosts, and packets that bear a network's own outside
//! addresses. Tenants reach neither the host nor anything that is closed to them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use nexus_model::plan::HostNetworks;

use super::spans;
use super::table::{Act, Base, Family, Field, Hook, Key, Rule, Table, Test, Value, Verdict};
use super::{address, leads_out, link, local, nat_address};
use crate::firewall::Net;
use crate::instance::LINK_PREFIX;
use crate::vpc::links;

/// The table in the host's namespace.
pub const TABLE: &str = "nexus-vpc";

/// New connections that a network may begin in a second through this host, which all share.
const NEW_CONNECTIONS: (u32, u32) = (20_000, 40_000);
const VXLAN_PORT: u16 = 4789;

/// All rules of the host's namespace; `closed` is what no tenant reaches, however wide its way out.
pub fn host(hosts: &HostNetworks, closed: &[Net]) -> Table {
    let mut table = Table::new(TABLE, false);
    let mut own: BTreeMap<Family, BTreeSet<Key>> = BTreeMap::new();
    let mut leads = own.clone();
    let mut public = own.clone();
    let mut transits = own.clone();
    for plan in &hosts.networks {
        let name = link(links::host(plan.uid));
        let (four, six) = links::transit(plan.vni);
        for (family, transit) in [(Family::V4, IpAddr::from(four)), (Family::V6, six.into())] {
            let own = own.entry(family).or_default();
            own.insert(vec![name.clone(), Value::of(transit)]);
            transits.entry(family).or_default().insert(vec![Value::of(transit)]);
            let lent = plan.nats.iter().filter_map(|n| nat_address(hosts, n, family));
            own.extend(lent.map(|a| vec![name.clone(), Value::of(a)]));
            for floating in plan.floating.iter().filter(|f| Family::of(f.address) == family) {
                public.entry(family).or_default().insert(vec![Value::of(floating.address)]);
                let nic = local(hosts, plan).find(|n| n.uid == floating.nic);
                if nic.is_some_and(|n| address(n, family).is_some()) {
                    own.insert(vec![name.clone(), Value::of(floating.address)]);
                    leads.entry(family).or_default().insert(vec![name.clone(), Value::of(floating.address)]);
                }
            }
        }
    }
    for family in Family::BOTH {
        let digit = family.digit();
        let (source, to) = (Field::Source(family), Field::Destination(family));
        let take = |all: &mut BTreeMap<Family, BTreeSet<Key>>| all.remove(&family).unwrap_or_default();
        table.set(format!("own{digit}"), [Field::LinkIn, source], take(&mut own));
        table.set(format!("leads{digit}"), [Field::LinkOut, to], take(&mut leads));
        table.set(format!("public{digit}"), [to], take(&mut public));
        table.set(format!("transits{digit}"), [source], take(&mut transits));
        let tunnels = hosts.tunnels.iter().filter(|t| Family::of(**t) == family);
        table.set(format!("tunnels{digit}"), [source], tunnels.map(|t| vec![Value::of(*t)]).collect());
        let nets = closed.iter().filter(|(a, _)| Family::of(*a) == family);
        let nets = spans::union(nets.map(|(a, l)| spans::of(&nexus_model::Cidr { address: *a, length: *l })));
        table.set(format!("closed{digit}"), [to], nets.into_iter().map(|(a, b)| vec![Value::Span(a, b)]).collect());
    }
    // Without a way out nothing here is a connection, and no packet pays for the kernel's looking whether it is.
    let ways_out = hosts.networks.iter().any(|n| leads_out(hosts, n));
    tunnels(&mut table, hosts, ways_out);
    if ways_out {
        from_networks(&mut table);
        let masquerade = |f: Family| {
            Rule::new([Test::within([Field::Source(f)], format!("transits{}", f.digit()))], [Act::Masquerade])
        };
        let base = Base { hook: Hook::Postrouting, nat: true, raw: false };
        table.base("leaving", base, Family::BOTH.map(masquerade).to_vec());
    }
    table
}

/// Tunnel packets of our networks come from our hosts. They are no connections: nothing is to be remembered of them. As they are most
/// of what there is, they are looked at once and at nothing else here.
fn tunnels(table: &mut Table, hosts: &HostNetworks, ways_out: bool) {
    let forged = table.refuse("forged_tunnel");
    let spoofed = table.refuse("spoofed_address");
    let to_host = table.refuse("to_host");
    let family = Family::of(hosts.endpoint);
    let tunnel = |end: Field| {
        vec![
            Test::is(Field::Protocol, Value::one(17_u8)),
            Test::is(Field::Port, Value::one(VXLAN_PORT)),
            Test::is(end, Value::of(hosts.endpoint)),
        ]
    };
    let ours = format!("tunnels{}", family.digit());
    let mut from_tenants = Vec::new();
    for family in Family::BOTH.into_iter().filter(|_| ways_out) {
        let own = Test::outside([Field::LinkIn, Field::Source(family)], format!("own{}", family.digit()));
        let near = Test::any(Field::IcmpType(Family::V6), [135, 136]);
        if family == Family::V6 {
            from_tenants.push(Rule::then([near], Verdict::Accept));
        }
        from_tenants.push(Rule::then([Test::Family(family), own], spoofed.clone()));
    }
    if !ways_out {
        // Of a link that is about to go.
        from_tenants.push(Rule::then([], to_host));
    }
    table.chain("from_tenants", from_tenants);
    // First of all: no tenant is one of our hosts.
    let mut arriving = vec![Rule::then([Test::from(links::HOST_PREFIX)], Verdict::Jump("from_tenants".into()))];
    let numbers: Vec<u128> = hosts.networks.iter().map(|n| n.vni.into()).collect();
    let arrives = tunnel(Field::Destination(family));
    let mut known = arrives.clone();
    known.push(Test::within([Field::Source(family)], ours.clone()));
    arriving.push(Rule::new(known, [Act::Untracked, Act::Then(Verdict::Accept)]));
    if !numbers.is_empty() {
        let mut tests = arrives;
        // Other networks' packets are somebody else's.
        tests.push(Test::any(Field::Vni, numbers));
        arriving.push(Rule::then(tests, forged));
    }
    table.base("arriving", Base { hook: Hook::Prerouting, nat: false, raw: true }, arriving);
    let mut sent = tunnel(Field::Source(family));
    sent.push(Test::within([Field::Destination(family)], ours));
    let sent = vec![Rule::new(sent, [Act::Untracked])];
    table.base("tunnelled", Base { hook: Hook::Output, nat: false, raw: true }, sent);
}

fn from_networks(table: &mut Table) {
    let to_host = table.refuse("to_host");
    let closed = table.refuse("closed");
    let flood = table.refuse("flood");
    let not_public = table.refuse("not_public");
    let from = || Test::from(links::HOST_PREFIX);
    let near = [Test::any(Field::IcmpType(Family::V6), [135, 136]), Test::is(Field::HopLimit, Value::one(255_u8))];
    let for_host =
        vec![Rule::then(near, Verdict::Accept), Rule::then([Test::Answer], Verdict::Accept), Rule::then([], to_host)];
    table.chain("for_host", for_host);
    let input = vec![Rule::then([from()], Verdict::goto("for_host"))];
    table.base("input", Base { hook: Hook::Input, nat: false, raw: false }, input);

    let meter = table.flood("connections", NEW_CONNECTIONS.0, NEW_CONNECTIONS.1);
    let mut out = vec![
        Rule::then([Test::Answer], Verdict::Accept),
        Rule::then([Test::Related], Verdict::Accept),
        Rule::then([Test::New, meter], flood),
    ];
    let each = |f: Family, set: &str, verdict: Verdict| {
        Rule::then([Test::within([Field::Destination(f)], format!("{set}{}", f.digit()))], verdict)
    };
    out.extend(Family::BOTH.map(|f| each(f, "public", Verdict::Return)));
    out.push(Rule::then([Test::to(LINK_PREFIX)], closed.clone()));
    out.extend(Family::BOTH.map(|f| each(f, "closed", closed.clone())));
    table.chain("from_network", out);

    let leads = |f: Family| {
        let fields = [Field::LinkOut, Field::Destination(f)];
        Rule::then([Test::within(fields, format!("leads{}", f.digit()))], Verdict::Accept)
    };
    let mut back = vec![Rule::then([Test::Answer], Verdict::Accept), Rule::then([Test::Related], Verdict::Accept)];
    back.extend(Family::BOTH.map(leads));
    back.push(Rule::then([], not_public));
    table.chain("to_network", back);
    let forward = vec![
        Rule::then([from()], Verdict::Jump("from_network".into())),
        Rule::then([Test::to(links::HOST_PREFIX)], Verdict::goto("to_network")),
    ];
    table.base("forward", Base { hook: Hook::Forward, nat: false, raw: false }, forward);
}
