//! Partial connectivity. Raft by itself may elect nobody for ever while a majority is alive and some server reaches it: these
//! are the three cases of Ng, Haridi and Carbone, "Omni-Paxos: Breaking the Barriers of Partial Connectivity" (EuroSys
//! 2023), on five servers, and links drawn by lot. As servers pass messages on for each other, writes must resume at every
//! server that reaches a majority and is reached by it, over whatever detour.
//!
//! * *Quorum loss*: all links are gone but those of one server. The leader is another: it has lost its quorum, but the one
//!   in the middle still hears it.
//! * *Constrained election*: the same, the leader is cut off wholly, and the one in the middle lacks the newest entries, so
//!   it can't be elected at once.
//! * *Chained*: the links form a line. The ends don't hear each other and would overthrow the leader in turn.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use nexus_store::{Store, Txn};
use tokio::time::{Instant, sleep, timeout};

use crate::chance::Dice;
use crate::world::World;

/// Writes resume within this under any connectivity that allows them.
const RESUMES_WITHIN: Duration = Duration::from_secs(12);
/// And then go on: no pause is longer than this.
const NO_PAUSE_OVER: Duration = Duration::from_secs(5);
const HELD: Duration = Duration::from_secs(10);
const PROPERTY: &str = "writes resume while some server reaches a majority";

/// Cuts the links in a shape and watches whether writes go on.
pub async fn torment(world: &Arc<World>, dice: &Dice) {
    let Some(leader) = world.leader() else {
        world.trace.violation("the store recovers when faults end", "there is no leader to begin with");
        return;
    };
    let others: Vec<u64> = world.nodes.iter().copied().filter(|n| *n != leader).collect();
    let middle = *dice.pick(&others).expect("there are four others");
    let name = match world.seed / 6 % 4 {
        0 => {
            keep_only(world, |a, b| a == middle || b == middle);
            "quorum loss"
        }
        1 => {
            // The one in the middle misses a while.
            for other in world.nodes.iter().filter(|n| **n != middle) {
                world.net.cut_both(middle, *other);
            }
            sleep(Duration::from_millis(1_500)).await;
            world.net.heal_all();
            keep_only(world, |a, b| (a == middle || b == middle) && a != leader && b != leader);
            "constrained election"
        }
        2 => {
            let mut line = others.clone();
            line.insert(dice.below(line.len() as u64 + 1) as usize, leader);
            let place = |n: u64| line.iter().position(|x| *x == n).unwrap_or(0);
            keep_only(world, |a, b| place(a).abs_diff(place(b)) == 1);
            "chained"
        }
        _ => {
            for a in &world.nodes {
                for b in world.nodes.iter().filter(|b| *b != a) {
                    if dice.chance(550) {
                        world.net.cut(*a, *b);
                    }
                }
            }
            "random links"
        }
    };
    let able = able(world);
    world.trace.fault(&format!("shape: {name}"), format_args!("leader {leader}, middle {middle}, able {able:?}"));
    let mut watched = tokio::task::JoinSet::new();
    for node in able {
        watched.spawn(writes_at(world.clone(), node, name));
    }
    if watched.is_empty() {
        sleep(HELD).await;
    }
    while watched.join_next().await.is_some() {}
}

fn keep_only(world: &World, keep: impl Fn(u64, u64) -> bool) {
    for a in &world.nodes {
        for b in world.nodes.iter().filter(|b| *b != a && !keep(*a, **b)) {
            world.net.cut(*a, *b);
        }
    }
}

/// Servers that are in a majority whose members all reach each other by detours.
fn able(world: &World) -> Vec<u64> {
    let reach = |from: u64| -> BTreeSet<u64> {
        let mut seen = BTreeSet::from([from]);
        let mut edge = vec![from];
        while let Some(at) = edge.pop() {
            for next in &world.nodes {
                // A question needs its answer's way as well, over the same stations.
                let open = !world.net.is_cut(at, *next) && !world.net.is_cut(*next, at);
                if open && seen.insert(*next) {
                    edge.push(*next);
                }
            }
        }
        seen
    };
    world.nodes.iter().copied().filter(|n| reach(*n).len() > world.nodes.len() / 2).collect()
}

async fn writes_at(world: Arc<World>, node: u64, shape: &str) {
    let began = Instant::now();
    let mut last = began;
    let mut first: Option<Duration> = None;
    let mut why = "no answer".to_owned();
    let mut n = 0u64;
    loop {
        let limit = if first.is_some() { NO_PAUSE_OVER } else { RESUMES_WITHIN };
        if last.elapsed() > limit {
            let state = if first.is_some() { "paused" } else { "did not resume" };
            let text = format!("{shape}: at server {node} writes {state} for {:?}: {why}", last.elapsed());
            world.trace.violation(PROPERTY, text);
            return;
        }
        if began.elapsed() > RESUMES_WITHIN + HELD {
            break;
        }
        n += 1;
        if let Some(server) = world.server(node) {
            let put = server.door.txn(Txn::put(format!("shape/{node}"), n.to_string()));
            match timeout(Duration::from_secs(4), put).await {
                Ok(Ok(_)) => {
                    first.get_or_insert(began.elapsed());
                    last = Instant::now();
                }
                Ok(Err(error)) => why = error.to_string(),
                Err(_) => "no answer in 4 s".clone_into(&mut why),
            }
        }
        sleep(Duration::from_millis(200)).await;
    }
    world.trace.count("servers that write on under partial connectivity");
    world.trace.note(format_args!("{shape}: server {node} writes again after {:?}", first.unwrap_or_default()));
}
