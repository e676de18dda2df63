//! `nexus status`: how the cloud is, from its API; failing that, what this machine knows of it.

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::client::{Client, Parts};
use crate::local::{self, Output};

const PATIENCE: Duration = Duration::from_secs(5);

/// Shows how the cloud is.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub cluster_id: String,
    pub control_plane_version: String,
    /// `healthy`, `degraded` or `unavailable`.
    pub status: String,
    /// Measured; absent while there is no leader.
    #[serde(default)]
    pub consensus_latency_ms: Option<f64>,
    /// Hosts that are ready.
    pub active_workers: u64,
    pub topology: Topology,
    /// What a newer server adds is passed on.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Topology {
    pub zones: Vec<String>,
    pub failover_mode: String,
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

pub async fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let client = Client::from_context()?;
    match client.json(reqwest::Method::GET, "/v1/status", Parts::default().timeout(PATIENCE)).await {
        Ok(status) => show(&status, args.output),
        Err(e) => {
            // The folder may be root's, and then this user can't look: the API's silence is the answer.
            if let Ok(Some(members)) = local_members() {
                show_local(&members, args.output)?;
            }
            Err(e.into())
        }
    }
}

fn show(status: &Status, output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        println!("{}", serde_json::to_string_pretty(status).context("writing JSON")?);
        return Ok(());
    }
    let latency = status.consensus_latency_ms.map_or("unknown".to_owned(), |ms| format!("{ms} ms"));
    println!("cluster            {}", status.cluster_id);
    println!("status             {}", status.status);
    println!("version            {}", status.control_plane_version);
    println!("consensus latency  {latency}");
    println!("active workers     {}", status.active_workers);
    println!("zones              {}", status.topology.zones.join(", "));
    println!("failover           {}", status.topology.failover_mode);
    Ok(())
}

/// What `/proc` and the data folder say, if the cloud that the context means is on this machine.
fn local_members() -> anyhow::Result<Option<LocalView>> {
    if std::env::var_os("CNX_URL").is_some_and(|u| !u.is_empty()) {
        return Ok(None);
    }
    let dir = local::resolve_data_dir(None)?;
    let Some(plan) = dir.plan()? else { return Ok(None) };
    Ok(Some(LocalView {
        cluster_id: plan.cluster_id.clone(),
        status: "unavailable",
        supervised: local::has_supervisor(&dir)?,
        members: local::list(&dir, &plan)?,
        logs: dir.log("supervisor").parent().map(|p| p.display().to_string()).unwrap_or_default(),
    }))
}

#[derive(Debug, Serialize)]
struct LocalView {
    cluster_id: String,
    status: &'static str,
    supervised: bool,
    members: Vec<local::MemberView>,
    logs: String,
}

fn show_local(view: &LocalView, output: Output) -> anyhow::Result<()> {
    if output == Output::Json {
        println!("{}", serde_json::to_string_pretty(view).context("writing JSON")?);
        return Ok(());
    }
    println!("cluster    {}", view.cluster_id);
    println!("status     {} (no server answers; this is what this machine knows)", view.status);
    let advice = if view.supervised { "runs" } else { "does not run: `nexus up` starts everything" };
    println!("supervisor {advice}");
    for member in &view.members {
        println!("  {:<12} {:<8} {}", member.name, member.role, member.state);
    }
    println!("logs       {}", view.logs);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_shape_reads_back_unchanged() {
        let text = serde_json::json!({
            "cluster_id": "cnx-us-east-1-prod",
            "control_plane_version": "v2.4.1",
            "status": "healthy",
            "consensus_latency_ms": 2.0,
            "active_workers": 1248,
            "topology": {"zones": ["az-1a", "az-1b", "az-1c"], "failover_mode": "automatic"},
            "region": "local",
        });
        let status: Status = serde_json::from_value(text.clone()).unwrap();
        assert_eq!(serde_json::to_value(&status).unwrap(), text);
    }
}
