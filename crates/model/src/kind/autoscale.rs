//! How many instances an app has, when the cloud is to decide that: bounds, what an instance is to carry, and when.

use jiff::tz::{TimeZone, TimeZoneDatabase};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Runtime, Template};
use crate::FieldError;

/// By what the number of instances is chosen. Windows of `schedule` hold whatever the strategy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScaleStrategy {
    /// What the load of the last seconds needs.
    #[default]
    Target,
    /// The windows of `schedule` alone; `minReplicas` outside of them.
    Schedule,
    /// What the load of the next minutes will need, by a forecast from the app's history, and never less than `target` would do.
    Predictive,
}

/// What one instance is to carry. With several, the one that wants most instances decides.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ScaleTarget {
    /// Per cent of the processor that an instance has (`resources.cpu`). Of containers alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub cpu_percent: Option<u32>,
    /// Requests that end within a second.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub requests_per_second: Option<u32>,
    /// Requests at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000))]
    pub concurrency: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Weekday {
    Mon,
    Tue,
    Wed,
    Thu,
    Fri,
    Sat,
    Sun,
}

/// A time of the week in which there are at least so many instances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScaleWindow {
    /// The days on which it begins; every day, without any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 7))]
    pub days: Vec<Weekday>,
    /// When it begins, as 08:30.
    #[schemars(regex(pattern = CLOCK_PATTERN))]
    pub start: String,
    /// When it ends; one that is not after the start is of the next day.
    #[schemars(regex(pattern = CLOCK_PATTERN))]
    pub end: String,
    /// A name of the IANA time zone database, such as Europe/Berlin.
    #[serde(default = "utc")]
    #[schemars(length(min = 1, max = 64), regex(pattern = ZONE_PATTERN))]
    pub time_zone: String,
    #[schemars(range(max = 10_000))]
    pub min_replicas: u32,
}

const CLOCK_PATTERN: &str = "^([01][0-9]|2[0-3]):[0-5][0-9]$";
const ZONE_PATTERN: &str = "^[A-Za-z0-9_+/-]{1,64}$";

fn utc() -> String {
    "UTC".into()
}

/// How fast instances may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ScaleOut {
    /// Between two steps.
    #[schemars(range(max = 3600))]
    pub cooldown_seconds: u32,
    /// A step adds at most so many per cent of the instances that there are, and may always add four.
    #[schemars(range(min = 1, max = 1000))]
    pub step_percent: u32,
}

impl Default for ScaleOut {
    fn default() -> Self {
        Self { cooldown_seconds: 3, step_percent: 100 }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ScaleIn {
    /// As many instances stay as were wanted at any moment of the last so many seconds.
    #[schemars(range(max = 3600))]
    pub stabilization_seconds: u32,
    /// Between two steps.
    #[schemars(range(max = 3600))]
    pub cooldown_seconds: u32,
    /// A step takes at most so many per cent of the instances that there are, and may always take one.
    #[schemars(range(min = 1, max = 100))]
    pub step_percent: u32,
}

impl Default for ScaleIn {
    fn default() -> Self {
        Self { stabilization_seconds: 300, cooldown_seconds: 15, step_percent: 50 }
    }
}

/// Has the cloud choose how many instances there are, between two bounds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Autoscale {
    pub strategy: ScaleStrategy,
    /// With 0, an app that nobody asks for has no instance; the first request waits until one is ready.
    #[schemars(range(max = 10_000))]
    pub min_replicas: u32,
    /// What the app is charged for in its project's quota, from the beginning.
    #[schemars(range(min = 1, max = 10_000))]
    pub max_replicas: u32,
    /// Without any, 65 per cent of the processor for containers, and half of `function.concurrency` for functions.
    pub target: ScaleTarget,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_WINDOWS))]
    pub schedule: Vec<ScaleWindow>,
    /// How far `predictive` looks ahead: at least as long as an instance takes until it is ready.
    #[schemars(range(min = 1, max = 120))]
    pub horizon_minutes: u32,
    /// With `minReplicas` 0: the last instance goes when nobody has asked for so many seconds.
    #[schemars(range(min = 1, max = 86_400))]
    pub idle_seconds: u32,
    pub scale_out: ScaleOut,
    pub scale_in: ScaleIn,
}

/// Windows of one app.
const MAX_WINDOWS: usize = 32;

impl Default for Autoscale {
    fn default() -> Self {
        Self {
            strategy: ScaleStrategy::default(),
            min_replicas: 1,
            max_replicas: 10,
            target: ScaleTarget::default(),
            schedule: Vec::new(),
            horizon_minutes: 10,
            idle_seconds: 300,
            scale_out: ScaleOut::default(),
            scale_in: ScaleIn::default(),
        }
    }
}

/// What a container without a target is to carry: leaves room for what comes while another starts.
pub const DEFAULT_CPU_PERCENT: u32 = 65;

impl Autoscale {
    /// What one instance is to carry, with the default for an app that does not say.
    pub fn targets(&self, template: &Template) -> ScaleTarget {
        if self.target != ScaleTarget::default() {
            return self.target;
        }
        match template.runtime {
            Runtime::Container => ScaleTarget { cpu_percent: Some(DEFAULT_CPU_PERCENT), ..ScaleTarget::default() },
            Runtime::Function => {
                let half = template.function.concurrency.div_ceil(2);
                ScaleTarget { concurrency: Some(half), ..ScaleTarget::default() }
            }
        }
    }

    /// Within the bounds. Bounds that contradict each other are refused when they are written.
    pub fn clamp(&self, replicas: u32) -> u32 {
        replicas.min(self.max_replicas).max(self.min_replicas.min(self.max_replicas))
    }
}

impl ScaleWindow {
    /// The time zone, if there is one of that name.
    pub fn zone(&self) -> Option<TimeZone> {
        TimeZoneDatabase::bundled().get(&self.time_zone).ok()
    }

    /// The minutes of the day at which it begins and ends.
    pub fn minutes(&self) -> Option<(u32, u32)> {
        let minutes = |text: &str| {
            let (hour, minute) = text.split_once(':')?;
            let (hour, minute): (u32, u32) = (hour.parse().ok()?, minute.parse().ok()?);
            (hour < 24 && minute < 60 && text.len() == 5).then_some(hour * 60 + minute)
        };
        Some((minutes(&self.start)?, minutes(&self.end)?))
    }
}

pub(super) fn validate(autoscale: &Autoscale, template: &Template) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mut check = |ok: bool, field: &str, message: &str| {
        if !ok {
            errors.push(FieldError::new(format!("spec.autoscale.{field}"), message));
        }
    };
    let a = autoscale;
    check(a.min_replicas <= 10_000, "minReplicas", "at most 10000");
    check((1..=10_000).contains(&a.max_replicas), "maxReplicas", "between 1 and 10000");
    check(a.min_replicas <= a.max_replicas, "minReplicas", "at most maxReplicas");
    let within = |value: Option<u32>, most: u32| value.is_none_or(|v| (1..=most).contains(&v));
    check(within(a.target.cpu_percent, 100), "target.cpuPercent", "between 1 and 100");
    check(within(a.target.requests_per_second, 1_000_000), "target.requestsPerSecond", "between 1 and 1000000");
    check(within(a.target.concurrency, 10_000), "target.concurrency", "between 1 and 10000");
    let function = template.runtime == Runtime::Function;
    check(
        !function || a.target.cpu_percent.is_none(),
        "target.cpuPercent",
        "a function's processor time is not measured by instance: use concurrency or requestsPerSecond",
    );
    check(
        a.min_replicas > 0 || !template.served_ports().is_empty(),
        "minReplicas",
        "at least 1: without a port no request can wake the app",
    );
    check((1..=120).contains(&a.horizon_minutes), "horizonMinutes", "between 1 and 120");
    check((1..=86_400).contains(&a.idle_seconds), "idleSeconds", "between 1 and 86400");
    check(a.scale_out.cooldown_seconds <= 3600, "scaleOut.cooldownSeconds", "at most 3600");
    check((1..=1000).contains(&a.scale_out.step_percent), "scaleOut.stepPercent", "between 1 and 1000");
    check(a.scale_in.stabilization_seconds <= 3600, "scaleIn.stabilizationSeconds", "at most 3600");
    check(a.scale_in.cooldown_seconds <= 3600, "scaleIn.cooldownSeconds", "at most 3600");
    check((1..=100).contains(&a.scale_in.step_percent), "scaleIn.stepPercent", "between 1 and 100");
    check(a.schedule.len() <= MAX_WINDOWS, "schedule", "at most 32 windows");
    check(
        a.strategy != ScaleStrategy::Schedule || !a.schedule.is_empty(),
        "schedule",
        "the strategy schedule needs a window at least",
    );
    for (i, window) in a.schedule.iter().enumerate() {
        let at = |field: &str| format!("schedule[{i}].{field}");
        check(window.minutes().is_some(), &at("start"), "start and end are times of the day, as 08:30");
        check(window.zone().is_some(), &at("timeZone"), "a name of the IANA time zone database, as Europe/Berlin");
        check(window.days.len() <= 7, &at("days"), "at most seven");
        check(window.min_replicas <= a.max_replicas, &at("minReplicas"), "at most maxReplicas");
    }
    errors
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(autoscale: Autoscale, template: &Template) -> Vec<String> {
        validate(&autoscale, template).into_iter().map(|e| e.field).collect()
    }

    #[test]
    fn bounds_targets_and_windows_are_checked() {
        let container = Template {
            ports: vec![super::super::Port { port: 80, protocol: Default::default(), name: None }],
            ..Template::default()
        };
        assert!(wrong(Autoscale::default(), &container).is_empty());
        let zero = Autoscale { min_replicas: 0, ..Autoscale::default() };
        assert!(wrong(zero.clone(), &container).is_empty());
        assert_eq!(wrong(zero.clone(), &Template::default()), ["spec.autoscale.minReplicas"]);
        let function = Template { runtime: Runtime::Function, ..Template::default() };
        assert!(wrong(zero.clone(), &function).is_empty());
        assert_eq!(zero.targets(&function).concurrency, Some(32));
        assert_eq!(zero.targets(&container).cpu_percent, Some(65));
        let cpu = ScaleTarget { cpu_percent: Some(50), ..ScaleTarget::default() };
        assert_eq!(wrong(Autoscale { target: cpu, ..zero }, &function), ["spec.autoscale.target.cpuPercent"]);
        let window = |start: &str, zone: &str| ScaleWindow {
            days: vec![Weekday::Mon],
            start: start.into(),
            end: "18:00".into(),
            time_zone: zone.into(),
            min_replicas: 4,
        };
        let with = |window| Autoscale { schedule: vec![window], ..Autoscale::default() };
        assert!(wrong(with(window("08:30", "Europe/Berlin")), &container).is_empty());
        assert_eq!(wrong(with(window("24:00", "UTC")), &container), ["spec.autoscale.schedule[0].start"]);
        assert_eq!(wrong(with(window("08:30", "Mars/Base")), &container), ["spec.autoscale.schedule[0].timeZone"]);
        let none = Autoscale { strategy: ScaleStrategy::Schedule, ..Autoscale::default() };
        assert_eq!(wrong(none, &container), ["spec.autoscale.schedule"]);
        let crossed = Autoscale { min_replicas: 5, max_replicas: 4, ..Autoscale::default() };
        assert_eq!(wrong(crossed, &container), ["spec.autoscale.minReplicas"]);
    }
}
