//! The writer over a store whose answers get lost: it learns from its chain what became of its transactions, keeps its
//! state, and answers everyone with what was decided, once.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use common::net::{End, LONG, Running, env, submit};
use common::{create, image, intent, name, web};
use nexus_control::core::Bootstrap;
use nexus_control::intent::{Change, Writer as _};
use nexus_control::region::{Config, Region};
use nexus_control::view::View;
use nexus_model::key;
use nexus_model::kind::*;
use nexus_store::embedded::EmbeddedStore;
use nexus_store::{
    Leadership, LeaseId, Op, RangeRequest, RangeResponse, Revision, Store, StoreError, StoreStatus, Txn, TxnOutcome,
    Watch,
};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// What becomes of a transaction whose answer is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Committed,
    NotCommitted,
    /// Committed a while after the answer was given up.
    CommittedLate,
}

/// A store that loses answers.
struct Lossy {
    store: Arc<EmbeddedStore>,
    /// Of the writer's transactions, one of so many has a fate, in turn: those that follow it in the chain come to nothing
    /// or not, as it does.
    every: usize,
    fates: &'static [Fate],
    count: AtomicUsize,
    lost: AtomicUsize,
    /// Bytes that are on their way now, and the most that ever were.
    ahead: AtomicUsize,
    most: AtomicUsize,
}

impl Lossy {
    fn new(store: Arc<EmbeddedStore>, every: usize, fates: &'static [Fate]) -> Arc<Self> {
        let [count, lost, ahead, most] = [const { AtomicUsize::new(0) }; 4];
        Arc::new(Self { store, every, fates, count, lost, ahead, most })
    }

    fn fate(&self, txn: &Txn) -> Option<Fate> {
        let claims = |op: &Op| matches!(op, Op::Put { key, .. } if key == key::FORMAT);
        if self.fates.is_empty() || txn.ops.iter().any(claims) {
            return None;
        }
        let count = self.count.fetch_add(1, Ordering::SeqCst) + 1;
        let lost = count.is_multiple_of(self.every).then(|| self.lost.fetch_add(1, Ordering::SeqCst))?;
        Some(self.fates[lost % self.fates.len()])
    }
}

#[async_trait]
impl Store for Lossy {
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        let bytes = txn.bytes();
        self.most.fetch_max(self.ahead.fetch_add(bytes, Ordering::SeqCst) + bytes, Ordering::SeqCst);
        let outcome = match self.fate(&txn) {
            None => self.store.txn(txn).await,
            Some(fate) => {
                match fate {
                    Fate::Committed => drop(self.store.txn(txn).await),
                    Fate::NotCommitted => {}
                    Fate::CommittedLate => {
                        let store = self.store.clone();
                        tokio::spawn(async move {
                            sleep(Duration::from_millis(20)).await;
                            drop(store.txn(txn).await);
                        });
                    }
                }
                Err(StoreError::Unknown { reason: format!("{fate:?}") })
            }
        };
        self.ahead.fetch_sub(bytes, Ordering::SeqCst);
        outcome
    }

    fn keeps_order(&self) -> bool {
        true
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StoreError> {
        self.store.range(request).await
    }

    async fn watch(&self, start: Bytes, end: Bytes, after: Revision) -> Result<Watch, StoreError> {
        self.store.watch(start, end, after).await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.store.lease_grant(ttl).await
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, StoreError> {
        self.store.lease_keep_alive(id).await
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

fn bootstrap() -> Bootstrap {
    let (zones, cells) = (vec![name("zone-a")], vec![name("cell-a")]);
    Bootstrap { region: name("local"), domain: "localhost".into(), zones, cells }
}

/// A server alone, whose writer works over a store that loses answers.
async fn start(every: usize, fates: &'static [Fate]) -> (Arc<Lossy>, Arc<Region>, Running) {
    let (env, end) = (env(1), End::alone());
    let lossy = Lossy::new(end.open(&env, "local", &[1]).await, every, fates);
    let config = Config { node: 1, server: "server-1".into(), bootstrap: bootstrap(), fleet: None };
    let region = Arc::new(Region::new(config, env, lossy.clone(), end));
    let mut running = Running::new(View::new("localhost"));
    running.writer(&region);
    running.follow(lossy.store.clone());
    (lossy, region, running)
}

async fn began_once(region: &Region) {
    assert_eq!(region.counters.beginnings.load(Ordering::SeqCst), 1, "the writer gave up its state");
    assert_eq!(region.counters.violations.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_costs_neither_the_writers_state_nor_a_users_answer() {
    let (lossy, region, running) = start(3, &[Fate::Committed, Fate::NotCommitted, Fate::CommittedLate]).await;
    submit(&region, create::<Image>(Some("default"), "web", image("web"))).await.unwrap();
    // Without a key: nobody could send one again without knowing what became of it.
    let mut newest = 0;
    for n in 0..30 {
        let app = create::<App>(Some("default"), &format!("app-{n}"), web(1));
        let accepted = timeout(LONG, region.submit(app)).await.unwrap().unwrap();
        assert!(accepted.created, "app-{n} was there already");
        assert!(accepted.object.metadata.revision > newest, "the revision is that of the commit");
        newest = accepted.object.metadata.revision;
        let found = lossy.store.range(RangeRequest::get(format!("o/apps/default/app-{n}"))).await.unwrap();
        if let Some(kv) = found.kvs.first() {
            assert!(kv.mod_revision.0 >= newest, "app-{n} is said to be of revision {newest}, and is of {kv:?}");
        }
    }
    assert!(lossy.lost.load(Ordering::SeqCst) >= 9, "hardly an answer was lost");
    began_once(&region).await;
    running.shows("every app", |w| w.apps.live.len() == 30).await;
    running.end().await;
    lossy.store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_round_of_many_transactions_is_committed_whole_although_answers_from_its_middle_are_lost() {
    let (lossy, region, running) = start(7, &[Fate::Committed, Fate::CommittedLate, Fate::NotCommitted]).await;
    submit(&region, create::<App>(Some("default"), "wide", web(2))).await.unwrap();
    let patch = json!({"spec": {"replicas": 1_000}});
    submit(&region, intent("apps", Some("default"), "wide", Change::Patch { patch })).await.unwrap();
    submit(&region, create::<Image>(Some("default"), "web", image("web"))).await.unwrap();
    running.shows("1,000 instances that wait for hosts", |w| w.instances.live.len() == 1_000).await;
    assert!(lossy.lost.load(Ordering::SeqCst) >= 1, "no answer was lost");
    began_once(&region).await;
    running.end().await;
    lossy.store.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_sends_a_large_round_little_by_little() {
    let (lossy, region, running) = start(1, &[]).await;
    // Together far more than is sent at once, and taken in one round.
    let text = "x".repeat(60 << 10);
    let mut all = tokio::task::JoinSet::new();
    for n in 0..250 {
        let spec = OrganizationSpec { display_name: text.clone(), ..OrganizationSpec::default() };
        let (region, intent) = (region.clone(), create::<Organization>(None, &format!("organization-{n}"), spec));
        all.spawn(async move { submit(&region, intent).await });
    }
    while let Some(done) = timeout(LONG, all.join_next()).await.unwrap() {
        done.unwrap().unwrap();
    }
    let most = lossy.most.load(Ordering::SeqCst);
    assert!((1 << 20..6 << 20).contains(&most), "{most} bytes were on their way at once");
    began_once(&region).await;
    running.end().await;
    lossy.store.shutdown().await;
}
