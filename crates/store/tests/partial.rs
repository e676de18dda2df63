//! Members whose links are half broken: chains, stars, cables that are cut in one direction. Whenever a majority is
//! connected by any chain of links, every member of it can write; and whoever returns disrupts nobody.
//!
//! The cases with five members are those of OmniPaxos (Ng, Haridi, Carbone, EuroSys 2023, section 2), in which plain Raft
//! loses its leader for good or changes it without end. Time is virtual here, so waiting costs nothing.

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{Cluster, seed, until};
use nexus_env::{RngExt, SeededRng};
use nexus_store::{RangeRequest, Store, Txn};
use tokio::time::{Instant, sleep};

/// Longer than any election takes.
const SETTLED: Duration = Duration::from_secs(20);

async fn cluster(size: u64) -> (Cluster, u64) {
    let seed = seed();
    let cluster = Cluster::start_virtual(size, seed, Duration::from_millis(4)).await;
    // A group is formed when its members know each other.
    all_write(&cluster, cluster.ids(), "first").await;
    (cluster, seed)
}

/// Writes at a member until it is acknowledged; answers how long that took.
async fn writes(cluster: &Cluster, node: u64, key: &str) -> Duration {
    let begun = Instant::now();
    let store = cluster.node(node);
    let deadline = begun + SETTLED;
    while let Err(e) = store.txn(Txn::put(key.to_owned(), "v")).await {
        if Instant::now() > deadline {
            let mut seen = Vec::new();
            for node in cluster.ids() {
                let s = cluster.node(node).status().await;
                seen.push((node, s.leader, s.epoch, s.applied.0, s.failure));
            }
            panic!("{key}: a write at {node} fails: {e}; members (leader, epoch, revision): {seen:?}");
        }
        sleep(Duration::from_millis(10)).await;
    }
    begun.elapsed()
}

async fn all_write(cluster: &Cluster, nodes: impl IntoIterator<Item = u64>, what: &str) {
    for node in nodes {
        let took = writes(cluster, node, &format!("{what}/{node}")).await;
        assert!(took < SETTLED, "{what}: a write at {node} took {took:?}");
    }
}

async fn epochs(cluster: &Cluster) -> BTreeSet<u64> {
    let mut epochs = BTreeSet::new();
    for node in cluster.ids() {
        epochs.insert(cluster.node(node).status().await.epoch);
    }
    epochs
}

/// Lets time pass and says whether anyone was elected meanwhile.
async fn stays_calm(cluster: &Cluster, time: Duration) -> bool {
    let before = epochs(cluster).await;
    let end = Instant::now() + time;
    while Instant::now() < end {
        sleep(Duration::from_millis(100)).await;
        if epochs(cluster).await != before {
            return false;
        }
    }
    before.len() == 1
}

#[tokio::test(start_paused = true)]
async fn a_chain_of_three_works_like_a_full_mesh_whoever_leads() {
    let (cluster, seed) = cluster(3).await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    // The leader at an end, and in the middle.
    for chain in [[leader, others[0], others[1]], [others[0], leader, others[1]], [others[0], others[1], leader]] {
        cluster.wires.only(&chain, &[(chain[0], chain[1]), (chain[1], chain[2])]);
        sleep(Duration::from_secs(2)).await;
        all_write(&cluster, chain, &format!("chain {chain:?}")).await;
        assert!(stays_calm(&cluster, Duration::from_secs(10)).await, "seed {seed}: {chain:?} changes leaders");
    }
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn chains_and_stars_of_five_work_like_a_full_mesh() {
    let (cluster, seed) = cluster(5).await;
    let leader = cluster.leader().await;
    let rng = SeededRng::new(seed);
    for round in 0..4 {
        let mut order = cluster.ids();
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i as u64 + 1) as usize);
        }
        let chain: Vec<_> = order.windows(2).map(|w| (w[0], w[1])).collect();
        let star: Vec<_> = order[1..].iter().map(|leaf| (order[0], *leaf)).collect();
        for (what, links) in [("chain", chain), ("star", star)] {
            cluster.wires.only(&order, &links);
            sleep(Duration::from_secs(3)).await;
            all_write(&cluster, order.clone(), &format!("{what} {round} {order:?} from leader {leader}")).await;
            assert!(stays_calm(&cluster, Duration::from_secs(5)).await, "seed {seed}: {what} {order:?}");
        }
    }
    cluster.stop().await;
}

/// Quorum loss: everyone is connected to one member only, which is not the leader.
#[tokio::test(start_paused = true)]
async fn a_leader_that_lost_its_quorum_but_for_one_link_does_not_stop_the_group() {
    let (cluster, seed) = cluster(5).await;
    let leader = cluster.leader().await;
    let hub = cluster.others(leader)[0];
    let links: Vec<_> = cluster.ids().into_iter().filter(|n| *n != hub).map(|n| (hub, n)).collect();
    cluster.wires.only(&cluster.ids(), &links);
    all_write(&cluster, cluster.ids(), "quorum loss").await;
    assert!(stays_calm(&cluster, Duration::from_secs(10)).await, "seed {seed}");
    cluster.stop().await;
}

/// Constrained election: the leader is gone, and the only member that is connected to a majority has an old log.
#[tokio::test(start_paused = true)]
async fn a_hub_with_an_old_log_lets_another_be_elected() {
    let (cluster, seed) = cluster(5).await;
    let leader = cluster.leader().await;
    let hub = cluster.others(leader)[0];
    let others = cluster.others(hub);
    cluster.wires.cut_off(hub, others.clone());
    for i in 0..20 {
        writes(&cluster, leader, &format!("new/{i}")).await;
    }
    let links: Vec<_> = others.iter().filter(|n| **n != leader).map(|n| (hub, *n)).collect();
    cluster.wires.only(&cluster.ids(), &links);
    let connected = cluster.others(leader);
    all_write(&cluster, connected.clone(), "constrained").await;
    for node in connected {
        let found = cluster.node(node).range(RangeRequest::prefix("new/")).await.unwrap();
        assert_eq!(found.kvs.len(), 20, "seed {seed}: acknowledged writes are there at {node}");
    }
    cluster.stop().await;
}

/// Its heartbeats still reach everyone, so that nobody would look for another leader.
#[tokio::test(start_paused = true)]
async fn a_leader_that_hears_nobody_gives_up() {
    let (cluster, seed) = cluster(5).await;
    let old = cluster.leader().await;
    let others = cluster.others(old);
    for other in &others {
        cluster.wires.cut(*other, old);
    }
    let new = until("another leader", async || {
        others.iter().copied().find(|n| cluster.node(*n).leadership().borrow().is_self)
    })
    .await;
    assert!(!cluster.node(old).leadership().borrow().is_self, "seed {seed}: {old} beside {new}");
    all_write(&cluster, others, "deaf leader").await;
    cluster.wires.heal();
    all_write(&cluster, cluster.ids(), "healed").await;
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn cables_that_are_cut_in_one_direction_are_gone_around() {
    let (cluster, seed) = cluster(5).await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    cluster.wires.cut(leader, others[0]);
    cluster.wires.cut(others[1], leader);
    cluster.wires.cut(others[2], others[3]);
    sleep(Duration::from_secs(2)).await;
    all_write(&cluster, cluster.ids(), "one-way").await;
    assert!(stays_calm(&cluster, Duration::from_secs(10)).await, "seed {seed}");
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_member_that_returns_disrupts_nobody() {
    let (cluster, seed) = cluster(3).await;
    let leader = cluster.leader().await;
    let away = cluster.others(leader)[0];
    let others = cluster.others(away);
    let epoch = cluster.node(leader).status().await.epoch;
    for round in 0..3 {
        cluster.wires.cut_off(away, others.clone());
        sleep(Duration::from_secs(15)).await;
        writes(&cluster, leader, &format!("while-away/{round}")).await;
        cluster.wires.heal();
        writes(&cluster, away, &format!("returned/{round}")).await;
        let now = cluster.node(leader).status().await;
        assert!(now.is_leader && now.epoch == epoch, "seed {seed}: epoch {epoch} became {}", now.epoch);
    }
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn whoever_is_connected_to_a_majority_by_any_chain_can_write() {
    let (cluster, seed) = cluster(5).await;
    let rng = SeededRng::new(seed);
    cluster.leader().await;
    for round in 0..12 {
        let (ids, mut links) = (cluster.ids(), Vec::new());
        for (i, a) in ids.iter().enumerate() {
            for b in &ids[i + 1..] {
                if rng.below(100) < 40 {
                    links.push((*a, *b));
                }
            }
        }
        // Grows from each member along the links.
        let part = |start: u64| {
            let mut part = BTreeSet::from([start]);
            loop {
                let more: Vec<u64> = links
                    .iter()
                    .filter_map(|(a, b)| match (part.contains(a), part.contains(b)) {
                        (true, false) => Some(*b),
                        (false, true) => Some(*a),
                        _ => None,
                    })
                    .collect();
                if more.is_empty() {
                    return part;
                }
                part.extend(more);
            }
        };
        let Some(majority) = ids.iter().map(|n| part(*n)).find(|p| p.len() > ids.len() / 2) else { continue };
        cluster.wires.only(&ids, &links);
        all_write(&cluster, majority, &format!("seed {seed} round {round} {links:?}")).await;
    }
    cluster.wires.heal();
    all_write(&cluster, cluster.ids(), "healed").await;
    cluster.stop().await;
}
