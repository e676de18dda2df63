//! The server role: a member of a region's control plane. Opens the metadata store, runs the writer when it leads,
//! follows the log for hosts and gateways, keeps images, and answers users.

mod audit;
pub mod authority;
pub mod backups;
mod blobs;
pub mod certificates;
mod deliveries;
mod delivery_figures;
pub mod engine;
mod fleet;
mod groups;
mod hosts;
pub mod image_gc;
mod join;
mod keys;
mod membership;
pub mod northbound;
mod operations;
pub mod outbound;
mod providers;
mod pulls;
mod registry;
mod remote;
mod rewrap;
mod secrets;
mod signing;
mod southbound;
mod status;
#[cfg(test)]
mod tests;
mod voters;
mod webhook;
mod workloads;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use nexus_api::{Api, Limits, Operators};
use nexus_control::audit::retention::Pruner;
use nexus_control::directory::Directory;
use nexus_control::view::View;
use nexus_env::{Endpoint, Env};
use nexus_iam::tls::{self, ExpiryPolicy, Identity, Policy, Roots};
use nexus_iam::{Role, TokenHash};
use nexus_model::kind::GLOBAL;
use nexus_store::Store;
use nexus_wire::{ClientOptions, Pool};
use prometheus_client::registry::Registry;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::authority::Authority;
use self::blobs::ServerBlobs;
use self::certificates::Expiry;
use self::fleet::Fleet;
use self::groups::{Gateways, Groups, Writers};
use self::image_gc::Collector;
use self::join::Joins;
use self::membership::{Group, Membership};
use self::operations::ServerOperations;
use self::pulls::ServerPulls;
use self::remote::Remotes;
use self::rewrap::Rewrap;
use self::secrets::Secrets;
use self::southbound::PeerWire;
use self::workloads::Workloads;
use super::renew::{Certificates, Kept, WireSigner};
use super::stopped;
use crate::config::{ServerConfig, TlsFiles};
use crate::inherit::{Inherited, InheritingTransport};

/// How long what runs may take to end when the server goes down.
const DRAIN: Duration = Duration::from_secs(10);
const HAND_OVER: Duration = Duration::from_secs(3);

/// The identity and the authorities in a role's certificate files.
pub fn identity(files: &TlsFiles) -> anyhow::Result<(Identity, Roots)> {
    let read =
        |path: &std::path::Path| std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()));
    let identity = Identity::from_pem(&read(&files.cert)?, &read(&files.key)?)
        .with_context(|| format!("the certificate {}", files.cert.display()))?;
    let roots = Roots::from_pem(&read(&files.ca)?).with_context(|| format!("the authority {}", files.ca.display()))?;
    Ok((identity, roots))
}

/// The clock by which certificates are judged.
pub fn tls_clock(env: &Env) -> tls::Clock {
    let clock = env.clock.clone();
    tls::Clock::millis(move || clock.now_millis())
}

/// Runs until the process is told to stop.
pub async fn run(config: ServerConfig) -> anyhow::Result<()> {
    let env = Env::real().with_transport(Arc::new(InheritingTransport(Inherited::take()?)));
    let stop = CancellationToken::new();
    let (identity, roots) = identity(&config.tls)?;
    // Internal traffic must survive an outage of whoever renews certificates.
    let policy = |roles: &[Role]| {
        Policy::roles(config.cluster_id.clone(), roles)
            .expiry(ExpiryPolicy::Tolerate { grace: super::CERTIFICATE_GRACE })
    };
    let outbound = tls::client_config(
        &identity,
        &roots,
        policy(&[Role::Server, Role::Agent]),
        &[nexus_wire::ALPN],
        tls_clock(&env),
    )?;
    let inbound = tls::server_config(
        &identity,
        &roots,
        policy(&[Role::Server, Role::Agent, Role::Gateway]),
        &[nexus_wire::ALPN],
        tls_clock(&env),
    )?;
    let pool = Arc::new(Pool::new(&env, outbound, ClientOptions::default()));
    let fleet = Fleet::new(&config);
    let authority = Authority::load(&config, &env)?;
    let peers: Arc<PeerWire> = Arc::new(PeerWire::new(fleet.clone(), pool.clone()));

    std::fs::create_dir_all(&config.data_dir).with_context(|| format!("making {}", config.data_dir.display()))?;
    // Peers can't be heard before the stores stand, and a store waits for no peer while it opens.
    let groups = Groups::open(&config, &env, peers.clone()).await?;
    let contract: Arc<dyn Store> = groups.region.clone();
    let backups: Arc<dyn operations::Backups> = Arc::new(backups::ServerBackups::new(&config, &env, groups.clone()));

    let (audit, noted) = audit::open(&config, &env, &groups)?;

    let view = View::new(&config.domain).in_region(&config.region);
    let blobs =
        ServerBlobs::open(&config, fleet.clone(), view.clone(), pool.clone(), groups.global.clone(), &env).await?;
    let blobs = Arc::new(blobs);
    let name = config.name.to_string();
    let collector = Arc::new(Collector::new(blobs.clone(), env.clone(), name, config.blob_grace_hours));
    let writers = Arc::new(Writers::new(&config, &env, &groups, &fleet, peers.clone(), &pool));
    let gateways = Gateways::default();

    let mut tasks = JoinSet::new();
    {
        let (writers, stop) = (writers.clone(), stop.clone());
        tasks.spawn(async move {
            futures::join!(writers.region.run(stop.clone()), writers.global.run(stop));
        });
    }
    {
        let (view, groups, stop) = (view.clone(), groups.clone(), stop.clone());
        tasks.spawn(async move {
            let (region, global) = (groups.region.clone(), groups.global.clone());
            futures::join!(view.follow(region, stop.clone()), view.follow_global(global, stop));
        });
    }
    let directory = Directory::default();
    {
        let (directory, global, stop) = (directory.clone(), groups.global.clone(), stop.clone());
        tasks.spawn(async move { directory.follow(global, stop).await });
    }
    let signer = Arc::new(signing::load(&config.data_dir)?);
    let writer = writers.global.clone();
    tasks.spawn(signing::publish(signer.clone(), config.name.clone(), writer, env.clone(), stop.clone()));
    for (group, store) in [(config.region.as_str(), &groups.region), (GLOBAL, &groups.global)] {
        let hook = config.audit_webhook.as_ref();
        let hook = hook.map(|to| webhook::Webhook::new(to, group, &env, store.clone())).transpose()?;
        let (store, after) = (store.clone(), hook.as_ref().map(webhook::Webhook::row));
        let pruner = Pruner { env: env.clone(), store, keep: config.audit_keep.into(), after };
        tasks.spawn(pruner.run(stop.clone()));
        if let Some(hook) = hook {
            tasks.spawn(hook.run(stop.clone()));
        }
    }
    tasks.spawn(noted.run(contract.clone(), writers.region.clone(), stop.clone()));
    {
        let (audit, stop) = (audit.clone(), stop.clone());
        tasks.spawn(async move {
            futures::join!(audit.region.keep(stop.clone()), audit.global.keep(stop));
        });
    }
    {
        let (blobs, stop) = (blobs.clone(), stop.clone());
        tasks.spawn(async move { blobs.replicate(stop).await });
    }
    {
        let (collector, stop) = (collector.clone(), stop.clone());
        tasks.spawn(async move { collector.run(stop).await });
    }
    tasks.spawn(voters::keep(groups.global.clone(), view.clone(), env.clone(), stop.clone()));
    tasks.spawn(groups::join_global(config.clone(), groups.clone(), pool.clone(), stop.clone()));
    tasks.spawn(groups::tell_the_writer(
        config.clone(),
        groups.clone(),
        writers.clone(),
        fleet.clone(),
        gateways.clone(),
        pool.clone(),
        stop.clone(),
    ));
    let workloads = Arc::new(Workloads::open(
        &config,
        &env,
        groups.global.clone(),
        view.clone(),
        fleet.clone(),
        authority.clone(),
    )?);
    {
        let (workloads, stop) = (workloads.clone(), stop.clone());
        tasks.spawn(async move { workloads.run(stop).await });
    }
    let keys = keys::Keys::open(config.master_keys.as_deref())?;
    {
        let (keys, stop) = (keys.clone(), stop.clone());
        tasks.spawn(async move { keys.follow(stop).await });
    }
    let door = deliveries::door(&config.webhook_networks)?;
    let deliveries = delivery_figures::Figures::default();
    let both: [Arc<dyn Store>; 2] = [contract.clone(), groups.global.clone()];
    for (own, writer) in [&writers.region, &writers.global].into_iter().enumerate() {
        let sender = deliveries::Sender {
            server: config.name.clone(),
            env: env.clone(),
            store: both[own].clone(),
            writer: writer.clone(),
            secrets: both[own..].to_vec(),
            keys: keys.clone(),
            door: door.clone(),
            group: [config.region.as_str(), GLOBAL][own].to_owned(),
            figures: deliveries.clone(),
        };
        tasks.spawn(Arc::new(sender).run(stop.clone()));
    }
    let secrets = Arc::new(Secrets {
        view: view.clone(),
        fleet: fleet.clone(),
        region: contract.clone(),
        global: groups.global.clone(),
        keys: keys.clone(),
        notes: audit.notes.clone(),
        env: env.clone(),
    });
    let methods = southbound::server(
        &config,
        &env,
        inbound,
        &groups,
        &writers,
        &gateways,
        &view,
        &blobs,
        &fleet,
        authority.clone(),
        &workloads,
        &secrets,
    );
    let methods = image_gc::methods(methods, &collector);
    let wire = methods.bind().await.with_context(|| format!("listening on {}", config.wire_listen))?;
    {
        let stop = stop.clone();
        tasks.spawn(async move { wire.serve(stop).await });
    }

    let metrics = Arc::new(Mutex::new(Registry::default()));
    let (api_identity, _) = self::identity(&config.api_tls)?;
    let status = Arc::new(status::Status::new(
        &config,
        &env,
        &groups,
        view.clone(),
        writers.clone(),
        fleet.clone(),
        pool.clone(),
        Expiry::new(
            &config,
            &env,
            view.clone(),
            fleet.clone(),
            vec![("wire", identity.clone()), ("api", api_identity.clone())],
            authority.as_deref(),
        ),
    ));
    status.register(&metrics);
    deliveries.register(&metrics);
    collector.register(&metrics);
    let registries = registry::Registries::new(&config.registry_networks, config.registry_ca_file.as_deref())?;
    let pulls = ServerPulls::new(blobs.clone(), registries);
    pulls.register(&metrics);
    audit::register(&audit.notes, &metrics);
    let hash = std::fs::read_to_string(&config.token_hash)
        .with_context(|| format!("reading {}", config.token_hash.display()))?;
    let hash: TokenHash =
        hash.trim().parse().with_context(|| format!("the hash in {}", config.token_hash.display()))?;
    let membership = Arc::new(Membership::new(
        &config,
        contract.clone(),
        fleet.clone(),
        vec![groups.region.clone() as Arc<dyn Group>, groups.global.clone()],
        pool.clone(),
    ));
    let joins = Joins {
        config: config.clone(),
        env: env.clone(),
        store: contract.clone(),
        fleet: fleet.clone(),
        view: view.clone(),
        authority: authority.clone(),
        token_hash: hash.to_string(),
    };
    let operations = ServerOperations {
        joins,
        membership: membership.clone(),
        writer: writers.region.clone(),
        backups: Some(backups),
        collector,
        rewrap: Rewrap {
            region: config.region.clone(),
            server: config.name.clone(),
            stores: rewrap::stores(&config.region, contract.clone(), groups.global.clone()),
            global_writer: writers.global.clone(),
            keys: keys.clone(),
            env: env.clone(),
        },
    };
    {
        let (fleet, store, stop) = (fleet.clone(), contract.clone(), stop.clone());
        tasks.spawn(async move { fleet.follow(store, stop).await });
    }
    {
        let stop = stop.clone();
        tasks.spawn(async move { membership.run(stop).await });
    }
    let api_client = tls::public_client_config(&roots, &[b"http/1.1"], tls_clock(&env))?;
    let api = Api {
        region: config.region.clone(),
        env: env.clone(),
        store: contract.clone(),
        writer: writers.region.clone(),
        global_store: groups.global.clone(),
        global_writer: writers.global.clone(),
        remote: Arc::new(Remotes::new(&config.region, view.clone(), env.clone(), api_client, stop.clone())),
        directory,
        operators: Operators::new([(hash, "admin".into())]),
        signer,
        master_keys: keys,
        issuer: config.issuer(),
        blobs: blobs.clone(),
        pulls: Arc::new(pulls),
        hosts: Arc::new(hosts::Hosts::new(view.clone(), pool.clone())),
        providers: Arc::new(providers::Providers::new(&config.provider_networks)?),
        webhooks: Arc::new(deliveries::Judge(door)),
        operations: Arc::new(operations),
        status: status.clone(),
        audit,
        metrics,
        shutdown: stop.clone(),
        limits: Limits::default(),
    };
    let router = nexus_api::router(api);
    let certificates = Certificates::new(vec![
        Kept { files: config.tls.clone(), identity: identity.clone() },
        Kept { files: config.api_tls.clone(), identity: api_identity.clone() },
    ]);
    {
        let known = fleet.clone();
        let servers = Arc::new(move || known.wires().iter().filter_map(|wire| wire.parse().ok()).collect());
        let signer = Arc::new(WireSigner { pool: (*pool).clone(), servers });
        let (kept, env, stop) = (certificates.clone(), env.clone(), stop.clone());
        tasks.spawn(async move { kept.keep(env, signer, stop).await });
    }
    let api_tls = tls::public_server_config(&api_identity, &[b"h2", b"http/1.1"], tls_clock(&env))?;
    for listen in [Some(config.api_tls_listen), config.api_peer_listen].into_iter().flatten() {
        let tls = Some(api_tls.clone());
        northbound::listen(&mut tasks, &env, Endpoint::Tcp(listen), tls, router.clone(), &stop).await?;
    }
    if let Some(plain) = config.api_http_listen {
        northbound::listen(&mut tasks, &env, Endpoint::Tcp(plain), None, router, &stop).await?;
    }
    {
        let (status, stop) = (status.clone(), stop.clone());
        tasks.spawn(async move { status.follow_peers(stop).await });
    }
    tracing::info!(server = %config.name, api = %config.api_tls_listen, wire = %config.wire_listen, "serving");

    stopped().await;
    tracing::info!("told to stop; draining");
    // Others lead on at once, so that nobody has to wait until this server's silence is noticed.
    let handed = async { futures::join!(groups.region.hand_over(), groups.global.hand_over()) };
    if tokio::time::timeout(HAND_OVER, handed).await.is_err() {
        tracing::warn!("the leadership could not be handed over in time");
    }
    stop.cancel();
    let drained = tokio::time::timeout(DRAIN, async { while tasks.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!("some work did not end in time and is cut off");
        tasks.shutdown().await;
    }
    groups.shutdown().await;
    Ok(())
}
