//! What the cell promises, by example.

use crate::*;

const GI: u64 = 1 << 30;

fn host(zone: u32, cores: u32, memory: u64) -> HostSpec {
    HostSpec {
        zone: ZoneId(zone),
        rack: RackId(0),
        fault: FaultId(0),
        state: HostState::Ready,
        runtimes: Runtimes::ALL,
        capacity: Capacity { cpu: cores * 1000, memory: memory * GI, scratch: 100 * GI, slots: 100 },
        classes: Vec::new(),
        images: Vec::new(),
        load: Load(0),
        storage: Vec::new(),
        labels: Vec::new(),
        rtt: None,
        nodes: Vec::new(),
        pins: true,
    }
}

fn container(cpu: u32, memory: u64) -> Request {
    Request::new(Runtime::Container, cpu, memory * GI)
}

fn spread(level: SpreadLevel, required: bool) -> Request {
    Request { group: Some(GroupId(1)), spread: Spread { level, required, floor: None }, ..container(100, 1) }
}

fn cell(hosts: impl IntoIterator<Item = HostSpec>) -> Cell {
    let mut cell = Cell::new();
    for spec in hosts {
        cell.add_host(spec);
    }
    cell
}

fn run(cell: &mut Cell, request: &Request, times: usize) -> Vec<HostId> {
    (0..times)
        .map(|_| {
            let host = cell.place(request).unwrap().host;
            assert_eq!(cell.place_indexed(request).unwrap().score, cell.score(host, request).unwrap());
            cell.reserve(host, request).unwrap();
            host
        })
        .collect()
}

#[test]
fn fills_the_fullest_host_that_still_takes_it() {
    let mut cell = cell([host(0, 8, 32), host(0, 8, 32), host(0, 8, 32)]);
    cell.reserve(HostId(1), &container(4000, 16)).unwrap();
    assert_eq!(cell.place(&container(4000, 16)).unwrap().host, HostId(1));
    assert_eq!(cell.place(&container(5000, 16)).unwrap().host, HostId(0), "ties go to the lowest handle");
}

#[test]
fn keeps_cpu_and_memory_in_balance() {
    let mut cell = cell([host(0, 8, 32), host(0, 8, 32)]);
    // Host 0 is short of memory, host 1 of cpu; a cpu-heavy request belongs where cpu is left over.
    cell.reserve(HostId(0), &container(1000, 24)).unwrap();
    cell.reserve(HostId(1), &container(6000, 4)).unwrap();
    assert_eq!(cell.place(&container(2000, 1)).unwrap().host, HostId(0));
    assert_eq!(cell.place(&container(500, 12)).unwrap().host, HostId(1));
}

#[test]
fn leaves_classes_to_those_who_ask_and_prefers_image_and_idleness() {
    let gpu = HostSpec { classes: vec![(ClassId(3), 2)], ..host(0, 8, 32) };
    let warm = HostSpec { images: vec![ImageId(9)], load: Load(400), ..host(0, 8, 32) };
    let mut cell = cell([gpu, HostSpec { load: Load(900), ..host(0, 8, 32) }, host(0, 8, 32), warm]);
    assert_eq!(cell.place(&container(1000, 1)).unwrap().host, HostId(2), "the idle plain host");
    let with_image = Request { image: Some(ImageId(9)), ..container(1000, 1) };
    assert_eq!(cell.place(&with_image).unwrap().host, HostId(3));
    let with_gpu = Request { classes: vec![(ClassId(3), 1)], ..container(1000, 1) };
    assert_eq!(run(&mut cell, &with_gpu, 2), [HostId(0), HostId(0)]);
    let refusal = cell.place(&with_gpu).unwrap_err();
    assert_eq!(refusal.at(Filter::Class), 4);
    assert_eq!(refusal.to_string(), "no host of 4 can take it: 4 lack class #3 (1 wanted, at most 0 free)");
}

#[test]
fn spreads_over_zones_first_and_then_over_hosts() {
    let mut cell = cell((0..6).map(|n| host(n % 3, 8, 32)));
    let placed = run(&mut cell, &spread(SpreadLevel::Zone, false), 9);
    let (zones, hosts) = cell.group_counts(GroupId(1));
    assert_eq!(zones, [(ZoneId(0), 3), (ZoneId(1), 3), (ZoneId(2), 3)]);
    assert!(hosts.iter().all(|(_, n)| (1..=2).contains(n)), "{hosts:?}");
    assert_eq!(hosts.len(), 6);
    let mut first: Vec<u32> = placed[..3].iter().map(|h| h.0 % 3).collect();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2]);
}

#[test]
fn spread_over_hosts_uses_each_once_before_any_twice() {
    let mut cell = cell((0..5).map(|n| host(n % 2, 8 + 8 * n, 64)));
    let mut placed = run(&mut cell, &spread(SpreadLevel::Host, false), 5);
    placed.sort_unstable();
    assert_eq!(placed, (0..5).map(HostId).collect::<Vec<_>>());
}

#[test]
fn required_spread_refuses_where_preferred_spread_gives_way() {
    let mut cell = cell([host(0, 1, 32), host(1, 8, 32)]);
    cell.reserve(HostId(0), &container(1000, 1)).unwrap();
    run(&mut cell, &spread(SpreadLevel::Zone, false), 2);
    let refusal = cell.place(&spread(SpreadLevel::Zone, true)).unwrap_err();
    assert_eq!((refusal.at(Filter::Cpu), refusal.at(Filter::Spread)), (1, 1));
    assert_eq!(cell.place_indexed(&spread(SpreadLevel::Zone, true)).unwrap_err(), refusal);
    // A zone without a ready host holds nothing up.
    cell.update_host(HostId(0), HostUpdate { state: Some(HostState::Dead), ..Default::default() }).unwrap();
    assert_eq!(cell.place(&spread(SpreadLevel::Zone, true)).unwrap().host, HostId(1));
}

#[test]
fn at_most_so_many_of_a_group_on_a_host() {
    let mut cell = cell([host(0, 8, 32), host(0, 8, 32)]);
    let request = Request { max_per_host: Some(1), group: Some(GroupId(5)), ..container(100, 1) };
    assert_eq!(run(&mut cell, &request, 2), [HostId(0), HostId(1)]);
    assert_eq!(cell.place(&request).unwrap_err().at(Filter::PerHost), 2);
    assert_eq!(cell.reserve(HostId(0), &request), Err(ReserveError::PerHost { host: HostId(0), max: 1 }));
    cell.release(HostId(0), &request).unwrap();
    assert_eq!(cell.place(&request).unwrap().host, HostId(0));
}

#[test]
fn a_refusal_counts_each_host_at_its_first_filter() {
    let functions_only = Runtimes::NONE.with(Runtime::Function);
    let small = |capacity| HostSpec { capacity, ..host(0, 8, 32) };
    let full = Capacity { cpu: 8000, memory: 32 * GI, scratch: 100 * GI, slots: 100 };
    let cell = cell([
        HostSpec { state: HostState::Cordoned, ..host(0, 8, 32) },
        HostSpec { runtimes: functions_only, ..host(0, 8, 32) },
        small(Capacity { cpu: 500, ..full }),
        small(Capacity { memory: GI / 2, ..full }),
        small(Capacity { scratch: 0, ..full }),
        small(Capacity { slots: 0, ..full }),
        host(1, 8, 32),
        host(0, 8, 32),
    ]);
    let request =
        Request { scratch: GI, zones: Some(vec![ZoneId(0)]), excluded: vec![HostId(7)], ..container(1000, 1) };
    let refusal = cell.place(&request).unwrap_err();
    for filter in [
        Filter::Ready,
        Filter::Runtime,
        Filter::Cpu,
        Filter::Memory,
        Filter::Scratch,
        Filter::Slots,
        Filter::Zone,
        Filter::Excluded,
    ] {
        assert_eq!(refusal.at(filter), 1, "{filter:?} in {refusal}");
    }
    assert_eq!(
        refusal.to_string(),
        "no host of 8 can take it: 1 not ready, 1 without the runtime, 1 lacks cpu (1 wanted, at most 500m free), \
         1 lacks memory (1Gi wanted, at most 512Mi free), 1 lacks scratch (1Gi wanted, at most 0 free), \
         1 at its instance limit, 1 in other zones, 1 excluded"
    );
    assert_eq!(cell.place_indexed(&request).unwrap_err(), refusal);
}

#[test]
fn a_host_never_gives_more_than_it_has() {
    let mut cell = cell([HostSpec { classes: vec![(ClassId(0), 3)], ..host(0, 8, 32) }]);
    let doubled = Request { classes: vec![(ClassId(0), 2), (ClassId(0), 2)], ..container(100, 1) };
    assert!(cell.place(&doubled).is_err());
    let exceeds = |resource, wanted, free| Err(ReserveError::Exceeds { host: HostId(0), resource, wanted, free });
    assert_eq!(cell.reserve(HostId(0), &doubled), exceeds(Filter::Class, 4, 3));
    assert_eq!(cell.reserve(HostId(0), &container(8001, 1)), exceeds(Filter::Cpu, 8001, 8000));
    assert_eq!(cell.reserve(HostId(0), &container(1, 33)), exceeds(Filter::Memory, 33 * GI, 32 * GI));
    assert_eq!(cell.audit([]), Ok(()), "a refused reservation leaves no trace");
    assert!(cell.release(HostId(0), &container(1, 1)).is_err());
    assert_eq!(cell.reserve(HostId(4), &container(1, 1)), Err(UnknownHost(HostId(4)).into()));
}

#[test]
fn a_host_that_shrank_takes_nothing_until_it_has_drained() {
    let mut cell = cell([HostSpec { classes: vec![(ClassId(0), 1)], ..host(0, 8, 32) }]);
    let request = Request { classes: vec![(ClassId(0), 1)], ..container(4000, 16) };
    cell.reserve(HostId(0), &request).unwrap();
    let less = Capacity { memory: 8 * GI, ..host(0, 8, 32).capacity };
    let update = HostUpdate { capacity: Some(less), classes: Some(Vec::new()), ..Default::default() };
    cell.update_host(HostId(0), update).unwrap();
    assert_eq!(cell.oversold_hosts(), 1);
    assert_eq!(cell.place(&container(1, 1)).unwrap_err().at(Filter::Memory), 1);
    cell.audit([(HostId(0), &request)]).unwrap();
    cell.release(HostId(0), &request).unwrap();
    assert_eq!(cell.oversold_hosts(), 0);
    assert!(cell.place(&container(1, 1)).is_ok());
    cell.audit([]).unwrap();
    cell.adopt(HostId(0), &request).unwrap();
    assert_eq!(cell.oversold_hosts(), 1, "an adopted reservation is recorded as it is");
    cell.audit([(HostId(0), &request)]).unwrap();
}

#[test]
fn a_removed_host_is_forgotten_and_its_handle_reused() {
    let mut cell = cell([HostSpec { images: vec![ImageId(1)], ..host(0, 8, 32) }, host(0, 8, 32)]);
    cell.reserve(HostId(0), &container(1, 1)).unwrap();
    assert_eq!(cell.remove_host(HostId(0)), Err(ReserveError::InUse { host: HostId(0), instances: 1 }));
    cell.release(HostId(0), &container(1, 1)).unwrap();
    cell.remove_host(HostId(0)).unwrap();
    cell.audit([]).unwrap();
    assert_eq!(cell.place(&container(1, 1)).unwrap().host, HostId(1));
    assert!(cell.snapshot(HostId(0)).is_err());
    assert_eq!(cell.add_host(host(2, 8, 32)), HostId(0));
    assert_eq!(cell.len(), 2);
}

#[test]
fn headroom_and_totals_add_up() {
    let mut cell = cell([host(0, 8, 32), host(1, 4, 32)]);
    assert_eq!(cell.headroom(&container(1000, 4)), 12);
    assert_eq!(cell.headroom(&Request { zones: Some(vec![ZoneId(1)]), ..container(1000, 4) }), 4);
    let limited = Request { group: Some(GroupId(0)), max_per_host: Some(3), ..container(1000, 4) };
    assert_eq!(cell.headroom(&limited), 6);
    cell.reserve(HostId(0), &limited).unwrap();
    assert_eq!(cell.headroom(&limited), 5);
    let totals = cell.totals(None);
    assert_eq!((totals.hosts, totals.cpu, totals.cpu_free, totals.instances), (2, 12_000, 11_000, 1));
    assert_eq!(cell.totals(Some(ZoneId(1))).hosts, 1);
}

#[test]
fn an_empty_cell_refuses() {
    assert_eq!(
        Cell::new().place(&container(1, 1)).unwrap_err().to_string(),
        "no host can take it: the cell has no hosts"
    );
}

#[test]
fn labels_round_trips_and_company_are_filters_and_say_what_came_nearest() {
    let labelled = HostSpec { labels: vec![LabelId(2), LabelId(1)], rtt: Some(31_000), ..host(0, 8, 32) };
    let mut cell = cell([labelled, host(0, 8, 32), HostSpec { rtt: Some(5_000), ..host(0, 8, 32) }]);
    let asks = |change: fn(&mut Request)| {
        let mut request = container(100, 1);
        change(&mut request);
        request
    };
    let labels = asks(|r| r.labels = vec![LabelId(1), LabelId(2)]);
    assert_eq!(cell.place(&labels).unwrap().host, HostId(0));
    let near = asks(|r| r.max_rtt = Some(20_000));
    assert_eq!(cell.place(&near).unwrap().host, HostId(2));
    assert_eq!(cell.place_indexed(&near).unwrap().host, HostId(2));
    cell.set_rtt(HostId(2), None).unwrap();
    let refusal = cell.place(&near).unwrap_err();
    assert_eq!(refusal.at(Filter::Latency), 3);
    assert_eq!(refusal.too_far, Some(TooFar { below: 20_000, lowest: Some(31_000), unmeasured: 2 }));
    let exact = asks(|r| r.max_rtt = Some(31_000));
    assert!(cell.place(&exact).is_err(), "below is below");

    let db = Request { group: Some(GroupId(7)), ..container(100, 1) };
    let with = asks(|r| r.with = vec![GroupId(7)]);
    assert_eq!(cell.place(&with).unwrap_err().groups, [(Filter::With, GroupId(7), 3)]);
    cell.reserve(HostId(1), &db).unwrap();
    assert_eq!(cell.place(&with).unwrap().host, HostId(1));
    let without = asks(|r| r.without = vec![GroupId(7)]);
    assert_ne!(cell.place(&without).unwrap().host, HostId(1));
    assert_eq!(cell.check(HostId(1), &without), Ok(Some(Filter::Without)));
}

#[test]
fn a_storage_class_is_reserved_by_size() {
    let fast = HostSpec { storage: vec![(ClassId(9), 10 * GI)], ..host(0, 8, 32) };
    let mut cell = cell([host(0, 8, 32), fast]);
    let six = Request { storage: Some((ClassId(9), 6 * GI)), ..container(100, 1) };
    assert_eq!(run(&mut cell, &six, 1), [HostId(1)]);
    assert_eq!(cell.snapshot(HostId(1)).unwrap().storage, [(ClassId(9), 10 * GI, 4 * GI)]);
    let refusal = cell.place(&six).unwrap_err();
    assert_eq!(refusal.to_string(), "no host of 2 can take it: 2 lack class #9 (6Gi wanted, at most 4Gi free)");
    assert_eq!(
        cell.reserve(HostId(1), &six).unwrap_err(),
        ReserveError::Exceeds { host: HostId(1), resource: Filter::Storage, wanted: 6 * GI, free: 4 * GI }
    );
    cell.audit([(HostId(1), &six)]).unwrap();
    assert!(cell.audit([]).is_err());
    cell.release(HostId(1), &six).unwrap();
    cell.audit([]).unwrap();
}

#[test]
fn racks_are_kept_even_and_required_spread_refuses_the_fuller_one() {
    let in_rack = |rack| HostSpec { rack: RackId(rack), ..host(0, 8, 32) };
    let mut cell = cell([in_rack(0), in_rack(0), in_rack(0), in_rack(1)]);
    let placed = run(&mut cell, &spread(SpreadLevel::Rack, false), 4);
    let in_second = placed.iter().filter(|id| **id == HostId(3)).count();
    assert_eq!(in_second, 2, "{placed:?}");
    let first: Vec<_> = placed.iter().filter(|id| **id != HostId(3)).collect();
    assert_ne!(first[0], first[1], "and in a rack the hosts");
    cell.update_host(HostId(3), HostUpdate { capacity: Some(Capacity::default()), ..HostUpdate::default() }).unwrap();
    run(&mut cell, &spread(SpreadLevel::Rack, true), 1);
    let refusal = cell.place(&spread(SpreadLevel::Rack, true)).unwrap_err();
    assert_eq!((refusal.at(Filter::Spread), refusal.at(Filter::Cpu)), (3, 1));
    assert_eq!(cell.domains(&spread(SpreadLevel::Rack, true)), [(0, 3), (1, 2)]);
}

fn numa(node_cores: &[u32], memory: u64) -> HostSpec {
    let nodes: Vec<Node> = node_cores.iter().map(|cores| Node { cpu: cores * 1000, memory: memory * GI }).collect();
    HostSpec { nodes, ..host(0, node_cores.iter().sum(), memory * node_cores.len() as u64) }
}

fn pinned(span: u8, cpu: u32, memory: u64) -> Request {
    Request { span, ..container(cpu, memory) }
}

/// Places and reserves; the host and its nodes.
fn pin(cell: &mut Cell, mut request: Request) -> Result<(u32, Vec<usize>), Refusal> {
    let decision = cell.place(&request)?;
    assert_eq!(cell.place_indexed(&request).unwrap().host, decision.host);
    request.nodes = decision.nodes;
    cell.reserve(decision.host, &request).unwrap();
    Ok((decision.host.0, decision.nodes.iter().collect()))
}

#[test]
fn a_request_fits_in_one_node_or_has_equal_parts_on_several() {
    let mut cell = cell([numa(&[4, 4], 16), host(0, 8, 32)]);
    assert_eq!(cell.place(&pinned(1, 5000, 8)).unwrap().host, HostId(1), "one node of 8 cores");
    assert_eq!(pin(&mut cell, pinned(2, 6000, 8)), Ok((0, vec![0, 1])));
    assert_eq!(cell.snapshot(HostId(0)).unwrap().nodes[1].1, Node { cpu: 1000, memory: 12 * GI });
    assert_eq!(
        cell.reserve(HostId(0), &pinned(1, 500, 1)),
        Err(ReserveError::Nodes { host: HostId(0), span: 1, named: 0 })
    );
    let tight = Request { nodes: Nodes::NONE.with(1), ..pinned(1, 2000, 1) };
    let exceeds = ReserveError::Exceeds { host: HostId(0), resource: Filter::Numa, wanted: 2000, free: 1000 };
    assert_eq!(cell.reserve(HostId(0), &tight), Err(exceeds));
    let refusal = cell.place(&pinned(2, 2000, 30)).unwrap_err();
    assert_eq!((refusal.at(Filter::Memory), refusal.at(Filter::Numa)), (1, 1));
    assert_eq!(
        refusal.to_string(),
        "no host of 2 can take it: 1 lacks memory (30Gi wanted, at most 24Gi free), 1 without room on its NUMA \
         nodes (room on 2 nodes of one host wanted)"
    );
}

#[test]
fn what_has_no_wish_takes_from_any_node_and_leaves_no_more_than_there_is() {
    let mut cell = cell([numa(&[4, 4], 16)]);
    run(&mut cell, &container(3000, 4), 2);
    assert_eq!(cell.headroom(&pinned(1, 1000, 1)), 2, "two cores are left, wherever the others run");
    assert_eq!(pin(&mut cell, pinned(2, 2000, 2)), Ok((0, vec![0, 1])));
    assert_eq!(cell.place(&pinned(1, 1000, 1)).unwrap_err().at(Filter::Cpu), 1);
}

#[test]
fn once_the_mix_is_known_pairs_of_nodes_are_kept_for_those_that_want_both() {
    let mut cell = cell([numa(&[8, 8], 32), numa(&[8, 8], 32), numa(&[8, 8], 32)]);
    // As many of both kinds, so that both are known; then all go.
    let mut held = Vec::new();
    for n in 0..40 {
        let mut request = if n % 2 == 0 { pinned(2, 16_000, 64) } else { pinned(1, 4000, 16) };
        let decision = cell.place(&request).unwrap();
        request.nodes = decision.nodes;
        cell.reserve(decision.host, &request).unwrap();
        held.push((decision.host, request));
        if held.len() == 2 {
            held.drain(..).for_each(|(host, request)| cell.release(host, &request).unwrap());
        }
    }
    let halves: Vec<u32> = (0..4).map(|_| pin(&mut cell, pinned(1, 4000, 16)).unwrap().0).collect();
    assert!(halves.iter().all(|host| *host == halves[0]), "{halves:?}");
    assert_eq!(cell.headroom(&pinned(2, 16_000, 64)), 2);
    cell.audit([]).unwrap_err();
}

#[test]
fn a_group_that_stays_together_starts_where_more_have_room_and_goes_nowhere_else() {
    let mut cell = cell([host(0, 4, 16), host(0, 8, 32), numa(&[2, 2], 8)]);
    let member = Request { group: Some(GroupId(3)), together: true, ..container(2000, 8) };
    assert_eq!(run(&mut cell, &member, 4), [HostId(1); 4]);
    let refusal = cell.place(&member).unwrap_err();
    assert_eq!((refusal.at(Filter::Cpu), refusal.at(Filter::Together)), (1, 2));
    assert_eq!(cell.place_indexed(&member).unwrap_err(), refusal);
}

#[test]
fn what_fails_as_one_is_kept_even_with_members_elsewhere_and_after_a_move() {
    let at = |fault| HostSpec { fault: FaultId(fault), ..host(0, 8, 32) };
    let mut cell = cell([at(0), at(0), at(1)]);
    let even = |elsewhere: &[(u32, u32)]| Request { elsewhere: elsewhere.to_vec(), ..spread(SpreadLevel::Fault, true) };
    // Two of the group behind feed 1, in another cell: nothing of it is here yet.
    for place in [Cell::place, Cell::place_indexed] {
        assert_eq!(place(&cell, &even(&[(1, 2)])).unwrap().host, HostId(0));
    }
    assert_eq!(run(&mut cell, &even(&[(1, 2)]), 2), [HostId(0), HostId(1)]);
    assert_eq!(cell.domain_counts(GroupId(1), SpreadLevel::Fault), [(0, 2)]);
    assert_eq!(run(&mut cell, &even(&[(1, 1)]), 1), [HostId(2)]);
    let fuller = Request { spread: Spread { floor: Some(1), ..even(&[]).spread }, ..even(&[]) };
    assert_eq!(cell.place(&fuller).unwrap().host, HostId(2));
    cell.update_host(HostId(1), HostUpdate { fault: Some(FaultId(1)), ..HostUpdate::default() }).unwrap();
    assert_eq!(cell.domain_counts(GroupId(1), SpreadLevel::Fault), [(0, 1), (1, 2)]);
    assert_eq!(cell.peers(HostId(1), &even(&[(1, 4)])), Ok((6, 1)));
    let refusal = cell.place(&Request { excluded: vec![HostId(0)], ..even(&[(0, 5)]) }).map(|d| d.host);
    assert_eq!(refusal, Ok(HostId(1)), "the excluded one's domain holds nothing up");
    let held = spread(SpreadLevel::Fault, true);
    cell.audit([(HostId(0), &held), (HostId(1), &held), (HostId(2), &held)]).unwrap();
}

#[test]
fn a_host_that_keeps_nothing_to_a_node_takes_what_floats_alone() {
    let without = |spec: HostSpec| HostSpec { pins: false, ..spec };
    let mut cell = cell([without(host(0, 8, 32)), without(numa(&[8, 8], 32)), numa(&[4, 4], 32)]);
    assert_eq!(pin(&mut cell, pinned(1, 3000, 8)), Ok((2, vec![0])));
    let refusal = cell.place(&pinned(1, 5000, 8)).unwrap_err();
    assert_eq!(cell.place_indexed(&pinned(1, 5000, 8)).unwrap_err(), refusal);
    assert_eq!(
        refusal.to_string(),
        "no host of 3 can take it: 1 without room on its NUMA nodes (no node has more than 4 CPUs free, 5 CPUs wanted), 2 \
         that can't keep an instance to a NUMA node"
    );
    assert_eq!(cell.headroom(&pinned(1, 4000, 8)), 1);
    assert!(cell.place(&container(5000, 8)).is_ok());
    assert_eq!(cell.breach(HostId(0), &pinned(1, 100, 1)), Ok(Some(Filter::Numa)));
    cell.update_host(HostId(0), HostUpdate { pins: Some(true), ..HostUpdate::default() }).unwrap();
    assert_eq!(cell.place(&pinned(1, 5000, 8)).unwrap().host, HostId(0));
}

#[test]
fn fault_domains_share_no_rack() {
    let in_rack = |rack| HostSpec { rack: RackId(rack), ..host(0, 2, 8) };
    let mut cell = cell([in_rack(0), in_rack(0), in_rack(1)]);
    let member = |domain| Request { group: Some(GroupId(3)), domain: Some(DomainId(domain)), ..container(2000, 8) };
    assert_eq!(run(&mut cell, &member(1), 2), [HostId(0), HostId(1)], "members of one domain share a rack");
    assert_eq!(run(&mut cell, &member(2), 1), [HostId(2)]);
    cell.release(HostId(0), &member(1)).unwrap();
    assert_eq!(cell.place(&member(2)).unwrap_err().at(Filter::Domain), 1);
    assert_eq!(cell.place(&member(1)).unwrap().host, HostId(0));
    cell.audit([(HostId(1), &member(1)), (HostId(2), &member(2))]).unwrap();
    assert_eq!(cell.audit([(HostId(1), &member(2)), (HostId(2), &member(2))]), Err(Drift::Group(GroupId(3))));
}
