//! The embedded engine: a replicated log inside the servers themselves.
//!
//! The parts, from the disk up: [`wal`] is the log's format, [`writer`] its group commit, [`log`] and [`machine`] what
//! the consensus library sees, [`mvcc`] the state, [`snapshot`] its files, which [`pack`] helps to read, [`network`] and [`eager`] the way to other
//! members, by the routes that [`reach`] knows. [`guard`] decides when to elect and [`membership`] who belongs. On top, [`propose`] batches changes, [`reads`] batches linearizable reads, [`leases`] keeps the leader's
//! time and [`hub`] feeds watches. [`core`] ties them together.
//!
//! Durability: a change is acknowledged when a quorum has synced it, and a vote before it is given. After any failed
//! write the member stops (it can't know what is durable) and says why in its status; opening it again goes on.

mod core;
mod eager;
mod guard;
pub(crate) mod hub;
mod leases;
mod log;
pub(crate) mod machine;
mod membership;
pub(crate) mod mvcc;
mod network;
mod pack;
mod peers;
mod pressure;
mod propose;
pub(crate) mod raft;
mod reach;
mod reads;
mod runtime;
pub(crate) mod snapshot;
pub(crate) mod wal;
mod writer;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_env::{DiskLock, Env, on_disk, write_atomic};
use openraft::{BasicNode, SnapshotPolicy};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use self::core::Core;
use self::eager::Eager;
use self::guard::{Guard, Timing};
use self::hub::EmbeddedWatch;
use self::leases::LeaseClock;
use self::log::LogStore;
use self::machine::{Machine, Shared};
pub use self::membership::FEATURE_LEVEL;
pub use self::mvcc::Retention;
use self::network::{Network, PeerLink};
use self::peers::Roster;
pub use self::peers::{PeerRef, Peers};
use self::raft::{Command, Failure, Outcome, Raft, Request, Response};
use self::reach::{Reach, Route};
use self::snapshot::SnapshotDir;
use crate::error::{PeerError, StoreError};
use crate::types::{
    Consistency, GroupId, Leadership, LeaseId, RangeRequest, RangeResponse, Revision, StoreStatus, Txn, TxnOutcome,
};
use crate::{Store, Watch};

/// The version of the data folder that this release writes, and the newest that it reads.
const FORMAT: u32 = 1;
const FORMAT_FILE: &str = "FORMAT";
const LOCK_FILE: &str = "LOCK";
/// Which generation of the group the folder belongs to; see [`peers`].
pub(crate) const GENERATION_FILE: &str = "generation";
/// Keys up to which a read is done under the state's lock; larger ones work on a snapshot beside it.
const SMALL_READ: usize = 256;
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// How one member of one group runs.
#[derive(Debug, Clone)]
pub struct Config {
    pub node: u64,
    pub group: GroupId,
    /// The data folder, of this member and group alone.
    pub dir: PathBuf,
    /// Every member's endpoint, this one's too, numbered from 1. Counts at the first start; later the log knows who is a
    /// member. Empty for one that joins.
    pub members: BTreeMap<u64, String>,
    /// Begins the group if nothing was begun yet. Exactly one of the first members does.
    pub founder: bool,
    /// Waits to be added to a group that exists; see [`EmbeddedStore::add_learner`].
    pub join: bool,
    /// The highest feature level that is spoken. Lower than [`FEATURE_LEVEL`] only in tests.
    pub feature_level: u32,
    /// How long any one request may take.
    pub request_timeout: Duration,
    /// How long a request waits for a leader to appear. An election takes up to about 1.5 s.
    pub leader_wait: Duration,
    pub heartbeat: Duration,
    /// Rules when leaders change; see [`guard`]. A silent leader is replaced after the second plus a random part of half
    /// the first to the second; one that hears no majority for the sum of both gives up. The first must be longer than a
    /// round trip between members.
    pub election_timeout: (Duration, Duration),
    pub segment_bytes: u64,
    /// The state is saved and the log cut after this much of it, or more if the state is large.
    pub snapshot_after_bytes: u64,
    /// The store is full when the disk has less than this left beside room for a snapshot, while the log can still be
    /// written. Growth is refused from half of it on.
    pub reserve_bytes: u64,
    /// The store is full when keys and values take more memory than this. History goes before that.
    pub memory_bytes: u64,
    pub retention: Retention,
}

impl Config {
    pub fn new(node: u64, group: GroupId, dir: impl Into<PathBuf>, members: BTreeMap<u64, String>) -> Self {
        Self {
            founder: members.keys().next() == Some(&node),
            join: false,
            feature_level: FEATURE_LEVEL,
            node,
            group,
            dir: dir.into(),
            members,
            request_timeout: Duration::from_secs(5),
            leader_wait: Duration::from_millis(2_500),
            heartbeat: Duration::from_millis(150),
            election_timeout: (Duration::from_millis(400), Duration::from_millis(700)),
            segment_bytes: 8 << 20,
            snapshot_after_bytes: 64 << 20,
            reserve_bytes: 128 << 20,
            memory_bytes: 2 << 30,
            retention: Retention::default(),
        }
    }

    /// For members that are regions apart: twice the patience, and half the idle traffic.
    pub fn for_distance(self) -> Self {
        let (short, long) = self.election_timeout;
        Self {
            heartbeat: self.heartbeat * 2,
            election_timeout: (short * 2, long * 2),
            leader_wait: self.leader_wait * 2,
            ..self
        }
    }

    fn validate(&self) -> Result<(), StoreError> {
        if self.node == 0 || self.members.contains_key(&0) {
            Err(StoreError::Invalid("members are numbered from 1".into()))
        } else if self.join && self.founder {
            Err(StoreError::Invalid("a member that joins can't be the founder".into()))
        } else if self.join || self.members.contains_key(&self.node) {
            Ok(())
        } else {
            Err(StoreError::Invalid(format!("node {} is not among the members", self.node)))
        }
    }
}

/// One member of a replicated store. Shut it down before it is dropped; a dropped one stops its tasks at once.
pub struct EmbeddedStore {
    core: Arc<Core>,
    tasks: Mutex<JoinSet<()>>,
    wal_task: Mutex<Option<JoinHandle<()>>>,
    eager: Arc<Eager>,
    lock: Mutex<Option<Box<dyn DiskLock>>>,
}

impl EmbeddedStore {
    /// Opens the data folder (making it at the first start), recovers, and joins the other members. The member with the
    /// lowest id founds the cluster; doing so again changes nothing.
    pub async fn open(config: Config, env: Env, peers: Arc<dyn Peers>) -> Result<Self, StoreError> {
        config.validate()?;
        let found = {
            let (config, env) = (config.clone(), env.clone());
            let disk = env.disk.clone();
            on_disk(&disk, move || open_folder(&config, &env))
                .await
                .map_err(|e| StoreError::Storage(e.to_string()))??
        };
        let Found { lock, mut recovered, snapshots, state, generation } = found;
        let snapshots = Arc::new(snapshots);
        let timing = Timing::of(&config);
        let guard = Arc::new(Guard::default());
        let closed = Arc::new(Mutex::new(None));
        let link = PeerLink {
            node: config.node,
            group: config.group.clone(),
            peers,
            roster: Arc::new(Roster::new(config.members.clone())),
            reach: Arc::new(Reach::new(config.node, u64::try_from(env.now_millis()).unwrap_or(0))),
            generation: Arc::new(AtomicU64::new(generation)),
            closed: closed.clone(),
            probe: timing.ping,
        };
        let eager = Arc::new(Eager::new(link.clone(), guard.clone()));
        let (wal, wal_task) = writer::start(&env, config.dir.clone(), config.segment_bytes, &recovered)?;
        let gauges = wal.gauges.clone();
        let log = recovered.groups.remove(&config.group).unwrap_or_default();
        tracing::info!(
            node = config.node, group = %config.group, revision = state.counters.revision, entries = log.entries.len(),
            torn_bytes = recovered.torn, last = ?log.last_log_id().map(|id| id.index), "opened the metadata store"
        );
        let log = LogStore::new(config.node, config.group.clone(), log, wal, eager.clone(), snapshots.clone());
        let shared = Arc::new(Shared::new(state, config.retention, config.snapshot_after_bytes));
        shared.note_snapshot(snapshots.bytes());
        let supported = config.feature_level;
        let machine = Machine { shared: shared.clone(), snapshots: snapshots.clone(), supported };
        let network = Network {
            link: link.clone(),
            guard: guard.clone(),
            timing,
            eager: eager.clone(),
            snapshots: snapshots.clone(),
        };
        let fatal = |e: &dyn std::fmt::Display| StoreError::Storage(e.to_string());
        let raft_config = Arc::new(raft_config(&config)?);
        let raft = Raft::new(config.node, raft_config, network, log, machine).await.map_err(|e| fatal(&e))?;

        let (seen, leadership) = watch::channel(Leadership::default());
        let (proposals, proposal_queue) = mpsc::channel(propose::QUEUE);
        let (readers, reader_queue) = mpsc::channel(reads::QUEUE);
        let core = Arc::new(Core {
            config,
            env,
            raft,
            shared,
            snapshots,
            gauges,
            link,
            leadership,
            proposals,
            readers,
            leases: LeaseClock::default(),
            incoming: tokio::sync::Mutex::new(None),
            latency: AtomicU64::new(0),
            closed,
            timing,
            guard,
            changing: tokio::sync::Mutex::new(()),
            relayed: AtomicUsize::new(0),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(self::core::follow_leadership(core.clone(), seen));
        tasks.spawn(self::core::save_snapshots(core.clone()));
        tasks.spawn(self::core::announce_progress(core.clone()));
        tasks.spawn(guard::run(core.clone()));
        tasks.spawn(membership::follow(core.clone(), eager.clone()));
        tasks.spawn(membership::watch_links(core.clone()));
        tasks.spawn(membership::tend(core.clone()));
        tasks.spawn(propose::run(core.clone(), proposal_queue));
        tasks.spawn(reads::run(core.clone(), reader_queue));
        tasks.spawn(leases::run(core.clone()));
        tasks.spawn(pressure::run(core.clone()));
        let store = Self {
            core,
            tasks: Mutex::new(tasks),
            wal_task: Mutex::new(Some(wal_task)),
            eager,
            lock: Mutex::new(Some(lock)),
        };
        store.found_cluster().await?;
        Ok(store)
    }

    async fn found_cluster(&self) -> Result<(), StoreError> {
        let core = &self.core;
        let failed = |e: &dyn std::fmt::Display| StoreError::Storage(e.to_string());
        let started = core.raft.is_initialized().await.map_err(|e| failed(&e))?;
        if core.config.founder && !started {
            let members: BTreeMap<u64, BasicNode> =
                core.config.members.iter().map(|(id, endpoint)| (*id, BasicNode::new(endpoint))).collect();
            core.raft.initialize(members).await.map_err(|e| failed(&e))?;
        } else if core.raft.server_metrics().borrow().membership_config.voter_ids().eq([core.config.node]) {
            // Nobody else could lead, so there is nothing to wait for.
            core.raft.trigger().elect().await.map_err(|e| failed(&e))?;
        }
        Ok(())
    }

    /// Answers a message that another member sent by its [`Peers`].
    pub async fn handle(&self, message: Bytes) -> Bytes {
        self.core.answer(message).await
    }

    /// Stops taking requests, ends every watch, and closes the log. Changes that are on their way have an unknown
    /// outcome. Calling it again does nothing.
    pub async fn shutdown(&self) {
        self.core.stop("the store is closed");
        self.core.shared.hub.close();
        self.eager.stop();
        if let Err(e) = self.core.raft.shutdown().await {
            tracing::warn!(error = %e, "consensus ended badly");
        }
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        // The writer ends when the consensus library has dropped the log.
        let wal = self.wal_task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(wal) = wal
            && timeout(SHUTDOWN_LIMIT, wal).await.is_err()
        {
            tracing::warn!("the log was not closed in time");
        }
        self.lock.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// The state as it is now, for a backup. `current` asks a quorum first.
    pub async fn backup_view(&self, current: bool) -> Result<crate::backup::View, StoreError> {
        if current {
            self.core.barrier(false).await.map_err(|f| self.failure(f))?;
        }
        let state = self.core.shared.read().clone();
        let group = self.core.config.group.clone();
        let term = self.core.leadership.borrow().epoch;
        let generation = self.generation();
        Ok(crate::backup::View { state, group, term, generation })
    }

    fn failure(&self, failure: Failure) -> StoreError {
        match failure {
            Failure::NotLeader => self.core.leaderless(),
            Failure::Unavailable(reason) | Failure::Astray(reason) => StoreError::Unavailable { reason },
            Failure::Refused(reason) => StoreError::Membership(reason),
            Failure::Fenced(current) => StoreError::Storage(format!("the group is at generation {current} already")),
            Failure::Unknown(reason) => StoreError::Unknown { reason },
            Failure::Full(reason) => StoreError::Full(reason),
            Failure::Stopped(_) if self.core.closed_on_purpose() => StoreError::Closed,
            Failure::Stopped(reason) => StoreError::Storage(reason),
        }
    }

    async fn command(&self, command: Command) -> Result<Outcome, StoreError> {
        let limit = self.core.config.request_timeout;
        let outcome = self.core.submit(command, limit, false).await.map_err(|f| self.failure(f))?;
        match outcome {
            Outcome::LeaseNotFound(id) => Err(StoreError::LeaseNotFound(id)),
            Outcome::Unreadable => {
                Err(StoreError::Invalid("a member runs a release that can't read this request".into()))
            }
            other => Ok(other),
        }
    }

    fn read(&self, request: &RangeRequest) -> Result<RangeResponse, StoreError> {
        if (1..=SMALL_READ).contains(&request.limit) {
            return self.core.shared.read().range(request);
        }
        let state = self.core.shared.read().clone();
        state.range(request)
    }
}

impl Core {
    fn closed_on_purpose(&self) -> bool {
        self.gauges.failure().is_none()
            && self.closed.lock().unwrap_or_else(PoisonError::into_inner).as_deref() == Some("the store is closed")
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.core.stop("the store is closed");
        self.core.shared.hub.close();
        self.eager.stop();
    }
}

#[async_trait]
impl Store for EmbeddedStore {
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.validate()?;
        match self.command(Command::Txn(txn)).await? {
            Outcome::Txn(outcome) => Ok(outcome),
            other => Err(StoreError::Invalid(format!("a transaction came to {other:?}"))),
        }
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StoreError> {
        match request.consistency {
            Consistency::Linearizable => {
                self.core.barrier(false).await.map_err(|f| self.failure(f))?;
            }
            // A closed store is closed; one whose disk failed can still say what it knew.
            Consistency::Stale if self.core.closed_on_purpose() => return Err(StoreError::Closed),
            Consistency::Stale => {}
        }
        self.read(&request)
    }

    async fn watch(&self, start: Bytes, end: Bytes, after: Revision) -> Result<Watch, StoreError> {
        if self.core.closed_on_purpose() {
            return Err(StoreError::Closed);
        }
        EmbeddedWatch::open(&self.core.shared, (start, end), after, self.core.config.request_timeout).await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).clamp(1, 365 * 86_400_000);
        match self.command(Command::Grant { ttl_ms }).await? {
            Outcome::Granted(id) => Ok(id),
            other => Err(StoreError::Invalid(format!("a lease came to {other:?}"))),
        }
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, StoreError> {
        let core = &self.core;
        let deadline = Instant::now() + core.config.request_timeout;
        let mut reason = "there is no leader".to_owned();
        loop {
            if let Some(stopped) = core.stopped() {
                return Err(self.failure(Failure::Stopped(stopped)));
            }
            let now = *core.leadership.borrow();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(StoreError::Unavailable { reason });
            }
            // Renewing twice does no harm, so every failure may be tried again.
            if now.is_self {
                match core.renew(id, left).await {
                    Ok(ttl) => return ttl.ok_or(StoreError::LeaseNotFound(id)),
                    Err(failure) => reason = format!("{failure:?}"),
                }
            } else if let Some(leader) = now.leader.filter(|l| *l != core.config.node) {
                let request = Request::KeepAlive { id, timeout_ms: left.as_millis() as u64 * 9 / 10 };
                match timeout_at(deadline, core.link.ask(leader, &request, left)).await {
                    Ok(Ok(Response::KeepAlive { ttl_ms })) => return Ok(Duration::from_millis(ttl_ms)),
                    Ok(Ok(Response::LeaseNotFound)) => return Err(StoreError::LeaseNotFound(id)),
                    Ok(Ok(_)) => reason = format!("member {leader} does not lead"),
                    Ok(Err(PeerError::Unreachable(e) | PeerError::Lost(e))) => reason = e,
                    Err(_) => reason = "the leader did not answer in time".into(),
                }
            }
            sleep(Duration::from_millis(50).min(left)).await;
        }
    }

    async fn lease_revoke(&self, id: LeaseId) -> Result<(), StoreError> {
        self.command(Command::Revoke { id }).await.map(drop)
    }

    async fn compact(&self, before: Revision) -> Result<(), StoreError> {
        match self.command(Command::Compact { before }).await? {
            Outcome::Future { current } => Err(StoreError::FutureRevision { asked: before, current }),
            _ => Ok(()),
        }
    }

    async fn status(&self) -> StoreStatus {
        let core = &self.core;
        let leadership = *core.leadership.borrow();
        let watchers = core.shared.hub.watchers() as u64;
        let members = core.members();
        let state = core.shared.read();
        StoreStatus {
            node: core.config.node,
            group: core.config.group.clone(),
            leader: leadership.leader,
            is_leader: leadership.is_self,
            epoch: leadership.epoch,
            applied: state.revision(),
            oldest: state.oldest(),
            members,
            keys: state.counters.live_keys,
            leases: state.leases.len() as u64,
            watchers,
            log_bytes: core.gauges.log_bytes.load(Ordering::Relaxed),
            snapshot_bytes: core.snapshots.bytes(),
            commit_latency: Duration::from_micros(core.latency.load(Ordering::Relaxed)),
            disk_free_bytes: core.gauges.free(),
            state_bytes: state.bytes() as u64,
            pressure: pressure::of(core, &state),
            generation: self.generation(),
            feature_level: state.feature_level(),
            supported_level: core.config.feature_level,
            failure: core.stopped(),
        }
    }

    fn keeps_order(&self) -> bool {
        true
    }

    fn way_to(&self, node: u64) -> Vec<u64> {
        match self.core.link.reach.route(node) {
            Route::Via(hops) => hops,
            Route::Direct | Route::None => Vec::new(),
        }
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.core.leadership.clone()
    }
}

fn raft_config(config: &Config) -> Result<openraft::Config, StoreError> {
    let millis = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    openraft::Config {
        cluster_name: config.group.to_string(),
        heartbeat_interval: millis(config.heartbeat),
        // Elections are driven by `guard`; here it is only how long a voter that has heard a leader refuses another.
        enable_elect: false,
        election_timeout_min: millis(config.election_timeout.0) - 1,
        election_timeout_max: millis(config.election_timeout.0),
        install_snapshot_timeout: 150_000,
        max_payload_entries: 256,
        // A follower is brought up by log as long as the log is there.
        replication_lag_threshold: 10_000_000,
        // Snapshots are triggered by size, not by number of entries.
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: 128,
        ..openraft::Config::default()
    }
    .validate()
    .map_err(|e| StoreError::Invalid(e.to_string()))
}

struct Found {
    lock: Box<dyn DiskLock>,
    recovered: wal::Recovered,
    snapshots: SnapshotDir,
    state: mvcc::State,
    generation: u64,
}

/// Checks that the folder is this member's and of a format that this release reads, and reads it.
fn open_folder(config: &Config, env: &Env) -> Result<Found, StoreError> {
    let storage = |e: std::io::Error| StoreError::Storage(e.to_string());
    let (disk, dir) = (&env.disk, &config.dir);
    disk.create_dir_all(dir).map_err(storage)?;
    let lock = disk.lock(&dir.join(LOCK_FILE)).map_err(storage)?;
    let path = dir.join(FORMAT_FILE);
    let mine = format!("nexus-store {FORMAT}\nnode {}\ngroup {}\n", config.node, config.group);
    if disk.exists(&path).map_err(storage)? {
        let text = String::from_utf8_lossy(&disk.read(&path).map_err(storage)?).into_owned();
        let found = text.lines().next().and_then(|l| l.strip_prefix("nexus-store ")).and_then(|n| n.parse().ok());
        match found {
            Some(found) if found > FORMAT => {
                let path = path.display().to_string();
                return Err(StoreError::NewerFormat { path, found, supported: FORMAT });
            }
            Some(FORMAT) if text == mine => {}
            _ => {
                let reason = format!("it should say {:?} but says {:?}", mine.trim(), text.trim());
                return Err(StoreError::Corrupt { path: path.display().to_string(), offset: 0, reason });
            }
        }
    } else {
        write_atomic(&**disk, &path, mine.as_bytes()).map_err(storage)?;
    }
    let generation = read_generation(&**disk, dir)?;
    let (snapshots, state) = SnapshotDir::open(disk.clone(), dir.clone())?;
    if state.feature_level() > config.feature_level {
        let (path, found, supported) = (dir.display().to_string(), state.feature_level(), config.feature_level);
        return Err(StoreError::NewerFormat { path, found, supported });
    }
    let recovered = wal::recover(&**disk, dir)?;
    Ok(Found { lock, recovered, snapshots, state, generation })
}

/// The group's generation as this member knows it; a folder that says nothing is of the first.
fn read_generation(disk: &dyn nexus_env::Disk, dir: &std::path::Path) -> Result<u64, StoreError> {
    let path = dir.join(GENERATION_FILE);
    let storage = |e: std::io::Error| StoreError::Storage(e.to_string());
    if !disk.exists(&path).map_err(storage)? {
        return Ok(1);
    }
    let text = String::from_utf8_lossy(&disk.read(&path).map_err(storage)?).into_owned();
    text.trim().parse().map_err(|_| StoreError::Corrupt {
        path: path.display().to_string(),
        offset: 0,
        reason: format!("it should hold a number but says {:?}", text.trim()),
    })
}
