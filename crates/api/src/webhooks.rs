//! What users ask of webhooks beside keeping them: a test, a delivery that is sent again, and the callback of a change.
//!
//! Where things are told to is a tenant's to say, and what servers reach is not: a URL whose host is an address is judged
//! when it comes in, and every one again where it is connected to.

use axum::body::Body;
use axum::response::Response;
use http::HeaderMap;
use http::request::Parts;
use nexus_control::intent::{Callback, Change, Intent, Target as Aim, Telling};
use nexus_model::kind::{SigningSecret, Webhook, is_url};
use nexus_model::{AnyObject, ApiError, FieldError, Name};

use crate::audit;
use crate::headers::{self, single};
use crate::list::object_response;
use crate::problem::Refusal;
use crate::query::Query;
use crate::render::object_bytes;
use crate::route::{Place, Target, Verb};
use crate::serve::{Context, Server};

/// The secret that signs callbacks, unless the request names another.
const USUAL_SECRET: &str = "callbacks";

fn invalid(field: &str, message: impl Into<String>) -> ApiError {
    ApiError::invalid(vec![FieldError::new(field, message.into())])
}

fn refuse_inside(server: &Server, field: &str, url: &str) -> Result<(), ApiError> {
    match server.api.webhooks.refuses(url) {
        Some(why) => Err(invalid(field, why)),
        None => Ok(()),
    }
}

/// Who is to be told when a change has come to its end, as its request says.
pub(crate) fn callback(server: &Server, place: &Place, headers: &HeaderMap) -> Result<Option<Callback>, ApiError> {
    let secret = single(headers, &headers::CALLBACK_SECRET)?;
    let Some(url) = single(headers, &headers::CALLBACK)? else {
        return match secret {
            Some(_) => Err(invalid("Callback-Secret", "signs a callback: say where to with the header Callback")),
            None => Ok(None),
        };
    };
    if place.project.is_none() {
        let message = "only what is in a project has callbacks, which its secrets sign: use `Prefer: wait` or a watch";
        return Err(invalid("Callback", message));
    }
    if !is_url(url) {
        return Err(invalid("Callback", "an http:// or https:// URL with a lower-case host, without user or #"));
    }
    refuse_inside(server, "Callback", url)?;
    let secret = SigningSecret::parse(secret.unwrap_or(USUAL_SECRET)).map_err(|e| invalid("Callback-Secret", e))?;
    Ok(Some(Callback { url: url.to_owned(), secret }))
}

/// Refuses a webhook whose URL is of an address that servers don't reach. `left` is what a change would leave.
pub(crate) fn check(server: &Server, place: &Place, left: Option<&AnyObject>) -> Result<(), ApiError> {
    let url = left.filter(|_| is_webhook(place)).and_then(|hook| hook.spec["url"].as_str());
    url.map_or(Ok(()), |url| refuse_inside(server, "spec.url", url))
}

fn is_webhook(place: &Place) -> bool {
    use nexus_model::kind::Kind as _;
    place.kind.plural == Webhook::PLURAL
}

/// `:test` and `:resend`; both answer the delivery that is on its way now.
pub(crate) async fn tell(
    server: &Server,
    target: &Target,
    parts: &Parts,
    body: Body,
    context: &Context,
) -> Result<Response, Refusal> {
    let Target::Custom(place, name, verb) = target else {
        return Err(Refusal::new(nexus_model::Code::NotFound, "nothing can be told at this path"));
    };
    // Neither takes anything.
    drop(body);
    Query::parse(parts.uri.query(), &[], &[])?;
    let allowed = server.authorize(context, target, &parts.method, None).await?;
    let deed = if *verb == Verb::Test { Telling::Test } else { Telling::Resend };
    let intent = Intent {
        request_id: context.request_id.clone(),
        actor: context.caller.name.clone(),
        by: audit::provenance(context, &allowed.by),
        target: aim(place, name),
        change: Change::Tell { deed },
        if_match: None,
        idempotency_key: headers::idempotency_key(&parts.headers)?,
        dry_run: false,
    };
    let accepted = server.writer(place).submit(intent).await.inspect_err(|error| {
        if (400..500).contains(&error.status) {
            let action = format!("{}:{}", place.kind.plural, verb.word());
            let of = Some(audit::target(place, name.as_str()));
            audit::note(server, Some(context), &context.request_id, action, of, Err(error.code));
        }
    })?;
    let revision = accepted.object.metadata.revision;
    Ok(object_response(object_bytes(accepted.object), revision))
}

fn aim(place: &Place, name: &Name) -> Aim {
    Aim {
        plural: place.kind.plural.to_owned(),
        project: place.project.clone(),
        organization: place.organization.clone(),
        name: name.clone(),
    }
}
