//! Requests for other regions: passed on to a server there, which authenticates and answers them itself.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::response::Response;
use futures::StreamExt;
use http::request::Parts;
use http::{HeaderName, HeaderValue};
use nexus_model::kind::GLOBAL;
use nexus_model::{ApiError, Code, Name};

use crate::headers;
use crate::serve::{Context, Server};

/// A request that carries this was passed on already, and is not passed on again.
pub const PASSED_ON: HeaderName = HeaderName::from_static("x-nexus-passed-on");

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
