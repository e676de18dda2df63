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
