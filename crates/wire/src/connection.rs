//! A client's connection: made when first needed, shared by every call, made again after it broke.
//!
//! One task per connection makes it, drives it and watches it; it belongs to the client and is aborted with it. A
//! connection counts as made only when the peer has answered a ping: in TLS 1.3 a caller has finished its handshake
//! before the callee has judged the caller's certificate, and a refusal would otherwise look like a connection that
//! broke at once, again and again.
//!
//! After a failure the next attempt waits, twice as long each time, up to a bound, with jitter, so that a thousand
//! agents do not come back to a restarted server in one instant. Callers wait with it, within their own deadline, so
//! a loop around a call never spins. Failures are logged when the peer goes from reachable to not, and back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use nexus_env::{Endpoint, Env, RngExt};
use rustls_pki_types::ServerName;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::{debug, info, warn};

use crate::breaker::Breakers;
use crate::client::ClientOptions;
use crate::error::WireError;
use crate::keepalive::{Finding, InUse, Metered, Timing, Usage, watch as keep_watch};

/// The host name that is sent along in TLS. Peers are checked by their id, so it carries no meaning.
const SERVER_NAME: &str = "nexus.internal";
/// How long closing may take: saying good-bye to a peer that does not listen is not worth more.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What a client shares with its connection's task.
pub(crate) struct Shared {
    env: Env,
    endpoint: Endpoint,
    tls: tokio_rustls::TlsConnector,
    options: ClientOptions,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// Counts connections, so that a task that ends late does not close its successor.
    generation: u64,
    failures: u32,
    /// No attempt before this moment, and why.
    retry: Option<(Instant, Arc<str>)>,
    /// What the log knows: whether the peer could be reached last.
    logged_reachable: Option<bool>,
    tasks: JoinSet<()>,
}

enum Phase {
    Closed,
    Connecting(watch::Receiver<Option<Result<(), Arc<str>>>>),
    Open(SendRequest<Bytes>, Arc<Live>),
}

/// What is known about an open connection.
pub(crate) struct Live {
    generation: u64,
    usage: Arc<Usage>,
    opened: Instant,
    /// Why it was given up, once it was.
    ended: Mutex<Option<&'static str>>,
}

/// A connection lent to one call.
pub(crate) struct Lease {
    pub send: SendRequest<Bytes>,
    pub hold: Hold,
}

/// Keeps a connection from being idle.
pub(crate) struct Hold {
    _in_use: InUse,
    live: Arc<Live>,
}

impl Hold {
    /// Words for a stream that broke: why the connection was given up, if it was, else what HTTP/2 says.
    pub fn broken(&self, error: &h2::Error) -> String {
        let ended = *self.live.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.map_or_else(|| error.to_string(), str::to_owned)
    }
}

/// The connection of one client, aborted when dropped.
pub(crate) struct Connection(Arc<Shared>, Breakers);

impl Drop for Connection {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.phase = Phase::Closed;
        state.tasks.abort_all();
    }
}

impl Connection {
    pub fn new(env: &Env, endpoint: Endpoint, tls: Arc<rustls::ClientConfig>, options: ClientOptions) -> Self {
        let state = State {
            phase: Phase::Closed,
            generation: 0,
            failures: 0,
            retry: None,
            logged_reachable: None,
            tasks: JoinSet::new(),
        };
        let shared = Shared { env: env.clone(), endpoint, tls: tls.into(), options, state: Mutex::new(state) };
        Self(Arc::new(shared), Breakers::default())
    }

    pub fn breakers(&self) -> &Breakers {
        &self.1
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.0.endpoint
    }

    pub fn options(&self) -> &ClientOptions {
        &self.0.options
    }

    pub fn env(&self) -> &Env {
        &self.0.env
    }

    pub fn is_open(&self) -> bool {
        matches!(self.0.lock().phase, Phase::Open(..))
    }

    /// A connection, made if need be, by `until`.
    pub async fn lease(&self, until: Instant) -> Result<Lease, WireError> {
        enum Step {
            Ready(Lease),
            Wait(watch::Receiver<Option<Result<(), Arc<str>>>>),
            Sleep(Instant, Arc<str>),
        }
        loop {
            let step = {
                let mut state = self.0.lock();
                match &state.phase {
                    Phase::Open(send, live) => {
                        let hold = Hold { _in_use: live.usage.begin(), live: live.clone() };
                        Step::Ready(Lease { send: send.clone(), hold })
                    }
                    Phase::Connecting(outcome) => Step::Wait(outcome.clone()),
                    Phase::Closed => match &state.retry {
                        Some((at, why)) if Instant::now() < *at => Step::Sleep(*at, why.clone()),
                        _ => Step::Wait(self.0.begin(&mut state)),
                    },
                }
            };
            match step {
                Step::Ready(lease) => return Ok(lease),
                Step::Sleep(at, why) => {
                    sleep_until(at.min(until)).await;
                    if at >= until {
                        return Err(self.unreachable(&why));
                    }
                }
                Step::Wait(mut outcome) => match timeout_at(until, outcome.wait_for(Option::is_some)).await {
                    Err(_) => return Err(self.unreachable("connecting takes longer than the call may")),
                    Ok(Ok(done)) => {
                        if let Some(Err(why)) = &*done {
                            return Err(self.unreachable(why));
                        }
                    }
                    // The task is gone without a word; its guard has closed the phase.
                    Ok(Err(_)) => {}
                },
            }
        }
    }

    /// Takes a connection that refuses new calls out of use; the calls on it go on.
    pub fn retire(&self, lease: &Hold) {
        self.0.close(lease.live.generation);
    }

    fn unreachable(&self, reason: &str) -> WireError {
        WireError::Unreachable { endpoint: self.0.endpoint.clone(), reason: reason.to_owned(), sent: false }
    }
}

/// Closes a connection's phase whichever way its task ends.
struct ClosedOnDrop {
    shared: Arc<Shared>,
    generation: u64,
}

impl Drop for ClosedOnDrop {
    fn drop(&mut self) {
        self.shared.close(self.generation);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self, generation: u64) {
        let mut state = self.lock();
        if state.generation == generation {
            state.phase = Phase::Closed;
        }
    }

    /// Starts the task of a new connection.
    fn begin(self: &Arc<Self>, state: &mut State) -> watch::Receiver<Option<Result<(), Arc<str>>>> {
        while state.tasks.try_join_next().is_some() {}
        state.generation += 1;
        let (tell, outcome) = watch::channel(None);
        state.phase = Phase::Connecting(outcome.clone());
        state.tasks.spawn(run(self.clone(), state.generation, tell));
        outcome
    }

    /// Notes a failure and sets the next attempt's moment.
    fn failed(&self, generation: u64, why: &str) {
        let mut state = self.lock();
        if state.generation != generation {
            return;
        }
        let bound = self.options.backoff_min.saturating_mul(1 << state.failures.min(20)).min(self.options.backoff_max);
        // Between half of the bound and the bound.
        let half = u64::try_from(bound.as_nanos() / 2).unwrap_or(u64::MAX);
        let wait = Duration::from_nanos(half.saturating_add(self.env.rng.below(half.saturating_add(1))));
        state.failures = state.failures.saturating_add(1);
        state.retry = Some((Instant::now() + wait, why.into()));
        let news = state.logged_reachable != Some(false);
        state.logged_reachable = Some(false);
        drop(state);
        if news {
            warn!(peer = %self.endpoint, reason = why, "peer is unreachable; trying again with back-off");
        } else {
            debug!(peer = %self.endpoint, reason = why, "peer is still unreachable");
        }
    }

    fn opened(&self, send: SendRequest<Bytes>, live: Arc<Live>) {
        let mut state = self.lock();
        if state.generation != live.generation {
            return;
        }
        state.phase = Phase::Open(send, live);
        state.retry = None;
        let again = state.logged_reachable == Some(false);
        state.logged_reachable = Some(true);
        drop(state);
        if again {
            info!(peer = %self.endpoint, "peer is reachable again");
        } else {
            debug!(peer = %self.endpoint, "connected");
        }
    }

    /// Whether the connection is taken out of use because nobody uses it.
    fn close_if_idle(&self, live: &Live) -> bool {
        let mut state = self.lock();
        // Calls begin under the same lock, so none can slip in between.
        let idle = live.usage.calls() == 0;
        if idle && state.generation == live.generation {
            state.phase = Phase::Closed;
        }
        idle
    }
}

type H2Connection = h2::client::Connection<tokio_rustls::client::TlsStream<Metered>, Bytes>;

/// Makes one connection and drives it to its end.
async fn run(shared: Arc<Shared>, generation: u64, tell: watch::Sender<Option<Result<(), Arc<str>>>>) {
    let closed = ClosedOnDrop { shared: shared.clone(), generation };
    let usage = Arc::new(Usage::default());
    let limit = shared.options.connect_timeout;
    let made = match timeout(limit, connect(&shared, usage.clone())).await {
        Ok(made) => made,
        Err(_) => Err(format!("no connection within {limit:?}")),
    };
    let (send, mut conn, ping) = match made {
        Ok(made) => made,
        Err(why) => {
            shared.failed(generation, &why);
            drop(closed);
            // Nobody may be waiting any more.
            let _ = tell.send(Some(Err(why.into())));
            return;
        }
    };
    let live = Arc::new(Live { generation, usage, opened: Instant::now(), ended: Mutex::new(None) });
    shared.opened(send, live.clone());
    let _ = tell.send(Some(Ok(())));
    drop(tell);

    let timing = Timing {
        interval: shared.options.ping_interval,
        timeout: shared.options.ping_timeout,
        idle: shared.options.idle_timeout,
    };
    let why = tokio::select! {
        biased;
        result = &mut conn => result.err().map_or_else(|| "the peer closed the connection".to_owned(), |e| e.to_string()),
        finding = watch_until_certain(ping, &shared, &live, timing) => match finding {
            Finding::Idle => {
                let _ = timeout(CLOSE_TIMEOUT, conn).await;
                debug!(peer = %shared.endpoint, "closed an idle connection");
                return;
            }
            Finding::Silent => {
                let why = "the peer has stopped answering";
                *live.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                drop(conn);
                why.to_owned()
            }
        },
    };
    // A connection that lasted was no failure: the next break starts at the shortest wait again.
    if live.opened.elapsed() >= shared.options.backoff_max {
        let mut state = shared.lock();
        if state.generation == generation {
            state.failures = 0;
        }
    }
    shared.failed(generation, &why);
}

async fn watch_until_certain(mut ping: h2::PingPong, shared: &Shared, live: &Live, timing: Timing) -> Finding {
    loop {
        match keep_watch(&mut ping, &live.usage, timing).await {
            Finding::Idle if !shared.close_if_idle(live) => {}
            finding => return finding,
        }
    }
}

/// Connects, shakes hands and hears the peer once.
async fn connect(
    shared: &Shared,
    usage: Arc<Usage>,
) -> Result<(SendRequest<Bytes>, H2Connection, h2::PingPong), String> {
    let stream = shared.env.transport.connect(&shared.endpoint).await.map_err(|e| e.to_string())?;
    let name = ServerName::try_from(SERVER_NAME).expect("a valid DNS name");
    let tls = shared.tls.connect(name, Metered::new(stream, usage)).await.map_err(|e| format!("TLS: {e}"))?;
    let options = &shared.options;
    let (send, mut conn) = h2::client::Builder::new()
        .enable_push(false)
        .initial_window_size(options.stream_window)
        .initial_connection_window_size(options.connection_window)
        .max_frame_size(crate::MAX_H2_FRAME)
        .max_header_list_size(crate::MAX_HEADERS)
        .max_send_buffer_size(options.stream_window as usize)
        .data_frame_budget(crate::SMALL_FRAME_BUDGET)
        .handshake(tls)
        .await
        .map_err(|e| e.to_string())?;
    let mut ping = conn.ping_pong().expect("taken for the first time");
    tokio::select! {
        biased;
        pong = ping.ping(h2::Ping::opaque()) => { pong.map_err(|e| e.to_string())?; }
        ended = &mut conn => {
            return Err(ended.err().map_or_else(|| "the peer closed the connection".to_owned(), |e| e.to_string()));
        }
    }
    Ok((send, conn, ping))
}
