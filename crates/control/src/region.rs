//! The writer's loop, and the door to it.
//!
//! A server that the store makes leader claims `sys/writer`, loads the region's state at that revision, and from then on
//! decides: it takes all inputs that wait, decides them in order, commits what changed, and answers. Its transactions are a
//! [chain](crate::chain) that breaks when the right is lost. A writer that can't learn what became of a transaction drops
//! its state and, if it still leads, claims and loads anew.
//!
//! The same loop writes the group that all regions share. A region of a fleet follows this server's own copy of that group
//! while it leads, and tells its leader every second what the region has.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt;
use nexus_env::{Env, RngExt};
use nexus_model::kind::{RegionServer, Tier};
use nexus_model::plan::{HostReport, RegionSummary, RoundTripReport, ServerNote, TrafficReport};
use nexus_model::{ApiError, Code, Timestamp, key};
use nexus_store::{KeyValue, Leadership, Pressure, RangeRequest, Revision, Store, StoreError};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::audit::Trail;
use crate::autoscale::Autoscaler;
use crate::cells::Cells;
use crate::chain::Chain;
use crate::core::{Bootstrap, Core, Moment, Pack};
use crate::inbox::{Inbox, Input, IntentReply, ReportReply};
use crate::intent::{Accepted, Change, Intent, Passed, Writer};
use crate::link::Link;
use crate::traffic::Traffic;
use crate::view::load;
use crate::world::{Part, World};

/// Inputs that are taken out at once …
const ROUND: usize = 512;
/// … and how often in one round, while they change little: most reports are no news, and a region's hosts must not wait for
/// their turn for rounds that commit.
const TAKES: usize = 16;
/// Transactions after which a round takes in nothing more.
const ENOUGH_PACKS: usize = 16;
/// How often hosts are judged.
const TICK: Duration = Duration::from_millis(250);
/// How long a request waits for a leader or an answer.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long a request waits while nobody leads before it says so.
const NO_LEADER: Duration = Duration::from_secs(3);
/// How long a leader that has a successor may take to answer what it was asked.
const LAST_WORDS: Duration = Duration::from_millis(250);
/// How long a refused request waits for what the global group has promised meanwhile.
const CATCH_UP: Duration = Duration::from_secs(2);
/// Other servers' intents that are passed on at once; more are refused, and their senders try again.
const PASSING: usize = 256;
/// Servers that an intent may still have to pass when it comes to one. The store's routes are no longer.
const MOST_HOPS: usize = 3;
/// How often old keys are forgotten.
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

    /// Hands an intent to a server that is to pass it on: see [`Region::pass_on`].
    async fn pass(&self, via: u64, passed: &Passed, deadline: Duration) -> Result<Accepted, ForwardError>;
}

/// The way to the writer of the group that all regions share.
#[async_trait]
pub trait Upward: Send + Sync {
    /// Tells it what a region has; answers the newest revision that it has committed.
    async fn summarize(&self, summary: &RegionSummary, deadline: Duration) -> Result<u64, String>;
}

/// What makes a region one of a fleet.
pub struct Fleet {
    /// This server's own copy of the group that all regions share.
    pub store: Arc<dyn Store>,
    pub upward: Arc<dyn Upward>,
    pub tier: Tier,
    /// The region's servers, as configured; they are asked what they say of themselves.
    pub servers: Vec<RegionServer>,
}

/// Why a report was not taken here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReportError {
    NotLeader { leader: Option<u64> },
    Refused(String),
    Overloaded,
}

/// How the loop answers an intent that it could not decide for good.
#[derive(Debug)]
pub(crate) enum Undecided {
    NotLeader,
    Decided(ApiError),
    Unknown(String),
}

/// Counters for metrics.
#[derive(Debug, Default)]
pub struct Counters {
    pub intents: AtomicU64,
    pub refusals: AtomicU64,
    pub reports: AtomicU64,
    /// Times that the writer took in what waited, decided and committed.
    pub rounds: AtomicU64,
    /// Reports that a later one of the same host replaced before the writer came to them.
    pub reports_replaced: AtomicU64,
    /// Objects whose reconciler panics and that are tried again later.
    pub quarantined: AtomicU64,
    /// Stored keys whose values can't be read: they are passed over.
    pub unreadable: AtomicU64,
    pub commits: AtomicU64,
    pub operations: AtomicU64,
    pub violations: AtomicU64,
    /// Records of the group's audit log, as this server last knew while it led.
    pub audit_records: AtomicU64,
    /// 1 while the audit log can't go on, so that users' changes are refused.
    pub audit_broken: AtomicU64,
    /// Hosts heard lately, while this server leads.
    pub active_hosts: AtomicU64,
    /// 1 while this server's writer decides.
    pub leading: AtomicU64,
    /// Times that this server's writer began to decide, with its state loaded anew. Grows with a change of the leader, and
    /// when a commit's outcome could not be learnt.
    pub beginnings: AtomicU64,
    /// Milliseconds since this leader's copy of the global group was known to be complete.
    pub fleet_stale_ms: AtomicU64,
}

pub struct Config {
    pub node: u64,
    /// This server's name, as cells' holder.
    pub server: String,
    pub bootstrap: Bootstrap,
    /// `None`: the global group itself, or a region that is a fleet of its own.
    pub fleet: Option<Fleet>,
}

/// A server's part in its region: the door to the writer, and the writer itself while this server leads.
pub struct Region {
    config: Config,
    env: Env,
    store: Arc<dyn Store>,
    forward: Arc<dyn Forward>,
    leadership: watch::Receiver<Leadership>,
    inbox: Inbox,
    /// Places for other servers' intents that this one passes on.
    passing: Semaphore,
    /// The revision of the global group that this server's writer has taken in, while it leads.
    adopted: watch::Sender<u64>,
    /// What gateways say of requests, while this server leads.
    traffic: Arc<Traffic>,
    pub counters: Counters,
}

impl Region {
    pub fn new(config: Config, env: Env, store: Arc<dyn Store>, forward: Arc<dyn Forward>) -> Self {
        let leadership = store.leadership();
        Self {
            config,
            env,
            store,
            forward,
            leadership,
            inbox: Inbox::default(),
            passing: Semaphore::new(PASSING),
            adopted: watch::Sender::default(),
            traffic: Arc::default(),
            counters: Counters::default(),
        }
    }

    /// Takes in a host's report, if this server leads. Answers the host's epoch.
    pub async fn report(&self, report: HostReport) -> Result<u64, ReportError> {
        let now = self.env.monotonic();
        self.tell(|reply| Input::Report(Box::new(report), reply, now)).await
    }

    /// Takes in what a region says of itself, if this server leads the global group. Answers the newest revision.
    pub async fn hear(&self, summary: RegionSummary) -> Result<u64, ReportError> {
        self.tell(|reply| Input::Summary(Box::new(summary), reply)).await
    }

    async fn tell(&self, input: impl FnOnce(ReportReply) -> Input) -> Result<u64, ReportError> {
        let now = *self.leadership.borrow();
        if !now.is_self {
            return Err(ReportError::NotLeader { leader: now.leader });
        }
        let (reply, answer) = oneshot::channel();
        let replaced = self.inbox.put(input(reply)).map_err(|_| ReportError::Overloaded)?;
        self.counters.reports_replaced.fetch_add(u64::from(replaced), Ordering::Relaxed);
        match tokio::time::timeout(DEADLINE, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(ReportError::NotLeader { leader: self.leadership.borrow().leader }),
            Err(_) => Err(ReportError::Overloaded),
        }
    }

    /// Takes in what a gateway says of requests, if this server leads. Never committed, so it does not wait for the writer.
    pub fn hear_traffic(&self, report: &TrafficReport) -> Result<(), ReportError> {
        let now = *self.leadership.borrow();
        if !now.is_self {
            return Err(ReportError::NotLeader { leader: now.leader });
        }
        self.traffic.hear(report, self.env.monotonic());
        Ok(())
    }

    /// Takes in what a server of this region says of itself, if this one leads.
    pub fn note(&self, note: ServerNote) -> Result<(), ReportError> {
        let now = *self.leadership.borrow();
        if !now.is_self {
            return Err(ReportError::NotLeader { leader: now.leader });
        }
        self.inbox.put(Input::Note(note)).map(|_| ()).map_err(|_| ReportError::Overloaded)
    }

    /// Takes in how far a gateway is from hosts, if this server leads.
    pub fn round_trips(&self, report: RoundTripReport) -> Result<(), ReportError> {
        let now = *self.leadership.borrow();
        if !now.is_self {
            return Err(ReportError::NotLeader { leader: now.leader });
        }
        self.inbox.put(Input::Trips(Box::new(report))).map(|_| ()).map_err(|_| ReportError::Overloaded)
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

    /// Passes an intent on to the writer that it is for, or to the next server on the way there. What is not known of it then
    /// is left to whoever sent it: nobody on the way tries twice.
    pub async fn pass_on(&self, mut passed: Passed) -> Result<Accepted, ForwardError> {
        let Ok(_place) = self.passing.try_acquire() else {
            return Err(ForwardError::NotTaken("too many intents are being passed on".into()));
        };
        if passed.hops.len() > MOST_HOPS {
            return Err(ForwardError::NotTaken("the way is too long".into()));
        }
        let left = Duration::from_millis(passed.budget_ms).min(DEADLINE);
        if passed.hops.is_empty() {
            return self.forward.forward(passed.to, &passed.intent, left).await;
        }
        let next = passed.hops.remove(0);
        passed.budget_ms = budget(left);
        self.forward.pass(next, &passed, left).await
    }

    /// Sends an intent to the server that leads, past a link that is down if the store knows a way.
    async fn send(&self, leader: u64, intent: &Intent, left: Duration) -> Result<Accepted, ForwardError> {
        let mut hops = self.store.way_to(leader);
        if hops.is_empty() {
            return self.forward.forward(leader, intent, left).await;
        }
        let first = hops.remove(0);
        let passed = Passed { to: leader, hops, budget_ms: budget(left), intent: intent.clone() };
        self.forward.pass(first, &passed, left).await
    }

    async fn try_here(&self, intent: Intent) -> Result<Accepted, Undecided> {
        let knew = *self.adopted.borrow();
        match self.decide_here(intent.clone()).await {
            // What the user has just been promised by the global group may not have come through yet.
            Err(Undecided::Decided(error)) if may_be_early(&intent, &error) => match self.catch_up().await {
                Some(()) if *self.adopted.borrow() > knew => self.decide_here(intent).await,
                Some(()) => Err(Undecided::Decided(error)),
                None => {
                    let detail = format!(
                        "{}, as far as this region knows: the global group can't be reached now, so what was changed \
                         there lately is not known here",
                        error.detail
                    );
                    Err(Undecided::Decided(ApiError { detail, ..error }))
                }
            },
            decided => decided,
        }
    }

    /// Waits until this writer has taken in all that the global group had committed by now. `None` if that can't be told.
    async fn catch_up(&self) -> Option<()> {
        let Some(fleet) = &self.config.fleet else { return Some(()) };
        let newest = tokio::time::timeout(CATCH_UP, fleet.store.range(RangeRequest::get(key::FORMAT))).await;
        let newest = newest.ok()?.ok()?.revision.0;
        let mut adopted = self.adopted.subscribe();
        tokio::time::timeout(CATCH_UP, adopted.wait_for(|at| *at >= newest)).await.ok()?.ok().map(drop)
    }

    async fn decide_here(&self, intent: Intent) -> Result<Accepted, Undecided> {
        if !self.leadership.borrow().is_self {
            return Err(Undecided::NotLeader);
        }
        // Wishes that grow are refused while there is still room for what cleaning up writes.
        if intent.change != Change::Delete
            && let Pressure::Full(reason) = self.store.status().await.pressure
        {
            let detail = format!("the metadata store is full and nothing may grow: {reason}");
            return Err(Undecided::Decided(ApiError::new(Code::Overloaded, detail)));
        }
        let (reply, answer) = oneshot::channel();
        let full = || Undecided::Decided(ApiError::new(Code::Overloaded, "the writer's queue is full: try again"));
        self.inbox.put(Input::Intent(Box::new(intent), reply)).map_err(|_| full())?;
        match tokio::time::timeout(DEADLINE, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Undecided::Unknown("the writer stopped".into())),
            Err(_) => Err(Undecided::Unknown(format!("no answer within {} s", DEADLINE.as_secs()))),
        }
    }

    /// Runs the writer whenever this server leads, until `stop` is cancelled or the store is closed. Called once.
    pub async fn run(&self, stop: CancellationToken) {
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
                    () = self.inbox.filled() => {
                        let leader = self.leadership.borrow().leader;
                        self.inbox.take(ROUND).into_iter().for_each(|input| turn_away(input, leader));
                        continue;
                    }
                }
            };
            let end = tokio::select! {
                biased;
                () = stop.cancelled() => Ok(()),
                end = self.lead(epoch, &mut leadership) => end,
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
    async fn lead(&self, epoch: u64, leadership: &mut watch::Receiver<Leadership>) -> Result<(), StoreError> {
        let (mut chain, at) = self.claim(epoch).await?;
        let (world, _) = load(&*self.store, Some(at), &["o/", "t/", "i/", key::ADOPTED], false).await?;
        let part = if self.config.fleet.is_some() { Part::Region } else { Part::Alone };
        let trail = Trail::load(&*self.store, at, &self.config.bootstrap.region).await?;
        // What was heard while another server led, or before this one was held up, is too old to judge by.
        self.traffic.clear();
        let world = World { part, trail: Some(trail), traffic: self.traffic.clone(), ..world };
        let cells = Cells::new(self.env.monotonic(), self.config.server.clone(), epoch);
        let mut core = Core::new(world, self.config.bootstrap.clone(), cells);
        core.autoscaler = self.load_histories(at).await?;
        core.bootstrap(self.moment());
        let mut link = self.config.fleet.as_ref().map(|fleet| Link::new(fleet, epoch, self.env.monotonic()));
        let mut newest = at.0;
        self.keep_count(&core);
        self.counters.leading.store(1, Ordering::Relaxed);
        self.counters.beginnings.fetch_add(1, Ordering::Relaxed);
        tracing::info!(epoch, revision = at.0, "this server's writer decides for its group");

        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut housekeeping = tokio::time::interval(HOUSEKEEPING);
        housekeeping.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut more = true;
        loop {
            if more {
                // Work is left from the last round: take what waits, without waiting for more.
                if let Some(link) = &mut link {
                    link.take_in_what_waits(&mut core, self.moment());
                }
                if tick.tick().now_or_never().is_some() {
                    self.tick(&mut core);
                    self.report_up(&mut link, &core);
                }
                if self.traffic.rung().now_or_never().is_some() {
                    core.wake(self.moment());
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
                        self.tick(&mut core);
                        self.report_up(&mut link, &core);
                    }
                    news = next_news(&mut link) => {
                        core.adopt(news, self.moment());
                        if let Some(link) = &mut link {
                            link.take_in_what_waits(&mut core, self.moment());
                        }
                    }
                    _ = housekeeping.tick() => self.keep_house(&mut core),
                    () = self.traffic.rung() => core.wake(self.moment()),
                    () = self.inbox.filled() => {}
                }
            }
            let mut answers: VecDeque<(IntentReply, Result<Accepted, ApiError>)> = VecDeque::new();
            for _ in 0..TAKES {
                let inputs = self.inbox.take(ROUND);
                let all = inputs.len() < ROUND;
                for input in inputs {
                    match input {
                        Input::Intent(intent, reply) => {
                            self.counters.intents.fetch_add(1, Ordering::Relaxed);
                            answers.push_back((reply, core.intent(&intent, self.moment())));
                        }
                        Input::Report(report, reply, came) => {
                            self.counters.reports.fetch_add(1, Ordering::Relaxed);
                            let answer = core.report(&report, Moment { monotonic: came, ..self.moment() });
                            let _ = reply.send(answer.map_err(ReportError::Refused));
                        }
                        Input::Summary(summary, reply) => {
                            let answer = core.hear(&summary, self.moment()).map(|()| newest);
                            let _ = reply.send(answer.map_err(ReportError::Refused));
                        }
                        Input::Note(note) => {
                            if let Some(link) = &mut link {
                                link.note(note, self.env.monotonic());
                            }
                        }
                        Input::Trips(report) => core.round_trips(&report, self.moment()),
                    }
                }
                if all || core.packs() >= ENOUGH_PACKS {
                    break;
                }
            }
            more = core.reconcile(self.moment());
            self.counters.rounds.fetch_add(1, Ordering::Relaxed);
            match self.commit(epoch, &mut core, &mut chain).await {
                Ok(at) => newest = newest.max(at.0),
                Err(error) => {
                    for (reply, _) in answers {
                        let _ = reply.send(Err(Undecided::Unknown(error.to_string())));
                    }
                    return Err(error);
                }
            }
            if link.is_some() {
                self.adopted.send_replace(core.world.global_revision);
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

    /// Tells the global group what the region has, when that has changed or is due.
    fn report_up(&self, link: &mut Option<Link>, core: &Core) {
        if let Some(link) = link {
            let stale_ms = link.report(core, self.env.monotonic());
            self.counters.fleet_stale_ms.store(stale_ms, Ordering::Relaxed);
        }
    }

    fn keep_house(&self, core: &mut Core) {
        core.forget_old(self.moment());
        self.counters.quarantined.store(core.quarantined() as u64, Ordering::Relaxed);
        self.keep_count(core);
    }

    fn keep_count(&self, core: &Core) {
        self.counters.unreadable.store(core.world.unreadable.len() as u64, Ordering::Relaxed);
        let trail = core.world.trail();
        self.counters.audit_records.store(trail.size(), Ordering::Relaxed);
        self.counters.audit_broken.store(u64::from(trail.broken().is_some()), Ordering::Relaxed);
    }

    /// Judges hosts, and recounts a little of what must agree.
    fn tick(&self, core: &mut Core) {
        self.inbox.hosts_waiting(|host, came| core.cells.arrived(host, came));
        core.tick(self.moment());
        for difference in core.check_on() {
            self.counters.violations.fetch_add(1, Ordering::Relaxed);
            tracing::error!(%difference, "an invariant does not hold");
        }
        let active = core.cells.active(self.env.monotonic()) as u64;
        self.counters.active_hosts.store(active, Ordering::Relaxed);
    }

    /// What apps' loads were, as earlier leaders wrote it down.
    async fn load_histories(&self, at: Revision) -> Result<Autoscaler, StoreError> {
        let rows = crate::audit::rows(&*self.store, at, key::LOADS).await?;
        let read = |kv: KeyValue| key::load_of(&kv.key).map(|(app, day)| (app, day, kv.value.to_vec()));
        Ok(Autoscaler::from_rows(rows.into_iter().filter_map(read)))
    }

    /// Takes over `sys/writer`.
    async fn claim(&self, epoch: u64) -> Result<(Chain, Revision), StoreError> {
        let nonce: [u8; 8] = self.env.rng.bytes();
        Chain::claim(&*self.store, epoch, self.config.node, u64::from_le_bytes(nonce)).await
    }

    /// Commits what was decided; answers the newest revision that it made, 0 if it made none.
    async fn commit(&self, epoch: u64, core: &mut Core, chain: &mut Chain) -> Result<Revision, StoreError> {
        let mut newest = Revision(0);
        let packs: Vec<Pack> = core.take_packs();
        let leads = || {
            let now = *self.leadership.borrow();
            now.is_self && now.epoch == epoch
        };
        let committed = |pack: &Pack, revision: Revision| {
            self.counters.commits.fetch_add(1, Ordering::Relaxed);
            self.counters.operations.fetch_add(pack.ops.len() as u64, Ordering::Relaxed);
            core.committed(pack, revision.0);
            newest = revision;
        };
        chain.commit(&*self.store, &packs, leads, committed).await?;
        Ok(newest)
    }
}

/// News of the global group, for a region that follows one.
async fn next_news(link: &mut Option<Link>) -> crate::fleet::Adopt {
    match link {
        Some(link) => link.news().await,
        None => std::future::pending().await,
    }
}

/// Ends when another server than `node` leads and `node` has had time to answer what it had decided before.
async fn succeeded(mut leadership: watch::Receiver<Leadership>, node: u64) {
    if leadership.wait_for(|l| l.leader.is_some_and(|leader| leader != node)).await.is_err() {
        // A store that is closed says so elsewhere.
        std::future::pending::<()>().await;
    }
    tokio::time::sleep(LAST_WORDS).await;
}

/// Whether a refusal may only say that this region has not heard of something yet.
fn may_be_early(intent: &Intent, error: &ApiError) -> bool {
    let project = intent.target.project.as_ref();
    error.code == Code::QuotaExceeded || project.is_some_and(|p| *error == ApiError::not_found("Project", p.as_str()))
}

fn turn_away(input: Input, leader: Option<u64>) {
    match input {
        Input::Intent(_, reply) => {
            let _ = reply.send(Err(Undecided::NotLeader));
        }
        Input::Report(_, reply, _) | Input::Summary(_, reply) => {
            let _ = reply.send(Err(ReportError::NotLeader { leader }));
        }
        Input::Note(_) | Input::Trips(_) => {}
    }
}

/// What a server is given of the time that is left to its caller: a little less, so that its answer finds someone waiting.
fn budget(left: Duration) -> u64 {
    u64::try_from(left.as_millis()).unwrap_or(u64::MAX) / 10 * 9
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
        // A writer that takes the same key twice gives its first answer again, so such an intent may be sent anew.
        let again = intent.idempotency_key.is_some();
        let mut lost = None;
        loop {
            let now = *leadership.borrow_and_update();
            let left = DEADLINE.saturating_sub(started.elapsed());
            let patience = if now.leader.is_none() { NO_LEADER } else { DEADLINE };
            if started.elapsed() >= patience {
                let detail = format!("{why}; running apps go on. Try again, or look at `nexus status`");
                return Err(lost.unwrap_or_else(|| ApiError::new(Code::Unavailable, detail)));
            }
            match now.leader {
                _ if now.is_self => match self.try_here(intent.clone()).await {
                    Ok(accepted) => return Ok(accepted),
                    Err(Undecided::Decided(error)) => return Err(error),
                    Err(Undecided::Unknown(why)) if !again => return Err(unknown(&why)),
                    Err(Undecided::Unknown(why)) => lost = Some(unknown(&why)),
                    Err(Undecided::NotLeader) => "the leader changes".clone_into(&mut why),
                },
                Some(node) => {
                    let forwarded = tokio::select! {
                        biased;
                        forwarded = self.send(node, &intent, left) => forwarded,
                        () = succeeded(leadership.clone(), node) => {
                            Err(ForwardError::Unknown("another server leads before the one that was asked has answered".into()))
                        }
                    };
                    match forwarded {
                        Ok(accepted) => return Ok(accepted),
                        Err(ForwardError::Answered(error)) => return Err(error),
                        Err(ForwardError::Unknown(why)) if !again => return Err(unknown(&why)),
                        Err(ForwardError::Unknown(why)) => lost = Some(unknown(&why)),
                        Err(ForwardError::NotTaken(reason)) => why = reason,
                    }
                }
                None => {
                    "no majority of the servers is reachable, so nothing can be written now".clone_into(&mut why);
                }
            }
            // Wait for news of a leader, or a little while. A store that is closed has no more news, at once and for ever.
            let news = tokio::time::timeout(Duration::from_millis(100), leadership.changed()).await;
            if matches!(news, Ok(Err(_))) {
                return Err(ApiError::new(
                    Code::Unavailable,
                    "this server's metadata store is closed: ask another server",
                ));
            }
        }
    }
}
