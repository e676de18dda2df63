//! The regional scheduler: chooses cells, asks their placement for a host, and keeps what is reserved in step with the
//! rows of instances and hosts.
//!
//! A project's instances go to the cells of its shard (see [`crate::shard`]), and beyond only when those are full.
//!
//! An instance holds its reservation and its address slot from the row that names its host until that row is erased;
//! burying it changes neither, because its host may still run it.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use nexus_model::kind::{self, BlastRadius, Host, HostState, Instance, Runtime, Spread};
use nexus_model::{Bytes, Digest, MilliCpu, Name, Object, Uid};
use nexus_placement as placement;
use placement::{
    Cell, ClassId, Decision, FaultId, Filter, GroupId, HostId, ImageId, LabelId, Names, RackId, Refusal, SpreadLevel,
    ZoneId,
};

use crate::rules::rebalance::Standing;
use crate::shard;
use crate::surroundings::Surroundings;
use crate::world::app_uid;

mod nodes;

use nodes::Pinned;

/// Hands out small numbers for names.
#[derive(Debug)]
struct Interner<T: Ord + Clone> {
    ids: BTreeMap<T, u32>,
    names: Vec<T>,
}

impl<T: Ord + Clone> Default for Interner<T> {
    fn default() -> Self {
        Self { ids: BTreeMap::new(), names: Vec::new() }
    }
}

impl<T: Ord + Clone> Interner<T> {
    fn id(&mut self, name: &T) -> u32 {
        if let Some(id) = self.ids.get(name) {
            return *id;
        }
        let id = u32::try_from(self.names.len()).expect("fewer than 2^32 names");
        self.ids.insert(name.clone(), id);
        self.names.push(name.clone());
        id
    }
}

/// The slots of a host's prefixes that instances may have: .1 is the host's own, .255 is broadcast.
const SLOTS: std::ops::RangeInclusive<u16> = 2..=254;

/// Shards that are remembered; computing one anew takes microseconds.
const SHARDS_KEPT: usize = 20_000;

/// How full a cell is, in millicores: kept beside the cell because choosing a cell must not look at every host.
#[derive(Debug, Default)]
struct Fill {
    reserved: u64,
    capacity: u64,
}

impl Fill {
    fn thousandths(&self) -> u64 {
        self.reserved.saturating_mul(1000) / self.capacity.max(1)
    }
}

/// Who has instances in a cell, living ones, and how many.
#[derive(Debug, Default)]
struct Tenants {
    instances: u32,
    projects: BTreeMap<Name, u32>,
}

impl Tenants {
    fn change(&mut self, project: &Name, by: i32) {
        self.instances = self.instances.saturating_add_signed(by);
        let of_project = self.projects.entry(project.clone()).or_default();
        *of_project = of_project.saturating_add_signed(by);
        if *of_project == 0 {
            self.projects.remove(project);
        }
    }
}

/// So many labels that hosts carry are named in a refusal.
const NAMED: usize = 8;

/// What a refusal calls what was interned.
struct Words<'a> {
    scheduler: &'a Scheduler,
    request: &'a placement::Request,
    around: &'a Surroundings,
}

impl Names for Words<'_> {
    fn class(&self, id: ClassId) -> String {
        self.scheduler.classes.names[id.0 as usize].to_string()
    }

    fn label(&self, id: LabelId) -> String {
        let (key, value) = &self.scheduler.labels.names[id.0 as usize];
        if key.is_empty() {
            return "tenants' networks".to_owned();
        }
        format!("label {key}={value}")
    }

    fn group(&self, id: GroupId) -> String {
        let with = self.request.with.iter().zip(self.around.with.iter().map(|(app, _)| app));
        let without = self.request.without.iter().zip(self.around.without.iter().map(|(app, _)| app));
        let mut both = with.chain(without);
        both.find(|(group, _)| **group == id)
            .map_or_else(|| "another app".to_owned(), |(_, app)| format!("an instance of app {app}"))
    }
}

#[derive(Debug, Default)]
pub struct Scheduler {
    /// What shards are computed from, beside the names: see [`crate::shard`].
    seed: Option<Name>,
    cells: BTreeMap<Name, Cell>,
    fill: BTreeMap<Name, Fill>,
    zone_of: BTreeMap<Name, Name>,
    in_cell: BTreeMap<Name, BTreeSet<Name>>,
    tenants: BTreeMap<Name, Tenants>,
    everywhere: Tenants,
    /// Each project's shard, computed when first asked for.
    shards: BTreeMap<Name, BTreeSet<Name>>,
    /// Living instances without a host, by app and template: those of one are interchangeable.
    waiting: BTreeMap<(Uid, String), BTreeSet<Uid>>,
    capacities: BTreeMap<Name, u64>,
    hosts: BTreeMap<Name, (Name, HostId)>,
    by_id: BTreeMap<(Name, HostId), Name>,
    slots: BTreeMap<Name, BTreeSet<u16>>,
    /// The slot that each host gave last.
    last_slot: BTreeMap<Name, u16>,
    zones: Interner<Name>,
    /// With their zones: two zones may both have a first rack.
    racks: Interner<(Name, Name)>,
    /// With their zones, and whether they are named, a rack, or a host.
    faults: Interner<(Name, FaultOf, Name)>,
    classes: Interner<Name>,
    images: Interner<Digest>,
    groups: Interner<Uid>,
    labels: Interner<(String, String)>,
    pinned: Pinned,
    /// What each host carries: see `labels`.
    carried: BTreeMap<Name, Vec<LabelId>>,
    dead: BTreeSet<Name>,
    /// Living hosts that can't have tenants' networks, and why.
    unwired: BTreeMap<Name, String>,
    /// Rows that a host could not hold; never other than zero unless a host's capacity shrank.
    pub oversold: u64,
}

/// What a fault domain is named for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum FaultOf {
    Operator,
    Rack,
    Host,
}

/// A host and the address slot on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    pub host: Name,
    pub slot: u16,
    /// The nodes that it is to be kept to, by the host's own numbers.
    pub numa_nodes: Vec<u16>,
    /// The project's shard was full: the host is in another cell.
    pub spilled: bool,
}

fn runtime(r: Runtime) -> placement::Runtime {
    match r {
        Runtime::Container => placement::Runtime::Container,
        Runtime::Function => placement::Runtime::Function,
    }
}

fn host_state(host: &Object<Host>) -> placement::HostState {
    match host.status.state {
        HostState::Joining => placement::HostState::Joining,
        HostState::Suspect => placement::HostState::Suspect,
        HostState::Dead => placement::HostState::Dead,
        HostState::Ready if host.spec.cordoned || host.spec.draining => placement::HostState::Cordoned,
        HostState::Ready => placement::HostState::Ready,
    }
}

impl Scheduler {
    /// A scheduler whose shards are computed with a seed: the region's name.
    pub fn new(seed: Name) -> Self {
        Self { seed: Some(seed), ..Self::default() }
    }

    /// Learns of a host or of what changed about it.
    pub fn set_host(&mut self, host: &Object<Host>) {
        let spec = &host.spec;
        let capacity = placement::Capacity {
            cpu: spec.capacity.cpu.0,
            memory: spec.capacity.memory.0,
            scratch: spec.capacity.scratch.0,
            slots: spec.capacity.instances.min(u32::from(*SLOTS.end() - *SLOTS.start() + 1)),
        };
        let classes: Vec<_> = spec.classes.iter().map(|(c, n)| (ClassId(self.classes.id(c)), *n)).collect();
        let images: Vec<_> = host.status.images.iter().map(|d| ImageId(self.images.id(d))).collect();
        let runtimes = spec.runtimes.iter().map(|r| runtime(*r)).collect();
        let storage: Vec<_> = spec.storage.iter().map(|(c, n)| (ClassId(self.classes.id(c)), n.0)).collect();
        let label = |(k, v): (&String, &String)| LabelId(self.labels.id(&(k.clone(), v.clone())));
        let mut labels: Vec<_> = host.metadata.labels.iter().map(label).collect();
        let name = &host.metadata.name;
        let can = spec.network_trouble.is_empty();
        if can {
            labels.push(self.wired());
        }
        let dead = host.status.state == HostState::Dead;
        match dead {
            true => self.dead.insert(name.clone()),
            false => self.dead.remove(name),
        };
        match can || dead {
            true => self.unwired.remove(name),
            false => self.unwired.insert(name.clone(), spec.network_trouble.clone()),
        };
        self.carried.insert(name.clone(), labels.clone());
        self.last_slot.insert(name.clone(), host.status.last_slot);
        let fill = self.fill.entry(spec.cell.clone()).or_default();
        let cpu = u64::from(capacity.cpu);
        fill.capacity += cpu;
        fill.capacity -= self.capacities.insert(name.clone(), cpu).unwrap_or(0);
        let (zone, rack) = (spec.zone.clone(), spec.rack.as_ref());
        let fault = match (&spec.fault_domain, rack) {
            (Some(named), _) => (zone.clone(), FaultOf::Operator, named.clone()),
            (None, Some(rack)) => (zone.clone(), FaultOf::Rack, rack.clone()),
            (None, None) => (zone.clone(), FaultOf::Host, name.clone()),
        };
        let fault = FaultId(self.faults.id(&fault));
        let rack = RackId(self.racks.id(&(zone, rack.unwrap_or(name).clone())));
        let (nodes, pins) = (nodes::of(spec), spec.numa_trouble.is_empty());
        if let Some((cell, id)) = self.hosts.get(name).cloned() {
            let update = placement::HostUpdate {
                state: Some(host_state(host)),
                runtimes: Some(runtimes),
                capacity: Some(capacity),
                classes: Some(classes),
                images: Some(images),
                load: None,
                storage: Some(storage),
                labels: Some(labels),
                nodes: Some(nodes),
                pins: Some(pins),
                fault: Some(fault),
            };
            let cell = self.cells.get_mut(&cell).expect("a host's cell is known");
            cell.update_host(id, update).expect("the handle came from this cell");
            self.pinned.declare(cell, id, host);
            return;
        }
        let spec = placement::HostSpec {
            zone: ZoneId(self.zones.id(&spec.zone)),
            rack,
            fault,
            state: host_state(host),
            runtimes,
            capacity,
            classes,
            images,
            load: placement::Load::default(),
            storage,
            labels,
            rtt: None,
            nodes,
            pins,
        };
        let cell = host.spec.cell.clone();
        if !self.cells.contains_key(&cell) {
            self.zone_of.insert(cell.clone(), host.spec.zone.clone());
            self.shards.clear();
        }
        self.in_cell.entry(cell.clone()).or_default().insert(name.clone());
        let into = self.cells.entry(cell.clone()).or_default();
        let id = into.add_host(spec);
        self.pinned.declare(into, id, host);
        self.hosts.insert(name.clone(), (cell.clone(), id));
        self.by_id.insert((cell, id), name.clone());
    }

    /// Forgets a host whose instances have all been erased.
    pub fn remove_host(&mut self, name: &Name) {
        if let Some((cell, id)) = self.hosts.remove(name) {
            if let Some(c) = self.cells.get_mut(&cell)
                && c.remove_host(id).is_err()
            {
                self.oversold += 1;
            }
            if let Some(fill) = self.fill.get_mut(&cell) {
                fill.capacity -= self.capacities.remove(name).unwrap_or(0);
            }
            if let Some(hosts) = self.in_cell.get_mut(&cell) {
                hosts.remove(name);
            }
            self.by_id.remove(&(cell, id));
            self.slots.remove(name);
            self.last_slot.remove(name);
            self.carried.remove(name);
            self.dead.remove(name);
            self.unwired.remove(name);
            self.pinned.forget(name);
        }
    }

    /// The lowest round trip between a host and a gateway, in microseconds.
    pub fn set_rtt(&mut self, name: &Name, us: Option<u32>) {
        if let Some((cell, id)) = self.hosts.get(name)
            && let Some(cell) = self.cells.get_mut(cell)
        {
            cell.set_rtt(*id, us).expect("the handle came from this cell");
        }
    }

    /// How far from idle and well a host is, in thousandths.
    pub fn set_load(&mut self, name: &Name, load: u16) {
        if let Some((cell, id)) = self.hosts.get(name)
            && let Some(cell) = self.cells.get_mut(cell)
        {
            cell.set_load(*id, placement::Load(load)).expect("the handle came from this cell");
        }
    }

    /// Moves an instance's reservation from where `old` had it to where `new` has it.
    pub fn set_instance(&mut self, old: Option<&Object<Instance>>, new: Option<&Object<Instance>>) {
        // A job's instance that has ended takes nothing any more, though its row stays.
        let place = |o: Option<&Object<Instance>>| {
            let o = o.filter(|o| o.status.finished.is_none())?;
            o.status.host.clone().zip(o.status.slot)
        };
        let buried = |o: Option<&Object<Instance>>| o.is_some_and(|o| o.metadata.deleting.is_some());
        let waits = |o: &&Object<Instance>| o.status.host.is_none() && o.metadata.deleting.is_none();
        let waited = |o: &Object<Instance>| (app_uid(o), o.spec.template_hash.clone());
        if let Some(old) = old.filter(waits)
            && let Entry::Occupied(mut like) = self.waiting.entry(waited(old))
        {
            like.get_mut().remove(&old.metadata.uid);
            if like.get().is_empty() {
                like.remove();
            }
        }
        if let Some(new) = new.filter(waits) {
            self.waiting.entry(waited(new)).or_default().insert(new.metadata.uid);
        }
        if place(old) == place(new) && buried(old) == buried(new) {
            return;
        }
        if let (Some(instance), Some((host, slot))) = (old, place(old)) {
            self.slots.entry(host.clone()).or_default().remove(&slot);
            let mut request = self.request(instance);
            self.pinned.take(&host, instance, &mut request);
            if let Some((cell, id)) = self.hosts.get(&host)
                && let Some(cell) = self.cells.get_mut(cell)
                && cell.release(*id, &request).is_err()
            {
                self.oversold += 1;
            }
            self.fill_of(&host, |fill| fill.reserved = fill.reserved.saturating_sub(u64::from(request.cpu)));
            self.count(&host, instance, -1);
        }
        if let (Some(instance), Some((host, slot))) = (new, place(new)) {
            self.slots.entry(host.clone()).or_default().insert(slot);
            let mut request = self.request(instance);
            self.pinned.put(&host, instance, &mut request);
            if let Some((cell, id)) = self.hosts.get(&host)
                && let Some(cell) = self.cells.get_mut(cell)
                && cell.reserve(*id, &request).is_err()
            {
                // The row is the truth: the host counts as over-full and takes nothing more until it has drained.
                self.oversold += 1;
                cell.adopt(*id, &request).expect("the handle came from this cell");
            }
            self.fill_of(&host, |fill| fill.reserved += u64::from(request.cpu));
            self.count(&host, instance, 1);
        }
    }

    fn count(&mut self, host: &Name, instance: &Object<Instance>, by: i32) {
        let Some(project) = instance.metadata.project.as_ref().filter(|_| instance.metadata.deleting.is_none()) else {
            return;
        };
        if let Some((cell, _)) = self.hosts.get(host) {
            self.tenants.entry(cell.clone()).or_default().change(project, by);
            self.everywhere.change(project, by);
        }
    }

    /// The hosts of a cell.
    pub fn hosts_in(&self, cell: &Name) -> impl ExactSizeIterator<Item = &Name> {
        static NONE: BTreeSet<Name> = BTreeSet::new();
        self.in_cell.get(cell).unwrap_or(&NONE).iter()
    }

    /// Of each kind of instance that has no host yet, one.
    pub fn first_waiting(&self) -> impl Iterator<Item = Uid> + '_ {
        self.waiting.values().filter_map(|like| like.first().copied())
    }

    /// Another that waits for the same as this one did.
    pub fn waiting_like(&self, instance: &Object<Instance>) -> Option<Uid> {
        let key = (app_uid(instance), instance.spec.template_hash.clone());
        self.waiting.get(&key).and_then(|like| like.first().copied())
    }

    /// How full a cell is, and who would feel its loss.
    pub fn load_of(&self, cell: &Name) -> (u32, BlastRadius) {
        let fill = self.fill.get(cell).map_or(0, |fill| fill.thousandths() / 10);
        let nobody = Tenants::default();
        let here = self.tenants.get(cell).unwrap_or(&nobody);
        let percent = |part: usize, whole: usize| (part * 100).div_ceil(whole.max(1)) as u32;
        let wholly = here.projects.iter().filter(|(project, n)| self.everywhere.projects.get(*project) == Some(n));
        let radius = BlastRadius {
            instances: here.instances,
            instances_percent: percent(here.instances as usize, self.everywhere.instances as usize),
            projects: here.projects.len() as u32,
            projects_percent: percent(here.projects.len(), self.everywhere.projects.len()),
            projects_wholly: wholly.count() as u32,
        };
        (u32::try_from(fill).unwrap_or(u32::MAX), radius)
    }

    /// A zone's cells in the order in which a project uses them.
    fn ranked<'a>(&'a self, project: &Name) -> Vec<Vec<&'a Name>> {
        let Some(seed) = &self.seed else { return vec![self.cells.keys().collect()] };
        let zones: BTreeSet<&Name> = self.zone_of.values().collect();
        let of = |zone: &Name| {
            let cells = self.zone_of.iter().filter(move |(_, z)| *z == zone).map(|(cell, _)| cell);
            shard::order(seed, project, cells)
        };
        zones.into_iter().map(of).collect()
    }

    fn shard_of(&mut self, project: &Name) -> BTreeSet<Name> {
        if let Some(shard) = self.shards.get(project) {
            return shard.clone();
        }
        let whole = self.seed.is_none();
        let part = |zone: Vec<&Name>| {
            let n = if whole { zone.len() } else { shard::size(zone.len()) };
            zone.into_iter().take(n).cloned().collect::<Vec<_>>()
        };
        let shard: BTreeSet<Name> = self.ranked(project).into_iter().flat_map(part).collect();
        if self.shards.len() >= SHARDS_KEPT {
            self.shards.clear();
        }
        self.shards.insert(project.clone(), shard.clone());
        shard
    }

    fn fill_of(&mut self, host: &Name, change: impl FnOnce(&mut Fill)) {
        if let Some((cell, _)) = self.hosts.get(host)
            && let Some(fill) = self.fill.get_mut(cell)
        {
            change(fill);
        }
    }

    /// Carried by the hosts that can have tenants' networks. No user's label has such a key.
    fn wired(&mut self) -> LabelId {
        LabelId(self.labels.id(&(String::new(), String::new())))
    }

    /// Why no host here can have tenants' networks, if that is so of all that live. Of one that is dead nothing is hoped for.
    pub fn all_unwired(&self) -> Option<&str> {
        let living = self.hosts.len() - self.dead.len();
        if living == 0 {
            return Some("there are no hosts");
        }
        let (_, why) = self.unwired.first_key_value().filter(|_| self.unwired.len() >= living)?;
        Some(why)
    }

    /// What an instance takes of a host.
    fn request(&mut self, instance: &Object<Instance>) -> placement::Request {
        let template = &instance.spec.template;
        let reserved = template.parts().reserved();
        let mut request = placement::Request::new(runtime(template.runtime), reserved.cpu.0, reserved.memory.0);
        match &template.storage_class {
            Some(class) => request.storage = Some((ClassId(self.classes.id(class)), reserved.scratch.0)),
            None => request.scratch = reserved.scratch.0,
        }
        request.classes = template.classes.iter().map(|(c, n)| (ClassId(self.classes.id(c)), *n)).collect();
        request.image = Some(ImageId(self.images.id(&instance.spec.image_digest)));
        // What is buried still takes room, but its app is spread without it.
        let living = instance.metadata.deleting.is_none();
        request.group = living.then(|| GroupId(self.groups.id(&app_uid(instance))));
        request
    }

    /// What it takes, and what it demands.
    fn wish(&mut self, instance: &Object<Instance>, around: &Surroundings) -> placement::Request {
        let mut request = self.request(instance);
        request.spread.level = match around.spread {
            Spread::None => placement::SpreadLevel::None,
            Spread::Host => placement::SpreadLevel::Host,
            Spread::Rack => placement::SpreadLevel::Rack,
            Spread::Zone => placement::SpreadLevel::Zone,
            Spread::FaultDomain => placement::SpreadLevel::Fault,
        };
        request.span = u8::from(instance.spec.template.constraints.single_node());
        request.spread.required = around.even;
        request.zones =
            around.zones.as_ref().map(|zones| zones.iter().map(|zone| ZoneId(self.zones.id(zone))).collect());
        request.labels = around.labels.iter().map(|label| LabelId(self.labels.id(label))).collect();
        // Where every host can, it is not asked for.
        if !instance.spec.template.nics.is_empty() && !self.unwired.is_empty() {
            request.labels.push(self.wired());
        }
        request.max_rtt = around.below_us;
        // An app that is not there has no instances: a group of its own that nothing is ever in.
        let nobody = |at: usize| GroupId(u32::MAX - u32::try_from(at).unwrap_or(u32::MAX / 2));
        let group = |(at, (_, uid)): (usize, &(Name, Option<Uid>))| match uid {
            Some(uid) => GroupId(self.groups.id(uid)),
            None => nobody(at),
        };
        request.with = around.with.iter().enumerate().map(group).collect();
        request.without = around.without.iter().map(|(_, uid)| GroupId(self.groups.id(uid))).collect();
        request
    }

    /// The least of the app's instances in any domain of these cells that could take one, where evenness is demanded.
    fn floor(&self, request: &placement::Request, cells: &[&Name]) -> Option<u32> {
        let group = request.group.filter(|_| request.spread.required)?;
        let mut counts: BTreeMap<(Option<&Name>, u32), u32> = BTreeMap::new();
        for name in cells {
            // The handles of hosts are their cell's own; zones and racks are the region's.
            let own = (request.spread.level == placement::SpreadLevel::Host).then_some(*name);
            for (domain, count) in self.cells[*name].domains(request) {
                *counts.entry((own, domain)).or_default() += count;
            }
        }
        if matches!(request.spread.level, SpreadLevel::Rack | SpreadLevel::Fault) {
            let members: BTreeMap<u32, u32> = self.elsewhere(None, request).into_iter().collect();
            return counts.into_keys().map(|(_, domain)| members.get(&domain).copied().unwrap_or(0)).min();
        }
        if request.spread.level == placement::SpreadLevel::Zone {
            return counts.into_keys().map(|(_, zone)| self.in_zone(group, ZoneId(zone))).min();
        }
        counts.into_values().min()
    }

    /// The members of a request's group in cells other than this one, by the rack or fault domain that it is spread over.
    fn elsewhere(&self, cell: Option<&Name>, request: &placement::Request) -> Vec<(u32, u32)> {
        let Some(group) = request.group else { return Vec::new() };
        let others = self.cells.iter().filter(|(name, _)| Some(*name) != cell).map(|(_, other)| other);
        let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
        for (domain, n) in others.flat_map(|other| other.domain_counts(group, request.spread.level)) {
            *counts.entry(domain).or_default() += n;
        }
        counts.into_iter().collect()
    }

    /// The instances of a group in a zone, over all its cells.
    fn in_zone(&self, group: GroupId, zone: ZoneId) -> u32 {
        let of = |cell: &Cell| {
            cell.group_counts(group).0.into_iter().filter(|(z, _)| *z == zone).map(|(_, n)| n).sum::<u32>()
        };
        self.cells.values().map(of).sum()
    }

    /// Asks one cell. `floor` is that of all cells that are asked.
    fn ask(
        &self,
        cell: &Name,
        request: &placement::Request,
        around: &Surroundings,
        floor: Option<u32>,
    ) -> Result<Decision, Refusal> {
        let mut request = request.clone();
        request.elsewhere = self.elsewhere(Some(cell), &request);
        let leaving = around.leaving.iter().filter_map(|host| self.hosts.get(host));
        request.excluded = leaving.filter(|(of, _)| of == cell).map(|(_, id)| *id).collect();
        request.spread.floor = floor;
        if let (placement::SpreadLevel::Zone, Some(floor), Some(group)) = (request.spread.level, floor, request.group) {
            let zone = self.zone_of.get(cell).and_then(|zone| self.zones.ids.get(zone)).copied();
            if zone.is_some_and(|zone| self.in_zone(group, ZoneId(zone)) > floor) {
                let hosts = u32::try_from(self.cells[cell].len()).unwrap_or(u32::MAX);
                return Err(Refusal::turned_away(hosts, Filter::Spread));
            }
            // The zone has been judged as a whole.
            request.spread.required = false;
        }
        self.cells[cell].place(&request)
    }

    /// How an instance that is placed nowhere would stand on a host.
    pub fn standing(&mut self, instance: &Object<Instance>, around: &Surroundings, host: &Name) -> Option<Standing> {
        let mut request = self.wish(instance, around);
        let (cell_name, id) = self.hosts.get(host)?;
        request.elsewhere = self.elsewhere(Some(cell_name), &request);
        let cell = &self.cells[cell_name];
        let zone = ZoneId(*self.zones.ids.get(self.zone_of.get(cell_name)?)?);
        let group = request.group?;
        let (about, on_host) = cell.peers(*id, &request).ok()?;
        let spread = around.spread;
        Some(Standing {
            broken: cell.breach(*id, &request).ok()?.map(Filter::name),
            in_zone: if spread == Spread::Zone { self.in_zone(group, zone) } else { 0 },
            about,
            around: if spread == Spread::Rack { "rack" } else { "fault domain" },
            on_host: if spread == Spread::None { 0 } else { on_host },
            burden: cell.load(*id).ok()?.0,
        })
    }

    /// Finds a host, or says for how many hosts each filter said no.
    ///
    /// The regional part: the cells of the project's shard are asked in the order of how few of the app's instances their
    /// zones hold, so that an app spreads over zones although each cell decides alone; the first that can take the instance
    /// gets it. When the shard is full, the next cells in the project's order are asked.
    pub fn place(&mut self, instance: &Object<Instance>, around: &Surroundings) -> Result<Placed, String> {
        let request = self.wish(instance, around);
        let group = request.group.expect("only the living are placed");
        let project = instance.metadata.project.clone().expect("instances have a project");
        let shard = self.shard_of(&project);
        let mut order: Vec<(u32, u64, &Name)> = shard
            .iter()
            .filter_map(|name| self.cells.get_key_value(name))
            .map(|(name, cell)| {
                let mine: u32 = match around.spread {
                    Spread::None => 0,
                    Spread::Host | Spread::Rack | Spread::FaultDomain | Spread::Zone => {
                        cell.group_counts(group).0.iter().map(|(_, n)| *n).sum()
                    }
                };
                // Among equals the emptier cell, so that the region fills evenly.
                (mine, self.fill[name].thousandths(), name)
            })
            .collect();
        order.sort();
        let mut refusals = Vec::new();
        let asked: Vec<&Name> = order.iter().map(|(_, _, name)| *name).collect();
        let floor = self.floor(&request, &asked);
        for name in asked {
            match self.ask(name, &request, around, floor) {
                Ok(decision) => return Ok(self.placed(name.clone(), &decision, instance, false)),
                Err(refusal) => refusals.push(refusal),
            }
        }
        let ranked = self.ranked(&project);
        let deepest = ranked.iter().map(Vec::len).max().unwrap_or(0);
        let beyond = (0..deepest).flat_map(|rank| ranked.iter().filter_map(move |zone| zone.get(rank)));
        let beyond: Vec<&Name> = beyond.filter(|name| !shard.contains(**name)).copied().collect();
        let everywhere: Vec<&Name> = self.cells.keys().collect();
        let floor = if beyond.is_empty() { None } else { self.floor(&request, &everywhere) };
        for name in beyond {
            match self.ask(name, &request, around, floor) {
                Ok(decision) => {
                    let cell = name.clone();
                    return Ok(self.placed(cell, &decision, instance, true));
                }
                Err(refusal) => refusals.push(refusal),
            }
        }
        Err(self.explain(&refusals, &request, around))
    }

    fn placed(&mut self, cell: Name, decision: &Decision, instance: &Object<Instance>, spilled: bool) -> Placed {
        let host = self.by_id[&(cell, decision.host)].clone();
        let numa_nodes = self.pinned.chosen(&host, decision.nodes, instance);
        let used = self.slots.entry(host.clone()).or_default();
        // The one after the last, round and round: a gateway that hears of nothing goes on sending requests to the address
        // of an instance that is gone, so it must be long before somebody else's has it.
        let last = self.last_slot.get(&host).copied().unwrap_or(0);
        let free = |s: &u16| !used.contains(s);
        let slot = SLOTS.filter(|s| *s > last).find(free).or_else(|| SLOTS.into_iter().find(free));
        let slot = slot.expect("placement keeps a host's instances to its slots");
        Placed { host, slot, numa_nodes, spilled }
    }

    /// The refusals of all cells as one sentence that counts hosts per filter, and what there is in place of zones and labels
    /// that were asked for.
    fn explain(&self, refusals: &[Refusal], request: &placement::Request, around: &Surroundings) -> String {
        let Some(all) = Refusal::merged(refusals) else {
            return "no host can take it: no host has joined this region yet".to_owned();
        };
        let mut text = all.describe(&Words { scheduler: self, request, around });
        if all.at(Filter::Zone) > 0 {
            let zones: BTreeSet<&str> = self.zone_of.values().map(Name::as_str).collect();
            text.push_str(&format!("; its hosts are in {}", zones.into_iter().collect::<Vec<_>>().join(", ")));
        }
        for (id, _) in &all.labels {
            let (key, _) = &self.labels.names[id.0 as usize];
            if key.is_empty() {
                let one = self.unwired.first_key_value().map(|(host, why)| format!(" (host {host}: {why})"));
                let advice = "an app that needs none can do without (`network: none`)";
                text.push_str(&format!(
                    "; it has NICs, which not every host can have{}: {advice}",
                    one.unwrap_or_default()
                ));
                continue;
            }
            let carried = self.carried.values().flatten().map(|label| &self.labels.names[label.0 as usize]);
            let like: BTreeSet<_> = carried.filter(|(k, _)| k == key).collect();
            let like: Vec<String> = like.into_iter().take(NAMED).map(|(k, v)| format!("{k}={v}")).collect();
            text.push_str(&match like.len() {
                0 => format!("; no host has a label {key}"),
                _ => format!("; there are hosts with {}", like.join(", ")),
            });
        }
        text
    }

    /// What the rows reserve of classes on a host.
    pub fn reserved_classes<'a>(
        instances: impl Iterator<Item = &'a Object<Instance>>,
    ) -> (kind::Classes, kind::StorageClasses) {
        let (mut classes, mut storage) = (kind::Classes::new(), kind::StorageClasses::new());
        for template in instances.filter(|i| i.status.finished.is_none()).map(|i| &i.spec.template) {
            for (class, units) in &template.classes {
                let sum = classes.entry(class.clone()).or_default();
                *sum = sum.saturating_add(*units);
            }
            if let Some(class) = &template.storage_class {
                let sum = storage.entry(class.clone()).or_default();
                *sum = Bytes(sum.0.saturating_add(template.parts().reserved().scratch.0));
            }
        }
        classes.sort_unstable_keys();
        storage.sort_unstable_keys();
        (classes, storage)
    }

    /// What the rows reserve on a host, recounted from nothing.
    pub fn reserved<'a>(instances: impl Iterator<Item = &'a Object<Instance>>) -> kind::Capacity {
        let mut sum = kind::Capacity::default();
        for instance in instances.filter(|i| i.status.finished.is_none()) {
            let r = instance.spec.template.parts().reserved();
            sum.cpu = MilliCpu(sum.cpu.0.saturating_add(r.cpu.0));
            sum.memory = Bytes(sum.memory.0.saturating_add(r.memory.0));
            if instance.spec.template.storage_class.is_none() {
                sum.scratch = Bytes(sum.scratch.0.saturating_add(r.scratch.0));
            }
            sum.instances += 1;
        }
        sum
    }
}
