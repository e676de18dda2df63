//! Reading the files of a damaged folder: like the engine does, but past every damage as far as sums allow.

use std::io;
use std::path::Path;

use bytes::Bytes;
use nexus_env::Disk;

use super::{Finding, OfflineError, Severity, disk_error};
use crate::embedded::mvcc::State;
use crate::embedded::raft::{Entry, LogId, SnapshotMeta, Vote};
use crate::embedded::snapshot::{MAGIC, MAX_PART, Part, PartReader};
use crate::embedded::wal::{self, Kind, SEGMENT_HEADER};
use crate::types::GroupId;

/// A range of keys: from, to (exclusive; none is no bound).
pub type KeyRange = (Bytes, Option<Bytes>);

/// What the newest snapshot gave.
#[derive(Default)]
pub struct Base {
    pub file: Option<String>,
    pub state: State,
    /// The last entry that is in it; `None` without a snapshot.
    pub applied: Option<u64>,
    /// Ranges of keys whose part of the snapshot could not be read.
    pub lost: Vec<KeyRange>,
}

/// One group's log as far as it can be read.
#[derive(Default)]
pub struct ScannedLog {
    /// Without a gap.
    pub entries: Vec<Entry>,
    /// Entries that can be read but lie behind a gap.
    pub beyond: Vec<u64>,
    pub vote: Option<Vote>,
    pub committed: Option<LogId>,
    pub purged: Option<LogId>,
    pub segments: usize,
    pub frames: u64,
    pub bytes: u64,
}

fn finding(severity: Severity, file: &Path, offset: Option<usize>, what: impl Into<String>) -> Finding {
    Finding { severity, file: file.display().to_string(), offset: offset.map(|o| o as u64), what: what.into() }
}

fn damage(file: &Path, offset: usize, what: impl Into<String>) -> Finding {
    finding(Severity::Damage, file, Some(offset), what)
}

/// Reads the newest snapshot.
pub fn base(disk: &dyn Disk, dir: &Path, findings: &mut Vec<Finding>) -> Result<Base, OfflineError> {
    let list = disk.list(dir).map_err(disk_error(format!("listing {}", dir.display())))?;
    let mut names: Vec<_> = list.into_iter().map(|e| e.name).filter(|n| n.starts_with("snapshot-")).collect();
    names.retain(|n| n.ends_with(".snap"));
    names.sort();
    let Some(name) = names.pop() else { return Ok(Base::default()) };
    let path = dir.join(&name);
    let data = disk.read(&path).map_err(disk_error(format!("reading {}", path.display())))?;
    let mut base = Base { file: Some(name.clone()), ..Base::default() };
    let mut meta = None;
    let complete = parts(&path, &data, &mut base, &mut meta, findings);
    if !complete {
        findings.push(damage(&path, data.len(), "the end of the snapshot is missing"));
        let last = base.state.keys.get_max().map(|(key, _)| successor(key)).unwrap_or_default();
        base.lost.push((last, None));
        base.state.history.clear();
        base.state.counters.oldest = base.state.counters.revision;
        base.state.counters.history_cost = 0;
    }
    let index = name.strip_prefix("snapshot-").and_then(|n| n.split('-').next()).and_then(|n| n.parse().ok());
    base.applied = match &meta {
        Some(meta) => meta.last_log_id.map(|id| id.index),
        None => index,
    };
    if meta.is_none() {
        findings.push(damage(&path, 0, "the snapshot's header can't be read: its counters are counted anew"));
        guess_counters(&mut base.state);
    }
    if !base.lost.is_empty() {
        // What is gone must not be counted, nor its history be promised.
        let live = base.state.keys.values().filter(|s| s.newest.value.is_some()).count();
        base.state.counters.live_keys = live as u64;
    }
    base.state.rebuild();
    Ok(base)
}

fn successor(key: &Bytes) -> Bytes {
    let mut next = key.to_vec();
    next.push(0);
    next.into()
}

/// The parts of a snapshot; answers whether its end was seen.
fn parts(
    path: &Path,
    data: &[u8],
    base: &mut Base,
    meta: &mut Option<SnapshotMeta>,
    findings: &mut Vec<Finding>,
) -> bool {
    if data.len() < MAGIC.len() || data[..MAGIC.len()] != MAGIC[..] {
        findings.push(damage(path, 0, "the snapshot's first bytes are wrong"));
    }
    let mut at = MAGIC.len();
    // Set while a part is missing: the first key that may have been in it.
    let mut hole: Option<Bytes> = None;
    while at < data.len() {
        let Some((part, end)) = part_at(data, at) else {
            let next = next_part(data, at);
            let until = next.unwrap_or(data.len());
            findings.push(damage(path, at, format!("{} bytes of the snapshot can't be read", until - at)));
            let last = base.state.keys.get_max().map(|(key, _)| successor(key));
            hole.get_or_insert(last.unwrap_or_default());
            at = until;
            continue;
        };
        match part {
            Part::Header(header) => {
                let (found, counters) = *header;
                *meta = Some(found);
                base.state.counters = counters;
            }
            Part::Leases(leases) => base.state.leases.extend(leases),
            Part::Keys(keys) => {
                if let Some(from) = hole.take() {
                    base.lost.push((from, keys.first().map(|(key, _)| key.clone())));
                }
                base.state.keys.extend(keys);
            }
            Part::History(records) => {
                if let Some(from) = hole.take() {
                    base.lost.push((from, None));
                }
                base.state.history.extend(records);
            }
            Part::End { keys, records } => {
                let found = (base.state.keys.len() as u64, base.state.history.len() as u64);
                if (keys, records) != found {
                    let what = format!("{} of {keys} keys and {} of {records} revisions are there", found.0, found.1);
                    findings.push(damage(path, at, what));
                }
                if let Some(from) = hole.take() {
                    base.lost.push((from, None));
                }
                if records != found.1 {
                    // History with holes answers wrongly; without it, only the newest state can be read.
                    base.state.history.clear();
                    base.state.counters.oldest = base.state.counters.revision;
                    base.state.counters.history_cost = 0;
                }
                return true;
            }
        }
        at = end;
    }
    false
}

/// A sound part at `at`, and where it ends.
fn part_at(data: &[u8], at: usize) -> Option<(Part, usize)> {
    let word = |from: usize| Some(u32::from_le_bytes(data.get(from..from + 4)?.try_into().ok()?));
    let len = word(at)? as usize;
    if len == 0 || len > MAX_PART {
        return None;
    }
    let start = at + 8;
    let payload = data.get(start..start.checked_add(len)?)?;
    if crc32c::crc32c(payload) != word(at + 4)? {
        return None;
    }
    Some((PartReader::default().read(payload).ok()?, start + len))
}

/// The next place behind a damaged part where a sound one begins.
fn next_part(data: &[u8], at: usize) -> Option<usize> {
    // Mostly the damage is inside, and the length is right.
    let word = data.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
    let jump =
        word.filter(|len| *len <= MAX_PART).and_then(|len| at.checked_add(8 + len)).filter(|to| *to < data.len());
    jump.filter(|to| part_at(data, *to).is_some())
        .or_else(|| (at + 1..data.len()).find(|&to| part_at(data, to).is_some()))
}

/// Counters of a state whose header is lost.
fn guess_counters(state: &mut State) {
    let newest = state.keys.values().map(|s| s.newest.modified).max().unwrap_or(0);
    let c = &mut state.counters;
    c.revision = state.history.back().map_or(newest, |r| r.revision.max(newest));
    c.timestamp_ms = state.history.back().map_or(0, |r| r.timestamp_ms);
    c.oldest = state.history.front().map_or(c.revision, |r| r.revision.saturating_sub(1));
    c.history_cost = state.history.iter().map(|r| r.cost).sum();
    c.last_lease = state.leases.keys().max().copied().unwrap_or(0);
    c.live_keys = state.keys.values().filter(|s| s.newest.value.is_some()).count() as u64;
}

/// Reads every segment.
pub fn log(
    disk: &dyn Disk,
    dir: &Path,
    group: &GroupId,
    findings: &mut Vec<Finding>,
) -> Result<ScannedLog, OfflineError> {
    let list = disk.list(dir).map_err(disk_error(format!("listing {}", dir.display())))?;
    let mut numbers: Vec<u64> = list.iter().filter_map(|e| wal::segment_number(&e.name)).collect();
    numbers.sort_unstable();
    let mut out = ScannedLog { segments: numbers.len(), ..ScannedLog::default() };
    let mut sequence: Option<u64> = None;
    for (i, &number) in numbers.iter().enumerate() {
        let is_last = i + 1 == numbers.len();
        let path = dir.join(wal::segment_name(number));
        let data = match disk.read(&path) {
            Ok(data) => data,
            // A medium that can't read one file may read the others.
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                findings.push(damage(&path, 0, format!("the segment can't be read: {e}")));
                continue;
            }
            Err(_) => continue,
        };
        out.bytes += data.len() as u64;
        if i > 0 && number != numbers[i - 1] + 1 {
            let what = format!("segments {} to {} are missing", numbers[i - 1] + 1, number - 1);
            findings.push(damage(&path, 0, what));
        }
        let headed = data.len() >= SEGMENT_HEADER && data[..SEGMENT_HEADER] == wal::segment_header(number);
        if !headed {
            let torn = is_last && wal::later_frame(&data, 0, sequence.unwrap_or(0)).is_none();
            let severity = if torn { Severity::Note } else { Severity::Damage };
            let what = if torn { "an unfinished segment, as a crash leaves it" } else { "the header is damaged" };
            findings.push(finding(severity, &path, Some(0), what));
        }
        frames(&path, &data, is_last, group, &mut sequence, &mut out, findings);
    }
    if let (Some(first), Some(purged)) = (out.entries.first(), out.purged)
        && first.log_id.index > purged.index + 1
    {
        let what = format!("the log begins at entry {} instead of {}", first.log_id.index, purged.index + 1);
        findings.push(finding(Severity::Damage, dir, None, what));
    }
    Ok(out)
}

fn frames(
    path: &Path,
    data: &[u8],
    is_last: bool,
    group: &GroupId,
    sequence: &mut Option<u64>,
    out: &mut ScannedLog,
    findings: &mut Vec<Finding>,
) {
    let mut at = SEGMENT_HEADER.min(data.len());
    while at < data.len() {
        let Some((found, payload, end)) = wal::frame_at(data, at) else {
            if is_last && wal::zeros_from(data) <= at {
                // Room that was made in advance.
                return;
            }
            let later = wal::later_frame(data, at + 1, sequence.unwrap_or(0));
            let until = later.unwrap_or(data.len());
            let torn = is_last && later.is_none();
            let severity = if torn { Severity::Note } else { Severity::Damage };
            let what = if torn {
                format!("a torn tail of {} bytes, as a crash leaves it", until - at)
            } else {
                format!("{} bytes of the log can't be read", until - at)
            };
            findings.push(finding(severity, path, Some(at), what));
            at = until;
            continue;
        };
        if let Some(expected) = sequence.filter(|s| *s != found) {
            findings.push(damage(path, at, format!("frame {found} where {expected} belongs")));
        }
        *sequence = Some(found.saturating_add(1));
        out.frames += 1;
        let mut rest = payload;
        while !rest.is_empty() {
            let record = wal::take_record(&mut rest)
                .and_then(|(kind, of, body)| if of == *group { take(kind, body, out) } else { Ok(None) });
            match record {
                Ok(None) => {}
                Ok(Some(gap)) => findings.push(damage(path, at, gap)),
                Err(reason) => {
                    findings.push(damage(path, at, format!("frame {found}: {reason}")));
                    break;
                }
            }
        }
        at = end;
    }
}

/// Takes in a record; answers what is missing before it, if anything.
fn take(kind: Kind, body: &[u8], out: &mut ScannedLog) -> Result<Option<String>, String> {
    match kind {
        Kind::Entry => {
            let entry: Entry = wal::parse(body)?;
            let index = entry.log_id.index;
            if out.purged.is_some_and(|p| index <= p.index) {
                return Ok(None);
            }
            if let Some(last) = out.entries.last().map(|e| e.log_id.index) {
                if index > last + 1 {
                    let first = out.beyond.is_empty();
                    out.beyond.push(index);
                    return Ok(first.then(|| format!("entries {} to {} are missing", last + 1, index - 1)));
                }
                if index <= last {
                    // The truncation before it is lost.
                    out.entries.retain(|e| e.log_id.index < index);
                }
            }
            out.entries.push(entry);
        }
        Kind::Vote => out.vote = Some(wal::parse(body)?),
        Kind::Truncate => {
            let from = wal::u64_at(body, 0).ok_or("a truncation without an index")?;
            out.entries.retain(|e| e.log_id.index < from);
            out.beyond.retain(|index| *index < from);
        }
        Kind::Purge => {
            let upto: LogId = wal::parse(body)?;
            out.entries.retain(|e| e.log_id.index > upto.index);
            out.purged = out.purged.max(Some(upto));
        }
        Kind::Committed => out.committed = out.committed.max(Some(wal::parse(body)?)),
    }
    Ok(None)
}
