//! A store's data folder, read without its engine: for looking into it, checking it, and the worst day.
//!
//! Reading changes nothing in the folder: no torn tail is cut, no leftover removed. It is also patient: damage is noted
//! with its place and what can still be read is read, so that [`Folder::verify`] names all of it at once and [`salvage`]
//! saves the rest. A folder whose server runs is refused unless told otherwise, since its files change while they are
//! read.
//!
//! Two states come out of a folder. The *committed* one is what the log says a quorum had; what lies behind it in the
//! log may or may not have been. The *newest* one has both, and is what a lone survivor goes on with.

mod audit;
mod plant;
mod recover;
mod salvage;
mod scan;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use nexus_env::{Disk, DiskLock};
use serde::Serialize;

pub use self::plant::{GENERATION_FILE, Plant, generation_of};
pub(crate) use self::plant::{TERM_GAP, leap, rewound};
pub use self::recover::{Recovered, Survey, recover_survivor};
pub use self::salvage::{Salvaged, salvage};
use self::scan::{Base, ScannedLog};
use crate::embedded::mvcc::{Retention, State};
use crate::embedded::raft::{Batch, Command, Entry, LogId, Membership, decode};
use crate::error::StoreError;
use crate::types::{GroupId, Member, Op, RangeRequest, RangeResponse, Revision};

const FORMAT_FILE: &str = "FORMAT";
const LOCK_FILE: &str = "LOCK";
const FORMAT: u32 = 1;

/// Why a folder can't be worked on.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    #[error("{0} is in use: stop its server first, or read it as it is with --force-read")]
    Locked(PathBuf),
    #[error("{path} is not the data folder of a metadata store: {reason}")]
    NotAStore { path: PathBuf, reason: String },
    #[error("{path} has format {found}; this release reads up to {FORMAT}: use the newer release")]
    NewerFormat { path: PathBuf, found: u32 },
    #[error("{what}: {source}")]
    Disk { what: String, source: std::io::Error },
    #[error(
        "{path} is damaged ({count} findings, first: {first}); look with `verify`, save what is left with `salvage`"
    )]
    Damaged { path: PathBuf, count: usize, first: String },
    #[error("{0} is not empty: name a folder that does not exist")]
    Occupied(PathBuf),
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

pub(crate) fn disk_error(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> OfflineError {
    let what = what.into();
    move |source| OfflineError::Disk { what, source }
}

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// What a crash leaves; the engine deals with it.
    Note,
    /// What no crash can have done: data is lost or wrong.
    Damage,
}

/// One thing that was found in a folder, with its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    pub file: String,
    pub offset: Option<u64>,
    pub what: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.offset {
            Some(offset) => write!(f, "{} at byte {offset}: {}", self.file, self.what),
            None => write!(f, "{}: {}", self.file, self.what),
        }
    }
}

/// An entry of the log behind the commit position.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TailEntry {
    pub index: u64,
    pub term: u64,
    /// The leader's clock, for entries that change keys.
    pub at_ms: Option<i64>,
    pub commands: usize,
    /// The keys that it would change, at most 100.
    pub keys: Vec<String>,
}

/// One version of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyVersion {
    pub revision: Revision,
    pub created: Revision,
    /// `None` when the history has been cut before it.
    pub timestamp_ms: Option<i64>,
    /// `None`: deleted.
    pub value: Option<Bytes>,
    pub lease: Option<u64>,
}

/// The figures of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Facts {
    pub node: u64,
    pub group: GroupId,
    pub generation: u64,
    /// The newest committed revision.
    pub revision: Revision,
    /// The oldest that can be read at.
    pub oldest: Revision,
    pub timestamp_ms: i64,
    pub keys: u64,
    pub leases: u64,
    pub members: BTreeMap<u64, Member>,
    pub term: u64,
    pub committed_index: Option<u64>,
    pub last_index: Option<u64>,
    /// Entries behind the commit position.
    pub tail: usize,
    pub snapshot: Option<String>,
    pub segments: usize,
    pub frames: u64,
    pub log_bytes: u64,
}

/// What a check of a whole folder found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    pub facts: Facts,
    pub findings: Vec<Finding>,
}

impl Report {
    /// Nothing but what a crash may leave.
    pub fn is_sound(&self) -> bool {
        self.findings.iter().all(|f| f.severity == Severity::Note)
    }
}

/// A data folder that was read.
pub struct Folder {
    dir: PathBuf,
    /// Held as long as the folder is looked at, so that no server starts meanwhile.
    _lock: Option<Box<dyn DiskLock>>,
    node: u64,
    group: GroupId,
    generation: u64,
    base: Base,
    log: ScannedLog,
    findings: Vec<Finding>,
    committed: State,
    newest: State,
    committed_id: Option<LogId>,
    last_id: Option<LogId>,
    tail: Vec<Entry>,
}

impl Folder {
    /// Reads a folder. `force` reads one that is in use, too: what its server is just writing may then look torn.
    pub fn open(disk: Arc<dyn Disk>, dir: &Path, force: bool) -> Result<Self, OfflineError> {
        let (node, group) = identity(&*disk, dir)?;
        let lock_path = dir.join(LOCK_FILE);
        // A folder without the file has no server, and reading must not make one.
        let lock = if disk.exists(&lock_path).map_err(disk_error("looking for the lock"))? {
            match disk.lock(&lock_path) {
                Ok(lock) => Some(lock),
                Err(_) if force => None,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    return Err(OfflineError::Locked(dir.to_owned()));
                }
                Err(e) => return Err(disk_error(format!("locking {}", dir.display()))(e)),
            }
        } else {
            None
        };
        let generation = generation_of(&*disk, dir)?;
        let mut findings = Vec::new();
        let base = scan::base(&*disk, dir, &mut findings)?;
        let log = scan::log(&*disk, dir, &group, &mut findings)?;
        let mut this = Self {
            dir: dir.to_owned(),
            _lock: lock,
            node,
            group,
            generation,
            committed: base.state.clone(),
            newest: base.state.clone(),
            committed_id: base.state.counters.applied,
            last_id: base.state.counters.applied,
            base,
            log,
            findings,
            tail: Vec::new(),
        };
        this.replay();
        Ok(this)
    }

    /// Applies the log to the snapshot, first as far as it is committed, then to its end.
    fn replay(&mut self) {
        let base = self.base.applied;
        let first = self.log.entries.iter().position(|e| e.log_id.index > base.unwrap_or(0) || base.is_none());
        let entries: Vec<Entry> = first.map_or_else(Vec::new, |i| self.log.entries[i..].to_vec());
        let expected = base.map_or(0, |i| i + 1);
        if let Some(found) = entries.first().map(|e| e.log_id.index).filter(|i| *i > expected) {
            self.damage(format!("entries {expected} to {} between snapshot and log are missing", found - 1));
            self.base.lost = vec![(Bytes::new(), None)];
        }
        // Who is alone needs nobody's word for what is committed.
        let mut members = self.base.state.counters.membership.clone();
        for entry in &entries {
            if let openraft::EntryPayload::Membership(m) = &entry.payload {
                members = Membership::new(Some(entry.log_id), m.clone());
            }
        }
        let voters: Vec<u64> = members.voter_ids().collect();
        let committed = if voters == [self.node] {
            entries.last().map(|e| e.log_id.index)
        } else {
            self.log.committed.map(|id| id.index)
        };
        let split = entries.partition_point(|e| committed.is_some_and(|c| e.log_id.index <= c));
        let mut state = self.base.state.clone();
        for entry in &entries[..split] {
            self.apply(&mut state, entry);
            self.committed_id = Some(entry.log_id);
        }
        self.committed = state.clone();
        for entry in &entries[split..] {
            self.apply(&mut state, entry);
        }
        self.last_id = entries.last().map(|e| e.log_id).or(self.committed_id);
        self.tail = entries[split..].to_vec();
        self.newest = state;
    }

    fn damage(&mut self, what: String) {
        let file = self.dir.display().to_string();
        self.findings.push(Finding { severity: Severity::Damage, file, offset: None, what });
    }

    fn apply(&mut self, state: &mut State, entry: &Entry) {
        state.counters.applied = Some(entry.log_id);
        match &entry.payload {
            openraft::EntryPayload::Blank => {}
            openraft::EntryPayload::Membership(m) => {
                state.counters.membership = Membership::new(Some(entry.log_id), m.clone());
            }
            openraft::EntryPayload::Normal(proposal) => match decode::<Batch>(&proposal.0) {
                Ok(mut batch) => {
                    if !self.base.lost.is_empty() {
                        assume(&mut batch, state, &self.base.lost);
                    }
                    state.apply(batch, &Retention::default());
                }
                Err(e) => self.damage(format!("entry {} can't be read: {e}", entry.log_id.index)),
            },
        }
    }

    /// The member and group that a folder says it is of.
    pub fn whose(disk: &dyn Disk, dir: &Path) -> Result<(u64, GroupId), OfflineError> {
        identity(disk, dir)
    }

    pub fn node(&self) -> u64 {
        self.node
    }

    pub fn group(&self) -> &GroupId {
        &self.group
    }

    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// Refuses a damaged folder.
    pub fn require_sound(&self) -> Result<(), OfflineError> {
        let damages: Vec<_> = self.findings.iter().filter(|f| f.severity == Severity::Damage).collect();
        match damages.first() {
            None => Ok(()),
            Some(first) => {
                Err(OfflineError::Damaged { path: self.dir.clone(), count: damages.len(), first: first.to_string() })
            }
        }
    }

    fn state(&self, uncommitted: bool) -> &State {
        if uncommitted { &self.newest } else { &self.committed }
    }

    /// The keys of a range, of what is committed or of everything that is there.
    pub fn range(&self, request: &RangeRequest, uncommitted: bool) -> Result<RangeResponse, StoreError> {
        self.state(uncommitted).range(request)
    }

    /// Every version of a key that is kept, oldest first.
    pub fn history(&self, key: &[u8], uncommitted: bool) -> Vec<KeyVersion> {
        let state = self.state(uncommitted);
        let stamp = |revision: u64| {
            let at = usize::try_from(revision.checked_sub(state.counters.oldest + 1)?).ok()?;
            state.history.get(at).filter(|r| r.revision == revision).map(|r| r.timestamp_ms)
        };
        let Some(slot) = state.keys.get(&Bytes::copy_from_slice(key)) else { return Vec::new() };
        slot.versions()
            .map(|v| KeyVersion {
                revision: Revision(v.modified),
                created: Revision(v.created),
                timestamp_ms: stamp(v.modified),
                value: v.value.clone(),
                lease: (v.lease != 0).then_some(v.lease),
            })
            .collect()
    }

    /// What lies behind the commit position.
    pub fn tail(&self) -> Vec<TailEntry> {
        self.tail.iter().map(tail_entry).collect()
    }

    pub fn facts(&self) -> Facts {
        let state = &self.committed;
        let term = self.log.vote.map_or(0, |v| v.leader_id.term).max(self.last_id.map_or(0, |id| id.leader_id.term));
        Facts {
            node: self.node,
            group: self.group.clone(),
            generation: self.generation,
            revision: state.revision(),
            oldest: state.oldest(),
            timestamp_ms: state.counters.timestamp_ms,
            keys: state.counters.live_keys,
            leases: state.leases.len() as u64,
            members: members_of(&self.newest.counters.membership),
            term,
            committed_index: self.committed_id.map(|id| id.index),
            last_index: self.last_id.map(|id| id.index),
            tail: self.tail.len(),
            snapshot: self.base.file.clone(),
            segments: self.log.segments,
            frames: self.log.frames,
            log_bytes: self.log.bytes,
        }
    }

    /// Checks everything that was read against itself: sums and sequences were checked while reading; here the state is
    /// counted again.
    pub fn verify(&self) -> Report {
        let mut findings = self.findings.clone();
        let file = self.dir.display().to_string();
        let recount = audit::recount(&self.newest);
        findings.extend(recount.into_iter().map(|what| Finding {
            severity: Severity::Damage,
            file: file.clone(),
            offset: None,
            what: format!("the state does not add up: {what}"),
        }));
        Report { facts: self.facts(), findings }
    }
}

/// The members that a configuration names.
pub(crate) fn members_of(membership: &Membership) -> BTreeMap<u64, Member> {
    let voters: Vec<u64> = membership.voter_ids().collect();
    let member = |(id, node): (&u64, &openraft::BasicNode)| {
        (*id, Member { endpoint: node.addr.clone(), voter: voters.contains(id) })
    };
    membership.nodes().map(member).collect()
}

/// Whose folder it is.
fn identity(disk: &dyn Disk, dir: &Path) -> Result<(u64, GroupId), OfflineError> {
    let not = |reason: &str| OfflineError::NotAStore { path: dir.to_owned(), reason: reason.to_owned() };
    let path = dir.join(FORMAT_FILE);
    if !disk.exists(&path).map_err(disk_error("looking for FORMAT"))? {
        return Err(not("it has no file FORMAT"));
    }
    let text = disk.read(&path).map_err(disk_error("reading FORMAT"))?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let field = |name: &str| text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
    let format: u32 = field("nexus-store").and_then(|n| n.parse().ok()).ok_or_else(|| not("its FORMAT is damaged"))?;
    if format > FORMAT {
        return Err(OfflineError::NewerFormat { path: dir.to_owned(), found: format });
    }
    let node = field("node").and_then(|n| n.parse().ok()).ok_or_else(|| not("its FORMAT names no node"))?;
    let group = field("group").and_then(|n| n.parse().ok()).ok_or_else(|| not("its FORMAT names no group"))?;
    Ok((node, group))
}

/// Where keys of the snapshot are lost, a compare on one of them can't be evaluated. The entry is in the log because its
/// writer expected it to hold, so it is taken as one that did.
fn assume(batch: &mut Batch, state: &State, lost: &[(Bytes, Option<Bytes>)]) {
    let unknown = |key: &Bytes| {
        !state.keys.contains_key(key)
            && lost.iter().any(|(from, to)| key >= from && to.as_ref().is_none_or(|to| key < to))
    };
    for command in &mut batch.commands {
        if let Command::Txn(txn) = command {
            txn.compares.retain(|c| !unknown(&c.key));
        }
    }
}

fn tail_entry(entry: &Entry) -> TailEntry {
    let (index, term) = (entry.log_id.index, entry.log_id.leader_id.term);
    let mut out = TailEntry { index, term, at_ms: None, commands: 0, keys: Vec::new() };
    if let openraft::EntryPayload::Normal(proposal) = &entry.payload
        && let Ok(batch) = decode::<Batch>(&proposal.0)
    {
        out.at_ms = Some(batch.at_ms);
        out.commands = batch.commands.len();
        let txns = batch.commands.iter().filter_map(|c| if let Command::Txn(txn) = c { Some(txn) } else { None });
        let keys = txns.flat_map(|t| t.ops.iter().map(Op::key));
        out.keys = keys.take(100).map(|k| show(k)).collect();
    }
    out
}

/// Bytes for people: text as it is, anything else with escapes.
pub fn show(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => bytes.escape_ascii().to_string(),
    }
}
