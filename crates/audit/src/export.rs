//! An export: what an auditor takes home. One JSON object a line, in an order that can be verified while it is read.
//!
//! A **whole** export has a stretch of a group's log: the header; then, in order, each record or what is left of a pruned
//! one; behind a record with an anchor the anchored records of that server's chain, or a word that they were dropped; tree heads,
//! each right behind the last record that it covers, the last one at the end; then proofs of consistency with heads that the
//! reader may hold from before the stretch or after it.
//!
//! A **selected** export has the header, one tree head, any records in order, each with its proof of inclusion, and proofs of
//! consistency. It shows that what is in it is true, not that nothing is left out.

use serde::{Deserialize, Serialize};

use crate::hash::Hash;
use crate::head::SignedHead;
use crate::record::Entry;

/// The version of the format that this release writes.
pub const EXPORT_VERSION: u8 = 1;
/// No line is longer.
pub const MAX_LINE: usize = 256 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    Whole,
    Selected,
}

/// The first line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    pub cluster: String,
    /// The first record of the stretch; 0 in a selected export.
    pub from: u64,
    pub group: String,
    pub mode: Mode,
    /// The right edge of the tree of the records before the stretch ([`crate::tiles::peaks_at`]).
    pub peaks: Vec<Hash>,
    /// The record behind the last: the size of the last tree head.
    pub to: u64,
    #[serde(rename = "v")]
    pub version: u8,
}

/// What is left of a record whose time of retention is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pruned {
    pub hash: Hash,
    pub index: u64,
}

/// The records of the anchor before are not in the export: their time of retention is over, or another server has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dropped {
    pub from: u64,
    pub server: String,
    pub to: u64,
}

/// The proof that the tree of `first` records is how that of `second` records began. One of the two is that of the last head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Consistency {
    pub first: u64,
    pub path: Vec<Hash>,
    pub second: u64,
}

/// A line: an object with one member, which names what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Line {
    Header(Header),
    /// A record of the group's log.
    Entry(Box<Entry>),
    Pruned(Pruned),
    /// A record of a server's chain.
    Chain(Box<Entry>),
    Dropped(Dropped),
    /// The note of a signed head.
    Head(String),
    Consistency(Consistency),
}

impl Line {
    pub fn head(head: &SignedHead) -> Self {
        Self::Head(head.to_string())
    }

    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a line has string keys and writes to memory")
    }
}

/// The line of a record of the group's log, from its row as it is stored.
pub fn entry_line(row: &[u8]) -> Vec<u8> {
    [b"{\"entry\":", row, b"}"].concat()
}

/// The line of a record of a server's chain, from its row as it is stored.
pub fn chain_line(row: &[u8]) -> Vec<u8> {
    [b"{\"chain\":", row, b"}"].concat()
}
