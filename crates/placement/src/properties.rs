//! Properties that hold for any cell and any history: small worlds, made to collide, through the index and the scan.

use crate::*;
use proptest::prelude::*;

const MI: u64 = 1 << 20;

#[derive(Clone, Debug)]
enum Step {
    Place(Box<Request>),
    /// Reserve without asking `place`, on a host that may be full.
    Force(u32, Box<Request>),
    Release(usize),
    Update(u32, HostUpdate),
    Add(Box<HostSpec>),
    Remove(u32),
}

fn classes() -> impl Strategy<Value = Vec<(ClassId, u32)>> {
    prop_oneof![4 => Just(Vec::new()), 1 => prop::collection::vec(((0u32..2).prop_map(ClassId), 0u32..4), 1..3)]
}

fn capacity() -> impl Strategy<Value = Capacity> {
    (0u32..9, 0u64..9, 0u64..4, 0u32..8, 0u64..3).prop_map(|(cpu, memory, scratch, slots, odd)| Capacity {
        cpu: cpu * 1000,
        memory: memory * 512 * MI + odd * MI,
        scratch: scratch * 100 * MI,
        slots,
    })
}

fn state() -> impl Strategy<Value = HostState> {
    prop_oneof![6 => Just(HostState::Ready), 1 => Just(HostState::Cordoned), 1 => Just(HostState::Suspect)]
}

fn runtimes() -> impl Strategy<Value = Runtimes> {
    prop_oneof![4 => Just(Runtimes::ALL), 1 => Just(Runtimes::NONE.with(Runtime::Function))]
}

fn images() -> impl Strategy<Value = Vec<ImageId>> {
    prop::collection::vec((0u32..3).prop_map(ImageId), 0..3)
}

fn spec() -> impl Strategy<Value = HostSpec> {
    (0u32..3, state(), runtimes(), capacity(), classes(), images(), 0u16..1100, traits()).prop_map(
        |(zone, state, runtimes, capacity, classes, images, load, (rack, storage, labels, rtt, parts))| HostSpec {
            zone: ZoneId(zone),
            rack: RackId(zone * 2 + rack),
            fault: FaultId((zone + rack) % 3),
            state,
            runtimes,
            capacity,
            classes,
            images,
            load: Load(load),
            storage,
            labels,
            rtt,
            nodes: nodes(capacity, &parts),
            pins: rtt != Some(1),
        },
    )
}

/// Zone's half, storage, labels, round trip, and how many sixteenths of the host each NUMA node has.
type Traits = (u32, Vec<(ClassId, u64)>, Vec<LabelId>, Option<u32>, Vec<(u32, u32)>);

fn nodes(capacity: Capacity, parts: &[(u32, u32)]) -> Vec<Node> {
    let node = |(cpu, memory): &(u32, u32)| Node {
        cpu: capacity.cpu / 16 * cpu,
        memory: capacity.memory / 16 * u64::from(*memory),
    };
    parts.iter().map(node).collect()
}

fn traits() -> impl Strategy<Value = Traits> {
    let storage = prop::collection::vec(((5u32..7).prop_map(ClassId), (0u64..4).prop_map(|n| n * 100 * MI)), 0..3);
    let labels = prop::collection::vec((0u32..3).prop_map(LabelId), 0..3);
    // One node is none, and ten are more than are told apart.
    let parts = prop_oneof![
        3 => Just(Vec::new()),
        3 => prop::collection::vec((4u32..9, 4u32..9), 2),
        1 => prop::collection::vec((0u32..6, 0u32..6), 1..11),
    ];
    (0u32..2, storage, labels, prop::option::of(0u32..40), parts)
}

type Wishes = (Option<(ClassId, u64)>, Vec<LabelId>, Option<u32>, Vec<GroupId>, Vec<GroupId>);

fn wishes() -> impl Strategy<Value = Wishes> {
    let groups = || prop::collection::vec((0u32..3).prop_map(GroupId), 0..2);
    let some = (
        prop::option::of(((5u32..7).prop_map(ClassId), (0u64..3).prop_map(|n| n * 80 * MI))),
        prop::collection::vec((0u32..3).prop_map(LabelId), 0..2),
        prop::option::of(0u32..50),
        groups(),
        groups(),
    );
    prop_oneof![2 => Just(Wishes::default()), 1 => some]
}

/// Span, fault domain, together, and members of the group elsewhere.
fn togetherness() -> impl Strategy<Value = (u8, Option<DomainId>, bool, Vec<(u32, u32)>)> {
    let span = prop_oneof![4 => Just(0u8), 4 => Just(1u8), 2 => Just(2u8), 1 => 3u8..12];
    let elsewhere = prop::collection::btree_map(0u32..4, 1u32..3, 0..3).prop_map(|counts| counts.into_iter().collect());
    (span, prop::option::weighted(0.3, (0u32..3).prop_map(DomainId)), prop::bool::weighted(0.2), elsewhere)
}

fn spread() -> impl Strategy<Value = Spread> {
    let level = prop_oneof![
        Just(SpreadLevel::None),
        Just(SpreadLevel::Host),
        Just(SpreadLevel::Zone),
        Just(SpreadLevel::Rack),
        Just(SpreadLevel::Fault)
    ];
    (level, any::<bool>(), prop::option::weighted(0.1, 0u32..3)).prop_map(|(level, required, floor)| Spread {
        level,
        required,
        floor,
    })
}

fn request() -> impl Strategy<Value = Request> {
    let sizes = (0u32..25, 0u64..25, 0u64..3);
    let runtime = prop_oneof![Just(Runtime::Container), Just(Runtime::Function)];
    let ids = (prop::option::of(0u32..3), prop::option::of(0u32..3));
    let limits = (
        prop::option::weighted(0.2, 0u32..3),
        prop::option::weighted(0.2, prop::collection::vec((0u32..3).prop_map(ZoneId), 0..3)),
        prop::collection::vec((0u32..12).prop_map(HostId), 0..2),
    );
    (sizes, runtime, classes(), ids, spread(), limits, wishes(), togetherness()).prop_map(
        |(
            (cpu, memory, scratch),
            runtime,
            classes,
            (image, group),
            spread,
            (max_per_host, zones, excluded),
            (storage, labels, max_rtt, with, without),
            (span, domain, together, elsewhere),
        )| Request {
            elsewhere,
            span,
            domain,
            together,
            storage,
            labels,
            max_rtt,
            with,
            without,
            scratch: scratch * 50 * MI,
            classes,
            image: image.map(ImageId),
            group: group.map(GroupId),
            spread,
            max_per_host,
            zones,
            excluded,
            ..Request::new(runtime, cpu * 200, memory * 100 * MI)
        },
    )
}

fn update() -> impl Strategy<Value = HostUpdate> {
    let some = prop::option::weighted::<BoxedStrategy<Capacity>>;
    (
        prop::option::of(state()),
        some(0.3, capacity().boxed()),
        prop::option::weighted(0.3, classes()),
        prop::option::of(images()),
        prop::option::of((0u16..1000).prop_map(Load)),
        prop::option::weighted(0.2, runtimes()),
        prop::option::weighted(0.2, traits()),
    )
        .prop_map(|(state, capacity, classes, images, load, runtimes, traits)| HostUpdate {
            fault: traits.as_ref().map(|(rack, ..)| FaultId(*rack)),
            pins: traits.as_ref().map(|(.., rtt, _)| rtt.is_none_or(|rtt| rtt > 4)),
            storage: traits.clone().map(|(_, storage, ..)| storage),
            nodes: traits.clone().map(|(.., parts)| nodes(capacity.unwrap_or_default(), &parts)),
            labels: traits.map(|(_, _, labels, ..)| labels),
            state,
            runtimes,
            capacity,
            classes,
            images,
            load,
        })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => request().prop_map(|r| Step::Place(Box::new(r))),
        3 => (0u32..40, request()).prop_map(|(h, r)| Step::Force(h, Box::new(r))),
        5 => any::<usize>().prop_map(Step::Release),
        3 => (0u32..40, update()).prop_map(|(h, u)| Step::Update(h, u)),
        1 => spec().prop_map(|s| Step::Add(Box::new(s))),
        1 => (0u32..40).prop_map(Step::Remove),
    ]
}

/// Compares the index with the scan on one request.
fn agree(cell: &Cell, request: &Request) -> Result<Option<Decision>, TestCaseError> {
    match (cell.place_indexed(request), cell.place_exhaustive(request)) {
        (Ok(fast), Ok(best)) => {
            prop_assert_eq!(cell.check(fast.host, request), Ok(None), "place chose an infeasible host");
            prop_assert_eq!(Ok(fast.score), cell.score(fast.host, request));
            prop_assert!(fast.score.same_tier(&best.score), "{:?} instead of {:?}", fast, best);
            prop_assert!(fast.score <= best.score);
            let ratio = f64::from(fast.score.merit) / f64::from(best.score.merit);
            prop_assert!(ratio >= score::GUARANTEE, "{} for {:?} instead of {:?}", ratio, fast, best);
            Ok(Some(fast))
        }
        (Err(fast), Err(slow)) => {
            let counted: u32 = fast.per_filter().map(|(_, n)| n).sum();
            prop_assert_eq!(counted as usize, cell.len());
            prop_assert_eq!(fast, slow);
            Ok(None)
        }
        (fast, slow) => Err(TestCaseError::fail(format!("index {fast:?}, scan {slow:?}"))),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_history_keeps_the_promises(
        hosts in prop::collection::vec(spec(), 0..40),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let mut cell = Cell::new();
        for spec in hosts {
            cell.add_host(spec);
        }
        let mut record: Vec<(HostId, Request)> = Vec::new();
        for step in steps {
            match step {
                Step::Place(mut request) => {
                    if let Some(Decision { host, nodes, .. }) = agree(&cell, &request)? {
                        request.nodes = nodes;
                        let room = cell.headroom(&request);
                        prop_assert_eq!(cell.reserve(host, &request), Ok(()));
                        prop_assert_eq!(cell.headroom(&request), room.saturating_sub(1).min(cell.headroom(&request)));
                        record.push((host, *request));
                    }
                }
                Step::Force(host, request) => {
                    let was = cell.snapshot(HostId(host));
                    let mut request = request;
                    request.nodes = (0..usize::from(request.span)).fold(Nodes::NONE, |set, at| set.with(at));
                    match cell.reserve(HostId(host), &request) {
                        Ok(()) => record.push((HostId(host), *request)),
                        Err(_) => prop_assert_eq!(cell.snapshot(HostId(host)), was),
                    }
                }
                Step::Release(at) if !record.is_empty() => {
                    let (host, request) = record.swap_remove(at % record.len());
                    prop_assert_eq!(cell.release(host, &request), Ok(()));
                }
                Step::Release(_) => {}
                Step::Update(host, update) => {
                    let _ = cell.update_host(HostId(host), update);
                }
                Step::Add(spec) => {
                    cell.add_host(*spec);
                }
                Step::Remove(host) => {
                    let _ = cell.remove_host(HostId(host));
                }
            }
            prop_assert_eq!(cell.audit(record.iter().map(|(host, request)| (*host, request))), Ok(()));
        }
    }

    #[test]
    fn nothing_is_oversold_and_release_restores(
        hosts in prop::collection::vec(spec(), 1..12),
        requests in prop::collection::vec((0u32..12, request()), 1..80),
    ) {
        let mut cell = Cell::new();
        for spec in hosts {
            cell.add_host(spec);
        }
        let before: Vec<_> = cell.host_ids().map(|id| cell.snapshot(id)).collect();
        let mut held = Vec::new();
        for (host, mut request) in requests {
            let host = HostId(host % cell.len() as u32);
            if cell.check(host, &request).expect("a host of the cell").is_none() {
                request.nodes = cell.nodes_for(&request, host.0);
            }
            if cell.reserve(host, &request).is_ok() {
                held.push((host, request));
            }
            prop_assert_eq!(cell.oversold_hosts(), 0);
        }
        for (host, request) in held.into_iter().rev() {
            prop_assert_eq!(cell.release(host, &request), Ok(()));
        }
        prop_assert_eq!(before, cell.host_ids().map(|id| cell.snapshot(id)).collect::<Vec<_>>());
        prop_assert_eq!(cell.audit([]), Ok(()));
    }

    #[test]
    fn a_group_stays_even_while_every_domain_has_room(zones in 1u32..5, per_zone in 1u32..5, instances in 1u32..40, by_zone: bool) {
        let mut cell = Cell::new();
        for n in 0..zones * per_zone {
            cell.add_host(HostSpec {
                zone: ZoneId(n % zones),
                rack: RackId(0),
                fault: FaultId(0),
                state: HostState::Ready,
                runtimes: Runtimes::ALL,
                capacity: Capacity { cpu: 64_000, memory: 64 << 30, scratch: 0, slots: 100 },
                classes: Vec::new(),
                images: Vec::new(),
                load: Load((n * 37 % 1000) as u16),
                storage: Vec::new(),
                labels: Vec::new(),
                rtt: None,
                nodes: Vec::new(),
                pins: true,
            });
        }
        let level = if by_zone { SpreadLevel::Zone } else { SpreadLevel::Host };
        let spread = Spread { level, required: instances % 2 == 0, floor: None };
        let request = Request { group: Some(GroupId(0)), spread, ..Request::new(Runtime::Vm, 100, 1 << 20) };
        for _ in 0..instances {
            let host = cell.place_indexed(&request).map_err(|refusal| TestCaseError::fail(refusal.to_string()))?.host;
            prop_assert_eq!(cell.reserve(host, &request), Ok(()));
        }
        let (in_zones, on_hosts) = cell.group_counts(GroupId(0));
        let within_one = |counts: Vec<u32>, domains: u32| {
            let least = if counts.len() < domains as usize { 0 } else { counts.iter().copied().min().unwrap_or(0) };
            counts.iter().all(|n| n - least <= 1)
        };
        prop_assert!(within_one(on_hosts.iter().map(|(_, n)| *n).collect(), zones * per_zone));
        prop_assert!(!by_zone || within_one(in_zones.iter().map(|(_, n)| *n).collect(), zones));
    }

    /// A made-up rack room filled with pinned and floating requests, groups that stay together, keep apart, or keep their
    /// fault domains in different racks: recounted from the decisions alone.
    #[test]
    fn nodes_racks_and_company_hold_by_a_recount(
        shapes in prop::collection::vec((1u32..9, 1u32..9), 2..30),
        asks in prop::collection::vec((1u32..5, 1u64..5, 0u8..3, 0u32..3, 0u32..4, 0u32..3), 1..150),
    ) {
        let mut cell = Cell::new();
        for (n, (cpu, memory)) in shapes.iter().enumerate() {
            let node = Node { cpu: cpu * 1000, memory: u64::from(*memory) * 1024 * MI };
            let capacity = Capacity { cpu: node.cpu * 2, memory: node.memory * 2, scratch: 0, slots: 1000 };
            cell.add_host(HostSpec {
                zone: ZoneId(0),
                rack: RackId(n as u32 % 5),
                fault: FaultId(n as u32 % 3),
                state: HostState::Ready,
                runtimes: Runtimes::ALL,
                capacity,
                classes: Vec::new(),
                images: Vec::new(),
                load: Load(0),
                storage: Vec::new(),
                labels: Vec::new(),
                rtt: None,
                nodes: vec![node; 2],
                pins: true,
            });
        }
        let mut placed: Vec<(HostId, Request)> = Vec::new();
        for (cpu, memory, span, kind, group, domain) in asks {
            let mut request = Request {
                span,
                group: Some(GroupId(kind * 10 + group)),
                together: kind == 0,
                max_per_host: (kind == 1).then_some(1),
                domain: (kind == 2).then_some(DomainId(domain)),
                ..Request::new(Runtime::Vm, cpu * 1000, memory * 1024 * MI)
            };
            if let Some(decision) = agree(&cell, &request)? {
                request.nodes = decision.nodes;
                prop_assert_eq!(cell.reserve(decision.host, &request), Ok(()));
                placed.push((decision.host, request));
            }
        }
        for (n, (cpu, memory)) in shapes.iter().enumerate() {
            let here: Vec<&Request> = placed.iter().filter(|(host, _)| host.0 == n as u32).map(|(_, r)| r).collect();
            let (cpu, memory) = (cpu * 1000, u64::from(*memory) * 1024 * MI);
            for at in 0..2 {
                let on_node = || here.iter().filter(|r| r.nodes.has(at));
                prop_assert!(on_node().map(|r| r.cpu / u32::from(r.span)).sum::<u32>() <= cpu);
                prop_assert!(on_node().map(|r| r.memory / u64::from(r.span)).sum::<u64>() <= memory);
            }
            prop_assert!(here.iter().all(|r| r.nodes.len() == usize::from(r.span)));
            prop_assert!(here.iter().map(|r| r.cpu).sum::<u32>() <= cpu * 2);
            prop_assert!(here.iter().map(|r| r.memory).sum::<u64>() <= memory * 2);
        }
        for (at, (host, a)) in placed.iter().enumerate() {
            for (other, b) in placed[..at].iter().filter(|(_, b)| a.group == b.group) {
                prop_assert!(!a.together || host == other);
                prop_assert!(a.max_per_host.is_none() || host != other);
                prop_assert!(a.domain == b.domain || host.0 % 5 != other.0 % 5);
            }
        }
    }
}
