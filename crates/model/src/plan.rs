//! What the control plane tells hosts and gateways, and what they report: the messages of the southbound protocol.
//!
//! A plan is whole, never a difference, and says which revision it is of, so that applying it twice or skipping one is
//! harmless. Readers pass over fields they don't know, so that releases can differ by one.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::kind::{HostSpec, ImageFormat, InstancePhase, Protocol, Runtime, Template};
use crate::{Digest, Name, RequestId, Timestamp, Uid};

/// Names of the southbound calls.
pub mod method {
    /// Server to server, bytes: one message of the metadata store's protocol.
    pub const STORE_PEER: &str = "store.peer";
    /// Server to the leading server: [`super::HostReport`] → [`super::ReportAck`] may also come from agents.
    pub const REPORT: &str = "host.report";
    /// Agent to server, stream of [`super::HostPlan`] for a [`super::PlanRequest`].
    pub const PLAN: &str = "host.plan";
    /// Gateway to server, stream of [`super::RoutingTable`] for a [`super::TableRequest`].
    pub const TABLE: &str = "gateway.table";
    /// Server to the leading server: an intent for the writer.
    pub const SUBMIT: &str = "writer.submit";
    /// Anyone to a server: the bytes of a blob.
    pub const BLOB_GET: &str = "blob.get";
    /// Server to server: an upload.
    pub const BLOB_PUT: &str = "blob.put";
    pub const BLOB_HAS: &str = "blob.has";
    /// Server to agent, frames: see [`super::LogsRequest`].
    pub const LOGS: &str = "instance.logs";
    /// Server to agent, frames: see [`super::ExecRequest`].
    pub const EXEC: &str = "instance.exec";
}

/// Which image content a host needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImagePlan {
    pub format: ImageFormat,
    /// The manifest of an OCI image, or the component itself.
    pub digest: Digest,
}

/// What a host is to do with an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    Running,
    /// Stop it with its signal and grace, remove everything of it, and report it gone.
    Gone,
}

/// One instance, with everything that its host needs to run it without asking again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstancePlan {
    pub uid: Uid,
    pub name: Name,
    pub project: Name,
    pub app: Name,
    /// The fencing number of this placement: an agent never goes back to a lower one.
    pub epoch: u64,
    pub desired: Desired,
    pub template: Template,
    pub image: ImagePlan,
    pub address6: Ipv6Addr,
    pub address4: Ipv4Addr,
    #[serde(default)]
    pub request_id: Option<RequestId>,
}

/// A host's whole desired state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostPlan {
    /// Version of this message's meaning.
    pub version: u32,
    pub host: Name,
    pub revision: u64,
    /// Sorted by uid.
    pub instances: Vec<InstancePlan>,
    /// Images to fetch and compile before an instance of them is placed here: the region's functions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prepare: Vec<ImagePlan>,
}

pub const PLAN_VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlanRequest {
    pub host: Name,
    /// The plan that the agent already holds; the stream begins when there is a newer one.
    pub known: Option<u64>,
}

/// What a host observes of one instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceReport {
    pub uid: Uid,
    pub epoch: u64,
    pub phase: InstancePhase,
    pub ready: bool,
    /// Where the first port answered.
    pub endpoint: Option<SocketAddr>,
    pub restarts: u32,
    pub started: Option<Timestamp>,
    pub exit_code: Option<i32>,
    pub message: String,
}

/// A heartbeat and everything true on a host. Sent every second, and at once when an instance changes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HostReport {
    pub host: Name,
    /// What the host declares of itself; the first report of a new host registers it.
    pub spec: HostSpec,
    /// Changes with every boot of the host.
    pub boot_id: String,
    pub agent_version: String,
    /// The revision of the plan that has been applied.
    pub applied: Option<u64>,
    /// Every instance that exists here in any form, wanted or not.
    pub instances: Vec<InstanceReport>,
    pub images: Vec<Digest>,
    /// The share of its processors in use, 0 to 1.
    pub load: f32,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ReportAck {
    /// The host's epoch: if it grew, the host was declared dead meanwhile.
    pub epoch: u64,
    /// Where all servers are, so that agents learn of changes.
    pub servers: Vec<String>,
}

/// One instance that may take requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Backend {
    pub uid: Uid,
    pub address: SocketAddr,
    pub zone: Name,
    pub epoch: u64,
    pub ready: bool,
}

/// Instances of one port of one app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub project: Name,
    pub app: Name,
    pub port: u16,
    pub protocol: Protocol,
    pub runtime: Runtime,
    /// Sorted by uid.
    pub backends: Vec<Backend>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TableRoute {
    /// Lower case, or `*.` and a suffix.
    pub host: String,
    pub path: String,
    /// An index into [`RoutingTable::services`].
    pub service: u32,
}

/// Everything that a gateway knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub struct RoutingTable {
    pub version: u32,
    pub revision: u64,
    pub services: Vec<Service>,
    pub routes: Vec<TableRoute>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TableRequest {
    pub gateway: Name,
    pub known: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlobRequest {
    pub digest: Digest,
}

/// Asks for an instance's output. Answer frames: channel 1 standard output, 2 standard error, each frame whole lines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogsRequest {
    pub uid: Uid,
    pub follow: bool,
    /// The last so many lines; everything kept, without it.
    pub tail: Option<u32>,
}

/// Runs a command in an instance. Frames to the agent: channel 0 standard input (an empty frame ends it). Frames from
/// it: 1 standard output, 2 standard error, 3 the exit code as decimal text, last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExecRequest {
    pub uid: Uid,
    pub command: Vec<String>,
    pub stdin: bool,
}

/// Channel tags of [`LogsRequest`] and [`ExecRequest`] frames.
pub mod channel {
    pub const STDIN: u8 = 0;
    pub const STDOUT: u8 = 1;
    pub const STDERR: u8 = 2;
    pub const EXIT: u8 = 3;
}

/// The domain under which gateways answer, unless an operator says otherwise: `NAME.DOMAIN` for apps of the default
/// project, `NAME.PROJECT.DOMAIN` for all.
pub const DEFAULT_DOMAIN: &str = "localhost";
