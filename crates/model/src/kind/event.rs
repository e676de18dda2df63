//! What happened to an object, for people and, later, for metering.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Column, Home, Kind, Scope, Verbs};
use crate::{FieldError, OwnerRef, RequestId, Timestamp, Uid};

#[derive(Debug, Clone)]
pub struct Event;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Severity {
    #[default]
    Normal,
    Warning,
}

/// Repetitions of one event are counted, not stored again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct EventSpec {
    pub regarding: OwnerRef,
    #[serde(default)]
    pub severity: Severity,
    /// One CamelCase word for programs.
    pub reason: String,
    pub message: String,
    pub count: u32,
    pub first: Timestamp,
    pub last: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<RequestId>,
    /// Webhooks that want to hear of it have not been given it yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub untold: bool,
}

impl Default for EventSpec {
    fn default() -> Self {
        Self {
            regarding: OwnerRef {
                kind: "App".into(),
                name: "none".parse().expect("a well-formed name"),
                uid: Uid::default(),
            },
            severity: Severity::Normal,
            reason: String::new(),
            message: String::new(),
            count: 1,
            first: Timestamp::default(),
            last: Timestamp::default(),
            request_id: None,
            untold: false,
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct EventStatus {}

/// The project that holds the events of kinds that belong to the fleet, and whatever the cloud runs for itself.
pub const SYSTEM_PROJECT: &str = "system";

impl Kind for Event {
    const KIND: &'static str = "Event";
    const PLURAL: &'static str = "events";
    const SHORT: &'static [&'static str] = &["ev"];
    const ABOUT: &'static str = "What happened to an object. Events of hosts are in the project `system`.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Either;
    const VERBS: Verbs = Verbs::READ_ONLY;
    const COLUMNS: &'static [Column] = &[
        Column::age("LAST", "/spec/last"),
        Column::new("SEVERITY", "/spec/severity"),
        Column::new("REASON", "/spec/reason"),
        Column::new("KIND", "/spec/regarding/kind"),
        Column::new("OBJECT", "/spec/regarding/name"),
        Column::new("COUNT", "/spec/count"),
        Column::new("MESSAGE", "/spec/message"),
    ];
    type Spec = EventSpec;
    type Status = EventStatus;

    fn validate(_: &EventSpec) -> Vec<FieldError> {
        Vec::new()
    }

    fn example() -> EventSpec {
        EventSpec { reason: "Placed".into(), message: "on host zone-a-1".into(), ..EventSpec::default() }
    }
}
