//! `nexus version`: of this program and, if one can be reached, of the cloud.

use std::time::Duration;

use clap::Args;
use reqwest::Method;
use serde_json::{Value, json};

use super::cloud::{Cloud, CloudArgs, text};
use super::output::{self, Format};
use crate::client::Parts;

const PATIENCE: Duration = Duration::from_secs(3);

/// Shows the version of this program and of the cloud
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus version\n  \
    nexus version --client -o json")]
pub struct VersionArgs {
    /// Does not ask the cloud
    #[arg(long)]
    client: bool,
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn run(args: &VersionArgs) -> anyhow::Result<()> {
    let own = env!("CARGO_PKG_VERSION");
    let cloud = if args.client { None } else { ask(&args.cloud).await };
    match args.output {
        Format::Json => output::json(&json!({"client": own, "cloud": cloud})),
        Format::Yaml => output::yaml(&json!({"client": own, "cloud": cloud})),
        _ => {
            output::text(&format!("nexus {own}"))?;
            cloud.map_or(Ok(()), |version| output::text(&format!("cloud {version}")))
        }
    }
}

/// The version of the cloud's control plane. Whoever asks for a version wants no error because no cloud runs.
async fn ask(args: &CloudArgs) -> Option<String> {
    let cloud = Cloud::connect(args).ok()?;
    let parts = Parts::default().timeout(PATIENCE);
    let status: Value = cloud.client.json(Method::GET, "/v1/status", parts).await.ok()?;
    Some(output::plain(text(&status, "/control_plane_version"))).filter(|v| !v.is_empty())
}
