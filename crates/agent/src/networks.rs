//! Tenants' networks on this host: what servers tell of them is kept, given to the engine, and looked after.
//!
//! ```text
//! told ─────────────┐
//! a worker asks ────┼─▶ engine.apply ─▶ which NICs are plugged ─▶ workers
//! a look now and then┤
//! targets that fail ─┘
//! ```
//!
//! An instance with NICs starts when they are plugged and filtered. The kernel forwards and filters without the agent: one that
//! restarts goes on from its disk, and touches nothing that is right.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use nexus_model::Uid;
use nexus_model::plan::{
    CaptureRequest, FlowsRequest, HostFlows, HostNames, HostNetworks, MAX_DIFFERENCES, NetworkCheck, NetworkPlan,
    NicPlan, Trace, TraceRequest, TraceVerdict,
};
use nexus_network::firewall::Net;
use nexus_network::vpc::capture::Capture;
use nexus_network::vpc::health::{self, Failing};
use nexus_network::vpc::verdict::RELAY;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use crate::AgentHandle;
use crate::config::{NetworkEngine, NicAt, Plugged, ProbeOf};
use crate::fabric::{self, Names};
use crate::flows::Flows;
use crate::targets::{self, Kept};

/// Between looks whether somebody has removed something of ours, and at the counters.
const LOOK: Duration = Duration::from_secs(15);
/// Networks change in bursts, as apps roll: one replacement serves many changes.
const GATHER: Duration = Duration::from_millis(20);
/// How long a turn lets functions go first that are being started.
const YIELD: Duration = Duration::from_millis(100);
/// After a failure.
const AGAIN: Duration = Duration::from_secs(1);
/// An instance whose NICs are not plugged for so long can't start.
const PATIENCE: Duration = Duration::from_secs(10);

/// Captures at once.
const CAPTURES: usize = 8;

pub(crate) type Told = watch::Receiver<Option<Arc<HostNetworks>>>;

/// What came of the newest turn.
#[derive(Debug, Clone, Default)]
pub(crate) struct Applied {
    /// The turns that workers asked for before it began.
    turn: u64,
    nics: Plugged,
    /// Why nothing could be done.
    trouble: String,
    /// What nobody in a tenant's network reaches outside.
    closed: Arc<Vec<Net>>,
    /// By which the kernel was programmed last.
    by: Option<Arc<HostNetworks>>,
}

/// The way for workers and callers to this host's networks.
#[derive(Clone)]
pub(crate) struct Networks {
    engine: Arc<dyn NetworkEngine>,
    told: Told,
    asked: watch::Sender<u64>,
    applied: watch::Receiver<Applied>,
    /// Functions that are being started.
    starting: watch::Sender<usize>,
    captures: Arc<Semaphore>,
    flows: Flows,
    /// Targets of balancers that don't answer this host.
    failing: watch::Receiver<Arc<Failing>>,
}

impl Networks {
    /// Begins to keep this host's part of tenants' networks.
    pub async fn start(
        engine: Arc<dyn NetworkEngine>,
        told: Told,
        names: Names,
        flows: Flows,
        kept: Kept,
        handle: &AgentHandle,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let (asked, applied) = (watch::Sender::new(0), watch::Sender::default());
        let found = watch::Sender::new(Arc::new(kept.load().await));
        let networks = Self {
            engine: engine.clone(),
            told,
            asked: asked.clone(),
            applied: applied.subscribe(),
            starting: watch::Sender::new(0),
            captures: Arc::new(Semaphore::new(CAPTURES)),
            flows,
            failing: found.subscribe(),
        };
        handle.has_networks();
        let (told, asked, handle) = (networks.told.clone(), asked.subscribe(), handle.clone());
        let by = watch::Sender::new(None);
        let (serving, follow) = (engine.clone(), by.subscribe());
        tasks.spawn(async move { serving.serve(follow).await });
        tasks.spawn(networks.flows.clone().run(by.subscribe()));
        let failing = found.subscribe();
        tasks.spawn(targets::run(engine.clone(), by.subscribe(), found, kept));
        let starting = networks.starting.subscribe();
        tasks.spawn(Reconciler { engine, told, names, asked, failing, starting, applied, by, handle }.run());
        networks
    }

    /// What was told last.
    pub fn told(&self) -> Told {
        self.told.clone()
    }

    /// Tells when something may have changed about NICs.
    pub fn news(&self) -> watch::Receiver<Applied> {
        self.applied.clone()
    }

    /// Waits until an instance whose namespace is there has its NICs, and their packets are filtered as they should.
    pub async fn ready(&self, instance: Uid, nics: &[Uid]) -> Result<(), String> {
        if nics.is_empty() {
            return Ok(());
        }
        // What was plugged before may have been in a namespace that is gone.
        let mut turn = 0;
        self.asked.send_modify(|asked| {
            *asked += 1;
            turn = *asked;
        });
        let mut applied = self.applied.clone();
        let plugged = |a: &Applied| a.turn >= turn && nics.iter().all(|n| a.nics.plugged.contains(&(*n, instance)));
        match tokio::time::timeout(PATIENCE, applied.wait_for(plugged)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(self.trouble(instance, nics).unwrap_or_else(|| "its NICs are not looked after".to_owned())),
        }
    }

    /// Waits until an instance that runs has its NICs. At once, if they are known to be plugged.
    pub async fn plugged(&self, instance: Uid, nics: &[Uid]) -> Result<(), String> {
        let there = nics.iter().all(|nic| self.applied.borrow().nics.plugged.contains(&(*nic, instance)));
        if there { Ok(()) } else { self.ready(instance, nics).await }
    }

    /// Has turns wait for a moment, as long as this is held: what wakes waits for no NIC, and should not share the processors with one.
    pub fn hold(&self) -> Hold {
        self.starting.send_modify(|starting| *starting += 1);
        Hold(self.starting.clone())
    }

    /// Has the NICs of an instance plugged whose namespace has just been made, and does not wait for it.
    pub fn plug(&self) {
        self.asked.send_modify(|asked| *asked += 1);
    }

    /// Why an instance has not all of its NICs, if it has not: of those that it was made with, and those that were given to it since.
    pub fn trouble(&self, instance: Uid, nics: &[Uid]) -> Option<String> {
        let (applied, told) = (self.applied.borrow(), self.told.borrow());
        let given = told.iter().flat_map(|told| here(told)).filter(|(_, at)| at.1 == instance).map(|(_, at)| at.0);
        let mut all = nics.iter().copied().chain(given);
        let missing = all.find(|nic| !applied.nics.plugged.contains(&(*nic, instance)))?;
        let known = told.as_ref().and_then(|t| find(t, missing));
        let name = known.map_or_else(|| missing.to_string(), |(_, nic)| nic.name.to_string());
        let of_network = known.and_then(|(network, _)| applied.nics.networks.get(&network.uid));
        let why = match applied.nics.troubles.get(&missing).or(of_network) {
            Some(why) => why.clone(),
            None if !applied.trouble.is_empty() => applied.trouble.clone(),
            None if known.is_none() => "the servers have not told this host of it yet".to_owned(),
            None => "that has not been done yet".to_owned(),
        };
        Some(format!("its NIC {name} is not plugged in: {why}"))
    }

    /// The same, but for what has only not been done yet.
    pub fn failure(&self, instance: Uid, nics: &[Uid]) -> Option<String> {
        let failed = {
            let applied = self.applied.borrow();
            !applied.trouble.is_empty() || nics.iter().any(|nic| applied.nics.troubles.contains_key(nic))
        };
        if failed { self.trouble(instance, nics) } else { None }
    }

    /// What becomes of a packet that a NIC of this host sends, by what the kernel is programmed by; with a probe, sent in truth.
    pub async fn trace(&self, request: &TraceRequest) -> Result<Trace, String> {
        let by = self.by()?;
        let closed = self.applied.borrow().closed.clone();
        let (_, nic) = find(&by, request.nic).ok_or_else(|| not_here(request.nic))?;
        let here = nic.at.as_ref().filter(|at| at.host == by.host).ok_or_else(|| not_here(request.nic))?;
        let traced = self.engine.trace(by.clone(), closed, request.nic, request.packet).await;
        let mut trace = traced.map_err(|e| e.to_string())?;
        if request.probe {
            let to = request.packet.to;
            let own: Option<IpAddr> = match to {
                IpAddr::V4(_) => nic.address4.map(IpAddr::V4),
                IpAddr::V6(_) => nic.address6.map(IpAddr::V6),
            };
            let from = own.ok_or_else(|| format!("NIC {} has no address of the family of {to}", nic.name))?;
            let probe = ProbeOf { instance: here.instance, index: here.index, from, packet: request.packet };
            let answered = self.engine.probe(probe).await.map_err(|e| e.to_string())?;
            let relayed = trace.hops.iter().any(|hop| hop.at == RELAY);
            trace.probed = match (answered, trace.verdict) {
                // Who answers is the relay, and not the target.
                _ if relayed => None,
                // What is outside may be silent for reasons of its own.
                (Some(false), TraceVerdict::Outside) => None,
                (answered, _) => answered,
            };
        }
        Ok(trace)
    }

    /// Compares what should be with what is.
    pub async fn check(&self) -> Result<NetworkCheck, String> {
        let told = self.told.borrow().clone();
        let Some(told) = told else { return Ok(NetworkCheck::default()) };
        let applied = self.applied.borrow().clone();
        let closed = applied.closed.clone();
        let failing = self.failing.borrow().clone();
        let found = self.engine.check(health::marked(&told, &failing), closed).await.map_err(|e| e.to_string())?;
        let mut differences: Vec<String> = found.into_iter().map(|difference| difference.what).collect();
        if !applied.trouble.is_empty() {
            differences.push(format!("nothing newer can be set: {}", applied.trouble));
        }
        differences.extend(applied.nics.troubles.iter().map(|(nic, why)| match find(&told, *nic) {
            Some((network, nic)) => format!("NIC {}/{}: {why}", network.project, nic.name),
            None => format!("NIC {nic}: {why}"),
        }));
        differences.extend(applied.nics.networks.iter().map(|(uid, why)| {
            match told.networks.iter().find(|n| n.uid == *uid) {
                Some(network) => format!("network {}/{}: {why}", network.project, network.name),
                None => format!("network {uid}: {why}"),
            }
        }));
        differences.truncate(MAX_DIFFERENCES);
        Ok(NetworkCheck {
            revision: Some(told.revision),
            networks: told.networks.len() as u64,
            nics: here(&told).count() as u64,
            differences,
            failing: health::sentences(&told, &failing).into_iter().take(MAX_DIFFERENCES).collect(),
        })
    }

    /// What was noted of a network's packets here.
    pub async fn flows(&self, request: &FlowsRequest) -> Result<HostFlows, String> {
        self.flows.read(request).await
    }

    /// What passes a NIC of this host, from now on.
    pub async fn capture(&self, request: &CaptureRequest) -> Result<Capturing, String> {
        let by = self.by()?;
        let permit = self.captures.clone().try_acquire_owned();
        let permit = permit.map_err(|_| format!("{CAPTURES} captures go on at this host already: end one of them"))?;
        let (network, nic) = find(&by, request.nic).ok_or_else(|| not_here(request.nic))?;
        if nic.at.as_ref().is_none_or(|at| at.host != by.host) {
            return Err(not_here(request.nic));
        }
        let capture = self.engine.capture(network.uid, request).await.map_err(|e| e.to_string())?;
        Ok(Capturing { capture, _permit: permit })
    }

    fn by(&self) -> Result<Arc<HostNetworks>, String> {
        self.applied.borrow().by.clone().ok_or_else(|| "this host's networks have not been set yet".to_owned())
    }
}

/// See [`Networks::hold`].
pub(crate) struct Hold(watch::Sender<usize>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.send_modify(|starting| *starting -= 1);
    }
}

/// One of the captures that may go on at once.
pub(crate) struct Capturing {
    capture: Capture,
    _permit: OwnedSemaphorePermit,
}

impl Capturing {
    pub async fn next(&mut self) -> std::io::Result<Vec<u8>> {
        self.capture.next().await
    }
}

fn not_here(nic: Uid) -> String {
    format!("NIC {nic} is not on this host")
}

fn find(told: &HostNetworks, nic: Uid) -> Option<(&NetworkPlan, &NicPlan)> {
    let of = |n: &'_ Arc<NetworkPlan>| n.nics.binary_search_by_key(&nic, |n| n.uid).ok();
    told.networks.iter().find_map(|n| of(n).map(|at| (&**n, &n.nics[at])))
}

/// The NICs of this host's instances.
fn here(told: &HostNetworks) -> impl Iterator<Item = (&NetworkPlan, NicAt)> {
    told.networks.iter().flat_map(move |network| {
        network.nics.iter().filter_map(move |nic| {
            let at = nic.at.as_ref().filter(|at| at.host == told.host)?;
            Some((&**network, (nic.uid, at.instance)))
        })
    })
}

/// Infrastructure, and what all hosts give instances addresses from: no tenant's network leads there.
fn closed(names: Option<&HostNames>) -> Vec<Net> {
    names.iter().flat_map(|n| n.instances.iter().chain(&n.infrastructure)).map(fabric::net).collect()
}

fn closed_is(now: &[Net], names: Option<&HostNames>) -> bool {
    closed(names) == now
}

/// Keeps the kernel at what was told.
struct Reconciler {
    engine: Arc<dyn NetworkEngine>,
    told: Told,
    names: Names,
    asked: watch::Receiver<u64>,
    failing: watch::Receiver<Arc<Failing>>,
    starting: watch::Receiver<usize>,
    applied: watch::Sender<Applied>,
    /// What the kernel was brought to last.
    by: watch::Sender<Option<Arc<HostNetworks>>>,
    handle: AgentHandle,
}

impl Reconciler {
    /// Runs until it is dropped.
    async fn run(mut self) {
        loop {
            let turn = *self.asked.borrow_and_update();
            let failing = self.failing.borrow_and_update().clone();
            let told = self.told.borrow_and_update().as_ref().map(|told| health::marked(told, &failing));
            if let Some(told) = &told {
                self.handle.targets_fail(health::told_of(told, &failing));
            }
            let closed = Arc::new(closed(self.names.borrow_and_update().as_deref()));
            // As long as nothing was told, what an agent before this one has set stays.
            let done = match &told {
                None => true,
                Some(told) => self.turn(turn, told, &closed).await,
            };
            let wait = if done { LOOK } else { AGAIN };
            loop {
                tokio::select! {
                    biased;
                    changed = self.told.changed() => match changed {
                        Ok(()) => tokio::time::sleep(GATHER).await,
                        Err(_) => return,
                    },
                    changed = self.failing.changed() => if changed.is_err() { return },
                    changed = self.asked.changed() => if changed.is_err() { return },
                    // Names change all the time, and this of them hardly ever.
                    () = fabric::changed(&mut self.names) => {
                        if closed_is(&closed, self.names.borrow_and_update().as_deref()) {
                            continue;
                        }
                    }
                    () = tokio::time::sleep(wait) => {
                        if done && self.stands(told.as_ref(), &closed).await {
                            continue;
                        }
                    }
                }
                break;
            }
            drop(tokio::time::timeout(YIELD, self.starting.wait_for(|starting| *starting == 0)).await);
        }
    }

    /// One turn; answers whether all is as it should be.
    async fn turn(&mut self, turn: u64, told: &Arc<HostNetworks>, closed: &Arc<Vec<Net>>) -> bool {
        let result = if told.networks.is_empty() {
            // A host that is left behind keeps nothing of ours.
            self.engine.remove().await.map(|()| Plugged::default())
        } else {
            self.engine.apply(told.clone(), closed.clone()).await
        };
        match result {
            Ok(nics) => {
                let (whole, done) = (nics.networks.is_empty(), nics.troubles.is_empty());
                for (of, why) in nics.troubles.iter().chain(&nics.networks) {
                    tracing::warn!(%of, why, "a part of tenants' networks can't be set");
                }
                let (by, closed) = (Some(told.clone()), closed.clone());
                self.applied.send_replace(Applied { turn, nics, trouble: String::new(), by, closed });
                self.by.send_replace(Some(told.clone()));
                // A NIC that can't be plugged in keeps nothing that another may need.
                if whole {
                    self.handle.networks_applied(told.revision);
                }
                self.count(told).await;
                whole && done
            }
            Err(error) => {
                tracing::error!(%error, "tenants' networks can't be set: what was set before stays");
                self.applied.send_modify(|a| a.trouble = error.to_string());
                false
            }
        }
    }

    /// Whether nobody has taken away what was set.
    async fn stands(&self, told: Option<&Arc<HostNetworks>>, closed: &Arc<Vec<Net>>) -> bool {
        let Some(told) = told.filter(|t| !t.networks.is_empty()) else { return true };
        self.count(told).await;
        match self.engine.check(told.clone(), closed.clone()).await {
            Ok(mut differences) => {
                differences.retain(|difference| difference.mends);
                if let Some(first) = differences.first() {
                    let count = differences.len();
                    tracing::warn!(
                        first = first.what,
                        count,
                        "somebody has changed tenants' networks on this host; they are set again"
                    );
                }
                differences.is_empty()
            }
            Err(error) => {
                tracing::warn!(%error, "whether tenants' networks stand can't be seen");
                true
            }
        }
    }

    /// Takes the counters of what was dropped over, for metrics.
    async fn count(&self, told: &Arc<HostNetworks>) {
        match self.engine.drops(told.clone()).await {
            Ok(drops) => {
                // The host's own table tells no networks apart: its counters have no names of one.
                let name = |uid: Option<Uid>| {
                    let Some(uid) = uid else { return Some(Default::default()) };
                    let network = told.networks.iter().find(|n| n.uid == uid)?;
                    Some((network.project.to_string(), network.name.to_string()))
                };
                let drops: BTreeMap<_, _> = drops
                    .into_iter()
                    .filter_map(|(network, reason, packets)| {
                        let (project, network) = name(network)?;
                        Some(((project, network, reason), packets))
                    })
                    .collect();
                let nics: BTreeSet<NicAt> = here(told).map(|(_, at)| at).collect();
                self.handle.drops_packets(nics.len(), drops);
            }
            Err(error) => tracing::debug!(%error, "what was dropped can't be counted"),
        }
    }
}

#[cfg(test)]
#[path = "networks_tests.rs"]
mod tests;
