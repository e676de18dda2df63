//! Who instances are: the SPIFFE Workload API on a socket for each container.
//!
//! A container finds one socket at `/run/spiffe/workload.sock`, in a folder of the host that is mounted into this instance
//! alone. So a caller's identity is the socket that it came in by; it can't be claimed, guessed or borrowed. Who is behind
//! a connection (SO_PEERCRED) is not asked: only the instance itself and the host's root reach the folder, the latter is
//! the host, and a process id may be another's by the time that it is looked up.
//!
//! Keys are made here and never leave the host. Servers sign for an instance only while their own copy of the log says that
//! it is placed on the host that asks, and decide themselves who it is: see [`issuer`]. [`svid`] keeps the certificate
//! good, [`keys`] knows the keys of tokens, [`api`] answers, [`grpc`], [`proto`] and [`authority`] are the protocol.
//!
//! No instance needs any of it to run on: whatever fails here is told to those who ask, and tried again.

mod api;
mod authority;
mod grpc;
pub(crate) mod issuer;
pub(crate) mod keys;
mod proto;
mod svid;

use std::fs;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nexus_compute::IDENTITY_SOCKET;
use nexus_env::{Endpoint, Env, Listener};
use nexus_iam::SpiffeId;
use nexus_iam::svid::JwtBundle;
use nexus_model::Uid;
use nexus_model::plan::InstancePlan;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::AgentHandle;
use issuer::Issuer;

/// How long a caller waits for the first certificate or the first keys, which come with the host's first connection.
const PATIENCE: Duration = Duration::from_secs(20);
/// Instances that ask a server for a certificate at once.
const ASKING: usize = 8;

/// Makes identities. One for each host.
pub(crate) struct Identities {
    env: Env,
    trust_domain: String,
    roots: Bytes,
    /// `<run folder>/spiffe`: a folder for each instance, and `keys`.
    dir: PathBuf,
    issuer: Arc<dyn Issuer>,
    keys: watch::Receiver<Arc<JwtBundle>>,
    asking: Arc<Semaphore>,
    handle: AgentHandle,
    patience: Duration,
    limits: grpc::Limits,
}

/// One instance's identity is served while this is held.
pub(crate) struct Identity {
    /// What the container is to see.
    pub folder: PathBuf,
    _tasks: JoinSet<()>,
}

/// The authorities of a PEM file in DER, one after the other.
fn roots(pem: &str) -> Result<Bytes, String> {
    let mut out = Vec::new();
    for cert in CertificateDer::pem_slice_iter(pem.as_bytes()) {
        out.extend_from_slice(&cert.map_err(|e| format!("the authorities can't be read: {e}"))?);
    }
    if out.is_empty() { Err("there is no authority in the file".to_owned()) } else { Ok(out.into()) }
}

impl Identities {
    /// Makes the folder, for the owner's eyes alone. Blocks shortly.
    pub fn new(
        env: &Env,
        settings: &crate::config::IdentityConfig,
        issuer: Arc<dyn Issuer>,
        keys: watch::Receiver<Arc<JwtBundle>>,
        handle: AgentHandle,
    ) -> io::Result<Self> {
        let dir = settings.run_dir.join("spiffe");
        fs::create_dir_all(dir.join("keys"))?;
        for private in [dir.clone(), dir.join("keys")] {
            fs::set_permissions(private, fs::Permissions::from_mode(0o700))?;
        }
        Ok(Self {
            env: env.clone(),
            trust_domain: settings.trust_domain.clone(),
            roots: roots(&settings.roots).map_err(io::Error::other)?,
            dir,
            issuer,
            keys,
            asking: Arc::new(Semaphore::new(ASKING)),
            handle,
            patience: PATIENCE,
            limits: grpc::Limits::default(),
        })
    }

    /// Who an instance is, by its project and its app or job.
    fn id(&self, plan: &InstancePlan) -> Result<SpiffeId, String> {
        let id = if plan.once { SpiffeId::job } else { SpiffeId::workload };
        id(&self.trust_domain, plan.project.as_str(), plan.app.as_str()).map_err(|e| e.to_string())
    }

    fn folder(&self, instance: Uid) -> PathBuf {
        self.dir.join(instance.to_string())
    }

    fn file(&self, instance: Uid) -> PathBuf {
        self.dir.join("keys").join(instance.to_string())
    }

    /// Serves an instance's identity from now on: when this returns, its socket is there.
    pub async fn open(&self, plan: &InstancePlan) -> Result<Identity, String> {
        let id = self.id(plan)?;
        let failed = |e: io::Error| format!("the socket of its identity can't be made: {e}");
        let folder = self.folder(plan.uid);
        let listener = self.listen(&folder).await.map_err(failed)?;

        let held = watch::Sender::default();
        let api = api::WorkloadApi::new(api::Parts {
            env: self.env.clone(),
            instance: plan.uid,
            id: id.clone(),
            roots: self.roots.clone(),
            held: held.subscribe(),
            keys: self.keys.clone(),
            issuer: self.issuer.clone(),
            patience: self.patience,
        });
        let keeper = svid::Keeper {
            env: self.env.clone(),
            instance: plan.uid,
            id,
            issuer: self.issuer.clone(),
            asking: self.asking.clone(),
            file: self.file(plan.uid),
            held,
            handle: self.handle.clone(),
        };
        keeper.restore().await;
        let mut tasks = JoinSet::new();
        tasks.spawn(grpc::serve(listener, Arc::new(api), self.limits));
        tasks.spawn(keeper.run());
        Ok(Identity { folder, _tasks: tasks })
    }

    /// The folder stays what it was if it is there: a container that runs sees that very folder.
    async fn listen(&self, folder: &Path) -> io::Result<Box<dyn Listener>> {
        let made = folder.to_owned();
        let opened = tokio::task::spawn_blocking(move || {
            fs::create_dir_all(&made)?;
            // Programs of any user in the container may ask.
            fs::set_permissions(&made, fs::Permissions::from_mode(0o755))?;
            fs::File::open(&made)
        });
        let opened = opened.await.map_err(io::Error::other)??;
        // A socket's path has 107 bytes at most (unix(7)), which a run folder may use up: this one is always short.
        let short = format!("/proc/self/fd/{}/{IDENTITY_SOCKET}", opened.as_raw_fd());
        let listener = self.env.transport.bind(&Endpoint::Unix(short.into())).await?;
        fs::set_permissions(folder.join(IDENTITY_SOCKET), fs::Permissions::from_mode(0o666))?;
        Ok(listener)
    }

    /// Removes everything of an instance that is gone. Harmless when there is nothing.
    pub async fn remove(&self, instance: Uid) -> Result<(), String> {
        let (folder, file) = (self.folder(instance), self.file(instance));
        let removed = tokio::task::spawn_blocking(move || {
            let gone = |r: io::Result<()>| match r {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
                _ => Ok(()),
            };
            gone(fs::remove_file(file))?;
            gone(fs::remove_dir_all(folder))
        });
        let removed = removed.await.map_err(io::Error::other);
        removed.and_then(|r| r).map_err(|e| format!("its identity can't be removed: {e}"))
    }

    /// The instances of which something is here.
    pub async fn known(&self) -> io::Result<Vec<Uid>> {
        let dir = self.dir.clone();
        let listed = tokio::task::spawn_blocking(move || {
            let mut found = Vec::new();
            for entry in fs::read_dir(dir)? {
                found.extend(entry?.file_name().to_str().and_then(|n| n.parse::<Uid>().ok()));
            }
            Ok(found)
        });
        listed.await.map_err(io::Error::other)?
    }
}

#[cfg(test)]
mod tests;
