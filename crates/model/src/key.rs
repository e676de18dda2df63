//! Where things stand in the metadata store. One place, because servers of different releases must agree.
//!
//! | key | value |
//! |---|---|
//! | `o/{plural}/{project, organization or -}/{name}` | an object |
//! | `t/{plural}/{uid}` | a tombstone: a deleted object whose teardown goes on |
//! | `i/{project, organization or -}/{key}` | the first answer to an idempotency key |
//! | `s/{project}/{name}/{version, 20 digits}` | the sealed values of a version of a secret |
//! | `l/{uid of an app}/{day, 10 digits}` | what the app's load was on a day (days since 1970): see `control::autoscale` |
//! | `sys/writer` | the epoch of the region's writer |
//! | `sys/adopted` | the newest revision of the global group that a region has decided upon |
//! | `sys/format` | the version of everything stored here |
//! | `sys/fleet/{server or host}/{name}` | a machine that has joined, or left |
//! | `sys/fleet/node`, `sys/fleet/addresses` | what was given out last, so that nothing is given twice |
//! | `sys/blob/{project}/{digest}` | that a project uploaded a blob, for a day; its images say so for longer |
//! | `a/r/{index, 20 digits}` | a record of the group's audit log |
//! | `a/state` | how far that log has come: its size, its last hash, the right edge of its tree |
//! | `a/t/{level}/{number, 14 digits}` | a tile of its tree |
//! | `a/h/{size, 20 digits}` | a signed head of it |
//! | `a/k/{server}` | the public key that a server signs heads with |
//! | `a/s/{server}` | the last anchor of a server's own chain |
//! | `a/p/{hash of a principal}` | the key of a principal's personal data in records |
//! | `a/w/{hash of an address}` | how many records a webhook has taken |
//! | `sys/join/token/{hash}` | a join token that was not used yet |
//! | `sys/join/answer/{hash of a public key}` | what a join was answered, so that a retry gets it again |
//! | `sys/workload/key/{key id}` | in `global`: a server's public key for workloads' tokens |

use crate::kind::{KindDescriptor, Scope};
use crate::{AnyObject, Name, Uid};

pub const WRITER: &str = "sys/writer";
pub const FORMAT: &str = "sys/format";
pub const ADOPTED: &str = "sys/adopted";
pub const FLEET: &str = "sys/fleet/";
pub const FLEET_SERVERS: &str = "sys/fleet/server/";
pub const FLEET_HOSTS: &str = "sys/fleet/host/";
pub const FLEET_NODE: &str = "sys/fleet/node";
pub const FLEET_ADDRESSES: &str = "sys/fleet/addresses";
pub const BLOBS: &str = "sys/blob/";
pub const JOIN_TOKENS: &str = "sys/join/token/";
pub const JOIN_ANSWERS: &str = "sys/join/answer/";
pub const WORKLOAD_KEYS: &str = "sys/workload/key/";

/// The sealed values of secrets. No view and no table holds them.
pub const SECRETS: &str = "s/";

/// What apps' loads were. No view and no table holds it.
pub const LOADS: &str = "l/";

/// Everything of the audit log. No view and no table holds it.
pub const AUDIT: &str = "a/";
pub const AUDIT_STATE: &str = "a/state";
pub const AUDIT_RECORDS: &str = "a/r/";
pub const AUDIT_TILES: &str = "a/t/";
pub const AUDIT_HEADS: &str = "a/h/";
pub const AUDIT_KEYS: &str = "a/k/";
pub const AUDIT_ANCHORS: &str = "a/s/";
pub const AUDIT_WEBHOOKS: &str = "a/w/";
/// How far each class of records was pruned.
pub const AUDIT_PRUNED: &str = "a/c/";
pub const AUDIT_SUBJECTS: &str = "a/p/";

/// Stands for the project or organization in keys of kinds that belong to none.
const NEITHER: &str = "-";

fn scope(within: Option<&Name>) -> &str {
    within.map_or(NEITHER, Name::as_str)
}

fn is_within(kind: &KindDescriptor) -> bool {
    matches!(kind.scope, Scope::Project | Scope::Organization)
}

/// `within`: the project or organization that it belongs to.
pub fn object(kind: &KindDescriptor, within: Option<&Name>, name: &Name) -> String {
    debug_assert_eq!(is_within(kind), within.is_some());
    format!("o/{}/{}/{name}", kind.plural, scope(within))
}

/// All objects of a kind, in one project or organization or, with `None` for a kind that belongs to one, in all.
pub fn objects(kind: &KindDescriptor, within: Option<&Name>) -> String {
    match within {
        None if is_within(kind) => format!("o/{}/", kind.plural),
        _ => format!("o/{}/{}/", kind.plural, scope(within)),
    }
}

pub fn tombstone(kind: &KindDescriptor, uid: Uid) -> String {
    format!("t/{}/{uid}", kind.plural)
}

pub fn tombstones(kind: &KindDescriptor) -> String {
    format!("t/{}/", kind.plural)
}

pub fn idempotency(within: Option<&Name>, key: &str) -> String {
    format!("i/{}/{key}", scope(within))
}

/// The sealed values of one version of a secret.
pub fn secret_version(project: &Name, name: &Name, version: u64) -> String {
    format!("{SECRETS}{project}/{name}/{version:020}")
}

/// What an app's load was on a day, in days since 1970.
pub fn load_history(app: Uid, day: u64) -> String {
    format!("{LOADS}{app}/{day:010}")
}

/// The days of an app's load.
pub fn load_histories(app: Uid) -> String {
    format!("{LOADS}{app}/")
}

/// The app and day of such a key.
pub fn load_of(key: &[u8]) -> Option<(Uid, u64)> {
    let (app, day) = std::str::from_utf8(key).ok()?.strip_prefix(LOADS)?.split_once('/')?;
    Some((app.parse().ok()?, day.parse().ok()?))
}

pub fn audit_record(index: u64) -> String {
    format!("{AUDIT_RECORDS}{index:020}")
}

/// The index of the record with this key.
pub fn audit_index(key: &[u8]) -> Option<u64> {
    std::str::from_utf8(key.strip_prefix(AUDIT_RECORDS.as_bytes())?).ok()?.parse().ok()
}

pub fn audit_head(size: u64) -> String {
    format!("{AUDIT_HEADS}{size:020}")
}

/// The key under which an object is stored, living or deleted.
pub fn of(kind: &KindDescriptor, object: &AnyObject) -> String {
    let m = &object.metadata;
    if m.deleting.is_some() { tombstone(kind, m.uid) } else { self::object(kind, m.within(), &m.name) }
}

/// The first key after everything that begins with `prefix`.
pub fn prefix_end(prefix: &str) -> String {
    let mut end = prefix.to_owned();
    let last = end.pop().expect("a prefix is not empty");
    end.push(char::from_u32(last as u32 + 1).expect("prefixes end with '/'"));
    end
}
