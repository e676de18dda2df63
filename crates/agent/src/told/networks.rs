//! Tenants' networks, as servers tell them: what has changed, put together with what is held (see `nexus_model::plan::news`).
//! What is told is applied at once and saved beside that; the host confirms what is both.

use std::sync::Arc;
use std::time::Duration;

use nexus_env::Env;
use nexus_model::plan::{HostNetworks, Listener, NetworksMessage, method};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::{Cache, RETRY_FIRST, RETRY_MAX};
use crate::AgentHandle;
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
    if let Some(first) = &first {
        config.handle.networks_saved(first.revision);
    }
    tasks.spawn(save(cache, held.subscribe(), config.handle.clone()));
    tasks.spawn(follow(Listener::new(config.name.clone(), first), servers, held));
    told
}

/// Keeps the newest on disk, and says which is there: until then the host confirms nothing newer. Runs until nothing more can come.
async fn save(cache: Cache<HostNetworks>, mut held: watch::Receiver<Option<Arc<HostNetworks>>>, handle: AgentHandle) {
    let mut saved = true;
    loop {
        // What could not be saved is tried again, or what has come since.
        let news = async {
            if saved { held.changed().await } else { timeout(RETRY_MAX, held.changed()).await.unwrap_or(Ok(())) }
        };
        if news.await.is_err() {
            return;
        }
        let Some(told) = held.borrow_and_update().clone() else { continue };
        let begun = Instant::now();
        saved = cache.save(&told).await;
        if saved {
            handle.networks_saved(told.revision);
        }
        sleep((begun.elapsed() * SAVE_REST).min(SAVE_WITHIN)).await;
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
    use tokio_util::task::AbortOnDropHandle;

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
        let handle = AgentHandle::default();
        let task = tokio::spawn(save(cache.clone(), held.subscribe(), handle));
        for revision in 2..50 {
            held.send_replace(Some(told(revision)));
            tokio::task::yield_now().await;
        }
        drop(held);
        task.await.unwrap();
        let kept: Option<HostNetworks> = cache.load(&told(1).host).await;
        assert_eq!(kept.map(|kept| kept.revision), Some(49), "also what came while it rested");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_on_disk_is_not_confirmed_and_comes_to_it_when_there_is_room() {
        let full = MemDisk::new(1);
        let disk: Arc<dyn Disk> = Arc::new(full.clone());
        disk.create_dir_all(Path::new("/data")).unwrap();
        let cache = Cache::new(disk.clone(), "/data/networks.json".into());
        let (held, handle) = (watch::Sender::new(None), AgentHandle::default());
        let _task = AbortOnDropHandle::new(tokio::spawn(save(cache.clone(), held.subscribe(), handle.clone())));
        let confirmed = |revision| {
            let handle = handle.clone();
            async move {
                while handle.snapshot().networks != Some(revision) {
                    sleep(Duration::from_millis(1)).await;
                }
            }
        };
        handle.networks_applied(7);
        full.set_capacity(Some(0));
        held.send_replace(Some(told(7)));
        timeout(3 * RETRY_MAX, confirmed(7)).await.expect_err("an agent that starts now would know nothing of it");
        full.set_capacity(None);
        timeout(3 * RETRY_MAX, confirmed(7)).await.expect("it is tried again");
        let kept: Option<HostNetworks> = cache.load(&told(1).host).await;
        assert_eq!(kept.map(|kept| kept.revision), Some(7));
        // Nor is what is on disk alone.
        held.send_replace(Some(told(8)));
        timeout(3 * RETRY_MAX, confirmed(8)).await.expect_err("the kernel has not come to it");
        handle.networks_applied(8);
        assert_eq!(handle.snapshot().networks, Some(8));
    }
}
