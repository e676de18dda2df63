//! Leases: etcd keeps their time, the group's leader ends them.
//!
//! A lease is a mark that is attached to a lease of etcd. When etcd removes the mark, the lease's time is over; the
//! leader then commits its end, which takes its keys with it at one revision of the group. Between the two nobody can
//! keep it alive, because keeping alive asks for the mark.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::Core;
use super::grpc::GrpcError;
use super::leader;
use super::mirror::number;
use super::propose::{Change, refusal};
use super::proto::{RangeRequest, RangeResponse};
use crate::error::StoreError;
use crate::types::LeaseId;

/// A mark's end may go unseen by this long if the wake-up was meant for a former leader.
const LOOK: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(25);

/// Ends leases whose time is over, while this server leads. Runs until the store is shut down.
pub async fn run(core: Arc<Core>) {
    loop {
        // Both outcomes mean: look.
        let _ = timeout(LOOK, core.mirror.lease_wake.notified()).await;
        if !core.leadership.borrow().is_self {
            continue;
        }
        for id in core.mirror.leases_over() {
            let until = Instant::now() + core.config.request_timeout;
            // The copy may be older than the lease's mark: etcd has the last word.
            if !matches!(mark(&core, id, until).await, Ok(None)) {
                continue;
            }
            match core.submit(Change::End { id }).await {
                Ok(_) | Err(StoreError::LeaseNotFound(_)) => {}
                Err(error) => tracing::warn!(lease = id.0, %error, "a lease could not be ended; trying again"),
            }
        }
    }
}

/// A lease's time to live as its mark says; `None` if there is no mark.
async fn mark(core: &Core, id: LeaseId, until: Instant) -> Result<Option<Duration>, GrpcError> {
    let request = RangeRequest { key: core.mirror.layout.lease(id.0), ..RangeRequest::default() };
    let found: RangeResponse = core.channel.call("/etcdserverpb.KV/Range", &request, until).await?;
    let Some(kv) = found.kvs.first() else { return Ok(None) };
    Ok(Some(Duration::from_millis(number(&kv.value).unwrap_or(1_000))))
}

pub async fn keep_alive(core: &Core, id: LeaseId) -> Result<Duration, StoreError> {
    let until = Instant::now() + core.config.request_timeout;
    let lease = i64::try_from(id.0).map_err(|_| StoreError::LeaseNotFound(id))?;
    loop {
        let renewed = async {
            if leader::keep_alive(core, lease, until).await? == 0 {
                return Ok(None);
            }
            mark(core, id, until).await
        };
        // Renewing twice does no harm, so every passing failure may be tried again.
        match renewed.await {
            Ok(ttl) => return ttl.ok_or(StoreError::LeaseNotFound(id)),
            Err(error) if error.is_passing() && Instant::now() + PAUSE < until => sleep(PAUSE).await,
            Err(error) => return Err(refusal(core, &error)),
        }
    }
}
