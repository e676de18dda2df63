//! What a client and a server do when the other is away, comes back, stands still or is a stranger.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::common::{LONG, Pki, Running, client_options, loopback, until};
use nexus_env::{Env, FaultyTransport, Links};
use nexus_wire::{Client, ClientOptions, Server, ServerOptions, Streaming, WireError, code};
use tokio_util::sync::CancellationToken;

/// Calls until it is answered.
async fn answered(client: &Client) {
    let asking = async { while client.call::<_, u64>("add", &(2, 3), LONG).await.is_err() {} };
    tokio::time::timeout(LONG, asking).await.expect("the peer is back");
}

#[tokio::test]
async fn a_client_finds_a_restarted_server_again() {
    let (pki, env) = (Pki::new(), Env::real());
    let server = Running::start(&env, pki.server(), loopback()).await;
    let at = server.endpoint.clone();
    let client = Client::new(&env, at.clone(), pki.client(), client_options());
    answered(&client).await;

    server.stop().await;
    let error = client.call::<_, u64>("add", &(2, 3), LONG).await.unwrap_err();
    assert!(matches!(error, WireError::Unreachable { sent: false, .. }), "{error}");
    let server = Running::start(&env, pki.server(), at.clone()).await;
    answered(&client).await;

    server.kill().await;
    let server = Running::start(&env, pki.server(), at).await;
    answered(&client).await;
    drop(server);
}

#[tokio::test]
async fn calls_to_an_absent_peer_wait_no_longer_than_their_deadline() {
    let (pki, env) = (Pki::new(), Env::real());
    let server = Running::start(&env, pki.server(), loopback()).await;
    let at = server.endpoint.clone();
    server.stop().await;
    let options = ClientOptions { backoff_min: LONG * 10, backoff_max: LONG * 10, ..client_options() };
    let client = Client::new(&env, at, pki.client(), options);
    // The first attempt fails at once; the second call waits in the back-off, but only as long as it may.
    for _ in 0..2 {
        let call = client.call::<_, u64>("add", &(2, 3), Duration::from_millis(200));
        let error = tokio::time::timeout(LONG, call).await.expect("bounded by the deadline").unwrap_err();
        assert!(matches!(error, WireError::Unreachable { sent: false, .. }), "{error}");
        assert!(error.is_retryable() && !error.may_have_run());
    }
}

#[tokio::test]
async fn a_server_that_goes_down_says_so_to_its_streams() {
    let (pki, env) = (Pki::new(), Env::real());
    let server = Running::start(&env, pki.server(), loopback()).await;
    let client = Client::new(&env, server.endpoint.clone(), pki.client(), client_options());
    let mut quiet: Streaming<u64> = client.stream("quiet", &()).await.unwrap();
    assert_eq!(quiet.next().await.unwrap().unwrap(), 1);
    server.stop().await;
    let error = quiet.next().await.unwrap().unwrap_err();
    assert!(matches!(&error, WireError::Refused { code, .. } if code == code::DRAINING), "{error}");
    assert!(error.is_retryable());
    assert!(quiet.next().await.is_none());
}

#[tokio::test]
async fn a_killed_server_ends_its_streams_and_calls() {
    let (pki, env) = (Pki::new(), Env::real());
    let server = Running::start(&env, pki.server(), loopback()).await;
    let client = Client::new(&env, server.endpoint.clone(), pki.client(), client_options());
    let mut quiet: Streaming<u64> = client.stream("quiet", &()).await.unwrap();
    assert_eq!(quiet.next().await.unwrap().unwrap(), 1);
    let caller = client.clone();
    let call = tokio::spawn(async move { caller.call::<_, ()>("hang", &(), LONG).await });
    let watched = server.watched.clone();
    until("the call has begun", || watched.begun.load(Ordering::SeqCst) == 2).await;
    server.kill().await;
    let error = quiet.next().await.unwrap().unwrap_err();
    assert!(matches!(error, WireError::Unreachable { sent: true, .. }), "{error}");
    let error = call.await.unwrap().unwrap_err();
    assert!(matches!(error, WireError::Unreachable { sent: true, .. }), "{error}");
}

/// A client and a server with a cable between them that can be cut.
async fn cabled(pki: &Pki, options: ClientOptions) -> (Links, Running, Client) {
    let links = Links::new();
    let env = |label: &str| {
        let env = Env::real();
        let transport = FaultyTransport::new(env.transport.clone(), label, links.clone());
        env.with_transport(Arc::new(transport))
    };
    let server = Running::start(&env("server"), pki.server(), loopback()).await;
    links.name(&server.endpoint, "server");
    let client = Client::new(&env("client"), server.endpoint.clone(), pki.client(), options);
    (links, server, client)
}

fn eager() -> ClientOptions {
    ClientOptions {
        ping_interval: Duration::from_millis(100),
        ping_timeout: Duration::from_secs(2),
        connect_timeout: Duration::from_millis(500),
        ..client_options()
    }
}

#[tokio::test]
async fn a_peer_that_stands_still_is_given_up() {
    let pki = Pki::new();
    let (links, _server, client) = cabled(&pki, eager()).await;
    let mut quiet: Streaming<u64> = client.stream("quiet", &()).await.unwrap();
    assert_eq!(quiet.next().await.unwrap().unwrap(), 1);
    // A quiet stream is kept as long as the peer answers pings.
    tokio::time::timeout(Duration::from_millis(1_500), quiet.next()).await.expect_err("nothing ends it");

    links.cut_both("client", "server");
    let end = tokio::time::timeout(LONG, quiet.next()).await.expect("the silence is noticed");
    let error = end.unwrap().unwrap_err();
    assert!(matches!(&error, WireError::Unreachable { reason, .. } if reason.contains("stopped answering")), "{error}");
    assert!(!client.is_connected());
    // Connecting to it is given up too.
    let error = client.call::<_, u64>("add", &(2, 3), LONG).await.unwrap_err();
    assert!(matches!(error, WireError::Unreachable { sent: false, .. }), "{error}");

    links.heal_all();
    answered(&client).await;
}

#[tokio::test]
async fn a_server_gives_up_a_caller_that_stands_still() {
    let (pki, links) = (Pki::new(), Links::new());
    let env = |label: &str| {
        let env = Env::real();
        let transport = FaultyTransport::new(env.transport.clone(), label, links.clone());
        env.with_transport(Arc::new(transport))
    };
    let watched = Arc::default();
    let options = ServerOptions {
        ping_interval: Duration::from_millis(100),
        ping_timeout: Duration::from_secs(2),
        ..crate::common::server_options()
    };
    let builder = Server::builder(&env("server"), loopback(), pki.server()).options(options);
    let server = crate::common::methods(builder, &watched).bind().await.unwrap();
    let at = server.local();
    links.name(&at, "server");
    let stop = CancellationToken::new();
    let serving = tokio::spawn(server.serve(stop.clone()));
    let client = Client::new(&env("client"), at, pki.client(), client_options());
    let mut quiet: Streaming<u64> = client.stream("quiet", &()).await.unwrap();
    assert_eq!(quiet.next().await.unwrap().unwrap(), 1);
    links.cut_both("client", "server");
    until("the handler is dropped", || watched.dropped.load(Ordering::SeqCst) == 1).await;
    stop.cancel();
    tokio::time::timeout(LONG, serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn an_unused_connection_is_closed_and_made_again() {
    let (pki, env) = (Pki::new(), Env::real());
    let server = Running::start(&env, pki.server(), loopback()).await;
    let options = ClientOptions { idle_timeout: Duration::from_millis(100), ..eager() };
    let client = Client::new(&env, server.endpoint.clone(), pki.client(), options);
    answered(&client).await;
    until("the connection is closed", || !client.is_connected()).await;
    answered(&client).await;
    // A quiet stream is use enough.
    let mut quiet: Streaming<u64> = client.stream("quiet", &()).await.unwrap();
    assert_eq!(quiet.next().await.unwrap().unwrap(), 1);
    tokio::time::timeout(Duration::from_millis(500), quiet.next()).await.expect_err("nothing ends it");
    assert!(client.is_connected());
}

#[tokio::test]
async fn a_server_closes_a_connection_that_nobody_uses() {
    let (pki, env) = (Pki::new(), Env::real());
    let watched = Arc::default();
    let options = ServerOptions {
        ping_interval: Duration::from_millis(100),
        idle_timeout: Duration::from_millis(100),
        ..crate::common::server_options()
    };
    let builder = Server::builder(&env, loopback(), pki.server()).options(options);
    let server = crate::common::methods(builder, &watched).bind().await.unwrap();
    let at = server.local();
    let stop = CancellationToken::new();
    let serving = tokio::spawn(server.serve(stop.clone()));
    let client = Client::new(&env, at, pki.client(), client_options());
    answered(&client).await;
    until("the connection is closed", || !client.is_connected()).await;
    answered(&client).await;
    stop.cancel();
    tokio::time::timeout(LONG, serving).await.unwrap().unwrap();
}

#[tokio::test]
async fn strangers_are_not_served() {
    let (pki, other, env) = (Pki::new(), Pki::new(), Env::real());
    let server = Running::start(&env, pki.server(), loopback()).await;
    // Not trusted by the client, and not trusting the server.
    let stranger = Client::new(&env, server.endpoint.clone(), other.client(), client_options());
    let error = stranger.call::<_, u64>("add", &(2, 3), LONG).await.unwrap_err();
    assert!(matches!(error, WireError::Unreachable { sent: false, .. }), "{error}");
    // Trusting, but without a certificate: TLS 1.3 tells it only after its own handshake is done.
    let mut nobody = rustls::ClientConfig::clone(&pki.client());
    nobody.client_auth_cert_resolver = Arc::new(NoCertificate);
    let nobody = Client::new(&env, server.endpoint.clone(), Arc::new(nobody), client_options());
    let error = nobody.call::<_, u64>("add", &(2, 3), LONG).await.unwrap_err();
    assert!(matches!(error, WireError::Unreachable { sent: false, .. }), "{error}");
    assert!(!nobody.is_connected());
}

#[derive(Debug)]
struct NoCertificate;

impl rustls::client::ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}
