//! Policy: decisions on one core, with 100 custom policies in the organization, 10,000 entities, and no question asked twice.
//!
//! The peer is Cedar itself as its documentation shows it: all policies in one set, all entities in one store that is made
//! beforehand. It is asked the same questions in the same rounds, fewer of them. Both must give the same answers.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use cedar_policy::{
    Authorizer, Context, Entities, Entity, EntityUid, PolicySet, Request as Question, RestrictedExpression,
};
use nexus_iam::policy::{
    Binding, Change, Circumstances, Engine, PolicyText, Principal, ROLES, Reach, Request, Resource, Role, Surface,
    Vocabulary,
};
use nexus_model::selector::Labels;
use nexus_model::{Timestamp, kind};

use crate::report::{Row, cpu_seconds, median, percentile};

pub const ORGANIZATION: &str = "acme";
pub const USERS: usize = 4_000;
const GROUPS: usize = 500;
pub const PROJECTS: usize = 500;
pub const APPS: usize = 5_000;
pub const POLICIES: usize = 100;
const ROUNDS: usize = 5;
const QUESTIONS: usize = 40_000;
const PEER_QUESTIONS: usize = 500;
const ACTIONS: [&str; 4] = ["apps:get", "apps:update", "apps:delete", "apps:create"];
const PEER: &str = "Cedar, all at once";

struct World {
    engine: Engine,
    users: Vec<Principal>,
    labels: Vec<Labels>,
    /// Of each app: its project, name and labels' place.
    apps: Vec<(String, String, usize)>,
    peer_set: PolicySet,
    peer_entities: Entities,
}

/// A fifth of the policies each: by group, by label, by address, by time, a guard-rail.
pub fn policy(n: usize) -> (bool, String) {
    let group = n * 5 % GROUPS;
    match n % 5 {
        0 => (false, format!("permit (principal in Group::\"acme/g{group}\", action in Action::\"edit\", resource);")),
        1 => (
            false,
            format!(
                "permit (principal in Group::\"acme/g{group}\", action in Action::\"view\", resource) \
                 when {{ resource.hasTag(\"team\") && resource.getTag(\"team\") == \"t{n}\" }};"
            ),
        ),
        2 => (
            false,
            format!(
                "permit (principal in Group::\"acme/g{group}\", action == Action::\"apps:update\", resource) \
                 when {{ context.ip.isInRange(ip(\"10.{n}.0.0/16\")) }};"
            ),
        ),
        3 => (
            false,
            format!(
                "forbid (principal, action == Action::\"apps:delete\", resource in Project::\"p{}\") \
                 unless {{ context.mfa }};",
                n * 3 % PROJECTS
            ),
        ),
        _ => (
            true,
            format!(
                "forbid (principal, action in [Action::\"apps:delete\", Action::\"apps:update\"], resource is App) \
                 when {{ resource.hasTag(\"lock\") && resource.getTag(\"lock\") == \"l{n}\" }};"
            ),
        ),
    }
}

pub fn groups_of(user: usize) -> Vec<usize> {
    (0..1 + user % 4).map(|k| (user * 7 + k * 131) % GROUPS).collect()
}

/// The group that has a project's role, and the role.
pub fn role_of(project: usize) -> (usize, Role) {
    (project * 3 % GROUPS, if project.is_multiple_of(2) { Role::Editor } else { Role::Viewer })
}

fn string(text: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(text.to_owned())
}

fn uid(text: &str) -> anyhow::Result<EntityUid> {
    text.parse().with_context(|| format!("reading {text}"))
}

fn circumstances() -> Circumstances<'static> {
    Circumstances {
        ip: IpAddr::V4(Ipv4Addr::new(10, 7, 0, 1)),
        time: Timestamp::from_millis(1_790_000_000_000),
        mfa: false,
        request_id: "bench",
    }
}

fn vocabulary() -> anyhow::Result<Arc<Vocabulary>> {
    let extras = [("status", "get"), ("blobs", "get"), ("blobs", "put")];
    let verbs = [("instances", "logs"), ("instances", "exec")];
    let surface = Surface { kinds: kind::all(), verbs: &verbs, operations: &[], extras: &extras };
    Ok(Arc::new(Vocabulary::new(surface)?))
}

fn world() -> anyhow::Result<World> {
    let vocabulary = vocabulary()?;
    let mut engine = Engine::new(vocabulary.clone())?;
    let group = |n: usize| Principal::group(ORGANIZATION, &format!("g{n}"));
    let users: Vec<Principal> = (0..USERS).map(|n| Principal::user(ORGANIZATION, &format!("u{n}"))).collect();
    let organization = "Organization::\"acme\"";
    let mut entities = vec![Entity::with_uid(uid("Fleet::\"fleet\"")?)];
    entities.push(Entity::new_no_attrs(uid(organization)?, [uid("Fleet::\"fleet\"")?].into()));
    for (n, principal) in users.iter().enumerate() {
        let groups = groups_of(n);
        let mut parents = vec![uid(organization)?];
        for g in &groups {
            parents.push(uid(&group(*g).to_string())?);
        }
        let attributes = [("name".to_owned(), string(principal.name())), ("organization".to_owned(), string("acme"))];
        entities.push(Entity::new_with_tags(uid(&principal.to_string())?, attributes, parents, [])?);
        engine
            .apply(Change::Member { principal: principal.clone(), groups: groups.into_iter().map(group).collect() })?;
    }
    for n in 0..GROUPS {
        entities.push(Entity::with_uid(uid(&group(n).to_string())?));
    }
    let mut texts = ROLES.to_owned();
    for n in 0..PROJECTS {
        let project = format!("p{n}");
        let (g, role) = role_of(n);
        let reach = Reach::project(ORGANIZATION, &project);
        let binding = Binding { name: project.as_str().into(), role, reach, subjects: vec![group(g)] };
        engine.apply(Change::Binding(binding))?;
        // Plain Cedar has no roles over a resource; the nearest is a policy for each binding.
        let may = if role == Role::Editor { "[Action::\"view\", Action::\"edit\"]" } else { "[Action::\"view\"]" };
        texts.push_str(&format!(
            "\npermit (principal in {}, action in {may}, resource in Project::\"{project}\");",
            group(g)
        ));
        entities.push(Entity::new_no_attrs(uid(&format!("Project::\"{project}\""))?, [uid(organization)?].into()));
    }
    for n in 0..POLICIES {
        let (guard_rail, text) = policy(n);
        texts.push('\n');
        texts.push_str(&text);
        let (name, reach) = (format!("c{n}").as_str().into(), Reach::organization(ORGANIZATION));
        let text = PolicyText { name, reach, guard_rail, text: text.into() };
        nexus_iam::policy::check(&vocabulary, &text)?;
        engine.apply(Change::Policy(text))?;
    }
    let pairs = |n: usize| {
        [("team".to_owned(), format!("t{}", n % POLICIES)), ("lock".to_owned(), format!("l{}", n % (3 * POLICIES)))]
    };
    let labels: Vec<Labels> = (0..3 * POLICIES).map(|n| pairs(n).into_iter().collect()).collect();
    let mut apps = Vec::new();
    for n in 0..APPS {
        let (project, name) = (format!("p{}", n % PROJECTS), format!("a{n}"));
        let attributes = [("name", &*name), ("organization", ORGANIZATION), ("project", &*project), ("region", "eu")];
        let attributes = attributes.map(|(k, v)| (k.to_owned(), string(v)));
        let tags = labels[n % labels.len()].iter().map(|(k, v)| (k.clone(), string(v)));
        let own = uid(&format!("App::\"eu/{project}/{name}\""))?;
        entities.push(Entity::new_with_tags(own, attributes, [uid(&format!("Project::\"{project}\""))?], tags)?);
        apps.push((project, name, n % labels.len()));
    }
    let actions = vocabulary.schema().action_entities()?;
    let peer_entities = Entities::from_entities(entities, None)?.add_entities(actions.iter().cloned(), None)?;
    Ok(World { engine, users, labels, apps, peer_set: texts.parse()?, peer_entities })
}

/// The nth question: never the same principal, action and resource twice among the first 80 million. A half is about a
/// project in which the user's first group has a role, so that permits and refusals are both common.
fn question(n: usize) -> (usize, usize, usize) {
    let user = n * 17 % USERS;
    let app = if n.is_multiple_of(2) {
        let group = groups_of(user)[0];
        // The project whose group it is: 3p = g modulo the groups, and 3 × 167 is one.
        let project = group * 167 % PROJECTS;
        (project + PROJECTS * (n / USERS % (APPS / PROJECTS))) % APPS
    } else {
        (n * 31 + n / USERS) % APPS
    };
    (user, n / 3 % ACTIONS.len(), app)
}

fn ask(world: &World, n: usize) -> bool {
    let (user, action, app) = question(n);
    let (project, name, labels) = &world.apps[app];
    let resource = Resource::in_project("App", ORGANIZATION, project, "eu", name, &world.labels[*labels]);
    let request =
        Request { principal: &world.users[user], action: ACTIONS[action], resource, circumstances: circumstances() };
    world.engine.decide(&request).allowed
}

fn ask_peer(world: &World, n: usize) -> anyhow::Result<bool> {
    let (user, action, app) = question(n);
    let (project, name, _) = &world.apps[app];
    let usual = circumstances();
    let context = Context::from_pairs([
        ("ip".to_owned(), RestrictedExpression::new_ip(usual.ip.to_string())),
        ("time".to_owned(), RestrictedExpression::new_datetime(usual.time.to_string())),
        ("mfa".to_owned(), RestrictedExpression::new_bool(usual.mfa)),
        ("requestId".to_owned(), string(usual.request_id)),
    ])?;
    let action = uid(&format!("Action::\"{}\"", ACTIONS[action]))?;
    let on = uid(&format!("App::\"eu/{project}/{name}\""))?;
    let question = Question::new(uid(&world.users[user].to_string())?, action, on, context, None)?;
    let response = Authorizer::new().is_authorized(&question, &world.peer_set, &world.peer_entities);
    Ok(response.decision() == cedar_policy::Decision::Allow)
}

pub fn run() -> anyhow::Result<Vec<Row>> {
    let world = world()?;
    let (mut p50, mut p99, mut rate, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut peer_p50, mut peer_p99, mut peer_rate) = (Vec::new(), Vec::new(), Vec::new());
    let mut allowed = 0_usize;
    for round in 0..ROUNDS {
        eprintln!("round {} of {ROUNDS}", round + 1);
        let base = round * QUESTIONS;
        let (start, before) = (Instant::now(), cpu_seconds());
        allowed += (base..base + QUESTIONS).filter(|n| black_box(ask(&world, *n))).count();
        rate.push(QUESTIONS as f64 / start.elapsed().as_secs_f64());
        cpu.push((cpu_seconds() - before) / QUESTIONS as f64);
        let one = |n: usize| {
            let start = Instant::now();
            let answer = ask(&world, n);
            (start.elapsed().as_secs_f64() * 1e6, answer)
        };
        let answers: Vec<_> = (base..base + QUESTIONS).map(one).collect();
        let times: Vec<f64> = answers.iter().map(|a| a.0).collect();
        p50.push(percentile(&times, 0.5));
        p99.push(percentile(&times, 0.99));

        let mut times = Vec::new();
        let begin = Instant::now();
        for n in base..base + PEER_QUESTIONS {
            let start = Instant::now();
            let answer = ask_peer(&world, n)?;
            times.push(start.elapsed().as_secs_f64() * 1e6);
            if answer != answers[n - base].1 {
                bail!("the figures are void: question {n} is answered {} here, {answer} by plain Cedar", !answer);
            }
        }
        peer_rate.push(PEER_QUESTIONS as f64 / begin.elapsed().as_secs_f64());
        peer_p50.push(percentile(&times, 0.5));
        peer_p99.push(percentile(&times, 0.99));
    }
    let share = allowed as f64 / (ROUNDS * QUESTIONS) as f64;
    Ok(vec![
        Row::new("decisions", median(&rate), "1/s").peer(PEER, median(&peer_rate)).cpu_per_op(median(&cpu)),
        Row::new("decision p50", median(&p50), "us").peer(PEER, median(&peer_p50)),
        Row::new("decision p99", median(&p99), "us").peer(PEER, median(&peer_p99)),
        Row::new("share that is allowed", share, "1"),
    ])
}
