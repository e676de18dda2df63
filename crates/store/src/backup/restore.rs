//! Going back: a backup is checked as a whole, rolled back to a point that its history reaches, and written as fresh
//! folders for the members that shall have it.
//!
//! What comes out is a new generation of the group, with revisions and terms far beyond those that the old cloud may have
//! reached after the backup. So leftovers of the old cloud are fenced, and nothing that anyone has cached is taken for
//! newer than what was restored. Nobody may remember what came after the backup, perhaps another restore with a
//! generation of its own. So [`next_generation`] is the time in seconds, and revisions and terms follow from it: every
//! restore lies beyond every earlier one, and all servers that are restored with the same generation are alike.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nexus_env::Disk;
use serde::Serialize;

use super::{BackupError, GroupImage, Manifest, digest, disk_error, read_manifest};
use crate::embedded::mvcc::State;
use crate::embedded::snapshot;
use crate::offline::{Plant, TERM_GAP, leap, rewound};
use crate::types::{GroupId, KeyValue, Member, RangeRequest, Revision};

/// Revisions that a group may make in a second on average, at most.
const REVISIONS_PER_SECOND: u64 = 1_000_000;
/// Revisions stay whole numbers in JSON (2^53) up to here.
const MAX_GENERATION: u64 = 8_000_000_000;

/// The generation of a restore at this moment; `known` is the highest that is known of.
pub fn next_generation(known: u64, now_ms: i64) -> u64 {
    known.saturating_add(1).max(u64::try_from(now_ms / 1000).unwrap_or(0))
}

/// Where to go back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    Newest,
    Revision(Revision),
    /// As it was at this moment, in milliseconds.
    Time(i64),
}

/// A backup that was read whole and found sound.
pub struct Backup {
    dir: PathBuf,
    pub manifest: Manifest,
    states: BTreeMap<GroupId, State>,
}

/// A member's folder to be written.
pub struct Restore<'a> {
    pub group: &'a GroupId,
    pub node: u64,
    pub members: &'a BTreeMap<u64, Member>,
    /// Higher than that of anything that may still be around; see [`next_generation`].
    pub generation: u64,
    pub revision: Revision,
}

/// A group at the point that is gone back to, moved past everything that its old cloud may have reached.
pub(crate) struct Rolled {
    pub state: State,
    pub at: Revision,
    /// Epochs go on behind it.
    pub term: u64,
}

impl Restore<'_> {
    pub(crate) fn done(&self, at: Revision, rolled: &State) -> Restored {
        Restored {
            group: self.group.clone(),
            node: self.node,
            generation: self.generation,
            at,
            revision: rolled.revision(),
            keys: rolled.counters.live_keys,
        }
    }
}

/// What a restore wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Restored {
    pub group: GroupId,
    pub node: u64,
    pub generation: u64,
    /// What was gone back to.
    pub at: Revision,
    /// Where revisions go on.
    pub revision: Revision,
    pub keys: u64,
}

impl Backup {
    /// Reads a backup: every file's sum, every part of every file, and whether it is what the manifest says.
    pub fn open(disk: &dyn Disk, dir: &Path) -> Result<Self, BackupError> {
        let manifest = read_manifest(disk, dir)?;
        let mut states = BTreeMap::new();
        for image in &manifest.groups {
            let path = dir.join(&image.file);
            let damaged = |reason: String| BackupError::Damaged { path: path.clone(), reason };
            if !disk.exists(&path).map_err(disk_error(format!("looking for {}", path.display())))? {
                return Err(damaged("it is missing".into()));
            }
            let (sha256, bytes) = digest(disk, &path)?;
            if sha256 != image.sha256 {
                let reason = format!("its {bytes} bytes have another SHA-256 than the {} of the manifest", image.bytes);
                return Err(damaged(reason));
            }
            let (_, state, _) = snapshot::load(disk, &path).map_err(|e| damaged(e.to_string()))?;
            if (state.revision(), state.oldest()) != (image.revision, image.oldest) {
                return Err(damaged(format!("it is of revision {}, not {}", state.revision(), image.revision)));
            }
            states.insert(image.group.clone(), state);
        }
        Ok(Self { dir: dir.to_owned(), manifest, states })
    }

    fn image(&self, group: &GroupId) -> Result<(&GroupImage, &State), BackupError> {
        let image = self.manifest.groups.iter().find(|g| g.group == *group);
        image.zip(self.states.get(group)).ok_or_else(|| {
            let held: Vec<&str> = self.manifest.groups.iter().map(|g| g.group.as_str()).collect();
            BackupError::Refused(format!("{} holds no group {group}, but: {}", self.dir.display(), held.join(", ")))
        })
    }

    /// The revision that a point means in a group.
    pub fn resolve(&self, group: &GroupId, point: Point) -> Result<Revision, BackupError> {
        let (image, state) = self.image(group)?;
        match point {
            Point::Newest => Ok(image.revision),
            Point::Revision(revision) if revision < image.oldest || revision > image.revision => {
                Err(BackupError::Refused(format!(
                    "this backup can go back to revisions {} to {} of group {group}, not {revision}",
                    image.oldest, image.revision
                )))
            }
            Point::Revision(revision) => Ok(revision),
            Point::Time(ms) if ms >= image.timestamp_ms => Ok(image.revision),
            Point::Time(ms) => {
                let behind = state.history.iter().take_while(|r| r.timestamp_ms <= ms).last();
                behind.map(|r| Revision(r.revision)).ok_or_else(|| {
                    let first = state.history.front().map_or(image.timestamp_ms, |r| r.timestamp_ms);
                    BackupError::Refused(format!(
                        "the history of group {group} in this backup begins {} s after that time: take an older backup",
                        (first - ms).max(1000) / 1000
                    ))
                })
            }
        }
    }

    /// When a revision was made, if the history still says.
    pub fn time_of(&self, group: &GroupId, revision: Revision) -> Result<Option<i64>, BackupError> {
        let (image, state) = self.image(group)?;
        if revision == image.revision {
            return Ok(Some(image.timestamp_ms));
        }
        Ok(state.history.iter().find(|r| r.revision == revision.0).map(|r| r.timestamp_ms))
    }

    /// All keys as they were at a revision.
    pub fn keys_at(&self, group: &GroupId, revision: Revision) -> Result<Vec<KeyValue>, BackupError> {
        let (_, state) = self.image(group)?;
        Ok(state.range(&RangeRequest::prefix("").at(revision))?.kvs)
    }

    /// Writes one member's folder. It must not exist or be empty.
    pub fn restore(&self, disk: &Arc<dyn Disk>, what: &Restore<'_>, dir: &Path) -> Result<Restored, BackupError> {
        let Rolled { state: rolled, at, term } = self.rolled(what)?;
        if !what.members.get(&what.node).is_some_and(|_| what.members.values().any(|m| m.voter)) {
            return Err(BackupError::Refused(format!("node {} is not among the members, or none votes", what.node)));
        }
        let plant =
            Plant { node: what.node, group: what.group, generation: what.generation, members: what.members, term };
        plant.write(disk, dir, &rolled)?;
        Ok(what.done(at, &rolled))
    }

    /// A group as it is to go on.
    pub(crate) fn rolled(&self, what: &Restore<'_>) -> Result<Rolled, BackupError> {
        let (image, state) = self.image(what.group)?;
        let at = self.resolve(what.group, Point::Revision(what.revision))?;
        if what.generation <= image.generation || what.generation > MAX_GENERATION {
            return Err(BackupError::Refused(format!(
                "the generation must be between {} and {MAX_GENERATION}, not {}",
                image.generation + 1,
                what.generation
            )));
        }
        let mut rolled = rewound(state, at.0);
        leap(&mut rolled, image.revision.0.max(what.generation * REVISIONS_PER_SECOND));
        let term = image.term.saturating_add(TERM_GAP).max(what.generation);
        Ok(Rolled { state: rolled, at, term })
    }
}
