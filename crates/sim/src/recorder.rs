//! Watchers at every server, which write down the one history of the store and check how it is told: each revision once, in
//! order, none left out, and the same from everyone.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use nexus_store::{Revision, Store, StoreError, WatchBatch, WatchError, WatchEvent, prefix_end};
use tokio::time::{sleep, timeout};

use crate::chance::Dice;
use crate::site::Group;
use crate::world::World;

/// What each revision changed.
pub type Log = BTreeMap<u64, Told>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub timestamp_ms: i64,
    pub events: Vec<WatchEvent>,
}

/// The rows of instances that are deleted and not yet gone.
const ENDING: &str = "t/instances/";

/// The record of one group. Clones share it.
#[derive(Clone)]
pub struct Recorder {
    pub group: Group,
    /// The group's servers.
    pub nodes: Vec<u64>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    log: Log,
    /// What narrow watches were told: from where to where, of which keys, which revisions.
    narrow: Vec<Narrow>,
}

pub struct Narrow {
    pub who: String,
    pub start: Bytes,
    pub end: Bytes,
    pub after: u64,
    pub until: u64,
    pub revisions: Vec<u64>,
}

impl Recorder {
    pub fn new(group: Group, nodes: &[u64]) -> Self {
        Self { group, nodes: nodes.to_vec(), state: Arc::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn log(&self) -> Log {
        self.state().log.clone()
    }

    /// The revision up to which nothing is missing.
    pub fn newest(&self) -> u64 {
        self.state().log.keys().next_back().copied().unwrap_or(0)
    }

    fn take(&self, world: &World, who: &str, batch: WatchBatch) {
        let told = Told { timestamp_ms: batch.timestamp_ms, events: batch.events };
        let mut state = self.state();
        match state.log.get(&batch.revision.0) {
            None => {
                let erased = told.events.iter().filter(|e| matches!(e, WatchEvent::Delete { .. }));
                let keys = erased.filter_map(|e| std::str::from_utf8(e.key()).ok());
                keys.filter_map(|key| key.strip_prefix(ENDING)).for_each(|uid| world.fence.erased(uid));
                state.log.insert(batch.revision.0, told);
            }
            Some(known) if *known != told => {
                let text = format!("{who} was told {told:?} for revision {}, others {known:?}", batch.revision);
                drop(state);
                world.trace.violation("every server tells the same history", text);
            }
            Some(_) => {}
        }
    }

    /// Follows one server's store for as long as the world runs, over its restarts.
    pub async fn follow(self, world: Arc<World>, node: u64, dice: Dice) {
        loop {
            if let Some(server) = world.server(node) {
                let after = if dice.chance(150) { 0 } else { self.newest() };
                let who = format!("the watcher at server {node}, life {}", server.life.number);
                let Some(door) = server.door(self.group).cloned() else { return };
                match door.watch(Bytes::new(), Bytes::new(), Revision(after)).await {
                    Ok(mut watch) => {
                        world.trace.count("watches");
                        let mut last = after;
                        loop {
                            // A bounded wait, so that the end of the server is noticed.
                            let Ok(next) = timeout(Duration::from_secs(1), watch.next()).await else {
                                if server.life.is_on() { continue } else { break }
                            };
                            if !server.life.is_on() {
                                break;
                            }
                            match next {
                                Some(Ok(batch)) => last = self.hear(&world, &who, last, batch),
                                Some(Err(WatchError::Closed)) | None => break,
                                Some(Err(error)) => {
                                    world.trace.note(format_args!("{who}: {error}"));
                                    break;
                                }
                            }
                        }
                    }
                    Err(StoreError::FutureRevision { .. }) => {}
                    Err(error) => world.trace.note(format_args!("{who}: {error}")),
                }
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn hear(&self, world: &World, who: &str, last: u64, batch: WatchBatch) -> u64 {
        let revision = batch.revision.0;
        world.trace.count("watch batches");
        if batch.events.is_empty() {
            if revision != last {
                let text = format!("{who} was told that nothing up to {revision} is missing, after {last}");
                world.trace.violation("a watch tells every revision once and in order", text);
            }
            return last;
        }
        if revision != last + 1 {
            let text = format!("{who} was told {revision} after {last}");
            world.trace.violation("a watch tells every revision once and in order", text);
        }
        self.take(world, who, batch);
        revision
    }

    /// Watches a few keys only; what it was told is compared with the history at the end.
    pub async fn follow_some(self, world: Arc<World>, node: u64, prefix: String) {
        loop {
            if let Some(server) = world.server(node) {
                let after = self.newest();
                let start = Bytes::from(prefix.clone());
                let end = prefix_end(prefix.as_bytes());
                if let Ok(mut watch) = server.door.watch(start.clone(), end.clone(), Revision(after)).await {
                    let who = format!("the watcher of {prefix} at server {node}, life {}", server.life.number);
                    let place = {
                        let mut state = self.state();
                        state.narrow.push(Narrow { who, start, end, after, until: after, revisions: Vec::new() });
                        state.narrow.len() - 1
                    };
                    loop {
                        let Ok(next) = timeout(Duration::from_secs(1), watch.next()).await else {
                            if server.life.is_on() { continue } else { break }
                        };
                        let Some(Ok(batch)) = next else { break };
                        if !server.life.is_on() {
                            break;
                        }
                        let mut state = self.state();
                        let told = &mut state.narrow[place];
                        told.until = batch.revision.0;
                        if !batch.events.is_empty() {
                            told.revisions.push(batch.revision.0);
                        }
                    }
                }
            }
            sleep(Duration::from_millis(150)).await;
        }
    }

    /// Compares what narrow watches were told with the history.
    pub fn check_narrow(&self, world: &World) {
        let state = self.state();
        for told in &state.narrow {
            let inside = |e: &WatchEvent| *e.key() >= told.start && (told.end.is_empty() || *e.key() < told.end);
            let due: Vec<u64> = state
                .log
                .range((Bound::Excluded(told.after), Bound::Included(told.until.max(told.after))))
                .filter(|(_, t)| t.events.iter().any(inside))
                .map(|(r, _)| *r)
                .collect();
            if due != told.revisions {
                let text =
                    format!("{}, after {}: {:?}, but {due:?} touched its keys", told.who, told.after, told.revisions);
                world.trace.violation("a watch tells every revision once and in order", text);
            }
        }
    }
}
