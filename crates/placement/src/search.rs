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

mod filters;
mod refuse;

use crate::cell::{Cell, quarter_floor};
use crate::group::Group;
use crate::hostset::{HostSet, Ones};
use crate::pool::{Grid, SIDE, range, step};
use crate::refusal::{Filter, Refusal};
use crate::score::{
    self, ROOM, SLACK, Score, UNIT, WEIGHT_CLASS, WEIGHT_IMAGE, WEIGHT_LOAD, fraction, load_term, packing,
    packing_bound, room_term,
};
use crate::types::{HostId, Nodes, Request, SpreadLevel, ZoneId};

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
    /// Of racks, or of what fails as one.
    About(u32),
    Host(u32),
}

/// Which hosts a search leaves out because they hold some of the group.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fresh {
    /// None.
    Any,
    /// Those that do.
    Host,
    /// Those whose rack does, or with which some of it would fail.
    About,
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
        let pinned = (request.span > 0 && !self.known(host.0).pins).then_some(Filter::Numa);
        Ok(zone.or(label).or(far).or(pinned).or_else(|| self.wrong_company(request, host.0).map(|(filter, _)| filter)))
    }

    /// How many of a request's group are in the host's rack, or fail with it, where it is spread over those, and how many
    /// are on the host.
    pub fn peers(&self, host: HostId, request: &Request) -> Result<(u32, u32), crate::UnknownHost> {
        self.host(host)?;
        let group = request.group.and_then(|group| self.groups.get(&group));
        Ok((self.peers_about(request, group, host.0), group.map_or(0, |group| group.on_host(host.0))))
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
        let held = group.is_some() || request.spread.level.is_about() && !request.elsewhere.is_empty();
        let level = if held { request.spread.level } else { SpreadLevel::None };
        let image = request.image.and_then(|id| self.images.get(&id));
        let (none, demanded) = (Group::default(), held && request.spread.required);
        let floor = if demanded { self.floor(request, group.unwrap_or(&none)) } else { None };
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

    fn score_of(&self, plan: &Plan, host: u32) -> Score {
        let hot = &self.hot[host as usize];
        let known = self.zone_of(host);
        let (mut domain_peers, mut host_peers) = (0, 0);
        if plan.level.is_about() {
            domain_peers = self.peers_about(plan.request, plan.group, host);
        }
        if let Some(group) = plan.group {
            if plan.level == SpreadLevel::Zone {
                domain_peers = group.in_zone(known);
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
        if plan.level.is_about() {
            // Once every rack holds some, racks are told apart by their counts, which no pool knows.
            return self.search(plan, None, Fresh::About, examined).or_else(|| {
                *examined += self.live;
                self.best_of(plan, self.live_hosts().map(|(host, _)| host))
            });
        }
        let Some(group) = plan.group.filter(|_| plan.level != SpreadLevel::None) else {
            return self.search(plan, None, Fresh::Any, examined);
        };
        if plan.level == SpreadLevel::Host {
            return self.choose_in(plan, group, None, examined);
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
        match fresh {
            Fresh::Any => false,
            Fresh::Host => plan.group.is_some_and(|group| group.holds(host)),
            Fresh::About => self.peers_about(plan.request, plan.group, host) > 0,
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
