//! The parts of an instance beside its main one: init steps, which run to their end before it starts, and sidecars, which run
//! beside it. They share its network and a folder. Each has a sandbox of its own, known by an id that follows from the
//! instance's and the part's name.

use std::collections::BTreeSet;

use indexmap::IndexMap;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::app::{
    HealthCheck, MAX_BYTES, MAX_TEXT, Resources, Runtime, SCRATCH_PATTERN, TEXT_PATTERN, Template, VARIABLE_PATTERN,
    check_health, check_resources, check_words,
};
use super::secret::{self, SecretRef};
use crate::{Bytes, FieldError, MilliCpu, Name, Timestamp};

/// Init steps, and likewise sidecars, of one instance.
pub const MAX_PARTS: usize = 8;
/// Where parts find the folder that they share, unless the app says.
pub const SHARED_DIR: &str = "/run/shared";

/// A container that an instance has beside its main one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Part {
    /// One of its own within the app.
    pub name: Name,
    /// The name of an `Image` of the same project; the app's own, without it. `none` is no image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("not" = {"const": "none"}))]
    pub image: Option<Name>,
    /// In place of the image's entry point.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = MAX_TEXT), regex(pattern = TEXT_PATTERN)))]
    pub command: Vec<String>,
    /// In place of the image's arguments.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256), inner(length(max = MAX_TEXT), regex(pattern = TEXT_PATTERN)))]
    pub args: Vec<String>,
    #[serde(default, skip_serializing_if = "IndexMap::is_empty")]
    #[schemars(extend(
        "maxProperties" = 256,
        "propertyNames" = {"pattern": VARIABLE_PATTERN},
        "additionalProperties" = {"type": "string", "maxLength": MAX_TEXT, "pattern": TEXT_PATTERN},
    ))]
    pub env: IndexMap<String, String>,
    /// Secrets that this part gets, as variables or as files: those of the app are its main part's alone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = secret::MAX_SECRETS))]
    pub secrets: Vec<SecretRef>,
    /// Its own. An instance reserves the sum of its main part and its sidecars, and of each amount at least what its largest
    /// init step takes.
    #[serde(default)]
    pub resources: Resources,
    /// Of a sidecar: the instance is ready when this is well too. Without it, when it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<HealthCheck>,
}

/// The folder that the parts of an instance share. It is on disk, and goes with the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SharedFolder {
    /// Where each part finds it.
    #[schemars(length(max = secret::MAX_PATH), regex(pattern = secret::PATH), extend("not" = {"pattern": secret::TAKEN_PATTERN}))]
    pub path: String,
    /// What it holds at most. It counts as scratch.
    #[schemars(range(min = 65_536, max = 9_007_199_254_740_991u64), regex(pattern = SCRATCH_PATTERN))]
    pub size: Bytes,
}

impl Default for SharedFolder {
    fn default() -> Self {
        Self { path: SHARED_DIR.into(), size: Bytes(64 << 20) }
    }
}

/// Init steps: parts without a check.
pub(super) fn init_schema(generator: &mut SchemaGenerator) -> Schema {
    let mut part = generator.subschema_for::<Part>();
    part.insert("properties".into(), serde_json::json!({"readiness": {"type": "null"}}));
    json_schema!({"type": "array", "maxItems": MAX_PARTS, "items": part})
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum PartRole {
    #[default]
    Init,
    Sidecar,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum PartState {
    /// Its turn has not come.
    #[default]
    Waiting,
    /// The host fetches its image or creates its sandbox.
    Starting,
    Running,
    /// It ended and waits for its back-off to pass before it is started again.
    BackOff,
    Stopping,
    /// An init step that has succeeded.
    Done,
    /// A sidecar of an instance that has stopped.
    Stopped,
}

/// How one part of an instance does.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PartStatus {
    pub name: Name,
    pub role: PartRole,
    pub state: PartState,
    /// Of a sidecar: whether the instance may be ready as far as this is concerned.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ready: bool,
    #[serde(default)]
    pub restarts: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<Timestamp>,
    /// Of its last end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// Why it does not do what it should, in a sentence.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

impl PartStatus {
    pub fn new(name: Name, role: PartRole) -> Self {
        let (restarts, started, exit_code, message) = Default::default();
        Self { name, role, state: PartState::Waiting, ready: false, restarts, started, exit_code, message }
    }
}

/// The parts of a template or of an app's spec, which have the same fields.
#[derive(Debug, Clone, Copy)]
pub struct Parts<'a> {
    pub image: &'a Name,
    pub secrets: &'a [SecretRef],
    pub resources: &'a Resources,
    pub init: &'a [Part],
    pub sidecars: &'a [Part],
    pub shared: Option<&'a SharedFolder>,
}

impl<'a> Parts<'a> {
    /// Init steps and then sidecars, each in its order.
    pub fn all(self) -> impl Iterator<Item = (PartRole, &'a Part)> {
        let init = self.init.iter().map(|part| (PartRole::Init, part));
        init.chain(self.sidecars.iter().map(|part| (PartRole::Sidecar, part)))
    }

    pub fn find(self, name: &Name) -> Option<(PartRole, &'a Part)> {
        self.all().find(|(_, part)| part.name == *name)
    }

    pub fn is_empty(self) -> bool {
        self.init.is_empty() && self.sidecars.is_empty()
    }

    /// The folder that the parts share, if there is one.
    pub fn folder(self) -> Option<SharedFolder> {
        self.shared.cloned().or_else(|| (!self.is_empty()).then(SharedFolder::default))
    }

    /// Images that parts name beside the main one.
    pub fn other_images(self) -> BTreeSet<&'a Name> {
        self.all().filter_map(|(_, part)| part.image.as_ref()).filter(|image| *image != self.image).collect()
    }

    /// Whether any part is made from an image.
    pub fn names_image(self, image: &Name) -> bool {
        self.image == image || self.all().any(|(_, part)| part.image.as_ref() == Some(image))
    }

    /// The references to secrets of all parts.
    pub fn all_secrets(self) -> impl Iterator<Item = &'a SecretRef> {
        self.secrets.iter().chain(self.all().flat_map(|(_, part)| &part.secrets))
    }

    /// What an instance takes of its host, all in all: its main part and its sidecars together, of each amount at least what
    /// its largest init step takes (Kubernetes' rule), and as scratch the shared folder too. More than any host has is drawn to
    /// a bound, so that sums stay far from overflow.
    pub fn reserved(self) -> Resources {
        let mut sum = *self.resources;
        for r in self.sidecars.iter().map(|part| &part.resources) {
            sum.cpu = MilliCpu(sum.cpu.0.saturating_add(r.cpu.0));
            sum.memory = Bytes(sum.memory.0.saturating_add(r.memory.0));
            sum.pids = sum.pids.saturating_add(r.pids);
            sum.scratch = Bytes(sum.scratch.0.saturating_add(r.scratch.0));
        }
        for r in self.init.iter().map(|part| &part.resources) {
            sum.cpu = MilliCpu(sum.cpu.0.max(r.cpu.0));
            sum.memory = Bytes(sum.memory.0.max(r.memory.0));
            sum.pids = sum.pids.max(r.pids);
            sum.scratch = Bytes(sum.scratch.0.max(r.scratch.0));
        }
        let shared = self.folder().map_or(0, |folder| folder.size.0);
        sum.memory = Bytes(sum.memory.0.min(MAX_BYTES));
        sum.scratch = Bytes(sum.scratch.0.saturating_add(shared).min(MAX_BYTES));
        sum
    }
}

/// What is wrong with a template's parts.
pub(super) fn validate_parts(t: &Template) -> Vec<FieldError> {
    let mut errors = Vec::new();
    if t.runtime == Runtime::Function {
        let mut refuse = |is: bool, field: &str, message: &str| {
            if is {
                errors.push(FieldError::new(field, message));
            }
        };
        refuse(!t.init.is_empty(), "spec.init", "a function has no init steps: use a container");
        refuse(!t.sidecars.is_empty(), "spec.sidecars", "a function has no sidecars: use a container");
        refuse(t.shared.is_some(), "spec.shared", "a function has no folders");
        return errors;
    }
    let folder = t.parts().folder();
    if let Some(shared) = &t.shared {
        let good = secret::is_path(&shared.path) && !secret::is_taken(&shared.path);
        if !good {
            let message = "an absolute path of plain names that holds nothing of the cloud's own, such as /run/shared";
            errors.push(FieldError::new("spec.shared.path", message));
        }
        if !(64 << 10..=MAX_BYTES).contains(&shared.size.0) {
            errors.push(FieldError::new("spec.shared.size", "between 64Ki and 1048576Ti"));
        }
    }
    let mut taken: BTreeSet<&Name> = BTreeSet::new();
    for (list, parts) in [("init", &t.init), ("sidecars", &t.sidecars)] {
        if parts.len() > MAX_PARTS {
            errors.push(FieldError::new(format!("spec.{list}"), format!("at most {MAX_PARTS}")));
        }
        for (i, part) in parts.iter().enumerate().take(MAX_PARTS) {
            let at = format!("spec.{list}[{i}]");
            if !taken.insert(&part.name) {
                errors.push(FieldError::new(format!("{at}.name"), "another part has this name"));
            }
            errors.extend(validate_part(part, list == "init", &at));
        }
    }
    // The main part's too: all see the folder.
    let lists = std::iter::once(("spec.secrets".to_owned(), &t.secrets));
    let parts = [("init", &t.init), ("sidecars", &t.sidecars)].into_iter().flat_map(|(list, parts)| {
        parts.iter().enumerate().map(move |(i, part)| (format!("spec.{list}[{i}].secrets"), &part.secrets))
    });
    for (at, refs) in lists.chain(parts) {
        let Some(folder) = &folder else { break };
        for (i, wanted) in refs.iter().enumerate().take(secret::MAX_SECRETS) {
            if wanted.folder().is_some_and(|f| secret::overlaps(&f, &folder.path)) {
                let message = format!("is in the way of the folder that parts share, {}", folder.path);
                errors.push(FieldError::new(format!("{at}[{i}].path"), message));
            }
        }
    }
    errors
}

fn validate_part(part: &Part, is_init: bool, at: &str) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let mut check = |ok: bool, field: &str, message: &str| {
        if !ok {
            errors.push(FieldError::new(format!("{at}.{field}"), message));
        }
    };
    let named = part.image.as_ref().is_none_or(|image| *image != "none");
    check(named, "image", "name an image of this project, or leave it out; see `nexus get images`");
    check_words(&mut check, &part.command, &part.args, &part.env);
    check_resources(&mut check, &part.resources);
    match &part.readiness {
        Some(_) if is_init => check(false, "readiness", "an init step runs to its end: only sidecars are checked"),
        Some(h) => check_health(&mut check, "readiness", h, true),
        None => {}
    }
    let refs = secret::validate_refs(&part.secrets, &part.env, true);
    errors.extend(refs.into_iter().map(|e| FieldError { field: e.field.replacen("spec", at, 1), ..e }));
    errors
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn faults(spec: &Value) -> Vec<String> {
        let parsed = (crate::kind::find("app").unwrap().parse_spec)(spec);
        parsed.err().unwrap_or_default().into_iter().map(|e| e.field).collect()
    }

    #[test]
    fn a_part_says_where_its_fault_is() {
        let with = |list: &str, part: Value| json!({"image": "web", list: [{"name": "a"}, part]});
        assert_eq!(faults(&with("init", json!({"name": "b"}))), [""; 0]);
        for (part, field) in [
            (json!({"name": "a"}), "name"),
            (json!({"name": "b", "image": "none"}), "image"),
            (json!({"name": "b", "resources": {"cpu": "0"}}), "resources.cpu"),
            (json!({"name": "b", "env": {"": "x"}}), "env."),
            (json!({"name": "b", "secrets": [{"name": "s", "version": 0}]}), "secrets[0].version"),
            (json!({"name": "b", "secrets": [{"name": "s", "path": "/run/shared/x"}]}), "secrets[0].path"),
            (json!({"name": "b", "command": ["a\u{0}b"]}), "command"),
        ] {
            for list in ["init", "sidecars"] {
                assert_eq!(faults(&with(list, part.clone())), [format!("spec.{list}[1].{field}")], "{part}");
            }
        }
        let checked = json!({"name": "b", "readiness": {"probe": {"exec": {"command": ["true"]}}}});
        assert_eq!(faults(&with("sidecars", checked.clone())), [""; 0]);
        assert_eq!(faults(&with("init", checked)), ["spec.init[1].readiness"]);
        let bad = json!({"name": "b", "readiness": {"probe": {"tcp": {"port": 0}}, "failures": 0}});
        let at = |f: &str| format!("spec.sidecars[1].readiness.{f}");
        assert_eq!(faults(&with("sidecars", bad)), [at("failures"), at("probe.tcp.port")]);
        let same = json!({"image": "web", "init": [{"name": "a"}], "sidecars": [{"name": "a"}]});
        assert_eq!(faults(&same), ["spec.sidecars[0].name"]);
        let many: Vec<Value> = (0..9).map(|i| json!({"name": format!("p{i}")})).collect();
        assert_eq!(faults(&json!({"image": "web", "init": many})), ["spec.init"]);
        let function =
            json!({"image": "f", "runtime": "function", "init": [{"name": "a"}], "sidecars": [{"name": "b"}]});
        assert_eq!(faults(&function), ["spec.init", "spec.sidecars"]);
        let shared = |path: &str| json!({"image": "web", "shared": {"path": path}});
        assert_eq!(faults(&shared("/srv/www")), [""; 0]);
        for path in ["/proc", "/", "srv", "/etc/x", "/run", "/run/spiffe/x", "/a/../b"] {
            assert_eq!(faults(&shared(path)), ["spec.shared.path"], "{path}");
        }
    }

    #[test]
    fn an_instance_reserves_its_sum_and_at_least_its_largest_init_step() {
        let of = |cpu: u32, memory: u64, scratch: u64| Resources {
            cpu: MilliCpu(cpu),
            memory: Bytes(memory << 20),
            scratch: Bytes(scratch << 20),
            pids: 10,
        };
        let part = |name: &str, resources| Part { resources, ..serde_json::from_value(json!({"name": name})).unwrap() };
        let mut t = Template { resources: of(100, 100, 10), ..Template::default() };
        assert_eq!(t.parts().reserved(), of(100, 100, 10));
        t.sidecars = vec![part("a", of(50, 20, 5)), part("b", of(50, 20, 5))];
        assert_eq!(t.parts().reserved(), Resources { pids: 30, ..of(200, 140, 20 + 64) });
        t.init = vec![part("c", of(150, 500, 1)), part("d", of(300, 10, 1))];
        t.shared = Some(SharedFolder { size: Bytes(1 << 20), ..SharedFolder::default() });
        assert_eq!(t.parts().reserved(), Resources { pids: 30, ..of(300, 500, 21) });
        t.sidecars[0].resources.memory = Bytes(MAX_BYTES);
        assert_eq!(t.parts().reserved().memory, Bytes(MAX_BYTES));
    }

    #[test]
    fn a_template_without_parts_is_written_as_before() {
        let text = serde_json::to_string(&Template::default()).unwrap();
        assert!(!text.contains("init") && !text.contains("sidecars") && !text.contains("shared"), "{text}");
    }
}
