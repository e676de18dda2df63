//! What is written for the kernel, and that the kernel takes it.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use nexus_model::plan::{Direction, NetworkPlan, NicPlan, Remote, RulePlan, RuleProtocol, Via};
use nexus_network::vpc::rules::table::{Act, Family, Field, Hook, Table, Test, Value};
use nexus_network::vpc::verdict::walk::{Choice, Packet, hook};
use nexus_network::vpc::{links, rules, text};
use proptest::prelude::*;

use super::plans::*;
use crate::{inside, isolated};
use nexus_network::NetnsRef;

/// Gives a text to `nft` in a namespace.
pub fn apply(netns: &NetnsRef, text: String) {
    inside(netns, move || {
        use std::io::Write as _;
        let mut command = std::process::Command::new("nft");
        command.args(["-f", "-"]).stdin(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let numbered: Vec<String> = text.lines().enumerate().map(|(n, l)| format!("{} {l:.200}", n + 1)).collect();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said:.4000}\n{}", numbered.join("\n"));
    });
}

/// A network with one of everything.
pub fn rich() -> Vec<Arc<NetworkPlan>> {
    let (mut a, mut b) = (network(1), network(2));
    let mut web = rule("web", Direction::Ingress);
    (web.protocol, web.ports, web.remotes) =
        (RuleProtocol::Tcp, vec![(80, 80), (8000, 8010)], vec![net("10.0.0.0/8"), Remote::Group(1)]);
    let mut ping = rule("ping", Direction::Ingress);
    (ping.protocol, ping.remotes) = (RuleProtocol::Icmp, vec![net("::/0")]);
    let mut deny = rule("deny", Direction::Ingress);
    (deny.allow, deny.priority, deny.remotes) = (false, 10, vec![net("10.9.0.0/16"), net("fd00:9::/32")]);
    a.groups = vec![group(1, 0, vec![web, ping, deny, everything(Direction::Egress)]), open_group(1, 1)];
    a.nics = vec![nic(1, 2, 0, &[0]), nic(1, 3, 1, &[1]), nic(1, 4, 0, &[0, 1])];
    a.nics[2].forwards = true;
    a.flow_logs = nexus_model::plan::FlowLogs::All;
    b.groups = vec![open_group(2, 0)];
    b.nics = vec![nic(2, 2, 0, &[0])];
    peer(&mut a, &mut b, 0);
    nat(&mut a, vec![(host_name(0), "203.0.113.9".parse().unwrap())]);
    route(&mut a, "0.0.0.0/0", Via::Nat(0));
    route(&mut a, "::/0", Via::Nat(0));
    route(&mut a, "8.8.0.0/16", Via::Internet);
    let first = a.nics[0].uid;
    floating(&mut a, "203.0.113.5".parse().unwrap(), first);
    floating(&mut a, "2001:db8::5".parse().unwrap(), first);
    let four = |n| IpAddr::from(address4(1, n));
    balancer(&mut a, four(200), 80, false, &[(four(2), 8080, 2), (four(3), 8080, 4)]);
    balancer(&mut a, four(201), 80, true, &[(four(2), 8080, 1), (four(3), 8080, 1)]);
    balancer(
        &mut a,
        address6(1, 200).into(),
        80,
        false,
        &[(address6(1, 2).into(), 8080, 1), (address6(1, 3).into(), 1, 1)],
    );
    let two = IpAddr::from(address4(2, 200));
    balancer(&mut b, two, 443, false, &[(address4(2, 2).into(), 8443, 1)]);
    b.balancers[0].listeners[0].check = Some(nexus_model::kind::BalancerCheck::default());
    vec![Arc::new(a), Arc::new(b)]
}

#[test]
fn the_kernel_takes_one_of_everything_and_replaces_it() {
    isolated("rules::text::the_kernel_takes_one_of_everything_and_replaces_it", async || {
        let networks = rich();
        for host in 0..2 {
            let hosts = on_host(host, 2, &networks);
            for plan in &networks {
                for _ in 0..2 {
                    apply(&NetnsRef::Own, text::network_text(&hosts, plan));
                }
            }
            let closed = nexus_network::firewall::never();
            for _ in 0..2 {
                apply(&NetnsRef::Own, text::host_text(&hosts, &closed));
            }
        }
        // Nothing at all is a text, too.
        apply(&NetnsRef::Own, text::network_text(&on_host(0, 1, &[]), &network(3)));
        apply(&NetnsRef::Own, text::host_text(&on_host(0, 1, &[]), &[]));
    });
}

#[test]
fn a_thousand_rules_are_a_few_lookups() {
    isolated("rules::text::a_thousand_rules_are_a_few_lookups", async || {
        let mut plan = network(1);
        let rules = (0..1000_u16).map(|n| {
            let mut rule = rule(&format!("rule-{n}"), Direction::Ingress);
            (rule.priority, rule.protocol) = (n, if n % 2 == 0 { RuleProtocol::Tcp } else { RuleProtocol::Udp });
            rule.ports = vec![(n, n + 10)];
            rule.remotes =
                vec![net(&format!("10.{}.{}.0/{}", n % 200, n / 200, 16 + n % 9)), Remote::Group(u32::from(n % 20))];
            rule
        });
        plan.groups = vec![group(1, 0, rules.collect())];
        plan.groups.extend((1..20).map(|n| group(1, n, Vec::new())));
        plan.nics = (2..200).map(|n| nic(1, n, 0, &[0, 1 + u32::from(n) % 19])).collect();
        let networks = [Arc::new(plan)];
        let hosts = on_host(0, 1, &networks);
        let table = rules::network(&hosts, &networks[0]);
        let (_, chain) = table.chains.iter().find(|(name, _)| name == "ingress0_4").unwrap();
        assert!(chain.rules.len() <= 30, "{} lookups", chain.rules.len());
        apply(&NetnsRef::Own, text::network_text(&hosts, &networks[0]));
    });
}

/// What a packet between two NICs meets in the table of the second one's host.
fn received(table: &Table, from: IpAddr, to: &NicPlan, protocol: u8, port: u16) -> Result<(), String> {
    let destination = if from.is_ipv6() { to.address6.unwrap().into() } else { to.address4.unwrap().into() };
    let mut packet = Packet {
        link_in: links::TUNNEL.into(),
        link_out: links::nic(to.uid),
        mac: None,
        source: from,
        destination,
        protocol,
        source_port: 40_000,
        port,
        icmp: None,
        hop_limit: 64,
        mark: 0,
        vni: 0,
        translated: false,
    };
    hook(table, Hook::Forward, &mut packet, &mut Choice::default())
}

fn any_rule(groups: u32) -> impl Strategy<Value = RulePlan> {
    let protocol = prop_oneof![
        Just(RuleProtocol::Any),
        Just(RuleProtocol::Tcp),
        Just(RuleProtocol::Udp),
        Just(RuleProtocol::Icmp)
    ];
    let ports = prop::collection::vec((0_u16..6, 0_u16..3).prop_map(|(a, more)| (a, a + more)), 0..3);
    let remote = prop_oneof![
        (0..groups).prop_map(Remote::Group),
        (0_u8..8, 29_u8..=32).prop_map(|(n, length)| net(&format!("10.1.0.{n}/{length}"))),
        (0_u8..8, 125_u8..=128).prop_map(|(n, length)| net(&format!("fd00:1::{n}/{length}"))),
        Just(net("0.0.0.0/0")),
    ];
    (0_u16..4, any::<bool>(), protocol, ports, prop::collection::vec(remote, 0..4)).prop_map(
        |(priority, allow, protocol, ports, remotes)| {
            let ports = if matches!(protocol, RuleProtocol::Tcp | RuleProtocol::Udp) { ports } else { Vec::new() };
            RulePlan { priority, allow, protocol, ports, remotes, ..rule("some", Direction::Ingress) }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// However rules are merged, what they do is what the plain reading of them says.
    #[test]
    fn merged_rules_decide_as_the_first_that_matches(
        first in prop::collection::vec(any_rule(3), 0..12),
        second in prop::collection::vec(any_rule(3), 0..6),
        packets in prop::collection::vec((2_u8..8, any::<bool>(), prop_oneof![Just(6_u8), Just(17), Just(1), Just(58), Just(50)], 0_u16..9), 40),
    ) {
        let mut plan = network(1);
        let named = |rules: Vec<RulePlan>| {
            rules.into_iter().enumerate().map(|(n, r)| RulePlan { id: name(&format!("r{n}")), ..r }).collect()
        };
        plan.groups = vec![group(1, 0, named(first)), group(1, 1, named(second)), group(1, 2, Vec::new())];
        plan.nics = (2..8).map(|n| nic(1, n, u8::from(n > 4), &[u32::from(n) % 3])).collect();
        plan.nics[0].groups = vec![0, 1];
        let to = plan.nics[0].clone();
        let merged = rules::merged(&plan, &to.groups, Direction::Ingress);
        let hosts = on_host(0, 2, &[Arc::new(plan.clone())]);
        let table = rules::network(&hosts, &plan);
        for (from, six, protocol, port) in packets {
            let from: IpAddr = if six { address6(1, from).into() } else { address4(1, from).into() };
            // The other family's ICMP is no ICMP.
            if matches!((six, protocol), (true, 1) | (false, 58)) {
                continue;
            }
            let plain = rules::decides(&plan, &merged, from, protocol, port);
            let expected = match plain {
                Some(r) if r.rule.allow => Ok(()),
                Some(_) => Err("ingress_denied".to_owned()),
                None => Err("no_ingress_rule".to_owned()),
            };
            prop_assert_eq!(received(&table, from, &to, protocol, port), expected, "{} {} {}: {:?}", from, protocol, port, plain);
        }
    }
}

/// How many base chains a table has that change addresses, and how many after the raw ones that pass judgement.
fn hooks(table: &Table) -> (usize, usize) {
    let bases = || table.chains.iter().filter_map(|(_, c)| c.base);
    (bases().filter(|b| b.nat).count(), bases().filter(|b| !b.nat && !b.raw).count())
}

#[test]
fn a_packet_meets_no_hook_that_its_network_does_not_need() {
    let mut plain = network(1);
    plain.groups = vec![open_group(1, 0)];
    plain.nics = vec![nic(1, 2, 0, &[0])];
    let of = |networks: Vec<NetworkPlan>| {
        let networks: Vec<_> = networks.into_iter().map(Arc::new).collect();
        let hosts = on_host(0, 2, &networks);
        (hooks(&rules::network(&hosts, &networks[0])).0, hooks(&rules::host(&hosts, &[])))
    };
    assert_eq!(of(vec![plain.clone()]), (0, (0, 0)));
    let mut balanced = plain.clone();
    balancer(&mut balanced, address4(1, 200).into(), 80, false, &[(address4(1, 2).into(), 8080, 1)]);
    assert_eq!(of(vec![balanced]), (2, (0, 0)), "a balancer is the network's own");
    let (mut here, mut there) = (plain.clone(), network(2));
    peer(&mut here, &mut there, 0);
    assert_eq!(of(vec![here.clone(), there.clone()]), (0, (0, 0)));
    balancer(&mut there, address4(2, 200).into(), 80, false, &[(address4(2, 2).into(), 8080, 1)]);
    assert_eq!(of(vec![here, there]), (2, (0, 0)), "a peer's balancer is done by the client's host");
    for via in [Via::Internet, Via::Nat(0)] {
        let mut out = plain.clone();
        nat(&mut out, Vec::new());
        route(&mut out, "0.0.0.0/0", via);
        assert_eq!(of(vec![out]), (2, (1, 2)), "{via:?}");
    }
    let mut known = plain.clone();
    let nic = known.nics[0].uid;
    floating(&mut known, "203.0.113.5".parse().unwrap(), nic);
    assert_eq!(of(vec![known]), (2, (1, 2)));
}

#[test]
fn no_tenant_speaks_as_another_host_whether_there_is_a_way_out_or_not() {
    for ways_out in [false, true] {
        let mut plan = network(1);
        if ways_out {
            route(&mut plan, "0.0.0.0/0", Via::Internet);
        }
        let networks = [Arc::new(plan)];
        let table = rules::host(&on_host(0, 2, &networks), &[]);
        let arrives = |link_in: &str, source: IpAddr, vni: u32| {
            let mut packet = Packet {
                link_in: link_in.into(),
                link_out: String::new(),
                mac: None,
                source,
                destination: endpoint(0),
                protocol: 17,
                source_port: 40_000,
                port: 4789,
                icmp: None,
                hop_limit: 64,
                mark: 0,
                vni,
                translated: false,
            };
            hook(&table, Hook::Prerouting, &mut packet, &mut Choice::default())
        };
        let own = networks[0].vni;
        assert_eq!(arrives("eth0", endpoint(1), own), Ok(()));
        assert_eq!(arrives("eth0", "192.0.2.1".parse().unwrap(), own), Err("forged_tunnel".into()));
        assert_eq!(arrives("eth0", "192.0.2.1".parse().unwrap(), own + 1), Ok(()), "somebody else's");
        let refused = arrives(&links::host(networks[0].uid), endpoint(1), own);
        assert_eq!(refused, Err(if ways_out { "spoofed_address" } else { "to_host" }.into()));
    }
}

/// What is sent to the same port of a floating address from behind another host is a connection, whose addresses are changed.
#[test]
fn only_what_is_for_a_hosts_own_end_of_a_tunnel_is_no_connection() {
    let table = rules::host(&on_host(0, 2, &[Arc::new(network(1))]), &[]);
    for (chain, end) in [("arriving", Field::Destination as fn(_) -> _), ("tunnelled", Field::Source)] {
        let own = Test::is(end(Family::of(endpoint(0))), Value::of(endpoint(0)));
        let rules = &table.chain_of(chain).unwrap().rules;
        let untracked: Vec<_> = rules.iter().filter(|r| r.acts.contains(&Act::Untracked)).collect();
        assert!(!untracked.is_empty() && untracked.iter().all(|r| r.tests.contains(&own)), "{chain}: {untracked:?}");
    }
}

#[test]
fn sets_hold_no_spans_that_overlap() {
    let networks = rich();
    let table = rules::network(&on_host(0, 2, &networks), &networks[0]);
    for (name, set) in &table.sets {
        let all: BTreeSet<_> = set.elements.iter().collect();
        assert_eq!(all.len(), set.elements.len(), "{name}");
    }
    assert!(text::text(&table).contains("counter drop_no_ingress_rule"), "refusals are counted by reason");
}
