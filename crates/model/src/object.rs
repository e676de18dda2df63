//! The shape of every object: metadata, spec (what the user wants) and status (what the cloud has observed).

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::kind::Kind;
use crate::selector::Labels;
use crate::{API_VERSION, Name, RequestId, Timestamp, Uid};

/// Who an object belongs to, and what follows it when it is deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OwnerRef {
    pub kind: String,
    pub name: Name,
    pub uid: Uid,
}

/// What every object carries beside its spec and status.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    pub name: Name,
    /// Absent for kinds that belong to the fleet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub project: Option<Name>,
    /// Only of kinds that belong to an organization itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organization: Option<Name>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<Name>,
    #[serde(default)]
    pub uid: Uid,
    /// Counts the changes of the spec, from 1.
    #[serde(default)]
    pub generation: u64,
    /// The revision of the region's log at which this object last changed; what `If-Match` compares.
    #[serde(default)]
    pub revision: u64,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels: Labels,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub annotations: Labels,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<OwnerRef>,
    #[serde(default)]
    pub created: Timestamp,
    /// When the delete was committed; only tombstones carry it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleting: Option<Timestamp>,
    /// A delete is refused while this is true.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deletion_protection: bool,
    /// The request that made the latest change of the spec.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<RequestId>,
}

impl Metadata {
    pub fn new(name: Name, project: Option<Name>) -> Self {
        Self {
            name,
            project,
            organization: None,
            region: None,
            uid: Uid::default(),
            generation: 1,
            revision: 0,
            labels: Labels::new(),
            annotations: Labels::new(),
            owner: None,
            created: Timestamp::default(),
            deleting: None,
            deletion_protection: false,
            request_id: None,
        }
    }

    /// What its name is unique in, beside its kind: a project or an organization.
    pub fn within(&self) -> Option<&Name> {
        self.project.as_ref().or(self.organization.as_ref())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ConditionStatus {
    True,
    False,
    Unknown,
}

/// One observed fact about an object, and since when it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Ready`, `Scheduled`, `Deleted` …
    #[serde(rename = "type")]
    pub kind: String,
    pub status: ConditionStatus,
    /// One CamelCase word for programs.
    pub reason: String,
    /// A sentence for people: what is so, and what to do.
    pub message: String,
    pub since: Timestamp,
}

/// Sets the condition of `kind`, keeping `since` when its status has not changed. True if anything changed.
pub fn set_condition(
    conditions: &mut Vec<Condition>,
    kind: &str,
    status: ConditionStatus,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> bool {
    let mut new = Condition { kind: kind.into(), status, reason: reason.into(), message: message.into(), since: now };
    match conditions.iter_mut().find(|c| c.kind == kind) {
        Some(old) => {
            if old.status == new.status {
                new.since = old.since;
            }
            let changed = *old != new;
            *old = new;
            changed
        }
        None => {
            conditions.push(new);
            true
        }
    }
}

/// Whether an object is as its spec wants it: its phase is a good one and speaks of the newest generation. Kinds without a
/// phase have nothing to wait for.
pub fn is_settled(status: &Value, generation: u64) -> bool {
    let Some(phase) = status["phase"].as_str() else { return true };
    let good = matches!(phase, "Ready" | "Running" | "Stopped" | "Complete" | "Failed" | "Available" | "Attached");
    good && status["observedGeneration"].as_u64().is_none_or(|seen| seen >= generation)
}

/// An object of a kind known when compiled.
#[derive(Debug, Clone)]
pub struct Object<K: Kind> {
    pub metadata: Metadata,
    pub spec: K::Spec,
    pub status: K::Status,
}

/// An object of any kind, as it is stored and sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AnyObject {
    pub api_version: String,
    pub kind: String,
    pub metadata: Metadata,
    #[serde(default)]
    pub spec: Value,
    #[serde(default)]
    pub status: Value,
}

/// A stored object that can't be read as its kind: a defect, never a user's fault.
#[derive(Debug, thiserror::Error)]
#[error("stored {kind} {name} can't be read: {source}")]
pub struct DecodeError {
    pub kind: &'static str,
    pub name: Name,
    #[source]
    pub source: serde_json::Error,
}

fn decode_part<T: DeserializeOwned + Default>(part: &Value) -> Result<T, serde_json::Error> {
    if part.is_null() { Ok(T::default()) } else { T::deserialize(part) }
}

impl<K: Kind> Object<K> {
    pub fn new(metadata: Metadata, spec: K::Spec) -> Self {
        Self { metadata, spec, status: K::Status::default() }
    }

    /// Reads leniently: unknown fields are passed over, missing ones take their defaults.
    pub fn from_any(any: &AnyObject) -> Result<Self, DecodeError> {
        let fail = |source| DecodeError { kind: K::KIND, name: any.metadata.name.clone(), source };
        Ok(Self {
            metadata: any.metadata.clone(),
            spec: decode_part(&any.spec).map_err(fail)?,
            status: decode_part(&any.status).map_err(fail)?,
        })
    }

    pub fn to_any(&self) -> AnyObject {
        AnyObject {
            api_version: API_VERSION.to_owned(),
            kind: K::KIND.to_owned(),
            metadata: self.metadata.clone(),
            spec: serde_json::to_value(&self.spec).expect("specs are plain data"),
            status: serde_json::to_value(&self.status).expect("statuses are plain data"),
        }
    }

    /// Reads the stored form as [`Object::from_any`] does, without the detour over values of any shape.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        #[derive(Deserialize)]
        #[serde(bound = "S: DeserializeOwned, T: DeserializeOwned")]
        struct Stored<S, T> {
            metadata: Metadata,
            #[serde(default = "Option::default")]
            spec: Option<S>,
            #[serde(default = "Option::default")]
            status: Option<T>,
        }
        let stored: Stored<K::Spec, K::Status> = serde_json::from_slice(bytes)?;
        Ok(Self {
            metadata: stored.metadata,
            spec: stored.spec.unwrap_or_default(),
            status: stored.status.unwrap_or_default(),
        })
    }

    /// The stored form: that of [`Object::to_any`] as JSON.
    pub fn to_vec(&self) -> Vec<u8> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct Stored<'a, S, T> {
            api_version: &'a str,
            kind: &'a str,
            metadata: &'a Metadata,
            spec: &'a S,
            status: &'a T,
        }
        let (metadata, spec, status) = (&self.metadata, &self.spec, &self.status);
        let stored = Stored { api_version: API_VERSION, kind: K::KIND, metadata, spec, status };
        serde_json::to_vec(&stored).expect("objects are plain data")
    }

    pub fn owner_ref(&self) -> OwnerRef {
        OwnerRef { kind: K::KIND.to_owned(), name: self.metadata.name.clone(), uid: self.metadata.uid }
    }
}
