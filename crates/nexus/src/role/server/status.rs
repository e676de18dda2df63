//! What a server knows of the region: for `/v1/status`, readiness and metrics. Peers are asked every few seconds, so that
//! a status is answered at once, from measurements that are at most that old.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nexus_api::{ClusterHealth, ClusterStatus, ServerStatus, StatusSource, Topology};
use nexus_control::region::{Counters, Region};
use nexus_control::view::View;
use nexus_model::Digest;
use nexus_model::kind::HostState;
use nexus_model::plan::{BlobRequest, method};
use nexus_store::Store;
use nexus_wire::Pool;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use crate::config::ServerConfig;

/// How often peers are asked whether they live.
const ASK: Duration = Duration::from_secs(3);

pub struct Status {
    config: ServerConfig,
    store: Arc<dyn Store>,
    view: View,
    region: Arc<Region>,
    pool: Arc<Pool>,
    reachable: Mutex<BTreeMap<u64, bool>>,
    figures: Arc<Figures>,
}

/// Figures that metrics show and that only an `await` can read.
#[derive(Debug, Default)]
struct Figures {
    applied: AtomicU64,
    keys: AtomicU64,
    log_bytes: AtomicU64,
    snapshot_bytes: AtomicU64,
    commit_micros: AtomicU64,
    watchers: AtomicU64,
    epoch: AtomicU64,
}

impl Status {
    pub fn new(config: &ServerConfig, store: Arc<dyn Store>, view: View, region: Arc<Region>, pool: Arc<Pool>) -> Self {
        Self { config: config.clone(), store, view, region, pool, reachable: Mutex::default(), figures: Arc::default() }
    }

    pub fn register(&self, registry: &Mutex<Registry>) {
        let collector = ServerMetrics { region: self.region.clone(), figures: self.figures.clone() };
        registry.lock().unwrap_or_else(PoisonError::into_inner).register_collector(Box::new(collector));
    }

    /// Asks the peers and the store now and then, until `stop`.
    pub async fn follow_peers(&self, stop: CancellationToken) {
        loop {
            let asks = self.config.members.iter().filter(|(id, _)| **id != self.config.node_id).map(|(id, m)| async {
                let client = self.pool.get(&m.wire);
                let question = BlobRequest { digest: Digest::of(b"") };
                let answer = client.call::<_, Option<u64>>(method::BLOB_HAS, &question, ASK).await;
                (*id, answer.is_ok())
            });
            let answers: BTreeMap<u64, bool> = futures::future::join_all(asks).await.into_iter().collect();
            *self.reachable.lock().unwrap_or_else(PoisonError::into_inner) = answers;
            let s = self.store.status().await;
            let f = &self.figures;
            f.applied.store(s.applied.0, Ordering::Relaxed);
            f.keys.store(s.keys, Ordering::Relaxed);
            f.log_bytes.store(s.log_bytes, Ordering::Relaxed);
            f.snapshot_bytes.store(s.snapshot_bytes, Ordering::Relaxed);
            f.commit_micros.store(u64::try_from(s.commit_latency.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
            f.watchers.store(s.watchers, Ordering::Relaxed);
            f.epoch.store(s.epoch, Ordering::Relaxed);
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(ASK) => {}
            }
        }
    }
}

#[async_trait]
impl StatusSource for Status {
    async fn status(&self) -> ClusterStatus {
        let store = self.store.status().await;
        let reachable = self.reachable.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let servers: Vec<ServerStatus> = self
            .config
            .members
            .iter()
            .map(|(id, m)| ServerStatus {
                name: m.name.to_string(),
                zone: None,
                endpoint: Some(m.api.clone()),
                leader: store.leader == Some(*id),
                reachable: *id == self.config.node_id || reachable.get(id).copied().unwrap_or(false),
            })
            .collect();
        let (ready, all, zones, brake) = self.view.read(|world| {
            let ready = world.hosts.live.values().filter(|h| h.status.state == HostState::Ready).count();
            let zones: Vec<String> = world.zones.live.keys().map(|(_, name)| name.to_string()).collect();
            (ready, world.hosts.live.len(), zones, world.cells.live.values().any(|c| c.status.brake))
        });
        let down: Vec<&str> = servers.iter().filter(|s| !s.reachable).map(|s| s.name.as_str()).collect();
        let (status, message) = if store.leader.is_none() || down.len() * 2 >= servers.len() {
            let message = format!("no majority of the {} servers is reachable: nothing can be written", servers.len());
            (ClusterHealth::Unavailable, Some(message))
        } else if !down.is_empty() {
            (ClusterHealth::Degraded, Some(format!("not reachable: {}", down.join(", "))))
        } else if brake {
            (ClusterHealth::Degraded, Some("a cell's brake holds: see `nexus get cells`".to_owned()))
        } else if ready < all {
            (ClusterHealth::Degraded, Some(format!("{} of {all} hosts are not ready", all - ready)))
        } else {
            (ClusterHealth::Healthy, None)
        };
        ClusterStatus {
            cluster_id: self.config.cluster_id.clone(),
            control_plane_version: format!("v{}", env!("CARGO_PKG_VERSION")),
            status,
            consensus_latency_ms: (store.commit_latency.as_secs_f64() * 1e6).round() / 1e3,
            active_workers: ready as u64,
            topology: Topology { zones, failover_mode: if brake { "manual" } else { "automatic" }.to_owned() },
            region: Some(self.config.region.to_string()),
            leader: servers.iter().find(|s| s.leader).map(|s| s.name.clone()),
            revision: Some(store.applied.0),
            servers,
            message,
        }
    }

    async fn ready(&self) -> Result<(), String> {
        let store = self.store.status().await;
        if let Some(failure) = store.failure {
            return Err(format!("the metadata store has stopped: {failure}"));
        }
        match store.leader {
            Some(_) if *self.view.revision().borrow() > 0 => Ok(()),
            Some(_) => Err("the log has not been read yet".to_owned()),
            None => Err("no server leads: a majority is needed".to_owned()),
        }
    }
}

/// Reads counters when metrics are asked for.
struct ServerMetrics {
    region: Arc<Region>,
    figures: Arc<Figures>,
}

impl std::fmt::Debug for ServerMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerMetrics")
    }
}

impl Collector for ServerMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let c: &Counters = &self.region.counters;
        let f = &self.figures;
        let figures: [(&str, &str, &AtomicU64); 15] = [
            ("nexus_writer_leading", "1 while this server's writer decides", &c.leading),
            ("nexus_writer_intents", "Intents decided here", &c.intents),
            ("nexus_writer_refusals", "Intents refused here", &c.refusals),
            ("nexus_writer_reports", "Host reports taken in here", &c.reports),
            ("nexus_writer_commits", "Transactions committed by this writer", &c.commits),
            ("nexus_writer_operations", "Operations in those transactions", &c.operations),
            ("nexus_invariant_violations", "Differences that the invariant checker found", &c.violations),
            ("nexus_hosts_active", "Hosts heard lately by this leader", &c.active_hosts),
            ("nexus_store_applied_revision", "Newest revision that this server shows", &f.applied),
            ("nexus_store_keys", "Keys in the metadata store", &f.keys),
            ("nexus_store_log_bytes", "Bytes of the metadata log on disk", &f.log_bytes),
            ("nexus_store_snapshot_bytes", "Bytes of snapshots on disk", &f.snapshot_bytes),
            ("nexus_store_commit_microseconds", "From proposal to commit, moving average", &f.commit_micros),
            ("nexus_store_watchers", "Open watches", &f.watchers),
            ("nexus_store_epoch", "Epoch of the current leader", &f.epoch),
        ];
        for (name, help, value) in figures {
            let gauge = ConstGauge::new(i64::try_from(value.load(Ordering::Relaxed)).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}
