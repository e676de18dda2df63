//! The two kinds of logs: a group's, whose records are the leaves of a tree and stand in the store, and a server's own chain,
//! which a group's log anchors.
//!
//! Both are values: whoever appends puts what comes out into its own transaction, and throws the value away when that fails.
//!
//! **A group's log** ([`Log`]) has one writer. An append changes the record's row, the state's row (once for a transaction, however
//! many records are in it) and, every 256th time, two tiles. A new writer resumes from the state's row, the unfinished tiles
//! and the last records, at most 255.
//!
//! **A server's chain** ([`Chain`]) takes what is no mutation: logins, refusals, reads of secrets. It has no tree; what makes
//! it binding is the [`Anchor`] that the server has written into its region's log every minute. A server that restarts goes on after
//! its last anchor, or after what it still has of the chain.

use std::convert::Infallible;

use nexus_model::RequestId;

use crate::hash::Hash;
use crate::merkle::{Frontier, whole};
use crate::record::{
    Actor, ActorKind, Anchor, Answer, Draft, Entry, MAX_NUMBER, PersonalRef, Record, RecordError, Retention, Target,
    VERSION,
};
use crate::tiles::{TILE, TileId, Tiles, encode_tile, open_tiles};

/// The action of records that carry an anchor.
pub const ANCHOR_ACTION: &str = "audit:anchor";
const STATE_VERSION: u8 = 1;

/// What an append leaves to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    pub index: u64,
    /// The record's hash.
    pub hash: Hash,
    /// The row of the record: an [`Entry`] as JSON.
    pub row: Vec<u8>,
    /// Tiles to write, in their stored form. Mostly none. A server's chain has none at all.
    pub tiles: Vec<(TileId, Vec<u8>)>,
}

/// How far a group's log has come: one small row, written in each transaction that appends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogState {
    pub frontier: Frontier,
    /// The hash of the last record.
    pub head: Hash,
}

/// Why a log can't go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError<E = Infallible> {
    #[error("the log's state can't be read ({0}): restore it from a backup, or rebuild it from the records")]
    State(&'static str),
    #[error("tile {id} has {has} hashes, {needs} are needed: rebuild it from the records")]
    Incomplete { id: TileId, has: usize, needs: usize },
    #[error("the stored tiles and the last records are not those of the log's state: verify an export before going on")]
    Differs,
    #[error("reading a tile failed: {0}")]
    Tiles(E),
}

impl LogState {
    /// Version, size, hash of the last record, peaks: 1 + 8 (big-endian) + 32 + 32 × n bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![STATE_VERSION];
        bytes.extend(self.frontier.size().to_be_bytes());
        bytes.extend(self.head.0);
        bytes.extend(encode_tile(self.frontier.peaks()));
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Self, ResumeError> {
        let cut = ResumeError::State("it is cut off");
        let Some((&version, rest)) = bytes.split_first() else { return Err(cut) };
        if version != STATE_VERSION {
            return Err(ResumeError::State("it is of another version"));
        }
        let (size, rest) = rest.split_first_chunk().ok_or_else(|| cut.clone())?;
        let (head, rest) = rest.split_first_chunk().ok_or(cut)?;
        let (peaks, rest) = rest.as_chunks::<{ Hash::LENGTH }>();
        let peaks = peaks.iter().map(|p| Hash(*p)).collect();
        let frontier = Frontier::from_parts(u64::from_be_bytes(*size), peaks).filter(|_| rest.is_empty());
        let frontier = frontier.ok_or(ResumeError::State("its size and its peaks disagree"))?;
        Ok(Self { frontier, head: Hash(*head) })
    }

    /// The unfinished tiles that [`Log::resume`] will read, and how many hashes each has. That of level 0 is not stored: its
    /// hashes are those of the last records.
    pub fn open_tiles(&self) -> Vec<(TileId, usize)> {
        open_tiles(self.frontier.size())
    }
}

/// A group's log, as its writer holds it. At most 256 hashes a level: 24 KiB for a log of 16 million records.
#[derive(Debug, Clone)]
pub struct Log {
    group: String,
    frontier: Frontier,
    head: Hash,
    /// The hashes of the unfinished tile of each level.
    open: Vec<Vec<Hash>>,
}

/// The log as it was before an append.
#[derive(Debug)]
pub struct Mark {
    frontier: Frontier,
    head: Hash,
    /// Only if the append fills a tile.
    open: Option<Vec<Vec<Hash>>>,
}

impl Log {
    /// A log without records.
    pub fn new(group: impl Into<String>) -> Self {
        Self { group: group.into(), frontier: Frontier::default(), head: Hash::ZERO, open: Vec::new() }
    }

    /// Goes on where another writer ended. The tiles are those that the state's [`LogState::open_tiles`] names.
    pub fn resume<T: Tiles>(
        group: impl Into<String>,
        state: LogState,
        tiles: &T,
    ) -> Result<Self, ResumeError<T::Error>> {
        let mut open = Vec::new();
        for (id, needs) in state.open_tiles() {
            let tile = tiles.tile(id).map_err(ResumeError::Tiles)?;
            let hashes = tile.get(..needs).ok_or(ResumeError::Incomplete { id, has: tile.len(), needs })?;
            open.resize(usize::from(id.level), Vec::new());
            open.push(hashes.to_vec());
        }
        // The peaks are the subtrees of the unfinished tiles, from the highest level down.
        let mut peaks = Vec::new();
        for hashes in open.iter().rev() {
            let mut rest = hashes.as_slice();
            while let Some(height) = rest.len().checked_ilog2() {
                let (subtree, after) = rest.split_at(1 << height);
                peaks.push(whole(subtree));
                rest = after;
            }
        }
        let last = open.first().and_then(|leaves| leaves.last());
        if peaks != state.frontier.peaks() || last.is_some_and(|l| *l != state.head) {
            return Err(ResumeError::Differs);
        }
        Ok(Self { group: group.into(), frontier: state.frontier, head: state.head, open })
    }

    pub fn group(&self) -> &str {
        &self.group
    }

    /// How many records it has; the index of the next.
    pub fn size(&self) -> u64 {
        self.frontier.size()
    }

    pub fn root(&self) -> Hash {
        self.frontier.root()
    }

    pub fn state(&self) -> LogState {
        LogState { frontier: self.frontier.clone(), head: self.head }
    }

    /// What [`Log::take_back`] needs to undo the next append. Small, save before every 256th.
    pub fn mark(&self) -> Mark {
        let fills = self.open.first().is_some_and(|leaves| leaves.len() + 1 == TILE);
        Mark { frontier: self.frontier.clone(), head: self.head, open: fills.then(|| self.open.clone()) }
    }

    /// Undoes the one append since the mark, as if it had never been: for a transaction that is given up before anyone has
    /// seen it. Appends are taken back in reverse order.
    pub fn take_back(&mut self, mark: Mark) {
        if self.size() == mark.frontier.size() {
            return;
        }
        match mark.open {
            Some(open) => self.open = open,
            None => drop(self.open.first_mut().and_then(Vec::pop)),
        }
        self.frontier = mark.frontier;
        self.head = mark.head;
    }

    /// Appends a record. After an error the log is as before.
    pub fn append(&mut self, draft: Draft) -> Result<Appended, RecordError> {
        let index = self.size();
        let (hash, row) = place(draft, &self.group, index, self.head)?;
        self.head = hash;
        self.frontier.append(hash);
        Ok(Appended { index, hash, row, tiles: self.fill(hash) })
    }

    /// Puts a leaf into the tiles, and answers those that must be written.
    fn fill(&mut self, leaf: Hash) -> Vec<(TileId, Vec<u8>)> {
        let mut tiles = Vec::new();
        let (mut hash, mut number) = (leaf, self.size() - 1);
        for level in 0.. {
            number /= TILE as u64;
            if self.open.len() == usize::from(level) {
                self.open.push(Vec::new());
            }
            let tile = &mut self.open[usize::from(level)];
            tile.push(hash);
            let full = tile.len() == TILE;
            if full || level > 0 {
                tiles.push((TileId { level, number }, encode_tile(tile)));
            }
            if !full {
                break;
            }
            hash = whole(tile);
            tile.clear();
        }
        tiles
    }
}

/// A server's own chain of records.
#[derive(Debug, Clone)]
pub struct Chain {
    group: String,
    server: String,
    /// The first record that isn't anchored yet.
    from: u64,
    next: u64,
    head: Hash,
}

impl Chain {
    /// The chain of a server in its region, behind its last anchor, if it ever had one.
    pub fn resume(region: &str, server: impl Into<String>, last: Option<&Anchor>) -> Self {
        let server = server.into();
        let (next, head) = last.map_or((0, Hash::ZERO), |a| (a.to + 1, a.head));
        Self { group: chain_group(region, &server), server, from: next, next, head }
    }

    /// Takes over a record that was appended before a restart and isn't anchored. One that doesn't continue the chain is
    /// refused, and so must be everything behind it.
    pub fn replay(&mut self, entry: &Entry) -> Result<(), RecordError> {
        let record = &entry.record;
        if record.group != self.group || record.index != self.next || record.previous != self.head {
            return Err(RecordError::Unreadable(format!("it doesn't continue `{}` at {}", self.group, self.next)));
        }
        self.head = record.hash()?;
        self.next += 1;
        Ok(())
    }

    /// Appends a record. After an error the chain is as before.
    pub fn append(&mut self, draft: Draft) -> Result<Appended, RecordError> {
        let index = self.next;
        let (hash, row) = place(draft, &self.group, index, self.head)?;
        self.head = hash;
        self.next += 1;
        Ok(Appended { index, hash, row, tiles: Vec::new() })
    }

    /// The place of the next record.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// How many records wait to be anchored.
    pub fn waiting(&self) -> u64 {
        self.next - self.from
    }

    /// What settles all that waits; `None` if nothing does.
    pub fn anchor(&self) -> Option<Anchor> {
        let to = self.next.checked_sub(1).filter(|_| self.waiting() > 0)?;
        Some(Anchor { from: self.from, head: self.head, server: self.server.clone(), to })
    }

    /// The anchor is committed. One that was committed before changes nothing.
    pub fn anchored(&mut self, anchor: &Anchor) {
        self.from = self.from.max(anchor.to.saturating_add(1)).min(self.next);
    }
}

impl Anchor {
    /// Whether it continues where the server's last one ended. A writer refuses one that doesn't.
    pub fn follows(&self, last: Option<&Self>) -> bool {
        self.from == last.map_or(0, |l| l.to + 1) && self.from <= self.to && self.to < MAX_NUMBER
    }

    /// The record that carries it.
    pub fn draft(self, time: u64, request_id: RequestId) -> Draft {
        Draft {
            time,
            actor: Actor {
                access_key: None,
                kind: ActorKind::Server,
                name: self.server.clone(),
                organization: None,
                session: None,
            },
            action: ANCHOR_ACTION.to_owned(),
            target: Some(Target {
                name: self.server.clone(),
                organization: None,
                plural: "servers".to_owned(),
                project: None,
                uid: None,
            }),
            policies: Vec::new(),
            answer: Answer::Ok,
            revision: None,
            request_id,
            change: None,
            retention: Retention::Security,
            anchor: Some(self),
            personal: None,
        }
    }
}

/// What the records of a server's chain name as their log.
pub fn chain_group(region: &str, server: &str) -> String {
    format!("{region}/{server}")
}

/// Makes a draft the record at that place: its hash and its row.
fn place(draft: Draft, group: &str, index: u64, previous: Hash) -> Result<(Hash, Vec<u8>), RecordError> {
    let (personal, sealed) = draft.personal.map_or((None, None), |sealed| {
        (Some(PersonalRef { digest: Hash::of(&sealed.bytes), subject: sealed.subject }), Some(sealed.bytes))
    });
    let record = Record {
        action: draft.action,
        actor: draft.actor,
        anchor: draft.anchor,
        answer: draft.answer,
        change: draft.change,
        group: group.to_owned(),
        index,
        personal,
        policies: draft.policies,
        previous,
        request_id: draft.request_id,
        retention: draft.retention,
        revision: draft.revision,
        target: draft.target,
        time: draft.time,
        version: VERSION,
    };
    let hash = record.hash()?;
    Ok((hash, Entry { inclusion: None, personal: sealed, record }.to_row()))
}
