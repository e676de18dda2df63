//! Who may stand for election, and when a leader has to give up.
//!
//! The consensus library elects and replicates; its own election timer is off. This file decides *when* it does, by three
//! rules that plain Raft lacks and that a group with half-broken links needs.
//!
//! * **Pre-vote** (Ongaro's thesis, §9.6). A member that has not heard a leader for the lease and a random time asks the
//!   others first whether they would vote for it. They say yes if they have heard no leader for the lease either, and its
//!   log is not behind theirs. Only with a majority does it stand. So a member that was away, or that alone misses the
//!   leader's messages, raises no term and disrupts nobody.
//! * **Check-quorum** (§6.2). A leader that has had no answers from a majority for about an election timeout, or whose disk
//!   holds it up for twice that, falls silent at once, even if its messages still get out, and then gives up. So followers
//!   that hear it but can't answer it notice that it is gone.
//! * **Making room.** A leader that is to be removed or stopped gives up and asks a member with a full log to stand, so that the
//!   group does not have to wait for a timeout.
//!
//! Why this is safe: nothing here counts votes or commits anything. Standing is always allowed in Raft, at any time, so
//! *when* to do it is free to choose; not standing and not sending are what a slow member does. A leader gives up by
//! promising not to follow anything older than (its term + 1, member 0). Member 0 does not exist, so nobody is elected by
//! this promise, and a promise only forbids: it is what the member would hold if it had voted for a candidate whose
//! message got lost on the way back. Pre-votes and answers about them promise nothing and are not stored.
//!
//! Chance comes from [`nexus_env::Env`] and time from tokio, so that a simulator owns both.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nexus_env::{Env, RngExt};
use openraft::ServerState;
use openraft::raft::VoteRequest;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::Config;
use super::core::Core;
use super::raft::{LogId, Membership, Request, Response, Vote};

/// What is waited for, derived from the member's configuration.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// An answer to a heartbeat.
    pub heartbeat: Duration,
    /// An answer to entries, which the peer has to write first.
    pub entries: Duration,
    /// An answer to a candidate, which the peer has to write first.
    pub vote: Duration,
    /// Who has heard the leader within this time supports no other.
    pub lease: Duration,
    /// The random part that is waited on top.
    pub random: (Duration, Duration),
    /// A leader without answers from a majority for so long falls silent.
    pub silence: Duration,
    pub ping_every: Duration,
    pub ping: Duration,
}

impl Timing {
    pub fn of(config: &Config) -> Self {
        let (short, long) = config.election_timeout;
        Self {
            heartbeat: short,
            entries: (long * 4).max(Duration::from_secs(3)),
            vote: long,
            lease: long,
            random: (short / 2, long),
            silence: short + long,
            ping_every: config.heartbeat * 2,
            ping: config.heartbeat * 3,
        }
    }

    fn draw(&self, env: &Env) -> Duration {
        let (low, high) = (self.random.0.as_micros() as u64, self.random.1.as_micros() as u64);
        Duration::from_micros(low + env.rng.below(high.saturating_sub(low)))
    }
}

#[derive(Default)]
struct Inner {
    /// When a message of the present leader last came.
    heard: Option<Instant>,
    /// As the leader of this vote and older ones, this member says nothing any more.
    given_up: Option<Vote>,
}

/// What one member remembers of leaders, and of its own time as one.
#[derive(Default)]
pub struct Guard {
    inner: Mutex<Inner>,
}

impl Guard {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A leader that is not known to be outdated has spoken.
    pub fn hear(&self) {
        self.lock().heard = Some(Instant::now());
    }

    fn hears_leader(&self, lease: Duration) -> bool {
        self.lock().heard.is_some_and(|at| at.elapsed() < lease)
    }

    /// Whether this member may still speak as the leader of that vote.
    pub fn may_lead(&self, vote: &Vote) -> bool {
        self.lock().given_up.is_none_or(|given_up| *vote > given_up)
    }

    fn silence(&self, vote: Vote) {
        let mut inner = self.lock();
        if inner.given_up.is_none_or(|older| vote > older) {
            inner.given_up = Some(vote);
        }
        // Others go first.
        inner.heard = Some(Instant::now());
    }
}

/// Whether the members in `for_it` are a majority of every configuration that counts.
pub fn is_quorum(membership: &Membership, for_it: &BTreeSet<u64>) -> bool {
    let configs = membership.membership().get_joint_config();
    !configs.is_empty() && configs.iter().all(|voters| voters.intersection(for_it).count() > voters.len() / 2)
}

impl Core {
    /// Whether this member would vote for one whose log ends at `last`.
    pub fn pre_vote(&self, from: u64, last: Option<LogId>) -> Response {
        let mine = self.raft.data_metrics().borrow().last_log;
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow();
        let leads = metrics.state == ServerState::Leader && self.guard.may_lead(&metrics.vote);
        let mut members = metrics.membership_config.nodes().map(|(id, _)| *id).peekable();
        // A member that is not known here may have been added by entries that are not here yet.
        let known = members.peek().is_none() || members.any(|id| id == from) || last > mine;
        let granted = known && !leads && last >= mine && !self.guard.hears_leader(self.timing.lease);
        Response::PreVote { granted, vote: metrics.vote }
    }

    /// Asks all other voters; the highest vote that was seen if a majority is for it.
    async fn ask_for_votes(self: &Arc<Self>, membership: &Membership) -> Option<Vote> {
        let last = self.raft.data_metrics().borrow().last_log;
        let mut highest = self.raft.server_metrics().borrow().vote;
        let mut for_it = BTreeSet::from([self.config.node]);
        let mut asked = JoinSet::new();
        for voter in membership.voter_ids().collect::<BTreeSet<u64>>() {
            if voter != self.config.node {
                let core = self.clone();
                asked.spawn(async move {
                    let limit = core.timing.vote;
                    (voter, core.link.ask(voter, &Request::PreVote { last }, limit).await)
                });
            }
        }
        while !is_quorum(membership, &for_it) {
            let Ok((voter, answer)) = asked.join_next().await? else { continue };
            if let Ok(Response::PreVote { granted, vote }) = answer {
                if vote > highest {
                    highest = vote;
                }
                if granted {
                    for_it.insert(voter);
                }
            }
        }
        Some(highest)
    }

    /// Promises to follow nothing older than a term, by voting for member 0.
    async fn promise(&self, term: u64) -> bool {
        let beyond = LogId::new(openraft::CommittedLeaderId::new(u64::MAX, u64::MAX), u64::MAX);
        let request = VoteRequest::new(Vote::new(term, 0), Some(beyond));
        // A consensus core that waits for its disk answers late; it leads nobody meanwhile.
        matches!(timeout(self.timing.silence, self.raft.vote(request)).await, Ok(Ok(answer)) if answer.vote_granted)
    }

    /// Falls silent as a leader at once, and ceases to be one.
    pub async fn give_up(&self, vote: Vote, reason: &str) -> bool {
        if self.guard.may_lead(&vote) {
            tracing::warn!(node = self.config.node, group = %self.config.group, reason, "gives up leading");
        }
        self.guard.silence(vote);
        self.promise(vote.leader_id.term + 1).await
    }

    /// When the slowest member of the quickest majority last answered.
    fn quorum_answered(&self, membership: &Membership, now: Instant) -> Option<Instant> {
        let answered = |node: u64| if node == self.config.node { Some(now) } else { self.link.reach.last_answer(node) };
        let configs = membership.membership().get_joint_config();
        let slowest = configs.iter().map(|voters| {
            let mut times: Vec<Option<Instant>> = voters.iter().map(|v| answered(*v)).collect();
            times.sort_unstable_by(|a, b| b.cmp(a));
            times.get(voters.len() / 2).copied().flatten()
        });
        slowest.min().flatten()
    }

    /// Gives up leading and lets `to`, or the best of the others, take over.
    pub async fn hand_over(self: &Arc<Self>, to: Option<u64>) -> bool {
        let metrics = self.raft.metrics().borrow().clone();
        if metrics.state != ServerState::Leader {
            return true;
        }
        let matched = metrics.replication.unwrap_or_default();
        let voters = metrics.membership_config.voter_ids().filter(|v| *v != self.config.node);
        let able = |v: &u64| self.link.reach.last_answer(*v).is_some_and(|at| at.elapsed() < self.timing.silence);
        let best = to.or_else(|| voters.filter(able).max_by_key(|v| (matched.get(v).copied().flatten(), *v)));
        let Some(best) = best else { return false };
        tracing::info!(node = self.config.node, group = %self.config.group, to = best, "hands over");
        self.guard.silence(metrics.vote);
        // Nobody votes for another until the lease on this leader is over, which is the library's, not ours. That goes
        // for this member's promise, too.
        sleep(self.config.election_timeout.0 + self.config.heartbeat / 3).await;
        if !self.give_up(metrics.vote, "another member is to lead").await {
            return false;
        }
        let mut leadership = self.leadership.clone();
        for _ in 0..3 {
            let asked = self.link.ask(best, &Request::TakeOver, self.timing.vote).await;
            let led = timeout(self.timing.vote, leadership.wait_for(|l| l.leader.is_some())).await;
            if led.is_ok() || !matches!(asked, Ok(Response::Done)) {
                break;
            }
        }
        true
    }
}

/// Runs until the store is shut down.
pub async fn run(core: Arc<Core>) {
    let timing = core.timing;
    let tick = core.config.heartbeat / 3;
    let mut wait = timing.draw(&core.env);
    // The first election needs no long silence: either there is a leader that speaks soon, or nobody grants it.
    let mut not_before = Instant::now() + wait / 2;
    let mut leader_since: Option<Instant> = None;
    let mut last_tick = Instant::now();
    loop {
        sleep(tick).await;
        let now = Instant::now();
        // A machine that stood still has heard nothing because it did not listen.
        let stood_still = now - last_tick > timing.silence / 2;
        last_tick = now;
        if core.stopped().is_some() {
            if !core.closed_on_purpose() {
                let _ = core.raft.shutdown().await;
            }
            return;
        }
        let (state, vote, membership) = {
            let metrics = core.raft.server_metrics();
            let metrics = metrics.borrow();
            (metrics.state, metrics.vote, (*metrics.membership_config).clone())
        };
        if state == ServerState::Leader {
            let since = if stood_still { now } else { leader_since.unwrap_or(now) };
            leader_since = Some(since);
            let answered = core.quorum_answered(&membership, now).max(Some(since)).unwrap_or(since);
            // A leader that waits for its own disk can't send heartbeats either, so the others replace it. If there are any.
            let alone = membership.voter_ids().eq([core.config.node]);
            let works = alone || timeout(timing.silence * 2, core.raft.with_raft_state(|_| ())).await.is_ok();
            if !core.guard.may_lead(&vote) || now - answered > timing.silence || !works {
                core.give_up(vote, if works { "no majority answers" } else { "its disk does not answer" }).await;
            }
            last_tick = Instant::now();
            continue;
        }
        leader_since = None;
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        if !voters.contains(&core.config.node) {
            continue;
        }
        if voters.len() == 1 {
            if state != ServerState::Candidate || now >= not_before {
                not_before = now + timing.vote;
                let _ = core.raft.trigger().elect().await;
            }
            continue;
        }
        let heard = core.guard.lock().heard;
        if now < not_before || heard.is_some_and(|heard| now < heard + timing.lease + wait) {
            continue;
        }
        wait = timing.draw(&core.env);
        if let Some(highest) = core.ask_for_votes(&membership).await {
            // With a term that someone has already voted in, the election would be lost before it began.
            if highest.leader_id.term > vote.leader_id.term {
                core.promise(highest.leader_id.term).await;
            }
            tracing::info!(node = core.config.node, group = %core.config.group, "stands for election");
            let _ = core.raft.trigger().elect().await;
        }
        not_before = Instant::now() + wait;
        last_tick = Instant::now();
    }
}
