//! Watches of the metadata store: 5,000 over the wire from three members, a thousand writes a second, each seen by ten.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::report::{Row, percentile};
use crate::store::cluster::{Cluster, Conn, Kind, MEMBERS};
use crate::store::{memory, runtime, server};

const WATCHERS: usize = 5_000;
/// Watchers of one prefix.
const TOGETHER: usize = 10;
/// Streams on one connection; a server admits 256.
const PER_CONNECTION: usize = 200;
const RATE: usize = 1_000;
const SECONDS: usize = 20;
const VALUE: usize = 1_024;
/// How long the last events may take, before they count as lost.
const PATIENCE: Duration = Duration::from_secs(60);

type Batch = (u64, Vec<Bytes>);

/// What all watchers saw.
#[derive(Default)]
struct Seen {
    events: AtomicU64,
    /// Events that came twice or in the wrong order.
    wrong: AtomicU64,
    delays_ms: Mutex<Vec<f64>>,
}

async fn watch(conn: Conn, prefix: Bytes, after: u64, start: Instant, seen: Arc<Seen>) -> anyhow::Result<()> {
    let Conn::Ours(client) = conn else { anyhow::bail!("only for ours") };
    let mut stream = client.stream::<_, Batch>(server::WATCH, &(prefix, after)).await?;
    let mut last = after;
    let mut delays = Vec::new();
    while let Some(batch) = stream.next().await {
        let (revision, values) = batch?;
        let now = start.elapsed().as_nanos() as u64;
        if revision <= last {
            seen.wrong.fetch_add(1, Ordering::Relaxed);
        }
        last = revision;
        for value in &values {
            let sent =
                value.get(..8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes).context("a short value")?;
            delays.push(now.saturating_sub(sent) as f64 / 1e6);
        }
        seen.events.fetch_add(values.len() as u64, Ordering::Relaxed);
        if delays.len() >= 16 {
            seen.delays_ms.lock().expect("nobody panics with it").append(&mut delays);
        }
    }
    Ok(())
}

fn resident(cluster: &Cluster) -> f64 {
    (0..MEMBERS).filter_map(|m| memory(cluster.pid(m)?, "VmRSS")).sum()
}

async fn measure() -> anyhow::Result<Vec<Row>> {
    let cluster = Cluster::start(Kind::Ours, &[]).await?;
    let leader = cluster.leader().await?;
    let writers: Vec<Conn> = (0..8).map(|i| cluster.connect((leader + i) % MEMBERS)).collect::<Result<_, _>>()?;
    let prefixes = WATCHERS / TOGETHER;
    let name = |group: usize| -> Bytes { format!("watched/{group:05}/").into() };
    for group in 0..prefixes {
        let key = Bytes::from([&name(group)[..], b"k"].concat());
        writers[group % 8].put(&[(key, Bytes::from(vec![0; VALUE]))], PATIENCE).await?;
    }
    let start = Instant::now();
    let seen = Arc::new(Seen::default());
    let after = cluster.info(leader).await?.revision;
    let before = resident(&cluster);
    let conns: Vec<Conn> =
        (0..WATCHERS.div_ceil(PER_CONNECTION)).map(|i| cluster.connect(i % MEMBERS)).collect::<Result<_, _>>()?;
    let mut watchers = JoinSet::new();
    for i in 0..WATCHERS {
        let conn = conns[i / PER_CONNECTION].clone();
        watchers.spawn(watch(conn, name(i / TOGETHER), after, start, seen.clone()));
    }
    let open = async {
        loop {
            let mut sum = 0;
            for member in 0..MEMBERS {
                sum += cluster.info(member).await?.watchers;
            }
            if sum as usize >= WATCHERS {
                return Ok::<_, anyhow::Error>(());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, open).await.context("opening the watches")??;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let per_watcher = (resident(&cluster) - before) / WATCHERS as f64;

    let cpu = cluster.cpu_seconds();
    let writes = RATE * SECONDS;
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    let mut tasks = JoinSet::new();
    let begun = Instant::now();
    for burst in 0..writes / (RATE / 100) {
        tick.tick().await;
        for i in 0..RATE / 100 {
            let number = burst * (RATE / 100) + i;
            let conn = writers[number % 8].clone();
            let key = Bytes::from([&name(number * 7 % prefixes)[..], b"k"].concat());
            tasks.spawn(async move {
                let mut value = vec![b'v'; VALUE];
                value[..8].copy_from_slice(&(start.elapsed().as_nanos() as u64).to_be_bytes());
                conn.put(&[(key, value.into())], PATIENCE).await
            });
        }
        while let Some(done) = tasks.try_join_next() {
            done??;
        }
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    let took = begun.elapsed().as_secs_f64();
    let expected = (writes * TOGETHER) as u64;
    let last = Instant::now();
    while seen.events.load(Ordering::Relaxed) < expected && last.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Whatever came too often would come now.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let cpu = cluster.cpu_seconds() - cpu;
    let events = seen.events.load(Ordering::Relaxed);
    ensure!(events == expected, "{events} events came of {expected}");
    let wrong = seen.wrong.load(Ordering::Relaxed);
    ensure!(wrong == 0, "{wrong} events came in the wrong order");
    watchers.abort_all();
    let delays = seen.delays_ms.lock().expect("nobody panics with it").clone();
    Ok(vec![
        Row::new("watchers", WATCHERS as f64, "1"),
        Row::new("writes", writes as f64 / took, "1/s"),
        Row::new("events delivered, of all that were to be", events as f64 / expected as f64 * 100.0, "%")
            .cpu_per_op(cpu / events as f64),
        Row::new("from before the write to the event, p50", percentile(&delays, 0.5), "ms"),
        Row::new("from before the write to the event, p99", percentile(&delays, 0.99), "ms"),
        Row::new("memory of the servers per watcher", per_watcher / 1024.0, "KiB"),
    ])
}

pub fn run() -> anyhow::Result<Vec<Row>> {
    runtime()?.block_on(measure())
}
