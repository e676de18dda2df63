//! Serves the API's router over TLS (HTTP/1.1 and HTTP/2 by ALPN) and, on loopback, in the clear.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use nexus_api::PeerAddress;
use nexus_env::{BoxStream, Endpoint, Env, Listener};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Connections at once on one listener; more wait to be accepted.
const CONNECTIONS: usize = 10_000;
const HANDSHAKE: Duration = Duration::from_secs(10);
const HEADERS: Duration = Duration::from_secs(10);
/// How long requests that are running may take to end when the listener goes down.
const DRAIN: Duration = Duration::from_secs(5);

/// Takes the endpoint and serves until `stop`.
pub async fn listen(
    tasks: &mut JoinSet<()>,
    env: &Env,
    endpoint: Endpoint,
    tls: Option<Arc<rustls::ServerConfig>>,
    router: Router,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let listener = env.transport.bind(&endpoint).await.with_context(|| format!("listening on {endpoint}"))?;
    let stop = stop.clone();
    tasks.spawn(serve(listener, tls, router, stop));
    Ok(())
}

async fn serve(
    mut listener: Box<dyn Listener>,
    tls: Option<Arc<rustls::ServerConfig>>,
    router: Router,
    stop: CancellationToken,
) {
    let acceptor = tls.map(tokio_rustls::TlsAcceptor::from);
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    loop {
        let permit = room.clone().acquire_owned().await.expect("never closed");
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match accepted {
            Ok((stream, from)) => {
                let (acceptor, router, watcher) = (acceptor.clone(), router.clone(), graceful.watcher());
                connections.spawn(async move {
                    let _permit = permit;
                    connection(stream, &from, acceptor, router, watcher).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "a connection can't be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    // Idle connections close at once; those with a request, after it.
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::debug!("some API connections were cut off");
    }
    connections.shutdown().await;
}

async fn connection(
    stream: BoxStream,
    from: &Endpoint,
    acceptor: Option<tokio_rustls::TlsAcceptor>,
    router: Router,
    watcher: Watcher,
) {
    let stream: BoxStream = match acceptor {
        None => stream,
        Some(acceptor) => match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => Box::new(stream),
            // A client that can't agree on TLS sees that itself.
            Ok(Err(_)) | Err(_) => return,
        },
    };
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADERS).max_buf_size(64 << 10);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(64 << 10)
        .max_concurrent_streams(256)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10));
    let router = match from {
        Endpoint::Tcp(from) => router.layer(Extension(PeerAddress(from.ip().to_canonical()))),
        _ => router,
    };
    let service = TowerToHyperService::new(router);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "an API connection ended badly");
    }
}
