//! Where a group's things are in etcd, and how they are written. ADR 0006 gives the reasons.
//!
//! Below `PREFIX/GROUP/` there are
//! * `j`, the journal: what the newest commit of the group did. Each commit compares its `mod_revision` with that of
//!   the one before and puts it anew, so commits are a chain, and watching it shows them all;
//! * `k/KEY`, each key, with the group's revisions in front of the value, which etcd can't know;
//! * `l/LEASE`, one for each lease, attached to an etcd lease: when etcd removes it, the lease's time is over;
//! * `m/leader`, who leads, attached to the leader's etcd lease;
//! * `m/base`, the epoch behind which those of leaders go on, after the group was restored;
//! * `s/NODE`, each server of the group, with its endpoint;
//! * `a/NODE`, each server that is there, attached to an etcd lease of its own.
//!
//! A commit may hold several revisions of the group, as long as they touch different keys: etcd shows the key events of
//! a commit in the order of its operations, and the journal says how many belong to each revision.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use crate::types::{GroupId, prefix_end};

/// The version of everything that this file writes, and the newest that it reads.
const VERSION: u8 = 1;
/// Stands in the journal's place while a restore is under way.
const RESTORING: u8 = 0;
/// Version, creation, modification, lease.
const HEADER: usize = 1 + 3 * 8;

/// The names of a group's keys.
#[derive(Debug, Clone)]
pub struct Layout {
    root: Bytes,
}

/// What a key of the group is.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    Journal,
    Key(Bytes),
    Lease(u64),
    Leader,
    Base,
    Server(u64),
    Present(u64),
    Unknown,
}

impl Layout {
    pub fn new(prefix: &str, group: &GroupId) -> Self {
        Self { root: format!("{}/{group}/", prefix.trim_end_matches('/')).into() }
    }

    fn key(&self, rest: &[&[u8]]) -> Bytes {
        let mut out = BytesMut::with_capacity(self.root.len() + rest.iter().map(|r| r.len()).sum::<usize>());
        out.put_slice(&self.root);
        rest.iter().for_each(|r| out.put_slice(r));
        out.freeze()
    }

    /// Everything of the group.
    pub fn all(&self) -> (Bytes, Bytes) {
        (self.root.clone(), prefix_end(&self.root))
    }

    pub fn journal(&self) -> Bytes {
        self.key(&[b"j"])
    }

    pub fn data(&self, key: &[u8]) -> Bytes {
        self.key(&[b"k/", key])
    }

    fn below(&self, part: &[u8]) -> (Bytes, Bytes) {
        let start = self.key(&[part]);
        let end = prefix_end(&start);
        (start, end)
    }

    /// Everything that a restore replaces but the journal: keys, leases and servers.
    pub fn contents(&self) -> [(Bytes, Bytes); 3] {
        [b"k/", b"l/", b"s/"].map(|part| self.below(part))
    }

    pub fn lease(&self, id: u64) -> Bytes {
        self.key(&[b"l/", format!("{id:016x}").as_bytes()])
    }

    pub fn leader(&self) -> Bytes {
        self.key(&[b"m/leader"])
    }

    pub fn base(&self) -> Bytes {
        self.key(&[b"m/base"])
    }

    pub fn server(&self, node: u64) -> Bytes {
        self.key(&[b"s/", node.to_string().as_bytes()])
    }

    pub fn present(&self, node: u64) -> Bytes {
        self.key(&[b"a/", node.to_string().as_bytes()])
    }

    pub fn all_present(&self) -> (Bytes, Bytes) {
        self.below(b"a/")
    }

    pub fn place(&self, key: &Bytes) -> Place {
        let Some(rest) = key.strip_prefix(&*self.root) else { return Place::Unknown };
        if let Some(rest) = rest.strip_prefix(b"k/") {
            return Place::Key(key.slice(key.len() - rest.len()..));
        }
        if let Some(rest) = rest.strip_prefix(b"l/") {
            let id = std::str::from_utf8(rest).ok().and_then(|r| u64::from_str_radix(r, 16).ok());
            return id.map_or(Place::Unknown, Place::Lease);
        }
        let node = |rest| std::str::from_utf8(rest).ok().and_then(|r| r.parse().ok());
        if let Some(rest) = rest.strip_prefix(b"s/") {
            return node(rest).map_or(Place::Unknown, Place::Server);
        }
        if let Some(rest) = rest.strip_prefix(b"a/") {
            return node(rest).map_or(Place::Unknown, Place::Present);
        }
        match rest {
            b"j" => Place::Journal,
            b"m/leader" => Place::Leader,
            b"m/base" => Place::Base,
            _ => Place::Unknown,
        }
    }
}

/// A key's value as it is in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    pub created: u64,
    pub modified: u64,
    /// 0: none.
    pub lease: u64,
    pub value: Bytes,
}

impl Stored {
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(HEADER + self.value.len());
        out.put_u8(VERSION);
        out.put_u64(self.created);
        out.put_u64(self.modified);
        out.put_u64(self.lease);
        out.put_slice(&self.value);
        out.freeze()
    }

    pub fn decode(stored: &Bytes) -> Result<Self, String> {
        version(stored)?;
        let number = |at: usize| {
            let bytes = stored.get(at..at + 8).and_then(|b| b.try_into().ok());
            bytes.map(u64::from_be_bytes).ok_or_else(|| format!("a value of {} bytes", stored.len()))
        };
        let (created, modified, lease) = (number(1)?, number(9)?, number(17)?);
        Ok(Self { created, modified, lease, value: stored.slice(HEADER..) })
    }
}

fn version(stored: &[u8]) -> Result<(), String> {
    match stored.first() {
        Some(&VERSION) => Ok(()),
        Some(&RESTORING) => Err("a restore into this group has not finished: run it again".into()),
        Some(found) => Err(format!("format {found}; this release reads up to {VERSION}")),
        None => Err("an empty value".into()),
    }
}

/// One revision of a commit.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Step {
    pub at_ms: i64,
    /// How many of the commit's key events belong to it.
    pub events: u32,
}

/// What a commit did beside changing keys.
#[derive(Debug, Clone, Default, Serialize, Deserialize, PartialEq, Eq)]
pub enum Extra {
    #[default]
    Nothing,
    /// A lease began, or it and the keys of this commit's only revision ended.
    Granted {
        id: u64,
        ttl_ms: u64,
    },
    Ended {
        id: u64,
    },
    /// History before a revision was given up.
    Compacted {
        before: u64,
    },
}

/// The journal's value: the newest commit.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Journal {
    /// Tells this commit from every other, so that its author recognises it if etcd's answer was lost.
    pub id: u128,
    /// The group's revision and time after it.
    pub revision: u64,
    pub timestamp_ms: i64,
    pub steps: Vec<Step>,
    pub extra: Extra,
}

impl Journal {
    /// The group's revision before it.
    pub fn base(&self) -> u64 {
        self.revision.saturating_sub(self.steps.len() as u64)
    }

    /// What stands there until a restore is done: no server takes it for a group.
    pub fn restoring() -> Bytes {
        Bytes::from_static(&[RESTORING])
    }

    pub fn encode(&self) -> Bytes {
        let mut out = vec![VERSION];
        rmp_serde::encode::write(&mut out, self).expect("a journal is plain data");
        out.into()
    }

    pub fn decode(stored: &[u8]) -> Result<Self, String> {
        version(stored)?;
        rmp_serde::from_slice(&stored[1..]).map_err(|e| e.to_string())
    }
}

/// The leader's mark.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
pub struct LeaderMark {
    pub node: u64,
}

impl LeaderMark {
    pub fn encode(self) -> Bytes {
        self.node.to_string().into()
    }

    pub fn decode(stored: &[u8]) -> Option<Self> {
        std::str::from_utf8(stored).ok()?.parse().ok().map(|node| Self { node })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_is_found_again() {
        let layout = Layout::new("/nexus/", &GroupId::new("eu-1").unwrap());
        assert_eq!(layout.journal(), "/nexus/eu-1/j");
        assert_eq!(layout.place(&layout.journal()), Place::Journal);
        assert_eq!(layout.place(&layout.leader()), Place::Leader);
        assert_eq!(layout.place(&layout.lease(77)), Place::Lease(77));
        assert_eq!(layout.place(&layout.base()), Place::Base);
        assert_eq!(layout.place(&layout.server(101)), Place::Server(101));
        assert_eq!(layout.place(&layout.present(101)), Place::Present(101));
        assert_eq!(layout.place(&layout.data(b"a/\xffb")), Place::Key(Bytes::from_static(b"a/\xffb")));
        assert_eq!(layout.place(&Bytes::from_static(b"/nexus/eu-10/j")), Place::Unknown);
    }

    #[test]
    fn values_and_journals_are_read_back_as_they_are_written() {
        let stored = Stored { created: 1, modified: 2, lease: 3, value: "v".into() };
        assert_eq!(Stored::decode(&stored.encode()), Ok(stored));
        assert!(Stored::decode(&Bytes::from_static(b"\x01short")).is_err());
        assert!(Stored::decode(&Bytes::from_static(b"\x02")).is_err_and(|e| e.contains("format 2")));
        let journal = Journal {
            id: 7,
            revision: 9,
            timestamp_ms: 5,
            steps: vec![Step { at_ms: 4, events: 1 }, Step { at_ms: 5, events: 2 }],
            extra: Extra::Ended { id: 3 },
        };
        assert_eq!(journal.base(), 7);
        assert_eq!(Journal::decode(&journal.encode()), Ok(journal));
        assert!(Journal::decode(&Journal::restoring()).is_err_and(|e| e.contains("restore")));
    }
}
