//! Who owns things: organizations and their projects.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Column, Home, Kind, Scope, Verbs};
use crate::{Bytes, Cidr, Condition, FieldError, MilliCpu, Name};

/// The organization of the cloud itself. What is granted in it is granted over the fleet.
pub const SYSTEM_ORGANIZATION: &str = "system";

#[derive(Debug, Clone)]
pub struct Organization;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct OrganizationSpec {
    /// What people call it.
    #[schemars(length(max = 200))]
    pub display_name: String,
    /// What all of its projects together may use in each region. Only operators of the fleet change it.
    pub quota: Quota,
}

impl Default for OrganizationSpec {
    /// As much as a large region has: a bound for mistakes. Operators who bill or ration set their own.
    fn default() -> Self {
        let quota = Quota { instances: 1_000_000, cpu: MilliCpu(999_999_000), memory: Bytes(4 << 50) };
        Self { display_name: String::new(), quota }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct OrganizationStatus {
    pub conditions: Vec<Condition>,
}

impl Kind for Organization {
    const KIND: &'static str = "Organization";
    const PLURAL: &'static str = "organizations";
    const SHORT: &'static [&'static str] = &["org", "orgs"];
    const ABOUT: &'static str = "Owns projects.";
    const SCOPE: Scope = Scope::Global;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("DISPLAY NAME", "/spec/displayName"),
        Column::new("INSTANCES", "/spec/quota/instances").wide(),
        Column::new("CPU", "/spec/quota/cpu").wide(),
        Column::new("MEMORY", "/spec/quota/memory").wide(),
    ];
    type Spec = OrganizationSpec;
    type Status = OrganizationStatus;

    fn validate(spec: &OrganizationSpec) -> Vec<FieldError> {
        display_name(&spec.display_name)
    }

    fn example() -> OrganizationSpec {
        OrganizationSpec { display_name: "Example Ltd".into(), ..OrganizationSpec::default() }
    }
}

fn display_name(name: &str) -> Vec<FieldError> {
    if name.chars().count() > 200 {
        vec![FieldError::new("spec.displayName", "at most 200 characters")]
    } else {
        Vec::new()
    }
}

#[derive(Debug, Clone)]
pub struct Project;

/// What a project may use in each region.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Quota {
    pub instances: u32,
    pub cpu: MilliCpu,
    pub memory: Bytes,
}

impl Default for Quota {
    fn default() -> Self {
        Self { instances: 1_000, cpu: MilliCpu(1_000_000), memory: Bytes(4 << 40) }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProjectSpec {
    pub organization: Name,
    #[schemars(length(max = 200))]
    pub display_name: String,
    pub quota: Quota,
    /// What its containers reach outside of the cloud.
    pub egress: Egress,
    /// Whether containers for which no NICs are named get one in the project's network `default`, which is made in each region
    /// when the first of them needs it. Those that run already are left as they are. Left unsaid, a new project has one, and one
    /// that is there keeps to what it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default_network: Option<bool>,
}

impl ProjectSpec {
    /// Whether there is a default network. What a stored project says nothing of is as it was in the release that made it: there
    /// is none.
    pub fn has_default_network(&self) -> bool {
        self.default_network == Some(true)
    }

    /// What is left unsaid of a project, from what it was, if it was.
    pub fn complete(&mut self, old: Option<&ProjectSpec>) {
        let usual = match old {
            Some(old) => old.default_network,
            None => Some(true),
        };
        self.default_network = self.default_network.or(usual);
    }
}

/// Networks of one project's egress.
pub const MAX_EGRESS_NETWORKS: usize = 64;

/// What a project's containers may reach outside of the cloud. Never its hosts, servers and gateways, and never another
/// project's instances.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Egress {
    pub mode: EgressMode,
    /// What is reached although the mode is `deny`.
    #[schemars(length(max = MAX_EGRESS_NETWORKS))]
    pub networks: Vec<Cidr>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum EgressMode {
    /// Nothing but `networks`.
    #[default]
    Deny,
    /// Everything outside.
    Allow,
}

impl Egress {
    /// Whether anything outside can be reached, so that names from outside are of use.
    pub fn is_open(&self) -> bool {
        self.mode == EgressMode::Allow || !self.networks.is_empty()
    }
}

impl Default for ProjectSpec {
    fn default() -> Self {
        let organization = "default".parse().expect("a well-formed name");
        Self {
            organization,
            display_name: String::new(),
            quota: Quota::default(),
            egress: Egress::default(),
            default_network: None,
        }
    }
}

/// An amount of what quotas bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct QuotaUse {
    pub instances: u32,
    pub cpu: MilliCpu,
    pub memory: Bytes,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ProjectStatus {
    /// The sum over all regions, as they last reported it. What a region itself goes by is its `Usage`.
    pub used: QuotaUse,
    pub conditions: Vec<Condition>,
}

impl Kind for Project {
    const KIND: &'static str = "Project";
    const PLURAL: &'static str = "projects";
    const SHORT: &'static [&'static str] = &["proj"];
    const ABOUT: &'static str = "The unit of isolation, quota, network and bill.";
    const SCOPE: Scope = Scope::Global;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("ORGANIZATION", "/spec/organization"),
        Column::new("EGRESS", "/spec/egress/mode").wide(),
        Column::new("DEFAULT NETWORK", "/spec/defaultNetwork").wide(),
        Column::new("INSTANCES", "/status/used/instances"),
        Column::new("CPU", "/status/used/cpu"),
        Column::new("MEMORY", "/status/used/memory"),
    ];
    const IMMUTABLE: &'static [&'static str] = &["organization"];
    type Spec = ProjectSpec;
    type Status = ProjectStatus;

    fn validate(spec: &ProjectSpec) -> Vec<FieldError> {
        let mut errors = display_name(&spec.display_name);
        if spec.egress.networks.len() > MAX_EGRESS_NETWORKS {
            errors.push(FieldError::new("spec.egress.networks", format!("at most {MAX_EGRESS_NETWORKS}")));
        }
        errors
    }

    fn example() -> ProjectSpec {
        ProjectSpec { display_name: "The shop".into(), ..ProjectSpec::default() }
    }
}

#[derive(Debug, Clone)]
pub struct Usage;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct UsageSpec {}

/// Written in the same transaction as the rows that it counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct UsageStatus {
    pub used: QuotaUse,
}

impl Kind for Usage {
    const KIND: &'static str = "Usage";
    const PLURAL: &'static str = "usages";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "What a project uses of its quota in one region. Its name is the project's.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::READ_ONLY;
    const COLUMNS: &'static [Column] = &[
        Column::new("INSTANCES", "/status/used/instances"),
        Column::new("CPU", "/status/used/cpu"),
        Column::new("MEMORY", "/status/used/memory"),
    ];
    type Spec = UsageSpec;
    type Status = UsageStatus;

    fn validate(_: &UsageSpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> UsageSpec {
        UsageSpec {}
    }
}
