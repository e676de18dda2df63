//! The way of one request: its id, its route, who asks, what may run at once, its deadline, its handler; and on the way
//! out the headers and figures that every answer has. A panic in a handler is answered like any other error.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bytes::Bytes;
use futures::FutureExt;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG};
use http::request::Parts;
use http::{HeaderValue, Method, StatusCode};
use nexus_control::intent::Writer;
use nexus_env::RngExt;
use nexus_iam::policy;
use nexus_iam::sigv4::Replays;
use nexus_model::{ApiError, Code, RequestId};
use nexus_store::{Consistency, RangeRequest, Store};
use sha2::{Digest, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::admission::{Admission, Class};
use crate::authorize::{Allowed, Lens};
use crate::caller::{Caller, Checked};
use crate::headers::{self, STALE_MS};
use crate::metrics::{self, Metrics};
use crate::openapi::{self, Schemas};
use crate::problem::{Refusal, from_store};
use crate::providers::Providers;
use crate::query::Query;
use crate::rates::Rates;
use crate::route::{self, Place, Target, Verb};
use crate::tries::SignIns;
use crate::{
    Api, audit, blobs, credentials, elsewhere, federation, list, networks, operations, pull, rollouts, scaling,
    secrets, settle, signature, signin, streams, watch, webhooks, whoami, write,
};

/// Unknown credentials for which the global group is asked at once whether another server has just given them.
const STRANGERS: usize = 16;

/// The API with what it derives from its kinds once.
pub(crate) struct Server {
    pub api: Api,
    pub schemas: Schemas,
    admission: Arc<Admission>,
    streams: Arc<Semaphore>,
    transfers: Arc<Semaphore>,
    pub sign_ins: SignIns,
    pub providers: Providers,
    pub checked: Checked,
    pub replays: Mutex<Replays>,
    rates: Rates,
    /// Turns for those whose credential is not known.
    pub strangers: Semaphore,
    metrics: Metrics,
    openapi: Bytes,
    openapi_tag: String,
}

/// What a handler knows of its request beside parts and body.
#[derive(Clone)]
pub(crate) struct Context {
    pub request_id: RequestId,
    pub caller: Caller,
}

impl Server {
    pub fn new(api: Api) -> Arc<Self> {
        let schemas = Schemas::generate();
        let document = openapi::document(&schemas, &api.region);
        let openapi = Bytes::from(serde_json::to_vec(&document).expect("the document is plain data"));
        let openapi_tag = format!("{:x}", Sha256::digest(&openapi));
        Arc::new(Self {
            admission: Admission::new(api.limits.requests, &api.metrics),
            streams: Arc::new(Semaphore::new(api.limits.streams)),
            transfers: Arc::new(Semaphore::new(api.limits.transfers)),
            sign_ins: SignIns::default(),
            providers: Providers::new(Arc::clone(&api.providers)),
            checked: Checked::default(),
            replays: Mutex::new(Replays::new(signature::REMEMBERED)),
            rates: Rates::new(api.limits.caller_rate, api.limits.project_rate, api.limits.caller_requests),
            strangers: Semaphore::new(STRANGERS),
            metrics: Metrics::new(&api.metrics),
            schemas,
            openapi,
            openapi_tag,
            api,
        })
    }

    /// The store that keeps what is at a place.
    pub fn store(&self, place: &Place) -> &Arc<dyn Store> {
        if place.is_global() { &self.api.global_store } else { &self.api.store }
    }

    /// The writer of what is at a place.
    pub fn writer(&self, place: &Place) -> &Arc<dyn Writer> {
        if place.is_global() { &self.api.global_writer } else { &self.api.writer }
    }

    /// The newest revision of a place's log.
    pub async fn current_revision(&self, place: &Place, consistency: Consistency) -> Result<u64, ApiError> {
        let mut request = RangeRequest::get(nexus_model::key::FORMAT);
        request.consistency = consistency;
        Ok(self.store(place).range(request).await.map_err(from_store)?.revision.0)
    }

    /// Says of an answer from this server's own copy how old that may be.
    pub fn tell_age(&self, place: &Place, consistency: Consistency, response: &mut Response) {
        if consistency == Consistency::Stale {
            let age = self.api.status.stale_ms(place.is_global());
            response.headers_mut().insert(STALE_MS, HeaderValue::from(age));
        }
    }

    /// A place among the streams, if one is free.
    pub fn stream_permit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        take(&self.streams, "streams")
    }

    pub fn transfer_permit(&self) -> Result<OwnedSemaphorePermit, ApiError> {
        take(&self.transfers, "transfers of blobs")
    }

    /// Runs an ordinary request's work under its deadline.
    async fn deadline<T, E: From<ApiError>>(&self, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let limit = self.api.limits.request_timeout;
        tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
            let detail = format!("no answer within {} s; a change may or may not have been committed", limit.as_secs());
            Err(ApiError::new(Code::Timeout, detail).into())
        })
    }
}

fn take(semaphore: &Arc<Semaphore>, what: &str) -> Result<OwnedSemaphorePermit, ApiError> {
    let overloaded = |_| ApiError::new(Code::Overloaded, format!("too many {what} at once on this server: try again"));
    Arc::clone(semaphore).try_acquire_owned().map_err(overloaded)
}

/// Answers any request.
pub(crate) async fn handle(State(server): State<Arc<Server>>, request: Request) -> Response {
    let started = server.api.env.monotonic();
    let (parts, body) = request.into_parts();
    let request_id = headers::request_id(&parts.headers)
        .unwrap_or_else(|| RequestId::from_random(RngExt::bytes(&*server.api.env.rng)));
    let method = parts.method.clone();
    let target = route::resolve(parts.uri.path(), &server.api.region);
    let template = target.as_ref().map_or_else(|_| "none".to_owned(), Target::template);

    let work = dispatch(Arc::clone(&server), target, parts, body, request_id.clone());
    let outcome = AssertUnwindSafe(Box::pin(work)).catch_unwind().await.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
        tracing::error!(%request_id, route = template, panic = text, "a handler panicked");
        Err(Refusal::new(Code::Internal, "a defect of the server; its log has more under this request's id"))
    });
    let mut response = outcome.unwrap_or_else(|refusal| {
        if refusal.error.status >= 500 {
            tracing::warn!(%request_id, route = template, code = ?refusal.error.code, "{}", refusal.error.detail);
        }
        refusal.into_response(&request_id)
    });
    let id = HeaderValue::try_from(request_id.as_str()).expect("request ids are plain ASCII");
    response.headers_mut().insert(headers::REQUEST_ID, id);
    if method == Method::HEAD {
        response = without_body(response);
    }
    let took = server.api.env.monotonic().saturating_sub(started);
    server.metrics.observe(template, &method, response.status().as_u16(), took);
    response
}

/// A HEAD's answer: the headers of the GET, and its length where that is known.
fn without_body(response: Response) -> Response {
    use axum::body::HttpBody;
    let (mut parts, body) = response.into_parts();
    if let Some(length) = body.size_hint().exact()
        && !parts.headers.contains_key(CONTENT_LENGTH)
        && parts.status != StatusCode::NOT_MODIFIED
    {
        parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    Response::from_parts(parts, Body::empty())
}

fn plain(content_type: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

async fn open(server: &Server, target: &Target, parts: &Parts) -> Result<Response, Refusal> {
    if let Target::Providers = target {
        let query = Query::parse(parts.uri.query(), &["organization"], &[])?;
        let organization = query.get("organization").and_then(|o| o.parse().ok());
        let organization = organization.ok_or_else(|| Refusal::new(Code::BadRequest, "say ?organization=NAME"))?;
        return Ok(json(&federation::offered(server, &organization)));
    }
    Query::parse(parts.uri.query(), &[], &[])?;
    match target {
        Target::Ready => match server.api.status.ready().await {
            Ok(()) => Ok(plain("text/plain; charset=utf-8", "ready\n")),
            Err(why) => Err(Refusal::new(Code::Unavailable, why)),
        },
        Target::Metrics => Ok(plain(metrics::CONTENT_TYPE, metrics::encode(&server.api.metrics))),
        Target::OpenApi => {
            let known = headers::if_none_match(&parts.headers)?;
            let mut response = if known.is_some_and(|k| k.names(&server.openapi_tag)) {
                let mut response = Response::new(Body::empty());
                *response.status_mut() = StatusCode::NOT_MODIFIED;
                response
            } else {
                plain("application/json", server.openapi.clone())
            };
            let tag = HeaderValue::try_from(format!("\"{}\"", server.openapi_tag)).expect("hexadecimal digits");
            response.headers_mut().insert(ETAG, tag);
            Ok(response)
        }
        Target::Discovery => Ok(json(&signin::discovery(server))),
        Target::Keys => Ok(json(&signin::keys(server))),
        _ => Ok(plain("text/plain; charset=utf-8", "ok\n")),
    }
}

/// 200 with plain data.
pub(crate) fn json(value: &impl serde::Serialize) -> Response {
    plain("application/json", serde_json::to_vec(value).expect("plain data"))
}

async fn dispatch(
    server: Arc<Server>,
    target: Result<Target, ApiError>,
    parts: Parts,
    body: Body,
    request_id: RequestId,
) -> Result<Response, Refusal> {
    let target = target?;
    route::check_method(&target, &parts.method)?;
    if let Target::SignIn = target {
        let _permit = server.admission.admit(Class::of(&target, &parts.headers), &server.api.env).await?;
        return Ok(signin::token(&server, &parts, body, &request_id).await);
    }
    if target.is_open() {
        return open(&server, &target, &parts).await;
    }
    if let Target::Operation(operation) = &target
        && operation.open
    {
        let _permit = server.admission.admit(Class::of(&target, &parts.headers), &server.api.env).await?;
        return operate(&server, operation, &parts, body, None, &request_id).await;
    }
    let unknown = |_: &Refusal| audit::unknown(&server, &parts, &request_id);
    let caller = server.recognize(&parts).await.inspect_err(unknown)?;
    let body = match caller.signed_body {
        Some(signed) => signature::checked(body, signed),
        None => body,
    };
    let context = Context { caller, request_id };
    // Only a project that is there has a bucket: invented names must not make any.
    let project = target.project().filter(|p| server.api.directory.read(|known| known.project(p).is_some()));
    let taken = server.rates.take(&context.caller, project)?;
    match answer(server, target, parts, body, context).await {
        Ok(mut response) => {
            taken.tell(response.headers_mut());
            Ok(response)
        }
        Err(refusal) => Err(taken.tell_refusal(refusal)),
    }
}

/// Does what operators do to the fleet, and notes it.
async fn operate(
    server: &Arc<Server>,
    operation: &'static operations::Operation,
    parts: &Parts,
    body: Body,
    context: Option<&Context>,
    request_id: &RequestId,
) -> Result<Response, Refusal> {
    let done = server.deadline(operations::handle(server, operation, parts, body)).await;
    let answer = done.as_ref().map(drop).map_err(|e: &ApiError| e.code);
    audit::note(server, context, request_id, format!("operations:{}", operation.name), None, answer);
    Ok(done?)
}

/// Answers a request whose caller is known.
async fn answer(
    server: Arc<Server>,
    target: Target,
    mut parts: Parts,
    body: Body,
    context: Context,
) -> Result<Response, Refusal> {
    let (target, body) = match target {
        Target::Scale => server.deadline(scaling::as_patch(&server, &mut parts, body)).await?,
        target => (target, body),
    };
    if let Some(region) = target.region() {
        elsewhere::check(&server, region)?;
    }
    if let Target::Elsewhere(region, _) = &target {
        return Ok(elsewhere::pass(&server, region, parts, body, &context).await?);
    }
    let reads = matches!(parts.method, Method::GET | Method::HEAD);
    let class = Class::of(&target, &parts.headers);
    // What a change would make is known only from its body, so those ask when they have read it.
    let allowed = match &target {
        Target::Collection(_) | Target::Object(..) if !reads => Allowed { lens: Lens::All, by: Vec::new() },
        // It wants to know by what right.
        Target::Custom(_, _, Verb::Test | Verb::Resend) => Allowed { lens: Lens::All, by: Vec::new() },
        _ => server.authorize(&context, &target, &parts.method, None).await?,
    };
    let lens = allowed.lens.clone();
    match target {
        Target::Operation(operation) => {
            let _permit = server.admission.admit(class, &server.api.env).await?;
            operate(&server, operation, &parts, body, Some(&context), &context.request_id).await
        }
        Target::WhoAmI => {
            Query::parse(parts.uri.query(), &[], &[])?;
            Ok(json(&whoami::who_am_i(&server, &context)))
        }
        Target::PolicySchema => {
            Query::parse(parts.uri.query(), &[], &[])?;
            Ok(plain("text/plain; charset=utf-8", policy::vocabulary().text()))
        }
        Target::Can => {
            let _permit = server.admission.admit(class, &server.api.env).await?;
            Ok(server.deadline(whoami::can(&server, &context, &parts, body)).await?)
        }
        Target::Blob(_, project, digest) => {
            let permit = server.transfer_permit()?;
            Ok(blobs::handle(&server, &project, digest, &parts, body, permit).await?)
        }
        Target::Pull(region, project) => Ok(pull::handle(&server, &region, &project, &parts, body, &context).await?),
        Target::Custom(
            place,
            name,
            verb @ (Verb::SetPassword | Verb::Invite | Verb::EnrollTotp | Verb::ConfirmTotp),
        ) => {
            let _permit = server.admission.admit(class, &server.api.env).await?;
            Ok(server.deadline(credentials::change(&server, &place, &name, verb, &parts, body, &context)).await?)
        }
        Target::Custom(place, name, verb) if verb.is_order() => {
            let permit = server.admission.admit(class, &server.api.env).await?;
            let work = rollouts::order(&server, &place, &name, verb, &parts, body, &context, &allowed.by);
            let done = server.deadline(Box::pin(work)).await?;
            drop(permit);
            Ok(settle::answer(&server, done).await)
        }
        Target::Custom(_, _, Verb::Test | Verb::Resend) => {
            let _permit = server.admission.admit(class, &server.api.env).await?;
            server.deadline(webhooks::tell(&server, &target, &parts, body, &context)).await
        }
        Target::Custom(place, name, Verb::Reveal) => {
            let _permit = server.admission.admit(class, &server.api.env).await?;
            let done = server.deadline(secrets::reveal(&server, &place, &name, &parts)).await;
            let answer = done.as_ref().map(drop).map_err(|refusal| refusal.error.code);
            let of = Some(audit::target(&place, name.as_str()));
            audit::note(&server, Some(&context), &context.request_id, "secrets:reveal".to_owned(), of, answer);
            done
        }
        Target::Audit(region, organization, asked) => {
            let _permit = server.admission.admit(class, &server.api.env).await?;
            Ok(server
                .deadline(audit::handle(&server, &region, organization.as_ref(), asked, &parts, body, &context))
                .await?)
        }
        Target::Custom(place, name, Verb::Load) => {
            let _permit = server.admission.admit(class, &server.api.env).await?;
            Ok(server.deadline(scaling::load(&server, &place, &name, &parts)).await?)
        }
        Target::Custom(place, name, Verb::Trace) => {
            let _permit = server.admission.admit(class, &server.api.env).await?;
            server.deadline(networks::trace(&server, &place, &name, &parts)).await
        }
        Target::Custom(place, name, Verb::Check) => {
            let _permit = server.admission.admit(class, &server.api.env).await?;
            server.deadline(networks::check(&server, &place, &name, &parts)).await
        }
        Target::Custom(place, name, verb) => {
            let done = streams::handle(&server, &place, &name, verb, &mut parts, &context).await;
            if matches!(verb, Verb::Exec | Verb::Capture) {
                let answer = done.as_ref().map(drop).map_err(|refusal| refusal.error.code);
                let of = Some(audit::target(&place, name.as_str()));
                let action = format!("{}:{}", place.kind.plural, verb.word());
                audit::note(&server, Some(&context), &context.request_id, action, of, answer);
            }
            done
        }
        Target::Status => {
            Query::parse(parts.uri.query(), &[], &[])?;
            let _permit = server.admission.admit(class, &server.api.env).await?;
            let status = server.deadline(server.api.status.status().map(Ok::<_, ApiError>)).await?;
            Ok(json(&status))
        }
        Target::Collection(place) if reads => {
            let query = Query::parse(parts.uri.query(), list::LIST_PARAMETERS, &[])?;
            if query.get("watch").is_some() {
                return Ok(watch::handle(&server, &place, &query, &parts, &context, lens).await?);
            }
            let _permit = server.admission.admit(class, &server.api.env).await?;
            Ok(server.deadline(list::list(&server, &place, &query, &lens, &context)).await?)
        }
        Target::Object(place, name) if reads => {
            let _permit = server.admission.admit(class, &server.api.env).await?;
            let work = list::get(&server, &place, &name, &parts.headers, parts.uri.query());
            Ok(server.deadline(work).await?)
        }
        Target::Collection(_) | Target::Object(..) => {
            let permit = server.admission.admit(class, &server.api.env).await?;
            let done = server.deadline(Box::pin(write::submit(&server, &target, &parts, body, &context))).await?;
            drop(permit);
            Ok(settle::answer(&server, done).await)
        }
        // Answered above.
        Target::Health
        | Target::Ready
        | Target::Metrics
        | Target::OpenApi
        | Target::SignIn
        | Target::Discovery
        | Target::Keys
        | Target::Providers
        | Target::Scale
        | Target::Elsewhere(..) => Err(Refusal::new(Code::NotFound, "nothing is at this path")),
    }
}
