//! Work that runs to its end: so many successes, so many at once, with retries and a deadline.
//!
//! A job counts what its instances reported, in the transaction that takes the report in. So a success is kept when its host is
//! lost a moment later, and what had not ended when its host was lost runs again: at least once, not exactly once.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::app::validate_template_at;
use super::{Column, Home, Kind, Runtime, Scope, Template, Verbs};
use crate::{Condition, FieldError, Name, Timestamp};

#[derive(Debug, Clone)]
pub struct Job;

/// Successes that one job may want.
pub const MAX_COMPLETIONS: u32 = 10_000;
/// Instances of one job at once.
pub const MAX_PARALLELISM: u32 = 1_000;
/// Failed instances that one job may shrug off.
pub const MAX_BACKOFF: u32 = 100;
/// A year.
pub const MAX_DEADLINE: u32 = 31_536_000;
/// A finished job stays for thirty days at most.
pub const MAX_TTL: u32 = 2_592_000;
/// The ends that a job's status tells, the newest.
pub const ENDS_TOLD: usize = 10;

/// The variable that tells an instance of an indexed job which part is its own.
pub const INDEX_VARIABLE: &str = "NEXUS_JOB_INDEX";
/// The variable that tells an instance its job's name.
pub const JOB_VARIABLE: &str = "NEXUS_JOB_NAME";
/// The variable that tells an instance how many parts there are.
pub const COMPLETIONS_VARIABLE: &str = "NEXUS_JOB_COMPLETIONS";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct JobSpec {
    /// What each instance runs. A container; it is not started again when it ends.
    #[schemars(extend("properties" = {"runtime": {"const": "container"}}, "required" = ["image"]))]
    pub template: Template,
    /// So many instances have to end with exit code 0.
    #[schemars(range(min = 1, max = MAX_COMPLETIONS))]
    pub completions: u32,
    /// Instances at once. This much of the quota is taken until the job has finished.
    #[schemars(range(min = 1, max = MAX_PARALLELISM))]
    pub parallelism: u32,
    /// Each success is of a part of its own, numbered from 0; an instance finds its number in `NEXUS_JOB_INDEX`.
    pub indexed: bool,
    /// Failed instances are replaced, each after a longer pause, until more than so many have failed.
    #[schemars(range(max = MAX_BACKOFF))]
    pub backoff_limit: u32,
    /// The job fails when it has not finished after so long.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = MAX_DEADLINE))]
    pub active_deadline_seconds: Option<u32>,
    /// The job is deleted so long after it finished, with its instances' output.
    #[schemars(range(max = MAX_TTL))]
    pub ttl_seconds_after_finished: u32,
    /// Ends it: what runs is stopped, and the job has failed.
    pub cancelled: bool,
}

impl Default for JobSpec {
    fn default() -> Self {
        Self {
            template: Template::default(),
            completions: 1,
            parallelism: 1,
            indexed: false,
            backoff_limit: 3,
            active_deadline_seconds: None,
            ttl_seconds_after_finished: 86_400,
            cancelled: false,
        }
    }
}

impl JobSpec {
    /// Instances that may run at once: more than the work has parts are of no use.
    pub fn at_once(&self) -> u32 {
        self.parallelism.min(self.completions)
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum JobPhase {
    /// Nothing of it has run yet.
    #[default]
    Pending,
    Active,
    /// As many instances as were wanted have succeeded.
    Complete,
    /// It was given up; the condition `Complete` says why.
    Failed,
}

/// How one instance of a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobEnd {
    pub instance: Name,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Name>,
    /// Absent when it could not be started, or nobody saw how it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// In a sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    pub at: Timestamp,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct JobStatus {
    pub phase: JobPhase,
    /// The generation of the spec that this status speaks of.
    pub observed_generation: u64,
    /// Instances that have not ended.
    pub active: u32,
    pub succeeded: u32,
    pub failed: u32,
    /// Of an indexed job: the parts that are done, as `0-3,7`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub completed_indexes: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<Timestamp>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub finished: Option<Timestamp>,
    /// Before this, no instance is made in place of one that failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<Timestamp>,
    /// The newest ends, the oldest of them first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ends: Vec<JobEnd>,
    pub conditions: Vec<Condition>,
}

impl Kind for Job {
    const KIND: &'static str = "Job";
    const PLURAL: &'static str = "jobs";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str =
        "Work that runs to its end: how often, how much at once, and what happens when it fails.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Region;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("PHASE", "/status/phase"),
        Column::new("SUCCEEDED", "/status/succeeded"),
        Column::new("WANTED", "/spec/completions"),
        Column::new("ACTIVE", "/status/active"),
        Column::new("FAILED", "/status/failed"),
        Column::new("IMAGE", "/spec/template/image").wide(),
        Column::age("FINISHED", "/status/finished").wide(),
    ];
    const IMMUTABLE: &'static [&'static str] = &["template", "completions", "indexed"];
    type Spec = JobSpec;
    type Status = JobStatus;

    fn validate(spec: &JobSpec) -> Vec<FieldError> {
        validate_job("spec", spec)
    }

    fn example() -> JobSpec {
        let template = Template {
            image: "report".parse().expect("a well-formed name"),
            command: vec!["/bin/report".into(), "--yesterday".into()],
            ..Template::default()
        };
        JobSpec { template, completions: 5, parallelism: 2, indexed: true, ..JobSpec::default() }
    }
}

/// The errors of a job that stands at `field`: `spec`, or `spec.job`.
pub(super) fn validate_job(field: &str, spec: &JobSpec) -> Vec<FieldError> {
    let mut errors = validate_template_at(&format!("{field}.template"), &spec.template);
    let mut check = |ok: bool, name: &str, message: String| {
        if !ok {
            errors.push(FieldError::new(format!("{field}.{name}"), message));
        }
    };
    let container = spec.template.runtime == Runtime::Container;
    check(container, "template.runtime", "a function does not run to an end: use a container".into());
    let between = |low: u32, high: u32| format!("between {low} and {high}");
    check((1..=MAX_COMPLETIONS).contains(&spec.completions), "completions", between(1, MAX_COMPLETIONS));
    check((1..=MAX_PARALLELISM).contains(&spec.parallelism), "parallelism", between(1, MAX_PARALLELISM));
    check(spec.backoff_limit <= MAX_BACKOFF, "backoffLimit", format!("at most {MAX_BACKOFF}"));
    let deadline = spec.active_deadline_seconds.is_none_or(|d| (1..=MAX_DEADLINE).contains(&d));
    check(deadline, "activeDeadlineSeconds", between(1, MAX_DEADLINE));
    check(spec.ttl_seconds_after_finished <= MAX_TTL, "ttlSecondsAfterFinished", format!("at most {MAX_TTL}"));
    errors
}

/// A set of small numbers, written as `0-3,7`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IndexSet(Vec<(u32, u32)>);

impl IndexSet {
    /// Reads what [`IndexSet::fmt`] wrote; what is not so written is left out.
    pub fn parse(text: &str) -> Self {
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            Some((first.parse().ok()?, last.parse().ok()?))
        };
        Self(text.split(',').filter_map(range).collect())
    }

    pub fn contains(&self, index: u32) -> bool {
        self.0.iter().any(|(first, last)| (*first..=*last).contains(&index))
    }

    pub fn insert(&mut self, index: u32) {
        if self.contains(index) {
            return;
        }
        let at = self.0.partition_point(|(first, _)| *first < index);
        self.0.insert(at, (index, index));
        self.0.dedup_by(|next, before| {
            let meets = before.1.checked_add(1) == Some(next.0);
            if meets {
                before.1 = next.1;
            }
            meets
        });
    }
}

impl std::fmt::Display for IndexSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (i, (first, last)) in self.0.iter().enumerate() {
            let comma = if i > 0 { "," } else { "" };
            if first == last {
                write!(f, "{comma}{first}")?;
            } else {
                write!(f, "{comma}{first}-{last}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;

    #[test]
    fn a_set_of_indexes_is_written_as_ranges_in_whatever_order_they_come() {
        // Every third number first, so that ranges grow at both ends and meet.
        let order = (0..30).map(|i| (i * 7) % 30);
        let (mut set, mut all) = (IndexSet::default(), BTreeSet::new());
        for index in order {
            set.insert(index);
            set.insert(index);
            all.insert(index);
            set = IndexSet::parse(&set.to_string());
            assert_eq!((0..40).filter(|i| set.contains(*i)).collect::<BTreeSet<_>>(), all, "{set}");
        }
        assert_eq!(set.to_string(), "0-29");
        let mut few = IndexSet::default();
        [7, 0, 2, 1].into_iter().for_each(|i| few.insert(i));
        assert_eq!(few.to_string(), "0-2,7");
        assert_eq!(IndexSet::parse(""), IndexSet::default());
    }

    #[test]
    fn a_job_says_where_its_fault_is() {
        let parse = crate::kind::find("job").unwrap().parse_spec;
        let field = |spec| parse(&spec).unwrap_err()[0].field.clone();
        assert_eq!(field(json!({"template": {"image": "none"}})), "spec.template.image");
        assert_eq!(
            field(json!({"template": {"image": "a", "resources": {"cpu": "0"}}})),
            "spec.template.resources.cpu"
        );
        assert_eq!(field(json!({"template": {"image": "a", "runtime": "function"}})), "spec.template.runtime");
        assert_eq!(field(json!({"template": {"image": "a"}, "completions": 0})), "spec.completions");
        assert!(parse(&json!({"template": {"image": "a"}})).is_ok());
    }
}
