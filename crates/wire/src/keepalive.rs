//! Notices a peer that no longer answers, and a connection that nobody uses.
//!
//! The watch costs nothing while a connection has no calls: it sleeps until one begins or the idle timeout is over.
//! While calls are open it looks once per ping interval; bytes that arrived since count as a sign of life, so a busy
//! connection is never pinged, and a slow one that still moves is not given up.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use h2::{Ping, PingPong};
use nexus_env::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

/// The calls open on a connection and the bytes that came in over it.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    calls: AtomicUsize,
    received: AtomicU64,
    changed: Notify,
}

impl Usage {
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Acquire)
    }

    /// Counts a call until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> InUse {
        if self.calls.fetch_add(1, Ordering::AcqRel) == 0 {
            self.changed.notify_one();
        }
        InUse(self.clone())
    }
}

#[derive(Debug)]
pub(crate) struct InUse(Arc<Usage>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::AcqRel);
    }
}

/// How often to look, and how long to wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timing {
    pub interval: Duration,
    pub timeout: Duration,
    pub idle: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finding {
    /// No call for the idle timeout. One may have begun at this very moment.
    Idle,
    /// The peer let a ping go unanswered and sent nothing else.
    Silent,
}

/// Runs until there is something to report. The connection must be polled beside it.
pub(crate) async fn watch(ping: &mut PingPong, usage: &Usage, timing: Timing) -> Finding {
    loop {
        while usage.calls() == 0 {
            if timeout(timing.idle, usage.changed.notified()).await.is_err() && usage.calls() == 0 {
                return Finding::Idle;
            }
        }
        let before = usage.received.load(Ordering::Relaxed);
        sleep(timing.interval).await;
        if usage.calls() == 0 || usage.received.load(Ordering::Relaxed) != before {
            continue;
        }
        let mut pong = std::pin::pin!(ping.ping(Ping::opaque()));
        loop {
            let before = usage.received.load(Ordering::Relaxed);
            match timeout(timing.timeout, &mut pong).await {
                Ok(Ok(_)) => break,
                // The connection itself has failed, and says so to whoever polls it.
                Ok(Err(_)) => std::future::pending().await,
                Err(_) if usage.received.load(Ordering::Relaxed) != before => {}
                Err(_) => return Finding::Silent,
            }
        }
    }
}

/// Counts what is read.
pub(crate) struct Metered {
    inner: BoxStream,
    usage: Arc<Usage>,
}

impl Metered {
    pub fn new(inner: BoxStream, usage: Arc<Usage>) -> Self {
        Self { inner, usage }
    }
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let read = buf.filled().len().saturating_sub(before);
        if read > 0 {
            self.usage.received.fetch_add(read as u64, Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
