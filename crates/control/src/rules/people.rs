//! People, programs and what they are granted: what a change must keep true.

use std::net::{IpAddr, Ipv4Addr};

use nexus_iam::policy::{self, Change, Circumstances, LockOut, PolicyError, Principal};
use nexus_model::kind::*;
use nexus_model::{ApiError, Code, FieldError, Name, Object, Timestamp};

use crate::directory::{self, engine_of};
use crate::step::Step;
use crate::world::World;

/// The most sessions of one user: with one more, the oldest ends.
const SESSIONS: usize = 50;
/// The same of those that can't be refreshed.
const SHORT_SESSIONS: usize = 1_000;
/// The most tokens, and the most access keys, of one organization.
const CREDENTIALS: usize = 10_000;
/// Sessions, and tokens, that one step erases.
const AT_ONCE: usize = 16;
/// How far ahead a client's clock may be.
const SKEW_MS: i64 = 300_000;

pub fn user(object: &Object<User>) -> Principal {
    let organization = object.metadata.organization.as_ref().map_or("", Name::as_str);
    Principal::user(organization, object.metadata.name.as_str())
}

pub(super) fn invalid(field: &str, message: impl Into<String>) -> ApiError {
    ApiError::invalid(vec![FieldError::new(field, message)])
}

fn unengined(error: &PolicyError) -> ApiError {
    tracing::error!(%error, "what is stored of an organization makes no policy engine");
    ApiError::new(Code::Internal, "what is stored of this organization can't be evaluated; the server's log says why")
}

/// Refuses a change after which nobody could change the organization's policies any more.
pub fn refuse_lock_out(step: &Step<'_>, organization: Option<&Name>, change: Change) -> Result<(), ApiError> {
    refuse_lock_outs(step, organization, &[change])
}

fn refuse_lock_outs(step: &Step<'_>, organization: Option<&Name>, changes: &[Change]) -> Result<(), ApiError> {
    let Some(organization) = organization.filter(|o| **o != *SYSTEM_ORGANIZATION) else { return Ok(()) };
    let mut engine = engine_of(step.world, organization).map_err(|e| unengined(&e))?;
    // Whether owners could still act is asked from this very machine: a policy about addresses is not judged here.
    let circumstances = Circumstances {
        ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        time: step.now,
        mfa: true,
        request_id: step.request_id.as_ref().map_or("", |id| id.as_str()),
    };
    for change in changes {
        let locked = engine.would_lock_out(organization.as_str(), change, &circumstances);
        match locked.map_err(|e| ApiError::new(Code::Invalid, e.to_string()))? {
            None => engine.apply(change.clone()).map_err(|e| ApiError::new(Code::Invalid, e.to_string()))?,
            Some(locked) => return Err(locked_out(organization, &locked)),
        }
    }
    Ok(())
}

fn locked_out(organization: &Name, locked: &LockOut) -> ApiError {
    let why = match (locked.owners, locked.by.first()) {
        (0, _) => "no owner who may sign in would be left".to_owned(),
        (_, Some(by)) => format!("{} would forbid `{}` to its owners", by.description, locked.missing_action),
        (_, None) => format!("nothing would permit `{}` to its owners", locked.missing_action),
    };
    let detail = format!("organization {organization} would be locked out for good: {why}. Make another owner first");
    ApiError::new(Code::Conflict, detail)
}

pub fn check_members(step: &Step<'_>, group: &Object<Group>) -> Result<(), ApiError> {
    let organization = group.metadata.organization.as_ref();
    let world = &step.world;
    let users = group.spec.users.iter().filter(|n| world.users.get(organization, n).is_none());
    let users = users.map(|n| FieldError::new("spec.users", format!("there is no user {n}")));
    let accounts = group.spec.service_accounts.iter();
    let accounts = accounts.filter(|n| world.service_accounts.get(organization, n).is_none());
    let accounts =
        accounts.map(|n| FieldError::new("spec.serviceAccounts", format!("there is no service account {n}")));
    let errors: Vec<_> = users.chain(accounts).take(20).collect();
    if errors.is_empty() { Ok(()) } else { Err(ApiError::invalid(errors)) }
}

/// Owners may be so by a group: whoever leaves it must not be the last.
pub fn refuse_group_lock_out(
    step: &Step<'_>,
    old: &Object<Group>,
    new: Option<&Object<Group>>,
) -> Result<(), ApiError> {
    let now = new.map(directory::members).unwrap_or_default();
    let gone: Vec<Principal> = directory::members(old).into_iter().filter(|m| !now.contains(m)).collect();
    if gone.is_empty() {
        return Ok(());
    }
    let organization = old.metadata.organization.as_ref().expect("groups belong to an organization");
    let this = &old.metadata.name;
    let others = |principal: &Principal| -> Vec<Principal> {
        let others = step.world.groups.within(organization).filter(|g| g.metadata.name != *this);
        let others = others.filter(|g| directory::members(g).contains(principal));
        others.map(|g| Principal::group(organization.as_str(), g.metadata.name.as_str())).collect()
    };
    let users = gone.into_iter().filter(|p| p.kind() == policy::PrincipalKind::User);
    let active = |p: &Principal| {
        let name: Option<Name> = p.name().parse().ok();
        let user = name.and_then(|n| step.world.users.get(Some(organization), &n));
        user.is_some_and(|u| !u.spec.disabled)
    };
    let changes: Vec<Change> =
        users.filter(active).map(|principal| Change::Member { groups: others(&principal), principal }).collect();
    refuse_lock_outs(step, Some(organization), &changes)
}

fn subject_is_there(world: &World, organization: &Name, subject: &Subject) -> bool {
    let within = Some(organization);
    match subject.kind {
        SubjectKind::User => world.users.get(within, &subject.name).is_some(),
        SubjectKind::ServiceAccount => world.service_accounts.get(within, &subject.name).is_some(),
        SubjectKind::Group => world.groups.get(within, &subject.name).is_some(),
    }
}

pub(super) fn check_project(step: &Step<'_>, organization: &Name, project: Option<&Name>) -> Result<(), ApiError> {
    let Some(project) = project else { return Ok(()) };
    let known = step.world.project(project).is_some_and(|p| p.spec.organization == *organization);
    if known && *organization != *SYSTEM_ORGANIZATION {
        return Ok(());
    }
    Err(invalid("spec.project", format!("there is no project {project} in organization {organization}")))
}

pub fn check_binding(
    step: &Step<'_>,
    old: Option<&Object<RoleBinding>>,
    new: &Object<RoleBinding>,
) -> Result<(), ApiError> {
    let organization = new.metadata.organization.as_ref().expect("role bindings belong to an organization");
    check_project(step, organization, new.spec.project.as_ref())?;
    // Who is in another organization is not for this one to learn.
    let own = |s: &&Subject| s.organization.as_ref().is_none_or(|o| o == organization);
    let known = |s: &&Subject| old.is_some_and(|o| o.spec.subjects.contains(*s));
    let asked = new.spec.subjects.iter().filter(own).filter(|s| !known(s));
    let missing = asked.filter(|s| !subject_is_there(step.world, organization, s));
    let message = |s: &Subject| {
        FieldError::new("spec.subjects", format!("there is no {:?} {} in organization {organization}", s.kind, s.name))
    };
    let errors: Vec<_> = missing.map(message).take(20).collect();
    if !errors.is_empty() {
        return Err(ApiError::invalid(errors));
    }
    let binding = directory::binding(new).map_err(|e| invalid("spec.role", e.to_string()))?;
    if binding.role.is_of_fleet() != (*organization == *SYSTEM_ORGANIZATION) {
        let message = format!(
            "{} can't be given in organization {organization}: the roles of the fleet are given in {SYSTEM_ORGANIZATION}, \
             all others in the other organizations",
            binding.role
        );
        return Err(invalid("spec.role", message));
    }
    // Where it reached before, it does not reach any more.
    let mut changes = Vec::new();
    if let Some(Ok(before)) = old.map(directory::binding) {
        changes.push(Change::RemoveBinding { reach: before.reach, name: before.name });
    }
    let now = Change::Binding(binding);
    let (organization, changes) = (Some(organization), [changes, vec![now.clone()]].concat());
    match changes.len() {
        // Taking the old one away first would look like a lock-out where the new one grants the same.
        2 if same_reach(&changes) => refuse_lock_out(step, organization, now),
        _ => refuse_lock_outs(step, organization, &changes),
    }
}

fn same_reach(changes: &[Change]) -> bool {
    matches!(changes, [Change::RemoveBinding { reach, .. }, Change::Binding(binding)] if *reach == binding.reach)
}

pub fn refuse_unbinding(step: &Step<'_>, old: &Object<RoleBinding>) -> Result<(), ApiError> {
    let Ok(binding) = directory::binding(old) else { return Ok(()) };
    let change = Change::RemoveBinding { reach: binding.reach, name: binding.name };
    refuse_lock_out(step, old.metadata.organization.as_ref(), change)
}

pub fn check_policy(step: &Step<'_>, new: &Object<Policy>) -> Result<(), ApiError> {
    let organization = new.metadata.organization.as_ref().expect("policies belong to an organization");
    check_project(step, organization, new.spec.project.as_ref())?;
    let text = directory::policy_text(new);
    if *organization == *SYSTEM_ORGANIZATION {
        return Err(invalid("spec.text", "the fleet has no policies of its own: write one for an organization"));
    }
    policy::check(policy::vocabulary(), &text).map_err(|e| invalid("spec.text", e.to_string()))?;
    refuse_lock_out(step, Some(organization), Change::Policy(text))
}

pub fn check_token(step: &Step<'_>, new: &Object<Token>) -> Result<(), ApiError> {
    let organization = new.metadata.organization.as_ref().expect("tokens belong to an organization");
    check_project(step, organization, new.spec.project.as_ref())?;
    check_holder(step, organization, new.spec.holder.as_ref())?;
    let latest = step.now.as_millis() + MAX_TOKEN_DAYS as i64 * 86_400_000 + SKEW_MS;
    let fits = |t: &Timestamp| (step.now.as_millis()..=latest).contains(&t.as_millis());
    if !new.spec.expires.as_ref().is_some_and(fits) {
        return Err(invalid("spec.expires", format!("a moment within the next {MAX_TOKEN_DAYS} days")));
    }
    refuse_many(organization, "tokens", step.world.tokens.within(organization).count())
}

pub fn check_access_key(step: &Step<'_>, new: &Object<AccessKey>) -> Result<(), ApiError> {
    let organization = new.metadata.organization.as_ref().expect("access keys belong to an organization");
    check_project(step, organization, new.spec.project.as_ref())?;
    check_holder(step, organization, new.spec.holder.as_ref())?;
    refuse_many(organization, "access keys", step.world.access_keys.within(organization).count())
}

fn check_holder(step: &Step<'_>, organization: &Name, holder: Option<&Holder>) -> Result<(), ApiError> {
    let Some(holder) = holder else { return Err(invalid("spec.holder", "whose it is")) };
    if holder_is_there(step.world, organization, holder) {
        return Ok(());
    }
    let message = format!("there is no {:?} {} in organization {organization}", holder.kind, holder.name);
    Err(invalid("spec.holder", message))
}

pub(super) fn refuse_many(organization: &Name, what: &str, count: usize) -> Result<(), ApiError> {
    if count < CREDENTIALS {
        return Ok(());
    }
    let detail = format!("organization {organization} has {CREDENTIALS} {what}, which is the most: delete some");
    Err(ApiError::new(Code::QuotaExceeded, detail))
}

fn holder_is_there(world: &World, organization: &Name, holder: &Holder) -> bool {
    match holder.kind {
        HolderKind::User => world.users.get(Some(organization), &holder.name).is_some(),
        HolderKind::ServiceAccount => world.service_accounts.get(Some(organization), &holder.name).is_some(),
    }
}

pub fn check_session(
    step: &mut Step<'_>,
    old: Option<&Object<Session>>,
    new: &Object<Session>,
) -> Result<(), ApiError> {
    if old.is_some() {
        return Ok(());
    }
    let organization = new.metadata.organization.as_ref().expect("sessions belong to an organization");
    // A pipeline has many short ones at once, and must not end a program's long ones by them.
    let lasts = new.spec.refresh.is_some();
    let most = if lasts { SESSIONS } else { SHORT_SESSIONS };
    let of = |s: &&Object<Session>| s.spec.holder == new.spec.holder && s.spec.refresh.is_some() == lasts;
    let mut theirs: Vec<_> = step.world.sessions.within(organization).filter(of).cloned().collect();
    theirs.sort_by_key(|s| s.metadata.created);
    let many = (theirs.len() + 1).saturating_sub(most).min(8);
    theirs.iter().take(many).for_each(|s| step.erase(s));
    Ok(())
}

/// Ends everything by which somebody is signed in or could sign in.
pub fn sign_out(step: &mut Step<'_>, organization: Option<&Name>, kind: HolderKind, name: &Name) {
    let Some(organization) = organization else { return };
    let holder = Some(Holder { kind, name: name.clone() });
    let sessions = step.world.sessions.within(organization).filter(|s| s.spec.holder == holder);
    let sessions: Vec<_> = sessions.cloned().collect();
    // What does not fit in a transaction is left to the housekeeping: nobody who is gone is believed anyway.
    sessions.iter().take(AT_ONCE).for_each(|s| step.erase(s));
    let tokens: Vec<_> =
        step.world.tokens.within(organization).filter(|t| t.spec.holder == holder).take(AT_ONCE).cloned().collect();
    tokens.iter().for_each(|t| step.erase(t));
    let keys = step.world.access_keys.within(organization).filter(|k| k.spec.holder == holder);
    let keys: Vec<_> = keys.take(AT_ONCE).cloned().collect();
    keys.iter().for_each(|k| step.erase(k));
    if kind == HolderKind::User
        && let Some(credential) = step.world.credentials.get(Some(organization), name).cloned()
    {
        step.erase(&credential);
    }
}

/// Erases some of the sessions and tokens that have ended, or whose holder is gone.
pub fn forget_ended(step: &mut Step<'_>) {
    let over = |expires: Option<&Timestamp>| expires.is_none_or(|e| *e < step.now);
    let gone = |organization: Option<&Name>, holder: Option<&Holder>| {
        !organization.zip(holder).is_some_and(|(o, h)| holder_is_there(step.world, o, h))
    };
    let sessions = step.world.sessions.live.values();
    let sessions = sessions
        .filter(|s| over(s.spec.expires.as_ref()) || gone(s.metadata.organization.as_ref(), s.spec.holder.as_ref()));
    let sessions: Vec<_> = sessions.take(AT_ONCE).cloned().collect();
    let tokens = step.world.tokens.live.values();
    let tokens = tokens
        .filter(|t| over(t.spec.expires.as_ref()) || gone(t.metadata.organization.as_ref(), t.spec.holder.as_ref()));
    let tokens: Vec<_> = tokens.take(AT_ONCE).cloned().collect();
    let keys = step.world.access_keys.live.values();
    let keys = keys.filter(|k| gone(k.metadata.organization.as_ref(), k.spec.holder.as_ref()));
    let keys: Vec<_> = keys.take(AT_ONCE).cloned().collect();
    sessions.iter().for_each(|s| step.erase(s));
    tokens.iter().for_each(|t| step.erase(t));
    keys.iter().for_each(|k| step.erase(k));
}
