//! The configuration files of the roles: TOML, one type per role, unknown fields refused.
//!
//! `nexus up` writes these files for the local cloud; a fleet's operator writes the same ones. A path may be relative
//! to the folder that the file is in. Nothing secret stands in them: they name the files that hold keys.

mod classes;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nexus_control::audit::retention::Keep;
use nexus_env::Endpoint;
use nexus_model::Name;
use nexus_model::kind::{Capacity, Classes, GLOBAL, Tier};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use self::classes::StorageFolder;
use crate::role::agent::default_images_percent;
use crate::role::server::image_gc::{LEAST_GRACE, default_grace};
use crate::role::server::outbound::Network;

/// Why a role can't use its configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("reading {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is not a valid configuration of this role: {message}")]
    Parse { path: PathBuf, message: String },
    #[error("{path}: `{field}`: {message}")]
    Value { path: PathBuf, field: &'static str, message: String },
}

/// The files of one mTLS identity, in PEM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The certificates of the authorities that are trusted.
    pub ca: PathBuf,
    /// The certificate chain, leaf first.
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// The certificate authority of the server's region: whoever reads its key can let anyone in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AuthorityFiles {
    /// Its certificate, and after it the root's.
    pub cert: PathBuf,
    /// Readable by its owner alone.
    pub key: PathBuf,
    /// How long the certificates that this server signs are good, in seconds; they are renewed when half of it is over.
    /// Every server of a region should say the same [default: an hour, and 90 days for those that users see]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_seconds: Option<u64>,
}

/// How long members' certificates are good, unless an authority is configured otherwise.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(3600);
/// How long those are good that users see, whose tools tolerate nothing that has ended.
pub const PUBLIC_CERTIFICATE_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);
/// How long a root is good, and a region's authority under it.
pub const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
pub const REGION_AUTHORITY_LIFE: Duration = Duration::from_secs(2 * 365 * 24 * 3600);
/// What an authority may be configured to. Whoever must renew more often than every twenty seconds does little else.
pub const CERTIFICATE_SECONDS: std::ops::RangeInclusive<u64> = 30..=366 * 24 * 3600;

impl AuthorityFiles {
    pub fn certificate_life(&self) -> Duration {
        self.certificate_seconds.map_or(CERTIFICATE_LIFE, Duration::from_secs)
    }

    pub fn public_certificate_life(&self) -> Duration {
        self.certificate_seconds.map_or(PUBLIC_CERTIFICATE_LIFE, Duration::from_secs)
    }
}

/// A control plane server among its peers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    pub name: Name,
    /// Where its peers, agents and gateways reach it by `wire`.
    pub wire: Endpoint,
    /// Where users reach its API, such as `https://127.0.0.1:8443`.
    pub api: String,
}

/// A cell that the first start creates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootstrapCell {
    pub name: Name,
    pub zone: Name,
}

/// `nexus server`: a member of a region's control plane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    pub name: Name,
    /// This server in the consensus group: a key of `members`, never reused.
    pub node_id: u64,
    /// The cluster's name and the trust domain of its certificates.
    pub cluster_id: String,
    pub region: Name,
    pub zone: Name,
    /// The metadata log, snapshots and the image store.
    pub data_dir: PathBuf,
    /// Where backups are written [default: `backups` in `data_dir`]
    #[serde(default)]
    pub backup_dir: Option<PathBuf>,
    /// Keeps the metadata in an etcd cluster instead of `data_dir`
    #[serde(default)]
    pub store: Option<StoreConfig>,
    /// Sends the records of the audit logs elsewhere too
    #[serde(default)]
    pub audit_webhook: Option<WebhookConfig>,
    /// How long records of the audit logs are kept
    #[serde(default)]
    pub audit_keep: AuditKeep,
    /// Southbound listener (mTLS): peers, agents, gateways.
    pub wire_listen: SocketAddr,
    /// Northbound listener (TLS, bearer tokens).
    pub api_tls_listen: SocketAddr,
    /// The same API without TLS; loopback only.
    #[serde(default)]
    pub api_http_listen: Option<SocketAddr>,
    /// The same API with TLS once more, where servers of other regions reach it, if they don't at `api_tls_listen`.
    #[serde(default)]
    pub api_peer_listen: Option<SocketAddr>,
    /// The file with the SHA-256 of the administrator's token, in hexadecimal.
    pub token_hash: PathBuf,
    /// The file with the master keys, by which secrets are sealed that stand in the metadata. Every server has the same one.
    #[serde(default)]
    pub master_keys: Option<PathBuf>,
    /// Apps are reached at `NAME.<domain>`.
    #[serde(default = "default_domain")]
    pub domain: String,
    /// Whom access tokens are by, the same at every server: the URL at which others find how to check them
    /// [default: `https://<domain>`]
    #[serde(default)]
    pub issuer: Option<String>,
    /// Where identity providers of tenants may be beside the public internet, such as `10.1.0.0/16`: servers ask them, and so
    /// would tell a tenant what answers there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub provider_networks: Vec<String>,
    /// Where registries of images may be beside the public internet, likewise.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub registry_networks: Vec<String>,
    /// Certificates (PEM) of authorities that registries may have theirs from, beside those that the machine trusts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registry_ca_file: Option<PathBuf>,
    /// How long blobs are kept that no image names any more, in hours
    #[serde(default = "default_grace")]
    pub blob_grace_hours: u32,
    /// Where webhooks and callbacks of tenants may lead beside the public internet, such as `10.1.0.0/16`. A tenant learns of
    /// what answers there whether it takes a POST.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub webhook_networks: Vec<String>,
    /// The zones that the first start creates, beside the region, the organization `default` and the projects `default`
    /// and `system`.
    #[serde(default)]
    pub zones: Vec<Name>,
    /// It joins a control plane that runs: it waits to be taken in instead of founding one.
    #[serde(default)]
    pub join: bool,
    /// With it, this server can let others join and renew certificates.
    #[serde(default)]
    pub authority: Option<AuthorityFiles>,
    /// The wire identity: `spiffe://<cluster>/server/<name>`.
    pub tls: TlsFiles,
    /// The certificate that users see.
    pub api_tls: TlsFiles,
    /// The cells that the first start creates.
    #[serde(default)]
    pub cells: Vec<BootstrapCell>,
    /// Of the region: only servers of core regions vote in the global group.
    #[serde(default)]
    pub tier: Tier,
    /// Every voting server of the region, this one too, by node id.
    #[serde(with = "by_node_id")]
    pub members: BTreeMap<u64, Member>,
    /// The group that all regions share. Without it the region is alone, and its own servers are that group too.
    #[serde(default)]
    pub global: Option<GlobalConfig>,
}

/// `[store]` of a server: the etcd cluster that keeps its groups.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// `etcd://HOST:PORT,HOST:PORT/PREFIX`
    pub url: String,
    /// The authority of etcd's certificates; without it there is no TLS.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// The certificate that is shown to etcd, and its key.
    #[serde(default)]
    pub cert: Option<PathBuf>,
    #[serde(default)]
    pub key: Option<PathBuf>,
    #[serde(default)]
    pub user: Option<String>,
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// Whether the leader has etcd forget what is older than ten minutes, for all who share it.
    #[serde(default = "yes")]
    pub compact: bool,
}

fn yes() -> bool {
    true
}

impl StoreConfig {
    /// All of it in one text, as the command line takes it:
    /// `etcd://[USER@]HOST:PORT,HOST:PORT/PREFIX[?ca=FILE&cert=FILE&key=FILE&password-file=FILE&compact=false]`.
    pub fn from_url(text: &str) -> Result<Self, String> {
        let (place, options) = text.split_once('?').unwrap_or((text, ""));
        let (scheme, rest) = place.split_once("://").unwrap_or(("", place));
        let (user, rest) = match rest.split_once('@') {
            Some((user, rest)) => (Some(user.to_owned()), rest),
            None => (None, rest),
        };
        if user.as_ref().is_some_and(|u| u.contains(':')) {
            return Err("a password does not belong on the command line: name its file with ?password-file=".to_owned());
        }
        let url = format!("{scheme}://{rest}");
        let mut store = Self { url, user, ca: None, cert: None, key: None, password_file: None, compact: true };
        for option in options.split('&').filter(|o| !o.is_empty()) {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            let file = match name {
                "ca" => &mut store.ca,
                "cert" => &mut store.cert,
                "key" => &mut store.key,
                "password-file" => &mut store.password_file,
                "compact" => {
                    store.compact = value.parse().map_err(|_| "compact is true or false".to_owned())?;
                    continue;
                }
                _ => return Err(format!("`{name}` is none of ca, cert, key, password-file and compact")),
            };
            if !Path::new(value).is_absolute() {
                return Err(format!("{name}={value}: the whole path of a file is needed, from `/`"));
            }
            *file = Some(value.into());
        }
        store.check()?;
        Ok(store)
    }

    fn check(&self) -> Result<(), String> {
        self.parts()?;
        if self.cert.is_some() != self.key.is_some() || self.user.is_some() != self.password_file.is_some() {
            return Err("`cert` goes with `key`, and a user with a password file".to_owned());
        }
        if self.cert.is_some() && self.ca.is_none() {
            return Err("`cert` needs `ca`: without it there is no TLS".to_owned());
        }
        Ok(())
    }

    /// Whether another machine can use it as it is: it names no files.
    pub fn needs_no_files(&self) -> bool {
        [&self.ca, &self.cert, &self.key, &self.password_file].iter().all(|file| file.is_none())
    }

    /// The hosts, each `HOST:PORT`, and the prefix of all keys.
    pub fn parts(&self) -> Result<(Vec<String>, String), String> {
        let rest = self.url.strip_prefix("etcd://").ok_or_else(|| format!("{}: only etcd:// is known", self.url))?;
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let hosts: Vec<String> = hosts.split(',').map(str::to_owned).collect();
        let well_formed =
            |h: &String| h.rsplit_once(':').is_some_and(|(name, port)| !name.is_empty() && port.parse::<u16>().is_ok());
        if let Some(bad) = hosts.iter().find(|h| !well_formed(h)) {
            return Err(format!("`{bad}` is not HOST:PORT"));
        }
        let prefix = if prefix.is_empty() { "nexus" } else { prefix.trim_end_matches('/') };
        Ok((hosts, format!("/{prefix}")))
    }
}

/// `[global]` of a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GlobalConfig {
    /// The voting servers of the global group when it was founded, by node id. A server that is not among them joins the
    /// group through them, and reads along without a vote.
    #[serde(with = "by_node_id")]
    pub members: BTreeMap<u64, Member>,
}

impl ServerConfig {
    pub fn backup_dir(&self) -> PathBuf {
        self.backup_dir.clone().unwrap_or_else(|| self.data_dir.join("backups"))
    }

    /// The founding voters of the global group.
    pub fn global_members(&self) -> &BTreeMap<u64, Member> {
        self.global.as_ref().map_or(&self.members, |g| &g.members)
    }
}

/// `nexus agent`: the daemon of a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// The host's name.
    pub name: Name,
    pub cluster_id: String,
    pub region: Name,
    pub zone: Name,
    pub cell: Name,
    #[serde(default)]
    pub rack: Option<Name>,
    /// Wire listener (mTLS), and the address that the host registers with.
    pub address: SocketAddr,
    /// The /64 from which instances get their infrastructure addresses.
    pub prefix6: Ipv6Addr,
    /// The /24 for programs in instances that listen on IPv4 alone.
    pub prefix4: Ipv4Addr,
    /// The wire endpoints of the region's servers.
    pub servers: Vec<Endpoint>,
    /// Cached plans, images, instances' scratch layers and logs. Survives a boot of the host.
    pub data_dir: PathBuf,
    /// Sockets and namespaces. Empty after every boot of the host; holds `boot-id`, which changes with each.
    pub run_dir: PathBuf,
    pub keeper_socket: PathBuf,
    /// The cgroup below which instances' groups are made, relative to the root of every hierarchy.
    pub cgroup_parent: PathBuf,
    /// `/healthz`, `/readyz` and `/metrics`, in plain HTTP.
    pub metrics_listen: SocketAddr,
    pub tls: TlsFiles,
    /// What the host offers.
    pub capacity: Capacity,
    /// Countable compute classes, such as `gpu-v100 = 2`.
    #[serde(default)]
    pub classes: Classes,
    /// How full the file system of `data_dir` may be before images are removed that nothing here needs.
    #[serde(default = "default_images_percent")]
    pub images_disk_percent: u8,
    /// Device nodes behind compute classes, as many for each unit.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub devices: BTreeMap<Name, Vec<PathBuf>>,
    /// Storage classes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub storage: BTreeMap<Name, StorageFolder>,
    /// What the link with `address` sends, in bits a second. With it, the link is shared out: control goes before tenants.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink_rate: Option<u64>,
}

/// Rates of a link, in bits a second.
const UPLINK_RATES: std::ops::RangeInclusive<u64> = 1_000_000..=1_000_000_000_000;

/// `nexus keeper`: the owner of a host's processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeeperConfig {
    pub socket: PathBuf,
    /// What a re-executed or restarted keeper must know. Must be empty after a boot of the host.
    pub state_dir: PathBuf,
}

/// `nexus gateway`: the edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GatewayConfig {
    pub name: Name,
    pub cluster_id: String,
    pub region: Name,
    /// The zone whose instances are nearest.
    pub zone: Name,
    /// Where users' requests arrive.
    pub http_listen: SocketAddr,
    /// `/healthz`, `/readyz` and `/metrics`, in plain HTTP; loopback or a management network.
    pub admin_listen: SocketAddr,
    /// The wire endpoints of the region's servers.
    pub servers: Vec<Endpoint>,
    /// Where gateways of other regions reach this one (mTLS); nobody does without it.
    #[serde(default)]
    pub peer_listen: Option<SocketAddr>,
    /// The cached routes.
    pub data_dir: PathBuf,
    pub tls: TlsFiles,
}

/// `nexus host-init`: the first process of a local host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostInitConfig {
    /// The host's name, which becomes its host name too.
    pub name: Name,
    /// The program to run as agent and keeper.
    pub program: PathBuf,
    /// The cgroup folders to join before anything is started.
    pub cgroups: Vec<PathBuf>,
    /// The address whose arrival says that the host's link is ready.
    pub address: IpAddr,
    /// Made anew at every boot of the host, on a `/run` of its own.
    pub run_dir: PathBuf,
    pub agent_config: PathBuf,
    pub agent_log: PathBuf,
    pub keeper_config: PathBuf,
    pub keeper_log: PathBuf,
}

impl ServerConfig {
    /// Whom access tokens are by.
    pub fn issuer(&self) -> String {
        self.issuer.clone().unwrap_or_else(|| format!("https://{}", self.domain))
    }
}

fn default_domain() -> String {
    nexus_model::plan::DEFAULT_DOMAIN.to_owned()
}

/// A configuration that can be read from a file.
pub trait Config: DeserializeOwned {
    /// Makes relative paths absolute.
    fn resolve(&mut self, base: &Path);

    /// What types alone can't say: the field at fault and why.
    fn check(&self) -> Result<(), (&'static str, String)> {
        Ok(())
    }

    /// Reads, resolves and checks the file.
    fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let text = std::fs::read_to_string(path).map_err(read)?;
        let mut config: Self = toml::from_str(&text)
            .map_err(|e| ConfigError::Parse { path: path.to_owned(), message: e.to_string().trim_end().to_owned() })?;
        let absolute = std::path::absolute(path).map_err(read)?;
        config.resolve(absolute.parent().unwrap_or(Path::new("/")));
        config.check().map_err(|(field, message)| ConfigError::Value { path: path.to_owned(), field, message })?;
        Ok(config)
    }
}

fn resolve(base: &Path, paths: &mut [&mut PathBuf]) {
    for path in paths {
        // An absolute right side replaces the left one.
        **path = base.join(&**path);
    }
}

/// Where records of the audit logs are sent; see `docs/guide/audit.md`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WebhookConfig {
    /// `https://…`; without TLS only on this machine.
    pub url: String,
    /// The file with the secret that signs: 16 bytes at least.
    pub secret_file: PathBuf,
}

/// For how many days what audit records say is kept, by their class; their hashes stay. See `docs/guide/audit.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuditKeep {
    /// Identity, policies, refusals, anchors [default: 1096]
    pub security_days: u32,
    /// Changes of resources [default: 400]
    pub change_days: u32,
    /// Reads and sign-ins [default: 90]
    pub access_days: u32,
}

impl Default for AuditKeep {
    fn default() -> Self {
        Self { security_days: 1096, change_days: 400, access_days: 90 }
    }
}

impl From<AuditKeep> for Keep {
    fn from(days: AuditKeep) -> Self {
        let of = |days: u32| Duration::from_secs(u64::from(days) * 24 * 3600);
        Self { security: of(days.security_days), change: of(days.change_days), access: of(days.access_days) }
    }
}

impl WebhookConfig {
    fn check(&self) -> Result<(), String> {
        let url: http::Uri = self.url.parse().map_err(|e| format!("{:?} is no address: {e}", self.url))?;
        let local = matches!(url.host(), Some("127.0.0.1" | "[::1]" | "localhost"));
        match url.scheme_str() {
            Some("https") => Ok(()),
            Some("http") if local => Ok(()),
            _ => Err(format!("{:?} is not https: records would cross the network in the clear", self.url)),
        }
    }
}

impl TlsFiles {
    fn resolve(&mut self, base: &Path) {
        resolve(base, &mut [&mut self.ca, &mut self.cert, &mut self.key]);
    }
}

impl Config for ServerConfig {
    fn resolve(&mut self, base: &Path) {
        resolve(base, &mut [&mut self.data_dir, &mut self.token_hash]);
        if let Some(keys) = &mut self.master_keys {
            resolve(base, &mut [keys]);
        }
        self.tls.resolve(base);
        self.api_tls.resolve(base);
        for path in [&mut self.backup_dir, &mut self.registry_ca_file].into_iter().flatten() {
            resolve(base, &mut [path]);
        }
        if let Some(webhook) = &mut self.audit_webhook {
            resolve(base, &mut [&mut webhook.secret_file]);
        }
        if let Some(authority) = &mut self.authority {
            resolve(base, &mut [&mut authority.cert, &mut authority.key]);
        }
        if let Some(store) = &mut self.store {
            for file in [&mut store.ca, &mut store.cert, &mut store.key, &mut store.password_file] {
                file.iter_mut().for_each(|file| resolve(base, &mut [file]));
            }
        }
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if let Some(issuer) = &self.issuer
            && (!issuer.starts_with("https://") || issuer.len() > 256 || issuer.ends_with('/'))
        {
            return Err((
                "issuer",
                "it is an https:// URL of at most 256 bytes, without a slash at its end".to_owned(),
            ));
        }
        for network in &self.provider_networks {
            network.parse::<Network>().map_err(|why| ("provider_networks", why))?;
        }
        for network in &self.registry_networks {
            network.parse::<Network>().map_err(|why| ("registry_networks", why))?;
        }
        if self.blob_grace_hours < LEAST_GRACE {
            return Err(("blob_grace_hours", format!("at least {LEAST_GRACE}: an upload has a day to be named")));
        }
        for network in &self.webhook_networks {
            network.parse::<Network>().map_err(|why| ("webhook_networks", why))?;
        }
        if self.region == GLOBAL {
            return Err(("region", format!("`{GLOBAL}` is the name of what belongs to no region")));
        }
        if self.region == *"all" {
            return Err(("region", "`all` stands for every region on the command line".to_owned()));
        }
        let life = self.authority.as_ref().and_then(|a| a.certificate_seconds);
        if let Some(seconds) = life.filter(|s| !CERTIFICATE_SECONDS.contains(s)) {
            let (least, most) = (CERTIFICATE_SECONDS.start(), CERTIFICATE_SECONDS.end());
            return Err((
                "authority",
                format!("certificate_seconds = {seconds}: between {least} and {most} is needed"),
            ));
        }
        let AuditKeep { security_days, change_days, access_days } = self.audit_keep;
        if let Some(days) = [security_days, change_days, access_days].into_iter().find(|days| *days < 7) {
            return Err(("audit_keep", format!("{days} days are too few to look into anything: at least 7")));
        }
        if let Some(webhook) = &self.audit_webhook {
            webhook.check().map_err(|why| ("audit_webhook", why))?;
        }
        if let Some(store) = &self.store {
            store.check().map_err(|why| ("store", why))?;
        }
        if !self.members.contains_key(&self.node_id) {
            return Err(("node_id", format!("{} is not a key of `members`", self.node_id)));
        }
        if let Some(listen) = self.api_http_listen.filter(|l| !l.ip().is_loopback()) {
            return Err((
                "api_http_listen",
                format!("{listen} is not a loopback address: without TLS, tokens would cross the network in the clear"),
            ));
        }
        if let Some(cell) = self.cells.iter().find(|c| !self.zones.contains(&c.zone)) {
            return Err(("cells", format!("the zone {} of cell {} is not in `zones`", cell.zone, cell.name)));
        }
        Ok(())
    }
}

impl Config for AgentConfig {
    fn resolve(&mut self, base: &Path) {
        resolve(base, &mut [&mut self.data_dir, &mut self.run_dir, &mut self.keeper_socket]);
        self.storage.values_mut().for_each(|folder| resolve(base, &mut [&mut folder.path]));
        self.tls.resolve(base);
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.servers.is_empty() {
            return Err(("servers", "at least one endpoint is needed".to_owned()));
        }
        if self.images_disk_percent > 100 {
            return Err(("images_disk_percent", "between 0 and 100".to_owned()));
        }
        if self.uplink_rate.is_some_and(|rate| !UPLINK_RATES.contains(&rate)) {
            return Err(("uplink_rate", "between 1000000 and 1000000000000 bits a second".to_owned()));
        }
        classes::check_devices(&self.devices, &self.classes).map_err(|why| ("devices", why))?;
        if self.prefix6.segments()[4..].iter().any(|s| *s != 0) {
            return Err(("prefix6", format!("{}: the last 64 bits must be zero", self.prefix6)));
        }
        if self.prefix4.octets()[3] != 0 {
            return Err(("prefix4", format!("{}: the last 8 bits must be zero", self.prefix4)));
        }
        let plain = self.cgroup_parent.components().all(|c| matches!(c, std::path::Component::Normal(_)));
        if !plain || self.cgroup_parent.as_os_str().is_empty() {
            return Err((
                "cgroup_parent",
                format!("{}: a relative path without `..` is needed", self.cgroup_parent.display()),
            ));
        }
        Ok(())
    }
}

impl Config for KeeperConfig {
    fn resolve(&mut self, base: &Path) {
        resolve(base, &mut [&mut self.socket, &mut self.state_dir]);
    }
}

impl Config for GatewayConfig {
    fn resolve(&mut self, base: &Path) {
        resolve(base, &mut [&mut self.data_dir]);
        self.tls.resolve(base);
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.servers.is_empty() {
            return Err(("servers", "at least one endpoint is needed".to_owned()));
        }
        if let Some(peer) = self.peer_listen.filter(|p| p.ip().is_unspecified() || p.port() == 0) {
            let message =
                format!("{peer}: gateways of other regions are told this address, so it must be one they reach");
            return Err(("peer_listen", message));
        }
        Ok(())
    }
}

impl Config for HostInitConfig {
    fn resolve(&mut self, base: &Path) {
        resolve(
            base,
            &mut [
                &mut self.program,
                &mut self.run_dir,
                &mut self.agent_config,
                &mut self.agent_log,
                &mut self.keeper_config,
                &mut self.keeper_log,
            ],
        );
    }
}

/// TOML's keys are texts; node ids are numbers.
mod by_node_id {
    use std::collections::BTreeMap;

    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::Member;

    pub fn serialize<S: Serializer>(members: &BTreeMap<u64, Member>, s: S) -> Result<S::Ok, S::Error> {
        members.iter().map(|(id, m)| (id.to_string(), m)).collect::<BTreeMap<_, _>>().serialize(s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<u64, Member>, D::Error> {
        BTreeMap::<String, Member>::deserialize(d)?
            .into_iter()
            .map(|(id, m)| match id.parse() {
                Ok(id) => Ok((id, m)),
                Err(_) => Err(D::Error::custom(format!("`{id}` is not a node id: a whole number is needed"))),
            })
            .collect()
    }
}

/// A whole configuration, for tests.
#[cfg(test)]
pub(crate) const A_GATEWAY: &str = r#"
name = "gateway-1"
cluster_id = "home"
region = "local"
zone = "zone-a"
http_listen = "127.0.0.1:8000"
admin_listen = "127.0.0.1:8100"
servers = ["tcp:[fd00::1]:7440"]
data_dir = "data"

[tls]
ca = "/etc/ca.pem"
cert = "gateway.pem"
key = "gateway.key"
"#;

#[cfg(test)]
mod tests;
