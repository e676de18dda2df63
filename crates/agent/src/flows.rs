//! The flow logs of tenants' networks on this host: what the packet filters tell is written down, and read when servers ask.
//!
//! ```text
//! packet filter ──▶ follower of the network ──▶ `new` ─(full)─▶ `old` ─(full again)─▶ gone
//! ```
//!
//! One folder for each network with two files of lines, each a flow as JSON with its number. All of them together have a bound.
//! They go when the network wants no log any more, or the host has no part in it. What a crash tears is passed over. Who
//! reads on and on is told from memory.

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
const FILE_BYTES: (u64, u64) = (16 << 10, 8 << 20);
/// The newest flows of a network, for whoever has read the rest.
const RECENT: usize = 4096;
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
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Line {
    n: u64,
    #[serde(flatten)]
    flow: FlowRecord,
}

/// One network's log.
struct Log {
    dir: PathBuf,
    /// Held while files change places.
    newest: tokio::sync::Mutex<Newest>,
    /// Those that had no place.
    lost: Arc<AtomicU64>,
    /// Who has which address.
    names: Mutex<BTreeMap<IpAddr, Name>>,
}

/// What this agent knows of the end of a log.
#[derive(Default)]
struct Newest {
    /// The number of the last line.
    last: u64,
    /// Those that this agent has written, up to the last.
    recent: VecDeque<Line>,
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
                self.forget(&kept).await;
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
            let last = |file| lines(&contents(&*disk, &at.join(file))).map(|line| line.n).max();
            [NEW, OLD].into_iter().filter_map(last).max().unwrap_or(0)
        });
        let newest = Newest { last: last.await.unwrap_or(0), recent: VecDeque::new() };
        let newest = tokio::sync::Mutex::new(newest);
        let log = Arc::new(Log { dir, newest, lost: Arc::default(), names: Mutex::default() });
        self.logs().entry(network).or_insert(log).clone()
    }

    fn logs(&self) -> std::sync::MutexGuard<'_, BTreeMap<Uid, Arc<Log>>> {
        self.logs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes what is of networks that want no log here any more, and what is more than a network's share by now.
    async fn forget(&self, kept: &[&NetworkPlan]) {
        let names: Vec<String> = kept.iter().map(|n| n.uid.to_string()).collect();
        self.logs().retain(|uid, _| kept.iter().any(|n| n.uid == *uid));
        let (disk, dir, room) = (self.env.disk.clone(), self.dir.clone(), self.room.load(Ordering::Relaxed));
        let gone = on_disk(&self.env.disk, move || {
            if !disk.exists(&dir)? {
                return Ok(());
            }
            for entry in disk.list(&dir)? {
                let of = dir.join(&entry.name);
                if !names.contains(&entry.name) {
                    disk.remove_dir_all(&of)?;
                } else if disk.open(&of.join(OLD)).is_ok_and(|old| old.len().is_ok_and(|length| length > room)) {
                    disk.remove_file(&of.join(OLD))?;
                }
            }
            io::Result::Ok(())
        });
        if let Err(error) = gone.await.and_then(|gone| gone) {
            tracing::warn!(%error, "flow logs that nobody wants any more can't be removed");
        }
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
            let mut newest = log.newest.lock().await;
            let Newest { last, recent } = &mut *newest;
            let mut text = Vec::new();
            let count = batch.len() as u64;
            {
                let names = log.names.lock().unwrap_or_else(PoisonError::into_inner);
                for flow in batch.drain(..) {
                    *last += 1;
                    let line = Line { n: *last, flow: record(time, flow, &names) };
                    text.extend(serde_json::to_vec(&line).expect("a flow is well-formed JSON"));
                    text.push(b'\n');
                    recent.push_back(line);
                }
            }
            recent.drain(..recent.len().saturating_sub(RECENT));
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
        let newest = log.newest.lock().await;
        let last = newest.last;
        // A log that was begun anew has fewer than were told of.
        let after = request.after.filter(|after| *after <= last);
        let mut answer = HostFlows { flows: Vec::new(), last, lost: log.lost.load(Ordering::Relaxed) };
        let begun = newest.recent.front().map(|line| line.n);
        let Some(after) = after.filter(|after| *after == last || begun.is_some_and(|begun| begun <= after + 1)) else {
            let (disk, dir) = (self.env.disk.clone(), log.dir.clone());
            let files = on_disk(&self.env.disk, move || [OLD, NEW].map(|file| contents(&*disk, &dir.join(file))));
            let files = files.await.map_err(|e| format!("flows can't be read: {e}"))?;
            drop(newest);
            let request = request.clone();
            let parsed = on_disk(&self.env.disk, move || chosen(files.iter().flat_map(|f| lines(f)), after, &request));
            answer.flows = parsed.await.map_err(|e| format!("flows can't be read: {e}"))?;
            return Ok(answer);
        };
        answer.flows = chosen(newest.recent.iter().cloned(), Some(after), request);
        Ok(answer)
    }
}

/// Of what was noted, the oldest first, the newest so many that are asked for.
fn chosen(lines: impl Iterator<Item = Line>, after: Option<u64>, request: &FlowsRequest) -> Vec<FlowRecord> {
    let fits = |line: &Line| {
        let of = |nic: &Option<Name>| nic.is_some() && *nic == request.nic;
        after.map_or(line.flow.time >= request.since, |after| line.n > after)
            && (request.nic.is_none() || of(&line.flow.source_nic) || of(&line.flow.destination_nic))
    };
    let keep = request.limit.min(MAX_FLOWS) as usize;
    let mut found = VecDeque::new();
    for line in lines.filter(fits) {
        found.push_back(line.flow);
        if found.len() > keep {
            found.pop_front();
        }
    }
    found.into()
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

/// What is in a file; nothing, if there is none.
fn contents(disk: &dyn Disk, path: &Path) -> Vec<u8> {
    disk.read(path).unwrap_or_default()
}

/// The lines of a file. What can't be read as one is passed over.
fn lines(text: &[u8]) -> impl Iterator<Item = Line> {
    text.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice(line).ok())
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
        let numbers_of = |file: &&str| lines(&contents(&disk, &dir.join(file))).map(|l| l.n).collect::<Vec<_>>();
        let numbers: Vec<u64> = [OLD, NEW].iter().flat_map(numbers_of).collect();
        assert_eq!(numbers.last(), Some(&30));
        assert!(numbers.is_sorted() && numbers[0] > 1, "the oldest have gone: {numbers:?}");
        disk.open(&dir.join(NEW)).unwrap().append(b"{\"n\": 31, \"tim").unwrap();
        append(&disk, dir, &line(32, 1, None), 1 << 20).unwrap();
        let last = numbers_of(&NEW);
        assert_eq!(last[last.len() - 2..], [30, 32]);
    }
}
