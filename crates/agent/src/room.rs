//! Keeps room on the host's disk: now and then, and soon after a plan has changed, images go that the plan does not name.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use nexus_model::Digest;
use nexus_model::plan::HostPlan;
use tokio::sync::watch;

use crate::config::Engines;

/// How often a host looks at its disk.
const INTERVAL: Duration = Duration::from_secs(60);
/// How long after a change of the plan: what has gone from it is still being cleared away.
const SETTLE: Duration = Duration::from_secs(5);

/// What a plan needs: its instances' images, and what is to be ready before an instance comes.
pub(crate) fn needed(plan: &HostPlan) -> BTreeSet<Digest> {
    let instances = plan.instances.iter().flat_map(|i| i.part_digests.values().copied().chain([i.image.digest]));
    instances.chain(plan.prepare.iter().map(|image| image.digest)).collect()
}

/// Runs until the plan ends.
pub(crate) async fn keep(engines: Engines, mut planned: watch::Receiver<Option<Arc<HostPlan>>>) {
    let newest = planned.clone();
    let needed = move || newest.borrow().as_deref().map(needed);
    loop {
        tokio::select! {
            biased;
            changed = planned.changed() => match changed {
                Ok(()) => tokio::time::sleep(SETTLE).await,
                Err(_) => return,
            },
            () = tokio::time::sleep(INTERVAL) => {}
        }
        engines.images.collect(&engines.runtimes, &needed).await;
    }
}
