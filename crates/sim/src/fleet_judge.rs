//! What must be true of a fleet when nothing is broken any more: every region shows the same global objects, global apps have
//! their children exactly where they should, what was deleted is gone everywhere, and use is what a recount finds.

use std::collections::{BTreeMap, BTreeSet};

use nexus_control::world::World as Rows;
use nexus_model::kind::{App, Kind};
use nexus_model::object::ConditionStatus;
use nexus_model::{Name, Object};

use crate::fleet_users::{Wide, Wishes};
use crate::judge::{Ground, difference, undead};
use crate::region::name;
use crate::users::PROJECT;
use crate::world::World;

/// How many replicas of a global app each region runs: evenly, the first by name take what is left over, and whoever runs
/// it runs at least one.
fn shares(world: &World, wide: &Wide) -> BTreeMap<Name, u32> {
    let all: BTreeSet<Name> = world.regions().iter().map(|site| site.name.clone()).collect();
    let mine: Vec<Name> = all.into_iter().filter(|n| wide.regions.is_empty() || wide.regions.contains(n)).collect();
    let (count, total) = (mine.len() as u32, wide.replicas);
    let of = |i: usize| (total / count + u32::from((i as u32) < total % count)).max(u32::from(total > 0));
    mine.into_iter().enumerate().map(|(i, region)| (region, of(i))).collect()
}

/// What a region should have in [`PROJECT`].
fn wanted(world: &World, known: &Wishes, region: &Name) -> BTreeMap<Name, u32> {
    let own = known.own.iter().filter(|((r, _), _)| r == region).map(|((_, app), replicas)| (app.clone(), *replicas));
    let wide = known.wide.iter().filter_map(|(app, wide)| Some((app.clone(), *shares(world, wide).get(region)?)));
    own.chain(wide).collect()
}

type Use = [u64; 3];

fn add(sum: &mut Use, part: Use) {
    sum.iter_mut().zip(part).for_each(|(total, part)| *total += part);
}

fn used(use_: &nexus_model::kind::QuotaUse) -> Use {
    [u64::from(use_.instances), u64::from(use_.cpu.0), use_.memory.0]
}

/// What the apps of a region take, by project.
fn recount(w: &Rows) -> BTreeMap<Name, Use> {
    let mut sums: BTreeMap<Name, Use> = BTreeMap::new();
    for app in w.apps.live.values() {
        let Some(project) = app.metadata.project.clone() else { continue };
        let (n, r) = (u64::from(app.spec.replicas), app.spec.parts().reserved());
        add(sums.entry(project).or_default(), [n, n * u64::from(r.cpu.0), n * r.memory.0]);
    }
    sums
}

/// What a region's rows say of its use is what its apps take, and they are of projects that there are.
fn wrong_use(w: &Rows) -> Option<String> {
    let is: BTreeMap<Name, Use> =
        w.usages.live.values().map(|u| (u.metadata.name.clone(), used(&u.status.used))).collect();
    let should = recount(w);
    if let Some((project, used)) =
        is.iter().find(|(project, used)| should.get(*project).copied().unwrap_or_default() != **used)
    {
        return Some(format!("{used:?} counted as the use of project {project}, {should:?} in use"));
    }
    if let Some(project) = should.keys().find(|project| !is.contains_key(*project)) {
        return Some(format!("project {project} uses something, and no row says so"));
    }
    let gone = |u: &&Object<nexus_model::kind::Usage>| {
        let owner = u.metadata.owner.as_ref().map(|o| o.uid);
        w.fleet().projects.get(None, &u.metadata.name).map(|p| p.metadata.uid) != owner
    };
    w.usages.live.values().find(gone).map(|u| format!("use of project {}, which is no more", u.metadata.name))
}

/// The global objects as one server shows them.
fn wrong_fleet(world: &World, w: &Rows, known: &Wishes) -> Option<String> {
    let (fleet, project) = (w.fleet(), name(PROJECT));
    let shown: BTreeMap<Name, Wide> = fleet
        .apps
        .within(&project)
        .map(|a| (a.metadata.name.clone(), Wide { replicas: a.spec.replicas, regions: a.spec.regions.clone() }))
        .collect();
    if shown != known.wide {
        return Some(format!("global apps {shown:?}, wanted are {:?}", known.wide));
    }
    if let Some(trouble) = undead(fleet) {
        return Some(trouble);
    }
    let ready = |r: &Object<nexus_model::kind::Region>| {
        r.status.conditions.iter().any(|c| c.kind == "Ready" && c.status == ConditionStatus::True)
    };
    let regions: BTreeSet<Name> =
        fleet.regions.live.values().filter(|r| ready(r)).map(|r| r.metadata.name.clone()).collect();
    if regions != world.regions().iter().map(|site| site.name.clone()).collect() {
        return Some(format!("regions {regions:?} as ready"));
    }
    for app in fleet.apps.live.values() {
        let wide = Wide { replicas: app.spec.replicas, regions: app.spec.regions.clone() };
        let parts: BTreeMap<Name, u32> =
            app.status.regions.iter().map(|r| (r.region.clone(), r.desired_replicas)).collect();
        if parts != shares(world, &wide) {
            return Some(format!("global app {} with parts {parts:?}", app.metadata.name));
        }
    }
    // A region's children are owned by the global apps that there are now.
    let parent = |child: &Object<App>| {
        let owner = child.metadata.owner.as_ref().filter(|o| o.kind == App::KIND)?;
        let place = (child.metadata.project.clone(), child.metadata.name.clone());
        Some(fleet.apps.live.get(&place).is_some_and(|app| app.metadata.uid == owner.uid))
    };
    let orphan = w.apps.live.values().find(|child| parent(child) == Some(false));
    orphan.map(|child| format!("{}, whose global app is no more", child.metadata.name))
}

/// The first thing of a fleet that is not as it should be.
pub fn fleet_difference(world: &World, grounds: &[Ground], known: &Wishes) -> Option<String> {
    let mut total = Use::default();
    let mut ready: BTreeMap<Name, u32> = BTreeMap::new();
    let here: BTreeSet<&Name> = world.regions().iter().map(|site| &site.name).collect();
    for ground in grounds.iter().filter(|ground| here.contains(&ground.site.name)) {
        let region = &ground.site.name;
        if let Some(trouble) = difference(world, ground, &wanted(world, known, region)) {
            return Some(format!("region {region}: {trouble}"));
        }
        for (i, node) in ground.site.nodes.iter().enumerate() {
            let Some(server) = world.server(*node) else { return Some(format!("server {node} is down")) };
            let Some(part) = &server.part else { continue };
            let trouble = part.view.read(|w| {
                if i == 0 {
                    add(&mut total, recount(w).get(&name(PROJECT)).copied().unwrap_or_default());
                    for app in w.apps.live.values().filter(|a| known.wide.contains_key(&a.metadata.name)) {
                        let n = w.instances_of(app.metadata.uid).filter(|i| i.status.ready).count();
                        *ready.entry(app.metadata.name.clone()).or_default() += n as u32;
                    }
                }
                wrong_use(w).or_else(|| wrong_fleet(world, w, known))
            });
            if let Some(trouble) = trouble {
                return Some(format!("server {node} of region {region} shows {trouble}"));
            }
        }
    }
    for node in world.present() {
        let Some(server) = world.server(node) else { return Some(format!("server {node} is down")) };
        let Some(part) = &server.part else { continue };
        let trouble = part.view.read(|w| {
            let fleet = w.fleet();
            let counted = fleet.projects.get(None, &name(PROJECT)).map(|p| used(&p.status.used));
            if counted != Some(total) {
                return Some(format!("{counted:?} as the use of {PROJECT} in all regions, which is {total:?}"));
            }
            let told =
                |app: &&Object<App>| ready.get(&app.metadata.name).copied().unwrap_or(0) == app.status.ready_replicas;
            let wrong = fleet.apps.live.values().find(|app| !told(app));
            wrong.map(|app| {
                format!("{} ready replicas of {}, of {ready:?}", app.status.ready_replicas, app.metadata.name)
            })
        });
        if let Some(trouble) = trouble {
            return Some(format!("server {node} shows {trouble}"));
        }
    }
    None
}
