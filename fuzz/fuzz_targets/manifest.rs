//! Manifests, as `nexus apply` reads them and the API reads each object's spec.
//!
//! What a spec becomes once it was read must read back as itself: it is what is stored.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nexus_model::kind;
use nexus_model::name::Name;
use serde::Deserialize;
use serde_json::Value;

fn object(value: &Value) {
    if let Some(Value::Array(items)) = value.get("items") {
        return items.iter().for_each(object);
    }
    for place in ["name", "project", "region"] {
        let text = value.get("metadata").and_then(|m| m.get(place)).and_then(Value::as_str);
        if let Some(name) = text.and_then(|t| t.parse::<Name>().ok()) {
            assert_eq!(name.as_str(), text.unwrap_or_default());
        }
    }
    let kind = value.get("kind").and_then(Value::as_str).and_then(kind::find);
    if let (Some(kind), Some(spec)) = (kind, value.get("spec"))
        && let Ok(whole) = (kind.parse_spec)(spec)
    {
        match (kind.parse_spec)(&whole) {
            Ok(again) => assert_eq!(again, whole),
            Err(errors) => panic!("{whole} was accepted and is refused: {errors:?}"),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for document in serde_norway::Deserializer::from_str(text) {
        let Ok(value) = Value::deserialize(document) else { break };
        object(&value);
    }
    if let Ok(value) = serde_json::from_str::<Value>(text) {
        object(&value);
    }
});
