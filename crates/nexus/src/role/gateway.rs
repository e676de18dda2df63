//! The gateway role: the edge engine, the servers' tables and the machine's sockets.
//!
//! The engine gets a transport of its own. Its listener shares its port (SO_REUSEPORT), so that a new gateway can start
//! before the old one has drained. Its connections to instances notice a vanished host within about three seconds,
//! whether data is on its way (TCP_USER_TIMEOUT) or an answer is awaited (keep-alive), so that requests can be tried
//! elsewhere while their users still wait, and no limit is needed on how long an instance may think.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use nexus_edge::{Gateway, Options, PeerDoor, SourceConfig, follow, measure};
use nexus_env::{BoxStream, Endpoint, Env, Listener, RealTransport, Transport};
use nexus_iam::Role;
use nexus_iam::tls::{self, ExpiryPolicy, Policy};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpSocket};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::renew::{Certificates, Kept, WireSigner};
use super::server::{identity, tls_clock};
use super::{admin, stopped};
use crate::config::GatewayConfig;
use crate::inherit::Inherited;

/// What gateways speak among themselves: HTTP, in a way of their own.
const PEER_ALPN: &[u8] = b"nexus-edge/1";
/// Set to `1`, every request is logged.
const ACCESS_LOG: &str = "NEXUS_ACCESS_LOG";
/// Unacknowledged data to an instance for this long breaks the connection.
const INSTANCE_TIMEOUT: Duration = Duration::from_secs(2);
const INSTANCE_PROBE: Duration = Duration::from_secs(1);
/// Users may be far away.
const USER_PROBE: Duration = Duration::from_secs(20);
/// Connections that wait to be accepted, as far as the kernel's own limit allows.
const BACKLOG: u32 = 4096;

/// Runs until the process is told to stop, and then until running requests have ended.
pub async fn run(config: GatewayConfig) -> anyhow::Result<()> {
    let env = Env::real();
    let stop = CancellationToken::new();
    let (identity, roots) = identity(&config.tls)?;
    let servers = Policy::roles(config.cluster_id.clone(), &[Role::Server])
        .expiry(ExpiryPolicy::Tolerate { grace: super::CERTIFICATE_GRACE });
    let client_tls = tls::client_config(&identity, &roots, servers, &[nexus_wire::ALPN], tls_clock(&env))?;

    let gateways = || {
        Policy::roles(config.cluster_id.clone(), &[Role::Gateway])
            .expiry(ExpiryPolicy::Tolerate { grace: super::CERTIFICATE_GRACE })
    };
    let peer_client = tls::client_config(&identity, &roots, gateways(), &[PEER_ALPN], tls_clock(&env))?;
    let peer_server = tls::server_config(&identity, &roots, gateways(), &[PEER_ALPN], tls_clock(&env))?;

    let edge_env = env.clone().with_transport(Arc::new(EdgeTransport(Inherited::take()?)));
    let listener = edge_env.transport.bind(&Endpoint::Tcp(config.http_listen)).await;
    let listener = listener.with_context(|| format!("listening at {}", config.http_listen))?;
    let access_log = std::env::var(ACCESS_LOG).is_ok_and(|v| v == "1");
    let options = Options {
        access_log,
        region: Some(config.region.clone()),
        peer_tls: config.peer_listen.map(|_| peer_client),
        ..Options::new(config.zone.clone())
    };
    let gateway = Gateway::new(edge_env.clone(), options);
    let peers = match config.peer_listen {
        Some(at) => {
            let bound = edge_env.transport.bind(&Endpoint::Tcp(at)).await;
            let listener = bound.with_context(|| format!("listening for other regions' gateways at {at}"))?;
            Some(PeerDoor { listener, tls: peer_server })
        }
        None => None,
    };

    let mut tasks = JoinSet::new();
    let (known, counted) = (gateway.clone(), gateway.clone());
    let ready = move || known.revision().map(|_| ()).ok_or_else(|| "no routing table has arrived yet".to_owned());
    let certificates = Certificates::new(vec![Kept { files: config.tls.clone(), identity }]);
    {
        let pool = nexus_wire::Pool::new(&env, client_tls.clone(), nexus_wire::ClientOptions::default());
        let (disk, dir, configured) = (env.disk.clone(), config.data_dir.clone(), config.servers.clone());
        // As the source of tables last wrote it; what it learns later matters for the next renewal.
        let open = move || nexus_wire::ServerBook::open(&*disk, &dir, configured.clone()).all();
        let signer = Arc::new(WireSigner { pool, servers: Arc::new(open) });
        let (told, on, by, end) = (certificates.clone(), env.clone(), signer.clone(), stop.clone());
        let name = config.name.clone();
        tasks.spawn(async move { told.tell(name, on, by, end).await });
        let (kept, env, stop) = (certificates.clone(), env.clone(), stop.clone());
        tasks.spawn(async move { kept.keep(env, signer, stop).await });
    }
    let text = move || counted.metrics_text() + &certificates.metrics_text();
    let facts = admin::Facts { ready: Arc::new(ready), metrics: Arc::new(text) };
    // A gateway that is going down answers here to its end; the next one must be able to listen meanwhile.
    let admin_stop = CancellationToken::new();
    admin::listen(&mut tasks, &edge_env, Endpoint::Tcp(config.admin_listen), facts, &admin_stop).await?;

    let source = SourceConfig {
        gateway: config.name.clone(),
        cluster_id: config.cluster_id.clone(),
        servers: config.servers.clone(),
        peer: config.peer_listen,
        data_dir: config.data_dir.clone(),
        tls: client_tls,
    };
    // Tables still matter while running requests are retried, so this goes on until they have ended.
    let following = CancellationToken::new();
    let mut follower = JoinSet::new();
    follower.spawn(measure(source.clone(), env.clone(), following.clone()));
    follower.spawn(follow(gateway.clone(), source, env, following.clone()));
    tracing::info!(gateway = %config.name, listen = %config.http_listen, "serving");
    let serving = async {
        match peers {
            Some(peers) => gateway.serve_with_peers(listener, peers, stop.clone()).await,
            None => gateway.serve(listener, stop.clone()).await,
        }
    };
    tokio::pin!(serving);
    tokio::select! {
        biased;
        () = &mut serving => {}
        () = stopped() => {
            stop.cancel();
            serving.await;
        }
    }
    following.cancel();
    while follower.join_next().await.is_some() {}
    admin_stop.cancel();
    tasks.shutdown().await;
    Ok(())
}

/// See the head of this file. Listeners that the process was given are used in place of new ones.
struct EdgeTransport(Inherited);

fn tune(socket: SockRef<'_>, probe: Duration) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(probe).with_interval(probe).with_retries(2))
}

fn socket(addr: &SocketAddr) -> io::Result<TcpSocket> {
    if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }
}

#[async_trait]
impl Transport for EdgeTransport {
    async fn connect(&self, to: &Endpoint) -> io::Result<BoxStream> {
        let Endpoint::Tcp(addr) = to else { return RealTransport.connect(to).await };
        let socket = socket(addr)?;
        tune(SockRef::from(&socket), INSTANCE_PROBE)?;
        SockRef::from(&socket).set_tcp_user_timeout(Some(INSTANCE_TIMEOUT))?;
        Ok(Box::new(socket.connect(*addr).await?))
    }

    async fn bind(&self, at: &Endpoint) -> io::Result<Box<dyn Listener>> {
        let Endpoint::Tcp(addr) = at else { return RealTransport.bind(at).await };
        if let Some(listener) = self.0.at(*addr) {
            return Ok(Box::new(EdgeListener(listener?)));
        }
        let socket = socket(addr)?;
        socket.set_reuseaddr(true)?;
        socket.set_reuseport(true)?;
        socket.bind(*addr)?;
        Ok(Box::new(EdgeListener(socket.listen(BACKLOG)?)))
    }
}

struct EdgeListener(TcpListener);

#[async_trait]
impl Listener for EdgeListener {
    fn local(&self) -> Endpoint {
        Endpoint::Tcp(self.0.local_addr().expect("a bound listener has an address"))
    }

    async fn accept(&mut self) -> io::Result<(BoxStream, Endpoint)> {
        loop {
            let (stream, peer) = self.0.accept().await?;
            // A peer that is already gone again is no reason to stop accepting.
            if tune(SockRef::from(&stream), USER_PROBE).is_ok() {
                return Ok((Box::new(stream), Endpoint::Tcp(peer)));
            }
        }
    }
}
