//! The core's part in a fleet of regions. A regional core takes in the global group as this server follows it, and says
//! what the region has; the global core listens.

use std::collections::BTreeMap;
use std::time::Duration;

use nexus_model::kind::*;
use nexus_model::plan::{ChildSummary, PLAN_VERSION, ProjectSummary, RegionSummary};
use nexus_model::{AnyObject, Name, Object, Uid};
use nexus_store::{KeyValue, WatchEvent};

use crate::cells;
use crate::core::{Core, Moment};
use crate::rules::child::is_child;
use crate::rules::{fleet, job, secret};
use crate::step::Dirty;
use crate::world::{Place, World};

/// A leader that did not come to listen for so long was held up itself.
const HELD_UP: Duration = Duration::from_millis(1_250);

/// News of the global group.
pub enum Adopt {
    /// Everything, at a revision: the first, or after a gap.
    World(Box<World>, u64),
    /// What one revision changed. No events: nothing up to there is missing.
    Events(Vec<WatchEvent>, u64),
}

/// What a region says of itself beside what its rows say.
#[derive(Debug, Clone, Default)]
pub struct Presence {
    pub tier: Tier,
    /// Of the region's writer.
    pub epoch: u64,
    pub servers: Vec<RegionServer>,
    pub gateways: Vec<std::net::SocketAddr>,
    /// How old the copy of the global group is.
    pub stale_ms: u64,
}

/// An object of the global group that may matter to a region.
fn regards(any: &AnyObject) -> Place {
    (any.metadata.project.clone(), any.metadata.name.clone())
}

impl Core {
    /// Takes in news of the global group. Until the first, a region of a fleet decides nothing about projects.
    pub fn adopt(&mut self, news: Adopt, at: Moment<'_>) {
        match news {
            Adopt::World(world, revision) => {
                self.world.global = Some(world);
                self.world.global_revision = revision;
                self.look_at_everything(at);
            }
            Adopt::Events(events, revision) => {
                for event in &events {
                    self.adopt_event(event);
                }
                let knew = self.world.knows_fleet();
                self.world.global_revision = self.world.global_revision.max(revision);
                if !knew && self.world.knows_fleet() {
                    self.look_at_everything(at);
                }
            }
        }
    }

    fn look_at_everything(&mut self, at: Moment<'_>) {
        let mut places: std::collections::BTreeSet<Place> = self.world.fleet().apps.live.keys().cloned().collect();
        let children = self.world.apps.live.iter().filter(|(_, app)| is_child(app));
        places.extend(children.map(|(place, _)| place.clone()));
        self.mark(places.into_iter().map(Dirty::Child));
        self.alone(at, cells::everything);
    }

    fn adopt_event(&mut self, event: &WatchEvent) {
        let Some(global) = self.world.global.as_deref_mut() else { return };
        let read = |kv: &KeyValue| serde_json::from_slice::<AnyObject>(&kv.value).ok();
        let (kv, prev) = match event {
            WatchEvent::Put { kv, prev } => (Some(kv), prev.as_ref()),
            WatchEvent::Delete { prev, .. } => (None, prev.as_ref()),
        };
        match kv {
            Some(kv) => {
                if let Err(error) = global.take_in(kv) {
                    tracing::error!(%error, "an object of the global group can't be read; it is left out");
                }
            }
            None => global.leave_out(&String::from_utf8_lossy(event.key())),
        }
        let key = String::from_utf8_lossy(event.key()).into_owned();
        let mut parts = key.split('/');
        let (Some("o"), Some(plural)) = (parts.next(), parts.next()) else { return };
        // The key tells the place too, when the store no longer has what stood there.
        let by_key = || {
            let project = parts.next().filter(|p| *p != "-").and_then(|p| p.parse::<Name>().ok());
            parts.next().and_then(|name| name.parse::<Name>().ok()).map(|name| (project, name))
        };
        let Some(place) = kv.or(prev).and_then(read).as_ref().map(regards).or_else(by_key) else { return };
        match plural {
            p if p == App::PLURAL => self.mark([Dirty::Child(place)]),
            p if p == Project::PLURAL => {
                let name = place.1;
                let blocked = self.world.blocked.values().map(|b| b.place.clone());
                let mine: Vec<Dirty> = blocked.filter(|p| p.0.as_ref() == Some(&name)).map(Dirty::Child).collect();
                let children: Vec<Dirty> =
                    self.world.fleet().apps.within(&name).map(place_of).map(Dirty::Child).collect();
                self.mark(mine.into_iter().chain(children).chain([Dirty::Usage(name)]));
            }
            p if p == Image::PLURAL => {
                let Some(project) = &place.0 else { return };
                let users = self.world.apps.within(project).filter(|a| a.spec.parts().names_image(&place.1));
                let users: Vec<Dirty> = users.map(place_of).map(Dirty::App).collect();
                let jobs = job::waiting_for(&self.world, project, |t| t.parts().names_image(&place.1));
                self.mark(users.into_iter().chain(jobs));
            }
            p if p == Secret::PLURAL => {
                let Some(project) = &place.0 else { return };
                let users = secret::users(&self.world, project, &place.1).map(place_of).map(Dirty::App);
                let users: Vec<Dirty> = users.collect();
                let jobs = job::waiting_for(&self.world, project, |t| secret::names(t, &place.1));
                self.mark(users.into_iter().chain(jobs));
            }
            p if p == Region::PLURAL => {
                // Shares may have changed. What a region merely says of itself changes none.
                let spec_only = |kv: Option<&KeyValue>| kv.and_then(read).map(|any| any.metadata.uid);
                if spec_only(kv) != spec_only(prev) {
                    let apps: Vec<Dirty> = self.world.fleet().apps.live.keys().cloned().map(Dirty::Child).collect();
                    self.mark(apps);
                }
            }
            _ => {}
        }
    }

    /// What the region says of itself to the global group.
    pub fn summary(&self, presence: &Presence) -> RegionSummary {
        let projects = self.world.usages.live.values().filter_map(|u| {
            let uid = u.metadata.owner.as_ref()?.uid;
            Some(ProjectSummary { name: u.metadata.name.clone(), uid, used: u.status.used })
        });
        RegionSummary {
            version: PLAN_VERSION,
            region: self.region().clone(),
            tier: presence.tier,
            epoch: presence.epoch,
            servers: presence.servers.clone(),
            gateways: presence.gateways.clone(),
            looked: self.world.global_revision,
            stale_ms: presence.stale_ms,
            projects: projects.collect(),
            apps: self.children(),
        }
    }

    fn children(&self) -> Vec<ChildSummary> {
        let mut children: BTreeMap<Uid, ChildSummary> = BTreeMap::new();
        let none = |uid: Uid| ChildSummary {
            uid,
            generation: 0,
            desired_replicas: 0,
            replicas: 0,
            ready_replicas: 0,
            updated_replicas: 0,
            rollout: None,
            reason: String::new(),
            message: String::new(),
        };
        for app in self.world.apps.all().filter(|app| is_child(app)) {
            let uid = app.metadata.owner.as_ref().map(|o| o.uid).unwrap_or_default();
            let child = children.entry(uid).or_insert_with(|| none(uid));
            if app.metadata.deleting.is_some() {
                continue;
            }
            child.generation = app.status.observed_generation;
            child.desired_replicas = app.status.desired_replicas;
            child.replicas = app.status.replicas;
            child.ready_replicas = app.status.ready_replicas;
            child.updated_replicas = app.status.updated_replicas;
            child.rollout = app.status.rollout.as_ref().map(|r| r.phase);
            if app.status.phase != AppPhase::Ready {
                let ready = app.status.conditions.iter().find(|c| c.kind == "Ready");
                child.message = ready.map(|c| c.message.clone()).unwrap_or_default();
            }
        }
        for (uid, blocked) in &self.world.blocked {
            let child = children.entry(*uid).or_insert_with(|| none(*uid));
            blocked.reason.clone_into(&mut child.reason);
            child.message.clone_from(&blocked.message);
        }
        children.into_values().collect()
    }

    /// Takes in what a region says of itself.
    pub fn hear(&mut self, summary: &RegionSummary, at: Moment<'_>) -> Result<(), String> {
        self.alone(at, |step| fleet::hear(step, summary, at.monotonic))
    }

    /// Says of regions that fell silent that they did.
    pub(crate) fn judge_regions(&mut self, at: Moment<'_>) {
        let held_up = self.ticked.is_none_or(|then| at.monotonic.saturating_sub(then) > HELD_UP);
        if held_up {
            self.listening = at.monotonic;
        }
        self.ticked = Some(at.monotonic);
        let since = self.listening;
        self.alone(at, |step| fleet::judge(step, since, at.monotonic));
    }
}

fn place_of(app: &Object<App>) -> Place {
    (app.metadata.project.clone(), app.metadata.name.clone())
}
