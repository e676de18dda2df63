//! The cell: its hosts, what is reserved on them, and the index kept in step with both.
//!
//! Every change goes through one of few calls, each of which leaves the index, the group counts and the image sets
//! agreeing with the hosts. Reservations are checked against what is free before anything is written, so a host can't
//! be oversold; only a capacity that shrinks under its reservations, or [`Cell::adopt`], can leave a host over-full,
//! and such a host takes nothing more until it has drained.

use crate::group::{Group, Site};
use crate::hostset::HostSet;
use crate::mix::Topology;
use crate::numa::{self, NodeUse};
use crate::pool::{Place, PoolKey, Pools, bucket_of};
use crate::refusal::Filter;
use crate::score::{fraction, load_term, nominal};
use crate::types::{
    Capacity, ClassId, FaultId, GroupId, HostId, HostSpec, HostState, HostUpdate, ImageId, LabelId, Load, RackId,
    Request, Runtimes, UnknownHost, ZoneId,
};
use std::collections::{BTreeMap, BTreeSet};

/// Why a reservation was not changed. The cell is as it was before the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    #[error(transparent)]
    UnknownHost(#[from] UnknownHost),
    #[error("host {} has {free} of {} free, {wanted} wanted", .host.0, .resource.name())]
    Exceeds { host: HostId, resource: Filter, wanted: u64, free: u64 },
    #[error("host {} already holds {max} of the group, as many as it may", .host.0)]
    PerHost { host: HostId, max: u32 },
    #[error("{span} of host {}'s NUMA nodes are to be named, {named} are", .host.0)]
    Nodes { host: HostId, span: u8, named: usize },
    #[error("host {} holds no reservation like this: less {} is reserved", .host.0, .resource.name())]
    NotReserved { host: HostId, resource: Filter },
    #[error("host {} still holds {instances} reservations", .host.0)]
    InUse { host: HostId, instances: u32 },
}

/// One compute class on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stock {
    pub(crate) class: ClassId,
    pub(crate) capacity: u32,
    pub(crate) reserved: u64,
}

impl Stock {
    pub(crate) fn free(&self) -> u64 {
        u64::from(self.capacity).saturating_sub(self.reserved)
    }
}

/// One storage class on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Store {
    pub(crate) class: ClassId,
    /// Bytes.
    pub(crate) capacity: u64,
    pub(crate) reserved: u128,
}

impl Store {
    pub(crate) fn free(&self) -> u64 {
        u64::try_from(u128::from(self.capacity).saturating_sub(self.reserved)).unwrap_or(0)
    }
}

/// Sums of reservations. Wider than [`Capacity`] so that [`Cell::adopt`] can't overflow them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reserved {
    pub(crate) cpu: u64,
    pub(crate) memory: u128,
    pub(crate) scratch: u128,
    pub(crate) instances: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Host {
    zone: ZoneId,
    rack: RackId,
    fault: FaultId,
    state: HostState,
    runtimes: Runtimes,
    capacity: Capacity,
    load: Load,
    images: BTreeSet<ImageId>,
    reserved: Reserved,
    /// Sorted by class. A class whose capacity went away stays while some of it is reserved.
    pub(crate) stock: Vec<Stock>,
    /// The same of storage classes, in bytes.
    pub(crate) storage: Vec<Store>,
    /// Sorted.
    labels: Vec<LabelId>,
    rtt: Option<u32>,
    /// Several nodes, or none. One whose capacity went away stays while some of it is reserved.
    pub(crate) nodes: Vec<NodeUse>,
    pub(crate) pins: bool,
}

impl Host {
    fn site(&self) -> Site {
        Site { zone: self.zone, rack: self.rack, fault: self.fault }
    }

    fn key(&self) -> PoolKey {
        PoolKey {
            zone: self.zone,
            runtimes: self.runtimes,
            classes: self.stock.iter().filter(|s| s.capacity > 0).map(|s| (s.class, s.capacity)).collect(),
            cpu_unit: nominal(u64::from(self.capacity.cpu)),
            memory_unit: nominal(self.capacity.memory),
            quarter: quarter(self.load),
            numa: self.is_numa(),
        }
    }

    /// Whether it has several nodes to tell apart.
    pub(crate) fn is_numa(&self) -> bool {
        self.nodes.iter().any(|node| node.offered)
    }

    pub(crate) fn class_free(&self, class: ClassId) -> u64 {
        self.stock.iter().find(|s| s.class == class).map_or(0, Stock::free)
    }

    pub(crate) fn storage_free(&self, class: ClassId) -> u64 {
        self.storage.iter().find(|s| s.class == class).map_or(0, Store::free)
    }

    pub(crate) fn labels(&self) -> &[LabelId] {
        &self.labels
    }

    pub(crate) fn rtt(&self) -> Option<u32> {
        self.rtt
    }

    fn oversold(&self) -> bool {
        self.reserved.cpu > u64::from(self.capacity.cpu)
            || self.reserved.memory > u128::from(self.capacity.memory)
            || self.reserved.scratch > u128::from(self.capacity.scratch)
            || self.reserved.instances > self.capacity.slots
            || self.stock.iter().any(|s| s.reserved > u64::from(s.capacity))
            || self.storage.iter().any(|s| s.reserved > u128::from(s.capacity))
            || self.nodes.iter().any(NodeUse::oversold)
    }
}

/// What the search reads of each host: kept small and together, apart from the rest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hot {
    pub(crate) memory: u64,
    pub(crate) scratch: u64,
    pub(crate) cpu: u32,
    pub(crate) slots: u32,
    /// Free fractions of the nominal size.
    pub(crate) cpu_fraction: u32,
    pub(crate) memory_fraction: u32,
    pub(crate) load_term: u32,
    pub(crate) place: Place,
}

fn quarter(load: Load) -> u8 {
    (load.0 / 250).min(3) as u8
}

/// The least load of a quarter, in thousandths.
pub(crate) fn quarter_floor(quarter: u8) -> u16 {
    u16::from(quarter) * 250
}

/// The hosts of one cell. See the crate's page for what it promises.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    pub(crate) hosts: Vec<Option<Host>>,
    pub(crate) hot: Vec<Hot>,
    vacant: BTreeSet<u32>,
    pub(crate) live: u32,
    pub(crate) pools: Pools,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    pub(crate) images: BTreeMap<ImageId, HostSet>,
    pub(crate) topology: Topology,
}

impl Cell {
    /// A cell without hosts.
    pub fn new() -> Self {
        Cell::default()
    }

    /// Hosts in the cell, in whatever state.
    pub fn len(&self) -> usize {
        self.live as usize
    }

    /// Whether the cell has no host.
    pub fn is_empty(&self) -> bool {
        self.live == 0
    }

    /// Takes a host in. Its handle is the lowest that is free.
    pub fn add_host(&mut self, spec: HostSpec) -> HostId {
        let index = self.vacant.pop_first().unwrap_or(self.hosts.len() as u32);
        let images: BTreeSet<ImageId> = spec.images.into_iter().collect();
        for image in &images {
            self.images.entry(*image).or_default().insert(index);
        }
        let mut host = Host {
            zone: spec.zone,
            rack: spec.rack,
            fault: spec.fault,
            state: spec.state,
            runtimes: spec.runtimes,
            capacity: spec.capacity,
            load: spec.load,
            images,
            reserved: Reserved::default(),
            stock: Vec::new(),
            storage: Vec::new(),
            labels: spec.labels,
            rtt: spec.rtt,
            nodes: Vec::new(),
            pins: spec.pins,
        };
        numa::set_nodes(&mut host.nodes, &spec.nodes);
        host.labels.sort_unstable();
        set_stock(&mut host.stock, &spec.classes);
        set_storage(&mut host.storage, &spec.storage);
        let hot = Hot {
            memory: 0,
            scratch: 0,
            cpu: 0,
            slots: 0,
            cpu_fraction: 0,
            memory_fraction: 0,
            load_term: 0,
            place: Place::NOWHERE,
        };
        if index as usize == self.hosts.len() {
            self.hosts.push(Some(host));
            self.hot.push(hot);
        } else {
            self.hosts[index as usize] = Some(host);
            self.hot[index as usize] = hot;
        }
        self.live += 1;
        self.enter(index);
        HostId(index)
    }

    /// Changes what is known of a host. Capacity may shrink below what is reserved: the host then takes nothing more
    /// until it has drained.
    pub fn update_host(&mut self, id: HostId, update: HostUpdate) -> Result<(), UnknownHost> {
        self.host(id)?;
        let index = id.0;
        if let Some(images) = update.images {
            self.set_images(index, images.into_iter().collect());
        }
        if let Some(load) = update.load {
            self.set_load(id, load)?;
        }
        if let Some(storage) = update.storage {
            set_storage(&mut self.known_mut(index).storage, &storage);
        }
        if let Some(mut labels) = update.labels {
            labels.sort_unstable();
            self.known_mut(index).labels = labels;
        }
        if let Some(pins) = update.pins {
            self.known_mut(index).pins = pins;
        }
        if let Some(to) = update.fault {
            let from = std::mem::replace(&mut self.known_mut(index).fault, to);
            if from != to {
                self.groups.values_mut().for_each(|group| group.move_fault(index, from, to));
            }
        }
        let moves = update.state.is_some() || update.runtimes.is_some() || update.capacity.is_some();
        if moves || update.classes.is_some() || update.nodes.is_some() {
            self.leave(index);
            let host = self.known_mut(index);
            host.state = update.state.unwrap_or(host.state);
            host.runtimes = update.runtimes.unwrap_or(host.runtimes);
            host.capacity = update.capacity.unwrap_or(host.capacity);
            if let Some(classes) = update.classes {
                set_stock(&mut host.stock, &classes);
            }
            if let Some(nodes) = update.nodes {
                numa::set_nodes(&mut host.nodes, &nodes);
            }
            self.enter(index);
        }
        Ok(())
    }

    /// Notes a host's measured load: the update that comes with every heartbeat.
    pub fn set_load(&mut self, id: HostId, load: Load) -> Result<(), UnknownHost> {
        let old = self.host(id)?.load;
        if quarter(old) == quarter(load) {
            self.known_mut(id.0).load = load;
            self.hot[id.0 as usize].load_term = load_term(load.0);
        } else {
            self.leave(id.0);
            self.known_mut(id.0).load = load;
            self.enter(id.0);
        }
        Ok(())
    }

    /// Notes the lowest round trip between a host and a gateway, in microseconds; `None` when none is known any more.
    pub fn set_rtt(&mut self, id: HostId, rtt: Option<u32>) -> Result<(), UnknownHost> {
        self.host(id)?;
        self.known_mut(id.0).rtt = rtt;
        Ok(())
    }

    /// Notes that a host now holds an image.
    pub fn add_image(&mut self, id: HostId, image: ImageId) -> Result<(), UnknownHost> {
        self.host(id)?;
        self.known_mut(id.0).images.insert(image);
        self.images.entry(image).or_default().insert(id.0);
        Ok(())
    }

    /// Notes that a host no longer holds an image.
    pub fn remove_image(&mut self, id: HostId, image: ImageId) -> Result<(), UnknownHost> {
        self.host(id)?;
        self.known_mut(id.0).images.remove(&image);
        self.forget_image(id.0, image);
        Ok(())
    }

    /// Takes a host out. It must hold no reservation: release them (or move them) first.
    pub fn remove_host(&mut self, id: HostId) -> Result<(), ReserveError> {
        let instances = self.host(id)?.reserved.instances;
        if instances > 0 {
            return Err(ReserveError::InUse { host: id, instances });
        }
        self.set_images(id.0, BTreeSet::new());
        self.leave(id.0);
        self.hosts[id.0 as usize] = None;
        self.vacant.insert(id.0);
        self.live -= 1;
        Ok(())
    }

    /// Reserves what the request wants on a host. Refused, with nothing changed, when the host doesn't have it free or
    /// holds as many of the group as it may. State, runtime, zone and spread are [`Cell::place`]'s to decide.
    pub fn reserve(&mut self, id: HostId, request: &Request) -> Result<(), ReserveError> {
        let host = self.host(id)?;
        let hot = &self.hot[id.0 as usize];
        for &(class, _) in &request.classes {
            check_free(id, Filter::Class, request.wants(class), host.class_free(class))?;
        }
        check_free(id, Filter::Cpu, u64::from(request.cpu), u64::from(hot.cpu))?;
        check_free(id, Filter::Memory, request.memory, hot.memory)?;
        check_free(id, Filter::Scratch, request.scratch, hot.scratch)?;
        if let Some((class, bytes)) = request.storage {
            check_free(id, Filter::Storage, bytes, host.storage_free(class))?;
        }
        check_free(id, Filter::Slots, 1, u64::from(hot.slots))?;
        numa::check(id, host, request)?;
        if let (Some(max), Some(group)) = (request.max_per_host, request.group)
            && self.groups.get(&group).map_or(0, |g| g.on_host(id.0)) >= max
        {
            return Err(ReserveError::PerHost { host: id, max });
        }
        self.book(id.0, request);
        Ok(())
    }

    /// Records a reservation that was made earlier, when a cell is rebuilt from the writer's record. It is taken as it
    /// is, even where the host has shrunk since; it must not be used for a new placement.
    pub fn adopt(&mut self, id: HostId, request: &Request) -> Result<(), UnknownHost> {
        self.host(id)?;
        self.book(id.0, request);
        Ok(())
    }

    /// Gives back what `reserve` took for the same request. Refused, with nothing changed, when the host holds less.
    pub fn release(&mut self, id: HostId, request: &Request) -> Result<(), ReserveError> {
        let host = self.host(id)?;
        let held = &host.reserved;
        let has = |resource, enough: bool| {
            if enough { Ok(()) } else { Err(ReserveError::NotReserved { host: id, resource }) }
        };
        for &(class, _) in &request.classes {
            let reserved = host.stock.iter().find(|s| s.class == class).map_or(0, |s| s.reserved);
            has(Filter::Class, reserved >= request.wants(class))?;
        }
        has(Filter::Cpu, held.cpu >= u64::from(request.cpu))?;
        has(Filter::Memory, held.memory >= u128::from(request.memory))?;
        has(Filter::Scratch, held.scratch >= u128::from(request.scratch))?;
        if let Some((class, bytes)) = request.storage {
            let reserved = host.storage.iter().find(|s| s.class == class).map_or(0, |s| s.reserved);
            has(Filter::Storage, reserved >= u128::from(bytes))?;
        }
        has(Filter::Slots, held.instances >= 1)?;
        has(Filter::Numa, numa::holds(&host.nodes, request))?;
        if let Some(group) = request.group {
            has(Filter::Spread, self.groups.get(&group).is_some_and(|g| g.on_host(id.0) >= 1))?;
        }
        let site = host.site();
        self.move_classes(id.0, request, false);
        self.move_storage(id.0, request, false);
        numa::give_back(&mut self.known_mut(id.0).nodes, request);
        let held = &mut self.known_mut(id.0).reserved;
        held.cpu -= u64::from(request.cpu);
        held.memory -= u128::from(request.memory);
        held.scratch -= u128::from(request.scratch);
        held.instances -= 1;
        if let Some(id_of_group) = request.group
            && let Some(group) = self.groups.get_mut(&id_of_group)
        {
            group.take(id.0, site, request.domain);
            if group.is_empty() {
                self.groups.remove(&id_of_group);
            }
        }
        self.refresh(id.0);
        Ok(())
    }

    pub(crate) fn host(&self, id: HostId) -> Result<&Host, UnknownHost> {
        self.hosts.get(id.0 as usize).and_then(Option::as_ref).ok_or(UnknownHost(id))
    }

    /// A host that the caller has looked up before.
    pub(crate) fn known(&self, index: u32) -> &Host {
        self.hosts[index as usize].as_ref().expect("only indexes of hosts in the cell get here")
    }

    pub(crate) fn known_mut(&mut self, index: u32) -> &mut Host {
        self.hosts[index as usize].as_mut().expect("only indexes of hosts in the cell get here")
    }

    pub(crate) fn zone_of(&self, index: u32) -> ZoneId {
        self.known(index).zone
    }

    pub(crate) fn rack_of(&self, index: u32) -> RackId {
        self.known(index).rack
    }

    pub(crate) fn fault_of(&self, index: u32) -> FaultId {
        self.known(index).fault
    }

    fn book(&mut self, index: u32, request: &Request) {
        self.move_classes(index, request, true);
        self.move_storage(index, request, true);
        let host = self.known_mut(index);
        numa::take(&mut host.nodes, request);
        host.reserved.cpu += u64::from(request.cpu);
        host.reserved.memory += u128::from(request.memory);
        host.reserved.scratch += u128::from(request.scratch);
        host.reserved.instances += 1;
        let site = host.site();
        if let Some(group) = request.group {
            self.groups.entry(group).or_default().add(index, site, request.domain);
        }
        self.refresh(index);
        self.learn(request);
    }

    /// Moves the request's classes into (or out of) the host's reserved stock, and the pool's free sums with them.
    fn move_classes(&mut self, index: u32, request: &Request, take: bool) {
        if request.classes.is_empty() {
            return;
        }
        let pool = self.hot[index as usize].place.pool;
        let host = self.hosts[index as usize].as_mut().expect("only indexes of hosts in the cell get here");
        for &(class, units) in &request.classes {
            let at = match host.stock.binary_search_by_key(&class, |s| s.class) {
                Ok(at) => at,
                // Only `adopt` gets here: a class that the host has lost since.
                Err(at) => {
                    host.stock.insert(at, Stock { class, capacity: 0, reserved: 0 });
                    at
                }
            };
            let stock = &mut host.stock[at];
            let before = stock.free();
            stock.reserved = if take { stock.reserved + u64::from(units) } else { stock.reserved - u64::from(units) };
            let after = stock.free();
            if pool != Place::NOWHERE.pool && stock.capacity > 0 {
                let in_key = host.stock[..at].iter().filter(|s| s.capacity > 0).count();
                self.pools.class_free(pool, in_key, Some(before), Some(after));
            }
        }
        host.stock.retain(|s| s.capacity > 0 || s.reserved > 0);
    }

    /// Moves the request's bytes into (or out of) the host's reserved storage.
    fn move_storage(&mut self, index: u32, request: &Request, take: bool) {
        let Some((class, bytes)) = request.storage else { return };
        let storage = &mut self.known_mut(index).storage;
        let at = match storage.binary_search_by_key(&class, |s| s.class) {
            Ok(at) => at,
            // Only `adopt` gets here: a class that the host has lost since.
            Err(at) => {
                storage.insert(at, Store { class, capacity: 0, reserved: 0 });
                at
            }
        };
        let store = &mut storage[at];
        store.reserved =
            if take { store.reserved + u128::from(bytes) } else { store.reserved.saturating_sub(u128::from(bytes)) };
        storage.retain(|s| s.capacity > 0 || s.reserved > 0);
    }

    /// Recomputes what a host has free.
    fn recompute(&mut self, index: u32) {
        let host = self.hosts[index as usize].as_ref().expect("only indexes of hosts in the cell get here");
        let hot = &mut self.hot[index as usize];
        let left =
            |capacity: u64, reserved: u128| u64::try_from(u128::from(capacity).saturating_sub(reserved)).unwrap_or(0);
        hot.cpu = left(u64::from(host.capacity.cpu), u128::from(host.reserved.cpu)) as u32;
        hot.memory = left(host.capacity.memory, host.reserved.memory);
        hot.scratch = left(host.capacity.scratch, host.reserved.scratch);
        hot.slots = host.capacity.slots.saturating_sub(host.reserved.instances);
        hot.cpu_fraction = fraction(u64::from(hot.cpu), nominal(u64::from(host.capacity.cpu)));
        hot.memory_fraction = fraction(hot.memory, nominal(host.capacity.memory));
        hot.load_term = load_term(host.load.0);
    }

    /// After a change of reservations: the pool stays, the bucket may not.
    fn refresh(&mut self, index: u32) {
        self.recompute(index);
        let hot = self.hot[index as usize];
        let bucket = bucket_of(hot.cpu_fraction, hot.memory_fraction);
        if hot.place.pool != Place::NOWHERE.pool && bucket != hot.place.bucket {
            self.unlist(hot.place);
            self.hot[index as usize].place = self.pools.insert(index, hot.place.pool, bucket);
        }
        self.weigh_nodes(index);
    }

    fn unlist(&mut self, place: Place) {
        if let Some(moved) = self.pools.remove(place) {
            self.hot[moved as usize].place.position = place.position;
        }
    }

    /// Takes a host out of the index, before what its pool depends on changes.
    fn leave(&mut self, index: u32) {
        let place = self.hot[index as usize].place;
        if place.pool == Place::NOWHERE.pool {
            return;
        }
        self.unlist(place);
        let host = self.hosts[index as usize].as_ref().expect("only indexes of hosts in the cell get here");
        for (at, stock) in host.stock.iter().filter(|s| s.capacity > 0).enumerate() {
            self.pools.class_free(place.pool, at, Some(stock.free()), None);
        }
        let numa = host.is_numa();
        self.hot[index as usize].place = Place::NOWHERE;
        if numa {
            self.weigh_nodes(index);
            self.count_numa(false);
        }
    }

    /// Puts a host into the pool and bucket where it belongs, if it is ready.
    fn enter(&mut self, index: u32) {
        self.recompute(index);
        let host = self.hosts[index as usize].as_ref().expect("only indexes of hosts in the cell get here");
        if host.state != HostState::Ready {
            return;
        }
        let pool = self.pools.intern(host.key());
        for (at, stock) in host.stock.iter().filter(|s| s.capacity > 0).enumerate() {
            self.pools.class_free(pool, at, None, Some(stock.free()));
        }
        let hot = &self.hot[index as usize];
        let bucket = bucket_of(hot.cpu_fraction, hot.memory_fraction);
        let numa = host.is_numa();
        self.hot[index as usize].place = self.pools.insert(index, pool, bucket);
        if numa {
            self.count_numa(true);
            self.weigh_nodes(index);
        }
    }

    fn set_images(&mut self, index: u32, images: BTreeSet<ImageId>) {
        let old = std::mem::replace(&mut self.known_mut(index).images, images.clone());
        for image in old.difference(&images) {
            self.forget_image(index, *image);
        }
        for image in images.difference(&old) {
            self.images.entry(*image).or_default().insert(index);
        }
    }

    fn forget_image(&mut self, index: u32, image: ImageId) {
        if let Some(holders) = self.images.get_mut(&image) {
            holders.remove(index);
            if holders.is_empty() {
                self.images.remove(&image);
            }
        }
    }
}

/// Sets the class capacities of a host, keeping what is reserved.
fn set_stock(stock: &mut Vec<Stock>, classes: &[(ClassId, u32)]) {
    for s in stock.iter_mut() {
        s.capacity = 0;
    }
    for &(class, units) in classes {
        match stock.binary_search_by_key(&class, |s| s.class) {
            Ok(at) => stock[at].capacity = stock[at].capacity.saturating_add(units),
            Err(at) => stock.insert(at, Stock { class, capacity: units, reserved: 0 }),
        }
    }
    stock.retain(|s| s.capacity > 0 || s.reserved > 0);
}

/// The same of storage classes.
fn set_storage(storage: &mut Vec<Store>, classes: &[(ClassId, u64)]) {
    for s in storage.iter_mut() {
        s.capacity = 0;
    }
    for &(class, bytes) in classes {
        match storage.binary_search_by_key(&class, |s| s.class) {
            Ok(at) => storage[at].capacity = storage[at].capacity.saturating_add(bytes),
            Err(at) => storage.insert(at, Store { class, capacity: bytes, reserved: 0 }),
        }
    }
    storage.retain(|s| s.capacity > 0 || s.reserved > 0);
}

fn check_free(host: HostId, resource: Filter, wanted: u64, free: u64) -> Result<(), ReserveError> {
    if wanted <= free { Ok(()) } else { Err(ReserveError::Exceeds { host, resource, wanted, free }) }
}

mod snapshot;
pub use snapshot::{CellTotals, Counts, Drift, HostSnapshot};

#[cfg(test)]
mod tests;
