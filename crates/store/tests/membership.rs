//! Members that come, go and are replaced while clients write; and what is refused so that nobody loses the group.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use common::load::Load;
use common::{Cluster, failure, seed, until};
use nexus_store::{RangeRequest, Store, StoreError, Txn};
use tokio::time::sleep;

async fn cluster(size: u64) -> Arc<Cluster> {
    let cluster = Arc::new(Cluster::start_virtual(size, seed(), Duration::from_millis(4)).await);
    cluster.leader().await;
    cluster
}

fn endpoint(node: u64) -> String {
    format!("mem:{node}")
}

async fn voters(cluster: &Cluster, at: u64) -> Vec<u64> {
    let members = cluster.node(at).status().await.members;
    members.into_iter().filter(|(_, m)| m.voter).map(|(id, _)| id).collect()
}

/// Waits until a member knows these voters: one that is not the leader hears of them a little later.
async fn votes(cluster: &Cluster, at: u64, wanted: impl AsRef<[u64]>) {
    let wanted = wanted.as_ref();
    until(&format!("voters {wanted:?}"), async || (voters(cluster, at).await == wanted).then_some(())).await;
}

#[tokio::test(start_paused = true)]
async fn three_members_grow_to_five_under_load() {
    let cluster = cluster(3).await;
    let load = Load::start(&cluster, &[1, 2, 3]);
    for new in [4, 5] {
        cluster.join(new).await.unwrap();
        // Any member may be asked, again too.
        cluster.node(2).add_learner(new, endpoint(new)).await.unwrap();
        cluster.node(3).add_learner(new, endpoint(new)).await.unwrap();
        cluster.node(new).promote(new).await.unwrap();
        cluster.node(1).promote(new).await.unwrap();
    }
    votes(&cluster, 5, [1, 2, 3, 4, 5]).await;
    let health = until("a look at every clock", async || {
        let health = cluster.node(4).members_health().await.unwrap();
        health.iter().all(|m| m.clock_skew_ms.is_some()).then_some(health)
    })
    .await;
    assert!(health.iter().all(|m| m.voter && m.reachable && m.matched.is_some()), "{health:?}");
    assert!(health.iter().all(|m| m.clock_skew_ms.is_some_and(|ms| ms.abs() < 60_000)), "{health:?}");
    // Two of five may go now.
    let leader = cluster.leader().await;
    let gone: Vec<u64> = [1, 2, 3].into_iter().filter(|n| *n != leader).collect();
    for node in &gone {
        cluster.kill(*node).await;
    }
    load.goes_on("the change").await;
    load.end(&cluster, &[leader, 4, 5]).await;
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_dead_member_is_replaced_under_load() {
    let cluster = cluster(3).await;
    let leader = cluster.leader().await;
    let dead = cluster.others(leader)[0];
    let alive = cluster.others(dead);
    let load = Load::start(&cluster, &alive);
    cluster.kill(dead).await;
    cluster.join(4).await.unwrap();
    cluster.node(alive[1]).replace(dead, 4, endpoint(4)).await.unwrap();
    cluster.node(alive[0]).replace(dead, 4, endpoint(4)).await.unwrap();
    votes(&cluster, leader, [alive[0], alive[1], 4]).await;
    load.goes_on("the change").await;
    load.end(&cluster, &[alive[0], alive[1], 4]).await;
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_removed_makes_room_and_notices_that_it_is_out() {
    let cluster = cluster(3).await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    let load = Load::start(&cluster, &others);
    cluster.node(leader).remove(leader).await.unwrap();
    cluster.node(others[0]).remove(leader).await.unwrap();
    votes(&cluster, others[1], &others).await;
    let reason = failure(&*cluster.node(leader)).await;
    assert!(reason.contains("removed"), "{reason}");
    assert!(matches!(cluster.node(leader).txn(Txn::put("k", "v")).await, Err(StoreError::Storage(_))));
    load.goes_on("the change").await;
    load.end(&cluster, &others).await;
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_loses_its_vote_makes_room_and_reads_along() {
    let cluster = cluster(3).await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    let load = Load::start(&cluster, &others);
    cluster.node(leader).demote(leader).await.unwrap();
    cluster.node(others[0]).demote(leader).await.unwrap();
    votes(&cluster, others[1], &others).await;
    load.goes_on("the change").await;
    // Nobody asks it any more: with one of the two voters gone nothing is written, and a vote given back helps.
    let last = others[1];
    cluster.kill(others[0]).await;
    cluster.node(last).demote(last).await.unwrap_err();
    cluster.boot(others[0]).await.unwrap();
    cluster.leader().await;
    // A new leader has to hear first how far it is.
    until("its vote", async || cluster.node(others[0]).promote(leader).await.ok()).await;
    votes(&cluster, last, cluster.ids()).await;
    load.end(&cluster, &cluster.ids()).await;
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn what_would_lose_the_quorum_is_refused_with_the_reason() {
    let cluster = cluster(3).await;
    let leader = cluster.leader().await;
    let others = cluster.others(leader);
    cluster.kill(others[0]).await;
    until("the dead one to be missed", async || {
        let health = cluster.node(leader).members_health().await.ok()?;
        health.iter().any(|m| m.node == others[0] && !m.reachable).then_some(())
    })
    .await;
    // Of the two that would remain only one answers.
    let refusal = until("an answer of a leader", async || {
        let refusal = cluster.node(leader).remove(others[1]).await.unwrap_err();
        (!refusal.is_retryable()).then_some(refusal)
    })
    .await;
    assert!(matches!(&refusal, StoreError::Membership(why) if why.contains("must answer")), "{refusal}");
    assert!(matches!(cluster.node(others[1]).promote(9).await, Err(StoreError::Membership(_))));
    let taken = cluster.node(leader).add_learner(9, endpoint(others[1])).await.unwrap_err();
    assert!(matches!(&taken, StoreError::Membership(why) if why.contains("lives at")), "{taken}");
    // The dead one may go, then nobody else.
    cluster.node(leader).remove(others[0]).await.unwrap();
    cluster.node(leader).txn(Txn::put("k", "v")).await.unwrap();
    cluster.node(others[1]).remove(others[1]).await.unwrap();
    let last = cluster.node(leader).remove(leader).await.unwrap_err();
    assert!(matches!(&last, StoreError::Membership(why) if why.contains("last voter")), "{last}");
    cluster.node(leader).txn(Txn::put("k", "w")).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_member_that_was_removed_while_away_finds_out_and_comes_back_only_as_a_new_one() {
    let cluster = cluster(3).await;
    let leader = cluster.leader().await;
    let away = cluster.others(leader)[0];
    let epoch = cluster.node(leader).status().await.epoch;
    cluster.end(away).await;
    cluster.node(leader).remove(away).await.unwrap();
    cluster.boot(away).await.unwrap();
    let reason = failure(&*cluster.node(away)).await;
    assert!(reason.contains("removed") && reason.contains("data folder"), "{reason}");
    let now = cluster.node(leader).status().await;
    assert!(now.is_leader && now.epoch == epoch, "it disrupted the others");
    // With an empty folder and its old number it is a new member.
    cluster.end(away).await;
    cluster.join(away).await.unwrap();
    cluster.node(leader).add_learner(away, endpoint(away)).await.unwrap();
    cluster.node(leader).promote(away).await.unwrap();
    cluster.node(away).txn(Txn::put("back", "v")).await.unwrap();
    votes(&cluster, away, [1, 2, 3]).await;
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn others_commit_while_a_new_member_gets_a_large_snapshot() {
    let seed = seed();
    let mut cluster = Cluster::start_virtual(3, seed, Duration::from_millis(4)).await;
    // The log is cut early, so that a new member can't be brought up by it.
    cluster.adjust = |config| config.snapshot_after_bytes = 1 << 20;
    for node in cluster.ids() {
        cluster.end(node).await;
        cluster.boot(node).await.unwrap();
    }
    let cluster = Arc::new(cluster);
    let leader = cluster.leader().await;
    for i in 0..600 {
        let size = if i % 60 == 0 { 1_000_000 } else { 10 };
        let txn = Txn::put(format!("big/{i:03}"), vec![i as u8; size]);
        until("a write", async || cluster.node(leader).txn(txn.clone()).await.ok()).await;
    }
    until("a snapshot", async || (cluster.node(leader).status().await.snapshot_bytes > 5_000_000).then_some(())).await;
    let load = Load::start(&cluster, &[1, 2, 3]);
    let before = load.count();
    cluster.join(4).await.unwrap();
    cluster.node(leader).add_learner(4, endpoint(4)).await.unwrap();
    let during = load.count() - before;
    assert!(cluster.node(4).status().await.snapshot_bytes > 5_000_000, "seed {seed}: it came by snapshot");
    assert!(during > 5, "seed {seed}: {during} writes while the snapshot was sent");
    let found = cluster.node(4).range(RangeRequest::prefix("big/")).await.unwrap();
    assert_eq!(found.kvs.len(), 600);
    load.goes_on("the change").await;
    load.end(&cluster, &[4]).await;
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_leader_hands_over_before_it_stops() {
    let cluster = cluster(3).await;
    let leader = cluster.leader().await;
    let begun = tokio::time::Instant::now();
    assert!(cluster.node(leader).hand_over().await);
    let next = cluster.leader().await;
    assert_ne!(next, leader);
    // In virtual time: less than the silence after which a dead leader is replaced.
    assert!(begun.elapsed() < Duration::from_millis(1_000), "{:?}", begun.elapsed());
    cluster.node(leader).txn(Txn::put("k", "v")).await.unwrap();
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn members_of_an_earlier_generation_are_fenced_and_stop() {
    let cluster = cluster(3).await;
    cluster.node(1).txn(Txn::put("k", "v")).await.unwrap();
    // What a recovery from one survivor does to its folder; the membership is left out here.
    cluster.end(1).await;
    let disk = cluster.disks[&1].clone().mount();
    nexus_env::write_atomic(&disk, "/data/store/generation".as_ref(), b"2\n").unwrap();
    drop(disk);
    let survivor = cluster.boot(1).await.unwrap();
    for node in [2, 3] {
        let reason = failure(&*cluster.node(node)).await;
        assert!(reason.contains("fenced") && reason.contains("generation 2"), "{reason}");
    }
    let status = survivor.status().await;
    assert_eq!((status.generation, status.failure, status.is_leader), (2, None, false));
    cluster.stop().await;
}

static NEWEST: AtomicU32 = AtomicU32::new(1);

#[tokio::test(start_paused = true)]
async fn the_feature_level_rises_only_when_every_release_supports_it() {
    fn releases(config: &mut nexus_store::embedded::Config) {
        config.feature_level = if config.node == 3 { NEWEST.load(Ordering::SeqCst) } else { 2 };
    }
    let mut cluster = Cluster::start_virtual(3, seed(), Duration::from_millis(4)).await;
    cluster.adjust = releases;
    for node in [1, 2, 3] {
        cluster.end(node).await;
        cluster.boot(node).await.unwrap();
    }
    until("a look at every release", async || {
        let health = cluster.node(1).members_health().await.ok()?;
        health.iter().all(|m| m.feature_level > 0).then_some(())
    })
    .await;
    // Some rounds of the leader's, in virtual time.
    sleep(Duration::from_secs(5)).await;
    let status = cluster.node(1).status().await;
    assert_eq!((status.feature_level, status.supported_level), (1, 2));
    NEWEST.store(2, Ordering::SeqCst);
    cluster.end(3).await;
    cluster.boot(3).await.unwrap();
    for node in [1, 2, 3] {
        until("the level", async || (cluster.node(node).status().await.feature_level == 2).then_some(())).await;
    }
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_member_of_an_older_release_stops_before_it_reads_what_it_cannot() {
    static RELEASE: AtomicU32 = AtomicU32::new(2);
    fn releases(config: &mut nexus_store::embedded::Config) {
        config.feature_level = if config.node == 3 { RELEASE.load(Ordering::SeqCst) } else { 2 };
    }
    let mut cluster = Cluster::start_virtual(3, seed(), Duration::from_millis(4)).await;
    cluster.adjust = releases;
    for node in [1, 2, 3] {
        cluster.end(node).await;
        cluster.boot(node).await.unwrap();
    }
    for node in [1, 2, 3] {
        until("the level", async || (cluster.node(node).status().await.feature_level == 2).then_some(())).await;
    }
    RELEASE.store(1, Ordering::SeqCst);
    cluster.end(3).await;
    // What it has to read may be in its snapshot, or in the log after it.
    if let Ok(old) = cluster.boot(3).await {
        let reason = failure(&*old).await;
        assert_eq!(old.status().await.feature_level, 1, "{reason}");
        cluster.end(3).await;
    }
    RELEASE.store(2, Ordering::SeqCst);
    let back = cluster.boot(3).await.unwrap();
    until("the level again", async || (back.status().await.feature_level == 2).then_some(())).await;
    cluster.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_group_whose_founder_is_lost_before_its_first_entry_says_who_was_to_begin_it() {
    let cluster = Arc::new(Cluster::unbegun(3, seed(), Duration::from_millis(4)));
    for node in [2, 3] {
        cluster.boot(node).await.unwrap();
    }
    let two = cluster.node(2);
    for error in [
        two.txn(Txn::put("k", "v")).await.unwrap_err(),
        two.range(RangeRequest::get("k")).await.unwrap_err(),
        two.remove(3).await.unwrap_err(),
    ] {
        let StoreError::NoLeader { reason } = &error else { panic!("{error:?}") };
        assert!(reason.contains("never begun") && reason.contains("member 1 at mem:1"), "{reason}");
        assert!(reason.contains("take it out of the founding members"), "{reason}");
        assert!(error.is_retryable());
    }
    // A member that waits to be taken in says that instead.
    let waiting = cluster.join(4).await.unwrap();
    assert!(waiting.unbegun().is_some_and(|why| why.contains("waits to be added")));

    // What it advises helps: without the lost one, the next begins the group.
    for node in [2, 3] {
        cluster.end(node).await;
    }
    let cluster = Arc::new(Arc::into_inner(cluster).unwrap().without(1));
    for node in [2, 3] {
        cluster.boot(node).await.unwrap();
    }
    cluster.leader().await;
    let (two, three) = (cluster.node(2), cluster.node(3));
    two.txn(Txn::put("k", "v")).await.unwrap();
    votes(&cluster, 3, [2, 3]).await;
    // A group that has begun and has lost its majority is not mistaken for one that never did.
    cluster.kill(2).await;
    let error = three.txn(Txn::put("k", "w")).await.unwrap_err();
    assert!(!error.to_string().contains("never begun") && three.unbegun().is_none(), "{error:?}");
    cluster.stop().await;
}
