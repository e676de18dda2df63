//! Verification of an export: with public keys and, if the reader has kept some, earlier tree heads. It needs nothing else, and
//! memory for the right edge of a tree only, however many records there are.
//!
//! What makes it binding: every record names the hash of the one before, the hashes are the leaves of a tree, and the roots of
//! the tree are signed. So a record can't be changed, removed, added or moved without either breaking a link, or a root, or
//! needing a new signature; and with a new signature the log has two histories, which whoever holds an earlier head sees.
//!
//! A broken link names the record. A log that was rewritten with all its links breaks at a root only: then the
//! report names the stretch between the last root that was right and that one.

use std::collections::BTreeMap;
use std::fmt;

use crate::export::{Consistency, Dropped, EXPORT_VERSION, Header, Line, MAX_LINE, Mode, Pruned};
use crate::hash::Hash;
use crate::head::{HeadError, SignedHead, TreeHead, Verifier};
use crate::log::chain_group;
use crate::merkle::{Frontier, verify_consistency, verify_inclusion};
use crate::record::{Anchor, Entry};

/// What the reader puts up with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// Records whose content was deleted at the end of their retention may stand there as hashes alone. They are counted.
    pub allow_pruned: bool,
    /// The records that an anchor settles may be left out, though the anchor may not. They are counted. `allow_pruned` allows it too.
    pub allow_dropped: bool,
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("the line can't be read: {0}")]
    Malformed(String),
    #[error("the export is of format {0}, this release reads {EXPORT_VERSION}: use a newer one")]
    Version(u8),
    #[error("it belongs to `{0}`")]
    WrongLog(String),
    #[error("it is missing")]
    Removed,
    #[error("it is out of its place")]
    Reordered,
    #[error("it was changed, or the record behind it names another one as the one before")]
    Changed,
    #[error("the signed root of the first {size} records is not theirs: some of these were changed, removed or forged")]
    ChangedWithin { size: u64 },
    #[error("its personal part is not the one that it commits to")]
    Personal,
    #[error("its content is gone; allow that if its time of retention is over")]
    Pruned,
    #[error("no proof shows that it is in the tree of {size} records: it is forged")]
    NotIncluded { size: u64 },
    #[error("the records end at {ends}, {promised} were promised: the rest is missing")]
    Truncated { ends: u64, promised: u64 },
    #[error("no signed tree head covers the records from {0} on")]
    Unsigned(u64),
    #[error(
        "the log has two histories: the tree head of {size} records that you hold and this export's are both signed and \
         contradict each other; keep both, they prove it"
    )]
    Fork { size: u64 },
    #[error(
        "the proof of consistency with your tree head of {size} records is wrong: it was changed, or the log has two \
         histories; ask for another"
    )]
    Inconsistent { size: u64 },
    #[error(
        "nothing shows that the export goes with your tree head of {size} records: export from there, or with a proof"
    )]
    Unproven { size: u64 },
    #[error("{0}")]
    Head(#[from] HeadError),
}

/// The first thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Break {
    /// The line at which it was found, from 1; behind the last one if it was found at the end.
    pub line: u64,
    /// The group, or `{region}/{server}` for a server's chain.
    pub log: String,
    /// The first and the last record that may be at fault, if it is records. The same for one.
    pub records: Option<(u64, u64)>,
    pub fault: Fault,
}

impl fmt::Display for Break {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}, log `{}`", self.line, self.log)?;
        match self.records {
            Some((first, last)) if first == last => write!(f, ", record {first}")?,
            Some((first, last)) => write!(f, ", records {first} to {last}")?,
            None => {}
        }
        write!(f, ": {}", self.fault)
    }
}

/// What an export was found to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    pub cluster: String,
    pub group: String,
    /// The first record, and the one behind the last.
    pub from: u64,
    pub to: u64,
    /// Nothing between them is left out. False for a selected export.
    pub whole: bool,
    /// Records of the group's log that are right so far.
    pub records: u64,
    /// Records of which the hash alone is left.
    pub pruned: u64,
    /// Anchors, records of servers' chains, and such that were dropped.
    pub anchors: u64,
    pub chain_records: u64,
    pub chain_dropped: u64,
    /// Tree heads of the export whose signature and root are right.
    pub heads: u64,
    pub last_head: Option<TreeHead>,
    /// How many of the reader's earlier heads of this log are of the same history.
    pub earlier: u64,
    pub broken: Option<Break>,
}

impl Report {
    pub fn is_right(&self) -> bool {
        self.broken.is_none()
    }
}

/// Verifies the lines of an export. Fails only if one of the reader's own heads is not signed.
pub fn verify<L: AsRef<[u8]>>(
    lines: impl IntoIterator<Item = L>,
    keys: &Verifier,
    earlier: &[SignedHead],
    options: Options,
) -> Result<Report, HeadError> {
    let mut verifier = ExportVerifier::new(keys, earlier, options)?;
    lines.into_iter().for_each(|line| verifier.line(line.as_ref()));
    Ok(verifier.finish())
}

/// A server's chain between its anchor and the anchor's last record.
#[derive(Debug)]
struct OpenChain {
    anchor: Anchor,
    next: u64,
    /// Unknown at the first anchor of an export that doesn't begin with the log.
    previous: Option<Hash>,
}

/// [`verify`], a line at a time.
#[derive(Debug)]
pub struct ExportVerifier<'k> {
    keys: &'k Verifier,
    options: Options,
    /// The reader's heads, by size, and whether they were found to be of this history.
    earlier: Vec<(TreeHead, bool)>,
    header: Option<Header>,
    tree: Frontier,
    previous: Option<Hash>,
    /// The size of the tree at the last root that was right.
    good: u64,
    /// The size of an earlier head whose root isn't that of the records: a change or, if a later root is right, a fork.
    suspect: Option<u64>,
    /// Where the chain of each server goes on.
    chains: BTreeMap<String, (u64, Hash)>,
    /// Every anchor so far was seen, so that a server that isn't known has none.
    all_anchors: bool,
    open: Option<OpenChain>,
    /// The record of a selected export before.
    selected: Option<u64>,
    line: u64,
    report: Report,
}

/// What is wrong, in the terms of one line.
type Outcome = Result<(), Box<Break>>;

impl<'k> ExportVerifier<'k> {
    pub fn new(keys: &'k Verifier, earlier: &[SignedHead], options: Options) -> Result<Self, HeadError> {
        let mut heads = Vec::new();
        for head in earlier {
            heads.push((keys.verify(head)?.clone(), false));
        }
        heads.sort_by_key(|(head, _)| head.size);
        Ok(Self {
            keys,
            options,
            earlier: heads,
            header: None,
            tree: Frontier::default(),
            previous: None,
            good: 0,
            suspect: None,
            chains: BTreeMap::new(),
            all_anchors: false,
            open: None,
            selected: None,
            line: 0,
            report: Report::default(),
        })
    }

    /// Takes the next line, without its newline.
    pub fn line(&mut self, line: &[u8]) {
        self.line += 1;
        let parsed = if line.len() > MAX_LINE {
            Err(format!("it has more than {MAX_LINE} bytes"))
        } else {
            serde_json::from_slice(line).map_err(|e| e.to_string())
        };
        if let Some(broken) = &mut self.report.broken {
            // Nothing more is verified, but a record that seemed to be missing may turn up later.
            if let Ok(Line::Entry(entry) | Line::Chain(entry)) = parsed {
                let record = &entry.record;
                let is_it = record.group == broken.log && broken.records == Some((record.index, record.index));
                if is_it && broken.fault == Fault::Removed {
                    broken.fault = Fault::Reordered;
                }
            }
            return;
        }
        let outcome = match parsed {
            Ok(line) => self.take(line),
            Err(why) => Err(self.here(self.expected(), Fault::Malformed(why))),
        };
        self.note(outcome);
    }

    /// The end of the export.
    pub fn finish(mut self) -> Report {
        self.line += 1;
        if self.report.broken.is_none() {
            let outcome = self.end();
            self.note(outcome);
        }
        self.report
    }

    fn note(&mut self, outcome: Outcome) {
        let Err(broken) = outcome else { return };
        let is_fork = matches!(broken.fault, Fault::Fork { .. });
        // What an earlier head has shown to be wrong comes first.
        self.report.broken = Some(match self.suspect {
            Some(size) if !is_fork => *self.within(size),
            _ => *broken,
        });
    }

    fn take(&mut self, line: Line) -> Outcome {
        let header = match (&self.header, line) {
            (None, Line::Header(header)) => return self.begin(header),
            (None, _) => return Err(self.malformed("the export's first line must be its header")),
            (Some(_), Line::Header(_)) => return Err(self.malformed("there is a second header")),
            (Some(header), line) => (header.mode, line),
        };
        match header {
            (Mode::Whole, Line::Entry(entry)) => self.entry(&entry),
            (Mode::Whole, Line::Pruned(pruned)) => self.pruned(&pruned),
            (Mode::Whole, Line::Chain(entry)) => self.chain(&entry),
            (Mode::Whole, Line::Dropped(dropped)) => self.dropped(&dropped),
            (Mode::Selected, Line::Entry(entry)) => self.select(&entry),
            (Mode::Selected, _) if self.selected.is_none() && self.report.last_head.is_none() => match header.1 {
                Line::Head(note) => self.head(&note),
                _ => Err(self.malformed("the second line of selected records must be a tree head")),
            },
            (Mode::Whole, Line::Head(note)) => self.head(&note),
            (_, Line::Consistency(proof)) => self.consistency(&proof),
            (_, _) => Err(self.malformed("no such line may stand here")),
        }
    }

    fn begin(&mut self, header: Header) -> Outcome {
        if header.version != EXPORT_VERSION {
            return Err(self.here(None, Fault::Version(header.version)));
        }
        (self.report.cluster, self.report.group) = (header.cluster.clone(), header.group.clone());
        (self.report.from, self.report.to) = (header.from, header.to);
        self.report.whole = header.mode == Mode::Whole;
        let edge = Frontier::from_parts(header.from, header.peaks.clone());
        let edge = edge.ok_or_else(|| self.malformed("its peaks are not those of a tree of that size"))?;
        if header.from > header.to || (header.mode == Mode::Selected && header.from > 0) {
            return Err(self.malformed("its bounds are none"));
        }
        self.earlier.retain(|(head, _)| head.cluster == header.cluster && head.group == header.group);
        self.good = edge.size();
        self.all_anchors = edge.size() == 0;
        self.previous = (edge.size() == 0).then_some(Hash::ZERO);
        self.tree = edge;
        let is_whole = header.mode == Mode::Whole;
        self.header = Some(header);
        if is_whole {
            self.compare_earlier();
        }
        Ok(())
    }

    fn entry(&mut self, entry: &Entry) -> Outcome {
        self.closed()?;
        let group = self.report.group.clone();
        let hash = self.check(entry, &group, self.tree.size(), self.previous)?;
        if entry.inclusion.is_some() {
            return Err(self.malformed("proofs of inclusion belong to selected records"));
        }
        if let Some(anchor) = &entry.record.anchor {
            self.open_chain(anchor)?;
        }
        self.report.records += 1;
        self.append(hash);
        Ok(())
    }

    /// Whether the entry is the expected record of its log: its hash.
    fn check(&self, entry: &Entry, log: &str, index: u64, previous: Option<Hash>) -> Result<Hash, Box<Break>> {
        let record = &entry.record;
        if record.group != log {
            return Err(self.at(log, index, Fault::WrongLog(record.group.clone())));
        }
        self.in_place(log, index, record.index)?;
        if previous.is_some_and(|p| p != record.previous) {
            return Err(self.at(log, index.saturating_sub(1), Fault::Changed));
        }
        if !entry.personal_fits() {
            return Err(self.at(log, index, Fault::Personal));
        }
        record.hash().map_err(|e| self.at(log, index, Fault::Malformed(e.to_string())))
    }

    fn in_place(&self, log: &str, expected: u64, found: u64) -> Outcome {
        match found.cmp(&expected) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => Err(self.at(log, expected, Fault::Removed)),
            std::cmp::Ordering::Less => Err(self.at(log, found, Fault::Reordered)),
        }
    }

    fn append(&mut self, hash: Hash) {
        self.tree.append(hash);
        self.previous = Some(hash);
        self.compare_earlier();
    }

    /// Compares the tree with the reader's heads of its size.
    fn compare_earlier(&mut self) {
        let size = self.tree.size();
        let first = self.earlier.partition_point(|(head, _)| head.size < size);
        for (head, found) in self.earlier[first..].iter_mut().take_while(|(head, _)| head.size == size) {
            if head.root == self.tree.root() {
                *found = true;
                self.report.earlier += 1;
                if self.suspect.is_none() {
                    self.good = size;
                }
            } else {
                self.suspect.get_or_insert(size);
            }
        }
    }

    fn pruned(&mut self, pruned: &Pruned) -> Outcome {
        self.closed()?;
        let group = self.report.group.clone();
        self.in_place(&group, self.tree.size(), pruned.index)?;
        if !self.options.allow_pruned {
            return Err(self.at(&group, pruned.index, Fault::Pruned));
        }
        // It may have been an anchor.
        self.chains.clear();
        self.all_anchors = false;
        self.report.pruned += 1;
        self.append(pruned.hash);
        Ok(())
    }

    fn open_chain(&mut self, anchor: &Anchor) -> Outcome {
        let log = chain_group(&self.report.group, &anchor.server);
        let start = self.all_anchors.then_some((0, Hash::ZERO));
        let known = self.chains.get(&anchor.server).copied().or(start);
        if let Some((next, _)) = known {
            self.in_place(&log, next, anchor.from)?;
        }
        if anchor.from > anchor.to {
            return Err(self.malformed("an anchor that holds nothing"));
        }
        let previous = known.map(|(_, head)| head).or((anchor.from == 0).then_some(Hash::ZERO));
        self.report.anchors += 1;
        self.open = Some(OpenChain { anchor: anchor.clone(), next: anchor.from, previous });
        Ok(())
    }

    fn chain(&mut self, entry: &Entry) -> Outcome {
        let Some(open) = &self.open else {
            return Err(self.malformed("the record of a server's chain stands behind no anchor"));
        };
        let log = chain_group(&self.report.group, &open.anchor.server);
        let hash = self.check(entry, &log, open.next, open.previous)?;
        let is_last = open.next == open.anchor.to;
        if is_last && hash != open.anchor.head {
            return Err(self.at(&log, open.next, Fault::Changed));
        }
        self.report.chain_records += 1;
        if is_last {
            self.close_chain();
        } else if let Some(open) = &mut self.open {
            open.next += 1;
            open.previous = Some(hash);
        }
        Ok(())
    }

    fn dropped(&mut self, dropped: &Dropped) -> Outcome {
        let fits = |open: &&OpenChain| {
            let Anchor { from, server, to, .. } = &open.anchor;
            open.next == *from && (dropped.from, &dropped.server, dropped.to) == (*from, server, *to)
        };
        let Some(open) = self.open.as_ref().filter(fits) else {
            return Err(self.malformed("what was dropped is not what the anchor before it names"));
        };
        if !self.options.allow_pruned && !self.options.allow_dropped {
            let log = chain_group(&self.report.group, &open.anchor.server);
            return Err(self.at(&log, dropped.from, Fault::Pruned));
        }
        self.report.chain_dropped += dropped.to - dropped.from + 1;
        self.close_chain();
        Ok(())
    }

    fn close_chain(&mut self) {
        if let Some(OpenChain { anchor, .. }) = self.open.take() {
            self.chains.insert(anchor.server, (anchor.to + 1, anchor.head));
        }
    }

    /// Nothing of an anchored chain is missing.
    fn closed(&self) -> Outcome {
        let Some(open) = &self.open else { return Ok(()) };
        let log = chain_group(&self.report.group, &open.anchor.server);
        Err(self.at(&log, open.next, Fault::Truncated { ends: open.next, promised: open.anchor.to + 1 }))
    }

    fn head(&mut self, note: &str) -> Outcome {
        self.closed()?;
        let signed: SignedHead = note.parse().map_err(|e: HeadError| self.here(None, e.into()))?;
        let head = self.keys.verify(&signed).map_err(|e| self.here(None, e.into()))?;
        if (&head.cluster, &head.group) != (&self.report.cluster, &self.report.group) {
            return Err(self.here(None, Fault::WrongLog(head.origin())));
        }
        if self.earlier.iter().any(|(e, _)| e.size == head.size && e.root != head.root) {
            return Err(self.fork(head.size));
        }
        if self.report.whole {
            let size = self.tree.size();
            if head.size > size {
                return Err(self.at(&self.report.group, size, Fault::Removed));
            }
            if head.size < size {
                return Err(self.malformed("the tree head stands behind records that it doesn't cover"));
            }
            if head.root != self.tree.root() {
                return Err(self.within(size));
            }
            if let Some(size) = self.suspect {
                return Err(self.fork(size));
            }
            self.good = size;
        } else if head.size != self.report.to {
            return Err(self.malformed("the tree head isn't the one that the header names"));
        } else {
            let same = self.earlier.iter_mut().filter(|(e, _)| e.size == head.size);
            self.report.earlier += same.map(|(_, found)| *found = true).count() as u64;
        }
        self.report.heads += 1;
        self.report.last_head = Some(head.clone());
        Ok(())
    }

    fn select(&mut self, entry: &Entry) -> Outcome {
        let group = self.report.group.clone();
        let record = &entry.record;
        if self.selected.is_some_and(|before| record.index <= before) {
            return Err(self.at(&group, record.index, Fault::Reordered));
        }
        let hash = self.check(entry, &group, record.index, None)?;
        let Some(head) = &self.report.last_head else {
            return Err(self.malformed("the second line of selected records must be a tree head"));
        };
        let path = entry.inclusion.as_deref().unwrap_or_default();
        if !verify_inclusion(hash, record.index, head.size, head.root, path) {
            return Err(self.at(&group, record.index, Fault::NotIncluded { size: head.size }));
        }
        self.selected = Some(record.index);
        self.report.records += 1;
        Ok(())
    }

    fn consistency(&mut self, proof: &Consistency) -> Outcome {
        self.closed()?;
        let Some(last) = self.report.last_head.clone() else {
            return Err(self.malformed("a proof of consistency stands before any tree head"));
        };
        let other = if proof.second == last.size { proof.first } else { proof.second };
        if proof.first != last.size && proof.second != last.size {
            return Err(self.malformed("the proof of consistency is not about the tree head before it"));
        }
        let mut is_right = true;
        for (head, found) in self.earlier.iter_mut().filter(|(head, found)| head.size == other && !found) {
            let (old, new) = if other == proof.first { (&*head, &last) } else { (&last, &*head) };
            *found = verify_consistency(old.size, old.root, new.size, new.root, &proof.path);
            self.report.earlier += u64::from(*found);
            is_right &= *found;
        }
        if is_right { Ok(()) } else { Err(self.here(None, Fault::Inconsistent { size: other })) }
    }

    fn end(&mut self) -> Outcome {
        let Some(header) = &self.header else { return Err(self.malformed("the export is empty")) };
        self.closed()?;
        let (ends, group) = (self.tree.size(), &self.report.group);
        if let Some(size) = self.suspect {
            return Err(self.within(size));
        }
        let covered = self.report.last_head.as_ref().map_or(header.from, |h| h.size);
        if header.mode == Mode::Whole && ends < header.to {
            return Err(self.at(group, ends, Fault::Truncated { ends, promised: header.to }));
        }
        if header.mode == Mode::Whole && ends > header.to {
            return Err(self.malformed("there are more records than the header names"));
        }
        if self.report.last_head.is_none() || (header.mode == Mode::Whole && covered < ends) {
            return Err(self.at(group, covered, Fault::Unsigned(covered)));
        }
        match self.earlier.iter().find(|(_, found)| !found) {
            Some((head, _)) if head.size > ends && header.mode == Mode::Whole => {
                Err(self.at(group, ends, Fault::Truncated { ends, promised: head.size }))
            }
            Some((head, _)) => Err(self.here(None, Fault::Unproven { size: head.size })),
            None => Ok(()),
        }
    }

    fn at(&self, log: &str, index: u64, fault: Fault) -> Box<Break> {
        Box::new(Break { line: self.line, log: log.to_owned(), records: Some((index, index)), fault })
    }

    fn here(&self, record: Option<u64>, fault: Fault) -> Box<Break> {
        let records = record.map(|r| (r, r));
        Box::new(Break { line: self.line, log: self.report.group.clone(), records, fault })
    }

    /// The record that should come next, where records come one after another.
    fn expected(&self) -> Option<u64> {
        let header = self.header.as_ref().filter(|h| h.mode == Mode::Whole && self.open.is_none())?;
        Some(self.tree.size()).filter(|next| *next < header.to)
    }

    fn malformed(&self, why: &str) -> Box<Break> {
        self.here(None, Fault::Malformed(why.to_owned()))
    }

    /// The root at this size is wrong, so some record since the last good one is.
    fn within(&self, size: u64) -> Box<Break> {
        let records = size.checked_sub(1).map(|last| (self.good.min(last), last));
        Box::new(Break {
            line: self.line,
            log: self.report.group.clone(),
            records,
            fault: Fault::ChangedWithin { size },
        })
    }

    fn fork(&self, size: u64) -> Box<Break> {
        let records = size.checked_sub(1).map(|last| (self.good.min(last), last));
        Box::new(Break { line: self.line, log: self.report.group.clone(), records, fault: Fault::Fork { size } })
    }
}
