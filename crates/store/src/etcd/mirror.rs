//! This server's copy of the group: loaded once, then kept level by one watch over everything of the group.
//!
//! The copy is the embedded engine's state with its history and its watches, so both engines answer reads and watches
//! by the same code. What is applied is a commit as the journal tells it; the copy is only ever changed by the commit
//! that follows the one before, so a copy at a revision is the same on every server. A gap, a compaction of etcd's
//! history, or a change that no journal announces means: load again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use imbl::OrdSet;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use super::grpc::{Channel, GrpcError, code};
use super::layout::{Extra, Journal, Layout, LeaderMark, Place, Stored};
use super::proto::{
    Empty, Event, EventType, KeyValue, RangeRequest, RangeResponse, WatchCreateRequest, WatchRequest, WatchResponse,
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
/// Of a lease of which only its keys are left.
const ORPHAN_TTL_MS: u64 = 1_000;

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

#[derive(Default)]
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
    /// Those whose mark lives.
    present: BTreeSet<u64>,
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
    /// Epochs of the group go on behind it.
    base: AtomicU64,
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
        Self {
            shared: Arc::new(Shared::new(State::default(), retention, u64::MAX)),
            layout,
            retention,
            inner: Mutex::default(),
            position: watch::Sender::new(0),
            leader: watch::Sender::new(None),
            base: AtomicU64::new(0),
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

    /// The servers of the group, each with whether its mark lives.
    pub fn servers(&self) -> BTreeMap<u64, (String, bool)> {
        let inner = self.lock();
        inner.servers.iter().map(|(node, at)| (*node, (at.clone(), inner.present.contains(node)))).collect()
    }

    /// The epoch of a leader whose mark came into being at an etcd revision.
    pub fn epoch(&self, created: i64) -> u64 {
        self.base.load(Ordering::Relaxed).saturating_add(u64::try_from(created).unwrap_or(0))
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

    /// The other way round.
    pub fn created(&self, epoch: u64) -> i64 {
        i64::try_from(epoch.saturating_sub(self.base.load(Ordering::Relaxed))).unwrap_or(0)
    }

    /// Applies what one etcd revision changed.
    fn apply(&self, revision: i64, events: Vec<Event>) -> Result<(), String> {
        let mut commit = None;
        let mut keys: Vec<(Bytes, Option<Bytes>)> = Vec::new();
        let mut leases = Vec::new();
        let (mut servers, mut present) = (Vec::new(), Vec::new());
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
                Place::Base => return Err("the group was restored".into()),
                Place::Server(node) => servers.push((node, put.then(|| lossy(&kv.value)))),
                Place::Present(node) => present.push((node, put)),
                Place::Unknown => {}
            }
        }
        let mut inner = self.lock();
        for (node, put) in present {
            if put {
                inner.present.insert(node)
            } else {
                inner.present.remove(&node)
            };
        }
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
        let mut state = State::default();
        let mut inner = Inner::default();
        let (mut leader, mut base) = (None, 0);
        let mut leased = BTreeSet::new();
        inner.seen = pages(channel, self.layout.all(), |kv| {
            match self.layout.place(&kv.key) {
                Place::Journal => {
                    let commit = Journal::decode(&kv.value)?;
                    inner.journal = kv.mod_revision;
                    state.counters.revision = commit.revision;
                    state.counters.timestamp_ms = commit.timestamp_ms;
                    // What came before is not known here.
                    state.counters.oldest = commit.revision;
                    inner.commits.push_back(commit.id);
                }
                Place::Key(key) => {
                    let Stored { created, modified, lease, value } = Stored::decode(&kv.value)?;
                    leased.insert(lease);
                    let newest = Version { modified, created, lease, value: Some(value) };
                    state.keys.insert(key, Slot { newest, older: None });
                    state.counters.live_keys += 1;
                }
                Place::Lease(id) => {
                    let ttl_ms = number(&kv.value).unwrap_or(ORPHAN_TTL_MS);
                    state.leases.insert(id, Lease { ttl_ms, keys: OrdSet::new() });
                    inner.alive.insert(id);
                }
                Place::Leader => leader = LeaderMark::decode(&kv.value).map(|mark| (mark, kv.create_revision)),
                Place::Base => base = number(&kv.value).ok_or("the epoch's base is no number")?,
                Place::Server(node) => drop(inner.servers.insert(node, lossy(&kv.value))),
                Place::Present(node) => drop(inner.present.insert(node)),
                Place::Unknown => {}
            }
            Ok(())
        })
        .await?;
        // Their time is over and their keys still there: someone has to end them.
        for lease in leased.into_iter().filter(|id| *id != 0) {
            let orphan = || Lease { ttl_ms: ORPHAN_TTL_MS, keys: OrdSet::new() };
            state.leases.entry(lease).or_insert_with(orphan);
        }
        state.rebuild();
        let position = inner.journal;
        {
            let mut held = self.lock();
            inner.generation = held.generation + 1;
            *held = inner;
            self.shared.load(state);
        }
        self.base.store(base, Ordering::Relaxed);
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
        stream.send(&WatchRequest { create: Some(create), ..WatchRequest::default() })?;
        loop {
            let response: Option<WatchResponse> = match timeout(SILENCE, stream.next()).await {
                Ok(response) => response?,
                Err(_) => {
                    stream.send(&WatchRequest { progress: Some(Empty {}), ..WatchRequest::default() })?;
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

/// A number that is written out as text.
pub fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
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

/// Reads a range at one etcd revision, page by page; answers which.
async fn pages(
    channel: &Channel,
    (start, end): (Bytes, Bytes),
    mut take: impl FnMut(KeyValue) -> Result<(), String>,
) -> Result<i64, String> {
    let mut next = start;
    let (mut limit, mut at) = (64, 0);
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
        if at == 0 {
            at = page.header.as_ref().map_or(0, |h| h.revision);
        }
        let Some(last) = page.kvs.last() else { return Ok(at) };
        let mut after = last.key.to_vec();
        after.push(0);
        next = after.into();
        let mut bytes = 0;
        for kv in page.kvs {
            bytes += kv.key.len() + kv.value.len();
            take(kv)?;
        }
        if !page.more {
            return Ok(at);
        }
        limit = if bytes > PAGE_BYTES { (limit / 2).max(16) } else { (limit * 2).min(PAGE_KEYS) };
    }
}
