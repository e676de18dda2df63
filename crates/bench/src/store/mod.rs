//! The metadata store beside etcd: three members of each as processes on this machine, mutual TLS between all, on the
//! same disk, driven by the same loader in turns. Each client has one operation outstanding, and clients are spread
//! over the members and over as many connections. Then what only concerns ours: a large state, and a leader's death.

pub mod cluster;
pub mod pki;
pub mod server;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use tokio::task::JoinSet;

use self::cluster::{Cluster, Conn, Kind, MEMBERS};
use crate::process;
use crate::report::{Row, median, percentile};

const VALUE: usize = 1_024;
/// Keys that are written and read; clients have their own.
const KEYS: usize = 10_000;
const CLIENTS: [usize; 3] = [1, 64, 256];
const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(4);
const WARM_UP: Duration = Duration::from_secs(1);
/// Clients on one connection, at most.
const PER_CONNECTION: usize = 16;
const MILLION: usize = 1_000_000;
const DEADLINE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Write,
    Read,
}

/// What one round came to.
#[derive(Debug, Clone, Copy)]
struct Round {
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
    syncs_per_op: f64,
    cpu_per_op: f64,
}

pub fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?)
}

fn key(i: usize) -> Bytes {
    format!("bench/{i:08}").into()
}

/// Connections enough for so many clients, spread over the members.
fn connections(cluster: &Cluster, clients: usize) -> anyhow::Result<Vec<Conn>> {
    let count = clients.div_ceil(PER_CONNECTION).max(clients.min(MEMBERS));
    (0..count).map(|i| cluster.connect(i % MEMBERS)).collect()
}

/// Drives a cluster for a time; answers what each operation took, in milliseconds.
async fn drive(conns: &[Conn], work: Work, clients: usize, time: Duration) -> anyhow::Result<Vec<f64>> {
    let mut tasks = JoinSet::new();
    let until = Instant::now() + time;
    for client in 0..clients {
        let conn = conns[client % conns.len()].clone();
        tasks.spawn(async move {
            let value = Bytes::from(vec![b'a' + (client % 26) as u8; VALUE]);
            let mut took = Vec::new();
            let mut next = client;
            while Instant::now() < until {
                next = (next + clients) % KEYS;
                let begun = Instant::now();
                match work {
                    Work::Write => conn.put(&[(key(next), value.clone())], DEADLINE).await?,
                    Work::Read => {
                        let length = conn.get(key(next)).await?;
                        anyhow::ensure!(length == VALUE, "a value of {length} bytes was read");
                    }
                }
                took.push(begun.elapsed().as_secs_f64() * 1e3);
            }
            Ok::<_, anyhow::Error>(took)
        });
    }
    let mut all = Vec::new();
    while let Some(done) = tasks.join_next().await {
        all.extend(done??);
    }
    Ok(all)
}

async fn round(cluster: &Cluster, work: Work, clients: usize) -> anyhow::Result<Round> {
    let conns = connections(cluster, clients)?;
    drive(&conns, work, clients, WARM_UP).await?;
    let (syncs, cpu, begun) = (cluster.syncs().await?, cluster.cpu_seconds(), Instant::now());
    let took = drive(&conns, work, clients, ROUND).await?;
    let seconds = begun.elapsed().as_secs_f64();
    let (syncs, cpu) = (cluster.syncs().await? - syncs, cluster.cpu_seconds() - cpu);
    conns.iter().for_each(Conn::close);
    let count = took.len() as f64;
    Ok(Round {
        per_second: count / seconds,
        p50_ms: percentile(&took, 0.5),
        p99_ms: percentile(&took, 0.99),
        syncs_per_op: syncs / count,
        cpu_per_op: cpu / count,
    })
}

/// Rounds of both in turns.
async fn compare(
    ours: &Cluster,
    etcd: &Cluster,
    work: Work,
    clients: usize,
    rows: &mut Vec<Row>,
) -> anyhow::Result<()> {
    let mut rounds: [Vec<Round>; 2] = [Vec::new(), Vec::new()];
    for turn in 0..ROUNDS {
        // Whoever went first last time goes second.
        for side in [turn % 2, 1 - turn % 2] {
            let done = round([ours, etcd][side], work, clients).await?;
            eprintln!("{work:?} {clients} {}: {done:.3?}", ["nexus", "etcd"][side]);
            rounds[side].push(done);
        }
    }
    let of = |side: usize, figure: fn(&Round) -> f64| median(&rounds[side].iter().map(figure).collect::<Vec<_>>());
    let what = match work {
        Work::Write => "durable writes",
        Work::Read => "linearizable reads",
    };
    let mut add = |name: &str, unit, figure: fn(&Round) -> f64| {
        let row = Row::new(format!("{what}, {clients} clients{name}"), of(0, figure), unit);
        rows.push(row.peer("etcd", of(1, figure)));
    };
    add("", "1/s", |r| r.per_second);
    add(", p50", "ms", |r| r.p50_ms);
    add(", p99", "ms", |r| r.p99_ms);
    add(", syncs per operation", "1", |r| r.syncs_per_op);
    add(", processor time of the members per operation", "us", |r| r.cpu_per_op * 1e6);
    Ok(())
}

/// How long nobody can write after the leader was killed.
async fn failover(kind: Kind) -> anyhow::Result<f64> {
    let mut cluster = Cluster::start(kind, &[]).await?;
    let mut gaps = Vec::new();
    for _ in 0..ROUNDS {
        let leader = cluster.leader().await?;
        cluster.kill(leader);
        let begun = Instant::now();
        cluster.wait_writable().await?;
        gaps.push(begun.elapsed().as_secs_f64());
        cluster.boot(leader)?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        cluster.wait_writable().await?;
    }
    eprintln!("{} without a leader: {gaps:.2?}", kind.name());
    Ok(median(&gaps))
}

/// Writes many keys, a hundred in a transaction, with 32 clients.
async fn fill(cluster: &Cluster, member: usize, keys: usize) -> anyhow::Result<()> {
    let next = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..32 {
        let (conn, next) = (cluster.connect(member)?, next.clone());
        tasks.spawn(async move {
            loop {
                let first = next.fetch_add(100, Ordering::Relaxed) as usize;
                if first >= keys {
                    return Ok::<_, anyhow::Error>(());
                }
                // Values differ, as real ones do.
                let value = |i: usize| Bytes::from(format!("{i:016}").repeat(VALUE / 16));
                let puts: Vec<_> = (first..(first + 100).min(keys)).map(|i| (key(i), value(i))).collect();
                conn.put(&puts, Duration::from_secs(60)).await?;
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

/// A million keys: a follower that comes late, a restart of all, and memory.
async fn large(rows: &mut Vec<Row>) -> anyhow::Result<()> {
    let late = MEMBERS - 1;
    let mut cluster = Cluster::start(Kind::Ours, &[late]).await?;
    let begun = Instant::now();
    fill(&cluster, 0, MILLION).await?;
    rows.push(Row::new(
        "1,000,000 keys written, 100 a transaction",
        MILLION as f64 / begun.elapsed().as_secs_f64(),
        "keys/s",
    ));
    let revision = cluster.info(0).await?.revision;
    let begun = Instant::now();
    cluster.boot(late)?;
    wait_revision(&cluster, late, revision).await?;
    rows.push(Row::new("1,000,000 keys: a new follower catches up", begun.elapsed().as_secs_f64(), "s"));
    (0..MEMBERS).for_each(|m| cluster.kill(m));
    let begun = Instant::now();
    for member in 0..MEMBERS {
        cluster.boot(member)?;
    }
    let member = cluster.wait_writable().await?;
    let length = cluster.connect(member)?.get(key(MILLION - 1)).await?;
    rows.push(Row::new("1,000,000 keys: all killed, to serving again", begun.elapsed().as_secs_f64(), "s"));
    anyhow::ensure!(length == VALUE, "the last key has {length} bytes");
    for member in 0..MEMBERS {
        wait_revision(&cluster, member, revision).await?;
    }
    let peaks = (0..MEMBERS).filter_map(|m| memory(cluster.pid(m)?, "VmHWM"));
    rows.push(Row::new("1,000,000 keys: largest member's peak", peaks.fold(0.0, f64::max) / f64::from(1 << 20), "MiB"));
    Ok(())
}

async fn wait_revision(cluster: &Cluster, member: usize, revision: u64) -> anyhow::Result<()> {
    let begun = Instant::now();
    while cluster.info(member).await.map_or(0, |i| i.revision) < revision {
        if begun.elapsed() > Duration::from_secs(300) {
            bail!("member {member} does not catch up");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// A figure of `/proc/PID/status`, in bytes.
pub fn memory(pid: u32, field: &str) -> Option<f64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix(" kB")?.trim().parse::<f64>().ok()? * 1024.0)
}

pub fn run() -> anyhow::Result<Vec<Row>> {
    process::run(std::process::Command::new("etcd").arg("--version")).context("the peer: Debian's etcd-server")?;
    // Parts by name, for whoever works on one of them.
    let parts = std::env::var("NEXUS_BENCH_PARTS").unwrap_or_else(|_| "write,read,failover,large".into());
    let wanted = |part: &str| parts.split(',').any(|p| p == part);
    runtime()?.block_on(async {
        let mut rows = Vec::new();
        if wanted("write") || wanted("read") {
            let (ours, etcd) = (Cluster::start(Kind::Ours, &[]).await?, Cluster::start(Kind::Etcd, &[]).await?);
            for cluster in [&ours, &etcd] {
                let member = cluster.wait_writable().await?;
                let conn = cluster.connect(member)?;
                for first in (0..KEYS).step_by(100) {
                    let puts: Vec<_> = (first..first + 100).map(|i| (key(i), vec![b'v'; VALUE].into())).collect();
                    conn.put(&puts, DEADLINE).await?;
                }
            }
            for (part, work) in [("write", Work::Write), ("read", Work::Read)] {
                for clients in CLIENTS {
                    if wanted(part) {
                        compare(&ours, &etcd, work, clients, &mut rows).await?;
                    }
                }
            }
        }
        if wanted("failover") {
            let (ours, etcd) = (failover(Kind::Ours).await?, failover(Kind::Etcd).await?);
            rows.push(Row::new("leader killed, to the next write", ours, "s").peer("etcd", etcd));
        }
        if wanted("large") {
            large(&mut rows).await?;
        }
        Ok(rows)
    })
}
