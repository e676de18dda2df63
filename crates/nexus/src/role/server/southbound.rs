//! The wire side of a server: peers of the metadata store, forwarded intents, hosts and gateways.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use futures::{StreamExt as _, stream};
use nexus_control::intent::{Accepted, Intent, Passed};
use nexus_control::region::{Forward, ForwardError, Region, ReportError};
use nexus_control::view::View;
use nexus_control::world::World;
use nexus_env::{Endpoint, Env};
use nexus_iam::{Role, SpiffeId, tls};
use nexus_model::kind::{Host, HostState};
use nexus_model::plan::{
    BlobRequest, GatewayNote, HostReport, MAX_TRAFFIC, NetworksRequest, PROBED_AT_ONCE, PlanRequest, RenewRequest,
    ReportAck, RoundTripAck, RoundTripReport, ServerList, TableRequest, TrafficReport, method,
};
use nexus_model::{ApiError, Name, Object};
use nexus_store::embedded::{PeerRef, Peers};
use nexus_store::{GroupId, PeerError, Store as _};
use nexus_wire::{Caller, Client, Pool, Refusal, Server, ServerBuilder, WireError, code};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::authority::{Authority, PublicNames};
use super::blobs::ServerBlobs;
use super::fleet::Fleet;
use super::groups::{self, Gateways, Groups, Writers};
use super::secrets::{self, Secrets};
use super::workloads::{self, Workloads};
use crate::config::ServerConfig;

/// A message of the metadata store takes at most so long; the store's own deadlines are shorter.
const PEER_DEADLINE: Duration = Duration::from_secs(30);

/// The way to the other servers.
pub struct PeerWire {
    fleet: Fleet,
    pool: Arc<Pool>,
}

impl PeerWire {
    pub fn new(fleet: Fleet, pool: Arc<Pool>) -> Self {
        Self { fleet, pool }
    }

    fn endpoint(&self, node: u64) -> Option<Endpoint> {
        self.fleet.wire_of(node)
    }
}

#[async_trait]
impl Peers for PeerWire {
    async fn call(&self, to: &PeerRef, group: &GroupId, message: Bytes) -> Result<Bytes, PeerError> {
        let endpoint: Endpoint = to
            .endpoint
            .parse()
            .map_err(|e| PeerError::Unreachable(format!("node {}'s endpoint in the membership: {e}", to.node)))?;
        let client = self.pool.get(&endpoint);
        client.call_bytes(method::STORE_PEER, addressed(group, &message), PEER_DEADLINE).await.map_err(|e| {
            let text = e.to_string();
            if e.may_have_run() { PeerError::Lost(text) } else { PeerError::Unreachable(text) }
        })
    }
}

/// A store's message with the name of its group in front: one length byte and the name.
fn addressed(group: &GroupId, message: &[u8]) -> Bytes {
    let name = group.as_str().as_bytes();
    let mut out = BytesMut::with_capacity(1 + name.len() + message.len());
    out.put_u8(u8::try_from(name.len()).expect("a group's name has at most 63 bytes"));
    out.extend_from_slice(name);
    out.extend_from_slice(message);
    out.freeze()
}

/// The group and the message that [`addressed`] put together.
fn addressee(message: &Bytes) -> Option<(GroupId, Bytes)> {
    let end = 1 + usize::from(*message.first()?);
    let name = std::str::from_utf8(message.get(1..end)?).ok()?;
    Some((name.parse().ok()?, message.slice(end..)))
}

/// What a writer answers to another server.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// As JSON: objects are open-ended, and JSON is what they are stored as.
    Accepted(String),
    Refused(ApiError),
    /// It was passed on, and perhaps taken. Only in answer to what is to be passed on.
    Unknown(String),
}

#[async_trait]
impl Forward for PeerWire {
    async fn forward(&self, node: u64, intent: &Intent, deadline: Duration) -> Result<Accepted, ForwardError> {
        let unknown = || ForwardError::NotTaken(format!("node {node} is not a member"));
        let endpoint = self.endpoint(node).ok_or_else(unknown)?;
        forward(&self.pool.get(&endpoint), method::SUBMIT, intent, deadline).await
    }

    async fn pass(&self, via: u64, passed: &Passed, deadline: Duration) -> Result<Accepted, ForwardError> {
        let unknown = || ForwardError::NotTaken(format!("node {via} is not a member"));
        let endpoint = self.endpoint(via).ok_or_else(unknown)?;
        pass(&self.pool.get(&endpoint), method::PASS, passed, deadline).await
    }
}

/// Sends an intent to the writer behind a method of another server.
pub async fn forward(
    client: &Client,
    to: &'static str,
    intent: &Intent,
    deadline: Duration,
) -> Result<Accepted, ForwardError> {
    let text = serde_json::to_string(intent).expect("intents are plain data");
    ask(client.for_request(intent.request_id.as_str()), to, text, deadline).await
}

/// Sends an intent to a server that is to pass it on.
pub async fn pass(
    client: &Client,
    to: &'static str,
    passed: &Passed,
    deadline: Duration,
) -> Result<Accepted, ForwardError> {
    let text = serde_json::to_string(passed).expect("intents are plain data");
    ask(client.for_request(passed.intent.request_id.as_str()), to, text, deadline).await
}

async fn ask(client: Client, to: &'static str, text: String, deadline: Duration) -> Result<Accepted, ForwardError> {
    match client.call::<_, Answer>(to, &text, deadline).await {
        Ok(Answer::Accepted(text)) => {
            serde_json::from_str(&text).map_err(|e| ForwardError::Unknown(format!("the leader's answer: {e}")))
        }
        Ok(Answer::Refused(error)) => Err(ForwardError::Answered(error)),
        Ok(Answer::Unknown(why)) => Err(ForwardError::Unknown(why)),
        Err(e) if e.may_have_run() => Err(ForwardError::Unknown(e.to_string())),
        Err(e) => Err(ForwardError::NotTaken(e.to_string())),
    }
}

/// Passes on what another server could not send to the writer by itself.
pub async fn passed_on(writer: &Region, passed: &str) -> Result<Answer, Refusal> {
    let passed: Passed = serde_json::from_str(passed)
        .map_err(|e| Refusal::new(code::BAD_REQUEST, format!("the intent can't be read: {e}")))?;
    match writer.pass_on(passed).await {
        Ok(accepted) => Ok(Answer::Accepted(serde_json::to_string(&accepted).expect("answers are plain data"))),
        Err(ForwardError::Answered(error)) => Ok(Answer::Refused(error)),
        Err(ForwardError::Unknown(why)) => Ok(Answer::Unknown(why)),
        Err(ForwardError::NotTaken(why)) => Err(Refusal::new(code::DRAINING, why)),
    }
}

/// Decides what another server has forwarded. `None`: this one does not lead.
pub async fn submitted(writer: &Region, intent: &str) -> Result<Option<Answer>, Refusal> {
    let intent: Intent = serde_json::from_str(intent)
        .map_err(|e| Refusal::new(code::BAD_REQUEST, format!("the intent can't be read: {e}")))?;
    Ok(writer.submit_here(intent).await.map(|decided| match decided {
        Ok(accepted) => Answer::Accepted(serde_json::to_string(&accepted).expect("answers are plain data")),
        Err(error) => Answer::Refused(error),
    }))
}

fn role_of(caller: &Caller) -> Option<(Role, String)> {
    let id: SpiffeId = caller.id.as_deref()?.parse().ok()?;
    Some((id.role()?, id.name().to_owned()))
}

/// Which role may call what.
fn allowed(caller: &Caller, called: &str) -> bool {
    let Some((role, _)) = role_of(caller) else { return false };
    match called {
        method::REPORT | method::PLAN | method::NAMES | method::NETWORKS => role == Role::Agent,
        method::WORKLOAD_CERTIFICATE | method::WORKLOAD_TOKEN | method::WORKLOAD_KEYS | method::WORKLOAD_SECRET => {
            role == Role::Agent
        }
        method::TABLE | method::GATEWAY_NOTE | method::TRAFFIC | method::ROUND_TRIPS => role == Role::Gateway,
        method::BLOB_GET => matches!(role, Role::Agent | Role::Server),
        method::SERVERS | method::RENEW => matches!(role, Role::Agent | Role::Gateway | Role::Server),
        _ => role == Role::Server,
    }
}

/// A host speaks for itself alone.
pub fn is_host(caller: &Caller, host: &Name) -> Result<(), Refusal> {
    match role_of(caller) {
        Some((Role::Agent, name)) if *host == *name.as_str() => Ok(()),
        _ => Err(Refusal::new(code::FORBIDDEN, format!("this certificate is not host {host}'s"))),
    }
}

/// A gateway speaks for itself alone.
fn is_gateway(caller: &Caller, gateway: &Name) -> Result<(), Refusal> {
    match role_of(caller) {
        Some((Role::Gateway, name)) if *gateway == *name.as_str() => Ok(()),
        _ => Err(Refusal::new(code::FORBIDDEN, format!("this certificate is not gateway {gateway}'s"))),
    }
}

/// Every value that a watch channel takes, newest only, as a stream.
pub fn changes<T: Send + Sync + 'static>(
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
#[allow(clippy::too_many_arguments)] // Each is another door that the methods lead to.
pub fn server(
    config: &ServerConfig,
    env: &Env,
    tls: Arc<rustls::ServerConfig>,
    groups: &Groups,
    writers: &Arc<Writers>,
    gateways: &Gateways,
    view: &View,
    blobs: &Arc<ServerBlobs>,
    fleet: &Fleet,
    authority: Option<Arc<Authority>>,
    workloads: &Arc<Workloads>,
    secrets: &Arc<Secrets>,
) -> ServerBuilder {
    let (stores, region) = (groups.by_id(), &writers.region);
    let (submit_region, submit_store) = (region.clone(), groups.region.clone());
    let (report_region, submit_fleet, report_fleet) = (region.clone(), fleet.clone(), fleet.clone());
    let (traffic_region, traffic_fleet) = (region.clone(), fleet.clone());
    let (plan_view, table_view, gateways) = (view.clone(), view.clone(), gateways.clone());
    let (names_view, networks_view) = (view.clone(), view.clone());
    let builder = Server::builder(env, Endpoint::Tcp(config.wire_listen), tls)
        .identify(|chain| tls::peer_id(chain).map(|id| id.to_string()))
        .authorize(allowed)
        .unary_bytes(method::STORE_PEER, move |_, message| {
            let found = addressee(&message).map(|(group, message)| (stores.get(&group).cloned(), group, message));
            async move {
                match found {
                    Some((Some(store), _, message)) => Ok(store.handle(message).await),
                    Some((None, group, _)) => {
                        Err(Refusal::new(code::BAD_REQUEST, format!("this server is no member of group {group}")))
                    }
                    None => Err(Refusal::new(code::BAD_REQUEST, "the message names no group")),
                }
            }
        })
        .unary(method::SUBMIT, move |_, intent: String| {
            let (region, store, fleet) = (submit_region.clone(), submit_store.clone(), submit_fleet.clone());
            async move {
                submitted(&region, &intent).await?.ok_or_else(|| {
                    let leader = store.leadership().borrow().leader;
                    Refusal::not_leader(leader.and_then(|node| fleet.wire_of(node)).map(|e| e.to_string()))
                })
            }
        })
        .unary(method::REPORT, move |caller, report: HostReport| {
            let (region, fleet) = (report_region.clone(), report_fleet.clone());
            async move {
                is_host(&caller, &report.host)?;
                if let Some(why) = fleet.refuses(&report.host, &report.spec) {
                    return Err(Refusal::new("host-refused", why));
                }
                match region.report(report).await {
                    Ok(epoch) => Ok(ReportAck { epoch, servers: fleet.wires() }),
                    Err(ReportError::NotLeader { leader }) => {
                        Err(Refusal::not_leader(leader.and_then(|node| fleet.wire_of(node)).map(|e| e.to_string())))
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
        .unary(method::TRAFFIC, move |caller, report: TrafficReport| {
            let (region, fleet) = (traffic_region.clone(), traffic_fleet.clone());
            async move {
                is_gateway(&caller, &report.gateway)?;
                if report.instances.len() > MAX_TRAFFIC || report.apps.len() > MAX_TRAFFIC {
                    let why = format!("a report speaks of at most {MAX_TRAFFIC} instances and apps");
                    return Err(Refusal::new(code::BAD_REQUEST, why));
                }
                region.hear_traffic(&report).map_err(|error| match error {
                    ReportError::NotLeader { leader } => {
                        Refusal::not_leader(leader.and_then(|node| fleet.wire_of(node)).map(|e| e.to_string()))
                    }
                    ReportError::Refused(why) => Refusal::new("gateway-refused", why),
                    ReportError::Overloaded => Refusal::new(code::DRAINING, "the writer's queue is full"),
                })
            }
        })
        .stream(method::NAMES, move |caller, request: PlanRequest| {
            let view = names_view.clone();
            async move {
                is_host(&caller, &request.host)?;
                let known = request.known;
                listed(&view).await?;
                seen(view.global_revision()).await?;
                Ok(changes(view.names(&request.host), move |names| known.is_some_and(|known| names.revision <= known)))
            }
        })
        .stream(method::NETWORKS, move |caller, request: NetworksRequest| {
            let view = networks_view.clone();
            async move {
                is_host(&caller, &request.host)?;
                listed(&view).await?;
                Ok(view.tell_networks(request).map(Ok))
            }
        })
        .stream(method::TABLE, move |_, request: TableRequest| {
            let (view, gateways) = (table_view.clone(), gateways.clone());
            async move {
                listed(&view).await?;
                let known = request.known;
                let fed = request.peer.map(|peer| gateways.feed(peer));
                let tables = changes(view.table(), move |table| known.is_some_and(|known| table.revision <= known));
                Ok(tables.inspect(move |_| {
                    let _held = &fed;
                }))
            }
        });
    let builder = round_trips(builder, region, view, fleet);
    let (get, put, has) = (blobs.clone(), blobs.clone(), blobs.clone());
    let builder = workloads::methods(fleet_methods(builder, env, fleet, authority), workloads);
    let builder = secrets::methods(builder, secrets);
    groups::methods(builder, groups, writers)
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

/// What gateways measure, and which hosts they are to measure next.
fn round_trips(builder: ServerBuilder, region: &Arc<Region>, view: &View, fleet: &Fleet) -> ServerBuilder {
    let (region, view, fleet) = (region.clone(), view.clone(), fleet.clone());
    builder.unary(method::ROUND_TRIPS, move |caller, report: RoundTripReport| {
        let own = role_of(&caller).is_some_and(|(_, name)| report.gateway == *name.as_str());
        let after = report.after.clone();
        let heard = if own {
            region.round_trips(report).map_err(|error| match error {
                ReportError::NotLeader { leader } => {
                    Refusal::not_leader(leader.and_then(|node| fleet.wire_of(node)).map(|e| e.to_string()))
                }
                _ => Refusal::new(code::DRAINING, "the writer's queue is full"),
            })
        } else {
            Err(Refusal::new(code::FORBIDDEN, format!("this certificate is not gateway {}'s", report.gateway)))
        };
        let answer = heard.map(|()| RoundTripAck { hosts: view.read(|world| next_hosts(world, after.as_ref())) });
        async move { answer }
    })
}

/// Some hosts in the order of their names, from the one after `after` on and round.
fn next_hosts(world: &World, after: Option<&Name>) -> Vec<(Name, SocketAddr)> {
    let living = |host: &&Object<Host>| host.status.state != HostState::Dead;
    let all = || world.hosts.live.values().filter(living).map(|h| (h.metadata.name.clone(), h.spec.address));
    let later = all().filter(|(name, _)| after.is_none_or(|after| name > after));
    let earlier = all().filter(|(name, _)| after.is_some_and(|after| name <= after));
    later.chain(earlier).take(PROBED_AT_ONCE).collect()
}

/// Where all servers are, and certificates: with a later end, and when gateways' end.
fn fleet_methods(builder: ServerBuilder, env: &Env, fleet: &Fleet, authority: Option<Arc<Authority>>) -> ServerBuilder {
    let (list, renew, noted, env) = (fleet.clone(), fleet.clone(), fleet.clone(), env.clone());
    builder
        .unary(method::GATEWAY_NOTE, move |caller, note: GatewayNote| {
            let heard = is_gateway(&caller, &note.gateway).map(|()| noted.heard_gateway(note, env.monotonic()));
            async move { heard }
        })
        .unary(method::SERVERS, move |_, (): ()| {
            let servers = list.wires();
            async move { Ok(ServerList { servers }) }
        })
        .unary(method::RENEW, move |caller, request: RenewRequest| {
            let (fleet, authority) = (renew.clone(), authority.clone());
            async move {
                let Some(authority) = authority else {
                    return Err(Refusal::new(code::DRAINING, "this server holds no key of the authority: ask another"));
                };
                let id: Option<SpiffeId> = caller.id.as_deref().and_then(|id| id.parse().ok());
                let id = id.ok_or_else(|| Refusal::new(code::FORBIDDEN, "the caller has no id"))?;
                let known = fleet.servers().into_values().find(|s| s.name.as_str() == id.name());
                let names = known.and_then(|s| PublicNames::of(s.name.as_str(), &s.api, &[]).ok()).unwrap_or_default();
                authority.renew(&id, &request.csr, &names).map_err(|e| Refusal::new("not-renewed", e.detail))
            }
        })
}

/// Waits until the view has seen the log once.
pub async fn listed(view: &View) -> Result<(), Refusal> {
    seen(view.revision()).await
}

/// Waits until there is a revision.
async fn seen(mut revision: watch::Receiver<u64>) -> Result<(), Refusal> {
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
