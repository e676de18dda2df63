//! `nexus image pull`: a server fetches an image from a registry; here its progress is shown and the image is named.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use nexus_api::operations::{Collected, ImageGcDone};
use nexus_api::pull::{PullEvent, PullRequest};
use nexus_model::Name;
use nexus_model::kind::ImageSpec;
use reqwest::Method;
use serde_json::json;

use super::apply::Outcome;
use super::cloud::Cloud;
use super::output::{self, Format};
use super::table::Printer;
use super::{image, join, progress};
use crate::client::{ClientError, Parts, Problem};
use crate::exit::Fail;

/// A line of an answer is no longer than this.
const LINE: usize = 1 << 20;

/// Endings of files: what has one is no reference.
const FILES: [&str; 7] = [".tar", ".tar.gz", ".tgz", ".tar.zst", ".oci", ".wasm", ".zip"];

/// Whether a text that is no file here and no name means an image in a registry: it says a registry, a tag or a digest.
pub fn is_reference(text: &str) -> bool {
    if text.starts_with(['.', '/', '~']) || FILES.iter().any(|ending| text.ends_with(ending)) {
        return false;
    }
    let first = text.split('/').next().unwrap_or_default();
    let registry = text.contains('/') && (first.contains(['.', ':']) || first == "localhost");
    let last = text.rsplit('/').next().unwrap_or_default();
    (registry || last.contains([':', '@'])) && text.parse::<oci_spec::distribution::Reference>().is_ok()
}

/// A name from a reference's: the last part of its repository.
pub fn name_of(reference: &str) -> Option<Name> {
    let reference: oci_spec::distribution::Reference = reference.parse().ok()?;
    let last = reference.repository().rsplit('/').next()?.to_lowercase();
    let text: String = last.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(63).collect();
    text.trim_matches('-').parse().ok()
}

/// What a pull has told so far.
struct Told {
    bar: indicatif::ProgressBar,
    received: BTreeMap<String, u64>,
    shown: String,
}

impl Told {
    fn event(&mut self, event: &PullEvent) {
        match event {
            PullEvent::Found { blobs, size, .. } => {
                self.bar = progress::bytes(*size, &self.shown);
                if self.bar.is_hidden() {
                    output::note(&format!("pulling {} ({blobs} blobs, {})", self.shown, output::size(*size)));
                }
            }
            PullEvent::Blob { digest, received, .. } => {
                self.received.insert(digest.to_string(), *received);
                self.bar.set_position(self.received.values().sum());
            }
            PullEvent::Image(_) | PullEvent::Error(_) => {}
        }
    }
}

/// Has a server bring an image, and answers what can be written of it.
pub async fn fetch(cloud: &Cloud, reference: &str, secret: Option<&Name>) -> anyhow::Result<ImageSpec> {
    let (region, project) = (&cloud.target.region, &cloud.target.project);
    let path = format!("/v1/regions/{region}/projects/{project}/blobs:pull");
    let request = PullRequest { reference: reference.to_owned(), secret: secret.cloned() };
    let mut body = cloud.client.stream(Method::POST, &path, Parts::json(&request)?).await?;
    let mut told =
        Told { bar: indicatif::ProgressBar::hidden(), received: BTreeMap::new(), shown: reference.to_owned() };
    let mut rest: Vec<u8> = Vec::new();
    while let Some(piece) = body.next().await {
        rest.extend_from_slice(&piece?);
        while let Some(end) = rest.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = rest.drain(..=end).collect();
            // An empty object only says that the pull goes on.
            let Ok(event) = serde_json::from_slice::<PullEvent>(&line) else { continue };
            told.event(&event);
            match event {
                PullEvent::Image(spec) => {
                    told.bar.finish_and_clear();
                    return Ok(spec);
                }
                PullEvent::Error(error) => {
                    told.bar.finish_and_clear();
                    let status = reqwest::StatusCode::from_u16(error.status).unwrap_or_default();
                    let document = serde_json::to_value(&error).ok();
                    let problem = Problem { status, document, text: error.detail };
                    return Err(ClientError::Refused(Box::new(problem)).into());
                }
                _ => {}
            }
        }
        if rest.len() > LINE {
            bail!("the server's answer has a line longer than {LINE} bytes");
        }
    }
    Err(Fail::unavailable("the connection broke while the image was pulled: pull it again, what is there stays").into())
}

/// Pulls an image and names it.
pub async fn pull(
    cloud: &Cloud,
    name: &Name,
    reference: &str,
    secret: Option<&Name>,
) -> anyhow::Result<(Outcome, ImageSpec)> {
    let spec = fetch(cloud, reference, secret).await.with_context(|| format!("pulling {reference}"))?;
    let outcome = image::write(cloud, name, &spec).await?;
    Ok((outcome, spec))
}

/// `nexus image gc`.
pub async fn gc(cloud: &Cloud, dry_run: bool, grace: Option<u64>, format: Format) -> anyhow::Result<()> {
    let asked = json!({"dryRun": dry_run, "graceSeconds": grace});
    let done: ImageGcDone = join::run(cloud, "image-gc", &asked).await?;
    match format {
        Format::Json => output::json(&done)?,
        Format::Yaml => output::yaml(&done)?,
        Format::Table | Format::Wide | Format::Name => {
            let size = |blobs: u64, bytes: u64| format!("{blobs} ({})", output::size(bytes));
            let row = |c: &Collected| match &c.trouble {
                Some(trouble) => vec![c.server.clone(), trouble.clone(), String::new(), String::new()],
                None => vec![
                    c.server.clone(),
                    size(c.found.blobs, c.found.bytes),
                    size(c.found.unnamed_blobs, c.found.unnamed_bytes),
                    size(c.found.removed_blobs, c.found.removed_bytes),
                ],
            };
            let gone = if dry_run { "WOULD GO" } else { "REMOVED" };
            let rows = done.servers.iter().map(row).collect();
            output::text(Printer::new(&["SERVER", "BLOBS", "UNNAMED", gone]).lines(rows).trim_end())?;
        }
    }
    let silent: Vec<&str> = done.servers.iter().filter(|c| c.trouble.is_some()).map(|c| c.server.as_str()).collect();
    if silent.is_empty() {
        return Ok(());
    }
    Err(Fail::unavailable(format!("not every server could look: {}", silent.join(", "))).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_says_a_registry_a_tag_or_a_digest() {
        let digest = format!("web@sha256:{}", "a".repeat(64));
        for yes in
            ["nginx:1.27", "registry.example/web", "localhost/web", "localhost:5000/a/web:1", "x/y:latest", &digest]
        {
            assert!(is_reference(yes), "{yes}");
        }
        for no in
            ["./no/such/file.tar", "/x/y:1", "shop.tar", "dir/shop.tar", "dir/shop", "No_Name", "web", "a b:1", ""]
        {
            assert!(!is_reference(no), "{no}");
        }
    }

    #[test]
    fn a_name_is_made_from_a_repositorys() {
        assert_eq!(name_of("registry.example:5000/shop/my_web:1.4").unwrap().as_str(), "my-web");
        assert_eq!(name_of("nginx").unwrap().as_str(), "nginx");
        assert_eq!(name_of("UPPER:1"), None);
    }
}
