//! The host's NUMA nodes: what the kernel says of them (Documentation/admin-guide/mm/numaperf.rst, `/sys/devices/system/node`),
//! or what an operator says in its place; their shares of what the host declares; and what an instance is kept to that is
//! placed on one.
//!
//! A node counts if it has processors and memory that the agent's own cgroup may use. A host with one such node declares
//! it with the whole capacity, and keeps nothing to its memory: there may be more that belongs to no processor.

use std::collections::BTreeMap;
use std::path::Path;

use nexus_compute::CpuSet;
use nexus_env::Disk;
use nexus_model::kind::{Capacity, CpuList, MAX_NUMA_NODES, NumaNode};
use nexus_model::{Bytes, MilliCpu};

/// Where the kernel shows nodes.
pub const NODES: &str = "/sys/devices/system/node";
/// Nodes that are looked at; machines with more are unheard of.
const MOST: usize = 64;
/// Declared memory is a whole number of these, so that a kernel which keeps a little more for itself changes nothing.
const GRAIN: u64 = 16 << 20;

/// One node as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawNode {
    pub id: u16,
    pub cpus: CpuList,
    pub memory: Bytes,
}

/// What groups of instances may use, as the kernel says of the cgroup that they are in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    pub cpus: CpuList,
    pub memory: CpuList,
}

/// What a host declares, and what it does about it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Numa {
    pub nodes: Vec<NumaNode>,
    /// Why it keeps no instance to a node; empty if it does.
    pub trouble: String,
    /// What an instance is kept to, by node.
    pub sets: BTreeMap<u16, CpuSet>,
}

impl Numa {
    /// What an instance is kept to that is placed on these nodes.
    pub(crate) fn set_of(&self, nodes: &[u16]) -> Result<Option<CpuSet>, String> {
        let mut whole: Option<CpuSet> = None;
        for id in nodes {
            let Some(set) = self.sets.get(id) else {
                let why = if self.trouble.is_empty() { "it has no such node" } else { &self.trouble };
                return Err(format!("this host can't keep an instance to its NUMA node {id}: {why}"));
            };
            match &mut whole {
                None => whole = Some(set.clone()),
                Some(sum) => {
                    sum.cpus = format!("{},{}", sum.cpus, set.cpus);
                    sum.mems = sum.mems.take().zip(set.mems.as_ref()).map(|(a, b)| format!("{a},{b}"));
                }
            }
        }
        Ok(whole)
    }
}

/// Reads the nodes that have processors and memory, by number; none where the kernel shows none.
pub fn read(disk: &dyn Disk, root: &Path) -> Vec<RawNode> {
    let text = |path: &Path| disk.read(path).ok().map(|text| String::from_utf8_lossy(&text).into_owned());
    let number = |name: &str| name.strip_prefix("node").and_then(|id| id.parse::<u16>().ok());
    let listed = disk.list(root).unwrap_or_default();
    let mut ids: Vec<u16> = listed.iter().filter_map(|entry| number(&entry.name)).collect();
    ids.sort_unstable();
    let node = |id: u16| {
        let dir = root.join(format!("node{id}"));
        let cpus: CpuList = text(&dir.join("cpulist"))?.parse().ok()?;
        let memory = total(&text(&dir.join("meminfo"))?)?;
        (!cpus.is_empty() && memory.0 > 0).then_some(RawNode { id, cpus, memory })
    };
    ids.into_iter().take(MOST).filter_map(node).collect()
}

/// `Node 0 MemTotal:       23947040 kB`
fn total(meminfo: &str) -> Option<Bytes> {
    let of = |line: &str| line.split_once("MemTotal:")?.1.trim().strip_suffix(" kB")?.parse::<u64>().ok();
    meminfo.lines().find_map(of).and_then(|kib| kib.checked_mul(1024)).map(Bytes)
}

/// What the host declares: the operator's nodes if there are any, or else the kernel's.
pub fn declare(kernel: &[RawNode], own: &[RawNode], allowed: Result<Allowed, String>, capacity: &Capacity) -> Numa {
    let (allowed, trouble) = match allowed {
        Ok(allowed) => (Some(allowed), String::new()),
        Err(why) => (None, why),
    };
    let usable = |node: &RawNode| {
        let Some(allowed) = &allowed else { return Some(node.clone()) };
        let cpus = node.cpus.both(&allowed.cpus);
        // A node that the kernel doesn't know has memory of one that it does.
        let known = kernel.iter().any(|real| real.id == node.id);
        let here = !known || allowed.memory.has(node.id);
        (!cpus.is_empty() && here).then(|| RawNode { cpus, ..node.clone() })
    };
    let all = if own.is_empty() { kernel } else { own };
    let mut nodes: Vec<RawNode> = all.iter().filter_map(usable).collect();
    nodes.sort_by_key(|node| node.id);
    if nodes.len() > MAX_NUMA_NODES {
        tracing::warn!(nodes = nodes.len(), "only the first {MAX_NUMA_NODES} NUMA nodes are told apart");
        nodes.truncate(MAX_NUMA_NODES);
    }
    let cpus: u64 = nodes.iter().map(|node| u64::from(node.cpus.count())).sum();
    let memory = nodes.iter().fold(0u64, |sum, node| sum.saturating_add(node.memory.0));
    // The kernel's nodes are all that there is, and share what the host declares. An operator's may be less.
    let (of_cpus, of_memory) = match own.is_empty() {
        true => (cpus, memory),
        false => (cpus.max(u64::from(capacity.cpu.0 / 1000)), memory.max(capacity.memory.0)),
    };
    let share = |whole: u64, part: u64, of: u64| {
        u64::try_from(u128::from(whole) * u128::from(part) / u128::from(of.max(1))).unwrap_or(whole)
    };
    let single = nodes.len() == 1;
    let declared = |node: &RawNode| {
        let cpu = share(u64::from(capacity.cpu.0), u64::from(node.cpus.count()), of_cpus);
        let memory = share(capacity.memory.0, node.memory.0, of_memory) / GRAIN * GRAIN;
        NumaNode {
            id: node.id,
            cpus: node.cpus.to_string(),
            cpu: if single { capacity.cpu } else { MilliCpu(u32::try_from(cpu).unwrap_or(u32::MAX)) },
            memory: if single { capacity.memory } else { Bytes(memory) },
        }
    };
    let set = |node: &RawNode| {
        let real = !single && kernel.iter().any(|known| known.id == node.id);
        (node.id, CpuSet { cpus: node.cpus.to_string(), mems: real.then(|| node.id.to_string()) })
    };
    let sets = if allowed.is_some() { nodes.iter().map(set).collect() } else { BTreeMap::new() };
    Numa { nodes: nodes.iter().map(declared).collect(), trouble, sets }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nexus_env::RealDisk;

    use super::*;

    const GI: u64 = 1 << 30;

    /// A folder as the kernel's, of two sockets, memory without processors, and what else is there.
    fn machine() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (id, cpus, gi) in [(0, "0-3,8-11\n", 16), (1, "4-7,12-15\n", 48), (2, "\n", 64)] {
            let node = dir.path().join(format!("node{id}"));
            fs::create_dir_all(&node).unwrap();
            fs::write(node.join("cpulist"), cpus).unwrap();
            let kib = gi * GI / 1024;
            let meminfo = format!("Node {id} MemTotal:       {kib} kB\nNode {id} MemFree:        1 kB\n");
            fs::write(node.join("meminfo"), meminfo).unwrap();
        }
        fs::create_dir_all(dir.path().join("power")).unwrap();
        fs::create_dir_all(dir.path().join("nodeX")).unwrap();
        fs::write(dir.path().join("online"), "0-2\n").unwrap();
        dir
    }

    fn allowed(cpus: &str, memory: &str) -> Result<Allowed, String> {
        Ok(Allowed { cpus: cpus.parse().unwrap(), memory: memory.parse().unwrap() })
    }

    fn capacity(cpu: u32, gi: u64) -> Capacity {
        Capacity { cpu: MilliCpu(cpu), memory: Bytes(gi * GI), ..Capacity::default() }
    }

    #[test]
    fn the_kernels_nodes_share_what_the_host_declares() {
        let dir = machine();
        let kernel = read(&RealDisk, dir.path());
        assert_eq!(kernel.iter().map(|node| node.id).collect::<Vec<_>>(), [0, 1], "memory alone is no node");
        let numa = declare(&kernel, &[], allowed("0-15", "0-2"), &capacity(16_000, 48));
        let node =
            |id, cpus: &str, cpu, gi| NumaNode { id, cpus: cpus.into(), cpu: MilliCpu(cpu), memory: Bytes(gi * GI) };
        assert_eq!(numa.nodes, [node(0, "0-3,8-11", 8000, 12), node(1, "4-7,12-15", 8000, 36)]);
        assert_eq!(numa.sets[&1], CpuSet { cpus: "4-7,12-15".into(), mems: Some("1".into()) });
        assert_eq!(numa.set_of(&[]), Ok(None));
        assert_eq!(numa.set_of(&[1]).unwrap().as_ref(), Some(&numa.sets[&1]));
        assert!(numa.set_of(&[5]).unwrap_err().contains("NUMA node 5: it has no such node"));
        // The agent's group has only some of them.
        let numa = declare(&kernel, &[], allowed("0-5", "0-2"), &capacity(6_000, 48));
        assert_eq!(
            numa.nodes.iter().map(|n| (n.cpus.as_str(), n.cpu.0)).collect::<Vec<_>>(),
            [("0-3", 4000), ("4-5", 2000)]
        );
        // With one left, it is the whole host, whose memory it is not kept to.
        let numa = declare(&kernel, &[], allowed("0-3", "0"), &capacity(4_000, 48));
        assert_eq!(numa.nodes, [node(0, "0-3", 4000, 48)]);
        assert_eq!(numa.sets[&0], CpuSet { cpus: "0-3".into(), mems: None });
        assert_eq!(read(&RealDisk, &dir.path().join("none")), []);
    }

    #[test]
    fn an_operators_word_counts_and_a_host_without_the_controller_says_so() {
        let kernel = read(&RealDisk, machine().path());
        let own = |id, cpus: &str, gi| RawNode { id, cpus: cpus.parse().unwrap(), memory: Bytes(gi * GI) };
        let numa = declare(&kernel, &[own(7, "1", 4), own(0, "0", 4)], allowed("0-15", "0-2"), &capacity(4_000, 16));
        let said: Vec<_> = numa.nodes.iter().map(|n| (n.id, n.cpu.0, n.memory.0 / GI)).collect();
        assert_eq!(said, [(0, 1000, 4), (7, 1000, 4)], "less than the host has");
        assert_eq!((&numa.sets[&0].mems, &numa.sets[&7].mems), (&Some("0".to_owned()), &None));
        let numa = declare(&kernel, &[own(0, "0", 40), own(1, "1", 40)], allowed("0-15", "0-2"), &capacity(1_000, 16));
        let said: Vec<_> = numa.nodes.iter().map(|n| (n.cpu.0, n.memory.0 / GI)).collect();
        assert_eq!(said, [(500, 8), (500, 8)], "no more than the host has");

        let numa = declare(&kernel, &[], Err("no cpuset".into()), &capacity(16_000, 48));
        assert_eq!((numa.nodes.len(), numa.trouble.as_str()), (2, "no cpuset"));
        assert!(numa.set_of(&[0]).unwrap_err().ends_with("NUMA node 0: no cpuset"));
    }
}
