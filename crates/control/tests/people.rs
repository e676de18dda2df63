//! What the writer refuses and tidies of people, programs, roles, policies and what they sign in by.

mod common;

use std::time::Duration;

use common::{intent, name};
use nexus_control::cells::Cells;
use nexus_control::core::{Bootstrap, Core, Moment};
use nexus_control::intent::{Accepted, Change, Intent};
use nexus_control::world::World;
use nexus_env::SeededRng;
use nexus_model::kind::*;
use nexus_model::{ApiError, Code, Metadata, Object, Timestamp};

struct Lab {
    core: Core,
    rng: SeededRng,
    now: i64,
}

impl Lab {
    fn new() -> Self {
        let bootstrap =
            Bootstrap { region: name("local"), domain: "localhost".into(), zones: Vec::new(), cells: Vec::new() };
        let core = Core::new(World::default(), bootstrap, Cells::new(Duration::ZERO, "server-a".into(), 1));
        let mut lab = Self { core, rng: SeededRng::new(7), now: 1_790_000_000_000 };
        lab.with(|core, at| core.bootstrap(at));
        lab.make::<Organization>(None, "acme", OrganizationSpec::default()).unwrap();
        lab.make::<Organization>(None, "globex", OrganizationSpec::default()).unwrap();
        for (project, organization) in [("shop", "acme"), ("lab", "globex")] {
            let spec = ProjectSpec { organization: name(organization), ..ProjectSpec::default() };
            lab.make::<Project>(None, project, spec).unwrap();
        }
        lab.make::<User>(Some("acme"), "ada", UserSpec::default()).unwrap();
        lab.make::<User>(Some("acme"), "eve", UserSpec::default()).unwrap();
        lab.bind("owners", "owner", None, SubjectKind::User, "ada").unwrap();
        lab
    }

    fn with<T>(&mut self, f: impl FnOnce(&mut Core, Moment<'_>) -> T) -> T {
        let at = Moment { now: Timestamp::from_millis(self.now), monotonic: Duration::ZERO, rng: &self.rng };
        let answer = f(&mut self.core, at);
        while self.core.reconcile(at) {}
        self.core.take_packs();
        answer
    }

    fn ask<K: Kind>(&mut self, within: Option<&str>, object: &str, change: Change) -> Result<Accepted, ApiError> {
        let mut asked: Intent = intent(K::PLURAL, None, object, change);
        asked.target.organization = within.map(name);
        self.with(|core, at| core.intent(&asked, at))
    }

    fn any<K: Kind>(within: Option<&str>, object: &str, spec: K::Spec) -> nexus_model::AnyObject {
        let metadata = Metadata { organization: within.map(name), ..Metadata::new(name(object), None) };
        Object::<K>::new(metadata, spec).to_any()
    }

    fn make<K: Kind>(&mut self, within: Option<&str>, object: &str, spec: K::Spec) -> Result<Accepted, ApiError> {
        let any = Self::any::<K>(within, object, spec);
        self.ask::<K>(within, object, Change::Create { object: any })
    }

    fn put<K: Kind>(&mut self, within: Option<&str>, object: &str, spec: K::Spec) -> Result<Accepted, ApiError> {
        let any = Self::any::<K>(within, object, spec);
        self.ask::<K>(within, object, Change::Put { object: any })
    }

    fn bind(
        &mut self,
        binding: &str,
        role: &str,
        project: Option<&str>,
        kind: SubjectKind,
        who: &str,
    ) -> Result<Accepted, ApiError> {
        let subjects = vec![Subject { kind, name: name(who), organization: None }];
        let spec = RoleBindingSpec { role: role.into(), project: project.map(name), subjects };
        self.put::<RoleBinding>(Some("acme"), binding, spec)
    }
}

fn fields(error: &ApiError) -> Vec<&str> {
    error.errors.iter().map(|e| e.field.as_str()).collect()
}

#[test]
fn grants_name_who_is_there_and_reach_what_is_the_organizations() {
    let mut lab = Lab::new();
    lab.make::<ServiceAccount>(Some("acme"), "deployer", ServiceAccountSpec::default()).unwrap();
    let group = GroupSpec { service_accounts: [name("deployer")].into(), ..GroupSpec::default() };
    lab.make::<Group>(Some("acme"), "robots", group.clone()).unwrap();
    // Another organization's account is none of this one.
    let error = lab.make::<Group>(Some("globex"), "robots", group).unwrap_err();
    assert_eq!((error.code, fields(&error)), (Code::Invalid, vec!["spec.serviceAccounts"]));
    lab.bind("robots", "editor", Some("shop"), SubjectKind::Group, "robots").unwrap();
    for (binding, role, project, kind, who, field) in [
        ("b1", "editor", Some("lab"), SubjectKind::Group, "robots", "spec.project"),
        ("b2", "editor", Some("ghost"), SubjectKind::Group, "robots", "spec.project"),
        ("b3", "editor", None, SubjectKind::Group, "ghosts", "spec.subjects"),
        ("b4", "emperor", None, SubjectKind::User, "ada", "spec.role"),
        ("b5", "fleet-operator", None, SubjectKind::User, "ada", "spec.role"),
    ] {
        let error = lab.bind(binding, role, project, kind, who).unwrap_err();
        assert_eq!((error.code, fields(&error)), (Code::Invalid, vec![field]), "{binding}: {error:?}");
    }
    // Whether somebody is in another organization is not told.
    let stranger = Subject { kind: SubjectKind::User, name: name("nobody"), organization: Some(name("globex")) };
    let spec = RoleBindingSpec { role: "viewer".into(), project: None, subjects: vec![stranger] };
    lab.make::<RoleBinding>(Some("acme"), "guest", spec).unwrap();
}

#[test]
fn nobody_locks_the_last_owner_out() {
    let mut lab = Lab::new();
    let policy = |text: &str| PolicySpec { text: text.into(), ..PolicySpec::default() };
    let refused = |result: Result<Accepted, ApiError>| {
        let error = result.unwrap_err();
        assert!(error.code == Code::Conflict && error.detail.contains("locked out"), "{error:?}");
    };
    refused(lab.make::<Policy>(Some("acme"), "all", policy("forbid (principal, action, resource);")));
    refused(lab.bind("owners", "editor", None, SubjectKind::User, "ada"));
    refused(lab.ask::<RoleBinding>(Some("acme"), "owners", Change::Delete));
    refused(lab.put::<User>(Some("acme"), "ada", UserSpec { disabled: true, ..UserSpec::default() }));
    refused(lab.ask::<User>(Some("acme"), "ada", Change::Delete));
    // An owner by a group counts, as long as the group has her.
    let of = |who: &str| GroupSpec { users: [name(who)].into(), ..GroupSpec::default() };
    lab.make::<Group>(Some("acme"), "board", of("eve")).unwrap();
    lab.bind("board", "owner", None, SubjectKind::Group, "board").unwrap();
    lab.ask::<User>(Some("acme"), "ada", Change::Delete).unwrap();
    refused(lab.put::<Group>(Some("acme"), "board", GroupSpec::default()));
    refused(lab.ask::<Group>(Some("acme"), "board", Change::Delete));
    // What leaves one in is taken.
    let text = "forbid (principal, action in [Action::\"edit\"], resource);";
    lab.make::<Policy>(Some("acme"), "calm", policy(text)).unwrap();
}

#[test]
fn a_policy_is_held_against_the_schema_when_it_is_written() {
    let mut lab = Lab::new();
    for (text, said) in [
        ("permit (principal, action == Action::\"apps:fly\", resource);", "apps:fly"),
        ("permit (principal, action, resource) when { resource.colour == 1 };", "line 1"),
        ("permit (principal", "line 1"),
    ] {
        let spec = PolicySpec { text: text.into(), ..PolicySpec::default() };
        let error = lab.make::<Policy>(Some("acme"), "p", spec).unwrap_err();
        assert_eq!(fields(&error), ["spec.text"], "{error:?}");
        assert!(error.errors[0].message.contains(said), "{error:?}");
    }
    let spec = PolicySpec { project: Some(name("lab")), text: Policy::example().text, guard_rail: false };
    assert_eq!(fields(&lab.make::<Policy>(Some("acme"), "p", spec).unwrap_err()), ["spec.project"]);
    lab.make::<Policy>(Some("acme"), "p", Policy::example()).unwrap();
}

#[test]
fn whoever_goes_takes_credentials_and_grants_along() {
    let mut lab = Lab::new();
    let holder = Some(Holder { kind: HolderKind::User, name: name("eve") });
    let expires = Some(Timestamp::from_millis(lab.now + 86_400_000));
    let token = TokenSpec { holder: holder.clone(), expires, hash: Some("00".repeat(32)), ..TokenSpec::default() };
    lab.make::<Token>(Some("acme"), "eves", token.clone()).unwrap();
    let session = SessionSpec { holder, expires, ..SessionSpec::default() };
    lab.make::<Session>(Some("acme"), "s-1", session.clone()).unwrap();
    lab.make::<Credential>(Some("acme"), "eve", CredentialSpec::default()).unwrap();
    let count = |lab: &Lab| {
        let w = &lab.core.world;
        (w.tokens.live.len(), w.sessions.live.len(), w.credentials.live.len())
    };
    assert_eq!(count(&lab), (1, 1, 1));
    lab.ask::<User>(Some("acme"), "eve", Change::Delete).unwrap();
    assert_eq!(count(&lab), (0, 0, 0));

    let far = TokenSpec { expires: Some(Timestamp::from_millis(lab.now + 400 * 86_400_000)), ..token.clone() };
    let error = lab.make::<Token>(Some("acme"), "far", far).unwrap_err();
    assert_eq!(fields(&error), ["spec.holder"], "eve is gone");
    let adas = Some(Holder { kind: HolderKind::User, name: name("ada") });
    let far = TokenSpec {
        holder: adas.clone(),
        expires: Some(Timestamp::from_millis(lab.now + 400 * 86_400_000)),
        ..token.clone()
    };
    assert_eq!(fields(&lab.make::<Token>(Some("acme"), "far", far).unwrap_err()), ["spec.expires"]);
    // What has ended is swept up.
    lab.make::<Token>(Some("acme"), "adas", TokenSpec { holder: adas.clone(), ..token }).unwrap();
    lab.make::<Session>(Some("acme"), "s-2", SessionSpec { holder: adas, ..session }).unwrap();
    lab.with(|core, at| core.forget_old(at));
    assert_eq!(count(&lab), (1, 1, 0));
    lab.now += 2 * 86_400_000;
    lab.with(|core, at| core.forget_old(at));
    assert_eq!(count(&lab), (0, 0, 0));
}

#[test]
fn a_later_project_or_organization_of_that_name_begins_with_nothing() {
    let mut lab = Lab::new();
    lab.bind("eve-edits", "editor", Some("shop"), SubjectKind::User, "eve").unwrap();
    lab.ask::<Project>(None, "shop", Change::Delete).unwrap();
    for _ in 0..20 {
        lab.with(|_, _| ());
    }
    assert!(lab.core.world.role_bindings.get(Some(&name("acme")), &name("eve-edits")).is_none());
    lab.ask::<Organization>(None, "acme", Change::Delete).unwrap();
    for _ in 0..20 {
        lab.with(|_, _| ());
    }
    let world = &lab.core.world;
    assert_eq!(world.users.within(&name("acme")).count() + world.role_bindings.within(&name("acme")).count(), 0);
    assert!(world.organizations.buried.is_empty());
    lab.make::<Organization>(None, "acme", OrganizationSpec::default()).unwrap();
}

#[test]
fn an_organizations_projects_share_its_quota() {
    let mut lab = Lab::new();
    let quota = Quota { instances: 5, ..OrganizationSpec::default().quota };
    lab.put::<Organization>(None, "acme", OrganizationSpec { quota, ..OrganizationSpec::default() }).unwrap();
    let spec = ProjectSpec { organization: name("acme"), ..ProjectSpec::default() };
    lab.make::<Project>(None, "till", spec).unwrap();
    let deploy = |lab: &mut Lab, project: &str, app: &str, replicas: u32| {
        let create = common::create::<App>(Some(project), app, common::web(replicas));
        lab.with(|core, at| core.intent(&create, at))
    };
    deploy(&mut lab, "shop", "web", 3).unwrap();
    let error = deploy(&mut lab, "till", "web", 3).unwrap_err();
    assert_eq!(error.code, Code::QuotaExceeded);
    for said in ["instances", "organization acme is 5", "3 are in use", "would make it 6"] {
        assert!(error.detail.contains(said), "{}", error.detail);
    }
    deploy(&mut lab, "till", "web", 2).unwrap();
    // Others are not concerned, and what goes makes room.
    deploy(&mut lab, "lab", "web", 50).unwrap();
    lab.with(|core, at| core.intent(&intent("apps", Some("shop"), "web", Change::Delete), at)).unwrap();
    deploy(&mut lab, "till", "more", 3).unwrap();
}

fn corp() -> IdentityProviderSpec {
    IdentityProviderSpec { groups: Default::default(), ..IdentityProvider::example() }
}

fn is(provider: &str, subject: &str) -> UserSpec {
    let identity =
        UserIdentity { provider: name(provider), issuer: String::new(), subject: subject.into(), groups: None };
    UserSpec { identity: Some(identity), ..UserSpec::default() }
}

#[test]
fn a_provider_names_what_is_there_and_keeps_its_secret_for_its_issuer() {
    let mut lab = Lab::new();
    let refused = |lab: &mut Lab, spec: IdentityProviderSpec| {
        let error = lab.make::<IdentityProvider>(Some("acme"), "corp", spec).unwrap_err();
        fields(&error).join(" ")
    };
    let groups = [("eng".to_owned(), [name("ghosts")].into())].into();
    assert_eq!(refused(&mut lab, IdentityProviderSpec { groups, ..corp() }), "spec.groups");
    for issuer in ["http://login.acme.example", "ftp://x", "https://u@login.acme.example", "https://a/?b"] {
        assert_eq!(
            refused(&mut lab, IdentityProviderSpec { issuer: issuer.into(), ..corp() }),
            "spec.issuer",
            "{issuer}"
        );
    }
    let rule = |account: &str, project: &str| {
        let claims = [("repository".to_owned(), "acme/shop".to_owned())].into();
        let (service_account, project) = (name(account), Some(name(project)));
        let rule = ExchangeRule { audience: "cloud".into(), claims, service_account, project };
        IdentityProviderSpec { exchange: vec![rule], ..corp() }
    };
    assert_eq!(refused(&mut lab, rule("ghost", "shop")), "spec.exchange[0].serviceAccount");
    lab.make::<ServiceAccount>(Some("acme"), "deployer", ServiceAccountSpec::default()).unwrap();
    assert_eq!(refused(&mut lab, rule("deployer", "lab")), "spec.project");
    let error = lab.make::<IdentityProvider>(
        Some("acme"),
        "corp",
        IdentityProviderSpec { client_secret: Some("bare".into()), ..corp() },
    );
    assert_eq!(error.unwrap_err().code, Code::Internal, "never as it is");

    let sealed = IdentityProviderSpec { sealed_secret: Some("sealed".into()), ..rule("deployer", "shop") };
    lab.make::<IdentityProvider>(Some("acme"), "corp", sealed).unwrap();
    let kept = |lab: &mut Lab, spec: IdentityProviderSpec| {
        let accepted = lab.put::<IdentityProvider>(Some("acme"), "corp", spec).unwrap();
        accepted.object.spec["sealedSecret"].as_str().is_some()
    };
    assert!(kept(&mut lab, corp()), "a manifest leaves it out");
    assert!(!kept(&mut lab, IdentityProviderSpec { issuer: "https://other.example".into(), ..corp() }));
}

#[test]
fn a_user_is_one_person_of_a_provider_and_whoever_was_deleted_is_remembered() {
    let mut lab = Lab::new();
    lab.make::<IdentityProvider>(Some("acme"), "corp", corp()).unwrap();
    let error = lab.make::<User>(Some("acme"), "ann", is("ghost", "u-1")).unwrap_err();
    assert_eq!(fields(&error), ["spec.identity.provider"]);
    let issued = |lab: &Lab, user: &str| {
        let user = lab.core.world.users.get(Some(&name("acme")), &name(user)).unwrap();
        user.spec.identity.clone().map(|i| (i.issuer, i.subject, i.groups))
    };
    lab.make::<User>(Some("acme"), "ann", is("corp", "u-1")).unwrap();
    let her = Some((corp().issuer, "u-1".to_owned(), None));
    assert_eq!(issued(&lab, "ann"), her);
    // Nobody else is, and she is nobody else from now on.
    assert_eq!(lab.make::<User>(Some("acme"), "ann-2", is("corp", "u-1")).unwrap_err().code, Code::Conflict);
    assert_eq!(lab.put::<User>(Some("acme"), "eve", is("corp", "u-1")).unwrap_err().code, Code::Conflict);
    assert_eq!(fields(&lab.put::<User>(Some("acme"), "ann", is("corp", "u-2")).unwrap_err()), ["spec.identity"]);
    lab.put::<User>(Some("acme"), "ann", UserSpec { email: "ann@acme.example".into(), ..UserSpec::default() }).unwrap();
    assert_eq!(issued(&lab, "ann"), her, "what a change does not speak of stays");
    // In another organization she is another user.
    lab.make::<IdentityProvider>(Some("globex"), "corp", corp()).unwrap();
    lab.make::<User>(Some("globex"), "ann", is("corp", "u-1")).unwrap();

    lab.ask::<User>(Some("acme"), "ann", Change::Delete).unwrap();
    lab.ask::<User>(Some("acme"), "eve", Change::Delete).unwrap();
    let departed = |lab: &Lab| lab.core.world.departures.live.keys().cloned().collect::<Vec<_>>();
    let person = nexus_control::rules::federation::person(&corp().issuer, "u-1");
    assert_eq!(departed(&lab), [(Some(name("acme")), person)]);
    // Let in again and deleted again, she is remembered once; with the organization, all of it goes.
    lab.make::<User>(Some("acme"), "annie", is("corp", "u-1")).unwrap();
    lab.ask::<User>(Some("acme"), "annie", Change::Delete).unwrap();
    assert_eq!(departed(&lab).len(), 1);
    lab.ask::<Organization>(None, "acme", Change::Delete).unwrap();
    for _ in 0..20 {
        lab.with(|core, at| core.forget_old(at));
    }
    assert_eq!((departed(&lab).len(), lab.core.world.identity_providers.live.len()), (0, 1));
}

#[test]
fn an_owner_by_a_provider_is_not_the_last_one() {
    let mut lab = Lab::new();
    lab.make::<Group>(Some("acme"), "board", GroupSpec::default()).unwrap();
    lab.bind("board", "owner", None, SubjectKind::Group, "board").unwrap();
    let groups = [("board".to_owned(), [name("board")].into())].into();
    lab.make::<IdentityProvider>(Some("acme"), "corp", IdentityProviderSpec { groups, ..corp() }).unwrap();
    let mut spec = is("corp", "u-1");
    spec.identity.as_mut().unwrap().groups = Some([name("board")].into());
    lab.make::<User>(Some("acme"), "ann", spec).unwrap();
    // The provider may take it tomorrow.
    assert_eq!(lab.ask::<User>(Some("acme"), "ada", Change::Delete).unwrap_err().code, Code::Conflict);
}

#[test]
fn a_pipelines_short_sessions_end_nobodys_long_ones() {
    let mut lab = Lab::new();
    let holder = Some(Holder { kind: HolderKind::User, name: name("eve") });
    let expires = Some(Timestamp::from_millis(lab.now + 86_400_000));
    let short = SessionSpec { holder, expires, ..SessionSpec::default() };
    let long = SessionSpec { refresh: Some("00".repeat(32)), ..short.clone() };
    lab.make::<Session>(Some("acme"), "s-long", long.clone()).unwrap();
    for n in 0..60 {
        lab.make::<Session>(Some("acme"), &format!("s-{n}"), short.clone()).unwrap();
    }
    assert_eq!(lab.core.world.sessions.live.len(), 61);
    for n in 0..60 {
        lab.now += 1;
        lab.make::<Session>(Some("acme"), &format!("l-{n}"), long.clone()).unwrap();
    }
    assert_eq!(lab.core.world.sessions.live.len(), 60 + 50);
}
