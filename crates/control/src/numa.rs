//! NUMA nodes as rows have them: what hosts may declare, and what instances that are kept to a node leave free there.

use nexus_model::kind::{Capacity, CpuList, Host, HostSpec, Instance, MAX_NUMA_NODES, MAX_TROUBLE, NumaNode, NumaRoom};
use nexus_model::{Bytes, MilliCpu, Name, Object};

use crate::world::World;

/// What a host declares, as far as it is taken in: nodes beyond the bound are not told apart.
pub fn bounded(spec: &HostSpec) -> HostSpec {
    let mut spec = spec.clone();
    spec.numa_nodes.retain(|node| node.cpus.parse::<CpuList>().is_ok_and(|list| list.to_string() == node.cpus));
    spec.numa_nodes.sort_by_key(|node| node.id);
    spec.numa_nodes.dedup_by_key(|node| node.id);
    spec.numa_nodes.truncate(MAX_NUMA_NODES);
    for trouble in [&mut spec.numa_trouble, &mut spec.network_trouble] {
        if let Some((end, _)) = trouble.char_indices().nth(MAX_TROUBLE) {
            trouble.truncate(end);
        }
    }
    spec
}

/// What an instance takes of each node that it is kept to.
fn part(instance: &Object<Instance>, nodes: &[NumaNode]) -> Option<(u32, u64)> {
    let ids = &instance.status.numa_nodes;
    let there = instance.status.finished.is_none() && ids.iter().all(|id| nodes.iter().any(|node| node.id == *id));
    let span = u32::try_from(ids.len()).ok().filter(|span| there && *span > 0)?;
    let reserved = instance.spec.template.parts().reserved();
    Some((reserved.cpu.0.div_ceil(span), reserved.memory.0.div_ceil(u64::from(span))))
}

/// What is reserved and free on each node of a host, recounted from its instances. `reserved` is the whole host's.
pub fn rooms<'a>(
    host: &Object<Host>,
    reserved: &Capacity,
    instances: impl Iterator<Item = &'a Object<Instance>>,
) -> Vec<NumaRoom> {
    let (nodes, capacity) = (&host.spec.numa_nodes, &host.spec.capacity);
    let mut taken: Vec<(u32, u64)> = vec![(0, 0); nodes.len()];
    for instance in instances {
        let Some((cpu, memory)) = part(instance, nodes) else { continue };
        for (node, (all_cpu, all_memory)) in nodes.iter().zip(&mut taken) {
            if instance.status.numa_nodes.contains(&node.id) {
                *all_cpu = all_cpu.saturating_add(cpu);
                *all_memory = all_memory.saturating_add(memory);
            }
        }
    }
    let whole_cpu = capacity.cpu.0.saturating_sub(reserved.cpu.0);
    let whole_memory = capacity.memory.0.saturating_sub(reserved.memory.0);
    let room = |(node, (cpu, memory)): (&NumaNode, (u32, u64))| NumaRoom {
        id: node.id,
        reserved_cpu: MilliCpu(cpu),
        reserved_memory: Bytes(memory),
        free_cpu: MilliCpu(node.cpu.0.saturating_sub(cpu).min(whole_cpu)),
        free_memory: Bytes(node.memory.0.saturating_sub(memory).min(whole_memory)),
    };
    nodes.iter().zip(taken).map(room).collect()
}

/// In which ways what is counted of a host's nodes differs from what its instances take.
pub fn differences(world: &World, host: &Object<Host>, reserved: &Capacity) -> Vec<String> {
    let name: &Name = &host.metadata.name;
    let rooms = rooms(host, reserved, world.instances_on(name));
    let mut differences = Vec::new();
    if rooms != host.status.numa_nodes {
        differences
            .push(format!("host {name}: {:?} counted on its NUMA nodes, {rooms:?} reserved", host.status.numa_nodes));
    }
    let books = world.scheduler.as_ref().map(|scheduler| scheduler.node_books(name)).unwrap_or_default();
    for ((node, room), free) in host.spec.numa_nodes.iter().zip(&rooms).zip(books) {
        let cpu = node.cpu.0.saturating_sub(room.reserved_cpu.0);
        let memory = node.memory.0.saturating_sub(room.reserved_memory.0);
        if (free.cpu, free.memory) != (cpu, memory) {
            let id = node.id;
            differences.push(format!(
                "host {name}: the scheduler has {free:?} free on NUMA node {id}, {cpu} m and {memory} bytes are"
            ));
        }
    }
    differences
}
