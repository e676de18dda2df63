//! What users order while an app's rollout runs. Pause, resume and promote are wishes in its status that the reconciler follows;
//! an undo writes the older template into the spec, as its user could have done by hand, and pins the image's content where
//! the image's name stands for another by now.

use nexus_model::kind::*;
use nexus_model::{ApiError, Code, FieldError, Object};

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
    let image = world.fleet().images.get(app.metadata.project.as_ref(), &kept.template.image);
    let moved = image.is_none_or(|i| i.spec.digest != kept.image_digest);
    let before = app.spec.clone();
    app.spec = before.clone().with_template(kept.template);
    app.spec.image_digest = moved.then_some(kept.image_digest);
    if app.spec != before {
        let orders = &mut app.status.rollout.get_or_insert_default().orders;
        (orders.paused, orders.undone) = (false, orders.undone + 1);
    }
    Ok((Verb::Undo, format!("back to revision {}", kept.revision)))
}

/// Refuses to pin content that is not the image's, and that of no revision of the app: it may be somebody else's.
pub fn check_pin(world: &World, old: Option<&Object<App>>, new: &Object<App>) -> Result<(), ApiError> {
    let Some(digest) = new.spec.image_digest else { return Ok(()) };
    let image = world.fleet().images.get(new.metadata.project.as_ref(), &new.spec.image);
    let kept = |app: &Object<App>| history::of(world, app.metadata.uid).any(|r| r.spec.image_digest == digest);
    if image.is_some_and(|i| i.spec.digest == digest) || old.is_some_and(kept) {
        return Ok(());
    }
    let message = "neither the image's content nor that of a revision that is kept: leave it out to run what the image's name \
                   stands for";
    Err(ApiError::invalid(vec![FieldError::new("spec.imageDigest", message)]))
}
