//! The host's plan: pulled from whichever server answers, kept on disk before it is followed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nexus_env::{Disk, write_atomic};
use nexus_model::plan::{HostPlan, InstancePlan, PLAN_VERSION, PlanRequest, method};
use nexus_model::{Name, Uid};
use tokio::sync::watch;

use crate::AgentHandle;
use crate::config::AgentError;
use crate::servers::Servers;

const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(3);

/// Why a plan is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unfit {
    #[error("a plan of version {0} needs a newer agent")]
    Version(u32),
    #[error("a plan for host {0}")]
    Host(Name),
    /// Not newer than what is held: nothing is wrong.
    #[error("an old plan, {0}")]
    Old(u64),
}

/// Whether a plan may take the place of the one that is held, and what it then is: an instance keeps the highest epoch
/// that was ever planned here.
pub(crate) fn succeed(held: Option<&HostPlan>, mut new: HostPlan, host: &Name) -> Result<HostPlan, Unfit> {
    if new.version > PLAN_VERSION {
        return Err(Unfit::Version(new.version));
    }
    if new.host != *host {
        return Err(Unfit::Host(new.host));
    }
    let Some(held) = held else { return Ok(new) };
    // What to prepare comes from the log that all regions share: it changes while the region's own revision stands still.
    let prepares = new.revision == held.revision && new.instances == held.instances && new.prepare != held.prepare;
    if new.revision <= held.revision && !prepares {
        return Err(Unfit::Old(new.revision));
    }
    let before: BTreeMap<Uid, &InstancePlan> = held.instances.iter().map(|i| (i.uid, i)).collect();
    for instance in &mut new.instances {
        if let Some(old) = before.get(&instance.uid).filter(|old| old.epoch > instance.epoch) {
            tracing::warn!(uid = %instance.uid, from = old.epoch, to = instance.epoch, "an epoch went back");
            *instance = (*old).clone();
        }
    }
    Ok(new)
}

/// The plan on disk.
#[derive(Clone)]
pub(crate) struct Cache {
    disk: Arc<dyn Disk>,
    path: PathBuf,
}

impl Cache {
    pub fn new(disk: Arc<dyn Disk>, data_dir: &Path) -> Self {
        Self { disk, path: data_dir.join("plan.json") }
    }

    /// The cached plan. Blocks. A damaged one is set aside: the servers have it.
    pub fn load(&self, host: &Name) -> Result<Option<HostPlan>, AgentError> {
        let system = |attempt: &str, source| AgentError::System { attempt: attempt.into(), source };
        if !self.disk.exists(&self.path).map_err(|e| system("looking for the cached plan", e))? {
            return Ok(None);
        }
        let text = self.disk.read(&self.path).map_err(|e| system("reading the cached plan", e))?;
        #[derive(serde::Deserialize)]
        struct Version {
            version: u32,
        }
        if let Ok(Version { version }) = serde_json::from_slice(&text)
            && version > PLAN_VERSION
        {
            let path = self.path.clone();
            return Err(AgentError::PlanTooNew { path, found: version, known: PLAN_VERSION });
        }
        match serde_json::from_slice::<HostPlan>(&text) {
            Ok(plan) if plan.host == *host => Ok(Some(plan)),
            Ok(plan) => {
                tracing::warn!(host = %plan.host, "the cached plan is another host's and is ignored");
                Ok(None)
            }
            Err(error) => {
                tracing::error!(%error, "the cached plan is damaged and is set aside");
                let aside = self.path.with_extension("damaged");
                self.disk.rename(&self.path, &aside).map_err(|e| system("setting the damaged plan aside", e))?;
                Ok(None)
            }
        }
    }

    async fn save(&self, plan: &HostPlan) -> std::io::Result<()> {
        let text = serde_json::to_vec(plan)?;
        let cache = self.clone();
        let write = move || write_atomic(&*cache.disk, &cache.path, &text);
        tokio::task::spawn_blocking(write).await.map_err(std::io::Error::other)?
    }
}

/// Follows the plan of `host` from server to server: `plans` are on disk, `coming` are about to be. Runs until it is dropped.
pub(crate) async fn pull(
    host: Name,
    servers: Arc<Servers>,
    cache: Cache,
    coming: watch::Sender<Option<Arc<HostPlan>>>,
    plans: watch::Sender<Option<Arc<HostPlan>>>,
    handle: AgentHandle,
) {
    let mut turn = servers.start();
    let mut failures = 0;
    loop {
        let Some(endpoint) = servers.nth(turn) else {
            servers.pause(failures, RETRY_FIRST, RETRY_MAX).await;
            continue;
        };
        let known = plans.borrow().as_ref().map(|p| p.revision);
        let request = PlanRequest { host: host.clone(), known };
        match servers.client(&endpoint).stream::<_, HostPlan>(method::PLAN, &request).await {
            Ok(mut stream) => loop {
                match stream.next().await {
                    Some(Ok(plan)) => {
                        failures = 0;
                        take(plan, &host, &cache, &coming, &plans, &handle).await;
                    }
                    Some(Err(error)) => {
                        tracing::debug!(server = %endpoint, %error, "the plan's stream broke");
                        break;
                    }
                    None => break,
                }
            },
            Err(error) => tracing::debug!(server = %endpoint, %error, "no plan from this server"),
        }
        turn = turn.wrapping_add(1);
        servers.pause(failures, RETRY_FIRST, RETRY_MAX).await;
        failures = failures.saturating_add(1);
    }
}

async fn take(
    plan: HostPlan,
    host: &Name,
    cache: &Cache,
    coming: &watch::Sender<Option<Arc<HostPlan>>>,
    plans: &watch::Sender<Option<Arc<HostPlan>>>,
    handle: &AgentHandle,
) {
    let held = plans.borrow().clone();
    let plan = match succeed(held.as_deref(), plan, host) {
        Ok(plan) => plan,
        Err(Unfit::Old(revision)) => {
            tracing::debug!(revision, "a plan that is not newer is ignored");
            return;
        }
        Err(unfit) => {
            tracing::error!(reason = %unfit, "a plan is refused");
            handle.update(|f| f.plan_refused = unfit.to_string());
            return;
        }
    };
    let plan = Arc::new(plan);
    coming.send_replace(Some(plan.clone()));
    // On disk first: what is started by a plan must be known after a crash.
    if let Err(error) = cache.save(&plan).await {
        tracing::error!(%error, revision = plan.revision, "a plan can't be kept on disk; it is followed all the same");
    }
    handle.update(|f| f.plan_refused.clear());
    plans.send_replace(Some(plan));
}

#[cfg(test)]
mod tests {
    use nexus_env::MemDisk;
    use nexus_model::kind::ImageFormat;
    use nexus_model::plan::ImagePlan;

    use super::*;

    fn plan(revision: u64) -> HostPlan {
        HostPlan {
            version: PLAN_VERSION,
            host: "h1".parse().unwrap(),
            revision,
            instances: Vec::new(),
            prepare: Vec::new(),
        }
    }

    #[test]
    fn only_newer_plans_for_this_host_are_taken() {
        let host = "h1".parse().unwrap();
        assert_eq!(succeed(None, plan(3), &host).unwrap().revision, 3);
        assert_eq!(succeed(Some(&plan(3)), plan(3), &host), Err(Unfit::Old(3)));
        assert_eq!(succeed(Some(&plan(3)), plan(2), &host), Err(Unfit::Old(2)));
        let image = ImagePlan { format: ImageFormat::Wasm, digest: nexus_model::Digest::of(b"f") };
        let prepares = HostPlan { prepare: vec![image], ..plan(3) };
        assert_eq!(succeed(Some(&plan(3)), prepares.clone(), &host), Ok(prepares));
        let newer = HostPlan { version: PLAN_VERSION + 1, ..plan(9) };
        assert_eq!(succeed(Some(&plan(3)), newer, &host), Err(Unfit::Version(PLAN_VERSION + 1)));
        assert!(matches!(succeed(None, plan(1), &"h2".parse().unwrap()), Err(Unfit::Host(_))));
    }

    #[test]
    fn a_cached_plan_comes_back_and_a_newer_version_is_refused() {
        let disk: Arc<dyn Disk> = Arc::new(MemDisk::new(1));
        disk.create_dir_all(Path::new("/data")).unwrap();
        let cache = Cache::new(disk.clone(), Path::new("/data"));
        let host: Name = "h1".parse().unwrap();
        assert_eq!(cache.load(&host).unwrap(), None);
        let text = serde_json::to_vec(&plan(7)).unwrap();
        write_atomic(&*disk, &cache.path, &text).unwrap();
        assert_eq!(cache.load(&host).unwrap(), Some(plan(7)));
        write_atomic(&*disk, &cache.path, b"{\"version\":99,\"new\":1}").unwrap();
        assert!(matches!(cache.load(&host), Err(AgentError::PlanTooNew { found: 99, .. })));
        write_atomic(&*disk, &cache.path, b"{torn").unwrap();
        assert_eq!(cache.load(&host).unwrap(), None);
    }
}
