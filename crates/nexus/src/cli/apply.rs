//! `nexus apply`: makes the cloud as manifests say. Doing it twice changes nothing.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use nexus_model::Name;
use nexus_model::kind::{Home, Scope};
use serde_json::Value;
use similar::TextDiff;

use super::cloud::{Cloud, CloudArgs, Guard};
use super::manifest::{self, Manifest, users_part};
use super::webhook::CallbackArgs;
use super::{output, resource, settle};
use crate::exit::Fail;

/// Creates or changes objects as manifests say
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus apply -f web.yaml\n  \
    nexus apply -f manifests/ --dry-run\n  \
    nexus get app web -o yaml | sed 's/replicas: 1/replicas: 3/' | nexus apply -f - --wait")]
pub struct ApplyArgs {
    /// A file of one or more documents in YAML or JSON, a folder of such files, or - for standard input
    #[arg(short, long = "file", value_name = "FILE", required = true)]
    files: Vec<PathBuf>,
    /// Shows what would change, and changes nothing
    #[arg(long)]
    dry_run: bool,
    /// Waits until everything is ready
    #[arg(long, conflicts_with = "dry_run")]
    wait: bool,
    /// How many seconds to wait for each object
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    timeout: u64,
    #[command(flatten)]
    callback: CallbackArgs,
    #[command(flatten)]
    cloud: CloudArgs,
}

/// What became of one object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Created,
    Configured,
    Unchanged,
}

impl Outcome {
    pub fn of(before: Option<&Value>, after: &Value) -> Self {
        match before {
            None => Self::Created,
            Some(before) if users_part(before) == users_part(after) => Self::Unchanged,
            Some(_) => Self::Configured,
        }
    }

    pub fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Configured => "configured",
            Self::Unchanged => "unchanged",
        }
    }
}

/// How the user's part of an object would change, as a unified diff; empty if it would not.
pub fn diff(title: &str, before: Option<&Value>, after: &Value) -> anyhow::Result<String> {
    let text = |object: &Value| serde_norway::to_string(&users_part(object)).context("writing YAML");
    let before_text = before.map(text).transpose()?.unwrap_or_default();
    let after_text = text(after)?;
    let diff = TextDiff::from_lines(before_text.as_str(), after_text.as_str());
    Ok(diff.unified_diff().context_radius(3).header(&format!("live/{title}"), &format!("new/{title}")).to_string())
}

/// The project or organization in which a manifest's object stands.
pub fn owner_of(cloud: &Cloud, asked: &CloudArgs, manifest: &Manifest) -> anyhow::Result<Name> {
    let (what, own, asked, usual) = match manifest.kind.scope {
        Scope::Organization => {
            ("organization", &manifest.organization, &asked.organization, &cloud.target.organization)
        }
        _ => ("project", &manifest.project, &asked.project, &cloud.target.project),
    };
    match (own, asked) {
        (Some(own), Some(asked)) if own != asked && manifest.kind.scope != Scope::Global => {
            let why = format!("{}: metadata.{what}: {own:?} contradicts --{what} {asked}", manifest.place);
            Err(Fail::usage(why).into())
        }
        (Some(own), _) => Ok(own.clone()),
        (None, _) => Ok(usual.clone()),
    }
}

/// The region in which a manifest's object stands.
pub fn region_of(cloud: &Cloud, asked: Option<&Name>, manifest: &Manifest) -> anyhow::Result<Name> {
    match (&manifest.region, asked) {
        // What all regions share has one home, whatever is said.
        (Some(_), _) if manifest.kind.home == Home::Global => Ok(cloud.target.region.clone()),
        (Some(own), Some(asked)) if own != asked => {
            let why = format!("{}: metadata.region: {own:?} contradicts --region {asked}", manifest.place);
            Err(Fail::usage(why).into())
        }
        (Some(own), _) => Ok(own.clone()),
        (None, _) => Ok(cloud.target.region.clone()),
    }
}

pub async fn run(args: &ApplyArgs) -> anyhow::Result<()> {
    let manifests = manifest::read(&args.files)?;
    let cloud = Cloud::connect(&args.cloud)?.calling_back(&args.callback);
    let mut places = Vec::new();
    for manifest in &manifests {
        let owner = owner_of(&cloud, &args.cloud, manifest)?;
        let region = region_of(&cloud, args.cloud.region.as_ref(), manifest)?;
        places.push(cloud.object_at(manifest.kind, &region, &owner, &manifest.name));
    }
    let mut applied = Vec::new();
    for (manifest, path) in manifests.iter().zip(&places) {
        let title = resource::title(manifest.kind, manifest.name.as_str());
        let named = || format!("{}: {title}", manifest.place);
        let before = cloud.find(path).await.with_context(named)?;
        let put = cloud.put(path, &manifest.object, Guard::None, args.dry_run).await.with_context(named)?;
        let outcome = Outcome::of(before.as_ref(), &put.object);
        if args.dry_run {
            let diff = diff(&title, before.as_ref(), &put.object)?;
            if !diff.is_empty() {
                output::bytes(diff.as_bytes())?;
            }
            output::text(&format!("{title} {} (dry run)", outcome.word()))?;
        } else {
            output::text(&format!("{title} {}", outcome.word()))?;
            applied.push((manifest.kind, path, put.object));
        }
    }
    if args.wait {
        let timeout = Duration::from_secs(args.timeout);
        for (kind, path, object) in &applied {
            settle::wait(&cloud, kind, path, object, None, timeout).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn app(replicas: u32, revision: u64) -> Value {
        json!({
            "apiVersion": "cloudnexus/v1", "kind": "App",
            "metadata": {"name": "web", "revision": revision, "created": "2023-11-14T22:13:20.123Z"},
            "spec": {"image": "web", "replicas": replicas}, "status": {"phase": "Ready"},
        })
    }

    #[test]
    fn only_the_users_part_counts() {
        assert_eq!(Outcome::of(None, &app(1, 1)), Outcome::Created);
        assert_eq!(Outcome::of(Some(&app(1, 1)), &app(1, 9)), Outcome::Unchanged);
        assert_eq!(Outcome::of(Some(&app(1, 1)), &app(2, 2)), Outcome::Configured);
    }

    #[test]
    fn a_diff_shows_the_lines_that_change() {
        assert_eq!(diff("app/web", Some(&app(1, 1)), &app(1, 2)).unwrap(), "");
        let changed = diff("app/web", Some(&app(1, 1)), &app(2, 2)).unwrap();
        assert!(changed.starts_with("--- live/app/web\n+++ new/app/web\n@@"), "{changed}");
        assert!(changed.contains("-  replicas: 1\n+  replicas: 2\n"), "{changed}");
        assert!(!changed.contains("revision") && !changed.contains("phase"));
        let created = diff("app/web", None, &app(1, 1)).unwrap();
        assert!(created.lines().skip(3).all(|l| l.starts_with('+')), "{created}");
    }
}
