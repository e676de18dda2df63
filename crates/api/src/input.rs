//! Bodies, read strictly: an unknown field, a wrong type or a name that contradicts the path is refused with its place.
//!
//! What the cloud writes itself (uid, generation, created, status …) may stand in a body, is checked for its type, and is
//! ignored: an object that was fetched can be edited and sent back. `metadata.revision`, when it is there and not 0, is
//! the revision that a PUT means to replace.

use axum::body::Body;
use http::HeaderMap;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use nexus_model::kind::{Home, KindDescriptor, Scope, validate_annotations, validate_labels};
use nexus_model::selector::Labels;
use nexus_model::{API_VERSION, AnyObject, ApiError, Code, FieldError, Metadata, Name};
use serde_json::{Map, Value};

use crate::headers::check_content_type;
use crate::openapi::SpecShape;
use crate::route::Place;

/// The largest JSON body.
pub(crate) const MAX_BODY: usize = 1 << 20;
/// The largest whole number that every JSON reader reads as it is.
pub(crate) const MAX_INTEGER: u64 = (1 << 53) - 1;

/// Reads a whole JSON body.
pub(crate) async fn read_json(headers: &HeaderMap, body: Body, types: &[&str]) -> Result<Value, ApiError> {
    check_content_type(headers, types)?;
    let collected = Limited::new(body, MAX_BODY).collect().await.map_err(|e| {
        if e.is::<LengthLimitError>() {
            ApiError::new(Code::TooLarge, format!("a body has at most {MAX_BODY} bytes"))
        } else {
            ApiError::new(Code::BadRequest, "the body broke off")
        }
    })?;
    let bytes = collected.to_bytes();
    if bytes.is_empty() {
        return Err(ApiError::new(Code::BadRequest, "the body is empty"));
    }
    let mut value = serde_json::from_slice(&bytes)
        .map_err(|e| ApiError::new(Code::BadRequest, format!("the body is not JSON: {e}")))?;
    whole_numbers(&mut value);
    Ok(value)
}

/// Writes `2.0` as `2`: to JSON Schema (2020-12, 4.2.3), and to clients with one type of number, both are the same integer.
fn whole_numbers(value: &mut Value) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(whole_numbers),
        Value::Object(map) => map.values_mut().for_each(whole_numbers),
        Value::Number(n) if n.is_f64() => {
            let whole = n.as_f64().filter(|f| f.fract() == 0.0 && f.abs() <= MAX_INTEGER as f64);
            if let Some(whole) = whole {
                // Within the bounds in which every whole number has its own f64.
                *value = if whole < 0.0 { Value::from(whole as i64) } else { Value::from(whole as u64) };
            }
        }
        _ => {}
    }
}

/// Where a body's object must stand.
pub(crate) struct Expected<'a> {
    pub place: &'a Place,
    pub region: &'a Name,
    /// From the path; a POST takes it from the body.
    pub name: Option<&'a Name>,
}

/// What the metadata of a body says, as far as a user may say it. `None`: not mentioned.
#[derive(Default)]
struct MetadataIn {
    name: Option<Name>,
    revision: u64,
    labels: Labels,
    annotations: Labels,
    deletion_protection: bool,
}

type Errors = Vec<FieldError>;

fn push(errors: &mut Errors, field: impl Into<String>, message: impl Into<String>) {
    errors.push(FieldError::new(field, message));
}

fn unknown(errors: &mut Errors, prefix: &str, key: &str) {
    let key: String = key.chars().take(80).collect();
    push(errors, format!("{prefix}{key}"), "there is no such field");
}

/// Labels or annotations. With `nulls`, as in a patch, a null stands for "remove it".
fn texts(errors: &mut Errors, field: &str, value: &Value, nulls: bool) -> Labels {
    let Some(map) = value.as_object() else {
        push(errors, field, "an object of texts");
        return Labels::new();
    };
    let mut out = Labels::new();
    for (key, value) in map {
        match value {
            Value::String(text) => drop(out.insert(key.clone(), text.clone())),
            // Checked as a key like any other.
            Value::Null if nulls => drop(out.insert(key.clone(), String::new())),
            _ => push(errors, format!("{field}.{}", key.chars().take(80).collect::<String>()), "a text"),
        }
    }
    out
}

/// A name in the body must be well-formed and agree with the path.
fn agreeing(errors: &mut Errors, field: &str, value: &Value, path: Option<&Name>) -> Option<Name> {
    let Some(text) = value.as_str() else {
        push(errors, field, "a text");
        return None;
    };
    match text.parse::<Name>() {
        Err(e) => push(errors, field, e.to_string()),
        Ok(name) => match path {
            Some(path) if *path != name => push(errors, field, format!("the path says {:?}", path.as_str())),
            _ => return Some(name),
        },
    }
    None
}

/// What the cloud writes itself: of the right type, and no more is asked.
fn ignored(errors: &mut Errors, field: &str, value: &Value, key: &str) {
    let short = |v: &Value| v.as_str().is_some_and(|t| t.chars().count() <= 64);
    let good = match key {
        "generation" => value.as_u64().is_some_and(|n| n <= MAX_INTEGER),
        "owner" => value
            .as_object()
            .is_some_and(|o| o.len() == 3 && ["kind", "name", "uid"].iter().all(|k| o.get(*k).is_some_and(short))),
        _ => short(value),
    };
    if !good {
        let message = match key {
            "generation" => "a whole number",
            "owner" => "an object of kind, name and uid",
            _ => "a text of at most 64 characters",
        };
        push(errors, field, message);
    }
}

fn metadata(errors: &mut Errors, value: &Value, expected: &Expected<'_>, patch: bool) -> MetadataIn {
    let mut out = MetadataIn::default();
    let Some(map) = value.as_object() else {
        push(errors, "metadata", "an object");
        return out;
    };
    for (key, value) in map {
        let field = format!("metadata.{}", key.chars().take(80).collect::<String>());
        match key.as_str() {
            "name" => out.name = agreeing(errors, &field, value, expected.name),
            "project" if expected.place.project.is_some() => {
                agreeing(errors, &field, value, expected.place.project.as_ref());
            }
            "organization" if expected.place.organization.is_some() => {
                agreeing(errors, &field, value, expected.place.organization.as_ref());
            }
            // Of what all regions share, the path may name a region too.
            "region" if value.is_string() && value.as_str() == expected.place.region.as_ref().map(Name::as_str) => {}
            "region" if expected.place.kind.home == Home::Global && expected.place.region.is_none() => {
                agreeing(errors, &field, value, None);
            }
            "region" => {
                agreeing(errors, &field, value, Some(expected.region));
            }
            "labels" if patch && value.is_null() => {}
            "labels" => {
                out.labels = texts(errors, &field, value, patch);
                errors.extend(validate_labels(&field, &out.labels));
            }
            "annotations" if patch && value.is_null() => {}
            "annotations" => {
                out.annotations = texts(errors, &field, value, patch);
                errors.extend(validate_annotations(&field, &out.annotations));
            }
            "deletionProtection" => match value {
                Value::Bool(on) => out.deletion_protection = *on,
                Value::Null if patch => {}
                _ => push(errors, &field, "true or false"),
            },
            "revision" => match value.as_u64() {
                Some(revision) if revision <= MAX_INTEGER => out.revision = revision,
                _ => push(errors, &field, "a whole number"),
            },
            "uid" | "generation" | "created" | "deleting" | "requestId" | "owner" => {
                ignored(errors, &field, value, key);
            }
            _ => unknown(errors, "metadata.", key),
        }
    }
    out
}

fn top<'a>(errors: &mut Errors, kind: &KindDescriptor, body: &'a Value) -> Result<&'a Map<String, Value>, ApiError> {
    let Some(map) = body.as_object() else {
        return Err(ApiError::new(Code::BadRequest, "the body must be a JSON object"));
    };
    for (key, value) in map {
        match key.as_str() {
            "apiVersion" if value == API_VERSION => {}
            "apiVersion" => push(errors, "apiVersion", format!("must be {API_VERSION:?}")),
            "kind" if value == kind.kind => {}
            "kind" => push(errors, "kind", format!("must be {:?} at this path", kind.kind)),
            "status" if !value.is_object() => push(errors, "status", "an object (it is ignored)"),
            "metadata" | "spec" | "status" => {}
            _ => unknown(errors, "", key),
        }
    }
    Ok(map)
}

/// Reads the object of a POST or PUT. Also answers the revision in its metadata, if that is not 0.
pub(crate) fn object(expected: &Expected<'_>, body: &Value) -> Result<(AnyObject, Option<u64>), ApiError> {
    let kind = expected.place.kind;
    let mut errors = Errors::new();
    let map = top(&mut errors, kind, body)?;
    let mut meta = MetadataIn::default();
    match map.get("metadata") {
        Some(value) => meta = metadata(&mut errors, value, expected, false),
        None if expected.name.is_none() => push(&mut errors, "metadata.name", "is required"),
        None => {}
    }
    let named_wrongly = errors.iter().any(|e| e.field.starts_with("metadata.name") || e.field == "metadata");
    let name = expected.name.cloned().or(meta.name);
    if name.is_none() && !named_wrongly {
        push(&mut errors, "metadata.name", "is required");
    }
    let spec = match map.get("spec") {
        None => {
            push(&mut errors, "spec", "is required");
            Value::Null
        }
        Some(spec) => (kind.parse_spec)(spec).unwrap_or_else(|wrong| {
            errors.extend(wrong);
            Value::Null
        }),
    };
    let Some(name) = name.filter(|_| errors.is_empty()) else { return Err(ApiError::invalid(errors)) };
    let mut new = Metadata::new(name, expected.place.project.clone());
    new.organization = expected.place.organization.clone();
    new.region = matches!(kind.scope, Scope::Region | Scope::Project).then(|| expected.region.clone());
    new.labels = meta.labels;
    new.annotations = meta.annotations;
    new.deletion_protection = meta.deletion_protection;
    let object = AnyObject {
        api_version: API_VERSION.to_owned(),
        kind: kind.kind.to_owned(),
        metadata: new,
        spec,
        status: Value::Object(Map::new()),
    };
    Ok((object, (meta.revision != 0).then_some(meta.revision)))
}

/// Reads a merge patch (RFC 7396): what a user may change of an object, and nothing else, is left of it. The result's
/// validity is the writer's to judge; here, every field that the patch names must exist.
pub(crate) fn patch(expected: &Expected<'_>, shape: &SpecShape, body: &Value) -> Result<Value, ApiError> {
    let mut errors = Errors::new();
    let map = top(&mut errors, expected.place.kind, body)?;
    let mut out = Map::new();
    if let Some(value) = map.get("metadata") {
        metadata(&mut errors, value, expected, true);
        let users = |key: &str| matches!(key, "labels" | "annotations" | "deletionProtection");
        let kept = value.as_object().into_iter().flatten().filter(|(k, _)| users(k));
        let kept: Map<_, _> = kept.map(|(k, v)| (k.clone(), v.clone())).collect();
        if !kept.is_empty() {
            out.insert("metadata".into(), Value::Object(kept));
        }
    }
    if let Some(spec) = map.get("spec") {
        if spec.is_object() {
            shape.unknown_fields("spec", spec, &mut errors);
            out.insert("spec".into(), spec.clone());
        } else {
            push(&mut errors, "spec", "an object");
        }
    }
    if errors.is_empty() { Ok(Value::Object(out)) } else { Err(ApiError::invalid(errors)) }
}

#[cfg(test)]
mod tests {
    use nexus_model::kind;
    use serde_json::json;

    use super::*;
    use crate::openapi::Schemas;

    fn place(word: &str) -> Place {
        let kind = kind::find(word).unwrap();
        let local = || "local".parse().unwrap();
        Place {
            kind,
            project: (kind.scope == Scope::Project).then(|| "default".parse().unwrap()),
            organization: (kind.scope == Scope::Organization).then(|| "default".parse().unwrap()),
            region: matches!(kind.scope, Scope::Region | Scope::Project).then(local),
        }
    }

    fn fields(word: &str, name: Option<&str>, body: Value) -> Vec<String> {
        let (place, region) = (place(word), "local".parse().unwrap());
        let name = name.map(|n| n.parse().unwrap());
        let expected = Expected { place: &place, region: &region, name: name.as_ref() };
        object(&expected, &body).unwrap_err().errors.into_iter().map(|e| e.field).collect()
    }

    #[test]
    fn a_fault_is_named_by_its_place() {
        let spec = json!({"image": "web"});
        assert_eq!(fields("app", None, json!({"spec": spec})), ["metadata.name"]);
        assert_eq!(fields("app", None, json!({"metadata": {"name": "a"}})), ["spec"]);
        let body = json!({"kind": "Route", "metadata": {"name": "b", "project": "x", "color": 1}, "spec": {}, "x": 1});
        let got = fields("app", Some("a"), body);
        assert_eq!(got, ["kind", "x", "metadata.name", "metadata.project", "metadata.color", "spec.image"]);
        let body = json!({"metadata": {"name": "a", "labels": {"a b": "c"}, "uid": 5}, "spec": spec});
        assert_eq!(fields("app", None, body), ["metadata.labels.a b", "metadata.uid"]);
        let body = json!({"metadata": {"name": "a", "annotations": {"note": "x".repeat(4097)}}, "spec": spec});
        assert_eq!(fields("app", None, body), ["metadata.annotations.note"]);
        assert_eq!(fields("app", None, json!({"metadata": {"name": "-"}, "spec": spec})), ["metadata.name"]);
    }

    #[test]
    fn a_whole_number_may_have_a_point() {
        let mut value = json!({"a": [2.0, -3.0, -0.0, 1.5, 1e300, 7], "b": "2.0"});
        whole_numbers(&mut value);
        assert_eq!(value, json!({"a": [2, -3, 0, 1.5, 1e300, 7], "b": "2.0"}));
    }

    #[test]
    fn a_fetched_object_can_be_sent_back() {
        let (place, region) = (place("app"), "local".parse().unwrap());
        let name = "web".parse().unwrap();
        let expected = Expected { place: &place, region: &region, name: Some(&name) };
        let body = json!({
            "apiVersion": API_VERSION, "kind": "App",
            "metadata": {
                "name": "web", "project": "default", "region": "local", "generation": 3, "revision": 42,
                "uid": "0a0a0a0a-0000-8000-8000-000000000000", "created": "2023-11-14T22:13:20.123Z",
                "labels": {"tier": "front"},
                "owner": {"kind": "App", "name": "x", "uid": "0a0a0a0a-0000-8000-8000-000000000000"},
            },
            "spec": {"image": "web"}, "status": {"phase": "Ready"},
        });
        let (object, revision) = object(&expected, &body).unwrap();
        assert_eq!((revision, object.metadata.revision, object.status), (Some(42), 0, json!({})));
        assert_eq!(object.metadata.region, Some(region.clone()));
        assert_eq!(object.spec["resources"]["pids"], 512);
    }

    #[test]
    fn a_patch_keeps_what_a_user_may_change_and_knows_its_fields() {
        let (place, region) = (place("app"), "local".parse().unwrap());
        let name = "web".parse().unwrap();
        let expected = Expected { place: &place, region: &region, name: Some(&name) };
        let schemas = Schemas::generate();
        let read = |body: Value| patch(&expected, &schemas.of(place.kind).shape, &body);
        let body =
            json!({"metadata": {"labels": {"a": null}, "uid": "x"}, "spec": {"replicas": 2}, "status": {"a": 1}});
        assert_eq!(read(body).unwrap(), json!({"metadata": {"labels": {"a": null}}, "spec": {"replicas": 2}}));
        let wrong = |body| read(body).unwrap_err().errors.into_iter().map(|e| e.field).collect::<Vec<_>>();
        assert_eq!(wrong(json!({"spec": {"replcas": null}})), ["spec.replcas"]);
        assert_eq!(
            wrong(json!({"spec": {"health": {"readiness": {"probe": {"icmp": {}}}}}})),
            ["spec.health.readiness.probe.icmp"]
        );
        assert_eq!(wrong(json!({"spec": {"ports": [{"prot": 1}]}})), ["spec.ports[0].prot"]);
        assert_eq!(wrong(json!({"metadata": {"name": "other"}})), ["metadata.name"]);
        assert!(read(json!({"spec": {"env": {"ANY": null}, "classes": {"gpu": null}}})).is_ok());
        assert!(read(json!([])).is_err());
    }
}
