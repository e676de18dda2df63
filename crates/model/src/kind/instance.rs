//! One placed replica of an app, or one try of a job.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Column, Home, Kind, PartStatus, Scope, Template, Verbs};
use crate::{Condition, Digest, FieldError, Name, Timestamp};

#[derive(Debug, Clone)]
pub struct Instance;

/// Made by the app's reconciler and never changed: a new template makes a new instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceSpec {
    pub app: Name,
    /// Identifies the template: instances of one hash are interchangeable.
    pub template_hash: String,
    pub template: Template,
    /// The image's content at the moment of creation.
    pub image_digest: Digest,
    /// The same of the other images that its parts name, by image name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub part_digests: BTreeMap<Name, Digest>,
    /// Of a job's: it runs once, and is not started again where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<InstanceJob>,
    /// Its NIC is what its project's default network implies: nobody has asked for it. While it has no host, it is taken back
    /// when no host can have it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub implied_nic: bool,
}

/// What an instance is of its job. `app` is the job's name then.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct InstanceJob {
    /// Of an indexed job: which part of the work is its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
}

impl Default for InstanceSpec {
    fn default() -> Self {
        Self {
            app: "none".parse().expect("a well-formed name"),
            template_hash: String::new(),
            template: Template::default(),
            image_digest: Digest::of(b""),
            part_digests: BTreeMap::new(),
            job: None,
            implied_nic: false,
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum InstancePhase {
    /// No host has been found yet; the `Scheduled` condition says why.
    #[default]
    Pending,
    /// A host holds the reservation and is about to start it.
    Scheduled,
    /// The host fetches the image or creates the sandbox.
    Starting,
    Running,
    /// It ended and waits for its back-off to pass before it is started again.
    BackOff,
    Stopping,
    /// A job's: it has run to its end. Its output stays on its host until the job goes, its room and its address are free.
    Exited,
    /// Its host is lost or it was superseded.
    Lost,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct InstanceStatus {
    pub phase: InstancePhase,
    pub ready: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Name>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<Name>,
    /// Grows with each placement; gateways route to the highest.
    pub epoch: u64,
    /// Set while an operator's rebalance moves it: the host that was found for it. It goes when another is ready elsewhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moving_to: Option<Name>,
    /// Which of its host's addresses it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<u16>,
    /// The NUMA nodes of its host that it is kept to, by the kernel's numbers. None of one that takes from any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub numa_nodes: Vec<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub address6: Option<Ipv6Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub address4: Option<Ipv4Addr>,
    /// Where its first port was found to answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub endpoint: Option<SocketAddr>,
    pub restarts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Of a job's: when its end was seen.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished: Option<Timestamp>,
    /// Why it is not ready, in a sentence.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Its init steps and sidecars.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartStatus>,
    pub conditions: Vec<Condition>,
}

impl Kind for Instance {
    const KIND: &'static str = "Instance";
    const PLURAL: &'static str = "instances";
    const SHORT: &'static [&'static str] = &["inst"];
    const ABOUT: &'static str =
        "One placed replica of an app, or one try of a job. Deleting it makes its owner place another.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs { create: false, update: false, delete: true };
    const COLUMNS: &'static [Column] = &[
        Column::new("APP", "/spec/app"),
        Column::new("PHASE", "/status/phase"),
        Column::new("READY", "/status/ready"),
        Column::new("RESTARTS", "/status/restarts"),
        Column::new("HOST", "/status/host"),
        Column::new("ZONE", "/status/zone"),
        Column::new("NUMA", "/status/numaNodes/0").wide(),
        Column::new("ADDRESS", "/status/address6").wide(),
        Column::new("WHY", "/status/message").wide(),
    ];
    type Spec = InstanceSpec;
    type Status = InstanceStatus;

    fn validate(_: &InstanceSpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> InstanceSpec {
        let app = super::App::example();
        InstanceSpec {
            app: app.image.clone(),
            template_hash: "0a1b2c3d".into(),
            template: app.template(),
            ..InstanceSpec::default()
        }
    }
}
