//! Which group of actions every action belongs to, and the lowest scope whose permits count for it.
//!
//! This table is written by hand, one line for each collection, because "who may do it" is the one thing about a kind that
//! its declaration can't say. A collection without a line, or a verb that no line names, makes [`super::Vocabulary`] fail
//! to build: a new kind can't be served before somebody has decided about it.

use nexus_model::kind::{KindDescriptor, Scope};

/// The groups of actions that roles and custom policies speak of: `action in Action::"view"`.
pub const GROUPS: &[(&str, &str)] = &[
    ("view", "reading what organizations and projects own, and the logs of what runs"),
    ("edit", "making, changing and deleting what projects run"),
    ("operate", "reaching into what runs: exec"),
    ("admin", "projects and their quotas, people, groups, service accounts, role bindings"),
    ("own", "policies, identity providers, the organization itself"),
    ("issue", "credentials for service accounts"),
    ("reveal", "the values of secrets"),
    ("audit", "the audit log, sessions and credentials (not their secrets)"),
    ("bill", "usage, and the projects that it belongs to"),
    ("self", "what everybody may do with an account and credentials of their own"),
    ("everyone", "what whoever is signed in may read"),
    ("fleet-view", "reading what the fleet owns, and the lists over all organizations"),
    ("fleet-operate", "changing what the fleet owns; operations; organizations and their quotas"),
];

/// The lowest scope whose permits count. Forbids count in every scope.
///
/// A project's own policies and bindings can't raise its quota, an organization's can't raise the organization's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    Project,
    Organization,
    Fleet,
}

/// What owns the members of a collection, and so what their entities carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Holder {
    /// The fleet itself.
    Fleet,
    /// A project: has `organization`, `project` and `region`.
    Project,
    /// An organization: has `organization`.
    Organization,
    /// An organization, one of its projects, or the fleet: may have `organization` and `project`.
    Any,
    /// A user or service account, whose credential it is: has `organization` and `holderKind`.
    Account,
}

type Groups = &'static [&'static str];

pub(crate) struct Rule {
    pub plural: &'static str,
    /// Of collections that may not be declared as project kinds; a project kind is its project's.
    holder: Holder,
    read: Groups,
    write: Groups,
    /// The level of creates, updates and deletes. Reading is at the project's level.
    level: Level,
    /// Verbs with groups and levels of their own, the standard ones among them where they differ.
    verbs: &'static [(&'static str, Groups, Level)],
}

impl Rule {
    const fn new(plural: &'static str, holder: Holder, read: Groups, write: Groups) -> Self {
        Self { plural, holder, read, write, level: Level::Project, verbs: &[] }
    }

    const fn level(self, level: Level) -> Self {
        Self { level, ..self }
    }

    const fn verbs(self, verbs: &'static [(&'static str, Groups, Level)]) -> Self {
        Self { verbs, ..self }
    }

    pub fn holder(&self, kind: Option<&KindDescriptor>) -> Holder {
        match kind.map(|k| k.scope) {
            Some(Scope::Project) => Holder::Project,
            _ => self.holder,
        }
    }

    /// The groups and the level of a verb, unless nobody has decided about it.
    pub fn of(&self, verb: &str) -> Option<(Groups, Level)> {
        if let Some((_, groups, level)) = self.verbs.iter().find(|v| v.0 == verb) {
            return Some((groups, *level));
        }
        match verb {
            "list" | "get" => Some((self.read, Level::Project)),
            "create" | "update" | "delete" => Some((self.write, self.level)),
            _ => None,
        }
    }

    /// Verbs that belong to the collection although no route is named after them.
    pub fn implied(&self) -> impl Iterator<Item = &'static str> {
        self.verbs.iter().map(|v| v.0).filter(|v| IMPLIED.contains(&(self.plural, v)))
    }
}

/// Permissions that are finer than a route: a write that changes a quota asks for this one too.
const IMPLIED: &[(&str, &str)] = &[("organizations", "set-quota"), ("projects", "set-quota")];

const PEOPLE: Groups = &["admin"];
const CREDENTIALS: Groups = &["self", "admin", "audit"];

const RULES: &[Rule] = &[
    Rule::new("organizations", Holder::Fleet, &["view", "audit", "bill", "fleet-view"], &["own", "fleet-operate"])
        .level(Level::Organization)
        .verbs(&[
            ("list", &["fleet-view"], Level::Fleet),
            ("create", &["fleet-operate"], Level::Fleet),
            ("set-quota", &["fleet-operate"], Level::Fleet),
        ]),
    Rule::new("projects", Holder::Organization, &["view", "audit", "bill", "fleet-view"], &["admin"])
        .level(Level::Organization)
        .verbs(&[("set-quota", &["admin"], Level::Organization)]),
    Rule::new("regions", Holder::Fleet, &["everyone", "fleet-view"], &["fleet-operate"]).level(Level::Fleet),
    Rule::new("zones", Holder::Fleet, &["everyone", "fleet-view"], &["fleet-operate"]).level(Level::Fleet),
    Rule::new("cells", Holder::Fleet, &["fleet-view"], &["fleet-operate"]).level(Level::Fleet),
    Rule::new("hosts", Holder::Fleet, &["fleet-view"], &["fleet-operate"]).level(Level::Fleet).verbs(&[(
        "check",
        &["fleet-view"],
        Level::Fleet,
    )]),
    Rule::new("images", Holder::Project, &["view"], &["edit"]),
    Rule::new("apps", Holder::Project, &["view"], &["edit"]).verbs(&[("load", &["view"], Level::Project)]),
    Rule::new("app-revisions", Holder::Project, &["view"], &["edit"]),
    Rule::new("jobs", Holder::Project, &["view"], &["edit"]),
    Rule::new("cron-jobs", Holder::Project, &["view"], &["edit"]),
    Rule::new("instances", Holder::Project, &["view"], &["edit"])
        .verbs(&[("logs", &["view"], Level::Project), ("exec", &["operate"], Level::Project)]),
    Rule::new("routes", Holder::Project, &["view"], &["edit"]),
    Rule::new("events", Holder::Project, &["view"], &["edit"]),
    Rule::new("usages", Holder::Project, &["view", "bill"], &["edit"]),
    Rule::new("blobs", Holder::Project, &["view"], &[])
        .verbs(&[("put", &["edit"], Level::Project), ("pull", &["edit"], Level::Project)]),
    Rule::new("secrets", Holder::Project, &["view"], &["edit"]).verbs(&[("reveal", &["reveal"], Level::Project)]),
    Rule::new("webhooks", Holder::Project, &["view"], &["edit"]).verbs(&[("test", &["edit"], Level::Project)]),
    Rule::new("deliveries", Holder::Project, &["view"], &["edit"]).verbs(&[("resend", &["edit"], Level::Project)]),
    Rule::new("networks", Holder::Project, &["view"], &["edit"]),
    Rule::new("subnets", Holder::Project, &["view"], &["edit"]),
    Rule::new("security-groups", Holder::Project, &["view"], &["edit"]),
    Rule::new("nics", Holder::Project, &["view"], &["edit"])
        .verbs(&[("trace", &["operate"], Level::Project), ("capture", &["operate"], Level::Project)]),
    Rule::new("prefix-lists", Holder::Project, &["view"], &["edit"]),
    Rule::new("route-tables", Holder::Project, &["view"], &["edit"]),
    Rule::new("peerings", Holder::Project, &["view"], &["edit"]),
    Rule::new("internet-gateways", Holder::Project, &["view"], &["edit"]),
    Rule::new("nat-gateways", Holder::Project, &["view"], &["edit"]),
    Rule::new("floating-ips", Holder::Project, &["view"], &["edit"]),
    Rule::new("load-balancers", Holder::Project, &["view"], &["edit"]),
    Rule::new("dns-zones", Holder::Project, &["view"], &["edit"]),
    Rule::new("address-pools", Holder::Fleet, &["everyone", "fleet-view"], &["fleet-operate"]).level(Level::Fleet),
    // Identity. The rule `rank` in roles.cedar keeps those who may change accounts from changing an owner's.
    Rule::new("users", Holder::Organization, &["view", "self", "audit"], PEOPLE).level(Level::Organization).verbs(&[
        ("set-password", &["self"], Level::Organization),
        ("enroll-totp", &["self"], Level::Organization),
        ("confirm-totp", &["self"], Level::Organization),
        ("invite", PEOPLE, Level::Organization),
    ]),
    Rule::new("groups", Holder::Organization, &["view", "audit"], PEOPLE).level(Level::Organization),
    Rule::new("service-accounts", Holder::Organization, &["view", "self", "audit"], PEOPLE),
    Rule::new("role-bindings", Holder::Any, &["view", "audit"], PEOPLE),
    Rule::new("policies", Holder::Any, &["view", "audit"], &["own"]),
    Rule::new("identity-providers", Holder::Organization, &["view", "audit"], &["own"]).level(Level::Organization),
    Rule::new("tokens", Holder::Account, CREDENTIALS, &["self", "issue"]).verbs(&[(
        "delete",
        &["self", "admin"],
        Level::Project,
    )]),
    Rule::new("access-keys", Holder::Account, CREDENTIALS, &["self", "issue"]).verbs(&[(
        "delete",
        &["self", "admin"],
        Level::Project,
    )]),
    Rule::new("sessions", Holder::Account, CREDENTIALS, &["self"]).verbs(&[(
        "delete",
        &["self", "admin"],
        Level::Project,
    )]),
    Rule::new("audit", Holder::Any, &["audit"], &[])
        .verbs(&[("export", &["audit"], Level::Project), ("forget", &["fleet-operate"], Level::Fleet)]),
    // What is not a collection: the fleet's own faces.
    Rule::new("status", Holder::Fleet, &["fleet-view"], &[]),
];

/// Verbs of kinds beside the standard ones, as (plural, verb).
pub const VERBS: &[(&str, &str)] = &[
    ("instances", "logs"),
    ("instances", "exec"),
    ("secrets", "reveal"),
    ("users", "set-password"),
    ("users", "invite"),
    ("users", "enroll-totp"),
    ("users", "confirm-totp"),
    ("apps", "load"),
    ("webhooks", "test"),
    ("deliveries", "resend"),
    ("nics", "trace"),
    ("nics", "capture"),
    ("hosts", "check"),
];

/// Actions on collections that are no kinds.
pub const EXTRAS: &[(&str, &str)] = &[
    ("status", "get"),
    ("blobs", "get"),
    ("blobs", "put"),
    ("blobs", "pull"),
    ("audit", "list"),
    ("audit", "export"),
    ("audit", "forget"),
];

/// What operators do to the fleet itself. Those that carry a credential of their own are asked of nobody.
pub const OPERATIONS: &[&str] = &[
    "trust",
    "server-token",
    "host-token",
    "gateway-token",
    "token-list",
    "token-revoke",
    "server-join",
    "host-join",
    "gateway-join",
    "server-list",
    "server-remove",
    "server-replace",
    "region-remove",
    "host-leave",
    "backup-create",
    "backup-list",
    "master-key-status",
    "master-key-rewrap",
    "image-gc",
    "rebalance",
];

/// Every `operations:NAME` is the fleet's.
pub(crate) const OPERATION: (Groups, Level) = (&["fleet-operate"], Level::Fleet);

pub(crate) fn find(plural: &str) -> Option<&'static Rule> {
    RULES.iter().find(|r| r.plural == plural)
}
