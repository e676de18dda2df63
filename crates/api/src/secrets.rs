//! Secrets at the edge: values are sealed here before anything else of the cloud sees the request, and opened here for
//! whoever may reveal them.
//!
//! What a write brings is taken out of its body at once. The newest version is opened and compared with it, so that what is
//! applied again makes no new version; that alone would let whoever may write try values without a trace by dry runs, so a dry
//! run compares only for those who may reveal. What is sealed is bound to the version that it will be; if another write was
//! faster, it is sealed again for the next.

use std::collections::BTreeMap;

use axum::response::Response;
use http::header::CACHE_CONTROL;
use http::request::Parts;
use http::{HeaderValue, Method};
use nexus_control::intent::{Accepted, Change};
use nexus_control::secrets::{OpenError, VersionId};
use nexus_model::kind::{Kind, Secret, SecretSpec};
use nexus_model::secret::{is_key, wrong_key};
use nexus_model::{ApiError, Code, FieldError, Name, Object, SecretData, SecretValue};
use nexus_store::Consistency;
use serde_json::{Map, Value, json};

use crate::list::{find, unreadable};
use crate::problem::{Refusal, from_store};
use crate::query::Query;
use crate::route::{Place, Target, Verb};
use crate::serve::{Context, Server};
use crate::write::{read_spec, refuse_written, region_of};

/// What a write brings of values.
pub(crate) enum Brought {
    /// They stay as they are.
    Nothing,
    /// All of them.
    All(SecretData),
    /// Keys that change, and with `None` those that go.
    Some(BTreeMap<String, Option<SecretValue>>),
}

pub(crate) const REVEAL_PARAMETERS: &[&str] = &["version"];

/// Takes the values out of a change: from here on it may be shown.
pub(crate) fn take(change: &mut Change) -> Result<Brought, ApiError> {
    match change {
        Change::Create { object } | Change::Put { object } => {
            let spec: SecretSpec = read_spec(object)?;
            object.spec = Value::Null;
            refuse_written("spec.sealed", spec.sealed.is_some())?;
            Ok(spec.brought().map_err(ApiError::invalid)?.map_or(Brought::Nothing, Brought::All))
        }
        Change::Patch { patch } => {
            let Some(Value::Object(spec)) = patch.as_object_mut().and_then(|p| p.shift_remove("spec")) else {
                return Ok(Brought::Nothing);
            };
            refuse_written("spec.sealed", spec.get("sealed").is_some_and(|v| !v.is_null()))?;
            changes(spec)
        }
        Change::Delete
        | Change::Rollout { .. }
        | Change::Audit { .. }
        | Change::Tell { .. }
        | Change::Rebalance { .. } => Ok(Brought::Nothing),
    }
}

/// The keys that a merge patch changes.
fn changes(mut spec: Map<String, Value>) -> Result<Brought, ApiError> {
    let (mut changes, mut errors) = (BTreeMap::new(), Vec::new());
    for field in ["data", "binary"] {
        let values = match spec.shift_remove(field) {
            None => continue,
            Some(Value::Object(values)) => values,
            Some(_) => {
                errors.push(FieldError::new(format!("spec.{field}"), "name the keys that change; null takes one away"));
                continue;
            }
        };
        for (key, value) in values {
            if !is_key(&key) {
                errors.push(wrong_key(&format!("spec.{field}"), &key));
                continue;
            }
            let value = match value {
                Value::Null => Some(None),
                Value::String(text) if field == "data" => Some(Some(SecretValue::new(text.into_bytes()))),
                Value::String(text) => SecretValue::from_base64(&text).map(Some),
                _ => None,
            };
            let Some(value) = value else {
                let what = if field == "data" { "a text" } else { "base64" };
                errors.push(FieldError::new(format!("spec.{field}.{key}"), what));
                continue;
            };
            if changes.insert(key, value).is_some() {
                errors.push(FieldError::new(format!("spec.{field}"), "a key stands in data and in binary"));
            }
        }
    }
    // What else a read shows may be sent back; it changes nothing.
    spec.retain(|_, value| !value.is_null());
    let rest = serde_json::from_value::<SecretSpec>(Value::Object(spec));
    if !rest.is_ok_and(|rest| rest.brought().is_ok()) {
        errors.push(FieldError::new("spec", "`version` is a number and `keys` a list of texts: leave them out"));
    }
    match (errors.is_empty(), changes.is_empty()) {
        (false, _) => Err(ApiError::invalid(errors)),
        (_, true) => Ok(Brought::Nothing),
        _ => Ok(Brought::Some(changes)),
    }
}

fn cannot_open(error: OpenError) -> ApiError {
    match error {
        OpenError::Store(error) => from_store(error),
        OpenError::Missing(..) => ApiError::new(Code::NotFound, error.to_string()),
        OpenError::Sealed(..) => {
            tracing::warn!(%error, "a secret can't be opened");
            ApiError::new(Code::Unavailable, error.to_string())
        }
    }
}

async fn stored(server: &Server, place: &Place, name: &Name) -> Result<Option<Object<Secret>>, ApiError> {
    let Some(kv) = find(server, place, name, Consistency::Linearizable).await? else { return Ok(None) };
    Object::<Secret>::from_slice(&kv.value).map(Some).map_err(|e| unreadable(&kv, &e))
}

/// The values of the newest version, for use on somebody's behalf and never for an answer.
pub(crate) async fn newest(server: &Server, place: &Place, name: &Name) -> Result<Option<SecretData>, ApiError> {
    match stored(server, place, name).await? {
        Some(secret) => open(server, place, name, secret.spec.version).await.map(Some),
        None => Ok(None),
    }
}

async fn open(server: &Server, place: &Place, name: &Name, version: u64) -> Result<SecretData, ApiError> {
    let (region, project) = (region_of(server, place), project_of(place)?);
    let id = VersionId { region, project, name: name.clone(), version };
    // What was just read of the object is newer than that: this server has the row.
    let opened = id.open(&**server.store(place), &*server.api.master_keys, Consistency::Stale).await;
    opened.map_err(cannot_open)
}

fn project_of(place: &Place) -> Result<Name, ApiError> {
    place.project.clone().ok_or_else(|| ApiError::new(Code::NotFound, "a secret is in a project"))
}

/// Puts into a change what is to be stored: the version that it makes, sealed, or the one that stays.
pub(crate) async fn seal(
    server: &Server,
    place: &Place,
    name: &Name,
    change: &mut Change,
    brought: &Brought,
    compare: bool,
) -> Result<(), ApiError> {
    if matches!(
        change,
        Change::Delete | Change::Rollout { .. } | Change::Audit { .. } | Change::Tell { .. } | Change::Rebalance { .. }
    ) {
        return Ok(());
    }
    let current = stored(server, place, name).await?.map(|secret| secret.spec);
    let data = match (brought, &current) {
        (Brought::Nothing, _) => None,
        // The writer says that there is nothing to change.
        (Brought::Some(_), None) => None,
        (Brought::All(data), None) => Some(data.clone()),
        (Brought::All(data), Some(held)) => {
            // One that can't be opened any more is replaced like any other.
            let same = compare && open(server, place, name, held.version).await.is_ok_and(|old| old == *data);
            (!same).then(|| data.clone())
        }
        (Brought::Some(changes), Some(held)) => {
            let old = open(server, place, name, held.version).await?;
            let mut new = old.clone();
            for (key, value) in changes {
                match value {
                    Some(value) => drop(new.0.insert(key.clone(), value.clone())),
                    None => drop(new.0.remove(key)),
                }
            }
            let errors = new.check();
            if !errors.is_empty() {
                return Err(ApiError::invalid(errors));
            }
            (!compare || new != old).then_some(new)
        }
    };
    let current = current.unwrap_or_default();
    let spec = match data {
        None => SecretSpec { version: current.version, keys: current.keys, ..SecretSpec::default() },
        Some(data) => {
            let (region, project) = (region_of(server, place), project_of(place)?);
            let id = VersionId { region, project, name: name.clone(), version: current.version + 1 };
            let sealed = id.seal(&*server.api.master_keys, &data);
            let sealed =
                sealed.map_err(|e| ApiError::new(Code::Unavailable, format!("the secret can't be sealed: {e}")))?;
            SecretSpec { sealed: Some(sealed), version: id.version, keys: data.keys(), ..SecretSpec::default() }
        }
    };
    let spec = serde_json::to_value(spec).expect("specs are plain data");
    match change {
        Change::Create { object } | Change::Put { object } => object.spec = spec,
        Change::Patch { patch } if !matches!(brought, Brought::Nothing) => patch["spec"] = spec,
        _ => {}
    }
    Ok(())
}

/// Whether the answer that an idempotency key gave before is this request's: the writer can't tell, for it sees no values.
pub(crate) async fn refuse_other_values(
    server: &Server,
    place: &Place,
    accepted: &Accepted,
    brought: &Brought,
) -> Result<(), ApiError> {
    let version = accepted.object.spec["version"].as_u64().unwrap_or(0);
    // One that is gone by now, or that can't be opened, proves nothing.
    let Ok(first) = open(server, place, &accepted.object.metadata.name, version).await else { return Ok(()) };
    let same = match brought {
        Brought::Nothing => true,
        Brought::All(data) => *data == first,
        Brought::Some(changes) => changes.iter().all(|(key, value)| first.0.get(key) == value.as_ref()),
    };
    if same {
        return Ok(());
    }
    Err(ApiError::new(Code::Conflict, "this Idempotency-Key was used with another request: use a new one"))
}

/// Whether somebody may reveal a secret, asked without a trace.
pub(crate) async fn may_reveal(server: &Server, place: &Place, name: &Name, context: &Context) -> bool {
    let target = Target::Custom(place.clone(), name.clone(), Verb::Reveal);
    server.may(context, &target, &Method::GET).await
}

/// `:reveal`.
pub(crate) async fn reveal(server: &Server, place: &Place, name: &Name, parts: &Parts) -> Result<Response, Refusal> {
    let query = Query::parse(parts.uri.query(), REVEAL_PARAMETERS, &[])?;
    let asked = query.number("version", 1..=crate::audit::MAX_NUMBER)?;
    let secret = stored(server, place, name).await?;
    let secret = secret.ok_or_else(|| ApiError::not_found(Secret::KIND, name.as_str()))?;
    let version = asked.unwrap_or(secret.spec.version);
    let Some(kept) = secret.status.versions.iter().find(|v| v.version == version) else {
        let kept: Vec<_> = secret.status.versions.iter().map(|v| v.version.to_string()).collect();
        let detail = format!("secret {name} has no version {version}; there are: {}", kept.join(", "));
        return Err(Refusal::new(Code::NotFound, detail));
    };
    let data = open(server, place, name, version).await?;
    let (mut texts, mut binary) = (Map::new(), Map::new());
    for (key, value) in &data.0 {
        match value.text() {
            Some(text) => drop(texts.insert(key.clone(), text.into())),
            None => drop(binary.insert(key.clone(), value.to_base64().as_str().into())),
        }
    }
    let mut response = crate::serve::json(&json!({
        "name": name, "version": version, "created": kept.created, "data": texts, "binary": binary,
    }));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// Whether an object is one of those whose values are sealed here.
pub(crate) fn is_secret(place: &Place) -> bool {
    place.kind.plural == Secret::PLURAL
}

#[cfg(test)]
mod tests {
    use nexus_model::AnyObject;

    use super::*;

    fn patched(spec: Value) -> Result<BTreeMap<String, Option<SecretValue>>, Vec<String>> {
        let mut change = Change::Patch { patch: json!({"metadata": {}, "spec": spec}) };
        let taken = take(&mut change).map_err(|e| e.errors.into_iter().map(|e| e.field).collect::<Vec<_>>())?;
        assert_eq!(change, Change::Patch { patch: json!({"metadata": {}}) }, "nothing of it stays");
        match taken {
            Brought::Some(changes) => Ok(changes),
            _ => Ok(BTreeMap::new()),
        }
    }

    #[test]
    fn a_patch_names_the_keys_that_change() {
        let changes = patched(json!({"data": {"a": "x", "b": null}, "binary": {"c": "AP8="}})).unwrap();
        assert_eq!(changes["a"], Some(SecretValue::new(b"x".to_vec())));
        assert_eq!(changes["b"], None);
        assert_eq!(changes["c"], Some(SecretValue::new(vec![0, 255])));
        assert!(patched(json!({"version": 3})).unwrap().is_empty());
        assert_eq!(patched(json!({"data": null})).unwrap_err(), ["spec.data"]);
        assert_eq!(patched(json!({"data": {"a/b": "x"}})).unwrap_err(), ["spec.data.a/b"]);
        assert_eq!(patched(json!({"sealed": "x"})).unwrap_err(), ["spec.sealed"]);
        for wrong in [json!({"data": {"a": 1}}), json!({"binary": {"a": "hunter2!"}})] {
            assert_eq!(patched(wrong).unwrap_err().len(), 1);
        }
    }

    #[test]
    fn a_whole_object_loses_its_values_too() {
        let object = |spec: Value| {
            let object =
                json!({"apiVersion": "cloudnexus/v1", "kind": "Secret", "metadata": {"name": "db"}, "spec": spec});
            serde_json::from_value::<AnyObject>(object).unwrap()
        };
        let mut change = Change::Put { object: object(json!({"data": {"a": "hunter2"}})) };
        let Ok(Brought::All(data)) = take(&mut change) else { panic!("all values") };
        assert_eq!(data.keys(), ["a"]);
        assert!(!format!("{change:?}").contains("hunter2"));
        let mut change = Change::Put { object: object(json!({"version": 4, "keys": ["a"]})) };
        assert!(matches!(take(&mut change), Ok(Brought::Nothing)), "what was read may be sent back");
    }
}
