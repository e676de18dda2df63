//! This server's copy of the group: loaded once, then kept level by one watch over everything of the group.
//!
//! The copy is the embedded engine's state with its history and its watches, so both engines answer reads and watches
//! by the same code. What is applied is a commit as the journal tells it; the copy is only ever changed by the commit
//! that follows the one before, so a copy at a revision is the same on every server. A gap, a compaction of etcd's
//! history, or a change that no journal announces means: load again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use imbl::OrdSet;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use super::grpc::{Channel, GrpcError, code};
use super::layout::{Extra, Journal, Layout, LeaderMark, Place, Stored};
use super::proto::{
    Event, EventType, KeyValue, RangeRequest, RangeResponse, WatchCreateRequest, WatchRequest, WatchResponse,
    watch_request,
};
use crate::embedded::Retention;
use crate::embedded::machine::Shared;
use crate::embedded::mvcc::{Lease, Slot, State, Version};
use crate::embedded::raft::{Batch, Command};
use crate::types::{LeaseId, Op, Txn, WatchBatch};

/// Commits that are remembered by name, for authors that lost etcd's answer.
const REMEMBERED: usize = 65_536;
/// A page of a load should have about this many bytes.
const PAGE_BYTES: usize = 4 << 20;
const PAGE_KEYS: i64 = 8_192;
/// A silent watch is asked for a sign of life after this, and given up after twice as long.
const SILENCE: Duration = Duration::from_secs(3);
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
const CALL: Duration = Duration::from_secs(10);

/// Why the copy can't go on by watching.
#[derive(Debug)]
enum Gap {
    /// Load it anew.
    Reload(String),
    /// Watch again from where it stopped.
    Broken(GrpcError),
}

impl From<GrpcError> for Gap {
    fn from(e: GrpcError) -> Self {
        Self::Broken(e)
    }
}

struct Inner {
    /// etcd's revision of the newest commit that was applied; 0 before the first.
    journal: i64,
    /// etcd's revision of the newest event that was seen.
    seen: i64,
    commits: VecDeque<u128>,
    /// Leases whose etcd lease lives.
    alive: BTreeSet<u64>,
    /// The servers of the group, with their endpoints.
    servers: BTreeMap<u64, String>,
    /// Counts loads: what was committed between two of them is not known one by one.
    generation: u64,
}

pub struct Mirror {
    pub shared: Arc<Shared>,
    pub layout: Layout,
    pub retention: Retention,
    inner: Mutex<Inner>,
    /// As [`Inner::journal`], to wait on.
    position: watch::Sender<i64>,
    /// Who leads, and since which etcd revision.
    pub leader: watch::Sender<Option<(LeaderMark, i64)>>,
    /// A lease's time may be over.
    pub lease_wake: Notify,
}

/// What a new commit starts from.
pub struct Base {
    pub journal: i64,
    pub generation: u64,
    pub state: State,
}

impl Mirror {
    pub fn new(layout: Layout, retention: Retention) -> Self {
        let inner = Inner {
            journal: 0,
            seen: 0,
            commits: VecDeque::new(),
            alive: BTreeSet::new(),
            servers: BTreeMap::new(),
            generation: 0,
        };
        Self {
            shared: Arc::new(Shared::new(State::default(), retention, u64::MAX)),
            layout,
            retention,
            inner: Mutex::new(inner),
            position: watch::Sender::new(0),
            leader: watch::Sender::new(None),
            lease_wake: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn base(&self) -> Base {
        let inner = self.lock();
        Base { journal: inner.journal, generation: inner.generation, state: self.shared.read().clone() }
    }

    /// Waits until a commit has been applied, by etcd's revision; `false` if it takes longer than `until`.
    pub async fn reached(&self, journal: i64, until: Instant) -> bool {
        let mut position = self.position.subscribe();
        tokio::time::timeout_at(until, position.wait_for(|p| *p >= journal)).await.is_ok_and(|r| r.is_ok())
    }

    /// Whether a commit that was tried in a generation took effect; `None` if that can't be known any more.
    pub fn knows_commit(&self, id: u128, generation: u64) -> Option<bool> {
        let inner = self.lock();
        if inner.commits.contains(&id) {
            return Some(true);
        }
        (inner.generation == generation).then_some(false)
    }

    /// Leases of the group whose etcd lease is gone.
    pub fn leases_over(&self) -> Vec<LeaseId> {
        let inner = self.lock();
        let state = self.shared.read();
        state.leases.keys().filter(|id| !inner.alive.contains(id)).map(|id| LeaseId(*id)).collect()
    }

    pub fn servers(&self) -> BTreeMap<u64, String> {
        self.lock().servers.clone()
    }

    /// The newest etcd revision that this copy has seen.
    pub fn seen(&self) -> i64 {
        self.lock().seen
    }

    /// Takes over the state that this server's own commit led to, unless the watch was faster.
    pub fn adopt(&self, base: i64, journal: i64, commit: &Journal, state: State, changes: &[WatchBatch]) {
        {
            let mut inner = self.lock();
            if inner.journal != base {
                return;
            }
            note(&mut inner, journal, commit);
            self.shared.amend(|now| {
                *now = state;
                changes.to_vec()
            });
        }
        self.position.send_if_modified(|p| std::mem::replace(p, journal.max(*p)) < journal);
    }

    /// Applies what one etcd revision changed.
    fn apply(&self, revision: i64, events: Vec<Event>) -> Result<(), String> {
        let mut commit = None;
        let mut keys: Vec<(Bytes, Option<Bytes>)> = Vec::new();
        let mut leases = Vec::new();
        let mut servers = Vec::new();
        for event in events {
            let Some(kv) = event.kv else { continue };
            let put = event.r#type == EventType::Put as i32;
            match self.layout.place(&kv.key) {
                Place::Journal if put => commit = Some(Journal::decode(&kv.value)?),
                Place::Journal => return Err("the journal was deleted".into()),
                Place::Key(key) => keys.push((key, put.then_some(kv.value))),
                Place::Lease(id) => leases.push((id, put)),
                Place::Leader => {
                    let mark = put.then(|| LeaderMark::decode(&kv.value)).flatten();
                    self.leader.send_replace(mark.map(|mark| (mark, kv.create_revision)));
                }
                Place::Server(node) => servers.push((node, put.then(|| lossy(&kv.value)))),
                Place::Unknown => {}
            }
        }
        let mut inner = self.lock();
        for (node, endpoint) in servers {
            match endpoint {
                Some(endpoint) => drop(inner.servers.insert(node, endpoint)),
                None => drop(inner.servers.remove(&node)),
            }
        }
        inner.seen = inner.seen.max(revision);
        for (id, put) in leases {
            if put {
                inner.alive.insert(id);
            } else if inner.alive.remove(&id) {
                self.lease_wake.notify_one();
            }
        }
        let Some(commit) = commit else {
            let foreign = !keys.is_empty();
            return if foreign { Err("keys were changed without the journal".into()) } else { Ok(()) };
        };
        if revision <= inner.journal {
            return Ok(());
        }
        let mut fault = None;
        self.shared.amend(|state| match replay(state, &commit, keys, &self.retention) {
            Ok(changes) => changes,
            Err(why) => {
                fault = Some(why);
                Vec::new()
            }
        });
        if let Some(why) = fault {
            return Err(why);
        }
        note(&mut inner, revision, &commit);
        drop(inner);
        self.position.send_if_modified(|p| std::mem::replace(p, revision.max(*p)) < revision);
        Ok(())
    }

    /// Loads the group as it is now.
    pub async fn load(&self, channel: &Channel) -> Result<(), String> {
        let until = || Instant::now() + CALL;
        let text = |e: GrpcError| e.to_string();
        let one = RangeRequest { key: self.layout.journal(), ..RangeRequest::default() };
        let journal: RangeResponse = channel.call("/etcdserverpb.KV/Range", &one, until()).await.map_err(text)?;
        let at = journal.header.as_ref().map_or(0, |h| h.revision);
        let mut state = State::default();
        let mut commits = VecDeque::new();
        let mut position = 0;
        if let Some(kv) = journal.kvs.first() {
            let commit = Journal::decode(&kv.value)?;
            position = kv.mod_revision;
            state.counters.revision = commit.revision;
            state.counters.timestamp_ms = commit.timestamp_ms;
            // What came before is not known here.
            state.counters.oldest = commit.revision;
            commits.push_back(commit.id);
        }
        let (start, end) = self.layout.all_leases();
        let mut alive = BTreeSet::new();
        pages(channel, start, end, at, |kv| {
            let Place::Lease(id) = self.layout.place(&kv.key) else { return Ok(()) };
            let ttl_ms = std::str::from_utf8(&kv.value).ok().and_then(|t| t.parse().ok()).unwrap_or(1_000);
            state.leases.insert(id, Lease { ttl_ms, keys: OrdSet::new() });
            alive.insert(id);
            Ok(())
        })
        .await?;
        let (start, end) = self.layout.all_servers();
        let mut servers = BTreeMap::new();
        pages(channel, start, end, at, |kv| {
            let Place::Server(node) = self.layout.place(&kv.key) else { return Ok(()) };
            servers.insert(node, lossy(&kv.value));
            Ok(())
        })
        .await?;
        let (start, end) = self.layout.all_data();
        let mut orphans = BTreeSet::new();
        pages(channel, start, end, at, |kv| {
            let Place::Key(key) = self.layout.place(&kv.key) else { return Ok(()) };
            let Stored { created, modified, lease, value } = Stored::decode(&kv.value)?;
            if lease != 0 && !state.leases.contains_key(&lease) {
                orphans.insert(lease);
            }
            let newest = Version { modified, created, lease, value: Some(value) };
            state.keys.insert(key, Slot { newest, older: None });
            state.counters.live_keys += 1;
            Ok(())
        })
        .await?;
        // Their time is over and their keys still there: someone has to end them.
        for lease in orphans {
            state.leases.insert(lease, Lease { ttl_ms: 1_000, keys: OrdSet::new() });
        }
        state.rebuild();
        let one = RangeRequest { key: self.layout.leader(), revision: at, ..RangeRequest::default() };
        let leader: RangeResponse = channel.call("/etcdserverpb.KV/Range", &one, until()).await.map_err(text)?;
        let leader = leader.kvs.first().and_then(|kv| Some((LeaderMark::decode(&kv.value)?, kv.create_revision)));
        {
            let mut inner = self.lock();
            let generation = inner.generation + 1;
            *inner = Inner { journal: position, seen: at, commits, alive, servers, generation };
            self.shared.load(state);
        }
        self.leader.send_replace(leader);
        self.position.send_replace(position);
        self.lease_wake.notify_one();
        Ok(())
    }

    /// Keeps the copy level until the task is ended.
    pub async fn run(&self, channel: &Channel) {
        let mut pause = PAUSE.0;
        loop {
            let begun = Instant::now();
            let gap = match self.follow(channel).await {
                Ok(never) => match never {},
                Err(gap) => gap,
            };
            if begun.elapsed() > PAUSE.1 {
                pause = PAUSE.0;
            }
            match gap {
                Gap::Broken(error) => tracing::warn!(%error, "the watch over etcd broke; watching again"),
                Gap::Reload(reason) => {
                    tracing::warn!(reason, "the copy of the group can't go on; loading it again");
                    if let Err(error) = self.load(channel).await {
                        tracing::warn!(error, "loading the group failed; trying again");
                    }
                }
            }
            sleep(pause).await;
            pause = PAUSE.1.min(pause * 2);
        }
    }

    async fn follow(&self, channel: &Channel) -> Result<std::convert::Infallible, Gap> {
        let mut stream = channel.stream("/etcdserverpb.Watch/Watch", Instant::now() + CALL).await?;
        let result = self.follow_on(&mut stream).await;
        channel.broke(&stream);
        result
    }

    async fn follow_on(&self, stream: &mut super::grpc::Duplex) -> Result<std::convert::Infallible, Gap> {
        let (key, range_end) = self.layout.all();
        let create = WatchCreateRequest { key, range_end, start_revision: self.seen() + 1 };
        stream.send(&WatchRequest { request: Some(watch_request::Request::Create(create)) })?;
        loop {
            let response: Option<WatchResponse> = match timeout(SILENCE, stream.next()).await {
                Ok(response) => response?,
                Err(_) => {
                    let progress = watch_request::Request::Progress(super::proto::Empty {});
                    stream.send(&WatchRequest { request: Some(progress) })?;
                    stream.next_within(SILENCE).await?
                }
            };
            let Some(response) = response else {
                return Err(GrpcError::Lost("etcd ended the watch".into()).into());
            };
            if response.canceled {
                return Err(match response.compact_revision {
                    0 => GrpcError::Lost(format!("etcd ended the watch: {}", response.cancel_reason)).into(),
                    at => Gap::Reload(format!("etcd has compacted its history up to revision {at}")),
                });
            }
            // etcd never spreads one revision over several answers.
            let mut events = response.events.into_iter().peekable();
            while let Some(first) = events.next() {
                let revision = first.kv.as_ref().map_or(0, |kv| kv.mod_revision);
                let mut together = vec![first];
                while let Some(event) = events.next_if(|e| e.kv.as_ref().is_some_and(|kv| kv.mod_revision == revision))
                {
                    together.push(event);
                }
                self.apply(revision, together).map_err(Gap::Reload)?;
            }
        }
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn note(inner: &mut Inner, journal: i64, commit: &Journal) {
    inner.journal = journal;
    inner.commits.push_back(commit.id);
    if inner.commits.len() > REMEMBERED {
        inner.commits.pop_front();
    }
    match commit.extra {
        Extra::Granted { id, .. } => drop(inner.alive.insert(id)),
        Extra::Ended { id } => drop(inner.alive.remove(&id)),
        Extra::Nothing | Extra::Compacted { .. } => {}
    }
}

/// Does to the state what a commit says, and checks that it fits.
fn replay(
    state: &mut State,
    commit: &Journal,
    keys: Vec<(Bytes, Option<Bytes>)>,
    retention: &Retention,
) -> Result<Vec<WatchBatch>, String> {
    let found = state.counters.revision;
    if commit.base() != found {
        return Err(format!("a commit follows revision {}, but the copy is at {found}", commit.base()));
    }
    let mut changes = Vec::new();
    let mut keys = keys.into_iter();
    for step in &commit.steps {
        let mut ops = Vec::with_capacity(step.events as usize);
        for (key, stored) in keys.by_ref().take(step.events as usize) {
            ops.push(match stored {
                None => Op::Delete { key },
                Some(stored) => {
                    let Stored { lease, value, .. } = Stored::decode(&stored)?;
                    Op::Put { key, value, lease: (lease != 0).then_some(LeaseId(lease)) }
                }
            });
        }
        let command = match commit.extra {
            Extra::Ended { id } => Command::Expire { ids: vec![LeaseId(id)] },
            _ => Command::Txn(Txn { compares: Vec::new(), ops }),
        };
        changes.extend(state.apply(Batch { at_ms: step.at_ms, commands: vec![command] }, retention).changes);
    }
    match commit.extra {
        Extra::Granted { id, ttl_ms } => drop(state.leases.insert(id, Lease { ttl_ms, keys: OrdSet::new() })),
        Extra::Ended { id } => drop(state.leases.remove(&id)),
        Extra::Compacted { before } => state.compact(before),
        Extra::Nothing => {}
    }
    if state.counters.revision != commit.revision {
        let now = state.counters.revision;
        return Err(format!("a commit leads to revision {}, but the copy came to {now}", commit.revision));
    }
    Ok(changes)
}

/// Reads a range at one etcd revision, page by page.
async fn pages(
    channel: &Channel,
    start: Bytes,
    end: Bytes,
    at: i64,
    mut take: impl FnMut(KeyValue) -> Result<(), String>,
) -> Result<(), String> {
    let mut next = start;
    let mut limit = 64;
    loop {
        let request =
            RangeRequest { key: next, range_end: end.clone(), limit, revision: at, ..RangeRequest::default() };
        let until = Instant::now() + CALL;
        let page: RangeResponse = match channel.call("/etcdserverpb.KV/Range", &request, until).await {
            Ok(page) => page,
            Err(GrpcError::Status { code: code::OUT_OF_RANGE, message }) => {
                return Err(format!("the page is gone: {message}"));
            }
            Err(e) => return Err(e.to_string()),
        };
        let Some(last) = page.kvs.last() else { return Ok(()) };
        let mut after = last.key.to_vec();
        after.push(0);
        next = after.into();
        let mut bytes = 0;
        for kv in page.kvs {
            bytes += kv.key.len() + kv.value.len();
            take(kv)?;
        }
        if !page.more {
            return Ok(());
        }
        limit = if bytes > PAGE_BYTES { (limit / 2).max(16) } else { (limit * 2).min(PAGE_KEYS) };
    }
}
