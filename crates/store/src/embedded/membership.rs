//! Who belongs to the group: adding, promoting, demoting, replacing and removing members while it runs.
//!
//! A new member opens an empty folder with `join` and waits. The leader adds it as a *learner*, which gets the log (by
//! snapshot if it is long) and has no vote, so a slow one stops nobody. When it has caught up it is *promoted* to a voter. A
//! change of voters goes through joint consensus (Ongaro's thesis, §4.3): both the old and the new voters must agree, so
//! there is no instant at which two majorities exist.
//!
//! The rules of this file: one change at a time; every change may be asked for again and then does what is left of it; a
//! change that would leave too few *answering* voters for a majority is refused, because nobody could take it back. A
//! change that a dying leader left half done is finished by the next.
//!
//! A member that was removed while it was away can't know: nobody sends it entries any more. It learns it from the answers to its
//! pings. It believes a peer only if that one's membership is newer than its own, or is the leader's, so that a
//! learner that still reads old entries does not take itself for removed.
//!
//! The *feature level* is here too: what an entry may contain is what every member's release can read. The leader raises it,
//! by an entry, once all members have said that they support more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use openraft::error::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::{BasicNode, ChangeMembers, ServerState};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::core::Core;
use super::eager::Eager;
use super::raft::{Change, Command, Failure, Membership, Pong, Request, Response, Stranger};
use crate::error::StoreError;
use crate::types::{Member, MemberHealth};

/// The highest feature level of messages, entries and stored data that this release supports.
pub const FEATURE_LEVEL: u32 = 1;

/// What one step of a change may take.
const STEP: Duration = Duration::from_secs(10);
/// A learner that gets nowhere for so long is given up.
const STUCK: Duration = Duration::from_secs(30);
/// A learner is promoted when it is at most so many entries behind.
const NEAR: u64 = 1_000;
/// Groups up to this size ping each other all; in larger ones learners and followers don't.
const SMALL: usize = 16;
const PAUSE: Duration = Duration::from_millis(50);
const TEND: Duration = Duration::from_secs(1);

fn refused(reason: impl Into<String>) -> Failure {
    Failure::Refused(reason.into())
}

impl Core {
    /// The membership that counts now, committed or not.
    fn membership(&self) -> Membership {
        (*self.raft.server_metrics().borrow().membership_config).clone()
    }

    /// The members as the store's status shows them: those of the last change that is known to be committed. Whoever decides by
    /// them must not see a change that is lost with the leader that began it.
    pub fn members(&self) -> BTreeMap<u64, Member> {
        let committed = self.shared.read().counters.membership.clone();
        let membership = if committed.nodes().next().is_some() { committed } else { self.membership() };
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let known: BTreeMap<u64, String> = membership.nodes().map(|(id, node)| (*id, node.addr.clone())).collect();
        // Before the first entry there is only what the configuration says.
        let all = if known.is_empty() { self.config.members.clone() } else { known };
        all.into_iter().map(|(id, endpoint)| (id, Member { endpoint, voter: voters.contains(&id) })).collect()
    }

    /// Why nobody leads yet, if this member has not heard of the group's first entry: who begins it and what to do if
    /// that one is gone. A member whose folder was emptied can't tell; that is said too.
    pub fn unbegun(&self) -> Option<String> {
        if self.membership().nodes().next().is_some() {
            return None;
        }
        let Some((first, endpoint)) = self.config.members.first_key_value() else {
            return Some("this member waits to be added to the group: its leader has not called yet".into());
        };
        Some(format!(
            "the group was never begun, as far as this member knows: member {first} at {endpoint} begins it when it \
             starts, and has not been heard. Start that one. If it is gone for good and every other member says the \
             same, take it out of the founding members that each is configured with and start them again: then the \
             next one begins the group"
        ))
    }

    /// What is said when nobody leads.
    pub fn leaderless(&self) -> StoreError {
        let reason = self.unbegun().unwrap_or_else(|| "no leader was elected in time".into());
        StoreError::NoLeader { reason }
    }

    fn is_fresh(&self, node: u64) -> bool {
        let limit = self.timing.silence + self.timing.ping_every;
        node == self.config.node || self.link.reach.last_answer(node).is_some_and(|at| at.elapsed() < limit)
    }

    /// Refuses a set of voters of which too few answer. A leader that is new gives them time for a first answer.
    async fn check_quorum(&self, voters: &BTreeSet<u64>) -> Result<(), Failure> {
        let deadline = Instant::now() + self.timing.silence;
        let needed = voters.len() / 2 + 1;
        loop {
            let answering: Vec<u64> = voters.iter().copied().filter(|v| self.is_fresh(*v)).collect();
            if answering.len() >= needed {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(refused(format!(
                    "of the {} voters {voters:?} that the group would have, {needed} must answer and only {answering:?} \
                     do; bring the others back or replace them first",
                    voters.len()
                )));
            }
            sleep(PAUSE).await;
        }
    }

    /// Does one step as the leader. Doing it again changes nothing.
    pub async fn change_here(self: &Arc<Self>, change: Change) -> Result<(), Failure> {
        let deadline = Instant::now() + STEP;
        let busy = || Failure::Unavailable("another change of the membership is going on".into());
        let _one = timeout_at(deadline, self.changing.lock()).await.map_err(|_| busy())?;
        if !self.leadership.borrow().is_self {
            return Err(Failure::NotLeader);
        }
        let membership = self.settled(deadline).await?;
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let endpoint_of = |node: u64| membership.membership().get_node(&node).map(|n| n.addr.clone());
        match change {
            Change::AddLearner { node, endpoint } | Change::Move { node, endpoint } => {
                if node == 0 {
                    return Err(refused("members are numbered from 1"));
                }
                if endpoint_of(node).as_ref() == Some(&endpoint) {
                    return Ok(());
                }
                let taken = membership.nodes().find(|(id, n)| **id != node && n.addr == endpoint);
                if let Some((other, _)) = taken {
                    return Err(refused(format!("member {other} lives at {endpoint} already")));
                }
                // The envelope names the addressee, so that nobody else can answer for a member that moves.
                self.apply(ChangeMembers::SetNodes(BTreeMap::from([(node, BasicNode::new(endpoint))])), deadline).await
            }
            Change::Promote { node } if voters.contains(&node) => Ok(()),
            Change::Promote { node } => {
                self.check_caught_up(&membership, node)?;
                let mut after = voters;
                after.insert(node);
                self.check_quorum(&after).await?;
                self.apply(ChangeMembers::AddVoterIds(BTreeSet::from([node])), deadline).await
            }
            Change::Remove { node } if endpoint_of(node).is_none() => Ok(()),
            Change::Remove { node } if !voters.contains(&node) => {
                self.apply(ChangeMembers::RemoveNodes(BTreeSet::from([node])), deadline).await
            }
            Change::Remove { node } => self.take_vote(voters, node, false, deadline).await,
            Change::Demote { node } if !voters.contains(&node) => Ok(()),
            Change::Demote { node } => self.take_vote(voters, node, true, deadline).await,
            // Whoever takes a learner's place is one. The leader says what the old one is: others may not know yet.
            Change::Swap { old, new }
                if endpoint_of(old).is_some() && !voters.contains(&old) && !voters.contains(&new) =>
            {
                self.apply(ChangeMembers::RemoveNodes(BTreeSet::from([old])), deadline).await
            }
            Change::Swap { old, new } => {
                let mut after = voters.clone();
                after.insert(new);
                after.remove(&old);
                if after == voters && endpoint_of(old).is_none() {
                    return Ok(());
                }
                if !voters.contains(&new) {
                    self.check_caught_up(&membership, new)?;
                }
                self.check_quorum(&after).await?;
                self.yield_if_me(old).await?;
                if voters.contains(&old) || !voters.contains(&new) {
                    self.apply(ChangeMembers::ReplaceAllVoters(after), deadline).await
                } else {
                    self.apply(ChangeMembers::RemoveNodes(BTreeSet::from([old])), deadline).await
                }
            }
        }
    }

    /// The membership when the last change of it is committed. One that is not may be lost with this leader, so whoever asks for
    /// the same again must not be told that it is done.
    async fn settled(&self, deadline: Instant) -> Result<Membership, Failure> {
        loop {
            let membership = self.membership();
            if self.shared.read().counters.membership.log_id() == membership.log_id() {
                return Ok(membership);
            }
            if !self.leadership.borrow().is_self {
                return Err(Failure::NotLeader);
            }
            if Instant::now() >= deadline {
                return Err(Failure::Unavailable("the last change of the membership is not committed yet".into()));
            }
            sleep(PAUSE).await;
        }
    }

    fn check_caught_up(&self, membership: &Membership, node: u64) -> Result<(), Failure> {
        if membership.membership().get_node(&node).is_none() {
            return Err(refused(format!("{node} is no member; add it as a learner first")));
        }
        let (last, matched) = self.progress(node);
        match matched {
            Some(matched) if matched + NEAR >= last => Ok(()),
            _ => Err(refused(format!("member {node} has {} of {last} entries; wait until it has caught up", {
                matched.unwrap_or(0)
            }))),
        }
    }

    /// The last entry's index, and that of the last one that the member has.
    fn progress(&self, node: u64) -> (u64, Option<u64>) {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        let last = metrics.last_log_index.unwrap_or(0);
        if node == self.config.node {
            return (last, Some(last));
        }
        let matched = metrics.replication.as_ref().and_then(|r| r.get(&node).copied().flatten());
        (last, matched.map(|id| id.index))
    }

    /// A leader does not remove itself: it lets another lead, which then does.
    async fn yield_if_me(self: &Arc<Self>, node: u64) -> Result<(), Failure> {
        if node != self.config.node {
            return Ok(());
        }
        if self.hand_over(None).await {
            Err(Failure::NotLeader)
        } else {
            Err(Failure::Unavailable("no other member can lead now".into()))
        }
    }

    /// Takes a voter's vote; with `keep` it stays as a learner.
    async fn take_vote(
        self: &Arc<Self>,
        mut voters: BTreeSet<u64>,
        node: u64,
        keep: bool,
        deadline: Instant,
    ) -> Result<(), Failure> {
        voters.remove(&node);
        if voters.is_empty() {
            return Err(refused(format!("member {node} is the last voter")));
        }
        self.check_quorum(&voters).await?;
        self.yield_if_me(node).await?;
        self.change_voters(ChangeMembers::RemoveVoters(BTreeSet::from([node])), keep, deadline).await
    }

    async fn apply(&self, change: ChangeMembers<u64, BasicNode>, deadline: Instant) -> Result<(), Failure> {
        self.change_voters(change, false, deadline).await
    }

    /// `keep`: whoever loses its vote stays as a learner.
    async fn change_voters(
        &self,
        change: ChangeMembers<u64, BasicNode>,
        keep: bool,
        deadline: Instant,
    ) -> Result<(), Failure> {
        loop {
            let answer = timeout_at(deadline, self.raft.change_membership(change.clone(), keep)).await;
            match answer {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(RaftError::APIError(ClientWriteError::ForwardToLeader(_)))) => return Err(Failure::NotLeader),
                // A former leader's change is not committed yet.
                Ok(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(
                    ChangeMembershipError::InProgress(_),
                )))) if Instant::now() < deadline => sleep(PAUSE).await,
                Ok(Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(e)))) => {
                    return Err(refused(e.to_string()));
                }
                Ok(Err(RaftError::Fatal(e))) => return Err(Failure::Stopped(e.to_string())),
                Err(_) => return Err(Failure::Unknown("no quorum agreed to the change in time".into())),
            }
        }
    }

    /// How the members do, as their leader sees it.
    pub fn health_here(&self) -> Result<Vec<MemberHealth>, Failure> {
        if !self.leadership.borrow().is_self {
            return Err(Failure::NotLeader);
        }
        let members = self.members().into_iter().map(|(node, member)| {
            let (last, matched) = self.progress(node);
            let mine = node == self.config.node;
            MemberHealth {
                node,
                endpoint: member.endpoint,
                voter: member.voter,
                reachable: self.is_fresh(node),
                matched,
                lag_entries: last.saturating_sub(matched.unwrap_or(0)),
                clock_skew_ms: if mine { Some(0) } else { self.link.reach.clock_ms(node) },
                feature_level: if mine { self.config.feature_level } else { self.link.reach.feature(node) },
            }
        });
        Ok(members.collect())
    }

    pub fn pong(&self, from: u64) -> Pong {
        // Only what is committed counts; a removal that is not may be taken back.
        let committed = self.shared.read().counters.membership.clone();
        let begun = committed.nodes().next().is_some();
        let stranger = (begun && committed.membership().get_node(&from).is_none()).then(|| Stranger {
            since: *committed.log_id(),
            vote: self.raft.server_metrics().borrow().vote,
            leads: self.leadership.borrow().is_self && self.membership().membership().get_node(&from).is_none(),
        });
        Pong {
            at_ms: self.env.now_millis(),
            links: self.link.reach.links(),
            feature: self.config.feature_level,
            stranger,
        }
    }

    async fn ping(&self, node: u64) {
        let (sent, at_ms) = (Instant::now(), self.env.now_millis());
        let request = Request::Ping(self.link.reach.links());
        let Some(Response::Pong(pong)) = self.link.ping(node, &request, self.timing.ping).await else { return };
        let took = sent.elapsed();
        // The answer was written in the middle of the round trip, as far as anyone can tell.
        let middle = at_ms + took.as_millis() as i64 / 2;
        self.link.reach.note(node, pong.feature, took, pong.at_ms - middle);
        self.link.reach.learn(pong.links);
        if let Some(stranger) = pong.stranger {
            self.consider_removal(node, &stranger);
        }
    }

    fn consider_removal(&self, by: u64, stranger: &Stranger) {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow();
        let mine = &metrics.membership_config;
        let in_mine = mine.membership().get_node(&self.config.node).is_some();
        let committed = self.shared.read().counters.membership.membership().get_node(&self.config.node).is_some();
        if self.config.join && (mine.nodes().next().is_none() || (in_mine && !committed)) {
            // It waits to be added, perhaps again: the leader that began to add it may have been lost with what it began.
            return;
        }
        let newer = in_mine && stranger.since > *mine.log_id();
        let by_leader = stranger.leads && stranger.vote >= metrics.vote;
        if newer || by_leader {
            self.link.close(&format!(
                "removed: member {by} says that this member no longer belongs to group {}; to bring it back, remove its \
                 data folder and let it join",
                self.config.group
            ));
        }
    }

    /// Whom this member pings.
    fn neighbours(&self) -> Vec<u64> {
        let metrics = self.raft.server_metrics();
        let metrics = metrics.borrow();
        let membership = &metrics.membership_config;
        let voters: BTreeSet<u64> = membership.voter_ids().collect();
        let mut all: BTreeSet<u64> = membership.nodes().map(|(id, _)| *id).collect();
        if all.is_empty() {
            // One that has not got its first entry yet may be the link between others.
            all.extend(self.config.members.keys());
        }
        let wide = all.len() <= SMALL || metrics.state == ServerState::Leader;
        let chosen = if wide { all } else { voters };
        chosen.into_iter().filter(|id| *id != self.config.node).collect()
    }
}

/// Pings the other members until the store is shut down.
pub async fn watch_links(core: Arc<Core>) {
    let mut pings = JoinSet::new();
    loop {
        let round = Instant::now();
        if core.stopped().is_none() {
            for node in core.neighbours() {
                let core = core.clone();
                pings.spawn(async move { core.ping(node).await });
            }
        }
        // Each has its own deadline, so a round ends.
        while pings.join_next().await.is_some() {}
        sleep((round + core.timing.ping_every).saturating_duration_since(Instant::now()).max(PAUSE)).await;
    }
}

/// Lets everyone who needs to know the members follow the membership.
pub async fn follow(core: Arc<Core>, eager: Arc<Eager>) {
    let mut metrics = core.raft.server_metrics();
    loop {
        let membership = (*metrics.borrow_and_update().membership_config).clone();
        let nodes: BTreeMap<u64, String> = membership.nodes().map(|(id, n)| (*id, n.addr.clone())).collect();
        if !nodes.is_empty() {
            core.link.reach.retain(&nodes.keys().copied().collect());
            let voters: BTreeSet<u64> = membership.voter_ids().collect();
            eager.set_peers(voters.into_iter().filter(|id| *id != core.config.node).collect());
            core.link.roster.learn(nodes);
        }
        let same = |m: &openraft::metrics::RaftServerMetrics<u64, BasicNode>| *m.membership_config == membership;
        loop {
            if metrics.changed().await.is_err() {
                return;
            }
            if !same(&metrics.borrow()) {
                break;
            }
        }
    }
}

/// What a leader does beside leading: finishes changes that another left half done, raises the feature level, and has its
/// members' places right. Runs until the store is shut down.
pub async fn tend(core: Arc<Core>) {
    loop {
        sleep(TEND).await;
        let membership = core.membership();
        let leads = core.leadership.borrow().is_self;
        if leads
            && membership.membership().get_joint_config().len() > 1
            && let Ok(_one) = core.changing.try_lock()
            && core.membership().membership().get_joint_config().len() > 1
        {
            // Nobody knows any more whether those without a vote were to stay. Whoever wants them gone asks again.
            let finish = ChangeMembers::AddVoterIds(BTreeSet::new());
            if let Err(e) = core.change_voters(finish, true, Instant::now() + STEP).await {
                tracing::warn!(failure = ?e, "a half-done change of the membership is not finished yet");
            }
        }
        if leads {
            let members = membership.nodes().map(|(id, _)| *id).filter(|id| *id != core.config.node);
            let all = members.map(|id| core.link.reach.feature(id)).fold(core.config.feature_level, u32::min);
            if all > core.shared.read().feature_level() {
                let done = core.submit(Command::Raise { level: all }, core.config.request_timeout, true).await;
                tracing::info!(level = all, ok = done.is_ok(), "raises the feature level");
            }
        }
        let configured = core.config.members.get(&core.config.node);
        let place = membership.membership().get_node(&core.config.node).map(|n| &n.addr);
        if let (Some(configured), Some(place)) = (configured, place)
            && configured != place
        {
            let moved = Change::Move { node: core.config.node, endpoint: configured.clone() };
            if let Err(e) = change(&core, moved, STEP).await {
                tracing::warn!(error = %e, "the leader could not be told where this member lives now");
            }
        }
    }
}

fn failure(core: &Core, failure: Failure) -> StoreError {
    match failure {
        Failure::NotLeader => core.leaderless(),
        Failure::Refused(reason) => StoreError::Membership(reason),
        Failure::Unknown(reason) => StoreError::Unknown { reason },
        Failure::Stopped(reason) => StoreError::Storage(reason),
        Failure::Unavailable(reason) | Failure::Astray(reason) | Failure::Full(reason) => {
            StoreError::Unavailable { reason }
        }
        Failure::Fenced(current) => StoreError::Storage(format!("the group is at generation {current} already")),
    }
}

/// Asks the leader, whoever it is, until it answers.
async fn lead(core: &Arc<Core>, limit: Duration, request: Request) -> Result<Response, StoreError> {
    let deadline = Instant::now() + limit;
    let mut trouble = Failure::NotLeader;
    loop {
        if let Some(reason) = core.stopped() {
            return Err(StoreError::Storage(reason));
        }
        let now = *core.leadership.borrow();
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failure(core, trouble));
        }
        let answer = match (now.leader, &request) {
            (_, Request::Change(change)) if now.is_self => {
                match timeout(left, core.change_here(change.clone())).await {
                    Ok(done) => done.map_or_else(Response::Failed, |()| Response::Done),
                    Err(_) => Response::Failed(Failure::Unknown("it took too long and may yet be done".into())),
                }
            }
            _ if now.is_self => core.health_here().map_or_else(Response::Failed, Response::Health),
            (Some(leader), _) if leader != core.config.node => match core.link.ask(leader, &request, left).await {
                Ok(response) => response,
                Err(e) => Response::Failed(Failure::Unavailable(e.to_string())),
            },
            _ => Response::Failed(Failure::NotLeader),
        };
        match answer {
            Response::Failed(e @ (Failure::Refused(_) | Failure::Fenced(_))) => return Err(failure(core, e)),
            Response::Failed(e) => trouble = e,
            response => return Ok(response),
        }
        sleep(PAUSE).await;
    }
}

pub async fn change(core: &Arc<Core>, change: Change, limit: Duration) -> Result<(), StoreError> {
    lead(core, limit, Request::Change(change)).await.map(drop)
}

pub async fn health(core: &Arc<Core>) -> Result<Vec<MemberHealth>, StoreError> {
    match lead(core, core.config.request_timeout, Request::Health).await? {
        Response::Health(members) => Ok(members),
        _ => Err(StoreError::Unavailable { reason: "the leader answered something else".into() }),
    }
}

/// Waits until the member has nearly all entries.
async fn catch_up(core: &Arc<Core>, node: u64) -> Result<(), StoreError> {
    let mut best = None;
    let mut since = Instant::now();
    loop {
        let found = health(core).await?.into_iter().find(|m| m.node == node);
        let Some(member) = found else {
            return Err(StoreError::Membership(format!("member {node} was removed while it was being added")));
        };
        if member.matched.is_some() && member.lag_entries <= NEAR {
            return Ok(());
        }
        if member.matched > best {
            (best, since) = (member.matched, Instant::now());
        }
        // A snapshot arrives without a sign until it is there; a member that answers pings is given more time.
        let patience = if member.reachable { STUCK * 10 } else { STUCK };
        if since.elapsed() > patience {
            let have = member.matched.unwrap_or(0);
            return Err(StoreError::Unavailable {
                reason: format!(
                    "member {node} at {} is added but has only {have} entries and is {} behind; it goes on by itself, \
                     ask again once it runs and can be reached",
                    member.endpoint, member.lag_entries
                ),
            });
        }
        sleep(PAUSE * 2).await;
    }
}

impl super::EmbeddedStore {
    /// Adds a member without a vote, which opens an empty folder with [`join`](super::Config::join). Returns when it has
    /// caught up, or says how far it is. Any member may be asked, again too.
    pub async fn add_learner(&self, node: u64, endpoint: String) -> Result<(), StoreError> {
        change(&self.core, Change::AddLearner { node, endpoint }, STEP * 2).await?;
        catch_up(&self.core, node).await
    }

    /// Gives a learner that has caught up a vote.
    pub async fn promote(&self, node: u64) -> Result<(), StoreError> {
        change(&self.core, Change::Promote { node }, STEP * 2).await
    }

    /// Takes a voter's vote; it reads along from then on. A leader makes room first.
    pub async fn demote(&self, node: u64) -> Result<(), StoreError> {
        change(&self.core, Change::Demote { node }, STEP * 2).await
    }

    /// Removes a member. Refused if too few of the remaining voters answer. A leader that is removed makes room first.
    pub async fn remove(&self, node: u64) -> Result<(), StoreError> {
        change(&self.core, Change::Remove { node }, STEP * 2).await
    }

    /// Puts `new`, which opens an empty folder with [`join`](super::Config::join), in the place of `old`, dead or alive.
    pub async fn replace(&self, old: u64, new: u64, endpoint: String) -> Result<(), StoreError> {
        let members = self.core.members();
        let done = members.get(&new).is_some_and(|m| m.voter && m.endpoint == endpoint) && !members.contains_key(&old);
        if done {
            return Ok(());
        }
        if old == new {
            return Err(StoreError::Membership("a member can't replace itself: the new one needs a new number".into()));
        }
        self.add_learner(new, endpoint).await?;
        change(&self.core, Change::Swap { old, new }, STEP * 2).await
    }

    /// How the members do, as the leader sees it.
    pub async fn members_health(&self) -> Result<Vec<MemberHealth>, StoreError> {
        health(&self.core).await
    }

    /// Lets another member lead, if this one does: before it is shut down, so that nobody has to wait for a timeout.
    pub async fn hand_over(&self) -> bool {
        self.core.hand_over(None).await
    }

    /// Why nobody leads, if the group was never begun as far as this member knows, with what to do.
    pub fn unbegun(&self) -> Option<String> {
        self.core.unbegun()
    }

    /// Which generation of the group this member belongs to.
    pub fn generation(&self) -> u64 {
        self.core.link.generation.load(Ordering::SeqCst)
    }
}
