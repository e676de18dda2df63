//! Keeps an app at its replicas: makes instances of the newest template, retires old ones as new ones become ready,
//! and says in its status how far it is.

use std::collections::BTreeMap;

use nexus_model::kind::*;
use nexus_model::object::{ConditionStatus, set_condition};
use nexus_model::{AnyObject, Digest, Name, Object, Uid};

use crate::rules::buried::Teardown;
use crate::rules::usage::{charge, recharge};
use crate::rules::{fleet, instance, secret};
use crate::step::{Dirty, Step};
use crate::world::{Part, Place, app_uid};

/// Instances made or buried in one step, so that a step fits in a transaction.
const PER_STEP: usize = 12;

/// Ends an app: its name and quota are free at once, its instances are buried with it.
pub fn bury(step: &mut Step<'_>, app: &Object<App>) -> AnyObject {
    let project = app.metadata.project.clone().expect("apps have a project");
    recharge(step, &project, charge(&app.spec), [0; 3]).expect("giving back is never refused");
    let buried = step.bury(app);
    step.mark(Dirty::Buried(App::PLURAL, app.metadata.uid));
    if step.world.part == Part::Region {
        // The name may be what a global app waits for.
        step.mark(Dirty::Child((app.metadata.project.clone(), app.metadata.name.clone())));
    }
    buried.to_any()
}

/// Buries instances of a buried app, a few at a time.
pub fn tear_down(step: &mut Step<'_>, app: Uid) -> Teardown {
    let living: Vec<_> = step.world.instances_of(app).take(PER_STEP).cloned().collect();
    for i in &living {
        instance::bury(step, i, "its app was deleted");
    }
    let elsewhere = || {
        let buried = step.world.apps.buried.get(&app);
        buried.is_some_and(|b| !fleet::confirmed(step.world, b, |region| region.apps.iter().any(|a| a.uid == app)))
    };
    if !living.is_empty() {
        Teardown::Progressed
    } else if elsewhere() || step.world.instances.buried.values().any(|i| app_uid(i) == app) {
        Teardown::Waiting
    } else {
        Teardown::Gone
    }
}

/// Identifies what instances of an app are made from: its template, with the versions that variables come from, and the
/// content of its image.
fn template_hash(template: &Template, image: Digest) -> String {
    let what = serde_json::to_vec(&(template, image)).expect("templates are plain data");
    Digest::of(&what).hex()[..16].to_owned()
}

/// The host names under which gateways answer for an app.
pub fn hostnames(app: &Object<App>, domain: &str) -> Vec<String> {
    let (name, project) = (&app.metadata.name, app.metadata.project.as_ref().expect("apps have a project"));
    if !app.spec.expose {
        return Vec::new();
    }
    let full = format!("{name}.{project}.{domain}");
    if *project == "default" { vec![format!("{name}.{domain}"), full] } else { vec![full] }
}

pub fn reconcile(step: &mut Step<'_>, place: &Place) {
    let Some(app) = step.world.apps.live.get(place).cloned() else { return };
    let image = step.world.fleet().images.get(app.metadata.project.as_ref(), &app.spec.image);
    let image = image.map(|i| i.spec.digest);
    let made = image.ok_or_else(|| no_image(&app.spec.image)).and_then(|digest| {
        let template = secret::resolve(step.world, &app)?;
        Ok((template_hash(&template, digest), template, digest))
    });
    let hash = made.as_ref().ok().map(|(hash, ..)| hash.clone());
    let instances = step.world.instances_of(app.metadata.uid);
    let drained = |i: &Object<Instance>| {
        let host = i.status.host.as_ref().and_then(|name| step.world.host(name));
        i.status.moving_to.is_some() || host.is_some_and(|host| host.spec.draining)
    };
    // What is on a host that is being emptied, or is moved by an operator, is replaced as what is of an old template.
    let (new, old): (Vec<_>, Vec<_>) =
        instances.partition(|i| hash.as_ref().is_none_or(|h| *h == i.spec.template_hash && !drained(i)));
    let doomed = doomed(&new, &old, hash.as_deref(), app.spec.replicas as usize);
    let (new, old) = (new.len(), old.len());
    let wanted = app.spec.replicas as usize;
    let mut more = false;
    if let Ok((hash, template, digest)) = &made {
        let surge = (wanted / 4).max(1);
        let room = (wanted + surge).saturating_sub(new + old);
        let missing = wanted.saturating_sub(new);
        // With nothing to replace there is no surge to keep to.
        let make = if old == 0 { missing } else { missing.min(room) };
        for _ in 0..make.min(PER_STEP) {
            make_instance(step, &app, template, *digest, hash);
        }
        more |= make > PER_STEP;
    }
    more |= doomed.len() > PER_STEP;
    for (uid, why) in doomed.into_iter().take(PER_STEP) {
        if let Some(i) = step.world.instance(uid).cloned() {
            instance::bury(step, &i, why);
        }
    }
    update_status(step, &app, made.as_ref().map(|(hash, ..)| hash.as_str()));
    if more {
        step.mark(Dirty::App(place.clone()));
    }
}

/// What is too much, and why: old instances that serve nothing or are no longer needed, then the excess of new ones.
fn doomed(
    new: &[&Object<Instance>],
    old: &[&Object<Instance>],
    hash: Option<&str>,
    wanted: usize,
) -> Vec<(Uid, &'static str)> {
    let why = |i: &Object<Instance>| {
        if i.status.moving_to.is_some() {
            "an operator's rebalance moved it"
        } else if Some(i.spec.template_hash.as_str()) == hash {
            "its host is drained"
        } else {
            "replaced by a newer template"
        }
    };
    let ready = new.iter().chain(old).filter(|i| i.status.ready).count();
    // As many replicas as are wanted stay ready while old instances are replaced.
    let mut spare_ready = ready.saturating_sub(wanted);
    let mut doomed = Vec::new();
    for i in old {
        if !i.status.ready {
            doomed.push((i.metadata.uid, why(i)));
        } else if spare_ready > 0 {
            spare_ready -= 1;
            doomed.push((i.metadata.uid, why(i)));
        }
    }
    let excess = new.len().saturating_sub(wanted);
    if excess > 0 {
        let mut in_zone: BTreeMap<&Name, usize> = BTreeMap::new();
        for zone in new.iter().filter_map(|i| i.status.zone.as_ref()) {
            *in_zone.entry(zone).or_default() += 1;
        }
        let in_zone = |i: &Object<Instance>| i.status.zone.as_ref().map_or(0, |zone| in_zone[zone]);
        let mut order: Vec<&Object<Instance>> = new.to_vec();
        // What serves least goes first: unplaced, unready, then from the fullest zone, the youngest first.
        order.sort_by_key(|i| {
            let age = std::cmp::Reverse(i.metadata.created);
            (i.status.host.is_some(), i.status.ready, std::cmp::Reverse(in_zone(i)), age, i.metadata.uid)
        });
        doomed.extend(order.into_iter().take(excess).map(|i| (i.metadata.uid, "scaled in")));
    }
    doomed
}

fn make_instance(step: &mut Step<'_>, app: &Object<App>, template: &Template, digest: Digest, hash: &str) {
    let uid = step.new_uid();
    let stem: String = app.metadata.name.as_str().chars().take(54).collect();
    let stem = stem.trim_end_matches('-');
    let name: Name = format!("{stem}-{}", uid.short()).parse().expect("a name and hexadecimal digits");
    let mut metadata = step.new_metadata(name, app.metadata.project.clone());
    metadata.uid = uid;
    metadata.owner = Some(app.owner_ref());
    metadata.labels = app.spec.instance_labels.clone();
    metadata.request_id = app.metadata.request_id.clone();
    let spec = InstanceSpec {
        app: app.metadata.name.clone(),
        template_hash: hash.to_owned(),
        template: template.clone(),
        image_digest: digest,
    };
    step.put(Object::<Instance>::new(metadata, spec));
    instance::reconcile(step, uid);
}

/// Why no instance can be made of an app: a word for programs, and what to do.
pub type Missing = (&'static str, String);

fn no_image(name: &Name) -> Missing {
    ("ImageNotFound", format!("there is no image {name}: import it with `nexus image import PATH --name {name}`"))
}

fn update_status(step: &mut Step<'_>, app: &Object<App>, made: Result<&str, &Missing>) {
    let hash = made.ok();
    let Some(app) = step.world.apps.get(app.metadata.project.as_ref(), &app.metadata.name).cloned() else { return };
    let instances: Vec<_> = step.world.instances_of(app.metadata.uid).collect();
    let count = |f: &dyn Fn(&Object<Instance>) -> bool| {
        u32::try_from(instances.iter().filter(|i| f(i)).count()).unwrap_or(u32::MAX)
    };
    let mut new = app.clone();
    let s = &mut new.status;
    s.observed_generation = app.metadata.generation;
    s.desired_replicas = app.spec.replicas;
    s.replicas = count(&|_| true);
    s.ready_replicas = count(&|i| i.status.ready);
    s.updated_replicas = count(&|i| Some(i.spec.template_hash.as_str()) == hash);
    s.hostnames = hostnames(&app, &step.world.domain);
    let updated_ready = count(&|i| i.status.ready && Some(i.spec.template_hash.as_str()) == hash);
    let settled = s.replicas == s.desired_replicas && updated_ready == s.desired_replicas;
    s.phase = match (s.desired_replicas, s.ready_replicas) {
        (0, _) if s.replicas == 0 => AppPhase::Stopped,
        _ if settled => AppPhase::Ready,
        (_, 0) => AppPhase::Pending,
        _ => AppPhase::Progressing,
    };
    let stuck = instances.iter().find(|i| !i.status.ready && !i.status.message.is_empty());
    let (status, reason, message) = if let Err((reason, message)) = made {
        (ConditionStatus::False, *reason, message.clone())
    } else if settled {
        (
            ConditionStatus::True,
            "AllReady",
            format!("{} of {} replicas are ready", s.ready_replicas, s.desired_replicas),
        )
    } else {
        let why = match stuck {
            Some(i) => format!(": {}: {}", i.metadata.name, i.status.message),
            None => String::new(),
        };
        let message = format!("{updated_ready} of {} replicas are ready{why}", s.desired_replicas);
        (ConditionStatus::False, "NotAllReady", message)
    };
    set_condition(&mut s.conditions, "Ready", status, reason, &message, step.now);
    if new.status == app.status {
        return;
    }
    let became = new.status.phase;
    if became != app.status.phase {
        let severity = if hash.is_none() { Severity::Warning } else { Severity::Normal };
        let reason = match became {
            AppPhase::Pending => "Pending",
            AppPhase::Ready => "Ready",
            AppPhase::Progressing => "Progressing",
            AppPhase::Stopped => "Stopped",
        };
        step.event(app.metadata.project.as_ref(), app.owner_ref(), severity, reason, message);
    }
    step.put(new);
}
