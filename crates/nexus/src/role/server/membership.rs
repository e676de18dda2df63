//! Keeps the store's groups in step with the records of who has joined.
//!
//! A record says what is wanted; this loop, wherever the region's leader is, makes it true and can be killed at any
//! step: a server that has joined is added as a learner of every group, caught up, promoted in the region's, and only then
//! called a member (who votes in `global` is for [`super::voters`]). A member that the region's group no longer knows was removed, and its record goes. Each server writes its own record
//! at its first start, so that founders need no ceremony.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nexus_api::operations::ServerEntry;
use nexus_model::plan::{ServerList, method};
use nexus_model::{ApiError, Code, Name};
use nexus_store::{Store, StoreError};
use nexus_wire::Pool;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::engine::Engine;
use super::fleet::{self, Fleet, ServerRecord, ServerState, Stored, VERSION};
use super::operations::from_store;
use crate::config::ServerConfig;

/// How often the leader compares.
const ROUND: Duration = Duration::from_secs(1);
const ASK: Duration = Duration::from_secs(2);

/// What a member of a group is like, as the group's leader sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Health {
    pub node: u64,
    pub endpoint: String,
    pub voter: bool,
    pub reachable: bool,
    /// Entries that it has not stored yet. Not known where etcd has them.
    pub lag_entries: Option<u64>,
    pub clock_skew_ms: Option<i64>,
}

/// A group whose members can change. All may be called on any member of it.
#[async_trait]
pub trait Group: Send + Sync {
    /// As this member knows them: node → whether it votes.
    async fn members(&self) -> BTreeMap<u64, bool>;
    async fn leads(&self) -> bool;
    /// Returns when the newcomer has caught up.
    async fn add_learner(&self, node: u64, endpoint: String) -> Result<(), StoreError>;
    async fn promote(&self, node: u64) -> Result<(), StoreError>;
    /// Refuses what would lose the quorum.
    async fn remove(&self, node: u64) -> Result<(), StoreError>;
    async fn health(&self) -> Result<Vec<Health>, StoreError>;
}

/// The groups of one server, with their records.
pub struct Membership {
    config: ServerConfig,
    store: Arc<dyn Store>,
    fleet: Fleet,
    /// The region's first, then `global` if that is another.
    groups: Vec<Arc<dyn Group>>,
    pool: Arc<Pool>,
    /// Why a server could not be taken in, by node.
    trouble: Mutex<BTreeMap<u64, String>>,
}

impl Membership {
    pub fn new(
        config: &ServerConfig,
        store: Arc<dyn Store>,
        fleet: Fleet,
        groups: Vec<Arc<dyn Group>>,
        pool: Arc<Pool>,
    ) -> Self {
        Self { config: config.clone(), store, fleet, groups, pool, trouble: Mutex::default() }
    }

    /// Why a server has not been taken in, if that was tried.
    pub fn trouble(&self, node: u64) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).get(&node).cloned()
    }

    fn note(&self, node: u64, trouble: Option<String>) {
        let mut all = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        match trouble {
            Some(text) => {
                if all.get(&node) != Some(&text) {
                    tracing::warn!(node, reason = text, "a server can't be taken in yet");
                }
                all.insert(node, text);
            }
            None => drop(all.remove(&node)),
        }
    }

    fn region(&self) -> &Arc<dyn Group> {
        &self.groups[0]
    }

    /// Writes this server's record if it has none, and then keeps the groups in step while it leads, until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        let mut enlisted = false;
        loop {
            let round = async {
                if !enlisted {
                    enlisted = self.enlist().await?;
                }
                if self.region().leads().await { self.reconcile().await } else { Ok(()) }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                done = round => if let Err(error) = done {
                    tracing::debug!(%error, "the fleet's records can't be compared now");
                },
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                () = tokio::time::sleep(ROUND) => {}
            }
        }
    }

    /// A founder's record. True when there is nothing left to do.
    async fn enlist(&self) -> Result<bool, StoreError> {
        let node = self.config.node_id;
        if !self.region().members().await.contains_key(&node) {
            return Ok(false);
        }
        let key = fleet::server_key(self.config.name.as_str());
        let found: Option<Stored<ServerRecord>> = fleet::get(&*self.store, &key).await?;
        let Some(own) = self.config.members.get(&node) else { return Ok(true) };
        let entry = ServerEntry {
            node,
            name: self.config.name.clone(),
            zone: self.config.zone.clone(),
            wire: own.wire.to_string(),
            api: own.api.clone(),
        };
        match found {
            // Who was let in by a token has its record; where it listens may have been changed since.
            Some(found) if found.value.entry == entry || found.value.entry.node != node => Ok(true),
            Some(found) => {
                let record = ServerRecord { entry, ..found.value };
                fleet::put_if(&*self.store, &key, Some(found.revision), &record).await
            }
            None if self.config.join => Ok(true),
            None => {
                let record = ServerRecord { version: VERSION, entry, state: ServerState::Member };
                fleet::put_if(&*self.store, &key, None, &record).await
            }
        }
    }

    async fn reconcile(&self) -> Result<(), StoreError> {
        let records = fleet::list::<ServerRecord>(&*self.store, nexus_model::key::FLEET_SERVERS, true).await?;
        // After the records: a copy of the members that is older than one of them would take it for one that was removed.
        let members = self.region().members().await;
        let rounds = records.iter().map(|(name, record)| self.reconcile_one(name, record, &members));
        futures::future::try_join_all(rounds).await.map(drop)
    }

    async fn reconcile_one(
        &self,
        name: &str,
        record: &Stored<ServerRecord>,
        members: &BTreeMap<u64, bool>,
    ) -> Result<(), StoreError> {
        let entry = &record.value.entry;
        match record.value.state {
            ServerState::Joining => match self.take_in(entry).await {
                Ok(()) => {
                    let member = ServerRecord { state: ServerState::Member, ..record.value.clone() };
                    if fleet::put_if(&*self.store, &fleet::server_key(name), Some(record.revision), &member).await? {
                        self.note(entry.node, None);
                        tracing::info!(server = name, node = entry.node, "a server was taken in");
                    }
                }
                Err(reason) => self.note(entry.node, Some(reason)),
            },
            ServerState::Member if !members.contains_key(&entry.node) => {
                // A removal that broke off is finished: what is out of the region has no business in `global`.
                for group in &self.groups {
                    if group.members().await.contains_key(&entry.node) {
                        group.remove(entry.node).await?;
                    }
                }
                tracing::info!(server = name, node = entry.node, "a server was removed");
                fleet::delete_if(&*self.store, &fleet::server_key(name), record.revision).await?;
            }
            ServerState::Member => {}
        }
        Ok(())
    }

    async fn take_in(&self, entry: &ServerEntry) -> Result<(), String> {
        // Nobody is added before it runs: a member that never was there would only be in the way.
        let endpoint = entry.wire.parse().map_err(|e| format!("its wire endpoint: {e}"))?;
        let asked = self.pool.get(&endpoint).call::<_, ServerList>(method::SERVERS, &(), ASK).await;
        asked.map_err(|e| format!("it does not answer at {endpoint}: {e}"))?;
        for (i, group) in self.groups.iter().enumerate() {
            let members = group.members().await;
            match members.get(&entry.node) {
                Some(true) => continue,
                Some(false) => {}
                None => group.add_learner(entry.node, entry.wire.clone()).await.map_err(|e| e.to_string())?,
            }
            // Who votes on what all regions share is decided for all of them: see `voters`.
            if i == 0 {
                group.promote(entry.node).await.map_err(|e| e.to_string())?;
            }
        }
        Ok(())
    }

    /// Takes a server out of every group. One that is in none any more is no error.
    pub async fn remove(&self, node: u64) -> Result<(), ApiError> {
        for group in &self.groups {
            if group.members().await.contains_key(&node) {
                group.remove(node).await.map_err(from_store)?;
            }
        }
        Ok(())
    }

    /// Takes the servers of another region out of the global group. They must have stopped: one that runs would let itself
    /// in again. Those that are out already are no error.
    pub async fn let_region_go(&self, region: &Name, nodes: &[u64]) -> Result<(), ApiError> {
        let conflict = |detail: String| ApiError::new(Code::Conflict, detail);
        let own = self.region().members().await;
        if *region == self.config.region || nodes.iter().any(|node| own.contains_key(node)) {
            return Err(conflict(format!("{region} is this server's own region: ask a server of another one")));
        }
        let Some(global) = self.groups.get(1) else {
            return Err(conflict(format!("{} is the only region", self.config.region)));
        };
        let members = global.members().await;
        let leaving: Vec<u64> = nodes.iter().copied().filter(|node| members.contains_key(node)).collect();
        if leaving.is_empty() {
            return Ok(());
        }
        let health = global.health().await.map_err(from_store)?;
        if let Some(runs) = health.iter().find(|h| leaving.contains(&h.node) && h.reachable) {
            return Err(conflict(format!(
                "node {} of {region} still answers: stop the region's servers first",
                runs.node
            )));
        }
        for node in leaving {
            global.remove(node).await.map_err(from_store)?;
        }
        Ok(())
    }

    /// Every server with how it does in the region's group.
    pub async fn list(&self) -> Result<Vec<Value>, ApiError> {
        let records = fleet::list::<ServerRecord>(&*self.store, nexus_model::key::FLEET_SERVERS, false).await;
        let health = self.region().health().await.map_err(from_store)?;
        let leader = self.store.status().await.leader;
        // With etcd, no server has a vote.
        let votes = |voter: bool| self.config.store.is_none().then_some(voter);
        let items = records.map_err(from_store)?.into_iter().map(|(_, r)| {
            let (entry, state) = (r.value.entry, r.value.state);
            let h = health.iter().find(|h| h.node == entry.node);
            json!({
                "name": entry.name, "node": entry.node, "zone": entry.zone, "wire": entry.wire, "api": entry.api,
                "state": state, "leader": leader == Some(entry.node),
                "voter": votes(h.is_some_and(|h| h.voter)), "reachable": h.is_some_and(|h| h.reachable),
                "lagEntries": h.and_then(|h| h.lag_entries), "clockSkewMs": h.and_then(|h| h.clock_skew_ms),
                "trouble": self.trouble(entry.node),
            })
        });
        let known = self.fleet.servers();
        let mut items: Vec<Value> = items.collect();
        // Whoever is in the group without a record is shown too: nothing may be hidden from an operator.
        for h in &health {
            if !items.iter().any(|i| i["node"] == h.node) {
                let name = known.get(&h.node).map_or_else(|| format!("node {}", h.node), |e| e.name.to_string());
                items.push(json!({
                    "name": name, "node": h.node, "wire": h.endpoint, "state": "unrecorded", "voter": votes(h.voter),
                    "reachable": h.reachable, "leader": leader == Some(h.node), "lagEntries": h.lag_entries,
                    "clockSkewMs": h.clock_skew_ms,
                }));
            }
        }
        Ok(items)
    }
}

#[async_trait]
impl Group for Engine {
    async fn members(&self) -> BTreeMap<u64, bool> {
        self.status().await.members.into_iter().map(|(node, m)| (node, m.voter)).collect()
    }

    async fn leads(&self) -> bool {
        self.leadership().borrow().is_self
    }

    async fn add_learner(&self, node: u64, endpoint: String) -> Result<(), StoreError> {
        Engine::add_learner(self, node, endpoint).await
    }

    async fn promote(&self, node: u64) -> Result<(), StoreError> {
        Engine::promote(self, node).await
    }

    async fn remove(&self, node: u64) -> Result<(), StoreError> {
        Engine::remove(self, node).await
    }

    async fn health(&self) -> Result<Vec<Health>, StoreError> {
        let members = self.members_health().await?;
        Ok(members
            .into_iter()
            .map(|m| Health {
                node: m.node,
                endpoint: m.endpoint,
                voter: m.voter,
                reachable: m.reachable,
                lag_entries: self.embedded().is_some().then_some(m.lag_entries),
                clock_skew_ms: m.clock_skew_ms,
            })
            .collect())
    }
}
