//! A real process on the real disk, killed with -9 a hundred times under load: every acknowledged write is found.
//!
//! The test binary runs itself again as the victim, which prints each write when it is acknowledged.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use nexus_env::{Env, RealRng, RngExt};
use nexus_store::embedded::{Config, EmbeddedStore, PeerRef, Peers};
use nexus_store::{GroupId, Op, PeerError, RangeRequest, Store, StoreError, Txn};

const KILLS: usize = 100;
const DIR: &str = "NEXUS_STORE_KILL_DIR";
const WRITERS: usize = 8;

struct Nobody;

#[async_trait]
impl Peers for Nobody {
    async fn call(&self, _: &PeerRef, _: &GroupId, _: Bytes) -> Result<Bytes, PeerError> {
        Err(PeerError::Unreachable("alone".into()))
    }
}

async fn open(dir: &str) -> EmbeddedStore {
    let mut config = Config::new(1, GroupId::new("test").unwrap(), dir, BTreeMap::from([(1, "alone".into())]));
    // Small, so that kills strike rolling, saving and purging too.
    config.segment_bytes = 100_000;
    config.snapshot_after_bytes = 300_000;
    config.reserve_bytes = 0;
    EmbeddedStore::open(config, Env::real(), Arc::new(Nobody)).await.unwrap()
}

/// Not a test of its own: it is the victim when its folder is given, and nothing otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn victim() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let store = Arc::new(open(&dir).await);
    let round: u64 = RealRng.u64();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let store = store.clone();
            tokio::spawn(async move {
                for i in 0u64.. {
                    let (key, value) = (format!("w{writer}/{}", i % 50), format!("{round}-{i}"));
                    let padding = "x".repeat((i % 800) as usize);
                    let ops = vec![Op::put(key.clone(), format!("{value}:{padding}"))];
                    println!("try {key} {value}");
                    match store.txn(Txn::new(vec![], ops)).await {
                        Ok(_) => println!("ack {key} {value}"),
                        // A machine that is busy with other things: what was tried may be there or not.
                        Err(
                            StoreError::NoLeader { .. } | StoreError::Unavailable { .. } | StoreError::Unknown { .. },
                        ) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_acknowledged_write_is_lost_to_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store").to_str().unwrap().to_owned();
    let said = dir.path().join("said");
    // Per key: what it may hold now, that is the last acknowledged value or one tried after it.
    let mut allowed: BTreeMap<String, Vec<String>> = BTreeMap::new();
    // Keys that were acknowledged once, or found once.
    let mut present: BTreeSet<String> = BTreeSet::new();
    let mut acknowledged = 0;
    for kill in 0..KILLS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "victim", "--nocapture"])
            .env(DIR, &path)
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&said).unwrap())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (tx, rx) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if tx.send(line).is_err() {
                    break;
                }
            }
        });
        // Load first, then some instant.
        let mut seen = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(30);
        while !seen.iter().any(|l: &String| l.starts_with("ack ")) {
            let left = deadline.saturating_duration_since(Instant::now());
            seen.push(rx.recv_timeout(left).unwrap_or_else(|error| {
                panic!("kill {kill}: the victim writes no more ({error}): {}", std::fs::read_to_string(&said).unwrap())
            }));
        }
        std::thread::sleep(Duration::from_micros(RealRng.below(60_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        reader.join().unwrap();
        seen.extend(rx.try_iter());
        for line in &seen {
            // The test harness writes its own lines, one of them in front of the victim's first.
            let Some(start) = line.find("try ").or_else(|| line.find("ack ")) else { continue };
            let words: Vec<&str> = line[start..].split_whitespace().collect();
            match words[..] {
                ["try", key, value] => allowed.entry(key.into()).or_default().push(value.into()),
                ["ack", key, value] => {
                    acknowledged += 1;
                    present.insert(key.into());
                    let values = allowed.get_mut(key).expect("tried before acknowledged");
                    let place = values.iter().position(|v| v == value).expect("tried before acknowledged");
                    values.drain(..place);
                }
                _ => {}
            }
        }
        // Opening here checks every round, as a restart would.
        let store = open(&path).await;
        let found = store.range(RangeRequest::prefix("w")).await.unwrap();
        let found: BTreeMap<String, String> = found
            .kvs
            .iter()
            .map(|kv| {
                let value = String::from_utf8_lossy(&kv.value).split(':').next().unwrap().to_owned();
                (String::from_utf8_lossy(&kv.key).into_owned(), value)
            })
            .collect();
        store.shutdown().await;
        for (key, values) in &mut allowed {
            match found.get(key) {
                Some(value) => {
                    assert!(values.contains(value), "kill {kill}: {key} holds {value}, allowed {values:?}");
                    *values = vec![value.clone()];
                    present.insert(key.clone());
                }
                // Only a key whose first write was never acknowledged may be missing.
                None => assert!(!present.contains(key), "kill {kill}: {key} is lost"),
            }
        }
    }
    println!("{acknowledged} acknowledged writes");
    assert!(acknowledged > KILLS, "the load was no load");
}
