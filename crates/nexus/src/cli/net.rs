//! `nexus net`: what tenants' networks do with packets, as the hosts themselves say; and single rules.

use std::io::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use futures::StreamExt as _;
use nexus_model::Name;
use nexus_model::kind;
use nexus_model::plan::{NetworkCheck, Trace, TraceVerdict};
use reqwest::Method;

use super::cloud::{Cloud, CloudArgs, Listing, encode, name_of};
use super::flows::{self, FlowsArgs};
use super::output;
use super::resource::{find_name, new_name};
use super::rule::{self, RuleArgs};
use crate::client::Parts;
use crate::exit::{Exit, Fail};

/// Looks into tenants' networks, and changes single rules
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus net trace --from web-0a1b2c3d-0 --to 10.0.2.5:5432/tcp\n  \
    nexus net trace --from web-0a1b2c3d-0 --to 10.0.2.5/icmp --probe\n  \
    nexus net check                 # every host\n  \
    nexus net check zone-a-host-1\n  \
    nexus net capture web-0a1b2c3d-0 --port 80 -w web.pcap\n  \
    nexus net capture web-0a1b2c3d-0 | tcpdump -nr -\n  \
    nexus net flows shop --since 1h\n  \
    nexus net rule set web http --port 80 --port 8080\n\n\
    `nexus get nics` names the NICs.")]
pub struct NetArgs {
    #[command(subcommand)]
    command: NetCommand,
}

#[derive(Debug, Subcommand)]
enum NetCommand {
    /// Says what becomes of a packet that a NIC sends, hop by hop, by the rules that its host has programmed
    Trace(TraceArgs),
    /// Compares what hosts should have of tenants' networks with what they have
    Check(CheckArgs),
    /// Writes down the packets that pass a NIC, as a pcap file, until Ctrl-C
    Capture(CaptureArgs),
    /// Shows who connected to whom in a network, and what was dropped
    Flows(FlowsArgs),
    Rule(RuleArgs),
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus net trace --from web-0a1b2c3d-0 --to 10.0.2.5:5432/tcp\n  \
    nexus net trace --from web-0a1b2c3d-0 --to '[fd12::5]:53/udp'\n  \
    nexus net trace --from web-0a1b2c3d-0 --to 10.0.2.5/icmp --probe\n\n\
    The packet is a new connection's first. Exit code: 0 whatever becomes of it; 1 when a probe says otherwise.")]
struct TraceArgs {
    /// The NIC that sends it
    #[arg(long, value_name = "NIC", value_parser = new_name)]
    from: Name,
    /// Where to: ADDRESS:PORT/tcp, ADDRESS:PORT/udp or ADDRESS/icmp; an IPv6 address with a port in brackets
    #[arg(long, value_name = "ADDRESS:PORT/PROTOCOL")]
    to: Goal,
    /// Sends such a packet too, and fails if what becomes of it is something else
    #[arg(long)]
    probe: bool,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t)]
    output: Shown,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Clone, Copy, Default, clap::ValueEnum)]
pub enum Shown {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus net check\n  \
    nexus net check zone-a-host-1\n\n\
    Exit code: 0 when everything is as it should be, 1 when something differs.")]
struct CheckArgs {
    /// A host; all of the region, without it
    #[arg(value_parser = new_name)]
    host: Option<Name>,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t)]
    output: Shown,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus net capture web-0a1b2c3d-0 -w web.pcap\n  \
    nexus net capture web-0a1b2c3d-0 --host 10.0.2.5 --port 5432 | tcpdump -nr -\n\n\
    A capture ends with Ctrl-C, after an hour, or with 256 MiB.")]
struct CaptureArgs {
    #[arg(value_parser = new_name)]
    nic: Name,
    /// The file; standard output, without it
    #[arg(short, long, value_name = "FILE")]
    write: Option<PathBuf>,
    /// Only packets from or to this address
    #[arg(long, value_name = "ADDRESS")]
    host: Option<IpAddr>,
    /// Only TCP and UDP from or to this port
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    #[command(flatten)]
    cloud: CloudArgs,
}

/// Where a traced packet goes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Goal {
    to: IpAddr,
    port: Option<u16>,
    protocol: &'static str,
}

impl FromStr for Goal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (at, protocol) = text.rsplit_once('/').ok_or("it ends with its protocol: /tcp, /udp or /icmp")?;
        let protocol = ["tcp", "udp", "icmp"].into_iter().find(|p| *p == protocol);
        let protocol = protocol.ok_or("the protocol is tcp, udp or icmp")?;
        if let Ok(to) = at.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            if protocol != "icmp" {
                return Err(format!("which port? Such as {}:80/{protocol}", shown(to)));
            }
            return Ok(Self { to, port: None, protocol });
        }
        let (to, port) = at.rsplit_once(':').ok_or("it is no address and port, such as 10.0.2.5:80")?;
        let to = to.trim_start_matches('[').trim_end_matches(']');
        let to = to.parse().map_err(|_| format!("{to:?} is no address"))?;
        if protocol == "icmp" {
            return Err("ICMP has no ports".into());
        }
        let port = port.parse().ok().filter(|p| *p > 0).ok_or_else(|| format!("{port:?} is no port"))?;
        Ok(Self { to, port: Some(port), protocol })
    }
}

fn shown(address: IpAddr) -> String {
    match address {
        IpAddr::V4(a) => a.to_string(),
        IpAddr::V6(a) => format!("[{a}]"),
    }
}

pub async fn run(args: &NetArgs) -> anyhow::Result<()> {
    match &args.command {
        NetCommand::Trace(args) => trace(args).await,
        NetCommand::Check(args) => check(args).await,
        NetCommand::Capture(args) => capture(args).await,
        NetCommand::Flows(args) => flows::run(args).await,
        NetCommand::Rule(args) => rule::run(args).await,
    }
}

/// The path of a verb of a NIC.
fn at_nic(cloud: &Cloud, nic: &Name, verb: &str) -> anyhow::Result<String> {
    let kind = kind::find("nics").context("this release knows no NICs")?;
    Ok(format!("{}:{verb}", cloud.object(kind, &find_name(kind, nic.as_str())?)))
}

async fn trace(args: &TraceArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let Goal { to, port, protocol } = &args.to;
    let mut path = at_nic(&cloud, &args.from, "trace")?;
    path.push_str(&format!("?to={}&protocol={protocol}&probe={}", encode(&to.to_string()), args.probe));
    if let Some(port) = port {
        path.push_str(&format!("&port={port}"));
    }
    let trace: Trace = cloud.client.get(&path).await?;
    match args.output {
        Shown::Json => output::json(&trace)?,
        Shown::Text => output::text(&text_of(&trace))?,
    }
    match (trace.verdict, trace.probed) {
        (TraceVerdict::Dropped, Some(true)) => {
            Err(mismatch("the rules say that it is dropped, and a real packet came through"))
        }
        (TraceVerdict::Delivered | TraceVerdict::Gateway, Some(false)) => {
            Err(mismatch("the rules say that it comes through, and a real packet was not answered"))
        }
        _ => Ok(()),
    }
}

fn mismatch(what: &str) -> anyhow::Error {
    let advice = "ask `nexus net check` of its host, and whether the receiver itself drops it";
    Fail::new(Exit::Failed, format!("{what}: {advice}")).into()
}

fn text_of(trace: &Trace) -> String {
    let width = |of: fn(&nexus_model::plan::TraceHop) -> usize| trace.hops.iter().map(of).max().unwrap_or(0);
    let (hosts, places) = (width(|h| h.host.as_str().len()), width(|h| h.at.chars().count()));
    let mut lines: Vec<String> = trace
        .hops
        .iter()
        .map(|h| format!("{:hosts$}  {:places$}  {}", h.host.as_str(), output::plain(&h.at), output::plain(&h.what)))
        .collect();
    lines.push(match trace.verdict {
        TraceVerdict::Delivered => "delivered".into(),
        TraceVerdict::Outside => "leaves the network: what becomes of it outside is not known here".into(),
        TraceVerdict::Gateway => "answered by the subnet's gateway".into(),
        TraceVerdict::Dropped => "dropped".into(),
    });
    match trace.probed {
        Some(true) => lines.push("probe: a real packet came through".into()),
        Some(false) => lines.push("probe: a real packet was not answered".into()),
        None => {}
    }
    lines.join("\n")
}

async fn check(args: &CheckArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let hosts = kind::find("hosts").expect("a kind");
    let names = match &args.host {
        Some(name) => vec![name.clone()],
        None => {
            let (all, _) = cloud.list(hosts, &Listing::default(), |_| true).await?;
            all.iter().map(name_of).collect::<Result<_, _>>()?
        }
    };
    let asked = names.iter().map(|name| {
        let path = format!("{}:check", cloud.object(hosts, name));
        let client = &cloud.client;
        async move { (name, client.get::<NetworkCheck>(&path).await) }
    });
    // A few at once, in the order of their names.
    let answers: Vec<_> = futures::stream::iter(asked).buffered(8).collect().await;
    let (mut different, mut silent, mut all) = (0, None, serde_json::Map::new());
    for (host, answer) in answers {
        match answer {
            Ok(found) => {
                different += found.differences.len();
                if matches!(args.output, Shown::Text) {
                    let held = format!("{} networks, {} NICs", found.networks, found.nics);
                    match found.differences.len() {
                        0 if found.revision.is_none() => output::text(&format!("{host}: nothing was told to it yet"))?,
                        0 => output::text(&format!("{host}: as it should be ({held})"))?,
                        n => output::text(&format!("{host}: {n} differences ({held})"))?,
                    }
                    for difference in &found.differences {
                        output::text(&format!("  {}", output::plain(difference)))?;
                    }
                    for target in &found.failing {
                        output::text(&format!("  {}", output::plain(target)))?;
                    }
                }
                all.insert(host.to_string(), serde_json::to_value(&found)?);
            }
            Err(error) if args.host.is_some() => return Err(error.into()),
            Err(error) => {
                output::note(&format!("{host}: {error}"));
                silent = Some(error);
            }
        }
    }
    if matches!(args.output, Shown::Json) {
        output::json(&all)?;
    }
    if let Some(error) = silent {
        return Err(error.into());
    }
    if different > 0 {
        let advice = "hosts set right what differs within seconds: ask again, and look at the agent's log if it stays";
        return Err(Fail::new(Exit::Failed, format!("{different} differences; {advice}")).into());
    }
    Ok(())
}

async fn capture(args: &CaptureArgs) -> anyhow::Result<()> {
    let cloud = Cloud::connect(&args.cloud)?;
    let mut query: Vec<String> = Vec::new();
    query.extend(args.host.map(|host| format!("address={}", encode(&host.to_string()))));
    query.extend(args.port.map(|port| format!("port={port}")));
    let mut path = at_nic(&cloud, &args.nic, "capture")?;
    if !query.is_empty() {
        path.push_str(&format!("?{}", query.join("&")));
    }
    let mut pieces = cloud.client.stream(Method::GET, &path, Parts::default()).await?;
    // Made once there is something to write: a refusal leaves no file behind.
    let mut file = match &args.write {
        Some(path) => Some(std::fs::File::create(path).with_context(|| format!("making {}", path.display()))?),
        None => None,
    };
    let mut stop = std::pin::pin!(tokio::signal::ctrl_c());
    let (mut bytes, mut told) = (0_u64, false);
    loop {
        let piece = tokio::select! {
            biased;
            _ = &mut stop => break,
            piece = pieces.next() => match piece {
                Some(piece) => piece?,
                None => break,
            },
        };
        if !told {
            told = true;
            output::note(&format!("capturing at nic/{}, until Ctrl-C", args.nic));
        }
        bytes += piece.len() as u64;
        match &mut file {
            Some(file) => file.write_all(&piece).context("writing the capture")?,
            None => output::bytes(&piece)?,
        }
    }
    if let Some(path) = &args.write {
        output::note(&format!("{} in {}", output::size(bytes), path.display()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use nexus_model::plan::TraceHop;

    use super::*;

    #[test]
    fn a_goal_is_an_address_a_port_and_a_protocol() {
        let goal = |to: &str, port, protocol| Ok(Goal { to: to.parse().unwrap(), port, protocol });
        assert_eq!("10.0.2.5:80/tcp".parse(), goal("10.0.2.5", Some(80), "tcp"));
        assert_eq!("[fd12::5]:53/udp".parse(), goal("fd12::5", Some(53), "udp"));
        assert_eq!("10.0.2.5/icmp".parse(), goal("10.0.2.5", None, "icmp"));
        assert_eq!("fd12::5/icmp".parse(), goal("fd12::5", None, "icmp"));
        for bad in
            ["10.0.2.5:80", "10.0.2.5/tcp", "10.0.2.5:0/tcp", "10.0.2.5:80/icmp", "web:80/tcp", "10.0.2.5:80/sctp"]
        {
            assert!(bad.parse::<Goal>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_trace_is_shown_hop_by_hop() {
        let hop = |host: &str, at: &str, what: &str| TraceHop {
            host: host.parse().unwrap(),
            at: at.into(),
            what: what.into(),
        };
        let hops = vec![hop("h-1", "egress rules", "allowed by web/out"), hop("h-10", "route", "to nic b")];
        let trace = Trace { hops, verdict: TraceVerdict::Delivered, probed: Some(false) };
        let text = "h-1   egress rules  allowed by web/out\nh-10  route         to nic b\ndelivered\nprobe: a real packet was not answered";
        assert_eq!(text_of(&trace), text);
    }
}
