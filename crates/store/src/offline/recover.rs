//! After a quorum is lost for good: one survivor goes on alone, as a new generation of its group.
//!
//! The survivor keeps all that its log holds, also what was never known to be committed: it may have been acknowledged.
//! What a majority without it acknowledged and it never received is lost; nobody can say how much that is, so the
//! [`Survey`] says what the survivor had and when. The folder as it was is set aside beside the new one, so nothing is
//! destroyed. Other members are fenced by the generation: they must be wiped and join anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nexus_env::Disk;
use serde::Serialize;

use super::plant::{GENERATION_FILE, TERM_GAP, leap, rewound};
use super::{Facts, Folder, OfflineError, Plant, TailEntry, disk_error};
use crate::types::{Member, Revision};

/// What an operator should know before a survivor goes on alone.
#[derive(Debug, Clone, Serialize)]
pub struct Survey {
    pub facts: Facts,
    /// The newest revision of everything that the log holds: where the survivor goes on.
    pub newest: Revision,
    /// Entries that are not known to be committed. They are kept.
    pub tail: Vec<TailEntry>,
    /// The leader's clock at the last entry: what was acknowledged after it is not here.
    pub last_change_ms: i64,
    /// The others, which are to be fenced.
    pub fenced: BTreeMap<u64, Member>,
    pub is_voter: bool,
}

/// What a recovery did.
#[derive(Debug, Clone, Serialize)]
pub struct Recovered {
    pub generation: u64,
    /// Where the group's revisions go on.
    pub revision: Revision,
    pub keys: u64,
    /// The folder as it was.
    pub set_aside: PathBuf,
}

impl Survey {
    pub fn of(folder: &Folder) -> Self {
        let facts = folder.facts();
        let tail = folder.tail();
        let newest = &folder.newest;
        let clock = tail.iter().filter_map(|e| e.at_ms).max().unwrap_or(0);
        let node = folder.node;
        Self {
            newest: newest.revision(),
            last_change_ms: newest.counters.timestamp_ms.max(clock),
            fenced: facts.members.iter().filter(|(id, _)| **id != node).map(|(id, m)| (*id, m.clone())).collect(),
            is_voter: facts.members.get(&node).is_some_and(|m| m.voter),
            facts,
            tail,
        }
    }
}

fn beside(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = dir.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    dir.with_file_name(name)
}

/// Finishes what a crash interrupted between its two renames; answers whether there was something.
fn resume(disk: &Arc<dyn Disk>, dir: &Path) -> Result<bool, OfflineError> {
    let fresh = beside(dir, ".recovering");
    let exists = |path: &Path| disk.exists(path).map_err(disk_error("looking for an unfinished recovery"));
    if exists(dir)? || !exists(&fresh.join(GENERATION_FILE))? {
        return Ok(false);
    }
    swap(disk, &fresh, dir)?;
    Ok(true)
}

fn swap(disk: &Arc<dyn Disk>, from: &Path, to: &Path) -> Result<(), OfflineError> {
    disk.rename(from, to).map_err(disk_error(format!("renaming {} to {}", from.display(), to.display())))?;
    let parent = to.parent().unwrap_or(Path::new("/"));
    disk.sync_dir(parent).map_err(disk_error(format!("syncing {}", parent.display())))
}

/// Makes the survivor's folder that of a group of one. `endpoint` is where it is reached.
pub fn recover_survivor(disk: &Arc<dyn Disk>, dir: &Path, endpoint: Option<String>) -> Result<Recovered, OfflineError> {
    if resume(disk, dir)? {
        let folder = Folder::open(disk.clone(), dir, false)?;
        let facts = folder.facts();
        return Ok(Recovered {
            generation: facts.generation,
            revision: facts.revision,
            keys: facts.keys,
            set_aside: beside(dir, &format!(".generation-{}", facts.generation.saturating_sub(1))),
        });
    }
    let folder = Folder::open(disk.clone(), dir, false)?;
    folder.require_sound()?;
    let facts = folder.facts();
    if facts.last_index.is_none() {
        return Err(OfflineError::Refused(format!("{} holds nothing: another member must be the one", dir.display())));
    }
    let generation = facts.generation + 1;
    let known = facts.members.get(&facts.node).map(|m| m.endpoint.clone());
    let endpoint = endpoint.or(known).unwrap_or_default();
    let members = BTreeMap::from([(facts.node, Member { endpoint, voter: true })]);
    let mut state = rewound(&folder.newest, folder.newest.counters.revision);
    leap(&mut state, 0);

    let fresh = beside(dir, ".recovering");
    disk.remove_dir_all(&fresh).map_err(disk_error(format!("removing {}", fresh.display())))?;
    let plant =
        Plant { node: facts.node, group: &facts.group, generation, members: &members, term: facts.term + TERM_GAP };
    plant.write(disk, &fresh, &state)?;
    let set_aside = beside(dir, &format!(".generation-{}", facts.generation));
    swap(disk, dir, &set_aside)?;
    swap(disk, &fresh, dir)?;
    drop(folder);
    Ok(Recovered { generation, revision: state.revision(), keys: state.counters.live_keys, set_aside })
}
