//! Who workloads are: certificates and tokens for the instances of hosts, and the keys by which tokens are checked.
//!
//! A host asks for an instance; who that is, is decided here, by this server's own copy of the log, and only while that
//! says that the instance is placed on the very host that asks. So a host that was broken into can speak for what runs on
//! it, and for nothing else. It says in what it asks for who it believes the instance to be: if that is somebody else,
//! nothing is signed.
//!
//! Certificates are signed by the cluster's authority, tokens by a key that each server makes in its data folder and that
//! never leaves it. Its public half stands in the global group, in a row of its own (`sys/workload/key/`) that the server
//! renews now and then, so that hosts of all regions believe it. Rows that nobody renews any more are removed by whoever
//! sees them, long after the last token by such a key has ended. A key signs nothing before this server has read it there.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use nexus_control::view::View;
use nexus_env::Env;
use nexus_iam::svid::{self, JwtBundle, SvidKey, SvidPublicKey};
use nexus_iam::{CertRequest, SpiffeId, at_millis};
use nexus_model::kind::{Instance, InstancePhase};
use nexus_model::plan::{
    WorkloadCertificate, WorkloadCertificateRequest, WorkloadKeys, WorkloadToken, WorkloadTokenRequest, method,
};
use nexus_model::{Name, Object, Timestamp, Uid, key};
use nexus_store::{RangeRequest, Store, StoreError, WatchEvent};
use nexus_wire::{Refusal, ServerBuilder, code};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::authority::Authority;
use super::fleet::{self, Fleet, Stored, VERSION};
use super::southbound::{changes, is_host, listed};
use crate::config::ServerConfig;
use crate::secret_file;

/// The file in the data folder.
const KEY_FILE: &str = "workload-token.key";
/// How often a server says that its key is in use …
const RENEW: Duration = Duration::from_secs(12 * 3600);
/// … and for how long one is believed of which nothing was said.
const FORGET: Duration = Duration::from_secs(7 * 24 * 3600);
/// Between tries, and between looks at the clock.
const REST: Duration = Duration::from_secs(2);

/// A server's public key, as all servers know it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct KeyRecord {
    version: u32,
    /// For operators: nobody goes by it.
    region: Name,
    server: Name,
    jwk: serde_json::Value,
    renewed: Timestamp,
}

/// The rows by key id; `None` before they were read once.
type Records = Option<BTreeMap<String, Stored<KeyRecord>>>;

pub struct Workloads {
    trust_domain: String,
    region: Name,
    server: Name,
    env: Env,
    authority: Option<Arc<Authority>>,
    key: SvidKey,
    /// The global group.
    store: Arc<dyn Store>,
    view: View,
    fleet: Fleet,
    records: watch::Sender<Arc<Records>>,
    keys: watch::Sender<Arc<WorkloadKeys>>,
}

/// The key in the data folder, made if there is none.
fn own_key(data_dir: &Path) -> anyhow::Result<SvidKey> {
    let path = data_dir.join(KEY_FILE);
    let pem = secret_file::read_or_make(&path, || Ok(SvidKey::generate()?.to_pem().as_bytes().to_vec()))?;
    SvidKey::from_pem(&String::from_utf8_lossy(&pem))
        .with_context(|| format!("{}: remove the file, and the server makes a new key", path.display()))
}

/// An instance, if it is placed on `host` and is to run there, as far as this server knows.
pub fn placed(view: &View, fleet: &Fleet, host: &Name, instance: Uid) -> Result<Object<Instance>, Refusal> {
    let forbidden = |why: String| Refusal::new(code::FORBIDDEN, why);
    if fleet.has_left(host) {
        return Err(forbidden(format!("host {host} has left the region: nothing is given to what it runs")));
    }
    let found = view.read(|world| {
        let here = world.instance(instance).filter(|i| i.status.host.as_ref() == Some(host))?;
        let runs = here.metadata.deleting.is_none()
            && here.status.phase != InstancePhase::Lost
            && here.status.finished.is_none();
        runs.then(|| here.clone())
    });
    found.ok_or_else(|| {
        forbidden(format!("instance {instance} is not placed on host {host}, as far as this server knows"))
    })
}

impl Workloads {
    /// Blocks shortly.
    pub fn open(
        config: &ServerConfig,
        env: &Env,
        global: Arc<dyn Store>,
        view: View,
        fleet: Fleet,
        authority: Option<Arc<Authority>>,
    ) -> anyhow::Result<Self> {
        Ok(Self {
            trust_domain: config.cluster_id.clone(),
            region: config.region.clone(),
            server: config.name.clone(),
            env: env.clone(),
            authority,
            key: own_key(&config.data_dir).context("the key that signs workloads' tokens")?,
            store: global,
            view,
            fleet,
            records: watch::Sender::default(),
            keys: watch::Sender::default(),
        })
    }

    /// Who an instance is, if it is placed on `host`.
    fn placed(&self, host: &Name, instance: Uid) -> Result<SpiffeId, Refusal> {
        let found = placed(&self.view, &self.fleet, host, instance)?;
        let project = found.metadata.project.as_ref().map_or("", Name::as_str);
        let (name, domain) = (found.spec.app.as_str(), &self.trust_domain);
        let id = if found.spec.job.is_some() { SpiffeId::job } else { SpiffeId::workload };
        id(domain, project, name).map_err(|e| Refusal::internal(e.to_string()))
    }

    fn certificate(&self, request: &WorkloadCertificateRequest) -> Result<WorkloadCertificate, Refusal> {
        let Some(authority) = &self.authority else {
            return Err(Refusal::new(code::DRAINING, "this server holds no key of the authority: ask another"));
        };
        let id = self.placed(&request.host, request.instance)?;
        let csr = CertRequest::from_pem(&request.csr).map_err(|e| Refusal::new(code::BAD_REQUEST, e.to_string()))?;
        if csr.ids() != std::slice::from_ref(&id) {
            let why = format!("instance {} is {id}, and gets certificates of no other", request.instance);
            return Err(Refusal::new(code::FORBIDDEN, why));
        }
        let cert = authority.sign_workload(&csr, &id).map_err(|e| Refusal::internal(e.detail))?;
        Ok(WorkloadCertificate { id: id.to_string(), cert })
    }

    fn token(&self, request: &WorkloadTokenRequest) -> Result<WorkloadToken, Refusal> {
        let id = self.placed(&request.host, request.instance)?;
        let kid = self.key.public().kid();
        if !self.records.borrow().as_ref().as_ref().is_some_and(|records| records.contains_key(kid)) {
            let why = "this server's key for tokens is not known to all yet: ask another, or try again";
            return Err(Refusal::new(code::DRAINING, why));
        }
        let now = self.env.now_millis();
        let signed = self.key.sign(&id, &request.audience, at_millis(now), svid::LIFE);
        let token = signed.map_err(|e| Refusal::new(code::BAD_REQUEST, e.to_string()))?;
        let life = i64::try_from(svid::LIFE.as_millis()).expect("minutes");
        // Whole seconds, as the token has them.
        Ok(WorkloadToken { token, expires: Timestamp::from_millis(now - now.rem_euclid(1000) + life) })
    }

    /// Publishes this server's key and follows those of all, until `stop`.
    pub async fn run(&self, stop: CancellationToken) {
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            _ = async { futures::join!(self.follow(), self.publish()) } => {}
        }
    }

    async fn follow(&self) {
        loop {
            match self.follow_once().await {
                Ok(()) => {}
                Err(StoreError::Closed) => return,
                Err(error) => tracing::debug!(%error, "the keys of workloads' tokens can't be followed; trying again"),
            }
            tokio::time::sleep(REST).await;
        }
    }

    async fn follow_once(&self) -> Result<(), StoreError> {
        // Listed at what is known before the list began: changes in between are seen twice.
        let mut first = RangeRequest::prefix(key::WORKLOAD_KEYS).stale();
        first.limit = 1;
        let revision = self.store.range(first).await?.revision;
        let listed = fleet::list::<KeyRecord>(&*self.store, key::WORKLOAD_KEYS, true).await?;
        let mut known: BTreeMap<_, _> = listed.into_iter().collect();
        self.tell(&known);
        let end = key::prefix_end(key::WORKLOAD_KEYS);
        let mut watch = self.store.watch(key::WORKLOAD_KEYS.into(), end.into(), revision).await?;
        while let Some(Ok(batch)) = watch.next().await {
            for event in &batch.events {
                let Some(kid) = event.key().strip_prefix(key::WORKLOAD_KEYS.as_bytes()) else { continue };
                let kid = String::from_utf8_lossy(kid).into_owned();
                known.remove(&kid);
                if let WatchEvent::Put { kv, .. } = event
                    && let Some(value) = fleet::read(kv)
                {
                    known.insert(kid, Stored { value, revision: kv.mod_revision });
                }
            }
            if !batch.events.is_empty() {
                self.tell(&known);
            }
        }
        Ok(())
    }

    /// Takes over what stands in the store, and tells hosts if the keys are others.
    fn tell(&self, known: &BTreeMap<String, Stored<KeyRecord>>) {
        let mut bundle = JwtBundle::default();
        for (kid, record) in known {
            let public = SvidPublicKey::from_jwk(&record.value.jwk);
            let added = public.and_then(|public| {
                if public.kid() == kid { bundle.insert(public) } else { Err(svid::SvidKeyError::Unreadable) }
            });
            if let Err(error) = added {
                tracing::error!(kid, server = %record.value.server, %error, "a key of workloads' tokens is left out");
            }
        }
        self.records.send_replace(Arc::new(Some(known.clone())));
        let keys = WorkloadKeys { jwks: bundle.to_jwks().to_string() };
        self.keys.send_if_modified(|held| {
            let news = **held != keys;
            if news {
                *held = Arc::new(keys);
            }
            news
        });
    }

    async fn publish(&self) {
        let mut records = self.records.subscribe();
        loop {
            let known = records.borrow_and_update().clone();
            if let Some(known) = &*known
                && let Err(error) = self.publish_once(known).await
            {
                tracing::debug!(%error, "the key of workloads' tokens can't be published yet");
            }
            // Not at once after every change: others' changes come in flocks.
            tokio::time::sleep(REST).await;
            let _ = tokio::time::timeout(60 * REST, records.changed()).await;
        }
    }

    async fn publish_once(&self, known: &BTreeMap<String, Stored<KeyRecord>>) -> Result<(), StoreError> {
        let now = self.env.now_millis();
        let since = |at: Timestamp| Duration::from_millis(u64::try_from(now - at.as_millis()).unwrap_or(0));
        let public = self.key.public();
        let own = known.get(public.kid());
        if own.is_none_or(|own| since(own.value.renewed) >= RENEW) {
            let record = KeyRecord {
                version: VERSION,
                region: self.region.clone(),
                server: self.server.clone(),
                jwk: public.to_jwk(),
                renewed: Timestamp::from_millis(now),
            };
            let at = format!("{}{}", key::WORKLOAD_KEYS, public.kid());
            fleet::put_if(&*self.store, &at, own.map(|own| own.revision), &record).await?;
        }
        for (kid, record) in known.iter().filter(|(_, record)| since(record.value.renewed) >= FORGET) {
            if kid != public.kid() {
                let at = format!("{}{kid}", key::WORKLOAD_KEYS);
                fleet::delete_if(&*self.store, &at, record.revision).await?;
                tracing::info!(kid, server = %record.value.server, "a key of workloads' tokens was removed: unused");
            }
        }
        Ok(())
    }
}

/// What agents may call.
pub fn methods(builder: ServerBuilder, workloads: &Arc<Workloads>) -> ServerBuilder {
    let (certificates, tokens, keys) = (workloads.clone(), workloads.clone(), workloads.clone());
    builder
        .unary(method::WORKLOAD_CERTIFICATE, move |caller, request: WorkloadCertificateRequest| {
            let workloads = certificates.clone();
            async move {
                is_host(&caller, &request.host)?;
                listed(&workloads.view).await?;
                workloads.certificate(&request)
            }
        })
        .unary(method::WORKLOAD_TOKEN, move |caller, request: WorkloadTokenRequest| {
            let workloads = tokens.clone();
            async move {
                is_host(&caller, &request.host)?;
                listed(&workloads.view).await?;
                workloads.token(&request)
            }
        })
        .stream(method::WORKLOAD_KEYS, move |_, (): ()| {
            let workloads = keys.clone();
            async move { Ok(changes(workloads.keys.subscribe(), |keys| keys.jwks.is_empty())) }
        })
}

#[cfg(test)]
#[path = "workloads_tests.rs"]
mod tests;
