//! The layout of local clouds: what collides with nothing, what is refused, what old folders become.

use std::net::IpAddr;

use super::*;

/// Whether an address belongs to the underlay of the plan.
fn is_underlay(plan: &Plan, address: IpAddr) -> bool {
    match address {
        IpAddr::V6(a) => a.segments()[..4] == plan.subnet(0, 0).segments()[..4],
        IpAddr::V4(a) => a.octets()[..3] == [10, plan.octet, 0],
    }
}

fn plan(zones: usize, hosts: usize, classes: &[&str]) -> Result<Plan, String> {
    let given = GivenChoices {
        zones: Some(zones),
        hosts_per_zone: Some(hosts),
        classes: classes.iter().map(|c| c.parse().unwrap()).collect(),
        ..GivenChoices::default()
    };
    Plan::new(&given.with_defaults(), [0xab, 0xcd, 0xef, 0x01, 0x23, 7, 0, 0], |o| o != 7)
}

#[test]
fn three_zones_with_two_hosts() {
    let plan = plan(3, 2, &["zone-a:gpu-v100=2", "zone-b-2:fpga=1"]).unwrap();
    assert_eq!(plan.cluster_id, "cnx-abcdef01");
    assert_eq!(plan.link_prefix(), "xabc");
    let hosts = plan.hosts();
    assert_eq!(hosts.len(), 6);
    assert_eq!(hosts[3].name.as_str(), "zone-b-2");
    assert_eq!(hosts[3].address6.to_string(), "fd23:abcd:ef01::104");
    assert_eq!(hosts[3].prefix6.to_string(), "fd23:abcd:ef01:4::");
    assert_eq!(hosts[3].prefix4.to_string(), "10.8.4.0", "octet 7 was taken");
    assert_eq!(hosts[0].classes.values().sum::<u32>(), 2);
    assert_eq!(hosts[1].classes.values().sum::<u32>(), 2);
    assert_eq!(hosts[3].classes.keys().next().unwrap().as_str(), "fpga");
    let servers: Vec<_> = plan.servers().iter().map(|s| s.api_tls.port()).collect();
    assert_eq!(servers, [8443, 8444, 8445]);
    let gateways: Vec<_> = plan.gateways().iter().map(|g| g.http.port()).collect();
    assert_eq!(gateways, [8000, 8001]);
}

#[test]
fn servers_are_always_odd_and_never_more_than_zones() {
    for zones in 1..=26 {
        let servers = plan(zones, 1, &[]).unwrap().servers();
        assert!(servers.len() % 2 == 1 && servers.len() <= zones, "{zones} zones");
    }
}

#[test]
fn no_two_hosts_share_an_address() {
    let plan = plan(20, 10, &[]).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    for host in plan.hosts() {
        for address in [IpAddr::from(host.address6), host.address4.into(), host.prefix6.into(), host.prefix4.into()] {
            assert!(seen.insert(address), "{address}");
        }
        assert!(is_underlay(&plan, host.address6.into()) && is_underlay(&plan, host.address4.into()));
        assert!(!is_underlay(&plan, host.prefix6.into()) && !is_underlay(&plan, host.prefix4.into()));
    }
    assert!(!seen.contains(&plan.region6(plan.first_region()).into()) && !seen.contains(&plan.machine4().into()));
}

fn several(regions: usize, zones: Option<usize>, tiers: &[&str]) -> Result<Plan, String> {
    let tiers = tiers.iter().map(|t| t.parse().unwrap()).collect();
    let given = GivenChoices { regions: Some(regions), zones, tiers, ..GivenChoices::default() };
    Plan::new(&given.with_defaults(), [7; 8], |_| true)
}

#[test]
fn regions_are_small_alike_and_unique_in_every_name_and_address() {
    let plan = several(5, Some(3), &["region-e=edge"]).unwrap();
    let names: Vec<_> = plan.regions.iter().map(|r| r.name.as_str()).collect();
    assert_eq!(names, ["region-a", "region-b", "region-c", "region-d", "region-e"]);
    assert_eq!((plan.servers().len(), plan.hosts().len(), plan.gateways().len()), (15, 30, 10));
    assert_eq!(plan.founding_voters().len(), 9);
    let second = &plan.regions[1];
    assert_eq!(plan.servers_of(second)[2].name.as_str(), "region-b-server-c");
    assert_eq!(plan.servers_of(second)[2].node_id, 103);
    assert_eq!(plan.servers_of(second)[2].api_tls.port(), 8443 + 22);
    assert_eq!(plan.gateways_of(second)[1].admin.port(), 8111);
    assert_eq!(plan.hosts_of(second)[0].name.as_str(), "region-b-zone-a-1");
    assert_eq!(plan.hosts_of(second)[0].prefix6.segments()[3], 0x1001);
    let mut seen = std::collections::BTreeSet::new();
    for member in plan.regions.iter().flat_map(|r| plan.members_of(r)) {
        assert!(seen.insert(member.to_string()), "{member}");
    }
    for host in plan.hosts() {
        let addresses = [host.address6.to_string(), host.address4.to_string()];
        for address in addresses.into_iter().chain([host.prefix6.to_string(), host.prefix4.to_string()]) {
            assert!(seen.insert(address.clone()), "{address}");
        }
    }
    for server in plan.servers() {
        let addresses = [server.wire, server.api_tls, server.api_http, server.api_peer.unwrap()];
        for address in addresses.map(|a| a.to_string()).into_iter().chain([server.node_id.to_string()]) {
            assert!(seen.insert(address.clone()), "{address}");
        }
    }
    for gateway in plan.gateways() {
        for address in [gateway.http, gateway.admin, gateway.peer.unwrap()] {
            assert!(seen.insert(address.to_string()), "{address}");
        }
    }
    for region in &plan.regions {
        assert!(seen.insert(plan.on_backbone(region).2.to_string()));
        assert!(!seen.contains(&plan.region6(region).to_string()));
    }
    let small = several(3, None, &[]).unwrap();
    assert_eq!((small.servers().len(), small.hosts().len(), small.gateways().len()), (3, 6, 6));
}

#[test]
fn a_region_joins_with_a_number_of_its_own_and_leaves_for_good() {
    let plan = several(3, None, &["region-c=edge"]).unwrap();
    assert_eq!(plan.founding_voters().len(), 2, "an edge region does not vote");
    let grown = plan.grown(4, &["region-d=regional".parse().unwrap()]).unwrap();
    assert_eq!(grown.regions[..3], plan.regions[..]);
    assert_eq!(grown.founding_voters(), plan.founding_voters(), "who founded does not change");
    let added = &grown.regions[3];
    assert_eq!((added.name.as_str(), added.index, added.tier, added.founder), ("region-d", 3, Tier::Regional, false));
    let again = grown.without(&added.name).grown(4, &[]).unwrap();
    assert_eq!((again.regions[3].name.as_str(), again.regions[3].index), ("region-e", 4));
    assert!(plan.grown(6, &[]).unwrap_err().contains("--regions 6"));
    assert!(several(3, None, &["region-a=edge"]).unwrap_err().contains("must be core"));
    assert!(several(3, None, &["region-q=edge"]).unwrap_err().contains("region-q"));
    assert!("region-a=middle".parse::<TierGrant>().unwrap_err().contains("middle"));
    let given = |regions| GivenChoices { regions: Some(regions), ..GivenChoices::default() };
    assert!(plan.differences(&given(4)).is_empty());
    assert!(plan.differences(&given(2))[0].contains("nexus region remove"));
    let tiers = GivenChoices { tiers: vec!["region-c=core".parse().unwrap()], ..GivenChoices::default() };
    assert_eq!(plan.differences(&tiers), ["--tier region-c is edge, not core"]);
}

#[test]
fn a_plan_of_the_first_format_keeps_every_name_and_address() {
    let new = plan(3, 2, &["zone-a:gpu=2"]).unwrap();
    let mut old = serde_json::to_value(&new).unwrap();
    let object = old.as_object_mut().unwrap();
    for field in ["regions", "apart", "next_index"] {
        object.remove(field);
    }
    object.insert("format".into(), 1.into());
    object.insert("region".into(), "local".into());
    let read: Plan = serde_json::from_value(migrate(old)).unwrap();
    assert_eq!(read, new);
    assert!(read.differences(&GivenChoices { regions: Some(3), ..GivenChoices::default() })[0].contains("--regions"));
}

#[test]
fn impossible_choices_say_what_is_wrong() {
    assert!(plan(0, 1, &[]).unwrap_err().contains("--zones 0"));
    assert!(plan(26, 26, &[]).unwrap_err().contains("at most 200"));
    assert!(plan(3, 2, &["zone-q:gpu=1"]).unwrap_err().contains("zone-q"));
    assert!("zone-a".parse::<ClassGrant>().unwrap_err().contains("PLACE:CLASS=COUNT"));
    let given = GivenChoices { api_port_base: Some(7999), ..GivenChoices::default() };
    let error = Plan::new(&given.with_defaults(), [1; 8], |_| true).unwrap_err();
    assert!(error.contains("port 8000 would be used twice"), "{error}");
}

#[test]
fn a_plan_reads_back_and_tells_what_differs() {
    let plan = plan(3, 2, &[]).unwrap();
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
    assert!(plan.differences(&GivenChoices::default()).is_empty());
    assert!(plan.differences(&GivenChoices { zones: Some(3), ..GivenChoices::default() }).is_empty());
    assert_eq!(plan.differences(&GivenChoices { zones: Some(2), ..GivenChoices::default() }).len(), 1);
}

#[test]
fn used_ranges_are_avoided() {
    let routes = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n\
                  eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\n\
                  eth1\t0005000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\n\
                  eth2\t0000400A\t00000000\t0001\t0\t0\t0\t0000C0FF\n";
    assert!(!octet_is_free(routes, 0), "10.0.5.0/24 lies in it");
    assert!(!octet_is_free(routes, 65), "10.64.0.0/10 holds it");
    assert!(octet_is_free(routes, 7), "the default route is no conflict");
}
