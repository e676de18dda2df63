//! Sends a leader's new entries to its followers while the leader itself still writes them.
//!
//! The consensus library waits for its own disk before it replicates, so a change would cost two syncs in a row. Raft
//! allows both at once (Ongaro's thesis, §10.2.1): the leader counts itself only when its write is durable. What is sent
//! here is an ordinary AppendEntries request with the leader's vote; a follower treats it like any other. When the
//! library then sends the same entries, [`Eager::answer`] hands it the follower's answer instead of sending them again.
//! If anything went wrong here, the library's own request goes out as if this file did not exist.
//!
//! Why the answer may be reused: success means that the follower's log agrees with this leader's up to `last`, durably,
//! so it agrees on every earlier entry too. Answers may be late in Raft, so a kept answer is as good as a slow one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::guard::Guard;
use super::network::PeerLink;
use super::raft::{Entry, LogId, Request, Response, TypeConfig, Vote};

/// A follower that takes longer is served by the library's own retries.
const DEADLINE: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Sent,
    Accepted,
    Failed,
}

struct Sent {
    vote: Vote,
    prev: Option<LogId>,
    last: LogId,
    state: watch::Receiver<State>,
}

pub struct Eager {
    link: PeerLink,
    guard: Arc<Guard>,
    /// The other voters: nobody waits for a learner.
    peers: Mutex<Vec<u64>>,
    slots: Mutex<BTreeMap<u64, Sent>>,
    tasks: Mutex<JoinSet<()>>,
}

impl Eager {
    pub fn new(link: PeerLink, guard: Arc<Guard>) -> Self {
        Self { link, guard, peers: Mutex::default(), slots: Mutex::default(), tasks: Mutex::new(JoinSet::new()) }
    }

    /// Follows the membership.
    pub fn set_peers(&self, voters: Vec<u64>) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).retain(|peer, _| voters.contains(peer));
        *self.peers.lock().unwrap_or_else(PoisonError::into_inner) = voters;
    }

    /// The library has brought a follower up to `last`; from there on entries may be sent ahead again.
    pub fn caught_up(&self, peer: u64, vote: Vote, last: LogId) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let behind = slots.get(&peer).is_some_and(|sent| *sent.state.borrow() == State::Failed);
        if behind {
            let (_, state) = watch::channel(State::Accepted);
            slots.insert(peer, Sent { vote, prev: Some(last), last, state });
        }
    }

    /// Sends entries to every follower that has answered the one before.
    pub fn send(&self, vote: Vote, prev: Option<LogId>, entries: Vec<Entry>, committed: Option<LogId>) {
        let Some(last) = entries.last().map(|e| e.log_id) else { return };
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if peers.is_empty() || !self.guard.may_lead(&vote) {
            return;
        }
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        let mut encoded = None;
        for peer in peers {
            // Messages on the way could overtake each other; one at a time keeps the follower's log in step. A peer
            // whose last message failed is left to the library, which knows where to resume, until it has caught up.
            let ready = slots.get(&peer).is_none_or(|sent| match *sent.state.borrow() {
                State::Sent => false,
                State::Accepted => sent.vote != vote || Some(sent.last) <= prev,
                State::Failed => sent.vote != vote,
            });
            if !ready {
                continue;
            }
            let message = encoded
                .get_or_insert_with(|| {
                    self.link.message(&Request::Append(AppendEntriesRequest {
                        vote,
                        prev_log_id: prev,
                        entries: entries.clone(),
                        leader_commit: committed,
                    }))
                })
                .clone();
            let (tx, state) = watch::channel(State::Sent);
            slots.insert(peer, Sent { vote, prev, last, state });
            let link = self.link.clone();
            tasks.spawn(async move {
                let answer = link.send(peer, message, true, DEADLINE).await;
                let accepted = matches!(answer, Ok(Response::Append(AppendEntriesResponse::Success)));
                tx.send_replace(if accepted { State::Accepted } else { State::Failed });
            });
        }
    }

    /// Waits for the answer to the same entries; `true` means that the follower has them all.
    pub async fn answer(&self, peer: u64, request: &AppendEntriesRequest<TypeConfig>) -> bool {
        let Some(wanted) = request.entries.last().map(|e| e.log_id) else { return false };
        let mut state = {
            let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(sent) = slots.get(&peer) else { return false };
            // The request may span more entries than were sent here, but must not reach beyond them.
            if sent.vote != request.vote || wanted > sent.last || request.prev_log_id < sent.prev {
                return false;
            }
            sent.state.clone()
        };
        state.wait_for(|s| *s != State::Sent).await.is_ok_and(|s| *s == State::Accepted)
    }

    pub fn stop(&self) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }
}

/// Shared by the log, which sends, and the network, which asks for answers.
pub type SharedEager = Arc<Eager>;
