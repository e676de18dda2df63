//! `nexus autoscale`: has the cloud choose how many instances an app has, shows what it chose and why, and shows what each strategy
//! would have done.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use nexus_control::autoscale::backtest::{Outcome, Trace, run as replay};
use nexus_control::autoscale::decide::Rule;
use nexus_control::autoscale::history::{DAY_SLOTS, Measure, SLOT_SECONDS};
use nexus_model::kind::{
    self, App, AppSpec, Autoscale, KindDescriptor, ScaleStrategy, ScaleTarget, ScaleWindow, Weekday,
};
use nexus_model::{Name, Object};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::cloud::{Cloud, CloudArgs, text};
use super::output::{self, Format, plain};
use super::resource;
use super::table::{Printer, age_of};
use super::{describe, events};
use crate::exit::Fail;

/// Has the cloud choose how many instances an app has
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus autoscale set web --max 20 --cpu 65\n  \
    nexus autoscale set web --strategy predictive --requests 200\n  \
    nexus autoscale set hello --min 0 --idle 60            # to nothing, and back for the first request\n  \
    nexus autoscale set shop --window mon-fri/08:00-18:00@Europe/Berlin=6\n  \
    nexus autoscale status web\n  \
    nexus autoscale backtest web\n  \
    nexus autoscale backtest web --series load.csv --column cpu_util_percent --carries 65\n  \
    nexus autoscale set web --off")]
pub struct AutoscaleArgs {
    #[command(subcommand)]
    command: AutoscaleCommand,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum StrategyArg {
    Target,
    Schedule,
    Predictive,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum MeasureArg {
    Cpu,
    Requests,
    Concurrency,
}

impl From<MeasureArg> for Measure {
    fn from(arg: MeasureArg) -> Self {
        match arg {
            MeasureArg::Cpu => Self::Cpu,
            MeasureArg::Requests => Self::Requests,
            MeasureArg::Concurrency => Self::Concurrency,
        }
    }
}

#[derive(Debug, Subcommand)]
enum AutoscaleCommand {
    /// Changes how an app is scaled; what is not named stays
    Set(Box<SetArgs>),
    /// Shows how many instances there are, why, and the last decisions
    Status {
        /// The app
        #[arg(value_parser = resource::new_name)]
        app: Name,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Shows what each strategy would have done on the app's history, or on a series from a file
    Backtest(Box<BacktestArgs>),
}

#[derive(Debug, Args)]
struct SetArgs {
    /// The app
    #[arg(value_parser = resource::new_name)]
    app: Name,
    /// By what the number is chosen
    #[arg(long, value_enum)]
    strategy: Option<StrategyArg>,
    /// The fewest instances; with 0 the app sleeps while nobody asks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=10_000))]
    min: Option<u32>,
    /// The most instances, for which the project's quota is charged
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    max: Option<u32>,
    /// Per cent of its processor that an instance is to use
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    cpu: Option<u32>,
    /// Requests a second that an instance is to carry
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: Option<u32>,
    /// Requests at once that an instance is to carry
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    concurrency: Option<u32>,
    /// A time of the week with at least N instances; several times for several, in place of those that there are
    #[arg(long = "window", value_name = "[DAYS/]HH:MM-HH:MM[@ZONE]=N", value_parser = window)]
    windows: Vec<ScaleWindow>,
    /// With --min 0: the last instance goes when nobody has asked for so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    idle: Option<u32>,
    /// As many instances stay as were wanted at any moment of the last so many seconds
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(..=3600))]
    stabilization: Option<u32>,
    /// How many minutes ahead `predictive` looks
    #[arg(long, value_name = "MINUTES", value_parser = clap::value_parser!(u32).range(1..=120))]
    horizon: Option<u32>,
    /// The app keeps the instances that it has, and is not scaled any more
    #[arg(long, conflicts_with_all = ["strategy", "min", "max", "cpu", "requests", "concurrency", "windows", "idle", "stabilization", "horizon"])]
    off: bool,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Args)]
struct BacktestArgs {
    /// The app
    #[arg(value_parser = resource::new_name)]
    app: Name,
    /// A CSV of loads in place of the app's history, one row for each step of time
    #[arg(long, value_name = "FILE")]
    series: Option<PathBuf>,
    /// The column of the CSV, by its title or number [default: the first]
    #[arg(long, requires = "series")]
    column: Option<String>,
    /// The time between two rows
    #[arg(long, value_name = "SECONDS", requires = "series", default_value_t = SLOT_SECONDS,
          value_parser = clap::value_parser!(u64).range(1..=86_400))]
    step: u64,
    /// What one instance is to carry, in the unit of the series [default: as the app's target says]
    #[arg(long, value_name = "LOAD", requires = "series")]
    carries: Option<f64>,
    /// By what load is measured [default: what the app's target names first]
    #[arg(long, value_enum)]
    measure: Option<MeasureArg>,
    /// Minutes from a decision until its instances are ready
    #[arg(long, value_name = "MINUTES", default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=60))]
    start: u32,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(flatten)]
    cloud: CloudArgs,
}

fn apps() -> &'static KindDescriptor {
    kind::find("app").expect("a kind")
}

const DAYS: [(&str, Weekday); 7] = [
    ("mon", Weekday::Mon),
    ("tue", Weekday::Tue),
    ("wed", Weekday::Wed),
    ("thu", Weekday::Thu),
    ("fri", Weekday::Fri),
    ("sat", Weekday::Sat),
    ("sun", Weekday::Sun),
];

/// `mon-fri`, `sat`, `mon,wed`.
fn days(text: &str) -> Result<Vec<Weekday>, String> {
    let number = |word: &str| {
        let found = DAYS.iter().position(|(name, _)| *name == word);
        found.ok_or_else(|| format!("{word:?} is no day: mon, tue, wed, thu, fri, sat or sun"))
    };
    let mut out = Vec::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        let (from, to) = (number(from)?, number(to)?);
        // A span may go over the end of the week.
        let count = (to + 7 - from) % 7 + 1;
        out.extend((0..count).map(|i| DAYS[(from + i) % 7].1));
    }
    out.dedup();
    if out.len() > 7 { Err("a day is named twice".into()) } else { Ok(out) }
}

/// `mon-fri/08:00-18:00@Europe/Berlin=6`.
fn window(text: &str) -> Result<ScaleWindow, String> {
    let (rest, count) = text.rsplit_once('=').ok_or("say how many, as 08:00-18:00=6")?;
    let min_replicas = count.parse().map_err(|_| format!("{count:?} is no number of instances"))?;
    let (rest, time_zone) = rest.split_once('@').unwrap_or((rest, "UTC"));
    let (of_days, times) = rest.split_once('/').map_or((None, rest), |(d, t)| (Some(d), t));
    let days = of_days.map(days).transpose()?.unwrap_or_default();
    let (start, end) = times.split_once('-').ok_or("write the times as 08:00-18:00")?;
    let window = ScaleWindow { days, start: start.into(), end: end.into(), time_zone: time_zone.into(), min_replicas };
    if window.minutes().is_none() {
        return Err(format!("{times:?}: write the times as 08:00-18:00"));
    }
    if window.zone().is_none() {
        return Err(format!("{time_zone:?} is no time zone of the IANA database, such as Europe/Berlin"));
    }
    Ok(window)
}

fn value<T: serde::Serialize>(part: &T) -> Value {
    serde_json::to_value(part).expect("parts of specs are plain data")
}

/// The merge patch of `spec.autoscale` that the flags ask for.
fn patch(args: &SetArgs) -> Map<String, Value> {
    let mut autoscale = Map::new();
    if let Some(strategy) = args.strategy {
        let strategy = match strategy {
            StrategyArg::Target => ScaleStrategy::Target,
            StrategyArg::Schedule => ScaleStrategy::Schedule,
            StrategyArg::Predictive => ScaleStrategy::Predictive,
        };
        autoscale.insert("strategy".into(), value(&strategy));
    }
    let numbers = [
        ("minReplicas", args.min),
        ("maxReplicas", args.max),
        ("idleSeconds", args.idle),
        ("horizonMinutes", args.horizon),
    ];
    autoscale.extend(numbers.into_iter().filter_map(|(key, n)| Some((key.to_owned(), n?.into()))));
    let targets = [("cpuPercent", args.cpu), ("requestsPerSecond", args.requests), ("concurrency", args.concurrency)];
    if targets.iter().any(|(_, n)| n.is_some()) {
        // Targets are named together: what is left out is none any more.
        let all = targets.into_iter().map(|(key, n)| (key.to_owned(), n.map_or(Value::Null, Value::from)));
        autoscale.insert("target".into(), Value::Object(all.collect()));
    }
    if !args.windows.is_empty() {
        autoscale.insert("schedule".into(), value(&args.windows));
    }
    if let Some(seconds) = args.stabilization {
        autoscale.insert("scaleIn".into(), json!({"stabilizationSeconds": seconds}));
    }
    autoscale
}

fn app_of(object: &Value) -> anyhow::Result<Object<App>> {
    let bytes = serde_json::to_vec(object)?;
    Object::from_slice(&bytes).context("the app can't be read: this program is older than the cloud")
}

/// `target, 1 to 20 instances, at 65 per cent of a processor`.
fn summary(spec: &AppSpec) -> String {
    let Some(a) = &spec.autoscale else { return "not scaled by the cloud".into() };
    let strategy = value(&a.strategy);
    let ScaleTarget { cpu_percent, requests_per_second, concurrency } = a.targets(&spec.template());
    let mut parts =
        vec![format!("{}, {} to {} instances", strategy.as_str().unwrap_or_default(), a.min_replicas, a.max_replicas)];
    if a.strategy != ScaleStrategy::Schedule {
        parts.extend(cpu_percent.map(|n| format!("{n} % of its processor each")));
        parts.extend(requests_per_second.map(|n| format!("{n} requests a second each")));
        parts.extend(concurrency.map(|n| format!("{n} requests at once each")));
    }
    if !a.schedule.is_empty() {
        parts.push(format!("{} windows", a.schedule.len()));
    }
    parts.join(", ")
}

async fn set(args: &SetArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let path = cloud.object(apps(), &args.app);
    let title = resource::title(apps(), args.app.as_str());
    if args.off {
        let before = app_of(&cloud.get(apps(), &args.app).await?)?;
        let replicas = before.spec.wanted_replicas(&before.status);
        let off = json!({"spec": {"autoscale": null, "replicas": replicas}});
        let _: Value = cloud.client.patch(&path, &off).await?;
        return output::text(&format!("{title} keeps {replicas} instances and is not scaled any more"));
    }
    let autoscale = patch(args);
    let object: Value = cloud.client.patch(&path, &json!({"spec": {"autoscale": autoscale}})).await?;
    output::text(&format!("{title}: {}", summary(&app_of(&object)?.spec)))
}

/// Decisions that are shown.
const SHOWN: usize = 10;
const DECISIONS: [&str; 4] = ["ScaledOut", "ScaledIn", "Woken", "ScaledToZero"];

async fn status(name: &Name, format: Format, cloud: &CloudArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(cloud)?;
    let object = cloud.get(apps(), name).await?;
    let mut told = describe::events_of(&cloud, apps(), &object).await?;
    told.retain(|e| DECISIONS.contains(&text(e, "/spec/reason")));
    events::sort(&mut told);
    let told = &told[told.len().saturating_sub(SHOWN)..];
    let app = app_of(&object)?;
    match format {
        Format::Json | Format::Yaml => {
            let all = json!({
                "app": name, "autoscale": app.spec.autoscale, "desiredReplicas": app.status.desired_replicas,
                "readyReplicas": app.status.ready_replicas, "decision": app.status.autoscale,
                "decisions": told.iter().map(|e| &e["spec"]).collect::<Vec<_>>(),
            });
            return if format == Format::Json { output::json(&all) } else { output::yaml(&all) };
        }
        Format::Name => return output::text(&resource::title(apps(), name.as_str())),
        Format::Table | Format::Wide => {}
    }
    output::text(&format!("{}: {}", resource::title(apps(), name.as_str()), summary(&app.spec)))?;
    let why = app.status.autoscale.as_ref().map_or("", |s| s.reason.as_str());
    let why = if why.is_empty() { String::new() } else { format!(": {}", plain(why)) };
    output::text(&format!("{} wanted, {} ready{why}", app.status.desired_replicas, app.status.ready_replicas))?;
    if told.is_empty() {
        return Ok(());
    }
    let now = cloud.now();
    let row = |e: &Value| {
        vec![age_of(&e["spec"]["last"], now), plain(text(e, "/spec/reason")), plain(text(e, "/spec/message"))]
    };
    output::text(&Printer::new(&["LAST", "DECISION", "WHY"]).lines(told.iter().map(row).collect()))
}

/// What the API answers to `:load`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Load {
    begins: u64,
    measures: std::collections::BTreeMap<String, Vec<Option<f64>>>,
}

/// A column of numbers. A first row that is no number is a title.
fn column(content: &str, wanted: Option<&str>) -> Result<Vec<f64>, String> {
    let mut lines = content.lines().filter(|l| !l.trim().is_empty()).peekable();
    let cells = |line: &str| line.split(',').map(|c| c.trim().trim_matches('"').to_owned()).collect::<Vec<_>>();
    let first = cells(lines.peek().ok_or("it is empty")?);
    let titled = first.iter().any(|c| c.parse::<f64>().is_err());
    let index = match wanted {
        None => 0,
        Some(word) => match first.iter().position(|c| titled && c == word) {
            Some(index) => index,
            None => word
                .parse::<usize>()
                .ok()
                .filter(|n| (1..=first.len()).contains(n))
                .map(|n| n - 1)
                .ok_or_else(|| format!("there is no column {word:?}; there are: {}", first.join(", ")))?,
        },
    };
    let numbers = lines.enumerate().skip(usize::from(titled)).map(|(i, line)| {
        let cell = cells(line).get(index).cloned().unwrap_or_default();
        let number = cell.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0);
        number.ok_or_else(|| format!("line {}: {cell:?} is no load", i + 1))
    });
    numbers.collect()
}

/// Means of slots from rows of any distance.
fn slots(rows: &[f64], step: u64) -> Vec<f64> {
    let count = (rows.len() as u64 * step).div_ceil(SLOT_SECONDS);
    let slot = |n: u64| {
        let first = (n * SLOT_SECONDS / step) as usize;
        let last = (((n + 1) * SLOT_SECONDS).div_ceil(step) as usize).clamp(first + 1, rows.len().max(first + 1));
        let of = &rows[first.min(rows.len() - 1)..last.min(rows.len())];
        of.iter().sum::<f64>() / of.len().max(1) as f64
    };
    if rows.is_empty() { Vec::new() } else { (0..count).map(slot).collect() }
}

/// The measure that the app's target names, or the one that was asked for.
fn measure_of(rule: &Rule, asked: Option<MeasureArg>) -> anyhow::Result<Measure> {
    let named = Measure::ALL.into_iter().find(|m| rule.carries[m.index()].is_some());
    let measure = asked.map(Measure::from).or(named).unwrap_or(Measure::Cpu);
    Ok(measure)
}

fn rows_of(outcomes: &[(&str, Outcome)]) -> Vec<Vec<String>> {
    let percent = |part: u64, whole: u64| format!("{:.1} %", part as f64 * 100.0 / whole.max(1) as f64);
    outcomes
        .iter()
        .map(|(name, o)| {
            vec![
                (*name).to_owned(),
                o.under_minutes.to_string(),
                percent(o.under_minutes, o.minutes),
                format!("{:.1}", o.instance_minutes as f64 / 60.0),
                o.peak.to_string(),
                o.changes.to_string(),
                o.forecast_error.map_or("-".into(), |e| format!("{:.1} %", e * 100.0)),
            ]
        })
        .collect()
}

fn file(path: &Path, args: &BacktestArgs) -> anyhow::Result<Vec<f64>> {
    let content = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let rows = column(&content, args.column.as_deref());
    let rows = rows.map_err(|why| Fail::usage(format!("{}: {why}", path.display())))?;
    Ok(slots(&rows, args.step))
}

async fn backtest(args: &BacktestArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let app = app_of(&cloud.get(apps(), &args.app).await?)?;
    let autoscale = app.spec.autoscale.clone().unwrap_or_default();
    let template = app.spec.template();
    let mut rule = Rule::new(&autoscale, &template);
    let measure = measure_of(&rule, args.measure)?;
    let (begins, loads) = match &args.series {
        Some(path) => (0, file(path, args)?),
        None => {
            let path = format!("{}:load", cloud.object(apps(), &args.app));
            let load: Load = cloud.client.get(&path).await?;
            let word = value(&measure);
            let known = load.measures.get(word.as_str().unwrap_or_default()).cloned().unwrap_or_default();
            let mut last = known.iter().flatten().next().copied().unwrap_or(0.0);
            let filled = known.into_iter().map(|v| {
                last = v.unwrap_or(last);
                last
            });
            (load.begins, filled.collect())
        }
    };
    if let Some(carries) = args.carries {
        if !(carries.is_finite() && carries > 0.0) {
            return Err(Fail::usage("--carries: a number above 0").into());
        }
        rule.carries[measure.index()] = Some(carries);
    }
    if rule.carries[measure.index()].is_none() {
        let word = value(&measure);
        let what = word.as_str().unwrap_or_default();
        return Err(Fail::usage(format!("the app has no target for {what}: give one with --carries, or set it")).into());
    }
    if loads.len() < 3 {
        return Err(Fail::not_found(
            "nothing is known of the app's load yet: history comes in slots of five minutes and is written every quarter \
             of an hour, from when the app is scaled by the cloud. Try a file with --series",
        )
        .into());
    }
    // What a strategy knows at the beginning is not what it does wrong.
    let skip = (2 * DAY_SLOTS).min(loads.len() / 2);
    let start_minutes = usize::try_from(args.start).unwrap_or(1);
    let trace = Trace { loads: &loads, measure, begins, skip, start_minutes, judged: None };
    let with = |strategy| Rule { autoscale: Autoscale { strategy, ..autoscale.clone() }, carries: rule.carries };
    let mut outcomes = vec![
        ("target", replay(&with(ScaleStrategy::Target), &trace)),
        ("predictive", replay(&with(ScaleStrategy::Predictive), &trace)),
    ];
    if !autoscale.schedule.is_empty() {
        outcomes.push(("schedule", replay(&with(ScaleStrategy::Schedule), &trace)));
    }
    match args.output {
        Format::Json | Format::Yaml => {
            let all: Map<String, Value> = outcomes.iter().map(|(name, o)| ((*name).to_owned(), value(o))).collect();
            if args.output == Format::Json { output::json(&all) } else { output::yaml(&all) }
        }
        _ => {
            let minutes = outcomes[0].1.minutes;
            output::text(&format!("{minutes} minutes; before them {} were learnt from", skip * 5))?;
            let titles = [
                "STRATEGY",
                "UNDER-PROVISIONED MINUTES",
                "SHARE",
                "INSTANCE-HOURS",
                "PEAK",
                "CHANGES",
                "FORECAST ERROR",
            ];
            output::text(&Printer::new(&titles).lines(rows_of(&outcomes)))
        }
    }
}

pub async fn run(args: &AutoscaleArgs) -> anyhow::Result<()> {
    match &args.command {
        AutoscaleCommand::Set(args) => set(args).await,
        AutoscaleCommand::Status { app, output, cloud } => status(app, *output, cloud).await,
        AutoscaleCommand::Backtest(args) => backtest(args).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_days_times_zone_and_number() {
        let w = window("mon-fri/08:00-18:00@Europe/Berlin=6").unwrap();
        assert_eq!(
            (w.days.len(), w.start.as_str(), w.time_zone.as_str(), w.min_replicas),
            (5, "08:00", "Europe/Berlin", 6)
        );
        let w = window("22:00-02:00=3").unwrap();
        assert_eq!((w.days.len(), w.time_zone.as_str()), (0, "UTC"));
        assert_eq!(days("sat-mon").unwrap(), [Weekday::Sat, Weekday::Sun, Weekday::Mon]);
        for wrong in ["08:00-18:00", "8-18=2", "xyz/08:00-18:00=2", "08:00-18:00@Mars=2", "08:00-18:00=x"] {
            assert!(window(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_series_is_a_column_by_title_or_number_in_slots() {
        let content = "cpu,net\n10,1\n20,2\n30,3\n";
        assert_eq!(column(content, None).unwrap(), [10.0, 20.0, 30.0]);
        assert_eq!(column(content, Some("net")).unwrap(), [1.0, 2.0, 3.0]);
        assert_eq!(column("1\n2\n", Some("1")).unwrap(), [1.0, 2.0]);
        assert!(column(content, Some("disk")).unwrap_err().contains("cpu, net"));
        assert!(column("1\nx\n", None).unwrap_err().contains("line 2"));
        assert_eq!(slots(&[1.0, 3.0, 5.0, 7.0], 150), [2.0, 6.0]);
        assert_eq!(slots(&[1.0, 2.0], 600), [1.0, 1.0, 2.0, 2.0]);
    }
}
