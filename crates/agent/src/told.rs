//! What servers tell a host beside its plan, with a revision: names always whole, networks by what has changed. It is followed
//! from server to server and kept on disk, so that a restart goes on with it when no server answers.

pub(crate) mod networks;

use std::marker::PhantomData;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nexus_env::{Disk, Env, on_disk, write_atomic};
use nexus_model::Name;
use nexus_model::plan::{HostNames, HostNetworks, PLAN_VERSION, PlanRequest, method};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::config::AgentConfig;
use crate::servers::Servers;

const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// What is told, and kept.
pub(crate) trait Told: Serialize + DeserializeOwned + Send + Sync + 'static {
    /// In a word, for logs.
    const WHAT: &str;
    fn version(&self) -> u32;
}

impl Told for HostNames {
    const WHAT: &str = "names";

    fn version(&self) -> u32 {
        self.version
    }
}

impl Told for HostNetworks {
    const WHAT: &str = "networks";

    fn version(&self) -> u32 {
        self.version
    }
}

/// Begins to follow what is told to a host; the first is what was kept in the file.
pub(crate) async fn keep(
    env: &Env,
    config: &AgentConfig,
    file: &str,
    servers: Arc<Servers>,
    tasks: &mut JoinSet<()>,
) -> watch::Receiver<Option<Arc<HostNames>>> {
    let cache = Cache::new(env.disk.clone(), config.data_dir.join(file));
    let held = watch::Sender::new(cache.load(&config.name).await.map(Arc::new));
    let told = held.subscribe();
    tasks.spawn(follow(config.name.clone(), servers, cache, held));
    told
}

/// What servers told, on disk.
pub(crate) struct Cache<T> {
    pub disk: Arc<dyn Disk>,
    pub path: PathBuf,
    of: PhantomData<fn() -> T>,
}

impl<T> Clone for Cache<T> {
    fn clone(&self) -> Self {
        Self::new(self.disk.clone(), self.path.clone())
    }
}

impl<T> Cache<T> {
    pub fn new(disk: Arc<dyn Disk>, path: PathBuf) -> Self {
        Self { disk, path, of: PhantomData }
    }
}

impl<T: Told> Cache<T> {
    /// What was kept; nothing, if there is none or it can't be used: the servers have it.
    pub async fn load(&self, host: &Name) -> Option<T> {
        let (disk, path) = (self.disk.clone(), self.path.clone());
        let read = on_disk(&self.disk, move || if disk.exists(&path)? { disk.read(&path) } else { Ok(Vec::new()) });
        let text = match read.await.and_then(|r| r) {
            Ok(text) if text.is_empty() => return None,
            Ok(text) => text,
            Err(error) => {
                tracing::warn!(%host, %error, "the kept {} can't be read", T::WHAT);
                return None;
            }
        };
        match serde_json::from_slice::<T>(&text) {
            Ok(told) if told.version() <= PLAN_VERSION => Some(told),
            Ok(told) => {
                tracing::warn!(%host, version = told.version(), "the kept {} are a newer agent's", T::WHAT);
                None
            }
            Err(error) => {
                tracing::warn!(%host, %error, "the kept {} are damaged", T::WHAT);
                None
            }
        }
    }

    /// Whether it is there now.
    async fn save(&self, told: &T) -> bool {
        let saved = async {
            let (disk, path, text) = (self.disk.clone(), self.path.clone(), serde_json::to_vec(told)?);
            on_disk(&self.disk, move || write_atomic(&*disk, &path, &text)).await?
        };
        let saved: std::io::Result<()> = saved.await;
        if let Err(error) = &saved {
            tracing::warn!(%error, "{} can't be kept on disk: a restart without servers would have older ones", T::WHAT);
        }
        saved.is_ok()
    }
}

/// Follows what is told to this host, from server to server. Runs until it is dropped.
async fn follow(
    host: Name,
    servers: Arc<Servers>,
    cache: Cache<HostNames>,
    held: watch::Sender<Option<Arc<HostNames>>>,
) {
    let mut turn = servers.start();
    let mut failures = 0;
    loop {
        if let Some(endpoint) = servers.nth(turn) {
            let known = held.borrow().as_ref().map(|told| told.revision);
            let request = PlanRequest { host: host.clone(), known };
            match servers.client(&endpoint).stream::<_, HostNames>(method::NAMES, &request).await {
                Ok(mut stream) => {
                    while let Some(Ok(told)) = stream.next().await {
                        failures = 0;
                        take(told, &cache, &held).await;
                    }
                }
                Err(error) => tracing::debug!(server = %endpoint, %error, "no names from this server"),
            }
        }
        turn = turn.wrapping_add(1);
        servers.pause(failures, RETRY_FIRST, RETRY_MAX).await;
        failures = failures.saturating_add(1);
    }
}

pub(crate) async fn take(told: HostNames, cache: &Cache<HostNames>, held: &watch::Sender<Option<Arc<HostNames>>>) {
    if told.version > PLAN_VERSION {
        tracing::error!(version = told.version, "names of this version need a newer agent");
        return;
    }
    if held.borrow().as_ref().is_some_and(|held| told.revision <= held.revision) {
        return;
    }
    // Used first: what is on disk only is of no use to anybody.
    let told = Arc::new(told);
    held.send_replace(Some(told.clone()));
    cache.save(&told).await;
}
