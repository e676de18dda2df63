//! The public keys by which workloads' tokens are checked: pushed by whichever server answers, kept on disk, so that an
//! agent that restarts with every server dead knows them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nexus_env::{Disk, on_disk, write_atomic};
use nexus_iam::svid::{JwtBundle, SvidKeyError};
use nexus_model::plan::{WorkloadKeys, method};
use tokio::sync::watch;

use crate::servers::Servers;

const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(10);

/// The keys on disk.
#[derive(Clone)]
pub(crate) struct Cache {
    disk: Arc<dyn Disk>,
    path: PathBuf,
}

impl Cache {
    pub fn new(disk: Arc<dyn Disk>, data_dir: &Path) -> Self {
        Self { disk, path: data_dir.join("workload-keys.json") }
    }

    /// What was kept; nothing, if there is none or it can't be read: the servers have it.
    pub async fn load(&self) -> JwtBundle {
        let cache = self.clone();
        let read = on_disk(&self.disk, move || {
            if cache.disk.exists(&cache.path)? { cache.disk.read(&cache.path) } else { Ok(Vec::new()) }
        });
        match read.await.and_then(|r| r) {
            Ok(text) if text.is_empty() => JwtBundle::default(),
            Ok(text) => JwtBundle::from_jwks(&text).unwrap_or_else(|error| {
                tracing::warn!(%error, "the kept keys of workloads' tokens are damaged");
                JwtBundle::default()
            }),
            Err(error) => {
                tracing::warn!(%error, "the kept keys of workloads' tokens can't be read");
                JwtBundle::default()
            }
        }
    }

    async fn save(&self, bundle: &JwtBundle) {
        let (cache, text) = (self.clone(), bundle.to_jwks().to_string());
        let write = move || write_atomic(&*cache.disk, &cache.path, text.as_bytes());
        if let Err(error) = on_disk(&self.disk, write).await.and_then(|w| w) {
            tracing::warn!(%error, "the keys of workloads' tokens can't be kept on disk");
        }
    }
}

/// Follows the keys from server to server. Runs until it is dropped.
pub(crate) async fn follow(servers: Arc<Servers>, cache: Cache, known: watch::Sender<Arc<JwtBundle>>) {
    let mut turn = servers.start();
    let mut failures = 0;
    loop {
        if let Some(endpoint) = servers.nth(turn) {
            match servers.client(&endpoint).stream::<_, WorkloadKeys>(method::WORKLOAD_KEYS, &()).await {
                Ok(mut stream) => {
                    while let Some(Ok(keys)) = stream.next().await {
                        failures = 0;
                        if let Err(error) = take(&keys, &cache, &known).await {
                            tracing::error!(server = %endpoint, %error, "keys of workloads' tokens are refused");
                        }
                    }
                }
                Err(error) => tracing::debug!(server = %endpoint, %error, "no keys from this server"),
            }
        }
        turn = turn.wrapping_add(1);
        servers.pause(failures, RETRY_FIRST, RETRY_MAX).await;
        failures = failures.saturating_add(1);
    }
}

async fn take(keys: &WorkloadKeys, cache: &Cache, known: &watch::Sender<Arc<JwtBundle>>) -> Result<(), SvidKeyError> {
    let bundle = JwtBundle::from_jwks(keys.jwks.as_bytes())?;
    // A server that has just begun knows none yet; that is no reason to forget those that are known.
    if !bundle.is_empty() && **known.borrow() != bundle {
        cache.save(&bundle).await;
        known.send_replace(Arc::new(bundle));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nexus_env::MemDisk;
    use nexus_iam::svid::SvidKey;

    use super::*;

    #[tokio::test]
    async fn keys_are_kept_and_an_empty_set_or_a_damaged_one_changes_nothing() {
        let disk: Arc<dyn Disk> = Arc::new(MemDisk::new(1));
        disk.create_dir_all(Path::new("/data")).unwrap();
        let cache = Cache::new(disk.clone(), Path::new("/data"));
        assert!(cache.load().await.is_empty());
        let mut bundle = JwtBundle::default();
        bundle.insert(SvidKey::generate().unwrap().public().clone()).unwrap();
        let known = watch::Sender::default();
        let told = |jwks: &str| WorkloadKeys { jwks: jwks.to_owned() };
        take(&told(&bundle.to_jwks().to_string()), &cache, &known).await.unwrap();
        take(&told("{\"keys\":[]}"), &cache, &known).await.unwrap();
        take(&told("nonsense"), &cache, &known).await.unwrap_err();
        assert_eq!(**known.borrow(), bundle);
        assert_eq!(cache.load().await, bundle);
        write_atomic(&*disk, &cache.path, b"{torn").unwrap();
        assert!(cache.load().await.is_empty());
    }
}
