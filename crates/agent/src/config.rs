//! What a daemon is made from: who it is, where the servers are, and the engines that it plugs together.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use async_trait::async_trait;
use nexus_compute::keep::Keep;
use nexus_model::kind::{HostSpec, Runtime};
use nexus_model::plan::{CaptureRequest, HostNetworks, ImagePlan, Trace, TracedPacket};
use nexus_model::{Digest, Name, Timestamp, Uid};
use nexus_network::firewall::{Firewall, Net};
use nexus_network::vpc::Difference;
use nexus_network::vpc::capture::Capture;
use nexus_network::vpc::flows::Flow;
pub(crate) use nexus_network::vpc::health::{Asked, Found};
use nexus_wire::ServerBook;
use rustls::pki_types::CertificateDer;
use tokio::sync::{mpsc, watch};

use crate::AgentHandle;
use crate::numa::Numa;

/// Makes an identity of a verified certificate chain.
pub type Identify = dyn Fn(&[CertificateDer<'_>]) -> Option<String> + Send + Sync;
/// Says whether a caller may use a method. Only servers should.
pub type Authorize = dyn Fn(&nexus_wire::Caller, &str) -> bool + Send + Sync;

#[derive(Clone)]
pub struct AgentConfig {
    pub name: Name,
    pub host: HostSpec,
    /// What instances are kept to that are placed on a NUMA node. `host` declares the nodes.
    pub numa: Numa,
    /// The region's servers; what they tell of each other goes into it.
    pub servers: Arc<ServerBook>,
    /// The cached plan and the instances' log files.
    pub data_dir: PathBuf,
    pub boot_id: String,
    pub agent_version: String,
    /// For calls to servers.
    pub client_tls: Arc<rustls::ClientConfig>,
    /// For calls from servers, on `host.address`.
    pub server_tls: Arc<rustls::ServerConfig>,
    pub identify: Arc<Identify>,
    pub authorize: Arc<Authorize>,
    /// When the certificate in these configurations ends; it may be renewed in place.
    pub certificate_ends: Arc<dyn Fn() -> Option<Timestamp> + Send + Sync>,
    /// What instances' identities are made from; without it they have none.
    pub identity: Option<IdentityConfig>,
    /// Where the values of secrets are kept in memory; without it, no instance that names one starts.
    pub secrets_dir: Option<PathBuf>,
    /// Where the daemon shows itself to whoever serves its health and metrics.
    pub handle: AgentHandle,
}

/// Where instances' identities come from, and where they are served.
#[derive(Debug, Clone)]
pub struct IdentityConfig {
    /// The cluster's id.
    pub trust_domain: String,
    /// The authorities' certificates, in PEM.
    pub roots: String,
    /// Sockets and keys go below it. Must be empty after a boot of the host.
    pub run_dir: PathBuf,
}

/// The engines of the host.
#[derive(Clone)]
pub struct Engines {
    pub runtimes: BTreeMap<Runtime, Arc<dyn nexus_compute::Runtime>>,
    pub images: Arc<dyn ImageFetcher>,
    pub net: Arc<dyn InstancePlug>,
    /// What instances' packets pass by, and the host on which names are answered; without it, neither.
    pub firewall: Option<Firewall>,
    /// Tenants' networks; without it, no instance that has a NIC starts.
    pub networks: Option<Arc<dyn NetworkEngine>>,
    /// Tells when some process may have ended.
    pub keep: Arc<dyn Keep>,
}

#[derive(Debug, thiserror::Error)]
#[error("image {image}: {message}")]
pub struct FetchError {
    pub image: Digest,
    pub message: String,
}

/// Brings images to the host.
#[async_trait]
pub trait ImageFetcher: Send + Sync {
    /// Makes sure that all content of the image is in the host's blob store. Many may ask for the same image at once.
    async fn ensure(&self, image: &ImagePlan) -> Result<(), FetchError>;

    /// The images that are here whole. Cheap: asked every second.
    fn held(&self) -> Vec<Digest>;

    /// Makes room, if the disk is fuller than the host's configuration allows: removes images, the least recently used first.
    /// `needed` says what the newest plan names, and is asked when nothing else is decided any more; without a plan nothing goes.
    async fn collect(
        &self,
        _runtimes: &BTreeMap<Runtime, Arc<dyn nexus_compute::Runtime>>,
        _needed: &(dyn Fn() -> Option<BTreeSet<Digest>> + Send + Sync),
    ) {
    }
}

#[derive(Debug, thiserror::Error)]
#[error("network: {0}")]
pub struct PlugError(pub String);

/// Gives instances a network. Every call is idempotent.
#[async_trait]
pub trait InstancePlug: Send + Sync {
    /// Makes the instance's network and returns the path of its namespace.
    async fn plug(&self, uid: Uid, address6: Ipv6Addr, address4: Ipv4Addr) -> Result<PathBuf, PlugError>;
    async fn unplug(&self, uid: Uid) -> Result<(), PlugError>;
    /// A TCP socket in the instance's network, not connected yet and not blocking.
    async fn socket(&self, _uid: Uid, _ipv6: bool) -> Result<OwnedFd, PlugError> {
        Err(PlugError("sockets in instances' networks are not made here".into()))
    }
    /// The instances that have a network here, whole or not.
    async fn plugged(&self) -> Result<Vec<Uid>, PlugError>;
}

/// A NIC, and the instance that has it.
pub type NicAt = (Uid, Uid);

/// What an engine of networks has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plugged {
    /// Those that are in their instances, and whose packets are filtered.
    pub plugged: BTreeSet<NicAt>,
    /// Why others are not, by NIC. One whose instance is not there yet is no trouble.
    pub troubles: BTreeMap<Uid, String>,
    /// What of a network can't be set, by network.
    pub networks: BTreeMap<Uid, String>,
}

/// A packet to send from an instance's NIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProbeOf {
    pub instance: Uid,
    /// Which of its NICs.
    pub index: u8,
    pub from: IpAddr,
    pub packet: TracedPacket,
}

/// Packets that were dropped: of which network, or by the host's own table of whichever; why; how many.
pub type Drops = Vec<(Option<Uid>, String, u64)>;

/// Tenants' networks on this host. Every call is idempotent.
#[async_trait]
pub trait NetworkEngine: Send + Sync {
    /// Brings the host to what is wanted, and plugs the NICs of those instances whose namespaces are there. Fails only if nothing
    /// could be done; what was there before stays then. What is `closed` no network leads to.
    async fn apply(&self, wanted: Arc<HostNetworks>, closed: Arc<Vec<Net>>) -> Result<Plugged, PlugError>;
    /// In which ways the host is not as it is wanted. Changes nothing.
    async fn check(&self, wanted: Arc<HostNetworks>, closed: Arc<Vec<Net>>) -> Result<Vec<Difference>, PlugError>;
    /// Removes everything of tenants' networks.
    async fn remove(&self) -> Result<(), PlugError>;
    async fn drops(&self, wanted: Arc<HostNetworks>) -> Result<Drops, PlugError>;
    /// What becomes of a packet, by the rules that are programmed.
    async fn trace(
        &self,
        by: Arc<HostNetworks>,
        closed: Arc<Vec<Net>>,
        nic: Uid,
        packet: TracedPacket,
    ) -> Result<Trace, PlugError>;
    /// Answers what instances ask of their gateways, such as DHCP, by what the host has been brought to. Runs until it is dropped.
    async fn serve(&self, by: watch::Receiver<Option<Arc<HostNetworks>>>);
    /// Sends a packet; whether it came through, as far as that can be known.
    async fn probe(&self, probe: ProbeOf) -> Result<Option<bool>, PlugError>;
    /// Asks targets, all of one network, whether they answer; tells of each.
    async fn ask(&self, endpoint: IpAddr, targets: Vec<Asked>, found: mpsc::Sender<Found>);
    async fn capture(&self, network: Uid, request: &CaptureRequest) -> Result<Capture, PlugError>;
    /// Tells the flows of a network as they come, until nobody listens; counts those that had no place.
    async fn flows(&self, network: Uid, out: mpsc::Sender<Flow>, lost: Arc<AtomicU64>) -> Result<(), PlugError>;
}

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("{attempt}: {source}")]
    System { attempt: String, source: std::io::Error },
    #[error("the cached plan {path} is of version {found}; this agent knows versions up to {known}: start a newer one")]
    PlanTooNew { path: PathBuf, found: u32, known: u32 },
}
