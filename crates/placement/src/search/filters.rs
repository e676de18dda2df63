//! The filters: whether a host may take a request, and what required spread allows.

use super::{Floor, Plan};
use crate::cell::Cell;
use crate::group::Group;
use crate::pool::NO_POOL;
use crate::refusal::Filter;
use crate::types::{GroupId, HostId, LabelId, Request, SpreadLevel, ZoneId};

impl Cell {
    /// The least count of the group in any domain that is eligible, by domain: what a caller with several cells needs to
    /// say what required spread allows. Empty without a group or a level.
    pub fn domains(&self, request: &Request) -> Vec<(u32, u32)> {
        let none = Group::default();
        let group = request.group.and_then(|id| self.groups.get(&id)).unwrap_or(&none);
        let mut domains = std::collections::BTreeMap::new();
        for (host, _) in self.live_hosts().filter(|(host, _)| self.eligible(*host, request)) {
            let (domain, count) = match request.spread.level {
                SpreadLevel::None => continue,
                SpreadLevel::Host => (host, group.on_host(host)),
                SpreadLevel::Rack => (self.rack_of(host).0, self.peers_about(request, Some(group), host)),
                SpreadLevel::Fault => (self.fault_of(host).0, self.peers_about(request, Some(group), host)),
                SpreadLevel::Zone => (self.zone_of(host).0, group.in_zone(self.zone_of(host))),
            };
            domains.insert(domain, count);
        }
        domains.into_iter().collect()
    }

    /// How many of the group are in the host's rack (or fail with it), those outside the cell too.
    pub(super) fn peers_about(&self, request: &Request, group: Option<&Group>, host: u32) -> u32 {
        let (domain, here) = match request.spread.level {
            SpreadLevel::Rack => (self.rack_of(host).0, group.map_or(0, |group| group.in_rack(self.rack_of(host)))),
            SpreadLevel::Fault => (self.fault_of(host).0, group.map_or(0, |group| group.in_fault(self.fault_of(host)))),
            _ => return 0,
        };
        let elsewhere = request.elsewhere.binary_search_by_key(&domain, |(domain, _)| *domain);
        here + elsewhere.map_or(0, |at| request.elsewhere[at].1)
    }

    /// Whether the host could ever take the request: ready, runtime, classes, zone, labels, round trip, not excluded,
    /// able to keep it to nodes.
    pub(crate) fn eligible(&self, host: u32, request: &Request) -> bool {
        let pool = self.hot[host as usize].place.pool;
        pool != NO_POOL
            && self.pools.heads[pool as usize].eligible(request)
            && !request.excluded.contains(&HostId(host))
            && self.lacks_label(request, host).is_none()
            && self.is_near(request, host)
            && (request.span == 0 || self.known(host).pins)
    }

    pub(super) fn lacks_label(&self, request: &Request, host: u32) -> Option<LabelId> {
        if request.labels.is_empty() {
            return None;
        }
        let has = self.known(host).labels();
        request.labels.iter().copied().find(|label| has.binary_search(label).is_err())
    }

    pub(super) fn is_near(&self, request: &Request, host: u32) -> bool {
        request.max_rtt.is_none_or(|below| self.known(host).rtt().is_some_and(|rtt| rtt < below))
    }

    /// The group whose presence (or absence) on the host speaks against it.
    pub(super) fn wrong_company(&self, request: &Request, host: u32) -> Option<(Filter, GroupId)> {
        let holds = |id: &GroupId| self.groups.get(id).is_some_and(|group| group.holds(host));
        let lonely = request.with.iter().find(|id| !holds(id)).map(|id| (Filter::With, *id));
        lonely.or_else(|| request.without.iter().find(|id| holds(id)).map(|id| (Filter::Without, *id)))
    }

    pub(super) fn floor(&self, request: &Request, group: &Group) -> Option<Floor> {
        let of = |level: SpreadLevel, count: u32| match level {
            SpreadLevel::None => None,
            SpreadLevel::Host => Some(Floor::Host(count)),
            SpreadLevel::Rack | SpreadLevel::Fault => Some(Floor::About(count)),
            SpreadLevel::Zone => Some(Floor::Zone(count)),
        };
        if request.spread.level == SpreadLevel::None {
            return None;
        }
        if let Some(floor) = request.spread.floor {
            return of(request.spread.level, floor);
        }
        if request.is_choosy() || request.span > 0 || request.spread.level.is_about() {
            // Hosts of one pool differ: each is asked.
            let emptiest = self.domains(request).into_iter().map(|(_, n)| n).min();
            return emptiest.and_then(|n| of(request.spread.level, n));
        }
        // Eligible hosts per zone: whole pools, less the excluded hosts that stand in them.
        let mut zones: Vec<(ZoneId, u32)> = Vec::new();
        for head in self.pools.heads.iter().filter(|head| head.len > 0 && head.eligible(request)) {
            match zones.iter_mut().find(|(zone, _)| *zone == head.key.zone) {
                Some((_, n)) => *n += head.len,
                None => zones.push((head.key.zone, head.len)),
            }
        }
        for (at, id) in request.excluded.iter().enumerate() {
            let Some(Some(_)) = self.hosts.get(id.0 as usize) else { continue };
            let pool = self.hot[id.0 as usize].place.pool;
            let counted = pool != NO_POOL && self.pools.heads[pool as usize].eligible(request);
            if counted
                && !request.excluded[..at].contains(id)
                && let Some((_, n)) = zones.iter_mut().find(|(zone, _)| *zone == self.zone_of(id.0))
            {
                *n -= 1;
            }
        }
        if request.spread.level == SpreadLevel::Zone {
            let emptiest = zones.iter().filter(|(_, n)| *n > 0).map(|(zone, _)| group.in_zone(*zone)).min();
            return emptiest.map(Floor::Zone);
        }
        let eligible: u32 = zones.iter().map(|(_, n)| n).sum();
        let mut holders = 0;
        let mut fewest = u32::MAX;
        for (_, n) in group.hosts().filter(|(host, _)| self.eligible(*host, request)) {
            holders += 1;
            fewest = fewest.min(n);
        }
        Some(Floor::Host(if holders < eligible { 0 } else { fewest }))
    }

    pub(super) fn first_failure(&self, plan: &Plan, host: u32) -> Option<Filter> {
        let request = plan.request;
        let hot = &self.hot[host as usize];
        if hot.place.pool == NO_POOL {
            return Some(Filter::Ready);
        }
        let key = &self.pools.heads[hot.place.pool as usize].key;
        if !key.runtimes.has(request.runtime) {
            return Some(Filter::Runtime);
        }
        if !request.classes.is_empty() && !self.has_classes(request, host) {
            return Some(Filter::Class);
        }
        if hot.cpu < request.cpu {
            return Some(Filter::Cpu);
        }
        if hot.memory < request.memory {
            return Some(Filter::Memory);
        }
        if hot.scratch < request.scratch {
            return Some(Filter::Scratch);
        }
        if request.storage.is_some_and(|(class, bytes)| self.known(host).storage_free(class) < bytes) {
            return Some(Filter::Storage);
        }
        if hot.slots == 0 {
            return Some(Filter::Slots);
        }
        if request.span > 0 && !self.fits_nodes(request, host) {
            return Some(Filter::Numa);
        }
        if !request.allows_zone(key.zone) {
            return Some(Filter::Zone);
        }
        if plan.choosy {
            if self.lacks_label(request, host).is_some() {
                return Some(Filter::Label);
            }
            if !self.is_near(request, host) {
                return Some(Filter::Latency);
            }
        }
        if request.excluded.contains(&HostId(host)) {
            return Some(Filter::Excluded);
        }
        if plan.choosy
            && let Some((filter, _)) = self.wrong_company(request, host)
        {
            return Some(filter);
        }
        if request.together && plan.group.is_some_and(|group| !group.holds(host)) {
            return Some(Filter::Together);
        }
        if let (Some(domain), Some(group)) = (request.domain, plan.group)
            && group.in_other_domain(self.rack_of(host), domain)
        {
            return Some(Filter::Domain);
        }
        if let (Some(max), Some(_)) = (request.max_per_host, request.group)
            && plan.group.map_or(0, |g| g.on_host(host)) >= max
        {
            return Some(Filter::PerHost);
        }
        let within = match (plan.floor, plan.group) {
            (Some(Floor::Zone(floor)), Some(group)) => group.in_zone(key.zone) <= floor,
            (Some(Floor::About(floor)), group) => self.peers_about(request, group, host) <= floor,
            (Some(Floor::Host(floor)), Some(group)) => group.on_host(host) <= floor,
            _ => true,
        };
        if within { None } else { Some(Filter::Spread) }
    }

    fn has_classes(&self, request: &Request, host: u32) -> bool {
        let known = self.known(host);
        request.classes.iter().all(|(class, _)| known.class_free(*class) >= request.wants(*class))
    }
}
