//! `nics/NAME:trace`, `nics/NAME:capture` and `hosts/NAME:check`: what tenants' networks do, asked of the hosts that do it.
//!
//! A trace is the host's own evaluation of the rules that it has programmed, and with `probe=true` a real packet beside it. A
//! capture is a file as libpcap writes it, which goes on until its reader leaves. A check compares what a host should have with
//! what its kernel has.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Body;
use axum::response::Response;
use futures::StreamExt;
use futures::future::BoxFuture;
use http::request::Parts;
use http::{HeaderValue, header};
use nexus_model::plan::{CaptureRequest, RuleProtocol, TraceRequest, TracedPacket};
use nexus_model::{ApiError, Code, Name};
use nexus_store::Consistency;

use crate::list::find;
use crate::problem::Refusal;
use crate::query::Query;
use crate::route::Place;
use crate::serve::{Server, json};
use crate::streams::locate;

/// The protocols of traced packets, as the query names them.
pub(crate) const PROTOCOLS: [(&str, RuleProtocol); 3] =
    [("tcp", RuleProtocol::Tcp), ("udp", RuleProtocol::Udp), ("icmp", RuleProtocol::Icmp)];
pub(crate) const PCAP: &str = "application/vnd.tcpdump.pcap";

fn bad(detail: impl Into<String>) -> Refusal {
    Refusal::new(Code::BadRequest, detail)
}

fn address(query: &Query, name: &str) -> Result<Option<IpAddr>, Refusal> {
    let parse = |text: &str| text.parse().map_err(|_| bad(format!("`{name}` is an IPv4 or IPv6 address")));
    query.get(name).map(parse).transpose()
}

fn port(query: &Query) -> Result<Option<u16>, Refusal> {
    Ok(query.number("port", 1..=u16::MAX.into())?.map(|port| port as u16))
}

/// Answers `GET …/nics/NAME:trace`.
pub(crate) async fn trace(server: &Server, place: &Place, name: &Name, parts: &Parts) -> Result<Response, Refusal> {
    let query = Query::parse(parts.uri.query(), &["to", "protocol", "port", "probe"], &[])?;
    let to = address(&query, "to")?.ok_or_else(|| bad("say in `to` which address the packet is for"))?;
    let words = PROTOCOLS.map(|(word, _)| word);
    let word = query.one_of("protocol", &words)?.unwrap_or("tcp");
    let protocol = PROTOCOLS.into_iter().find(|(w, _)| *w == word).map_or(RuleProtocol::Tcp, |(_, p)| p);
    let port = match (protocol, port(&query)?) {
        (RuleProtocol::Icmp, None) => 0,
        (RuleProtocol::Icmp, Some(_)) => return Err(bad("ICMP has no ports: leave `port` out")),
        (_, Some(port)) => port,
        (_, None) => return Err(bad("say in `port` which port the packet is for, 1 to 65535")),
    };
    let probe = query.flag("probe")?;
    let (nic, host) = locate(server, place, name, None).await?;
    let asked = TraceRequest { nic, packet: TracedPacket { to, protocol, port }, probe };
    Ok(json(&server.api.hosts.trace(&host, asked).await?))
}

/// Answers `GET …/hosts/NAME:check`.
pub(crate) async fn check(server: &Server, place: &Place, name: &Name, parts: &Parts) -> Result<Response, Refusal> {
    Query::parse(parts.uri.query(), &[], &[])?;
    let found = find(server, place, name, Consistency::Linearizable).await?;
    found.ok_or_else(|| ApiError::not_found(place.kind.kind, name.as_str()))?;
    Ok(json(&server.api.hosts.check(name).await?))
}

/// Answers `GET …/nics/NAME:capture`.
pub(crate) async fn capture(
    server: &Arc<Server>,
    place: &Place,
    name: &Name,
    parts: &Parts,
    ended: BoxFuture<'static, ApiError>,
) -> Result<Response, Refusal> {
    let query = Query::parse(parts.uri.query(), &["address", "port"], &[])?;
    let (address, port) = (address(&query, "address")?, port(&query)?);
    let permit = server.stream_permit()?;
    let (nic, host) = locate(server, place, name, None).await?;
    let timeout = server.api.limits.request_timeout;
    let asked = CaptureRequest { nic, address, port };
    let opened = tokio::time::timeout(timeout, server.api.hosts.capture(&host, asked)).await;
    let mut frames = opened.map_err(|_| ApiError::new(Code::Timeout, format!("the host {host} does not answer")))??;
    // The file's beginning: that it comes says that the host listens. Else its refusal is the answer.
    let first = tokio::time::timeout(timeout, frames.next()).await;
    let first = first.map_err(|_| ApiError::new(Code::Timeout, format!("the host {host} does not answer")))?;
    let first = first.ok_or_else(|| ApiError::new(Code::Unavailable, format!("the host {host} broke off")))??;
    let until = futures::future::select(Box::pin(server.api.shutdown.clone().cancelled_owned()), ended);
    let rest = frames.take_until(until).map(move |frame| {
        let _held = &permit;
        frame.map(|frame| frame.data).map_err(|error| {
            tracing::info!(%error, "a capture broke off");
            io::Error::other(error)
        })
    });
    let mut response = Response::new(Body::from_stream(futures::stream::iter([Ok(first.data)]).chain(rest)));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PCAP));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    Ok(response)
}
