//! What users order while an app's rollout runs. Pause, resume and promote are wishes in its status that the reconciler follows;
//! an undo writes the older template into the spec, as its user could have done by hand, and pins the image's content where
//! the image's name stands for another by now.

use nexus_model::kind::*;
use nexus_model::{ApiError, Code, Digest, FieldError, Name, Object};

use crate::audit::Verb;
use crate::intent::RolloutOrder;
use crate::rules::{child, history};
use crate::world::World;

/// Changes an app as an order says. Answers what was done, for the log and in a few words.
pub fn apply(world: &World, app: &mut Object<App>, order: RolloutOrder) -> Result<(Verb, String), ApiError> {
    child::refuse_users(app)?;
    if let RolloutOrder::Undo { to } = order {
        return undo(world, app, to);
    }
    let status = app.status.rollout.clone().unwrap_or_default();
    // A global app's regions know for themselves how far they are.
    let idle = app.status.regions.is_empty() && status.phase == RolloutPhase::Complete;
    let mut orders = status.orders;
    let done = match order {
        RolloutOrder::Pause => {
            orders.paused = true;
            (Verb::Pause, "paused")
        }
        RolloutOrder::Promote if idle => {
            let detail = format!("no rollout of {} is under way: see `nexus rollout status {0}`", app.metadata.name);
            return Err(ApiError::new(Code::Conflict, detail));
        }
        RolloutOrder::Promote if status.failed => {
            let detail = "this rollout has failed: resume it to try it again, or change the app";
            return Err(ApiError::new(Code::Conflict, detail));
        }
        RolloutOrder::Promote => {
            (orders.paused, orders.promoted) = (false, orders.promoted + 1);
            (Verb::Promote, "promoted")
        }
        // Nothing to go on with: the same order again must not bring a later step on.
        RolloutOrder::Resume if idle && !orders.paused => (Verb::Resume, "resumed"),
        RolloutOrder::Resume => {
            // After a pause the step that was held up goes on; it is not skipped.
            if !std::mem::take(&mut orders.paused) {
                orders.resumed += 1;
            }
            (Verb::Resume, "resumed")
        }
        RolloutOrder::Undo { .. } => (Verb::Undo, "undone"),
    };
    if orders != status.orders {
        app.status.rollout.get_or_insert_default().orders = orders;
    }
    Ok((done.0, done.1.to_owned()))
}

fn undo(world: &World, app: &mut Object<App>, to: Option<u64>) -> Result<(Verb, String), ApiError> {
    let (uid, name) = (app.metadata.uid, app.metadata.name.clone());
    let status = app.status.rollout.as_ref();
    let newest = status.map_or(0, |s| s.revision);
    let kept = match to {
        Some(number) => history::numbered(world, uid, number),
        // What served before a rollout that runs or has failed, else the one before the newest.
        None => {
            let stable = status.filter(|s| s.phase != RolloutPhase::Complete && s.stable_revision != 0);
            let stable = stable.and_then(|s| history::by_hash(world, uid, &s.stable_hash));
            stable.or_else(|| history::of(world, uid).rev().find(|r| r.spec.revision < newest))
        }
    };
    let Some(kept) = kept.map(|r| r.spec.clone()) else {
        return Err(match to {
            Some(number) => {
                let detail = format!("app {name} has no revision {number}: see `nexus rollout history {name}`");
                ApiError::new(Code::NotFound, detail)
            }
            None => {
                let detail = format!("app {name} has no earlier revision: see `nexus rollout history {name}`");
                ApiError::new(Code::Conflict, detail)
            }
        });
    };
    let images = &world.fleet().images;
    let project = app.metadata.project.as_ref();
    let moved = |name: &Name, digest: Digest| images.get(project, name).is_none_or(|i| i.spec.digest != digest);
    let pinned = moved(&kept.template.image, kept.image_digest).then_some(kept.image_digest);
    let parts = kept.part_digests.into_iter().filter(|(name, digest)| moved(name, *digest)).collect();
    let before = app.spec.clone();
    app.spec = before.clone().with_template(kept.template);
    (app.spec.image_digest, app.spec.part_digests) = (pinned, parts);
    if app.spec != before {
        let orders = &mut app.status.rollout.get_or_insert_default().orders;
        (orders.paused, orders.undone) = (false, orders.undone + 1);
    }
    Ok((Verb::Undo, format!("back to revision {}", kept.revision)))
}

/// Refuses to pin content that is not the image's, and that of no revision of the app: it may be somebody else's.
pub fn check_pin(world: &World, old: Option<&Object<App>>, new: &Object<App>) -> Result<(), ApiError> {
    let content = |name: &Name| Some(world.fleet().images.get(new.metadata.project.as_ref(), name)?.spec.digest);
    let kept = || old.into_iter().flat_map(|app| history::of(world, app.metadata.uid)).map(|r| &r.spec);
    let mut faults = Vec::new();
    if let Some(digest) = new.spec.image_digest
        && content(&new.spec.image) != Some(digest)
        && !kept().any(|r| r.image_digest == digest)
    {
        faults.push("spec.imageDigest".to_owned());
    }
    for (name, digest) in &new.spec.part_digests {
        if content(name) != Some(*digest) && !kept().any(|r| r.part_digests.get(name) == Some(digest)) {
            faults.push(format!("spec.partDigests.{name}"));
        }
    }
    if faults.is_empty() {
        return Ok(());
    }
    let message = "neither the image's content nor that of a revision that is kept: leave it out to run what the image's name \
                   stands for";
    Err(ApiError::invalid(faults.into_iter().map(|field| FieldError::new(field, message)).collect()))
}
