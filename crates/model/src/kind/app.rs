//! A deployed service: what to run, how many, and how to know that it is well.

use std::collections::BTreeMap;

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    Autoscale, Classes, Column, Constraints, Disruption, Home, Kind, Part, Parts, Rollout, RolloutPhase, RolloutStatus,
    Scope, SecretRef, SharedFolder, TemplateNetwork, TemplateNic, Verbs, autoscale, network, part, rollout, secret,
};
use crate::selector::{LABEL_KEY_PATTERN, LABEL_VALUE_PATTERN};
use crate::{Bytes, Condition, Digest, FieldError, MilliCpu, Name, Timestamp};

#[derive(Debug, Clone)]
pub struct App;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    #[default]
    Container,
    Function,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.1.
    #[default]
    Http,
    /// HTTP/2 without TLS, with prior knowledge.
    H2c,
    Tcp,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Port {
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    #[serde(default)]
    pub protocol: Protocol,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
}

// The bounds of `validate_template` as patterns: a text that matches is within them. A few odd spellings of amounts that are
// within do not match, such as `0064Mi`.

/// 1m to 1000.
const CPU_PATTERN: &str = r"^(([1-9][0-9]{0,5}|1000000)m|([1-9][0-9]{0,2}|1000)|[1-9][0-9]{0,2}\.[0-9]{1,3}|0\.([1-9][0-9]{0,2}|0[1-9][0-9]?|00[1-9]))$";
/// 4Mi to [`MAX_BYTES`].
const MEMORY_PATTERN: &str = concat!(
    r"^(419430[4-9]|41943[1-9][0-9]|4194[4-9][0-9]{2}|419[5-9][0-9]{3}|4[2-9][0-9]{5}|[5-9][0-9]{6}|[1-9][0-9]{7,17}",
    r"|(409[6-9]|4[1-9][0-9]{2}|[5-9][0-9]{3}|[1-9][0-9]{4,14})Ki|([5-9][0-9]{3}|[1-9][0-9]{4,14})k",
    r"|4Mi|([5-9]|[1-9][0-9]{1,11})(Mi|M)|[1-9][0-9]{0,8}(Gi|G)|[1-9][0-9]{0,5}(Ti|T))$",
);
/// 64Ki to [`MAX_BYTES`].
pub(super) const SCRATCH_PATTERN: &str = concat!(
    r"^(6553[6-9]|655[4-9][0-9]|65[6-9][0-9]{2}|6[6-9][0-9]{3}|[7-9][0-9]{4}|[1-9][0-9]{5,17}",
    r"|(6[4-9]|[7-9][0-9]|[1-9][0-9]{2,14})Ki|(6[6-9]|[7-9][0-9]|[1-9][0-9]{2,14})k",
    r"|[1-9][0-9]{0,11}(Mi|M)|[1-9][0-9]{0,8}(Gi|G)|[1-9][0-9]{0,5}(Ti|T))$",
);
/// More than any host has, and little enough that sums stay far from overflow.
pub(super) const MAX_BYTES: u64 = 1 << 60;
/// A path of HTTP.
pub(super) const PATH_PATTERN: &str = "^/[!-~]{0,1023}$";
/// No zero byte.
pub(super) const TEXT_PATTERN: &str = r"^[^\x00]*$";
/// The name of a variable.
pub(super) const VARIABLE_PATTERN: &str = r"^[^=\x00]{1,256}$";

/// What one instance gets. `cpu` and `memory` are both what is reserved and what is enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    #[schemars(range(min = 0.001, max = 1000), regex(pattern = CPU_PATTERN))]
    pub cpu: MilliCpu,
    #[schemars(range(min = 4_194_304, max = 9_007_199_254_740_991u64), regex(pattern = MEMORY_PATTERN))]
    pub memory: Bytes,
    /// Processes and threads.
    #[schemars(range(min = 1, max = 32768))]
    pub pids: u32,
    /// The writable layer over the image; gone with the instance.
    #[schemars(range(min = 65_536, max = 9_007_199_254_740_991u64), regex(pattern = SCRATCH_PATTERN))]
    pub scratch: Bytes,
}

impl Default for Resources {
    fn default() -> Self {
        Self { cpu: MilliCpu(100), memory: Bytes(128 << 20), pids: 512, scratch: Bytes(64 << 20) }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// A GET that must answer 2xx or 3xx.
    Http {
        #[schemars(range(min = 1, max = 65535))]
        port: u16,
        #[schemars(length(min = 1, max = 1024), regex(pattern = PATH_PATTERN))]
        path: String,
    },
    /// A connection that must open.
    Tcp {
        #[schemars(range(min = 1, max = 65535))]
        port: u16,
    },
    /// A command in the instance that must exit with 0.
    Exec {
        #[schemars(length(min = 1, max = 256), inner(length(max = MAX_TEXT), regex(pattern = TEXT_PATTERN)))]
        command: Vec<String>,
    },
}

/// How the cloud knows that an instance is well. A failed readiness check takes the instance out of the gateways; a
/// failed liveness check restarts it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheck {
    pub probe: Probe,
    #[serde(default = "second")]
    #[schemars(range(min = 1, max = 3600))]
    pub interval_seconds: u32,
    #[serde(default = "second")]
    #[schemars(range(min = 1, max = 300))]
    pub timeout_seconds: u32,
    /// So many failures in a row make it unhealthy.
    #[serde(default = "three")]
    #[schemars(range(min = 1, max = 100))]
    pub failures: u32,
}

fn second() -> u32 {
    1
}

fn three() -> u32 {
    3
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HealthChecks {
    /// Without it, an instance with an HTTP or TCP port is ready when its first port accepts a connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub readiness: Option<HealthCheck>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub liveness: Option<HealthCheck>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Spread {
    None,
    Host,
    #[default]
    Zone,
    Rack,
    FaultDomain,
}

/// Bounds of a function's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct FunctionLimits {
    /// Requests at once in one instance; more wait, and are refused when they have waited for `timeoutSeconds`.
    #[schemars(range(min = 1, max = 1000))]
    pub concurrency: u32,
    #[schemars(range(min = 1, max = 900))]
    pub timeout_seconds: u32,
}

impl Default for FunctionLimits {
    fn default() -> Self {
        Self { concurrency: 64, timeout_seconds: 30 }
    }
}

/// Declares [`Template`] and [`AppSpec`], which is flat for its writers: the template's fields beside its own. Flattening
/// by serde would lose the path of a field at fault.
macro_rules! declare_template {
    ($($(#[$attribute:meta])* $field:ident: $type:ty = $default:expr;)*) => {
        /// What one instance runs. An instance carries the template it was made from, so that its host needs nothing
        /// else.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "camelCase", default)]
        pub struct Template {
            $($(#[$attribute])* pub $field: $type,)*
        }

        impl Template {
            /// Its parts, and what they come to together.
            pub fn parts(&self) -> Parts<'_> {
                let (image, secrets, resources) = (&self.image, &self.secrets, &self.resources);
                Parts { image, secrets, resources, init: &self.init, sidecars: &self.sidecars, shared: self.shared.as_ref() }
            }
        }

        impl Default for Template {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        /// What an app's instances run, how many there are, and how they are reached.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "camelCase", default)]
        pub struct AppSpec {
            $($(#[$attribute])* pub $field: $type,)*
            /// Of a global app: the total, shared out evenly over its regions, at least one each.
            #[schemars(range(max = 10_000))]
            pub replicas: u32,
            /// Has the cloud choose the number instead; `replicas` is then what it begins with. Of a global app, each region
            /// chooses by itself within its share of the bounds.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub autoscale: Option<Autoscale>,
            /// Of a global app: the regions that run it; all of them, without any.
            #[serde(skip_serializing_if = "Vec::is_empty")]
            #[schemars(length(max = MAX_REGIONS))]
            pub regions: Vec<Name>,
            pub spread: Spread,
            /// Whether gateways answer for `NAME.DOMAIN` with this app.
            pub expose: bool,
            /// Labels that its instances carry.
            #[serde(skip_serializing_if = "IndexMap::is_empty")]
            #[schemars(extend(
                "maxProperties" = 64,
                "propertyNames" = {"pattern": LABEL_KEY_PATTERN},
                "additionalProperties" = {"type": "string", "pattern": LABEL_VALUE_PATTERN},
            ))]
            pub instance_labels: IndexMap<String, String>,
            /// How instances of an older template are replaced.
            pub rollout: Rollout,
            /// How many instances operators' work (draining a host, a rebalance) may take away, counting those that are not ready
            /// for other reasons; without it, `maxUnavailable` is 25 %. Of a global app, in each region.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub disruption: Option<Disruption>,
            /// The content of the image that is run, whatever the image's name stands for now: that of a revision that is
            /// kept. An undo writes it.
            #[serde(skip_serializing_if = "Option::is_none")]
            pub image_digest: Option<Digest>,
            /// Likewise, of the images of its init steps and sidecars: their content by image name.
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            #[schemars(extend("maxProperties" = 2 * part::MAX_PARTS))]
            pub part_digests: BTreeMap<Name, Digest>,
        }

        impl AppSpec {
            /// Its parts, and what they come to together.
            pub fn parts(&self) -> Parts<'_> {
                let (image, secrets, resources) = (&self.image, &self.secrets, &self.resources);
                Parts { image, secrets, resources, init: &self.init, sidecars: &self.sidecars, shared: self.shared.as_ref() }
            }

            pub fn template(&self) -> Template {
                Template { $($field: self.$field.clone(),)* }
            }

            /// The same app with another template.
            pub fn with_template(self, template: Template) -> Self {
                Self { $($field: template.$field,)* ..self }
            }
        }

        impl From<Template> for AppSpec {
            fn from(template: Template) -> Self {
                Self {
                    $($field: template.$field,)*
                    replicas: 1,
                    autoscale: None,
                    regions: Vec::new(),
                    spread: Spread::default(),
                    expose: true,
                    instance_labels: IndexMap::new(),
                    rollout: Rollout::default(),
                    disruption: None,
                    image_digest: None,
                    part_digests: BTreeMap::new(),
                }
            }
        }
    };
}

declare_template! {
    runtime: Runtime = Runtime::default();
    /// The name of an `Image` of the same project. `none` is no image's.
    #[schemars(extend("not" = {"const": "none"}))]
    image: Name = "none".parse().expect("a well-formed name");
    /// In place of the image's entry point.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = MAX_TEXT), regex(pattern = TEXT_PATTERN)))]
    command: Vec<String> = Vec::new();
    /// In place of the image's arguments.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = MAX_TEXT), regex(pattern = TEXT_PATTERN)))]
    args: Vec<String> = Vec::new();
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    #[schemars(extend(
        "maxProperties" = 256,
        "propertyNames" = {"pattern": VARIABLE_PATTERN},
        "additionalProperties" = {"type": "string", "maxLength": MAX_TEXT, "pattern": TEXT_PATTERN},
    ))]
    env: IndexMap<String, String> = IndexMap::new();
    /// Secrets that each instance gets, as variables or as files.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = secret::MAX_SECRETS))]
    secrets: Vec<SecretRef> = Vec::new();
    #[schemars(length(max = 32))]
    ports: Vec<Port> = Vec::new();
    resources: Resources = Resources::default();
    /// Compute classes that each instance takes.
    #[serde(skip_serializing_if = "IndexMap::is_empty")]
    #[schemars(schema_with = "super::classes_schema")]
    classes: Classes = Classes::new();
    health: HealthChecks = HealthChecks::default();
    /// `TERM`, `INT`, `QUIT`, `HUP`, `USR1`, `USR2` or `KILL`.
    #[schemars(regex(pattern = r"^(TERM|INT|QUIT|HUP|USR1|USR2|KILL)$"))]
    stop_signal: String = "TERM".into();
    /// How long an instance may take to stop before it is killed.
    #[schemars(range(max = 3600))]
    stop_grace_seconds: u32 = 10;
    function: FunctionLimits = FunctionLimits::default();
    #[serde(skip_serializing_if = "Constraints::is_empty")]
    constraints: Constraints = Constraints::default();
    /// The storage class of the disk that the writable layer is on; the host's own disk, without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    storage_class: Option<Name> = None;
    /// Interfaces in the project's networks, beside the one that gateways reach it by: `nic0`, `nic1` … Of containers only.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = super::MAX_INSTANCE_NICS))]
    nics: Vec<TemplateNic> = Vec::new();
    /// Without `nics`: whether instances get one in the project's default network. The project's `defaultNetwork` says, without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<TemplateNetwork> = None;
    /// Run to completion one after another before the app's own container starts. One that fails is tried again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "part::init_schema")]
    init: Vec<Part> = Vec::new();
    /// Run beside the app's own container: started before it, started again when they end, stopped after it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = part::MAX_PARTS))]
    sidecars: Vec<Part> = Vec::new();
    /// A folder that all of them see; with init steps or sidecars there is one at `/run/shared` in any case.
    #[serde(skip_serializing_if = "Option::is_none")]
    shared: Option<SharedFolder> = None;
}

impl Default for AppSpec {
    fn default() -> Self {
        Template::default().into()
    }
}

/// Regions that one global app may name.
const MAX_REGIONS: usize = 64;

/// The port on which every function answers HTTP.
pub const FUNCTION_PORT: u16 = 8080;

impl Template {
    /// The ports that the instance serves: a function always answers HTTP on [`FUNCTION_PORT`].
    pub fn served_ports(&self) -> Vec<Port> {
        match self.runtime {
            Runtime::Container => self.ports.clone(),
            Runtime::Function => vec![Port { port: FUNCTION_PORT, protocol: Protocol::Http, name: None }],
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AppPhase {
    #[default]
    Pending,
    /// Every replica of the newest generation is ready.
    Ready,
    /// Some replicas are not ready, or of an older generation.
    Progressing,
    /// Scaled to nothing on purpose.
    Stopped,
    /// The newest template has failed, and the one before it serves again.
    RolledBack,
}

/// What one region runs of a global app, as it last reported it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AppRegion {
    pub region: Name,
    /// Its share of the replicas.
    #[serde(default)]
    pub desired_replicas: u32,
    #[serde(default)]
    pub replicas: u32,
    #[serde(default)]
    pub ready_replicas: u32,
    #[serde(default)]
    pub updated_replicas: u32,
    /// How far its rollout is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutPhase>,
    /// Why it does not run its share, in a sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// What the autoscaler decided last, and why.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AutoscaleStatus {
    pub desired_replicas: u32,
    /// In a sentence.
    pub reason: String,
    /// When the number changed last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub changed: Option<Timestamp>,
}

impl AppSpec {
    /// How many instances the app may come to have: what its project's quota is charged.
    pub fn most_replicas(&self) -> u32 {
        self.autoscale.as_ref().map_or(self.replicas, |a| a.max_replicas)
    }

    /// How many instances the app should have now.
    pub fn wanted_replicas(&self, status: &AppStatus) -> u32 {
        match &self.autoscale {
            None => self.replicas,
            Some(a) => a.clamp(status.autoscale.as_ref().map_or(self.replicas, |s| s.desired_replicas)),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AppStatus {
    pub phase: AppPhase,
    /// The generation of the spec that this status speaks of.
    pub observed_generation: u64,
    pub desired_replicas: u32,
    pub replicas: u32,
    pub ready_replicas: u32,
    /// Replicas of the newest template.
    pub updated_replicas: u32,
    /// The host names under which gateways answer.
    pub hostnames: Vec<String>,
    /// How far the newest template is; of a global app, what was ordered in all its regions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,
    /// Of a global app: how each region does.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub regions: Vec<AppRegion>,
    /// Of an app whose instances the cloud counts: its last decision.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoscale: Option<AutoscaleStatus>,
    pub conditions: Vec<Condition>,
}

impl Kind for App {
    const KIND: &'static str = "App";
    const PLURAL: &'static str = "apps";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "A deployed service: an image, how to run it, and how many replicas.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Either;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("PHASE", "/status/phase"),
        Column::new("READY", "/status/readyReplicas"),
        Column::new("WANTED", "/status/desiredReplicas"),
        Column::new("RUNTIME", "/spec/runtime"),
        Column::new("IMAGE", "/spec/image"),
        Column::new("ROLLOUT", "/status/rollout/phase").wide(),
        Column::new("HOSTNAME", "/status/hostnames/0").wide(),
    ];
    type Spec = AppSpec;
    type Status = AppStatus;

    fn validate(spec: &AppSpec) -> Vec<FieldError> {
        let mut errors = validate_template(&spec.template());
        if spec.replicas > 10_000 {
            errors.push(FieldError::new("spec.replicas", "at most 10000"));
        }
        if let Some(a) = &spec.autoscale {
            errors.extend(autoscale::validate(a, &spec.template()));
        }
        if spec.regions.len() > MAX_REGIONS {
            errors.push(FieldError::new("spec.regions", format!("at most {MAX_REGIONS}")));
        }
        for (i, region) in spec.regions.iter().enumerate() {
            if spec.regions[..i].contains(region) {
                errors.push(FieldError::new(format!("spec.regions[{i}]"), "listed twice"));
            }
        }
        if spec.part_digests.len() > 2 * part::MAX_PARTS {
            errors.push(FieldError::new("spec.partDigests", format!("at most {}", 2 * part::MAX_PARTS)));
        }
        errors.extend(super::validate_labels("spec.instanceLabels", &spec.instance_labels));
        errors.extend(rollout::validate_rollout(&spec.rollout));
        errors
    }

    fn example() -> AppSpec {
        AppSpec {
            image: "web".parse().expect("a well-formed name"),
            ports: vec![Port { port: 80, protocol: Protocol::Http, name: None }],
            replicas: 3,
            ..AppSpec::default()
        }
    }
}

const SIGNALS: [&str; 7] = ["TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "KILL"];
/// Bounds one variable or argument, in characters. Linux takes at most 128 KiB in each.
pub(super) const MAX_TEXT: usize = 16 << 10;

fn is_text(text: &str) -> bool {
    text.chars().count() <= MAX_TEXT && !text.contains('\0')
}

/// The errors of a template that stands at `field`, such as `spec.template`.
pub(super) fn validate_template_at(field: &str, template: &Template) -> Vec<FieldError> {
    let moved = |e: FieldError| FieldError { field: e.field.replacen("spec", field, 1), ..e };
    validate_template(template).into_iter().map(moved).collect()
}

fn validate_template(t: &Template) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mut check = |ok: bool, field: &str, message: &str| {
        if !ok {
            errors.push(FieldError::new(field, message));
        }
    };
    check(t.image != "none", "spec.image", "name an image of this project; see `nexus get images`");
    check(t.ports.len() <= 32, "spec.ports", "at most 32");
    for (i, p) in t.ports.iter().enumerate() {
        check(p.port != 0, &format!("spec.ports[{i}].port"), "between 1 and 65535");
        let first = t.ports.iter().position(|q| q.port == p.port) == Some(i);
        check(first, &format!("spec.ports[{i}].port"), "listed twice");
    }
    if t.runtime == Runtime::Function {
        check(t.ports.is_empty(), "spec.ports", "a function always answers HTTP on port 8080: leave ports out");
        check(t.command.is_empty() && t.args.is_empty(), "spec.command", "a function has no command");
        check(t.storage_class.is_none(), "spec.storageClass", "a function has no writable layer");
        let nics = "a function has no interfaces but one in the project's default network: say `network: default`";
        check(t.nics.is_empty(), "spec.nics", nics);
        let shared = "a function shares its process with others of its project: leave numa=single out";
        check(!t.constraints.single_node(), "spec.constraints", shared);
    }
    if !t.nics.is_empty() {
        let message = "spec.nics names the networks: leave one of the two out";
        check(t.network != Some(TemplateNetwork::Default), "spec.network", message);
    }
    let mut own = |ok: bool, field: &str, message: &str| check(ok, &format!("spec.{field}"), message);
    check_resources(&mut own, &t.resources);
    check_words(&mut own, &t.command, &t.args, &t.env);
    check(
        SIGNALS.contains(&t.stop_signal.as_str()),
        "spec.stopSignal",
        "one of TERM, INT, QUIT, HUP, USR1, USR2, KILL",
    );
    check(t.stop_grace_seconds <= 3600, "spec.stopGraceSeconds", "at most 3600");
    check((1..=1000).contains(&t.function.concurrency), "spec.function.concurrency", "between 1 and 1000");
    check((1..=900).contains(&t.function.timeout_seconds), "spec.function.timeoutSeconds", "between 1 and 900");
    for (name, health) in [("readiness", &t.health.readiness), ("liveness", &t.health.liveness)] {
        let Some(h) = health else { continue };
        let mut own = |ok: bool, field: &str, message: &str| check(ok, &format!("spec.health.{field}"), message);
        check_health(&mut own, name, h, t.runtime == Runtime::Container);
    }
    if t.constraints.len() > super::MAX_CONSTRAINTS {
        errors.push(FieldError::new("spec.constraints", format!("at most {}", super::MAX_CONSTRAINTS)));
    }
    errors.extend(super::validate_classes("spec.classes", &t.classes));
    errors.extend(network::validate_nics(&t.nics));
    errors.extend(secret::validate_refs(&t.secrets, &t.env, t.runtime == Runtime::Container));
    errors.extend(part::validate_parts(t));
    errors
}

/// Told whether a field is as it should be, its path, and what it should be.
type Check<'a> = dyn FnMut(bool, &str, &str) + 'a;

pub(super) fn check_resources(check: &mut Check<'_>, r: &Resources) {
    check((1..=1_000_000).contains(&r.cpu.0), "resources.cpu", "between 1m and 1000");
    check(r.memory.0 >= 4 << 20, "resources.memory", "at least 4Mi");
    check(r.memory.0 <= MAX_BYTES, "resources.memory", "at most 1048576Ti");
    check((1..=32_768).contains(&r.pids), "resources.pids", "between 1 and 32768");
    check(r.scratch.0 <= MAX_BYTES, "resources.scratch", "at most 1048576Ti");
    check(r.scratch.0 >= 64 << 10, "resources.scratch", "at least 64Ki");
}

pub(super) fn check_words(check: &mut Check<'_>, command: &[String], args: &[String], env: &IndexMap<String, String>) {
    check(env.len() <= 256, "env", "at most 256 variables");
    for (key, value) in env {
        let field = format!("env.{}", key.chars().take(64).collect::<String>());
        let named = (1..=256).contains(&key.chars().count()) && !key.contains(['=', '\0']);
        check(named, &field, "not a variable's name");
        check(is_text(value), &field, "at most 16384 characters, without a zero byte");
    }
    for (list, field) in [(command, "command"), (args, "args")] {
        check(list.len() <= 256, field, "at most 256 words");
        check(list.iter().all(|w| is_text(w)), field, "words of at most 16384 characters, without a zero byte");
    }
}

/// A check that stands at the field `name`.
pub(super) fn check_health(check: &mut Check<'_>, name: &str, h: &HealthCheck, is_container: bool) {
    let at = |field: &str| format!("{name}.{field}");
    check((1..=3600).contains(&h.interval_seconds), &at("intervalSeconds"), "between 1 and 3600");
    check((1..=300).contains(&h.timeout_seconds), &at("timeoutSeconds"), "between 1 and 300");
    check((1..=100).contains(&h.failures), &at("failures"), "between 1 and 100");
    match &h.probe {
        Probe::Http { port, path } => {
            check(*port != 0, &at("probe.http.port"), "between 1 and 65535");
            let good = path.starts_with('/') && path.len() <= 1024 && path.bytes().all(|b| b.is_ascii_graphic());
            check(good, &at("probe.http.path"), "begins with / and has no space");
        }
        Probe::Tcp { port } => check(*port != 0, &at("probe.tcp.port"), "between 1 and 65535"),
        Probe::Exec { command } => {
            let good = (1..=256).contains(&command.len()) && command.iter().all(|w| is_text(w));
            check(good, &at("probe.exec.command"), "1 to 256 words of at most 16384 characters");
            check(is_container, &at("probe.exec"), "a function can't run a command");
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_bounds_of_resources_are_exact() {
        let valid = |field: &str, value: &str| {
            let mut spec = serde_json::json!({"image": "web", "resources": {}});
            spec["resources"][field] = value.into();
            (crate::kind::find("app").unwrap().parse_spec)(&spec).is_ok()
        };
        for good in ["1m", "0.001", "1000", "1000000m"] {
            assert!(valid("cpu", good), "{good}");
        }
        for bad in ["0", "0m", "0.000", "1001", "1000001m"] {
            assert!(!valid("cpu", bad), "{bad}");
        }
        for good in ["4194304", "4096Ki", "4195k", "4Mi", "5M", "999999Ti", "999999999999999Ki"] {
            assert!(valid("memory", good), "{good}");
        }
        for bad in ["4194303", "4095Ki", "4194k", "4M", "1048577Ti"] {
            assert!(!valid("memory", bad), "{bad}");
        }
        for (text, good) in [("65536", true), ("64Ki", true), ("66k", true), ("65535", false), ("65k", false)] {
            assert_eq!(valid("scratch", text), good, "{text}");
        }
    }
}
