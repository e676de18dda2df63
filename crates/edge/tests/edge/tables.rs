//! Tables from servers and from the disk.

use std::sync::Arc;
use std::time::Duration;

use nexus_edge::{SourceConfig, follow};
use nexus_env::{Endpoint, Env};
use nexus_iam::tls::{self, Policy};
use nexus_iam::{CertificateAuthority, Identity, Role, Roots, SpiffeId};
use nexus_model::plan::{RoutingTable, TableRequest, method};
use nexus_wire::{Refusal, Server};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::common::*;

pub struct Pki {
    authority: CertificateAuthority,
    roots: Roots,
    env: Env,
}

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

impl Pki {
    pub fn new() -> Self {
        let env = Env::real();
        let now = nexus_iam::at_millis(env.now_millis());
        let authority = CertificateAuthority::generate("home", now, YEAR).unwrap();
        let roots = Roots::from_pem(authority.root_pem()).unwrap();
        Self { authority, roots, env }
    }

    pub fn roots(&self) -> &Roots {
        &self.roots
    }

    pub fn identity(&self, id: SpiffeId) -> Identity {
        let now = nexus_iam::at_millis(self.env.now_millis());
        Identity::from_issued(&self.authority.issue(&id, &[], &[], now, YEAR).unwrap()).unwrap()
    }

    pub fn clock(&self) -> tls::Clock {
        let clock = self.env.clock.clone();
        tls::Clock::millis(move || clock.now_millis())
    }

    pub fn client(&self) -> Arc<rustls::ClientConfig> {
        let own = self.identity(SpiffeId::gateway("home", "gateway-1").unwrap());
        let policy = Policy::roles("home", &[Role::Server]);
        tls::client_config(&own, &self.roots, policy, &[nexus_wire::ALPN], self.clock()).unwrap()
    }

    /// A server that streams what `tables` holds.
    async fn server(&self, tables: watch::Receiver<RoutingTable>) -> (Endpoint, CancellationToken, JoinHandle<()>) {
        let own = self.identity(SpiffeId::server("home", "server-1").unwrap());
        let policy = Policy::roles("home", &[Role::Gateway]);
        let config = tls::server_config(&own, &self.roots, policy, &[nexus_wire::ALPN], self.clock()).unwrap();
        let server = Server::builder(&self.env, "127.0.0.1:0".parse().unwrap(), config)
            .identify(|chain| tls::peer_id(chain).map(|id| id.to_string()))
            .stream(method::TABLE, move |_, request: TableRequest| {
                let tables = tables.clone();
                async move {
                    let state = (tables, request.known);
                    Ok::<_, Refusal>(futures::stream::unfold(state, |(mut tables, known)| async move {
                        let newer = |t: &RoutingTable| known.is_none_or(|k| t.revision > k);
                        let table = tables.wait_for(newer).await.ok()?.clone();
                        let revision = table.revision;
                        Some((Ok::<_, Refusal>(table), (tables, Some(revision))))
                    }))
                }
            })
            .bind()
            .await
            .unwrap();
        let (at, stop) = (server.local(), CancellationToken::new());
        let own_stop = stop.clone();
        let task = tokio::spawn(async move { server.serve(own_stop).await });
        (at, stop, task)
    }
}

#[tokio::test]
async fn tables_come_from_servers_and_survive_without_them() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Pki::new();
    let a = named("a").await;
    let (tell, tables) = watch::channel(table(5, vec![service("x", vec![backend(1, a.address)])]));
    let (at, server_stop, server) = pki.server(tables).await;
    let dead: Endpoint = "127.0.0.1:1".parse().unwrap();
    let source = SourceConfig {
        gateway: "gateway-1".parse().unwrap(),
        cluster_id: "home".into(),
        servers: vec![dead, at],
        peer: None,
        data_dir: dir.path().join("cache"),
        tls: pki.client(),
    };
    let first = edge(options()).await;
    let stop = CancellationToken::new();
    let following = tokio::spawn(follow(first.gateway.clone(), source.clone(), Env::real(), stop.clone()));
    until(async || first.gateway.revision() == Some(5)).await;
    assert_eq!(get(&first, "x.localhost").await.body, "a");
    tell.send(table(6, vec![service("y", vec![backend(1, a.address)])])).unwrap();
    until(async || first.gateway.revision() == Some(6)).await;
    assert_eq!(get(&first, "y.localhost").await.body, "a");
    assert!(!first.gateway.offer(table(4, vec![])));
    let file = source.data_dir.join("table.json");
    until(async || std::fs::read_to_string(&file).is_ok_and(|t| t.contains("\"revision\":6"))).await;
    stop.cancel();
    following.await.unwrap();
    server_stop.cancel();
    server.await.unwrap();

    // No server is left.
    let second = edge(options()).await;
    let stop = CancellationToken::new();
    let following = tokio::spawn(follow(second.gateway.clone(), source.clone(), Env::real(), stop.clone()));
    until(async || second.gateway.revision() == Some(6)).await;
    assert_eq!(get(&second, "y.localhost").await.body, "a");
    stop.cancel();
    following.await.unwrap();

    // Another cluster's revisions mean nothing here, and a damaged file stops nobody.
    for (cluster, content) in [("away", None), ("home", Some("{"))] {
        if let Some(content) = content {
            std::fs::write(&file, content).unwrap();
        }
        let third = edge(options()).await;
        let stop = CancellationToken::new();
        let door = TcpListener::bind(free()).await.unwrap();
        let servers = vec![Endpoint::Tcp(door.local_addr().unwrap())];
        let source = SourceConfig { cluster_id: cluster.into(), servers, ..source.clone() };
        let following = tokio::spawn(follow(third.gateway.clone(), source, Env::real(), stop.clone()));
        // Whoever asks a server has looked at the cache before.
        tokio::time::timeout(LONG, door.accept()).await.unwrap().unwrap();
        assert_eq!(third.gateway.revision(), None);
        stop.cancel();
        following.await.unwrap();
    }
}
