//! The server role: a member of a region's control plane. Opens the metadata store, runs the writer when it leads,
//! follows the log for hosts and gateways, keeps images, and answers users.

mod blobs;
mod hosts;
pub mod northbound;
mod southbound;
mod status;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context as _;
use nexus_api::{Api, Limits, Principal, TokenAuthenticator};
use nexus_control::core::Bootstrap;
use nexus_control::region::{self, Region};
use nexus_control::view::View;
use nexus_env::{Endpoint, Env};
use nexus_iam::tls::{self, ExpiryPolicy, Identity, Policy, Roots};
use nexus_iam::{Role, TokenHash};
use nexus_store::Store;
use nexus_store::embedded::{self, EmbeddedStore};
use nexus_wire::{ClientOptions, Pool};
use prometheus_client::registry::Registry;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::blobs::ServerBlobs;
use self::southbound::PeerWire;
use super::stopped;
use crate::config::{ServerConfig, TlsFiles};

/// How long what runs may take to end when the server goes down.
const DRAIN: Duration = Duration::from_secs(10);

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
    let env = Env::real();
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
    let peers: Arc<PeerWire> = Arc::new(PeerWire::new(&config, pool.clone()));

    let store_config = embedded::Config::new(
        config.node_id,
        config.region.as_str().parse().context("the region as a store group")?,
        config.data_dir.join("store"),
        config.members.iter().map(|(id, m)| (*id, m.wire.to_string())).collect(),
    );
    std::fs::create_dir_all(&config.data_dir).with_context(|| format!("making {}", config.data_dir.display()))?;
    // Peers can't be heard before the store stands, and the store waits for no peer while it opens.
    let store: Arc<EmbeddedStore> = Arc::new(EmbeddedStore::open(store_config, env.clone(), peers.clone()).await?);
    let contract: Arc<dyn Store> = store.clone();

    let blobs = Arc::new(ServerBlobs::open(&config, pool.clone()).await?);
    let region = Arc::new(Region::new(
        region::Config {
            node: config.node_id,
            server: config.name.to_string(),
            bootstrap: Bootstrap {
                region: config.region.clone(),
                domain: config.domain.clone(),
                zones: config.zones.clone(),
                cells: config.cells.iter().map(|c| c.name.clone()).collect(),
            },
        },
        env.clone(),
        contract.clone(),
        peers.clone(),
    ));
    let view = View::new(&config.domain);

    let mut tasks = JoinSet::new();
    {
        let (region, stop) = (region.clone(), stop.clone());
        tasks.spawn(async move { region.run(stop).await });
    }
    {
        let (view, store, stop) = (view.clone(), contract.clone(), stop.clone());
        tasks.spawn(async move { view.follow(store, stop).await });
    }
    {
        let (blobs, view, stop) = (blobs.clone(), view.clone(), stop.clone());
        tasks.spawn(async move { blobs.replicate(view, stop).await });
    }
    let wire = southbound::server(&config, &env, inbound, &store, &region, &view, &blobs)
        .bind()
        .await
        .with_context(|| format!("listening on {}", config.wire_listen))?;
    {
        let stop = stop.clone();
        tasks.spawn(async move { wire.serve(stop).await });
    }

    let metrics = Arc::new(Mutex::new(Registry::default()));
    let status = Arc::new(status::Status::new(&config, contract.clone(), view.clone(), region.clone(), pool.clone()));
    status.register(&metrics);
    let hash = std::fs::read_to_string(&config.token_hash)
        .with_context(|| format!("reading {}", config.token_hash.display()))?;
    let hash: TokenHash =
        hash.trim().parse().with_context(|| format!("the hash in {}", config.token_hash.display()))?;
    let api = Api {
        region: config.region.clone(),
        env: env.clone(),
        store: contract.clone(),
        writer: region.clone(),
        authenticator: Arc::new(TokenAuthenticator::new([(hash, Principal { name: "admin".into() })])),
        blobs: blobs.clone(),
        hosts: Arc::new(hosts::Hosts::new(view.clone(), pool.clone())),
        status: status.clone(),
        metrics,
        shutdown: stop.clone(),
        limits: Limits::default(),
    };
    let router = nexus_api::router(api);
    let (api_identity, _) = self::identity(&config.api_tls)?;
    let api_tls = tls::public_server_config(&api_identity, &[b"h2", b"http/1.1"], tls_clock(&env))?;
    northbound::listen(&mut tasks, &env, Endpoint::Tcp(config.api_tls_listen), Some(api_tls), router.clone(), &stop)
        .await?;
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
    stop.cancel();
    let drained = tokio::time::timeout(DRAIN, async { while tasks.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!("some work did not end in time and is cut off");
        tasks.shutdown().await;
    }
    store.shutdown().await;
    Ok(())
}
