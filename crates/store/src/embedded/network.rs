//! What the consensus library says to other members, over the [`Peers`] that the server provides.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_env::on_disk;
use openraft::error::{
    Fatal, NetworkError, RPCError, RaftError, ReplicationClosed, StreamingError, Timeout, Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, VoteRequest, VoteResponse};
use openraft::{BasicNode, RPCTypes, Snapshot};

use super::eager::SharedEager;
use super::raft::{Failure, Request, Response, SnapshotChunk, TypeConfig, Vote, decode, encode};
use super::snapshot::SnapshotDir;
use crate::error::PeerError;
use crate::types::GroupId;

/// How messages reach the other members. The server carries them over its southbound protocol; tests over channels.
#[async_trait]
pub trait Peers: Send + Sync {
    /// Hands `message` to that member's [`handle`](super::EmbeddedStore::handle) and answers what it answers. Messages
    /// are at most about 3 MiB. The caller drops the future when its own deadline passes.
    async fn call(&self, to: u64, group: &GroupId, message: Bytes) -> Result<Bytes, PeerError>;
}

/// A piece of a snapshot in one message.
const CHUNK: usize = 512 * 1024;
/// One chunk, or (the last one) checking and loading a large snapshot.
const CHUNK_DEADLINE: Duration = Duration::from_secs(5);
const INSTALL_DEADLINE: Duration = Duration::from_secs(120);
/// Between tries to reach a member that is down.
const BACKOFF: Duration = Duration::from_millis(200);

/// [`Peers`] for one group, speaking our messages.
#[derive(Clone)]
pub struct PeerLink {
    pub peers: Arc<dyn Peers>,
    pub group: GroupId,
}

impl PeerLink {
    pub fn message(&self, request: &Request) -> Bytes {
        encode(request)
    }

    pub async fn send(&self, to: u64, message: Bytes) -> Result<Response, PeerError> {
        let answer = self.peers.call(to, &self.group, message).await?;
        decode(&answer).map_err(|e| PeerError::Lost(e.to_string()))
    }

    pub async fn ask(&self, to: u64, request: &Request) -> Result<Response, PeerError> {
        self.send(to, self.message(request)).await
    }
}

pub struct Network {
    pub node: u64,
    pub link: PeerLink,
    pub eager: SharedEager,
    pub snapshots: Arc<SnapshotDir>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, _node: &BasicNode) -> Peer {
        Peer {
            node: self.node,
            target,
            link: self.link.clone(),
            eager: self.eager.clone(),
            snapshots: self.snapshots.clone(),
        }
    }
}

/// One other member.
pub struct Peer {
    node: u64,
    target: u64,
    link: PeerLink,
    eager: SharedEager,
    snapshots: Arc<SnapshotDir>,
}

type RpcError = RPCError<u64, BasicNode, RaftError<u64>>;

fn unreachable(e: &PeerError) -> RpcError {
    RPCError::Unreachable(Unreachable::new(e))
}

fn unexpected(response: &Response) -> NetworkError {
    let text = match response {
        Response::Failed(Failure::Stopped(reason)) => format!("the peer has stopped: {reason}"),
        Response::Failed(failure) => format!("the peer refused: {failure:?}"),
        _ => "the peer answered something else".to_owned(),
    };
    NetworkError::new(&std::io::Error::other(text))
}

impl Peer {
    fn timed_out(&self, action: RPCTypes, timeout: Duration) -> Timeout<u64> {
        Timeout { action, id: self.node, target: self.target, timeout }
    }
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, RpcError> {
        // The library's deadline for entries is as short as a heartbeat's; a busy disk may need longer.
        let limit = if rpc.entries.is_empty() { option.hard_ttl() } else { option.hard_ttl().max(CHUNK_DEADLINE) };
        let exchange = async {
            if !rpc.entries.is_empty() && self.eager.answer(self.target, &rpc).await {
                return Ok(AppendEntriesResponse::Success);
            }
            match self.link.ask(self.target, &Request::Append(rpc)).await {
                Ok(Response::Append(answer)) => Ok(answer),
                Ok(other) => Err(RPCError::Network(unexpected(&other))),
                Err(e) => Err(unreachable(&e)),
            }
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(RPCError::Timeout(self.timed_out(RPCTypes::AppendEntries, limit))),
        }
    }

    async fn vote(&mut self, rpc: VoteRequest<u64>, option: RPCOption) -> Result<VoteResponse<u64>, RpcError> {
        let limit = option.hard_ttl();
        match tokio::time::timeout(limit, self.link.ask(self.target, &Request::Vote(rpc))).await {
            Ok(Ok(Response::Vote(answer))) => Ok(answer),
            Ok(Ok(other)) => Err(RPCError::Network(unexpected(&other))),
            Ok(Err(e)) => Err(unreachable(&e)),
            Err(_) => Err(RPCError::Timeout(self.timed_out(RPCTypes::Vote, limit))),
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
            answer = self.stream(vote, snapshot) => answer,
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(BACKOFF))
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
        let source = (*snapshot.snapshot).clone();
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
            let chunk = SnapshotChunk { vote, meta: snapshot.meta.clone(), offset, data: data.into(), done };
            let limit = if done { INSTALL_DEADLINE } else { CHUNK_DEADLINE };
            let answer = tokio::time::timeout(limit, self.link.ask(self.target, &Request::Snapshot(chunk)))
                .await
                .map_err(|_| StreamingError::Timeout(self.timed_out(RPCTypes::InstallSnapshot, limit)))?;
            match answer {
                Ok(Response::SnapshotDone(answer)) => return Ok(answer),
                Ok(Response::SnapshotMore) if !done => offset += want as u64,
                Ok(other) => return Err(StreamingError::Network(unexpected(&other))),
                Err(e) => return Err(StreamingError::Unreachable(Unreachable::new(&e))),
            }
        }
    }
}
