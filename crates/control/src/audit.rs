//! The group's audit log, as its writer keeps it: every change that a user asked for leaves a record in the change's own
//! transaction, so that neither is ever there without the other, and the record costs no sync of its own.
//!
//! A [`Trail`] is what the writer holds of the log: the right edge of its tree, a few kilobytes however long the log is.
//! The records themselves stand in the store only; no table and no view takes them in. A new writer resumes from the
//! state's row, the unfinished tiles and the last records, at the revision of its claim; where those don't fit together,
//! nothing is changed for users until somebody has looked, and the reconcilers go on.
//!
//! What is refused, and what only reads, is no business of the writer's: it goes to the chain of the server that answered,
//! which is bound to this log by [anchors](Deed::Anchor).
//!
//! Where a request came from is personal: it stands in the record encrypted with a key of the principal's own, which is a
//! row of the store. [`Deed::Forget`] deletes the row.

mod heads;
mod notes;
pub mod read;
pub mod retention;

use std::collections::BTreeMap;

use nexus_audit::log::ANCHOR_ACTION;
use nexus_audit::{
    Actor, ActorKind, Anchor, Answer, Change, Draft, Hash, Log, LogState, Personal, Retention, SubjectKey, Target,
};
use nexus_env::RngExt;
use nexus_model::kind::{Kind, Organization, Project, Scope};
use nexus_model::{API_VERSION, AnyObject, ApiError, Code, Metadata, Name, Uid, key};
use nexus_store::{RangeRequest, Revision, Store, StoreError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::intent::{Accepted, Deed, Intent, Provenance};
use crate::step::Step;
use crate::world::Stored;

pub use heads::Heads;
pub use notes::{Notes, NotesKeeper};
pub use read::ReadError;

/// The action of records of shredded personal data.
pub const FORGET_ACTION: &str = "audit:forget";
/// Policies that a record names. More never decide one request.
const MAX_POLICIES: usize = 32;
/// Longer texts that come from outside are cut, so that a record is never too long to be written.
const MAX_TEXT: usize = 128;
const MAX_NAME: usize = 256;

/// What a group's writer holds of its audit log.
#[derive(Debug)]
pub struct Trail {
    /// Or why it can't go on.
    log: Result<Log, String>,
    /// The newest revision that this writer knows to be committed.
    pub(crate) revision: u64,
    /// The last anchor of each server.
    anchors: BTreeMap<String, Anchor>,
    subjects: BTreeMap<String, Subject>,
}

/// The row of a principal's key.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Subject {
    subject: String,
    key: Hash,
}

impl Subject {
    fn key(&self) -> SubjectKey {
        SubjectKey::from_bytes(self.subject.clone(), self.key.0)
    }
}

impl Trail {
    /// Of a log without records.
    pub fn new(group: &Name) -> Self {
        Self { log: Ok(Log::new(group.as_str())), revision: 0, anchors: BTreeMap::new(), subjects: BTreeMap::new() }
    }

    /// How many records the log has.
    pub fn size(&self) -> u64 {
        self.log.as_ref().map_or(0, Log::size)
    }

    /// Why nothing can be recorded, and so nothing changed, if that is so.
    pub fn broken(&self) -> Option<&str> {
        self.log.as_ref().err().map(String::as_str)
    }

    /// Goes on where the group's last writer ended, as committed at a revision.
    pub(crate) async fn load(store: &dyn Store, at: Revision, group: &Name) -> Result<Self, StoreError> {
        let mut trail = Self { revision: at.0, ..Self::new(group) };
        let state = RangeRequest { at: Some(at), ..RangeRequest::get(key::AUDIT_STATE) };
        if let Some(kv) = store.range(state).await?.kvs.pop() {
            trail.log = match LogState::from_bytes(&kv.value) {
                Ok(state) => resume(store, at, group, state).await?,
                Err(error) => Err(error.to_string()),
            };
        }
        for kv in rows(store, at, key::AUDIT_ANCHORS).await? {
            match serde_json::from_slice::<Anchor>(&kv.value) {
                Ok(anchor) => drop(trail.anchors.insert(anchor.server.clone(), anchor)),
                Err(error) => trail.log = Err(format!("the anchor {} can't be read: {error}", text(&kv.key))),
            }
        }
        for kv in rows(store, at, key::AUDIT_SUBJECTS).await? {
            // One that can't be read is as good as shredded: the next request makes a new one.
            if let Ok(subject) = serde_json::from_slice(&kv.value) {
                trail.subjects.insert(text(&kv.key), subject);
            }
        }
        if let Err(why) = &trail.log {
            tracing::error!(%group, why, "the audit log can't go on: users' changes are refused until it can");
        }
        Ok(trail)
    }
}

fn text(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}

/// All rows under a prefix: few, or small.
pub(crate) async fn rows(
    store: &dyn Store,
    at: Revision,
    prefix: &str,
) -> Result<Vec<nexus_store::KeyValue>, StoreError> {
    const PAGE: usize = 2_000;
    let (mut found, mut start) = (Vec::new(), bytes::Bytes::copy_from_slice(prefix.as_bytes()));
    loop {
        let mut request = RangeRequest::new(start, key::prefix_end(prefix)).limit(PAGE);
        request.at = Some(at);
        let page = store.range(request).await?;
        found.extend(page.kvs);
        match found.last() {
            Some(last) if page.more => start = [&last.key[..], &[0]].concat().into(),
            _ => return Ok(found),
        }
    }
}

/// The log behind its state; within, why that can't be.
async fn resume(
    store: &dyn Store,
    at: Revision,
    group: &Name,
    state: LogState,
) -> Result<Result<Log, String>, StoreError> {
    let open = state.open_tiles().into_iter().map(|(id, _)| id);
    match read::tiles(store, Some(at), open, state.frontier.size()).await {
        Ok(tiles) => Ok(Log::resume(group.as_str(), state, &tiles).map_err(|error| error.to_string())),
        Err(ReadError::Store(error)) => Err(error),
        Err(damaged @ ReadError::Damaged { .. }) => Ok(Err(damaged.to_string())),
    }
}

/// Which of the verbs of every kind was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    Create,
    Update,
    Delete,
    Pause,
    Resume,
    Promote,
    Undo,
}

impl Verb {
    fn word(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Promote => "promote",
            Self::Undo => "undo",
        }
    }

    /// The same as the reason of an event.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Create => "Created",
            Self::Update => "Updated",
            Self::Delete => "Deleted",
            Self::Pause => "RolloutPaused",
            Self::Resume => "RolloutResumed",
            Self::Promote => "RolloutPromoted",
            Self::Undo => "RolloutUndone",
        }
    }
}

/// Records a change of an object: the last thing that is done for an intent, because a change that can't be recorded is
/// refused.
pub(crate) fn changed<K: Stored>(
    step: &mut Step<'_>,
    intent: &Intent,
    verb: Verb,
    uid: Uid,
    before: Option<&Value>,
    after: Option<&Value>,
) -> Result<(), ApiError> {
    if intent.dry_run {
        return Ok(());
    }
    let identity = K::SCOPE == Scope::Organization || K::PLURAL == Organization::PLURAL;
    let target = &intent.target;
    let name = match &target.organization {
        Some(organization) => format!("{organization}/{}", target.name),
        None => target.name.to_string(),
    };
    let mut draft = draft_of(step, intent, format!("{}:{}", K::PLURAL, verb.word()))?;
    draft.target = Some(Target {
        name,
        organization: owner::<K>(step, target, before.or(after)),
        plural: K::PLURAL.to_owned(),
        project: target.project.as_ref().map(Name::to_string),
        uid: Some(uid),
    });
    draft.change = Some(Change::of(before, after));
    draft.retention = if identity { Retention::Security } else { Retention::Change };
    step.record(draft)
}

/// Records what was done with an object that did not change its spec.
pub(crate) fn acted<K: Stored>(step: &mut Step<'_>, intent: &Intent, verb: &str, uid: Uid) -> Result<(), ApiError> {
    let target = &intent.target;
    let mut draft = draft_of(step, intent, format!("{}:{verb}", K::PLURAL))?;
    draft.target = Some(Target {
        name: target.name.to_string(),
        organization: owner::<K>(step, target, None),
        plural: K::PLURAL.to_owned(),
        project: target.project.as_ref().map(Name::to_string),
        uid: Some(uid),
    });
    step.record(draft)
}

/// The organization that an object belongs to.
fn owner<K: Stored>(step: &Step<'_>, target: &crate::intent::Target, spec: Option<&Value>) -> Option<String> {
    if K::PLURAL == Organization::PLURAL {
        return Some(target.name.to_string());
    }
    if K::PLURAL == Project::PLURAL {
        return Some(spec?["organization"].as_str()?.to_owned());
    }
    let organization = match (&target.organization, &target.project) {
        (Some(organization), _) => organization,
        (None, Some(project)) => &step.world.project(project)?.spec.organization,
        (None, None) => return None,
    };
    Some(organization.to_string())
}

/// Carries out what is asked of the log itself.
pub(crate) fn carry_out(step: &mut Step<'_>, intent: &Intent, deed: &Deed) -> Result<Accepted, ApiError> {
    match deed {
        Deed::Anchor(anchor) => settle(step, intent, anchor)?,
        Deed::Forget { principal } => forget(step, intent, principal)?,
    }
    let metadata = Metadata::new(intent.target.name.clone(), None);
    let (api_version, kind) = (API_VERSION.to_owned(), "AuditDeed".to_owned());
    let spec = serde_json::to_value(deed).expect("a deed is plain data");
    let object = AnyObject { api_version, kind, metadata, spec, status: Value::Null };
    Ok(Accepted { object, created: false, replayed: false })
}

fn settle(step: &mut Step<'_>, intent: &Intent, anchor: &Anchor) -> Result<(), ApiError> {
    let server = anchor.server.parse::<Name>();
    let server = server.map_err(|e| ApiError::new(Code::Invalid, format!("{:?} is no server: {e}", anchor.server)))?;
    let trail = step.world.trail();
    let last = trail.anchors.get(server.as_str()).cloned();
    // An answer was lost and the anchor is sent again.
    if last.as_ref() == Some(anchor) {
        return Ok(());
    }
    if !anchor.follows(last.as_ref()) {
        let next = last.as_ref().map_or(0, |l| l.to + 1);
        let detail = format!("an anchor of {server} begins at {next}, this one at {}", anchor.from);
        return Err(ApiError::new(Code::Conflict, detail));
    }
    let time = step.millis();
    let value = serde_json::to_vec(anchor).expect("an anchor is plain data");
    step.set(read::anchor_row(server.as_str()), Some(value.into()));
    step.world.trail_mut().anchors.insert(server.to_string(), anchor.clone());
    step.undo(move |world| {
        let anchors = &mut world.trail_mut().anchors;
        match last {
            Some(last) => anchors.insert(last.server.clone(), last),
            None => anchors.remove(server.as_str()),
        };
    });
    let draft = anchor.clone().draft(time, intent.request_id.clone());
    debug_assert_eq!(draft.action, ANCHOR_ACTION);
    step.record(draft)
}

fn forget(step: &mut Step<'_>, intent: &Intent, principal: &str) -> Result<(), ApiError> {
    let place = place_of(principal);
    let Some(subject) = step.world.trail_mut().subjects.remove(&place) else {
        let detail =
            format!("no personal data of {:?} is kept in the audit log of {}", cut(principal, MAX_NAME), step.region());
        return Err(ApiError::new(Code::NotFound, detail));
    };
    step.set(place.clone(), None);
    step.undo(move |world| drop(world.trail_mut().subjects.insert(place, subject)));
    let mut draft = draft_of(step, intent, FORGET_ACTION.to_owned())?;
    let name = cut(principal, MAX_NAME);
    draft.target = Some(Target { name, organization: None, plural: "principals".to_owned(), project: None, uid: None });
    draft.retention = Retention::Security;
    step.record(draft)
}

/// What is common to the records of all that a principal does.
fn draft_of(step: &mut Step<'_>, intent: &Intent, action: String) -> Result<Draft, ApiError> {
    let by = &intent.by;
    let actor = actor(by, &intent.actor);
    let policies = policies(by);
    let personal = by.address.filter(|_| !intent.dry_run).map(|address| {
        let principal = if by.principal.is_empty() { format!("operator:{}", actor.name) } else { by.principal.clone() };
        let personal = Personal { source_address: Some(address.to_string()), ..Personal::default() };
        subject_key(step, &principal).seal(&personal, &intent.request_id, step.rng())
    });
    Ok(Draft {
        time: step.millis(),
        actor,
        action,
        target: None,
        policies,
        answer: Answer::Ok,
        revision: Some(step.world.trail().revision),
        request_id: intent.request_id.clone(),
        change: None,
        retention: Retention::Change,
        anchor: None,
        personal,
    })
}

/// The row of a principal's key. The name itself is in no key, because keys are shown more freely than records.
pub fn place_of(principal: &str) -> String {
    format!("{}{}", key::AUDIT_SUBJECTS, &Hash::of(principal.as_bytes()).to_string()[..32])
}

/// The key of a principal, from the value of its row.
pub fn read_subject(row: &[u8]) -> Option<SubjectKey> {
    serde_json::from_slice::<Subject>(row).ok().map(|subject| subject.key())
}

fn subject_key(step: &mut Step<'_>, principal: &str) -> SubjectKey {
    let place = place_of(principal);
    if let Some(subject) = step.world.trail().subjects.get(&place) {
        return subject.key();
    }
    let id: [u8; 8] = step.rng().bytes();
    let subject = Subject { subject: format!("s-{:016x}", u64::from_be_bytes(id)), key: Hash(step.rng().bytes()) };
    let key = subject.key();
    let value = serde_json::to_vec(&subject).expect("a key is plain data");
    step.set(place.clone(), Some(value.into()));
    step.world.trail_mut().subjects.insert(place.clone(), subject);
    step.undo(move |world| drop(world.trail_mut().subjects.remove(&place)));
    key
}

/// Who asked, in the words of a record. `operator`: its name if nothing more is known.
pub fn actor(by: &Provenance, operator: &str) -> Actor {
    let (kind, path) = match by.principal.split_once(':') {
        Some(("user", path)) => (ActorKind::User, path),
        Some(("service-account", path)) => (ActorKind::ServiceAccount, path),
        Some(("workload", path)) => (ActorKind::Workload, path),
        Some(("host", path)) => (ActorKind::Host, path),
        Some(("gateway", path)) => (ActorKind::Gateway, path),
        Some(("server", path)) => (ActorKind::Server, path),
        Some(("anonymous", path)) => (ActorKind::Anonymous, path),
        Some(("operator", path)) => (ActorKind::Operator, path),
        _ if by.principal.is_empty() => (ActorKind::Operator, operator),
        _ => (ActorKind::Operator, by.principal.as_str()),
    };
    let belongs = matches!(kind, ActorKind::User | ActorKind::ServiceAccount);
    let (organization, name) = match path.split_once('/').filter(|_| belongs) {
        Some((organization, name)) => (Some(cut(organization, MAX_TEXT)), name),
        None => (None, path),
    };
    Actor {
        access_key: None,
        kind,
        name: cut(name, MAX_NAME),
        organization,
        session: by.session.as_deref().map(|s| cut(s, MAX_TEXT)),
    }
}

fn policies(by: &Provenance) -> Vec<String> {
    by.policies.iter().take(MAX_POLICIES).map(|p| cut(p, MAX_TEXT)).collect()
}

/// The principal that an actor of a record is, as [`Provenance::principal`] names it.
pub fn principal_of(actor: &Actor) -> String {
    let kind = serde_json::to_value(actor.kind).expect("a kind is a word");
    let kind = kind.as_str().unwrap_or_default();
    match &actor.organization {
        Some(organization) => format!("{kind}:{organization}/{}", actor.name),
        None => format!("{kind}:{}", actor.name),
    }
}

/// At most so many bytes, and nothing that JSON has to escape at length.
fn cut(text: &str, most: usize) -> String {
    text[..text.floor_char_boundary(most)].chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl Step<'_> {
    /// Appends a record to the group's log, in the transaction of this step.
    pub(crate) fn record(&mut self, draft: Draft) -> Result<(), ApiError> {
        let group = self.region();
        let trail = self.world.trail_mut();
        let log = match &mut trail.log {
            Ok(log) => log,
            Err(why) => {
                let detail = format!(
                    "nothing is changed that can't be recorded, and the audit log of {group} can't go on: {why}; see \
                     docs/guide/audit.md"
                );
                return Err(ApiError::new(Code::Unavailable, detail));
            }
        };
        let mark = log.mark();
        let appended = log.append(draft).map_err(|e| ApiError::new(Code::BadRequest, e.to_string()))?;
        let state = log.state().to_bytes();
        self.undo(move |world| {
            if let Ok(log) = &mut world.trail_mut().log {
                log.take_back(mark);
            }
        });
        self.set(key::audit_record(appended.index), Some(appended.row.into()));
        for (id, tile) in appended.tiles {
            self.set(format!("{}{id}", key::AUDIT_TILES), Some(tile.into()));
        }
        self.set(key::AUDIT_STATE.to_owned(), Some(state.into()));
        Ok(())
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.now.as_millis()).unwrap_or(0)
    }
}
