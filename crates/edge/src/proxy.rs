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
//!
//! An app that the cloud scales to nothing is asleep, not down: a request for it waits until the first instance is ready, longer than
//! for an app that lost its last one, and servers are told at once that it waits. Where a connection shows that an instance is ready,
//! the first that waits doesn't wait to be told: it tries to connect until it can.
//!
//! A global app's request goes to an instance of this region that is well; else to the nearest other region; else to
//! whatever instance there is here. One that came from another region's gateway goes no further: with nobody to give it
//! to, the gateway says so at once, and whether anyone may have acted on it.

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
use nexus_model::{Name, RequestId, Uid};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};
use tracing::{debug, info, warn};

use crate::backend::{Backend, Lease};
use crate::balance::Worst;
use crate::body::{Answer, RequestBody, ResponseBody};
use crate::gateway::Core;
use crate::headers::{self, HOP, REFUSED, REQUEST_ID, SERVICE};
use crate::health::Failure;
use crate::problem::{BROKEN, NOT_STARTED, Problem};
use crate::regions::{self, Wanted};
use crate::table::{Choice, Service, Table, host_of};
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

/// Between two tries to connect to an instance that is being started: at first, and at most.
const KNOCK_FIRST: Duration = Duration::from_millis(2);
const KNOCK_MAX: Duration = Duration::from_millis(100);
/// How long one such try waits at first. Before its host knows an instance, packets to it are dropped, and TCP would wait a second.
const KNOCK_TIME: Duration = Duration::from_millis(5);

/// How long another gateway's short refusal may take to arrive whole, so that its connection can be kept.
const REFUSAL_TIME: Duration = Duration::from_millis(50);

/// Who sends a request.
pub(crate) enum Sender {
    User(Endpoint),
    /// A gateway of another region, for a service by its name.
    Gateway(String),
}

/// Answers a request of another region's gateway.
pub(crate) async fn handle_passed_on(core: Arc<Core>, request: Request<Incoming>) -> Response<ResponseBody> {
    let text = |name| request.headers().get(name).and_then(|v: &HeaderValue| v.to_str().ok()).map(str::to_owned);
    let (hop, service) = (text(HOP), text(SERVICE));
    let (Some(hop), Some(service)) = (hop, service) else { return about_itself(&core, &request) };
    // Only names that the table knows: what others send must not make new series.
    let known = core.table().is_some_and(|t| t.regions.keys().any(|r| *r.as_str() == *hop));
    core.metrics.take_in(if known { hop } else { "other".to_owned() });
    handle(core, request, Sender::Gateway(service)).await
}

/// What another gateway asks of this one itself: whether it is there.
fn about_itself(core: &Core, request: &Request<Incoming>) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::Own(None, None));
    *response.status_mut() = match request.uri().path() {
        regions::PING_PATH if core.table().is_some() => StatusCode::NO_CONTENT,
        regions::PING_PATH => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::NOT_FOUND,
    };
    if let Some(region) = &core.options.region {
        let region = HeaderValue::try_from(region.as_str()).expect("names are ASCII");
        response.headers_mut().insert(headers::REGION, region);
    }
    response
}

/// Answers a request. Never fails: what goes wrong is an answer too.
pub(crate) async fn handle(core: Arc<Core>, mut request: Request<Incoming>, from: Sender) -> Response<ResponseBody> {
    let began = Instant::now();
    // Between gateways only: a user's would be a lie, and an instance has no use for them.
    for name in [HOP, SERVICE] {
        request.headers_mut().remove(name);
    }
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
        Some(host) => serve(&core, request, host, &path, &from, began, &mut service).await,
    };
    let mut response = match outcome {
        Ok(mut answer) => {
            answer.headers_mut().remove(REFUSED);
            answer
        }
        Err(problem) => {
            let mut answer = problem.answer(id.as_str());
            if let (Sender::Gateway(_), Some(refusal)) = (&from, problem.refusal()) {
                answer.headers_mut().insert(REFUSED, refusal);
            }
            answer
        }
    };
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
        let peer = match &from {
            Sender::User(peer) => peer.to_string(),
            Sender::Gateway(_) => "another region's gateway".to_owned(),
        };
        info!(
            target: "nexus_edge::access",
            peer, request_id = %id, %method, host = host.as_ref().and_then(|h| h.to_str().ok()), path,
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
    from: &Sender,
    began: Instant,
    service: &mut Option<Arc<Service>>,
) -> Result<Response<ResponseBody>, Problem> {
    let name = host_of(host.to_str().map_err(|_| Problem::NoHost)?);
    // A gateway that has just started may be about to read its cache. Another gateway has others to ask.
    let patience = if matches!(from, Sender::User(_)) { core.options.patience } else { Duration::ZERO };
    let mut tables = core.table.subscribe();
    let first = timeout(patience, tables.wait_for(Option::is_some)).await;
    let table = first.ok().and_then(Result::ok).and_then(|table| table.clone()).ok_or(Problem::NoTable)?;
    let found = route(&table, from, &name, path).ok_or_else(|| Problem::Unknown(name.clone()))?.clone();
    drop(table);
    let leaves = matches!(from, Sender::User(_)) && found.regions.is_some();
    found.metrics.arrived.fetch_add(1, Ordering::Relaxed);
    *service = Some(found);
    let upgrade = (request.version() == Version::HTTP_11 && headers::upgrade(request.headers()).is_some())
        .then(|| hyper::upgrade::on(&mut request));
    let (head, body) = request.into_parts();
    // An upgrade is a conversation; nothing of it may happen twice.
    let idempotent = upgrade.is_none() && is_idempotent(&head.method);
    // Another region may refuse any request before anyone has acted on it; then it must still be there to send.
    let body = take_body(body, idempotent || (leaves && upgrade.is_none())).await?;
    let attempts = Attempts {
        core,
        idempotent,
        method: head.method,
        uri: head.uri,
        headers: head.headers,
        host,
        name,
        from,
        body,
        upgrade,
        until: began + core.options.budget,
        began,
        lot: u8::try_from(core.env.rng.below(100)).expect("below 100"),
    };
    attempts.run(service).await
}

fn is_idempotent(method: &Method) -> bool {
    [Method::GET, Method::HEAD, Method::OPTIONS, Method::PUT, Method::DELETE, Method::TRACE].contains(method)
}

/// A sender's service: by what a user asks for, or as another gateway names it.
fn route<'t>(table: &'t Table, from: &Sender, host: &str, path: &str) -> Option<&'t Arc<Service>> {
    match from {
        Sender::User(_) => table.route(host, path),
        Sender::Gateway(service) => table.named(service),
    }
}

async fn take_body(body: Incoming, keep: bool) -> Result<RequestBody, Problem> {
    if body.is_end_stream() {
        return Ok(RequestBody::Whole(None));
    }
    if keep && body.size_hint().exact().is_some_and(|size| size <= KEPT_BODY) {
        let whole = timeout(BODY_TIME, body.collect()).await.map_err(|_| Problem::Body)?.map_err(|_| Problem::Body)?;
        return Ok(RequestBody::Whole(Some(whole.to_bytes())));
    }
    Ok(RequestBody::stream(body))
}

/// Who had their chance with a request.
#[derive(Default)]
struct Tried {
    backends: Vec<Uid>,
    /// Regions that have nobody for it.
    regions: Vec<Name>,
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
    from: &'a Sender,
    body: RequestBody,
    upgrade: Option<OnUpgrade>,
    until: Instant,
    began: Instant,
    /// Drawn once, below 100: which template it is for, where a rollout splits requests.
    lot: u8,
}

impl Attempts<'_> {
    async fn run(mut self, held: &mut Option<Arc<Service>>) -> Result<Response<ResponseBody>, Problem> {
        let options = &self.core.options;
        let mut tried = Tried::default();
        let mut sends = 0;
        let mut attempts = 0u32;
        let mut failures = 0u32;
        // Who has opened when it was knocked at.
        let mut opened = None;
        loop {
            // Taken before the table is looked at, so that no change is missed.
            let mut tables = self.core.table.subscribe();
            let table = self.core.table().ok_or(Problem::NoTable)?;
            // A route that went away meanwhile leaves the request with the service that it had.
            if let Some(newest) = route(&table, self.from, &self.name, self.uri.path()) {
                *held = Some(newest.clone());
            }
            let service = held.clone().expect("the request has been routed");
            let named = || service.metrics.name.clone();
            let choice = match opened.take() {
                Some(lease) if !service.has_ready() => Choice::Instance(lease),
                _ => self.choose(&service, &table, &tried),
            };
            drop(table);
            let lease = match choice {
                Choice::Instance(lease) => lease,
                choice => {
                    let busy = matches!(choice, Choice::Busy);
                    let asleep = !busy && self.waits_for_waking(&service);
                    let none = asleep || (service.members.is_empty() && failures == 0);
                    if matches!(self.from, Sender::Gateway(_)) {
                        return Err(match (busy, none) {
                            (true, _) => Problem::Busy(named()),
                            (false, true) => Problem::NoInstance(named()),
                            (false, false) => Problem::Unreachable(named()),
                        });
                    }
                    let until = match (asleep, busy || none) {
                        (true, _) => self.began + options.wake_patience,
                        (_, true) => self.until.min(self.began + options.patience),
                        _ => self.until,
                    };
                    let for_table = none && service.regions.as_ref().is_none_or(Vec::is_empty);
                    let bell = none.then_some(&self.core.bell);
                    let changed = async {
                        // One knocks for all: the others hear of it soon enough.
                        let knocking = asleep && service.starting.first().is_some_and(|first| first.outstanding() == 0);
                        tokio::select! {
                            biased;
                            changed = tables.changed() => changed.map(|()| None),
                            lease = knock(self.core, &service), if knocking => Ok(Some(lease)),
                        }
                    };
                    let waited = wait(&service, options.max_waiting, until, for_table, bell, changed).await;
                    tried = Tried::default();
                    if asleep {
                        // Its tries begin when there is somebody to try.
                        self.until = self.until.max(Instant::now() + options.budget);
                    }
                    match waited {
                        Ok(lease) => {
                            opened = lease;
                            continue;
                        }
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
            let backend = lease.backend().clone();
            match self.attempt(&service, lease).await {
                Ok(response) => return Ok(response),
                Err(failed) => {
                    sends += u32::from(failed.sent);
                    failures += u32::from(!failed.refused);
                    let again = (!failed.sent || (self.idempotent && sends < options.max_sends))
                        && self.body.is_untouched()
                        && Instant::now() < self.until;
                    debug!(service = service.metrics.name, instance = %backend.uid, again, reason = failed.reason,
                           "an attempt failed");
                    if !again {
                        return Err(if failed.sent { Problem::Broken(named()) } else { Problem::Unreachable(named()) });
                    }
                    match &backend.region {
                        Some(region) if failed.refused => tried.regions.push(region.clone()),
                        _ => tried.backends.push(backend.uid),
                    }
                }
            }
        }
    }

    /// Whether there is nobody yet because the app was asleep: what is starting is not asked before it is ready.
    fn waits_for_waking(&self, service: &Service) -> bool {
        let early = Instant::now() < self.began + self.core.options.wake_patience;
        service.wakes && early && matches!(self.from, Sender::User(_)) && !service.has_ready()
    }

    /// Who is asked next. What came from another region does not leave this one.
    fn choose(&self, service: &Service, table: &Table, tried: &Tried) -> Choice {
        let max = self.core.options.max_outstanding;
        let worst = if self.waits_for_waking(service) { Worst::Ready } else { Worst::Any };
        let newer = service.split.as_ref().map(|split| split.is_newer(&self.headers, self.lot));
        let local = |worst| service.choose(&tried.backends, max, worst, newer);
        let names = match (self.from, &service.regions) {
            (Sender::Gateway(_), _) => return local(Worst::Ready),
            (Sender::User(_), None) => return local(worst),
            (Sender::User(_), Some(names)) => names,
        };
        let wanted = Wanted {
            regions: names,
            http2: service.http2 && self.upgrade.is_none(),
            tried: &tried.backends,
            refused: &tried.regions,
            refusals: &service.refusals,
            max_outstanding: max,
            now: Instant::now(),
        };
        if let well @ Choice::Instance(_) = local(Worst::Well) {
            return well;
        }
        if let Some(lease) = regions::nearest(&table.regions, &wanted, &service.turn) {
            return Choice::Instance(lease);
        }
        match local(worst) {
            Choice::Nobody => {
                regions::any(&table.regions, &wanted, &service.turn).map_or(Choice::Nobody, Choice::Instance)
            }
            choice => choice,
        }
    }

    /// Sends the request to one instance, or to another region's gateway.
    async fn attempt(&mut self, service: &Service, lease: Lease) -> Result<Response<ResponseBody>, Failed> {
        let backend = lease.backend().clone();
        let region = backend.region.clone();
        let result = self.try_once(service, lease).await;
        if region.is_none() {
            backend.count(result.as_ref().map_or(true, |answer| answer.status().is_server_error()));
        }
        if let Some(region) = region
            && let Some(counted) = self.core.table().and_then(|t| t.regions.get(&region).map(|r| r.metrics.clone()))
        {
            match &result {
                Ok(_) => counted.answered.inc(),
                Err(failed) if failed.refused => counted.refused.inc(),
                Err(_) => counted.failed.inc(),
            };
        }
        result
    }

    async fn try_once(&mut self, service: &Service, lease: Lease) -> Result<Response<ResponseBody>, Failed> {
        let backend = lease.backend().clone();
        // A connection that was idle may have been closed at the other end just now. That says nothing of the
        // instance, so it is asked again on a new connection before another one is.
        if let Some(idle) = upstream::pooled(&backend) {
            match self.exchange(idle, service, &lease).await {
                Ok(answer) => {
                    backend.health.succeeded();
                    return Ok(self.deliver(answer, lease));
                }
                Err(failed) if failed.refused => return Err(failed),
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
                return Err(Failed { sent: false, silent: false, refused: false, reason });
            }
        };
        match self.exchange(connection, service, &lease).await {
            Ok(answer) => {
                backend.health.succeeded();
                Ok(self.deliver(answer, lease))
            }
            Err(failed) if failed.refused => Err(failed),
            Err(failed) => {
                let kind = if failed.silent { Failure::Unreachable } else { Failure::Reset };
                self.blame(service, &lease, kind, &failed.reason);
                Err(failed)
            }
        }
    }

    fn blame(&self, service: &Service, lease: &Lease, failure: Failure, reason: &str) {
        let backend = lease.backend();
        if let Some(region) = &backend.region {
            // Pings bring it back.
            if let Some(time) = backend.health.failed(failure, Instant::now(), false) {
                warn!(%region, gateway = %backend.address, ?time, reason, "another region's gateway is put aside");
            }
            return;
        }
        // The last instance that may still work is never put aside; another region's may work too.
        let elsewhere = || {
            let table = self.core.table();
            let names = service.regions.iter().flatten();
            table.is_some_and(|t| names.filter_map(|n| t.regions.get(n)).any(|r| r.is_heard(Instant::now())))
        };
        let spare = !service.has_other(backend.uid) && !elsewhere();
        if let Some(time) = backend.health.failed(failure, Instant::now(), spare) {
            service.metrics.ejections.inc();
            warn!(service = service.metrics.name, instance = %backend.uid, address = %backend.address, ?time, reason,
                  "an instance is put aside");
        }
    }

    async fn exchange(
        &self,
        connection: Connection,
        service: &Service,
        lease: &Lease,
    ) -> Result<(Response<()>, Answer), Failed> {
        let request = self.request(service, lease.backend());
        let sending = upstream::send(connection, request);
        let (answer, connection) = tokio::select! {
            biased;
            answer = sending => answer?,
            () = lease.backend().lost() => {
                let reason = "the region is not heard any more".to_owned();
                return Err(Failed { sent: true, silent: true, refused: false, reason });
            }
        };
        let (head, body) = answer.into_parts();
        if let Some(region) = &lease.backend().region
            && let Some(refusal) = head.headers.get(REFUSED)
        {
            let sent = refusal != NOT_STARTED;
            debug_assert!(!sent || refusal == BROKEN, "gateways refuse in two ways");
            if !sent {
                service.refusals.note(region, Instant::now());
            }
            if timeout(REFUSAL_TIME, body.collect()).await.is_ok_and(|read| read.is_ok())
                && let Some(connection) = connection
            {
                lease.backend().keep_http1(connection);
            }
            let reason = format!("region {region} has nobody to give it to ({})", head.status);
            return Err(Failed { sent, silent: false, refused: true, reason });
        }
        let mut answer = Answer { early: VecDeque::new(), rest: Some(body), connection, lease: None };
        let length = head.headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|t| t.parse().ok());
        if self.idempotent && length.is_some_and(|l: u64| l <= SETTLED_ANSWER) {
            settle(&mut answer).await?;
        }
        Ok((Response::from_parts(head, ()), answer))
    }

    fn request(&self, service: &Service, backend: &Backend) -> Request<RequestBody> {
        let http2 = backend.http2;
        let mut headers = self.headers.clone();
        let user = match self.from {
            Sender::User(peer) => Some(peer),
            Sender::Gateway(_) => None,
        };
        headers::to_instance(&mut headers, self.host, user, http2);
        if backend.region.is_some() {
            let own = self.core.options.region.as_ref().map_or("", Name::as_str);
            headers.insert(HOP, HeaderValue::try_from(own).expect("names are ASCII"));
            let name = HeaderValue::try_from(&*service.metrics.name).expect("names are ASCII");
            headers.insert(SERVICE, name);
        }
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
                let reason = format!("the answer broke off: {e}");
                return Err(Failed { sent: true, silent: false, refused: false, reason });
            }
            Err(_) => break,
        }
    }
    Ok(())
}

/// Tries to connect to the instances that are being started, until one can be connected to.
async fn knock(core: &Core, service: &Service) -> Lease {
    // Others see by it that somebody knocks.
    let _busy = service.starting.first().map(Backend::lease);
    let (mut pause, mut limit) = (KNOCK_FIRST, KNOCK_TIME);
    loop {
        for backend in &service.starting {
            if let Ok(Ok(_)) = timeout(limit, core.env.transport.connect(&backend.address)).await {
                return backend.lease();
            }
        }
        sleep(pause).await;
        (pause, limit) = ((pause * 5 / 4).min(KNOCK_MAX), (limit * 5 / 4).min(KNOCK_MAX));
    }
}

/// Waits for another table, for who opens, or a moment; `Err` when there is no more time or too many wait already.
async fn wait(
    service: &Service,
    max_waiting: usize,
    until: Instant,
    for_table: bool,
    bell: Option<&Notify>,
    changed: impl Future<Output = Result<Option<Lease>, tokio::sync::watch::error::RecvError>>,
) -> Result<Option<Lease>, ()> {
    struct Waiting<'a>(&'a Service);
    impl Drop for Waiting<'_> {
        fn drop(&mut self) {
            self.0.metrics.waiting.dec();
        }
    }
    let before = usize::try_from(service.metrics.waiting.inc()).unwrap_or(0);
    let _waiting = Waiting(service);
    // Not before it is counted: the report that this brings is to tell of it.
    if let Some(bell) = bell {
        bell.notify_one();
    }
    let now = Instant::now();
    if before >= max_waiting || now >= until {
        return Err(());
    }
    let moment = if for_table { until } else { until.min(now + ROUND) };
    tokio::select! {
        biased;
        news = changed => Ok(news.ok().flatten()),
        () = sleep_until(moment) => Ok(None),
    }
}
