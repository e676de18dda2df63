//! What must be true of a region: in every revision of its history, and at the end when nothing is broken any more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use nexus_control::world::World as Rows;
use nexus_model::kind::{Host as HostKind, HostState, Instance, InstanceStatus};
use nexus_model::plan::RoutingTable;
use nexus_model::{Name, Object, key};
use nexus_store::WatchEvent;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::gateways::{self, Gateway, Said};
use crate::hosts::{self, Host};
use crate::nics::Nics;
use crate::recorder::Log;
use crate::region::name;
use crate::site::Site;
use crate::trace::Trace;
use crate::users::PROJECT;
use crate::world::World;

/// After the last fault, everything is as users want it within this.
const CONVERGES_WITHIN: Duration = Duration::from_secs(60);

/// What a placed instance holds of its host.
#[derive(Debug, Clone)]
struct Placed {
    host: Name,
    epoch: u64,
    slot: Option<u16>,
    cpu: u64,
    memory: u64,
    nodes: Vec<u16>,
}

#[derive(Debug, Clone, Default)]
struct Writer {
    epoch: u64,
    claim: String,
    next: u64,
}

impl Writer {
    /// `epoch=E node=N claim=C next=I`
    fn parse(value: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(value).into_owned();
        let field = |name: &str| text.split(' ').find_map(|w| w.strip_prefix(name)).map(str::to_owned);
        Some(Self {
            epoch: field("epoch=")?.parse().ok()?,
            claim: field("claim=")?,
            next: field("next=")?.parse().ok()?,
        })
    }
}

/// Goes through every revision: writers take turns, hosts are never oversold, an instance has one host, and a host's fence
/// grows with every death.
pub fn history(log: &Log, trace: &Trace) {
    let mut writer: Option<Writer> = None;
    let mut hosts: BTreeMap<Name, Object<HostKind>> = BTreeMap::new();
    // By the key of its row: an instance that is deleted has two rows in one revision.
    let mut rows: BTreeMap<String, (String, Placed)> = BTreeMap::new();
    let mut first_host: BTreeMap<String, Name> = BTreeMap::new();
    // The highest epoch ever placed on a host before it was last declared dead.
    let mut fenced: BTreeMap<Name, u64> = BTreeMap::new();
    let mut nics = Nics::default();
    for (revision, told) in log {
        let mut touched: BTreeSet<Name> = BTreeSet::new();
        for event in &told.events {
            let key = String::from_utf8_lossy(event.key()).into_owned();
            let value = match event {
                WatchEvent::Put { kv, .. } => Some(&kv.value),
                WatchEvent::Delete { .. } => None,
            };
            nics.take(&key, value.map(|v| &v[..]));
            if key == key::WRITER {
                let Some(now) = value.and_then(|v| Writer::parse(v)) else { continue };
                if let Some(before) = &writer {
                    let follows = now.claim == before.claim && now.next == before.next + 1 && now.epoch == before.epoch;
                    // Whoever is about to lose the lead may still claim: the claim settles who decides, not the lead.
                    let takes_over = now.claim != before.claim && now.next == 0;
                    if takes_over {
                        let late = now.epoch < before.epoch;
                        trace.count(if late { "writers: claims by an older leader" } else { "writers: claims" });
                    }
                    if !follows && !takes_over {
                        let text = format!("revision {revision}: {now:?} after {before:?}");
                        trace.violation("only one writer decides", text);
                    }
                }
                writer = Some(now);
            } else if key.starts_with("o/hosts/") {
                let Some(value) = value else { continue };
                let Ok(host) = Object::<HostKind>::from_slice(value) else { continue };
                let host_name = host.metadata.name.clone();
                if let Some(before) = hosts.get(&host_name) {
                    let dies = host.status.state == HostState::Dead && before.status.state != HostState::Dead;
                    let grows = host.status.epoch > before.status.epoch;
                    if (dies && !grows) || host.status.epoch < before.status.epoch {
                        let (was, is) = (before.status.epoch, host.status.epoch);
                        let text = format!(
                            "revision {revision}: {host_name} goes to {:?}, epoch {was} to {is}",
                            host.status.state
                        );
                        trace.violation("a dead host's fence grows", text);
                    }
                    if dies {
                        let highest = rows.values().filter(|(_, p)| p.host == host_name).map(|(_, p)| p.epoch).max();
                        let entry = fenced.entry(host_name.clone()).or_default();
                        *entry = (*entry).max(highest.unwrap_or(0));
                    }
                }
                touched.insert(host_name.clone());
                hosts.insert(host_name, host);
            } else if key.starts_with("o/instances/") || key.starts_with("t/instances/") {
                let old = rows.remove(&key);
                let Some(instance) = value.and_then(|v| Object::<Instance>::from_slice(v).ok()) else {
                    continue;
                };
                // What has run to its end holds nothing of its host any more.
                let InstanceStatus { host: Some(host), epoch, slot, numa_nodes: nodes, finished: None, .. } =
                    instance.status
                else {
                    continue;
                };
                let uid = instance.metadata.uid.to_string();
                let known = first_host.entry(uid.clone()).or_insert_with(|| host.clone());
                if *known != host {
                    let text = format!("revision {revision}: instance {uid} is on {host}, and was on {known}");
                    trace.violation("an instance is never in two places", text);
                }
                let is_new = old.is_none() && key.starts_with("o/");
                if is_new && fenced.get(&host).is_some_and(|f| epoch <= *f) {
                    let text = format!(
                        "revision {revision}: {uid} on {host} has epoch {epoch}, fenced up to {}",
                        fenced[&host]
                    );
                    trace.violation("what comes after a fence is above it", text);
                }
                let resources = instance.spec.template.parts().reserved();
                let (cpu, memory) = (u64::from(resources.cpu.0), resources.memory.0);
                let single = instance.spec.template.constraints.single_node();
                if single != (nodes.len() == 1) {
                    let text = format!("revision {revision}: {uid} on {host} is kept to {nodes:?}");
                    trace.violation("who wants one node has one", text);
                }
                if !instance.spec.template.nics.is_empty() {
                    trace.count("placed: with NICs");
                }
                trace.count(if single { "placed: on a NUMA node" } else { "placed: anywhere on a host" });
                touched.insert(host.clone());
                rows.insert(key, (uid, Placed { host, epoch, slot, cpu, memory, nodes }));
            }
        }
        nics.judge(*revision, trace);
        for host_name in touched {
            let Some(host) = hosts.get(&host_name) else { continue };
            let mut on_it: BTreeMap<&str, &Placed> = BTreeMap::new();
            for (uid, placed) in rows.values().filter(|(_, p)| p.host == host_name) {
                on_it.insert(uid, placed);
            }
            let (cpu, memory) = on_it.values().fold((0, 0), |(c, m), p| (c + p.cpu, m + p.memory));
            let capacity = &host.spec.capacity;
            if cpu > u64::from(capacity.cpu.0)
                || memory > capacity.memory.0
                || on_it.len() > capacity.instances as usize
            {
                let text = format!(
                    "revision {revision}: {host_name} holds {} instances, {cpu} m, {memory} bytes",
                    on_it.len()
                );
                trace.violation("no host is oversold", text);
            }
            for node in &host.spec.numa_nodes {
                let kept = on_it.values().filter(|p| p.nodes.contains(&node.id));
                let (cpu, memory) = kept.fold((0, 0), |(c, m), p| (c + p.cpu, m + p.memory));
                if cpu > u64::from(node.cpu.0) || memory > node.memory.0 {
                    let text = format!(
                        "revision {revision}: {cpu} m and {memory} bytes on NUMA node {} of {host_name}",
                        node.id
                    );
                    trace.violation("no NUMA node is oversold", text);
                }
            }
            let slots: BTreeSet<_> = on_it.values().map(|p| p.slot).collect();
            if slots.len() != on_it.len() {
                trace.violation("no address is given twice", format!("revision {revision}: on {host_name}: {on_it:?}"));
            }
        }
    }
}

/// Waits until nothing differs from what it should be; says what does.
pub async fn converges(world: &Arc<World>, difference: impl Fn() -> Option<String>) {
    let deadline = Instant::now() + CONVERGES_WITHIN;
    loop {
        match difference() {
            None => {
                world.trace.note("everything is as it should be");
                return;
            }
            Some(why) if Instant::now() >= deadline => {
                let text = format!("not within {CONVERGES_WITHIN:?}: {why}");
                world.trace.violation("the region converges when faults end", text);
                return;
            }
            Some(_) => sleep(Duration::from_millis(200)).await,
        }
    }
}

/// A region with what belongs to it.
pub struct Ground {
    pub site: Site,
    pub hosts: Vec<Arc<Host>>,
    pub gateways: Vec<Arc<Gateway>>,
}

impl Ground {
    /// Makes a region's hosts and gateways, and starts them.
    pub fn lay(world: &Arc<World>, site: &Site, standing: &mut JoinSet<()>) -> Self {
        let (hosts, gateways) = (hosts::hosts(world, site), gateways::gateways(world, site));
        hosts.iter().for_each(|host| drop(standing.spawn(host.clone().run())));
        gateways.iter().for_each(|gateway| drop(standing.spawn(gateway.clone().run())));
        Self { site: site.clone(), hosts, gateways }
    }
}

/// The first thing of a region that is not as it should be. `wanted`: the replicas of the apps of [`PROJECT`].
pub fn difference(world: &World, ground: &Ground, wanted: &BTreeMap<Name, u32>) -> Option<String> {
    let project = name(PROJECT);
    let mut tables = Vec::new();
    for node in &ground.site.nodes {
        let Some(server) = world.server(*node) else { return Some(format!("server {node} is down")) };
        let Some(part) = &server.part else { continue };
        let trouble = part.view.read(|w| {
            let shown: BTreeMap<Name, u32> =
                w.apps.within(&project).map(|a| (a.metadata.name.clone(), a.spec.replicas)).collect();
            if shown != *wanted {
                return Some(format!("server {node} shows apps {shown:?}, wanted are {wanted:?}"));
            }
            if let Some(trouble) = undead(w) {
                return Some(format!("server {node} shows {trouble}"));
            }
            let mut placed: BTreeMap<Name, BTreeMap<_, u64>> = BTreeMap::new();
            for app in w.apps.within(&project) {
                let all: Vec<_> = w.instances_of(app.metadata.uid).collect();
                let ready = all.iter().filter(|i| i.status.ready).count();
                let room = all.iter().filter(|i| i.status.host.is_none()).count();
                let replicas = app.spec.wanted_replicas(&app.status);
                if all.len() != replicas as usize || ready + room != all.len() {
                    let name = &app.metadata.name;
                    return Some(format!("{name} has {} instances, {ready} ready, of {replicas}", all.len(),));
                }
                for i in all {
                    if let Some(host) = &i.status.host {
                        placed.entry(host.clone()).or_default().insert(i.metadata.uid, i.status.epoch);
                    }
                }
            }
            for host in &ground.hosts {
                let should = placed.remove(&host.name).unwrap_or_default();
                if host.running() != should || host.present() != should.len() {
                    return Some(format!("{} runs {:?}, should run {should:?}", host.name, host.running()));
                }
            }
            None
        });
        if trouble.is_some() {
            return trouble;
        }
        tables.push((format!("server {node}"), part.table()));
    }
    tables.extend(ground.gateways.iter().map(|g| (g.name.clone(), g.table())));
    let routes = |table: &Option<Arc<RoutingTable>>| table.as_ref().map(|t| (t.services.clone(), t.routes.clone()));
    let first = tables.first().map(|(_, table)| routes(table));
    let other = tables.iter().find(|(_, table)| Some(routes(table)) != first);
    other.map(|(who, _)| format!("{who} has another routing table"))
}

/// What is deleted and not gone.
pub fn undead(w: &Rows) -> Option<String> {
    let buried = [
        ("organizations", w.organizations.buried.len()),
        ("projects", w.projects.buried.len()),
        ("apps", w.apps.buried.len()),
        ("jobs", w.jobs.buried.len()),
        ("instances", w.instances.buried.len()),
    ];
    buried.iter().find(|(_, n)| *n > 0).map(|(kind, n)| format!("{n} {kind} that are deleted and not gone"))
}

/// Every table that a gateway took named living instances of the right app and project, at its own revision. Of a region
/// without a fleet, where a table's revision is its log's.
pub fn tables(log: &Log, gateways: &[Arc<Gateway>], trace: &Trace) {
    let mut due: BTreeMap<u64, Vec<(String, Said)>> = BTreeMap::new();
    for gateway in gateways {
        for (revision, said) in gateway.taken() {
            due.entry(revision).or_default().push((gateway.name.clone(), said));
        }
    }
    let mut rows: BTreeMap<String, (String, (Name, Name))> = BTreeMap::new();
    for (revision, told) in log {
        for event in &told.events {
            let key = String::from_utf8_lossy(event.key()).into_owned();
            if !key.starts_with("o/instances/") {
                continue;
            }
            rows.remove(&key);
            let WatchEvent::Put { kv, .. } = event else { continue };
            let Ok(instance) = Object::<Instance>::from_slice(&kv.value) else { continue };
            let Some(project) = instance.metadata.project else { continue };
            rows.insert(key, (instance.metadata.uid.to_string(), (project, instance.spec.app)));
        }
        for (gateway, said) in due.remove(revision).into_iter().flatten() {
            let truth: BTreeMap<&String, &(Name, Name)> = rows.values().map(|(uid, what)| (uid, what)).collect();
            for (uid, what) in said {
                let is = truth.get(&uid.to_string());
                if is != Some(&&what) {
                    let text = format!("{gateway}, revision {revision}: {uid} is said to be of {what:?}, is {is:?}");
                    trace.violation("a table says what its revision does", text);
                }
            }
        }
    }
}
