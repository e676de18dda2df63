//! What policies permit and forbid, whom roles serve, which texts are refused.

#[path = "policy/common.rs"]
mod common;
#[path = "policy/slices.rs"]
mod slices;

use std::net::IpAddr;
use std::sync::Arc;

use common::{circumstances, everything, labels, today};
use nexus_iam::policy::{
    Binding, Change, Circumstances, Decision, Engine, MAX_POLICIES, MAX_TEXT, PERSONAS, Place, PolicyError, PolicyText,
    Principal, Reach, Request, Resource, Role, Source, Vocabulary, check, matrix,
};
use nexus_model::Timestamp;
use nexus_model::selector::Labels;

struct World {
    engine: Engine,
}

fn ann() -> Principal {
    Principal::user("acme", "ann")
}

fn bob() -> Principal {
    Principal::user("acme", "bob")
}

fn eve() -> Principal {
    Principal::user("globex", "eve")
}

fn acme() -> Reach {
    Reach::organization("acme")
}

fn shop() -> Reach {
    Reach::project("acme", "shop")
}

impl World {
    fn new() -> Self {
        Self { engine: Engine::new(everything()).unwrap() }
    }

    fn member(mut self, principal: &Principal, groups: &[Principal]) -> Self {
        self.engine.apply(Change::Member { principal: principal.clone(), groups: groups.to_vec() }).unwrap();
        self
    }

    fn bind(mut self, principal: &Principal, role: Role, reach: Reach) -> Self {
        let name = format!("{role}-{}", principal.name()).as_str().into();
        let binding = Binding { name, role, reach, subjects: vec![principal.clone()] };
        self.engine.apply(Change::Binding(binding)).unwrap();
        self
    }

    /// Adds a policy that the schema accepts.
    fn policy(mut self, name: &str, reach: Reach, text: &str) -> Self {
        let policy = PolicyText { name: name.into(), reach, guard_rail: false, text: text.into() };
        check(self.engine.vocabulary(), &policy).unwrap();
        self.engine.apply(Change::Policy(policy)).unwrap();
        self
    }

    fn guard_rail(mut self, name: &str, text: &str) -> Self {
        let policy = PolicyText { name: name.into(), reach: acme(), guard_rail: true, text: text.into() };
        check(self.engine.vocabulary(), &policy).unwrap();
        self.engine.apply(Change::Policy(policy)).unwrap();
        self
    }

    fn ask(&self, principal: &Principal, action: &str, resource: Resource<'_>) -> Decision {
        self.engine.decide(&Request { principal, action, resource, circumstances: circumstances() })
    }

    fn may(&self, principal: &Principal, action: &str, resource: Resource<'_>) -> bool {
        let decision = self.ask(principal, action, resource);
        assert!(decision.errors.is_empty(), "{action}: {:?}", decision.errors);
        assert_eq!(decision.missing_action.as_deref(), (!decision.allowed).then_some(action));
        decision.allowed
    }
}

fn app<'a>(organization: &'a str, project: &'a str, labels: &'a Labels) -> Resource<'a> {
    Resource::in_project("App", organization, project, "eu", "web", labels)
}

fn refused(text: &str) -> PolicyError {
    let policy = PolicyText { name: "p".into(), reach: acme(), guard_rail: false, text: text.into() };
    check(&everything(), &policy).unwrap_err()
}

/// Run with `UPDATE_GOLDEN=1` to write the file anew, and read what changed.
fn golden(name: &str, vocabulary: Arc<Vocabulary>) {
    let mut text = format!("{:<44} {:<18} {}\n", "action", "resource", PERSONAS.join(" "));
    for row in matrix(vocabulary).unwrap() {
        let cells =
            row.allowed.iter().zip(PERSONAS).map(|(yes, p)| format!("{:<1$}", if *yes { "yes" } else { "-" }, p.len()));
        let cells: Vec<_> = cells.collect();
        text.push_str(format!("{:<44} {:<18} {}", row.action, row.resource, cells.join(" ")).trim_end());
        text.push('\n');
    }
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, expected, "the matrix of {name} changed; if that is meant, run again with UPDATE_GOLDEN=1");
}

#[test]
fn the_matrix_is_as_agreed() {
    golden("policy-matrix-today.txt", today());
    golden("policy-matrix.txt", everything());
}

#[test]
fn whatever_exists_somebody_may_do_and_nobody_anonymous_or_foreign_on_what_is_a_tenants() {
    for row in matrix(everything()).unwrap() {
        let by = |persona: &str| row.allowed[PERSONAS.iter().position(|p| *p == persona).unwrap()];
        assert!(!by("anonymous"), "{row:?}");
        // Nobody but the holder of an account makes or keeps its sessions; the matrix asks others.
        let personal = ["sessions:create", "sessions:update"].contains(&&*row.action)
            || row.action.starts_with("tokens:")
            || row.action.starts_with("access-keys:");
        assert!(row.allowed.contains(&true) || personal, "nobody may {row:?}");
        if !["regions:", "zones:", "address-pools:"].iter().any(|p| row.action.starts_with(p)) {
            assert!(!by("other-tenant"), "{row:?}");
        }
    }
}

#[test]
fn a_kind_or_verb_without_a_rule_is_refused() {
    let with = |plural: &'static str, verbs: &[(&str, &str)]| {
        let kinds = vec![common::kind("Thing", plural, nexus_model::kind::Scope::Project)];
        let surface = nexus_iam::policy::Surface { kinds: kinds.leak(), verbs, operations: &[], extras: &[] };
        Vocabulary::new(surface).map(|_| ())
    };
    assert_eq!(with("apps", &[]), Ok(()));
    assert_eq!(with("things", &[]), Err(PolicyError::NoRule("things:*".into())));
    assert_eq!(with("apps", &[("apps", "paint")]), Err(PolicyError::NoRule("apps:paint".into())));
    assert_eq!(with("apps", &[("boats", "sail")]), Err(PolicyError::NoRule("boats:sail".into())));
}

#[test]
fn the_built_in_roles_fit_the_schema() {
    let set: cedar_policy::PolicySet = nexus_iam::policy::ROLES.parse().unwrap();
    let validator = cedar_policy::Validator::new(everything().schema().clone());
    let result = validator.validate(&set, cedar_policy::ValidationMode::Strict);
    assert!(result.validation_passed(), "{result}");
}

#[test]
fn roles_reach_what_is_in_their_scope_and_no_further() {
    let none = Labels::new();
    let devs = Principal::group("acme", "devs");
    let world = World::new().member(&bob(), std::slice::from_ref(&devs)).bind(&ann(), Role::Viewer, acme()).bind(
        &devs,
        Role::Editor,
        shop(),
    );
    assert!(world.may(&ann(), "apps:get", app("acme", "shop", &none)));
    assert!(!world.may(&ann(), "apps:update", app("acme", "shop", &none)));
    assert!(!world.may(&ann(), "apps:get", app("globex", "mill", &none)));
    assert!(world.may(&bob(), "apps:update", app("acme", "shop", &none)));
    assert!(world.may(&bob(), "apps:list", Resource::project("acme", "shop")));
    assert!(!world.may(&bob(), "apps:list", Resource::organization("acme")));
    assert!(!world.may(&bob(), "apps:get", app("acme", "other", &none)));
    // The name of a project that was another organization's grants nothing.
    assert!(!world.may(&bob(), "apps:get", app("globex", "shop", &none)));
    let decision = world.ask(&bob(), "apps:update", app("acme", "shop", &none));
    let by = Source::Binding { role: Role::Editor, name: "editor-devs".into(), reach: shop() };
    assert_eq!(decision.by.iter().map(|r| r.source.clone()).collect::<Vec<_>>(), [by]);
}

#[test]
fn an_editor_changes_no_policies_bindings_quotas_and_reads_no_secret() {
    let none = Labels::new();
    let world = World::new().bind(&bob(), Role::Editor, acme()).bind(&ann(), Role::Auditor, acme());
    let inside = |kind| Resource { project: Some("shop"), ..Resource::in_organization(kind, "acme", "x") };
    for (action, kind) in [("policies:create", "Policy"), ("role-bindings:delete", "RoleBinding")] {
        assert!(!world.may(&bob(), action, inside(kind)), "{action}");
    }
    assert!(!world.may(&bob(), "projects:set-quota", Resource::project("acme", "shop")));
    let secret = Resource::in_project("Secret", "acme", "shop", "eu", "db", &none);
    assert!(world.may(&bob(), "secrets:update", secret));
    assert!(!world.may(&bob(), "secrets:reveal", secret));
    assert!(world.may(&ann(), "audit:list", Resource::organization("acme")));
    assert!(world.may(&ann(), "secrets:get", secret));
    assert!(!world.may(&ann(), "secrets:reveal", secret));
}

#[test]
fn a_scope_cannot_permit_itself_what_is_the_scope_above_to_give() {
    let all = "permit (principal, action, resource);";
    let world =
        World::new().bind(&ann(), Role::Owner, acme()).bind(&bob(), Role::Owner, shop()).policy("all", shop(), all);
    assert!(!world.may(&bob(), "projects:set-quota", Resource::project("acme", "shop")));
    assert!(world.may(&ann(), "projects:set-quota", Resource::project("acme", "shop")));
    let world = world.policy("all", acme(), all);
    assert!(world.may(&bob(), "projects:set-quota", Resource::project("acme", "shop")));
    assert!(!world.may(&ann(), "organizations:set-quota", Resource::organization("acme")));
}

#[test]
fn only_owners_change_owners() {
    let (chief, clerk) = (Principal::user("acme", "chief"), Principal::user("acme", "clerk"));
    let board = Principal::group("acme", "board");
    let world = World::new()
        .member(&chief, std::slice::from_ref(&board))
        .member(&clerk, &[])
        .bind(&board, Role::Owner, acme())
        .bind(&ann(), Role::Admin, acme());
    let user = |name| Resource::in_organization("User", "acme", name);
    assert!(world.may(&ann(), "users:update", user("clerk")));
    assert!(!world.may(&ann(), "users:update", user("chief")));
    assert!(!world.may(&ann(), "groups:update", Resource::in_organization("Group", "acme", "board")));
    assert!(!world.may(&ann(), "tokens:delete", Resource::credential("Token", &chief, "t")));
    assert!(world.may(&chief, "users:update", user("chief")));
    let binding = |role| Resource { grants: Some(role), ..Resource::in_organization("RoleBinding", "acme", "x") };
    assert!(world.may(&ann(), "role-bindings:create", binding(Role::Editor)));
    assert!(!world.may(&ann(), "role-bindings:create", binding(Role::Owner)));
    assert!(world.may(&chief, "role-bindings:create", binding(Role::Owner)));
}

#[test]
fn everybody_keeps_their_own_credentials_and_admins_those_of_machines() {
    let robot = Principal::service_account("acme", "robot");
    let world = World::new().member(&bob(), &[]).member(&robot, &[]).bind(&ann(), Role::Admin, acme());
    let mine = Resource::credential("Token", &robot, "t");
    let (own, holder) = (bob(), ann());
    assert!(world.may(&own, "tokens:create", Resource::credential("Token", &own, "t")));
    assert!(world.may(&own, "users:get", Resource::in_organization("User", "acme", "bob")));
    assert!(!world.may(&own, "users:get", Resource::in_organization("User", "acme", "ann")));
    assert!(!world.may(&own, "tokens:delete", Resource::credential("Token", &holder, "t")));
    assert!(world.may(&holder, "tokens:create", mine));
    // Making a token for another person would be acting in their name.
    assert!(!world.may(&holder, "tokens:create", Resource::credential("Token", &own, "t")));
    assert!(world.may(&holder, "tokens:delete", Resource::credential("Token", &own, "t")));
}

#[test]
fn an_explicit_deny_wins_and_a_guard_rail_cannot_be_lifted() {
    let (none, prod) = (Labels::new(), labels(&[("env", "prod")]));
    let rail = r#"@description("nobody deletes production")
forbid (principal, action in [Action::"apps:delete"], resource)
when { resource.hasTag("env") && resource.getTag("env") == "prod" };"#;
    let world = World::new().bind(&ann(), Role::Owner, acme()).guard_rail("prod", rail).policy(
        "lift",
        shop(),
        "permit (principal, action, resource);",
    );
    assert!(world.may(&ann(), "apps:delete", app("acme", "shop", &none)));
    assert!(!world.may(&ann(), "apps:delete", app("acme", "shop", &prod)));
    assert!(world.may(&ann(), "apps:update", app("acme", "shop", &prod)));
    let decision = world.ask(&ann(), "apps:delete", app("acme", "shop", &prod));
    assert!(decision.by[0].description.contains("guard-rail prod"), "{decision:?}");
    assert!(decision.by[0].description.contains("nobody deletes production"), "{decision:?}");
    // A project's forbid holds in the project only.
    let world = World::new().bind(&ann(), Role::Owner, acme()).policy(
        "closed",
        shop(),
        "forbid (principal, action, resource);",
    );
    assert!(!world.may(&ann(), "apps:get", app("acme", "shop", &none)));
    assert!(world.may(&ann(), "apps:get", app("acme", "other", &none)));
    let text = PolicyText {
        name: "g".into(),
        reach: acme(),
        guard_rail: true,
        text: "permit (principal, action, resource);".into(),
    };
    assert!(matches!(check(&everything(), &text), Err(PolicyError::GuardRail { .. })));
    let text = PolicyText { reach: shop(), text: rail.into(), ..text };
    assert!(matches!(check(&everything(), &text), Err(PolicyError::GuardRailReach { .. })));
}

#[test]
fn strangers_get_nothing_unless_the_owner_grants_it() {
    let none = Labels::new();
    let all = "permit (principal, action, resource);";
    let world = World::new().bind(&eve(), Role::Owner, Reach::organization("globex")).policy(
        "mine",
        Reach::organization("globex"),
        all,
    );
    assert!(world.may(&eve(), "apps:get", app("globex", "mill", &none)));
    assert!(!world.may(&eve(), "apps:get", app("acme", "shop", &none)));
    assert!(!world.may(&eve(), "hosts:get", Resource::in_region("Host", "eu", "h-1")));
    let by_binding = World::new().bind(&eve(), Role::Viewer, shop());
    assert!(by_binding.may(&eve(), "apps:get", app("acme", "shop", &none)));
    let text =
        r#"permit (principal == User::"globex/eve", action == Action::"apps:get", resource in Project::"shop");"#;
    let by_policy = World::new().policy("guest", acme(), text);
    assert!(by_policy.may(&eve(), "apps:get", app("acme", "shop", &none)));
    assert!(!by_policy.may(&eve(), "apps:get", app("acme", "other", &none)));
    let partners = r#"permit (principal in Organization::"globex", action in Action::"view", resource);"#;
    assert!(World::new().policy("partners", acme(), partners).may(&eve(), "apps:get", app("acme", "shop", &none)));
    // What once was granted is gone with the project.
    let mut gone = by_binding;
    gone.engine.apply(Change::Forget(shop())).unwrap();
    assert!(!gone.may(&eve(), "apps:get", app("acme", "shop", &none)));
}

#[test]
fn conditions_look_at_labels_address_time_and_second_factor() {
    let none = Labels::new();
    let mine = labels(&[("owner", "bob")]);
    let world = World::new().policy(
        "conditions",
        acme(),
        r#"
permit (principal is User, action == Action::"apps:update", resource)
when { resource.hasTag("owner") && resource.getTag("owner") == principal.name };
permit (principal, action == Action::"apps:get", resource) when { context.ip.isInRange(ip("10.0.0.0/8")) };
permit (principal, action == Action::"apps:create", resource)
when { context.time >= datetime("2030-01-01") && context.time < datetime("2031-01-01") };
permit (principal, action == Action::"apps:delete", resource) when { context.mfa };
permit (principal, action == Action::"routes:get", resource) when { resource.region == "eu" && resource.name like "w*" };
"#,
    );
    assert!(world.may(&bob(), "apps:update", app("acme", "shop", &mine)));
    assert!(!world.may(&ann(), "apps:update", app("acme", "shop", &mine)));
    assert!(!world.may(&bob(), "apps:update", app("acme", "shop", &none)));
    let route = |region| Resource::in_project("Route", "acme", "shop", region, "web", &none);
    assert!(world.may(&bob(), "routes:get", route("eu")));
    assert!(!world.may(&bob(), "routes:get", route("us")));
    let person = bob();
    let with = |action, circumstances| {
        let request = Request { principal: &person, action, resource: app("acme", "shop", &none), circumstances };
        world.engine.decide(&request).allowed
    };
    let usual = circumstances();
    let from = |ip: &str| Circumstances { ip: ip.parse::<IpAddr>().unwrap(), ..usual };
    assert!(with("apps:get", from("10.9.8.7")));
    assert!(with("apps:get", from("::ffff:10.9.8.7")));
    assert!(!with("apps:get", from("11.9.8.7")));
    assert!(!with("apps:get", from("2001:db8::1")));
    // 2030-06-01 and 2031-01-01.
    let at = |secs: i64| Circumstances { time: Timestamp::from_millis(secs * 1000), ..usual };
    assert!(with("apps:create", at(1_906_502_400)));
    assert!(!with("apps:create", at(1_924_992_000)));
    assert!(with("apps:delete", Circumstances { mfa: true, ..usual }));
    assert!(!with("apps:delete", Circumstances { mfa: false, ..usual }));
}

#[test]
fn a_forbid_that_cannot_be_evaluated_forbids() {
    let none = Labels::new();
    let overflow = "forbid (principal, action, resource) when { 9223372036854775807 + 1 == 0 };";
    let world = World::new().bind(&ann(), Role::Owner, acme()).policy("broken", shop(), overflow);
    let decision = world.ask(&ann(), "apps:get", app("acme", "shop", &none));
    assert!(!decision.allowed && decision.errors.len() == 1, "{decision:?}");
    let overflow = overflow.replace("forbid", "permit");
    assert!(
        !World::new().policy("broken", shop(), &overflow).ask(&ann(), "apps:get", app("acme", "shop", &none)).allowed
    );
}

#[test]
fn a_bad_policy_is_refused_with_its_place() {
    let place = |text: &str| match refused(text) {
        PolicyError::Invalid { troubles, .. } => (troubles[0].line, troubles[0].column, troubles[0].message.clone()),
        other => panic!("{other}"),
    };
    let (line, _, _) = place("permit (principal, action, resource);\npermit (principal, action resource);");
    assert_eq!(line, 2);
    let (line, column, message) = place("permit (\n  principal,\n  action == Action::\"apps:lsit\",\n  resource);");
    assert_eq!((line, column), (3, 13), "{message}");
    assert!(message.contains("apps:lsit"), "{message}");
    let (line, _, message) =
        place("permit (principal, action in Action::\"view\", resource)\nwhen { resource.colour == \"red\" };");
    assert_eq!(line, 2, "{message}");
    // A tag must be looked for before it is read, and a type must be right.
    place("permit (principal, action == Action::\"apps:get\", resource) when { resource.getTag(\"a\") == \"b\" };");
    place("permit (principal, action == Action::\"apps:get\", resource) when { context.mfa == \"yes\" };");
    place("permit (principal in Role::\"emperor\", action, resource);");
    place("permit (principal == Boss::\"x\", action, resource);");
    assert!(matches!(refused(""), PolicyError::Empty { .. }));
    assert!(matches!(refused("// only words"), PolicyError::Empty { .. }));
    assert!(matches!(refused("permit (principal == ?principal, action, resource);"), PolicyError::Template { .. }));
    assert!(matches!(
        refused(&"permit (principal, action, resource);\n".repeat(33)),
        PolicyError::TooManyStatements { .. }
    ));
}

#[test]
fn hostile_texts_are_refused_and_do_no_harm() {
    assert!(matches!(refused(&" ".repeat(MAX_TEXT + 1)), PolicyError::TooLong { .. }));
    let when = |condition: &str| {
        format!("permit (principal, action == Action::\"apps:get\", resource) when {{ {condition} }};")
    };
    let half = MAX_TEXT / 2 - 100;
    for text in [
        "(".repeat(MAX_TEXT),
        when(&format!("{}true{}", "(".repeat(half), ")".repeat(half))),
        when(&format!("{}true", "!".repeat(MAX_TEXT - 100))),
        when(&format!("{}1{} == 1", "[".repeat(half - 10), "]".repeat(half - 10))),
        when(&format!("{}true", "if true then ".repeat(1000))),
        when(&vec!["true"; 2000].join(" && ")),
        when(&format!("resource.name{} == 1", ".a".repeat(2000))),
        when(&format!("{}1 == 1", "1 + ".repeat(2000))),
        "\0\u{202e}permit\u{feff}".repeat(100),
        "permit (principal, action, resource) when { \"\\u{110000}\" == \"\" };".to_owned(),
    ] {
        refused(&text);
    }
    // As involved as is allowed: it is read, checked and decided by.
    let long = when(&["resource.name == \"x\""; 100].join(" || "));
    let deep = when(&format!("{}resource.name == \"x\"{}", "(".repeat(30), ")".repeat(30)));
    let ifs = when(&format!("{}true{}", "if context.mfa then ".repeat(14), " else false".repeat(14)));
    for (name, text) in [("long", long), ("deep", deep), ("ifs", ifs)] {
        let world = World::new().policy(name, acme(), &text);
        assert!(!world.ask(&bob(), "apps:get", app("acme", "shop", &Labels::new())).allowed);
    }
}

#[test]
fn a_scope_has_a_hundred_policies_and_no_more() {
    let mut world = World::new();
    let mut add = |reach: Reach, n: usize, text: &str| {
        let name = format!("p{n}").as_str().into();
        world.engine.apply(Change::Policy(PolicyText { name, reach, guard_rail: false, text: text.into() }))
    };
    let text = "permit (principal, action == Action::\"apps:get\", resource);";
    for n in 0..MAX_POLICIES {
        add(acme(), n, text).unwrap();
        add(shop(), n, text).unwrap();
    }
    assert!(matches!(add(acme(), MAX_POLICIES, text), Err(PolicyError::TooManyPolicies { .. })));
    assert!(matches!(add(shop(), MAX_POLICIES, text), Err(PolicyError::TooManyPolicies { .. })));
    add(acme(), 7, "forbid (principal, action == Action::\"apps:get\", resource);").unwrap();
    let big = format!("{text}//{}", "x".repeat(MAX_TEXT - text.len() - 2));
    let full = (0..MAX_POLICIES).map(|n| add(Reach::organization("big"), n, &big)).find_map(Result::err);
    assert!(matches!(full, Some(PolicyError::TooMuchText { .. })));
    assert!(!world.may(&ann(), "apps:get", app("acme", "shop", &Labels::new())));
    world.engine.apply(Change::RemovePolicy { reach: acme(), name: "p7".into() }).unwrap();
    assert!(world.may(&ann(), "apps:get", app("acme", "shop", &Labels::new())));
}

#[test]
fn bindings_keep_to_their_scopes() {
    let binding = |role, reach, subjects| Change::Binding(Binding { name: "b".into(), role, reach, subjects });
    let mut engine = World::new().engine;
    let mut refused = |change| engine.apply(change).unwrap_err();
    assert!(matches!(refused(binding(Role::FleetOperator, acme(), vec![ann()])), PolicyError::RoleReach { .. }));
    assert!(matches!(refused(binding(Role::Owner, Reach::Fleet, vec![ann()])), PolicyError::RoleReach { .. }));
    assert!(matches!(refused(binding(Role::Viewer, acme(), vec![])), PolicyError::Subjects { .. }));
    let fleet = PolicyText {
        name: "f".into(),
        reach: Reach::Fleet,
        guard_rail: false,
        text: "permit (principal, action, resource);".into(),
    };
    assert!(matches!(refused(Change::Policy(fleet)), PolicyError::FleetPolicy { .. }));
}

#[test]
fn a_change_that_locks_the_last_owner_out_is_found() {
    let board = Principal::group("acme", "board");
    let world =
        World::new().member(&ann(), std::slice::from_ref(&board)).member(&bob(), &[]).bind(&board, Role::Owner, acme());
    let locks = |world: &World, change: Change| world.engine.would_lock_out("acme", &change, &circumstances()).unwrap();
    let rail = |text: &str| {
        Change::Policy(PolicyText { name: "r".into(), reach: acme(), guard_rail: true, text: text.into() })
    };
    let found = locks(&world, rail("forbid (principal, action, resource);")).unwrap();
    assert_eq!((found.owners, found.by.len()), (1, 1));
    assert!(locks(&world, rail("forbid (principal, action in Action::\"own\", resource);")).is_some());
    assert!(
        locks(&world, rail("forbid (principal, action, resource) when { context.ip.isInRange(ip(\"10.0.0.0/8\")) };"))
            .is_some()
    );
    assert!(locks(&world, rail("forbid (principal, action, resource) unless { context.mfa };")).is_none());
    assert!(locks(&world, rail("forbid (principal, action, resource in Project::\"shop\");")).is_none());
    assert!(locks(&world, Change::RemoveBinding { reach: acme(), name: "owner-board".into() }).is_some());
    assert!(locks(&world, Change::Member { principal: ann(), groups: vec![] }).is_some());
    assert!(locks(&world, Change::RemoveMember(ann())).is_some());
    let world = world.bind(&bob(), Role::Owner, acme());
    assert!(locks(&world, Change::RemoveMember(ann())).is_none());
    // Whoever repairs an organization that is already locked is not stopped.
    let world = World::new().member(&ann(), &[]);
    assert!(locks(&world, rail("forbid (principal, action, resource);")).is_none());
}

#[test]
fn a_question_in_words_is_answered_and_explained() {
    let world = World::new().bind(&ann(), Role::Viewer, acme()).policy(
        "night",
        acme(),
        "@id(\"by-night\") forbid (principal, action in Action::\"view\", resource) when { context.time < datetime(\"1980-01-01\") };",
    );
    let place = Place { organization: Some("acme"), project: Some("shop"), region: Some("eu"), labels: None };
    let can = |verb, kind, name| world.engine.can(&ann(), verb, kind, name, place, circumstances());
    assert!(can("list", "app", None).unwrap().allowed);
    assert!(can("get", "Instance", Some("web-1")).unwrap().allowed);
    assert!(!can("exec", "instances", Some("web-1")).unwrap().allowed);
    assert!(!can("list", "audit", None).unwrap().allowed);
    let error = can("lst", "apps", None).unwrap_err();
    assert!(error.to_string().contains("did you mean `apps:list`"), "{error}");

    let none = Labels::new();
    let (principal, resource) = (ann(), app("acme", "shop", &none));
    let ask = |action| Request { principal: &principal, action, resource, circumstances: circumstances() };
    let explained = world.engine.explain(&ask("apps:get"));
    assert!(explained.decision.allowed);
    assert_eq!(explained.roles, [Role::Viewer]);
    let considered: Vec<_> = explained.considered.iter().map(|c| (c.reason.permits, c.holds)).collect();
    assert!(considered.contains(&(true, true)) && considered.contains(&(false, false)), "{explained:?}");
    let explained = world.engine.explain(&ask("apps:update"));
    assert_eq!(explained.roles_that_would, [Role::Owner, Role::Admin, Role::Editor]);
    assert_eq!(explained.decision.missing_action.as_deref(), Some("apps:update"));
}

#[test]
fn a_request_that_does_not_fit_the_schema_is_refused() {
    let none = Labels::new();
    let world = World::new().bind(&ann(), Role::Owner, acme());
    let ask = |action, resource| world.ask(&ann(), action, resource);
    for (action, resource) in [
        ("apps:fly", app("acme", "shop", &none)),
        ("apps:get", Resource::project("acme", "shop")),
        ("apps:get", Resource::in_organization("App", "acme", "web")),
        ("organizations:get", Resource { organization: Some("acme"), ..Resource::organization("globex") }),
    ] {
        let decision = ask(action, resource);
        assert!(!decision.allowed && decision.errors.len() == 1, "{action}: {decision:?}");
    }
}
