//! The OpenAPI document (3.1), generated from the kinds' declarations: [`schemas`] makes the components, [`operations`] the
//! paths.
//!
//! What a schema calls valid is accepted, as far as JSON Schema can say it; what it can't say (a name taken, a digest
//! that must be in a list) is answered 422 or 409, which each operation declares. Answers that never end, of `?watch` and
//! `?follow`, can't be described by OpenAPI: they are under `x-stream-parameters`.

mod audit;
mod networks;
mod operations;
mod rollouts;
mod schemas;

use nexus_model::Name;
use serde_json::{Value, json};

pub(crate) use schemas::{Schemas, SpecShape};

/// The whole document.
pub(crate) fn document(schemas: &Schemas, region: &Name) -> Value {
    json!({
        "openapi": "3.1.0",
        "jsonSchemaDialect": "https://spec.openapis.org/oas/3.1/dialect/base",
        "info": {
            "title": "CloudNexus",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Every kind has the same paths, methods and conventions. Errors are problem documents (RFC 9457) \
                with a stable `code`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "tags": operations::tags(),
        "paths": operations::paths(),
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas.components(region),
            "parameters": operations::parameters(region),
            "headers": operations::headers(),
            "responses": operations::responses(),
        },
    })
}

#[cfg(test)]
mod tests {
    use nexus_model::kind;

    use super::*;
    use crate::route;

    fn doc() -> Value {
        document(&Schemas::generate(), &"local".parse().unwrap())
    }

    fn walk(value: &Value, at: &str, visit: &mut dyn FnMut(&str, &Value)) {
        visit(at, value);
        match value {
            Value::Object(map) => map.iter().for_each(|(k, v)| walk(v, &format!("{at}/{k}"), visit)),
            Value::Array(list) => list.iter().enumerate().for_each(|(i, v)| walk(v, &format!("{at}/{i}"), visit)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let doc = doc();
        let mut seen = 0;
        walk(&doc, "", &mut |at, value| {
            if let Some(to) = value.get("$ref").and_then(Value::as_str) {
                let pointer = to.strip_prefix('#').unwrap_or_else(|| panic!("{at}: {to}"));
                assert!(doc.pointer(pointer).is_some(), "{at}: {to}");
                seen += 1;
            }
        });
        assert!(seen > 100, "{seen}");
    }

    #[test]
    fn every_object_schema_is_closed() {
        walk(&doc()["components"]["schemas"], "", &mut |at, value| {
            let is_object = value["type"] == "object" || value["type"][0] == "object";
            // A property may itself be called "type".
            let is_schema = value["type"].is_string() || value["type"].is_array();
            if is_object && is_schema && !at.ends_with("/properties") {
                let open = value.get("additionalProperties");
                assert!(open.is_some(), "{at} is open");
                let maps = [
                    "labels",
                    "annotations",
                    "env",
                    "classes",
                    "storage",
                    "instanceLabels",
                    "status",
                    "data",
                    "binary",
                ];
                // Words that elsewhere name what is closed.
                let maps_of = |kind: &str, fields: &[&str]| {
                    at.contains(kind) && fields.iter().any(|f| at.contains(&format!("/properties/{f}")))
                };
                let providers = maps_of("IdentityProviderSpec", &["groups", "require"]);
                let is_map = maps.iter().any(|m| at.contains(&format!("/{m}")));
                let is_map = is_map || providers || maps_of("ExchangeRule", &["claims"]);
                assert!(is_map || open == Some(&Value::Bool(false)), "{at} is open: {open:?}");
            }
        });
    }

    #[test]
    fn every_route_and_method_is_listed_once() {
        let doc = doc();
        let paths = doc["paths"].as_object().unwrap();
        let has = |path: &str, method: &str| paths.get(path).is_some_and(|p| p.get(method).is_some());
        for d in kind::all() {
            let list = route::collection_template(d, true);
            let one = format!("{list}/{{name}}");
            assert!(has(&list, "get") && has(&one, "get"), "{}", d.kind);
            assert_eq!(has(&list, "post"), d.verbs.create, "{}", d.kind);
            assert_eq!(has(&one, "put"), d.verbs.update, "{}", d.kind);
            assert_eq!(has(&one, "patch"), d.verbs.update, "{}", d.kind);
            assert_eq!(has(&one, "delete"), d.verbs.delete, "{}", d.kind);
            if d.scope == kind::Scope::Project {
                assert!(has(&route::collection_template(d, false), "get"), "{}", d.kind);
            }
        }
        for path in ["/healthz", "/readyz", "/metrics", "/v1/openapi.json", "/v1/status", route::BLOB_TEMPLATE] {
            assert!(has(path, "get"), "{path}");
        }
        assert!(has(route::SCALE, "post"));
        for (plural, word, verb) in route::VERBS {
            let list = route::collection_template(kind::find(plural).unwrap(), true);
            use route::Verb;
            let reads = [
                Verb::Logs,
                Verb::Exec,
                Verb::Reveal,
                Verb::Load,
                Verb::Trace,
                Verb::Capture,
                Verb::Check,
                Verb::Flows,
            ];
            let posts = !reads.contains(&verb);
            assert!(has(&format!("{list}/{{name}}:{word}"), if posts { "post" } else { "get" }), "{word}");
        }
        let mut ids = std::collections::BTreeSet::new();
        for (path, methods) in paths {
            for (method, operation) in methods.as_object().unwrap() {
                let id = operation["operationId"].as_str().unwrap_or_else(|| panic!("{method} {path}"));
                assert!(ids.insert(id.to_owned()), "{id} twice");
                // Every variable of the path is declared.
                for variable in path.split('{').skip(1).map(|v| v.split('}').next().unwrap()) {
                    let declared = operation["parameters"].as_array().unwrap().iter().any(|p| {
                        let p = p["$ref"].as_str().map_or(p, |r| doc.pointer(&r[1..]).unwrap());
                        p["in"] == "path" && p["name"] == variable
                    });
                    assert!(declared, "{method} {path}: {variable}");
                }
            }
        }
    }

    #[test]
    fn what_has_no_default_is_required() {
        let doc = doc();
        let schemas = &doc["components"]["schemas"];
        assert!(schemas["AppSpec"]["required"].as_array().unwrap().contains(&"image".into()));
        assert!(schemas["RouteSpec"]["required"].as_array().unwrap().contains(&"host".into()));
        assert!(schemas["ProjectSpec"].get("required").is_none());
        let patch = &schemas["AppSpecPatch"];
        assert!(patch.get("required").is_none() && patch["additionalProperties"] == false);
    }
}
