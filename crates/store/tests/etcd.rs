//! The etcd engine: the contract suite against a real etcd, alone and as three members with TLS and users, and what is
//! special about it. Built with the feature `etcd`; needs Debian's `etcd-server` and `etcd-client`.
#![cfg(feature = "etcd")]

#[path = "common/etcd.rs"]
mod etcd;

/// The suite without the clusters of the embedded engine.
mod common {
    #[path = "contract.rs"]
    pub mod contract;

    pub use super::etcd::until;
}

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use common::contract::Handle;
use common::until;
use etcd::{Etcd, Shape};
use nexus_env::{Env, FaultyTransport, Links};
use nexus_store::etcd::EtcdStore;
use nexus_store::{Compare, Op, RangeRequest, Revision, Store, StoreError, Txn};

/// Keeps the cluster while a case runs, and closes the case's stores.
struct Guard {
    stores: [Arc<EtcdStore>; 2],
    _etcd: Arc<Etcd>,
}

impl Guard {
    async fn stop(self) {
        for store in self.stores {
            store.shutdown().await;
        }
    }
}

/// Every case has a group of its own in a cluster that all share, so groups are shown to be apart as well.
async fn make(place: &'static Mutex<Weak<Etcd>>, shape: Shape) -> (Guard, Handle, Handle) {
    static GROUPS: AtomicU64 = AtomicU64::new(0);
    let group = format!("case-{}", GROUPS.fetch_add(1, Ordering::Relaxed));
    let etcd = tokio::task::spawn_blocking(move || etcd::shared(place, shape)).await.unwrap();
    let one = etcd.open(1, &group).await;
    let two = etcd.open(2, &group).await;
    (Guard { stores: [one.clone(), two.clone()], _etcd: etcd }, one, two)
}

mod one_member {
    use super::*;

    static CLUSTER: Mutex<Weak<Etcd>> = Mutex::new(Weak::new());

    async fn make() -> (Guard, Handle, Handle) {
        super::make(&CLUSTER, Shape::ONE).await
    }

    crate::contract!(make);
}

mod three_members_with_tls_and_users {
    use super::*;

    static CLUSTER: Mutex<Weak<Etcd>> = Mutex::new(Weak::new());

    async fn make() -> (Guard, Handle, Handle) {
        super::make(&CLUSTER, Shape::THREE_SECURE).await
    }

    crate::contract!(make);
}

async fn start(shape: Shape) -> Arc<Etcd> {
    tokio::task::spawn_blocking(move || Arc::new(Etcd::start(shape))).await.unwrap()
}

/// The one of some stores that leads, and its epoch.
async fn leader(stores: &[Arc<EtcdStore>]) -> (usize, u64) {
    until("a leader", async || {
        stores.iter().enumerate().find_map(|(i, s)| {
            let now = *s.leadership().borrow();
            now.is_self.then_some((i, now.epoch))
        })
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_takes_too_few_operations_is_refused_with_the_remedy() {
    let etcd = start(Shape { max_ops: 128, ..Shape::ONE }).await;
    let refused = EtcdStore::open(etcd.config(1, "g"), Env::real()).await.err();
    assert!(matches!(&refused, Some(StoreError::Invalid(m)) if m.contains("--max-txn-ops")), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_committed_is_found_again_with_its_revisions_by_a_new_server() {
    let etcd = start(Shape::ONE).await;
    let store = etcd.open(1, "g").await;
    for i in 0..300 {
        store.txn(Txn::put(format!("k{}", i % 150), vec![b'v'; 2_000])).await.unwrap();
    }
    let lease = store.lease_grant(Duration::from_secs(60)).await.unwrap();
    let leased = Op::Put { key: "leased".into(), value: "v".into(), lease: Some(lease) };
    store.txn(Txn::new(vec![], vec![leased, Op::delete("k3")])).await.unwrap();
    let before = store.range(RangeRequest::prefix("")).await.unwrap();
    assert_eq!((before.revision, before.kvs.len()), (Revision(301), 150));
    store.shutdown().await;
    assert_eq!(store.txn(Txn::put("a", "b")).await, Err(StoreError::Closed));

    let again = etcd.open(2, "g").await;
    assert_eq!(again.range(RangeRequest::prefix("")).await.unwrap(), before);
    assert_eq!(again.status().await.oldest, Revision(301));
    until("both servers to be known", async || {
        let members = again.status().await.members;
        let servers: Vec<_> = members.iter().map(|(node, m)| (*node, m.endpoint.as_str())).collect();
        (servers == [(1, "server-1"), (2, "server-2")]).then_some(())
    })
    .await;
    again.forget_server(1).await.unwrap();
    until("the server to be forgotten", async || (again.status().await.members.len() == 1).then_some(())).await;
    let mut watch = again.watch("leased".into(), "leased\0".into(), Revision(301)).await.unwrap();
    again.lease_revoke(lease).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(30), watch.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(ended.revision, Revision(302));
    again.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_passes_on_and_its_epoch_grows() {
    let etcd = start(Shape::ONE).await;
    let links = Links::new();
    links.name(&etcd.endpoints()[0].at, "etcd");
    let open = async |node: u64, label: &'static str| {
        let transport = FaultyTransport::new(Env::real().transport, label, links.clone());
        let env = Env::real().with_transport(Arc::new(transport));
        Arc::new(EtcdStore::open(etcd.config(node, "g"), env).await.unwrap())
    };
    let labels = ["a", "b"];
    let stores = [open(1, "a").await, open(2, "b").await];
    let (first, epoch) = leader(&stores).await;
    let other = 1 - first;
    until("the follower to know", async || {
        let seen = *stores[other].leadership().borrow();
        (seen.leader == Some(first as u64 + 1) && seen.epoch == epoch).then_some(())
    })
    .await;
    // Cut off from etcd, the leader steps down by its own clock; the other takes over.
    links.cut_both(labels[first], "etcd");
    let second = until("the other to lead", async || {
        let now = *stores[other].leadership().borrow();
        now.is_self.then_some(now.epoch)
    })
    .await;
    assert!(second > epoch);
    assert!(!stores[first].leadership().borrow().is_self, "two lead at once");
    let cut = stores[first].txn(Txn::put("k", "v")).await.unwrap_err();
    assert!(cut.is_unknown() || cut.is_retryable(), "{cut:?}");
    let stale = stores[first].range(RangeRequest::get("k").stale()).await.unwrap();
    assert_eq!(stale.kvs, []);
    links.heal_all();
    until("the first to follow", async || {
        let seen = *stores[first].leadership().borrow();
        (seen.leader == Some(other as u64 + 1) && seen.epoch == second).then_some(())
    })
    .await;
    // A leader that goes says so, and what was unknown is settled.
    stores[other].shutdown().await;
    let (third, last) = leader(&stores).await;
    assert!(third == first && last > second);
    stores[first].txn(Txn::put("k", "v2")).await.unwrap();
    stores[first].shutdown().await;
}

/// Clients count up one key by compare, while etcd's members are killed and started again: no count is lost, none is
/// made twice, and revisions go on by one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_acknowledged_is_lost_or_done_twice_when_etcd_members_are_killed() {
    let etcd = start(Shape { members: 3, ..Shape::ONE }).await;
    let stores = [etcd.open(1, "g").await, etcd.open(2, "g").await];
    stores[0].txn(Txn::put("n", "0")).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let counters: Vec<_> = (0..4)
        .map(|i| {
            let (store, stop) = (stores[i % 2].clone(), stop.clone());
            tokio::spawn(async move {
                let (mut sure, mut unknown) = (0u64, 0u64);
                while !stop.load(Ordering::Relaxed) {
                    let Ok(found) = store.range(RangeRequest::get("n")).await else { continue };
                    let kv = &found.kvs[0];
                    let n: u64 = std::str::from_utf8(&kv.value).unwrap().parse().unwrap();
                    let next = Op::put("n", (n + 1).to_string());
                    match store.txn(Txn::new(vec![Compare::mod_revision("n", kv.mod_revision)], vec![next])).await {
                        Ok(outcome) => sure += u64::from(outcome.is_committed()),
                        Err(e) if e.is_unknown() => unknown += 1,
                        Err(e) => assert!(e.is_retryable(), "{e:?}"),
                    }
                }
                (sure, unknown)
            })
        })
        .collect();
    for member in [0, 1, 2, 0] {
        tokio::time::sleep(Duration::from_millis(700)).await;
        etcd.kill(member);
        tokio::time::sleep(Duration::from_millis(700)).await;
        etcd.boot(member);
    }
    tokio::time::sleep(Duration::from_millis(700)).await;
    stop.store(true, Ordering::Relaxed);
    let (mut sure, mut unknown) = (0, 0);
    for counter in counters {
        let (s, u) = counter.await.unwrap();
        sure += s;
        unknown += u;
    }
    let found = until("etcd to answer", async || stores[1].range(RangeRequest::get("n")).await.ok()).await;
    let n: u64 = std::str::from_utf8(&found.kvs[0].value).unwrap().parse().unwrap();
    println!("{sure} counts acknowledged, {unknown} unknown, {n} found");
    assert!(sure > 0 && (sure..=sure + unknown).contains(&n), "{sure} + {unknown} != {n}");
    assert_eq!(found.revision, Revision(n + 1), "one revision for each change");
    for store in &stores {
        store.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_changed_behind_our_back_and_a_compacted_history_are_survived() {
    let etcd = start(Shape::ONE).await;
    let store = etcd.open(1, "g").await;
    store.txn(Txn::put("a", "1")).await.unwrap();
    etcd.ctl(&["del", "/nexus/g/k/a"]);
    store.txn(Txn::put("b", "2")).await.unwrap();
    until("the copy to be loaded again", async || {
        let found = store.range(RangeRequest::prefix("")).await.ok()?;
        (found.kvs.len() == 1 && found.kvs[0].key == "b").then_some(())
    })
    .await;
    etcd.ctl(&["compact", "3"]);
    let next = store.txn(Txn::put("c", "3")).await.unwrap();
    assert_eq!(next.revision(), Revision(3));
    let mut watch = store.watch("".into(), "".into(), Revision(2)).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().revision, Revision(3));
    store.shutdown().await;
}
