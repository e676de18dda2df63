//! What exists on the host, looked at when something may have changed, and told to all who wait for it.
//!
//! A look that failed is not news: what was seen last stays true until a later look succeeds. Were it otherwise, a
//! keeper that is being restarted would look like a host on which nothing runs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nexus_compute::Observed;
use nexus_compute::keep::Keep;
use nexus_model::kind::Runtime;
use nexus_model::{Name, Uid};
use tokio::sync::{Notify, watch};

/// Even if nobody says so, something may have changed.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(250);

/// One look at the whole host.
#[derive(Debug, Clone, Default)]
pub(crate) struct View {
    /// Every request up to this one is answered by this view. 0: nothing has been seen yet.
    answers: u64,
    pub instances: Arc<BTreeMap<Uid, (Runtime, Observed)>>,
    /// Init steps and sidecars, by instance. One that was cut off while it was made is among the instances: nobody knows whose
    /// it is.
    pub parts: Arc<BTreeMap<Uid, BTreeMap<Name, Observed>>>,
}

/// What one look saw: instances, and their parts.
type Seen = (BTreeMap<Uid, (Runtime, Observed)>, BTreeMap<Uid, BTreeMap<Name, Observed>>);

impl View {
    pub fn is_known(&self) -> bool {
        self.answers > 0
    }
}

pub(crate) struct Observer {
    runtimes: BTreeMap<Runtime, Arc<dyn nexus_compute::Runtime>>,
    keep: Arc<dyn Keep>,
    asked: AtomicU64,
    ask: Notify,
    views: watch::Sender<View>,
}

impl Observer {
    pub fn new(runtimes: BTreeMap<Runtime, Arc<dyn nexus_compute::Runtime>>, keep: Arc<dyn Keep>) -> Self {
        Self { runtimes, keep, asked: AtomicU64::new(1), ask: Notify::new(), views: watch::Sender::default() }
    }

    pub fn subscribe(&self) -> watch::Receiver<View> {
        self.views.subscribe()
    }

    /// Waits for a view that began after this call.
    pub async fn look(&self) {
        let request = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        self.ask.notify_one();
        let mut views = self.views.subscribe();
        // The observer lives as long as the daemon; without it there is nothing to wait for.
        let _ = views.wait_for(|v| v.answers >= request).await;
    }

    /// Looks whenever there is reason to. Runs until it is dropped.
    pub async fn run(&self) {
        loop {
            let request = self.asked.load(Ordering::SeqCst);
            match self.observe().await {
                Ok((instances, parts)) => {
                    let (instances, parts) = (Arc::new(instances), Arc::new(parts));
                    self.views.send_replace(View { answers: request, instances, parts });
                }
                Err(error) => {
                    tracing::warn!(%error, "the host can't be looked at");
                    tokio::time::sleep(RETRY).await;
                    continue;
                }
            }
            if self.asked.load(Ordering::SeqCst) > request {
                continue;
            }
            tokio::select! {
                biased;
                () = self.ask.notified() => {}
                () = self.keep.changed() => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
    }

    async fn observe(&self) -> Result<Seen, nexus_compute::RuntimeError> {
        let (mut all, mut parts) = Seen::default();
        for (kind, runtime) in &self.runtimes {
            for observed in runtime.observe().await? {
                match observed.part.clone() {
                    None => drop(all.insert(observed.uid, (*kind, observed))),
                    Some(part) => drop(parts.entry(part.instance).or_default().insert(part.name, observed)),
                }
            }
        }
        Ok((all, parts))
    }
}
