//! `nexus net flows`: who connected to whom in a network, and what was dropped, as its hosts have noted it.

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use futures::StreamExt as _;
use nexus_model::{Name, kind};
use reqwest::Method;
use serde_json::Value;

use super::cloud::{Cloud, CloudArgs, encode};
use super::net::Shown;
use super::resource::{find_name, new_name};
use super::table::Printer;
use super::{join, output};
use crate::client::Parts;

/// The longest line of a server that is waited for.
const MAX_LINE: usize = 64 << 10;

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus net flows shop\n  \
    nexus net flows shop --nic web-0a1b2c3d-0 --since 1h\n  \
    nexus net flows shop --follow\n  \
    nexus net flows shop --since 1d --limit 10000 -o json | jq '.items[] | select(.dropped)'\n\n\
    Hosts note nothing unless the network's spec.flowLogs is `all` (new connections, and what was dropped) or `dropped`. \
    With --follow, JSON is one flow a line.")]
pub struct FlowsArgs {
    #[arg(value_parser = new_name)]
    network: Name,
    /// Only those in which this NIC takes part
    #[arg(long, value_name = "NIC", value_parser = new_name)]
    nic: Option<Name>,
    /// How long ago the oldest is at most
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = join::duration)]
    since: Duration,
    /// The newest so many, at most 10000
    #[arg(long, value_name = "NUMBER", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
    /// Goes on with what comes, until Ctrl-C
    #[arg(short, long)]
    follow: bool,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t)]
    output: Shown,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn run(args: &FlowsArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let networks = kind::find("networks").context("this release knows no networks")?;
    let path = cloud.object(networks, &find_name(networks, args.network.as_str())?);
    let mut path =
        format!("{path}:flows?sinceSeconds={}&limit={}&follow={}", args.since.as_secs(), args.limit, args.follow);
    if let Some(nic) = &args.nic {
        path.push_str(&format!("&nic={}", encode(nic.as_str())));
    }
    let mut printer = Printer::new(&["TIME", "HOST", "WHAT", "PROTOCOL", "FROM", "TO", "BYTES"]);
    if args.follow {
        return follow(&cloud, &path, args.output, &mut printer).await;
    }
    let found: Value = cloud.client.get(&path).await?;
    let items = found["items"].as_array().map_or(&[][..], Vec::as_slice);
    match args.output {
        Shown::Json => output::json(&found)?,
        Shown::Text if items.is_empty() => output::note("hosts have noted no such flows"),
        Shown::Text => output::text(&printer.lines(items.iter().map(row).collect()))?,
    }
    missing(&found);
    Ok(())
}

/// Says which hosts did not answer, and what was lost.
fn missing(found: &Value) {
    for silent in found["silent"].as_array().into_iter().flatten() {
        output::note(&format!("{}: {}", word(silent, "host"), word(silent, "why")));
    }
    if let Some(lost) = found["lost"].as_u64().filter(|lost| *lost > 0) {
        output::note(&format!("{lost} flows came too fast to be noted since the hosts' agents began"));
    }
}

async fn follow(cloud: &Cloud, path: &str, shown: Shown, printer: &mut Printer) -> anyhow::Result<()> {
    let mut pieces = cloud.client.stream(Method::GET, path, Parts::default()).await?;
    let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
    let mut text: Vec<u8> = Vec::new();
    loop {
        let piece = tokio::select! {
            biased;
            _ = &mut stop => return Ok(()),
            piece = pieces.next() => match piece {
                Some(piece) => piece?,
                None => return Ok(()),
            },
        };
        text.extend_from_slice(&piece);
        let Some(end) = text.iter().rposition(|b| *b == b'\n') else {
            anyhow::ensure!(text.len() <= MAX_LINE, "the server sends a line without an end");
            continue;
        };
        let lines: Vec<u8> = text.drain(..=end).collect();
        let flows = lines.split(|b| *b == b'\n').filter(|line| !line.is_empty());
        let flows: Vec<Value> =
            flows.map(serde_json::from_slice).collect::<Result<_, _>>().context("reading a flow")?;
        let (notes, flows): (Vec<Value>, Vec<Value>) = flows.into_iter().partition(|line| line.get("silent").is_some());
        notes.iter().for_each(missing);
        if flows.is_empty() {
            continue;
        }
        match shown {
            Shown::Json => flows.iter().try_for_each(|flow| output::text(&flow.to_string()))?,
            Shown::Text => output::text(&printer.lines(flows.iter().map(row).collect()))?,
        }
    }
}

fn word(value: &Value, field: &str) -> String {
    output::plain(value[field].as_str().unwrap_or("-"))
}

/// `NIC ADDRESS:PORT`, as much of it as there is.
fn end(flow: &Value, address: &str, nic: &str, port: &str) -> String {
    let address = word(flow, address);
    let at = match flow[port].as_u64() {
        Some(port) if port > 0 && address.contains(':') => format!("[{address}]:{port}"),
        Some(port) if port > 0 => format!("{address}:{port}"),
        _ => address,
    };
    match flow[nic].as_str() {
        Some(nic) => format!("{} {at}", output::plain(nic)),
        None => at,
    }
}

fn row(flow: &Value) -> Vec<String> {
    vec![
        word(flow, "time"),
        word(flow, "host"),
        flow["dropped"].as_str().map_or_else(|| "allowed".to_owned(), |why| format!("dropped: {}", output::plain(why))),
        word(flow, "protocol"),
        end(flow, "source", "sourceNic", "sourcePort"),
        end(flow, "destination", "destinationNic", "port"),
        flow["bytes"].to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_flow_is_a_row() {
        let flow = json!({
            "host": "h-1", "time": "2026-03-01T12:00:00.000Z", "dropped": "no_ingress_rule", "protocol": "tcp",
            "source": "fd12::5", "sourceNic": "web-nic0", "sourcePort": 4000, "destination": "10.0.0.9", "port": 0, "bytes": 60,
        });
        let row = row(&flow);
        assert_eq!(row[2..], ["dropped: no_ingress_rule", "tcp", "web-nic0 [fd12::5]:4000", "10.0.0.9", "60"]);
    }
}
