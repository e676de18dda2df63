//! Which targets of balancers answer this host: asked here, kept on disk, and told to whoever programs the host's networks.
//!
//! Nobody else is needed for it. An agent that restarts goes on from what its predecessor found, so that a target which was out
//! stays out until it answers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nexus_env::{Disk, on_disk, write_atomic};
use nexus_model::Uid;
use nexus_model::plan::HostNetworks;
use nexus_network::vpc::health::{Asked, Failing, Health};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::config::{Found, NetworkEngine};

/// So many targets are asked at once, by equal shares of the networks, and so many begin to be in a tenth of a second: 500 a
/// second. More wait for their turn.
const AT_ONCE: usize = 500;
const TICK: Duration = Duration::from_millis(100);
const PER_TICK: usize = 50;

/// Where what was found is kept.
#[derive(Clone)]
pub(crate) struct Kept {
    pub disk: Arc<dyn Disk>,
    pub path: PathBuf,
}

impl Kept {
    /// What an agent before this one found. What can't be read is found again.
    pub async fn load(&self) -> Failing {
        let (disk, path) = (self.disk.clone(), self.path.clone());
        let read = on_disk(&self.disk, move || if disk.exists(&path)? { disk.read(&path) } else { Ok(b"[]".to_vec()) });
        let read = async { Ok::<_, std::io::Error>(serde_json::from_slice::<Vec<(Asked, String)>>(&read.await??)?) };
        match read.await {
            Ok(all) => all.into_iter().collect(),
            Err(error) => {
                tracing::warn!(%error, "which targets of load balancers failed can't be read: they are asked again");
                Failing::new()
            }
        }
    }

    async fn save(&self, failing: &Failing) {
        let saved = async {
            let all: Vec<_> = failing.iter().collect();
            let (disk, path, text) = (self.disk.clone(), self.path.clone(), serde_json::to_vec(&all)?);
            on_disk(&self.disk, move || write_atomic(&*disk, &path, &text)).await?
        };
        if let Err(error) = saved.await {
            tracing::warn!(%error, "which targets of load balancers fail can't be kept on disk: a restart asks them anew");
        }
    }
}

/// Asks the targets of the networks that this host has been brought to, and tells which fail. Runs until it is dropped.
pub(crate) async fn run(
    engine: Arc<dyn NetworkEngine>,
    mut by: watch::Receiver<Option<Arc<HostNetworks>>>,
    failing: watch::Sender<Arc<Failing>>,
    kept: Kept,
) {
    let mut health = Health::resumed(Failing::clone(&failing.borrow()), now());
    let (found, mut answers) = mpsc::channel::<Found>(AT_ONCE);
    let mut asking = JoinSet::new();
    let (mut told, mut out): (Option<Arc<HostNetworks>>, usize) = (None, 0);
    let mut earliest = now();
    loop {
        let mut changed = false;
        // Only once the networks of this host are there.
        let next = health.next().filter(|_| told.is_some() && out < AT_ONCE).map(|next| next.max(earliest));
        tokio::select! {
            biased;
            newer = by.changed() => {
                if newer.is_err() {
                    return;
                }
                told.clone_from(&by.borrow_and_update());
                if let Some(told) = &told {
                    changed = health.follow(told, now());
                }
            }
            Some((asked, answer)) = answers.recv() => {
                out -= 1;
                let why = answer.as_ref().and_then(|a| a.as_ref().err().cloned());
                if health.found(&asked, answer) {
                    changed = true;
                    let at = std::net::SocketAddr::new(asked.address, asked.port);
                    match why {
                        Some(why) => tracing::info!(network = %asked.network, %at, why, "a target fails its check"),
                        None => tracing::info!(network = %asked.network, %at, "a target answers again"),
                    }
                }
            }
            Some(_) = asking.join_next() => continue,
            () = until(next) => {
                earliest = now() + TICK;
                let due = health.due(now(), PER_TICK.min(AT_ONCE - out), AT_ONCE);
                out += due.len();
                let mut by_network: BTreeMap<Uid, Vec<Asked>> = BTreeMap::new();
                for asked in due {
                    by_network.entry(asked.network).or_default().push(asked);
                }
                for targets in by_network.into_values() {
                    let Some(told) = &told else { continue };
                    let (engine, found, endpoint) = (engine.clone(), found.clone(), told.endpoint);
                    asking.spawn(async move { engine.ask(endpoint, targets, found).await });
                }
            }
        }
        if changed {
            let fail = Arc::new(health.failing());
            kept.save(&fail).await;
            failing.send_replace(fail);
        }
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Waits for a time; without one, for ever.
async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time.into()).await,
        None => std::future::pending().await,
    }
}
