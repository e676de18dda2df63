//! The format of the write-ahead log, and reading it back. Pure but for reading whole segment files.
//!
//! The log is a row of segment files `wal-<number>.log`. A segment begins with a header (magic, format version, number,
//! CRC). After it come frames; one frame is what one group commit wrote and made durable together:
//!
//! ```text
//! magic u32 · sequence u64 · payload length u32 · CRC-32C u32 over sequence, length and payload · payload
//! ```
//!
//! A payload is a row of records: kind u8 · length of the group's name u8 · the name · body length u32 · body. All
//! numbers are little-endian. Frames count up without a gap over all segments.
//!
//! The writer never begins a frame before the one ahead of it is durable. So after a crash only the last frame can be
//! damaged: a bad frame with nothing valid behind it is a torn tail and is cut off; a bad frame with a valid one behind
//! it was durable once, so the medium is corrupt, and the log refuses to open. Each segment's first frame repeats every
//! group's vote and purge position, so that removing old segments loses nothing.
//!
//! A segment is made with room for all of its frames, zeros that are durable, because making a file longer with every
//! sync costs more than the sync of its data (twenty times as much where these lines were measured). So zeros lie behind
//! the log's end; opening cuts them off like a torn tail, and only the last segment ever has any.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use nexus_env::Disk;
use openraft::{BasicNode, EntryPayload, Membership};
use serde::Deserialize;

use super::raft::{Entry, LogId, Proposal, Vote};
use crate::error::StoreError;
use crate::types::GroupId;

const SEGMENT_MAGIC: &[u8; 6] = b"NXWAL\0";
pub const FORMAT: u16 = 1;
pub const SEGMENT_HEADER: usize = 6 + 2 + 8 + 4;
const FRAME_MAGIC: u32 = 0x4658_4e57;
const FRAME_HEADER: usize = 4 + 8 + 4 + 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An [`Entry`]; the body starts with its index.
    Entry = 1,
    Vote = 2,
    /// Entries from this index (u64) on are void.
    Truncate = 3,
    /// Entries up to this log id are in a snapshot.
    Purge = 4,
    /// Entries up to this log id were committed. Written along, never synced for.
    Committed = 5,
}

impl Kind {
    fn from_byte(b: u8) -> Option<Self> {
        Some(match b {
            1 => Self::Entry,
            2 => Self::Vote,
            3 => Self::Truncate,
            4 => Self::Purge,
            5 => Self::Committed,
            _ => return None,
        })
    }
}

pub fn segment_name(number: u64) -> String {
    format!("wal-{number:016x}.log")
}

/// A segment to come: zeros, until it takes its place and name.
pub const SPARE_NAME: &str = "wal-spare.tmp";

pub fn segment_number(name: &str) -> Option<u64> {
    u64::from_str_radix(name.strip_prefix("wal-")?.strip_suffix(".log")?, 16).ok()
}

pub fn segment_header(number: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(SEGMENT_HEADER);
    out.extend_from_slice(SEGMENT_MAGIC);
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&number.to_le_bytes());
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

/// Adds a record to a payload.
pub fn push_record(payload: &mut Vec<u8>, kind: Kind, group: &GroupId, body: &[u8]) {
    payload.push(kind as u8);
    payload.push(group.as_str().len() as u8);
    payload.extend_from_slice(group.as_str().as_bytes());
    payload.extend_from_slice(&(body.len() as u32).to_le_bytes());
    payload.extend_from_slice(body);
}

fn frame_crc(sequence: &[u8], length: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(sequence), length), payload)
}

pub fn push_frame(out: &mut Vec<u8>, sequence: u64, payload: &[u8]) {
    let (sequence, length) = (sequence.to_le_bytes(), (payload.len() as u32).to_le_bytes());
    out.extend_from_slice(&FRAME_MAGIC.to_le_bytes());
    out.extend_from_slice(&sequence);
    out.extend_from_slice(&length);
    out.extend_from_slice(&frame_crc(&sequence, &length, payload).to_le_bytes());
    out.extend_from_slice(payload);
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at + 4)?.try_into().ok()?))
}

pub fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(data.get(at..at + 8)?.try_into().ok()?))
}

/// A valid frame at `at`: its sequence, payload and end.
pub fn frame_at(data: &[u8], at: usize) -> Option<(u64, &[u8], usize)> {
    if u32_at(data, at)? != FRAME_MAGIC {
        return None;
    }
    let sequence = u64_at(data, at + 4)?;
    let length = u32_at(data, at + 12)? as usize;
    let crc = u32_at(data, at + 16)?;
    let start = at + FRAME_HEADER;
    let payload = data.get(start..start.checked_add(length)?)?;
    let ok = frame_crc(&data[at + 4..at + 12], &data[at + 12..at + 16], payload) == crc;
    ok.then_some((sequence, payload, start + length))
}

/// The offset of a valid frame behind `from` whose sequence is not before `sequence`.
pub fn later_frame(data: &[u8], from: usize, sequence: u64) -> Option<usize> {
    let magic = FRAME_MAGIC.to_le_bytes();
    (from..data.len().saturating_sub(FRAME_HEADER - 1))
        .filter(|&at| data[at..at + 4] == magic)
        .find(|&at| frame_at(data, at).is_some_and(|(found, _, _)| found >= sequence))
}

/// Where the zeros begin that a file may end with.
pub fn zeros_from(data: &[u8]) -> usize {
    // Whole blocks are compared, because there may be many.
    const ZEROS: [u8; 4096] = [0; 4096];
    let blocks = data.rchunks(ZEROS.len()).take_while(|block| **block == ZEROS[..block.len()]);
    let left = data.len() - blocks.map(<[u8]>::len).sum::<usize>();
    data[..left].iter().rposition(|b| *b != 0).map_or(0, |last| last + 1)
}

/// One group's log, as it was made durable.
#[derive(Debug, Default)]
pub struct GroupLog {
    pub vote: Option<Vote>,
    pub committed: Option<LogId>,
    pub purged: Option<LogId>,
    /// With the size of each in the log.
    pub entries: VecDeque<(Entry, u64)>,
}

impl GroupLog {
    pub fn last_log_id(&self) -> Option<LogId> {
        self.entries.back().map(|(e, _)| e.log_id).or(self.purged)
    }

    pub fn truncate(&mut self, from: u64) {
        while self.entries.back().is_some_and(|(e, _)| e.log_id.index >= from) {
            self.entries.pop_back();
        }
    }

    pub fn purge(&mut self, upto: LogId) {
        while self.entries.front().is_some_and(|(e, _)| e.log_id.index <= upto.index) {
            self.entries.pop_front();
        }
        self.purged = self.purged.max(Some(upto));
    }

    pub fn entry(&mut self, entry: Entry, bytes: u64) -> Result<(), String> {
        let index = entry.log_id.index;
        if self.purged.is_some_and(|p| index <= p.index) {
            return Ok(());
        }
        match self.entries.back() {
            Some((last, _)) if index != last.log_id.index + 1 => {
                Err(format!("entry {index} follows entry {}", last.log_id.index))
            }
            _ => {
                self.entries.push_back((entry, bytes));
                Ok(())
            }
        }
    }

    pub fn check(&self) -> Result<(), String> {
        let expected = self.purged.map_or(0, |p| p.index + 1);
        match self.entries.front() {
            Some((first, _)) if first.log_id.index != expected => {
                Err(format!("the log begins at entry {} instead of {expected}", first.log_id.index))
            }
            _ => Ok(()),
        }
    }
}

/// A segment that is on disk.
#[derive(Debug, Clone)]
pub struct Segment {
    pub number: u64,
    pub path: PathBuf,
    pub len: u64,
    /// The last entry of each group that it holds.
    pub last: BTreeMap<GroupId, u64>,
}

/// What opening found.
#[derive(Debug, Default)]
pub struct Recovered {
    pub groups: BTreeMap<GroupId, GroupLog>,
    pub segments: Vec<Segment>,
    pub next_sequence: u64,
    /// Bytes of a torn tail that were cut off.
    pub torn: u64,
}

/// Reads the whole log and cuts off a torn tail.
pub fn recover(disk: &dyn Disk, dir: &Path) -> Result<Recovered, StoreError> {
    let storage = |e: std::io::Error| StoreError::Storage(e.to_string());
    let mut numbers: Vec<u64> =
        disk.list(dir).map_err(storage)?.iter().filter_map(|e| segment_number(&e.name)).collect();
    numbers.sort_unstable();
    let mut out = Recovered::default();
    let mut sequence: Option<u64> = None;
    for (i, &number) in numbers.iter().enumerate() {
        let is_last = i + 1 == numbers.len();
        let path = dir.join(segment_name(number));
        let data = Bytes::from(disk.read(&path).map_err(storage)?);
        let written = zeros_from(&data);
        let corrupt = |offset: usize, reason: String| StoreError::Corrupt {
            path: path.display().to_string(),
            offset: offset as u64,
            reason,
        };
        if i > 0 && number != numbers[i - 1] + 1 {
            return Err(corrupt(0, format!("segment {} is missing", number - 1)));
        }
        if data.len() < SEGMENT_HEADER || data[..SEGMENT_HEADER] != segment_header(number) {
            if data.len() >= 8 && data[..6] == *SEGMENT_MAGIC {
                let found = u16::from_le_bytes([data[6], data[7]]);
                let sum = u32_at(&data, SEGMENT_HEADER - 4);
                if found > FORMAT && sum == Some(crc32c::crc32c(&data[..SEGMENT_HEADER - 4])) {
                    let (found, supported) = (u32::from(found), u32::from(FORMAT));
                    return Err(StoreError::NewerFormat { path: path.display().to_string(), found, supported });
                }
            }
            if !is_last || later_frame(&data[..written], 0, sequence.unwrap_or(0)).is_some() {
                return Err(corrupt(0, "the segment header is damaged".into()));
            }
            // The crash came while the segment was being made.
            out.torn += written as u64;
            disk.remove_file(&path).map_err(storage)?;
            disk.sync_dir(dir).map_err(storage)?;
            continue;
        }
        let mut segment = Segment { number, path: path.clone(), len: 0, last: BTreeMap::new() };
        let mut at = SEGMENT_HEADER;
        while at < data.len() {
            match frame_at(&data, at) {
                Some((found, payload, end)) if sequence.is_none_or(|s| s == found) => {
                    read_records(&data, payload, &mut out.groups, &mut segment.last).map_err(|e| corrupt(at, e))?;
                    sequence = Some(found + 1);
                    at = end;
                }
                Some((found, ..)) => {
                    return Err(corrupt(at, format!("frame {found} where {} belongs", sequence.unwrap_or(0))));
                }
                None => {
                    if !is_last {
                        return Err(corrupt(at, "a frame in the middle of the log is damaged".into()));
                    }
                    if let Some(later) = later_frame(&data[..written.max(at)], at + 1, sequence.unwrap_or(0)) {
                        return Err(corrupt(at, format!("a damaged frame before a valid one at byte {later}")));
                    }
                    out.torn += written.saturating_sub(at) as u64;
                    let file = disk.open(&path).map_err(storage)?;
                    file.truncate(at as u64).map_err(storage)?;
                    file.sync().map_err(storage)?;
                    break;
                }
            }
        }
        segment.len = at as u64;
        out.segments.push(segment);
    }
    // A process that died before its sync may have left this to the kernel alone. From here on it is acknowledged, voted by
    // and cut by, so it has to be durable first; and so do the names, a snapshot's too.
    if let Some(last) = out.segments.last() {
        disk.open(&last.path).and_then(|file| file.sync()).map_err(storage)?;
    }
    disk.sync_dir(dir).map_err(storage)?;
    out.next_sequence = sequence.unwrap_or(0);
    for (group, log) in &out.groups {
        log.check().map_err(|reason| StoreError::Corrupt {
            path: dir.display().to_string(),
            offset: 0,
            reason: format!("group {group}: {reason}"),
        })?;
    }
    Ok(out)
}

/// Takes the first record off a payload: its kind, group and body.
pub fn take_record<'a>(rest: &mut &'a [u8]) -> Result<(Kind, GroupId, &'a [u8]), String> {
    let short = || "a record is cut short".to_owned();
    let data = *rest;
    let kind = *data.first().ok_or_else(short)?;
    let kind = Kind::from_byte(kind).ok_or_else(|| format!("unknown record kind {kind}"))?;
    let name_len = usize::from(*data.get(1).ok_or_else(short)?);
    let name = std::str::from_utf8(data.get(2..2 + name_len).ok_or_else(short)?).map_err(|e| e.to_string())?;
    let group: GroupId = name.parse().map_err(|e: StoreError| e.to_string())?;
    let len = u32_at(data, 2 + name_len).ok_or_else(short)? as usize;
    let start = 6 + name_len;
    let body = data.get(start..start + len).ok_or_else(short)?;
    *rest = &data[start + len..];
    Ok((kind, group, body))
}

fn read_records(
    segment: &Bytes,
    mut rest: &[u8],
    groups: &mut BTreeMap<GroupId, GroupLog>,
    last: &mut BTreeMap<GroupId, u64>,
) -> Result<(), String> {
    while !rest.is_empty() {
        let (kind, group, body) = take_record(&mut rest)?;
        let log = groups.entry(group.clone()).or_default();
        match kind {
            Kind::Entry => {
                let entry = parse_entry(segment, body)?;
                last.insert(group, entry.log_id.index);
                log.entry(entry, body.len() as u64)?;
            }
            Kind::Vote => log.vote = Some(parse(body)?),
            Kind::Truncate => log.truncate(u64_at(body, 0).ok_or("a truncation without an index")?),
            Kind::Purge => log.purge(parse(body)?),
            Kind::Committed => log.committed = log.committed.max(Some(parse(body)?)),
        }
    }
    Ok(())
}

/// An [`Entry`] as it lies in a segment.
#[derive(Deserialize)]
struct StoredEntry<'a> {
    log_id: LogId,
    #[serde(borrow)]
    payload: StoredPayload<'a>,
}

#[derive(Deserialize)]
enum StoredPayload<'a> {
    Blank,
    Normal(&'a [u8]),
    Membership(Membership<u64, BasicNode>),
}

/// Reads an entry without copying its proposal: entries leave memory in the order of the log, so what a slice holds on to
/// is a segment at most.
fn parse_entry(segment: &Bytes, body: &[u8]) -> Result<Entry, String> {
    let StoredEntry { log_id, payload } = rmp_serde::from_slice(body).map_err(|e| e.to_string())?;
    let payload = match payload {
        StoredPayload::Blank => EntryPayload::Blank,
        StoredPayload::Normal(proposal) => EntryPayload::Normal(Proposal(segment.slice_ref(proposal))),
        StoredPayload::Membership(membership) => EntryPayload::Membership(membership),
    };
    Ok(Entry { log_id, payload })
}

pub fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    rmp_serde::from_slice(body).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use nexus_env::MemDisk;

    use super::*;

    #[test]
    fn what_was_read_at_recovery_survives_the_next_power_cut() {
        for seed in 0..20 {
            let (disk, dir) = (MemDisk::new(seed), PathBuf::from("/d"));
            disk.create_dir_all(&dir).unwrap();
            // A process wrote this and was killed before its sync.
            let mut left = segment_header(1);
            push_frame(&mut left, 0, &[]);
            disk.create(&dir.join(segment_name(1))).unwrap().append(&left).unwrap();
            let found = recover(&disk, &dir).unwrap();
            disk.crash();
            assert_eq!(recover(&disk, &dir).unwrap().next_sequence, found.next_sequence, "seed {seed}");
        }
    }
}
