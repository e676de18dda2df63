//! The words of policies: entity types, actions and their groups, made from the declarations of kinds.
//!
//! [`Vocabulary::new`] takes what the API serves (a [`Surface`]) and writes the Cedar schema that custom policies are checked
//! against and that users can read. Every action is `collection:verb`; its groups and level come from the rules' table.
//!
//! | entity | its id | parents |
//! |---|---|---|
//! | `Fleet` | `fleet` | |
//! | `Organization` | `acme` | `Fleet` |
//! | `Project` | `shop` | `Organization` |
//! | what a project owns, as `App` | `region/project/name` | `Project` |
//! | what a region owns, as `Host` | `region/name` | `Fleet` |
//! | `User`, `Group`, `ServiceAccount` and what else an organization owns | `organization/name` | `Organization` |
//! | credentials, as `Token` | `organization/name` | their `User` or `ServiceAccount` |
//! | `Workload`, `HostIdentity` | the path of the SPIFFE id | `Organization` |
//! | `Operator` | the name | |
//!
//! Labels are Cedar tags: `resource.hasTag("env") && resource.getTag("env") == "prod"`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;

use cedar_policy::{Entity, EntityId, EntityTypeName, EntityUid, Schema};
use nexus_model::kind::{KindDescriptor, Scope};

use super::rules::{self, GROUPS, Holder, Level};
use super::{PolicyError, Role};

/// What the API serves: policies can speak of nothing else.
#[derive(Clone, Copy)]
pub struct Surface<'a> {
    pub kinds: &'static [KindDescriptor],
    /// Custom verbs of kinds, as (plural, verb).
    pub verbs: &'a [(&'a str, &'a str)],
    /// The names behind `/v1/operations/`.
    pub operations: &'a [&'a str],
    /// Actions on collections that are no kinds, as (collection, verb): `("audit", "list")`, `("blobs", "put")`.
    pub extras: &'a [(&'a str, &'a str)],
}

/// Who asks. The Cedar types of principals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrincipalKind {
    User,
    ServiceAccount,
    /// Never asks itself: the parent of those who do, and the subject of bindings.
    Group,
    Workload,
    Host,
    Operator,
}

impl PrincipalKind {
    pub const ALL: [Self; 6] =
        [Self::User, Self::ServiceAccount, Self::Group, Self::Workload, Self::Host, Self::Operator];

    /// The Cedar type. A host as a principal is not the `Host` that operators write.
    pub fn entity_type(self) -> &'static str {
        match self {
            Self::User => "User",
            Self::ServiceAccount => "ServiceAccount",
            Self::Group => "Group",
            Self::Workload => "Workload",
            Self::Host => "HostIdentity",
            Self::Operator => "Operator",
        }
    }
}

/// One action of the vocabulary.
#[derive(Debug)]
pub struct Action {
    /// `apps:list`
    pub name: Arc<str>,
    pub groups: &'static [&'static str],
    pub level: Level,
    /// The entity types that it can be asked for.
    pub resources: Vec<&'static str>,
    pub(crate) index: u16,
    pub(crate) uid: EntityUid,
    /// The action with its groups as Cedar's `in` needs it.
    pub(crate) entity: Entity,
}

/// A type of resource as requests name it.
#[derive(Debug)]
pub(crate) struct ResourceType {
    pub holder: Holder,
    pub name: EntityTypeName,
}

/// The schema and everything that decisions look up in it.
pub struct Vocabulary {
    schema: Schema,
    text: String,
    actions: Vec<Action>,
    by_name: HashMap<Arc<str>, u16>,
    types: HashMap<&'static str, ResourceType>,
    principals: HashMap<PrincipalKind, EntityTypeName>,
    kinds: &'static [KindDescriptor],

    pub(crate) roles: Vec<EntityUid>,
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("actions", &self.actions.len()).finish_non_exhaustive()
    }
}

/// An action before the schema is written.
struct Draft {
    name: String,
    groups: &'static [&'static str],
    level: Level,
    resources: Vec<&'static str>,
}

/// Types that are there whether or not the API serves a kind of that name.
const BUILT_IN: [(&str, Holder); 6] = [
    ("Fleet", Holder::Fleet),
    ("Organization", Holder::Fleet),
    ("Project", Holder::Organization),
    ("User", Holder::Organization),
    ("ServiceAccount", Holder::Organization),
    ("Group", Holder::Organization),
];

const ASKERS: &str = "User, ServiceAccount, Workload, HostIdentity, Operator";

fn type_name(text: &str) -> EntityTypeName {
    text.parse().expect("kinds are named by identifiers")
}

/// Where a list or a create of a collection is asked for.
fn containers(plural: &str, holder: Holder) -> Vec<&'static str> {
    match holder {
        Holder::Fleet => vec!["Fleet"],
        Holder::Organization if plural == "projects" => vec!["Organization", "Fleet"],
        // A service account may be a project's own.
        Holder::Organization | Holder::Project | Holder::Any => vec!["Project", "Organization", "Fleet"],
        Holder::Account => vec!["User", "ServiceAccount", "Organization", "Fleet"],
    }
}

fn drafts(surface: &Surface<'_>) -> Result<Vec<Draft>, PolicyError> {
    let mut drafts: Vec<Draft> = Vec::new();
    let mut add = |plural: &str, verb: &str, resources: Vec<&'static str>| {
        let name = format!("{plural}:{verb}");
        let of = rules::find(plural).and_then(|r| r.of(verb)).filter(|(groups, _)| !groups.is_empty());
        let (groups, level) = of.ok_or_else(|| PolicyError::NoRule(name.clone()))?;
        if !drafts.iter().any(|d| d.name == name) {
            drafts.push(Draft { name, groups, level, resources });
        }
        Ok(())
    };
    for kind in surface.kinds {
        let rule = rules::find(kind.plural).ok_or_else(|| PolicyError::NoRule(format!("{}:*", kind.plural)))?;
        let holder = rule.holder(Some(kind));
        add(kind.plural, "list", containers(kind.plural, holder))?;
        let verbs = [("create", kind.verbs.create), ("update", kind.verbs.update), ("delete", kind.verbs.delete)];
        let standard = verbs.into_iter().filter_map(|(verb, has)| has.then_some(verb));
        for verb in std::iter::once("get").chain(standard).chain(rule.implied()) {
            add(kind.plural, verb, vec![kind.kind])?;
        }
        for (_, verb) in surface.verbs.iter().filter(|v| v.0 == kind.plural) {
            add(kind.plural, verb, vec![kind.kind])?;
        }
    }
    for (plural, verb) in surface.extras {
        let rule = rules::find(plural).ok_or_else(|| PolicyError::NoRule(format!("{plural}:{verb}")))?;
        let declared = surface.kinds.iter().find(|k| k.plural == *plural);
        let resources = match (declared, rule.holder(None)) {
            (Some(kind), _) => vec![kind.kind],
            // Nothing stands for one of them: the project does.
            (None, Holder::Project) => vec!["Project"],
            (None, holder) => containers(plural, holder),
        };
        add(plural, verb, resources)?;
    }
    for (plural, verb) in surface.verbs {
        if !surface.kinds.iter().any(|k| k.plural == *plural) {
            return Err(PolicyError::NoRule(format!("{plural}:{verb}")));
        }
    }
    let (groups, level) = rules::OPERATION;
    drafts.extend(surface.operations.iter().map(|operation| Draft {
        name: format!("operations:{operation}"),
        groups,
        level,
        resources: vec!["Fleet"],
    }));
    Ok(drafts)
}

fn entity(out: &mut String, name: &str, parents: &str, attributes: &str) {
    let _ = writeln!(out, "entity {name} in [{parents}] {{ name: String{attributes} }} tags String;");
}

/// The schema's text. It is also what users read, so it keeps the order in which kinds are declared.
fn schema_text(surface: &Surface<'_>, drafts: &[Draft]) -> String {
    let mut out = String::new();
    let roles: Vec<String> = Role::ALL.iter().map(|r| format!("{:?}", r.name())).collect();
    let _ = writeln!(out, "type Request = {{ ip: ipaddr, time: datetime, mfa: Bool, requestId: String }};\n");
    let _ = writeln!(out, "entity Role enum [{}];", roles.join(", "));
    let owned = ", organization: String";
    entity(&mut out, "Fleet", "", "");
    entity(&mut out, "Organization", "Fleet", owned);
    entity(&mut out, "Project", "Organization, Fleet", owned);
    for account in ["User", "ServiceAccount", "Group"] {
        let may = if account == "ServiceAccount" { ", organization: String, project?: String" } else { owned };
        entity(&mut out, account, "Group, Project, Organization, Fleet, Role", may);
    }
    for other in ["Workload", "HostIdentity", "Operator"] {
        entity(&mut out, other, "Group, Organization, Fleet, Role", owned);
    }
    for kind in surface.kinds.iter().filter(|k| !BUILT_IN.iter().any(|b| b.0 == k.kind)) {
        let holder = rules::find(kind.plural).map_or(Holder::Any, |r| r.holder(Some(kind)));
        let (parents, attributes) = match (holder, kind.scope) {
            (Holder::Project, _) => {
                ("Project, Organization, Fleet, Role", ", organization: String, project: String, region: String")
            }
            (Holder::Fleet, Scope::Region) => ("Fleet", ", region: String"),
            (Holder::Fleet, _) => ("Fleet", ""),
            (Holder::Organization, _) => ("Organization, Fleet", owned),
            (Holder::Any, _) => {
                ("Project, Organization, Fleet, Role", ", organization?: String, project?: String, region?: String")
            }
            (Holder::Account, _) => {
                ("User, ServiceAccount, Organization, Fleet, Role", ", organization: String, holderKind: String")
            }
        };
        entity(&mut out, kind.kind, parents, attributes);
    }
    out.push('\n');
    for (group, about) in GROUPS {
        let _ = writeln!(out, "// {about}\naction {group:?};");
    }
    out.push('\n');
    for draft in drafts {
        let groups: Vec<String> = draft.groups.iter().map(|g| format!("{g:?}")).collect();
        let (name, groups, resources) = (&draft.name, groups.join(", "), draft.resources.join(", "));
        let applies = format!("{{ principal: [{ASKERS}], resource: [{resources}], context: Request }}");
        let _ = writeln!(out, "action {name:?} in [{groups}] appliesTo {applies};");
    }
    out
}

impl Vocabulary {
    /// Fails when a collection or verb has no line in the rules' table, or two kinds are in each other's way.
    pub fn new(surface: Surface<'_>) -> Result<Self, PolicyError> {
        let drafts = drafts(&surface)?;
        let text = schema_text(&surface, &drafts);
        let schema = Schema::from_cedarschema_str(&text).map_err(|e| PolicyError::Schema(e.to_string()))?.0;
        let entities = schema.action_entities().map_err(|e| PolicyError::Schema(e.to_string()))?;
        let mut actions = Vec::with_capacity(drafts.len());
        for (index, draft) in drafts.into_iter().enumerate() {
            let index = u16::try_from(index).map_err(|_| PolicyError::Schema("too many actions".into()))?;
            let uid = EntityUid::from_type_name_and_id(type_name("Action"), EntityId::new(&draft.name));
            let entity = entities.get(&uid).ok_or_else(|| PolicyError::NoRule(draft.name.clone()))?.clone();
            let Draft { name, groups, level, resources } = draft;
            actions.push(Action { name: name.into(), groups, level, resources, index, uid, entity });
        }
        let by_name = actions.iter().map(|a| (a.name.clone(), a.index)).collect();
        let mut types: HashMap<&'static str, ResourceType> = HashMap::new();
        for (name, holder) in BUILT_IN {
            types.insert(name, ResourceType { holder, name: type_name(name) });
        }
        for kind in surface.kinds.iter().filter(|k| !BUILT_IN.iter().any(|b| b.0 == k.kind)) {
            let holder = rules::find(kind.plural).map_or(Holder::Any, |r| r.holder(Some(kind)));
            types.insert(kind.kind, ResourceType { holder, name: type_name(kind.kind) });
        }
        let role = type_name("Role");
        let uid = |r: &Role| EntityUid::from_type_name_and_id(role.clone(), EntityId::new(r.name()));
        let roles = Role::ALL.iter().map(uid).collect();
        let principals = PrincipalKind::ALL.iter().map(|k| (*k, type_name(k.entity_type()))).collect();
        Ok(Self { schema, text, actions, by_name, types, principals, kinds: surface.kinds, roles })
    }

    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// The schema as users read it.
    pub fn text(&self) -> &str {
        &self.text
    }

    pub fn kinds(&self) -> &'static [KindDescriptor] {
        self.kinds
    }

    /// In the order of declaration.
    pub fn actions(&self) -> &[Action] {
        &self.actions
    }

    pub fn action(&self, name: &str) -> Option<&Action> {
        self.by_name.get(name).map(|i| &self.actions[usize::from(*i)])
    }

    pub(crate) fn resource_type(&self, name: &str) -> Option<&ResourceType> {
        self.types.get(name)
    }

    pub(crate) fn principal_type(&self, kind: PrincipalKind) -> &EntityTypeName {
        &self.principals[&kind]
    }
}
