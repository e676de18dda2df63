//! Which NUMA nodes instances are kept to, in the words of placement: hosts and rows call nodes by the kernel's numbers, cells
//! by their place in the host's list.
//!
//! What is booked on nodes is remembered as it was booked, because a host may say other nodes after a boot: it is given back
//! as it was taken, and taken anew on the nodes that the host has now.

use std::collections::BTreeMap;

use nexus_model::kind::{HostSpec, Instance};
use nexus_model::{Name, Object, Uid, kind};
use nexus_placement as placement;
use placement::{Cell, HostId, Node, Nodes};

use super::Scheduler;

/// A host's nodes as placement has them.
pub(super) fn of(spec: &HostSpec) -> Vec<Node> {
    spec.numa_nodes.iter().map(|node| Node { cpu: node.cpu.0, memory: node.memory.0 }).collect()
}

/// What is booked on nodes, by host.
#[derive(Debug, Default)]
pub(super) struct Pinned {
    hosts: BTreeMap<Name, OnHost>,
}

#[derive(Debug, Default)]
struct OnHost {
    /// The numbers of its nodes, in the order of its list.
    ids: Vec<u16>,
    booked: BTreeMap<Uid, Booked>,
}

#[derive(Debug)]
struct Booked {
    /// As the row says.
    ids: Vec<u16>,
    request: placement::Request,
}

impl OnHost {
    /// Where a request is booked that is kept to some nodes. A host that is one node has all on it; one that has lost the
    /// nodes since is charged as a whole.
    fn nodes(&self, ids: &[u16]) -> Nodes {
        let place = |id: &u16| self.ids.iter().position(|own| own == id);
        let places: Option<Vec<usize>> = ids.iter().map(place).collect();
        let places = places.filter(|_| self.ids.len() > 1);
        places.into_iter().flatten().fold(Nodes::NONE, Nodes::with)
    }

    fn book(&self, request: &mut placement::Request, ids: &[u16]) {
        request.nodes = self.nodes(ids);
        request.span = request.nodes.len() as u8;
    }
}

impl Pinned {
    /// Learns which nodes a host has, and books anew what is kept to some if they are others than before.
    pub(super) fn declare(&mut self, cell: &mut Cell, id: HostId, host: &Object<kind::Host>) {
        let ids: Vec<u16> = host.spec.numa_nodes.iter().map(|node| node.id).collect();
        let on = self.hosts.entry(host.metadata.name.clone()).or_default();
        if on.ids == ids {
            return;
        }
        on.ids = ids;
        let uids: Vec<Uid> = on.booked.keys().copied().collect();
        for uid in uids {
            let Some(Booked { ids, mut request }) = on.booked.remove(&uid) else { continue };
            cell.release(id, &request).expect("what is remembered was booked");
            on.book(&mut request, &ids);
            if cell.reserve(id, &request).is_err() {
                cell.adopt(id, &request).expect("the handle came from this cell");
            }
            on.booked.insert(uid, Booked { ids, request });
        }
    }

    pub(super) fn forget(&mut self, host: &Name) {
        self.hosts.remove(host);
    }

    /// Says on which nodes an instance's request is to be booked, and remembers it.
    pub(super) fn put(&mut self, host: &Name, instance: &Object<Instance>, request: &mut placement::Request) {
        let ids = &instance.status.numa_nodes;
        if ids.is_empty() {
            return;
        }
        let on = self.hosts.entry(host.clone()).or_default();
        on.book(request, ids);
        on.booked.insert(instance.metadata.uid, Booked { ids: ids.clone(), request: request.clone() });
    }

    /// Says on which nodes an instance's request was booked, and forgets it.
    pub(super) fn take(&mut self, host: &Name, instance: &Object<Instance>, request: &mut placement::Request) {
        let booked = self.hosts.get_mut(host).and_then(|on| on.booked.remove(&instance.metadata.uid));
        if let Some(booked) = booked {
            (request.nodes, request.span) = (booked.request.nodes, booked.request.span);
        }
    }

    /// The nodes that were chosen for an instance. On a host that is one node, that one.
    pub(super) fn chosen(&self, host: &Name, nodes: Nodes, instance: &Object<Instance>) -> Vec<u16> {
        let ids = self.hosts.get(host).map_or(&[][..], |on| &on.ids);
        match ids {
            [only] if instance.spec.template.constraints.single_node() => vec![*only],
            _ => nodes.iter().filter_map(|at| ids.get(at).copied()).collect(),
        }
    }
}

impl Scheduler {
    /// What each node of a host has free by the cell's books, in the order of the host's list; none of a host that is one.
    pub fn node_books(&self, host: &Name) -> Vec<Node> {
        let snapshot = self.hosts.get(host).and_then(|(cell, id)| self.cells.get(cell)?.snapshot(*id).ok());
        snapshot.map(|host| host.nodes.iter().map(|(_, free)| *free).collect()).unwrap_or_default()
    }
}
