//! Makes images ready before an instance of them is placed here: a function that was imported is compiled by the time its
//! first instance comes, and what an app is about to run is on its hosts' disks before the rollout reaches them. Of each format one
//! image at a time, because compiling takes every processor that it finds, and a download the network.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use nexus_model::Digest;
use nexus_model::kind::{ImageFormat, Runtime};
use nexus_model::plan::{HostPlan, ImagePlan};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::config::Engines;

/// What failed is tried again so much later, however many plans come meanwhile.
const RETRY: Duration = Duration::from_secs(60);

/// Follows what the plan's list has of one format, until the plan ends.
pub async fn run(engines: Engines, mut planned: watch::Receiver<Option<Arc<HostPlan>>>, format: ImageFormat) {
    let mut ready: BTreeSet<Digest> = BTreeSet::new();
    // With when each is tried again.
    let mut failed: BTreeMap<Digest, Instant> = BTreeMap::new();
    loop {
        let plan = planned.borrow_and_update().clone();
        let wanted: Vec<ImagePlan> = plan.map(|p| p.prepare.clone()).unwrap_or_default();
        let wanted: Vec<ImagePlan> = wanted.into_iter().filter(|image| image.format == format).collect();
        let is_wanted = |digest: &Digest| wanted.iter().any(|image| image.digest == *digest);
        ready.retain(is_wanted);
        failed.retain(|digest, _| is_wanted(digest));
        for image in &wanted {
            let waits = failed.get(&image.digest).is_some_and(|again| Instant::now() < *again);
            if waits || ready.contains(&image.digest) {
                continue;
            }
            match prepare(&engines, image).await {
                Ok(()) => {
                    failed.remove(&image.digest);
                    ready.insert(image.digest);
                }
                Err(error) => {
                    failed.insert(image.digest, Instant::now() + RETRY);
                    tracing::warn!(image = %image.digest, %error, "an image can't be made ready ahead");
                }
            }
        }
        let again = failed.values().min().copied();
        tokio::select! {
            biased;
            changed = planned.changed() => if changed.is_err() { return },
            () = sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => {}
        }
    }
}

async fn prepare(engines: &Engines, image: &ImagePlan) -> Result<(), String> {
    let runtime = match image.format {
        ImageFormat::Oci => Runtime::Container,
        ImageFormat::Wasm => Runtime::Function,
    };
    let Some(runtime) = engines.runtimes.get(&runtime) else { return Ok(()) };
    engines.images.ensure(image).await.map_err(|e| e.to_string())?;
    runtime.prepare(image.digest).await.map_err(|e| e.to_string())
}
