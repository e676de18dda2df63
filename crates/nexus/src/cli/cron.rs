//! `nexus cron`: jobs by the clock.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use nexus_model::kind::{self, Concurrency, CronJobSpec, JobSpec, KindDescriptor, Missed};
use nexus_model::kind::{MAX_HISTORY, MAX_STARTING_DEADLINE};
use nexus_model::schedule::Schedule;
use nexus_model::{Name, Timestamp};
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, text};
use super::job::{self, PatienceArgs, WorkArgs};
use super::output;
use super::resource::{self, new_name};
use crate::exit::Fail;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum MissedArg {
    Skip,
    Once,
    All,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ConcurrencyArg {
    Allow,
    Forbid,
    Replace,
}

/// Runs jobs by the clock
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus cron create report --schedule '30 3 * * MON-FRI' --time-zone Europe/Berlin --image tools --command /bin/report\n  \
    nexus cron create sync --schedule '*/5 * * * *' --concurrency forbid --missed skip --image tools\n  \
    nexus cron list\n  \
    nexus cron run report --wait    # now, whatever the clock shows\n  \
    nexus cron suspend report\n  \
    nexus cron resume report\n  \
    nexus describe cron report\n  \
    nexus delete cron report")]
pub struct CronArgs {
    #[command(subcommand)]
    command: CronCommand,
}

#[derive(Debug, Subcommand)]
enum CronCommand {
    /// Makes a cron job
    Create(Box<CreateArgs>),
    /// Lists the cron jobs
    List {
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Begins no runs until it is resumed; what runs goes on
    Suspend {
        #[arg(value_parser = new_name)]
        name: Name,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Begins runs again, from the next that is due
    Resume {
        #[arg(value_parser = new_name)]
        name: Name,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Makes a job of it now, beside those by the clock and in their history
    Run {
        #[arg(value_parser = new_name)]
        name: Name,
        #[command(flatten)]
        patience: PatienceArgs,
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    #[arg(value_parser = new_name)]
    name: Name,
    /// Minute, hour, day of the month, month and day of the week; or @hourly, @daily, @weekly, @monthly, @yearly
    #[arg(long, value_name = "EXPRESSION")]
    schedule: String,
    /// Whose clocks count: a name of the IANA time zone database
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    time_zone: String,
    /// Which of the runs are made up for that could not be begun in time
    #[arg(long, value_enum, default_value_t = MissedArg::Once)]
    missed: MissedArg,
    /// What could not be begun for so many seconds is never begun
    #[arg(long, value_name = "SECONDS", default_value_t = 3_600, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_STARTING_DEADLINE)))]
    starting_deadline: u32,
    /// What happens when a run is due while an earlier one goes on
    #[arg(long, value_enum, default_value_t = ConcurrencyArg::Allow)]
    concurrency: ConcurrencyArg,
    /// Finished jobs that are kept, of complete and of failed ones each
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(..=i64::from(MAX_HISTORY)))]
    history: u32,
    #[command(flatten)]
    work: WorkArgs,
    #[command(flatten)]
    cloud: CloudArgs,
}

fn crons() -> &'static KindDescriptor {
    kind::find("cron-jobs").expect("a kind")
}

fn title(name: &Name) -> String {
    resource::title(crons(), name.as_str())
}

pub async fn run(args: &CronArgs) -> anyhow::Result<()> {
    match &args.command {
        CronCommand::Create(args) => create(args).await,
        CronCommand::List { cloud } => job::list(&Cloud::connect(cloud)?, crons()).await,
        CronCommand::Suspend { name, cloud } => set(cloud, name, true).await,
        CronCommand::Resume { name, cloud } => set(cloud, name, false).await,
        CronCommand::Run { name, patience, cloud } => {
            let cloud = Cloud::connect(cloud)?;
            run_now(&cloud, name, patience.patience()).await
        }
    }
}

async fn create(args: &CreateArgs) -> anyhow::Result<()> {
    let schedule = Schedule::new(&args.schedule, &args.time_zone).map_err(|e| {
        Fail::usage(format!("{}: {e}", if e.field() == "timeZone" { "--time-zone" } else { "--schedule" }))
    })?;
    let cloud = Cloud::connect(&args.cloud)?;
    let spec = CronJobSpec {
        schedule: args.schedule.clone(),
        time_zone: args.time_zone.clone(),
        missed: match args.missed {
            MissedArg::Skip => Missed::Skip,
            MissedArg::Once => Missed::Once,
            MissedArg::All => Missed::All,
        },
        starting_deadline_seconds: args.starting_deadline,
        concurrency: match args.concurrency {
            ConcurrencyArg::Allow => Concurrency::Allow,
            ConcurrencyArg::Forbid => Concurrency::Forbid,
            ConcurrencyArg::Replace => Concurrency::Replace,
        },
        suspend: false,
        successful_history: args.history,
        failed_history: args.history,
        job: args.work.spec(&cloud, &args.name).await?,
    };
    job::make(&cloud, crons(), &args.name, &job::object::<kind::CronJob>(&args.name, &spec)).await?;
    output::text(&format!("{} created{}", title(&args.name), due(schedule.next(cloud.now()))))
}

fn due(next: Option<Timestamp>) -> String {
    next.map(|at| format!(", next due at {at}")).unwrap_or_default()
}

async fn set(cloud: &CloudArgs, name: &Name, suspend: bool) -> anyhow::Result<()> {
    let cloud = Cloud::connect(cloud)?;
    let path = cloud.object(crons(), name);
    let cron: Value = cloud.client.patch(&path, &json!({"spec": {"suspend": suspend}})).await?;
    if suspend {
        return output::text(&format!("{} suspended", title(name)));
    }
    let schedule = Schedule::new(text(&cron, "/spec/schedule"), text(&cron, "/spec/timeZone")).ok();
    output::text(&format!("{} resumed{}", title(name), due(schedule.and_then(|s| s.next(cloud.now())))))
}

async fn run_now(cloud: &Cloud, name: &Name, wait: Option<Duration>) -> anyhow::Result<()> {
    let cron = cloud.get(crons(), name).await?;
    let spec: JobSpec = serde_json::from_value(cron["spec"]["job"].clone())?;
    let stem: String = name.as_str().chars().take(40).collect();
    // Beside the minutes that runs by the clock are named after, so that it is none of theirs.
    let number = cloud.now().as_millis();
    let run: Name = format!("{}-now-{number}", stem.trim_end_matches('-')).parse()?;
    let mut object = job::object::<kind::Job>(&run, &spec);
    object["metadata"]["annotations"] = json!({"run-of": name});
    let made = job::make(cloud, job::jobs(), &run, &object).await?;
    output::text(&format!("{} created", resource::title(job::jobs(), run.as_str())))?;
    match wait {
        Some(timeout) => job::wait(cloud, made, timeout).await,
        None => Ok(()),
    }
}
