//! `nexus delete --cascade`: takes what uses a network, or a part of one, along.
//!
//! The plan is made first, from what the API lists, and shown. What lies in a doomed object goes with it: a network's subnets, groups,
//! route tables, peerings, gateways and zones, a subnet's balancers and NICs that somebody made. What only names one is changed so that
//! it does so no longer, and means what it meant: a route, a balancer's target, a group's rule, a floating address's binding. Apps and
//! jobs are the user's work: they are named and nothing is done, unless they are among what is to be deleted. Nor is a NIC left
//! without a group, which would open it.
//!
//! Each step is one change that the API admits by itself, in an order in which nothing is used when it goes. So whoever breaks it off
//! leaves a sound state, and begins again with the same command.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, IsTerminal as _};
use std::time::Duration;

use nexus_model::Name;
use nexus_model::kind::{self, KindDescriptor};
use reqwest::Method;
use reqwest::header::IF_MATCH;
use serde_json::{Value, json};

use super::cloud::{Cloud, Listing, absent};
use super::{output, resource};
use crate::client::Parts;
use crate::exit::{Exit, Fail};

/// What can take others along, in the order in which it goes: what is used behind what uses it.
const ORDER: [&str; 13] = [
    "apps",
    "jobs",
    "cron-jobs",
    "load-balancers",
    "dns-zones",
    "nics",
    "floating-ips",
    "subnets",
    "security-groups",
    "route-tables",
    "peerings",
    "nat-gateways",
    "internet-gateways",
];
/// Behind all of these.
const LAST: [&str; 2] = ["prefix-lists", "networks"];
/// Whose templates have NICs, and where.
const TEMPLATES: [(&str, &str); 3] =
    [("apps", "/spec/nics"), ("jobs", "/spec/template/nics"), ("cron-jobs", "/spec/job/template/nics")];

/// A kind's collection, and a name in it.
pub type Id = (&'static str, Name);

/// The objects of a project that may matter, by kind.
pub type Found = BTreeMap<&'static str, Vec<Value>>;

#[derive(Debug, Clone, PartialEq)]
enum Act {
    /// The new content of spec fields; and why, in a few words.
    Change {
        patch: Value,
        revision: u64,
        why: String,
    },
    Delete,
}

/// What is done, in order; or who is in the way.
#[derive(Debug, Default)]
pub struct Plan {
    steps: Vec<(Id, Act)>,
    refusals: Vec<String>,
}

fn plurals() -> impl Iterator<Item = &'static str> {
    ORDER.into_iter().chain(LAST)
}

fn describe(plural: &str) -> &'static KindDescriptor {
    kind::find(plural).expect("a kind")
}

fn title(id: &Id) -> String {
    resource::title(describe(id.0), id.1.as_str())
}

fn name(object: &Value) -> Name {
    let text = object["metadata"]["name"].as_str().unwrap_or_default();
    text.parse().expect("objects of the API have well-formed names")
}

/// Whether a field of a spec names this.
fn says(object: &Value, field: &str, id: &Id) -> bool {
    object["spec"][field] == id.1.as_str()
}

fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The instance with which a NIC was made, if it was made so.
fn made_with(nic: &Value) -> Option<&str> {
    let owner = &nic["metadata"]["owner"];
    (owner["kind"] == "Instance").then(|| owner["name"].as_str()).flatten()
}

/// The whole plan for deleting these.
struct Planner<'a> {
    found: &'a Found,
    doomed: BTreeSet<Id>,
    refusals: Vec<String>,
}

impl<'a> Planner<'a> {
    fn of(&self, plural: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
        self.found.get(plural).into_iter().flatten()
    }

    fn is_doomed(&self, plural: &'static str, object: &Value) -> bool {
        self.doomed.contains(&(plural, name(object)))
    }

    /// Dooms what lies in what is doomed.
    fn spread(&mut self) {
        let mut queue: Vec<Id> = self.doomed.iter().cloned().collect();
        while let Some(id) = queue.pop() {
            let within: &[(&'static str, &str)] = match id.0 {
                "networks" => &[
                    ("subnets", "network"),
                    ("security-groups", "network"),
                    ("route-tables", "network"),
                    ("peerings", "network"),
                    ("nat-gateways", "network"),
                    ("internet-gateways", "network"),
                    ("dns-zones", "network"),
                ],
                "subnets" => &[("load-balancers", "subnet"), ("nics", "subnet")],
                _ => &[],
            };
            for (plural, field) in within {
                for object in self.of(plural).filter(|o| says(o, field, &id)) {
                    // One that was made with an instance goes with that.
                    let next = (*plural, name(object));
                    if made_with(object).is_none() && self.doomed.insert(next.clone()) {
                        queue.push(next);
                    }
                }
            }
        }
    }

    /// Names the apps and jobs that are in the way, and instances that still have a NIC of theirs.
    fn refuse_workloads(&mut self) {
        let mut blamed = BTreeSet::new();
        for (plural, pointer) in TEMPLATES {
            for object in self.of(plural) {
                let finished = plural == "jobs" && !object["status"]["finished"].is_null();
                if self.is_doomed(plural, object) || finished {
                    continue;
                }
                if let Some(used) = list(object, pointer).iter().find_map(|nic| self.uses(nic)) {
                    blamed.insert(name(object).to_string());
                    let why = format!("{} has NICs by {}", title(&(plural, name(object))), title(&used));
                    self.refusals.push(why);
                }
            }
        }
        let instances: BTreeMap<String, &Value> = self.of("instances").map(|i| (name(i).to_string(), i)).collect();
        for nic in self.of("nics") {
            let Some(instance) = made_with(nic) else { continue };
            // An app's or a job's: `spec.app` names either.
            let of = instances.get(instance).map(|i| &i["spec"]);
            let of =
                of.and_then(|spec| Some((if spec["job"].is_null() { "apps" } else { "jobs" }, spec["app"].as_str()?)));
            let goes = of.is_some_and(|(plural, of)| {
                blamed.contains(of) || self.doomed.iter().any(|id| id.0 == plural && id.1.as_str() == of)
            });
            if let Some(used) = self.uses(&nic["spec"]).filter(|_| !goes) {
                self.refusals.push(format!(
                    "instance/{instance} has {} by {}",
                    title(&("nics", name(nic))),
                    title(&used)
                ));
            }
        }
    }

    /// A doomed subnet or group that a NIC, or a template's, names.
    fn uses(&self, nic: &Value) -> Option<Id> {
        let of = |plural: &'static str, word: &Value| {
            let id: Id = (plural, word.as_str()?.parse().ok()?);
            self.doomed.contains(&id).then_some(id)
        };
        let groups = || list(nic, "/securityGroups").iter().find_map(|g| of("security-groups", g));
        of("subnets", &nic["subnet"]).or_else(groups)
    }

    fn change(steps: &mut Vec<(Id, Act)>, plural: &'static str, object: &Value, spec: Value, why: impl Into<String>) {
        let revision = object["metadata"]["revision"].as_u64().unwrap_or(0);
        steps.push(((plural, name(object)), Act::Change { patch: json!({ "spec": spec }), revision, why: why.into() }));
    }

    fn names_doomed(&self, plural: &'static str, word: &Value) -> bool {
        let parsed = word.as_str().and_then(|word| word.parse::<Name>().ok());
        parsed.is_some_and(|name| self.doomed.contains(&(plural, name)))
    }

    /// Whether a route leads to what goes.
    fn leads_there(&self, table: &Value, via: &Value) -> bool {
        let gateway =
            |g: &Value| self.is_doomed("internet-gateways", g) && g["spec"]["network"] == table["spec"]["network"];
        self.names_doomed("nics", &via["nic"])
            || self.names_doomed("peerings", &via["peering"])
            || self.names_doomed("nat-gateways", &via["nat"])
            || (*via == "internet" && self.of("internet-gateways").any(gateway))
    }

    /// What names a doomed object and stays, or has to let go of one before either can go.
    fn changes(&mut self) -> Vec<(Id, Act)> {
        let mut steps = Vec::new();
        let closed: Vec<&Value> =
            self.of("internet-gateways").filter(|g| self.is_doomed("internet-gateways", g)).collect();
        for floating in self.of("floating-ips").filter(|f| !self.is_doomed("floating-ips", f)) {
            let nic = self.of("nics").find(|nic| floating["spec"]["nic"] == name(nic).as_str());
            let Some(nic) = nic else { continue };
            // It is released with its instance, which goes before.
            if made_with(nic).is_some() && self.names_doomed("subnets", &nic["spec"]["subnet"]) {
                continue;
            }
            let network = &nic["status"]["network"]["name"];
            if self.is_doomed("nics", nic) || closed.iter().any(|g| g["spec"]["network"] == *network) {
                let why = format!("leads nowhere any more, instead of to {}", title(&("nics", name(nic))));
                Self::change(&mut steps, "floating-ips", floating, json!({ "nic": null }), why);
            }
        }
        for table in self.of("route-tables") {
            let routes = list(table, "/spec/routes");
            let (gone, kept): (Vec<_>, Vec<_>) = routes.iter().partition(|r| self.leads_there(table, &r["via"]));
            if !gone.is_empty() {
                let to: Vec<&str> = gone.iter().filter_map(|r| r["to"].as_str()).collect();
                let why = format!("loses its routes to {}", to.join(", "));
                Self::change(&mut steps, "route-tables", table, json!({ "routes": kept }), why);
            }
        }
        for balancer in self.of("load-balancers").filter(|b| !self.is_doomed("load-balancers", b)) {
            let mut listeners = balancer["spec"]["listeners"].clone();
            let mut gone = 0;
            for listener in listeners.as_array_mut().into_iter().flatten() {
                let Some(targets) = listener["targets"].as_array_mut() else { continue };
                let before = targets.len();
                targets.retain(|target| !self.names_doomed("nics", &target["to"]["nic"]));
                gone += before - targets.len();
            }
            if gone > 0 {
                let spec = json!({ "listeners": listeners });
                Self::change(&mut steps, "load-balancers", balancer, spec, format!("loses {gone} targets"));
            }
        }
        for nic in self.of("nics").filter(|nic| made_with(nic).is_none()) {
            if self.is_doomed("nics", nic) {
                continue;
            }
            let groups = list(nic, "/spec/securityGroups");
            let (gone, kept): (Vec<_>, Vec<_>) = groups.iter().partition(|g| self.names_doomed("security-groups", g));
            if gone.is_empty() {
                continue;
            }
            if kept.is_empty() {
                let why = "would be without a group, which lets it reach everybody: give it another, or delete it";
                self.refusals.push(format!("{} {why}", title(&("nics", name(nic)))));
                continue;
            }
            Self::change(&mut steps, "nics", nic, json!({ "securityGroups": kept }), "leaves the group");
        }
        for subnet in self.of("subnets").filter(|s| !self.is_doomed("subnets", s)) {
            if self.names_doomed("route-tables", &subnet["spec"]["routeTable"]) {
                Self::change(
                    &mut steps,
                    "subnets",
                    subnet,
                    json!({ "routeTable": null }),
                    "has no routes beyond its network any more",
                );
            }
        }
        for group in self.of("security-groups") {
            let own = Value::String(name(group).to_string());
            let stays = !self.is_doomed("security-groups", group);
            for rule in list(group, "/spec/rules").iter().filter(|rule| stays && rule["action"] == "deny") {
                if self.rule(&own, rule).as_ref() != Some(rule) {
                    let why = "would let in or out what it refuses now: change it first";
                    let id = rule["id"].as_str().unwrap_or("-");
                    self.refusals.push(format!("{}, rule {id}, {why}", title(&("security-groups", name(group)))));
                }
            }
            let rules: Vec<Value> =
                list(group, "/spec/rules").iter().filter_map(|rule| self.rule(&own, rule)).collect();
            if rules != list(group, "/spec/rules") {
                let gone = list(group, "/spec/rules").len() - rules.len();
                let why = match gone {
                    0 => "has rules that name fewer".to_owned(),
                    gone => format!("loses {gone} rules that are about nobody else"),
                };
                Self::change(&mut steps, "security-groups", group, json!({ "rules": rules }), why);
            }
        }
        steps
    }

    /// A rule without those of its remotes that go: nobody is in these any more. One that is about nobody else goes whole, for a rule
    /// without remotes is about everybody. Its own group a group may name until its end.
    fn rule(&self, own: &Value, rule: &Value) -> Option<Value> {
        let remotes = list(rule, "/remotes");
        let goes = |remote: &&Value| {
            (self.names_doomed("security-groups", &remote["group"]) && remote["group"] != *own)
                || self.names_doomed("prefix-lists", &remote["prefixList"])
        };
        let kept: Vec<&Value> = remotes.iter().filter(|remote| !goes(remote)).collect();
        if kept.len() == remotes.len() {
            return Some(rule.clone());
        }
        let mut rule = rule.clone();
        rule["remotes"] = json!(kept);
        (!kept.is_empty()).then_some(rule)
    }
}

impl Plan {
    /// What it takes to delete these.
    pub fn make(asked: &[Id], found: &Found) -> Self {
        let mut planner = Planner { found, doomed: asked.iter().cloned().collect(), refusals: Vec::new() };
        planner.spread();
        planner.refuse_workloads();
        let changes = planner.changes();
        let Planner { doomed, mut refusals, .. } = planner;
        let mut steps = Vec::new();
        for plural in plurals() {
            let all = found.get(plural).into_iter().flatten();
            for object in all.filter(|o| doomed.contains(&(plural, name(o)))) {
                if object["metadata"]["deletionProtection"] == true {
                    refusals.push(format!("{} is protected from deletion", title(&(plural, name(object)))));
                }
            }
            // Workloads go first of all: with their NICs, what names these is free. Groups change when nobody is in them.
            let (groups, of) = (plural == "security-groups", doomed.iter().filter(|id| id.0 == plural));
            let deletes = of.map(|id| (id.clone(), Act::Delete));
            if plural == "load-balancers" {
                steps.extend(changes.iter().filter(|((p, _), _)| *p != "security-groups").cloned());
            }
            if groups {
                steps.extend(changes.iter().filter(|((p, _), _)| *p == "security-groups").cloned());
            }
            steps.extend(deletes);
        }
        refusals.sort();
        refusals.dedup();
        Self { steps, refusals }
    }

    /// Why nothing is done.
    fn refused(&self) -> Option<Fail> {
        let refusals = &self.refusals;
        let advice = "delete or change them first, or name apps and jobs beside it";
        (!refusals.is_empty())
            .then(|| Fail::conflict(format!("nothing was changed: {}; {advice}", refusals.join("; "))))
    }

    fn text(&self) -> String {
        let line = |(id, act): &(Id, Act)| match act {
            Act::Delete => format!("  delete  {}", title(id)),
            Act::Change { why, .. } => format!("  change  {}: {why}", title(id)),
        };
        self.steps.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

/// How `--cascade` goes on.
pub struct Manner {
    /// Without a question.
    pub yes: bool,
    /// Waits until nothing is left of each.
    pub wait: Option<Duration>,
    /// For workloads, which are waited for in any case: their NICs go with them.
    pub patience: Duration,
    pub ignore_not_found: bool,
}

fn confirm() -> anyhow::Result<()> {
    if !std::io::stdin().is_terminal() {
        return Err(Fail::usage("nobody is there to confirm: add --yes").into());
    }
    output::note("Go on? Type yes:");
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    if line.trim() == "yes" { Ok(()) } else { Err(Fail::conflict("nothing was changed").into()) }
}

/// Everything of the context's project that may have to do with it.
async fn look(cloud: &Cloud) -> anyhow::Result<Found> {
    let mut found = Found::new();
    for plural in plurals().chain(["instances"]) {
        let (objects, _) = cloud.list(describe(plural), &Listing::default(), |_| true).await?;
        found.insert(plural, objects);
    }
    Ok(found)
}

/// Deletes these with all that uses them.
pub async fn run(cloud: &Cloud, asked: Vec<(&'static KindDescriptor, Name)>, manner: &Manner) -> anyhow::Result<()> {
    let mut ids = Vec::new();
    for (kind, name) in asked {
        let Some(plural) = plurals().find(|plural| *plural == kind.plural) else {
            let message = format!("--cascade is for networks and what they are made of, not for {}", kind.plural);
            return Err(Fail::usage(message).into());
        };
        ids.push((plural, name));
    }
    let found = look(cloud).await?;
    let is_there = |id: &Id| found.get(id.0).into_iter().flatten().any(|o| name(o) == id.1);
    let (there, missing): (Vec<Id>, Vec<Id>) = ids.into_iter().partition(is_there);
    for id in &missing {
        if !manner.ignore_not_found {
            return Err(Fail::not_found(format!("{} not found; nothing was changed", title(id))).into());
        }
        output::text(&format!("{} not found", title(id)))?;
    }
    let plan = Plan::make(&there, &found);
    if let Some(refused) = plan.refused() {
        return Err(refused.into());
    }
    if plan.steps.len() > there.len() {
        output::note(&plan.text());
        if !manner.yes {
            confirm()?;
        }
    }
    let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
    for (done, step) in plan.steps.iter().enumerate() {
        let outcome = tokio::select! {
            biased;
            _ = &mut stop => {
                let left = plan.steps.len() - done;
                let message = format!("interrupted with {left} steps left: the same command goes on from here");
                return Err(Fail::new(Exit::Failed, message).into());
            }
            outcome = take(cloud, step, manner) => outcome,
        };
        outcome.map_err(|e| e.context(format!("{}; the same command goes on from here", title(&step.0))))?;
    }
    Ok(())
}

/// One step. What is gone already needs none.
async fn take(cloud: &Cloud, (id, act): &(Id, Act), manner: &Manner) -> anyhow::Result<()> {
    let path = cloud.object(describe(id.0), &id.1);
    match act {
        Act::Change { patch, revision, .. } => {
            let parts = Parts::merge_patch(patch)?.header(IF_MATCH, &format!("\"{revision}\""))?;
            match absent(cloud.client.json::<Value>(Method::PATCH, &path, parts).await)? {
                Some(_) => output::text(&format!("{} changed", title(id))),
                None => Ok(()),
            }
        }
        Act::Delete => {
            let is_workload = TEMPLATES.iter().any(|(plural, _)| *plural == id.0);
            let wait = if is_workload { Some(manner.patience) } else { manner.wait };
            match absent(cloud.delete(&path, wait).await)? {
                Some(false) if wait.is_some() => {
                    let seconds = wait.unwrap_or_default().as_secs();
                    let message = format!("deleted, but after {seconds} seconds its teardown still goes on");
                    Err(Fail::unavailable(message).into())
                }
                _ => output::text(&format!("{} deleted", title(id))),
            }
        }
    }
}

#[cfg(test)]
#[path = "cascade_tests.rs"]
mod tests;
