//! The wire side of a server: peers of the metadata store, forwarded intents, hosts and gateways.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream;
use nexus_control::intent::{Accepted, Intent};
use nexus_control::region::{Forward, ForwardError, Region, ReportError};
use nexus_control::view::View;
use nexus_env::{Endpoint, Env};
use nexus_iam::{Role, SpiffeId, tls};
use nexus_model::plan::{BlobRequest, HostReport, PlanRequest, ReportAck, TableRequest, method};
use nexus_model::{ApiError, Name};
use nexus_store::embedded::{EmbeddedStore, Peers};
use nexus_store::{GroupId, PeerError, Store as _};
use nexus_wire::{Caller, Pool, Refusal, Server, ServerBuilder, WireError, code};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::blobs::ServerBlobs;
use crate::config::ServerConfig;

/// A message of the metadata store takes at most so long; the store's own deadlines are shorter.
const PEER_DEADLINE: Duration = Duration::from_secs(30);

/// The way to the other servers.
pub struct PeerWire {
    members: BTreeMap<u64, Endpoint>,
    pool: Arc<Pool>,
}

impl PeerWire {
    pub fn new(config: &ServerConfig, pool: Arc<Pool>) -> Self {
        Self { members: config.members.iter().map(|(id, m)| (*id, m.wire.clone())).collect(), pool }
    }

    fn endpoint(&self, node: u64) -> Option<&Endpoint> {
        self.members.get(&node)
    }
}

#[async_trait]
impl Peers for PeerWire {
    async fn call(&self, to: u64, _group: &GroupId, message: Bytes) -> Result<Bytes, PeerError> {
        let unknown = || PeerError::Unreachable(format!("node {to} is not a member"));
        let client = self.pool.get(self.endpoint(to).ok_or_else(unknown)?);
        client.call_bytes(method::STORE_PEER, message, PEER_DEADLINE).await.map_err(|e| {
            let text = e.to_string();
            if e.may_have_run() { PeerError::Lost(text) } else { PeerError::Unreachable(text) }
        })
    }
}

/// What a writer answers to another server.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// As JSON: objects are open-ended, and JSON is what they are stored as.
    Accepted(String),
    Refused(ApiError),
}

#[async_trait]
impl Forward for PeerWire {
    async fn forward(&self, node: u64, intent: &Intent, deadline: Duration) -> Result<Accepted, ForwardError> {
        let not_taken = |e: &dyn std::fmt::Display| ForwardError::NotTaken(e.to_string());
        let endpoint = self.endpoint(node).ok_or_else(|| not_taken(&format!("node {node} is not a member")))?;
        let client = self.pool.get(endpoint).for_request(intent.request_id.as_str());
        let text = serde_json::to_string(intent).expect("intents are plain data");
        match client.call::<_, Answer>(method::SUBMIT, &text, deadline).await {
            Ok(Answer::Accepted(text)) => {
                serde_json::from_str(&text).map_err(|e| ForwardError::Unknown(format!("the leader's answer: {e}")))
            }
            Ok(Answer::Refused(error)) => Err(ForwardError::Answered(error)),
            Err(e) if e.may_have_run() => Err(ForwardError::Unknown(e.to_string())),
            Err(e) => Err(not_taken(&e)),
        }
    }
}

fn role_of(caller: &Caller) -> Option<(Role, String)> {
    let id: SpiffeId = caller.id.as_deref()?.parse().ok()?;
    Some((id.role()?, id.name().to_owned()))
}

/// Which role may call what.
fn allowed(caller: &Caller, called: &str) -> bool {
    let Some((role, _)) = role_of(caller) else { return false };
    match called {
        method::REPORT | method::PLAN => role == Role::Agent,
        method::TABLE => role == Role::Gateway,
        method::BLOB_GET => matches!(role, Role::Agent | Role::Server),
        _ => role == Role::Server,
    }
}

/// A host speaks for itself alone.
fn is_host(caller: &Caller, host: &Name) -> Result<(), Refusal> {
    match role_of(caller) {
        Some((Role::Agent, name)) if *host == *name.as_str() => Ok(()),
        _ => Err(Refusal::new(code::FORBIDDEN, format!("this certificate is not host {host}'s"))),
    }
}

/// Every value that a watch channel takes, newest only, as a stream.
fn changes<T: Send + Sync + 'static>(
    receiver: watch::Receiver<Arc<T>>,
    skip: impl Fn(&T) -> bool + Send + 'static,
) -> impl futures::Stream<Item = Result<Arc<T>, Refusal>> + Send {
    stream::unfold((receiver, true), move |(mut receiver, first)| {
        // The first is what stands now, unless the caller has it already.
        let have = first && !skip(&receiver.borrow_and_update());
        async move {
            if !have {
                receiver.changed().await.ok()?;
            }
            let value = receiver.borrow_and_update().clone();
            Some((Ok(value), (receiver, false)))
        }
    })
}

/// The server's methods.
pub fn server(
    config: &ServerConfig,
    env: &Env,
    tls: Arc<rustls::ServerConfig>,
    store: &Arc<EmbeddedStore>,
    region: &Arc<Region>,
    view: &View,
    blobs: &Arc<ServerBlobs>,
) -> ServerBuilder {
    let servers: Vec<String> = config.members.values().map(|m| m.wire.to_string()).collect();
    let by_node: BTreeMap<u64, String> = config.members.iter().map(|(id, m)| (*id, m.wire.to_string())).collect();
    let (peer_store, submit_region, submit_store) = (store.clone(), region.clone(), store.clone());
    let (report_region, submit_nodes, report_nodes) = (region.clone(), by_node.clone(), by_node);
    let (plan_view, table_view) = (view.clone(), view.clone());
    let builder = Server::builder(env, Endpoint::Tcp(config.wire_listen), tls)
        .identify(|chain| tls::peer_id(chain).map(|id| id.to_string()))
        .authorize(allowed)
        .unary_bytes(method::STORE_PEER, move |_, message| {
            let store = peer_store.clone();
            async move { Ok(store.handle(message).await) }
        })
        .unary(method::SUBMIT, move |_, intent: String| {
            let (region, store, nodes) = (submit_region.clone(), submit_store.clone(), submit_nodes.clone());
            async move {
                let intent: Intent = serde_json::from_str(&intent)
                    .map_err(|e| Refusal::new(code::BAD_REQUEST, format!("the intent can't be read: {e}")))?;
                match region.submit_here(intent).await {
                    Some(Ok(accepted)) => {
                        Ok(Answer::Accepted(serde_json::to_string(&accepted).expect("answers are plain data")))
                    }
                    Some(Err(error)) => Ok(Answer::Refused(error)),
                    None => {
                        let leader = store.leadership().borrow().leader;
                        Err(Refusal::not_leader(leader.and_then(|node| nodes.get(&node).cloned())))
                    }
                }
            }
        })
        .unary(method::REPORT, move |caller, report: HostReport| {
            let (region, servers, nodes) = (report_region.clone(), servers.clone(), report_nodes.clone());
            async move {
                is_host(&caller, &report.host)?;
                match region.report(report).await {
                    Ok(epoch) => Ok(ReportAck { epoch, servers }),
                    Err(ReportError::NotLeader { leader }) => {
                        Err(Refusal::not_leader(leader.and_then(|node| nodes.get(&node).cloned())))
                    }
                    Err(ReportError::Refused(why)) => Err(Refusal::new("host-refused", why)),
                    Err(ReportError::Overloaded) => Err(Refusal::new(code::DRAINING, "the writer's queue is full")),
                }
            }
        })
        .stream(method::PLAN, move |caller, request: PlanRequest| {
            let view = plan_view.clone();
            async move {
                is_host(&caller, &request.host)?;
                let known = request.known;
                listed(&view).await?;
                // Before the first list a plan would be empty without meaning it.
                Ok(changes(view.plan(&request.host), move |plan| known.is_some_and(|known| plan.revision <= known)))
            }
        })
        .stream(method::TABLE, move |_, request: TableRequest| {
            let view = table_view.clone();
            async move {
                listed(&view).await?;
                let known = request.known;
                Ok(changes(view.table(), move |table| known.is_some_and(|known| table.revision <= known)))
            }
        });
    let (get, put, has) = (blobs.clone(), blobs.clone(), blobs.clone());
    builder
        .bytes_stream(method::BLOB_GET, move |_, request: BlobRequest| {
            let blobs = get.clone();
            async move { blobs.read(request.digest).await }
        })
        .upload(method::BLOB_PUT, move |_, request: BlobRequest, body| {
            let blobs = put.clone();
            async move { blobs.take(request.digest, body).await.map_err(|e| Refusal::new("blob", e.detail)) }
        })
        .unary(method::BLOB_HAS, move |_, request: BlobRequest| {
            let blobs = has.clone();
            async move { Ok(blobs.size(request.digest)) }
        })
}

/// Waits until the view has seen the log once.
async fn listed(view: &View) -> Result<(), Refusal> {
    let mut revision = view.revision();
    let seen = tokio::time::timeout(Duration::from_secs(5), revision.wait_for(|r| *r > 0)).await;
    match seen {
        Ok(Ok(_)) => Ok(()),
        _ => Err(Refusal::new(code::DRAINING, "this server has not read its log yet")),
    }
}

/// A wire error as a user reads it.
pub fn unreachable(what: &str, error: &WireError) -> ApiError {
    let detail = format!("{what}: {error}");
    match error {
        WireError::Refused { code, detail: why } if code == "not-found" => {
            ApiError::new(nexus_model::Code::NotFound, why.clone())
        }
        e if e.is_retryable() => ApiError::new(nexus_model::Code::Unavailable, detail),
        _ => ApiError::new(nexus_model::Code::Internal, detail),
    }
}
