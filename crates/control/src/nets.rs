//! What is given out of tenants' networks and who has it: indexes over the rows of networks and NICs, which only
//! [`World::replace`](crate::world::World) changes, so that what is taken is by construction what the rows say.
//!
//! An address, a hardware address or a network number is free again when its row is erased, and that is when the host that had
//! it has confirmed that nothing of it is left. In a view's world, what is to be told anew is noted too.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nexus_model::kind::{
    DnsZone, FloatingIp, Host, Instance, InternetGateway, LoadBalancer, NatGateway, Network, Nic, Peering, PrefixList,
    RouteTable, SecurityGroup, Subnet,
};
use nexus_model::plan::Mac;
use nexus_model::{Name, Object, Uid};

use crate::rules::network::peering::{of, peer};
use crate::world::{Place, World};

/// The numbers that are taken, as ranges that don't touch each other: the next free one is found in logarithmic time.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Ranges {
    /// First and last.
    taken: BTreeMap<u128, u128>,
}

impl Ranges {
    fn around(&self, n: u128) -> Option<(u128, u128)> {
        self.taken.range(..=n).next_back().map(|(a, z)| (*a, *z)).filter(|(_, z)| *z >= n)
    }

    pub fn has(&self, n: u128) -> bool {
        self.around(n).is_some()
    }

    /// The first free number from `first` to `last`.
    pub fn free(&self, first: u128, last: u128) -> Option<u128> {
        let next = self.around(first).map_or(Some(first), |(_, z)| z.checked_add(1))?;
        (next <= last).then_some(next)
    }

    /// How many are taken from `first` to `last`.
    pub fn count(&self, first: u128, last: u128) -> u128 {
        let before = self.around(first).map(|(a, _)| a);
        let from = before.unwrap_or(first);
        let within = self.taken.range(from..=last).map(|(a, z)| (*a.max(&first), *z.min(&last)));
        within.fold(0u128, |sum, (a, z)| sum.saturating_add((z - a).saturating_add(1)))
    }

    /// False if it was taken already.
    pub fn take(&mut self, n: u128) -> bool {
        if self.has(n) {
            return false;
        }
        let before = n.checked_sub(1).and_then(|p| self.around(p));
        let after = n.checked_add(1).and_then(|f| self.taken.get(&f).copied().map(|z| (f, z)));
        if let Some((a, _)) = after {
            self.taken.remove(&a);
        }
        let (first, last) = (before.map_or(n, |(a, _)| a), after.map_or(n, |(_, z)| z));
        self.taken.insert(first, last);
        true
    }

    pub fn give(&mut self, n: u128) {
        let Some((first, last)) = self.around(n) else { return };
        self.taken.remove(&first);
        if first < n {
            self.taken.insert(first, n - 1);
        }
        if n < last {
            self.taken.insert(n + 1, last);
        }
    }
}

/// What is taken of one network.
#[derive(Debug, Default)]
pub struct Held {
    four: Ranges,
    six: Ranges,
    macs: BTreeSet<Mac>,
    /// NICs, living and buried.
    pub nics: usize,
    /// Load balancers likewise.
    balancers: usize,
}

impl Held {
    fn family(&self, address: IpAddr) -> (&Ranges, u128) {
        match address {
            IpAddr::V4(a) => (&self.four, a.to_bits().into()),
            IpAddr::V6(a) => (&self.six, a.to_bits()),
        }
    }

    pub fn has(&self, address: IpAddr) -> bool {
        let (ranges, n) = self.family(address);
        ranges.has(n)
    }

    pub fn has_mac(&self, mac: Mac) -> bool {
        self.macs.contains(&mac)
    }

    /// The first free address from one to another.
    pub fn free(&self, first: IpAddr, last: IpAddr) -> Option<IpAddr> {
        let ((ranges, from), (_, to)) = (self.family(first), self.family(last));
        let found = ranges.free(from, to)?;
        match first {
            IpAddr::V4(_) => u32::try_from(found).ok().map(|n| IpAddr::V4(n.into())),
            IpAddr::V6(_) => Some(IpAddr::V6(found.into())),
        }
    }

    fn take(&mut self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(a) => self.four.take(a.to_bits().into()),
            IpAddr::V6(a) => self.six.take(a.to_bits()),
        }
    }

    fn give(&mut self, address: IpAddr) {
        match address {
            IpAddr::V4(a) => self.four.give(a.to_bits().into()),
            IpAddr::V6(a) => self.six.give(a.to_bits()),
        }
    }
}

/// What a view has to tell hosts anew.
#[derive(Debug, Default)]
pub struct Changed {
    pub networks: BTreeSet<Place>,
    /// Hosts that are told in any case: they had something that is no more, and confirm a newer revision only if they get one.
    pub hosts: BTreeSet<Name>,
    /// A host came, went or moved.
    pub hosts_differ: bool,
    /// A network was deleted: every host is told in any case.
    pub everybody: bool,
}

impl Changed {
    pub fn is_empty(&self) -> bool {
        self.networks.is_empty() && self.hosts.is_empty() && !self.hosts_differ && !self.everybody
    }
}

#[derive(Debug, Default)]
pub struct Nets {
    /// Network numbers.
    vnis: Ranges,
    held: BTreeMap<Uid, Held>,
    /// Addresses of the outside.
    pub outside: Held,
    /// Living NICs.
    by_uid: BTreeMap<Uid, Place>,
    of_instance: BTreeMap<Uid, BTreeSet<Uid>>,
    /// The networks that a host has living NICs of, and how many.
    on_host: BTreeMap<Name, BTreeMap<Place, u32>>,
    /// NICs, living and buried, that a host has not confirmed to be gone.
    leaving: BTreeMap<Name, BTreeSet<Uid>>,
    /// Only in the writer's world: what each host last said it had applied; the greatest number of one that knows no networks.
    pub applied: BTreeMap<Name, u64>,
    /// Only in a view's world.
    pub changed: Option<Changed>,
}

/// Network numbers that may be given: 24 bits, never nought.
const VNIS: (u128, u128) = (1, (1 << 24) - 1);

impl Nets {
    /// A free network number, the next one from `seed` on.
    pub fn free_vni(&self, seed: u32) -> Option<u32> {
        let from = u128::from(seed).clamp(VNIS.0, VNIS.1);
        let found = self.vnis.free(from, VNIS.1).or_else(|| self.vnis.free(VNIS.0, VNIS.1));
        found.and_then(|n| u32::try_from(n).ok())
    }

    /// What is taken of a network.
    pub fn held(&self, network: Uid) -> Option<&Held> {
        self.held.get(&network)
    }

    /// The first free addresses of a range in a network.
    pub fn free4(&self, network: Uid, (first, last): (Ipv4Addr, Ipv4Addr)) -> Option<Ipv4Addr> {
        let (first, last) = (u128::from(first.to_bits()), u128::from(last.to_bits()));
        let found = self.held.get(&network).map_or(Some(first), |held| held.four.free(first, last));
        found.and_then(|n| u32::try_from(n).ok()).map(Into::into)
    }

    pub fn free6(&self, network: Uid, (first, last): (Ipv6Addr, Ipv6Addr)) -> Option<Ipv6Addr> {
        let (first, last) = (first.to_bits(), last.to_bits());
        let found = self.held.get(&network).map_or(Some(first), |held| held.six.free(first, last));
        found.map(Into::into)
    }

    /// How many IPv4 addresses of a range are taken.
    pub fn taken4(&self, network: Uid, (first, last): (Ipv4Addr, Ipv4Addr)) -> u128 {
        self.held.get(&network).map_or(0, |held| held.four.count(first.to_bits().into(), last.to_bits().into()))
    }

    /// Living NICs of an instance.
    pub fn of_instance(&self, instance: Uid) -> impl Iterator<Item = Uid> + '_ {
        self.of_instance.get(&instance).into_iter().flatten().copied()
    }

    /// The networks that a host has NICs of.
    pub fn on_host(&self, host: &Name) -> impl Iterator<Item = &Place> {
        self.on_host.get(host).into_iter().flat_map(|networks| networks.keys())
    }

    /// NICs that a host has not confirmed to be gone.
    pub fn leaving(&self, host: &Name) -> impl Iterator<Item = Uid> + '_ {
        self.leaving.get(host).into_iter().flatten().copied()
    }

    pub fn note(&mut self, network: Place) {
        if let Some(changed) = &mut self.changed {
            changed.networks.insert(network);
        }
    }
}

impl World {
    pub fn nic(&self, uid: Uid) -> Option<&Object<Nic>> {
        match self.nets.by_uid.get(&uid) {
            Some(place) => self.nics.live.get(place),
            None => self.nics.buried.get(&uid),
        }
    }

    /// Living NICs of an instance, in their order.
    pub fn nics_of(&self, instance: Uid) -> Vec<&Object<Nic>> {
        let mut nics: Vec<_> = self.nets.of_instance(instance).filter_map(|uid| self.nic(uid)).collect();
        nics.sort_by_key(|nic| (nic.status.index, nic.metadata.uid));
        nics
    }
}

fn living(nic: &&Object<Nic>) -> bool {
    nic.metadata.deleting.is_none()
}

fn network_of(nic: &Object<Nic>) -> Option<Place> {
    Some((nic.metadata.project.clone(), nic.status.network.as_ref()?.name.clone()))
}

/// The addresses of a NIC.
pub fn addresses(nic: &Object<Nic>) -> impl Iterator<Item = IpAddr> {
    let s = &nic.status;
    s.address4.map(IpAddr::from).into_iter().chain(s.address6.map(IpAddr::from))
}

pub fn index_network(world: &mut World, old: Option<&Object<Network>>, new: Option<&Object<Network>>) {
    // What a peering opens is a matter of both networks' addresses.
    if let Some(changed) = new.or(old).filter(|_| world.nets.changed.is_some()) {
        let place = (changed.metadata.project.clone(), changed.metadata.name.clone());
        let peers: Vec<Place> = of(world, &place).map(peer).collect();
        peers.into_iter().for_each(|peer| world.nets.note(peer));
    }
    let nets = &mut world.nets;
    if let Some(old) = old {
        nets.vnis.give(old.status.vni.into());
        nets.note((old.metadata.project.clone(), old.metadata.name.clone()));
    }
    if let Some(new) = new {
        nets.vnis.take(new.status.vni.into());
        nets.note((new.metadata.project.clone(), new.metadata.name.clone()));
        if let Some(changed) = &mut nets.changed {
            changed.everybody |= new.metadata.deleting.is_some();
        }
    }
}

pub fn index_subnet(world: &mut World, old: Option<&Object<Subnet>>, new: Option<&Object<Subnet>>) {
    for subnet in old.into_iter().chain(new) {
        world.nets.note((subnet.metadata.project.clone(), subnet.spec.network.clone()));
    }
}

pub fn index_group(world: &mut World, old: Option<&Object<SecurityGroup>>, new: Option<&Object<SecurityGroup>>) {
    for group in old.into_iter().chain(new) {
        world.nets.note((group.metadata.project.clone(), group.spec.network.clone()));
    }
}

pub fn index_route_table(world: &mut World, old: Option<&Object<RouteTable>>, new: Option<&Object<RouteTable>>) {
    for table in old.into_iter().chain(new) {
        world.nets.note((table.metadata.project.clone(), table.spec.network.clone()));
    }
}

pub fn index_peering(world: &mut World, old: Option<&Object<Peering>>, new: Option<&Object<Peering>>) {
    for peering in old.into_iter().chain(new) {
        world.nets.note((peering.metadata.project.clone(), peering.spec.network.clone()));
        world.nets.note(peer(peering));
    }
}

pub fn index_internet_gateway(
    world: &mut World,
    old: Option<&Object<InternetGateway>>,
    new: Option<&Object<InternetGateway>>,
) {
    for gateway in old.into_iter().chain(new) {
        world.nets.note((gateway.metadata.project.clone(), gateway.spec.network.clone()));
    }
}

pub fn index_nat_gateway(world: &mut World, old: Option<&Object<NatGateway>>, new: Option<&Object<NatGateway>>) {
    for gateway in old.into_iter().chain(new) {
        world.nets.note((gateway.metadata.project.clone(), gateway.spec.network.clone()));
    }
}

pub fn index_zone(world: &mut World, old: Option<&Object<DnsZone>>, new: Option<&Object<DnsZone>>) {
    for zone in old.into_iter().chain(new) {
        world.nets.note((zone.metadata.project.clone(), zone.spec.network.clone()));
    }
}

/// A list may be named by rules of any network of its project.
pub fn index_prefix_list(world: &mut World, old: Option<&Object<PrefixList>>, new: Option<&Object<PrefixList>>) {
    let Some(list) = new.or(old).filter(|_| world.nets.changed.is_some()) else { return };
    let (project, name) = (list.metadata.project.clone(), &list.metadata.name);
    let within = project.as_ref().map(|project| world.security_groups.within(project));
    let naming = within.into_iter().flatten().filter(|group| group.spec.lists().any(|named| named == name));
    let networks: Vec<Name> = naming.map(|group| group.spec.network.clone()).collect();
    networks.into_iter().for_each(|network| world.nets.note((project.clone(), network)));
}

pub fn index_floating(world: &mut World, old: Option<&Object<FloatingIp>>, new: Option<&Object<FloatingIp>>) {
    for floating in old.into_iter().chain(new) {
        let nic = floating.spec.nic.as_ref().and_then(|nic| world.nics.get(floating.metadata.project.as_ref(), nic));
        if let Some(network) = nic.and_then(network_of) {
            world.nets.note(network);
        }
    }
    let nets = &mut world.nets;
    old.and_then(|f| f.status.address).into_iter().for_each(|address| nets.outside.give(address));
    if let Some(address) = new.and_then(|f| f.status.address) {
        nets.outside.take(address);
    }
    if let Some(changed) = &mut nets.changed {
        changed.everybody |= new.is_some_and(|f| f.metadata.deleting.is_some());
    }
}

/// The addresses of a load balancer.
pub fn addresses_of_balancer(balancer: &Object<LoadBalancer>) -> impl Iterator<Item = IpAddr> {
    let s = &balancer.status;
    s.address4.map(IpAddr::from).into_iter().chain(s.address6.map(IpAddr::from))
}

/// The parts of a balancer that hosts are told.
fn programmed(balancer: Option<&Object<LoadBalancer>>) -> impl PartialEq + use<'_> {
    balancer.map(|b| {
        let s = &b.status;
        (&b.spec, s.address4, s.address6, &s.network, b.metadata.deleting.is_some())
    })
}

pub fn index_balancer(world: &mut World, old: Option<&Object<LoadBalancer>>, new: Option<&Object<LoadBalancer>>) {
    let nets = &mut world.nets;
    // What hosts say of its targets concerns none of them.
    let same = programmed(old) == programmed(new);
    for balancer in old.into_iter().chain(new).filter(|_| !same) {
        if let Some(network) = &balancer.status.network {
            nets.note((balancer.metadata.project.clone(), network.name.clone()));
        }
    }
    if let Some(old) = old
        && let Some(network) = &old.status.network
        && let Some(held) = nets.held.get_mut(&network.uid)
    {
        addresses_of_balancer(old).for_each(|address| held.give(address));
        held.balancers -= 1;
        if held.nics + held.balancers == 0 {
            nets.held.remove(&network.uid);
        }
    }
    if let Some(new) = new
        && let Some(network) = &new.status.network
    {
        let held = nets.held.entry(network.uid).or_default();
        for address in addresses_of_balancer(new) {
            held.take(address);
        }
        held.balancers += 1;
    }
    if let Some(changed) = &mut nets.changed {
        changed.everybody |= new.is_some_and(|b| b.metadata.deleting.is_some());
    }
}

/// Load balancers and names go by who is ready.
pub fn index_instance(world: &mut World, old: Option<&Object<Instance>>, new: Option<&Object<Instance>>) {
    let Some(uid) = new.or(old).map(|i| i.metadata.uid).filter(|_| world.nets.changed.is_some()) else { return };
    let answers = |i: Option<&Object<Instance>>| i.is_some_and(|i| i.status.ready && i.metadata.deleting.is_none());
    if answers(old) == answers(new) {
        return;
    }
    let networks: Vec<Place> = world.nics_of(uid).into_iter().filter_map(network_of).collect();
    networks.into_iter().for_each(|network| world.nets.note(network));
}

/// The parts of a NIC that its place in the other indexes depends on.
fn seat(nic: Option<&Object<Nic>>) -> impl PartialEq + use<'_> {
    nic.map(|n| (&n.status, n.metadata.deleting.is_some(), &n.metadata.name))
}

pub fn index_nic(world: &mut World, old: Option<&Object<Nic>>, new: Option<&Object<Nic>>) {
    let nets = &mut world.nets;
    if let Some(changed) = &mut nets.changed {
        // A host is told anew of what leaves it with every change of the row: what it confirms is compared with that.
        changed.networks.extend(old.into_iter().chain(new).filter_map(network_of));
        changed.hosts.extend(new.into_iter().flat_map(|n| n.status.leaving.iter().cloned()));
        changed.hosts.extend(old.into_iter().chain(new).filter_map(|n| n.status.host.clone()));
    }
    if seat(old) == seat(new) {
        return;
    }
    if let Some(old) = old {
        if let Some(network) = &old.status.network
            && let Some(held) = nets.held.get_mut(&network.uid)
        {
            addresses(old).for_each(|a| held.give(a));
            if let Some(mac) = &old.status.mac {
                held.macs.remove(mac);
            }
            held.nics -= 1;
            if held.nics + held.balancers == 0 {
                nets.held.remove(&network.uid);
            }
        }
        for host in &old.status.leaving {
            remove_from(&mut nets.leaving, host, &old.metadata.uid);
        }
    }
    if let Some(old) = old.filter(living) {
        nets.by_uid.remove(&old.metadata.uid);
        if let Some(instance) = &old.status.instance {
            remove_from(&mut nets.of_instance, instance, &old.metadata.uid);
        }
        if let (Some(host), Some(network)) = (&old.status.host, network_of(old))
            && let Some(networks) = nets.on_host.get_mut(host)
        {
            let left = networks.get(&network).map_or(0, |n| n - 1);
            match left {
                0 => drop(networks.remove(&network)),
                n => drop(networks.insert(network, n)),
            }
            if networks.is_empty() {
                nets.on_host.remove(host);
            }
        }
    }
    if let Some(new) = new {
        if let Some(network) = &new.status.network {
            let held = nets.held.entry(network.uid).or_default();
            for address in addresses(new) {
                held.take(address);
            }
            held.macs.extend(new.status.mac);
            held.nics += 1;
        }
        for host in &new.status.leaving {
            nets.leaving.entry(host.clone()).or_default().insert(new.metadata.uid);
        }
    }
    if let Some(new) = new.filter(living) {
        let m = &new.metadata;
        nets.by_uid.insert(m.uid, (m.project.clone(), m.name.clone()));
        if let Some(instance) = new.status.instance {
            nets.of_instance.entry(instance).or_default().insert(m.uid);
        }
        if let (Some(host), Some(network)) = (&new.status.host, network_of(new)) {
            *nets.on_host.entry(host.clone()).or_default().entry(network).or_default() += 1;
        }
    }
}

/// Notes what a change of a host means to the networks that it has a part in.
pub fn index_host(world: &mut World, old: Option<&Object<Host>>, new: Option<&Object<Host>>) {
    let endpoint = |h: Option<&Object<Host>>| h.map(|h| h.spec.address.ip());
    let Some(name) = new.or(old).map(|h| &h.metadata.name) else { return };
    let nets = &mut world.nets;
    if endpoint(old) != endpoint(new)
        && let Some(changed) = &mut nets.changed
    {
        changed.hosts_differ = true;
        changed.networks.extend(nets.on_host.get(name).into_iter().flat_map(|networks| networks.keys().cloned()));
    }
    if new.is_none() {
        nets.applied.remove(name);
    }
}

fn remove_from<K: Ord, V: Ord>(index: &mut BTreeMap<K, BTreeSet<V>>, key: &K, value: &V) {
    if let Some(set) = index.get_mut(key) {
        set.remove(value);
        if set.is_empty() {
            index.remove(key);
        }
    }
}

/// What is given twice, recounted from the rows.
pub fn differences(world: &World) -> Vec<String> {
    let mut differences = Vec::new();
    let mut vnis = BTreeMap::new();
    for network in world.networks.all() {
        if let Some(other) = vnis.insert(network.status.vni, &network.metadata.uid) {
            differences.push(format!(
                "network number {} is given to {other} and {}",
                network.status.vni, network.metadata.uid
            ));
        }
        if network.status.vni == 0 {
            differences.push(format!("network {} has no number", network.metadata.uid));
        }
    }
    let (mut given, mut macs) = (BTreeMap::new(), BTreeMap::new());
    for nic in world.nics.all() {
        let uid = nic.metadata.uid;
        let Some(network) = &nic.status.network else {
            differences.push(format!("NIC {uid} is of no network"));
            continue;
        };
        for address in addresses(nic) {
            if let Some(other) = given.insert((network.uid, address), uid) {
                differences.push(format!("network {}: {address} is given to NICs {other} and {uid}", network.name));
            }
            if !world.nets.held(network.uid).is_some_and(|held| held.has(address)) {
                differences.push(format!("network {}: {address} of NIC {uid} counts as free", network.name));
            }
        }
        if let Some(other) = nic.status.mac.and_then(|mac| macs.insert((network.uid, mac), uid)) {
            differences
                .push(format!("network {}: NICs {other} and {uid} have the same hardware address", network.name));
        }
    }
    let buried = |uid: Uid| format!("load balancer {uid}");
    for balancer in world.load_balancers.all() {
        let Some(network) = &balancer.status.network else { continue };
        for address in addresses_of_balancer(balancer) {
            if let Some(other) = given.insert((network.uid, address), balancer.metadata.uid) {
                let this = buried(balancer.metadata.uid);
                differences.push(format!("network {}: {address} is given to {other} and {this}", network.name));
            }
        }
    }
    let mut outside = BTreeMap::new();
    for floating in world.floating_ips.all() {
        let Some(address) = floating.status.address else { continue };
        if let Some(other) = outside.insert(address, floating.metadata.uid) {
            differences.push(format!("{address} is given to floating ips {other} and {}", floating.metadata.uid));
        }
    }
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_never_offered_and_what_is_given_back_is() {
        let mut ranges = Ranges::default();
        let mut model = BTreeSet::new();
        // A fixed mix of takes and gives, in an order that joins and splits ranges.
        for i in 0..4_000u128 {
            let n = (i * 7_919) % 97;
            if i % 3 == 0 {
                ranges.give(n);
                model.remove(&n);
            } else {
                assert_eq!(ranges.take(n), model.insert(n));
            }
            let free = (10..=90).find(|n| !model.contains(n));
            assert_eq!(ranges.free(10, 90), free);
            assert_eq!(ranges.count(10, 90), model.range(10..=90).count() as u128);
            assert!(ranges.taken.len() <= model.len());
        }
        for n in 0..97 {
            ranges.take(n);
        }
        assert_eq!((ranges.taken.len(), ranges.free(0, 96), ranges.free(0, 97)), (1, None, Some(97)));
        assert!(ranges.take(u128::MAX) && ranges.free(u128::MAX, u128::MAX).is_none());
    }
}
