//! What a host's instances reach and which names they are told: made from the plan, which says who is here, and from what
//! servers tell of the projects that are, which is kept on disk.
//!
//! ```text
//! plan ─────┐                       ┌─▶ packet filter   replaced whole whenever it differs
//!           ├─▶ rules, directory ───┤
//! names ────┘   (pure)              └─▶ resolver        looks at the newest
//! ```
//!
//! An instance starts when the packet filter knows it: never before, so that it is never open, and at once after. The filter of a
//! host without instances stays for a while, because adding to it takes a tenth of the time that setting it does. What the
//! kernel holds outlives the agent; the names that a restarted agent answers are those on disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use nexus_env::{Env, RngExt as _};
use nexus_model::kind::EgressMode;
use nexus_model::plan::{HostNames, HostNetworks, HostPlan, InstancePlan, ProjectNames};
use nexus_model::{Cidr, Name, Uid};
use nexus_network::firewall::{self, Firewall, Guest, Net, Rules, Standing, Tenant};
use nexus_network::names::lookup::LookupError;
use nexus_network::names::serve::Resolver;
use nexus_network::names::{Directory, Named, Project};
use nexus_network::{InstanceAddress, NetError, NetnsRef};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::config::AgentConfig;
use crate::inside::inside;

/// Between looks whether somebody has flushed our rules with all others.
const LOOK: Duration = Duration::from_secs(15);
/// Names change in bursts, as apps roll: one replacement serves many changes.
const GATHER: Duration = Duration::from_millis(20);
/// How long the packet filter of a host without instances stays.
const EMPTY: Duration = Duration::from_secs(600);
/// An instance that the packet filter does not come to know for so long can't start.
const PATIENCE: Duration = Duration::from_secs(10);
/// Where the host's own resolvers are named.
const RESOLV_CONF: &str = "/etc/resolv.conf";

type Plans = watch::Receiver<Option<Arc<HostPlan>>>;
pub(crate) type Names = watch::Receiver<Option<Arc<HostNames>>>;
pub(crate) type Networks = watch::Receiver<Option<Arc<HostNetworks>>>;

/// Which instances the packet filter knows, or why it can't be set.
#[derive(Debug, Clone, Default)]
struct Applied {
    known: BTreeSet<Uid>,
    trouble: String,
    /// The packet filter stands, and there are no instances.
    nobody: bool,
}

/// The way for workers to wait for the packet filter.
#[derive(Clone)]
pub(crate) struct Fabric {
    firewall: Firewall,
    names: Names,
    resolver: Resolver,
    applied: watch::Receiver<Applied>,
}

impl Fabric {
    /// Begins to keep the host's packet filter and to answer names.
    pub fn start(
        firewall: Firewall,
        env: &Env,
        config: &AgentConfig,
        plans: Plans,
        names: Names,
        networks: Option<Networks>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let directory = watch::Sender::default();
        let rng = env.rng.clone();
        let below = Arc::new(move |n: usize| rng.below(n.max(1) as u64) as usize);
        let resolver = Resolver::new(NetnsRef::Own, RESOLV_CONF, directory.subscribe(), below);
        config.handle.answers_names(resolver.counts.clone());
        let applied = watch::Sender::default();
        let fabric = Self {
            firewall: firewall.clone(),
            names: names.clone(),
            resolver: resolver.clone(),
            applied: applied.subscribe(),
        };
        // Without a part in tenants' networks nothing is ever told of them.
        let networks = networks.unwrap_or_else(|| watch::channel(None).1);
        tasks.spawn(reconcile(firewall, plans, names, networks, directory, applied));
        tasks.spawn(resolver.run());
        fabric
    }

    /// Leaves nothing of a packet filter that filters for nobody. The agent ends.
    pub async fn close(&self) {
        let nobody = self.applied.borrow().nobody;
        if nobody && let Err(error) = self.firewall.remove().await {
            tracing::warn!(%error, "the packet filter can't be removed");
        }
    }

    /// The addresses that a name leads an instance to, as its own resolver would tell it.
    pub async fn lookup(&self, plan: &InstancePlan, name: &str) -> Result<Vec<IpAddr>, LookupError> {
        self.resolver.addresses(plan.address4, plan.project.as_str(), name).await
    }

    /// Whether a project's instances may reach an address without a NIC, as far as that is known: the packet filter has the last word.
    pub fn may_reach(&self, project: &Name, address: IpAddr) -> bool {
        let names = self.names.borrow().clone();
        let told = names.iter().flat_map(|n| &n.projects).find(|told| told.project == *project);
        told.is_none_or(|told| is_open(told, address))
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

/// Keeps the packet filter and the directory at what plan and names say. Runs until it is dropped.
async fn reconcile(
    firewall: Firewall,
    mut plans: Plans,
    mut names: Names,
    mut networks: Networks,
    directory: watch::Sender<Arc<Directory>>,
    applied: watch::Sender<Applied>,
) {
    // What is known to stand, or that nothing does; and since when there is nobody to filter for.
    let mut last: Option<Option<Standing>> = None;
    let mut nobody: Option<Instant> = None;
    loop {
        let (plan, told) = (plans.borrow_and_update().clone(), names.borrow_and_update().clone());
        let nets = networks.borrow_and_update().clone();
        let mut wait = LOOK;
        // Without a plan, what an agent before this one has set stays.
        if let Some(plan) = plan {
            directory.send_replace(Arc::new(entries(&plan, told.as_deref(), nets.as_deref())));
            let wanted = rules(&plan, told.as_deref());
            nobody = wanted.guests.is_empty().then(|| nobody.unwrap_or_else(Instant::now));
            // A host that is left behind keeps nothing of ours.
            let stays = nobody.is_none_or(|since| matches!(last, Some(Some(_))) && since.elapsed() < EMPTY);
            let done = match last.take() {
                Some(None) if !stays => Ok(None),
                Some(Some(standing)) if stays && standing.rules == wanted => Ok(Some(standing)),
                _ if !stays => firewall.remove().await.map(|()| None),
                known => set(&firewall, known.flatten(), wanted).await.map(Some),
            };
            match done {
                Ok(standing) => {
                    let nobody = standing.is_some() && nobody.is_some();
                    last = Some(standing);
                    let known = plan.instances.iter().map(|i| i.uid).collect();
                    applied.send_replace(Applied { known, trouble: String::new(), nobody });
                }
                Err(error) => {
                    tracing::error!(%error, "the packet filter can't be set: what was set before stays");
                    applied.send_modify(|a| a.trouble = error.to_string());
                    wait = Duration::from_secs(1);
                }
            }
        }
        tokio::select! {
            biased;
            changed = plans.changed() => if changed.is_err() { return },
            changed = names.changed() => match changed {
                // An instance that is to start waits for nobody's names.
                Ok(()) => tokio::select! {
                    biased;
                    changed = plans.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(GATHER) => {}
                },
                Err(_) => return,
            },
            () = changed(&mut networks) => {}
            () = tokio::time::sleep(wait) => {
                if matches!(last, Some(Some(_))) && matches!(firewall.stands().await, Ok(false)) {
                    tracing::warn!("somebody has removed the packet filter of this host's instances; it is set again");
                    last = None;
                }
            }
        }
    }
}

/// Brings the packet filter to the rules, by adding to those that stand if that is enough.
async fn set(firewall: &Firewall, standing: Option<Standing>, wanted: Rules) -> Result<Standing, NetError> {
    if let Some(standing) = standing
        && let Some(extended) = firewall.extend(standing, wanted.clone()).await?
    {
        return Ok(extended);
    }
    firewall.apply(wanted).await
}

/// Resolves when there is news; never, when nothing more will be told.
pub(crate) async fn changed<T>(news: &mut watch::Receiver<T>) {
    if news.changed().await.is_err() {
        std::future::pending().await
    }
}

pub(crate) fn net(cidr: &Cidr) -> Net {
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
    for (project, tenant) in &mut tenants {
        tenant.name = project.to_string();
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

/// Whether an address is one of the project's own, or outside and open.
fn is_open(told: &ProjectNames, address: IpAddr) -> bool {
    let own = told.instances.iter().any(|i| address == i.address6 || address == i.address4);
    let everything = told.egress.mode == EgressMode::Allow;
    let never =
        || firewall::never().iter().any(|(first, length)| Cidr { address: *first, length: *length }.contains(address));
    own || ((everything || told.egress.networks.iter().any(|net| net.contains(address))) && !never())
}

/// The names for a plan.
fn entries(plan: &HostPlan, names: Option<&HostNames>, networks: Option<&HostNetworks>) -> Directory {
    let askers: HashMap<_, _> = present(plan).map(|i| (i.address4, i.project.to_string())).collect();
    let Some(names) = names else { return Directory { askers, ..Directory::default() } };
    let project = |told: &ProjectNames| {
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
        inside: inside(plan, names, networks),
        instances: names.instances.iter().map(net).collect(),
    }
}

#[cfg(test)]
#[path = "fabric_tests.rs"]
mod tests;
