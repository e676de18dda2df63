//! `nexus status`: how the cloud is, from its API; failing that, what this machine knows of it.

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use nexus_api::{Certificate, CertificateState, EtcdEndpoint, EtcdStatus, GroupStatus};
use serde::{Deserialize, Serialize};

use super::output::{plain, size};
use crate::client::{Client, Parts};
use crate::local::{self, Output};

const PATIENCE: Duration = Duration::from_secs(5);
/// Clocks that are closer together than this are not worth a word.
const CLOCK: i64 = 100;

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
    let more = |key: &str| status.more.get(key).cloned().unwrap_or_default();
    if let Some(region) = more("region").as_str() {
        println!("region             {}", plain(region));
    }
    let etcd: Option<EtcdStatus> = serde_json::from_value(more("etcd")).ok();
    for group in read::<GroupStatus>(more("groups")) {
        println!("group              {}", group_line(&group, etcd.is_some()));
        if let Some(reason) = &group.pressure {
            println!("                   {}", plain(reason));
        }
    }
    if let Some(etcd) = &etcd {
        let answer = etcd.endpoints.iter().filter(|e| e.reachable).count();
        println!("etcd               {answer} of {} endpoints answer", etcd.endpoints.len());
        for endpoint in &etcd.endpoints {
            println!("                   {}", endpoint_line(endpoint));
        }
        if !etcd.others.is_empty() {
            println!("                   not seen: {}", plain(&etcd.others.join(", ")));
        }
    }
    for certificate in read::<Certificate>(more("certificates")) {
        let state = match certificate.state {
            CertificateState::Good => "",
            CertificateState::Ending => ", not renewed",
            CertificateState::Ended => ", ended",
        };
        println!("certificate        {} until {}{state}", plain(&certificate.name), certificate.not_after);
    }
    if let Some(message) = more("message").as_str() {
        println!("                   {}", plain(message));
    }
    Ok(())
}

/// The items that can be read: an older or newer server may say other things.
fn read<T: serde::de::DeserializeOwned>(list: serde_json::Value) -> Vec<T> {
    let items = list.as_array().cloned().unwrap_or_default();
    items.into_iter().filter_map(|item| serde_json::from_value(item).ok()).collect()
}

/// A member of etcd in a line: who it is, how full it is, and what ails it.
fn endpoint_line(endpoint: &EtcdEndpoint) -> String {
    let mut parts = Vec::new();
    if endpoint.reachable && !endpoint.version.is_empty() {
        let role = if endpoint.leader { "leads" } else { "follows" };
        parts.push(format!("{} {role}", endpoint.member));
        parts.push(format!("version {}", endpoint.version));
        let (all, used) = (size(endpoint.database_bytes), size(endpoint.database_bytes_in_use));
        parts.push(format!("database {all}, {used} of it in use"));
    }
    parts.extend(endpoint.trouble.clone());
    plain(&format!("{}: {}", endpoint.endpoint, parts.join(", ")))
}

/// A group of the metadata store in a line: who leads, how many vote and answer, how fast it commits, how complete the
/// asked server's copy is, and whose clock is furthest off. Where etcd keeps it, no server votes.
fn group_line(group: &GroupStatus, etcd: bool) -> String {
    let name_of = |node: u64| {
        let member = group.members.iter().find(|m| m.node == node);
        member.and_then(|m| m.name.clone()).unwrap_or_else(|| format!("node {node}"))
    };
    let voters: Vec<_> = group.members.iter().filter(|m| m.voter).collect();
    let answering = voters.iter().filter(|m| m.reachable).count();
    let learners = group.members.len() - voters.len();
    let mut parts = vec![
        group.leader.map_or_else(|| "no leader".to_owned(), |node| format!("leader {}", name_of(node))),
        format!("{answering} of {} {} answer", voters.len(), if etcd { "servers" } else { "voters" }),
    ];
    if learners > 0 {
        parts.push(format!("{learners} read along"));
    }
    if !group.quorum {
        parts.push("no quorum".to_owned());
    }
    parts.push(format!("commits in {} ms", group.commit_latency_ms));
    #[allow(clippy::cast_precision_loss)] // Tenths of seconds are shown.
    parts.push(format!("copy complete up to {:.1} s ago", group.stale_ms as f64 / 1000.0));
    let worst = group.members.iter().filter_map(|m| Some((m.clock_skew_ms?, m.node)));
    if let Some((ms, node)) = worst.max_by_key(|(ms, _)| ms.abs()).filter(|(ms, _)| ms.abs() >= CLOCK) {
        parts.push(format!("clock of {} {ms} ms off", name_of(node)));
    }
    plain(&format!("{}: {}", group.group, parts.join(", ")))
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

    #[test]
    fn a_group_is_told_in_a_line() {
        let member = |node: u64, voter: bool, reachable: bool, skew: i64| serde_json::json!({"node": node, "name": format!("s-{node}"), "voter": voter, "reachable": reachable, "clock_skew_ms": skew});
        let group = serde_json::json!([{
            "group": "global", "leader": 1, "quorum": false, "commit_latency_ms": 1.5, "revision": 7, "stale_ms": 12_340,
            "members": [member(1, true, true, 0), member(101, true, false, -250), member(201, false, true, 3)],
        }, {"group": 5}]);
        let lines: Vec<String> = read::<GroupStatus>(group).iter().map(|g| group_line(g, false)).collect();
        let line = "global: leader s-1, 1 of 2 voters answer, 1 read along, no quorum, commits in 1.5 ms, copy complete up to \
                    12.3 s ago, clock of s-101 -250 ms off";
        assert_eq!(lines, [line]);
    }

    #[test]
    fn a_member_of_etcd_is_told_in_a_line() {
        let endpoint = EtcdEndpoint {
            endpoint: "10.0.0.1:2379".into(),
            reachable: true,
            member: "m0".into(),
            version: "3.4.23".into(),
            leader: true,
            database_bytes: 2048,
            database_bytes_in_use: 1024,
            trouble: None,
        };
        let (all, used) = (size(2048), size(1024));
        let line = format!("10.0.0.1:2379: m0 leads, version 3.4.23, database {all}, {used} of it in use");
        assert_eq!(endpoint_line(&endpoint), line);
        let dead = EtcdEndpoint { reachable: false, trouble: Some("refused".into()), ..endpoint };
        assert_eq!(endpoint_line(&dead), "10.0.0.1:2379: refused");
    }
}
