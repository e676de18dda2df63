//! When a user's connection has waited long enough: what its requests and bytes say, and how long it may still wait.
//!
//! A connection that is not serving anything is either idle or in the middle of sending a request's headers; the
//! second may only take [`HEADERS`] (bytes that came together with the request before are idle time). HTTP/2 connections send bytes of their own between requests, so for them only
//! idleness counts; the protocol's engine bounds their headers.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use nexus_env::BoxStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

/// How long a request's headers may take, and a new connection until its first request.
pub(crate) const HEADERS: Duration = Duration::from_secs(10);
/// How long a connection may wait for its next request.
const IDLE: Duration = Duration::from_secs(60);

/// One user's connection. Times are milliseconds since its start; 0 stands for never.
pub(crate) struct Activity {
    start: Instant,
    headers: Duration,
    active: AtomicU32,
    served: AtomicBool,
    http2: AtomicBool,
    idle_since: AtomicU64,
    first_byte: AtomicU64,
}

/// A request that is being served, until dropped.
pub(crate) struct Active(Arc<Activity>);

impl Drop for Active {
    fn drop(&mut self) {
        let activity = &self.0;
        activity.idle_since.store(activity.millis(), Ordering::Relaxed);
        activity.first_byte.store(0, Ordering::Relaxed);
        activity.active.fetch_sub(1, Ordering::Release);
    }
}

impl Activity {
    pub fn new(headers: Duration) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            headers,
            active: AtomicU32::new(0),
            served: AtomicBool::new(false),
            http2: AtomicBool::new(false),
            idle_since: AtomicU64::new(0),
            first_byte: AtomicU64::new(0),
        })
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX).max(1)
    }

    pub fn begin(self: &Arc<Self>, http2: bool) -> Active {
        self.active.fetch_add(1, Ordering::Relaxed);
        self.served.store(true, Ordering::Relaxed);
        self.http2.store(http2, Ordering::Relaxed);
        Active(self.clone())
    }

    /// When to look again; `None` if the connection has had its time.
    pub fn next_look(&self) -> Option<Instant> {
        let now = Instant::now();
        if self.active.load(Ordering::Acquire) > 0 {
            return Some(now + self.headers);
        }
        let at = |millis: u64| self.start + Duration::from_millis(millis);
        let first_byte = self.first_byte.load(Ordering::Relaxed);
        let idle = at(self.idle_since.load(Ordering::Relaxed)) + IDLE;
        let end = if !self.served.load(Ordering::Relaxed) {
            self.start + self.headers
        } else if first_byte > 0 && !self.http2.load(Ordering::Relaxed) {
            idle.min(at(first_byte) + self.headers)
        } else {
            // A request may begin meanwhile and stop halfway.
            idle.min(now + self.headers)
        };
        let over = end <= now;
        (!over).then_some(end)
    }
}

/// Notes when bytes arrive.
pub(crate) struct Metered {
    inner: BoxStream,
    activity: Arc<Activity>,
}

impl Metered {
    pub fn new(inner: BoxStream, activity: Arc<Activity>) -> Self {
        Self { inner, activity }
    }
}

impl AsyncRead for Metered {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.inner).poll_read(cx, buf);
        let activity = &self.activity;
        if buf.filled().len() > before
            && activity.active.load(Ordering::Relaxed) == 0
            && activity.first_byte.load(Ordering::Relaxed) == 0
        {
            activity.first_byte.store(activity.millis(), Ordering::Relaxed);
        }
        polled
    }
}

impl AsyncWrite for Metered {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
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
}
