//! Three regions of one server each on one machine: what they cost when nobody uses them, and what goes on when the one that
//! leads the global group is lost: its cable pulled, or all of it killed.
//!
//! All the while, a surviving region is asked for a global write (a project is made, and deleted again) every 100 ms, each
//! whatever becomes of those before, with an `Idempotency-Key` as every client of ours sends; each region is asked for writes
//! of its own and for reads of the global group from its own copy, one at a time.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{ScopedJoinHandle, scope, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use nexus_model::API_VERSION;
use serde_json::{Value, json};

use crate::cloud::{Cloud, PATIENCE};
use crate::http::Client;
use crate::local::idle;
use crate::process;
use crate::report::{Row, median};

const REGIONS: [&str; 3] = ["region-a", "region-b", "region-c"];
const ROUNDS: usize = 5;
/// Load before the loss, so that everything is warm.
const BEFORE: Duration = Duration::from_secs(2);
/// How long a region stays lost.
const LOST: Duration = Duration::from_secs(8);
const GLOBAL_EVERY: Duration = Duration::from_millis(100);
const REGIONAL_EVERY: Duration = Duration::from_millis(50);
const READ_EVERY: Duration = Duration::from_millis(20);
/// A copy that was complete so lately is as good as the others'.
const FRESH: u64 = 3_000;

#[derive(Clone, Copy, PartialEq)]
enum Loss {
    Cut,
    Killed,
}

/// One request.
#[derive(Clone, Copy)]
struct Sample {
    begun: Instant,
    done: Instant,
    ok: bool,
    age_ms: u64,
}

/// What one round came to, in seconds unless it says otherwise.
#[derive(Default)]
struct Round {
    /// From the loss to the first acknowledgement of a global write.
    global: f64,
    /// Global writes that were begun while the region was lost and not acknowledged.
    failed: usize,
    /// Reads from copies: all, and those that were answered.
    reads: usize,
    answered: usize,
    age_others: f64,
    age_lost: f64,
    /// The slowest linearizable read of the global group in a surviving region.
    linearizable: f64,
    gap_others: f64,
    gap_lost: f64,
    converged: f64,
}

fn api(cloud: &Cloud, region: usize) -> anyhow::Result<Client> {
    cloud.api(u16::try_from(20 * region).expect("a few regions"))
}

fn status(cloud: &Cloud, region: usize) -> Option<Value> {
    let answer = api(cloud, region).ok()?.get("/v1/status").ok()?;
    let status: Value = serde_json::from_slice(&answer.body).ok()?;
    status["groups"].as_array()?.iter().find(|g| g["group"] == "global").cloned()
}

/// The region that leads the global group.
fn leader(cloud: &Cloud) -> anyhow::Result<usize> {
    process::wait("a leader of the global group", PATIENCE, Duration::from_millis(100), || {
        let group = status(cloud, 0)?;
        let leader = usize::try_from(group["leader"].as_u64()?).ok()?;
        // Nodes are numbered by regions.
        (group["quorum"] == true).then_some(leader / 100)
    })
}

fn project(name: &str) -> Value {
    let spec = json!({"organization": "default"});
    json!({"apiVersion": API_VERSION, "kind": "Project", "metadata": {"name": name}, "spec": spec})
}

fn make_project(cloud: &Cloud, region: usize, name: &str) -> anyhow::Result<bool> {
    let mut api = api(cloud, region)?;
    api.header("idempotency-key", name);
    let answer = api.send("POST", "/v1/projects", "application/json", project(name).to_string().as_bytes())?;
    Ok(answer.status / 100 == 2)
}

fn route_of(region: usize) -> String {
    format!("/v1/regions/{}/projects/default/routes/bench", REGIONS[region])
}

/// Makes the object that each region's own writes change.
fn prepare(cloud: &Cloud, region: usize) -> anyhow::Result<()> {
    let spec = json!({"host": format!("bench-{region}.example.com"), "app": "none"});
    let route = json!({"apiVersion": API_VERSION, "kind": "Route", "metadata": {"name": "bench"}, "spec": spec});
    let body = route.to_string();
    let answer = api(cloud, region)?.send("PUT", &route_of(region), "application/json", body.as_bytes())?;
    ensure!(answer.status / 100 == 2, "{}: {}", answer.status, String::from_utf8_lossy(&answer.body));
    Ok(())
}

/// What is asked of one region, one request at a time.
#[derive(Clone, Copy)]
enum Ask {
    Own,
    Copy,
    Linearizable,
}

/// Asks until `stop`, on one connection for as long as it lasts.
fn keep_asking(cloud: &Cloud, region: usize, ask: Ask, stop: &AtomicBool) -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut open: Option<Client> = None;
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let answer = open.take().map_or_else(|| api(cloud, region), Ok).and_then(|mut client| {
            let answer = match ask {
                Ask::Own => {
                    let patch = json!({"metadata": {"labels": {"n": samples.len().to_string()}}}).to_string();
                    client.send("PATCH", &route_of(region), "application/merge-patch+json", patch.as_bytes())?
                }
                Ask::Copy => client.get("/v1/projects?limit=10&consistency=stale")?,
                Ask::Linearizable => client.get("/v1/projects?limit=10")?,
            };
            open = Some(client);
            Ok(answer)
        });
        let ok = answer.as_ref().is_ok_and(|a| a.status == 200);
        let age_ms = answer.ok().and_then(|a| a.age_ms).unwrap_or(0);
        samples.push(Sample { begun, done: Instant::now(), ok, age_ms });
        let every = if matches!(ask, Ask::Own) { REGIONAL_EVERY } else { READ_EVERY };
        sleep(every.saturating_sub(begun.elapsed()));
    }
    samples
}

/// The longest time without an acknowledgement between two instants.
fn longest_gap(samples: &[Sample], from: Instant, to: Instant) -> f64 {
    let acknowledged = samples.iter().filter(|s| s.ok).map(|s| s.done);
    let mut last = acknowledged.clone().filter(|at| *at <= from).max().unwrap_or(from);
    let mut longest = Duration::ZERO;
    for at in acknowledged.filter(|at| *at > from && *at <= to).chain([to]) {
        longest = longest.max(at.saturating_duration_since(last));
        last = at;
    }
    longest.as_secs_f64()
}

/// Waits until the region that was lost is one of three again.
fn converge(cloud: &Cloud, lost: usize, here: usize, marker: &str) -> anyhow::Result<()> {
    let path = format!("/v1/projects/{marker}?consistency=stale");
    let region = format!("/v1/regions/{}", REGIONS[lost]);
    let mut missing = "nothing";
    let mut look = || -> Option<()> {
        missing = "its API";
        let known = api(cloud, lost).ok()?.get(&path).ok()?.status == 200;
        let group = status(cloud, lost)?;
        missing = "what was made meanwhile";
        known.then_some(())?;
        missing = "a fresh copy of the global group";
        (group["quorum"] == true && group["stale_ms"].as_u64()? < FRESH).then_some(())?;
        missing = "the others' word that it reports";
        let told: Value = serde_json::from_slice(&api(cloud, here).ok()?.get(&region).ok()?.body).ok()?;
        let conditions = told["status"]["conditions"].as_array()?;
        conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True").then_some(())
    };
    let converged =
        process::wait("the region that was lost to converge", PATIENCE, Duration::from_millis(20), &mut look);
    converged.with_context(|| format!("{} lacks {missing}", REGIONS[lost]))
}

fn round(cloud: &Cloud, n: usize, loss: Loss) -> anyhow::Result<Round> {
    let lost = leader(cloud)?;
    let (here, there) = ((lost + 1) % 3, (lost + 2) % 3);
    // Nobody asks what is dead.
    let served: Vec<usize> = (0..3).filter(|r| loss == Loss::Cut || *r != lost).collect();
    let stop = AtomicBool::new(false);
    let writes = Mutex::new(Vec::<Sample>::new());
    let made = AtomicUsize::new(0);
    let kind = if loss == Loss::Cut { "cut" } else { "kill" };
    let marker = format!("{kind}-{n}-marker");
    let ([begun, gone, back], asked, linearizable) = scope(|threads| -> anyhow::Result<_> {
        let ask = |region, ask| {
            threads.spawn({
                let stop = &stop;
                move || keep_asking(cloud, region, ask, stop)
            })
        };
        let own: Vec<_> = (0..3).map(|r| served.contains(&r).then(|| ask(r, Ask::Own))).collect();
        let copies: Vec<_> = (0..3).map(|r| served.contains(&r).then(|| ask(r, Ask::Copy))).collect();
        let linearizable = ask(here, Ask::Linearizable);
        let (stop, writes, made) = (&stop, &writes, &made);
        threads.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let name = format!("{kind}-{n}-{}", made.fetch_add(1, Ordering::Relaxed));
                threads.spawn(move || {
                    let begun = Instant::now();
                    let ok = make_project(cloud, here, &name).unwrap_or(false);
                    let sample = Sample { begun, done: Instant::now(), ok, age_ms: 0 };
                    writes.lock().expect("nobody panics with it").push(sample);
                    // What comes of this is told by the round's end: nobody waits for it.
                    let gone = api(cloud, here)
                        .and_then(|mut api| Ok(api.send("DELETE", &format!("/v1/projects/{name}"), "", &[])?));
                    drop(gone);
                });
                sleep(GLOBAL_EVERY);
            }
        });
        let work = || -> anyhow::Result<[Instant; 3]> {
            sleep(BEFORE);
            let begun = Instant::now();
            cloud.local(kind, REGIONS[lost])?;
            let gone = Instant::now();
            sleep(LOST);
            ensure!(make_project(cloud, here, &marker)?, "the other regions take no global write after {LOST:?}");
            Ok([begun, gone, Instant::now()])
        };
        let worked = work();
        stop.store(true, Ordering::Relaxed);
        let join = |all: Vec<Option<ScopedJoinHandle<'_, Vec<Sample>>>>| -> Vec<Vec<Sample>> {
            all.into_iter().map(|t| t.map(|t| t.join().expect("it does not panic")).unwrap_or_default()).collect()
        };
        let asked = (join(own), join(copies));
        let linearizable = linearizable.join().expect("it does not panic");
        Ok((worked?, asked, linearizable))
    })?;
    let (own, copies) = asked;
    let writes = writes.into_inner().expect("nobody panics with it");
    cloud.local(if loss == Loss::Cut { "heal" } else { "start" }, REGIONS[lost])?;
    let healed = Instant::now();
    converge(cloud, lost, here, &marker)?;
    let converged = healed.elapsed().as_secs_f64();

    let during = |s: &&Sample| s.begun >= gone && s.begun <= back;
    let first = writes.iter().filter(during).filter(|s| s.ok).map(|s| s.done).min();
    let first = first.context("no global write was acknowledged while the region was lost")?;
    let failed = writes.iter().filter(during).filter(|s| !s.ok).count();
    let age = |regions: &[usize]| {
        let all = regions.iter().flat_map(|r| copies[*r].iter().filter(during));
        all.map(|s| s.age_ms).max().unwrap_or(0) as f64 / 1e3
    };
    let reads: Vec<&Sample> = served.iter().flat_map(|r| copies[*r].iter().filter(during)).collect();
    let gap = |regions: &[usize]| regions.iter().map(|r| longest_gap(&own[*r], gone, back)).fold(0.0, f64::max);
    let slowest = linearizable.iter().filter(during).map(|s| (s.done - s.begun).as_secs_f64()).fold(0.0, f64::max);
    Ok(Round {
        global: (first - begun).as_secs_f64(),
        failed,
        reads: reads.len(),
        answered: reads.iter().filter(|s| s.ok).count(),
        age_others: age(&[here, there]),
        age_lost: age(&[lost]),
        linearizable: slowest,
        gap_others: gap(&[here, there]),
        gap_lost: gap(&[lost]),
        converged,
    })
}

fn worst(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NAN, f64::max)
}

fn rounds(cloud: &Cloud, loss: Loss) -> anyhow::Result<Vec<Row>> {
    let what = if loss == Loss::Cut { "cut off" } else { "killed" };
    let mut all = Vec::new();
    for n in 0..ROUNDS {
        let round = round(cloud, n, loss)?;
        eprintln!(
            "{what}, round {} of {ROUNDS}: global writes after {:.2} s, converged {:.2} s after its return",
            n + 1,
            round.global,
            round.converged
        );
        all.push(round);
    }
    let of = |f: fn(&Round) -> f64| -> Vec<f64> { all.iter().map(f).collect() };
    let (reads, answered) = all.iter().fold((0, 0), |(r, a), x| (r + x.reads, a + x.answered));
    let seconds = |name: &str, value: f64| Row::new(format!("leading region {what}: {name}"), value, "s");
    let mut rows = vec![
        seconds("global writes again, median", median(&of(|r| r.global))),
        seconds("global writes again, worst", worst(&of(|r| r.global))),
        Row::new(
            format!("leading region {what}: global writes not acknowledged, most in a round"),
            worst(&of(|r| r.failed as f64)),
            "1",
        ),
        Row::new(
            format!("leading region {what}: global reads from copies, answered"),
            answered as f64 / reads.max(1) as f64 * 100.0,
            "%",
        ),
        seconds("age of the others' copies, worst", worst(&of(|r| r.age_others))),
        seconds("linearizable global read elsewhere, slowest", worst(&of(|r| r.linearizable))),
        seconds("own writes of the others, longest gap", worst(&of(|r| r.gap_others))),
    ];
    if loss == Loss::Cut {
        rows.push(seconds("age of its own copy, worst", worst(&of(|r| r.age_lost))));
        rows.push(seconds("its own writes, longest gap", worst(&of(|r| r.gap_lost))));
    }
    rows.push(seconds("back to converged, median", median(&of(|r| r.converged))));
    rows.push(seconds("back to converged, worst", worst(&of(|r| r.converged))));
    Ok(rows)
}

pub fn run() -> anyhow::Result<Vec<Row>> {
    let cloud = Cloud::up_as(&["--regions", "3", "--hosts-per-zone", "1", "--timeout", "120"])?;
    eprintln!("three regions are up; they settle, and are watched for a minute");
    let mut rows = idle(&cloud);
    (0..3).try_for_each(|region| prepare(&cloud, region))?;
    rows.extend(rounds(&cloud, Loss::Cut)?);
    rows.extend(rounds(&cloud, Loss::Killed)?);
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_measured_from_the_last_acknowledgement_before_to_the_end() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let sample = |ms, ok| Sample { begun: at(ms), done: at(ms), ok, age_ms: 0 };
        let samples = [sample(10, true), sample(40, true), sample(60, false), sample(90, true)];
        let gap = |from, to| (longest_gap(&samples, at(from), at(to)) * 1e3).round() as u64;
        assert_eq!(gap(20, 100), 50, "what is not acknowledged does not count");
        assert_eq!(gap(20, 300), 210, "nothing came any more");
        assert_eq!(gap(35, 41), 30);
    }
}
