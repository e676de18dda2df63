//! A regional writer's link to the group that all regions share: follows this server's own copy of it, and tells its leader
//! what the region has. Both live as long as the writer leads.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use nexus_model::key;
use nexus_model::kind::{RegionServer, Tier};
use nexus_model::plan::{RegionSummary, ServerNote};
use nexus_store::{Store, StoreError};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::core::{Core, Moment};
use crate::fleet::{Adopt, Presence};
use crate::region::{Fleet, Upward};
use crate::view::{FLEET, load};

/// News that waits for the writer; the follower waits when it is full.
const NEWS: usize = 64;
/// News taken in at once, so that what users ask is not kept waiting.
const AT_ONCE: usize = 64;
/// A region says at least so often what it has.
const EVERY: Duration = Duration::from_secs(1);
/// How long the global leader may take to answer.
const DEADLINE: Duration = Duration::from_secs(2);
/// Between tries.
const RETRY: Duration = Duration::from_millis(250);
/// What a server that went silent said of its gateways is forgotten after …
const GATEWAYS_FOR: Duration = Duration::from_secs(5);
/// … and what it said of itself, unless it is in the configuration, after this.
const SERVER_FOR: Duration = Duration::from_secs(60);

/// The global leader had committed `revision` when it answered what was sent at `sent`.
#[derive(Debug, Clone, Copy, Default)]
struct Ack {
    revision: u64,
    sent: Duration,
}

pub(crate) struct Link {
    tier: Tier,
    epoch: u64,
    servers: Vec<RegionServer>,
    notes: BTreeMap<u64, (ServerNote, Duration)>,
    feed: mpsc::Receiver<Adopt>,
    outbox: watch::Sender<Option<(RegionSummary, Duration)>>,
    acks: watch::Receiver<Ack>,
    last: Option<(RegionSummary, Duration)>,
    /// When the copy was last known to be complete.
    fresh: Duration,
    /// Ends both with the link.
    _tasks: JoinSet<()>,
}

impl Link {
    pub fn new(fleet: &Fleet, epoch: u64, now: Duration) -> Self {
        let (news, feed) = mpsc::channel(NEWS);
        let (outbox, inbox) = watch::channel(None);
        let (acked, acks) = watch::channel(Ack::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(follow(fleet.store.clone(), news));
        tasks.spawn(send(fleet.upward.clone(), inbox, acked));
        Self {
            tier: fleet.tier,
            epoch,
            servers: fleet.servers.clone(),
            notes: BTreeMap::new(),
            feed,
            outbox,
            acks,
            last: None,
            fresh: now,
            _tasks: tasks,
        }
    }

    /// Waits for news of the global group.
    pub async fn news(&mut self) -> Adopt {
        match self.feed.recv().await {
            Some(news) => news,
            // The store is closed: the writer is about to be told.
            None => std::future::pending().await,
        }
    }

    /// Takes in the news that are there already.
    pub fn take_in_what_waits(&mut self, core: &mut Core, at: Moment<'_>) {
        for _ in 0..AT_ONCE {
            let Ok(news) = self.feed.try_recv() else { return };
            core.adopt(news, at);
        }
    }

    pub fn note(&mut self, note: ServerNote, now: Duration) {
        self.notes.insert(note.server.node, (note, now));
    }

    fn presence(&mut self, core: &Core, now: Duration) -> Presence {
        self.notes.retain(|_, (_, at)| now.saturating_sub(*at) < SERVER_FOR);
        let mut servers: BTreeMap<u64, RegionServer> = self.servers.iter().map(|s| (s.node, s.clone())).collect();
        servers.extend(self.notes.iter().map(|(node, (note, _))| (*node, note.server.clone())));
        let fresh = self.notes.values().filter(|(_, at)| now.saturating_sub(*at) < GATEWAYS_FOR);
        let mut gateways: Vec<SocketAddr> = fresh.flat_map(|(note, _)| note.gateways.iter().copied()).collect();
        gateways.sort();
        gateways.dedup();
        let ack = *self.acks.borrow();
        if ack.revision > 0 && core.world.global_revision >= ack.revision {
            self.fresh = self.fresh.max(ack.sent);
        }
        let stale_ms = u64::try_from(now.saturating_sub(self.fresh).as_millis()).unwrap_or(u64::MAX);
        Presence { tier: self.tier, epoch: self.epoch, servers: servers.into_values().collect(), gateways, stale_ms }
    }

    /// Sends what the region has, if that has changed or is due. Answers how old the copy is, in milliseconds.
    pub fn report(&mut self, core: &Core, now: Duration) -> u64 {
        let presence = self.presence(core, now);
        let stale_ms = presence.stale_ms;
        let summary = core.summary(&presence);
        let due = self.last.as_ref().is_none_or(|(last, at)| {
            let same = RegionSummary { stale_ms: last.stale_ms, ..summary.clone() } == *last;
            !same || now.saturating_sub(*at) >= EVERY
        });
        if due {
            self.last = Some((summary.clone(), now));
            self.outbox.send_replace(Some((summary, now)));
        }
        stale_ms
    }
}

/// Sends the newest summary, one at a time.
async fn send(
    upward: Arc<dyn Upward>,
    mut inbox: watch::Receiver<Option<(RegionSummary, Duration)>>,
    acked: watch::Sender<Ack>,
) {
    while inbox.changed().await.is_ok() {
        let Some((summary, sent)) = inbox.borrow_and_update().clone() else { continue };
        match upward.summarize(&summary, DEADLINE).await {
            Ok(revision) => drop(acked.send_replace(Ack { revision, sent })),
            Err(error) => {
                tracing::debug!(%error, "the global group can't be told what this region has; trying again");
                tokio::time::sleep(RETRY).await;
                // Whatever is newest by then is sent, even if it is the same.
                inbox.mark_changed();
            }
        }
    }
}

/// Follows the copy of the global group until the writer no longer listens.
async fn follow(store: Arc<dyn Store>, news: mpsc::Sender<Adopt>) {
    loop {
        match follow_once(&*store, &news).await {
            Ok(()) => tracing::debug!("the writer's copy of the global group fell behind and is listed again"),
            Err(StoreError::Closed) => return,
            Err(error) => tracing::warn!(%error, "the global group can't be followed; trying again"),
        }
        if news.is_closed() {
            return;
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn follow_once(store: &dyn Store, news: &mpsc::Sender<Adopt>) -> Result<(), StoreError> {
    let (world, revision) = load(store, None, FLEET, true).await?;
    // Wide enough for the writer's own key, which every revision touches: so every revision is heard of.
    let mut watch = store.watch("i/".into(), key::prefix_end("t/").into(), revision).await?;
    if news.send(Adopt::World(Box::new(world), revision.0)).await.is_err() {
        return Ok(());
    }
    while let Some(Ok(batch)) = watch.next().await {
        let mine = |event: &nexus_store::WatchEvent| FLEET.iter().any(|p| event.key().starts_with(p.as_bytes()));
        let events = batch.events.into_iter().filter(mine).collect();
        if news.send(Adopt::Events(events, batch.revision.0)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}
