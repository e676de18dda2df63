//! Group commit: one task takes everything that is queued, writes it as one frame, syncs once, and tells all who wait.
//!
//! After a failed write or sync nothing is known about what is durable, so the writer stops for good and says why; only
//! opening again (which reads what is really there) goes on.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use nexus_env::{Disk, Env, File, on_disk};
use openraft::storage::LogFlushed;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use super::raft::TypeConfig;
use super::wal::{
    Kind, Recovered, SEGMENT_HEADER, SPARE_NAME, Segment, push_frame, push_record, segment_header, segment_name,
};
use crate::error::StoreError;
use crate::types::GroupId;

/// Jobs that wait for the writer before an append waits too.
const QUEUE: usize = 256;
/// A frame takes no more jobs once it has this much.
const FRAME_BYTES: usize = 4 << 20;
/// How often the free space is looked at while there is writing.
const SPACE_EVERY: Duration = Duration::from_secs(1);

pub struct Record {
    pub kind: Kind,
    pub group: GroupId,
    pub body: Vec<u8>,
    /// Entries only.
    pub index: Option<u64>,
}

pub enum Done {
    Flushed(LogFlushed<TypeConfig>),
    Oneshot(oneshot::Sender<Result<(), String>>),
    /// Segments that only hold entries up to this index of the group may go, once this job is durable.
    Purged(GroupId, u64, oneshot::Sender<Result<(), String>>),
}

pub struct Job {
    pub records: Vec<Record>,
    pub done: Done,
}

/// What the writer lets others see.
#[derive(Default)]
pub struct Gauges {
    pub log_bytes: AtomicU64,
    /// `u64::MAX` until it is known.
    pub free_bytes: AtomicU64,
    /// Positions to write along with the next frame.
    committed: Mutex<BTreeMap<GroupId, Vec<u8>>>,
    failure: Mutex<Option<String>>,
}

impl Gauges {
    pub fn note_committed(&self, group: &GroupId, body: Vec<u8>) {
        self.committed.lock().unwrap_or_else(PoisonError::into_inner).insert(group.clone(), body);
    }

    /// The free space as last measured.
    pub fn free(&self) -> Option<u64> {
        Some(self.free_bytes.load(Ordering::Relaxed)).filter(|free| *free != u64::MAX)
    }

    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The sending end. The writer ends, with a last frame for what is noted, when every clone is gone.
#[derive(Clone)]
pub struct WalHandle {
    jobs: mpsc::Sender<Job>,
    pub gauges: Arc<Gauges>,
}

impl WalHandle {
    pub async fn submit(&self, job: Job) -> Result<(), String> {
        self.jobs.send(job).await.map_err(|_| self.gauges.failure().unwrap_or_else(|| "the log is closed".into()))
    }

    /// Writes records and waits until they are durable.
    pub async fn write(&self, records: Vec<Record>) -> Result<(), String> {
        let (tx, rx) = oneshot::channel();
        self.submit(Job { records, done: Done::Oneshot(tx) }).await?;
        rx.await.map_err(|_| "the log writer has stopped".to_owned())?
    }
}

struct Writer {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    segment_bytes: u64,
    gauges: Arc<Gauges>,
    sealed: Vec<Segment>,
    active: Option<(Segment, Box<dyn File>)>,
    /// Whether the active segment has room that was written in advance.
    has_room: bool,
    /// The segment to come.
    spare: Option<Box<dyn File>>,
    next_number: u64,
    sequence: u64,
    /// What every new segment begins with: the newest vote and purge position of each group.
    standing: BTreeMap<(GroupId, u8), Vec<u8>>,
    env: Env,
    space_checked: Option<Duration>,
}

/// Starts the writer behind what [`super::wal::recover`] found.
pub fn start(
    env: &Env,
    dir: PathBuf,
    segment_bytes: u64,
    recovered: &Recovered,
) -> Result<(WalHandle, JoinHandle<()>), StoreError> {
    let storage = |e: io::Error| StoreError::Storage(e.to_string());
    let mut standing = BTreeMap::new();
    for (group, log) in &recovered.groups {
        if let Some(vote) = &log.vote {
            standing.insert((group.clone(), Kind::Vote as u8), to_body(vote));
        }
        if let Some(purged) = &log.purged {
            standing.insert((group.clone(), Kind::Purge as u8), to_body(purged));
        }
    }
    let mut sealed = recovered.segments.clone();
    let next_number = sealed.last().map_or(1, |s| s.number + 1);
    let active = match sealed.pop() {
        None => None,
        Some(segment) => {
            let file = env.disk.open(&segment.path).map_err(storage)?;
            Some((segment, file))
        }
    };
    let gauges = Arc::new(Gauges { free_bytes: AtomicU64::new(u64::MAX), ..Gauges::default() });
    let writer = Writer {
        disk: env.disk.clone(),
        dir,
        segment_bytes,
        gauges: gauges.clone(),
        sealed,
        active,
        has_room: false,
        spare: None,
        next_number,
        sequence: recovered.next_sequence,
        standing,
        env: env.clone(),
        space_checked: None,
    };
    writer.count();
    let (jobs, queue) = mpsc::channel(QUEUE);
    let task = tokio::spawn(run(writer, queue));
    Ok((WalHandle { jobs, gauges }, task))
}

pub fn to_body<T: serde::Serialize>(value: &T) -> Vec<u8> {
    rmp_serde::to_vec(value).expect("our own plain types always encode")
}

async fn run(mut writer: Writer, mut queue: mpsc::Receiver<Job>) {
    let mut failed: Option<String> = None;
    let mut preparing: JoinSet<Option<Box<dyn File>>> = JoinSet::new();
    // What can't be prepared is tried again with the next segment.
    let mut prepared_for = None;
    while let Some(first) = queue.recv().await {
        if let Some(Ok(spare)) = preparing.try_join_next() {
            writer.spare = spare;
        }
        // One at a time: a second would take the name from the first, and with it what the first is to hold.
        if preparing.is_empty() && prepared_for != Some(writer.next_number) && writer.wants_spare() {
            prepared_for = Some(writer.next_number);
            preparing.spawn(prepare(writer.disk.clone(), writer.dir.join(SPARE_NAME), writer.segment_bytes));
        }
        let mut jobs = vec![first];
        let size = |job: &Job| job.records.iter().map(|r| r.body.len()).sum::<usize>();
        let mut bytes = size(&jobs[0]);
        while bytes < FRAME_BYTES
            && let Ok(job) = queue.try_recv()
        {
            bytes += size(&job);
            jobs.push(job);
        }
        if let Some(reason) = &failed {
            jobs.into_iter().for_each(|job| finish(job.done, Err(reason.clone())));
            continue;
        }
        // Blocking work leaves the runtime's threads alone, and keeps a paused test clock from running ahead.
        let disk = writer.disk.clone();
        let written = on_disk(&disk, move || {
            let result = writer.commit(&jobs);
            let purges: Vec<_> = jobs
                .iter()
                .filter_map(|j| if let Done::Purged(g, i, _) = &j.done { Some((g.clone(), *i)) } else { None })
                .collect();
            // Waiters are told before old files are removed, which nobody waits for.
            let message = result.as_ref().err().map(ToString::to_string);
            for job in jobs {
                finish(job.done, message.clone().map_or(Ok(()), Err));
            }
            let result = result.and_then(|()| if purges.is_empty() { Ok(()) } else { writer.remove(&purges) });
            (writer, result)
        })
        .await;
        match written {
            Ok((back, result)) => {
                writer = back;
                if let Err(e) = result {
                    let reason = format!("writing the log failed: {e}");
                    tracing::error!(reason, "the store stops");
                    *writer.gauges.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.clone());
                    failed = Some(reason);
                }
            }
            // Only a runtime that shuts down cancels a blocking task.
            Err(_) => return,
        }
    }
    // Whoever opens the folder next must not meet it.
    while preparing.join_next().await.is_some() {}
    if failed.is_none() {
        // A clean end notes how far was committed, so that the next start knows it without a leader.
        let disk = writer.disk.clone();
        let last = on_disk(&disk, move || writer.commit(&[])).await;
        if let Ok(Err(e)) = last {
            tracing::warn!(error = %e, "the last commit position was not written");
        }
    }
}

/// Makes the segment to come. Without one the log goes on all the same, only slower.
async fn prepare(disk: Arc<dyn Disk>, path: PathBuf, bytes: u64) -> Option<Box<dyn File>> {
    let (on, at) = (disk.clone(), path.clone());
    let made = on_disk(&disk, move || {
        on.create_reserved(&at, bytes).inspect_err(|_| {
            // Half of a file is of no use, and a full disk needs the room.
            let _ = on.remove_file(&at);
        })
    });
    match made.await {
        Ok(Ok(file)) => Some(file),
        Ok(Err(e)) | Err(e) => {
            tracing::debug!(error = %e, path = %path.display(), "no room for the log was prepared");
            None
        }
    }
}

fn finish(done: Done, result: Result<(), String>) {
    match done {
        Done::Flushed(callback) => callback.log_io_completed(result.map_err(io::Error::other)),
        // A waiter that is gone needs no answer.
        Done::Oneshot(tx) | Done::Purged(_, _, tx) => drop(tx.send(result)),
    }
}

impl Writer {
    fn commit(&mut self, jobs: &[Job]) -> io::Result<()> {
        let committed = std::mem::take(&mut *self.gauges.committed.lock().unwrap_or_else(PoisonError::into_inner));
        if jobs.is_empty() && committed.is_empty() {
            return Ok(());
        }
        let mut payload = Vec::with_capacity(1024);
        let mut out = Vec::new();
        let better = self.spare.is_some() && !self.has_room;
        let full = better || self.active.as_ref().is_none_or(|(s, _)| s.len >= self.segment_bytes);
        if full {
            out = self.roll()?;
            for ((group, kind), body) in &self.standing {
                let kind = if *kind == Kind::Vote as u8 { Kind::Vote } else { Kind::Purge };
                push_record(&mut payload, kind, group, body);
            }
        }
        let (segment, file) = self.active.as_mut().expect("rolled above if there was none");
        for record in jobs.iter().flat_map(|j| &j.records) {
            push_record(&mut payload, record.kind, &record.group, &record.body);
            match record.kind {
                Kind::Entry => {
                    let index = record.index.unwrap_or(0);
                    // An entry that replaces a truncated one has a lower index; what counts is the highest.
                    let last = segment.last.entry(record.group.clone()).or_default();
                    *last = index.max(*last);
                }
                Kind::Vote | Kind::Purge => {
                    self.standing.insert((record.group.clone(), record.kind as u8), record.body.clone());
                }
                Kind::Truncate | Kind::Committed => {}
            }
        }
        for (group, body) in &committed {
            push_record(&mut payload, Kind::Committed, group, body);
        }
        push_frame(&mut out, self.sequence, &payload);
        self.sequence += 1;
        file.append(&out)?;
        file.sync()?;
        segment.len += out.len() as u64;
        if full {
            // The file's name has to be as durable as what is in it.
            self.disk.sync_dir(&self.dir)?;
        }
        self.count();
        self.check_space();
        Ok(())
    }

    /// Whether the next segment should be made: while this one is filled, or soon because it has no room of its own.
    fn wants_spare(&self) -> bool {
        let half = |(s, _): &(Segment, _)| s.len >= self.segment_bytes / 2;
        self.spare.is_none() && (!self.has_room || self.active.as_ref().is_none_or(half))
    }

    /// Makes a new active segment; answers its header, which goes out with the first frame.
    fn roll(&mut self) -> io::Result<Vec<u8>> {
        let number = self.next_number;
        let path = self.dir.join(segment_name(number));
        self.has_room = self.spare.is_some();
        let file = match self.spare.take() {
            Some(spare) => {
                self.disk.rename(&self.dir.join(SPARE_NAME), &path)?;
                spare
            }
            None => self.disk.create(&path)?,
        };
        self.next_number += 1;
        let segment = Segment { number, path, len: 0, last: BTreeMap::new() };
        if let Some((old, _)) = self.active.replace((segment, file)) {
            self.sealed.push(old);
        }
        let header = segment_header(number);
        debug_assert_eq!(header.len(), SEGMENT_HEADER);
        Ok(header)
    }

    /// Removes the oldest segments that nobody needs any more.
    fn remove(&mut self, purges: &[(GroupId, u64)]) -> io::Result<()> {
        for (group, index) in purges {
            for segment in &mut self.sealed {
                if segment.last.get(group).is_some_and(|last| last <= index) {
                    segment.last.remove(group);
                }
            }
        }
        let needed = self.sealed.iter().position(|s| !s.last.is_empty()).unwrap_or(self.sealed.len());
        for segment in self.sealed.drain(..needed) {
            self.disk.remove_file(&segment.path)?;
        }
        if needed > 0 {
            self.disk.sync_dir(&self.dir)?;
        }
        self.count();
        Ok(())
    }

    fn count(&self) {
        let bytes = self.sealed.iter().chain(self.active.as_ref().map(|(s, _)| s)).map(|s| s.len).sum();
        self.gauges.log_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Looks at the free space, at most once a second.
    fn check_space(&mut self) {
        let now = self.env.monotonic();
        if self.space_checked.is_some_and(|then| now.saturating_sub(then) < SPACE_EVERY) {
            return;
        }
        self.space_checked = Some(now);
        // A file system that can't say is treated as one with room.
        let free = self.disk.free_space(&self.dir).unwrap_or(u64::MAX);
        self.gauges.free_bytes.store(free, Ordering::Relaxed);
    }
}
