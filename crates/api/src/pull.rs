//! `POST …/blobs:pull`: a server fetches an image from a registry. What can be known early (that there is such an image, and that
//! it may be had) is answered as any request is; then lines of JSON tell how the content comes, and the last one is the image as
//! it can be written, or the error that ended it.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt as _;
use http::HeaderValue;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::request::Parts;
use nexus_model::kind::{self, GLOBAL, ImageSpec, Kind as _, Secret};
use nexus_model::{ApiError, Code, Digest, Name, SecretData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::audit;
use crate::doors::Pull;
use crate::input::read_json;
use crate::operations;
use crate::problem::Refusal;
use crate::query::Query;
use crate::route::{Place, Target};
use crate::secrets;
use crate::serve::{Context, Server};
use crate::watch::right_ended;
use crate::write::JSON;

/// How long it may take until an image is found: several questions to its registry.
const FIND: Duration = Duration::from_secs(120);
/// A pull that says nothing is given a line so often, so that nobody between takes it for dead.
const QUIET: Duration = Duration::from_secs(10);

/// What to pull.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PullRequest {
    /// Such as `registry.example/shop/web:1.4` or `registry.example/web@sha256:…`; without a registry it is Docker's, without a
    /// tag `latest`.
    #[schemars(regex(pattern = r"^[!-~]{1,512}$"))]
    pub reference: String,
    /// A secret of the project with `username` and `password` (and the `registry` that they are for), or with `config.json` as
    /// `docker login` writes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Name>,
}

/// A line of the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PullEvent {
    /// The image is known: so many blobs, and bytes of all of them.
    Found {
        digest: Digest,
        blobs: usize,
        size: u64,
    },
    /// Of one blob so many bytes are here.
    Blob {
        digest: Digest,
        size: u64,
        received: u64,
        done: bool,
    },
    /// All of it is here. This can be written as an image's `spec` now, and for a day.
    Image(ImageSpec),
    Error(ApiError),
}

impl PullEvent {
    fn line(&self) -> Bytes {
        let mut line = serde_json::to_vec(self).expect("events are plain data");
        line.push(b'\n');
        line.into()
    }
}

/// The values of the secret, where an app of this place would find it: in the region, else in the global group.
async fn credentials(
    server: &Server,
    region: &Name,
    project: &Name,
    name: &Name,
) -> Result<(Place, SecretData), ApiError> {
    let kind = kind::find(Secret::PLURAL).expect("a kind");
    let global: Name = GLOBAL.parse().expect("a well-formed name");
    for region in [region, &global] {
        let place = Place { kind, project: Some(project.clone()), organization: None, region: Some(region.clone()) };
        if let Some(data) = secrets::newest(server, &place, name).await? {
            return Ok((place, data));
        }
    }
    Err(ApiError::not_found(Secret::KIND, name.as_str()))
}

pub(crate) async fn handle(
    server: &Arc<Server>,
    region: &Name,
    project: &Name,
    parts: &Parts,
    body: Body,
    context: &Context,
) -> Result<Response, Refusal> {
    Query::parse(parts.uri.query(), &[], &[])?;
    let body = read_json(&parts.headers, body, JSON).await?;
    let request: PullRequest = operations::read(body)?;
    let permit = server.transfer_permit()?;
    let find = async {
        let mut credentials_of = None;
        let mut data = None;
        if let Some(name) = &request.secret {
            let (place, values) = credentials(server, region, project, name).await?;
            credentials_of = Some(audit::target(&place, name.as_str()));
            data = Some(values);
        }
        let pull = Pull { reference: request.reference.clone(), credentials: data };
        let found = server.api.pulls.pull(project, pull).await;
        if credentials_of.is_some() {
            // Whose credentials went out, whatever was answered.
            let answer = found.as_ref().map(drop).map_err(|e: &ApiError| e.code);
            audit::note(server, Some(context), &context.request_id, "blobs:pull".to_owned(), credentials_of, answer);
        }
        found
    };
    let found = tokio::time::timeout(FIND, find).await;
    let events = found.map_err(|_| ApiError::new(Code::Timeout, "the registry takes too long: try again"))??;

    let target = Target::Pull(region.clone(), project.clone());
    let ended = right_ended(Arc::clone(server), context.clone(), target);
    let until = futures::future::select(Box::pin(server.api.shutdown.clone().cancelled_owned()), ended);
    let lines = futures::stream::unfold(events, |mut events| async move {
        match tokio::time::timeout(QUIET, events.next()).await {
            Ok(Some(event)) => Some((event.line(), events)),
            Ok(None) => None,
            Err(_) => Some((Bytes::from_static(b"{}\n"), events)),
        }
    });
    let lines = lines.take_until(until).map(move |line| {
        let _held = &permit;
        std::io::Result::Ok(line)
    });
    let mut response = Response::new(Body::from_stream(lines));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}
