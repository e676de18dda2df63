//! `networks/NAME:flows`: who connected to whom in a network, and what was dropped.
//!
//! Every host that has a NIC of the network is asked for what it has noted, a few at once, and the answers are put in the order of
//! their times. Without `follow` that is one document, with the newest flows and the hosts that did not answer. With it, it is a
//! line a flow (NDJSON), and hosts are asked again and again for what is behind the last that they told.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{StreamExt, stream};
use http::request::Parts;
use http::{HeaderValue, header};
use nexus_model::plan::{FlowLogs, FlowRecord, FlowsRequest, HostFlows, MAX_FLOWS};
use nexus_model::{ApiError, Code, Name, Timestamp, Uid};
use nexus_store::Consistency;
use serde::Serialize;
use tokio::sync::OwnedSemaphorePermit;

use crate::list::{find, unreadable};
use crate::problem::Refusal;
use crate::query::Query;
use crate::render::Stored;
use crate::route::Place;
use crate::serve::{Server, json};

pub(crate) const NDJSON: &str = "application/x-ndjson";
/// Hosts forget what is older long before.
pub(crate) const MOST_SECONDS: u64 = 30 * 86_400;
pub(crate) const USUAL_SECONDS: u64 = 600;
pub(crate) const USUAL_FLOWS: u32 = 1000;

/// Hosts that are asked at once, and how long one may take.
const AT_ONCE: usize = 8;
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two rounds of a reader that follows.
const ROUND: Duration = Duration::from_secs(1);
/// What one round of such a reader tells at most; what is more is counted as lost.
const MOST_A_ROUND: usize = 50_000;
/// After so many rounds without a flow an empty line is sent: only by sending is it known that a reader has gone.
const QUIET: u32 = 15;

/// A flow, and the host that noted it.
#[derive(Debug, Serialize)]
struct Noted {
    host: Name,
    #[serde(flatten)]
    flow: FlowRecord,
}

#[derive(Debug, Serialize)]
struct Silent {
    host: Name,
    why: String,
}

#[derive(Debug, Default, Serialize)]
struct Found {
    items: Vec<Noted>,
    silent: Vec<Silent>,
    lost: u64,
    /// How many more there were than the reader gets.
    #[serde(skip)]
    cut: u64,
}

/// What is asked of every host.
#[derive(Clone)]
struct Asked {
    project: Name,
    network: Uid,
    nic: Option<Name>,
    since: Timestamp,
    limit: u32,
}

/// Answers `GET …/networks/NAME:flows`.
pub(crate) async fn flows(
    server: &Arc<Server>,
    place: &Place,
    name: &Name,
    parts: &Parts,
    ended: BoxFuture<'static, ApiError>,
) -> Result<Response, Refusal> {
    let query = Query::parse(parts.uri.query(), &["nic", "sinceSeconds", "limit", "follow"], &[])?;
    let wrong = |_| Refusal::new(Code::BadRequest, "nic is the name of a NIC of the network");
    let nic = query.get("nic").map(|text| text.parse::<Name>().map_err(wrong)).transpose()?;
    let seconds = query.number("sinceSeconds", 1..=MOST_SECONDS)?.unwrap_or(USUAL_SECONDS);
    let limit = query.number("limit", 1..=MAX_FLOWS)?.unwrap_or(USUAL_FLOWS);
    let follow = query.flag("follow")?;

    let kv = find(server, place, name, Consistency::Linearizable).await?;
    let kv = kv.ok_or_else(|| ApiError::not_found(place.kind.kind, name.as_str()))?;
    let stored = Stored::read(&kv).map_err(|e| unreadable(&kv, &e))?;
    let kept: FlowLogs = serde_json::from_value(stored.spec()["flowLogs"].clone()).unwrap_or_default();
    if kept == FlowLogs::None {
        let detail = format!("network {name} keeps no flow logs: set its spec.flowLogs to all or to dropped");
        return Err(Refusal::new(Code::Conflict, detail));
    }
    let project = place.project.clone().ok_or_else(|| ApiError::not_found(place.kind.kind, name.as_str()))?;
    let since = Timestamp::from_millis(server.api.env.now_millis().saturating_sub_unsigned(seconds * 1000));
    let asked = Asked { project, network: stored.metadata.uid, nic, since, limit };
    let permit = server.stream_permit()?;
    if !follow {
        let mut told = BTreeMap::new();
        let found = once(server, &asked, &mut told, asked.limit as usize);
        let found = tokio::time::timeout(server.api.limits.request_timeout, found).await;
        let late = |_| ApiError::new(Code::Timeout, "the hosts of the network take too long to answer: ask for less");
        return Ok(json(&found.map_err(late)?));
    }
    let until = futures::future::select(Box::pin(server.api.shutdown.clone().cancelled_owned()), ended);
    let lines = followed(Arc::clone(server), asked, permit).take_until(until);
    let mut response = Response::new(Body::from_stream(lines));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(NDJSON));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}

/// Asks every host once: for what is behind the last that it told, where it is known.
async fn once(server: &Server, asked: &Asked, told: &mut BTreeMap<Name, u64>, most: usize) -> Found {
    let hosts = server.api.hosts.hosts_of(&asked.project, asked.network);
    let questions = hosts.into_iter().map(|host| {
        let request = FlowsRequest {
            network: asked.network,
            since: asked.since,
            after: told.get(&host).copied(),
            nic: asked.nic.clone(),
            limit: asked.limit,
        };
        async move {
            let answer = tokio::time::timeout(PATIENCE, server.api.hosts.flows(&host, request)).await;
            let late = || ApiError::new(Code::Timeout, format!("the host {host} does not answer"));
            let answer = answer.unwrap_or_else(|_| Err(late()));
            (host, answer)
        }
    });
    let mut answers = stream::iter(questions.collect::<Vec<_>>()).buffered(AT_ONCE);
    let mut found = Found::default();
    while let Some((host, answer)) = answers.next().await {
        match answer {
            Ok(HostFlows { flows, last, lost }) => {
                found.lost = found.lost.saturating_add(lost);
                found.items.extend(flows.into_iter().map(|flow| Noted { host: host.clone(), flow }));
                told.insert(host, last);
                found.keep(most);
            }
            Err(error) => found.silent.push(Silent { host, why: error.detail }),
        }
    }
    found
}

impl Found {
    /// The newest so many, the oldest of them first.
    fn keep(&mut self, limit: usize) {
        self.items.sort_by(|a, b| (a.flow.time, &a.host).cmp(&(b.flow.time, &b.host)));
        let cut = self.items.drain(..self.items.len().saturating_sub(limit)).count();
        self.cut += cut as u64;
    }
}

/// What a reader that follows has been told.
struct Following {
    server: Arc<Server>,
    asked: Asked,
    told: BTreeMap<Name, u64>,
    first: bool,
    quiet: u32,
    /// Hosts that are known to be silent, and how many flows to be lost.
    silent: Vec<Name>,
    lost: u64,
    cut: u64,
    _permit: OwnedSemaphorePermit,
}

fn followed(
    server: Arc<Server>,
    asked: Asked,
    permit: OwnedSemaphorePermit,
) -> impl futures::Stream<Item = io::Result<Bytes>> + Send + 'static {
    let state = Following {
        server,
        asked,
        told: BTreeMap::new(),
        first: true,
        quiet: 0,
        silent: Vec::new(),
        lost: 0,
        cut: 0,
        _permit: permit,
    };
    stream::unfold(state, |mut state| async move {
        loop {
            // At first so many as were asked for, and then all that comes.
            let most = if std::mem::take(&mut state.first) {
                state.asked.limit as usize
            } else {
                tokio::time::sleep(ROUND).await;
                state.asked.limit = MAX_FLOWS;
                MOST_A_ROUND
            };
            let found = once(&state.server, &state.asked, &mut state.told, most).await;
            let mut text = Vec::new();
            for noted in &found.items {
                serde_json::to_writer(&mut text, noted).expect("a flow is well-formed JSON");
                text.push(b'\n');
            }
            if most == MOST_A_ROUND {
                state.cut += found.cut;
            }
            let silent: Vec<Name> = found.silent.iter().map(|s| s.host.clone()).collect();
            let lost = found.lost + state.cut;
            if silent != state.silent || lost > state.lost {
                let note = serde_json::json!({ "silent": found.silent, "lost": lost });
                text.extend_from_slice(format!("{note}\n").as_bytes());
                (state.silent, state.lost) = (silent, lost.max(state.lost));
            }
            state.quiet = if text.is_empty() { state.quiet + 1 } else { 0 };
            if state.quiet >= QUIET {
                state.quiet = 0;
                text.push(b'\n');
            }
            if !text.is_empty() {
                return Some((Ok(Bytes::from(text)), state));
            }
        }
    })
}
