//! The listeners: connections of users, and of other regions' gateways, in HTTP/1.1 or HTTP/2, their bounds, and their
//! end.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use nexus_env::{BoxStream, Endpoint, Listener};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::connections::{Activity, Metered};
use crate::gateway::{Core, Gateway, maintain};
use crate::proxy::{self, Sender};
use crate::regions::keep_in_touch;
use crate::upstream::Spawner;

/// The largest headers of a request, and how many.
const MAX_HEADERS: usize = 32 * 1024;
const MAX_HEADER_COUNT: usize = 100;
/// Requests at once on one HTTP/2 connection.
const MAX_STREAMS: u32 = 256;
/// Bytes that an HTTP/2 user may send ahead of the instance, per request and in all.
const STREAM_WINDOW: u32 = 256 * 1024;
const CONNECTION_WINDOW: u32 = 1024 * 1024;
/// An HTTP/2 user who can't be heard is let go after these two.
const PING: Duration = Duration::from_secs(20);
const PONG: Duration = Duration::from_secs(10);
/// What a connection that has had its time gets to end in good order.
const FAREWELL: Duration = Duration::from_secs(1);
/// After a failed accept, such as one for want of file descriptors, the listener rests this long.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Where gateways of other regions bring requests.
pub struct PeerDoor {
    pub listener: Box<dyn Listener>,
    /// Must ask for certificates of gateways and let nobody else in.
    pub tls: Arc<rustls::ServerConfig>,
}

impl Gateway {
    /// Serves a listener until `stop`, then lets what is running end for the drain time. A gateway serves once.
    pub async fn serve(&self, listener: Box<dyn Listener>, stop: CancellationToken) {
        self.serve_all(listener, None, stop).await;
    }

    /// The same, and takes in what other regions' gateways pass on.
    pub async fn serve_with_peers(&self, users: Box<dyn Listener>, peers: PeerDoor, stop: CancellationToken) {
        self.serve_all(users, Some(peers), stop).await;
    }

    async fn serve_all(&self, users: Box<dyn Listener>, peers: Option<PeerDoor>, stop: CancellationToken) {
        let core = &self.0;
        let mut upkeep = JoinSet::new();
        upkeep.spawn(maintain(core.clone()));
        if core.options.peer_tls.is_some() {
            upkeep.spawn(keep_in_touch(core.clone()));
        }
        let peers = async {
            match peers {
                Some(door) => admit(core, door.listener, Some(TlsAcceptor::from(door.tls)), &stop).await,
                None => JoinSet::new(),
            }
        };
        let (users, peers) = tokio::join!(admit(core, users, None, &stop), peers);
        self.drain(users, peers).await;
    }

    async fn drain(&self, mut users: JoinSet<()>, mut peers: JoinSet<()>) {
        let core = &self.0;
        info!(connections = users.len(), "draining");
        core.tracker.close();
        let drained = timeout(core.options.drain_timeout, async {
            while users.join_next().await.is_some() {}
            while peers.join_next().await.is_some() {}
            // Idle connections to instances would wait for ever; tunnels still have their time.
            if let Some(table) = core.table() {
                table.services.iter().flat_map(|s| &s.members).for_each(|m| m.backend.forget_connections());
                let gateways = table.regions.values().flat_map(|r| &r.peers);
                gateways.flat_map(|p| p.backends()).for_each(|b| b.forget_connections());
            }
            core.tracker.wait().await;
        });
        if drained.await.is_err() {
            warn!(connections = users.len(), "the drain time is over: what is left is cut off");
        }
        core.kill.cancel();
        users.shutdown().await;
        peers.shutdown().await;
        core.tracker.wait().await;
    }
}

/// Accepts until `stop`; the result are the connections that are still open. With `tls`, only other gateways come.
async fn admit(
    core: &Arc<Core>,
    mut listener: Box<dyn Listener>,
    tls: Option<TlsAcceptor>,
    stop: &CancellationToken,
) -> JoinSet<()> {
    let room = Arc::new(Semaphore::new(core.options.max_connections));
    let builder = Arc::new(builder(core));
    let mut open = JoinSet::new();
    let welcome = |open: &mut JoinSet<()>, stream, peer, seat| {
        let (core, builder, tls, stop) = (core.clone(), builder.clone(), tls.clone(), stop.clone());
        open.spawn(async move {
            match tls {
                None => {
                    core.metrics.connections.inc();
                    connection(&core, &builder, stream, Some(peer), stop).await;
                    core.metrics.connections.dec();
                }
                Some(tls) => match timeout(core.options.header_timeout, tls.accept(stream)).await {
                    Ok(Ok(stream)) => connection(&core, &builder, Box::new(stream), None, stop).await,
                    Ok(Err(e)) => debug!(%peer, reason = %e, "a connection of no gateway is refused"),
                    Err(_) => debug!(%peer, "a connection did not prove in time whose it is"),
                },
            }
            drop(seat);
        });
    };
    let (mut full, mut failing) = (false, false);
    loop {
        while open.try_join_next().is_some() {}
        if full != (room.available_permits() == 0) {
            full = !full;
            if full {
                warn!(limit = core.options.max_connections, "no more connections are taken for now");
            }
        }
        let accept = async {
            let seat = room.clone().acquire_owned().await.expect("the semaphore is never closed");
            (seat, listener.accept().await)
        };
        let (seat, accepted) = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = accept => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                failing = false;
                welcome(&mut open, stream, peer, seat);
            }
            Err(e) => {
                if !std::mem::replace(&mut failing, true) {
                    warn!(reason = %e, "connections can't be accepted");
                }
                sleep(ACCEPT_REST).await;
            }
        }
    }
    // Whoever is in the listener's queue already would be reset with it.
    while let Ok(seat) = room.clone().try_acquire_owned()
        && let Some(Ok((stream, peer))) = listener.accept().now_or_never()
    {
        welcome(&mut open, stream, peer, seat);
    }
    open
}

fn builder(core: &Arc<Core>) -> auto::Builder<Spawner> {
    let mut builder = auto::Builder::new(Spawner(core.clone()));
    // Times are kept by `Activity`, which also sees connections that never send a byte.
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_buf_size(MAX_HEADERS)
        .max_headers(MAX_HEADER_COUNT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(MAX_HEADERS as u32)
        .max_concurrent_streams(MAX_STREAMS)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(STREAM_WINDOW as usize)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG);
    builder
}

async fn connection(
    core: &Arc<Core>,
    builder: &auto::Builder<Spawner>,
    stream: BoxStream,
    user: Option<Endpoint>,
    stop: CancellationToken,
) {
    let activity = Activity::new(core.options.header_timeout);
    let service = service_fn(|request: http::Request<hyper::body::Incoming>| {
        let active = activity.begin(request.version() == http::Version::HTTP_2);
        let (core, user) = (core.clone(), user.clone());
        async move {
            let mut response = match user {
                Some(user) => Box::pin(proxy::handle(core, request, Sender::User(user))).await,
                None => Box::pin(proxy::handle_passed_on(core, request)).await,
            };
            response.body_mut().hold(active);
            Ok::<_, Infallible>(response)
        }
    });
    let io = TokioIo::new(Metered::new(stream, activity.clone()));
    let mut serving = std::pin::pin!(builder.serve_connection_with_upgrades(io, service));
    let mut look = activity.next_look();
    let mut stopping = false;
    loop {
        tokio::select! {
            biased;
            // Broken connections are the users' business.
            _ = &mut serving => return,
            () = stop.cancelled(), if !stopping => {
                stopping = true;
                serving.as_mut().graceful_shutdown();
            }
            () = sleep_until(look.unwrap_or_else(Instant::now)) => {
                look = activity.next_look();
                if look.is_none() {
                    serving.as_mut().graceful_shutdown();
                    let _ = timeout(FAREWELL, serving).await;
                    return;
                }
            }
        }
    }
}
