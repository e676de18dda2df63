//! What a host's instances reach and which names they are told: made from the plan, which says who is here, and from what
//! servers tell of the projects that are, which is kept on disk.
//!
//! ```text
//! plan ─────┐                       ┌─▶ packet filter   replaced whole whenever it differs
//!           ├─▶ rules, directory ───┤
//! names ────┘   (pure)              └─▶ resolver        looks at the newest
//! ```
//!
//! An instance starts when the packet filter knows it: never before, so that it is never open, and at once after. What the
//! kernel holds outlives the agent; the names that a restarted agent answers are those on disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nexus_env::{Disk, Env, RngExt as _, on_disk, write_atomic};
use nexus_model::kind::EgressMode;
use nexus_model::plan::{HostNames, HostPlan, InstancePlan, PLAN_VERSION, PlanRequest, method};
use nexus_model::{Cidr, Name, Uid};
use nexus_network::firewall::{Firewall, Guest, Net, Rules, Tenant};
use nexus_network::names::serve::Resolver;
use nexus_network::names::{Directory, Named, Project};
use nexus_network::{InstanceAddress, NetnsRef};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::AgentConfig;
use crate::servers::Servers;

const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);
/// Between looks whether somebody has flushed our rules with all others.
const LOOK: Duration = Duration::from_secs(15);
/// Names change in bursts, as apps roll: one replacement serves many changes.
const GATHER: Duration = Duration::from_millis(20);
/// An instance that the packet filter does not come to know for so long can't start.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where the host's own resolvers are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";

type Plans = watch::Receiver<Option<Arc<HostPlan>>>;
type Names = watch::Receiver<Option<Arc<HostNames>>>;

/// Which instances the packet filter knows, or why it can't be set.
#[derive(Debug, Clone, Default)]
struct Applied {
    known: BTreeSet<Uid>,
    trouble: String,
}

/// The way for workers to wait for the packet filter.
#[derive(Clone)]
pub(crate) struct Fabric {
    applied: watch::Receiver<Applied>,
}

impl Fabric {
    /// Begins to keep the host's packet filter and to answer names.
    pub async fn start(
        firewall: Firewall,
        env: &Env,
        config: &AgentConfig,
        servers: Arc<Servers>,
        plans: Plans,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let host = config.name.clone();
        let cache = Cache { disk: env.disk.clone(), path: config.data_dir.join("names.json") };
        let names = watch::Sender::new(cache.load(&host).await.map(Arc::new));
        let directory = watch::Sender::default();
        let rng = env.rng.clone();
        let below = Arc::new(move |n: usize| rng.below(n.max(1) as u64) as usize);
        let resolver = Resolver::new(NetnsRef::Own, RESOLV_CONF, directory.subscribe(), below);
        config.handle.answers_names(resolver.counts.clone());
        let applied = watch::Sender::default();
        let fabric = Self { applied: applied.subscribe() };
        tasks.spawn(reconcile(firewall, plans, names.subscribe(), directory, applied));
        tasks.spawn(resolver.run());
        tasks.spawn(pull(host, servers, cache, names));
        fabric
    }

    /// Waits until packets of an instance are filtered as they should.
    pub async fn guards(&self, instance: Uid) -> Result<(), String> {
        let mut applied = self.applied.clone();
        let known = applied.wait_for(|applied| applied.known.contains(&instance));
        match tokio::time::timeout(PATIENCE, known).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(match self.applied.borrow().trouble.as_str() {
                "" => "the host's packet filter does not know it yet".to_owned(),
                trouble => format!("the host's packet filter can't be set: {trouble}"),
            }),
        }
    }
}

/// What servers told, on disk.
#[derive(Clone)]
struct Cache {
    disk: Arc<dyn Disk>,
    path: PathBuf,
}

impl Cache {
    /// What was kept; nothing, if there is none or it can't be used: the servers have it.
    async fn load(&self, host: &Name) -> Option<HostNames> {
        let cache = self.clone();
        let read = on_disk(&self.disk, move || {
            if cache.disk.exists(&cache.path)? { cache.disk.read(&cache.path) } else { Ok(Vec::new()) }
        });
        let text = match read.await.and_then(|r| r) {
            Ok(text) if text.is_empty() => return None,
            Ok(text) => text,
            Err(error) => {
                tracing::warn!(%host, %error, "the kept names can't be read");
                return None;
            }
        };
        match serde_json::from_slice::<HostNames>(&text) {
            Ok(names) if names.version <= PLAN_VERSION => Some(names),
            Ok(names) => {
                tracing::warn!(%host, version = names.version, "the kept names are a newer agent's");
                None
            }
            Err(error) => {
                tracing::warn!(%host, %error, "the kept names are damaged");
                None
            }
        }
    }

    async fn save(&self, names: &HostNames) {
        let saved = async {
            let (cache, text) = (self.clone(), serde_json::to_vec(names)?);
            on_disk(&self.disk, move || write_atomic(&*cache.disk, &cache.path, &text)).await?
        };
        if let Err(error) = saved.await {
            tracing::warn!(%error, "names can't be kept on disk: a restart without servers would answer older ones");
        }
    }
}

/// Follows what is told of this host's projects, from server to server. Runs until it is dropped.
async fn pull(host: Name, servers: Arc<Servers>, cache: Cache, names: watch::Sender<Option<Arc<HostNames>>>) {
    let mut turn = servers.start();
    let mut failures = 0;
    loop {
        if let Some(endpoint) = servers.nth(turn) {
            let known = names.borrow().as_ref().map(|n| n.revision);
            let request = PlanRequest { host: host.clone(), known };
            match servers.client(&endpoint).stream::<_, HostNames>(method::NAMES, &request).await {
                Ok(mut stream) => {
                    while let Some(Ok(told)) = stream.next().await {
                        failures = 0;
                        take(told, &cache, &names).await;
                    }
                }
                Err(error) => tracing::debug!(server = %endpoint, %error, "no names from this server"),
            }
        }
        turn = turn.wrapping_add(1);
        servers.pause(failures, RETRY_FIRST, RETRY_MAX).await;
        failures = failures.saturating_add(1);
    }
}

async fn take(told: HostNames, cache: &Cache, names: &watch::Sender<Option<Arc<HostNames>>>) {
    if told.version > PLAN_VERSION {
        tracing::error!(version = told.version, "names of this version need a newer agent");
        return;
    }
    if names.borrow().as_ref().is_some_and(|held| told.revision <= held.revision) {
        return;
    }
    // Answered first: a name that is on disk only is of no use to anybody.
    let told = Arc::new(told);
    names.send_replace(Some(told.clone()));
    cache.save(&told).await;
}

/// Keeps the packet filter and the directory at what plan and names say. Runs until it is dropped.
async fn reconcile(
    firewall: Firewall,
    mut plans: Plans,
    mut names: Names,
    directory: watch::Sender<Arc<Directory>>,
    applied: watch::Sender<Applied>,
) {
    let mut last: Option<Rules> = None;
    loop {
        let (plan, told) = (plans.borrow_and_update().clone(), names.borrow_and_update().clone());
        let mut wait = LOOK;
        // Without a plan, what an agent before this one has set stays.
        if let Some(plan) = plan {
            directory.send_replace(Arc::new(entries(&plan, told.as_deref())));
            let wanted = rules(&plan, told.as_deref());
            let done = if last.as_ref() == Some(&wanted) {
                Ok(())
            } else if wanted.guests.is_empty() {
                // A host that is left behind keeps nothing of ours.
                firewall.remove().await
            } else {
                firewall.apply(wanted.clone()).await
            };
            match done {
                Ok(()) => {
                    last = Some(wanted);
                    let known = plan.instances.iter().map(|i| i.uid).collect();
                    applied.send_replace(Applied { known, trouble: String::new() });
                }
                Err(error) => {
                    tracing::error!(%error, "the packet filter can't be set: what was set before stays");
                    last = None;
                    applied.send_modify(|a| a.trouble = error.to_string());
                    wait = Duration::from_secs(1);
                }
            }
        }
        tokio::select! {
            biased;
            changed = plans.changed() => if changed.is_err() { return },
            changed = names.changed() => match changed {
                Ok(()) => tokio::time::sleep(GATHER).await,
                Err(_) => return,
            },
            () = tokio::time::sleep(wait) => {
                if last.as_ref().is_some_and(|rules| !rules.guests.is_empty()) && matches!(firewall.stands().await, Ok(false)) {
                    tracing::warn!("somebody has removed the packet filter of this host's instances; it is set again");
                    last = None;
                }
            }
        }
    }
}

fn net(cidr: &Cidr) -> Net {
    (cidr.address, cidr.length)
}

/// Those that have addresses: what a job's instance had that has ended may be another's by now.
fn present(plan: &HostPlan) -> impl Iterator<Item = &InstancePlan> {
    plan.instances.iter().filter(|i| !i.kept)
}

/// The packet filter for a plan: an instance that servers have not told of yet is a member of its project all the same, and
/// a project that they have not told of has no egress.
fn rules(plan: &HostPlan, names: Option<&HostNames>) -> Rules {
    let mut tenants: BTreeMap<&Name, Tenant> = BTreeMap::new();
    for instance in present(plan) {
        let members = &mut tenants.entry(&instance.project).or_default().members;
        members.extend([IpAddr::from(instance.address6), instance.address4.into()]);
    }
    for told in names.iter().flat_map(|n| &n.projects) {
        if let Some(tenant) = tenants.get_mut(&told.project) {
            let addresses = told.instances.iter().flat_map(|i| [IpAddr::from(i.address6), i.address4.into()]);
            tenant.members.extend(addresses);
            tenant.everything = told.egress.mode == EgressMode::Allow;
            tenant.networks = told.egress.networks.iter().map(net).collect();
        }
    }
    let order: BTreeMap<&Name, usize> = tenants.keys().enumerate().map(|(n, name)| (*name, n)).collect();
    let guest = |i: &InstancePlan| Guest {
        name: i.uid.to_string(),
        address: InstanceAddress { address6: i.address6, address4: i.address4 },
        tenant: order[&i.project],
    };
    let guests = present(plan).map(guest).collect();
    let nets = |of: fn(&HostNames) -> &Vec<Cidr>| names.map(|n| of(n).iter().map(net).collect()).unwrap_or_default();
    Rules {
        guests,
        instances: nets(|n| &n.instances),
        infrastructure: nets(|n| &n.infrastructure),
        tenants: tenants.into_values().collect(),
    }
}

/// The names for a plan.
fn entries(plan: &HostPlan, names: Option<&HostNames>) -> Directory {
    let askers: HashMap<_, _> = present(plan).map(|i| (i.address4, i.project.to_string())).collect();
    let Some(names) = names else { return Directory { askers, ..Directory::default() } };
    let project = |told: &nexus_model::plan::ProjectNames| {
        let mut apps: BTreeMap<String, Vec<Named>> = told.apps.iter().map(|a| (a.to_string(), Vec::new())).collect();
        for i in &told.instances {
            let named = Named {
                address6: i.address6,
                address4: i.address4,
                ready: i.ready,
                only4: i.only4,
                ports: i.ports.iter().map(|p| (p.name.to_string(), p.port)).collect(),
            };
            apps.entry(i.app.to_string()).or_default().push(named);
        }
        (told.project.to_string(), Project { apps, outside: told.egress.is_open() })
    };
    Directory {
        region: names.region.to_string(),
        projects: names.projects.iter().map(|told| project(told)).collect(),
        askers,
        instances: names.instances.iter().map(net).collect(),
    }
}

#[cfg(test)]
#[path = "fabric_tests.rs"]
mod tests;
