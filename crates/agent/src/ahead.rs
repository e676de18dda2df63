//! Makes images ready before an instance of them is placed here: a function that was imported is compiled by the time its
//! first instance comes. One image at a time, because compiling takes every processor that it finds.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use nexus_model::Digest;
use nexus_model::kind::{ImageFormat, Runtime};
use nexus_model::plan::{HostPlan, ImagePlan};
use tokio::sync::watch;

use crate::config::Engines;

/// What failed is tried again so much later, or with the next plan.
const RETRY: Duration = Duration::from_secs(60);

/// Follows the plan's list until the plan ends.
pub async fn run(engines: Engines, mut planned: watch::Receiver<Option<Arc<HostPlan>>>) {
    let mut ready: BTreeSet<Digest> = BTreeSet::new();
    loop {
        let plan = planned.borrow_and_update().clone();
        let wanted: Vec<ImagePlan> = plan.map(|p| p.prepare.clone()).unwrap_or_default();
        ready.retain(|digest| wanted.iter().any(|image| image.digest == *digest));
        let mut failed = false;
        for image in &wanted {
            if ready.contains(&image.digest) {
                continue;
            }
            match prepare(&engines, image).await {
                Ok(()) => {
                    ready.insert(image.digest);
                }
                Err(error) => {
                    failed = true;
                    tracing::warn!(image = %image.digest, %error, "an image can't be made ready ahead");
                }
            }
        }
        tokio::select! {
            changed = planned.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if failed => {}
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
