//! The daemon itself: gives every instance of the plan, and every one that is found here, a worker.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use nexus_env::{Endpoint, Env};
use nexus_model::Uid;
use nexus_model::kind::ImageFormat;
use nexus_model::plan::{Desired, HostPlan};
use nexus_wire::{ClientOptions, Pool};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::{AgentConfig, AgentError, Engines, IdentityConfig};
use crate::connect::Connector;
use crate::fabric::Fabric;
use crate::flows::Flows;
use crate::identity::issuer::WireIssuer;
use crate::identity::{Identities, keys};
use crate::networks::Networks;
use crate::observer::{Observer, View};
use crate::parts::parts_of;
use crate::secrets::{Secrets, mount_memory};
use crate::servers::Servers;
use crate::targets::Kept;
use crate::worker::{Order, Shared, Worker};
use crate::{ahead, plans, report, room, serve, telemetry, told};

/// Instances that are started at once; more would only slow each other down.
const STARTS_AT_ONCE: usize = 8;

/// How long it may take to end what was only kept ready.
const CLOSE: Duration = Duration::from_secs(3);

/// Runs a host's daemon until `shutdown`. No instance ends with it.
pub async fn run(
    config: AgentConfig,
    env: Env,
    engines: Engines,
    shutdown: CancellationToken,
) -> Result<(), AgentError> {
    let system = |attempt: &str| {
        let attempt = attempt.to_owned();
        move |source| AgentError::System { attempt, source }
    };
    let config = Arc::new(config);
    let logs_dir = config.data_dir.join("logs");
    let cache = plans::Cache::new(env.disk.clone(), &config.data_dir);
    let cached = {
        let (disk, dir, cache, name) = (env.disk.clone(), logs_dir.clone(), cache.clone(), config.name.clone());
        let load = move || {
            disk.create_dir_all(&dir)
                .map_err(|source| AgentError::System { attempt: format!("making {}", dir.display()), source })?;
            cache.load(&name)
        };
        let loaded = tokio::task::spawn_blocking(load).await;
        loaded.map_err(std::io::Error::other).map_err(system("reading the cached plan"))??
    };
    let cached = cached.map(Arc::new);
    let (coming, comes) = watch::channel(cached.clone());
    let (plans, planned) = watch::channel(cached);

    let pool = Pool::new(&env, config.client_tls.clone(), ClientOptions::default());
    let servers = Arc::new(Servers::new(&env, pool, config.servers.clone()));
    // All tasks are of this set, and end when it is dropped.
    let mut tasks: JoinSet<()> = JoinSet::new();
    let identities = match &config.identity {
        Some(settings) => {
            let made = identities(&config, settings, &env, &servers, &mut tasks).await;
            Some(Arc::new(made.map_err(system("making the folder of identities"))?))
        }
        None => None,
    };
    let secrets = match config.secrets_dir.clone() {
        Some(dir) => {
            let mounted = dir.clone();
            let done = tokio::task::spawn_blocking(move || mount_memory(&mounted)).await;
            done.map_err(std::io::Error::other).flatten().map_err(system("keeping secrets in memory"))?;
            let source = Arc::new(WireIssuer::new(config.name.clone(), servers.clone()));
            Some(Arc::new(Secrets::new(dir, source)))
        }
        None => None,
    };
    let names = match engines.firewall.is_some() || engines.networks.is_some() {
        true => told::keep(&env, &config, "names.json", servers.clone(), &mut tasks).await,
        false => watch::channel(None).1,
    };
    let networks = match engines.networks.clone() {
        Some(engine) => {
            let told = told::networks::keep(&env, &config, "networks.json", servers.clone(), &mut tasks).await;
            let flows = Flows::new(env.clone(), config.data_dir.join("flows"), engine.clone());
            let kept = Kept { disk: env.disk.clone(), path: config.data_dir.join("targets.json") };
            Some(Networks::start(engine, told, names.clone(), flows, kept, &config.handle, &mut tasks).await)
        }
        None => None,
    };
    let fabric = engines.firewall.clone().map(|firewall| {
        let told = networks.as_ref().map(Networks::told);
        // A change of the packet filter needs nobody's memory, so it goes on while a plan is being written to disk.
        Fabric::start(firewall, &env, &config, comes.clone(), names, told, &mut tasks)
    });
    let packets = fabric.clone();
    let connections = Arc::new(Connector {
        plans: comes.clone(),
        net: engines.net.clone(),
        fabric: fabric.clone(),
        networks: networks.clone(),
    });
    for runtime in engines.runtimes.values() {
        runtime.connect_by(connections.clone());
    }
    let shared = Arc::new(Shared {
        env: env.clone(),
        observer: Observer::new(engines.runtimes.clone(), engines.keep.clone()),
        engines: engines.clone(),
        identities,
        secrets,
        fabric,
        networks,
        numa: config.numa.clone(),
        handle: config.handle.clone(),
        logs_dir,
        planned: planned.clone(),
        starts: Semaphore::new(STARTS_AT_ONCE),
    });
    let server = serve::server(&config, &env, shared.clone(), Endpoint::Tcp(config.host.address));
    let server = server.bind().await.map_err(system(&format!("listening on {}", config.host.address)))?;

    let observing = shared.clone();
    tasks.spawn(async move { observing.observer.run().await });
    tasks.spawn(plans::pull(config.name.clone(), servers.clone(), cache, coming, plans, config.handle.clone()));
    let (measured, disk) = watch::channel(None);
    tasks.spawn(telemetry::probe_disk(env.clone(), config.data_dir.clone(), measured));
    tasks.spawn(report::run(config.clone(), env, engines.clone(), servers, disk));
    let serving = tasks.spawn(server.serve(shutdown.clone()));
    // Apart, so that a large download keeps no function from being compiled.
    for format in [ImageFormat::Wasm, ImageFormat::Oci] {
        tasks.spawn(ahead::run(engines.clone(), planned.clone(), format));
    }
    let runtimes: Vec<_> = engines.runtimes.values().cloned().collect();
    for runtime in runtimes.clone() {
        tasks.spawn(async move { runtime.upkeep().await });
    }
    tasks.spawn(room::keep(engines, planned.clone()));
    tasks.spawn(manage(shared, planned, comes));
    shutdown.cancelled().await;
    // Whoever reads logs or waits for a command hears a proper end.
    let drained = async {
        while !serving.is_finished() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(6), drained).await;
    tasks.shutdown().await;
    // This may be a host that is left behind.
    let closed = futures::future::join_all(runtimes.iter().map(|runtime| runtime.close()));
    let close = async {
        match packets {
            Some(packets) => drop(tokio::join!(closed, packets.close())),
            None => drop(closed.await),
        }
    };
    let _ = tokio::time::timeout(CLOSE, close).await;
    Ok(())
}

/// Makes what serves instances' identities, and begins to follow the keys of their tokens.
async fn identities(
    config: &AgentConfig,
    settings: &IdentityConfig,
    env: &Env,
    servers: &Arc<Servers>,
    tasks: &mut JoinSet<()>,
) -> std::io::Result<Identities> {
    let cache = keys::Cache::new(env.disk.clone(), &config.data_dir);
    let known = watch::Sender::new(Arc::new(cache.load().await));
    let issuer = Arc::new(WireIssuer::new(config.name.clone(), servers.clone()));
    let identities = Identities::new(env, settings, issuer, known.subscribe(), config.handle.clone())?;
    tasks.spawn(keys::follow(servers.clone(), cache, known));
    Ok(identities)
}

type Plans = watch::Receiver<Option<Arc<HostPlan>>>;

/// The workers, by instance.
struct Manager {
    shared: Arc<Shared>,
    workers: JoinSet<Uid>,
    orders: BTreeMap<Uid, watch::Sender<Order>>,
    /// Instances that the plan wants gone and that are: until the plan forgets them, nothing is to be done.
    cleared: BTreeSet<Uid>,
    /// Networks and identities without an instance are looked for once, when the first plan is known.
    swept: bool,
}

async fn manage(shared: Arc<Shared>, mut planned: Plans, mut comes: Plans) {
    let mut views = shared.observer.subscribe();
    // Before the first look nothing may be started: it may be running.
    if views.wait_for(View::is_known).await.is_err() {
        return;
    }
    let mut manager =
        Manager { shared, workers: JoinSet::new(), orders: BTreeMap::new(), cleared: BTreeSet::new(), swept: false };
    loop {
        let plan = planned.borrow_and_update().clone();
        let coming = comes.borrow_and_update().clone();
        let view = views.borrow_and_update().clone();
        manager.dispatch(plan.as_deref(), coming.as_deref(), &view).await;
        tokio::select! {
            biased;
            Some(ended) = manager.workers.join_next() => match ended {
                Ok(uid) => {
                    manager.orders.remove(&uid);
                    manager.cleared.insert(uid);
                }
                Err(error) => {
                    // A worker never ends otherwise. It is started again, for the host's other instances' sake.
                    tracing::error!(%error, "a worker failed");
                    manager.orders.retain(|_, order| !order.is_closed());
                }
            },
            changed = planned.changed() => if changed.is_err() { return },
            changed = comes.changed() => if changed.is_err() { return },
            changed = views.changed() => if changed.is_err() { return },
        }
    }
}

impl Manager {
    /// `coming` is the plan itself, or the next, which is being written to disk: what is new in that is made ready meanwhile. Nothing
    /// of it is started before it is on disk, and nothing is taken away.
    async fn dispatch(&mut self, plan: Option<&HostPlan>, coming: Option<&HostPlan>, view: &View) {
        let mut wanted: BTreeMap<Uid, Order> = BTreeMap::new();
        for instance in plan.iter().flat_map(|p| &p.instances) {
            wanted.insert(instance.uid, Order { plan: Some(Arc::new(instance.clone())), wanted: true });
        }
        let coming = plan.and(coming);
        for instance in coming.iter().flat_map(|p| &p.instances).filter(|i| i.desired == Desired::Running) {
            let order = || Order { plan: Some(Arc::new(instance.clone())), wanted: true };
            wanted.entry(instance.uid).or_insert_with(order);
        }
        // What is here and not planned goes, but only if there is a plan to say so.
        if plan.is_some() {
            let mut others: BTreeSet<Uid> = view.instances.keys().copied().collect();
            others.extend(view.parts.keys());
            others.extend(self.orders.keys());
            if !self.swept {
                match self.leftovers().await {
                    Ok(left) => {
                        others.extend(left);
                        self.swept = true;
                    }
                    Err(error) => tracing::warn!(error, "what is left of earlier instances can't be looked for"),
                }
            }
            // What is left of a half-made part is its instance's to clear away, if that has a worker who knows of it.
            let held: Vec<Order> = self.orders.values().map(|order| order.borrow().clone()).collect();
            let plans = wanted.values().chain(&held).filter_map(|order| order.plan.as_deref());
            let parts: BTreeSet<Uid> = plans.flat_map(parts_of).collect();
            for uid in others.difference(&parts) {
                wanted.entry(*uid).or_default();
            }
        }
        self.cleared.retain(|uid| {
            let gone = |o: &Order| o.plan.as_ref().is_some_and(|p| p.desired == Desired::Gone);
            let here = view.instances.contains_key(uid) || view.parts.contains_key(uid);
            wanted.get(uid).is_some_and(gone) && !here
        });
        for (uid, order) in wanted {
            if self.cleared.contains(&uid) {
                continue;
            }
            match self.orders.get(&uid) {
                Some(sender) => {
                    sender.send_if_modified(|held| {
                        // The template is still needed to stop it properly.
                        let next = match order.plan {
                            None => Order { plan: held.plan.clone(), wanted: false },
                            Some(_) => order,
                        };
                        let news = *held != next;
                        *held = next;
                        news
                    });
                }
                None => {
                    let (sender, receiver) = watch::channel(order);
                    self.orders.insert(uid, sender);
                    self.workers.spawn(Worker::new(self.shared.clone(), uid, receiver).run());
                }
            }
        }
        let news = plan.map(|p| p.revision);
        let mut changed = false;
        self.shared.handle.update(|f| {
            changed = f.plan != news || !f.observed;
            f.plan = news;
            f.observed = true;
        });
        if plan.is_none() {
            self.report_unplanned(view);
        }
        if changed {
            self.shared.handle.wake_reporter();
        }
    }

    /// Instances of which a network, an identity, a secret or a shared folder is here, whether they are or not.
    async fn leftovers(&self) -> Result<Vec<Uid>, String> {
        let mut left = self.shared.engines.net.plugged().await.map_err(|e| e.to_string())?;
        if let Some(identities) = &self.shared.identities {
            left.extend(identities.known().await.map_err(|e| e.to_string())?);
        }
        if let Some(secrets) = &self.shared.secrets {
            left.extend(secrets.known().await.map_err(|e| e.to_string())?);
        }
        for runtime in self.shared.engines.runtimes.values() {
            left.extend(runtime.shared().await.map_err(|e| e.to_string())?);
        }
        Ok(left)
    }

    /// Without a plan nothing is touched, but what is here is told.
    fn report_unplanned(&self, view: &View) {
        use nexus_compute::State;
        use nexus_model::kind::InstancePhase;
        for (uid, (_, observed)) in view.instances.iter() {
            let (phase, started, exit_code) = match observed.state {
                State::Running { since } => (InstancePhase::Running, Some(since), None),
                State::Exited { code, .. } => (InstancePhase::BackOff, None, code),
            };
            let report = nexus_model::plan::InstanceReport {
                uid: *uid,
                epoch: observed.epoch,
                phase,
                ready: false,
                endpoint: None,
                restarts: 0,
                started,
                exit_code,
                message: "this host has no plan yet".into(),
                parts: Vec::new(),
            };
            self.shared.handle.instance(*uid, Some(report));
        }
    }
}
