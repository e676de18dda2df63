//! A secret: values that only what names it, and whoever may reveal it, gets to see.
//!
//! What is written holds values in clear; the server that takes the request seals them, and nothing behind it sees them:
//! not the writer, the store, the log of what was done, nor any list. An object holds the version and the names of its
//! keys; the sealed values stand in rows of their own, one for each version.

use std::collections::BTreeMap;
use std::fmt;

use indexmap::IndexMap;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use zeroize::Zeroize as _;

use super::{Column, Home, Kind, Scope, Verbs};
use crate::secret::{KEY_PATTERN, MAX_KEYS, SecretData, SecretValue};
use crate::{Condition, FieldError, Name, Timestamp};

/// Versions of a secret that are kept; the oldest go first.
pub const SECRET_VERSIONS: usize = 10;
/// References of one app to secrets, and variables that one of them sets.
pub const MAX_SECRETS: usize = 16;
/// Where a container finds a secret's files, unless the app says.
pub const SECRETS_DIR: &str = "/run/secrets";

/// A text that `Debug` hides and that is wiped when it is dropped.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClearText(String);

impl ClearText {
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl Drop for ClearText {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for ClearText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClearText(…)")
    }
}

#[derive(Debug, Clone)]
pub struct Secret;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SecretSpec {
    /// Texts by key. Written and never read back; without it and `binary`, the values stay as they are.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "texts")]
    #[schemars(
        with = "Option<BTreeMap<String, String>>",
        extend("maxProperties" = MAX_KEYS, "propertyNames" = {"pattern": KEY_PATTERN}, "writeOnly" = true),
    )]
    pub data: Option<BTreeMap<String, ClearText>>,
    /// Likewise, values in base64 that are no text.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "texts")]
    #[schemars(
        with = "Option<BTreeMap<String, String>>",
        extend("maxProperties" = MAX_KEYS, "propertyNames" = {"pattern": KEY_PATTERN}, "writeOnly" = true),
    )]
    pub binary: Option<BTreeMap<String, ClearText>>,
    /// The sealed values of a new version, on their way to the store. Written by the server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sealed: Option<String>,
    /// The newest version. Written by the server.
    pub version: u64,
    /// The keys of the newest version. Written by the server.
    pub keys: Vec<String>,
}

/// Texts by key. What serde says of a wrong type would show the value.
fn texts<'de, D: Deserializer<'de>>(d: D) -> Result<Option<BTreeMap<String, ClearText>>, D::Error> {
    let wrong = || serde::de::Error::custom("an object of texts by key");
    let map = match serde_json::Value::deserialize(d)? {
        serde_json::Value::Null => return Ok(None),
        serde_json::Value::Object(map) => map,
        _ => return Err(wrong()),
    };
    let text = |(key, value)| match value {
        serde_json::Value::String(text) => Ok((key, ClearText(text))),
        _ => Err(wrong()),
    };
    map.into_iter().map(text).collect::<Result<_, _>>().map(Some)
}

/// A version that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretVersion {
    pub version: u64,
    pub created: Timestamp,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SecretStatus {
    /// Those that are kept, the oldest first.
    pub versions: Vec<SecretVersion>,
    pub conditions: Vec<Condition>,
}

impl SecretSpec {
    /// The values that a write brings, or what is wrong with them. `None`: it brings none.
    pub fn brought(&self) -> Result<Option<SecretData>, Vec<FieldError>> {
        if self.version > MAX_VERSION {
            return Err(vec![FieldError::new("spec.version", "is written by the server: leave it out")]);
        }
        if self.data.is_none() && self.binary.is_none() {
            return Ok(None);
        }
        let mut data = SecretData::default();
        let mut errors = Vec::new();
        for (key, text) in self.data.iter().flatten() {
            data.0.insert(key.clone(), SecretValue::new(text.expose().as_bytes().to_vec()));
        }
        for (key, text) in self.binary.iter().flatten() {
            let field = || format!("spec.binary.{}", key.chars().take(64).collect::<String>());
            match SecretValue::from_base64(text.expose()) {
                Some(_) if data.0.contains_key(key) => errors.push(FieldError::new(field(), "stands in data too")),
                Some(value) => drop(data.0.insert(key.clone(), value)),
                None => errors.push(FieldError::new(field(), "not base64")),
            }
        }
        errors.extend(data.check());
        if errors.is_empty() { Ok(Some(data)) } else { Err(errors) }
    }
}

impl Kind for Secret {
    const KIND: &'static str = "Secret";
    const PLURAL: &'static str = "secrets";
    const SHORT: &'static [&'static str] = &[];
    const ABOUT: &'static str = "Values that apps get as files or variables. They are sealed at rest, have versions, and are never read back but by `:reveal`.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Either;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[Column::new("VERSION", "/spec/version"), Column::count("KEYS", "/spec/keys")];
    type Spec = SecretSpec;
    type Status = SecretStatus;

    fn validate(spec: &SecretSpec) -> Vec<FieldError> {
        spec.brought().err().unwrap_or_default()
    }

    fn example() -> SecretSpec {
        let text = |t: &str| ClearText(t.to_owned());
        SecretSpec {
            data: Some(BTreeMap::from([("password".into(), text("correct horse battery staple"))])),
            ..SecretSpec::default()
        }
    }
}

/// What an app wants of a secret: variables, or else a folder of files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// A secret of the same project: the region's own, else that of the region `global`.
    pub name: Name,
    /// The newest, without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub version: Option<u64>,
    /// Keys of the secret by the variables that they are the values of. What a process finds there never changes, so a new
    /// version makes new instances.
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    #[schemars(
        with = "IndexMap<String, String>",
        extend("maxProperties" = MAX_KEYS, "propertyNames" = {"pattern": VARIABLE}, "additionalProperties" = {"type": "string", "pattern": KEY_PATTERN}),
    )]
    pub env: IndexMap<String, String>,
    /// The folder in which a container finds a file for each key; those of a new version take their place while it runs.
    /// Without it and `env`: `/run/secrets/NAME`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = MAX_PATH), regex(pattern = PATH))]
    pub path: Option<String>,
}

const VARIABLE: &str = "^[A-Za-z_][A-Za-z0-9_]{0,127}$";
pub(super) const PATH: &str = "^(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+$";
pub(super) const MAX_PATH: usize = 255;
/// JSON has no whole numbers beyond this that all readers agree on.
const MAX_VERSION: u64 = (1 << 53) - 1;
/// What is not ours to mount over.
const TAKEN: [&str; 5] = ["/proc", "/sys", "/dev", "/etc", "/run/spiffe"];

/// The same of a path that matches [`PATH`], and what is above them.
pub(super) const TAKEN_PATTERN: &str = "^/((proc|sys|dev|etc|run/spiffe)(/|$)|run$)";

/// Whether a folder is in the way of what is not ours to mount over.
pub(super) fn is_taken(folder: &str) -> bool {
    TAKEN.iter().any(|t| overlaps(folder, t))
}

fn is_variable(text: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=128).contains(&text.len()) && text.bytes().all(good) && !text.starts_with(|c: char| c.is_ascii_digit())
}

pub(super) fn is_path(text: &str) -> bool {
    let good = |part: &str| crate::secret::is_key(part) || part.len() > 128;
    text.len() <= MAX_PATH && text.strip_prefix('/').is_some_and(|rest| rest.split('/').all(good))
}

/// Whether one of two folders is in the other, or is it.
pub(super) fn overlaps(a: &str, b: &str) -> bool {
    let within = |a: &str, b: &str| a.strip_prefix(b).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    within(a, b) || within(b, a)
}

impl SecretRef {
    /// Where its files are to be, if it wants files.
    pub fn folder(&self) -> Option<String> {
        match &self.path {
            Some(path) => Some(path.clone()),
            None => self.env.is_empty().then(|| format!("{SECRETS_DIR}/{}", self.name)),
        }
    }

    /// Whether a new version changes what runs, without a new instance.
    pub fn follows(&self) -> bool {
        self.version.is_none() && self.env.is_empty()
    }
}

/// What is wrong with an app's references. `env`: the variables that it sets itself.
pub(super) fn validate_refs(refs: &[SecretRef], env: &IndexMap<String, String>, files: bool) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mut check = |ok: bool, field: String, message: &str| {
        if !ok {
            errors.push(FieldError::new(field, message));
        }
    };
    check(refs.len() <= MAX_SECRETS, "spec.secrets".into(), "at most 16");
    for (i, r) in refs.iter().enumerate().take(MAX_SECRETS) {
        let at = |field: &str| format!("spec.secrets[{i}].{field}");
        check(r.version.is_none_or(|v| (1..=MAX_VERSION).contains(&v)), at("version"), "versions begin at 1");
        check(r.env.is_empty() || r.path.is_none(), at("path"), "a reference has variables or files: write two");
        check(r.env.len() <= MAX_KEYS, at("env"), "at most 64 variables");
        for (variable, key) in &r.env {
            let field = || at(&format!("env.{}", variable.chars().take(64).collect::<String>()));
            check(is_variable(variable), field(), "a variable has letters, digits and '_', and begins with no digit");
            check(crate::secret::is_key(key), field(), "names no key of a secret");
            let twice = env.contains_key(variable) || refs[..i].iter().any(|other| other.env.contains_key(variable));
            check(!twice, field(), "this variable is set twice");
        }
        let Some(folder) = r.folder() else { continue };
        check(files, at("path"), "a function has no file system: use env");
        check(is_path(&folder), at("path"), "an absolute path of plain names, such as /run/secrets/tls");
        check(!is_taken(&folder), at("path"), "holds what the cloud itself puts there");
        let others = refs[..i].iter().filter_map(SecretRef::folder);
        check(!others.into_iter().any(|o| overlaps(&o, &folder)), at("path"), "is in the way of another secret's");
    }
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_read_and_never_shown() {
        let parse = super::super::find("secret").unwrap().parse_spec;
        let spec: SecretSpec =
            serde_json::from_value(parse(&json!({"data": {"a": "hunter2"}, "binary": {"b": "AP8="}})).unwrap())
                .unwrap();
        assert_eq!(spec.brought().unwrap().unwrap().keys(), ["a", "b"]);
        assert!(!format!("{spec:?}").contains("hunter2"));
        for (wrong, field) in [
            (json!({"data": {"a/b": "x"}}), "spec.data.a/b"),
            (json!({"data": {}}), "spec.data"),
            (json!({"data": "hunter2"}), "spec.data"),
            (json!({"data": {"a": ["hunter2"]}}), "spec.data"),
            (json!({"binary": {"b": "hunter2!"}}), "spec.binary.b"),
            (json!({"data": {"b": "x"}, "binary": {"b": "AP8="}}), "spec.binary.b"),
        ] {
            let errors = parse(&wrong).unwrap_err();
            assert_eq!(errors[0].field, field);
            assert!(!format!("{errors:?}").contains("hunter2"));
        }
        assert!(parse(&json!({})).is_ok(), "values may stay as they are");
    }

    #[test]
    fn references_are_variables_or_files_and_never_both() {
        let wrong = |refs: serde_json::Value| -> Vec<String> {
            let spec = json!({"image": "web", "env": {"TAKEN": "1"}, "secrets": refs});
            let parse = super::super::find("app").unwrap().parse_spec;
            parse(&spec).err().unwrap_or_default().into_iter().map(|e| e.field).collect()
        };
        assert!(wrong(json!([{"name": "a"}, {"name": "b", "env": {"X": "k"}, "version": 2}])).is_empty());
        assert!(wrong(json!([{"name": "a", "path": "/srv/a"}, {"name": "a", "path": "/srv/ab"}])).is_empty());
        for (refs, field) in [
            (json!([{"name": "a", "env": {"X": "k"}, "path": "/srv"}]), "spec.secrets[0].path"),
            (json!([{"name": "a", "env": {"TAKEN": "k"}}]), "spec.secrets[0].env.TAKEN"),
            (json!([{"name": "a", "env": {"1": "k"}}]), "spec.secrets[0].env.1"),
            (json!([{"name": "a", "env": {"X": ".."}}]), "spec.secrets[0].env.X"),
            (json!([{"name": "a", "version": 0}]), "spec.secrets[0].version"),
            (json!([{"name": "a"}, {"name": "b", "path": "/run/secrets"}]), "spec.secrets[1].path"),
        ] {
            assert_eq!(wrong(refs), [field]);
        }
        for path in ["srv", "/", "/a/../b", "/a//b", "/proc/x", "/etc", "/run", "/run/spiffe", "/a b"] {
            assert_eq!(wrong(json!([{"name": "a", "path": path}])), ["spec.secrets[0].path"], "{path}");
        }
    }
}
