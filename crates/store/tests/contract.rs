//! The contract suite on the embedded engine: alone, and as three members asked at a follower and the leader.

mod common;

use common::Cluster;
use common::contract::Handle;

mod one_member {
    use super::*;

    async fn make() -> (Cluster, Handle, Handle) {
        let cluster = Cluster::start(1, 1).await;
        let store: Handle = cluster.node(1);
        (cluster, store.clone(), store)
    }

    crate::contract!(make);
}

mod three_members {
    use super::*;

    async fn make() -> (Cluster, Handle, Handle) {
        let cluster = Cluster::start(3, 1).await;
        let leader = cluster.leader().await;
        let follower = cluster.ids().into_iter().find(|n| *n != leader).unwrap();
        let (leader, follower): (Handle, Handle) = (cluster.node(leader), cluster.node(follower));
        (cluster, leader, follower)
    }

    crate::contract!(make);
}

/// Opening a watch once held the position's guard while it took the state's lock, and applying did it the other way
/// round: the member stood still for good. A thread keeps time, because a runtime whose threads are stuck can't.
#[test]
fn watches_can_be_opened_while_changes_are_applied() {
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
        runtime.block_on(async {
            let cluster = Cluster::start(1, 1).await;
            cluster.leader().await;
            let store: Handle = cluster.node(1);
            let writers: Vec<_> = (0..8)
                .map(|writer| {
                    let store = store.clone();
                    tokio::spawn(async move {
                        for i in 0..400 {
                            store.txn(nexus_store::Txn::put(format!("k{writer}"), i.to_string())).await.unwrap();
                        }
                    })
                })
                .collect();
            let openers: Vec<_> = (0..4)
                .map(|_| {
                    let store = store.clone();
                    tokio::spawn(async move {
                        for _ in 0..5_000 {
                            let current = store.status().await.applied;
                            store.watch("k".into(), bytes::Bytes::new(), current).await.unwrap();
                            tokio::task::yield_now().await;
                        }
                    })
                })
                .collect();
            for task in writers.into_iter().chain(openers) {
                task.await.unwrap();
            }
            cluster.stop().await;
        });
        tx.send(()).unwrap();
    });
    rx.recv_timeout(std::time::Duration::from_secs(60)).expect("the store goes on");
}
