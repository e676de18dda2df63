//! What instances are made from: content-addressed images.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Column, Home, Kind, Scope, Verbs};
use crate::{Bytes, Condition, Digest, FieldError};

#[derive(Debug, Clone)]
pub struct Image;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// An OCI image: `digest` names its manifest.
    #[default]
    Oci,
    /// A WebAssembly component: `digest` names the component itself.
    Wasm,
}

/// One piece of an image's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Blob {
    pub digest: Digest,
    /// Length in bytes.
    #[schemars(range(min = 0, max = MAX_BLOB_SIZE))]
    pub size: u64,
}

/// Where an image was pulled from. It is told, not followed: what runs is what `digest` of the image names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageSource {
    /// As it was asked for, with its registry: `registry.example/shop/web:1.4`.
    #[schemars(regex(pattern = r"^[!-~]{1,512}$"))]
    pub reference: String,
    /// What the reference named when it was pulled: the image's manifest, or an index of several.
    pub digest: Digest,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageSpec {
    #[serde(default)]
    pub format: ImageFormat,
    pub digest: Digest,
    /// Everything that the image needs, `digest` among it. Uploaded before the image is created.
    #[schemars(length(min = 1, max = 512))]
    pub blobs: Vec<Blob>,
    /// Of an image from a registry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<ImageSource>,
}

impl Default for ImageSpec {
    fn default() -> Self {
        Self { format: ImageFormat::default(), digest: Digest::of(b""), blobs: Vec::new(), source: None }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct ImageStatus {
    pub size: Bytes,
    pub conditions: Vec<Condition>,
}

/// Whole in every JSON reader. Uploads have a bound of their own.
const MAX_BLOB_SIZE: u64 = (1 << 53) - 1;
/// Bounds one image: 512 blobs.
const MAX_BLOBS: usize = 512;
/// Bounds a reference to an image in a registry, in bytes.
pub const MAX_REFERENCE: usize = 512;

impl Kind for Image {
    const KIND: &'static str = "Image";
    const PLURAL: &'static str = "images";
    const SHORT: &'static [&'static str] = &["img"];
    const ABOUT: &'static str = "A content-addressed container image or WebAssembly component.";
    const SCOPE: Scope = Scope::Project;
    const HOME: Home = Home::Global;
    const VERBS: Verbs = Verbs::ALL;
    const COLUMNS: &'static [Column] = &[
        Column::new("FORMAT", "/spec/format"),
        Column::new("SIZE", "/status/size"),
        Column::new("DIGEST", "/spec/digest").wide(),
        Column::new("SOURCE", "/spec/source/reference").wide(),
    ];
    type Spec = ImageSpec;
    type Status = ImageStatus;

    fn validate(spec: &ImageSpec) -> Vec<FieldError> {
        let mut errors = Vec::new();
        if spec.blobs.is_empty() || spec.blobs.len() > MAX_BLOBS {
            errors.push(FieldError::new("spec.blobs", format!("between 1 and {MAX_BLOBS}")));
        } else if !spec.blobs.iter().any(|b| b.digest == spec.digest) {
            errors.push(FieldError::new("spec.digest", "must be among spec.blobs"));
        }
        for (i, _) in spec.blobs.iter().enumerate().filter(|(_, b)| b.size > MAX_BLOB_SIZE) {
            errors.push(FieldError::new(format!("spec.blobs[{i}].size"), format!("at most {MAX_BLOB_SIZE}")));
        }
        if let Some(source) = &spec.source {
            let reference = &source.reference;
            let good =
                (1..=MAX_REFERENCE).contains(&reference.len()) && reference.bytes().all(|b| b.is_ascii_graphic());
            if !good {
                let message = format!("1 to {MAX_REFERENCE} printable ASCII characters, without a space");
                errors.push(FieldError::new("spec.source.reference", message));
            }
        }
        errors
    }

    fn example() -> ImageSpec {
        let digest = Digest::of(b"");
        ImageSpec { format: ImageFormat::Wasm, digest, blobs: vec![Blob { digest, size: 0 }], source: None }
    }
}
