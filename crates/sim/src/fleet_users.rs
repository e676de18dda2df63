//! Users of a fleet: through any server of any region they write apps of one region, apps of all, and projects that own
//! both. Each knows exactly what must be there when everything is still.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nexus_control::intent::{Accepted, Change};
use nexus_model::kind::ProjectSpec;
use nexus_model::kind::*;
use nexus_model::{ApiError, Code, Metadata, Name, Object};
use serde_json::json;
use tokio::time::sleep;

use crate::chance::Dice;
use crate::region::name;
use crate::site::Site;
use crate::users::{PROJECT, Way, app, import_image, intent, submit};
use crate::world::World;

/// A global app as its user knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wide {
    pub replicas: u32,
    /// Empty: everywhere.
    pub regions: Vec<Name>,
}

#[derive(Debug, Default)]
pub struct Wishes {
    pub wide: BTreeMap<Name, Wide>,
    /// By region and name.
    pub own: BTreeMap<(Name, Name), u32>,
    /// Requests to a region that are not answered yet.
    asked: BTreeMap<Name, u64>,
}

/// What users know to be there in [`PROJECT`]. Clones share it.
#[derive(Clone, Default)]
pub struct Known(Arc<Mutex<Wishes>>);

impl Known {
    pub fn get(&self) -> MutexGuard<'_, Wishes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A user turns to a region, until what is answered is dropped.
    fn turn_to(&self, region: &Name) -> Turned {
        *self.get().asked.entry(region.clone()).or_default() += 1;
        Turned { known: self.clone(), region: region.clone() }
    }

    /// Whether somebody still waits for a region.
    pub fn is_asked(&self, region: &Name) -> bool {
        self.get().asked.get(region).is_some_and(|n| *n > 0)
    }
}

/// Somebody waits for a region while this is held.
struct Turned {
    known: Known,
    region: Name,
}

impl Drop for Turned {
    fn drop(&mut self) {
        if let Some(n) = self.known.get().asked.get_mut(&self.region) {
            *n -= 1;
        }
    }
}

pub struct FleetUser {
    pub world: Arc<World>,
    pub id: u64,
    pub dice: Dice,
    pub known: Known,
    pub stop: Arc<AtomicBool>,
}

impl FleetUser {
    pub async fn run(self) {
        let own = name(&format!("team-{}", self.id));
        let (mut turn, mut project_is_there) = (0, false);
        while !self.stop.load(Ordering::SeqCst) {
            turn += 1;
            match self.dice.below(100) {
                0..45 => self.region_turn(turn).await,
                45..85 => self.wide_turn(turn).await,
                _ => self.project_turn(&own, turn, &mut project_is_there).await,
            }
            sleep(self.dice.millis(150, 1_500)).await;
        }
        // What is left of the own project goes, so that nothing of it must be there at the end.
        if project_is_there {
            let _ = self.ask("projects", None, &own, Change::Delete, &self.global(), "last").await;
        }
    }

    fn global(&self) -> Way {
        Way::of_global(&self.world)
    }

    fn site(&self) -> &Site {
        self.dice.pick(&self.world.regions()).expect("a fleet has regions")
    }

    async fn ask(
        &self,
        plural: &str,
        project: Option<&Name>,
        object: &Name,
        change: Change,
        way: &Way,
        turn: &str,
    ) -> Option<Result<Accepted, ApiError>> {
        let key = format!("f{}-{turn}", self.id);
        let wanted = intent(plural, project.cloned(), object.clone(), change, key);
        submit(&self.world, &self.dice, &wanted, way, &self.stop).await
    }

    /// An answer about what nobody else touches.
    fn judge(&self, what: &str, was: bool, decided: Option<Result<Accepted, ApiError>>) -> bool {
        let trace = &self.world.trace;
        match decided {
            Some(Ok(_)) => return true,
            // Nobody knows: what is there at the end can't be judged.
            None => trace.violation("every request is decided in the end", format_args!("{what} was not")),
            Some(Err(error)) => match error.code {
                Code::AlreadyExists | Code::NotFound | Code::Internal | Code::QuotaExceeded => {
                    let text = format!("{what}, there: {was}, was answered {:?}: {}", error.code, error.detail);
                    trace.violation("no acknowledged intent is lost or done twice", text);
                }
                _ => trace.note(format_args!("{what}: refused: {:?}: {}", error.code, error.detail)),
            },
        }
        false
    }

    /// An app of one region comes, changes or goes.
    async fn region_turn(&self, turn: u64) {
        let site = self.site().clone();
        let _turned = self.known.turn_to(&site.name);
        let (project, which) = (name(PROJECT), name(&format!("app-{}-{}", self.id, self.dice.below(2))));
        let place = (site.name.clone(), which.clone());
        let was = self.known.get().own.get(&place).copied();
        let replicas = self.dice.range(1, 4) as u32;
        let (change, becomes) = match (was, self.dice.below(3)) {
            (None, _) => (app(&which, &project, replicas), Some(replicas)),
            (Some(_), 0) => (Change::Delete, None),
            (Some(_), _) => (Change::Patch { patch: json!({"spec": {"replicas": replicas}}) }, Some(replicas)),
        };
        let way = Way::of_region(&site.nodes);
        let decided = self.ask("apps", Some(&project), &which, change, &way, &turn.to_string()).await;
        if self.judge(&format!("{which} of {}", site.name), was.is_some(), decided) {
            let mut known = self.known.get();
            match becomes {
                Some(replicas) => drop(known.own.insert(place, replicas)),
                None => drop(known.own.remove(&place)),
            }
        }
    }

    /// Some regions, or none: everywhere.
    fn some_regions(&self) -> Vec<Name> {
        if self.dice.chance(600) {
            return Vec::new();
        }
        let all: Vec<Name> = self.world.regions().iter().map(|site| site.name.clone()).collect();
        all.into_iter().filter(|_| self.dice.chance(500)).collect()
    }

    /// A global app comes, changes or goes.
    async fn wide_turn(&self, turn: u64) {
        let (project, which) = (name(PROJECT), name(&format!("wide-{}-{}", self.id, self.dice.below(2))));
        let was = self.known.get().wide.get(&which).cloned();
        let wide = Wide { replicas: self.dice.range(1, 6) as u32, regions: self.some_regions() };
        let spec = json!({"spec": {"replicas": wide.replicas, "regions": wide.regions}});
        let (change, becomes) = match (&was, self.dice.below(3)) {
            (None, _) => (wide_app(&which, &project, &wide), Some(wide)),
            (Some(_), 0) => (Change::Delete, None),
            (Some(_), _) => (Change::Patch { patch: spec }, Some(wide)),
        };
        let decided = self.ask("apps", Some(&project), &which, change, &self.global(), &turn.to_string()).await;
        if self.judge(which.as_str(), was.is_some(), decided) {
            self.world.trace.count("global apps: changes");
            let mut known = self.known.get();
            match becomes {
                Some(wide) => drop(known.wide.insert(which, wide)),
                None => drop(known.wide.remove(&which)),
            }
        }
    }

    /// A project comes or goes with all that is in it, here and there.
    async fn project_turn(&self, own: &Name, turn: u64, is_there: &mut bool) {
        if *is_there {
            let decided = self.ask("projects", None, own, Change::Delete, &self.global(), &turn.to_string()).await;
            if self.judge(own.as_str(), true, decided) {
                self.world.trace.count("projects of a fleet deleted");
                *is_there = false;
            }
            return;
        }
        let spec = ProjectSpec { organization: name("default"), ..ProjectSpec::default() };
        let object = Object::<Project>::new(Metadata::new(own.clone(), None), spec).to_any();
        let create = Change::Create { object };
        // The name is free again only when the last of its contents is torn down, in every region.
        let decided = self.ask("projects", None, own, create, &self.global(), &turn.to_string()).await;
        if !matches!(decided, Some(Ok(_))) {
            return;
        }
        *is_there = true;
        import_image(&self.world, &self.dice, own, &self.global()).await;
        let wide = Wide { replicas: self.dice.range(1, 4) as u32, regions: self.some_regions() };
        let (which, change) = (name("wide"), wide_app(&name("wide"), own, &wide));
        let _ = self.ask("apps", Some(own), &which, change, &self.global(), &format!("{turn}-wide")).await;
        // What one region is promised, the next request to another can rely on, unless that one says that it is cut off.
        let (site, which) = (self.site().clone(), name("inner"));
        let _turned = self.known.turn_to(&site.name);
        let change = app(&which, own, 1);
        let way = Way::of_region(&site.nodes);
        let _ = self.ask("apps", Some(own), &which, change, &way, &format!("{turn}-inner")).await;
    }
}

fn wide_app(object: &Name, project: &Name, wide: &Wide) -> Change {
    let Change::Create { mut object } = app(object, project, wide.replicas) else { unreachable!("`app` creates") };
    object.spec["regions"] = json!(wide.regions);
    Change::Create { object }
}
