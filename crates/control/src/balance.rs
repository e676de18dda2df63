//! Which targets of load balancers get no new connections, by what hosts say.
//!
//! Every host asks targets by itself and reports those that fail, when that changes and every few seconds. Nothing of it is committed
//! but what it comes to: how many of a balancer's targets are out, where and why. A host that says nothing for [`FRESH`] says nothing
//! any more; a new leader waits for as long before it takes anything back that its predecessor wrote.
//!
//! Balancers are looked at in turn, so that one whose targets come and go costs a write a second at most.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Bound;
use std::time::Duration;

use nexus_model::kind::{
    Balanced, BalancerListener, Instance, LoadBalancer, LoadBalancerStatus, MAX_OUT, Nic, TargetOut, TargetTrouble,
};
use nexus_model::object::{ConditionStatus, set_condition};
use nexus_model::plan::{BalancedProtocol, FailingTarget, MAX_FAILING, MAX_FAILING_WHY};
use nexus_model::{Name, Object, Uid};

use crate::step::Step;
use crate::world::{Place, World};

/// So long a host's word counts. Hosts repeat theirs every 5 s.
pub const FRESH: Duration = Duration::from_secs(16);
/// Between two looks, and how many balancers are looked at each time.
const EVERY: Duration = Duration::from_secs(1);
const AT_ONCE: usize = 100;
/// Hosts whose word is kept.
const HOSTS: usize = 65_536;

/// A target of a listener of a balancer.
type Key = (Uid, u16, BalancedProtocol, SocketAddr);

#[derive(Debug)]
struct Said {
    at: Duration,
    failing: Vec<FailingTarget>,
}

/// What this leader has heard.
#[derive(Debug, Default)]
pub struct Balance {
    since: Option<Duration>,
    looked: Duration,
    /// The balancer that was looked at last.
    last: Option<Place>,
    said: BTreeMap<Name, Said>,
    /// Who says of a target that it fails, and why.
    failing: BTreeMap<Key, BTreeMap<Name, String>>,
}

fn key(target: &FailingTarget) -> Key {
    (target.balancer, target.port, target.protocol, target.target)
}

impl Balance {
    /// Takes in all that fails at a host.
    pub fn hear(&mut self, host: &Name, failing: &[FailingTarget], now: Duration) {
        if let Some(said) = self.said.get_mut(host)
            && said.failing == failing
        {
            said.at = now;
            return;
        }
        self.forget(host);
        if self.said.len() >= HOSTS {
            return;
        }
        let mut failing = failing.to_vec();
        failing.truncate(MAX_FAILING);
        for target in &mut failing {
            target.why.truncate(target.why.floor_char_boundary(MAX_FAILING_WHY));
            self.failing.entry(key(target)).or_default().insert(host.clone(), target.why.clone());
        }
        self.said.insert(host.clone(), Said { at: now, failing });
    }

    fn forget(&mut self, host: &Name) {
        for target in self.said.remove(host).into_iter().flat_map(|said| said.failing) {
            let key = key(&target);
            if let Some(hosts) = self.failing.get_mut(&key) {
                hosts.remove(host);
                if hosts.is_empty() {
                    self.failing.remove(&key);
                }
            }
        }
    }

    /// Looks at the next balancers and writes down what has changed. Called a few times a second.
    pub fn look(&mut self, step: &mut Step<'_>, now: Duration) {
        let since = *self.since.get_or_insert(now);
        if now.saturating_sub(self.looked) < EVERY {
            return;
        }
        self.looked = now;
        let silent = self.said.iter().filter(|(_, said)| now.saturating_sub(said.at) > FRESH);
        let silent: Vec<Name> = silent.map(|(host, _)| host.clone()).collect();
        silent.iter().for_each(|host| self.forget(host));
        let all = &step.world.load_balancers.live;
        let from = self.last.clone().map_or(Bound::Unbounded, Bound::Excluded);
        let next: Vec<Object<LoadBalancer>> =
            all.range((from, Bound::Unbounded)).take(AT_ONCE).map(|(_, b)| b.clone()).collect();
        let full = next.len() == AT_ONCE;
        for balancer in next {
            if step.is_long() {
                return;
            }
            self.last = Some((balancer.metadata.project.clone(), balancer.metadata.name.clone()));
            let mut status = balancer.status.clone();
            self.judge(step.world, &balancer, &mut status);
            // At first not every host has spoken yet: then what was said before is not taken back.
            let voices = |s: &LoadBalancerStatus| s.out.iter().map(|o| u64::from(o.hosts)).sum::<u64>();
            let knows = now.saturating_sub(since) >= FRESH || voices(&status) >= voices(&balancer.status);
            let (kind, truth, reason, message) = condition(&status);
            set_condition(&mut status.conditions, kind, truth, reason, &message, step.now);
            if knows && status != balancer.status {
                step.put(Object::<LoadBalancer> { status, ..balancer });
            }
        }
        self.last = self.last.take().filter(|_| full);
    }

    /// Counts a balancer's targets and finds those that are out.
    fn judge(&self, world: &World, balancer: &Object<LoadBalancer>, status: &mut LoadBalancerStatus) {
        let (mut all, mut bad, mut out) = (BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        for listener in &balancer.spec.listeners {
            for (at, instance) in targets(world, balancer, listener) {
                all.insert(at.ip());
                let its = TargetOut {
                    port: listener.port,
                    protocol: listener.protocol,
                    address: at.ip(),
                    target_port: at.port(),
                    instance: instance.map(|i| i.metadata.name.clone()),
                    reason: TargetTrouble::NotReady,
                    message: "its instance is not ready".to_owned(),
                    hosts: 0,
                };
                let found = self.failing.get(&(balancer.metadata.uid, listener.port, listener.protocol, at));
                let its = if !instance.is_some_and(|i| i.status.ready && i.metadata.deleting.is_none()) {
                    its
                } else if let Some((hosts, (_, why))) = found.and_then(|hosts| Some((hosts, hosts.first_key_value()?)))
                {
                    let hosts = u32::try_from(hosts.len()).unwrap_or(u32::MAX);
                    TargetOut { reason: TargetTrouble::Failing, message: why.clone(), hosts, ..its }
                } else {
                    continue;
                };
                bad.insert(at.ip());
                out.insert((its.port, its.protocol, at), its);
            }
        }
        let count = |n: usize| Some(u32::try_from(n).unwrap_or(u32::MAX));
        (status.targets, status.healthy_targets) = (count(all.len()), count(all.len() - bad.len()));
        status.out = out.into_values().take(MAX_OUT).collect();
    }
}

/// What there is to say of all targets together.
fn condition(status: &LoadBalancerStatus) -> (&'static str, ConditionStatus, &'static str, String) {
    let (all, healthy) = (status.targets.unwrap_or(0), status.healthy_targets.unwrap_or(0));
    let (truth, reason, message) = match (all, healthy) {
        (0, _) => {
            (ConditionStatus::False, "NoTargets", "it has no target: start an instance of its targets".to_owned())
        }
        (all, healthy) if all == healthy => {
            (ConditionStatus::True, "AllIn", format!("all of {all} take new connections"))
        }
        (all, healthy) => {
            let first = status.out.first().map_or_else(String::new, |o| {
                let at = SocketAddr::new(o.address, o.target_port);
                let hosts = if o.hosts == 1 { "1 host says".to_owned() } else { format!("{} hosts say", o.hosts) };
                match o.reason {
                    TargetTrouble::NotReady => format!(": {at}: {}", o.message),
                    TargetTrouble::Failing => format!(": {at}, as {hosts}: {}", o.message),
                }
            });
            (ConditionStatus::False, "SomeOut", format!("{} of {all} are out{first}", all - healthy))
        }
    };
    ("TargetsIn", truth, reason, message)
}

/// Where a listener leads, ready or not: what a host is told, and those beside it that it is not told as they are not ready.
fn targets<'a>(
    world: &'a World,
    balancer: &Object<LoadBalancer>,
    listener: &BalancerListener,
) -> Vec<(SocketAddr, Option<&'a Object<Instance>>)> {
    let (Some(project), Some(network)) = (&balancer.metadata.project, &balancer.status.network) else {
        return Vec::new();
    };
    let four = balancer.status.address4.is_some();
    let of_network = |nic: &&Object<Nic>| {
        nic.status.network.as_ref().is_some_and(|n| n.uid == network.uid) && nic.metadata.deleting.is_none()
    };
    let address = |nic: &Object<Nic>| match four {
        true => nic.status.address4.map(IpAddr::from),
        false => nic.status.address6.map(IpAddr::from),
    };
    let mut found = Vec::new();
    for target in &listener.targets {
        let port = target.port.unwrap_or(listener.port);
        let nics: Vec<&Object<Nic>> = match &target.to {
            Balanced::Nic(name) => world.nics.get(Some(project), name).into_iter().filter(of_network).collect(),
            Balanced::App(name) => {
                let app = world.apps.get(Some(project), name);
                let instances = app.into_iter().flat_map(|app| world.instances_of(app.metadata.uid));
                let instances = instances.filter(|i| i.metadata.deleting.is_none());
                instances.filter_map(|i| world.nics_of(i.metadata.uid).into_iter().find(of_network)).collect()
            }
        };
        found.extend(nics.into_iter().filter_map(|nic| {
            let instance = nic.status.instance.and_then(|uid| world.instance(uid));
            Some((SocketAddr::new(address(nic)?, port), instance))
        }));
    }
    found
}
