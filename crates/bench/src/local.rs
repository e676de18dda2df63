//! What the local cloud costs when nobody uses it, and how long it takes to come up.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::cloud::Cloud;
use crate::process;
use crate::report::{Row, median};

const STARTS: usize = 5;
const SETTLING: Duration = Duration::from_secs(20);
const MINUTE: Duration = Duration::from_secs(60);

pub fn run() -> anyhow::Result<Vec<Row>> {
    let mut ups = Vec::new();
    for start in 1..STARTS {
        eprintln!("up {start} of {STARTS}");
        ups.push(Cloud::up()?.up.as_secs_f64());
    }
    eprintln!("up {STARTS} of {STARTS}; then it settles, and is watched for a minute");
    let cloud = Cloud::up()?;
    ups.push(cloud.up.as_secs_f64());
    let mut rows = vec![Row::new("nexus up, from nothing to ready", median(&ups), "s")];
    rows.extend(idle(&cloud));
    Ok(rows)
}

/// What a cloud costs when nobody uses it, after it has settled.
pub fn idle(cloud: &Cloud) -> Vec<Row> {
    sleep(SETTLING);
    let (before, begin) = (cloud.cpu_seconds(), Instant::now());
    sleep(MINUTE);
    let share = (cloud.cpu_seconds() - before) / begin.elapsed().as_secs_f64();
    let processes = cloud.processes();
    let memory = process::pss_bytes(&processes) as f64 / f64::from(1 << 20);
    vec![
        Row::new("idle, sum of PSS", memory, "MiB"),
        Row::new("idle, share of one core over a minute", share * 100.0, "%"),
        Row::new("idle, processes", processes.len() as f64, "1"),
    ]
}
