//! Making a data folder from a state: what restore, salvage and a survivor's recovery have in common.
//!
//! The folder looks like that of a member which has just saved a snapshot and cut its log. All members that are planted
//! from the same state agree on the last entry, so they form a group at once and elect a leader as after any restart.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use nexus_env::{Disk, write_atomic};
use openraft::BasicNode;

use super::{FORMAT, FORMAT_FILE, OfflineError, disk_error};
use crate::embedded::mvcc::{Lease, Slot, State, Version};
use crate::embedded::raft::{LogId, Membership, Vote};
use crate::embedded::snapshot::SnapshotDir;
use crate::embedded::wal::{self, Kind};
use crate::types::{GroupId, Member};

/// Holds the group's generation as text; absent means 1. Members of an older generation are fenced.
pub const GENERATION_FILE: &str = "generation";
/// Revisions that are left out by a restore or a recovery: whatever the old cloud did after the state that is gone back
/// to, it had lower ones. So nothing that hosts, gateways or watches have cached is ever taken for newer than what comes.
pub const REVISION_GAP: u64 = 1_000_000_000;
/// The same for terms, which are the epochs of leaderships.
pub const TERM_GAP: u64 = 1_000_000;
/// A lease that was gone when the state was saved but holds keys at the revision that is gone back to.
const ORPHAN_TTL_MS: u64 = 60_000;

/// The generation of a member's folder.
pub fn generation_of(disk: &dyn Disk, dir: &Path) -> Result<u64, OfflineError> {
    let path = dir.join(GENERATION_FILE);
    if !disk.exists(&path).map_err(disk_error("looking for the generation"))? {
        return Ok(1);
    }
    let text = disk.read(&path).map_err(disk_error("reading the generation"))?;
    String::from_utf8_lossy(&text).trim().parse().map_err(|_| OfflineError::NotAStore {
        path: dir.to_owned(),
        reason: format!("its file {GENERATION_FILE} holds no number"),
    })
}

/// A member's folder to be made.
pub struct Plant<'a> {
    pub node: u64,
    pub group: &'a GroupId,
    pub generation: u64,
    pub members: &'a BTreeMap<u64, Member>,
    /// Of the state; the group starts behind it.
    pub term: u64,
}

impl Plant<'_> {
    /// Writes the folder, which must not exist or be empty. Its `generation` comes last: with it, the folder is whole.
    pub(crate) fn write(&self, disk: &Arc<dyn Disk>, dir: &Path, state: &State) -> Result<(), OfflineError> {
        let error = |what: &str| disk_error(format!("{what} in {}", dir.display()));
        disk.create_dir_all(dir).map_err(error("making the folder"))?;
        if !disk.list(dir).map_err(error("listing"))?.is_empty() {
            return Err(OfflineError::Occupied(dir.to_owned()));
        }
        let voters = self.members.iter().filter(|(_, m)| m.voter).map(|(id, _)| *id).collect();
        let nodes: BTreeMap<u64, BasicNode> =
            self.members.iter().map(|(id, m)| (*id, BasicNode::new(&m.endpoint))).collect();
        // The same for every member, whoever it is.
        let first = self.members.keys().next().copied().unwrap_or(self.node);
        let index = state.counters.applied.map_or(0, |id| id.index) + 1;
        let vote = Vote::new(self.term, first);
        let last = LogId::new(openraft::CommittedLeaderId::new(self.term, first), index);
        let mut state = state.clone();
        state.counters.applied = Some(last);
        state.counters.membership = Membership::new(Some(last), openraft::Membership::new(vec![voters], nodes));

        let format = format!("nexus-store {FORMAT}\nnode {}\ngroup {}\n", self.node, self.group);
        write_atomic(&**disk, &dir.join(FORMAT_FILE), format.as_bytes()).map_err(error("writing FORMAT"))?;
        let (snapshots, _) = SnapshotDir::open(disk.clone(), dir.to_owned())?;
        snapshots.save(&state).map_err(error("writing the snapshot"))?;
        self.write_log(&**disk, dir, &vote, &last).map_err(error("writing the log"))?;
        let generation = format!("{}\n", self.generation);
        write_atomic(&**disk, &dir.join(GENERATION_FILE), generation.as_bytes())
            .map_err(error("writing the generation"))
    }

    fn write_log(&self, disk: &dyn Disk, dir: &Path, vote: &Vote, last: &LogId) -> io::Result<()> {
        let body = |value: Result<Vec<u8>, rmp_serde::encode::Error>| value.map_err(io::Error::other);
        let mut payload = Vec::new();
        wal::push_record(&mut payload, Kind::Vote, self.group, &body(rmp_serde::to_vec(vote))?);
        wal::push_record(&mut payload, Kind::Purge, self.group, &body(rmp_serde::to_vec(last))?);
        wal::push_record(&mut payload, Kind::Committed, self.group, &body(rmp_serde::to_vec(last))?);
        let mut out = wal::segment_header(1);
        wal::push_frame(&mut out, 0, &payload);
        let file = disk.create(&dir.join(wal::segment_name(1)))?;
        file.append(&out)?;
        file.sync()?;
        disk.sync_dir(dir)
    }
}

/// The state as it was at a revision that it can be read at, without history.
pub fn rewound(state: &State, to: u64) -> State {
    let mut out = State { counters: state.counters.clone(), ..State::default() };
    for (key, slot) in &state.keys {
        let Some(version) = slot.position_at(to).filter(|v| v.value.is_some()) else { continue };
        let newest: Version = version.clone();
        if newest.lease != 0 {
            let ttl_ms = state.leases.get(&newest.lease).map_or(ORPHAN_TTL_MS, |l| l.ttl_ms);
            out.leases.entry(newest.lease).or_insert(Lease { ttl_ms, keys: imbl::OrdSet::new() });
        }
        out.keys.insert(key.clone(), Slot { newest, older: None });
    }
    let c = &mut out.counters;
    c.live_keys = out.keys.len() as u64;
    c.history_cost = 0;
    (c.revision, c.oldest) = (to, to);
    out.rebuild();
    out
}

/// Moves a state without history on, past every revision that its past may have had.
pub fn leap(state: &mut State, past: u64) {
    let c = &mut state.counters;
    c.revision = c.revision.max(past) + REVISION_GAP;
    c.oldest = c.revision;
}
