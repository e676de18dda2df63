//! `bench placement --hosts CSV --requests CSV [--fill] [--json]`: recorded requests for VMs, in their order, on recorded hosts
//! with NUMA nodes and racks.
//!
//! Each request is decided when it comes, by the placement room and by peers that scan every host under the same constraints:
//! first-fit, two kinds of best-fit and the rule of Kubernetes' `MostAllocated`. Nobody knows the requests to come, and nothing
//! is moved. What broke is counted from the files and the assignments alone ([`check`]). With `--fill` the requests come round
//! after round, each round's groups anew, until 200 in a row have found no place.
//!
//! The files' columns: `host,rack,numa0_vcpus,numa0_ram_gib,numa1_vcpus,numa1_ram_gib` and
//! `vcpus,ram_gib,numa,strategy,group,domain`; memory in GiB, decimals allowed; `numa` is how many nodes a VM spans;
//! `strategy` is empty, `affinity` (the group on one host), `anti-affinity` (each on its own) or `fault_domain` (members of
//! different `domain`s on different racks).

mod check;
mod data;
mod peers;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use nexus_placement as placement;
use placement::{Cell, DomainId, GroupId, HostId, Nodes, RackId, Request, Runtime, Runtimes, ZoneId};

use crate::report::{Row, cpu_seconds};
use data::{Host, Strategy, Vm};
use peers::Peer;

/// Refusals in a row after which the hosts count as full.
const FULL: usize = 200;
/// Decisions after which a run is given up.
const MOST_DECISIONS: usize = 5_000_000;

const USAGE: &str = "\
cargo xtask bench placement [--hosts CSV --requests CSV [--fill]] [--json]

  --hosts CSV      replays on these hosts; without it, a made-up cell of 50,000 hosts is measured
  --requests CSV   the requests, in their order
  --fill           repeats the requests until 200 in a row are refused

Examples:
  cargo xtask bench placement
  cargo xtask bench placement --hosts hosts.csv --requests requests.csv --fill --json";

/// What is to be replayed.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    hosts: PathBuf,
    requests: PathBuf,
    fill: bool,
}

fn options(arguments: &[&str]) -> anyhow::Result<Options> {
    let (mut hosts, mut requests, mut fill) = (None, None, false);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        let (name, inline) = match argument.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (*argument, None),
        };
        let mut path = || {
            let value = inline.or_else(|| rest.next().copied());
            value.map(PathBuf::from).with_context(|| format!("{name} needs the path of a CSV file\n\n{USAGE}"))
        };
        match name {
            "--hosts" => hosts = Some(path()?),
            "--requests" => requests = Some(path()?),
            "--fill" if inline.is_none() => fill = true,
            _ => bail!("the bench `placement` has no option {argument}\n\n{USAGE}"),
        }
    }
    let (Some(hosts), Some(requests)) = (hosts, requests) else {
        bail!("--hosts and --requests go together\n\n{USAGE}");
    };
    Ok(Options { hosts, requests, fill })
}

/// The bench `placement` with options.
pub fn run(arguments: &[&str]) -> anyhow::Result<Vec<Row>> {
    if arguments.iter().any(|a| matches!(*a, "--help" | "-h")) {
        println!("{USAGE}");
        return Ok(Vec::new());
    }
    let options = options(arguments)?;
    let hosts = data::hosts(&options.hosts)?;
    let vms = data::requests(&options.requests)?;
    let limit = if options.fill { MOST_DECISIONS } else { vms.len() };
    let full = if options.fill { FULL } else { usize::MAX };

    let ours = replay(&vms, full, limit, &mut room(&hosts))?;
    let mut peers = Vec::new();
    for peer in Peer::ALL {
        let mut state = peers::State::new(&hosts, peer);
        peers.push((peer, replay(&vms, full, limit, &mut |vm, round| Ok(state.place(vm, round)))?));
    }
    rows(&hosts, &vms, &ours, &peers)
}

/// Where one VM of one round went: host and, of it, the nodes.
pub type Place = Option<(usize, Nodes)>;

/// What one way to decide made of the requests.
pub struct Run {
    /// In order, round after round.
    pub places: Vec<Place>,
    seconds: f64,
    cpu: f64,
}

impl Run {
    fn placed(&self) -> usize {
        self.places.iter().flatten().count()
    }

    fn per_second(&self) -> f64 {
        self.places.len() as f64 / self.seconds.max(1e-9)
    }
}

fn replay(
    vms: &[Vm],
    full: usize,
    limit: usize,
    place: &mut dyn FnMut(&Vm, usize) -> anyhow::Result<Place>,
) -> anyhow::Result<Run> {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let mut places = Vec::new();
    let mut refused = 0;
    for (round, vm) in (0..).flat_map(|round| vms.iter().map(move |vm| (round, vm))).take(limit) {
        let at = place(vm, round)?;
        refused = if at.is_some() { 0 } else { refused + 1 };
        places.push(at);
        if refused >= full {
            break;
        }
    }
    ensure!(full == usize::MAX || refused >= full, "the hosts are not full after {limit} requests");
    Ok(Run { places, seconds: start.elapsed().as_secs_f64(), cpu: cpu_seconds() - cpu })
}

/// The placement room with these hosts, as a way to decide.
fn room(hosts: &[Host]) -> impl FnMut(&Vm, usize) -> anyhow::Result<Place> + use<> {
    let mut cell = Cell::new();
    for host in hosts {
        cell.add_host(placement::HostSpec {
            zone: ZoneId(0),
            rack: RackId(host.rack),
            fault: placement::FaultId(host.rack),
            state: placement::HostState::Ready,
            runtimes: Runtimes::ALL,
            capacity: placement::Capacity {
                cpu: host.nodes.iter().map(|node| node.cpu).sum(),
                memory: host.nodes.iter().map(|node| node.memory).sum(),
                scratch: 0,
                slots: u32::MAX,
            },
            classes: Vec::new(),
            images: Vec::new(),
            load: placement::Load(0),
            storage: Vec::new(),
            labels: Vec::new(),
            rtt: None,
            nodes: host.nodes.clone(),
            pins: true,
        });
    }
    let mut groups = BTreeMap::new();
    move |vm, round| {
        let next = groups.len() as u32;
        let group = vm.group.map(|group| GroupId(*groups.entry((round, vm.strategy, group)).or_insert(next)));
        let mut request = Request {
            span: vm.span,
            group,
            together: vm.strategy == Strategy::Affinity,
            max_per_host: (vm.strategy == Strategy::AntiAffinity).then_some(1),
            domain: (vm.strategy == Strategy::FaultDomain).then_some(DomainId(vm.domain)),
            ..Request::new(Runtime::Vm, vm.cpu, vm.memory)
        };
        let Ok(decision) = cell.place(&request) else { return Ok(None) };
        request.nodes = decision.nodes;
        let HostId(host) = decision.host;
        cell.reserve(decision.host, &request).with_context(|| format!("reserving on host {host}"))?;
        Ok(Some((host as usize, decision.nodes)))
    }
}

fn rows(hosts: &[Host], vms: &[Vm], ours: &Run, peers: &[(Peer, Run)]) -> anyhow::Result<Vec<Row>> {
    let (best, runner) = peers.iter().max_by_key(|(_, run)| run.placed()).context("there are peers")?;
    let broken = check::broken(hosts, vms, &ours.places);
    let used = |run: &Run| run.places.iter().flatten().map(|(host, _)| *host).collect::<BTreeSet<usize>>();
    let volume = |run: &Run, of: fn(&Vm) -> f64| {
        let each = run.places.iter().zip(vms.iter().cycle()).filter(|(place, _)| place.is_some());
        each.map(|(_, vm)| of(vm)).sum::<f64>()
    };
    let cpu = |run: &Run| volume(run, |vm| f64::from(vm.cpu) / 1000.0);
    let memory = |run: &Run| volume(run, |vm| vm.memory as f64 / data::GI);
    let beside = |name: &str, of: &dyn Fn(&Run) -> f64, unit| {
        Row::new(name, of(ours), unit).peer(format!("best peer: {}", best.name()), of(runner))
    };
    let mut rows = vec![
        beside("VMs placed", &|run| run.placed() as f64, "1").cpu_per_op(ours.cpu / ours.places.len() as f64),
        beside("VMs refused", &|run| (run.places.len() - run.placed()) as f64, "1"),
        beside("vCPUs placed", &cpu, "1"),
        beside("memory placed", &memory, "GiB"),
        beside("hosts used", &|run| used(run).len() as f64, "1"),
        beside("decisions", &Run::per_second, "1/s"),
        Row::new("constraints broken", broken.total() as f64, "1"),
        Row::new("most that volume allows, of the requests asked", check::most(hosts, vms, ours.places.len()), "1"),
        Row::new("least hosts that volume allows for what was placed", check::least_hosts(hosts, vms, ours), "1"),
    ];
    for (peer, run) in peers {
        rows.push(Row::new(format!("{}: VMs placed", peer.name()), run.placed() as f64, "1"));
        rows.push(Row::new(format!("{}: hosts used", peer.name()), used(run).len() as f64, "1"));
        rows.push(Row::new(format!("{}: decisions", peer.name()), run.per_second(), "1/s"));
        let broken = check::broken(hosts, vms, &run.places);
        ensure!(broken.total() == 0, "the peer {} broke constraints: {broken:?}", peer.name());
    }
    ensure!(broken.total() == 0, "the figures are void: constraints are broken: {broken:?}");
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOSTS: &str = "host,rack,numa0_vcpus,numa0_ram_gib,numa1_vcpus,numa1_ram_gib\n\
        a,0,8,16,8,16\nb,1,8,16,8,16\nc,2,16,32,4,64\nd,2,0,0,12.5,24\n";
    const REQUESTS: &str = "vcpus,ram_gib,numa,strategy,group,domain\n\
        4,8,1,,,\n8,16,2,affinity,0,\n8,16,2,affinity,0,\n2,4,1,anti-affinity,0,\n2,4,1,anti-affinity,0,\n\
        4,4,1,fault_domain,0,1\n4,4,1,fault_domain,0,2\n4,4,1,fault_domain,0,1\n7,20,1,,,\n";

    fn made_up() -> (Vec<Host>, Vec<Vm>) {
        (data::parse_hosts(HOSTS).unwrap(), data::parse_requests(REQUESTS).unwrap())
    }

    #[test]
    fn everyone_keeps_the_constraints_until_the_hosts_are_full() {
        let (hosts, vms) = made_up();
        let mut runs = vec![replay(&vms, FULL, 100_000, &mut room(&hosts)).unwrap()];
        for peer in Peer::ALL {
            let mut state = peers::State::new(&hosts, peer);
            runs.push(replay(&vms, FULL, 100_000, &mut |vm, round| Ok(state.place(vm, round))).unwrap());
        }
        for run in runs {
            assert_eq!(check::broken(&hosts, &vms, &run.places), check::Broken::default());
            assert!(run.placed() >= 9, "{}", run.placed());
            assert!(run.places.len() >= run.placed() + FULL);
            assert!(run.placed() as f64 <= check::most(&hosts, &vms, run.places.len()));
            assert!(check::least_hosts(&hosts, &vms, &run) <= 4.0);
        }
    }

    #[test]
    fn options_say_what_is_missing() {
        let parsed = options(&["--hosts", "h.csv", "--requests=r.csv", "--fill"]).unwrap();
        assert_eq!(parsed, Options { hosts: "h.csv".into(), requests: "r.csv".into(), fill: true });
        for (arguments, says) in [
            (&["--hosts", "h.csv"][..], "go together"),
            (&["--hosts"], "needs the path"),
            (&["--fil"], "no option --fil"),
        ] {
            assert!(options(arguments).unwrap_err().to_string().contains(says));
        }
    }
}
