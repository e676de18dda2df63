//! Who belongs to the region, beside its objects: the servers that have joined, and the hosts that have joined or left.
//!
//! Records stand in the region's store under `sys/fleet/`. Every server follows them in its own copy of the log, so that
//! it can tell agents and gateways where all servers are, reach the servers that came after its configuration was
//! written, and refuse hosts that have left, also without a majority.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_api::operations::ServerEntry;
use nexus_env::Endpoint;
use nexus_model::kind::{ANY_CELL, Classes, HostSpec};
use nexus_model::plan::GatewayNote;
use nexus_model::{Name, Timestamp, key};
use nexus_store::{Compare, KeyValue, Op, RangeRequest, Store, StoreError, Txn, WatchEvent};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::config::ServerConfig;

/// The version of the records here. A newer one is read as far as it is understood.
pub const VERSION: u32 = 1;
/// Between tries to follow the store.
const REST: Duration = Duration::from_millis(200);
/// Records read at once.
const PAGE: usize = 1_000;

/// How far a server has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ServerState {
    /// It has its certificates; the leader takes it in as soon as it runs.
    Joining,
    Member,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerRecord {
    pub version: u32,
    #[serde(flatten)]
    pub entry: ServerEntry,
    pub state: ServerState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HostMembership {
    Joined,
    /// Its reports are refused until it joins again.
    Left,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostRecord {
    pub version: u32,
    pub zone: Name,
    pub cell: Name,
    pub address: String,
    pub prefix6: Ipv6Addr,
    pub prefix4: Ipv4Addr,
    /// All that it may declare, where its token was bound to classes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classes: Option<Classes>,
    pub state: HostMembership,
}

impl HostRecord {
    /// Says what of a host's account of itself goes beyond what its token let it join as.
    fn objection(&self, spec: &HostSpec) -> Option<String> {
        if spec.zone != self.zone {
            return Some(format!("it joined zone {}, and says that it is in {}", self.zone, spec.zone));
        }
        if self.cell != ANY_CELL && spec.cell != self.cell {
            return Some(format!("it joined cell {}, and says that it is of {}", self.cell, spec.cell));
        }
        if (spec.prefix6, spec.prefix4) != (self.prefix6, self.prefix4) {
            return Some(format!(
                "its instances were given the prefixes {} and {}, not others",
                self.prefix6, self.prefix4
            ));
        }
        class_objection(self.classes.as_ref()?, &spec.classes)
    }
}

/// Says which of the declared classes goes beyond those that are allowed.
pub fn class_objection(allowed: &Classes, declared: &Classes) -> Option<String> {
    let (class, count) = declared.iter().find(|(class, n)| allowed.get(*class).is_none_or(|most| *n > most))?;
    let most = allowed.get(class).copied().unwrap_or(0);
    Some(format!("its join token allows {most} of class {class}, and it declares {count}"))
}

/// What the records say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Known {
    pub servers: BTreeMap<Name, ServerRecord>,
    pub hosts: BTreeMap<Name, HostRecord>,
}

/// This server's view of the records. Cheap to clone.
#[derive(Clone)]
pub struct Fleet {
    /// What the configuration says, for as long as the records don't know better.
    founders: Arc<Vec<ServerEntry>>,
    known: watch::Sender<Arc<Known>>,
    /// What gateways said of themselves: when their certificate ends, and when this was said by the monotonic clock.
    /// Gateways have no records, and are forgotten with the process.
    gateways: Arc<Mutex<BTreeMap<Name, (Timestamp, Duration)>>>,
}

/// A gateway that has said nothing for so long is none any more.
const SILENT: Duration = Duration::from_secs(24 * 3600);
/// So many gateways are remembered; the longest silent one goes first.
const GATEWAYS: usize = 1_000;

/// A record with the revision that it was last changed at.
#[derive(Debug, Clone)]
pub struct Stored<T> {
    pub value: T,
    pub revision: nexus_store::Revision,
}

pub fn read<T: DeserializeOwned>(kv: &KeyValue) -> Option<T> {
    match serde_json::from_slice(&kv.value) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::error!(key = %String::from_utf8_lossy(&kv.key), %error, "a record can't be read and is left out");
            None
        }
    }
}

pub fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("records are plain data")
}

pub fn server_key(name: &str) -> String {
    format!("{}{name}", key::FLEET_SERVERS)
}

pub fn host_key(name: &str) -> String {
    format!("{}{name}", key::FLEET_HOSTS)
}

/// Reads one record, fresh.
pub async fn get<T: DeserializeOwned>(store: &dyn Store, key: &str) -> Result<Option<Stored<T>>, StoreError> {
    let found = store.range(RangeRequest::get(key.to_owned())).await?;
    Ok(found.kvs.first().and_then(|kv| Some(Stored { value: read(kv)?, revision: kv.mod_revision })))
}

/// Reads all records of a family, fresh or as this server knows them.
pub async fn list<T: DeserializeOwned>(
    store: &dyn Store,
    prefix: &str,
    stale: bool,
) -> Result<Vec<(String, Stored<T>)>, StoreError> {
    let mut start = bytes::Bytes::copy_from_slice(prefix.as_bytes());
    let end = key::prefix_end(prefix);
    let mut out = Vec::new();
    loop {
        let mut request = RangeRequest::new(start.clone(), end.clone()).limit(PAGE);
        if stale {
            request = request.stale();
        }
        let page = store.range(request).await?;
        for kv in &page.kvs {
            let name = String::from_utf8_lossy(&kv.key[prefix.len()..]).into_owned();
            out.extend(read(kv).map(|value| (name, Stored { value, revision: kv.mod_revision })));
        }
        match page.kvs.last() {
            Some(last) if page.more => start = [&last.key[..], &[0]].concat().into(),
            _ => return Ok(out),
        }
    }
}

impl Fleet {
    pub fn new(config: &ServerConfig) -> Self {
        let founders = config.members.iter().map(|(node, m)| ServerEntry {
            node: *node,
            name: m.name.clone(),
            zone: config.zone.clone(),
            wire: m.wire.to_string(),
            api: m.api.clone(),
        });
        Self { founders: Arc::new(founders.collect()), known: watch::Sender::default(), gateways: Arc::default() }
    }

    /// Takes in what a gateway says of itself.
    pub fn heard_gateway(&self, note: GatewayNote, now: Duration) {
        let mut gateways = self.gateways.lock().unwrap_or_else(PoisonError::into_inner);
        gateways.insert(note.gateway, (note.certificate_ends, now));
        if gateways.len() > GATEWAYS
            && let Some(oldest) = gateways.iter().min_by_key(|(_, (_, at))| *at).map(|(name, _)| name.clone())
        {
            gateways.remove(&oldest);
        }
    }

    /// The gateways that have been heard within a day, each with the end of its certificate.
    pub fn gateways(&self, now: Duration) -> Vec<(Name, Timestamp)> {
        let mut gateways = self.gateways.lock().unwrap_or_else(PoisonError::into_inner);
        gateways.retain(|_, (_, at)| now.saturating_sub(*at) < SILENT);
        gateways.iter().map(|(name, (end, _))| (name.clone(), *end)).collect()
    }

    pub fn known(&self) -> Arc<Known> {
        self.known.borrow().clone()
    }

    /// The region's servers, by node. Before the first record is written these are those of the configuration.
    pub fn servers(&self) -> BTreeMap<u64, ServerEntry> {
        let known = self.known();
        let recorded: BTreeMap<u64, ServerEntry> =
            known.servers.values().map(|r| (r.entry.node, r.entry.clone())).collect();
        if recorded.is_empty() {
            return self.founders.iter().map(|e| (e.node, e.clone())).collect();
        }
        recorded
    }

    /// Where they listen for peers, agents and gateways.
    pub fn wires(&self) -> Vec<String> {
        self.servers().into_values().map(|e| e.wire).collect()
    }

    /// Where one of them listens.
    pub fn wire_of(&self, node: u64) -> Option<Endpoint> {
        let founder = || self.founders.iter().find(|e| e.node == node).cloned();
        self.servers().remove(&node).or_else(founder).and_then(|e| e.wire.parse().ok())
    }

    pub fn has_left(&self, host: &Name) -> bool {
        self.known.borrow().hosts.get(host).is_some_and(|h| h.state == HostMembership::Left)
    }

    /// Says why a host's reports are not taken, if they are not. A host without a record has been there since before the
    /// first token.
    pub fn refuses(&self, host: &Name, spec: &HostSpec) -> Option<String> {
        let known = self.known.borrow();
        let record = known.hosts.get(host)?;
        if record.state == HostMembership::Left {
            return Some(format!("host {host} has left the region: stop its agent, or let it join again"));
        }
        let why = record.objection(spec)?;
        Some(format!("host {host} is refused: {why}; correct its configuration, or let it join again"))
    }

    /// Follows the store until it is closed or `stop` is cancelled.
    pub async fn follow(&self, store: Arc<dyn Store>, stop: CancellationToken) {
        while !stop.is_cancelled() {
            let end = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                end = self.follow_once(&*store) => end,
            };
            match end {
                Ok(()) => {}
                Err(StoreError::Closed) => return,
                Err(error) => tracing::warn!(%error, "the records of the fleet can't be followed; trying again"),
            }
            tokio::time::sleep(REST).await;
        }
    }

    async fn follow_once(&self, store: &dyn Store) -> Result<(), StoreError> {
        // Listed at what is known before the lists began: changes in between are seen twice.
        let mut first = RangeRequest::get(key::FLEET_NODE).stale();
        first.limit = 1;
        let revision = store.range(first).await?.revision;
        let mut known = Known::default();
        for (name, record) in list::<ServerRecord>(store, key::FLEET_SERVERS, true).await? {
            known.servers.extend(name.parse().ok().map(|n| (n, record.value)));
        }
        for (name, record) in list::<HostRecord>(store, key::FLEET_HOSTS, true).await? {
            known.hosts.extend(name.parse().ok().map(|n| (n, record.value)));
        }
        self.publish(&known);
        let mut watch = store.watch(key::FLEET.into(), key::prefix_end(key::FLEET).into(), revision).await?;
        while let Some(Ok(batch)) = watch.next().await {
            for event in &batch.events {
                apply(&mut known, event);
            }
            if !batch.events.is_empty() {
                self.publish(&known);
            }
        }
        Ok(())
    }

    fn publish(&self, known: &Known) {
        self.known.send_if_modified(|held| {
            let news = **held != *known;
            if news {
                *held = Arc::new(known.clone());
            }
            news
        });
    }
}

fn apply(known: &mut Known, event: &WatchEvent) {
    let key = String::from_utf8_lossy(event.key()).into_owned();
    let kv = match event {
        WatchEvent::Put { kv, .. } => Some(kv),
        WatchEvent::Delete { .. } => None,
    };
    if let Some(name) = key.strip_prefix(key::FLEET_SERVERS).and_then(|n| n.parse::<Name>().ok()) {
        known.servers.remove(&name);
        known.servers.extend(kv.and_then(read).map(|record| (name, record)));
    } else if let Some(name) = key.strip_prefix(key::FLEET_HOSTS).and_then(|n| n.parse::<Name>().ok()) {
        known.hosts.remove(&name);
        known.hosts.extend(kv.and_then(read).map(|record| (name, record)));
    }
}

/// Writes a record if the key is as it was read (`None`: absent). False if it has changed meanwhile.
pub async fn put_if<T: Serialize>(
    store: &dyn Store,
    key: &str,
    was: Option<nexus_store::Revision>,
    value: &T,
) -> Result<bool, StoreError> {
    let compare = Compare::mod_revision(key.to_owned(), was.unwrap_or_default());
    let txn = Txn::new(vec![compare], vec![Op::put(key.to_owned(), json(value))]);
    Ok(store.txn(txn).await?.is_committed())
}

/// Deletes a record if it is as it was read.
pub async fn delete_if(store: &dyn Store, key: &str, was: nexus_store::Revision) -> Result<bool, StoreError> {
    let txn = Txn::new(vec![Compare::mod_revision(key.to_owned(), was)], vec![Op::delete(key.to_owned())]);
    Ok(store.txn(txn).await?.is_committed())
}
