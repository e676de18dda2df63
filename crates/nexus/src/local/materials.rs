//! What `up` lays ready before anything starts: the authority, certificates, the token, and every role's configuration.
//!
//! All of it is made at the first start and kept. Certificates are issued anew when less than a quarter of their life is
//! left; configurations are written again whenever this release would write them differently.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use nexus_env::{Endpoint, Env, RngExt as _};
use nexus_iam::envelope::FileKeys;
use nexus_iam::{CaError, CertificateAuthority, Identity, SpiffeId, TokenSecret};
use nexus_model::kind::Capacity;
use nexus_model::{Bytes, MilliCpu, Name};
use serde::Serialize;

use super::cgroup;
use super::plan::{HostPlan, Plan, ServerPlan};
use super::state::{DataDir, make_private_dir, write_private};
use crate::config::{
    AgentConfig, AuditKeep, AuthorityFiles, BootstrapCell, CERTIFICATE_LIFE, GatewayConfig, GlobalConfig,
    HostInitConfig, KeeperConfig, Member, PUBLIC_CERTIFICATE_LIFE, REGION_AUTHORITY_LIFE, ROOT_LIFE, ServerConfig,
    StorageFolder, StoreConfig, TlsFiles,
};
use crate::secret_file;

/// A region's authority is made anew when it ends within this.
const RENEW_AUTHORITY: Duration = Duration::from_secs(90 * 24 * 3600);
/// On the host's own tmpfs.
const RUN_DIR: &str = "/run/nexus";
const DOMAIN: &str = "localhost";
const MAX_INSTANCES: u32 = 250;

/// What the machine can give; a host declares a share of it.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    pub cpus: u32,
    pub memory: u64,
    pub free_disk: u64,
}

impl Machine {
    /// Measures this machine; `root` says whose disk is meant.
    pub fn measure(root: &Path) -> anyhow::Result<Self> {
        let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
        let total =
            text.lines().find_map(|l| l.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        let disk =
            nix::sys::statvfs::statvfs(root).with_context(|| format!("asking how full {} is", root.display()))?;
        Ok(Self {
            cpus: std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX / 1000)),
            memory: total.context("/proc/meminfo has no MemTotal")? << 10,
            free_disk: disk.blocks_available() as u64 * disk.fragment_size() as u64,
        })
    }

    /// What one of `hosts` hosts declares. Memory and disk are shared out, because they run out for real; processors are
    /// not, because a busy one only makes others slower, and a sixth of a laptop would hold nothing.
    pub fn share(self, hosts: u64) -> Capacity {
        let whole = |bytes: u64, unit: u64| Bytes((bytes / unit).max(1) * unit);
        Capacity {
            cpu: MilliCpu(self.cpus.max(2) * 1000),
            memory: whole(self.memory / 10 * 8 / hosts, 256 << 20),
            scratch: whole(self.free_disk / 10 * 7 / hosts, 1 << 30),
            instances: MAX_INSTANCES,
        }
    }
}

/// Makes or completes everything that the cloud's members read.
pub fn prepare(dir: &DataDir, plan: &Plan, program: &Path, machine: Machine) -> anyhow::Result<()> {
    let env = Env::real();
    let now = SystemTime::UNIX_EPOCH + Duration::from_millis(env.now_millis().try_into().unwrap_or(0));
    token(dir, &env)?;
    master_keys(dir)?;
    let domain = &plan.cluster_id;
    for region in &plan.regions {
        let ca = region_authority(dir, plan, region.name.as_str(), now)?;
        let issue =
            |name: &str, id: SpiffeId, public: Option<Vec<IpAddr>>| certificate(dir, &ca, now, name, &id, public);
        for server in plan.servers_of(region) {
            issue(server.name.as_str(), SpiffeId::server(domain, server.name.as_str())?, None)?;
            let addresses = server.api_peer.iter().map(|a| a.ip()).collect();
            issue(&format!("{}-api", server.name), SpiffeId::api(domain, server.name.as_str())?, Some(addresses))?;
        }
        for host in plan.hosts_of(region) {
            issue(host.name.as_str(), SpiffeId::agent(domain, host.name.as_str())?, None)?;
        }
        for gateway in plan.gateways_of(region) {
            issue(gateway.name.as_str(), SpiffeId::gateway(domain, gateway.name.as_str())?, None)?;
        }
    }
    configurations(dir, plan, program, machine)
}

fn read_optional(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("reading {}", path.display())),
    }
}

/// Writes an authority. The certificate comes last: with it, the pair is whole.
pub fn keep_authority(ca: &CertificateAuthority, cert: &Path, key: &Path) -> anyhow::Result<()> {
    let pem = ca.to_pem();
    write_private(key, pem.key.as_bytes())?;
    write_private(cert, pem.cert.as_bytes())
}

/// The root, made at the first start.
fn root(dir: &DataDir, plan: &Plan, now: SystemTime) -> anyhow::Result<CertificateAuthority> {
    if let Some(cert) = read_optional(&dir.ca())? {
        let key = secret_file::read_text(&dir.ca_key())
            .context("the root's key is needed to make a region's authority: put it back for this start")?;
        return CertificateAuthority::from_pem(&cert, &key).context("reading the cloud's root authority");
    }
    let root = CertificateAuthority::generate(&plan.cluster_id, now, ROOT_LIFE).context("making the root authority")?;
    keep_authority(&root, &dir.ca(), &dir.ca_key())?;
    Ok(root)
}

/// A region's authority. Once all are there, the root's key may be taken away until one comes near its end.
fn region_authority(dir: &DataDir, plan: &Plan, region: &str, now: SystemTime) -> anyhow::Result<CertificateAuthority> {
    let (cert, key) = dir.region_ca(region);
    if let Some(text) = read_optional(&cert)? {
        let ca = CertificateAuthority::from_pem(&text, &secret_file::read_text(&key)?)
            .with_context(|| format!("reading the authority of region {region}"))?;
        if ca.not_after() > now + RENEW_AUTHORITY {
            return Ok(ca);
        }
    }
    let root = root(dir, plan, now)?;
    let ca = match root.intermediate(region, now, REGION_AUTHORITY_LIFE) {
        // A root of an earlier release may sign leafs alone.
        Err(CaError::NotARoot) => root,
        made => made.with_context(|| format!("making the authority of region {region}"))?,
    };
    keep_authority(&ca, &cert, &key)?;
    Ok(ca)
}

fn token(dir: &DataDir, env: &Env) -> anyhow::Result<()> {
    let secret = match read_optional(&dir.token())? {
        Some(text) => TokenSecret::parse(&text).with_context(|| format!("reading {}", dir.token().display()))?,
        None => {
            let secret = TokenSecret::generate(env.rng.bytes());
            write_private(&dir.token(), secret.reveal().as_bytes())?;
            secret
        }
    };
    write_if_changed(&dir.token_hash(), &secret.hash().to_string())
}

/// The keys that all of the cloud's servers seal secrets with.
fn master_keys(dir: &DataDir) -> anyhow::Result<()> {
    match read_optional(&dir.master_keys())? {
        Some(_) => Ok(()),
        None => write_private(&dir.master_keys(), FileKeys::generate().to_text().as_bytes()),
    }
}

fn certificate(
    dir: &DataDir,
    ca: &CertificateAuthority,
    now: SystemTime,
    name: &str,
    id: &SpiffeId,
    // Of one that users see: the addresses beside those of the loopback.
    public: Option<Vec<IpAddr>>,
) -> anyhow::Result<()> {
    let (cert_path, key_path) = (dir.cert(name), dir.key(name));
    let life = if public.is_some() { PUBLIC_CERTIFICATE_LIFE } else { CERTIFICATE_LIFE };
    if let (Some(cert), Some(key)) = (read_optional(&cert_path)?, read_optional(&key_path)?) {
        let good = Identity::from_pem(&cert, &key).is_ok_and(|i| i.id() == *id && i.not_after() > now + life / 2);
        if good {
            return Ok(());
        }
    }
    let (names, addresses) = match public {
        Some(mut addresses) => {
            addresses.extend([IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()]);
            (vec!["localhost".to_owned(), id.name().to_owned()], addresses)
        }
        None => (Vec::new(), Vec::new()),
    };
    let issued =
        ca.issue(id, &names, &addresses, now, life).with_context(|| format!("issuing a certificate to {id}"))?;
    write_private(&key_path, issued.key_pem.as_bytes())?;
    write_private(&cert_path, issued.cert_chain_pem.as_bytes())
}

fn configurations(dir: &DataDir, plan: &Plan, program: &Path, machine: Machine) -> anyhow::Result<()> {
    let tls = |name: &str| TlsFiles { ca: dir.ca(), cert: dir.cert(name), key: dir.key(name) };
    let members = |servers: &[ServerPlan]| -> BTreeMap<u64, Member> {
        let member = |s: &ServerPlan| Member { name: s.name.clone(), wire: s.wire.into(), api: s.api_url() };
        servers.iter().map(|s| (s.node_id, member(s))).collect()
    };
    let store = plan.store.as_deref().map(StoreConfig::from_url).transpose().map_err(anyhow::Error::msg)?;
    let global = plan.apart.then(|| GlobalConfig { members: members(&plan.founding_voters()) });
    for region in &plan.regions {
        let servers = plan.servers_of(region);
        let (cert, key) = dir.region_ca(region.name.as_str());
        let authority = AuthorityFiles { cert, key, certificate_seconds: None };
        let endpoints: Vec<Endpoint> = servers.iter().map(|s| s.wire.into()).collect();
        for server in &servers {
            let config = ServerConfig {
                name: server.name.clone(),
                node_id: server.node_id,
                cluster_id: plan.cluster_id.clone(),
                region: region.name.clone(),
                zone: server.zone.clone(),
                data_dir: dir.data(server.name.as_str()),
                backup_dir: None,
                audit_webhook: None,
                audit_keep: AuditKeep::default(),
                store: store.clone(),
                wire_listen: server.wire,
                api_tls_listen: server.api_tls,
                api_http_listen: Some(server.api_http),
                api_peer_listen: server.api_peer,
                token_hash: dir.token_hash(),
                master_keys: Some(dir.master_keys()),
                domain: DOMAIN.to_owned(),
                issuer: None,
                // Whoever develops against a provider has it on this machine.
                provider_networks: vec!["127.0.0.0/8".to_owned(), "::1/128".to_owned()],
                registry_networks: vec!["127.0.0.0/8".to_owned(), "::1/128".to_owned()],
                registry_ca_file: None,
                blob_grace_hours: crate::role::server::image_gc::default_grace(),
                // And so with what receives events.
                webhook_networks: vec!["127.0.0.0/8".to_owned(), "::1/128".to_owned()],
                zones: plan.zones.clone(),
                join: false,
                authority: Some(authority.clone()),
                tls: tls(server.name.as_str()),
                api_tls: tls(&format!("{}-api", server.name)),
                cells: plan.cells().into_iter().map(|(name, zone)| BootstrapCell { name, zone }).collect(),
                tier: region.tier,
                members: members(&servers),
                global: global.clone(),
            };
            member(dir, server.name.as_str(), &config)?;
        }
        for gateway in plan.gateways_of(region) {
            let config = GatewayConfig {
                name: gateway.name.clone(),
                cluster_id: plan.cluster_id.clone(),
                region: region.name.clone(),
                zone: gateway.zone.clone(),
                http_listen: gateway.http,
                admin_listen: gateway.admin,
                peer_listen: gateway.peer,
                servers: endpoints.clone(),
                data_dir: dir.data(gateway.name.as_str()),
                tls: tls(gateway.name.as_str()),
            };
            member(dir, gateway.name.as_str(), &config)?;
        }
    }
    let hosts = plan.hosts();
    let capacity = machine.share(hosts.len() as u64);
    for host in &hosts {
        let region = plan.region(host.region.as_str()).context("a host is in a region of the plan")?;
        let endpoints: Vec<Endpoint> = plan.servers_of(region).iter().map(|s| s.wire.into()).collect();
        host_configurations(dir, plan, host, &endpoints, tls(host.name.as_str()), capacity, program)?;
    }
    Ok(())
}

fn host_configurations(
    dir: &DataDir,
    plan: &Plan,
    host: &HostPlan,
    servers: &[Endpoint],
    tls: TlsFiles,
    capacity: Capacity,
    program: &Path,
) -> anyhow::Result<()> {
    let name = host.name.as_str();
    let run_dir = PathBuf::from(RUN_DIR);
    let [host_path, agent_path, keeper_path] = host_config_paths(dir, name);
    make_private_dir(host_path.parent().unwrap_or(dir.root()))?;
    make_private_dir(&dir.data(name))?;
    // A host that has registered keeps what it declared: capacity must not change because the disk has filled since.
    let declared = read_optional(&agent_path)?
        .and_then(|text| toml::from_str::<AgentConfig>(&text).ok())
        .map_or(capacity, |config| config.capacity);
    let keeper = KeeperConfig { socket: run_dir.join("keeper.sock"), state_dir: run_dir.join("keeper") };
    let agent = AgentConfig {
        name: host.name.clone(),
        cluster_id: plan.cluster_id.clone(),
        region: host.region.clone(),
        zone: host.zone.clone(),
        cell: host.cell.clone(),
        rack: None,
        fault_domain: None,
        address: host.wire(),
        prefix6: host.prefix6,
        prefix4: host.prefix4,
        servers: servers.to_vec(),
        data_dir: dir.data(name),
        run_dir: run_dir.clone(),
        keeper_socket: keeper.socket.clone(),
        cgroup_parent: cgroup::instances(&plan.cgroup(), name),
        metrics_listen: host.metrics(),
        tls,
        capacity: declared,
        classes: host.classes.clone(),
        images_disk_percent: crate::role::agent::default_images_percent(),
        devices: BTreeMap::new(),
        storage: host
            .storage
            .iter()
            .map(|(class, size)| (class.clone(), storage_folder(dir, name, class, *size)))
            .collect(),
        numa_nodes: Vec::new(),
        uplink_rate: None,
    };
    let cgroups = cgroup::hierarchies().context("reading the mounted cgroup hierarchies")?;
    let init = HostInitConfig {
        name: host.name.clone(),
        program: program.to_owned(),
        cgroups: cgroups.iter().map(|h| h.mount.join(cgroup::of_host(&plan.cgroup(), name)).join("init")).collect(),
        address: host.address6.into(),
        run_dir,
        agent_config: agent_path.clone(),
        agent_log: dir.log(&format!("agent@{name}")),
        keeper_config: keeper_path.clone(),
        keeper_log: dir.log(&format!("keeper@{name}")),
    };
    write_toml(&host_path, &init)?;
    write_toml(&agent_path, &agent)?;
    write_toml(&keeper_path, &keeper)
}

fn storage_folder(dir: &DataDir, host: &str, class: &Name, size: Bytes) -> StorageFolder {
    StorageFolder { path: dir.data(host).join("storage").join(class.as_str()), size: Some(size) }
}

/// The configurations of a host's first process, agent and keeper.
pub fn host_config_paths(dir: &DataDir, host: &str) -> [PathBuf; 3] {
    ["host", "agent", "keeper"].map(|part| dir.config(&format!("{host}/{part}")))
}

fn member(dir: &DataDir, name: &str, config: &impl Serialize) -> anyhow::Result<()> {
    make_private_dir(&dir.data(name))?;
    write_toml(&dir.config(name), config)
}

fn write_toml(path: &Path, config: &impl Serialize) -> anyhow::Result<()> {
    let text = toml::to_string(config).with_context(|| format!("writing {}", path.display()))?;
    let head = "# Written by `nexus up`. Changes are lost at the next one.\n";
    write_if_changed(path, &format!("{head}{text}"))
}

fn write_if_changed(path: &Path, text: &str) -> anyhow::Result<()> {
    if read_optional(path)?.as_deref() == Some(text) { Ok(()) } else { write_private(path, text.as_bytes()) }
}

#[cfg(test)]
mod tests {
    use super::super::plan::GivenChoices;
    use super::*;
    use crate::config::Config as _;

    #[test]
    fn every_role_can_read_what_is_written_for_it() {
        let temp = tempfile::tempdir().unwrap();
        let dir = DataDir::at(temp.path()).unwrap();
        let given = GivenChoices { classes: vec!["zone-b:gpu-v100=2".parse().unwrap()], ..GivenChoices::default() };
        let plan = Plan::new(&given.with_defaults(), [9; 8], |_| true).unwrap();
        dir.create(&plan).unwrap();
        let machine = Machine { cpus: 2, memory: 24 << 30, free_disk: 80 << 30 };
        prepare(&dir, &plan, Path::new("/usr/bin/nexus"), machine).unwrap();

        let server = ServerConfig::load(&dir.config("server-b")).unwrap();
        assert_eq!((server.node_id, server.members.len(), server.cells.len()), (2, 3, 3));
        let hash: nexus_iam::TokenHash = fs::read_to_string(&server.token_hash).unwrap().parse().unwrap();
        assert!(hash.matches(&TokenSecret::parse(&fs::read_to_string(dir.token()).unwrap()).unwrap()));
        for tls in [&server.tls, &server.api_tls] {
            let read = |p: &Path| fs::read_to_string(p).unwrap();
            Identity::from_pem(&read(&tls.cert), &read(&tls.key)).unwrap();
        }
        GatewayConfig::load(&dir.config("gateway-2")).unwrap();
        for host in plan.hosts() {
            let [init, agent, keeper] = host_config_paths(&dir, host.name.as_str());
            HostInitConfig::load(&init).unwrap();
            KeeperConfig::load(&keeper).unwrap();
            let agent = AgentConfig::load(&agent).unwrap();
            assert_eq!(agent.capacity.memory, Bytes(3 << 30));
            assert_eq!(agent.classes.len(), usize::from(host.zone.as_str() == "zone-b"));
        }

        assert_eq!((server.global, server.api_peer_listen), (None, None), "a region alone is as it always was");

        let before = fs::read_to_string(dir.cert("server-a")).unwrap();
        prepare(&dir, &plan, Path::new("/usr/bin/nexus"), Machine { free_disk: 40 << 30, ..machine }).unwrap();
        assert_eq!(fs::read_to_string(dir.cert("server-a")).unwrap(), before, "a good certificate is kept");
        let agent = AgentConfig::load(&host_config_paths(&dir, "zone-a-1")[1]).unwrap();
        assert_eq!(agent.capacity, machine.share(6), "what a host declared stays");
    }

    #[test]
    fn regions_know_who_founded_the_group_that_they_share() {
        let temp = tempfile::tempdir().unwrap();
        let dir = DataDir::at(temp.path()).unwrap();
        let tiers = vec!["region-c=edge".parse().unwrap()];
        let given = GivenChoices { regions: Some(3), tiers, ..GivenChoices::default() };
        let plan = Plan::new(&given.with_defaults(), [9; 8], |_| true).unwrap();
        dir.create(&plan).unwrap();
        let machine = Machine { cpus: 2, memory: 24 << 30, free_disk: 80 << 30 };
        prepare(&dir, &plan, Path::new("/usr/bin/nexus"), machine).unwrap();
        let founders = |server: &str| {
            let config = ServerConfig::load(&dir.config(server)).unwrap();
            assert_eq!(config.members.keys().copied().collect::<Vec<_>>(), [config.node_id]);
            config.global.unwrap().members.into_keys().collect::<Vec<_>>()
        };
        assert_eq!(founders("region-b-server-a"), [1, 101]);
        assert_eq!(founders("region-c-server-a"), [1, 101]);
        let grown = plan.grown(4, &[]).unwrap();
        prepare(&dir, &grown, Path::new("/usr/bin/nexus"), machine).unwrap();
        assert_eq!(founders("region-d-server-a"), [1, 101]);
        let gateway = GatewayConfig::load(&dir.config("region-d-gateway-2")).unwrap();
        assert_eq!((gateway.region.as_str(), gateway.peer_listen.is_some()), ("region-d", true));
        let agent = AgentConfig::load(&host_config_paths(&dir, "region-d-zone-a-1")[1]).unwrap();
        assert_eq!(agent.servers, [plan.grown(4, &[]).unwrap().servers()[3].wire.into()]);
    }
}
