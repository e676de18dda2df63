//! A server's own chain of records: what it refused and what it let be read. Such answers change nothing, so they have no
//! transaction to be in; they go to files of the server's data folder, many with one sync, and each minute the server has
//! what it settled anchored in its region's log.
//!
//! A note is taken without waiting. At most 64 records are written a second: of a flood the rest is counted, by a metric and
//! by a record of its own, so that whoever tries passwords can't fill the disk, nor hide that it was tried. The files have at
//! most 256 MiB; the oldest go once they are anchored, and exports then say that they were dropped.
//!
//! The files are a chain too: what a crash left half written at the end is cut off, and files that contradict each other or the
//! last anchor are moved aside, never written over.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_audit::{Actor, ActorKind, Anchor, Answer, Chain, Draft, Entry, Retention, Target};
use nexus_env::{Disk, Env, File, RngExt, on_disk};
use nexus_model::{Code, Name, RequestId};
use nexus_store::{RangeRequest, Store};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::read;
use crate::intent::{Change, Deed, Intent, Provenance, Target as Of, Writer};

/// Notes that wait to be written.
const QUEUE: usize = 4_096;
/// Records of one batch, and the time that it takes at least.
const BATCH: usize = 64;
const PACE: Duration = Duration::from_secs(1);
/// How long the first note of a batch waits for more.
const GATHER: Duration = Duration::from_millis(100);
/// How often what was written is anchored.
const ANCHOR: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(2);
/// A file is full, and all of them are too many.
const SEGMENT: u64 = 4 << 20;
const KEEP: u64 = 256 << 20;

/// The action of the record that counts what a flood left no room for.
const OVERFLOW_ACTION: &str = "audit:overflow";

/// The door to a server's chain. Cheap to clone.
#[derive(Clone)]
pub struct Notes {
    sender: mpsc::Sender<Draft>,
    lost: Arc<AtomicU64>,
    env: Env,
    dir: PathBuf,
    server: Name,
    last: Arc<Last>,
}

/// What writes the chain; one a server.
pub struct NotesKeeper {
    receiver: mpsc::Receiver<Draft>,
    lost: Arc<AtomicU64>,
    env: Env,
    dir: PathBuf,
    region: Name,
    server: Name,
    /// How many lost notes a record has told of.
    told: u64,
    /// How often what was written is anchored: a minute.
    pub every: Duration,
}

/// The files of a chain, open at their end.
struct Files {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    chain: Chain,
    /// The first record of each file, and the file's bytes.
    segments: Vec<(u64, u64)>,
    last: Option<Arc<dyn File>>,
}

fn path_of(dir: &Path, first: u64) -> PathBuf {
    dir.join(format!("{first:020}.ndjson"))
}

/// The first records of the files, in order.
fn segments(disk: &dyn Disk, dir: &Path) -> std::io::Result<Vec<(u64, u64)>> {
    let names = if disk.exists(dir)? { disk.list(dir)? } else { Vec::new() };
    let first = |name: &str| name.strip_suffix(".ndjson")?.parse().ok();
    Ok(names.into_iter().filter_map(|e| Some((first(&e.name)?, e.len))).collect())
}

impl Notes {
    /// The chain of a server in its region, in a folder of its own.
    pub fn new(env: &Env, dir: PathBuf, region: Name, server: Name) -> (Self, NotesKeeper) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (lost, env) = (Arc::new(AtomicU64::new(0)), env.clone());
        let last = Arc::default();
        let notes =
            Self { sender, lost: lost.clone(), env: env.clone(), dir: dir.clone(), server: server.clone(), last };
        (notes, NotesKeeper { receiver, lost, env, dir, region, server, told: 0, every: ANCHOR })
    }

    /// Takes a note. What finds no room is counted.
    pub fn note(&self, draft: Draft) {
        if self.sender.try_send(draft).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes what a request was answered that changes nothing, or not by the writer. `by`: who asked, and its name if no more is
    /// known; absent if nobody knows.
    pub fn answered(
        &self,
        by: Option<(&Provenance, &str)>,
        action: String,
        target: Option<Target>,
        answer: Result<(), Code>,
        request_id: &RequestId,
    ) {
        let anonymous = || Actor {
            access_key: None,
            kind: ActorKind::Anonymous,
            name: "anonymous".to_owned(),
            organization: None,
            session: None,
        };
        let answer = match answer {
            Ok(()) => Answer::Ok,
            Err(code) => {
                let code = serde_json::to_value(code).expect("a code is a word");
                Answer::Error(code.as_str().unwrap_or_default().to_owned())
            }
        };
        let policies = by.map(|(by, _)| super::policies(by)).unwrap_or_default();
        self.note(Draft {
            time: millis(&self.env),
            actor: by.map_or_else(anonymous, |(by, name)| super::actor(by, name)),
            action,
            target,
            policies,
            answer,
            revision: None,
            request_id: request_id.clone(),
            change: None,
            retention: Retention::Security,
            anchor: None,
            personal: None,
        });
    }

    /// Notes that found no room, or could not be written, since this server started.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// The rows that an anchor of this server settles, if all are still here.
    pub async fn rows(&self, anchor: &Anchor) -> Option<Vec<Vec<u8>>> {
        if anchor.server != self.server.as_str() {
            return None;
        }
        let (disk, dir, from, to) = (self.env.disk.clone(), self.dir.clone(), anchor.from, anchor.to);
        let last = self.last.clone();
        let rows = on_disk(&self.env.disk, move || rows(&*disk, &dir, from, to, &last)).await.ok()?.ok()?;
        (rows.len() as u64 == to - from + 1).then_some(rows)
    }
}

/// A file that was read, and where its lines begin.
struct Segment {
    first: u64,
    content: Vec<u8>,
    starts: Vec<usize>,
}

impl Segment {
    fn read(disk: &dyn Disk, dir: &Path, first: u64) -> std::io::Result<Self> {
        let content = disk.read(&path_of(dir, first))?;
        let mut starts = vec![0];
        starts.extend(content.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(at, _)| at + 1));
        Ok(Self { first, content, starts })
    }

    /// The lines that are whole, from one record to another, both included.
    fn rows(&self, from: u64, to: u64) -> impl Iterator<Item = &[u8]> {
        let lines = (self.first..).zip(self.starts.windows(2));
        let wanted = lines.filter(move |(index, _)| (from..=to).contains(index));
        wanted.map(|(_, ends)| &self.content[ends[0]..ends[1] - 1])
    }
}

/// The file that was read last: anchors are asked for in order, and many settle records of the same.
type Last = Mutex<Option<Arc<Segment>>>;

fn rows(disk: &dyn Disk, dir: &Path, from: u64, to: u64, last: &Last) -> std::io::Result<Vec<Vec<u8>>> {
    let files = segments(disk, dir)?;
    let mut found = Vec::new();
    for (n, (first, bytes)) in files.iter().enumerate() {
        let ends = files.get(n + 1).map_or(u64::MAX, |(next, _)| *next);
        if *first > to || ends <= from {
            continue;
        }
        let known = last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let known = known.filter(|segment| segment.first == *first && segment.content.len() as u64 == *bytes);
        let segment = match known {
            Some(segment) => segment,
            None => {
                let segment = Arc::new(Segment::read(disk, dir, *first)?);
                *last.lock().unwrap_or_else(PoisonError::into_inner) = Some(segment.clone());
                segment
            }
        };
        found.extend(segment.rows(from, to).map(<[u8]>::to_vec));
    }
    Ok(found)
}

fn millis(env: &Env) -> u64 {
    u64::try_from(env.now_millis()).unwrap_or(0)
}

impl Files {
    /// Reads what is there. `Err` within: it is no chain.
    fn open(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        region: &Name,
        server: &Name,
        anchor: Option<&Anchor>,
    ) -> std::io::Result<Result<Self, String>> {
        disk.create_dir_all(&dir)?;
        let mut segments = segments(&*disk, &dir)?;
        let mut chain = Chain::resume(region.as_str(), server.as_str(), anchor);
        if segments.is_empty() {
            return Ok(Ok(Self { disk, dir, chain, segments, last: None }));
        }
        let (mut begun, count) = (false, segments.len());
        for (n, (first, bytes)) in segments.iter_mut().enumerate() {
            let path = path_of(&dir, *first);
            let content = disk.read(&path)?;
            let (mut good, mut index) = (0, *first);
            for line in content.split_inclusive(|b| *b == b'\n') {
                let entry = line.strip_suffix(b"\n").and_then(|line| Entry::from_row(line).ok());
                let Some(entry) = entry else { break };
                if !begun {
                    // What stood before the first file was dropped, and its last hash is in what follows.
                    let head = entry.record.previous;
                    let before =
                        first.checked_sub(1).map(|to| Anchor { from: 0, head, server: server.to_string(), to });
                    chain = Chain::resume(region.as_str(), server.as_str(), before.as_ref());
                    begun = true;
                }
                if entry.record.index != index || chain.replay(&entry).is_err() {
                    return Ok(Err(format!("{} does not go on at record {index}", path.display())));
                }
                good += line.len();
                index += 1;
            }
            // A crash leaves half a batch at the very end. A record behind something unreadable is no crash's doing.
            let rest = content[good..].split(|b| *b == b'\n').skip(1);
            if good < content.len() && (n + 1 < count || rest.into_iter().any(|line| Entry::from_row(line).is_ok())) {
                return Ok(Err(format!("{} can't be read behind record {index}", path.display())));
            }
            *bytes = good as u64;
        }
        if !begun && segments[0].0 != chain.next() {
            return Ok(Err(format!(
                "the files begin at record {}, the chain goes on at {}",
                segments[0].0,
                chain.next()
            )));
        }
        if let Some(anchor) = anchor {
            if chain.next() <= anchor.to {
                return Ok(Err(format!("record {} is anchored and not here", anchor.to)));
            }
            let settled = rows(&*disk, &dir, anchor.to, anchor.to, &Last::default())?;
            let hash = settled.first().and_then(|row| Entry::from_row(row).ok()?.record.hash().ok());
            if hash.is_some_and(|hash| hash != anchor.head) {
                return Ok(Err(format!("record {} is not the one that was anchored", anchor.to)));
            }
            chain.anchored(anchor);
        }
        let (first, good) = segments[count - 1];
        let last: Arc<dyn File> = Arc::from(disk.open(&path_of(&dir, first))?);
        if last.len()? > good {
            last.truncate(good)?;
            last.sync()?;
        }
        Ok(Ok(Self { disk, dir, chain, segments, last: Some(last) }))
    }

    /// Writes records and makes them durable. After an error the chain is as before.
    fn append(&mut self, drafts: Vec<Draft>) -> std::io::Result<()> {
        let before = self.chain.clone();
        let (first, mut text) = (before.next(), Vec::new());
        for draft in drafts {
            match self.chain.append(draft) {
                Ok(appended) => text.extend(appended.row.into_iter().chain([b'\n'])),
                Err(error) => tracing::error!(%error, "a refusal could not be recorded"),
            }
        }
        let done = self.write(first, &text);
        if done.is_err() {
            self.chain = before;
            // Half a line may stand there now. It is cut off now or when the files are opened again.
            if let (Some(last), Some((_, bytes))) = (&self.last, self.segments.last()) {
                let _ = last.truncate(*bytes);
            }
        }
        done
    }

    fn write(&mut self, first: u64, text: &[u8]) -> std::io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        if self.last.is_none() || self.segments.last().is_some_and(|(_, bytes)| *bytes >= SEGMENT) {
            let file = self.disk.create(&path_of(&self.dir, first))?;
            self.disk.sync_dir(&self.dir)?;
            self.last = Some(Arc::from(file));
            if self.segments.last().is_none_or(|(last, _)| *last != first) {
                self.segments.push((first, 0));
            }
        }
        let last = self.last.as_ref().expect("opened above");
        last.append(text)?;
        last.sync()?;
        if let Some((_, bytes)) = self.segments.last_mut() {
            *bytes += text.len() as u64;
        }
        Ok(())
    }

    /// Removes the oldest files while there are too many bytes and their records are anchored.
    fn trim(&mut self) -> std::io::Result<()> {
        while self.segments.len() > 1
            && self.segments.iter().map(|(_, bytes)| bytes).sum::<u64>() > KEEP
            && self.segments[1].0 <= self.chain.next() - self.chain.waiting()
        {
            let (first, _) = self.segments.remove(0);
            tracing::info!(first, "the oldest records of this server's chain are dropped; their anchors stay");
            self.disk.remove_file(&path_of(&self.dir, first))?;
        }
        Ok(())
    }
}

impl NotesKeeper {
    /// Writes notes and has them anchored, until `stop`. `store` and `writer` are the region's.
    pub async fn run(mut self, store: Arc<dyn Store>, writer: Arc<dyn Writer>, stop: CancellationToken) {
        let Some(mut files) = self.open(&*store, &stop).await else { return };
        let mut anchor_at = Instant::now() + self.every;
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => {
                    // What was noted is written, so that a server that ends well loses nothing.
                    let rest: Vec<Draft> = std::iter::from_fn(|| self.receiver.try_recv().ok()).collect();
                    self.write(files, rest).await;
                    return;
                }
                // Before what waits: a flood must not keep what is written from being settled.
                () = sleep_until(anchor_at) => {
                    anchor_at = Instant::now() + self.every;
                    if let Some(anchor) = files.chain.anchor() {
                        match self.submit(&*writer, anchor.clone()).await {
                            Ok(()) => files.chain.anchored(&anchor),
                            Err(error) => {
                                tracing::warn!(%error, "this server's chain of refusals was not anchored; trying again");
                                anchor_at = Instant::now() + RETRY;
                                if error.code == Code::Conflict {
                                    drop(files);
                                    let Some(anew) = self.open(&*store, &stop).await else { return };
                                    files = anew;
                                }
                            }
                        }
                    }
                    if let Err(error) = files.trim() {
                        tracing::warn!(%error, "old records of this server's chain can't be removed");
                    }
                }
                first = self.receiver.recv() => {
                    let Some(first) = first else { return };
                    sleep(GATHER).await;
                    let mut batch = vec![first];
                    batch.extend(std::iter::from_fn(|| self.receiver.try_recv().ok()).take(BATCH - 1));
                    files = match self.write(files, batch).await {
                        Some(files) => files,
                        None => match self.open(&*store, &stop).await {
                            Some(files) => files,
                            None => return,
                        },
                    };
                    sleep(PACE - GATHER).await;
                }
            }
        }
    }

    async fn write(&mut self, mut files: Files, mut batch: Vec<Draft>) -> Option<Files> {
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > self.told {
            batch.push(overflow(lost - self.told, self.server.as_str(), &self.env));
        }
        let n = batch.len() as u64;
        if n == 0 {
            return Some(files);
        }
        let done = on_disk(&self.env.disk, move || {
            let done = files.append(batch);
            (files, done)
        });
        match done.await {
            Ok((files, Ok(()))) => {
                self.told = lost;
                Some(files)
            }
            Ok((_, Err(error))) => {
                tracing::error!(%error, n, "refusals could not be recorded");
                self.lost.fetch_add(n, Ordering::Relaxed);
                None
            }
            Err(_) => None,
        }
    }

    /// Opens the files, and begins anew behind the last anchor if they are none. Tries until it can be told.
    async fn open(&self, store: &dyn Store, stop: &CancellationToken) -> Option<Files> {
        let tries = async {
            loop {
                match self.try_open(store).await {
                    Ok(files) => return files,
                    Err(error) => tracing::debug!(error, "this server's chain of refusals can't go on yet"),
                }
                sleep(RETRY).await;
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => None,
            files = tries => Some(files),
        }
    }

    async fn try_open(&self, store: &dyn Store) -> Result<Files, String> {
        let row = store.range(RangeRequest::get(read::anchor_row(self.server.as_str()))).await;
        let row = row.map_err(|e| e.to_string())?.kvs.pop();
        let anchor: Option<Anchor> = row.and_then(|kv| serde_json::from_slice(&kv.value).ok());
        let (disk, dir) = (self.env.disk.clone(), self.dir.clone());
        let (region, server) = (self.region.clone(), self.server.clone());
        let aside = dir.with_extension(format!("unusable-{}", millis(&self.env)));
        let work = move || match Files::open(disk.clone(), dir.clone(), &region, &server, anchor.as_ref())? {
            Ok(files) => Ok(files),
            Err(why) => {
                tracing::error!(why, aside = %aside.display(), "the files of this server's chain are moved aside");
                disk.rename(&dir, &aside)?;
                let fresh = Files::open(disk, dir, &region, &server, anchor.as_ref())?;
                fresh.map_err(std::io::Error::other)
            }
        };
        on_disk(&self.env.disk, work).await.and_then(|done| done).map_err(|e: std::io::Error| e.to_string())
    }

    async fn submit(&self, writer: &dyn Writer, anchor: Anchor) -> Result<(), nexus_model::ApiError> {
        let intent = Intent {
            request_id: RequestId::from_random(self.env.rng.bytes()),
            actor: self.server.to_string(),
            by: Provenance { principal: format!("server:{}", self.server), ..Provenance::default() },
            target: Of { plural: "servers".to_owned(), project: None, organization: None, name: self.server.clone() },
            change: Change::Audit { deed: Deed::Anchor(anchor) },
            if_match: None,
            idempotency_key: None,
            dry_run: false,
        };
        writer.submit(intent).await.map(drop)
    }
}

/// Says how many notes found no room.
fn overflow(lost: u64, server: &str, env: &Env) -> Draft {
    Draft {
        time: millis(env),
        actor: Actor {
            access_key: None,
            kind: ActorKind::Server,
            name: server.to_owned(),
            organization: None,
            session: None,
        },
        action: OVERFLOW_ACTION.to_owned(),
        target: Some(Target {
            name: lost.to_string(),
            organization: None,
            plural: "records".to_owned(),
            project: None,
            uid: None,
        }),
        policies: Vec::new(),
        answer: Answer::Error("overloaded".to_owned()),
        revision: None,
        request_id: RequestId::from_random(env.rng.bytes()),
        change: None,
        retention: Retention::Security,
        anchor: None,
        personal: None,
    }
}
