//! What must have happened in a run of many seeds: a fault that never strikes proves nothing.

use std::collections::BTreeMap;

use crate::life::Step;

const FAULTS: &[&str] = &[
    "crash at any time",
    "process killed",
    "all lose power",
    "long outage",
    "one server cut off",
    "one-way cut",
    "partial partition",
    "partition in two",
    "leader cut off",
    "leader not heard",
    "leader hears nobody",
    "slow disk",
    "disk full",
    "disk error: Sync",
    "disk error: Append",
    "disk error: SyncDir",
    "disk error: Rename",
    "clocks run apart",
    "clocks run far apart",
    "clock skew",
    "clock jumps back",
    "clock jumps forward",
    "bad weather",
    "message late",
    "message held and delivered late",
    "host loses power",
    "agent restarts",
    "host cut off",
    "host hears nobody",
    "instance dies",
    "gateway restarts",
    "gateway cut off",
    "server lost for good",
    "server comes back with a newer release",
    "server comes back with an older release",
    "region cut off",
    "region cut off one way",
    "two regions cut apart",
    "region loses power",
    "region joins",
    "region leaves",
    "fleet shape: region cut off",
    "fleet shape: region lost",
    "fleet shape: leader's region cut off",
    "fleet shape: two regions cut apart",
    "shape: quorum loss",
    "shape: constrained election",
    "shape: chained",
    "shape: random links",
];

/// Messages of the store's protocol that must have been lost and answered in vain.
pub const STORE_MESSAGES: &[&str] = &["Append", "Vote", "Snapshot", "Forward", "ReadIndex", "KeepAlive"];
/// The same of the control loop, its hosts included.
pub const REGION_MESSAGES: &[&str] = &["submit", "report", "plan", "table"];
/// The same of a fleet's regions.
pub const FLEET_MESSAGES: &[&str] = &["submit to global", "summary", "pass"];
/// Those that must have come twice.
const TWICE: &[&str] = &["Append", "Vote", "ReadIndex", "report", "plan", "table", "summary"];

/// What those who look after apps and jobs must have done.
const CARE: &[&str] = &[
    "rollouts: complete",
    "rollouts: taken back",
    "stopped while ready: replaced",
    "stopped while ready: drained",
    "drains: hosts emptied",
    "drains: given up",
    "scaled: out",
    "scaled: in",
    "scaled: asleep",
    "scaled: as the load needs",
    "jobs: complete",
    "jobs: failed",
    "runs begun by the clock",
];

/// What is required and did not happen.
pub fn missing(counters: &BTreeMap<String, u64>) -> Vec<String> {
    let mut wanted: Vec<String> = FAULTS.iter().map(|f| (*f).to_owned()).collect();
    wanted.extend(Step::STORE.iter().chain(Step::REGION).map(|s| s.counter()));
    wanted.extend(Step::FLEET.iter().chain(Step::RELEASE).map(|s| s.counter()));
    for kind in STORE_MESSAGES.iter().chain(REGION_MESSAGES).chain(FLEET_MESSAGES) {
        wanted.extend(["message lost", "answer lost"].iter().map(|what| format!("{what}: {kind}")));
    }
    wanted.extend(TWICE.iter().map(|kind| format!("message twice: {kind}")));
    let mut missing: Vec<String> =
        wanted.into_iter().filter(|w| !counters.contains_key(&format!("fault: {w}"))).collect();
    missing.extend(CARE.iter().filter(|done| !counters.contains_key(**done)).map(|done| (*done).to_owned()));
    missing
}
