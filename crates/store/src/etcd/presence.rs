//! Which servers are there: each puts a mark that lives as long as the server keeps an etcd lease alive.
//!
//! It says that the server runs and reaches etcd, to whoever looks at the group's members. Nothing is decided by it but
//! whether a restore may begin.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::Core;
use super::grpc::GrpcError;
use super::leader;
use super::proto::{DeleteRangeRequest, Empty, LeaseGrantRequest, LeaseGrantResponse, PutRequest};

/// Seconds until a server that is silent is taken to be gone.
const TTL: i64 = 6;
const BEAT: Duration = Duration::from_secs(2);
const CALL: Duration = Duration::from_secs(2);

/// Runs until the store is shut down.
pub async fn run(core: Arc<Core>) {
    loop {
        if let Err(error) = stay(&core).await {
            tracing::debug!(%error, "this server's mark could not be put; trying again");
        }
        sleep(BEAT / 4).await;
    }
}

/// Puts the mark and keeps it, until it is gone.
async fn stay(core: &Core) -> Result<(), GrpcError> {
    let grant = LeaseGrantRequest { ttl: TTL, id: 0 };
    let until = Instant::now() + CALL;
    let lease: LeaseGrantResponse = core.channel.call("/etcdserverpb.Lease/LeaseGrant", &grant, until).await?;
    let (key, value) = (core.mirror.layout.present(core.config.node), core.config.endpoint.clone().into());
    let mark = PutRequest { key, value, lease: lease.id };
    let _: Empty = core.channel.call("/etcdserverpb.KV/Put", &mark, Instant::now() + CALL).await?;
    loop {
        sleep(BEAT).await;
        match leader::keep_alive(core, lease.id, Instant::now() + CALL).await {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // If etcd was away for too long, it says so next time.
            Err(error) => tracing::debug!(%error, "this server's mark could not be kept alive; trying again"),
        }
    }
}

/// Takes the mark away, so that nobody has to wait until this server's silence is noticed.
pub async fn leave(core: &Core) {
    let key = core.mirror.layout.present(core.config.node);
    let gone = DeleteRangeRequest { key, ..DeleteRangeRequest::default() };
    let until = Instant::now() + Duration::from_secs(1);
    // If this fails, the mark ends with its lease.
    let _: Result<Empty, _> = core.channel.call("/etcdserverpb.KV/DeleteRange", &gone, until).await;
}
