//! The contract of every runtime. One suite (`tests/contract.rs`) holds all of them to it.
//!
//! Every call is idempotent and can be cut off at any instant: the caller looks at [`Runtime::observe`] and goes on from
//! there. An instance is known by its uid; a restart is a `remove` and a `start`.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nexus_model::kind::Template;
use nexus_model::{Bytes, Digest, Name, Timestamp, Uid};
use serde::{Deserialize, Serialize};

use crate::keep::{KeepError, LogFiles};

/// One instance to run, with the network and image that were made ready for it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Sandbox {
    pub uid: Uid,
    pub epoch: u64,
    pub name: Name,
    pub project: Name,
    pub app: Name,
    pub template: Template,
    /// The manifest of an OCI image, or the component: see [`crate::image`].
    pub image: Digest,
    /// The network namespace that the instance lives in.
    pub netns: PathBuf,
    pub address6: Ipv6Addr,
    pub address4: Ipv4Addr,
    /// The host's folder with the socket at which the instance learns who it is. Containers find it at [`IDENTITY_DIR`].
    #[serde(default)]
    pub identity: Option<PathBuf>,
    #[serde(default)]
    pub secrets: SecretMounts,
    /// The processors and memory that it is kept to; all of the host's, without it. Functions are kept to none.
    #[serde(default)]
    pub cpuset: Option<CpuSet>,
    /// Of an init step or a sidecar: of which instance. `uid` is its own then, and `template` says what it runs.
    #[serde(default)]
    pub part: Option<PartOf>,
    /// The folder that the parts of the instance share, as it was made by [`Runtime::share`].
    #[serde(default)]
    pub shared: Option<SharedMount>,
    pub logs: LogFiles,
}

/// Processors, and the NUMA nodes whose memory is used, as lists of the kernel's: `0-3,8-11` (cpuset(7)).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CpuSet {
    pub cpus: String,
    #[serde(default)]
    pub mems: Option<String>,
}

/// Whose part a sandbox is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PartOf {
    pub instance: Uid,
    pub name: Name,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SharedMount {
    pub source: PathBuf,
    pub destination: String,
}

/// A folder that is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared {
    pub path: PathBuf,
    /// Tells this folder from one that was made anew because it was lost.
    pub id: String,
}

/// Where the values of an instance's secrets are: in memory (a tmpfs of the host), in files that only root reads until the
/// container's user owns them. No value is in here, so that this may be written to disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretMounts {
    /// A file of `KEY=VALUE`, a zero byte after each.
    pub env: Option<PathBuf>,
    pub folders: Vec<SecretFolder>,
}

/// A folder of files that a container sees, read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretFolder {
    pub source: PathBuf,
    pub destination: String,
}

impl SecretMounts {
    /// The variables.
    pub fn read_env(&self) -> std::io::Result<Vec<String>> {
        let Some(path) = &self.env else { return Ok(Vec::new()) };
        let text = std::fs::read(path)?;
        let pairs = text.split(|b| *b == 0).filter(|pair| !pair.is_empty());
        pairs.map(|pair| String::from_utf8(pair.to_vec()).map_err(|_| std::io::Error::other("not text"))).collect()
    }
}

/// Where a container finds the folder of its identity …
pub const IDENTITY_DIR: &str = "/run/spiffe";
/// … and in it the socket of the SPIFFE Workload API.
pub const IDENTITY_SOCKET: &str = "workload.sock";

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Running {
        since: Timestamp,
    },
    /// `code` as in [`crate::keep::KeptState::Exited`]; the message says what a user should know (killed for memory …).
    Exited {
        code: Option<i32>,
        at: Timestamp,
        message: String,
    },
}

/// What is true of one instance on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    pub uid: Uid,
    pub epoch: u64,
    pub state: State,
    /// Of an init step or a sidecar. One that was cut off while it was made does not say.
    pub part: Option<PartOf>,
}

/// Processor time that was used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTime {
    /// The instance that it counts for: of a part, whose part it is.
    pub instance: Uid,
    pub used: Duration,
}

/// The three streams of an exec.
#[derive(Debug)]
pub struct ExecIo {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The image can't be used: the user must change it.
    #[error("image {image}: {message}")]
    Image { image: Digest, message: String },
    /// The host lacks something: disk full, a missing kernel feature.
    #[error("this host: {attempt}: {source}")]
    Host { attempt: String, source: std::io::Error },
    #[error("{attempt}: {message}")]
    Failed { attempt: String, message: String },
    #[error("instance {0} does not run here")]
    NotRunning(Uid),
    #[error("{0} can't be done with this runtime")]
    Unsupported(&'static str),
    #[error(transparent)]
    Keep(#[from] KeepError),
}

/// Opens connections on behalf of instances, as their own sockets would.
#[async_trait]
pub trait Connections: Send + Sync {
    /// A connected TCP socket in the instance's network. `host` is a name, or an address without brackets. The caller gives up when it
    /// takes too long.
    async fn connect(&self, instance: Uid, host: &str, port: u16) -> Result<OwnedFd, NoConnection>;
    /// The authorities by which TLS servers are known, each a certificate (DER).
    async fn roots(&self) -> std::io::Result<Vec<Vec<u8>>>;
}

/// Why an instance gets no connection, in words for its user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{why}")]
pub struct NoConnection {
    pub kind: NoConnectionKind,
    pub why: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoConnectionKind {
    /// The name leads nowhere.
    NoName,
    /// The instance may not reach that.
    Prohibited,
    /// Nobody listens there.
    Refused,
    Unreachable,
    Timeout,
    /// The host can't do it now.
    Busy,
}

impl NoConnection {
    pub fn of(kind: NoConnectionKind, why: String) -> Self {
        Self { kind, why }
    }
}

#[async_trait]
pub trait Runtime: Send + Sync {
    /// Makes an image whose blobs are all in the host's blob store ready to start from: unpacks, compiles. Cached.
    async fn prepare(&self, image: Digest) -> Result<(), RuntimeError>;

    /// Begins what any start in a project needs, so that it goes on while an instance's network is made. Whatever comes of it,
    /// [`Runtime::start`] is right without it.
    async fn warm(&self, _project: &Name) {}

    /// Keeps ready what any project's start needs. Runs until it is dropped; whatever comes of it, [`Runtime::start`] is right
    /// without it.
    async fn upkeep(&self) {
        std::future::pending().await
    }

    /// Gives the way by which connections are opened for instances that can't do so themselves: those of functions. Before it is
    /// known, and without it, they wait and fail.
    fn connect_by(&self, _connections: Arc<dyn Connections>) {}

    /// Ends what was only kept ready: the agent goes, for a moment or for good. Nothing that runs is touched.
    async fn close(&self) {}

    /// Starts the instance. Starting what runs is harmless.
    async fn start(&self, sandbox: &Sandbox) -> Result<(), RuntimeError>;

    /// Asks the instance to stop: sends its stop signal, or whatever the runtime has for that. Returns at once.
    async fn stop(&self, uid: Uid) -> Result<(), RuntimeError>;

    /// Ends it now, if it runs, and removes everything of it but its log files. Harmless when there is nothing.
    async fn remove(&self, uid: Uid) -> Result<(), RuntimeError>;

    /// Every instance that exists here in any form.
    async fn observe(&self) -> Result<Vec<Observed>, RuntimeError>;

    /// Removes what was made ready of images that neither `keep` names nor any instance here needs: the room of a cache.
    /// Nothing is lost by it but time.
    async fn collect(&self, keep: Vec<Digest>) -> Result<(), RuntimeError>;

    /// The processor time that instances have used since they were started, of those whose time is measured.
    async fn cpu_time(&self) -> Result<BTreeMap<Uid, CpuTime>, RuntimeError> {
        Ok(BTreeMap::new())
    }

    /// Makes the folder that the parts of an instance share, bounded by `size`, unless it is there. With a storage class, on
    /// that. It stays when sandboxes are removed, and does not outlive the host's boot.
    async fn share(&self, _instance: Uid, _size: Bytes, _class: Option<&Name>) -> Result<Shared, RuntimeError> {
        Err(RuntimeError::Unsupported("sharing a folder"))
    }

    /// Removes that folder. Harmless when there is none.
    async fn unshare(&self, _instance: Uid) -> Result<(), RuntimeError> {
        Ok(())
    }

    /// The instances of which a shared folder is here, whole or not.
    async fn shared(&self) -> Result<Vec<Uid>, RuntimeError> {
        Ok(Vec::new())
    }

    /// Runs a command inside the instance and returns its exit status.
    async fn exec(&self, uid: Uid, command: &[String], io: ExecIo, deadline: Duration) -> Result<i32, RuntimeError>;
}
