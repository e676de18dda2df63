//! Transactions that are begun one after another, each comparing what the one before leaves, all commit: also when they fill
//! many log entries.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use nexus_env::{Env, MemDisk};
use nexus_store::embedded::{Config, EmbeddedStore, PeerRef, Peers};
use nexus_store::{Compare, GroupId, Op, PeerError, Store, Txn, TxnOutcome};

struct Alone;

#[async_trait]
impl Peers for Alone {
    async fn call(&self, _: &PeerRef, _: &GroupId, _: Bytes) -> Result<Bytes, PeerError> {
        Err(PeerError::Unreachable("there is nobody else".into()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_chain_of_transactions_may_be_begun_at_once() {
    let env = Env::real().with_disk(Arc::new(MemDisk::new(1)));
    let members = BTreeMap::from([(1, "node-1".to_owned())]);
    let config = Config::new(1, "local".parse().unwrap(), "/data", members);
    let store = EmbeddedStore::open(config, env, Arc::new(Alone)).await.unwrap();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while let Err(error) = store.txn(Txn::put("chain", "0")).await {
        assert!(tokio::time::Instant::now() < deadline, "{error}");
    }
    assert!(store.keeps_order());
    let value = Bytes::from(vec![b'x'; 300 << 10]);
    for round in 0..20 {
        // Three of them fill an entry.
        let links = (round * 16..round * 16 + 16).map(|n: u64| {
            let ops = vec![Op::put("chain", (n + 1).to_string()), Op::put(format!("value/{}", n % 16), value.clone())];
            store.txn(Txn::new(vec![Compare::value("chain", n.to_string())], ops))
        });
        let mut flight: FuturesOrdered<_> = links.collect();
        while let Some(outcome) = flight.next().await {
            assert!(matches!(outcome.unwrap(), TxnOutcome::Committed { .. }), "the chain broke in round {round}");
        }
    }
    store.shutdown().await;
}
