//! `nexus image`: brings images in, from files and from registries. Only what the cloud does not have yet is sent.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use nexus_compute::image::{Imported, ImportedBlob, import_async};
use nexus_model::kind::{self, Blob, ImageSpec};
use nexus_model::{API_VERSION, Name};
use reqwest::Method;
use serde_json::json;

use super::apply::Outcome;
use super::cloud::{Cloud, CloudArgs, Guard, absent};
use super::output::{self, Format};
use super::{delete, get, progress, pull, resource};
use crate::client::{ClientError, Parts};
use crate::exit::Fail;

/// One read of a blob.
const PIECE: usize = 256 << 10;
/// Slower than this, in bytes a second, an upload is given up.
const SLOWEST: u64 = 128 << 10;

/// Imports, lists and removes images
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus image import nginx.tar --name nginx\n  \
    nexus image import ./hello.wasm\n  \
    nexus image pull docker.io/library/nginx:1.27 --name nginx\n  \
    nexus image pull registry.example/shop/web:4 --secret registry\n  \
    nexus image list\n  \
    nexus image rm nginx\n  \
    nexus image gc --dry-run")]
pub struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Imports an OCI layout, an OCI or Docker archive, or a WebAssembly component
    Import {
        path: PathBuf,
        /// The image's name [default: made from the file's]
        #[arg(long, value_parser = resource::new_name)]
        name: Option<Name>,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Has the cloud fetch an image from a registry
    ///
    /// What the tag means at this moment is what runs: pull again for what it means later.
    #[command(after_help = "Examples:\n  \
        nexus image pull docker.io/library/nginx:1.27\n  \
        nexus image pull registry.example/web@sha256:9f86d0… --name web\n  \
        nexus image pull registry.example/shop/web:4 --secret registry")]
    Pull {
        /// `REGISTRY/REPOSITORY:TAG` or `…@sha256:…`
        #[arg(value_name = "REFERENCE")]
        reference: String,
        /// The image's name [default: made from the repository's]
        #[arg(long, value_parser = resource::new_name)]
        name: Option<Name>,
        /// A secret of the project with `username` and `password`, or `config.json` as `docker login` writes it
        #[arg(long, value_name = "NAME", value_parser = resource::new_name)]
        secret: Option<Name>,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Removes content that no image names any more, on all servers of the region (for operators)
    ///
    /// Servers do that by themselves, when it has been unnamed for a day.
    #[command(after_help = "Examples:\n  \
        nexus image gc --dry-run\n  \
        nexus image gc --grace 3600")]
    Gc {
        /// Only shows what would go
        #[arg(long)]
        dry_run: bool,
        /// Removes what has been unnamed for so many seconds. Less than a day also takes what is just being pushed
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(..=31_536_000))]
        grace: Option<u64>,
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Shows the images of the project
    #[command(visible_alias = "ls")]
    List {
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Removes images
    #[command(visible_alias = "remove")]
    Rm {
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

pub async fn run(args: &ImageArgs) -> anyhow::Result<()> {
    match &args.command {
        ImageCommand::Import { path, name, cloud } => {
            let name = match name {
                Some(name) => name.clone(),
                None => name_from(path).ok_or_else(|| {
                    Fail::usage(format!("no name can be made from {}: give one with --name", path.display()))
                })?,
            };
            let content = read(path).await?;
            let cloud = Cloud::connect(cloud)?;
            let outcome = upload(&cloud, &name, &content).await?;
            output::text(&format!("image/{name} {}", outcome.word()))
        }
        ImageCommand::Pull { reference, name, secret, cloud } => {
            let name = name.clone().or_else(|| pull::name_of(reference));
            let name = name.ok_or_else(|| {
                Fail::usage(format!("no name can be made from {reference}: is it a reference? Give one with --name"))
            })?;
            let cloud = Cloud::connect(cloud)?;
            let (outcome, spec) = pull::pull(&cloud, &name, reference, secret.as_ref()).await?;
            output::text(&format!("image/{name} {} ({})", outcome.word(), spec.digest))
        }
        ImageCommand::Gc { dry_run, grace, output, cloud } => {
            pull::gc(&Cloud::connect(cloud)?, *dry_run, *grace, *output).await
        }
        ImageCommand::List { output, cloud } => get::images(cloud, *output).await,
        ImageCommand::Rm { names, cloud } => delete::images(cloud, names).await,
    }
}

/// A name from a file's: its stem in lower case, with hyphens for all that a name can't hold.
fn name_from(path: &Path) -> Option<Name> {
    let absolute = std::path::absolute(path).ok()?;
    let mut stem = absolute.file_name()?.to_str()?.to_lowercase();
    for ending in [".gz", ".zst", ".tgz", ".tar", ".oci", ".wasm"] {
        stem = stem.strip_suffix(ending).unwrap_or(&stem).to_owned();
    }
    let text: String = stem.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(63).collect();
    text.trim_matches('-').parse().ok()
}

/// Reads and checks an image.
pub async fn read(path: &Path) -> anyhow::Result<Imported> {
    if !path.exists() {
        return Err(Fail::not_found(format!("{} does not exist", path.display())).into());
    }
    import_async(path.to_owned()).await.with_context(|| format!("importing {}", path.display()))
}

/// Sends what the cloud lacks of an image, then names it.
pub async fn upload(cloud: &Cloud, name: &Name, image: &Imported) -> anyhow::Result<Outcome> {
    for blob in &image.blobs {
        upload_blob(cloud, blob).await.with_context(|| format!("sending the blob {}", blob.digest))?;
    }
    let spec = ImageSpec {
        format: image.format,
        digest: image.digest,
        blobs: image.blobs.iter().map(|b| Blob { digest: b.digest, size: b.size }).collect(),
        source: None,
    };
    write(cloud, name, &spec).await
}

/// Names an image whose content is there.
pub async fn write(cloud: &Cloud, name: &Name, spec: &ImageSpec) -> anyhow::Result<Outcome> {
    let kind = kind::find("image").expect("a kind");
    let path = cloud.object(kind, name);
    let before = cloud.find(&path).await?;
    let mut metadata = json!({"name": name});
    // Labels are not the import's business.
    for key in ["labels", "annotations", "deletionProtection"] {
        if let Some(kept) = before.as_ref().and_then(|b| b["metadata"].get(key)) {
            metadata[key] = kept.clone();
        }
    }
    let object = json!({"apiVersion": API_VERSION, "kind": kind.kind, "metadata": metadata, "spec": spec});
    let put = cloud.put(&path, &object, Guard::None, false).await?;
    Ok(if put.created { Outcome::Created } else { Outcome::of(before.as_ref(), &put.object) })
}

async fn upload_blob(cloud: &Cloud, blob: &ImportedBlob) -> anyhow::Result<()> {
    let (region, project) = (&cloud.target.region, &cloud.target.project);
    let path = format!("/v1/regions/{region}/projects/{project}/blobs/{}", blob.digest);
    if absent(cloud.client.send(Method::HEAD, &path, Parts::default()).await)?.is_some() {
        return Ok(());
    }
    let shown = format!("{} ({})", &blob.digest.hex()[..12], output::size(blob.size));
    let bar = progress::bytes(blob.size, &shown);
    if bar.is_hidden() {
        output::note(&format!("sending {shown}"));
    }
    let timeout = Duration::from_secs(120 + blob.size / SLOWEST);
    let sent = cloud.client.upload(&path, blob.size, timeout, || body(blob, &bar)).await;
    bar.finish_and_clear();
    sent?;
    Ok(())
}

/// The blob as a request's body, read piece by piece on the threads for blocking work.
fn body(blob: &ImportedBlob, bar: &ProgressBar) -> Result<reqwest::Body, ClientError> {
    bar.set_position(0);
    let failed = |e: std::io::Error| ClientError::Setup { what: "reading the image".into(), message: e.to_string() };
    let reader = blob.source.open().map_err(failed)?;
    let bar = bar.clone();
    let pieces = futures::stream::try_unfold(reader, move |mut reader| {
        let bar = bar.clone();
        async move {
            let read = tokio::task::spawn_blocking(move || {
                let mut piece = vec![0; PIECE];
                let n = reader.read(&mut piece)?;
                piece.truncate(n);
                std::io::Result::Ok((Bytes::from(piece), reader))
            });
            let (piece, reader) = read.await.map_err(std::io::Error::other)??;
            bar.inc(piece.len() as u64);
            std::io::Result::Ok(if piece.is_empty() { None } else { Some((piece, reader)) })
        }
    });
    Ok(reqwest::Body::wrap_stream(pieces))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_made_from_a_files() {
        let of = |path: &str| name_from(Path::new(path)).map(|n| n.to_string());
        assert_eq!(of("/x/Hello_World.wasm").as_deref(), Some("hello-world"));
        assert_eq!(of("nginx-1.25.tar.gz").as_deref(), Some("nginx-1-25"));
        assert_eq!(of("layout/").as_deref(), Some("layout"));
        assert_eq!(of("/"), None);
        assert_eq!(of("___.tar"), None);
    }
}
