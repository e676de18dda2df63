//! What users ask, decided: names, preconditions, immutability, protection, quota, and what one kind wants of another.
//!
//! Everything here is a function of the [`Step`]'s world. A refusal leaves no trace.

use nexus_iam::policy::Change as Grant;
use nexus_model::kind::{Kind, Severity, *};
use nexus_model::object::ConditionStatus;
use nexus_model::selector::Labels;
use nexus_model::{AnyObject, ApiError, Bytes, Code, FieldError, Name, Object, key};
use serde::Deserialize;
use serde_json::Value;

mod networks;

use crate::audit::{self, Verb};
use crate::intent::{Accepted, Change, Intent, RolloutOrder};
use crate::rules;
use crate::rules::usage::{self, charge_app, recharge};
use crate::step::{Dirty, Step};
use crate::world::{Part, Remembered, Stored, for_kind};

/// Decides one intent. The answer's revision is filled in after the commit.
pub fn decide(step: &mut Step<'_>, intent: &Intent) -> Result<Accepted, ApiError> {
    let place = match &intent.idempotency_key {
        None => None,
        Some(idempotency_key) => {
            let place = key::idempotency(intent.target.within(), idempotency_key)[2..].to_owned();
            if let Some(first) = step.world.remembered.get(&place) {
                if first.fingerprint != fingerprint(intent) {
                    let detail = "this Idempotency-Key was used with another request: use a new one";
                    return Err(ApiError::new(Code::Conflict, detail));
                }
                return Ok(Accepted { replayed: true, ..first.answer.clone() });
            }
            Some(place)
        }
    };
    step.request_id = Some(intent.request_id.clone());
    if let Change::Audit { deed } = &intent.change {
        return audit::carry_out(step, intent, deed);
    }
    if let Change::Tell { deed } = &intent.change {
        return rules::delivery::carry_out(step, intent, deed);
    }
    let accepted = for_kind!(&intent.target.plural, K => decide_kind::<K>(step, intent)?)
        .ok_or_else(|| ApiError::new(Code::NotFound, format!("there is no kind {:?}", intent.target.plural)))?;
    rules::delivery::await_end(step, intent, &accepted)?;
    if let Some(place) = place.filter(|_| !intent.dry_run) {
        let at = step.now.as_millis();
        step.remember(place, Remembered { fingerprint: fingerprint(intent), answer: accepted.clone(), at });
    }
    Ok(accepted)
}

fn fingerprint(intent: &Intent) -> String {
    let mut change = intent.change.clone();
    if intent.target.plural == Secret::PLURAL {
        rules::secret::leave_out_values(&mut change);
    }
    let what = serde_json::to_vec(&(&intent.target, &change, intent.if_match)).expect("intents are plain data");
    nexus_model::Digest::of(&what).hex()[..32].to_owned()
}

/// Whether this group keeps objects of a kind.
fn is_home<K: Kind>(part: Part) -> bool {
    match K::HOME {
        Home::Either => true,
        Home::Global => part != Part::Region,
        Home::Region => part != Part::Global,
    }
}

fn decide_kind<K: Admit>(step: &mut Step<'_>, intent: &Intent) -> Result<Accepted, ApiError> {
    let target = &intent.target;
    if !is_home::<K>(step.world.part) {
        let detail = format!("{} are not kept in {}: see `nexus explain {}`", K::PLURAL, step.region(), K::PLURAL);
        return Err(ApiError::new(Code::Internal, detail));
    }
    if let Some(project) = &target.project
        && step.world.project(project).is_none()
    {
        if !step.world.knows_fleet() {
            let detail = "this region's writer is still reading the global group: try again soon";
            return Err(ApiError::new(Code::Unavailable, detail));
        }
        return Err(ApiError::not_found("Project", project.as_str()));
    }
    if let Some(organization) = &target.organization
        && step.world.organizations.get(None, organization).is_none()
    {
        return Err(ApiError::not_found("Organization", organization.as_str()));
    }
    step.world.refuse_unreadable::<K>(target.within(), &target.name)?;
    let old = K::table(step.world).get(target.within(), &target.name).cloned();
    if let (Some(wanted), Some(old)) = (intent.if_match, &old)
        && step.committed_revision(old) != Some(wanted)
    {
        let detail = format!("{} {} has changed since revision {wanted}: read it again", K::KIND, target.name);
        return Err(ApiError::new(Code::PreconditionFailed, detail));
    }
    if intent.if_match.is_some() && old.is_none() {
        let detail = format!("there is no {} {} to match", K::KIND, target.name);
        return Err(ApiError::new(Code::PreconditionFailed, detail));
    }
    match (&intent.change, old) {
        (Change::Create { .. }, Some(_)) => {
            let detail = format!("{} {} exists already: choose another name or update it", K::KIND, target.name);
            Err(ApiError::new(Code::AlreadyExists, detail))
        }
        (Change::Create { object } | Change::Put { object }, None) => create::<K>(step, intent, object),
        (Change::Put { object }, Some(old)) => {
            let wanted = Wanted::<K>::of(object)?;
            update(step, intent, old, wanted)
        }
        (Change::Patch { patch }, Some(old)) => {
            let wanted = Wanted::<K>::patched(&old, patch)?;
            update(step, intent, old, wanted)
        }
        (Change::Delete, Some(old)) => delete::<K>(step, intent, old),
        (Change::Rollout { order }, Some(old)) => ordered::<K>(step, intent, old, *order),
        (Change::Audit { .. } | Change::Tell { .. } | Change::Rebalance { .. }, _) => Err(ApiError::new(
            Code::Internal,
            "what is done to the log, about deliveries or to all instances is of no kind",
        )),
        (Change::Patch { .. } | Change::Rollout { .. } | Change::Delete, None) => {
            Err(ApiError::not_found(K::KIND, target.name.as_str()))
        }
    }
}

/// The parts of an object that users write.
struct Wanted<K: Kind> {
    labels: Labels,
    annotations: Labels,
    deletion_protection: bool,
    spec: K::Spec,
}

/// The metadata that a patch may change.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct UserMetadata {
    labels: Labels,
    annotations: Labels,
    deletion_protection: bool,
}

impl<K: Kind> Wanted<K> {
    fn of(object: &AnyObject) -> Result<Self, ApiError> {
        let typed = Object::<K>::from_any(object)
            .map_err(|e| ApiError::invalid(vec![FieldError::new("spec", e.source.to_string())]))?;
        let m = typed.metadata;
        Ok(Self {
            labels: m.labels,
            annotations: m.annotations,
            deletion_protection: m.deletion_protection,
            spec: typed.spec,
        })
    }

    fn patched(old: &Object<K>, patch: &Value) -> Result<Self, ApiError> {
        let before = serde_json::to_value(old.to_any()).expect("objects are plain data");
        let mut after = before.clone();
        merge_patch(&mut after, patch);
        let mut errors = Vec::new();
        for (field, value) in patch.as_object().into_iter().flatten() {
            let known = matches!(field.as_str(), "metadata" | "spec" | "status");
            if !known && before.get(field) != Some(value) {
                errors.push(FieldError::new(field.as_str(), "can't be changed"));
            }
        }
        for (field, value) in patch.get("metadata").and_then(Value::as_object).into_iter().flatten() {
            let users = matches!(field.as_str(), "labels" | "annotations" | "deletionProtection");
            let same = before["metadata"].get(field).unwrap_or(&Value::Null) == value;
            if !users && !same && field != "revision" {
                errors.push(FieldError::new(format!("metadata.{field}"), "can't be changed"));
            }
        }
        let metadata = UserMetadata::deserialize(&after["metadata"]).unwrap_or_else(|e| {
            errors.push(FieldError::new("metadata", e.to_string()));
            UserMetadata::default()
        });
        errors.extend(validate_labels("metadata.labels", &metadata.labels));
        errors.extend(validate_annotations("metadata.annotations", &metadata.annotations));
        let spec = match (descriptor_parse::<K>())(&after["spec"]) {
            Ok(spec) => serde_json::from_value(spec).ok(),
            Err(more) => {
                errors.extend(more);
                None
            }
        };
        match spec {
            Some(spec) if errors.is_empty() => Ok(Self {
                labels: metadata.labels,
                annotations: metadata.annotations,
                deletion_protection: metadata.deletion_protection,
                spec,
            }),
            _ => Err(ApiError::invalid(errors)),
        }
    }
}

fn descriptor_parse<K: Kind>() -> fn(&Value) -> Result<Value, Vec<FieldError>> {
    KindDescriptor::of::<K>().parse_spec
}

/// Applies a JSON merge patch (RFC 7396).
pub fn merge_patch(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let object = target.as_object_mut().expect("made an object above");
    for (field, value) in patch {
        if value.is_null() {
            object.shift_remove(field);
        } else {
            merge_patch(object.entry(field.clone()).or_insert(Value::Null), value);
        }
    }
}

/// The largest object of most kinds, in bytes of its stored form: a step that makes a dozen instances of one template
/// still fits in a transaction.
const MAX_OBJECT: usize = 64 << 10;

fn check_size<K: Admit>(object: &Object<K>) -> Result<(), ApiError> {
    let size = serde_json::to_vec(&object.to_any()).expect("objects are plain data").len();
    if size > K::LARGEST {
        let detail =
            format!("the object has {size} bytes, at most {} are kept: put data into images or files", K::LARGEST);
        return Err(ApiError::new(Code::TooLarge, detail));
    }
    Ok(())
}

fn create<K: Admit>(step: &mut Step<'_>, intent: &Intent, object: &AnyObject) -> Result<Accepted, ApiError> {
    let wanted = Wanted::<K>::of(object)?;
    let mut metadata = step.new_metadata(intent.target.name.clone(), intent.target.project.clone());
    metadata.organization = intent.target.organization.clone();
    metadata.labels = wanted.labels;
    metadata.annotations = wanted.annotations;
    metadata.deletion_protection = wanted.deletion_protection;
    let mut new = Object::<K>::new(metadata, wanted.spec);
    K::complete(None, &mut new.spec);
    check_size(&new)?;
    if let Some(project) = intent.target.project.as_ref().filter(|_| step.world.part != Part::Global) {
        usage::open(step, project)?;
    }
    K::admit(step, None, &mut new)?;
    step.put(new.clone());
    if K::TOLD {
        let m = &new.metadata;
        step.event(m.project.as_ref(), new.owner_ref(), Severity::Normal, "Created", format!("by {}", intent.actor));
    }
    K::changed(step, &new);
    let any = new.to_any();
    audit::changed::<K>(step, intent, Verb::Create, new.metadata.uid, None, Some(&any.spec))?;
    Ok(Accepted { object: any, created: true, replayed: false })
}

fn update<K: Admit>(
    step: &mut Step<'_>,
    intent: &Intent,
    old: Object<K>,
    mut wanted: Wanted<K>,
) -> Result<Accepted, ApiError> {
    K::complete(Some(&old.spec), &mut wanted.spec);
    let (before, after) = (
        serde_json::to_value(&old.spec).expect("specs are plain data"),
        serde_json::to_value(&wanted.spec).expect("specs are plain data"),
    );
    let moved = K::IMMUTABLE.iter().filter(|field| before.get(*field) != after.get(*field));
    let errors: Vec<_> = moved.map(|f| FieldError::new(format!("spec.{f}"), "can't change after the create")).collect();
    if !errors.is_empty() {
        return Err(ApiError::invalid(errors));
    }
    let mut new = old.clone();
    new.metadata.labels = wanted.labels;
    new.metadata.annotations = wanted.annotations;
    new.metadata.deletion_protection = wanted.deletion_protection;
    new.spec = wanted.spec;
    if new.spec == old.spec && new.metadata == old.metadata {
        return Ok(Accepted { object: current(step, &old), created: false, replayed: false });
    }
    new.metadata.request_id = Some(intent.request_id.clone());
    if new.spec != old.spec {
        new.metadata.generation += 1;
    }
    check_size(&new)?;
    K::admit(step, Some(&old), &mut new)?;
    step.put(new.clone());
    if K::TOLD && new.spec != old.spec {
        let message = format!("generation {} by {}", new.metadata.generation, intent.actor);
        step.event(new.metadata.project.as_ref(), new.owner_ref(), Severity::Normal, "Updated", message);
    }
    K::changed(step, &new);
    let any = new.to_any();
    audit::changed::<K>(step, intent, Verb::Update, new.metadata.uid, Some(&before), Some(&any.spec))?;
    Ok(Accepted { object: any, created: false, replayed: false })
}

/// Carries out an order about a rollout.
fn ordered<K: Admit>(
    step: &mut Step<'_>,
    intent: &Intent,
    old: Object<K>,
    order: RolloutOrder,
) -> Result<Accepted, ApiError> {
    let mut new = old.clone();
    let (verb, message) = K::order(step, &mut new, order)?;
    if new.spec == old.spec && serde_json::to_value(&new.status).ok() == serde_json::to_value(&old.status).ok() {
        return Ok(Accepted { object: current(step, &old), created: false, replayed: false });
    }
    new.metadata.request_id = Some(intent.request_id.clone());
    if new.spec != old.spec {
        new.metadata.generation += 1;
        check_size(&new)?;
        K::admit(step, Some(&old), &mut new)?;
    }
    step.put(new.clone());
    let message = format!("{message} by {}", intent.actor);
    step.event(new.metadata.project.as_ref(), new.owner_ref(), Severity::Normal, verb.reason(), message);
    K::changed(step, &new);
    let before = serde_json::to_value(&old.spec).expect("specs are plain data");
    let any = new.to_any();
    audit::changed::<K>(step, intent, verb, new.metadata.uid, Some(&before), Some(&any.spec))?;
    Ok(Accepted { object: any, created: false, replayed: false })
}

/// An unchanged object with the revision that it stands at.
fn current<K: Stored>(step: &Step<'_>, object: &Object<K>) -> AnyObject {
    let mut any = object.to_any();
    any.metadata.revision = step.committed_revision(object).unwrap_or(0);
    any
}

fn delete<K: Admit>(step: &mut Step<'_>, intent: &Intent, old: Object<K>) -> Result<Accepted, ApiError> {
    if old.metadata.deletion_protection {
        let detail =
            format!("{} {} is protected: set metadata.deletionProtection to false first", K::KIND, intent.target.name);
        return Err(ApiError::new(Code::Conflict, detail));
    }
    K::may_delete(step, &old)?;
    if K::TOLD {
        let m = &old.metadata;
        step.event(m.project.as_ref(), old.owner_ref(), Severity::Normal, "Deleted", format!("by {}", intent.actor));
    }
    let object = K::delete(step, &old);
    let before = serde_json::to_value(&old.spec).expect("specs are plain data");
    audit::changed::<K>(step, intent, Verb::Delete, old.metadata.uid, Some(&before), None)?;
    Ok(Accepted { object, created: false, replayed: false })
}

/// What is particular to a kind when users change it.
pub trait Admit: Stored {
    /// Fills in what was left unsaid and is then as it was, or as it is at first (`old` absent).
    fn complete(_old: Option<&Self::Spec>, _new: &mut Self::Spec) {}

    /// Checks a create (`old` absent) or update against the world, and fills in what is derived.
    fn admit(_step: &mut Step<'_>, _old: Option<&Object<Self>>, _new: &mut Object<Self>) -> Result<(), ApiError> {
        Ok(())
    }

    /// Marks what has to be looked at after a change.
    fn changed(_step: &mut Step<'_>, _new: &Object<Self>) {}

    fn may_delete(_step: &Step<'_>, _old: &Object<Self>) -> Result<(), ApiError> {
        Ok(())
    }

    /// Deletes it: at once if nothing is to be torn down. Answers the tombstone.
    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        erased(step, old)
    }

    /// Changes an object as an order about its rollout says. Answers what was done, for the log and in a few words.
    fn order(_step: &Step<'_>, _new: &mut Object<Self>, _order: RolloutOrder) -> Result<(Verb, String), ApiError> {
        Err(ApiError::new(Code::NotFound, format!("{} have no rollouts", Self::PLURAL)))
    }

    /// Whether its changes are events that people read.
    const TOLD: bool = true;

    /// Bytes of an object as it is brought.
    const LARGEST: usize = MAX_OBJECT;
}

/// Erases what needs no teardown. Answers the tombstone.
fn erased<K: Stored>(step: &mut Step<'_>, old: &Object<K>) -> AnyObject {
    step.erase(old);
    let mut any = old.to_any();
    any.metadata.deleting = Some(step.now);
    any
}

/// Buries a kind whose teardown takes time.
fn bury<K: Stored>(step: &mut Step<'_>, old: &Object<K>) -> AnyObject {
    let buried = step.bury(old);
    step.mark(Dirty::Buried(K::PLURAL, buried.metadata.uid));
    buried.to_any()
}

impl Admit for Organization {
    fn admit(step: &mut Step<'_>, _: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        // Its people and grants are found by its name, so the name waits for the last of them.
        if step.world.organizations.buried.values().any(|o| o.metadata.name == new.metadata.name) {
            let detail = format!("organization {} is still being torn down: try again soon", new.metadata.name);
            return Err(ApiError::new(Code::Conflict, detail));
        }
        Ok(())
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        bury(step, old)
    }
}

impl Admit for Project {
    fn complete(old: Option<&ProjectSpec>, new: &mut ProjectSpec) {
        new.complete(old);
    }

    fn admit(step: &mut Step<'_>, _: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        // What a project owns is found by the project's name, so the name waits for the last of it.
        if step.world.projects.buried.values().any(|p| p.metadata.name == new.metadata.name) {
            let detail = format!("project {} is still being torn down: try again soon", new.metadata.name);
            return Err(ApiError::new(Code::Conflict, detail));
        }
        if step.world.organizations.get(None, &new.spec.organization).is_none() {
            let message = format!("there is no organization {}", new.spec.organization);
            return Err(ApiError::invalid(vec![FieldError::new("spec.organization", message)]));
        }
        Ok(())
    }

    /// Where one group holds everything; a region of a fleet hears of it by the global group's log.
    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        step.mark(Dirty::Usage(new.metadata.name.clone()));
    }

    fn may_delete(_: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        if old.metadata.name == SYSTEM_PROJECT {
            return Err(ApiError::new(Code::Conflict, "the project `system` belongs to the cloud itself"));
        }
        Ok(())
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        bury(step, old)
    }
}

impl Admit for User {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::federation::check_identity(step, old, new)?;
        if old.is_some() && new.spec.disabled {
            let principal = rules::people::user(new);
            rules::people::refuse_lock_out(step, new.metadata.organization.as_ref(), Grant::RemoveMember(principal))?;
        }
        Ok(())
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        let principal = rules::people::user(old);
        rules::people::refuse_lock_out(step, old.metadata.organization.as_ref(), Grant::RemoveMember(principal))
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        rules::people::sign_out(step, old.metadata.organization.as_ref(), HolderKind::User, &old.metadata.name);
        rules::federation::depart(step, old);
        erased(step, old)
    }
}

impl Admit for ServiceAccount {
    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        let organization = old.metadata.organization.as_ref();
        rules::people::sign_out(step, organization, HolderKind::ServiceAccount, &old.metadata.name);
        erased(step, old)
    }
}

impl Admit for Group {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::people::check_members(step, new)?;
        old.map_or(Ok(()), |old| rules::people::refuse_group_lock_out(step, old, Some(new)))
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        rules::people::refuse_group_lock_out(step, old, None)
    }
}

impl Admit for RoleBinding {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::people::check_binding(step, old, new)
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        rules::people::refuse_unbinding(step, old)
    }
}

impl Admit for Policy {
    fn admit(step: &mut Step<'_>, _: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::people::check_policy(step, new)
    }
}

impl Admit for Token {
    fn admit(step: &mut Step<'_>, _: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::people::check_token(step, new)
    }
}

impl Admit for AccessKey {
    fn admit(step: &mut Step<'_>, _: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::people::check_access_key(step, new)
    }
}

impl Admit for Session {
    const TOLD: bool = false;

    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::people::check_session(step, old, new)
    }
}

impl Admit for Credential {
    const TOLD: bool = false;
}

impl Admit for IdentityProvider {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::federation::check_provider(step, old, new)
    }
}

impl Admit for Departure {
    const TOLD: bool = false;
}

impl Admit for SigningKey {
    const TOLD: bool = false;
}

impl Admit for Region {
    fn may_delete(_: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        let ready = old.status.conditions.iter().find(|c| c.kind == "Ready");
        if ready.is_some_and(|c| c.status == ConditionStatus::True) {
            let detail = "this region's servers report and would register it again: stop them first";
            return Err(ApiError::new(Code::Conflict, detail));
        }
        Ok(())
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        // Whatever waited for it waits no longer.
        let any = erased(step, old);
        rules::fleet::everywhere(step);
        any
    }
}

impl Admit for Zone {
    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        refuse_with_hosts(step, "zone", &old.metadata.name, |h| &h.spec.zone)
    }
}

impl Admit for Cell {
    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        refuse_with_hosts(step, "cell", &old.metadata.name, |h| &h.spec.cell)
    }
}

fn refuse_with_hosts(
    step: &Step<'_>,
    what: &str,
    name: &Name,
    part: impl Fn(&Object<Host>) -> &Name,
) -> Result<(), ApiError> {
    let users: Vec<_> = step.world.hosts.live.values().filter(|h| part(h) == name).collect();
    match users.len() {
        0 => Ok(()),
        n => {
            let names: Vec<_> = users.iter().take(5).map(|h| h.metadata.name.as_str()).collect();
            let detail = format!("{what} {name} has {n} hosts ({}): delete them first", names.join(", "));
            Err(ApiError::new(Code::Conflict, detail))
        }
    }
}

impl Admit for Host {
    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        rules::host::decided(step, &new.metadata.name);
    }

    fn may_delete(_: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        if matches!(old.status.state, HostState::Ready | HostState::Joining) {
            let detail = "this host's agent is alive and would register it again: stop the agent first";
            return Err(ApiError::new(Code::Conflict, detail));
        }
        Ok(())
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        rules::host::forget(step, old)
    }
}

impl Admit for Image {
    fn admit(_: &mut Step<'_>, _: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        let sum = new.spec.blobs.iter().fold(0u64, |sum, b| sum.saturating_add(b.size));
        new.status.size = Bytes(sum);
        Ok(())
    }

    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        let project = new.metadata.project.as_ref().expect("images have a project");
        let users: Vec<_> = step
            .world
            .apps
            .within(project)
            .filter(|a| a.spec.parts().names_image(&new.metadata.name))
            .map(|a| (a.metadata.project.clone(), a.metadata.name.clone()))
            .collect();
        for place in users {
            step.mark(Dirty::App(place));
        }
        let jobs = rules::job::waiting_for(step.world, project, |t| t.parts().names_image(&new.metadata.name));
        jobs.into_iter().for_each(|dirty| step.mark(dirty));
    }
}

impl Admit for Secret {
    const LARGEST: usize = 256 << 10;

    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::secret::admit(step, old, new)
    }

    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        rules::secret::changed(step, new);
    }

    fn may_delete(step: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        rules::secret::refuse_used(step, old)
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        rules::secret::forget_versions(step, old);
        erased(step, old)
    }
}

impl Admit for App {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        old.map_or(Ok(()), rules::child::refuse_users)?;
        if step.world.part == Part::Global {
            let known = |name: &Name| step.world.regions.get(None, name).is_some();
            let before: &[Name] = old.map_or(&[], |old| &old.spec.regions);
            let unknown = |(_, name): &(usize, &Name)| !known(name) && !before.contains(*name);
            let unknown = new.spec.regions.iter().enumerate().filter(unknown);
            let field = |i: usize| format!("spec.regions[{i}]");
            let errors = unknown.map(|(i, name)| FieldError::new(field(i), format!("there is no region {name}")));
            let errors: Vec<_> = errors.collect();
            if !errors.is_empty() {
                return Err(ApiError::invalid(errors));
            }
        } else if !new.spec.regions.is_empty() {
            let message = "only an app of the region `global` has regions: this one runs where it is";
            return Err(ApiError::invalid(vec![FieldError::new("spec.regions", message)]));
        }
        rules::order::check_pin(step.world, old, new)?;
        let own = |(name, with): (&Name, bool)| with && *name == new.metadata.name;
        if new.spec.constraints.company().any(own) {
            let message = "an app is with itself wherever it is: name another one";
            return Err(ApiError::invalid(vec![FieldError::new("spec.constraints", message)]));
        }
        let project = new.metadata.project.clone().expect("apps have a project");
        recharge(step, &project, old.map_or([0; 3], charge_app), charge_app(new))
    }

    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        step.mark(Dirty::App((new.metadata.project.clone(), new.metadata.name.clone())));
    }

    fn may_delete(_: &Step<'_>, old: &Object<Self>) -> Result<(), ApiError> {
        rules::child::refuse_users(old)
    }

    fn order(step: &Step<'_>, new: &mut Object<Self>, order: RolloutOrder) -> Result<(Verb, String), ApiError> {
        rules::order::apply(step.world, new, order)
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        rules::app::bury(step, old)
    }
}

impl Admit for AppRevision {}

impl Admit for Job {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        let project = new.metadata.project.clone().expect("jobs have a project");
        if old.is_none() {
            rules::job::refuse_more(step.world, &project)?;
            rules::cron::claim(step, new);
        }
        recharge(step, &project, old.map_or([0; 3], rules::job::charge), rules::job::charge(new))
    }

    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        step.mark(Dirty::Job((new.metadata.project.clone(), new.metadata.name.clone())));
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        rules::job::bury(step, old)
    }
}

impl Admit for CronJob {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::cron::admit(step, old, new)
    }

    fn changed(step: &mut Step<'_>, new: &Object<Self>) {
        step.mark(Dirty::Cron((new.metadata.project.clone(), new.metadata.name.clone())));
    }

    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        rules::cron::bury(step, old)
    }
}

impl Admit for Instance {
    fn delete(step: &mut Step<'_>, old: &Object<Self>) -> AnyObject {
        rules::instance::bury(step, old, "deleted by a user").to_any()
    }
}

impl Admit for Route {
    fn admit(step: &mut Step<'_>, _: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        let place = (new.metadata.project.clone(), new.metadata.name.clone());
        let same = |r: &&Object<Route>| r.spec.host == new.spec.host && r.spec.path == new.spec.path;
        let taken = step.world.routes.live.iter().any(|(p, r)| *p != place && same(&r));
        let global = step.world.global.as_ref().is_some_and(|g| g.routes.live.values().any(|r| same(&r)));
        match taken || global {
            false => Ok(()),
            true => {
                let detail = format!("another route answers {}{} already", new.spec.host, new.spec.path);
                Err(ApiError::new(Code::Conflict, detail))
            }
        }
    }
}

impl Admit for Webhook {
    fn admit(step: &mut Step<'_>, old: Option<&Object<Self>>, new: &mut Object<Self>) -> Result<(), ApiError> {
        rules::delivery::admit(step, old, new)
    }
}

impl Admit for Delivery {
    const TOLD: bool = false;
}

impl Admit for Event {}

impl Admit for Usage {}
