//! Who leads the group: the server that put the leader's mark, for as long as its etcd lease lives.
//!
//! The mark is put only where there is none, and etcd removes it when the lease has not been kept alive. The epoch is
//! etcd's revision at which the mark came into being (behind that of the restored group, if it was restored), so every
//! change of leader has a greater one. A leader counts its
//! own time from before it asked for each extension, and steps down a little before etcd would let another one in.
//! That is not what fences it: the writer's transactions compare what its predecessor left, as on every engine.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::Core;
use super::grpc::GrpcError;
use super::layout::LeaderMark;
use super::proto::{
    Compare, Empty, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveResponse, LeaseRequest, RequestOp, TxnRequest,
    TxnResponse,
};
use crate::types::Leadership;

const CALL: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(200);

/// Runs until the store is shut down.
pub async fn run(core: Arc<Core>) {
    let mut seen = core.mirror.leader.subscribe();
    loop {
        let now = *seen.borrow_and_update();
        let epoch = core.leadership.borrow().epoch;
        match now {
            Some((mark, since)) => {
                let epoch = core.mirror.epoch(since);
                // This server's mark of an earlier life names nobody who could serve.
                let leader = (mark.node != core.config.node).then_some(mark.node);
                tell(&core, Leadership { leader, epoch, is_self: false });
                if seen.changed().await.is_err() {
                    return;
                }
            }
            None => {
                tell(&core, Leadership { leader: None, epoch, is_self: false });
                if let Err(error) = campaign(&core).await {
                    tracing::debug!(%error, "campaigning failed; trying again");
                }
                // Whoever won is seen by the watch. When nobody can tell any more, there is nothing to wait for.
                if let Ok(Err(_)) = timeout(PAUSE, seen.changed()).await {
                    return;
                }
            }
        }
    }
}

fn tell(core: &Core, now: Leadership) {
    core.leadership.send_if_modified(|l| std::mem::replace(l, now) != now);
}

/// Tries to become the leader, and leads if that works.
async fn campaign(core: &Core) -> Result<(), GrpcError> {
    let until = Instant::now() + CALL;
    let asked = Instant::now();
    let grant = LeaseGrantRequest { ttl: core.config.election_ttl.as_secs().max(1) as i64, id: 0 };
    let lease: LeaseGrantResponse = core.channel.call("/etcdserverpb.Lease/LeaseGrant", &grant, until).await?;
    let result = lead(core, lease.id, asked, Duration::from_secs(lease.ttl.max(1) as u64)).await;
    let epoch = core.leadership.borrow().epoch;
    tell(core, Leadership { leader: None, epoch, is_self: false });
    // Others need not wait for the lease to end by itself.
    let revoke = LeaseRequest { id: lease.id };
    let _: Result<Empty, _> =
        core.channel.call("/etcdserverpb.Lease/LeaseRevoke", &revoke, Instant::now() + CALL).await;
    result
}

async fn lead(core: &Core, lease: i64, asked: Instant, ttl: Duration) -> Result<(), GrpcError> {
    let until = Instant::now() + CALL;
    let key = core.mirror.layout.leader();
    let mark = LeaderMark { node: core.config.node };
    let request = TxnRequest {
        compare: vec![Compare::created(key.clone(), 0)],
        success: vec![RequestOp::put(key, mark.encode(), lease)],
        failure: Vec::new(),
    };
    let answer: TxnResponse = core.channel.call("/etcdserverpb.KV/Txn", &request, until).await?;
    if !answer.succeeded {
        return Ok(());
    }
    let created = answer.header.map_or(0, |h| h.revision);
    let mut seen = core.mirror.leader.subscribe();
    // When the watch shows the mark, it has shown everything that former leaders committed.
    if timeout_at(until, seen.wait_for(|l| l.is_some_and(|(_, at)| at >= created))).await.is_err() {
        return Err(GrpcError::Lost("the watch lags behind".into()));
    }
    // A part of the time is left to clocks that run apart and to answers on their way.
    let span = ttl * 4 / 5;
    let mut valid = asked + span;
    let epoch = core.mirror.epoch(created);
    tell(core, Leadership { leader: Some(core.config.node), epoch, is_self: true });
    core.lease_wake();
    tracing::info!(group = %core.config.group, epoch, "this server leads the group");
    let (beat, mut due) = (ttl / 5, Instant::now());
    let ours = |l: &Option<(LeaderMark, i64)>| l.is_some_and(|(_, at)| at == created);
    loop {
        tokio::select! {
            biased;
            changed = seen.changed() => if changed.is_err() || !ours(&seen.borrow_and_update()) {
                tracing::warn!(group = %core.config.group, epoch, "this server's mark is gone: it leads no more");
                return Ok(());
            },
            () = tokio::time::sleep_until(due) => {
                let asked = Instant::now();
                match timeout_at(valid, keep_alive(core, lease, valid)).await {
                    Ok(Ok(0)) => return Err(GrpcError::Lost("the leader's lease has ended".into())),
                    Ok(Ok(_)) => {
                        valid = asked + span;
                        due = Instant::now() + beat;
                    }
                    Ok(Err(error)) if Instant::now() >= valid => return Err(error),
                    Ok(Err(_)) => {
                        sleep(PAUSE / 4).await;
                        due = Instant::now();
                    }
                    Err(_) => return Err(GrpcError::Lost("the leader's lease could not be kept alive in time".into())),
                }
            }
        }
    }
}

/// Starts a lease's time anew; answers its seconds, 0 if it has ended.
pub async fn keep_alive(core: &Core, lease: i64, until: Instant) -> Result<i64, GrpcError> {
    let mut stream = core.channel.stream("/etcdserverpb.Lease/LeaseKeepAlive", until).await?;
    let limit = until.saturating_duration_since(Instant::now());
    let answer = match stream.send(&LeaseRequest { id: lease }) {
        Ok(()) => stream.next_within::<LeaseKeepAliveResponse>(limit).await,
        Err(e) => Err(e),
    };
    match answer {
        Ok(Some(answer)) => Ok(answer.ttl.max(0)),
        Ok(None) => Err(GrpcError::Lost("etcd ended the stream".into())),
        Err(error) => {
            core.channel.broke(&stream);
            Err(error)
        }
    }
}
