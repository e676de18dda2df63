//! Power cuts at random instants on a disk that drops and tears what was not synced: every acknowledged write is found.

mod common;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Cluster, seed};
use nexus_env::{Disk, RngExt, SeededRng};
use nexus_store::{Op, Pressure, RangeRequest, Store, StoreError, Txn};

const CRASHES: usize = 120;

/// What each key must hold: at least the acknowledged value; perhaps one whose outcome is unknown.
type Ledger = Arc<Mutex<BTreeMap<String, (u64, u64)>>>;

async fn load(store: Arc<dyn Store>, writer: u64, counter: Arc<AtomicU64>, stop: Arc<AtomicBool>, ledger: Ledger) {
    while !stop.load(Ordering::SeqCst) {
        let value = counter.fetch_add(1, Ordering::SeqCst);
        let keys = [format!("w{writer}/a"), format!("w{writer}/b{}", value % 7)];
        for key in &keys {
            ledger.lock().unwrap().entry(key.clone()).or_default().1 = value;
        }
        let padding = "x".repeat((value % 900) as usize);
        let ops = keys.iter().map(|k| Op::put(k.clone(), format!("{value}:{padding}"))).collect();
        match store.txn(Txn::new(vec![], ops)).await {
            Ok(_) => {
                for key in &keys {
                    ledger.lock().unwrap().entry(key.clone()).or_default().0 = value;
                }
            }
            Err(e @ (StoreError::TooLarge { .. } | StoreError::Invalid(_))) => panic!("{e}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

async fn check(store: &dyn Store, ledger: &Ledger, seed: u64) {
    let found = common::until("a member that can be read", async || {
        // An election may take its time on a loaded machine; only an answer can be wrong.
        match store.range(RangeRequest::prefix("w")).await {
            Ok(found) => Some(found),
            Err(e) if e.is_retryable() => None,
            Err(e) => panic!("seed {seed}: {e}"),
        }
    })
    .await;
    let found: BTreeMap<String, u64> = found
        .kvs
        .iter()
        .map(|kv| {
            let value = String::from_utf8_lossy(&kv.value).split(':').next().unwrap().parse().unwrap();
            (String::from_utf8_lossy(&kv.key).into_owned(), value)
        })
        .collect();
    for (key, (acknowledged, tried)) in &*ledger.lock().unwrap() {
        let value = found.get(key).copied().unwrap_or(0);
        assert!(
            *acknowledged <= value && value <= *tried,
            "seed {seed}: {key} holds {value}, acknowledged {acknowledged}, tried {tried}"
        );
    }
}

async fn crashes(members: u64, times: usize, seed: u64) {
    let rng = SeededRng::new(seed);
    // Small segments and snapshots, so that crashes strike rolling, saving and purging too.
    let cluster = Cluster::start_with(members, seed, |config| {
        config.segment_bytes = 20_000;
        config.snapshot_after_bytes = 60_000;
    })
    .await;
    let ledger: Ledger = Arc::default();
    let counter = Arc::new(AtomicU64::new(1));
    for _ in 0..times {
        cluster.leader().await;
        let stop = Arc::new(AtomicBool::new(false));
        let writers: Vec<_> = (0..4)
            .map(|w| {
                let store = cluster.node(1 + w % members);
                tokio::spawn(load(store, w, counter.clone(), stop.clone(), ledger.clone()))
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(rng.below(60))).await;
        for node in cluster.ids() {
            cluster.kill(node).await;
        }
        stop.store(true, Ordering::SeqCst);
        for writer in writers {
            writer.await.unwrap();
        }
        for node in cluster.ids() {
            cluster.boot(node).await.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        }
        check(&*cluster.node(1), &ledger, seed).await;
    }
    let written = counter.load(Ordering::SeqCst);
    assert!(written > times as u64 * 4, "the load was no load: {written}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_when_the_power_fails() {
    crashes(1, CRASHES, seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_when_all_three_members_lose_power() {
    crashes(3, 6, seed()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_log_is_refused_with_its_place() {
    let cluster = Cluster::start(1, 5).await;
    cluster.leader().await;
    for i in 0..40 {
        cluster.node(1).txn(Txn::put(format!("k{i}"), "v".repeat(500))).await.unwrap();
    }
    cluster.stop().await;
    // The first segment ends as soon as there is one with room. Frames have zeros in them too, so what is looked for is
    // where they end, well behind the place of the damage.
    let disk = &cluster.disks[&1];
    let logs = ["1", "2"].map(|n| format!("/data/store/wal-{n:0>16}.log"));
    let written =
        |log: &String| Disk::read(disk, log.as_ref()).is_ok_and(|bytes| bytes.iter().skip(8_000).any(|b| *b != 0));
    let log = logs.into_iter().find(written).expect("a segment with so much in it");
    disk.flip_bit(log.as_ref(), 3_000).unwrap();
    match cluster.boot(1).await.err() {
        Some(StoreError::Corrupt { path, .. }) => assert_eq!(path, log),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_of_a_newer_release_is_refused() {
    let cluster = Cluster::start(1, 5).await;
    cluster.stop().await;
    let disk = &cluster.disks[&1];
    nexus_env::write_atomic(disk, "/data/store/FORMAT".as_ref(), b"nexus-store 2\n").unwrap();
    let refused = cluster.boot(1).await.err();
    assert!(matches!(refused, Some(StoreError::NewerFormat { found: 2, supported: 1, .. })), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nearly_full_disk_refuses_growth_but_not_deletes() {
    let cluster = Cluster::start_with(1, 5, |config| {
        config.reserve_bytes = 1 << 20;
        // The log's own room leaves most of the disk.
        config.segment_bytes = 20_000;
    })
    .await;
    cluster.leader().await;
    let store = cluster.node(1);
    store.txn(Txn::put("k", "v")).await.unwrap();
    cluster.disks[&1].set_capacity(Some(400 << 10));
    let refused = common::until("the disk to be found full", async || {
        store.txn(Txn::put(format!("grow-{}", store.status().await.applied), "w")).await.err()
    })
    .await;
    assert!(matches!(refused, StoreError::Full(_)), "{refused}");
    assert!(matches!(store.status().await.pressure, Pressure::Full(_)));
    store.txn(Txn::put("k", "w")).await.expect("what takes no more room is no growth");
    store.txn(Txn::delete("k")).await.unwrap();
    cluster.disks[&1].set_capacity(None);
    // It clears by itself, without anything being written.
    common::until("room again", async || (store.status().await.pressure == Pressure::None).then_some(())).await;
    store.txn(Txn::put("k", "w")).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_sync_stops_the_member_and_opening_again_goes_on() {
    let cluster = Cluster::start(1, 5).await;
    cluster.leader().await;
    let store = cluster.node(1);
    store.txn(Txn::put("k", "before")).await.unwrap();
    let fault = nexus_env::Fault {
        op: nexus_env::DiskOp::Sync,
        path_part: "wal-".into(),
        kind: std::io::ErrorKind::Other,
        times: 1,
    };
    cluster.disks[&1].inject(fault);
    assert!(store.txn(Txn::put("k", "lost")).await.is_err());
    let refused = store.txn(Txn::put("k", "later")).await.unwrap_err();
    assert!(matches!(refused, StoreError::Storage(_)), "{refused}");
    assert!(store.status().await.failure.is_some());
    cluster.kill(1).await;
    cluster.boot(1).await.unwrap();
    let found = cluster.node(1).range(RangeRequest::get("k")).await.unwrap();
    assert!(["before", "lost"].map(|v| v.as_bytes()).contains(&&*found.kvs[0].value));
    cluster.stop().await;
}

/// A leader sends entries to its followers before its own disk has them. One that came back in its old term could give
/// the place of an entry that it has lost, but they have, to another. So it comes back as a follower.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_restarts_never_resumes_its_term() {
    for members in [1, 3] {
        let cluster = Cluster::start(members, 5).await;
        let mut highest = 0;
        for _ in 0..3 {
            let leader = cluster.leader().await;
            let epoch = cluster.node(leader).leadership().borrow().epoch;
            assert!(epoch > highest, "{members} members: term {epoch} after {highest}");
            highest = epoch;
            cluster.node(leader).txn(Txn::put("k", "v")).await.unwrap();
            for node in cluster.ids() {
                cluster.kill(node).await;
            }
            for node in cluster.ids() {
                cluster.boot(node).await.unwrap();
            }
        }
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_leader_is_replaced_and_catches_up_when_it_is_back() {
    let cluster = Cluster::start_with(3, 5, |config| {
        config.segment_bytes = 20_000;
        config.snapshot_after_bytes = 60_000;
    })
    .await;
    let dead = cluster.leader().await;
    cluster.node(dead).txn(Txn::put("k", "before")).await.unwrap();
    cluster.kill(dead).await;
    let started = std::time::Instant::now();
    let other = cluster.node(cluster.others(dead)[0]);
    common::until("writes again", async || other.txn(Txn::put("k", "after")).await.ok()).await;
    println!("writes again after {:?}", started.elapsed());
    // Far enough that the log it needs is gone and it has to take a snapshot.
    for i in 0..600 {
        other.txn(Txn::put(format!("k{}", i % 10), "v".repeat(500))).await.unwrap();
    }
    let newest = other.status().await.applied;
    let back = cluster.boot(dead).await.unwrap();
    common::until("the member to catch up", async || (back.status().await.applied >= newest).then_some(())).await;
    let request = || RangeRequest::prefix("").stale();
    assert_eq!(back.range(request()).await.unwrap().kvs, other.range(request()).await.unwrap().kvs);
    cluster.stop().await;
}
