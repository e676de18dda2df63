//! The etcd engine: a group of keys in an etcd cluster that somebody else runs.
//!
//! etcd gives durability, order and time to leases; every server keeps a copy of the group in memory, from which it
//! reads, watches and decides. [`grpc`] and [`proto`] speak to etcd, [`layout`] says what is where, [`mirror`] is the
//! copy, [`propose`] commits changes, [`reads`] makes reads linearizable, [`leases`] ends what ran out, [`leader`] says
//! who leads and [`presence`] who is there, [`health`] asks how etcd is, [`restore`] writes a backup into it. ADR 0006
//! tells why it is built so.
//!
//! Architecture invariant: a change is acknowledged when etcd has committed it, and only then shown to anyone.

pub mod grpc;
mod health;
mod layout;
mod leader;
mod leases;
mod mirror;
mod presence;
mod propose;
pub mod proto;
mod reads;
mod restore;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_env::Env;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

pub use self::grpc::{EtcdEndpoint, Login};
pub use self::health::{EndpointHealth, EtcdHealth};
pub use self::restore::restore;

use self::grpc::{Channel, GrpcError, code};
use self::health::Probes;
use self::layout::Layout;
use self::mirror::Mirror;
use self::propose::{Change, Pending, refusal};
use self::proto::{
    Compare, LeaseGrantRequest, LeaseGrantResponse, LeaseRequest, RangeRequest as EtcdRange, TxnRequest,
};
use self::reads::Waiter;
use crate::embedded::Retention;
use crate::embedded::hub::EmbeddedWatch;
use crate::embedded::raft::{Membership, Outcome};
use crate::error::StoreError;
use crate::types::{
    Consistency, GroupId, Leadership, LeaseId, MAX_TXN_OPERATIONS, Member, MemberHealth, Pressure, RangeRequest,
    RangeResponse, Revision, StoreStatus, Txn, TxnOutcome,
};
use crate::{Store, Watch, backup};

/// Keys up to which a read is done under the state's lock; larger ones work on a snapshot beside it.
const SMALL_READ: usize = 256;
/// How often idle watches are told how far the group is.
const ANNOUNCE: Duration = Duration::from_secs(10);
/// How often an etcd that was full is asked whether it still is.
const ROOM: Duration = Duration::from_secs(2);
/// How often the leader has etcd forget old history.
const COMPACT: Duration = Duration::from_secs(60);
/// What etcd is asked to allow in one transaction, the most first.
const OPERATIONS: [usize; 4] = [2_048, 1_024, 512, 256];

/// How one server uses an etcd for one group.
#[derive(Clone)]
pub struct Config {
    pub node: u64,
    pub group: GroupId,
    /// Where others reach this server. Written to etcd, so that every server knows all of them.
    pub endpoint: String,
    /// The members of the etcd cluster, tried in turn.
    pub endpoints: Vec<EtcdEndpoint>,
    /// What every key begins with, such as `/nexus`.
    pub prefix: String,
    pub tls: Option<Arc<tokio_rustls::rustls::ClientConfig>>,
    pub login: Option<Login>,
    /// After how long opening gives up on an etcd that does not answer.
    pub open_timeout: Duration,
    /// How long any one request may take.
    pub request_timeout: Duration,
    /// How long a leader that is silent stays the leader. etcd's own minimum is about two seconds.
    pub election_ttl: Duration,
    /// What this server remembers of the past.
    pub retention: Retention,
    /// The leader has etcd forget history older than this; `None` leaves that to etcd's operator.
    pub compact_after: Option<Duration>,
}

impl Config {
    pub fn new(node: u64, group: GroupId, endpoints: Vec<EtcdEndpoint>) -> Self {
        Self {
            node,
            group,
            endpoint: String::new(),
            endpoints,
            prefix: "/nexus".into(),
            tls: None,
            login: None,
            open_timeout: Duration::from_secs(15),
            request_timeout: Duration::from_secs(5),
            election_ttl: Duration::from_secs(2),
            retention: Retention::default(),
            compact_after: Some(Duration::from_secs(600)),
        }
    }
}

impl Config {
    fn channel(&self, env: &Env) -> Channel {
        Channel::new(env.clone(), self.endpoints.clone(), self.tls.clone(), self.login.clone())
    }

    /// A failure in words that name what an operator can change.
    fn explain(&self, error: &GrpcError) -> String {
        self.diagnose(error).unwrap_or_else(|| error.to_string())
    }

    /// A failure with what an operator can change about it, where that is known.
    fn diagnose(&self, error: &GrpcError) -> Option<String> {
        let user = self.login.as_ref().map(|l| &*l.user);
        let said = error.to_string();
        let advice = match (error, user) {
            (GrpcError::Status { code: code::PERMISSION_DENIED, .. }, Some(user)) => format!(
                "the user {user} needs a role that may read and write below {prefix}/: `etcdctl role grant-permission \
                 ROLE --prefix=true readwrite {prefix}/`, `etcdctl user grant-role {user} ROLE`",
                prefix = self.prefix.trim_end_matches('/')
            ),
            (GrpcError::Status { message, .. }, Some(user)) if message.contains("authentication failed") => {
                format!("it does not know the user {user} with this password")
            }
            (GrpcError::Status { message, .. }, Some(_)) if message.contains("authentication is not enabled") => {
                "leave the user and the password out, or let it have users: `etcdctl auth enable`".to_owned()
            }
            (GrpcError::Status { code: code::PERMISSION_DENIED, .. }, None) => {
                "it wants a user and a password, or a role for the user that this certificate names".to_owned()
            }
            (GrpcError::Status { message, .. }, None) if message.contains("user name is empty") => {
                "it wants a user and a password".to_owned()
            }
            (_, _) if said.contains("UnknownIssuer") || said.contains("BadSignature") => {
                "its certificate is of another authority than the one that is trusted".to_owned()
            }
            (_, _) if said.contains("invalid peer certificate") => {
                "its certificate does not fit: see its names and its time".to_owned()
            }
            (_, _) if said.contains("CertificateRequired") || said.contains("BadCertificate") => {
                "it wants a certificate of its own authority from its clients".to_owned()
            }
            (_, _) if said.contains("corrupt message") || said.contains("handshake eof") => {
                "if it does not speak TLS there, leave the authority out".to_owned()
            }
            _ => return None,
        };
        Some(format!("{said}: {advice}"))
    }
}

/// What the engine's tasks share.
pub struct Core {
    config: Config,
    env: Env,
    channel: Channel,
    probes: Probes,
    mirror: Mirror,
    /// Operations that etcd takes in one transaction.
    max_ops: usize,
    proposals: mpsc::Sender<Pending>,
    readers: mpsc::Sender<Waiter>,
    leadership: watch::Sender<Leadership>,
    /// Microseconds, as a moving average.
    latency: AtomicU64,
    /// etcd has no room, in its words.
    full: Mutex<Option<String>>,
    closed: AtomicBool,
}

impl Core {
    fn note_latency(&self, latency: Duration) {
        let new = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let old = self.latency.load(Ordering::Relaxed);
        let mean = if old == 0 { new } else { old - old / 8 + new / 8 };
        self.latency.store(mean, Ordering::Relaxed);
    }

    fn set_full(&self, reason: Option<String>) {
        *self.full.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    fn lease_wake(&self) {
        self.mirror.lease_wake.notify_one();
    }

    async fn submit(&self, change: Change) -> Result<Outcome, StoreError> {
        if self.is_closed() {
            return Err(StoreError::Closed);
        }
        let deadline = Instant::now() + self.config.request_timeout;
        let (reply, answer) = oneshot::channel();
        let pending = Pending { change, reply, deadline };
        match timeout_at(deadline, self.proposals.send(pending)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(StoreError::Closed),
            Err(_) => return Err(StoreError::Unavailable { reason: "too many changes wait".into() }),
        }
        // The task answers by the deadline; its end takes the answer with it.
        let lost = || StoreError::Unknown { reason: "the store was closed meanwhile".into() };
        match answer.await.unwrap_or_else(|_| Err(lost()))? {
            Outcome::LeaseNotFound(id) => Err(StoreError::LeaseNotFound(id)),
            outcome => Ok(outcome),
        }
    }

    async fn barrier(&self) -> Result<(), StoreError> {
        if self.is_closed() {
            return Err(StoreError::Closed);
        }
        let deadline = Instant::now() + self.config.request_timeout;
        let (reply, answer) = oneshot::channel();
        match timeout_at(deadline, self.readers.send(Waiter { reply, deadline })).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Err(StoreError::Closed),
            Err(_) => return Err(StoreError::Unavailable { reason: "too many reads wait".into() }),
        }
        answer.await.unwrap_or(Err(StoreError::Closed))
    }
}

/// A group in an etcd cluster. Shut it down before it is dropped; a dropped one stops its tasks at once.
pub struct EtcdStore {
    core: Arc<Core>,
    tasks: Mutex<JoinSet<()>>,
}

impl EtcdStore {
    /// Checks that etcd can serve the contract, loads the group and follows it.
    pub async fn open(config: Config, env: Env) -> Result<Self, StoreError> {
        if config.endpoints.is_empty() {
            return Err(StoreError::Invalid("no etcd endpoint is given".into()));
        }
        let channel = config.channel(&env);
        let mirror = Mirror::new(Layout::new(&config.prefix, &config.group), config.retention);
        let deadline = Instant::now() + config.open_timeout;
        let max_ops = operations(&config, &channel, &mirror.layout, deadline).await?;
        while let Err(error) = mirror.load(&channel).await {
            if Instant::now() >= deadline {
                return Err(StoreError::Unavailable { reason: format!("the group can't be read from etcd: {error}") });
            }
            sleep(Duration::from_millis(200)).await;
        }
        let server = proto::PutRequest {
            key: mirror.layout.server(config.node),
            value: config.endpoint.clone().into(),
            lease: 0,
        };
        let told: Result<proto::Empty, _> = channel.call("/etcdserverpb.KV/Put", &server, deadline).await;
        told.map_err(|e| StoreError::Unavailable { reason: config.explain(&e) })?;
        tracing::info!(
            node = config.node, group = %config.group, revision = mirror.shared.read().counters.revision, max_ops,
            "opened the metadata store in etcd"
        );
        let (proposals, proposal_queue) = mpsc::channel(propose::QUEUE);
        let (readers, reader_queue) = mpsc::channel(reads::QUEUE);
        let core = Arc::new(Core {
            probes: Probes::new(&config, &env),
            config,
            env,
            channel,
            mirror,
            max_ops,
            proposals,
            readers,
            leadership: watch::Sender::new(Leadership::default()),
            latency: AtomicU64::new(0),
            full: Mutex::new(None),
            closed: AtomicBool::new(false),
        });
        let mut tasks = JoinSet::new();
        {
            let core = core.clone();
            tasks.spawn(async move { core.mirror.run(&core.channel).await });
        }
        tasks.spawn(propose::run(core.clone(), proposal_queue));
        tasks.spawn(reads::run(core.clone(), reader_queue));
        tasks.spawn(leases::run(core.clone()));
        tasks.spawn(leader::run(core.clone()));
        tasks.spawn(presence::run(core.clone()));
        tasks.spawn(announce(core.clone()));
        tasks.spawn(notice_room(core.clone()));
        tasks.spawn(forget_history(core.clone()));
        Ok(Self { core, tasks: Mutex::new(tasks) })
    }

    /// Gives up the leadership, ends every watch and stops. Changes that are on their way have an unknown outcome.
    pub async fn shutdown(&self) {
        let core = &self.core;
        core.closed.store(true, Ordering::Relaxed);
        core.mirror.shared.hub.close();
        let led = *core.leadership.borrow();
        let mut tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        tasks.shutdown().await;
        self.hand_over().await;
        presence::leave(core).await;
        core.leadership.send_replace(Leadership { leader: None, is_self: false, ..led });
        core.channel.close();
        core.probes.close();
    }

    /// Every server that has entered itself, with whether it is there. None has a vote, and all have what etcd has.
    pub fn members_health(&self) -> Vec<MemberHealth> {
        let servers = self.core.mirror.servers().into_iter();
        let health = |(node, (endpoint, reachable))| MemberHealth {
            node,
            endpoint,
            voter: true,
            reachable,
            matched: None,
            lag_entries: 0,
            clock_skew_ms: None,
            feature_level: 1,
        };
        servers.map(health).collect()
    }

    /// How the etcd cluster itself is.
    pub async fn etcd_health(&self) -> EtcdHealth {
        self.core.probes.ask(&self.core.config).await
    }

    /// Everything that this server knows, for a backup. With `current`, everything that was acknowledged before is in it;
    /// without, no etcd is needed.
    pub async fn backup_view(&self, current: bool) -> Result<backup::View, StoreError> {
        if current {
            self.core.barrier().await?;
        }
        let mut state = self.core.mirror.shared.read().clone();
        let servers = self.core.mirror.servers();
        // As the embedded engine has it, so that either can go on from here.
        let nodes = servers.iter().map(|(node, (at, _))| (*node, openraft::BasicNode::new(at)));
        let nodes: std::collections::BTreeMap<_, _> = nodes.collect();
        let voters = vec![servers.keys().copied().collect()];
        state.counters.membership = Membership::new(None, openraft::Membership::new(voters, nodes));
        state.counters.last_lease = state.leases.keys().next_back().copied().unwrap_or(0);
        let (group, term) = (self.core.config.group.clone(), self.core.leadership.borrow().epoch);
        Ok(backup::View { state, group, term, generation: 1 })
    }

    /// Forgets a server that is gone for good.
    pub async fn forget_server(&self, node: u64) -> Result<(), StoreError> {
        let core = &self.core;
        let request = proto::DeleteRangeRequest { key: core.mirror.layout.server(node), range_end: Bytes::new() };
        let until = Instant::now() + core.config.request_timeout;
        let gone: Result<proto::Empty, _> = core.channel.call("/etcdserverpb.KV/DeleteRange", &request, until).await;
        gone.map(drop).map_err(|e| refusal(core, &e))
    }

    /// Gives up the leadership, if this server has it; whoever is quickest takes it.
    pub async fn hand_over(&self) {
        let core = &self.core;
        let led = *core.leadership.borrow();
        if !led.is_self {
            return;
        }
        let key = core.mirror.layout.leader();
        let resign = TxnRequest {
            compare: vec![Compare::created(key.clone(), core.mirror.created(led.epoch))],
            success: vec![proto::RequestOp::delete(key)],
            failure: Vec::new(),
        };
        let until = Instant::now() + Duration::from_secs(1);
        // If this fails, the others wait until the lease has run out.
        let _: Result<proto::Empty, GrpcError> = core.channel.call("/etcdserverpb.KV/Txn", &resign, until).await;
    }

    fn read(&self, request: &RangeRequest) -> Result<RangeResponse, StoreError> {
        let shared = &self.core.mirror.shared;
        if (1..=SMALL_READ).contains(&request.limit) {
            return shared.read().range(request);
        }
        let state = shared.read().clone();
        state.range(request)
    }
}

impl Drop for EtcdStore {
    fn drop(&mut self) {
        self.core.closed.store(true, Ordering::Relaxed);
        self.core.mirror.shared.hub.close();
        self.core.channel.close();
        self.core.probes.close();
    }
}

/// Finds out how many operations etcd takes at once. One transaction of the contract and the journal must fit.
async fn operations(
    config: &Config,
    channel: &Channel,
    layout: &Layout,
    deadline: Instant,
) -> Result<usize, StoreError> {
    let key = layout.journal();
    let mut wanted = OPERATIONS.into_iter();
    let mut next = wanted.next();
    // A connection that was closed before its reason was read says less than the try before it.
    let mut diagnosis = None;
    while let Some(count) = next {
        let look = EtcdRange { key: key.clone(), keys_only: true, ..EtcdRange::default() };
        let reads = (0..count).map(|_| proto::RequestOp::range(look.clone())).collect();
        let request = TxnRequest { compare: Vec::new(), success: reads, failure: Vec::new() };
        // The last try has its time too, so that its failure is etcd's and not that of haste.
        let until = Instant::now() + Duration::from_secs(5);
        match channel.call::<_, proto::Empty>("/etcdserverpb.KV/Txn", &request, until).await {
            Ok(_) => return Ok(count),
            Err(GrpcError::Status { message, .. }) if message.contains("too many operations") => next = wanted.next(),
            Err(error) => {
                diagnosis = config.diagnose(&error).or(diagnosis);
                if !error.is_passing() || Instant::now() >= deadline {
                    return Err(StoreError::Unavailable { reason: diagnosis.unwrap_or_else(|| error.to_string()) });
                }
                sleep(Duration::from_millis(200)).await;
            }
        }
    }
    let least = MAX_TXN_OPERATIONS + 1;
    Err(StoreError::Invalid(format!(
        "etcd takes fewer than {least} operations in a transaction: start it with --max-txn-ops=1024"
    )))
}

/// Notices that etcd has room again, whether or not anything is written: while none is thought to be there, nobody may try.
async fn notice_room(core: Arc<Core>) {
    loop {
        sleep(ROOM).await;
        let full = core.full.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if full && core.probes.ask(&core.config).await.has_room() {
            tracing::info!(group = %core.config.group, "etcd has room again");
            core.set_full(None);
        }
    }
}

async fn announce(core: Arc<Core>) {
    loop {
        sleep(ANNOUNCE).await;
        let state = core.mirror.shared.read();
        core.mirror.shared.hub.announce(state.revision(), state.counters.timestamp_ms);
    }
}

/// Has etcd forget what is older than configured, while this server leads. Old enough is what this server had seen
/// when it noted it, so nobody whose watch broke for a moment has to load the group again.
async fn forget_history(core: Arc<Core>) {
    let Some(age) = core.config.compact_after else { return };
    let mut noted: std::collections::VecDeque<(Instant, i64)> = std::collections::VecDeque::new();
    loop {
        sleep(COMPACT.min(age)).await;
        noted.push_back((Instant::now(), core.mirror.seen()));
        let mut old = None;
        while noted.front().is_some_and(|(at, _)| at.elapsed() >= age) {
            old = noted.pop_front().map(|(_, revision)| revision);
        }
        if !core.leadership.borrow().is_self {
            continue;
        }
        let Some(revision) = old.filter(|r| *r > 0) else { continue };
        let request = proto::CompactionRequest { revision };
        let until = Instant::now() + core.config.request_timeout;
        match core.channel.call::<_, proto::Empty>("/etcdserverpb.KV/Compact", &request, until).await {
            Ok(_) => tracing::debug!(revision, "etcd forgot old history"),
            // Another group's leader was further.
            Err(GrpcError::Status { code: code::OUT_OF_RANGE, .. }) => {}
            Err(error) => tracing::warn!(%error, revision, "etcd could not be compacted"),
        }
    }
}

#[async_trait]
impl Store for EtcdStore {
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        txn.validate()?;
        match self.core.submit(Change::Txn(txn)).await? {
            Outcome::Txn(outcome) => Ok(outcome),
            other => Err(StoreError::Invalid(format!("a transaction came to {other:?}"))),
        }
    }

    /// Batches are transactions of etcd, of which several are on their way, and a refused one is tried again.
    fn keeps_order(&self) -> bool {
        false
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StoreError> {
        match request.consistency {
            Consistency::Linearizable => self.core.barrier().await?,
            Consistency::Stale if self.core.is_closed() => return Err(StoreError::Closed),
            Consistency::Stale => {}
        }
        self.read(&request)
    }

    async fn watch(&self, start: Bytes, end: Bytes, after: Revision) -> Result<Watch, StoreError> {
        if self.core.is_closed() {
            return Err(StoreError::Closed);
        }
        let limit = self.core.config.request_timeout;
        EmbeddedWatch::open(&self.core.mirror.shared, (start, end), after, limit).await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let core = &self.core;
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).clamp(1, 365 * 86_400_000);
        let until = Instant::now() + core.config.request_timeout;
        // etcd counts in seconds, and may give more than asked.
        let request = LeaseGrantRequest { ttl: ttl_ms.div_ceil(1_000) as i64, id: 0 };
        let granted: LeaseGrantResponse = core
            .channel
            .call("/etcdserverpb.Lease/LeaseGrant", &request, until)
            .await
            // A lease that nobody knows ends by itself.
            .map_err(|e| refusal(core, &e))?;
        let id = u64::try_from(granted.id).unwrap_or(0);
        match core.submit(Change::Grant { id, ttl_ms }).await {
            Ok(Outcome::Granted(id)) => Ok(id),
            Ok(other) => Err(StoreError::Invalid(format!("a lease came to {other:?}"))),
            Err(error) => Err(error),
        }
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, StoreError> {
        if self.core.is_closed() {
            return Err(StoreError::Closed);
        }
        leases::keep_alive(&self.core, id).await
    }

    async fn lease_revoke(&self, id: LeaseId) -> Result<(), StoreError> {
        self.core.submit(Change::End { id }).await?;
        let request = LeaseRequest { id: id.0 as i64 };
        let until = Instant::now() + Duration::from_secs(1);
        // Only its mark gave it a meaning, and that is gone; what is left ends by itself.
        let _: Result<proto::Empty, GrpcError> =
            self.core.channel.call("/etcdserverpb.Lease/LeaseRevoke", &request, until).await;
        Ok(())
    }

    async fn compact(&self, before: Revision) -> Result<(), StoreError> {
        match self.core.submit(Change::Compact { before }).await? {
            Outcome::Future { current } => Err(StoreError::FutureRevision { asked: before, current }),
            _ => Ok(()),
        }
    }

    async fn status(&self) -> StoreStatus {
        let core = &self.core;
        let leadership = *core.leadership.borrow();
        let full = core.full.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let shared = &core.mirror.shared;
        let watchers = shared.hub.watchers() as u64;
        let members = core.mirror.servers().into_iter();
        let members = members.map(|(id, (endpoint, _))| (id, Member { endpoint, voter: true })).collect();
        let state = shared.read();
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
            log_bytes: 0,
            snapshot_bytes: 0,
            commit_latency: Duration::from_micros(core.latency.load(Ordering::Relaxed)),
            disk_free_bytes: None,
            state_bytes: state.bytes() as u64,
            pressure: full.map_or(Pressure::None, Pressure::Full),
            generation: 1,
            feature_level: 1,
            supported_level: 1,
            failure: core.is_closed().then(|| "the store is closed".to_owned()),
        }
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.core.leadership.subscribe()
    }
}
