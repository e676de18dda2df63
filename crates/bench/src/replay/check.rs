//! Counts what assignments broke, from the recorded files and the assignments alone: no line here is shared with those who
//! decided. And how many VMs, or how few hosts, are conceivable at all.

use std::collections::{BTreeMap, BTreeSet};

use nexus_placement::Node;

use super::data::{Host, Strategy, Vm};
use super::{Place, Run};

/// How often each rule was broken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Broken {
    /// Nodes with more cpu or memory taken than they had.
    pub overfull_nodes: usize,
    /// VMs that don't lie on as many nodes as they span.
    pub spans: usize,
    /// Groups of `affinity` on more than one host.
    pub apart: usize,
    /// Pairs of VMs of a group of `anti-affinity` on one host.
    pub crowded: usize,
    /// Racks with members of different domains of a group, by group.
    pub shared_racks: usize,
}

impl Broken {
    pub fn total(&self) -> usize {
        self.overfull_nodes + self.spans + self.apart + self.crowded + self.shared_racks
    }
}

/// Every VM that was placed, with its round, host and nodes.
fn placed<'a>(vms: &'a [Vm], places: &'a [Place]) -> impl Iterator<Item = (usize, &'a Vm, usize, Vec<usize>)> + 'a {
    places.iter().enumerate().filter_map(move |(at, place)| {
        let (host, nodes) = (*place)?;
        Some((at / vms.len(), &vms[at % vms.len()], host, nodes.iter().collect()))
    })
}

/// Recounts everything.
pub fn broken(hosts: &[Host], vms: &[Vm], places: &[Place]) -> Broken {
    let mut broken = Broken::default();
    let mut taken: BTreeMap<(usize, usize), (u64, u64)> = BTreeMap::new();
    let mut members: BTreeMap<(Strategy, usize, u32), Vec<(usize, u32)>> = BTreeMap::new();
    for (round, vm, host, nodes) in placed(vms, places) {
        if nodes.len() != usize::from(vm.span) {
            broken.spans += 1;
        }
        // In halves, so that an odd number is halved exactly.
        for node in nodes {
            let sum = taken.entry((host, node)).or_default();
            let halves = 2 / u64::from(vm.span);
            sum.0 += u64::from(vm.cpu) * halves;
            sum.1 += vm.memory * halves;
        }
        if let Some(group) = vm.group {
            members.entry((vm.strategy, round, group)).or_default().push((host, vm.domain));
        }
    }
    for ((host, node), (cpu, memory)) in taken {
        let has = hosts[host].nodes.get(node).copied().unwrap_or_default();
        if cpu > u64::from(has.cpu) * 2 || memory > has.memory * 2 {
            broken.overfull_nodes += 1;
        }
    }
    for ((strategy, ..), members) in members {
        let on: BTreeSet<usize> = members.iter().map(|(host, _)| *host).collect();
        match strategy {
            Strategy::None => {}
            Strategy::Affinity => broken.apart += usize::from(on.len() > 1),
            Strategy::AntiAffinity => broken.crowded += members.len() - on.len(),
            Strategy::FaultDomain => {
                let mut racks: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
                for (host, domain) in members {
                    racks.entry(hosts[host].rack).or_default().insert(domain);
                }
                broken.shared_racks += racks.values().filter(|domains| domains.len() > 1).count();
            }
        }
    }
    broken
}

/// No one can place more of the first `asked` requests than this: as many of the smallest as all hosts together have the cpu
/// for, or the memory, whichever are fewer. Nodes, hosts' borders, groups and the order of arrival are left out.
pub fn most(hosts: &[Host], vms: &[Vm], asked: usize) -> f64 {
    let fit = |of: fn(&Vm) -> u64, has: fn(&Node) -> u64| {
        let mut left: u64 = hosts.iter().flat_map(|host| &host.nodes).map(has).sum();
        let mut sizes: Vec<u64> = vms.iter().cycle().take(asked).map(of).collect();
        sizes.sort_unstable();
        let fits = move |size: &&u64| {
            let fits = **size <= left;
            left = left.saturating_sub(**size);
            fits
        };
        sizes.iter().take_while(fits).count()
    };
    fit(|vm| vm.cpu.into(), |node| node.cpu.into()).min(fit(|vm| vm.memory, |node| node.memory)) as f64
}

/// No one can put what the run placed on fewer hosts than this: those with most cpu, or with most memory, whichever must be more.
pub fn least_hosts(hosts: &[Host], vms: &[Vm], run: &Run) -> f64 {
    let need = |of: fn(&Vm) -> u64, has: fn(&Node) -> u64| {
        let mut wanted: u64 = placed(vms, &run.places).map(|(_, vm, ..)| of(vm)).sum();
        let mut sizes: Vec<u64> = hosts.iter().map(|host| host.nodes.iter().map(has).sum()).collect();
        sizes.sort_unstable_by(|a, b| b.cmp(a));
        let mut hosts = 0;
        for size in sizes {
            if wanted == 0 {
                break;
            }
            wanted = wanted.saturating_sub(size);
            hosts += 1;
        }
        hosts
    };
    f64::from(need(|vm| vm.cpu.into(), |node| node.cpu.into()).max(need(|vm| vm.memory, |node| node.memory)))
}

#[cfg(test)]
mod tests {
    use super::super::data::{parse_hosts, parse_requests};
    use super::*;
    use nexus_placement::Nodes;

    #[test]
    fn each_rule_is_seen_to_be_broken() {
        let hosts = parse_hosts(
            "host,rack,numa0_vcpus,numa0_ram_gib,numa1_vcpus,numa1_ram_gib\na,0,8,16,8,16\nb,0,8,16,8,16\n",
        )
        .unwrap();
        let (one, other, both) = (Nodes::NONE.with(0), Nodes::NONE.with(1), Nodes::NONE.with(0).with(1));
        let count = |requests: &str, places: &[(usize, Nodes)]| {
            let vms = parse_requests(&format!("vcpus,ram_gib,numa,strategy,group,domain\n{requests}")).unwrap();
            broken(&hosts, &vms, &places.iter().copied().map(Some).collect::<Vec<_>>())
        };
        let none = Broken::default();
        assert_eq!(count("9,1,2,,,\n", &[(0, both)]), none);
        assert_eq!(count("9,1,2,,,\n", &[(0, one)]), Broken { spans: 1, ..none });
        assert_eq!(count("9,1,1,,,\n", &[(0, one)]), Broken { overfull_nodes: 1, ..none });
        assert_eq!(count("1,9,1,,,\n1,9,1,,,\n", &[(0, one), (0, one)]), Broken { overfull_nodes: 1, ..none });
        assert_eq!(count("1,9,1,,,\n1,9,1,,,\n", &[(0, one), (0, other)]), none);
        let group =
            |strategy, domains: [u32; 2]| domains.map(|domain| format!("1,1,1,{strategy},0,{domain}\n")).concat();
        assert_eq!(count(&group("affinity", [0; 2]), &[(0, one), (1, one)]), Broken { apart: 1, ..none });
        assert_eq!(count(&group("affinity", [0; 2]), &[(0, one), (0, other)]), none);
        assert_eq!(count(&group("anti-affinity", [0; 2]), &[(0, one), (0, other)]), Broken { crowded: 1, ..none });
        assert_eq!(count(&group("fault_domain", [1, 2]), &[(0, one), (1, one)]), Broken { shared_racks: 1, ..none });
        assert_eq!(count(&group("fault_domain", [1, 1]), &[(0, one), (1, one)]), none);
        // The same group's name in another round is another group.
        let rounds = [(0, one), (0, other), (1, one), (1, other)];
        assert_eq!(count(&group("affinity", [0; 2]), &rounds), none);
    }
}
