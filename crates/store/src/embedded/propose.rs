//! How commands become log entries.
//!
//! Clients' commands queue up. One task takes what is there as a batch, and gives it to the log if this member leads or
//! sends it to the leader if not. A few batches may be on their way at once; while they are, the next one grows, so load
//! makes entries larger instead of more numerous. Each command has its own outcome.
//!
//! Batches are spawned, and spawned tasks run in any order; but commands that were queued in some order reach this member's
//! log in that order, because each batch waits for its turn: whoever chains transactions by their compares need not wait for
//! each before it begins the next.
//!
//! What a failure means is kept apart all the way: refused before the log took it (safe to try again, and done so here
//! until the deadline), or lost after (unknown, left to the caller).

use std::sync::Arc;
use std::time::Duration;

use openraft::error::ClientWriteError;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::core::Core;
use super::raft::{Batch, Command, Failure, Outcome, Proposal, Request, Response, encode};
use crate::error::PeerError;

/// Commands that wait to be proposed before clients wait to queue up.
pub const QUEUE: usize = 4_096;
const BATCH_COMMANDS: usize = 512;
/// Reached by one transaction of the largest size; what comes after it goes into the next entry.
const BATCH_BYTES: usize = 1 << 20;
/// Batches on their way at once, at most. More would make them smaller, and each costs a sync.
const IN_FLIGHT: usize = 3;
/// How long the next batch grows while another is on its way. Where a round takes longer, as between regions, a few are on
/// their way at once; where it is short, one larger entry costs less than several small ones.
const GROWS: Duration = Duration::from_millis(10);
/// After a large batch, how long the next one waits for those who were just answered and ask again.
const RETURNS: Duration = Duration::from_millis(1);
/// A batch is large if it answers so many.
const LARGE: usize = 12;
/// Between tries when the leader can't be reached and nothing has changed.
const PAUSE: Duration = Duration::from_millis(50);

pub type Reply = oneshot::Sender<Result<Outcome, Failure>>;

pub struct Pending {
    pub command: Command,
    pub reply: Reply,
    pub deadline: Instant,
    /// Came from another member, which wants this one to be the leader.
    pub local_only: bool,
}

/// Runs until the store is shut down.
pub async fn run(core: Arc<Core>, mut queue: mpsc::Receiver<Pending>) {
    let permits = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut tasks = JoinSet::new();
    let mut left_over: Option<Pending> = None;
    // Ends when the batch before has been given to the log, or will not be.
    let mut before = oneshot::channel::<()>().1;
    loop {
        let first = match left_over.take() {
            Some(pending) => pending,
            None => match queue.recv().await {
                Some(pending) => pending,
                None => return,
            },
        };
        if !tasks.is_empty() && queue.len() < BATCH_COMMANDS {
            let ended = timeout(GROWS, tasks.join_next()).await;
            if let Ok(Some(Ok(answered))) = ended
                && (LARGE..BATCH_COMMANDS).contains(&answered)
                && queue.len() + 1 < answered
            {
                sleep(RETURNS).await;
            }
        }
        while tasks.try_join_next().is_some() {}
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let mut bytes = first.command.bytes();
        let mut batch = vec![first];
        while batch.len() < BATCH_COMMANDS
            && let Ok(pending) = queue.try_recv()
        {
            let size = pending.command.bytes();
            if bytes + size > BATCH_BYTES {
                left_over = Some(pending);
                break;
            }
            bytes += size;
            batch.push(pending);
        }
        // Whoever has given up is not served: nothing was done for them yet.
        batch.retain(|p| !p.reply.is_closed());
        if batch.is_empty() {
            continue;
        }
        let core = core.clone();
        let (done, next) = oneshot::channel();
        let turn = Turn { before: std::mem::replace(&mut before, next), done };
        tasks.spawn(async move {
            let commands = batch.len();
            carry(&core, batch, turn).await;
            drop(permit);
            commands
        });
    }
}

/// A batch's place among those on their way. Dropping it lets the next one go on.
struct Turn {
    before: oneshot::Receiver<()>,
    done: oneshot::Sender<()>,
}

fn refuse(batch: Vec<Pending>, failure: &Failure) {
    for pending in batch {
        // A waiter that is gone needs no answer.
        let _ = pending.reply.send(Err(failure.clone()));
    }
}

/// Sees a batch through to outcomes or failures.
async fn carry(core: &Core, mut batch: Vec<Pending>, turn: Turn) {
    let mut turn = Some(turn);
    let Some(deadline) = batch.iter().map(|p| p.deadline).min() else { return };
    let mut leadership = core.leadership.clone();
    let patience = Instant::now() + core.config.leader_wait;
    let mut trouble = "there is no leader".to_owned();
    loop {
        let now = *leadership.borrow_and_update();
        if let Some(reason) = core.stopped() {
            return refuse(batch, &Failure::Stopped(reason));
        }
        if now.is_self {
            return write(core, batch, deadline, turn).await;
        }
        // Nobody waits for a batch that waits for a leader.
        drop(turn.take());
        let (local, rest): (Vec<_>, Vec<_>) = batch.into_iter().partition(|p| p.local_only);
        refuse(local, &Failure::NotLeader);
        batch = rest;
        if batch.is_empty() {
            return;
        }
        let leader = now.leader.filter(|&l| l != core.config.node);
        if let Some(leader) = leader {
            match forward(core, leader, batch, deadline).await {
                Ok(()) => return,
                Err((back, reason)) => {
                    batch = back;
                    trouble = reason;
                }
            }
        }
        let until = if leader.is_some() { deadline } else { deadline.min(patience) };
        if Instant::now() >= until {
            let failure = if leader.is_some() { Failure::Unavailable(trouble) } else { Failure::NotLeader };
            return refuse(batch, &failure);
        }
        tokio::select! {
            biased;
            changed = leadership.changed() => if changed.is_err() {
                return refuse(batch, &Failure::Stopped("the store is closed".into()));
            },
            () = sleep(PAUSE) => {}
        }
    }
}

/// Puts a batch into this leader's log.
async fn write(core: &Core, batch: Vec<Pending>, deadline: Instant, turn: Option<Turn>) {
    // An error is what is awaited: the one before drops its end when it is through.
    let done = match turn {
        Some(Turn { before, done }) => {
            let _ = before.await;
            Some(done)
        }
        None => None,
    };
    let batch = match super::pressure::admit(core, batch) {
        Ok(batch) => batch,
        Err((rest, refused, reason)) => {
            refuse(refused, &Failure::Full(reason));
            rest
        }
    };
    if batch.is_empty() {
        return;
    }
    let started = Instant::now();
    let (commands, replies): (Vec<_>, Vec<_>) = batch.into_iter().map(|p| (p.command, p.reply)).unzip();
    let proposal = Proposal(encode(&Batch { at_ms: core.env.now_millis(), commands }));
    let answer_all = |failure: Failure, replies: Vec<Reply>| {
        for reply in replies {
            let _ = reply.send(Err(failure.clone()));
        }
    };
    let given = core.raft.client_write_ff(proposal).await;
    drop(done);
    let answer = match given {
        Ok(answer) => answer,
        Err(fatal) => return answer_all(Failure::Stopped(fatal.to_string()), replies),
    };
    match timeout_at(deadline, answer).await {
        Ok(Ok(Ok(done))) => {
            core.note_latency(started.elapsed());
            let outcomes = done.data.0;
            if outcomes.len() != replies.len() {
                return answer_all(Failure::Unavailable("this release can't read its own entry".into()), replies);
            }
            for (reply, outcome) in replies.into_iter().zip(outcomes) {
                let _ = reply.send(Ok(outcome));
            }
        }
        // The entry may have reached others before this member lost the lead, and a later leader may keep it.
        Ok(Ok(Err(ClientWriteError::ForwardToLeader(_)))) => {
            answer_all(Failure::Unknown("the leader changed meanwhile".into()), replies);
        }
        Ok(Ok(Err(e))) => answer_all(Failure::Unknown(e.to_string()), replies),
        Ok(Err(_)) => answer_all(Failure::Unknown("the store stopped meanwhile".into()), replies),
        Err(_) => answer_all(Failure::Unknown("no quorum answered in time".into()), replies),
    }
}

/// Sends a batch to the leader. Gives back what was certainly not done, with the reason.
async fn forward(
    core: &Core,
    leader: u64,
    mut batch: Vec<Pending>,
    deadline: Instant,
) -> Result<(), (Vec<Pending>, String)> {
    let left = deadline.saturating_duration_since(Instant::now());
    let commands = batch.iter().map(|p| p.command.clone()).collect();
    // The leader gives up a little earlier, so that its answer still finds someone waiting.
    let timeout_ms = (left.as_millis() as u64).saturating_mul(9) / 10;
    let answer = timeout_at(deadline, core.link.ask(leader, &Request::Forward { commands, timeout_ms }, left)).await;
    let unknown = |reason: String| Failure::Unknown(reason);
    match answer {
        Ok(Ok(Response::Forward(results))) if results.len() == batch.len() => {
            let mut back = Vec::new();
            for (pending, result) in batch.drain(..).zip(results) {
                match result {
                    Err(Failure::NotLeader) => back.push(pending),
                    // What stopped is the leader, not this member: another may take over.
                    Err(Failure::Stopped(reason)) => {
                        let _ = pending.reply.send(Err(Failure::Unavailable(format!("the leader stopped: {reason}"))));
                    }
                    other => drop(pending.reply.send(other)),
                }
            }
            if back.is_empty() { Ok(()) } else { Err((back, format!("member {leader} does not lead"))) }
        }
        Ok(Ok(Response::Failed(Failure::NotLeader | Failure::Unavailable(_)))) => {
            Err((batch, format!("member {leader} does not lead")))
        }
        Ok(Err(PeerError::Unreachable(reason))) => Err((batch, format!("the leader can't be reached: {reason}"))),
        Ok(Err(PeerError::Lost(reason))) => {
            refuse(batch, &unknown(format!("the leader's answer was lost: {reason}")));
            Ok(())
        }
        Ok(Ok(_)) => {
            refuse(batch, &unknown("the leader answered something else".into()));
            Ok(())
        }
        Err(_) => {
            refuse(batch, &unknown("the leader did not answer in time".into()));
            Ok(())
        }
    }
}
