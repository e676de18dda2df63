//! One exchange with an instance: a connection, idle or new, and what a failure on it means.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::time::timeout;

use crate::backend::{Backend, Http1, Http2};
use crate::body::RequestBody;
use crate::gateway::Core;
use crate::regions;

/// The largest headers of an answer.
const MAX_HEADERS: usize = 64 * 1024;
/// An HTTP/2 connection with requests on it is pinged this often, and given up when nothing comes for as long again.
const PING: Duration = Duration::from_secs(2);

pub(crate) enum Connection {
    Http1(Http1),
    Http2(Http2),
}

/// Why there is no answer.
#[derive(Debug)]
pub(crate) struct Failed {
    /// Whether the instance may have begun to act on the request.
    pub sent: bool,
    /// The connection fell silent, which says something of the host.
    pub silent: bool,
    /// Said by another region's gateway, which is well and has nobody to give the request to.
    pub refused: bool,
    pub reason: String,
}

/// Runs hyper's tasks among the gateway's own.
#[derive(Clone)]
pub(crate) struct Spawner(pub Arc<Core>);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Spawner {
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

/// An idle or shared connection.
pub(crate) fn pooled(backend: &Backend) -> Option<Connection> {
    if backend.http2 {
        backend.take_http2().map(Connection::Http2)
    } else {
        backend.take_http1().map(Connection::Http1)
    }
}

/// A new connection.
pub(crate) async fn connect(core: &Arc<Core>, backend: &Backend) -> io::Result<Connection> {
    let limit = core.options.connect_timeout;
    let connecting = async {
        let mut stream = core.env.transport.connect(&backend.address).await?;
        if backend.region.is_some() {
            stream = regions::secure(core, stream).await?;
        }
        let stream = TokioIo::new(stream);
        if backend.http2 {
            let (send, driver) = http2::Builder::new(Spawner(core.clone()))
                .timer(TokioTimer::new())
                .keep_alive_interval(PING)
                .keep_alive_timeout(PING)
                .max_header_list_size(MAX_HEADERS as u32)
                .handshake(stream)
                .await
                .map_err(io::Error::other)?;
            core.spawn(async move {
                let _ = driver.await;
            });
            Ok(Connection::Http2(backend.share_http2(send)))
        } else {
            let (send, driver) =
                http1::Builder::new().max_buf_size(MAX_HEADERS).handshake(stream).await.map_err(io::Error::other)?;
            core.spawn(async move {
                // What went wrong is told to the request.
                let _ = driver.with_upgrades().await;
            });
            Ok(Connection::Http1(send))
        }
    };
    timeout(limit, connecting).await.unwrap_or_else(|_| {
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("no connection to {} within {limit:?}", backend.address)))
    })
}

/// Sends a request and waits for the head of its answer. An HTTP/1.1 connection comes back, to be kept when the
/// answer has been read.
pub(crate) async fn send(
    connection: Connection,
    request: Request<RequestBody>,
) -> Result<(Response<Incoming>, Option<Http1>), Failed> {
    match connection {
        Connection::Http1(mut send) => match send.try_send_request(request).await {
            Ok(answer) => Ok((answer, Some(send))),
            Err(mut e) => Err(failed(e.take_message().is_some(), e.error())),
        },
        Connection::Http2(mut send) => {
            if let Err(e) = send.ready().await {
                return Err(failed(true, &e));
            }
            match send.try_send_request(request).await {
                Ok(answer) => Ok((answer, None)),
                Err(mut e) => Err(failed(e.take_message().is_some(), e.error())),
            }
        }
    }
}

fn failed(kept: bool, error: &hyper::Error) -> Failed {
    let mut refused = false;
    let mut silent = false;
    let mut reason = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        if let Some(e) = e.downcast_ref::<h2::Error>() {
            // RFC 9113, section 8.7: the peer promises to have done nothing.
            refused |= e.is_remote() && e.reason() == Some(h2::Reason::REFUSED_STREAM);
            silent |= e.get_io().is_some_and(|e| e.kind() == io::ErrorKind::TimedOut);
        }
        if let Some(e) = e.downcast_ref::<io::Error>() {
            silent |= matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable);
        }
        reason = format!("{reason}: {e}");
        cause = e.source();
    }
    silent |= error.is_timeout();
    Failed { sent: !(kept || refused), silent, refused: false, reason }
}
