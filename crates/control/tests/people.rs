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
