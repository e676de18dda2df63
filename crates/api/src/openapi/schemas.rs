//! Components: for each kind `App`, `AppInput` (POST), `AppReplacement` (PUT), `AppPatch` (PATCH) and `AppList`; and what
//! they are made of.
//!
//! The types' own schemas are made stricter where the API is: objects are closed, integers end where their types do, and a
//! spec's property is required when the example is not valid without it.

use std::sync::Arc;

use nexus_model::kind::{self, GLOBAL, KindDescriptor, MAX_ANNOTATION, Scope};
use nexus_model::selector::{LABEL_KEY_PATTERN, LABEL_VALUE_PATTERN};
use nexus_model::{API_VERSION, ApiError, FieldError, Metadata, Name};
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::doors::ClusterStatus;
use crate::input::MAX_INTEGER;

const PREFIX: &str = "#/components/schemas/";

/// The schemas of all kinds, and what generic code learns from them.
pub(crate) struct Schemas {
    definitions: Arc<Map<String, Value>>,
    patches: Map<String, Value>,
    kinds: Vec<KindSchema>,
}

/// What is known of one kind by its schemas.
pub(crate) struct KindSchema {
    kind: &'static str,
    status: Value,
    patch: Value,
    pub shape: SpecShape,
    /// Its status tells a phase: there is something to wait for.
    pub has_phase: bool,
    pub has_observed_generation: bool,
}

/// Which fields a spec has, to any depth.
pub(crate) struct SpecShape {
    schema: Value,
    definitions: Arc<Map<String, Value>>,
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("{PREFIX}{name}")})
}

fn is_type(schema: &Value, name: &str) -> bool {
    match &schema["type"] {
        Value::String(one) => one == name,
        Value::Array(some) => some.iter().any(|t| t == name),
        _ => false,
    }
}

/// Makes a schema say all that the API checks: see the head of this file.
fn tighten(schema: &mut Value) {
    match schema {
        Value::Array(list) => list.iter_mut().for_each(tighten),
        Value::Object(map) => {
            if map.get("type").is_some_and(|t| t == "object" || t[0] == "object")
                && !map.contains_key("additionalProperties")
            {
                map.insert("additionalProperties".into(), Value::Bool(false));
            }
            let maximum = match map.get("format").and_then(Value::as_str) {
                Some("uint16") => Some(json!(u16::MAX)),
                Some("uint32") => Some(json!(u32::MAX)),
                Some("int32") => Some(json!(i32::MAX)),
                // Whole in every JSON reader.
                Some("uint64" | "int64" | "uint") => Some(json!(MAX_INTEGER)),
                _ => None,
            };
            if let Some(maximum) = maximum {
                // These formats are Rust's, and say nothing that the bounds don't.
                let format = map.remove("format");
                let minimum = if format == Some(json!("int32")) { json!(i32::MIN) } else { json!(0) };
                map.entry("minimum").or_insert(minimum);
                map.entry("maximum").or_insert(maximum);
            }
            for (key, value) in map.iter_mut() {
                match key.as_str() {
                    "properties" | "patternProperties" | "$defs" => {
                        value.as_object_mut().into_iter().flatten().for_each(|(_, v)| tighten(v));
                    }
                    "default" | "examples" | "example" | "const" | "enum" | "required" => {}
                    _ => tighten(value),
                }
            }
        }
        _ => {}
    }
}

/// Without which properties the example is not valid.
fn required(kind: &KindDescriptor) -> Vec<Value> {
    let Value::Object(example) = (kind.example)() else { return Vec::new() };
    let needed = example.keys().filter(|key| {
        let mut without = example.clone();
        without.shift_remove(key.as_str());
        (kind.parse_spec)(&Value::Object(without)).is_err()
    });
    needed.map(|k| Value::String(k.clone())).collect()
}

fn resolve<'a>(mut schema: &'a Value, definitions: &'a Map<String, Value>) -> &'a Value {
    while let Some(to) = schema["$ref"].as_str() {
        match to.strip_prefix(PREFIX).and_then(|name| definitions.get(name)) {
            Some(next) => schema = next,
            None => break,
        }
    }
    schema
}

fn branches(schema: &Value) -> impl Iterator<Item = &Value> {
    ["oneOf", "anyOf"].into_iter().filter_map(|k| schema[k].as_array()).flatten()
}

impl SpecShape {
    /// Finds fields that a partial spec names and the kind does not have. Their types are not judged.
    pub fn unknown_fields(&self, at: &str, value: &Value, errors: &mut Vec<FieldError>) {
        self.check(at, value, &[&self.schema], errors);
    }

    /// `schemas` are alternatives.
    fn check(&self, at: &str, value: &Value, schemas: &[&Value], errors: &mut Vec<FieldError>) {
        // Alternatives within alternatives are laid flat.
        let mut flat: Vec<&Value> = Vec::new();
        let mut open: Vec<&Value> = schemas.to_vec();
        while let Some(schema) = open.pop() {
            let schema = resolve(schema, &self.definitions);
            open.extend(branches(schema));
            flat.push(schema);
        }
        match value {
            Value::Object(map) => {
                let objects: Vec<_> = flat.iter().filter(|s| is_type(s, "object")).collect();
                if objects.is_empty() {
                    return;
                }
                for (key, value) in map {
                    let inner: Vec<&Value> = objects.iter().filter_map(|s| member(s, key)).collect();
                    let shown: String = key.chars().take(80).collect();
                    let at = format!("{at}.{shown}");
                    if inner.is_empty() {
                        errors.push(FieldError::new(at, "there is no such field"));
                    } else {
                        self.check(&at, value, &inner, errors);
                    }
                }
            }
            Value::Array(list) => {
                let items: Vec<&Value> = flat.iter().filter_map(|s| s.get("items")).collect();
                if !items.is_empty() {
                    list.iter().enumerate().for_each(|(i, v)| self.check(&format!("{at}[{i}]"), v, &items, errors));
                }
            }
            _ => {}
        }
    }
}

/// The schema of an object's member, if it may have one of that name.
fn member<'a>(schema: &'a Value, key: &str) -> Option<&'a Value> {
    if let Some(found) = schema["properties"].get(key) {
        return Some(found);
    }
    // Keys of maps are checked by whoever reads the map; here any will do.
    let pattern = schema["patternProperties"].as_object().and_then(|p| p.values().next());
    pattern.or_else(|| schema.get("additionalProperties").filter(|a| **a != Value::Bool(false)))
}

fn nullable(schema: Value) -> Value {
    let already = is_type(&schema, "null") || branches(&schema).any(|b| is_type(b, "null"));
    if already { schema } else { json!({"anyOf": [schema, {"type": "null"}]}) }
}

/// Makes schemas for merge patches: every member may be left out, or be null to be removed if it isn't required. Arrays are replaced whole, so
/// their items stay as they are.
struct Patcher<'a> {
    definitions: &'a Map<String, Value>,
    out: Map<String, Value>,
}

impl Patcher<'_> {
    fn transform(&mut self, schema: &Value) -> Value {
        if let Some(name) = schema["$ref"].as_str().and_then(|r| r.strip_prefix(PREFIX)) {
            let Some(definition) = self.definitions.get(name) else { return schema.clone() };
            let tagged = branches(definition).any(|b| is_type(b, "object"));
            if !is_type(definition, "object") && !tagged {
                return schema.clone();
            }
            let patch = format!("{name}Patch");
            if !self.out.contains_key(&patch) {
                // Held first, so that a type within itself comes to an end.
                self.out.insert(patch.clone(), Value::Null);
                let made = self.transform(definition);
                self.out.insert(patch.clone(), made);
            }
            return reference(&patch);
        }
        let mut out = schema.clone();
        let Some(map) = out.as_object_mut() else { return out };
        map.shift_remove("default");
        let variants: Vec<&Value> = branches(schema).collect();
        let tagged =
            !variants.is_empty() && variants.iter().all(|v| v["properties"].as_object().is_some_and(|p| p.len() == 1));
        if tagged {
            // One of several members in the whole; in a patch one may replace another, which is then null.
            let mut properties = Map::new();
            for (key, value) in variants.iter().filter_map(|v| v["properties"].as_object()).flatten() {
                properties.insert(key.clone(), nullable(self.transform(value)));
            }
            return json!({"type": "object", "properties": properties, "additionalProperties": false});
        }
        let needed = map.shift_remove("required").unwrap_or_default();
        let needed = |name: &str| needed.as_array().is_some_and(|n| n.iter().any(|n| n == name));
        for key in ["properties", "patternProperties"] {
            if let Some(Value::Object(members)) = map.get_mut(key) {
                for (name, member) in members {
                    let made = self.transform(member);
                    *member = if needed(name) { made } else { nullable(made) };
                }
            }
        }
        if let Some(rest) = map.get_mut("additionalProperties").filter(|a| a.is_object()) {
            *rest = nullable(self.transform(rest));
        }
        for key in ["oneOf", "anyOf"] {
            if let Some(Value::Array(list)) = map.get_mut(key) {
                list.iter_mut().for_each(|branch| *branch = self.transform(branch));
            }
        }
        out
    }
}

impl Schemas {
    pub fn generate() -> Self {
        let mut settings = SchemaSettings::draft2020_12();
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
        let mut generator = SchemaGenerator::new(settings);
        let parts: Vec<_> = kind::all()
            .iter()
            .map(|d| {
                let spec = (d.spec_schema)(&mut generator).to_value();
                (d, spec, (d.status_schema)(&mut generator).to_value())
            })
            .collect();
        generator.subschema_for::<Metadata>();
        generator.subschema_for::<ApiError>();
        generator.subschema_for::<ClusterStatus>();
        let mut definitions: Map<String, Value> = generator.take_definitions(true);
        definitions.values_mut().for_each(tighten);
        for (d, spec, _) in &parts {
            let needed = required(d);
            let name = spec["$ref"].as_str().and_then(|r| r.strip_prefix(PREFIX));
            let schema = name.and_then(|n| definitions.get_mut(n)).and_then(Value::as_object_mut);
            if let Some(schema) = schema.filter(|_| !needed.is_empty()) {
                for key in needed.iter().filter_map(Value::as_str) {
                    if let Some(property) = schema["properties"][key].as_object_mut() {
                        property.shift_remove("default");
                    }
                }
                schema.insert("required".into(), Value::Array(needed));
            }
        }
        let definitions = Arc::new(definitions);
        let mut patcher = Patcher { definitions: &definitions, out: Map::new() };
        let mut kinds = Vec::new();
        for (d, spec, status) in parts {
            let whole = resolve(&status, &definitions);
            kinds.push(KindSchema {
                kind: d.kind,
                patch: patcher.transform(&spec),
                has_phase: whole["properties"].get("phase").is_some(),
                has_observed_generation: whole["properties"].get("observedGeneration").is_some(),
                shape: SpecShape { schema: spec, definitions: Arc::clone(&definitions) },
                status,
            });
        }
        let patches = patcher.out;
        Self { definitions, patches, kinds }
    }

    pub fn of(&self, kind: &KindDescriptor) -> &KindSchema {
        self.kinds.iter().find(|k| k.kind == kind.kind).expect("made from all kinds")
    }

    /// `components.schemas` of the document.
    pub fn components(&self, region: &Name) -> Map<String, Value> {
        let mut out = Map::new();
        for d in kind::all() {
            self.add_kind(&mut out, d);
        }
        let mut add = |name: &str, schema: Value| {
            let before = out.insert(name.to_owned(), schema);
            assert!(before.is_none(), "two schemas are called {name}");
        };
        add("Problem", reference("ApiError"));
        add(
            "BlobReceipt",
            json!({
                "type": "object", "additionalProperties": false, "required": ["digest", "size"],
                "properties": {
                    "digest": {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"},
                    "size": {"type": "integer", "minimum": 0},
                },
            }),
        );
        add(
            "ListMetadata",
            json!({
                "type": "object", "additionalProperties": false, "required": ["revision"],
                "properties": {
                    "revision": {"type": "integer", "minimum": 0, "description": "What a watch may begin after."},
                    "cursor": {"type": "string", "description": "There may be more: ask again with this."},
                },
            }),
        );
        for scope in [Scope::Global, Scope::Project, Scope::Organization] {
            let owner = owner(scope);
            let name = |suffix: &str| format!("{}Metadata{suffix}", owner.map_or("", |(prefix, _)| prefix));
            let field = owner.map(|(_, field)| field);
            add(&name("Input"), metadata_input(region, field, &["name"], false));
            add(&name("Replacement"), metadata_input(region, field, &[], false));
            add(&name("Patch"), metadata_input(region, field, &[], true));
        }
        for (name, schema) in self.definitions.iter().chain(&self.patches) {
            add(name, schema.clone());
        }
        out
    }

    fn add_kind(&self, out: &mut Map<String, Value>, d: &KindDescriptor) {
        let schema = self.of(d);
        let api_version = json!({"type": "string", "const": API_VERSION});
        let kind = json!({"type": "string", "const": d.kind});
        let name = d.kind;
        let scoped = |suffix: &str| {
            let prefix = owner(d.scope).map_or("", |(prefix, _)| prefix);
            reference(&format!("{prefix}Metadata{suffix}"))
        };
        out.insert(
            name.into(),
            json!({
                "type": "object", "additionalProperties": false, "description": d.about,
                "required": ["apiVersion", "kind", "metadata", "spec", "status"],
                "properties": {
                    "apiVersion": api_version, "kind": kind, "metadata": reference("Metadata"),
                    "spec": schema.shape.schema, "status": schema.status,
                },
            }),
        );
        let list_kind = json!({"type": "string", "const": format!("{name}List")});
        out.insert(
            format!("{name}List"),
            json!({
                "type": "object", "additionalProperties": false,
                "required": ["apiVersion", "kind", "metadata", "items"],
                "properties": {
                    "apiVersion": api_version, "kind": list_kind, "metadata": reference("ListMetadata"),
                    "items": {"type": "array", "items": reference(name)},
                },
            }),
        );
        let ignored = json!({"type": "object", "additionalProperties": true, "description": "Accepted and ignored."});
        let input = |metadata: Value, spec: &Value, required: Value| {
            json!({
                "type": "object", "additionalProperties": false, "required": required,
                "properties": {
                    "apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec, "status": ignored,
                },
            })
        };
        let spec = &schema.shape.schema;
        if d.verbs.create {
            out.insert(format!("{name}Input"), input(scoped("Input"), spec, json!(["metadata", "spec"])));
        }
        if d.verbs.update {
            out.insert(format!("{name}Replacement"), input(scoped("Replacement"), spec, json!(["spec"])));
            let mut patch = input(scoped("Patch"), &schema.patch, json!([]));
            patch.as_object_mut().expect("made above").shift_remove("required");
            out.insert(format!("{name}Patch"), patch);
        }
    }
}

/// What a body's metadata may say. The cloud's own fields are accepted and ignored.
/// What objects of a scope belong to: the prefix of their schemas, and the field of their metadata.
fn owner(scope: Scope) -> Option<(&'static str, &'static str)> {
    match scope {
        Scope::Global | Scope::Region => None,
        Scope::Project => Some(("Project", "project")),
        Scope::Organization => Some(("Organization", "organization")),
    }
}

fn metadata_input(region: &Name, owner: Option<&str>, required: &[&str], patch: bool) -> Value {
    let name = json!({"type": "string", "minLength": 1, "maxLength": 63, "pattern": Name::PATTERN});
    let short = json!({"type": "string", "maxLength": 64, "description": "Accepted and ignored."});
    let count = json!({
        "type": "integer", "minimum": 0, "maximum": MAX_INTEGER, "description": "Accepted and ignored.",
    });
    let or_null = |schema: Value| if patch { nullable(schema) } else { schema };
    let map = |value: Value| {
        or_null(json!({
            "type": "object", "maxProperties": 64, "propertyNames": {"pattern": LABEL_KEY_PATTERN},
            "additionalProperties": or_null(value),
        }))
    };
    let mut properties = json!({
        "name": name,
        "region": {"type": "string", "enum": [region, GLOBAL]},
        "labels": map(json!({"type": "string", "pattern": LABEL_VALUE_PATTERN})),
        "annotations": map(json!({"type": "string", "maxLength": MAX_ANNOTATION})),
        "deletionProtection": or_null(json!({"type": "boolean"})),
        "uid": short, "created": short, "deleting": short, "requestId": short,
        "generation": count,
        "revision": {
            "type": "integer", "minimum": 0, "maximum": MAX_INTEGER,
            "description": "In a PUT, and not 0: the revision that is meant to be replaced. Ignored elsewhere.",
        },
        "owner": {
            "type": "object", "additionalProperties": false, "required": ["kind", "name", "uid"],
            "properties": {"kind": short, "name": short, "uid": short},
            "description": "Accepted and ignored.",
        },
    });
    if let Some(owner) = owner {
        properties[owner] = name.clone();
    }
    let mut out = json!({"type": "object", "additionalProperties": false, "properties": properties});
    if !required.is_empty() {
        out["required"] = json!(required);
    }
    out
}
