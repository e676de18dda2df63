//! Where things stand in the metadata store. One place, because servers of different releases must agree.
//!
//! | key | value |
//! |---|---|
//! | `o/{plural}/{project or -}/{name}` | an object |
//! | `t/{plural}/{uid}` | a tombstone: a deleted object whose teardown goes on |
//! | `i/{project or -}/{key}` | the first answer to an idempotency key |
//! | `sys/writer` | the epoch of the region's writer |
//! | `sys/adopted` | the newest revision of the global group that a region has decided upon |
//! | `sys/format` | the version of everything stored here |
//! | `sys/fleet/{server or host}/{name}` | a machine that has joined, or left |
//! | `sys/fleet/node`, `sys/fleet/addresses` | what was given out last, so that nothing is given twice |
//! | `sys/join/token/{hash}` | a join token that was not used yet |
//! | `sys/join/answer/{hash of a public key}` | what a join was answered, so that a retry gets it again |

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
pub const JOIN_TOKENS: &str = "sys/join/token/";
pub const JOIN_ANSWERS: &str = "sys/join/answer/";

/// Stands for the project in keys of kinds that have none.
const NO_PROJECT: &str = "-";

fn scope(project: Option<&Name>) -> &str {
    project.map_or(NO_PROJECT, Name::as_str)
}

pub fn object(kind: &KindDescriptor, project: Option<&Name>, name: &Name) -> String {
    debug_assert_eq!(kind.scope == Scope::Project, project.is_some());
    format!("o/{}/{}/{name}", kind.plural, scope(project))
}

/// All objects of a kind, in one project or, with `None` for a project's kind, in all.
pub fn objects(kind: &KindDescriptor, project: Option<&Name>) -> String {
    match (kind.scope, project) {
        (Scope::Project, None) => format!("o/{}/", kind.plural),
        _ => format!("o/{}/{}/", kind.plural, scope(project)),
    }
}

pub fn tombstone(kind: &KindDescriptor, uid: Uid) -> String {
    format!("t/{}/{uid}", kind.plural)
}

pub fn tombstones(kind: &KindDescriptor) -> String {
    format!("t/{}/", kind.plural)
}

pub fn idempotency(project: Option<&Name>, key: &str) -> String {
    format!("i/{}/{key}", scope(project))
}

/// The key under which an object is stored, living or deleted.
pub fn of(kind: &KindDescriptor, object: &AnyObject) -> String {
    let m = &object.metadata;
    if m.deleting.is_some() { tombstone(kind, m.uid) } else { self::object(kind, m.project.as_ref(), &m.name) }
}

/// The first key after everything that begins with `prefix`.
pub fn prefix_end(prefix: &str) -> String {
    let mut end = prefix.to_owned();
    let last = end.pop().expect("a prefix is not empty");
    end.push(char::from_u32(last as u32 + 1).expect("prefixes end with '/'"));
    end
}
