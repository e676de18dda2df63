//! One request from its arrival to the head of its answer: routing, attempts, and what an attempt's failure allows.
//!
//! What may be sent again:
//! * anything, if it was certainly not sent (no connection, or the connection closed before the request was written);
//! * an idempotent request (RFC 9110, section 9.2.2) whose connection broke before its answer began, if its body can
//!   be sent from its beginning: it has none, it was small enough to keep, or nobody has read of it.
//!
//! Short answers to idempotent requests are given a moment to arrive whole before their head is passed on, so that an
//! instance that dies in the middle of one costs nothing. An instance's own error answers are passed on as they are.
//! There is no limit to how long an instance may think: a dead host is noticed by its connection, not by silence.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use http::header::{CONTENT_LENGTH, HOST, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use nexus_env::{Endpoint, RngExt};
use nexus_model::{RequestId, Uid};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::{debug, info, warn};

use crate::backend::Lease;
use crate::body::{Answer, RequestBody, ResponseBody};
use crate::gateway::Core;
use crate::headers::{self, REQUEST_ID};
use crate::health::Failure;
use crate::problem::Problem;
use crate::table::{Choice, Service, host_of};
use crate::upstream::{self, Connection, Failed};

/// Bodies of idempotent requests up to this size are read before they are sent, and so can be sent again.
const KEPT_BODY: u64 = 64 * 1024;
/// How long such a body may take.
const BODY_TIME: Duration = Duration::from_secs(30);
/// Answers up to this size are waited for …
const SETTLED_ANSWER: u64 = 64 * 1024;
/// … this long, before their head is passed on.
const SETTLE_TIME: Duration = Duration::from_millis(50);
/// The pause after every instance has been tried, unless a new table comes.
const ROUND: Duration = Duration::from_millis(200);

/// Answers a request. Never fails: what goes wrong is an answer too.
pub(crate) async fn handle(core: Arc<Core>, mut request: Request<Incoming>, peer: Endpoint) -> Response<ResponseBody> {
    let began = Instant::now();
    let given = request.headers().get(REQUEST_ID).and_then(|v| v.to_str().ok()).and_then(|t| t.parse().ok());
    let id: RequestId = given.unwrap_or_else(|| RequestId::from_random(core.env.rng.bytes()));
    let id_value = HeaderValue::try_from(id.as_str()).expect("request ids are visible ASCII");
    request.headers_mut().insert(REQUEST_ID, id_value.clone());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let host = authority(&request);

    let mut service = None;
    let outcome = match &host {
        _ if method == Method::CONNECT => Err(Problem::Connect),
        None => Err(Problem::NoHost),
        Some(host) => serve(&core, request, host, &path, &peer, began, &mut service).await,
    };
    let mut response = outcome.unwrap_or_else(|problem| problem.answer(id.as_str()));
    response.headers_mut().entry(REQUEST_ID).or_insert(id_value);
    let took = began.elapsed();
    match &service {
        Some(service) => service.metrics.observe(response.status(), took),
        None => {
            core.metrics.unrouted.inc();
        }
    }
    if core.options.access_log {
        let service = service.as_ref().map(|s| s.metrics.name.as_str());
        info!(
            target: "nexus_edge::access",
            %peer, request_id = %id, %method, host = host.as_ref().and_then(|h| h.to_str().ok()), path,
            status = response.status().as_u16(), millis = took.as_millis() as u64, service,
        );
    }
    response
}

/// The host that a request is for, as it was written. The target wins over the header (RFC 9112, section 3.2.2).
fn authority(request: &Request<Incoming>) -> Option<HeaderValue> {
    if let Some(authority) = request.uri().authority() {
        // Without user information, which no server wants to see.
        let host = authority.as_str().rsplit('@').next().unwrap_or_default();
        return HeaderValue::try_from(host).ok();
    }
    let mut hosts = request.headers().get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(one), None) if !one.is_empty() => Some(one.clone()),
        _ => None,
    }
}

async fn serve(
    core: &Arc<Core>,
    mut request: Request<Incoming>,
    host: &HeaderValue,
    path: &str,
    peer: &Endpoint,
    began: Instant,
    service: &mut Option<Arc<Service>>,
) -> Result<Response<ResponseBody>, Problem> {
    let name = host_of(host.to_str().map_err(|_| Problem::NoHost)?);
    // A gateway that has just started may be about to read its cache.
    let mut tables = core.table.subscribe();
    let first = timeout(core.options.patience, tables.wait_for(Option::is_some)).await;
    let table = first.ok().and_then(Result::ok).and_then(|table| table.clone()).ok_or(Problem::NoTable)?;
    *service = Some(table.route(&name, path).ok_or_else(|| Problem::Unknown(name.clone()))?.clone());
    drop(table);
    let upgrade = (request.version() == Version::HTTP_11 && headers::upgrade(request.headers()).is_some())
        .then(|| hyper::upgrade::on(&mut request));
    let (head, body) = request.into_parts();
    // An upgrade is a conversation; nothing of it may happen twice.
    let idempotent = upgrade.is_none() && is_idempotent(&head.method);
    let body = take_body(body, idempotent).await?;
    let attempts = Attempts {
        core,
        idempotent,
        method: head.method,
        uri: head.uri,
        headers: head.headers,
        host,
        name,
        peer,
        body,
        upgrade,
        until: began + core.options.budget,
        began,
    };
    attempts.run(service).await
}

fn is_idempotent(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::OPTIONS, Method::PUT, Method::DELETE, Method::TRACE].contains(method)
}

async fn take_body(body: Incoming, idempotent: bool) -> Result<RequestBody, Problem> {
    if body.is_end_stream() {
        return Ok(RequestBody::Whole(None));
    }
    if idempotent && body.size_hint().exact().is_some_and(|size| size <= KEPT_BODY) {
        let whole = timeout(BODY_TIME, body.collect()).await.map_err(|_| Problem::Body)?.map_err(|_| Problem::Body)?;
        return Ok(RequestBody::Whole(Some(whole.to_bytes())));
    }
    Ok(RequestBody::stream(body))
}

/// A request that is tried until it is answered or may not be tried again.
struct Attempts<'a> {
    core: &'a Arc<Core>,
    idempotent: bool,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    host: &'a HeaderValue,
    /// The host as tables know it.
    name: String,
    peer: &'a Endpoint,
    body: RequestBody,
    upgrade: Option<OnUpgrade>,
    until: Instant,
    began: Instant,
}

impl Attempts<'_> {
    async fn run(mut self, held: &mut Option<Arc<Service>>) -> Result<Response<ResponseBody>, Problem> {
        let options = &self.core.options;
        let mut tried: Vec<Uid> = Vec::new();
        let mut sends = 0;
        let mut attempts = 0u32;
        loop {
            // Taken before the table is looked at, so that no change is missed.
            let mut tables = self.core.table.subscribe();
            let table = self.core.table().ok_or(Problem::NoTable)?;
            // A route that went away meanwhile leaves the request with the service that it had.
            if let Some(newest) = table.route(&self.name, self.uri.path()) {
                *held = Some(newest.clone());
            }
            drop(table);
            let service = held.clone().expect("the request has been routed");
            let named = || service.metrics.name.clone();
            let lease = match service.choose(&tried, options.max_outstanding) {
                Choice::Instance(lease) => lease,
                choice => {
                    let (busy, none) = (matches!(choice, Choice::Busy), service.members.is_empty());
                    let until = if busy || none { self.until.min(self.began + options.patience) } else { self.until };
                    let waited = wait(&service, options.max_waiting, until, none, tables.changed()).await;
                    tried.clear();
                    match waited {
                        Ok(()) => continue,
                        Err(()) if busy => return Err(Problem::Busy(named())),
                        Err(()) if none => return Err(Problem::NoInstance(named())),
                        Err(()) => return Err(Problem::Unreachable(named())),
                    }
                }
            };
            attempts += 1;
            if attempts > 1 {
                service.metrics.retries.inc();
            }
            let uid = lease.backend().uid;
            match self.attempt(&service, lease).await {
                Ok(response) => return Ok(response),
                Err(failed) => {
                    sends += u32::from(failed.sent);
                    let again = (!failed.sent || (self.idempotent && sends < options.max_sends))
                        && self.body.is_untouched()
                        && Instant::now() < self.until;
                    debug!(service = service.metrics.name, instance = %uid, again, reason = failed.reason,
                           "an attempt failed");
                    if !again {
                        return Err(if failed.sent { Problem::Broken(named()) } else { Problem::Unreachable(named()) });
                    }
                    tried.push(uid);
                }
            }
        }
    }

    /// Sends the request to one instance.
    async fn attempt(&mut self, service: &Service, lease: Lease) -> Result<Response<ResponseBody>, Failed> {
        let backend = lease.backend().clone();
        // A connection that was idle may have been closed at the other end just now. That says nothing of the
        // instance, so it is asked again on a new connection before another one is.
        if let Some(idle) = upstream::pooled(&backend) {
            match self.exchange(idle, &lease).await {
                Ok(answer) => {
                    backend.health.succeeded();
                    return Ok(self.deliver(answer, lease));
                }
                Err(failed) => {
                    if failed.silent {
                        backend.forget_connections();
                        self.blame(service, &lease, Failure::Unreachable, &failed.reason);
                    }
                    let again = !failed.silent && self.body.is_untouched() && (!failed.sent || self.idempotent);
                    if !again {
                        return Err(failed);
                    }
                }
            }
        }
        let connection = match upstream::connect(self.core, &backend).await {
            Ok(connection) => connection,
            Err(e) => {
                backend.forget_connections();
                let reason = e.to_string();
                self.blame(service, &lease, Failure::Unreachable, &reason);
                return Err(Failed { sent: false, silent: false, reason });
            }
        };
        match self.exchange(connection, &lease).await {
            Ok(answer) => {
                backend.health.succeeded();
                Ok(self.deliver(answer, lease))
            }
            Err(failed) => {
                let kind = if failed.silent { Failure::Unreachable } else { Failure::Reset };
                self.blame(service, &lease, kind, &failed.reason);
                Err(failed)
            }
        }
    }

    fn blame(&self, service: &Service, lease: &Lease, failure: Failure, reason: &str) {
        let backend = lease.backend();
        // The last instance that may still work is never put aside.
        let spare = !service.has_other(backend.uid);
        if let Some(time) = backend.health.failed(failure, Instant::now(), spare) {
            service.metrics.ejections.inc();
            warn!(service = service.metrics.name, instance = %backend.uid, address = %backend.address, ?time, reason,
                  "an instance is put aside");
        }
    }

    async fn exchange(&self, connection: Connection, lease: &Lease) -> Result<(Response<()>, Answer), Failed> {
        let request = self.request(lease.backend().http2);
        let (answer, connection) = upstream::send(connection, request).await?;
        let (head, body) = answer.into_parts();
        let mut answer = Answer { early: VecDeque::new(), rest: Some(body), connection, lease: None };
        let length = head.headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|t| t.parse().ok());
        if self.idempotent && length.is_some_and(|l: u64| l <= SETTLED_ANSWER) {
            settle(&mut answer).await?;
        }
        Ok((Response::from_parts(head, ()), answer))
    }

    fn request(&self, http2: bool) -> Request<RequestBody> {
        let mut headers = self.headers.clone();
        headers::to_instance(&mut headers, self.host, self.peer, http2);
        let path = self.uri.path_and_query().map_or("/", |p| p.as_str());
        let mut uri = Uri::builder().path_and_query(path);
        if http2 {
            uri = uri.scheme("http").authority(self.host.as_bytes());
        }
        let mut request = Request::new(self.body.clone());
        *request.method_mut() = self.method.clone();
        // The parts were parsed out of a request before.
        *request.uri_mut() = uri.build().unwrap_or_else(|_| Uri::from_static("/"));
        *request.version_mut() = if http2 { Version::HTTP_2 } else { Version::HTTP_11 };
        *request.headers_mut() = headers;
        request
    }

    /// Makes an instance's answer the user's.
    fn deliver(&mut self, (mut head, mut answer): (Response<()>, Answer), lease: Lease) -> Response<ResponseBody> {
        if head.status() == StatusCode::SWITCHING_PROTOCOLS
            && let Some(user) = self.upgrade.take()
        {
            let protocol = headers::upgrade(head.headers());
            let instance = hyper::upgrade::on(&mut head);
            crate::tunnel::join(self.core, user, instance, lease);
            headers::strip(head.headers_mut());
            if let Some(protocol) = protocol {
                head.headers_mut().insert(http::header::UPGRADE, protocol);
                head.headers_mut().insert(http::header::CONNECTION, HeaderValue::from_static("upgrade"));
            }
            return head.map(|()| ResponseBody::Own(None, None));
        }
        headers::strip(head.headers_mut());
        // The listener's side says which version it speaks.
        *head.version_mut() = Version::HTTP_11;
        answer.lease = Some(lease);
        head.map(|()| ResponseBody::Instance(Box::new(answer), None))
    }
}

/// Reads ahead for a moment. A body that breaks meanwhile makes the whole attempt one that failed.
async fn settle(answer: &mut Answer) -> Result<(), Failed> {
    let until = Instant::now() + SETTLE_TIME;
    while let Some(rest) = answer.rest.as_mut().filter(|rest| !rest.is_end_stream()) {
        match timeout_at(until, rest.frame()).await {
            Ok(Some(Ok(frame))) => answer.early.push_back(frame),
            Ok(None) => answer.rest = None,
            Ok(Some(Err(e))) => {
                answer.connection = None;
                return Err(Failed { sent: true, silent: false, reason: format!("the answer broke off: {e}") });
            }
            Err(_) => break,
        }
    }
    Ok(())
}

/// Waits for another table, or a moment; `Err` when there is no more time or too many wait already.
async fn wait(
    service: &Service,
    max_waiting: usize,
    until: Instant,
    for_table: bool,
    changed: impl Future<Output = Result<(), tokio::sync::watch::error::RecvError>>,
) -> Result<(), ()> {
    struct Waiting<'a>(&'a Service);
    impl Drop for Waiting<'_> {
        fn drop(&mut self) {
            self.0.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
    let before = service.shared.waiting.fetch_add(1, Ordering::Relaxed);
    let _waiting = Waiting(service);
    let now = Instant::now();
    if before >= max_waiting || now >= until {
        return Err(());
    }
    let moment = if for_table { until } else { until.min(now + ROUND) };
    tokio::select! {
        biased;
        _ = changed => Ok(()),
        () = sleep_until(moment) => Ok(()),
    }
}
