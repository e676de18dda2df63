//! The doors that the API looks through: who the fleet's own keys belong to, where blobs are kept, how a host is reached, and what
//! the cluster says of itself. The binary brings the implementations.

use async_trait::async_trait;
use axum::extract::Request;
use axum::response::Response;
use bytes::Bytes;
use futures::stream::BoxStream;
use nexus_iam::TokenHash;
use nexus_model::plan::{
    CaptureRequest, ExecRequest, FlowsRequest, HostFlows, LogsRequest, NetworkCheck, Trace, TraceRequest,
};
use nexus_model::{ApiError, Digest, Name, SecretData, Timestamp, Uid};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::mpsc;
use zeroize::Zeroizing;

use crate::pull::PullEvent;

/// The fleet's own keys, known by their hashes: whoever has one is an operator who may do everything.
#[derive(Debug, Clone, Default)]
pub struct Operators {
    keys: Vec<(TokenHash, String)>,
}

impl Operators {
    /// Hashes, and what their holders are called.
    pub fn new(keys: impl IntoIterator<Item = (TokenHash, String)>) -> Self {
        Self { keys: keys.into_iter().collect() }
    }

    pub(crate) fn find(&self, hash: &TokenHash) -> Option<&str> {
        // Every entry is compared, so that the time does not tell which one matched.
        let mut found = None;
        for (known, name) in &self.keys {
            if known == hash {
                found = Some(name.as_str());
            }
        }
        found
    }
}

/// A blob's content, in pieces. An error ends it.
pub type BlobStream = BoxStream<'static, std::io::Result<Bytes>>;

/// Where the content of images is kept, by digest.
#[async_trait]
pub trait Blobs: Send + Sync {
    /// Whether a project has brought a blob itself, or an image of its names it. What others brought is not for it to use:
    /// it would get at content of which it knows no more than the digest.
    async fn belongs(&self, project: &Name, digest: Digest) -> Result<bool, ApiError>;

    /// The blob's length in bytes, if it is kept and belongs to the project.
    async fn has(&self, project: &Name, digest: Digest) -> Result<Option<u64>, ApiError>;

    /// Stores `length` bytes and answers, once they are durable, whether the blob is new to the project. Content that does not have the
    /// digest is `invalid`; content that ends early is `bad-request`. Nothing of either may be seen by anyone.
    async fn put(&self, project: &Name, digest: Digest, length: u64, content: BlobStream) -> Result<bool, ApiError>;

    /// Whether a blob of this length is kept and belongs to the project; then it has a day to be named, as one that was just
    /// stored.
    async fn retain(&self, project: &Name, digest: Digest, length: u64) -> Result<bool, ApiError>;

    /// The blob's length and content, if it belongs to the project.
    async fn get(&self, project: &Name, digest: Digest) -> Result<Option<(u64, BlobStream)>, ApiError>;
}

/// An image that a registry has.
pub struct Pull {
    pub reference: String,
    /// The values of the secret that says who asks.
    pub credentials: Option<SecretData>,
}

/// How a pull goes on. It ends with the image, or with an error.
pub type PullStream = BoxStream<'static, PullEvent>;

/// The way to registries. The references are tenants', so that the same is asked of whoever implements it as of a
/// [`ProviderDoor`].
#[async_trait]
pub trait Pulls: Send + Sync {
    /// Finds an image in its registry, and then brings its content to where uploads are kept.
    async fn pull(&self, project: &Name, pull: Pull) -> Result<PullStream, ApiError>;
}

/// A piece of an instance's output or input; `channel` is one of [`nexus_model::plan::channel`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub channel: u8,
    pub data: Bytes,
}

/// What comes from an instance. Dropping it ends the request on the host.
pub type FrameStream = BoxStream<'static, Result<Frame, ApiError>>;

/// The way to the host that runs an instance.
#[async_trait]
pub trait HostDoor: Send + Sync {
    /// The instance's output: frames of whole lines on the channels 1 and 2.
    async fn logs(&self, host: &Name, request: LogsRequest) -> Result<FrameStream, ApiError>;

    /// Starts a command. Input goes as frames of channel 0 into the bounded sender, an empty one ends it, and dropping the
    /// sender says that the client has gone. The last frame that comes back is of channel 3.
    async fn exec(&self, host: &Name, request: ExecRequest) -> Result<(mpsc::Sender<Frame>, FrameStream), ApiError>;

    /// What becomes of a packet that a NIC of the host sends.
    async fn trace(&self, host: &Name, request: TraceRequest) -> Result<Trace, ApiError>;

    /// In which ways the host's part of tenants' networks is not as it should be.
    async fn check(&self, host: &Name) -> Result<NetworkCheck, ApiError>;

    /// The hosts that have NICs of a network, in the order of their names.
    fn hosts_of(&self, project: &Name, network: Uid) -> Vec<Name>;

    /// What the host has noted of a network's packets.
    async fn flows(&self, host: &Name, request: FlowsRequest) -> Result<HostFlows, ApiError>;

    /// What passes a NIC of the host: a capture file in pieces, on channel 1.
    async fn capture(&self, host: &Name, request: CaptureRequest) -> Result<FrameStream, ApiError>;
}

/// What operators do to the fleet itself; see [`OPERATIONS`](crate::operations::OPERATIONS).
#[async_trait]
pub trait Operations: Send + Sync {
    /// Runs one of the declared operations. The body is a JSON object; its content is checked here.
    async fn run(&self, name: &str, body: Value) -> Result<Value, ApiError>;
}

/// The way to servers of other regions.
#[async_trait]
pub trait Remote: Send + Sync {
    /// The other regions of the fleet, as this server knows them.
    fn regions(&self) -> Vec<Name>;

    /// Has a server of another region answer a request, with its headers as they are and [`PASSED_ON`](crate::PASSED_ON)
    /// beside them. Streams and upgrades pass through. The next server is tried when one can't be reached.
    async fn pass(&self, region: &Name, request: Request) -> Result<Response, ApiError>;
}

/// A question to another identity provider.
#[derive(Clone)]
pub struct ProviderRequest {
    pub url: String,
    /// Posted, as `application/x-www-form-urlencoded`. Without it, the question is a GET.
    pub form: Option<Zeroizing<String>>,
    /// The header `Authorization`.
    pub authorization: Option<Zeroizing<String>>,
    /// The most bytes of an answer.
    pub max: usize,
}

/// The way to other identity providers. Whoever implements it bounds the time, follows no redirect, uses no proxy, and reaches
/// only addresses that the operator of the servers allows: the URLs are tenants'.
#[async_trait]
pub trait ProviderDoor: Send + Sync {
    /// The body of a 200; after a POST, also that of a refusal (RFC 6749, section 5.2). Else why there is none, in few words.
    async fn ask(&self, request: ProviderRequest) -> Result<Bytes, String>;
}

/// What servers may tell things to.
pub trait WebhookDoor: Send + Sync {
    /// Why a URL is not one that this cloud's servers reach, where its host is an address; a name is judged when it is used.
    fn refuses(&self, url: &str) -> Option<String>;
}

/// How the control plane does, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ClusterHealth {
    Healthy,
    /// It commits, but with less redundancy than it was built with.
    Degraded,
    /// It can't commit.
    Unavailable,
}

/// The shape of the region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Topology {
    pub zones: Vec<String>,
    /// `automatic`, or `manual` while an operator or a brake holds fail-overs back.
    pub failover_mode: String,
}

/// One server of the control plane.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ServerStatus {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    pub leader: bool,
    pub reachable: bool,
}

/// A member of a group of the metadata store, as the group's leader sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GroupMember {
    pub node: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Takes part in elections and quorums.
    pub voter: bool,
    pub reachable: bool,
    /// Entries of the log that it has not stored yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_entries: Option<u64>,
    /// How far its clock is ahead of the leader's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_skew_ms: Option<i64>,
}

/// A group of the metadata store: `global`, or the region's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct GroupStatus {
    pub group: String,
    /// The node that leads, as this server knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<u64>,
    /// Whether it can commit, as far as this server can tell.
    pub quorum: bool,
    pub commit_latency_ms: f64,
    /// The newest revision of this server's copy.
    pub revision: u64,
    /// How long ago this server's copy was last known to be complete.
    pub stale_ms: u64,
    /// Why this server's store has little room left, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pressure: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub members: Vec<GroupMember>,
}

/// A member of the etcd cluster that keeps the metadata, behind an address of the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EtcdEndpoint {
    pub endpoint: String,
    pub reachable: bool,
    /// What etcd calls it.
    pub member: String,
    pub version: String,
    /// It leads the etcd cluster.
    pub leader: bool,
    pub database_bytes: u64,
    pub database_bytes_in_use: u64,
    /// Why it does not answer, or what it lacks: alarms, a leader.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
}

/// The etcd cluster that keeps the metadata, as the server that answers sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct EtcdStatus {
    pub endpoints: Vec<EtcdEndpoint>,
    /// Members that no endpoint that answered leads to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<String>,
}

/// How a certificate is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CertificateState {
    #[default]
    Good,
    /// It ends soon and should have been renewed.
    Ending,
    Ended,
}

/// A certificate that this server knows of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Certificate {
    /// Whose it is: `wire` or `api` of the server that answers, `gateway NAME` or `host NAME`.
    pub name: String,
    pub not_after: Timestamp,
    #[serde(default)]
    pub state: CertificateState,
}

/// What `/v1/status` answers. Everything is measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ClusterStatus {
    pub cluster_id: String,
    pub control_plane_version: String,
    pub status: ClusterHealth,
    /// From proposal to commit, a moving average.
    pub consensus_latency_ms: f64,
    /// Hosts that are ready.
    pub active_workers: u64,
    pub topology: Topology,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// The server that leads, by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<ServerStatus>,
    /// The groups of the metadata store that this server is a member of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupStatus>,
    /// Where the groups are kept, if not in the servers themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etcd: Option<EtcdStatus>,
    /// The certificates of the server that answers and of gateways, and of hosts the one that ends first and those that
    /// should have been renewed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub certificates: Vec<Certificate>,
    /// Why it is not healthy, in a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// What the server knows of itself and its peers.
#[async_trait]
pub trait StatusSource: Send + Sync {
    async fn status(&self) -> ClusterStatus;

    /// Whether this server can serve; if not, why, in a sentence.
    async fn ready(&self) -> Result<(), String>;

    /// How long ago this server's copy of its region's log (or of the one that all regions share) was last known to be
    /// complete, in milliseconds.
    fn stale_ms(&self, global: bool) -> u64;
}
