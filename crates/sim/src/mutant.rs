//! Planted bugs. Each breaks one promise that a checker watches over, so that a simulator that does not find it is known to
//! be blind. They live in the simulator's own disk and in the [`Door`] that it puts before every server's store, never in
//! what ships.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nexus_model::key;
use nexus_store::embedded::EmbeddedStore;
use nexus_store::{
    Consistency, Leadership, LeaseId, Op, RangeRequest, RangeResponse, Revision, Store, StoreError, StoreStatus, Txn,
    TxnOutcome, Watch, WatchBatch, WatchError, WatchSource,
};
use tokio::sync::watch;

use crate::chance::Dice;
use crate::clock;
use crate::life::{Life, Step};
use crate::run;
use crate::site::Group;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// The log's syncs answer without syncing.
    SkippedFsync,
    /// Now and then a transaction is committed without its compares.
    DroppedCompare,
    /// Linearizable reads and keep-alives are answered from what this server knows, as long as it thinks that someone leads.
    StaleLeaseRead,
    /// A dead host's fencing number is not kept.
    ForgottenEpoch,
    /// Now and then a watch skips a revision.
    WatchGap,
    /// Servers don't pass messages on for each other.
    NoRelay,
    /// Hosts say that an instance is gone while it still stops.
    HastyHost,
    /// Servers feed gateways the first table that they made.
    StuckTable,
    /// Now and then a server's copy of the group that all regions share skips a revision.
    SkippedGlobal,
    /// Servers say that they can read what the newest release anywhere can.
    EarlyLevel,
    /// Holders of leases count on the whole time of a lease, as if all clocks went at one speed.
    TrustedClock,
    /// Rollouts go by another `maxUnavailable` than users said.
    EagerRollout,
    /// Drains go by another budget than users said.
    EagerDrain,
    /// Now and then it is not written down that a job's instance has ended, only that the job counts it.
    ForgottenEnd,
}

impl Mutant {
    pub const ALL: &'static [Self] = &[
        Self::SkippedFsync,
        Self::DroppedCompare,
        Self::StaleLeaseRead,
        Self::ForgottenEpoch,
        Self::WatchGap,
        Self::NoRelay,
        Self::HastyHost,
        Self::StuckTable,
        Self::SkippedGlobal,
        Self::EarlyLevel,
        Self::TrustedClock,
        Self::EagerRollout,
        Self::EagerDrain,
        Self::ForgottenEnd,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::SkippedFsync => "skipped-fsync",
            Self::DroppedCompare => "dropped-compare",
            Self::StaleLeaseRead => "stale-lease-read",
            Self::ForgottenEpoch => "forgotten-epoch",
            Self::WatchGap => "watch-gap",
            Self::NoRelay => "no-relay",
            Self::HastyHost => "hasty-host",
            Self::StuckTable => "stuck-table",
            Self::SkippedGlobal => "skipped-global",
            Self::EarlyLevel => "early-level",
            Self::TrustedClock => "trusted-clock",
            Self::EagerRollout => "eager-rollout",
            Self::EagerDrain => "eager-drain",
            Self::ForgottenEnd => "forgotten-end",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|m| m.name() == name)
    }

    /// Whether a seed's world has what the bug is in.
    pub fn is_in(self, seed: u64) -> bool {
        let world = run::seed_kind(seed).name();
        match self {
            Self::SkippedGlobal => world == "fleet",
            Self::EarlyLevel => world == "releases",
            Self::EagerRollout | Self::EagerDrain => world == "apps",
            Self::ForgottenEnd => world == "work",
            Self::TrustedClock => {
                matches!(world, "store" | "members" | "releases") && clock::drift_ppm(seed) == clock::WORST_PPM
            }
            _ => true,
        }
    }
}

/// The store of one server as everything above it sees it: the real one, with the steps of the writer reported and the
/// planted bug in between.
pub struct Door {
    pub store: Arc<EmbeddedStore>,
    life: Arc<Life>,
    dice: Dice,
    group: Group,
    /// The view and the region's writer follow the group through it.
    is_copy: bool,
    /// Times to live of leases that were granted here, for the bug that needs them.
    granted: Mutex<BTreeMap<LeaseId, Duration>>,
}

impl Door {
    pub fn new(store: Arc<EmbeddedStore>, life: Arc<Life>, dice: Dice, group: Group) -> Self {
        Self { store, life, dice, group, is_copy: false, granted: Mutex::new(BTreeMap::new()) }
    }

    /// The same for what keeps a copy of the group.
    pub fn copied(&self) -> Self {
        let Self { store, life, dice, group, .. } = self;
        Self { is_copy: true, ..Self::new(store.clone(), life.clone(), dice.clone(), *group) }
    }

    fn has(&self, mutant: Mutant) -> bool {
        self.life.stage.mutant == Some(mutant)
    }
}

/// What a transaction is to the writer: the steps before and after it.
fn writers_step(txn: &Txn, group: Group) -> Option<(Option<Step>, Step)> {
    let value = txn.ops.iter().find_map(|op| match op {
        Op::Put { key, value, .. } if key == key::WRITER => Some(value),
        _ => None,
    })?;
    let text = String::from_utf8_lossy(value);
    let claims = text.ends_with(" next=0");
    Some(match group {
        Group::Own if claims => (Some(Step::Claim), Step::Claimed),
        Group::Own => (None, Step::Decided),
        Group::Global if claims => (Some(Step::GlobalClaim), Step::GlobalClaimed),
        Group::Global => (None, Step::GlobalDecided),
    })
}

/// The host's row without its fencing number.
fn without_epoch(value: &Bytes) -> Option<Bytes> {
    let mut row: serde_json::Value = serde_json::from_slice(value).ok()?;
    let epoch = row.pointer_mut("/status/epoch")?;
    *epoch = 0.into();
    serde_json::to_vec(&row).ok().map(Bytes::from)
}

/// The row of an instance that has ended as if it had not.
fn without_end(value: &Bytes) -> Option<Bytes> {
    let mut row: serde_json::Value = serde_json::from_slice(value).ok()?;
    let status = row.pointer_mut("/status")?.as_object_mut()?;
    status.remove("finished")?;
    status.insert("phase".into(), "Running".into());
    serde_json::to_vec(&row).ok().map(Bytes::from)
}

#[async_trait]
impl Store for Door {
    async fn txn(&self, mut txn: Txn) -> Result<TxnOutcome, StoreError> {
        if self.has(Mutant::DroppedCompare) && !txn.compares.is_empty() && self.dice.chance(100) {
            txn.compares.clear();
        }
        if self.has(Mutant::ForgottenEpoch) {
            for op in &mut txn.ops {
                if let Op::Put { key, value, .. } = op
                    && key.starts_with(b"o/hosts/")
                    && let Some(forgotten) = without_epoch(value)
                {
                    *value = forgotten;
                }
            }
        }
        if self.has(Mutant::ForgottenEnd) {
            for op in &mut txn.ops {
                if let Op::Put { key, value, .. } = op
                    && key.starts_with(b"o/instances/")
                    && let Some(forgotten) = without_end(value).filter(|_| self.dice.chance(200))
                {
                    *value = forgotten;
                }
            }
        }
        let steps = writers_step(&txn, self.group);
        if let Some((Some(before), _)) = steps {
            self.life.step(before);
        }
        let outcome = self.store.txn(txn).await;
        if let Some((_, after)) = steps {
            self.life.step(after);
        }
        outcome
    }

    fn keeps_order(&self) -> bool {
        self.store.keeps_order()
    }

    fn way_to(&self, node: u64) -> Vec<u64> {
        self.store.way_to(node)
    }

    async fn range(&self, mut request: RangeRequest) -> Result<RangeResponse, StoreError> {
        if self.has(Mutant::StaleLeaseRead) && self.store.leadership().borrow().leader.is_some() {
            request.consistency = Consistency::Stale;
        }
        self.store.range(request).await
    }

    async fn watch(&self, start: Bytes, end: Bytes, after: Revision) -> Result<Watch, StoreError> {
        let watch = self.store.watch(start, end, after).await?;
        if self.has(Mutant::WatchGap) || self.is_copy && self.has(Mutant::SkippedGlobal) {
            return Ok(Watch::new(Box::new(Gap { watch, dice: self.dice.clone() })));
        }
        Ok(watch)
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let id = self.store.lease_grant(ttl).await?;
        if self.has(Mutant::StaleLeaseRead) {
            self.granted.lock().unwrap_or_else(PoisonError::into_inner).insert(id, ttl);
        }
        Ok(id)
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, StoreError> {
        let known = self.granted.lock().unwrap_or_else(PoisonError::into_inner).get(&id).copied();
        match known {
            Some(ttl) if self.store.leadership().borrow().leader.is_some() => Ok(ttl),
            _ => self.store.lease_keep_alive(id).await,
        }
    }

    async fn lease_revoke(&self, id: LeaseId) -> Result<(), StoreError> {
        self.store.lease_revoke(id).await
    }

    async fn compact(&self, before: Revision) -> Result<(), StoreError> {
        self.store.compact(before).await
    }

    async fn status(&self) -> StoreStatus {
        self.store.status().await
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.store.leadership()
    }
}

struct Gap {
    watch: Watch,
    dice: Dice,
}

#[async_trait]
impl WatchSource for Gap {
    async fn next(&mut self) -> Option<Result<WatchBatch, WatchError>> {
        loop {
            let next = self.watch.next().await;
            if !matches!(next, Some(Ok(_))) || !self.dice.chance(5) {
                return next;
            }
        }
    }
}
