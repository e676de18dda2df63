//! Who can reach whom, and by which way.
//!
//! Every member pings the others directly, all the time. A ping and its answer carry what each side knows of *all* links
//! (link states, as in OSPF: per member a list of whom it reaches, numbered by that member). So each member has a map, and
//! when its own link to another is down it finds the shortest chain of members that connects them. A message is sent with
//! its whole route (see [`super::peers`]), which can't loop and passes through at most [`MAX_HOPS`] members.
//!
//! A link counts only if calls over it are answered, so a cable that is cut in one direction is no link at all. With that,
//! whoever is connected by any chain is connected for the consensus library: stars and chains are full meshes to it, and
//! the elections in which plain Raft gets stuck there (OmniPaxos, EuroSys 2023, section 2) don't arise.
//!
//! A direct link is down once a ping (or another cheap call) failed that was sent after the last one that was answered.
//! Pings go on, so it is up again by itself.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use super::peers::MAX_HOPS;

/// Link states that are kept at most; a group has far fewer members that relay.
const MANY: usize = 256;
/// How long a link that did not pass a message on is avoided.
const AVOID: Duration = Duration::from_secs(1);
const SAMPLES: usize = 8;

/// Whom one member reaches directly, as it says itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkState {
    pub node: u64,
    pub number: u64,
    pub reaches: Vec<u64>,
}

/// By which way a message goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    Direct,
    /// Through these, in order.
    Via(Vec<u64>),
    /// No way is known; the direct one may be tried.
    None,
}

#[derive(Debug, Default)]
struct Peer {
    /// When the last direct call was sent that was answered.
    heard: Option<Instant>,
    /// When the last direct call was sent that was not.
    failed: Option<Instant>,
    /// When the last call of any way was sent that was answered.
    answered: Option<Instant>,
    /// The feature level of its release; 0 until it has said it.
    feature: u32,
    /// Round trips with the clock's difference in milliseconds.
    clocks: VecDeque<(Duration, i64)>,
}

impl Peer {
    fn is_down(&self) -> bool {
        self.failed.is_some_and(|failed| self.heard.is_none_or(|heard| heard < failed))
    }
}

#[derive(Default)]
struct Inner {
    peers: BTreeMap<u64, Peer>,
    links: BTreeMap<u64, LinkState>,
    /// Links that did not pass on a message, and until when they are avoided.
    avoided: BTreeMap<(u64, u64), Instant>,
    number: u64,
}

/// One member's map.
pub struct Reach {
    node: u64,
    inner: Mutex<Inner>,
    /// Counts changes between up and down, and failures of links that are down.
    changes: watch::Sender<u64>,
}

impl Reach {
    /// `number` is higher than at an earlier start, if the clock is right; if not, the others' answers set it right.
    pub fn new(node: u64, number: u64) -> Self {
        let inner = Inner { number, ..Inner::default() };
        Self { node, inner: Mutex::new(inner), changes: watch::Sender::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, node: u64, change: impl FnOnce(&mut Peer)) {
        if node == self.node {
            return;
        }
        let news = {
            let mut inner = self.lock();
            let peer = inner.peers.entry(node).or_default();
            let (before, known, failed) = (peer.is_down(), peer.heard.is_some(), peer.failed);
            change(peer);
            let changed = peer.is_down() != before || peer.heard.is_some() != known;
            // Calls that began after the failure before this one have been waiting to hear of it.
            let again = peer.is_down() && peer.failed != failed;
            if changed {
                inner.number += 1;
            }
            changed || again
        };
        if news {
            self.changes.send_modify(|n| *n += 1);
        }
    }

    /// A direct call that was sent at `sent` was answered.
    pub fn heard(&self, node: u64, sent: Instant) {
        self.update(node, |peer| peer.heard = peer.heard.max(Some(sent)));
    }

    /// A direct call that was sent at `sent` was not.
    pub fn failed(&self, node: u64, sent: Instant) {
        self.update(node, |peer| peer.failed = peer.failed.max(Some(sent)));
    }

    /// A call of any way was answered by a member that works.
    pub fn answered(&self, node: u64, sent: Instant) {
        self.update(node, |peer| peer.answered = peer.answered.max(Some(sent)));
    }

    pub fn last_answer(&self, node: u64) -> Option<Instant> {
        self.lock().peers.get(&node).and_then(|peer| peer.answered)
    }

    pub fn is_down(&self, node: u64) -> bool {
        self.lock().peers.get(&node).is_some_and(Peer::is_down)
    }

    /// Ends when the direct link has failed for a call that was sent at `sent` or later.
    pub async fn fails_after(&self, node: u64, sent: Instant) {
        let mut changes = self.changes.subscribe();
        loop {
            changes.borrow_and_update();
            {
                let inner = self.lock();
                if inner.peers.get(&node).is_some_and(|p| p.is_down() && p.failed >= Some(sent)) {
                    return;
                }
            }
            // The sender lives as long as this map.
            if changes.changed().await.is_err() {
                return;
            }
        }
    }

    pub fn avoid(&self, from: u64, to: u64) {
        let mut inner = self.lock();
        let now = Instant::now();
        inner.avoided.retain(|_, until| *until > now);
        inner.avoided.insert((from, to), now + AVOID);
    }

    /// What a peer said of itself in answer to a ping.
    pub fn note(&self, node: u64, feature: u32, round_trip: Duration, clock_ms: i64) {
        self.update(node, |peer| {
            peer.feature = feature;
            peer.clocks.push_back((round_trip, clock_ms));
            while peer.clocks.len() > SAMPLES {
                peer.clocks.pop_front();
            }
        });
    }

    pub fn feature(&self, node: u64) -> u32 {
        self.lock().peers.get(&node).map_or(0, |peer| peer.feature)
    }

    /// How far the peer's wall clock is ahead, by the quickest of the last round trips.
    pub fn clock_ms(&self, node: u64) -> Option<i64> {
        let inner = self.lock();
        inner.peers.get(&node)?.clocks.iter().min_by_key(|(took, _)| *took).map(|(_, ms)| *ms)
    }

    /// All link states that this member knows, its own first brought up to date.
    pub fn links(&self) -> Vec<LinkState> {
        let mut inner = self.lock();
        let reaches: Vec<u64> =
            inner.peers.iter().filter(|(_, p)| p.heard.is_some() && !p.is_down()).map(|(id, _)| *id).collect();
        let mine = LinkState { node: self.node, number: inner.number, reaches };
        inner.links.insert(self.node, mine);
        inner.links.values().cloned().collect()
    }

    /// Takes over what another member knows, where it is newer.
    pub fn learn(&self, links: Vec<LinkState>) {
        let mut inner = self.lock();
        for link in links {
            if link.node == self.node {
                // From before this member's last start.
                if link.number >= inner.number && inner.links.get(&self.node) != Some(&link) {
                    inner.number = link.number + 1;
                }
            } else if inner.links.get(&link.node).is_none_or(|known| known.number < link.number)
                && (inner.links.len() < MANY || inner.links.contains_key(&link.node))
            {
                inner.links.insert(link.node, link);
            }
        }
    }

    /// Forgets everyone who is no member any more.
    pub fn retain(&self, members: &BTreeSet<u64>) {
        let mut inner = self.lock();
        inner.peers.retain(|id, _| members.contains(id));
        inner.links.retain(|id, _| members.contains(id));
        inner.number += 1;
    }

    pub fn route(&self, to: u64) -> Route {
        let inner = self.lock();
        let now = Instant::now();
        if !inner.peers.get(&to).is_some_and(Peer::is_down) {
            return Route::Direct;
        }
        let open = |from: u64, next: u64| inner.avoided.get(&(from, next)).is_none_or(|until| *until <= now);
        // Breadth first, in the order of the ids.
        let mut before: BTreeMap<u64, u64> = BTreeMap::new();
        let first = inner.peers.iter().filter(|(_, p)| p.heard.is_some() && !p.is_down()).map(|(id, _)| *id);
        let mut ring: Vec<u64> = first.filter(|id| open(self.node, *id)).collect();
        before.extend(ring.iter().map(|id| (*id, self.node)));
        for _ in 0..MAX_HOPS {
            let mut next_ring = Vec::new();
            for at in ring {
                let Some(link) = inner.links.get(&at) else { continue };
                for &next in &link.reaches {
                    if next == self.node || before.contains_key(&next) || !open(at, next) {
                        continue;
                    }
                    before.insert(next, at);
                    next_ring.push(next);
                }
            }
            if before.contains_key(&to) {
                let mut hops = Vec::new();
                let mut at = before[&to];
                while at != self.node {
                    hops.push(at);
                    at = before[&at];
                }
                hops.reverse();
                return Route::Via(hops);
            }
            ring = next_ring;
        }
        Route::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(node: u64, up: &[u64], down: &[u64], links: &[(u64, &[u64])]) -> Reach {
        let reach = Reach::new(node, 1);
        let now = Instant::now();
        up.iter().for_each(|id| reach.heard(*id, now));
        down.iter().for_each(|id| reach.failed(*id, now));
        let state = |(node, reaches): &(u64, &[u64])| LinkState { node: *node, number: 1, reaches: reaches.to_vec() };
        reach.learn(links.iter().map(state).collect());
        reach
    }

    #[tokio::test]
    async fn a_member_whose_link_is_down_is_reached_through_others() {
        let chain = map(1, &[2], &[3, 4, 5], &[(2, &[1, 3]), (3, &[2, 4]), (4, &[3, 5])]);
        assert_eq!(chain.route(2), Route::Direct);
        assert_eq!(chain.route(3), Route::Via(vec![2]));
        assert_eq!(chain.route(5), Route::Via(vec![2, 3, 4]));
        assert_eq!(chain.route(9), Route::Direct, "nothing bad is known of it");
        let long = map(1, &[2], &[6], &[(2, &[3]), (3, &[4]), (4, &[5]), (5, &[6])]);
        assert_eq!(long.route(6), Route::None, "too many hops");
    }

    #[tokio::test]
    async fn a_link_that_did_not_pass_a_message_on_is_avoided() {
        let reach = map(1, &[2, 3], &[4], &[(2, &[4]), (3, &[4])]);
        assert_eq!(reach.route(4), Route::Via(vec![2]));
        reach.avoid(2, 4);
        assert_eq!(reach.route(4), Route::Via(vec![3]));
        reach.avoid(1, 3);
        assert_eq!(reach.route(4), Route::None);
    }

    #[tokio::test]
    async fn a_restarted_member_takes_its_number_from_what_others_remember() {
        let reach = map(1, &[2], &[], &[]);
        reach.learn(vec![LinkState { node: 1, number: 500, reaches: vec![3] }]);
        let mine = reach.links().into_iter().find(|l| l.node == 1).unwrap();
        assert_eq!((mine.number, mine.reaches), (501, vec![2]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_began_while_its_link_failed_hears_of_the_next_failure() {
        let reach = map(1, &[2], &[], &[]);
        let ping = Instant::now() + Duration::from_secs(1);
        let call = ping + Duration::from_millis(1);
        let mut fails = std::pin::pin!(reach.fails_after(2, call));
        let mut hears = async |patience| tokio::time::timeout(Duration::from_secs(patience), &mut fails).await.is_ok();
        reach.failed(2, ping);
        assert!(!hears(1).await, "what failed was sent before the call");
        let number = reach.links()[0].number;
        reach.failed(2, call + Duration::from_secs(1));
        assert!(hears(60).await);
        assert_eq!(reach.links()[0].number, number, "whom this member reaches is as before");
    }

    #[tokio::test]
    async fn the_newest_of_success_and_failure_counts() {
        let reach = map(1, &[2], &[], &[]);
        let later = Instant::now() + Duration::from_secs(1);
        reach.failed(2, later);
        assert!(reach.is_down(2));
        reach.heard(2, later + Duration::from_secs(1));
        assert!(!reach.is_down(2));
        reach.failed(2, later);
        assert!(!reach.is_down(2), "a failure that was known late");
    }
}
