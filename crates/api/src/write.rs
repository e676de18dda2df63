//! Mutations: a request becomes an intent, the writer decides.

use std::time::Duration;

use axum::body::Body;
use http::Method;
use http::request::Parts;
use nexus_control::decide::merge_patch;
use nexus_control::intent::{Accepted, Change, Intent, Provenance, Target};
use nexus_env::RngExt;
use nexus_iam::TokenSecret;
use nexus_model::kind::{AccessKey, AccessKeySpec, GLOBAL, Holder, Image, ImageSpec, Kind, Token, TokenSpec};
use nexus_model::{AnyObject, ApiError, Code, FieldError, Name};
use nexus_store::Consistency;
use serde_json::Value;

use crate::audit;
use crate::federation;
use crate::headers::{self, IfMatch, IfNoneMatch};
use crate::input::{self, Expected};
use crate::list::{find, parse_name, unreadable};
use crate::problem::Refusal;
use crate::query::Query;
use crate::route::{self, Place};
use crate::secrets;
use crate::serve::{Context, Server};
use crate::webhooks;

pub(crate) const JSON: &[&str] = &["application/json"];
pub(crate) const PATCH: &[&str] = &["application/merge-patch+json", "application/json"];

/// Parameters of every mutation.
pub(crate) const PARAMETERS: &[&str] = &["dryRun"];

/// A mutation that the writer took.
pub(crate) struct Done {
    pub place: Place,
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
pub(crate) fn region_of(server: &Server, place: &Place) -> Name {
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

/// What a change would leave, as far as this server can tell.
async fn left_by(server: &Server, place: &Place, name: &Name, change: &Change) -> Result<Option<AnyObject>, ApiError> {
    match change {
        Change::Create { object } | Change::Put { object } => Ok(Some(object.clone())),
        Change::Delete
        | Change::Rollout { .. }
        | Change::Audit { .. }
        | Change::Tell { .. }
        | Change::Rebalance { .. } => Ok(None),
        Change::Patch { patch } => {
            let Some(kv) = find(server, place, name, Consistency::Stale).await? else { return Ok(None) };
            let mut object: Value = serde_json::from_slice(&kv.value).map_err(|e| unreadable(&kv, &e))?;
            merge_patch(&mut object, patch);
            // What can't be read then, the writer refuses.
            Ok(serde_json::from_value(object).ok())
        }
    }
}

/// Whose a new credential is: the caller's own, unless it says.
fn holder_of(object: &AnyObject, asked: Option<Holder>, context: &Context) -> Result<Holder, ApiError> {
    if let Some(holder) = asked {
        return Ok(holder);
    }
    let (organization, holder) = context.caller.holder.clone().ok_or_else(|| {
        ApiError::invalid(vec![FieldError::new("spec.holder", "an operator's key is nobody's: say whose it is to be")])
    })?;
    if object.metadata.organization.as_ref() == Some(&organization) {
        return Ok(holder);
    }
    let message = format!("you are in organization {organization}: say whose it is to be here");
    Err(ApiError::invalid(vec![FieldError::new("spec.holder", message)]))
}

pub(crate) fn refuse_written(field: &str, given: bool) -> Result<(), ApiError> {
    if given {
        return Err(ApiError::invalid(vec![FieldError::new(field, "is written by the server: leave it out")]));
    }
    Ok(())
}

pub(crate) fn read_spec<T: serde::de::DeserializeOwned>(object: &AnyObject) -> Result<T, ApiError> {
    serde_json::from_value(object.spec.clone())
        .map_err(|e| ApiError::invalid(vec![FieldError::new("spec", e.to_string())]))
}

/// A secret that is told once, in the status of the answer to its create.
struct Told {
    field: &'static str,
    text: String,
}

/// Makes what is secret of a credential; what is stored of it goes into the object.
fn mint(server: &Server, object: &mut AnyObject, plural: &str, context: &Context) -> Result<Option<Told>, ApiError> {
    // A credential gives no more than the one by which it was asked for.
    let only = context.caller.project.clone();
    if plural == Token::PLURAL {
        let mut spec: TokenSpec = read_spec(object)?;
        refuse_written("spec.hash", spec.hash.is_some())?;
        let secret = TokenSecret::generate(RngExt::bytes(&*server.api.env.rng));
        spec.holder = Some(holder_of(object, spec.holder, context)?);
        spec.project = only.or(spec.project);
        spec.expires.get_or_insert_with(|| server.now().plus(DEFAULT_LIFE));
        spec.hash = Some(secret.hash().to_string());
        object.spec = serde_json::to_value(spec).expect("specs are plain data");
        return Ok(Some(Told { field: "token", text: secret.reveal() }));
    }
    if plural == AccessKey::PLURAL {
        let mut spec: AccessKeySpec = read_spec(object)?;
        refuse_written("spec.id", spec.id.is_some())?;
        refuse_written("spec.sealed", spec.sealed.is_some())?;
        let key = nexus_iam::access_key::AccessKey::generate();
        let sealed = key.secret.seal(&key.id, &*server.api.master_keys);
        let sealed =
            sealed.map_err(|e| ApiError::new(Code::Unavailable, format!("the secret can't be sealed: {e}")))?;
        spec.holder = Some(holder_of(object, spec.holder, context)?);
        spec.project = only.or(spec.project);
        spec.id = Some(key.id.to_string());
        spec.sealed = Some(serde_json::to_string(&sealed).expect("a sealed value is plain data"));
        object.spec = serde_json::to_value(spec).expect("specs are plain data");
        return Ok(Some(Told { field: "secret", text: key.secret.expose().to_owned() }));
    }
    Ok(None)
}

/// Refuses an image of content that its project has not brought.
async fn refuse_others_blobs(server: &Server, place: &Place, left: Option<&AnyObject>) -> Result<(), ApiError> {
    let spec = left.and_then(|image| serde_json::from_value::<ImageSpec>(image.spec.clone()).ok());
    let (Some(spec), Some(project)) = (spec, &place.project) else { return Ok(()) };
    let mut errors = Vec::new();
    for (i, blob) in spec.blobs.iter().enumerate() {
        if !server.api.blobs.belongs(project, blob.digest).await? {
            let message = format!("{} was not uploaded to project {project}: upload it first", blob.digest);
            errors.push(FieldError::new(format!("spec.blobs[{i}]"), message));
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid(errors)) }
}

/// How long a token is good that does not say.
const DEFAULT_LIFE: Duration = Duration::from_secs(30 * 86_400);

fn verb(change: &Change) -> &'static str {
    match change {
        Change::Create { .. } => "create",
        Change::Delete => "delete",
        Change::Put { .. }
        | Change::Patch { .. }
        | Change::Rollout { .. }
        | Change::Audit { .. }
        | Change::Tell { .. }
        | Change::Rebalance { .. } => "update",
    }
}

/// A secret is sealed for the version that comes next: again, when another write was faster.
const SEALED_AT_MOST: usize = 5;

async fn submit_secret(
    server: &Server,
    place: &Place,
    intent: Intent,
    brought: &secrets::Brought,
    context: &Context,
) -> Result<Accepted, ApiError> {
    let name = &intent.target.name;
    let compare = !intent.dry_run || secrets::may_reveal(server, place, name, context).await;
    let mut tries = 0;
    loop {
        tries += 1;
        let mut sealed = intent.clone();
        secrets::seal(server, place, name, &mut sealed.change, brought, compare).await?;
        match server.writer(place).submit(sealed).await {
            Err(e) if e.code == Code::PreconditionFailed && intent.if_match.is_none() && tries < SEALED_AT_MOST => {}
            Ok(accepted) if accepted.replayed => {
                secrets::refuse_other_values(server, place, &accepted, brought).await?;
                return Ok(accepted);
            }
            other => return other,
        }
    }
}

/// Reads a mutation, asks whether it may be done, submits it, and answers what the writer did.
pub(crate) async fn submit(
    server: &Server,
    target: &route::Target,
    parts: &Parts,
    body: Body,
    context: &Context,
) -> Result<Done, Refusal> {
    let (place, name) = match target {
        route::Target::Collection(place) => (place, None),
        route::Target::Object(place, name) => (place, Some(name.as_str())),
        _ => return Err(Refusal::new(Code::NotFound, "nothing can be changed at this path")),
    };
    let query = Query::parse(parts.uri.query(), PARAMETERS, &[])?;
    let dry_run = query.flag("dryRun")?;
    let idempotency_key = headers::idempotency_key(&parts.headers)?;
    let wait = headers::prefer_wait(&parts.headers)?;
    let callback = webhooks::callback(server, place, &parts.headers)?;
    let Asked { name, mut change, if_match } = read(server, place, name, parts, body).await?;
    let brought = if secrets::is_secret(place) { Some(secrets::take(&mut change)?) } else { None };
    let mut secret = None;
    if let Change::Create { object } = &mut change {
        secret = mint(server, object, place.kind.plural, context)?;
        if secret.is_some() && idempotency_key.is_some() {
            let detail = "a secret is told once and kept nowhere, so its create can't be repeated: leave \
                          Idempotency-Key out; if the answer was lost, delete what was made and create another";
            return Err(Refusal::new(Code::BadRequest, detail));
        }
    }
    let left = left_by(server, place, &name, &change).await?;
    // A sealed value is another each time, so that a repetition would look like another request; it does no harm.
    let sealed = federation::prepare(server, place, &name, &mut change, left.as_ref())?;
    let idempotency_key = idempotency_key.filter(|_| !sealed);
    let allowed = server.authorize(context, target, &parts.method, left.as_ref()).await?;
    webhooks::check(server, place, left.as_ref())?;
    if place.kind.plural == Image::PLURAL {
        refuse_others_blobs(server, place, left.as_ref()).await?;
    }

    let creates = matches!(change, Change::Create { .. } | Change::Put { .. });
    let if_match = match if_match {
        Some(IfMatch::Revision(revision)) => Some(revision),
        // "It exists" is asked of the writer as "it is what it is now".
        Some(IfMatch::Exists) => match find(server, place, &name, Consistency::Linearizable).await? {
            Some(kv) => Some(kv.mod_revision.0),
            None if creates => {
                let detail = format!("there is no {} {:?} to replace", place.kind.kind, name.as_str());
                return Err(Refusal::new(Code::PreconditionFailed, detail));
            }
            None => return Err(ApiError::not_found(place.kind.kind, name.as_str()).into()),
        },
        None => None,
    };
    // Kinds that the cloud itself makes can be replaced, not made.
    if creates && !place.kind.verbs.create && find(server, place, &name, Consistency::Linearizable).await?.is_none() {
        return Err(ApiError::not_found(place.kind.kind, name.as_str()).into());
    }
    let deleted = matches!(change, Change::Delete);
    let intent = Intent {
        request_id: context.request_id.clone(),
        actor: context.caller.name.clone(),
        by: Provenance { callback, ..audit::provenance(context, &allowed.by) },
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
    let mut accepted = match &brought {
        None => server.writer(place).submit(intent).await,
        Some(brought) => submit_secret(server, place, intent, brought, context).await,
    }
    .inspect_err(|error| {
        // What is only late is no refusal.
        if (400..500).contains(&error.status) && error.code != Code::Overloaded {
            let action = format!("{}:{verb}", place.kind.plural);
            audit::note(server, Some(context), &context.request_id, action, Some(noted), Err(error.code));
        }
    })?;
    if let Some(secret) = secret.filter(|_| !dry_run) {
        accepted.object.status[secret.field] = Value::from(secret.text);
    }
    Ok(Done { place: place.clone(), accepted, deleted, dry_run, wait })
}
