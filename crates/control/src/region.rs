//! The writer's loop, and the door to it.
//!
//! A server that the store makes leader claims `sys/writer`, loads the region's state at that revision, and from then on
//! decides: it takes all inputs that wait, decides them in order, commits what changed, and answers. Each transaction
//! compares `sys/writer` with what the one before left there and moves it on, so a writer that has lost its right, or one
//! whose earlier transaction did not commit, commits nothing more. When a commit's outcome is not known, the writer drops
//! its state and, if it still leads, claims and loads anew.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::FuturesOrdered;
use futures::{FutureExt, StreamExt};
use nexus_env::{Env, RngExt};
use nexus_model::plan::HostReport;
use nexus_model::{ApiError, Code, Timestamp, key};
use nexus_store::{Compare, Leadership, Op, RangeRequest, Revision, Store, StoreError, Txn, TxnOutcome};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::cells::Cells;
use crate::core::{Bootstrap, Core, Moment, Pack};
use crate::intent::{Accepted, Intent, Writer};
use crate::view::load;

/// Inputs that wait for the writer; more are refused as `overloaded`.
const QUEUE: usize = 4_096;
/// Inputs decided in one round.
const ROUND: usize = 512;
/// How often hosts are judged.
const TICK: Duration = Duration::from_millis(250);
/// How long a request waits for a leader or an answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long a request waits while nobody leads before it says so.
const NO_LEADER: Duration = Duration::from_secs(3);
/// How often invariants are recounted and old keys forgotten.
const HOUSEKEEPING: Duration = Duration::from_secs(15);

/// Why another server's writer did not take an intent.
#[derive(Debug)]
pub enum ForwardError {
    /// It certainly did not get it, or does not lead: try whoever leads now.
    NotTaken(String),
    /// It answered.
    Answered(ApiError),
    /// Perhaps it took it.
    Unknown(String),
}

/// The way to the writer of another server.
#[async_trait]
pub trait Forward: Send + Sync {
    async fn forward(&self, node: u64, intent: &Intent, deadline: Duration) -> Result<Accepted, ForwardError>;
}

/// Why a report was not taken here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportError {
    NotLeader { leader: Option<u64> },
    Refused(String),
    Overloaded,
}

type IntentReply = oneshot::Sender<Result<Accepted, Undecided>>;
type ReportReply = oneshot::Sender<Result<u64, ReportError>>;

/// How the loop answers an intent that it could not decide for good.
#[derive(Debug)]
enum Undecided {
    NotLeader,
    Decided(ApiError),
    Unknown(String),
}

enum Input {
    Intent(Box<Intent>, IntentReply),
    Report(Box<HostReport>, ReportReply),
}

/// Counters for metrics.
#[derive(Debug, Default)]
pub struct Counters {
    pub intents: AtomicU64,
    pub refusals: AtomicU64,
    pub reports: AtomicU64,
    pub commits: AtomicU64,
    pub operations: AtomicU64,
    pub violations: AtomicU64,
    /// Hosts heard lately, while this server leads.
    pub active_hosts: AtomicU64,
    /// 1 while this server's writer decides.
    pub leading: AtomicU64,
}

pub struct Config {
    pub node: u64,
    /// This server's name, as cells' holder.
    pub server: String,
    pub bootstrap: Bootstrap,
}

/// A server's part in its region: the door to the writer, and the writer itself while this server leads.
pub struct Region {
    config: Config,
    env: Env,
    store: Arc<dyn Store>,
    forward: Arc<dyn Forward>,
    leadership: watch::Receiver<Leadership>,
    input: mpsc::Sender<Input>,
    /// Taken by [`Region::run`].
    queue: std::sync::Mutex<Option<mpsc::Receiver<Input>>>,
    pub counters: Counters,
}

impl Region {
    pub fn new(config: Config, env: Env, store: Arc<dyn Store>, forward: Arc<dyn Forward>) -> Self {
        let (input, queue) = mpsc::channel(QUEUE);
        let leadership = store.leadership();
        Self {
            config,
            env,
            store,
            forward,
            leadership,
            input,
            queue: std::sync::Mutex::new(Some(queue)),
            counters: Counters::default(),
        }
    }

    /// Takes in a host's report, if this server leads. Answers the host's epoch.
    pub async fn report(&self, report: HostReport) -> Result<u64, ReportError> {
        let now = *self.leadership.borrow();
        if !now.is_self {
            return Err(ReportError::NotLeader { leader: now.leader });
        }
        let (reply, answer) = oneshot::channel();
        self.input.try_send(Input::Report(Box::new(report), reply)).map_err(|_| ReportError::Overloaded)?;
        match tokio::time::timeout(DEADLINE, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(ReportError::NotLeader { leader: self.leadership.borrow().leader }),
            Err(_) => Err(ReportError::Overloaded),
        }
    }

    /// Takes an intent here, if this server leads: what another server forwards. `None`: it does not lead.
    pub async fn submit_here(&self, intent: Intent) -> Option<Result<Accepted, ApiError>> {
        match self.try_here(intent).await {
            Err(Undecided::NotLeader) => None,
            Ok(accepted) => Some(Ok(accepted)),
            Err(Undecided::Decided(error)) => Some(Err(error)),
            Err(Undecided::Unknown(why)) => Some(Err(unknown(&why))),
        }
    }

    async fn try_here(&self, intent: Intent) -> Result<Accepted, Undecided> {
        if !self.leadership.borrow().is_self {
            return Err(Undecided::NotLeader);
        }
        let (reply, answer) = oneshot::channel();
        let full = || Undecided::Decided(ApiError::new(Code::Overloaded, "the writer's queue is full: try again"));
        self.input.try_send(Input::Intent(Box::new(intent), reply)).map_err(|_| full())?;
        match tokio::time::timeout(DEADLINE, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Undecided::Unknown("the writer stopped".into())),
            Err(_) => Err(Undecided::Unknown(format!("no answer within {} s", DEADLINE.as_secs()))),
        }
    }

    /// Runs the writer whenever this server leads, until `stop` is cancelled or the store is closed. Called once.
    pub async fn run(&self, stop: CancellationToken) {
        let taken = self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let mut queue = taken.expect("run is called once");
        let mut leadership = self.leadership.clone();
        loop {
            let epoch = {
                let lead = leadership.wait_for(|l| l.is_self);
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return,
                    lead = lead => match lead {
                        Ok(l) => l.epoch,
                        Err(_) => return,
                    },
                    // Whoever comes while nobody leads here is sent on.
                    Some(input) = queue.recv() => {
                        turn_away(input, self.leadership.borrow().leader);
                        continue;
                    }
                }
            };
            let end = tokio::select! {
                biased;
                () = stop.cancelled() => Ok(()),
                end = self.lead(epoch, &mut queue, &mut leadership) => end,
            };
            self.counters.leading.store(0, Ordering::Relaxed);
            if stop.is_cancelled() {
                return;
            }
            if let Err(error) = end {
                tracing::warn!(%error, epoch, "the writer gave up its state");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }

    /// Claims the right to write and decides until it is lost.
    async fn lead(
        &self,
        epoch: u64,
        queue: &mut mpsc::Receiver<Input>,
        leadership: &mut watch::Receiver<Leadership>,
    ) -> Result<(), StoreError> {
        let (mut chain, at) = self.claim(epoch).await?;
        let (world, _) = load(&*self.store, Some(at), &["o/", "t/", "i/"], false).await?;
        let cells = Cells::new(self.env.monotonic(), self.config.server.clone(), epoch);
        let mut core = Core::new(world, self.config.bootstrap.clone(), cells);
        core.bootstrap(self.moment());
        self.counters.leading.store(1, Ordering::Relaxed);
        tracing::info!(epoch, revision = at.0, "this server's writer decides for the region");

        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
        housekeeping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut inputs = Vec::with_capacity(ROUND);
        let mut more = true;
        loop {
            if more {
                // Work is left from the last round: take what waits, without waiting for more.
                while inputs.len() < ROUND {
                    match queue.try_recv() {
                        Ok(input) => inputs.push(input),
                        Err(_) => break,
                    }
                }
                if tick.tick().now_or_never().is_some() {
                    core.tick(self.moment());
                }
            } else {
                tokio::select! {
                    biased;
                    changed = leadership.changed() => {
                        let now = *leadership.borrow();
                        if changed.is_err() || !now.is_self || now.epoch != epoch {
                            return Ok(());
                        }
                    }
                    _ = tick.tick() => {
                        core.tick(self.moment());
                        let active = core.cells.active(self.env.monotonic()) as u64;
                        self.counters.active_hosts.store(active, Ordering::Relaxed);
                    }
                    _ = housekeeping.tick() => self.keep_house(&mut core),
                    n = queue.recv_many(&mut inputs, ROUND) => if n == 0 { return Ok(()) },
                }
            }
            let mut answers: VecDeque<(IntentReply, Result<Accepted, ApiError>)> = VecDeque::new();
            for input in inputs.drain(..) {
                match input {
                    Input::Intent(intent, reply) => {
                        self.counters.intents.fetch_add(1, Ordering::Relaxed);
                        answers.push_back((reply, core.intent(&intent, self.moment())));
                    }
                    Input::Report(report, reply) => {
                        self.counters.reports.fetch_add(1, Ordering::Relaxed);
                        let answer = core.report(&report, self.moment());
                        let _ = reply.send(answer.map_err(ReportError::Refused));
                    }
                }
            }
            more = core.reconcile(self.moment());
            if let Err(error) = self.commit(&mut core, &mut chain).await {
                for (reply, _) in answers {
                    let _ = reply.send(Err(Undecided::Unknown(error.to_string())));
                }
                return Err(error);
            }
            for (reply, answer) in answers {
                let answer = match answer {
                    Ok(mut accepted) => {
                        if !accepted.replayed
                            && let Some(revision) = core.revision_of(&accepted)
                        {
                            accepted.object.metadata.revision = revision;
                        }
                        Ok(accepted)
                    }
                    Err(error) => {
                        self.counters.refusals.fetch_add(1, Ordering::Relaxed);
                        Err(Undecided::Decided(error))
                    }
                };
                let _ = reply.send(answer);
            }
        }
    }

    fn moment(&self) -> Moment<'_> {
        Moment {
            now: Timestamp::from_millis(self.env.now_millis()),
            monotonic: self.env.monotonic(),
            rng: &*self.env.rng,
        }
    }

    fn keep_house(&self, core: &mut Core) {
        core.forget_old(self.moment());
        for difference in core.check_invariants() {
            self.counters.violations.fetch_add(1, Ordering::Relaxed);
            tracing::error!(%difference, "an invariant does not hold");
        }
    }

    /// Takes over `sys/writer`: from that revision on, no other writer can commit.
    async fn claim(&self, epoch: u64) -> Result<(Chain, Revision), StoreError> {
        let old = self.store.range(RangeRequest::get(key::WRITER)).await?;
        let was = old.kvs.first().map_or(Revision(0), |kv| kv.mod_revision);
        let nonce: [u8; 8] = self.env.rng.bytes();
        let chain = Chain { epoch, node: self.config.node, nonce: u64::from_le_bytes(nonce), next: 0 };
        let txn = Txn::new(
            vec![Compare::mod_revision(key::WRITER, was)],
            vec![Op::put(key::WRITER, chain.value()), Op::put(key::FORMAT, "1")],
        );
        match self.store.txn(txn).await? {
            TxnOutcome::Committed { revision } => Ok((chain, revision)),
            TxnOutcome::CompareFailed { .. } => {
                Err(StoreError::Unavailable { reason: "another server claimed the writer's right".into() })
            }
        }
    }

    async fn commit(&self, core: &mut Core, chain: &mut Chain) -> Result<(), StoreError> {
        let packs: Vec<Pack> = core.take_packs();
        let mut flight: FuturesOrdered<_> = packs
            .iter()
            .map(|pack| {
                let before = chain.value();
                chain.next += 1;
                let mut ops: Vec<Op> = pack
                    .ops
                    .iter()
                    .map(|(key, value)| match value {
                        Some(value) => Op::put(key.clone(), value.clone()),
                        None => Op::delete(key.clone()),
                    })
                    .collect();
                ops.push(Op::put(key::WRITER, chain.value()));
                self.store.txn(Txn::new(vec![Compare::value(key::WRITER, before)], ops))
            })
            .collect();
        let mut done = packs.iter();
        while let Some(outcome) = flight.next().await {
            let pack = done.next().expect("an outcome per pack");
            match outcome? {
                TxnOutcome::Committed { revision } => {
                    self.counters.commits.fetch_add(1, Ordering::Relaxed);
                    self.counters.operations.fetch_add(pack.ops.len() as u64, Ordering::Relaxed);
                    core.committed(pack, revision.0);
                }
                TxnOutcome::CompareFailed { .. } => {
                    return Err(StoreError::Unavailable { reason: "another server has become the writer".into() });
                }
            }
        }
        Ok(())
    }
}

/// The value of `sys/writer`, which each transaction moves on by one.
struct Chain {
    epoch: u64,
    node: u64,
    nonce: u64,
    next: u64,
}

impl Chain {
    fn value(&self) -> Bytes {
        format!("epoch={} node={} claim={:016x} next={}", self.epoch, self.node, self.nonce, self.next).into()
    }
}

fn turn_away(input: Input, leader: Option<u64>) {
    match input {
        Input::Intent(_, reply) => {
            let _ = reply.send(Err(Undecided::NotLeader));
        }
        Input::Report(_, reply) => {
            let _ = reply.send(Err(ReportError::NotLeader { leader }));
        }
    }
}

fn unknown(why: &str) -> ApiError {
    let detail =
        format!("{why}; the change may have been committed: read it, or send it again with its Idempotency-Key");
    ApiError::new(Code::Timeout, detail)
}

#[async_trait]
impl Writer for Region {
    async fn submit(&self, intent: Intent) -> Result<Accepted, ApiError> {
        let started = tokio::time::Instant::now();
        let mut leadership = self.leadership.clone();
        let mut why = "no server leads".to_owned();
        loop {
            let now = *leadership.borrow_and_update();
            let left = DEADLINE.saturating_sub(started.elapsed());
            let patience = if now.leader.is_none() { NO_LEADER } else { DEADLINE };
            if started.elapsed() >= patience {
                let detail = format!("{why}; running apps go on. Try again, or look at `nexus status`");
                return Err(ApiError::new(Code::Unavailable, detail));
            }
            match now.leader {
                _ if now.is_self => match self.try_here(intent.clone()).await {
                    Ok(accepted) => return Ok(accepted),
                    Err(Undecided::Decided(error)) => return Err(error),
                    Err(Undecided::Unknown(why)) => return Err(unknown(&why)),
                    Err(Undecided::NotLeader) => "the leader changes".clone_into(&mut why),
                },
                Some(node) => match self.forward.forward(node, &intent, left).await {
                    Ok(accepted) => return Ok(accepted),
                    Err(ForwardError::Answered(error)) => return Err(error),
                    Err(ForwardError::Unknown(why)) => return Err(unknown(&why)),
                    Err(ForwardError::NotTaken(reason)) => why = reason,
                },
                None => {
                    "no majority of the servers is reachable, so nothing can be written now".clone_into(&mut why);
                }
            }
            // Wait for news of a leader, or a little while.
            let _ = tokio::time::timeout(Duration::from_millis(100), leadership.changed()).await;
        }
    }
}
