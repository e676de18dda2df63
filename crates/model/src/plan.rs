//! What the control plane tells hosts and gateways, and what they report: the messages of the southbound protocol.
//!
//! A plan is whole, never a difference, and says which revision it is of, so that applying it twice or skipping one is
//! harmless. Readers pass over fields they don't know, so that releases can differ by one.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::kind::{
    HeaderMatch, HostSpec, ImageFormat, InstancePhase, PartStatus, Protocol, QuotaUse, RegionServer, RolloutPhase,
    Runtime, Template, Tier,
};
use crate::{Digest, Name, RequestId, SecretData, Timestamp, Uid};

mod names;
mod networks;
mod news;

pub use names::{HostNames, INTERNAL_DOMAIN, NamedInstance, NamedPort, ProjectNames};
pub use networks::*;
pub use news::*;

/// Names of the southbound calls.
pub mod method {
    /// Server to server, bytes: one message of the metadata store's protocol.
    pub const STORE_PEER: &str = "store.peer";
    /// Server to the leading server: [`super::HostReport`] → [`super::ReportAck`] may also come from agents.
    pub const REPORT: &str = "host.report";
    /// Agent to server, stream of [`super::HostPlan`] for a [`super::PlanRequest`].
    pub const PLAN: &str = "host.plan";
    /// Agent to server, stream of [`super::HostNames`] for a [`super::PlanRequest`].
    pub const NAMES: &str = "host.names";
    /// Agent to server, stream of [`super::NetworksMessage`] for a [`super::NetworksRequest`].
    pub const NETWORKS: &str = "host.networks";
    /// Gateway to server, stream of [`super::RoutingTable`] for a [`super::TableRequest`].
    pub const TABLE: &str = "gateway.table";
    /// Gateway to every server of its region, now and then: [`super::GatewayNote`].
    pub const GATEWAY_NOTE: &str = "gateway.note";
    /// Gateway to the leading server, every second: [`super::TrafficReport`].
    pub const TRAFFIC: &str = "gateway.traffic";
    /// Gateway to the leading server of its region, every few seconds: [`super::RoundTripReport`] → [`super::RoundTripAck`].
    pub const ROUND_TRIPS: &str = "gateway.round-trips";
    /// Server to the leading server: an intent for its region's writer.
    pub const SUBMIT: &str = "writer.submit";
    /// The same, for the writer of the global group.
    pub const SUBMIT_GLOBAL: &str = "writer.submit-global";
    /// Server to server: an intent that is to be passed on to the region's writer, past a link that is down. A release that
    /// does not know it refuses, and nothing has been done.
    pub const PASS: &str = "writer.pass";
    /// The same, for the writer of the global group.
    pub const PASS_GLOBAL: &str = "writer.pass-global";
    /// A region's leading server to the one that leads the global group: [`super::RegionSummary`].
    pub const SUMMARY: &str = "region.summary";
    /// Server to the leading server of its region, every second: [`super::ServerNote`].
    pub const SERVER_NOTE: &str = "server.note";
    /// A server that is no member of the global group to one that is: lets it in.
    pub const GLOBAL_JOIN: &str = "global.join";
    /// Anyone to a server: the bytes of a blob.
    pub const BLOB_GET: &str = "blob.get";
    /// Server to server: an upload.
    pub const BLOB_PUT: &str = "blob.put";
    pub const BLOB_HAS: &str = "blob.has";
    /// Server to server: [`super::BlobCollect`] → [`super::BlobsCollected`].
    pub const BLOB_COLLECT: &str = "blob.collect";
    /// Anyone to a server: where the region's servers are, as [`super::ServerList`].
    pub const SERVERS: &str = "fleet.servers";
    /// Anyone to a server: [`super::RenewRequest`] → [`super::Renewed`], for the caller's own ids alone.
    pub const RENEW: &str = "fleet.renew";
    /// Agent to a server: [`super::WorkloadCertificateRequest`] → [`super::WorkloadCertificate`], for an instance that is placed
    /// on the caller's host.
    pub const WORKLOAD_CERTIFICATE: &str = "workload.certificate";
    /// Likewise: [`super::WorkloadTokenRequest`] → [`super::WorkloadToken`].
    pub const WORKLOAD_TOKEN: &str = "workload.token";
    /// Likewise: [`super::WorkloadSecretRequest`] → [`super::WorkloadSecret`], for a secret that the instance's app names.
    pub const WORKLOAD_SECRET: &str = "workload.secret";
    /// Agent to a server, stream of [`super::WorkloadKeys`].
    pub const WORKLOAD_KEYS: &str = "workload.keys";
    /// Server to agent, frames: see [`super::LogsRequest`].
    pub const LOGS: &str = "instance.logs";
    /// Server to agent, frames: see [`super::ExecRequest`].
    pub const EXEC: &str = "instance.exec";
    /// Server to agent: [`super::TraceRequest`] → [`super::Trace`].
    pub const TRACE: &str = "network.trace";
    /// Server to agent, frames: see [`super::CaptureRequest`].
    pub const CAPTURE: &str = "network.capture";
    /// Server to agent: [`super::FlowsRequest`] → [`super::HostFlows`].
    pub const FLOWS: &str = "network.flows";
    /// Server to agent: nothing → [`super::NetworkCheck`].
    pub const NETWORK_CHECK: &str = "network.check";
}

/// Has a server remove blobs that nothing names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BlobCollect {
    pub dry_run: bool,
    /// Its own, without it.
    pub grace_ms: Option<u64>,
    /// Of the global group: it must know as much as whoever asks.
    pub revision: u64,
}

/// What a server has of blobs, and what went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BlobsCollected {
    pub blobs: u64,
    pub bytes: u64,
    /// What nothing names, whatever its age.
    pub unnamed_blobs: u64,
    pub unnamed_bytes: u64,
    /// What went, or would go.
    pub removed_blobs: u64,
    pub removed_bytes: u64,
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
    /// Its NICs, which it does not start without. See [`HostNetworks`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Uid>,
    /// The newest versions of the secrets whose files follow them. Never a value: a plan is kept on disk.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<Name, u64>,
    #[serde(default)]
    pub request_id: Option<RequestId>,
    /// A job's: when it ends, its end is reported, and it is not started again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub once: bool,
    /// Of what is to be gone: its output stays. A release that does not know this removes that too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub kept: bool,
    /// The NUMA nodes of the host that it is kept to; all, without any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub numa_nodes: Vec<u16>,
    /// The content of the other images that its parts name, by image name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub part_digests: BTreeMap<Name, Digest>,
}

impl InstancePlan {
    /// The content that a part is made from.
    pub fn digest_of(&self, image: Option<&Name>) -> Option<Digest> {
        match image {
            Some(image) if *image != self.template.image => self.part_digests.get(image).copied(),
            _ => Some(self.image.digest),
        }
    }
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
#[derive(Debug, Clone, PartialEq, Hash, Serialize, Deserialize)]
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
    /// Its init steps and sidecars.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartStatus>,
}

/// What an instance used since the report before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceUsage {
    pub uid: Uid,
    /// Thousandths of a processor.
    pub cpu: u32,
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
    /// The revision of the [`HostNetworks`] that has been applied, 0 before the first. An agent that knows no networks says
    /// nothing of them, and has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub networks: Option<u64>,
    /// When the agent's certificate ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_ends: Option<Timestamp>,
    /// Of the instances whose use the host measures.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub usage: Vec<InstanceUsage>,
    /// What else it measures of itself.
    #[serde(default)]
    pub telemetry: HostTelemetry,
    /// Targets of balancers that fail their checks here, [`MAX_FAILING`] at most. Absent, when they are as in the report before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failing: Option<Vec<FailingTarget>>,
}

/// What a host measures of itself beside its load. What it can't measure is absent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HostTelemetry {
    /// The share of the last ten seconds in which some task waited for a processor, in thousandths (the kernel's PSI).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_pressure: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_pressure: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io_pressure: Option<u16>,
    /// How long a small durable write took, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_us: Option<u32>,
}

/// Round trips that a gateway has measured, and a question for more hosts to measure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoundTripReport {
    pub gateway: Name,
    pub trips: Vec<HostTrip>,
    /// The last host that it was told of: it is told of those after it.
    #[serde(default)]
    pub after: Option<Name>,
}

/// The lowest of a gateway's last few round trips to a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostTrip {
    pub host: Name,
    /// Microseconds.
    pub us: u32,
}

/// The hosts that a gateway is to measure next: at most [`PROBED_AT_ONCE`], in the order of their names, round and round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundTripAck {
    pub hosts: Vec<(Name, SocketAddr)>,
}

/// Hosts that a gateway measures in one round, and tells of in one report.
pub const PROBED_AT_ONCE: usize = 256;

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
    /// Of the newer template, where a service's requests are split.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub newer: bool,
}

/// How a service's requests are split between instances of an older and of a newer template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Split {
    /// The share of the newer, 0 to 100.
    pub percent: u8,
    /// Requests that go to the newer ones in any case.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<HeaderMatch>,
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
    /// Sorted by uid. Empty when this region runs nothing of a global app.
    pub backends: Vec<Backend>,
    /// Of a global app: other regions run it too.
    #[serde(default)]
    pub global: bool,
    /// The other regions that should run it, sorted.
    #[serde(default)]
    pub regions: Vec<Name>,
    /// Without an instance it is asleep, not down: a request that waits brings one.
    #[serde(default)]
    pub wakes: bool,
    /// Of an app that was asleep: what is being started, at addresses where a connection is all that it takes to be ready. A request
    /// that waits may go there as soon as it can be connected to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub starting: Vec<Backend>,
    /// While a rollout splits its requests. A gateway that does not know of it treats all backends alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
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

/// Another region, as gateways of this one reach it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RemoteRegion {
    pub name: Name,
    pub tier: Tier,
    /// Where its gateways take requests from other gateways.
    pub gateways: Vec<SocketAddr>,
}

/// Everything that a gateway knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RoutingTable {
    pub version: u32,
    pub revision: u64,
    pub services: Vec<Service>,
    pub routes: Vec<TableRoute>,
    /// The region of the servers that made this table.
    #[serde(default = "no_region")]
    pub region: Name,
    /// All others, sorted by name.
    #[serde(default)]
    pub regions: Vec<RemoteRegion>,
}

fn no_region() -> Name {
    "none".parse().expect("a well-formed name")
}

impl Default for RoutingTable {
    fn default() -> Self {
        Self {
            version: 0,
            revision: 0,
            services: Vec::new(),
            routes: Vec::new(),
            region: no_region(),
            regions: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TableRequest {
    pub gateway: Name,
    pub known: Option<u64>,
    /// Where other regions' gateways reach this one.
    #[serde(default)]
    pub peer: Option<SocketAddr>,
}

/// What a gateway says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayNote {
    pub gateway: Name,
    pub certificate_ends: Timestamp,
}

/// What a gateway counted of one instance's requests since its last report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InstanceTraffic {
    pub uid: Uid,
    /// Requests that it finished, or that failed at it.
    #[serde(default)]
    pub requests: u32,
    /// Of these, those that were answered with 5xx, or not at all.
    #[serde(default)]
    pub errors: u32,
    /// Requests that it is busy with now.
    #[serde(default)]
    pub in_flight: u32,
}

/// What a gateway counted of one app's requests since its last report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AppTraffic {
    pub project: Name,
    pub app: Name,
    /// Requests that came.
    #[serde(default)]
    pub arrived: u32,
    /// Requests that wait now for an instance.
    #[serde(default)]
    pub waiting: u32,
}

/// What passes through a gateway: only what is not nought, the busiest first. A report that is lost is not sent again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrafficReport {
    pub gateway: Name,
    /// The time that the counts are of.
    pub span_ms: u32,
    /// At most [`MAX_TRAFFIC`].
    pub instances: Vec<InstanceTraffic>,
    /// At most [`MAX_TRAFFIC`].
    pub apps: Vec<AppTraffic>,
}

/// Instances, and apps, that one report of a gateway speaks of.
pub const MAX_TRAFFIC: usize = 8_192;

/// What a server says of itself to its region's writer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServerNote {
    pub server: RegionServer,
    /// Where the gateways that it feeds take requests from other regions' gateways.
    pub gateways: Vec<SocketAddr>,
}

/// What a project uses in one region. A region lists every project that it holds anything of, known to it or not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProjectSummary {
    pub name: Name,
    pub uid: Uid,
    pub used: QuotaUse,
}

/// What one region has of a global app: listed as long as anything of it is there, torn down or not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChildSummary {
    /// The global app's.
    pub uid: Uid,
    /// The global app's generation that this speaks of.
    pub generation: u64,
    pub desired_replicas: u32,
    pub replicas: u32,
    pub ready_replicas: u32,
    pub updated_replicas: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutPhase>,
    /// Set when the region can't make its share: one CamelCase word, and a sentence.
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub message: String,
}

/// What a region tells the global group of itself, every second and whenever it changes. Whole, never a difference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RegionSummary {
    /// Version of this message's meaning.
    pub version: u32,
    pub region: Name,
    pub tier: Tier,
    /// The epoch of the region's writer: what an older one says is passed over.
    pub epoch: u64,
    pub servers: Vec<RegionServer>,
    pub gateways: Vec<SocketAddr>,
    /// The newest revision of the global group that the region's writer has acted upon.
    pub looked: u64,
    /// How old that copy is.
    pub stale_ms: u64,
    pub projects: Vec<ProjectSummary>,
    pub apps: Vec<ChildSummary>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlobRequest {
    pub digest: Digest,
}

/// Where the region's servers are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerList {
    /// Wire endpoints.
    pub servers: Vec<String>,
}

/// Asks for certificates with a later end, for the same key or a new one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RenewRequest {
    /// PKCS #10, in PEM.
    pub csr: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Renewed {
    /// In PEM, by SPIFFE id.
    pub certs: BTreeMap<String, String>,
}

/// Asks for a certificate of a workload, for a key that stays on its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadCertificateRequest {
    pub host: Name,
    /// One of the host's instances: who it is is not the host's to say.
    pub instance: Uid,
    /// PKCS #10, in PEM. Names the instance's own SPIFFE id and nothing else.
    pub csr: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadCertificate {
    /// The SPIFFE id.
    pub id: String,
    /// In PEM, the leaf first.
    pub cert: String,
}

/// Asks for a token of a workload (JWT-SVID).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadTokenRequest {
    pub host: Name,
    pub instance: Uid,
    /// Whom the token is for.
    pub audience: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadToken {
    pub token: String,
    pub expires: Timestamp,
}

/// Asks for the values of a secret that an instance of the caller's host names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadSecretRequest {
    pub host: Name,
    pub instance: Uid,
    pub name: Name,
    /// As the app names it; the newest, without it.
    #[serde(default)]
    pub version: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadSecret {
    pub version: u64,
    pub data: SecretData,
}

/// The public keys of all servers that sign workloads' tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadKeys {
    /// A JWK set, as JSON.
    pub jwks: String,
}

/// Asks for an instance's output. Answer frames: channel 1 standard output, 2 standard error, each frame whole lines.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LogsRequest {
    pub uid: Uid,
    pub follow: bool,
    /// The last so many lines; everything kept, without it.
    pub tail: Option<u32>,
    /// The init step or sidecar whose output is asked for; the main part's, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Name>,
}

/// Runs a command in an instance. Frames to the agent: channel 0 standard input (an empty frame ends it). Frames from
/// it: 1 standard output, 2 standard error, 3 the exit code as decimal text, last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ExecRequest {
    pub uid: Uid,
    pub command: Vec<String>,
    pub stdin: bool,
    /// The sidecar or init step in which; the main part, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub part: Option<Name>,
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
