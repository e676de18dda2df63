//! Images: content-addressed blobs, how they come in from a file, and how they become folders to run from.
//!
//! An OCI image is a manifest that names a configuration and layers, all by digest; a function is one WebAssembly
//! component. Both live in a [`BlobStore`], on servers and hosts alike. Whatever is read is checked against its digest
//! before it is believed.

mod import;
pub mod registry;
mod store;
mod tarball;
mod unpack;

use serde::Deserialize;

use nexus_model::Digest;

pub use import::{Imported, ImportedBlob, Source, import, import_async};
pub use store::{Aged, BlobStore, BlobWriter};
pub use unpack::{UnpackLimits, unpack};

/// Bounds a manifest or an index, in bytes; what registries accept at most.
pub const MAX_MANIFEST: u64 = 4 << 20;
/// Bounds an image's configuration, in bytes.
pub const MAX_CONFIG: u64 = 8 << 20;
/// Bounds the layers of one image: with its manifest and configuration an image has at most 512 blobs.
pub const MAX_LAYERS: usize = 510;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The machine failed, not the image.
    #[error("{attempt}: {source}")]
    Io { attempt: String, source: std::io::Error },
    #[error("blob {expected} is corrupt: its content has the digest {found}")]
    WrongDigest { expected: Digest, found: Digest },
    #[error("blob {blob} has {found} bytes where its image says {expected}")]
    WrongSize { blob: Digest, expected: u64, found: u64 },
    #[error("blob {blob} is longer than {limit} bytes")]
    TooLong { blob: Digest, limit: u64 },
    #[error("blob {0} is missing")]
    Missing(Digest),
    #[error("{what}: {message}")]
    Invalid { what: String, message: String },
    #[error("layer {layer}: {message}")]
    Layer { layer: Digest, message: String },
    #[error("layer {layer}: entry {entry:?}: {message}")]
    Entry { layer: Digest, entry: String, message: String },
}

impl ImageError {
    pub(crate) fn io(attempt: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let attempt = attempt.into();
        move |source| Self::Io { attempt, source }
    }

    fn invalid(what: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), message: message.into() }
    }

    /// How a runtime reports it: the machine's failures are the host's, the rest is the image's.
    pub fn of_image(self, image: Digest) -> crate::RuntimeError {
        match self {
            Self::Io { attempt, source } => crate::RuntimeError::Host { attempt, source },
            other => crate::RuntimeError::Image { image, message: other.to_string() },
        }
    }
}

/// Names one blob from a manifest or an index.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    pub platform: Option<Platform>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    #[serde(default)]
    pub os: String,
    #[serde(default)]
    pub architecture: String,
}

/// An OCI image manifest or a Docker one (schema 2), which differ in media types alone.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// An image's configuration: what its author wants run, and what its layers unpack to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    pub os: String,
    pub architecture: String,
    pub config: Option<Execution>,
    pub rootfs: RootFs,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
pub struct Execution {
    pub user: Option<String>,
    pub env: Option<Vec<String>>,
    pub entrypoint: Option<Vec<String>>,
    pub cmd: Option<Vec<String>>,
    pub working_dir: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct RootFs {
    /// The digests of the layers' uncompressed content, lowest first.
    pub diff_ids: Vec<Digest>,
}

/// An image that was read and found to be consistent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    pub manifest: Manifest,
    pub config: ImageConfig,
}

impl Image {
    /// Reads an image from blobs that are all in the store. Blocks.
    pub fn load(blobs: &BlobStore, digest: Digest) -> Result<Self, ImageError> {
        let manifest = parse_manifest(digest, &blobs.read(digest, MAX_MANIFEST)?)?;
        let config = blobs.read(manifest.config.digest, MAX_CONFIG)?;
        let config = parse_config(&manifest, &config)?;
        Ok(Self { manifest, config })
    }
}

/// What this machine runs, in the words of the OCI specification.
fn host_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn parse_manifest(digest: Digest, bytes: &[u8]) -> Result<Manifest, ImageError> {
    let manifest: Manifest = serde_json::from_slice(bytes)
        .map_err(|e| ImageError::invalid(format!("manifest {digest}"), format!("is not an image manifest: {e}")))?;
    if manifest.layers.len() > MAX_LAYERS {
        let message = format!("has {} layers; at most {MAX_LAYERS} are supported", manifest.layers.len());
        return Err(ImageError::invalid(format!("manifest {digest}"), message));
    }
    for layer in &manifest.layers {
        let kind = layer.media_type.as_str();
        let plain = kind.is_empty() || kind.contains("layer") || kind.contains("rootfs.diff.tar");
        if !plain || kind.contains("encrypted") || kind.contains("foreign") || kind.contains("nondistributable") {
            let message = format!("layer {} has the unsupported media type {kind:?}", layer.digest);
            return Err(ImageError::invalid(format!("manifest {digest}"), message));
        }
    }
    Ok(manifest)
}

fn parse_config(manifest: &Manifest, bytes: &[u8]) -> Result<ImageConfig, ImageError> {
    let what = || format!("configuration {}", manifest.config.digest);
    let config: ImageConfig = serde_json::from_slice(bytes)
        .map_err(|e| ImageError::invalid(what(), format!("is not an image configuration: {e}")))?;
    if config.os != "linux" || config.architecture != host_architecture() {
        let found = format!("{}/{}", config.os, config.architecture);
        let message = format!("is for {found}; this machine runs linux/{}", host_architecture());
        return Err(ImageError::invalid(what(), message));
    }
    if config.rootfs.diff_ids.len() != manifest.layers.len() {
        let (ids, layers) = (config.rootfs.diff_ids.len(), manifest.layers.len());
        return Err(ImageError::invalid(what(), format!("lists {ids} diff ids for {layers} layers")));
    }
    Ok(config)
}
