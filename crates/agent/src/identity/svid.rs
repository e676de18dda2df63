//! One instance's certificate: made of a key that stays here, renewed at half its life.
//!
//! A failure changes nothing: the certificate that is held stays until it ends, and is asked for again with back-off. It is
//! kept in the run folder beside its key, so that an agent that restarts with every server dead serves it on; that folder
//! is the owner's alone, is seen by no container, and is empty after a boot.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use nexus_env::{Env, RngExt as _};
use nexus_iam::ca::CLOCK_SKEW;
use nexus_iam::{Identity, RequestKey, SpiffeId, at_millis};
use nexus_model::Uid;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};

use super::issuer::Issuer;
use crate::AgentHandle;

/// Clocks jump, so the time left is looked at again this often.
const LOOK: Duration = Duration::from_secs(60);
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Bytes of a file with a certificate and its key.
const MAX_SAVED: u64 = 64 << 10;

/// A certificate with its key, as it is served.
pub(crate) struct Svid {
    pub id: SpiffeId,
    /// In DER, the leaf first.
    pub chain: Bytes,
    /// PKCS #8 in DER.
    pub key: Bytes,
    /// When it was signed, which is later than what it says: see [`CLOCK_SKEW`].
    pub signed: SystemTime,
    pub not_after: SystemTime,
}

impl std::fmt::Debug for Svid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Svid").field("id", &self.id).field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// What there is to serve, and why there is nothing newer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Held {
    pub svid: Option<Arc<Svid>>,
    pub trouble: String,
}

/// As it is kept.
#[derive(Serialize, Deserialize)]
struct Saved {
    cert: String,
    key: String,
}

impl Svid {
    /// Reads a certificate and its key, which must be of `id` and belong together.
    fn read(cert: &str, key: &str, id: &SpiffeId) -> Result<Self, String> {
        let identity = Identity::from_pem(cert, key).map_err(|e| e.to_string())?;
        if identity.id() != *id {
            return Err(format!("it is of {}", identity.id()));
        }
        let mut chain = Vec::new();
        for one in CertificateDer::pem_slice_iter(cert.as_bytes()) {
            chain.extend_from_slice(&one.map_err(|e| e.to_string())?);
        }
        let key = match PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| e.to_string())? {
            PrivateKeyDer::Pkcs8(key) => Bytes::copy_from_slice(key.secret_pkcs8_der()),
            _ => return Err("its key is not PKCS #8".to_owned()),
        };
        let (signed, not_after) = (identity.not_before() + CLOCK_SKEW, identity.not_after());
        Ok(Self { id: identity.id(), chain: chain.into(), key, signed, not_after })
    }
}

/// Keeps one instance's certificate good.
pub(crate) struct Keeper {
    pub env: Env,
    pub instance: Uid,
    pub id: SpiffeId,
    pub issuer: Arc<dyn Issuer>,
    /// Instances of this host that ask at once.
    pub asking: Arc<Semaphore>,
    /// Where it is kept.
    pub file: PathBuf,
    pub held: watch::Sender<Held>,
    pub handle: AgentHandle,
}

/// When to renew: at half of its life, give or take a twentieth of it, so that a host's instances don't ask in step.
fn due(svid: &Svid, permille: u64) -> SystemTime {
    let life = svid.not_after.duration_since(svid.signed).unwrap_or_default();
    svid.signed + life * (450 + u32::try_from(permille.min(1000)).unwrap_or(0) / 10) / 1000
}

impl Keeper {
    fn now(&self) -> SystemTime {
        at_millis(self.env.now_millis())
    }

    /// Takes up what an earlier agent of this boot left.
    pub async fn restore(&self) {
        let (file, id) = (self.file.clone(), self.id.clone());
        let read = tokio::task::spawn_blocking(move || load(&file, &id)).await;
        match read.map_err(|e| e.to_string()).and_then(|r| r) {
            Ok(Some(svid)) if svid.not_after > self.now() => {
                self.held.send_replace(Held { svid: Some(Arc::new(svid)), trouble: String::new() });
            }
            Ok(_) => {}
            Err(reason) => tracing::warn!(instance = %self.instance, reason, "a kept certificate is asked for anew"),
        }
    }

    /// Runs until it is dropped.
    pub async fn run(self) {
        let mut failures = 0u32;
        let mut draw = self.env.rng.below(1001);
        loop {
            let svid = self.held.borrow().svid.clone();
            let left = svid.as_ref().and_then(|s| due(s, draw).duration_since(self.now()).ok()).unwrap_or_default();
            if !left.is_zero() {
                tokio::time::sleep(left.min(LOOK)).await;
                continue;
            }
            match self.renew().await {
                Ok(svid) => {
                    failures = 0;
                    draw = self.env.rng.below(1001);
                    self.handle.update(|f| f.certificates_issued += 1);
                    self.held.send_replace(Held { svid: Some(Arc::new(svid)), trouble: String::new() });
                }
                Err(reason) => {
                    // Who was just placed is not known to every server at once: that is no news.
                    if failures == 5 {
                        tracing::warn!(instance = %self.instance, id = %self.id, reason, "no certificate yet");
                    }
                    self.handle.update(|f| f.certificates_failed += 1);
                    self.held.send_modify(|held| held.trouble = reason);
                    self.pause(failures, svid.as_deref()).await;
                    failures = failures.saturating_add(1);
                }
            }
        }
    }

    async fn renew(&self) -> Result<Svid, String> {
        let key = RequestKey::generate().map_err(|e| e.to_string())?;
        let csr = key.request(std::slice::from_ref(&self.id)).map_err(|e| e.to_string())?;
        let signed = {
            let _permit = self.asking.acquire().await.map_err(|e| e.to_string())?;
            self.issuer.certificate(self.instance, csr).await.map_err(|e| e.to_string())?
        };
        let key = key.to_pem();
        let svid = Svid::read(&signed.cert, &key, &self.id).map_err(|e| format!("the new certificate: {e}"))?;
        if svid.not_after <= self.now() {
            return Err("the new certificate has ended already: are this host's clock and the servers' right?".into());
        }
        let (file, saved) = (self.file.clone(), Saved { cert: signed.cert, key });
        let written = tokio::task::spawn_blocking(move || save(&file, &saved)).await.map_err(std::io::Error::other);
        if let Err(error) = written.and_then(|w| w) {
            // It counts all the same; after a restart it is asked for again.
            tracing::warn!(instance = %self.instance, %error, "a workload's certificate can't be kept");
        }
        Ok(svid)
    }

    /// Doubles with each failure in a row, drawn between half and whole. Short lives leave little time.
    async fn pause(&self, failures: u32, held: Option<&Svid>) {
        let left = held.and_then(|s| s.not_after.duration_since(self.now()).ok());
        let longest = left.map_or(RETRY_MAX, |left| RETRY_MAX.min(left / 3)).max(RETRY_FIRST);
        let whole = RETRY_FIRST.saturating_mul(1 << failures.min(16)).min(longest);
        let jitter = self.env.rng.below(whole.as_millis() as u64 / 2 + 1);
        tokio::time::sleep(whole / 2 + Duration::from_millis(jitter)).await;
    }
}

fn load(file: &Path, id: &SpiffeId) -> Result<Option<Svid>, String> {
    match std::fs::metadata(file) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e.to_string()),
        Ok(m) if m.len() > MAX_SAVED => return Err("it is too long".to_owned()),
        Ok(_) => {}
    }
    let saved: Saved = serde_json::from_slice(&std::fs::read(file).map_err(|e| e.to_string())?)
        .map_err(|e| format!("it can't be read: {e}"))?;
    Svid::read(&saved.cert, &saved.key, id).map(Some)
}

/// For the owner's eyes alone, and whole or not at all.
fn save(file: &Path, saved: &Saved) -> std::io::Result<()> {
    let new = file.with_extension("new");
    let mut out = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    out.write_all(&serde_json::to_vec(saved)?)?;
    std::fs::rename(&new, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_life_is_never_the_same_moment_twice() {
        let id = SpiffeId::workload("home", "shop", "web").unwrap();
        let signed = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let hour = Duration::from_secs(3600);
        let svid = Svid { id, chain: Bytes::new(), key: Bytes::new(), signed, not_after: signed + hour };
        assert_eq!(due(&svid, 500), signed + hour / 2);
        assert_eq!(due(&svid, 0), signed + hour * 45 / 100);
        assert_eq!(due(&svid, 1000), signed + hour * 55 / 100);
    }
}
