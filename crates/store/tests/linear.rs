//! Linearizability of three members under power cuts and cut links. Clients at every member write unique values to a few
//! registers and read them; the history of each register must have an order in which each operation takes effect
//! between its call and its answer (Wing & Gong 1993, with Lowe's memoisation).

mod common;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Cluster, seed};
use nexus_env::{RngExt, SeededRng};
use nexus_store::{Compare, Op, RangeRequest, Store, Txn, TxnOutcome};

const REGISTERS: u64 = 3;
const RUN: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Read(u64),
    Write(u64),
    /// From the first to the second; `None` is an outcome that nobody knows.
    Swap(u64, u64, Option<bool>),
}

/// The place of what was no choice.
const TAKEN_AT_ONCE: usize = usize::MAX;

#[derive(Debug, Clone, Copy)]
struct Operation {
    call: u64,
    /// `u64::MAX`: no answer came, so it may take effect at any later time, or never.
    answer: u64,
    action: Action,
}

/// Whether some order explains the history of one register that starts at 0.
///
/// Two things keep the search small. What leaves the register as it is and fits it (a read of its value, a swap that
/// failed) is taken at once and never taken back, because it rules nothing out. And operations without an answer are tried
/// last: most never took effect.
fn linearizable(history: &[Operation]) -> bool {
    let mut order: Vec<usize> = (0..history.len()).collect();
    order.sort_by_key(|&i| history[i].call);
    let mut seen: HashSet<(Vec<u64>, u64)> = HashSet::new();
    let mut done = vec![0u64; history.len().div_ceil(64)];
    // Depth first: each level remembers which candidate it chose, the operation, and the register before it.
    let mut stack: Vec<(usize, usize, u64)> = Vec::new();
    let (mut at, mut value) = (0, 0);
    let is_done = |done: &[u64], i: usize| done[i / 64] >> (i % 64) & 1 == 1;
    loop {
        // What may come next: everything that was called before the first answer that is due.
        let (mut candidates, mut first_answer) = (Vec::new(), u64::MAX);
        for &i in &order {
            if is_done(&done, i) {
                continue;
            }
            if history[i].call > first_answer {
                break;
            }
            first_answer = first_answer.min(history[i].answer);
            candidates.push(i);
        }
        if first_answer == u64::MAX {
            // Only operations without an answer are left; they need not have happened.
            return true;
        }
        candidates.retain(|&i| history[i].call < first_answer);
        candidates.sort_by_key(|&i| (history[i].answer == u64::MAX, history[i].call));
        let harmless = candidates.iter().copied().find(|&i| match history[i].action {
            Action::Read(found) => found == value,
            Action::Swap(from, _, Some(false)) => from != value,
            _ => false,
        });
        if let Some(i) = harmless {
            done[i / 64] |= 1 << (i % 64);
            stack.push((TAKEN_AT_ONCE, i, value));
            at = 0;
            continue;
        }
        let mut chosen = None;
        for (place, i) in candidates.into_iter().enumerate().skip(at) {
            let next = match history[i].action {
                Action::Write(new) => Some(new),
                Action::Swap(from, to, Some(true) | None) => (from == value).then_some(to),
                Action::Read(_) | Action::Swap(_, _, Some(false)) => None,
            };
            let Some(next) = next else { continue };
            done[i / 64] |= 1 << (i % 64);
            if seen.insert((done.clone(), next)) {
                chosen = Some((place, i, next));
                break;
            }
            done[i / 64] &= !(1 << (i % 64));
        }
        match chosen {
            Some((place, i, next)) => {
                stack.push((place, i, value));
                value = next;
                at = 0;
            }
            None => loop {
                let Some((place, i, before)) = stack.pop() else { return false };
                done[i / 64] &= !(1 << (i % 64));
                value = before;
                if place != TAKEN_AT_ONCE {
                    at = place + 1;
                    break;
                }
            },
        }
    }
}

#[test]
fn the_checker_tells_good_histories_from_bad() {
    let op = |call, answer, action| Operation { call, answer, action };
    use Action::{Read, Swap, Write};
    assert!(linearizable(&[op(1, 2, Write(1)), op(3, 4, Read(1))]));
    assert!(!linearizable(&[op(1, 2, Write(1)), op(3, 4, Read(0))]));
    assert!(linearizable(&[op(1, 4, Write(1)), op(2, 3, Read(0))]));
    assert!(!linearizable(&[op(1, 9, Write(1)), op(2, 3, Read(1)), op(4, 5, Read(0))]));
    assert!(linearizable(&[op(1, u64::MAX, Write(1)), op(2, 3, Read(0)), op(4, 5, Read(1))]));
    assert!(!linearizable(&[op(1, 2, Write(1)), op(3, 4, Write(2)), op(5, 6, Read(1))]));
    assert!(!linearizable(&[op(1, 2, Swap(0, 1, Some(true))), op(3, 4, Swap(0, 2, Some(true)))]));
    assert!(linearizable(&[op(1, u64::MAX, Swap(0, 1, None)), op(3, 4, Swap(1, 2, Some(true)))]));
}

type Histories = Arc<Mutex<BTreeMap<u64, Vec<Operation>>>>;

struct Client {
    cluster: Arc<Cluster>,
    node: u64,
    rng: SeededRng,
    clock: Arc<AtomicU64>,
    values: Arc<AtomicU64>,
    histories: Histories,
    stop: Arc<AtomicBool>,
}

impl Client {
    async fn run(self) {
        let mut last = BTreeMap::new();
        while !self.stop.load(Ordering::SeqCst) {
            let Some(store) = self.cluster.try_node(self.node) else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let register = self.rng.below(REGISTERS);
            let key = format!("r{register}");
            let call = self.clock.fetch_add(1, Ordering::SeqCst);
            let new = self.values.fetch_add(1, Ordering::SeqCst);
            let from = last.get(&register).copied().unwrap_or(0);
            // What is certain not to have happened leaves no trace.
            let action = match self.rng.below(3) {
                0 => match store.range(RangeRequest::get(key)).await {
                    Err(_) => None,
                    Ok(found) => {
                        let value =
                            found.kvs.first().map_or(0, |kv| String::from_utf8_lossy(&kv.value).parse().unwrap());
                        last.insert(register, value);
                        Some((Action::Read(value), true))
                    }
                },
                1 => match store.txn(Txn::put(key, new.to_string())).await {
                    Ok(_) => Some((Action::Write(new), true)),
                    Err(e) if e.is_retryable() => None,
                    Err(_) => Some((Action::Write(new), false)),
                },
                _ => {
                    let compare = match from {
                        0 => Compare::absent(key.clone()),
                        value => Compare::value(key.clone(), value.to_string()),
                    };
                    match store.txn(Txn::new(vec![compare], vec![Op::put(key, new.to_string())])).await {
                        Ok(TxnOutcome::Committed { .. }) => Some((Action::Swap(from, new, Some(true)), true)),
                        Ok(TxnOutcome::CompareFailed { .. }) => Some((Action::Swap(from, new, Some(false)), true)),
                        Err(e) if e.is_retryable() => None,
                        Err(_) => Some((Action::Swap(from, new, None), false)),
                    }
                }
            };
            let answer = self.clock.fetch_add(1, Ordering::SeqCst);
            if let Some((action, answered)) = action {
                let operation = Operation { call, answer: if answered { answer } else { u64::MAX }, action };
                self.histories.lock().unwrap().entry(register).or_default().push(operation);
            }
            // Little pauses keep the history checkable in a blink.
            tokio::time::sleep(Duration::from_millis(self.rng.below(20))).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_members_stay_linearizable_under_power_cuts_and_cut_links() {
    let seed = seed();
    let rng = SeededRng::new(seed);
    let cluster = Arc::new(
        Cluster::start_with(3, seed, |config| {
            config.request_timeout = Duration::from_secs(2);
            config.segment_bytes = 50_000;
            config.snapshot_after_bytes = 100_000;
        })
        .await,
    );
    cluster.leader().await;
    let (clock, values) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicU64::new(1)));
    let (histories, stop) = (Histories::default(), Arc::new(AtomicBool::new(false)));
    let clients: Vec<_> = (0..6)
        .map(|i| {
            let client = Client {
                cluster: cluster.clone(),
                node: 1 + i % 3,
                rng: SeededRng::new(seed ^ i),
                clock: clock.clone(),
                values: values.clone(),
                histories: histories.clone(),
                stop: stop.clone(),
            };
            tokio::spawn(client.run())
        })
        .collect();
    let end = tokio::time::Instant::now() + RUN;
    let mut faults = BTreeMap::<&str, usize>::new();
    while tokio::time::Instant::now() < end {
        let node = 1 + rng.below(3);
        let others: BTreeSet<u64> = cluster.ids().into_iter().filter(|n| *n != node).collect();
        let fault = match rng.below(4) {
            0 => {
                cluster.kill(node).await;
                tokio::time::sleep(Duration::from_millis(rng.below(1_500))).await;
                cluster.boot(node).await.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
                "power cut"
            }
            1 => {
                cluster.wires.cut_off(node, others);
                "cut off"
            }
            2 => {
                // One direction of one cable.
                cluster.wires.cut(node, others.into_iter().nth(rng.below(2) as usize).unwrap());
                "one-way cut"
            }
            _ => {
                for node in cluster.ids() {
                    cluster.kill(node).await;
                }
                for node in cluster.ids() {
                    cluster.boot(node).await.unwrap_or_else(|e| panic!("seed {seed}: {e}"));
                }
                "all lose power"
            }
        };
        *faults.entry(fault).or_default() += 1;
        tokio::time::sleep(Duration::from_millis(300 + rng.below(1_200))).await;
        cluster.wires.heal();
        tokio::time::sleep(Duration::from_millis(500 + rng.below(1_500))).await;
    }
    stop.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    let histories = histories.lock().unwrap().clone();
    let operations: usize = histories.values().map(Vec::len).sum();
    println!("{operations} operations, faults {faults:?}");
    assert!(operations > 300, "seed {seed}: the load was no load: {operations}");
    for (register, history) in &histories {
        let (tx, rx) = std::sync::mpsc::channel();
        let copy = history.clone();
        std::thread::spawn(move || tx.send(linearizable(&copy)));
        let verdict = rx.recv_timeout(Duration::from_secs(60)).expect("the check ends");
        assert!(verdict, "seed {seed}: register {register} is not linearizable: {history:?}");
    }
    cluster.stop().await;
}
