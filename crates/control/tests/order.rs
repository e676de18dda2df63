//! Transactions that are begun one after another, each comparing what the one before leaves, all commit: also when they fill
//! many log entries.

mod common;

use bytes::Bytes;
use common::net::{End, LONG, env};
use futures::StreamExt;
use futures::stream::FuturesOrdered;
use nexus_store::{Compare, Op, Store, Txn, TxnOutcome};

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_chain_of_transactions_may_be_begun_at_once() {
    let store = End::alone().open(&env(1), "local", &[1]).await;
    let deadline = tokio::time::Instant::now() + LONG;
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
