//! The templates that an app has had, as rows that are kept to go back to: the newest is the one wanted now. One that is wanted
//! again is given the next number, so that the order of the numbers is the order of use.

use nexus_model::kind::*;
use nexus_model::{Name, Object, Uid};

use crate::rules::app::Content;
use crate::step::Step;
use crate::world::World;

/// Rows that one step takes away.
const PER_STEP: usize = 12;

/// An app's revisions, the oldest first.
pub fn of(world: &World, app: Uid) -> impl DoubleEndedIterator<Item = &Object<AppRevision>> {
    world
        .revisions_of
        .get(&app)
        .into_iter()
        .flat_map(|of| of.values())
        .filter_map(|place| world.app_revisions.live.get(place))
}

pub fn numbered(world: &World, app: Uid, revision: u64) -> Option<&Object<AppRevision>> {
    world.app_revisions.live.get(world.revisions_of.get(&app)?.get(&revision)?)
}

pub fn by_hash<'a>(world: &'a World, app: Uid, hash: &str) -> Option<&'a Object<AppRevision>> {
    of(world, app).rev().find(|r| r.spec.template_hash == hash)
}

/// The template that instances of a revision are made from: with the versions of secrets that its hash speaks of.
pub fn template(revision: &AppRevisionSpec) -> Template {
    let mut template = Template { secrets: revision.secrets.clone(), ..revision.template.clone() };
    for part in template.init.iter_mut().chain(&mut template.sidecars) {
        if let Some(secrets) = revision.part_secrets.get(&part.name) {
            part.secrets.clone_from(secrets);
        }
    }
    template
}

/// The content that they are made from.
pub fn content(revision: &AppRevisionSpec) -> Content {
    Content { image: revision.image_digest, parts: revision.part_digests.clone() }
}

/// Sees to it that the newest revision is this one, whose secrets have versions in `resolved`. Answers its number.
pub fn note(step: &mut Step<'_>, app: &Object<App>, hash: &str, resolved: &Template, content: &Content) -> u64 {
    let uid = app.metadata.uid;
    let newest = of(step.world, uid).next_back();
    let last = newest.map_or(0, |r| r.spec.revision);
    if newest.is_some_and(|r| r.spec.template_hash == hash) {
        return last;
    }
    if let Some(again) = by_hash(step.world, uid, hash).cloned() {
        step.erase(&again);
    }
    let revision = last + 1;
    let stem: String = app.metadata.name.as_str().chars().take(32).collect();
    let name = format!("{}-{}-{revision}", stem.trim_end_matches('-'), uid.short());
    let name: Name = name.parse().expect("a name, hexadecimal digits and a number");
    let mut metadata = step.new_metadata(name, app.metadata.project.clone());
    metadata.owner = Some(app.owner_ref());
    metadata.request_id = app.metadata.request_id.clone();
    let named = |(_, part): (PartRole, &nexus_model::kind::Part)| (part.name.clone(), part.secrets.clone());
    let spec = AppRevisionSpec {
        app: app.metadata.name.clone(),
        revision,
        template_hash: hash.to_owned(),
        template: app.spec.template(),
        secrets: resolved.secrets.clone(),
        part_secrets: resolved.parts().all().filter(|(_, p)| !p.secrets.is_empty()).map(named).collect(),
        image_digest: content.image,
        part_digests: content.parts.clone(),
    };
    step.put(Object::<AppRevision>::new(metadata, spec));
    revision
}

/// Forgets the oldest beyond those to keep, but none that is in use.
pub fn prune(step: &mut Step<'_>, app: &Object<App>, used: &[&str]) {
    let all: Vec<_> = of(step.world, app.metadata.uid).collect();
    let surplus = all.len().saturating_sub(app.spec.rollout.history as usize + 1);
    let oldest = all.iter().take(surplus).filter(|r| !used.contains(&r.spec.template_hash.as_str()));
    let doomed: Vec<_> = oldest.take(PER_STEP).map(|r| (*r).clone()).collect();
    doomed.iter().for_each(|r| step.erase(r));
}

/// Forgets some of an app's revisions. True if there were any.
pub fn forget(step: &mut Step<'_>, app: Uid) -> bool {
    let some: Vec<_> = of(step.world, app).take(PER_STEP).cloned().collect();
    some.iter().for_each(|r| step.erase(r));
    !some.is_empty()
}
