//! The flow logs of tenants' networks on this host: what the packet filters tell is written down, and read when servers ask.
//!
//! ```text
//! packet filter ──▶ follower of the network ──▶ `new` ─(full)─▶ `old` ─(full again)─▶ gone
//! ```
//!
//! One folder for each network with two files of lines, each a flow as JSON with its number. All of them together have a bound.
//! They go when the host has no part in the network any more. What a crash tears is passed over.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_env::{Disk, Env, on_disk};
use nexus_model::plan::{FlowLogs, FlowRecord, FlowsRequest, HostFlows, HostNetworks, MAX_FLOWS, NetworkPlan};
use nexus_model::{Name, Timestamp, Uid};
use nexus_network::vpc::flows::Flow;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{AbortHandle, JoinSet};

use crate::config::NetworkEngine;

/// What all networks' files may have together, and what one of the two files of a network has at most and at least.
const ALL_BYTES: u64 = 256 << 20;
const FILE_BYTES: (u64, u64) = (256 << 10, 8 << 20);
/// Flows that wait to be written; further ones are lost, and counted.
const QUEUE: usize = 4096;
/// Written at once.
const BATCH: usize = 512;
/// After a follower has failed: the network's namespace may not be there yet.
const AGAIN: Duration = Duration::from_secs(1);
/// Questions that are answered at once: each reads the files of a network.
const READERS: usize = 2;

const NEW: &str = "new";
const OLD: &str = "old";

/// A line of a file.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    n: u64,
    #[serde(flatten)]
    flow: FlowRecord,
}

/// One network's log.
struct Log {
    dir: PathBuf,
    /// The number of the newest; held while files change places.
    last: tokio::sync::Mutex<u64>,
    /// Those that had no place.
    lost: Arc<AtomicU64>,
    /// Who has which address.
    names: Mutex<BTreeMap<IpAddr, Name>>,
}

/// The logs of this host.
#[derive(Clone)]
pub(crate) struct Flows {
    env: Env,
    dir: PathBuf,
    engine: Arc<dyn NetworkEngine>,
    logs: Arc<Mutex<BTreeMap<Uid, Arc<Log>>>>,
    /// What a file may have: less, with more networks.
    room: Arc<AtomicU64>,
    readers: Arc<Semaphore>,
}

impl Flows {
    /// Keeps its files in `dir`.
    pub fn new(env: Env, dir: PathBuf, engine: Arc<dyn NetworkEngine>) -> Self {
        let (logs, readers) = (Arc::default(), Arc::new(Semaphore::new(READERS)));
        Self { env, dir, engine, logs, room: Arc::new(AtomicU64::new(FILE_BYTES.1)), readers }
    }

    /// Follows the networks by which the host is programmed, until it is dropped.
    pub async fn run(self, mut by: watch::Receiver<Option<Arc<HostNetworks>>>) {
        let mut tasks = JoinSet::new();
        let mut followed: BTreeMap<Uid, AbortHandle> = BTreeMap::new();
        loop {
            let told = by.borrow_and_update().clone();
            if let Some(told) = told {
                let kept: Vec<&NetworkPlan> =
                    told.networks.iter().map(|n| &**n).filter(|n| n.flow_logs != FlowLogs::None).collect();
                let share = ALL_BYTES / 2 / (kept.len() as u64).max(1);
                self.room.store(share.clamp(FILE_BYTES.0, FILE_BYTES.1), Ordering::Relaxed);
                followed.retain(|uid, task| {
                    let stays = kept.iter().any(|n| n.uid == *uid);
                    if !stays {
                        task.abort();
                    }
                    stays
                });
                // What an earlier agent noted is read, though nothing is added to it.
                for uid in self.there(&told).await {
                    self.log(uid).await;
                }
                for network in kept {
                    let log = self.log(network.uid).await;
                    *log.names.lock().unwrap_or_else(PoisonError::into_inner) = names(&told, network);
                    followed
                        .entry(network.uid)
                        .or_insert_with(|| tasks.spawn(self.clone().keep(network.uid, log.clone())));
                }
            }
            while tasks.try_join_next().is_some() {}
            if by.changed().await.is_err() {
                return;
            }
        }
    }

    async fn log(&self, network: Uid) -> Arc<Log> {
        let known = self.logs().get(&network).cloned();
        if let Some(log) = known {
            return log;
        }
        let dir = self.dir.join(network.to_string());
        let (disk, at) = (self.env.disk.clone(), dir.clone());
        let last = on_disk(&self.env.disk, move || {
            let lines = [NEW, OLD].into_iter().map(|file| read(&*disk, &at.join(file)));
            lines.flatten().map(|line| line.n).max().unwrap_or(0)
        });
        let last = tokio::sync::Mutex::new(last.await.unwrap_or(0));
        let log = Arc::new(Log { dir, last, lost: Arc::default(), names: Mutex::default() });
        self.logs().entry(network).or_insert(log).clone()
    }

    fn logs(&self) -> std::sync::MutexGuard<'_, BTreeMap<Uid, Arc<Log>>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The networks of which there are files; those go that are of networks which this host has no part in.
    async fn there(&self, told: &HostNetworks) -> Vec<Uid> {
        let networks: Vec<Uid> = told.networks.iter().map(|n| n.uid).collect();
        self.logs().retain(|uid, _| networks.contains(uid));
        let (disk, dir) = (self.env.disk.clone(), self.dir.clone());
        let there = on_disk(&self.env.disk, move || {
            let mut kept = Vec::new();
            if disk.exists(&dir)? {
                for entry in disk.list(&dir)? {
                    match networks.iter().find(|uid| uid.to_string() == entry.name) {
                        Some(uid) => kept.push(*uid),
                        None => disk.remove_dir_all(&dir.join(&entry.name))?,
                    }
                }
            }
            io::Result::Ok(kept)
        });
        there.await.and_then(|there| there).unwrap_or_else(|error| {
            tracing::warn!(%error, "flow logs of networks that are gone can't be removed");
            Vec::new()
        })
    }

    /// Writes down what is told of a network, until it is aborted.
    async fn keep(self, network: Uid, log: Arc<Log>) {
        loop {
            let (out, flows) = mpsc::channel(QUEUE);
            let followed = self.engine.flows(network, out, log.lost.clone());
            let (followed, ()) = tokio::join!(followed, self.write(&log, flows));
            if let Err(error) = followed {
                tracing::debug!(%network, %error, "a network's flows can't be followed");
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn write(&self, log: &Arc<Log>, mut flows: mpsc::Receiver<Flow>) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            if flows.recv_many(&mut batch, BATCH).await == 0 {
                return;
            }
            let time = Timestamp::from_millis(self.env.now_millis());
            let mut last = log.last.lock().await;
            let mut text = Vec::new();
            let count = batch.len() as u64;
            {
                let names = log.names.lock().unwrap_or_else(PoisonError::into_inner);
                for flow in batch.drain(..) {
                    *last += 1;
                    let line = Line { n: *last, flow: record(time, flow, &names) };
                    text.extend(serde_json::to_vec(&line).expect("a flow is well-formed JSON"));
                    text.push(b'\n');
                }
            }
            let (disk, dir, room) = (self.env.disk.clone(), log.dir.clone(), self.room.load(Ordering::Relaxed));
            let written = on_disk(&self.env.disk, move || append(&*disk, &dir, &text, room));
            if let Err(error) = written.await.and_then(|written| written) {
                log.lost.fetch_add(count, Ordering::Relaxed);
                tracing::warn!(%error, "flows of a network can't be written down");
            }
        }
    }

    /// What was noted, the oldest first.
    pub async fn read(&self, request: &FlowsRequest) -> Result<HostFlows, String> {
        let _turn = self.readers.acquire().await.map_err(|_| "the host is shutting down".to_owned())?;
        let Some(log) = self.logs().get(&request.network).cloned() else { return Ok(HostFlows::default()) };
        let held = log.last.lock().await;
        let last = *held;
        // A log that was begun anew has fewer than were told of.
        let after = request.after.filter(|after| *after <= last);
        let mut answer = HostFlows { flows: Vec::new(), last, lost: log.lost.load(Ordering::Relaxed) };
        if after == Some(last) {
            return Ok(answer);
        }
        let (disk, dir, request) = (self.env.disk.clone(), log.dir.clone(), request.clone());
        let found = on_disk(&self.env.disk, move || {
            let fits = |line: &Line| {
                let of = |nic: &Option<Name>| nic.is_some() && *nic == request.nic;
                after.map_or(line.flow.time >= request.since, |after| line.n > after)
                    && (request.nic.is_none() || of(&line.flow.source_nic) || of(&line.flow.destination_nic))
            };
            let keep = request.limit.min(MAX_FLOWS) as usize;
            let mut found = VecDeque::new();
            let lines = [OLD, NEW].into_iter().flat_map(|file| read(&*disk, &dir.join(file)));
            for line in lines.filter(fits) {
                found.push_back(line.flow);
                if found.len() > keep {
                    found.pop_front();
                }
            }
            found
        });
        answer.flows = found.await.map_err(|e| format!("flows can't be read: {e}"))?.into();
        drop(held);
        Ok(answer)
    }
}

/// Who has which address, in a network and in those that it is peered with.
fn names(told: &HostNetworks, network: &NetworkPlan) -> BTreeMap<IpAddr, Name> {
    let peers = network.peerings.iter().flat_map(|p| told.networks.iter().filter(|n| n.uid == p.network));
    let of = |plan: &NetworkPlan| {
        let addresses = plan.nics.iter().flat_map(|nic| {
            let both = nic.address4.map(IpAddr::from).into_iter().chain(nic.address6.map(IpAddr::from));
            both.map(|address| (address, nic.name.clone())).collect::<Vec<_>>()
        });
        addresses.collect::<Vec<_>>()
    };
    // Of two projects' NICs only one's own are named.
    peers.filter(|peer| peer.project == network.project).flat_map(|peer| of(peer)).chain(of(network)).collect()
}

fn record(time: Timestamp, flow: Flow, names: &BTreeMap<IpAddr, Name>) -> FlowRecord {
    let protocol = match flow.protocol {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        1 | 58 => "icmp".to_owned(),
        other => other.to_string(),
    };
    FlowRecord {
        time,
        dropped: flow.dropped,
        protocol,
        source: flow.source,
        source_nic: names.get(&flow.source).cloned(),
        source_port: flow.source_port,
        destination: flow.destination,
        destination_nic: names.get(&flow.destination).cloned(),
        port: flow.port,
        bytes: flow.bytes,
    }
}

/// The lines of a file; none, if there is none. What can't be read as one is passed over.
fn read(disk: &dyn Disk, path: &Path) -> Vec<Line> {
    let text = disk.read(path).unwrap_or_default();
    text.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// Adds lines to the newer file. One that is full takes the place of the older.
fn append(disk: &dyn Disk, dir: &Path, text: &[u8], room: u64) -> io::Result<()> {
    let new = dir.join(NEW);
    let file = match disk.open(&new) {
        Ok(file) if file.len()? + text.len() as u64 > room => {
            disk.rename(&new, &dir.join(OLD))?;
            disk.create(&new)?
        }
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            disk.create_dir_all(dir)?;
            disk.create(&new)?
        }
        Err(e) => return Err(e),
    };
    let mut end = [0];
    let length = file.len()?;
    // What a crash has torn is ended, so that it takes no other line with it.
    if length > 0 && file.read_at(length - 1, &mut end)? == 1 && end != [b'\n'] {
        file.append(b"\n")?;
    }
    file.append(text)
}

#[cfg(test)]
mod tests {
    use nexus_env::MemDisk;

    use super::*;

    fn line(n: u64, second: i64, nic: Option<&str>) -> Vec<u8> {
        let flow = Flow {
            dropped: None,
            source: [10, 0, 0, 1].into(),
            destination: [10, 0, 0, 2].into(),
            protocol: 6,
            source_port: 4000,
            port: 80,
            bytes: 60,
        };
        let names = nic.map(|nic| (IpAddr::from([10, 0, 0, 2]), nic.parse().unwrap())).into_iter().collect();
        let flow = record(Timestamp::from_millis(second * 1000), flow, &names);
        let mut text = serde_json::to_vec(&Line { n, flow }).unwrap();
        text.push(b'\n');
        text
    }

    #[test]
    fn a_full_file_takes_the_place_of_the_older_and_torn_lines_are_passed_over() {
        let (disk, dir) = (MemDisk::new(1), Path::new("/flows/one"));
        for n in 1..=30 {
            append(&disk, dir, &line(n, 1, None), 1000).unwrap();
        }
        let sizes = [NEW, OLD].map(|file| disk.read(&dir.join(file)).unwrap().len());
        assert!(sizes.iter().all(|size| *size <= 1000), "{sizes:?}");
        let numbers: Vec<u64> = [OLD, NEW].iter().flat_map(|f| read(&disk, &dir.join(f))).map(|l| l.n).collect();
        assert_eq!(numbers.last(), Some(&30));
        assert!(numbers.is_sorted() && numbers[0] > 1, "the oldest have gone: {numbers:?}");
        disk.open(&dir.join(NEW)).unwrap().append(b"{\"n\": 31, \"tim").unwrap();
        append(&disk, dir, &line(32, 1, None), 1 << 20).unwrap();
        let last: Vec<u64> = read(&disk, &dir.join(NEW)).iter().map(|l| l.n).collect();
        assert_eq!(last[last.len() - 2..], [30, 32]);
    }
}
