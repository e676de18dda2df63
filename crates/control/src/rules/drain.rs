//! What a drained host waits for, as its `Drained` condition says: which apps keep instances there, and why.
//!
//! Nothing is decided here. Whether an instance goes is its app's to decide, by [`rollout::keeps`]; this tells operators what
//! that comes to, with numbers.

use std::collections::BTreeSet;

use nexus_model::kind::*;
use nexus_model::object::{ConditionStatus, set_condition};
use nexus_model::{Name, Object, Timestamp, Uid};

use crate::rules::app;
use crate::rules::rollout::{self, Kept};
use crate::step::Step;
use crate::world::{World, app_uid};

const CONDITION: &str = "Drained";
/// So many apps are named.
const NAMED: usize = 3;

/// Tells the drained hosts that an app has instances on.
pub fn tell_hosts_of(step: &mut Step<'_>, app: Uid) {
    let drained = |name: &&Name| step.world.host(name).is_some_and(|host| host.spec.draining);
    let on = step.world.instances_of(app).filter_map(|i| i.status.host.as_ref());
    let hosts: BTreeSet<Name> = on.filter(drained).cloned().collect();
    hosts.iter().for_each(|name| tell(step, name));
}

/// Writes into a host's status what keeps it from being empty, or takes that away when nobody drains it.
pub fn tell(step: &mut Step<'_>, name: &Name) {
    let Some(host) = step.world.host(name) else { return };
    let mut new = host.clone();
    let conditions = &mut new.status.conditions;
    if host.spec.draining {
        let (status, reason, message) = of(step.world, name, step.now);
        set_condition(conditions, CONDITION, status, reason, &message, step.now);
    } else {
        conditions.retain(|c| c.kind != CONDITION);
    }
    if *conditions != host.status.conditions {
        step.put(new);
    }
}

fn of(world: &World, host: &Name, now: Timestamp) -> (ConditionStatus, &'static str, String) {
    let here: Vec<&Object<Instance>> = world.instances_on(host).filter(|i| i.metadata.deleting.is_none()).collect();
    if here.is_empty() {
        let left = world.instances_on(host).count();
        return match left {
            0 => (ConditionStatus::True, "Empty", "nothing is left here".into()),
            _ => (ConditionStatus::False, "Stopping", format!("the last {left} instances are being stopped")),
        };
    }
    let (mut blocked, mut waiting) = (Vec::new(), Vec::new());
    let apps: BTreeSet<(Option<&Name>, &Name, Uid)> = here
        .iter()
        .filter(|i| i.spec.job.is_none())
        .map(|i| (i.metadata.project.as_ref(), &i.spec.app, app_uid(i)))
        .collect();
    for (project, name, uid) in apps {
        let Some(app) = world.apps.get(project, name).filter(|app| app.metadata.uid == uid) else { continue };
        let (members, goals) = app::stand(world, app, now);
        let mine = |m: &&rollout::Member| here.iter().any(|i| i.metadata.uid == m.uid) && m.ready;
        let kept = members.iter().filter(mine).find_map(|m| Some((m, rollout::keeps(&members, goals, m, &[])?)));
        let Some((m, kept)) = kept else { continue };
        let instance = world.instance(m.uid).map_or("-", |i| i.metadata.name.as_str());
        let who = format!("app {}/{name}", project.map_or("-", |p| p.as_str()));
        match kept {
            Kept::Budget { standing, least, of } => blocked.push(format!(
                "{who}: {standing} of {of} ready, its budget wants {least} at least; instance {instance} stays until another \
                 is ready"
            )),
            Kept::Successor { standing, of } => waiting
                .push(format!("{who}: {standing} of {of} ready; instance {instance} stays until its successor is ready")),
            Kept::Silent => waiting.push(format!("{who}: the host is silent, so nobody knows of instance {instance}")),
        }
    }
    let reason = if blocked.is_empty() { "Draining" } else { "Budget" };
    blocked.extend(waiting);
    let more = blocked.len().saturating_sub(NAMED);
    blocked.truncate(NAMED);
    if more > 0 {
        blocked.push(format!("and {more} more apps"));
    }
    let message = if blocked.is_empty() { "its instances are moved".to_owned() } else { blocked.join(". ") };
    (ConditionStatus::False, reason, message)
}
