//! Counts a state again from its keys: everything that is kept twice must agree.

use std::collections::{BTreeMap, BTreeSet};

use crate::embedded::mvcc::State;

/// More than this says no more than this.
const MOST: usize = 50;

/// Every way in which the state contradicts itself.
pub fn recount(state: &State) -> Vec<String> {
    let c = &state.counters;
    let mut wrong = Vec::new();
    let mut say = |what: String| {
        if wrong.len() < MOST {
            wrong.push(what);
        }
    };
    let live = state.keys.values().filter(|s| s.newest.value.is_some()).count() as u64;
    if live != c.live_keys {
        say(format!("{live} keys live, the counter says {}", c.live_keys));
    }
    if c.oldest > c.revision {
        say(format!("the oldest revision {} is after the newest {}", c.oldest, c.revision));
    }
    let cost: usize = state.history.iter().map(|r| r.cost).sum();
    if cost != c.history_cost {
        say(format!("the history takes {cost} bytes, the counter says {}", c.history_cost));
    }
    let mut changed: BTreeMap<&[u8], BTreeSet<u64>> = BTreeMap::new();
    let (mut expected, mut stamp) = (c.oldest.saturating_add(1), i64::MIN);
    for record in &state.history {
        if record.revision != expected {
            say(format!("the history goes from revision {} to {}", expected.saturating_sub(1), record.revision));
        }
        if record.timestamp_ms <= stamp {
            say(format!("revision {} is not later than the one before it", record.revision));
        }
        (expected, stamp) = (record.revision.saturating_add(1), record.timestamp_ms);
        for key in &record.keys {
            changed.entry(key).or_default().insert(record.revision);
        }
    }
    if expected != c.revision.saturating_add(1) {
        say(format!("the history ends at revision {}, the state is at {}", expected.saturating_sub(1), c.revision));
    }
    for (key, slot) in &state.keys {
        let shown = || super::show(key);
        let mut before = 0;
        for version in slot.versions() {
            if version.modified <= before || version.modified > c.revision || version.created > version.modified {
                say(format!("{} has a version of revision {} out of order", shown(), version.modified));
            }
            before = version.modified;
            let known = changed.get_mut(&key[..]).is_some_and(|set| set.remove(&version.modified));
            if version.modified > c.oldest && !known {
                say(format!("revision {} of {} is not in the history", version.modified, shown()));
            }
        }
        let lease = slot.newest.lease;
        if lease != 0 && !state.leases.get(&lease).is_some_and(|l| l.keys.contains(key)) {
            say(format!("{} belongs to lease {lease}, which does not exist", shown()));
        }
    }
    for (key, revisions) in changed {
        if let Some(revision) = revisions.first() {
            say(format!("revision {revision} changed {}, but the key does not have it", super::show(key)));
        }
    }
    wrong
}
