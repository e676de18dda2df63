//! The gateway as a whole: its table, what it counts, and the task that brings ejected instances back.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_env::Env;
use nexus_model::Name;
use nexus_model::plan::RoutingTable;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::info;

use crate::backend::Backend;
use crate::metrics::Metrics;
use crate::table::Table;

/// How often ejected instances are probed and idle connections looked over.
const ROUND: Duration = Duration::from_secs(1);
/// Probes at once; the others wait for the next round.
const MAX_PROBES: usize = 64;

/// How a gateway behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// The region whose gateway this is.
    pub region: Option<Name>,
    /// How other regions' gateways are connected to. Without it, no request leaves the region.
    pub peer_tls: Option<Arc<rustls::ClientConfig>>,
    /// The zone whose instances are nearest.
    pub zone: Name,
    /// How long an instance may take to accept a connection.
    pub connect_timeout: Duration,
    /// How long a request is tried, from its arrival to the last attempt.
    pub budget: Duration,
    /// How often an idempotent request is sent, at most, when connections break after it was sent.
    pub max_sends: u32,
    /// How long a request waits for a service without any instance.
    pub patience: Duration,
    /// Requests that may wait for an instance, per service; more are refused at once.
    pub max_waiting: usize,
    /// Requests at once to one instance.
    pub max_outstanding: u32,
    /// Users' connections; more wait in the listener's queue.
    pub max_connections: usize,
    /// How long a request's headers may take to arrive.
    pub header_timeout: Duration,
    /// How long requests that are running may take to end when the gateway goes down.
    pub drain_timeout: Duration,
    /// Log every request.
    pub access_log: bool,
}

impl Options {
    pub fn new(zone: Name) -> Self {
        Self {
            region: None,
            peer_tls: None,
            zone,
            connect_timeout: Duration::from_secs(1),
            budget: Duration::from_secs(8),
            max_sends: 3,
            patience: Duration::from_secs(2),
            max_waiting: 1024,
            max_outstanding: 1024,
            max_connections: 10_000,
            header_timeout: crate::connections::HEADERS,
            drain_timeout: Duration::from_secs(30),
            access_log: false,
        }
    }
}

pub(crate) struct Core {
    pub env: Env,
    pub options: Options,
    pub metrics: Metrics,
    /// `None` until the first table.
    pub table: watch::Sender<Option<Arc<Table>>>,
    /// Taken by whoever makes the next table.
    compiling: Mutex<()>,
    /// Rings when a request finds nobody to take it: servers should know at once.
    pub bell: Notify,
    /// Connections to instances and tunnels: they end with their users, or when `kill` says so.
    pub tracker: TaskTracker,
    pub kill: CancellationToken,
}

impl Core {
    pub fn table(&self) -> Option<Arc<Table>> {
        self.table.borrow().clone()
    }

    /// Runs something of the gateway's until it ends or the gateway is over.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let kill = self.kill.clone();
        self.tracker.spawn(async move {
            kill.run_until_cancelled(task).await;
        });
    }
}

/// The edge of a region. Cloning is cheap; clones are the same gateway.
#[derive(Clone)]
pub struct Gateway(pub(crate) Arc<Core>);

impl Gateway {
    pub fn new(env: Env, options: Options) -> Self {
        Self(Arc::new(Core {
            env,
            options,
            metrics: Metrics::new(),
            table: watch::channel(None).0,
            compiling: Mutex::new(()),
            bell: Notify::new(),
            tracker: TaskTracker::new(),
            kill: CancellationToken::new(),
        }))
    }

    /// Takes a table if it is newer than the one in use; says whether.
    pub fn offer(&self, mut table: RoutingTable) -> bool {
        let core = &self.0;
        let _one_at_a_time = core.compiling.lock().unwrap_or_else(PoisonError::into_inner);
        let before = core.table();
        if before.as_ref().is_some_and(|b| b.revision >= table.revision) {
            return false;
        }
        if core.options.peer_tls.is_none() {
            table.regions.clear();
        }
        let new = Table::compile(table, &core.options.zone, before.as_deref(), &core.metrics);
        core.metrics.revision.set(new.revision);
        core.table.send_replace(Some(Arc::new(new)));
        true
    }

    /// The revision of the table in use.
    pub fn revision(&self) -> Option<u64> {
        self.0.table().map(|t| t.revision)
    }

    /// What is counted, in Prometheus' text format.
    pub fn metrics_text(&self) -> String {
        self.0.metrics.text()
    }
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gateway(revision {:?})", self.revision())
    }
}

/// Probes ejected instances and closes idle connections, until dropped.
pub(crate) async fn maintain(core: Arc<Core>) {
    let mut rounds = interval(ROUND);
    rounds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut probes: JoinSet<()> = JoinSet::new();
    loop {
        rounds.tick().await;
        while probes.try_join_next().is_some() {}
        let Some(table) = core.table() else { continue };
        let now = Instant::now();
        for peer in table.regions.values().flat_map(|r| &r.peers) {
            peer.backends().into_iter().for_each(|b| b.prune(now));
        }
        for service in &table.services {
            for backend in service.members.iter().map(|m| &m.backend) {
                backend.prune(now);
                if backend.health.wants_probe(now) && probes.len() < MAX_PROBES {
                    probes.spawn(probe(core.clone(), backend.clone(), service.metrics.name.clone()));
                }
            }
        }
    }
}

async fn probe(core: Arc<Core>, backend: Arc<Backend>, service: String) {
    let connected = timeout(core.options.connect_timeout, core.env.transport.connect(&backend.address)).await;
    if matches!(connected, Ok(Ok(_))) && backend.health.restore(Instant::now()) {
        info!(service, instance = %backend.uid, address = %backend.address, "an instance can be reached again");
    }
}
