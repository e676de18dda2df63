//! Is the store strictly serializable? Every answer of the store says at which revision it holds, so the order that has to
//! exist need not be searched for: it is the order of revisions. What is checked is that this order explains everything:
//!
//! * the history has every revision once, and each holds exactly what one transaction asked for (or a lease's end);
//! * each transaction's compares held right before it, and those of a refused one did not, at the revision that it names;
//! * each read shows what the history says at its revision;
//! * no answer is older than what was answered before it was asked (real time);
//! * what was acknowledged is there, what was refused is not, and what is unknown is there at most once.
//!
//! That is stricter than looking for some order per key (Wing & Gong 1993), and linear in the length of the history.

use std::collections::{BTreeMap, HashMap};

use bytes::Bytes;
use nexus_store::{Compare, CompareTarget, Consistency, KeyValue, Op, RangeRequest, Txn, WatchEvent};

use crate::clients::{Call, TxnEnd, What, short};
use crate::recorder::Log;

/// A broken promise and how.
pub type Finding = (&'static str, String);

const DURABLE: &str = "no acknowledged write is lost";
const SERIAL: &str = "the store is strictly serializable";

#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    value: Bytes,
    created: u64,
    modified: u64,
}

/// The keys at one revision.
#[derive(Debug, Clone, Default)]
struct Model {
    keys: BTreeMap<Bytes, Held>,
}

impl Model {
    fn holds(&self, compare: &Compare) -> bool {
        let held = self.keys.get(&compare.key);
        match &compare.target {
            CompareTarget::Exists(wanted) => held.is_some() == *wanted,
            CompareTarget::ModRevision(revision) => held.map_or(0, |h| h.modified) == revision.0,
            CompareTarget::Value(value) => held.is_some_and(|h| h.value == *value),
        }
    }

    fn first_failing(&self, compares: &[Compare]) -> Option<usize> {
        compares.iter().position(|c| !self.holds(c))
    }

    /// What a transaction would change: the last operation on each key, without deletes of what is not there.
    fn effect(&self, ops: &[Op]) -> BTreeMap<Bytes, Option<Bytes>> {
        let mut effect = BTreeMap::new();
        for op in ops {
            match op {
                Op::Put { key, value, .. } => effect.insert(key.clone(), Some(value.clone())),
                Op::Delete { key } => effect.insert(key.clone(), None),
            };
        }
        effect.retain(|key, value| value.is_some() || self.keys.contains_key(key));
        effect
    }

    fn apply(&mut self, revision: u64, events: &[WatchEvent]) -> Result<(), String> {
        for event in events {
            let (key, prev) = match event {
                WatchEvent::Put { kv, prev } => (&kv.key, prev),
                WatchEvent::Delete { key, prev, .. } => (key, prev),
            };
            let before = self.keys.get(key);
            if let Some(prev) = prev {
                let same = before.is_some_and(|b| b.value == prev.value && b.modified == prev.mod_revision.0);
                if !same {
                    return Err(format!("revision {revision} says that {key:?} was {prev:?}, but it was {before:?}"));
                }
            }
            match event {
                WatchEvent::Put { kv, .. } => {
                    let created = before.map_or(revision, |b| b.created);
                    if kv.create_revision.0 != created || kv.mod_revision.0 != revision {
                        return Err(format!("revision {revision} put {kv:?}, which was created at {created}"));
                    }
                    let held = Held { value: kv.value.clone(), created, modified: revision };
                    self.keys.insert(key.clone(), held);
                }
                WatchEvent::Delete { mod_revision, .. } => {
                    if before.is_none() || mod_revision.0 != revision {
                        return Err(format!("revision {revision} deleted {key:?}, which was not there"));
                    }
                    self.keys.remove(key);
                }
            }
        }
        Ok(())
    }

    fn read(&self, request: &RangeRequest) -> (Vec<KeyValue>, bool) {
        let inside = |key: &Bytes| *key >= request.start && (request.end.is_empty() || *key < request.end);
        let mut found: Vec<KeyValue> = self
            .keys
            .iter()
            .filter(|(key, _)| inside(key))
            .map(|(key, held)| KeyValue {
                key: key.clone(),
                value: held.value.clone(),
                create_revision: nexus_store::Revision(held.created),
                mod_revision: nexus_store::Revision(held.modified),
            })
            .collect();
        if request.reverse {
            found.reverse();
        }
        let more = request.limit > 0 && found.len() > request.limit;
        if more {
            found.truncate(request.limit);
        }
        (found, more)
    }
}

/// What an event made of its key.
fn changes(events: &[WatchEvent]) -> BTreeMap<Bytes, Option<Bytes>> {
    events
        .iter()
        .map(|event| match event {
            WatchEvent::Put { kv, .. } => (kv.key.clone(), Some(kv.value.clone())),
            WatchEvent::Delete { key, .. } => (key.clone(), None),
        })
        .collect()
}

/// Checks everything that clients were told against the history. `prefix` says which keys are theirs alone.
pub fn check(calls: &[Call], log: &Log, prefix: &[u8]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let last = log.keys().next_back().copied().unwrap_or(0);
    if let Some((gap, _)) = (1..=last).zip(log.keys()).find(|(want, have)| want != *have) {
        findings.push((DURABLE, format!("revision {gap} is missing in the history up to {last}")));
        return findings;
    }

    // Who asked for which value.
    let mut authors: HashMap<&Bytes, &Call> = HashMap::new();
    let mut by_revision: BTreeMap<u64, Vec<&Call>> = BTreeMap::new();
    for call in calls {
        match &call.what {
            What::Txn(txn, end) => {
                for op in &txn.ops {
                    if let Op::Put { value, .. } = op {
                        authors.insert(value, call);
                    }
                }
                if let TxnEnd::Committed(revision) | TxnEnd::Refused(revision, _) = end {
                    by_revision.entry(*revision).or_default().push(call);
                }
            }
            What::Read(_, response) => by_revision.entry(response.revision.0).or_default().push(call),
        }
    }

    let mut model = Model::default();
    let mut seen_values: HashMap<Bytes, u64> = HashMap::new();
    answers_at(0, &model, None, &by_revision, &mut findings);
    for (&revision, told) in log {
        let before = model.clone();
        if let Err(text) = model.apply(revision, &told.events) {
            findings.push((SERIAL, text));
        }
        for event in &told.events {
            let WatchEvent::Put { kv, .. } = event else { continue };
            if !kv.key.starts_with(prefix) {
                continue;
            }
            if let Some(earlier) = seen_values.insert(kv.value.clone(), revision).filter(|e| *e != revision) {
                findings.push((SERIAL, format!("{:?} was written at {earlier} and again at {revision}", kv.value)));
            }
            match authors.get(&kv.value).map(|call| &call.what) {
                Some(What::Txn(_, TxnEnd::Unknown)) => {}
                Some(What::Txn(_, TxnEnd::Committed(at))) if *at == revision => {}
                Some(What::Txn(txn, end)) => findings
                    .push((SERIAL, format!("revision {revision} is of {}, which was answered {end:?}", short(txn)))),
                // Still under way when the run ended.
                _ => {}
            }
        }
        answers_at(revision, &model, Some((&before, &changes(&told.events))), &by_revision, &mut findings);
        if findings.len() > 8 {
            return findings;
        }
    }
    for (revision, calls) in by_revision.range(last + 1..) {
        for call in calls {
            findings.push((DURABLE, format!("{} speaks of revision {revision}; there are {last}", tell(call))));
        }
    }
    findings.extend(real_time(calls));
    findings
}

fn tell(call: &Call) -> String {
    let Call { client, node, .. } = call;
    match &call.what {
        What::Txn(txn, end) => format!("client {client} at server {node}: {} -> {end:?}", short(txn)),
        What::Read(request, r) => {
            let kind = if request.consistency == Consistency::Stale { "a stale read" } else { "a read" };
            format!("client {client} at server {node}: {kind} from {:?} at {}", request.start, r.revision)
        }
    }
}

/// Checks the answers that name a revision.
fn answers_at(
    revision: u64,
    model: &Model,
    change: Option<(&Model, &BTreeMap<Bytes, Option<Bytes>>)>,
    calls: &BTreeMap<u64, Vec<&Call>>,
    findings: &mut Vec<Finding>,
) {
    let mut owner: Option<&Call> = None;
    let mut calls: Vec<&Call> = calls.get(&revision).into_iter().flatten().copied().collect();
    // Of two that delete the same key, one may have come after the other and changed nothing: it is not the one that did it.
    calls.sort_by_key(|call| match &call.what {
        What::Txn(txn, TxnEnd::Committed(_)) => {
            model.effect(&txn.ops).is_empty() && model.first_failing(&txn.compares).is_none()
        }
        _ => false,
    });
    for call in calls {
        match &call.what {
            What::Read(request, response) => {
                let (kvs, more) = model.read(request);
                if kvs != response.kvs || more != response.more {
                    findings.push((SERIAL, format!("{} found {:?}, should be {kvs:?}", tell(call), response.kvs)));
                }
            }
            What::Txn(txn, TxnEnd::Refused(_, index)) => {
                if model.first_failing(&txn.compares) != Some(*index) {
                    let text = format!("{}, but its compare {index} is not the first that fails there", tell(call));
                    findings.push((SERIAL, text));
                }
            }
            What::Txn(txn, TxnEnd::Committed(_)) => {
                if let Some((before, changed)) = change
                    && owner.is_none()
                    && *changed == before.effect(&txn.ops)
                {
                    owner = Some(call);
                    if let Some(index) = before.first_failing(&txn.compares) {
                        let text = format!("{} was committed although its compare {index} does not hold", tell(call));
                        findings.push((SERIAL, text));
                    }
                } else if !(model.effect(&txn.ops).is_empty() && model.first_failing(&txn.compares).is_none()) {
                    findings.push((DURABLE, format!("{} is not what revision {revision} did", tell(call))));
                }
            }
            What::Txn(..) => {}
        }
    }
}

/// Whether a transaction made a revision of its own for sure: some key's last operation is a put.
fn wrote(txn: &Txn) -> bool {
    Model::default().effect(&txn.ops).values().any(Option::is_some)
}

/// No answer is older than what had been answered before it was asked.
fn real_time(calls: &[Call]) -> Vec<Finding> {
    enum Moment<'a> {
        Asked(&'a Call),
        Answered(u64),
    }
    let mut moments: Vec<(u64, Moment<'_>)> = Vec::new();
    for call in calls {
        let revision = match &call.what {
            What::Txn(_, TxnEnd::Committed(revision) | TxnEnd::Refused(revision, _)) => *revision,
            What::Read(request, response)
                if request.at.is_none() && request.consistency == Consistency::Linearizable =>
            {
                response.revision.0
            }
            _ => continue,
        };
        moments.push((call.asked, Moment::Asked(call)));
        moments.push((call.answered, Moment::Answered(revision)));
    }
    moments.sort_by_key(|(order, _)| *order);
    let mut known = 0;
    let mut findings = Vec::new();
    for (_, moment) in moments {
        match moment {
            Moment::Answered(revision) => known = known.max(revision),
            Moment::Asked(call) => {
                let late = match &call.what {
                    What::Txn(txn, TxnEnd::Committed(revision)) if wrote(txn) => *revision <= known,
                    What::Txn(_, TxnEnd::Committed(revision) | TxnEnd::Refused(revision, _)) => *revision < known,
                    What::Read(_, response) => response.revision.0 < known,
                    What::Txn(..) => false,
                };
                if late {
                    findings.push((SERIAL, format!("{}, but revision {known} was answered before", tell(call))));
                }
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use nexus_store::{RangeResponse, Revision};

    use super::*;
    use crate::recorder::Told;

    fn put(key: &str, value: &str, created: u64, at: u64) -> WatchEvent {
        let kv = KeyValue {
            key: key.to_owned().into(),
            value: value.to_owned().into(),
            create_revision: Revision(created),
            mod_revision: Revision(at),
        };
        WatchEvent::Put { kv, prev: None }
    }

    fn log(events: Vec<WatchEvent>) -> Log {
        events
            .into_iter()
            .enumerate()
            .map(|(i, e)| (i as u64 + 1, Told { timestamp_ms: i as i64, events: vec![e] }))
            .collect()
    }

    fn txn(asked: u64, answered: u64, txn: Txn, end: TxnEnd) -> Call {
        Call { client: 1, node: 1, asked, answered, what: What::Txn(txn, end) }
    }

    fn read(asked: u64, answered: u64, revision: u64, found: Option<(&str, u64, u64)>) -> Call {
        let kvs = found.map(|(v, c, m)| KeyValue {
            key: "r/1".into(),
            value: v.to_owned().into(),
            create_revision: Revision(c),
            mod_revision: Revision(m),
        });
        let response = RangeResponse { revision: Revision(revision), kvs: kvs.into_iter().collect(), more: false };
        Call { client: 2, node: 1, asked, answered, what: What::Read(RangeRequest::get("r/1"), response) }
    }

    fn findings(calls: &[Call], log: &Log) -> usize {
        check(calls, log, b"r/").len()
    }

    #[test]
    fn a_good_history_passes_and_each_kind_of_bad_one_does_not() {
        let two = log(vec![put("r/1", "a", 1, 1), put("r/1", "b", 1, 2)]);
        let a = txn(1, 2, Txn::put("r/1", "a"), TxnEnd::Committed(1));
        let b = txn(3, 4, Txn::put("r/1", "b"), TxnEnd::Committed(2));
        assert_eq!(findings(&[a.clone(), b.clone(), read(5, 6, 2, Some(("b", 1, 2)))], &two), 0);
        assert_eq!(findings(&[a.clone(), b.clone(), read(5, 6, 1, Some(("a", 1, 1)))], &two), 1, "too old a read");
        assert_eq!(findings(&[a.clone(), b.clone(), read(5, 6, 2, Some(("a", 1, 1)))], &two), 1, "a wrong value");
        let one = log(vec![put("r/1", "a", 1, 1)]);
        assert_eq!(findings(&[a.clone(), b.clone()], &one), 1, "an acknowledged write is lost");
        let refused = txn(3, 4, Txn::put("r/1", "b"), TxnEnd::NotDone);
        assert_eq!(findings(&[a.clone(), refused], &two), 1, "what was refused happened");
        let unknown = txn(3, u64::MAX, Txn::put("r/1", "b"), TxnEnd::Unknown);
        assert_eq!(findings(&[a.clone(), unknown.clone()], &two), 0);
        assert_eq!(findings(&[a.clone(), unknown], &one), 0);
        let swap = Txn::new(vec![Compare::absent("r/1")], vec![Op::put("r/1", "b")]);
        assert_eq!(findings(&[a.clone(), txn(3, 4, swap.clone(), TxnEnd::Committed(2))], &two), 1, "a broken compare");
        assert_eq!(findings(&[a.clone(), txn(3, 4, swap.clone(), TxnEnd::Refused(1, 0))], &one), 0);
        let right = Txn::new(vec![Compare::exists("r/1")], vec![Op::put("r/1", "b")]);
        assert_eq!(
            findings(&[a, txn(3, 4, right, TxnEnd::Refused(1, 0))], &one),
            1,
            "a compare that holds was refused"
        );
    }
}
