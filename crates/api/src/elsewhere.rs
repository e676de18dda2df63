//! Requests for other regions: passed on to a server there, which authenticates and answers them itself.
//!
//! Policies speak of the address that a request came from, so the server that passes it on says which that was, for this
//! request alone, with the key that it signs access tokens with.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use futures::StreamExt;
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue};
use nexus_iam::jwt::{self, Claims, Expectations};
use nexus_model::kind::GLOBAL;
use nexus_model::{ApiError, Code, Name};

use crate::caller::{AUDIENCE, LEEWAY};
use crate::headers;
use crate::serve::{Context, Server};

/// A request that carries this was passed on already, and is not passed on again.
pub const PASSED_ON: HeaderName = HeaderName::from_static("x-nexus-passed-on");
/// From where a request that was passed on came, signed.
const ORIGIN: HeaderName = HeaderName::from_static("x-nexus-origin");
/// How long that is believed: servers' clocks differ.
const ORIGIN_LIFE: Duration = Duration::from_secs(60);

/// Refuses a region that the fleet does not have.
pub(crate) fn check(server: &Server, region: &Name) -> Result<(), ApiError> {
    if *region == server.api.region || *region == *GLOBAL {
        return Ok(());
    }
    let regions = server.api.remote.regions();
    if regions.contains(region) {
        return Ok(());
    }
    let all: Vec<&str> = regions.iter().chain([&server.api.region]).map(Name::as_str).collect();
    let shown: String = region.as_str().chars().take(64).collect();
    Err(ApiError::new(Code::NotFound, format!("there is no region {shown:?}; there are: {}", all.join(", "))))
}

pub(crate) async fn pass(
    server: &Arc<Server>,
    region: &Name,
    mut parts: Parts,
    body: Body,
    context: &Context,
) -> Result<Response, ApiError> {
    if let Some(from) = parts.headers.get(&PASSED_ON) {
        let from = String::from_utf8_lossy(from.as_bytes()).into_owned();
        let detail = format!("region {from} took this server for one of {region}, it is of {}", server.api.region);
        return Err(ApiError::new(Code::Unavailable, detail));
    }
    // What is passed on may be a stream, and lasts as long as its answer.
    let permit = server.stream_permit()?;
    let id = HeaderValue::try_from(context.request_id.as_str()).expect("request ids are plain ASCII");
    parts.headers.insert(headers::REQUEST_ID, id);
    let here = HeaderValue::try_from(server.api.region.as_str()).expect("names are plain ASCII");
    parts.headers.insert(PASSED_ON, here);
    parts.headers.insert(ORIGIN, attest(server, region, context)?);
    let answer = server.api.remote.pass(region, Request::from_parts(parts, body)).await?;
    let stop = server.api.shutdown.clone();
    Ok(answer.map(|body| {
        let pieces = body.into_data_stream().take_until(stop.cancelled_owned());
        Body::from_stream(pieces.map(move |piece| {
            let _held = &permit;
            piece
        }))
    }))
}

/// For no other use than by the servers of that region: an access token is for another audience, and the other way round.
fn audience(region: &Name) -> String {
    format!("{AUDIENCE}/passed-on/{region}")
}

fn attest(server: &Server, region: &Name, context: &Context) -> Result<HeaderValue, ApiError> {
    let now = u64::try_from(server.api.env.now_millis() / 1000).unwrap_or(0);
    let claims = Claims {
        iss: server.api.issuer.clone(),
        sub: context.caller.address.to_string(),
        aud: audience(region),
        exp: now + ORIGIN_LIFE.as_secs(),
        nbf: now,
        iat: now,
        jti: context.request_id.to_string(),
        sid: server.api.region.to_string(),
        org: server.api.region.to_string(),
        groups: Vec::new(),
        project: None,
        amr: Vec::new(),
        act: None,
    };
    let signed = server.api.signer.sign(&claims).map_err(|e| ApiError::new(Code::Internal, e.to_string()))?;
    Ok(HeaderValue::try_from(signed).expect("a token is plain ASCII"))
}

/// From where a request came that a server of another region has passed on. Within, why that can't be believed.
pub(crate) fn origin(server: &Server, headers: &HeaderMap) -> Option<Result<IpAddr, String>> {
    let said = headers.get(&ORIGIN)?;
    let read = || -> Result<IpAddr, String> {
        let said = said.to_str().map_err(|_| "it is no text")?;
        let now = nexus_iam::at_millis(server.api.env.now_millis());
        let audience = audience(&server.api.region);
        let expected = Expectations { issuer: &server.api.issuer, audience: &audience, now, leeway: LEEWAY };
        let claims = server.api.directory.read(|known| jwt::verify(said, &known.keys, expected));
        let claims = claims.map_err(|e| e.to_string())?;
        let id = headers.get(&headers::REQUEST_ID).and_then(|id| id.to_str().ok());
        if id != Some(claims.jti.as_str()) {
            return Err("it is another request's".into());
        }
        claims.sub.parse().map_err(|_| "it names no address".into())
    };
    Some(read().map_err(|why| format!("where this request came from can't be believed: {why}")))
}
