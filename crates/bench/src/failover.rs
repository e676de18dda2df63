//! A host with 100 containers loses its power: from that moment to the last of them ready on other hosts.

use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::cloud::{Cloud, PATIENCE};
use crate::container::busybox;
use crate::process;
use crate::report::{Row, median};

const ROUNDS: usize = 5;
const CONTAINERS: u64 = 100;
const HOSTS: [&str; 3] = ["zone-a-1", "zone-b-1", "zone-c-1"];
/// A calm between rounds, so that none begins with what the last one left to do.
const SETTLING: Duration = Duration::from_secs(5);

pub fn run() -> anyhow::Result<Vec<Row>> {
    let cloud = Cloud::up_as(&["--zones", "3", "--hosts-per-zone", "1"])?;
    let archive = cloud.scratch("busybox.tar");
    busybox(&archive)?;
    cloud.import(&archive, "busybox")?;
    let app = |replicas: u64| {
        json!({
            "image": "busybox",
            "replicas": replicas,
            "spread": "host",
            "ports": [{"port": 80}],
            "resources": {"cpu": "5m", "memory": "16Mi", "scratch": "8Mi"},
        })
    };
    // One on each host brings the image there.
    cloud.create("App", "apps", "warm", &app(3))?;
    cloud.wait_ready("warm", 3)?;
    cloud.delete_app("warm")?;
    let (mut begun, mut healthy) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        eprintln!("a host's death {round} of {ROUNDS}");
        let name = format!("web-{round}");
        let (doomed, others) = HOSTS.split_first().expect("there are hosts");
        for host in others {
            cordon(&cloud, host, true)?;
        }
        cloud.create("App", "apps", &name, &app(CONTAINERS))?;
        cloud.wait_ready(&name, CONTAINERS)?;
        for host in others {
            cordon(&cloud, host, false)?;
        }
        sleep(SETTLING);
        let death = Instant::now();
        cloud.local("kill", doomed)?;
        let mut first = None;
        process::wait("the instances to be ready elsewhere", 2 * PATIENCE, Duration::from_millis(100), || {
            let ready = ready_elsewhere(&cloud, &name, doomed)?;
            if ready > 0 {
                first.get_or_insert_with(|| death.elapsed());
            }
            (ready >= CONTAINERS).then_some(())
        })?;
        healthy.push(death.elapsed().as_secs_f64());
        begun.push(first.unwrap_or_default().as_secs_f64());
        cloud.delete_app(&name)?;
        cloud.local("start", doomed)?;
        process::wait("the host to be ready again", 2 * PATIENCE, Duration::from_millis(200), || {
            let answer = cloud.api(0).ok()?.get(&format!("/v1/regions/local/hosts/{doomed}")).ok()?;
            let host: Value = serde_json::from_slice(&answer.body).ok()?;
            (host["status"]["state"] == "ready").then_some(())
        })?;
        sleep(SETTLING);
    }
    Ok(vec![
        Row::new("a host's death to the first of 100 ready elsewhere", median(&begun), "s"),
        Row::new("a host's death to the last of 100 ready elsewhere", median(&healthy), "s"),
    ])
}

fn cordon(cloud: &Cloud, host: &str, cordoned: bool) -> anyhow::Result<()> {
    let change = json!({"spec": {"cordoned": cordoned}});
    cloud.patch(&format!("/v1/regions/local/hosts/{host}"), &change).map(drop)
}

/// How many of an app's instances are ready on another host than the dead one.
fn ready_elsewhere(cloud: &Cloud, app: &str, dead: &str) -> Option<u64> {
    let path = "/v1/regions/local/projects/default/instances?limit=500";
    let list: Value = serde_json::from_slice(&cloud.api(0).ok()?.get(path).ok()?.body).ok()?;
    let ready = |instance: &&Value| {
        let status = &instance["status"];
        instance["spec"]["app"] == app && status["ready"] == true && status["host"] != dead
    };
    u64::try_from(list["items"].as_array()?.iter().filter(ready).count()).ok()
}
