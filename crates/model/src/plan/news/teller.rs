//! The server's side: versions of networks, shared by all hosts, and what each agent is sent of them.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use serde::Serialize;

use super::{
    Edit, HostNetworks, NetworkChange, NetworkPlan, NetworksMessage, NetworksRequest, News, digest_of, digest_of_all,
};
use crate::{Digest, Uid};

/// A message holds about so much: a quarter of what the wire takes, for the last item of a part may be large.
const PART: usize = 4 << 20;
/// The last changes of a network that are remembered; fewer, if they come to more than its plan does.
const STEPS: usize = 64;

/// A network's plan with the way to it.
#[derive(Debug)]
pub struct NetworkVersion {
    plan: Arc<NetworkPlan>,
    digest: Digest,
    bytes: usize,
    /// Each leads from one version to the next, the last to this one.
    steps: VecDeque<Step>,
    /// From nothing, once anybody has asked.
    anew: OnceLock<Vec<(Arc<NetworkChange>, usize)>>,
}

#[derive(Debug, Clone)]
struct Step {
    from: Digest,
    change: Arc<NetworkChange>,
    bytes: usize,
}

impl NetworkVersion {
    /// The plan that follows another, if it does. The same plan is the same version.
    pub fn after(old: Option<&Arc<Self>>, plan: NetworkPlan) -> Arc<Self> {
        let old = old.filter(|old| old.plan.uid == plan.uid);
        if let Some(same) = old.filter(|old| *old.plan == plan) {
            return same.clone();
        }
        let (digest, bytes) = digest_of(&plan);
        let mut steps = VecDeque::new();
        if let Some(old) = old {
            let change = NetworkChange::between(&old.plan, &plan, digest);
            let step = Step { from: old.digest, bytes: digest_of(&change).1, change: Arc::new(change) };
            steps.clone_from(&old.steps);
            steps.push_back(step);
            let most = bytes.min(PART);
            let mut sum: usize = steps.iter().map(|s| s.bytes).sum();
            while steps.len() > STEPS || sum > most {
                let Some(first) = steps.pop_front() else { break };
                sum -= first.bytes;
            }
        }
        Arc::new(Self { plan: Arc::new(plan), digest, bytes, steps, anew: OnceLock::new() })
    }

    pub fn plan(&self) -> &Arc<NetworkPlan> {
        &self.plan
    }

    /// What makes it of what somebody holds, each with its size.
    fn since(&self, have: Option<&Digest>) -> Vec<(Arc<NetworkChange>, usize)> {
        if have == Some(&self.digest) {
            return Vec::new();
        }
        // The same plan may have been there more than once: the shortest way is from its last time.
        match have.and_then(|have| self.steps.iter().rposition(|s| s.from == *have)) {
            Some(at) => self.steps.range(at..).map(|s| (s.change.clone(), s.bytes)).collect(),
            None => self.anew.get_or_init(|| Parts::of(self)).clone(),
        }
    }
}

/// A network from nothing, in changes of which each fits a message.
struct Parts<'a> {
    plan: &'a NetworkPlan,
    done: Vec<(Arc<NetworkChange>, usize)>,
    now: NetworkChange,
    bytes: usize,
}

impl<'a> Parts<'a> {
    fn of(version: &'a NetworkVersion) -> Vec<(Arc<NetworkChange>, usize)> {
        let plan = &*version.plan;
        let now = NetworkChange { anew: true, ..NetworkChange::nothing(plan) };
        let mut parts = Self { plan, done: Vec::new(), bytes: digest_of(&now).1, now };
        parts.put(|c| &mut c.subnets, &plan.subnets);
        parts.put(|c| &mut c.groups, &plan.groups);
        parts.put(|c| &mut c.route_tables, &plan.route_tables);
        parts.put(|c| &mut c.peerings, &plan.peerings);
        parts.put(|c| &mut c.nats, &plan.nats);
        parts.put(|c| &mut c.floating, &plan.floating);
        parts.put(|c| &mut c.balancers, &plan.balancers);
        parts.put(|c| &mut c.nics, &plan.nics);
        for (n, zone) in plan.zones.iter().enumerate() {
            parts.put(|c| &mut c.zones[n].records, &zone.records);
        }
        parts.now.digest = Some(version.digest);
        parts.next();
        parts.done
    }

    fn next(&mut self) {
        let full = std::mem::replace(&mut self.now, NetworkChange::nothing(self.plan));
        self.done.push((Arc::new(full), self.bytes));
        self.bytes = 0;
    }

    fn put<T: Clone + Serialize>(&mut self, list: impl Fn(&mut NetworkChange) -> &mut Vec<Edit<T>>, all: &[T]) {
        for (n, item) in (0..).zip(all) {
            let size = digest_of(item).1;
            if self.bytes + size > PART && self.bytes > 0 {
                self.next();
            }
            self.bytes += size + 1;
            let edits = list(&mut self.now);
            if edits.is_empty() && n > 0 {
                edits.push(Edit::Keep(n));
            }
            super::step(edits, Edit::Put(vec![item.clone()]));
        }
    }
}

/// What one host is to have now.
#[derive(Debug)]
pub struct HostVersions {
    whole: HostNetworks,
    /// Of its networks, in their order.
    versions: Vec<Arc<NetworkVersion>>,
}

impl HostVersions {
    /// `head` is all but the networks.
    pub fn new(head: HostNetworks, mut versions: Vec<Arc<NetworkVersion>>) -> Self {
        versions.sort_by_key(|v| v.plan.uid);
        let networks = versions.iter().map(|v| v.plan.clone()).collect();
        Self { whole: HostNetworks { networks, ..head }, versions }
    }

    /// Whether it says the same, of whatever revision.
    pub fn says_the_same(&self, other: &Self) -> bool {
        let (a, b) = (&self.whole, &other.whole);
        let digests = |of: &Self| of.versions.iter().map(|v| (v.plan.uid, v.digest)).collect::<Vec<_>>();
        digests(self) == digests(other) && (&a.tunnels, a.endpoint, a.version) == (&b.tunnels, b.endpoint, b.version)
    }

    pub fn whole(&self) -> &HostNetworks {
        &self.whole
    }
}

impl Deref for HostVersions {
    type Target = HostNetworks;

    fn deref(&self) -> &HostNetworks {
        &self.whole
    }
}

/// What is sent to one agent, for as long as its request stands.
#[derive(Debug)]
pub struct Teller {
    known: Option<u64>,
    have: Option<BTreeMap<Uid, Digest>>,
    /// Once they were sent.
    tunnels: Option<Vec<IpAddr>>,
}

impl Teller {
    pub fn new(request: NetworksRequest) -> Self {
        Self { known: request.known, have: request.have, tunnels: None }
    }

    /// What the agent is to be sent now; nothing, if it has it or newer.
    pub fn tell(&mut self, told: &HostVersions) -> VecDeque<NetworksMessage> {
        let whole = &told.whole;
        let now: BTreeMap<Uid, Digest> = told.versions.iter().map(|v| (v.plan.uid, v.digest)).collect();
        // An agent of another release may have kept less of the same revision.
        let differs = self.have.as_ref().is_some_and(|have| *have != now);
        if self.known.is_some_and(|known| whole.revision < known || (whole.revision == known && !differs)) {
            return VecDeque::new();
        }
        self.known = Some(whole.revision);
        let message = |tunnels: &[IpAddr], networks: &[Arc<NetworkPlan>], news| NetworksMessage {
            version: whole.version,
            host: whole.host.clone(),
            revision: whole.revision,
            endpoint: whole.endpoint,
            tunnels: tunnels.to_vec(),
            networks: networks.to_vec(),
            news,
        };
        let Some(have) = &mut self.have else {
            return [message(&whole.tunnels, &whole.networks, None)].into();
        };
        let changes = told.versions.iter().flat_map(|v| v.since(have.get(&v.plan.uid)));
        let mut packs = vec![Vec::new()];
        let mut sum = 0;
        for (change, bytes) in changes {
            if sum + bytes > PART && sum > 0 {
                packs.push(Vec::new());
                sum = 0;
            }
            sum += bytes;
            packs.last_mut().expect("there is always one").push(change);
        }
        let same_tunnels = self.tunnels.as_ref() == Some(&whole.tunnels);
        let digest = digest_of_all(whole.endpoint, &whole.tunnels, now.iter());
        let mut gone: Vec<Uid> = have.keys().filter(|uid| !now.contains_key(uid)).copied().collect();
        let last = packs.len() - 1;
        let messages = packs.into_iter().enumerate().map(|(n, changes)| {
            let news = News { more: n < last, same_tunnels, gone: std::mem::take(&mut gone), changes, digest };
            message(if same_tunnels { &[] } else { &whole.tunnels }, &[], Some(news))
        });
        let messages = messages.collect();
        *have = now;
        self.tunnels = Some(whole.tunnels.clone());
        messages
    }
}

impl NetworkVersion {
    /// Of its plan as JSON.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}
