//! Linearizable reads: one question to etcd for all who wait.
//!
//! Whoever reads waits for a barrier. One task takes all who wait, asks etcd (linearizably) for the revision of the
//! newest commit, waits until this server's copy has applied it, and lets them all go.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep};

use super::Core;
use super::propose::refusal;
use super::proto::{RangeRequest, RangeResponse};
use crate::error::StoreError;

/// Readers that wait for a round before others wait to queue up.
pub const QUEUE: usize = 8_192;
const ROUND: usize = 4_096;
const PAUSE: Duration = Duration::from_millis(25);

pub struct Waiter {
    pub reply: oneshot::Sender<Result<(), StoreError>>,
    pub deadline: Instant,
}

/// Runs until the store is shut down.
pub async fn run(core: Arc<Core>, mut queue: mpsc::Receiver<Waiter>) {
    while let Some(first) = queue.recv().await {
        let mut waiters = vec![first];
        while waiters.len() < ROUND
            && let Ok(waiter) = queue.try_recv()
        {
            waiters.push(waiter);
        }
        waiters.retain(|w| !w.reply.is_closed());
        let Some(deadline) = waiters.iter().map(|w| w.deadline).min() else { continue };
        let result = round(&core, deadline).await;
        for waiter in waiters {
            let _ = waiter.reply.send(result.clone());
        }
    }
}

async fn round(core: &Core, deadline: Instant) -> Result<(), StoreError> {
    let request = RangeRequest { key: core.mirror.layout.journal(), keys_only: true, ..RangeRequest::default() };
    loop {
        match core.channel.call::<_, RangeResponse>("/etcdserverpb.KV/Range", &request, deadline).await {
            Ok(answer) => {
                let newest = answer.kvs.first().map_or(0, |kv| kv.mod_revision);
                if core.mirror.reached(newest, deadline).await {
                    return Ok(());
                }
                return Err(StoreError::Unavailable { reason: "this server's copy lags behind etcd".into() });
            }
            Err(error) if error.is_passing() && Instant::now() + PAUSE < deadline => sleep(PAUSE).await,
            Err(error) => return Err(refusal(core, &error)),
        }
    }
}
