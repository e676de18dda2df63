//! Linearizable reads by batched read-index (Ongaro's thesis, §6.4).
//!
//! Whoever reads waits for a barrier. One task takes all who wait, asks the leader once (itself, if it leads) for the
//! log index that a quorum confirms, waits until this member has applied it, and lets them all go. Those who come
//! meanwhile take the next round.

use std::sync::Arc;
use std::time::Duration;

use openraft::error::{CheckIsLeaderError, RaftError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout_at};

use super::core::Core;
use super::raft::{Failure, Request, Response};

/// Readers that wait for a round before others wait to queue up.
pub const QUEUE: usize = 8_192;
const ROUND: usize = 4_096;
const PAUSE: Duration = Duration::from_millis(50);

pub struct Waiter {
    /// Answers the log index that has been applied.
    pub reply: oneshot::Sender<Result<u64, Failure>>,
    pub deadline: Instant,
    pub local_only: bool,
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
        round(&core, waiters).await;
    }
}

fn answer(waiters: Vec<Waiter>, result: &Result<u64, Failure>) {
    for waiter in waiters {
        let _ = waiter.reply.send(result.clone());
    }
}

async fn round(core: &Core, mut waiters: Vec<Waiter>) {
    let Some(deadline) = waiters.iter().map(|w| w.deadline).min() else { return };
    let mut leadership = core.leadership.clone();
    let patience = Instant::now() + core.config.leader_wait;
    let mut trouble = "there is no leader".to_owned();
    loop {
        let now = *leadership.borrow_and_update();
        if let Some(reason) = core.stopped() {
            return answer(waiters, &Err(Failure::Stopped(reason)));
        }
        if !now.is_self {
            let (local, rest): (Vec<_>, Vec<_>) = waiters.into_iter().partition(|w| w.local_only);
            answer(local, &Err(Failure::NotLeader));
            waiters = rest;
            if waiters.is_empty() {
                return;
            }
        }
        let leader = now.leader.filter(|&l| now.is_self || l != core.config.node);
        let index = match leader {
            Some(_) if now.is_self => own_index(core, deadline).await,
            // Whoever is asked may be the leader that was lost: its successor is asked instead as soon as there is one.
            Some(leader) => tokio::select! {
                biased;
                index = leaders_index(core, leader, deadline) => index,
                _ = leadership.wait_for(|l| l.leader != Some(leader)) => Err(format!("member {leader} leads no more")),
            },
            None => Err(trouble.clone()),
        };
        match index {
            Ok(index) => {
                let applied = timeout_at(deadline, core.shared.reached(|p| p.next_index >= index)).await;
                let result = match applied {
                    Ok(true) => Ok(index),
                    _ => Err(Failure::Unavailable("this member lags behind the leader".into())),
                };
                return answer(waiters, &result);
            }
            Err(reason) => trouble = reason,
        }
        let until = if leader.is_some() { deadline } else { deadline.min(patience) };
        if Instant::now() >= until {
            let failure = if leader.is_some() { Failure::Unavailable(trouble) } else { Failure::NotLeader };
            return answer(waiters, &Err(failure));
        }
        tokio::select! {
            biased;
            changed = leadership.changed() => if changed.is_err() {
                return answer(waiters, &Err(Failure::Stopped("the store is closed".into())));
            },
            () = sleep(PAUSE) => {}
        }
    }
}

/// The log index after the last entry that a read on this leader has to see, confirmed by a quorum.
async fn own_index(core: &Core, deadline: Instant) -> Result<u64, String> {
    match timeout_at(deadline, core.raft.get_read_log_id()).await {
        Ok(Ok((id, _))) => Ok(id.map_or(0, |id| id.index + 1)),
        Ok(Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(_)))) => Err("the leader changed".into()),
        Ok(Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(e)))) => {
            Err(format!("too few members answer: {} of a quorum", e.got.len()))
        }
        Ok(Err(RaftError::Fatal(e))) => Err(e.to_string()),
        Err(_) => Err("no quorum answered in time".into()),
    }
}

async fn leaders_index(core: &Core, leader: u64, deadline: Instant) -> Result<u64, String> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout_ms = (left.as_millis() as u64).saturating_mul(9) / 10;
    match timeout_at(deadline, core.link.ask(leader, &Request::ReadIndex { timeout_ms }, left)).await {
        Ok(Ok(Response::ReadIndex(index))) => Ok(index),
        Ok(Ok(_)) => Err(format!("member {leader} does not lead")),
        Ok(Err(e)) => Err(format!("the leader can't be reached: {e}")),
        Err(_) => Err("the leader did not answer in time".into()),
    }
}
