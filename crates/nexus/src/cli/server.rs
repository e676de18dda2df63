//! `nexus server`: runs a control plane server, makes the first one of a region, and changes who belongs to it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use nexus_api::operations::{JoinRole, Named, Nothing, Replace, ServerJoin, ServerJoined};
use nexus_env::{Env, RngExt as _};
use nexus_iam::envelope::FileKeys;
use nexus_iam::{CertRequest, CertificateAuthority, SpiffeId, TokenSecret};
use nexus_model::Name;
use nexus_model::kind::Tier;
use serde_json::Value;

use super::cloud::{Cloud, CloudArgs, text};
use super::join::{self, Door, Home, JoinArgs, TokenArgs};
use super::output::{self, Format};
use super::resource::new_name;
use super::table::Printer;
use crate::config::{
    AuditKeep, AuthorityFiles, BootstrapCell, CERTIFICATE_SECONDS, GlobalConfig, Member, REGION_AUTHORITY_LIFE,
    ROOT_LIFE, ServerConfig, StoreConfig, TlsFiles,
};
use crate::context::Context;
use crate::exit::Fail;
use crate::role::server::authority::PublicNames;

const CONFIG: &str = "nexus.toml";

/// Runs a control plane server, or changes who belongs to the control plane
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_required = false,
    after_help = "Examples:\n  \
    nexus server --config /var/lib/nexus-server/nexus.toml\n  \
    nexus server --config nexus.toml --store etcd://10.0.0.11:2379,10.0.0.12:2379/nexus\n  \
    nexus server token --zone zone-b\n  \
    nexus server list\n  \
    nexus server replace server-c --with server-d"
)]
pub struct ServerArgs {
    /// The server's configuration, in TOML
    #[arg(long, value_name = "FILE", required = true)]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    pub store: StoreArgs,
    #[command(subcommand)]
    pub command: Option<ServerCommand>,
}

/// The metadata engine, if it is not the servers' own.
#[derive(Debug, Args)]
pub struct StoreArgs {
    /// Keeps the metadata in an etcd cluster, like `[store]` of the configuration and instead of it:
    /// etcd://[USER@]HOST:PORT,HOST:PORT/PREFIX, with TLS and a user ?ca=FILE&cert=FILE&key=FILE&password-file=FILE
    #[arg(long = "store", value_name = "URL", value_parser = StoreConfig::from_url)]
    pub url: Option<StoreConfig>,
}

#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// Makes the first server of a new cluster, with its authority and the administrator's token
    Init(InitArgs),
    /// Makes a token by which one server may join
    Token(TokenArgs),
    /// Joins a region's control plane, by a token: writes this machine's configuration
    Join(ServerJoinArgs),
    /// Shows the servers and how each does
    List(ListArgs),
    /// Takes a server out of the control plane; refused if too few would be left
    Remove(RemoveArgs),
    /// Takes a server out for another that has joined, without a pause
    Replace(ReplaceArgs),
    /// Lets one server go on alone after the majority is lost for good; the others are fenced
    Recover(super::recover::RecoverArgs),
}

#[derive(Debug, Args)]
pub struct InitArgs {
    /// Where configuration, keys and data are kept
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// The server's name
    #[arg(long, value_name = "NAME", value_parser = new_name, default_value = "server-1")]
    name: Name,
    /// The cluster's name and trust domain: lower-case letters, digits and hyphens [default: a random one]
    #[arg(long, value_name = "NAME", value_parser = new_name)]
    cluster: Option<Name>,
    #[arg(long, value_name = "NAME", value_parser = new_name, default_value = "local")]
    region: Name,
    /// The region's zones, the first one this server's
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = new_name, default_value = "zone-a")]
    zones: Vec<Name>,
    /// Where other servers, hosts and gateways reach this one, such as 10.0.0.1:7440
    #[arg(long, value_name = "IP:PORT")]
    wire: SocketAddr,
    /// Where users reach its API, such as 10.0.0.1:8443
    #[arg(long, value_name = "IP:PORT")]
    api_listen: SocketAddr,
    /// The API's address as users write it [default: https:// and --api-listen]
    #[arg(long, value_name = "URL")]
    api_url: Option<String>,
    /// Apps are reached at NAME.DOMAIN
    #[arg(long, value_name = "DOMAIN", default_value = nexus_model::plan::DEFAULT_DOMAIN)]
    domain: String,
    #[command(flatten)]
    store: StoreArgs,
    /// How long certificates are good; they are renewed when half of it is over [default: 1h, and 90d for those of the API]
    #[arg(long, value_name = "TIME", value_parser = life)]
    certificate_life: Option<Duration>,
}

#[derive(Debug, Args)]
pub struct ServerJoinArgs {
    #[command(flatten)]
    join: JoinArgs,
    #[command(flatten)]
    store: StoreArgs,
    /// Where other servers, hosts and gateways reach this one, such as 10.0.0.4:7440
    #[arg(long, value_name = "IP:PORT")]
    wire: SocketAddr,
    /// Where users reach its API, such as 10.0.0.4:8443
    #[arg(long, value_name = "IP:PORT")]
    api_listen: SocketAddr,
    /// The API's address as users write it [default: https:// and --api-listen]
    #[arg(long, value_name = "URL")]
    api_url: Option<String>,
    /// A copy of another server's master keys; without it this one can't check second factors and signed requests
    #[arg(long, value_name = "FILE")]
    master_keys: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct ListArgs {
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Args)]
pub struct RemoveArgs {
    #[arg(value_parser = new_name)]
    name: Name,
    #[command(flatten)]
    cloud: CloudArgs,
}

#[derive(Debug, Args)]
pub struct ReplaceArgs {
    /// The server to take out, alive or not
    #[arg(value_parser = new_name)]
    old: Name,
    /// The server that takes its place
    #[arg(long = "with", value_name = "NEW", value_parser = new_name)]
    new: Name,
    #[command(flatten)]
    cloud: CloudArgs,
}

pub async fn run(command: ServerCommand) -> anyhow::Result<()> {
    match command {
        ServerCommand::Init(args) => init(&args),
        ServerCommand::Token(args) => join::token(JoinRole::Server, &args).await,
        ServerCommand::Join(args) => join_server(&args).await,
        ServerCommand::List(args) => list(&args).await,
        ServerCommand::Remove(args) => {
            let cloud = Cloud::connect(&args.cloud)?;
            let _: Value = join::run(&cloud, "server-remove", &Named { name: args.name.clone() }).await?;
            output::text(&format!("server {} is no member any more; stop it on its machine", args.name))
        }
        ServerCommand::Recover(args) => super::recover::run(&args),
        ServerCommand::Replace(args) => {
            let cloud = Cloud::connect(&args.cloud)?;
            let body = Replace { old: args.old.clone(), new: args.new.clone() };
            let _: Value = join::run(&cloud, "server-replace", &body).await?;
            output::text(&format!("server {} has taken the place of {}", args.new, args.old))
        }
    }
}

async fn list(args: &ListArgs) -> anyhow::Result<()> {
    let answer: Value = join::run(&Cloud::connect(&args.cloud)?, "server-list", &Nothing {}).await?;
    match args.output {
        Format::Json => return output::json(&answer),
        Format::Yaml => return output::yaml(&answer),
        _ => {}
    }
    let items = answer["items"].as_array().cloned().unwrap_or_default();
    let flag = |item: &Value, path: &str| if item[path] == true { "yes" } else { "no" }.to_owned();
    let rows = items.iter().map(|i| {
        let number = |path: &str| i[path].as_i64().map_or_else(|| "-".to_owned(), |n| n.to_string());
        vec![
            text(i, "/name").to_owned(),
            number("node"),
            text(i, "/zone").to_owned(),
            text(i, "/state").to_owned(),
            role(i).to_owned(),
            flag(i, "reachable"),
            number("lagEntries"),
            text(i, "/wire").to_owned(),
            text(i, "/api").to_owned(),
        ]
    });
    let header = ["NAME", "NODE", "ZONE", "STATE", "ROLE", "REACHABLE", "BEHIND", "WIRE", "API"];
    output::text(&Printer::new(&header).lines(rows.collect()))?;
    for item in items.iter().filter(|i| i["trouble"].is_string()) {
        output::note(&format!("{}: {}", text(item, "/name"), text(item, "/trouble")));
    }
    Ok(())
}

/// What a server is in its region's group. Where etcd keeps the metadata, nobody votes: those that don't lead follow.
fn role(item: &Value) -> &'static str {
    match (item["leader"] == true, item["voter"].as_bool()) {
        (true, _) => "leader",
        (false, Some(true)) => "voter",
        (false, Some(false)) => "learner",
        (false, None) => "follower",
    }
}

/// Where a server that joins keeps its metadata: where its fleet does. Files of the others are not its own.
fn store_of(fleets: Option<StoreConfig>, given: Option<StoreConfig>) -> anyhow::Result<Option<StoreConfig>> {
    match (fleets, given) {
        (None, Some(_)) => {
            Err(Fail::conflict("this fleet keeps its metadata in its servers: leave --store out").into())
        }
        (Some(fleets), None) if !fleets.needs_no_files() => Err(Fail::conflict(format!(
            "this fleet keeps its metadata in etcd, {}: say with --store how this server gets in, and run the command again",
            fleets.url
        ))
        .into()),
        (fleets, given) => Ok(given.or(fleets)),
    }
}

fn api_url(given: Option<&String>, listen: SocketAddr) -> String {
    given.map_or_else(|| format!("https://{listen}"), |url| url.trim_end_matches('/').to_owned())
}

fn tls(home: &Home, cert: &str) -> TlsFiles {
    TlsFiles { ca: home.path("tls/ca.pem"), cert: home.path(cert), key: home.path("tls/key.pem") }
}

fn authority_of(home: &Home, certificate_seconds: Option<u64>) -> AuthorityFiles {
    AuthorityFiles { cert: home.path("tls/authority.pem"), key: home.path("tls/authority.key"), certificate_seconds }
}

/// How long certificates are to be good.
fn life(text: &str) -> Result<Duration, String> {
    let life = join::duration(text)?;
    let (least, most) = (CERTIFICATE_SECONDS.start(), CERTIFICATE_SECONDS.end() / 86_400);
    if CERTIFICATE_SECONDS.contains(&life.as_secs()) { Ok(life) } else { Err(format!("from {least}s to {most}d")) }
}

fn init(args: &InitArgs) -> anyhow::Result<()> {
    let env = Env::real();
    let Some(zone) = args.zones.first().cloned() else { return Err(Fail::usage("--zones: at least one").into()) };
    let home = Home::make(&args.data_dir, CONFIG)?;
    let cluster = match &args.cluster {
        Some(name) => name.to_string(),
        None => format!("cnx-{}", env.rng.bytes::<4>().iter().map(|b| format!("{b:02x}")).collect::<String>()),
    };
    let now = join::now();
    let api = api_url(args.api_url.as_ref(), args.api_listen);
    let names = PublicNames::of(args.name.as_str(), &api, &[]).map_err(Fail::usage)?;
    let root = CertificateAuthority::generate(&cluster, now, ROOT_LIFE).context("making the root authority")?;
    let ca = root.intermediate(args.region.as_str(), now, REGION_AUTHORITY_LIFE).context("making the authority")?;
    let (own, public) = (SpiffeId::server(&cluster, args.name.as_str())?, SpiffeId::api(&cluster, args.name.as_str())?);
    let request = CertRequest::from_pem(&home.key.request(&[own.clone(), public.clone()])?)?;
    let authority = authority_of(&home, args.certificate_life.map(|life| life.as_secs()));
    let cert = ca.sign(&request, &own, &[], &[], now, authority.certificate_life())?;
    let life = authority.public_certificate_life();
    let api_cert = ca.sign(&request, &public, &names.dns, &names.ips, now, life)?;
    let (root, ca) = (root.to_pem(), ca.to_pem());
    home.write("tls/ca.pem", &root.cert)?;
    let root_key = home.write("root.key", &root.key)?;
    home.write("tls/authority.pem", &ca.cert)?;
    home.write("tls/authority.key", &ca.key)?;
    home.write("tls/server.pem", &cert.cert_chain_pem)?;
    home.write("tls/api.pem", &api_cert.cert_chain_pem)?;
    let secret = TokenSecret::generate(env.rng.bytes());
    let token = home.write("token", &secret.reveal())?;
    home.write("token.sha256", &secret.hash().to_string())?;
    home.write("master-keys", &FileKeys::generate().to_text())?;
    let config = ServerConfig {
        name: args.name.clone(),
        node_id: 1,
        cluster_id: cluster.clone(),
        region: args.region.clone(),
        zone,
        data_dir: home.folder("data")?,
        backup_dir: None,
        audit_webhook: None,
        audit_keep: AuditKeep::default(),
        store: args.store.url.clone(),
        wire_listen: args.wire,
        api_tls_listen: args.api_listen,
        api_http_listen: None,
        api_peer_listen: None,
        token_hash: home.path("token.sha256"),
        master_keys: Some(home.path("master-keys")),
        domain: args.domain.clone(),
        issuer: None,
        provider_networks: Vec::new(),
        registry_networks: Vec::new(),
        registry_ca_file: None,
        blob_grace_hours: crate::role::server::image_gc::default_grace(),
        webhook_networks: Vec::new(),
        zones: args.zones.clone(),
        join: false,
        authority: Some(authority),
        tls: tls(&home, "tls/server.pem"),
        api_tls: tls(&home, "tls/api.pem"),
        cells: args
            .zones
            .iter()
            .map(|zone| cell_of(zone).map(|name| BootstrapCell { name, zone: zone.clone() }))
            .collect::<anyhow::Result<_>>()?,
        tier: Tier::default(),
        members: BTreeMap::from([(1, Member { name: args.name.clone(), wire: args.wire.into(), api: api.clone() })]),
        global: None,
    };
    let path = home.configure(CONFIG, &config)?;
    let context = crate::context::write(&Context {
        endpoints: vec![api],
        ca: Some(home.path("tls/ca.pem")),
        token_file: Some(token),
        region: args.region.clone(),
        project: "default".parse().expect("a well-formed name"),
        organization: None,
        session_file: None,
        data_dir: None,
    })?;
    output::text(&format!("{cluster} is made; its first server is {}", args.name))?;
    output::note(&format!(
        "Next:\n  nexus install --role server --config {}\n  nexus server token          # for the second one\nThe \
         context {} speaks to it.\nNo server needs {}, the root's key: take it away from this machine, and keep it for \
         `nexus ca region`.",
        path.display(),
        context.display(),
        root_key.display()
    ));
    Ok(())
}

fn cell_of(zone: &Name) -> anyhow::Result<Name> {
    format!("{zone}-cell-1").parse().with_context(|| format!("naming a cell of zone {zone}"))
}

async fn join_server(args: &ServerJoinArgs) -> anyhow::Result<()> {
    let name = args.join.name()?;
    let home = Home::make(&args.join.data_dir, CONFIG)?;
    let door = Door::open(&args.join).await?;
    let ids = [door.id(&["server", name.as_str()])?, door.id(&["api", name.as_str()])?];
    let body = ServerJoin {
        token: args.join.token.clone(),
        name: name.clone(),
        zone: args.join.zone.clone(),
        wire: args.wire.to_string(),
        api: api_url(args.api_url.as_ref(), args.api_listen),
        csr: home.key.request(&ids)?,
    };
    let joined: ServerJoined = door.join(JoinRole::Server, &body).await?;
    let members = joined
        .members
        .iter()
        .map(|m| {
            let wire = m.wire.parse().with_context(|| format!("server {}'s wire endpoint {}", m.name, m.wire))?;
            Ok((m.node, Member { name: m.name.clone(), wire, api: m.api.clone() }))
        })
        .collect::<anyhow::Result<BTreeMap<_, _>>>()?;
    home.write("tls/ca.pem", &joined.ca)?;
    home.write("tls/server.pem", &joined.cert)?;
    home.write("tls/api.pem", &joined.api_cert)?;
    home.write("token.sha256", &joined.token_hash)?;
    if let Some(keys) = &args.master_keys {
        let text = std::fs::read_to_string(keys).with_context(|| format!("reading {}", keys.display()))?;
        FileKeys::parse(&text).with_context(|| format!("the master keys {}", keys.display()))?;
        home.write("master-keys", &text)?;
    }
    let authority = match &joined.authority_key {
        Some(key) => {
            home.write("tls/authority.pem", joined.authority_cert.as_ref().unwrap_or(&joined.ca))?;
            home.write("tls/authority.key", key)?;
            let seconds = joined.config.get("certificate_seconds").cloned().unwrap_or(Value::Null);
            Some(authority_of(&home, serde_json::from_value(seconds).context("how long certificates are good")?))
        }
        None => None,
    };
    let field = |name: &str| joined.config.get(name).cloned().unwrap_or(Value::Null);
    let tier: Option<Tier> = serde_json::from_value(field("tier")).context("the region's tier")?;
    let global: Option<GlobalConfig> = serde_json::from_value(field("global")).context("the global group")?;
    let fleets = serde_json::from_value(field("store")).context("where the fleet keeps its metadata")?;
    let store = store_of(fleets, args.store.url.clone())?;
    let cells: Option<Vec<BootstrapCell>> = serde_json::from_value(field("cells")).context("the region's cells")?;
    let keep: Option<AuditKeep> = serde_json::from_value(field("audit_keep")).context("how long records are kept")?;
    let networks: Option<Vec<String>> = serde_json::from_value(field("provider_networks"))
        .context("the networks in which identity providers may be")?;
    let registries: Option<Vec<String>> =
        serde_json::from_value(field("registry_networks")).context("the networks in which registries may be")?;
    let grace: Option<u32> =
        serde_json::from_value(field("blob_grace_hours")).context("how long unnamed blobs are kept")?;
    let hooks: Option<Vec<String>> =
        serde_json::from_value(field("webhook_networks")).context("the networks that webhooks may lead to")?;
    let config = ServerConfig {
        name: name.clone(),
        node_id: joined.node,
        cluster_id: joined.cluster_id,
        region: joined.region,
        zone: joined.zone,
        data_dir: home.folder("data")?,
        backup_dir: None,
        audit_webhook: None,
        audit_keep: keep.unwrap_or_default(),
        store,
        wire_listen: args.wire,
        api_tls_listen: args.api_listen,
        api_http_listen: None,
        api_peer_listen: None,
        token_hash: home.path("token.sha256"),
        master_keys: args.master_keys.as_ref().map(|_| home.path("master-keys")),
        domain: joined.domain,
        issuer: joined.issuer,
        provider_networks: networks.unwrap_or_default(),
        registry_networks: registries.unwrap_or_default(),
        registry_ca_file: None,
        blob_grace_hours: grace.unwrap_or_else(crate::role::server::image_gc::default_grace),
        webhook_networks: hooks.unwrap_or_default(),
        zones: joined.zones,
        join: true,
        authority,
        tls: tls(&home, "tls/server.pem"),
        api_tls: tls(&home, "tls/api.pem"),
        cells: cells.unwrap_or_default(),
        tier: tier.unwrap_or_default(),
        members,
        global,
    };
    let path = home.configure(CONFIG, &config)?;
    output::text(&format!("server {name} is node {}; it becomes a member when it runs", joined.node))?;
    output::note(&format!("Next:\n  nexus install --role server --config {}", path.display()));
    Ok(())
}
