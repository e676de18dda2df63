//! Runs many seeds, each in a process of its own, and adds up what they say.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::RESULT;
use crate::coverage;
use crate::mutant::Mutant;
use crate::run::{self, Outcome};
use crate::trace::Violation;

/// A seed that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(180);
/// From this many seeds on, every fault must have struck at every step.
const COVERS_ALL: u64 = 150;

/// Runs one seed in a child.
fn child(seed: u64, mutant: Option<Mutant>) -> anyhow::Result<Outcome> {
    let mut command = Command::new(std::env::current_exe().context("finding this program")?);
    command.args(["--one", &seed.to_string()]);
    if let Some(mutant) = mutant {
        command.args(["--mutant", mutant.name()]);
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdout = child.stdout.take().context("the child's output was asked for")?;
    let mut stderr = child.stderr.take().context("the child's errors were asked for")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).map(|_| text)
    });
    let started = Instant::now();
    let mut hangs = false;
    while child.try_wait()?.is_none() {
        if started.elapsed() > LIMIT {
            hangs = true;
            child.kill()?;
            child.wait()?;
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let text = reader.join().map_err(|_| anyhow::anyhow!("reading the child failed"))??;
    let errors = errors.join().map_err(|_| anyhow::anyhow!("reading the child failed"))??;
    let broken = |property: &str, detail: String| Outcome {
        seed,
        kind: "?".into(),
        hash: 0,
        virtual_seconds: 0.0,
        counters: BTreeMap::new(),
        violations: vec![Violation { property: property.into(), detail }],
    };
    if hangs {
        return Ok(broken("a run ends", format!("not after {LIMIT:?}")));
    }
    let Some(line) = text.lines().rev().find_map(|l| l.strip_prefix(RESULT)) else {
        let tail: Vec<&str> = errors.lines().rev().take(6).collect();
        return Ok(broken("a run ends", format!("without a result: {tail:?}")));
    };
    serde_json::from_str(line).context("reading a child's result")
}

/// Runs the seeds that are wanted on all processors and hands over each outcome; stops early when `take` says so.
fn each(
    from: u64,
    seeds: u64,
    mutant: Option<Mutant>,
    wanted: impl Fn(u64) -> bool + Sync,
    mut take: impl FnMut(Outcome) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let next = AtomicU64::new(from);
    let stop = AtomicBool::new(false);
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        let (outcomes, inbox) = mpsc::sync_channel(workers);
        for _ in 0..workers {
            let (next, stop, wanted, outcomes) = (&next, &stop, &wanted, outcomes.clone());
            scope.spawn(move || {
                loop {
                    let seed = next.fetch_add(1, Ordering::SeqCst);
                    if seed >= from + seeds || stop.load(Ordering::SeqCst) {
                        return;
                    }
                    if !wanted(seed) {
                        continue;
                    }
                    if outcomes.send(child(seed, mutant)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(outcomes);
        let mut result = Ok(());
        while let Ok(outcome) = inbox.recv() {
            if stop.load(Ordering::SeqCst) {
                continue;
            }
            match outcome.and_then(&mut take) {
                Ok(true) => {}
                Ok(false) => stop.store(true, Ordering::SeqCst),
                Err(e) => {
                    stop.store(true, Ordering::SeqCst);
                    result = Err(e);
                }
            }
        }
        result
    })
}

/// One seed's broken properties, and how to see it again.
fn print_failure(outcome: &Outcome, mutant: Option<Mutant>) {
    let with = mutant.map_or(String::new(), |m| format!(" --mutant {}", m.name()));
    println!(
        "seed {} ({}) FAILED: replay with `cargo xtask sim --seed {}{with}`",
        outcome.seed, outcome.kind, outcome.seed
    );
    for violation in outcome.violations.iter().take(4) {
        let detail: String = violation.detail.chars().take(400).collect();
        println!("  {}: {detail}", violation.property);
    }
}

/// Runs seeds without a planted bug. True if none failed and every fault struck.
pub fn run_all(from: u64, seeds: u64, world: Option<&str>, repeat: bool) -> anyhow::Result<bool> {
    let started = Instant::now();
    let all = |seed: u64| world.is_none_or(|name| run::seed_kind(seed).name() == name);
    let mut totals: BTreeMap<String, u64> = BTreeMap::new();
    let (mut ran, mut failed, mut seconds) = (0u64, Vec::new(), 0.0);
    let mut hashes = BTreeMap::new();
    each(from, seeds, None, all, |outcome| {
        ran += 1;
        seconds += outcome.virtual_seconds;
        for (what, n) in &outcome.counters {
            *totals.entry(what.clone()).or_default() += n;
        }
        hashes.insert(outcome.seed, outcome.hash);
        if !outcome.violations.is_empty() {
            print_failure(&outcome, None);
            failed.push(outcome.seed);
        }
        Ok(true)
    })?;
    let mut differ = Vec::new();
    if repeat {
        // The same seed must do the same again, or no failure could be replayed.
        each(from, seeds, None, all, |outcome| {
            if hashes.get(&outcome.seed) != Some(&outcome.hash) {
                differ.push(outcome.seed);
            }
            Ok(true)
        })?;
    }
    print_counters(&totals);
    let missing = coverage::missing(&totals);
    println!(
        "sim: {ran} seeds ({from}..{}), {seconds:.0} s of virtual time in {:.0} s, {} failed",
        from + seeds,
        started.elapsed().as_secs_f64(),
        failed.len()
    );
    if repeat {
        println!("sim: {} of {ran} seeds did the same twice", ran - differ.len() as u64);
    }
    if !failed.is_empty() {
        failed.sort_unstable();
        println!("sim: failing seeds: {failed:?}");
    }
    let mut good = failed.is_empty() && differ.is_empty();
    if !missing.is_empty() {
        println!("sim: never happened: {missing:?}");
        good &= seeds < COVERS_ALL || world.is_some();
    }
    Ok(good)
}

/// Runs the seeds of worlds that have what a planted bug is in, until one finds it. True if one did.
pub fn hunt(mutant: Mutant, from: u64, seeds: u64) -> anyhow::Result<bool> {
    let mut found = None;
    let mut ran = 0;
    each(
        from,
        seeds,
        Some(mutant),
        |seed| mutant.is_in(seed),
        |outcome| {
            ran += 1;
            if outcome.violations.is_empty() {
                return Ok(true);
            }
            print_failure(&outcome, Some(mutant));
            found = Some(outcome.seed);
            Ok(false)
        },
    )?;
    match found {
        Some(seed) => println!("sim: {} found by seed {seed}, after {ran} seeds", mutant.name()),
        None => println!("sim: {} NOT found in {ran} of {seeds} seeds", mutant.name()),
    }
    Ok(found.is_some())
}

fn print_counters(counters: &BTreeMap<String, u64>) {
    let width = counters.keys().map(String::len).max().unwrap_or(0);
    for (what, n) in counters {
        println!("  {what:<width$} {n:>10}");
    }
}

/// What a replay ends with.
pub fn print_outcome(outcome: &Outcome) {
    print_counters(&outcome.counters);
    println!(
        "seed {} ({}): {:.1} s of virtual time, trace {:016x}, {} violations",
        outcome.seed,
        outcome.kind,
        outcome.virtual_seconds,
        outcome.hash,
        outcome.violations.len()
    );
    for violation in &outcome.violations {
        println!("  {}: {}", violation.property, violation.detail);
    }
}
