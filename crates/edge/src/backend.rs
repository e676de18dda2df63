//! One instance as requests see it: how busy it is, how well, and the connections that are open to it. Outlives the
//! table that named it, for as long as the next one names the same placement. Another region's gateway is seen in the
//! same way: it too is somewhere to send a request to.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::client::conn::{http1, http2};
use nexus_env::Endpoint;
use nexus_model::{Name, Uid};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::body::RequestBody;
use crate::health::Health;

pub(crate) type Http1 = http1::SendRequest<RequestBody>;
pub(crate) type Http2 = http2::SendRequest<RequestBody>;

/// Idle connections kept to one instance; more are closed.
const MAX_IDLE: usize = 64;
/// Shorter than the keep-alive of most servers, so that the gateway closes first.
const IDLE_TIME: Duration = Duration::from_secs(15);

pub(crate) struct Backend {
    pub uid: Uid,
    pub address: Endpoint,
    pub epoch: u64,
    /// HTTP/2 with prior knowledge instead of HTTP/1.1.
    pub http2: bool,
    /// Of a gateway of another region, which is reached by mTLS.
    pub region: Option<Name>,
    /// Of the same: whether it is heard.
    heard: Option<watch::Receiver<bool>>,
    pub health: Health,
    outstanding: AtomicU32,
    /// What is counted until the next report takes it.
    finished: AtomicU32,
    failed: AtomicU32,
    idle: Mutex<Vec<(Http1, Instant)>>,
    shared: Mutex<Option<Http2>>,
}

/// A request that an instance is busy with, until dropped.
pub(crate) struct Lease(Arc<Backend>);

impl Lease {
    pub fn backend(&self) -> &Arc<Backend> {
        &self.0
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.outstanding.fetch_sub(1, Ordering::Relaxed);
    }
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Backend {
    pub fn new(uid: Uid, address: Endpoint, epoch: u64, http2: bool) -> Self {
        Self {
            uid,
            address,
            epoch,
            http2,
            region: None,
            heard: None,
            health: Health::default(),
            outstanding: AtomicU32::new(0),
            finished: AtomicU32::new(0),
            failed: AtomicU32::new(0),
            idle: Mutex::default(),
            shared: Mutex::default(),
        }
    }

    /// A gateway of another region; `heard` says whether it answers pings.
    pub fn gateway(uid: Uid, address: Endpoint, region: Name, http2: bool, heard: watch::Receiver<bool>) -> Self {
        Self { region: Some(region), heard: Some(heard), ..Self::new(uid, address, 0, http2) }
    }

    /// Waits until a gateway of another region is lost; for ever, of an instance: that is noticed by its connection.
    pub async fn lost(&self) {
        let Some(mut heard) = self.heard.clone() else { return std::future::pending().await };
        heard.borrow_and_update();
        while heard.changed().await.is_ok() {
            if !*heard.borrow_and_update() {
                return;
            }
        }
        // It has gone from the table, which says nothing of what it is doing for us.
        std::future::pending().await
    }

    pub fn outstanding(&self) -> u32 {
        self.outstanding.load(Ordering::Relaxed)
    }

    /// Counts a request that it answered, or that failed at it.
    pub fn count(&self, failed: bool) {
        self.finished.fetch_add(1, Ordering::Relaxed);
        if failed {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Takes what was counted since the last call: requests, and those that failed.
    pub fn take_counts(&self) -> (u32, u32) {
        // Failures first: a request that comes in between is then never a failure without a request.
        let failed = self.failed.swap(0, Ordering::Relaxed);
        (self.finished.swap(0, Ordering::Relaxed), failed)
    }

    pub fn lease(self: &Arc<Self>) -> Lease {
        self.outstanding.fetch_add(1, Ordering::Relaxed);
        Lease(self.clone())
    }

    /// An idle connection that is still open, the most recently used first.
    pub fn take_http1(&self) -> Option<Http1> {
        let mut idle = hold(&self.idle);
        idle.retain(|(connection, _)| !connection.is_closed());
        // One that is not ready has not quite finished its last exchange.
        let at = idle.iter().rposition(|(connection, _)| connection.is_ready())?;
        Some(idle.remove(at).0)
    }

    pub fn keep_http1(&self, connection: Http1) {
        if connection.is_closed() {
            return;
        }
        let mut idle = hold(&self.idle);
        if idle.len() < MAX_IDLE {
            idle.push((connection, Instant::now()));
        }
    }

    pub fn take_http2(&self) -> Option<Http2> {
        let mut shared = hold(&self.shared);
        if shared.as_ref().is_some_and(|c| c.is_closed()) {
            *shared = None;
        }
        shared.clone()
    }

    /// Shares a new connection, unless another request was faster: then theirs is the one to use.
    pub fn share_http2(&self, connection: Http2) -> Http2 {
        let mut shared = hold(&self.shared);
        match &*shared {
            Some(held) if !held.is_closed() => held.clone(),
            _ => {
                *shared = Some(connection.clone());
                connection
            }
        }
    }

    /// Closes connections that have been idle for too long.
    pub fn prune(&self, now: Instant) {
        hold(&self.idle).retain(|(c, since)| !c.is_closed() && now.duration_since(*since) < IDLE_TIME);
    }

    /// Closes what is not in use: nobody answers at the other end.
    pub fn forget_connections(&self) {
        hold(&self.idle).clear();
        *hold(&self.shared) = None;
    }
}
