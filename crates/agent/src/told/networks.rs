//! Tenants' networks, as servers tell them: what has changed, put together with what is held (see `nexus_model::plan::news`).

use std::sync::Arc;
use std::time::Duration;

use nexus_env::Env;
use nexus_model::plan::{HostNetworks, Listener, NetworksMessage, method};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::{Cache, RETRY_FIRST, RETRY_MAX};
use crate::config::AgentConfig;
use crate::servers::Servers;

/// They are written to disk whole, so in a burst of changes writing takes a tenth of the time at most …
const SAVE_REST: u32 = 9;
/// … but what was told is on disk after so long.
const SAVE_WITHIN: Duration = Duration::from_millis(500);

/// Begins to follow what is told to a host; the first is what was kept in the file.
pub(crate) async fn keep(
    env: &Env,
    config: &AgentConfig,
    file: &str,
    servers: Arc<Servers>,
    tasks: &mut JoinSet<()>,
) -> watch::Receiver<Option<Arc<HostNetworks>>> {
    let cache = Cache::<HostNetworks>::new(env.disk.clone(), config.data_dir.join(file));
    let first = cache.load(&config.name).await.map(Arc::new);
    let held = watch::Sender::new(first.clone());
    let told = held.subscribe();
    tasks.spawn(save(cache, held.subscribe()));
    tasks.spawn(follow(Listener::new(config.name.clone(), first), servers, held));
    told
}

/// Keeps the newest on disk. Runs until nothing more can come.
async fn save(cache: Cache<HostNetworks>, mut held: watch::Receiver<Option<Arc<HostNetworks>>>) {
    while held.changed().await.is_ok() {
        let Some(told) = held.borrow_and_update().clone() else { continue };
        let begun = tokio::time::Instant::now();
        cache.save(&told).await;
        tokio::time::sleep((begun.elapsed() * SAVE_REST).min(SAVE_WITHIN)).await;
    }
}

/// Follows what is told to this host, from server to server. Runs until it is dropped.
async fn follow(mut listener: Listener, servers: Arc<Servers>, held: watch::Sender<Option<Arc<HostNetworks>>>) {
    let mut turn = servers.start();
    let mut failures = 0;
    loop {
        if let Some(endpoint) = servers.nth(turn) {
            let request = listener.request();
            match servers.client(&endpoint).stream::<_, NetworksMessage>(method::NETWORKS, &request).await {
                Ok(mut stream) => {
                    while let Some(Ok(message)) = stream.next().await {
                        match listener.take(message) {
                            Ok(told) => {
                                failures = 0;
                                if told.is_some() {
                                    held.send_replace(told);
                                }
                            }
                            Err(error) => {
                                tracing::warn!(server = %endpoint, %error, "networks are asked for again");
                                break;
                            }
                        }
                    }
                }
                Err(error) => tracing::debug!(server = %endpoint, %error, "no networks from this server"),
            }
        }
        turn = turn.wrapping_add(1);
        servers.pause(failures, RETRY_FIRST, RETRY_MAX).await;
        failures = failures.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use nexus_env::{Disk, MemDisk};
    use nexus_model::plan::PLAN_VERSION;

    use super::*;

    fn told(revision: u64) -> Arc<HostNetworks> {
        let (host, endpoint) = ("h1".parse().unwrap(), [192, 0, 2, 1].into());
        let (tunnels, networks) = Default::default();
        Arc::new(HostNetworks { version: PLAN_VERSION, host, revision, endpoint, tunnels, networks })
    }

    #[tokio::test]
    async fn the_newest_of_a_burst_comes_to_the_disk() {
        let disk: Arc<dyn Disk> = Arc::new(MemDisk::new(1));
        disk.create_dir_all(Path::new("/data")).unwrap();
        let cache = Cache::new(disk.clone(), "/data/networks.json".into());
        let held = watch::Sender::new(Some(told(1)));
        let task = tokio::spawn(save(cache.clone(), held.subscribe()));
        for revision in 2..50 {
            held.send_replace(Some(told(revision)));
            tokio::task::yield_now().await;
        }
        drop(held);
        task.await.unwrap();
        let kept: Option<HostNetworks> = cache.load(&told(1).host).await;
        assert_eq!(kept.map(|kept| kept.revision), Some(49), "also what came while it rested");
    }
}
