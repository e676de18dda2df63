//! What a decision is asked about and what it answers: principals, resources, the request's circumstances, grants.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use nexus_model::Timestamp;
use nexus_model::selector::Labels;
use serde::{Deserialize, Serialize};

use super::PolicyError;
use super::vocabulary::PrincipalKind;

/// Who asks, or whom a binding names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Principal {
    kind: PrincipalKind,
    id: Arc<str>,
    /// Empty for the fleet's own.
    organization: Arc<str>,
}

impl Principal {
    fn of_organization(kind: PrincipalKind, organization: &str, name: &str) -> Self {
        Self { kind, id: format!("{organization}/{name}").into(), organization: organization.into() }
    }

    pub fn user(organization: &str, name: &str) -> Self {
        Self::of_organization(PrincipalKind::User, organization, name)
    }

    pub fn service_account(organization: &str, name: &str) -> Self {
        Self::of_organization(PrincipalKind::ServiceAccount, organization, name)
    }

    pub fn group(organization: &str, name: &str) -> Self {
        Self::of_organization(PrincipalKind::Group, organization, name)
    }

    /// `path` is that of its SPIFFE id, `organization` its project's.
    pub fn workload(organization: &str, path: &str) -> Self {
        Self { kind: PrincipalKind::Workload, id: path.into(), organization: organization.into() }
    }

    /// `path` is that of its SPIFFE id.
    pub fn host(path: &str) -> Self {
        Self { kind: PrincipalKind::Host, id: path.into(), organization: "".into() }
    }

    /// The holder of one of the fleet's own keys.
    pub fn operator(name: &str) -> Self {
        Self { kind: PrincipalKind::Operator, id: name.into(), organization: "".into() }
    }

    pub fn kind(&self) -> PrincipalKind {
        self.kind
    }

    /// `organization/name`, a path, or a name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Empty for hosts and operators.
    pub fn organization(&self) -> &str {
        &self.organization
    }

    pub fn name(&self) -> &str {
        match self.kind {
            PrincipalKind::User | PrincipalKind::ServiceAccount | PrincipalKind::Group => {
                self.id.split_once('/').map_or(&*self.id, |(_, name)| name)
            }
            _ => &self.id,
        }
    }
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::\"{}\"", self.kind.entity_type(), self.id)
    }
}

/// The built-in roles, whose policies are `roles.cedar`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Owner,
    Admin,
    Editor,
    Viewer,
    Auditor,
    Billing,
    FleetOperator,
    FleetViewer,
}

impl Role {
    pub const ALL: [Self; 8] = [
        Self::Owner,
        Self::Admin,
        Self::Editor,
        Self::Viewer,
        Self::Auditor,
        Self::Billing,
        Self::FleetOperator,
        Self::FleetViewer,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Owner => "owner",
            Self::Admin => "admin",
            Self::Editor => "editor",
            Self::Viewer => "viewer",
            Self::Auditor => "auditor",
            Self::Billing => "billing",
            Self::FleetOperator => "fleet-operator",
            Self::FleetViewer => "fleet-viewer",
        }
    }

    /// Whether it is held over the fleet, and over nothing less.
    pub fn is_of_fleet(self) -> bool {
        matches!(self, Self::FleetOperator | Self::FleetViewer)
    }

    pub(crate) fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Role {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let found = Self::ALL.into_iter().find(|r| r.name() == text);
        found.ok_or_else(|| PolicyError::NoRole(text.chars().take(64).collect()))
    }
}

/// What a grant or policy reaches.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reach {
    Fleet,
    Organization(Arc<str>),
    Project { organization: Arc<str>, project: Arc<str> },
}

impl Reach {
    pub fn organization(name: &str) -> Self {
        Self::Organization(name.into())
    }

    pub fn project(organization: &str, project: &str) -> Self {
        Self::Project { organization: organization.into(), project: project.into() }
    }

    /// The organization that it belongs to, unless it is the fleet.
    pub fn owner(&self) -> Option<&Arc<str>> {
        match self {
            Self::Fleet => None,
            Self::Organization(organization) | Self::Project { organization, .. } => Some(organization),
        }
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fleet => f.write_str("the fleet"),
            Self::Organization(organization) => write!(f, "organization {organization}"),
            Self::Project { project, .. } => write!(f, "project {project}"),
        }
    }
}

/// A grant: these principals and groups have that role there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Binding {
    /// Unique within `reach`.
    pub name: Arc<str>,
    pub role: Role,
    pub reach: Reach,
    pub subjects: Vec<Principal>,
}

/// A custom policy: one or more statements of Cedar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyText {
    /// Unique within `reach`.
    pub name: Arc<str>,
    pub reach: Reach,
    /// Of an organization, and only forbids: holds in all its projects.
    #[serde(default)]
    pub guard_rail: bool,
    pub text: Arc<str>,
}

/// What is asked for, borrowed from the request and the object.
#[derive(Debug, Clone, Copy, Default)]
pub struct Resource<'a> {
    /// The kind: `App`, `Project`, or `Fleet`.
    pub kind: &'a str,
    pub name: &'a str,
    /// The one that owns it. Of an organization, its own name.
    pub organization: Option<&'a str>,
    /// The one that it is in. Of a project, its own name.
    pub project: Option<&'a str>,
    pub region: Option<&'a str>,
    pub labels: Option<&'a Labels>,
    /// Of a role binding: the role that it gives.
    pub grants: Option<Role>,
    /// Of a credential: whose it is.
    pub holder: Option<&'a Principal>,
}

impl<'a> Resource<'a> {
    pub const FLEET: Resource<'static> = Resource {
        kind: "Fleet",
        name: "fleet",
        organization: None,
        project: None,
        region: None,
        labels: None,
        grants: None,
        holder: None,
    };

    pub fn organization(name: &'a str) -> Self {
        Self { kind: "Organization", name, organization: Some(name), ..Self::default() }
    }

    pub fn project(organization: &'a str, name: &'a str) -> Self {
        Self { kind: "Project", name, organization: Some(organization), project: Some(name), ..Self::default() }
    }

    /// What a project owns.
    pub fn in_project(
        kind: &'a str,
        organization: &'a str,
        project: &'a str,
        region: &'a str,
        name: &'a str,
        labels: &'a Labels,
    ) -> Self {
        Self {
            kind,
            name,
            organization: Some(organization),
            project: Some(project),
            region: Some(region),
            labels: Some(labels),
            ..Self::default()
        }
    }

    /// What a region owns.
    pub fn in_region(kind: &'a str, region: &'a str, name: &'a str) -> Self {
        Self { kind, name, region: Some(region), ..Self::default() }
    }

    /// What an organization owns beside projects.
    pub fn in_organization(kind: &'a str, organization: &'a str, name: &'a str) -> Self {
        Self { kind, name, organization: Some(organization), ..Self::default() }
    }

    /// A token, access key or session.
    pub fn credential(kind: &'a str, holder: &'a Principal, name: &'a str) -> Self {
        Self { kind, name, organization: Some(holder.organization()), holder: Some(holder), ..Self::default() }
    }
}

/// The circumstances of a request.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances<'a> {
    pub ip: IpAddr,
    pub time: Timestamp,
    /// Whether the session was opened with a second factor.
    pub mfa: bool,
    pub request_id: &'a str,
}

/// A question.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub principal: &'a Principal,
    /// `apps:list`
    pub action: &'a str,
    pub resource: Resource<'a>,
    pub circumstances: Circumstances<'a>,
}

/// Where a statement comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "camelCase", tag = "from")]
pub enum Source {
    /// A statement of `roles.cedar` that is no role's.
    BuiltIn { id: Arc<str> },
    /// A role, by a binding.
    Binding { role: Role, name: Arc<str>, reach: Reach },
    /// A statement of a custom policy, counted from 1.
    Policy { name: Arc<str>, reach: Reach, guard_rail: bool, statement: usize },
}

/// What decided, for the audit log and for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Reason {
    pub source: Source,
    /// Whether it permits; else it forbids.
    pub permits: bool,
    /// One line for people.
    pub description: String,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    /// Of an allowed request one permit that holds, with every binding that gives its role; of a refused one that something
    /// permits, every forbid that holds; empty when nothing permits it.
    pub by: Vec<Arc<Reason>>,
    /// Of a refused request: the action that is missing.
    pub missing_action: Option<Arc<str>>,
    /// Statements that could not be evaluated. A forbid that can't be evaluated forbids, a permit does not permit.
    pub errors: Vec<String>,
}

/// A statement that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Considered {
    pub reason: Arc<Reason>,
    pub holds: bool,
}

/// Why a request is answered as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    pub decision: Decision,
    /// Every statement whose scope fits the request, whether its conditions hold or not.
    pub considered: Vec<Considered>,
    /// The roles of the principal over the resource.
    pub roles: Vec<Role>,
    /// The roles that would permit it, if nothing forbade it.
    pub roles_that_would: Vec<Role>,
}
