//! What the embedded engine's parts share, and the answers to other members' messages.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nexus_env::{Env, File, on_disk, write_atomic};
use openraft::raft::{AppendEntriesResponse, SnapshotResponse};
use openraft::{ServerState, Snapshot};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout_at};

use super::Config;
use super::guard::{Guard, Timing};
use super::leases::LeaseClock;
use super::machine::Shared;
use super::network::PeerLink;
use super::peers::Envelope;
use super::propose::Pending;
use super::raft::{Command, Failure, LogId, Outcome, Raft, Request, Response, SnapshotChunk, decode, encode};
use super::reads::Waiter;
use super::snapshot::{SnapshotDir, SnapshotFile};
use super::writer::Gauges;
use crate::types::{Leadership, LeaseId};

/// How often a leader asks itself whether a quorum still answers.
const QUORUM_CHECK: Duration = Duration::from_millis(500);
/// Messages that this member passes on at once; more are refused, and their senders find another way.
const RELAYED: usize = 256;
/// Idle watchers are told how far the store is this long after a change.
const ANNOUNCE_AFTER: Duration = Duration::from_secs(5);

/// A snapshot that is arriving.
pub struct Incoming {
    last: Option<LogId>,
    path: PathBuf,
    file: Box<dyn File>,
    len: u64,
}

pub struct Core {
    pub config: Config,
    pub env: Env,
    pub raft: Raft,
    pub shared: Arc<Shared>,
    pub snapshots: Arc<SnapshotDir>,
    pub gauges: Arc<Gauges>,
    pub link: PeerLink,
    pub leadership: watch::Receiver<Leadership>,
    pub proposals: mpsc::Sender<Pending>,
    pub readers: mpsc::Sender<Waiter>,
    pub leases: LeaseClock,
    pub incoming: tokio::sync::Mutex<Option<Incoming>>,
    /// Microseconds.
    pub latency: AtomicU64,
    pub closed: Arc<Mutex<Option<String>>>,
    pub timing: Timing,
    pub guard: Arc<Guard>,
    /// Held while the membership is being changed.
    pub changing: tokio::sync::Mutex<()>,
    /// Messages that are being passed on to other members.
    pub relayed: AtomicUsize,
}

impl Core {
    /// Why this member's store takes no more work, if it doesn't.
    pub fn stopped(&self) -> Option<String> {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).clone().or_else(|| self.gauges.failure())
    }

    pub fn stop(&self, reason: &str) {
        self.closed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| reason.to_owned());
    }

    /// Moving average over about the last eight commits.
    pub fn note_latency(&self, took: Duration) {
        let micros = took.as_micros() as u64;
        let old = self.latency.load(Ordering::Relaxed);
        let new = if old == 0 { micros } else { (old * 7 + micros) / 8 };
        self.latency.store(new.max(1), Ordering::Relaxed);
    }

    /// Queues a command and waits for its outcome.
    pub async fn submit(&self, command: Command, limit: Duration, local_only: bool) -> Result<Outcome, Failure> {
        if let Some(reason) = self.stopped() {
            return Err(Failure::Stopped(reason));
        }
        let deadline = Instant::now() + limit;
        let (reply, outcome) = oneshot::channel();
        let pending = Pending { command, reply, deadline, local_only };
        match timeout_at(deadline, self.proposals.send(pending)).await {
            Err(_) => return Err(Failure::Unavailable("too many changes are waiting".into())),
            Ok(Err(_)) => return Err(Failure::Stopped("the store is closed".into())),
            Ok(Ok(())) => {}
        }
        // The batch answers by the deadline; the second is for a machine that is too busy to be on time.
        match timeout_at(deadline + Duration::from_secs(1), outcome).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Failure::Unknown("the store was closed meanwhile".into())),
            Err(_) => Err(Failure::Unknown("no outcome came in time".into())),
        }
    }

    /// Waits until this member has applied everything that was acknowledged before the call.
    pub async fn barrier(&self, local_only: bool) -> Result<u64, Failure> {
        self.barrier_within(self.config.request_timeout, local_only).await
    }

    pub async fn barrier_within(&self, limit: Duration, local_only: bool) -> Result<u64, Failure> {
        if let Some(reason) = self.stopped() {
            return Err(Failure::Stopped(reason));
        }
        let deadline = Instant::now() + limit;
        let (reply, done) = oneshot::channel();
        match timeout_at(deadline, self.readers.send(Waiter { reply, deadline, local_only })).await {
            Err(_) => return Err(Failure::Unavailable("too many reads are waiting".into())),
            Ok(Err(_)) => return Err(Failure::Stopped("the store is closed".into())),
            Ok(Ok(())) => {}
        }
        match timeout_at(deadline + Duration::from_secs(1), done).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(Failure::Stopped("the store was closed meanwhile".into())),
            Err(_) => Err(Failure::Unavailable("no quorum answered in time".into())),
        }
    }

    /// Renews a lease as its leader.
    pub async fn renew(&self, id: LeaseId, limit: Duration) -> Result<Option<Duration>, Failure> {
        // A leader that was replaced without knowing must not say that a lease lives.
        self.barrier_within(limit, true).await?;
        let ttl = self.shared.read().leases.get(&id.0).map(|l| Duration::from_millis(l.ttl_ms));
        Ok(ttl.filter(|ttl| self.leases.renew(id, self.env.monotonic() + *ttl)))
    }

    /// Answers another member.
    pub async fn answer(self: &Arc<Self>, message: Bytes) -> Bytes {
        let (envelope, body) = match Envelope::open(&message) {
            Ok(opened) => opened,
            Err(e) => return encode(&Response::Failed(Failure::Unavailable(e.to_string()))),
        };
        if let Err(failure) = self.check_generation(envelope.generation).await {
            return encode(&Response::Failed(failure));
        }
        let me = self.config.node;
        let meant = envelope.hops.first().copied().unwrap_or(envelope.to);
        if meant != me {
            let text = format!("the message is for member {meant}, and this is member {me}");
            return encode(&Response::Failed(Failure::Astray(text)));
        }
        if !envelope.hops.is_empty() {
            let to = envelope.to;
            if self.relayed.fetch_add(1, Ordering::Relaxed) >= RELAYED {
                self.relayed.fetch_sub(1, Ordering::Relaxed);
                let reason = "too many messages are being passed on".to_owned();
                return encode(&Response::NotPassed { from: me, to, sent: false, reason });
            }
            let _one = Relaying(&self.relayed);
            return self.link.pass_on(envelope, &body).await;
        }
        let response = match decode::<Request>(&body) {
            Ok(request) => self.respond(envelope.from, request).await,
            Err(e) => Response::Failed(Failure::Unavailable(e.to_string())),
        };
        encode(&response)
    }

    /// Refuses who is of an earlier generation, and stops if this member is.
    async fn check_generation(&self, theirs: u64) -> Result<(), Failure> {
        let mine = self.link.generation.load(Ordering::SeqCst);
        if theirs < mine {
            return Err(Failure::Fenced(mine));
        }
        if theirs > mine {
            // A member that has not begun belongs to whatever group takes it in.
            if matches!(self.raft.is_initialized().await, Ok(false)) {
                let (disk, path) = (self.env.disk.clone(), self.config.dir.join(super::GENERATION_FILE));
                let text = format!("{theirs}\n");
                let written = on_disk(&self.env.disk, move || write_atomic(&*disk, &path, text.as_bytes())).await;
                match written.and_then(|w| w) {
                    Ok(()) => self.link.generation.store(theirs, Ordering::SeqCst),
                    Err(e) => return Err(Failure::Unavailable(format!("the generation can't be written: {e}"))),
                }
            } else {
                self.link.fence(theirs);
            }
        }
        Ok(())
    }

    async fn respond(self: &Arc<Self>, from: u64, request: Request) -> Response {
        if let Some(reason) = self.stopped() {
            return Response::Failed(Failure::Stopped(reason));
        }
        let stopped = |e: String| Response::Failed(Failure::Stopped(e));
        match request {
            Request::Append(rpc) => {
                // A leader is heard while its entries are being written, too.
                if rpc.vote >= self.raft.server_metrics().borrow().vote {
                    self.guard.hear();
                }
                let answer = self.raft.append_entries(rpc).await;
                if matches!(&answer, Ok(answer) if !matches!(answer, AppendEntriesResponse::HigherVote(_))) {
                    self.guard.hear();
                }
                answer.map_or_else(|e| stopped(e.to_string()), Response::Append)
            }
            Request::Vote(rpc) => self.raft.vote(rpc).await.map_or_else(|e| stopped(e.to_string()), Response::Vote),
            Request::Snapshot(chunk) => {
                if chunk.vote >= self.raft.server_metrics().borrow().vote {
                    self.guard.hear();
                }
                self.receive(chunk)
                    .await
                    .unwrap_or_else(|e| Response::Failed(Failure::Unavailable(format!("snapshot not taken: {e}"))))
            }
            Request::Ping(links) => {
                self.link.reach.learn(links);
                Response::Pong(self.pong(from))
            }
            Request::PreVote { last } => self.pre_vote(from, last),
            Request::TakeOver => {
                self.raft.trigger().elect().await.map_or_else(|e| stopped(e.to_string()), |()| Response::Done)
            }
            Request::Change(change) => {
                self.change_here(change).await.map_or_else(Response::Failed, |()| Response::Done)
            }
            Request::Health => self.health_here().map_or_else(Response::Failed, Response::Health),
            Request::Forward { commands, timeout_ms } => {
                if !self.leadership.borrow().is_self {
                    return Response::Failed(Failure::NotLeader);
                }
                let limit = Duration::from_millis(timeout_ms).min(self.config.request_timeout);
                let all = commands.into_iter().map(|command| self.submit(command, limit, true));
                Response::Forward(join_all(all).await)
            }
            Request::ReadIndex { timeout_ms } => {
                let limit = Duration::from_millis(timeout_ms).min(self.config.request_timeout);
                self.barrier_within(limit, true).await.map_or_else(Response::Failed, Response::ReadIndex)
            }
            Request::KeepAlive { id, timeout_ms } => {
                let limit = Duration::from_millis(timeout_ms).min(self.config.request_timeout);
                match self.renew(id, limit).await {
                    Ok(Some(ttl)) => Response::KeepAlive { ttl_ms: ttl.as_millis() as u64 },
                    Ok(None) => Response::LeaseNotFound,
                    Err(failure) => Response::Failed(failure),
                }
            }
        }
    }

    async fn receive(&self, chunk: SnapshotChunk) -> std::io::Result<Response> {
        // What has been applied here need not be sent: the leader only wants to know that it is there.
        if chunk.offset == 0 && self.shared.read().counters.applied >= chunk.meta.last_log_id {
            let vote = self.raft.server_metrics().borrow().vote;
            return Ok(Response::SnapshotDone(SnapshotResponse::new(vote)));
        }
        let mut slot = self.incoming.lock().await;
        if chunk.offset == 0 {
            if let Some(old) = slot.take() {
                self.snapshots.discard(&old.path);
            }
            let (path, file) = self.snapshots.begin_incoming()?;
            *slot = Some(Incoming { last: chunk.meta.last_log_id, path, file, len: 0 });
        }
        // A piece whose answer got lost is sent again.
        let again = |i: &Incoming| {
            i.last == chunk.meta.last_log_id && chunk.offset > 0 && i.len == chunk.offset + chunk.data.len() as u64
        };
        if !chunk.done && slot.as_ref().is_some_and(again) {
            return Ok(Response::SnapshotMore);
        }
        let matches = |i: &Incoming| i.last == chunk.meta.last_log_id && i.len == chunk.offset;
        let Some(mut incoming) = slot.take_if(|i| matches(i)) else {
            return Err(std::io::Error::other("the pieces are out of order"));
        };
        let (data, done) = (chunk.data, chunk.done);
        let written = on_disk(&self.env.disk, move || {
            incoming.file.append(&data)?;
            incoming.len += data.len() as u64;
            if done {
                incoming.file.sync()?;
            }
            Ok::<_, std::io::Error>(incoming)
        });
        let incoming = written.await??;
        if !done {
            *slot = Some(incoming);
            return Ok(Response::SnapshotMore);
        }
        drop(slot);
        let file = SnapshotFile { path: incoming.path.clone(), len: incoming.len };
        let snapshot = Snapshot { meta: chunk.meta, snapshot: Box::new(file) };
        let answer = self.raft.install_full_snapshot(chunk.vote, snapshot).await;
        // If the leader was too old, the file is still under its temporary name.
        self.snapshots.discard(&incoming.path);
        answer.map(Response::SnapshotDone).map_err(std::io::Error::other)
    }
}

/// Counts a message that is being passed on for as long as it lives.
struct Relaying<'a>(&'a AtomicUsize);

impl Drop for Relaying<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Awaits all of a bounded list in order; they progress together because each is only a place in a queue.
async fn join_all<T>(all: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut waiting: Vec<_> = all.map(|f| (Box::pin(f), None)).collect();
    std::future::poll_fn(|cx| {
        let mut pending = false;
        for (future, result) in &mut waiting {
            if result.is_none() {
                match future.as_mut().poll(cx) {
                    std::task::Poll::Ready(value) => *result = Some(value),
                    std::task::Poll::Pending => pending = true,
                }
            }
        }
        if pending { std::task::Poll::Pending } else { std::task::Poll::Ready(()) }
    })
    .await;
    waiting.into_iter().filter_map(|(_, result)| result).collect()
}

/// Keeps the leadership that others see: a leader that no quorum answers is none.
pub async fn follow_leadership(core: Arc<Core>, seen: watch::Sender<Leadership>) {
    let mut metrics = core.raft.server_metrics();
    let all = core.raft.metrics();
    let stale = core.config.election_timeout.1 * 2;
    loop {
        let (leads, leader, epoch, given_up) = {
            let m = metrics.borrow_and_update();
            let given_up = !core.guard.may_lead(&m.vote);
            (m.state == ServerState::Leader, m.current_leader, m.vote.leader_id.term, given_up)
        };
        let (silent, failure) = {
            let m = all.borrow();
            let silent = m.millis_since_quorum_ack.is_some_and(|ms| u128::from(ms) > stale.as_millis());
            (silent || given_up, m.running_state.as_ref().err().map(ToString::to_string))
        };
        if let Some(failure) = failure {
            core.stop(&failure);
            seen.send_replace(Leadership { leader: None, epoch, is_self: false });
            core.shared.hub.close();
            return;
        }
        let is_self = leads && !silent;
        let leader = if leads && silent { None } else { leader };
        let now = Leadership { leader, epoch, is_self };
        seen.send_if_modified(|old| std::mem::replace(old, now) != now);
        let check = async {
            if leads {
                sleep(QUORUM_CHECK).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            biased;
            changed = metrics.changed() => if changed.is_err() {
                core.stop("consensus has stopped");
                seen.send_replace(Leadership { leader: None, epoch, is_self: false });
                core.shared.hub.close();
                return;
            },
            () = check => {}
        }
    }
}

/// Saves the state when enough of the log has built up since the last time.
pub async fn save_snapshots(core: Arc<Core>) {
    loop {
        core.shared.snapshot_wake.notified().await;
        if core.shared.snapshot_due(core.snapshots.is_sending()) && core.raft.trigger().snapshot().await.is_err() {
            return;
        }
        // While one is being written, every entry wakes this loop again.
        sleep(Duration::from_millis(200)).await;
    }
}

/// Tells idle watchers how far the store is.
pub async fn announce_progress(core: Arc<Core>) {
    let mut told = core.shared.read().counters.revision;
    loop {
        if !core.shared.reached(|p| p.revision != told).await {
            return;
        }
        sleep(ANNOUNCE_AFTER).await;
        let state = core.shared.read();
        told = state.counters.revision;
        core.shared.hub.announce(state.revision(), state.counters.timestamp_ms);
    }
}
