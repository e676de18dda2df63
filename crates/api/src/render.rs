//! Objects on their way out. What is stored is spliced into the answer: only the metadata is read and written anew (its
//! revision is the key's own), while spec and status pass through as the bytes that they are. That is what makes a list
//! of hundreds cheap.

use std::borrow::Cow;

use nexus_model::selector::Labels;
use nexus_model::{AnyObject, Metadata};
use nexus_store::KeyValue;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// A stored object, read as far as an answer needs.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Stored<'a> {
    #[serde(borrow)]
    api_version: Cow<'a, str>,
    #[serde(borrow)]
    kind: Cow<'a, str>,
    pub metadata: Metadata,
    #[serde(borrow, default)]
    spec: Option<&'a RawValue>,
    #[serde(borrow, default)]
    status: Option<&'a RawValue>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Out<'a> {
    api_version: &'a str,
    kind: &'a str,
    metadata: &'a Metadata,
    spec: &'a RawValue,
    status: &'a RawValue,
}

fn empty() -> &'static RawValue {
    // A constant: parsing two bytes can't fail.
    serde_json::from_str("{}").expect("an empty object is JSON")
}

impl<'a> Stored<'a> {
    pub fn read(kv: &'a KeyValue) -> Result<Self, serde_json::Error> {
        let mut stored: Self = serde_json::from_slice(&kv.value)?;
        stored.metadata.revision = kv.mod_revision.0;
        Ok(stored)
    }

    pub fn labels(&self) -> &Labels {
        &self.metadata.labels
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        let object = Out {
            api_version: &self.api_version,
            kind: &self.kind,
            metadata: &self.metadata,
            spec: self.spec.unwrap_or(empty()),
            status: self.status.unwrap_or(empty()),
        };
        serde_json::to_writer(out, &object).expect("writing to memory does not fail");
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let parts = [self.spec, self.status].into_iter().flatten().map(|r| r.get().len());
        let mut out = Vec::with_capacity(512 + parts.sum::<usize>());
        self.write(&mut out);
        out
    }

    pub fn spec(&self) -> serde_json::Value {
        self.spec.and_then(|s| serde_json::from_str(s.get()).ok()).unwrap_or_default()
    }

    /// A number or text within the status.
    pub fn status(&self) -> serde_json::Value {
        self.status.and_then(|s| serde_json::from_str(s.get()).ok()).unwrap_or_default()
    }
}

/// An object from the writer, with an empty object in place of a missing part.
pub(crate) fn object_bytes(mut object: AnyObject) -> Vec<u8> {
    for part in [&mut object.spec, &mut object.status] {
        if part.is_null() {
            *part = serde_json::json!({});
        }
    }
    serde_json::to_vec(&object).expect("objects are plain data")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use nexus_store::Revision;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_revision_is_the_keys_own_and_the_rest_is_as_stored() {
        let stored = json!({
            "apiVersion": "cloudnexus/v1", "kind": "App", "metadata": {"name": "a\u{e9}".replace('\u{e9}', "b"), "revision": 3},
            "spec": {"image": "x\"y", "future": [1]}, "status": null,
        });
        let kv = KeyValue {
            key: Bytes::from_static(b"k"),
            value: serde_json::to_vec(&stored).unwrap().into(),
            create_revision: Revision(1),
            mod_revision: Revision(42),
        };
        let out: Value = serde_json::from_slice(&Stored::read(&kv).unwrap().to_bytes()).unwrap();
        assert_eq!(out["metadata"]["revision"], 42);
        assert_eq!(out["spec"], stored["spec"]);
        assert_eq!(out["status"], json!({}));
    }
}
