//! `nexus explain`: what a kind and its fields mean, from the same schemas that the API publishes. No cloud is needed.

use clap::Args;
use nexus_model::Metadata;
use nexus_model::kind::{KindDescriptor, Scope};
use schemars::SchemaGenerator;
use serde_json::{Map, Value, json};

use super::{output, resource};
use crate::exit::Fail;

/// Explains a kind or one of its fields
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus explain app\n  \
    nexus explain app.spec.ports\n  \
    nexus explain app.resources.memory\n  \
    nexus explain instance.status")]
pub struct ExplainArgs {
    /// KIND, or KIND.FIELD.PATH; `spec` may be left out
    #[arg(value_name = "KIND[.FIELD]")]
    what: String,
}

pub fn run(args: &ExplainArgs) -> anyhow::Result<()> {
    output::text(explain(&args.what)?.trim_end())
}

/// A kind's schemas and their shared definitions.
struct Book {
    root: Value,
    definitions: Map<String, Value>,
}

impl Book {
    fn of(kind: &KindDescriptor) -> Self {
        let mut generator = SchemaGenerator::default();
        let spec = (kind.spec_schema)(&mut generator);
        let status = (kind.status_schema)(&mut generator);
        let metadata = generator.subschema_for::<Metadata>();
        let root = json!({
            "type": "object",
            "properties": {
                "apiVersion": {"type": "string", "const": nexus_model::API_VERSION},
                "kind": {"type": "string", "const": kind.kind},
                "metadata": metadata, "spec": spec, "status": status,
            },
        });
        Self { root, definitions: generator.take_definitions(true) }
    }

    /// Follows references and looks through "or null"; the outer schema's description and default win.
    fn resolve(&self, schema: &Value) -> Value {
        let mut out = schema.clone();
        // Bounded, for schemas that refer to themselves.
        for _ in 0..16 {
            let alternatives = ["anyOf", "oneOf", "allOf"].iter().find_map(|k| out[*k].as_array());
            let real: Vec<&Value> = alternatives.into_iter().flatten().filter(|a| a["type"] != "null").collect();
            let inner = match (out["$ref"].as_str(), real.as_slice()) {
                (Some(to), _) => to.rsplit('/').next().and_then(|name| self.definitions.get(name)).cloned(),
                (None, [one]) => Some((*one).clone()),
                _ => None,
            };
            let (Some(Value::Object(mut inner)), Some(outer)) = (inner, out.as_object()) else { break };
            for (key, value) in outer {
                if !matches!(key.as_str(), "$ref" | "anyOf" | "oneOf" | "allOf") {
                    inner.insert(key.clone(), value.clone());
                }
            }
            out = Value::Object(inner);
        }
        out
    }

    /// The schemas of an object's fields: its own, and those of its alternatives.
    fn fields(&self, schema: &Value) -> Vec<(String, Value)> {
        let schema = self.resolve(schema);
        let mut fields: Vec<(String, Value)> = Vec::new();
        let mut take = |schema: &Value| {
            for (name, field) in schema["properties"].as_object().into_iter().flatten() {
                let mut field = field.clone();
                // What an alternative is for is said on the alternative.
                if field.get("description").is_none() && !schema["description"].is_null() {
                    field["description"] = schema["description"].clone();
                }
                if !fields.iter().any(|(n, _)| n == name) {
                    fields.push((name.clone(), field));
                }
            }
        };
        if let Some(own) = schema.get("properties") {
            take(&json!({"properties": own}));
        }
        for key in ["oneOf", "anyOf"] {
            for alternative in schema[key].as_array().into_iter().flatten() {
                take(&self.resolve(alternative));
            }
        }
        fields
    }

    /// The schema of what a list or map holds.
    fn inner(&self, schema: &Value) -> Option<Value> {
        let schema = self.resolve(schema);
        ["items", "additionalProperties"].iter().find_map(|k| schema.get(*k).filter(|s| s.is_object())).cloned()
    }

    /// A type in a few words, such as `[]object`.
    fn type_of(&self, schema: &Value) -> String {
        let schema = self.resolve(schema);
        if let Some(inner) = schema.get("items") {
            return format!("[]{}", self.type_of(inner));
        }
        if let Some(inner) = schema.get("additionalProperties").filter(|s| s.is_object()) {
            return format!("map of {}", self.type_of(inner));
        }
        let name = match &schema["type"] {
            Value::String(one) => Some(one.clone()),
            Value::Array(several) => {
                let named: Vec<_> = several.iter().filter_map(Value::as_str).filter(|t| *t != "null").collect();
                Some(named.join(" or "))
            }
            _ => None,
        };
        name.unwrap_or_else(|| if self.words(&schema).is_empty() { "object".into() } else { "string".into() })
    }

    /// The words that a field may hold, if they are few.
    fn words(&self, schema: &Value) -> Vec<String> {
        let schema = self.resolve(schema);
        let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
        let mut words: Vec<String> = schema["enum"].as_array().into_iter().flatten().map(text).collect();
        for alternative in ["oneOf", "anyOf"].iter().filter_map(|k| schema[*k].as_array()).flatten() {
            words.extend(alternative.get("const").map(text));
            words.extend(alternative["enum"].as_array().into_iter().flatten().map(text));
        }
        words.extend(schema.get("const").map(text));
        words
    }

    fn constraints(&self, schema: &Value) -> Vec<String> {
        let schema = self.resolve(schema);
        let mut out = Vec::new();
        let words = self.words(&schema);
        if !words.is_empty() {
            out.push(format!("one of: {}", words.join(", ")));
        }
        let names = [
            ("minimum", "at least"),
            ("maximum", "at most"),
            ("minLength", "shortest length"),
            ("maxLength", "longest length"),
            ("minItems", "fewest items"),
            ("maxItems", "most items"),
            ("maxProperties", "most entries"),
            ("pattern", "pattern"),
        ];
        for (key, name) in names {
            match schema.get(key) {
                Some(Value::String(text)) => out.push(format!("{name}: {text}")),
                Some(value) => out.push(format!("{name}: {value}")),
                None => {}
            }
        }
        out
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The fields of an object, each with its type, default and the first sentence about it.
fn list_fields(book: &Book, schema: &Value, out: &mut String) {
    let schema = &book.inner(schema).filter(|_| book.fields(schema).is_empty()).unwrap_or_else(|| schema.clone());
    let fields = book.fields(schema);
    if fields.is_empty() {
        return;
    }
    let required = book.resolve(schema)["required"].clone();
    let is_required = |name: &str| required.as_array().is_some_and(|r| r.iter().any(|n| n == name));
    out.push_str("\nFields:\n");
    for (name, field) in fields {
        let resolved = book.resolve(&field);
        let mut notes = vec![book.type_of(&field)];
        if is_required(&name) {
            notes.push("required".into());
        }
        match &resolved["default"] {
            Value::Null => {}
            // Shown with its own fields.
            Value::Object(map) if !map.is_empty() => {}
            default => notes.push(format!("default {default}")),
        }
        out.push_str(&format!("  {name}  ({})\n", notes.join(", ")));
        let about = one_line(resolved["description"].as_str().unwrap_or_default());
        if !about.is_empty() {
            out.push_str(&format!("      {about}\n"));
        }
    }
}

fn explain(what: &str) -> Result<String, Fail> {
    let mut parts = what.split('.');
    let kind = resource::find_kind(parts.next().unwrap_or_default())?;
    let book = Book::of(kind);
    // `ports[0]` and `ports` explain the same.
    let path: Vec<&str> = parts.map(|p| p.split('[').next().unwrap_or_default()).filter(|p| !p.is_empty()).collect();
    if path.is_empty() {
        return Ok(whole(kind, &book));
    }
    let top = ["apiVersion", "kind", "metadata", "spec", "status"].contains(&path[0]);
    let mut at = if top { String::new() } else { "spec".to_owned() };
    let mut schema = if top { book.root.clone() } else { book.root["properties"]["spec"].clone() };
    for part in path {
        let mut fields = book.fields(&schema);
        if fields.is_empty() {
            match book.inner(&schema) {
                Some(inner) if book.fields(&inner).is_empty() && book.type_of(&schema).starts_with("map") => {
                    // A key of the user's own.
                    schema = inner;
                    at = format!("{at}.{part}");
                    continue;
                }
                Some(inner) => fields = book.fields(&inner),
                None => {}
            }
        }
        let Some((_, field)) = fields.iter().find(|(name, _)| name.eq_ignore_ascii_case(part)) else {
            let place = if at.is_empty() { kind.kind.to_owned() } else { format!("{}.{at}", kind.kind) };
            let near = fields.iter().map(|(n, _)| (strsim::damerau_levenshtein(n, part), n)).min();
            let advice = match near {
                Some((distance, near)) if distance <= 3 => format!("did you mean {near:?}?"),
                Some(_) => {
                    let all: Vec<_> = fields.iter().map(|(n, _)| n.as_str()).collect();
                    format!("it has: {}", all.join(", "))
                }
                None => "it has no fields".to_owned(),
            };
            return Err(Fail::not_found(format!("{place} has no field {part:?}; {advice}")));
        };
        schema = field.clone();
        at = if at.is_empty() { part.to_owned() } else { format!("{at}.{part}") };
    }
    let resolved = book.resolve(&schema);
    let mut out = format!("{}.{at}  ({})\n", kind.kind, book.type_of(&schema));
    if let Some(about) = resolved["description"].as_str() {
        out.push_str(&format!("\n{}\n", one_line(about)));
    }
    if let Some(default) = resolved.get("default").filter(|d| !d.is_null()) {
        out.push_str(&format!("\nDefault: {default}\n"));
    }
    let constraints = book.constraints(&schema);
    if !constraints.is_empty() {
        out.push('\n');
        constraints.iter().for_each(|c| out.push_str(&format!("{c}\n")));
    }
    let immutable = at.strip_prefix("spec.").is_some_and(|f| kind.immutable.contains(&f));
    if immutable {
        out.push_str("\nIt can't be changed after the create.\n");
    }
    list_fields(&book, &schema, &mut out);
    Ok(out)
}

fn whole(kind: &KindDescriptor, book: &Book) -> String {
    let mut out = format!("{} ({})\n\n{}\n\n", kind.kind, kind.plural, kind.about);
    if !kind.short.is_empty() {
        out.push_str(&format!("Also called: {}\n", kind.short.join(", ")));
    }
    let scope = match kind.scope {
        Scope::Global => "the whole fleet",
        Scope::Region => "a region",
        Scope::Project => "a project",
        Scope::Organization => "an organization",
    };
    out.push_str(&format!("Belongs to: {scope}\n"));
    let verbs = [("create", kind.verbs.create), ("update", kind.verbs.update), ("delete", kind.verbs.delete)];
    let allowed: Vec<_> = ["read"].into_iter().chain(verbs.iter().filter(|v| v.1).map(|v| v.0)).collect();
    out.push_str(&format!("Users may: {}\n", allowed.join(", ")));
    for (title, part) in [("Spec", "spec"), ("Status", "status")] {
        let mut fields = String::new();
        list_fields(book, &book.root["properties"][part], &mut fields);
        if !fields.is_empty() {
            out.push_str(&fields.replacen("Fields:", &format!("{title}:"), 1));
        }
    }
    if kind.verbs.create {
        let example = json!({
            "apiVersion": nexus_model::API_VERSION, "kind": kind.kind, "metadata": {"name": "example"},
            "spec": (kind.example)(),
        });
        let yaml = serde_norway::to_string(&example).unwrap_or_default();
        out.push_str("\nExample:\n");
        yaml.lines().for_each(|l| out.push_str(&format!("  {l}\n")));
    }
    out
}

#[cfg(test)]
mod tests {
    use nexus_model::kind;

    use super::*;

    #[test]
    fn every_kind_is_explained() {
        for kind in kind::all() {
            let text = explain(kind.kind).unwrap();
            assert!(text.contains(kind.about), "{text}");
        }
        assert!(explain("app").unwrap().contains("replicas  (integer"));
    }

    #[test]
    fn a_field_is_found_at_any_depth_with_or_without_spec() {
        for path in ["app.spec.ports.port", "apps.ports.port", "App.spec.ports[0].port"] {
            let text = explain(path).unwrap();
            assert!(text.contains("at least: 1") && text.contains("at most: 65535"), "{path}: {text}");
        }
        let memory = explain("app.resources.memory").unwrap();
        assert!(memory.starts_with("App.spec.resources.memory"), "{memory}");
        let runtime = explain("app.runtime").unwrap();
        assert!(runtime.contains("container") && runtime.contains("function"), "{runtime}");
        let path = explain("app.health.readiness.probe.http.path").unwrap();
        assert!(path.contains("longest length: 1024"), "{path}");
        assert!(explain("app.spec.env.ANY").unwrap().contains("(string)"));
        assert!(explain("instance.status.conditions.message").unwrap().contains("sentence"));
        assert!(explain("project.organization").unwrap().contains("can't be changed"));
        assert!(explain("app.metadata.labels").unwrap().contains("map of string"));
    }

    #[test]
    fn a_misspelt_field_is_recognised() {
        assert!(explain("app.spec.replcas").unwrap_err().message.contains("\"replicas\""));
        assert!(explain("app.replicas.x").unwrap_err().message.contains("no fields"));
        assert!(explain("ap").is_err());
    }
}
