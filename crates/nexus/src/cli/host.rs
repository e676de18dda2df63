//! `nexus host` and `nexus gateway`: lets hosts and gateways in, and hosts out.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nexus_api::operations::{GatewayJoin, GatewayJoined, HostJoin, HostJoined, JoinRole, Nothing, TokenId};
use nexus_model::Name;
use nexus_model::kind::ANY_CELL;
use serde_json::Value;

use super::agent::HasArgs;
use super::cloud::{Cloud, CloudArgs, text};
use super::drain::{self, CordonArgs, DrainArgs, LabelArgs};
use super::join::{self, Door, Home, JoinArgs, TokenArgs};
use super::leave::{self, LeaveArgs, UncordonArgs};
use super::output::{self, Format};
use super::resource::new_name;
use super::table::Printer;
use crate::config::{AgentConfig, GatewayConfig, KeeperConfig, TlsFiles};
use crate::local::Machine;

const AGENT: &str = "agent.toml";
const KEEPER: &str = "keeper.toml";
const GATEWAY: &str = "gateway.toml";

/// Lets hosts into the region and out of it
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus host token --zone zone-a --class gpu-v100=2\n  \
    nexus host join --token TOKEN --api https://10.0.0.1:8443 --wire 10.0.0.21:7450 --class gpu-v100=2:/dev/nvidia0,/dev/nvidia1\n  \
    nexus host label host-7 disk=nvme\n  \
    nexus host cordon host-7\n  \
    nexus host drain host-7\n  \
    nexus host leave host-7 --force")]
pub struct HostArgs {
    #[command(subcommand)]
    pub command: HostCommand,
}

#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// Makes a token by which one host may join
    Token(TokenArgs),
    /// Joins the region as a host, by a token: writes this machine's configuration
    Join(HostJoinArgs),
    /// Keeps new instances off a host; those that run there stay
    Cordon(CordonArgs),
    /// Empties a host: cordons it and moves its instances, each when another is ready elsewhere
    Drain(DrainArgs),
    /// Takes a cordoned or drained host back into use
    Uncordon(UncordonArgs),
    /// Sets labels of a host, as KEY=VALUE, or removes them, as KEY-
    Label(LabelArgs),
    /// Empties a host and takes it out of the region
    #[command(visible_alias = "remove")]
    Leave(LeaveArgs),
}

#[derive(Debug, Args)]
pub struct HostJoinArgs {
    #[command(flatten)]
    join: JoinArgs,
    /// Where servers reach this host's agent, such as 10.0.0.21:7450
    #[arg(long, value_name = "IP:PORT")]
    wire: SocketAddr,
    /// The cell [default: the token's, or the one of its zone with the most room]
    #[arg(long, value_name = "NAME", value_parser = new_name)]
    cell: Option<Name>,
    /// Its rack, if racks matter
    #[arg(long, value_name = "NAME", value_parser = new_name)]
    rack: Option<Name>,
    #[command(flatten)]
    has: HasArgs,
    /// Where the agent and the keeper meet; emptied by every boot
    #[arg(long, value_name = "DIR", default_value = "/run/nexus")]
    run_dir: PathBuf,
    /// The agent's health and metrics, in plain HTTP
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7451")]
    metrics_listen: SocketAddr,
}

pub async fn run(command: HostCommand) -> anyhow::Result<()> {
    match command {
        HostCommand::Token(args) => join::token(JoinRole::Host, &args).await,
        HostCommand::Join(args) => join_host(&args).await,
        HostCommand::Cordon(args) => drain::cordon(&args).await,
        HostCommand::Drain(args) => drain::drain(&args).await,
        HostCommand::Label(args) => drain::label(&args).await,
        HostCommand::Leave(args) => leave::run(&args).await,
        HostCommand::Uncordon(args) => leave::uncordon(&args).await,
    }
}

fn tls(home: &Home, cert: &str) -> TlsFiles {
    TlsFiles { ca: home.path("tls/ca.pem"), cert: home.path(cert), key: home.path("tls/key.pem") }
}

async fn join_host(args: &HostJoinArgs) -> anyhow::Result<()> {
    let name = args.join.name()?;
    let home = Home::make(&args.join.data_dir, AGENT)?;
    let door = Door::open(&args.join).await?;
    let data_dir = home.folder("data")?;
    let capacity = Machine::measure(&data_dir)?.share(1);
    let body = HostJoin {
        token: args.join.token.clone(),
        name: name.clone(),
        zone: args.join.zone.clone(),
        cell: args.cell.clone(),
        classes: args.has.classes(),
        address: args.wire.to_string(),
        csr: home.key.request(&[door.id(&["agent", name.as_str()])?])?,
    };
    let joined: HostJoined = door.join(JoinRole::Host, &body).await?;
    home.write("tls/ca.pem", &joined.ca)?;
    home.write("tls/agent.pem", &joined.cert)?;
    let keeper = KeeperConfig { socket: args.run_dir.join("keeper.sock"), state_dir: args.run_dir.join("keeper") };
    let agent = AgentConfig {
        name: name.clone(),
        cluster_id: joined.cluster_id,
        region: joined.region,
        zone: joined.zone,
        cell: joined.cell.clone(),
        rack: args.rack.clone(),
        address: args.wire,
        prefix6: joined.prefix6,
        prefix4: joined.prefix4,
        servers: join::endpoints(&joined.servers)?,
        data_dir,
        run_dir: args.run_dir.clone(),
        keeper_socket: keeper.socket.clone(),
        cgroup_parent: PathBuf::from(format!("nexus-{name}/instances")),
        metrics_listen: args.metrics_listen,
        tls: tls(&home, "tls/agent.pem"),
        capacity,
        classes: joined.classes,
        images_disk_percent: crate::role::agent::default_images_percent(),
        devices: Default::default(),
        storage: Default::default(),
        uplink_rate: None,
    };
    let agent = args.has.apply(agent)?;
    let keeper_path = home.configure(KEEPER, &keeper)?;
    let agent_path = home.configure(AGENT, &agent)?;
    let cell = match joined.cell.as_str() {
        ANY_CELL => "joins a cell of its zone with room".to_owned(),
        cell => format!("is of cell {cell}"),
    };
    output::text(&format!("host {name} {cell}; its instances live in {}/64", joined.prefix6))?;
    output::note(&format!(
        "Next:\n  nexus install --role keeper --config {}\n  nexus install --role agent --config {}",
        keeper_path.display(),
        agent_path.display()
    ));
    Ok(())
}

/// Runs an edge gateway, or lets one in
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_required = false,
    after_help = "Examples:\n  \
    nexus gateway --config /var/lib/nexus-gateway/gateway.toml\n  \
    nexus gateway token"
)]
pub struct GatewayArgs {
    /// The gateway's configuration, in TOML
    #[arg(long, value_name = "FILE", required = true)]
    pub config: Option<PathBuf>,
    #[command(subcommand)]
    pub command: Option<GatewayCommand>,
}

#[derive(Debug, Subcommand)]
pub enum GatewayCommand {
    /// Makes a token by which one gateway may join
    Token(TokenArgs),
    /// Joins the region as a gateway, by a token: writes this machine's configuration
    Join(GatewayJoinArgs),
}

#[derive(Debug, Args)]
pub struct GatewayJoinArgs {
    #[command(flatten)]
    join: JoinArgs,
    /// Where users' requests arrive, such as 0.0.0.0:80
    #[arg(long, value_name = "IP:PORT")]
    listen: SocketAddr,
    /// Health and metrics, in plain HTTP
    #[arg(long, value_name = "IP:PORT", default_value_t = (Ipv4Addr::LOCALHOST, 7461).into())]
    admin_listen: SocketAddr,
    /// Where gateways of other regions reach this one
    #[arg(long, value_name = "IP:PORT")]
    peer_listen: Option<SocketAddr>,
}

pub async fn gateway(command: GatewayCommand) -> anyhow::Result<()> {
    match command {
        GatewayCommand::Token(args) => join::token(JoinRole::Gateway, &args).await,
        GatewayCommand::Join(args) => join_gateway(&args).await,
    }
}

async fn join_gateway(args: &GatewayJoinArgs) -> anyhow::Result<()> {
    let name = args.join.name()?;
    let home = Home::make(&args.join.data_dir, GATEWAY)?;
    let door = Door::open(&args.join).await?;
    let body = GatewayJoin {
        token: args.join.token.clone(),
        name: name.clone(),
        zone: args.join.zone.clone(),
        csr: home.key.request(&[door.id(&["gateway", name.as_str()])?])?,
    };
    let joined: GatewayJoined = door.join(JoinRole::Gateway, &body).await?;
    home.write("tls/ca.pem", &joined.ca)?;
    home.write("tls/gateway.pem", &joined.cert)?;
    let config = GatewayConfig {
        name: name.clone(),
        cluster_id: joined.cluster_id,
        region: joined.region,
        zone: joined.zone,
        http_listen: args.listen,
        admin_listen: args.admin_listen,
        servers: join::endpoints(&joined.servers)?,
        peer_listen: args.peer_listen,
        data_dir: home.folder("data")?,
        tls: tls(&home, "tls/gateway.pem"),
    };
    let path = home.configure(GATEWAY, &config)?;
    output::text(&format!("gateway {name} has joined"))?;
    output::note(&format!("Next:\n  nexus install --role gateway --config {}", path.display()));
    Ok(())
}

/// Shows join tokens that were not used yet, and takes them back
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    nexus join-token list\n  \
    nexus join-token revoke 3f9a0c11d2e4")]
pub struct JoinTokenArgs {
    #[command(subcommand)]
    command: JoinTokenCommand,
}

#[derive(Debug, Subcommand)]
enum JoinTokenCommand {
    /// Shows them, without their text
    List {
        #[arg(short, long, value_enum, default_value_t = Format::Table)]
        output: Format,
        #[command(flatten)]
        cloud: CloudArgs,
    },
    /// Takes one back, by its id
    Revoke {
        id: String,
        #[command(flatten)]
        cloud: CloudArgs,
    },
}

pub async fn tokens(args: &JoinTokenArgs) -> anyhow::Result<()> {
    match &args.command {
        JoinTokenCommand::Revoke { id, cloud } => {
            let _: Value = join::run(&Cloud::connect(cloud)?, "token-revoke", &TokenId { id: id.clone() }).await?;
            output::text(&format!("the join token {id} lets nobody in any more"))
        }
        JoinTokenCommand::List { output: format, cloud } => {
            let answer: Value = join::run(&Cloud::connect(cloud)?, "token-list", &Nothing {}).await?;
            match format {
                Format::Json => return output::json(&answer),
                Format::Yaml => return output::yaml(&answer),
                _ => {}
            }
            let items = answer["items"].as_array().context("a list of tokens")?;
            let row =
                |i: &Value| ["id", "role", "zone", "cell", "expires"].map(|f| text(i, &format!("/{f}")).to_owned());
            let rows = items.iter().map(|i| row(i).to_vec()).collect();
            output::text(&Printer::new(&["ID", "ROLE", "ZONE", "CELL", "EXPIRES"]).lines(rows))
        }
    }
}
