//! What every engine promises, as cases over any [`Store`]. `store` and `other` are two handles on the same empty group:
//! for a replicated engine on different members, else the same.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nexus_store::{
    Compare, Consistency, KeyValue, LeaseId, Op, RangeRequest, Revision, Store, StoreError, Txn, TxnOutcome, Watch,
    WatchBatch, WatchEvent, prefix_end,
};

use super::until;

pub type Handle = Arc<dyn Store>;

async fn commit(store: &Handle, txn: Txn) -> Revision {
    match store.txn(txn).await.unwrap() {
        TxnOutcome::Committed { revision } => revision,
        other => panic!("not committed: {other:?}"),
    }
}

async fn put(store: &Handle, key: &str, value: &str) -> Revision {
    commit(store, Txn::put(key.to_owned(), value.to_owned())).await
}

async fn get(store: &Handle, key: &str) -> Option<KeyValue> {
    store.range(RangeRequest::get(key.to_owned())).await.unwrap().kvs.pop()
}

fn text(b: &Bytes) -> String {
    String::from_utf8(b.to_vec()).unwrap()
}

async fn list(store: &Handle, request: RangeRequest) -> Vec<String> {
    store.range(request).await.unwrap().kvs.iter().map(|kv| format!("{}={}", text(&kv.key), text(&kv.value))).collect()
}

/// The next batch that is more than a progress notice.
async fn next(watch: &mut Watch) -> WatchBatch {
    let wait = async {
        loop {
            let batch = watch.next().await.expect("the watch ended").unwrap();
            if !batch.events.is_empty() {
                return batch;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), wait).await.expect("an event")
}

pub async fn a_put_is_read_by_everyone_at_once(store: Handle, other: Handle) {
    for i in 0..20 {
        let value = i.to_string();
        let revision = put(&store, "k", &value).await;
        let seen = get(&other, "k").await.unwrap();
        assert_eq!((text(&seen.value), seen.mod_revision), (value, revision));
        assert_eq!(seen.create_revision, Revision(1));
    }
    commit(&other, Txn::delete("k")).await;
    assert_eq!(get(&store, "k").await, None);
    let back = put(&store, "k", "again").await;
    assert_eq!(get(&store, "k").await.unwrap().create_revision, back);
}

pub async fn revisions_count_changes_and_nothing_else(store: Handle, other: Handle) {
    assert_eq!(put(&store, "a", "1").await, Revision(1));
    let both = Txn::new(vec![], vec![Op::put("b", "1"), Op::put("c", "1"), Op::delete("a")]);
    assert_eq!(commit(&other, both).await, Revision(2));
    assert_eq!(commit(&store, Txn::delete("missing")).await, Revision(2));
    assert_eq!(commit(&store, Txn::default()).await, Revision(2));
    let last_counts = Txn::new(vec![], vec![Op::put("d", "1"), Op::delete("d"), Op::put("d", "2")]);
    assert_eq!(commit(&store, last_counts).await, Revision(3));
    assert_eq!(list(&store, RangeRequest::prefix("")).await, ["b=1", "c=1", "d=2"]);
    assert_eq!(store.status().await.keys, 3);
}

pub async fn a_transaction_is_all_or_nothing(store: Handle, other: Handle) {
    let one = put(&store, "a", "1").await;
    let try_with = async |compare: Compare| {
        let txn = Txn::new(vec![Compare::exists("a"), compare], vec![Op::put("x", "1"), Op::put("y", "1")]);
        other.txn(txn).await.unwrap()
    };
    for wrong in [
        Compare::exists("b"),
        Compare::absent("a"),
        Compare::mod_revision("a", Revision(99)),
        Compare::mod_revision("a", Revision(0)),
        Compare::value("a", "2"),
        Compare::value("b", ""),
    ] {
        assert_eq!(try_with(wrong).await, TxnOutcome::CompareFailed { revision: one, index: 1 });
        assert_eq!(list(&store, RangeRequest::prefix("")).await, ["a=1"]);
    }
    for right in [Compare::absent("b"), Compare::mod_revision("a", one), Compare::value("a", "1")] {
        assert!(try_with(right).await.is_committed());
    }
    assert!(try_with(Compare::mod_revision("b", Revision(0))).await.is_committed());
}

pub async fn only_one_of_many_rivals_wins(store: Handle, other: Handle) {
    let rivals = (0..32).map(|i| {
        let store = if i % 2 == 0 { store.clone() } else { other.clone() };
        tokio::spawn(async move {
            let txn = Txn::new(vec![Compare::absent("lock")], vec![Op::put("lock", i.to_string())]);
            store.txn(txn).await.unwrap().is_committed()
        })
    });
    let mut won = 0;
    for rival in rivals.collect::<Vec<_>>() {
        won += usize::from(rival.await.unwrap());
    }
    assert_eq!(won, 1);
}

pub async fn limits_are_enforced_and_named(store: Handle, _other: Handle) {
    let many = Txn::new(vec![], (0..129).map(|i| Op::put(format!("k{i}"), "")).collect());
    assert!(matches!(store.txn(many).await, Err(StoreError::TooLarge { .. })));
    let big = Txn::put("k", vec![0; 1024 * 1024]);
    assert!(matches!(store.txn(big).await, Err(StoreError::TooLarge { .. })));
    assert!(matches!(store.txn(Txn::put("", "v")).await, Err(StoreError::Invalid(_))));
    assert_eq!(list(&store, RangeRequest::prefix("")).await, [""; 0]);
    let most = Txn::new(vec![], (0..128).map(|i| Op::put(format!("k{i:03}"), vec![b'v'; 8_000])).collect());
    commit(&store, most).await;
    assert_eq!(store.range(RangeRequest::prefix("k")).await.unwrap().kvs.len(), 128);
}

pub async fn ranges_are_ordered_bounded_and_say_what_they_left_out(store: Handle, other: Handle) {
    for key in ["b", "a/1", "a/2", "a/3", "c"] {
        put(&store, key, "v").await;
    }
    let keys = async |request: RangeRequest| {
        let found = other.range(request).await.unwrap();
        (found.kvs.iter().map(|kv| text(&kv.key)).collect::<Vec<_>>().join(" "), found.more)
    };
    assert_eq!(keys(RangeRequest::prefix("a/")).await, ("a/1 a/2 a/3".into(), false));
    assert_eq!(keys(RangeRequest::prefix("a/").limit(2)).await, ("a/1 a/2".into(), true));
    assert_eq!(keys(RangeRequest::prefix("a/").limit(3)).await, ("a/1 a/2 a/3".into(), false));
    assert_eq!(keys(RangeRequest::prefix("a/").limit(2).reversed()).await, ("a/3 a/2".into(), true));
    assert_eq!(keys(RangeRequest::new("a/2", "c")).await, ("a/2 a/3 b".into(), false));
    assert_eq!(keys(RangeRequest::new("a/2", "")).await, ("a/2 a/3 b c".into(), false));
    assert_eq!(keys(RangeRequest::new("z", "a")).await, (String::new(), false));
    assert_eq!(keys(RangeRequest::get("a/1")).await, ("a/1".into(), false));
    assert_eq!(keys(RangeRequest::get("a/")).await, (String::new(), false));
}

pub async fn the_past_can_be_read_until_it_is_compacted(store: Handle, other: Handle) {
    for i in 1..=10 {
        put(&store, "k", &i.to_string()).await;
    }
    commit(&store, Txn::delete("k")).await;
    let at = async |revision: u64| {
        let found = other.range(RangeRequest::get("k").at(Revision(revision))).await;
        found.map(|r| r.kvs.first().map_or("-".to_owned(), |kv| text(&kv.value)))
    };
    assert_eq!(at(0).await.unwrap(), "-");
    assert_eq!(at(4).await.unwrap(), "4");
    assert_eq!(at(11).await.unwrap(), "-");
    assert!(matches!(at(12).await, Err(StoreError::FutureRevision { .. })));
    store.compact(Revision(5)).await.unwrap();
    assert_eq!(at(4).await, Err(StoreError::Compacted { oldest: Revision(5) }));
    assert_eq!(at(5).await.unwrap(), "5");
    assert_eq!(at(10).await.unwrap(), "10");
    assert!(matches!(store.compact(Revision(99)).await, Err(StoreError::FutureRevision { .. })));
    let watched = other.watch("k".into(), Bytes::new(), Revision(4)).await;
    assert_eq!(watched.err(), Some(StoreError::Compacted { oldest: Revision(5) }));
    let mut watched = other.watch("k".into(), Bytes::new(), Revision(5)).await.unwrap();
    assert_eq!(next(&mut watched).await.revision, Revision(6));
}

pub async fn a_watch_gives_every_change_of_its_range_once_and_in_order(store: Handle, other: Handle) {
    put(&store, "w/0", "old").await;
    let start = put(&store, "x", "elsewhere").await;
    let mut watches = Vec::new();
    for (from, to) in [("w/", prefix_end(b"w/")), ("w/1", Bytes::from_static(b"w/1\0")), ("", Bytes::new())] {
        watches.push(other.watch(Bytes::from(from), to, start).await.unwrap());
    }
    let writers = (0..4).map(|w| {
        let store = if w % 2 == 0 { store.clone() } else { other.clone() };
        tokio::spawn(async move {
            for i in 0..100 {
                put(&store, &format!("w/{w}"), &i.to_string()).await;
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    // A watch that starts late sees the same.
    watches.push(other.watch("w/".into(), prefix_end(b"w/"), start).await.unwrap());
    let mut seen = Vec::new();
    for (watch, expected) in watches.iter_mut().zip([400, 100, 400, 400]) {
        let mut batches = Vec::new();
        for _ in 0..expected {
            batches.push(next(watch).await);
        }
        assert!(batches.windows(2).all(|w| w[0].revision < w[1].revision && w[0].timestamp_ms < w[1].timestamp_ms));
        seen.push(batches);
    }
    assert_eq!(seen[0], seen[3]);
    assert_eq!(seen[0], seen[2]);
    let WatchEvent::Put { kv, prev } = &seen[1][0].events[0] else { panic!("a put") };
    assert_eq!((text(&kv.key), text(&kv.value), prev), ("w/1".into(), "0".into(), &None));
    commit(&store, Txn::new(vec![], vec![Op::delete("w/0"), Op::put("w/1", "end")])).await;
    let last = next(&mut watches[0]).await;
    assert_eq!(last.events.len(), 2);
    let WatchEvent::Delete { key, prev, mod_revision } = &last.events[0] else { panic!("a delete") };
    assert_eq!(
        (text(key), text(&prev.as_ref().unwrap().value), *mod_revision),
        ("w/0".into(), "99".into(), last.revision)
    );
}

pub async fn a_slow_watch_misses_nothing(store: Handle, other: Handle) {
    let mut watch = other.watch("s".into(), prefix_end(b"s"), Revision(0)).await.unwrap();
    for round in 0..20 {
        let puts = (0..100).map(|i| {
            let store = store.clone();
            tokio::spawn(async move { put(&store, &format!("s{i}"), &round.to_string()).await })
        });
        for one in puts.collect::<Vec<_>>() {
            one.await.unwrap();
        }
    }
    for i in 1..=2_000 {
        assert_eq!(next(&mut watch).await.revision, Revision(i));
    }
}

pub async fn a_lease_ends_with_its_keys_unless_kept_alive(store: Handle, other: Handle) {
    let ttl = Duration::from_secs(5);
    let (kept, left) = (store.lease_grant(ttl).await.unwrap(), other.lease_grant(ttl).await.unwrap());
    let leased = |key: &str, lease| Op::Put { key: key.to_owned().into(), value: "v".into(), lease: Some(lease) };
    commit(&other, Txn::new(vec![], vec![leased("kept", kept), leased("left", left), leased("moved", left)])).await;
    put(&store, "moved", "stays").await;
    let keeper = tokio::spawn({
        let other = other.clone();
        async move {
            loop {
                assert_eq!(other.lease_keep_alive(kept).await.unwrap(), ttl);
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    });
    until("the lease to end", async || get(&store, "left").await.is_none().then_some(())).await;
    assert_eq!(list(&store, RangeRequest::prefix("")).await, ["kept=v", "moved=stays"]);
    assert_eq!(store.lease_keep_alive(left).await, Err(StoreError::LeaseNotFound(left)));
    keeper.abort();
    store.lease_revoke(kept).await.unwrap();
    assert_eq!(list(&other, RangeRequest::prefix("")).await, ["moved=stays"]);
    assert_eq!(store.lease_revoke(kept).await, Err(StoreError::LeaseNotFound(kept)));
    let unknown = Txn::new(vec![], vec![leased("x", LeaseId(999))]);
    assert_eq!(store.txn(unknown).await, Err(StoreError::LeaseNotFound(LeaseId(999))));
}

pub async fn a_stale_read_sees_the_past_at_worst(store: Handle, other: Handle) {
    let revision = put(&store, "k", "v").await;
    let stale = RangeRequest::get("k").stale();
    assert_eq!(stale.consistency, Consistency::Stale);
    until("the change to arrive", async || {
        let found = other.range(stale.clone()).await.unwrap();
        (found.revision >= revision && found.kvs.len() == 1).then_some(())
    })
    .await;
}

/// Makes a test of every case: `contract!(factory)`, where `factory().await` gives `(guard, store, other)`.
#[macro_export]
macro_rules! contract {
    ($factory:path) => {
        $crate::contract!(@ $factory;
            a_put_is_read_by_everyone_at_once
            revisions_count_changes_and_nothing_else
            a_transaction_is_all_or_nothing
            only_one_of_many_rivals_wins
            limits_are_enforced_and_named
            ranges_are_ordered_bounded_and_say_what_they_left_out
            the_past_can_be_read_until_it_is_compacted
            a_watch_gives_every_change_of_its_range_once_and_in_order
            a_slow_watch_misses_nothing
            a_lease_ends_with_its_keys_unless_kept_alive
            a_stale_read_sees_the_past_at_worst
        );
    };
    (@ $factory:path; $($case:ident)*) => {
        $(
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $case() {
                let (guard, store, other) = $factory().await;
                $crate::common::contract::$case(store, other).await;
                guard.stop().await;
            }
        )*
    };
}
