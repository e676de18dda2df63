//! Blobs: the content of images, uploaded and fetched by digest. Whether content has its digest is checked where it is
//! stored.

use std::io;

use axum::body::{Body, HttpBody};
use axum::response::Response;
use futures::StreamExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, LOCATION};
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode};
use nexus_model::{ApiError, Code, Digest, Name};
use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;

use crate::doors::BlobStream;
use crate::headers::if_none_match;
use crate::query::Query;
use crate::route::BLOB_TEMPLATE;
use crate::serve::Server;

/// The largest blob: 20 GiB.
pub(crate) const MAX_BLOB: u64 = 20 << 30;

fn missing(digest: Digest) -> ApiError {
    ApiError::not_found("blob", &digest.to_string())
}

fn octets(body: Body, digest: Digest, length: u64) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(ETAG, tag(digest));
    response
}

fn tag(digest: Digest) -> HeaderValue {
    HeaderValue::try_from(format!("\"{digest}\"")).expect("digests are plain ASCII")
}

pub(crate) async fn handle(
    server: &Server,
    project: &Name,
    digest: Digest,
    parts: &Parts,
    body: Body,
    permit: OwnedSemaphorePermit,
) -> Result<Response, ApiError> {
    Query::parse(parts.uri.query(), &[], &[])?;
    if parts.method == Method::PUT {
        return put(server, project, digest, body, permit).await;
    }
    if if_none_match(&parts.headers)?.is_some_and(|known| known.names(&digest.to_string())) {
        server.api.blobs.has(project, digest).await?.ok_or_else(|| missing(digest))?;
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        response.headers_mut().insert(ETAG, tag(digest));
        return Ok(response);
    }
    if parts.method == Method::HEAD {
        let length = server.api.blobs.has(project, digest).await?.ok_or_else(|| missing(digest))?;
        return Ok(octets(Body::empty(), digest, length));
    }
    let (length, content) = server.api.blobs.get(project, digest).await?.ok_or_else(|| missing(digest))?;
    // The place among the transfers is held until the last piece has been sent.
    let content = content.map(move |piece| {
        let _held = &permit;
        piece
    });
    Ok(octets(Body::from_stream(content), digest, length))
}

/// A request's body in pieces. A client that sends nothing for `silence` is given up.
fn pieces(body: Body, silence: std::time::Duration) -> BlobStream {
    let stream = body.into_data_stream();
    futures::stream::unfold(Some(stream), move |stream| async move {
        let mut stream = stream?;
        match tokio::time::timeout(silence, stream.next()).await {
            Ok(Some(Ok(piece))) => Some((Ok(piece), Some(stream))),
            Ok(Some(Err(e))) => Some((Err(io::Error::other(e)), None)),
            Ok(None) => None,
            Err(_) => Some((Err(io::Error::new(io::ErrorKind::TimedOut, "the upload fell silent")), None)),
        }
    })
    .boxed()
}

async fn put(
    server: &Server,
    project: &Name,
    digest: Digest,
    body: Body,
    _permit: OwnedSemaphorePermit,
) -> Result<Response, ApiError> {
    let Some(length) = body.size_hint().exact() else {
        return Err(ApiError::new(Code::BadRequest, "an upload must say its Content-Length"));
    };
    if length > MAX_BLOB {
        return Err(ApiError::new(Code::TooLarge, format!("a blob has at most {MAX_BLOB} bytes, this one {length}")));
    }
    let content = pieces(body, server.api.limits.request_timeout);
    let new = server.api.blobs.put(project, digest, length, content).await?;
    let receipt = json!({"digest": digest, "size": length});
    let mut response = Response::new(Body::from(receipt.to_string()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ETAG, tag(digest));
    if new {
        let path = BLOB_TEMPLATE.replace("{region}", server.api.region.as_str());
        let path = path.replace("{project}", project.as_str()).replace("{digest}", &digest.to_string());
        headers.insert(LOCATION, HeaderValue::try_from(path).expect("names and digests are plain ASCII"));
        *response.status_mut() = StatusCode::CREATED;
    }
    Ok(response)
}
