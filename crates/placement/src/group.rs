//! How many of a group run where: the counts that spread and the limit per host are decided by.
//!
//! The counts are moved by the same calls that move the host's reservation, so they can't drift from it.

use crate::hostset::HostSet;
use crate::types::{DomainId, FaultId, RackId, ZoneId};
use std::collections::BTreeMap;

/// Where a host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Site {
    pub(crate) zone: ZoneId,
    pub(crate) rack: RackId,
    pub(crate) fault: FaultId,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Group {
    /// Few zones: a list is faster than a map.
    zones: Vec<(ZoneId, u32)>,
    racks: BTreeMap<RackId, u32>,
    faults: BTreeMap<FaultId, u32>,
    /// Of the members that have a fault domain, how many of which are in a rack. While the rule is kept, a rack has one.
    domains: BTreeMap<(RackId, DomainId), u32>,
    hosts: BTreeMap<u32, u32>,
    /// The keys of `hosts`, for the look-up made while walking thousands of hosts.
    members: HostSet,
}

impl Group {
    pub(crate) fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    pub(crate) fn holds(&self, host: u32) -> bool {
        self.members.contains(host)
    }

    pub(crate) fn on_host(&self, host: u32) -> u32 {
        if self.members.contains(host) { self.hosts.get(&host).copied().unwrap_or(0) } else { 0 }
    }

    pub(crate) fn in_zone(&self, zone: ZoneId) -> u32 {
        self.zones.iter().find(|(z, _)| *z == zone).map_or(0, |(_, n)| *n)
    }

    pub(crate) fn in_rack(&self, rack: RackId) -> u32 {
        self.racks.get(&rack).copied().unwrap_or(0)
    }

    pub(crate) fn in_fault(&self, fault: FaultId) -> u32 {
        self.faults.get(&fault).copied().unwrap_or(0)
    }

    /// Racks that hold some of the group with their counts, ascending.
    pub(crate) fn racks(&self) -> &BTreeMap<RackId, u32> {
        &self.racks
    }

    /// The same of what fails as one.
    pub(crate) fn faults(&self) -> &BTreeMap<FaultId, u32> {
        &self.faults
    }

    /// A host fails with others than before.
    pub(crate) fn move_fault(&mut self, host: u32, from: FaultId, to: FaultId) {
        let n = self.on_host(host);
        if n > 0 {
            less(&mut self.faults, from, n);
            *self.faults.entry(to).or_default() += n;
        }
    }

    /// Whether the rack holds members of another fault domain.
    pub(crate) fn in_other_domain(&self, rack: RackId, domain: DomainId) -> bool {
        let of_rack = self.domains.range((rack, DomainId(0))..=(rack, DomainId(u32::MAX)));
        of_rack.into_iter().any(|((_, other), _)| *other != domain)
    }

    /// How many members of each fault domain are in which rack.
    pub(crate) fn domains(&self) -> &BTreeMap<(RackId, DomainId), u32> {
        &self.domains
    }

    /// Hosts that hold some of the group with their counts, by host.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.hosts.iter().map(|(host, n)| (*host, *n))
    }

    /// Zones that hold some of the group with their counts, by zone.
    pub(crate) fn zones(&self) -> Vec<(ZoneId, u32)> {
        let mut zones: Vec<_> = self.zones.iter().copied().filter(|(_, n)| *n > 0).collect();
        zones.sort_unstable();
        zones
    }

    pub(crate) fn add(&mut self, host: u32, site: Site, domain: Option<DomainId>) {
        let Site { zone, rack, fault } = site;
        if let Some(domain) = domain {
            *self.domains.entry((rack, domain)).or_default() += 1;
        }
        *self.racks.entry(rack).or_default() += 1;
        *self.faults.entry(fault).or_default() += 1;
        *self.hosts.entry(host).or_default() += 1;
        self.members.insert(host);
        match self.zones.iter_mut().find(|(z, _)| *z == zone) {
            Some((_, n)) => *n += 1,
            None => self.zones.push((zone, 1)),
        }
    }

    /// Takes one away; the caller has checked that `on_host` is at least one.
    pub(crate) fn take(&mut self, host: u32, site: Site, domain: Option<DomainId>) {
        let Site { zone, rack, fault } = site;
        if let Some(domain) = domain {
            less(&mut self.domains, (rack, domain), 1);
        }
        let Some(count) = self.hosts.get_mut(&host) else { return };
        *count -= 1;
        if *count == 0 {
            self.hosts.remove(&host);
            self.members.remove(host);
        }
        if let Some((_, n)) = self.zones.iter_mut().find(|(z, _)| *z == zone) {
            *n -= 1;
        }
        less(&mut self.racks, rack, 1);
        less(&mut self.faults, fault, 1);
    }
}

fn less<K: Ord>(counts: &mut BTreeMap<K, u32>, key: K, by: u32) {
    if let Some(n) = counts.get_mut(&key) {
        *n = n.saturating_sub(by);
        if *n == 0 {
            counts.remove(&key);
        }
    }
}
