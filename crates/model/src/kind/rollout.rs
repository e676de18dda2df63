//! How an app's instances give way to those of a newer template, how far that is, and the revisions that are kept to go back to.
//!
//! Users write [`Rollout`], the writer [`RolloutStatus`]. Orders that are given while a rollout runs (pause, promote …) stand in
//! the status as a wish and two counters, so that a region can follow its global app's and heed each one once.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{Column, Home, Kind, Scope, SecretRef, Template, Verbs};
use crate::{Digest, FieldError, Name, Timestamp};

/// A number of instances, or a share of those wanted. Written `2` or `25%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    Count(u32),
    Percent(u8),
}

impl Amount {
    const MOST: u32 = 10_000;

    /// What it comes to of `wanted`, rounded up.
    pub fn ceil(self, wanted: usize) -> usize {
        match self {
            Self::Count(count) => count as usize,
            Self::Percent(percent) => (wanted * usize::from(percent)).div_ceil(100),
        }
    }

    /// What it comes to of `wanted`, rounded down.
    pub fn floor(self, wanted: usize) -> usize {
        match self {
            Self::Count(count) => count as usize,
            Self::Percent(percent) => wanted * usize::from(percent) / 100,
        }
    }
}

impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("{text:?} is neither a number of instances, up to {}, nor a share such as 25%", Self::MOST);
        let digits = |text: &str| !text.is_empty() && text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
        match text.strip_suffix('%') {
            Some(share) if digits(share) => {
                share.parse().ok().filter(|p| *p <= 100).map(Self::Percent).ok_or_else(wrong)
            }
            None if digits(text) => text.parse().ok().filter(|n| *n <= Self::MOST).map(Self::Count).ok_or_else(wrong),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => write!(f, "{count}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Count(count) => serializer.serialize_u32(*count),
            Self::Percent(_) => serializer.collect_str(self),
        }
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Amount;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of instances, or a share such as 25%")
            }

            fn visit_u64<E: de::Error>(self, count: u64) -> Result<Amount, E> {
                let count = u32::try_from(count).ok().filter(|n| *n <= Amount::MOST);
                count.map(Amount::Count).ok_or_else(|| E::custom(format!("at most {}", Amount::MOST)))
            }

            fn visit_i64<E: de::Error>(self, count: i64) -> Result<Amount, E> {
                u64::try_from(count).map_err(|_| E::custom("not less than 0")).and_then(|n| self.visit_u64(n))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Amount, E> {
                // A bare number is written as a number.
                if text.ends_with('%') {
                    text.parse().map_err(E::custom)
                } else {
                    Err(E::custom("write a share as 25%"))
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl JsonSchema for Amount {
    fn schema_name() -> Cow<'static, str> {
        "Amount".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["integer", "string"], "minimum": 0, "maximum": Self::MOST, "pattern": "^(100|[1-9]?[0-9])%$",
        })
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// New instances take the place of old ones, a few at a time.
    #[default]
    Rolling,
    /// A part of the requests goes to new instances first, and more of them with each step.
    Canary,
    /// A whole new set is made ready; then all requests change over at once.
    BlueGreen,
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rolling => "rolling",
            Self::Canary => "canary",
            Self::BlueGreen => "blue-green",
        })
    }
}

/// One step of a canary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct CanaryStep {
    /// The share of the requests, and of the instances, that are new. With 0 there is one new instance, for whoever sends the
    /// header.
    #[schemars(range(max = 99))]
    pub percent: u8,
    /// How long the step lasts once its instances are ready. Without it, until somebody resumes or promotes the rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 604_800))]
    pub seconds: Option<u32>,
}

/// Requests that carry a header.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeaderMatch {
    /// In any case of its letters.
    #[schemars(regex(pattern = HEADER_PATTERN))]
    pub name: String,
    /// Without it, any value will do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = HEADER_VALUE_PATTERN))]
    pub value: Option<String>,
}

const HEADER_PATTERN: &str = "^[A-Za-z][A-Za-z0-9-]{0,63}$";
const HEADER_VALUE_PATTERN: &str = "^[!-~]{1,256}$";

fn is_header_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

/// Steps of one canary.
const MAX_STEPS: usize = 20;
/// Revisions that are kept of one app, beside those in use.
const MAX_HISTORY: u32 = 50;

/// How instances of an older template are replaced, and when that is taken back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Rollout {
    pub strategy: Strategy,
    /// Instances beyond those wanted while others are replaced; a share is rounded up.
    pub max_surge: Amount,
    /// Instances fewer than those wanted that may be ready meanwhile; a share is rounded down. When this and `maxSurge` both come
    /// to nothing, one instance more is made.
    pub max_unavailable: Amount,
    /// Of a canary; without any, one of 10 % that waits.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = MAX_STEPS))]
    pub steps: Vec<CanaryStep>,
    /// Of a canary, and of blue/green before it changes over: requests with this header go to new instances.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub header: Option<HeaderMatch>,
    /// Of blue/green: whether requests change over as soon as the new set is ready, or when somebody promotes it.
    pub auto_promote: bool,
    /// Of blue/green: how long the old set is kept after that.
    #[schemars(range(max = 86_400))]
    pub keep_old_seconds: u32,
    /// A rollout of which no further instance becomes ready for so long has failed.
    #[schemars(range(min = 1, max = 86_400))]
    pub progress_deadline_seconds: u32,
    /// Whether a rollout that has failed is taken back; otherwise it stays as it is, and says so.
    pub auto_rollback: bool,
    /// A rollout has failed too when more than this percentage of the requests to new instances end in an error (5xx), and more
    /// than of those to old ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 100))]
    pub max_error_percent: Option<u8>,
    /// Requests to new instances before their errors are judged.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub min_requests: u32,
    /// Older revisions that are kept to go back to.
    #[schemars(range(max = MAX_HISTORY))]
    pub history: u32,
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            strategy: Strategy::default(),
            max_surge: Amount::Percent(25),
            max_unavailable: Amount::Count(0),
            steps: Vec::new(),
            header: None,
            auto_promote: true,
            keep_old_seconds: 60,
            progress_deadline_seconds: 600,
            auto_rollback: true,
            max_error_percent: None,
            min_requests: 50,
            history: 10,
        }
    }
}

pub(super) fn validate_rollout(r: &Rollout) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mut check = |ok: bool, field: String, message: &str| {
        if !ok {
            errors.push(FieldError::new(format!("spec.rollout.{field}"), message));
        }
    };
    check(r.steps.len() <= MAX_STEPS, "steps".into(), "at most 20");
    for (i, step) in r.steps.iter().enumerate() {
        check(step.percent <= 99, format!("steps[{i}].percent"), "at most 99: after the last step come all");
        let seconds = step.seconds.is_none_or(|s| (1..=604_800).contains(&s));
        check(seconds, format!("steps[{i}].seconds"), "between 1 and 604800");
    }
    if let Some(header) = &r.header {
        let message = "a letter, then at most 63 letters, digits and '-'";
        check(is_header_name(&header.name), "header.name".into(), message);
        let value = header.value.as_ref();
        let good = value.is_none_or(|v| (1..=256).contains(&v.len()) && v.bytes().all(|b| b.is_ascii_graphic()));
        check(good, "header.value".into(), "1 to 256 visible ASCII characters");
    }
    check(r.keep_old_seconds <= 86_400, "keepOldSeconds".into(), "at most 86400");
    let deadline = (1..=86_400).contains(&r.progress_deadline_seconds);
    check(deadline, "progressDeadlineSeconds".into(), "between 1 and 86400");
    check(r.max_error_percent.is_none_or(|p| p <= 100), "maxErrorPercent".into(), "at most 100");
    check((1..=1_000_000).contains(&r.min_requests), "minRequests".into(), "between 1 and 1000000");
    check(r.history <= MAX_HISTORY, "history".into(), "at most 50");
    errors
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RolloutPhase {
    /// Nothing is to be replaced.
    #[default]
    Complete,
    Progressing,
    /// It goes on when somebody resumes or promotes it.
    Waiting,
    Paused,
    /// All requests go to the new set; the old one is kept for a while.
    Switched,
    /// It has failed, and what was there before is brought back.
    RollingBack,
    /// What was there before is back. The next change of the app begins anew, and so does a resume.
    RolledBack,
    /// It has failed, and there is nothing to go back to, or nobody wants to.
    Stalled,
}

impl RolloutPhase {
    /// Whether time, or how requests are answered, may bring it on or end it.
    pub fn is_open(self) -> bool {
        matches!(self, Self::Progressing | Self::Waiting | Self::Paused | Self::Switched | Self::Stalled)
    }
}

/// What users order while a rollout runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RolloutOrders {
    pub paused: bool,
    /// How often it was resumed.
    pub resumed: u64,
    /// How often it was promoted.
    pub promoted: u64,
    /// How often somebody went back to an older revision: what is known needs no canary.
    pub undone: u64,
}

fn is_none_of_them(surge: &u32) -> bool {
    *surge == 0
}

/// How far an app's newest template is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RolloutStatus {
    pub phase: RolloutPhase,
    /// The strategy that it follows.
    pub strategy: Strategy,
    /// The newest revision; see `nexus rollout history`.
    pub revision: u64,
    /// Its template's.
    pub template_hash: String,
    /// The revision that was there before and that is gone back to; 0 without one.
    pub stable_revision: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub stable_hash: String,
    /// Steps that are done.
    pub step: u32,
    pub steps: u32,
    /// The share of the requests that goes to new instances; without it, each instance gets as much as any other.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub traffic_percent: Option<u8>,
    /// Where it is, in a sentence.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub started: Option<Timestamp>,
    /// Since when the instances of the present step are ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reached: Option<Timestamp>,
    /// Since when no further one has become ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub behind_since: Option<Timestamp>,
    /// The most of them that were ready.
    pub best_ready: u32,
    /// While it is paused: new instances that there were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held: Option<u32>,
    /// Instances beyond the app's replicas that its project's quota is charged with, while they are there.
    #[serde(skip_serializing_if = "is_none_of_them")]
    pub surge: u32,
    /// Which quota keeps out instances that the rollout would make beyond the app's replicas. It goes on without them as far
    /// as `maxUnavailable` lets it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub surge_refused: String,
    pub failed: bool,
    pub promoted: bool,
    pub orders: RolloutOrders,
    /// Those that have been followed.
    pub heeded: RolloutOrders,
}

/// A template that an app has had.
#[derive(Debug, Clone)]
pub struct AppRevision;

/// Made when an app's template or its image's content changes, and never changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AppRevisionSpec {
    pub app: Name,
    /// Counts the app's templates. One that is gone back to is the newest again.
    pub revision: u64,
    /// Instances with this hash are made from it.
    pub template_hash: String,
    pub template: Template,
    /// Its secrets, with the versions that variables came from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub secrets: Vec<SecretRef>,
    /// The same of its init steps and sidecars, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub part_secrets: BTreeMap<Name, Vec<SecretRef>>,
    /// The image's content then.
    pub image_digest: Digest,
    /// That of the other images that its parts name, by image name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub part_digests: BTreeMap<Name, Digest>,
}

impl Default for AppRevisionSpec {
    fn default() -> Self {
        Self {
            app: "none".parse().expect("a well-formed name"),
            revision: 1,
            template_hash: String::new(),
            template: Template::default(),
            secrets: Vec::new(),
            part_secrets: BTreeMap::new(),
            image_digest: Digest::of(b""),
            part_digests: BTreeMap::new(),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct AppRevisionStatus {}

impl Kind for AppRevision {
    const KIND: &'static str = "AppRevision";
    const PLURAL: &'static str = "app-revisions";
    const SHORT: &'static [&'static str] = &["revisions"];
    const ABOUT: &'static str = "A template that an app has had, kept to go back to.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Either;
    const VERBS: Verbs = Verbs::READ_ONLY;
    const COLUMNS: &'static [Column] = &[
        Column::new("APP", "/spec/app"),
        Column::new("REVISION", "/spec/revision"),
        Column::new("IMAGE", "/spec/template/image"),
        Column::new("DIGEST", "/spec/imageDigest").wide(),
    ];
    type Spec = AppRevisionSpec;
    type Status = AppRevisionStatus;

    fn validate(_: &AppRevisionSpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> AppRevisionSpec {
        let app = super::App::example();
        AppRevisionSpec {
            app: app.image.clone(),
            template_hash: "0a1b2c3d".into(),
            template: app.template(),
            ..AppRevisionSpec::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn amounts_are_numbers_or_shares() {
        let read = |value: serde_json::Value| serde_json::from_value::<Amount>(value);
        assert_eq!(read(json!(3)).unwrap(), Amount::Count(3));
        assert_eq!(read(json!("25%")).unwrap(), Amount::Percent(25));
        for wrong in [json!("101%"), json!("3"), json!(-1), json!(10_001), json!("%"), json!(1.5), json!(null)] {
            assert!(read(wrong.clone()).is_err(), "{wrong}");
        }
        assert_eq!(serde_json::to_value(Amount::Percent(25)).unwrap(), json!("25%"));
        assert_eq!(serde_json::to_value(Amount::Count(2)).unwrap(), json!(2));
        assert_eq!((Amount::Percent(25).ceil(5), Amount::Percent(25).floor(5)), (2, 1));
        assert_eq!("7".parse::<Amount>().unwrap(), Amount::Count(7));
    }

    #[test]
    fn the_bounds_of_a_rollout_name_the_field_at_fault() {
        let parse = crate::kind::find("app").unwrap().parse_spec;
        let field = |rollout: serde_json::Value| {
            parse(&json!({"image": "web", "rollout": rollout})).unwrap_err()[0].field.clone()
        };
        assert_eq!(field(json!({"steps": [{"percent": 100}]})), "spec.rollout.steps[0].percent");
        assert_eq!(field(json!({"steps": [{"percent": 1, "seconds": 0}]})), "spec.rollout.steps[0].seconds");
        assert_eq!(field(json!({"header": {"name": "x y"}})), "spec.rollout.header.name");
        assert_eq!(field(json!({"header": {"name": "x", "value": ""}})), "spec.rollout.header.value");
        assert_eq!(field(json!({"progressDeadlineSeconds": 0})), "spec.rollout.progressDeadlineSeconds");
        assert_eq!(field(json!({"history": 51})), "spec.rollout.history");
        assert_eq!(field(json!({"maxSurge": "200%"})), "spec.rollout.maxSurge");
        assert_eq!(field(json!({"wave": 1})), "spec.rollout.wave");
        assert_eq!(field(json!([])), "spec.rollout");
    }
}
