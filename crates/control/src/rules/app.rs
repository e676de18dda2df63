//! Keeps an app at its replicas: makes instances of the newest template, retires old ones as new ones become ready,
//! and says in its status how far it is.

use std::collections::BTreeMap;
use std::time::Duration;

use nexus_model::kind::*;
use nexus_model::object::{ConditionStatus, set_condition};
use nexus_model::{AnyObject, Digest, Name, Object, Timestamp, Uid};

use crate::rules::buried::Teardown;
use crate::rules::network::{default, nic};
use crate::rules::rollout::{self, Goals, Member, Side};
use crate::rules::usage::{charge_app, charge_with, recharge, surge_of};
use crate::rules::{drain, fleet, history, instance, secret};
use crate::step::{Dirty, Step};
use crate::world::{Part, Place, World, app_uid};

/// Instances made or buried in one step, so that a step fits in a transaction.
const PER_STEP: usize = 10;

/// So many instances are made or buried in one step, where each has some NICs.
pub(super) fn per_step(most: usize, nics: usize) -> usize {
    (most * 5 / (5 + nics)).max(1)
}

/// Ends an app: its name and quota are free at once, its instances are buried with it.
pub fn bury(step: &mut Step<'_>, app: &Object<App>) -> AnyObject {
    let project = app.metadata.project.clone().expect("apps have a project");
    recharge(step, &project, charge_app(app), [0; 3]).expect("giving back is never refused");
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
    let forgot = history::forget(step, app);
    let elsewhere = || {
        let buried = step.world.apps.buried.get(&app);
        buried.is_some_and(|b| !fleet::confirmed(step.world, b, |region| region.apps.iter().any(|a| a.uid == app)))
    };
    if !living.is_empty() || forgot {
        Teardown::Progressed
    } else if elsewhere() || step.world.instances.buried.values().any(|i| app_uid(i) == app) {
        Teardown::Waiting
    } else {
        Teardown::Gone
    }
}

/// The content of the images that an instance's parts are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// The main part's.
    pub image: Digest,
    /// By name, of the other images that parts name.
    pub parts: BTreeMap<Name, Digest>,
}

/// Finds the content of images: what is pinned, else what their names stand for now.
pub fn content(
    world: &World,
    project: Option<&Name>,
    parts: Parts<'_>,
    pinned: Option<Digest>,
    pins: &BTreeMap<Name, Digest>,
) -> Result<Content, Missing> {
    let find = |name: &Name, pinned: Option<Digest>| {
        let found = pinned.or_else(|| Some(world.fleet().images.get(project, name)?.spec.digest));
        found.ok_or_else(|| no_image(name))
    };
    let image = find(parts.image, pinned)?;
    let others = parts.other_images().into_iter();
    let others = others.map(|name| Ok((name.clone(), find(name, pins.get(name).copied())?)));
    Ok(Content { image, parts: others.collect::<Result<_, Missing>>()? })
}

/// Identifies what instances of an app are made from: its template, with the versions that variables come from, and the
/// content of its images.
pub fn template_hash(template: &Template, content: &Content) -> String {
    // What has no parts keeps the hash that it always had.
    let what = match content.parts.is_empty() {
        true => serde_json::to_vec(&(template, content.image)),
        false => serde_json::to_vec(&(template, content.image, &content.parts)),
    };
    Digest::of(&what.expect("templates are plain data")).hex()[..16].to_owned()
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

/// What the newest instances of an app are made from.
pub struct Made {
    pub hash: String,
    /// With the versions that variables come from.
    pub template: Template,
    pub content: Content,
}

/// What an app's words come to now: its template, and the content that its images stand for unless one is pinned.
pub fn made_of(world: &World, app: &Object<App>) -> Result<Made, Missing> {
    let (project, spec) = (app.metadata.project.as_ref(), &app.spec);
    let content = content(world, project, spec.parts(), spec.image_digest, &spec.part_digests)?;
    let template = secret::resolve(world, app)?;
    nic::resolve(world, project, &template.nics)?;
    Ok(Made { hash: template_hash(&template, &content), template, content })
}

/// The instances of an app in the light of its rollout.
fn members(world: &World, app: &Object<App>, now: Timestamp, side: impl Fn(&str) -> Side) -> Vec<Member> {
    // What a rollout would give up on is no successor that is about to come.
    let patience = Duration::from_secs(app.spec.rollout.progress_deadline_seconds.into());
    let member = |i: &Object<Instance>| {
        let host = i.status.host.as_ref().and_then(|name| world.host(name));
        let late = i.status.restarts > 0 || now.since(i.metadata.created) >= patience;
        Member {
            uid: i.metadata.uid,
            side: side(&i.spec.template_hash),
            ready: i.status.ready,
            placed: i.status.host.is_some(),
            drained: i.status.moving_to.is_some() || host.is_some_and(|host| host.spec.draining),
            silent: host.is_some_and(|host| matches!(host.status.state, HostState::Suspect | HostState::Dead)),
            failing: !i.status.ready && host.is_some() && late,
            zone: i.status.zone.clone(),
            created: i.metadata.created,
        }
    };
    world.instances_of(app.metadata.uid).map(member).collect()
}

/// How an app's instances stand, and how many there should be, by what its status says of its rollout.
pub fn stand(world: &World, app: &Object<App>, now: Timestamp) -> (Vec<Member>, Goals) {
    let status = app.status.rollout.clone().unwrap_or_default();
    let wanted = app.spec.wanted_replicas(&app.status) as usize;
    let goals = goals(app, &status, wanted);
    // Of what was never made, nothing is replaced.
    let unknown = status.template_hash.is_empty();
    let side = |hash: &str| if unknown { Side::Target } else { rollout::side(&status, hash) };
    (members(world, app, now, side), goals)
}

fn goals(app: &Object<App>, status: &RolloutStatus, wanted: usize) -> Goals {
    rollout::goals(&app.spec.rollout, status, wanted).allowing(app.spec.disruption.unwrap_or_default())
}

/// Why the newest template answers too badly for its rollout to go on, if it does.
pub fn errors(world: &World, app: &Object<App>, rollout: &RolloutStatus) -> Option<String> {
    app.spec.rollout.max_error_percent?;
    if rollout.failed || !rollout.phase.is_open() {
        return None;
    }
    let (mut newer, mut older) = (rollout::Answers::default(), rollout::Answers::default());
    for i in world.instances_of(app.metadata.uid) {
        let load = world.traffic.of(i.metadata.uid, crate::traffic::KEPT);
        let is_newer = i.spec.template_hash == rollout.template_hash;
        let side = if is_newer { &mut newer } else { &mut older };
        side.requests += load.requests;
        side.errors += load.errors;
    }
    rollout::judge(&app.spec.rollout, newer, older)
}

pub fn reconcile(step: &mut Step<'_>, place: &Place) {
    let Some(app) = step.world.apps.live.get(place).cloned() else { return };
    let (uid, wanted) = (app.metadata.uid, app.spec.wanted_replicas(&app.status) as usize);
    let made = made_of(step.world, &app);
    let before = app.status.rollout.clone().unwrap_or_default();
    let mut told = Vec::new();
    let mut status = before.clone();
    if let Ok(made) = &made {
        let revision = history::note(step, &app, &made.hash, &made.template, &made.content);
        let same = before.template_hash == made.hash;
        let target = if same { rollout::target_hash(&before) } else { &made.hash };
        let seen = members(step.world, &app, step.now, |hash| if hash == target { Side::Target } else { Side::Other });
        let fresh = || seen.iter().filter(|m| m.side == Side::Target && !m.drained);
        let seen = rollout::Seen {
            wanted,
            hash: made.hash.clone(),
            revision,
            target: fresh().count(),
            target_ready: fresh().filter(|m| m.ready).count(),
            all: seen.len(),
            errors: errors(step.world, &app, &before).filter(|_| same),
        };
        (status, told) = rollout::advance(&app.spec.rollout, &before, &seen, step.now);
        history::prune(step, &app, &[&status.template_hash, &status.stable_hash]);
    }
    let unknown = status.template_hash.is_empty();
    let side = |hash: &str| if unknown { Side::Target } else { rollout::side(&status, hash) };
    let now = members(step.world, &app, step.now, side);
    let moves = rollout::moves(&now, goals(&app, &status, wanted));
    let mut more = status != before || moves.stop.len() > PER_STEP;
    // What a drained host's instances are replaced by is the operator's doing, and not charged.
    let staying = now.iter().filter(|m| !m.drained).count();
    let making = if made.is_ok() {
        let nics = default::nics(step.world, app.metadata.project.as_ref(), &app.spec.template());
        (moves.make_target + moves.make_stable).min(per_step(PER_STEP, nics))
    } else {
        0
    };
    let kept_out = charge_surge(step, &app, &mut status, staying, making);
    if status.failed && !before.failed && !before.surge_refused.is_empty() {
        status.message += &format!("; the rollout had no room for more: {}", before.surge_refused);
    }
    let mut left = making - kept_out;
    if let Ok(made) = &made {
        let sides =
            [(moves.make_stable, status.stable_hash.as_str()), (moves.make_target, rollout::target_hash(&status))];
        for (count, hash) in sides {
            let make = count.min(left);
            // What a quota keeps out is asked for again when there is room, not at once.
            more |= make < count && kept_out == 0;
            left -= make;
            if make > 0 && hash == made.hash {
                (0..make).for_each(|_| make_instance(step, &app, &made.template, &made.content, hash));
            } else if make > 0
                && let Some(kept) = history::by_hash(step.world, uid, hash).map(|r| r.spec.clone())
            {
                let (template, content) = (history::template(&kept), history::content(&kept));
                (0..make).for_each(|_| make_instance(step, &app, &template, &content, hash));
            }
        }
    }
    for (uid, why) in moves.stop.into_iter().take(PER_STEP) {
        if let Some(i) = step.world.instance(uid).cloned() {
            let moved = i.status.moving_to.is_some() && why == rollout::DRAINED;
            let why = if moved { "an operator's rebalance moved it" } else { why };
            instance::bury(step, &i, why);
        }
    }
    for (severity, reason, message) in told {
        step.event(app.metadata.project.as_ref(), app.owner_ref(), severity, reason, message);
    }
    update_status(step, &app, status, made.as_ref().map(|made| made.hash.as_str()));
    drain::tell_hosts_of(step, uid);
    if more {
        step.mark(Dirty::App(place.clone()));
    }
}

/// Charges the quota with what is about to be made beyond the app's replicas, and gives back what has gone of it. `staying`
/// instances are there, `making` are wanted. Answers how many of these the quota keeps out.
fn charge_surge(
    step: &mut Step<'_>,
    app: &Object<App>,
    status: &mut RolloutStatus,
    staying: usize,
    making: usize,
) -> usize {
    let most = app.spec.most_replicas() as usize;
    let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let (charged, there) = (surge_of(app), staying.saturating_sub(most));
    // What is there without having been charged is on its way out: somebody wants fewer.
    let kept = charged.min(narrow(there));
    let more = (staying + making).saturating_sub(most) - there;
    let project = app.metadata.project.clone().expect("apps have a project");
    status.surge_refused = String::new();
    for granted in (0..=more).rev() {
        let surge = kept.saturating_add(narrow(granted));
        match recharge(step, &project, charge_with(&app.spec, charged), charge_with(&app.spec, surge)) {
            Ok(()) => {
                status.surge = surge;
                return more - granted;
            }
            Err(why) => status.surge_refused = why.detail,
        }
    }
    // Not even giving back was possible: the project itself is going. Nothing is changed.
    status.surge = charged;
    making
}

fn make_instance(step: &mut Step<'_>, app: &Object<App>, template: &Template, content: &Content, hash: &str) {
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
        image_digest: content.image,
        part_digests: content.parts.clone(),
        job: None,
        implied_nic: false,
    };
    step.put(Object::<Instance>::new(metadata, spec));
    instance::reconcile(step, uid);
}

/// Why no instance can be made of an app: a word for programs, and what to do.
pub type Missing = (&'static str, String);

pub(super) fn no_image(name: &Name) -> Missing {
    ("ImageNotFound", format!("there is no image {name}: import it with `nexus image import PATH --name {name}`"))
}

fn update_status(step: &mut Step<'_>, app: &Object<App>, rollout: RolloutStatus, made: Result<&str, &Missing>) {
    let hash = made.ok();
    let Some(app) = step.world.apps.get(app.metadata.project.as_ref(), &app.metadata.name).cloned() else { return };
    let instances: Vec<_> = step.world.instances_of(app.metadata.uid).collect();
    let count = |f: &dyn Fn(&Object<Instance>) -> bool| {
        u32::try_from(instances.iter().filter(|i| f(i)).count()).unwrap_or(u32::MAX)
    };
    let mut new = app.clone();
    let s = &mut new.status;
    s.observed_generation = app.metadata.generation;
    s.desired_replicas = app.spec.wanted_replicas(&app.status);
    if app.spec.autoscale.is_none() {
        s.autoscale = None;
    }
    s.replicas = count(&|_| true);
    s.ready_replicas = count(&|i| i.status.ready);
    s.updated_replicas = count(&|i| Some(i.spec.template_hash.as_str()) == hash);
    s.hostnames = hostnames(&app, &step.world.domain);
    let updated_ready = count(&|i| i.status.ready && Some(i.spec.template_hash.as_str()) == hash);
    let settled = s.replicas == s.desired_replicas && updated_ready == s.desired_replicas;
    s.phase = match (s.desired_replicas, s.ready_replicas) {
        (0, _) if s.replicas == 0 => AppPhase::Stopped,
        _ if settled => AppPhase::Ready,
        (wanted, ready) if rollout.failed && ready >= wanted => AppPhase::RolledBack,
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
    } else if rollout.failed {
        (ConditionStatus::False, "RolledBack", rollout.message.clone())
    } else if matches!(rollout.phase, RolloutPhase::Waiting | RolloutPhase::Paused | RolloutPhase::Switched) {
        (ConditionStatus::False, "RolloutWaits", rollout.message.clone())
    } else {
        let why = match stuck {
            Some(i) => format!(": {}: {}", i.metadata.name, i.status.message),
            None => String::new(),
        };
        let message = format!("{updated_ready} of {} replicas are ready{why}", s.desired_replicas);
        (ConditionStatus::False, "NotAllReady", message)
    };
    s.rollout = Some(rollout).filter(|r| *r != RolloutStatus::default());
    set_condition(&mut s.conditions, "Ready", status, reason, &message, step.now);
    if new.status == app.status {
        return;
    }
    let became = new.status.phase;
    // Of a failure the rollout itself tells.
    if became != app.status.phase && became != AppPhase::RolledBack {
        let severity = if hash.is_none() { Severity::Warning } else { Severity::Normal };
        let reason = match became {
            AppPhase::Pending => "Pending",
            AppPhase::Ready => "Ready",
            AppPhase::Progressing => "Progressing",
            AppPhase::Stopped => "Stopped",
            AppPhase::RolledBack => "RolledBack",
        };
        step.event(app.metadata.project.as_ref(), app.owner_ref(), severity, reason, message);
    }
    step.put(new);
}
