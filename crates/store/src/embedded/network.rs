//! What the consensus library says to other members, over the [`Peers`](super::Peers) that the server provides.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nexus_env::on_disk;
use openraft::error::{Fatal, NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError};
use openraft::network::{RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::{BasicNode, Snapshot};
use tokio::time::{Instant, sleep, timeout_at};

use super::eager::SharedEager;
use super::guard::{Guard, Timing};
use super::peers::{Envelope, PeerRef, Peers, Roster};
use super::raft::{Failure, Request, Response, SnapshotChunk, TypeConfig, Vote, decode, encode};
use super::reach::{Reach, Route};
use super::snapshot::SnapshotDir;
use crate::error::PeerError;
use crate::types::GroupId;

/// A piece of a snapshot in one message.
const CHUNK: usize = 512 * 1024;
/// One chunk, or (the last one) checking and loading a large snapshot.
const CHUNK_DEADLINE: Duration = Duration::from_secs(5);
const INSTALL_DEADLINE: Duration = Duration::from_secs(120);
/// Between tries to reach a member that is down.
const BACKOFF: Duration = Duration::from_millis(200);

/// How often a message is tried by one way or another.
const TRIES: usize = 5;

/// [`Peers`] for one group, speaking our messages by whatever way leads to the member.
#[derive(Clone)]
pub struct PeerLink {
    pub node: u64,
    pub group: GroupId,
    pub peers: Arc<dyn Peers>,
    pub roster: Arc<Roster>,
    pub reach: Arc<Reach>,
    pub generation: Arc<AtomicU64>,
    /// Why this member has stopped for good, if it has.
    pub closed: Arc<Mutex<Option<String>>>,
    /// What a call that is not known to get through waits at most.
    pub probe: Duration,
}

/// What became of one try.
enum Tried {
    Answered(Bytes),
    /// It was certainly not handled.
    NotSent(String),
    /// It may have been handled.
    Lost(String),
}

impl PeerLink {
    pub fn message(&self, request: &Request) -> Bytes {
        encode(request)
    }

    pub async fn ask(&self, to: u64, request: &Request, limit: Duration) -> Result<Response, PeerError> {
        self.send(to, self.message(request), request.is_repeatable(), limit).await
    }

    /// Sends an encoded request, directly or through others, for at most `limit`. `again`: it may be sent anew after a
    /// try without an answer.
    pub async fn send(&self, to: u64, body: Bytes, again: bool, limit: Duration) -> Result<Response, PeerError> {
        let deadline = Instant::now() + limit;
        let mut trouble = PeerError::Unreachable(format!("no way to member {to} is known"));
        for _ in 0..TRIES {
            let sent = Instant::now();
            if sent >= deadline {
                break;
            }
            let (tried, may_switch) = match self.reach.route(to) {
                Route::Direct => {
                    let call = timeout_at(deadline, self.direct(to, to, Vec::new(), &body, deadline));
                    let tried = tokio::select! {
                        biased;
                        tried = call => tried.unwrap_or_else(|_| Tried::Lost("no answer in time".into())),
                        () = self.reach.fails_after(to, sent), if again => Tried::Lost("the link failed".into()),
                    };
                    (tried, true)
                }
                Route::Via(hops) => {
                    let call = self.direct(hops[0], to, hops, &body, deadline);
                    (timeout_at(deadline, call).await.unwrap_or_else(|_| Tried::Lost("no answer in time".into())), true)
                }
                // Perhaps it is back and no ping has found out yet.
                Route::None => {
                    let call = self.direct(to, to, Vec::new(), &body, deadline);
                    let limit = deadline.min(sent + self.probe);
                    let tried = timeout_at(limit, call).await;
                    (tried.unwrap_or_else(|_| Tried::Lost("no answer, and no other way is known".into())), false)
                }
            };
            trouble = match tried {
                Tried::Answered(answer) => match decode(&answer) {
                    Ok(Response::NotPassed { from, to: next, sent, reason }) => {
                        self.reach.avoid(from, next);
                        let text = format!("member {from} could not pass it on to {next}: {reason}");
                        if sent { PeerError::Lost(text) } else { PeerError::Unreachable(text) }
                    }
                    Ok(Response::Failed(Failure::Astray(reason))) => PeerError::Unreachable(reason),
                    Ok(Response::Failed(Failure::Fenced(current))) => {
                        self.fence(current);
                        return Ok(Response::Failed(Failure::Fenced(current)));
                    }
                    Ok(response) => {
                        if !matches!(response, Response::Failed(_)) {
                            self.reach.answered(to, sent);
                        }
                        return Ok(response);
                    }
                    Err(e) => return Err(PeerError::Lost(e.to_string())),
                },
                Tried::NotSent(reason) => PeerError::Unreachable(reason),
                Tried::Lost(reason) => PeerError::Lost(reason),
            };
            let lost = matches!(trouble, PeerError::Lost(_));
            // Another try makes sense only by another way.
            if (lost && !again) || !may_switch || self.reach.route(to) == Route::Direct {
                break;
            }
        }
        Err(trouble)
    }

    /// One call to the next member on the way.
    async fn direct(&self, next: u64, to: u64, hops: Vec<u64>, body: &[u8], deadline: Instant) -> Tried {
        let Some(peer) = self.roster.find(next) else {
            return Tried::NotSent(format!("node {next} is not a member"));
        };
        let sent = Instant::now();
        let left = deadline.saturating_duration_since(sent).as_millis();
        let envelope = Envelope {
            generation: self.generation.load(Ordering::SeqCst),
            from: self.node,
            to,
            budget_ms: u32::try_from(left).unwrap_or(u32::MAX),
            hops,
        };
        self.call(&peer, envelope.seal(body), sent).await
    }

    async fn call(&self, peer: &PeerRef, message: Bytes, sent: Instant) -> Tried {
        match self.peers.call(peer, &self.group, message).await {
            Ok(answer) => {
                self.reach.heard(peer.node, sent);
                Tried::Answered(answer)
            }
            Err(PeerError::Unreachable(reason)) => {
                self.reach.failed(peer.node, sent);
                self.roster.try_other(peer);
                Tried::NotSent(reason)
            }
            Err(PeerError::Lost(reason)) => {
                self.reach.failed(peer.node, sent);
                Tried::Lost(reason)
            }
        }
    }

    /// Asks over the direct link and no other, and learns from it whether that link is up.
    pub async fn ping(&self, to: u64, request: &Request, limit: Duration) -> Option<Response> {
        let sent = Instant::now();
        let message = self.message(request);
        let call = self.direct(to, to, Vec::new(), &message, sent + limit);
        match tokio::time::timeout(limit, call).await {
            Ok(Tried::Answered(answer)) => match decode(&answer) {
                Ok(Response::Failed(failure)) => {
                    if let Failure::Fenced(current) = failure {
                        self.fence(current);
                    }
                    // A member that has stopped, or another one at its place, is as good as none.
                    self.reach.failed(to, Instant::now());
                    None
                }
                Ok(response) => {
                    self.reach.answered(to, sent);
                    Some(response)
                }
                Err(_) => None,
            },
            Ok(_) => None,
            Err(_) => {
                self.reach.failed(to, sent);
                None
            }
        }
    }

    /// Passes a message on, as its next hop. Answers what comes back, or [`Response::NotPassed`].
    pub async fn pass_on(&self, mut envelope: Envelope, body: &[u8]) -> Bytes {
        envelope.hops.remove(0);
        let next = envelope.hops.first().copied().unwrap_or(envelope.to);
        let not_passed =
            |sent: bool, reason: String| encode(&Response::NotPassed { from: self.node, to: next, sent, reason });
        if self.reach.is_down(next) {
            return not_passed(false, "the link is down".into());
        }
        let Some(peer) = self.roster.find(next) else {
            return not_passed(false, format!("node {next} is not a member"));
        };
        // The first sender gives up at its own deadline; what is left of it gets shorter with every hop.
        envelope.budget_ms = envelope.budget_ms / 10 * 9;
        let (sent, limit) = (Instant::now(), Duration::from_millis(u64::from(envelope.budget_ms)));
        let call = self.call(&peer, envelope.seal(body), sent);
        tokio::select! {
            biased;
            tried = tokio::time::timeout(limit, call) => match tried {
                Ok(Tried::Answered(answer)) => answer,
                Ok(Tried::NotSent(reason)) => not_passed(false, reason),
                Ok(Tried::Lost(reason)) => not_passed(true, reason),
                Err(_) => not_passed(true, "no answer in time".into()),
            },
            () = self.reach.fails_after(next, sent) => not_passed(true, "the link failed".into()),
        }
    }

    /// Stops this member if the group has gone on in a later generation without it.
    pub fn fence(&self, current: u64) {
        let mine = self.generation.load(Ordering::SeqCst);
        if current > mine {
            self.close(&format!(
                "fenced: group {} began anew as generation {current} and this member is of generation {mine}; to \
                 bring it back, remove its data folder and let it join",
                self.group
            ));
        }
    }

    pub fn close(&self, reason: &str) {
        let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        if closed.is_none() {
            tracing::warn!(group = %self.group, reason, "the store stops");
            *closed = Some(reason.to_owned());
        }
    }
}

pub struct Network {
    pub link: PeerLink,
    pub guard: Arc<Guard>,
    pub timing: Timing,
    pub eager: SharedEager,
    pub snapshots: Arc<SnapshotDir>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        self.link.roster.learn([(target, node.addr.clone())]);
        Peer {
            target,
            link: self.link.clone(),
            guard: self.guard.clone(),
            timing: self.timing,
            eager: self.eager.clone(),
            snapshots: self.snapshots.clone(),
        }
    }
}

/// One other member.
pub struct Peer {
    target: u64,
    link: PeerLink,
    guard: Arc<Guard>,
    timing: Timing,
    eager: SharedEager,
    snapshots: Arc<SnapshotDir>,
}

type RpcError = RPCError<u64, BasicNode, RaftError<u64>>;

fn unexpected(response: &Response) -> NetworkError {
    let text = match response {
        Response::Failed(Failure::Stopped(reason)) => format!("the peer has stopped: {reason}"),
        Response::Failed(failure) => format!("the peer refused: {failure:?}"),
        _ => "the peer answered something else".to_owned(),
    };
    NetworkError::new(&std::io::Error::other(text))
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        _option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, RpcError> {
        let failed = |reason: String| RPCError::Network(NetworkError::new(&std::io::Error::other(reason)));
        if !self.guard.may_lead(&rpc.vote) {
            sleep(BACKOFF).await;
            return Err(failed("this leader has given up".into()));
        }
        let (vote, last) = (rpc.vote, rpc.entries.last().map(|e| e.log_id));
        if last.is_some() && self.eager.answer(self.target, &rpc).await {
            return Ok(AppendEntriesResponse::Success);
        }
        let sent = Instant::now();
        let limit = if last.is_none() { self.timing.heartbeat } else { self.timing.entries };
        let request = Request::Append(rpc);
        let message = self.link.message(&request);
        match self.link.send(self.target, message, true, limit).await {
            Ok(Response::Append(answer)) => {
                if let (AppendEntriesResponse::Success, Some(last)) = (&answer, last) {
                    self.eager.caught_up(self.target, vote, last);
                }
                Ok(answer)
            }
            other => {
                let reason = match other {
                    Ok(other) => failed(unexpected(&other).to_string()),
                    Err(e) => {
                        // A heartbeat costs the peer nothing, so it is as good as a ping.
                        if last.is_none() && sent.elapsed() >= limit {
                            self.link.reach.failed(self.target, sent);
                        }
                        failed(e.to_string())
                    }
                };
                // The library would try again at once (or wait by an unfair choice between clock and queue).
                sleep(BACKOFF).await;
                Err(reason)
            }
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<u64>, _option: RPCOption) -> Result<VoteResponse<u64>, RpcError> {
        match self.link.ask(self.target, &Request::Vote(rpc), self.timing.vote).await {
            Ok(Response::Vote(answer)) => Ok(answer),
            Ok(other) => Err(RPCError::Network(unexpected(&other))),
            Err(e) => Err(RPCError::Network(NetworkError::new(&e))),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot<TypeConfig>,
        cancel: impl Future<Output = ReplicationClosed> + Send + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<TypeConfig, Fatal<u64>>> {
        tokio::pin!(cancel);
        tokio::select! {
            biased;
            closed = &mut cancel => Err(closed.into()),
            answer = self.stream(vote, snapshot) => {
                if answer.is_err() {
                    // The library would try again at once.
                    sleep(BACKOFF).await;
                }
                answer
            }
        }
    }
}

impl Peer {
    async fn stream(
        &self,
        vote: Vote,
        snapshot: Snapshot<TypeConfig>,
    ) -> Result<SnapshotResponse<u64>, StreamingError<TypeConfig, Fatal<u64>>> {
        let local = |e: std::io::Error| StreamingError::Network(NetworkError::new(&e));
        let snapshots = self.snapshots.clone();
        let _sending = self.snapshots.sending();
        // A newer one does as well: the library only learns that the peer has at least what it asked for.
        let newest = self.snapshots.newest().await.filter(|(meta, _)| meta.last_log_id >= snapshot.meta.last_log_id);
        let (meta, source) = newest.unwrap_or((snapshot.meta, *snapshot.snapshot));
        let len = source.len;
        let open = on_disk(self.snapshots.disk(), move || snapshots.open_file(&source)).await;
        let mut file = open.and_then(|f| f).map_err(local)?;
        let mut offset = 0u64;
        loop {
            let want = CHUNK.min(usize::try_from(len - offset).unwrap_or(CHUNK));
            let read = on_disk(self.snapshots.disk(), move || {
                let mut data = vec![0; want];
                file.read_exact_at(offset, &mut data).map(|()| (file, data))
            });
            let (back, data) = read.await.and_then(|r| r).map_err(local)?;
            file = back;
            let done = offset + want as u64 == len;
            let chunk = SnapshotChunk { vote, meta: meta.clone(), offset, data: data.into(), done };
            let limit = if done { INSTALL_DEADLINE } else { CHUNK_DEADLINE };
            if !self.guard.may_lead(&vote) {
                return Err(local(std::io::Error::other("this leader has given up")));
            }
            let answer = self.link.ask(self.target, &Request::Snapshot(chunk), limit).await;
            let failure = match answer {
                Ok(Response::SnapshotDone(answer)) => return Ok(answer),
                Ok(Response::SnapshotMore) if !done => {
                    offset += want as u64;
                    continue;
                }
                Ok(other) => unexpected(&other),
                Err(e) => NetworkError::new(&e),
            };
            return Err(StreamingError::Network(failure));
        }
    }
}
