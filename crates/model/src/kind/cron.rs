//! Jobs by the clock: a cron expression in a time zone, and what to do about runs that were missed or overlap.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::job::validate_job;
use super::{Column, Home, Job, JobSpec, Kind, Scope, Verbs};
use crate::schedule::{SCHEDULE_PATTERN, Schedule, ZONE_PATTERN};
use crate::{Condition, FieldError, Name, Timestamp};

#[derive(Debug, Clone)]
pub struct CronJob;

/// A week: a run that is later is never made up for.
pub const MAX_STARTING_DEADLINE: u32 = 604_800;
/// Finished jobs of each kind that are kept at most.
pub const MAX_HISTORY: u32 = 100;
/// Missed runs that are made up for at once, the newest.
pub const CATCH_UP: usize = 10;

/// What happens to runs whose time passed while nobody could begin them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Missed {
    Skip,
    /// The newest is made up for, the others are not.
    #[default]
    Once,
    /// The newest ten are made up for, the oldest of them first.
    All,
}

/// What happens when a run is due while an earlier one has not finished.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Concurrency {
    #[default]
    Allow,
    /// It is not begun; when the earlier one has finished, it counts as missed.
    Forbid,
    /// The earlier one is ended.
    Replace,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CronJobSpec {
    /// Five fields: minute, hour, day of the month, month, day of the week; or `@hourly`, `@daily`, `@weekly`, `@monthly`,
    /// `@yearly`.
    #[schemars(length(min = 1, max = 100), regex(pattern = SCHEDULE_PATTERN))]
    pub schedule: String,
    /// A name of the IANA time zone database, such as `Europe/Berlin`.
    #[schemars(length(min = 1, max = 64), regex(pattern = ZONE_PATTERN))]
    pub time_zone: String,
    pub missed: Missed,
    /// What could not be begun for so long is never begun.
    #[schemars(range(min = 1, max = MAX_STARTING_DEADLINE))]
    pub starting_deadline_seconds: u32,
    pub concurrency: Concurrency,
    /// No run is begun. What would have run meanwhile is not made up for.
    pub suspend: bool,
    /// Complete jobs that are kept.
    #[schemars(range(max = MAX_HISTORY))]
    pub successful_history: u32,
    /// Failed jobs that are kept.
    #[schemars(range(max = MAX_HISTORY))]
    pub failed_history: u32,
    /// What each run does.
    #[schemars(extend("properties" = {"cancelled": {"const": false}}, "required" = ["template"]))]
    pub job: JobSpec,
}

impl Default for CronJobSpec {
    fn default() -> Self {
        Self {
            schedule: String::new(),
            time_zone: "UTC".into(),
            missed: Missed::default(),
            starting_deadline_seconds: 3_600,
            concurrency: Concurrency::default(),
            suspend: false,
            successful_history: 3,
            failed_history: 3,
            job: JobSpec::default(),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CronJobStatus {
    pub observed_generation: u64,
    /// When the next run is due.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_run: Option<Timestamp>,
    /// For when the newest run was due.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_run: Option<Timestamp>,
    /// When a run was last complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_success: Option<Timestamp>,
    /// About every run that was due until then it is decided whether it is begun.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decided: Option<Timestamp>,
    /// Runs that were due and not begun.
    pub missed: u64,
    /// The jobs that have not finished.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub active: Vec<Name>,
    pub conditions: Vec<Condition>,
}

impl Kind for CronJob {
    const KIND: &'static str = "CronJob";
    const PLURAL: &'static str = "cron-jobs";
    const SHORT: &'static [&'static str] = &["cron", "crons"];
    const ABOUT: &'static str = "Runs a job by the clock: a cron expression in a time zone.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("SCHEDULE", "/spec/schedule"),
        Column::new("ZONE", "/spec/timeZone"),
        Column::new("SUSPENDED", "/spec/suspend"),
        Column::count("ACTIVE", "/status/active"),
        Column::age("LAST", "/status/lastRun"),
        Column::new("NEXT", "/status/nextRun"),
        Column::age("SUCCESS", "/status/lastSuccess").wide(),
        Column::new("MISSED", "/status/missed").wide(),
    ];
    type Spec = CronJobSpec;
    type Status = CronJobStatus;

    fn validate(spec: &CronJobSpec) -> Vec<FieldError> {
        let mut errors = validate_job("spec.job", &spec.job);
        if let Err(e) = Schedule::new(&spec.schedule, &spec.time_zone) {
            errors.push(FieldError::new(format!("spec.{}", e.field()), e.to_string()));
        }
        if !(1..=MAX_STARTING_DEADLINE).contains(&spec.starting_deadline_seconds) {
            let message = format!("between 1 and {MAX_STARTING_DEADLINE}");
            errors.push(FieldError::new("spec.startingDeadlineSeconds", message));
        }
        for (name, kept) in [("successfulHistory", spec.successful_history), ("failedHistory", spec.failed_history)] {
            if kept > MAX_HISTORY {
                errors.push(FieldError::new(format!("spec.{name}"), format!("at most {MAX_HISTORY}")));
            }
        }
        if spec.job.cancelled {
            errors.push(FieldError::new("spec.job.cancelled", "every run would fail at once: use spec.suspend"));
        }
        errors
    }

    fn example() -> CronJobSpec {
        let schedule = "0 3 * * *".into();
        CronJobSpec { schedule, time_zone: "Europe/Berlin".into(), job: Job::example(), ..CronJobSpec::default() }
    }
}
