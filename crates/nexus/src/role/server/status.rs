//! What a server knows of the region and of the groups that it is a member of: for `/v1/status`, readiness and metrics.
//! Peers are asked every few seconds, so that a status is answered at once, from measurements that are at most that old.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nexus_api::{
    ClusterHealth, ClusterStatus, EtcdStatus, GroupMember, GroupStatus, ServerStatus, StatusSource, Topology,
};
use nexus_control::region::Counters;
use nexus_control::view::View;
use nexus_env::Env;
use nexus_model::kind::{GLOBAL, HostState};
use nexus_model::object::ConditionStatus;
use nexus_model::plan::{BlobRequest, method};
use nexus_model::{Condition, Digest, key};
use nexus_store::{Pressure, RangeRequest, Store, StoreStatus};
use nexus_wire::Pool;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

use super::certificates::Expiry;
use super::engine::Engine;
use super::fleet::Fleet;
use super::groups::{Groups, Writers};
use super::membership::{Group, Health};
use crate::config::ServerConfig;

/// How often peers are asked whether they live.
const ASK: Duration = Duration::from_secs(3);
/// How often a group is asked whether this server's copy is complete.
const LOOK: Duration = Duration::from_secs(1);
/// A group that has not answered for so long can't commit, as far as this server can tell.
const QUORUM_FOR: Duration = Duration::from_secs(4);
/// A clock that is further off than this is trouble.
const SKEW: i64 = 1_000;

/// One group, as last looked at.
struct Watched {
    name: String,
    store: Arc<Engine>,
    /// When its copy here was last known to be complete, by the monotonic clock.
    fresh: Mutex<Option<Duration>>,
    health: Mutex<Vec<Health>>,
    figures: Figures,
}

impl Watched {
    fn new(name: &str, store: &Arc<Engine>) -> Self {
        Self {
            name: name.to_owned(),
            store: store.clone(),
            fresh: Mutex::default(),
            health: Mutex::default(),
            figures: Figures::default(),
        }
    }

    /// Reads what every acknowledged change is in, so the copy here is complete up to when this began.
    async fn look(&self, env: &Env) {
        let begun = env.monotonic();
        let read = tokio::time::timeout(LOOK * 2, self.store.range(RangeRequest::get(key::FORMAT))).await;
        if matches!(read, Ok(Ok(_))) {
            *self.fresh.lock().unwrap_or_else(PoisonError::into_inner) = Some(begun);
        }
        let s = self.store.status().await;
        self.figures.take(&s, self.stale(env));
    }

    async fn ask(&self) {
        if let Ok(Ok(health)) = tokio::time::timeout(ASK, self.store.health()).await {
            let skew = health.iter().filter_map(|h| h.clock_skew_ms).map(i64::unsigned_abs).max();
            self.figures.skew_ms.store(skew.unwrap_or(0), Ordering::Relaxed);
            *self.health.lock().unwrap_or_else(PoisonError::into_inner) = health;
        }
    }

    /// Since when the copy here may lack something; since the start, before the first look that succeeded.
    fn stale(&self, env: &Env) -> Duration {
        let fresh = *self.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        env.monotonic().saturating_sub(fresh.unwrap_or_default())
    }

    fn told(&self, status: &StoreStatus, env: &Env, names: &BTreeMap<u64, String>) -> GroupStatus {
        let stale = self.stale(env);
        let health = self.health.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let members = status.members.iter().map(|(node, member)| {
            let h = health.iter().find(|h| h.node == *node);
            GroupMember {
                node: *node,
                name: names.get(node).cloned(),
                voter: member.voter,
                reachable: h.is_some_and(|h| h.reachable),
                lag_entries: h.and_then(|h| h.lag_entries),
                clock_skew_ms: h.and_then(|h| h.clock_skew_ms),
            }
        });
        GroupStatus {
            group: self.name.clone(),
            leader: status.leader,
            quorum: status.leader.is_some() && stale < QUORUM_FOR,
            commit_latency_ms: (status.commit_latency.as_secs_f64() * 1e6).round() / 1e3,
            revision: status.applied.0,
            stale_ms: u64::try_from(stale.as_millis()).unwrap_or(u64::MAX),
            pressure: status.pressure.reason().map(str::to_owned),
            members: members.collect(),
        }
    }
}

pub struct Status {
    config: ServerConfig,
    env: Env,
    region: Arc<Watched>,
    global: Arc<Watched>,
    view: View,
    writers: Arc<Writers>,
    fleet: Fleet,
    pool: Arc<Pool>,
    expiry: Expiry,
    reachable: Mutex<BTreeMap<u64, bool>>,
    /// Where both groups are, if not in the servers.
    etcd: Mutex<Option<EtcdStatus>>,
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
    stale_ms: AtomicU64,
    skew_ms: AtomicU64,
    /// 0 none, 1 high, 2 full.
    pressure: AtomicU64,
    disk_free: AtomicU64,
}

impl Figures {
    fn take(&self, s: &StoreStatus, stale: Duration) {
        let pressure = match &s.pressure {
            Pressure::None => 0,
            Pressure::High(_) => 1,
            Pressure::Full(_) => 2,
        };
        let whole = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
        for (figure, value) in [
            (&self.applied, s.applied.0),
            (&self.keys, s.keys),
            (&self.log_bytes, s.log_bytes),
            (&self.snapshot_bytes, s.snapshot_bytes),
            (&self.commit_micros, whole(s.commit_latency.as_micros())),
            (&self.watchers, s.watchers),
            (&self.epoch, s.epoch),
            (&self.stale_ms, whole(stale.as_millis())),
            (&self.pressure, pressure),
            (&self.disk_free, s.disk_free_bytes.unwrap_or(0)),
        ] {
            figure.store(value, Ordering::Relaxed);
        }
    }
}

impl Status {
    #[allow(clippy::too_many_arguments)] // Each is something else that a status tells of.
    pub fn new(
        config: &ServerConfig,
        env: &Env,
        groups: &Groups,
        view: View,
        writers: Arc<Writers>,
        fleet: Fleet,
        pool: Arc<Pool>,
        expiry: Expiry,
    ) -> Self {
        Self {
            config: config.clone(),
            env: env.clone(),
            region: Arc::new(Watched::new(config.region.as_str(), &groups.region)),
            global: Arc::new(Watched::new(GLOBAL, &groups.global)),
            view,
            writers,
            fleet,
            pool,
            expiry,
            reachable: Mutex::default(),
            etcd: Mutex::default(),
        }
    }

    pub fn register(&self, registry: &Mutex<Registry>) {
        let collector = ServerMetrics {
            writers: self.writers.clone(),
            region: self.region.clone(),
            global: self.global.clone(),
            expiry: self.expiry.clone(),
        };
        registry.lock().unwrap_or_else(PoisonError::into_inner).register_collector(Box::new(collector));
    }

    /// Asks the peers and the stores now and then, until `stop`.
    pub async fn follow_peers(&self, stop: CancellationToken) {
        let looks = async {
            loop {
                futures::join!(self.region.look(&self.env), self.global.look(&self.env));
                tokio::time::sleep(LOOK).await;
            }
        };
        let asks = async {
            loop {
                futures::join!(self.ask_peers(), self.ask_etcd(), self.region.ask(), self.global.ask());
                tokio::time::sleep(ASK).await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = looks => {}
            () = asks => {}
        }
    }

    async fn ask_etcd(&self) {
        let status = self.region.store.etcd_status().await;
        *self.etcd.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }

    async fn ask_peers(&self) {
        let servers = self.fleet.servers();
        let asks = servers.iter().filter(|(id, _)| **id != self.config.node_id).map(|(id, m)| async {
            let Ok(wire) = m.wire.parse() else { return (*id, false) };
            let client = self.pool.get(&wire);
            let question = BlobRequest { digest: Digest::of(b"") };
            let answer = client.call::<_, Option<u64>>(method::BLOB_HAS, &question, ASK).await;
            (*id, answer.is_ok())
        });
        let answers: BTreeMap<u64, bool> = futures::future::join_all(asks).await.into_iter().collect();
        *self.reachable.lock().unwrap_or_else(PoisonError::into_inner) = answers;
    }

    /// The names of all servers of the fleet, by node.
    fn names(&self) -> BTreeMap<u64, String> {
        let mut names: BTreeMap<u64, String> = self.view.read(|world| {
            let servers = world.fleet().regions.live.values().flat_map(|r| &r.status.servers);
            servers.map(|s| (s.node, s.name.to_string())).collect()
        });
        names.extend(self.fleet.servers().into_iter().map(|(node, s)| (node, s.name.to_string())));
        names
    }

    /// Which other regions don't report to the global group.
    fn silent_regions(&self) -> Option<String> {
        let silent: Vec<String> = self.view.read(|world| {
            let silent = |c: &Condition| c.kind == "Ready" && c.status == ConditionStatus::False;
            let regions = world.fleet().regions.live.values().filter(|r| r.metadata.name != self.config.region);
            let regions = regions.filter(|r| r.status.conditions.iter().any(silent));
            regions.map(|r| r.metadata.name.to_string()).collect()
        });
        let regions = silent.join(", ");
        (!silent.is_empty()).then(|| format!("regions that can't be heard: {regions}; see `nexus get regions`"))
    }

    /// Why nobody leads a group that was never begun, with the name of the server that is to begin it and where the
    /// founding members stand.
    fn unbegun(&self, watched: &Watched) -> Option<String> {
        let why = watched.store.embedded()?.unbegun()?;
        let global = watched.name == GLOBAL;
        let members = if global { self.config.global_members() } else { &self.config.members };
        let place = if global && self.config.global.is_some() { "[global.members]" } else { "[members]" };
        let first = members.iter().next().filter(|_| !self.config.join);
        let who = first.map_or_else(String::new, |(node, m)| {
            format!(
                " (member {node} is server {}; the founding members are `{place}` of each server's nexus.toml)",
                m.name
            )
        });
        Some(format!("{}: {why}{who}", watched.name))
    }

    /// Why nothing can be written, if so.
    fn outage(&self, region: &GroupStatus, etcd: Option<&EtcdStatus>, down: usize, servers: usize) -> Option<String> {
        if self.region.store.embedded().is_some() {
            if region.leader.is_none()
                && let Some(why) = self.unbegun(&self.region)
            {
                return Some(why);
            }
            let lost = region.leader.is_none() || down * 2 >= servers;
            return lost.then(|| format!("no majority of the {servers} servers is reachable: nothing can be written"));
        }
        // With etcd, one server is enough.
        if !region.quorum {
            let endpoints = etcd.iter().flat_map(|e| &e.endpoints);
            let why: Vec<&str> = endpoints.filter_map(|e| e.trouble.as_deref()).collect();
            return Some(format!("etcd does not take writes, so nothing can be written: {}", why.join("; ")));
        }
        None
    }

    /// What is not as it should be although everything works, first things first.
    fn troubles(&self, groups: &[GroupStatus], etcd: Option<&EtcdStatus>) -> Option<String> {
        let ill = etcd.iter().flat_map(|e| &e.endpoints).find_map(|e| Some((&e.endpoint, e.trouble.as_ref()?)));
        if let Some((endpoint, trouble)) = ill {
            return Some(format!("etcd at {endpoint}: {trouble}"));
        }
        for group in groups {
            let name = &group.group;
            if let Some(reason) = &group.pressure {
                return Some(format!("{name}: {reason}"));
            }
            let off = group.members.iter().find(|m| m.clock_skew_ms.is_some_and(|ms| ms.abs() > SKEW));
            if let Some(off) = off {
                let who = off.name.clone().unwrap_or_else(|| format!("node {}", off.node));
                let ms = off.clock_skew_ms.unwrap_or(0);
                return Some(format!("the clock of {who} is {ms} ms off the leader's: see its time service"));
            }
        }
        self.expiry.trouble()
    }
}

#[async_trait]
impl StatusSource for Status {
    async fn status(&self) -> ClusterStatus {
        let (store, shared) = futures::join!(self.region.store.status(), self.global.store.status());
        let names = self.names();
        let groups = vec![self.region.told(&store, &self.env, &names), self.global.told(&shared, &self.env, &names)];
        let reachable = self.reachable.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let servers: Vec<ServerStatus> = self
            .fleet
            .servers()
            .iter()
            .map(|(id, m)| ServerStatus {
                name: m.name.to_string(),
                zone: Some(m.zone.to_string()),
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
        let unreadable = self.view.read(|world| {
            let first = world.unreadable.keys().next()?;
            let n = world.unreadable.len();
            Some(format!("{n} stored values can't be read and are passed over, {first} among them: `nexus debug store get {first}`"))
        });
        let down: Vec<&str> = servers.iter().filter(|s| !s.reachable).map(|s| s.name.as_str()).collect();
        let etcd = self.etcd.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let outage = self.outage(&groups[0], etcd.as_ref(), down.len(), servers.len());
        let (status, message) = if let Some(message) = outage {
            (ClusterHealth::Unavailable, Some(message))
        } else if !down.is_empty() {
            (ClusterHealth::Degraded, Some(format!("not reachable: {}", down.join(", "))))
        } else if groups[1].leader.is_none()
            && let Some(why) = self.unbegun(&self.global)
        {
            (ClusterHealth::Degraded, Some(why))
        } else if !groups[1].quorum {
            let message = format!(
                "the global group can't be reached: this region goes on with its copy, complete up to {} s ago; projects, \
                 images and global apps can't be changed here",
                groups[1].stale_ms / 1000
            );
            (ClusterHealth::Degraded, Some(message))
        } else if brake {
            (ClusterHealth::Degraded, Some("a cell's brake holds: see `nexus get cells`".to_owned()))
        } else if let Some(message) = unreadable {
            (ClusterHealth::Degraded, Some(message))
        } else if ready < all {
            (ClusterHealth::Degraded, Some(format!("{} of {all} hosts are not ready", all - ready)))
        } else if let Some(silent) = self.silent_regions() {
            (ClusterHealth::Degraded, Some(silent))
        } else if let Some(trouble) = self.troubles(&groups, etcd.as_ref()) {
            (ClusterHealth::Degraded, Some(trouble))
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
            groups,
            etcd,
            certificates: self.expiry.all(),
            message,
        }
    }

    fn stale_ms(&self, global: bool) -> u64 {
        let watched = if global { &self.global } else { &self.region };
        u64::try_from(watched.stale(&self.env).as_millis()).unwrap_or(u64::MAX)
    }

    async fn ready(&self) -> Result<(), String> {
        let (store, shared) = futures::join!(self.region.store.status(), self.global.store.status());
        if let Some(failure) = store.failure.or(shared.failure) {
            return Err(format!("the metadata store has stopped: {failure}"));
        }
        // Whatever a copy of the global group holds is enough to serve, if it holds anything.
        let fleet = self.view.read(|world| !world.fleet().projects.live.is_empty());
        match store.leader {
            Some(_) if *self.view.revision().borrow() > 0 && fleet => Ok(()),
            Some(_) if fleet => Err("the log has not been read yet".to_owned()),
            Some(_) => Err("the global group has not been read yet".to_owned()),
            None if self.region.store.embedded().is_none() => Err("no server leads: etcd is needed".to_owned()),
            None => {
                Err(self.unbegun(&self.region).unwrap_or_else(|| "no server leads: a majority is needed".to_owned()))
            }
        }
    }
}

/// Reads counters when metrics are asked for.
struct ServerMetrics {
    writers: Arc<Writers>,
    region: Arc<Watched>,
    global: Arc<Watched>,
    expiry: Expiry,
}

impl std::fmt::Debug for ServerMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerMetrics")
    }
}

impl Collector for ServerMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let c: &Counters = &self.writers.region.counters;
        let (f, g) = (&self.region.figures, &self.global.figures);
        let figures: [(&str, &str, &AtomicU64); 33] = [
            ("nexus_writer_leading", "1 while this server's writer decides", &c.leading),
            ("nexus_writer_intents", "Intents decided here", &c.intents),
            ("nexus_writer_refusals", "Intents refused here", &c.refusals),
            ("nexus_writer_reports", "Host reports taken in here", &c.reports),
            ("nexus_writer_commits", "Transactions committed by this writer", &c.commits),
            ("nexus_writer_operations", "Operations in those transactions", &c.operations),
            (
                "nexus_writer_fleet_stale_milliseconds",
                "Age of this writer's copy of the global group",
                &c.fleet_stale_ms,
            ),
            ("nexus_invariant_violations", "Differences that the invariant checker found", &c.violations),
            ("nexus_writer_rounds", "Rounds of this writer: inputs taken, decided, committed", &c.rounds),
            ("nexus_writer_reports_replaced", "Host reports that a later one overtook", &c.reports_replaced),
            ("nexus_writer_quarantined", "Objects whose reconciler panics, tried again later", &c.quarantined),
            ("nexus_store_unreadable_values", "Stored values that can't be read, found by the writer", &c.unreadable),
            ("nexus_audit_records", "Records of the region's audit log, all of them in the store", &c.audit_records),
            ("nexus_audit_broken", "1 while the audit log can't go on and users' changes are refused", &c.audit_broken),
            (
                "nexus_global_audit_records",
                "Records of the global group's audit log, all of them in the store",
                &self.writers.global.counters.audit_records,
            ),
            ("nexus_hosts_active", "Hosts heard lately by this leader", &c.active_hosts),
            ("nexus_store_applied_revision", "Newest revision that this server shows", &f.applied),
            ("nexus_store_keys", "Keys in the metadata store", &f.keys),
            ("nexus_store_log_bytes", "Bytes of the metadata log on disk", &f.log_bytes),
            ("nexus_store_snapshot_bytes", "Bytes of snapshots on disk", &f.snapshot_bytes),
            ("nexus_store_commit_microseconds", "From proposal to commit, moving average", &f.commit_micros),
            ("nexus_store_watchers", "Open watches", &f.watchers),
            ("nexus_store_epoch", "Epoch of the current leader", &f.epoch),
            ("nexus_store_stale_milliseconds", "Since this server's copy was known to be complete", &f.stale_ms),
            ("nexus_store_pressure", "0 none, 1 little room left, 2 growth is refused", &f.pressure),
            ("nexus_store_disk_free_bytes", "Bytes left for the metadata store", &f.disk_free),
            ("nexus_store_clock_skew_milliseconds", "The clock furthest off the leader's", &f.skew_ms),
            (
                "nexus_global_leading",
                "1 while this server's writer decides for the global group",
                &self.writers.global.counters.leading,
            ),
            ("nexus_global_applied_revision", "Newest global revision that this server shows", &g.applied),
            ("nexus_global_keys", "Keys in the global group", &g.keys),
            ("nexus_global_commit_microseconds", "From proposal to commit, moving average", &g.commit_micros),
            (
                "nexus_global_stale_milliseconds",
                "Since this server's global copy was known to be complete",
                &g.stale_ms,
            ),
            ("nexus_global_pressure", "0 none, 1 little room left, 2 growth is refused", &g.pressure),
        ];
        let read = |value: &AtomicU64| i64::try_from(value.load(Ordering::Relaxed)).unwrap_or(i64::MAX);
        let mut all: Vec<(String, &str, i64)> =
            figures.iter().map(|(name, help, value)| ((*name).to_owned(), *help, read(value))).collect();
        all.extend(self.expiry.metrics());
        for (name, help, value) in all {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(&name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}
