//! `nexus region remove`: takes a region out of the fleet. Regions come by themselves: their servers say that they are there.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nexus_api::operations::RegionRemove;
use nexus_model::Name;
use nexus_model::kind;
use serde_json::Value;

use super::cloud::{Cloud, CloudArgs, Listing, is_code, text};
use super::join;
use super::output;
use super::resource::new_name;
use crate::client::ClientError;
use crate::exit::{Exit, Fail};
use crate::local;

/// Until the silence of servers that have just stopped is noticed, with time to spare.
const SILENCE: Duration = Duration::from_secs(40);
const LOOK: Duration = Duration::from_millis(500);
/// So many apps are named in a refusal.
const NAMED: usize = 5;

/// Takes a region out of the fleet
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus region remove region-d\n  \
    nexus region remove region-d --force    # with the apps that only it has")]
pub struct RegionArgs {
    #[command(subcommand)]
    command: RegionCommand,
}

#[derive(Debug, Subcommand)]
enum RegionCommand {
    /// Lets a region go: its servers lose their place in the global group, and the others forget it. A region of the local
    /// cloud is stopped first; elsewhere, stop its servers yourself
    Remove(RemoveArgs),
}

#[derive(Debug, Args)]
struct RemoveArgs {
    #[arg(value_parser = new_name)]
    name: Name,
    /// Also when it has apps of its own, which go with it, or can't be asked
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn run(args: &RegionArgs) -> anyhow::Result<()> {
    let RegionCommand::Remove(args) = &args.command;
    let mut cloud = Cloud::connect(&args.cloud)?;
    // Not by way of the region itself.
    cloud.target.region = kind::GLOBAL.parse().expect("a well-formed name");
    let regions = kind::find("regions").expect("a kind");
    let path = cloud.object(regions, &args.name);
    let region: Value = cloud.client.get(&path).await?;
    if !args.force {
        refuse_with_apps(&cloud, &args.name).await?;
    }
    let here = local::Leaving::find(cloud.data_dir(), &args.name)?;
    if let Some(here) = &here {
        output::note(&format!("stopping {}", args.name));
        here.stop()?;
    }
    let servers = region["status"]["servers"].as_array().map(Vec::as_slice).unwrap_or_default();
    let nodes = servers.iter().filter_map(|s| s["node"].as_u64()).collect();
    let asked = RegionRemove { name: args.name.clone(), nodes };
    until_silent(|| async { join::run::<Value>(&cloud, "region-remove", &asked).await.map(drop) }).await?;
    until_silent(|| async { Ok(cloud.delete(&path, None).await.map(drop)?) }).await?;
    if let Some(here) = here {
        here.forget()?;
    }
    output::text(&format!("region {} is no part of the fleet any more", args.name))
}

/// What only this region has would be lost with it.
async fn refuse_with_apps(cloud: &Cloud, region: &Name) -> anyhow::Result<()> {
    let apps = kind::find("apps").expect("a kind");
    let listing = Listing { all_projects: true, region: Some(region.clone()), ..Listing::default() };
    let own = |app: &Value| text(app, "/metadata/owner/uid").is_empty();
    let listed = cloud.list(apps, &listing, own).await;
    let (found, _) = listed.with_context(|| {
        format!("asking {region} for its apps; `--force` removes a region that can't be asked, with all it has")
    })?;
    if found.is_empty() {
        return Ok(());
    }
    let name = |app: &Value| format!("{}/{}", text(app, "/metadata/project"), text(app, "/metadata/name"));
    let named: Vec<String> = found.iter().take(NAMED).map(name).collect();
    Err(Fail::conflict(format!(
        "{region} has {} apps of its own ({}): delete them first, or `--force` lets them go with it",
        found.len(),
        named.join(", ")
    ))
    .into())
}

/// Tries again while the fleet still hears the region.
async fn until_silent<F: Future<Output = anyhow::Result<()>>>(mut work: impl FnMut() -> F) -> anyhow::Result<()> {
    let deadline = Instant::now() + SILENCE;
    loop {
        let Err(error) = work().await else { return Ok(()) };
        let waits = error
            .downcast_ref::<ClientError>()
            .is_some_and(|e| is_code(e, "conflict") || e.exit() == Exit::Unavailable);
        if !waits || Instant::now() >= deadline {
            return Err(error);
        }
        tokio::time::sleep(LOOK).await;
    }
}
