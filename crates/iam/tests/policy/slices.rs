//! The engine looks at few policies and few entities. Here it is held against Cedar with all policies of the request's scopes
//! in one set, over all entities with their hierarchy unflattened, and bindings found by going through all of them.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

use cedar_policy::{
    Authorizer, Context, Effect, Entities, Entity, EntityUid, PolicyId, PolicySet, Request as Question,
    RestrictedExpression,
};
use nexus_iam::policy::{
    Binding, Change, Engine, Level, PolicyText, Principal, ROLES, Reach, Request, Resource, Role, Vocabulary,
};
use nexus_model::selector::Labels;
use proptest::prelude::*;

use crate::common::{circumstances, everything, labels};

const PROJECTS: [(&str, &str); 4] = [("acme", "shop"), ("acme", "lab"), ("globex", "mill"), ("globex", "farm")];
const ORGANIZATIONS: [&str; 2] = ["acme", "globex"];
const PRINCIPAL: [&str; 8] = [
    "principal",
    "principal == User::\"acme/u1\"",
    "principal in Group::\"acme/g0\"",
    "principal in Group::\"globex/g1\"",
    "principal is User",
    "principal is User in Organization::\"globex\"",
    "principal in Role::\"viewer\"",
    "principal in Role::\"editor\"",
];
const ACTION: [&str; 6] = [
    "action",
    "action == Action::\"apps:get\"",
    "action in Action::\"view\"",
    "action in [Action::\"edit\", Action::\"admin\"]",
    "action in [Action::\"apps:update\", Action::\"projects:set-quota\"]",
    "action in Action::\"fleet-operate\"",
];
const RESOURCE: [&str; 6] = [
    "resource",
    "resource is App",
    "resource in Project::\"shop\"",
    "resource is App in Organization::\"acme\"",
    "resource == App::\"eu/shop/web\"",
    "resource in Fleet::\"fleet\"",
];
const CONDITION: [&str; 8] = [
    "",
    "when { resource.name == \"web\" }",
    "when { principal.organization == \"acme\" }",
    "when { resource has region && resource.region == \"eu\" }",
    "when { context.ip.isInRange(ip(\"10.0.0.0/8\")) }",
    "unless { principal in Role::\"owner\" }",
    "when { resource.hasTag(\"env\") && resource.getTag(\"env\") == \"prod\" }",
    "when { 9223372036854775807 + 1 == 0 }",
];

fn user(n: usize) -> Principal {
    Principal::user(ORGANIZATIONS[n / 3 % 2], &format!("u{n}"))
}

fn group(n: usize) -> Principal {
    Principal::group(ORGANIZATIONS[n % 2], &format!("g{n}"))
}

fn reach(n: usize) -> Reach {
    match n {
        0 | 1 => Reach::organization(ORGANIZATIONS[n]),
        n => Reach::project(PROJECTS[(n - 2) % 4].0, PROJECTS[(n - 2) % 4].1),
    }
}

#[derive(Debug, Clone)]
struct World {
    groups: Vec<Vec<Principal>>,
    bindings: Vec<Binding>,
    policies: Vec<PolicyText>,
}

fn text() -> impl Strategy<Value = String> {
    (any::<bool>(), 0..PRINCIPAL.len(), 0..ACTION.len(), 0..RESOURCE.len(), 0..CONDITION.len()).prop_map(
        |(permit, p, a, r, c)| {
            let effect = if permit { "permit" } else { "forbid" };
            format!("{effect} ({}, {}, {}) {};", PRINCIPAL[p], ACTION[a], RESOURCE[r], CONDITION[c])
        },
    )
}

fn worlds() -> impl Strategy<Value = World> {
    let groups = prop::collection::vec(prop::collection::btree_set(0..3_usize, 0..3), 6);
    let binding = (0..9_usize, 0..8_usize, 0..6_usize);
    let policy = (prop::collection::vec(text(), 1..3), 0..6_usize, any::<bool>());
    (groups, prop::collection::vec(binding, 0..8), prop::collection::vec(policy, 0..6)).prop_map(
        |(groups, bindings, policies)| World {
            groups: groups.into_iter().map(|g| g.into_iter().map(group).collect()).collect(),
            bindings: bindings
                .into_iter()
                .enumerate()
                .map(|(n, (subject, role, at))| Binding {
                    name: format!("b{n}").into(),
                    role: Role::ALL[role],
                    reach: if Role::ALL[role].is_of_fleet() { Reach::Fleet } else { reach(at) },
                    subjects: vec![if subject < 6 { user(subject) } else { group(subject - 6) }],
                })
                .collect(),
            policies: policies
                .into_iter()
                .enumerate()
                .map(|(n, (texts, at, rail))| {
                    let text = texts.join("\n");
                    let guard_rail = rail && at < 2 && !text.contains("permit");
                    PolicyText { name: format!("p{n}").into(), reach: reach(at), guard_rail, text: text.into() }
                })
                .collect(),
        },
    )
}

fn uid(text: &str) -> EntityUid {
    text.parse().unwrap()
}

fn string(text: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(text.to_owned())
}

fn covers(reach: &Reach, resource: &Resource<'_>, level: Level) -> bool {
    match reach {
        Reach::Fleet => true,
        Reach::Organization(o) => level <= Level::Organization && resource.organization == Some(o),
        Reach::Project { organization, project } => {
            level <= Level::Project && resource.organization == Some(organization) && resource.project == Some(project)
        }
    }
}

const LABELS: &[(&str, &str)] = &[("env", "prod")];

/// All that is not a user: the same in every world.
fn things() -> Entities {
    let mut all = vec![Entity::with_uid(uid("Fleet::\"fleet\""))];
    for o in ORGANIZATIONS {
        let attributes = [("name".to_owned(), string(o)), ("organization".to_owned(), string(o))];
        let own = uid(&format!("Organization::\"{o}\""));
        all.push(Entity::new_with_tags(own, attributes, [uid("Fleet::\"fleet\"")], []).unwrap());
    }
    for (o, p) in PROJECTS {
        let attributes = [("name".to_owned(), string(p)), ("organization".to_owned(), string(o))];
        let parents = [uid(&format!("Organization::\"{o}\""))];
        all.push(Entity::new_with_tags(uid(&format!("Project::\"{p}\"")), attributes, parents, []).unwrap());
        for (region, name) in [("eu", "web"), ("us", "web"), ("eu", "db")] {
            let attributes = [("name", name), ("organization", o), ("project", p), ("region", region)];
            let attributes = attributes.map(|(k, v)| (k.to_owned(), string(v)));
            let own = uid(&format!("App::\"{region}/{p}/{name}\""));
            let tags: Vec<_> = match name {
                "web" => labels(LABELS).iter().map(|(k, v)| (k.clone(), string(v))).collect(),
                _ => Vec::new(),
            };
            all.push(Entity::new_with_tags(own, attributes, [uid(&format!("Project::\"{p}\""))], tags).unwrap());
        }
    }
    for n in 0..3 {
        all.push(Entity::new_no_attrs(uid(&group(n).to_string()), HashSet::new()));
    }
    let actions = everything().schema().action_entities().unwrap();
    Entities::from_entities(all, None).unwrap().add_entities(actions.iter().cloned(), None).unwrap()
}

/// The plain way.
fn plainly(vocabulary: &Arc<Vocabulary>, world: &World, request: &Request<'_>) -> bool {
    static THINGS: LazyLock<Entities> = LazyLock::new(things);
    static BUILT_IN: LazyLock<PolicySet> = LazyLock::new(|| ROLES.parse().unwrap());
    let resource = &request.resource;
    let level = vocabulary.action(request.action).unwrap().level;
    let at = (0..6).position(|n| user(n) == *request.principal).unwrap();
    let mut all = Vec::new();
    for n in 0..6 {
        let who = user(n);
        let attributes = [("name", who.name()), ("organization", who.organization())];
        let attributes = attributes.map(|(k, v)| (k.to_owned(), string(v)));
        let mut parents: Vec<_> = world.groups[n].iter().map(|g| uid(&g.to_string())).collect();
        parents.push(uid(&format!("Organization::\"{}\"", who.organization())));
        if n == at {
            for binding in &world.bindings {
                let named = |s: &Principal| *s == who || world.groups[n].contains(s);
                if binding.subjects.iter().any(named) && covers(&binding.reach, resource, level) {
                    parents.push(uid(&format!("Role::\"{}\"", binding.role)));
                }
            }
        }
        all.push(Entity::new_with_tags(uid(&who.to_string()), attributes, parents, []).unwrap());
    }
    let entities = THINGS.clone().add_entities(all, None).unwrap();

    let mut set = BUILT_IN.clone();
    for policy in &world.policies {
        let here = covers(&policy.reach, resource, Level::Project);
        let may_permit = covers(&policy.reach, resource, level);
        let own: PolicySet = policy.text.parse().unwrap();
        for statement in own.policies().filter(|s| here && (may_permit || s.effect() == Effect::Forbid)) {
            set.add(statement.new_id(PolicyId::new(format!("{}/{}", policy.name, statement.id())))).unwrap();
        }
    }
    let usual = request.circumstances;
    let context = Context::from_pairs([
        ("ip".to_owned(), RestrictedExpression::new_ip(usual.ip.to_string())),
        ("time".to_owned(), RestrictedExpression::new_datetime(usual.time.to_string())),
        ("mfa".to_owned(), RestrictedExpression::new_bool(usual.mfa)),
        ("requestId".to_owned(), string(usual.request_id)),
    ]);
    let on = match (resource.kind, resource.region) {
        (kind, Some(region)) => format!("{kind}::\"{region}/{}/{}\"", resource.project.unwrap(), resource.name),
        (kind, None) => format!("{kind}::\"{}\"", resource.name),
    };
    let action = uid(&format!("Action::\"{}\"", request.action));
    let question =
        Question::new(uid(&request.principal.to_string()), action, uid(&on), context.unwrap(), None).unwrap();
    let response = Authorizer::new().is_authorized(&question, &set, &entities);
    let broken = response.diagnostics().errors().any(|e| {
        let cedar_policy::AuthorizationError::PolicyEvaluationError(e) = e;
        set.policy(e.policy_id()).is_some_and(|p| p.effect() == Effect::Forbid)
    });
    response.decision() == cedar_policy::Decision::Allow && !broken
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_sliced_decision_is_the_plain_one(world in worlds()) {
        let vocabulary = everything();
        let mut engine = Engine::new(vocabulary.clone()).unwrap();
        for (n, groups) in world.groups.iter().enumerate() {
            engine.apply(Change::Member { principal: user(n), groups: groups.clone() }).unwrap();
        }
        for binding in &world.bindings {
            engine.apply(Change::Binding(binding.clone())).unwrap();
        }
        for policy in &world.policies {
            engine.apply(Change::Policy(policy.clone())).unwrap();
        }
        let labelled = labels(LABELS);
        let none = Labels::new();
        let mut resources = vec![Resource::FLEET];
        resources.extend(ORGANIZATIONS.map(Resource::organization));
        for (o, p) in PROJECTS {
            resources.push(Resource::project(o, p));
            for (region, name) in [("eu", "web"), ("us", "web"), ("eu", "db")] {
                let labels = if name == "web" { &labelled } else { &none };
                resources.push(Resource::in_project("App", o, p, region, name, labels));
            }
        }
        let actions =
            ["apps:get", "apps:update", "apps:list", "projects:get", "projects:set-quota", "organizations:set-quota", "status:get"];
        for n in 0..6 {
            let principal = user(n);
            for action in actions {
                for resource in &resources {
                    if !vocabulary.action(action).unwrap().resources.contains(&resource.kind) {
                        continue;
                    }
                    let request =
                        Request { principal: &principal, action, resource: *resource, circumstances: circumstances() };
                    let decision = engine.decide(&request);
                    let plain = plainly(&vocabulary, &world, &request);
                    prop_assert_eq!(decision.allowed, plain, "{} {} {:?}: {:?}", principal, action, resource, decision);
                }
            }
        }
    }
}
