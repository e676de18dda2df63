//! The API of a three-zone cloud: durable creates by many clients under a quota, lists of a large collection, and one
//! authenticated GET beside nginx.
//!
//! What is created are apps of an image that is not there yet: their replicas are charged to the project's quota in the
//! transaction of each create, and no host's capacity ends the run.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nexus_model::API_VERSION;
use serde_json::{Value, json};

use crate::cloud::Cloud;
use crate::load::{Load, Nginx, Outcome};
use crate::report::{Row, median, percentile};

const ROUNDS: usize = 5;
const OBJECTS: usize = 100_000;
const CLIENTS: u16 = 64;
const SERVERS: u16 = 3;
const PAGE: usize = 500;
const GET_SECONDS: u32 = 4;
const GET_CONNECTIONS: u32 = 32;
const PROJECT: &str = "bench";

pub fn run() -> anyhow::Result<Vec<Row>> {
    let cloud = Cloud::up()?;
    let quota = json!({"instances": OBJECTS, "cpu": "1000", "memory": "1Ti"});
    let project = json!({
        "apiVersion": API_VERSION,
        "kind": "Project",
        "metadata": {"name": PROJECT},
        "spec": {"quota": quota},
    });
    cloud.send("POST", "/v1/projects", &project)?;
    let mut rows = creates(&cloud)?;
    rows.extend(lists(&cloud)?);
    rows.extend(gets(&cloud)?);
    Ok(rows)
}

fn apps() -> String {
    format!("/v1/regions/local/projects/{PROJECT}/apps")
}

fn app(number: usize) -> String {
    let spec = json!({"image": "later", "replicas": 1, "resources": {"cpu": "1m", "memory": "4Mi"}});
    json!({"apiVersion": API_VERSION, "kind": "App", "metadata": {"name": name(number)}, "spec": spec}).to_string()
}

fn name(number: usize) -> String {
    format!("app-{number:06}")
}

/// Creates by many clients, spread over the servers, of as many objects as the quota allows.
fn creates(cloud: &Cloud) -> anyhow::Result<Vec<Row>> {
    let next = AtomicUsize::new(0);
    let (mut rates, mut cpu, mut latencies) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        let end = OBJECTS * round / ROUNDS;
        let before = cloud.cpu_seconds();
        let start = Instant::now();
        let took = std::thread::scope(|scope| -> anyhow::Result<Vec<f64>> {
            let clients: Vec<_> = (0..CLIENTS)
                .map(|n| {
                    scope.spawn({
                        let next = &next;
                        move || create(cloud, n, next, end)
                    })
                })
                .collect();
            let mut all = Vec::new();
            for client in clients {
                all.extend(client.join().expect("a client does not panic")?);
            }
            Ok(all)
        })?;
        let rate = took.len() as f64 / start.elapsed().as_secs_f64();
        eprintln!("round {round} of {ROUNDS}: {} creates, {rate:.0} a second", took.len());
        cpu.push((cloud.cpu_seconds() - before) / took.len() as f64);
        rates.push(rate);
        latencies.extend(took);
        next.store(end, Ordering::Relaxed);
    }
    check_quota(cloud)?;
    Ok(vec![
        Row::new("creates by 64 clients, durable on 3 servers", median(&rates), "1/s").cpu_per_op(median(&cpu)),
        Row::new("creates, slowest round", rates.iter().copied().fold(f64::INFINITY, f64::min), "1/s"),
        Row::new("create, median", median(&latencies), "ms"),
        Row::new("create, p99", percentile(&latencies, 0.99), "ms"),
    ])
}

fn create(cloud: &Cloud, client: u16, next: &AtomicUsize, end: usize) -> anyhow::Result<Vec<f64>> {
    let mut api = cloud.api(client % SERVERS)?;
    let path = apps();
    let mut took = Vec::new();
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number >= end {
            return Ok(took);
        }
        let body = app(number);
        let start = Instant::now();
        let answer = api.send("POST", &path, "application/json", body.as_bytes())?;
        took.push(start.elapsed().as_secs_f64() * 1e3);
        if answer.status != 201 {
            bail!("POST {path}: {} {}", answer.status, String::from_utf8_lossy(&answer.body));
        }
    }
}

/// The quota was on: every create was counted, and one more is refused.
fn check_quota(cloud: &Cloud) -> anyhow::Result<()> {
    let mut api = cloud.api(0)?;
    let project: Value = serde_json::from_slice(&api.get(&format!("/v1/projects/{PROJECT}"))?.body)?;
    let answer = api.send("POST", &apps(), "application/json", app(OBJECTS).as_bytes())?;
    let problem: Value = serde_json::from_slice(&answer.body)?;
    if project["status"]["used"]["instances"] != OBJECTS || problem["code"] != "quota-exceeded" {
        bail!("the figures are void: the quota was not kept: {project} {problem}");
    }
    Ok(())
}

/// Walks the whole collection, page by page.
fn lists(cloud: &Cloud) -> anyhow::Result<Vec<Row>> {
    let mut api = cloud.api(cloud.leader()?)?;
    let (mut millis, mut cpu) = (Vec::new(), Vec::new());
    for round in 1..=ROUNDS {
        eprintln!("lists, round {round} of {ROUNDS}");
        let (mut cursor, mut seen, mut pages) = (String::new(), 0, 0);
        let before = cloud.cpu_seconds();
        loop {
            let path = format!("{}?limit={PAGE}{cursor}", apps());
            let start = Instant::now();
            let answer = api.get(&path)?;
            millis.push(start.elapsed().as_secs_f64() * 1e3);
            pages += 1;
            let page: Value = serde_json::from_slice(&answer.body).context("reading a page")?;
            seen += page["items"].as_array().map_or(0, Vec::len);
            match page["metadata"]["cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        if seen != OBJECTS {
            bail!("the figures are void: the list shows {seen} of {OBJECTS} objects");
        }
        cpu.push((cloud.cpu_seconds() - before) / f64::from(pages));
    }
    Ok(vec![
        Row::new("list of 500 of 100,000, median", median(&millis), "ms").cpu_per_op(median(&cpu)),
        Row::new("list of 500 of 100,000, p99", percentile(&millis, 0.99), "ms"),
    ])
}

/// One object, again and again, from the leader; in the clear on loopback, as nginx answers too.
fn gets(cloud: &Cloud) -> anyhow::Result<Vec<Row>> {
    let leader = cloud.leader()?;
    let path = format!("{}/{}", apps(), name(OBJECTS / 2));
    let size = cloud.api(leader)?.get(&path)?.body.len();
    let dir = tempfile::Builder::new().prefix("nexus-bench-").tempdir()?;
    let nginx = Nginx::start(dir.path(), size)?;
    let stale = format!("{path}?consistency=stale");
    let load = |path, port| Load {
        port,
        path,
        host: "localhost",
        token: Some(&cloud.token),
        body: None,
        connections: GET_CONNECTIONS,
        seconds: GET_SECONDS,
    };
    let port = cloud.api_port(leader);
    let (mut fresh, mut loose, mut peer): (Side, Side, Side) = Default::default();
    for round in 1..=ROUNDS {
        eprintln!("gets, round {round} of {ROUNDS}");
        fresh.measure(|| cloud.cpu_seconds(), || load(&path, port).run(dir.path()))?;
        peer.measure(|| nginx.cpu_seconds(), || load("/", nginx.port).run(dir.path()))?;
        loose.measure(|| cloud.cpu_seconds(), || load(&stale, port).run(dir.path()))?;
    }
    let rival = || format!("nginx, constant of {size} bytes");
    Ok(vec![
        Row::new("authenticated GET, linearizable", median(&fresh.rates), "1/s")
            .peer(rival(), median(&peer.rates))
            .cpu_per_op(median(&fresh.cpu)),
        Row::new("authenticated GET, stale", median(&loose.rates), "1/s")
            .peer(rival(), median(&peer.rates))
            .cpu_per_op(median(&loose.cpu)),
        Row::new("authenticated GET, linearizable, median", median(&fresh.p50), "us").peer(rival(), median(&peer.p50)),
        Row::new("processor time of a GET, linearizable", median(&fresh.cpu) * 1e6, "us")
            .peer(rival(), median(&peer.cpu) * 1e6),
    ])
}

#[derive(Default)]
struct Side {
    rates: Vec<f64>,
    p50: Vec<f64>,
    cpu: Vec<f64>,
}

impl Side {
    fn measure(&mut self, cpu: impl Fn() -> f64, run: impl FnOnce() -> anyhow::Result<Outcome>) -> anyhow::Result<()> {
        let before = cpu();
        let outcome = run()?;
        self.cpu.push((cpu() - before) / outcome.requests as f64);
        self.rates.push(outcome.per_second());
        self.p50.push(outcome.p50_us);
        // What one side leaves to do must not be counted to the next.
        std::thread::sleep(Duration::from_millis(200));
        Ok(())
    }
}
