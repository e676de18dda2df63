//! Orders about an app's rollout: `POST …/apps/{name}:pause`, `:resume`, `:promote` and `:undo`. Who may change the app may
//! give them. The writer decides; the answer is the app, as after any other change.

use axum::body::{Body, HttpBody as _};
use http::request::Parts;
use nexus_control::intent::{Change, Intent, RolloutOrder, Target};
use nexus_model::{ApiError, Code, FieldError, Name};
use serde::Deserialize;

use crate::audit;
use crate::headers;
use crate::input::{MAX_INTEGER, read_json};
use crate::problem::Refusal;
use crate::query::Query;
use crate::route::{Place, Verb};
use crate::serve::{Context, Server};
use crate::write::{Done, JSON, PARAMETERS};

/// The body of an undo, which may be left out.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Undo {
    to_revision: Option<u64>,
}

async fn undo(parts: &Parts, body: Body) -> Result<RolloutOrder, ApiError> {
    if body.is_end_stream() {
        return Ok(RolloutOrder::Undo { to: None });
    }
    let body = read_json(&parts.headers, body, JSON).await?;
    let wrong = |message: &str| ApiError::invalid(vec![FieldError::new("toRevision", message)]);
    let whole = "the number of a revision, or nothing: see `nexus rollout history`";
    // A list would be read as the fields in their order, and null as none.
    if !body.is_object() || body.get("toRevision").is_some_and(|v| !v.is_u64()) {
        return Err(wrong(whole));
    }
    let undo: Undo = serde_json::from_value(body).map_err(|e| ApiError::new(Code::BadRequest, e.to_string()))?;
    match undo.to_revision {
        Some(number) if !(1..=MAX_INTEGER).contains(&number) => Err(wrong(whole)),
        to => Ok(RolloutOrder::Undo { to }),
    }
}

/// Gives an order to the writer.
#[allow(clippy::too_many_arguments)]
pub(crate) async fn order(
    server: &Server,
    place: &Place,
    name: &Name,
    verb: Verb,
    parts: &Parts,
    body: Body,
    context: &Context,
    by: &[String],
) -> Result<Done, Refusal> {
    let query = Query::parse(parts.uri.query(), PARAMETERS, &[])?;
    let dry_run = query.flag("dryRun")?;
    let idempotency_key = headers::idempotency_key(&parts.headers)?;
    let wait = headers::prefer_wait(&parts.headers)?;
    let order = match verb {
        Verb::Pause => RolloutOrder::Pause,
        Verb::Resume => RolloutOrder::Resume,
        Verb::Promote => RolloutOrder::Promote,
        _ => undo(parts, body).await?,
    };
    let intent = Intent {
        request_id: context.request_id.clone(),
        actor: context.caller.name.clone(),
        by: audit::provenance(context, by),
        target: Target {
            plural: place.kind.plural.to_owned(),
            project: place.project.clone(),
            organization: place.organization.clone(),
            name: name.clone(),
        },
        change: Change::Rollout { order },
        if_match: None,
        idempotency_key,
        dry_run,
    };
    let accepted = server.writer(place).submit(intent).await.inspect_err(|error| {
        // What is only late is no refusal.
        if (400..500).contains(&error.status) && error.code != Code::Overloaded {
            let action = format!("{}:{}", place.kind.plural, verb.word());
            let noted = audit::target(place, name.as_str());
            audit::note(server, Some(context), &context.request_id, action, Some(noted), Err(error.code));
        }
    })?;
    Ok(Done { place: place.clone(), accepted, deleted: false, dry_run, wait })
}
