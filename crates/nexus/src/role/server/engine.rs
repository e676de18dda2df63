//! Which engine keeps a group's metadata: the embedded one, or, where `nexus.toml` says so, an etcd cluster.
//!
//! To whoever reads and writes there is no difference. What only one of them has (members that are added and removed, a
//! cluster beside the servers) is asked of [`Engine`], which answers for the other as far as it makes sense: in etcd every
//! server that has been started takes part, and there is nothing to be voted on.
//!
//! What a server's folder was made for stays: whoever configures the other engine is told, instead of finding an empty
//! cloud.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use bytes::Bytes;
use nexus_api::EtcdStatus;
use nexus_env::Env;
use nexus_store::backup::{self, Backup, Restore, Restored};
use nexus_store::embedded::{self, EmbeddedStore, Peers};
use nexus_store::{
    Leadership, LeaseId, MemberHealth, RangeRequest, RangeResponse, Revision, Store, StoreError, StoreStatus, Txn,
    TxnOutcome, Watch,
};
use tokio::sync::watch;

use crate::config::ServerConfig;

/// In the folder of the stores, says that they are in etcd, and where.
const MARK: &str = "ETCD";

/// Which etcd keeps what a server with this data folder knows, if one does.
pub fn etcd_of(data_dir: &Path) -> Option<String> {
    std::fs::read_to_string(mark(data_dir)).ok().map(|text| text.trim().to_owned())
}

fn mark(data_dir: &Path) -> PathBuf {
    data_dir.join("store").join(MARK)
}

/// From now on the stores are in the folder itself.
pub fn leave_etcd(data_dir: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(mark(data_dir)) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// This server's part of one group.
pub enum Engine {
    Embedded(Arc<EmbeddedStore>),
    #[cfg(feature = "etcd")]
    Etcd(nexus_store::etcd::EtcdStore),
}

impl Engine {
    /// Opens a group with the configured engine; `own` says how the embedded one would run.
    pub async fn open(
        config: &ServerConfig,
        own: embedded::Config,
        env: &Env,
        peers: Arc<dyn Peers>,
    ) -> anyhow::Result<Self> {
        if let Some(store) = &config.store {
            if own.dir.join("FORMAT").exists() {
                anyhow::bail!(
                    "group {} is in {}, but `store` asks for etcd: move it there with `nexus backup create` and `nexus \
                     backup restore`, or leave `store` out. If another server has done that, move {} out of the way",
                    own.group,
                    own.dir.display(),
                    config.data_dir.join("store").display()
                );
            }
            let engine = etcd(config, own, env).await?;
            let mark = mark(&config.data_dir);
            std::fs::write(&mark, format!("{}\n", store.url)).with_context(|| format!("writing {}", mark.display()))?;
            return Ok(engine);
        }
        if let Some(url) = etcd_of(&config.data_dir) {
            anyhow::bail!(
                "this server's metadata is in etcd, {url}, but nothing says how to get there: configure `store`, or move \
                 it with `nexus backup restore`"
            );
        }
        Ok(Self::Embedded(Arc::new(EmbeddedStore::open(own, env.clone(), peers).await?)))
    }

    /// The embedded engine, if it is the one.
    pub fn embedded(&self) -> Option<Arc<EmbeddedStore>> {
        match self {
            Self::Embedded(store) => Some(store.clone()),
            #[cfg(feature = "etcd")]
            Self::Etcd(_) => None,
        }
    }

    fn store(&self) -> &dyn Store {
        match self {
            Self::Embedded(store) => &**store,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => store,
        }
    }

    /// Lets another server lead; `false` if none took over in time.
    pub async fn hand_over(&self) -> bool {
        match self {
            Self::Embedded(store) => store.hand_over().await,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => {
                store.hand_over().await;
                true
            }
        }
    }

    pub async fn shutdown(&self) {
        match self {
            Self::Embedded(store) => store.shutdown().await,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => store.shutdown().await,
        }
    }

    pub async fn add_learner(&self, node: u64, endpoint: String) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store) => store.add_learner(node, endpoint).await,
            // It enters itself when it starts.
            #[cfg(feature = "etcd")]
            Self::Etcd(_) => Ok(()),
        }
    }

    pub async fn promote(&self, node: u64) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store) => store.promote(node).await,
            #[cfg(feature = "etcd")]
            Self::Etcd(_) => Ok(()),
        }
    }

    pub async fn demote(&self, node: u64) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store) => store.demote(node).await,
            #[cfg(feature = "etcd")]
            Self::Etcd(_) => Ok(()),
        }
    }

    pub async fn remove(&self, node: u64) -> Result<(), StoreError> {
        match self {
            Self::Embedded(store) => store.remove(node).await,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => store.forget_server(node).await,
        }
    }

    pub async fn members_health(&self) -> Result<Vec<MemberHealth>, StoreError> {
        match self {
            Self::Embedded(store) => store.members_health().await,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => Ok(store.members_health()),
        }
    }

    /// How the etcd cluster is, if one keeps the group.
    pub async fn etcd_status(&self) -> Option<EtcdStatus> {
        match self {
            Self::Embedded(_) => None,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => {
                let health = store.etcd_health().await;
                let endpoints = health.endpoints.into_iter().map(|e| nexus_api::EtcdEndpoint {
                    endpoint: e.endpoint,
                    reachable: e.reachable,
                    member: e.name,
                    version: e.version,
                    leader: e.leader,
                    database_bytes: e.db_bytes,
                    database_bytes_in_use: e.db_bytes_in_use,
                    trouble: e.trouble,
                });
                Some(EtcdStatus { endpoints: endpoints.collect(), others: health.others })
            }
        }
    }

    /// What the group holds, for a backup; `current` asks a majority (or etcd) first.
    pub async fn backup_view(&self, current: bool) -> Result<backup::View, StoreError> {
        match self {
            Self::Embedded(store) => store.backup_view(current).await,
            #[cfg(feature = "etcd")]
            Self::Etcd(store) => store.backup_view(current).await,
        }
    }
}

#[async_trait]
impl Store for Engine {
    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        self.store().txn(txn).await
    }

    fn keeps_order(&self) -> bool {
        self.store().keeps_order()
    }

    fn way_to(&self, node: u64) -> Vec<u64> {
        self.store().way_to(node)
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, StoreError> {
        self.store().range(request).await
    }

    async fn watch(&self, start: Bytes, end: Bytes, after: Revision) -> Result<Watch, StoreError> {
        self.store().watch(start, end, after).await
    }

    async fn lease_grant(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        self.store().lease_grant(ttl).await
    }

    async fn lease_keep_alive(&self, id: LeaseId) -> Result<Duration, StoreError> {
        self.store().lease_keep_alive(id).await
    }

    async fn lease_revoke(&self, id: LeaseId) -> Result<(), StoreError> {
        self.store().lease_revoke(id).await
    }

    async fn compact(&self, before: Revision) -> Result<(), StoreError> {
        self.store().compact(before).await
    }

    async fn status(&self) -> StoreStatus {
        self.store().status().await
    }

    fn leadership(&self) -> watch::Receiver<Leadership> {
        self.store().leadership()
    }
}

#[cfg(not(feature = "etcd"))]
const WITHOUT: &str = "`store` asks for etcd, which this nexus was built without: build it with the feature `etcd`, which \
                       is on unless --no-default-features says otherwise";

#[cfg(not(feature = "etcd"))]
async fn etcd(_: &ServerConfig, _: embedded::Config, _: &Env) -> anyhow::Result<Engine> {
    anyhow::bail!(WITHOUT)
}

#[cfg(feature = "etcd")]
async fn etcd(config: &ServerConfig, own: embedded::Config, env: &Env) -> anyhow::Result<Engine> {
    let etcd = way_to_etcd(config, own.group).await?;
    Ok(Engine::Etcd(nexus_store::etcd::EtcdStore::open(etcd, env.clone()).await?))
}

/// Writes a group of a backup into the etcd of a server that is stopped, like all others of the group.
#[cfg(not(feature = "etcd"))]
pub async fn restore(_: &ServerConfig, _: &Backup, _: &Restore<'_>) -> anyhow::Result<Restored> {
    anyhow::bail!(WITHOUT)
}

/// Writes a group of a backup into the etcd of a server that is stopped, like all others of the group.
#[cfg(feature = "etcd")]
pub async fn restore(config: &ServerConfig, backup: &Backup, what: &Restore<'_>) -> anyhow::Result<Restored> {
    let etcd = way_to_etcd(config, what.group.clone()).await?;
    Ok(nexus_store::etcd::restore(backup, what, &etcd, &Env::real()).await?)
}

#[cfg(feature = "etcd")]
async fn way_to_etcd(config: &ServerConfig, group: nexus_store::GroupId) -> anyhow::Result<nexus_store::etcd::Config> {
    use nexus_store::etcd::{Config, EtcdEndpoint, Login};
    let store = config.store.as_ref().context("`store` is not configured")?;
    let (hosts, prefix) = store.parts().map_err(|why| anyhow::anyhow!("`store.url`: {why}"))?;
    let mut endpoints = Vec::new();
    for host in hosts {
        let found = tokio::net::lookup_host(&host).await.with_context(|| format!("resolving {host}"))?;
        let name = host.rsplit_once(':').map_or(&*host, |(name, _)| name).trim_matches(['[', ']']).to_owned();
        endpoints.extend(found.map(|at| EtcdEndpoint { host: name.clone(), at: at.into() }));
    }
    let mut etcd = Config::new(config.node_id, group, endpoints);
    etcd.prefix = prefix;
    etcd.endpoint = config.members.get(&config.node_id).map(|m| m.wire.to_string()).unwrap_or_default();
    if !store.compact {
        etcd.compact_after = None;
    }
    if let Some(ca) = &store.ca {
        etcd.tls = Some(tls(ca, store.cert.as_deref().zip(store.key.as_deref()))?);
    }
    if let Some(user) = &store.user {
        let file = store.password_file.as_ref().context("`store.user` needs `store.password_file`")?;
        let password = std::fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
        etcd.login = Some(Login { user: user.clone(), password: password.trim_end().to_owned() });
    }
    Ok(etcd)
}

/// Etcd's members are checked against an authority of their own, by the names that the URL gives them.
#[cfg(feature = "etcd")]
fn tls(
    ca: &std::path::Path,
    own: Option<(&std::path::Path, &std::path::Path)>,
) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    use rustls_pki_types::pem::PemObject as _;
    use rustls_pki_types::{CertificateDer, PrivateKeyDer};
    let chain = |path: &std::path::Path| -> anyhow::Result<Vec<CertificateDer<'static>>> {
        let certificates =
            CertificateDer::pem_file_iter(path).with_context(|| format!("reading {}", path.display()))?;
        certificates.collect::<Result<_, _>>().with_context(|| format!("the certificates in {}", path.display()))
    };
    let mut roots = rustls::RootCertStore::empty();
    for certificate in chain(ca)? {
        roots.add(certificate).with_context(|| format!("the authority in {}", ca.display()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots);
    let mut tls = match own {
        Some((cert, key)) => {
            let key = PrivateKeyDer::from_pem_file(key).with_context(|| format!("reading {}", key.display()))?;
            builder.with_client_auth_cert(chain(cert)?, key)?
        }
        None => builder.with_no_client_auth(),
    };
    tls.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(tls))
}
