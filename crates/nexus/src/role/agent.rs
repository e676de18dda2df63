//! The agent role: a host's daemon with its engines plugged in.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context as _;
use nexus_agent::images::WireImages;
use nexus_agent::numa::{self, Numa};
use nexus_agent::{AgentHandle, Engines, HostNetworksEngine, Relays, keeper};
use nexus_compute::container::{ContainerConfig, ContainerRuntime, Units, cpuset};
use nexus_compute::function::{FunctionConfig, FunctionRuntime};
use nexus_compute::image::{BlobStore, UnpackLimits};
use nexus_compute::keep::Keep;
use nexus_env::{Endpoint, Env, on_disk};
use nexus_iam::tls::{self, ExpiryPolicy, Policy};
use nexus_iam::{Role, SpiffeId};
use nexus_model::kind::{HostSpec, MAX_TROUBLE, Runtime, StorageClasses};
use nexus_model::{Bytes, Name};
use nexus_network::firewall::Firewall;
use nexus_network::{HostNet, InstanceNet};
use nexus_wire::ServerBook;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::renew::{Certificates, Kept, WireSigner};
use super::server::{identity, tls_clock};
use super::{admin, stopped};
use crate::config::{AgentConfig, NodeConfig};

/// How full a host's disk may be before it parts with images that nothing on it needs.
pub fn default_images_percent() -> u8 {
    80
}

/// Runs until the process is told to stop.
pub async fn run(config: AgentConfig) -> anyhow::Result<()> {
    let env = Env::real();
    let stop = CancellationToken::new();
    let (identity, roots) = identity(&config.tls)?;
    let servers = || {
        Policy::roles(config.cluster_id.clone(), &[Role::Server])
            .expiry(ExpiryPolicy::Tolerate { grace: super::CERTIFICATE_GRACE })
    };
    let client_tls = tls::client_config(&identity, &roots, servers(), &[nexus_wire::ALPN], tls_clock(&env))?;
    let server_tls = tls::server_config(&identity, &roots, servers(), &[nexus_wire::ALPN], tls_clock(&env))?;

    let roots_pem = std::fs::read_to_string(&config.tls.ca)
        .with_context(|| format!("reading the authority {}", config.tls.ca.display()))?;
    let renew_tls = client_tls.clone();
    let exe = std::env::current_exe().context("finding this program's own file")?;
    let program = exe.clone();
    let boot_id = config.run_dir.join("boot-id");
    let boot_id =
        std::fs::read_to_string(&boot_id).or_else(|_| std::fs::read_to_string("/proc/sys/kernel/random/boot_id"));
    let boot_id = boot_id.context("reading the boot id")?.trim().to_owned();
    let (disk, data_dir, configured) = (env.disk.clone(), config.data_dir.clone(), config.servers.clone());
    let book = move || ServerBook::open(&*disk, &data_dir, configured);
    let servers = Arc::new(on_disk(&env.disk, book).await.context("reading where the servers are")?);
    let keep: Arc<dyn Keep> = Arc::new(keeper::Client::new(&config.keeper_socket));
    let dir = config.data_dir.clone();
    let (containers, functions, blobs) = {
        let (keep, env, config) = (keep.clone(), env.clone(), config.clone());
        tokio::task::spawn_blocking(move || -> anyhow::Result<_> {
            let blobs = BlobStore::open(dir.join("images")).context("opening the image store")?;
            let containers = ContainerConfig {
                dir: dir.join("containers"),
                exe: exe.clone(),
                cgroup_parent: std::path::Path::new("/").join(&config.cgroup_parent),
                nameservers: vec![nexus_network::NAMESERVER.into()],
                limits: UnpackLimits::default(),
                devices: units(&config),
                storage: config.storage.iter().map(|(class, folder)| (class.clone(), folder.path.clone())).collect(),
            };
            let containers = ContainerRuntime::new(containers, keep.clone(), blobs.clone(), env.clock.clone())?;
            let by_digest = blobs.clone();
            let functions = FunctionConfig {
                dir: dir.join("functions"),
                keep,
                blob: Arc::new(move |digest| by_digest.path(*digest)),
                exe,
            };
            Ok((containers, FunctionRuntime::new(functions)?, blobs))
        })
        .await
        .context("opening the engines")??
    };
    HostNet::prepare().await.context("preparing the host's network")?;
    let runtimes: BTreeMap<Runtime, Arc<dyn nexus_compute::Runtime>> = BTreeMap::from([
        (Runtime::Container, Arc::new(containers) as Arc<dyn nexus_compute::Runtime>),
        (Runtime::Function, Arc::new(functions) as Arc<dyn nexus_compute::Runtime>),
    ]);
    let images = WireImages::new(&env, client_tls.clone(), servers.clone(), blobs);
    let images = Arc::new(images.full_at(config.images_disk_percent));
    let instances = InstanceNet::new(config.run_dir.join("netns"));
    let engines = Engines {
        images: images.clone(),
        net: Arc::new(instances.clone()),
        firewall: Some(Firewall::own()),
        networks: Some(Arc::new(HostNetworksEngine::new(
            config.run_dir.join("networks"),
            instances,
            config.uplink_rate,
            Relays::new(keep.clone(), program, config.run_dir.join("relays")),
        ))),
        runtimes,
        keep,
    };
    let handle = AgentHandle::default();
    let certificates = Certificates::new(vec![Kept { files: config.tls.clone(), identity }]);
    let ends = certificates.clone();
    let numa = numa(&env, &config).await.context("reading the NUMA nodes")?;
    let daemon = nexus_agent::AgentConfig {
        name: config.name.clone(),
        host: HostSpec {
            zone: config.zone.clone(),
            cell: config.cell.clone(),
            rack: config.rack.clone(),
            fault_domain: config.fault_domain.clone(),
            address: config.address,
            prefix6: config.prefix6,
            prefix4: config.prefix4,
            runtimes: vec![Runtime::Container, Runtime::Function],
            capacity: config.capacity,
            classes: config.classes.clone(),
            storage: storage(&config)?,
            numa_nodes: numa.nodes.clone(),
            numa_trouble: numa.trouble.clone(),
            network_trouble: network_trouble().await,
            ..HostSpec::default()
        },
        numa,
        servers: servers.clone(),
        data_dir: config.data_dir.clone(),
        boot_id,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        client_tls,
        server_tls,
        identify: Arc::new(|chain| tls::peer_id(chain).map(|id| id.to_string())),
        authorize: Arc::new(|caller, _| {
            let id: Option<SpiffeId> = caller.id.as_deref().and_then(|id| id.parse().ok());
            id.and_then(|id| id.role()) == Some(Role::Server)
        }),
        certificate_ends: Arc::new(move || ends.first_end()),
        identity: Some(nexus_agent::IdentityConfig {
            trust_domain: config.cluster_id.clone(),
            roots: roots_pem,
            run_dir: config.run_dir.clone(),
        }),
        secrets_dir: Some(config.run_dir.join("secrets")),
        handle: handle.clone(),
    };
    let mut tasks = JoinSet::new();
    let (ready, metrics) = (handle.clone(), handle);
    let ready = move || if ready.is_ready() { Ok(()) } else { Err("no plan has been followed yet".to_owned()) };
    {
        let pool = nexus_wire::Pool::new(&env, renew_tls, nexus_wire::ClientOptions::default());
        let book = servers.clone();
        let signer = Arc::new(WireSigner { pool, servers: Arc::new(move || book.all()) });
        let (kept, env, stop) = (certificates.clone(), env.clone(), stop.clone());
        tasks.spawn(async move { kept.keep(env, signer, stop).await });
    }
    let text = move || metrics.metrics_text() + &images.metrics_text() + &certificates.metrics_text();
    let facts = admin::Facts { ready: Arc::new(ready), metrics: Arc::new(text) };
    admin::listen(&mut tasks, &env, Endpoint::Tcp(config.metrics_listen), facts, &stop).await?;

    let running = nexus_agent::run(daemon, env, engines, stop.clone());
    tokio::pin!(running);
    tokio::select! {
        biased;
        ended = &mut running => ended?,
        () = stopped() => {
            stop.cancel();
            running.await?;
        }
    }
    tasks.shutdown().await;
    Ok(())
}

/// The nodes behind compute classes, shared out evenly over their units. The configuration was checked for that.
fn units(config: &AgentConfig) -> BTreeMap<Name, Units> {
    let of = |(class, nodes): (&Name, &Vec<std::path::PathBuf>)| {
        let each = nodes.len() / config.classes.get(class).map_or(1, |n| (*n).max(1) as usize);
        (class.clone(), nodes.chunks(each.max(1)).map(<[_]>::to_vec).collect())
    };
    config.devices.iter().map(of).collect()
}

/// The host's NUMA nodes, and what it does about them.
async fn numa(env: &Env, config: &AgentConfig) -> std::io::Result<Numa> {
    let (disk, parent) = (env.disk.clone(), std::path::Path::new("/").join(&config.cgroup_parent));
    let own: Vec<_> = config.numa_nodes.iter().filter_map(NodeConfig::raw).collect();
    let capacity = config.capacity;
    let declare = move || {
        let list = |text: String| text.parse().map_err(|e| format!("{e}"));
        let allowed =
            cpuset(&parent).and_then(|(cpus, memory)| Ok(numa::Allowed { cpus: list(cpus)?, memory: list(memory)? }));
        let kernel = numa::read(&*disk, std::path::Path::new(numa::NODES));
        numa::declare(&kernel, &own, allowed, &capacity)
    };
    let declared = on_disk(&env.disk, declare).await?;
    if !declared.trouble.is_empty() {
        tracing::warn!(why = declared.trouble, "no instance can be kept to a NUMA node here");
    }
    Ok(declared)
}

/// Why tenants' networks can't be here, if that is so.
async fn network_trouble() -> String {
    match nexus_network::vpc::able::try_out().await {
        Ok(()) => String::new(),
        Err(error) => {
            tracing::warn!(%error, "tenants' networks can't be on this host: nothing that has NICs is placed here");
            error.to_string().chars().take(MAX_TROUBLE).collect()
        }
    }
}

/// What the host declares of storage classes: sizes as configured, or as the folders are now.
fn storage(config: &AgentConfig) -> anyhow::Result<StorageClasses> {
    let mut classes = StorageClasses::new();
    for (class, folder) in &config.storage {
        let path = &folder.path;
        std::fs::create_dir_all(path).with_context(|| format!("making {} of storage class {class}", path.display()))?;
        let size = match folder.size {
            Some(size) => size,
            None => {
                let measured = nix::sys::statvfs::statvfs(path);
                let measured = measured.with_context(|| format!("asking how full {} is", path.display()))?;
                let free = measured.blocks_available() as u64 * measured.fragment_size() as u64;
                let files = std::fs::read_dir(path).with_context(|| format!("listing {}", path.display()))?;
                let ours = files.flatten().filter(|file| file.file_name().to_string_lossy().starts_with("nexus-"));
                let theirs: u64 = ours.filter_map(|file| file.metadata().ok()).map(|m| m.len()).sum();
                Bytes(free.saturating_add(theirs) / 10 * 9)
            }
        };
        classes.insert(class.clone(), size);
    }
    Ok(classes)
}
