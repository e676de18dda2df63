//! Mutations: a request becomes an intent, the writer decides.

use std::time::Duration;

use axum::body::Body;
use http::Method;
use http::request::Parts;
use nexus_control::intent::{Accepted, Change, Intent, Target};
use nexus_model::kind::GLOBAL;
use nexus_model::{ApiError, Code, FieldError, Name};
use nexus_store::Consistency;

use crate::audit;
use crate::headers::{self, IfMatch, IfNoneMatch};
use crate::input::{self, Expected};
use crate::list::{find, parse_name};
use crate::query::Query;
use crate::route::Place;
use crate::serve::{Context, Server};

pub(crate) const JSON: &[&str] = &["application/json"];
pub(crate) const PATCH: &[&str] = &["application/merge-patch+json", "application/json"];

/// Parameters of every mutation.
pub(crate) const PARAMETERS: &[&str] = &["dryRun"];

/// A mutation that the writer took.
pub(crate) struct Done {
    pub accepted: Accepted,
    pub deleted: bool,
    pub dry_run: bool,
    /// How long the client would wait for the object to settle, if it asked to.
    pub wait: Option<Duration>,
}

/// What to do, read from the request.
struct Asked {
    name: Name,
    change: Change,
    if_match: Option<IfMatch>,
}

/// What an object here says of its region.
fn region_of(server: &Server, place: &Place) -> Name {
    let global = || GLOBAL.parse().expect("a well-formed name");
    if place.is_global() { global() } else { server.api.region.clone() }
}

async fn read(
    server: &Server,
    place: &Place,
    name: Option<&str>,
    parts: &Parts,
    body: Body,
) -> Result<Asked, ApiError> {
    let region = &region_of(server, place);
    let mut if_match = headers::if_match(&parts.headers)?;
    let only_new = match headers::if_none_match(&parts.headers)? {
        Some(IfNoneMatch::Any) if parts.method == Method::PUT => true,
        Some(IfNoneMatch::Any) | Some(IfNoneMatch::Tags(_)) => {
            let detail = "If-None-Match on a change can only be * with PUT, for \"create, don't replace\"";
            return Err(ApiError::new(Code::BadRequest, detail));
        }
        None => false,
    };
    if parts.method == Method::POST {
        if if_match.is_some() {
            return Err(ApiError::new(Code::BadRequest, "If-Match has no meaning for a create"));
        }
        let body = input::read_json(&parts.headers, body, JSON).await?;
        let (object, _) = input::object(&Expected { place, region, name: None }, &body)?;
        return Ok(Asked { name: object.metadata.name.clone(), change: Change::Create { object }, if_match: None });
    }
    let text = name.unwrap_or("");
    if parts.method == Method::DELETE {
        return Ok(Asked { name: parse_name(place, text)?, change: Change::Delete, if_match });
    }
    if parts.method == Method::PATCH {
        let name = parse_name(place, text)?;
        let body = input::read_json(&parts.headers, body, PATCH).await?;
        let shape = &server.schemas.of(place.kind).shape;
        let patch = input::patch(&Expected { place, region, name: Some(&name) }, shape, &body)?;
        return Ok(Asked { name, change: Change::Patch { patch }, if_match });
    }
    let wrong =
        |e: nexus_model::name::NameError| ApiError::invalid(vec![FieldError::new("metadata.name", e.to_string())]);
    let name: Name = text.parse().map_err(wrong)?;
    let body = input::read_json(&parts.headers, body, JSON).await?;
    let (object, revision) = input::object(&Expected { place, region, name: Some(&name) }, &body)?;
    if if_match.is_none() && !only_new {
        if_match = revision.map(IfMatch::Revision);
    }
    let change = if only_new { Change::Create { object } } else { Change::Put { object } };
    Ok(Asked { name, change, if_match })
}

fn verb(change: &Change) -> &'static str {
    match change {
        Change::Create { .. } => "create",
        Change::Delete => "delete",
        Change::Put { .. } | Change::Patch { .. } | Change::Audit { .. } => "update",
    }
}

/// Reads a mutation, submits it, and answers what the writer did.
pub(crate) async fn submit(
    server: &Server,
    place: &Place,
    name: Option<&str>,
    parts: &Parts,
    body: Body,
    context: &Context,
) -> Result<Done, ApiError> {
    let query = Query::parse(parts.uri.query(), PARAMETERS, &[])?;
    let dry_run = query.flag("dryRun")?;
    let idempotency_key = headers::idempotency_key(&parts.headers)?;
    let wait = headers::prefer_wait(&parts.headers)?;
    let Asked { name, change, if_match } = read(server, place, name, parts, body).await?;

    let creates = matches!(change, Change::Create { .. } | Change::Put { .. });
    let if_match = match if_match {
        Some(IfMatch::Revision(revision)) => Some(revision),
        // "It exists" is asked of the writer as "it is what it is now".
        Some(IfMatch::Exists) => match find(server, place, &name, Consistency::Linearizable).await? {
            Some(kv) => Some(kv.mod_revision.0),
            None if creates => {
                let detail = format!("there is no {} {:?} to replace", place.kind.kind, name.as_str());
                return Err(ApiError::new(Code::PreconditionFailed, detail));
            }
            None => return Err(ApiError::not_found(place.kind.kind, name.as_str())),
        },
        None => None,
    };
    // Kinds that the cloud itself makes can be replaced, not made.
    if creates && !place.kind.verbs.create && find(server, place, &name, Consistency::Linearizable).await?.is_none() {
        return Err(ApiError::not_found(place.kind.kind, name.as_str()));
    }
    let deleted = matches!(change, Change::Delete);
    let intent = Intent {
        request_id: context.request_id.clone(),
        actor: context.principal.name.clone(),
        by: audit::provenance(context),
        target: Target {
            plural: place.kind.plural.to_owned(),
            project: place.project.clone(),
            organization: place.organization.clone(),
            name,
        },
        change,
        if_match,
        idempotency_key,
        dry_run,
    };
    let (verb, noted) = (verb(&intent.change), audit::target(place, intent.target.name.as_str()));
    let accepted = server.writer(place).submit(intent).await.inspect_err(|error| {
        // What is only late is no refusal.
        if (400..500).contains(&error.status) && error.code != Code::Overloaded {
            let action = format!("{}:{verb}", place.kind.plural);
            audit::note(server, Some(context), &context.request_id, action, Some(noted), Err(error.code));
        }
    })?;
    Ok(Done { accepted, deleted, dry_run, wait })
}
