//! The northbound door: REST, watches and OpenAPI over the kinds.
//!
//! [`router`] makes one axum router over every [`KindDescriptor`](nexus_model::kind::KindDescriptor): paths, methods,
//! schemas and the OpenAPI document come from the declaration, and a new kind needs no line here. A request passes, in
//! this order: path and method ([`route`]), who asks ([`caller`]), the limits on what runs at once, whether they may
//! ([`authorize`]), its handler. Reads
//! go to the metadata store, the region's or the one that all regions share; writes become an [`Intent`](nexus_control::intent::Intent) for its writer. What is in another region is passed on.
//!
//! Conventions that hold everywhere: every answer carries `X-Request-Id`; every error is a problem document (RFC 9457);
//! an object's `metadata.revision`, its ETag and what `If-Match` compares are one number, the revision at which its key
//! last changed. A `status` in a body is accepted and ignored, so that what was fetched can be sent back.
//!
//! Architecture invariant: no business rule lives here. What depends on a region's state is decided by the writer; what
//! a host does is asked of it through [`HostDoor`].

mod admission;
mod audit;
mod authorize;
mod blobs;
mod caller;
mod credentials;
mod doors;
mod elsewhere;
mod federation;
mod flows;
mod headers;
mod input;
mod list;
mod metrics;
mod networks;
mod openapi;
pub mod operations;
mod problem;
mod providers;
pub mod pull;
mod query;
mod rates;
mod render;
mod rollouts;
mod route;
mod scaling;
mod secrets;
mod serve;
mod settle;
mod signature;
mod signin;
mod streams;
mod tries;
mod watch;
mod webhooks;
mod whoami;
mod write;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use nexus_control::directory::Directory;
use nexus_control::intent::Writer;
use nexus_env::Env;
use nexus_iam::envelope::KeyProvider;
use nexus_iam::jwt::SigningKey;
use nexus_model::Name;
use nexus_store::Store;
use prometheus_client::registry::Registry;
use tokio_util::sync::CancellationToken;

pub use audit::Audit;
pub use doors::{
    BlobStream, Blobs, Certificate, CertificateState, ClusterHealth, ClusterStatus, EtcdEndpoint, EtcdStatus, Frame,
    FrameStream, GroupMember, GroupStatus, HostDoor, Operations, Operators, ProviderDoor, ProviderRequest, Pull,
    PullStream, Pulls, Remote, ServerStatus, StatusSource, Topology, WebhookDoor,
};

pub use caller::PeerAddress;
pub use elsewhere::PASSED_ON;
pub use problem::from_store;
pub use rates::Rate;

/// Everything that the API needs, given by the binary.
#[derive(Clone)]
pub struct Api {
    /// The region that this server serves; other regions' paths are passed on to them.
    pub region: Name,
    pub env: Env,
    pub store: Arc<dyn Store>,
    pub writer: Arc<dyn Writer>,
    /// Of the group that all regions share, as `store` and `writer` are the region's own.
    pub global_store: Arc<dyn Store>,
    pub global_writer: Arc<dyn Writer>,
    pub remote: Arc<dyn Remote>,
    /// Who is there, and what they were granted.
    pub directory: Directory,
    pub operators: Operators,
    /// Signs the access tokens that this server gives.
    pub signer: Arc<SigningKey>,
    /// Seal what must be read again and may not stand in the metadata as it is.
    pub master_keys: Arc<dyn KeyProvider>,
    /// Whom access tokens are by: the same at every server, and the URL at which others find how to check them.
    pub issuer: String,
    pub blobs: Arc<dyn Blobs>,
    pub pulls: Arc<dyn Pulls>,
    pub hosts: Arc<dyn HostDoor>,
    pub providers: Arc<dyn ProviderDoor>,
    pub webhooks: Arc<dyn WebhookDoor>,
    pub operations: Arc<dyn Operations>,
    pub status: Arc<dyn StatusSource>,
    /// How this server signs the audit logs, and where it notes what it refuses.
    pub audit: Arc<Audit>,
    /// What `/metrics` shows; the API's own figures are registered by [`router`].
    pub metrics: Arc<Mutex<Registry>>,
    /// Ends watches, log streams, execs and waits, so that a server can drain.
    pub shutdown: CancellationToken,
    pub limits: Limits,
}

/// Bounds on what runs at once. Whatever comes on top is answered 429 with `Retry-After`.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Ordinary requests.
    pub requests: usize,
    /// Watches, log streams, execs and `Prefer: wait`s.
    pub streams: usize,
    /// Uploads and downloads of blobs.
    pub transfers: usize,
    /// Of one caller; the fleet's own keys are not bounded by these three.
    pub caller_rate: Rate,
    /// Of one project, by all callers together.
    pub project_rate: Rate,
    /// Requests of one caller that run at once.
    pub caller_requests: usize,
    /// An ordinary request's deadline, and the longest silence within a blob's upload.
    pub request_timeout: Duration,
    /// A silent watch says so often up to which revision nothing is missing.
    pub bookmark_every: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            requests: 1024,
            streams: 10_000,
            transfers: 64,
            caller_rate: Rate::new(100, 500),
            project_rate: Rate::new(500, 2_000),
            caller_requests: 256,
            request_timeout: Duration::from_secs(60),
            bookmark_every: Duration::from_secs(10),
        }
    }
}

/// The API as a router, to be served alone or merged with others. Every path that nobody else took ends here.
pub fn router(api: Api) -> Router {
    Router::new().fallback(serve::handle).with_state(serve::Server::new(api))
}

/// The OpenAPI document of this release, as `/v1/openapi.json` answers it for a region.
pub fn openapi(region: &Name) -> serde_json::Value {
    openapi::document(&openapi::Schemas::generate(), region)
}
