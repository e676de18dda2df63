//! What can be read of a damaged folder, in a new one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use nexus_env::Disk;
use serde::Serialize;

use super::plant::{TERM_GAP, leap, rewound};
use super::{Folder, OfflineError, Plant, show};
use crate::embedded::mvcc::State;
use crate::types::{Member, Revision};

/// What was saved and what was not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Salvaged {
    pub keys: u64,
    /// The newest revision that was read.
    pub revision: Revision,
    /// Ranges of keys that can't be read; an empty end is no bound. A key in them is there only if the log sets it.
    pub lost_ranges: Vec<(String, String)>,
    /// Entries of the log that can be read but can't be applied, because earlier ones are missing.
    pub lost_entries: usize,
    /// The history is not saved when any of it is damaged.
    pub history_lost: bool,
}

impl Folder {
    /// What can be saved, and what is lost.
    pub(crate) fn saved(&self) -> (State, Salvaged) {
        let lost = &self.base.lost;
        let broken = !lost.is_empty() || self.require_sound().is_err();
        let mut state = self.newest.clone();
        if broken {
            state = rewound(&state, state.counters.revision);
        }
        let text = |key: &Bytes| show(key);
        let said = Salvaged {
            keys: state.counters.live_keys,
            revision: state.revision(),
            lost_ranges: lost.iter().map(|(a, b)| (text(a), b.as_ref().map(text).unwrap_or_default())).collect(),
            lost_entries: self.log.beyond.len(),
            history_lost: broken,
        };
        (state, said)
    }
}

/// Writes what can be read of a folder into a new one, as a group of this member alone, one generation on.
pub fn salvage(disk: &Arc<dyn Disk>, folder: &Folder, to: &Path) -> Result<Salvaged, OfflineError> {
    let (state, said) = folder.saved();
    let facts = folder.facts();
    let endpoint = facts.members.get(&facts.node).map(|m| m.endpoint.clone()).unwrap_or_default();
    let members = BTreeMap::from([(facts.node, Member { endpoint, voter: true })]);
    let mut state = rewound(&state, state.counters.revision);
    leap(&mut state, 0);
    let plant = Plant {
        node: facts.node,
        group: &facts.group,
        generation: facts.generation + 1,
        members: &members,
        term: facts.term + TERM_GAP,
    };
    plant.write(disk, to, &state)?;
    Ok(said)
}
