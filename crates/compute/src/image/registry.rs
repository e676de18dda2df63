//! What a registry answers for a reference, read with the care that files get: an index of several machines' images, or an
//! image. Fetching is left to who has a network; here bytes become what they name.

use nexus_model::Digest;
use serde_json::Value;

use super::import::choose;
use super::{Descriptor, ImageError, Manifest, parse_config, parse_manifest};

/// What is asked for, in the order of preference.
pub const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
                                  application/vnd.docker.distribution.manifest.list.v2+json, \
                                  application/vnd.docker.distribution.manifest.v2+json";

/// A manifest by content: registries' media types are not always right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// An index, and of the images in it the one for this machine.
    Index(Descriptor),
    Image(Manifest),
}

impl Document {
    pub fn read(digest: Digest, bytes: &[u8]) -> Result<Self, ImageError> {
        let what = || format!("manifest {digest}");
        let value: Value = serde_json::from_slice(bytes)
            .map_err(|e| ImageError::invalid(what(), format!("is not JSON, so no image is here: {e}")))?;
        if value["schemaVersion"] == 1 {
            let message =
                "is of the old schema 1, which names no layers by digest: push the image again with a tool of today";
            return Err(ImageError::invalid(what(), message));
        }
        if value.get("manifests").is_some() {
            return choose(bytes, &format!("index {digest}")).map(Self::Index);
        }
        let kind = value["config"]["mediaType"].as_str().unwrap_or_default();
        if !kind.is_empty() && !kind.contains("image.config") && !kind.contains("container.image") {
            return Err(ImageError::invalid(what(), format!("is of something else than an image: {kind:?}")));
        }
        let manifest = parse_manifest(digest, bytes)?;
        Ok(Self::Image(manifest))
    }
}

/// Checks that an image's configuration fits its manifest and this machine.
pub fn check_config(manifest: &Manifest, bytes: &[u8]) -> Result<(), ImageError> {
    parse_config(manifest, bytes).map(drop)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(value: &Value) -> Result<Document, String> {
        let bytes = value.to_string().into_bytes();
        Document::read(Digest::of(&bytes), &bytes).map_err(|e| e.to_string())
    }

    fn descriptor(kind: &str, platform: Option<(&str, &str)>) -> Value {
        let mut one = json!({"mediaType": kind, "digest": Digest::of(kind.as_bytes()), "size": 7});
        if let Some((os, architecture)) = platform {
            one["platform"] = json!({"os": os, "architecture": architecture});
        }
        one
    }

    #[test]
    fn an_index_is_resolved_to_this_machine() {
        let own = super::super::host_architecture();
        let manifests = [
            descriptor("application/vnd.oci.image.manifest.v1+json", Some(("unknown", "unknown"))),
            descriptor("application/vnd.oci.image.manifest.v1+json", Some(("linux", "sparc"))),
            descriptor("application/vnd.docker.distribution.manifest.v2+json", Some(("linux", own))),
        ];
        let Ok(Document::Index(chosen)) = read(&json!({"schemaVersion": 2, "manifests": manifests})) else { panic!() };
        assert_eq!(chosen.digest, Digest::of(b"application/vnd.docker.distribution.manifest.v2+json"));
        let why = read(&json!({"schemaVersion": 2, "manifests": manifests[..2]})).unwrap_err();
        assert!(why.contains("linux/sparc"), "{why}");
    }

    #[test]
    fn what_is_no_image_says_so() {
        assert!(read(&json!({"schemaVersion": 1, "fsLayers": []})).unwrap_err().contains("schema 1"));
        let chart = json!({"schemaVersion": 2, "layers": [],
            "config": descriptor("application/vnd.cncf.helm.config.v1+json", None)});
        assert!(read(&chart).unwrap_err().contains("helm"));
        assert!(Document::read(Digest::of(b"<html>"), b"<html>").is_err());
        let docker = json!({"schemaVersion": 2,
            "config": descriptor("application/vnd.docker.container.image.v1+json", None),
            "layers": [descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", None)]});
        assert!(matches!(read(&docker), Ok(Document::Image(m)) if m.layers.len() == 1));
    }
}
