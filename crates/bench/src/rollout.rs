//! A rollout of fifty containers with a surge of 25 % on the local cloud, from the change of the template to the moment when all
//! instances are of the new one and ready, and no older one is left to serve.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cloud::Cloud;
use crate::report::{Row, median};
use crate::{container, process};

const CONTAINERS: u64 = 50;
const ROUNDS: usize = 5;
/// A rollout may be slow, but not so slow.
const PATIENCE: Duration = Duration::from_secs(300);
const APP: &str = "/v1/regions/local/projects/default/apps/web";

pub fn run() -> anyhow::Result<Vec<Row>> {
    let cloud = Cloud::up()?;
    let archive = cloud.scratch("busybox.tar");
    container::busybox(&archive)?;
    cloud.import(&archive, "busybox")?;
    let app = json!({
        "image": "busybox",
        "replicas": CONTAINERS,
        "ports": [{"port": 80}],
        "resources": {"memory": "16Mi", "cpu": "20m"},
        // As its container's first process busybox hears of no other.
        "stopSignal": "KILL",
        "rollout": {"maxSurge": "25%"},
    });
    let begin = Instant::now();
    cloud.create("App", "apps", "web", &app)?;
    settled(&cloud, 1)?;
    let mut rows = vec![Row::new("50 containers, deploy to all ready", begin.elapsed().as_secs_f64(), "s")];
    let mut seconds = Vec::new();
    for round in 1..=ROUNDS {
        eprintln!("rollout {round} of {ROUNDS}");
        let begin = Instant::now();
        let patch = json!({"spec": {"env": {"ROUND": round.to_string()}}});
        let changed = cloud.patch(APP, &patch)?;
        settled(&cloud, changed["metadata"]["generation"].as_u64().unwrap_or(0))?;
        seconds.push(begin.elapsed().as_secs_f64());
    }
    rows.push(Row::new("rollout of 50 containers, surge 25 %", median(&seconds), "s"));
    Ok(rows)
}

/// Waits until the app is as this generation wants it.
fn settled(cloud: &Cloud, generation: u64) -> anyhow::Result<()> {
    process::wait("the rollout", PATIENCE, Duration::from_millis(50), || {
        let app: Value = serde_json::from_slice(&cloud.api(0).ok()?.get(APP).ok()?.body).ok()?;
        let status = &app["status"];
        let done = status["phase"] == "Ready" && status["observedGeneration"].as_u64()? >= generation;
        done.then_some(())
    })
}
