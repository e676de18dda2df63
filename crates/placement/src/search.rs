//! Choosing a host: the filters, the search over the index, and the scan of every host that it is checked against.
//!
//! The search is a branch and bound. Pools that can't take the request by runtime, class, zone or size are dropped
//! first. In the others the tightest bucket that could take the request is the corner of a square; the search walks
//! the square's rings outwards, all pools in step, because a ring's distance bounds what is left of the dominant
//! dimension, and so the fit. A pool, ring or bucket whose best possible merit is within one part in
//! [`SLACK`](crate::score::SLACK) of the best host found so far is not opened. That slack is what makes the search short:
//! hosts that are as good as equal aren't told apart.
//!
//! The image term can't be bounded by place in the grid. An image on few hosts has those hosts looked at first, and
//! is then out of the bound; for a common one, a bucket that is only worth opening for its image holders is read
//! through the image's bit set, without touching the other hosts.
//!
//! Of hosts with several NUMA nodes, for a request that wants some, one column of fit terms is read instead (see
//! [`crate::mix`]): all of them are compared, and only those that are better than the best so far are asked the rest.
//!
//! Spread makes tiers: the search runs over the zones with the fewest of the group and over hosts that hold none of it;
//! only if that fails are the hosts that do hold some compared one by one, and then the next zones.

use crate::cell::{Cell, quarter_floor};
use crate::group::Group;
use crate::hostset::{HostSet, Ones};
use crate::pool::{Grid, NO_POOL, SIDE, range, step};
use crate::refusal::{Filter, Refusal};
use crate::score::{
    self, ROOM, SLACK, Score, UNIT, WEIGHT_CLASS, WEIGHT_IMAGE, WEIGHT_LOAD, fraction, load_term, packing,
    packing_bound, room_term,
};
use crate::types::{GroupId, HostId, LabelId, Nodes, RackId, Request, SpreadLevel, ZoneId};

/// Up to here a scan of every host is as fast as the index, and exact.
const SCAN_UP_TO: u32 = 512;
/// An image on at most this many hosts is looked for on each of them (some 10 ns a host).
const RARE_IMAGE: usize = 256;
const IMAGE_TERM: u32 = WEIGHT_IMAGE * UNIT;
const CLASS_TERM: u32 = WEIGHT_CLASS * UNIT;

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub host: HostId,
    pub zone: ZoneId,
    /// Where the parts of a request that spans NUMA nodes go: to be put into [`Request::nodes`].
    pub nodes: Nodes,
    pub score: Score,
    /// Hosts that were looked at one by one.
    pub examined: u32,
}

/// What required spread allows at most: the count of the emptiest eligible domain.
#[derive(Clone, Copy)]
enum Floor {
    Zone(u32),
    Rack(u32),
    Host(u32),
}

/// Which hosts a search leaves out because they hold some of the group.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fresh {
    /// None.
    Any,
    /// Those that do.
    Host,
    /// Those whose rack does.
    Rack,
}

/// A request with what the cell knows about it.
struct Plan<'a> {
    request: &'a Request,
    group: Option<&'a Group>,
    image: Option<&'a HostSet>,
    level: SpreadLevel,
    floor: Option<Floor>,
    choosy: bool,
    /// Whether it is the first of a group that is to stay together, and looks for room for more.
    leads: bool,
}

/// A pool that a search may look into.
struct Candidate {
    pool: u32,
    /// The tightest row and column that can hold a feasible host.
    row: usize,
    column: usize,
    /// The request in fractions of the pool's nominal size.
    cpu: u32,
    memory: u32,
    /// The class term, with which every host of the pool is scored.
    class_term: u32,
    /// The class term and the most that load can add.
    bound: u32,
}

/// The best host so far.
struct Best {
    /// 0 when none was found: merits start at 1.
    merit: u32,
    host: u32,
    /// Bounds up to here aren't worth opening.
    cutoff: u32,
    examined: u32,
}

impl Best {
    fn offer(&mut self, merit: u32, host: u32) {
        if merit > self.merit || merit == self.merit && host < self.host {
            self.merit = merit;
            self.host = host;
            self.cutoff = merit + merit / SLACK;
        }
    }
}

impl Cell {
    /// Chooses a host, or says why there is none. Nothing is reserved: call [`Cell::reserve`] with the host.
    pub fn place(&self, request: &Request) -> Result<Decision, Refusal> {
        if self.live <= SCAN_UP_TO { self.place_exhaustive(request) } else { self.place_indexed(request) }
    }

    /// Chooses by scanning every host: the best there is, ties to the lowest handle. For checks and small cells.
    pub fn place_exhaustive(&self, request: &Request) -> Result<Decision, Refusal> {
        let plan = self.plan(request);
        let mut best: Option<(Score, u32)> = None;
        for (host, _) in self.live_hosts() {
            if self.first_failure(&plan, host).is_none() {
                let score = self.score_of(&plan, host);
                if best.is_none_or(|(seen, _)| score > seen) {
                    best = Some((score, host));
                }
            }
        }
        match best {
            Some((score, host)) => Ok(self.decision(&plan, host, score, self.live)),
            None => {
                let mut refusal = Refusal::new(self.live);
                for (host, _) in self.live_hosts() {
                    self.tell(&plan, host, &mut refusal);
                }
                Err(refusal.finish())
            }
        }
    }

    /// Chooses by the index, whatever the size of the cell.
    pub(crate) fn place_indexed(&self, request: &Request) -> Result<Decision, Refusal> {
        let plan = self.plan(request);
        let mut examined = 0;
        match self.choose(&plan, &mut examined) {
            Some(host) => Ok(self.decision(&plan, host, self.score_of(&plan, host), examined)),
            None => Err(self.refuse(&plan)),
        }
    }

    /// The first filter that turns the host away, if any does. `None` for a host that would be accepted.
    pub fn check(&self, host: HostId, request: &Request) -> Result<Option<Filter>, crate::UnknownHost> {
        self.host(host)?;
        Ok(self.first_failure(&self.plan(request), host.0))
    }

    /// The score that a host has for a request, whether or not it has room. Meaningful for ready hosts only.
    pub fn score(&self, host: HostId, request: &Request) -> Result<Score, crate::UnknownHost> {
        self.host(host)?;
        Ok(self.score_of(&self.plan(request), host.0))
    }

    /// The first of a request's demands on a host's kind and company that it does not meet, whether or not it has room. A
    /// round trip that has not been measured breaks nothing.
    pub fn breach(&self, host: HostId, request: &Request) -> Result<Option<Filter>, crate::UnknownHost> {
        let rtt = self.host(host)?.rtt();
        let zone = (!request.allows_zone(self.zone_of(host.0))).then_some(Filter::Zone);
        let label = self.lacks_label(request, host.0).map(|_| Filter::Label);
        let far = (rtt.is_some() && !self.is_near(request, host.0)).then_some(Filter::Latency);
        Ok(zone.or(label).or(far).or_else(|| self.wrong_company(request, host.0).map(|(filter, _)| filter)))
    }

    /// How many of a group are in the host's rack and on the host.
    pub fn peers(&self, host: HostId, group: GroupId) -> Result<(u32, u32), crate::UnknownHost> {
        self.host(host)?;
        let group = self.groups.get(&group);
        Ok(group.map_or((0, 0), |group| (group.in_rack(self.rack_of(host.0)), group.on_host(host.0))))
    }

    /// Every host that passes the filters, ascending: what a strategy of one's own would choose from.
    pub fn feasible<'a>(&'a self, request: &'a Request) -> impl Iterator<Item = HostId> + 'a {
        let plan = self.plan(request);
        self.live_hosts()
            .filter(move |(host, _)| self.first_failure(&plan, *host).is_none())
            .map(|(host, _)| HostId(host))
    }

    fn decision(&self, plan: &Plan, host: u32, score: Score, examined: u32) -> Decision {
        let nodes = self.nodes_for(plan.request, host);
        Decision { host: HostId(host), zone: self.zone_of(host), nodes, score, examined }
    }

    fn plan<'a>(&'a self, request: &'a Request) -> Plan<'a> {
        // A group without a reservation is even everywhere.
        let group = request.group.and_then(|id| self.groups.get(&id));
        let level = if group.is_some() { request.spread.level } else { SpreadLevel::None };
        let image = request.image.and_then(|id| self.images.get(&id));
        let floor = match group {
            Some(group) if request.spread.required => self.floor(request, group),
            _ => None,
        };
        Plan {
            request,
            group,
            image,
            level,
            floor,
            choosy: request.is_choosy(),
            leads: request.together && group.is_none(),
        }
    }

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
                SpreadLevel::Rack => (self.rack_of(host).0, group.in_rack(self.rack_of(host))),
                SpreadLevel::Zone => (self.zone_of(host).0, group.in_zone(self.zone_of(host))),
            };
            domains.insert(domain, count);
        }
        domains.into_iter().collect()
    }

    /// Whether the host could ever take the request: ready, runtime, classes, zone, labels, round trip, not excluded.
    pub(crate) fn eligible(&self, host: u32, request: &Request) -> bool {
        let pool = self.hot[host as usize].place.pool;
        pool != NO_POOL
            && self.pools.heads[pool as usize].eligible(request)
            && !request.excluded.contains(&HostId(host))
            && self.lacks_label(request, host).is_none()
            && self.is_near(request, host)
    }

    fn lacks_label(&self, request: &Request, host: u32) -> Option<LabelId> {
        if request.labels.is_empty() {
            return None;
        }
        let has = self.known(host).labels();
        request.labels.iter().copied().find(|label| has.binary_search(label).is_err())
    }

    fn is_near(&self, request: &Request, host: u32) -> bool {
        request.max_rtt.is_none_or(|below| self.known(host).rtt().is_some_and(|rtt| rtt < below))
    }

    /// The group whose presence (or absence) on the host speaks against it.
    fn wrong_company(&self, request: &Request, host: u32) -> Option<(Filter, GroupId)> {
        let holds = |id: &GroupId| self.groups.get(id).is_some_and(|group| group.holds(host));
        let lonely = request.with.iter().find(|id| !holds(id)).map(|id| (Filter::With, *id));
        lonely.or_else(|| request.without.iter().find(|id| holds(id)).map(|id| (Filter::Without, *id)))
    }

    fn floor(&self, request: &Request, group: &Group) -> Option<Floor> {
        let of = |level: SpreadLevel, count: u32| match level {
            SpreadLevel::None => None,
            SpreadLevel::Host => Some(Floor::Host(count)),
            SpreadLevel::Rack => Some(Floor::Rack(count)),
            SpreadLevel::Zone => Some(Floor::Zone(count)),
        };
        if request.spread.level == SpreadLevel::None {
            return None;
        }
        if let Some(floor) = request.spread.floor {
            return of(request.spread.level, floor);
        }
        if request.is_choosy() || request.spread.level == SpreadLevel::Rack {
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

    fn first_failure(&self, plan: &Plan, host: u32) -> Option<Filter> {
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
            (Some(Floor::Rack(floor)), Some(group)) => group.in_rack(self.rack_of(host)) <= floor,
            (Some(Floor::Host(floor)), Some(group)) => group.on_host(host) <= floor,
            _ => true,
        };
        if within { None } else { Some(Filter::Spread) }
    }

    fn has_classes(&self, request: &Request, host: u32) -> bool {
        let known = self.known(host);
        request.classes.iter().all(|(class, _)| known.class_free(*class) >= request.wants(*class))
    }

    fn score_of(&self, plan: &Plan, host: u32) -> Score {
        let hot = &self.hot[host as usize];
        let known = self.zone_of(host);
        let (mut domain_peers, mut host_peers) = (0, 0);
        if let Some(group) = plan.group {
            match plan.level {
                SpreadLevel::Zone => domain_peers = group.in_zone(known),
                SpreadLevel::Rack => domain_peers = group.in_rack(self.rack_of(host)),
                SpreadLevel::Host | SpreadLevel::None => {}
            }
            if plan.level != SpreadLevel::None {
                host_peers = group.on_host(host);
            }
        }
        let Some(head) = self.pools.heads.get(hot.place.pool as usize) else {
            return Score { domain_peers, host_peers, merit: 1 };
        };
        let cpu = fraction(u64::from(plan.request.cpu), head.key.cpu_unit);
        let memory = fraction(plan.request.memory, head.key.memory_unit);
        let class_term = if head.wastes_class(plan.request) { 0 } else { CLASS_TERM };
        let image_term = if plan.image.is_some_and(|holders| holders.contains(host)) { IMAGE_TERM } else { 0 };
        let packed = || packing(hot.cpu_fraction.saturating_sub(cpu), hot.memory_fraction.saturating_sub(memory));
        let left = self.nodes_fit(plan.request, host).unwrap_or_else(packed);
        let merit = 1 + left + class_term + image_term + hot.load_term;
        Score { domain_peers, host_peers, merit: self.led(plan, host, merit) }
    }

    /// A merit with what it loses where few more of the request would fit, if it leads a group that stays together.
    fn led(&self, plan: &Plan, host: u32, merit: u32) -> u32 {
        if !plan.leads {
            return merit;
        }
        let (request, hot) = (plan.request, &self.hot[host as usize]);
        let cpu = hot.cpu.checked_div(request.cpu).map_or(u64::MAX, u64::from);
        let memory = hot.memory.checked_div(request.memory).unwrap_or(u64::MAX);
        let fit = cpu.min(memory).min(u64::from(ROOM) + 1).min(self.room_on_nodes(request, host));
        merit.saturating_sub(room_term(fit.saturating_sub(1) as u32)).max(1)
    }

    fn choose(&self, plan: &Plan, examined: &mut u32) -> Option<u32> {
        if let Some(group) = plan.group.filter(|_| plan.request.together) {
            return self.best_of(plan, group.hosts().map(|(host, _)| host).inspect(|_| *examined += 1));
        }
        let Some(group) = plan.group.filter(|_| plan.level != SpreadLevel::None) else {
            return self.search(plan, None, Fresh::Any, examined);
        };
        if plan.level == SpreadLevel::Host {
            return self.choose_in(plan, group, None, examined);
        }
        if plan.level == SpreadLevel::Rack {
            // Once every rack holds some, racks are told apart by their counts, which no pool knows.
            return self.search(plan, None, Fresh::Rack, examined).or_else(|| {
                *examined += self.live;
                self.best_of(plan, self.live_hosts().map(|(host, _)| host))
            });
        }
        let mut zones: Vec<(u32, ZoneId)> = Vec::new();
        for head in self.pools.heads.iter().filter(|head| head.len > 0 && plan.request.allows_zone(head.key.zone)) {
            if !zones.iter().any(|(_, zone)| *zone == head.key.zone) {
                zones.push((group.in_zone(head.key.zone), head.key.zone));
            }
        }
        zones.sort_unstable();
        for tier in zones.chunk_by(|a, b| a.0 == b.0) {
            if matches!(plan.floor, Some(Floor::Zone(floor)) if tier[0].0 > floor) {
                return None;
            }
            let tier: Vec<ZoneId> = tier.iter().map(|(_, zone)| *zone).collect();
            let found = self.choose_in(plan, group, Some(&tier), examined);
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// Chooses within some zones: a host without any of the group, or else one with the fewest.
    fn choose_in(&self, plan: &Plan, group: &Group, zones: Option<&[ZoneId]>, examined: &mut u32) -> Option<u32> {
        let fresh = self.search(plan, zones, Fresh::Host, examined);
        if fresh.is_some() {
            return fresh;
        }
        let holders = group.hosts().map(|(host, _)| host).inspect(|_| *examined += 1);
        self.best_of(plan, holders.filter(|host| zones.is_none_or(|zones| zones.contains(&self.zone_of(*host)))))
    }

    /// The best of some hosts, compared one by one.
    fn best_of(&self, plan: &Plan, hosts: impl Iterator<Item = u32>) -> Option<u32> {
        let mut best: Option<(Score, u32)> = None;
        for host in hosts.filter(|host| self.first_failure(plan, *host).is_none()) {
            let score = self.score_of(plan, host);
            if best.is_none_or(|(seen, _)| score > seen) {
                best = Some((score, host));
            }
        }
        best.map(|(_, host)| host)
    }

    /// Whether a search leaves the host out.
    fn is_stale(&self, plan: &Plan, fresh: Fresh, host: u32) -> bool {
        let rack = |group: &Group, rack: RackId| group.in_rack(rack) > 0;
        match fresh {
            Fresh::Any => false,
            Fresh::Host => plan.group.is_some_and(|group| group.holds(host)),
            Fresh::Rack => plan.group.is_some_and(|group| rack(group, self.rack_of(host))),
        }
    }

    /// The best host by merit, within the slack, among those that `fresh` leaves.
    fn search(&self, plan: &Plan, zones: Option<&[ZoneId]>, fresh: Fresh, examined: &mut u32) -> Option<u32> {
        let mut best = Best { merit: 0, host: u32::MAX, cutoff: 0, examined: 0 };
        let mut candidates = self.candidates(plan.request, zones);
        let mut image = plan.image;
        if let Some(holders) = image.filter(|holders| holders.len() <= RARE_IMAGE) {
            for host in holders.iter() {
                let in_scope =
                    zones.is_none_or(|zones| zones.contains(&self.zone_of(host))) && !self.is_stale(plan, fresh, host);
                best.examined += 1;
                if in_scope && self.first_failure(plan, host).is_none() {
                    best.offer(self.score_of(plan, host).merit, host);
                }
            }
            image = None;
        }
        let image_term = if image.is_some() { IMAGE_TERM } else { 0 };
        for ring in 0..SIDE {
            candidates.retain(|c| {
                let head = &self.pools.heads[c.pool as usize];
                let more = |bits: u64, first: usize| first + ring < SIDE && bits >> (first + ring) != 0;
                // A host of this ring, or of one further out, has at least this much of one dimension left over.
                let left =
                    |first: usize, taken: u32| if first + ring < SIDE { leftover(first + ring, taken).0 } else { UNIT };
                let left = left(c.row, c.cpu).min(left(c.column, c.memory));
                let bound = 1 + packing_bound((left, UNIT), (0, UNIT)) + image_term + c.bound;
                bound > best.cutoff && (more(head.rows, c.row) || more(head.columns, c.column))
            });
            if candidates.is_empty() {
                break;
            }
            for candidate in &candidates {
                let grid = &self.pools.grids[candidate.pool as usize];
                let (row, column) = (candidate.row + ring, candidate.column + ring);
                if row < SIDE {
                    for at in Ones(grid.row(row) & between(candidate.column, column.min(SIDE - 1))) {
                        self.open(plan, fresh, image, candidate, grid, (row, at as usize), &mut best);
                    }
                }
                if column < SIDE && ring > 0 {
                    for at in Ones(grid.column(column) & between(candidate.row, (row - 1).min(SIDE - 1))) {
                        self.open(plan, fresh, image, candidate, grid, (at as usize, column), &mut best);
                    }
                }
            }
        }
        self.search_nodes(plan, zones, fresh, &mut best);
        *examined += best.examined;
        (best.merit > 0).then_some(best.host)
    }

    /// Compares the hosts with several NUMA nodes, if the request wants some.
    fn search_nodes(&self, plan: &Plan, zones: Option<&[ZoneId]>, fresh: Fresh, best: &mut Best) {
        let image_term = if plan.image.is_some() { IMAGE_TERM } else { 0 };
        let most = 1 + CLASS_TERM + image_term + WEIGHT_LOAD * UNIT;
        for (host, fit) in self.with_nodes(plan.request) {
            if fit + most < best.merit || fit + most == best.merit && host > best.host {
                continue;
            }
            best.examined += 1;
            let merit = self.score_of(plan, host).merit;
            if (merit > best.merit || merit == best.merit && host < best.host)
                && zones.is_none_or(|zones| zones.contains(&self.zone_of(host)))
                && !self.is_stale(plan, fresh, host)
                && self.first_failure(plan, host).is_none()
            {
                best.offer(merit, host);
            }
        }
    }

    fn candidates(&self, request: &Request, zones: Option<&[ZoneId]>) -> Vec<Candidate> {
        let mut candidates = Vec::with_capacity(self.pools.heads.len());
        for (pool, head) in self.pools.heads.iter().enumerate() {
            if head.len == 0
                || request.span > 0 && (head.key.numa || request.span > 1)
                || u64::from(request.cpu) > head.key.cpu_unit
                || request.memory > head.key.memory_unit
                || zones.is_some_and(|zones| !zones.contains(&head.key.zone))
                || !head.eligible(request)
            {
                continue;
            }
            let cpu = fraction(u64::from(request.cpu), head.key.cpu_unit);
            let memory = fraction(request.memory, head.key.memory_unit);
            let (row, column) = (step(cpu), step(memory));
            if head.rows >> row == 0 || head.columns >> column == 0 {
                continue;
            }
            if request.classes.iter().any(|(class, _)| head.most_free(*class) < request.wants(*class)) {
                continue;
            }
            let class_term = if head.wastes_class(request) { 0 } else { CLASS_TERM };
            let bound = class_term + load_term(quarter_floor(head.key.quarter));
            candidates.push(Candidate { pool: pool as u32, row, column, cpu, memory, class_term, bound });
        }
        candidates
    }

    /// Looks at the hosts of one bucket, if they can be worth it.
    #[allow(clippy::too_many_arguments, reason = "one step of `search`, apart only to be readable")]
    fn open(
        &self,
        plan: &Plan,
        fresh: Fresh,
        image: Option<&HostSet>,
        candidate: &Candidate,
        grid: &Grid,
        (row, column): (usize, usize),
        best: &mut Best,
    ) {
        let bound =
            1 + candidate.bound + packing_bound(leftover(row, candidate.cpu), leftover(column, candidate.memory));
        let image_term = if image.is_some() { IMAGE_TERM } else { 0 };
        if bound + image_term <= best.cutoff {
            return;
        }
        let request = plan.request;
        for &host in grid.bucket(row, column) {
            let mut gain = 0;
            if let Some(holders) = image {
                if holders.contains(host) {
                    gain = IMAGE_TERM;
                } else if bound <= best.cutoff {
                    continue;
                }
            } else if bound <= best.cutoff {
                return;
            }
            best.examined += 1;
            let hot = &self.hot[host as usize];
            if hot.cpu < request.cpu || hot.memory < request.memory {
                continue;
            }
            let left = packing(
                hot.cpu_fraction.saturating_sub(candidate.cpu),
                hot.memory_fraction.saturating_sub(candidate.memory),
            );
            let merit = self.led(plan, host, 1 + left + candidate.class_term + gain + hot.load_term);
            if merit < best.merit
                || hot.scratch < request.scratch
                || hot.slots == 0
                || self.is_stale(plan, fresh, host)
                || self.first_failure(plan, host).is_some()
            {
                continue;
            }
            best.offer(merit, host);
        }
    }

    /// Counts one host into a refusal.
    fn tell(&self, plan: &Plan, host: u32, refusal: &mut Refusal) {
        let Some(filter) = self.first_failure(plan, host) else { return };
        refusal.count(filter, 1);
        let (request, hot) = (plan.request, &self.hot[host as usize]);
        match filter {
            Filter::Class => {
                let known = self.known(host);
                let free = |class| known.class_free(class);
                if let Some((class, _)) = request.classes.iter().find(|(c, _)| free(*c) < request.wants(*c)) {
                    refusal.lacking(filter, Some(*class), request.wants(*class), free(*class));
                }
            }
            Filter::Cpu => refusal.lacking(filter, None, u64::from(request.cpu), u64::from(hot.cpu)),
            Filter::Memory => refusal.lacking(filter, None, request.memory, hot.memory),
            Filter::Scratch => refusal.lacking(filter, None, request.scratch, hot.scratch),
            Filter::Storage => {
                if let Some((class, bytes)) = request.storage {
                    refusal.lacking(filter, Some(class), bytes, self.known(host).storage_free(class));
                }
            }
            Filter::Label => self.lacks_label(request, host).into_iter().for_each(|label| refusal.unlabelled(label, 1)),
            Filter::Latency => refusal.far(request.max_rtt.unwrap_or(0), self.known(host).rtt()),
            Filter::With | Filter::Without => {
                if let Some((filter, group)) = self.wrong_company(request, host) {
                    refusal.company(filter, group, 1);
                }
            }
            _ => {}
        }
    }

    /// Counts every host by the filter that turned it away. Whole pools, rows and buckets are counted at once where one
    /// filter must have turned away all of them, so that a full cell refuses about as fast as an open one accepts.
    fn refuse(&self, plan: &Plan) -> Refusal {
        let request = plan.request;
        let mut refusal = Refusal::new(self.live);
        refusal.count(Filter::Ready, self.live - self.pools.len());
        for (head, grid) in self.pools.heads.iter().zip(&self.pools.grids).filter(|(head, _)| head.len > 0) {
            if !head.key.runtimes.has(request.runtime) {
                refusal.count(Filter::Runtime, head.len);
                continue;
            }
            if let Some((class, _)) = request.classes.iter().find(|(class, _)| request.wants(*class) > 0) {
                let (wanted, most) = (request.wants(*class), head.most_free(*class));
                if most < wanted {
                    refusal.count(Filter::Class, head.len);
                    refusal.lacking(Filter::Class, Some(*class), wanted, most);
                    continue;
                }
            }
            // With classes, each host's stock decides before its cpu does; hosts with classes are few.
            let by_host = request.classes.iter().any(|(c, _)| request.wants(*c) > 0);
            let too_big = |want: u64, unit: u64| want > unit;
            let row = if too_big(u64::from(request.cpu), head.key.cpu_unit) {
                SIDE
            } else {
                step(fraction(u64::from(request.cpu), head.key.cpu_unit))
            };
            let column = if too_big(request.memory, head.key.memory_unit) {
                SIDE
            } else {
                step(fraction(request.memory, head.key.memory_unit))
            };
            // From the freest row down, so that the first row short of cpu holds the most that is free.
            let mut short_seen = false;
            for at in (0..SIDE).rev().filter(|at| head.rows >> at & 1 == 1) {
                if at < row && !by_host {
                    refusal.count(Filter::Cpu, grid.row_len(at));
                    // Rounded up: no host of the row has more cpu free than this.
                    let most =
                        (u128::from(range(at).1) * u128::from(head.key.cpu_unit)).div_ceil(u128::from(UNIT)) as u64;
                    if !std::mem::replace(&mut short_seen, true)
                        && refusal.most_free(Filter::Cpu).is_none_or(|seen| seen <= most)
                    {
                        for host in Ones(grid.row(at)).flat_map(|c| grid.bucket(at, c as usize)) {
                            refusal.lacking(
                                Filter::Cpu,
                                None,
                                u64::from(request.cpu),
                                u64::from(self.hot[*host as usize].cpu),
                            );
                        }
                    }
                    continue;
                }
                self.refuse_row(plan, grid, (at, row), column, by_host, &mut refusal);
            }
        }
        refusal.finish()
    }

    /// Counts a row whose hosts may have enough cpu.
    fn refuse_row(
        &self,
        plan: &Plan,
        grid: &Grid,
        (row, first_row): (usize, usize),
        column: usize,
        by_host: bool,
        refusal: &mut Refusal,
    ) {
        let mut short_seen = false;
        for at in (0..SIDE).rev().filter(|at| grid.row(row) >> at & 1 == 1) {
            let bucket = grid.bucket(row, at);
            // Hosts past the first row have the cpu, and hosts before the column lack the memory.
            if row > first_row && at < column && !by_host {
                refusal.count(Filter::Memory, bucket.len() as u32);
                if !std::mem::replace(&mut short_seen, true) {
                    for host in bucket {
                        refusal.lacking(Filter::Memory, None, plan.request.memory, self.hot[*host as usize].memory);
                    }
                }
            } else {
                for host in bucket {
                    self.tell(plan, *host, refusal);
                }
            }
        }
    }
}

/// The least and the most that a host of a row (or column) has left after a request.
fn leftover(step: usize, taken: u32) -> (u32, u32) {
    let (low, high) = range(step);
    (low.saturating_sub(taken), high.saturating_sub(taken))
}

/// A word with the bits from `first` to `last` set; none when they are out of order.
fn between(first: usize, last: usize) -> u64 {
    if first > last { 0 } else { (!0 << first) & (!0 >> (SIDE - 1 - last)) }
}

// The bounds lean on it: a merit and its slack must fit 32 bits.
const _: () = assert!(score::BEST_MERIT < u32::MAX / 2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_bits_has_both_ends() {
        assert_eq!(between(0, 63), !0);
        assert_eq!(between(3, 5), 0b111000);
        assert_eq!(between(5, 3), 0);
        assert_eq!(between(63, 63), 1 << 63);
    }
}
