//! What is told to others' servers: the events that webhooks want, and the end of changes whose request brought a callback.
//!
//! An event that a webhook wants is marked as untold in its own row, and so in the transaction of what it tells; the next
//! step makes deliveries of it and takes the mark away. A callback's delivery is made with its change, and waits until
//! the object has settled. So nothing is lost with a server, and a new leader goes on where the last one ended.
//!
//! The leader's server sends ([`Telling::Attempted`] brings what came of it); when it is tried again is decided here. A
//! project has so many deliveries at most; when there are more, the oldest go, and its events say so.

use std::time::Duration;

use nexus_model::kind::*;
use nexus_model::object::{ConditionStatus, is_settled, set_condition};
use nexus_model::{AnyObject, ApiError, Code, FieldError, Name, Object, OwnerRef};
use serde_json::{Map, Value, json};

use crate::audit;
use crate::intent::{Accepted, Attempt, Callback, Intent, Telling};
use crate::step::{Dirty, Step};
use crate::world::{Place, Stored, World, for_kind};

/// Deliveries of a project in one region; the oldest go first.
pub const PER_PROJECT: usize = 1_000;
/// Of those, the ones that were taken: for people to look at.
pub const DELIVERED: usize = 50;
/// A change that has not come to its end by then is told of as it is.
pub const PATIENCE: Duration = Duration::from_secs(24 * 3600);
/// How long dead letters are kept.
pub const KEEP: Duration = Duration::from_secs(7 * 24 * 3600);
/// Between the first two tries; twice as long each time …
const FIRST: Duration = Duration::from_secs(2);
/// … up to this.
const LONGEST: Duration = Duration::from_secs(3600);
/// Rows that housekeeping changes in one step.
const AT_ONCE: usize = 50;
const MAX_MESSAGE: usize = 300;

/// How long to wait after so many tries that failed: between half and the whole of a time that doubles, so that receivers
/// which were down are not met by all at once. `chance` is in `0..=1000`.
pub fn backoff(attempts: u32, chance: u64) -> Duration {
    let whole = FIRST.saturating_mul(1 << attempts.saturating_sub(1).min(16)).min(LONGEST);
    let half = whole / 2;
    half + half * u32::try_from(chance.min(1000)).unwrap_or(1000) / 1000
}

/// Whether some webhook of a project wants to hear of an event.
pub(crate) fn is_wanted(world: &World, project: &Name, event: &EventSpec) -> bool {
    // What is told about telling would have no end.
    let own = [Webhook::KIND, Delivery::KIND].contains(&event.regarding.kind.as_str());
    !own && !world.webhooks.live.is_empty() && world.webhooks.within(project).any(|hook| hook.spec.wants(event))
}

/// Marks what a leader before may have left undone.
pub(crate) fn everything(step: &mut Step<'_>) {
    let events: Vec<_> = step.world.untold.iter().cloned().map(Dirty::Event).collect();
    let waiting = step.world.outbox.all_waiting().into_iter().map(Dirty::Delivery);
    step.dirty.extend(events.into_iter().chain(waiting));
}

pub fn admit(step: &mut Step<'_>, old: Option<&Object<Webhook>>, new: &mut Object<Webhook>) -> Result<(), ApiError> {
    let project = new.metadata.project.clone().expect("webhooks have a project");
    if old.is_none() && step.world.webhooks.within(&project).count() >= MAX_WEBHOOKS {
        let detail = format!("project {project} has {MAX_WEBHOOKS} webhooks here, which is the most: delete some");
        return Err(ApiError::new(Code::QuotaExceeded, detail));
    }
    if old.is_none_or(|old| old.spec.secret != new.spec.secret) {
        refuse_missing_secret(step.world, &project, &new.spec.secret, "spec.secret.name")?;
    }
    Ok(())
}

fn refuse_missing_secret(world: &World, project: &Name, secret: &SigningSecret, field: &str) -> Result<(), ApiError> {
    let SigningSecret { name, key } = secret;
    let message = match world.secret(project, name) {
        Some(found) if found.spec.keys.contains(key) => return Ok(()),
        Some(_) => format!("secret {name} has no key {key}: set it with `nexus secret set {name} {key}`"),
        None => format!("there is no secret {name}: set it with `nexus secret set {name} {key}`"),
    };
    Err(ApiError::invalid(vec![FieldError::new(field, message)]))
}

/// The webhooks that name a secret.
pub fn users<'a>(world: &'a World, project: &'a Name, secret: &'a Name) -> impl Iterator<Item = &'a Object<Webhook>> {
    world.webhooks.within(project).filter(move |hook| hook.spec.secret.name == *secret)
}

fn subject(regarding: &OwnerRef) -> String {
    let plural = stored(&regarding.kind).map_or("objects", |d| d.plural);
    format!("{plural}/{}", regarding.name)
}

fn object_of(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Makes deliveries of an event, for each webhook that wants it.
pub fn fan_out(step: &mut Step<'_>, place: &Place) {
    let (Some(mut event), Some(project)) = (step.world.events.live.get(place).cloned(), &place.0) else { return };
    if !event.spec.untold {
        return;
    }
    event.spec.untold = false;
    let spec = event.spec.clone();
    step.put(event);
    let hooks = step.world.webhooks.within(project).filter(|hook| hook.spec.wants(&spec));
    let hooks: Vec<_> = hooks.map(|hook| (hook.owner_ref(), hook.spec.max_attempts)).collect();
    let mut data = object_of(serde_json::to_value(&spec).expect("specs are plain data"));
    data.insert("project".to_owned(), project.as_str().into());
    data.insert("region".to_owned(), step.region().as_str().into());
    for (hook, max_attempts) in hooks {
        let delivery = DeliverySpec {
            webhook: Some(hook.name.clone()),
            kind: DeliverySpec::type_of(&spec.regarding.kind, &spec.reason),
            subject: subject(&spec.regarding),
            regarding: spec.regarding.clone(),
            time: spec.last,
            data: data.clone(),
            max_attempts,
            ..DeliverySpec::default()
        };
        post(step, project, delivery, Some(hook));
    }
}

/// Puts a new delivery on its way, or has it wait.
fn post(step: &mut Step<'_>, project: &Name, spec: DeliverySpec, owner: Option<OwnerRef>) -> Object<Delivery> {
    while step.world.outbox.counts(project).all >= PER_PROJECT {
        drop_oldest(step, project);
    }
    let name = step.world.outbox.next_name(step.now);
    let mut metadata = step.new_metadata(name, Some(project.clone()));
    metadata.owner = owner;
    let waits = spec.awaits.is_some();
    let mut delivery = Object::<Delivery>::new(metadata, spec);
    if !waits {
        delivery.status.phase = DeliveryPhase::Pending;
        delivery.status.next = Some(step.now);
    }
    step.put(delivery.clone());
    delivery
}

/// Makes room: what was taken goes first, then what was given up, then what waits longest.
fn drop_oldest(step: &mut Step<'_>, project: &Name) {
    let rank = |d: &Object<Delivery>| match d.status.phase {
        DeliveryPhase::Delivered => 0,
        DeliveryPhase::Dead => 1,
        DeliveryPhase::Pending | DeliveryPhase::Waiting => 2,
    };
    let Some(oldest) = step.world.deliveries.within(project).min_by_key(|d| (rank(d), &d.metadata.name)).cloned()
    else {
        return;
    };
    step.erase(&oldest);
    if oldest.status.phase == DeliveryPhase::Delivered {
        return;
    }
    let message = format!("the project has {PER_PROJECT} deliveries, which is the most: the oldest are dropped");
    if let Some(mut hook) = hook_of(step.world, &oldest) {
        hook.status.dropped += 1;
        step.event(Some(project), hook.owner_ref(), Severity::Warning, "DeliveryDropped", message);
        step.put(hook);
    } else {
        step.event(Some(project), oldest.owner_ref(), Severity::Warning, "DeliveryDropped", message);
    }
}

/// The webhook that a delivery is for, if it is there.
fn hook_of(world: &World, delivery: &Object<Delivery>) -> Option<Object<Webhook>> {
    let (hook, owner) = (delivery.spec.webhook.as_ref()?, delivery.metadata.owner.as_ref()?);
    let found = world.webhooks.get(delivery.metadata.project.as_ref(), hook)?;
    (found.metadata.uid == owner.uid).then(|| found.clone())
}

/// Has the end of an accepted change told, if its request asked for that.
pub(crate) fn await_end(step: &mut Step<'_>, intent: &Intent, accepted: &Accepted) -> Result<(), ApiError> {
    let Some(Callback { url, secret }) = &intent.by.callback else { return Ok(()) };
    let Some(project) = &intent.target.project else {
        let detail =
            "a callback is signed with a secret of a project, and this is in none: use `Prefer: wait` or a watch";
        return Err(ApiError::new(Code::BadRequest, detail));
    };
    refuse_missing_secret(step.world, project, secret, "Callback-Secret")?;
    if intent.dry_run {
        return Ok(());
    }
    let m = &accepted.object.metadata;
    let regarding = OwnerRef { kind: accepted.object.kind.clone(), name: m.name.clone(), uid: m.uid };
    let deleted = m.deleting.is_some();
    let spec = DeliverySpec {
        url: Some(url.clone()),
        secret: Some(secret.clone()),
        kind: DeliverySpec::type_of(&regarding.kind, "Settled"),
        subject: subject(&regarding),
        regarding,
        time: step.now,
        data: object_of(json!({"requestId": intent.request_id})),
        awaits: Some(Awaited { plural: intent.target.plural.clone(), generation: m.generation, deleted }),
        ..DeliverySpec::default()
    };
    let delivery = post(step, project, spec, None);
    step.mark(Dirty::Delivery((Some(project.clone()), delivery.metadata.name)));
    Ok(())
}

/// How far a change is that is waited for.
enum Look {
    NotYet,
    /// The object, unless nothing is left of it.
    Settled(Option<Box<AnyObject>>),
    /// The object is not there any more, though nobody asked for that.
    Gone,
}

fn look<K: Stored>(world: &World, project: &Name, regarding: &OwnerRef, deleted: bool) -> Look {
    let table = K::table(world);
    if deleted {
        let left = table.buried.contains_key(&regarding.uid);
        return if left { Look::NotYet } else { Look::Settled(None) };
    }
    match table.get(Some(project), &regarding.name).filter(|o| o.metadata.uid == regarding.uid) {
        None => Look::Gone,
        Some(object) => {
            let object = object.to_any();
            let settled = is_settled(&object.status, object.metadata.generation);
            if settled { Look::Settled(Some(Box::new(object))) } else { Look::NotYet }
        }
    }
}

/// Looks whether what a callback waits for has come about, and puts it on its way then.
pub fn reconcile(step: &mut Step<'_>, place: &Place) {
    let (Some(delivery), Some(project)) = (step.world.deliveries.live.get(place).cloned(), &place.0) else { return };
    let Some(awaits) = delivery.spec.awaits.clone().filter(|_| delivery.status.phase == DeliveryPhase::Waiting) else {
        return;
    };
    let regarding = &delivery.spec.regarding;
    let found = for_kind!(&awaits.plural, K => look::<K>(step.world, project, regarding, awaits.deleted));
    match found.unwrap_or(Look::Gone) {
        Look::NotYet => {}
        Look::Settled(object) => release(step, delivery, "Settled", object),
        Look::Gone => release(step, delivery, "Gone", None),
    }
}

fn release(step: &mut Step<'_>, mut delivery: Object<Delivery>, outcome: &str, object: Option<Box<AnyObject>>) {
    let spec = &mut delivery.spec;
    spec.kind = DeliverySpec::type_of(&spec.regarding.kind, outcome);
    spec.time = step.now;
    spec.data.insert("outcome".to_owned(), outcome.into());
    spec.data.insert("regarding".to_owned(), json!(spec.regarding));
    if let Some(object) = object {
        // The spec stays here: it may be long, and whoever asked for the change knows it.
        let m = &object.metadata;
        let told = json!({
            "kind": object.kind, "name": m.name, "project": m.project, "region": m.region, "uid": m.uid,
            "generation": m.generation, "labels": m.labels, "status": object.status,
        });
        spec.data.insert("object".to_owned(), told);
    }
    delivery.status.phase = DeliveryPhase::Pending;
    delivery.status.next = Some(step.now);
    step.put(delivery);
}

/// Carries out what is not a change of an object's spec.
pub(crate) fn carry_out(step: &mut Step<'_>, intent: &Intent, deed: &Telling) -> Result<Accepted, ApiError> {
    let (project, name) = (intent.target.project.as_ref(), &intent.target.name);
    let object = match deed {
        Telling::Test => {
            let hook = step.world.webhooks.get(project, name).cloned();
            let hook = hook.ok_or_else(|| ApiError::not_found(Webhook::KIND, name.as_str()))?;
            test(step, intent, &hook)?
        }
        Telling::Resend | Telling::Attempted(_) => {
            let delivery = step.world.deliveries.get(project, name).cloned();
            let delivery = delivery.ok_or_else(|| ApiError::not_found(Delivery::KIND, name.as_str()))?;
            match deed {
                Telling::Attempted(attempt) => attempted(step, delivery, attempt),
                _ => resend(step, intent, delivery)?,
            }
        }
    };
    Ok(Accepted { object: object.to_any(), created: false, replayed: false })
}

fn test(step: &mut Step<'_>, intent: &Intent, hook: &Object<Webhook>) -> Result<Object<Delivery>, ApiError> {
    let (name, regarding) = (&hook.metadata.name, hook.owner_ref());
    if !hook.spec.enabled {
        let detail = format!("webhook {name} is disabled: enable it first");
        return Err(ApiError::new(Code::Conflict, detail));
    }
    let spec = DeliverySpec {
        webhook: Some(name.clone()),
        kind: DeliverySpec::type_of(Webhook::KIND, "Test"),
        subject: subject(&regarding),
        regarding: regarding.clone(),
        time: step.now,
        data: object_of(json!({"message": "this webhook works", "by": intent.actor, "requestId": intent.request_id})),
        max_attempts: hook.spec.max_attempts,
        ..DeliverySpec::default()
    };
    let project = hook.metadata.project.as_ref().expect("webhooks have a project");
    let delivery = post(step, project, spec, Some(regarding));
    audit::acted::<Webhook>(step, intent, "test", hook.metadata.uid)?;
    Ok(delivery)
}

fn resend(step: &mut Step<'_>, intent: &Intent, mut delivery: Object<Delivery>) -> Result<Object<Delivery>, ApiError> {
    if delivery.status.phase == DeliveryPhase::Waiting {
        let detail = "what this delivery tells of has not come about yet: there is nothing to send";
        return Err(ApiError::new(Code::Conflict, detail));
    }
    delivery.status.phase = DeliveryPhase::Pending;
    delivery.status.attempts = 0;
    delivery.status.next = Some(step.now);
    step.put(delivery.clone());
    audit::acted::<Delivery>(step, intent, "resend", delivery.metadata.uid)?;
    Ok(delivery)
}

/// Takes in what came of a try.
fn attempted(step: &mut Step<'_>, mut delivery: Object<Delivery>, attempt: &Attempt) -> Object<Delivery> {
    let status = &mut delivery.status;
    // What is heard a second time, or of a try that something else overtook, counts no more.
    if status.phase != DeliveryPhase::Pending || attempt.number != status.attempts + 1 {
        return delivery;
    }
    if attempt.obsolete {
        step.erase(&delivery);
        return delivery;
    }
    status.attempts = attempt.number;
    status.last = Some(step.now);
    status.message = attempt.message.chars().take(MAX_MESSAGE).collect();
    status.next = None;
    let given_up = !attempt.taken && (attempt.fatal || status.attempts >= delivery.spec.max_attempts);
    status.phase = match attempt.taken {
        true => DeliveryPhase::Delivered,
        false if given_up => DeliveryPhase::Dead,
        false => {
            let wait = backoff(status.attempts, nexus_env::RngExt::below(step.rng(), 1001));
            status.next = Some(step.now.plus(wait));
            DeliveryPhase::Pending
        }
    };
    step.put(delivery.clone());
    let project = delivery.metadata.project.clone().expect("deliveries have a project");
    if attempt.taken && step.world.outbox.counts(&project).delivered > DELIVERED {
        let delivered = |d: &&Object<Delivery>| d.status.phase == DeliveryPhase::Delivered;
        let oldest = step.world.deliveries.within(&project).find(delivered).cloned();
        if let Some(oldest) = oldest {
            step.erase(&oldest);
        }
    }
    let hook = hook_of(step.world, &delivery);
    if given_up {
        let regarding = hook.as_ref().map_or_else(|| delivery.owner_ref(), Object::owner_ref);
        let what = format!("{} of {}", delivery.spec.kind, delivery.spec.subject);
        let message = format!("{what} was not taken: {}", delivery.status.message);
        step.event(Some(&project), regarding, Severity::Warning, "DeliveryGivenUp", message);
    }
    if let Some(mut hook) = hook {
        let (is, reason) = match attempt.taken {
            true => (ConditionStatus::True, "Taken"),
            false => (ConditionStatus::False, "Failing"),
        };
        // Written only when it turns: a webhook is no counter.
        if hook.status.conditions.first().is_none_or(|c| c.status != is) {
            let message = &delivery.status.message;
            set_condition(&mut hook.status.conditions, "Delivering", is, reason, message, step.now);
            step.put(hook);
        }
    }
    delivery
}

/// Ends waits that took too long, and forgets what is old. Called now and then.
pub(crate) fn forget_old(step: &mut Step<'_>) {
    let now = step.now;
    let over = |d: &&Object<Delivery>| match d.status.phase {
        DeliveryPhase::Waiting => now.since(d.metadata.created) > PATIENCE,
        DeliveryPhase::Pending => false,
        DeliveryPhase::Delivered | DeliveryPhase::Dead => now.since(d.metadata.created) > KEEP,
    };
    let old: Vec<_> = step.world.deliveries.live.values().filter(over).take(AT_ONCE).cloned().collect();
    for delivery in old {
        match delivery.status.phase {
            DeliveryPhase::Waiting => release(step, delivery, "Unsettled", None),
            _ => step.erase(&delivery),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_ever_further_apart_and_never_further_than_an_hour() {
        assert_eq!((backoff(1, 0), backoff(1, 1000)), (Duration::from_secs(1), Duration::from_secs(2)));
        assert_eq!((backoff(4, 0), backoff(4, 1000)), (Duration::from_secs(8), Duration::from_secs(16)));
        for attempts in 1..40 {
            let (least, most) = (backoff(attempts, 0), backoff(attempts, 1000));
            assert!(least <= most && most <= LONGEST && least >= most / 2, "{attempts}");
            assert!(backoff(attempts, 500) <= backoff(attempts + 1, 500));
        }
        assert_eq!(backoff(u32::MAX, u64::MAX), LONGEST);
        let all: Duration = (1..USUAL_ATTEMPTS).map(|n| backoff(n, 1000)).sum();
        assert!(all < Duration::from_secs(4 * 3600), "{all:?}");
    }
}
